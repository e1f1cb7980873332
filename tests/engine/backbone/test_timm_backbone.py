"""Models of timm, by a stand-in: what is asked of the library, and where the token goes."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simmim.backbone import timm_backbone
from simmim.backbone.timm_backbone import TimmSpec, create, look_at, preset_for


class Small(nn.Module):
    """A stem of stride 4 and two stages, or (`late`) a stage that reaches stride 4 itself."""

    def __init__(self, channels: int, late: bool) -> None:
        super().__init__()
        first, second = (2, 2) if late else (4, 1)
        self.stem = nn.Conv2d(channels, 6, first, first)
        self.stage1 = nn.Sequential(nn.Conv2d(6, 8, second, second), nn.BatchNorm2d(8))
        self.stage2 = nn.Sequential(nn.Conv2d(8, 10, 2, 2), nn.ReLU())
        self.head = nn.Linear(10, 10)
        self.feature_info = [
            {"module": "stage1", "reduction": 4},
            {"module": "stage2", "reduction": 8},
        ]

    def forward_features(self, image: Tensor) -> Tensor:
        return self.stage2(self.stage1(self.stem(image)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options of every model that was created."""
    found: list[dict[str, Any]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        found.append({"name": name, **options})
        return Small(options["in_chans"], name == "late")

    timm = SimpleNamespace(
        # some releases would also take the last part of a name of the Hub
        is_model=lambda name: name.replace("/", ":").split(":")[-1] in ("small", "late"),
        list_models=lambda pattern: ["small"] if pattern == "*smaal*" else [],
        create_model=create_model,
    )
    monkeypatch.setattr(timm_backbone, "import_timm", lambda: timm)
    look_at.cache_clear()
    yield found
    look_at.cache_clear()


SPEC = TimmSpec(image_size=(32, 64), channels=5, drop_path=0.2, name="small")


def test_channels_and_stochastic_depth_are_asked_for_and_nothing_is_downloaded(
    asked: list[dict[str, Any]],
) -> None:
    SPEC.build()
    base = {"name": "small", "pretrained": False, "num_classes": 0, "in_chans": 5}
    assert asked == [base, base | {"drop_path_rate": 0.2}]  # the trial, and the model
    asked.clear()
    replace(SPEC, drop_path=0.0).build()
    assert asked == [base]


def test_names_that_are_not_timm_s_own_are_refused(asked: list[dict[str, Any]]) -> None:
    for name in ("hf-hub:small", "a/small", "smaal", ""):
        with pytest.raises(ValueError, match="timm has no model"):
            create(name, 3)
    assert not asked
    with pytest.raises(ValueError, match="there are small, …"):
        create("smaal", 3)
    assert preset_for("timm:small") == TimmSpec(name="small")
    assert preset_for("small") is None


@pytest.mark.parametrize(("name", "width", "before"), [("small", 6, True), ("late", 8, False)])
def test_the_token_stands_where_the_map_has_a_stride_of_four(
    asked: list[dict[str, Any]], name: str, width: int, before: bool
) -> None:
    encoder = replace(SPEC, name=name).build().eval()
    anatomy = look_at(name, 5)
    assert (anatomy.place, anatomy.before, anatomy.stem_width) == ("stage1", before, width)
    assert (anatomy.num_features, anatomy.stride) == (10, 8)
    assert anatomy.idle == ("head",)
    assert isinstance(encoder.model.head, nn.Identity)
    assert encoder.mask_token.shape == (1, width, 1, 1)
    assert (encoder.spec.grid, encoder.spec.stride) == ((8, 16), 8)
    image, hidden = torch.randn(2, 5, 32, 64), torch.ones(2, 8, 16, dtype=torch.bool)
    features = encoder(image, hidden)
    # an image that is hidden as a whole tells nothing of itself
    assert torch.equal(features, encoder(torch.randn(2, 5, 32, 64), hidden))
    assert not torch.allclose(features, encoder(image))
    half = hidden.clone()
    half[1] = False
    assert torch.equal(encoder(image, half)[1], encoder(image)[1])


def test_a_stage_is_a_layer_and_the_stem_is_none(asked: list[dict[str, Any]]) -> None:
    encoder = SPEC.build()
    assert encoder.num_layers == 2
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert layers["mask_token"] == layers["model.stem.weight"] == 0
    assert layers["model.stage1.0.weight"] == layers["model.stage1.1.bias"] == 1
    assert layers["model.stage2.0.weight"] == 2
    late = replace(SPEC, name="late").build()
    assert late.layer_of("model.stage1.0.weight") == 0
    assert late.layer_of("model.stage2.0.weight") == 1


@pytest.mark.parametrize("training", [True, False])
def test_stages_are_computed_again_in_training_and_count_a_batch_once(
    asked: list[dict[str, Any]], training: bool
) -> None:
    encoder = SPEC.build().train(training)
    encoder.activation_checkpointing = True
    runs: list[int] = []
    encoder.model.stage1[0].register_forward_hook(lambda *_: runs.append(1))
    encoder(torch.randn(2, 5, 32, 64)).sum().backward()
    assert len(runs) == (2 if training else 1)
    assert int(encoder.model.stage1[1].num_batches_tracked) == int(training)
    assert not any("forward" in vars(module) for module in encoder.modules())


def test_sizes_are_multiples_of_the_model_s_own_stride(asked: list[dict[str, Any]]) -> None:
    assert SPEC.problems() == []
    assert [field for field, _ in replace(SPEC, image_size=(36, 64)).problems()] == ["image_size"]
    assert replace(SPEC, image_size=(40, 64)).problems() == []
