"""Evaluates a classifier on labelled images."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from simmim.data.decode import MAX_PIXELS
from simmim.data.finetune_views import EvaluationView, Pixels
from simmim.data.labels import Labels, match_classes
from simmim.data.one_pass import one_pass
from simmim.data.source import Source
from simmim.data.unreadable import UnreadableImages
from simmim.distributed import World
from simmim.downstream.metrics import ClassificationMetrics, label_tensor
from simmim.errors import DataError
from simmim.model.classifier import Classifier, numbered_classes
from simmim.model.image_model import ImageModel, evaluation_mode
from simmim.model.weights_file import best_weights
from simmim.training import precision as compute
from simmim.weights.load import load_model


def evaluation_view(
    model: ImageModel,
    *,
    margin: float | None = None,
    max_pixels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> EvaluationView:
    """How images become a model's inputs: at its size, with its statistics, without augmentation.

    Args:
        model: gives size and statistics; a classifier also gives the margin if `margin` is None.
        margin: see `EvaluationView`.
        max_pixels: larger images are refused; None takes the default.
        value_range: see `simmim.data.decode.decode`.
    """
    pixels = Pixels(
        model.encoder.spec.image_size,
        model.mean.tolist(),
        model.std.tolist(),
        max_pixels=max_pixels or MAX_PIXELS,
        value_range=value_range,
    )
    if margin is None and isinstance(model, Classifier):
        margin = model.margin
    return EvaluationView(pixels, margin)


@torch.no_grad()
def evaluate(
    model: Classifier,
    source: Source,
    labels: Labels,
    world: World,
    *,
    batch_size: int,
    view: EvaluationView | None = None,
    workers: int = -1,
    precision: str = "float32",
    timeout_s: float = 120,
    report: Callable[[str], None] = print,
    advance: Callable[[int], None] | None = None,
) -> ClassificationMetrics:
    """Classify every labelled image of a source once; processes share the images.

    Args:
        model: lies on the world's device; its mode stays as it was.
        source: images.
        labels: their classes, matched to the model's by name; images with -1 are skipped.
        world: this process.
        batch_size: images per device.
        view: makes the model's inputs; None takes `evaluation_view`.
        workers: decoding processes; 0 decodes here; -1 chooses.
        precision: compute type.
        timeout_s: see `one_pass`.
        report: called with a line about images that cannot be read, or a replaced process.
        advance: called with the number of images of each batch of this process.

    Returns:
        Counts over all processes, the same in each. Images that cannot be read are not counted.

    Raises:
        DataError: the model lacks some of the classes, no image has a label, or none can be read.
    """
    matched = match_to_model(labels, model)
    labelled = np.flatnonzero(matched.values >= 0)
    if not len(labelled):
        raise DataError("none of the images has a label: there is nothing to evaluate")
    metrics = ClassificationMetrics(len(model.classes), world.device)
    numbers = label_tensor(matched, world.device)
    unreadable = UnreadableImages(source, world)
    batches = one_pass(
        source,
        view or evaluation_view(model),
        world,
        batch_size=batch_size,
        workers=workers,
        samples=labelled,
        timeout_s=timeout_s,
        report=report,
        note_problem=unreadable.note,
    )
    with evaluation_mode(model), closing(batches):
        for batch in batches:
            label = torch.where(batch.ids >= 0, numbers[batch.ids.clamp(min=0)], -1)
            with compute.autocast(world.device, precision):
                logits = model(batch.image)
            metrics.add(logits, label)
            if advance is not None:
                advance(len(batch.ids))
    metrics.merge(world)
    problems = unreadable.agree()
    if len(problems) == len(labelled):
        raise DataError(
            f"none of the {len(labelled)} labelled images could be read "
            f"({unreadable.describe(problems[0])})"
        )
    unreadable.report(problems, report, "unreadable, not counted", len(labelled))
    return metrics


def match_to_model(labels: Labels, model: Classifier) -> Labels:
    """The same labels, numbered as the model's classes; these may include classes without images.

    If the model's classes are only numbers while the labels have names, the k-th name is taken as
    class k, but only if there are as many of both.

    Raises:
        DataError: the model lacks some of the classes; names them.
    """
    if labels.classes == model.classes:
        return labels
    only_numbers = model.classes == numbered_classes(len(model.classes))
    named = not any(name.isdecimal() for name in labels.classes)
    return match_classes(
        labels,
        model.classes,
        subset=not (only_numbers and named),
        names=("this set", "the model"),
    )


def load_classifier(path: str | Path) -> Classifier:
    """The classifier of a checkpoint, in evaluation mode on the CPU.

    Args:
        path: as for `load_model`; the folder of a fine-tuning run means its best weights.

    Raises:
        ValueError: it cannot be read, or has no class head; says what makes one.
    """
    model = load_model(best_weights(path))
    if isinstance(model, Classifier):
        return model
    raise ValueError(
        f"{path}: a pre-trained model without a class head; `simmim finetune` makes a classifier "
        "of it"
    )
