"""After any sequence of saves, the checkpoints that are documented are there, and whole."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmim.training import checkpoint

SAVES = st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True).map(sorted)
KEPT = st.integers(1, 5)
EVERY = st.one_of(st.just(0), st.integers(1, 12))


@contextmanager
def checkpoints(steps: list[int]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            _save(Path(folder), step)
        yield Path(folder)


def _save(root: Path, step: int) -> None:
    folder = root / f"step_{step:08d}"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).touch()


def _documented(steps: list[int], keep_last: int, keep_every_steps: int) -> list[int]:
    milestones = {step for step in steps if keep_every_steps and step % keep_every_steps == 0}
    return sorted({*sorted(steps)[-keep_last:], *milestones})


@given(saves=SAVES, keep_last=KEPT, every=EVERY)
def test_any_sequence_of_saves_leaves_the_newest_and_the_milestones(
    saves: list[int], keep_last: int, every: int
) -> None:
    with checkpoints([]) as root:
        (root / "notes.txt").touch()
        (root / "damaged_step_00000001").mkdir()
        for number, step in enumerate(saves, 1):
            before = list(checkpoint.steps(root))
            _save(root, step)
            removed = checkpoint.prune(root, keep_last, every)
            kept = list(checkpoint.steps(root))
            assert kept == _documented(saves[:number], keep_last, every)
            gone = sorted({*before, step} - set(kept))
            assert [path.name for path in removed] == [f"step_{s:08d}" for s in gone]
        others = sorted(p.name for p in root.iterdir() if not p.name.startswith("step_"))
        assert others == ["damaged_step_00000001", "notes.txt"]


@given(saves=SAVES, keep_last=KEPT, every=EVERY, data=st.data())
def test_a_removal_that_is_interrupted_leaves_whole_checkpoints_and_the_next_one_ends_it(
    saves: list[int], keep_last: int, every: int, data: st.DataObject
) -> None:
    calls = data.draw(st.integers(0, 2 * len(saves)), label="removals before the interruption")
    real, left = shutil.rmtree, [calls]

    def interrupted(path: Path, ignore_errors: bool = False) -> None:
        if not left[0]:
            if path.exists():
                (path / "a").unlink()
            raise KeyboardInterrupt
        left[0] -= 1
        real(path, ignore_errors=ignore_errors)

    wanted = _documented(saves, keep_last, every)
    with checkpoints(saves) as root:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.shutil, "rmtree", interrupted)
            try:
                checkpoint.prune(root, keep_last, every)
            except KeyboardInterrupt:
                assert wanted != saves
        there = checkpoint.steps(root)
        assert set(wanted) <= set(there)
        assert all({f.name for f in path.iterdir()} == {"a", "b"} for path in there.values())
        checkpoint.prune(root, keep_last, every)
        checkpoint.remove_leftovers(root)
        assert sorted(path.name for path in root.iterdir()) == [f"step_{s:08d}" for s in wanted]
