"""The `simmim recipes` command."""

import argparse

from simmim.command_line import recipe_folders


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    argparse.ArgumentParser(
        prog="simmim recipes", description="The shipped configurations, by name."
    ).parse_args(arguments)
    for folder in recipe_folders()[:1]:
        for path in sorted(folder.glob("*.toml")):
            first = path.read_text(encoding="utf-8").splitlines()[0]
            print(f"{path.stem:<30} {first.lstrip('# ')}")
    return 0
