"""simmim: masked-image-modelling pre-training. Heavy parts load on first use."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SimMIM", "__version__", "load_model"]

if TYPE_CHECKING:
    from simmim.load import load_model
    from simmim.method.simmim import SimMIM

_HOMES = {"SimMIM": "simmim.method.simmim", "load_model": "simmim.load"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'simmim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
