"""Mixup and CutMix of batches, and draws that are functions of a key."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from simmim.config.finetune import AugmentConfig
from simmim.data.timm_import import import_timm
from simmim_kernels.splitmix import fold

# Keeps the draws of mixing apart from other uses of the same seed.
MIX_STREAM = 0x6D697875  # "mixu"


class Mixing:
    """Mixup and CutMix of a batch through timm, and its soft targets.

    Args:
        num_classes: K.
        seed: of the run.
        augment: how batches are mixed, and the label smoothing; None is the published recipe.

    Raises:
        RunError: timm is missing, and mixup or CutMix is on.
    """

    def __init__(self, num_classes: int, seed: int, augment: AugmentConfig | None = None) -> None:
        augment = augment or AugmentConfig()
        self.num_classes, self.seed, self.smoothing = num_classes, seed, augment.smoothing
        self.enabled = augment.mixup > 0 or augment.cutmix > 0
        if self.enabled:
            self._mix = import_timm("timm.data").Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_probability,
                switch_prob=augment.mix_switch,
                mode="batch",
                label_smoothing=augment.smoothing,
                num_classes=num_classes,
            )

    def __call__(
        self, image: Tensor, label: Tensor, step: int, rank: int, micro_batch: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Mix every image with the one that is as far from the batch's other end.

        An empty slot (label -1) takes the image and label of its partner; where both are empty,
        the targets are zero. The result is a pure function of (seed, step, rank, micro_batch).

        Args:
            image: float [B, C, H, W], any device; changed in place. B even where mixing is on.
            label: int64 [B], same device; -1 in empty slots.
            step: of the run.
            rank: of this process.
            micro_batch: number within the step.

        Returns:
            image, and targets float32 [B, K], which sum to 1.

        Raises:
            ValueError: B is odd.
        """
        if not self.enabled:
            off = self.smoothing / self.num_classes
            target = torch.full((len(label), self.num_classes), off, device=label.device)
            target.scatter_(1, label.clamp(min=0)[:, None], 1.0 - self.smoothing + off)
            return image, target * (label >= 0)[:, None]
        if len(image) % 2:
            raise ValueError(f"{len(image)} images cannot be mixed in pairs; choose an even number")
        alone = label < 0
        image.copy_(torch.where(alone[:, None, None, None], image.flip(0), image))
        label = torch.where(alone, label.flip(0), label)
        with draws_from(fold(MIX_STREAM, self.seed, step, rank, micro_batch)):
            image, target = self._mix(image, label.clamp(min=0))
        return image, target * (label >= 0)[:, None]


@contextmanager
def draws_from(key: int) -> Iterator[None]:
    """Set the CPU generators of Python, NumPy and torch from a 64-bit key; put them back after."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    # torch.manual_seed would also set those of every GPU
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
