"""Validation: image quality as others define it, numbers by direct computation, exact resuming."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simmim import cli, validation
from simmim.command_line import load
from simmim.data.augment import centre_view
from simmim.data.decode import decode
from simmim.data.open import open_source
from simmim.distributed import World
from simmim.errors import ConfigError, DataError
from simmim.method.build import find_method
from simmim.method.method import Method
from simmim.pictures.image_quality import signal_to_noise, similarity_map, structural_similarity
from simmim.pretrain import build_model
from simmim.validation import Measured, Validation, validate

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "engine"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    ),
    "OMP_NUM_THREADS": "1",
}
RECIPES = {
    "simmim": ["smoke"],
    "simmim-norm-target": ["smoke", "--method.norm_target=7"],
    "tokens": ["tokens_smoke"],
    "tokens-normalised": ["tokens_smoke", "--method.target=normalised", "--method.head=mlp"],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Bits are compared: sums in another number of threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train`: 24 smooth images; `val`: 7 others, of which the third is broken."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(3)
    for part, count in (("train", 24), ("val", 7)):
        (root / part).mkdir()
        for number in range(count):
            small = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((70, 90), Image.Resampling.BICUBIC)
            image.save(root / part / f"{number:02d}.png")
    (root / "val" / "02.png").write_bytes(b"no image")
    return root


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    """Images of 20 × 33 pixels and noisy versions; more than are computed at once."""
    first = torch.nn.functional.interpolate(torch.rand(18, 3, 5, 7), (20, 33), mode="bicubic")
    first = first.clamp(0, 1)
    noise = torch.linspace(0.01, 0.5, 18).view(-1, 1, 1, 1)
    return first, (first + noise * torch.randn_like(first)).clamp(0, 1)


def test_similarity_by_definition() -> None:
    """It is computed window by window, in NumPy, without a convolution."""
    x, y = torch.rand(2, 1, 2, 9, 8, dtype=torch.float64)
    padded = [np.pad(t[0].numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect") for t in (x, y)]
    offsets = np.arange(11) - 5.0
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    expected = np.zeros((2, 9, 8))
    for channel, row, column in np.ndindex(expected.shape):
        a, b = (image[channel, row : row + 11, column : column + 11] for image in padded)
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a = (weights * (a - mean_a) ** 2).sum()
        var_b = (weights * (b - mean_b) ** 2).sum()
        both = (weights * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        expected[channel, row, column] = luminance * (2 * both + 9e-4) / (var_a + var_b + 9e-4)
    np.testing.assert_allclose(similarity_map(x, y)[0].numpy(), expected, rtol=1e-9)
    assert float(structural_similarity(x, y)) == pytest.approx(expected.mean(), rel=1e-9)


def test_similarity_and_noise_of_scikit_image(pairs: tuple[Tensor, Tensor]) -> None:
    """scikit-image leaves out the pixels near the border."""
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pairs
    found = similarity_map(x, y)[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
    for number in range(len(x)):
        a, b = (t[number].double().numpy() for t in (x, y))
        expected = metrics.structural_similarity(
            a, b, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert float(found[number]) == pytest.approx(expected, rel=1e-7)
        noise = metrics.peak_signal_noise_ratio(a, b, data_range=1.0)
        assert signal_to_noise(float(((a - b) ** 2).mean())) == pytest.approx(noise, rel=1e-9)


def test_similarity_and_noise_of_torchmetrics(pairs: tuple[Tensor, Tensor]) -> None:
    metrics = pytest.importorskip("torchmetrics.image", exc_type=ImportError)
    x, y = pairs
    ssim = metrics.StructuralSimilarityIndexMeasure(data_range=1.0)
    psnr = metrics.PeakSignalNoiseRatio(data_range=1.0)
    for part in (slice(0, 5), slice(5, 18)):
        ssim.update(y[part], x[part])
        psnr.update(y[part], x[part])
    assert float(structural_similarity(x, y).mean()) == pytest.approx(float(ssim.compute()), 1e-5)
    error = float((x.double() - y.double()).square().mean())
    assert signal_to_noise(error) == pytest.approx(float(psnr.compute()), 1e-5)


def test_equal_images() -> None:
    image = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(structural_similarity(image, image), torch.ones(2).double())
    assert structural_similarity(image[:0], image[:0]).shape == (0,)
    assert signal_to_noise(0.0) == math.inf
    assert math.isnan(signal_to_noise(math.nan))


def test_images_smaller_than_the_window() -> None:
    small = torch.zeros(1, 3, 5, 40)
    with pytest.raises(ValueError, match="at least 6"):
        structural_similarity(small, small)


def prepare(images: Path, *flags: str) -> tuple[Method, Any]:
    """A method and its model, in training mode, away from its initial weights."""
    config = load([*flags, f"--data.path={images / 'train'}", "--data.workers=0"])
    model = build_model(config, CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return find_method(config), model.train()


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_are_those_of_each_image(recipe: str, images: Path) -> None:
    method, model = prepare(images, *RECIPES[recipe])
    source = open_source(str(images / "val"))
    told: list[str] = []
    found = validate(method, model, source, ALONE, batch_size=4, report=told.append)
    assert model.training
    assert found.images == 6
    assert len(told) == 1
    assert "02.png" in told[0]
    losses, errors, similarities = [], [], []
    model.eval()
    for sample in (0, 1, 3, 4, 5, 6):
        pixels = centre_view(decode(source.read(sample), 3), (64, 64))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        mask = method.draw_mask(torch.tensor([sample]), torch.tensor([0]))
        with torch.no_grad():
            losses.append(float(model(image, mask)))
            made = model.completed(image, mask)
        original = image.double() / 255
        hidden = model.token_mask(mask)
        scale = 64 // hidden.shape[1]
        hidden = hidden.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None]
        torch.testing.assert_close(torch.where(hidden, original.float(), made), original.float())
        assert made.min() >= 0
        assert made.max() <= 1
        assert (made - original)[hidden.expand_as(made)].abs().mean() > 0.01
        errors.append(float((made.double() - original).square().mean()))
        similarities.append(float(structural_similarity(made, original)))
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.psnr == pytest.approx(-10 * math.log10(np.mean(errors)), rel=1e-5)
    assert found.ssim == pytest.approx(np.mean(similarities), rel=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_pictures_and_reconstructions_show_the_same(recipe: str, images: Path) -> None:
    """They agree to half a step of 8 bits."""
    from simmim.pictures.reconstruction import reconstruction_panels

    method, model = prepare(images, *RECIPES[recipe])
    pixels = centre_view(decode((images / "val" / "00.png").read_bytes(), 3), (64, 64))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    mask = method.draw_mask(torch.tensor([0]), torch.tensor([0]))
    panel = reconstruction_panels(model, image, mask)[0, 2]
    with torch.no_grad():
        made = model.eval().completed(image, mask)[0].permute(1, 2, 0).numpy()
    assert np.abs(panel / 255.0 - made).max() <= 0.51 / 255


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batches_do_not_matter(batch_size: int, images: Path) -> None:
    method, model = prepare(images, "tokens_smoke")
    source = open_source(str(images / "val"))
    quiet: Callable[[str], None] = lambda line: None  # noqa: E731
    one, other = (
        validate(method, model, source, ALONE, batch_size=size, report=quiet)
        for size in (4, batch_size)
    )
    for name in ("loss", "psnr", "ssim"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5), name


def test_images_of_which_none_can_be_read(images: Path, tmp_path: Path) -> None:
    method, model = prepare(images, "tokens_smoke")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of its images.*broken\.png"):
        validate(method, model, open_source(str(tmp_path)), ALONE, batch_size=4)


def test_images_too_small_for_ssim(images: Path) -> None:
    method, _ = prepare(images, "tokens_smoke", "--data.image_size=4", "--model.patch_size=2")
    with pytest.raises(ConfigError, match="at least 6 px"):
        Validation(method, ALONE)


def command(recipe: str, images: Path, output: Path, *more: str) -> list[str]:
    """12 steps, 3 an epoch, each validated."""
    return [
        "pretrain", recipe, f"--data.path={images / 'train'}", f"--output={output}",
        "--data.workers=0", "--train.steps=12", "--checkpoint.every_steps=3",
        f"--validate.path={images / 'val'}", "--validate.pictures=2", "--validate.batch_size=3",
        *more,
    ]  # fmt: skip


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "validations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["smoke", "tokens_smoke"])
def test_a_run_leaves_numbers_and_pictures(recipe: str, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert cli.main(command(recipe, images, output, "--log.tensorboard=true")) == 0
    found = rows(output)
    assert [row["step"] for row in found] == [3, 6, 9, 12]
    assert [row["epoch"] for row in found] == [1, 2, 3, 4]
    assert all(row["images"] == 6 for row in found)
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["psnr"] > 8
    assert 0 < found[-1]["ssim"] < 1
    pictures = sorted((output / "validation").glob("*.png"))
    assert [p.name for p in pictures] == [f"step_{step:08d}.png" for step in (3, 6, 9, 12)]
    with Image.open(pictures[-1]) as picture:
        assert np.asarray(picture).std() > 20
    log = (output / "log.txt").read_text()
    assert f"step 12: validation loss {found[-1]['loss']:.4f}, PSNR {found[-1]['psnr']:.2f}" in log
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = events.EventAccumulator(str(output / "tensorboard"))
    seen.Reload()
    shown = [event.value for event in seen.Scalars("validations/ssim")]
    assert shown == pytest.approx([row["ssim"] for row in found], rel=1e-6)
    assert seen.Images(seen.Tags()["images"][0])


def test_a_signal_during_a_validation_leaves_it_for_later(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main(command("tokens_smoke", images, whole)) == 0
    real, calls = validation.validate, list[int]()

    def interrupted(*given: Any, **named: Any) -> Measured:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the handler does not let this end
        return real(*given, **named)

    monkeypatch.setattr(validation, "validate", interrupted)
    assert cli.main(command("tokens_smoke", images, stopped)) == 75
    assert [row["step"] for row in rows(stopped)] == [3]
    assert (stopped / "checkpoints" / "step_00000006").is_dir()
    assert cli.main(command("tokens_smoke", images, stopped)) == 0
    assert rows(stopped) == rows(whole)
    assert len(calls) == 5  # one of step 6 that was cut short, and four


def test_what_is_beyond_the_checkpoint_is_made_again(images: Path, tmp_path: Path) -> None:
    """A killed process leaves rows of steps that were not saved, and half a row."""
    killed, constant = tmp_path / "killed", "--schedule.name=constant"
    arguments = command("tokens_smoke", images, killed, constant)
    assert cli.main([*arguments, "--train.steps=6"]) == 0
    saved = rows(killed)
    assert [row["step"] for row in saved] == [3, 6]
    with (killed / "validations.jsonl").open("a") as file:
        file.write(json.dumps({**saved[-1], "step": 9, "loss": 0.0}) + "\n")
        file.write('{"step": 12, "lo')
    (killed / "model.safetensors").unlink()
    assert cli.main(arguments) == 0
    found = rows(killed)
    assert [row["step"] for row in found] == [3, 6, 9, 12]
    assert found[:2] == saved  # what was validated is not validated twice
    assert found[2]["loss"] > 0.1


def test_two_processes_are_one(images: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(command("tokens_smoke", images, one)) == 0
    launched = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "simmim", *command("tokens_smoke", images, two),
        ],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    for mine, other in zip(rows(one), rows(two), strict=True):
        assert mine == {key: pytest.approx(value, rel=1e-4) for key, value in other.items()}
    assert (two / "log.txt").read_text().count("02.png") == 4


def test_numbers_that_are_not_finite(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        validation, "validate", lambda *given, **named: Measured(6, math.nan, math.inf, 0.5)
    )
    output = tmp_path / "run"
    assert cli.main(command("tokens_smoke", images, output)) == 0
    assert all(row["loss"] is None and row["psnr"] is None for row in rows(output))
