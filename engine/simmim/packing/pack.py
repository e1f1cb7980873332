"""Packs images into tar shards of downscaled JPEGs, with the indices to read them.

Shard i holds the images [i·n, (i+1)·n) of the plan, less what was skipped, so every shard is a
pure function of the source and the options: any number of processes makes the same bytes, and a
pack that was killed goes on where it stopped. A shard counts as done once its index is there, and
the index is renamed last.
"""

import fcntl
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from simmim.data.labels import Labels
from simmim.data.source import Source
from simmim.errors import DataError, RunError
from simmim.packing.dataset_file import write_dataset
from simmim.packing.options import Options
from simmim.packing.plan import TEMPORARY, Plan, Summary, is_done
from simmim.packing.tasks import Tasks


def pack(
    source: Source,
    folder: Path,
    options: Options,
    labels: Labels | None = None,
    *,
    workers: int = 1,
    tick: Callable[[int, int, int], None] = lambda done, skipped, resumed: None,
) -> Summary:
    """Pack a source into `folder`, or go on where an earlier call was stopped.

    Args:
        source: images.
        folder: new, empty, or an earlier pack of the same source with the same options.
        options: see there.
        labels: of the source's images.
        workers: processes; the result does not depend on it.
        tick: called now and then with the images packed and skipped by this call, and those of
            the shards that were there before.

    Raises:
        DataError: `folder` holds something else, or no image could be packed.
        RunError: `folder` cannot be written, a process died, or the source's disk is gone.
    """
    plan = Plan(source, options, labels)
    try:
        with claimed(folder) as lock:
            dataset = plan.begin(folder)
            try:
                todo = [n for n in range(plan.num_shards) if not is_done(folder, n)]
                if todo and dataset["images"] is not None:
                    dataset["images"] = None
                    write_dataset(folder, dataset)
                resumed = sum(plan.places(n) for n in set(range(plan.num_shards)) - set(todo))
                tasks = Tasks(
                    lambda number, tally: plan.write_shard(folder, number, tally),
                    workers,
                    f"{folder}/{{:06d}}.tar",
                    # one that outlives a killed pack for a moment must not hold the lock
                    to_close=[lock],
                )
                for _ in tasks.results(todo, lambda tally: tick(*tally.total(), resumed)):
                    pass
                return plan.finish(folder, dataset)
            finally:
                _remove_temporaries(folder)
    except OSError as error:
        raise RunError(
            f"{error.filename or folder}: {error.strerror or error}; what is finished stays, the "
            "same command goes on"
        ) from None


def _remove_temporaries(folder: Path) -> None:
    for name in os.listdir(folder):
        if TEMPORARY.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path) -> Generator[int, None, None]:
    """`folder`, made if needed, and locked against a second pack; gives the lock's descriptor."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another simmim pack is at work in it") from None
        except OSError:
            pass  # some network file systems cannot lock a folder
        yield descriptor
    finally:
        os.close(descriptor)
