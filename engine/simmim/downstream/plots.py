"""Draws results with matplotlib (extra `plots`); if that is not installed, says so in a line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.files import write_atomic

# Most classes whose names are written, and most whose counts are written into the cells.
MOST_NAMED, MOST_NUMBERED = 60, 20

# Most cells along a side of the picture; if there are more classes, a cell stands for several.
MOST_CELLS = 250

_LONGEST_NAME = 24


def save_confusion(
    confusion: NDArray[np.int64], images: NDArray[np.int64], classes: Sequence[str], path: Path
) -> str | None:
    """Draw a confusion matrix, every row as shares of its images.

    Colours follow the square root of the share, so that rare confusions can be seen beside the
    diagonal. If there are many classes, a cell stands for several and shows their largest share.

    Args:
        confusion: [K, K], rows true, columns answered.
        images: [K], the images of every class; more than the sum of its row if some got no answer.
        classes: K names.
        path: PNG to write; a failure leaves no part of it.

    Returns:
        None, or a line that says why there is no picture.
    """
    figure = _new_figure()
    if isinstance(figure, str):
        return figure
    from matplotlib.colors import PowerNorm

    K = len(classes)
    shares = confusion / np.maximum(1, images)[:, None]
    cells, block = pool_cells(shares)
    side = min(14.0, max(4.0, 1.8 + 0.42 * K)) if K <= MOST_NAMED else 9.0
    figure.set_size_inches(side + 1.2, side)
    figure.set_layout_engine("compressed")  # square axes: the bar stands beside them
    axes = figure.add_subplot()
    edge = len(cells) * block - 0.5
    drawn = axes.imshow(
        cells,
        cmap="viridis",
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        interpolation="nearest",
        extent=(-0.5, edge, edge, -0.5),
    )
    share = (
        f"largest share in {block} × {block} classes" if block > 1 else "share of the true class"
    )
    figure.colorbar(drawn, ax=axes, label=share, ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    right = int(np.trace(confusion)) / max(1, int(images.sum()))
    axes.set_title(f"{right:.1%} of {int(images.sum()):,} images right")
    if K <= MOST_NAMED:
        names = [_shortened(name) for name in classes]
        size = 9 if K <= MOST_NUMBERED else 6
        axes.set_xticks(range(K), names, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(K), names, fontsize=size, parse_math=False)
    if K <= MOST_NUMBERED:
        for row, column in np.ndindex(K, K):
            if confusion[row, column]:
                colour = "white" if shares[row, column] < 0.4 else "black"
                text = str(int(confusion[row, column]))
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    _save(figure, path)
    return None


def pool_cells(shares: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """The largest share of every block of classes, and the side of a block, in classes."""
    K = len(shares)
    block = -(-K // MOST_CELLS)
    if block == 1:
        return shares, 1
    count = -(-K // block)
    padded = np.zeros((count * block, count * block))
    padded[:K, :K] = shares
    return padded.reshape(count, block, count, block).max(axis=(1, 3)), block


def save_layers(
    names: Sequence[str], accuracies: dict[str, Sequence[float]], title: str, path: Path
) -> str | None:
    """Draw accuracy by layer.

    Args:
        names: names of the layers, from first to last.
        accuracies: name of a curve → accuracy of every layer, 0 to 1.
        title: title of the picture.
        path: PNG to write; a failure leaves no part of it.

    Returns:
        None, or a line that says why there is no picture.
    """
    figure = _new_figure()
    if isinstance(figure, str):
        return figure
    figure.set_size_inches(max(5.0, 1.5 + 0.35 * len(names)), 4.0)
    axes = figure.add_subplot()
    places = np.arange(len(names))
    for number, (label, values) in enumerate(accuracies.items()):
        percent = 100 * np.asarray(values)
        axes.plot(places, percent, marker="o", label=label, color=f"C{number}")
        best = int(np.argmax(percent))
        axes.annotate(
            f"{percent[best]:.1f} %",
            (best, percent[best]),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=8,
        )
    axes.set_xticks(places, [_shortened(name) for name in names], rotation=90, parse_math=False)
    axes.set_ylabel("accuracy, %")
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.set_title(title, parse_math=False)
    if len(accuracies) > 1:
        axes.legend()
    _save(figure, path)
    return None


def _new_figure() -> Any:
    try:
        # not pyplot, which would choose a window system and keep every figure
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: pip install 'simmim[plots]' draws one"
    return Figure(layout="constrained", dpi=120)


def _save(figure: Any, path: Path) -> None:
    # without a date, so that equal results are equal files
    write_atomic(
        path,
        lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}),
    )


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
