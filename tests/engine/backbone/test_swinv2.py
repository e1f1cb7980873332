"""SwinV2 beyond the published numbers, which test_golden.py compares."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.activation_memory import footprint, saved_bytes
from numerics import assert_no_worse, load_golden, relative_error, with_prefix
from simmim import SimMIM, load_model
from simmim.backbone.build import PRESETS, build_encoder, spec_from_dict, spec_to_dict
from simmim.backbone.layers import Backends
from simmim.backbone.swinv2 import CosineWindowAttention, SwinV2Spec, log_offsets
from simmim.command_line import load
from simmim.config.spec import resolve_spec
from simmim.model.classifier import Classifier
from simmim.training.optim import parameter_groups
from simmim_kernels.window_attention import reference

SPEC = SwinV2Spec(
    image_size=(48, 96), embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=6, mlp_ratio=2.0
)


def make(spec: SwinV2Spec = SPEC, seed: int = 0) -> SimMIM:
    torch.manual_seed(seed)
    model = SimMIM(build_encoder(spec))
    for parameter in model.parameters():
        # far from the start, at which every branch is nothing
        parameter.data += 0.3 * torch.randn(parameter.shape)
    model.encoder.layers[1].blocks[0].attn.logit_scale.data[1] = 5.0  # above the clamp
    return model


def draw(model: SimMIM, batch: int = 2) -> tuple[Tensor, Tensor]:
    spec = model.encoder.spec
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (batch, 3, *spec.image_size), generator=generator)
    mask = torch.rand(batch, *spec.grid, generator=generator) < 0.5
    return image.to(torch.uint8), mask


def test_presets_have_the_published_sizes() -> None:
    # in millions, as the paper's table counts them: with a head of a thousand classes
    for name, millions in (
        ("swinv2_tiny", 28), ("swinv2_small", 50), ("swinv2_base", 88), ("swinv2_large", 197),
        ("swinv2_huge", 658), ("swinv2_giant", 3002),
    ):  # fmt: skip
        with torch.device("meta"):
            model = Classifier(build_encoder(PRESETS[name]), [str(k) for k in range(1000)])
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert round(count) == millions, (name, count)


def test_activation_memory_is_that_of_the_tensors_a_block_keeps() -> None:
    """Two more blocks of 72 tokens, 16 channels, a hidden width of 32 and 2 heads."""
    longer = replace(SPEC, depths=(2, 4))
    short, long = footprint(SPEC), footprint(longer)
    # x, qkv, attended values and branch; x, hidden and branch; statistics of norms and softmax
    block = 72 * (2 * 16 * (1 + 3 + 1 + 1) + 2 * (16 + 32 + 16) + 4 * (4 + 2))
    assert long.saved_bytes - short.saved_bytes == 2 * block
    assert long.checkpointed_bytes - short.checkpointed_bytes == 2 * 72 * 16 * 2  # x alone
    assert short.checkpointed_bytes < short.saved_bytes
    encoder = build_encoder(SPEC).train()
    assert short.parameters == sum(p.numel() for p in encoder.parameters())
    # and of real tensors, but for the row numbers of the patch embedding
    real = saved_bytes(encoder, 2) - saved_bytes(encoder, 1)
    assert real == pytest.approx(short.saved_bytes, rel=0.005)


def test_offsets_are_in_the_units_of_the_window_that_was_trained_with() -> None:
    layers = build_encoder(replace(SPEC, pretrained_window_sizes=(12, 0))).layers
    for layer, trained in zip(layers, (12, 6), strict=True):
        attention = layer.blocks[0].attn
        assert torch.equal(attention.offsets, log_offsets(6, trained))
    assert not torch.equal(log_offsets(6, 12), log_offsets(6, 6))


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
    with pytest.raises(ValueError, match="pretrained_window_sizes: a window has at least 0"):
        build_encoder(replace(SPEC, pretrained_window_sizes=(-1, 6)))


def test_a_fresh_encoder_adds_nothing_to_its_tokens() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(SPEC)
    image = torch.randn(1, 3, 48, 96)
    first = encoder.layers[0].blocks[0]
    tokens = torch.randn(1, 12, 24, 8)
    assert torch.equal(first(tokens, encoder.backends, None), tokens)
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
    block = make().encoder.layers[0].blocks[1]
    attention = block.attn
    assert attention.shift == 3
    tokens = torch.randn(1, 12, 24, 8, generator=torch.Generator().manual_seed(2))
    outputs = []
    for value in (4.7, 10.0):  # log(100) is 4.605
        attention.logit_scale.data.fill_(value)
        attention.logit_scale.grad = None
        outputs.append(attention(tokens, block.norm1, None, None))
        outputs[-1].square().sum().backward()
        assert attention.logit_scale.grad is not None
        assert not attention.logit_scale.grad.any()
    assert torch.equal(*outputs)
    attention.logit_scale.data.fill_(4.5)
    attention(tokens, block.norm1, None, None).square().sum().backward()
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


def attend_as_published(
    attention: CosineWindowAttention,
    x: Tensor,
    norm: nn.Module,
    branch_scale: None,
    backend: str | None,
) -> Tensor:
    """The published attention: one step after another, on copies of the windows."""
    w, shift, heads = attention.window, attention.shift, attention.num_heads
    B, H, W, C = x.shape
    windows = x.roll((-shift, -shift), (1, 2)).view(B, H // w, w, W // w, w, C).transpose(2, 3)
    bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
    qkv = F.linear(windows.reshape(B, -1, w * w, C), attention.qkv.weight, bias)
    q, k, v = qkv.view(B, -1, w * w, 3, heads, C // heads).permute(3, 0, 1, 4, 2, 5)
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = cosines * attention.logit_scale.clamp(max=math.log(100)).exp()
    rows, columns = torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")
    place = torch.stack((rows, columns)).view(2, -1)
    offset = place[:, :, None] - place[:, None] + w - 1
    table = attention.cpb_mlp(attention.offsets)[offset[0] * (2 * w - 1) + offset[1]]
    scores = scores + 16 * torch.sigmoid(table).permute(2, 0, 1)
    if shift:
        scores = scores + reference.shift_mask((H, W), (w, w), (shift, shift)).unsqueeze(1)
    out = (scores.softmax(-1) @ v).transpose(2, 3).reshape(B, H // w, W // w, w, w, C)
    out = out.transpose(2, 3).reshape(B, H, W, C).roll((shift, shift), (1, 2))
    result: Tensor = x + norm(attention.proj(out))
    return result


def outcome(model: SimMIM, image: Tensor, mask: Tensor, amp: bool = False) -> dict[str, Tensor]:
    """The features, and the gradients of every parameter."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        features = model.encode(image, mask)
        loss = model(image, mask)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"features": features.detach(), **gradients}


def test_every_step_is_the_published_one_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().double()
    image, mask = draw(model)
    image = model.normalise(image).double()
    found = outcome(model, image, mask)
    monkeypatch.setattr(CosineWindowAttention, "forward", attend_as_published)
    expected = outcome(model, image, mask)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max()
        # float32 anywhere on the way would be off by 1e-7
        assert (found[name] - tensor).abs().max() <= 1e-11 * scale + 1e-14, name
    # the one head above the clamp
    assert expected["encoder.layers.1.blocks.0.attn.logit_scale"].flatten()[1] == 0


@pytest.mark.parametrize("backend", [None, "reference"])
def test_bf16_is_as_close_as_the_published_steps(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    image, mask = draw(model, 4)
    image = model.normalise(image)
    exact = outcome(copy.deepcopy(model).double(), image.double(), mask)
    model.use_backend(backend)
    found = outcome(model, image, mask, amp=True)
    monkeypatch.setattr(CosineWindowAttention, "forward", attend_as_published)
    plain = outcome(model, image, mask, amp=True)
    dead = "encoder.layers.1.blocks.0.attn.logit_scale"
    assert found[dead].flatten()[1] == 0
    # all gradients together: one tensor's error is luck
    found, plain, exact = (
        {
            "features": tensors.pop("features"),
            "gradients": torch.cat([tensors[name].flatten() for name in sorted(tensors)]),
        }
        for tensors in (found, plain, exact)
    )
    assert_no_worse(found, plain, exact, torch.bfloat16)
    assert relative_error(found["features"], exact["features"]) > 1e-4  # bf16 indeed


def test_autocast_leaves_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        out = original(q, k, v, attn_mask=attn_mask, **options)
        seen.append((q.dtype, k.dtype, attn_mask.dtype, out.dtype))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = make()
    model.use_backend("reference")  # plain PyTorch, which autocast would take to bfloat16
    outcome(model, *draw(model), amp=True)
    assert len(seen) == 8  # of four blocks, twice
    assert set(seen) == {(torch.float32,) * 4}


def test_whole_models_in_bf16() -> None:
    model = make().bfloat16()
    image, mask = draw(model)
    features = model.encode(model.normalise(image).bfloat16(), mask)
    assert features.dtype == torch.bfloat16
    assert features.isfinite().all()


@pytest.mark.parametrize("between", [-200.0, -math.inf])
def test_what_a_shift_brings_together_can_still_be_seen(
    between: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-100 does not hide what a cosine times 100 points at, and the published numbers show it."""
    entry, tensors = load_golden("simmim2-swinv2-plain-ape")
    model = load_model(with_prefix(tensors, "weights/"))
    model.use_backend("reference")
    expected, allowed = tensors["expect/z"], entry["tolerance"]["forward"]
    original = reference.shift_mask

    def error() -> float:
        with torch.no_grad():
            found = model.encode(tensors["input/image"], tensors["input/mask"])
        bound = allowed["atol"] + allowed["rtol"] * expected.abs()
        return float(((found - expected).abs() / bound).max())

    assert error() < 1

    def other(*arguments: object) -> Tensor:
        mask = original(*arguments)
        return torch.where(mask < 0, between, mask)

    monkeypatch.setattr(reference, "shift_mask", other)
    assert error() > 20


def test_dropped_branches_follow_the_generator() -> None:
    model = make(replace(SPEC, drop_path=0.5)).train()
    image, mask = draw(model)
    rates = [block.drop_path.rate for stage in model.encoder.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    torch.manual_seed(1)
    first = model(image, mask)
    assert model(image, mask) != first
    torch.manual_seed(1)
    assert model(image, mask) == first
    model.eval()
    assert model(image, mask) == model(image, mask)


def test_a_dropped_branch_is_nothing_and_a_kept_one_scaled() -> None:
    block = make(replace(SPEC, drop_path=0.5)).encoder.layers[1].blocks[1]
    tokens = torch.randn(64, 6, 12, 16)
    for parameter in block.norm2.parameters():
        parameter.data.zero_()  # one branch alone
    moved = block(tokens, Backends(), block.drop_path.train()(tokens)) - tokens
    whole = block(tokens, Backends(), None) - tokens
    dropped = moved.flatten(1).abs().amax(1) == 0
    assert 10 < dropped.sum() < 54
    torch.testing.assert_close(moved[~dropped], 2 * whole[~dropped], rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_breaks() -> None:
    model = make().eval()
    image, mask = draw(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, mask), model(image, mask))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(image, mask), model(image, mask))


def test_absolute_positions_and_mask_token_are_not_decayed() -> None:
    model = SimMIM(build_encoder(replace(SPEC, absolute_position=True)))
    decayed, exempt = (set(group["names"]) for group in parameter_groups(model, 0.05))
    assert {"encoder.absolute_pos_embed", "encoder.mask_token"} <= exempt
    assert "encoder.layers.0.blocks.0.attn.logit_scale" in decayed
