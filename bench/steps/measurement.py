"""First step, memory and time of the rows of bench/throughput.py."""

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.measuring.saved_tensors import saved_tensors
from bench.measuring.timing import interleaved_samples, peak_bytes
from bench.steps.build import OURS, WITH_DISTORTION
from bench.steps.checks import check_compiled
from bench.steps.engine_row import EngineRow
from bench.steps.floor import Product, all_products, fast_dtypes, products_of_step
from bench.steps.images import Images
from bench.steps.progress import print_progress
from bench.steps.row import Row

# Dense bf16 operations per second, by words that all stand in the device's name (data sheets).
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}


def saved_bytes_per_image(row: Row, few: Images, more: Images) -> int:
    """Bytes that the forward pass keeps for the backward pass, for each further image.

    It is the difference of two batches, so that casts of weights cancel. Parameters and the batch,
    which are in memory anyway, are left out.
    """
    few_bytes, more_bytes = (_saved_bytes(row, images) for images in (few, more))
    return (more_bytes - few_bytes) // (more.batch.num_valid - few.batch.num_valid)


def _saved_bytes(row: Row, images: Images) -> int:
    known = {p.untyped_storage().data_ptr() for p in row.model.parameters()}
    known |= {b.untyped_storage().data_ptr() for b in row.model.buffers()}
    known |= {t.untyped_storage().data_ptr() for t in (images.batch.image, *images.ready)}
    kept = saved_tensors(lambda: row.forward(images, row.config.train.precision))
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in known)


def first_steps(
    rows: list[Row], images: Images, device: torch.device
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float], list[dict[str, str]]]:
    """Make the first step of every row.

    Returns:
        The step functions by row, the seconds of the first step by row, and {"name", "reason"} for
        each row that cannot make a step.

    Raises:
        Mismatch: the loss of a compiled row differs from that of the row that it compiles.
    """
    steps, seconds, skipped = {}, {}, []
    for row in rows:
        print_progress(f"batch {images.batch.num_valid}: first step of {row.name}")
        before = None if row.plain is None else row.state()
        begin = time.perf_counter()
        try:
            step = row.step(images)
            float(step())  # waits for the device
            seconds_taken = time.perf_counter() - begin
            if before is not None and not row.is_finite():
                row.restore(before)
                raise ArithmeticError("its step gives weights that are not finite")
        except torch.OutOfMemoryError:
            skipped.append({"name": row.name, "reason": "out of device memory"})
        except Exception as error:
            if row.plain is None:
                raise
            reason = f"torch.compile: {str(error).strip().splitlines()[0]}"
            skipped.append({"name": row.name, "reason": reason})
        else:
            steps[row.name], seconds[row.name] = step, seconds_taken
            if row.plain is not None:
                check_compiled(row, row.plain, images)
            continue
        print_progress(f"no row {row.name} at this batch: {skipped[-1]['reason']}")
        row.model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return steps, seconds, skipped


def measure(
    rows: list[Row],
    base: EngineRow,
    count: int,
    saved: Mapping[str, int],
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, str]]]:
    """Measure one batch size.

    Returns:
        The numbers of the rows, the floor, and {"name", "reason"} for each row that could not run.
    """
    device, config = base.device, base.config
    images = Images.make(count, base.model, config)
    counts = products_of_step(base.model, images, config)
    steps, first, skipped = first_steps(rows, images, device)
    peaks = {}
    for name, step in steps.items():
        print_progress(f"batch {count}: memory of {name}")
        peaks[name] = peak_bytes(step, device)
    # the floor is timed in turns with the rows, because the speed of a machine drifts
    products = {
        f"products in {dtype}": all_products(counts, dtype, device)
        for dtype in fast_dtypes(config.train.precision, device)
    }
    print_progress(
        f"batch {count}: timing {len(steps)} rows and their matrix products alone, in turns"
    )
    samples = interleaved_samples(
        {**steps, **products}, device, seconds=options.seconds, least_rounds=options.rounds
    )
    floor = _floor_numbers(
        count, counts, {name.rpartition(" ")[2]: samples[name] for name in products}
    )
    ours = median(samples[OURS]) if OURS in samples else None
    numbers = []
    for row in (row for row in rows if row.name in steps):
        memory_and_start = {
            "peak_bytes": peaks[row.name],
            "saved_bytes_per_image": saved.get(row.name),
            "first_step_s": first[row.name],
        }
        numbers.append(row_numbers(row, samples[row.name], ours, floor) | memory_and_start)
        if row.name == WITH_DISTORTION and ours:
            extra = median(samples[row.name]) / ours - 1
            numbers[-1]["note"] += f": {extra:+.1%} over the row {OURS}"
    return numbers, floor, skipped


def _floor_numbers(
    count: int, counts: Mapping[Product, int], samples: Mapping[str, list[float]]
) -> dict[str, Any]:
    """The floor of one batch size, from the milliseconds of its products in each dtype."""
    by_dtype = {dtype: median(milliseconds) for dtype, milliseconds in samples.items()}
    dtype = min(by_dtype, key=lambda name: by_dtype[name])
    return {
        "batch": count,
        "ms": by_dtype[dtype],
        "spread_ms": [min(samples[dtype]), max(samples[dtype])],
        "dtype": dtype,
        "by_dtype": by_dtype,
        "flops": sum(product.flops * times for product, times in counts.items()),
        "products": sum(counts.values()),
    }


def row_numbers(
    row: Row, samples: list[float], ours: float | None, floor: Mapping[str, Any]
) -> dict[str, Any]:
    """What follows from the milliseconds of a row's steps and of our steps."""
    ms, count, train = median(samples), floor["batch"], row.config.train
    flops_per_s = floor["flops"] / ms * 1e3
    peak_flops = device_peak(row.device, train.precision)
    return {
        "name": row.name,
        "images_per_s": count / ms * 1e3,
        "ms": ms,
        "spread_ms": [min(samples), max(samples)],
        "rounds": len(samples),
        "ratio": ms / ours if ours else None,
        "floor_ratio": floor["ms"] / ms,
        "floor_ms": floor["ms"],
        "flops_per_s": flops_per_s,
        "mfu": flops_per_s / peak_flops if peak_flops else None,
        "batch": count,
        "dtype": train.precision,
        "model": row.config.model.name,
        "method": row.config.method.name,
        "note": row.note,
    }


def device_peak(device: torch.device, dtype: str) -> float | None:
    """Operations per second that the data sheet of the device promises; None if unknown."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    for words, flops in PEAK_FLOPS.items():
        if all(word in name for word in words.split()):
            return flops
    return None
