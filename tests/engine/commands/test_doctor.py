"""`simmim doctor`: what is installed, and what each op runs on and why not on something better."""

from types import SimpleNamespace

import pytest
import torch

import simmim_kernels
from recorded_calls import record
from simmim.commands import doctor as command
from simmim_kernels.dispatch import ENVIRONMENT_VARIABLE

CPU = torch.device("cpu")


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert command.main([]) == 0
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], name: str) -> str:
    (line,) = [line for line in lines if line.startswith(f"  {name:<24} ")]
    return line[27:]


def test_sections_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys)
    assert [line for line in lines if not line.startswith(" ")] == [
        "versions",
        "devices",
        "native CPU kernels",
        "backends on cpu, float32",
        "attention",
        "data",
    ]


def test_versions_and_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "package_versions", lambda: {"torch": "9.9", "timm": None})
    monkeypatch.setattr(command, "git_commit", lambda: "abc")
    lines = lines_of(capsys)
    assert row(lines, "torch") == "9.9"
    assert row(lines, "timm") == "not installed"
    assert row(lines, "git commit") == "abc"
    assert command.device_name(CPU) in row(lines, "cpu")
    monkeypatch.setattr(command, "git_commit", lambda: None)
    assert row(lines_of(capsys), "git commit") == "not a checkout"


@pytest.mark.parametrize(
    ("built", "reason"),
    [("12.9", "no driver or no card"), (None, "this torch is built without CUDA")],
)
def test_why_there_is_no_cuda_device(
    built: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert row(lines_of(capsys), "cuda") == f"none ({reason})"


def test_cuda_devices_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    properties = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    asked = []
    monkeypatch.setattr(command, "data_lines", lambda: [])
    monkeypatch.setattr(
        command, "backend_lines", lambda *given: asked.append(given) or [f"  on {given[0]}"]
    )
    lines = lines_of(capsys)
    assert (row(lines, "cuda:0"), row(lines, "cuda:1")) == ("card 0, 24 GiB", "card 1, 24 GiB")
    assert asked == [(CPU, torch.float32), (torch.device("cuda", 0), torch.float32)]
    assert lines[lines.index("backends on cuda, float32") + 1] == "  on cuda:0"


def test_every_op_is_listed_with_its_backend() -> None:
    ops = set(simmim_kernels.__all__)
    assert set(command.OPS) <= ops
    lines = command.backend_lines(CPU, torch.float32)
    assert [line.split()[0] for line in lines[: len(command.OPS)]] == list(command.OPS)
    for op, backends in command.OPS.items():
        chosen = row(lines, op)
        before = [b.name for b in backends][: [b.name for b in backends].index(chosen)]
        assert all(any(line.startswith(f"    not {name}: ") for line in lines) for name in before)
    assert not any(line.startswith("    not reference") for line in lines)


def test_a_forced_backend_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    lines = lines_of(capsys)
    assert f"backends on cpu, float32 ({ENVIRONMENT_VARIABLE}=reference)" in lines
    assert {row(lines, op) for op in command.OPS} == {"reference"}
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert row(lines_of(capsys), "residual_mlp").startswith("none: ")


@pytest.mark.parametrize("missing", [None, "not compiled"])
def test_native_kernels(
    missing: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extension = SimpleNamespace(target=lambda: "avx9", __file__="here.so")
    monkeypatch.setattr(command.native, "extension", None if missing else extension)
    monkeypatch.setattr(command.native, "missing_reason", missing)
    monkeypatch.setattr(command, "backend_lines", lambda *given: [])
    monkeypatch.setattr(command, "data_lines", lambda: [])
    lines = lines_of(capsys)
    told = lines[lines.index("native CPU kernels") + 1]
    assert told == f"  {missing or 'avx9, loaded: here.so'}"


@pytest.mark.parametrize("reason", [None, "no xformers"])
def test_attention_of_others(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.xformers_kernel, "missing_reason", lambda: reason)
    lines = lines_of(capsys)
    lines = lines[lines.index("attention") :]
    assert row(lines, "xformers") == (reason or "memory_efficient_attention, on CUDA")


@pytest.mark.parametrize(("there", "device"), [(False, "cpu"), (True, "cuda")])
@pytest.mark.parametrize(("missing", "told"), [(None, "installed"), ("no DALI", "no DALI")])
def test_what_decodes(
    there: bool, device: str, missing: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(command.backend, "missing_reason", lambda: missing)
    asked = record(monkeypatch, command.backend, "choose_backend", lambda **given: ("x", "why"))
    lines = command.data_lines()
    assert asked == [{"requested": "auto", "device": torch.device(device)}]
    assert row(lines, "data.backend=auto") == "x (why)"
    assert row(lines, "dali") == told
    assert row(lines, "JPEG").startswith(f"simplejpeg {command.simplejpeg.__version__} ")
    assert row(lines, "crop and resize") in ("native", "reference")
