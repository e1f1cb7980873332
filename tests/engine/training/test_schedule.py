"""Schedules beyond the published tables: their ends and drops, and what a configuration means."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim.command_line import load
from simmim.training.schedule import Schedule, resolve_schedule

COSINE = Schedule("cosine", total_steps=100, warmup_steps=10, lr=1.0, warmup_lr=0.1, min_lr=0.01)


def test_the_first_two_steps_are_equal_and_the_warm_up_is_a_line() -> None:
    assert COSINE.lr_at(0) == COSINE.lr_at(1) == 0.1
    rises = [COSINE.value_at(u + 1) - COSINE.value_at(u) for u in range(9)]
    assert rises == pytest.approx([0.09] * 9)


def test_the_cosine_falls_to_its_end() -> None:
    values = [COSINE.value_at(update) for update in range(10, 101)]
    assert values == sorted(values, reverse=True)
    assert COSINE.value_at(100) == COSINE.value_at(1000) == 0.01
    # after the warm-up it is where it would be without one; the prefix form begins at the peak
    assert COSINE.value_at(10) < 1.0
    assert replace(COSINE, warmup_prefix=True).value_at(10) == 1.0


def test_multistep_and_step_drop_by_gamma() -> None:
    multistep = Schedule("multistep", 100, 0, lr=1.0, warmup_lr=0.0, milestones=(30, 60), gamma=0.1)
    assert [multistep.value_at(u) for u in (0, 29)] == [1.0, 1.0]
    assert [multistep.value_at(u) for u in (30, 59)] == pytest.approx([0.1, 0.1])
    assert multistep.value_at(60) == pytest.approx(0.01)
    step = Schedule("step", 100, 0, lr=1.0, warmup_lr=0.0, decay_steps=40, gamma=0.5)
    assert [step.value_at(u) for u in (0, 39, 40, 79, 80)] == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_linear_ends_at_a_hundredth_and_constant_nowhere() -> None:
    linear = Schedule("linear", 110, 10, lr=1.0, warmup_lr=0.0)
    assert [linear.value_at(u) for u in (10, 60, 110)] == pytest.approx([1.0, 0.505, 0.01])
    assert Schedule("constant", 100, 0, lr=0.3, warmup_lr=0.0).value_at(99) == 0.3


def test_groups_scale_the_peak_or_keep_it() -> None:
    assert COSINE.rate_of({"lr_scale": 0.5}, 0) == 0.1  # the ends stay, as published
    assert COSINE.rate_of({"lr_scale": 0.5}, 101) == 0.01
    assert COSINE.rate_of({"lr_scale": 0.5}, 50) < COSINE.rate_of({}, 50)
    assert COSINE.rate_of({"fixed_lr": True, "lr_scale": 0.5}, 77) == 0.5


def resolved(*flags: str) -> Schedule:
    """The schedule of ten epochs of 1000 images in batches of 64: 15.625 steps each."""
    length = ["--train.steps=0", "--train.epochs=10", "--train.batch_size=64"]
    smoke = ["smoke", "--data.path=x", "--schedule.warmup_steps=0", *length]
    return resolve_schedule(load([*smoke, *flags]), 1000)


def test_epochs_become_steps_and_rates_follow_the_batch() -> None:
    schedule = resolved(
        "--optim.lr=0.1",
        "--optim.lr_batch=256",
        "--schedule.warmup_epochs=2",
        "--schedule.warmup_lr=0.02",
        "--schedule.min_lr=0.01",
    )
    assert (schedule.total_steps, schedule.warmup_steps) == (156, 31)
    rates = (schedule.lr, schedule.warmup_lr, schedule.min_lr)
    assert rates == pytest.approx((0.025, 0.005, 0.0025))


def test_rates_without_a_batch_of_their_own_are_not_scaled() -> None:
    schedule = resolved(
        "--optim.lr=0.1", "--optim.lr_batch=0", "--schedule.warmup_lr=0.02",
        "--schedule.min_lr=0.01",
    )  # fmt: skip
    assert (schedule.lr, schedule.warmup_lr, schedule.min_lr) == (0.1, 0.02, 0.01)


def test_the_warm_up_has_the_configured_length() -> None:
    """Its length in steps stands above that in epochs."""
    schedule = resolved("--schedule.warmup_steps=7", "--schedule.warmup_epochs=2")
    assert schedule.warmup_steps == 7
    assert schedule.value_at(6) < schedule.lr
    assert resolved("--schedule.warmup_epochs=0").warmup_steps == 0
    assert resolved("--schedule.warmup_epochs=0").value_at(0) == schedule.lr


def test_the_run_has_the_configured_length() -> None:
    assert resolved("--train.steps=9").total_steps == 9  # above that in epochs
    assert resolved("--train.epochs=0.001").total_steps == 1


def test_every_setting_of_the_schedule_arrives() -> None:
    schedule = resolved(
        "--schedule.name=multistep",
        "--schedule.warmup_epochs=0",
        "--schedule.milestones=[2,4]",
        "--schedule.step_epochs=3",
        "--schedule.gamma=0.5",
        "--schedule.warmup_prefix=true",
    )
    assert schedule.name == "multistep"
    assert schedule.milestones == (31.25, 62.5)
    assert schedule.decay_steps == 46  # 46.875, cut off as published
    assert schedule.gamma == 0.5
    assert schedule.warmup_prefix
    plain = resolved("--schedule.step_epochs=0.001")
    assert (plain.name, plain.decay_steps, plain.warmup_prefix) == ("cosine", 1, False)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["cosine", "multistep", "linear", "step", "constant"]),
    total=st.integers(1, 300),
    warmup=st.integers(0, 40),
    prefix=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_rates_stay_between_the_configured_ones(
    name: str, total: int, warmup: int, prefix: bool, scale: float
) -> None:
    """They begin at the warm-up's rate, never rise above the peak, and never fall below the end."""
    warmup = min(warmup, total - 1)
    schedule = Schedule(
        name, total, warmup, lr=1.0, warmup_lr=0.001, min_lr=0.01, milestones=(total / 2,),
        decay_steps=total, warmup_prefix=prefix,
    )  # fmt: skip
    rates = [schedule.lr_at(step, scale) for step in range(total + 1)]
    assert rates[0] == (0.001 if warmup else rates[1])
    assert max(rates) <= scale
    assert min(rates[warmup + 1 :]) >= min(0.01 * scale, 0.01)
    climb = rates[1 : warmup + 1]
    assert climb == sorted(climb)
    after = rates[warmup + 1 :]
    assert after == sorted(after, reverse=True)
    ends = {"cosine": 0.01, "linear": 0.01 * scale, "constant": scale}
    if name in ends:
        assert schedule.value_at(total, scale) == pytest.approx(ends[name])
