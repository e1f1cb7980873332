"""One optimiser step: the update of the whole batch, clipping once, skipping what is not finite."""

import copy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simmim.data.loader import Batch
from simmim.method.build import find_method
from simmim.optim import build_optimizer
from simmim.precision import GROWTH_INTERVAL, LossScale
from simmim.step import Metrics, TrainState, train_step
from small_run import CPU, make_batch, make_state, weights


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 2e-6) -> None:
    for name in a:
        # a key bias has no gradient but rounding noise, which AdamW turns into whole steps
        if not name.endswith("attn.qkv.bias"):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


def run(state: TrainState, steps: list[list[Batch]]) -> list[Metrics]:
    return [train_step(state, batches) for batches in steps]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_loss_falls(precision: str) -> None:
    state = make_state("--train.steps=30", f"--train.precision={precision}")
    batch = make_batch(0, 8)
    metrics = run(state, [[batch]] * 30)
    assert metrics[-1].loss < 0.98 * metrics[0].loss
    assert state.step == 30
    assert int(state.skipped) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulation_is_the_large_batch(optimizer: str) -> None:
    flags = [f"--optim.name={optimizer}", "--train.clip_norm=0.1"]
    whole, parts = make_state(*flags), make_state(*flags)
    for step in range(4):
        a = train_step(whole, [make_batch(0, 8, step)])
        b = train_step(parts, [make_batch(2 * i, 2, step) for i in range(4)])
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
    assert_same_weights(weights(whole), weights(parts), atol=2e-5)


def test_update_is_clipped_once_and_equals_plain_pytorch() -> None:
    state = make_state("--train.clip_norm=0.05", "--optim.eps=1e-3")
    plain = copy.deepcopy(state.model)
    optimizer = build_optimizer(plain, replace(state.config.optim))
    for step in range(3):
        batch = make_batch(0, 8, step)
        for group in optimizer.param_groups:
            group["lr"] = state.schedule.lr_at(step)
        loss = find_method(state.config).loss(plain, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        metrics = train_step(state, [batch])
        torch.testing.assert_close(metrics.loss, loss.detach())
        torch.testing.assert_close(metrics.grad_norm, norm)
        assert norm > 0.05
    torch.testing.assert_close(state.model.state_dict(), plain.state_dict(), rtol=0, atol=1e-6)


def test_empty_slots_weigh_nothing() -> None:
    """A batch with two unreadable images makes the update of the six others."""
    full, holes = make_state("--optim.eps=1e-3"), make_state("--optim.eps=1e-3")
    six = make_batch(0, 6)
    ids = torch.tensor([0, 1, -1, 2, 3, -1, 4, 5])
    image = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    image[ids >= 0] = six.image
    eight = Batch(image, ids, torch.zeros(8, dtype=torch.int64), 6)
    a, b = train_step(full, [six]), train_step(holes, [eight])
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
    assert_same_weights(weights(full), weights(holes))
    # and in micro-batches of unequal filling
    parts = make_state("--optim.eps=1e-3")
    halves = [Batch(image[i : i + 4], ids[i : i + 4], eight.epochs[:4], 3) for i in (0, 4)]
    train_step(parts, halves)
    assert_same_weights(weights(full), weights(parts))


def test_a_step_without_any_image_is_skipped() -> None:
    state = make_state()
    before = weights(state)
    empty = Batch(
        torch.zeros(4, 64, 64, 3, dtype=torch.uint8), torch.full((4,), -1), torch.zeros(4).long(), 0
    )
    metrics = train_step(state, [empty])
    assert not bool(metrics.finite)
    assert all(torch.equal(before[k], v) for k, v in weights(state).items())


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_non_finite_gradients_skip_the_update(precision: str) -> None:
    state = make_state(f"--train.precision={precision}")
    train_step(state, [make_batch(0, 4)])
    before = weights(state)
    moments = {k: {n: v.clone() for n, v in s.items()} for k, s in state.optimizer.state.items()}
    with torch.no_grad():
        bias = state.model.decoder[0].bias
        kept = bias.clone()
        bias.fill_(float("inf"))
    for count in (1, 2):
        metrics = train_step(state, [make_batch(4, 4)])
        assert not bool(metrics.finite)
        assert int(state.bad_in_a_row) == count
    with torch.no_grad():
        bias.copy_(kept)
    assert all(torch.equal(before[k], v) for k, v in weights(state).items())
    for parameter, expected in moments.items():
        for name, value in expected.items():
            assert torch.equal(state.optimizer.state[parameter][name], value), name
    metrics = train_step(state, [make_batch(8, 4)])
    assert bool(metrics.finite)
    assert (int(state.skipped), int(state.bad_in_a_row), state.step) == (2, 0, 4)
    assert float(state.loss_scale.scale) == (2.0**14 if precision == "fp16" else 1.0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.usefixtures("poisoned_empty")
def test_a_skipped_first_step_leaves_no_garbage(optimizer: str) -> None:
    state = make_state(f"--optim.name={optimizer}")
    with torch.no_grad():
        bias = state.model.decoder[0].bias
        kept = bias.clone()
        bias.fill_(float("inf"))
    train_step(state, [make_batch(0, 4)])
    with torch.no_grad():
        bias.copy_(kept)
    train_step(state, [make_batch(4, 4)])
    assert all(value.isfinite().all() for value in weights(state).values())
    assert (int(state.skipped), int(state.longest_bad_run)) == (1, 1)


class Syncs(TorchDispatchMode):
    """Counts what makes a host wait for a device: reading a scalar, or copying between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "nonzero", "lift_fresh", "unique_consecutive"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back() -> None:
    """No scalar leaves the device and none is sent to it (torch.tensor would wait on CUDA)."""
    state = make_state("--train.precision=fp16", "--train.accumulation_steps=2")
    train_step(state, [make_batch(0, 4), make_batch(4, 4)])
    with Syncs() as syncs:
        train_step(state, [make_batch(0, 4, 1), make_batch(4, 4, 1)])
        in_step = list(syncs.found)
        torch.ones(()).item()
        torch.tensor(1.0)
    assert in_step == []
    assert syncs.found[len(in_step) :] == ["_local_scalar_dense", "lift_fresh"]


def test_fp16_is_near_float32() -> None:
    full, half = make_state(), make_state("--train.precision=fp16")
    for step in range(5):
        a = train_step(full, [make_batch(0, 8, step)])
        b = train_step(half, [make_batch(0, 8, step)])
        torch.testing.assert_close(a.loss, b.loss, rtol=3e-3, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=2e-2, atol=0)


def test_loss_scale_grows_and_halves() -> None:
    scale = LossScale(CPU, "fp16")
    for _ in range(GROWTH_INTERVAL):
        scale.update(torch.tensor(True))
    assert float(scale.scale) == 2.0**17
    scale.update(torch.tensor(False))
    assert float(scale.scale) == 2.0**16
    other = LossScale(CPU, "fp16")
    other.load(scale.state())
    assert other.state() == scale.state()


def test_random_state_is_a_function_of_the_step() -> None:
    """Stochastic depth draws the same whether the run came from step 0 or was resumed at 3."""
    flags = ["--model.drop_path=0.5", "--train.steps=10"]
    straight = make_state(*flags)
    run(straight, [[make_batch(0, 8, step)] for step in range(3)])
    resumed = make_state(*flags)
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    resumed.step = 3
    torch.rand(17)  # whatever else drew numbers in between
    a, b = train_step(straight, [make_batch(0, 8, 3)]), train_step(resumed, [make_batch(0, 8, 3)])
    assert torch.equal(a.loss, b.loss)
    assert all(torch.equal(weights(straight)[k], v) for k, v in weights(resumed).items())


@pytest.mark.parametrize(
    "flag", ["--train.channels_last=true", "--train.activation_checkpointing=true"]
)
def test_options_that_change_no_number(flag: str) -> None:
    plain, other = make_state("--model.drop_path=0.3"), make_state("--model.drop_path=0.3", flag)
    for step in range(2):
        a = train_step(plain, [make_batch(0, 8, step)])
        b = train_step(other, [make_batch(0, 8, step)])
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-4, atol=0)


def test_the_reference_is_plain_pytorch_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a native kernel ran")

    kernel = import_module("simmim_kernels.gradient_norm.native_kernel")
    monkeypatch.setattr(kernel, "forward", refuse)
    run(make_state("--kernels.backend=reference"), [[make_batch(0, 2)]])
