"""Keys of earlier versions: TOML files, flags and checkpoints that have them go on working."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from simmim.command_line import load, load_finetuning
from simmim.config.finetune import FinetuneConfig
from simmim.config.moved_keys import current_key, move_keys, moved_value
from simmim.config.sections import Config
from simmim.config.values import config_class, from_dict, leaf_types, to_toml
from simmim.errors import ConfigError
from simmim.method.simmim import SimMIM, SimMIMConfig
from simmim.pretrain import build_model
from simmim.training.checkpoint import Loaded
from simmim.training.resume import changes_since
from small_run import CPU

NOTE = "simmim: model.norm_target is method.norm_target now, and was taken as that\n"


def old_toml(folder: Path, recipe: str, norm_target: int) -> str:
    """The resolved configuration of a run of an earlier version."""
    loading = load_finetuning if recipe.startswith("finetune_") else load
    config = loading([recipe, "--data.path=photos", "--output=run"])  # type: ignore[operator]
    lines = to_toml(config).splitlines()
    lines = [line for line in lines if not line.startswith("norm_target")]
    lines.insert(lines.index("[model]") + 1, f"norm_target = {norm_target}")
    path = folder / "config.toml"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("by_flag", [False, True])
def test_norm_target_moved_to_its_method(
    by_flag: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["smoke", "--data.path=photos", "--output=run"]
    new = load([*flags, "--method.norm_target=7"])
    assert capsys.readouterr().err == ""
    if by_flag:
        old = load([*flags, "--model.norm_target=7"])
    else:
        old = load([old_toml(tmp_path, "smoke", 7)])
    assert capsys.readouterr().err == NOTE
    assert old == new
    model = build_model(old, CPU)
    assert isinstance(model, SimMIM)
    assert model.norm_target == 7
    assert "model.norm_target" not in leaf_types(type(old))


@pytest.mark.parametrize("recipe", ["smoke", "tokens_smoke", "simsiam_smoke"])
def test_one_that_was_not_set_needs_no_word(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = old_toml(tmp_path, recipe, 0)
    assert load([path]) == load([recipe, "--data.path=photos", "--output=run"])
    assert capsys.readouterr().err == ""


def test_a_finetuning_run_had_it_too(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('pretrained = "run"\n[model]\nnorm_target = 0\n[data]\npath = "photos"\n')
    assert load_finetuning([str(path)]).data.path == "photos"
    path.write_text(path.read_text().replace("= 0", "= 7"))
    with pytest.raises(ConfigError, match="leave it out"):
        load_finetuning([str(path)])


@pytest.mark.parametrize("recipe", ["tokens_smoke", "simsiam_smoke"])
def test_it_is_refused_where_it_never_had_a_meaning(recipe: str, tmp_path: Path) -> None:
    for arguments in (
        [old_toml(tmp_path, recipe, 47)],
        [recipe, "--data.path=photos", "--model.norm_target=47"],
    ):
        with pytest.raises(
            ConfigError, match=r"model\.norm_target is method\.norm_target"
        ) as error:
            load(arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", ["smoke", "simsiam_smoke"])
def test_a_checkpoint_of_before(recipe: str) -> None:
    """What it was trained with is known; what was ignored then does not stop it now."""
    config = load([recipe, "--data.path=photos"])
    saved = asdict(config)
    saved["model"]["norm_target"] = 7
    saved["method"].pop("norm_target", None)
    moved, _ = move_keys(saved, type(config), strict=False)
    assert saved["model"]["norm_target"] == 7
    before = from_dict(moved, type(config))
    assert getattr(before.method, "norm_target", None) == (7 if recipe == "smoke" else None)
    assert before.model == config.model


@pytest.mark.parametrize(("now", "refused"), [(7, False), (9, True)])
def test_a_run_of_before_is_resumed_as_what_it_was(now: int, refused: bool) -> None:
    config = load(["smoke", "--data.path=photos", f"--method.norm_target={now}"])
    saved, images = asdict(config), {"images": 3, "digest": "d"}
    saved["model"]["norm_target"] = 7
    del saved["method"]["norm_target"]
    checkpoint = Loaded(Path("step_4"), {"config": saved, "data": images}, {}, {}, {})
    if refused:
        with pytest.raises(ConfigError, match=r"method\.norm_target was 7 in step_4 and is 9 now"):
            changes_since(checkpoint, config, images)
    else:
        assert changes_since(checkpoint, config, images) == []


OLD, NEW = "model.norm_target", "method.norm_target"
SIMMIM = config_class(SimMIMConfig)


def test_where_a_key_stands_now() -> None:
    assert current_key(OLD, SIMMIM) == NEW
    assert current_key("train.steps", SIMMIM) == "train.steps"
    assert current_key(NEW, SIMMIM) == NEW
    for cls in (Config, FinetuneConfig):
        with pytest.raises(ConfigError, match=f"^{OLD} is {NEW} of method.name=simmim now"):
            current_key(OLD, cls)


def test_other_settings_stay_where_they_are() -> None:
    values = {"seed": 3, "model": {"name": "swin_tiny", "norm_target": 7}, "data": {"path": "x"}}
    moved, notes = move_keys(values, SIMMIM, strict=True)
    assert moved == {
        "seed": 3,
        "model": {"name": "swin_tiny"},
        "data": {"path": "x"},
        "method": {"norm_target": 7},
    }
    assert notes == [moved_value(OLD, NEW)] == [f"{OLD} is {NEW} now, and was taken as that"]
    assert values["model"] == {"name": "swin_tiny", "norm_target": 7}


def test_the_key_of_now_comes_before_that_of_then() -> None:
    values = {"model": {"norm_target": 7}, "method": {"name": "simmim", "norm_target": 9}}
    moved, notes = move_keys(values, SIMMIM, strict=True)
    assert moved == {"model": {}, "method": {"name": "simmim", "norm_target": 9}}
    assert len(notes) == 1
    assert values["method"] == {"name": "simmim", "norm_target": 9}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("cls", [SIMMIM, Config])
def test_one_that_changed_nothing_is_left_out(strict: bool, cls: type[Config]) -> None:
    assert move_keys({"model": {"norm_target": 0}}, cls, strict=strict) == ({"model": {}}, [])


def test_one_without_a_place_now() -> None:
    values = {"model": {"norm_target": 7}}
    assert move_keys(values, Config, strict=False) == ({"model": {}}, [])
    with pytest.raises(ConfigError, match="leave it out"):
        move_keys(values, Config, strict=True)


@pytest.mark.parametrize("values", [{}, {"model": "swin"}, {"model": {}}, {"train": {"steps": 1}}])
def test_settings_of_now_need_no_word(values: dict[str, Any]) -> None:
    assert move_keys(values, SIMMIM, strict=True) == (values, [])
