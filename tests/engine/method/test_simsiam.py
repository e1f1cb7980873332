"""SimSiam: the published numbers, collapse, empty slots, refusals, and runs of the command."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from forked_command import finish
from numerics import GOLDEN, assert_close_to, load_golden_json, with_prefix
from simmim.backbone.build import Encoder, build_encoder
from simmim.command_line import load
from simmim.config.spec import resolve_spec
from simmim.data.batch import Batch
from simmim.data.distortion import distort, draw
from simmim.errors import ConfigError
from simmim.method.build import find_method
from simmim.method.simsiam import SimSiam, SimSiamMethod, negative_cosine
from simmim.pictures.neighbours import ViewPictures
from simmim.pretrain import build_model
from simmim.training.optim import build_optimizer
from simmim.training.schedule import Schedule, resolve_schedule
from simmim.weights.load import load_encoder

FIXTURES: dict[str, dict[str, Any]] = {
    f["name"]: f for f in json.loads((GOLDEN / "simsiam-index.json").read_text())["fixtures"]
}
MODELS = ["simsiam-features", "simsiam-tinyconv"]
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Bits are compared, and sums over threads have no fixed order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FeaturesAsTheyAre(nn.Module):
    """An encoder whose images are feature vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spec, self.num_features = SimpleNamespace(channels=width), width
        self.mask_token: nn.Parameter | None = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        return image


class TwoConvolutions(nn.Module):
    """The trunk that the golden file was made with."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.spec, self.num_features = SimpleNamespace(channels=3), second
        self.mask_token: nn.Parameter | None = None
        self.conv1 = nn.Conv2d(3, first, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        return F.relu(self.bn2(self.conv2(x)))


def ours(name: str) -> str:
    """facebookresearch/simsiam's name of a parameter → ours."""
    return name.replace("encoder.fc.", "projector.")


def golden_model(name: str) -> tuple[SimSiam, dict[str, Any], dict[str, Tensor], list[Tensor]]:
    """The model with golden weights, its index entry, all tensors, and the two views."""
    entry = FIXTURES[name]
    tensors = load_file(GOLDEN / entry["file"])
    config = entry["config"]
    encoder: nn.Module
    if config["trunk"] == "none":
        encoder = FeaturesAsTheyAre(config["feature_dim"])
    else:
        encoder = TwoConvolutions(*config["widths"])
    model = SimSiam(
        cast(Encoder, encoder), projector_width=config["dim"], predictor_width=config["pred_dim"]
    )
    model.load_state_dict({ours(k): v for k, v in with_prefix(tensors, "weights/").items()})
    views = [tensors["input/x1"], tensors["input/x2"]]
    if config["trunk"] == "none":
        views = [view[:, :, None, None] for view in views]
    return model, entry, tensors, views


@pytest.mark.parametrize("name", MODELS)
def test_golden_features(name: str) -> None:
    model, entry, tensors, views = golden_model(name)
    for number, view in enumerate(views, 1):
        z = model.project(view)
        p = model.predictor(z)
        assert_close_to(z, tensors[f"expect/z{number}"], entry["tolerance"]["forward"], "z")
        assert_close_to(p, tensors[f"expect/p{number}"], entry["tolerance"]["forward"], "p")


@pytest.mark.parametrize("name", MODELS)
def test_golden_loss_gradients_and_running_statistics(name: str) -> None:
    model, entry, tensors, views = golden_model(name)
    loss = model(*views)
    loss.backward()
    assert_close_to(loss, tensors["expect/loss"], entry["tolerance"]["loss"], "loss")
    expected = {ours(k): v for k, v in with_prefix(tensors, "grad/").items()}
    trained = {k for k, p in model.named_parameters() if p.grad is not None}
    assert trained == expected.keys()
    allowed = entry["tolerance"]["grad"]
    for key, parameter in model.named_parameters():
        if key in expected:
            largest = expected[key].abs().max() * allowed["of_tensor_max"] + allowed["atol"]
            assert (parameter.grad - expected[key]).abs().max() <= largest, key
        else:
            assert key == "projector.6.bias"
    buffers = dict(model.named_buffers())
    for key, value in with_prefix(tensors, "expect/buffers/").items():
        assert_close_to(buffers[ours(key)], value, entry["tolerance"]["forward"], key)


def test_golden_loss_alone() -> None:
    entry = FIXTURES["simsiam-loss"]
    tensors = load_file(GOLDEN / entry["file"])
    inputs = {k: v.requires_grad_() for k, v in with_prefix(tensors, "input/").items()}
    loss = negative_cosine(inputs["p1"], inputs["p2"], inputs["z1"], inputs["z2"])
    loss.backward()
    assert_close_to(loss, tensors["expect/loss"], entry["tolerance"], "loss")
    for name in ("p1", "p2"):
        grad = inputs[name].grad
        assert grad is not None
        assert_close_to(grad, tensors[f"grad/{name}"], entry["tolerance"], name)
    assert inputs["z1"].grad is None
    assert inputs["z2"].grad is None


def method(*flags: str) -> SimSiamMethod:
    config = load(["simsiam_smoke", "--data.path=x", *flags])
    found = find_method(config)
    assert isinstance(found, SimSiamMethod)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_golden_training_of_the_groups(name: str) -> None:
    """Four steps at the published rates: weight decay everywhere, the predictor's rate fixed."""
    model, entry, tensors, views = golden_model(name)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    recipe = entry["trajectory"]
    groups = method(f"--optim.weight_decay={recipe['weight_decay']}").parameter_groups(model)
    sgd = torch.optim.SGD(groups, lr=1.0, momentum=recipe["momentum"])
    schedule = Schedule("cosine", recipe["epochs"], 0, recipe["init_lr"], 0.0)
    losses = []
    for epoch in recipe["one_step_per_epoch_at_epochs"]:
        for group in sgd.param_groups:
            # the rate of the first step of an epoch: see `Schedule.lr_at`
            group["lr"] = schedule.rate_of(group, epoch + 1 if epoch else 0)
        sgd.zero_grad()
        loss = model(*views)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    losses.append(model(*views).item())
    allowed = entry["tolerance"]
    expected = tensors["expect/traj/losses"].tolist()
    assert losses == pytest.approx(expected, abs=allowed["traj losses"]["atol"])
    moved = {k: (p.detach() - before[k]).norm().item() for k, p in model.named_parameters()}
    for key, value in with_prefix(tensors, "expect/traj/delta_norm/").items():
        rel = allowed["traj delta_norm"]["rtol"]
        assert moved[ours(key)] == pytest.approx(float(value), rel=rel, abs=1e-9), key
    assert moved["projector.6.bias"] == 0


def test_golden_schedule() -> None:
    """The published rate changes with the epoch; ours equals it at the start of each epoch."""
    for entry in load_golden_json("simsiam-schedule")["schedules"]:
        scale = entry["total_batch_size"] / 256
        epochs, steps = entry["epochs"], 12
        lr = entry["base_lr"] * scale
        assert lr == pytest.approx(entry["init_lr"], rel=1e-12)
        schedule = Schedule("cosine", epochs * steps, 0, lr, 0.0)
        for epoch, (of_encoder, of_predictor) in enumerate(
            entry["lr_encoder_and_predictor_per_epoch"]
        ):
            assert schedule.value_at(epoch * steps) == pytest.approx(of_encoder, rel=1e-12)
            fixed = schedule.rate_of({"fixed_lr": True}, epoch * steps)
            assert fixed == pytest.approx(of_predictor, rel=1e-12)


def test_lightly_has_the_same_loss() -> None:
    try:
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
    except Exception as error:  # its torchvision may raise anything
        pytest.skip(f"lightly cannot be imported: {error}")
    torch.manual_seed(2)
    model = SimSiam(
        cast(Encoder, TwoConvolutions(8, 16)), projector_width=32, predictor_width=8
    ).train()
    projector, predictor = SimSiamProjectionHead(16, 16, 32), SimSiamPredictionHead(32, 8, 32)
    # in its layout the last linear layer of the projector has no bias
    for theirs, mine in ((projector, model.projector), (predictor, model.predictor)):
        state = {f"layers.{k}": v for k, v in mine.state_dict().items()}
        state.pop("layers.6.bias", None)
        theirs.load_state_dict(state)
    views = [torch.randn(12, 3, 16, 16) for _ in range(2)]
    z = [projector(model.encoder(view).flatten(2).mean(2)) for view in views]
    p = [predictor(projected) for projected in z]
    criterion = NegativeCosineSimilarity()
    expected = 0.5 * (criterion(p[0], z[1].detach()) + criterion(p[1], z[0].detach()))
    model.projector[6].bias.data.zero_()
    assert model(*views).item() == pytest.approx(expected.item(), abs=1e-6)


def test_groups_hold_all_that_trains() -> None:
    chosen = method("--optim.weight_decay=0.01")
    model = build_model(chosen.config, CPU)
    groups = chosen.parameter_groups(model)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(k for k, p in model.named_parameters() if p.requires_grad)
    assert "projector.6.bias" not in names
    assert [group["weight_decay"] for group in groups] == [0.01, 0.01]
    assert [bool(group.get("fixed_lr")) for group in groups] == [False, True]
    assert {name.split(".")[0] for name in groups[1]["names"]} == {"predictor"}
    groups = method("--method.fix_predictor_lr=false").parameter_groups(model)
    assert not any(group.get("fixed_lr") for group in groups)


def test_the_published_recipe() -> None:
    config = load(["simsiam_resnet50_100ep", "--data.path=x"])
    chosen = find_method(config)
    with torch.device("meta"):
        model = chosen.build(build_encoder(resolve_spec(config)))
    # as open-mmlab/mmpretrain counts, which has no frozen bias
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 38_199_360
    schedule = resolve_schedule(config, 1_281_167)
    assert (schedule.lr, schedule.warmup_steps, schedule.min_lr) == (0.1, 0, 0.0)
    assert schedule.total_steps == 250_227
    assert not config.optim.nesterov
    assert config.train.clip_norm == 0


def test_a_frozen_bias_is_none_of_the_optimisers() -> None:
    chosen = method()
    model = build_model(chosen.config, CPU)
    sgd = build_optimizer(model, chosen.config.optim, chosen.parameter_groups(model))
    assert sgd.defaults["momentum"] == 0.9
    assert not sgd.defaults["nesterov"]
    held = {parameter for group in sgd.param_groups for parameter in group["params"]}
    assert sgd.state.keys() <= held
    # with buffers from the start, a step that is skipped leaves them at zero
    assert all("momentum_buffer" in sgd.state[parameter] for parameter in held)


def batch_of(size: int, empty: tuple[int, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(4)
    image = torch.randint(0, 256, (size, 2, 64, 64, 3), dtype=torch.uint8, generator=generator)
    ids = torch.arange(size)
    ids[list(empty)] = -1
    image[list(empty)] = 0
    return Batch(image, ids, torch.zeros_like(ids), size - len(empty))


def trained_once(chosen: SimSiamMethod, batch: Batch) -> dict[str, Tensor]:
    model = build_model(chosen.config, CPU)
    loss = chosen.loss(model, batch)
    loss.backward()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers()) | {"loss": loss.detach()}


def test_empty_slots_carry_no_weight() -> None:
    chosen = method()
    whole = batch_of(6, empty=(1, 4))
    kept = torch.tensor([0, 2, 3, 5])
    without = Batch(whole.image[kept], whole.ids[kept], whole.epochs[kept], 4)
    found, expected = trained_once(chosen, whole), trained_once(chosen, without)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("present", [0, 1])
def test_batches_of_hardly_any_image_change_nothing(present: int) -> None:
    batch = batch_of(4, empty=tuple(range(present, 4)))
    found = trained_once(method(), batch)
    assert found.pop("loss") == 0
    for name, value in found.items():
        assert value.isfinite().all(), name
        if "running" not in name and name not in ("mean", "std", "feature_std"):
            assert not value[...].count_nonzero() or "num_batches" in name, name


def share_of(model: SimSiam, chosen: SimSiamMethod, views: list[Tensor]) -> float:
    model(*views)
    measures = {name: float(value) for name, value in chosen.measures(model).items()}
    assert measures["feature_std"] == pytest.approx(measures["feature_std_share"] / 8)
    return measures["feature_std_share"]


def test_collapse_is_told_from_health() -> None:
    chosen = method()
    model = build_model(chosen.config, CPU)
    assert isinstance(model, SimSiam)
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(16, 3, 64, 64, generator=generator) for _ in range(2)]
    healthy = share_of(model, chosen, views)
    assert 0.9 < healthy < 1.1
    assert chosen.warning({"feature_std": healthy / 8, "feature_std_share": healthy}) == ""
    # an encoder that sees nothing: what is left behind the last norm is rounding
    one = views[0][:1].expand(16, -1, -1, -1)
    share = share_of(model, chosen, [one, one])
    assert share < 0.1
    line = chosen.warning({"feature_std": share / 8, "feature_std_share": share})
    assert "collapse" in line
    assert "--optim.lr" in line
    assert "\n" not in line
    # all images but one in the same place: what a run without the stop-gradient ends in
    with torch.no_grad():
        z = torch.ones(256, 64)
        z[0] = -255.0
    model._measure(z)
    assert float(model.feature_std) * 8 < 0.3


def test_evaluation_measures_nothing() -> None:
    chosen = method()
    model = build_model(chosen.config, CPU).eval()
    assert isinstance(model, SimSiam)
    model(*[torch.randn(2, 3, 64, 64) for _ in range(2)])
    assert model.feature_std == 0
    assert "feature_std" not in model.state_dict()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.batch_size=4", "--train.accumulation_steps=4"], "at least 2"),
        (["--data.channels=4"], "--method.grey=0"),
        (["--method.jitter=[0.4, 0.4, 0.4, 0.6]"], "hue=0.6"),
        (["--method.jitter=[0.4, 0.4, -0.4, 0.1]"], "method.jitter=-0.4"),
        (["--method.grey=1.5"], "method.grey=1.5"),
        (["--method.blur_sigma=[2.0, 0.1]"], "must rise"),
        (["--method.projector_layers=0"], "method.projector_layers=0"),
    ],
)
def test_what_does_not_fit_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(["simsiam_smoke", "--data.path=x", *flags])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_channels_train_without_colour() -> None:
    chosen = method(
        "--data.channels=5", "--method.jitter_probability=0", "--method.grey=0", "--method.blur=1"
    )
    image = torch.randint(0, 256, (4, 2, 64, 64, 5), dtype=torch.uint8)
    ids = torch.arange(4)
    loss = chosen.loss(build_model(chosen.config, CPU), Batch(image, ids, ids * 0, 4))
    assert -1 <= loss.item() <= 1


def test_bfloat16_measures_and_compares_in_float32() -> None:
    chosen = method()
    model = build_model(chosen.config, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chosen.loss(model, batch_of(8))
    assert loss.dtype == torch.float32
    plain = chosen.loss(build_model(chosen.config, CPU), batch_of(8))
    assert loss.item() == pytest.approx(plain.item(), abs=0.05)
    assert 0.8 < float(chosen.measures(model)["feature_std_share"]) < 1.2


class Photos:
    """A source of encoded images, of which one is broken."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.*"))
        self.names = [file.name for file in self.files]

    def read(self, sample: int) -> bytes:
        return b"" if sample == 2 else self.files[sample].read_bytes()


def test_pictures_show_views_and_neighbours(photos: Path) -> None:
    chosen = method("--log.pictures=4")
    model = build_model(chosen.config, CPU)
    source = cast(Any, Photos(photos))
    pictures = ViewPictures(source, chosen.config, chosen.view(), chosen.distorted)
    assert 2 not in pictures.ids
    training = model.train().training
    picture = pictures.draw(model)
    assert picture is not None
    assert model.training == training
    # 64 px twice as large, five columns of them and four rows
    assert picture.size == (6 + 5 * 134, 18 + 4 * 148 + 6)
    again = pictures.draw(model)
    assert again is not None
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(again))
    near, cosines = pictures._neighbours(model)
    assert near.shape == (4, 2)
    assert all(number not in row for number, row in enumerate(near))
    assert (cosines[:, 0] >= cosines[:, 1]).all()
    # an image that is there twice has itself as its neighbour
    pictures.whole[-1] = pictures.whole[1]
    near, cosines = pictures._neighbours(model)
    assert near[1, 0] == len(pictures.whole) - 1
    assert cosines[1, 0] == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the command to its end."""
    output = tmp_path_factory.mktemp("runs") / "simsiam"
    result = finish(
        "simmim", "pretrain", "simsiam_smoke", f"--data.path={photos}", f"--output={output}"
    )
    assert result.returncode == 0, result.stderr
    return output


def test_a_run_trains_and_leaves_an_encoder(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert all(-1 <= row["loss"] <= 1 for row in rows)
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert 0.3 < rows[-1]["feature_std_share"] < 1.2
    with Image.open(run / "pictures" / "step_00000020.png") as picture:
        assert np.asarray(picture).std() > 20
    model = load_encoder(run)
    assert model.encoder.mask_token is None
    assert model.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 8, 8)


def test_a_resumed_run_ends_bitwise_equal(run: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "resumed"
    shutil.copytree(run, output)
    (output / "model.safetensors").unlink()
    shutil.rmtree(output / "checkpoints" / "step_00000020")
    arguments = ["pretrain", "simsiam_smoke", f"--data.path={photos}", f"--output={output}"]
    result = finish("simmim", *arguments)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout + result.stderr
    one, two = (load_file(folder / "model.safetensors") for folder in (run, output))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_two_processes_train_as_one(run: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "two"
    result = finish(
        "simmim",
        "pretrain",
        "simsiam_smoke",
        f"--data.path={photos}",
        f"--output={output}",
        "--train.steps=6",
        "--checkpoint.every_steps=6",
        processes=2,
    )
    assert result.returncode == 0, result.stderr
    rows, alone = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (output, run)
    )
    assert [row["step"] for row in rows] == list(range(1, 7))
    # batch norms see the whole batch; the first two rates are those of a longer run too
    for row, other in zip(rows[:2], alone[:2]):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert "projector.6.bias" in load_file(output / "model.safetensors")


def test_neighbours_vote_on_it(run: Path, photos: Path, tmp_path: Path) -> None:
    for number, file in enumerate(sorted(photos.glob("*.*"))[:16]):
        folder = tmp_path / ("train" if number % 4 else "val") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "val" / "b").mkdir(exist_ok=True)
    extra = sorted(photos.glob("*.*"))[17]
    (tmp_path / "val" / "b" / extra.name).write_bytes(extra.read_bytes())
    for command in (["knn", "--k=3"], ["probe", "--epochs=2"]):
        result = finish(
            "simmim",
            *command[:1],
            str(run),
            f"--train={tmp_path / 'train'}",
            f"--val={tmp_path / 'val'}",
            *command[1:],
        )
        assert result.returncode == 0, result.stderr
        assert "top-1" in result.stdout


def test_every_configured_value_arrives_in_the_model() -> None:
    flags = ["--method.projector_width=12", "--method.projector_layers=2"]
    flags += ["--method.predictor_width=5", "--data.mean=[0.1,0.2,0.3]", "--data.std=[0.4,0.5,0.6]"]
    chosen = method(*flags)
    model = chosen.build(build_encoder(resolve_spec(chosen.config)))
    wanted = {"projector_width": 12, "projector_layers": 2, "predictor_width": 5}
    assert model.settings == wanted
    linear = [layer for layer in model.projector if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [model.encoder.num_features, 12]
    assert model.predictor[0].weight.shape == (5, 12)
    assert model.predictor[3].weight.shape == (12, 5)
    assert model.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_every_configured_value_arrives_in_the_views() -> None:
    flags = ["--data.crop_scale=[0.3,0.8]", "--data.crop_ratio=[0.9,1.2]", "--data.flip=0.25"]
    chosen = method(*flags, "--data.max_pixels=5000000", "--seed=13")
    view = chosen.view()
    drawn = view.augmentation
    assert (drawn.size, drawn.channels) == (chosen.config.image_size, 3)
    assert (drawn.scale, drawn.ratio, drawn.flip) == ((0.3, 0.8), (0.9, 1.2), 0.25)
    assert (view.seed, view.max_pixels) == (13, 5_000_000)
    assert view.value_range == chosen.config.data.value_range


def test_each_view_is_distorted_by_draws_of_its_own() -> None:
    chosen, batch = method("--seed=3"), batch_of(3)
    found = chosen.distorted(batch.image, batch.ids, batch.epochs)
    for number, view in enumerate(found):
        draws = draw(batch.ids, batch.epochs, number, 3, chosen.settings)
        wanted = distort(batch.image[:, number], draws, chosen.settings.blur_sigma[1])
        assert torch.equal(view, wanted)
    others = method("--seed=4").distorted(batch.image, batch.ids, batch.epochs)
    assert not torch.equal(found[0], others[0])


def test_the_share_of_a_healthy_deviation_is_told_and_warned_of() -> None:
    chosen = method("--method.projector_width=16")
    model = chosen.build(build_encoder(resolve_spec(chosen.config)))
    model.feature_std.fill_(0.05)
    measures = {name: float(value) for name, value in chosen.measures(model).items()}
    assert measures == pytest.approx({"feature_std": 0.05, "feature_std_share": 0.2})
    assert "20% of that of healthy ones" in chosen.warning(measures)
    assert chosen.warning({"feature_std_share": 0.3}) == ""
