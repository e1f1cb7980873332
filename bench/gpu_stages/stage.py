"""What every stage of bench/gpu.py needs: where results go, and a step to measure."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from simmim.config.sections import Config, DataConfig, MaskConfig, ModelConfig, TrainConfig

Emit = Callable[..., None]

# In the environment of a stage: everything is tried at sizes that a rehearsal can bear.
TINY = "SIMMIM_GPU_STAGES_TINY"
# Names a module that every process imports first: what a rehearsal needs.
PRELOAD = "SIMMIM_GPU_STAGES_PRELOAD"


def is_tiny() -> bool:
    """Whether this is a rehearsal of small sizes."""
    return os.environ.get(TINY) == "1"


def values_are_real() -> bool:
    """False over the stand-in for CUDA, whose kernels compute nothing."""
    return "CUDA_HOST" not in os.environ


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a result to the record; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def config_of(model: str, batch: int, **options: Any) -> Config:
    """The run whose step is measured."""
    train = TrainConfig(batch_size=batch, **{"precision": "bf16"} | options)
    return Config(
        data=DataConfig(path="random"),
        model=ModelConfig(name=model),
        mask=MaskConfig(),
        train=train,
    )


def milliseconds(call: Callable[[], object], seconds: float, least: int = 5) -> dict[str, float]:
    """Medians of the device's and the host's time of a call, and how often it was called.

    The device's is that between two events, the host's that until the call returns; the queue is
    empty before each call. What is larger limits a loop of such calls.
    """
    call()
    device, host = list[float](), list[float]()
    begin = time.perf_counter()
    while len(device) < least or time.perf_counter() - begin < seconds:
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        before = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - before))
        end.record()
        end.synchronize()
        device.append(float(start.elapsed_time(end)))
    return {"device_ms": median(device), "host_ms": median(host), "calls": len(device)}


def queued_milliseconds(call: Callable[[], object], calls: int) -> float:
    """Milliseconds of a call among many that are queued one after the other, as in training."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / calls


def copy_rate(size: int, seconds: float) -> float | None:
    """Bytes per second, read and written, of a copy of `size` bytes within the device."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = milliseconds(lambda: target.copy_(source), seconds)
    return rate(2.0 * size, found["device_ms"])


def rate(amount: float, ms: float) -> float | None:
    """Amount per second; None where no time was measured."""
    return amount / ms * 1e3 if ms > 0 else None
