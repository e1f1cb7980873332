"""From [model] keys to an architecture, or to one line that says what does not fit."""

import pytest

from simmim.command_line import load
from simmim.config.sections import Config
from simmim.errors import ConfigError


def parse(*flags: str, recipe: str = "smoke") -> Config:
    return load([recipe, "--data.path=photos", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.window_size=5"], "model.window_size: a window of 5 tokens does not fit"),
        (
            ["--data.image_size=65"],
            "data.image_size: 65×65 px is no multiple of the encoder stride 8",
        ),
        (["--model.num_heads=[3,4]"], "model.num_heads: 3 does not divide the width 16"),
        (["--model.layer_scale=0.1"], "model.layer_scale has no meaning for swin_tiny"),
        (["--model.name=swin_bse"], "model.name=swin_bse is unknown; did you mean swin_base?"),
    ],
)
def test_what_makes_no_architecture(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
