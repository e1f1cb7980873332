"""Measures on a GPU and writes one JSON file to send back: `make bench-gpu`.

It runs the tests marked `gpu` and reports those that failed or were skipped. It times every op
through its Triton kernels against eager PyTorch and torch.compile, and the training step of Swin-B
with each backend. Backends are named, so that nothing falls back to the reference silently: a
backend that cannot run ends the script with the reasons.
"""

import argparse
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.measuring.record import write_record
from bench.measuring.timing import interleaved, peak_bytes
from bench.op_cases.catalogue import CASES, make_case
from bench.op_cases.measurement import measure_case
from simmim.config.sections import Config, ModelConfig
from simmim.environment import git_commit, package_versions
from simmim.pretrain import build_model
from simmim_kernels import random_patch_mask

ROOT = Path(__file__).parents[1]


def device_tests() -> dict[str, Any]:
    """The result of `pytest -m gpu`: its last line, and the tests that failed or were skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfsE", "-q", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return {
        "exit_code": done.returncode,
        "summary": lines[-1] if lines else done.stderr[-500:],
        "not_passed": [line for line in lines if re.match(r"(FAILED|ERROR|SKIPPED)", line)],
    }


def op_timings(device: torch.device, backend: str) -> dict[str, Any]:
    """Times of every op, after a check that all sides are equal."""
    timings = {}
    for name in CASES:
        timings[name] = measure_case(make_case(name, device, backend), device)
        print(name, {k: f"{v:.2f}x" for k, v in timings[name]["ratio"].items()}, flush=True)
    return timings


def step_timings(device: torch.device, backend: str, batch: int, tiny: bool) -> dict[str, Any]:
    """Images per second and peak memory of Swin-B's forward and backward pass in bf16 autocast."""
    model_config = ModelConfig(depths=[1, 1, 1, 1], embed_dim=32) if tiny else ModelConfig()
    config = Config(model=model_config)
    model = build_model(config, device)
    side = model.encoder.spec.image_size[0]
    image = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    cells = side // config.mask.unit
    mask = random_patch_mask(batch, (cells, cells), seed=0, device=device)

    def step(name: str) -> Tensor:
        model.use_backend(name)
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(image, mask)
        loss.backward()
        return loss.detach()

    sides = {name: (lambda name=name: step(name)) for name in (backend, "reference")}
    first, second = (side().float() for side in sides.values())
    torch.testing.assert_close(first, second, rtol=2e-2, atol=0)
    milliseconds = interleaved(sides, device, seconds=20, least_rounds=5)
    return {
        "batch": batch,
        "milliseconds": milliseconds,
        "images_per_second": {name: batch / t * 1e3 for name, t in milliseconds.items()},
        "peak_bytes": {name: peak_bytes(side, device) for name, side in sides.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", default="cuda", help="cpu only tries the script (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="images of the training step (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: bench/results/gpu-NAME.json)"
    )
    parser.add_argument("--skip-tests", action="store_true", help="do not run the tests")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU here (CUDA {torch.version.cuda})")
    backend = "triton" if device.type == "cuda" else "native"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    else:
        name = platform.machine()
    result = {
        "label": "measured" if device.type == "cuda" else "dry run on the CPU",
        "device": name,
        "backend": backend,
        "versions": package_versions(),
        "commit": git_commit(),
        "tests": None if options.skip_tests else device_tests(),
        "ops": op_timings(device, backend),
        "step": step_timings(device, backend, options.batch, tiny=device.type != "cuda"),
    }
    slug = re.sub(r"\W+", "-", name).strip("-").lower()
    output = options.output or ROOT / "bench" / "results" / f"gpu-{slug}.json"
    write_record(output, result)
    print(f"written: {output}; please send it back")
    failed = result["tests"] is not None and result["tests"]["exit_code"] != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
