"""The house rules that a machine can check: who may import whom, and what is in the tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "engine").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def under(folder: str) -> list[Path]:
    return [p for p in SOURCES if p.is_relative_to(ROOT / folder)]


def assert_never(files: list[Path], *forbidden: str) -> None:
    assert files
    for path in files:
        for name in imports(path):
            wrong = [f for f in forbidden if name == f or name.startswith(f"{f}.")]
            assert not wrong, f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_know_nothing_of_the_engine() -> None:
    assert_never(under("kernels"), "simmim", "bench", "tests")
    allowed = {"torch", "triton", "numpy", "simmim_kernels"}
    standard = set(sys.stdlib_module_names)
    for path in under("kernels"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= allowed | standard, f"{path}: {roots - allowed - standard}"


def test_data_flows_one_way() -> None:
    assert_never(
        under("engine/simmim/backbone"),
        "simmim.method",
        "simmim.data",
        "simmim.training.step",
        "simmim.config.sections",
    )
    method = under("engine/simmim/method")
    assert_never(
        method,
        "simmim.training.step",
        "simmim.pretrain",
        "simmim.training.loop",
        "simmim.training.checkpoint",
    )
    for path in method:  # methods share what these define, and know nothing of one another
        others = {p.stem for p in method} - {"images", "method", path.stem}
        if path.stem != "build":
            assert_never([path], *(f"simmim.method.{other}" for other in others))
    assert_never(
        under("engine/simmim/data"), "simmim.method", "simmim.training.step", "simmim.pretrain"
    )
    assert_never(
        [ROOT / "engine/simmim/step.py"],
        "simmim.pretrain",
        "simmim.training.checkpoint",
        "simmim.training.log",
    )
    apart = [ROOT / "engine/simmim/loop.py", *under("engine/simmim/convert")]
    assert_never([*under("engine/simmim/data"), *apart], "simmim.downstream", "simmim.commands")
    assert_never(under("engine/simmim/downstream"), "simmim.commands")
    assert_never(SOURCES, "bench", "tests", "conftest")


def test_one_file_knows_lightning() -> None:
    own = ROOT / "engine/simmim/lightning_adapters.py"
    assert_never([p for p in SOURCES if p != own], "lightning", "simmim.lightning_adapters")


@pytest.mark.parametrize("module", ["simmim.pretrain", "simmim.downstream.predict"])
def test_commands_start_without_the_compiler(module: str) -> None:
    """torch.compile's parts take longer to import than torch, and a wrong flag needs none."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT / n) for n in ('engine', 'kernels')]}; "
        f"import {module}; print([m for m in ('torch._dynamo', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["engine", "kernels"])
def test_source_roots_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_names_of_files() -> None:
    banned = {"utils.py", "helpers.py", "misc.py", "common.py", "manager.py", "triton.py"}
    assert not [p for p in SOURCES if p.name in banned]


def test_native_sources_are_listed_and_only_under_kernels() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    for path in ROOT.rglob("*.cpp"):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("build", ".venv"):
            continue
        assert relative.parts[0] == "kernels"
        assert str(relative) in listed


def test_no_machine_paths_and_no_big_files() -> None:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.split("\0") if name]
    sizes = {p: p.stat().st_size for p in files if p.exists()}
    assert sum(sizes.values()) < 20e6
    assert max(sizes.values(), default=0) < 2.5e6
