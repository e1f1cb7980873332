"""The Triton kernels on a real GPU: skipped where there is none, required by `make bench-gpu`."""

import pytest
import torch
from torch import Tensor

from simmim_kernels import (
    linear_masked_l1_loss,
    masked_l1_loss,
    masked_l1_loss_from_tokens,
    merge_patches,
    random_patch_mask,
    residual_attention,
    residual_mlp,
    substitute_mask_tokens,
    window_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def gradients(function, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(t.detach().clone().requires_grad_() for t in leaves)
    out = function(*leaves)
    (
        out.float() * torch.linspace(0.5, 1.5, out.numel(), device=out.device).view_as(out)
    ).sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def compare(function, *leaves: Tensor) -> None:
    """Triton against the reference at the same dtype and in float64: at most twice its error."""
    found = gradients(lambda *x: function("triton", *x), *leaves)
    plain = gradients(lambda *x: function("reference", *x), *leaves)
    exact = gradients(lambda *x: function("reference", *x), *(t.double() for t in leaves))
    for ours, torchs, wanted in zip(found, plain, exact, strict=True):
        error, allowed = (t.double() - wanted.double() for t in (ours, torchs))
        assert error.norm() <= 2 * allowed.norm() + 1e-5 * wanted.norm()


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def units(batch: int, side: int) -> Tensor:
    return random_patch_mask(batch, (side, side), seed=4, device="cuda", backend="reference")


@pytest.mark.parametrize(
    ("grid", "unit"), [((6, 6), 1), ((48, 48), 8), ((14, 14), 2), ((48, 48), 1)]
)
def test_random_patch_mask(grid: tuple[int, int], unit: int) -> None:
    ids = torch.arange(300) * 2**33 - 5
    options = {"unit": unit, "seed": 7, "epoch": 3}
    on_cpu = random_patch_mask(300, grid, ids=ids, backend="reference", **options)
    found = random_patch_mask(300, grid, ids=ids.cuda(), backend="triton", **options)
    assert torch.equal(found.cpu(), on_cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 2304, 128), (8, 196, 768), (3, 50, 77)], ids=str)
def test_substitute_mask_tokens(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    B, L, D = shape
    mask = torch.rand(B, L, device="cuda") < 0.6
    tokens, token = torch.randn(shape, device="cuda"), torch.randn(D, device="cuda")
    position = torch.randn(L, D, device="cuda")
    compare(
        lambda name, x, t, p: substitute_mask_tokens(x, mask, t, pos_embed=p, backend=name),
        *(t.to(dtype) for t in (tokens, token, position)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["float", "bytes", "normalised target"])
def test_masked_l1_loss(kind: str, dtype: torch.dtype) -> None:
    image, options = torch.randn(4, 3, 192, 192, device="cuda"), {}
    if kind == "bytes":
        image = torch.randint(0, 256, image.shape, dtype=torch.uint8, device="cuda")
        options = {"mean": MEAN, "std": STD}
    if kind == "normalised target":
        options = {"norm_target": 47}
    hidden = units(4, 6)
    fine = hidden.repeat_interleave(8, 1).repeat_interleave(8, 2)
    prediction = torch.randn(4, 3, 192, 192, device="cuda").to(dtype)
    compare(lambda name, p: masked_l1_loss(p, image, fine, 4, backend=name, **options), prediction)
    tokens = torch.randn(4, 6, 6, 3072, device="cuda").to(dtype)
    compare(
        lambda name, p: masked_l1_loss_from_tokens(p, image, hidden, 32, backend=name, **options),
        tokens,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cells", "stride", "width"), [(6, 32, 1024), (14, 16, 768), (4, 14, 72)])
def test_linear_masked_l1_loss(cells: int, stride: int, width: int, dtype: torch.dtype) -> None:
    side, outputs = cells * stride, 3 * stride**2
    image = torch.randn(4, 3, side, side, device="cuda")
    mask = units(4, cells)
    compare(
        lambda name, f, w, b: linear_masked_l1_loss(f, w, b, image, mask, stride, backend=name),
        torch.randn(4, cells, cells, width, device="cuda").to(dtype),
        (torch.randn(outputs, width, device="cuda") / width**0.5).to(dtype),
        torch.randn(outputs, device="cuda").to(dtype),
    )


# side of the map, C, heads, window, shift: Swin-B's stages 1 and 4, Swin-L's, ViT-B
MAPS = [
    ((48, 48), 128, 4, (6, 6), (3, 3)),
    ((6, 6), 1024, 32, (6, 6), (0, 0)),
    ((24, 24), 384, 12, (12, 12), (6, 6)),
    ((1, 197), 768, 12, (1, 197), (0, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "width", "heads", "window", "shift"), MAPS)
def test_window_attention(
    side: tuple[int, int],
    width: int,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    pairs = window[0] * window[1]
    compare(
        lambda name, qkv, b: window_attention(qkv, b, heads, window, shift, backend=name),
        torch.randn(4, *side, 3 * width, device="cuda").to(dtype),
        torch.randn(heads, pairs, pairs, device="cuda").to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "width", "heads", "window", "shift"), MAPS)
def test_transformer_block(
    side: tuple[int, int],
    width: int,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device="cuda") * scale).to(dtype)

    x, C = normal(4, *side, width), width
    scale, pairs = torch.tensor([1.25, 0.0, 1.25, 1.25], device="cuda"), window[0] * window[1]

    def attention(name: str, *leaves: Tensor) -> Tensor:
        settings = {"num_heads": heads, "window": window, "shift": shift, "backend": name}
        return residual_attention(*leaves[:-1], gamma=leaves[-1], branch_scale=scale, **settings)

    def mlp(name: str, *leaves: Tensor) -> Tensor:
        return residual_mlp(*leaves[:-1], gamma=leaves[-1], branch_scale=scale, backend=name)

    small = C**-0.5
    of_attention = (normal(3 * C, C, scale=small), normal(3 * C), normal(heads, pairs, pairs))
    compare(
        attention,
        *(x, normal(C), normal(C), *of_attention),
        *(normal(C, C, scale=small), normal(C), normal(C)),
    )
    compare(
        mlp,
        *(x, normal(C), normal(C), normal(4 * C, C, scale=small), normal(4 * C)),
        *(normal(C, 4 * C, scale=small / 2), normal(C), normal(C)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "width"), [((48, 48), 128), ((12, 12), 512), ((2, 6), 24)])
def test_merge_patches(side: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    shapes = ((4, *side, width), (4 * width,), (4 * width,), (2 * width, 4 * width))
    leaves = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    leaves[3] = leaves[3] / (4 * width) ** 0.5
    compare(lambda name, *x: merge_patches(*x, backend=name), *leaves)


def test_more_elements_than_32_bits_count() -> None:
    """Offsets beyond 2^31: 2.4 G elements of bfloat16, checked on their last image."""
    free, _ = torch.cuda.mem_get_info()
    batch, L, D = 1024, 2304, 1024
    if free < 3 * batch * L * D * 2:
        pytest.skip(f"needs {3 * batch * L * D * 2 / 2**30:.0f} GiB of GPU memory")
    tokens = torch.ones(batch, L, D, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(batch, L, dtype=torch.bool, device="cuda")
    mask[-1, ::2] = True
    token = torch.full((D,), 3.0, device="cuda", dtype=torch.bfloat16)
    out = substitute_mask_tokens(tokens, mask, token, backend="triton")
    assert (out[-1, ::2] == 3).all()
    assert (out[-1, 1::2] == 1).all()
    assert (out[:-1] == 1).all()


def test_autocast_and_compile() -> None:
    head = torch.nn.Linear(64, 3 * 16**2).cuda()
    features = torch.randn(4, 14, 14, 64, device="cuda")
    image, mask = torch.randn(4, 3, 224, 224, device="cuda"), units(4, 14)

    def loss(features: Tensor, name: str | None = None) -> Tensor:
        return linear_masked_l1_loss(
            features, head.weight, head.bias, image, mask, 16, backend=name
        )

    with torch.autocast("cuda", torch.bfloat16):
        expected = loss(features, "reference")
        torch.testing.assert_close(loss(features), expected, rtol=1e-2, atol=0)
        compiled = torch.compile(loss, fullgraph=True)
        torch.testing.assert_close(compiled(features), expected, rtol=1e-2, atol=0)


def test_nothing_is_read_back() -> None:
    """Forward and backward leave the device's queue alone: no synchronisation."""
    features = torch.randn(2, 6, 6, 64, device="cuda", requires_grad=True)
    weight = torch.randn(3072, 64, device="cuda", requires_grad=True)
    image = torch.randint(0, 256, (2, 3, 192, 192), dtype=torch.uint8, device="cuda")
    mean, std = (torch.tensor(v, device="cuda") for v in (MEAN, STD))
    mask = units(2, 6)

    def step() -> None:
        linear_masked_l1_loss(
            features, weight, None, image, mask, 32, mean=mean, std=std, backend="triton"
        ).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
