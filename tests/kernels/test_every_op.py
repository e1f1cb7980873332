"""What holds of every op: opcheck, gradients of what is wanted only, first order, checkpointing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from op_samples import SAMPLES, Sample, wave

# No property below depends on the instruction set.
KERNELS = pytest.mark.parametrize("backend", ["native", "triton-interpreted"], indirect=True)
BACKENDS = pytest.mark.parametrize(
    "backend", ["reference", "native", "triton-interpreted"], indirect=True
)
ALL = {f"{op}-{i}": make for op, makers in SAMPLES.items() for i, make in enumerate(makers)}
FIRST = [f"{op}-0" for op in SAMPLES]
EVERY_OP = pytest.mark.parametrize(
    "sample", [name for name in FIRST if not name.startswith("random_")], indirect=True
)
OPCHECK_WARNS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
# Tensors of which no op has a gradient.
CONSTANT = {"image", "mask", "mean", "std", "branch_scale"}


@pytest.fixture
def sample(request: pytest.FixtureRequest, backend: str) -> Sample:
    made = ALL[request.param]()
    if backend not in (*made.backends, "reference"):
        pytest.skip(f"{request.param} has no {backend} kernel")
    return made


def gradients(sample: Sample, wanted: set[str], backend: str) -> dict[str, Tensor | None]:
    leaves = sample.leaves(wanted)
    out = sample.run(leaves, backend)
    out.backward(wave(out))
    return {name: leaves[name].grad for name in sample.gradients}


class Recorder(TorchDispatchMode):
    """Our ops with their arguments, as autograd calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "simmim":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_every_registered_op_has_samples() -> None:
    registered = {
        name.removeprefix("simmim::").removesuffix("_backward")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("simmim::")
    }
    assert registered - {"cubed_line"} == SAMPLES.keys()


def check(sample: Sample, backend: str, wanted: set[str], *, forward: bool) -> None:
    """opcheck of the backward of these gradients, and of the forward before it."""
    with Recorder() as recorder:
        out = sample.run(sample.leaves(wanted), backend)
        if sample.gradients:
            out.backward(wave(out))
    (op, arguments), *backward = recorder.calls
    assert len(backward) == bool(sample.gradients)
    if forward:
        names = [argument.name for argument in op._schema.arguments]
        leaves = (
            t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            if isinstance(t, Tensor) and t.dtype.is_floating_point and name not in CONSTANT
            else t
            for name, t in zip(names, arguments, strict=True)
        )
        torch.library.opcheck(op, tuple(leaves))
    for op, arguments in backward:
        constants = (t.detach() if isinstance(t, Tensor) else t for t in arguments)
        torch.library.opcheck(op, tuple(constants))


@OPCHECK_WARNS
@KERNELS
@pytest.mark.parametrize("sample", FIRST, indirect=True)
def test_opcheck(sample: Sample, backend: str) -> None:
    """The forward, and the backward of every gradient, of the first and of all but the first."""
    names, first = set(sample.gradients), set(sample.gradients[:1])
    check(sample, backend, names, forward=True)
    if len(names) > 1:
        check(sample, backend, first, forward=False)
        check(sample, backend, names - first, forward=False)


@OPCHECK_WARNS
@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("sample", [name for name in ALL if name not in FIRST], indirect=True)
def test_opcheck_without_optional_arguments(sample: Sample, backend: str) -> None:
    check(sample, backend, set(sample.gradients), forward=True)


@KERNELS
@EVERY_OP
def test_second_order_is_refused_not_wrong(sample: Sample, backend: str) -> None:
    first = sample.gradients[0]
    leaves = sample.leaves({first})
    out = sample.run(leaves, backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[first], create_graph=True)
    with pytest.raises(NotImplementedError, match="first order only"):
        gradient.sum().backward()


@BACKENDS
@EVERY_OP
def test_only_what_is_wanted_has_a_gradient(sample: Sample, backend: str) -> None:
    expected = gradients(sample, set(sample.gradients), "reference")
    exact = all(
        t.dtype != torch.bfloat16 for t in sample.arguments.values() if isinstance(t, Tensor)
    )
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if exact else {"rtol": 0.03, "atol": 0.03}
    first, *others = sample.gradients
    for wanted in ({first}, set(others), set(others[-1:]), {first, *others[1:2]}):
        if wanted:
            for name, gradient in gradients(sample, wanted, backend).items():
                assert (gradient is not None) == (name in wanted), name
                if gradient is not None:
                    torch.testing.assert_close(gradient, expected[name], **tolerance)


@KERNELS
@EVERY_OP
def test_checkpointing(sample: Sample, backend: str) -> None:
    """Its hooks hand out each kept tensor once."""
    expected = gradients(sample, set(sample.gradients), backend)
    leaves = sample.leaves(set(sample.gradients))
    first = sample.gradients[0]

    def run(value: Tensor) -> Tensor:
        return sample.run(leaves | {first: value}, backend)

    out = checkpoint(run, leaves[first], use_reentrant=False)
    out.backward(wave(out))
    for name, gradient in expected.items():
        torch.testing.assert_close(leaves[name].grad, gradient)
