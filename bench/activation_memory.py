"""Memory that an encoder keeps for the backward pass, counted on fake tensors of any size.

    python bench/activation_memory.py swinv2_huge swinv2_giant --size 192

Counts the tensors that the engine's ops save in a forward pass under bfloat16 autocast, with and
without activation checkpointing. Weights, gradients, optimiser state and the memory that a block
needs while it runs are not counted. Fake tensors take no memory and compute nothing.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.measuring.saved_tensors import saved_tensors
from simmim.backbone.build import PRESETS, Spec, build_encoder


@dataclass(frozen=True)
class Footprint:
    """Sizes of an encoder.

    Attributes:
        parameters: number of weights that train.
        saved_bytes: bytes per image that the forward pass keeps for the backward pass.
        checkpointed_bytes: the same with activation checkpointing.
    """

    parameters: int
    saved_bytes: int
    checkpointed_bytes: int


def footprint(spec: Spec, backend: str | None = None) -> Footprint:
    """Count the weights and the saved bytes of an encoder; nothing of its size is allocated."""
    with torch.device("meta"):  # the constructor draws random weights, fake tensors cannot be drawn
        encoder = build_encoder(spec).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.to_empty(device="cpu")
        encoder.backends = encoder.backends._replace(ops=backend, attention=backend)
        saved = []
        for checkpointing in (False, True):
            encoder.activation_checkpointing = checkpointing
            # the difference of two batches, in which casts of weights and position tables cancel
            saved.append(saved_bytes(encoder, 2) - saved_bytes(encoder, 1))
    return Footprint(sum(p.numel() for p in encoder.parameters()), *saved)


def saved_bytes(encoder: Any, batch: int) -> int:
    """Bytes that a forward pass saves, including the weights that it uses."""
    spec = encoder.spec
    image = torch.empty(batch, spec.channels, *spec.image_size)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            features: Tensor = encoder(image)
        return features

    storages = [tensor.untyped_storage() for tensor in saved_tensors(forward)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def main() -> None:
    """Print a line for every preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="+", choices=sorted(PRESETS))
    parser.add_argument(
        "--size", type=int, default=192, help="side of the image in pixels (default: %(default)s)"
    )
    options = parser.parse_args()
    print(f"{'encoder':<16} {'parameters':>12} {'saved/image':>14} {'checkpointed':>14}")
    for name in options.preset:
        sizes = footprint(replace(PRESETS[name], image_size=(options.size, options.size)))
        print(
            f"{name:<16} {sizes.parameters / 1e6:>10.1f} M {sizes.saved_bytes / 2**20:>10.1f} MiB "
            f"{sizes.checkpointed_bytes / 2**20:>10.1f} MiB"
        )


if __name__ == "__main__":
    main()
