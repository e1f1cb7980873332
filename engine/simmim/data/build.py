"""The loader that a configuration asks for."""

from simmim.config import Config, micro_batch
from simmim.data.augment import Augmentation
from simmim.data.loader import Loader
from simmim.data.source import Source
from simmim.distributed import World


def make_loader(config: Config, source: Source, world: World) -> Loader:
    """A loader over `source` for this process; see `simmim.data.loader.Loader`."""
    data = config.data
    augmentation = Augmentation(
        config.image_size, data.crop_scale, data.crop_ratio, data.flip, data.channels
    )
    return Loader(
        source,
        augmentation,
        seed=config.seed,
        micro_batch=micro_batch(config, world.size),
        accumulation_steps=config.train.accumulation_steps,
        workers=data.workers,
        prefetch=data.prefetch,
        world=world,
        timeout_s=data.timeout_s,
        max_pixels=data.max_pixels,
        value_range=data.value_range,
    )
