"""Tar shards, and what fine-tuning views are compared with."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from labelled_images import KINDS, peer
from simmim.data import finetune_views, mixing
from simmim.data.finetune_views import Pixels
from simmim.data.mixing import draws_from
from simmim.data.open import open_source
from simmim.packing.options import Options
from simmim.packing.pack import pack
from stand_in_timm import StandIns


@pytest.fixture
def shards(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    files = sorted(photos.iterdir())
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for path in files[number::2]:
                archive.add(path, f"./{path.name}")
            archive.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    return folder


@pytest.fixture(scope="session")
def packed_once(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "photos"
    pack(open_source(str(photos)), folder, Options(short_side=32, images_per_shard=10))
    return folder


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """A packed folder of the photos, three shards of it, to be damaged."""
    return shutil.copytree(packed_once, tmp_path / "packed")


@pytest.fixture
def timm_data() -> Any:
    return peer("timm.data")


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The keys that draws are made from, as they are used."""
    used: list[int] = []

    def noted(key: int) -> Any:
        used.append(key)
        return draws_from(key)

    monkeypatch.setattr(finetune_views, "draws_from", noted)
    return used


@pytest.fixture(params=KINDS)
def pixels(request: pytest.FixtureRequest) -> Pixels:
    if request.param != "bands":
        peer("timm.data")
    return KINDS[request.param]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """In place of timm, wherever it is installed or not: what it is given can be looked at."""
    stand_ins = StandIns()
    monkeypatch.setattr(finetune_views, "import_timm", stand_ins.import_timm)
    monkeypatch.setattr(mixing, "import_timm", stand_ins.import_timm)
    return stand_ins
