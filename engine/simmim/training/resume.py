"""Resumes the run that a folder holds, if it is the same run."""

from typing import Any, cast

from simmim import distributed
from simmim.config.moved_keys import move_keys
from simmim.config.sections import Config, RunConfig
from simmim.config.values import from_dict, leaves
from simmim.data.source import Source
from simmim.distributed import World
from simmim.errors import ConfigError, DataError
from simmim.run_folder import RunFolder
from simmim.training import checkpoint
from simmim.training.checkpoint import CheckpointError, Loaded
from simmim.training.log import RunLog
from simmim.training.step import TrainState

# Step numbers and optimiser state are valid only while these stay the same.
FIXED_KEYS = ("seed", "train.batch_size", "optim.name", "data.image_size", "data.channels")


def agreed_fingerprint(source: Source, world: World) -> dict[str, Any]:
    """The number of images and the digest of their names, equal in every process.

    Raises:
        DataError: the processes see different images.
    """
    own = {"images": len(source.names), "digest": source.names.digest()}
    for rank, other in enumerate(distributed.gather_objects(own, world)):
        if other != own:
            raise DataError(
                f"process {world.rank} sees {own['images']} images and process {rank} sees "
                f"{other['images']}, or other names: every process needs the same data.path"
            )
    return own


def resume(
    state: TrainState, folder: RunFolder, fingerprint: dict[str, Any], log: RunLog
) -> set[int]:
    """Restore the folder's newest checkpoint that is not damaged, if there is one.

    Args:
        state: a fresh state, which is changed in place.
        folder: the run's folder, claimed by this process.
        fingerprint: the fingerprint of the images, see `agreed_fingerprint`.
        log: the run's log; its records of later steps are dropped.

    Returns:
        The samples that are known to be unreadable.

    Raises:
        ConfigError: the folder holds a run with other settings.
        CheckpointError: all checkpoints are damaged, or the folder holds only final weights.
    """
    root, world = folder.checkpoints, state.world
    newest: Loaded | None = None
    problem: object = None
    if world.is_main:  # one process chooses a checkpoint, the others read the same
        checkpoint.remove_leftovers(root)
        try:
            newest = checkpoint.read_newest(root, log.warn)
        except (CheckpointError, OSError) as error:
            problem = str(error)
    chosen = distributed.broadcast_object((problem, newest and newest.folder), world)
    problem, path = cast(tuple[Any, Any], chosen)
    if problem:
        raise CheckpointError(str(problem))
    if path is None:
        if folder.weights.exists():
            raise CheckpointError(
                f"{folder}: holds the weights of a finished run and no checkpoint to go on from; "
                "starting over would overwrite them: choose another --output"
            )
        log.start_after(0)
        return set()
    newest = newest or checkpoint.read(path)
    for change in changes_since(newest, state.config, fingerprint):
        if world.is_main:
            log.warn(change)
    log.start_after(int(newest.state["step"]))
    checkpoint.restore(state, newest)
    log.info(f"resumed from {newest.folder} at step {state.step}")
    return set(newest.state.get("unreadable", []))


def changes_since(loaded: Loaded, config: RunConfig, fingerprint: dict[str, Any]) -> list[str]:
    """List what changed in configuration and data between a checkpoint and this start.

    Raises:
        ConfigError: something changed on which the order of samples or the saved state depends.
    """
    changes = []
    method = loaded.state["config"].get("method", {}).get("name", "simmim")
    if isinstance(config, Config) and method != config.method.name:
        raise ConfigError(
            f"method.name was {method} in {loaded.folder} and is {config.method.name} now; a run "
            "cannot change it midway: restore it, or choose another --output"
        )
    try:
        saved, _ = move_keys(loaded.state["config"], type(config), strict=False)
        before = leaves(from_dict(saved, type(config)))
    except (TypeError, KeyError):
        changes.append("the checkpoint's configuration is of another version; not compared")
        before = {}
    for key, value in leaves(config).items():
        if key not in before or before[key] == value or key == "output":
            continue
        if key in FIXED_KEYS or key.startswith(("model.", "method.")):
            raise ConfigError(
                f"{key} was {before[key]} in {loaded.folder} and is {value} now; a run cannot "
                "change it midway: restore it, or choose another --output"
            )
        changes.append(f"changed since the checkpoint: {key} {before[key]} → {value}")
    was = loaded.state["data"]
    if was != fingerprint and before.get("data.path") != config.data.path:
        raise ConfigError(
            f"data.path={config.data.path}: not the images of the run in {config.output} "
            f"({before.get('data.path')}): choose another --output"
        )
    if was != fingerprint:
        changes.append(
            f"the data changed since the checkpoint ({was['images']} → {fingerprint['images']} "
            "images, or other names): the order of samples is not that of the first run"
        )
    return changes
