"""Model cards: true, readable by the Hub, silent about the machine; and `simmim export`."""

import json
import re
import tomllib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simmim import cli
from simmim.backbone.build import build_encoder, find_preset, spec_from_dict, spec_to_dict
from simmim.backbone.vit import ViTSpec
from simmim.command_line import load, load_finetuning
from simmim.config.sections import MaskConfig
from simmim.config.values import config_class
from simmim.data.open import open_source
from simmim.downstream.finetune import finetune
from simmim.method.build import find_method
from simmim.method.simmim import SimMIM
from simmim.method.simsiam import SimSiamConfig
from simmim.model.classifier import Classifier
from simmim.model.weights_file import save_weights, trained_mask
from simmim.pretrain import pretrain
from simmim.run_folder import RunFolder
from simmim.sharing.card import RunFacts, describe, write_card
from simmim.sharing.model_folder import export, save_pretrained
from simmim.sharing.run_facts import read_facts
from simmim.version import __version__
from simmim.weights.load import load_model

SPEC = ViTSpec(image_size=(32, 32), patch_size=16, embed_dim=16, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name must not get out, with two classes of photos in it."""
    root = tmp_path_factory.mktemp("someones-home")
    random = np.random.default_rng(0)
    for number in range(16):
        path = root / "animals" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def pretrained(secret: Path) -> Path:
    """A pre-training run of 4 steps, with checkpoints at 2 and 4."""
    flags = ["--train.steps=4", "--checkpoint.every_steps=2", "--data.workers=0", "--device=cpu"]
    where = [f"--data.path={secret / 'animals'}", f"--output={secret / 'runs' / 'mine'}"]
    assert pretrain(load(["smoke", *flags, *where])) == 0
    return secret / "runs" / "mine"


@pytest.fixture(scope="module")
def finetuned(secret: Path, pretrained: Path) -> Path:
    """A fine-tuning run of it, in which another than the last evaluation is made the best."""
    run = secret / "runs" / "tuned"
    flags = ["--data.workers=0", "--device=cpu", "--data.holdout=4", "--evaluate.every_epochs=1"]
    where = [f"--data.path={secret / 'animals'}", f"--output={run}", f"--pretrained={pretrained}"]
    assert finetune(load_finetuning(["finetune_smoke", *flags, *where])) == 0
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert len(rows) > 1
    rows[0]["top1"], rows[-1]["top1"] = 0.75, 0.5
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def parts(card: Path) -> tuple[dict[str, Any], str]:
    """The front matter, as YAML reads it, and the rest."""
    _, front, text = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def cell(text: str, name: str) -> str:
    found = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)
    assert found is not None, f"no row {name}"
    return found[1]


def run_snippet(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    monkeypatch.chdir(folder)
    values: dict[str, Any] = {}
    exec(found[1], values)
    return values


FACTS = RunFacts(
    name="mine",
    recipe={
        "seed": 3,
        "pretrained": "before",
        "data": {"path": "animals", "val_path": "", "mean": [0.5, 0.25]},
        "train": {"batch_size": 2048, "precision": "bf16"},
    },
    step=1234,
    epochs=12.345,
    data={"images": 5678, "digest": "abc", "unreadable": 2},
    loss=0.123456,
    evaluation={"top1": 0.75, "top5": 0.9876, "loss": 1.23456, "images": 4321},
    environment={
        "versions": {"simmim": "1", "torch": "2", "python": "3", "numpy": "4"},
        "device_name": "card",
        "processes": 8,
        "git_commit": "def",
    },
    picture=None,
)


def card_of(folder: Path, *given: Any, **options: Any) -> tuple[dict[str, Any], str]:
    return parts(write_card(folder, *given, **options))


def test_every_fact_of_a_run_has_its_row(tmp_path: Path) -> None:
    classes = tuple(f"c{n}" for n in range(21))
    front, text = card_of(tmp_path, Classifier(build_encoder(SPEC), classes), FACTS, license="mit")
    rows = {
        "length": "1,234 steps, 12.35 epochs",
        "batch": "2048",
        "precision": "bf16",
        "data": "animals",
        "images": "5,678",
        "digest of their names": "`abc`",
        "unreadable": "2",
        "pre-trained weights": "before",
        "device": "card × 8",
        "versions": "simmim 1, torch 2, python 3",
        "commit": "`def`",
        "top-1": "75.00%",
        "top-5": "98.76%",
        "validation loss": "1.2346",
        "validated on": "4,321 images of animals (held out)",
        "training loss, last 100 steps": "0.1235",
        "classes": f"21: {', '.join(classes[:20])}, … (config.json has all)",
    }
    assert {name: cell(text, name) for name in rows} == rows
    assert text.split("```toml\n")[1].split("```")[0] == (
        'seed = 3\npretrained = "before"\n\n[data]\npath = "animals"\nval_path = ""\n'
        'mean = [0.5, 0.25]\n\n[train]\nbatch_size = 2048\nprecision = "bf16"\n'
    )
    assert "# ViT, fine-tuned on animals\n" in text
    assert "Classifies images into 21 classes. Its encoder comes from [SimMIM](https://" in text
    assert "## License\n\n`mit`\n" in text
    assert "reconstruction.png" not in text
    assert front["license"] == "mit"
    assert front["tags"] == [
        "simmim", "vit", "pytorch", "masked-image-modeling", "self-supervised-learning",
    ]  # fmt: skip
    (entry,) = front["model-index"]
    assert entry["results"][0]["metrics"] == [
        {"type": "accuracy", "name": "Top-1 accuracy", "value": 0.75},
        {"type": "accuracy", "name": "Top-5 accuracy", "value": 0.9876},
    ]


def test_what_is_unknown_has_no_row(tmp_path: Path) -> None:
    known = replace(
        FACTS, recipe={}, step=None, epochs=None, data={"unreadable": 0}, evaluation={}, loss=None
    )
    known = replace(known, environment={"device_name": "card", "processes": 1})
    front, text = card_of(tmp_path, Classifier(build_encoder(SPEC), ("a", "b")), known)
    table = text.split("## Training\n\n")[1].split("\n\n")[0]
    assert table.splitlines() == ["| | |", "|---|---|", "| device | card |"]
    assert "## Results" not in text
    assert "## Recipe" not in text
    assert "model-index" not in front
    assert "# ViT, fine-tuned\n" in text
    assert cell(text, "classes") == "2: a, b"
    assert "Not stated yet" in text


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"path": "animals", "val_path": "others"}, "others"),
        ({"path": "animals"}, "animals (held out)"),
        ({}, "the training data (held out)"),
    ],
)
def test_what_was_validated_on(data: dict[str, str], name: str, tmp_path: Path) -> None:
    facts = replace(FACTS, recipe={"data": data})
    front, text = card_of(tmp_path, Classifier(build_encoder(SPEC), ("a", "b")), facts)
    assert cell(text, "validated on") == f"4,321 images of {name}"
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == name


def test_an_encoder_of_photos_that_are_not_square(tmp_path: Path) -> None:
    spec = replace(SPEC, image_size=(32, 64), channels=5)
    statistics = {"mean": (0.1, 0.2, 0.3, 0.4, 0.5), "std": (0.6, 0.7, 0.8, 0.9, 1.0)}
    model = SimMIM(build_encoder(spec), **statistics, norm_target=7)
    _, text = card_of(tmp_path, model, mask={"unit": 8, "ratio": 0.25}, picture=True)
    rows = {
        "image": "32 × 64 pixels, 5 channels",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "cell of the mask grid": "16 pixels",
        "embed dim": "16",
        "depth": "1",
        "num heads": "2",
        "mean": "0.1, 0.2, 0.3, 0.4, 0.5",
        "std": "0.6, 0.7, 0.8, 0.9, 1.0",
        "mask": "25% of units of 8 pixels",
        "target": "normalised over 7 × 7",
    }
    assert {name: cell(text, name) for name in rows} == rows
    assert "torch.zeros(1, 5, 32, 64, dtype=torch.uint8)" in text
    assert "# [1, 16, 2, 4]" in text
    assert "![original, masked, reconstruction](reconstruction.png)" in text
    assert "## Training" not in text
    assert describe(model, {"unit": 8, "ratio": 0.25}) == {
        "library_name": "simmim",
        "simmim_version": __version__,
        "model_class": "SimMIM",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "encoder": spec_to_dict(spec),
        "mean": pytest.approx(statistics["mean"]),
        "std": pytest.approx(statistics["std"]),
        "norm_target": 7,
        "mask": {"unit": 8, "ratio": 0.25},
    }


def test_what_config_json_says_of_a_classifier() -> None:
    model = Classifier(build_encoder(SPEC), ("a", "b"), margin=1.5)
    told = describe(model)
    assert (told["num_classes"], told["classes"], told["margin"]) == (2, ["a", "b"], 1.5)
    assert "mask" not in told


def test_a_pretrained_model(
    secret: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["export", str(pretrained), str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "reconstruction.png",
    }
    front, text = parts(tmp_path / "out" / "README.md")
    assert front == {
        "library_name": "simmim",
        "pipeline_tag": "image-feature-extraction",
        "license": "unknown",
        "tags": ["simmim", "swin", "pytorch", "masked-image-modeling", "self-supervised-learning"],
    }
    for path in (tmp_path / "out").iterdir():
        for name in (str(secret), *(part for part in secret.parts if len(part) > 5)):
            assert name.encode() not in path.read_bytes(), (path, name)
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert cell(text, "length") == "4 steps, 2 epochs"
    assert cell(text, "batch") == "8"
    assert cell(text, "data") == "animals"
    assert cell(text, "images") == "16"
    digest = open_source(str(secret / "animals")).names.digest()
    assert cell(text, "digest of their names") == f"`{digest}`"
    loss = sum(row["loss"] for row in rows) / 4
    assert cell(text, "training loss, last 100 steps") == f"{loss:.4f}"
    assert cell(text, "mask") == "60% of units of 16 pixels"
    assert cell(text, "depths") == "1, 2"
    assert f"torch {version('torch')}" in cell(text, "versions")
    commit = json.loads((pretrained / "run.json").read_text())["starts"][0]["git_commit"]
    assert commit is None or cell(text, "commit") == f"`{commit}`"
    recipe = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    whole = tomllib.loads((pretrained / "config.toml").read_text())
    assert recipe["data"]["path"] == "animals"
    assert recipe["output"] == "mine"
    whole["data"]["path"], whole["output"] = "animals", "mine"
    assert recipe == whole

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model = load_model(tmp_path / "out")
    assert config["model_class"] == "SimMIM"
    assert config["mask"] == {"unit": 16, "ratio": 0.6}
    assert "model_type" not in config  # which says that a folder is Hugging Face's
    assert spec_from_dict(config["encoder"]) == model.encoder.spec
    assert config["num_parameters"] == sum(p.numel() for p in model.parameters())
    newest = load_model(pretrained / "checkpoints" / "step_00000004").state_dict()
    assert all(torch.equal(newest[k], v) for k, v in model.state_dict().items())
    assert trained_mask(tmp_path / "out") == {"unit": 16, "ratio": 0.6}
    newest_picture = max((pretrained / "pictures").iterdir())
    assert (tmp_path / "out/reconstruction.png").read_bytes() == newest_picture.read_bytes()

    values = run_snippet(text, tmp_path / "out", monkeypatch)
    assert values["features"].shape == (1, 32, 8, 8)
    assert "# [1, 32, 8, 8]" in text


def test_an_earlier_checkpoint(pretrained: Path, tmp_path: Path) -> None:
    export(pretrained / "checkpoints" / "step_00000002", tmp_path / "out", license="mit")
    front, text = parts(tmp_path / "out" / "README.md")
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert cell(text, "length") == "2 steps, 1 epochs"
    loss = (rows[0]["loss"] + rows[1]["loss"]) / 2
    assert cell(text, "training loss, last 100 steps") == f"{loss:.4f}"
    assert front["license"] == "mit"
    early = load_model(pretrained / "checkpoints" / "step_00000002").state_dict()
    assert all(
        torch.equal(early[k], v) for k, v in load_model(tmp_path / "out").state_dict().items()
    )


def test_a_finetuned_model(
    secret: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(finetuned, tmp_path / "out")
    best = json.loads((finetuned / "evaluations.jsonl").read_text().splitlines()[0])
    front, text = parts(tmp_path / "out" / "README.md")
    assert front["pipeline_tag"] == "image-classification"
    (entry,) = front["model-index"]
    assert entry["name"] == "tuned"
    (result,) = entry["results"]
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"type": "imagefolder", "name": "animals (held out)"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [
        ("accuracy", 0.75),
        ("accuracy", round(best["top5"], 6)),
    ]
    assert cell(text, "top-1") == "75.00%"
    assert cell(text, "validated on") == "4 images of animals (held out)"
    assert cell(text, "length").startswith(f"{best['step']} steps, ")
    assert cell(text, "pre-trained weights") == "mine"
    assert cell(text, "classes") == "2: cat, dog"
    for path in (tmp_path / "out").iterdir():
        assert secret.name.encode() not in path.read_bytes()
    model = load_model(tmp_path / "out")
    assert isinstance(model, Classifier)
    kept = load_model(RunFolder(finetuned).best_weights).state_dict()
    assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items())
    assert not (tmp_path / "out" / "reconstruction.png").exists()
    assert "reconstruction.png" not in text

    Image.new("RGB", (40, 30), "red").save(tmp_path / "out" / "photo.jpg")
    values = run_snippet(text, tmp_path / "out", monkeypatch)
    assert values["answer"].label in ("cat", "dog")


def test_the_hub_reads_the_card(finetuned: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    export(finetuned, tmp_path / "out")
    card = hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "simmim"
    assert card.data.model_name == "tuned"
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["Top-1 accuracy"] == 0.75
    assert {result.dataset_name for result in card.data.eval_results} == {"animals (held out)"}


def test_photos_for_the_picture(pretrained: Path, finetuned: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 70), "blue").save(tmp_path / "mine.png")
    photos = [tmp_path / "mine.png"]
    export(pretrained, tmp_path / "a", images=photos)
    export(pretrained, tmp_path / "b", images=photos)
    with Image.open(tmp_path / "a" / "reconstruction.png") as picture:
        original = np.asarray(picture)[18:146, 6:134]  # 64 pixels, twice as large
        assert (np.abs(original.astype(int) - [0, 0, 255]) <= 1).all()
    drawn = (tmp_path / "a" / "reconstruction.png").read_bytes()
    assert (tmp_path / "b" / "reconstruction.png").read_bytes() == drawn
    with pytest.raises(ValueError, match="a classifier reconstructs nothing"):
        export(finetuned, tmp_path / "c", images=photos)
    assert not (tmp_path / "c").exists()
    # without a picture, the one of before goes
    export(pretrained, tmp_path / "a", with_picture=False, overwrite=True)
    assert not (tmp_path / "a" / "reconstruction.png").exists()
    assert "reconstruction.png" not in (tmp_path / "a" / "README.md").read_text()


def test_what_exists_is_kept(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    (out / "notes.txt").write_text("mine too")
    (tmp_path / "file").write_text("")
    before = {p: p.read_bytes() for p in pretrained.iterdir() if p.is_file()}
    for folder, message in [
        (out, "README.md exists"),
        (pretrained, "is the folder of a run"),
        (tmp_path / "file", "is a file"),
    ]:
        for flag in ["--overwrite", "--no-picture"] if folder != out else ["--no-picture"]:
            assert cli.main(["export", str(pretrained), str(folder), flag]) == 2
            captured = capsys.readouterr()
            assert message in captured.err
            assert captured.err.count("\n") == 1
    assert [p.name for p in sorted(out.iterdir())] == ["README.md", "notes.txt"]
    assert (out / "README.md").read_text() == "mine"
    assert {p: p.read_bytes() for p in pretrained.iterdir() if p.is_file()} == before
    assert cli.main(["export", str(pretrained), str(out), "--overwrite"]) == 0
    assert "pre-trained with SimMIM" in (out / "README.md").read_text()
    assert (out / "notes.txt").read_text() == "mine too"
    assert cli.main(["export", str(tmp_path / "none"), str(tmp_path / "new")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", str(pretrained), str(tmp_path / "new"), "--license=a: b"])
    assert not (tmp_path / "new").exists()


def test_weights_without_a_run(tmp_path: Path) -> None:
    model = SimMIM(build_encoder(SPEC), norm_target=7)
    save_weights(model, tmp_path / "weights.safetensors", MaskConfig(unit=16, ratio=0.5))
    export(tmp_path / "weights.safetensors", tmp_path / "out")
    front, text = parts(tmp_path / "out" / "README.md")
    assert front["tags"][1] == "vit"
    assert "# ViT, pre-trained with SimMIM" in text
    assert cell(text, "mask") == "50% of units of 16 pixels"
    assert cell(text, "target") == "normalised over 7 × 7"
    assert "## Training" not in text
    assert load_model(tmp_path / "out").norm_target == 7
    assert trained_mask(tmp_path / "out") == {"unit": 16, "ratio": 0.5}


def test_a_preset_has_its_name(tmp_path: Path) -> None:
    spec = replace(SPEC, embed_dim=192, depth=12, num_heads=3, final_norm=True)
    write_card(tmp_path, SimMIM(build_encoder(spec)))
    assert "# vit_tiny, pre-trained with SimMIM" in (tmp_path / "README.md").read_text()


def test_damaged_run_folders(pretrained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    facts = read_facts(run)
    assert facts is not None
    assert (facts.step, facts.loss, facts.recipe, facts.picture) == (3, None, {}, None)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"st')
    (run / "config.toml").write_text("= nothing")
    (run / "checkpoints" / "step_00000003" / "state.json").write_text("[]")
    facts = read_facts(run / "checkpoints" / "step_00000003")
    assert facts is not None
    assert (facts.step, facts.loss, facts.recipe) == (3, 2.0, {})
    model = SimMIM(build_encoder(SPEC))
    assert cell(write_card(tmp_path, model, facts).read_text(), "length") == "3 steps"
    assert read_facts(tmp_path / "elsewhere" / "model.safetensors") is None


def test_hostile_names(tmp_path: Path) -> None:
    classes = ("a|b", "<script>", "line\nbreak", "`code` *x*", "caf\u00e9 \U0001f600")
    facts = RunFacts(
        name='x"\n---\nlicense: mit',
        recipe={"data": {"path": 'p"\x85|q'}, "train": {}},
        step=3,
        epochs=None,
        data={},
        loss=None,
        evaluation={"top1": 0.5, "top5": 1.0, "loss": 1.0, "images": 2},
        environment={},
        picture=None,
    )
    model = Classifier(build_encoder(SPEC), classes)
    save_pretrained(model, tmp_path / "out", facts=facts)
    scratch = replace(facts, recipe={**facts.recipe, "pretrained": ""})
    save_pretrained(model, tmp_path / "scratch", facts=scratch)
    from_scratch = parts(tmp_path / "scratch" / "README.md")
    assert "It was trained from scratch." in from_scratch[1]
    assert from_scratch[0]["tags"] == ["simmim", "vit", "pytorch"]
    front, text = parts(tmp_path / "out" / "README.md")
    assert front["license"] == "unknown"
    assert front["model-index"][0]["name"].startswith('x"')
    assert cell(text, "classes") == (
        "5: a\\|b, \\<script\\>, line\N{REPLACEMENT CHARACTER}break, \\`code\\` \\*x\\*, "
        "caf\u00e9 \U0001f600"
    )
    assert load_model(tmp_path / "out").classes == classes
    assert json.loads((tmp_path / "out/config.json").read_text("utf-8"))["classes"] == [*classes]


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "convnext_tiny", "swinv2_small"])
def test_a_preset_is_named_and_a_method_is_told(name: str, tmp_path: Path) -> None:
    """ResNet-34 and -50 have as many blocks."""
    settings = SimSiamConfig(name="simsiam")
    config = config_class(settings.__class__)(method=settings)
    with torch.device("meta"):
        model = find_method(config).build(find_preset(name).build())
    model.mean, model.std = torch.zeros(3), torch.ones(3)
    text = write_card(tmp_path, model).read_text()
    assert f"# {name}, pre-trained with SimSiam" in text
    assert "masked-image-modeling" not in text
    assert 'model = simmim.load_model(".")  # this folder, or its name on the Hub' in text
