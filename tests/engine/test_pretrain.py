"""What a pre-training run is made of, without a step of it: a stand-in takes what is trained."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from simmim import pretrain
from simmim.command_line import load
from simmim.distributed import World
from simmim.errors import DataError, RunError
from simmim.method.build import find_method
from simmim.observers import MethodMeasures, Pictures
from simmim.pretrain import _observers, _run, build_model, build_state
from simmim.run_folder import RunFolder
from simmim.validation import Validation
from small_run import CPU

WORLD = World(0, 1, CPU)


def config(*flags: str, recipe: str = "smoke") -> Any:
    return load([recipe, "--data.path=x", "--data.workers=0", *flags])


@dataclass
class Calls:
    """What the parts of a run were given."""

    trained: list[tuple[Any, ...]] = field(default_factory=list)
    logs: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    loaders: list[tuple[Any, ...]] = field(default_factory=list)
    closed: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Ten images that are not there, a log that writes nothing, and no steps."""
    made = Calls()

    class Log:
        def close(self) -> None:
            made.closed += 1

    def log(*given: Any, **options: Any) -> Log:
        made.logs.append((given, options))
        return Log()

    def train(*given: Any) -> int:
        made.trained.append(given)
        return 75

    source = SimpleNamespace(names=[f"{number}.jpg" for number in range(10)])
    monkeypatch.setattr(pretrain, "open_source", lambda path: source)
    monkeypatch.setattr(pretrain, "make_loader", lambda *given: made.loaders.append(given))
    monkeypatch.setattr(pretrain, "RunLog", log)
    monkeypatch.setattr(pretrain, "train", train)
    return made


def test_a_run_is_given_its_state_source_loader_folder_and_log(
    calls: Calls, tmp_path: Path
) -> None:
    folder, interrupts = RunFolder(tmp_path), object()
    chosen = config("--train.steps=7")
    assert _run(chosen, WORLD, folder, interrupts) == 75  # type: ignore[arg-type]
    [(state, source, make_loader, _, own_folder, log, own_interrupts)] = calls.trained
    assert state.config is chosen
    assert (own_folder, own_interrupts) == (folder, interrupts)
    assert calls.logs == [((folder, 7), {"is_main": True, "tensorboard": False})]
    assert calls.closed == 1
    assert hasattr(log, "close")
    make_loader()
    [(given, from_source, world, view)] = calls.loaders
    assert (given, from_source, world) == (chosen, source, WORLD)
    expected = find_method(chosen).view()
    assert (type(view), vars(view)) == (type(expected), vars(expected))


def test_tensorboard_and_the_process_reach_the_log(calls: Calls, tmp_path: Path) -> None:
    chosen, other = config("--log.tensorboard=true"), World(1, 1, CPU)
    _run(chosen, other, RunFolder(tmp_path), object())  # type: ignore[arg-type]
    assert calls.logs[0][1] == {"is_main": False, "tensorboard": True}


def test_a_folder_that_is_not_there_is_named_by_its_setting(tmp_path: Path) -> None:
    chosen = load(["smoke", f"--data.path={tmp_path / 'nowhere'}"])
    with pytest.raises(DataError, match=r"data\.path"):
        _run(chosen, WORLD, RunFolder(tmp_path), object())  # type: ignore[arg-type]


def test_images_to_validate_on_are_opened_before_anything_is_built(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "build_state", lambda *given: pytest.fail("it was built"))
    chosen = config(f"--validate.path={tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match=r"validate\.path"):
        _run(chosen, WORLD, RunFolder(tmp_path), object())  # type: ignore[arg-type]


def kinds_of_observers(chosen: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> list[type]:
    monkeypatch.setattr(Validation, "__init__", lambda self, method, world: None)
    method = find_method(chosen)
    draw: Any = object()
    monkeypatch.setattr(type(method), "picture", lambda self, source: draw)
    loader: Any = SimpleNamespace(source=None)
    return [type(each) for each in _observers(method, loader, world).observers]


def test_a_run_draws_and_validates_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    validates = "--validate.path=somewhere"
    for flags, world, expected in (
        ((), WORLD, [MethodMeasures, Pictures]),
        ((validates,), WORLD, [MethodMeasures, Pictures, Validation]),
        (("--log.picture_every_steps=-1", validates), WORLD, [MethodMeasures, Validation]),
        ((validates,), World(1, 2, CPU), [MethodMeasures, Validation]),
    ):
        assert kinds_of_observers(config(*flags), world, monkeypatch) == expected


def test_a_method_without_a_picture_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    method = find_method(config())
    monkeypatch.setattr(type(method), "picture", lambda self, source: None)
    loader: Any = SimpleNamespace(source=None)
    found = _observers(method, loader, WORLD).observers
    assert [type(each) for each in found] == [MethodMeasures]


def test_the_state_has_the_method_s_groups_loss_and_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = build_state(config(recipe="simsiam_smoke"), 10, WORLD).optimizer.param_groups
    assert [group.get("fixed_lr") for group in groups] == [None, True]  # SimSiam's own groups

    masked = config("--mask.ratio=0.3")
    method = find_method(masked)
    state = build_state(masked, 10, WORLD, method)
    assert state.mask is masked.mask
    wrapped: Any = object()
    state.wrapped = wrapped
    seen: list[Any] = []

    def loss(model: Any, batch: Any) -> Tensor:
        seen.append((model, batch))
        return torch.zeros(())

    monkeypatch.setattr(method, "loss", loss)
    batch: Any = object()
    state.loss_of(state, batch, 0)
    assert seen == [(wrapped, batch)]  # and not the model, whose gradients nobody would share


def test_the_first_weights_are_those_of_the_seed() -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(torch.randint(1000, ()).item())
        model = build_model(config(f"--seed={seed}"), CPU)
        return next(p for p in model.parameters() if p.ndim > 1).detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_a_backend_that_cannot_run_ends_the_run_before_it_begins() -> None:
    with pytest.raises(RunError, match=r"kernels\.backend=triton cannot run"):
        build_model(config("--kernels.backend=triton"), CPU)
