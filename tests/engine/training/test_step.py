"""One optimiser step: the update of the whole batch, clipping once, skipping what is not finite."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from simmim.backbone.stochastic_depth import DropPath
from simmim.data.batch import Batch
from simmim.distributed import World
from simmim.method import simsiam
from simmim.method.build import find_method
from simmim.training import step as step_module
from simmim.training.optim import build_optimizer
from simmim.training.step import Metrics, TrainState, seed_step, train_step
from small_run import CASES, CPU, Case, add_narrow_presets, make_batch, make_state, weights

Make = Callable[..., TrainState]
# What torch is seeded with in step 3 of process 1 in a run with --seed=11.
SEED_PINNED = 14245408272080499594
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES, indirect=True)


def only(*, batch_norms: bool) -> pytest.MarkDecorator:
    """The cases with, or without, batch norms."""
    chosen = {name: c for name, c in CASES.items() if c.batch_norms == batch_norms}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A method on a backbone."""
    add_narrow_presets(monkeypatch)
    found: Case = request.param
    return found


@pytest.fixture
def make(case: Case, tmp_path: Path) -> Make:
    """make(*flags): a state of the case before its first step."""
    recipe = case.write(tmp_path)
    return lambda *flags: make_state(*flags, recipe=recipe)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Bits are compared: sums in another number of threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 2e-6) -> None:
    for name in a:
        # a key bias has no gradient but rounding noise, which AdamW turns into whole steps
        if not name.endswith("attn.qkv.bias"):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


def assert_same_moments(ours: Optimizer, plain: Optimizer) -> None:
    """What optimisers keep: their steps taken, and averages within rounding."""
    a, b = (optimizer.state_dict()["state"] for optimizer in (ours, plain))
    assert a.keys() == b.keys()
    for number in a:
        for name, value in b[number].items():
            atol = 2e-6 * float(value.abs().max())
            torch.testing.assert_close(a[number][name], value, rtol=0, atol=atol)


def run(state: TrainState, steps: list[list[Batch]]) -> list[Metrics]:
    return [train_step(state, batches) for batches in steps]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@every_case
def test_loss_falls(case: Case, make: Make, precision: str) -> None:
    state = make("--train.steps=30", f"--train.precision={precision}")
    batch = make_batch(0, 8, views=case.views)
    losses = [float(m.loss) for m in run(state, [[batch]] * 30)]
    # a negative cosine begins near 0 and ends near -1; colour and blur are drawn anew every epoch,
    # not every step
    wanted = losses[0] - 0.1 if case.views == 2 else 0.98 * losses[0]
    assert losses[-1] < wanted
    assert state.step == 30
    assert int(state.skipped) == 0


# with batch norms a part of a batch is another batch: `test_update_is_that_of_plain_pytorch`
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@only(batch_norms=False)
def test_accumulation_is_the_large_batch(make: Make, optimizer: str) -> None:
    flags = [f"--optim.name={optimizer}", "--train.clip_norm=0.1", "--optim.eps=1e-3"]
    whole, parts = make(*flags), make(*flags)
    for step in range(4):
        a = train_step(whole, [make_batch(0, 8, step)])
        b = train_step(parts, [make_batch(2 * i, 2, step) for i in range(4)])
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
    assert_same_weights(weights(whole), weights(parts), atol=2e-5)


@only(batch_norms=True)
def test_parts_of_a_batch_have_statistics_of_their_own(case: Case, make: Make) -> None:
    """That makes the parts differ from the whole, but no more than they do in PyTorch."""
    whole, parts = make(), make()
    a = train_step(whole, [make_batch(0, 8, 0, case.views)])
    b = train_step(parts, [make_batch(4 * i, 4, 0, case.views) for i in range(2)])
    assert a.loss != b.loss
    counts = {
        name: (int(value), int(weights(parts)[name]))
        for name, value in weights(whole).items()
        if name.endswith("num_batches_tracked")
    }
    assert counts
    assert all(after == 2 * before for before, after in counts.values())


@pytest.mark.parametrize("parts", [1, 2])
@every_case
def test_update_is_that_of_plain_pytorch(case: Case, make: Make, parts: int) -> None:
    """Gradients are accumulated and clipped once, and every part moves the running statistics.

    Every step begins at the same weights and moments in both, so that one step's rounding is
    compared, and not what batch norms of four images and AdamW make of it in the next.
    """
    state = make("--train.clip_norm=0.05", "--optim.eps=1e-3")
    plain = copy.deepcopy(state.model)
    method = find_method(state.config)
    optimizer = build_optimizer(plain, state.config.optim, method.parameter_groups(plain))
    size = 8 // parts
    for step in range(3):
        batches = [make_batch(size * i, size, step, case.views) for i in range(parts)]
        plain.load_state_dict(state.model.state_dict())
        optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
        for group in optimizer.param_groups:
            fixed = group.get("fixed_lr", False)
            group["lr"] = state.config.optim.lr if fixed else state.schedule.lr_at(step)
        losses = [method.loss(plain, batch) / parts for batch in batches]
        for loss in losses:
            loss.backward()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad.double() for p in trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(trained, 0.05, norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics = train_step(state, batches)
        torch.testing.assert_close(metrics.loss, sum(losses).detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(metrics.grad_norm.double(), norm, rtol=1.3e-6, atol=0)
        assert norm > 0.05
        torch.testing.assert_close(state.model.state_dict(), plain.state_dict(), rtol=0, atol=2e-6)
        assert_same_moments(state.optimizer, optimizer)


@every_case
def test_empty_slots_weigh_nothing(case: Case, make: Make) -> None:
    """A batch with two unreadable images makes the update of the six others."""
    full, holes = make("--optim.eps=1e-3"), make("--optim.eps=1e-3")
    six = make_batch(0, 6, views=case.views)
    ids = torch.tensor([0, 1, -1, 2, 3, -1, 4, 5])
    image = torch.zeros(8, *six.image.shape[1:], dtype=torch.uint8)
    image[ids >= 0] = six.image
    eight = Batch(image, ids, torch.zeros(8, dtype=torch.int64), 6)
    a, b = train_step(full, [six]), train_step(holes, [eight])
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
    assert_same_weights(weights(full), weights(holes))
    # and in micro-batches of unequal filling
    parts = make("--optim.eps=1e-3")
    halves = [Batch(image[i : i + 4], ids[i : i + 4], eight.epochs[:4], 3) for i in (0, 4)]
    metrics = train_step(parts, halves)
    if not case.batch_norms:
        assert_same_weights(weights(full), weights(parts))
        return
    again = make("--optim.eps=1e-3")
    threes = [make_batch(i, 3, views=case.views) for i in (0, 3)]
    expected = train_step(again, threes)
    torch.testing.assert_close(metrics.loss, expected.loss, rtol=1e-6, atol=0)
    assert_same_weights(weights(again), weights(parts))


@every_case
def test_a_step_without_any_image_is_skipped(case: Case, make: Make) -> None:
    state = make()
    before = weights(state)
    image = torch.zeros_like(make_batch(0, 4, views=case.views).image)
    empty = Batch(image, torch.full((4,), -1), torch.zeros(4).long(), 0)
    metrics = train_step(state, [empty])
    assert not bool(metrics.finite)
    assert all(torch.equal(before[k], v) for k, v in weights(state).items())


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@every_case
def test_non_finite_gradients_skip_the_update(case: Case, make: Make, precision: str) -> None:
    """Weights, moments and running statistics stay, bit for bit."""
    state = make(f"--train.precision={precision}")
    train_step(state, [make_batch(0, 4, views=case.views)])
    before = weights(state)
    moments = {k: {n: v.clone() for n, v in s.items()} for k, s in state.optimizer.state.items()}
    bias, loss_of = last_bias(state), state.loss_of
    kept = bias.detach().clone()

    def infinite_slope(*given: Any) -> Tensor:
        """The loss as it is, with an infinite gradient."""
        return loss_of(*given) + (bias - bias.detach()).sum().sqrt()

    def infinite_value(*given: Any) -> Tensor:
        """An infinite loss, with the gradient as it is."""
        return loss_of(*given) + float("inf")

    for count, spoilt in enumerate((infinite_slope, infinite_value, loss_of), 1):
        state.loss_of = spoilt
        with torch.no_grad():
            bias.copy_(torch.full_like(kept, float("inf")) if spoilt is loss_of else kept)
        metrics = train_step(state, [make_batch(4, 4, views=case.views)])
        assert not bool(metrics.finite)
        assert bool(metrics.loss.isfinite()) == (spoilt is infinite_slope)
        assert int(state.bad_in_a_row) == count
    with torch.no_grad():
        bias.copy_(kept)
    assert all(torch.equal(before[k], v) for k, v in weights(state).items())
    for parameter, expected in moments.items():
        for name, value in expected.items():
            assert torch.equal(state.optimizer.state[parameter][name], value), name
    metrics = train_step(state, [make_batch(8, 4, views=case.views)])
    assert bool(metrics.finite)
    assert (int(state.skipped), int(state.bad_in_a_row), state.step) == (3, 0, 5)
    assert float(state.loss_scale.scale) == (2.0**13 if precision == "fp16" else 1.0)


@every_case
def test_images_that_overflow_leave_the_average_alone(case: Case, make: Make) -> None:
    state = make()
    state.ema_decay, state.averaged = 0.9, copy.deepcopy(state.model).eval()
    batch = make_batch(0, 4, views=case.views)
    train_step(state, [batch])
    before = {k: v.clone() for k, v in state.averaged.state_dict().items()}
    loss_of = state.loss_of
    state.loss_of = lambda *given: loss_of(*given) * float("nan")
    train_step(state, [batch])
    assert all(torch.equal(before[k], v) for k, v in state.averaged.state_dict().items())
    state.loss_of = loss_of
    train_step(state, [batch])
    assert any(not torch.equal(before[k], v) for k, v in state.averaged.state_dict().items())


def last_bias(state: TrainState) -> Tensor:
    """The bias of the layer that the loss reads."""
    found = [p for name, p in state.model.named_parameters() if not name.startswith("encoder.")]
    assert found[-1].dim() == 1
    return found[-1]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.usefixtures("poisoned_empty")
@every_case
def test_a_skipped_first_step_leaves_no_garbage(case: Case, make: Make, optimizer: str) -> None:
    state = make(f"--optim.name={optimizer}")
    bias = last_bias(state)
    with torch.no_grad():
        kept = bias.clone()
        bias.fill_(float("inf"))
    train_step(state, [make_batch(0, 4, views=case.views)])
    with torch.no_grad():
        bias.copy_(kept)
    train_step(state, [make_batch(4, 4, views=case.views)])
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


@every_case
def test_a_step_reads_nothing_back(case: Case, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scalar leaves the device and none is sent to it (torch.tensor would wait on CUDA)."""
    # without the distortion, which reads its radius, and on a CPU also which views are blurred
    monkeypatch.setattr(simsiam, "distort", lambda image, *_: image.permute(0, 3, 1, 2))
    state = make("--train.precision=fp16", "--train.accumulation_steps=2")
    train_step(state, [make_batch(i, 4, 0, case.views) for i in (0, 4)])
    with Syncs() as syncs:
        train_step(state, [make_batch(i, 4, 1, case.views) for i in (0, 4)])
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


@every_case
def test_random_state_is_a_function_of_the_step(case: Case, make: Make) -> None:
    """Stochastic depth draws the same whether the run came from step 0 or was resumed at 3."""
    flags = ["--model.drop_path=0.5", "--train.steps=10"]
    if "convnext" in case.model.get("name", ""):
        flags += ["--model.layer_scale=1.0"]  # branches of 1e-6 are lost in the rounding
    straight = make(*flags)
    run(straight, [[make_batch(0, 8, step, case.views)] for step in range(3)])
    resumed = make(*flags)
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    resumed.step = 3
    torch.rand(17)  # whatever else drew numbers in between
    other = make(*flags, "--model.drop_path=0.0")
    other.model.load_state_dict(straight.model.state_dict())
    other.step = 3
    last = make_batch(0, 8, 3, case.views)
    a, b, c = (train_step(state, [last]) for state in (straight, resumed, other))
    assert torch.equal(a.loss, b.loss)
    assert all(torch.equal(weights(straight)[k], v) for k, v in weights(resumed).items())
    assert not torch.equal(a.loss, c.loss)  # it was at work


@every_case
def test_stochastic_depth_is_that_of_the_images_however_a_batch_is_split(
    case: Case, make: Make
) -> None:
    if case.batch_norms:
        pytest.skip("its batch norms see the parts")
    flags = ["--model.drop_path=0.5", "--train.steps=10"]
    if "convnext" in case.model.get("name", ""):
        flags += ["--model.layer_scale=1.0"]
    whole, parts, other = make(*flags), make(*flags), make(*flags)
    a = train_step(whole, [make_batch(0, 8, 0, case.views)])
    b = train_step(parts, [make_batch(start, 4, 0, case.views) for start in (0, 4)])
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=2e-5, atol=0)
    for module in other.model.modules():
        if isinstance(module, DropPath):
            module.block += 1
    c = train_step(other, [make_batch(0, 8, 0, case.views)])
    assert not torch.isclose(a.grad_norm, c.grad_norm, rtol=5e-5, atol=0)


def test_every_seed_step_and_process_has_draws_of_its_own() -> None:
    def drawn(seed: int, at: int, rank: int) -> tuple[float, ...]:
        seed_step(seed, at, World(rank, 4, CPU))
        return tuple(torch.rand(3).tolist())

    keys = list(product((0, 1, 2), repeat=3))
    draws = [drawn(*key) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [drawn(*key) for key in keys]
    # runs of earlier versions resume with the same draws
    seed_step(11, 3, World(1, 2, CPU))
    assert torch.initial_seed() == SEED_PINNED


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_step_asks_for_its_loss_as_configured(precision: str) -> None:
    """Each micro-batch by its number, in the run's precision, seeded by seed, step and process."""
    state = make_state(f"--train.precision={precision}", "--seed=11")
    state.step, state.world = 3, World(1, 1, CPU)
    loss_of, asked = state.loss_of, list[tuple[Any, ...]]()

    def watched(given: TrainState, batch: Batch, number: int) -> Tensor:
        used = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        asked.append((given is state, int(batch.ids[0]), number, used, torch.initial_seed()))
        return loss_of(given, batch, number)

    state.loss_of = watched
    train_step(state, [make_batch(0, 2), make_batch(2, 2)])
    used = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert asked == [(True, 2 * n, n, used, SEED_PINNED) for n in (0, 1)]


@pytest.mark.parametrize("parts", [1, 3])
def test_processes_share_gradients_once_a_step(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Each backward pass but the last is made where DDP shares nothing."""
    held, passes = list[bool](), list[bool]()

    class Wrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *given: Any) -> Any:
            return self.module(*given)

        @contextmanager
        def no_sync(self) -> Iterator[None]:
            held.append(True)
            yield
            held.pop()

    class LossThatTells(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            passes.append(bool(held))
            return grads[0]

    monkeypatch.setattr(step_module, "DistributedDataParallel", Wrapped)
    state = make_state()
    loss_of, state.wrapped = state.loss_of, Wrapped(state.wrapped)
    state.loss_of = lambda *given: LossThatTells.apply(loss_of(*given))
    train_step(state, [make_batch(2 * part, 2) for part in range(parts)])
    assert passes == [True] * (parts - 1) + [False]


@pytest.mark.parametrize(("clip_norm", "clips"), [(0.0, False), (1e-3, True), (1e3, False)])
def test_gradients_are_clipped_to_the_configured_norm(clip_norm: float, clips: bool) -> None:
    """Plain SGD moves the weights by rate times gradient."""
    state = make_state(
        "--optim.name=sgd", "--optim.momentum=0", "--optim.weight_decay=0",
        "--optim.nesterov=false", f"--train.clip_norm={clip_norm}",
    )  # fmt: skip
    before = [p.detach().clone() for p in state.parameters()]
    metrics = train_step(state, [make_batch(0, 4)])
    moved = torch.nn.utils.get_total_norm(
        [p.detach() - b for p, b in zip(state.parameters(), before)]
    )
    norm = min(clip_norm, float(metrics.grad_norm)) if clips else float(metrics.grad_norm)
    assert clip_norm == 0 or (float(metrics.grad_norm) > clip_norm) == clips
    assert float(moved) / metrics.lr == pytest.approx(norm, rel=2e-3)


@pytest.mark.parametrize("decay", [0.15, 0.9])
def test_the_average_follows_by_its_decay_and_faster_while_it_is_young(decay: float) -> None:
    state = make_state("--optim.lr=0.1")
    state.ema_decay, state.averaged = decay, copy.deepcopy(state.model)
    for at in range(4):
        used = min(decay, (1 + at) / (10 + at))
        old = [p.detach().clone() for p in state.averaged.parameters()]
        train_step(state, [make_batch(0, 2, at)])
        for average, before, new in zip(state.averaged.parameters(), old, state.model.parameters()):
            torch.testing.assert_close(average, used * before + (1 - used) * new.detach())


def test_the_average_has_the_running_statistics_of_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_narrow_presets(monkeypatch)
    state = make_state(recipe=CASES["simmim-resnet"].write(tmp_path))
    state.ema_decay, state.averaged = 0.9, copy.deepcopy(state.model)
    old = [b.clone() for b in state.averaged.buffers()]
    train_step(state, [make_batch(0, 4)])
    found, wanted = list(state.averaged.buffers()), list(state.model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(found, old))


def test_a_state_that_averages_begins_with_its_weights() -> None:
    plain = make_state()
    given = plain.optimizer, plain.config, plain.schedule, plain.world, plain.loss_of
    state = TrainState(plain.model, plain.wrapped, *given, ema_decay=0.5)
    assert (plain.averaged, state.ema_decay) == (None, 0.5)
    assert state.averaged is not None
    assert not state.averaged.training
    pairs = zip(state.averaged.parameters(), state.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and not a.requires_grad and a is not b for a, b in pairs)


def test_a_step_counts_the_images_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes, one met an image that cannot be read; DDP has averaged their gradients."""
    one, two = make_state(), make_state()
    two.world = World(0, 2, CPU)
    alone = train_step(one, [make_batch(0, 4)])
    # the other's loss is 2 with a weight of 3 images in 4 slots
    monkeypatch.setattr(
        step_module, "all_reduce_sum", lambda s, world: s + torch.tensor([2 * 0.75, 0.75])
    )
    both = train_step(two, [make_batch(0, 4)])
    torch.testing.assert_close(both.loss, (alone.loss + 1.5) / 1.75)
    torch.testing.assert_close(both.grad_norm, alone.grad_norm / (1.75 / 2))


@pytest.mark.parametrize(
    "flag", ["--train.channels_last=true", "--train.activation_checkpointing=true"]
)
@every_case
def test_options_that_change_no_number(case: Case, make: Make, flag: str) -> None:
    plain, other = make("--model.drop_path=0.3"), make("--model.drop_path=0.3", flag)
    for step in range(2):
        a = train_step(plain, [make_batch(0, 8, step, case.views)])
        b = train_step(other, [make_batch(0, 8, step, case.views)])
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-4, atol=0)


def test_the_reference_is_plain_pytorch_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a native kernel ran")

    kernel = import_module("simmim_kernels.gradient_norm.native_kernel")
    monkeypatch.setattr(kernel, "forward", refuse)
    run(make_state("--kernels.backend=reference"), [[make_batch(0, 2)]])
