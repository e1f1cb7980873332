"""Writes compiled launches with all that is needed to run them elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simmim_kernels.report.ahead_of_time import TARGETS, Launch
from simmim_kernels.report.cases import Case
from simmim_kernels.report.figures import NOT_MEASURED


def export(launches: Sequence[Launch], case: Case, target: str, folder: Path) -> None:
    """Writes the assembly of each launch, and next to it what is needed to replay it (JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, launch in enumerate(launches):
        stem = f"{case.name.replace('/', '-')}-{target}-{index}-{launch.kernel}"
        kind = "ptx" if "ptx" in launch.compiled.asm else "amdgcn"
        (folder / f"{stem}.{kind}").write_text(launch.compiled.asm[kind])
        content = json.dumps(_replay_parameters(launch), indent=1)
        (folder / f"{stem}.json").write_text(content + "\n")


def _replay_parameters(launch: Launch) -> dict[str, Any]:
    arguments: list[dict[str, Any]] = []
    tensors = iter(launch.tensors)
    storages: dict[int, int] = {}  # numbered: an address of this process says nothing elsewhere
    named = zip(launch.argument_names, launch.argument_types, launch.arguments)
    for name, kind, value in named:
        if not kind.startswith("*"):
            arguments.append({"name": name, "type": kind, "value": value})
            continue
        tensor = next(tensors)
        storage = tensor.untyped_storage()
        arguments.append(
            {
                "name": name,
                "type": kind,
                "shape": list(tensor.shape),
                "strides": list(tensor.stride()),
                "storage": storages.setdefault(storage.data_ptr(), len(storages)),
                "storage_bytes": storage.nbytes(),
                "byte_offset": tensor.storage_offset() * tensor.element_size(),
            }
        )
    return {
        "label": NOT_MEASURED,
        "kernel": launch.kernel,
        "target": launch.target,
        "grid": launch.grid,
        "threads": launch.num_warps * TARGETS[launch.target].warp_size,
        "shared_bytes": launch.shared_bytes,
        "constants": {name: repr(value) for name, value in launch.constants.items()},
        "arguments": arguments,
        "after_the_arguments": "two pointers to scratch memory that the kernels do not use: null",
    }
