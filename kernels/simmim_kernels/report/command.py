"""The command `python -m simmim_kernels.report`.

Every kernel launch of every case (an op on the tensors of a real model) is compiled ahead of time
for each target, and the machine code is read. Nothing is run:

- "compiled" figures are read from the machine code: registers, spills, shared memory, widths of
  global accesses, tensor-core opcodes, instructions; and occupancy, which follows from these.
- "modelled" figures are arithmetic: bytes moved, and those over the card's bandwidth. Kernel
  launches, caches and latency are not in the model, so the time is a floor and no forecast.

`--check golden.json` is the gate for CI, and `--export` writes PTX with the parameters of each
launch, so that anybody can replay it elsewhere.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import triton

from simmim_kernels.report.ahead_of_time import TARGETS
from simmim_kernels.report.cases import Case, cases
from simmim_kernels.report.figures import NOT_MEASURED, case_figures, compile_case
from simmim_kernels.report.golden import differences
from simmim_kernels.report.printing import as_json, as_table
from simmim_kernels.report.replay import export


def _parser(ops: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simmim_kernels.report",
        description=f"What the Triton kernels compile to; {NOT_MEASURED}.",
    )
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--op", nargs="+", choices=ops, default=ops)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write figures here, or print them"
    )
    parser.add_argument("--export", type=Path, metavar="DIR", help="write PTX and parameters here")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare with golden figures; 1 if worse"
    )
    return parser


def main(arguments: Sequence[str] | None = None, known: Sequence[Case] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        arguments: of the command line; None takes the process's.
        known: the cases to choose from; None takes `cases()`.
    """
    known = cases() if known is None else known
    parser = _parser(sorted({case.op for case in known}))
    options = parser.parse_args(arguments)
    golden = None
    if options.check is not None:
        try:
            golden = json.loads(options.check.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--check {options.check}: {error}")
    figures = []
    for case in known:
        if case.op not in options.op:
            continue
        for target in options.target:
            launches = compile_case(case, target)
            figures.append(case_figures(case, target, launches))
            if options.export:
                export(launches, case, target, options.export)
    content = as_json(figures)
    print(content if options.json == "-" else as_table(figures))
    if options.json not in (None, "-"):
        Path(options.json).write_text(content)
    if golden is None:
        return 0
    problems = differences(golden, json.loads(content))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and golden["triton"] != triton.__version__:
        versions = f"{golden['triton']}, and this is {triton.__version__}"
        print(f"The golden file is from triton {versions}.", file=sys.stderr)
    return 1 if problems else 0
