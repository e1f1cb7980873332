"""The ops inside torch's machinery: torch.compile, torch.export, autocast, DDP, checkpointing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simmim_kernels import (
    linear_masked_l1_loss,
    masked_l1_loss_from_tokens,
    native,
    random_patch_mask,
    substitute_mask_tokens,
)

NEEDS_EXTENSION = pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))
STRIDE, GRID, WIDTH = 4, (4, 4), 8


class Tiny(nn.Module):
    """Patches, mask token, one mixing layer, head and loss, through every op."""

    def __init__(self, backend: str | None, fused_head: bool = True) -> None:
        super().__init__()
        self.backend, self.fused_head = backend, fused_head
        self.patches = nn.Conv2d(3, WIDTH, STRIDE, STRIDE)
        self.mask_token = nn.Parameter(torch.randn(WIDTH))
        self.position = nn.Parameter(torch.randn(GRID[0] * GRID[1], WIDTH))
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, 3 * STRIDE**2)

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        tokens = substitute_mask_tokens(
            tokens, mask.flatten(1), self.mask_token, pos_embed=self.position, backend=self.backend
        )
        return self.mix(tokens).unflatten(1, GRID)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        mask = random_patch_mask(len(ids), GRID, seed=3, ids=ids, backend=self.backend)
        features = self.encode(image, mask)
        if self.fused_head:
            return linear_masked_l1_loss(
                features,
                self.head.weight,
                self.head.bias,
                image,
                mask,
                STRIDE,
                backend=self.backend,
            )
        return masked_l1_loss_from_tokens(
            self.head(features), image, mask, STRIDE, backend=self.backend
        )


def make(backend: str | None, fused_head: bool = True) -> tuple[Tiny, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Tiny(backend, fused_head)
    return model, torch.randn(3, 3, 16, 16), torch.tensor([5, 9, 2])


def step(model: Callable[..., Tensor], parameters: nn.Module, *inputs: Tensor) -> list[Tensor]:
    parameters.zero_grad()
    loss = model(*inputs)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in parameters.parameters())]


def assert_all_close(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("fused_head", [True, False], ids=["fused head", "loss from tokens"])
def test_every_backend_trains_alike(fused_head: bool, backend: str) -> None:
    model, *inputs = make("reference", fused_head)
    expected = step(model, model, *inputs)
    model.backend = backend
    assert_all_close(step(model, model, *inputs), expected, rtol=1e-4, atol=1e-6)


@NEEDS_EXTENSION
@pytest.mark.slow
@pytest.mark.parametrize("fused_head", [True, False], ids=["fused head", "loss from tokens"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(fused_head: bool, dynamic: bool) -> None:
    model, image, ids = make(None, fused_head)
    expected = step(model, model, image, ids)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    assert_all_close(step(compiled, model, image, ids), expected, rtol=1e-4, atol=1e-6)
    smaller = step(model, model, image[:2], ids[:2])
    assert_all_close(step(compiled, model, image[:2], ids[:2]), smaller, rtol=1e-4, atol=1e-6)


@NEEDS_EXTENSION
def test_traces_without_a_graph_break() -> None:
    """The slow test above without code generation: every op is one node of one graph."""
    seen: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    for fused_head in (True, False):
        model, image, ids = make("native", fused_head)
        torch._dynamo.reset()
        step(torch.compile(model, fullgraph=True, backend=backend), model, image, ids)
    for targets, loss in zip(seen, ("linear_masked_l1_loss", "masked_l1_loss"), strict=True):
        ours = [t for t in targets if t.startswith("simmim.")]
        assert ours == [
            "simmim.random_patch_mask",
            "simmim.substitute_mask_tokens",
            f"simmim.{loss}",
        ]


@NEEDS_EXTENSION
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exports_an_encoder_with_substitution(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self, model: Tiny) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return self.model.encode(image, mask)

    model, image, ids = make(None)
    encoder = Encoder(model).eval()
    mask = random_patch_mask(3, GRID, seed=3, ids=ids)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        encoder, (image, mask), dynamic_shapes={"image": {0: batch}, "mask": {0: batch}}
    )
    torch.export.save(program, tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(image, mask), encoder(image, mask))
        torch.testing.assert_close(loaded(image[:2], mask[:2]), encoder(image[:2], mask[:2]))


@pytest.mark.parametrize("fused_head", [True, False], ids=["fused head", "loss from tokens"])
def test_autocast_behaves_as_the_reference_does(fused_head: bool, backend: str) -> None:
    found = {}
    for name in ("reference", backend):
        model, image, ids = make(name, fused_head)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.encode(image, random_patch_mask(3, GRID, seed=3, ids=ids))
            loss = model(image, ids)
        assert tokens.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        loss.backward()
        found[name] = [loss.detach(), *(p.grad for p in model.parameters())]
    for got, expected in zip(found[backend], found["reference"], strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0.03, atol=0.003)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    model, image, ids = make(backend)
    expected = step(model, model, image, ids)
    image.requires_grad_()  # the reentrant form needs an input with a gradient

    def checkpointed(image: Tensor, ids: Tensor) -> Tensor:
        return checkpoint(model, image, ids, use_reentrant=use_reentrant)

    assert_all_close(step(checkpointed, model, image, ids), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """One gloo process: DDP's hooks see the gradients of the ops as any others."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for fused_head in (True, False):
            model, *inputs = make(None, fused_head)
            expected = step(model, model, *inputs)
            wrapped = DistributedDataParallel(model)
            assert_all_close(step(wrapped, model, *inputs), expected)
    finally:
        dist.destroy_process_group()
