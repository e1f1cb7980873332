"""Gives weights the names of another program, and writes them as files that it reads."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from simmim.backbone.build import Spec
from simmim.backbone.convnet import ConvNetSpec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.timm_backbone import TimmSpec
from simmim.backbone.vit import ViTSpec
from simmim.files import sync, write_atomic
from simmim.model.weights_file import save_tensors, weights_metadata
from simmim.run_folder import WEIGHTS_FILE
from simmim.weights import (
    convnet_layouts,
    hf_config,
    hf_layout,
    layouts,
    mmpretrain_layout,
    official_layout,
    timm_layout,
)
from simmim.weights.load import Weights
from simmim.weights.our_names import PREFIX, kind_of, masking_names

# The key under which .pth files of other programs keep their weights.
_WRAPPERS = {"official": "model", "mmpretrain": "state_dict"}

_MODULES: dict[str, Any] = {
    "hf": hf_layout,
    "timm": timm_layout,
    "mmpretrain": mmpretrain_layout,
}


@dataclass(frozen=True)
class Export:
    """A checkpoint under another program's names.

    Attributes:
        layout: one of LAYOUTS.
        kind: of the target's model: "simmim", "classifier" or "encoder".
        spec: the encoder's architecture.
        state: name → tensor.
        config: the target's configuration of the model; {} where it has none.
        left_out: our names that the target has no place for.
    """

    layout: str
    kind: str
    spec: Spec
    state: dict[str, Tensor]
    config: dict[str, Any]
    left_out: tuple[str, ...] = ()


def to_layout(weights: Weights, layout: str) -> Export:
    """Weights under the names of `layout`.

    Decoder and mask token are kept if the target has a place for them.

    Raises:
        ValueError: the target has no model that computes the same; says which part.
    """
    if layout == "simmim":
        return Export(layout, weights.kind, weights.spec, dict(weights.state), {})
    if weights.kind not in ("simmim", "classifier", "encoder"):
        return _encoder_alone(weights, layout)
    state, spec, kind = weights.state, weights.spec, weights.kind
    if isinstance(spec, ConvNetSpec):
        return _to_convnet_layout(weights, spec, layout)
    if layout == "torchvision":
        raise ValueError("torchvision has no place for a Swin or ViT here: ConvNets alone")
    if layout == "official":
        renamed = official_layout.to_finetuned(state, spec) if kind == "classifier" else dict(state)
        return Export(layout, kind, spec, renamed, {})
    module = _MODULES[layout]
    left_out = tuple(module.left_out(state, spec, kind))
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    kind = kind_of(kept)
    converted, config = module.from_ours(kept, spec, kind, weights.metadata)
    return Export(layout, kind, spec, converted, config, left_out)


def layouts_for(spec: Spec) -> tuple[str, ...]:
    """The layouts that checkpoints of an architecture are read from and written to."""
    if isinstance(spec, ConvNetSpec):
        if isinstance(spec, TimmSpec):
            return ("simmim", "timm")
        return ("simmim", "timm", "torchvision")
    if isinstance(spec, SwinV2Spec):
        return ("simmim", "official", "timm", "hf")
    if isinstance(spec, SwinSpec):
        return ("simmim", "official", "mmpretrain", "timm", "hf")
    return ("simmim", "official", "timm", "hf") if isinstance(spec, ViTSpec) else ("simmim",)


def _encoder_alone(weights: Weights, layout: str) -> Export:
    """The export of a model whose heads nobody else knows."""
    parts = {k: v for k, v in weights.state.items() if k.startswith(PREFIX)}
    export = to_layout(replace(weights, kind="encoder", state=parts), layout)
    heads = tuple(name for name in weights.state if name not in parts)
    return replace(export, left_out=(*heads, *export.left_out))


def _to_convnet_layout(weights: Weights, spec: ConvNetSpec, layout: str) -> Export:
    left_out = tuple(masking_names(weights.state, weights.kind))
    kept = {name: tensor for name, tensor in weights.state.items() if name not in left_out}
    kind = kind_of(kept)
    converted, config = convnet_layouts.from_ours(kept, spec, kind, layout)
    return Export(layout, kind, spec, converted, config, left_out)


def write(export: Export, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write an export, whole or not at all: a folder for Hugging Face, else a file.

    Args:
        export: what to write.
        path: a folder for "hf"; else a .safetensors file, or .pth for plain tensors as torch.save
            writes them.
        metadata: mean, std, mask and classes of the weights.

    Raises:
        OSError: it cannot be written; what was at `path` is still there.
    """
    state = _unshared(export.state)
    if export.layout == "hf":
        _write_folder(export, state, path, metadata)
        return
    if path.suffix != ".safetensors":
        wrapper = _WRAPPERS.get(export.layout)
        content: Any = {wrapper: state} if wrapper else state
        write_atomic(path, lambda temporary: _pickle(content, temporary))
        return
    notes = _notes(export, metadata)
    if export.config:
        notes[export.layout] = json.dumps(export.config)
    write_atomic(path, lambda temporary: _save(state, temporary, notes))


def _notes(export: Export, metadata: Mapping[str, Any]) -> dict[str, str]:
    # our own notes go into every layout: names and shapes do not tell everything
    return {"format": "pt", **weights_metadata(export.kind, export.spec, metadata)}


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each in memory of its own, as safetensors wants them."""
    unshared: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.contiguous()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(memory.data_ptr())
        unshared[name] = tensor
    return unshared


def _pickle(content: Any, path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # how torch says that a disk is full
        raise OSError(f"cannot be written: {error}") from None


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_tensors(state, path, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot be written: {error}") from None


def strange_files(folder: Path) -> list[str]:
    """Files of a folder that `write` does not make, and that would be lost if it replaced it."""
    own = {WEIGHTS_FILE, layouts.CONFIG_FILE, layouts.PREPROCESSOR_FILE}
    return sorted(path.name for path in folder.iterdir() if path.name not in own)


def _write_folder(
    export: Export, state: dict[str, Tensor], path: Path, metadata: Mapping[str, Any]
) -> None:
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _save(state, temporary / WEIGHTS_FILE, _notes(export, metadata))
        for name, content in (
            (layouts.CONFIG_FILE, export.config),
            (layouts.PREPROCESSOR_FILE, hf_config.preprocessor(export.spec, dict(metadata))),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        if path.exists():
            # renamed first: what was there must not be lost if this is cut short
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
