"""What a run leaves behind that is no copy of its configuration, as plain values."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from every_setting.case import Fingerprint
from simmim.run_folder import RunFolder

# Rows hold speeds too, which differ between any two runs.
SPEEDS = {"images_per_s", "data_wait", "peak_memory_bytes", "eta_s"}
COLUMNS = {"epoch": "epochs", "loss": "losses", "lr": "rates", "grad_norm": "gradients"}

# What stays the same to the bit where a setting does not touch the arithmetic.
TRAINING = ("losses", "gradients", "rates", "weights", "optimizer")

_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


def of_run(work: Path) -> Fingerprint:
    """The fingerprint of the one run below a folder; {} where none began.

    It leaves out what repeats the configuration whatever the run did with it: config.toml,
    run.json, state.json, the headline of the log, and metadata of weights.
    """
    locks = list(work.rglob(".lock"))
    if not locks:
        return {}
    folder = RunFolder(locks[0].parent)
    rows = read_rows(folder.metrics)
    found: Fingerprint = {
        "folder": str(folder.root.relative_to(work)),
        "steps": len(rows),
        **{name: [row.pop(column, None) for row in rows] for column, name in COLUMNS.items()},
        "measures": [{k: v for k, v in row.items() if k not in SPEEDS} for row in rows],
        "validations": read_rows(folder.validations),
        "evaluations": read_rows(folder.evaluations),
        "checkpoints": sorted(path.name for path in folder.checkpoints.glob("*")),
        "pictures": pictures(folder.pictures),
        "validation pictures": pictures(folder.validation_pictures),
        "files": files(folder.root),
        "handover": text(folder.handover),
        "report": text(folder.best_report / "per_class.csv"),
    }
    weights = load_file(folder.weights) if folder.weights.exists() else {}
    best = load_file(folder.best_weights) if folder.best_weights.exists() else {}
    found |= {"weights": digests(weights), "shapes": shapes(weights), "best": digests(best)}
    for name in ("optimizer", "average"):
        newest = sorted(folder.checkpoints.glob(f"*/{name}.safetensors"))[-1:]
        found[name] = [digests(load_file(path)) for path in newest]
    found["training"] = [found[name] for name in TRAINING]
    lines = [_STAMP.sub("", line) for line in text(folder.log)]
    progress = [line for line in lines if line.startswith("step ") and "img/s" in line]
    found["progress lines"] = len(progress)
    # the headline names the model, the precision and the batch, whether or not they were taken;
    # whether steps wait for data depends on the machine
    found["log"] = [
        line.replace(str(folder.root), "RUN")
        for line in lines
        if line not in progress
        and not any(words in line for words in (" parameters; ", "data-wait"))
    ]
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text(path)]


def text(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def files(root: Path) -> list[str]:
    """Relative names; those of TensorBoard hold the time and the process."""
    names = (str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    return sorted(re.sub(r"(events\.out\.tfevents).*", r"\1", name) for name in names)


def pictures(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): pixels(p) for p in sorted(folder.rglob("*.png"))}


def pixels(path: Path) -> str:
    with Image.open(path) as picture:
        array = np.asarray(picture)
    return f"{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A digest of every tensor's bytes."""
    return {
        name: hashlib.sha256(_bytes(tensor)).hexdigest()[:16]
        for name, tensor in sorted(tensors.items())
    }


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy())


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
