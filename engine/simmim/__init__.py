"""simmim: masked-image-modelling pre-training. Heavy parts load on first use."""

from typing import TYPE_CHECKING, Any

from simmim.version import __version__

__all__ = [
    "Classifier",
    "Prediction",
    "SimMIM",
    "__version__",
    "extract_features",
    "load_encoder",
    "load_model",
    "predict",
    "push_to_hub",
    "save_pretrained",
]

if TYPE_CHECKING:
    from simmim.downstream.features import extract_features
    from simmim.downstream.predict import Prediction, predict
    from simmim.method.simmim import SimMIM
    from simmim.model.classifier import Classifier
    from simmim.sharing.hub import load_encoder, load_model, push_to_hub
    from simmim.sharing.model_folder import save_pretrained

_HOMES = {
    "Classifier": "simmim.model.classifier",
    "Prediction": "simmim.downstream.predict",
    "SimMIM": "simmim.method.simmim",
    "extract_features": "simmim.downstream.features",
    "load_encoder": "simmim.sharing.hub",
    "load_model": "simmim.sharing.hub",
    "predict": "simmim.downstream.predict",
    "push_to_hub": "simmim.sharing.hub",
    "save_pretrained": "simmim.sharing.model_folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'simmim' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
