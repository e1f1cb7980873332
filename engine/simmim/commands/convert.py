"""The `simmim convert` command."""

import argparse
from pathlib import Path

from simmim.commands.arguments import one_line_errors
from simmim.convert.export import LAYOUTS, to_layout, write
from simmim.convert.proof import prove
from simmim.load import read_model

EPILOGUE = """\
IN is a weights file (safetensors, or torch.save's with plain tensors), a run or checkpoint folder,
or a folder with config.json. Whose names it has is told by the names.

layouts:
  simmim      ours: safetensors with the architecture inside
  official    microsoft/SimMIM: pre-trained (encoder.…, decoder.…) or fine-tuned (no prefix)
  mmpretrain  open-mmlab: Swin, with its order of merged channels
  timm        Swin and SwinV2; BEiT for a ViT. No decoder, no mask token
  hf          transformers: a folder with config.json; Swin, SwinV2, ViT, BEiT

Before anything is written, the export is read back bit for bit, and the other library's model is
built from it and compared with ours on random images, where that library is installed
(pip install 'simmim[convert]'); elsewhere names and shapes are compared.
"""


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="simmim convert",
        description="Convert checkpoints to and from the layouts of other programs, with proof.",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="IN", help="checkpoint")
    add("target", metavar="OUT", type=Path, help="file to write (.safetensors, .pth); hf: a folder")
    add("--to", choices=LAYOUTS, required=True, help="layout to write")
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width")
    add("--num-heads", type=int, help="heads of a ViT without a position table")
    add("--no-proof", action="store_true", help="write without checking")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    options = parser.parse_args(arguments)
    target: Path = options.target
    if target.exists() and not options.overwrite:
        raise ValueError(f"{target} exists; choose another OUT or add --overwrite")
    if options.to == "hf" and (target.suffix or (target.exists() and not target.is_dir())):
        raise ValueError(f"{target}: --to=hf writes a folder; leave out {target.suffix}")
    if options.to != "hf" and target.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(f"{target}: --to={options.to} writes a file; call it NAME.safetensors")
    size = options.image_size
    if size is not None and len(size) > 2:
        parser.error("--image-size takes one or two numbers")
    weights = read_model(
        options.source,
        size if size is None or len(size) == 2 else size[0],
        num_heads=options.num_heads,
    )
    try:
        export = to_layout(weights, options.to)
        line = "not checked" if options.no_proof else prove(weights, export).line()
    except ValueError as error:
        raise ValueError(f"{options.source}: {error}") from None
    write(export, target, weights.metadata)
    print(f"{weights.layout} → {options.to}: {line}")
    dropped = [*export.left_out, *weights.metadata.get("dropped", [])]
    if dropped:
        print(f"left out, {options.to} has no place: {', '.join(sorted(dropped))}")
    print(target)
    return 0
