"""load_model: every kind of file, nothing ever executed, clear words for what does not fit."""

import json
import os
import pickle
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import simmim
from numerics import load_golden, with_prefix
from simmim import load_model
from simmim.model.weights_file import read_weights, weights_metadata
from simmim.weights.load import load_encoder, model_of, read_model
from simmim.weights.official import BUFFERS

ROOT = Path(__file__).parents[3]


@pytest.fixture
def official() -> dict[str, Tensor]:
    return with_prefix(load_golden("simmim-swin-p4-w2")[1], "weights/")


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> type:
    """A stand-in for yacs.config.CfgNode, pickled under its name as official files hold it."""

    class CfgNode(dict):  # type: ignore[type-arg]
        def __init__(self, init: dict | None = None) -> None:
            super().__init__(init or {})
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode


def same(model: simmim.SimMIM, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_official_checkpoint_with_its_configuration(
    official: dict[str, Tensor], yacs: Any, tmp_path: Path, zipped: bool, monkeypatch: Any
) -> None:
    content = {
        "model": official,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]},
        "lr_scheduler": {"base_values": [1e-4]},
        "max_accuracy": 0.0,
        "epoch": 99,
        "config": yacs({"MODEL": yacs({"NAME": "x", "DEPTHS": [2, 2]}), "AMP": "O1"}),
    }
    path = tmp_path / "ckpt_epoch_99.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs.config")  # the reader has no yacs
    monkeypatch.delitem(sys.modules, "yacs")
    assert same(load_model(path), official)
    assert same(load_model(str(path), image_size=64), official)


def test_state_dicts_and_wrappers(official: dict[str, Tensor], tmp_path: Path) -> None:
    assert same(load_model(official), official)
    assert same(load_model({"model": official, "epoch": 3}), official)
    assert same(load_model({f"module.{k}": v for k, v in official.items()}), official)
    save_file(official, tmp_path / "plain.safetensors")
    assert same(load_model(tmp_path / "plain.safetensors"), official)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("writer", ["torch", "torch_legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused(
    official: dict[str, Tensor], tmp_path: Path, writer: str
) -> None:
    mark, path = tmp_path / "it_ran", tmp_path / "hostile.pth"
    content = {"model": official, "config": Bomb(mark)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"config": Bomb(mark)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ValueError, match=r"hostile\.pth: refused") as error:
        load_model(path)
    assert not mark.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "empty.pth"),
        (b"junk" * 100, "junk.pth"),
        (b"\x80\x02.", "cut.pth"),
        (b"x", "x.safetensors"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        load_model(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        load_model(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="holds neither"):
        load_model(tmp_path)


def test_unknown_layouts(official: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"unknown layout; expected encoder\.patch_embed"):
        load_model({"layer.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="no tensors"):
        load_model({"epoch": 3})
    short = dict(official)
    del short["encoder.norm.bias"]
    with pytest.raises(ValueError, match=r"weights missing: encoder\.norm\.bias"):
        load_model(short)
    with pytest.raises(ValueError, match=r"weights unknown: encoder\.extra"):
        load_model({**official, "encoder.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"of another shape: decoder\.0\.bias"):
        load_model({**official, "decoder.0.bias": torch.zeros(3)})


def test_image_size_and_what_shapes_cannot_tell(official: dict[str, Tensor]) -> None:
    buffers = ("attn_mask", "relative_position_index")
    bare = {k: v for k, v in official.items() if not k.endswith(buffers)}
    assert load_model(bare).encoder.spec.image_size == (64, 64)
    wide = load_model(official, image_size=(64, 128))
    assert wide.encoder.spec.grid == (16, 32)
    assert wide.encode(torch.zeros(1, 3, 64, 128)).shape == (1, 48, 2, 4)
    with pytest.raises(ValueError, match="50×50 px is no multiple"):
        load_model(official, image_size=50)
    scaled = load_model(official, qk_scale=0.5)
    assert scaled.encoder.layers[0].blocks[0].attn.scale == 0.5
    clipped = with_prefix(load_golden("simmim-swin-p2-w6-clip")[1], "weights/")
    with pytest.raises(ValueError, match=r"windows \[6, 6, 6, 3\], but images of 96×96"):
        load_model(clipped, image_size=96)


def test_masks_of_shifted_windows_tell_the_size(official: dict[str, Tensor]) -> None:
    # of images of 128 px, on which no stage is one window
    masks = {name: tensor for name, tensor in official.items() if name.endswith("attn_mask")}
    assert masks
    larger = {name: tensor.repeat(4, 1, 1) for name, tensor in masks.items()}
    assert load_model(official | larger).encoder.spec.image_size == (128, 128)
    tuned = {name.removeprefix("encoder."): tensor for name, tensor in official.items()}
    tuned = {name: tensor for name, tensor in tuned.items() if not name.startswith("decoder.")}
    assert read_model(tuned).spec.image_size == (64, 64)
    larger = {name.removeprefix("encoder."): tensor for name, tensor in larger.items()}
    assert read_model(tuned | larger).spec.image_size == (128, 128)


def test_buffers_tell_the_window_of_a_swinv2() -> None:
    state = with_prefix(load_golden("simmim2-swinv2-plain-ape")[1], "weights/")
    assert load_model(state).encoder.spec.window_size == 3
    bare = {name: tensor for name, tensor in state.items() if not name.endswith(BUFFERS)}
    with pytest.raises(ValueError, match="cannot tell the window of this SwinV2: say window_size="):
        load_model(bare)
    assert load_model(bare, window_size=6, image_size=48).encoder.spec.window_size == 6
    # as models say whose network was trained with windows of 2 tokens
    offsets = torch.arange(-2, 3.0) * 8
    column = offsets.sign() * (offsets.abs() + 1).log2() / 3
    table = torch.stack(torch.meshgrid(column, column, indexing="ij"), -1)[None]
    tables = {n: table for n in state if n.endswith("relative_coords_table")}
    assert load_model(state | tables).encoder.spec.pretrained_window_sizes == (2, 2, 2)
    assert load_model(state).encoder.spec.pretrained_window_sizes == (0, 0, 0)
    old = {name.replace("cpb_mlp", "rpe_mlp"): tensor for name, tensor in state.items()}
    assert same(load_model(old), state)


def test_vit_without_tables_needs_its_heads() -> None:
    state = with_prefix(load_golden("simmim-vit-ape-shared-rpb-p8")[1], "weights/")
    plain = {k: v for k, v in state.items() if "rel_pos_bias" not in k}
    with pytest.raises(ValueError, match="say num_heads="):
        load_model(plain)
    model = load_model(plain, num_heads=2)
    assert model.encoder.spec.image_size == (48, 48)
    assert not model.encoder.spec.shared_relative_position


def test_metadata_rebuilds_what_shapes_cannot_tell(tmp_path: Path, official: dict) -> None:
    from simmim.model.weights_file import save_weights

    model = load_model(official, image_size=(64, 128), qk_scale=0.3, norm_target=47)
    save_weights(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert again.encoder.spec == model.encoder.spec
    assert again.norm_target == 47
    assert torch.equal(again.mean, model.mean)
    square = load_model(tmp_path, image_size=64)
    assert square.encoder.spec.image_size == (64, 64)
    assert square.encoder.spec.qk_scale == 0.3
    _, metadata = read_weights(tmp_path)
    assert json.loads(json.dumps(metadata)) == metadata


def test_encoders_without_a_decoder(official: dict[str, Tensor], tmp_path: Path) -> None:
    bare = {name: tensor for name, tensor in official.items() if name.startswith("encoder.")}
    with pytest.raises(ValueError, match="state dict: an encoder without decoder or class head"):
        load_model(bare)
    weights = read_model(bare, layout="official")
    assert (weights.kind, weights.layout) == ("encoder", "official")
    image = torch.randn(2, 3, 64, 64)
    features = load_model(official).encode(image)
    assert torch.equal(load_encoder(bare).encode(image), features)
    assert torch.equal(load_encoder(official).encode(image), features)
    del bare["encoder.mask_token"]
    assert torch.equal(load_encoder(bare).encode(image), features)
    save_file(bare, tmp_path / "encoder.safetensors", weights_metadata("encoder", weights.spec, {}))
    assert read_model(tmp_path / "encoder.safetensors").layout == "simmim"


def test_classifiers_keep_their_classes(tmp_path: Path) -> None:
    from simmim.backbone.build import PRESETS, build_encoder
    from simmim.model.classifier import Classifier
    from simmim.model.weights_file import save_weights

    spec = replace(PRESETS["vit_tiny"], depth=1, image_size=(32, 32), final_norm=False)
    model = Classifier(build_encoder(spec), ["ape", "bee"], margin=0.9).eval()
    save_weights(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert isinstance(again, Classifier)
    assert (again.classes, again.margin) == (("ape", "bee"), 0.9)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(image), model(image))
    weights = read_model(tmp_path)
    assert weights.kind == "classifier"
    with pytest.raises(ValueError, match="3 class names for a head of 2 classes"):
        model_of(replace(weights, metadata={"classes": ["a", "b", "c"]}))


def test_values_that_are_no_weights(official: dict[str, Tensor]) -> None:
    norm = official["encoder.norm.bias"]
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"norm\.bias holds values that are not finite"):
            load_model({**official, "encoder.norm.bias": norm.new_full(norm.shape, value)})
    with pytest.raises(ValueError, match=r"norm\.bias holds torch\.int8 values"):
        load_model({**official, "encoder.norm.bias": norm.to(torch.int8)})
    half = load_model({name: tensor.half() for name, tensor in official.items()})
    assert half.encoder.norm.bias.dtype == torch.float32


def test_another_size_keeps_what_the_metadata_tells(tmp_path: Path) -> None:
    from simmim.backbone.build import PRESETS, build_encoder
    from simmim.model.weights_file import save_weights

    spec = replace(PRESETS["vit_base_plain"], depth=1, embed_dim=12, num_heads=2, norm_eps=1e-3)
    spec = replace(spec, image_size=(32, 32), absolute_position=False)
    save_weights(simmim.SimMIM(build_encoder(spec)), tmp_path / "model.safetensors")
    assert load_model(tmp_path).encoder.spec == spec
    larger = load_model(tmp_path, image_size=(64, 32)).encoder.spec
    assert larger == replace(spec, image_size=(64, 32))
    with pytest.raises(ValueError, match="image_size is a side or"):
        load_model(tmp_path, image_size=(1, 2, 3))


def test_import_is_light() -> None:
    import subprocess

    code = "import simmim, sys; assert 'torch' not in sys.modules; assert simmim.__version__"
    path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        simmim.nothing  # noqa: B018
