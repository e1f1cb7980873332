"""Pictures: visible pixels stay as they were, and hidden pixels come from the model."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pictured import Squares, value_of
from simmim import SimMIM
from simmim.backbone.build import build_encoder
from simmim.backbone.vit import ViTSpec
from simmim.config.sections import Config
from simmim.model.masking import sample_mask
from simmim.pictures import reconstruction
from simmim.pictures.grid import save_picture
from simmim.pictures.reconstruction import (
    HIDDEN_GREY,
    FixedSamples,
    draw_grid,
    reconstruct_files,
    reconstruction_panels,
)
from simmim_kernels.splitmix import fold, permutation

SPEC = ViTSpec(image_size=(32, 48), patch_size=8, embed_dim=16, depth=1, num_heads=2)


@pytest.mark.parametrize("norm_target", [None, 7])
@pytest.mark.parametrize("channels", [1, 3])
def test_panels(channels: int, norm_target: int | None) -> None:
    model = SimMIM(build_encoder(replace(SPEC, channels=channels)), norm_target=norm_target).train()
    image = torch.randint(0, 256, (2, channels, 32, 48), dtype=torch.uint8)
    mask = torch.rand(2, 4, 6) < 0.5
    panels = reconstruction_panels(model, image, mask)
    assert panels.shape == (2, 3, 32, 48, channels)
    assert panels.dtype == np.uint8
    assert model.training
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    original, masked, reconstruction = panels[:, 0], panels[:, 1], panels[:, 2]
    assert np.array_equal(original, image.permute(0, 2, 3, 1).numpy())
    assert (masked[pixels] == HIDDEN_GREY).all()
    assert np.array_equal(masked[~pixels], original[~pixels])
    assert np.array_equal(reconstruction[~pixels], original[~pixels])
    assert not np.array_equal(reconstruction[pixels], original[pixels])


def test_a_perfect_model_gives_back_the_picture() -> None:
    model = SimMIM(build_encoder(SPEC))
    image = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    model.reconstruct = lambda image, mask: model.normalise(image)  # type: ignore[method-assign]
    panels = reconstruction_panels(model, image, torch.ones(1, 4, 6, dtype=torch.bool))
    assert np.array_equal(panels[:, 2], panels[:, 0])


def test_grid_and_files(photos: Path, tmp_path: Path) -> None:
    model = SimMIM(build_encoder(SPEC)).eval()
    files = sorted(photos.iterdir())[:3]
    picture = reconstruct_files(model, files, mask_unit=16, ratio=0.6, seed=1)
    again = reconstruct_files(model, files, mask_unit=16, ratio=0.6, seed=1)
    assert np.array_equal(np.asarray(picture), np.asarray(again))
    other = reconstruct_files(model, files, mask_unit=16, ratio=0.6, seed=2)
    assert not np.array_equal(np.asarray(picture), np.asarray(other))
    save_picture(picture, tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as saved:
        assert saved.size == picture.size
    assert picture.width > 3 * 48 * 3  # small images are enlarged
    grey = draw_grid(np.zeros((1, 3, 8, 8, 1), dtype=np.uint8))
    assert grey.mode == "RGB"


@pytest.mark.parametrize(("unit", "ratio"), [(12, 0.6), (32, 0.6), (16, 0.0), (16, 1.5)])
def test_masks_that_do_not_fit(photos: Path, unit: int, ratio: float) -> None:
    model = SimMIM(build_encoder(SPEC)).eval()
    with pytest.raises(ValueError, match=r"a mask (unit|ratio) of"):
        reconstruct_files(model, [min(photos.iterdir())], mask_unit=unit, ratio=ratio, seed=0)


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="not a regular file"):
        save_picture(picture, tmp_path / "pipe.png")
    assert (tmp_path / "pipe.png").is_fifo()
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    save_picture(picture, tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").is_file()


def test_files_that_are_no_images(tmp_path: Path) -> None:
    model = SimMIM(build_encoder(SPEC)).eval()
    (tmp_path / "x.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"x\.jpg: not a readable image"):
        reconstruct_files(model, [tmp_path / "x.jpg"], mask_unit=16, ratio=0.6, seed=0)
    with pytest.raises(ValueError, match=r"y\.jpg: No such file"):
        reconstruct_files(model, [tmp_path / "y.jpg"], mask_unit=16, ratio=0.6, seed=0)


def save_squares(folder: Path, *values: int) -> list[Path]:
    files = []
    for number, value in enumerate(values):
        files.append(folder / f"{number}.png")
        Image.new("RGB", (48, 32), (value,) * 3).save(files[-1])
    return files


@pytest.mark.parametrize(
    ("unit", "ratio", "seed"), [(8, 0.25, 3), (16, 0.5, 3), (16, 0.5, 4), (16, 1.0, 3)]
)
def test_every_photo_has_the_mask_of_its_place_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: int, ratio: float, seed: int
) -> None:
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(reconstruction, "draw_grid", lambda *arguments: drawn.append(arguments))
    files = save_squares(tmp_path, 10, 20, 30)
    reconstruct_files(
        SimMIM(build_encoder(SPEC)).eval(), files, mask_unit=unit, ratio=ratio, seed=seed
    )
    [(panels, names)] = drawn
    assert names == ["0.png", "1.png", "2.png"]
    masks = sample_mask(
        torch.arange(3), torch.zeros(3, dtype=torch.int64), (4, 6),
        patch_size=8, mask_unit=unit, ratio=ratio, seed=seed,
    )  # fmt: skip
    for number, mask in enumerate(masks):
        assert (panels[number, 0] == 10 * (number + 1)).all()
        pixels = mask.repeat_interleave(unit, 0).repeat_interleave(unit, 1).numpy()
        assert np.array_equal((panels[number, 1] == HIDDEN_GREY).all(-1), pixels)
    if ratio < 1:
        assert not torch.equal(masks[0], masks[1])


def test_photos_of_other_values_take_their_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(reconstruction, "draw_grid", lambda *arguments: drawn.append(arguments))
    np.save(tmp_path / "x.npy", np.full((32, 48, 3), 500, dtype=np.uint16))
    model = SimMIM(build_encoder(SPEC)).eval()
    reconstruct_files(
        model, [tmp_path / "x.npy"], mask_unit=16, ratio=0.5, seed=0, value_range=(0, 1000)
    )
    assert set(np.unique(drawn[0][0][0, 0])) <= {127, 128}


def test_the_model_predicts_in_evaluation_mode() -> None:
    model = SimMIM(build_encoder(SPEC)).train()
    modes: list[bool] = []
    predicted = model.predicted_pixels

    def noted(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        modes.append(model.training)
        return predicted(image, mask)

    model.predicted_pixels = noted  # type: ignore[method-assign]
    image = torch.zeros(1, 3, 32, 48, dtype=torch.uint8)
    reconstruction_panels(model, image, torch.ones(1, 4, 6, dtype=torch.bool))
    assert modes == [False]


def test_a_runs_pictures_show_its_samples_under_their_masks_of_epoch_0(
    configured: Callable[..., Config], squares: Squares, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares.broken = set(permutation(fold(6), 40)[:2].tolist())
    given: list[tuple[list[int], list[int]]] = []

    def draw_mask(ids: torch.Tensor, epochs: torch.Tensor) -> torch.Tensor:
        given.append((ids.tolist(), epochs.tolist()))
        return torch.zeros(len(ids), 2, 2, dtype=torch.bool)

    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(reconstruction, "draw_grid", lambda *arguments: drawn.append(arguments))
    samples = FixedSamples(squares, configured(seed=6), draw_mask, 3)
    assert squares.tried == permutation(fold(6), 40)[:5].tolist()
    model = SimMIM(build_encoder(replace(SPEC, image_size=(16, 16))))
    for _ in range(2):
        samples.draw(model)
    wanted = permutation(fold(6), 40)[2:5].tolist()
    assert given == [(wanted, [0, 0, 0])] * 2
    assert drawn[0][0][:, 0, 0, 0, 0].tolist() == [value_of(number) for number in wanted]
    squares.broken = set(range(40))
    squares.tried.clear()
    none = FixedSamples(squares, configured(seed=6), draw_mask, 3)
    assert none.draw(model) is None
    assert len(squares.tried) == 12  # four for each that is wanted
