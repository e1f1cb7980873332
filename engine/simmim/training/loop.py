"""The loop of a training run, the same for every method: its steps, and what is due after each."""

import gc
import resource
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from simmim import distributed, environment, files
from simmim.data.loader import Loader
from simmim.data.source import Source
from simmim.data.unreadable import MOST_NAMED, UnreadableImages
from simmim.distributed import World
from simmim.errors import DataError, RunError
from simmim.model.weights_file import save_weights
from simmim.run_folder import RunFolder
from simmim.training import checkpoint
from simmim.training.claim import record_start
from simmim.training.graphed_steps import GraphedSteps
from simmim.training.interrupts import EXIT_INTERRUPTED, Interrupts, StopWaiting
from simmim.training.log import RunLog
from simmim.training.observer import Observer
from simmim.training.records import finite
from simmim.training.resume import agreed_fingerprint, resume
from simmim.training.run import Run
from simmim.training.step import Metrics, TrainState

# Steps between checkpoints if an epoch has fewer steps.
SHORTEST_INTERVAL = 100

# Steps between checks for signals and bad steps if a check has to wait for the device.
CONTROL_INTERVAL = 10

# If steps wait for data for a larger share of the time, the log says what to do about it. It does
# not say so again for this many steps.
TOLERATED_WAIT = 0.10
WAIT_WARNING_INTERVAL = 1000


class RunStopped(RunError):
    """A run that cannot go on; the message says at which step, why, and what is saved."""


def train(
    state: TrainState,
    source: Source,
    make_loader: Callable[[], Loader],
    make_observer: Callable[[Loader], Observer],
    folder: RunFolder,
    log: RunLog,
    interrupts: Interrupts,
) -> int:
    """Resume what the folder holds, and run to the last step.

    Args:
        state: a fresh state, which is changed in place.
        source: the run's images.
        make_loader: makes the loader; called only if steps are left.
        make_observer: makes the observer from the loader; called only if steps are left.
        folder: the run's folder, claimed by this process.
        log: the run's log.
        interrupts: the signals that this process receives.

    Returns:
        0 when the run is complete, 75 when a signal stopped it.

    Raises:
        ConfigError: the folder holds a run with other settings.
        DataError: data fails before the first step of this start.
        CheckpointError: a checkpoint could not be written or read.
        RunStopped: data fails in a later step, or too many steps in a row had non-finite gradients.
    """
    world, config, total = state.world, state.config, state.schedule.total_steps
    fingerprint = agreed_fingerprint(source, world)
    unreadable = UnreadableImages(source, world, resume(state, folder, fingerprint, log))
    if state.step >= total and folder.weights.exists():
        log.info(
            f"already done: {state.step} steps, nothing written; a larger --train.steps or "
            "--train.epochs goes on, another --output starts anew"
        )
        return 0
    log.info(_headline(state, len(source.names)))
    if world.is_main:
        record_start(folder, config, world, state.step)
    loader = make_loader()
    loader.report = log.warn
    if world.device.type == "cuda" or getattr(config.data, "backend", None) == "dali":
        log.info(f"data.backend: {loader.backend}")
    saved_step = state.step if checkpoint.steps(folder.checkpoints) else -1
    run = Run(state, loader, folder, log, unreadable, saved_step)
    return Loop(run, make_observer(loader), fingerprint).drive(interrupts)


class Loop:
    """Drives a run: makes its steps, and does what is due after each.

    Args:
        run: the run, already resumed.
        observer: called after every step.
        fingerprint: the fingerprint of the images, see `agreed_fingerprint`.
    """

    def __init__(self, run: Run, observer: Observer, fingerprint: dict[str, Any]) -> None:
        self.run, self.observer, self.fingerprint = run, observer, fingerprint
        self.state, self.loader, self.folder, self.log = run.state, run.loader, run.folder, run.log
        self.config, self.world = run.config, run.world
        self.pending: list[Metrics] = []
        self.make_step = GraphedSteps(run.state, self.log.warn)
        if self.world.device.type == "cuda":
            self.log.info(f"train.cuda_graph: {self.make_step.describe()}")
        self.first_step, self.next_wait_warning = run.step, 0

    def drive(self, interrupts: Interrupts) -> int:
        """Make the steps that are left; see `train`."""
        if self.world.size == 1:
            # data may never come (a hung file server). With several processes, the others would
            # then wait for this one, and the launcher ends them all.
            interrupts.only_waiting = lambda: self.loader.waiting or self.observer.busy
        # the objects built so far stay: the garbage collector need not visit them every few steps,
        # and a visit in a forked data worker would copy every page that holds one
        gc.freeze()
        try:
            return self._train(interrupts)
        except StopWaiting:
            self._save()
            return self._interrupted(interrupts)
        except DataError as error:
            # data is asked for between two steps: nothing is half done. With several processes the
            # others wait inside a step, and the processes cannot agree on a save.
            if self.state.step == self.first_step:
                raise
            if self.world.size == 1:
                self._save()
            raise RunStopped(str(error)) from error
        finally:
            gc.unfreeze()

    def _train(self, interrupts: Interrupts) -> int:
        state, config = self.state, self.config
        self.log.start(state.step)
        self.observer.begin(self.run)
        self.run.restart_clock()
        on_cpu, alone = self.world.device.type == "cpu", self.world.size == 1
        # closed however the loop ends, so that no worker outlives it
        with closing(self.loader.steps(state.step, self.run.total)) as steps:
            for batches in steps:
                self.pending.append(self.make_step(batches))
                last = state.step == self.run.total
                due = last or state.step % config.log.every_steps == 0
                # reading a scalar waits for the device: CUDA must not do so at every step
                control = on_cpu or due or state.step % CONTROL_INTERVAL == 0
                if control:
                    self._check_finite()
                stopping = (control or alone) and interrupts.agreed(self.world) and not last
                if due or stopping:
                    self._log_metrics()
                if last or stopping or self._checkpoint_due():
                    self._save()
                self.observer.observe(self.run, last=last, stopping=stopping)
                if stopping:
                    return self._interrupted(interrupts)
        self._finish()
        return 0

    def _log_metrics(self) -> None:
        if not self.pending:
            return
        state, count = self.state, len(self.pending)
        measures = self.observer.measures(self.run)
        losses = [v for m in self.pending for v in (m.loss, m.grad_norm)]
        read = _read([*losses, *measures.values()])
        values = read[: 2 * count].view(-1, 2).tolist()
        measured = dict(zip(measures, read[2 * count :].tolist()))
        elapsed, waited = self.run.clock()
        self._note_unreadable()
        shared = {
            "images_per_s": self.config.train.batch_size * count / elapsed,
            "data_wait": waited / elapsed,
            "peak_memory_bytes": _peak_memory(self.world),
            "eta_s": elapsed / count * (self.run.total - state.step),
            "skipped": int(state.skipped),
            "unreadable": len(self.run.unreadable.samples),
        }
        first = state.step - count
        rows = [
            {
                "step": first + i + 1,
                "epoch": self.run.epoch_of(first + i + 1),
                "loss": finite(loss),
                "lr": metrics.lr,
                "grad_norm": finite(norm),
                **shared,
            }
            for i, (metrics, (loss, norm)) in enumerate(zip(self.pending, values))
        ]
        rows[-1] |= {name: finite(value) for name, value in measured.items()}
        self.log.metrics(rows)
        bad = [str(row["step"]) for row in rows if None in (row["loss"], row["grad_norm"])]
        if bad:
            self.log.warn(f"non-finite loss or gradient, update skipped: step {', '.join(bad)}")
        self.pending.clear()
        if measured:
            self.observer.measured(self.run, measured)
        self._warn_of_waiting(shared["data_wait"], count)
        self.run.restart_clock()

    def _warn_of_waiting(self, share: float, count: int) -> None:
        """Say what helps when steps wait for data, at most once in WAIT_WARNING_INTERVAL steps."""
        step = self.state.step
        first_window = step - count == self.first_step  # the data path is still starting
        if share <= TOLERATED_WAIT or first_window or step < self.next_wait_warning:
            return
        self.next_wait_warning = step + WAIT_WARNING_INTERVAL
        self.log.warn(f"data-wait {share:.0%} of the time: {self.loader.remedy()}")

    def _note_unreadable(self) -> None:
        """Name and count every unreadable image once, whichever process reads it."""
        unreadable = self.run.unreadable
        for problem in self.loader.problems:
            unreadable.note(*problem)
        self.loader.problems = []
        new = unreadable.agree()
        for number, problem in enumerate(new):
            self.log.warn(f"unreadable: {unreadable.describe(problem)}", shown=number < MOST_NAMED)
        if len(new) > MOST_NAMED:
            self.log.warn(f"unreadable: {len(new) - MOST_NAMED} more, all in log.txt")

    def _check_finite(self) -> None:
        bad = int(self.state.longest_bad_run)
        if bad < self.config.train.max_bad_steps:
            return
        self._log_metrics()
        kept = max(checkpoint.steps(self.folder.checkpoints), default=None)
        saved = (
            "nothing was saved yet" if kept is None else f"the checkpoint of step {kept} is kept"
        )
        raise RunStopped(
            f"step {self.state.step}: {bad} steps in a row had a non-finite loss or gradient and "
            f"were skipped; {saved}. Try a lower --optim.lr, or --train.precision=bf16 or float32, "
            "on the same run folder"
        )

    def _checkpoint_due(self) -> bool:
        steps_per_epoch = self.run.num_images // self.config.train.batch_size
        every = self.config.checkpoint.every_steps or max(steps_per_epoch, SHORTEST_INTERVAL)
        return self.state.step % every == 0

    def _save(self) -> None:
        state = self.state
        if state.step == self.run.saved_step:
            return
        self._log_metrics()
        # a skipped step does not change the weights, so saving is safe; but weights that lead only
        # to skipped steps must not replace the last good checkpoint
        healthy = int(state.bad_in_a_row) == 0
        problem: object = self._write_checkpoint(healthy) if self.world.is_main else None
        problem = distributed.broadcast_object(problem, self.world)
        if problem:
            raise checkpoint.CheckpointError(str(problem))
        self.run.saved_step = state.step
        self.run.restart_clock()

    def _write_checkpoint(self, prune: bool) -> str | None:
        extra = {
            "config": asdict(self.config),
            "data": self.fingerprint,
            "unreadable": sorted(self.run.unreadable.samples),
        }
        keep = self.config.checkpoint
        try:
            checkpoint.save(self.folder.checkpoints, self.state, extra)
            if prune:
                checkpoint.prune(self.folder.checkpoints, keep.keep_last, keep.keep_every_steps)
        except checkpoint.CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{self.folder.checkpoints}: {error.strerror}"
        return None

    def _interrupted(self, interrupts: Interrupts) -> int:
        name = interrupts.received.name if interrupts.received else "a signal to another process"
        step = self.run.saved_step
        saved = f"saved at step {step}" if step >= 0 else "nothing saved yet"
        self.log.stop_progress()
        self.log.info(f"stopped by {name}: {saved}; the same command resumes")
        return EXIT_INTERRUPTED

    def _finish(self) -> None:
        state = self.state
        if self.world.is_main:
            write_weights(state, self.folder.weights)
            self.log.stop_progress()
            self.log.info(f"done: {state.step} steps; weights in {self.folder.weights}")
        self.observer.finish(self.run)


def write_weights(state: TrainState, path: Path) -> None:
    """Write the final weights, averaged if the run averages, completely or not at all.

    Raises:
        CheckpointError: they could not be written.
    """
    model = state.averaged or state.model
    try:
        files.write_atomic(path, lambda temporary: save_weights(model, temporary, state.mask))
    except (OSError, SafetensorError) as error:
        raise checkpoint.CheckpointError(f"{path}: could not be written: {error}") from None


def _headline(state: TrainState, num_images: int) -> str:
    config, world = state.config, state.world
    processes = f" × {world.size}" if world.size > 1 else ""
    name = config.model.name or type(state.model.encoder).__name__
    return (
        f"{name}, {sum(p.numel() for p in state.parameters()):,} parameters; "
        f"{num_images:,} images; {state.schedule.total_steps} steps of {config.train.batch_size} "
        f"images; {config.train.precision} on {environment.device_name(world.device)}{processes}"
    )


def _read(values: list[Tensor]) -> Tensor:
    """Copy device scalars into one host tensor, in one transfer."""
    return torch.stack([value.detach().float().reshape(()) for value in values]).cpu()


def _peak_memory(world: World) -> int:
    if world.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(world.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
