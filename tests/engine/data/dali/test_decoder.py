"""What DALI's pipeline is built from, seen by a stand-in: also that of a GPU, which is not here."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dali_pipelines import AUGMENTATION
from simmim.data.dali import decoder as decoding
from simmim.data.dali.decoder import Decoder, reason_of
from simmim.data.dali.samples import PreparedSample


class Named(str):
    """A name that stands in for an operator's output; slices are named too."""

    def __getitem__(self, at: Any) -> "Named":
        return Named(f"{self}[{at.start}:{at.stop}]")


class StandIn:
    """nvidia.dali: keeps the arguments of every operator, and what is fed."""

    def __init__(self) -> None:
        self.calls: dict[str, Any] = {}
        self.fed: dict[str, Any] = {}
        self.built = self.runs = 0
        self.types = SimpleNamespace(
            UINT8="uint8", INT32="int32", GRAY="grey", RGB="rgb", INTERP_LINEAR="linear"
        )
        self.fn = SimpleNamespace(
            external_source=lambda **options: self._note(f"source {options['name']}", **options),
            decoders=SimpleNamespace(image_slice=self._operator("decode")),
            resize=self._operator("resize"),
            flip=self._operator("flip"),
        )

    def _operator(self, name: str) -> Any:
        return lambda *inputs, **options: self._note(name, inputs=inputs, **options)

    def _note(self, what: str, **options: Any) -> Named:
        self.calls[what] = options
        return Named(options.get("name", what))

    def Pipeline(self, **options: Any) -> Any:  # noqa: N802 (the name that DALI gives it)
        self.calls["pipeline"] = options
        return self

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def set_outputs(self, *outputs: Any) -> None:
        self.calls["outputs"] = outputs

    def build(self) -> None:
        self.built += 1

    def feed_input(self, name: str, values: Any) -> None:
        self.fed[name] = values

    def schedule_run(self) -> None:
        self.runs += 1


@pytest.fixture
def dali(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(decoding, "import_dali", lambda: (stand_in, ""))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    return stand_in


def made(device: str, channels: int = 3) -> Decoder:
    return Decoder(
        replace(AUGMENTATION, channels=channels), torch.device(device),
        micro_batch=6, threads=3, largest_pixels=1000,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "number"), [("cpu", None), ("cuda", 2), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_the_pipeline_is_that_of_its_device(dali: StandIn, device: str, number: int | None) -> None:
    made(device)
    assert dali.calls["pipeline"] == {
        "batch_size": 6, "num_threads": 3, "device_id": number, "prefetch_queue_depth": 1,
    }  # fmt: skip
    decode = dali.calls["decode"]
    assert decode.pop("inputs") == ("encoded", "box[0:2]", "box[2:4]")
    assert (decode.pop("axis_names"), decode.pop("output_type")) == ("WH", "rgb")
    if device == "cpu":
        assert decode == {"device": "cpu"}
    else:
        assert decode == {
            "device": "mixed", "affine": False, "jpeg_fancy_upsampling": True,
            "device_memory_padding": 6000, "host_memory_padding": 3000,
        }  # fmt: skip
    assert dali.calls["resize"] == {
        "inputs": ("decode",), "size": AUGMENTATION.size, "interp_type": "linear",
        "antialias": True, "minibatch_size": 32,
    }  # fmt: skip
    assert dali.calls["flip"] == {"inputs": ("resize",), "horizontal": "flip"}
    assert dali.calls["outputs"] == ("flip",)
    assert dali.built == 1


@pytest.mark.parametrize(("channels", "kind"), [(1, "grey"), (3, "rgb")])
def test_images_are_decoded_to_their_channels(dali: StandIn, channels: int, kind: str) -> None:
    made("cpu", channels)
    assert dali.calls["decode"]["output_type"] == kind


def test_every_sample_is_fed_with_its_box_and_flip(dali: StandIn) -> None:
    decoder = made("cpu")
    decoder.schedule(
        [
            PreparedSample(0, 1, b"ab", 9, (1, 2, 3, 4), True),
            PreparedSample(0, 2, b"cde", 9, (5, 6, 7, 8), False),
        ]
    )
    assert [bytes(data) for data in dali.fed["encoded"]] == [b"ab", b"cde"]
    assert dali.fed["box"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert dali.fed["flip"].tolist() == [1, 0]
    assert dali.fed["box"].dtype == dali.fed["flip"].dtype == np.int32
    assert dali.runs == 1


def test_a_pipeline_that_failed_is_built_anew(dali: StandIn) -> None:
    decoder = made("cpu")
    decoder.rebuild()
    assert dali.built == 2
    decoder.close()
    assert decoder.pipeline is None


@pytest.mark.parametrize("slots", [[1], [1, 2, 3], [0, 2, 3], [0, 1, 4]])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_views_go_to_their_slots(dali: StandIn, slots: list[int], dtype: torch.dtype) -> None:
    decoder = made("cpu")
    views = torch.arange(10, 10 + len(slots), dtype=torch.uint8).view(-1, 1, 1, 1)
    outputs = (SimpleNamespace(as_tensor=lambda: views),)
    decoder.pipeline = SimpleNamespace(outputs=lambda: outputs)
    image = torch.zeros(5, 1, 1, 1, dtype=dtype)
    decoder.collect(image, slots)
    wanted = dict(zip(slots, range(10, 15)))
    assert image.flatten().tolist() == [wanted.get(slot, 0) for slot in range(5)]


def test_the_reason_is_the_last_line_that_names_one() -> None:
    report = "Critical error:\nError in sample #3: [error] bad marker:\nStacktrace (2 entries)\n"
    assert reason_of(RuntimeError(report)) == "Error in sample #3: [error] bad marker"
    assert reason_of(RuntimeError("first\n\n  second \n")) == "second"
    assert reason_of(MemoryError()) == "MemoryError"
