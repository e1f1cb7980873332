"""embed_patches: every backend against the reference in float64, forward and gradients."""

import pytest
import torch
from torch import Tensor

from numerics import assert_no_worse, relative_error
from op_samples import Inputs, embed_inputs, wave
from simmim_kernels import embed_patches, native
from simmim_kernels.embed_patches import reference

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, grid, side of a patch, D
SHAPES = [(2, (4, 6), 4, 48), (1, (1, 1), 2, 5), (3, (7, 5), 3, 100)]
# what the embedding has beside a projection and a mask
PARTS = ["plain", "norm", "norm and position"]


def gradients(inputs: Inputs, backend: str, **options: object) -> Inputs:
    leaves = {
        name: t.detach().clone().requires_grad_(name not in ("image", "mask"))
        for name, t in inputs.items()
    }
    statistics = {"mean": MEAN, "std": STD} if inputs["image"].dtype == torch.uint8 else {}
    out = embed_patches(**{"mask": None} | leaves, **statistics, backend=backend, **options)
    out.backward(wave(out))
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach()} | grads


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: t.to(dtype) if t.dtype.is_floating_point else t for k, t in inputs.items()}


# Every pair of shape, parts and dtype occurs, not every three of them.
@pytest.mark.parametrize(
    ("shape", "parts", "dtype"),
    [
        (shape, parts, DTYPES[(i + j) % 3])
        for i, shape in enumerate(SHAPES)
        for j, parts in enumerate(PARTS)
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_empty")
def test_against_float64(shape: tuple, parts: str, dtype: torch.dtype, backend: str) -> None:
    inputs = embed_inputs(shape, parts)
    inputs["mask"].view(-1)[0] = False  # the mean of nothing would be a gradient of 0 / 0
    exact = gradients(cast(inputs, torch.float64), "reference")
    plain = gradients(cast(inputs, dtype), "reference")
    found = gradients(cast(inputs, dtype), backend)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in plain.items()}
    assert_no_worse(found, plain, exact, dtype)


def test_bytes_are_normalised_on_the_way(backend: str) -> None:
    inputs = embed_inputs(SHAPES[0], "norm", pixels="bytes")
    normal = reference.normalise_pixels(inputs["image"].double(), MEAN.double(), STD.double())
    exact = gradients(cast(inputs | {"image": normal}, torch.float64), "reference")
    found = gradients(inputs, backend)
    for name, expected in exact.items():
        assert relative_error(found[name], expected) < 2e-6, name


@pytest.mark.parametrize("layout", ["channels last", "crop"])
def test_images_of_any_strides(layout: str, backend: str) -> None:
    inputs = embed_inputs(SHAPES[0], "norm", pixels="bytes")
    expected = gradients(inputs, "reference")
    image = inputs["image"]
    if layout == "channels last":
        image = image.to(memory_format=torch.channels_last)
    else:
        image = torch.nn.functional.pad(image, (3, 2, 1, 4), value=7)[:, :, 1:-4, 3:-2]
    assert not image.is_contiguous()
    found = gradients(inputs | {"image": image}, backend)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [0.0, 1.0], ids=["nothing", "everything"])
@pytest.mark.parametrize("parts", PARTS)
def test_all_or_nothing_hidden(hidden: float, parts: str, backend: str) -> None:
    inputs = embed_inputs(SHAPES[0], parts, hidden=hidden)
    found, expected = gradients(inputs, backend), gradients(inputs, "reference")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    if hidden:
        assert (found["weight"] == 0).all()
        return
    del inputs["mask"]
    without = gradients(inputs, backend)
    assert "mask_token" not in without or (without["mask_token"] == 0).all()
    torch.testing.assert_close(without["out"], found["out"])


def test_what_hidden_pixels_hold_does_not_matter(backend: str) -> None:
    if backend != "native":
        pytest.skip("a convolution of all patches multiplies hidden pixels by gradients of 0")
    inputs = embed_inputs(SHAPES[0], "norm")
    expected = gradients(inputs, backend)
    pixels = inputs["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    inputs["image"] = inputs["image"].masked_fill(pixels, float("nan"))
    found = gradients(inputs, backend)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    inputs = embed_inputs(SHAPES[0], "norm", pixels="bytes")
    exact = gradients(cast(inputs, torch.float64), "reference")
    with torch.autocast("cpu", dtype):
        plain, found = gradients(inputs, "reference"), gradients(inputs, backend)
    assert found["out"].dtype == dtype
    assert all(t.dtype == torch.float32 for name, t in found.items() if name != "out")
    assert_no_worse(found, plain, exact, dtype)


def test_kept_for_the_backward() -> None:
    """The projection of the visible patches and two numbers each; no pixels, no tokens."""
    if native.extension is None:
        pytest.skip(str(native.missing_reason))
    inputs = embed_inputs(SHAPES[0], "norm", pixels="bytes")
    visible, D = int((~inputs["mask"]).sum()), len(inputs["bias"])
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.dim() == 2 or t.shape == (visible,):
            kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        embed_patches(
            **{k: t.requires_grad_(k == "weight") for k, t in inputs.items()},
            mean=MEAN,
            std=STD,
            backend="native",
        )
    assert sum(t.numel() for t in kept.values()) == visible * (D + 2)


def test_empty_batch(backend: str) -> None:
    inputs = embed_inputs(SHAPES[0], "norm")
    inputs["image"], inputs["mask"] = inputs["image"][:0], inputs["mask"][:0]
    found = gradients(inputs, backend)
    assert found["out"].shape == (0, 24, 48)
    assert all((grad == 0).all() for name, grad in found.items() if name != "out")
