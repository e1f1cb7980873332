"""Patch embedding of masked images: only visible patches are projected.

B batch, C channels, H W pixels, p side of a patch, h w grid of patches, L = h·w, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from simmim_kernels import native
from simmim_kernels.dispatch import Backend, choose, describe, never
from simmim_kernels.dtypes import in_float32
from simmim_kernels.embed_patches import reference
from simmim_kernels.embed_patches.arguments import (
    Embedded,
    EmbeddingParameters,
    Patches,
    embedded_shapes,
)
from simmim_kernels.masked_l1_loss import check_pixels
from simmim_kernels.op import Op
from simmim_kernels.substitute_mask_tokens import substitute_mask_tokens

__all__ = ["BACKENDS", "embed_patches"]

# On a GPU all patches are projected: how many are visible is not known to the host, and the product
# is a thousandth of a step. `substitute_mask_tokens` then does the rest in one pass.
BACKENDS = (Backend("native", native.reasons_against), Backend("reference", never))


def embed_patches(
    image: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    mask_token: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Tokens of the visible patches, the mask token in place of the hidden ones.

    The native backend reads the image as it is (bytes, any strides), normalises pixels on the way
    and projects visible patches only; hidden pixels have no influence, whatever they hold.

    Args:
        image: [B, C, H, W]; uint8 with mean and std, or floating point and normalised. No gradient.
        mask: bool [B, h, w], True hides; None hides nothing.
        weight: [D, C, p, p], as of a convolution of stride p.
        bias: [D] or None.
        norm_weight: [D], LayerNorm after the projection; None has none.
        norm_bias: [D], with norm_weight.
        mask_token: [D]; needed with a mask.
        pos_embed: [L, D] or None; added to every token, hidden or not.
        mean: per channel, on the 0-1 scale, for uint8.
        std: as mean.
        eps: of the LayerNorm.
        backend: "native" (CPU) or "reference"; None takes the first that can run. "triton" projects
            all patches in PyTorch and puts the mask token in with a Triton kernel.

    Dtypes are those of `residual_attention`: the result has the autocast dtype, or that of weight.

    Returns:
        [B, L, D]. Gradient (first order) flows to every parameter.

    Raises:
        ValueError: shapes or dtypes disagree; the message prints all of them.
        RuntimeError: the named backend cannot run; the message lists why.

    Source: microsoft/SimMIM models/simmim.py SwinTransformerForSimMIM.forward and
        models/swin_transformer.py PatchEmbed.
    """

    def error(what: str) -> ValueError:
        given = describe(
            image=image,
            mask=mask,
            weight=weight,
            bias=bias,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            mask_token=mask_token,
            pos_embed=pos_embed,
        )
        return ValueError(f"{what}: {given}")

    if image.dim() != 4 or weight.dim() != 4 or weight.shape[1] != image.shape[1]:
        raise error("expected image [B, C, H, W] and weight [D, C, p, p]")
    patch = weight.shape[2]
    if weight.shape[3] != patch or image.shape[2] % patch or image.shape[3] % patch:
        raise error("patches must be square and fill the image")
    B, h, w = image.shape[0], image.shape[2] // patch, image.shape[3] // patch
    vectors = (bias, norm_weight, norm_bias, mask_token)
    if any(v is not None and v.shape != weight.shape[:1] for v in vectors):
        raise error("bias, norm_weight, norm_bias and mask_token must be [D]")
    if (norm_weight is None) != (norm_bias is None):
        raise error("norm_weight and norm_bias come together")
    if pos_embed is not None and pos_embed.shape != (h * w, weight.shape[0]):
        raise error("expected pos_embed [L, D]")
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != (B, h, w):
            raise error("expected a bool mask [B, h, w]")
        if mask_token is None:
            raise error("a mask needs a mask_token")
    tensors = (image, mask, weight, *vectors, pos_embed)
    if any(t is not None and t.device != weight.device for t in tensors):
        raise error("all tensors must be on one device")
    mean, std = check_pixels(image, mean, std, error)
    image = image.detach()
    chosen = choose(
        "embed_patches", BACKENDS, tensors, "reference" if backend == "triton" else backend
    )
    if chosen == "reference":
        tokens = reference.project_patches(
            image, weight, bias, norm_weight, norm_bias, mean, std, eps
        )
        if mask is None or mask_token is None:
            return tokens if pos_embed is None else tokens + pos_embed.to(tokens.dtype)
        return substitute_mask_tokens(
            tokens, mask.flatten(1), mask_token, pos_embed=pos_embed, backend=backend
        )
    device = image.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    patches = Patches(image, mask, mean, std)
    in_product_dtype = weight.to(native.product_dtype(dtype))
    parameters = EmbeddingParameters(in_product_dtype, *[in_float32(v) for v in vectors])
    room = _room(mask, B * h * w)
    return _embed(chosen, patches, parameters, in_float32(pos_embed), eps, dtype, room).out


def _room(mask: Tensor | None, tokens: int) -> int:
    """Visible patches; while torch.compile traces, what they are at most."""
    if mask is None or torch.compiler.is_compiling():
        return tokens
    return tokens - int(mask.numpy().sum())  # a look at CPU memory, nothing to wait for


def _shapes(
    patches: Patches,
    parameters: EmbeddingParameters,
    pos_embed: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    visible: int,
) -> Embedded:
    return embedded_shapes(patches.image, parameters, dtype, visible)


def _gradient_shapes(
    grad_out: Tensor,
    patches: Patches,
    parameters: EmbeddingParameters,
    projected: Tensor,
    norm_mean: Tensor,
    norm_rstd: Tensor,
    eps: float,
) -> list[Tensor]:
    """All vectors have a gradient, those that are None too."""
    weight = parameters.weight
    vectors = [weight.new_empty(weight.shape[:1], dtype=torch.float32) for _ in range(4)]
    return [weight.new_empty(weight.shape), *vectors]


_embed = Op(
    "embed_patches",
    _shapes,
    _gradient_shapes,
    gradients=("parameters",),
    torch_gradients={"pos_embed": lambda grad_out: grad_out.sum(0, dtype=torch.float32)},
)
