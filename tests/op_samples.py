"""Small inputs of every op, which its own tests and those of all ops together share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import simmim_kernels

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """A call of an op's public function.

    Attributes:
        function: the public function.
        arguments: all but the backend.
        gradients: names of those that have a gradient.
        backends: those that register an op.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    gradients: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("native", "triton")

    def leaves(self, wanted: set[str]) -> dict[str, Any]:
        """The arguments anew, with a gradient for those that are wanted."""
        return {
            name: value.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
            if name in wanted
            else value
            for name, value in self.arguments.items()
        }

    def run(self, leaves: dict[str, Any], backend: str) -> Tensor:
        """The result; of several outputs the first, which alone has a gradient."""
        out = self.function(**leaves, backend=backend)
        return out[0] if isinstance(out, tuple) else out


def wave(out: Tensor) -> Tensor:
    """A gradient of `out` without symmetries."""
    return torch.linspace(-1, 1.5, out.numel()).view(out.shape).sin().to(out.dtype)


def mlp_inputs(
    shape: tuple, option: str = "full", dtype: torch.dtype = torch.float32, offset: float = 1.0
) -> Inputs:
    """Tokens of an image, C and M; a branch without, with either or with both of its factors."""
    tokens, C, M = shape
    B = 1 if tokens == (1,) else 2
    inputs = {
        "x": torch.randn(B, *tokens, C) * 2 + offset,
        "norm_weight": torch.rand(C) + 0.5,
        "norm_bias": torch.randn(C),
        "fc1_weight": torch.randn(M, C) / C**0.5,
        "fc1_bias": torch.randn(M),
        "fc2_weight": torch.randn(C, M) / M**0.5,
        "fc2_bias": torch.randn(C),
        "gamma": torch.randn(C) * 0.1,
        "branch_scale": torch.tensor([1.25, 0.0])[:B],
    }
    return _with_factors(inputs, option, dtype)


def attention_inputs(
    shape: tuple, option: str = "full", dtype: torch.dtype = torch.float32
) -> tuple[Inputs, dict[str, Any]]:
    """B, (H, W), C, heads, window and shift; "plain" is without biases of qkv and positions too."""
    B, (H, W), C, num_heads, window, shift = shape
    pairs = window[0] * window[1]
    inputs = {
        "x": torch.randn(B, H, W, C) * 2 + 1,
        "norm_weight": torch.rand(C) + 0.5,
        "norm_bias": torch.randn(C),
        "qkv_weight": torch.randn(3 * C, C) / C**0.5,
        "qkv_bias": torch.randn(3 * C),
        "bias": torch.randn(num_heads, pairs, pairs),
        "proj_weight": torch.randn(C, C) / C**0.5,
        "proj_bias": torch.randn(C),
        "gamma": torch.randn(C) * 0.1,
        "branch_scale": torch.tensor([1.25, 0.0, 1.25])[:B],
    }
    inputs = _with_factors(inputs, option, dtype)
    if option == "plain":
        del inputs["qkv_bias"], inputs["bias"]
    return inputs, {"num_heads": num_heads, "window": window, "shift": shift}


def _with_factors(inputs: Inputs, option: str, dtype: torch.dtype) -> Inputs:
    if option in ("plain", "branch_scale"):
        del inputs["gamma"]
    if option in ("plain", "gamma"):
        del inputs["branch_scale"]
    return {name: t.to(dtype) for name, t in inputs.items()}


def merge_inputs(shape: tuple, dtype: torch.dtype, offset: float = 1.0) -> Inputs:
    """B, H, W, C and M."""
    B, H, W, C, M = shape
    inputs = {
        "x": torch.randn(B, H, W, C) * 2 + offset,
        "norm_weight": torch.rand(4 * C) + 0.5,
        "norm_bias": torch.randn(4 * C),
        "weight": torch.randn(M, 4 * C) / C**0.5,
    }
    return {name: t.to(dtype) for name, t in inputs.items()}


def embed_inputs(shape: tuple, parts: str, *, pixels: str = "float", hidden: float = 0.6) -> Inputs:
    """Batch, grid, side of a patch and D; parts are "plain", "norm" or "norm and position"."""
    B, (h, w), p, D = shape
    inputs = {
        "image": torch.randn(B, 3, h * p, w * p),
        "mask": torch.rand(B, h, w) < hidden,
        "weight": torch.randn(D, 3, p, p) / p,
        "bias": torch.randn(D) + 3,
        "mask_token": torch.randn(D),
    }
    if pixels == "bytes":
        inputs["image"] = torch.randint(0, 256, inputs["image"].shape, dtype=torch.uint8)
    if "norm" in parts:
        inputs |= {"norm_weight": torch.rand(D) + 0.5, "norm_bias": torch.randn(D)}
    if "position" in parts:
        inputs["pos_embed"] = torch.randn(h * w, D)
    return inputs


def batch_norm_inputs(shape: tuple, dtype: torch.dtype, added: bool, offset: float = 1.0) -> Inputs:
    """B, C and sides of the map, with or without a residual."""
    inputs = {
        "x": channels_last(torch.randn(shape) * 2 + offset),
        "weight": torch.rand(shape[1]) + 0.5,
        "bias": torch.randn(shape[1]),
    }
    if added:
        inputs["residual"] = channels_last(torch.randn(shape))
    return {name: t.to(dtype) for name, t in inputs.items()}


def channels_last(x: Tensor) -> Tensor:
    """The same values, those of a pixel side by side."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def head_inputs(shape: tuple, dtype: torch.dtype) -> dict[str, Any]:
    """Batch, grid of cells, channels, stride, grid of the mask and width."""
    B, (h, w), C, stride, grid, D = shape
    outputs = C * stride**2
    mask = torch.rand(B, *grid) < 0.6
    mask[0, 0, 0] = True
    return {
        "features": torch.randn(B, h, w, D).to(dtype),
        "weight": (torch.randn(outputs, D) / D**0.5).to(dtype),
        "bias": torch.randn(outputs).to(dtype),
        "image": torch.randn(B, C, h * stride, w * stride),
        "mask": mask,
        "stride": stride,
    }


def _substitution(position: bool) -> Sample:
    arguments = {
        "tokens": torch.randn(2, 9, 5),
        "mask": torch.rand(2, 9) < 0.6,
        "mask_token": torch.randn(5),
    }
    if position:
        arguments["pos_embed"] = torch.randn(9, 5)
    names = ("tokens", "mask_token", "pos_embed")[: 2 + position]
    return Sample(simmim_kernels.substitute_mask_tokens, arguments, names)


def _attention(biased: bool, cosine: bool) -> Sample:
    arguments = {
        "qkv": torch.randn(1, 2, 4, 3 * 16),
        "bias": torch.randn(1, 4, 4) if biased else None,
        **({"logit_scale": torch.rand(1)} if cosine else {"scale": 0.25}),
        "num_heads": 1,
        "window": (2, 2),
        "shift": (0, 1),
    }
    names = tuple(n for n in ("qkv", "bias", "logit_scale") if arguments.get(n) is not None)
    return Sample(simmim_kernels.window_attention, arguments, names)


def _residual_mlp(option: str) -> Sample:
    return _branch(simmim_kernels.residual_mlp, mlp_inputs(((3,), 8, 12), option))


def _post_norm_mlp(option: str) -> Sample:
    inputs = mlp_inputs(((3,), 8, 12), "branch_scale" if option == "full" else option)
    return _branch(simmim_kernels.post_norm_mlp, inputs)


def _residual_attention(option: str) -> Sample:
    inputs, settings = attention_inputs((2, (2, 3), 4, 1, (2, 3), (1, 1)), option)
    absent = {"qkv_bias": None, "bias": None}
    return _branch(simmim_kernels.residual_attention, absent | inputs, settings)


def _post_norm_attention(option: str) -> Sample:
    part = "branch_scale" if option == "full" else option
    inputs, settings = attention_inputs((2, (2, 3), 4, 1, (2, 3), (1, 1)), part)
    absent = {"qkv_bias": None, "bias": None, "logit_scale": torch.ones(1)}
    return _branch(simmim_kernels.post_norm_attention, absent | inputs, settings)


def _branch(
    function: Callable[..., Tensor], inputs: dict[str, Any], settings: dict[str, Any] | None = None
) -> Sample:
    names = tuple(n for n, t in inputs.items() if t is not None and n != "branch_scale")
    first = sorted(names, key=lambda name: name != "x")
    return Sample(function, inputs | (settings or {}), tuple(first))


def _merge() -> Sample:
    inputs = merge_inputs((1, 4, 2, 3, 5), torch.float32)
    inputs["x"] = inputs["x"].bfloat16()
    inputs["weight"] = inputs["weight"].bfloat16()
    return Sample(simmim_kernels.merge_patches, dict(inputs), tuple(inputs))


def _loss_of_image() -> Sample:
    arguments = {
        "prediction": torch.randn(2, 3, 8, 16),
        "image": torch.randint(0, 256, (2, 3, 8, 16), dtype=torch.uint8),
        "mask": torch.rand(2, 2, 4) < 0.6,
        "patch_size": 4,
        "mean": MEAN,
        "std": STD,
    }
    return Sample(simmim_kernels.masked_l1_loss, arguments, ("prediction",))


def _loss_of_tokens() -> Sample:
    arguments = {
        "prediction": torch.randn(2, 1, 2, 192).bfloat16(),
        "image": torch.randn(2, 3, 8, 16),
        "mask": torch.rand(2, 2, 4) < 0.6,
        "stride": 8,
    }
    return Sample(simmim_kernels.masked_l1_loss_from_tokens, arguments, ("prediction",))


def _head(biased: bool) -> Sample:
    arguments = head_inputs((2, (1, 2), 3, 8, (1, 2), 6), torch.float32)
    if not biased:
        arguments["bias"] = None
    names = ("features", "weight", "bias")[: 2 + biased]
    return Sample(simmim_kernels.linear_masked_l1_loss, arguments, names)


def _embedding(parts: str) -> Sample:
    inputs = embed_inputs((2, (4, 6), 4, 8), parts, pixels="bytes")
    names = tuple(name for name in inputs if name not in ("image", "mask"))
    arguments = {**inputs, "mean": MEAN, "std": STD}
    return Sample(simmim_kernels.embed_patches, arguments, names, ("native",))


def _batch_norm(added: bool) -> Sample:
    inputs = batch_norm_inputs((2, 5, 3, 2), torch.float32, added)
    return Sample(simmim_kernels.batch_norm_relu, dict(inputs), tuple(inputs), ("native",))


def _random_mask() -> Sample:
    arguments = {"batch": 3, "grid": (4, 6), "ratio": 0.5, "unit": 2, "seed": 5}
    return Sample(simmim_kernels.random_patch_mask, arguments)


def _random_scales() -> Sample:
    ids = torch.arange(3)
    arguments = {"rate": 0.5, "branches": 2, "seed": 5, "ids": ids, "epochs": ids + 1}
    return Sample(simmim_kernels.random_branch_scales, arguments, (), ("triton-interpreted",))


# What makes the samples of an op, the one with most arguments first.
SAMPLES: dict[str, list[Callable[[], Sample]]] = {
    "batch_norm_relu": [partial(_batch_norm, True), partial(_batch_norm, False)],
    "embed_patches": [
        partial(_embedding, parts) for parts in ("norm and position", "norm", "plain")
    ],
    "linear_masked_l1_loss": [partial(_head, True), partial(_head, False)],
    "masked_l1_loss": [_loss_of_image, _loss_of_tokens],
    "merge_patches": [_merge],
    "post_norm_attention": [partial(_post_norm_attention, o) for o in ("full", "plain")],
    "post_norm_mlp": [partial(_post_norm_mlp, o) for o in ("full", "plain")],
    "random_branch_scales": [_random_scales],
    "random_patch_mask": [_random_mask],
    "residual_attention": [partial(_residual_attention, o) for o in ("full", "plain")],
    "residual_mlp": [partial(_residual_mlp, o) for o in ("full", "plain")],
    "substitute_mask_tokens": [partial(_substitution, True), partial(_substitution, False)],
    "window_attention": [
        partial(_attention, *which)
        for which in ((True, True), (True, False), (False, True), (False, False))
    ],
}
