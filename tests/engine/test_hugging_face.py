"""The collator for Hugging Face's Trainer: what it takes, what it hides, what its draws follow."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from simmim.data.augment import Augmentation, augment, sample_key
from simmim.hugging_face import MaskCollator
from simmim.model.masking import sample_mask

SMALL = {"image_size": 64, "patch_size": 4, "mask_unit": 16}


def photo(number: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def examples(*ids: int) -> list[dict[str, Any]]:
    return [{"image": photo(i), "id": i} for i in ids]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in ("pixel_values", "bool_masked_pos"))


def test_a_batch_is_what_the_models_take() -> None:
    batch = MaskCollator(**SMALL)(examples(3, 1, 4))
    assert set(batch) == {"pixel_values", "bool_masked_pos"}
    assert batch["pixel_values"].shape == (3, 3, 64, 64)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["bool_masked_pos"].shape == (3, 256)
    assert batch["bool_masked_pos"].dtype == torch.bool


@pytest.mark.parametrize(("ratio", "hidden"), [(0.6, 10), (0.25, 4), (1.0, 16)])
def test_whole_units_are_hidden_in_every_sample(ratio: float, hidden: int) -> None:
    collator = MaskCollator(**SMALL, mask_ratio=ratio)
    mask = collator(examples(*range(5)))["bool_masked_pos"].view(5, 16, 16)
    units = mask.unflatten(2, (4, 4)).unflatten(1, (4, 4))
    assert torch.equal(units.all(4).all(2), units.any(4).any(2))
    assert units.any(4).any(2).flatten(1).sum(1).tolist() == [hidden] * 5
    if ratio < 1:
        assert len({tuple(row.flatten().tolist()) for row in mask}) == 5


def test_crops_and_masks_are_the_engine_s() -> None:
    collator = MaskCollator(**SMALL, seed=7, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    collator.set_epoch(2)
    batch = collator(examples(5, 900))
    drawn = Augmentation((64, 64), (0.67, 1.0), (3 / 4, 4 / 3), 0.5, 3)
    for slot, sample in enumerate((5, 900)):
        view = augment(np.asarray(photo(sample)), sample_key(7, 2, sample), drawn)
        expected = (view / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
        actual = batch["pixel_values"][slot].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    ids, epochs = torch.tensor([5, 900]), torch.tensor([2, 2])
    mask = sample_mask(ids, epochs, (16, 16), patch_size=4, mask_unit=16, ratio=0.6, seed=7)
    spread = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(batch["bool_masked_pos"], spread.flatten(1))


def test_draws_follow_seed_epoch_and_id_alone() -> None:
    collator = MaskCollator(**SMALL)
    batch = collator(examples(3, 1))
    torch.manual_seed(1)
    alone = collator(examples(1))
    assert torch.equal(batch["pixel_values"][1], alone["pixel_values"][0])
    assert torch.equal(batch["bool_masked_pos"][1], alone["bool_masked_pos"][0])
    collator.set_epoch(1)
    later = collator(examples(1))
    other = MaskCollator(**SMALL, seed=1)(examples(1))
    for changed in (later, other):
        assert not torch.equal(alone["pixel_values"], changed["pixel_values"])
        assert not torch.equal(alone["bool_masked_pos"], changed["bool_masked_pos"])


def test_workers_of_a_dataloader_change_nothing() -> None:
    data = examples(*range(6))
    inline, workers = (
        list(DataLoader(data, 3, collate_fn=MaskCollator(**SMALL), num_workers=number))
        for number in (0, 2)
    )
    assert len(inline) == len(workers) == 2
    assert all(same(a, b) for a, b in zip(inline, workers))


def test_without_ids_draws_follow_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    collator = MaskCollator(**SMALL)
    data = [{"image": photo(0)}] * 2
    torch.manual_seed(1)
    first, second = collator(data), collator(data)
    assert not same(first, second)
    assert not torch.equal(first["bool_masked_pos"][0], first["bool_masked_pos"][1])
    torch.manual_seed(1)
    assert same(first, collator(data))
    torch.manual_seed(1)
    monkeypatch.setenv("RANK", "1")
    assert not torch.equal(first["bool_masked_pos"], collator(data)["bool_masked_pos"])


def test_every_form_of_an_image_gives_the_same_batch() -> None:
    collator, image = MaskCollator(**SMALL), photo(8)
    forms = [image, np.asarray(image), png(image), {"bytes": png(image), "path": None}]
    batches = [collator([{"image": form, "id": 8}]) for form in forms]
    assert all(same(batches[0], batch) for batch in batches)


def test_an_image_that_is_only_a_path(tmp_path: Any) -> None:
    photo(8).save(tmp_path / "a.png")
    collator = MaskCollator(**SMALL)
    by_path = collator([{"image": {"bytes": None, "path": str(tmp_path / "a.png")}, "id": 8}])
    assert same(by_path, collator(examples(8)))


def test_grey_images_for_a_model_of_one_channel() -> None:
    collator = MaskCollator(**SMALL, mean=(0.5,), std=(0.25,))
    grey = photo(8).convert("L")
    batch = collator([{"image": grey, "id": 8}])
    assert batch["pixel_values"].shape == (1, 1, 64, 64)
    assert same(batch, collator([{"image": np.asarray(grey)[..., None], "id": 8}]))


def test_pixel_values_pass_unchanged() -> None:
    values = torch.randn(3, 64, 96)
    collator = MaskCollator((64, 96), 4, mask_unit=16)
    for form in (values, values.numpy()):
        batch = collator([{"pixel_values": form, "id": 8}])
        assert torch.equal(batch["pixel_values"][0], values)
        assert batch["bool_masked_pos"].shape == (1, 16 * 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_unit": 24}, "mask_unit=24 px must be a multiple of patch_size=4 px and divide"),
        ({"mask_unit": 16, "patch_size": 5}, "multiple of patch_size=5 px"),
        ({"std": (0.2,)}, "mean has 3 values and std 1"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskCollator(**(SMALL | change))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"label": 3}, "examples have label, but neither image nor pixel_values; with Trainer, "),
        ({"pixel_values": torch.zeros(3, 32, 64)}, r"pixel_values are \[3, 32, 64\], the collator"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"ndarray of uint8 \[4, 4\]; expected a Pillow"),
        ({"image": b"nothing"}, "nothing|image"),
    ],
)
def test_examples_that_do_not_fit(example: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskCollator(**SMALL)([example])


def test_configured_crops_reach_the_augmentation() -> None:
    collator = MaskCollator(
        **SMALL,
        crop_scale=(0.2, 0.3),
        crop_ratio=(0.9, 1.1),
        flip=1.0,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    found = collator(examples(5))["pixel_values"][0].permute(1, 2, 0).numpy()
    drawn = Augmentation((64, 64), (0.2, 0.3), (0.9, 1.1), 1.0, 3)
    view = augment(np.asarray(photo(5)), sample_key(0, 0, 5), drawn)
    np.testing.assert_allclose(found, view / 255, atol=1e-6)


def test_the_orientation_of_a_photo_is_heeded() -> None:
    image, file = photo(8), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    image.save(file, "png", exif=exif)
    turned = Image.open(io.BytesIO(file.getvalue()))
    wanted = image.transpose(Image.Transpose.ROTATE_270)
    collator = MaskCollator(**SMALL)
    found, expected = (collator([{"image": one, "id": 8}]) for one in (turned, wanted))
    assert same(found, expected)
