"""The GPUs that the report speaks of: bandwidth, and the limits of one multiprocessor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU of a target: data-sheet bandwidth and the limits of one multiprocessor.

    Sources: data sheets; CUDA C++ programming guide, table of technical specifications per compute
    capability; AMD CDNA 3 ISA and LLVM AMDGPU usage (gfx942).

    Attributes:
        name: the card.
        bandwidth: memory bandwidth in bytes per second.
        registers: 32-bit registers per multiprocessor (AMD: per lane of one SIMD).
        warps: most resident warps per multiprocessor (AMD: wavefronts per compute unit).
        programs: most resident programs (thread blocks) per multiprocessor.
        shared_bytes: shared memory per multiprocessor.
        shared_bytes_per_program: most shared memory of one program.
    """

    name: str
    bandwidth: float
    registers: int
    warps: int
    programs: int
    shared_bytes: int
    shared_bytes_per_program: int


CARDS = {
    "sm_80": Card("A100 80GB SXM", 2.039e12, 65536, 64, 32, 164 << 10, 163 << 10),
    "sm_90": Card("H100 SXM", 3.35e12, 65536, 64, 32, 228 << 10, 227 << 10),
    "sm_100": Card("B200", 8.0e12, 65536, 64, 32, 228 << 10, 227 << 10),
    "gfx942": Card("MI300X", 5.3e12, 512, 32, 16, 64 << 10, 64 << 10),
}

# Shared memory that every GPU since Ampere can give one program (RTX 30, 40 and 50 have the least).
SHARED_BYTES_EVERYWHERE = 99 << 10


def occupancy(target: str, registers: int, num_warps: int, shared_bytes: int) -> float:
    """Resident warps over the most possible; 0 where the launch would fail."""
    card = CARDS[target]
    if shared_bytes > card.shared_bytes_per_program:
        return 0.0
    if target.startswith("gfx"):  # registers come in eights, per wavefront and SIMD (four of them)
        by_registers = 4 * (card.registers // _round_up(max(registers, 1), 8)) // num_warps
        by_shared = card.shared_bytes // max(shared_bytes, 1)
    else:  # 256 registers at a time, per warp; 1 KiB of shared memory is the system's
        warps = card.registers // _round_up(32 * max(registers, 1), 256)
        by_registers = warps // 4 * 4 // num_warps
        by_shared = card.shared_bytes // _round_up(shared_bytes + 1024, 128)
    programs = min(card.warps // num_warps, card.programs, by_registers, by_shared)
    return programs * num_warps / card.warps


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
