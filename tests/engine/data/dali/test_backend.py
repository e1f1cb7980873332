"""Which backend decodes, and why."""

import sys

import pytest
import torch

from dali_pipelines import CPU
from simmim.data.dali import backend
from simmim.data.dali.backend import choose_backend
from simmim.errors import DataError

needs_dali = pytest.mark.skipif(bool(backend.missing_reason()), reason=backend.missing_reason())


def test_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    backend.import_dali.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    try:
        assert backend.missing_reason()
        name, reason = choose_backend("auto", cuda)
        assert name == "cpu"
        assert "NVIDIA DALI is missing (" in reason
        with pytest.raises(DataError, match=r"pip install 'simmim\[dali\]' \(.*nvidia.dali.*\)$"):
            choose_backend("dali", CPU)
        name, reason = choose_backend("auto", CPU)
        assert name == "cpu"
        assert "CUDA" in reason
        assert choose_backend("cpu", cuda)[0] == "cpu"
        with pytest.raises(DataError, match=r"1 or 3 channels, not 4; use data\.backend=cpu"):
            choose_backend("dali", CPU, channels=4)
        name, reason = choose_backend("auto", cuda, channels=12)
        assert name == "cpu"
        assert "not 12" in reason
    finally:
        backend.import_dali.cache_clear()


@needs_dali
def test_choice_of_dali() -> None:
    for requested, device in (("auto", torch.device("cuda")), ("dali", CPU)):
        name, reason = choose_backend(requested, device, channels=1)
        assert name == "dali"
        assert reason.startswith("DALI ")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("no driver"), "no driver"), (OSError(), "OSError"), (ImportError("x"), "x")],
)
def test_a_dali_that_breaks_while_it_is_imported_is_missing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def broken(module: str) -> None:
        raise error

    backend.import_dali.cache_clear()
    monkeypatch.setattr(backend.importlib, "import_module", broken)
    try:
        assert backend.import_dali() == (None, reason)
        assert choose_backend("auto", torch.device("cuda")) == (
            "cpu", f"NVIDIA DALI is missing ({reason})",
        )  # fmt: skip
    finally:
        monkeypatch.undo()
        backend.import_dali.cache_clear()
