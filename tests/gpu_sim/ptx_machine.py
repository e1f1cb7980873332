"""The state that emulated PTX works on: checked global memory, shared memory, warps, counters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu_sim.ptx_parser import SHARED_BASE, Listing, Statement

Array = np.ndarray
# Lanes that take part; None means all 32, the case that every closure makes fast.
Mask = Array | None

LANES = np.arange(32)
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# NaN as f16, bf16, f32 and f64 alike; as a pointer it faults, as an integer it is implausible.
_POISON_HALF = 0x7FF7
POISON = {
    8: 0xF7,
    16: _POISON_HALF,
    32: _POISON_HALF * 0x1_0001,
    64: _POISON_HALF * 0x1_0001_0001_0001,
}


@dataclass
class Counters:
    """What one launch did; bytes and sectors as ncu would count them.

    A sector is 32 aligned bytes, a request one warp's load or store instruction. Wavefronts are
    shared-memory passes by a simple model: 4-byte banks, a quarter warp at a time for 16-byte and
    half a warp for 8-byte accesses; `ideal` is what the same accesses need without bank conflicts.
    """

    warp_instructions: int = 0
    global_load_bytes: int = 0
    global_load_sectors: int = 0
    global_load_requests: int = 0
    global_store_bytes: int = 0
    global_store_sectors: int = 0
    global_store_requests: int = 0
    atomics: int = 0
    barriers: int = 0
    mma_flops: int = 0
    shared_wavefronts: int = 0
    shared_wavefronts_ideal: int = 0

    def count_load(self, addresses: Array, size_bytes: int) -> None:
        self.global_load_bytes += addresses.size * size_bytes
        self.global_load_sectors += _sectors(addresses, size_bytes)
        self.global_load_requests += 1

    def count_store(self, addresses: Array, size_bytes: int) -> None:
        self.global_store_bytes += addresses.size * size_bytes
        self.global_store_sectors += _sectors(addresses, size_bytes)
        self.global_store_requests += 1


def _sectors(addresses: Array, size_bytes: int) -> int:
    # An access is aligned to its size, so one of up to 32 bytes lies in one sector.
    assert size_bytes <= 32
    return len(set((addresses >> np.uint64(5)).tolist()))


def _wavefronts(addresses: list[int], size_bytes: int) -> tuple[int, int]:
    """The passes that a warp's shared-memory access needs, and needs without bank conflicts."""
    words = max(1, size_bytes // 4)
    lanes_per_phase = 32 // words
    needed, ideal = 0, 0
    for first in range(0, len(addresses), lanes_per_phase):
        distinct = {
            a // 4 + w for a in addresses[first : first + lanes_per_phase] for w in range(words)
        }
        banks = [0] * 32
        for word in distinct:
            banks[word % 32] += 1
        needed += max(banks)
        ideal += -(-len(distinct) // 32)
    return needed, ideal


def _word_index(first: Array, count: int) -> Array:
    """Indices of `count` consecutive words for each lane, [lanes, count]."""
    return first[:, None] + np.arange(count)


class _Buffer:
    """One host array that a kernel may touch, seen as words of any size."""

    def __init__(self, array: Array) -> None:
        if not array.flags.c_contiguous:
            raise ValueError(f"buffers must be contiguous, got strides {array.strides}")
        self.bytes = array.reshape(-1).view(np.uint8)
        self.base = array.ctypes.data
        self.size = array.nbytes
        self._words: dict[int, tuple[int, Array]] = {}

    def words(self, width_bytes: int) -> tuple[int, Array]:
        """The first aligned address and the words from there on.

        An aligned access inside the buffer is always inside these words, even if the buffer itself
        starts unaligned.
        """
        if width_bytes not in self._words:
            skip = min(-self.base % width_bytes, self.size)
            usable = (self.size - skip) // width_bytes * width_bytes
            view = self.bytes[skip : skip + usable].view(UNSIGNED[8 * width_bytes])
            self._words[width_bytes] = self.base + skip, view
        return self._words[width_bytes]


class GlobalMemory:
    """The caller's arrays at their host addresses; every access must lie inside one of them."""

    def __init__(self, buffers: Sequence[Array], constants: Sequence[Array]) -> None:
        self._buffers = [_Buffer(array) for array in (*buffers, *constants)]

    def _parts(
        self, addresses: Array, size_bytes: int, statement: Statement, warp: "Warp", mask: Mask
    ) -> list[tuple[_Buffer, Array | None]]:
        """The buffers that the lanes touch, with the lanes of each (None: all)."""
        if int(np.bitwise_or.reduce(addresses)) & (size_bytes - 1):
            bad = (addresses & np.uint64(size_bytes - 1)) != 0
            raise self._fault("misaligned", addresses, bad, size_bytes, statement, warp, mask)
        parts: list[tuple[_Buffer, Array | None]] = []
        pending = np.ones(addresses.size, bool)
        for place, buffer in enumerate(self._buffers):
            if buffer.size < size_bytes:
                continue
            inside = addresses - np.uint64(buffer.base) <= np.uint64(buffer.size - size_bytes)
            if inside.all():
                # Neighbouring accesses go to the same buffer: look there first next time.
                self._buffers.insert(0, self._buffers.pop(place))
                return [(buffer, None)]
            if inside.any():
                parts.append((buffer, inside & pending))
                pending &= ~inside
        if pending.any():
            raise self._fault(
                "out-of-bounds", addresses, pending, size_bytes, statement, warp, mask
            )
        return parts

    @staticmethod
    def _fault(
        kind: str,
        addresses: Array,
        bad: Array,
        size_bytes: int,
        statement: Statement,
        warp: "Warp",
        mask: Mask,
    ) -> MemoryError:
        lanes = (LANES if mask is None else np.flatnonzero(mask))[bad]
        threads = (lanes + 32 * warp.index).tolist()
        return MemoryError(
            f"{kind} global access of {size_bytes} bytes: {statement}; CTA {warp.cta.index}, "
            f"lanes {lanes.tolist()} of warp {warp.index} (threads {threads}), "
            f"first address {int(addresses[bad][0]):#x}"
        )

    def load(
        self,
        addresses: Array,
        width_bytes: int,
        count: int,
        statement: Statement,
        warp: "Warp",
        mask: Mask,
    ) -> Array:
        """Reads `count` words per address: [lanes, count]."""
        parts = self._parts(addresses, width_bytes * count, statement, warp, mask)
        result = np.empty((addresses.size, count), UNSIGNED[8 * width_bytes])
        for buffer, chosen in parts:
            first, words = buffer.words(width_bytes)
            here = addresses if chosen is None else addresses[chosen]
            index = _word_index(((here - np.uint64(first)) // width_bytes).astype(np.int64), count)
            if chosen is None:
                return words[index]
            result[chosen] = words[index]
        return result

    def store(
        self,
        addresses: Array,
        values: Array,
        statement: Statement,
        warp: "Warp",
        mask: Mask,
    ) -> None:
        """Writes values [lanes, count]; where lanes collide the highest one wins."""
        width_bytes, count = values.itemsize, values.shape[1]
        for buffer, chosen in self._parts(addresses, width_bytes * count, statement, warp, mask):
            first, words = buffer.words(width_bytes)
            here = addresses if chosen is None else addresses[chosen]
            index = _word_index(((here - np.uint64(first)) // width_bytes).astype(np.int64), count)
            words[index] = values if chosen is None else values[chosen]


class SharedMemory:
    """One CTA's shared memory, poisoned at the start."""

    def __init__(self, size_bytes: int) -> None:
        self.size = size_bytes
        padded = -(-max(size_bytes, 16) // 16) * 16
        self._halves = np.empty(padded // 2, np.uint16)
        self.words: dict[int, Array] = {w: self._halves.view(UNSIGNED[8 * w]) for w in (1, 2, 4, 8)}
        # Warps repeat their address patterns in every loop and CTA: check and index each once.
        self._known: dict[tuple[bytes, int, int], tuple[Array, int, int]] = {}

    def poison(self) -> None:
        self._halves[:] = _POISON_HALF

    def index(
        self, addresses: Array, width_bytes: int, count: int, statement: Statement, warp: "Warp"
    ) -> Array:
        """Indices into `words[width_bytes]` of `count` words per address, [lanes, count]."""
        key = addresses.tobytes(), width_bytes, count
        known = self._known.get(key)
        if known is None:
            size_bytes = width_bytes * count
            given = addresses.tolist()
            for address in given:
                if not 0 <= address - SHARED_BASE <= self.size - size_bytes or address % size_bytes:
                    raise MemoryError(
                        f"shared access of {size_bytes} bytes at offset {address - SHARED_BASE} "
                        f"of {self.size}: {statement}; CTA {warp.cta.index}, warp {warp.index}"
                    )
            first = (addresses.astype(np.int64) - SHARED_BASE) // width_bytes
            known = (_word_index(first, count), *_wavefronts(given, size_bytes))
            self._known[key] = known
        counters = warp.cta.counters
        counters.shared_wavefronts += known[1]
        counters.shared_wavefronts_ideal += known[2]
        return known[0]


class Fragment:
    """Lanes of a warp that share a program counter."""

    __slots__ = ("lanes", "pc")

    def __init__(self, pc: int, lanes: Mask) -> None:
        self.pc = pc
        self.lanes = lanes


@dataclass
class Cta:
    """What the warps of one thread block share."""

    index: tuple[int, int, int]
    memory: GlobalMemory
    shared: SharedMemory
    counters: Counters
    parameters: dict[str, int]


@dataclass
class MatrixResult:
    """An accumulator register of a wgmma in flight: the value it will get, and its group."""

    value: Array
    group: int


@dataclass
class MatrixOperand:
    """Shared memory that a wgmma in flight may still be reading."""

    group: int
    words: Array
    index: Array
    seen: Array
    statement: Statement


class Warp:
    """32 lanes: registers, program counters and the asynchronous operations under way."""

    def __init__(self, index: int, listing: Listing) -> None:
        self.index = index
        self._files = {
            width: np.empty((listing.register_counts.get(width, 0), 32), UNSIGNED[width])
            for width in (8, 16, 32, 64)
        }
        self.registers: dict[int, list[Array]] = {w: list(f) for w, f in self._files.items()}
        num_predicates = listing.register_counts.get(1, 0)
        self.predicates = list(np.zeros((num_predicates, 32), bool))
        self.predicate_written = [False] * num_predicates
        self.local = np.empty((32, listing.local_bytes), np.uint8)
        self.special: dict[str, Array] = {}
        self.cta: Cta
        self.fragments: list[Fragment] = []
        self.live: Mask = None
        self.barrier: int | None = None
        self.carry = np.zeros(32, np.uint64)
        self.copies: list[tuple[Array, Array]] = []
        self.copy_groups: list[list[tuple[Array, Array]]] = []
        self.matrix_group = 0
        self.matrix_results: dict[int, MatrixResult] = {}
        self.matrix_operands: list[MatrixOperand] = []

    def start(self, cta: Cta, special: dict[str, int]) -> None:
        """Begins a CTA: everything poisoned, all lanes at the first instruction."""
        self.cta = cta
        for width, file in self._files.items():
            file[:] = POISON[width]
        self.predicate_written = [False] * len(self.predicates)
        self.local[:] = POISON[8]
        self.special = {name: np.full(32, value, np.uint32) for name, value in special.items()}
        self.special["%tid.x"] = (LANES + 32 * self.index).astype(np.uint32)
        self.special["%laneid"] = LANES.astype(np.uint32)
        self.special["%warpid"] = np.full(32, self.index, np.uint32)
        self.fragments = [Fragment(0, None)]
        self.live = None
        self.barrier = None
        self.copies, self.copy_groups = [], []
        self.matrix_group, self.matrix_results, self.matrix_operands = 0, {}, []

    def file(self, width: int) -> Array:
        """All registers of a width, [registers, 32]."""
        return self._files[width]

    def finish_copies(self, groups_left: int) -> None:
        """Delivers the data of all committed cp.async groups but the newest `groups_left`."""
        words = self.cta.shared.words[4]
        while len(self.copy_groups) > groups_left:
            for index, data in self.copy_groups.pop(0):
                words[index] = data

    def finish_matrices(self, groups_left: int) -> None:
        """Delivers the results of all committed wgmma groups but the newest `groups_left`."""
        oldest_left = self.matrix_group - groups_left
        for operand in self.matrix_operands:
            if operand.group < oldest_left and (operand.words[operand.index] != operand.seen).any():
                raise RuntimeError(
                    f"shared memory changed under {operand.statement}; CTA {self.cta.index}"
                )
        self.matrix_operands = [o for o in self.matrix_operands if o.group >= oldest_left]
        rows = self.registers[32]
        for register, result in list(self.matrix_results.items()):
            if result.group < oldest_left:
                rows[register][:] = result.value
                del self.matrix_results[register]
