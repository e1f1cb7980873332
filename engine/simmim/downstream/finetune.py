"""One fine-tuning run, from pre-trained weights to a classifier; readable top to bottom."""

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim import files
from simmim.backbone.build import Spec, build_encoder
from simmim.backbone.stochastic_depth import of_samples
from simmim.config.check import micro_batch
from simmim.config.finetune import FinetuneConfig
from simmim.config.spec import make_spec
from simmim.data.batch import Batch
from simmim.data.finetune_views import EvaluationView, TrainingView
from simmim.data.loader import Loader
from simmim.data.mixing import Mixing
from simmim.data.splits import LabelledImages, SettingNames, open_labelled_sets
from simmim.distributed import World
from simmim.downstream.evaluate import evaluate, evaluation_view
from simmim.downstream.handover import finetune_spec, hand_over
from simmim.downstream.metrics import ClassificationMetrics, write_report
from simmim.errors import ConfigError
from simmim.model.classifier import Classifier
from simmim.run_folder import RunFolder
from simmim.training import checkpoint
from simmim.training.build import build_state, check_backends, prepare_model, seed_initialisation
from simmim.training.claim import claimed_run
from simmim.training.interrupts import Interrupts
from simmim.training.log import RunLog
from simmim.training.loop import train, write_weights
from simmim.training.observer import PeriodicObserver
from simmim.training.optim import finetune_groups
from simmim.training.run import Run
from simmim.training.step import TrainState
from simmim.weights.load import Weights, read_model

SETTINGS = SettingNames(
    path="data.path",
    val_path="data.val_path",
    val_labels="data.val_labels",
    num_held_out="data.holdout",
    validation="data.val_path or data.holdout",
)


def finetune(config: FinetuneConfig) -> int:
    """Fine-tune as `config` says, resuming whatever its run folder holds.

    Returns:
        0 when the run is complete, 75 when a signal stopped it (run again to resume).

    Raises:
        ConfigError: the run folder or the pre-trained weights cannot be used.
        DataError: no data, or labels that do not fit.
        CheckpointError: a checkpoint could not be written or read.
        RunStopped: data fails under way, or too many steps in a row had non-finite gradients.
    """
    with claimed_run(config) as (world, folder, interrupts):
        return _run(config, world, folder, interrupts)


def _run(config: FinetuneConfig, world: World, folder: RunFolder, interrupts: Interrupts) -> int:
    try:
        images, val = _open_data(config)
        weights = _starting_weights(config, folder)
        model, notes = build_classifier(config, images.labels.classes, weights, world.device)
        view = _training_view(config, model)
        mixing = Mixing(len(model.classes), config.seed, config.augment)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    state = build_state(
        model,
        config,
        len(images.source.names),
        world,
        parameter_groups=lambda model: finetune_groups(
            model,
            config.optim.weight_decay,
            config.optim.layer_decay,
            decay_position_tables=config.optim.decay_position_tables,
        ),
        loss_of=ClassificationLoss(images.labels.values, mixing, world.device),
        ema_decay=config.train.ema_decay,
    )
    log = RunLog(
        folder,
        state.schedule.total_steps,
        is_main=world.is_main,
        tensorboard=config.log.tensorboard,
    )

    def begin(loader: Loader) -> Evaluations:
        if world.is_main:
            _note_start(folder, log, notes, view.note, images, val)
        return Evaluations(config, model, val, world)

    with closing(log):
        return train(
            state,
            images.source,
            lambda: _make_loader(config, images, view, world),
            begin,
            folder,
            log,
            interrupts,
        )


def _open_data(config: FinetuneConfig) -> tuple[LabelledImages, LabelledImages]:
    data = config.data
    return open_labelled_sets(
        data.path,
        seed=config.seed,
        val_path=data.val_path,
        num_held_out=data.holdout,
        fraction=data.fraction,
        labels=data.labels,
        val_labels=data.val_labels,
        classes=data.classes,
        first_number=data.first_number,
        names=SETTINGS,
    )


def _starting_weights(config: FinetuneConfig, folder: RunFolder) -> Weights | None:
    # a run that goes on needs the pre-trained weights no more: its checkpoint tells all
    if checkpoint.steps(folder.checkpoints):
        return read_model(folder.root)
    return read_model(config.pretrained) if config.pretrained else None


def build_classifier(
    config: FinetuneConfig,
    classes: tuple[str, ...],
    weights: Weights | None,
    device: torch.device,
) -> tuple[Classifier, list[str]]:
    """The configured classifier on `device`, with the weights handed over.

    What the weights do not provide is initialised from the run's seed.

    Returns:
        The model, and what became of every weight, in lines.

    Raises:
        ConfigError: parts that do not fit together.
        ValueError: the weights are of another architecture; names their file.
        RunError: `kernels` names a backend that cannot run here.
    """
    spec = classifier_spec(config, None if weights is None else weights.spec)
    check_backends(config.kernels, spec, device)
    seed_initialisation(config)
    metadata = {} if weights is None else weights.metadata
    model = Classifier(
        build_encoder(spec),
        classes,
        mean=config.data.mean or metadata.get("mean"),
        std=config.data.std or metadata.get("std"),
        margin=config.augment.margin,
    )
    lines = ["trained from scratch"] if weights is None else hand_over(weights, model).lines()
    return prepare_model(model, config, device), lines


def classifier_spec(config: FinetuneConfig, pretrained: Spec | None) -> Spec:
    """The architecture of the run's encoder: that of the weights but for what is configured."""
    size = config.data.image_size or (pretrained.image_size if pretrained is not None else 224)
    preset = None if config.model.name else pretrained
    pair = (size, size) if isinstance(size, int) else size
    spec = make_spec(config.model, pair, config.data.channels, preset)
    return finetune_spec(spec, pretrained)


def _training_view(config: FinetuneConfig, model: Classifier) -> TrainingView:
    return TrainingView(_view(config, model).pixels, config.seed, config.augment)


def _view(config: FinetuneConfig, model: Classifier) -> EvaluationView:
    limits = config.data.max_pixels, config.data.value_range
    return evaluation_view(model, max_pixels=limits[0], value_range=limits[1])


def _make_loader(
    config: FinetuneConfig, images: LabelledImages, view: TrainingView, world: World
) -> Loader:
    return Loader(
        images.source,
        view,
        seed=config.seed,
        micro_batch=micro_batch(config, world.size),
        accumulation_steps=config.train.accumulation_steps,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        world=world,
        timeout_s=config.data.timeout_s,
    )


class ClassificationLoss:
    """Fine-tuning's part of the step: cross-entropy of mixed images with their soft targets.

    Args:
        labels: class of every training image.
        mixing: of images and targets.
        device: where batches lie.
    """

    def __init__(self, labels: Any, mixing: Mixing, device: torch.device) -> None:
        self.labels, self.mixing = torch.from_numpy(labels).to(device), mixing

    @property
    def changes_on_host(self) -> str | None:
        """What a CUDA graph of the step could not follow; see `graphed_steps`."""
        return "mixup and CutMix are drawn by the host" if self.mixing.enabled else None

    def __call__(self, state: TrainState, batch: Batch, number: int) -> Tensor:
        """The mean over the images of a float32 micro-batch; see `TrainState`."""
        label = torch.where(batch.ids >= 0, self.labels[batch.ids.clamp(min=0)], -1)
        image, target = self.mixing(batch.image, label, state.step, state.world.rank, number)
        if state.config.channels_last_on(state.world.device.type):
            image = image.contiguous(memory_format=torch.channels_last)
        with of_samples(state.config.seed, batch.epochs, batch.ids):
            logits = state.wrapped(image)
        return soft_cross_entropy(logits, target)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in float32 with targets that are distributions, averaged over them.

    Args:
        logits: [B, K].
        target: [B, K]; rows of zeros (empty slots) count for nothing.
    """
    log_probability = torch.log_softmax(logits.float(), dim=1)
    return -(target * log_probability).sum() / target.sum().clamp(min=1.0)


class Evaluations(PeriodicObserver):
    """Classifies the validation images as the run goes on.

    Every evaluation is a row of evaluations.jsonl. The weights of the best (top-1, the earlier one
    of equals) are kept, with its accuracy by class and confusion matrix.

    Args:
        config: of the run.
        model: that trains.
        val: validation images.
        world: this process.
    """

    def __init__(
        self, config: FinetuneConfig, model: Classifier, val: LabelledImages, world: World
    ) -> None:
        super().__init__(config.evaluate.every_epochs, world)
        self.config, self.val, self.view = config, val, _view(config, model)
        self.notes: list[str] = []

    def records(self, run: Run) -> Path:
        """See `PeriodicObserver`."""
        return run.folder.evaluations

    def measure(self, run: Run) -> ClassificationMetrics:
        """Classify the validation images; see `evaluate`."""
        config, model = self.config, run.model
        assert isinstance(model, Classifier)
        return evaluate(
            model,
            self.val.source,
            self.val.labels,
            self.world,
            view=self.view,
            batch_size=config.evaluate.batch_size or micro_batch(config, self.world.size),
            workers=config.data.workers,
            precision=config.train.precision,
            timeout_s=config.data.timeout_s,
            report=run.log.warn,
        )

    def row(self, measurement: ClassificationMetrics) -> dict[str, Any]:
        """See `PeriodicObserver`."""
        return measurement.summary()

    def keep(self, run: Run, measurement: ClassificationMetrics, row: dict[str, Any]) -> None:
        """Keep the weights and the report where the row is the best so far."""
        if row["top1"] > max((r["top1"] for r in self.rows), default=-1.0):
            write_weights(run.state, run.folder.best_weights)
            classes = self.val.labels.classes
            self.notes = write_report(run.folder.best_report, measurement, classes)

    def tell(self, run: Run, measurement: ClassificationMetrics, row: dict[str, Any]) -> None:
        """Say how good the row is; of the first report, also what it leaves out."""
        best = self._best()
        run.log.info(
            f"step {row['step']}: top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}, loss "
            f"{row['loss']:.4f} on {row['images']:,} images; best {best['top1']:.2%} at step "
            f"{best['step']}"
        )
        for note in self.notes if len(self.rows) == 1 else ():
            run.log.info(note)

    def _best(self) -> dict[str, Any]:
        return max(self.rows, key=lambda row: float(row["top1"]))

    def finish(self, run: Run) -> None:
        """Say what the best is, and where."""
        if not self.world.is_main or not self.rows:
            return
        best = self._best()
        run.log.info(
            f"best top-1 {best['top1']:.2%} (top-5 {best['top5']:.2%}) at step {best['step']}: "
            f"weights in {run.folder.best_weights}, accuracy by class in {run.folder.best_report}"
        )


def _note_start(
    folder: RunFolder,
    log: RunLog,
    handover: list[str],
    note: str,
    images: LabelledImages,
    val: LabelledImages,
) -> None:
    classes = images.labels.classes
    log.info(
        f"{len(images.source.names):,} training images of {len(classes)} classes ({images.name}); "
        f"{len(val.source.names):,} to validate on ({val.name})"
    )
    if not folder.handover.exists():
        files.write_text(folder.handover, "\n".join(handover) + "\n")
        log.info(f"{handover[0]}; {folder.handover.name} has every key")
    if note:
        log.info(note)
