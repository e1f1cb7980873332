"""Stochastic depth: which branches of each image are dropped, as a function of the sample."""

import torch
from torch import Tensor

from simmim_kernels import triton_backend
from simmim_kernels.dispatch import Backend, choose, never, wrong_input
from simmim_kernels.op import Op
from simmim_kernels.random_branch_scales import reference
from simmim_kernels.splitmix import fold, signed

__all__ = ["BACKENDS", "random_branch_scales"]

BACKENDS = (
    Backend("triton", triton_backend.reasons_against),
    Backend("reference", never),
)

# Keeps these draws apart from those of other uses of the same (seed, epoch, id).
STREAM = 0x64657074  # "dept"
# Random bits of a draw.
BITS = 53


def random_branch_scales(
    rate: float,
    branches: int,
    *,
    seed: int,
    ids: Tensor,
    epochs: Tensor,
    block: int = 0,
    view: int = 0,
    backend: str | None = None,
) -> Tensor:
    """0 with probability `rate`, else 1 / (1 - rate), for some branches of every image.

    A draw depends on (seed, epoch, id, view, block, branch) and on nothing else: not on the device,
    the batch or the number of processes. It is made on the device; nothing is read back.

    Args:
        rate: 0 to below 1.
        branches: how many of this block are drawn, at most 16.
        seed: any integer.
        ids: int64 [B], the samples.
        epochs: int64 [B].
        block: number of the block.
        view: number of the view of an image that a step sees more than once.
        backend: "triton" (GPU) or "reference", which draw the same; None takes the first that can
            run.

    Returns:
        float32 [branches, B] on the device of `ids`. No gradient.

    Raises:
        ValueError: shapes, dtypes, the rate or the number of branches are not as above.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: Huang et al., "Deep networks with stochastic depth" (ECCV 2016), as timm scales what is
        kept; the draw is ours.
    """
    error = wrong_input(ids=ids, epochs=epochs, branches=branches)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate={rate} is outside 0 … below 1")
    if ids.dim() != 1 or epochs.shape != ids.shape or not 1 <= branches <= 16:
        raise error("expected ids [B], epochs [B] and 1 to 16 branches")
    if ids.dtype.is_floating_point or epochs.dtype.is_floating_point:
        raise error("expected integers")
    ids, epochs = ids.long(), epochs.long()
    key = signed(fold(STREAM, seed, view, block))
    chosen = choose("random_branch_scales", BACKENDS, (ids, epochs), backend)
    # a draw is kept where its random bits are not below the threshold
    threshold, kept = int(rate * 2**BITS), 1.0 / (1.0 - rate)
    if chosen == "reference":
        return reference.random_branch_scales(ids, epochs, key, threshold, kept, branches)
    return _draw(chosen, ids, epochs, key, threshold, kept, branches)


def _shapes(
    ids: Tensor, epochs: Tensor, key: int, threshold: int, kept: float, branches: int
) -> Tensor:
    return ids.new_empty((branches, ids.shape[0]), dtype=torch.float32)


_draw = Op("random_branch_scales", _shapes)
