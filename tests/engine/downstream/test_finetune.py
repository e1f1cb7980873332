"""Fine-tuning's parts: every setting reaches the part that it belongs to, without a run."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.data.batch import Batch
from simmim.data.loader import Loader
from simmim.distributed import World
from simmim.downstream import finetune as finetuning
from simmim.downstream.finetune import (
    ClassificationLoss,
    build_classifier,
    classifier_spec,
    soft_cross_entropy,
)
from simmim.downstream.metrics import ClassificationMetrics
from simmim.errors import ConfigError, RunError
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.weights_file import save_weights
from simmim.run_folder import RunFolder
from simmim.training.run import Run
from simmim.weights.load import Weights
from small_finetuning import OF_WEIGHTS, Start, configure, write_classes

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
SWIN = SwinSpec(
    image_size=(16, 16), patch_size=4, embed_dim=8, depths=(1,), num_heads=(1,), window_size=2
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """`train` with 2 × 4 images and `val` with 2 × 1."""
    write_classes(tmp_path / "images" / "train", 4)
    write_classes(tmp_path / "images" / "val", 1)
    return tmp_path / "images"


@pytest.fixture
def start(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    return Start(images, tmp_path / "run", monkeypatch)


def a_batch(ids: list[int]) -> Batch:
    image = torch.rand(len(ids), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    numbers = torch.tensor(ids)
    return Batch(image, numbers, torch.zeros_like(numbers), int((numbers >= 0).sum()))


def test_the_loss_smooths_labels_as_configured_and_leaves_out_empty_slots(start: Start) -> None:
    state = start("--augment.smoothing=0.3", "--model.drop_path=0").state
    state.model.head.weight.data.normal_()  # type: ignore[union-attr, operator]
    batch = a_batch([0, -1, 6, 3])
    with torch.no_grad():
        found = float(state.loss_of(state, batch, 0))
    logits = state.model(batch.image[[0, 2, 3]]).detach()
    # images 0 to 3 are of class 0, 4 to 7 of class 1
    label = torch.tensor([0, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits, label, label_smoothing=0.3)
    assert found == pytest.approx(float(expected), rel=1e-5)
    hard = float(torch.nn.functional.cross_entropy(logits, label))
    assert abs(found - hard) > 1e-3  # else smoothing could not be seen


def test_mixing_gets_the_classes_the_seed_and_the_configured_augmentation(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(finetuning, "Mixing", lambda *arguments: given.append(arguments))
    start("--seed=5", "--augment.smoothing=0.3", "--augment.mixup=0.7", "--augment.cutmix=0.2")
    ((classes, seed, augment),) = given
    assert (classes, seed) == (2, 5)
    assert (augment.smoothing, augment.mixup, augment.cutmix) == (0.3, 0.7, 0.2)


def test_mixing_draws_by_step_process_and_micro_batch() -> None:
    given: list[Any] = []

    def mixing(image: Tensor, label: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        given.append((label.tolist(), *key))
        return image, torch.eye(3)[label.clamp(min=0)] * (label >= 0)[:, None]

    loss = ClassificationLoss(np.array([2, 0, 1]), mixing, CPU)  # type: ignore[arg-type]
    state: Any = SimpleNamespace(
        step=11,
        world=World(3, 4, CPU),
        config=configure("--train.channels_last=true"),
        wrapped=lambda image: seen.append(image) or torch.zeros(3, 3),
    )
    seen: list[Tensor] = []
    ids = torch.tensor([1, 0, -1])
    found = loss(state, Batch(torch.rand(3, 3, 4, 4), ids, ids, 2), 7)
    assert given == [([0, 2, -1], 11, 3, 7)]
    assert float(found) == pytest.approx(np.log(3))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    state.config = configure("--train.channels_last=false")
    loss(state, Batch(torch.rand(3, 3, 4, 4), ids, ids, 2), 7)
    assert seen[1].is_contiguous()


def test_soft_cross_entropy_is_the_mean_over_the_targets() -> None:
    logits = torch.randn(4, 3)
    target = torch.tensor([[0.5, 0.5, 0], [0, 0, 0], [0, 1, 0], [0.2, 0.2, 0.6]])
    rows = torch.tensor([0, 2, 3])
    expected = torch.nn.functional.cross_entropy(logits[rows], target[rows])
    assert float(soft_cross_entropy(logits, target)) == pytest.approx(float(expected), rel=1e-6)
    low = soft_cross_entropy(logits.bfloat16(), target)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(
        float(soft_cross_entropy(logits.bfloat16().float(), target)), rel=1e-6
    )
    # a batch of empty slots alone costs nothing, and divides by nothing
    assert float(soft_cross_entropy(logits, torch.zeros(4, 3))) == 0


def test_layers_learn_and_decay_as_configured(start: Start) -> None:
    state = start("--optim.layer_decay=0.5", "--optim.weight_decay=0.07").state
    scales = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in state.optimizer.param_groups
        for name in group["names"]
    }
    # patch embedding, two blocks, head
    assert scales["head.weight"] == (1.0, 0.07)
    assert scales["encoder.blocks.1.mlp.fc1.weight"] == (0.5, 0.07)
    assert scales["encoder.blocks.0.mlp.fc1.weight"] == (0.25, 0.07)
    assert scales["encoder.patch_embed.proj.weight"] == (0.125, 0.07)
    assert scales["head.bias"] == (1.0, 0.0)


@pytest.mark.parametrize("decayed", [True, False])
def test_position_tables_decay_as_configured(start: Start, tmp_path: Path, decayed: bool) -> None:
    weights = tmp_path / "swin.safetensors"
    save_weights(SimMIM(build_encoder(SWIN)), weights)
    option = f"--optim.decay_position_tables={str(decayed).lower()}"
    state = start(option, "--optim.weight_decay=0.07", model=(f"--pretrained={weights}",)).state
    (decay,) = {
        group["weight_decay"]
        for group in state.optimizer.param_groups
        if any("relative_position" in name for name in group["names"])
    }
    assert decay == (0.07 if decayed else 0.0)


def test_the_average_has_the_configured_decay_and_is_what_is_evaluated(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start().state.averaged is None
    begun = start("--train.ema_decay=0.7", "--output", str(tmp_path / "averaged"))
    assert begun.state.ema_decay == 0.7
    average = begun.state.averaged
    assert isinstance(average, Classifier)
    average.head.bias.data[:] = torch.tensor([0.0, 5.0])  # it answers b, whatever it sees
    run: Any = SimpleNamespace(model=Run.model.fget(SimpleNamespace(state=begun.state)))  # type: ignore[attr-defined]
    run.log = begun.log
    found = begun.observer.measure(run)
    assert found.counts.tolist() == [[1, 1], [0, 1], [1, 1]]


def test_images_and_labels_are_opened_as_configured(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, given = finetuning.open_labelled_sets, list[Any]()

    def noted(path: str, **named: Any) -> Any:
        given.append(named)
        return real(path, seed=0)

    monkeypatch.setattr(finetuning, "open_labelled_sets", noted)
    start(
        "--seed=4", "--data.val_path=v", "--data.fraction=0.5", "--data.labels=l",
        "--data.val_labels=m", "--data.classes=c", "--data.first_number=1",
    )  # fmt: skip
    start("--data.holdout=3")
    names = {"names": finetuning.SETTINGS}
    assert given[0] == names | {
        "seed": 4, "val_path": "v", "num_held_out": 0, "fraction": 0.5, "labels": "l",
        "val_labels": "m", "classes": "c", "first_number": 1,
    }  # fmt: skip
    assert given[1]["num_held_out"] == 3


def test_training_and_validation_images_are_not_exchanged(start: Start) -> None:
    begun = start()
    assert len(begun.source.names) == len(begun.loader.source.names) == 8
    assert len(begun.observer.val.source.names) == 2
    assert begun.state.loss_of.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # type: ignore[attr-defined]
    assert begun.state.schedule.total_steps == 6


def test_loading_is_as_configured(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def noted(source: Any, view: Any, **named: Any) -> Loader:
        given.append((view, named))
        return Loader(source, view, **named)

    monkeypatch.setattr(finetuning, "Loader", noted)
    start(
        "--seed=9", "--train.accumulation_steps=4", "--data.workers=0", "--data.prefetch=3",
        "--data.timeout_s=17", "--augment.flip=0.25", "--data.max_pixels=5000",
        "--data.value_range=[3,9]",
    )  # fmt: skip
    ((view, named),) = given
    assert named == {
        "seed": 9, "micro_batch": 2, "accumulation_steps": 4, "workers": 0, "prefetch": 3,
        "world": ALONE, "timeout_s": 17,
    }  # fmt: skip
    assert (view.seed, view.augment.flip) == (9, 0.25)
    assert (view.pixels.max_pixels, view.pixels.value_range) == (5000, (3, 9))
    assert view.pixels.size == (16, 16)


def test_images_of_a_step_are_shared_by_the_processes(images: Path) -> None:
    config = configure("--train.batch_size=8", "--train.accumulation_steps=2")
    view = SimpleNamespace(shape=(3, 16, 16), dtype="float32")
    source: Any = SimpleNamespace(source=SimpleNamespace(names=["x"] * 8))
    loader = finetuning._make_loader(config, source, view, World(1, 2, CPU))  # type: ignore[arg-type]
    assert loader.micro_batch == 2


def test_evaluations_are_made_as_configured(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(finetuning, "evaluate", lambda *a, **named: given.append((a, named)))
    flags = [
        "--evaluate.every_epochs=0.5", "--evaluate.batch_size=3", "--data.timeout_s=17",
        "--train.precision=bf16", "--data.max_pixels=5000", "--data.value_range=[3,9]",
        "--augment.margin=1.5",
    ]  # fmt: skip
    observer = start(*flags).observer
    assert observer.every_epochs == 0.5
    model = Classifier(build_encoder(SWIN), "ab")
    told = object()
    run: Any = SimpleNamespace(model=model, log=SimpleNamespace(warn=told))
    observer.measure(run)
    observer.config = replace(observer.config, evaluate=configure().evaluate)
    observer.world = World(0, 2, CPU)
    observer.measure(run)
    (arguments, named), (_, by_default) = given
    assert arguments == (model, observer.val.source, observer.val.labels, ALONE)
    view = named.pop("view")
    assert (view.pixels.max_pixels, view.pixels.value_range) == (5000, (3, 9))
    assert view.margin == 1.5
    assert named == {
        "batch_size": 3, "workers": 0, "precision": "bf16", "timeout_s": 17, "report": told,
    }  # fmt: skip
    assert by_default["batch_size"] == 4  # as many as a process trains on at once


def test_a_run_that_goes_on_reads_its_own_architecture_and_no_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning, "read_model", lambda path: path)
    folder = RunFolder(tmp_path)
    before = configure("--pretrained=given")
    assert finetuning._starting_weights(before, folder) == "given"
    assert finetuning._starting_weights(configure(), folder) is None
    monkeypatch.setattr(
        finetuning.checkpoint, "steps", lambda path: {folder.checkpoints: [3]}[path]
    )
    assert finetuning._starting_weights(before, folder) == tmp_path


def weights_of(**metadata: Any) -> Weights:
    torch.manual_seed(3)
    state = SimMIM(build_encoder(SWIN)).state_dict()
    return Weights("x.safetensors", "simmim", "simmim", dict(state), SWIN, metadata)


def test_statistics_are_those_configured_then_those_of_the_weights() -> None:
    own = weights_of(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    config = configure("--augment.margin=1.5", model=OF_WEIGHTS)
    model, _ = build_classifier(config, ("a", "b", "c"), own, CPU)
    assert model.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert (model.classes, model.margin) == (("a", "b", "c"), 1.5)
    statistics = ["--data.mean=[0.7,0.8,0.9]", "--data.std=[0.2,0.3,0.1]"]
    model, _ = build_classifier(configure(*statistics, model=OF_WEIGHTS), ("a", "b"), own, CPU)
    assert model.mean.tolist() == pytest.approx([0.7, 0.8, 0.9])
    assert model.std.tolist() == pytest.approx([0.2, 0.3, 0.1])


def test_weights_are_handed_over_and_the_rest_is_drawn_from_the_seed() -> None:
    own = weights_of()

    def built(seed: int) -> tuple[Classifier, list[str]]:
        torch.manual_seed(seed + 100)  # it is not torch's own state that decides
        return build_classifier(configure(f"--seed={seed}", model=OF_WEIGHTS), ("a", "b"), own, CPU)

    (one, lines), (other, _) = built(1), built(2)
    torch.manual_seed(5)
    again, _ = build_classifier(configure("--seed=1", model=OF_WEIGHTS), ("a", "b"), own, CPU)
    name = "encoder.patch_embed.proj.weight"
    assert torch.equal(one.state_dict()[name], own.state[name])
    assert f"loaded    {name}" in lines
    assert "new       head.weight" in lines
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    scratch, lines = build_classifier(configure(), ("a", "b"), None, CPU)
    assert lines == ["trained from scratch"]
    assert scratch.encoder.spec.arch == "vit"


def test_the_architecture_is_that_of_the_weights_but_for_what_is_configured() -> None:
    config = configure("--model.drop_path=0.3", "--model.window_size=4", model=OF_WEIGHTS)
    assert classifier_spec(config, SWIN) == replace(SWIN, drop_path=0.3, window_size=4)
    sized = configure("--data.image_size=[32,24]", "--data.channels=1", model=OF_WEIGHTS)
    spec = classifier_spec(sized, SWIN)
    assert (spec.image_size, spec.channels) == ((32, 24), 1)
    # without a size, that of the weights; without weights, the published one
    config = replace(config, data=replace(config.data, image_size=None))
    assert classifier_spec(config, replace(SWIN, image_size=(24, 8))).image_size == (24, 8)
    named = configure("--model.drop_path=0.3")
    named = replace(named, data=replace(named.data, image_size=None))
    assert classifier_spec(named, None).image_size == (224, 224)
    # a name is taken at its word, whatever the weights are
    assert classifier_spec(named, replace(SWIN, embed_dim=24)).arch == "vit"
    vit = classifier_spec(named, None)
    assert (vit.drop_path, vit.final_norm) == (0.3, False)  # type: ignore[union-attr]


def test_windows_of_a_swinv2_are_those_it_was_pretrained_with() -> None:
    before = SwinV2Spec(
        image_size=(16, 16), embed_dim=8, depths=(1,), num_heads=(1,), window_size=4
    )
    config = configure("--data.image_size=32", "--model.window_size=8", model=OF_WEIGHTS)
    spec = classifier_spec(config, before)
    assert spec == replace(
        before, image_size=(32, 32), window_size=8, pretrained_window_sizes=(4,), drop_path=0.1
    )


def test_a_model_computes_as_configured() -> None:
    model, _ = build_classifier(
        configure("--train.activation_checkpointing=true", "--kernels.backend=reference"),
        ("a", "b"),
        None,
        CPU,
    )
    assert model.encoder.activation_checkpointing
    assert model.encoder.backends.ops == "reference"
    with pytest.raises(RunError, match=r"kernels\.backend=triton cannot run"):
        build_classifier(configure("--kernels.backend=triton"), ("a", "b"), None, CPU)


def test_what_does_not_fit_is_an_error_of_the_configuration(start: Start) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        start("--pretrained=nowhere")


@pytest.fixture
def run(start: Start) -> Any:
    """The run that an observer sees, and its observer; lines of its log are kept."""
    begun, lines = start(), list[str]()
    log = SimpleNamespace(info=lines.append, lines=lines)
    return SimpleNamespace(
        state=begun.state, step=3, folder=begun.folder, log=log, observer=begun.observer
    )


def answered(right: int) -> ClassificationMetrics:
    """Four images of two classes, of which the first `right` are answered rightly."""
    found = ClassificationMetrics(2, CPU)
    label = torch.tensor([0, 0, 1, 1])
    found.add(5 * torch.eye(2)[torch.where(torch.arange(4) < right, label, 1 - label)], label)
    return found


def test_the_weights_and_report_of_the_highest_accuracy_are_kept_and_the_earlier_of_equals(
    run: Any,
) -> None:
    observer, kept = run.observer, list[Any]()
    for step, right in enumerate((1, 3, 3, 2, 4), start=1):
        measured = answered(right)
        row = {"step": step, **observer.row(measured)}
        run.state.model.head.bias.data.fill_(step)
        observer.keep(run, measured, row)
        observer.rows.append(row)
        observer.tell(run, measured, row)
        model = finetuning.read_model(run.folder.best_weights)
        report = (run.folder.best_report / "per_class.csv").read_text().splitlines()
        kept.append((model.state["head.bias"].tolist()[0], report[1:]))
    assert [step for step, _ in kept] == [1, 2, 2, 2, 5]
    assert kept[2][1] == ["a,2,2,1.0,1.0", "b,2,1,0.5,1.0"]
    assert [line.rpartition("; best ")[2] for line in run.log.lines] == [
        "25.00% at step 1", "75.00% at step 2", "75.00% at step 2", "75.00% at step 2",
        "100.00% at step 5",
    ]  # fmt: skip
    loss = answered(2).loss
    assert run.log.lines[3].startswith(
        f"step 4: top-1 50.00%, top-5 100.00%, loss {loss:.4f} on 4 images; "
    )
    run.log.lines.clear()
    observer.finish(run)
    assert run.log.lines == [
        f"best top-1 100.00% (top-5 100.00%) at step 5: weights in {run.folder.best_weights}, "
        f"accuracy by class in {run.folder.best_report}"
    ]


def test_a_first_evaluation_without_a_right_answer_is_the_best_so_far(run: Any) -> None:
    run.observer.keep(run, answered(0), run.observer.row(answered(0)))
    assert run.folder.best_weights.exists()


def test_what_the_first_report_leaves_out_is_told_once(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning, "write_report", lambda *_: ["no picture"])
    for step, right in ((1, 1), (2, 3)):
        row = {"step": step, **run.observer.row(answered(right))}
        run.observer.keep(run, answered(right), row)
        run.observer.rows.append(row)
        run.observer.tell(run, answered(right), row)
    assert run.log.lines.count("no picture") == 1


def test_other_processes_say_nothing_at_the_end(run: Any) -> None:
    run.observer.finish(run)  # nothing was evaluated
    run.observer.rows.append({"step": 1, **answered(1).summary()})
    run.observer.world = World(1, 2, CPU)
    run.observer.finish(run)
    assert run.log.lines == []


def test_evaluations_are_recorded_in_their_own_file(run: Any) -> None:
    assert run.observer.records(run) == run.folder.evaluations


def test_the_start_tells_the_images_and_keeps_the_first_handover(
    start: Start, images: Path, tmp_path: Path
) -> None:
    begun = start()
    lines = [line.split(" ", 2)[2] for line in begun.folder.log.read_text().splitlines()]
    train, val = images / "train", images / "val"
    assert lines == [
        f"8 training images of 2 classes ({train}); 2 to validate on ({val})",
        "trained from scratch; handover.txt has every key",
    ]
    assert begun.folder.handover.read_text() == "trained from scratch\n"
    begun.folder.handover.write_text("of the first start\n")
    start()
    assert begun.folder.handover.read_text() == "of the first start\n"


def test_what_a_recipe_leaves_out_is_noted(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    view = SimpleNamespace(note="flips only", shape=(3, 16, 16), dtype="float32")
    monkeypatch.setattr(finetuning, "_training_view", lambda *_: view)
    assert "flips only" in start().folder.log.read_text()


def test_events_are_written_as_configured(start: Start) -> None:
    for wanted in (True, False):
        log = start(f"--log.tensorboard={str(wanted).lower()}").log
        assert (log._tensorboard, log.total_steps) == (wanted, 6)


def test_an_evaluation_is_a_row_of_its_figures(run: Any) -> None:
    assert json.loads(json.dumps(run.observer.row(answered(3)))) == {
        "top1": 0.75, "top5": 1.0, "loss": pytest.approx(answered(3).loss), "images": 4,
        "not_finite": 0,
    }  # fmt: skip
