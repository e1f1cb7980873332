"""ConvNets as encoders: where the token goes in, batch norms, memory formats, other libraries."""

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simmim import SimMIM, load_model
from simmim.backbone import timm_backbone
from simmim.backbone.build import find_preset, spec_from_dict, spec_to_dict
from simmim.backbone.convnet import ConvNet, ConvNetSpec, still_statistics
from simmim.backbone.convnext import PRESETS as CONVNEXTS
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.resnet import PRESETS as RESNETS
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.timm_backbone import TimmSpec
from simmim.distributed import World
from simmim.downstream.features import feature_shapes, layer_features
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel
from simmim.model.weights_file import save_weights
from simmim.training.optim import finetune_groups, parameter_groups
from simmim.training.running_statistics import keep, settle
from simmim.training.sync_batch_norm import CpuSyncBatchNorm, convert
from simmim.weights.export import to_layout, write
from simmim.weights.load import Weights, load_encoder, read_model
from simmim.weights.proof import prove

RESNET = ResNetSpec(
    image_size=(64, 96), depths=(1, 2, 1, 1), bottleneck=False, width=8, zero_init_residual=False
)
BOTTLENECK = replace(RESNET, bottleneck=True)
CONVNEXT = ConvNeXtSpec(
    image_size=(64, 96), depths=(1, 2, 1, 1), widths=(8, 16, 24, 32), layer_scale=0.5
)
SPECS: dict[str, ConvNetSpec] = {"resnet": RESNET, "bottleneck": BOTTLENECK, "convnext": CONVNEXT}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
RESNETS_ONLY = pytest.mark.parametrize("spec", [RESNET, BOTTLENECK], ids=["resnet", "bottleneck"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return import_module(name)
        except Exception as error:
            pytest.skip(f"{name} is not here: {error}")


def make(spec: ConvNetSpec, seed: int = 0) -> SimMIM:
    torch.manual_seed(seed)
    model = SimMIM(spec.build())
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    for norm in batch_norms(model):
        norm.running_mean.normal_(std=0.2)
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(7)
    return model


def batch_norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def draw(spec: ConvNetSpec, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, *spec.image_size, spec.channels)
    image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mask = torch.rand(batch, *spec.grid, generator=generator) < 0.5
    return image.permute(0, 3, 1, 2).contiguous(), mask


def outcome(model: SimMIM, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers after one training step's passes."""
    model.zero_grad()
    loss = model.train()(image, mask)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    buffers = {f"{name} after": b.clone() for name, b in model.named_buffers()}
    return {"loss": loss.detach(), **gradients, **buffers}


@pytest.mark.parametrize(
    ("name", "count"),
    # without a class head; torchvision's pages count one of 1000 classes with them
    [
        ("resnet18", 11_689_512 - 513_000),
        ("resnet34", 21_797_672 - 513_000),
        ("resnet50", 23_508_032),
        ("resnet101", 44_549_160 - 2_049_000),
        ("resnet152", 60_192_808 - 2_049_000),
        ("convnext_tiny", 28_589_128 - 769_000 - 2 * 768),
        ("convnext_small", 50_223_688 - 769_000 - 2 * 768),
        ("convnext_base", 88_591_464 - 1_025_000 - 2 * 1024),
        ("convnext_large", 197_767_336 - 1_537_000 - 2 * 1536),
    ],
)
def test_presets_have_the_published_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        encoder = find_preset(name).build()
    assert encoder.mask_token is not None
    assert sum(p.numel() for p in encoder.parameters()) - encoder.mask_token.numel() == count
    assert spec_from_dict(spec_to_dict(encoder.spec)) == encoder.spec


def test_resnet50_hides_64_channels_of_56_by_56_cells() -> None:
    spec = RESNETS["resnet50"]
    assert (spec.grid, spec.patch_size, spec.stride) == ((56, 56), 4, 32)
    with torch.device("meta"):
        model = SimMIM(spec.build())
        stem = model.encoder.embed(torch.empty(2, 3, 224, 224))
        assert stem.shape == (2, 64, 56, 56)
        assert (
            model.encoder.hide(stem, torch.empty(2, 56, 56, dtype=torch.bool)).shape == stem.shape
        )
        assert model.encoder.body(stem).shape == (2, 2048, 7, 7)
    assert model.encoder.mask_token.shape == (1, 64, 1, 1)
    assert model.decoder[0].weight.shape == (3 * 32 * 32, 2048, 1, 1)


@EVERY
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_hidden_cells_are_the_token_and_visible_ones_the_stems(
    spec: ConvNetSpec, layout: str
) -> None:
    model = make(spec)
    image, mask = draw(spec)
    if layout == "channels-last":
        image = image.contiguous(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    body = model.encoder.body
    model.encoder.body = lambda x: seen.append(x) or body(x)
    stem = model.encoder.embed(model.normalise(image))
    model.encode(image, mask)
    token = model.encoder.mask_token.flatten()
    cells, stem = seen[0].permute(0, 2, 3, 1), stem.permute(0, 2, 3, 1)
    assert torch.equal(cells[mask], token.expand(int(mask.sum()), -1))
    assert torch.equal(cells[~mask], stem[~mask])
    assert 0 < mask.sum() < mask.numel()


@EVERY
def test_loss_gradients_and_bytes(spec: ConvNetSpec) -> None:
    model = make(spec)
    image, mask = draw(spec)
    loss = model(image, mask)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.encoder.mask_token.grad.abs().sum() > 0
    torch.testing.assert_close(model(model.normalise(image), mask), loss, rtol=1e-6, atol=0)
    assert model.encode(image, mask).shape == (2, model.encoder.num_features, 2, 3)
    assert model.reconstruct(image, mask).shape == image.shape


def test_hidden_pixels_reach_nothing_where_windows_of_the_stem_do_not_overlap() -> None:
    model = make(CONVNEXT).eval()
    image, mask = draw(CONVNEXT)
    changed = image.clone()
    changed.permute(0, 2, 3, 1)[mask.repeat_interleave(4, 1).repeat_interleave(4, 2)] = 0
    assert not torch.equal(changed, image)
    assert torch.equal(model.encode(changed, mask), model.encode(image, mask))
    # a ResNet's do, as documented
    resnet = make(RESNET).eval()
    assert not torch.equal(resnet.encode(changed, mask), resnet.encode(image, mask))


@EVERY
def test_masks_that_do_not_fit_are_refused(spec: ConvNetSpec) -> None:
    encoder = make(spec).encoder
    image = torch.randn(2, 3, 64, 96)
    with pytest.raises(ValueError, match=r"mask \(2, 8, 12\) must be"):
        encoder(image, torch.zeros(2, 8, 12, dtype=torch.bool))
    encoder.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        encoder(image, torch.zeros(2, 16, 24, dtype=torch.bool))
    assert encoder(image).shape[2:] == (2, 3)


@EVERY
def test_odd_sizes_are_refused_in_a_line(spec: ConvNetSpec) -> None:
    message = "image_size: 65×96 px is no multiple of the encoder stride 32 px; nearest is 64×96"
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(spec, image_size=(65, 96)).build()
    with pytest.raises(ValueError, match=r"depths: .* four"):
        replace(spec, depths=(1, 1)).build()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="expected images"):
        make(spec).encode(torch.zeros(1, 3, 96, 64, dtype=torch.uint8))


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.float().abs().max()
        assert (found[name] - tensor).float().abs().max() <= tolerance * scale + 1e-6, name


@EVERY
def test_channels_last_equals_contiguous(spec: ConvNetSpec) -> None:
    image, mask = draw(spec)
    expected = outcome(make(spec).double(), make(spec).normalise(image).double(), mask)
    contiguous = outcome(make(spec), image, mask)
    last = make(spec).to(memory_format=torch.channels_last)
    maps: list[str] = []

    def look(name: str, out: Tensor) -> None:
        if out.dim() == 4 and not out.is_contiguous(memory_format=torch.channels_last):
            maps.append(name)

    for name, module in last.encoder.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda _m, _i, out, name=name: look(name, out))
    found = outcome(last, image.contiguous(memory_format=torch.channels_last), mask)
    assert maps == []  # channels-last for real, in every map
    assert_near(contiguous, expected, 1e-3)
    assert_near(found, expected, 1e-3)


def count_calls(blocks: list[nn.Module]) -> list[int]:
    """Grows by one with every call of a block's first convolution."""
    calls: list[int] = []
    for block in blocks:
        first = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_hook(lambda *_: calls.append(1))
    return calls


@EVERY
def test_recomputed_blocks_have_the_same_gradients_and_statistics(spec: ConvNetSpec) -> None:
    spec = replace(spec, drop_path=0.3)
    image, mask = draw(spec)
    found = []
    for recompute in (False, True):
        model = make(spec)
        model.encoder.activation_checkpointing = recompute
        calls = count_calls(model.encoder.blocks_in_order())
        torch.manual_seed(5)
        found.append(outcome(model, image, mask))
        assert len(calls) == 5 * (1 + recompute)
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_statistics_rest_within_and_move_after() -> None:
    norm = nn.BatchNorm2d(3).train()
    x = torch.randn(4, 3, 5, 5) + 2
    with still_statistics(nn.Sequential(norm)):
        within = norm(x)
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    assert torch.equal(norm(x), within)
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.all()


@EVERY
def test_dropped_branches_follow_the_generator(spec: ConvNetSpec) -> None:
    model = make(replace(spec, drop_path=0.5)).train()
    image, mask = draw(spec)
    torch.manual_seed(1)
    first = model(image, mask)
    assert model(image, mask) != first
    torch.manual_seed(1)
    assert model(image, mask) == first
    model.eval()
    assert model(image, mask) == model(image, mask)


@RESNETS_ONLY
def test_a_fresh_block_is_its_shortcut(spec: ResNetSpec) -> None:
    torch.manual_seed(0)
    encoder = replace(spec, zero_init_residual=True).build()
    second = encoder.blocks_in_order()[2]  # whose shortcut is the identity
    x = torch.rand(2, 16 * spec.expansion, 8, 12)
    assert torch.equal(second(x, None, None), x)
    plain = spec.build().blocks_in_order()[2]
    assert not torch.allclose(plain(x, None, None), x, atol=0.1)


@EVERY
def test_bf16_and_whole_models_in_it(spec: ConvNetSpec) -> None:
    model = make(spec).eval()
    image, mask = draw(spec, 4)
    exact = copy.deepcopy(model).double()(model.normalise(image).double(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(image, mask)
    assert low.dtype == torch.float32
    assert abs(low.item() - exact.item()) < 0.01 * exact.item()
    assert low.item() != model(image, mask).item()
    features = model.bfloat16().encode(image, mask)
    assert features.dtype == torch.bfloat16
    assert features.isfinite().all()


@EVERY
def test_compiles_without_graph_breaks(spec: ConvNetSpec) -> None:
    model = make(spec).eval()
    image, mask = draw(spec)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, mask), model(image, mask))


@EVERY
def test_layers_and_weight_decay(spec: ConvNetSpec) -> None:
    model = make(spec)
    encoder = model.encoder
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert encoder.num_layers == 5
    assert set(layers.values()) == set(range(6))
    assert layers["mask_token"] == 0
    for number, block in enumerate(encoder.blocks_in_order(), start=1):
        own = {id(p) for p in block.parameters()}
        assert {layers[name] for name, p in encoder.named_parameters() if id(p) in own} == {number}
    decayed, exempt = (set(group["names"]) for group in parameter_groups(model, 0.05))
    assert "encoder.mask_token" in exempt
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    assert {shapes[name] for name in decayed} <= {2, 4}
    assert {shapes[name] for name in exempt if name != "encoder.mask_token"} == {1}
    groups = finetune_groups(Classifier(spec.build(), ["a", "b"]), 0.05, 0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.5**n for n in range(6, -1, -1)]


@EVERY
def test_features_of_every_block_are_means_of_its_map(spec: ConvNetSpec) -> None:
    model = make(spec).eval()
    image, _ = draw(spec)
    maps: list[Tensor] = []
    for block in model.encoder.blocks_in_order():
        block.register_forward_hook(lambda _m, _i, out: maps.append(out))
    found = layer_features(model, image)
    assert list(found) == [*(f"block {n}" for n in range(1, 6)), "output"]
    for number, out in enumerate(maps, start=1):
        torch.testing.assert_close(found[f"block {number}"], out.mean((2, 3)))
    torch.testing.assert_close(found["output"], found["block 5"])
    shapes = feature_shapes(model, pool="none")
    assert shapes["block 1"] == (16 * 24, maps[0].shape[1])
    with pytest.raises(ValueError, match="no class token"):
        layer_features(model, image, pool="cls")


# Weights files and other libraries' layouts


def make_weights(spec: ConvNetSpec, kind: str) -> Weights:
    if kind == "classifier":
        torch.manual_seed(3)
        model: ImageModel = Classifier(make(spec).encoder, ["cat", "dog", "emu"])
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    else:
        model = make(spec)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "encoder":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.")}
    metadata = {"classes": ["cat", "dog", "emu"]} if kind == "classifier" else {}
    return Weights("x", "simmim", kind, state, spec, metadata)


@EVERY
def test_weights_files_bring_running_statistics(spec: ConvNetSpec, tmp_path: Path) -> None:
    model = make(spec).eval()
    image, mask = draw(spec)
    save_weights(model, tmp_path / "w.safetensors")
    back = load_model(tmp_path / "w.safetensors")
    assert torch.equal(back.reconstruct(image, mask), model.reconstruct(image, mask))
    assert back.encoder.spec == spec
    for ours, theirs in zip(batch_norms(model), batch_norms(back), strict=True):
        assert ours.num_batches_tracked == theirs.num_batches_tracked == 7
    larger = load_encoder(tmp_path / "w.safetensors", image_size=128)
    assert larger.encoder.spec.grid == (32, 32)


@RESNETS_ONLY
def test_counts_and_statistics_that_are_none_are_refused(spec: ResNetSpec, tmp_path: Path) -> None:
    save_weights(make(spec), tmp_path / "w.safetensors")
    state = load_file(tmp_path / "w.safetensors")
    for name, value, message in (
        ("encoder.bn1.num_batches_tracked", torch.tensor(-1), "no count of batches"),
        ("encoder.bn1.num_batches_tracked", torch.ones(8), "no count of batches"),
        ("encoder.bn1.running_var", torch.full((8,), torch.nan), "not finite"),
        ("encoder.bn1.running_var", torch.ones(8, dtype=torch.int64), "floating point"),
        ("encoder.bn1.running_mean", torch.ones(9), "of another shape"),
        ("encoder.layer1.0.se.weight", torch.ones(9), "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            read_model(state | {name: value})


LIBRARIES = ["timm", "torchvision"]
WIDE = {
    "resnet": replace(RESNET, width=64, drop_path=0.1),
    "bottleneck": replace(BOTTLENECK, width=64),
    "convnext": CONVNEXT,
}
KINDS = ["simmim", "classifier", "encoder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LIBRARIES)
@pytest.mark.parametrize("name", WIDE)
def test_every_layout_proves_itself_and_comes_back(
    layout: str, name: str, kind: str, tmp_path: Path
) -> None:
    weights = make_weights(WIDE[name], kind)
    export = to_layout(weights, layout)
    assert all("mask_token" in n or n.startswith("decoder.") for n in export.left_out)
    proof = prove(weights, export)
    if proof.difference is not None:
        assert proof.difference < 1e-5
    for file in ("out.safetensors", "out.pth"):
        write(export, tmp_path / file, weights.metadata)
        back = read_model(tmp_path / file, WIDE[name].image_size)
        assert set(weights.state) - set(back.state) == set(export.left_out)
        assert back.state.keys() <= weights.state.keys()
        assert all(torch.equal(back.state[key], weights.state[key]) for key in back.state)
        assert back.kind == export.kind
        told = {} if file == "out.safetensors" else {"drop_path": 0.0}
        told |= {"zero_init_residual": True} if told and name != "convnext" else {}
        told |= {"layer_scale": 1e-6} if told and name == "convnext" else {}
        assert back.spec == replace(WIDE[name], **told)
        again = to_layout(back, layout)
        assert again.state.keys() == export.state.keys()
        assert all(torch.equal(again.state[key], export.state[key]) for key in again.state)


def test_what_no_model_computes_is_refused() -> None:
    for spec, layout, message in (
        (replace(WIDE["resnet"], channels=1), "torchvision", "3 channels, this encoder 1"),
        (RESNET, "torchvision", "64 wide, this one 8"),
        (replace(CONVNEXT, layer_scale=None), "torchvision", "this one has none"),
        (RESNET, "hf", "choose timm or torchvision"),
        (RESNET, "official", "choose timm or torchvision"),
        (CONVNEXT, "mmpretrain", "choose timm or torchvision"),
    ):
        with pytest.raises(ValueError, match=message):
            to_layout(make_weights(spec, "encoder"), layout)


@pytest.mark.parametrize("layout", LIBRARIES)
def test_names_of_a_library_are_its_own(layout: str) -> None:
    state = to_layout(make_weights(CONVNEXT, "classifier"), layout).state
    assert read_model(state, layout=layout).layout == layout
    other = LIBRARIES[1 - LIBRARIES.index(layout)]
    with pytest.raises(ValueError, match=f"{layout}'s, not those of {other}|not the names"):
        read_model(state, layout=other)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_tiny"])
@pytest.mark.parametrize("source", LIBRARIES)
def test_models_of_libraries_give_their_outputs(source: str, name: str) -> None:
    module = library(source)
    torch.manual_seed(0)
    if source == "timm":
        model = module.create_model(name, num_classes=5)
    else:
        model = getattr(module.models, name)(num_classes=5)
    for parameter in model.parameters():
        if parameter.dim() < 4:  # gains that are 0 would show nothing
            parameter.data += 0.05 * torch.randn(parameter.shape)
    for norm in batch_norms(model):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
    ours = load_model(model.state_dict(), image_size=64)
    assert isinstance(ours, Classifier)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(image)
        torch.testing.assert_close(ours(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*RESNETS, *CONVNEXTS])
def test_presets_have_the_names_of_both_libraries(name: str) -> None:
    models = library("torchvision").models
    timm = library("timm")
    spec = find_preset(name)
    with torch.device("meta"):
        encoder = spec.build()
    state = {f"encoder.{k}": torch.empty(v.shape) for k, v in encoder.state_dict().items()}
    for layout in LIBRARIES:
        with torch.device("meta"):
            theirs = getattr(models, name)() if layout == "torchvision" else timm.create_model(name)
        wanted = {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
        heads = ("fc.", "head.fc.", "classifier.")
        wanted = {n: shape for n, shape in wanted.items() if not n.startswith(heads)}
        found = to_layout(Weights("x", "simmim", "encoder", state, spec, {}), layout).state
        assert {n: tuple(t.shape) for n, t in found.items()} == wanted


# timm's models as they are


def make_timm(name: str, **changes: Any) -> SimMIM:
    library("timm")
    return make(replace(find_preset(f"timm:{name}"), image_size=(64, 96), **changes))


@pytest.mark.parametrize(
    ("name", "place", "before", "width"),
    [
        ("resnet18", "layer1", True, 64),
        ("resnet26d", "layer1", True, 64),
        ("convnextv2_atto", "stages.0", True, 40),
        ("regnety_002", "s1", False, 24),
        ("efficientnet_b0", "blocks.1", False, 24),
    ],
)
def test_models_of_timm_train(name: str, place: str, before: bool, width: int) -> None:
    found = []
    image, mask = draw(RESNET)
    for recompute in (False, True):
        model = make_timm(name)
        encoder = model.encoder
        anatomy = timm_backbone.look_at(name, 3)
        assert (anatomy.place, anatomy.before, anatomy.stem_width) == (place, before, width)
        assert encoder.spec.grid == (16, 24)
        encoder.activation_checkpointing = recompute
        torch.manual_seed(5)
        # every parameter has a gradient: DistributedDataParallel waits for all of them
        found.append(outcome(model, image, mask))
        assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(found[1][key], found[0][key]) for key in found[0])
    layers = {encoder.layer_of(n) for n, _ in encoder.named_parameters()}
    assert layers == set(range(encoder.num_layers + 1))
    assert len(layer_features(model, image)) == len(anatomy.stages) + 1


def test_a_resnet_of_timm_is_ours() -> None:
    image, mask = draw(RESNET)
    ours = make(replace(RESNETS["resnet18"], image_size=(64, 96))).eval()
    theirs = make_timm("resnet18").eval()
    state = {
        n.replace("encoder.", "encoder.model.").replace("model.mask_token", "mask_token"): t
        for n, t in ours.state_dict().items()
    }
    theirs.load_state_dict(state)
    for hidden in (mask, None):
        torch.testing.assert_close(theirs.encode(image, hidden), ours.encode(image, hidden))
    # a copy hides by itself, as averaged weights need it
    copied = copy.deepcopy(theirs)
    theirs.encoder.mask_token.data += 1
    torch.testing.assert_close(copied.encode(image, mask), ours.encode(image, mask))
    assert not torch.allclose(theirs.encode(image, mask), ours.encode(image, mask))


def test_weights_of_a_model_of_timm_come_back(tmp_path: Path) -> None:
    model = make_timm("regnety_002", drop_path=0.1).eval()
    image, mask = draw(RESNET)
    save_weights(model, tmp_path / "w.safetensors")
    weights = read_model(tmp_path / "w.safetensors")
    assert weights.spec == TimmSpec(image_size=(64, 96), drop_path=0.1, name="regnety_002")
    back = load_model(tmp_path / "w.safetensors")
    assert torch.equal(back.encode(image, mask), model.encode(image, mask))
    export = to_layout(weights, "timm")
    proof = prove(weights, export)
    assert proof.difference is not None
    assert proof.difference < 1e-5
    with pytest.raises(ValueError, match="no place in torchvision's"):
        to_layout(weights, "torchvision")
    save_file({k: v for k, v in model.state_dict().items()}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="only the metadata of our own files tells"):
        read_model(tmp_path / "bare.safetensors")


def test_models_without_a_stem_that_can_be_told_are_refused() -> None:
    library("timm")
    for name, message in (
        ("hf-hub:timm/resnet18.a1_in1k", "timm has no model"),
        ("local-dir:/x", "timm has no model"),
        ("resnet19", r"timm has no model resnet19; there are .*resnet"),
        ("vit_tiny_patch16_224", "does not run on any image size"),
        ("inception_v4", "where the stem of timm's inception_v4 ends cannot be told"),
        ("hrnet_w18_small", "cannot be told"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            TimmSpec(name=name).build()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="image_size: 65×64"):
        TimmSpec(name="resnet18", image_size=(65, 64)).build()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "pip install timm$"),
        (RuntimeError("operator nms does not exist\nmore"), r"\(operator nms does not exist\)"),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), r"\(No module named 'yaml'\)"),
    ],
)
def test_a_missing_timm_is_told(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(timm_backbone, "import_module", fail)
    timm_backbone.look_at.cache_clear()
    with pytest.raises(ValueError, match=message) as caught:
        replace(find_preset("timm:resnet18")).build()
    assert str(caught.value).startswith("name: timm's models need timm")


# Batch norms over processes, and over a step


@RESNETS_ONLY
def test_skipped_steps_leave_no_trace_in_running_statistics(spec: ResNetSpec) -> None:
    model = make(spec)
    world = World(0, 1, torch.device("cpu"))
    image, mask = draw(spec)
    start = {name: b.clone() for name, b in model.named_buffers()}
    before = keep(model)
    broken = model.normalise(image)
    broken[0, 0, 0, 0] = torch.nan
    loss = model.train()(broken, mask)
    assert any(not b.isfinite().all() for b in model.buffers())
    settle(model, before, torch.isfinite(loss), world)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, start[name]), name
    before = keep(model)
    model(image, mask)
    moved = {name: b.clone() for name, b in model.named_buffers()}
    settle(model, before, torch.tensor(True), world)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, moved[name]), name
        assert name in ("mean", "std") or not torch.equal(buffer, start[name]), name


def test_models_without_batch_norms_keep_nothing() -> None:
    model = make(CONVNEXT)
    assert keep(model) == []
    settle(model, [], torch.tensor(False), World(0, 1, torch.device("cpu")))


def test_conversion_keeps_parameters_and_refuses_what_it_does_not_know() -> None:
    model = make(RESNET)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    names = list(model.state_dict())
    assert convert(model) is model
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == names
    assert not batch_norms(model)
    norms = [m for m in model.modules() if isinstance(m, CpuSyncBatchNorm)]
    assert len(norms) == 14
    # one process alone is an ordinary batch norm
    image, mask = draw(RESNET)
    for name, tensor in outcome(make(RESNET), image, mask).items():
        assert torch.equal(outcome(convert(make(RESNET)), image, mask)[name], tensor), name

    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="a Odd cannot be synchronised"):
        convert(nn.Sequential(Odd(3)))


def test_batch_norms_of_timm_keep_their_activations() -> None:
    model = make_timm("regnety_002")
    expected = outcome(copy.deepcopy(model), *draw(RESNET))
    found = outcome(convert(model), *draw(RESNET))
    assert sum(isinstance(m, CpuSyncBatchNorm) for m in model.modules()) > 20
    assert all(torch.equal(found[name], expected[name]) for name in expected)


PROCESS = """
import sys, torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
from simmim import SimMIM
from simmim.backbone.resnet import ResNetSpec
from simmim.distributed import World
from simmim.training.parallel import wrap
from simmim.training.running_statistics import keep, settle

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
given = load_file(f"{folder}/in.safetensors")
world = World(rank, 2, torch.device("cpu"))
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
for mode in ("sync", "recompute", "plain"):
    model = SimMIM(ResNetSpec(image_size=(64, 96), depths=(1, 2, 1, 1), width=8).build())
    model.load_state_dict({k[6:]: v for k, v in given.items() if k.startswith("model.")})
    model.train().encoder.activation_checkpointing = mode == "recompute"
    wrapped = wrap(model, world, sync_batch_norm=mode != "plain", compile=False)
    own = slice(0, 3) if rank == 0 else slice(3, 8)
    before = keep(model)
    loss = wrapped(given["image"][own], given["mask"][own])
    (loss * (3 if rank == 0 else 5) / 4).backward()
    settle(model, before, torch.isfinite(loss), world)
    out = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters()}
    out |= {f"state.{n}": b.clone() for n, b in model.state_dict().items()}
    save_file(out, f"{folder}/{mode}-{rank}.safetensors")
dist.destroy_process_group()
"""


def run_two(folder: Path) -> dict[str, list[dict[str, Tensor]]]:
    """What `PROCESS` wrote in each of two processes: mode → by rank."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    for process, error in zip(processes, errors):
        assert process.returncode == 0, error
    return {
        mode: [load_file(folder / f"{mode}-{rank}.safetensors") for rank in range(2)]
        for mode in ("sync", "recompute", "plain")
    }


def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    spec = ResNetSpec(image_size=(64, 96), depths=(1, 2, 1, 1), width=8)
    model = make(spec)
    image, _ = draw(spec, 8)
    mask = torch.zeros(8, 2, 3, dtype=torch.bool)
    mask[:, 0] = True  # as many hidden pixels in every image
    given = {"image": image, "mask": mask}
    given |= {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(given, tmp_path / "in.safetensors")
    expected = outcome(copy.deepcopy(model).double(), model.normalise(image).double(), mask)
    results = run_two(tmp_path)
    for found in results["sync"] + results["recompute"]:
        for name, _ in model.named_parameters():
            wanted = expected[name].float()
            scale = wanted.abs().max()
            assert (found[f"grad.{name}"] - wanted).abs().max() <= 1e-4 * scale, name
        for name, buffer in model.named_buffers():
            if name not in ("mean", "std"):
                wanted = expected[f"{name} after"].to(buffer.dtype)
                torch.testing.assert_close(found[f"state.{name}"], wanted, rtol=1e-5, atol=1e-6)
    # without: other gradients, and statistics that are equal in both processes all the same
    first, second = results["plain"]
    name = "encoder.conv1.weight"
    scale = expected[name].abs().max()
    assert (first[f"grad.{name}"] - expected[name].float()).abs().max() > 1e-2 * scale
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_encoders_are_convnets() -> None:
    assert all(isinstance(spec.build(), ConvNet) for spec in SPECS.values())
