"""The `simmim recipes` command."""

import argparse

from simmim.command_line import recipe_folders


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim recipes`."""
    return argparse.ArgumentParser(
        prog="simmim recipes", description="The shipped configurations, by name."
    )


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser().parse_args(arguments)
    for folder in recipe_folders()[:1]:
        for path in sorted(folder.glob("*.toml")):
            first = path.read_text(encoding="utf-8").splitlines()[0]
            print(f"{path.stem:<30} {first.lstrip('# ')}")
    return 0
