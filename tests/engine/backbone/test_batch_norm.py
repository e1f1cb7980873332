"""norm_relu against PyTorch's batch norm, sum and ReLU, one after the other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.backbone import batch_norm
from simmim.backbone.batch_norm import norm_relu
from simmim_kernels import native

SHAPE = (3, 10, 4, 5)
NEEDS_NATIVE = pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each time that the op runs."""
    found: list[str] = []

    def counted(*arguments: object, **options: object) -> object:
        found.append("op")
        return op(*arguments, **options)

    op = batch_norm.batch_norm_relu
    monkeypatch.setattr(batch_norm, "batch_norm_relu", counted)
    return found


def make(**options: object) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(SHAPE[1], **options)
    for tensor in (*norm.parameters(), norm.running_mean):
        if tensor is not None:
            tensor.data.uniform_(-1, 1)
    return norm


def draw(layout: torch.memory_format = torch.channels_last) -> Tensor:
    return (torch.randn(SHAPE) * 2 + 1).contiguous(memory_format=layout)


def plain(
    norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    y = norm(x) if scale is None else norm(x) * scale.view(-1, 1, 1, 1)
    return F.relu(y if shortcut is None else y + shortcut)


def everything(function: object, norm: nn.Module, *maps: Tensor | None) -> dict[str, Tensor]:
    """Output, gradients and buffers."""
    norm = copy.deepcopy(norm)
    leaves = [None if m is None else m.detach().clone().requires_grad_() for m in maps]
    out = function(norm, *leaves)
    out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape).cos())
    found = {"out": out.detach()} | {f"p {n}": p.grad for n, p in norm.named_parameters()}
    found |= {f"b {name}": b for name, b in norm.named_buffers()}
    return found | {f"x {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@NEEDS_NATIVE
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}], ids=str
)
def test_one_op_in_training(shortcut: bool, options: dict, calls: list[str]) -> None:
    norm, maps = make(**options), (draw(), draw() if shortcut else None)
    for _ in range(3):  # with no momentum the third batch counts a third
        norm.train()
        assert_close(everything(norm_relu, norm, *maps), everything(plain, norm, *maps))
        norm(draw())
    assert calls == ["op"] * 3


@NEEDS_NATIVE
def test_no_running_statistics(calls: list[str]) -> None:
    norm, x = make(track_running_stats=False), draw()
    assert_close(everything(norm_relu, norm, x), everything(plain, norm, x))
    assert calls == ["op"]


@pytest.mark.parametrize(
    "case", ["evaluation", "contiguous", "reference", "triton", "hook", "no affine", "scaled"]
)
def test_pytorch_elsewhere(case: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    norm = make(affine=case != "no affine").train(case != "evaluation")
    layout = torch.contiguous_format if case == "contiguous" else torch.channels_last
    x, shortcut, seen = draw(layout), draw(layout), []
    scale = torch.tensor([0.0, 2.0, 2.0]) if case == "scaled" else None
    if case == "contiguous":  # the op itself would refuse it
        monkeypatch.setenv("SIMMIM_BACKEND", "native")
    if case == "hook":
        norm.register_forward_hook(lambda *arguments: seen.append("norm"))
    backend = case if case in ("reference", "triton") else None

    def run(norm: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
        return norm_relu(norm, x, shortcut, scale, backend=backend)

    expected = everything(lambda *given: plain(*given, scale), norm, x, shortcut)
    seen.clear()
    assert_close(everything(run, norm, x, shortcut), expected)
    assert calls == []
    assert seen == (["norm"] if case == "hook" else [])


def test_a_synchronised_norm_is_asked_itself(calls: list[str]) -> None:
    """PyTorch's own conversion makes it; on the CPU it has kernels only in evaluation mode."""
    norm, x = nn.SyncBatchNorm.convert_sync_batchnorm(make()).eval(), draw()
    assert isinstance(norm, nn.SyncBatchNorm)
    assert_close(everything(norm_relu, norm, x), everything(plain, norm, x))
    assert calls == []


def test_one_value_per_channel_is_refused_as_pytorch_does() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_relu(make(), torch.zeros(1, SHAPE[1], 1, 1))


@NEEDS_NATIVE
def test_bf16_maps_beside_float32_parameters() -> None:
    norm, x, shortcut = make(), draw().bfloat16(), draw().bfloat16()
    exact = plain(copy.deepcopy(norm).double(), x.double(), shortcut.double())
    out = norm_relu(copy.deepcopy(norm), x, shortcut)
    assert out.dtype == torch.bfloat16
    reference = plain(norm, x, shortcut)
    assert (out - exact).abs().max() <= (reference - exact).abs().max()


@NEEDS_NATIVE
def test_it_compiles_without_graph_breaks() -> None:
    norm, x, shortcut = make(), draw(), draw()
    compiled = torch.compile(norm_relu, fullgraph=True, backend="aot_eager")
    assert_close(everything(compiled, norm, x, shortcut), everything(plain, norm, x, shortcut))
