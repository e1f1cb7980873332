"""Which packages each method is compared with, and the function that builds each peer."""

from collections.abc import Callable, Mapping

from bench.peers import convnet, simsiam, tokens, transformer
from bench.peers.peer import Peer
from simmim.backbone.build import Spec
from simmim.backbone.resnet import ResNetSpec

Builder = Callable[[Spec], Peer]


def build_timm(spec: Spec) -> Peer:
    """timm's model for SimMIM with a mask unit.

    Raises:
        Unavailable: timm is not installed, or has no model of this architecture.
    """
    module = convnet if isinstance(spec, ResNetSpec) else transformer
    return module.build_timm(spec)


# A builder raises Unavailable if its package is not installed or has no such model.
PEERS: Mapping[str, Mapping[str, Builder]] = {
    "simmim": {
        "torchvision": convnet.build_torchvision,
        "timm": build_timm,
        "transformers": transformer.build_transformers,
        "lightly": tokens.build_lightly,
    },
    "tokens": {
        "timm": tokens.build_timm,
        "transformers": transformer.build_transformers,
        "lightly": tokens.build_lightly,
    },
    "simsiam": {"lightly": simsiam.build_lightly},
}

PACKAGES = ("torchvision", "timm", "transformers", "lightly")
