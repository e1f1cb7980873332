"""The ops beside the published form of what they replace, on the shapes of Swin-B at 192 px.

Every side computes loss or output and all gradients, from the same numbers; `check` compares them
with ours before anything is timed. Source of the eager sides' formulas: microsoft/SimMIM
models/simmim.py and data/data_simmim.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from simmim_kernels import (
    batch_norm_relu,
    crop_resize,
    linear_masked_l1_loss,
    masked_l1_loss_from_tokens,
    random_patch_mask,
    residual_mlp,
    substitute_mask_tokens,
    window_attention,
)

BATCH, IMAGE, PATCH, UNIT, STRIDE, WIDTH, HEAD_WIDTH = 64, 192, 4, 32, 32, 128, 1024
MASK_BATCH = 256
# the third stage, where most of the blocks are
STAGE_BATCH, STAGE_SIDE, STAGE_WIDTH, STAGE_HEADS, WINDOW = 8, 12, 512, 16, 6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """One op at one dtype.

    Attributes:
        name: op and dtype.
        sides: name → function that returns output and gradients; "ours" is among them.
        tolerance: largest relative error (norms) between ours and another side.
        fewest_bytes: that forward and backward must move, None where that says little.
        compared: what of each result must be equal.
        targets: smallest ratio to reach against a side, and share of the copy rate ("copy").
    """

    name: str
    sides: dict[str, Callable[[], list[Tensor]]]
    tolerance: float
    fewest_bytes: int | None
    targets: dict[str, float]
    compared: Callable[[Tensor], Tensor] = torch.Tensor.detach

    def check(self) -> None:
        """Raises AssertionError if a side does not compute what ours does."""
        ours = [t.clone() for t in self.sides["ours"]()]
        for name, side in self.sides.items():
            for a, b in zip(ours, side(), strict=True):
                a, b = (self.compared(t).double() for t in (a, b))
                error = float((a - b).norm() / b.norm().clamp(min=1e-30))
                assert error <= self.tolerance, f"{self.name}: ours and {name} differ by {error}"


def make_case(name: str, device: torch.device, backend: str) -> Case:
    """The case of that name in CASES; "ours" runs through `backend` and nothing else."""
    torch.manual_seed(0)
    units = random_patch_mask(BATCH, (IMAGE // UNIT,) * 2, seed=0, device=device)
    return (CASES | CPU_CASES)[name](units, backend)


def _token_mask(units: Tensor) -> Tensor:
    return units.repeat_interleave(UNIT // PATCH, 1).repeat_interleave(UNIT // PATCH, 2)


def _gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        out = function(*leaves)
        out.backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return run


def _substitute(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    mask = _token_mask(units).flatten(1)
    tokens = torch.randn(BATCH, mask.shape[1], WIDTH, device=units.device).to(dtype)
    token = torch.randn(WIDTH, device=units.device).to(dtype)
    grad = torch.randn_like(tokens)
    leaves = [tokens.requires_grad_(), token.requires_grad_()]

    def published(tokens: Tensor, token: Tensor) -> Tensor:
        weight = mask.unsqueeze(-1).type_as(token)
        return tokens * (1.0 - weight) + token.expand_as(tokens) * weight

    def ours(tokens: Tensor, token: Tensor) -> Tensor:
        return substitute_mask_tokens(tokens, mask, token, backend=backend)

    def run(function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def both() -> list[Tensor]:
            tokens.grad = token.grad = None
            out = function(*leaves)
            out.backward(grad)
            assert tokens.grad is not None
            assert token.grad is not None
            return [out.detach(), tokens.grad, token.grad]

        return both

    visible = int((~mask).sum()) * WIDTH * tokens.element_size()
    return Case(
        f"substitute_mask_tokens {_name(dtype)}",
        {
            "ours": run(ours),
            "eager": run(published),
            "compile": run(torch.compile(published)),
        },
        2e-2 if dtype == torch.bfloat16 else 1e-4,
        visible + 3 * tokens.nbytes + 2 * mask.nbytes,
        {"eager": 4.0, "compile": 2.0, "copy": 0.8} if dtype == torch.bfloat16 else {},
    )


def _published_loss(prediction: Tensor, image: Tensor, token_mask: Tensor) -> Tensor:
    """Prediction [B, C·s·s, h, w] as a convolution gives it, mask on the grid of tokens."""
    reconstruction = F.pixel_shuffle(prediction, STRIDE)
    pixels = token_mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    pixels = pixels.unsqueeze(1).contiguous()
    error = F.l1_loss(image, reconstruction, reduction="none")
    return (error * pixels).sum() / (pixels.sum() + 1e-5) / image.shape[1]


def _images(units: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes, and the same normalised in float32 as the published data pipeline hands them on."""
    image = torch.randint(0, 256, (BATCH, 3, IMAGE, IMAGE), dtype=torch.uint8, device=units.device)
    mean, std = (torch.tensor(v, device=units.device).view(3, 1, 1) for v in (MEAN, STD))
    return image, (image.float() / 255 - mean) / std


def _loss_from_tokens(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    token_mask, (image, normalised) = _token_mask(units), _images(units)
    cells = IMAGE // STRIDE
    prediction = torch.randn(BATCH, 3 * STRIDE**2, cells, cells, device=units.device).to(dtype)
    # each side gets the layout that its own head leaves
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
        return _published_loss(prediction, normalised, token_mask)

    def in_layout_of_tokens(side: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            loss, grad = side()
            return [loss, grad.permute(0, 2, 3, 1)]

        return run

    hidden = int(units.sum()) * UNIT**2 * 3
    image_size = 4 if is_float else 1
    return Case(
        f"masked_l1_loss_from_tokens {_name(dtype)}",
        {
            "ours": _gradients(ours, [in_tokens]),
            "eager": in_layout_of_tokens(_gradients(published, [prediction])),
            "compile": in_layout_of_tokens(_gradients(torch.compile(published), [prediction])),
        },
        1e-2 if dtype == torch.bfloat16 else 1e-4,
        hidden * (prediction.element_size() + image_size) + prediction.nbytes,
        {"eager": 9.0, "compile": 6.0, "copy": 0.8} if is_float else {},
    )


def _linear_loss(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    token_mask, (image, normalised) = _token_mask(units), _images(units)
    cells = IMAGE // STRIDE
    features = torch.randn(BATCH, HEAD_WIDTH, cells, cells, device=units.device).to(dtype)
    # the head of a channels-last features map reads [B, h, w, D] rows; the published encoder ends
    # in a transpose of just these rows
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
        return _published_loss(F.conv2d(features, weight, bias), normalised, token_mask)

    leaves: list[Tensor] = [features, head.weight, head.bias]  # type: ignore[list-item]
    return Case(
        f"linear_masked_l1_loss {_name(dtype)}",
        {
            "ours": _gradients(ours, leaves),
            "eager": _gradients(published, leaves),
            "compile": _gradients(torch.compile(published), leaves),
        },
        5e-2 if dtype == torch.bfloat16 else 1e-3,
        None,
        {"eager": 3.0, "compile": 2.0} if dtype == torch.bfloat16 else {},
    )


def _random_mask(units: Tensor, backend: str) -> Case:
    device = units.device
    tokens, scale = IMAGE // PATCH, UNIT // PATCH
    side = IMAGE // UNIT
    hidden = int(np.ceil(side**2 * 0.6))

    def one_image() -> np.ndarray:
        mask = np.zeros(side**2, dtype=int)
        mask[np.random.permutation(side**2)[:hidden]] = 1
        return mask.reshape(side, side).repeat(scale, axis=0).repeat(scale, axis=1)

    def published() -> list[Tensor]:
        masks = torch.stack([torch.as_tensor(one_image()) for _ in range(MASK_BATCH)])
        return [masks.to(device)]

    def ours() -> list[Tensor]:
        mask = random_patch_mask(
            MASK_BATCH, (tokens, tokens), unit=scale, seed=1, device=device, backend=backend
        )
        return [mask]

    return Case(
        "random_patch_mask",
        {"ours": ours, "eager": published},
        0.0,
        None,
        {"eager": 20.0},
        compared=lambda mask: mask.sum((1, 2)),  # different draws of as many hidden tokens
    )


def _from_gradient(
    function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor
) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        out = function(*leaves)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return run


def _window_attention(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    device, shape = units.device, (STAGE_BATCH, STAGE_SIDE, STAGE_SIDE)
    qkv = torch.randn(*shape, 3 * STAGE_WIDTH, device=device).to(dtype).requires_grad_()
    table = torch.randn((2 * WINDOW - 1) ** 2, STAGE_HEADS, device=device).requires_grad_()
    grad = torch.randn(*shape, STAGE_WIDTH, device=device).to(dtype)

    def attend(qkv: Tensor, table: Tensor, name: str) -> Tensor:
        return window_attention(qkv, table, STAGE_HEADS, WINDOW, WINDOW // 2, backend=name)

    plain = partial(attend, name="reference")
    leaves = [qkv, table]
    return Case(
        f"window_attention {_name(dtype)}",
        {
            "ours": _from_gradient(partial(attend, name=backend), leaves, grad),
            "eager": _from_gradient(plain, leaves, grad),
            "compile": _from_gradient(torch.compile(plain), leaves, grad),
        },
        5e-2 if dtype == torch.bfloat16 else 1e-4,
        # q, k, v to out; q, k, v and the gradient of out to those of q, k, v
        (4 + 7) * grad.nbytes,
        {},
    )


def _residual_mlp(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    device, C = units.device, STAGE_WIDTH
    shape = (STAGE_BATCH, STAGE_SIDE, STAGE_SIDE, C)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    norm = nn.LayerNorm(C, device=device)
    fc1 = nn.Linear(C, 4 * C, device=device)
    fc2 = nn.Linear(4 * C, C, device=device)
    grad = torch.randn(shape, device=device).to(dtype)
    leaves = [x, *(p for m in (norm, fc1, fc2) for p in m.parameters())]

    def branch(*leaves: Tensor, name: str) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return residual_mlp(*leaves, backend=name)

    plain = partial(branch, name="reference")
    return Case(
        f"residual_mlp {_name(dtype)}",
        {
            "ours": _from_gradient(partial(branch, name=backend), leaves, grad),
            "eager": _from_gradient(plain, leaves, grad),
            "compile": _from_gradient(torch.compile(plain), leaves, grad),
        },
        5e-2 if dtype == torch.bfloat16 else 1e-4,
        None,
        {},
    )


def _batch_norm_relu(dtype: torch.dtype, units: Tensor, backend: str) -> Case:
    """The end of a block of ResNet-50's first stage, at 224 px; maps are channels-last."""
    shape = (STAGE_BATCH, 256, 56, 56)
    x, shortcut, grad = (
        torch.randn(shape, device=units.device).to(dtype, memory_format=torch.channels_last)
        for _ in range(3)
    )
    norm = nn.BatchNorm2d(shape[1], device=units.device)
    leaves = [x, shortcut, norm.weight, norm.bias]

    def ours(x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm_relu(x, weight, bias, shortcut, backend=backend)[0]

    def published(x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, True) + shortcut, inplace=True)

    return Case(
        f"batch_norm_relu {_name(dtype)}",
        {
            "ours": _from_gradient(ours, leaves, grad),
            "eager": _from_gradient(published, leaves, grad),
            "compile": _from_gradient(torch.compile(published), leaves, grad),
        },
        # in bf16 the sign of a sum near 0, and with it a gradient, hangs on where it is rounded
        5e-2 if dtype == torch.bfloat16 else 1e-4,
        # forward x, shortcut and out; backward x, out and its gradient, and two gradients
        8 * x.nbytes,
        {},
    )


def _crop_resize(units: Tensor, backend: str) -> Case:
    # a usual crop of a usual photo of ImageNet
    photo = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    box, size = (30, 20, 450, 340), (IMAGE, IMAGE)
    picture = Image.fromarray(photo)
    out = np.empty((*size, 3), dtype=np.uint8)
    left, top, width, height = box

    def pillow() -> list[Tensor]:
        crop = picture.crop((left, top, left + width, top + height))
        # rows first, as Pillow before 13 always does
        rows = crop.resize((IMAGE, height), Image.Resampling.BILINEAR)
        out[:] = rows.resize(size, Image.Resampling.BILINEAR)
        return [torch.from_numpy(out)]

    def ours() -> list[Tensor]:
        return [torch.from_numpy(crop_resize(photo, box, size, backend=backend))]

    return Case("crop_resize", {"ours": ours, "eager": pillow}, 0.0, None, {})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES: dict[str, Callable[[Tensor, str], Case]] = {
    "substitute_mask_tokens bfloat16": partial(_substitute, torch.bfloat16),
    "substitute_mask_tokens float32": partial(_substitute, torch.float32),
    "masked_l1_loss_from_tokens float32": partial(_loss_from_tokens, torch.float32),
    "masked_l1_loss_from_tokens bfloat16": partial(_loss_from_tokens, torch.bfloat16),
    "linear_masked_l1_loss bfloat16": partial(_linear_loss, torch.bfloat16),
    "linear_masked_l1_loss float32": partial(_linear_loss, torch.float32),
    "random_patch_mask": _random_mask,
    "window_attention bfloat16": partial(_window_attention, torch.bfloat16),
    "window_attention float32": partial(_window_attention, torch.float32),
    "residual_mlp bfloat16": partial(_residual_mlp, torch.bfloat16),
    "residual_mlp float32": partial(_residual_mlp, torch.float32),
}

# Of ops without Triton kernels; that of data workers, on NumPy arrays, has Pillow's form beside it.
CPU_CASES: dict[str, Callable[[Tensor, str], Case]] = {
    "batch_norm_relu bfloat16": partial(_batch_norm_relu, torch.bfloat16),
    "batch_norm_relu float32": partial(_batch_norm_relu, torch.float32),
    "crop_resize": _crop_resize,
}
