"""What a run shows and records: the progress line, log.txt, and records cut back on resume."""

import json
from contextlib import closing
from pathlib import Path

import pytest

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
