"""What the ops refuse, and that the error says what is wrong and prints the shapes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import zeros

import simmim_kernels
from op_samples import (
    MEAN,
    STD,
    attention_inputs,
    batch_norm_inputs,
    embed_inputs,
    merge_inputs,
    mlp_inputs,
)

Arguments = dict[str, Any]
# Some arguments in place of others, or what makes them of those; and what the error says.
Refusal = tuple[Arguments | Callable[[Arguments], Arguments], str]


def loss_of_image() -> Arguments:
    image, mask = zeros(1, 3, 8, 8), zeros(1, 2, 2, dtype=torch.bool)
    return {"prediction": zeros(1, 3, 8, 8), "image": image, "mask": mask, "patch_size": 4}


def loss_of_tokens() -> Arguments:
    image, mask = zeros(1, 3, 8, 8), zeros(1, 2, 2, dtype=torch.bool)
    return {"prediction": zeros(1, 2, 2, 48), "image": image, "mask": mask, "stride": 4}


def head() -> Arguments:
    arguments = loss_of_tokens()
    del arguments["prediction"]
    linear = {"features": zeros(1, 2, 2, 5), "weight": zeros(48, 5), "bias": zeros(48)}
    return linear | arguments


def residual_attention(option: str = "full") -> Arguments:
    inputs, settings = attention_inputs((2, (4, 3), 8, 2, (2, 3), (1, 1)), option)
    return inputs | settings


def post_norm_attention() -> Arguments:
    return residual_attention("branch_scale") | {"logit_scale": zeros(2)}


def substitution() -> Arguments:
    mask = zeros(2, 9, dtype=torch.bool)
    return {"tokens": zeros(2, 9, 5), "mask": mask, "mask_token": zeros(5)}


def window_attention() -> Arguments:
    inputs = {"qkv": zeros(1, 4, 4, 48).bfloat16(), "bias": zeros(2, 4, 4)}
    return inputs | {"num_heads": 2, "window": 2, "shift": 1}


# Of every public function arguments that are right, and what is wrong beside them.
REFUSED: dict[str, tuple[Callable[[], Arguments], list[Refusal]]] = {
    "batch_norm_relu": (
        partial(batch_norm_inputs, (3, 20, 4, 5), torch.float32, True),
        [
            ({"x": zeros(20)}, r"x \(20,\)"),
            ({"x": zeros(0, 20, 4, 5)}, r"with values: x \(0, 20, 4, 5\)"),
            ({"x": zeros(3, 19, 4, 5)}, r"weight \[C\].*x \(3, 19, 4, 5\).*weight \(20,\)"),
            ({"weight": zeros(20, 1)}, r"weight \(20, 1\)"),
            ({"bias": zeros(1)}, r"bias \(1,\)"),
            ({"x": zeros(3, 20, 4, 5).long()}, "floating point"),
            ({"residual": zeros(3, 20, 5, 4)}, r"a residual like x.*residual \(3, 20, 5, 4\)"),
            ({"residual": zeros(3, 20, 4, 5).bfloat16()}, "a residual like x"),
            ({"bias": zeros(20).bfloat16()}, "of x's dtype or float32"),
            ({"weight": zeros(20, device="meta")}, "of one device"),
            ({"backend": "triton"}, "it has native, reference"),
        ],
    ),
    "embed_patches": (
        partial(embed_inputs, (2, (4, 6), 4, 48), "plain"),
        [
            (lambda i: {"weight": i["weight"][:, :2]}, r"weight \[D, C, p, p\]"),
            (lambda i: {"weight": i["weight"][..., :3]}, "square"),
            (lambda i: {"image": i["image"][..., :-1]}, "fill the image"),
            (lambda i: {"bias": i["bias"][1:]}, r"must be \[D\]"),
            (lambda i: {"norm_bias": i["bias"]}, "come together"),
            (lambda i: {"pos_embed": i["bias"]}, r"pos_embed \[L, D\]"),
            (lambda i: {"mask": i["mask"].flatten(1)}, r"mask \[B, h, w\]"),
            (lambda i: {"mask": i["mask"].int()}, "bool mask"),
            (lambda i: {"mask_token": None}, "needs a mask_token"),
            (lambda i: {"image": i["image"].to(torch.uint8)}, "uint8 with mean and std"),
            (lambda i: {"mean": MEAN, "std": STD}, "go with a uint8 image"),
            (
                lambda i: {"image": i["image"].to(torch.uint8), "mean": MEAN[:2], "std": STD},
                "one value per channel",
            ),
        ],
    ),
    "linear_masked_l1_loss": (
        head,
        [
            ({"features": zeros(1, 5, 4)}, r"features \(1, 5, 4\)"),
            ({"weight": zeros(48, 6)}, r"weight \(48, 6\)"),
            ({"bias": zeros(47)}, r"bias \(47,\)"),
            ({"stride": 3}, "image must be .*stride 3"),
            ({"weight": zeros(48, 5, dtype=torch.bfloat16)}, "of their dtype or float32"),
            ({"mask": zeros(1, 3, 2, dtype=torch.bool)}, "divide the image"),
            ({"backend": "fast"}, "it has triton, native, reference"),
        ],
    ),
    "masked_l1_loss": (
        loss_of_image,
        [
            ({"image": zeros(1, 3, 8, 4)}, r"image \(1, 3, 8, 4\)"),
            ({"mask": zeros(1, 2, 1, dtype=torch.bool)}, r"mask \(1, 2, 1\)"),
            ({"patch_size": 3}, "patch_size must divide"),
            ({"image": zeros(1, 3, 8, 8, dtype=torch.uint8)}, "uint8 with mean and std"),
            ({"norm_target": 4}, "must be odd"),
            ({"backend": "fast"}, "it has triton, native, reference"),
            ({"mean": MEAN, "std": STD}, "go with a uint8 image"),
            ({"image": zeros(1, 3, 8, 8, dtype=torch.int64)}, "uint8 with mean and std"),
            ({"prediction": zeros(1, 3, 8, 8, dtype=torch.int64)}, "must be floating point"),
            ({"mask": zeros(1, 2, 2)}, "mask must be bool"),
            ({"mask": zeros(1, 2, 2, dtype=torch.bool, device="meta")}, "one device"),
        ],
    ),
    "masked_l1_loss_from_tokens": (
        loss_of_tokens,
        [
            ({"stride": 3}, r"image must be .*stride 3"),
            ({"prediction": zeros(1, 2, 2, 47)}, r"prediction \(1, 2, 2, 47\)"),
            ({"mask": zeros(1, 3, 2, dtype=torch.bool)}, "divide the image"),
            ({"mask": zeros(2, 2, 2, dtype=torch.bool)}, r"mask \(2, 2, 2\)"),
            ({"mean": MEAN[:2], "std": STD[:2], "image": zeros(1, 3, 8, 8).byte()}, "one value"),
        ],
    ),
    "merge_patches": (
        partial(merge_inputs, (2, 4, 6, 24, 40), torch.float32),
        [
            ({"x": zeros(4, 6, 24)}, r"x \(4, 6, 24\)"),
            ({"x": zeros(2, 3, 6, 24)}, r"H and W even: x \(2, 3, 6, 24\)"),
            ({"x": zeros(2, 4, 5, 24)}, r"H and W even: x \(2, 4, 5, 24\)"),
            ({"x": zeros(2, 4, 6, 23)}, r"weight \[M, 4C\]: x \(2, 4, 6, 23\).*weight \(40, 96\)"),
            ({"weight": zeros(96, 40)}, r"weight \(96, 40\)"),
            ({"weight": zeros(96)}, r"weight \(96,\)"),
            ({"norm_weight": zeros(24)}, r"norm_weight \(24,\)"),
            ({"norm_bias": zeros(1)}, r"norm_bias \(1,\)"),
            ({"x": zeros(2, 4, 6, 24).long()}, "floating point"),
            ({"norm_bias": zeros(96).bfloat16()}, "of their dtype or float32"),
            ({"weight": zeros(40, 96, device="meta")}, "on the activations' device"),
            ({"backend": "fast"}, "it has triton, native, reference"),
        ],
    ),
    "post_norm_attention": (
        post_norm_attention,
        [
            ({"x": zeros(4, 3, 8)}, r"expected x \[B, H, W, C\].*x \(4, 3, 8\)"),
            ({"num_heads": 3}, "num_heads dividing C.*num_heads 3"),
            ({"window": 3}, r"must divide the feature map.*window \(3, 3\)"),
            ({"qkv_weight": zeros(8, 8)}, r"expected qkv_weight \[3C, C\].*\(8, 8\)"),
            ({"qkv_bias": zeros(8)}, r"expected qkv_bias \[3C\]"),
            ({"logit_scale": zeros(2, 1, 1)}, r"expected logit_scale \[N\].*\(2, 1, 1\)"),
            ({"norm_weight": zeros(7)}, r"norm_weight and norm_bias must be \[C\]"),
            ({"branch_scale": zeros(3)}, r"expected branch_scale \[B\]"),
            ({"bias": zeros(2, 4, 4)}, r"expected a bias of.*bias \(2, 4, 4\)"),
            ({"proj_bias": zeros(8).half()}, "of their dtype or float32"),
            ({"backend": "fast"}, "it has triton, native, reference"),
        ],
    ),
    "post_norm_mlp": (
        partial(mlp_inputs, ((7,), 100, 52), "branch_scale"),
        [
            ({"x": zeros(100)}, r"expected x \[B, …, C\]"),
            ({"fc1_bias": zeros(3)}, r"expected fc1_weight \[M, C\], fc1_bias \[M\]"),
            ({"fc2_bias": zeros(3)}, r"must be \[C\].*fc2_bias \(3,\)"),
            ({"branch_scale": zeros(3)}, r"expected branch_scale \[B\]"),
            ({"x": zeros(2, 7, 100, dtype=torch.int32)}, "expected floating point"),
        ],
    ),
    "random_branch_scales": (
        partial(
            dict,
            rate=0.5,
            branches=2,
            seed=0,
            ids=zeros(3, dtype=torch.int64),
            epochs=zeros(3, dtype=torch.int64),
        ),
        [
            ({"rate": 1.0}, "rate=1.0 is outside"),
            ({"rate": -0.1}, "rate=-0.1 is outside"),
            ({"branches": 17}, r"1 to 16 branches: .*branches 17"),
            ({"epochs": zeros(2, dtype=torch.int64)}, r"epochs \(2,\)"),
            ({"ids": zeros(3)}, "expected integers"),
        ],
    ),
    "random_patch_mask": (
        partial(dict, batch=2, seed=0),
        [
            ({"grid": (6, 6), "unit": 4}, "unit=4 does not divide the token grid 6×6"),
            ({"grid": (6, 6), "ratio": 1.1}, "ratio=1.1 is outside"),
            ({"grid": (6, 6), "ids": [1, 2, 3]}, r"ids \(3,\)"),
            ({"grid": (6, 6), "epoch": zeros(3, dtype=torch.int64)}, "must be"),
        ],
    ),
    "residual_attention": (
        residual_attention,
        [
            ({"x": zeros(2, 12, 8)}, r"x \(2, 12, 8\)"),
            ({"num_heads": 3}, "num_heads dividing C: .*num_heads 3"),
            ({"window": (3, 3)}, r"divide the feature map.*window \(3, 3\)"),
            ({"shift": (0, 3)}, "below the window"),
            ({"qkv_weight": zeros(8, 24)}, r"qkv_weight \(8, 24\)"),
            ({"proj_weight": zeros(8, 9)}, r"proj_weight \(8, 9\)"),
            ({"qkv_bias": zeros(8)}, r"qkv_bias \(8,\)"),
            ({"bias": zeros(2, 5, 6)}, r"bias \(2, 5, 6\)"),
            ({"proj_bias": zeros(9)}, r"proj_bias \(9,\)"),
            ({"gamma": zeros(9)}, r"gamma \(9,\)"),
            ({"branch_scale": zeros(24)}, r"expected branch_scale \[B\]"),
            ({"backend": "fast"}, "it has triton, native, reference"),
        ],
    ),
    "residual_mlp": (
        partial(mlp_inputs, ((3,), 8, 12), "plain"),
        [
            ({"x": zeros(8)}, r"x \(8,\)"),
            ({"fc1_weight": zeros(12, 7)}, r"fc1_weight \(12, 7\)"),
            ({"fc2_weight": zeros(12, 8)}, r"fc2_weight \[C, M\]: .*fc2_weight \(12, 8\)"),
            ({"fc1_bias": zeros(8)}, r"fc1_bias \(8,\)"),
            ({"fc2_bias": zeros(12)}, r"fc2_bias \(12,\)"),
            ({"norm_weight": zeros(7)}, r"norm_weight \(7,\)"),
            ({"gamma": zeros(1)}, r"gamma \(1,\)"),
            ({"branch_scale": zeros(3)}, r"expected branch_scale \[B\]"),
            ({"x": zeros(2, 3, 8).long()}, "floating point"),
            ({"fc1_bias": zeros(12).bfloat16()}, "of their dtype or float32"),
            ({"fc1_bias": zeros(12, device="meta")}, "on the activations' device"),
            ({"backend": "fast"}, "it has triton, native, reference"),
        ],
    ),
    "substitute_mask_tokens": (
        substitution,
        [
            ({"mask": zeros(2, 8, dtype=torch.bool)}, r"mask \(2, 8\)"),
            ({"mask": zeros(2, 9, dtype=torch.int64)}, "bool mask"),
            ({"mask_token": zeros(4)}, r"mask_token \(4,\)"),
            ({"tokens": zeros(2, 9)}, r"tokens \(2, 9\)"),
            ({"pos_embed": zeros(8, 5)}, r"pos_embed \(8, 5\)"),
            ({"mask": zeros(2, 9, dtype=torch.bool, device="meta")}, "one device"),
        ],
    ),
    "window_attention": (
        window_attention,
        [
            ({"qkv": zeros(4, 4, 48)}, r"expected qkv \[B, H, W, 3C\].*qkv \(4, 4, 48\)"),
            ({"num_heads": 3}, "num_heads dividing C.*num_heads 3"),
            ({"num_heads": 0}, "num_heads dividing C"),
            ({"window": 3}, r"must divide the feature map.*window \(3, 3\)"),
            ({"window": (2, 0)}, r"must divide.*window \(2, 0\)"),
            ({"shift": 2}, r"shift must be below.*shift \(2, 2\)"),
            ({"shift": (0, -1)}, r"shift must be below.*shift \(0, -1\)"),
            ({"bias": zeros(9, 1)}, r"expected a bias of.*bias \(9, 1\)"),
            ({"bias": zeros(2, 4, 3)}, r"expected a bias of.*bias \(2, 4, 3\)"),
            ({"bias": zeros(2, 4, 4).half()}, "must be float32 or of the dtype of qkv"),
            ({"qkv": zeros(1, 4, 4, 48, dtype=torch.int32)}, "floating point"),
            ({"logit_scale": zeros(1)}, r"expected logit_scale \[N\].*logit_scale \(1,\)"),
            ({"logit_scale": zeros(2).half()}, "logit_scale must be float32 or of the dtype"),
            ({"logit_scale": zeros(2), "scale": 1.0}, "scale and logit_scale exclude"),
            ({"backend": "fast"}, "it has triton, native, reference"),
        ],
    ),
}


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (op, change, message)
        for op, (_, refusals) in REFUSED.items()
        for change, message in refusals
    ],
)
def test_wrong_arguments(op: str, change: Any, message: str) -> None:
    arguments = REFUSED[op][0]()
    changes = change(arguments) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        getattr(simmim_kernels, op)(**arguments | changes)
