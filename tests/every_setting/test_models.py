"""Every key of [model], changed, changes a model of its family as settings/model.txt says."""

from collections.abc import Iterator

import pytest

from every_setting.case import Case, read_sections
from every_setting.models import MODELS, Models, keys_of
from every_setting.runs import one_thread
from simmim.config.values import leaf_types

SECTIONS = read_sections("model.txt")
CASES = [(family, case) for family, section in SECTIONS.items() for case in section.cases]
VALUES = {"list": "[2]", "float": "0.5", "int": "2", "bool": "true"}
OTHERS = [
    (family, key)
    for family in MODELS
    for key in leaf_types()
    if key.startswith("model.") and key not in keys_of(family)
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    folder = tmp_path_factory.mktemp("models")
    return {family: Models(family, folder) for family in MODELS}


@pytest.mark.parametrize(("family", "case"), CASES, ids=lambda value: str(value))
def test_a_key_of_a_family(models: dict[str, Models], family: str, case: Case) -> None:
    models[family].check(case)


@pytest.mark.parametrize(("family", "key"), OTHERS)
def test_a_key_of_another_family_is_refused(
    models: dict[str, Models], family: str, key: str
) -> None:
    kind = str(leaf_types()[key])
    value = next(value for name, value in VALUES.items() if name in kind)
    made = models[family].make([f"{key}={value}"])
    assert f"{key} has no meaning for " in made.fingerprint["error"]
