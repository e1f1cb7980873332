"""SwinV2: the published numbers are in test_golden.py; here is what they do not touch."""

from dataclasses import replace

import pytest
import torch

from simmim import SimMIM
from simmim.backbone.build import PRESETS, build_encoder, spec_from_dict, spec_to_dict
from simmim.backbone.swinv2 import SwinV2Spec, log_offsets
from simmim.command_line import load
from simmim.config import resolve_spec
from simmim.method.classifier import Classifier
from simmim.optim import parameter_groups

SPEC = SwinV2Spec(
    image_size=(48, 96), embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=6, mlp_ratio=2.0
)


def make(spec: SwinV2Spec = SPEC, seed: int = 0) -> SimMIM:
    torch.manual_seed(seed)
    model = SimMIM(build_encoder(spec))
    for parameter in model.parameters():
        # far from the start, at which every branch is nothing
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return model


def draw(model: SimMIM, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    spec = model.encoder.spec
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (batch, 3, *spec.image_size), generator=generator)
    mask = torch.rand(batch, *spec.grid, generator=generator) < 0.5
    return image.to(torch.uint8), mask


def test_presets_have_the_published_sizes() -> None:
    # in millions, as the paper's table counts them: with a head of a thousand classes
    for name, millions in (
        ("swinv2_tiny", 28), ("swinv2_small", 50), ("swinv2_base", 88), ("swinv2_large", 197),
        ("swinv2_huge", 658),
    ):  # fmt: skip
        with torch.device("meta"):
            model = Classifier(build_encoder(PRESETS[name]), [str(k) for k in range(1000)])
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert round(count) == millions, (name, count)


def test_specs_are_stored_and_configured() -> None:
    assert spec_from_dict(spec_to_dict(SPEC)) == SPEC
    config = load(["smoke", "--data.path=x", "--model.name=swinv2_tiny"])
    spec = resolve_spec(config)
    assert isinstance(spec, SwinV2Spec)
    assert spec.depths == (1, 2)
    with pytest.raises(ValueError, match="qk_scale"):
        build_encoder(replace(SPEC, qk_scale=0.1))
    with pytest.raises(ValueError, match="3 values for 2 stages"):
        build_encoder(replace(SPEC, pretrained_window_sizes=(1, 2, 3)))


def test_a_fresh_encoder_adds_nothing_to_its_tokens() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(SPEC)
    image = torch.randn(1, 3, 48, 96)
    first = encoder.layers[0].blocks[0]
    tokens = torch.randn(1, 12, 24, 8)
    assert torch.equal(first(tokens, encoder.backends), tokens)
    assert encoder(image).shape == (1, 16, 6, 12)


def test_bytes_are_normalised_floats_and_backends_agree() -> None:
    model = make().eval()
    image, mask = draw(model)
    with torch.no_grad():
        expected = model.encode(model.normalise(image), mask)
        model.use_backend("reference")
        assert torch.allclose(model.encode(image, mask), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model.encode(image), expected, rtol=1e-2)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = make(replace(SPEC, drop_path=0.3)).train()
        model.encoder.activation_checkpointing = recompute
        torch.manual_seed(5)
        model(*draw(model)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients):
        assert torch.equal(one, two)


def test_nothing_is_learned_beyond_the_clamp() -> None:
    attention = make().encoder.layers[0].blocks[1].attn
    assert attention.shift == 3
    tokens = torch.randn(1, 12, 24, 8, generator=torch.Generator().manual_seed(2))
    outputs = []
    for value in (4.7, 10.0):  # log(100) is 4.605
        attention.logit_scale.data.fill_(value)
        attention.logit_scale.grad = None
        outputs.append(attention(tokens, None))
        outputs[-1].square().sum().backward()
        assert attention.logit_scale.grad is not None
        assert not attention.logit_scale.grad.any()
    assert torch.equal(*outputs)
    attention.logit_scale.data.fill_(4.5)
    attention(tokens, None).square().sum().backward()
    assert attention.logit_scale.grad.any()


def test_offsets_of_another_window_lie_on_the_scale_of_the_first() -> None:
    own = log_offsets(12)
    assert own.abs().max() == pytest.approx(torch.log2(torch.tensor(9.0)).item() / 3)
    larger = log_offsets(24, 12)
    assert larger.shape == (47 * 47, 2)
    # the offsets that both have are the same inputs
    inner = larger.view(47, 47, 2)[12:35, 12:35]
    assert torch.allclose(inner, own.view(23, 23, 2))
    assert log_offsets(1).tolist() == [[0.0, 0.0]]


def test_bf16_is_as_close_as_pytorchs() -> None:
    model = make().eval()
    image, mask = draw(model)
    with torch.no_grad():
        exact = model.encode(image, mask)
        errors = []
        for backend in (None, "reference"):
            model.use_backend(backend)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                errors.append((model.encode(image, mask).float() - exact).abs().mean())
    assert errors[0] <= 2 * errors[1]


def test_pretraining_decays_what_the_published_one_decays() -> None:
    groups = parameter_groups(make(), 0.05)
    decayed = set(groups[0]["names"])  # type: ignore[call-overload]
    assert any(name.endswith("cpb_mlp.2.weight") for name in decayed)
    assert any(name.endswith("logit_scale") for name in decayed)
    assert "encoder.mask_token" not in decayed
    assert not any(name.endswith(("q_bias", "cpb_mlp.0.bias")) for name in decayed)
