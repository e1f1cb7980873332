"""Fixtures: photos, the backends, and a `torch.empty` that is never right by accident."""

import os

# Threads of processes that share the cores must sleep while they wait: a suite of two processes on
# two cores takes four times as long where they spin. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from simmim_kernels import native

os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")

# The same examples everywhere, and no verdict that depends on how busy the machine is.
settings.register_profile(
    "suite",
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search", settings.get_profile("suite"), derandomize=False, max_examples=5000
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

# "native-bfloat16" multiplies matrices in bfloat16, as processors with such products do
BACKENDS = [
    "reference",
    "native",
    "native-bfloat16",
    "native-avx2",
    "native-baseline",
    "triton-interpreted",
]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of up to 24 photos: those that scikit-image brings.

    SIMMIM_PHOTOS names a folder or a tar file of others, for a run of the tests with them.
    """
    folder, others = tmp_path_factory.mktemp("photos"), os.environ.get("SIMMIM_PHOTOS")
    if others and Path(others).is_file():
        with tarfile.open(others) as archive:
            for member in [member for member in archive.getmembers() if member.isfile()][:24]:
                archive.extract(member, folder, filter="data")
        return folder
    if others:
        paths = [path for path in Path(others).iterdir() if path.is_file()]
        assert paths, f"SIMMIM_PHOTOS={others}: no files there"
    else:
        import skimage

        paths = list((Path(skimage.__file__).parent / "data").glob("*.png"))
    for path in sorted(paths)[:24]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def write_image(tmp_path: Path) -> Callable[..., Path]:
    """Write a smooth random image: write_image(name, mode="RGB", size=(w, h), **save options)."""

    def write(
        name: str, mode: str = "RGB", size: tuple[int, int] = (90, 70), **options: object
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(len(name)).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        image.convert(mode).save(path, **options)
        return path

    return write


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN or a pattern, so that an output that nobody wrote cannot pass."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ]:
        original = getattr(owner, name)

        def poisoned(
            *args: object, original: Callable[..., torch.Tensor] = original, **kwargs: object
        ) -> torch.Tensor:
            out = original(*args, **kwargs)
            if out.dtype.is_floating_point:
                return out.fill_(float("nan"))
            return out.fill_(0x55555555) if out.dtype == torch.int32 else out

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name to give as `backend`; Triton runs in its interpreter, which checks every access."""
    name, _, how = request.param.partition("-")
    if name == "triton":
        pytest.importorskip("triton")
        from gpu_sim.interpreter import interpret

        with interpret():
            yield name
    elif name == "native":
        if native.extension is None:
            pytest.skip(str(native.missing_reason))
        best = native.extension.target()
        if how == "bfloat16":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "FAST_BFLOAT16", True)
                yield name
            return
        if how and not native.extension.use_target(how):
            pytest.skip(f"this processor has no {how}")
        yield name
        native.extension.use_target(best)
    else:
        yield name


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20211118)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole models take minutes in the Triton interpreter; its ops have their own tests."""
    for item in items:
        if item.path.name == "test_golden.py" and "triton-interpreted" in item.name:
            item.add_marker(pytest.mark.slow)
