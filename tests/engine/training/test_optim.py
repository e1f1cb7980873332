"""Parameter groups of fine-tuning, and the rates that layer decay gives them, as published."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simmim.backbone.build import PRESETS, Spec, build_encoder, spec_from_dict
from simmim.model.classifier import Classifier
from simmim.training.optim import finetune_groups
from simmim.training.schedule import Schedule

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = [
    case
    for cases in json.loads((GOLDEN / "param-groups.json").read_text()).values()
    if isinstance(cases, list)
    for case in cases
    if case["stage"] == "fine-tuning"
]
SCHEDULES = [
    case
    for case in json.loads((GOLDEN / "lr-schedules.json").read_text())["microsoft/SimMIM"]
    if "group_scales" in case
]


def spec_of(model: dict) -> Spec:
    """The architecture of a golden entry."""
    shared = {
        "arch": model["arch"],
        "image_size": (model["img_size"], model["img_size"]),
        "patch_size": model["patch_size"],
        "embed_dim": model["embed_dim"],
        "mlp_ratio": model["mlp_ratio"],
        "num_heads": model["num_heads"],
    }
    if model["arch"] == "vit":
        return spec_from_dict(
            shared
            | {
                "depth": model["depth"],
                "absolute_position": model["use_abs_pos_emb"],
                "layer_relative_position": model["use_rel_pos_bias"],
                "shared_relative_position": model["use_shared_rel_pos_bias"],
                "final_norm": not model["use_mean_pooling"],
            }
        )
    return spec_from_dict(
        shared
        | {
            "depths": model["depths"],
            "window_size": model["window_size"],
            "absolute_position": model["ape"],
        }
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_groups_are_the_published_ones(case: dict) -> None:
    model = Classifier(build_encoder(spec_of(case["model"])), "abcde")
    groups = finetune_groups(model, case["weight_decay"], case["layer_decay"])
    found = {
        name.removeprefix("encoder."): (group["weight_decay"], group["lr_scale"])
        for group in groups
        for name in group["names"]
    }
    expected = {
        name: (p["weight_decay"], pytest.approx(p["lr_scale"], rel=1e-12))
        for name, p in case["parameters"].items()
    }
    assert found == expected
    assert len(groups) == case["number_of_groups"]


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda c: c["name"])
def test_rates_of_groups_are_the_published_ones(case: dict) -> None:
    per_epoch = case["iters_per_epoch"]
    schedule = Schedule(
        name=case["name"],
        total_steps=case["total_updates"],
        warmup_steps=case["warmup_updates"],
        lr=case["base_lr"],
        warmup_lr=case["warmup_lr"],
        min_lr=case["min_lr"],
        milestones=tuple(e * per_epoch for e in case.get("multisteps", [])),
        gamma=case.get("gamma", 0.1),
    )
    for update, rates in enumerate(case["value_at_update"]):
        found = [schedule.value_at(update, scale) for scale in case["group_scales"]]
        assert found == pytest.approx(rates, rel=1e-9), update
        found = [schedule.lr_at(update + 1, scale) for scale in case["group_scales"]]
        assert found == pytest.approx(rates, rel=1e-9), update


def test_a_classifier_has_the_published_number_of_parameters() -> None:
    sizes = {
        "swin_base": (PRESETS["swin_base"], 87_750_176),
        "swin_base at 224": (
            replace(PRESETS["swin_base"], image_size=(224, 224), window_size=7),
            87_768_224,
        ),
        "swin_large at 224": (
            replace(PRESETS["swin_large"], image_size=(224, 224), window_size=14),
            196_794_556,
        ),
    }
    for name, (spec, expected) in sizes.items():
        with torch.device("meta"):
            model = Classifier(build_encoder(spec), [str(k) for k in range(1000)])
        assert sum(p.numel() for p in model.parameters()) == expected, name
