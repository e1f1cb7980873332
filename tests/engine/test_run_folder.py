"""The places in the folder of a run: file formats that other versions and programs read."""

from pathlib import Path

from simmim.run_folder import RunFolder


def test_every_place_has_its_published_name() -> None:
    folder = RunFolder(Path("runs/mine"))
    places = {
        name: getattr(folder, name).relative_to("runs/mine").as_posix()
        for name, value in vars(RunFolder).items()
        if isinstance(value, property) and isinstance(getattr(folder, name), Path)
    }
    assert places == {
        "lock": ".lock",
        "starts": "run.json",
        "config": "config.toml",
        "log": "log.txt",
        "metrics": "metrics.jsonl",
        "validations": "validations.jsonl",
        "evaluations": "evaluations.jsonl",
        "tensorboard": "tensorboard",
        "checkpoints": "checkpoints",
        "weights": "model.safetensors",
        "best_weights": "best.safetensors",
        "best_report": "best",
        "handover": "handover.txt",
        "pictures": "pictures",
        "validation_pictures": "validation",
    }
    assert str(folder) == "runs/mine"


def test_a_run_begins_with_its_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert (folder.is_claimed, folder.is_started) == (False, False)
    folder.lock.touch()
    assert (folder.is_claimed, folder.is_started) == (True, False)
    folder.starts.touch()
    assert (folder.is_claimed, folder.is_started) == (True, True)
    folder.lock.unlink()
    assert (folder.is_claimed, folder.is_started) == (True, False)


def test_all_records_are_cut_back_on_resume() -> None:
    names = [path.name for path in RunFolder(Path("x")).records]
    assert names == ["metrics.jsonl", "validations.jsonl", "evaluations.jsonl"]
