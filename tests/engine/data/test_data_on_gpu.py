"""The data path with a real GPU: skipped where there is none, required by `make bench-gpu`."""

from pathlib import Path

import pytest
import torch

from simmim.config.sections import Config, DataConfig, TrainConfig
from simmim.data.build import make_loader
from simmim.data.dali import backend
from simmim.data.open import open_source
from simmim.distributed import World
from simmim.method.build import find_method

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
STEPS, BATCH = 6, 8


def loaded(photos: Path, device: str, backend: str) -> list[torch.Tensor]:
    """The images of all steps, on the host; the GPU is kept busy, so that copies lie beside it."""
    data = DataConfig(path=str(photos), image_size=192, backend=backend, workers=2, prefetch=2)  # type: ignore[arg-type]
    config = Config(data=data, train=TrainConfig(batch_size=BATCH))
    world = World(0, 1, torch.device(device))
    found = []
    x = torch.randn(2048, 2048, device=device)
    loader = make_loader(config, open_source(str(photos)), world, find_method(config).view())
    for (batch,) in loader.steps(0, STEPS):
        assert batch.image.device.type == device
        for _ in range(20 if device == "cuda" else 0):
            x = x @ x / x.norm()
        assert (batch.ids >= 0).all()
        found.append(batch.image.clone())
    return [image.cpu() for image in found]


def test_batches_arrive_unharmed(photos: Path) -> None:
    """Page-locked memory is written again only once its copy to the device is over."""
    for host, device in zip(loaded(photos, "cpu", "cpu"), loaded(photos, "cuda", "cpu")):
        assert torch.equal(host, device)


@pytest.mark.skipif(bool(backend.missing_reason()), reason="no DALI")
def test_dali_decodes_the_same_crops(photos: Path) -> None:
    for host, device in zip(loaded(photos, "cpu", "cpu"), loaded(photos, "cuda", "dali")):
        difference = (host.float() - device.float()).abs().mean((1, 2, 3))
        assert difference.max() <= 1.5  # levels; nvJPEG's inverse transform rounds otherwise
