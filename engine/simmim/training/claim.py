"""Claims a run folder for one process, and records what every start of the run ran on."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from simmim import distributed, environment, files
from simmim.config.sections import RunConfig
from simmim.config.values import to_toml
from simmim.distributed import World
from simmim.errors import ConfigError
from simmim.run_folder import RunFolder
from simmim.training.interrupts import Interrupts


@contextmanager
def claimed_run(config: RunConfig) -> Iterator[tuple[World, RunFolder, Interrupts]]:
    """Yield this process, the claimed run folder and the signals, for as long as a run lasts.

    Raises:
        ConfigError: see `claimed_folder`.
    """
    world = distributed.init(config.device)
    with Interrupts() as interrupts, claimed_folder(config, world) as folder:
        yield world, folder, interrupts
    # skipped after an error: leaving the group waits for processes that may wait for this one
    distributed.finish(world)


@contextmanager
def claimed_folder(config: RunConfig, world: World) -> Iterator[RunFolder]:
    """Yield the run folder, which is made if needed and locked against a second run.

    Raises:
        ConfigError: the folder holds something else, cannot be made, or is in use.
    """
    folder = RunFolder(Path(os.path.expanduser(config.output)))
    lock: IO[str] | None = None
    problem: object = None
    if world.is_main:
        try:
            lock = _claim(folder)
        except ConfigError as error:
            problem = str(error)
    problem = distributed.broadcast_object(problem, world)
    if problem:
        raise ConfigError(str(problem))
    try:
        yield folder
    finally:
        if lock is not None:
            lock.close()


def _claim(folder: RunFolder) -> IO[str]:
    root = folder.root
    try:
        if root.exists() and not root.is_dir():
            raise ConfigError(f"output={root}: is a file; choose another folder")
        if root.is_dir() and any(root.iterdir()) and not folder.is_claimed:
            raise ConfigError(
                f"output={root}: not empty, and holds no simmim run; choose another folder"
            )
        root.mkdir(parents=True, exist_ok=True)
        lock = folder.lock.open("w")
        try:
            # a record lock belongs to this process alone: data workers that outlive a killed run
            # for a moment do not hold it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise
    except BlockingIOError:
        raise ConfigError(f"output={root}: another process is training in this folder") from None
    except OSError as error:
        raise ConfigError(f"output={root}: cannot be written: {error.strerror}") from None
    return lock


def record_start(folder: RunFolder, config: RunConfig, world: World, step: int) -> None:
    """Write the resolved configuration, and add this start to the list of starts."""
    files.write_text(folder.config, to_toml(config))
    try:
        starts = json.loads(folder.starts.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError):
        starts = []
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    start = {"time": started, "step": step, **environment.describe(world.device, world.size)}
    files.write_text(folder.starts, json.dumps({"starts": [*starts, start]}, indent=1) + "\n")
