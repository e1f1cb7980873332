"""What a benchmark ran on: package versions and processor."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from simmim.environment import device_name, git_commit, package_versions

# Instruction sets that decide how fast a processor multiplies matrices.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def versions_with(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of the engine's packages and of these; None for a package that is not installed."""
    versions = package_versions()
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def describe_machine(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """The processor, the device, the versions and the commit that numbers were measured on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in INSTRUCTION_SETS if flag in flags],
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": device_name(device),
        "versions": versions_with(packages),
        "commit": git_commit(),
        "date": now(),
    }


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
