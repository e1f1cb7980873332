"""The sections of a configuration, as frozen dataclasses."""

from dataclasses import dataclass, field
from typing import Literal

from simmim.backbone.build import find_preset
from simmim.backbone.convnet import ConvNetSpec
from simmim.config.bounds import bounded


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder. Unset fields come from the preset."""

    name: str = "swin_base"
    """Preset, such as swin_base, swinv2_base, vit_base, resnet50 (`simmim models` lists them), or timm:NAME."""
    patch_size: int | None = bounded(None, low=1)
    """Side of a patch, in pixels."""
    embed_dim: int | None = bounded(None, low=1)
    """Width of the (first stage's) tokens."""
    depths: list[int] | None = bounded(None, low=1)
    """Blocks per stage; one number for a ViT."""
    num_heads: list[int] | None = bounded(None, low=1)
    """Heads per stage; one number for a ViT."""
    window_size: int | None = bounded(None, low=1)
    """Swin: side of an attention window, in tokens."""
    mlp_ratio: float | None = bounded(None, above=0)
    """Hidden width of the MLP over its width."""
    qk_scale: float | None = None
    """Factor of q·k; unset is 1/sqrt(head width)."""
    absolute_position: bool | None = None
    """Add a learned absolute position to the tokens."""
    shared_relative_position: bool | None = None
    """ViT: one relative position table shared by all blocks, as published."""
    layer_scale: float | None = None
    """ViT: initial LayerScale gain; 0 has no LayerScale."""
    class_token: bool | None = None
    """ViT: a class token before the patch tokens."""
    frozen_position: bool | None = None
    """ViT: the absolute position is a table of sines and cosines that does not train."""
    final_norm: bool | None = None
    """ViT: a norm after the last block."""
    qkv_bias: bool | None = None
    """Biases of q, k and v (a ViT's k has none)."""
    drop_path: float = bounded(0.0, low=0, high=0.999)
    """Stochastic-depth rate of the last block, 0 to 1; grows linearly from 0."""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Images, whatever is done with them."""

    path: str = ""
    """Folder of images (any layout), folder of .tar shards, or one .tar file."""
    channels: int = bounded(3, low=1)
    """1 reads images as grey, 3 as RGB, 4 as RGBA; another number must be that of the files (.npy, multi-band TIFF)."""
    value_range: tuple[float, float] | None = bounded(None, order="strictly rising")
    """The two values that become 0 and 255 where files hold other than 8 bits; unset takes the upper 8 of 16 bits."""
    mean: list[float] | None = None
    """Mean per channel on the 0-1 scale; unset is ImageNet's for 3 channels, else 0.5."""
    std: list[float] | None = bounded(None, above=0)
    """Standard deviation per channel on the 0-1 scale; unset is ImageNet's for 3 channels, else 0.25."""
    workers: int = bounded(-1, low=-1, high=1024)
    """Decoding processes per device; 0 decodes in the training process; -1 chooses from the CPU count."""
    prefetch: int = bounded(4, low=1)
    """Batches held ready per device."""
    timeout_s: float = bounded(120, low=0.1)
    """Seconds after which a process that is still at one image is replaced; an image that does it twice is left out."""
    max_pixels: int = bounded(2**27, low=1)
    """Images of more pixels are left out before they are decoded."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """Images and their augmentation."""

    image_size: int | tuple[int, int] = bounded(192, low=1)
    """Side, or [height, width], of the training crops, in pixels."""
    crop_scale: tuple[float, float] = bounded((0.67, 1.0), above=0, high=1, order="rising")
    """Smallest and largest share of the image's area that a random crop covers."""
    crop_ratio: tuple[float, float] = bounded((3 / 4, 4 / 3), above=0, order="rising")
    """Smallest and largest width/height of a random crop."""
    flip: float = bounded(0.5, low=0, high=1)
    """Probability of a horizontal flip."""
    backend: Literal["auto", "cpu", "dali"] = "auto"
    """What decodes: processes on the CPU, or NVIDIA DALI (extra `dali`), on the GPU where there is one; auto takes DALI on CUDA if it is installed."""
    dali_memory_mib: int = bounded(2048, low=1)
    """Memory that DALI may take per device, on the GPU and page-locked together, in MiB."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What is hidden."""

    unit: int = bounded(32, low=1)
    """Side of a mask unit, in pixels; a multiple of the patch size that divides the image."""
    ratio: float = bounded(0.6, above=0, high=1)
    """Share of the units that is hidden; rounded up to whole units."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """How the encoder is pre-trained; each method has keys of its own."""

    name: str = "simmim"
    """Method: simmim, or another that `simmim models` lists."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and arithmetic of the run."""

    epochs: float = 100
    """Passes over the data."""
    steps: int = bounded(0, low=0)
    """Optimiser steps; 0 takes them from epochs."""
    batch_size: int = bounded(2048, low=1)
    """Images per optimiser step, over all devices and accumulation steps."""
    accumulation_steps: int = bounded(1, low=1)
    """Backward passes per optimiser step; the update is that of the whole batch."""
    precision: Literal["float32", "bf16", "fp16"] = "bf16"
    """Compute type of autocast; weights and optimiser state stay float32; fp16 scales the loss."""
    clip_norm: float = bounded(5.0, low=0)
    """Largest global gradient norm; 0 does not clip."""
    channels_last: bool | None = None
    """Keep images and convolutions in channels-last memory format; unset does so on CUDA, and for a ConvNet that model.name names everywhere."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: slower, much less memory."""
    sync_batch_norm: bool = True
    """Batch norms take their statistics from the whole batch over all processes, not each from its own images."""
    compile: bool = False
    """Run the model through torch.compile."""
    max_bad_steps: int = bounded(10, low=1)
    """Stop after this many steps in a row with a non-finite loss or gradient (each is skipped)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and parameter groups."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    lr: float = bounded(2e-4, above=0)
    """Peak learning rate for a batch of lr_batch images; scaled by batch_size / lr_batch."""
    lr_batch: int = bounded(512, low=0)
    """Batch size that lr, warmup_lr and min_lr are meant for, in images; 0 does not scale them."""
    weight_decay: float = bounded(0.05, low=0)
    """Decoupled weight decay of the decayed parameters."""
    betas: tuple[float, float] = bounded((0.9, 0.999), low=0, high=0.9999999)
    """Decay rates of the two moments of AdamW."""
    eps: float = bounded(1e-8, low=1e-30)
    """Epsilon of AdamW."""
    momentum: float = bounded(0.9, low=0, high=0.9999999)
    """SGD's momentum."""
    nesterov: bool = True
    """SGD: Nesterov's momentum instead of the plain one."""
    decay_position_tables: bool = True
    """Decay relative position tables: the published pre-training does (a keyword rule there never matches); false exempts them."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate per step: linear warm-up, then the named schedule."""

    name: Literal["cosine", "multistep", "linear", "step", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_epochs: float = bounded(10, low=0)
    """Length of the warm-up, in epochs."""
    warmup_steps: int = bounded(0, low=0)
    """Length of the warm-up, in steps; 0 takes it from warmup_epochs."""
    warmup_lr: float = bounded(1e-6, low=0)
    """Learning rate of the first step, before batch scaling."""
    min_lr: float = bounded(1e-5, low=0)
    """Learning rate at the end of the cosine, before batch scaling."""
    milestones: list[float] = field(default_factory=lambda: [700.0])
    """multistep: epochs at which the rate drops."""
    step_epochs: float = bounded(30, low=1e-9)
    """step: epochs between drops."""
    gamma: float = bounded(0.1, low=0, high=1)
    """multistep and step: factor of each drop."""
    warmup_prefix: bool = False
    """Start the cosine at its peak after the warm-up (microsoft/Swin-Transformer) instead of where it would stand by then (microsoft/SimMIM)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and when."""

    every_steps: int = bounded(0, low=0)
    """Steps between checkpoints; 0 saves once an epoch, or every 100 steps where epochs are shorter."""
    keep_last: int = bounded(3, low=1)
    """How many of the newest checkpoints stay."""
    keep_every_steps: int = bounded(0, low=0)
    """Checkpoints at multiples of this many steps stay for good; 0 keeps none so."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown, and when."""

    every_steps: int = bounded(10, low=1)
    """Steps between progress lines; metrics.jsonl has a row for every step all the same."""
    picture_every_steps: int = bounded(0, low=-1)
    """Steps between reconstruction pictures; 0 draws one with every checkpoint; -1 none."""
    pictures: int = bounded(6, low=1, high=64)
    """Images in a reconstruction picture."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Backends of the fused ops."""

    backend: Literal["triton", "native", "reference"] | None = None
    """Backend that every op must use; unset takes the first that can run."""
    attention: Literal["triton", "native", "xformers", "reference"] | None = None
    """Backend of attention and its projections, where it is to be another; reference is PyTorch's scaled_dot_product_attention."""


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Validation on images that are held out of training."""

    path: str = ""
    """Held-out images, as data.path; unset does not validate."""
    every_epochs: float = bounded(1, low=1e-9)
    """Epochs between validations; the end of the run has one in any case."""
    batch_size: int = bounded(0, low=0)
    """Images per device; 0 takes as many as in training."""
    pictures: int = bounded(6, low=0, high=64)
    """Held-out images whose reconstructions are drawn; 0 draws none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has."""

    seed: int = 0
    """Seed of initialisation, sample order, augmentation, masks and stochastic depth."""
    output: str = ""
    """Run folder; a run that is there is resumed. Unset is runs/NAME-OF-THE-CONFIG."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when a device is there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def channels_last_on(self, device_type: str) -> bool:
        """Whether images and convolutions are channels-last on a type of device."""
        if self.train.channels_last is not None:
            return self.train.channels_last
        return device_type == "cuda" or self.is_convnet()

    def is_convnet(self) -> bool:
        """Whether `model.name` names a ConvNet."""
        try:
            return isinstance(find_preset(self.model.name), ConvNetSpec)
        except ValueError:  # a fine-tuning run whose weights tell the architecture
            return False


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Pre-training run."""

    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the training crops, in pixels."""
        size = self.data.image_size
        return (size, size) if isinstance(size, int) else size
