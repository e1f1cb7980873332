"""`simmim convert`: what it writes and says, and that bad input is one line and harmless."""

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from numerics import load_golden, with_prefix
from recorded_calls import record
from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.commands import convert as command
from simmim.method.simmim import SimMIM
from simmim.model.weights_file import save_weights
from simmim.weights import proof
from simmim.weights.export import Export
from simmim.weights.load import Weights, load_model, read_model
from simmim.weights.proof import Proof

SWIN = SwinSpec(
    image_size=(32, 32), embed_dim=8, depths=(1, 2, 1), num_heads=(1, 2, 2), window_size=2
)
ODD = ViTSpec(image_size=(16, 32), patch_size=8, embed_dim=12, depth=1, num_heads=2, channels=5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_weights(SimMIM(build_encoder(SWIN), mean=(0.1, 0.2, 0.3)), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


class Run:
    """The command, its exit code and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        code = command.main([str(argument) for argument in arguments])
        out = self.capsys.readouterr()
        return code, out.out, out.err

    def refused(self, *arguments: object) -> str:
        """The one line of an error of bad input."""
        code, out, err = self(*arguments)
        assert code == 2, (code, out, err)
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("simmim: error: ")
        return err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


def same_tensors(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_to_transformers_and_back(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run(checkpoint, tmp_path / "swin-v0.1", "--to", "hf")
    assert (code, err) == (0, "")
    if not proof.why_missing("transformers"):
        assert "transformers's model gives the same outputs: largest difference" in out
    else:
        assert "names and shapes are transformers's (transformers is not here" in out
    folder = tmp_path / "swin-v0.1"
    assert sorted(os.listdir(folder)) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    statistics = json.loads((folder / "preprocessor_config.json").read_text())["image_mean"]
    assert statistics == pytest.approx([0.1, 0.2, 0.3])
    code, out, _ = run(folder, tmp_path / "back.safetensors", "--to", "simmim")
    assert code == 0
    assert "hf → simmim: IN: read back bit for bit" in out
    assert same_tensors(checkpoint, tmp_path / "back.safetensors")
    model = load_model(tmp_path / "back.safetensors")
    assert model.encoder.spec == SWIN
    assert model.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_statistics_come_from_the_preprocessor(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    assert run(checkpoint, tmp_path / "hf", "--to", "hf")[0] == 0
    state = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(state, tmp_path / "hf" / "model.safetensors")  # as transformers writes it
    assert load_model(tmp_path / "hf").mean.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_pickled_and_in_parts(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    assert run(checkpoint, tmp_path / "hf", "--to", "hf")[0] == 0
    whole = tmp_path / "hf" / "model.safetensors"
    expected, state = load_model(tmp_path / "hf").state_dict(), load_file(whole)
    whole.unlink()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    assert_states_equal(load_model(tmp_path / "hf").state_dict(), expected)
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    files = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(state)}
    for file in set(files.values()):
        part = {key: tensor for key, tensor in state.items() if files[key] == file}
        save_file(part, tmp_path / "hf" / file)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert_states_equal(load_model(tmp_path / "hf").state_dict(), expected)
    (tmp_path / "hf" / "model-1.safetensors").unlink()
    assert "model-1.safetensors: missing" in run.refused(tmp_path / "hf", tmp_path / "x", "--to=hf")
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "outside of its folder" in run.refused(tmp_path / "hf", tmp_path / "x", "--to=hf")


def assert_states_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_pickled_targets(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    state = load_file(checkpoint)
    for layout, wrapper in (("official", "model"), ("mmpretrain", "state_dict")):
        path = tmp_path / f"{layout}.pth"
        assert run(checkpoint, path, "--to", layout)[0] == 0
        content = torch.load(path, weights_only=True)
        assert list(content) == [wrapper]
        assert_states_equal(read_model(path).state, state)
    assert run(checkpoint, tmp_path / "timm.pth", "--to", "timm")[0] == 0
    content = torch.load(tmp_path / "timm.pth", weights_only=True)
    assert "layers.1.downsample.reduction.weight" in content


def test_what_timm_cannot_hold_is_named(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "timm.safetensors"
    code, out, _ = run(checkpoint, path, "--to", "timm")
    assert code == 0
    assert "timm has no place: decoder.0.bias, decoder.0.weight, encoder.mask_token" in out
    with safe_open(path, "pt") as reader:
        told = json.loads(reader.metadata()["timm"])
    assert told["architecture"] == "swin_base_patch4_window7_224"
    assert told["model_args"]["img_size"] == [32, 32]
    with pytest.raises(ValueError, match="an encoder without decoder or class head"):
        load_model(path)
    if not proof.why_missing("timm"):
        import timm

        model = timm.create_model(told["architecture"], **told["model_args"])
        model.load_state_dict(load_file(path))


def test_other_channels_and_shapes(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "odd.safetensors"
    save_weights(SimMIM(build_encoder(ODD)), source)
    code, out, err = run(source, tmp_path / "hf", "--to", "hf")
    assert (code, err) == (0, "")
    assert "hf has no place: decoder.0.bias, decoder.0.weight" in out
    assert read_model(tmp_path / "hf").spec == ODD
    assert "Swin alone" in run.refused(source, tmp_path / "x.pth", "--to", "mmpretrain")
    assert not (tmp_path / "x.pth").exists()


def test_the_layout_can_be_said(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out.safetensors"
    words = run.refused(checkpoint, out, "--to", "simmim", "--from", "hf")
    assert "model.safetensors: not the names of hf; found decoder.0.bias" in words
    assert run(checkpoint, out, "--to", "official", "--from", "simmim")[0] == 0
    assert same_tensors(checkpoint, out)


@pytest.mark.parametrize(
    ("flags", "size", "facts"),
    [
        ([], None, {}),
        (["--from=timm", "--num-heads=3"], None, {"layout": "timm", "num_heads": 3}),
        (["--window-size=7", "--image-size", "96"], 96, {"window_size": 7}),
        (["--image-size", "96", "64"], [96, 64], {}),
    ],
)
def test_every_flag_arrives(
    flags: list[str],
    size: object,
    facts: dict[str, object],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec: Any = SimpleNamespace(arch="any", num_heads=3, window_size=7)  # as the flags say
    metadata = {"dropped": ("b", "a")}
    weights = Weights("in", "official", "simmim", {}, spec, metadata)
    export = Export("timm", "encoder", spec, {}, {}, ("d", "c"))
    read = record(monkeypatch, command, "read_model", lambda **given: weights)
    made = record(monkeypatch, command, "to_layout", lambda **given: export)
    source = record(monkeypatch, command, "prove_source", lambda **given: Proof("as read", 0.25))
    proved = record(monkeypatch, command, "prove", lambda **given: Proof("as written", None))
    written = record(monkeypatch, command, "write")
    out = tmp_path / "out.pth"
    assert run("in", out, "--to", "timm", *flags) == (
        0,
        "official → timm: IN: as read: largest difference 2.5e-01 of the largest output\n"
        "official → timm: as written\n"
        "left out, there is no place here: a, b\n"
        f"left out, timm has no place: c, d\n{out}\n",
        "",
    )
    default = {"num_heads": None, "window_size": None, "layout": None}
    assert read == [{"path_or_state_dict": "in", "image_size": size} | default | facts]
    assert made == [{"weights": weights, "layout": "timm"}]
    assert source == [{"weights": weights}]
    assert proved == [{"weights": weights, "export": export}]
    assert written == [{"export": export, "path": out, "metadata": metadata}]


def test_existing_files_stay(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "hf"
    target.mkdir()
    (target / "precious.txt").write_text("x")
    words = run.refused(checkpoint, target, "--to", "hf")
    assert "exists; choose another OUT or add --overwrite" in words
    words = run.refused(checkpoint, target, "--to", "hf", "--overwrite")
    assert "holds other files (precious.txt), which --overwrite would remove" in words
    assert os.listdir(target) == ["precious.txt"]
    (target / "precious.txt").unlink()
    (target / "config.json").write_text("old")
    assert run(checkpoint, target, "--to", "hf", "--overwrite")[0] == 0
    assert json.loads((target / "config.json").read_text())["model_type"] == "swin"
    before = checkpoint.read_bytes()
    words = run.refused(checkpoint, checkpoint, "--to", "timm")
    assert "exists; choose another OUT" in words
    assert checkpoint.read_bytes() == before


def test_wrong_usage(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    for name, layout, words in [
        ("x.bin2", "timm", "writes a file; call it NAME.safetensors"),
        ("x.safetensors", "hf", "writes a folder"),
        ("model.safetensors/", "hf", "writes a folder"),
    ]:
        assert words in run.refused(checkpoint, tmp_path / name, "--to", layout, "--overwrite")
    (tmp_path / "folder.pth").mkdir()
    assert "is a folder" in run.refused(checkpoint, tmp_path / "folder.pth", "--to", "official")
    for arguments in (("--to", "keras"), (), ("--to", "hf", "--image-size", "1", "2", "3")):
        with pytest.raises(SystemExit) as stop:
            run(checkpoint, tmp_path / "x", *arguments)
        assert stop.value.code == 2
    run.capsys.readouterr()
    words = run.refused(checkpoint, tmp_path / "x", "--to", "hf", "--image-size", "50")
    assert "50×50 px is no multiple" in words


def test_a_failed_proof_writes_nothing(
    checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "why_missing", lambda library: "")
    monkeypatch.setattr(proof, "_compare", lambda *_: float("nan"))
    monkeypatch.setitem(proof.LIBRARIES, "hf", ("transformers", lambda export: None))
    words = run.refused(checkpoint, tmp_path / "hf", "--to", "hf")
    assert "model.safetensors: the model that transformers builds from it gives other" in words
    assert not (tmp_path / "hf").exists()
    code, out, _ = run(checkpoint, tmp_path / "hf", "--to", "hf", "--no-proof")
    assert code == 0
    assert "not checked" in out


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (os.system, ("touch exploded",))


def bad_files(folder: Path, good: Path) -> dict[str, str]:
    """File name → what the message says of it."""
    data, state = good.read_bytes(), load_file(good)
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "text.safetensors").write_text("hello")
    torch.save({"model": Bomb()}, folder / "hostile.pth")
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, folder / "other.pth")
    torch.save({"model": {3: "x"}}, folder / "empty.pth")
    norm = "encoder.norm.bias"
    for name, change in {
        "nan": {norm: torch.full((32,), float("nan"))},
        "infinite": {norm: torch.full((32,), -float("inf"))},
        "quantised": {norm: torch.ones(32, dtype=torch.int8)},
        "narrow": {norm: torch.ones(31)},
        "extra": {"encoder.extra": torch.ones(1)},
        "scalar": {"encoder.patch_embed.proj.weight": torch.ones(())},
        "table": {"encoder.layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(7, 1)},
    }.items():
        save_file({**state, **change}, folder / f"{name}.safetensors")
    del state[norm]
    save_file(state, folder / "missing.safetensors")
    deep = {"encoder": {"arch": "swin", "depths": [10**12], "num_heads": [1]}}
    wide = {"encoder": {"arch": "swin", "embed_dim": 2**40, "depths": [2], "num_heads": [1]}}
    for name, told in {"deep": deep, "wide": wide, "alien": {"encoder": {"arch": "cnn"}}}.items():
        save_file(load_file(good), folder / f"{name}.safetensors", {"simmim": json.dumps(told)})
    return {
        "cut.safetensors": "not a readable safetensors file",
        "text.safetensors": "not a readable safetensors file",
        "hostile.pth": "refused, loading it would run code",
        "other.pth": "unknown layout",
        "empty.pth": "no tensors among the keys",
        "nan.safetensors": "encoder.norm.bias holds values that are not finite",
        "infinite.safetensors": "encoder.norm.bias holds values that are not finite",
        "quantised.safetensors": "encoder.norm.bias holds torch.int8 values",
        "narrow.safetensors": "of another shape: encoder.norm.bias (31,) instead of (32,)",
        "extra.safetensors": "weights unknown: encoder.extra",
        "scalar.safetensors": "",
        "table.safetensors": "",
        "missing.safetensors": "weights missing: encoder.norm.bias",
        "deep.safetensors": "",
        "wide.safetensors": "",
        "alien.safetensors": "unknown architecture 'cnn'",
        "nowhere.safetensors": "no such file",
    }


def test_bad_files_are_one_line_and_nothing_is_written(
    checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in bad_files(tmp_path, checkpoint).items():
        for layout, out in (("simmim", "x.safetensors"), ("hf", "x")):
            found = run.refused(tmp_path / name, tmp_path / out, "--to", layout, "--no-proof")
            assert name in found
            assert words in found
            assert not (tmp_path / out).exists()
    assert not (tmp_path / "exploded").exists()


def test_damaged_bytes_never_end_in_a_traceback(checkpoint: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    pickled = io.BytesIO()
    torch.save({"model": load_file(checkpoint)}, pickled)
    folder = tmp_path / "hf"
    command.main([str(checkpoint), str(folder), "--to=hf", "--no-proof"])
    hf = (folder / "model.safetensors").read_bytes()
    messages = []
    for number in range(240):
        kind = number % 3
        data = bytearray((checkpoint.read_bytes(), pickled.getvalue(), hf)[kind])
        header = 4000 if kind != 1 else len(data)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(header, len(data)))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path = (tmp_path / "bad.safetensors", tmp_path / "bad.pth", folder / "model.safetensors")
        path[kind].write_bytes(data)
        try:
            load_model(path[kind])
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 120
    for message in messages:
        assert "\n" not in message
        assert "bad." in message or "model.safetensors" in message, message


def test_configurations_that_say_nonsense(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    assert run(checkpoint, tmp_path / "hf", "--to", "hf")[0] == 0
    weights = tmp_path / "hf" / "model.safetensors"
    save_file(load_file(weights), weights)
    good = json.loads((tmp_path / "hf" / "config.json").read_text())
    for change, words in [
        ({"image_size": "large"}, ""),
        ({"image_size": [32, 32, 32]}, ""),
        ({"image_size": 48}, "px"),
        ({"hidden_act": "relu"}, "hidden_act is relu; ours is gelu"),
        ({"layer_norm_eps": 0.1}, "layer_norm_eps is 0.1; ours is 1e-5"),
    ]:
        (tmp_path / "hf" / "config.json").write_text(json.dumps(good | change))
        assert words in run.refused(tmp_path / "hf", tmp_path / f"{change}.pth", "--to=official")
    (tmp_path / "hf" / "config.json").write_text("[" * 100_000)
    assert run(tmp_path / "hf", tmp_path / "x.pth", "--to", "official", "--no-proof")[0] == 0


def test_tensors_that_share_memory(tmp_path: Path, run: Run, checkpoint: Path) -> None:
    state = load_file(checkpoint)
    pool = torch.cat([tensor.flatten() for tensor in state.values()])
    views, start = {}, 0
    for name, tensor in state.items():
        views[name] = pool[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    views["encoder.layers.0.blocks.0.norm1.bias"] = views["encoder.layers.0.blocks.0.norm2.bias"]
    torch.save(views, tmp_path / "views.pth")
    assert run(tmp_path / "views.pth", tmp_path / "out.safetensors", "--to", "simmim")[0] == 0
    assert_states_equal(load_file(tmp_path / "out.safetensors"), views)


@pytest.mark.parametrize("layout", ["hf", "simmim", "official"])
def test_a_full_disk_leaves_nothing(
    layout: str, checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "x")

    def full_torch(*_: object, **__: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    monkeypatch.setattr("simmim.model.weights_file.save_file", full)
    monkeypatch.setattr("simmim.weights.export.torch.save", full_torch)
    name = {"hf": "out", "simmim": "out.safetensors", "official": "out.pth"}[layout]
    code, _, err = run(checkpoint, tmp_path / name, "--to", layout, "--no-proof")
    assert code == 1
    assert "No space left" in err or "file write failed" in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_padded_windows_of_mmpretrain_are_refused(tmp_path: Path, run: Run) -> None:
    # as its Swin-L at 192 px: windows of 12 tokens, where the last stage has 6 × 6
    spec = SwinSpec(
        image_size=(192, 192), embed_dim=4, depths=(1, 1), num_heads=(1, 1), window_size=12
    )
    source, path = tmp_path / "ours.safetensors", tmp_path / "mm.pth"
    save_weights(SimMIM(build_encoder(spec)), source)
    assert run(source, path, "--to", "mmpretrain")[0] == 0
    words = run.refused(path, tmp_path / "x.safetensors", "--to", "simmim")
    assert "windows of 12 tokens are padded where a feature map is smaller" in words
    assert "say image_size=" in words
    small = ("--image-size", "64")
    words = run.refused(path, tmp_path / "x.safetensors", "--to", "simmim", *small)
    assert "images below 96 px" in words
    large = ("--image-size", "192")
    assert run(path, tmp_path / "x.safetensors", "--to", "simmim", *large)[0] == 0
    assert same_tensors(source, tmp_path / "x.safetensors")


def test_published_checkpoints_go_everywhere(tmp_path: Path, run: Run) -> None:
    for name, layouts in {
        "simmim-swin-p4-w2": ("hf", "timm", "mmpretrain"),
        "simmim-vit-shared-rpb": ("hf", "timm"),
        "simmim-swin-p4-w4-ape": ("mmpretrain",),
    }.items():
        source = tmp_path / f"{name}.pth"
        torch.save({"model": with_prefix(load_golden(name)[1], "weights/")}, source)
        for layout in layouts:
            target = tmp_path / (f"{name}-{layout}" + ("" if layout == "hf" else ".safetensors"))
            code, out, err = run(source, target, "--to", layout)
            assert (code, err) == (0, "")
            assert f"official → {layout}: read back bit for bit" in out


def test_hints_that_the_architecture_does_not_follow_are_refused(
    checkpoint: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "x.safetensors"
    words = run.refused(checkpoint, out, "--to=official", "--window-size=4")
    assert "--window-size=4, but its swin has window_size=2; leave it out" in words
    words = run.refused(checkpoint, out, "--to=official", "--num-heads=2")
    assert "--num-heads=2, but its swin has num_heads=(1, 2, 2); leave it out" in words
    assert not out.exists()
    assert run(checkpoint, out, "--to=official", "--window-size=2")[0] == 0
