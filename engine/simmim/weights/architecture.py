"""The architecture of an encoder, as names and shapes of its weights tell it."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simmim.backbone.build import Spec
from simmim.backbone.convnet import ConvNetSpec
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec
from simmim.weights.our_names import PREFIX, State, count_numbers

# A name that every ResNet has, one that every ConvNeXt has, and how all names of an encoder that is
# a model of timm begin, all three behind our prefix.
RESNET_NAME = "layer1.0.conv1.weight"
CONVNEXT_NAME = "stages.0.blocks.0.conv_dw.weight"
TIMM_PREFIX = "model."

# For a ConvNet without a configuration; any size that its stride divides would do.
_CONVNET_IMAGE_SIZE = (224, 224)


def is_convnet(state: Mapping[str, Any]) -> bool:
    """Whether names, ours, are those of a convolutional encoder."""
    known = PREFIX + RESNET_NAME in state or PREFIX + CONVNEXT_NAME in state
    return known or any(name.startswith(f"{PREFIX}{TIMM_PREFIX}") for name in state)


def buffer_hints(state: State) -> dict[str, Any]:
    """The image size that saved masks of a Swin's shifted windows tell, as they cover all tokens.

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
    for key, by_stage in (("windows", windows), ("pretrained_window_sizes", pretrained)):
        if by_stage and sorted(by_stage) == list(range(len(by_stage))):
            hints[key] = tuple(by_stage[stage] for stage in range(len(by_stage)))
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
        image_size: (height, width) in pixels; None takes what the checkpoint tells (224 × 224 for a
            ConvNet, whose shapes tell nothing).
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
    if is_convnet(state):
        return _infer_convnet(encoder, image_size or _CONVNET_IMAGE_SIZE)
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


def _side(area: int, what: str) -> int:
    side = math.isqrt(area)
    if side * side != area:
        raise ValueError(f"{what} ({area}) is not a square: say image_size=(height, width)")
    return side


def _infer_swin(encoder: State, image_size: tuple[int, int] | None) -> SwinSpec:
    tables = [
        encoder[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"].shape
        for stage in range(count_numbers(encoder, r"layers\.(\d+)\."))
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
    stages = range(count_numbers(encoder, r"layers\.(\d+)\."))
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
        count_numbers(encoder, rf"layers\.{stage}\.blocks\.(\d+)\.")
        for stage in range(len(windows))
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
    last = count_numbers(encoder, r"layers\.(\d+)\.") - 1
    stride = encoder["patch_embed.proj.weight"].shape[-1] << last
    # windows of 6 and 7 tokens are those of models whose last stage is one window
    size_is_known = image_size is not None or "absolute_pos_embed" in encoder
    if (window > 7 and not size_is_known) or (
        image_size is not None and min(image_size) < window * stride
    ):
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
        depth=count_numbers(encoder, r"blocks\.(\d+)\."),
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


def _infer_convnet(encoder: State, image_size: tuple[int, int]) -> ConvNetSpec:
    if RESNET_NAME in encoder:
        width, channels = encoder["conv1.weight"].shape[:2]
        return ResNetSpec(
            image_size=image_size,
            channels=channels,
            depths=tuple(
                count_numbers(encoder, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5)
            ),
            bottleneck="layer1.0.conv3.weight" in encoder,
            width=width,
        )
    if CONVNEXT_NAME not in encoder:
        raise ValueError("which model of timm this is, only the metadata of our own files tells")
    blocks = [f"stages.{stage}.blocks." for stage in range(4)]
    return ConvNeXtSpec(
        image_size=image_size,
        channels=encoder["stem.0.weight"].shape[1],
        depths=tuple(count_numbers(encoder, rf"{re.escape(block)}(\d+)\.") for block in blocks),
        widths=tuple(len(encoder[f"{block}0.conv_dw.weight"]) for block in blocks),
        layer_scale=1e-6 if f"{blocks[0]}0.gamma" in encoder else None,
    )
