"""SimMIM's method: every configured value reaches the model, the masks and the loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simmim import SimMIM
from simmim.backbone.build import build_encoder
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.swin import SwinSpec
from simmim.command_line import load
from simmim.data.batch import Batch
from simmim.errors import ConfigError
from simmim.method import simmim as file
from simmim.method.build import find_method
from simmim.method.simmim import SimMIMMethod
from simmim.model.masking import sample_mask
from simmim.training.running_statistics import has_batch_norm

SWIN = SwinSpec(image_size=(64, 64), embed_dim=8, depths=(1, 1), num_heads=(2, 4), window_size=4)
RESNET = ResNetSpec(image_size=(64, 64), depths=(1, 1, 1, 1), bottleneck=False, width=4)


def method(*flags: str) -> SimMIMMethod:
    found = find_method(load(["smoke", "--data.path=x", *flags]))
    assert isinstance(found, SimMIMMethod)
    return found


def pixels(images: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (images, 64, 64, 3), dtype=torch.uint8, generator=generator)


def test_the_configured_window_and_statistics_arrive_in_the_model() -> None:
    flags = ["--data.mean=[0.1,0.2,0.3]", "--data.std=[0.4,0.5,0.6]", "--method.norm_target=7"]
    model = method(*flags).build(build_encoder(SWIN))
    assert model.norm_target == 7
    assert model.settings == {"norm_target": 7}
    assert model.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert method().build(build_encoder(SWIN)).norm_target is None


@pytest.mark.parametrize(("window", "refused"), [(0, False), (1, True), (3, False), (4, True)])
def test_windows_are_odd_and_at_least_three(window: int, refused: bool) -> None:
    chosen = method()
    chosen.settings = replace(chosen.settings, norm_target=window)
    if not refused:
        chosen.check()
        return
    with pytest.raises(ConfigError, match=f"method.norm_target={window} must be odd"):
        chosen.check()


def test_mask_units_that_do_not_fit_are_refused_by_the_check() -> None:
    chosen = method()
    mask = replace(chosen.config.mask, unit=12)
    with pytest.raises(ConfigError, match=r"mask\.unit=12"):
        SimMIMMethod(replace(chosen.config, mask=mask)).check()


@pytest.mark.parametrize(("ratio", "hidden"), [(0.25, 4), (0.6, 10), (0.9, 15)])
def test_the_configured_share_of_units_is_hidden(ratio: float, hidden: int) -> None:
    mask = method("--mask.unit=16", f"--mask.ratio={ratio}").draw_mask(
        torch.arange(3), torch.zeros(3, dtype=torch.int64)
    )
    assert mask.shape == (3, 4, 4)
    assert mask.flatten(1).sum(1).tolist() == [hidden] * 3


def test_every_configured_value_reaches_the_drawing_of_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def noted(ids: Tensor, epochs: Tensor, grid: tuple[int, int], **options: Any) -> Tensor:
        seen.update(options, ids=ids, epochs=epochs, grid=grid)
        return sample_mask(ids, epochs, grid, **options)

    monkeypatch.setattr(file, "sample_mask", noted)
    flags = ["--mask.unit=16", "--mask.ratio=0.3", "--seed=11", "--kernels.backend=reference"]
    ids, epochs = torch.tensor([4, 5]), torch.tensor([1, 2])
    method(*flags).draw_mask(ids, epochs)
    assert seen == {
        "ids": ids,
        "epochs": epochs,
        "grid": (16, 16),
        "patch_size": 4,
        "mask_unit": 16,
        "ratio": 0.3,
        "seed": 11,
        "backend": "reference",
    }


def test_every_image_has_its_own_mask_of_the_seed_and_its_epoch() -> None:
    flags = ["--mask.unit=8", "--mask.ratio=0.5"]
    ids, epochs = torch.tensor([3, 4, 3]), torch.tensor([0, 0, 1])
    mask = method(*flags).draw_mask(ids, epochs)
    other = method(*flags, "--seed=1").draw_mask(ids, epochs)
    drawn = {tuple(one.flatten().tolist()) for one in (*mask, *other)}
    assert len(drawn) == 6


def batch_of(images: int, empty: tuple[int, ...] = ()) -> Batch:
    image, ids = pixels(images), torch.arange(images)
    image[list(empty)], ids[list(empty)] = 0, -1
    return Batch(image, ids, torch.ones_like(ids), images - len(empty))


def test_the_loss_is_that_of_the_images_under_their_masks() -> None:
    chosen, batch = method("--mask.unit=16"), batch_of(3)
    model = chosen.build(build_encoder(SWIN)).eval()
    mask = chosen.draw_mask(torch.arange(3), torch.ones(3, dtype=torch.int64))
    expected = model(batch.image.permute(0, 3, 1, 2), mask)
    assert chosen.loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("spec", [SWIN, RESNET], ids=["layer norms", "batch norms"])
def test_empty_slots_change_neither_loss_nor_batch_statistics(spec: Any) -> None:
    chosen = method("--mask.unit=16")
    model = chosen.build(build_encoder(spec)).train()
    whole, kept = batch_of(4, empty=(1, 3)), torch.tensor([0, 2])
    without = Batch(whole.image[kept], whole.ids[kept], whole.epochs[kept], 2)
    found, expected = chosen.loss(model, whole), chosen.loss(model, without)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_batch_norms_are_found() -> None:
    assert has_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert not has_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))


def test_the_decoder_predicts_every_pixel_of_a_cell_in_its_place() -> None:
    model = SimMIM(build_encoder(replace(SWIN, channels=1))).eval()
    assert model.decoder[0].weight.shape == (64, 16, 1, 1)  # a cell is 8 × 8 pixels
    image, mask = torch.randn(1, 1, 64, 64), torch.zeros(1, 8, 8, dtype=torch.bool)
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].bias.copy_(torch.arange(64.0))
        cell = model.reconstruct(image, mask)[0, 0, 8:16, 8:16]
    assert torch.equal(cell.flatten(), torch.arange(64.0))


def test_the_loss_hands_on_its_window_and_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def noted(*given: Any, **options: Any) -> Tensor:
        seen.update(options, stride=given[5])
        return torch.zeros(())

    monkeypatch.setattr(file, "linear_masked_l1_loss", noted)
    model = SimMIM(build_encoder(SWIN), norm_target=5, mean=(0.1,) * 3, std=(0.2,) * 3)
    model.use_backend("reference", "native")
    image = pixels(1).permute(0, 3, 1, 2)
    model(image, torch.ones(1, 4, 4, dtype=torch.bool))
    assert (seen["norm_target"], seen["backend"], seen["stride"]) == (5, "reference", 8)
    assert torch.equal(seen["mean"], model.mean)
    assert torch.equal(seen["std"], model.std)
    assert model.encoder.backends == ("reference", "native")
    model(model.normalise(image), torch.ones(1, 4, 4, dtype=torch.bool))
    assert model.settings == {"norm_target": 5}


def test_a_convnext_has_no_batch_norms() -> None:
    spec = ConvNeXtSpec(image_size=(32, 32), depths=(1, 1, 1, 1), widths=(4, 4, 4, 4))
    assert not has_batch_norm(spec.build())
    assert has_batch_norm(RESNET.build())
