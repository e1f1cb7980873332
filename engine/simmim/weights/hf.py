"""The layouts of Hugging Face transformers: Swin, SwinV2, ViT and BEiT.

Checkpoints on disk keep the names of release 4; in memory release 5 has others. Both are read, the
first are written. q, k and v are separate matrices there. A ViT with absolute positions alone is
their ViT, whose head reads the class token; one with relative positions is their BEiT.
"""

import re
from typing import Any

import torch

from simmim.backbone.build import Spec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec
from simmim.weights.official import BUFFERS
from simmim.weights.renaming import Renaming, State, unknown_names

PREFIXES = ("swin.", "swinv2.", "vit.", "beit.")

# What stands inside a block: ours, on disk, in memory.
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


# Parts of their models that ours have no place for: what a bare ViT makes of its class token, and
# the visual tokens that a BEiT predicts.
_FOREIGN = ("pooler.dense.", "lm_head.", "layernorm.")


def to_ours(state: State, config: dict[str, Any]) -> tuple[State, dict[str, Any], dict[str, Any]]:
    """Our names for theirs, and what config.json tells.

    Args:
        state: their names and tensors.
        config: of `simmim.weights.layouts.read_config`; {} for none.

    Returns:
        The state; hints for the architecture; metadata (classes, mean, std, and "dropped": the
        names that have no place here).

    Raises:
        ValueError: names that are not theirs, or a part that we do not have.
    """
    if not any(name.startswith(PREFIXES) for name in state):  # of a model without a head
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
        # their head reads the class token then, ours the mean of the patch tokens
        heads = [name for name in joined if name.startswith("head.")]
        joined = {name: tensor for name, tensor in joined.items() if name not in heads}
        dropped += [name for name in state if name.startswith("classifier.")]
    metadata: dict[str, Any] = {"dropped": dropped} if dropped else {}
    if isinstance(names := config.get("id2label"), dict) and "head.weight" in joined:
        metadata["classes"] = [names[key] for key in sorted(names, key=int)]
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in config:
            metadata[ours] = config[theirs]
    return joined, _hints(model, config), metadata


def _hints(model: str, config: dict[str, Any]) -> dict[str, Any]:
    if not config:
        return {}
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act is {config['hidden_act']}; ours is gelu")
    size = config.get("image_size")
    hints: dict[str, Any] = {
        "image_size": (size, size) if isinstance(size, int) else size and tuple(size)
    }
    if model in ("vit.", "beit."):
        hints |= {
            "num_heads": config.get("num_attention_heads"),
            "norm_eps": config.get("layer_norm_eps", 1e-12),
        }
    elif config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"layer_norm_eps is {config['layer_norm_eps']}; ours is 1e-5")
    if model == "swinv2.":
        hints |= {key: config.get(key) for key in ("window_size", "pretrained_window_sizes")}
    return hints


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


def model_type(spec: Spec, kind: str) -> str:
    """Their name of an architecture: "swin", "swinv2", "vit" or "beit".

    Raises:
        ValueError: they have none that computes the same.
    """
    if isinstance(spec, ViTSpec):
        plain = not spec.shared_relative_position and not spec.layer_relative_position
        if spec.qk_scale is not None:
            raise ValueError("Hugging Face has no factor of q·k other than 1/√(head width)")
        if plain and spec.layer_scale is None and spec.absolute_position and spec.final_norm:
            return "vit"
        if not spec.final_norm and kind != "classifier":
            raise ValueError("Hugging Face's ViT and BEiT end in a norm; this encoder has none")
        if not spec.qkv_bias:
            raise ValueError("Hugging Face's BEiT always has biases of q and v")
        return "beit"
    if not isinstance(spec, SwinSpec):
        raise ValueError(f"no Hugging Face model of a {spec.arch} is known here")
    if spec.absolute_position:
        raise ValueError("Hugging Face's Swin cannot add absolute positions")
    if not spec.patch_norm:
        raise ValueError("Hugging Face's Swin always has a norm after the patch embedding")
    if spec.qk_scale is not None:
        raise ValueError("Hugging Face has no factor of q·k other than 1/√(head width)")
    windows = {spec.window(stage) for stage in range(len(spec.depths))}
    if isinstance(spec, SwinV2Spec):
        if windows != {spec.window_size} and spec.image_size[0] != spec.image_size[1]:
            raise ValueError(
                "Hugging Face shrinks windows by side, we by the smaller side of a stage"
            )
        return "swinv2"
    if windows != {spec.window_size}:
        raise ValueError(
            f"windows of {sorted(windows)} tokens: Hugging Face's Swin has one window for all "
            f"stages, {spec.window_size}, and cannot shrink it where a stage is smaller"
        )
    return "swin"


def left_out(state: State, spec: Spec, kind: str) -> list[str]:
    """Our names that have no place there."""
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
    """Their names on disk for ours, and config.json.

    Args:
        state: under our names.
        spec: the encoder's architecture.
        kind: "simmim", "classifier" or "encoder".
        metadata: classes.

    Raises:
        ValueError: they have no model that computes the same.
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
    return renamed, _config(spec, family, kind, state, metadata)


_CLASSES = {
    "swin": ("SwinForMaskedImageModeling", "SwinForImageClassification", "SwinModel"),
    "swinv2": ("Swinv2ForMaskedImageModeling", "Swinv2ForImageClassification", "Swinv2Model"),
    "vit": ("ViTForMaskedImageModeling", "ViTForImageClassification", "ViTModel"),
    "beit": ("", "BeitForImageClassification", "BeitModel"),
}


def _config(
    spec: Spec, family: str, kind: str, state: State, metadata: dict[str, Any]
) -> dict[str, Any]:
    height, width = spec.image_size
    architecture = _CLASSES[family][("simmim", "classifier", "encoder").index(kind)]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family,
        "image_size": height if height == width else [height, width],
        "patch_size": spec.patch_size,
        "num_channels": spec.channels,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
        "encoder_stride": spec.stride,
    }
    if isinstance(spec, ViTSpec):
        config |= {
            "hidden_size": spec.embed_dim,
            "num_hidden_layers": spec.depth,
            "num_attention_heads": spec.num_heads,
            "intermediate_size": int(spec.embed_dim * spec.mlp_ratio),
            "layer_norm_eps": spec.norm_eps,
        }
        if family == "vit":
            config["qkv_bias"] = spec.qkv_bias
        else:
            config |= {
                "use_mask_token": "encoder.mask_token" in state,
                "use_absolute_position_embeddings": spec.absolute_position,
                "use_relative_position_bias": spec.layer_relative_position,
                "use_shared_relative_position_bias": spec.shared_relative_position,
                "use_mean_pooling": not spec.final_norm,
                "layer_scale_init_value": spec.layer_scale or 0.0,
                "drop_path_rate": spec.drop_path,
            }
    else:
        assert isinstance(spec, SwinSpec)
        config |= {
            "embed_dim": spec.embed_dim,
            "depths": list(spec.depths),
            "num_heads": list(spec.num_heads),
            "num_layers": len(spec.depths),
            "hidden_size": spec.embed_dim << (len(spec.depths) - 1),
            "window_size": spec.window_size,
            "mlp_ratio": spec.mlp_ratio,
            "qkv_bias": spec.qkv_bias,
            "drop_path_rate": spec.drop_path,
            "layer_norm_eps": 1e-5,
            "use_absolute_embeddings": False,
        }
        if isinstance(spec, SwinV2Spec):
            config["pretrained_window_sizes"] = list(spec.pretrained_window_sizes)
    if kind == "classifier":
        classes = metadata.get("classes") or [str(k) for k in range(len(state["head.weight"]))]
        config["id2label"] = {str(number): name for number, name in enumerate(classes)}
        config["label2id"] = {name: number for number, name in enumerate(classes)}
    return config


def preprocessor(spec: Spec, metadata: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: how their image processors make this model's inputs."""
    from simmim.model.image_model import IMAGENET_MEAN, IMAGENET_STD

    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": spec.image_size[0], "width": spec.image_size[1]},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(metadata.get("mean") or IMAGENET_MEAN),
        "image_std": list(metadata.get("std") or IMAGENET_STD),
    }
