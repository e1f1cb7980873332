"""The matrix products of a step alone: a step that makes all of them cannot be faster."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measuring.timing import interleaved
from bench.steps.engine_row import engine_loss
from bench.steps.images import Images
from simmim.config.sections import Config
from simmim.model.image_model import ImageModel
from simmim.training.precision import DTYPES


@dataclass(frozen=True)
class Product:
    """`batch` matrix products [m, k] · [k, n]; each operand is row-major or transposed."""

    batch: int
    m: int
    k: int
    n: int
    transposed: tuple[bool, bool] = (False, False)

    @property
    def flops(self) -> int:
        """A multiplication and an addition count as two."""
        return 2 * self.batch * self.m * self.k * self.n


class ProductCounter(TorchDispatchMode):
    """Counts the matrix products that run; a convolution counts as the product of its windows."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default):
            self._count(*args[:2])
        elif func in (aten.addmm.default, aten.baddbmm.default):
            self._count(*args[1:3])
        elif func is aten.convolution.default:
            self._count_convolution(out, args[1], (True,))
        elif func is aten.convolution_backward.default:
            self._count_convolution(args[0], args[2], args[-1][:2])
        return out

    def _count(self, a: Tensor, b: Tensor) -> None:
        batch = a.shape[0] if a.dim() == 3 else 1
        transposed = tuple(t.stride(-1) != 1 and t.stride(-2) == 1 for t in (a, b))
        product = Product(batch, a.shape[-2], a.shape[-1], b.shape[-1], transposed)  # type: ignore[arg-type]
        self.counts[product] += 1

    def _count_convolution(self, out: Tensor, weight: Tensor, wanted: Sequence[bool]) -> None:
        # each output pixel is a row: its window, unfolded
        rows, channels = out.numel() // out.shape[1], out.shape[1]
        self.counts[Product(1, rows, weight[0].numel(), channels)] += sum(wanted)


def count_products(step: Callable[[], object]) -> Counter[Product]:
    """The matrix products that `step` makes in plain PyTorch.

    Attention counts as its two products, whichever kernel computes it.
    """
    counter = ProductCounter()
    with sdpa_kernel(SDPBackend.MATH), counter:
        step()
    return counter.counts


def fast_dtypes(dtype: str, device: torch.device) -> list[str]:
    """The dtypes in which products may be fastest: the step's own and, on a CPU, float32.

    Some CPUs only emulate a low precision. A dtype that takes at least twice as long as the other
    in a trial is left out.
    """
    names = [dtype] if dtype == "float32" or device.type != "cpu" else [dtype, "float32"]
    trial = Counter({Product(1, 768, 768, 768): 1})
    sides = {name: all_products(trial, name, device) for name in names}
    times = interleaved(sides, device, seconds=0, least_rounds=3)
    return [name for name in names if times[name] < 2 * min(times.values())]


def all_products(
    counts: Mapping[Product, int], dtype: str, device: torch.device
) -> Callable[[], None]:
    """A function that makes every product as often as it was counted, and nothing else.

    All products read the same operands and write to the same memory, so that nothing is allocated
    and the operands are in the cache as far as they fit.
    """

    def allocate(size_of: Callable[[Product], int]) -> Tensor:
        sizes = [p.batch * size_of(p) for p in counts]
        memory = torch.empty(max(sizes), dtype=DTYPES[dtype], device=device)
        # a GPU's clock depends on the bits
        return memory.normal_() if device.type == "cuda" else memory.fill_(0.5)

    left = allocate(lambda p: p.m * p.k)
    right = allocate(lambda p: p.k * p.n)
    result = allocate(lambda p: p.m * p.n)

    def view(memory: Tensor, batch: int, rows: int, columns: int, transposed: bool) -> Tensor:
        shape = (batch, columns, rows) if transposed else (batch, rows, columns)
        matrix = memory[: math.prod(shape)].view(shape)
        matrix = matrix.mT if transposed else matrix
        return matrix[0] if batch == 1 else matrix

    calls = []
    for p, count in counts.items():
        a = view(left, p.batch, p.m, p.k, p.transposed[0])
        b = view(right, p.batch, p.k, p.n, p.transposed[1])
        out = view(result, p.batch, p.m, p.n, transposed=False)
        calls.append((torch.mm if p.batch == 1 else torch.bmm, a, b, out, count))

    def run() -> None:
        for product, a, b, out, count in calls:
            for _ in range(count):
                product(a, b, out=out)

    return run


def products_of_step(model: ImageModel, images: Images, config: Config) -> Counter[Product]:
    """The matrix products of one forward and backward pass of the model in plain PyTorch."""

    def step() -> None:
        engine_loss(model, images, config, config.train.precision).backward()

    model.use_backend("reference")
    counts = count_products(step)
    model.zero_grad(set_to_none=True)
    model.use_backend(config.kernels.backend)
    return counts
