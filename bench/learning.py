"""Does pre-training help? SimMIM and fine-tuning, against the same fine-tuning from scratch.

    python bench/learning.py                    # 30 minutes on two cores
    python bench/learning.py --minutes 5 --data DIR --output runs/learning

It takes CIFAR-10's training images, or any labelled images in class folders, shards or one tar. A
part of each class is held out for testing. The other images pre-train a small ViT without their
labels, and then fine-tune it with their labels. The second arm fine-tunes the same network from
scratch, with the same recipe, steps and seeds. At the end a linear probe is trained on every layer
of the pre-trained encoder. The number of steps follows from the minutes and from the speed of the
machine, which is measured first.
"""

import argparse
import contextlib
import io
import json
import shutil
import statistics
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.measuring.machine import now
from bench.measuring.record import write_record
from simmim import cli
from simmim.data.labels import Labels, labels_of
from simmim.data.open import open_source
from simmim.data.source import Source
from simmim.data.splits import holdout
from simmim.environment import device_name, git_commit, package_versions
from simmim.errors import DataError, RunError

# Shares of the time for pre-training and for all fine-tuning runs together. The rest is for the
# speed measurement, the evaluations and the probe.
PRETRAIN_SHARE, FINETUNE_SHARE = 0.38, 0.50

# Steps of a run that only measures the speed, and steps of each part of it that is timed. The first
# part is not counted.
SPEED_STEPS, SPEED_PART = 40, 4

# Largest number of images that the probe is trained on.
PROBE_IMAGES = 10_000

ARMS = ("pre-trained", "from scratch")
CONSOLE = Console(stderr=True)


def split(source: Source, labels: Labels, num_held_out: int, seed: int, work: Path) -> None:
    """Write the images unchanged into train.tar, val.tar, and probe.tar (a part of train.tar)."""
    train, val = holdout(labels, num_held_out, seed)
    parts = {"train": train, "val": val, "probe": train}
    if len(train) > PROBE_IMAGES:
        train_labels = Labels(labels.values[train], labels.classes)
        parts["probe"] = train[holdout(train_labels, PROBE_IMAGES, seed)[1]]
    for name, samples in parts.items():
        with tarfile.open(work / f"{name}.tar", "w") as archive:
            for sample in samples.tolist():
                data = source.read(sample)
                suffix = Path(source.names[sample]).suffix
                folder = labels.classes[int(labels.values[sample])]
                member = tarfile.TarInfo(f"{folder}/{sample:07d}{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def run_command(*arguments: str) -> None:
    """Run a command of simmim, which must succeed."""
    code = cli.main(list(arguments))
    if code == 75:  # interrupted
        raise KeyboardInterrupt
    if code:
        raise RunError(f"simmim {arguments[0]} failed with exit code {code}")


def read_records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of a run, such as its metrics."""
    text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


class Runs:
    """The runs of one comparison, and their arguments.

    Args:
        options: of the command line.
        work: folder for the splits and the runs.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        # the encoder of the recipe cifar10_vit_tiny, for the arm that starts without a checkpoint
        self.encoder = [
            "--model.name=vit_tiny",
            "--model.patch_size=4",
            "--model.embed_dim=128",
            "--model.depths=[6]",
            "--model.num_heads=[4]",
            "--model.absolute_position=true",
            "--model.shared_relative_position=false",
        ]
        self.data = [f"--data.path={work / 'train.tar'}", "--data.workers=1", "--device=cpu"]

    def pretrain(self, steps: int, output: Path, *more: str) -> None:
        run_command(
            "pretrain", "cifar10_vit_tiny", *self.data, f"--output={output}",
            f"--train.steps={steps}", "--train.batch_size=128", "--optim.lr=2e-3",
            f"--schedule.warmup_steps={max(1, steps // 15)}", "--log.every_steps=20",
            f"--checkpoint.every_steps={max(1, steps // 4)}", *more,
        )  # fmt: skip

    def finetune(self, arm: str, steps: int, seed: int, output: Path, *more: str) -> None:
        start = [f"--pretrained={self.work / 'pretrained'}"]
        if arm == "from scratch":
            start = [*self.encoder, "--data.image_size=32"]
        run_command(
            "finetune", "finetune_cifar10_vit_tiny", *self.data, *start, f"--output={output}",
            f"--data.val_path={self.work / 'val.tar'}", f"--train.steps={steps}",
            f"--schedule.warmup_steps={max(1, steps // 8)}", f"--seed={seed}",
            f"--optim.lr={self.options.lr}", "--log.every_steps=20", "--evaluate.batch_size=250",
            "--evaluate.every_epochs=1000", f"--checkpoint.every_steps={10**6}", *more,
        )  # fmt: skip

    def measure_speed(self) -> tuple[float, float]:
        """Images per second of pre-training and of fine-tuning."""
        medians = []
        folder = self.work / "speed"
        for name in ("pretrain", "finetune"):
            shutil.rmtree(folder, ignore_errors=True)
            logging = [f"--log.every_steps={SPEED_PART}", "--log.picture_every_steps=-1"]
            if name == "pretrain":
                self.pretrain(SPEED_STEPS, folder, *logging)
            else:
                self.finetune("from scratch", SPEED_STEPS, 0, folder, *logging)
            speeds = [row["images_per_s"] for row in read_records(folder, "metrics")][SPEED_PART:]
            medians.append(statistics.median(speeds))
        shutil.rmtree(folder, ignore_errors=True)
        return medians[0], medians[1]

    def probe(self) -> list[dict[str, Any]]:
        """Train a linear probe on every layer; returns the accuracies, and draws them."""
        output = self.work / "probe"
        with contextlib.redirect_stdout(sys.stderr):
            run_command(
                "probe", str(self.work / "pretrained"), "--train", str(self.work / "probe.tar"),
                "--val", str(self.work / "val.tar"), "--output", str(output), "--overwrite",
            )  # fmt: skip
        layers: list[dict[str, Any]] = json.loads((output / "probe.json").read_text())["layers"]
        return layers


def make_plan(runs: Runs) -> dict[str, Any]:
    """The number of steps of each run, from plan.json if an earlier start has written it."""
    options, plan_file = runs.options, runs.work / "plan.json"
    if plan_file.exists():
        plan: dict[str, Any] = json.loads(plan_file.read_text())
        return plan
    speeds = runs.measure_speed()
    seconds = 60 * options.minutes
    per_run = seconds * FINETUNE_SHARE / (len(ARMS) * options.seeds)
    plan = {
        "minutes": options.minutes,
        "seeds": options.seeds,
        "lr": options.lr,
        "images_per_s": speeds,
        "pretrain_steps": max(20, int(seconds * PRETRAIN_SHARE * speeds[0] / 128)),
        "finetune_steps": max(10, int(per_run * speeds[1] / 128)),
    }
    write_record(plan_file, plan)
    return plan


def compare(runs: Runs) -> dict[str, Any]:
    """Make all runs; runs of an earlier start of the command are resumed."""
    work, plan = runs.work, make_plan(runs)
    CONSOLE.print(
        f"{plan['pretrain_steps']} steps of pre-training and {plan['finetune_steps']} of every "
        "fine-tuning run, with 128 images each"
    )
    runs.pretrain(plan["pretrain_steps"], work / "pretrained")
    accuracies: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(plan["seeds"]):
        for arm in ARMS:
            output = work / f"{arm.replace(' ', '-')}-{seed}"
            runs.finetune(arm, plan["finetune_steps"], seed, output)
            last = read_records(output, "evaluations")[-1]
            accuracies[arm].append({"seed": seed, **last})
    return plan | {"arms": accuracies, "probe": runs.probe()}


def mean_and_deviation(values: list[float]) -> str:
    """Mean ± standard deviation, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f} %"


def print_tables(result: dict[str, Any]) -> None:
    """Print the accuracies of both arms and of the probe, as Markdown tables."""
    table = Table(box=box.MARKDOWN)
    for column in ("fine-tuned", "top-1", "top-5", "loss", "by seed"):
        table.add_column(column)
    for arm, records in result["arms"].items():
        table.add_row(
            arm,
            mean_and_deviation([r["top1"] for r in records]),
            mean_and_deviation([r["top5"] for r in records]),
            f"{statistics.mean(r['loss'] for r in records):.3f}",
            ", ".join(f"{100 * r['top1']:.1f}" for r in records),
        )
    layers = Table(box=box.MARKDOWN)
    for column in ("linear probe of", "top-1"):
        layers.add_column(column)
    for layer in result["probe"]:
        layers.add_row(layer["layer"], f"{100 * layer['top1']:.1f} %")
    console = Console(width=100)
    console.print(table)
    console.print(layers)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = Path(__file__).parents[2] / "shared" / "data" / "cifar10_train.tar"
    add("--data", type=Path, default=default, help="labelled images (default: CIFAR-10's tar)")
    add(
        "--minutes",
        type=float,
        default=30,
        help="time for all runs together (default: %(default)s)",
    )
    add("--seeds", type=int, default=3, help="fine-tuning runs of each arm (default: %(default)s)")
    add("--held-out", type=int, default=5000, help="images to test on (default: %(default)s)")
    add(
        "--lr",
        type=float,
        default=2e-3,
        help="learning rate of fine-tuning (default: %(default)s)",
    )
    add("--output", type=Path, default=Path("runs/learning"), help="folder (default: %(default)s)")
    add("--json", type=Path, help="file to write the result to as well")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        source = open_source(str(options.data))
        labels = labels_of(source)
        if labels is None:
            raise DataError(f"{options.data}: nothing tells the classes of its images")
        work: Path = options.output
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "plan.json").exists():
            split(source, labels, options.held_out, 0, work)
        result = compare(Runs(options, work))
    except (RunError, ValueError, OSError) as error:
        print(f"bench/learning.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench/learning.py: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    result |= {
        "images": {"train": len(source.names) - options.held_out, "val": options.held_out},
        "minutes_taken": (time.monotonic() - started) / 60,
        "machine": device_name(torch.device("cpu")),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "time": now(),
    }
    write_record(work / "result.json", result)
    if options.json:
        write_record(options.json, result)
    print_tables(result)
    CONSOLE.print(f"pictures: {work / 'pretrained' / 'pictures'}, {work / 'probe'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
