"""The launches that the report compiles: every op on the tensors of models that people train."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Model:
    """Shapes of a model whose ops are reported.

    Attributes:
        name: of the model, its image size and window.
        batch: images per step on one GPU.
        tokens: tokens of an image where they are masked.
        width: channels of these tokens.
        head_width: channels of the encoder's output, which the prediction head reads.
        cells: side of the square grid of the encoder's output.
        stride: pixels of the image along one cell.
    """

    name: str
    batch: int
    tokens: int
    width: int
    head_width: int
    cells: int
    stride: int


MODELS = (
    Model("swin_base_192_w6", 64, tokens=2304, width=128, head_width=1024, cells=6, stride=32),
    Model("swin_large_192_w12", 64, tokens=2304, width=192, head_width=1536, cells=6, stride=32),
    Model("vit_base_224", 64, tokens=196, width=768, head_width=768, cells=14, stride=16),
)


def cases() -> "list[Case]":
    """Every op with Triton kernels on the tensors of every model, forward and backward."""
    return [case for model in MODELS for case in _cases_of(model)]


def _cases_of(model: Model) -> "list[Case]":
    from simmim_kernels.linear_masked_l1_loss import triton_kernel as linear
    from simmim_kernels.masked_l1_loss import triton_kernel as loss
    from simmim_kernels.random_patch_mask import triton_kernel as random_mask
    from simmim_kernels.substitute_mask_tokens import triton_kernel as substitute

    bf16, byte = torch.bfloat16, torch.uint8
    B, side, S = model.batch, model.cells * model.stride, model.stride
    units = side // 32
    share = math.ceil(units * units * 0.6) / units**2  # of hidden pixels: whole units of 32 px
    token_side, cells = math.isqrt(model.tokens), B * model.cells**2
    mean, std = torch.empty(3), torch.empty(3)
    image = torch.empty(B, 3, side, side, dtype=byte)
    unit_mask = torch.zeros(B, units, units, dtype=torch.bool)
    pixels = image.numel()
    hidden = int(pixels * share)
    sign_bytes = pixels // 16 * 4

    def make_mask() -> None:
        ids = torch.empty(B, dtype=torch.int64)
        random_mask.forward(ids, torch.tensor(0), 1 << 40, units, units, token_side // units, 1)

    def make_substitute() -> None:
        tokens = torch.empty(B, model.tokens, model.width, dtype=bf16)
        mask = torch.empty(B, model.tokens, dtype=torch.bool)
        substitute.forward(tokens, mask, tokens[0, 0], None)
        substitute.backward(tokens, mask)

    def make_loss(stride: int, dtype: torch.dtype) -> None:
        shape = (B, model.cells, model.cells, 3 * S * S) if stride else (B, 3, side, side)
        prediction = torch.empty(shape, dtype=dtype)
        target = image if dtype == bf16 else torch.empty(image.shape)
        of_bytes = dtype == bf16
        found = loss.forward(
            prediction,
            target,
            unit_mask,
            mean if of_bytes else None,
            std if of_bytes else None,
            stride,
            0,
            True,
        )
        loss.backward(found[1], found[2], shape, dtype)

    def make_linear() -> None:
        features = torch.empty(B, model.cells, model.cells, model.head_width, dtype=bf16)
        weight = torch.empty(3 * S * S, model.head_width, dtype=bf16)
        bias = torch.empty(3 * S * S, dtype=bf16)
        _, per_pixel, signs = linear.forward(
            features, weight, bias, image, unit_mask, mean, std, S, 0, True
        )
        linear.backward(per_pixel, signs, features, weight, unit_mask, S, True, True)

    elements = B * model.tokens * model.width
    masked_tokens = 2 * B * model.tokens  # the mask, forward and backward
    needed = int(elements * (1 - share)) * 2 + 3 * elements * 2 + masked_tokens + 4 * model.width
    partial = -(-B * model.tokens // substitute.ROWS_PER_PROGRAM) * model.width * 4
    masks = B * units * units
    head = 3 * S * S * model.head_width
    feature_bytes = cells * model.head_width * 2
    found = [
        Case("random_patch_mask", model.name, "int64", make_mask, B * (8 + model.tokens)),
        Case(
            "substitute_mask_tokens",
            model.name,
            "bfloat16",
            make_substitute,
            bytes_needed=needed,
            bytes_moved=needed + 2 * partial,
        ),
    ]
    for layout, stride in (("masked_l1_loss", 0), ("masked_l1_loss_from_tokens", S)):
        for dtype, size, image_size in ((bf16, 2, 1), (torch.float32, 4, 4)):
            # sign words go out once and in once; both are part of any split in two passes
            floor = hidden * (size + image_size) + pixels * size + 2 * sign_bytes + 2 * masks
            partials = -(-pixels // 16 // loss.GROUPS_PER_PROGRAM) * 8
            make = functools.partial(make_loss, stride, dtype)
            name = str(dtype).removeprefix("torch.")
            found.append(Case(layout, model.name, name, make, floor, floor + partials))
    # matrix products read their factors once per tile, from the L2 cache but for the first time:
    # the model is that of an ideal cache
    floor = (
        int(feature_bytes * share) * 2  # features, forward and for the weight's gradient
        + feature_bytes  # their gradient, zeros included
        + head * 2 * 3  # weight twice, its gradient
        + hidden  # bytes of the image
        + sign_bytes
        + int(sign_bytes * share) * 3
    )
    found.append(Case("linear_masked_l1_loss", model.name, "bfloat16", make_linear, floor, floor))
    return found


@dataclass(frozen=True)
class Case:
    """An op on tensors of one shape.

    Attributes:
        op: name of the op's folder.
        model: whose shapes these are.
        dtype: of the activations, without "torch.".
        make: calls the op's launch functions, forward and backward, on CPU tensors of the real
            shapes, made by `torch.empty`.
        bytes_needed: the fewest bytes that any implementation moves: each input read once and each
            output written once, without what need not be read or may stay in registers.
        bytes_moved: what ours moves; a formula that the op's tests compare with the interpreter's
            byte counts. None models it: every launch moves each tensor that it is given once.
    """

    op: str
    model: str
    dtype: str
    make: Callable[[], object]
    bytes_needed: int
    bytes_moved: int | None = None

    @property
    def name(self) -> str:
        return f"{self.op}/{self.model}/{self.dtype}"
