"""Which dtypes the tensors of an op with matrix products have."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simmim_kernels import native


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype of autocast where that is on."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x
    dtype = torch.get_autocast_dtype(device)
    return x if x.dtype == dtype else x.to(dtype)


def in_float32(tensor: Tensor | None) -> Tensor | None:
    """The tensor in float32, if there is one."""
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.float()


def of_kernels(parameters: tuple[Tensor | None, ...], backend: str, dtype: torch.dtype) -> Any:
    """Parameters as kernels take them beside activations of `dtype`.

    Native kernels take matrices in the dtype of their products. Triton's launchers take them as
    they are: copies in `dtype` are theirs to find, and gradients come in the weights' own dtype.
    Everything else is float32.
    """
    if backend == "native":
        matrices = native.product_dtype(dtype)
        return [None if p is None else p.to(matrices if p.dim() == 2 else torch.float32)
                for p in parameters]  # fmt: skip
    return [p if p is None or p.dim() == 2 else in_float32(p) for p in parameters]


def of_reference(x: Tensor, tensors: tuple[Tensor | None, ...]) -> Any:
    """Parameters as plain PyTorch wants them beside `x`: under autocast it casts them itself."""
    if torch.is_autocast_enabled(x.device.type):
        return list(tensors)
    return [None if t is None else t.to(x.dtype) for t in tensors]


def product_dtype(backend: str, dtype: torch.dtype) -> torch.dtype:
    """What matrix products of `backend` run in when activations have `dtype`."""
    return native.product_dtype(dtype) if backend == "native" else dtype


def check_dtypes(
    x: Tensor, parameters: tuple[Tensor | None, ...], error: Callable[[str], ValueError]
) -> None:
    """Raises `error` unless x is floating point and its parameters fit it."""
    if not x.dtype.is_floating_point:
        raise error("expected floating point activations")
    for parameter in parameters:
        if parameter is None:
            continue
        if parameter.device != x.device or parameter.dtype not in (x.dtype, torch.float32):
            raise error("parameters must be on the activations' device, of their dtype or float32")
