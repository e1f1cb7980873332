"""The layout of microsoft/SimMIM checkpoints: pre-trained, which is also ours, and fine-tuned.

Architecture is inferred from names and shapes. Buffers that the published code saves
(`relative_position_index`, `attn_mask`) are dropped: they follow from the architecture. A
fine-tuned checkpoint has no prefix (`layers.0…`, `head.weight`) where ours say `encoder.layers.0…`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from simmim.backbone.build import Spec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec

State = dict[str, Tensor]

# Under our names; hints for `infer_spec`; metadata of the model.
Converted = tuple[State, dict[str, Any], dict[str, Any]]

BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")
PREFIX = "encoder."

# Parts of a model that stand beside its encoder.
HEADS = ("head.", "fc_norm.", "decoder.")


def kind_of(state: Mapping[str, Any]) -> str:
    """What model the names, ours, belong to: "simmim", "classifier" or "encoder"."""
    if "decoder.0.weight" in state:
        return "simmim"
    return "classifier" if "head.weight" in state else "encoder"


def matches(state: State) -> bool:
    """Whether the names are those of an official pre-training checkpoint, or of ours."""
    return f"{PREFIX}patch_embed.proj.weight" in state


def matches_finetuned(state: State) -> bool:
    """Whether the names are those of an official fine-tuned checkpoint."""
    if "patch_embed.proj.weight" not in state or any(name.startswith("decoder.") for name in state):
        return False
    if "blocks.0.attn.qkv.weight" in state:  # a plain ViT of timm has others for these
        return "blocks.0.attn.qkv.bias" not in state and "blocks.0.ls1.gamma" not in state
    if "layers.0.blocks.0.attn.qkv.weight" not in state or "head.fc.weight" in state:
        return False
    merged = any(re.match(r"layers\.\d+\.downsample\.", name) for name in state)
    return "layers.0.downsample.reduction.weight" in state or not merged


def to_ours(state: State, config: dict[str, Any]) -> Converted:
    """Our names, which are those of an official pre-training checkpoint."""
    return parameters(state), buffer_hints(state), {}


def from_finetuned(state: State, config: dict[str, Any]) -> Converted:
    """Our names for those of an official fine-tuned checkpoint, or of timm's BEiT."""
    named = {
        name if name.startswith(HEADS) else PREFIX + name: tensor
        for name, tensor in parameters(state).items()
    }
    hints, metadata = told(config)
    hints = buffer_hints(state) | {key: value for key, value in hints.items() if value is not None}
    if "blocks.0.attn.qkv.weight" in state:
        return without_class_token_head(named, config, metadata, hints)
    return named, hints, metadata


def without_class_token_head(
    state: State, config: dict[str, Any], metadata: dict[str, Any], hints: dict[str, Any]
) -> Converted:
    """A ViT without its head, where that reads the class token, as ours never does.

    Args:
        state: under our names.
        config: of timm; {} for none. It tells what a norm of the tokens does not: how they are
            pooled.
        metadata: to be extended by "dropped", the names left out.
        hints: passed on.
    """
    pooled = config.get("global_pool") or config.get("model_args", {}).get("global_pool")
    if "fc_norm.weight" in state or pooled == "avg":
        return state, hints, metadata
    dropped = [name for name in state if name.startswith(HEADS)]
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    return kept, hints, metadata | ({"dropped": dropped} if dropped else {})


def told(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hints and metadata from timm's configuration; ({}, {}) for none."""
    arguments, pretrained = config.get("model_args", {}), config.get("pretrained_cfg", {})
    size = arguments.get("img_size") or pretrained.get("input_size", [])[1:]
    hints: dict[str, Any] = {
        "image_size": (size, size) if isinstance(size, int) else tuple(size) or None,
        "num_heads": arguments.get("num_heads"),
        "window_size": arguments.get("window_size"),
        "pretrained_window_sizes": arguments.get("pretrained_window_sizes"),
    }
    if not isinstance(hints["num_heads"], int):
        del hints["num_heads"]  # of a Swin, whose tables tell
    metadata = {key: pretrained[key] for key in ("mean", "std") if key in pretrained}
    return hints, metadata


def buffer_hints(state: State) -> dict[str, Any]:
    """The image size that saved buffers of a Swin tell: masks of shifted windows cover all tokens.

    Args:
        state: under the official names, with or without prefix.
    """
    for name, mask in state.items():
        match = re.fullmatch(r"(encoder\.)?layers\.(\d+)\.blocks\.\d+\.attn_mask", name)
        projection = match and state.get(f"{match[1] or ''}patch_embed.proj.weight")
        if match is None or projection is None or mask.dim() != 3:
            continue
        tokens = mask.shape[0] * mask.shape[1]  # of windows [n, area, area]
        side = math.isqrt(tokens) * (projection.shape[-1] << int(match[2]))
        if math.isqrt(tokens) ** 2 == tokens:
            return {"image_size": (side, side)}
    return {}


def to_finetuned(state: State, spec: Spec) -> State:
    """The official names for ours.

    Raises:
        ValueError: the official ViT would read this head from the class token.
    """
    if isinstance(spec, ViTSpec) and spec.final_norm:
        raise ValueError(
            "the official ViT classifies by the norm of the mean, or by the class token; this one "
            "by the mean of normalised tokens"
        )
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def parameters(state: State) -> State:
    """The parameters of the model, without saved buffers and the unused head of mean pooling."""
    return {
        name.replace(".rpe_mlp.", ".cpb_mlp."): tensor  # as the first SwinV2 checkpoints say
        for name, tensor in state.items()
        if not name.endswith(BUFFERS) and not name.startswith(f"{PREFIX}fc_norm.")
    }


def window_hints(state: State) -> dict[str, Any]:
    """What saved buffers of a SwinV2 tell, whose parameters are the same for any window.

    Args:
        state: under official names or Hugging Face's.

    Returns:
        "windows" of every stage, and "pretrained_window_sizes": the offsets of a window of w
        tokens reach 8 (w - 1) / (p - 1) before their logarithm, p the window of pre-training.
    """
    windows: dict[int, int] = {}
    pretrained: dict[int, int] = {}
    for name, tensor in state.items():
        match = re.search(r"layers\.(\d+)\.blocks\.\d+\..*(position_index|coords_table)$", name)
        if match is None:
            continue
        stage = int(match[1])
        if match[2] == "position_index":
            windows[stage] = math.isqrt(len(tensor))
            continue
        window = windows[stage] = (tensor.shape[1] + 1) // 2
        reach = 8 ** float(tensor.max()) - 1
        before = round(8 * (window - 1) / reach) + 1 if reach > 0 else window
        pretrained[stage] = 0 if before == window else before
    hints: dict[str, Any] = {}
    for key, found in (("windows", windows), ("pretrained_window_sizes", pretrained)):
        if found and sorted(found) == list(range(len(found))):
            hints[key] = tuple(found[stage] for stage in range(len(found)))
    return hints


def infer_spec(
    state: State,
    image_size: tuple[int, int] | None,
    *,
    num_heads: int | None = None,
    qk_scale: float | None = None,
    norm_eps: float | None = None,
    window_size: int | None = None,
    windows: tuple[int, ...] | None = None,
    pretrained_window_sizes: tuple[int, ...] | None = None,
    pads_small_maps: bool = False,
) -> Spec:
    """The architecture of a checkpoint under our names.

    Args:
        state: names and tensors of the whole model.
        image_size: (height, width) in pixels; None takes what the checkpoint tells.
        num_heads: heads of a ViT without any position table (shapes cannot tell); None takes one
            head per 64 channels.
        qk_scale: factor of q·k, which shapes cannot tell; None is 1/√(head width).
        norm_eps: of a ViT's norms, which shapes cannot tell; None is the published one.
        window_size: of a SwinV2, which shapes cannot tell.
        windows: of a SwinV2 in every stage, shrunk where a stage is smaller; stands above
            `window_size`.
        pretrained_window_sizes: of a SwinV2, which shapes cannot tell; None has none.
        pads_small_maps: whether the file may be of a Swin that pads feature maps smaller than its
            window, as mmpretrain's may: no encoder here computes the same.

    Raises:
        ValueError: a part of the architecture cannot be told, or contradicts `image_size`.
    """
    encoder = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    if "layers.0.blocks.0.attn.logit_scale" in encoder:
        before = tuple(pretrained_window_sizes or ())
        return _infer_swinv2(encoder, image_size, window_size, windows, before)
    if "layers.0.blocks.0.attn.qkv.weight" in encoder:
        if pads_small_maps:
            _refuse_padding(encoder, image_size)
        return replace(_infer_swin(encoder, image_size), qk_scale=qk_scale)
    if "blocks.0.attn.qkv.weight" in encoder:
        vit = replace(_infer_vit(encoder, image_size, num_heads), qk_scale=qk_scale)
        return vit if norm_eps is None else replace(vit, norm_eps=norm_eps)
    raise ValueError("the encoder is neither a Swin nor a ViT of the published layout")


def _count(encoder: State, pattern: str) -> int:
    found = [re.match(pattern, name) for name in encoder]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _side(area: int, what: str) -> int:
    side = math.isqrt(area)
    if side * side != area:
        raise ValueError(f"{what} ({area}) is not a square: say image_size=(height, width)")
    return side


def _infer_swin(encoder: State, image_size: tuple[int, int] | None) -> SwinSpec:
    tables = [
        encoder[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"].shape
        for stage in range(_count(encoder, r"layers\.(\d+)\."))
    ]
    windows = [(_side(rows, "the rows of a position table") + 1) // 2 for rows, _ in tables]
    spec = SwinSpec(
        **_swin_fields(encoder, image_size, windows),
        num_heads=tuple(heads for _, heads in tables),
        window_size=max(windows),
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in encoder,
    )
    _check_windows(spec, windows)
    return spec


def _infer_swinv2(
    encoder: State,
    image_size: tuple[int, int] | None,
    window_size: int | None,
    windows: tuple[int, ...] | None,
    pretrained_window_sizes: tuple[int, ...],
) -> SwinV2Spec:
    stages = range(_count(encoder, r"layers\.(\d+)\."))
    if windows is None or len(windows) != len(stages):
        if window_size is None:
            raise ValueError("shapes cannot tell the window of this SwinV2: say window_size=")
        windows = (window_size,) * len(stages)
    return SwinV2Spec(
        **_swin_fields(encoder, image_size, list(windows)),
        num_heads=tuple(len(encoder[f"layers.{i}.blocks.0.attn.logit_scale"]) for i in stages),
        window_size=max(windows),
        qkv_bias="layers.0.blocks.0.attn.q_bias" in encoder,
        pretrained_window_sizes=pretrained_window_sizes,
    )


def _swin_fields(
    encoder: State, image_size: tuple[int, int] | None, windows: list[int]
) -> dict[str, Any]:
    width, channels, patch_size, _ = encoder["patch_embed.proj.weight"].shape
    depths = tuple(
        _count(encoder, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(len(windows))
    )
    if image_size is None:
        side = _swin_image_side(encoder, windows, patch_size, patch_size << (len(depths) - 1))
        image_size = (side, side)
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "channels": channels,
        "embed_dim": width,
        "depths": depths,
        "mlp_ratio": encoder["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
        "absolute_position": "absolute_pos_embed" in encoder,
        "patch_norm": "patch_embed.norm.weight" in encoder,
    }


def _check_windows(spec: SwinSpec, windows: list[int]) -> None:
    if any(side % spec.stride for side in spec.image_size):
        return  # building it says what does not fit
    expected = [spec.window(stage) for stage in range(len(spec.depths))]
    if expected != windows:
        raise ValueError(
            f"the position tables are for windows {windows}, but images of "
            f"{spec.image_size[0]}×{spec.image_size[1]} px need {expected}: say another image_size"
        )


def _refuse_padding(encoder: State, image_size: tuple[int, int] | None) -> None:
    tables = [v for k, v in encoder.items() if k.endswith("relative_position_bias_table")]
    window = max((math.isqrt(len(table)) + 1) // 2 for table in tables)
    last = _count(encoder, r"layers\.(\d+)\.") - 1
    stride = encoder["patch_embed.proj.weight"].shape[-1] << last
    # windows of 6 and 7 tokens are those of models whose last stage is one window
    told = image_size is not None or "absolute_pos_embed" in encoder
    if (window > 7 and not told) or (image_size is not None and min(image_size) < window * stride):
        raise ValueError(
            f"windows of {window} tokens are padded where a feature map is smaller (images below "
            f"{window * stride} px), which no encoder here computes; if this one was trained on "
            f"larger images, say image_size="
        )


def _swin_image_side(encoder: State, windows: list[int], patch_size: int, stride: int) -> int:
    if "absolute_pos_embed" in encoder:
        tokens = encoder["absolute_pos_embed"].shape[1]
        return _side(tokens, "the number of absolute positions") * patch_size
    # the last stage of every published model is one window, clamped or not
    return windows[-1] * stride


def _infer_vit(
    encoder: State, image_size: tuple[int, int] | None, num_heads: int | None
) -> ViTSpec:
    width, channels, patch_size, _ = encoder["patch_embed.proj.weight"].shape
    shared = encoder.get("rel_pos_bias.relative_position_bias_table")
    own = encoder.get("blocks.0.attn.relative_position_bias_table")
    position = encoder.get("pos_embed")
    table = shared if shared is not None else own
    if table is not None:
        num_heads = table.shape[1]
    elif num_heads is None:
        if width % 64:
            raise ValueError(f"shapes cannot tell the heads of a {width} wide ViT: say num_heads=")
        num_heads = width // 64
    if image_size is None:
        if position is not None:
            patches = position.shape[1] - int("cls_token" in encoder)
            side = _side(patches, "the number of patch positions")
        elif table is not None:
            side = (_side(table.shape[0] - 3, "the rows of the position table") + 1) // 2
        else:
            raise ValueError("shapes cannot tell the image size of this ViT: say image_size=")
        image_size = (side * patch_size, side * patch_size)
    return ViTSpec(
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        embed_dim=width,
        depth=_count(encoder, r"blocks\.(\d+)\."),
        num_heads=num_heads,
        class_token="cls_token" in encoder,
        mlp_ratio=encoder["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.q_bias" in encoder,
        absolute_position=position is not None,
        shared_relative_position=shared is not None,
        layer_relative_position=own is not None,
        layer_scale=0.1 if "blocks.0.gamma_1" in encoder else None,
        final_norm="norm.weight" in encoder,
    )
