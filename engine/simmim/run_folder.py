"""The folder of a run: claimed by one process, described for whoever finds it later."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from simmim import distributed, environment, files
from simmim.checkpoint import Loaded
from simmim.config import Config, ConfigError, RunConfig, from_dict, leaves, to_toml
from simmim.distributed import World

RUN_FILE = "run.json"
CONFIG_FILE = "config.toml"
LOCK_FILE = ".lock"

# Step numbers and optimiser state mean something only under these.
FIXED_KEYS = ("seed", "train.batch_size", "optim.name", "data.image_size", "data.channels")


@contextmanager
def run_folder(config: RunConfig, world: World) -> Iterator[Path]:
    """The run folder, made if needed and locked against a second run.

    Raises:
        ConfigError: the folder holds something else, cannot be made, or is in use.
    """
    folder = Path(os.path.expanduser(config.output))
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


def _claim(folder: Path) -> IO[str]:
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output={folder}: is a file; choose another folder")
        ours = any((folder / name).exists() for name in (LOCK_FILE, RUN_FILE))
        if folder.is_dir() and any(folder.iterdir()) and not ours:
            raise ConfigError(
                f"output={folder}: not empty, and holds no simmim run; choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
        # a record lock belongs to this process alone: data workers that outlive a killed run for a
        # moment do not hold it
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"output={folder}: another process is training in this folder") from None
    except OSError as error:
        raise ConfigError(f"output={folder}: cannot be written: {error.strerror}") from None
    return lock


def record_start(folder: Path, config: RunConfig, world: World, step: int) -> None:
    """Write the resolved configuration, and add this start to the list in run.json."""
    files.write_text(folder / CONFIG_FILE, to_toml(config))
    path = folder / RUN_FILE
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError):
        starts = []
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    start = {"time": started, "step": step, **environment.describe(world.device, world.size)}
    files.write_text(path, json.dumps({"starts": [*starts, start]}, indent=1) + "\n")


def changes_since(loaded: Loaded, config: RunConfig, fingerprint: dict[str, Any]) -> list[str]:
    """What differs between a checkpoint's configuration and data and those of this start.

    Raises:
        ConfigError: something differs on which the order of samples or the saved state depends.
    """
    found = []
    method = loaded.state["config"].get("method", {}).get("name", "simmim")
    if isinstance(config, Config) and method != config.method.name:
        raise ConfigError(
            f"method.name was {method} in {loaded.folder} and is {config.method.name} now; a run "
            "cannot change it midway: restore it, or choose another --output"
        )
    try:
        before = leaves(from_dict(loaded.state["config"], type(config)))
    except (TypeError, KeyError):
        found.append("the checkpoint's configuration is of another version; not compared")
        before = {}
    for key, value in leaves(config).items():
        if key not in before or before[key] == value or key == "output":
            continue
        if key in FIXED_KEYS or key.startswith(("model.", "method.")):
            raise ConfigError(
                f"{key} was {before[key]} in {loaded.folder} and is {value} now; a run cannot "
                "change it midway: restore it, or choose another --output"
            )
        found.append(f"changed since the checkpoint: {key} {before[key]} → {value}")
    was = loaded.state["data"]
    if was != fingerprint and before.get("data.path") != config.data.path:
        raise ConfigError(
            f"data.path={config.data.path}: not the images of the run in {config.output} "
            f"({before.get('data.path')}): choose another --output"
        )
    if was != fingerprint:
        found.append(
            f"the data changed since the checkpoint ({was['images']} → {fingerprint['images']} "
            "images, or other names): the order of samples is not that of the first run"
        )
    return found
