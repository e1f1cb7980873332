"""The `simmim models` command."""

import argparse
import json

from simmim.backbone.build import PRESETS
from simmim.commands.errors import one_line_errors
from simmim.commands.model_table import Entry, model_table
from simmim.method.build import methods

EPILOGUE = """\
MACs are the multiply-accumulates of one image's forward pass through the encoder, at the size that
is printed beside them: those of convolutions, linear layers and attention. (Of SimMIM with
Swin-B, 11.39 G at 192 px with its head; the 18.83 G often quoted are those at 224 px, where its
windows of 6 are padded.)
Any convolutional model of timm is a backbone too: simmim models timm:NAME
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of `simmim models`."""
    made = argparse.ArgumentParser(
        prog="simmim models",
        description="Every backbone × method: parameters, MACs, checkpoint layouts.",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("names", nargs="*", metavar="NAME", help="backbones (default: all)")
    add("--image-size", type=int, metavar="PIXELS", help="side (default: each one's own)")
    add("--json", action="store_true", help="print JSON")
    return made


@one_line_errors
def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    reader = parser()
    options = reader.parse_args(arguments)
    if options.image_size is not None and options.image_size < 1:
        reader.error(f"--image-size={options.image_size} must be at least 1")
    entries = model_table(options.names, options.image_size)
    if options.json:
        print(json.dumps([entry.as_dict() for entry in entries], indent=1))
        return 0
    width = max(map(len, options.names or PRESETS)) + 2
    columns = "".join(f"{name:>10}" for name in methods())
    print(f"{'backbone':<{width}}{'px':>5}{'GMACs':>8}{'encoder':>10}{columns}  layouts")
    for entry in entries:
        print(f"{entry.name:<{width}}{_row(entry)}", flush=True)
    print("\nparameters of the encoder, and of the module that trains, by method:")
    for name, method in methods().items():
        print(f"  {name:<8} {method.purpose}")
    return 0


def _row(entry: Entry) -> str:
    totals = [_millions(entry.methods[m]) if m in entry.methods else "–" for m in methods()]
    counts = "".join(f"{total:>10}" for total in (_millions(entry.parameters), *totals))
    side, macs = entry.image_size[0], entry.macs / 1e9
    return f"{side:>5}{macs:>8.2f}{counts}  {' '.join(entry.layouts)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
