"""The loader that a configuration asks for."""

from simmim.config.check import micro_batch
from simmim.config.sections import Config
from simmim.data.augment import Augmentation
from simmim.data.dali.backend import choose_backend
from simmim.data.dali.pipeline import DaliPipeline
from simmim.data.dali.two_views import DaliTwoViews
from simmim.data.loader import Loader, default_workers
from simmim.data.producer import Producer
from simmim.data.source import Source
from simmim.data.views import VIEWS, CroppedView, TwoViews, View
from simmim.distributed import World
from simmim.errors import DataError


def make_loader(config: Config, source: Source, world: World, view: View | None = None) -> Loader:
    """A loader over `source` for this process; see `simmim.data.loader.Loader`.

    Args:
        config: of the run.
        source: images.
        world: this process.
        view: makes the arrays, see `simmim.method.method.Method.view`; None takes random crops.

    Raises:
        DataError: DALI was asked for and is missing, or cannot work within its memory.
    """
    data, batch = config.data, micro_batch(config, world.size)
    workers = default_workers(world) if data.workers < 0 else data.workers
    augmentation = Augmentation(
        config.image_size, data.crop_scale, data.crop_ratio, data.flip, data.channels
    )
    view = view or CroppedView(
        augmentation, config.seed, max_pixels=data.max_pixels, value_range=data.value_range
    )
    producer: Producer | None = None
    backend, reason = choose_backend(data.backend, world.device, data.channels)
    if backend == "dali" and not isinstance(view, CroppedView):
        if data.backend == "dali":
            raise DataError(
                f"data.backend=dali makes crops, and no {type(view).__name__} as "
                f"method.name={config.method.name} asks for: set --data.backend=cpu"
            )
        backend, reason = "cpu", f"DALI makes no {type(view).__name__}"
    if backend == "dali":
        two = isinstance(view, TwoViews)
        pipeline = DaliPipeline(
            source,
            augmentation,
            config.seed,
            device=world.device,
            micro_batch=VIEWS * batch if two else batch,
            threads=max(1, workers),
            prefetch=data.prefetch,
            memory_bytes=data.dali_memory_mib * 2**20,
            max_pixels=data.max_pixels,
            value_range=data.value_range,
            timeout_s=data.timeout_s,
            report=lambda line: loader.report(line),
        )
        producer = DaliTwoViews(pipeline) if two else pipeline
    loader = Loader(
        source,
        view,
        seed=config.seed,
        micro_batch=batch,
        accumulation_steps=config.train.accumulation_steps,
        workers=workers,
        prefetch=data.prefetch,
        world=world,
        timeout_s=data.timeout_s,
        producer=producer,
    )
    loader.backend = f"{backend} ({reason})"
    return loader
