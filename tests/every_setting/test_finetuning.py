"""Every key of fine-tuning, changed, changes what settings/finetune.txt says."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from every_setting import recipes
from every_setting.case import Case, read_sections
from every_setting.inputs import labelled_inputs, write_pretrained
from every_setting.runs import Runs, one_thread
from simmim_kernels import native

SECTIONS = read_sections("finetune.txt")
NATIVE = "from weights, with native kernels"
RECIPES = {
    "from weights": recipes.FINETUNE,
    "with timm": recipes.FINETUNE_WITH_TIMM,
    "from scratch, swin": recipes.FROM_SCRATCH_SWIN,
    "from scratch, vit": recipes.FROM_SCRATCH_VIT,
}
CASES = [(name, case) for name in RECIPES for case in SECTIONS[name].cases]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("labelled")
    return labelled_inputs(folder) | {
        "pretrained": write_pretrained(folder / "pretrained.safetensors", 0),
        "other_weights": write_pretrained(folder / "other.safetensors", 1),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]) -> dict[str, Runs]:
    folder = tmp_path_factory.mktemp("finetuning")
    return {
        name: Runs("finetune", recipe, folder / str(number), inputs)
        for number, (name, recipe) in enumerate(RECIPES.items())
    }


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_finetuning(runs: dict[str, Runs], name: str, case: Case) -> None:
    runs[name].check(case)


@pytest.mark.skipif(native.extension is None, reason=f"no native kernels: {native.missing_reason}")
@pytest.mark.parametrize("case", SECTIONS[NATIVE].cases, ids=str)
def test_another_backend(runs: dict[str, Runs], case: Case) -> None:
    runs["from weights"].check(case)


def test_the_same_run_has_the_same_fingerprint(runs: dict[str, Runs]) -> None:
    settings = ["train.ema_decay=0.9", "log.tensorboard=true"]
    one, other = (runs["from weights"].make(settings).fingerprint for _ in range(2))
    assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} == set()
