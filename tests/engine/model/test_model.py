"""SimMIM beyond the golden numbers: channels, non-square images, mask grids, precision, compile."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from simmim import SimMIM
from simmim.backbone.attention import relative_position_bias_with_cls
from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.model.masking import sample_mask
from simmim_kernels.window_attention.reference import relative_position_bias, shift_mask

SWIN = SwinSpec(image_size=(32, 64), embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4)
VIT = ViTSpec(image_size=(32, 48), patch_size=8, embed_dim=16, depth=2, num_heads=2)
PLAIN = replace(VIT, absolute_position=True, shared_relative_position=False, layer_scale=None)
SPECS = pytest.mark.parametrize("spec", [SWIN, VIT, PLAIN], ids=["swin", "vit", "plain_vit"])


def batch(spec: SwinSpec | ViTSpec, size: int = 2) -> tuple[Tensor, Tensor]:
    image = torch.randint(0, 256, (size, spec.channels, *spec.image_size), dtype=torch.uint8)
    return image, torch.rand(size, *spec.grid) < 0.6


@SPECS
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_channels_and_non_square_images(spec: SwinSpec | ViTSpec, channels: int) -> None:
    spec = replace(spec, channels=channels)
    model = SimMIM(build_encoder(spec))
    image, mask = batch(spec)
    features = model.encode(image, mask)
    height, width = (side // spec.stride for side in spec.image_size)
    assert features.shape == (2, model.encoder.num_features, height, width)
    assert model.reconstruct(image, mask).shape == (2, channels, *spec.image_size)
    loss = model(image, mask)
    loss.backward()
    assert loss.shape == ()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@SPECS
def test_hidden_pixels_do_not_reach_the_features(spec: SwinSpec | ViTSpec) -> None:
    model = SimMIM(build_encoder(spec)).eval()
    image, mask = batch(spec)
    pixels = mask.repeat_interleave(spec.patch_size, 1).repeat_interleave(spec.patch_size, 2)
    other = torch.where(pixels.unsqueeze(1), 255 - image, image)
    assert torch.equal(model.encode(image, mask), model.encode(other, mask))
    assert not torch.equal(model.encode(image), model.encode(other))
    assert torch.equal(model.encode(image), model.encode(image, torch.zeros_like(mask)))


def test_uint8_is_normalised_and_back() -> None:
    model = SimMIM(build_encoder(SWIN))
    image, mask = batch(SWIN)
    normal = model.normalise(image)
    expected = (image[:, 0].double() / 255 - 0.485) / 0.229
    torch.testing.assert_close(normal[:, 0].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.denormalise(normal), image)
    assert torch.equal(model(image, mask), model(normal, mask))
    with pytest.raises(ValueError, match="uint8 or floating point"):
        model.normalise(image.int())


def test_masks_on_a_coarser_grid() -> None:
    model = SimMIM(build_encoder(SWIN)).eval()
    image, _ = batch(SWIN)
    units = torch.tensor([[[True, False]], [[False, True]]])
    tokens = units.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(model(image, units), model(image, tokens))
    assert torch.equal(model.encode(image, units.int()), model.encode(image, tokens))
    with pytest.raises(ValueError, match=r"mask \(2, 3, 2\)"):
        model(image, torch.zeros(2, 3, 2, dtype=torch.bool))


def test_wrong_image() -> None:
    model = SimMIM(build_encoder(SWIN))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 32, 64\], got \(2, 3, 32, 32\)"):
        model.encode(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="mean has 1 and std 3 values for 3 channels"):
        SimMIM(build_encoder(SWIN), mean=[0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (36, 64)}, r"image_size: 36×64 px is no multiple .* nearest is 32×64"),
        ({"window_size": 3}, "window of 3 tokens does not fit .* nearest that fits is 2"),
        ({"num_heads": (3, 4)}, "num_heads: 3 does not divide the width 8 of stage 0"),
        ({"num_heads": (2,)}, "1 values for 2 stages"),
    ],
)
def test_swin_that_does_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(replace(SWIN, **change))


def indexed_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """The published form: an index of pairs, looked up in the table."""
    h, w = window
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    index = (rows[:, None] - rows[None] + h - 1) * (2 * w - 1)
    index = index + columns[:, None] - columns[None] + w - 1
    return table[index.flatten()].view(h * w, h * w, -1).permute(2, 0, 1)


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 5), (7, 7)])
def test_relative_position_bias(window: tuple[int, int]) -> None:
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    ours = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    bias, expected = relative_position_bias(ours, window), indexed_bias(theirs, window)
    assert torch.equal(bias, expected)
    weight = torch.randn_like(bias)
    (bias * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_relative_position_bias_with_class_token() -> None:
    table = torch.randn(3 * 5 + 3, 2)
    bias = relative_position_bias_with_cls(table, (2, 3))
    assert bias.shape == (2, 7, 7)
    assert torch.equal(bias[:, 1:, 1:], relative_position_bias(table[:-3], (2, 3)))
    assert torch.equal(bias[:, 0, 1:], table[-3].unsqueeze(1).expand(2, 6))
    assert torch.equal(bias[:, 1:, 0], table[-2].unsqueeze(1).expand(2, 6))
    assert torch.equal(bias[:, 0, 0], table[-1])


def test_shift_mask_keeps_apart_what_was_not_adjacent() -> None:
    mask = shift_mask((4, 8), (4, 4), (2, 2))
    assert mask.shape == (2, 16, 16)
    assert set(mask.unique().tolist()) == {-100.0, 0.0}
    # before the roll, token (r, c) of window n was at row (r + 2) % 4 and column (4n + c + 2) % 8
    for n in range(2):
        for a in range(16):
            for b in range(16):
                (ra, ca), (rb, cb) = divmod(a, 4), divmod(b, 4)
                wrapped_rows = (ra + 2 >= 4) != (rb + 2 >= 4)
                wrapped_columns = (4 * n + ca + 2 >= 8) != (4 * n + cb + 2 >= 8)
                assert (mask[n, a, b] != 0) == (wrapped_rows or wrapped_columns)


@SPECS
def test_bfloat16_error_is_near_that_of_its_inputs(spec: SwinSpec | ViTSpec) -> None:
    model = SimMIM(build_encoder(spec)).eval()
    image, mask = batch(spec, 4)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(image, mask)
        features = model.encode(image, mask)
    exact = model.double()(model.normalise(image).double(), mask)
    assert low.dtype == torch.float32
    assert features.isfinite().all()
    assert abs(low.item() - exact.item()) < 0.01 * exact.item()


@SPECS
def test_drop_path(spec: SwinSpec | ViTSpec) -> None:
    model = SimMIM(build_encoder(replace(spec, drop_path=0.5)))
    image, mask = batch(spec)
    model.train()
    torch.manual_seed(1)
    first = model(image, mask)
    assert model(image, mask) != first
    torch.manual_seed(1)
    assert model(image, mask) == first
    model.eval()
    assert model(image, mask) == model(image, mask)


@SPECS
def test_compiles_without_graph_breaks(spec: SwinSpec | ViTSpec) -> None:
    model = SimMIM(build_encoder(spec)).eval()
    image, mask = batch(spec)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, mask), model(image, mask))
    assert len(torch.export.export(model, (image, mask)).graph.nodes) > 0


def test_sample_mask() -> None:
    options = {"patch_size": 4, "mask_unit": 32, "ratio": 0.6, "seed": 5}
    ids, epochs = torch.tensor([4, -1, 9]), torch.tensor([0, 0, 2])
    mask = sample_mask(ids, epochs, (48, 48), **options)
    assert mask.sum((1, 2)).tolist() == [22, 0, 22]
    assert mask.shape == (3, 6, 6)
    alone = sample_mask(ids[2:], epochs[2:], (48, 48), **options)
    assert torch.equal(mask[2], alone[0])
    wide = sample_mask(ids[:1], epochs[:1], (24, 56), **options)
    assert wide.shape == (1, 3, 7)
    assert int(wide.sum()) == 13  # ceil(21 · 0.6)
    with pytest.raises(ValueError, match=r"units of 32 px do not tile 50×48 tokens of 4 px"):
        sample_mask(ids, epochs, (50, 48), **options)
