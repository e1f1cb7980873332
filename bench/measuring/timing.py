"""Times several ways to do the same thing, in turns, so that all meet the same machine state."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

from simmim_kernels import native

TURN_SECONDS = 30e-3


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 3.0,
    least_rounds: int = 9,
) -> dict[str, float]:
    """Median milliseconds of a call of every side.

    Args:
        sides: what to time. Each side has one turn per round; odd rounds go through the sides in
            reverse order. On a CPU a turn is as many calls as fill 30 ms, on a GPU one call.
        device: a CUDA device is timed by events after a warm-up, the CPU by the clock.
        seconds: about how long to measure.
        least_rounds: smallest number of rounds, however slow a side is.
    """
    calls = {name: _calls_per_turn(side, device) for name, side in sides.items()}
    gc.collect()
    times = _in_turns(sides, device, calls, seconds, least_rounds, tidy=False)
    return {name: statistics.median(samples) for name, samples in times.items()}


def interleaved_samples(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    least_rounds: int,
) -> dict[str, list[float]]:
    """Milliseconds of every call of every side, in the same turns as `interleaved`.

    For sides that take long, such as training steps. They must have run before: there is no
    warm-up, and every turn is one call.
    """
    return _in_turns(sides, device, dict.fromkeys(sides, 1), seconds, least_rounds, tidy=True)


def _in_turns(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device,
    calls: Mapping[str, int],
    seconds: float,
    least_rounds: int,
    *,
    tidy: bool,
) -> dict[str, list[float]]:
    """Milliseconds per call in every turn; `tidy` collects garbage after each round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.disable()
    try:
        begin, rounds = time.perf_counter(), 0
        while rounds < least_rounds or time.perf_counter() - begin < seconds:
            order = list(sides.items())
            for name, side in order if rounds % 2 == 0 else reversed(order):
                times[name].append(_turn(side, device, calls[name]))
            rounds += 1
            if tidy:
                gc.collect()  # models that make reference cycles would fill the memory
    finally:
        gc.enable()
    return times


def _calls_per_turn(side: Callable[[], object], device: torch.device) -> int:
    side()
    if device.type == "cuda":
        side()
        return 1
    begin = time.perf_counter()
    side()
    return max(1, round(TURN_SECONDS / (time.perf_counter() - begin)))


def _turn(side: Callable[[], object], device: torch.device, calls: int) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            side()
        return (time.perf_counter() - begin) / calls * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # keep the queue busy, so that the events time the device and not the gaps between launches
    torch.cuda._sleep(2_000_000)
    start.record()
    side()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def peak_bytes(side: Callable[[], object], device: torch.device) -> int:
    """Most memory that the side has allocated at one time, beyond what was allocated before.

    On a CPU, PyTorch's profiler counts the allocations; our ops must not recycle memory meanwhile.
    """
    side()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    recycled_from, native.RECYCLED_BYTES = native.RECYCLED_BYTES, sys.maxsize
    try:
        side()  # frees recycled memory that an earlier call left in a gradient
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            side()
    finally:
        native.RECYCLED_BYTES = recycled_from
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
