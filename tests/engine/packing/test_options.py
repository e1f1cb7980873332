"""What decides over the bytes of a pack, as dataset.json holds it."""

import json

from simmim.packing.options import Options


def test_every_option_is_written_under_its_name() -> None:
    options = Options(
        short_side=32, quality=7, keep_originals=True, images_per_shard=9, shuffle=4,
        max_pixels=99, value_range=(0, 5), channels=2,
    )  # fmt: skip
    written = options.to_json()
    assert json.loads(json.dumps(written)) == written  # a tuple would come back as a list
    assert written == {
        "short_side": 32, "quality": 7, "keep_originals": True, "images_per_shard": 9,
        "shuffle": 4, "max_pixels": 99, "value_range": [0, 5], "channels": 2,
    }  # fmt: skip


def test_the_defaults_are_those_of_the_command() -> None:
    assert Options().to_json() == {
        "short_side": 256, "quality": 90, "keep_originals": False, "images_per_shard": 4096,
        "shuffle": None, "max_pixels": 2**27, "value_range": None, "channels": None,
    }  # fmt: skip
