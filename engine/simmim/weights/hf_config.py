"""Reads and writes configurations of Hugging Face transformers."""

from collections.abc import Mapping
from typing import Any

from simmim.backbone.build import Spec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec
from simmim.model.classifier import numbered_classes
from simmim.model.image_model import IMAGENET_MEAN, IMAGENET_STD
from simmim.weights.our_names import State


def hints_of_config(model: str, config: dict[str, Any]) -> dict[str, Any]:
    """Hints as in `Converted`; an empty configuration gives none.

    Args:
        model: "swin.", "swinv2.", "vit." or "beit.".
        config: config.json.

    Raises:
        ValueError: the model computes something that ours does not.
    """
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


def model_type(spec: Spec, kind: str) -> str:
    """The family that an architecture belongs to: "swin", "swinv2", "vit" or "beit".

    Raises:
        ValueError: none of them computes the same.
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


_CLASSES = {
    "swin": ("SwinForMaskedImageModeling", "SwinForImageClassification", "SwinModel"),
    "swinv2": ("Swinv2ForMaskedImageModeling", "Swinv2ForImageClassification", "Swinv2Model"),
    "vit": ("ViTForMaskedImageModeling", "ViTForImageClassification", "ViTModel"),
    "beit": ("", "BeitForImageClassification", "BeitModel"),
}


def model_config(
    spec: Spec, family: str, kind: str, state: State, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of config.json.

    Args:
        spec: the encoder's architecture.
        family: of `model_type`.
        kind: "simmim", "classifier" or "encoder".
        state: under our names.
        metadata: classes.
    """
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
        config |= _vit_fields(spec, family, masked="encoder.mask_token" in state)
    else:
        assert isinstance(spec, SwinSpec)
        config |= _swin_fields(spec)
    if kind == "classifier":
        classes = metadata.get("classes") or numbered_classes(len(state["head.weight"]))
        config["id2label"] = {str(number): name for number, name in enumerate(classes)}
        config["label2id"] = {name: number for number, name in enumerate(classes)}
    return config


def _vit_fields(spec: ViTSpec, family: str, masked: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": int(spec.embed_dim * spec.mlp_ratio),
        "layer_norm_eps": spec.norm_eps,
    }
    if family == "vit":
        return fields | {"qkv_bias": spec.qkv_bias}
    return fields | {
        "use_mask_token": masked,
        "use_absolute_position_embeddings": spec.absolute_position,
        "use_relative_position_bias": spec.layer_relative_position,
        "use_shared_relative_position_bias": spec.shared_relative_position,
        "use_mean_pooling": not spec.final_norm,
        "layer_scale_init_value": spec.layer_scale or 0.0,
        "drop_path_rate": spec.drop_path,
    }


def _swin_fields(spec: SwinSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {
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
        fields["pretrained_window_sizes"] = list(spec.pretrained_window_sizes)
    return fields


def preprocessor(spec: Spec, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of preprocessor_config.json: how images become this model's inputs."""
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
