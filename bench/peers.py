"""The other packages that a method is compared with, by the name of their row."""

from collections.abc import Callable, Mapping

import peers_convnet
import peers_simsiam
import peers_tokens
import peers_transformer
from peer import Peer
from simmim.backbone.build import Spec
from simmim.backbone.resnet import ResNetSpec

Builder = Callable[[Spec], Peer]


def build_timm(spec: Spec) -> Peer:
    """timm's model for SimMIM with a mask unit.

    Raises:
        peer.Unavailable: timm is not installed, or the model has no pair in it.
    """
    package = peers_convnet if isinstance(spec, ResNetSpec) else peers_transformer
    return package.build_timm(spec)


# Builders raise peer.Unavailable where a package is not installed, or has no such model.
PEERS: Mapping[str, Mapping[str, Builder]] = {
    "simmim": {
        "torchvision": peers_convnet.build_torchvision,
        "timm": build_timm,
        "transformers": peers_transformer.build_transformers,
        "lightly": peers_tokens.build_lightly,
    },
    "tokens": {
        "timm": peers_tokens.build_timm,
        "transformers": peers_transformer.build_transformers,
        "lightly": peers_tokens.build_lightly,
    },
    "simsiam": {"lightly": peers_simsiam.build_lightly},
}

PACKAGES = ("torchvision", "timm", "transformers", "lightly")
