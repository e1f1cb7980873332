"""Token-wise SimMIM: lightly's numbers, losses and targets by definition, counts of tokens."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from numerics import GOLDEN, assert_close_to, with_prefix
from simmim import command_line
from simmim.backbone.swin import Swin, SwinSpec
from simmim.backbone.vit import ViT, ViTSpec, sine_cosine_positions
from simmim.data.batch import Batch
from simmim.errors import ConfigError
from simmim.method import tokens
from simmim.method.build import find_method
from simmim.method.tokens import TokenMethod, TokenSimMIM, num_hidden_tokens
from simmim.model.masking import sample_mask
from simmim.model.weights_file import save_weights
from simmim.pretrain import build_model
from simmim.weights.load import load_model
from simmim_kernels import native

FIXTURES: dict[str, dict[str, Any]] = {
    f["name"]: f for f in json.loads((GOLDEN / "lightly-index.json").read_text())["fixtures"]
}
PLAIN = ViTSpec(
    image_size=(32, 48),
    patch_size=8,
    embed_dim=16,
    depth=2,
    num_heads=2,
    absolute_position=True,
    shared_relative_position=False,
    layer_scale=None,
)
GRID = PLAIN.grid

TORCHVISION = (
    (r"^class_token", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)


def ours(theirs: dict[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """Parameters of lightly's model (or gradients) under our names and in our order of pixels."""
    found = {}
    for name, tensor in theirs.items():
        if name.startswith("backbone.vit.heads."):
            continue  # torchvision's classifier, without a part in this
        if name.startswith("decoder."):
            values = tensor.unflatten(0, (patch_size, patch_size, 3)).movedim(2, 0).flatten(0, 2)
            values = values[..., None, None] if name.endswith("weight") else values
            found[name.replace("decoder.", "decoder.0.")] = values
            continue
        short = re.sub(r"^backbone\.(vit\.)?", "", name)
        for pattern, replacement in TORCHVISION:
            short = re.sub(pattern, replacement, short)
        if short.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)  # a key bias cancels in the softmax
            found["encoder." + short.replace("qkv.bias", "q_bias")] = q
            found["encoder." + short.replace("qkv.bias", "v_bias")] = v
            continue
        found["encoder." + short] = tensor
    return found


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor], TokenSimMIM, Tensor]:
    entry = FIXTURES[name]
    tensors, config = load_file(GOLDEN / entry["file"]), entry["config"]
    spec = replace(
        PLAIN,
        image_size=(config["img_size"],) * 2,
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        norm_eps=config["norm_eps"],
        frozen_position=True,
    )
    model = TokenSimMIM(ViT(spec))
    model.load_state_dict(ours(with_prefix(tensors, "weights/"), spec.patch_size))
    mask = torch.zeros(len(tensors["input/image"]), 1 + math.prod(spec.grid), dtype=torch.bool)
    mask.scatter_(1, tensors["input/idx_mask"], True)
    assert not mask[:, 0].any()  # the class token is never hidden
    return entry, tensors, model, mask[:, 1:].unflatten(1, spec.grid)


def theirs(prediction: Tensor, patch_size: int) -> Tensor:
    """[B, K, P] in our order of pixels → in lightly's: (row, column, colour)."""
    return prediction.unflatten(2, (3, patch_size, patch_size)).movedim(2, 4).flatten(2)


@pytest.mark.parametrize("name", FIXTURES)
def test_golden_forward(name: str, backend: str) -> None:
    entry, tensors, model, mask = load(name)
    model.use_backend(backend)
    image, index = tensors["input/image"], tensors["input/idx_mask"]
    tolerance = entry["tolerance"]
    assert index.shape[1] == entry["masked_tokens_per_image"]
    assert index.shape[1] == num_hidden_tokens(mask[0].numel(), entry["mask_ratio"], "up")
    with torch.no_grad():
        features = model.encode(image, mask)
        encoded = tensors["expect/encoded"][:, 1:].transpose(1, 2)
        assert_close_to(features.flatten(2), encoded, tolerance["forward"], "features")
        assert_close_to(model(image, mask), tensors["expect/loss"], tolerance["loss"], "loss")
        places = index - 1
        expected = tensors["expect/prediction"]
        found = theirs(model._predict(features, places), entry["patch_size"])
        found = found[:, : expected.shape[1]]
        assert_close_to(found, expected, tolerance["forward"], "prediction")
        if "expect/target" in tensors:
            pixels = theirs(model._pixels(image, places), entry["patch_size"])
            assert_close_to(pixels, tensors["expect/target"], tolerance["forward"], "target")


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("name", FIXTURES)
def test_golden_gradients(name: str, recompute: bool, backend: str) -> None:
    entry, tensors, model, mask = load(name)
    model.use_backend(backend)
    model.train()
    model.encoder.activation_checkpointing = recompute
    model(tensors["input/image"], mask).backward()
    expected = ours(with_prefix(tensors, "grad/"), entry["patch_size"])
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert "encoder.pos_embed" not in gradients
    assert len(expected) > 20
    if "cut" not in entry:
        assert gradients.keys() == expected.keys()
    for key, wanted in expected.items():
        error = (gradients[key] - wanted).abs().max()
        allowed = entry["tolerance"]["grad"]["of_tensor_max"] * wanted.abs().max()
        assert error <= allowed + entry["tolerance"]["grad"]["atol"], (key, float(error))


@pytest.fixture
def image() -> Tensor:
    return torch.randint(0, 256, (3, 3, *PLAIN.image_size), dtype=torch.uint8)


def hide(count: int, images: int = 3) -> Tensor:
    """`count` of 24 tokens of every image."""
    ids, zeros = torch.arange(images), torch.zeros(images, dtype=torch.int64)
    ratio = (count - 0.5) / math.prod(GRID)
    return sample_mask(ids, zeros, GRID, patch_size=8, mask_unit=8, ratio=ratio, seed=5)


def patches_of(image: Tensor, mask: Tensor) -> Tensor:
    """Hidden patches one by one, in the order of `mask.nonzero()`, [·, C·p·p]."""
    found = [
        image[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
        for b, row, column in mask.nonzero().tolist()
    ]
    return torch.stack(found)


def by_definition(model: TokenSimMIM, image: Tensor, mask: Tensor) -> Tensor:
    """The loss, patch by patch."""
    pixels = model.normalise(image)
    target = patches_of(pixels, mask)
    if model.target == "normalised":
        mean, variance = target.mean(1, keepdim=True), target.var(1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    tokens = model.encode(image, mask).permute(0, 2, 3, 1)[mask]
    if model.head == "mlp":
        prediction = model.decoder(tokens)
    else:
        prediction = model.decoder[0](tokens[..., None, None]).flatten(1)
    error = prediction - target
    return error.abs().mean() if model.loss == "l1" else error.square().mean()


HEADS = {
    "linear": {},
    "mlp": {"head": "mlp", "mlp_hidden": 20, "mlp_depth": 2},
    "mlp-as-wide": {"head": "mlp"},
}


@pytest.mark.parametrize("class_token", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize("target", ["pixels", "normalised"])
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("head", HEADS)
def test_loss_is_the_mean_over_hidden_patches(
    head: str, loss: Any, target: Any, class_token: bool, image: Tensor
) -> None:
    spec = replace(PLAIN, class_token=class_token)
    model = TokenSimMIM(ViT(spec), loss=loss, target=target, **HEADS[head])
    mask = hide(7)
    found = model(image, mask, 7)
    found.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = by_definition(model, image, mask)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert gradients.keys() == dict(model.named_parameters()).keys()  # DDP waits for all of them
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert (class_token is True) == ("encoder.cls_token" in gradients)


@pytest.mark.parametrize("target", ["pixels", "normalised"])
@pytest.mark.parametrize("head", HEADS)
def test_bytes_are_what_floats_are(head: str, target: Any, image: Tensor) -> None:
    model = TokenSimMIM(ViT(PLAIN), target=target, **HEADS[head])
    mask = hide(9)
    with torch.no_grad():
        torch.testing.assert_close(model(image, mask), model(model.normalise(image), mask))


class Spoiled(ViT):
    """Features of visible tokens are NaN."""

    def forward(self, image: Tensor, mask: Tensor | None = None, **rest: Any) -> Tensor:
        features = super().forward(image, mask, **rest)
        assert mask is not None
        return torch.where(mask.unsqueeze(1), features, torch.nan)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("head", HEADS)
def test_the_head_sees_hidden_tokens_only(head: str, loss: Any, image: Tensor) -> None:
    if (head, loss) == ("linear", "l1") and native.extension is None:
        pytest.skip("the op's reference projects every token")
    clean = TokenSimMIM(ViT(PLAIN), loss=loss, **HEADS[head])
    spoiled = TokenSimMIM(Spoiled(PLAIN), loss=loss, **HEADS[head])
    spoiled.load_state_dict(clean.state_dict())
    mask = hide(11)
    losses = []
    for model in (clean, spoiled):
        losses.append(model(image, mask, 11))
        losses[-1].backward()
    assert losses[0] == losses[1]
    for mine, other in zip(clean.decoder.parameters(), spoiled.decoder.parameters()):
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("head", HEADS)
def test_head_is_applied_to_hidden_tokens(head: str, image: Tensor) -> None:
    model = TokenSimMIM(ViT(PLAIN), loss="l2", **HEADS[head])
    seen: list[int] = []
    predict = model._predict

    def counted(features: Tensor, places: Tensor) -> Tensor:
        seen.append(places.numel())
        return predict(features, places)

    model._predict = counted  # type: ignore[method-assign]
    model(image, hide(4), 4)
    assert seen == [12]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_an_empty_mask_has_no_loss_and_no_gradient(head: str, loss: Any, image: Tensor) -> None:
    model = TokenSimMIM(ViT(PLAIN), loss=loss, **HEADS[head])
    nothing = torch.zeros(3, *GRID, dtype=torch.bool)
    for num_hidden in (None, 5):
        loss_value = model(image, nothing, num_hidden)
        loss_value.backward()
        assert loss_value == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_empty_slots_weigh_nothing(head: str, image: Tensor) -> None:
    model = TokenSimMIM(ViT(PLAIN), loss="l2", **HEADS[head])
    mask = hide(6)
    with torch.no_grad():
        alone = model(image[:2], mask[:2], 6)
        mask[2] = False
        torch.testing.assert_close(model(image, mask, 6), alone)


@pytest.mark.parametrize("target", ["pixels", "normalised"])
@pytest.mark.parametrize("head", HEADS)
def test_reconstruction(head: str, target: Any, image: Tensor) -> None:
    """Visible patches are the image; hidden ones the prediction, in pixels whatever the target."""
    model = TokenSimMIM(ViT(PLAIN), target=target, **HEADS[head])
    mask = hide(8)
    mask[1, 0, 0] ^= True  # images may hide different numbers of tokens
    pixels = model.normalise(image)
    for given in (image, image.contiguous(memory_format=torch.channels_last), pixels):
        with torch.no_grad():
            found = model.reconstruct(given, mask)
            tokens = model.encode(image, mask).permute(0, 2, 3, 1)[mask]
            flat = tokens if head != "linear" else tokens[..., None, None]
            layers = model.decoder if head != "linear" else model.decoder[0]
            expected = layers(flat).flatten(1)
        if target == "normalised":
            original = patches_of(pixels, mask)
            deviation = (original.var(1, keepdim=True) + 1e-6).sqrt()
            expected = expected * deviation + original.mean(1, keepdim=True)
        hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
        kept = torch.where(hidden, pixels, found)
        torch.testing.assert_close(kept, pixels, rtol=0, atol=1e-6)
        torch.testing.assert_close(patches_of(found, mask), expected, rtol=1e-4, atol=1e-5)


def test_a_coarser_mask_hides_whole_units(image: Tensor) -> None:
    model = TokenSimMIM(ViT(PLAIN))
    coarse = torch.tensor([[[True, False, True], [False, True, False]]]).expand(3, -1, -1)
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.no_grad():
        assert torch.equal(model(image, coarse), model(image, fine))
    with pytest.raises(ValueError, match="gh dividing 4"):
        model(image, torch.zeros(3, 3, 6, dtype=torch.bool))


@pytest.mark.parametrize("num_tokens", [1, 9, 36, 49, 144, 196, 197, 256])
def test_counts_of_hidden_tokens(num_tokens: int) -> None:
    """Both published counts, and that the house's sampling hides exactly as many."""
    side = math.isqrt(num_tokens)
    grid = (side, side) if side**2 == num_tokens else (1, num_tokens)
    ids, epochs = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    for percent in range(101):
        ratio = percent / 100
        kept = max(1, int(num_tokens * (1 - ratio)) + 1)  # lightly's, the class token included
        up = num_hidden_tokens(num_tokens, ratio, "up")
        assert up == num_tokens + 1 - kept
        down = num_hidden_tokens(num_tokens, ratio, "down")
        assert down == int(num_tokens * ratio)
        assert 0 <= down <= up <= num_tokens
        for count in {up, down} - {0}:
            share = (count - 0.5) / num_tokens
            mask = sample_mask(ids, epochs, grid, patch_size=8, mask_unit=8, ratio=share, seed=1)
            assert (mask.flatten(1).sum(1) == count).all()


def test_counts_differ_where_they_differ() -> None:
    assert num_hidden_tokens(49, 0.75, "up") == 37  # lightly: ViT-B/32 at 224 px
    assert num_hidden_tokens(49, 0.75, "down") == 36
    assert num_hidden_tokens(196, 0.6, "up") == 118
    assert num_hidden_tokens(196, 0.6, "down") == 117
    assert num_hidden_tokens(144, 0.5, "down") == 72  # ViT-SSL: STL-10 at 96 px
    assert num_hidden_tokens(10, 0.9, "up") == 10  # 10 · (1 - 0.9) is a hair below 1


def test_positions_of_sines_and_cosines() -> None:
    table = sine_cosine_positions((2, 3), 8, 1)
    assert table.shape == (1, 7, 8)
    assert not table[0, 0].any()
    row, column = 1, 2
    rates = [1.0, 1 / 100]
    expected = [
        f(place * rate) for place in (column, row) for f in (math.sin, math.cos) for rate in rates
    ]
    torch.testing.assert_close(table[0, 1 + 3 * row + column], torch.tensor(expected))


def test_frozen_positions_do_not_train(image: Tensor) -> None:
    model = TokenSimMIM(ViT(replace(PLAIN, frozen_position=True)))
    table = sine_cosine_positions(GRID, 16, 1)
    assert torch.equal(model.encoder.pos_embed, table)
    model(image, hide(5)).backward()
    assert model.encoder.pos_embed.grad is None
    assert not model.encoder.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_token": False, "shared_relative_position": True}, "rows for a class token"),
        ({"class_token": False, "layer_relative_position": True}, "rows for a class token"),
        ({"frozen_position": True, "absolute_position": False}, "no absolute position"),
        ({"frozen_position": True, "embed_dim": 6}, "width of 4·n"),
    ],
)
def test_specs_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViT(replace(PLAIN, **changes))


def test_heads_that_cannot_be() -> None:
    swin = SwinSpec(
        image_size=(64, 64), embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4
    )
    with pytest.raises(ValueError, match="one resolution"):
        TokenSimMIM(Swin(swin))
    for wrong in ({"mlp_depth": 0}, {"mlp_depth": 10**9}, {"mlp_hidden": -1}):
        with pytest.raises(ValueError, match="mlp_depth"):
            TokenSimMIM(ViT(PLAIN), head="mlp", **wrong)
    for name in ("head", "loss", "target"):
        with pytest.raises(ValueError, match=f"{name}=other is none of"):
            TokenSimMIM(ViT(PLAIN), **{name: "other"})


FLAGS = ["tokens_smoke", "--data.path=x"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.name=swin_tiny"], "needs one resolution: a ViT"),
        (["--mask.ratio=0"], "mask.ratio=0"),
        (["--mask.ratio=0.01", "--method.rounding=down"], "hides none of 64 tokens"),
        (["--method.mlp_depth=0"], "method.mlp_depth=0 must be between 1 and 16"),
        (["--model.norm_target=47"], "method.target=normalised"),
        (["--method.head=conv"], "method.head"),
    ],
)
def test_runs_that_cannot_be(flags: list[str], message: str) -> None:
    swin = ["--model.depths=[1,1]", "--model.num_heads=[2,2]", "--model.window_size=4"]
    more = swin if "--model.name=swin_tiny" in flags else []
    with pytest.raises(ConfigError, match=message):
        command_line.load([*FLAGS, *flags, *more])


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.6, 0.75, 0.9, 1.0])
def test_masks_of_a_run(ratio: float, rounding: Any) -> None:
    """Single tokens, whatever the unit; of a sample and an epoch, wherever it is drawn."""
    flags = [f"--mask.ratio={ratio}", f"--method.rounding={rounding}"]
    method = find_method(command_line.load([*FLAGS, *flags]))
    config = method.config
    other = TokenMethod(replace(config, mask=replace(config.mask, unit=48)))
    assert isinstance(method, TokenMethod)
    ids, epochs = torch.tensor([5, 3, -1, 5]), torch.tensor([0, 0, 0, 1])
    mask = method.draw_mask(ids, epochs)
    assert mask.shape == (4, 8, 8)
    count = num_hidden_tokens(64, ratio, rounding)
    assert mask.flatten(1).sum(1).tolist() == [count, count, 0, count]
    assert torch.equal(other.draw_mask(ids, epochs), mask)
    assert torch.equal(method.draw_mask(ids[1:2], epochs[1:2]), mask[1:2])
    if 0.1 < ratio < 1:
        assert not torch.equal(mask[0], mask[3])


@pytest.mark.parametrize("flags", [[], ["--method.head=mlp", "--method.loss=l2"]])
def test_loss_of_a_run(flags: list[str]) -> None:
    """Bytes as they travel → the mean over the images that are there."""
    method = find_method(command_line.load([*FLAGS, *flags, "--method.target=normalised"]))
    assert isinstance(method, TokenMethod)
    model = build_model(method.config, torch.device("cpu"))
    assert isinstance(model, TokenSimMIM)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    ids, epochs = torch.tensor([7, 9, -1]), torch.tensor([2, 2, 2])
    found = method.loss(model, Batch(pixels, ids, epochs, 2))
    mask = method.draw_mask(ids[:2], epochs[:2])
    expected = model(model.normalise(pixels[:2].permute(0, 3, 1, 2)), mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("head", HEADS)
def test_weights_files_tell_all(head: str, image: Tensor, tmp_path: Path) -> None:
    model = TokenSimMIM(ViT(replace(PLAIN, class_token=False)), target="normalised", **HEADS[head])
    save_weights(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    assert isinstance(again, TokenSimMIM)
    assert again.settings == model.settings
    mask = hide(5)
    with torch.no_grad():
        assert torch.equal(again.reconstruct(image, mask), model.eval().reconstruct(image, mask))


def test_every_configured_value_arrives_in_the_model() -> None:
    flags = ["--method.head=mlp", "--method.mlp_hidden=24", "--method.mlp_depth=2"]
    flags += ["--method.loss=l2", "--method.target=normalised"]
    flags += ["--data.mean=[0.1,0.2,0.3]", "--data.std=[0.4,0.5,0.6]"]
    model = find_method(command_line.load([*FLAGS, *flags])).build(ViT(PLAIN))
    given = {"head": "mlp", "mlp_hidden": 24, "mlp_depth": 2}
    assert model.settings == given | {"loss": "l2", "target": "normalised"}
    assert model.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.tolist() == pytest.approx([0.4, 0.5, 0.6])
    widths = [layer.out_features for layer in model.decoder if isinstance(layer, nn.Linear)]
    assert widths[:-1] == [24, 24]
    assert model.trained_mask({"unit": 48, "ratio": 0.5}) == {"unit": 8, "ratio": 0.5}


def test_every_configured_value_reaches_the_drawing_of_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(tokens, "sample_mask", lambda *given, **options: seen.update(options))
    flags = ["--mask.ratio=0.5", "--seed=11", "--kernels.backend=reference"]
    find_method(command_line.load([*FLAGS, *flags])).draw_mask(torch.arange(2), torch.arange(2))
    assert seen == {
        "patch_size": 8,
        "mask_unit": 8,
        "ratio": 31.5 / 64,
        "seed": 11,
        "backend": "reference",
    }


def test_the_fused_loss_has_the_chosen_backend(
    image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def noted(*given: Any, backend: str | None, **options: Any) -> Tensor:
        seen.append(backend)
        return torch.zeros(())

    monkeypatch.setattr(tokens, "linear_masked_l1_loss", noted)
    model = TokenSimMIM(ViT(PLAIN))
    model.use_backend("reference", "native")
    model(image, hide(5))
    assert seen == ["reference"]
    assert model.encoder.backends == ("reference", "native")
