"""One pass over images in their order, shared among processes: what is measured and exported."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch

from simmim.data.batch import Batch
from simmim.data.loader import default_workers
from simmim.data.producer import InlineProducer, Producer, SourceSamples
from simmim.data.source import Source
from simmim.data.views import View
from simmim.data.workers import WorkerPool
from simmim.distributed import World


def one_pass(
    source: Source,
    view: View,
    world: World,
    *,
    batch_size: int,
    workers: int = -1,
    samples: Sequence[int] | np.ndarray | None = None,
    timeout_s: float = 120,
    report: Callable[[str], None] = print,
    note_problem: Callable[[int, str], None] | None = None,
) -> Generator[Batch, None, None]:
    """Every sample once, in order; this process takes every `world.size`-th of them.

    Args:
        source: images.
        view: makes the arrays, such as `EvaluationView`.
        world: this process, and where the batches go.
        batch_size: images per batch and process; the last batch is what is left.
        workers: decoding processes; 0 decodes here; -1 chooses.
        samples: which images, in this order; None takes all.
        timeout_s: seconds after which a process that is still at one image is replaced.
        report: told, in a line, of processes that had to be replaced.
        note_problem: told (sample, reason) of every image that cannot be read; its slot is zeros
            and has id -1.

    Yields:
        `Batch` with `image` [B, *view.shape] in the view's dtype.
    """
    mine = np.arange(len(source.names)) if samples is None else np.asarray(samples, dtype=np.int64)
    mine = mine[world.rank :: world.size]
    workers = default_workers(world) if workers < 0 else workers
    arrays = SourceSamples(source, view)
    producer: Producer = InlineProducer(arrays)
    if workers:
        producer = WorkerPool(
            arrays,
            min(batch_size, max(1, len(mine))),
            workers=workers,
            prefetch=2,
            timeout_s=timeout_s,
            report=report,
        )

    def places() -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(mine), batch_size):
            yield [(0, sample) for sample in mine[start : start + batch_size].tolist()]

    # whatever ends the loop: processes must be gone before the interpreter waits for them
    with closing(producer.batches(places())) as filled:
        for asked, made in zip(places(), filled):
            ids = torch.tensor([sample for _, sample in asked])
            for slot, reason in made.problems:
                if note_problem is not None:
                    note_problem(int(ids[slot]), reason)
                ids[slot] = -1
            # a copy: the producer goes on to write where the image lies
            image = made.image.to(world.device, copy=True)
            ids = ids.to(world.device)
            yield Batch(image, ids, torch.zeros_like(ids), len(asked) - len(made.problems))
