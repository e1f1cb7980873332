"""Images of a shard are found again, by us and by any reader of tar files."""

import hashlib
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from simmim.data.shard_index import ShardIndex, read_index
from simmim.packing.members import check_members, dali_index, label_offset, write_member

# Around the tar format's blocks of 512 bytes.
BYTES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([511, 512, 513, 1024, 1500]).map(lambda size: b"x" * size),
)
LABELS = st.one_of(st.none(), st.integers(-1, 5000))


@dataclass
class Row:
    data: bytes
    label: int
    sides: tuple[int, int, int]
    source: str


ROWS = st.lists(
    st.builds(
        Row,
        BYTES,
        st.integers(-1, 12000),
        st.tuples(*[st.integers(1, 2**31 - 1)] * 3),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
    ),
    min_size=1,
    max_size=5,
)


def write(shard: Path, rows: list[Row], labelled: bool) -> ShardIndex:
    """A shard of the rows, and its index beside it, as packing writes both."""
    index = ShardIndex(label=[] if labelled else None)
    with shard.open("wb") as file:
        for number, row in enumerate(rows):
            name = f"{number:06d}.jpg"
            offset = write_member(file, name, row.data)
            index.name.append(name)
            index.offset.append(offset)
            index.size.append(len(row.data))
            index.sha256.append(hashlib.sha256(row.data).hexdigest())
            index.source.append(row.source)
            for column, side in zip((index.width, index.height, index.channels), row.sides):
                column.append(side)
            index.source_bytes += len(row.data)
            if index.label is not None:
                index.label.append(row.label)
                if row.label >= 0:
                    place = write_member(file, f"{number:06d}.cls", str(row.label).encode())
                    assert place == label_offset(offset, len(row.data))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        index.shard_bytes = file.tell()
    shard.with_suffix(".json").write_text(index.to_json(), encoding="utf-8")
    return index


@given(
    rows=ROWS,
    labelled=st.booleans(),
    skipped=st.lists(st.tuples(st.just("a.jpg"), st.text(max_size=5)), max_size=2),
)
def test_an_index_and_its_images_are_read_back(
    rows: list[Row], labelled: bool, skipped: list[tuple[str, str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "000000.tar")
        index = write(shard, rows, labelled)
        index.skipped = skipped
        shard.with_suffix(".json").write_text(index.to_json(), encoding="utf-8")
        found = read_index(shard)
        assert found == index
        assert check_members(shard, found) == []
        contents, packed = found.contents(), shard.read_bytes()
        assert [packed[at : at + size] for at, size in contents.places] == [r.data for r in rows]
        assert contents.names == found.name
        assert contents.labels.tolist() == [row.label if labelled else -1 for row in rows]
        assert contents.sizes is not None
        assert contents.sizes.tolist() == [list(row.sides[:2]) for row in rows]
        with tarfile.open(shard) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive if m.isreg()}
        images = {f"{number:06d}.jpg": row.data for number, row in enumerate(rows)}
        classes = {
            f"{number:06d}.cls": str(row.label).encode()
            for number, row in enumerate(rows)
            if labelled and row.label >= 0
        }
        assert members == images | classes
        # every place that DALI is told holds what it says
        for line in dali_index(index).splitlines()[1:]:
            words = line.split(" ")
            for extension, offset, size, name in zip(*[iter(words)] * 4):
                assert name.endswith(f".{extension}")
                assert packed[int(offset) : int(offset) + int(size)] == members[name]
        assert len(dali_index(index).splitlines()) == len(rows) + 1


@given(rows=ROWS, data=st.data())
def test_a_byte_that_changes_in_an_image_or_a_label_is_found(
    rows: list[Row], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "000000.tar")
        index = write(shard, rows, labelled=True)
        spans = [(at, size) for at, size in zip(index.offset, index.size) if size]
        for row, number in enumerate(index.label or []):
            if number >= 0:
                spans.append((label_offset(index.offset[row], index.size[row]), len(str(number))))
        if not spans:
            return
        at, size = data.draw(st.sampled_from(spans), label="member")
        packed = bytearray(shard.read_bytes())
        packed[at + data.draw(st.integers(0, size - 1), label="byte")] ^= 0xFF
        shard.write_bytes(packed)
        assert len(check_members(shard, index)) == 1
