"""Golden files and comparisons that several tests share."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
INDEX: dict[str, dict[str, Any]] = {
    f["name"]: f for f in json.loads((GOLDEN / "index.json").read_text())["fixtures"]
}


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The index entry and the tensors of a golden file."""
    return INDEX[name], load_file(GOLDEN / INDEX[name]["file"])


def load_golden_json(name: str) -> Any:
    """A golden JSON file."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names have a prefix, by their names without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def gradient_rows(gradient: Tensor) -> Tensor:
    """The rows of a large matrix's gradient in `grad_rows/`: every fourth row, and the last."""
    return gradient[sorted({*range(0, len(gradient), 4), len(gradient) - 1})]


def assert_close_to(
    actual: Tensor, expected: Tensor, tolerance: dict[str, float], what: str
) -> None:
    """Assert that `actual` is within the rtol and atol that the golden index states."""
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
        msg=lambda m: f"{what}: {m}",
    )


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """RMS error relative to the RMS of the exact value (both in float64)."""
    difference = (actual.double() - exact.double()).square().mean().sqrt()
    return float(difference / exact.double().square().mean().sqrt().clamp(min=1e-30))


def assert_no_worse(
    found: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Assert at most twice torch's error, plus a little: some are errors of a few numbers only."""
    assert found.keys() == exact.keys()
    tiny = max(torch.finfo(dtype).eps / 8, 1e-6)
    for name, expected in exact.items():
        assert found[name].isfinite().all(), name
        error, allowed = (relative_error(t[name], expected) for t in (found, plain))
        assert error <= 2 * allowed + tiny, (name, error, allowed)
