"""bench/throughput.py on models small enough for a test: its checks, numbers and errors."""

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import throughput
from bench.peers.by_method import PEERS
from bench.peers.peer import Mismatch, Pair, Unavailable
from bench.steps.checks import check_equal
from bench.steps.engine_row import EngineRow, engine_loss, raise_zero_norms
from bench.steps.floor import products_of_step
from bench.steps.images import Images
from bench.steps.measurement import first_steps
from bench.steps.options import parse_options
from bench.steps.peer_row import PeerRow
from simmim.backbone.build import PRESETS
from simmim.config.sections import DataConfig, ModelConfig, TrainConfig
from simmim.config.values import config_class
from simmim.method.build import method_class

CPU = torch.device("cpu")
SMALL = ["--device=cpu", "--model=vit_tiny", "--image-size=64", "--batch=1", "--dtype=float32"]
SHORT = ["--rounds=1", "--seconds=0"]

# warnings of the peers themselves
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("throughput") / "out" / "vit.json"
    assert throughput.main([*SMALL, *SHORT, f"--json={path}"]) == 0
    assert [p.name for p in path.parent.iterdir()] == ["vit.json"]
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def test_every_row_runs_or_says_why_not(written: dict[str, Any]) -> None:
    names = [row["name"] for row in written["rows"]]
    assert names[:2] == ["simmim", "reference PyTorch"]
    skipped = {row["name"]: row["reason"] for row in written["skipped"]}
    assert sorted([*names[2:], *skipped]) == sorted(PEERS["simmim"])
    for reason in skipped.values():
        assert any(words in reason for words in ("pip install", "does not import here", "ResNets"))
    assert written["checks"].keys() == set(names) - {"simmim"}


def test_numbers(written: dict[str, Any]) -> None:
    floor, ours = written["floor"], written["rows"][0]
    assert set(floor["by_dtype"]) == {"float32"}
    assert floor["ms"] == pytest.approx(floor["by_dtype"]["float32"])
    for row in written["rows"]:
        assert row["images_per_s"] == pytest.approx(1e3 / row["ms"])
        assert row["spread_ms"][0] <= row["ms"] <= row["spread_ms"][1]
        assert row["ratio"] == pytest.approx(row["ms"] / ours["ms"])
        assert row["floor_ratio"] == pytest.approx(floor["ms"] / row["ms"])
        assert row["flops_per_s"] == pytest.approx(floor["flops"] / row["ms"] * 1e3)
        assert row["first_step_s"] > 0
        # the gradients are there at the end of a backward pass
        assert row["peak_bytes"] > 4 * 5_000_000
        assert 1e5 < row["saved_bytes_per_image"] < 1e7
        assert (row["batch"], row["dtype"], row["model"]) == (1, "float32", "vit_tiny")
        assert row["mfu"] is None


def test_machine_and_settings(written: dict[str, Any]) -> None:
    machine = written["machine"]
    assert machine["cores"] >= 1
    assert machine["threads"] == torch.get_num_threads()
    assert machine["versions"].keys() >= {"torch", "triton", "timm", "transformers", "lightly"}
    assert written["settings"]["image_size"] == [64, 64]


def make_base(method: str = "simmim", image_size: int = 64, **model: Any) -> EngineRow:
    settings = method_class(method).Settings
    config = config_class(settings)(
        method=settings(name=method),
        model=ModelConfig(**model),
        data=DataConfig(path="random images", image_size=image_size),
        train=TrainConfig(precision="float32", batch_size=8),
    )
    return EngineRow("simmim", config, CPU)


MODELS: dict[str, dict[str, Any]] = {
    "swin": {"name": "swin_tiny", "window_size": 4}
    | {"embed_dim": 12, "depths": [2, 2, 2], "num_heads": [1, 2, 4]},
    "swinv2": {"name": "swinv2_tiny", "window_size": 4}
    | {"embed_dim": 12, "depths": [2, 2, 2], "num_heads": [1, 2, 4]},
    "vit": {"name": "vit_tiny", "embed_dim": 24, "depths": [2], "num_heads": [2], "patch_size": 8},
    "vit-plain": {"name": "vit_base_plain", "patch_size": 8}
    | {"embed_dim": 24, "depths": [2], "num_heads": [2]},
    "resnet": {"name": "resnet18"},
    "resnet-bottleneck": {"name": "resnet50", "depths": [1, 1, 1, 1]},
}
COMPARED = [("simmim", model, peer) for model in MODELS for peer in PEERS["simmim"]]
COMPARED += [("tokens", model, peer) for model in ("vit", "vit-plain") for peer in PEERS["tokens"]]
COMPARED += [("simsiam", "resnet", peer) for peer in PEERS["simsiam"]]


@pytest.mark.parametrize(("method", "model", "name"), COMPARED)
def test_peers_compute_the_same(method: str, model: str, name: str) -> None:
    base = make_base(method, **MODELS[model])
    with torch.no_grad():
        for parameter in base.model.parameters():  # fresh norms and biases would all look alike
            parameter.add_(0.05 * torch.randn_like(parameter))
    try:
        row = PeerRow(PEERS[method][name](base.spec), base.config, CPU)
    except Unavailable as reason:
        pytest.skip(str(reason))
    loss, gradient = check_equal(base, row)
    assert loss < 2e-6
    assert gradient < 5e-5


@pytest.mark.parametrize("name", PEERS["simmim"])
def test_a_peer_takes_a_memory_format_and_stays_the_same(name: str) -> None:
    base = make_base(name="resnet18")
    try:
        row = PeerRow(PEERS["simmim"][name](base.spec), base.config, CPU)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert row.choose_format(Images.make(2, base.model, base.config))
    assert row.note.endswith("the faster here")
    assert row.format in row.peer.formats
    assert check_equal(base, row)[1] < 1e-3


def test_simsiam_has_a_row_that_distorts_by_itself() -> None:
    """It computes what the row computes whose views are ready."""
    base = make_base("simsiam", name="resnet18")
    whole = base.with_distortion("whole")
    images = Images.make(4, base.model, base.config)
    assert images.batch.image.shape == (4, 2, 64, 64, 3)
    first, second = images.ready
    assert first.shape == second.shape == (4, 3, 64, 64)
    assert not torch.equal(first, second)
    loss, gradient = check_equal(base, whole)
    assert loss < 1e-6
    assert gradient < 1e-6
    seen = [float(row.step(images)()) for row in (base, whole)]
    assert all(-1 <= loss <= 1 for loss in seen)
    assert base.run.step == 0  # rows count their steps apart


def test_no_branch_begins_as_nothing() -> None:
    model = make_base(name="resnet18").model
    norms = [m.bn2 for m in model.modules() if hasattr(m, "bn2")]
    assert len(norms) == 8
    assert all(norm.weight.all() for norm in norms)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(
        torch.equal(value, before[name])
        for name, value in raise_zero_norms(model).state_dict().items()
    )


def test_a_recipe_is_a_model_a_method_and_a_ratio() -> None:
    config = parse_options(["--device=cpu", "--model=vit_small_tokens"]).config
    assert (config.model.name, config.method.name) == ("vit_small_plain", "tokens")
    assert config.mask.ratio == 0.75
    assert config.image_size == (224, 224)
    images = Images.make(2, EngineRow("simmim", config, CPU).model, config)
    assert images.ready[1].sum(dim=(1, 2)).tolist() == [147, 147]


def test_products_are_those_of_torch() -> None:
    base = make_base(name="vit_tiny", depths=[2])
    images = Images.make(2, base.model, base.config)
    counts = products_of_step(base.model, images, base.config)
    base.model.use_backend("reference")
    with FlopCounterMode(display=False) as counter:
        engine_loss(base.model, images, base.config, "float32").backward()
    counted = sum(product.flops * times for product, times in counts.items())
    assert counted == counter.get_total_flops()


def test_a_row_that_differs_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = EngineRow.load

    def wrong(self: EngineRow, weights: dict[str, torch.Tensor]) -> None:
        original(self, weights)
        with torch.no_grad():
            self.model.encoder.blocks[3].attn.proj.weight.mul_(1.01)

    monkeypatch.setattr(EngineRow, "load", wrong)
    assert throughput.main([*SMALL, *SHORT, "--only=simmim,reference"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("throughput.py: reference PyTorch: ")
    assert "off by" in last


def test_a_gradient_that_differs_is_named() -> None:
    base = make_base(name="vit_tiny", depths=[1])
    row = EngineRow("other", base.config, CPU)
    row.pairs = [Pair("decoder.0.bias", lambda w: w["decoder.0.bias"] * 1.01)]
    with pytest.raises(Mismatch, match=r"other: gradient of decoder\.0\.bias is off by 0\.0099"):
        check_equal(base, row)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=swin_bse"], "--model swin_bse is unknown; did you mean swin_base?"),
        (["--model=swin_tiny", "--image-size=64"], "a window of 6 tokens does not fit"),
        (["--batch=0"], "at least 1 image"),
        (["--dtype=fp8"], "invalid choice: 'fp8'"),
        (["--only=simmim,tim"], "--only tim is no row; did you mean timm?"),
        (["--model=resnet18", "--method=simsiam", "--only=timm"], "--only timm is no row"),
        (["--model=resnet18", "--method=simsiam", "--batch=1"], "need at least 2"),
        (["--model=vit_small_tokens", "--method=simsiam"], "goes with --method tokens"),
        (["--json=/proc/nowhere/x.json"], "cannot be written"),
    ],
)
def test_wrong_options(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        throughput.main(flags)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_window_that_transformers_cannot_shrink() -> None:
    with pytest.raises(Unavailable) as reason:
        PEERS["simmim"]["transformers"](PRESETS["swin_large"])
    if "install" in str(reason.value) or "import" in str(reason.value):
        pytest.skip(str(reason.value))
    assert "12 tokens to the 6 of the last stage" in str(reason.value)


def test_a_compiled_row_that_diverges_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the row that shares its weights goes on with what it had."""
    options = parse_options(SMALL)
    plain = EngineRow("plain", options.config, CPU)
    images = Images.make(1, plain.model, options.config)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    compiled = plain.compiled()

    def step() -> torch.Tensor:
        with torch.no_grad():
            for parameter in plain.model.parameters():
                parameter.fill_(torch.nan)
        return torch.tensor(1.0)

    compiled.step = lambda images: step  # type: ignore[method-assign]
    before = plain.state()[0]
    steps, seconds, skipped = first_steps([plain, compiled], images, CPU)
    assert steps.keys() == seconds.keys() == {"plain"}
    assert [row["name"] for row in skipped] == ["plain + compile"]
    assert "not finite" in skipped[0]["reason"]
    after = plain.state()[0]
    assert all(after[name].isfinite().all() for name in before)
