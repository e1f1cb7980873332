"""`import simmim`: the public names, each of which is loaded from its home on first use."""

import subprocess
import sys
from importlib import import_module

import pytest

import simmim
from forked_command import ENVIRONMENT
from simmim.version import __version__

HOMES = {
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


def test_the_public_names_are_listed() -> None:
    assert dir(simmim) == sorted(simmim.__all__) == sorted([*HOMES, "__version__"])
    assert simmim.__version__ == __version__
    with pytest.raises(AttributeError, match="module 'simmim' has no attribute 'nothing'"):
        _ = simmim.nothing


@pytest.mark.parametrize(("name", "home"), HOMES.items())
def test_a_public_name_is_that_of_its_home(name: str, home: str) -> None:
    assert getattr(simmim, name) is getattr(import_module(home), name)


def test_nothing_heavy_is_loaded_before_its_use() -> None:
    code = "import sys, simmim; dir(simmim); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
