"""Runs Triton kernels on CPU tensors in Triton's interpreter, and checks every access they make.

    with interpret() as report:
        op.forward(x, mask)                     # kernel[grid](...) runs here, program by program
    assert report.launches[0].loaded.bytes == x.nbytes

Upstream's interpreter is chosen by an environment variable at import, gives wrong bfloat16 values,
lets kernels read and write anywhere and runs programs one after another, so that no race shows.
Inside `interpret()`:

- interpreting and compiling live in one process, and everything is as before on leaving;
- bfloat16 is computed in float32 and rounded to nearest, ties to even, as the hardware does;
- an access outside the tensor that a pointer came from, and bytes that two programs share in any
  way that depends on their order, raise MemoryFault (an AssertionError);
- bytes are counted per launch.

What this proves is labelled "interpreted": the source of the kernel, not the code that is compiled
from it. Limits: float32 `tl.dot` is IEEE here (TF32 on a GPU unless `input_precision` says
otherwise); bounds are those of a tensor's storage, which may be larger than the tensor; hazards
between the threads of one program do not show; the state is process-wide, so one thread at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

Program = tuple[int, int, int]


class MemoryFault(AssertionError):
    """An access that a GPU would not forgive: out of bounds, or racing with another program."""


@dataclass(frozen=True)
class Fault:
    """One faulty access.

    Attributes:
        kernel: name of the kernel.
        program: program id (x, y, z) that made the access.
        kind: "load", "store" or "atomic" out of bounds, or what raced with what.
        lanes: number of elements of the access at fault.
        other_program: for a race, the program that touched the same byte before.
    """

    kernel: str
    program: Program
    kind: str
    lanes: int
    other_program: Program | None = None

    def __str__(self) -> str:
        other = f" (the other is program {self.other_program})" if self.other_program else ""
        return f"{self.kernel}, program {self.program}: {self.kind}, {self.lanes} lanes{other}"


@dataclass
class Traffic:
    """Bytes of one kind of access in one launch.

    Attributes:
        bytes: every lane that is not masked off, each time it is accessed.
        distinct_bytes: the same, but each byte of memory counted once per launch.
    """

    bytes: int = 0
    distinct_bytes: int = 0


@dataclass
class Launch:
    """What one kernel launch did to memory."""

    kernel: str
    grid: Program
    loaded: Traffic = field(default_factory=Traffic)
    stored: Traffic = field(default_factory=Traffic)
    atomic: Traffic = field(default_factory=Traffic)
    faults: list[Fault] = field(default_factory=list)


@dataclass
class Report:
    """All launches inside one `interpret()`, in order (empty with sanitize=False)."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        return [fault for launch in self.launches for fault in launch.faults]

    @property
    def loaded_bytes(self) -> int:
        """Distinct bytes that every launch loads, summed: what must come from memory."""
        return sum(launch.loaded.distinct_bytes for launch in self.launches)

    @property
    def stored_bytes(self) -> int:
        """Distinct bytes that every launch stores or updates atomically, summed."""
        return sum(
            launch.stored.distinct_bytes + launch.atomic.distinct_bytes for launch in self.launches
        )


@contextmanager
def interpret(*, sanitize: bool = True, raise_on_fault: bool = True) -> Iterator[Report]:
    """Inside, every Triton kernel is interpreted on CPU tensors instead of being compiled.

    Args:
        sanitize: check and count every access; without it the report stays empty.
        raise_on_fault: raise MemoryFault at the first fault, before the access is made. Otherwise
            faults are collected in the report, and lanes out of bounds are masked off.

    Raises:
        RuntimeError: Triton was imported with TRITON_INTERPRET=1, so that nothing can be compiled.
    """
    if not isinstance(tl.sum, JITFunction):
        raise RuntimeError("interpret() needs Triton imported without TRITON_INTERPRET")
    report = Report()
    sanitizer = Sanitizer(report, raise_on_fault) if sanitize else None
    functions = _InterpretedFunctions()

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if not warmup:
            _launch(functions, sanitizer, kernel, grid, args, options)

    def call(function: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
        return functions[function](*args, **kwargs)

    original_jit = triton.jit

    def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        # a module first imported in here would get functions that can never be compiled
        if function is None:
            return lambda late: jit(late, **options)
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = False
            return original_jit(function, **options)

    with ExitStack() as stack:
        stack.enter_context(_replaced(triton, "jit", jit))
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = True
        stack.enter_context(triton.knobs.compilation.scope())
        # Otherwise every exception arrives as InterpreterError(repr(exception)).
        triton.knobs.compilation.front_end_debugging = True
        stack.enter_context(_replaced(JITFunction, "run", run))
        stack.enter_context(_replaced(JITFunction, "__call__", call))
        stack.enter_context(_replaced(upstream.ReduceScanOpInterface, "check_tensor", _check_input))
        builder = upstream.interpreter_builder
        stack.enter_context(_replaced(builder, "sanitizer", sanitizer))
        stack.enter_context(_replaced(builder, "__class__", CheckedBuilder))
        if sanitizer is not None:
            stack.enter_context(_replaced(upstream, "_implicit_cvt", sanitizer.as_argument))
        yield report


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = getattr(owner, name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class _InterpretedFunctions:
    """Kernels and device functions, rewritten for the interpreter when first called.

    Upstream adds every name of its own module to the globals of the kernel's module and leaves them
    there; ours run in a copy, which also holds what a kernel inside a function closes over.
    """

    def __init__(self) -> None:
        # By Python function: the hash of a JITFunction stays with it, and would be computed here
        # from the patched library.
        self._rewritten: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __getitem__(self, function: JITFunction[Any]) -> Callable[..., Any]:
        if function.fn not in self._rewritten:
            self._rewritten[function.fn] = self._rewrite(function)
        return self._rewritten[function.fn]

    @staticmethod
    def _rewrite(function: JITFunction[Any]) -> Callable[..., Any]:
        rewriter = upstream.FunctionRewriter(function.fn)

        def execute(tree: Any) -> Any:
            scope = function.get_capture_scope() | {
                "interpreter_semantic": upstream.interpreter_semantic
            }
            found: dict[str, Any] = {}
            exec(compile(tree, filename=rewriter.filename, mode="exec"), scope, found)
            return found[function.fn.__name__]

        rewriter._compile_and_exec = execute
        # Upstream would make (and register) a second JITFunction to find these.
        rewriter._get_jit_fn_file_line = lambda: (
            function.file_name,
            function.def_file_line_number,
        )
        return rewriter.rewrite_ast()


def _launch(
    functions: _InterpretedFunctions,
    sanitizer: "Sanitizer | None",
    kernel: JITFunction[Any],
    grid: Any,
    args: Sequence[Any],
    options: dict[str, Any],
) -> None:
    """Runs every program of a launch."""
    for hook in kernel.pre_run_hooks:
        hook(*args, **options)
    parameters = {name: v for name, v in options.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*args, **parameters)
    bound.apply_defaults()
    if callable(grid):
        grid = grid(dict(bound.arguments))
    grid = (*grid, 1, 1)[:3]
    executor = upstream.GridExecutor(functions[kernel], kernel.arg_names, grid)
    # tl and tl.core are both patched here once, so that device functions need no patching per call.
    scope = upstream._patch_lang(_sees_all_of_triton)
    try:
        # Overflow to infinity and NaN are values here, as on a GPU.
        with np.errstate(all="ignore"):
            if sanitizer is None:
                executor(*args, **parameters)
            else:
                with sanitizer.launch(kernel.__name__, grid, bound.arguments.values()):
                    executor(*args, **parameters)
    finally:
        scope.restore()


def _sees_all_of_triton() -> None: ...


_sees_all_of_triton = FunctionType(  # type: ignore[assignment]
    _sees_all_of_triton.__code__, {"tl": tl, "core": tl.core}
)


# The interpreter keeps bfloat16 as uint16 bit patterns and computes on the patterns.


def _is_bfloat16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widen(handle: TensorHandle) -> TensorHandle:
    """A bfloat16 handle as float32 (exact); any other as it is."""
    if not _is_bfloat16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _round(handle: TensorHandle) -> TensorHandle:
    """A float handle as bfloat16, to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = values.view(np.uint32)
    ties_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + ties_to_even) >> np.uint32(16)).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _narrow_result(result: TensorHandle) -> TensorHandle:
    """The float32 result of an operation on bfloat16 values, as the type that it has."""
    if result.data.dtype == np.bool_:  # a comparison
        return TensorHandle(result.data, tl.int1)
    return _round(result)


def _check_input(self: upstream.ReduceScanOpInterface, inputs: Sequence[Any]) -> None:
    """Reductions and scans, as upstream, but none on bfloat16 patterns."""
    for tensor in inputs:
        if not isinstance(tensor, tl.core.tensor):
            raise ValueError(f"input must be a tensor, got {type(tensor)}")
        if tensor.dtype == tl.bfloat16:
            raise TypeError("reduction of bfloat16: cast to float32 first, right after the load")
        self.check_axis(tensor.shape, self.axis)


class CheckedBuilder(InterpreterBuilder):  # type: ignore[misc]
    """Triton's interpreter with right bfloat16 values, which tells a sanitizer of every access."""

    sanitizer: "Sanitizer | None" = None

    def binary_op(
        self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]
    ) -> TensorHandle:
        if _is_bfloat16(lhs) and _is_bfloat16(rhs):
            return _narrow_result(super().binary_op(_widen(lhs), _widen(rhs), op))
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if _is_bfloat16(arg):
            return _narrow_result(super().unary_op(_widen(arg), op))
        return super().unary_op(arg, op)

    def create_clampf(
        self, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, propagate_nans: Any
    ) -> TensorHandle:
        if _is_bfloat16(arg):
            wide = (_widen(arg), _widen(lo), _widen(hi))
            return _narrow_result(super().create_clampf(*wide, propagate_nans))
        return super().create_clampf(arg, lo, hi, propagate_nans)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if _is_bfloat16(z):
            return _narrow_result(super().create_fma(_widen(x), _widen(y), _widen(z)))
        return super().create_fma(x, y, z)

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any
    ) -> TensorHandle:
        return super().create_dot(_widen(a), _widen(b), d, *options)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bfloat16(src) else _round(src)
        return super().cast_impl(_widen(src), dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        exact = {tl.bfloat16, tl.float16, tl.float32, tl.float64}
        if {src.dtype.scalar, dst_type.scalar} <= exact:
            if rounding_mode not in (None, upstream._ir.ROUNDING_MODE.RTNE):
                raise NotImplementedError(f"interpreted cast with {rounding_mode}")
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def get_bf16(self, value: float) -> TensorHandle:
        return _round(TensorHandle(np.array([value], dtype=np.float32), tl.float32))

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, *others: Any, **options: Any
    ) -> TensorHandle:
        if self.sanitizer is not None:
            ptrs, mask = self.sanitizer.check("load", self.grid_idx, ptrs, mask)
        return super().create_masked_load(ptrs, mask, *others, **options)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *options: Any
    ) -> Any:
        if self.sanitizer is not None:
            ptrs, mask = self.sanitizer.check("store", self.grid_idx, ptrs, mask, value)
        return super().create_masked_store(ptrs, value, mask, *options)

    def create_atomic_rmw(
        self, op: Any, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, *options: Any
    ) -> TensorHandle:
        if self.sanitizer is not None:
            ptr, mask = self.sanitizer.check("atomic", self.grid_idx, ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *options)

    def create_atomic_cas(
        self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, *options: Any
    ) -> TensorHandle:
        if self.sanitizer is not None:
            everywhere = TensorHandle(np.ones(ptr.data.shape, dtype=bool), tl.int1)
            ptr, mask = self.sanitizer.check("atomic", self.grid_idx, ptr, everywhere)
            if not mask.data.all():
                raise MemoryFault(str(self.sanitizer.report.faults[-1]))  # it takes no mask
        return super().create_atomic_cas(ptr, cmp, val, *options)


_NOBODY = 0
_SEVERAL = -1

# Kernels see made-up addresses, one span of 2^50 bytes per storage: beyond any real address, and so
# far apart that no offset leads from one tensor into another.
_SPAN = 1 << 50
_PAGE = 1 << 12

_convert_argument = upstream._implicit_cvt


class _Memory:
    """The storage behind tensors of a launch: per byte, which program loaded, stored, updated it.

    Program numbers count from 1 in launch order.
    """

    def __init__(self, storage: torch.UntypedStorage, index: int) -> None:
        real = storage.data_ptr()
        self.size_bytes = storage.nbytes()
        self.start = (index + 1) * _SPAN + real % _PAGE  # as aligned as the real one
        self.to_real = real - self.start
        self.users = {
            kind: np.zeros(self.size_bytes, dtype=np.int32) for kind in ("load", "store", "atomic")
        }


# What two programs may not do to one byte in one launch, whatever their order.
_CONFLICTS = {
    "load": ("store", "atomic"),
    "store": ("store", "load", "atomic"),
    "atomic": ("store", "load"),
}
_RACES = {
    ("load", "store"): "reads what another program wrote",
    ("load", "atomic"): "reads what another program updates atomically",
    ("store", "store"): "writes what another program wrote",
    ("store", "load"): "writes what another program reads",
    ("store", "atomic"): "writes what another program updates atomically",
    ("atomic", "store"): "updates atomically what another program wrote",
    ("atomic", "load"): "updates atomically what another program reads",
}


class Sanitizer:
    """Checks and counts the accesses of each launch; see the module's docstring."""

    def __init__(self, report: Report, raise_on_fault: bool) -> None:
        self.report = report
        self.raise_on_fault = raise_on_fault
        self._launch: Launch | None = None
        self._memories: dict[int, _Memory] = {}  # by the real address of their first byte

    @contextmanager
    def launch(self, kernel: str, grid: Program, arguments: Any) -> Iterator[None]:
        """Counts accesses as those of one launch, which may touch the tensors it is given."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for tensor in _tensors_in(arguments)
        }
        self._memories = {
            address: _Memory(storage, index)
            for index, (address, storage) in enumerate(storages.items())
            if storage.nbytes()
        }
        self._launch = Launch(kernel, grid)
        self.report.launches.append(self._launch)
        try:
            yield
        finally:
            for kind, traffic in self._traffic(self._launch).items():
                traffic.distinct_bytes = sum(
                    int(np.count_nonzero(memory.users[kind])) for memory in self._memories.values()
                )
            self._launch, self._memories = None, {}

    def as_argument(self, value: Any) -> Any:
        """A kernel's argument for the interpreter, tensors as made-up addresses."""
        converted = _convert_argument(value)
        if isinstance(value, torch.Tensor):
            memory = self._memories.get(value.untyped_storage().data_ptr())
            address = 0 if memory is None else value.data_ptr() - memory.to_real
            converted.handle.data = np.array([address], dtype=np.uint64)
        return converted

    def check(
        self,
        kind: str,
        program: Program,
        pointers: TensorHandle,
        mask: TensorHandle,
        value: TensorHandle | None = None,
    ) -> tuple[TensorHandle, TensorHandle]:
        """Checks one access; returns real pointers, and the mask without lanes out of bounds."""
        assert self._launch is not None, "an access outside a launch"
        size = upstream._get_np_dtype(pointers.get_element_ty()).itemsize
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[active].astype(np.int64)
        inside = np.zeros(addresses.shape, dtype=bool)
        real = np.zeros(addresses.shape, dtype=np.int64)
        for memory in self._memories.values():
            offsets = addresses - memory.start
            here = (offsets >= 0) & (offsets + size <= memory.size_bytes)
            inside |= here
            real[here] = addresses[here] + memory.to_real
            self._note(kind, program, memory, offsets[here], size)
        self._traffic(self._launch)[kind].bytes += int(inside.sum()) * size
        if value is not None:
            self._check_lanes_agree(program, addresses, value.data, active)
        if not inside.all():
            self._fault(program, f"{kind} out of bounds", int(np.count_nonzero(~inside)))
        real_pointers = np.zeros(active.shape, dtype=np.uint64)
        real_pointers[active] = real.astype(np.uint64)
        active[active] = inside
        return TensorHandle(real_pointers, pointers.dtype), TensorHandle(active, tl.int1)

    def _note(
        self, kind: str, program: Program, memory: _Memory, offsets: np.ndarray, size: int
    ) -> None:
        """Notes one access to one storage, and the races that it makes."""
        if not offsets.size:
            return
        touched = offsets[:, None] + np.arange(size)  # [lanes, bytes]
        me = self._number(program)
        for other_kind in _CONFLICTS[kind]:
            users = memory.users[other_kind][touched]
            racing = (users != _NOBODY) & (users != me)
            if racing.any():
                other = users[racing][0]
                lanes = int(np.count_nonzero(racing.any(axis=1)))
                self._fault(program, _RACES[kind, other_kind], lanes, self._program(int(other)))
        before = memory.users[kind][touched]
        shared = (before != _NOBODY) & (before != me)
        memory.users[kind][touched] = np.where(shared, _SEVERAL, me)

    def _check_lanes_agree(
        self, program: Program, addresses: np.ndarray, values: np.ndarray, active: np.ndarray
    ) -> None:
        """Lanes of one store which write different values to one address race among themselves."""
        if np.unique(addresses).size == addresses.size:
            return
        stored = np.ascontiguousarray(np.broadcast_to(values, active.shape)[active])
        # As bits: NaN must equal NaN, and -0.0 must differ from 0.0.
        bits = stored.view(f"u{stored.itemsize}")
        pairs = np.unique(np.stack([addresses.astype(np.uint64), bits.astype(np.uint64)]), axis=1)
        if conflicts := pairs.shape[1] - np.unique(pairs[0]).size:
            self._fault(program, "lanes of one store write different values", conflicts + 1)

    def _fault(self, program: Program, kind: str, lanes: int, other: Program | None = None) -> None:
        assert self._launch is not None
        fault = Fault(self._launch.kernel, program, kind, lanes, other)
        self._launch.faults.append(fault)
        if self.raise_on_fault:
            raise MemoryFault(str(fault))

    @staticmethod
    def _traffic(launch: Launch) -> dict[str, Traffic]:
        return {"load": launch.loaded, "store": launch.stored, "atomic": launch.atomic}

    def _number(self, program: Program) -> int:
        assert self._launch is not None
        return int(np.ravel_multi_index(program, self._launch.grid)) + 1

    def _program(self, number: int) -> Program | None:
        assert self._launch is not None
        if number == _SEVERAL:
            return None
        x, y, z = np.unravel_index(number - 1, self._launch.grid)
        return int(x), int(y), int(z)


def _tensors_in(arguments: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments, also those in tuples and tensor descriptors."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors_in(argument)
        elif isinstance(base := getattr(argument, "base", None), torch.Tensor):
            yield base
