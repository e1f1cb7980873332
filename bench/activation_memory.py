"""What encoders keep for the backward, counted without memory or arithmetic: on fake tensors.

    python bench/activation_memory.py swinv2_huge swinv2_giant --size 192

Counts the tensors that a forward pass under bfloat16 autocast saves through the engine's own ops,
with and without activation checkpointing. Weights, gradients, optimiser state and what a block
needs while it runs are not among them.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from simmim.backbone.build import PRESETS, Spec, build_encoder


@dataclass(frozen=True)
class Footprint:
    """Sizes of an encoder.

    Attributes:
        parameters: numbers that train.
        saved_bytes: what the forward keeps for the backward, of every image.
        recomputed_bytes: the same with activation checkpointing.
    """

    parameters: int
    saved_bytes: int
    recomputed_bytes: int


def footprint(spec: Spec, backend: str | None = None) -> Footprint:
    """Count an encoder of any size; nothing of its size is allocated."""
    with torch.device("meta"):  # weights are drawn, which fake tensors cannot be
        encoder = build_encoder(spec).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.to_empty(device="cpu")
        encoder.backends = encoder.backends._replace(ops=backend, attention=backend)
        kept = []
        for recompute in (False, True):
            encoder.activation_checkpointing = recompute
            # the difference of two batches: casts of weights and position tables drop out
            kept.append(saved_bytes(encoder, 2) - saved_bytes(encoder, 1))
    return Footprint(sum(p.numel() for p in encoder.parameters()), *kept)


def saved_bytes(encoder: Any, batch: int) -> int:
    """Bytes that a forward pass saves, weights that it uses included."""
    spec = encoder.spec
    image = torch.empty(batch, spec.channels, *spec.image_size)
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # until they are counted, so that no storage is known by another's id

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    saving = saved_tensors_hooks(keep, lambda tensor: tensor)
    with saving, torch.autocast("cpu", torch.bfloat16):
        features = encoder(image)
    del features
    return sum(sizes.values())


def main() -> None:
    """Print a line for every preset that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="+", choices=sorted(PRESETS))
    parser.add_argument("--size", type=int, default=192, help="side of the image in pixels")
    given = parser.parse_args()
    print(f"{'encoder':<16} {'parameters':>12} {'saved/image':>14} {'checkpointed':>14}")
    for name in given.preset:
        found = footprint(replace(PRESETS[name], image_size=(given.size, given.size)))
        print(
            f"{name:<16} {found.parameters / 1e6:>10.1f} M {found.saved_bytes / 2**20:>10.1f} MiB "
            f"{found.recomputed_bytes / 2**20:>10.1f} MiB"
        )


if __name__ == "__main__":
    main()
