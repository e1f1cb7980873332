"""Members of a shard: written, indexed for DALI, and checked."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

from simmim.data.names import printable
from simmim.data.shard_index import ShardIndex


def write_member(file: io.BufferedWriter, name: str, data: bytes) -> int:
    """Append a member to a tar file; returns the offset of its data.

    Date and owner are zero: the same images make the same bytes.
    """
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    file.write(header.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data)
    file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset


def dali_index(index: ShardIndex) -> str:
    """The shard's index in the format of DALI's wds2idx, version 1.2."""
    lines = [f"v1.2 {len(index.name)}"]
    for row, (name, offset, size) in enumerate(zip(index.name, index.offset, index.size)):
        key, _, extension = name.partition(".")
        line = f"{extension} {offset} {size} {name}"
        label = -1 if index.label is None else index.label[row]
        if label >= 0:
            line += f" cls {label_offset(offset, size)} {len(str(label))} {key}.cls"
        lines.append(line)
    return "\n".join(lines) + "\n"


def label_offset(offset: int, size: int) -> int:
    """Where the data of the member after an image begins, bytes."""
    return offset + size + -size % tarfile.BLOCKSIZE + tarfile.BLOCKSIZE


def check_members(shard: Path, index: ShardIndex) -> list[str]:
    """Where a tar file's members differ from what its index says: a line for each difference."""
    problems = []
    place_of: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.size < 0:
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                if member.name in place_of or not member.isreg():
                    problems.append(f"{printable(member.name)}: there twice, or no file")
                place_of[member.name] = member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        problems.append(f"not a whole tar file: {error}")
    with shard.open("rb") as file:
        for row, name in enumerate(index.name):
            offset, size = index.offset[row], index.size[row]
            place = place_of.pop(name, None)
            if place != (offset, size):
                problems.append(f"{name}: " + ("missing" if place is None else f"is at {place}"))
            digest = hashlib.sha256(os.pread(file.fileno(), size, offset)).hexdigest()
            if digest != index.sha256[row]:
                problems.append(f"{name}: damaged, its bytes have another sha256")
            label = -1 if index.label is None else index.label[row]
            if label >= 0:
                text = str(label).encode()
                place = place_of.pop(f"{name.partition('.')[0]}.cls", None)
                offset = label_offset(offset, size)
                if (
                    place != (offset, len(text))
                    or os.pread(file.fileno(), len(text), offset) != text
                ):
                    problems.append(f"{name}: its label is not {label}")
    return problems + [f"{printable(name)}: not in the index" for name in place_of]
