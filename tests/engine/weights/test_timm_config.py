"""timm's configurations: what they tell, and heads that read a class token."""

from typing import Any

import pytest
import torch

from simmim.weights.our_names import Converted
from simmim.weights.timm_config import hints_of_config, without_class_token_head


def test_arguments_stand_above_the_pretrained_size() -> None:
    windows = {"window_size": 4, "pretrained_window_sizes": [2, 2]}
    pretrained = {"input_size": [3, 32, 64], "mean": [0.1], "std": [0.2], "url": "x"}
    hints, metadata = hints_of_config(
        {"model_args": {"img_size": 96, "num_heads": 3, **windows}, "pretrained_cfg": pretrained}
    )
    assert hints == {"image_size": (96, 96), "num_heads": 3, **windows}
    assert metadata == {"mean": [0.1], "std": [0.2]}
    assert hints_of_config({"pretrained_cfg": pretrained})[0]["image_size"] == (32, 64)
    assert hints_of_config({"model_args": {"img_size": [48, 64]}})[0]["image_size"] == (48, 64)


def test_heads_of_stages_are_no_hint_and_nothing_tells_nothing() -> None:
    assert "num_heads" not in hints_of_config({"model_args": {"num_heads": [1, 2]}})[0]
    hints, metadata = hints_of_config({})
    assert set(hints.values()) == {None}
    assert metadata == {}


HEAD = {"head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
BODY = {"encoder.norm.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("extra", "config", "kept"),
    [
        ({}, {}, False),
        ({}, {"global_pool": "token"}, False),
        ({}, {"global_pool": "avg"}, True),
        ({}, {"model_args": {"global_pool": "avg"}}, True),
        ({"fc_norm.weight": torch.zeros(1)}, {}, True),
    ],
)
def test_a_head_that_reads_the_class_token_is_dropped_and_named(
    extra: dict[str, Any], config: dict[str, Any], kept: bool
) -> None:
    given = Converted(BODY | HEAD | extra, {"image_size": (8, 8)}, {"mean": [0.5]})
    found = without_class_token_head(given, config)
    if kept:
        assert found is given
        return
    assert found.state.keys() == BODY.keys()
    assert found.hints == given.hints
    assert found.metadata == {"mean": [0.5], "dropped": list(HEAD)}
