"""What a method has from its base: the run's settings, views, groups, and the images' layout."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.command_line import load
from simmim.config.sections import MethodConfig
from simmim.data.views import CroppedView
from simmim.method import method as file
from simmim.method.build import find_method
from simmim.method.method import MaskingMethod, Method
from simmim.method.simmim import SimMIM, SimMIMConfig
from simmim.method.tokens import TokenMethod, TokensConfig

FLAGS = [
    "--data.crop_scale=[0.3,0.8]",
    "--data.crop_ratio=[0.9,1.2]",
    "--data.flip=0.25",
    "--data.max_pixels=5000000",
    "--seed=13",
    "--optim.weight_decay=0.07",
]


def method(*flags: str) -> Method:
    return find_method(load(["smoke", "--data.path=x", *flags]))


def test_the_configured_crops_arrive_in_the_view() -> None:
    chosen = method(*FLAGS)
    view = chosen.view()
    assert isinstance(view, CroppedView)
    drawn, data = view.augmentation, chosen.config.data
    assert drawn.size == chosen.config.image_size == (64, 64)
    assert (drawn.scale, drawn.ratio) == ((0.3, 0.8), (0.9, 1.2))
    assert (drawn.flip, drawn.channels) == (0.25, 3)
    assert (view.seed, view.max_pixels) == (13, 5_000_000)
    assert view.value_range == data.value_range


def test_a_given_table_is_kept_and_a_bare_one_has_defaults() -> None:
    config = load(["tokens_smoke", "--data.path=x", "--method.mlp_depth=3", "--method.head=mlp"])
    assert TokenMethod(config).settings == config.method
    bare = replace(config, method=MethodConfig(name="tokens"))
    assert TokenMethod(bare).settings == TokensConfig()
    assert method().settings == SimMIMConfig()


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_get_the_memory_format_of_the_model(channels_last: bool) -> None:
    chosen = method()
    asked: list[str] = []

    def on(device: str) -> bool:
        asked.append(device)
        return channels_last

    chosen.config = SimpleNamespace(channels_last_on=on)  # type: ignore[assignment]
    image = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    out = chosen.arrange(image)
    assert out.shape == (2, 3, 4, 6)
    assert torch.equal(out, image.permute(0, 3, 1, 2))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=layout)
    assert asked == ["cpu"]
    assert chosen.arrange(torch.zeros(2, 5, 4, 6, 3)).shape == (2, 5, 3, 4, 6)


@pytest.mark.parametrize("exempt", [False, True])
def test_the_configured_decay_arrives_in_the_groups(exempt: bool) -> None:
    table = f"--optim.decay_position_tables={str(not exempt).lower()}"
    chosen = method("--optim.weight_decay=0.07", table)
    spec = SwinSpec((32, 32), embed_dim=8, depths=(1, 1), num_heads=(2, 4), window_size=4)
    groups = chosen.parameter_groups(SimMIM(build_encoder(spec)))
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.07]
    name = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    (decay,) = {g["weight_decay"] for g in groups if name in g["names"]}
    assert decay == (0.0 if exempt else 0.07)


def test_pictures_are_of_the_configured_number_under_the_method_s_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    class Samples:
        def __init__(self, *given: Any) -> None:
            seen.extend(given)

        def draw(self) -> None: ...

    monkeypatch.setattr(file, "FixedSamples", Samples)
    chosen, source = method("--log.pictures=3"), object()
    assert isinstance(chosen, MaskingMethod)
    assert chosen.picture(source).__name__ == "draw"  # type: ignore[arg-type, union-attr]
    assert seen == [source, chosen.config, chosen.draw_mask, 3]


def test_a_bare_method_measures_warns_and_draws_nothing() -> None:
    bare = Method(load(["smoke", "--data.path=x"]))
    assert bare.measures(None) == {}  # type: ignore[arg-type]
    assert bare.warning({"loss": 0.0}) == ""
    assert bare.picture(None) is None  # type: ignore[arg-type]
