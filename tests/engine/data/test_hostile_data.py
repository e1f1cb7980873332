"""Data that means harm, or changes under our hands: refused by a limit, counted, survived."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data.augment import Augmentation
from simmim.data.decode import MAX_PIXELS, UnreadableImage, decode, read_header
from simmim.data.loader import Loader
from simmim.data.open import open_source
from simmim.data.producer import SourceSamples
from simmim.data.source import MAX_FILE_BYTES, read_file
from simmim.data.views import CroppedView
from simmim.distributed import World


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def jpeg_header(width: int, height: int) -> bytes:
    """A real small JPEG whose frame claims another size."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def npy(shape: tuple[int, ...], kind: str = "|u1", values: bytes = b"") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (117 - len(text)) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + values


@pytest.mark.parametrize(
    "data",
    [png_header(50_000, 50_000), jpeg_header(50_000, 50_000), npy((50_000, 50_000, 3))],
    ids=["png", "jpeg", "npy"],
)
def test_claimed_sizes_are_refused_before_decoding(data: bytes) -> None:
    before = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
    with pytest.raises(UnreadableImage, match=rf"50000×50000 pixels.*{MAX_PIXELS}|bomb"):
        decode(data, 3)
    after = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
    assert after - before < 50e6


def test_the_limit_is_what_is_asked_for() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "JPEG")
    assert decode(file.getvalue(), 3, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(UnreadableImage, match=r"40×30 pixels, more than the limit of 1199"):
        decode(file.getvalue(), 3, max_pixels=1199)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy((4, 4, 3), "|O"), "never unpickled"),
        (npy((4, 4, 3)), "ends inside its values"),
        (npy((4, 4, 4, 4), "|u1", bytes(256)), r"shape \[4, 4, 4, 4\]"),
        (npy((0, 4, 3)), "shape"),
        (npy((4, 4), "<c8", bytes(128)), "no pixels"),
        (b"\x93NUMPY\x09\x00" + bytes(60), "version"),
        (b"\x93NUMPY", "."),
        (b"II*\0" + b"\xff" * 60, "."),
        (b"\xff\xd8\xff", "."),
        (b"\xff\xd8" + b"\xff\xe1\x00\x02" * 9, "."),
    ],
    ids="objects cut four-axes empty complex version npy tiff jpeg segments".split(),
)
def test_malformed_files_are_unreadable(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(data, 3)


def test_a_failure_without_a_word_has_a_reason(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty reason would make a slot of zeros a good image."""

    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("simmim.data.decode._decode_jpeg", fail)
    monkeypatch.setattr("simmim.data.decode._decode_other", fail)
    view = CroppedView(Augmentation((32, 32), (0.67, 1.0), (3 / 4, 4 / 3), 0.5, 3), 0)
    samples = SourceSamples(open_source(str(photos)), view)
    assert samples.fill(np.zeros(view.shape, np.uint8), 0, 0) == "MemoryError"


def test_random_damage_never_escapes(photos: Path) -> None:
    """Whatever bytes come, decode gives pixels or UnreadableImage, and so does the header."""
    generator = np.random.default_rng(0)
    originals = [path.read_bytes() for path in sorted(photos.iterdir())[:4]]
    file = io.BytesIO()
    np.save(file, generator.integers(0, 256, (20, 30, 5), dtype=np.uint8))
    originals.append(file.getvalue())
    unreadable = 0
    for number in range(150):
        data = bytearray(originals[number % len(originals)])
        for place in generator.integers(0, min(len(data), 1000), 4):
            data[place] = generator.integers(0, 256)
        damaged = bytes(data[: generator.integers(len(data) // 2, len(data) + 1)])
        for read in (lambda d: decode(d, 3, max_pixels=2**22), read_header):
            try:
                read(damaged)
            except UnreadableImage:
                unreadable += 1
    assert unreadable > 20


def test_huge_and_changing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(OSError, match=rf"more than the limit of {MAX_FILE_BYTES}"):
        read_file(str(tmp_path / "huge.jpg"))

    path = tmp_path / "growing.jpg"
    path.write_bytes(bytes(1000))
    read = os.read

    def read_and_append(descriptor: int, size: int) -> bytes:
        with path.open("ab") as file:
            file.write(b"more")
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", read_and_append)
    with pytest.raises(OSError, match="changed while it was read"):
        read_file(str(path))


def test_a_run_goes_on_among_them(photos: Path, tmp_path: Path) -> None:
    """All at once in one folder: the good ones come once an epoch, the rest are named."""
    good = sorted(photos.iterdir())[:6]
    for path in good:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bomb.png").write_bytes(png_header(50_000, 50_000))
    (tmp_path / "bomb.jpg").write_bytes(jpeg_header(50_000, 50_000))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    source = open_source(str(tmp_path))
    assert len(source.names) == 11
    loader = Loader(
        source,
        CroppedView(Augmentation((32, 32), (0.67, 1.0), (3 / 4, 4 / 3), 0.5, 3), 0),
        seed=0,
        micro_batch=11,
        accumulation_steps=1,
        workers=2,
        prefetch=2,
        world=World(0, 1, torch.device("cpu")),
    )
    for (batch,) in loader.steps(0, 2):
        read = {source.names[i] for i in batch.ids.tolist() if i >= 0}
        assert read == {path.name for path in good}
    reasons = {source.names[sample]: reason for sample, reason in loader.problems}
    assert "limit" in reasons["bomb.jpg"]
    assert "limit" in reasons["bomb.png"] or "bomb" in reasons["bomb.png"]
    assert reasons["pipe.jpg"] == "not a regular file"
    assert "symbolic links" in reasons["self.jpg"]
    assert "limit" in reasons["huge.jpg"]
    assert len(loader.problems) == 2 * 5
