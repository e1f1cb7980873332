"""Evaluation: the counts of a loop by hand, whatever the order, the processes and the trouble."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from forked_command import finish
from simmim import cli
from simmim.backbone.build import build_encoder
from simmim.backbone.vit import ViTSpec
from simmim.data.decode import MAX_PIXELS
from simmim.data.labels import Labels, labels_of
from simmim.data.open import open_source
from simmim.data.source import Source
from simmim.distributed import World
from simmim.downstream import evaluate as module
from simmim.downstream.evaluate import evaluate, evaluation_view, load_classifier, match_to_model
from simmim.errors import DataError
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.weights_file import save_weights
from simmim.run_folder import RunFolder

SPEC = ViTSpec(image_size=(32, 32), patch_size=8, embed_dim=16, depth=2, num_heads=2, drop_path=0.9)
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
ALONE = World(0, 1, torch.device("cpu"))


def make_classifier(classes: tuple[str, ...] = CLASSES) -> Classifier:
    torch.manual_seed(5)
    model = Classifier(build_encoder(SPEC), classes)
    with torch.no_grad():
        model.head.weight.normal_()  # as initialised, a ViT's head says next to nothing
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 images of 7 classes, of several sizes, and one in each of two classes unreadable."""
    random = np.random.default_rng(3)
    for number in range(23):
        path = tmp_path / "val" / CLASSES[number % 7] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        size = (40 + 3 * number, 64 - number)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return tmp_path / "val"


def opened(folder: Path) -> tuple[Source, Labels]:
    source = open_source(str(folder))
    labels = labels_of(source)
    assert labels is not None
    return source, labels


def by_hand(model: Classifier, source: Source, labels: Labels) -> tuple[Tensor, Tensor]:
    """Logits and classes, an image at a time."""
    view = evaluation_view(model)
    images = [torch.from_numpy(view(source.read(n))) for n in range(len(source.names))]
    with torch.no_grad():
        logits = torch.cat([model(image[None]) for image in images])
    return logits, torch.from_numpy(labels.values)


def test_counts_of_a_loop_by_hand(folder: Path) -> None:
    source, labels = opened(folder)
    model = make_classifier()
    logits, label = by_hand(model, source, labels)
    loss = torch.nn.functional.cross_entropy(logits, label).item()
    best = logits.argsort(1, descending=True)
    confusion = torch.zeros(7, 7, dtype=torch.int64)
    for true, answer in zip(label, best[:, 0]):
        confusion[true, answer] += 1
    assert 0 < confusion.trace() < 23  # else the numbers below could not tell right from wrong
    model.train()  # stochastic depth of 0.9 would be noticed
    done: list[int] = []
    for batch_size, workers in ((4, 0), (64, 1)):
        metrics = evaluate(
            model,
            source,
            labels,
            ALONE,
            batch_size=batch_size,
            workers=workers,
            advance=done.append,
        )
        assert metrics.num_images == 23
        assert metrics.loss == pytest.approx(loss, rel=1e-5)
        assert metrics.top1 == (best[:, 0] == label).double().mean().item()
        assert metrics.top5 == (best[:, :5] == label[:, None]).any(1).double().mean().item()
        assert metrics.confusion is not None
        assert torch.equal(metrics.confusion.view(7, 7), confusion)
        assert metrics.counts[0].tolist() == torch.bincount(label, minlength=7).tolist()
    assert done == [4, 4, 4, 4, 4, 3, 23]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_margin_is_the_models(folder: Path) -> None:
    model = make_classifier()
    assert evaluation_view(model).margin == 1.0  # views of 32 pixels
    model.margin = 1.5
    assert evaluation_view(model).margin == 1.5
    assert evaluation_view(model, margin=0).margin == 0
    source, labels = opened(folder)
    wide = evaluate(model, source, labels, ALONE, batch_size=8, workers=0)
    model.margin = 0
    assert evaluate(model, source, labels, ALONE, batch_size=8, workers=0).loss != wide.loss


def test_unreadable_images_are_named_and_do_not_count(folder: Path) -> None:
    source, labels = opened(folder)
    model = make_classifier()
    (folder / "bee" / "01.png").write_bytes(b"no image")
    (folder / "dog" / "10.png").write_bytes(b"")
    bad = [source.names[n] for n in range(23)].index("bee/01.png")
    told: list[str] = []
    metrics = evaluate(model, source, labels, ALONE, batch_size=4, workers=0, report=told.append)
    assert metrics.num_images == 21
    assert told == [
        "unreadable, not counted: bee/01.png: no image of a known format",
        "unreadable, not counted: dog/10.png: the file is empty",
    ]
    # the same as if they had no label
    values = labels.values.copy()
    values[[bad, list(source.names).index("dog/10.png")]] = -1
    rest = evaluate(model, source, Labels(values, CLASSES), ALONE, batch_size=9, workers=0)
    assert torch.equal(rest.counts, metrics.counts)
    assert rest.loss == pytest.approx(metrics.loss, rel=1e-6)
    with pytest.raises(DataError, match="none of the images has a label"):
        evaluate(model, source, Labels(values * 0 - 1, CLASSES), ALONE, batch_size=9, workers=0)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    model.train()
    with pytest.raises(DataError, match=r"none of the 23 .* \(ant/00.png: the file is empty\)"):
        evaluate(model, source, labels, ALONE, batch_size=9, workers=0, report=told.append)
    assert model.training


def test_classes_are_matched_by_name(folder: Path) -> None:
    source, labels = opened(folder)
    straight = evaluate(make_classifier(), source, labels, ALONE, batch_size=8, workers=0)
    model = make_classifier(CLASSES[::-1])  # the same head, called otherwise
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.flip(0))
    turned = evaluate(model, source, labels, ALONE, batch_size=8, workers=0)
    assert torch.equal(turned.counts, straight.counts.flip(1))

    more = make_classifier((*CLASSES, "hen"))
    assert match_to_model(labels, more).classes == more.classes  # a class without images is fine
    few = make_classifier(CLASSES[:6])
    with pytest.raises(DataError, match="this set's classes are not the model's 6: unknown gnu"):
        evaluate(few, source, labels, ALONE, batch_size=8)
    # numbers say which class they mean; names for a model that knows numbers must be as many
    numbered = Labels(np.array([0, 2]), ("0", "1", "2"))
    assert match_to_model(numbered, more).values.tolist() == [0, 2]
    nameless = make_classifier(tuple("0123456"))
    assert match_to_model(labels, nameless).values.tolist() == labels.values.tolist()
    assert match_to_model(Labels(np.array([0, 1]), ("2", "5")), nameless).values.tolist() == [2, 5]
    with pytest.raises(DataError, match="this set has 3 classes"):
        match_to_model(Labels(np.array([0]), CLASSES[:3]), nameless)


SHARED = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
from pathlib import Path
from test_evaluate import make_classifier, opened
from simmim import distributed
from simmim.downstream.evaluate import evaluate
world = distributed.init("cpu")
told = []
source, labels = opened(Path(sys.argv[1]))
model = make_classifier()
found = evaluate(model, source, labels, world, batch_size=4, workers=0, report=told.append)
distributed.finish(world)
answer = json.dumps([found.counts.tolist(), found.loss, found.confusion.tolist(), told])
Path(sys.argv[1]).with_name(f"answer{world.rank}.json").write_text(answer)
"""


def test_processes_share_the_images(folder: Path) -> None:
    (folder / "bee" / "01.png").write_bytes(b"no image")
    script = folder.with_name("shared.py")
    script.write_text(SHARED)
    here = [str(Path(__file__).parent), *filter(None, sys.path)]
    done = finish(script, str(folder), json.dumps(here), processes=2)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(folder.with_name(f"answer{rank}.json").read_text()) for rank in (0, 1)]
    source, labels = opened(folder)
    told: list[str] = []
    alone = evaluate(
        make_classifier(), source, labels, ALONE, batch_size=4, workers=0, report=told.append
    )
    assert alone.confusion is not None
    for rank, (counts, loss, confusion, lines) in enumerate(answers):
        assert counts == alone.counts.tolist()
        assert loss == pytest.approx(alone.loss, rel=1e-6)
        assert confusion == alone.confusion.tolist()
        assert lines == (told if rank == 0 else [])
    assert len(told) == 1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_weights(make_classifier(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_command(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, labels = opened(folder)
    expected = evaluate(make_classifier(), source, labels, ALONE, batch_size=64, workers=0)
    command = ["evaluate", str(checkpoint), str(folder), "--workers=0", "--device=cpu"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert f"top-1 {expected.top1:.2%}  top-5 {expected.top5:.2%}" in shown
    assert f"loss {expected.loss:.4f}  on 23 images" in shown
    row = next(line for line in shown.splitlines() if line.startswith("cat")).split()
    right, images = int(expected.counts[1, 2]), int(expected.counts[0, 2])
    assert row[1:4] == [str(images), str(right), f"{right / images:.2%}"]

    report = tmp_path / "report"
    assert cli.main([*command, f"--output={report}"]) == 0
    with (report / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert [int(row["correct"]) for row in rows] == expected.counts[1].tolist()
    with (report / "confusion.csv").open() as file:
        confusion = [[int(n) for n in row[1:]] for row in list(csv.reader(file))[1:]]
    assert expected.confusion is not None
    assert confusion == expected.confusion.view(7, 7).tolist()
    before = (report / "per_class.csv").read_bytes()
    (report / "per_class.csv").write_bytes(before + b"#")
    capsys.readouterr()
    assert cli.main([*command, f"--output={report}"]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"simmim: error: {report / 'per_class.csv'} exists; choose another --output "
        + ("or add --overwrite\n")
    )
    assert (report / "per_class.csv").read_bytes() == before + b"#"
    assert cli.main([*command, f"--output={report}", "--overwrite"]) == 0
    assert (report / "per_class.csv").read_bytes() == before


def test_what_the_command_refuses(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(SimMIM(build_encoder(SPEC)), tmp_path / "pretrained.safetensors")
    save_weights(make_classifier(CLASSES[:6]), tmp_path / "six.safetensors")
    (tmp_path / "file").write_text("")
    good = [str(checkpoint), str(folder)]
    for arguments, message in [
        ([str(tmp_path / "no.safetensors"), str(folder)], "no such file or folder"),
        ([str(tmp_path / "pretrained.safetensors"), str(folder)], "`simmim finetune` makes a"),
        ([str(tmp_path / "six.safetensors"), str(folder)], f"{folder}: this set's classes are"),
        ([str(checkpoint), str(folder / "ant")], "nothing tells the classes"),
        ([str(checkpoint), str(tmp_path / "none")], "no such file or folder"),
        ([*good, f"--labels={tmp_path / 'none.csv'}"], "none.csv"),
        ([*good, f"--output={tmp_path / 'file'}"], "is a file"),
        ([*good, "--margin=0.5"], "margin=0.5"),
    ]:
        assert cli.main(["evaluate", *arguments, "--workers=0", "--device=cpu"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("simmim: error: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1


def test_a_label_file(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, labels = opened(folder)
    lines = [
        f"{name},{CLASSES[(label + 1) % 7]}" for name, label in zip(source.names, labels.values)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *lines]))
    values = (labels.values + 1) % 7
    model = make_classifier()
    expected = evaluate(model, source, Labels(values, CLASSES), ALONE, batch_size=8, workers=0)
    command = ["evaluate", str(checkpoint), str(folder), f"--labels={tmp_path / 'labels.csv'}"]
    assert cli.main([*command, "--workers=0", "--device=cpu"]) == 0
    assert f"loss {expected.loss:.4f}  on 23" in capsys.readouterr().out


def test_the_best_weights_of_a_run(tmp_path: Path) -> None:
    save_weights(make_classifier(), tmp_path / "model.safetensors")
    best = make_classifier()
    with torch.no_grad():
        best.head.weight.fill_(0.25)
    save_weights(best, RunFolder(tmp_path).best_weights)
    assert load_classifier(tmp_path).head.weight.unique().tolist() == [0.25]
    assert load_classifier(tmp_path / "model.safetensors").head.weight.unique().numel() > 1
    assert not load_classifier(tmp_path).training


def test_a_view_has_the_models_size_and_statistics_and_what_it_is_told() -> None:
    spec = replace(SPEC, image_size=(32, 48))
    model = Classifier(
        build_encoder(spec), CLASSES, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], margin=1.25
    )
    view = evaluation_view(model, max_pixels=99, value_range=(3, 9))
    pixels = view.pixels
    assert pixels.size == (32, 48)
    assert pixels.mean == pytest.approx([0.1, 0.2, 0.3])
    assert pixels.std == pytest.approx([0.4, 0.5, 0.6])
    assert (pixels.max_pixels, pixels.value_range, view.margin) == (99, (3, 9), 1.25)
    assert evaluation_view(model).pixels.max_pixels == MAX_PIXELS
    # a model that is pre-trained has no margin of its own
    pretrained = SimMIM(build_encoder(replace(SPEC, image_size=(64, 64))))
    assert evaluation_view(pretrained).margin == 256 / 224


def test_every_option_reaches_the_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, given = module.one_pass, list[Any]()

    def noted(source: Any, view: Any, world: Any, **named: Any) -> Any:
        given.append({"source": source, "view": view, "world": world, **named})
        return real(source, view, world, **{**named, "workers": 0})

    monkeypatch.setattr(module, "one_pass", noted)
    source, labels = opened(folder)
    model, told = make_classifier(), list[str]()
    view, tell = evaluation_view(model, margin=1.5), told.append
    evaluate(
        model, source, labels, ALONE, batch_size=9, view=view, workers=3, timeout_s=7, report=tell
    )
    evaluate(model, source, labels, ALONE, batch_size=9)
    for named in given:
        named.pop("note_problem")
        assert named.pop("samples").tolist() == list(range(23))
    rest = {"source": source, "world": ALONE, "batch_size": 9}
    assert given[0] == rest | {"view": view, "workers": 3, "timeout_s": 7, "report": tell}
    assert given[1].pop("view").margin == 1.0
    assert given[1] == rest | {"workers": -1, "timeout_s": 120, "report": print}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_model_computes_in_the_type_that_is_asked(
    folder: Path, precision: str, dtype: torch.dtype
) -> None:
    source, labels = opened(folder)
    model, seen = make_classifier(), set[torch.dtype]()
    model.head.register_forward_hook(lambda _module, _inputs, out: seen.add(out.dtype))
    evaluate(model, source, labels, ALONE, batch_size=12, workers=0, precision=precision)
    assert seen == {dtype}


def test_unlabelled_images_are_passed_over(folder: Path) -> None:
    source, labels = opened(folder)
    done: list[int] = []
    values = np.where(np.arange(23) % 3 == 0, -1, labels.values)
    found = evaluate(
        make_classifier(),
        source,
        Labels(values, CLASSES),
        ALONE,
        batch_size=10,
        workers=0,
        advance=done.append,
    )
    assert found.counts[0].tolist() == np.bincount(values[values >= 0], minlength=7).tolist()
    assert done == [10, 5]  # they are not even decoded


def test_classes_of_the_model_without_an_image_are_answers_too(folder: Path) -> None:
    source, labels = opened(folder)
    model = make_classifier((*CLASSES, "hen"))
    with torch.no_grad():
        model.head.bias[7] = 1e6  # it answers hen, whatever it sees
    found = evaluate(model, source, labels, ALONE, batch_size=23, workers=0)
    assert (found.num_classes, found.num_images, found.top1) == (8, 23, 0)
    assert found.confusion is not None
    assert found.confusion.view(8, 8)[:, 7].tolist() == [4, 4, 3, 3, 3, 3, 3, 0]
