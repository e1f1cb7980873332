"""Writes the dataset.json of a packed folder, and reads from it how images were packed."""

import json
from pathlib import Path
from typing import Any

from simmim import files
from simmim.data.shard_index import DATASET_FILE


def write_dataset(folder: Path, dataset: dict[str, Any]) -> None:
    """Write what `simmim.data.shard_index.read_dataset` reads."""
    files.write_text(folder / DATASET_FILE, json.dumps(dataset, indent=1) + "\n")


def value_range_of(dataset: dict[str, Any]) -> tuple[float, float] | None:
    """The range of values that an image was packed with; None where none was given."""
    try:
        low, high = dataset["options"]["value_range"]
        return float(low), float(high)
    except (KeyError, TypeError, ValueError):
        return None


def channels_of(dataset: dict[str, Any]) -> int | None:
    """The number of channels that every image was given; None where each kept its own."""
    channels = dataset["options"].get("channels")
    return channels if type(channels) is int and channels > 0 else None


def common_channels(numbers: set[int]) -> int | None:
    """The number of channels that images share, or None; grey images count as RGB among RGB."""
    return max(numbers) if len(numbers) == 1 or numbers == {1, 3} else None
