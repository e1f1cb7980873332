"""Every setting has a case, and a setting that does not act is noticed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from every_setting import found, recipes
from every_setting.calls import parser_of
from every_setting.case import Case, check
from every_setting.inputs import write_images
from every_setting.runs import Runs, one_thread
from simmim import command_line
from simmim.cli import COMMANDS
from simmim.config.bounds import bounded
from simmim.config.finetune import FinetuneConfig, FinetuneTrainConfig
from simmim.config.sections import TrainConfig
from simmim.method.simmim import SimMIMConfig
from simmim.training import build


@pytest.mark.parametrize(
    "problems",
    [
        found.problems_of_pretraining,
        found.problems_of_models,
        found.problems_of_finetuning,
        found.problems_of_flags,
        found.problems_of_reasons,
    ],
    ids=lambda function: function.__name__,
)
def test_every_setting_is_listed(problems: Callable[[], list[str]]) -> None:
    assert problems() == []


def test_a_new_key_needs_a_case() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Method(SimMIMConfig):
        planted: int = 0

    (line,) = found.problems_of_pretraining({"simmim": Method, **_others("simmim")})
    assert line.startswith("method.planted has no case: say in [simmim] of pretrain.txt")

    @dataclass(frozen=True, kw_only=True)
    class Train(FinetuneTrainConfig):
        planted: int = 0

    @dataclass(frozen=True, kw_only=True)
    class Finetune(FinetuneConfig):
        train: Train = field(default_factory=Train)

    (line,) = found.problems_of_finetuning(Finetune)
    assert line.startswith("train.planted has no case: say in finetune.txt")


def test_a_new_flag_needs_a_case() -> None:
    parsers = {name: parser_of(name) for name in COMMANDS if name not in found.TRAIN}
    parsers["knn"].add_argument("--planted", action="store_true")
    (line,) = found.problems_of_flags(parsers)
    assert line == "--planted has no case: say in [knn] of flags.txt what changes with it"
    parsers["knn"] = parser_of("predict")
    assert "--temperature is in [knn] of flags.txt, and is no setting" in (
        found.problems_of_flags(parsers)
    )
    del parsers["knn"]
    assert found.problems_of_flags(parsers) == [
        "[knn] is in flags.txt, and there is nothing of this name"
    ]


def _others(*left_out: str) -> dict[str, Any]:
    methods = found.methods()
    return {name: methods[name].Settings for name in methods if name not in left_out}


def test_a_case_of_no_key_is_superfluous() -> None:
    lines = found.problems_of_pretraining({"tokens": SimMIMConfig, **_others("tokens")})
    assert "method.mlp_depth is in [tokens] of pretrain.txt, and is no setting" in lines
    lines = found.problems_of_pretraining(_others("tokens"))
    assert lines == ["[tokens] is in pretrain.txt, and there is nothing of this name"]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    inputs = {"images": write_images(tmp_path / "images", 12, 0)}
    return Runs("pretrain", recipes.SIMMIM, tmp_path / "runs", inputs)


def test_a_value_that_does_not_arrive_is_noticed(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("optim.betas", "[0.8,0.9]", ("weights",))
    with one_thread():
        runs.check(case)
        make, runs.known = build.build_optimizer, {}

        def forgetful(model: Any, config: Any, groups: Any) -> Any:
            return make(model, replace(config, betas=(0.9, 0.999)), groups)

        monkeypatch.setattr(build, "build_optimizer", forgetful)
        with pytest.raises(AssertionError, match=r"betas.* weights stayed .*\(changed: nothing\)"):
            runs.check(case)


def test_a_key_that_is_only_repeated_is_noticed(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Train(TrainConfig):
        """Length and arithmetic of the run."""

        planted: float = bounded(1.0, low=0)
        """Nothing asks for it, but config.toml, state.json and others hold it."""

    @dataclass(frozen=True, kw_only=True)
    class Planted(command_line.config_class(SimMIMConfig)):  # type: ignore[misc]
        """Pre-training run."""

        train: Train = field(default_factory=Train)

    monkeypatch.setattr(command_line, "config_class", lambda settings: Planted)
    with one_thread():
        before, after = runs.make([]), runs.make(["train.planted=2"])
    assert (before.settings["train.planted"], after.settings["train.planted"]) == (1.0, 2.0)
    for observable in before.fingerprint:
        with pytest.raises(AssertionError, match=f"planted=2: {observable} stayed"):
            check(Case("train.planted", "2", (observable,)), before.fingerprint, after.fingerprint)


def test_what_must_stay_and_what_is_not_observed_are_noticed() -> None:
    case = Case("x", "1", ("losses",), ("rates",))
    before = {"losses": 1, "rates": 1}
    check(case, before, {"losses": 2, "rates": 1})
    with pytest.raises(AssertionError, match="changed rates too"):
        check(case, before, {"losses": 2, "rates": 2})
    with pytest.raises(AssertionError, match="nothing of the name rates is observed"):
        check(case, {"losses": 1}, {"losses": 2})
