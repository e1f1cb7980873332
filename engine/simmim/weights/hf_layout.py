"""The layouts of Hugging Face transformers: Swin, SwinV2, ViT and BEiT.

Checkpoints on disk keep the names of release 4, while release 5 has other names in memory. Both are
read, and those on disk are written. q, k and v are separate matrices there. A ViT that has absolute
positions alone is a ViT there, whose head reads the class token; one with relative positions is a
BEiT.
"""

import re
from typing import Any

import torch

from simmim.backbone.build import Spec
from simmim.backbone.vit import ViTSpec
from simmim.weights.hf_config import hints_of_config, model_config, model_type
from simmim.weights.our_names import BUFFERS, Converted, State
from simmim.weights.renaming import Renaming, unknown_names

PREFIXES = ("swin.", "swinv2.", "vit.", "beit.")

# Names inside a block: ours, on disk, in memory.
_SWIN_BLOCK = [
    ("norm1", "layernorm_before", "layernorm_before"),
    ("norm2", "layernorm_after", "layernorm_after"),
    ("attn.proj", "attention.output.dense", "attention.o_proj"),
    (
        "attn.relative_position_bias_table",
        "attention.self.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    ("attn.logit_scale", "attention.self.logit_scale", "attention.logit_scale"),
    (
        "attn.cpb_mlp",
        "attention.self.continuous_position_bias_mlp",
        "attention.continuous_position_bias_mlp",
    ),
    ("attn.query", "attention.self.query", "attention.q_proj"),
    ("attn.key", "attention.self.key", "attention.k_proj"),
    ("attn.value", "attention.self.value", "attention.v_proj"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
]
_VIT_BLOCK = [
    ("norm1", "layernorm_before", "layernorm_before"),
    ("norm2", "layernorm_after", "layernorm_after"),
    ("attn.proj", "attention.output.dense", "attention.o_proj"),
    (
        "attn.relative_position_bias_table",
        "attention.attention.relative_position_bias.relative_position_bias_table",
        "relative_position_bias.relative_position_bias_table",
    ),
    ("attn.query", "attention.attention.query", "attention.q_proj"),
    ("attn.key", "attention.attention.key", "attention.k_proj"),
    ("attn.value", "attention.attention.value", "attention.v_proj"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
    ("gamma_1", "lambda_1", "lambda_1"),
    ("gamma_2", "lambda_2", "lambda_2"),
]


def _swin_pairs(model: str, column: int) -> list[tuple[str, str]]:
    return [
        ("encoder.patch_embed.proj", f"{model}embeddings.patch_embeddings.projection"),
        ("encoder.patch_embed.norm", f"{model}embeddings.norm"),
        ("encoder.mask_token", f"{model}embeddings.mask_token"),
        ("encoder.layers.*.downsample", f"{model}encoder.layers.*.downsample"),
        *(
            (
                f"encoder.layers.*.blocks.*.{part[0]}",
                f"{model}encoder.layers.*.blocks.*.{part[column]}",
            )
            for part in _SWIN_BLOCK
        ),
        ("encoder.norm", f"{model}layernorm"),
        ("decoder.0", "decoder.0"),
        ("head", "classifier"),
    ]


def _vit_pairs(model: str, column: int) -> list[tuple[str, str]]:
    in_memory = column == 2
    block = f"{model}layers.*." if in_memory else f"{model}encoder.layer.*."
    shared = "shared_position_bias" if in_memory else "encoder.relative_position_bias"
    return [
        ("encoder.patch_embed.proj", f"{model}embeddings.patch_embeddings.projection"),
        ("encoder.cls_token", f"{model}embeddings.cls_token"),
        ("encoder.mask_token", f"{model}embeddings.mask_token"),
        ("encoder.pos_embed", f"{model}embeddings.position_embeddings"),
        ("encoder.rel_pos_bias", f"{model}{shared}"),
        *((f"encoder.blocks.*.{part[0]}", block + part[column]) for part in _VIT_BLOCK),
        ("encoder.norm", f"{model}layernorm"),
        ("fc_norm", f"{model}pooler.layernorm"),
        ("decoder.0", "decoder.0"),
        ("head", "classifier"),
    ]


def _renamings(model: str) -> tuple[Renaming, Renaming]:
    pairs = _swin_pairs if model.startswith("swin") else _vit_pairs
    return Renaming(pairs(model, 1)), Renaming(pairs(model, 2))


def matches(state: State) -> bool:
    """Whether the names are those of a Swin, SwinV2, ViT or BEiT of transformers."""
    bare = "embeddings.patch_embeddings.projection.weight" in state
    return bare or any(name.startswith(PREFIXES) for name in state)


# Parts that our models have no place for: the pooler of a ViT's class token, and the visual tokens
# that a BEiT predicts.
_FOREIGN = ("pooler.dense.", "lm_head.", "layernorm.")


def to_ours(state: State, config: dict[str, Any]) -> Converted:
    """The parameters under our names, and what config.json tells.

    Args:
        state: under the names of the other program.
        config: of `simmim.weights.layouts.read_config`; {} for none.

    Raises:
        ValueError: there are names that transformers does not have, or parts that we do not have.
    """
    if not any(name.startswith(PREFIXES) for name in state):  # a model without a head has no prefix
        family = f"{config.get('model_type', '')}."
        if family not in PREFIXES:
            raise ValueError("config.json is missing beside it, or is of another model")
        state = {family + name: tensor for name, tensor in state.items()}
    model = next(p for p in PREFIXES if any(name.startswith(p) for name in state))
    on_disk, in_memory = _renamings(model)
    renamed: State = {}
    unknown, dropped = [], []
    for name, tensor in state.items():
        if name.endswith(BUFFERS):
            continue
        ours = on_disk.to_ours(name) or in_memory.to_ours(name)
        if ours is not None:
            renamed[ours] = tensor
        elif name.startswith((*_FOREIGN, f"{model}pooler.dense.")):
            dropped.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise unknown_names(unknown)
    joined = _join_projections(renamed, fused_bias=model == "swin.")
    if model in ("vit.", "beit.") and "fc_norm.weight" not in joined:
        # the head then reads the class token, where ours reads the mean of the patch tokens
        heads = [name for name in joined if name.startswith("head.")]
        joined = {name: tensor for name, tensor in joined.items() if name not in heads}
        dropped += [name for name in state if name.startswith("classifier.")]
    metadata: dict[str, Any] = {"dropped": dropped} if dropped else {}
    if isinstance(names := config.get("id2label"), dict) and "head.weight" in joined:
        metadata["classes"] = [names[key] for key in sorted(names, key=int)]
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in config:
            metadata[ours] = config[theirs]
    return Converted(joined, hints_of_config(model, config), metadata)


def _join_projections(state: State, fused_bias: bool) -> State:
    joined: State = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.+\.attn)\.(query|key|value)\.(weight|bias)", name)
        if match is None:
            joined[name] = tensor
            continue
        attention, part, kind = match.groups()
        parts = [state.get(f"{attention}.{p}.{kind}") for p in ("query", "key", "value")]
        if kind == "weight" or fused_bias:
            if any(p is None for p in parts):
                raise ValueError(f"{attention}: query, key and value do not come together")
            joined[f"{attention}.qkv.{kind}"] = torch.cat([p for p in parts if p is not None])
        elif part != "key":  # a key bias cancels in the softmax
            joined[f"{attention}.{part[0]}_bias"] = tensor
    return joined


def _split_projections(state: State, key_bias: bool) -> State:
    split: State = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.+\.attn)\.qkv\.(weight|bias)", name):
            attention, kind = match.groups()
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):
                split[f"{attention}.{part}.{kind}"] = rows.clone()
        elif match := re.fullmatch(r"(.+\.attn)\.([qv])_bias", name):
            part = {"q": "query", "v": "value"}[match[2]]
            split[f"{match[1]}.{part}.bias"] = tensor
            if key_bias and part == "query":
                split[f"{match[1]}.key.bias"] = torch.zeros_like(tensor)
        else:
            split[name] = tensor
    return split


def left_out(state: State, spec: Spec, kind: str) -> list[str]:
    """Our names that have no place in transformers' models."""
    parts: tuple[str, ...] = ()
    if model_type(spec, kind) == "beit":
        parts = ("decoder.",)  # theirs predicts visual tokens, not pixels
    elif kind == "encoder":
        parts = ("encoder.mask_token",)
    if kind == "encoder":
        parts += ("fc_norm.",)
    return [name for name in state if name.startswith(parts)]


def from_ours(
    state: State, spec: Spec, kind: str, metadata: dict[str, Any]
) -> tuple[State, dict[str, Any]]:
    """The parameters under the names that lie on disk, and config.json.

    Args:
        state: under our names.
        spec: the encoder's architecture.
        kind: "simmim", "classifier" or "encoder".
        metadata: classes.

    Raises:
        ValueError: transformers has no model that computes the same.
    """
    family = model_type(spec, kind)
    if isinstance(spec, ViTSpec) and kind == "classifier" and (family != "beit" or spec.final_norm):
        raise ValueError(
            "Hugging Face's classifiers read the class token or the norm of the mean; this one "
            "reads the mean of normalised tokens"
        )
    renaming, _ = _renamings(f"{family}.")
    renamed: State = {}
    for name, tensor in _split_projections(state, key_bias=family == "vit").items():
        theirs = renaming.to_theirs(name)
        if theirs is None:
            raise ValueError(f"Hugging Face's {family} has no place for {name}")
        renamed[theirs] = tensor
    return renamed, model_config(spec, family, kind, state, metadata)
