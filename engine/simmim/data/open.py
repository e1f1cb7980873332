"""The source of images that a path means."""

import os
from pathlib import Path

from simmim.data.folder import FolderSource
from simmim.data.shard_index import is_pack
from simmim.data.shards import ShardSource
from simmim.data.source import EXTENSIONS, PARQUET_EXTENSION, Source
from simmim.errors import PathError


def open_source(path: str) -> Source:
    """The images that a path means.

    Args:
        path: a folder of images in any layout, a folder of .tar shards, one .tar file, or a folder
            that `simmim pack` made.

    Raises:
        PathError: nothing is there, or no image in it.
        DataError: a shard or a packed folder is damaged; names the file.
    """
    root = Path(os.path.expanduser(path))
    if not root.exists():
        raise PathError(f"{path}: no such file or folder")
    source: Source
    if root.is_file() and root.suffix != PARQUET_EXTENSION:
        source = ShardSource([root])
    elif is_pack(root):
        source = ShardSource.of_pack(root)
    else:
        source = FolderSource(root)
        if not len(source.names):
            shards = sorted(p for p in root.rglob("*.tar") if p.is_file())
            source = ShardSource(shards)
    if not len(source.names):
        if root.suffix == PARQUET_EXTENSION or next(root.rglob(f"*{PARQUET_EXTENSION}"), None):
            raise PathError(
                f"{path}: parquet has no random access; `simmim pack {path} FOLDER` "
                "makes a folder that has, once and for all"
            )
        some = " ".join(sorted(EXTENSIONS)[:12])
        raise PathError(f"{path}: no image and no .tar shard of images in it ({some} …)")
    return source
