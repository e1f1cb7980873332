"""Declares an op of torch.library once, by typed functions that state the shapes of its outputs.

The names and types of their arguments say the rest: the schema, what a backend's launcher is called
with, what autograd keeps for the backward, and which gradients it returns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import (
    Annotated,
    Any,
    Generic,
    ParamSpec,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


# Launchers get contiguous tensors. A tensor that they take in another layout is annotated with the
# function that brings it there; this one leaves it alone.
AnyStrides = Annotated[Tensor, _as_it_is]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    tuple[int, int]: "SymInt[]",
    torch.Size: "SymInt[]",
    torch.dtype: "ScalarType",
}


class Op(Generic[P, R]):
    """An op `simmim::NAME` and, where it has gradients, `simmim::NAME_backward`.

    `forward` and `backward` name and type the arguments of these two and return tensors with the
    shapes, dtypes and strides of their outputs: torch.compile and torch.export call them in place
    of a kernel. A NamedTuple among arguments or outputs stands for its fields, whose names no other
    argument has. Every backend has a launcher for each of the two: a function that takes the same
    arguments by name, in the module BACKEND_kernel of the op's folder.

    `forward` returns a tensor, or a NamedTuple of the result and of what the backward needs, which
    has no gradient. `backward` takes, by name:

    - `grad_out`, the gradient of the result;
    - arguments and outputs of `forward`, which autograd then keeps, and what `context` returns;
    - `of_NAME`, whether the gradient of that argument is wanted, and `of_parameters`, whether that
      of any but the first of `gradients` is.

    Its outputs are the gradients of `gradients`, in that order, or None for those that are not
    wanted or of a tensor that is None. Differentiating them again raises NotImplementedError.

    Attributes:
        name: of the op.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[P, R],
        backward: Callable[..., object] | None = None,
        *,
        gradients: Sequence[str] = (),
        torch_gradients: dict[str, Callable[[Tensor], Tensor]] | None = None,
        context: Callable[..., dict[str, Any]] | None = None,
        folder: str | None = None,
        all_outputs: bool = False,
    ) -> None:
        """Registers the op; nothing of a backend is imported before it runs.

        Args:
            name: of the op.
            forward: its outputs, without values.
            backward: its gradients, without values; None where nothing has one.
            gradients: the arguments of `forward` that the outputs of `backward` belong to.
            torch_gradients: arguments whose gradient PyTorch computes from that of the result.
            context: takes the arguments and outputs of the forward by name; returns what the
                backward gets under a name of its own, or in place of one of them.
            folder: that of the launchers in simmim_kernels. In the folder of the op's name, which
                is that of None, they are called forward and backward, in another one NAME_forward
                and NAME_backward.
            all_outputs: whether callers use more than the result.
        """
        self.name, self._all_outputs = name, all_outputs
        home, prefix = (name, "") if folder is None else (folder, f"{name}_")
        inputs, outputs = _arguments(forward), _part(get_type_hints(forward)["return"])
        self._input_names, self._output_names = list(_leaves(inputs)), list(_leaves(outputs))
        self._make_outputs = _builder(outputs)[1]
        self._is_group = [isinstance(part, _Group) for part in inputs.parts.values()]
        count = len(self._output_names)
        self._run, self._launch = _register(name, inputs, count, forward, home, f"{prefix}forward")
        self._function: type[torch.autograd.Function] | None = None
        if backward is None:
            return
        self._gradient_names = [n for key in gradients for n in _leaves(inputs.parts[key], key)]
        self._torch_gradients, self._context = torch_gradients or {}, context
        needs = _arguments(backward)
        self._needs = _leaves(needs)
        self._flags = {
            flag: [
                self._input_names.index(name)
                for name in (self._gradient_names[1:] if flag == "of_parameters" else [flag[3:]])
            ]
            for flag in self._needs
            if flag.startswith("of_")
        }
        # of every input, the place of its gradient among those of the backward
        places = {name: place for place, name in enumerate(self._gradient_names)}
        self._gradient_places = [places.get(name) for name in self._input_names]
        known = [*self._input_names, *self._output_names]
        self._known = dict(zip(known, range(len(known))))
        self._plan = None if context else _Plan(self._needs, self._known, list(self._flags))
        gradient = f"{name}_backward"
        count = len(self._gradient_names)
        self._run_backward, self._launch_backward = _register(
            gradient, needs, count, backward, home, f"{prefix}backward"
        )
        torch.library.register_autograd(
            f"simmim::{name}", self._backward, setup_context=self._setup_context
        )
        torch.library.register_autograd(f"simmim::{gradient}", _refuse_second_order)
        self._unseen = [None] * (len(self._output_names) - 1)
        self._function = self._make_function()

    def __call__(self, backend: str, /, *arguments: P.args, **unused: P.kwargs) -> R:
        """Runs the op on a backend, with the arguments of `forward` by position."""
        assert not unused
        flat: list[Any] = []
        for argument, is_group in zip(arguments, self._is_group, strict=True):
            flat += cast("tuple[Any, ...]", argument) if is_group else (argument,)
        if self._all_outputs or not _is_plain(flat):
            outputs = self._run(*flat, backend)
        elif self._function is None:
            outputs = self._launch(*flat, backend)
        else:
            apply: Any = self._function.apply
            outputs = [apply(*flat, backend), *self._unseen]
        result: R = self._make_outputs((outputs,) if isinstance(outputs, Tensor) else outputs, 0)
        return result

    def _make_function(self) -> type[torch.autograd.Function]:
        """The op for tensors that nothing but autograd looks at.

        It does what torch.library would, at a quarter of the host's time, but has one output: what
        the backward needs is kept, and given to nobody.
        """
        op = self

        def forward(ctx: Any, *flat: Any) -> Tensor:
            outputs = op._launch(*flat)
            ctx.set_materialize_grads(False)
            op._keep(ctx, flat, outputs)
            out: Tensor = outputs[0]
            return out

        def backward(ctx: Any, grad_out: Tensor | None) -> Any:
            return op._backward(ctx, grad_out)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self.name, (torch.autograd.Function,), methods)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        self._keep(ctx, inputs, outputs)

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], outputs: Sequence[Tensor]) -> None:
        """Keep what the backward needs."""
        *arguments, ctx.backend = inputs
        known = (*arguments, *outputs)
        if self._plan is not None:
            ctx.save_for_backward(*[known[place] for place in self._plan.kept])
            ctx.settings = [known[place] for place in self._plan.settings]
            return
        assert self._context is not None
        more = self._context(**dict(zip(self._known, known, strict=True)))
        tensors, ctx.settings, ctx.kept_names = [], {}, []
        for name, leaf in self._needs.items():
            if name in more:
                value = more[name]
            elif name in self._known:
                value = known[self._known[name]]
            else:
                continue
            if leaf.is_tensor:
                ctx.kept_names.append(name)
                tensors.append(value)
            else:
                ctx.settings[name] = value
        ctx.save_for_backward(*tensors)

    def _backward(self, ctx: Any, grad_out: Tensor | None, *unused: None) -> Any:
        if grad_out is None:
            return (None,) * (len(self._input_names) + 1)
        wanted = ctx.needs_input_grad
        flags = [any(wanted[place] for place in places) for places in self._flags.values()]
        if self._plan is not None:
            ordered = (grad_out, *ctx.saved_tensors, *ctx.settings, *flags)
            flat = [ordered[place] for place in self._plan.order]
        else:
            values = dict(zip(ctx.kept_names, ctx.saved_tensors, strict=True))
            values |= ctx.settings | dict(zip(self._flags, flags)) | {"grad_out": grad_out}
            flat = [values[name] for name in self._needs]
        plain = not torch.is_grad_enabled() and _is_plain((grad_out,))
        run = self._launch_backward if plain else self._run_backward
        outputs = run(*flat, ctx.backend)
        gradients = (outputs,) if isinstance(outputs, Tensor) else outputs
        by_input = [
            gradients[place] if place is not None and is_wanted else None
            for place, is_wanted in zip(self._gradient_places, wanted)
        ]
        for name, gradient in self._torch_gradients.items():
            place = self._input_names.index(name)
            by_input[place] = gradient(grad_out) if wanted[place] else None
        return *by_input, None


class _Plan:
    """Where the arguments of an op's backward come from.

    Attributes:
        kept: places of the tensors that are kept, among the forward's arguments and outputs.
        settings: places of what else is kept.
        order: of the backward's arguments, among the gradient, what is kept, settings and flags.
    """

    def __init__(self, needs: "dict[str, _Leaf]", known: dict[str, int], flags: list[str]) -> None:
        kept = [name for name, leaf in needs.items() if leaf.is_tensor and name != "grad_out"]
        others = [name for name, leaf in needs.items() if not leaf.is_tensor and name not in flags]
        self.kept, self.settings = ([known[name] for name in part] for part in (kept, others))
        places = {n: place for place, n in enumerate(["grad_out", *kept, *others, *flags])}
        self.order = [places[name] for name in needs]


def _is_plain(values: Sequence[Any]) -> bool:
    """Whether tensors have values of their own, and no compiler, mode or transform looks on."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if not (value.is_cuda or value.is_cpu):
                return False
        elif isinstance(value, Tensor):
            return False
    return True


def _below() -> torch._C.DispatchKeySet:
    """What stands before the kernels of torch's own operations in a launcher."""
    names = ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA")
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


_BELOW = _below()


@dataclass(frozen=True)
class _Leaf:
    """An argument or output that the schema has: its type there, and how launchers want it."""

    type: str
    prepare: Callable[[Any], Any] | None  # None for what is taken as it is

    @property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")


@dataclass(frozen=True)
class _Group:
    """Arguments or outputs by name, and what makes one object of them."""

    make: Callable[..., Any]
    parts: "dict[str, _Leaf | _Group]"


def _part(kind: Any) -> _Leaf | _Group:
    if isinstance(kind, type) and hasattr(kind, "_fields"):
        fields = get_type_hints(kind, include_extras=True)
        return _Group(kind, {name: _part(k) for name, k in fields.items()})
    layout = _contiguous
    if get_origin(kind) is Annotated:
        kind, layout = get_args(kind)
    schema_type = _SCHEMA_TYPES[kind]
    if schema_type == "SymInt[]":
        return _Leaf(schema_type, tuple)
    if not schema_type.startswith("Tensor"):
        return _Leaf(schema_type, None)
    if layout is _as_it_is:
        return _Leaf(schema_type, None)
    return _Leaf(schema_type, lambda tensor: None if tensor is None else layout(tensor))


def _arguments(function: Callable[..., object]) -> _Group:
    kinds = get_type_hints(function, include_extras=True)
    del kinds["return"]
    return _Group(dict, {name: _part(kind) for name, kind in kinds.items()})


def _leaves(part: _Leaf | _Group, name: str = "out") -> dict[str, _Leaf]:
    """What stands in a schema for a part of that name."""
    if isinstance(part, _Leaf):
        return {name: part}
    return {n: leaf for key, inner in part.parts.items() for n, leaf in _leaves(inner, key).items()}


def _builder(part: _Leaf | _Group) -> tuple[int, Callable[[Sequence[Any], int], Any]]:
    """How many leaves a part has, and what makes it of those that begin at a place."""
    if isinstance(part, _Leaf):
        return 1, lambda values, at: values[at]
    count, steps = 0, list[tuple[int, Callable[[Sequence[Any], int], Any]]]()
    for inner in part.parts.values():
        leaves, build = _builder(inner)
        steps.append((count, build))
        count += leaves
    make = part.make
    if all(isinstance(inner, _Leaf) for inner in part.parts.values()):
        return count, lambda values, at: make(*values[at : at + count])
    return count, lambda values, at: make(*[build(values, at + step) for step, build in steps])


def _flat(outputs: Any) -> list[Tensor | None]:
    """All tensors of a launcher's outputs, one after the other."""
    tensors: list[Tensor | None] = []
    for part in (outputs,) if outputs is None or isinstance(outputs, Tensor) else outputs:
        if part is None or isinstance(part, Tensor):
            tensors.append(part)
        else:
            tensors += _flat(part)
    return tensors


def _apart(tensor: Tensor) -> Tensor:
    """A vector with memory of its own: outputs of torch.library share none, sums of a launch do."""
    shared = tensor.dim() == 1 and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if shared else tensor


def _register(
    name: str,
    inputs: _Group,
    num_outputs: int,
    shapes: Callable[..., Any],
    folder: str,
    launcher: str,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Registers one op of torch.library; returns what calls it, and what it calls."""
    leaves = _leaves(inputs)
    arguments = ", ".join(f"{leaf.type} {name}" for name, leaf in leaves.items())
    returned = "Tensor" if num_outputs == 1 else f"({', '.join(['Tensor'] * num_outputs)})"
    torch.library.define(f"simmim::{name}", f"({arguments}, str backend) -> {returned}")

    names = list(inputs.parts)
    make_arguments = _builder(_Group(lambda *parts: parts, inputs.parts))[1]
    prepares = [(i, leaf.prepare) for i, leaf in enumerate(leaves.values()) if leaf.prepare]
    launchers: dict[str, Callable[..., Any]] = {}

    def as_returned(outputs: Any, first: Tensor) -> Tensor | list[Tensor]:
        # a schema has no None, float32 [0] stands for it
        none = first.new_empty
        tensors = [none(0, dtype=torch.float32) if t is None else t for t in _flat(outputs)]
        return tensors[0] if num_outputs == 1 else tensors

    def find_launcher(backend: str) -> Callable[..., Any]:
        module = import_module(f"simmim_kernels.{folder}.{backend}_kernel")
        launch: Callable[..., Any] = getattr(module, launcher)
        return launch

    def run(*flat: Any) -> Tensor | list[Tensor]:
        return as_returned([None if t is None else _apart(t) for t in launch(*flat)], flat[0])

    def launch(*flat: Any) -> list[Tensor | None]:
        *values, backend = flat
        for place, prepare in prepares:
            values[place] = prepare(values[place])
        call = launchers.get(backend) or launchers.setdefault(backend, find_launcher(backend))
        # products have the dtypes of their operands also under autocast
        with torch._C._ExcludeDispatchKeyGuard(_BELOW):
            return _flat(call(**dict(zip(names, make_arguments(values, 0)))))

    def run_without_values(*flat: Any) -> Tensor | list[Tensor]:
        *values, _ = flat
        return as_returned(shapes(**dict(zip(names, make_arguments(values, 0)))), values[0])

    torch.library.impl(f"simmim::{name}", "CompositeExplicitAutograd", run)
    torch.library.register_fake(f"simmim::{name}", run_without_values)
    packet: Callable[..., Any] = getattr(torch.ops.simmim, name)
    return packet, launch


def _refuse_second_order(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("the ops of simmim_kernels have gradients of first order only")


def gradients_like(
    x: Tensor, *parameters: Tensor | None, of_parameters: bool
) -> list[Tensor | None]:
    """Gradients without values: that of x, and those of parameters that are there, if wanted."""
    wanted = (p if of_parameters else None for p in parameters)
    return [x.new_empty(x.shape), *(None if p is None else p.new_empty(p.shape) for p in wanted)]
