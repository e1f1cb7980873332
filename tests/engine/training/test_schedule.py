"""Schedules beyond the published tables: their ends and drops, and what a configuration means."""

from dataclasses import replace

import pytest

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


def test_epochs_become_steps_and_rates_follow_the_batch() -> None:
    config = load(
        [
            "smoke",
            "--data.path=x",
            "--train.steps=0",
            "--train.epochs=10",
            "--train.batch_size=64",
            "--optim.lr=0.1",
            "--optim.lr_batch=256",
            "--schedule.warmup_steps=0",
            "--schedule.warmup_epochs=2",
            "--schedule.warmup_lr=0.02",
            "--schedule.min_lr=0.01",
        ]
    )
    schedule = resolve_schedule(config, 1000)
    assert (schedule.total_steps, schedule.warmup_steps) == (156, 31)
    rates = (schedule.lr, schedule.warmup_lr, schedule.min_lr)
    assert rates == pytest.approx((0.025, 0.005, 0.0025))
