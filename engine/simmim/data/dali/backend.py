"""Whether DALI can be imported, and which backend decodes."""

import functools
import importlib
from typing import Any

import torch

from simmim.errors import DataError

CHANNELS = (1, 3)


@functools.cache
def import_dali() -> tuple[Any, str]:
    """(nvidia.dali, "") or (None, why it cannot be imported)."""
    try:
        dali = importlib.import_module("nvidia.dali")
        importlib.import_module("nvidia.dali.fn")
        importlib.import_module("nvidia.dali.types")
    except Exception as error:
        # a broken driver or a wrong CUDA raises more than ImportError
        return None, f"{error}" or type(error).__name__
    return dali, ""


def missing_reason() -> str:
    """Why DALI cannot be imported; empty where it can."""
    return import_dali()[1]


def choose_backend(requested: str, device: torch.device, channels: int = 3) -> tuple[str, str]:
    """The backend of the data path, and the reason in words.

    Args:
        requested: "auto", "cpu" or "dali". Auto takes DALI where it decodes on a GPU.
        device: where the batches are wanted.
        channels: of the images.

    Returns:
        ("cpu" or "dali", reason).

    Raises:
        DataError: "dali" was asked for and cannot be had.
    """
    if requested == "cpu":
        return "cpu", "data.backend=cpu"
    obstacle = ""
    if channels not in CHANNELS:
        obstacle = f"DALI decodes images of 1 or 3 channels, not {channels}"
    elif requested == "auto" and device.type != "cuda":
        obstacle = f"DALI is faster only where it decodes on a CUDA device, not on {device.type}"
    elif missing_reason():
        obstacle = f"NVIDIA DALI is missing ({missing_reason()})"
    if not obstacle:
        where = "on the GPU" if device.type == "cuda" else "on the CPU"
        return "dali", f"DALI {import_dali()[0].__version__} decodes {where}"
    if requested == "auto":
        return "cpu", obstacle
    if channels not in CHANNELS:
        raise DataError(f"data.backend=dali: {obstacle}; use data.backend=cpu")
    raise DataError(
        f"data.backend=dali needs NVIDIA DALI: pip install 'simmim[dali]' ({missing_reason()})"
    )
