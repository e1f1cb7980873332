"""A backbone is one file, a method is one file: those of CONTRIBUTING.md, added and trained."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Runs a module, or code, with the engine of this folder, and not with the installed one.
START = """
import runpy, sys
from importlib.machinery import PathFinder

class Here:
    def find_spec(self, name, path=None, target=None):
        known = name.split(".")[0] == "simmim"
        return PathFinder.find_spec(name, path or ["engine"]) if known else None

sys.meta_path.insert(0, Here())
what, argument = sys.argv.pop(1), sys.argv.pop(1)
if what == "-m":
    runpy.run_module(argument, run_name="__main__", alter_sys=True)
else:
    exec(argument)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine with the files of CONTRIBUTING.md in their places."""
    root = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "engine", root / "engine", ignore=ignored)
    shutil.copytree(ROOT / "configs", root / "configs")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", text, flags=re.DOTALL)
    assert [Path(path).name for path, _ in blocks] == [
        "patches.py", "mean_colour.py", "mean_colour.toml",
    ]  # fmt: skip
    for path, content in blocks:
        assert not (root / path).exists()
        (root / path).write_text(f"# a deed of the test\n{content}", encoding="utf-8")
    return root


def run(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", START, *command], cwd=tree, env=environment, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_the_engine_trains_them_resumes_them_and_reads_them(tree: Path, photos: Path) -> None:
    arguments = ["-m", "simmim", "pretrain", "mean_colour", f"--data.path={photos}"]
    run(tree, *arguments, "--output=whole")
    run(tree, *arguments, "--output=parts", "--train.steps=3", "--checkpoint.every_steps=3")
    losses = {}
    for name in ("whole", "parts"):
        rows = (tree / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
    assert losses["parts"] == pytest.approx(losses["whole"][:3], rel=1e-5)
    assert losses["whole"][-1] != losses["whole"][0]
    told = run(
        tree, "-c",
        "import simmim, torch; m = simmim.load_model('whole');"
        "print(m.kind, m.settings, tuple(m.encode(torch.zeros(1, 3, 64, 64)).shape))",
    ).stdout  # fmt: skip
    assert told.strip() == "mean_colour {'bias': True} (1, 64, 4, 4)"


def test_they_go_with_all_the_others(tree: Path, photos: Path) -> None:
    """Train the new backbone under SimMIM, and set a key of the new method on the command line."""
    run(
        tree, "-m", "simmim", "pretrain", "mean_colour", "--method.name=simmim",
        f"--data.path={photos}", "--output=masked", "--train.steps=2",
    )  # fmt: skip
    assert (tree / "masked" / "pictures" / "step_00000002.png").is_file()
    run(
        tree, "-m", "simmim", "pretrain", "smoke", "--method.name=mean_colour",
        "--method.bias=false", f"--data.path={photos}", "--output=swin", "--train.steps=2",
    )  # fmt: skip
    listed = run(tree, "-m", "simmim", "models", "patches", "--json").stdout
    entry = json.loads(listed)[0]
    assert entry["methods"]["mean_colour"] == 64 * 3 * 16**2 + 64 + 3 * 64 + 3
    assert entry["macs"] == 64 * 3 * 224**2
    assert set(entry["methods"]) == {"mean_colour", "simmim", "simsiam", "tokens"}
