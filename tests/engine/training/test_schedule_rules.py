"""Ends, order and lengths of every schedule, at any length of run and warm-up."""

from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from simmim.training.schedule import Schedule

NAMES = ["cosine", "multistep", "linear", "step", "constant"]


@st.composite
def schedules(draw: st.DrawFn, names: list[str] = NAMES) -> Schedule:
    """Any schedule; the warm-up may be missing, or as long as the run."""
    total = draw(st.integers(1, 60), label="total steps")
    lr = draw(st.floats(1e-6, 10), label="peak")
    return Schedule(
        name=draw(st.sampled_from(names)),
        total_steps=total,
        warmup_steps=draw(st.one_of(st.just(0), st.just(total), st.integers(0, total))),
        lr=lr,
        warmup_lr=lr * draw(st.floats(0, 1)),
        min_lr=lr * draw(st.floats(0, 1)),
        milestones=tuple(sorted(draw(st.lists(st.floats(0, total), max_size=4)))),
        decay_steps=draw(st.integers(1, 70)),
        gamma=draw(st.floats(0, 1)),
        warmup_prefix=draw(st.booleans()),
    )


def close(expected: float) -> object:
    return pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(schedule=schedules())
def test_the_warm_up_rises_in_equal_steps_from_its_first_rate_towards_the_peak(
    schedule: Schedule,
) -> None:
    steps = schedule.warmup_steps
    rates = [schedule.value_at(update) for update in range(steps)]
    height = schedule.lr - schedule.warmup_lr
    assert rates == close([schedule.warmup_lr + height * update / steps for update in range(steps)])


@given(schedule=schedules(["linear", "constant", "cosine"]))
def test_the_peak_comes_right_after_the_warm_up(schedule: Schedule) -> None:
    assume(schedule.warmup_steps < schedule.total_steps)
    schedule = replace(schedule, warmup_prefix=True)
    assert schedule.value_at(schedule.warmup_steps) == close(schedule.lr)


@given(schedule=schedules())
def test_after_the_warm_up_no_rate_rises_or_leaves_its_bounds(schedule: Schedule) -> None:
    updates = range(schedule.warmup_steps, schedule.total_steps)
    rates = [schedule.value_at(update) for update in updates]
    slack = schedule.lr * 1e-12
    assert all(later <= earlier + slack for earlier, later in pairwise(rates))
    least = {
        "cosine": schedule.min_lr,
        "linear": schedule.lr * 0.01,
        "constant": schedule.lr,
    }.get(schedule.name, 0.0)
    assert all(least - slack <= rate <= schedule.lr + slack for rate in rates)


@given(schedule=schedules(["cosine"]), beyond=st.integers(0, 5))
def test_the_cosine_ends_at_its_last_rate_and_is_halfway_down_in_the_middle(
    schedule: Schedule, beyond: int
) -> None:
    assert schedule.value_at(schedule.total_steps + beyond) == close(schedule.min_lr)
    begins = schedule.warmup_steps if schedule.warmup_prefix else 0
    doubled = replace(schedule, total_steps=begins + 2 * schedule.total_steps)
    middle = begins + schedule.total_steps
    assert doubled.value_at(middle) == close((schedule.lr + schedule.min_lr) / 2)


@given(schedule=schedules(["linear"]))
def test_the_line_ends_at_a_hundredth_in_equal_steps(schedule: Schedule) -> None:
    first, last = schedule.warmup_steps, schedule.total_steps
    assume(first < last)
    assert schedule.value_at(last) == close(schedule.lr / 100)
    rates = [schedule.value_at(update) for update in range(first, last + 1)]
    drop = 0.99 * schedule.lr / (last - first)
    assert [a - b for a, b in pairwise(rates)] == pytest.approx([drop] * (last - first))


@given(schedule=schedules(["step", "multistep"]))
def test_every_drop_is_one_factor(schedule: Schedule) -> None:
    for update in range(schedule.warmup_steps, schedule.total_steps):
        drops = update // schedule.decay_steps
        if schedule.name == "multistep":
            drops = bisect_right(schedule.milestones, update)
        assert schedule.value_at(update) == close(schedule.lr * schedule.gamma**drops)


@given(schedule=schedules(), scale=st.floats(0.01, 1), fixed=st.booleans())
def test_a_step_takes_the_rate_of_the_update_before_it_with_the_scale_of_its_group(
    schedule: Schedule, scale: float, fixed: bool
) -> None:
    scaled = replace(schedule, lr=schedule.lr * scale)
    for step in range(schedule.total_steps):
        expected = scaled.lr if fixed else scaled.value_at(max(0, step - 1))
        assert schedule.rate_of({"lr_scale": scale, "fixed_lr": fixed}, step) == expected
        assert schedule.lr_at(step, scale) == scaled.value_at(max(0, step - 1))
    assert schedule.rate_of({}, 0) == schedule.value_at(0)
