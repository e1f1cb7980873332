"""The loader that a configuration asks for."""

from simmim.config.check import micro_batch
from simmim.config.sections import Config
from simmim.data.dali.backend import choose_backend
from simmim.data.dali.crops import DaliCrops
from simmim.data.dali.pipeline import DaliPipeline
from simmim.data.loader import Loader, default_workers
from simmim.data.producer import Producer
from simmim.data.source import Source
from simmim.data.views import View, crops_of
from simmim.distributed import World
from simmim.errors import DataError


def make_loader(config: Config, source: Source, world: World, view: View) -> Loader:
    """A loader over `source` for this process; see `simmim.data.loader.Loader`.

    DALI makes random crops alone: of any other view every array is made by the view itself.

    Args:
        config: of the run.
        source: images.
        world: this process.
        view: makes the arrays, see `simmim.method.method.Method.view`.

    Raises:
        DataError: DALI was asked for and is missing, cannot make the view, cannot work within its
            memory, or cannot build its pipeline.
    """
    data, batch = config.data, micro_batch(config, world.size)
    workers = default_workers(world) if data.workers < 0 else data.workers
    crops = crops_of(view)
    channels = data.channels if crops is None else crops.augmentation.channels
    backend, reason = choose_backend(data.backend, world.device, channels)
    if backend == "dali" and crops is None:
        if data.backend == "dali":
            raise DataError(
                f"data.backend=dali makes crops, and no {type(view).__name__} as "
                f"method.name={config.method.name} asks for: set --data.backend=cpu"
            )
        backend, reason = "cpu", f"DALI makes no {type(view).__name__}"
    producer: Producer | None = None
    if backend == "dali" and crops is not None:
        pipeline = DaliPipeline(
            source,
            crops.augmentation,
            crops.seed,
            device=world.device,
            micro_batch=crops.per_sample * batch,
            threads=max(1, workers),
            prefetch=data.prefetch,
            memory_bytes=data.dali_memory_mib * 2**20,
            max_pixels=crops.max_pixels,
            value_range=crops.value_range,
            timeout_s=data.timeout_s,
            report=lambda line: loader.report(line),
        )
        producer = pipeline if crops.per_sample == 1 else DaliCrops(pipeline, crops)
        try:
            pipeline.build()
        except DataError as error:
            if data.backend == "dali":
                raise DataError(f"data.backend=dali: {error}; use data.backend=cpu") from error
            producer, backend, reason = None, "cpu", str(error)
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
