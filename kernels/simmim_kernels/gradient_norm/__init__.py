"""The global norm of all gradients, which clipping and the check for overflow need."""

from collections.abc import Sequence

from torch import Tensor

from simmim_kernels.dispatch import Backend, choose, never
from simmim_kernels.gradient_norm import native_kernel, reference

__all__ = ["BACKENDS", "gradient_norm"]

BACKENDS = (
    Backend("native", native_kernel.reasons_against),
    Backend("reference", never),
)


def gradient_norm(gradients: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """√Σ x² over all elements of all tensors.

    Args:
        gradients: tensors of one device; any shapes, none is fine.
        backend: "native" (float32 on the CPU, contiguous or channels-last) or "reference"; None
            takes the first that can run.

    Returns:
        Scalar, float32 from the native backend. It does not depend on the number of threads.
        Without gradient. Not finite if an element is not, or if the sum leaves float32's range.

    Raises:
        RuntimeError: the named backend cannot run; the message lists why.

    Source: torch.nn.utils.get_total_norm, which sums each tensor in one thread.
    """
    gradients = [g.detach() for g in gradients]
    if choose("gradient_norm", BACKENDS, gradients, backend) == "native":
        return native_kernel.forward(gradients)
    return reference.gradient_norm(gradients)
