"""Weights under the names of another program, and the files that hold them."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from simmim.backbone.build import Spec
from simmim.convert import hf, mmpretrain, official, timm_layout
from simmim.files import sync, write_atomic
from simmim.load import WEIGHTS_FILE, Weights, build_model, model_metadata

LAYOUTS = ("simmim", "official", "mmpretrain", "timm", "hf")

# What .pth files of other programs keep their weights under.
_WRAPPERS = {"official": "model", "mmpretrain": "state_dict"}


@dataclass(frozen=True)
class Export:
    """A checkpoint under another program's names.

    Attributes:
        layout: one of LAYOUTS.
        kind: "simmim", "classifier" or "encoder": what the target's model is.
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

    Decoder and mask token stay where the target has them.

    Raises:
        ValueError: the target has no model that computes the same; says which part.
    """
    state, spec, kind = weights.state, weights.spec, weights.kind
    if layout == "simmim":
        return Export(layout, kind, spec, dict(state), {})
    if layout == "official":
        renamed = official.to_finetuned(state) if kind == "classifier" else dict(state)
        return Export(layout, kind, spec, renamed, {})
    modules = {"hf": hf, "timm": timm_layout, "mmpretrain": mmpretrain}
    converted, config = modules[layout].from_ours(state, spec, kind, weights.metadata)
    left_out: list[str] = []
    if layout == "timm":
        left_out = [
            n for n in state if n.startswith("decoder.") or n == f"{official.PREFIX}mask_token"
        ]
        kind = "classifier" if kind == "classifier" else "encoder"
    elif layout == "hf" and kind == "simmim" and config["model_type"] == "beit":
        left_out, kind = [n for n in state if n.startswith("decoder.")], "encoder"
    return Export(layout, kind, spec, converted, config, tuple(left_out))


def write(export: Export, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write an export, whole or not at all: a folder for Hugging Face, else a file.

    Args:
        export: what to write.
        path: a folder for "hf"; else a .safetensors file, or .pth for plain tensors as torch.save
            writes them.
        metadata: of the weights: mean, std, classes.

    Raises:
        OSError: it cannot be written; what was at `path` is still there.
    """
    state = {name: tensor.contiguous() for name, tensor in export.state.items()}
    if export.layout == "hf":
        _write_folder(export, state, path, metadata)
        return
    if path.suffix in (".pth", ".pt", ".bin"):
        wrapper = _WRAPPERS.get(export.layout)
        content: Any = {wrapper: state} if wrapper else state
        write_atomic(path, lambda temporary: torch.save(content, temporary))
        return
    notes = {"format": "pt"}
    if export.layout == "simmim":
        notes |= _own_metadata(export, state, metadata)
    elif export.config:
        notes[export.layout] = json.dumps(export.config)
    write_atomic(path, lambda temporary: _save(state, temporary, notes))


def _own_metadata(
    export: Export, state: dict[str, Tensor], metadata: Mapping[str, Any]
) -> dict[str, str]:
    if export.kind == "encoder":
        return {}
    weights = Weights("", "simmim", export.kind, state, export.spec, dict(metadata))
    return model_metadata(build_model(weights), metadata.get("mask"))


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(state, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot be written: {error}") from None
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _write_folder(
    export: Export, state: dict[str, Tensor], path: Path, metadata: Mapping[str, Any]
) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _save(state, temporary / WEIGHTS_FILE, {"format": "pt"})
        for name, content in (
            ("config.json", export.config),
            ("preprocessor_config.json", hf.preprocessor(export.spec, dict(metadata))),
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
