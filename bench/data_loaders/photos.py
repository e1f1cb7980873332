"""The photos of bench/data.py, in the forms that the loaders read."""

import sys
import tarfile
from pathlib import Path

from simmim.data.decode import UnreadableImage, read_header
from simmim.data.open import open_source
from simmim.errors import DataError
from simmim.packing.options import Options
from simmim.packing.pack import pack

# Suffix of rows that read packed photos.
PACKED = "-packed"


def prepare_photos(source: Path, work: Path) -> dict[str, Path]:
    """Write the photos as a class folder and as tar shards, both as they are and packed small.

    Photos that are no JPEGs, or that not every loader can read, are left out and counted on
    standard error.

    Returns:
        The folder with both forms, by the suffix of the rows that read it.
    """
    images = open_source(str(source))
    raw = work / "raw" / "folder" / "class"
    raw.mkdir(parents=True)
    (work / "raw" / "shards").mkdir()
    left_out = 0
    with tarfile.open(work / "raw" / "shards" / "000000.tar", "w") as archive:
        for index in range(len(images.names)):
            try:
                data = images.read(index)
                plain = read_header(data).plain
            except (UnreadableImage, OSError):
                plain = False
            if not plain:
                left_out += 1
                continue
            path = raw / f"{index:08d}.jpg"
            path.write_bytes(data)
            archive.add(path, path.name)
    if not any(raw.iterdir()):
        raise DataError(f"{source}: no JPEG that every loader reads")
    if left_out:
        print(f"{left_out} of {len(images.names)} images left out: no plain JPEG", file=sys.stderr)
    pack(open_source(str(raw)), work / "packed" / "shards", Options(short_side=256, quality=90))
    small = work / "packed" / "folder" / "class"
    small.mkdir(parents=True)
    for shard in sorted((work / "packed" / "shards").glob("*.tar")):
        with tarfile.open(shard) as archive:
            archive.extractall(small, filter="data")
    return {"": work / "raw", PACKED: work / "packed"}
