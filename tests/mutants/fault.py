"""One-line faults as data: what is planted, where, and which tests ought to notice."""

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTS = ROOT / "tests" / "mutants" / "faults"


@dataclass(frozen=True)
class Fault:
    """A wrong line in place of a right one.

    Attributes:
        name: what goes wrong, in words.
        file: relative to the root of the repository.
        line: a piece of the file that occurs once.
        fault: what stands in its place.
        tests: files or node ids that ought to notice; default is the file of tests that bears
            the name of `file`.
    """

    name: str
    file: str
    line: str
    fault: str
    tests: tuple[str, ...] = ()

    @property
    def own_tests(self) -> tuple[str, ...]:
        """The tests that ought to notice: those it names, or those named for its file."""
        if self.tests:
            return self.tests
        named = f"{self._folder()}/test_{Path(self.file).stem}.py"
        return (named,) if (ROOT / named).exists() else self.folder_tests

    @property
    def folder_tests(self) -> tuple[str, ...]:
        """The tests of the package that `file` lies in."""
        folder = self._folder()
        if folder.count("/") > 1:
            return (folder,)
        return tuple(
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("test_*.py"))
        )

    def _folder(self) -> str:
        """tests/engine/data for engine/simmim/data/x.py; kernels' tests lie in one folder."""
        source, _, *inner = Path(self.file).parent.parts
        return "/".join(["tests", source, *(inner if source == "engine" else [])])

    def planted(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: the line is not there, or more than once; or Python cannot read the result.
        """
        if (found := text.count(self.line)) != 1:
            raise ValueError(f"{self.file}: {self.line!r} occurs {found} times, and not once")
        text = text.replace(self.line, self.fault)
        try:
            ast.parse(text)
        except SyntaxError as error:
            raise ValueError(f"{self.file}: with {self.fault!r} it is not Python") from error
        return text


def all_faults() -> list[Fault]:
    """The faults of every list, in the order of the lists' names."""
    faults = []
    for path in sorted(LISTS.glob("*.toml")):
        for fields in tomllib.loads(path.read_text())["fault"]:
            tests = tuple(fields.pop("tests", ()))
            faults.append(Fault(**fields, tests=tests))
    return faults
