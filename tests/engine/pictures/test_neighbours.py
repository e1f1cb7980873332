"""Pictures of views and neighbours: which views are shown, and which images are near."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pictured import Squares, value_of
from simmim.config.sections import Config
from simmim.pictures import neighbours
from simmim.pictures.neighbours import ViewPictures
from simmim_kernels.splitmix import fold, permutation

Configured = Callable[..., Config]


class NumberedView:
    """Two views of an image: its epoch and its sample as values."""

    dtype, shape = "uint8", (2, 16, 16, 3)

    def fill(self, out: np.ndarray, data: bytes, epoch: int, sample: int) -> None:
        assert np.load(io.BytesIO(data)).max() == value_of(sample)
        out[0], out[1] = epoch, sample


class Angles(nn.Module):
    """Encodes an image as a direction: its value is the angle in degrees, and its length grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.batches: list[int] = []

    def encode(self, image: Tensor) -> Tensor:
        assert not self.training
        assert image.dtype == torch.uint8
        self.batches.append(len(image))
        angle = torch.deg2rad(image[:, 0, 0, 0].float())
        length = image[:, 0, 0, 0].float() + 1
        direction = torch.stack([angle.cos(), angle.sin()], 1) * length[:, None]
        return direction[:, :, None, None].expand(-1, -1, 2, 2)


class Noted:
    """Distorts nothing, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, views: Tensor, ids: Tensor, epochs: Tensor) -> Sequence[Tensor]:
        self.given.append((views, ids, epochs))
        return [view.permute(0, 3, 1, 2) for view in views.unbind(1)]


@pytest.fixture
def drawn(configured: Configured, squares: Squares) -> tuple[ViewPictures, Noted]:
    noted = Noted()
    config = configured(seed=4, pictures=3)
    return ViewPictures(squares, config, NumberedView(), noted), noted


def test_views_are_those_of_epoch_0_of_the_samples_shown(
    drawn: tuple[ViewPictures, Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, noted = drawn
    grids: list[tuple[Any, ...]] = []
    monkeypatch.setattr(neighbours, "titled_grid", lambda *arguments: grids.append(arguments))
    pictures.draw(Angles())  # type: ignore[arg-type]
    [(views, ids, epochs)] = noted.given
    wanted = permutation(fold(4), 40)[:3].tolist()
    assert ids.tolist() == wanted
    assert epochs.tolist() == [0, 0, 0]
    assert views[:, 0].unique().tolist() == [0]
    assert views[:, 1, 0, 0, 0].tolist() == wanted
    [(panels, titles, captions)] = grids
    assert titles == ["image", "view 1", "view 2", "nearest", "next"]
    assert panels.shape == (3, 5, 16, 16, 3)
    for row, sample in enumerate(wanted):
        assert (panels[row, 0] == value_of(sample)).all()
        assert (panels[row, 2] == sample).all()
        # the values 5 below and above are the nearest, 40 images make one circle's half
        differences = np.abs(panels[row, 3:, 0, 0, 0].astype(int) - value_of(sample))
        assert differences.tolist() in ([5, 5], [5, 10])
        cosines = [f"cosine {np.cos(np.deg2rad(float(d))):.2f}" for d in differences]
        assert captions[row] == ["", "", "", *cosines]


def test_every_image_of_the_pool_is_encoded_in_evaluation_mode(
    drawn: tuple[ViewPictures, Noted],
) -> None:
    pictures, _ = drawn
    model = Angles().train()
    pictures._neighbours(model)  # type: ignore[arg-type]
    assert model.batches == [8, 8, 8, 8, 8]
    assert model.training


def test_the_pool_is_bounded(configured: Configured) -> None:
    source = Squares(200)
    source.read = lambda index: Squares(1).read(0)  # type: ignore[method-assign]
    view = NumberedView()
    view.fill = lambda *_: None  # type: ignore[method-assign]
    pictures = ViewPictures(source, configured(pictures=3), view, Noted())
    assert (len(pictures.views), len(pictures.whole)) == (3, 3 + neighbours.POOL)


def test_few_images_have_fewer_neighbours_and_none_no_picture(configured: Configured) -> None:
    for count, columns in ((2, 1), (1, 0)):
        pictures = ViewPictures(Squares(count), configured(), NumberedView(), Noted())
        near, _ = pictures._neighbours(Angles())  # type: ignore[arg-type]
        assert near.shape == (count, columns)
    source = Squares(2)
    source.broken = {0, 1}
    empty = ViewPictures(source, configured(), NumberedView(), Noted())
    assert empty.draw(Angles()) is None  # type: ignore[arg-type]
