"""Plain ViTs of other packages that regress the pixels of hidden tokens only.

Models are called as model(image, hidden) → loss, on normalised images [B, C, H, W] and the indices
of the hidden tokens, int64 [B, hidden]; index 0 is the class token.
B batch, C channels, H W pixels, p patch size.
Source of the state-dict layouts: timm 1.0, lightly 1.6.
"""

import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.packages import import_lightly, import_package
from bench.peers.peer import Pair, Peer, Unavailable, Weights, take
from bench.peers.specs import plain_vit, timm_vit_arguments
from simmim.backbone.build import Spec
from simmim.backbone.vit import ViTSpec


class LightlySimMIM(nn.Module):
    """lightly's SimMIM recipe, with masks that are given.

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
        places = (hidden - 1).unsqueeze(2)  # without the class token
        tokens = encoder.patch_embed(image)  # [B, L, D]
        index = places.expand(-1, -1, tokens.shape[2])
        token = self.mask_token.to(tokens.dtype).expand(index.shape)
        tokens = encoder._pos_embed(tokens.scatter(1, index, token))
        tokens = encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))
        prediction = self.decoder(tokens[:, 1:].gather(1, index))
        patches = F.unfold(image, self.patch_size, stride=self.patch_size).transpose(1, 2)
        return F.l1_loss(prediction, patches.gather(1, places.expand(prediction.shape)))


def build_timm(spec: Spec) -> Peer:
    """timm's ViT, without the parts of ours that it does not have.

    Raises:
        Unavailable: timm is not installed, or the model is no ViT.
    """
    if not isinstance(spec, ViTSpec):
        raise Unavailable("token-wise SimMIM is for ViT models only")
    import_package("timm.layers").set_fused_attn(True)
    spec, note = plain_vit(spec)
    model = TimmTokens(_timm_vit(spec), spec)
    pairs = [_from_timm(name) for name, _ in model.named_parameters()]
    note = "; ".join(filter(None, ["timm's ViT, head on hidden tokens only", note]))
    return Peer("timm", spec, model, pairs, _hidden_indices, note)


def _from_timm(theirs: str) -> Pair:
    if theirs.startswith("decoder."):
        name = theirs.replace("decoder.", "decoder.0.")
        if name.endswith(".weight"):  # our decoder is a 1×1 convolution
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
    import_package("timm")
    modules: Any = import_lightly("models.modules")
    spec, note = plain_vit(spec)
    backbone = modules.MaskedVisionTransformerTIMM(vit=_timm_vit(spec))
    model = LightlySimMIM(backbone, spec, import_lightly("models.utils"))
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
            # lightly orders a patch's pixels (row, column, colour), we order (colour, row, column)
            rows: Tensor = weights[theirs.replace("decoder.", "decoder.0.")].unflatten(
                0, (channels, p, p)
            )
            rows = rows.movedim(0, 2).flatten(0, 2)
            return rows.flatten(1) if rows.dim() > 1 else rows

        return Pair(theirs, pixels_last)
    return _of_vit(theirs, re.sub(r"^backbone\.(vit\.)?", "encoder.", theirs))


def _of_vit(theirs: str, name: str) -> Pair:
    """Pair with our parameter `name`; our biases of the query and the value become one tensor."""
    if name.endswith("attn.qkv.bias"):
        prefix = name.removesuffix("qkv.bias")

        def qkv_bias(weights: Weights) -> Tensor:
            q, v = weights[f"{prefix}q_bias"], weights[f"{prefix}v_bias"]
            return torch.cat((q, torch.zeros_like(q), v))

        return Pair(theirs, qkv_bias)
    return Pair(theirs, take(name))


def _timm_vit(spec: ViTSpec) -> nn.Module:
    vision_transformer: Any = import_package("timm.models.vision_transformer")
    vit: nn.Module = vision_transformer.VisionTransformer(**timm_vit_arguments(spec))
    return vit


def _hidden_indices(mask: Tensor) -> Tensor:
    """Indices of the hidden tokens, int64 [B, hidden]; index 0 is the class token.

    Args:
        mask: bool [B, h, w], with the same number of hidden tokens in every image.
    """
    return mask.flatten(1).nonzero()[:, 1].view(len(mask), -1) + 1
