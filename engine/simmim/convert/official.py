"""The layout of microsoft/SimMIM checkpoints: pre-trained, which is also ours, and fine-tuned.

Architecture is inferred from names and shapes. Buffers that the published code saves
(`relative_position_index`, `attn_mask`) are dropped: they follow from the architecture. A
fine-tuned checkpoint has no prefix (`layers.0…`, `head.weight`) where ours say `encoder.layers.0…`.
"""

import math
import re
from dataclasses import replace

from torch import Tensor

from simmim.backbone.build import Spec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec

State = dict[str, Tensor]

_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")
PREFIX = "encoder."

# Parts of a model that stand beside its encoder.
HEADS = ("head.", "fc_norm.", "decoder.")


def matches(state: State) -> bool:
    """Whether the names are those of an official pre-training checkpoint, or of ours."""
    return f"{PREFIX}patch_embed.proj.weight" in state


def matches_finetuned(state: State) -> bool:
    """Whether the names are those of an official fine-tuned checkpoint."""
    if "patch_embed.proj.weight" not in state or any(name.startswith("decoder.") for name in state):
        return False
    if "blocks.0.attn.qkv.weight" in state:  # a plain ViT has blocks.0.attn.qkv.bias
        return "blocks.0.attn.qkv.bias" not in state and "blocks.0.ls1.gamma" not in state
    merged = any(re.match(r"layers\.\d+\.downsample\.", name) for name in state)
    return "layers.0.blocks.0.attn.qkv.weight" in state and (
        "layers.0.downsample.reduction.weight" in state or not merged
    )


def from_finetuned(state: State) -> State:
    """Our names for those of an official fine-tuned checkpoint."""
    return {
        name if name.startswith(HEADS) else PREFIX + name: tensor
        for name, tensor in parameters(state).items()
    }


def to_finetuned(state: State) -> State:
    """The official names for ours."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}


def parameters(state: State) -> State:
    """The parameters of the model, without saved buffers and the unused head of mean pooling."""
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.endswith(_BUFFERS) and not name.startswith(f"{PREFIX}fc_norm.")
    }


def infer_spec(
    state: State,
    image_size: tuple[int, int] | None,
    num_heads: int | None = None,
    qk_scale: float | None = None,
    norm_eps: float | None = None,
    pretrained_window_sizes: tuple[int, ...] | None = None,
) -> Spec:
    """The architecture of a checkpoint under our names.

    Args:
        state: names and tensors of the whole model.
        image_size: (height, width) in pixels; None takes what the checkpoint tells.
        num_heads: heads of a ViT without any position table (shapes cannot tell); None takes one
            head per 64 channels.
        qk_scale: factor of q·k, which shapes cannot tell; None is 1/√(head width).
        norm_eps: of a ViT's norms, which shapes cannot tell; None is the published one.
        pretrained_window_sizes: of a SwinV2, which shapes cannot tell; None has none.

    Raises:
        ValueError: a part of the architecture cannot be told, or contradicts `image_size`.
    """
    encoder = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    if "layers.0.blocks.0.attn.qkv.weight" in encoder:
        if any(name.endswith("logit_scale") for name in encoder):
            raise ValueError("this is a SwinV2 checkpoint; SwinV2 is not supported yet")
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
    width, channels, patch_size, _ = encoder["patch_embed.proj.weight"].shape
    depths = tuple(
        _count(encoder, rf"layers\.{stage}\.blocks\.(\d+)\.")
        for stage in range(_count(encoder, r"layers\.(\d+)\."))
    )
    tables = [
        encoder[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"].shape
        for stage in range(len(depths))
    ]
    windows = [(_side(rows, "the rows of a position table") + 1) // 2 for rows, _ in tables]
    stride = patch_size * 2 ** (len(depths) - 1)
    if image_size is None:
        side = _swin_image_side(encoder, windows, patch_size, stride)
        image_size = (side, side)
    spec = SwinSpec(
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        embed_dim=width,
        depths=depths,
        num_heads=tuple(heads for _, heads in tables),
        window_size=max(windows),
        mlp_ratio=encoder["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in encoder,
        absolute_position="absolute_pos_embed" in encoder,
        patch_norm="patch_embed.norm.weight" in encoder,
    )
    if any(side % stride for side in image_size):
        return spec  # building it says what does not fit
    expected = [spec.window(stage) for stage in range(len(depths))]
    if expected != windows:
        raise ValueError(
            f"the position tables are for windows {windows}, but images of "
            f"{image_size[0]}×{image_size[1]} px need {expected}: say another image_size"
        )
    return spec


def _swin_image_side(encoder: State, windows: list[int], patch_size: int, stride: int) -> int:
    for stage, window in enumerate(windows):
        mask = encoder.get(f"layers.{stage}.blocks.1.attn_mask")
        if mask is not None and mask.numel():
            tokens = mask.shape[0] * window**2
            return _side(tokens, "the tokens that attn_mask covers") * (patch_size << stage)
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
            side = _side(position.shape[1] - 1, "the number of patch positions")
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
        mlp_ratio=encoder["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.q_bias" in encoder,
        absolute_position=position is not None,
        shared_relative_position=shared is not None,
        layer_relative_position=own is not None,
        layer_scale=0.1 if "blocks.0.gamma_1" in encoder else None,
        final_norm="norm.weight" in encoder,
    )
