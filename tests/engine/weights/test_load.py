"""load_model: every kind of model, and clear words for what does not fit."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import simmim
from simmim import load_model
from simmim.model.weights_file import read_weights, weights_metadata
from simmim.weights.load import load_encoder, model_of, read_model

ROOT = Path(__file__).parents[3]


def same(model: simmim.SimMIM, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_state_dicts_and_wrappers(official: dict[str, Tensor], tmp_path: Path) -> None:
    assert same(load_model(official), official)
    assert same(load_model({"model": official, "epoch": 3}), official)
    assert same(load_model({f"module.{k}": v for k, v in official.items()}), official)
    save_file(official, tmp_path / "plain.safetensors")
    assert same(load_model(tmp_path / "plain.safetensors"), official)


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


def test_import_is_light() -> None:
    import subprocess

    code = "import simmim, sys; assert 'torch' not in sys.modules; assert simmim.__version__"
    path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        simmim.nothing  # noqa: B018


def test_the_window_of_the_target_is_the_given_one_or_the_file_s(
    official: dict, tmp_path: Path
) -> None:
    from simmim.model.weights_file import save_weights

    save_weights(load_model(official, norm_target=47), tmp_path / "model.safetensors")
    assert load_model(tmp_path).norm_target == 47
    assert load_model(tmp_path, norm_target=5).norm_target == 5


def test_given_facts_stand_above_the_file_s(official: dict[str, Tensor]) -> None:
    assert load_encoder(official, qk_scale=0.3).encoder.spec.qk_scale == 0.3
    assert load_encoder(official, image_size=[64, 128]).encoder.spec.image_size == (64, 128)
    assert not load_model(official).training
    assert not load_encoder(official).training


def test_statistics_and_settings_of_the_file_reach_every_kind(tmp_path: Path) -> None:
    from simmim.backbone.vit import ViTSpec
    from simmim.method.tokens import TokenSimMIM
    from simmim.model.classifier import Classifier
    from simmim.model.image_model import ImageModel
    from simmim.model.weights_file import save_weights

    spec = ViTSpec((16, 16), patch_size=8, embed_dim=8, depth=1, num_heads=2)
    values = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    models = [
        simmim.SimMIM(spec.build(), **values),
        Classifier(spec.build(), ["a"], **values),
        TokenSimMIM(spec.build(), loss="l2", **values),
        ImageModel(spec.build(), **values),
    ]
    for number, model in enumerate(models):
        path = tmp_path / f"{number}.safetensors"
        save_weights(model, path)
        back = (load_encoder if type(model) is ImageModel else load_model)(path)
        assert type(back) is type(model)
        assert back.settings == model.settings
        assert back.mean.tolist() == pytest.approx(values["mean"])
        assert back.std.tolist() == pytest.approx(values["std"])


def test_more_blocks_than_weights_are_refused_before_memory_is_taken(
    official: dict[str, Tensor], tmp_path: Path
) -> None:
    spec = replace(read_model(official).spec, depths=(1, 1, 1_000_000))
    save_file(official, tmp_path / "a.safetensors", weights_metadata("simmim", spec, {}))
    with pytest.raises(ValueError, match="has 1000002 blocks, more than there are weights"):
        read_model(tmp_path / "a.safetensors")


def test_of_many_wrong_names_four_are_told(official: dict[str, Tensor]) -> None:
    extra = {f"encoder.extra{number}": torch.zeros(1) for number in range(6)}
    message = r"weights unknown: encoder\.extra0, .*extra1, .*extra2, .*extra3 and 2 more$"
    with pytest.raises(ValueError, match=message):
        load_model(official | extra)
