"""The machine: its clocks, and the rates of copies and products that bound everything else."""

import shutil
import subprocess

import torch

from bench.gpu_stages.stage import Emit, copy_rate, is_tiny, milliseconds, rate

QUERY = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"


def run(emit: Emit, seconds: float) -> None:
    """Emit a line for the card, its clocks, copies and products."""
    card = torch.cuda.get_device_properties(0)
    emit(
        "card",
        name=card.name,
        capability=f"{card.major}.{card.minor}",
        multiprocessors=card.multi_processor_count,
        memory_bytes=card.total_memory,
        cuda=torch.version.cuda,
    )
    if tool := shutil.which("nvidia-smi"):
        told = subprocess.run(
            [tool, f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True
        )
        emit("clocks", query=QUERY, answer=told.stdout.strip() or told.stderr.strip()[:300])
    part = max(seconds / 8, 0.2)
    size = 2**20 if is_tiny() else 2**31
    emit("copy", bytes=2 * size, bytes_per_s=copy_rate(size, part))
    for dtype in (torch.bfloat16, torch.float32):
        for M, N, K in ((8192, 8192, 8192), (73728, 512, 128), (18432, 2048, 512)):
            if is_tiny():
                M, N, K = M // 64, N // 8, K // 8
            a, b = (torch.randn(s, device="cuda", dtype=dtype) for s in ((M, K), (K, N)))
            found = milliseconds(lambda a=a, b=b: torch.mm(a, b), part)
            flops = rate(2.0 * M * N * K, found["device_ms"])
            emit("product", dtype=str(dtype), shape=[M, N, K], flops_per_s=flops, **found)
