"""PTX data movement: mov, loads and stores, atomics, cp.async, and exchange within a warp.

Source: PTX ISA 8.8, sections 9.7.9 (data movement) and 9.7.13 (synchronisation).
"""

from collections.abc import Callable

import numpy as np

from gpu_sim.ptx_floats import decode_float, encode_float
from gpu_sim.ptx_machine import LANES, UNSIGNED, Array, Mask, Warp
from gpu_sim.ptx_operands import (
    U32,
    U64,
    Execute,
    PtxType,
    Write,
    address_reader,
    allow,
    constant_row,
    items,
    last_type,
    opcode,
    predicate_reader,
    predicate_writer,
    reader,
    writer,
)
from gpu_sim.ptx_parser import Address, Immediate, Operand, Register, Sink, Statement

# Caching, ordering and scope: one CTA runs at a time and memory is always coherent here.
_HINTS = (
    *("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu"),
    *("sys", "nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt"),
    *(f"L1::evict_{kind}" for kind in ("normal", "first", "last", "unchanged")),
    *(f"L2::evict_{kind}" for kind in ("normal", "first", "last")),
    *("L1::no_allocate", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"),
)
_SPACES = ("global", "shared", "shared::cta", "local", "param")
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


@opcode("mov")
def _decode_move(statement: Statement) -> Execute:
    target, source = statement.operands
    if statement.modifiers == ("pred",):
        read = predicate_reader(statement, source)
        write = predicate_writer(statement, target)
        return lambda warp, mask: write(warp, read(warp), mask)
    allow(statement)
    ptx_type = PtxType("u", last_type(statement).bits)
    if isinstance(source, tuple):
        return _pack(statement, source, target, ptx_type)
    if isinstance(target, tuple):
        return _unpack(statement, source, target, ptx_type)
    read, write = reader(statement, source, ptx_type), writer(statement, target, ptx_type)
    if not (isinstance(source, Register) and isinstance(target, Register) and ptx_type.bits == 32):
        return lambda warp, mask: write(warp, read(warp), mask)
    source_index, target_index = source.index, target.index

    def execute(warp: Warp, mask: Mask) -> None:
        write(warp, read(warp), mask)
        # LLVM renames accumulators between loop iterations; ptxas then gives both names one
        # hardware register, so that the copy of a result in flight is in flight itself.
        if warp.matrix_results and source_index in warp.matrix_results:
            warp.matrix_results[target_index] = warp.matrix_results[source_index]

    return execute


def _pack(
    statement: Statement, sources: tuple[Operand, ...], target: Operand, ptx_type: PtxType
) -> Execute:
    part = PtxType("u", ptx_type.bits // len(sources))
    reads = [reader(statement, source, part) for source in sources]
    write = writer(statement, target, ptx_type)

    def execute(warp: Warp, mask: Mask) -> None:
        parts = np.stack([read(warp) for read in reads], axis=1)
        write(warp, parts.view(ptx_type.unsigned)[:, 0], mask)

    return execute


def _unpack(
    statement: Statement, source: Operand, targets: tuple[Operand, ...], ptx_type: PtxType
) -> Execute:
    part = PtxType("u", ptx_type.bits // len(targets))
    read = reader(statement, source, ptx_type)
    writes = [writer(statement, target, part) for target in targets]

    def execute(warp: Warp, mask: Mask) -> None:
        parts = read(warp).view(part.unsigned).reshape(32, len(writes))
        for write, column in zip(writes, parts.T.copy()):
            write(warp, column, mask)

    return execute


@opcode("cvta")
def _decode_address_conversion(statement: Statement) -> Execute:
    if statement.modifiers not in (("to", "global", "u64"), ("global", "u64")):
        raise statement.unsupported()
    read = reader(statement, statement.operands[1], U64)
    write = writer(statement, statement.operands[0], U64)
    return lambda warp, mask: write(warp, read(warp), mask)


def _space_and_count(statement: Statement) -> tuple[str, int]:
    allow(statement, *_HINTS, *_SPACES, *_VECTORS)
    spaces = [m for m in statement.modifiers if m in _SPACES]
    if len(spaces) != 1:  # a generic address
        raise statement.unsupported("state space")
    count = next((_VECTORS[m] for m in statement.modifiers if m in _VECTORS), 1)
    expected = 3 if "L2::cache_hint" in statement.modifiers else 2
    if len(statement.operands) != expected:
        raise statement.unsupported("operands")
    return spaces[0].removesuffix("::cta"), count


def _active(row: Array, mask: Mask) -> Array:
    return row if mask is None else row[mask]


def _write_columns(writes: list[Write], warp: Warp, values: Array, mask: Mask) -> None:
    """Gives column k of values [active lanes, k] to destination k."""
    if mask is not None:
        spread = np.zeros((32, values.shape[1]), values.dtype)
        spread[mask] = values
        values = spread
    for column, write in enumerate(writes):
        write(warp, np.ascontiguousarray(values[:, column]), mask)


@opcode("ld")
def _decode_load(statement: Statement) -> Execute:
    space, count = _space_and_count(statement)
    ptx_type = last_type(statement)
    stored = PtxType(ptx_type.kind if ptx_type.kind == "s" else "u", ptx_type.bits)
    width_bytes = ptx_type.bits // 8
    targets = items(statement.operands[0])
    if len(targets) != count:
        raise statement.unsupported("vector length")
    writes = [writer(statement, target, stored) for target in targets]
    if space == "param":
        return _load_parameter(statement, stored, writes[0])
    locate = address_reader(statement, statement.operands[1])

    def load_global(warp: Warp, mask: Mask) -> None:
        addresses = _active(locate(warp), mask)
        values = warp.cta.memory.load(addresses, width_bytes, count, statement, warp, mask)
        warp.cta.counters.count_load(addresses, width_bytes * count)
        _write_columns(writes, warp, values, mask)

    def load_shared(warp: Warp, mask: Mask) -> None:
        shared = warp.cta.shared
        index = shared.index(_active(locate(warp), mask), width_bytes, count, statement, warp)
        _write_columns(writes, warp, shared.words[width_bytes][index], mask)

    def load_local(warp: Warp, mask: Mask) -> None:
        lanes, index = _local_index(statement, warp, locate(warp), mask, width_bytes * count)
        values = np.ascontiguousarray(warp.local[lanes, index]).view(UNSIGNED[ptx_type.bits])
        _write_columns(writes, warp, values, mask)

    return {"global": load_global, "shared": load_shared, "local": load_local}[space]


def _load_parameter(statement: Statement, ptx_type: PtxType, write: Write) -> Execute:
    address = statement.operands[1]
    if not isinstance(address, Address) or not isinstance(address.base, str) or address.offset:
        raise statement.unsupported("parameter")
    name = address.base

    def execute(warp: Warp, mask: Mask) -> None:
        bits = Immediate(warp.cta.parameters[name])
        write(warp, constant_row(statement, bits, ptx_type), mask)

    return execute


def _local_index(
    statement: Statement, warp: Warp, addresses: Array, mask: Mask, size_bytes: int
) -> tuple[Array, Array]:
    lanes = _active(LANES, mask)
    offsets = _active(addresses, mask).astype(np.int64)
    outside = (
        (offsets < 0) | (offsets + size_bytes > warp.local.shape[1]) | (offsets % size_bytes != 0)
    )
    if outside.any():
        raise MemoryError(f"local access: {statement}; lanes {lanes[outside].tolist()}")
    return lanes[:, None], offsets[:, None] + np.arange(size_bytes)


@opcode("st")
def _decode_store(statement: Statement) -> Execute:
    space, count = _space_and_count(statement)
    ptx_type = PtxType("u", last_type(statement).bits)
    width_bytes = ptx_type.bits // 8
    sources = items(statement.operands[1])
    if len(sources) != count or space == "param":
        raise statement.unsupported("vector length")
    reads = [reader(statement, source, ptx_type) for source in sources]
    locate = address_reader(statement, statement.operands[0])

    def gather(warp: Warp, mask: Mask) -> Array:
        return _active(np.stack([read(warp) for read in reads], axis=1), mask)

    def store_global(warp: Warp, mask: Mask) -> None:
        addresses = _active(locate(warp), mask)
        warp.cta.memory.store(addresses, gather(warp, mask), statement, warp, mask)
        warp.cta.counters.count_store(addresses, width_bytes * count)

    def store_shared(warp: Warp, mask: Mask) -> None:
        shared = warp.cta.shared
        index = shared.index(_active(locate(warp), mask), width_bytes, count, statement, warp)
        shared.words[width_bytes][index] = gather(warp, mask)

    def store_local(warp: Warp, mask: Mask) -> None:
        lanes, index = _local_index(statement, warp, locate(warp), mask, width_bytes * count)
        warp.local[lanes, index] = gather(warp, mask).view(np.uint8)

    return {"global": store_global, "shared": store_shared, "local": store_local}[space]


_ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}

_Change = Callable[[Array], Array]


@opcode("atom", "red")
def _decode_atomic(statement: Statement) -> Execute:
    allow(statement, *_HINTS, *_VECTORS, *_ATOMIC, *_SPACES, "cas", "noftz")
    spaces = [m.removesuffix("::cta") for m in statement.modifiers if m in _SPACES]
    if spaces not in (["global"], ["shared"]) or "L2::cache_hint" in statement.modifiers:
        raise statement.unsupported("state space")
    ptx_type = last_type(statement)
    raw = PtxType("u", ptx_type.bits)
    count = next((_VECTORS[m] for m in statement.modifiers if m in _VECTORS), 1)
    operands = (Sink(), *statement.operands) if statement.opcode == "red" else statement.operands
    names = [m for m in statement.modifiers if m in (*_ATOMIC, "cas")]
    sources = [items(operand) for operand in operands[2:]]
    if len(names) != 1 or len(sources) != (2 if names[0] == "cas" else 1):
        raise statement.unsupported("operation")
    reads = [[reader(statement, item, raw) for item in source] for source in sources]
    targets = items(operands[0]) if statement.opcode == "atom" else (Sink(),) * count
    writes = [writer(statement, target, raw) for target in targets]
    if {len(writes), *map(len, reads)} != {count}:
        raise statement.unsupported("vector length")
    locate = address_reader(statement, operands[1])
    update = _atomic_update(names[0], ptx_type)
    width_bytes = raw.bits // 8

    def exchange_global(warp: Warp, lane: int, address: Array, change: _Change) -> Array:
        memory, alone = warp.cta.memory, lane == LANES
        old = memory.load(address, width_bytes, count, statement, warp, alone)
        memory.store(address, change(old[0])[None], statement, warp, alone)
        return old[0]

    def exchange_shared(warp: Warp, lane: int, address: Array, change: _Change) -> Array:
        index = warp.cta.shared.index(address, width_bytes, count, statement, warp)[0]
        words = warp.cta.shared.words[width_bytes]
        old = words[index]
        words[index] = change(old)
        return old

    exchange = exchange_global if spaces == ["global"] else exchange_shared

    def execute(warp: Warp, mask: Mask) -> None:
        lanes = _active(LANES, mask)
        addresses = _active(locate(warp), mask)
        given = [np.stack([r(warp) for r in source], axis=1) for source in reads]
        old = np.zeros((lanes.size, count), raw.unsigned)
        for place, lane in enumerate(lanes.tolist()):
            here = addresses[place : place + 1]
            values = [words[lane] for words in given]
            old[place] = exchange(warp, lane, here, lambda was, v=values: update(was, *v))
        warp.cta.counters.atomics += lanes.size
        _write_columns(writes, warp, old, mask)

    return execute


def _atomic_update(name: str, ptx_type: PtxType) -> Callable[..., Array]:
    """The function from raw old and given words to raw new words."""
    if name == "cas":
        return lambda old, expected, new: np.where(old == expected, new, old)
    function = _ATOMIC[name]
    if not ptx_type.is_float:
        dtype = ptx_type.dtype
        if ptx_type.packed:
            raise NotImplementedError("packed integer atomic")
        return lambda old, given: function(old.view(dtype), given.view(dtype)).view(
            ptx_type.unsigned
        )
    element = ptx_type.element
    raw = np.uint16 if ptx_type.packed else ptx_type.unsigned

    def update(old: Array, given: Array) -> Array:
        total = decode_float(old.view(raw), element) + decode_float(given.view(raw), element)
        return encode_float(total, element).view(ptx_type.unsigned)

    if name != "add":
        raise NotImplementedError(f"atomic {name} of floats")
    return update


@opcode("cp")
def _decode_copy(statement: Statement) -> Execute:
    if statement.modifiers[0] != "async":
        raise statement.unsupported()
    if statement.modifiers[1] in ("commit_group", "wait_group", "wait_all"):
        return _copy_group_operation(statement)
    known = ("async", "ca", "cg", "shared", "shared::cta", "global", *_HINTS)
    if any(m not in known for m in statement.modifiers) or "global" not in statement.modifiers:
        raise statement.unsupported()
    if "L2::cache_hint" in statement.modifiers or not 3 <= len(statement.operands) <= 4:
        raise statement.unsupported()
    locate_target = address_reader(statement, statement.operands[0])
    locate_source = address_reader(statement, statement.operands[1])
    size = statement.operands[2]
    assert isinstance(size, Immediate)
    words = size.value // 4
    given = statement.operands[3] if len(statement.operands) == 4 else size
    read_source_size = reader(statement, given, U32)

    def execute(warp: Warp, mask: Mask) -> None:
        shared = warp.cta.shared
        index = shared.index(_active(locate_target(warp), mask), 4, words, statement, warp)
        sizes = _active(read_source_size(warp), mask)
        if not np.isin(sizes, (0, size.value)).all():
            raise statement.unsupported("partial copy")
        data = np.zeros(index.shape, np.uint32)
        reading = sizes > 0
        if reading.any():
            sources = _active(locate_source(warp), mask)[reading]
            lanes = np.zeros(32, bool)
            lanes[_active(LANES, mask)[reading]] = True
            data[reading] = warp.cta.memory.load(sources, 4, words, statement, warp, lanes)
            warp.cta.counters.count_load(sources, 4 * words)
        # The data may arrive at any time from now on: what was there is gone, what comes is not
        # there before the wait.
        shared.words[2][2 * index[:, :1] + np.arange(2 * words)] = 0x7FF7
        warp.copies.append((index, data))

    return execute


def _copy_group_operation(statement: Statement) -> Execute:
    operation = statement.modifiers[1]
    groups_left = 0
    if operation == "wait_group":
        count = statement.operands[0]
        assert isinstance(count, Immediate)
        groups_left = count.value

    def execute(warp: Warp, mask: Mask) -> None:
        if mask is not None:
            raise statement.unsupported("groups of single lanes")
        if operation != "wait_group":
            warp.copy_groups.append(warp.copies)
            warp.copies = []
        if operation != "commit_group":
            warp.finish_copies(groups_left)

    return execute


def _check_members(statement: Statement, warp: Warp, members: Array, mask: Mask) -> Array:
    """The participating lanes: all that the member mask names must be here, and no others."""
    active = np.ones(32, bool) if mask is None else mask
    named = (int(members[int(np.argmax(active))]) >> LANES & 1).astype(bool)
    expected = named if warp.live is None else named & warp.live
    if (active != expected).any():
        raise RuntimeError(
            f"divergent warp: lanes {np.flatnonzero(active != expected).tolist()} of warp "
            f"{warp.index} do not match the member mask; {statement}; CTA {warp.cta.index}"
        )
    return active


@opcode("shfl")
def _decode_shuffle(statement: Statement) -> Execute:
    mode = statement.modifiers[1]
    if statement.modifiers != ("sync", mode, "b32") or mode not in ("up", "down", "bfly", "idx"):
        raise statement.unsupported()
    target = statement.operands[0]
    value_target, valid_target = target if isinstance(target, tuple) else (target, Sink())
    write = writer(statement, value_target, U32)
    write_valid = predicate_writer(statement, valid_target)
    read, read_lane, read_clamp, read_members = (
        reader(statement, operand, U32) for operand in statement.operands[1:]
    )

    def execute(warp: Warp, mask: Mask) -> None:
        active = _check_members(statement, warp, read_members(warp), mask)
        lane = (read_lane(warp) & np.uint32(31)).astype(np.int64)
        clamp = read_clamp(warp).astype(np.int64)
        segment, bound = (clamp >> 8) & 31, clamp & 31
        lowest = LANES & segment
        highest = lowest | (bound & ~segment)
        source = {
            "up": LANES - lane,
            "down": LANES + lane,
            "bfly": LANES ^ lane,
            "idx": lowest | (lane & ~segment),
        }[mode]
        valid = source >= highest if mode == "up" else source <= highest
        source = np.where(valid, source, LANES)
        values = np.where(active[source], read(warp)[source], np.uint32(0x7FF77FF7))
        write(warp, values, mask)
        write_valid(warp, valid, mask)

    return execute


_REDUCE: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux")
def _decode_reduction(statement: Statement) -> Execute:
    allow(statement, "sync", *_REDUCE)
    ptx_type = last_type(statement)
    function = _REDUCE[statement.modifiers[1]]
    if ptx_type.bits != 32 or ptx_type.is_float:
        raise statement.unsupported()
    read = reader(statement, statement.operands[1], ptx_type)
    read_members = reader(statement, statement.operands[2], U32)
    write = writer(statement, statement.operands[0], ptx_type)

    def execute(warp: Warp, mask: Mask) -> None:
        active = _check_members(statement, warp, read_members(warp), mask)
        total = function.reduce(read(warp)[active], dtype=ptx_type.dtype)
        write(warp, np.full(32, total, ptx_type.dtype), mask)

    return execute


def _ballot(lanes: Array) -> int:
    return sum(1 << lane for lane in np.flatnonzero(lanes).tolist())


@opcode("vote")
def _decode_vote(statement: Statement) -> Execute:
    allow(statement, "sync", "any", "all", "uni", "ballot", "pred")
    mode = statement.modifiers[1]
    read = predicate_reader(statement, statement.operands[1])
    read_members = reader(statement, statement.operands[2], U32)
    target = statement.operands[0]
    if mode == "ballot":
        write_ballot = writer(statement, target, U32)
    else:
        write_predicate = predicate_writer(statement, target)

    def execute(warp: Warp, mask: Mask) -> None:
        active = _check_members(statement, warp, read_members(warp), mask)
        votes = read(warp) & active
        if mode == "ballot":
            write_ballot(warp, np.full(32, _ballot(votes), np.uint32), mask)
            return
        chosen = votes[active]
        agreed = {"any": chosen.any(), "all": chosen.all(), "uni": chosen.all() or not chosen.any()}
        write_predicate(warp, np.full(32, agreed[mode]), mask)

    return execute


@opcode("activemask")
def _decode_active_mask(statement: Statement) -> Execute:
    write = writer(statement, statement.operands[0], U32)

    def execute(warp: Warp, mask: Mask) -> None:
        lanes = np.ones(32, bool) if mask is None else mask
        write(warp, np.full(32, _ballot(lanes), np.uint32), mask)

    return execute


@opcode("elect")
def _decode_election(statement: Statement) -> Execute:
    target = statement.operands[0]
    if statement.modifiers != ("sync",) or not isinstance(target, tuple):
        raise statement.unsupported()
    write_leader = writer(statement, target[0], U32)
    write_elected = predicate_writer(statement, target[1])
    read_members = reader(statement, statement.operands[1], U32)

    def execute(warp: Warp, mask: Mask) -> None:
        active = _check_members(statement, warp, read_members(warp), mask)
        leader = int(np.argmax(active))
        write_leader(warp, np.full(32, leader, np.uint32), mask)
        write_elected(warp, leader == LANES, mask)

    return execute


@opcode("fence", "membar", "nop")
def _decode_fence(statement: Statement) -> Execute:
    known = ("proxy", "async", "acq_rel", "sc", "gl", "shared::cta", "global", *_HINTS)
    if any(m not in known for m in statement.modifiers):
        raise statement.unsupported()
    return lambda warp, mask: None


@opcode("createpolicy")
def _decode_policy(statement: Statement) -> Execute:
    write = writer(statement, statement.operands[0], U64)
    return lambda warp, mask: write(warp, np.zeros(32, np.uint64), mask)
