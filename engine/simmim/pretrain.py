"""One pre-training run, from a configuration to weights; readable top to bottom."""

import gc
import resource
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from simmim import checkpoint, distributed, environment, files, load, precision
from simmim.backbone.build import build_encoder
from simmim.checkpoint import Loaded
from simmim.config import Config, resolve_spec
from simmim.data.build import make_loader
from simmim.data.loader import Loader
from simmim.data.source import DataError, Source, open_source
from simmim.distributed import World
from simmim.errors import RunError
from simmim.interrupts import EXIT_INTERRUPTED, Interrupts, StopWaiting
from simmim.log import RunLog
from simmim.method.simmim import SimMIM
from simmim.optim import build_optimizer
from simmim.reconstruct import FixedSamples, save_picture
from simmim.run_folder import changes_since, record_start, run_folder
from simmim.schedule import resolve_schedule
from simmim.step import Metrics, TrainState, train_step
from simmim_kernels.splitmix import fold, signed
from simmim_kernels.window_attention import BACKENDS as ATTENTION_BACKENDS

# Steps between checkpoints where an epoch is shorter than that.
SHORTEST_INTERVAL = 100

# Steps between looks at signals and bad steps where looking means waiting for the device.
CONTROL_INTERVAL = 10


# Share of the time that a step may wait for data before the log says what to do about it, and the
# steps until it says so again.
TOLERATED_WAIT = 0.10
WAIT_WARNING_INTERVAL = 1000

# Unreadable images that are named on the terminal each time; log.txt names them all.
NAMED_UNREADABLE = 20


class RunStopped(RunError):
    """A run that cannot go on; the message says at which step, why, and what is saved."""


def pretrain(config: Config) -> int:
    """Pre-train as `config` says, resuming whatever its run folder holds.

    Returns:
        0 when the run is complete, 75 when a signal stopped it (run again to resume).

    Raises:
        ConfigError: the run folder cannot be used.
        simmim.data.source.DataError: no data.
        CheckpointError: a checkpoint could not be written or read.
        RunStopped: too many steps in a row had non-finite gradients.
    """
    world = distributed.init(config.device)
    with Interrupts() as interrupts, run_folder(config, world) as folder:
        code = _run(config, world, folder, interrupts)
    # not after an error: leaving the group waits for processes that may wait for this one
    distributed.finish(world)
    return code


def _run(config: Config, world: World, folder: Path, interrupts: Interrupts) -> int:
    source = open_source(config.data.path)
    schedule = resolve_schedule(config, len(source.names))
    model = build_model(config, world.device)
    optimizer = build_optimizer(model, config.optim)
    wrapped: nn.Module = distributed.wrap(model, world)
    if config.train.compile:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]
    state = TrainState(model, wrapped, optimizer, config, schedule, world)
    log = RunLog(
        folder,
        schedule.total_steps,
        is_main=world.is_main,
        tensorboard=config.log.tensorboard,
    )
    try:
        fingerprint = _agreed_fingerprint(source, world)
        unreadable = _resume(state, folder, fingerprint, log)
        if state.step >= schedule.total_steps and (folder / load.WEIGHTS_FILE).exists():
            log.info(
                f"already done: {state.step} steps, nothing written; a larger --train.steps or "
                "--train.epochs goes on, another --output starts anew"
            )
            return 0
        log.info(_headline(state, len(source.names)))
        if world.is_main:
            record_start(folder, config, world, state.step)
        loader = make_loader(config, source, world)
        loader.report = log.warn
        if world.device.type == "cuda" or config.data.backend == "dali":
            log.info(f"data.backend: {loader.backend}")
        return _Loop(state, loader, folder, fingerprint, unreadable, log).run(interrupts)
    finally:
        log.close()


class _Loop:
    """The loop over steps, and what is due after each."""

    def __init__(
        self,
        state: TrainState,
        loader: Loader,
        folder: Path,
        fingerprint: dict[str, Any],
        unreadable: set[int],
        log: RunLog,
    ) -> None:
        self.unreadable = unreadable
        self.state, self.loader, self.folder, self.log = state, loader, folder, log
        self.fingerprint = fingerprint
        self.config, self.world = state.config, state.world
        self.total = state.schedule.total_steps
        self.pending: list[Metrics] = []
        self.first_step, self.next_wait_warning = state.step, 0
        self.saved_step = state.step if checkpoint.steps(self.checkpoints) else -1
        drawn = self.world.is_main and self.config.log.picture_every_steps >= 0
        self.samples = FixedSamples(loader.source, self.config) if drawn else None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def run(self, interrupts: Interrupts) -> int:
        if self.world.size == 1:
            # data may never come (a hung file server); with several processes the others would
            # then wait for this one, and the launcher ends them all
            interrupts.only_waiting = lambda: self.loader.waiting
        # what was built stays: collections need not walk through it at every few steps, and in
        # forked data workers they would copy every page that holds an object
        gc.freeze()
        try:
            return self._train(interrupts)
        except StopWaiting:
            self._save()
            return self._interrupted(interrupts)
        except DataError:
            # data is asked for between two steps: nothing is half done. With several processes the
            # others wait in a step, and no save can be agreed on.
            if self.world.size == 1 and self.state.step > self.first_step:
                self._save()
            raise
        finally:
            gc.unfreeze()

    def _train(self, interrupts: Interrupts) -> int:
        state, config = self.state, self.config
        self.log.start(state.step)
        self._restart_clock()
        on_cpu, alone = self.world.device.type == "cpu", self.world.size == 1
        # closed on every way out, so that no worker outlives the loop
        with closing(self.loader.steps(state.step, self.total)) as steps:
            for batches in steps:
                self.pending.append(train_step(state, batches))
                last = state.step == self.total
                due = last or state.step % config.log.every_steps == 0
                # reading a device scalar waits for the device: not at every step on CUDA
                control = on_cpu or due or state.step % CONTROL_INTERVAL == 0
                if control:
                    self._check_finite()
                stopping = (control or alone) and interrupts.agreed(self.world) and not last
                if due or stopping:
                    self._log_metrics()
                if last or stopping or self._checkpoint_due():
                    self._save()
                if self._picture_due(last):
                    self._draw()
                if stopping:
                    return self._interrupted(interrupts)
        self._finish()
        return 0

    def _restart_clock(self) -> None:
        self.started, self.waited = time.perf_counter(), self.loader.wait_s

    def _log_metrics(self) -> None:
        if not self.pending:
            return
        state, count = self.state, len(self.pending)
        values = (
            _read([v for m in self.pending for v in (m.loss, m.grad_norm)]).view(-1, 2).tolist()
        )
        elapsed = time.perf_counter() - self.started
        batch_size, num_images = self.config.train.batch_size, len(self.loader.source.names)
        self._note_unreadable()
        shared = {
            "images_per_s": batch_size * count / elapsed,
            "data_wait": (self.loader.wait_s - self.waited) / elapsed,
            "peak_memory_bytes": _peak_memory(self.world),
            "eta_s": elapsed / count * (self.total - state.step),
            "skipped": int(state.skipped),
            "unreadable": len(self.unreadable),
        }
        first = state.step - count
        rows = [
            {
                "step": first + i + 1,
                "epoch": (first + i + 1) * batch_size / num_images,
                "loss": _finite(loss),
                "lr": metrics.lr,
                "grad_norm": _finite(norm),
                **shared,
            }
            for i, (metrics, (loss, norm)) in enumerate(zip(self.pending, values))
        ]
        self.log.metrics(rows)
        bad = [str(row["step"]) for row in rows if None in (row["loss"], row["grad_norm"])]
        if bad:
            self.log.warn(f"non-finite loss or gradient, update skipped: step {', '.join(bad)}")
        self.pending.clear()
        self._warn_of_waiting(shared["data_wait"], count)
        self._restart_clock()

    def _warn_of_waiting(self, share: float, count: int) -> None:
        """Say what helps when the device waits for data, at most once in WAIT_WARNING_INTERVAL."""
        step = self.state.step
        first_window = step - count == self.first_step  # there the data path is only starting
        if share <= TOLERATED_WAIT or first_window or step < self.next_wait_warning:
            return
        self.next_wait_warning = step + WAIT_WARNING_INTERVAL
        self.log.warn(f"data-wait {share:.0%} of the time: {self.loader.remedy()}")

    def _note_unreadable(self) -> None:
        """Name and count every unreadable image once, whichever process met it."""
        found = distributed.gather_objects(self.loader.problems, self.world)
        self.loader.problems = []
        new = dict(problem for problems in found for problem in problems)
        new = {sample: reason for sample, reason in new.items() if sample not in self.unreadable}
        self.unreadable.update(new)
        for number, (sample, reason) in enumerate(new.items()):
            line = f"unreadable: {self.loader.source.names[sample]}: {reason}"
            self.log.warn(line, shown=number < NAMED_UNREADABLE)
        if len(new) > NAMED_UNREADABLE:
            self.log.warn(f"unreadable: {len(new) - NAMED_UNREADABLE} more, all in log.txt")

    def _check_finite(self) -> None:
        bad = int(self.state.longest_bad_run)
        if bad < self.config.train.max_bad_steps:
            return
        self._log_metrics()
        kept = max(checkpoint.steps(self.checkpoints), default=None)
        saved = (
            "nothing was saved yet" if kept is None else f"the checkpoint of step {kept} is kept"
        )
        raise RunStopped(
            f"step {self.state.step}: {bad} steps in a row had a non-finite loss or gradient and "
            f"were skipped; {saved}. Try a lower --optim.lr, or --train.precision=bf16 or float32, "
            "on the same run folder"
        )

    def _checkpoint_due(self) -> bool:
        steps_per_epoch = len(self.loader.source.names) // self.config.train.batch_size
        every = self.config.checkpoint.every_steps or max(steps_per_epoch, SHORTEST_INTERVAL)
        return self.state.step % every == 0

    def _save(self) -> None:
        state = self.state
        if state.step == self.saved_step:
            return
        self._log_metrics()
        # a skipped step leaves the weights alone, so saving is safe; but weights that only make
        # such steps must not push out the last good checkpoint
        healthy = int(state.bad_in_a_row) == 0
        problem: object = self._write_checkpoint(healthy) if self.world.is_main else None
        problem = distributed.broadcast_object(problem, self.world)
        if problem:
            raise checkpoint.CheckpointError(str(problem))
        self.saved_step = state.step
        self._restart_clock()

    def _write_checkpoint(self, prune: bool) -> str | None:
        extra = {
            "config": asdict(self.config),
            "data": self.fingerprint,
            "unreadable": sorted(self.unreadable),
        }
        keep = self.config.checkpoint
        try:
            checkpoint.save(self.checkpoints, self.state, extra)
            if prune:
                checkpoint.prune(self.checkpoints, keep.keep_last, keep.keep_every_steps)
        except checkpoint.CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{self.checkpoints}: {error.strerror}"
        return None

    def _picture_due(self, last: bool) -> bool:
        every = self.config.log.picture_every_steps
        if every < 0:
            return False
        if every == 0:
            return self.state.step == self.saved_step
        return last or self.state.step % every == 0

    def _draw(self) -> None:
        if self.samples is None:
            return
        with precision.autocast(self.world.device, self.config.train.precision):
            picture = self.samples.draw(self.state.model)
        if picture is not None:
            path = self.folder / "pictures" / f"step_{self.state.step:08d}.png"
            try:
                save_picture(picture, path)
            except OSError as error:
                self.log.warn(f"{path}: could not be written: {error.strerror}")
            self.log.picture(np.asarray(picture), self.state.step)
        self._restart_clock()

    def _interrupted(self, interrupts: Interrupts) -> int:
        name = interrupts.received.name if interrupts.received else "a signal to another process"
        saved = f"saved at step {self.saved_step}" if self.saved_step >= 0 else "nothing saved yet"
        self.log.stop_progress()
        self.log.info(f"stopped by {name}: {saved}; the same command resumes")
        return EXIT_INTERRUPTED

    def _finish(self) -> None:
        state = self.state
        if self.world.is_main:
            weights, mask = self.folder / load.WEIGHTS_FILE, self.config.mask
            try:
                files.write_atomic(
                    weights, lambda path: checkpoint.save_weights(state.model, path, mask)
                )
            except (OSError, SafetensorError) as error:
                raise checkpoint.CheckpointError(
                    f"{weights}: could not be written: {error}"
                ) from None
            self.log.stop_progress()
            self.log.info(f"done: {state.step} steps; weights in {weights}")
            if (self.folder / "pictures").is_dir():
                self.log.info(f"pictures in {self.folder / 'pictures'}")


def build_model(config: Config, device: torch.device) -> SimMIM:
    """The configured model, initialised from the run's seed, on `device`.

    Raises:
        RunError: `kernels` names a backend that cannot run here.
    """
    chosen = config.kernels
    x = torch.empty(0, device=device)
    against = {b.name: b.reasons_against(x) for b in ATTENTION_BACKENDS}
    for key, name in (("backend", chosen.backend), ("attention", chosen.attention)):
        if name is not None and against[name]:
            raise RunError(f"kernels.{key}={name} cannot run: {'; '.join(against[name])}")
    torch.manual_seed(signed(fold(config.seed)))
    model = SimMIM(
        build_encoder(resolve_spec(config)),
        norm_target=config.model.norm_target or None,
        mean=config.data.mean,
        std=config.data.std,
    )
    model.encoder.activation_checkpointing = config.train.activation_checkpointing
    model.use_backend(chosen.backend, chosen.attention)
    if config.channels_last_on(device.type):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


def _agreed_fingerprint(source: Source, world: World) -> dict[str, Any]:
    """Number and names' digest of the images, the same in every process."""
    own = {"images": len(source.names), "digest": source.names.digest()}
    for rank, other in enumerate(distributed.gather_objects(own, world)):
        if other != own:
            raise DataError(
                f"process {world.rank} sees {own['images']} images and process {rank} sees "
                f"{other['images']}, or other names: every process needs the same data.path"
            )
    return own


def _resume(state: TrainState, folder: Path, fingerprint: dict[str, Any], log: RunLog) -> set[int]:
    """Restore the newest whole checkpoint, if any; returns the images known to be unreadable."""
    root, world = folder / "checkpoints", state.world
    loaded: Loaded | None = None
    problem: object = None
    if world.is_main:  # one process decides, the others read what it chose
        checkpoint.remove_leftovers(root)
        try:
            loaded = checkpoint.read_newest(root, log.warn)
        except (checkpoint.CheckpointError, OSError) as error:
            problem = str(error)
    chosen = distributed.broadcast_object((problem, loaded and loaded.folder), world)
    problem, path = cast(tuple[str | None, Path | None], chosen)
    if problem:
        raise checkpoint.CheckpointError(str(problem))
    if path is None:
        if (folder / load.WEIGHTS_FILE).exists():
            raise checkpoint.CheckpointError(
                f"{folder}: holds the weights of a finished run and no checkpoint to go on from; "
                "starting over would overwrite them: choose another --output"
            )
        log.start_after(0)
        return set()
    loaded = loaded or checkpoint.read(path)
    for change in changes_since(loaded, state.config, fingerprint):
        if world.is_main:
            log.warn(change)
    log.start_after(int(loaded.state["step"]))
    checkpoint.restore(state, loaded)
    log.info(f"resumed from {loaded.folder} at step {state.step}")
    return set(loaded.state.get("unreadable", []))


def _headline(state: TrainState, num_images: int) -> str:
    config, world = state.config, state.world
    processes = f" × {world.size}" if world.size > 1 else ""
    return (
        f"{config.model.name}, {sum(p.numel() for p in state.parameters()):,} parameters; "
        f"{num_images:,} images; {state.schedule.total_steps} steps of {config.train.batch_size} "
        f"images; {config.train.precision} on {environment.device_name(world.device)}{processes}"
    )


def _read(values: list[Tensor]) -> Tensor:
    """Device scalars → one host tensor, in one transfer."""
    return torch.stack([value.detach().float().reshape(()) for value in values]).cpu()


def _finite(value: float) -> float | None:
    # JSON has no NaN
    return value if np.isfinite(value) else None


def _peak_memory(world: World) -> int:
    if world.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(world.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
