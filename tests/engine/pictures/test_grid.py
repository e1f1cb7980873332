"""Panels are joined: every image at its place, with its title and its caption."""

import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.pictures.grid import HEADER, MARGIN, save_picture, titled_grid


def plain(rows: int, columns: int, side: int, channels: int = 3) -> np.ndarray:
    """Panels of one value each: 10·row + 100·column + 5."""
    values = np.arange(rows)[:, None] * 10 + np.arange(columns) * 100 + 5
    shape = (rows, columns, side, side, channels)
    return np.broadcast_to(values[:, :, None, None, None], shape).astype(np.uint8)


@pytest.mark.parametrize(("side", "zoom"), [(160, 1), (81, 1), (80, 2), (32, 5), (400, 1)])
@pytest.mark.parametrize("captions", [False, True])
def test_every_panel_stands_at_its_place(side: int, zoom: int, captions: bool) -> None:
    below = [["a", "b"]] * 3 if captions else ()
    picture = np.asarray(titled_grid(plain(3, 2, side), ["one", "two"], below))
    shown, down = side * zoom, side * zoom + MARGIN + 14 * captions
    assert picture.shape == (HEADER + 3 * down + MARGIN, 2 * (shown + MARGIN) + MARGIN, 3)
    for row in range(3):
        for column in range(2):
            top, left = HEADER + row * down, MARGIN + column * (shown + MARGIN)
            panel = picture[top : top + shown, left : left + shown]
            assert (panel == 10 * row + 100 * column + 5).all()
            below_it = picture[top + shown : top + down, left : left + shown]
            assert (below_it < 128).any() == captions


def test_titles_and_captions_are_those_of_their_place() -> None:
    def drawn(titles: list[str], captions: list[list[str]]) -> np.ndarray:
        return np.asarray(titled_grid(plain(2, 2, 160), titles, captions)).min(axis=2) < 128

    none = drawn(["", ""], [["", ""], ["", ""]])
    step, down = 160 + MARGIN, 160 + MARGIN + 14
    for column in range(2):
        titles = ["", ""]
        titles[column] = "title"
        rows, columns = np.nonzero(drawn(titles, [["", ""], ["", ""]]) & ~none)
        assert rows.max() < HEADER
        assert set((columns - MARGIN) // step) == {column}
    for row in range(2):
        for column in range(2):
            captions = [["", ""], ["", ""]]
            captions[row][column] = "caption"
            rows, columns = np.nonzero(drawn(["", ""], captions) & ~none)
            assert set((rows - HEADER) // down) == {row}
            assert set((columns - MARGIN) // step) == {column}


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_the_first_channels_are_shown(channels: int) -> None:
    panels = np.arange(1, channels + 1, dtype=np.uint8) * np.ones((1, 1, 160, 160, 1), np.uint8)
    picture = np.asarray(titled_grid(panels, [""]))
    assert picture[100, 100].tolist() == ([1, 2, 3] if channels > 2 else [1, 1, 1])


def test_a_picture_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    save_picture(Image.new("RGB", (4, 4), "red"), path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def half(picture: Image.Image, target: object, **_: object) -> None:
        Path(str(target)).write_bytes(b"\x89PN")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space left"):
        save_picture(Image.new("RGB", (4, 4), "blue"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
