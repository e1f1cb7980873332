"""The loss over hidden pixels, without and with the linear head before it.

Source of the published form: microsoft/SimMIM models/simmim.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.op_cases.case import Case, Run, dtype_name, three_sides, with_gradients
from bench.op_cases.shapes import BATCH, HEAD_WIDTH, IMAGE, PATCH, STRIDE, UNIT, token_mask_of
from bench.peers.published import published_loss
from simmim_kernels import linear_masked_l1_loss, masked_l1_loss_from_tokens

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _images(units: Tensor) -> tuple[Tensor, Tensor]:
    """Images in uint8, and the same normalised in float32, as the published pipeline gives them."""
    image = torch.randint(0, 256, (BATCH, 3, IMAGE, IMAGE), dtype=torch.uint8, device=units.device)
    mean, std = (torch.tensor(v, device=units.device).view(3, 1, 1) for v in (MEAN, STD))
    return image, (image.float() / 255 - mean) / std


def loss_from_tokens(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    token_mask, (image, normalised) = token_mask_of(units), _images(units)
    cells = IMAGE // STRIDE
    prediction = torch.randn(BATCH, 3 * STRIDE**2, cells, cells, device=units.device).to(dtype)
    # each side gets the layout that its own head produces
    in_tokens = prediction.permute(0, 2, 3, 1).contiguous().requires_grad_()
    prediction.requires_grad_()
    is_float = dtype == torch.float32

    def ours(prediction: Tensor) -> Tensor:
        if is_float:
            return masked_l1_loss_from_tokens(
                prediction, normalised, units, STRIDE, backend=backend
            )
        return masked_l1_loss_from_tokens(
            prediction, image, units, STRIDE, mean=MEAN, std=STD, backend=backend
        )

    def published(prediction: Tensor) -> Tensor:
        return published_loss(F.pixel_shuffle(prediction, STRIDE), normalised, token_mask, PATCH)

    def in_layout_of_tokens(side: Run) -> Run:
        def run() -> list[Tensor]:
            loss, grad = side()
            return [loss, grad.permute(0, 2, 3, 1)]

        return run

    hidden_values = int(units.sum()) * UNIT**2 * 3
    image_bytes = 4 if is_float else 1
    return Case(
        f"masked_l1_loss_from_tokens {dtype_name(dtype)}",
        {
            "ours": with_gradients(ours, [in_tokens]),
            "eager": in_layout_of_tokens(with_gradients(published, [prediction])),
            "compile": in_layout_of_tokens(with_gradients(torch.compile(published), [prediction])),
        },
        1e-2 if dtype == torch.bfloat16 else 1e-4,
        hidden_values * (prediction.element_size() + image_bytes) + prediction.nbytes,
        {"eager": 9.0, "compile": 6.0, "copy": 0.8} if is_float else {},
    )


def linear_loss(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    token_mask, (image, normalised) = token_mask_of(units), _images(units)
    cells = IMAGE // STRIDE
    features = torch.randn(BATCH, HEAD_WIDTH, cells, cells, device=units.device).to(dtype)
    # a channels-last feature map has its rows [B, h, w, D] in memory, as the published encoder
    # leaves them: it ends in a transpose of these rows
    features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    head = nn.Conv2d(HEAD_WIDTH, 3 * STRIDE**2, 1).to(units.device, dtype)

    def ours(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_masked_l1_loss(
            features.permute(0, 2, 3, 1),
            weight,
            bias,
            image,
            units,
            STRIDE,
            mean=MEAN,
            std=STD,
            backend=backend,
        )

    def published(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        reconstruction = F.pixel_shuffle(F.conv2d(features, weight, bias), STRIDE)
        return published_loss(reconstruction, normalised, token_mask, PATCH)

    leaves: list[Tensor] = [features, head.weight, head.bias]  # type: ignore[list-item]
    return Case(
        f"linear_masked_l1_loss {dtype_name(dtype)}",
        three_sides(ours, published, leaves),
        5e-2 if dtype == torch.bfloat16 else 1e-3,
        None,
        {"eager": 3.0, "compile": 2.0} if dtype == torch.bfloat16 else {},
    )
