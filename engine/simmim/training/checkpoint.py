"""Checkpoints are written completely or not at all, checked before use, and never unpickled.

A checkpoint is a folder `step_XXXXXXXX` of two safetensors files (weights; optimiser state) and
state.json, which lists the other files with size and SHA-256. Without state.json a folder is not a
checkpoint. The folder is filled under another name, flushed to the disk, and renamed.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simmim.errors import RunError
from simmim.files import sync
from simmim.model.weights_file import save_tensors, save_weights
from simmim.run_folder import STATE_FILE, WEIGHTS_FILE
from simmim.training.step import TrainState

OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
FORMAT = 1

_NAME = re.compile(r"step_(\d{8})$")


class CheckpointError(RunError):
    """A checkpoint cannot be written or read; the message names the folder and the reason."""


@dataclass(frozen=True)
class Loaded:
    """The content of a checkpoint, after reading and checking it.

    Attributes:
        folder: the checkpoint's folder.
        state: the plain values of state.json.
        weights: name → tensor.
        optimizer: state and parameter, such as "exp_avg/name" → tensor.
        average: name → averaged tensor; empty where the run keeps no average.
    """

    folder: Path
    state: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]


def save(root: Path, state: TrainState, extra: dict[str, Any]) -> Path:
    """Write the checkpoint of `state.step`.

    Args:
        root: folder of all checkpoints of the run.
        state: the state to save; it does not change.
        extra: plain values to store with it (configuration, data fingerprint).

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be written (no space, no permission); nothing is left behind,
            and older checkpoints do not change.
    """
    final = root / f"step_{state.step:08d}"
    temporary = root / f".{final.name}.tmp-{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_weights(state.model, temporary / WEIGHTS_FILE, state.mask)
        save_tensors(_optimizer_tensors(state), temporary / OPTIMIZER_FILE)
        if state.averaged is not None:
            save_weights(state.averaged, temporary / AVERAGE_FILE, state.mask)
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        content = {
            "format": FORMAT,
            "step": state.step,
            "skipped": int(state.skipped),
            "loss_scale": state.loss_scale.state(),
            "files": files,
            **extra,
        }
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for name in (*files, STATE_FILE):
            sync(temporary / name)
        sync(temporary)
        if final.exists():  # an earlier start wrote it, and resuming found it damaged
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"{final}: could not be written: {reason}") from None
    return final


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {}
    for group in state.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in state.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def steps(root: Path) -> dict[int, Path]:
    """Map steps to the checkpoints under `root`, oldest first; damaged ones are included."""
    if not root.is_dir():
        return {}
    folders = {int(match[1]): p for p in root.iterdir() if (match := _NAME.match(p.name))}
    return dict(sorted(folders.items()))


def read(folder: Path) -> Loaded:
    """Read a checkpoint and check it against its own list of files.

    Raises:
        CheckpointError: something is missing or damaged; the message says what.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: format {state['format']}, this version reads {FORMAT}"
            )
        for name, expected in state["files"].items():
            if _fingerprint(folder / name) != expected:
                raise CheckpointError(f"{folder}: {name} is damaged (size or SHA-256 differs)")
        weights = load_file(folder / WEIGHTS_FILE)
        average = load_file(folder / AVERAGE_FILE) if AVERAGE_FILE in state["files"] else {}
        return Loaded(folder, state, weights, load_file(folder / OPTIMIZER_FILE), average)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        raise CheckpointError(f"{folder}: damaged: {reason}") from None


def read_newest(root: Path, warn: Callable[[str], None]) -> Loaded | None:
    """Read the newest checkpoint that is not damaged; None if there is no checkpoint at all.

    Newer checkpoints that are damaged get the name damaged_step_…: they are not lost, and they do
    not count as checkpoints to keep.

    Args:
        root: folder of all checkpoints of the run.
        warn: called with a message for every damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    folders = steps(root)
    damaged: list[Path] = []
    for folder in reversed(folders.values()):
        try:
            loaded = read(folder)
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
            damaged.append(folder)
            continue
        for other in damaged:
            aside = other.with_name(f"damaged_{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(other, aside)
        return loaded
    if folders:
        raise CheckpointError(
            f"{root}: all {len(folders)} checkpoints are damaged; move it away to start over"
        )
    return None


def restore(state: TrainState, loaded: Loaded) -> None:
    """Put a checkpoint's content into a freshly built state.

    Raises:
        CheckpointError: names or shapes differ: it is a checkpoint of another model or optimiser.
    """
    try:
        state.model.load_state_dict(loaded.weights)
        if state.averaged is not None:
            # a run that has not averaged before starts from the present weights
            state.averaged.load_state_dict(loaded.average or loaded.weights)
        _restore_optimizer(state, loaded.optimizer)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{loaded.folder}: does not fit this run's model: {reason}") from None
    state.step = int(loaded.state["step"])
    state.skipped.fill_(loaded.state["skipped"])
    state.loss_scale.load(loaded.state["loss_scale"])


def _restore_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    for group in state.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            keys = [k.removesuffix(f"/{name}") for k in tensors if k.endswith(f"/{name}")]
            for key in keys:
                value = tensors[f"{key}/{name}"]
                if value.shape == parameter.shape:
                    # the fused optimiser relies on the parameter's memory format
                    value = torch.empty_like(parameter).copy_(value)
                state.optimizer.state[parameter][key] = value.to(parameter.device)


def prune(root: Path, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Remove all but the newest `keep_last` checkpoints and the milestones; return the removed."""
    removed = []
    for step, folder in list(steps(root).items())[:-keep_last]:
        if keep_every_steps and step % keep_every_steps == 0:
            continue
        # rename first: an interrupted removal must not leave half a checkpoint under its name
        gone = folder.with_name(f".{folder.name}.tmp-removed")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
        removed.append(folder)
    return removed


def remove_leftovers(root: Path) -> None:
    """Remove the checkpoints that a killed process left half written."""
    if root.is_dir():
        for folder in root.glob(".step_*.tmp-*"):
            shutil.rmtree(folder, ignore_errors=True)
