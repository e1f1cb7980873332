"""Reads from a run folder what is known about its weights, leaving out where files lay."""

import json
import tomllib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim.run_folder import STATE_FILE, RunFolder
from simmim.training import checkpoint
from simmim.training.records import read_rows

# Steps over which the training loss is averaged: that of a single step depends on its images.
LOSS_STEPS = 100


@dataclass(frozen=True)
class RunFacts:
    """What a run folder tells about weights that come from it; None or empty if it does not.

    Attributes:
        name: name of the run folder.
        recipe: the resolved configuration, without folders.
        step: step of the weights.
        epochs: passes over the images at that step.
        data: number of images, digest of their names, and number of unreadable ones, as "images",
            "digest" and "unreadable".
        loss: mean over the last `LOSS_STEPS` steps.
        evaluation: top1, top5, loss and images of a fine-tuning run.
        environment: versions, git_commit, device_name and processes of the last start.
        picture: the newest reconstruction.
    """

    name: str
    recipe: dict[str, Any]
    step: int | None
    epochs: float | None
    data: dict[str, Any]
    loss: float | None
    evaluation: dict[str, Any]
    environment: dict[str, Any]
    picture: Path | None


def read_facts(weights: Path) -> RunFacts | None:
    """What the run folder tells about the weights in it; None if they lie in none.

    Args:
        weights: a run folder, one of its checkpoints, or a weights file in either.
    """
    weights = weights.expanduser().absolute()
    places = [RunFolder(place) for place in (weights, *list(weights.parents)[:3])]
    run = next((folder for folder in places if folder.starts.is_file()), None)
    if run is None:
        return None
    evaluations = list(read_rows(run.evaluations))
    step, state = _step(run, weights, evaluations)
    known = (row for row in read_rows(run.metrics) if step is None or row["step"] <= step)
    rows = deque(known, maxlen=LOSS_STEPS)
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), float)]
    pictures = sorted(run.pictures.glob("*.png"))
    starts = _json(run.starts).get("starts") or [{}]
    return RunFacts(
        name=run.root.name,
        recipe=_without_folders(_toml(run.config)),
        step=rows[-1]["step"] if step is None and rows else step,
        epochs=rows[-1].get("epoch") if rows else None,
        data={**state.get("data", {}), "unreadable": len(state.get("unreadable", []))},
        loss=sum(losses) / len(losses) if losses else None,
        evaluation=next((row for row in reversed(evaluations) if row["step"] == step), {}),
        environment=starts[-1],
        picture=pictures[-1] if pictures else None,
    )


def _step(
    run: RunFolder, weights: Path, evaluations: list[dict[str, Any]]
) -> tuple[int | None, dict[str, Any]]:
    """The step of weights in a run folder, and the state of the checkpoint nearest to them."""
    steps = checkpoint.steps(run.checkpoints)
    newest = max(steps, default=None)
    states = [_json(folder / STATE_FILE) for folder in steps.values()]
    nothing: dict[str, Any] = {}
    state = next((s for s in reversed(states) if "data" in s), nothing)
    for number, folder in steps.items():
        if folder in (weights, weights.parent):
            return number, state
    if weights == run.best_weights and evaluations:
        # the first of equal ones, as the run chose
        return max(evaluations, key=lambda row: row.get("top1", 0.0))["step"], state
    return newest, state


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _without_folders(value: Any) -> Any:
    # where photos lie is private, but the name of their folder tells which ones they are
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, str) and "/" in value:
        return Path(value).name
    return value
