"""`simmim recipes`: every shipped configuration and what its first line says."""

from pathlib import Path

import pytest

from simmim.command_line import recipe_names
from simmim.commands import recipes as command


def test_every_shipped_recipe_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == sorted(recipe_names(finetuning=False) + recipe_names(finetuning=True))
    assert all(len(line.split()) > 3 for line in lines)


def test_of_the_folders_that_there_are_the_first_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    for name, text in (("b", "# On b.\n[data]\n"), ("a", "## On a.\n# More.\n")):
        (tmp_path / "first" / f"{name}.toml").write_text(text)
    (tmp_path / "second" / "c.toml").write_text("# On c.\n")
    folders = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(command, "recipe_folders", lambda: folders)
    assert command.main([]) == 0
    assert capsys.readouterr().out == f"{'a':<30} On a.\n{'b':<30} On b.\n"
