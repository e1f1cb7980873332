"""The interface of encoders: every one takes its rates, layers, flags and backends from it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from simmim.backbone import swin, swinv2, vit
from simmim.backbone.convnext import ConvNeXtSpec
from simmim.backbone.encoder import EncoderSpec
from simmim.backbone.layers import Backends
from simmim.backbone.resnet import ResNetSpec
from simmim.backbone.stochastic_depth import DropPath
from simmim.backbone.swin import SwinSpec
from simmim.backbone.swinv2 import SwinV2Spec
from simmim.backbone.vit import ViTSpec

SIZE = (32, 64)
SPECS: dict[str, EncoderSpec] = {
    "swin": SwinSpec(SIZE, embed_dim=8, depths=(2, 3), num_heads=(2, 4), window_size=4),
    "swinv2": SwinV2Spec(SIZE, embed_dim=8, depths=(2, 3), num_heads=(2, 4), window_size=4),
    "vit": ViTSpec(SIZE, patch_size=8, embed_dim=16, depth=5, num_heads=2),
    "resnet": ResNetSpec(SIZE, depths=(1, 2, 1, 1), bottleneck=False, width=4),
    "convnext": ConvNeXtSpec(SIZE, depths=(1, 2, 1, 1), widths=(4, 4, 4, 4)),
}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
TRANSFORMERS = pytest.mark.parametrize("name", ["swin", "swinv2", "vit"])


@EVERY
def test_blocks_drop_their_branch_at_linearly_growing_rates(spec: EncoderSpec) -> None:
    encoder = replace(spec, drop_path=0.4).build()
    rates = [module.rate for module in encoder.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@EVERY
def test_the_grid_is_the_image_in_patches_and_the_map_in_strides(spec: EncoderSpec) -> None:
    encoder = spec.build().eval()
    assert spec.grid == (32 // spec.patch_size, 64 // spec.patch_size)
    out = encoder(torch.zeros(1, 3, *SIZE))
    assert out.shape == (1, encoder.num_features, 32 // spec.stride, 64 // spec.stride)
    assert encoder.num_layers == 5


@EVERY
def test_every_parameter_has_a_layer_and_blocks_count_from_one(spec: EncoderSpec) -> None:
    encoder = spec.build()
    layers = {encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert set(range(6)) <= layers <= set(range(7))
    assert encoder.layer_of("mask_token") == 0


@pytest.mark.parametrize(
    ("arch", "name", "layer"),
    [
        ("swin", "patch_embed.proj.weight", 0),
        ("swin", "layers.0.blocks.1.norm1.weight", 2),
        ("swin", "layers.0.downsample.reduction.weight", 2),
        ("swin", "layers.1.blocks.0.attn.qkv.weight", 3),
        ("swin", "layers.1.blocks.2.mlp.fc2.bias", 5),
        ("swin", "absolute_pos_embed", 6),
        ("swin", "norm.weight", 6),
        ("vit", "cls_token", 0),
        ("vit", "pos_embed", 0),
        ("vit", "patch_embed.proj.bias", 0),
        ("vit", "blocks.0.gamma_1", 1),
        ("vit", "blocks.4.attn.q_bias", 5),
        ("vit", "rel_pos_bias.relative_position_bias_table", 6),
        ("vit", "norm.bias", 6),
        ("resnet", "conv1.weight", 0),
        ("resnet", "layer1.0.conv1.weight", 1),
        ("resnet", "layer2.1.bn2.bias", 3),
        ("resnet", "layer4.0.downsample.0.weight", 5),
        ("convnext", "stem.1.bias", 0),
        ("convnext", "stages.1.downsample.1.weight", 2),
        ("convnext", "stages.1.blocks.1.gamma", 3),
        ("convnext", "stages.3.blocks.0.norm.bias", 5),
    ],
)
def test_layers_for_layer_wise_decay_are_the_published_ones(
    arch: str, name: str, layer: int
) -> None:
    assert SPECS[arch].build().layer_of(name) == layer


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("swin", {"absolute_pos_embed", "mask_token"}),
        ("swinv2", {"absolute_pos_embed", "mask_token"}),
        ("vit", {"pos_embed", "cls_token"}),
        ("resnet", {"mask_token"}),
        ("convnext", {"mask_token"}),
    ],
)
def test_what_is_not_decayed_is_as_published(arch: str, names: set[str]) -> None:
    assert SPECS[arch].build().no_decay == names


OPS: dict[str, tuple[Any, dict[str, str]]] = {
    "swin": (
        swin,
        {"embed_patches": "ops", "merge_patches": "ops", "residual_attention": "attention"},
    ),
    "swinv2": (swinv2, {"post_norm_attention": "attention", "post_norm_mlp": "ops"}),
    "vit": (vit, {"embed_patches": "ops", "residual_attention": "attention"}),
}


@TRANSFORMERS
def test_every_op_has_the_backend_of_its_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kinds = OPS[name]
    seen: dict[str, set[str]] = {}

    def noting(op: str) -> Callable[..., Any]:
        run = getattr(module, op)

        def noted(*given: Any, **options: Any) -> Any:
            seen.setdefault(op, set()).add(options["backend"])
            return run(*given, **options | {"backend": "reference"})

        return noted

    for op in kinds:
        monkeypatch.setattr(module, op, noting(op))
    monkeypatch.setattr(
        "simmim.backbone.layers.residual_mlp",
        lambda x, *given, **options: seen.setdefault("mlp", set()).add(options["backend"]) or x,
    )
    encoder = SPECS[name].build().eval()
    encoder.backends = Backends("reference", "attention")
    encoder(torch.zeros(1, 3, *SIZE))
    found = {"attention": {"attention"}, "ops": {"reference"}}
    wanted = {op: found[kind] for op, kind in kinds.items()}
    assert seen == wanted | ({} if name == "swinv2" else {"mlp": {"reference"}})


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_blocks_are_computed_again_in_training_with_the_flag_alone(
    spec: EncoderSpec, training: bool
) -> None:
    encoder = spec.build().train(training)
    assert not encoder.activation_checkpointing
    runs = []
    (block, *_) = [module for module in encoder.modules() if hasattr(module, "drop_path")]
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    counts = []
    for flag in (False, True):
        runs.clear()
        encoder.activation_checkpointing = flag
        encoder(torch.randn(2, 3, *SIZE)).sum().backward()
        counts.append(len(runs))
    assert counts == [1, 2 if training else 1]
