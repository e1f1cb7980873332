"""The figures as a table for people and as JSON for machines."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import triton

from simmim_kernels.report.cards import CARDS
from simmim_kernels.report.figures import NOT_MEASURED, CaseFigures, KernelFigures
from simmim_kernels.report.machine_code import Access


def as_table(figures: Sequence[CaseFigures]) -> str:
    """The figures for people."""
    lines = [f"simmim_kernels, triton {triton.__version__}: {NOT_MEASURED}"]
    by_case: dict[str, list[CaseFigures]] = {}
    for one in figures:
        by_case.setdefault(one.case, []).append(one)
    for name, targets in by_case.items():
        rows = [HEADER]
        rows += [_row(one.target, launch) for one in targets for launch in one.launches]
        lines += ["", name, "  compiled:", *_aligned(rows), "  modelled:"]
        lines += [_traffic_line(one) for one in targets]
    return "\n".join(lines)


HEADER = (
    "target kernel grid warps regs spill shared occupancy load store tensor atomic instr".split()
)


def _row(target: str, launch: KernelFigures) -> list[str]:
    tensor_ops = ",".join(sorted({op.split(".")[0] for op in launch.tensor_ops})) or "-"
    return [
        target,
        launch.kernel,
        "x".join(str(n) for n in launch.grid),
        str(launch.num_warps),
        str(launch.registers),
        f"{launch.spill_bytes}B",
        f"{launch.shared_bytes}B",
        f"{launch.occupancy:.2f}",
        _widths(launch.loads),
        _widths(launch.stores),
        tensor_ops,
        str(launch.atomics),
        str(launch.instructions),
    ]


def _widths(access: Access) -> str:
    """Narrowest width on the hot path, and instructions of each width: "16B(16:8,1:2)"."""
    if not access.widths:
        return "-"
    counts = ",".join(f"{w}:{n}" for w, n in sorted(access.widths.items(), reverse=True))
    return f"{access.narrowest}B({counts})"


def _traffic_line(one: CaseFigures) -> str:
    card = CARDS[one.target]
    return (
        f"    {one.target}: {one.bytes_moved / 1e6:.3f} MB moved, {one.bytes_ratio:.2f} of the "
        f"fewest possible; {one.modelled_us:.2f} us at {card.bandwidth / 1e12:.2f} TB/s "
        f"({card.name})"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["    " + "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]


def as_json(figures: Sequence[CaseFigures]) -> str:
    """The figures for machines, a case a line; a golden file is this."""
    head = json.dumps({"label": NOT_MEASURED, "triton": triton.__version__})
    cases = ",\n".join(json.dumps(asdict(one), separators=(",", ":")) for one in figures)
    return f'{head[:-1]}, "cases": [\n{cases}\n]}}\n'
