"""Without timm the message says what to install."""

import sys
from typing import Any

import pytest

from labelled_images import BANDS, COLOUR, image_for
from simmim.data import timm_import
from simmim.data.finetune_views import EvaluationView, TrainingView
from simmim.data.mixing import Mixing
from simmim.errors import RunError


def test_a_missing_timm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist\nat …")

    absent: Any = None
    for patch in (
        lambda: monkeypatch.setitem(sys.modules, "timm.data", absent),
        lambda: monkeypatch.setattr(timm_import, "import_module", missing),
    ):
        patch()
        for wants_timm in (lambda: TrainingView(COLOUR, 0), lambda: Mixing(10, 0)):
            with pytest.raises(RunError, match=r"pip install 'simmim\[finetune\]'") as caught:
                wants_timm()
            assert "\n" not in str(caught.value)
    # neither what is tested on nor other channels need it
    EvaluationView(COLOUR)(image_for(COLOUR))
    TrainingView(BANDS, 0)(image_for(BANDS), 0, 0)
