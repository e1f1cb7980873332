"""SimMIM on other people's models: one builder per package, and where our weights belong in it.

Every peer is called as model(image, mask) → loss, on normalised images [B, C, H, W] and the mask in
the peer's own form. B batch, C channels, H W pixels, h w token grid, L = h·w, D width, p patch
size. Source of the state-dict layouts: timm 1.0, transformers 5, lightly 1.6.
"""

import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.backbone.build import Spec
from simmim.backbone.swin import NORM_EPS, SwinSpec
from simmim.backbone.vit import ViTSpec

Weights = Mapping[str, Tensor]


class Unavailable(Exception):
    """This peer has no row here; one line that says why."""


class Mismatch(Exception):
    """Two sides do not compute the same thing; one line that says where and by how much."""


@dataclass(frozen=True)
class Pair:
    """A parameter of a peer, and what it is of ours; gradients correspond in the same way.

    Attributes:
        theirs: its name in the peer.
        take: our parameters (or their gradients) by name → the peer's.
        compared: False where the gradient is rounding noise (a key's bias cancels in the softmax)
            or is not there (frozen).
    """

    theirs: str
    take: Callable[[Weights], Tensor]
    compared: bool = True


@dataclass(frozen=True)
class Peer:
    """A model that computes what ours does.

    Attributes:
        name: of its row.
        spec: the architecture of ours that it equals.
        model: (image, mask in the peer's form) → scalar loss.
        pairs: one for each of its parameters.
        mask_form: mask, bool [B, h, w] → the form that the model takes.
        note: what a reader of its row must know.
    """

    name: str
    spec: Spec
    model: nn.Module
    pairs: list[Pair]
    mask_form: Callable[[Tensor], Tensor]
    note: str = ""

    def load(self, weights: Weights) -> None:
        """Copy our parameters into the peer.

        Raises:
            Mismatch: the peer's parameters are not those that this file knows.
        """
        parameters = dict(self.model.named_parameters())
        assert parameters.keys() == {pair.theirs for pair in self.pairs}
        for pair in self.pairs:
            target = parameters[pair.theirs]
            try:
                value = pair.take(weights)
            except KeyError as error:
                raise Mismatch(f"{self.name}: {pair.theirs}: ours has no {error}") from None
            if value.shape != target.shape:
                shapes = f"{list(target.shape)}, ours {list(value.shape)}"
                raise Mismatch(f"{self.name}: {pair.theirs} is {shapes}")
            with torch.no_grad():
                target.copy_(value)


def take(name: str) -> Callable[[Weights], Tensor]:
    """Our parameter of that name, as it is."""
    return lambda weights: weights[name]


def published_loss(prediction: Tensor, image: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Mean absolute error over hidden pixels, image-sized as published.

    Args:
        prediction: [B, C, H, W].
        image: [B, C, H, W], normalised.
        mask: bool [B, h, w].
        patch_size: in pixels.

    Source: microsoft/SimMIM models/simmim.py.
    """
    pixels = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    pixels = pixels.unsqueeze(1).contiguous()  # [B, 1, H, W]
    error = F.l1_loss(image, prediction, reduction="none")
    return (error * pixels).sum() / (pixels.sum() + 1e-5) / image.shape[1]


def published_head(spec: Spec, width: int) -> nn.Sequential:
    """1×1 convolution and pixel shuffle, [B, D, h, w] → [B, C, H, W]."""
    return nn.Sequential(
        nn.Conv2d(width, spec.channels * spec.stride**2, 1), nn.PixelShuffle(spec.stride)
    )


def blend(tokens: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """The mask token in place of hidden tokens [B, …, D], as published; mask bool [B, …]."""
    weight = mask.unsqueeze(-1).type_as(mask_token)
    return tokens * (1.0 - weight) + mask_token * weight


class TimmSwin(nn.Module):
    """timm's Swin with a mask token and the published head and loss."""

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
    """timm's BEiT (it is the published ViT) with a mask token and the published head and loss."""

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
    """The loss of a `…ForMaskedImageModeling`; mask bool [B, L]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        loss: Tensor = self.model(pixel_values=image, bool_masked_pos=mask).loss
        return loss


class LightlySimMIM(nn.Module):
    """lightly's recipe for given masks: int64 [B, hidden], counted from the class token's 0.

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


def build_timm(spec: Spec) -> Peer:
    """timm's Swin, or its BEiT for a ViT.

    Raises:
        Unavailable: timm is not installed.
    """
    _import("timm")
    layers = importlib.import_module("timm.layers")
    # Swin asks for the experimental form; attention is torch's fused one in both families then
    layers.set_fused_attn(True, experimental=True)
    if isinstance(spec, SwinSpec):
        swin: Any = importlib.import_module("timm.models.swin_transformer")
        encoder = swin.SwinTransformer(
            img_size=spec.image_size,
            patch_size=spec.patch_size,
            in_chans=spec.channels,
            num_classes=0,
            global_pool="",
            embed_dim=spec.embed_dim,
            depths=spec.depths,
            num_heads=spec.num_heads,
            window_size=spec.window_size,
            mlp_ratio=spec.mlp_ratio,
            qkv_bias=spec.qkv_bias,
            drop_path_rate=0.0,
        )
        model: nn.Module = TimmSwin(encoder, spec)
    else:
        beit: Any = importlib.import_module("timm.models.beit")
        encoder = beit.Beit(
            img_size=spec.image_size,
            patch_size=spec.patch_size,
            in_chans=spec.channels,
            num_classes=0,
            global_pool="",
            embed_dim=spec.embed_dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            qkv_bias=spec.qkv_bias,
            mlp_ratio=spec.mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=spec.norm_eps),
            init_values=spec.layer_scale,
            use_abs_pos_emb=spec.absolute_position,
            use_rel_pos_bias=spec.layer_relative_position,
            use_shared_rel_pos_bias=spec.shared_relative_position,
        )
        model = TimmBeit(encoder, spec)
    pairs = [Pair(name, take(_from_timm(name))) for name, _ in model.named_parameters()]
    note = "Swin" if isinstance(spec, SwinSpec) else "BEiT (the published ViT)"
    return Peer("timm", spec, model, pairs, lambda mask: mask, f"timm's {note}, published head")


def _from_timm(name: str) -> str:
    if name.startswith("decoder."):
        return name
    if not name.startswith("encoder."):
        return f"encoder.{name}"
    # timm merges patches at the start of a stage, the published Swin at the end of the one before
    return re.sub(
        r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
    )


# Releases of transformers differ in the names of layers in memory; both forms are given.
FROM_TRANSFORMERS = [
    (r"^model\.", ""),
    (r"^(swin|vit)\.embeddings\.patch_embeddings\.projection", "encoder.patch_embed.proj"),
    (r"^swin\.embeddings\.norm", "encoder.patch_embed.norm"),
    (r"^swin\.embeddings\.position_embeddings", "encoder.absolute_pos_embed"),
    (r"^vit\.embeddings\.position_embeddings", "encoder.pos_embed"),
    (r"^(swin|vit)\.embeddings\.", "encoder."),
    (r"^swin\.encoder\.layers", "encoder.layers"),
    (r"^vit\.(encoder\.layer|layers)\.", "encoder.blocks."),
    (r"^(swin|vit)\.layernorm", "encoder.norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.((self|attention)\.query|q_proj)", "attn.q"),
    (r"attention\.((self|attention)\.key|k_proj)", "attn.k"),
    (r"attention\.((self|attention)\.value|v_proj)", "attn.v"),
    (r"attention\.(self|relative_position_bias)\.", "attn."),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
]


def build_transformers(spec: Spec) -> Peer:
    """The package's SimMIM classes; its ViT has absolute positions and nothing else of ours.

    Raises:
        Unavailable: transformers is not installed, or has no such model.
    """
    transformers: Any = _import("transformers")
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
        last = min(spec.resolution(len(spec.depths) - 1))
        if last < spec.window_size:
            raise Unavailable(
                f"transformers' Swin cannot shrink its window of {spec.window_size} tokens to the "
                f"{last} of the last stage"
            )
        config = transformers.SwinConfig(
            **shared,
            embed_dim=spec.embed_dim,
            depths=list(spec.depths),
            num_heads=list(spec.num_heads),
            window_size=spec.window_size,
            mlp_ratio=spec.mlp_ratio,
            drop_path_rate=0.0,
            use_absolute_embeddings=spec.absolute_position,
            layer_norm_eps=NORM_EPS,
        )
        architecture = transformers.SwinForMaskedImageModeling
    else:
        spec, note = _plain(spec)
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
    except ValueError:  # this release has no fused attention for this model
        built, attention = architecture._from_config(config, attn_implementation="eager"), "eager"
    model = TransformersMim(built)
    pairs = [_from_transformers(name, spec) for name, _ in model.named_parameters()]
    note = "; ".join(filter(None, [f"{architecture.__name__}, {attention} attention", note]))
    return Peer("transformers", spec, model, pairs, lambda mask: mask.flatten(1), note)


def _from_transformers(theirs: str, spec: Spec) -> Pair:
    name = theirs
    for pattern, ours in FROM_TRANSFORMERS:
        name = re.sub(pattern, ours, name)
    if not (match := re.fullmatch(r"(.*attn)\.([qkv])\.(weight|bias)", name)):
        return Pair(theirs, take(name))
    prefix, letter, kind = match.groups()
    compared = (letter, kind) != ("k", "bias")
    if kind == "weight" or isinstance(spec, SwinSpec):
        return Pair(theirs, _third(f"{prefix}.qkv.{kind}", "qkv".index(letter)), compared)
    if letter == "k":
        return Pair(theirs, lambda w: torch.zeros_like(w[f"{prefix}.q_bias"]), compared)
    return Pair(theirs, take(f"{prefix}.{letter}_bias"))


def build_lightly(spec: Spec) -> Peer:
    """lightly's recipe over timm's ViT.

    Raises:
        Unavailable: lightly or timm is not installed, or the model is no ViT.
    """
    if isinstance(spec, SwinSpec):
        raise Unavailable("lightly's SimMIM recipe is for ViT models only")
    # its version check would ask a server
    os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")
    _import("timm")
    _import("lightly")
    modules: Any = _import("lightly.models.modules")
    vision_transformer: Any = importlib.import_module("timm.models.vision_transformer")
    spec, note = _plain(spec)
    vit = vision_transformer.VisionTransformer(
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
    backbone = modules.MaskedVisionTransformerTIMM(vit=vit)
    model = LightlySimMIM(backbone, spec, importlib.import_module("lightly.models.utils"))
    pairs = [_from_lightly(name, spec) for name, _ in model.named_parameters()]
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
    name = re.sub(r"^backbone\.(vit\.)?", "encoder.", theirs)
    if name.endswith("attn.qkv.bias"):
        prefix = name.removesuffix("qkv.bias")

        def qkv_bias(weights: Weights) -> Tensor:
            q, v = weights[f"{prefix}q_bias"], weights[f"{prefix}v_bias"]
            return torch.cat((q, torch.zeros_like(q), v))

        return Pair(theirs, qkv_bias)
    return Pair(theirs, take(name), compared=name != "encoder.pos_embed")


def _hidden_indices(mask: Tensor) -> Tensor:
    """bool [B, h, w] with as many hidden tokens in each → int64 [B, hidden], class token first."""
    return mask.flatten(1).nonzero()[:, 1].view(len(mask), -1) + 1


def _plain(spec: ViTSpec) -> tuple[ViTSpec, str]:
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


def _third(name: str, part: int) -> Callable[[Weights], Tensor]:
    return lambda weights: weights[name].chunk(3)[part]


def _import(name: str) -> ModuleType:
    package = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise Unavailable(f"{package} is not installed: pip install {package}") from None
        reason = str(error)
    except (ImportError, RuntimeError) as error:
        reason = str(error)  # such as a torchvision that was built for another torch
    raise Unavailable(f"{package} does not import here: {reason.splitlines()[0]}")


BUILDERS: dict[str, Callable[[Spec], Peer]] = {
    "timm": build_timm,
    "transformers": build_transformers,
    "lightly": build_lightly,
}
