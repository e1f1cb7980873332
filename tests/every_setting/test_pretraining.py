"""Every key of pre-training, changed, changes what settings/pretrain.txt says."""

from collections.abc import Iterator

import pytest

from every_setting import recipes
from every_setting.case import Case, read_sections
from every_setting.inputs import write_deep_images, write_images
from every_setting.runs import Runs, one_thread
from simmim_kernels import native

SECTIONS = read_sections("pretrain.txt")
NATIVE = "simmim, with native kernels"
RECIPES = {"simmim": recipes.SIMMIM, "tokens": recipes.TOKENS, "simsiam": recipes.SIMSIAM}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    folder = tmp_path_factory.mktemp("pretraining")
    inputs = {
        "images": write_images(folder / "images", 12, 0),
        "others": write_images(folder / "others", 5, 1),
        "deep": write_deep_images(folder / "deep", 12, 2),
    }
    return {
        method: Runs("pretrain", recipe, folder / method, inputs)
        for method, recipe in RECIPES.items()
    }


@pytest.mark.parametrize("case", SECTIONS["simmim"].cases, ids=str)
def test_simmim(runs: dict[str, Runs], case: Case) -> None:
    runs["simmim"].check(case)


@pytest.mark.skipif(native.extension is None, reason=f"no native kernels: {native.missing_reason}")
@pytest.mark.parametrize("case", SECTIONS[NATIVE].cases, ids=str)
def test_another_backend(runs: dict[str, Runs], case: Case) -> None:
    runs["simmim"].check(case)


@pytest.mark.parametrize("case", SECTIONS["tokens"].cases, ids=str)
def test_tokens(runs: dict[str, Runs], case: Case) -> None:
    runs["tokens"].check(case)


@pytest.mark.parametrize("case", SECTIONS["simsiam"].cases, ids=str)
def test_simsiam(runs: dict[str, Runs], case: Case) -> None:
    runs["simsiam"].check(case)


def test_the_same_run_has_the_same_fingerprint(runs: dict[str, Runs]) -> None:
    settings = ["validate.path=$others", "log.picture_every_steps=0", "log.tensorboard=true"]
    one, other = (runs["simmim"].make(settings).fingerprint for _ in range(2))
    assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} == set()
