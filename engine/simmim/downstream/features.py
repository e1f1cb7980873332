"""Features of every layer of an encoder in one pass, of a batch or of all images of a source.

Nothing is masked. B batch, L patch tokens, D width of a layer, N images.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simmim.backbone.build import Encoder
from simmim.backbone.convnet import ConvNet
from simmim.data.finetune_views import EvaluationView
from simmim.data.one_pass import one_pass
from simmim.data.source import Source
from simmim.data.unreadable import UnreadableImages
from simmim.distributed import World
from simmim.downstream.evaluate import evaluation_view
from simmim.errors import DataError, RunError
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel
from simmim.model.weights_file import best_weights
from simmim.training.precision import autocast
from simmim.weights.load import encoder_of, model_of, read_model

OUTPUT = "output"

# How the tokens of an image become its features.
POOLS = ("mean", "cls", "none")


class FeatureOptions(TypedDict, total=False):
    """What every function here that reads a source takes.

    Attributes:
        layers: names as `layer_names` has them; all of them where not given.
        pool: see `layer_features`.
        samples: numbers of the images to take, in this order; all where not given.
        batch_size: images per forward pass (64).
        view: makes the model's inputs; `evaluation_view(model)` where not given.
        workers: decoding processes; 0 decodes here; -1 (default) chooses.
        precision: compute type, "float32", "bf16" or "fp16"; features are float32 in any.
        timeout_s: seconds after which a process that is still at one image is replaced (120).
        report: told, in a line, of images that cannot be read and of replaced processes (print).
        advance: told how many images each batch had.
    """

    layers: Sequence[str] | None
    pool: str
    samples: Sequence[int] | NDArray[np.int64] | None
    batch_size: int
    view: EvaluationView | None
    workers: int
    precision: str
    timeout_s: float
    report: Callable[[str], None]
    advance: Callable[[int], None] | None


class FeatureBatch(NamedTuple):
    """Features of some images.

    Attributes:
        ids: int64 [B] on the CPU, numbers of the images in their source.
        layers: name → float32 [B, D] ([B, L, D] without pooling) on the model's device.
    """

    ids: Tensor
    layers: dict[str, Tensor]


@dataclass(frozen=True)
class Features:
    """Features of the readable images of a source.

    Attributes:
        ids: int64 [N], numbers of the images in their source.
        layers: name → [N, D] ([N, L, D] without pooling) on the CPU.
    """

    ids: NDArray[np.int64]
    layers: dict[str, Tensor]


def load_for_features(
    path: str | Path, image_size: int | Sequence[int] | None = None
) -> ImageModel:
    """The model of any checkpoint that has an encoder, in evaluation mode on the CPU.

    Args:
        path: as for `load_model`; of a fine-tuning run's folder, its best weights.
        image_size: as for `load_model`.

    Returns:
        A `Classifier` where there is a class head, else the encoder alone.

    Raises:
        ValueError: see `load_model`; a missing decoder or head is no reason.
    """
    weights = read_model(best_weights(path), image_size)
    return model_of(weights) if weights.kind == "classifier" else encoder_of(weights)


def blocks_of(encoder: Encoder) -> list[nn.Module]:
    """The blocks of an encoder, first to last.

    Their outputs are [B, …, D], with the class token first where the encoder has one; of a ConvNet
    they are maps, [B, D, …, …].
    """
    if isinstance(encoder, ConvNet):
        return encoder.blocks_in_order()
    found: list[nn.Module] = []
    # a ViT has its blocks in one list, a Swin in stages
    for stage in getattr(encoder, "layers", [encoder]):
        found += getattr(stage, "blocks", [])
    if not found:
        raise ValueError(f"the layers of a {type(encoder).__name__} are not known here")
    return found


def has_class_token(encoder: Encoder) -> bool:
    """Whether the first token of every block's output is no patch."""
    return getattr(encoder, "cls_token", None) is not None


def layer_names(model: ImageModel) -> list[str]:
    """What layers are called: "block 1" … "block N", "output" (the last after the final norm)."""
    return [f"block {n}" for n in range(1, len(blocks_of(model.encoder)) + 1)] + [OUTPUT]


def pick_layers(model: ImageModel, text: str) -> list[str]:
    """The layers that a text means: "all", or a list of numbers and "output", as "6,8,output".

    Returns:
        Names, in the model's order.

    Raises:
        ValueError: the model has no such layer.
    """
    names = layer_names(model)
    if text == "all":
        return names
    wanted = {part if part == OUTPUT else f"block {part}" for part in text.split(",")}
    if not wanted <= set(names):
        raise ValueError(
            f'layer "{text}": the model has blocks 1 to {len(names) - 1}, and "{OUTPUT}"'
        )
    return [name for name in names if name in wanted]


@torch.no_grad()
def layer_features(
    model: ImageModel,
    image: Tensor,
    layers: Sequence[str] | None = None,
    *,
    pool: str = "mean",
    precision: str = "float32",
) -> dict[str, Tensor]:
    """Features of several layers by one forward pass in evaluation mode, without a gradient.

    Args:
        model: left in the mode it was in.
        image: [B, C, H, W], uint8 or normalised, on the model's device.
        layers: names as `layer_names` has them; None takes all.
        pool: "mean" of the patch tokens, "cls" (the class token), or "none" (the patch tokens, row
            by row). The output's mean of a fine-tuned ViT is normalised as its head sees it.
        precision: compute type, "float32", "bf16" or "fp16".

    Returns:
        Name → float32 [B, D], or [B, L, D] without pooling, in the model's order. The stages of a
        Swin or ConvNet differ in L and D.

    Raises:
        ValueError: an unknown layer, or the class token of an encoder that has none.
    """
    wanted = _checked(model, layers, pool)
    blocks = dict(zip(layer_names(model), blocks_of(model.encoder)))
    found: dict[str, Tensor] = {}

    def keep(name: str, tokens: Tensor) -> None:
        if isinstance(model.encoder, ConvNet):
            tokens = tokens.permute(0, 2, 3, 1)
        tokens = tokens.flatten(1, -2)  # [B, (1 +) L, D]
        if pool == "cls":
            found[name] = tokens[:, 0].float()
            return
        patches = tokens[:, 1:] if has_class_token(model.encoder) else tokens
        found[name] = patches.mean(1, dtype=torch.float32) if pool == "mean" else patches.float()

    def keep_when_run(name: str, module: nn.Module) -> None:
        hook = module.register_forward_hook(lambda _module, _inputs, out: keep(name, out))
        hooks.callback(hook.remove)

    training = model.training
    model.eval()
    try:
        with ExitStack() as hooks, autocast(image.device, precision):
            for name in wanted:
                if name != OUTPUT:
                    keep_when_run(name, blocks[name])
            if OUTPUT in wanted and pool == "cls":
                keep_when_run(OUTPUT, model.encoder.get_submodule("norm"))
            features = model.encode(image)  # [B, D, h, w]
            if OUTPUT in wanted and pool != "cls":
                patches = features.flatten(2).transpose(1, 2)
                found[OUTPUT] = patches.float() if pool == "none" else _mean(model, patches)
    finally:
        model.train(training)
    return {name: found[name] for name in wanted}


def _mean(model: ImageModel, patches: Tensor) -> Tensor:
    mean = patches.mean(1, dtype=torch.float32)
    return model.fc_norm(mean).float() if isinstance(model, Classifier) else mean


def _checked(model: ImageModel, layers: Sequence[str] | None, pool: str) -> list[str]:
    names = layer_names(model)
    if pool not in POOLS:
        raise ValueError(f"pool={pool}: choose one of {', '.join(POOLS)}")
    if pool == "cls" and not has_class_token(model.encoder):
        raise ValueError(
            f"a {type(model.encoder).__name__} has no class token; pool its patch tokens (mean)"
        )
    if layers is None:
        return names
    if unknown := set(layers) - set(names):
        raise ValueError(f"no layer {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [name for name in names if name in layers]


def feature_shapes(
    model: ImageModel, layers: Sequence[str] | None = None, pool: str = "mean"
) -> dict[str, tuple[int, ...]]:
    """The shape of one image's features in every layer: (D,), or (L, D) without pooling."""
    spec = model.encoder.spec
    blank = torch.zeros(1, spec.channels, *spec.image_size, device=model.mean.device)
    found = layer_features(model, blank, layers, pool=pool)
    return {name: tuple(values.shape[1:]) for name, values in found.items()}


def feature_batches(
    model: ImageModel, source: Source, **options: Unpack[FeatureOptions]
) -> Generator[FeatureBatch, None, None]:
    """Features of every image of a source, batch by batch, in order.

    Images that cannot be read are left out, and reported by name after the last batch. The views
    are those of evaluation: nothing is drawn.

    Args:
        model: runs where it lies; left in the mode it was in.
        source: images.
        options: see `FeatureOptions`.

    Raises:
        DataError: none of the images can be read.
        ValueError: see `layer_features`.
    """
    layers, pool = options.get("layers"), options.get("pool", "mean")
    report = options.get("report", print)
    samples, advance = options.get("samples"), options.get("advance")
    world = World(0, 1, model.mean.device)
    unreadable = UnreadableImages(source, world)
    batches = one_pass(
        source,
        options.get("view") or evaluation_view(model),
        world,
        batch_size=options.get("batch_size", 64),
        workers=options.get("workers", -1),
        samples=samples,
        timeout_s=options.get("timeout_s", 120),
        report=report,
        note_problem=unreadable.note,
    )
    with closing(batches):
        for batch in batches:
            ids = batch.ids.cpu()
            if batch.num_valid:
                found = layer_features(
                    model,
                    batch.image,
                    layers,
                    pool=pool,
                    precision=options.get("precision", "float32"),
                )
                if batch.num_valid < len(ids):
                    readable = batch.ids >= 0
                    found = {name: values[readable] for name, values in found.items()}
                yield FeatureBatch(ids[ids >= 0], found)
            if advance is not None:
                advance(len(ids))
    asked = range(len(source.names)) if samples is None else samples
    problems = unreadable.agree()
    unreadable.report(problems, report, "unreadable, left out", len(asked))
    if len(problems) == len(set(asked)):
        first = unreadable.describe(problems[0]) if problems else "there are none"
        raise DataError(f"none of the {len(asked)} images could be read ({first})")


def extract_features(
    model: ImageModel,
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Unpack[FeatureOptions],
) -> Features:
    """Features of every readable image of a source, in memory.

    Args:
        model: runs where it lies.
        source: images, such as `simmim.data.open.open_source` gives.
        dtype: of what is kept.
        options: see `FeatureOptions`.

    Raises:
        DataError: none of the images can be read.
        RunError: features are not finite.
        ValueError: see `layer_features`.
    """
    shapes = feature_shapes(model, options.get("layers"), options.get("pool", "mean"))
    samples = options.get("samples")
    count = len(source.names if samples is None else samples)
    kept = {name: torch.empty(count, *shape, dtype=dtype) for name, shape in shapes.items()}
    ids = np.empty(count, dtype=np.int64)
    done = 0
    with closing(feature_batches(model, source, **options)) as batches:
        for batch in batches:
            rows = slice(done, done + len(batch.ids))
            ids[rows] = batch.ids.numpy()
            for name, values in batch.layers.items():
                kept[name][rows] = values
            done = rows.stop
    for name, values in kept.items():
        if not_finite := count_not_finite(values[:done]):
            raise RunError(
                f"{name}: features of {not_finite} of {done} images are not finite, or beyond "
                f"{dtype}; compute and keep them in float32"
            )
    return Features(ids[:done], {name: values[:done] for name, values in kept.items()})


def count_not_finite(features: Tensor) -> int:
    """How many rows of [N, …] hold a value that is not finite."""
    # piece by piece: the mask of all of them would be as long as the features
    parts = (part.flatten(1).isfinite().all(1) for part in torch.split(features, 4096))
    return sum(int((~finite).sum()) for finite in parts)


def bytes_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of one image's features of several layers."""
    return sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
