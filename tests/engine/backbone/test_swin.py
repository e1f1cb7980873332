"""Swin: sizes that do not fit."""

from dataclasses import replace

import pytest

from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec

SWIN = SwinSpec(image_size=(32, 64), embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (36, 64)}, r"image_size: 36×64 px is no multiple .* nearest is 32×64"),
        ({"window_size": 3}, "window of 3 tokens does not fit .* nearest that fits is 2"),
        ({"num_heads": (3, 4)}, "num_heads: 3 does not divide the width 8 of stage 0"),
        ({"num_heads": (2,)}, "1 values for 2 stages"),
    ],
)
def test_swin_that_does_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(replace(SWIN, **change))
