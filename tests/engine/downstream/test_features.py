"""Features of every layer, of a batch and of whole sources, in memory and in files."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.commands import features as command
from simmim.data.labels import labels_of
from simmim.data.open import open_source
from simmim.data.source import PackedStrings
from simmim.downstream import feature_files
from simmim.downstream.evaluate import evaluation_view
from simmim.downstream.feature_files import write_features
from simmim.downstream.features import (
    extract_features,
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


def load(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32], list[str], list[int]]:
    """ids, features, names and labels of a file of one layer."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        flat = table["feature"].combine_chunks().flatten()
        return (
            table["id"].to_numpy(),
            flat.to_numpy(zero_copy_only=False).reshape(table.num_rows, -1),
            table["name"].to_pylist(),
            table["label"].to_pylist(),
        )
    rows = read_table(path.with_name(f"{path.name}.csv"))
    assert [int(row["row"]) for row in rows] == list(range(len(rows)))
    ids = np.array([int(row["id"]) for row in rows])
    names, labels = [row["name"] for row in rows], [int(row["label"]) for row in rows]
    if path.suffix == ".npy":
        return ids, np.load(path, mmap_mode="r"), names, labels
    tensors = load_file(path)
    assert tensors["ids"].tolist() == ids.tolist()
    assert tensors["labels"].tolist() == labels
    return ids, tensors["features"].numpy(), names, labels


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".parquet"])
def test_a_file_holds_the_readable_images(folder: Path, suffix: str, dtype: str) -> None:
    model, path = vit(), folder.parent / f"out{suffix}"
    source = open_source(str(folder))
    count = write_features(
        path,
        model,
        source,
        labels_of(source),
        dtype=dtype,
        layers=["output"],
        batch_size=2,
        workers=0,
        report=lambda line: None,
    )
    assert count == 6
    ids, features, names, labels = load(path)
    assert ids.tolist() == READABLE
    assert features.dtype == dtype
    assert names == [source.names[sample] for sample in READABLE]
    assert labels == [0, 0, 0, 1, 1, 1]
    expected = torch.stack(list(embeddings(model, folder).values())).numpy()
    np.testing.assert_allclose(
        features,
        expected,
        rtol=2e-3 if dtype == "float16" else 1e-5,
        atol=1e-3 if dtype == "float16" else 1e-6,
    )
    assert not list(folder.parent.glob(".*tmp*"))


@pytest.mark.parametrize("chunk", [7, 2**26])
def test_all_layers_in_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(feature_files, "CHUNK_BYTES", chunk)  # several moves, several row groups
    model, source = swin(), open_source(str(folder))
    options = {"batch_size": 2, "workers": 0, "report": lambda line: None}
    arrays, table = folder.parent / "a.safetensors", folder.parent / "a.parquet"
    for path in (arrays, table):
        assert write_features(path, model, source, **options) == 6
    expected = extract_features(model, source, **options).layers
    tensors, columns = load_file(arrays), pq.read_table(table)
    assert set(tensors) == {"ids", *expected}
    assert columns.column_names == ["id", "name", *expected]
    for name, values in expected.items():
        torch.testing.assert_close(tensors[name], values)
        flat = columns[name].combine_chunks().flatten().to_numpy()
        np.testing.assert_array_equal(flat.reshape(values.shape), tensors[name].numpy())
    assert pq.ParquetFile(table).num_row_groups == (4 if chunk == 7 else 1)
    with safe_open(arrays, "pt") as reader:
        about = json.loads(reader.metadata()["simmim.features"])
    assert about == {"layers": list(expected), "pool": "mean"}
    with pytest.raises(ValueError, match=r"an \.npy file holds one layer"):
        write_features(folder.parent / "a.npy", model, source, **options)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".parquet"])
def test_patch_tokens_in_a_file(folder: Path, suffix: str) -> None:
    model, source, path = vit(), open_source(str(folder)), folder.parent / f"out{suffix}"
    options = {"layers": ["block 1"], "pool": "none", "workers": 0, "report": lambda line: None}
    write_features(path, model, source, **options)
    expected = extract_features(model, source, **options).layers["block 1"].numpy()
    assert expected.shape == (6, 32, 16)
    if suffix == ".parquet":
        found = np.array(pq.read_table(path)["feature"].to_pylist(), dtype=np.float32)
    else:
        found = load_file(path)["features"].numpy() if suffix != ".npy" else np.load(path)
    assert np.array_equal(found, expected)


def test_what_fails_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, source, path = vit(), open_source(str(folder)), folder.parent / "out.npy"
    path.write_text("old")
    table = path.with_name("out.npy.csv")
    table.write_text("old table")

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(
            path, model, source, layers=["output"], workers=0, batch_size=2, advance=interrupt
        )
    assert (path.read_text(), table.read_text()) == ("old", "old table")

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match="No space left"):
        write_features(path, model, source, layers=["output"], workers=0)
    assert (path.read_text(), table.read_text()) == ("old", "old table")
    assert sorted(p.name for p in folder.parent.iterdir()) == ["images", "out.npy", "out.npy.csv"]


def test_names_that_are_no_utf8_stand_as_escapes(folder: Path) -> None:
    source = open_source(str(folder))
    source.names = PackedStrings(["caf\udce9.png", *list(source.names)[1:]])  # type: ignore[misc]
    source.read = lambda index: (folder / "cat" / "0.png").read_bytes()  # type: ignore[method-assign]
    for suffix in (".npy", ".parquet"):
        path = folder.parent / f"out{suffix}"
        write_features(path, vit(), source, layers=["output"], workers=0)
        if suffix == ".npy":
            assert read_table(folder.parent / "out.npy.csv")[0]["name"] == "caf\\udce9.png"
        else:
            assert pq.read_table(path)["name"][0].as_py() == "caf\\udce9.png"


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
    ids, features, _, labels = load(out)
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
