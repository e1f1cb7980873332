"""Runs of `simmim pack`, and what is in the folders that they make."""

import json
import multiprocessing
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmim.cli import main
from simmim.packing import plan
from simmim.packing.encode import Encoded, encode
from simmim.packing.options import Options

FORK = multiprocessing.get_context("fork")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def run(*arguments: object) -> int:
    return main(["pack", *map(str, arguments)])


def skipped(folder: Path) -> dict[str, str]:
    lines = (folder / "skipped.tsv").read_text().splitlines()
    assert lines[0] == "source\treason"
    return dict(line.split("\t") for line in lines[1:])


def index_of(folder: Path, shard: int = 0) -> dict[str, Any]:
    return dict(json.loads((folder / f"{shard:06d}.json").read_text()))


def count_calls(patch: pytest.MonkeyPatch, before: Callable[[int], object]) -> Callable[[], int]:
    """Count the calls of `encode` in all processes; `before` is given its number, from 1."""
    calls, lock = mmap(-1, 8), FORK.Lock()

    def counted(data: bytes, options: Options) -> Encoded:
        with lock:
            number = int.from_bytes(calls[:8], "little") + 1
            calls[:8] = number.to_bytes(8, "little")
        before(number)
        return encode(data, options)

    patch.setattr(plan, "encode", counted)
    return lambda: int.from_bytes(calls[:8], "little")


def expected_statistics(images: list[np.ndarray]) -> list[str]:
    values = np.concatenate([image.reshape(-1, image.shape[2]) for image in images]) / 255.0
    return [
        f"--data.{name}=[{','.join(f'{x:.6f}' for x in numbers)}]"
        for name, numbers in (("mean", values.mean(0)), ("std", values.std(0)))
    ]


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for another process; fails where it never comes to it."""
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
