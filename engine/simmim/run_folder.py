"""The paths inside the folder of a run."""

from dataclasses import dataclass
from pathlib import Path

# The weights of a model, in any folder that holds one.
WEIGHTS_FILE = "model.safetensors"

# Plain values of a checkpoint, and the list of its files, without which it is not valid.
STATE_FILE = "state.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a training run, and the places in it.

    Attributes:
        root: the folder.
    """

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    @property
    def lock(self) -> Path:
        """The file that the training process locks."""
        return self.root / ".lock"

    @property
    def starts(self) -> Path:
        """What every start ran on: versions, devices, git commit (JSON)."""
        return self.root / "run.json"

    @property
    def config(self) -> Path:
        """The resolved configuration (TOML)."""
        return self.root / "config.toml"

    @property
    def log(self) -> Path:
        """Lines of the log, each with its time."""
        return self.root / "log.txt"

    @property
    def metrics(self) -> Path:
        """A row for every step (JSON lines)."""
        return self.root / "metrics.jsonl"

    @property
    def validations(self) -> Path:
        """A row for every validation of pre-training (JSON lines)."""
        return self.root / "validations.jsonl"

    @property
    def evaluations(self) -> Path:
        """A row for every evaluation of fine-tuning (JSON lines)."""
        return self.root / "evaluations.jsonl"

    @property
    def records(self) -> tuple[Path, ...]:
        """The files whose rows each belong to a step."""
        return (self.metrics, self.validations, self.evaluations)

    @property
    def tensorboard(self) -> Path:
        """Events of TensorBoard."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, each of them a folder."""
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        """The weights of a run that is complete."""
        return self.root / WEIGHTS_FILE

    @property
    def best_weights(self) -> Path:
        """The weights of the best evaluation of fine-tuning."""
        return self.root / "best.safetensors"

    @property
    def best_report(self) -> Path:
        """Accuracy by class and confusion matrix of the best evaluation of fine-tuning."""
        return self.root / "best"

    @property
    def handover(self) -> Path:
        """What fine-tuning did with every pre-trained weight."""
        return self.root / "handover.txt"

    @property
    def pictures(self) -> Path:
        """Pictures of training images."""
        return self.root / "pictures"

    @property
    def validation_pictures(self) -> Path:
        """Pictures of held-out images."""
        return self.root / "validation"

    @property
    def is_claimed(self) -> bool:
        """Whether a run began here, even if it did not reach its first step."""
        return self.lock.exists() or self.starts.exists()

    @property
    def is_started(self) -> bool:
        """Whether a run began its steps here."""
        return self.lock.exists() and self.starts.exists()
