"""Compute types, and the loss scale of fp16: the rule of torch.amp.GradScaler, on the device."""

import pytest
import torch

from simmim.training.precision import LossScale, autocast
from small_run import CPU

GOOD, BAD = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_products_are_of_the_named_type(name: str, dtype: torch.dtype) -> None:
    x = torch.ones(2, 2)
    with autocast(CPU, name):
        assert (x @ x).dtype == dtype
        assert torch.is_autocast_enabled("cpu") == (name != "float32")


def after(scale: LossScale, *steps: tuple[int, torch.Tensor]) -> tuple[float, float]:
    """Scale and count after so many steps, good or bad."""
    for count, finite in steps:
        for _ in range(count):
            scale.update(finite)
    return float(scale.scale), float(scale.good_steps)


def test_the_scale_doubles_after_two_thousand_good_steps_and_no_sooner() -> None:
    scale = LossScale(CPU, "fp16")
    assert after(scale) == (65536.0, 0.0)
    assert after(scale, (1999, GOOD)) == (65536.0, 1999.0)
    assert after(scale, (1, GOOD)) == (131072.0, 0.0)
    # and then again, counted from the last time
    assert after(scale, (1999, GOOD)) == (131072.0, 1999.0)
    assert after(scale, (1, GOOD)) == (262144.0, 0.0)


def test_a_bad_step_halves_the_scale_and_the_count_begins_anew() -> None:
    scale = LossScale(CPU, "fp16")
    assert after(scale, (1500, GOOD), (1, BAD)) == (32768.0, 0.0)
    assert after(scale, (2, BAD)) == (8192.0, 0.0)
    assert after(scale, (1999, GOOD)) == (8192.0, 1999.0)
    assert after(scale, (1, GOOD)) == (16384.0, 0.0)


def test_the_scale_is_that_of_pytorch() -> None:
    ours = LossScale(CPU, "fp16")
    theirs = torch.amp.GradScaler("cpu", growth_interval=2000)
    theirs.scale(torch.ones(()))  # which makes its tensors
    for step in range(4100):
        bad = step in (3, 4, 2500)
        ours.update(BAD if bad else GOOD)
        torch._amp_update_scale_(
            theirs._scale, theirs._growth_tracker, torch.tensor(float(bad)), 2.0, 0.5, 2000
        )
        assert ours.scale == theirs._scale, step


def test_a_resumed_scale_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    scale, other = LossScale(CPU, "fp16"), LossScale(CPU, "fp16")
    after(scale, (1, BAD), (1200, GOOD))
    assert scale.state() == {"scale": 32768.0, "good_steps": 1200.0}
    other.load(scale.state())
    assert after(other, (799, GOOD)) == (32768.0, 1999.0)
    assert after(other, (1, GOOD)) == (65536.0, 0.0)


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_other_precisions_have_no_scale(name: str) -> None:
    scale = LossScale(CPU, name)
    assert after(scale, (3, BAD), (2001, GOOD)) == (1.0, 0.0)
    assert scale.state() == {}
    scale.load({"scale": 8.0, "good_steps": 3.0})
    assert float(scale.scale) == 1.0
    half = LossScale(CPU, "fp16")
    half.load({})  # the checkpoint of a run in another precision
    assert float(half.scale) == 65536.0
