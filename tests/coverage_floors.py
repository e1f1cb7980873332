"""The lines and the branches that tests ran, each against its floor: coverage has one sum for both.

`python tests/coverage_floors.py FILE`, the output of `coverage json`; 1 where a floor is missed.
"""

import json
import sys
from pathlib import Path

# Least shares, in per cent, of the lines and of the branches.
LINES, BRANCHES = 95.0, 90.0


def shares(totals: dict[str, int]) -> tuple[float, float]:
    """Per cent of the lines and of the branches, from a summary of coverage."""
    return tuple(
        100 * totals[covered] / totals[whole] if totals[whole] else 100.0
        for covered, whole in (
            ("covered_lines", "num_statements"),
            ("covered_branches", "num_branches"),
        )
    )


def main(path: Path) -> int:
    """Print both shares, and the files below a floor; return the exit code."""
    report = json.loads(path.read_text())
    for name, file in sorted(report["files"].items()):
        lines, branches = shares(file["summary"])
        if lines < LINES or branches < BRANCHES:
            print(f"{lines:5.1f} % of lines  {branches:5.1f} % of branches  {name}")
    lines, branches = shares(report["totals"])
    print(f"lines    {lines:5.1f} %, at least {LINES:g} %")
    print(f"branches {branches:5.1f} %, at least {BRANCHES:g} %")
    return int(lines < LINES or branches < BRANCHES)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
