"""The keys of pre-training: their defaults, which recipes leave out, and what each may be."""

from dataclasses import replace
from typing import Any

import pytest

from config_keys import keys_of
from simmim.config.finetune import FinetuneConfig
from simmim.config.sections import Config, DataConfig, ModelConfig, RunConfig, TrainConfig

# As published for SimMIM (microsoft/SimMIM, configs/), where there is something published.
KEYS: dict[str, tuple[Any, str]] = {
    "seed": (0, ""),
    "output": ("", ""),
    "device": ("auto", "auto cpu cuda"),
    "model.name": ("swin_base", ""),
    "model.patch_size": (None, "[1, inf]"),
    "model.embed_dim": (None, "[1, inf]"),
    "model.depths": (None, "[1, inf]"),
    "model.num_heads": (None, "[1, inf]"),
    "model.window_size": (None, "[1, inf]"),
    "model.mlp_ratio": (None, "(0, inf]"),
    "model.qk_scale": (None, ""),
    "model.absolute_position": (None, ""),
    "model.shared_relative_position": (None, ""),
    "model.layer_scale": (None, ""),
    "model.class_token": (None, ""),
    "model.frozen_position": (None, ""),
    "model.final_norm": (None, ""),
    "model.qkv_bias": (None, ""),
    "model.drop_path": (0.0, "[0, 0.999]"),
    "data.path": ("", ""),
    "data.channels": (3, "[1, inf]"),
    "data.value_range": (None, "strictly rising"),
    "data.mean": (None, ""),
    "data.std": (None, "(0, inf]"),
    "data.workers": (-1, "[-1, 1024]"),
    "data.prefetch": (4, "[1, inf]"),
    "data.timeout_s": (120, "[0.1, inf]"),
    "data.max_pixels": (134217728, "[1, inf]"),
    "data.image_size": (192, "[1, inf]"),
    "data.crop_scale": ((0.67, 1.0), "(0, 1] rising"),
    "data.crop_ratio": ((0.75, 1.3333333333333333), "(0, inf] rising"),
    "data.flip": (0.5, "[0, 1]"),
    "data.backend": ("auto", "auto cpu dali"),
    "data.dali_memory_mib": (2048, "[1, inf]"),
    "train.epochs": (100, ""),
    "train.steps": (0, "[0, inf]"),
    "train.batch_size": (2048, "[1, inf]"),
    "train.accumulation_steps": (1, "[1, inf]"),
    "train.precision": ("bf16", "float32 bf16 fp16"),
    "train.clip_norm": (5.0, "[0, inf]"),
    "train.channels_last": (None, ""),
    "train.activation_checkpointing": (False, ""),
    "train.sync_batch_norm": (True, ""),
    "train.compile": (False, ""),
    "train.cuda_graph": ("auto", "auto on off"),
    "train.max_bad_steps": (10, "[1, inf]"),
    "optim.name": ("adamw", "adamw sgd"),
    "optim.lr": (0.0002, "(0, inf]"),
    "optim.lr_batch": (512, "[0, inf]"),
    "optim.weight_decay": (0.05, "[0, inf]"),
    "optim.betas": ((0.9, 0.999), "[0, 0.9999999]"),
    "optim.eps": (1e-08, "[1e-30, inf]"),
    "optim.momentum": (0.9, "[0, 0.9999999]"),
    "optim.nesterov": (True, ""),
    "optim.decay_position_tables": (True, ""),
    "schedule.name": ("cosine", "cosine multistep linear step constant"),
    "schedule.warmup_epochs": (10, "[0, inf]"),
    "schedule.warmup_steps": (0, "[0, inf]"),
    "schedule.warmup_lr": (1e-06, "[0, inf]"),
    "schedule.min_lr": (1e-05, "[0, inf]"),
    "schedule.milestones": ([700.0], ""),
    "schedule.step_epochs": (30, "[1e-09, inf]"),
    "schedule.gamma": (0.1, "[0, 1]"),
    "schedule.warmup_prefix": (False, ""),
    "checkpoint.every_steps": (0, "[0, inf]"),
    "checkpoint.keep_last": (3, "[1, inf]"),
    "checkpoint.keep_every_steps": (0, "[0, inf]"),
    "log.every_steps": (10, "[1, inf]"),
    "log.picture_every_steps": (0, "[-1, inf]"),
    "log.pictures": (6, "[1, 64]"),
    "log.tensorboard": (False, ""),
    "kernels.backend": (None, "triton native reference"),
    "kernels.attention": (None, "triton native xformers reference"),
    "method.name": ("simmim", ""),
    "mask.unit": (32, "[1, inf]"),
    "mask.ratio": (0.6, "(0, 1]"),
    "validate.path": ("", ""),
    "validate.every_epochs": (1, "[1e-09, inf]"),
    "validate.batch_size": (0, "[0, inf]"),
    "validate.pictures": (6, "[0, 64]"),
}


def test_every_key_has_its_default_and_what_it_may_be() -> None:
    assert keys_of(Config) == KEYS


@pytest.mark.parametrize(("size", "meant"), [(96, (96, 96)), ((96, 64), (96, 64))])
def test_images_are_square_where_one_number_is_given(size: Any, meant: tuple[int, int]) -> None:
    assert Config(data=DataConfig(image_size=size)).image_size == meant


@pytest.mark.parametrize(
    ("name", "convnet"),
    [("resnet50", True), ("convnext_tiny", True), ("swin_base", False), ("vit_base", False)],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_channels_come_last_on_cuda_and_in_convnets(name: str, convnet: bool, device: str) -> None:
    config = Config(model=ModelConfig(name=name))
    assert config.is_convnet() is convnet
    assert config.channels_last_on(device) is (convnet or device == "cuda")
    for said in (False, True):
        config = replace(config, train=TrainConfig(channels_last=said))
        assert config.channels_last_on(device) is said


def test_weights_may_tell_the_architecture() -> None:
    config: RunConfig = FinetuneConfig()
    assert not config.is_convnet()
    assert not config.channels_last_on("cpu")
    assert config.channels_last_on("cuda")
