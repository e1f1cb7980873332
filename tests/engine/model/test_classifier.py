"""The classifier: where norms stand, what the head reads, and what its file says."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from simmim.backbone.build import build_encoder
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.model.classifier import Classifier, numbered_classes

SWIN = SwinSpec(image_size=(32, 32), embed_dim=8, depths=(1, 1), num_heads=(2, 4), window_size=4)
VIT = ViTSpec((32, 32), patch_size=8, embed_dim=16, depth=1, num_heads=2, norm_eps=1e-3)
CONVNEXT = ConvNeXtSpec(image_size=(32, 32), depths=(1, 1, 1, 1), widths=(4, 4, 4, 4))
RESNET = ResNetSpec(image_size=(32, 32), depths=(1, 1, 1, 1), bottleneck=False, width=4)
CLASSES = ("ape", "bee", "cat")


def test_classes_margin_and_statistics_arrive() -> None:
    model = Classifier(build_encoder(SWIN), CLASSES, mean=(0.1,) * 3, std=(0.2,) * 3, margin=0.9)
    assert model.settings == {"classes": CLASSES, "margin": 0.9}
    assert model.head.weight.shape == (3, 16)
    assert model.mean.tolist() == pytest.approx([0.1] * 3)
    assert model.std.tolist() == pytest.approx([0.2] * 3)
    assert model.encoder.mask_token is None
    assert "encoder.mask_token" not in model.state_dict()


def test_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one class"):
        Classifier(build_encoder(SWIN), ())


def test_classes_without_names_are_numbered_from_zero() -> None:
    assert numbered_classes(3) == ("0", "1", "2")


@pytest.mark.parametrize(
    ("spec", "eps"),
    [
        (SWIN, None),
        (VIT, None),
        (replace(VIT, final_norm=False), 1e-3),
        (CONVNEXT, 1e-6),
        (RESNET, None),
    ],
    ids=["swin", "vit with a norm", "vit", "convnext", "resnet"],
)
def test_the_mean_is_normed_where_it_was_published(spec: SwinSpec, eps: float | None) -> None:
    norm = Classifier(build_encoder(spec), CLASSES).fc_norm
    if eps is None:
        assert isinstance(norm, nn.Identity)
        return
    assert isinstance(norm, nn.LayerNorm)
    assert norm.eps == eps


@pytest.mark.parametrize("spec", [SWIN, replace(VIT, final_norm=False)], ids=["swin", "vit"])
def test_the_head_reads_the_normed_mean_of_the_cells(spec: SwinSpec) -> None:
    model = Classifier(build_encoder(spec), CLASSES).eval()
    model.head.bias.data = torch.tensor([1.0, 2.0, 3.0])
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = model.fc_norm(model.encode(image).mean((2, 3)))
        torch.testing.assert_close(model.pool(image), pooled)
        expected = pooled @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(image), expected)


def test_the_head_of_a_vit_starts_with_almost_equal_logits() -> None:
    torch.manual_seed(0)
    swin, vit = (Classifier(build_encoder(spec), CLASSES).head for spec in (SWIN, VIT))
    assert 0 < vit.weight.abs().max() <= 0.02 * 0.001 * (1 + 1e-6)
    assert 0.01 < swin.weight.std() < 0.03
    assert not vit.bias.any()
    assert not swin.bias.any()
