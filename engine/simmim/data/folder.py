"""Images of a folder, and some images of another source."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.data.source import PackedStrings, Source, is_array, is_image, read_file
from simmim.run_folder import RunFolder


class FolderSource:
    """Every image file below a folder, in the order of their relative paths.

    A folder without images but with .npy files is one of arrays.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._prefix = root, os.path.join(root, "")
        images: list[str] = []
        arrays: list[str] = []
        seen: set[tuple[int, int]] = set()  # links may lead in circles
        for folder, subfolders, files in os.walk(root, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            if RunFolder(Path(folder)).is_started:  # a run's own pictures are no photos
                subfolders.clear()
                continue
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            relative = os.path.relpath(folder, root)
            prefix = "" if relative == "." else relative + "/"
            images += [prefix + name for name in files if is_image(name)]
            arrays += [prefix + name for name in files if is_array(name)]
        self.names = PackedStrings(sorted(images or arrays))

    def read(self, index: int) -> bytes:
        return read_file(f"{self._prefix}{self.names[index]}")


class SelectedSource:
    """Some images of another source, numbered from 0 in the given order.

    Args:
        source: the other one.
        samples: numbers of its images.
    """

    def __init__(self, source: Source, samples: NDArray[np.int64]) -> None:
        self.source, self.samples = source, samples
        self.names = PackedStrings([source.names[sample] for sample in samples.tolist()])

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.samples[index]))
