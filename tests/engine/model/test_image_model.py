"""Models beyond the golden numbers: channels, non-square images, mask grids, precision, compile."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from simmim import SimMIM
from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec

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
