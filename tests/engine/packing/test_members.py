"""Shards that tar, webdataset and DALI read."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packed_folders import run
from simmim.data.decode import decode
from simmim.data.open import open_source
from simmim.data.shards import ShardSource


def test_read_by_tar_and_by_a_plain_scan(small: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "packed", tmp_path / "out"
    out.mkdir()
    assert run(small, folder) == 0
    subprocess.run(["tar", "-xf", folder / "000000.tar", "-C", out], check=True)
    source = ShardSource([folder / "000000.tar"])
    assert len(source.names) == 14
    for number, name in enumerate(source.names):
        path = out / name.split("/")[1]
        assert path.read_bytes() == source.read(number)
        assert path.with_suffix(".cls").read_text() == str(int(number >= 7))
    assert source.labels is not None
    assert source.labels.values.tolist() == [0] * 7 + [1] * 7


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_read_by_webdataset(small: Path, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    assert run(small, tmp_path / "packed", "--images-per-shard", 5) == 0
    source = open_source(str(tmp_path / "packed"))
    urls = sorted(str(p) for p in (tmp_path / "packed").glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("jpg", "cls"))
    assert [label for _, label in samples] == [0] * 7 + [1] * 7
    raw = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["jpg"] for sample in raw] == [source.read(i) for i in range(14)]


def test_read_by_dali(small: Path, tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    folder = tmp_path / "packed"
    assert run(small, folder, "--images-per-shard", 5) == 0
    source = open_source(str(folder))

    @dali.pipeline_def(batch_size=14, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        jpeg, label = dali.fn.readers.webdataset(
            paths=sorted(str(p) for p in folder.glob("*.tar")),
            index_paths=sorted(str(p) for p in folder.glob("*.idx")),
            ext=["jpg", "cls"],
            missing_component_behavior="error",
        )
        return jpeg, label, dali.fn.decoders.image(jpeg, device="cpu")

    built = pipeline()
    built.build()
    jpeg, label, pixels = built.run()
    for number in range(14):
        assert bytes(jpeg.at(number)) == source.read(number)
        assert bytes(label.at(number)) == str(int(number >= 7)).encode()
        expected = decode(source.read(number), 3).astype(int)
        assert np.abs(pixels.at(number).astype(int) - expected).mean() < 1


def test_the_index_is_that_of_dalis_own_tool(small: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    assert run(small, tmp_path / "packed") == 0
    with wds2idx.IndexCreator(
        str(tmp_path / "packed" / "000000.tar"), str(tmp_path / "theirs"), verbose=False
    ) as creator:
        creator.create_index()
    assert (tmp_path / "packed" / "000000.idx").read_text() == (tmp_path / "theirs").read_text()
