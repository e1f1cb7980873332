"""Pictures of a run as it goes on: the same images, drawn again and again."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from simmim import precision
from simmim.config import Config
from simmim.distributed import World
from simmim.method.images import ImageModel
from simmim.observer import Observer
from simmim.reconstruct import save_picture

if TYPE_CHECKING:
    from simmim.loop import Loop


class Pictures(Observer):
    """Draws a picture with every checkpoint, or as `log.picture_every_steps` says.

    Args:
        config: of the run.
        world: this process; the main one draws.
        draw: the picture of the model as it is; None where there is nothing to draw.
    """

    def __init__(
        self, config: Config, world: World, draw: Callable[[ImageModel], Image.Image | None]
    ) -> None:
        self.config, self.world, self.draw = config, world, draw

    def observe(self, loop: "Loop", *, last: bool, stopping: bool) -> None:
        """Draw where a picture is due."""
        if not self.world.is_main or not self._is_due(loop, last):
            return
        with precision.autocast(self.world.device, self.config.train.precision):
            picture = self.draw(loop.state.model)
        if picture is not None:
            path = loop.folder / "pictures" / f"step_{loop.state.step:08d}.png"
            try:
                save_picture(picture, path)
            except OSError as error:
                loop.log.warn(f"{path}: could not be written: {error.strerror}")
            loop.log.picture(np.asarray(picture), loop.state.step)
        loop.restart_clock()

    def _is_due(self, loop: "Loop", last: bool) -> bool:
        every = self.config.log.picture_every_steps
        if every < 0:
            return False
        if every == 0:
            return loop.state.step == loop.saved_step
        return last or loop.state.step % every == 0

    def finish(self, loop: "Loop") -> None:
        """Say where the pictures are."""
        pictures = loop.folder / "pictures"
        if self.world.is_main and pictures.is_dir():
            loop.log.info(f"pictures in {pictures}")
