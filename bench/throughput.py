"""One optimisation step, here and in other packages: images per second and memory.

    python bench/throughput.py --model swin_base --batch 8
    python bench/throughput.py --model resnet50 --method simsiam

The rows are the engine as a user runs it, the same model in plain PyTorch, and torchvision, timm,
transformers and lightly as far as they are installed. All rows make the same step (batch, dtype,
fused AdamW, clipping) from the same weights, images, and masks or views. Their losses and gradients
are checked to be equal before anything is timed, and the rows take turns. bench/README.md explains
the columns.
"""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.measuring.machine import describe_machine
from bench.measuring.record import write_record
from bench.peers.by_method import PACKAGES
from bench.peers.peer import Mismatch
from bench.steps.build import OURS, build_rows, check_memory
from bench.steps.checks import check_equal
from bench.steps.engine_row import EngineRow
from bench.steps.images import Images
from bench.steps.measurement import measure, saved_bytes_per_image
from bench.steps.options import parse_options
from bench.steps.progress import print_progress
from bench.steps.report import plot, print_table
from bench.steps.row import Row
from simmim.environment import device_name
from simmim.errors import RunError
from simmim.method.simsiam import SimSiamMethod


def run(options: argparse.Namespace) -> None:
    """Build, check and time the rows; print, write and draw the numbers."""
    config, device = options.config, torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        torch.backends.cudnn.allow_tf32 = False  # as the engine sets it
    print_progress(f"building {config.model.name}")
    base = EngineRow(OURS, config, device)
    check_memory(base, options)
    trial = Images.make(min(options.batch), base.model, config)
    rows, skipped = build_rows(base, options.only, options.compile, trial)
    errors = {}
    for row in (row for row in rows if row.plain is None and row is not base):
        errors[row.name] = check_equal(base, row)
        loss, gradient = errors[row.name]
        print_progress(f"{row.name}: loss off by {loss:.1e}, gradients by {gradient:.1e} at most")
    saved = measure_saved_bytes(base, rows)
    gc.freeze()  # what is built stays, so collections between timings need not look at it
    size = "×".join(map(str, config.image_size))
    title = f"{config.method.name} of {config.model.name}, {size} px, {options.dtype}, "
    title += device_name(device)
    result: dict[str, Any] = {
        "machine": describe_machine(device, PACKAGES),
        "settings": settings_of(options),
        "checks": {
            name: {"loss_error": loss, "gradient_error": gradient}
            for name, (loss, gradient) in errors.items()
        },
        "floor": None,
        "floors": [],
        "rows": [],
        "skipped": skipped,
    }
    for count in options.batch:
        numbers, floor, failed = measure(rows, base, count, saved, options)
        result["rows"] += numbers
        result["floors"].append(floor)
        result["floor"] = result["floor"] or floor
        result["skipped"] += [{**row, "batch": count} for row in failed]
        print_table(numbers, floor, f"{title}, batch {count}")
        if options.json:  # after every batch size, so that a run that is cut short has its numbers
            write_record(options.json, result)
    for row in result["skipped"]:
        print(f"no row {row['name']}: {row['reason']}")
    if options.plot:
        plot(result["rows"], options.plot, title)


def measure_saved_bytes(base: EngineRow, rows: list[Row]) -> dict[str, int]:
    """What each row keeps for the backward pass per image, but for compiled rows.

    torch.compile would need code for each of the two batch sizes.
    """
    print_progress("what each row keeps for the backward pass")
    fewest = 2 if isinstance(base.method, SimSiamMethod) else 1  # its batch norms refuse one image
    few, more = (Images.make(n, base.model, base.config) for n in (fewest, fewest + 1))
    return {row.name: saved_bytes_per_image(row, few, more) for row in rows if row.plain is None}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What was timed, for the JSON file."""
    config = options.config
    return {
        "model": config.model.name,
        "method": config.method.name,
        "image_size": config.image_size,
        "batch": options.batch,
        "dtype": options.dtype,
        "compile": options.compile,
        "only": options.only,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "optimizer": "AdamW, fused, betas 0.9 0.999, weight decay 0.05",
        "clip_norm": config.train.clip_norm,
        "mask_unit": config.mask.unit,
        "mask_ratio": config.mask.ratio,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if rows do not compute the same or do not fit into memory."""
    options = parse_options(arguments)
    # the profiler behind peak_bytes would report on itself
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        run(options)
    except (Mismatch, RunError, MemoryError, OSError) as problem:
        print(f"throughput.py: {problem}", file=sys.stderr)
        return 1
    finally:
        gc.unfreeze()
    return 0


if __name__ == "__main__":
    sys.exit(main())
