"""Collect the photos that scikit-image ships: python examples/skimage_photos.py FOLDER."""

import sys
from pathlib import Path

import skimage
from PIL import Image

PHOTOS = (
    "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png "
    "grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png "
    "motorcycle_right.png retina.jpg rocket.jpg"
).split()


SHORT_SIDE = 160  # pixels; the demo trains on small crops, and big PNGs decode slowly


def collect(folder: Path) -> list[Path]:
    """Write small copies of the photos that this scikit-image has; return their paths."""
    shipped = Path(skimage.__file__).parent / "data"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in PHOTOS:
        if not (shipped / name).is_file():
            continue
        with Image.open(shipped / name) as photo:
            factor = SHORT_SIDE / min(photo.size)
            size = (round(photo.width * factor), round(photo.height * factor))
            small = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        written.append(folder / f"{Path(name).stem}.jpg")
        small.save(written[-1], quality=95)
    if not written:
        raise SystemExit(f"{shipped} holds none of the expected photos: another scikit-image?")
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(f"{len(collect(Path(sys.argv[1])))} photos in {sys.argv[1]}")
