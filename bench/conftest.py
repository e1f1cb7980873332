"""Prints a table of ratios after the timings of bench/ops.py."""

from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in getattr(session, "benchmarks", []) if "ratio" in b.extra_info]
    if not measured:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ours against the published form, forward + backward")
    write(
        f"{'op':<36} {'ours':>9} {'eager':>8} {'compile':>8} {'copy':>7} {'clone':>7} "
        f"{'peak MiB ours/eager':>20}"
    )
    for benchmark in measured:
        info = benchmark.extra_info
        ratio = {k: f"{v:.1f}×" for k, v in info["ratio"].items()}
        share = {k: f"{v:.0%}" for k, v in info["share_of_copy_rate"].items()}
        peak = info["peak_bytes"]
        write(
            f"{benchmark.name.removeprefix('test_op[').rstrip(']'):<36} "
            f"{info['milliseconds']['ours']:>6.2f} ms {ratio.get('eager', '–'):>8} "
            f"{ratio.get('compile', '–'):>8} {share.get('copy', '–'):>7} "
            f"{share.get('clone', '–'):>7} "
            f"{peak['ours'] / 2**20:>10.1f} /{peak['eager'] / 2**20:>7.1f}"
        )
