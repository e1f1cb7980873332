"""Every argument of every command, changed, changes what settings/flags.txt says."""

from collections.abc import Iterator

import pytest

from every_setting.calls import Calls
from every_setting.case import Case, read_sections
from every_setting.inputs import command_inputs
from every_setting.runs import one_thread

ALONE = ("--workers=0", "--device=cpu")
SETS = ("checkpoint=$weights", "--train=$train", "--val=$val", "--output=out", *ALONE)

# What every call of a command is given.
GIVEN = {
    "reconstruct": ("checkpoint=$weights", "images=$photo", "--mask-unit=8"),
    "evaluate": ("checkpoint=$classifier", "source=$val", *ALONE),
    "predict": ("checkpoint=$classifier", "images=$photo", *ALONE),
    "probe": (*SETS, "--epochs=2", "--rates=0.1"),
    "knn": (*SETS, "--k=5"),
    "features": ("checkpoint=$weights", "source=$val", "out=out.safetensors", *ALONE),
    "convert": ("source=$weights", "target=out.safetensors", "--to=official"),
    "export": ("run=$weights", "folder=out"),
    "pack": ("source=$train", "folder=out", "--workers=1"),
    "models": ("names=swin_tiny",),
}
SECTIONS = read_sections("flags.txt")
CASES = [(command, case) for command in SECTIONS for case in SECTIONS[command].cases]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Calls]:
    folder = tmp_path_factory.mktemp("flags")
    inputs = command_inputs(folder / "inputs")
    return {
        command: Calls(command, given, folder / command, inputs) for command, given in GIVEN.items()
    }


@pytest.mark.parametrize(("command", "case"), CASES, ids=str)
def test_a_flag(calls: dict[str, Calls], command: str, case: Case) -> None:
    calls[command].check(case)
