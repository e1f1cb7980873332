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
    """Factor of q·k. The default is 1/sqrt(head width)."""
    absolute_position: bool | None = None
    """Add a learned absolute position to the tokens."""
    shared_relative_position: bool | None = None
    """ViT: all blocks share one relative position table, as published."""
    layer_scale: float | None = None
    """ViT: initial gain of LayerScale; with 0 there is no LayerScale."""
    class_token: bool | None = None
    """ViT: a class token before the patch tokens."""
    frozen_position: bool | None = None
    """ViT: the absolute position is a fixed table of sines and cosines."""
    final_norm: bool | None = None
    """ViT: a norm after the last block."""
    qkv_bias: bool | None = None
    """Give q, k and v a bias (k of a ViT never has one)."""
    drop_path: float = bounded(0.0, low=0, high=0.999)
    """Stochastic-depth rate of the last block. The rate grows linearly from 0 at the first block."""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Images, whatever is done with them."""

    path: str = ""
    """Folder of images (any layout), folder of .tar shards, or one .tar file."""
    channels: int = bounded(3, low=1)
    """Channels of the images: 1 reads them as grey, 3 as RGB, 4 as RGBA. Any other number must be that of the files (.npy, multi-band TIFF)."""
    value_range: tuple[float, float] | None = bounded(None, order="strictly rising")
    """The two values that become 0 and 255 where files do not hold 8 bits. By default, the upper 8 of 16 bits are taken."""
    mean: list[float] | None = None
    """Mean per channel on the 0-1 scale. The default is ImageNet's for 3 channels, else 0.5."""
    std: list[float] | None = bounded(None, above=0)
    """Standard deviation per channel on the 0-1 scale. The default is ImageNet's for 3 channels, else 0.25."""
    workers: int = bounded(-1, low=-1, high=1024)
    """Decoding processes per device. 0 decodes in the training process; -1 chooses the number from the CPU count."""
    prefetch: int = bounded(4, low=1)
    """Batches that are held ready per device."""
    timeout_s: float = bounded(120, low=0.1)
    """Seconds that a process may spend on one image before it is replaced. An image that takes as long twice is left out."""
    max_pixels: int = bounded(2**27, low=1)
    """Largest number of pixels of an image. Larger ones are left out before they are decoded."""


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
    """What decodes images: processes on the CPU, or NVIDIA DALI (extra `dali`), which uses the GPU if there is one. auto takes DALI on CUDA if it is installed."""
    dali_memory_mib: int = bounded(2048, low=1)
    """Memory that DALI may take per device, in MiB: the sum of GPU memory and page-locked memory."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What is hidden."""

    unit: int = bounded(32, low=1)
    """Side of a mask unit, in pixels. It must be a multiple of the patch size and divide the side of the image."""
    ratio: float = bounded(0.6, above=0, high=1)
    """Share of the units that is hidden, rounded up to whole units."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """How the encoder is pre-trained; each method has keys of its own."""

    name: str = "simmim"
    """Method of pre-training: simmim, or another one that `simmim models` lists."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and arithmetic of the run."""

    epochs: float = 100
    """Passes over the data."""
    steps: int = bounded(0, low=0)
    """Optimiser steps. With 0, epochs gives the length."""
    batch_size: int = bounded(2048, low=1)
    """Images per optimiser step, over all devices and accumulation steps."""
    accumulation_steps: int = bounded(1, low=1)
    """Backward passes per optimiser step. The update is the same as that of the whole batch at once."""
    precision: Literal["float32", "bf16", "fp16"] = "bf16"
    """Compute type of autocast. Weights and optimiser state stay float32; fp16 scales the loss."""
    clip_norm: float = bounded(5.0, low=0)
    """Largest global gradient norm. 0 does not clip."""
    channels_last: bool | None = None
    """Keep images and convolutions in channels-last memory format. The default is true on CUDA, and on any device for a ConvNet that model.name names."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass. This is slower and takes much less memory."""
    sync_batch_norm: bool = True
    """Batch norms take their statistics from the whole batch of all processes, not from the images of each process."""
    compile: bool = False
    """Run the model through torch.compile."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Launch a whole step at once, as a CUDA graph. With auto it is used on CUDA where the step allows it, and the log says why not. With on, a run whose steps do not allow it ends."""
    max_bad_steps: int = bounded(10, low=1)
    """Stop after this many steps in a row with a non-finite loss or gradient. Each of these steps is skipped."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and parameter groups."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    lr: float = bounded(2e-4, above=0)
    """Peak learning rate for a batch of lr_batch images. It is scaled by batch_size / lr_batch."""
    lr_batch: int = bounded(512, low=0)
    """Batch size, in images, that lr, warmup_lr and min_lr are meant for. 0 does not scale them."""
    weight_decay: float = bounded(0.05, low=0)
    """Decoupled weight decay of the parameters that are decayed."""
    betas: tuple[float, float] = bounded((0.9, 0.999), low=0, high=0.9999999)
    """Decay rates of the two moments of AdamW."""
    eps: float = bounded(1e-8, low=1e-30)
    """Epsilon of AdamW."""
    momentum: float = bounded(0.9, low=0, high=0.9999999)
    """SGD's momentum."""
    nesterov: bool = True
    """SGD: use Nesterov's momentum instead of the plain one."""
    decay_position_tables: bool = True
    """Decay relative position tables, as the published pre-training does (its rule that should exempt them never matches)."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate per step: linear warm-up, then the named schedule."""

    name: Literal["cosine", "multistep", "linear", "step", "constant"] = "cosine"
    """Shape of the schedule after the warm-up."""
    warmup_epochs: float = bounded(10, low=0)
    """Length of the warm-up, in epochs."""
    warmup_steps: int = bounded(0, low=0)
    """Length of the warm-up, in steps. With 0, warmup_epochs gives the length."""
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
    """Start the cosine at its peak after the warm-up (microsoft/Swin-Transformer). Otherwise it goes on from where it would be without a warm-up (microsoft/SimMIM)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and when."""

    every_steps: int = bounded(0, low=0)
    """Steps between checkpoints. 0 saves once an epoch, or every 100 steps if epochs are shorter."""
    keep_last: int = bounded(3, low=1)
    """How many of the newest checkpoints are kept."""
    keep_every_steps: int = bounded(0, low=0)
    """Checkpoints at multiples of this many steps are never removed. With 0, none of them is kept for that reason."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown, and when."""

    every_steps: int = bounded(10, low=1)
    """Steps between progress lines. metrics.jsonl always has a row for every step."""
    picture_every_steps: int = bounded(0, low=-1)
    """Steps between reconstruction pictures. 0 draws one with every checkpoint; -1 draws none."""
    pictures: int = bounded(6, low=1, high=64)
    """Images in a reconstruction picture."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Backends of the fused ops."""

    backend: Literal["triton", "native", "reference"] | None = None
    """Backend that every op must use. By default, each op takes the first one that can run."""
    attention: Literal["triton", "native", "xformers", "reference"] | None = None
    """Backend of attention and its projections, if it should not be that of the other ops. reference is PyTorch's scaled_dot_product_attention."""


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Validation on images that are held out of training."""

    path: str = ""
    """Held-out images, given like data.path. Without a path there is no validation."""
    every_epochs: float = bounded(1, low=1e-9)
    """Epochs between validations. The last step is always validated."""
    batch_size: int = bounded(0, low=0)
    """Images per device. 0 takes as many as in training."""
    pictures: int = bounded(6, low=0, high=64)
    """Held-out images whose reconstructions are drawn. 0 draws none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has."""

    seed: int = 0
    """Seed of initialisation, sample order, augmentation, masks and stochastic depth."""
    output: str = ""
    """Run folder. A run that is in it is resumed. The default is runs/NAME-OF-THE-CONFIG."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto takes CUDA if there is a CUDA device."""
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
