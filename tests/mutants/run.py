"""Plants every fault by itself and says which tests notice.

    python tests/mutants/run.py [--only WORDS] [--jobs N] [--write]

A fault meets its own tests first, then those of its package, then the whole suite. What is known
is kept in build/mutants/, so a run that was stopped goes on. Where a package or its tests changed,
its faults are planted anew; --afresh plants all.
"""

import argparse
import hashlib
import json
import re
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutants.fault import ROOT, Fault, all_faults
from mutants.forked_pytest import TIMED_OUT
from mutants.slot import Slot, Slots

FOLDER = ROOT / "build" / "mutants"
RESULT = ROOT / "tests" / "mutants" / "result.txt"
FAILED, NO_TESTS = 1, 5
SUITE = ("tests",)
TIMEOUTS_S = {"own tests": 300.0, "package": 900.0, "suite": 3000.0}


def main() -> int:
    """The exit code: 0 where every fault was noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a fault's name or file")
    parser.add_argument("--jobs", type=int, default=2, help="copies that work at once")
    parser.add_argument("--stop-at", choices=TIMEOUTS_S, default="suite", help="the widest tests")
    parser.add_argument("--afresh", action="store_true", help="forget what is known")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write is for all faults: leave out --only")
    faults = [f for f in all_faults() if arguments.only in f.name or arguments.only in f.file]
    known = Results(FOLDER / "results.jsonl", faults, afresh=arguments.afresh)
    missing = [fault for fault in faults if fault.name not in known]
    print(f"{len(faults)} faults, {len(faults) - len(missing)} known from {known.path}", flush=True)
    if missing:
        plant(missing, known, max(1, min(arguments.jobs, len(missing))), arguments.stop_at)
    if missing := [fault.name for fault in faults if fault.name not in known]:
        print("not noticed so far:", *missing, sep="\n  ")
        return 1
    text = report(faults, known)
    print(text)
    if arguments.write:
        RESULT.write_text(text)
    return int(any(known[fault.name]["by"] == "nothing" for fault in faults))


class Results:
    """What is known of each fault, a line each, appended as soon as it is known.

    Args:
        path: of the file.
        faults: those that are asked for.
        afresh: whether to begin anew.
    """

    def __init__(self, path: Path, faults: list[Fault], *, afresh: bool) -> None:
        self.path, self._lock = path, threading.Lock()
        self._digests = {fault.name: digest(fault) for fault in faults}
        self._of: dict[str, dict[str, str]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if afresh:
            path.unlink(missing_ok=True)
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line, from a run that was killed
            if result["digest"] == self._digests.get(result["name"]):
                self._of[result["name"]] = result

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def __getitem__(self, name: str) -> dict[str, str]:
        return self._of[name]

    def add(self, name: str, by: str, test: str) -> None:
        """Keep what noticed a fault."""
        result = {"digest": self._digests[name], "name": name, "by": by, "test": test}
        with self._lock:
            self._of[name] = result
            with self.path.open("a") as file:
                file.write(json.dumps(result) + "\n")


def digest(fault: Fault) -> str:
    """Changes with the fault, with the package that it is planted in, and with its tests."""
    found = hashlib.sha256(repr(fault).encode())
    named = {test.partition("::")[0] for test in (*fault.own_tests, *fault.folder_tests)}
    for place in (str(Path(fault.file).parent), *sorted(named)):
        path = ROOT / place
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            found.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return found.hexdigest()


def plant(faults: list[Fault], known: Results, jobs: int, stop_at: str) -> None:
    """Find what notices each fault, several at once, and keep it in `known`."""
    slots, unplanted = Slots(FOLDER, jobs), Unplanted()

    def work(fault: Fault) -> tuple[Fault, str, str]:
        with slots.borrowed() as slot:
            return fault, *noticed_by(slot, fault, stop_at, unplanted)

    with ThreadPoolExecutor(jobs) as pool:
        for number, done in enumerate(as_completed([pool.submit(work, f) for f in faults]), 1):
            fault, by, test = done.result()
            if by != "broken" and (by != "nothing" or stop_at == "suite"):
                known.add(fault.name, by, test)
            print(f"{number}/{len(faults)} {by}: {fault.file}: {fault.name} {test}", flush=True)
    slots.close()


class Unplanted:
    """Which tests pass without any fault: others cannot notice one. Each is tried once."""

    def __init__(self) -> None:
        self._pass: dict[str, bool] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __call__(self, slot: Slot, test: str) -> bool:
        """Whether a file or node id passes."""
        with self._locks[test]:
            if test not in self._pass:
                self._pass[test] = slot.run((test,), TIMEOUTS_S["package"])[0] in (0, NO_TESTS)
            return self._pass[test]


def noticed_by(slot: Slot, fault: Fault, stop_at: str, unplanted: Unplanted) -> tuple[str, str]:
    """The narrowest tests that notice a fault, and the first of them."""
    if failing := [test for test in fault.own_tests if not unplanted(slot, test)]:
        return "broken", f"{failing[0]} fails without any fault"
    wider = {"own tests": fault.own_tests, "package": fault.folder_tests, "suite": SUITE}
    for by, tests in wider.items():
        with slot.planted(fault):
            code, output = slot.run(tests, TIMEOUTS_S[by])
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        if code == TIMED_OUT or code > 128:
            return by, "the run hung" if code == TIMED_OUT else f"signal {code - 128}"
        if code not in (0, FAILED, NO_TESTS):
            return "broken", output.strip().splitlines()[-1]
        if code == FAILED and (by == "own tests" or unplanted(slot, failed[0])):
            return by, failed[0]
        if by == stop_at:
            break
    return "nothing", ""


def report(faults: list[Fault], known: Results) -> str:
    """The result as text: sums, those that the tests of the file do not notice, and every file."""
    of = {fault: known[fault.name] for fault in faults}
    counts, total = Counter(result["by"] for result in of.values()), max(1, len(faults))
    own = counts["own tests"]
    package = own + counts["package"]
    lines = [
        "What notices the faults of tests/mutants/faults/: make test-mutants",
        "",
        f"{len(faults)} faults of one line, each planted by itself",
        f"{own} noticed by the tests of the file: {own / total:.1%}",
        f"{counts['package']} more by the tests of its package: {package / total:.1%}",
        f"{counts['suite']} more by the whole suite: {(package + counts['suite']) / total:.1%}",
        f"{counts['nothing']} by nothing",
    ]
    for by in ("nothing", "suite", "package"):
        lines += ["", f"noticed by {by}:"] if counts[by] else []
        lines += [
            f"  {_short(fault)}: {fault.name}: {result['test']}".rstrip(": ")
            for fault, result in of.items()
            if result["by"] == by
        ]
    lines += ["", "by the tests of the file, of all:"]
    noticed = Counter(_short(fault) for fault, result in of.items() if result["by"] == "own tests")
    for name, number in sorted(Counter(map(_short, faults)).items()):
        lines.append(f"  {noticed[name]:3} of {number:3}  {name}")
    return "\n".join(lines) + "\n"


def _short(fault: Fault) -> str:
    return fault.file.removeprefix("engine/simmim/")


if __name__ == "__main__":
    sys.exit(main())
