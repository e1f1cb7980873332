"""The `simmim` command, as a script, in runs that wait at a step until a signal has been sent.

A tiny run is over in less than a second: without this, a signal that a busy machine sends late
would meet no run. `HOLD_ROWS` is how many rows of metrics.jsonl there must be before the optimiser
waits; `HOLD_UNTIL` is a file that lets it go on.
"""

import os
import sys
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_pre_hook

PATH = Path(__file__)


def environment(rows: int, until: Path) -> dict[str, str]:
    """Variables that hold a run whose metrics have `rows` rows until `until` exists."""
    return {"HOLD_ROWS": str(rows), "HOLD_UNTIL": str(until)}


def hold_if_asked() -> None:
    """Make optimisers of this process wait where the environment says so."""
    if "HOLD_ROWS" not in os.environ:
        return
    rows, until = int(os.environ["HOLD_ROWS"]), Path(os.environ["HOLD_UNTIL"])
    (output,) = (a.partition("=")[2] for a in sys.argv if a.startswith("--output="))

    def wait(*_: object) -> None:
        metrics = Path(output, "metrics.jsonl")
        while metrics.exists() and metrics.read_bytes().count(b"\n") >= rows and not until.exists():
            time.sleep(0.01)

    register_optimizer_step_pre_hook(wait)


if __name__ == "__main__":
    from simmim import cli

    hold_if_asked()
    sys.exit(cli.main(sys.argv[1:]))
