"""`simmim finetune`: the configuration that was asked for is the one that runs."""

from typing import Any

import pytest

from recorded_calls import record
from simmim.commands import finetune as command
from simmim.config.finetune import FinetuneConfig

FLAGS = ["finetune_smoke", "--data.path=photos", "--pretrained=mine", "--output=here", "--seed=7"]


@pytest.mark.parametrize("code", [0, 75])
def test_the_run_has_the_settings_of_the_flags(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, command, "finetune", lambda **given: code)
    assert command.main(FLAGS) == code
    (call,) = calls
    config = call["config"]
    assert isinstance(config, FinetuneConfig)
    assert config.pretrained == "mine"
    assert (config.data.path, config.output, config.seed) == ("photos", "here", 7)


def test_a_wrong_flag_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = record(monkeypatch, command, "finetune")
    assert command.main([*FLAGS, "--sed=3"]) == 2
    assert capsys.readouterr().err == "simmim: error: unknown flag --sed; did you mean seed?\n"
    assert calls == []


def test_a_failure_under_way_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**given: Any) -> int:
        raise OSError(28, "No space left on device")

    record(monkeypatch, command, "finetune", fail)
    assert command.main(FLAGS) == 1
    assert capsys.readouterr().err == (
        "simmim: error: here: No space left on device; the same command resumes the run\n"
    )
