"""The configuration of validation during pre-training."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Validation on images that are held out of training."""

    path: str = ""
    """Held-out images, as data.path; unset does not validate."""
    every_epochs: float = 1
    """Epochs between validations; the end of the run has one in any case."""
    batch_size: int = 0
    """Images per device; 0 takes as many as in training."""
    pictures: int = 6
    """Held-out images whose reconstructions are drawn; 0 draws none."""
