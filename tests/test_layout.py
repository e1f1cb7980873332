"""The house rules that a machine can check: who may import whom, and what is in the tree."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "engine").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))


Floors = Sequence[tuple[str, tuple[str, ...]]]
"""Floors, bottom first: a name, and the modules that stand there, each with all that is below it.
A `*` is any one name. Where several match a module, the longest decides, then the one without `*`.
"""

# An op's folder spans several floors: its files have the same names in every folder.
FLOORS_OF_KERNELS: Floors = (
    (
        "what this machine has, and random numbers",
        (
            "simmim_kernels.native",
            "simmim_kernels.splitmix",
            "simmim_kernels.triton_backend",
            "simmim_kernels.triton_launch",
            "simmim_kernels.weight_copies",
        ),
    ),
    (
        "how an op is declared, and finds its backend and its dtypes",
        ("simmim_kernels.dispatch", "simmim_kernels.dtypes", "simmim_kernels.op"),
    ),
    ("what ops take and keep", ("simmim_kernels.*.arguments",)),
    ("definitions of the ops in plain PyTorch", ("simmim_kernels.*.reference",)),
    (
        "what the kernels of several ops share",
        (
            "simmim_kernels.*.native_rows",
            "simmim_kernels.*.triton_norms",
            "simmim_kernels.*.triton_rows",
        ),
    ),
    (
        "kernels, one file for each backend",
        (
            "simmim_kernels.*.native_kernel",
            "simmim_kernels.*.triton_kernel",
            "simmim_kernels.*.xformers_kernel",
        ),
    ),
    ("public functions of the ops", ("simmim_kernels.*",)),
    ("the package", ("simmim_kernels",)),
    ("what the kernels compile to, which no user of the ops needs", ("simmim_kernels.report",)),
)


FLOORS_OF_ENGINE: Floors = (
    (
        "nothing of ours",
        (
            "simmim.errors",
            "simmim.files",
            "simmim.run_folder",
            "simmim.version",
        ),
    ),
    ("encoders", ("simmim.backbone",)),
    ("who this process is", ("simmim.distributed", "simmim.environment")),
    ("configuration", ("simmim.config",)),
    ("a module and its file", ("simmim.model",)),
    ("data", ("simmim.data",)),
    ("making shards, beside reading them", ("simmim.packing",)),
    ("a model and images make a picture", ("simmim.pictures",)),
    ("a run", ("simmim.training",)),
    ("methods", ("simmim.method",)),
    ("weights of every layout", ("simmim.weights",)),
    (
        "a pre-training run, top to bottom",
        ("simmim.observers", "simmim.validation", "simmim.pretrain", "simmim.command_line"),
    ),
    ("after pre-training", ("simmim.downstream",)),
    ("sharing", ("simmim.sharing",)),
    ("under other trainers", ("simmim.hugging_face", "simmim.lightning_adapters")),
    ("commands", ("simmim.commands",)),
    ("the command line, and the package with its lazy names", ("simmim",)),
)


ROOTS: list[tuple[str, Floors]] = [("engine", FLOORS_OF_ENGINE), ("kernels", FLOORS_OF_KERNELS)]


def import_statements(source: str, module: str) -> Iterator[tuple[str, str]]:
    """(module, name in it or "") of everything that a source text imports, also in functions and
    under TYPE_CHECKING.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def imports(path: Path) -> set[str]:
    names = set()
    for module, name in import_statements(path.read_text(encoding="utf-8"), str(path)):
        names |= {module, f"{module}.{name}"} if name else {module}
    return names


def sources_of(root: str) -> dict[str, str]:
    """Source text of every module under a source root, by the module's name."""
    sources = {}
    for path in sorted((ROOT / root).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / root).with_suffix("").parts)
        sources[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules among `sources` that each of them imports."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for importer, source in sources.items():
        for module, name in import_statements(source, importer):
            submodule = f"{module}.{name}"
            graph[importer].add(submodule if submodule in sources else module)
        graph[importer] &= sources.keys() - {importer}
    return graph


def floor_of(floors: Floors, module: str) -> int:
    """Index of the floor where a module stands."""
    names = module.split(".")
    matching = [
        (pattern.count("."), -pattern.count("*"), index)
        for index, (_, patterns) in enumerate(floors)
        for pattern in patterns
        if all(map(fnmatchcase, names, pattern.split("."))) and len(names) > pattern.count(".")
    ]
    assert matching, f"{module} stands on no floor: say in tests/test_layout.py where it belongs"
    return max(matching)[-1]


def arrows_upwards(floors: Floors, sources: Mapping[str, str]) -> list[str]:
    """Imports of a higher floor by a lower one.

    Args:
        floors: from the lowest to the highest.
        sources: the source text of each module by its name; imports of other modules do not count.
    """
    return [
        f"{importer} ({floors[below][0]}) imports {module} ({floors[above][0]})"
        for importer, modules in import_graph(sources).items()
        for module in sorted(modules)
        if (below := floor_of(floors, importer)) < (above := floor_of(floors, module))
    ]


def import_circle(sources: Mapping[str, str]) -> list[str]:
    """A chain of modules each of which imports the next, back to the first; empty without one."""
    try:
        TopologicalSorter(import_graph(sources)).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


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


@pytest.mark.parametrize(("root", "floors"), ROOTS)
def test_lower_floors_alone_are_imported(root: str, floors: Floors) -> None:
    sources = sources_of(root)
    assert arrows_upwards(floors, sources) == []
    assert import_circle(sources) == []
    inhabited = {floor_of(floors, module) for module in sources}
    assert inhabited == set(range(len(floors)))


@pytest.mark.parametrize(
    ("module", "planted", "above"),
    [
        (
            "simmim_kernels.dispatch",
            "from simmim_kernels import merge_patches",
            "simmim_kernels.merge_patches",
        ),
        (
            "simmim_kernels.merge_patches.reference",
            "def late():\n    from simmim_kernels.merge_patches.triton_kernel import forward",
            "simmim_kernels.merge_patches.triton_kernel",
        ),
        (
            "simmim_kernels.merge_patches.triton_kernel",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import simmim_kernels",
            "simmim_kernels",
        ),
        (
            "simmim_kernels.merge_patches",
            "from simmim_kernels.report import cases",
            "simmim_kernels.report.cases",
        ),
        (
            "simmim.model.image_model",
            "def late():\n    from simmim.sharing.hub import export",
            "simmim.sharing.hub",
        ),
        (
            "simmim.training.observer",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from simmim import pretrain",
            "simmim.pretrain",
        ),
        ("simmim.config.check", "from simmim.method.build import methods", "simmim.method.build"),
        ("simmim.environment", "import simmim", "simmim"),
    ],
)
def test_an_import_of_a_higher_floor_is_noticed(module: str, planted: str, above: str) -> None:
    root, floors = next(pair for pair in ROOTS if module in sources_of(pair[0]))
    sources = sources_of(root)
    sources[module] += f"\n{planted}\n"
    (arrow,) = arrows_upwards(floors, sources)
    assert arrow.startswith(f"{module} (")
    assert f" imports {above} (" in arrow


def test_a_circle_on_one_floor_is_noticed() -> None:
    sources = {"a.b": "from a import c", "a.c": "def f():\n    from a.b import f", "a.d": ""}
    assert arrows_upwards([("only", ("a",))], sources) == []
    assert set(import_circle(sources)) == {"a.b", "a.c"}


def test_a_module_without_a_floor_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"a\.c stands on no floor"):
        arrows_upwards([("only", ("a.b",))], {"a.b.d": "import a.c", "a.c": ""})


def test_methods_know_nothing_of_one_another() -> None:
    method = under("engine/simmim/method")
    for path in method:  # they share what `Method` defines; only `build` finds them all
        others = {p.stem for p in method} - {"method", path.stem}
        if path.stem != "build":
            assert_never([path], *(f"simmim.method.{other}" for other in others))


def test_nothing_imports_tests_or_benchmarks() -> None:
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
        if relative.parts[0] in ("build", ".venv", ".venv-cuda"):
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
