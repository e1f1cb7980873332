"""Where the time of a step goes, kernel by kernel."""

import shutil
import subprocess
import sys

import torch

from bench.gpu_stages.stage import Emit, config_of, is_tiny
from bench.steps.engine_row import EngineRow
from bench.steps.images import Images

LARGEST = 40


def run(emit: Emit, seconds: float) -> None:
    """Emit the kernels of a step of Swin-B with the largest shares of its time."""
    batch = 4 if is_tiny() else 128
    row = EngineRow("ours", config_of("swin_base", batch), torch.device("cuda", 0))
    step = row.step(Images.make(batch, row.model, row.config))
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in kernels) or 1.0
    kernels.sort(key=lambda e: -e.self_device_time_total)
    for event in kernels[:LARGEST]:
        emit(
            "kernel",
            name=event.key[:160],
            calls=event.count / 3,
            ms=event.self_device_time_total / 3e3,
            share=event.self_device_time_total / total,
        )
    emit("total", batch=batch, ms=total / 3e3, kernels=len(kernels))


def counters(emit: Emit, seconds: float) -> None:
    """What Nsight Compute says of the three largest kernels, where it is installed."""
    tool = shutil.which("ncu")
    if tool is None:
        emit("ncu", missing="ncu is not installed")
        return
    code = (
        "import torch; from bench.gpu_stages.stage import config_of;"
        "from bench.steps.engine_row import EngineRow; from bench.steps.images import Images;"
        "row = EngineRow('ours', config_of('swin_base', 64), torch.device('cuda', 0));"
        "step = row.step(Images.make(64, row.model, row.config));"
        "[step() for _ in range(3)]; torch.cuda.synchronize()"
    )
    for kernel in ("_attend_window_backward", "_gelu_backward", "_layer_norm_backward"):
        command = [
            tool, "--kernel-name", kernel, "--launch-skip", "48", "--launch-count", "1",
            "--set", "detailed", "--csv", "--page", "details", sys.executable, "-c", code,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds / 3, 60))
        emit("ncu", kernel=kernel, exit_code=done.returncode, csv=done.stdout[-6000:])
