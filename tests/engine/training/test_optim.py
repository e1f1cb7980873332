"""Parameter groups and the rates that layer decay gives them, as published; and optimisers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simmim.backbone.build import PRESETS, Spec, build_encoder, spec_from_dict
from simmim.config.sections import OptimConfig
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.training.optim import build_optimizer, finetune_groups, parameter_groups
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


TABLE = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.fixture(scope="module")
def model() -> SimMIM:
    spec = spec_from_dict(
        {"arch": "swin", "image_size": (32, 32), "patch_size": 4, "embed_dim": 8,
         "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    )  # fmt: skip
    return SimMIM(spec.build())


def decay_of(groups: list[dict[str, object]]) -> dict[str, object]:
    """The weight decay of every parameter by name."""
    found: dict[str, object] = {}
    for group in groups:
        names, parameters = group["names"], group["params"]
        assert isinstance(names, list)
        assert isinstance(parameters, list)
        assert len(names) == len(parameters)
        found |= dict.fromkeys(names, group["weight_decay"])
    return found


def test_adamw_has_the_settings_of_the_configuration(model: SimMIM) -> None:
    config = OptimConfig(lr=0.25, weight_decay=0.125, betas=(0.5, 0.75), eps=1e-3)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        settings = group["lr"], group["betas"], group["eps"], group["fused"], group["amsgrad"]
        assert settings == (0.25, (0.5, 0.75), 1e-3, True, False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.125, 0.0]


@pytest.mark.parametrize(
    ("momentum", "nesterov", "used"), [(0.5, True, True), (0.5, False, False), (0.0, True, False)]
)
def test_sgd_has_the_settings_of_the_configuration(
    model: SimMIM, momentum: float, nesterov: bool, used: bool
) -> None:
    config = OptimConfig(
        name="sgd", lr=0.25, weight_decay=0.125, momentum=momentum, nesterov=nesterov
    )
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        settings = group["lr"], group["momentum"], group["nesterov"], group["fused"]
        assert settings == (0.25, momentum, used, True)
        # Nesterov needs momentum, and without momentum there is nothing to keep
        kept = [optimizer.state[p] for p in group["params"] if optimizer.state[p]]
        assert len(kept) == (len(group["params"]) if momentum else 0)
        assert all(bool((state["momentum_buffer"] == 0).all()) for state in kept)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.125, 0.0]


@pytest.mark.parametrize("decay_tables", [True, False])
def test_position_tables_decay_as_configured(model: SimMIM, decay_tables: bool) -> None:
    config = OptimConfig(weight_decay=0.125, decay_position_tables=decay_tables)
    optimizer = build_optimizer(model, config)
    expected = 0.125 if decay_tables else 0.0
    for groups in (
        optimizer.param_groups,
        parameter_groups(model, 0.125, decay_position_tables=decay_tables),
    ):
        assert decay_of(groups)[TABLE] == expected
        assert decay_of(groups)["encoder.layers.0.blocks.0.attn.qkv.weight"] == 0.125
        assert decay_of(groups)["encoder.layers.0.blocks.0.attn.qkv.bias"] == 0.0
        assert decay_of(groups)["encoder.layers.0.blocks.0.norm1.weight"] == 0.0
    assert decay_of(parameter_groups(model, 0.125))[TABLE] == 0.125  # as in published models


@pytest.mark.parametrize("decay_tables", [True, False])
def test_fine_tuning_decays_position_tables_as_configured(
    model: SimMIM, decay_tables: bool
) -> None:
    classifier = Classifier(model.encoder, "ab")
    groups = finetune_groups(classifier, 0.125, 0.5, decay_position_tables=decay_tables)
    assert decay_of(groups)[TABLE] == (0.125 if decay_tables else 0.0)
    assert decay_of(finetune_groups(classifier, 0.125, 0.5))[TABLE] == 0.0


def test_given_groups_are_taken(model: SimMIM) -> None:
    names = [name for name, _ in model.named_parameters()]
    given = [{"params": list(model.parameters()), "names": names, "weight_decay": 0.5, "x": 1}]
    (group,) = build_optimizer(model, OptimConfig(), given).param_groups
    assert (group["weight_decay"], group["x"], len(group["params"])) == (0.5, 1, len(names))


def test_frozen_parameters_are_in_no_group(model: SimMIM) -> None:
    frozen = model.encoder.get_parameter(TABLE.removeprefix("encoder."))
    frozen.requires_grad_(False)
    try:
        names = decay_of(parameter_groups(model, 0.125))
    finally:
        frozen.requires_grad_(True)
    assert TABLE not in names
    assert len(names) == len(list(model.parameters())) - 1
