"""Features of every layer, of a batch and of whole sources, in memory and in files."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simmim.backbone.build import build_encoder
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.commands import features as command
from simmim.data.open import open_source
from simmim.distributed import World
from simmim.downstream import features as module
from simmim.downstream.evaluate import evaluation_view
from simmim.downstream.features import (
    bytes_of,
    count_not_finite,
    extract_features,
    feature_batches,
    feature_shapes,
    layer_features,
    layer_names,
    load_for_features,
    pick_layers,
)
from simmim.errors import DataError, RunError
from simmim.method.simmim import SimMIM
from simmim.model import weights_file
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel
from simmim.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

SWIN = SwinSpec(
    image_size=(32, 64), embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, drop_path=0.5
)
VIT = ViTSpec(image_size=(32, 64), patch_size=8, embed_dim=16, depth=2, num_heads=2)


def swin() -> SimMIM:
    return SimMIM(build_encoder(SWIN))


def vit() -> SimMIM:
    return SimMIM(build_encoder(VIT))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of two classes, noise of different sizes; the third is broken."""
    draw = np.random.default_rng(0)
    for number in range(7):
        path = tmp_path / "images" / ("cat" if number < 4 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (40 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "images" / "cat" / "2.png").write_bytes(b"no image")
    return tmp_path / "images"


READABLE = [0, 1, 3, 4, 5, 6]


def by_hand(model: SimMIM, image: Tensor) -> dict[str, Tensor]:
    """The means of the patch tokens, by running the parts of the encoder one after the other."""
    model.eval()
    encoder = model.encoder
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, out: found.append(out))
        for block in (
            encoder.blocks
            if hasattr(encoder, "blocks")
            else [b for s in encoder.layers for b in s.blocks]
        )
    ]
    with torch.no_grad():
        output = encoder(image)
    for handle in handles:
        handle.remove()
    means = [t.mean((1, 2)) if t.dim() == 4 else t[:, 1:].mean(1) for t in found]
    return {
        **{f"block {n}": mean for n, mean in enumerate(means, 1)},
        "output": output.mean((2, 3)),
    }


def embeddings(model: ImageModel, folder: Path, layer: str = "output") -> dict[int, Tensor]:
    """The features of every readable image, one image at a time."""
    source = open_source(str(folder))
    view = evaluation_view(model)
    return {
        sample: layer_features(model, torch.from_numpy(view(source.read(sample)))[None])[layer][0]
        for sample in READABLE
    }


@pytest.mark.parametrize("make", [swin, vit])
def test_all_layers_of_one_pass_are_those_of_the_encoder(make: Callable[[], SimMIM]) -> None:
    model = make().train()
    image = torch.randn(3, 3, 32, 64)
    found = layer_features(model, image)
    assert model.training
    assert model.encoder.patch_embed.training
    assert not any(module._forward_hooks for module in model.modules())
    expected = by_hand(model, image)
    assert list(found) == list(expected) == layer_names(model)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6)
    some = layer_features(model, image, ["output", "block 2"])
    assert list(some) == ["block 2", "output"]
    torch.testing.assert_close(some["block 2"], found["block 2"])


def test_stages_of_a_swin_have_their_own_widths() -> None:
    model = swin()
    assert feature_shapes(model) == {
        "block 1": (8,),
        "block 2": (16,),
        "block 3": (16,),
        "output": (16,),
    }
    assert feature_shapes(model, ["block 1", "output"], "none") == {
        "block 1": (8 * 16, 8),
        "output": (4 * 8, 16),
    }


def test_patch_tokens_come_row_by_row_and_without_the_class_token() -> None:
    model = vit()
    image = torch.randn(2, 3, 32, 64)
    whole = layer_features(model, image, pool="none")
    assert whole["output"].shape == (2, 4 * 8, 16)
    expected = model.eval().encode(image).detach()
    torch.testing.assert_close(whole["output"].transpose(1, 2).reshape(2, 16, 4, 8), expected)
    mean = layer_features(model, image)
    for name, values in whole.items():
        torch.testing.assert_close(values.mean(1), mean[name], rtol=1e-5, atol=1e-6)


def test_the_class_token_is_the_first_after_the_norm() -> None:
    model = vit()
    image = torch.randn(2, 3, 32, 64)
    found = layer_features(model, image, pool="cls")
    caught: list[Tensor] = []
    handle = model.encoder.norm.register_forward_hook(lambda _m, _i, out: caught.append(out))
    model.eval().encode(image)
    handle.remove()
    torch.testing.assert_close(found["output"], caught[0][:, 0].detach())
    norm = torch.nn.functional.layer_norm(found["block 2"], (16,), eps=1e-6)
    torch.testing.assert_close(found["output"], norm, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Swin has no class token"):
        layer_features(swin(), image, pool="cls")


def test_a_fine_tuned_vit_is_normalised_as_its_head_sees_it() -> None:
    spec = ViTSpec(
        image_size=(32, 32), patch_size=8, embed_dim=16, depth=1, num_heads=2, final_norm=False
    )
    model = Classifier(build_encoder(spec), ["a", "b"])
    with torch.no_grad():
        model.fc_norm.weight.uniform_(0.5, 2)
    image = torch.randn(2, 3, 32, 32)
    found = layer_features(model, image)
    torch.testing.assert_close(found["output"], model.eval().pool(image).detach())
    assert not torch.allclose(found["output"], found["block 1"], atol=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_computes_but_keeps_float32(precision: str) -> None:
    model, image = vit(), torch.randn(2, 3, 32, 64)
    exact, low = layer_features(model, image), layer_features(model, image, precision=precision)
    for name, values in exact.items():
        assert low[name].dtype == torch.float32
        assert 0 < (low[name] - values).abs().max() < 0.05


def test_layers_are_picked_by_number() -> None:
    model = swin()
    assert pick_layers(model, "output,1") == ["block 1", "output"]
    assert pick_layers(model, "all") == layer_names(model)
    for wrong in ("4", "0", "x", "", "1,,2"):
        with pytest.raises(ValueError, match='blocks 1 to 3, and "output"'):
            pick_layers(model, wrong)
    with pytest.raises(ValueError, match="no layer block 9"):
        layer_features(model, torch.zeros(1, 3, 32, 64), ["block 9"])
    with pytest.raises(ValueError, match="pool=max"):
        layer_features(model, torch.zeros(1, 3, 32, 64), pool="max")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_unreadable_images_are_named_and_left_out(folder: Path, batch_size: int) -> None:
    model, lines, done = vit(), [], []
    found = extract_features(
        model,
        open_source(str(folder)),
        batch_size=batch_size,
        workers=0,
        report=lines.append,
        advance=done.append,
    )
    assert found.ids.tolist() == READABLE
    assert sum(done) == 7
    assert len(lines) == 1
    assert "unreadable, left out: cat/2.png: " in lines[0]
    for row, expected in enumerate(embeddings(model, folder).values()):
        torch.testing.assert_close(found.layers["output"][row], expected, rtol=1e-5, atol=1e-6)


def test_chosen_samples_come_in_their_order(folder: Path) -> None:
    model = swin()
    found = extract_features(
        model, open_source(str(folder)), samples=[5, 0, 4], workers=0, layers=["output"]
    )
    assert found.ids.tolist() == [5, 0, 4]
    expected = embeddings(model, folder)
    for row, sample in enumerate([5, 0, 4]):
        torch.testing.assert_close(
            found.layers["output"][row], expected[sample], rtol=1e-5, atol=1e-6
        )


def test_no_readable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 1 images could be read \(1.png: "):
        extract_features(vit(), open_source(str(tmp_path)), workers=0, report=lambda line: None)


def test_features_that_overflow_are_an_error(folder: Path) -> None:
    model = vit()
    with torch.no_grad():
        model.encoder.norm.bias[0] = 1e6
    source = open_source(str(folder))
    options = {"workers": 0, "report": lambda line: None}
    with pytest.raises(RunError, match="output: features of 6 of 6 images are not finite"):
        extract_features(model, source, dtype=torch.float16, **options)
    assert extract_features(model, source, **options).layers["output"].max() > 9e5


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32], list[int]]:
    """ids, features and labels of a parquet file of one layer."""
    table = pq.read_table(path)
    flat = table["feature"].combine_chunks().flatten()
    return (
        table["id"].to_numpy(),
        flat.to_numpy(zero_copy_only=False).reshape(table.num_rows, -1),
        table["label"].to_pylist(),
    )


def saved(model: ImageModel, folder: Path) -> str:
    path = folder / "model.safetensors"
    weights_file.save_weights(model, path)
    return str(path)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = swin()
    weights, out = saved(model, folder.parent), folder.parent / "made" / "out.parquet"
    call = [weights, str(folder), str(out), "--workers=0", "--device=cpu", "--batch-size=4"]
    assert command.main([*call, "--layer=2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}: block 2 of 6 images, 1 left out\n"
    assert captured.err.startswith("simmim: unreadable, left out: cat/2.png: ")
    ids, features, labels = load(out)
    assert (ids.tolist(), labels) == (READABLE, [0, 0, 0, 1, 1, 1])
    expected = torch.stack(list(embeddings(model, folder, "block 2").values())).numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)

    before = out.read_bytes()
    assert command.main(call) == 2
    assert capsys.readouterr().err == (
        f"simmim: error: {out} exists; choose another OUT or add --overwrite\n"
    )
    assert out.read_bytes() == before
    assert command.main([*call, "--overwrite", "--dtype=float16", "--layer=all"]) == 0
    assert pq.read_table(out).column_names[3:] == layer_names(model)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--layer=9"], 'layer "9": the model has blocks 1 to 3, and "output"'),
        (["--pool=cls"], "a Swin has no class token; pool its patch tokens (mean)"),
        (["--image-size=40"], "a window of 4 tokens does not fit the 10×10 tokens"),
        (["--image-size", "1", "2", "3"], "--image-size takes one or two numbers"),
        (["--first-number=1"], "explain a label_file"),
        (["--margin=0.5"], "margin=0.5: choose 1 or more"),
    ],
)
def test_command_refuses_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    weights, out = saved(swin(), folder.parent), folder.parent / "out.npy"
    call = [weights, str(folder), str(out), "--workers=0", "--device=cpu"]
    assert command.main([*call, *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not out.exists()
    assert command.main([weights, str(folder), str(out.with_suffix(".txt"))]) == 2
    assert "end it with .safetensors, .npy or .parquet" in capsys.readouterr().err
    assert command.main([weights, str(folder / "nothing"), str(out)]) == 2
    assert "nothing: no such file or folder" in capsys.readouterr().err


def test_arrays_of_seven_channels(tmp_path: Path) -> None:
    spec = ViTSpec(image_size=(16, 16), patch_size=8, channels=7, embed_dim=8, depth=1, num_heads=2)
    weights = saved(SimMIM(build_encoder(spec)), tmp_path)
    draw = np.random.default_rng(1)
    (tmp_path / "bands").mkdir()
    for number in range(3):
        values = draw.integers(0, 256, (20, 20, 7), dtype=np.uint8)
        np.save(tmp_path / "bands" / f"{number}.npy", values)
    out = tmp_path / "out.npy"
    call = [weights, str(tmp_path / "bands"), str(out), "--workers=0", "--device=cpu"]
    assert command.main(call) == 0
    assert np.load(out).shape == (3, 8)
    assert list(read_table(tmp_path / "out.npy.csv")[0]) == ["row", "id", "name"]


def test_a_larger_image_size_and_an_encoder_without_a_decoder(folder: Path) -> None:
    model = swin()
    state = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    path = folder.parent / "encoder.pth"
    torch.save(state, path)
    loaded = load_for_features(path, (32, 64))
    image = torch.randn(1, 3, 32, 64)
    found = layer_features(loaded, image)
    for name, values in layer_features(model, image).items():
        torch.testing.assert_close(found[name], values)
    larger = load_for_features(path, (64, 128))
    assert feature_shapes(larger, ["output"], "none") == {"output": (8 * 16, 16)}


def test_every_option_reaches_the_pass_and_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pass, real, given = module.one_pass, module.layer_features, list[Any]()

    def noted_pass(source: Any, view: Any, world: Any, **named: Any) -> Any:
        given.append({"view": view, "world": world, **named})
        return real_pass(source, view, world, **{**named, "workers": 0})

    def noted(model: Any, image: Tensor, layers: Any, **named: Any) -> dict[str, Tensor]:
        given.append((layers, named))
        return real(model, image, layers, **named)

    monkeypatch.setattr(module, "one_pass", noted_pass)
    monkeypatch.setattr(module, "layer_features", noted)
    model, source, told = vit(), open_source(str(folder)), list[str]()
    view, tell = evaluation_view(model, margin=1.5), told.append
    named = {"layers": ["block 1"], "pool": "cls", "precision": "bf16"}
    options = {"batch_size": 9, "view": view, "workers": 3, "timeout_s": 7, "report": tell}
    list(feature_batches(model, source, **named, **options, samples=[0, 1]))
    list(feature_batches(model, source, report=tell))
    world = World(0, 1, torch.device("cpu"))
    for passed in given[::2]:
        passed.pop("note_problem")
    assert given[0] == options | {"samples": [0, 1], "world": world}
    assert given[1] == (["block 1"], {"pool": "cls", "precision": "bf16"})
    assert given[2].pop("view").margin == 256 / 224
    assert given[2] == {
        "batch_size": 64, "workers": -1, "samples": None, "timeout_s": 120, "report": tell,
        "world": world,
    }  # fmt: skip
    assert given[3] == (None, {"pool": "mean", "precision": "float32"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_are_kept_in_the_type_that_is_asked(folder: Path, dtype: torch.dtype) -> None:
    model, options = vit(), {"workers": 0, "report": lambda line: None}
    source = open_source(str(folder))
    found = extract_features(model, source, dtype=dtype, layers=["block 1"], pool="none", **options)
    exact = extract_features(model, source, layers=["block 1"], pool="none", **options)
    assert found.layers["block 1"].dtype == dtype
    assert found.layers["block 1"].shape == (6, 32, 16)
    assert torch.equal(found.layers["block 1"], exact.layers["block 1"].to(dtype))


def test_a_runs_folder_gives_its_best_weights_and_a_classifier_its_head(tmp_path: Path) -> None:
    spec = ViTSpec(image_size=(16, 16), patch_size=8, embed_dim=8, depth=1, num_heads=2)
    for value, path in (
        (0.5, tmp_path / "model.safetensors"),
        (2.0, RunFolder(tmp_path).best_weights),
    ):
        model = Classifier(build_encoder(replace(spec, final_norm=False)), ["a", "b"])
        torch.nn.init.constant_(model.fc_norm.weight, value)
        weights_file.save_weights(model, path)
    loaded = load_for_features(tmp_path)
    assert isinstance(loaded, Classifier)
    assert loaded.fc_norm.weight.unique().tolist() == [2.0]
    assert not loaded.training
    pretrained = load_for_features(saved(SimMIM(build_encoder(spec)), tmp_path))
    assert type(pretrained).__name__ == "ImageModel"


def test_rows_that_are_not_finite_are_counted_once() -> None:
    rows = torch.zeros(9000, 2, 2)
    rows[[3, 4500, 8999], 1] = torch.nan
    rows[3, 0, 0] = torch.inf
    assert count_not_finite(rows) == 3
    assert count_not_finite(rows[:3]) == 0


def test_bytes_of_an_image_are_those_of_all_its_layers() -> None:
    shapes = {"a": (4, 3), "b": (5,)}
    assert bytes_of(shapes, torch.float16) == 34
    assert bytes_of(shapes, torch.float32) == 68


def test_the_maps_of_a_convnet_are_pooled_over_their_pixels() -> None:
    spec = ResNetSpec(image_size=(64, 64), depths=(1, 1, 1, 1), bottleneck=False, width=4)
    model = SimMIM(build_encoder(spec))
    image = torch.randn(2, 3, 64, 64)
    mean, whole = layer_features(model, image), layer_features(model, image, pool="none")
    assert feature_shapes(model, ["block 1", "output"]) == {"block 1": (4,), "output": (32,)}
    caught: list[Tensor] = []
    handle = model.encoder.blocks_in_order()[0].register_forward_hook(
        lambda _m, _i, out: caught.append(out)
    )
    with torch.no_grad():
        model.eval().encode(image)
    handle.remove()
    torch.testing.assert_close(mean["block 1"], caught[0].mean((2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole["block 1"], caught[0].flatten(2).transpose(1, 2))
