"""One optimisation step, here and in other packages: images per second and memory.

    python bench/throughput.py --model swin_base --batch 8
    python bench/throughput.py --model resnet50 --method simsiam

Rows are the engine as a user runs it, the same model through its PyTorch references, and
torchvision, timm, transformers and lightly as far as they are installed. All make the same step
(batch, dtype, fused AdamW, clipping) from the same weights, images, and masks or views. Loss and
gradients are checked equal before anything is timed, and the rows take turns. bench/README.md
explains the columns.
"""

import argparse
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

sys.path.insert(0, str(Path(__file__).parent))

from floor import Product, all_products, count_products, fast_dtypes
from peer import Mismatch, Unavailable
from peers import PACKAGES, PEERS
from rows import EngineRow, Images, PeerRow, Row, engine_loss, wake
from simmim.backbone.build import PRESETS, build_encoder
from simmim.config.sections import (
    Config,
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from simmim.config.values import config_class, nearest
from simmim.environment import device_name, git_commit, package_versions
from simmim.errors import ConfigError, RunError
from simmim.files import write_text
from simmim.method.build import check_config, find_method, method_class
from simmim.method.simsiam import SimSiamMethod
from simmim.model.image_model import ImageModel
from timing import interleaved_samples, peak_bytes

OURS, REFERENCE = "simmim", "reference PyTorch"
WHOLE = "simmim with distortion"
# rows with another one through torch.compile
COMPILED = ("simmim", "torchvision", "timm", "transformers")

# What --model takes besides presets: model, method, and share of hidden tokens.
RECIPES = {"vit_small_tokens": ("vit_small_plain", "tokens", 0.75)}

# A batch norm over two images has next to no gradient: SimSiam is checked over more.
CHECK_BATCH, CHECK_BATCH_VIEWS = 2, 8
LOSS_RTOL, GRADIENT_RTOL, LOW_PRECISION_RTOL = 1e-4, 1e-3, 3e-2

# Dense bf16 operations per second of devices whose name holds all the words (data sheets).
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def names_of(method: str) -> list[str]:
    """What --only takes; rows that belong to another go with it."""
    return ["simmim", "reference", *PEERS[method]]


def build_rows(
    base: EngineRow, names: Sequence[str], with_compile: bool, images: Images
) -> tuple[list[Row], list[dict[str, str]]]:
    """The rows of those names in their usual order, and {"name", "reason"} of those without.

    Args:
        base: the row of the engine.
        names: of rows.
        with_compile: add rows through torch.compile.
        images: for trials, where a peer may choose its memory format.
    """
    rows: list[Row] = []
    skipped = []
    method = base.config.method.name
    for name in (n for n in names_of(method) if n in names):
        if name == "simmim":
            rows.append(base)
        elif name == "reference":
            rows.append(base.through_references(REFERENCE))
        else:
            tell(f"building {name}")
            try:
                row = PeerRow(PEERS[method][name](base.spec), base.config, base.device)
            except Unavailable as problem:
                skipped.append({"name": name, "reason": str(problem)})
                tell(f"no row {name}: {problem}")
                continue
            if found := row.choose_format(images):
                tell(f"{name}: {found}")
            rows.append(row)
        if with_compile and name in COMPILED:
            rows.append(rows[-1].compiled())
        if name == "simmim" and isinstance(base.method, SimSiamMethod):
            rows.append(base.with_distortion(WHOLE))
    return rows, skipped


def check_equal(base: EngineRow, row: Row) -> tuple[float, float]:
    """Give the row our weights, and compare its loss and gradients with ours.

    In float32 over two images, or eight pairs of views in float64, since batch norms over features
    that are nearly the same amplify rounding; then the loss alone in the dtype that is timed.

    Returns:
        Errors of the float32 loss (see `loss_error`) and of the worst gradient (relative, of
        norms).

    Raises:
        Mismatch: they differ by more than rounding explains.
    """
    config, model = base.config, base.model
    if row.spec != base.spec:
        torch.manual_seed(config.seed)
        model = wake(find_method(config).build(build_encoder(row.spec)).to(base.device).train())
    if row.model is not model:
        row.load(model.state_dict())
    pairs_of_views = isinstance(base.method, SimSiamMethod)
    count = CHECK_BATCH_VIEWS if pairs_of_views else CHECK_BATCH
    images = wide = Images.make(count, model, config)
    if pairs_of_views:
        model.double(), row.model.double()
        wide = Images.make(count, model, config)  # normalised in float64 as well
        wide = replace(wide, ready=(wide.ready[0].double(), wide.ready[1].double()))
    ours, our_gradients = _gradients(model, engine_loss(model, wide, config, "float32"))
    theirs, their_gradients = _gradients(row.model, row.forward(wide, "float32"))
    model.float(), row.model.float()
    error = loss_error(theirs, ours, config)
    if not error <= LOSS_RTOL:
        raise Mismatch(f"{row.name}: loss {theirs:.7g}, ours {ours:.7g}: off by {error:.2g}")
    worst, where = 0.0, ""
    for pair in row.pairs:
        if not pair.compared:
            continue
        expected, actual = pair.take(our_gradients).double(), their_gradients.get(pair.theirs)
        if actual is None:
            raise Mismatch(f"{row.name}: {pair.theirs} has no gradient, ours has one")
        off = float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
        if not off <= worst:  # NaN is the worst
            worst, where = off, pair.theirs
    if not worst <= GRADIENT_RTOL:
        raise Mismatch(f"{row.name}: gradient of {where} is off by {worst:.2g} of its norm")
    dtype = config.train.precision
    if dtype != "float32":
        with torch.no_grad():
            ours = float(engine_loss(model, images, config, dtype))
            theirs = float(row.forward(images, dtype))
        if not loss_error(theirs, ours, config) <= LOW_PRECISION_RTOL:
            raise Mismatch(f"{row.name}: loss in {dtype} {theirs:.5g}, ours {ours:.5g}")
    return error, worst


def loss_error(theirs: float, ours: float, config: Config) -> float:
    """How far two losses are apart: relative, but for SimSiam, whose cosines may be about 0."""
    scale = 1.0 if config.method.name == SimSiamMethod.name else abs(ours)
    return abs(theirs - ours) / scale


def _gradients(model: nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def products_of(model: ImageModel, images: Images, config: Config) -> Counter[Product]:
    """The matrix products of one forward and backward pass through the PyTorch references."""

    def step() -> None:
        engine_loss(model, images, config, config.train.precision).backward()

    model.use_backend("reference")
    counts = count_products(step)
    model.zero_grad(set_to_none=True)
    model.use_backend(config.kernels.backend)
    return counts


def saved_bytes_per_image(row: Row, few: Images, more: Images) -> int:
    """What the forward pass keeps for the backward, for each further image.

    The difference of two batches, so that casts of weights drop out; parameters and the batch
    itself, which are there anyway, are left out.
    """
    few_bytes, more_bytes = (_saved_bytes(row, images) for images in (few, more))
    return (more_bytes - few_bytes) // (more.batch.num_valid - few.batch.num_valid)


def _saved_bytes(row: Row, images: Images) -> int:
    known = {p.untyped_storage().data_ptr() for p in row.model.parameters()}
    known |= {b.untyped_storage().data_ptr() for b in row.model.buffers()}
    known |= {t.untyped_storage().data_ptr() for t in (images.batch.image, *images.ready)}
    kept: list[Tensor] = []  # alive until they are counted, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = row.forward(images, row.config.train.precision)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del loss
    return sum(size for pointer, size in storages.items() if pointer not in known)


def first_steps(
    rows: list[Row], images: Images, device: torch.device
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float], list[dict[str, str]]]:
    """Make every row's first step.

    Returns:
        Step functions and seconds of the first step by row, and {"name", "reason"} of the rows
        that cannot make one.

    Raises:
        Mismatch: a compiled row's loss is not that of the row it compiles.
    """
    steps, seconds, skipped = {}, {}, []
    for row in rows:
        tell(f"batch {images.batch.num_valid}: first step of {row.name}")
        kept = None if row.plain is None else row.state()
        begin = time.perf_counter()
        try:
            step = row.step(images)
            float(step())  # waits for the device
            seconds_taken = time.perf_counter() - begin
            if kept is not None and not row.is_finite():
                row.restore(kept)
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
                _check_compiled(row, row.plain, images)
            continue
        tell(f"no row {row.name} at this batch: {skipped[-1]['reason']}")
        row.model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return steps, seconds, skipped


def _check_compiled(row: Row, plain: Row, images: Images) -> None:
    # with gradients on, since torch.compile makes another graph without
    dtype = row.config.train.precision
    ours, theirs = (float(r.forward(images, dtype).detach()) for r in (plain, row))
    if not loss_error(theirs, ours, row.config) <= LOW_PRECISION_RTOL:
        raise Mismatch(f"{row.name}: loss {theirs:.5g}, not compiled {ours:.5g}")


def measure(
    rows: list[Row],
    base: EngineRow,
    count: int,
    saved: Mapping[str, int],
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, str]]]:
    """All numbers of one batch size: rows, floor, and rows that could not run."""
    device, config = base.device, base.config
    images = Images.make(count, base.model, config)
    counts = products_of(base.model, images, config)
    steps, first, skipped = first_steps(rows, images, device)
    peaks = {}
    for name, step in steps.items():
        tell(f"batch {count}: memory of {name}")
        peaks[name] = peak_bytes(step, device)
    # in turns with the rows, since a machine's speed drifts
    floors = {
        f"products in {dtype}": all_products(counts, dtype, device)
        for dtype in fast_dtypes(config.train.precision, device)
    }
    tell(f"batch {count}: timing {len(steps)} rows and their matrix products alone, in turns")
    samples = interleaved_samples(
        {**steps, **floors}, device, seconds=options.seconds, least_rounds=options.rounds
    )
    by_dtype = {name.rpartition(" ")[2]: median(samples[name]) for name in floors}
    dtype, milliseconds = min(by_dtype.items(), key=lambda item: item[1])
    alone = samples[f"products in {dtype}"]
    floor = {
        "batch": count,
        "ms": milliseconds,
        "spread_ms": [min(alone), max(alone)],
        "dtype": dtype,
        "by_dtype": by_dtype,
        "flops": sum(product.flops * times for product, times in counts.items()),
        "products": sum(counts.values()),
    }
    ours = median(samples[OURS]) if OURS in samples else None
    found = []
    for row in (row for row in rows if row.name in steps):
        own = {
            "peak_bytes": peaks[row.name],
            "saved_bytes_per_image": saved.get(row.name),
            "first_step_s": first[row.name],
        }
        found.append(row_numbers(row, samples[row.name], ours, floor) | own)
        if row.name == WHOLE and ours:
            extra = median(samples[row.name]) / ours - 1
            found[-1]["note"] += f": {extra:+.1%} over the row {OURS}"
    return found, floor, skipped


def row_numbers(
    row: Row, samples: list[float], ours: float | None, floor: Mapping[str, Any]
) -> dict[str, Any]:
    """What follows from the milliseconds of a row's steps, and of ours."""
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
    """Operations per second that the device's maker promises; None where unknown."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    for words, flops in PEAK_FLOPS.items():
        if all(word in name for word in words.split()):
            return flops
    return None


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    versions = package_versions()
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": device_name(device),
        "versions": versions,
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def print_table(rows: list[dict[str, Any]], floor: dict[str, Any], title: str) -> None:
    """The rows of one batch size, and what must be known to read them."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("row", no_wrap=True)
    for column in (
        "images/s",
        "min–max",
        "ms",
        "simmim is",
        "of floor",
        "peak MiB",
        "saved MB/image",
        "TFLOP/s",
        "MFU",
        "first step s",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        slow, fast = (row["batch"] / ms * 1e3 for ms in reversed(row["spread_ms"]))
        table.add_row(
            row["name"],
            f"{row['images_per_s']:.4g}",
            f"{slow:.4g}–{fast:.4g}",
            f"{row['ms']:.1f}",
            _or_dash(row["ratio"], "{:.2f}×"),
            f"{row['floor_ratio']:.0%}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            _or_dash(row["saved_bytes_per_image"], "{:.2f}", 1e-6),
            f"{row['flops_per_s'] / 1e12:.3g}",
            _or_dash(row["mfu"], "{:.1%}"),
            f"{row['first_step_s']:.1f}",
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
    low, high = floor["spread_ms"]
    lines = [
        f"floor: {floor['ms']:.1f} ms ({low:.1f}–{high:.1f}) for {floor['products']} matrix "
        f"products alone, in {floor['dtype']}"
    ]
    lines += [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def _or_dash(value: float | None, form: str, factor: float = 1) -> str:
    return "–" if value is None else form.format(value * factor)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Throughput and memory against the batch size, one line per row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    speed, memory = figure.subplots(1, 2)
    for name in dict.fromkeys(row["name"] for row in rows):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["batch"])
        batches = [row["batch"] for row in own]
        speed.plot(batches, [row["images_per_s"] for row in own], marker="o", label=name)
        memory.plot(batches, [row["peak_bytes"] / 2**20 for row in own], marker="o", label=name)
    ticks = sorted({row["batch"] for row in rows})
    for axes, label in ((speed, "images/s"), (memory, "peak of a step, MiB")):
        axes.set(xlabel="images per step", ylabel=label, xscale="log")
        axes.set_ylim(bottom=0)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    speed.legend()
    figure.savefig(path, format="png", dpi=150)


STARTED = time.perf_counter()


def tell(message: str) -> None:
    """A line of progress."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {message}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked options; a wrong one ends the program with one line and code 2."""
    parser = Parser(prog="throughput.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--model", default="swin_base", help=f"one of {', '.join([*RECIPES, *PRESETS])}")
    add("--method", choices=tuple(PEERS), help="default: simmim, or that of the recipe")
    add("--batch", type=int, nargs="+", help="images per step; default 8 on cpu, 128 on cuda")
    add("--dtype", choices=("bf16", "float32"), default="bf16")
    add("--image-size", type=int, help="in pixels; default: the preset's")
    add("--compile", action="store_true", help="more rows, through torch.compile")
    add("--only", help=f"rows, separated by commas: simmim, reference, {', '.join(PACKAGES)}")
    add("--rounds", type=int, default=5, help="timed steps of every row at least")
    add("--seconds", type=float, default=10.0, help="time the steps at least so long")
    add("--json", type=Path, help="write all numbers there")
    add("--plot", type=Path, help="draw throughput and memory against the batch size (PNG)")
    options = parser.parse_args(arguments)
    if options.model not in {*PRESETS, *RECIPES}:
        near = nearest(options.model, [*PRESETS, *RECIPES])
        parser.error(f"--model {options.model} is unknown; {near}")
    own = RECIPES[options.model][1] if options.model in RECIPES else "simmim"
    if options.model in RECIPES and options.method not in (None, own):
        parser.error(f"--model {options.model} goes with --method {own}, not {options.method}")
    options.method = options.method or own
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU here")
    options.batch = options.batch or [128 if options.device == "cuda" else 8]
    if min(options.batch) < 1:
        parser.error(f"--batch {min(options.batch)}: at least 1 image")
    if len(set(options.batch)) < len(options.batch):
        parser.error(f"--batch {' '.join(map(str, options.batch))}: the same size twice")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    if not 0 <= options.seconds < 1e6:
        parser.error(f"--seconds {options.seconds}: between 0 and a million")
    names = names_of(options.method)
    options.only = [n.strip() for n in options.only.split(",")] if options.only else names
    # the printed name of a row serves as well
    options.only = ["reference" if name == REFERENCE else name for name in options.only]
    for name in options.only:
        if name not in names:
            parser.error(f"--only {name} is no row; {nearest(name, names)}")
    for path in filter(None, (options.json, options.plot)):
        try:  # now, and not after an hour
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as problem:
            parser.error(f"{path} cannot be written: {problem.strerror}")
        if path.is_dir():
            parser.error(f"{path} is a folder")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        options.config = make_config(options)
        check_config(options.config)
    except ConfigError as problem:
        parser.error(str(problem))
    return options


def make_config(options: argparse.Namespace) -> Config:
    """The run whose step is timed: the published one at a small, constant learning rate."""
    model, _, ratio = RECIPES.get(options.model, (options.model, "", MaskConfig().ratio))
    settings = method_class(options.method).Settings
    return config_class(settings)(
        device=options.device,
        model=ModelConfig(name=model),
        method=settings(name=options.method),
        mask=MaskConfig(ratio=ratio),
        data=DataConfig(
            path="random images", image_size=options.image_size or PRESETS[model].image_size
        ),
        # the smallest batch, which is the first to be refused
        train=TrainConfig(batch_size=min(options.batch), precision=options.dtype),
        # small, since random images teach nothing and the loss should stay finite
        optim=OptimConfig(lr=1e-5, lr_batch=0),
        schedule=ScheduleConfig(name="constant", warmup_epochs=0),
    )


def check_memory(base: EngineRow, options: argparse.Namespace) -> None:
    """Raise MemoryError where weights, gradients and optimiser states of all rows do not fit."""
    own = sum(p.numel() for p in base.model.parameters()) * 4
    needed = len(options.only) * 3 * own + own  # weights and two moments each; gradients in turns
    if base.device.type == "cuda":
        free = torch.cuda.mem_get_info(base.device)[0]
    else:
        try:
            text = Path("/proc/meminfo").read_text(encoding="utf-8")
        except OSError:
            return
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    if needed > free:
        raise MemoryError(
            f"{len(options.only)} rows of {options.model} need {needed / 2**30:.1f} GiB before the "
            f"first activation, and {free / 2**30:.1f} GiB are free; ask for fewer with --only"
        )


def run(options: argparse.Namespace) -> None:
    """Build, check, time; print, write and draw."""
    config, device = options.config, torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        torch.backends.cudnn.allow_tf32 = False  # as the engine sets it
    tell(f"building {config.model.name}")
    base = EngineRow(OURS, config, device)
    check_memory(base, options)
    trial = Images.make(min(options.batch), base.model, config)
    rows, skipped = build_rows(base, options.only, options.compile, trial)
    errors = {}
    for row in (row for row in rows if row.plain is None and row is not base):
        errors[row.name] = check_equal(base, row)
        loss, gradient = errors[row.name]
        tell(f"{row.name}: loss off by {loss:.1e}, gradients by {gradient:.1e} at most")
    tell("what each row keeps for the backward pass")
    least = 2 if isinstance(base.method, SimSiamMethod) else 1  # its batch norms refuse one image
    few, more = (Images.make(count, base.model, config) for count in (least, least + 1))
    saved = {
        row.name: saved_bytes_per_image(row, few, more)
        for row in rows
        if row.plain is None  # torch.compile would need code for each of the two sizes
    }
    gc.freeze()  # what was built stays; collections between timings need not walk through it
    size = "×".join(map(str, config.image_size))
    title = f"{config.method.name} of {config.model.name}, {size} px, {options.dtype}, "
    title += device_name(device)
    result: dict[str, Any] = {
        "machine": machine(device),
        "settings": {
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
        },
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
        found, floor, lost = measure(rows, base, count, saved, options)
        result["rows"] += found
        result["floors"].append(floor)
        result["floor"] = result["floor"] or floor
        result["skipped"] += [{**row, "batch": count} for row in lost]
        print_table(found, floor, f"{title}, batch {count}")
        if options.json:  # after every size, so that a run that is cut short leaves what it has
            write_text(options.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for row in result["skipped"]:
        print(f"no row {row['name']}: {row['reason']}")
    if options.plot:
        plot(result["rows"], options.plot, title)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 where rows do not compute the same thing or do not fit."""
    options = parse(arguments)
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
