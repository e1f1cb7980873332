"""A classifier's answers to labelled images, counted."""

from collections.abc import Callable

import torch

from simmim import precision as compute
from simmim.data.labelled import EvaluationView, Pixels
from simmim.data.labels import Labels
from simmim.data.one_pass import one_pass
from simmim.data.source import Source
from simmim.distributed import World, gather_objects
from simmim.downstream.metrics import ClassificationMetrics, label_tensor
from simmim.method.classifier import Classifier
from simmim.method.images import ImageModel


def evaluation_view(
    model: ImageModel,
    *,
    margin: float | None = None,
    max_pixels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> EvaluationView:
    """The view that a model looks at images with: its size and statistics, nothing drawn.

    Args:
        model: a classifier's own margin is taken where `margin` is None.
        margin: see `EvaluationView`.
        max_pixels: larger images are refused; None takes the default.
        value_range: see `simmim.data.decode.decode`.
    """
    limits = {} if max_pixels is None else {"max_pixels": max_pixels}
    pixels = Pixels(
        model.encoder.spec.image_size,
        model.mean.tolist(),
        model.std.tolist(),
        value_range=value_range,
        **limits,
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
    """Classify every labelled image once, shared among processes.

    Args:
        model: on the world's device; left in the mode it was in.
        source: images.
        labels: their classes, numbered as the model's; images with -1 are skipped.
        world: this process.
        batch_size: images per device.
        view: makes the model's inputs; None takes `evaluation_view`.
        workers: decoding processes; 0 decodes here; -1 chooses.
        precision: compute type.
        timeout_s: see `one_pass`.
        report: told, in a line, of images that cannot be read and of replaced processes.
        advance: told how many images each batch had.

    Returns:
        Counts over all processes, in each of them. Images that cannot be read are not counted.

    Raises:
        DataError: all images cannot be read.
    """
    labelled = (labels.values >= 0).nonzero()[0]
    metrics = ClassificationMetrics(len(model.classes), world.device)
    numbers = label_tensor(labels, world.device)
    unreadable: list[tuple[str, str]] = []
    training = model.training
    model.eval()
    try:
        batches = one_pass(
            source,
            view or evaluation_view(model),
            world,
            batch_size=batch_size,
            workers=workers,
            samples=labelled,
            timeout_s=timeout_s,
            report=report,
            note_problem=lambda sample, why: unreadable.append((source.names[sample], why)),
        )
        for batch in batches:
            label = torch.where(batch.ids >= 0, numbers[batch.ids.clamp(min=0)], -1)
            with compute.autocast(world.device, precision):
                logits = model(batch.image)
            metrics.add(logits, label)
            if advance is not None:
                advance(len(batch.ids))
    finally:
        model.train(training)
    metrics.merge(world)
    found = [pair for pairs in gather_objects(unreadable, world) for pair in pairs]
    if world.is_main:
        _name_unreadable(found, report)
    return metrics


def _name_unreadable(found: list[tuple[str, str]], report: Callable[[str], None]) -> None:
    for name, why in found[:5]:
        report(f"unreadable, not counted: {name}: {why}")
    if len(found) > 5:
        report(f"unreadable, not counted: {len(found) - 5} more")
