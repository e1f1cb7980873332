"""Chooses which backend of an op runs: each lists its reasons against, none means it can."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from simmim_kernels import native, triton_backend

ENVIRONMENT_VARIABLE = "SIMMIM_BACKEND"
KNOWN_BACKENDS = ("triton", "native", "xformers", "reference")


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Attributes:
        name: "triton", "native", "xformers" or "reference".
        reasons_against: takes the op's tensors and lists why this backend cannot run on them.
    """

    name: str
    reasons_against: Callable[..., list[str]]


def describe(**values: Tensor | int | None) -> str:
    """Shapes, dtypes and devices of tensors, and plain values, for the text of an error."""
    return ", ".join(
        f"{name} {tuple(value.shape)} {value.dtype} {value.device}"
        if isinstance(value, Tensor)
        else f"{name} {value}"
        for name, value in values.items()
        if value is not None
    )


def wrong_input(**values: Tensor | int | None) -> Callable[[str], ValueError]:
    """What makes the error of an op whose arguments `values` do not fit: from what is wrong."""
    return lambda what: ValueError(f"{what}: {describe(**values)}")


def never(*tensors: Tensor | None) -> list[str]:
    """No reason against: the reference runs everywhere."""
    return []


# Those of every op, in order of preference.
BACKENDS = (
    Backend("triton", triton_backend.reasons_against),
    Backend("native", native.reasons_against),
    Backend("reference", never),
)


def choose(
    op: str, backends: Sequence[Backend], inputs: Sequence[Tensor | None], requested: str | None
) -> str:
    """Name of the first backend that can run, or of the one that was asked for.

    Args:
        op: name of the op, for messages.
        backends: in order of preference.
        inputs: the op's tensors.
        requested: a backend's name; None takes SIMMIM_BACKEND from the environment if this op has
            it, and otherwise the first backend that can run.

    Raises:
        ValueError: `requested` is no backend of this op.
        RuntimeError: the requested backend (or every backend) cannot run; lists all the reasons.
    """
    source = "backend"
    if requested is None and (wanted := os.environ.get(ENVIRONMENT_VARIABLE)):
        if wanted not in KNOWN_BACKENDS:
            known = ", ".join(KNOWN_BACKENDS)
            raise ValueError(f"{ENVIRONMENT_VARIABLE}={wanted!r} is unknown; known are {known}")
        if wanted in {b.name for b in backends}:
            source, requested = ENVIRONMENT_VARIABLE, wanted
    if requested is not None:
        named = [b for b in backends if b.name == requested]
        if not named:
            names = ", ".join(b.name for b in backends)
            raise ValueError(f"{op}: {source}={requested!r} is unknown here; it has {names}")
        if reasons := named[0].reasons_against(*inputs):
            raise RuntimeError(f"{op}: {source}={requested!r} cannot run: {'; '.join(reasons)}")
        return requested
    rejected: list[str] = []
    for backend in backends:
        reasons = backend.reasons_against(*inputs)
        if not reasons:
            return backend.name
        rejected.append(f"{backend.name}: {'; '.join(reasons)}")
    raise RuntimeError(f"{op}: no backend can run. {' | '.join(rejected)}")
