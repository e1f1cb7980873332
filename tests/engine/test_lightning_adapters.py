"""Lightning's adapters: positions, weights of empty slots, clipping, precision, messages."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from simmim.command_line import load, recipe_names
from simmim.config.sections import Config
from simmim.data.build import make_loader
from simmim.data.open import open_source
from simmim.distributed import World
from simmim.errors import ConfigError
from simmim.method.build import find_method
from simmim.model.weights_file import trained_mask
from simmim.pretrain import build_state
from simmim.training.step import train_step

STEPS = 7
IMAGES = 20  # with batches of 8, an epoch of Lightning is two steps, and one of the data 2.5

# Lightning's own warnings
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*(ckpt_path|exists and is not empty).*"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 smooth random images."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        torch.manual_seed(number)
        pixels = torch.randint(0, 256, (7, 9, 3), dtype=torch.uint8).numpy()
        image = Image.fromarray(pixels).resize((90, 70), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def adapters() -> Any:
    pytest.importorskip("lightning", reason="lightning is not installed")
    from simmim import lightning_adapters

    return lightning_adapters


def configured(folder: Path, *flags: str, recipe: str = "smoke") -> Config:
    return load(
        [recipe, f"--data.path={folder}", "--data.workers=0", f"--train.steps={STEPS}", *flags]
    )


def by_the_engine(config: Config) -> tuple[list[float], torch.nn.Module]:
    """Losses and model of `train_step`."""
    world = World(0, 1, torch.device("cpu"))
    source = open_source(config.data.path)
    state = build_state(config, len(source.names), world)
    loader = make_loader(config, source, world, find_method(config).view())
    steps = loader.steps(0, state.schedule.total_steps)
    return [float(train_step(state, batches).loss) for batches in steps], state.model


def by_lightning(
    adapters: Any, config: Config, folder: Path, *, resume: str | None = None, **options: Any
) -> tuple[list[float], Any, Any]:
    """Losses, module and Trainer."""
    import lightning

    losses: list[float] = []

    class Note(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > len(losses) + first:
                losses.append(float(trainer.callback_metrics["loss"]))

    data = adapters.MethodDataModule(config)
    module = adapters.MethodModule(config, data.schedule)
    options = {"max_steps": data.schedule.total_steps, "accelerator": "cpu"} | options
    first = 0 if resume is None else int(Path(resume).stem.split("=")[-1])
    trainer = lightning.Trainer(
        devices=1,
        accumulate_grad_batches=options.pop("accumulate", config.train.accumulation_steps),
        callbacks=[Note(), *options.pop("callbacks", [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_checkpointing=options.pop("enable_checkpointing", False),
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return losses, module, trainer


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("recipe", [n for n in recipe_names(finetuning=False) if "smoke" in n])
def test_every_method_trains_as_by_the_engine(
    adapters: Any, folder: Path, tmp_path: Path, recipe: str
) -> None:
    config = configured(folder, "--train.clip_norm=0", recipe=recipe)
    expected, model = by_the_engine(config)
    losses, module, trainer = by_lightning(adapters, config, tmp_path)
    assert losses == expected
    assert_same_weights(module.model, model)
    assert module.method.measures(module.model).keys() <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_ends_in_the_same_bits(
    adapters: Any, folder: Path, tmp_path: Path, stop: int
) -> None:
    """Checkpoints are saved within Lightning's epochs of two steps, and between them."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    config = configured(folder, "--model.drop_path=0.2")
    expected, model = by_the_engine(config)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, module, _ = by_lightning(
        adapters, config, tmp_path, callbacks=[saved], enable_checkpointing=True
    )
    assert whole == expected
    assert_same_weights(module.model, model)
    resumed, module, trainer = by_lightning(
        adapters, config, tmp_path, resume=str(tmp_path / f"step={stop}.ckpt")
    )
    assert resumed == expected[stop:]
    assert trainer.global_step == STEPS
    assert_same_weights(module.model, model)


def test_a_checkpoint_holds_no_code(adapters: Any, folder: Path, tmp_path: Path) -> None:
    _, _, trainer = by_lightning(adapters, configured(folder), tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["lr_schedulers"] == [{"last_epoch": 2}]


def test_rates_are_the_schedule_s(adapters: Any, folder: Path, tmp_path: Path) -> None:
    config = configured(folder)
    _, module, trainer = by_lightning(adapters, config, tmp_path)
    (group, other) = trainer.optimizers[0].param_groups
    assert group["lr"] == other["lr"] == module.schedule.lr_at(STEPS)
    assert group["weight_decay"] != other["weight_decay"]
    fresh: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = adapters.StepRates(fresh, module.schedule)
    rates.load_state_dict({"last_epoch": 3})
    assert fresh.param_groups[0]["lr"] == module.schedule.lr_at(3)


def test_empty_slots_carry_no_weight(adapters: Any, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (broken / path.name).write_bytes(b"" if number % 5 == 0 else path.read_bytes())
    config = configured(broken, "--train.accumulation_steps=2")
    expected, model = by_the_engine(config)
    losses, module, _ = by_lightning(adapters, config, tmp_path)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=0)
    for (name, ours), theirs in zip(module.model.state_dict().items(), model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_without_any_image_does_no_harm(adapters: Any, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (broken / path.name).write_bytes(b"" if number % 2 else path.read_bytes())
    config = configured(broken, "--train.batch_size=2", "--train.steps=10")
    losses, module, _ = by_lightning(adapters, config, tmp_path)
    assert 0 < losses.count(0.0) < 10
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_unreadable_images_are_named_once(
    adapters: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (broken / path.name).write_bytes(b"" if number == 3 else path.read_bytes())
    with caplog.at_level(logging.WARNING, "simmim"):
        by_lightning(adapters, configured(broken), tmp_path)
    lines = [r.getMessage() for r in caplog.records if r.name == "simmim"]
    assert len(lines) == 1
    assert lines[0].startswith("unreadable: 03.png: ")


@pytest.mark.parametrize("clip", [None, 0.05])
def test_clipping_is_the_trainer_s_or_else_the_configuration_s(
    adapters: Any, folder: Path, tmp_path: Path, clip: float | None
) -> None:
    config = configured(folder, f"--train.clip_norm={0.05 if clip is None else 100}")
    losses, _, _ = by_lightning(adapters, config, tmp_path, gradient_clip_val=clip)
    expected, _ = by_the_engine(configured(folder, "--train.clip_norm=0.05"))
    unclipped, _ = by_the_engine(configured(folder, "--train.clip_norm=0"))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=0)
    assert abs(losses[-1] - unclipped[-1]) > 1e-4


def test_bfloat16_is_the_engine_s(adapters: Any, folder: Path, tmp_path: Path) -> None:
    expected, _ = by_the_engine(configured(folder, "--train.precision=bf16"))
    losses, _, _ = by_lightning(adapters, configured(folder), tmp_path, precision="bf16-mixed")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=0)


def test_accumulation_must_agree(adapters: Any, folder: Path, tmp_path: Path) -> None:
    config = configured(folder, "--train.accumulation_steps=2")
    with pytest.raises(ConfigError, match=r"accumulation_steps=2 differ; give the Trainer 2"):
        by_lightning(adapters, config, tmp_path, accumulate=1)


def test_other_images_on_resume_are_told(
    adapters: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = adapters.MethodDataModule(configured(folder)).train_dataloader()
    assert len(stream) == IMAGES // 8
    with caplog.at_level(logging.WARNING, "simmim"):
        stream.load_state_dict(stream.state_dict())
        assert not caplog.records
        stream.load_state_dict({"images": 19, "digest": "x"})
    assert "20 images, the checkpoint was of 19" in caplog.text


def test_weights_are_read_by_the_engine(adapters: Any, folder: Path, tmp_path: Path) -> None:
    import simmim

    _, module, _ = by_lightning(adapters, configured(folder), tmp_path, max_steps=1)
    module.save_weights(tmp_path / "weights.safetensors")
    assert_same_weights(simmim.load_model(tmp_path / "weights.safetensors"), module.model)


def test_without_lightning_one_line_names_the_extra() -> None:
    code = "import sys; sys.modules['lightning'] = None; import simmim.lightning_adapters"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 1
    assert "pip install 'simmim[lightning]'" in result.stderr.splitlines()[-1]


class Strategy:
    """What the adapters ask of a Trainer's strategy."""

    root_device = torch.device("cpu")

    def reduce(self, share: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "mean"
        return share * 0.5  # as if another process had no image


def trainer_of(world: int, accumulate: int = 1) -> Any:
    return SimpleNamespace(
        accumulate_grad_batches=accumulate, global_rank=1, world_size=world, strategy=Strategy()
    )


def test_a_process_is_known_by_its_rank_and_their_number(adapters: Any) -> None:
    assert adapters.world_of(trainer_of(3)) == World(1, 3, torch.device("cpu"))


@pytest.mark.parametrize(("world", "wanted", "joined"), [(1, True, 0), (2, False, 0), (2, True, 1)])
def test_batch_norms_are_joined_over_processes_if_they_are_to_be(
    adapters: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    wanted: bool,
    joined: int,
) -> None:
    config = configured(
        folder, f"--train.sync_batch_norm={str(wanted).lower()}", recipe="simsiam_smoke"
    )
    converted: list[Any] = []
    checked: list[Any] = []
    monkeypatch.setattr(adapters, "convert", converted.append)
    monkeypatch.setattr(adapters, "check_backends", lambda *given: checked.append(given))
    module = adapters.MethodModule(config, adapters.MethodDataModule(config).schedule)
    module._trainer = trainer_of(world)
    module.setup("fit")
    assert converted == [module.model] * joined
    assert checked == [(config.kernels, module.model.encoder.spec, torch.device("cpu"))]


def test_lightning_s_own_batch_norms_are_refused(adapters: Any, folder: Path) -> None:
    config = configured(folder, recipe="simsiam_smoke")
    module = adapters.MethodModule(config, adapters.MethodDataModule(config).schedule)
    module.on_fit_start()
    module.extra = torch.nn.SyncBatchNorm(2)
    with pytest.raises(ConfigError, match=r"set train\.sync_batch_norm=true"):
        module.on_fit_start()


def test_gradients_are_divided_by_the_share_of_images_in_all_processes(
    adapters: Any, folder: Path
) -> None:
    config = configured(folder)
    module = adapters.MethodModule(config, adapters.MethodDataModule(config).schedule)
    module._trainer = trainer_of(2)
    weight = module.model.encoder.mask_token
    weight.grad = torch.ones_like(weight)
    module._shares = [1.0, 0.5]
    module.on_before_optimizer_step(None)
    assert weight.grad.unique().tolist() == pytest.approx([1 / (0.75 * 0.5)])
    assert module._shares == []


def test_weights_state_their_mask_and_rates_change_by_the_step(
    adapters: Any, folder: Path, tmp_path: Path
) -> None:
    config = configured(folder, "--mask.ratio=0.3", "--mask.unit=16")
    module = adapters.MethodModule(config, adapters.MethodDataModule(config).schedule)
    module.save_weights(tmp_path / "weights.safetensors")
    assert trained_mask(tmp_path / "weights.safetensors") == {"unit": 16, "ratio": 0.3}
    assert module.configure_optimizers()["lr_scheduler"]["interval"] == "step"
