"""What a packed folder says of how its images were packed."""

import json
from pathlib import Path

import pytest

from simmim.packing.dataset_file import (
    channels_of,
    common_channels,
    value_range_of,
    write_dataset,
)
from simmim.packing.options import Options


@pytest.mark.parametrize(
    ("numbers", "common"),
    [
        (set(), None), ({1}, 1), ({3}, 3), ({7}, 7), ({1, 3}, 3), ({3, 4}, None), ({1, 4}, None),
        ({1, 3, 4}, None),
    ],
)  # fmt: skip
def test_grey_counts_as_colour_among_colour(numbers: set[int], common: int | None) -> None:
    assert common_channels(numbers) == common


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (Options(value_range=(-1, 2.5)).to_json(), (-1.0, 2.5)),
        (Options().to_json(), None),
        ({}, None),
        ({"value_range": [1]}, None),
        ({"value_range": ["low", "high"]}, None),
    ],
)
def test_the_range_of_values_is_read_back(options: dict, found: object) -> None:
    assert value_range_of(json.loads(json.dumps({"options": options}))) == found


@pytest.mark.parametrize(
    ("given", "found"), [(7, 7), (1, 1), (None, None), (0, None), (True, None), ("3", None)]
)
def test_the_number_of_channels_is_read_back(given: object, found: int | None) -> None:
    assert channels_of({"options": {"channels": given}}) == found
    assert channels_of({"options": {}}) is None


def test_what_is_written_is_read(tmp_path: Path) -> None:
    dataset = {
        "format": "simmim-shards", "version": 1, "images": 1, "shards": 1, "channels": 3,
        "options": Options().to_json(), "classes": None, "mean": None, "std": None, "skipped": 0,
        "plan": "x",
    }  # fmt: skip
    write_dataset(tmp_path, dataset)
    assert json.loads((tmp_path / "dataset.json").read_text()) == dataset
