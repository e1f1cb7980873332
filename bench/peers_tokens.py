"""Plain ViTs of other packages that regress the pixels of hidden tokens alone.

Models are called as model(image, hidden) → loss, on normalised images [B, C, H, W] and the places
of the hidden tokens, int64 [B, hidden], counted from the class token's 0.
B batch, C channels, H W pixels, p patch size.
Source of the state-dict layouts: timm 1.0, lightly 1.6.
"""

import importlib
import os
import re
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer import Pair, Peer, Unavailable, Weights, import_package, take
from simmim.backbone.build import Spec
from simmim.backbone.vit import ViTSpec


class LightlySimMIM(nn.Module):
    """lightly's recipe for given masks.

    Source: lightly-ai/lightly examples/pytorch/simmim.py.
    """

    def __init__(self, backbone: nn.Module, spec: ViTSpec, functions: ModuleType) -> None:
        super().__init__()
        self.backbone, self.patch_size, self.functions = backbone, spec.patch_size, functions
        self.decoder = nn.Linear(spec.embed_dim, spec.channels * spec.patch_size**2)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        backbone: Any = self.backbone
        encoded = backbone.encode(images=image, idx_mask=mask)
        prediction = self.decoder(self.functions.get_at_index(encoded, mask))
        patches = self.functions.patchify(image, self.patch_size)
        return F.l1_loss(prediction, self.functions.get_at_index(patches, mask - 1))


class TimmTokens(nn.Module):
    """timm's ViT with a mask token, and a linear head over hidden tokens only."""

    def __init__(self, encoder: nn.Module, spec: ViTSpec) -> None:
        super().__init__()
        self.encoder, self.patch_size = encoder, spec.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.embed_dim))
        self.decoder = nn.Linear(spec.embed_dim, spec.channels * spec.patch_size**2)

    def forward(self, image: Tensor, hidden: Tensor) -> Tensor:
        encoder: Any = self.encoder
        places = (hidden - 1).unsqueeze(2)
        tokens = encoder.patch_embed(image)  # [B, L, D]
        index = places.expand(-1, -1, tokens.shape[2])
        token = self.mask_token.to(tokens.dtype).expand(index.shape)
        tokens = encoder._pos_embed(tokens.scatter(1, index, token))
        tokens = encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))
        prediction = self.decoder(tokens[:, 1:].gather(1, index))
        patches = F.unfold(image, self.patch_size, stride=self.patch_size).transpose(1, 2)
        return F.l1_loss(prediction, patches.gather(1, places.expand(prediction.shape)))


def build_timm(spec: Spec) -> Peer:
    """timm's ViT, all of it that is ours as well.

    Raises:
        Unavailable: timm is not installed, or the model is no ViT.
    """
    if not isinstance(spec, ViTSpec):
        raise Unavailable("token-wise SimMIM is for ViT models only")
    import_package("timm")
    importlib.import_module("timm.layers").set_fused_attn(True)
    spec, note = plain(spec)
    model = TimmTokens(_timm_vit(spec), spec)
    pairs = [_from_timm(name) for name, _ in model.named_parameters()]
    note = "; ".join(filter(None, ["timm's ViT, head on hidden tokens only", note]))
    return Peer("timm", spec, model, pairs, _hidden_indices, note)


def _from_timm(theirs: str) -> Pair:
    if theirs.startswith("decoder."):
        name = theirs.replace("decoder.", "decoder.0.")
        if name.endswith(".weight"):  # ours is a 1×1 convolution
            return Pair(theirs, lambda weights: weights[name].flatten(1))
        return Pair(theirs, take(name))
    return _of_vit(theirs, theirs if theirs.startswith("encoder.") else f"encoder.{theirs}")


def build_lightly(spec: Spec) -> Peer:
    """lightly's recipe over timm's ViT.

    Raises:
        Unavailable: lightly or timm is not installed, or the model is no ViT.
    """
    if not isinstance(spec, ViTSpec):
        raise Unavailable("lightly's SimMIM recipe is for ViT models only")
    # its version check would ask a server
    os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")
    import_package("timm")
    import_package("lightly")
    modules: Any = import_package("lightly.models.modules")
    spec, note = plain(spec)
    backbone = modules.MaskedVisionTransformerTIMM(vit=_timm_vit(spec))
    model = LightlySimMIM(backbone, spec, importlib.import_module("lightly.models.utils"))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    pairs = [
        replace(_from_lightly(name, spec), compared=name not in frozen)
        for name, _ in model.named_parameters()
    ]
    note = "; ".join(filter(None, ["head on hidden tokens only, frozen positions", note]))
    return Peer("lightly", spec, model, pairs, _hidden_indices, note)


def _from_lightly(theirs: str, spec: ViTSpec) -> Pair:
    if theirs.startswith("decoder."):
        p, channels = spec.patch_size, spec.channels

        def pixels_last(weights: Weights) -> Tensor:
            # a patch's pixels are (row, column, colour) there, (colour, row, column) here
            rows: Tensor = weights[theirs.replace("decoder.", "decoder.0.")].unflatten(
                0, (channels, p, p)
            )
            rows = rows.movedim(0, 2).flatten(0, 2)
            return rows.flatten(1) if rows.dim() > 1 else rows

        return Pair(theirs, pixels_last)
    return _of_vit(theirs, re.sub(r"^backbone\.(vit\.)?", "encoder.", theirs))


def _of_vit(theirs: str, name: str) -> Pair:
    """A parameter whose name would be `name` if ours had no biases of single projections."""
    if name.endswith("attn.qkv.bias"):
        prefix = name.removesuffix("qkv.bias")

        def qkv_bias(weights: Weights) -> Tensor:
            q, v = weights[f"{prefix}q_bias"], weights[f"{prefix}v_bias"]
            return torch.cat((q, torch.zeros_like(q), v))

        return Pair(theirs, qkv_bias)
    return Pair(theirs, take(name))


def _timm_vit(spec: ViTSpec) -> nn.Module:
    vision_transformer: Any = importlib.import_module("timm.models.vision_transformer")
    vit: nn.Module = vision_transformer.VisionTransformer(
        img_size=spec.image_size,
        patch_size=spec.patch_size,
        in_chans=spec.channels,
        num_classes=0,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=spec.mlp_ratio,
        qkv_bias=spec.qkv_bias,
        norm_layer=partial(nn.LayerNorm, eps=spec.norm_eps),
    )
    return vit


def _hidden_indices(mask: Tensor) -> Tensor:
    """bool [B, h, w] with as many hidden tokens in each → int64 [B, hidden], class token first."""
    return mask.flatten(1).nonzero()[:, 1].view(len(mask), -1) + 1


def plain(spec: ViTSpec) -> tuple[ViTSpec, str]:
    """The ViT of packages without relative positions and LayerScale, and what that means."""
    plain = replace(
        spec,
        absolute_position=True,
        shared_relative_position=False,
        layer_relative_position=False,
        layer_scale=None,
    )
    note = "the plain ViT (no relative positions, no LayerScale): less work than ours"
    return plain, "" if plain == spec else note
