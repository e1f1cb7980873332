"""Compares figures with golden ones, and with limits that no golden file excuses."""

from typing import Any

from simmim_kernels.report.cards import SHARED_BYTES_EVERYWHERE

# Bytes moved over the fewest possible.
LARGEST_BYTES_RATIO = 1.05
# Windows of more than 64 tokens with a bias: its gradient reads qkv and grad_out once more, since
# no program can hold all of its sums. (The fewest are those of a table of positions, not of pairs.)
LARGEST_BYTES_RATIO_OF_TILED_BIAS = 1.4
# Registers and instructions over the golden ones.
LARGEST_GROWTH = 1.10


def largest_bytes_ratio(case: str) -> float:
    """How many times the fewest bytes a case may move."""
    tiled = ("window_attention/swin_large_192_w12", "window_attention/swinv2_base_192_w12/")
    tiled_bias = case.startswith(tiled)
    return LARGEST_BYTES_RATIO_OF_TILED_BIAS if tiled_bias else LARGEST_BYTES_RATIO


def differences(golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Problems of the figures: those that no golden file excuses, and what got worse.

    Golden figures of ops and targets that are not reported now are left alone, for the caller may
    have chosen some.

    Args:
        golden: the golden figures, as `as_json` writes them.
        now: the figures to judge, likewise.
    """
    expected_figures = {(one["case"], one["target"]): one for one in golden["cases"]}
    reported = {(one["case"], one["target"]) for one in now["cases"]}
    ops, targets = {_op(case) for case, _ in reported}, {target for _, target in reported}
    problems = [
        f"{case} {target}: in the golden file, and no longer reported"
        for case, target in expected_figures
        if (case, target) not in reported and _op(case) in ops and target in targets
    ]
    for one in now["cases"]:
        name = f"{one['case']} {one['target']}"
        expected = expected_figures.get((one["case"], one["target"]))
        if one["bytes_ratio"] > largest_bytes_ratio(one["case"]):
            problems.append(f"{name}: moves {one['bytes_ratio']:.3f} of the fewest bytes possible")
        kernels = [launch["kernel"] for launch in one["launches"]]
        if expected is None:
            problems.append(f"{name}: not in the golden file")
        elif kernels != (before := [launch["kernel"] for launch in expected["launches"]]):
            problems.append(f"{name}: launches {', '.join(kernels)}; golden {', '.join(before)}")
            expected = None
        for i, launch in enumerate(one["launches"]):
            where = f"{name} {launch['kernel']}"
            problems += [f"{where}: {problem}" for problem in _unacceptable(launch)]
            if expected is not None:
                worse = _worse(expected["launches"][i], launch)
                problems += [f"{where}: {problem}" for problem in worse]
    return problems


def _op(case_name: str) -> str:
    return case_name.split("/")[0]


def _unacceptable(launch: dict[str, Any]) -> list[str]:
    """Problems of one launch that no golden file excuses."""
    problems = []
    if launch["spill_bytes"] > 0:
        problems.append(f"spills {launch['spill_bytes']} bytes per thread")
    if launch["shared_bytes"] > SHARED_BYTES_EVERYWHERE:
        problems.append(
            f"{launch['shared_bytes']} bytes of shared memory, more than the "
            f"{SHARED_BYTES_EVERYWHERE} that every GPU has"
        )
    return problems


def _worse(golden: dict[str, Any], launch: dict[str, Any]) -> list[str]:
    """What got worse in one launch."""
    problems = []
    for kind in ("loads", "stores"):
        before, after = golden[kind]["narrowest"], launch[kind]["narrowest"]
        if 0 < after < before:
            problems.append(f"{kind} of {after} bytes on the hot path, golden {before}")
    for kind in ("registers", "instructions"):
        before, after = golden[kind], launch[kind]
        if after > LARGEST_GROWTH * before:
            problems.append(f"{after} {kind}, golden {before} ({after / before - 1:+.0%})")
    return problems
