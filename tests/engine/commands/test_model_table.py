"""The table of backbones × methods: published counts, and those made by hand; true layouts."""

import json
from dataclasses import replace

import pytest
import torch

from recorded_calls import record
from simmim import cli
from simmim.backbone.build import PRESETS, build_encoder, find_preset
from simmim.backbone.swin import SwinSpec
from simmim.commands import model_table as module
from simmim.commands.model_table import count_macs, model_table
from simmim.errors import ConfigError
from simmim.method.simmim import SimMIM
from simmim.weights.export import layouts_for, to_layout
from simmim.weights.layouts import LAYOUTS
from simmim.weights.load import Weights


def swin_macs(spec: SwinSpec) -> int:
    """By hand: projections, q·k and p·v, MLP and merging of every stage."""
    total = spec.grid[0] * spec.grid[1] * spec.patch_size**2 * spec.channels * spec.embed_dim
    for stage, depth in enumerate(spec.depths):
        tokens = spec.resolution(stage)[0] * spec.resolution(stage)[1]
        width, window = spec.embed_dim << stage, spec.window(stage) ** 2
        block = 4 * width**2 + 2 * window * width + 2 * int(width * spec.mlp_ratio) * width
        total += tokens * depth * block
        if stage < len(spec.depths) - 1:
            total += tokens // 4 * 4 * width * 2 * width
    return total


def test_multiplications_are_those_counted_by_hand() -> None:
    spec = PRESETS["swin_base"]
    assert isinstance(spec, SwinSpec)
    assert count_macs(spec) == swin_macs(spec)
    head = 36 * 1024 * 3072
    assert round((swin_macs(spec) + head) / 1e9, 2) == 11.39  # as quoted for SimMIM at 192 px


def test_multiplications_at_another_size_and_number_of_channels() -> None:
    spec = replace(
        PRESETS["swin_tiny"], depths=(1, 1), num_heads=(1, 2), image_size=(384, 192), channels=4
    )
    assert isinstance(spec, SwinSpec)
    assert count_macs(spec) == swin_macs(spec)


@pytest.mark.parametrize(("size", "used"), [(None, (192, 192)), (96, (96, 96))])
def test_an_entry_is_counted_at_the_size_that_it_tells(
    size: int | None, used: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(PRESETS["swin_tiny"], embed_dim=8, depths=(1, 1), num_heads=(1, 2))
    monkeypatch.setitem(PRESETS, "swin_tiny", tiny)
    (entry,) = model_table(["swin_tiny"], size)
    spec = replace(tiny, image_size=used)
    assert isinstance(spec, SwinSpec)
    assert (entry.name, entry.image_size, entry.macs) == ("swin_tiny", used, swin_macs(spec))
    encoder = build_encoder(spec)
    assert entry.parameters == sum(p.numel() for p in encoder.parameters())
    assert entry.methods["simmim"] == sum(p.numel() for p in SimMIM(encoder).parameters())
    assert set(entry.methods) == {"simmim", "simsiam"}
    assert entry.layouts == layouts_for(spec)
    assert entry.as_dict() == {
        "name": "swin_tiny",
        "image_size": used,
        "parameters": entry.parameters,
        "macs": entry.macs,
        "methods": entry.methods,
        "layouts": entry.layouts,
    }


def test_without_names_every_preset_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, module, "_entry")
    list(model_table((), 64))
    list(model_table(["vit_tiny"]))
    assert [call["name"] for call in calls] == [*PRESETS, "vit_tiny"]
    assert [call["image_size"] for call in calls] == [64] * len(PRESETS) + [None]


def test_published_counts() -> None:
    found = {entry.name: entry for entry in model_table(["swin_base", "resnet50", "vit_base"])}
    assert found["swin_base"].methods["simmim"] == 89_874_104
    # beside the trained ones, the frozen bias of SimSiam's projector; our mask token goes
    assert found["resnet50"].methods["simsiam"] == 38_199_360 + 2048
    assert found["resnet50"].parameters == 23_508_032 + 64
    assert found["resnet50"].macs == 4_087_136_256
    assert "tokens" in found["vit_base"].methods
    assert "tokens" not in found["swin_base"].methods


@pytest.mark.parametrize(
    ("name", "parameters"), [("swinv2_huge", 655_211_274), ("swinv2_giant", 2_997_815_520)]
)
def test_the_largest_are_built_without_memory(name: str, parameters: int) -> None:
    """With a head of 1,000 classes these are the published 658 M and 3.0 B."""
    with torch.device("meta"):
        encoder = build_encoder(PRESETS[name])
    assert sum(p.numel() for p in encoder.parameters()) == parameters


def small(name: str) -> Weights:
    """A preset with one block a stage, at meta cost."""
    spec = find_preset(name)
    fields = {f: 1 for f in ("depth",) if hasattr(spec, f)}
    fields |= {f: (1,) * len(getattr(spec, f)) for f in ("depths",) if hasattr(spec, f)}
    spec = replace(spec, **fields)
    if name.startswith("swinv2"):
        spec = replace(spec, window_size=6)
    encoder = build_encoder(spec)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    return Weights("test", "simmim", "encoder", state, spec, {})


@pytest.mark.parametrize(
    "name", ["swin_tiny", "swinv2_tiny", "vit_tiny", "vit_tiny_plain", "resnet18", "convnext_tiny"]
)
def test_listed_layouts_are_those_that_can_be_written(name: str) -> None:
    weights = small(name)
    written = []
    for layout in LAYOUTS:
        try:
            to_layout(weights, layout)
        except ValueError:
            continue
        written.append(layout)
    assert set(layouts_for(weights.spec)) == set(written)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "resnet18", "vit_tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "backbone", "px", "GMACs", "encoder", "simmim", "simsiam", "tokens", "layouts",
    ]  # fmt: skip
    assert lines[1].split()[:4] == ["resnet18", "224", "1.81", "11.18"]
    assert "–" in lines[1]
    assert "–" not in lines[2]
    assert cli.main(["models", "resnet18", "--image-size=64", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)[0]
    assert entry["image_size"] == [64, 64]
    assert entry["macs"] == pytest.approx(1_813_561_344 * (64 / 224) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet5"], "did you mean resnet50"),
        (["swin_base", "--image-size=100"], "no multiple of the encoder stride"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="known are"):
        list(model_table(["nothing"]))
