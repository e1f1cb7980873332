"""Names the long tests of the engine that notice none of the faults they could notice.

    python tests/mutants/weigh.py [--seconds S] [--faults N] [--jobs N] [--write]

The suite is timed first. Each test that takes longer meets planted faults, those of its own file
and package before others, until it notices one. One that notices none is a candidate to go, unless
there is another reason for it: say so in REASONS.
"""

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutants.fault import ROOT, Fault, all_faults
from mutants.run import FOLDER, TIMEOUTS_S, Unplanted
from mutants.slot import Slot, Slots

FOLDERS = ("tests/engine", "tests/end_to_end")
RESULT = ROOT / "tests" / "mutants" / "long_tests.txt"

# A part of a test's name, and why it stays although it notices no fault of one line.
REASONS = {
    "in_two_processes": "stays: Lightning's own processes and the engine agree, over real gloo",
    "two_processes_are_one": "stays: whole runs in real processes, gradients shared over gloo",
    "processes_share": "stays: whole runs in real processes, sums shared over gloo",
    "test_golden": "stays: published numbers in low precision",
    "golden_gradients": "stays: published numbers, recomputed",
    "test_one_file_each": "stays: the only proof that CONTRIBUTING.md's files train as they stand",
    "compiles_without_graph_breaks": "stays: a new torch breaks graphs where no line of ours does",
    "signal": "stays: a real process and a real signal, which no line in process stands for",
    "killed": "stays: a real SIGKILL at any moment, and a resumed run that ends bitwise equal",
    "cannot_change_midway": "stays: its seconds are those of the run that its file shares",
    "leaves_everything_behind": "stays: its seconds are those of the run that its file shares",
    "finished_run_is_never_rewritten": "stays: its seconds are those of the run that is shared",
    "damaged_newest_checkpoint": "stays: a whole run goes on from the checkpoint before",
    "test_hugging_face_trainer": "stays: the documented script, as another library runs it",
    "dali_sees_the_same_crops": "stays: DALI's whole path against ours",
    "precisions_and_options_train": "stays: every precision and option, in whole runs",
    "test_plain_loop": "stays: the documented example, run as it stands",
}


def main() -> None:
    """Print, and with --write keep, what each long test noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="a test that takes longer is long"
    )
    parser.add_argument("--faults", type=int, default=20, help="the most that a test meets")
    parser.add_argument("--jobs", type=int, default=2, help="copies that work at once")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    slots, unplanted, faults = Slots(FOLDER, arguments.jobs), Unplanted(), all_faults()

    def weigh(timed: tuple[str, float]) -> str:
        test, seconds = timed
        with slots.borrowed() as slot:
            fails = not unplanted(slot, test)
            met = [] if fails else nearest(test, faults)[: arguments.faults]
            noticed = first_noticed(slot, test, met)
        reason = next((why for part, why in REASONS.items() if part in test), "A CANDIDATE TO GO")
        reason = "FAILS WITHOUT ANY FAULT" if fails else reason
        line = f"{seconds:5.1f} s  {test}: {f'notices “{noticed}”' if noticed else reason}"
        print(line, flush=True)
        return line

    with ThreadPoolExecutor(arguments.jobs) as pool:
        lines = list(pool.map(weigh, long_tests(arguments.seconds)))
    slots.close()
    if arguments.write:
        head = f"Tests of more than {arguments.seconds:g} s, and a fault that each notices: "
        RESULT.write_text("\n".join([head + "python tests/mutants/weigh.py", "", *lines, ""]))


def long_tests(seconds: float) -> list[tuple[str, float]]:
    """Node ids and seconds, set-up included, longest first."""
    command = [sys.executable, "-m", "pytest", *FOLDERS, "-m", "not slow", "-q", "-n", "2",
               "--dist=worksteal", "--durations=0", "--durations-min=0.2"]  # fmt: skip
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    spent: dict[str, float] = {}
    line = re.compile(r"^([\d.]+)s (?:call|setup|teardown) +(.+?)$", re.MULTILINE)
    for time, test in line.findall(printed):
        spent[test] = spent.get(test, 0.0) + float(time)
    return sorted(
        ((test, time) for test, time in spent.items() if time > seconds), key=lambda t: -t[1]
    )


def nearest(test: str, faults: list[Fault]) -> list[Fault]:
    """The faults, those that are meant for the test's own file or package first."""
    path = test.partition("::")[0]

    def distance(fault: Fault) -> int:
        if any(own.partition("::")[0] == path for own in fault.own_tests):
            return 0
        return 1 if any(path.startswith(folder) for folder in fault.folder_tests) else 2

    def meaning(text: str) -> set[str]:
        return {word.removesuffix("s") for word in re.findall(r"[a-z]{4,}", text.lower())}

    words = meaning(test)

    def order(fault: Fault) -> tuple[int, int]:
        return distance(fault), -len(words & meaning(fault.name + fault.file))

    own = sorted(faults, key=order)
    near = [fault for fault in own if distance(fault) < 2]
    far = [fault for fault in own if distance(fault) == 2]
    # A test of the whole meets first what its name speaks of, then a few of every list.
    alike = [fault for fault in far if order(fault)[1] < 0][:10]
    rest = [fault for fault in far if fault not in alike]
    return near + alike + [rest[i] for start in range(37) for i in range(start, len(rest), 37)]


def first_noticed(slot: Slot, test: str, faults: list[Fault]) -> str:
    """The name of the first fault that the test notices, or ""."""
    for fault in faults:
        with slot.planted(fault):
            if slot.run((test,), TIMEOUTS_S["own tests"])[0] != 0:
                return fault.name
    return ""


if __name__ == "__main__":
    main()
