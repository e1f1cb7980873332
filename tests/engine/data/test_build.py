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
from simmim.data.dali import backend, pipeline
from simmim.data.dali.crops import DaliCrops
from simmim.data.dali.pipeline import DaliPipeline
from simmim.data.loader import Loader
from simmim.data.open import open_source
from simmim.data.producer import InlineProducer
from simmim.data.views import CentreView, CroppedView, RandomCrops, TwoViews, View, crops_of
from simmim.data.workers import WorkerPool
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


def test_what_is_configured_arrives_at_the_loader(photos: Path) -> None:
    data = DataConfig(
        path=str(photos), image_size=32, backend="cpu", workers=3, prefetch=5, timeout_s=33
    )
    config = Config(data=data, train=TrainConfig(batch_size=24, accumulation_steps=3), seed=9)
    source, world = open_source(str(photos)), World(1, 2, torch.device("cpu"))
    view = CroppedView(AUGMENTATION, 9)
    loader = make_loader(config, source, world, view)
    assert loader.source is source
    assert loader.world is world
    assert loader.order.seed == 9
    assert (loader.micro_batch, loader.accumulation_steps) == (4, 3)
    assert loader.backend.startswith("cpu (")
    workers = loader.producer
    assert isinstance(workers, WorkerPool)
    assert (workers.micro_batch, workers.workers, workers.prefetch) == (4, 3, 5)
    assert workers.timeout_s == 33
    assert getattr(workers.samples, "view", None) is view
    data = replace(data, workers=-1)
    chosen = make_loader(replace(config, data=data), source, world, view).workers
    assert chosen == build.default_workers(world)


@pytest.mark.parametrize(("per_sample", "threads"), [(1, 3), (2, 1)])
def test_what_is_configured_arrives_at_dali(
    per_sample: int, threads: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    class Pipeline:
        def __init__(self, *arguments: object, **named: object) -> None:
            told.update(named, arguments=arguments)

        def build(self) -> None:
            told["built"] = True

    monkeypatch.setattr(build, "choose_backend", lambda *arguments: ("dali", "for a test"))
    monkeypatch.setattr(build, "DaliPipeline", Pipeline)
    data = DataConfig(
        path=str(photos),
        workers=0 if threads == 1 else threads,
        prefetch=5,
        timeout_s=33,
        dali_memory_mib=7,
    )
    config = Config(data=data, train=TrainConfig(batch_size=24, accumulation_steps=3), seed=9)
    kind = TwoViews if per_sample == 2 else CroppedView
    view = kind(AUGMENTATION, 11, max_pixels=99, value_range=(1.0, 2.0))
    source, world = open_source(str(photos)), World(1, 2, torch.device("cpu"))
    loader = make_loader(config, source, world, view)
    assert isinstance(loader.producer, DaliCrops if per_sample == 2 else Pipeline)
    assert loader.backend == "dali (for a test)"
    lines: list[str] = []
    loader.report = lines.append
    told.pop("report")("a line")
    assert lines == ["a line"]
    assert told == {
        "arguments": (source, AUGMENTATION, 11),
        "device": world.device,
        "micro_batch": 4 * per_sample,
        "threads": threads,
        "prefetch": 5,
        "memory_bytes": 7 * 2**20,
        "max_pixels": 99,
        "value_range": (1.0, 2.0),
        "timeout_s": 33,
        "built": True,
    }


@pytest.mark.parametrize("chosen", ["auto", "dali"])
def test_dali_that_cannot_build_its_pipeline_is_told(
    chosen: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_pipeline(decoder: object) -> None:
        raise RuntimeError("CUDA runtime API error (36):\nthe driver is too old, error code 36\n")

    monkeypatch.setattr(build, "choose_backend", lambda *arguments: ("dali", "for a test"))
    monkeypatch.setattr(pipeline, "choose_backend", lambda *arguments: ("dali", "for a test"))
    monkeypatch.setattr(pipeline.Decoder, "_build", build_pipeline)
    view = CroppedView(AUGMENTATION, 11)
    why = "DALI cannot build its pipeline on cpu: the driver is too old, error code 36"
    if chosen == "dali":
        with pytest.raises(DataError) as raised:
            loader_of(photos, chosen, view)
        assert str(raised.value) == f"data.backend=dali: {why}; use data.backend=cpu"
        return
    loader = loader_of(photos, chosen, view)
    assert loader.backend == f"cpu ({why})"
    assert next(loader.steps(0, 1))[0].image.any()


def test_the_decoder_is_chosen_for_the_channels_of_the_view(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def choose(*arguments: object) -> tuple[str, str]:
        asked.append(arguments)
        return "cpu", "for a test"

    monkeypatch.setattr(build, "choose_backend", choose)
    loader_of(photos, "auto", CroppedView(replace(AUGMENTATION, channels=1), 4))
    loader_of(photos, "cpu", CentreView(config_of(photos, "cpu")))  # the configuration's 3
    assert asked == [("auto", CPU.device, 1), ("cpu", CPU.device, 3)]


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
