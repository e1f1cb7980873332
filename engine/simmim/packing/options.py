"""What decides over the bytes of a packed folder, besides its source."""

from dataclasses import asdict, dataclass
from typing import Any

from simmim.data.decode import MAX_PIXELS


@dataclass(frozen=True)
class Options:
    """What decides over the bytes of a pack, besides its source.

    Attributes:
        short_side: pixels that the shorter side has at most; None where originals are kept.
        quality: of JPEGs that are encoded.
        keep_originals: keep every image's bytes, once it has been decoded.
        images_per_shard: places of the plan that make a shard.
        shuffle: seed of the order; None keeps the source's.
        max_pixels: larger images are skipped before they are decoded.
        value_range: the values that become 0 and 255 where files hold other than 8 bits.
        channels: that every image is given; None keeps each file's own.
    """

    short_side: int | None = 256
    quality: int = 90
    keep_originals: bool = False
    images_per_shard: int = 4096
    shuffle: int | None = None
    max_pixels: int = MAX_PIXELS
    value_range: tuple[float, float] | None = None
    channels: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The options as dataset.json holds them."""
        return asdict(self) | {"value_range": self.value_range and list(self.value_range)}
