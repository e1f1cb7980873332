"""`simmim pack`: every flag arrives, exit codes, and what is told of a pack."""

import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recorded_calls import record
from simmim.commands import pack as command
from simmim.errors import DataError
from simmim.packing.options import Options
from simmim.packing.plan import Summary

CORES = len(os.sched_getaffinity(0))
SUMMARY = Summary(3, 2, 1_500, 999, Counter())


class Recorded:
    """The command with everything that it calls recorded."""

    def __init__(
        self, patch: pytest.MonkeyPatch, images: int = 3, *, parquet: bool = False
    ) -> None:
        self.source = SimpleNamespace(names=range(images))
        self.parquet = record(
            patch, command, "parquet_files", lambda **given: ["a.parquet"] if parquet else []
        )
        self.tables = record(patch, command, "ParquetSource", lambda **given: self.source)
        self.opened = record(patch, command, "open_source", lambda **given: self.source)
        self.labelled = record(patch, command, "labels_of", lambda **given: "labels")
        self.packed = record(patch, command, "pack", lambda **given: SUMMARY)
        self.measured = record(
            patch, command, "pack_statistics", lambda **given: ([0.5, 0.25], [0.125, 1 / 3])
        )
        sums = SimpleNamespace(skipped=2, mean_and_std=lambda: ([0.5], [0.25]))
        self.summed = record(patch, command, "statistics", lambda **given: sums)
        self.checked = record(patch, command, "verify", lambda **given: (9, []))

    def options(self) -> Options:
        (call,) = self.packed
        options = call["options"]
        assert isinstance(options, Options)
        return options


def test_defaults_arrive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = Recorded(monkeypatch)
    assert command.main(["photos", "packed"]) == 0
    assert called.parquet == [{"path": "photos"}]
    assert called.opened == [{"path": "photos"}]
    assert called.labelled == [{"source": called.source, "label_file": None}]
    (call,) = called.packed
    del call["tick"]
    assert call == {
        "source": called.source,
        "folder": Path("packed"),
        "options": Options(256, 90, False, 256, None, command.MAX_PIXELS, None, None),
        "labels": "labels",
        "workers": CORES,
    }
    assert called.measured == called.summed == called.checked == []
    assert capsys.readouterr().out == "packed: 3 images in 2 shards, 1.5 kB → 999 B\n"


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--short-side=64"], {"short_side": 64}),
        (["--quality=1"], {"quality": 1}),
        (["--quality=100"], {"quality": 100}),
        (["--keep-originals"], {"keep_originals": True, "short_side": None}),
        (["--images-per-shard=1"], {"images_per_shard": 1}),
        (["--shuffle=0"], {"shuffle": 0}),
        (["--shuffle=9"], {"shuffle": 9}),
        (["--max-pixels=77"], {"max_pixels": 77}),
        (["--value-range", "1", "2"], {"value_range": (1.0, 2.0)}),
        (["--channels=4"], {"channels": 4}),
    ],
)
def test_every_option_arrives(
    flags: list[str], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Recorded(monkeypatch)
    assert command.main(["photos", "packed", *flags]) == 0
    assert called.options() == Options(**{"images_per_shard": 256} | options)


def test_workers_and_labels_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Recorded(monkeypatch)
    assert command.main(["photos", "packed", "--workers=5", "--labels=l.csv"]) == 0
    assert called.packed[0]["workers"] == 5
    assert called.labelled[0]["label_file"] == Path("l.csv")


@pytest.mark.parametrize(
    ("images", "in_a_shard"),
    [(1, 256), (256 * 64, 256), (256 * 64 + 1, 257), (4096 * 64, 4096), (10**7, 4096)],
)
def test_a_shard_holds_a_64th_within_bounds(
    images: int, in_a_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Recorded(monkeypatch, images)
    assert command.main(["photos", "packed"]) == 0
    assert called.options().images_per_shard == in_a_shard


def test_statistics_of_a_pack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = Recorded(monkeypatch)
    assert command.main(["photos", "packed", "--stats", "--workers=2", "--max-pixels=7"]) == 0
    (call,) = called.measured
    del call["tick"]
    assert call == {"folder": Path("packed"), "workers": 2, "max_pixels": 7}
    assert len(called.packed) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "--data.mean=[0.500000,0.250000]",
        "--data.std=[0.125000,0.333333]",
    ]


def test_statistics_without_a_pack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = Recorded(monkeypatch)
    assert command.main(["photos", "--stats"]) == 0
    flags = ["--workers=2", "--max-pixels=7", "--value-range", "1", "2", "--channels=1"]
    assert command.main(["photos", "--stats", *flags]) == 0
    for call in called.summed:
        del call["tick"]
    default = {"source": called.source, "workers": CORES, "max_pixels": command.MAX_PIXELS,
               "value_range": None, "channels": None}  # fmt: skip
    given = {"workers": 2, "max_pixels": 7, "value_range": (1.0, 2.0), "channels": 1}
    assert called.summed == [default, default | given]
    assert called.packed == []
    captured = capsys.readouterr()
    assert captured.out == 2 * "--data.mean=[0.500000]\n--data.std=[0.250000]\n"
    assert captured.err == 2 * "simmim: 2 images could not be read\n"


def test_parquet_is_read_by_its_own_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = Recorded(monkeypatch, parquet=True)
    assert command.main(["photos", "packed"]) == 0
    assert [[*call.values()] for call in called.tables] == [[["a.parquet"]]]
    assert called.opened == []
    assert command.main(["photos", "packed", "--shuffle=0"]) == 2
    assert "photos: parquet has no random access" in capsys.readouterr().err


def test_a_sound_pack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called = Recorded(monkeypatch)
    assert command.main(["--verify=packed", "--workers=3"]) == 0
    (call,) = called.checked
    del call["tick"]
    assert call == {"folder": Path("packed"), "workers": 3}
    assert capsys.readouterr().out == "packed: 9 images, all sound\n"


@pytest.mark.parametrize(("count", "more"), [(1, 0), (20, 0), (21, 1), (30, 10)])
def test_problems_of_a_pack_are_told_and_counted(
    count: int, more: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Recorded(monkeypatch)
    problems = [f"problem {n}" for n in range(count)]
    record(monkeypatch, command, "verify", lambda **given: (9, problems))
    assert command.main(["--verify=packed"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines == problems[:20] + ([f"… and {more} more"] if more else [])
    assert captured.err == f"simmim: error: packed: {count} problems\n"


@pytest.mark.parametrize(
    ("arguments", "error", "code", "line"),
    [
        (["photos", "packed"], KeyboardInterrupt(), 130,
         "interrupted; what is finished stays, the same command goes on"),
        (["photos", "--stats"], KeyboardInterrupt(), 130, "interrupted"),
        (["--verify=packed"], KeyboardInterrupt(), 130, "interrupted"),
        (["photos", "packed"], DataError("photos: no image"), 2, "error: photos: no image"),
        (["photos", "packed"], OSError(28, "No space left on device"), 1,
         "error: photos: No space left on device"),
        (["--verify=packed"], OSError(5, "Input/output error"), 1,
         "error: packed: Input/output error"),
        (["photos", "packed"], MemoryError(), 1, "error: out of memory"),
    ],
)  # fmt: skip
def test_exit_codes(
    arguments: list[str],
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**given: Any) -> None:
        raise error

    Recorded(monkeypatch)
    for name in ("pack", "statistics", "verify"):
        record(monkeypatch, command, name, fail)
    assert command.main(arguments) == code
    assert capsys.readouterr().err == f"simmim: {line}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["photos"],
        ["photos", "--verify=packed"],
        ["photos", "packed", "--keep-originals", "--short-side=9"],
        ["photos", "packed", "--quality=0"],
        ["photos", "packed", "--quality=101"],
        ["photos", "packed", "--short-side=0"],
        ["photos", "packed", "--workers=0"],
        ["photos", "packed", "--workers=a"],
        ["photos", "packed", "--images-per-shard=0"],
        ["photos", "packed", "--max-pixels=0"],
        ["photos", "packed", "--channels=0"],
        ["photos", "packed", "--shuffle=-1"],
        ["photos", "packed", f"--shuffle={2**63}"],
    ],
)
def test_wrong_usage_packs_nothing(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = Recorded(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert called.packed == called.summed == called.checked == []


def test_what_was_skipped_is_told_with_its_reasons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Recorded(monkeypatch)
    summary = Summary(3, 1, 10**15, 2_500_000, Counter({"too large": 2, "broken": 5}))
    record(monkeypatch, command, "pack", lambda **given: summary)
    assert command.main(["photos", "packed"]) == 0
    assert capsys.readouterr().out == (
        "packed: 3 images in 1 shards, 1000.0 TB → 2.5 MB; "
        "skipped 7 (5 broken, 2 too large), see skipped.tsv\n"
    )


def ticking(patch: pytest.MonkeyPatch, seconds: list[float], *ticks: tuple[int, ...]) -> None:
    """A pack of 100 images whose progress is told as `ticks`, at `seconds` after its begin."""
    called = Recorded(patch, 100)
    clock = iter([0.0, *seconds])
    patch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def work(**given: Any) -> Summary:
        for tick in ticks:
            given["tick"](*tick)
        return SUMMARY

    record(patch, command, "pack", work)
    assert command.main(["photos", "packed"]) == 0
    assert called.opened


def test_progress_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 9.9 s is too early, and 15 s is too soon after the line at 10 s
    ticks = [(1, 0, 0), (30, 10, 20), (33, 10, 20), (40, 10, 20)]
    ticking(monkeypatch, [9.9, 10.0, 15.0, 20.0], *ticks)
    assert capsys.readouterr().err.splitlines() == [
        "packed 60/100 images  4.0 images/s  skipped 10  eta 0:10",
        "packed 70/100 images  2.5 images/s  skipped 10  eta 0:12",
    ]


def test_progress_before_the_first_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticking(monkeypatch, [10.0], (0, 0, 40))
    assert capsys.readouterr().err == "packed 40/100 images  0.0 images/s  eta ?\n"


def test_progress_of_a_check_has_no_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(**given: Any) -> tuple[int, list[str]]:
        given["tick"](50)
        return 50, []

    Recorded(monkeypatch)
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    record(monkeypatch, command, "verify", check)
    assert command.main(["--verify=packed"]) == 0
    assert capsys.readouterr().err == "checked 50 images  5.0 images/s\n"


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        shown: list[Any] = []
        bar_class = command.Progress

        class Bar(bar_class):  # type: ignore[misc, valid-type]
            def update(self, task: Any, **fields: Any) -> None:
                shown.append(fields)
                super().update(task, **fields)

        monkeypatch.setattr(command, "Progress", Bar)
        record(monkeypatch, command, "parquet_files")
        ticking(monkeypatch, [2.0], (30, 10, 20))
    os.close(ours)
    assert shown == [{"completed": 60, "note": "20.0 images/s  skipped 10"}]
