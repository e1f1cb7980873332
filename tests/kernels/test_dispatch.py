"""choose: preference, reasons, and requests that never fall back."""

import pytest
import torch

from simmim_kernels import substitute_mask_tokens
from simmim_kernels.dispatch import ENVIRONMENT_VARIABLE, Backend, choose, never

FAST = Backend("fast", lambda *tensors: ["no such card", "wrong dtype"])
SLOW = Backend("reference", never)


def test_first_that_can_run() -> None:
    assert choose("op", (FAST, SLOW), (), None) == "reference"
    assert choose("op", (SLOW, FAST), (), None) == "reference"


def test_a_request_runs_or_raises_all_reasons() -> None:
    assert choose("op", (FAST, SLOW), (), "reference") == "reference"
    with pytest.raises(
        RuntimeError, match="op: backend='fast' cannot run: no such card; wrong dtype"
    ):
        choose("op", (FAST, SLOW), (), "fast")
    with pytest.raises(ValueError, match="unknown here; it has fast, reference"):
        choose("op", (FAST, SLOW), (), "quick")


def test_nothing_can_run() -> None:
    with pytest.raises(RuntimeError, match=r"no backend can run\. fast: no such card"):
        choose("op", (FAST,), (), None)


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Backend("triton", FAST.reasons_against)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="SIMMIM_BACKEND='triton' cannot run"):
        choose("op", (broken, SLOW), (), None)
    assert choose("op without it", (SLOW,), (), None) == "reference"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="SIMMIM_BACKEND='fast' is unknown; known are triton"):
        choose("op", (FAST, SLOW), (), None)
    assert choose("op", (FAST, SLOW), (), "reference") == "reference"


def test_native_says_why_not() -> None:
    tokens = torch.zeros(1, 2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"bfloat16 and float16, not torch\.float64"):
        substitute_mask_tokens(
            tokens,
            torch.zeros(1, 2, dtype=torch.bool),
            torch.zeros(3, dtype=torch.float64),
            backend="native",
        )
