"""Validation: numbers by direct computation, settings that arrive, exact resuming."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from forked_command import finish
from simmim import cli, validation
from simmim.command_line import load
from simmim.config.sections import Config
from simmim.data.augment import centre_view
from simmim.data.batch import Batch
from simmim.data.decode import decode
from simmim.data.open import open_source
from simmim.data.views import CentreView
from simmim.distributed import World
from simmim.errors import ConfigError, DataError
from simmim.method.build import find_method
from simmim.method.method import Method
from simmim.pictures.image_quality import structural_similarity
from simmim.pretrain import build_model
from simmim.run_folder import RunFolder
from simmim.validation import Measured, Validation, validate

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
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


PIXELS = 6  # the smallest side that SSIM takes


class Shown(torch.nn.Module):
    """Misses every pixel by 0.1, and gets autocast's type wherever it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[Any] = []

    def note(self) -> None:
        assert not self.training
        on = torch.is_autocast_enabled("cpu")
        self.types.append(torch.get_autocast_dtype("cpu") if on else torch.float32)

    def completed(self, image: Tensor, mask: Tensor) -> Tensor:
        self.note()
        return image / 255.0 + 0.1


class Numbered:
    """A method whose loss is the number of the batch, from 1; it notes what it is asked."""

    def __init__(self, config: Config) -> None:
        self.config, self.batches, self.masked = config, list[Batch](), list[Any]()

    def loss(self, model: Any, batch: Batch) -> Tensor:
        model.note()
        self.batches.append(batch)
        return torch.tensor(float(len(self.batches)))

    def arrange(self, image: Tensor) -> Tensor:
        return image.movedim(-1, 1)

    def draw_mask(self, ids: Tensor, epochs: Tensor) -> Tensor:
        self.masked.append((ids.tolist(), epochs.tolist()))
        return torch.zeros(len(ids), 1, 1, dtype=torch.bool)


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """Six grey images, of which the third is broken."""
    for number in range(6):
        shade = (40 * number,) * 3
        Image.new("RGB", (PIXELS, PIXELS), shade).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    return tmp_path


def numbered(*flags: str, channels: int = 3) -> Any:
    config = load(["tokens_smoke", "--data.path=x", "--data.workers=0", *flags])
    data = replace(config.data, image_size=PIXELS, channels=channels)
    return Numbered(replace(config, data=data))


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("channels", [1, 3])
def test_empty_slots_count_for_nothing(six: Path, channels: int) -> None:
    method, model = numbered(channels=channels), Shown().train()
    source = open_source(str(six))
    found = validate(method, model, source, ALONE, batch_size=4, report=quiet)  # type: ignore[arg-type]
    assert found.images == 5
    # three images of the first batch, two of the second
    assert found.loss == pytest.approx((3 * 1 + 2 * 2) / 5)
    assert found.psnr == pytest.approx(20, abs=1e-5)  # of errors of 0.1 everywhere
    shades = torch.tensor([0, 40, 120, 160, 200]) / 255.0
    flat = shades[:, None, None, None].expand(5, channels, PIXELS, PIXELS)
    expected = structural_similarity(flat, flat + 0.1).mean()
    assert found.ssim == pytest.approx(float(expected), rel=1e-6)
    assert method.masked == [([0, 1, -1, 3], [0] * 4), ([4, 5], [0, 0])]
    assert model.training


def test_a_batch_without_an_image_is_passed_over(six: Path) -> None:
    method = numbered()
    found = validate(method, Shown(), open_source(str(six)), ALONE, batch_size=1, report=quiet)  # type: ignore[arg-type]
    assert (found.images, found.loss) == (5, 3.0)
    assert len(method.batches) == 5


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_loss_and_reconstruction_compute_as_configured(
    six: Path, precision: str, dtype: torch.dtype
) -> None:
    method, model = numbered(f"--train.precision={precision}"), Shown()
    validate(method, model, open_source(str(six)), ALONE, batch_size=6, report=quiet)  # type: ignore[arg-type]
    assert model.types == [dtype, dtype]


def test_processes_are_summed(six: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, given = numbered(), list[World]()

    def both(sums: Tensor, world: World) -> Tensor:
        given.append(world)
        return sums.add_(torch.tensor([5.0, 0, 0, 5]))  # of five images with a loss of 1

    monkeypatch.setattr(validation, "all_reduce_sum", both)
    found = validate(method, Shown(), open_source(str(six)), ALONE, batch_size=6, report=quiet)  # type: ignore[arg-type]
    assert given == [ALONE]
    assert (found.images, found.loss) == (10, 1.0)
    # ten images, of which five have an error of 0.1
    assert found.psnr == pytest.approx(20 + 10 * math.log10(2), abs=1e-5)


def test_images_are_decoded_as_configured(six: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def nothing(source: Any, view: Any, world: World, **named: Any) -> Iterator[Batch]:
        given.append((source, view, world, named))
        yield from ()

    monkeypatch.setattr(validation, "one_pass", nothing)
    source, method = open_source(str(six)), numbered("--data.timeout_s=9", "--data.max_pixels=77")
    with pytest.raises(DataError, match=r"none of its images could be read$"):
        validate(method, Shown(), source, ALONE, batch_size=3, report=quiet)  # type: ignore[arg-type]
    ((images, view, world, named),) = given
    assert (images, world) == (source, ALONE)
    assert isinstance(view, CentreView)
    assert (view.shape, view.data.max_pixels) == ((PIXELS, PIXELS, 3), 77)
    del named["note_problem"]
    assert named == {"batch_size": 3, "workers": 0, "timeout_s": 9, "report": quiet}


def observer_of(six: Path, *flags: str, world: World = ALONE) -> tuple[Any, Validation]:
    method = numbered(f"--validate.path={six}", *flags)
    return method, Validation(method, world)


def test_an_observer_is_as_configured(six: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(validation, "FixedSamples", lambda *given: drawn.append(given) or "drawn")
    flags = ("--train.batch_size=12", "--train.accumulation_steps=2")
    method, observer = observer_of(
        six, "--validate.every_epochs=0.5", "--validate.batch_size=5", "--validate.pictures=3"
    )
    assert (observer.every_epochs, observer.batch_size, observer.samples) == (0.5, 5, "drawn")
    assert drawn == [(observer.source, method.config, method.draw_mask, 3)]
    assert list(observer.source.names) == [f"{number}.png" for number in range(6)]
    for size, batch in ((1, 6), (2, 3)):  # as many as a process trains on at once
        _, observer = observer_of(six, *flags, world=World(size - 1, size, CPU))
        assert observer.batch_size == batch
    # nothing is drawn where no pictures are asked for, nor in a second process
    assert len(drawn) == 2
    assert observer.samples is None
    _, observer = observer_of(six, "--validate.pictures=0")
    assert (len(drawn), observer.samples) == (2, None)


def test_the_shorter_side_decides_whether_ssim_can_be_measured(six: Path) -> None:
    method, _ = observer_of(six, "--validate.pictures=0")
    for size, fits in (((6, 9), True), ((9, 6), True), ((5, 9), False), ((9, 5), False)):
        data = replace(method.config.data, image_size=size)
        method.config = replace(method.config, data=data)
        if fits:
            Validation(method, ALONE)
            continue
        with pytest.raises(ConfigError, match=r"at least 6 px, data\.image_size is 5"):
            Validation(method, ALONE)


def test_an_observer_measures_records_and_tells(
    six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    measured = Measured(1234, 0.5, 21.25, 0.75)
    monkeypatch.setattr(validation, "validate", lambda *a, **k: given.append((a, k)) or measured)
    monkeypatch.setattr(validation, "draw_picture", lambda *a: given.append(a))
    monkeypatch.setattr(validation, "say_where", lambda *a: given.append(a))
    monkeypatch.setattr(validation, "masked_model", lambda run: run.model)
    method, observer = observer_of(six, "--validate.pictures=2", "--validate.batch_size=5")
    lines: list[str] = []
    log = SimpleNamespace(info=lines.append, warn=object())
    folder = RunFolder(tmp_path)
    run: Any = SimpleNamespace(model=object(), log=log, step=7, folder=folder)
    assert observer.records(run) == folder.validations
    assert observer.measure(run) is measured
    arguments = (method, run.model, observer.source, ALONE)
    assert given.pop() == (arguments, {"batch_size": 5, "report": log.warn})
    row = observer.row(measured)
    assert row == {"images": 1234, "loss": 0.5, "psnr": 21.25, "ssim": 0.75}
    observer.tell(run, measured, row)
    assert lines == [
        "step 7: validation loss 0.5000, PSNR 21.25 dB, SSIM 0.7500 on 1,234 held-out images"
    ]
    assert observer.samples is not None
    place = folder.validation_pictures
    assert given.pop() == (run, observer.samples.draw, run.model, place, "validation")
    observer.finish(run)
    assert given.pop() == (run, "reconstructions of held-out images", place)


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


def test_a_run_leaves_numbers_and_pictures(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert cli.main(command("tokens_smoke", images, output, "--log.tensorboard=true")) == 0
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
    short = "--train.steps=6"
    assert cli.main(command("tokens_smoke", images, whole, short)) == 0
    real, calls = validation.validate, list[int]()

    def interrupted(*given: Any, **named: Any) -> Measured:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the handler does not let this end
        return real(*given, **named)

    monkeypatch.setattr(validation, "validate", interrupted)
    assert cli.main(command("tokens_smoke", images, stopped, short)) == 75
    assert [row["step"] for row in rows(stopped)] == [3]
    assert (stopped / "checkpoints" / "step_00000006").is_dir()
    assert cli.main(command("tokens_smoke", images, stopped, short)) == 0
    assert rows(stopped) == rows(whole)
    assert len(calls) == 3  # one of step 6 that was cut short, and two


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
    short = "--train.steps=3"
    assert cli.main(command("tokens_smoke", images, one, short)) == 0
    launched = finish("simmim", *command("tokens_smoke", images, two, short), processes=2)
    assert launched.returncode == 0, launched.stderr
    (mine,), (other,) = rows(one), rows(two)
    assert mine == {key: pytest.approx(value, rel=1e-4) for key, value in other.items()}
    assert (two / "log.txt").read_text().count("02.png") == 1
