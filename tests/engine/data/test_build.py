"""Which decoder the loader of a configuration gets: the view says whether DALI can make it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from simmim.config.sections import Config, DataConfig, TrainConfig
from simmim.data import build
from simmim.data.augment import Augmentation
from simmim.data.build import make_loader
from simmim.data.dali import backend
from simmim.data.dali.crops import DaliCrops
from simmim.data.dali.pipeline import DaliPipeline
from simmim.data.loader import Loader
from simmim.data.open import open_source
from simmim.data.producer import InlineProducer
from simmim.data.views import CentreView, CroppedView, RandomCrops, TwoViews, View, crops_of
from simmim.distributed import World
from simmim.errors import DataError

AUGMENTATION = Augmentation((48, 64), (0.2, 0.3), (3 / 4, 4 / 3), 0.5, 3)
CPU = World(0, 1, torch.device("cpu"))

needs_dali = pytest.mark.skipif(bool(backend.missing_reason()), reason=backend.missing_reason())


class InvertedView(CroppedView):
    """The negatives of crops, which DALI does not make."""

    def fill(self, out: NDArray[Any], data: bytes, epoch: int, sample: int) -> None:
        super().fill(out, data, epoch, sample)
        np.subtract(255, out, out=out)


class MirroredView(CroppedView):
    """Crops of other pixels than those of the file."""

    def decoded(self, data: bytes) -> NDArray[np.uint8]:
        return super().decoded(data)[:, ::-1].copy()


class ThreeViews(CroppedView):
    """As plain as one crop or two."""

    crops_per_sample = 3


def config_of(photos: Path, wanted: Any) -> Config:
    data = DataConfig(path=str(photos), image_size=32, backend=wanted, workers=0)
    return Config(data=data, train=TrainConfig(batch_size=4))


def loader_of(photos: Path, wanted: str, view: View) -> Loader:
    return make_loader(config_of(photos, wanted), open_source(str(photos)), CPU, view)


@pytest.mark.parametrize("view", [InvertedView(AUGMENTATION, 4), MirroredView(AUGMENTATION, 4)])
def test_dali_is_not_given_what_a_view_makes_by_itself(
    view: CroppedView, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subclass of the plain crops is not taken for plain crops."""
    monkeypatch.setattr(build, "choose_backend", lambda *arguments: ("dali", "for a test"))
    name = type(view).__name__
    with pytest.raises(DataError, match=f"data.backend=dali makes crops, and no {name} as"):
        loader_of(photos, "dali", view)
    loader = loader_of(photos, "auto", view)
    assert loader.backend == f"cpu (DALI makes no {name})"
    assert isinstance(loader.producer, InlineProducer)
    ((batch,),) = loader.steps(0, 1)
    source, expected = open_source(str(photos)), np.empty(view.shape, np.uint8)
    for image, sample in zip(batch.image, batch.ids.tolist()):
        view.fill(expected, source.read(sample), 0, sample)
        np.testing.assert_array_equal(image, expected)


def test_views_say_which_crops_they_are(photos: Path) -> None:
    view = CroppedView(AUGMENTATION, 4, max_pixels=7, value_range=(0.0, 2.0))
    assert crops_of(view) == RandomCrops(AUGMENTATION, 4, 7, (0.0, 2.0))
    assert crops_of(TwoViews(AUGMENTATION, 4)) == RandomCrops(AUGMENTATION, 4, per_sample=2)
    assert crops_of(CentreView(config_of(photos, "cpu"))) is None
    assert crops_of(InvertedView(AUGMENTATION, 4)) is None


@needs_dali
def test_dali_draws_what_the_view_draws_not_what_the_configuration_says(photos: Path) -> None:
    view = CroppedView(AUGMENTATION, 11, max_pixels=2**20)
    pipeline = loader_of(photos, "dali", view).producer
    assert isinstance(pipeline, DaliPipeline)
    assert pipeline.preparation.crops == RandomCrops(AUGMENTATION, 11, 2**20)
    assert pipeline.micro_batch == 4
    four_channels = CroppedView(replace(AUGMENTATION, channels=4), 11)
    with pytest.raises(DataError, match="1 or 3 channels, not 4"):
        loader_of(photos, "dali", four_channels)


@needs_dali
@pytest.mark.parametrize(("kind", "count"), [(TwoViews, 2), (ThreeViews, 3)])
def test_dali_makes_as_many_crops_as_the_view(
    kind: type[CroppedView], count: int, photos: Path
) -> None:
    view = kind(AUGMENTATION, 4)
    loader = loader_of(photos, "dali", view)
    assert isinstance(loader.producer, DaliCrops)
    assert loader.producer.pipeline.micro_batch == 4 * count
    ((batch,),) = loader.steps(0, 1)
    assert batch.image.shape == (4, count, 48, 64, 3)
    source, expected = open_source(str(photos)), np.empty(view.shape, np.uint8)
    for image, sample in zip(batch.image.numpy().astype(np.int64), batch.ids.tolist()):
        view.fill(expected, source.read(sample), 0, sample)
        assert np.abs(image - expected).mean() < 1.0
