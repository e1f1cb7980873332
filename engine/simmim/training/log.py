"""What a run shows and records: progress line, log.txt, metrics.jsonl, TensorBoard."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from simmim.errors import RunError
from simmim.run_folder import RunFolder
from simmim.training.records import append_rows, drop_rows_after, read_rows

WIDTH_FOR_A_BAR = 140


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03, or as 4:05 below an hour."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def progress_text(row: dict[str, Any], total_steps: int) -> str:
    """The progress line of a metrics row; the parts that matter least are at its end."""
    parts = [
        f"step {row['step']}/{total_steps}",
        f"epoch {row['epoch']:.2f}",
        f"loss {_number(row['loss'])}",
        f"eta {duration(row['eta_s'])}",
        f"{row['images_per_s']:.1f} img/s",
        f"data-wait {row['data_wait']:.0%}",
        f"lr {row['lr']:.2e}",
        f"grad {_number(row['grad_norm'])}",
        f"mem {row['peak_memory_bytes'] / 2**30:.1f} GiB",
    ]
    for trouble in ("skipped", "unreadable"):
        if row[trouble]:
            parts.insert(3, f"{trouble} {row[trouble]}")
    return "  ".join(parts)


def _number(value: float | None) -> str:
    return "non-finite" if value is None else f"{value:.4f}"


class RunLog:
    """Shows and records a run; processes other than the main one only show warnings.

    Args:
        folder: the run's folder.
        total_steps: steps of the run.
        is_main: whether this process shows and writes more than warnings.
        tensorboard: whether to write TensorBoard events too.

    Raises:
        RunError: TensorBoard was asked for and is not installed (from `start_after`).
    """

    def __init__(
        self, folder: RunFolder, total_steps: int, *, is_main: bool, tensorboard: bool
    ) -> None:
        self.folder, self.total_steps, self.is_main = folder, total_steps, is_main
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._tensorboard = tensorboard and is_main
        self._events: Any = None
        if is_main:
            folder.root.mkdir(parents=True, exist_ok=True)
            self._text = folder.log.open("a", encoding="utf-8", errors="backslashreplace")

    def start(self, step: int) -> None:
        """Begin to show progress, from `step` on."""
        if self.is_main and self._console.is_terminal:
            text = TextColumn("{task.description}")
            wide = self._console.width >= WIDTH_FOR_A_BAR
            columns = (BarColumn(bar_width=16), text) if wide else (text,)
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("starting", total=self.total_steps, completed=step)
            self._progress.start()

    def start_after(self, step: int) -> None:
        """Open TensorBoard, and drop the records after `step`, which a resumed run makes again."""
        if self._tensorboard:
            self._events = _open_events(self.folder.tensorboard, step)
        for path in self.folder.records if self.is_main else ():
            drop_rows_after(path, step)

    def recorded(self, path: Path) -> list[dict[str, Any]]:
        """The rows of a file of `RunFolder.records`; the main process alone has any."""
        return list(read_rows(path)) if self.is_main else []

    def record(self, path: Path, row: dict[str, Any]) -> None:
        """Add a row to a file of records, and its numbers to TensorBoard; main process only.

        Raises:
            OSError: it cannot be written.
        """
        append_rows(path, [row])
        if self._events is not None:
            for key, value in row.items():
                if isinstance(value, float) and math.isfinite(value):
                    self._events.add_scalar(f"{path.stem}/{key}", value, row["step"])

    def metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Record rows (one for each step), and show the last one."""
        if not self.is_main:
            return
        append_rows(self.folder.metrics, rows)
        line = progress_text(rows[-1], self.total_steps)
        if self._progress is None:
            self.info(line)
        else:
            self._progress.update(self._task, completed=rows[-1]["step"], description=line)
            self._write(line)
        if self._events is not None:
            for row in rows:
                for key in ("loss", "lr", "grad_norm", "images_per_s", "data_wait"):
                    if row[key] is not None:
                        self._events.add_scalar(f"train/{key}", row[key], row["step"])

    def picture(self, pixels: Any, step: int, name: str = "reconstruction") -> None:
        """Hand a picture, uint8 [H, W, 3], to TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, pixels, step, dataformats="HWC")

    def info(self, message: str) -> None:
        """Write a line to the terminal and to log.txt."""
        if self.is_main:
            self._console.print(Text(message), soft_wrap=True)
            self._write(message)

    def warn(self, message: str, *, shown: bool = True) -> None:
        """Show a warning in every process if `shown`, and record it in the main process."""
        if shown:
            self._console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)
        if self.is_main:
            self._write(f"warning: {message}")

    def _write(self, message: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._text.write(f"{stamp} {message}\n")
        self._text.flush()

    def stop_progress(self) -> None:
        """End the progress line, so that the last messages can follow it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """End the progress line and close the files."""
        self.stop_progress()
        if self._events is not None:
            self._events.close()
        if self.is_main:
            self._text.close()
        sys.stderr.flush()


def _open_events(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError(
            "log.tensorboard is on, but tensorboard is not installed: "
            "pip install 'simmim[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1)
