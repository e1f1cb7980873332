"""What a run shows and records: the progress line, log.txt, and records cut back on resume."""

import io
import json
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from simmim.errors import RunError
from simmim.run_folder import RunFolder
from simmim.training.log import RunLog, duration, progress_text

ROW = {
    "step": 20,
    "epoch": 1.25,
    "loss": 0.5,
    "lr": 1e-4,
    "grad_norm": None,
    "images_per_s": 12.34,
    "data_wait": 0.07,
    "peak_memory_bytes": 3 * 2**30,
    "eta_s": 3723.0,
    "skipped": 0,
    "unreadable": 0,
}


def make_log(folder: Path, *, is_main: bool = True) -> RunLog:
    return RunLog(RunFolder(folder), 100, is_main=is_main, tensorboard=False)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (245, "4:05"), (3723.4, "1:02:03"), (float("inf"), "?"), (float("nan"), "?")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_line() -> None:
    assert progress_text(ROW, 100) == (
        "step 20/100  epoch 1.25  loss 0.5000  eta 1:02:03  12.3 img/s  data-wait 7%  "
        "lr 1.00e-04  grad non-finite  mem 3.0 GiB"
    )
    troubled = progress_text(ROW | {"skipped": 2, "unreadable": 7}, 100)
    assert "loss 0.5000  unreadable 7  skipped 2  eta" in troubled


def test_all_records_are_cut_back_on_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    rows = [{"step": step} for step in (1, 2, 3)]
    for path in folder.records:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with closing(make_log(tmp_path)) as log:
        log.start_after(2)
        for path in folder.records:
            assert log.recorded(path) == rows[:2]


def test_metrics_have_a_row_a_step_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(make_log(tmp_path)) as log:
        log.metrics([ROW | {"step": 19}, ROW])
        assert log.recorded(RunFolder(tmp_path).metrics) == [ROW | {"step": 19}, ROW]
    shown = capsys.readouterr().err
    assert "step 20/100" in shown
    assert "step 19/100" not in shown
    assert "step 20/100" in RunFolder(tmp_path).log.read_text()


def test_other_processes_warn_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(make_log(tmp_path, is_main=False)) as log:
        log.start_after(0)
        log.metrics([ROW])
        log.info("a line of the main process")
        log.warn("a worker died")
        log.warn("only recorded", shown=False)
        assert log.recorded(RunFolder(tmp_path).metrics) == []
    assert capsys.readouterr().err == "warning: a worker died\n"
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_adds_to_its_log(tmp_path: Path) -> None:
    for message in ("one", "two ✓"):
        with closing(make_log(tmp_path)) as log:
            log.info(message)
            log.warn(message, shown=False)
    lines = RunFolder(tmp_path).log.read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["one", "warning: one", "two ✓", "warning: two ✓"]


@pytest.mark.parametrize("width", [200, 80])
def test_a_terminal_shows_how_far_the_run_is(tmp_path: Path, width: int) -> None:
    with closing(make_log(tmp_path)) as log:
        screen = io.StringIO()
        log._console = Console(file=screen, force_terminal=True, width=width)
        log.start(7)
        assert log._progress is not None
        (task,) = log._progress.tasks
        assert (task.completed, task.total) == (7, 100)
        assert len(log._progress.columns) == (2 if width == 200 else 1)
        log.metrics([ROW])
        assert (task.completed, task.description) == (20, progress_text(ROW, 100))
        assert "step 20/100" in RunFolder(tmp_path).log.read_text()
        log.stop_progress()
        log.metrics([ROW | {"step": 30}])
    assert screen.getvalue().count("step 30/100") == 1


class Writer:
    """In the place of TensorBoard's: remembers what it is given."""

    made: list["Writer"]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.images: list[tuple[str, Any, int, str]] = []
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_image(self, name: str, pixels: Any, step: int, dataformats: str) -> None:
        self.images.append((name, pixels, step, dataformats))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    module: Any = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made = []
    return Writer.made


def test_tensorboard_gets_each_number_at_its_step(tmp_path: Path, written: list[Writer]) -> None:
    folder = RunFolder(tmp_path)
    rows = [ROW | {"step": step, "grad_norm": None if step == 19 else 2.0} for step in (19, 20)]
    with closing(RunLog(folder, 100, is_main=True, tensorboard=True)) as log:
        log.start_after(18)
        log.metrics(rows)
        log.picture("pixels", 20, "validation")
        log.record(folder.validations, {"step": 20, "psnr": 0.5, "n": 3, "bad": float("nan")})
    (writer,) = written
    assert (writer.folder, writer.closed) == (str(tmp_path / "tensorboard"), True)
    assert writer.purge_step == 19  # what was written for steps that are made again is dropped
    for step in (19, 20):
        found = {name: value for name, value, at in writer.scalars if at == step}
        expected = {"loss": 0.5, "lr": 1e-4, "images_per_s": 12.34, "data_wait": 0.07}
        expected |= {"grad_norm": 2.0} if step == 20 else {}
        wanted = {f"train/{key}": value for key, value in expected.items()}
        assert found == wanted | ({"validations/psnr": 0.5} if step == 20 else {})
    assert writer.images == [("validation", "pixels", 20, "HWC")]


@pytest.mark.parametrize(("is_main", "asked"), [(True, False), (False, True)])
def test_tensorboard_is_written_by_the_main_process_if_asked(
    tmp_path: Path, written: list[Writer], is_main: bool, asked: bool
) -> None:
    with closing(RunLog(RunFolder(tmp_path), 100, is_main=is_main, tensorboard=asked)) as log:
        log.start_after(0)
        log.metrics([ROW])
        log.picture("pixels", 20)
    assert written == []


def test_tensorboard_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        closing(RunLog(RunFolder(tmp_path), 100, is_main=True, tensorboard=True)) as log,
        pytest.raises(RunError, match=r"pip install 'simmim\[tensorboard\]'"),
    ):
        log.start_after(0)
