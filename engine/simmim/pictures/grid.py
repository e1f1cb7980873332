"""Joins panels of pixels into one picture, and writes a picture to a file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from simmim.files import write_atomic

MARGIN = 6


HEADER = 18


def titled_grid(
    panels: NDArray[np.uint8], titles: Sequence[str], captions: Sequence[Sequence[str]] = ()
) -> Image.Image:
    """Join panels uint8 [B, columns, H, W, C]: one row for each image, one title for each column.

    Args:
        panels: pixels of 1, 3 or more channels; the first three are shown.
        titles: one for each column.
        captions: for every row, one text below each panel; () draws none.
    """
    B, num_columns, H, W, C = panels.shape
    if C < 3:
        panels = np.repeat(panels[..., :1], 3, axis=-1)
    # small images are enlarged in whole steps, so that a picture of 32 px images can be seen
    zoom = max(1, 160 // max(H, W))
    panels = panels[..., :3].repeat(zoom, axis=2).repeat(zoom, axis=3)
    step_down = H * zoom + MARGIN + (14 if captions else 0)
    step_right = W * zoom + MARGIN
    size = (num_columns * step_right + MARGIN, HEADER + B * step_down + MARGIN)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        left = MARGIN + column * step_right
        pen.text((left, 3), title, fill="black")
        for row in range(B):
            top = HEADER + row * step_down
            canvas.paste(Image.fromarray(panels[row, column]), (left, top))
            if captions:
                text = captions[row][column][: (W * zoom) // 6]
                pen.text((left, top + H * zoom + 1), text, fill="black")
    return canvas


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG completely or not at all."""
    write_atomic(path, lambda temporary: picture.save(temporary, format="PNG"))
