"""The `simmim convert` command."""

import argparse
from pathlib import Path

from simmim.commands.errors import one_line_errors
from simmim.weights.export import Export, strange_files, to_layout, write
from simmim.weights.layouts import LAYOUTS
from simmim.weights.load import Weights, read_model
from simmim.weights.proof import prove, prove_source

EPILOGUE = """\
IN is a weights file (safetensors, or torch.save's with plain tensors), a run or checkpoint folder,
or a folder with config.json. Whose names it has is told by the names.

layouts:
  simmim      ours: the published names, and the architecture inside
  official    microsoft/SimMIM: pre-trained (encoder.…, decoder.…) or fine-tuned (no prefix)
  mmpretrain  open-mmlab: Swin, with its order of merged channels
  timm        Swin and SwinV2; ViT, and BEiT for a ViT with relative positions. No decoder, no mask
              token. Architecture and arguments of timm.create_model lie in the metadata "timm"
              ResNet, ConvNeXt, and whatever was trained as timm:NAME, with running statistics
  torchvision ResNet and ConvNeXt, with running statistics. No decoder, no mask token
  hf          transformers: a folder with config.json; Swin, SwinV2, ViT, and BEiT for a ViT with
              relative positions, without decoder

What a target has no place for is left out and named. Where its model would compute something else,
nothing is written. Before anything is written, the export is read back bit for bit, and the other
library's model is built from it and compared with ours on random images, where that library is
installed (pip install 'simmim[convert]'); elsewhere names and shapes are compared.
"""

_PICKLED = (".pth", ".pt", ".bin")


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim convert`."""
    made = argparse.ArgumentParser(
        prog="simmim convert",
        description="Convert checkpoints to and from the layouts of other programs, with proof.",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("source", metavar="IN", help="checkpoint")
    add("target", metavar="OUT", type=Path, help="file to write (.safetensors, .pth); hf: a folder")
    add("--to", choices=LAYOUTS, required=True, help="layout to write")
    add("--from", dest="layout", choices=LAYOUTS, help="layout of IN (default: as its names tell)")
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width")
    add("--num-heads", type=int, help="heads of a ViT without a position table")
    add("--window-size", type=int, help="of a SwinV2 without buffers, in tokens")
    add("--no-proof", action="store_true", help="write without checking")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    return made


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    reader = parser()
    options = reader.parse_args(arguments)
    _check_target(options.target, options.to, options.overwrite)
    size = options.image_size
    if size is not None and len(size) > 2:
        reader.error("--image-size takes one or two numbers")
    weights = read_model(
        options.source,
        size if size is None or len(size) == 2 else size[0],
        num_heads=options.num_heads,
        window_size=options.window_size,
        layout=options.layout,
    )
    _check_hints(weights, num_heads=options.num_heads, window_size=options.window_size)
    try:
        export = to_layout(weights, options.to)
        lines = _proofs(weights, export) if not options.no_proof else ["not checked"]
    except ValueError as error:
        raise ValueError(f"{options.source}: {error}") from None
    write(export, options.target, weights.metadata)
    for line in lines:
        print(f"{weights.layout} → {options.to}: {line}")
    if dropped := weights.metadata.get("dropped"):
        print(f"left out, there is no place here: {', '.join(sorted(dropped))}")
    if export.left_out:
        print(f"left out, {options.to} has no place: {', '.join(sorted(export.left_out))}")
    print(options.target)
    return 0


def _check_target(target: Path, layout: str, overwrite: bool) -> None:
    folder = layout == "hf"
    if folder and (target.suffix in (".safetensors", *_PICKLED) or target.is_file()):
        raise ValueError(f"{target}: --to=hf writes a folder; give the name of one")
    if not folder and target.suffix not in (".safetensors", *_PICKLED):
        raise ValueError(f"{target}: --to={layout} writes a file; call it NAME.safetensors or .pth")
    if not folder and target.is_dir():
        raise ValueError(f"{target} is a folder; choose another OUT")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; choose another OUT or add --overwrite")
    if folder and target.exists() and (others := strange_files(target)):
        raise ValueError(
            f"{target} holds other files ({', '.join(others[:3])}), which --overwrite would "
            "remove; choose another OUT"
        )


def _check_hints(weights: Weights, **hints: int | None) -> None:
    """Raise ValueError for a hint that the architecture, which the file tells, does not follow."""
    for name, value in hints.items():
        own = getattr(weights.spec, name, None)
        if value is not None and value != own:
            has = f"no {name}" if own is None else f"{name}={own}"
            flag = f"--{name.replace('_', '-')}={value}"
            raise ValueError(
                f"{weights.source}: {flag}, but its {weights.spec.arch} has {has}; leave it out"
            )


def _proofs(weights: Weights, export: Export) -> list[str]:
    """A line for the export; before it, where IN is of another program, one for how it was read."""
    lines = []
    if weights.layout != export.layout and (source := prove_source(weights)) is not None:
        lines.append(f"IN: {source.line()}")
    return [*lines, prove(weights, export).line()]
