"""Pictures of results: what is drawn where, and files that are equal for equal results."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from simmim.downstream import plots
from simmim.downstream.plots import MOST_CELLS, pool_cells, save_confusion, save_layers

CONFUSION = np.array([[3, 1, 0], [0, 0, 0], [0, 4, 5]])
IMAGES = np.array([4, 0, 10])  # one image of the last class got no answer


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, instead of files."""
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def texts(labels: list[Any]) -> list[str]:
    return [label.get_text() for label in labels]


def test_rows_are_true_classes_as_shares_of_their_images(drawn: list[Any]) -> None:
    names = ["ant", "b" * 25, "cat"]
    assert save_confusion(CONFUSION, IMAGES, names, Path("x")) is None
    axes, bar = drawn[0].axes
    (image,) = axes.images
    expected = [[0.75, 0.25, 0], [0, 0, 0], [0, 0.4, 0.5]]
    np.testing.assert_allclose(image.get_array(), expected)
    assert tuple(image.get_extent()) == (-0.5, 2.5, 2.5, -0.5)
    assert (image.norm.vmin, image.norm.vmax, image.norm.gamma) == (0, 1, 0.5)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("answered", "true")
    assert axes.get_title() == "57.1% of 14 images right"
    assert bar.get_ylabel() == "share of the true class"
    shown = ["ant", "b" * 23 + "…", "cat"]
    assert texts(axes.get_xticklabels()) == texts(axes.get_yticklabels()) == shown
    # (answered, true), the count, and a colour that stands out from the cell's
    assert [(*text.get_position(), text.get_text(), text.get_color()) for text in axes.texts] == [
        (0, 0, "3", "black"),
        (1, 0, "1", "white"),
        (1, 2, "4", "black"),
        (2, 2, "5", "black"),
    ]


@pytest.mark.parametrize(
    ("classes", "named", "numbered"), [(20, True, True), (21, True, False), (61, False, False)]
)
def test_many_classes_lose_their_counts_and_then_their_names(
    drawn: list[Any], classes: int, named: bool, numbered: bool
) -> None:
    names = [f"n{k}" for k in range(classes)]
    save_confusion(np.eye(classes, dtype=np.int64), np.ones(classes, np.int64), names, Path("x"))
    axes, _ = drawn[0].axes
    assert (texts(axes.get_xticklabels()) == names) == named
    assert (texts(axes.get_yticklabels()) == names) == named
    assert len(axes.texts) == (classes if numbered else 0)


def test_a_cell_of_several_classes_says_so(
    drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "MOST_CELLS", 2)
    save_confusion(CONFUSION, IMAGES, "abc", Path("x"))
    axes, bar = drawn[0].axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0], [0.4, 0.5]])
    # two cells of two classes each: the last class stands alone in its cell
    assert tuple(axes.images[0].get_extent()) == (-0.5, 3.5, 3.5, -0.5)
    assert bar.get_ylabel() == "largest share in 2 × 2 classes"


def test_many_classes_share_a_cell() -> None:
    shares = np.random.default_rng(0).random((2 * MOST_CELLS + 1,) * 2)
    cells, block = pool_cells(shares)
    assert (block, cells.shape) == (3, (167, 167))
    assert cells[0, 1] == shares[:3, 3:6].max()
    assert cells[-1, 5] == shares[498:, 15:18].max()
    same, block = pool_cells(shares[:MOST_CELLS, :MOST_CELLS])
    assert block == 1
    assert np.array_equal(same, shares[:MOST_CELLS, :MOST_CELLS])


def test_accuracy_by_layer_is_in_per_cent_and_marks_the_best(drawn: list[Any]) -> None:
    layers = ["block 1", "block 2", "o" * 30]
    curves = {"top-1": [0.2, 0.512, 0.4], "top-5": [0.5, 0.8, 0.9]}
    assert save_layers(layers, curves, "a title of $5", Path("x")) is None
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == ["top-1", "top-5"]
    for line, values in zip(axes.lines, curves.values(), strict=True):
        np.testing.assert_allclose(line.get_xydata(), list(enumerate(100 * np.array(values))))
    assert [(text.xy, text.get_text()) for text in axes.texts] == [
        ((1, pytest.approx(51.2)), "51.2 %"),
        ((2, pytest.approx(90)), "90.0 %"),
    ]
    assert texts(axes.get_xticklabels()) == ["block 1", "block 2", "o" * 23 + "…"]
    assert (axes.get_ylabel(), axes.get_title()) == ("accuracy, %", "a title of $5")
    assert texts(axes.get_legend().get_texts()) == ["top-1", "top-5"]
    save_layers(layers, {"top-1": [0.2, 0.5, 0.4]}, "x", Path("x"))
    assert drawn[1].axes[0].get_legend() is None


def a_picture(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("classes", [2, 300])
def test_pictures(classes: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    confusion = np.random.default_rng(1).integers(0, 3, (classes, classes))
    images = confusion.sum(1)
    # mathematics that matplotlib could not set, and more than fits
    names = [f"class $x_{k}^ of {{braces}} and more words" for k in range(classes)]
    for name in ("a.png", "b.png"):
        assert save_confusion(confusion, images, names, tmp_path / name) is None
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert "Software" not in picture.info
    pixels = a_picture(tmp_path / "a.png")
    height, width = pixels.shape[:2]
    assert 400 <= height <= 1800
    assert 400 <= width <= 1900
    assert pixels.mean(2).std() > 20
    # nothing is cut off: the outermost pixels are the paper
    border = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    assert all((edge == 255).all() for edge in border)


def test_a_line_by_layer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    layers = {"top-1": [0.2, 0.5, 0.4], "top-5": [0.5, 0.9, 0.8]}
    assert save_layers(["block 1", "block 2", "output"], layers, "x", tmp_path / "l.png") is None
    assert a_picture(tmp_path / "l.png").std() > 10


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_confusion(CONFUSION, IMAGES, "abc", path),
        lambda path: save_layers(["a"], {"x": [0.5]}, "x", path),
    ],
    ids=["confusion", "layers"],
)
def test_without_matplotlib_a_line_says_how_to_get_pictures(
    save: Callable[[Path], str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert save(tmp_path / "x.png") == "no picture: pip install 'simmim[plots]' draws one"
    assert not list(tmp_path.iterdir())


def test_pictures_touch_no_global_state(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = """
import sys
sys.path[:0] = sys.argv[2:]
import numpy as np, matplotlib
from pathlib import Path
from simmim.downstream.plots import save_confusion
before = matplotlib.rcParams.copy()  # unlike dict(), which looks for a window system
save_confusion(np.eye(2, dtype=np.int64), np.ones(2, dtype=np.int64), "ab", Path(sys.argv[1]))
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    arguments = [sys.executable, "-c", script, str(tmp_path / "a.png"), *filter(None, sys.path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
