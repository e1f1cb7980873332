"""What timm's configuration of a model tells of a checkpoint."""

from typing import Any

from simmim.weights.our_names import HEADS, Converted


def hints_of_config(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hints and metadata as in `Converted`; an empty configuration gives none."""
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


def without_class_token_head(converted: Converted, config: dict[str, Any]) -> Converted:
    """A ViT without its head, where the head reads the class token, as ours never does.

    Args:
        converted: a ViT.
        config: of timm; {} for none. It says how tokens are pooled, which names do not tell where
            the norm comes before the pooling.

    Returns:
        `converted`, or a copy whose metadata names the head's parameters as "dropped".
    """
    state = converted.state
    pooled = config.get("global_pool") or config.get("model_args", {}).get("global_pool")
    dropped = [name for name in state if name.startswith(HEADS)]
    if "fc_norm.weight" in state or pooled == "avg" or not dropped:
        return converted
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    return Converted(kept, converted.hints, converted.metadata | {"dropped": dropped})
