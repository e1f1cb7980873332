"""What a declaration makes of an op: the smallest one there is, which nothing else registers."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from simmim_kernels.op import AnyStrides, Op

Launch = tuple[str, dict[str, object]]
LAUNCHES: list[Launch] = []


class Line(NamedTuple):
    slope: Tensor
    offset: Tensor | None


class Cubed(NamedTuple):
    out: Tensor
    square: Tensor


def shapes(x: Tensor, line: Line, image: AnyStrides, size: tuple[int, int], power: int) -> Cubed:
    return Cubed(torch.empty_like(x), torch.empty_like(x))


def gradient_shapes(
    grad_out: Tensor, square: Tensor, line: Line, size: tuple[int, int], of_x: bool, of_slope: bool
) -> list[Tensor]:
    return [torch.empty_like(grad_out), *(torch.empty_like(line.slope) for _ in range(2))]


def forward(x: Tensor, line: Line, image: Tensor, size: tuple[int, int], power: int) -> Cubed:
    """slope · x³ + offset, without regard to the image."""
    LAUNCHES.append(("forward", dict(locals())))
    offset = 0 if line.offset is None else line.offset
    return Cubed(line.slope * x**power + offset, x**2)


def backward(
    grad_out: Tensor, square: Tensor, line: Line, size: tuple[int, int], of_x: bool, of_slope: bool
) -> list[Tensor]:
    LAUNCHES.append(("backward", dict(locals())))
    of_line = [(grad_out * square**1.5).sum().view(1), grad_out.sum().view(1)]
    return [3 * square * line.slope * grad_out, *of_line]


launchers = SimpleNamespace(forward=forward, backward=backward)
sys.modules["simmim_kernels.cubed_line.native_kernel"] = launchers  # type: ignore[assignment]
cubed_line = Op("cubed_line", shapes, gradient_shapes, gradients=("x", "line"))


def make(**changes: object) -> list[object]:
    """Positive numbers, so that the square tells the cube."""
    line = Line(torch.tensor([2.0]), torch.tensor([1.0]))
    image = torch.arange(6.0).view(2, 3).t()
    values = {"x": torch.rand(3, 4) + 0.5, "line": line, "image": image, "size": (5, 7), "power": 3}
    return list((values | changes).values())


def flat(arguments: list[object]) -> list[object]:
    x, line, *others = arguments
    assert isinstance(line, Line)
    return [x, *line, *others, "native"]


def test_the_schema_is_that_of_the_annotations() -> None:
    ops = torch.ops.simmim
    assert str(ops.cubed_line.default._schema) == (
        "simmim::cubed_line(Tensor x, Tensor slope, Tensor? offset, Tensor image, SymInt[] size, "
        "SymInt power, str backend) -> (Tensor, Tensor)"
    )
    assert str(ops.cubed_line_backward.default._schema) == (
        "simmim::cubed_line_backward(Tensor grad_out, Tensor square, Tensor slope, Tensor? offset, "
        "SymInt[] size, bool of_x, bool of_slope, str backend) -> (Tensor, Tensor, Tensor)"
    )


def test_launchers_get_arguments_in_their_types() -> None:
    x, *others = make(x=torch.rand(4, 3).t())
    LAUNCHES.clear()
    cubed_line("native", x, *others)
    ((name, given),) = LAUNCHES
    assert name == "forward"
    assert given["x"].is_contiguous()
    assert not given["image"].is_contiguous()
    assert given["size"] == (5, 7)
    assert isinstance(given["line"], Line)


def test_outputs_and_gradients() -> None:
    x, line, *others = make()
    leaves = [t.clone().requires_grad_() for t in (x, *line)]
    out, square = cubed_line("native", leaves[0], Line(*leaves[1:]), *others)
    assert square is None  # kept for the backward, and given to nobody
    _, square = torch.ops.simmim.cubed_line(*flat([leaves[0], Line(*leaves[1:]), *others]))
    assert not square.requires_grad
    out.backward(torch.full_like(out, 0.5))
    found = [t.grad for t in leaves]
    plain = [t.clone().requires_grad_() for t in (x, *line)]
    (plain[1] * plain[0] ** 3 + plain[2]).backward(torch.full_like(out, 0.5))
    for got, leaf in zip(found, plain, strict=True):
        torch.testing.assert_close(got, leaf.grad)


@pytest.mark.parametrize("wanted", ["x", "slope", "offset"])
def test_only_what_is_wanted_has_a_gradient(wanted: str) -> None:
    x, line, *others = make()
    leaves = {"x": x, "slope": line.slope, "offset": line.offset}
    leaves[wanted].requires_grad_()
    LAUNCHES.clear()
    cubed_line("native", leaves.pop("x"), Line(**leaves), *others).out.sum().backward()
    given = LAUNCHES[-1][1]
    assert (given["of_x"], given["of_slope"]) == (wanted == "x", wanted == "slope")
    for name, tensor in ({"x": x} | line._asdict()).items():
        assert (tensor.grad is not None) == (name == wanted)


def test_what_is_not_there_has_no_gradient() -> None:
    x, line, *others = make()
    out = cubed_line("native", x.requires_grad_(), Line(line.slope, None), *others).out
    out.sum().backward()
    assert x.grad is not None


def test_opcheck() -> None:
    x, line, *others = make()
    arguments = flat([x.requires_grad_(), Line(line.slope.requires_grad_(), None), *others])
    torch.library.opcheck(torch.ops.simmim.cubed_line.default, arguments)
    x, line, *_ = make()
    arguments = [x, x, *line, (5, 7), True, False, "native"]
    torch.library.opcheck(torch.ops.simmim.cubed_line_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    def compiled(x: Tensor, line: Line, *others: object) -> Tensor:
        return cubed_line("native", x, line, *others).out

    x, line, *others = make()
    out = compiled(x.requires_grad_(), line, *others)
    out.sum().backward()
    assert [t for t in targets if t.startswith("simmim.")] == ["simmim.cubed_line"]
    torch.testing.assert_close(out, 2 * x**3 + 1)
    torch.testing.assert_close(x.grad, 6 * x.detach() ** 2)


def test_exports() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return cubed_line("native", x, *others).out

    x, *others = make()
    program = torch.export.export(Module(), (x,))
    torch.testing.assert_close(program.module()(x), Module()(x))


def test_second_order_is_refused() -> None:
    x, *others = make()
    out = cubed_line("native", x.requires_grad_(), *others).out
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first order only"):
        gradient.sum().backward()
