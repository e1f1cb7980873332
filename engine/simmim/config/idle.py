"""Settings that cannot act in a run: the run is refused, or a line says that they do nothing.

A setting counts as set where it differs from its default. A run is refused where its user would
wait for what never comes (validation, in a method that has none). All other cases give
a line: a recipe may hold details of an alternative that a flag replaces (the betas of AdamW, beside
--optim.name=sgd).

Two kinds are not listed: a key that another one replaces, as its help text says (`train.epochs`
beside `train.steps`), and details of a thing that its own key switches off (`log.pictures` beside
`log.picture_every_steps=-1`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simmim.config.sections import Config, RunConfig
from simmim.config.values import leaves
from simmim.errors import ConfigError

# Facts beside the keys of a configuration that a rule may ask for.
CONVNET, FINETUNING = "a ConvNet", "fine-tuning"

SET = object()
"""Stands for any value that is not empty, 0 or false."""


@dataclass(frozen=True)
class Idle:
    """Keys that do nothing in some runs.

    Attributes:
        keys: such as "optim.betas"; or sections.
        beside: other keys or facts, with the values beside which the keys do nothing; all of them
            must hold. One that the configuration does not have holds.
        refused: whether the run is refused for it.
    """

    keys: tuple[str, ...]
    beside: Mapping[str, Any]
    refused: bool = False


IDLE = (
    Idle(("optim.betas", "optim.eps"), {"optim.name": ("sgd",)}),
    Idle(("optim.momentum", "optim.nesterov"), {"optim.name": ("adamw",)}),
    Idle(("schedule.milestones",), {"schedule.name": ("cosine", "linear", "step", "constant")}),
    Idle(
        ("schedule.step_epochs",), {"schedule.name": ("cosine", "linear", "multistep", "constant")}
    ),
    Idle(("schedule.gamma",), {"schedule.name": ("cosine", "linear", "constant")}),
    Idle(
        ("schedule.min_lr", "schedule.warmup_prefix"),
        {"schedule.name": ("linear", "step", "multistep", "constant")},
    ),
    Idle(("schedule.warmup_lr",), {"schedule.warmup_epochs": (0,), "schedule.warmup_steps": (0,)}),
    Idle(("data.dali_memory_mib",), {"data.backend": ("cpu",)}),
    Idle(("data.prefetch", "data.timeout_s"), {"data.workers": (0,), "data.backend": ("cpu",)}),
    Idle(
        ("validate.every_epochs", "validate.batch_size", "validate.pictures"),
        {"validate.path": ("",)},
    ),
    Idle(("kernels.attention",), {CONVNET: (True,)}),
    Idle(("log.pictures", "log.picture_every_steps"), {FINETUNING: (True,)}),
    # a classifier norms the mean, and its positions train
    Idle(("model.final_norm", "model.frozen_position"), {FINETUNING: (True,)}),
    Idle(("data.classes", "data.first_number"), {"data.labels": ("",), "data.val_labels": ("",)}),
    Idle(("augment.color_jitter",), {"augment.auto_augment": SET}),
    Idle(("augment.mix_switch",), {"augment.mixup": (0,)}),
    Idle(("augment.mix_switch",), {"augment.cutmix": (0,)}),
)


def refuse_idle(config: RunConfig, rules: Sequence[Idle]) -> None:
    """Raise ConfigError for the first setting that cannot act and must not be overlooked."""
    for line, rule in _idle(config, rules):
        if rule.refused:
            raise ConfigError(f"{line}: leave it out")


def idle_notes(config: RunConfig, rules: Sequence[Idle]) -> list[str]:
    """A line for every setting that cannot act in a run."""
    return [line for line, rule in _idle(config, rules) if not rule.refused]


def _idle(config: RunConfig, rules: Sequence[Idle]) -> Iterator[tuple[str, Idle]]:
    values, defaults = leaves(config), leaves(type(config)())
    facts = values | {CONVNET: config.is_convnet(), FINETUNING: not isinstance(config, Config)}
    for rule in rules:
        if not all(_holds(facts[key], w) for key, w in rule.beside.items() if key in facts):
            continue
        reason = _reason(facts, rule.beside)
        for key, value in values.items():
            named = key in rule.keys or key.partition(".")[0] in rule.keys
            if named and value != defaults[key]:
                yield f"{key}={_written(value)} has no effect {reason}", rule


def _holds(value: Any, wanted: Any) -> bool:
    return bool(value) if wanted is SET else value in wanted


def _reason(facts: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    parts = []
    for key in beside:
        value = facts.get(key)
        if key not in facts:
            continue
        if value == "":
            parts.append(f"without {key}")
        else:
            parts.append(f"in {key}" if value is True else f"with {key}={_written(value)}")
    return " and ".join(parts)


def _written(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
