"""The `simmim pretrain` command."""

from simmim.command_line import load
from simmim.commands.errors import run_training
from simmim.pretrain import pretrain


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 failed, 2 wrong input, 75 interrupted)."""
    return run_training(arguments, load, pretrain)
