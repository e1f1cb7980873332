"""Images, labels and weights for the tests of this folder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from every_setting import recipes
from simmim import cli
from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.weights_file import save_tensors, save_weights

CLASSES = ("ash", "elm", "fir")
# (width, height) in turn: some have more than 2000 pixels, and some fewer.
SIZES = ((44, 40), (50, 44))
SWIN = SwinSpec(image_size=(32, 32), embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=2)

SWINV2 = SwinV2Spec(
    image_size=(32, 32), embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4
)
VIT = ViTSpec(
    image_size=(32, 32), patch_size=8, embed_dim=64, depth=1, num_heads=2,
    absolute_position=True, shared_relative_position=False,
)  # fmt: skip


def write_images(folder: Path, count: int, seed: int) -> Path:
    """Smooth random pictures, of SIZES in turn."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        small = Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        picture = small.resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)
        picture.save(folder / f"{folder.name}{number:02d}.png")
    return folder


def write_deep_images(folder: Path, count: int, seed: int) -> Path:
    """Arrays of 16 bits, most of whose range is empty."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        values = draw.integers(0, 4096, (40, 44, 3))
        np.save(folder / f"{number:02d}.npy", values.astype(np.uint16))
    return folder


def write_classes(folder: Path, count: int, seed: int) -> Path:
    """A folder of each class."""
    for number, name in enumerate(CLASSES):
        write_images(folder / name, count, 10 * seed + number)
    return folder


def labelled_inputs(folder: Path) -> dict[str, Path]:
    """Labelled images in every form: class folders, train beside val, and label files."""
    folder.mkdir(exist_ok=True)
    for name, seed in (("labelled", 1), ("otherwise", 2)):
        write_classes(folder / name / "train", 4, seed)
        write_classes(folder / name / "val", 2, seed + 5)
    for number, name in enumerate(CLASSES):
        write_deep_images(folder / "deep" / name, 4, number)
    flat = write_images(folder / "flat", 12, 3)
    inputs = {
        "labelled": folder / "labelled",
        "labelled_otherwise": folder / "otherwise",
        "train": folder / "labelled" / "train",
        "val": folder / "labelled" / "val",
        "deep": folder / "deep",
        "flat": flat,
    }
    names = [path.name for path in sorted(flat.iterdir())]
    # a list of numbers follows the sorted names of files
    lists = {
        "labels": [f"{name},{CLASSES[i % 3]}" for i, name in enumerate(names)],
        "other_labels": [f"{name},{CLASSES[i // 4]}" for i, name in enumerate(names)],
        "numbers": [f"{name},{i % 3}" for i, name in enumerate(names)],
        "numbers_from_1": [f"{name},{1 + i % 3}" for i, name in enumerate(names)],
    }
    for name, rows in lists.items():
        inputs[name] = folder / f"{name}.csv"
        inputs[name].write_text("\n".join(["name,label", *rows]) + "\n")
    inputs["names"] = folder / "names.txt"
    inputs["names"].write_text("oak\npine\nyew\n")
    # the same images in another folder, in which a label file finds them too
    validation = folder / "validation" / "flat"
    write_images(validation, 12, 4)
    return inputs | {"validation": validation}


def write_pretrained(path: Path, seed: int) -> Path:
    """Weights of a SimMIM with a tiny Swin."""
    torch.manual_seed(seed)
    save_weights(SimMIM(build_encoder(SWIN)), path)
    return path


def command_inputs(folder: Path) -> dict[str, Path]:
    """Those of `labelled_inputs`, and models, results and folders for every command."""
    inputs = labelled_inputs(folder)
    inputs["photo"] = inputs["flat"] / "flat00.png"
    inputs["other"] = inputs["flat"] / "flat01.png"
    inputs["deep_photo"] = inputs["deep"] / "ash" / "00.npy"
    inputs["others"] = inputs["labelled_otherwise"] / "train"
    for name, lines in (("reordered", "fir ash elm"), ("more_names", "oak pine yew lime")):
        inputs[name] = folder / f"{name}.txt"
        inputs[name].write_text("\n".join(lines.split()) + "\n")
    return inputs | _models(folder) | _results(folder)


def _models(folder: Path) -> dict[str, Path]:
    made = {}
    for seed, prefix in enumerate(("", "other_")):
        made[f"{prefix}weights"] = write_pretrained(folder / f"{prefix}weights.safetensors", seed)
        made[f"{prefix}classifier"] = folder / f"{prefix}classifier.safetensors"
        classifier = Classifier(build_encoder(SWIN), CLASSES)
        with torch.no_grad():  # answers that differ enough to be printed
            classifier.head.weight.mul_(50)
        save_weights(classifier, made[f"{prefix}classifier"])
    bare = {"official": SWIN, "bare_vit": VIT, "bare_swinv2": SWINV2}
    for name, spec in bare.items():
        made[name] = folder / f"{name}.safetensors"
        state = SimMIM(build_encoder(spec)).state_dict()
        # as other programs save them: no metadata, and of buffers only what has no other source
        kept = {
            k: v.contiguous() for k, v in state.items() if k.startswith(("encoder.", "decoder."))
        }
        save_tensors(kept, made[name])
    return made


def _results(folder: Path) -> dict[str, Path]:
    results = folder / "results"
    results.mkdir()
    for name in ("probe.json", "knn.json", "per_class.csv", "picture.png", "model.safetensors"):
        (results / name).write_text("")
    (results / "features.npy").write_text("")
    run, packed = folder / "run", folder / "packed"
    images = write_images(folder / "few", 4, 9)
    recipe = folder / "run.toml"
    recipe.write_text(
        recipes.SIMMIM.replace("$images", str(images)).replace("picture_every_steps = -1", "")
    )
    for arguments in (["pretrain", recipe, f"--output={run}"], ["pack", images, packed]):
        assert cli.main([str(argument) for argument in arguments]) == 0
    return {
        "results": results,
        "picture": results / "picture.png",
        "features": results / "features.npy",
        "converted": results / "model.safetensors",
        "exported": results,
        "run": run,
        "packed": packed,
    }
