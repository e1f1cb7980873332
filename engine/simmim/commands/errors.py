"""How a command ends that cannot go on: with one line on standard error, and an exit code."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, TypeVar

from simmim.environment import Launch
from simmim.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from simmim.config.sections import RunConfig

# The machine, or a run that was under way; and what a command was given.
FAILED, WRONG_INPUT = 1, 2

ConfigT = TypeVar("ConfigT", bound="RunConfig")


def one_line_errors(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """A command that ends as `end` says."""

    @wraps(main)
    def run(arguments: list[str]) -> int:
        try:
            return main(arguments)
        except Exception as error:
            return end(error)

    return run


def run_training(
    arguments: list[str], load: Callable[[list[str]], ConfigT], train: Callable[[ConfigT], int]
) -> int:
    """A command that trains: its exit code is that of the run, or of `end`.

    Args:
        arguments: of the command.
        load: makes a configuration of them.
        train: runs it.
    """
    output = ""
    try:
        config = load(arguments)
        output = config.output
        return train(config)
    except Exception as error:
        return end(error, place=output, training=True)


def end(error: Exception, *, place: str = "", training: bool = False) -> int:
    """Print an error as one line; returns the exit code.

    Input that cannot be used (configuration, data, an argument's value) is 2. The machine's state,
    and data that fails under way, are 1.

    Args:
        error: what a command raised; a fault of ours is raised again.
        place: the file or folder of an error that names none.
        training: whether a run was to be made, which can be resumed, and in which a ValueError is
            a fault of ours.
    """
    if isinstance(error, ConfigError):
        # every process finds the same fault; one of them says it
        return fail(str(error), WRONG_INPUT) if Launch.of_environment().rank == 0 else WRONG_INPUT
    if isinstance(error, DataError) or (isinstance(error, ValueError) and not training):
        return fail(str(error), WRONG_INPUT)
    if isinstance(error, RunError):
        return fail(str(error), FAILED)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        where = error.filename or place
        text = f"{where}: " if where else ""
        resume = "; the same command resumes the run" if training else ""
        return fail(f"{text}{error.strerror or error}{resume}", FAILED)
    if _is_out_of_memory(error):
        remedy = (
            "; try a larger --train.accumulation_steps, or --train.activation_checkpointing=true"
        )
        told = str(error).partition("\n")[0]
        text = f"out of memory ({told})" if told else "out of memory"
        return fail(f"{text}{remedy if training else ''}", FAILED)
    raise error


def fail(message: str, code: int) -> int:
    """Print an error, with the number of the process where it is not the first; returns `code`."""
    rank = Launch.of_environment().rank
    where = f" (process {rank})" if rank else ""
    print(f"simmim: error{where}: {message}", file=sys.stderr)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):  # Python's and NumPy's
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in told or "can't allocate memory" in told
    )
