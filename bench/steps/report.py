"""The table and the picture of bench/throughput.py."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(rows: list[dict[str, Any]], floor: dict[str, Any], title: str) -> None:
    """Print the rows of one batch size, the floor, and the notes of the rows."""
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
    """Draw throughput and memory against the batch size, one line per row."""
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
