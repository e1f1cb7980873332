"""`simmim predict`: every flag arrives, and answers and errors have their image's name."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recorded_calls import record
from simmim.commands import predict as command
from simmim.downstream.predict import Prediction

ANSWERS: list[tuple[int, list[Prediction] | str]] = [
    (0, [Prediction("cat", 4, 0.75), Prediction("dog", 1, 0.125)]),
    (2, "broken"),
    (1, [Prediction("d\udcffg", 1, 0.5)]),
]


class Recorded:
    """The command with everything that it calls recorded."""

    def __init__(self, patch: pytest.MonkeyPatch, answers: Any = (), images: int = 3) -> None:
        self.moved: list[torch.device] = []
        self.model = SimpleNamespace(to=self._move)
        names = ["a.png", "b\udcff.png", "c.png", *(f"{n}.png" for n in range(3, images))]
        self.source = SimpleNamespace(names=names)
        world = SimpleNamespace(device=torch.device("meta"))
        self.worlds = record(patch, command, "pick_world", lambda **given: world)
        self.opened = record(patch, command, "open_images", lambda **given: self.source)
        self.loaded = record(patch, command, "load_classifier", lambda **given: self.model)
        self.calls = record(patch, command, "classify", lambda **given: iter(answers))

    def _move(self, device: torch.device) -> Any:
        self.moved.append(device)
        return self.model


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--top-k=2", "--batch-size=9"], {"top_k": 2, "batch_size": 9}),
        (["--workers=3", "--precision=bf16"], {"workers": 3, "precision": "bf16"}),
        (["--workers=0", "--value-range", "1", "2"], {"value_range": (1.0, 2.0)}),
    ],
)
@pytest.mark.parametrize("how", [[], ["--json"]])
def test_every_flag_arrives(
    flags: list[str], options: dict[str, Any], how: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Recorded(monkeypatch)
    assert command.main(["run", "a.png", "more", "--device=cpu", *flags, *how]) == 0
    assert called.worlds == [{"device": "cpu"}]
    assert called.opened == [{"paths": ["a.png", "more"]}]
    assert called.loaded == [{"path": "run"}]
    assert called.moved == [torch.device("meta")]
    default = {"top_k": 5, "batch_size": 64, "workers": 0, "precision": "float32"}
    own = {"model": called.model, "source": called.source, "value_range": None}
    assert called.calls == [own | default | options]


@pytest.mark.parametrize(
    ("images", "flags", "workers"),
    [(64, [], 0), (65, [], -1), (65, ["--workers=0"], 0), (9, ["--workers=2"], 2)],
)
def test_few_images_are_decoded_in_this_process(
    images: int, flags: list[str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Recorded(monkeypatch, images=images)
    assert command.main(["run", "photos", *flags]) == 0
    assert called.calls[0]["workers"] == workers
    assert called.worlds == [{"device": "auto"}]


def test_answers_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Recorded(monkeypatch, ANSWERS)
    assert command.main(["run", "photos", "--json"]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == [
        {
            "image": "a.png",
            "predictions": [
                {"label": "cat", "index": 4, "probability": 0.75},
                {"label": "dog", "index": 1, "probability": 0.125},
            ],
        },
        {"image": "c.png", "error": "broken"},
        {
            "image": "b\\udcff.png",
            "predictions": [{"label": "d\\udcffg", "index": 1, "probability": 0.5}],
        },
    ]
    assert captured.err == "simmim: error: 1 of 3 images could not be classified\n"


def test_answers_as_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Recorded(monkeypatch, ANSWERS[:2])
    assert command.main(["run", "photos"]) == 1
    captured = capsys.readouterr()
    assert [line.split() for line in captured.out.splitlines()] == [
        ["image", "class", "probability"],
        ["a.png", "cat", "0.7500"],
        ["dog", "0.1250"],
    ]
    assert captured.err.splitlines() == [
        "simmim: error: c.png: broken",
        "simmim: error: 1 of 3 images could not be classified",
    ]


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_the_exit_code_tells_of_images_that_failed(
    how: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Recorded(monkeypatch, ANSWERS[:1])
    assert command.main(["run", "photos", *how]) == 0
    assert capsys.readouterr().err == ""
    Recorded(monkeypatch, [(0, "broken"), (1, "broken too")])
    assert command.main(["run", "photos", *how]) == 1
    captured = capsys.readouterr()
    assert "simmim: error: 2 of 3 images could not be classified\n" in captured.err
    assert "probability" not in captured.out


def test_answers_are_told_as_they_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers() -> Iterator[tuple[int, str]]:
        yield 0, "broken"
        assert capsys.readouterr().out == '{"image": "a.png", "error": "broken"}\n'

    Recorded(monkeypatch, answers())
    assert command.main(["run", "photos", "--json"]) == 1
