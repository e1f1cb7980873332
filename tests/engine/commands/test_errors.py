"""Exit codes: 2 for input that cannot be used, 1 for the machine and what fails under way."""

import errno
from typing import Any

import pytest

from simmim.command_line import load
from simmim.commands.errors import end, one_line_errors, run_training
from simmim.errors import ConfigError, DataError, RunError
from simmim.training.checkpoint import CheckpointError
from simmim.training.loop import RunStopped

FULL = OSError(errno.ENOSPC, "No space left on device", "out.npy")
NAMELESS = OSError(errno.EMFILE, "Too many open files")
MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")
TORCH_ON_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: 4503599627370496 bytes")
NUMPY = MemoryError("Unable to allocate 256. PiB for an array")
REMEDY = "try a larger --train.accumulation_steps, or --train.activation_checkpointing=true"


def ended(capsys: pytest.CaptureFixture[str], error: Exception, **options: Any) -> tuple[int, str]:
    code = end(error, **options)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return code, captured.err.removesuffix("\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("optim.lr=0 must be above 0"), 2, "optim.lr=0 must be above 0"),
        (DataError("x: no image"), 2, "x: no image"),
        (ValueError("give one"), 2, "give one"),
        (RunError("no CUDA device"), 1, "no CUDA device"),
        (FULL, 1, "out.npy: No space left on device"),
        (NAMELESS, 1, "Too many open files"),
        (MEMORY, 1, "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)"),
        (TORCH_ON_CPU, 1, f"out of memory ({TORCH_ON_CPU})"),
        (NUMPY, 1, "out of memory (Unable to allocate 256. PiB for an array)"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_a_command(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(capsys, error) == (code, f"simmim: error: {line}")

    def main(arguments: list[str]) -> int:
        raise error

    assert one_line_errors(main)([]) == code
    assert capsys.readouterr().err == f"simmim: error: {line}\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("optim.lr=0 must be above 0"), 2, "optim.lr=0 must be above 0"),
        (DataError("data.path=x: no image"), 2, "data.path=x: no image"),
        (RunStopped("step 9: the data is gone"), 1, "step 9: the data is gone"),
        (CheckpointError("cannot be written"), 1, "cannot be written"),
        (FULL, 1, "out.npy: No space left on device; the same command resumes the run"),
        (NAMELESS, 1, "runs/smoke: Too many open files; the same command resumes the run"),
        (MEMORY, 1, f"out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); {REMEDY}"),
        (TORCH_ON_CPU, 1, f"out of memory ({TORCH_ON_CPU}); {REMEDY}"),
        (NUMPY, 1, f"out of memory ({NUMPY}); {REMEDY}"),
    ],
)
def test_a_run(error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def train(config: object) -> int:
        raise error

    assert run_training(["smoke", "--data.path=x"], load, train) == code
    assert capsys.readouterr().err == f"simmim: error: {line}\n"


def test_a_run_that_could_not_be_read_has_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    def load_nothing(arguments: list[str]) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    assert run_training(["smoke"], load_nothing, lambda config: 0) == 1
    assert capsys.readouterr().err == (
        "simmim: error: Too many open files; the same command resumes the run\n"
    )


@pytest.mark.parametrize("code", [0, 75])
def test_a_run_that_ends_by_itself(code: int) -> None:
    assert run_training(["smoke", "--data.path=x"], load, lambda config: code) == code


def test_faults_of_ours_are_no_one_liners() -> None:
    for fault in (RuntimeError("shape"), KeyError("x"), BrokenPipeError(), TypeError("memory")):
        with pytest.raises(type(fault)):
            end(fault)
    with pytest.raises(ValueError, match="shape"):
        end(ValueError("shape"), training=True)


def test_one_process_tells_what_all_of_them_find(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert end(ConfigError("wrong"), training=True) == 2
    assert end(ConfigError("wrong")) == 2
    assert capsys.readouterr().err == ""
    # the others may see other data
    assert ended(capsys, DataError("no image"), training=True) == (
        2,
        "simmim: error (process 3): no image",
    )
