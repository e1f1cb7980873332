"""The tables and the picture of bench/data.py."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.data_loaders.photos import PACKED


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Print two tables: the rows on the photos as they are, and the rows on packed photos."""
    console = Console()
    console.width = max(console.width, 100)
    speed = {row["name"]: row["images_per_s_per_core"] for row in rows}
    for suffix, title in (("", "photos as they are"), (PACKED, "the same, packed at 256 px")):
        table = Table(title=title, box=box.SIMPLE)
        table.add_column("", no_wrap=True)
        for column in ("images/s/core", "min–max", "simmim is", "CPU ms/image", "peak MiB"):
            table.add_column(column, justify="right")
        ours = speed.get("simmim" + suffix)
        for row in _rows_with(rows, suffix):
            table.add_row(
                row["name"],
                f"{row['images_per_s_per_core']:.0f}",
                f"{row['slowest']:.0f}–{row['fastest']:.0f}",
                f"{ours / row['images_per_s_per_core']:.2f}×" if ours else "",
                f"{1e3 * row['cpu_s_per_image']:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
            )
        if table.row_count:
            console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw images per second on one core as bars; packed photos have a panel of their own."""
    from matplotlib.figure import Figure

    panels = [(suffix, kept) for suffix in ("", PACKED) if (kept := _rows_with(rows, suffix))]
    figure = Figure(figsize=(5.5 * len(panels), 3.4), layout="constrained")
    for axes, (suffix, kept) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        kept = sorted(kept, key=lambda row: row["images_per_s_per_core"])
        names = [row["name"].removesuffix(PACKED) for row in kept]
        colours = [
            "tab:blue" if n == "simmim" else "lightgrey" if n == "decode-only" else "tab:grey"
            for n in names
        ]
        bars = axes.barh(names, [row["images_per_s_per_core"] for row in kept], color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("images/s on one core")
        axes.set_title("packed at 256 px" if suffix else "photos as they are")
    figure.savefig(path, format="png", dpi=150)


def _rows_with(rows: list[dict[str, Any]], suffix: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"].endswith(PACKED) == bool(suffix)]
