"""Counter-based random numbers: SplitMix64 over a key, in Python integers, NumPy and torch.

Every draw of the project that must not depend on the number of workers, ranks or devices comes
from here. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators"
(OOPSLA 2014); constants are those of its 64-bit finaliser (variant 13 of Stafford's).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BITS = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def mix(z: int) -> int:
    """The finaliser: a bijection of 64-bit integers that scatters every input bit."""
    z &= _BITS
    z = ((z ^ (z >> _SHIFTS[0])) * _MULTIPLIERS[0]) & _BITS
    z = ((z ^ (z >> _SHIFTS[1])) * _MULTIPLIERS[1]) & _BITS
    return z ^ (z >> _SHIFTS[2])


def fold(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = fold_into(key, part)
    return key


def fold_into(key: int, part: int) -> int:
    """The key with one more part, as `fold` adds them one by one."""
    return mix((key + GAMMA) ^ mix(part + GAMMA))


def uniform(key: int, counter: int) -> float:
    """Draw number `counter` of the stream `key`, in [0, 1), with 53 random bits."""
    # `mix`, spelt out: this is called several times for every image that is loaded
    z = (key + (counter + 1) * GAMMA) & _BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _BITS
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def permutation(key: int, size: int) -> NDArray[np.int64]:
    """A permutation of range(size) that is a pure function of `key`."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(GAMMA)
        z = (z ^ (z >> np.uint64(_SHIFTS[0]))) * np.uint64(_MULTIPLIERS[0])
        z = (z ^ (z >> np.uint64(_SHIFTS[1]))) * np.uint64(_MULTIPLIERS[1])
        z ^= z >> np.uint64(_SHIFTS[2])
    return np.argsort(z, kind="stable").astype(np.int64)


def signed(value: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit `value`."""
    value &= _BITS
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; masking off the copied sign makes it the logical shift
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix_tensor(z: Tensor) -> Tensor:
    """`mix` of an int64 tensor, bit for bit (int64 products wrap around on every device)."""
    z = (z ^ _shift_right(z, _SHIFTS[0])) * signed(_MULTIPLIERS[0])
    z = (z ^ _shift_right(z, _SHIFTS[1])) * signed(_MULTIPLIERS[1])
    return z ^ _shift_right(z, _SHIFTS[2])


def fold_tensor(key: int | Tensor, part: Tensor) -> Tensor:
    """One more part, an int64 tensor, folded into `key`, bit for bit as `fold` does."""
    gamma = signed(GAMMA)
    start = signed(key + GAMMA) if isinstance(key, int) else key + gamma
    return mix_tensor(mix_tensor(part.to(torch.int64) + gamma) ^ start)
