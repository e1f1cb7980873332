"""The `simmim finetune` command."""

from simmim.command_line import load_finetuning
from simmim.commands.errors import run_training
from simmim.downstream.finetune import finetune


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code (0 done, 1 failed, 2 wrong input, 75 interrupted)."""
    return run_training(arguments, load_finetuning, finetune)
