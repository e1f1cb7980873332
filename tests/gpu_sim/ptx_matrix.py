"""PTX matrix instructions: mma.sync, ldmatrix, stmatrix and wgmma (PTX ISA 8.8, section 9.7.15).

Shapes: M N K of the product; a warp holds 16 rows of A and D, in wgmma too, where each of four
warps computes its own 16 of the 64 rows. Products are summed in float64 and rounded once, the
hardware sums less exactly; tf32 operands lose their 13 low bits as in the hardware.
"""

import re
from collections.abc import Callable

import numpy as np

from gpu_sim.ptx_floats import decode_float, encode_float
from gpu_sim.ptx_machine import (
    POISON,
    UNSIGNED,
    Array,
    Mask,
    MatrixOperand,
    MatrixResult,
    Warp,
)
from gpu_sim.ptx_operands import (
    F32,
    TYPES,
    U64,
    Execute,
    address_reader,
    items,
    opcode,
    predicate_reader,
    reader,
    require_whole_warp,
)
from gpu_sim.ptx_parser import SHARED_BASE, Immediate, Operand, Register, Statement

_OPERAND_BYTES = {"f16": 2, "bf16": 2, "tf32": 4}
_LANE = np.arange(32)
_GROUP, _THREAD = _LANE // 4, _LANE % 4


def _elements(raw: Array, type_name: str) -> Array:
    """Raw words to float64 values."""
    if type_name == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return decode_float(raw, TYPES[type_name]).astype(np.float64)


def _a_places(K: int, per_register: int) -> Array:
    """Where A[row, k] is in A's registers flattened from [register, lane, part]: [16, K]."""
    places = np.empty((16, K), np.int64)
    chunk = 4 * per_register
    for register in range(2 * K // chunk):
        for part in range(per_register):
            row = _GROUP + 8 * (register % 2)
            k = _THREAD * per_register + part + chunk * (register // 2)
            places[row, k] = (register * 32 + _LANE) * per_register + part
    return places


def _b_places(K: int, per_register: int) -> Array:
    """Where B[k, n] is in B's registers flattened from [register, lane, part]: [K, 8]."""
    places = np.empty((K, 8), np.int64)
    chunk = 4 * per_register
    for register in range(K // chunk):
        for part in range(per_register):
            k = _THREAD * per_register + part + chunk * register
            places[k, _GROUP] = (register * 32 + _LANE) * per_register + part
    return places


def _d_places(N: int) -> tuple[Array, Array]:
    """Row and column of D [16, N] that each register's lanes hold: two of [N / 2, 32]."""
    register = np.arange(N // 2)[:, None]
    row = _GROUP + 8 * (register // 2 % 2)
    column = register // 4 * 8 + _THREAD * 2 + register % 2
    return row, column


def _register_indices(statement: Statement, operand: Operand, count: int) -> Array:
    registers = items(operand)
    indices = [r.index for r in registers if isinstance(r, Register) and r.width == 32]
    if len(indices) != len(registers) or len(indices) != count:
        raise statement.unsupported(f"needs {count} 32-bit registers")
    return np.array(indices)


def _shape(statement: Statement) -> tuple[int, int, int]:
    for modifier in statement.modifiers:
        if match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", modifier):
            return int(match[1]), int(match[2]), int(match[3])
    raise statement.unsupported("shape")


@opcode("mma")
def _decode_mma(statement: Statement) -> Execute:
    M, N, K = _shape(statement)
    type_name = statement.modifiers[-3]
    expected = (
        "sync",
        "aligned",
        f"m{M}n{N}k{K}",
        "row",
        "col",
        "f32",
        type_name,
        type_name,
        "f32",
    )
    sizes = {("f16", 8), ("f16", 16), ("bf16", 8), ("bf16", 16), ("tf32", 4), ("tf32", 8)}
    if statement.modifiers != expected or (M, N) != (16, 8) or (type_name, K) not in sizes:
        raise statement.unsupported()
    per_register = 4 // _OPERAND_BYTES[type_name]
    chunks = K // (4 * per_register)
    d, a, b, c = (
        _register_indices(statement, operand, count)
        for operand, count in zip(statement.operands, (4, 2 * chunks, chunks, 4))
    )
    a_places, b_places = _a_places(K, per_register), _b_places(K, per_register)
    row, column = _d_places(8)
    word = UNSIGNED[32 // per_register]

    def execute(warp: Warp, mask: Mask) -> None:
        require_whole_warp(statement, warp, mask)
        file = warp.file(32)
        a_values = _elements(file[a].view(word).reshape(-1)[a_places], type_name)
        b_values = _elements(file[b].view(word).reshape(-1)[b_places], type_name)
        product = (a_values @ b_values)[row, column]
        file[d] = encode_float(product + file[c].view(np.float32), F32)
        warp.cta.counters.mma_flops += 2 * M * N * K

    return execute


def _matrix_count(statement: Statement, operand: Operand) -> tuple[int, bool, Array]:
    """How many 8x8 matrices, whether transposed, and the register of each."""
    count = len(items(operand))
    transposed = ("trans",) if "trans" in statement.modifiers else ()
    head = ("sync", "aligned", "m8n8", f"x{count}", *transposed)
    spaces = ("shared", "shared::cta")
    if statement.modifiers not in [(*head, space, "b16") for space in spaces]:
        raise statement.unsupported()
    return count, bool(transposed), _register_indices(statement, operand, count)


def _transposed_halves(words: Array, count: int) -> Array:
    """Swaps rows and columns of each 8x8 matrix of halves: [8 * count, 4] to [count, 32] words."""
    halves = words.view(np.uint16).reshape(count, 8, 8).transpose(0, 2, 1)
    return np.ascontiguousarray(halves).view(np.uint32).reshape(count, 32)


def _row_locator(
    statement: Statement, operand: Operand, count: int
) -> Callable[[Warp, Mask], Array]:
    """Finds the words in shared memory of every row of `count` matrices: [8 * count, 4]."""
    address_of_lanes = address_reader(statement, operand)

    def locate(warp: Warp, mask: Mask) -> Array:
        require_whole_warp(statement, warp, mask)
        addresses = address_of_lanes(warp)[: 8 * count]
        return warp.cta.shared.index(addresses, 4, 4, statement, warp)

    return locate


@opcode("ldmatrix")
def _decode_load_matrix(statement: Statement) -> Execute:
    count, transposed, registers = _matrix_count(statement, statement.operands[0])
    locate = _row_locator(statement, statement.operands[1], count)

    def execute(warp: Warp, mask: Mask) -> None:
        words = warp.cta.shared.words[4][locate(warp, mask)]
        warp.file(32)[registers] = (
            _transposed_halves(words, count) if transposed else words.reshape(count, 32)
        )

    return execute


@opcode("stmatrix")
def _decode_store_matrix(statement: Statement) -> Execute:
    count, transposed, registers = _matrix_count(statement, statement.operands[1])
    locate = _row_locator(statement, statement.operands[0], count)

    def execute(warp: Warp, mask: Mask) -> None:
        rows = locate(warp, mask)
        words = warp.file(32)[registers]
        if transposed:
            words = _transposed_halves(words, count)
        warp.cta.shared.words[4][rows] = words.reshape(8 * count, 4)

    return execute


class _SharedOperand:
    """A matrix that a wgmma reads from shared memory through a descriptor."""

    def __init__(
        self, statement: Statement, operand: Operand, type_name: str, transposed: bool
    ) -> None:
        self.statement = statement
        self.type_name = type_name
        self.transposed = transposed
        self.element_bytes = _OPERAND_BYTES[type_name]
        self._descriptor = reader(statement, operand, U64)
        self._known: dict[tuple[int, int], Array] = {}

    def read(self, warp: Warp, first_row: int, rows: int, K: int) -> Array:
        """Rows of the matrix as float64 [rows, K]; remembers what was read until the wait."""
        lanes = self._descriptor(warp)
        descriptor = int(lanes[0])
        if (lanes != lanes[0]).any():
            raise RuntimeError(f"descriptor differs between lanes: {self.statement}")
        key = descriptor, first_row
        if key not in self._known:
            row, k = np.arange(first_row, first_row + rows)[:, None], np.arange(K)[None, :]
            address = self._addresses(descriptor, row, k)
            if (address < SHARED_BASE).any() or address.max() >= SHARED_BASE + warp.cta.shared.size:
                raise MemoryError(f"wgmma operand outside shared memory: {self.statement}")
            self._known[key] = (address - SHARED_BASE) // self.element_bytes
        index = self._known[key]
        words = warp.cta.shared.words[self.element_bytes]
        seen = words[index]
        warp.matrix_operands.append(
            MatrixOperand(warp.matrix_group, words, index, seen, self.statement)
        )
        return _elements(seen, self.type_name)

    def _addresses(self, descriptor: int, row: Array, k: Array) -> Array:
        """Where element [row, k] is: PTX ISA 8.8, 9.7.15.5.1, shared-memory matrix layouts."""
        start = (descriptor & 0x3FFF) << 4
        leading_stride = (descriptor >> 16 & 0x3FFF) << 4
        group_stride = (descriptor >> 32 & 0x3FFF) << 4
        swizzle_bytes = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
        if swizzle_bytes is None or descriptor >> 49 & 7:
            raise self.statement.unsupported(f"descriptor {descriptor:#x}")
        size = self.element_bytes
        if self.transposed:  # rows are contiguous: a swizzle row has this many of them
            span = swizzle_bytes // size
            address = (
                (row // span) * leading_stride
                + (k // 8) * group_stride
                + (k % 8) * swizzle_bytes
                + (row % span) * size
            )
        else:
            address = (row // 8) * group_stride + (row % 8) * swizzle_bytes + k * size
        address = address + start
        return address ^ ((address >> 7 & (swizzle_bytes // 16 - 1)) << 4)


def _accumulator(warp: Warp, register: int) -> Array:
    """An accumulator's value, which may be a result still in flight."""
    pending = warp.matrix_results.get(register)
    return warp.registers[32][register] if pending is None else pending.value


def _scale(statement: Statement, operand: Operand) -> Callable[[Warp], bool]:
    """Whether D is added to; a predicate must be the same in all lanes."""
    read = predicate_reader(statement, operand)

    def accumulates(warp: Warp) -> bool:
        lanes = read(warp)
        if lanes.any() and not lanes.all():
            raise RuntimeError(f"scale-d differs between lanes: {statement}")
        return bool(lanes[0])

    return accumulates


@opcode("wgmma")
def _decode_wgmma(statement: Statement) -> Execute:
    if statement.modifiers[0] != "mma_async":
        return _wgmma_group_operation(statement)
    M, N, K = _shape(statement)
    type_name = statement.modifiers[-1]
    expected = ("mma_async", "sync", "aligned", f"m64n{N}k{K}", "f32", type_name, type_name)
    if statement.modifiers != expected or K * _OPERAND_BYTES.get(type_name, 0) != 32:
        raise statement.unsupported()
    a_operand = statement.operands[1]
    immediates = [o.value for o in statement.operands[4:] if isinstance(o, Immediate)]
    num_transposes = 0 if type_name == "tf32" else (1 if isinstance(a_operand, tuple) else 2)
    if len(immediates) != 2 + num_transposes or immediates[:2] != [1, 1]:
        raise statement.unsupported("scale or transpose")
    transposes = immediates[2:]
    d = _register_indices(statement, statement.operands[0], N // 2)
    accumulates = _scale(statement, statement.operands[3])
    b_operand = _SharedOperand(
        statement, statement.operands[2], type_name, bool(transposes and transposes[-1])
    )
    row, column = _d_places(N)
    read_a = _wgmma_rows(statement, a_operand, type_name, K, bool(transposes and transposes[0]))

    def execute(warp: Warp, mask: Mask) -> None:
        require_whole_warp(statement, warp, mask)
        product = read_a(warp) @ b_operand.read(warp, 0, N, K).T
        value = product[row, column]
        if accumulates(warp):
            old = np.stack([_accumulator(warp, register) for register in d.tolist()])
            value = value + old.view(np.float32)
        for register, lanes in zip(d.tolist(), encode_float(value, F32)):
            warp.matrix_results[register] = MatrixResult(lanes, warp.matrix_group)
        warp.file(32)[d] = POISON[32]
        warp.cta.counters.mma_flops += 2 * (M // 4) * N * K

    return execute


def _wgmma_rows(
    statement: Statement, operand: Operand, type_name: str, K: int, transposed: bool
) -> Callable[[Warp], Array]:
    """Reads this warp's 16 rows of A, from registers or from shared memory."""
    if not isinstance(operand, tuple):
        shared = _SharedOperand(statement, operand, type_name, transposed)
        return lambda warp: shared.read(warp, 16 * (warp.index % 4), 16, K)
    per_register = 4 // _OPERAND_BYTES[type_name]
    places = _a_places(K, per_register)
    registers = _register_indices(statement, operand, 4)
    word = UNSIGNED[32 // per_register]

    def read(warp: Warp) -> Array:
        raw = warp.file(32)[registers].view(word).reshape(-1)
        return _elements(raw[places], type_name)

    return read


def _wgmma_group_operation(statement: Statement) -> Execute:
    operation = statement.modifiers[0]
    if statement.modifiers[1:] != ("sync", "aligned"):
        raise statement.unsupported()
    if operation == "wait_group":
        count = statement.operands[0]
        assert isinstance(count, Immediate)
        groups_left = count.value
    elif operation not in ("fence", "commit_group"):
        raise statement.unsupported()

    def execute(warp: Warp, mask: Mask) -> None:
        require_whole_warp(statement, warp, mask)
        if operation == "commit_group":
            warp.matrix_group += 1
        elif operation == "wait_group":
            warp.finish_matrices(groups_left)

    return execute
