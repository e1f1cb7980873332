"""Models beyond the golden numbers: channels, non-square images, mask grids, precision, compile."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from simmim import SimMIM
from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.model.image_model import ImageModel, evaluation_mode
from simmim_kernels.masked_l1_loss.reference import local_statistics

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


# a plain ViT runs the same operations as the other one
@pytest.mark.parametrize("spec", [SWIN, VIT], ids=["swin", "vit"])
def test_compiles_without_graph_breaks(spec: SwinSpec | ViTSpec) -> None:
    model = SimMIM(build_encoder(spec)).eval()
    image, mask = batch(spec)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, mask), model(image, mask))
    assert len(torch.export.export(model, (image, mask)).graph.nodes) > 0


def test_statistics_are_imagenet_s_for_colour_and_half_and_quarter_else() -> None:
    colour, grey = (SimMIM(build_encoder(replace(SWIN, channels=c))) for c in (3, 1))
    assert colour.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert colour.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert (grey.mean.tolist(), grey.std.tolist()) == ([0.5], [0.25])
    with pytest.raises(ValueError, match="mean has 3 and std 2 values for 3 channels"):
        SimMIM(build_encoder(SWIN), std=[0.5, 0.5])


def test_attention_has_the_backend_of_all_ops_or_its_own() -> None:
    model = ImageModel(build_encoder(SWIN))
    for given, wanted in (
        (("native",), ("native", "native")),
        (("native", "reference"), ("native", "reference")),
        ((None, "xformers"), (None, "xformers")),
    ):
        model.use_backend(*given)
        assert model.encoder.backends == wanted


def test_bytes_alone_are_normalised_by_the_ops() -> None:
    model = ImageModel(build_encoder(SWIN), mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]).eval()
    image, _ = batch(SWIN)
    normal = (image / 255 - model.mean.view(3, 1, 1)) / model.std.view(3, 1, 1)
    torch.testing.assert_close(model.encode(image), model.encode(normal), rtol=1e-4, atol=1e-5)


def test_pixels_beyond_the_scale_are_clipped() -> None:
    model = ImageModel(build_encoder(SWIN), mean=[0.5] * 3, std=[0.25] * 3)
    values = torch.tensor([-9.0, 0.0, 0.01, 9.0]).expand(1, 3, 1, 4)
    assert model.denormalise(values)[0, 0, 0].tolist() == [0, 128, 128, 255]


@pytest.mark.parametrize("norm_target", [None, 5])
def test_predicted_pixels_have_the_mean_and_deviation_of_their_window(
    norm_target: int | None,
) -> None:
    model = SimMIM(build_encoder(SWIN), norm_target=norm_target).eval()
    image, mask = batch(SWIN)
    prediction = model.reconstruct(image, mask)
    if norm_target:
        mean, deviation = local_statistics(model.normalise(image), 5)
        prediction = prediction * deviation + mean
    torch.testing.assert_close(model.predicted_pixels(image, mask), prediction)


def test_completed_images_keep_visible_pixels_and_show_predictions_in_hidden_ones() -> None:
    model = SimMIM(build_encoder(SWIN), mean=[0.5] * 3, std=[0.25] * 3).eval()
    image, mask = batch(SWIN)
    pixels = model.pixel_mask(mask)
    wanted = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    assert torch.equal(pixels, wanted)
    shown = model.completed(image, mask)
    expected = (model.reconstruct(image, mask) * 0.25 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shown, torch.where(wanted, expected, image / 255))
    model.decoder[0].bias.data.fill_(100.0)
    assert model.completed(image, mask).max() == 1.0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_a_model_comes_back_after_an_error_too(training: bool) -> None:
    model = SimMIM(build_encoder(SWIN)).train(training)
    modes = []

    def fail() -> None:
        modes.append(model.training)
        raise KeyError

    with pytest.raises(KeyError), evaluation_mode(model):
        fail()
    assert modes == [False]
    assert model.training == training


def test_masks_of_the_wrong_height_or_width_are_refused() -> None:
    model = SimMIM(build_encoder(SWIN))  # 8 × 16 tokens
    for shape in ((1, 3, 16), (1, 8, 5), (8, 16)):
        with pytest.raises(ValueError, match="gh dividing 8 and gw dividing 16"):
            model.token_mask(torch.zeros(shape, dtype=torch.bool))
    assert model.token_mask(torch.eye(2)[None]).sum() == 64
