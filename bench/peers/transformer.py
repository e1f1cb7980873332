"""SimMIM on the Swin, SwinV2 and ViT of other packages.

Models are called as model(image, mask) → loss, on normalised images [B, C, H, W] and the mask in
the peer's own form. B batch, C channels, H W pixels, h w token grid, L = h·w, D width.
Source of the state-dict layouts: timm 1.0, transformers 5.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.packages import import_package
from bench.peers.peer import Pair, Peer, Unavailable, Weights, take
from bench.peers.published import blend, published_head, published_loss
from bench.peers.specs import plain_vit, timm_arguments, timm_vit_arguments
from simmim.backbone.build import Spec
from simmim.backbone.swin import NORM_EPS, SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec


class TimmSwin(nn.Module):
    """timm's Swin or SwinV2 with a mask token and the published head and loss."""

    def __init__(self, encoder: nn.Module, spec: SwinSpec) -> None:
        super().__init__()
        self.encoder, self.patch_size = encoder, spec.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.embed_dim))
        self.decoder = published_head(spec, spec.embed_dim << (len(spec.depths) - 1))

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        encoder: Any = self.encoder
        tokens = blend(encoder.patch_embed(image), self.mask_token, mask)  # [B, h, w, D]
        features = encoder.norm(encoder.layers(tokens)).permute(0, 3, 1, 2)
        return published_loss(self.decoder(features), image, mask, self.patch_size)


class TimmBeit(nn.Module):
    """timm's BEiT, which is the published ViT, with a mask token, published head and loss."""

    def __init__(self, encoder: nn.Module, spec: ViTSpec) -> None:
        super().__init__()
        self.encoder, self.patch_size = encoder, spec.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.embed_dim))
        self.decoder = published_head(spec, spec.embed_dim)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        encoder: Any = self.encoder
        tokens = blend(encoder.patch_embed(image), self.mask_token, mask.flatten(1))  # [B, L, D]
        tokens = torch.cat((encoder.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        if encoder.pos_embed is not None:
            tokens = tokens + encoder.pos_embed
        bias = None if encoder.rel_pos_bias is None else encoder.rel_pos_bias()
        for block in encoder.blocks:
            tokens = block(tokens, shared_rel_pos_bias=bias)
        features = encoder.norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, mask.shape[1:])
        return published_loss(self.decoder(features), image, mask, self.patch_size)


class TransformersMim(nn.Module):
    """The loss of a `…ForMaskedImageModeling` of transformers; mask bool [B, L]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        loss: Tensor = self.model(pixel_values=image, bool_masked_pos=mask).loss
        return loss


def build_timm(spec: Spec) -> Peer:
    """timm's Swin or SwinV2, or its BEiT for a ViT.

    Raises:
        Unavailable: timm is not installed, or the model is none of these.
    """
    # timm's Swin uses torch's fused attention only if the experimental form is on as well
    import_package("timm.layers").set_fused_attn(True, experimental=True)
    if isinstance(spec, SwinSpec):
        encoder, note = _timm_swin(spec)
        model: nn.Module = TimmSwin(encoder, spec)
    elif isinstance(spec, ViTSpec):
        model, note = TimmBeit(_timm_beit(spec), spec), "BEiT (the published ViT)"
    else:
        raise Unavailable(f"no timm model is paired with {spec.arch} here")
    pairs = [Pair(name, take(_from_timm(name))) for name, _ in model.named_parameters()]
    return Peer("timm", spec, model, pairs, note=f"timm's {note}, published head")


def _timm_swin(spec: SwinSpec) -> tuple[nn.Module, str]:
    """The encoder, and its name in the row's note."""
    shared = timm_arguments(spec) | {
        "global_pool": "",
        "depths": spec.depths,
        "window_size": spec.window_size,
        "drop_path_rate": 0.0,
    }
    if isinstance(spec, SwinV2Spec):
        swinv2: Any = import_package("timm.models.swin_transformer_v2")
        sizes = spec.pretrained_window_sizes
        encoder = swinv2.SwinTransformerV2(**shared, pretrained_window_sizes=sizes)
        return encoder, "SwinV2 (attention is not fused there)"
    swin: Any = import_package("timm.models.swin_transformer")
    return swin.SwinTransformer(**shared), "Swin"


def _timm_beit(spec: ViTSpec) -> nn.Module:
    beit: Any = import_package("timm.models.beit")
    encoder: nn.Module = beit.Beit(
        **timm_vit_arguments(spec),
        global_pool="",
        init_values=spec.layer_scale,
        use_abs_pos_emb=spec.absolute_position,
        use_rel_pos_bias=spec.layer_relative_position,
        use_shared_rel_pos_bias=spec.shared_relative_position,
    )
    return encoder


def _from_timm(name: str) -> str:
    if name.startswith("decoder."):
        return name
    if not name.startswith("encoder."):
        return f"encoder.{name}"
    # timm merges patches at the start of a stage, the published Swin at the end of the previous one
    return re.sub(
        r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
    )


# Releases of transformers name their layers differently; the patterns match all of these names.
FROM_TRANSFORMERS = [
    (r"^model\.", ""),
    (r"^(swin|swinv2|vit)\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj"),
    (r"^swin(v2)?\.embeddings\.norm", "encoder.patch_embed.norm"),
    (r"^swin(v2)?\.embeddings\.position_embeddings", "encoder.absolute_pos_embed"),
    (r"^vit\.embeddings\.position_embeddings", "encoder.pos_embed"),
    (r"^(swin|swinv2|vit)\.embeddings\.", "encoder."),
    (r"^swin(v2)?\.encoder\.layers", "encoder.layers"),
    (r"^vit\.(encoder\.layer|layers)\.", "encoder.blocks."),
    (r"^(swin|swinv2|vit)\.layernorm", "encoder.norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.((self|attention)\.query|q_proj)", "attn.q"),
    (r"attention\.((self|attention)\.key|k_proj)", "attn.k"),
    (r"attention\.((self|attention)\.value|v_proj)", "attn.v"),
    (r"attention\.self\.continuous_position_bias_mlp", "attn.cpb_mlp"),
    (r"attention\.(self|relative_position_bias)\.", "attn."),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
]


def build_transformers(spec: Spec) -> Peer:
    """The SimMIM classes of transformers; their ViT has absolute positions and none of our extras.

    Raises:
        Unavailable: transformers is not installed, or has no such model.
    """
    if not isinstance(spec, (SwinSpec, ViTSpec)):
        raise Unavailable("transformers has masked image modelling for Swin, SwinV2 and ViT only")
    transformers: Any = import_package("transformers")
    if spec.image_size[0] != spec.image_size[1]:
        raise Unavailable("transformers' masked image modelling takes square images only")
    shared = {
        "image_size": spec.image_size[0],
        "patch_size": spec.patch_size,
        "num_channels": spec.channels,
        "qkv_bias": spec.qkv_bias,
        "encoder_stride": spec.stride,
    }
    note = ""
    if isinstance(spec, SwinSpec):
        config, architecture = _transformers_swin(spec, transformers, shared)
    else:
        spec, note = plain_vit(spec)
        config = transformers.ViTConfig(
            **shared,
            hidden_size=spec.embed_dim,
            num_hidden_layers=spec.depth,
            num_attention_heads=spec.num_heads,
            intermediate_size=int(spec.embed_dim * spec.mlp_ratio),
            layer_norm_eps=spec.norm_eps,
        )
        architecture = transformers.ViTForMaskedImageModeling
    try:
        built, attention = architecture._from_config(config, attn_implementation="sdpa"), "sdpa"
    except ValueError:  # this release of transformers has no fused attention for this model
        built, attention = architecture._from_config(config, attn_implementation="eager"), "eager"
    model = TransformersMim(built)
    pairs = [_from_transformers(name, spec) for name, _ in model.named_parameters()]
    note = "; ".join(filter(None, [f"{architecture.__name__}, {attention} attention", note]))
    return Peer("transformers", spec, model, pairs, lambda mask: mask.flatten(1), note)


def _transformers_swin(
    spec: SwinSpec, transformers: Any, shared: dict[str, Any]
) -> tuple[Any, Any]:
    """A configuration, and the class that takes it.

    Raises:
        Unavailable: the last stage is smaller than a window, which this class cannot shrink.
    """
    settings = shared | {
        "embed_dim": spec.embed_dim,
        "depths": list(spec.depths),
        "num_heads": list(spec.num_heads),
        "window_size": spec.window_size,
        "mlp_ratio": spec.mlp_ratio,
        "drop_path_rate": 0.0,
        "use_absolute_embeddings": spec.absolute_position,
        "layer_norm_eps": NORM_EPS,
    }
    if isinstance(spec, SwinV2Spec):
        config = transformers.Swinv2Config(
            **settings, pretrained_window_sizes=list(spec.pretrained_window_sizes)
        )
        return config, transformers.Swinv2ForMaskedImageModeling
    last = min(spec.resolution(len(spec.depths) - 1))
    if last < spec.window_size:
        raise Unavailable(
            f"transformers' Swin cannot shrink its window of {spec.window_size} tokens to the "
            f"{last} of the last stage"
        )
    return transformers.SwinConfig(**settings), transformers.SwinForMaskedImageModeling


def _from_transformers(theirs: str, spec: SwinSpec | ViTSpec) -> Pair:
    name = theirs
    for pattern, ours in FROM_TRANSFORMERS:
        name = re.sub(pattern, ours, name)
    if not (match := re.fullmatch(r"(.*attn)\.([qkv])\.(weight|bias)", name)):
        return Pair(theirs, take(name))
    prefix, letter, kind = match.groups()
    compared = (letter, kind) != ("k", "bias")
    if kind == "weight" or (isinstance(spec, SwinSpec) and not isinstance(spec, SwinV2Spec)):
        return Pair(theirs, _third(f"{prefix}.qkv.{kind}", "qkv".index(letter)), compared)
    if letter == "k":
        return Pair(theirs, lambda w: torch.zeros_like(w[f"{prefix}.q_bias"]), compared)
    return Pair(theirs, take(f"{prefix}.{letter}_bias"))


def _third(name: str, part: int) -> Callable[[Weights], Tensor]:
    return lambda weights: weights[name].chunk(3)[part]
