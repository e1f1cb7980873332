"""Predicts the classes of images in files, folders, shards or memory."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from simmim.data.decode import MAX_PIXELS
from simmim.data.one_pass import one_pass
from simmim.data.open import open_source
from simmim.data.source import PackedStrings, Source, read_file
from simmim.distributed import World
from simmim.downstream.evaluate import evaluation_view, load_classifier
from simmim.errors import DataError
from simmim.model.classifier import Classifier
from simmim.model.image_model import evaluation_mode
from simmim.training.precision import autocast

# What `predict` takes as an image, or as several.
Images = str | Path | Image.Image | NDArray[Any] | Tensor

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class Prediction:
    """One answer to one image.

    Attributes:
        label: the class's name.
        index: its number in `model.classes`.
        probability: softmax of the logits, 0 to 1.
    """

    label: str
    index: int
    probability: float


def predict(
    model: Classifier | str | Path,
    images: Images | Sequence[Images],
    top_k: int = 5,
    *,
    batch_size: int = 64,
    workers: int = 0,
    precision: str = "float32",
    value_range: tuple[float, float] | None = None,
) -> list[list[Prediction]]:
    """The most probable classes of images of any size and mode.

    Args:
        model: a classifier, which runs on the device where it lies; or its checkpoint, which runs
            on a CUDA device if there is one.
        images: one of these, or a list of them: a path (an image file, a folder of images,
            shards), a PIL image, a uint8 array [H, W], [H, W, C] or [B, H, W, C], or a uint8 tensor
            [C, H, W] or [B, C, H, W]. Values are 0–255.
        top_k: answers per image; no more than there are classes.
        batch_size: images that the model sees at a time.
        workers: decoding processes; 0 decodes here; -1 chooses.
        precision: compute type, a key of `simmim.training.precision.DTYPES`.
        value_range: the values that become 0 and 255 in images of other than 8 bits; see
            `simmim.data.decode.decode`.

    Returns:
        For every image, in order, its `Prediction`s, the most probable first.

    Raises:
        ValueError: the model is no classifier, or an image is missing, unreadable or of an unknown
            kind; names it.
    """
    if isinstance(model, torch.nn.Module) and not isinstance(model, Classifier):
        raise ValueError(
            f"a {type(model).__name__} has no class head; `simmim finetune` makes a classifier"
        )
    if not isinstance(model, Classifier):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_classifier(model).to(device)
    parts = images if isinstance(images, list | tuple) else [images]
    try:
        source = join_sources([_open(part, number) for number, part in enumerate(parts)])
    except DataError as error:
        raise ValueError(str(error)) from None
    answers = []
    for sample, answer in classify(
        model,
        source,
        top_k=top_k,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        value_range=value_range,
    ):
        if isinstance(answer, str):
            raise ValueError(f"{source.names[sample]}: {answer}")
        answers.append(answer)
    return answers


def classify(
    model: Classifier,
    source: Source,
    *,
    top_k: int = 5,
    batch_size: int = 64,
    workers: int = -1,
    precision: str = "float32",
    value_range: tuple[float, float] | None = None,
) -> Iterator[tuple[int, list[Prediction] | str]]:
    """Classify every image of a source, in order.

    Args:
        model: runs on the device where it lies; its mode stays as it was.
        source: images.
        top_k: see `predict`.
        batch_size: see `predict`.
        workers: see `predict`.
        precision: see `predict`.
        value_range: see `predict`.

    Yields:
        (sample, its predictions), or (sample, why there are none).

    Raises:
        ValueError: `top_k` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: choose at least 1")
    count = min(top_k, len(model.classes))
    device = model.mean.device
    reasons: dict[int, str] = {}
    batches = one_pass(
        source,
        evaluation_view(model, value_range=value_range),
        World(0, 1, device),
        batch_size=batch_size,
        workers=workers,
        note_problem=reasons.__setitem__,
    )
    first = 0
    with evaluation_mode(model), closing(batches):
        for batch in batches:
            with torch.no_grad(), autocast(device, precision):
                logits = model(batch.image)
            best = logits.float().softmax(1).topk(count, dim=1)
            shares, indices = best.values.tolist(), best.indices.tolist()
            for slot in range(len(batch.ids)):
                sample = first + slot
                if sample in reasons:
                    yield sample, f"not a readable image ({reasons.pop(sample)})"
                elif not math.isfinite(shares[slot][0]):
                    yield sample, f"the model's answer is not finite in {precision}"
                else:
                    pairs = zip(indices[slot], shares[slot])
                    yield sample, [Prediction(model.classes[i], i, share) for i, share in pairs]
            first += len(batch.ids)


def open_images(paths: Sequence[str]) -> Source:
    """The images that paths mean, in their order: files, folders, shards.

    Raises:
        DataError: nothing is there, or a folder has no images; names the path.
    """
    return join_sources([_open_path(path) for path in paths])


def _open_path(path: str) -> Source:
    place = Path(path).expanduser()
    if place.is_dir():
        return _Named(open_source(path), f"{path.rstrip('/')}/")
    if place.suffix == ".tar" and place.is_file():
        return open_source(path)
    if not place.exists():
        raise DataError(f"{path}: no such file or folder")
    return _Files([str(place)])


def _open(image: Any, number: int) -> Source:
    if isinstance(image, str | Path):
        return _open_path(str(image))
    if isinstance(image, Image.Image):
        return _InMemory([image], number)
    if isinstance(image, Tensor):
        values = image.detach().cpu().numpy()
        if values.ndim not in (3, 4):
            raise ValueError(
                f"image {number}: a tensor of shape {list(values.shape)} is no [C, H, W]"
            )
        image = np.moveaxis(values, -3, -1)
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"image {number}: {type(image).__name__} is no path, PIL image, array or tensor"
        )
    if image.dtype != np.uint8:
        raise ValueError(
            f"image {number}: values of type {image.dtype}; give uint8, 0 to 255 (images that are "
            "normalised go into the model itself)"
        )
    if image.ndim not in (2, 3, 4) or 0 in image.shape:
        raise ValueError(f"image {number}: an array of shape {list(image.shape)} is no [H, W, C]")
    return _InMemory(list(image) if image.ndim == 4 else [image], number)


class _Files:
    """Image files of any name."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.names = PackedStrings(paths)

    def read(self, index: int) -> bytes:
        return read_file(self.names[index])


class _Named:
    """The images of another source, with a prefix to their names."""

    def __init__(self, source: Source, prefix: str) -> None:
        self._source = source
        self.names = PackedStrings([f"{prefix}{name}" for name in source.names])

    def read(self, index: int) -> bytes:
        return self._source.read(index)


class _InMemory:
    """Images in memory, encoded without loss, so that they are read by the rules for files."""

    def __init__(self, images: Sequence[Image.Image | NDArray[Any]], first: int) -> None:
        self._images = images
        several = len(images) > 1
        self.names = PackedStrings(
            [f"image {first}" + (f"[{n}]" if several else "") for n in range(len(images))]
        )

    def read(self, index: int) -> bytes:
        try:
            return _encode(self._images[index])
        except OSError:
            raise
        except Exception as error:
            # of a picture that is still in its file, which Pillow reads only now
            raise OSError(str(error) or type(error).__name__) from None


def _encode(image: Image.Image | NDArray[Any]) -> bytes:
    """An image as PNG or .npy, whichever keeps all its values."""
    if not isinstance(image, Image.Image):
        if image.ndim == 3 and image.shape[2] not in (1, 2, 3, 4):
            return _npy(image)
        grey = image.ndim == 3 and image.shape[2] == 1
        image = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if grey else image))
    if image.width * image.height > MAX_PIXELS:
        raise OSError(f"{image.width}×{image.height} pixels, more than {MAX_PIXELS}")
    image = ImageOps.exif_transpose(image)
    if image.mode == "I":  # 16 bits that Pillow holds in 32
        return _npy(np.clip(np.asarray(image), 0, 65535).astype(np.uint16))
    if image.mode == "F" or image.mode.startswith("I;16"):
        return _npy(np.asarray(image))
    if image.mode not in PNG_MODES:
        image = image.convert("RGBA" if image.mode in ("PA", "La", "RGBa") else "RGB")
    data = io.BytesIO()
    image.save(data, format="PNG", compress_level=0)
    return data.getvalue()


def _npy(values: NDArray[Any]) -> bytes:
    data = io.BytesIO()
    np.save(data, values, allow_pickle=False)
    return data.getvalue()


class _Joined:
    """The images of several sources, one source after another."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part.names) for part in parts])
        self.names = PackedStrings.joined([part.names for part in parts])

    def read(self, index: int) -> bytes:
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[part - 1]) if part else 0
        return self._parts[part].read(index - start)


def join_sources(parts: Sequence[Source]) -> Source:
    """The images of several sources, one source after another."""
    return parts[0] if len(parts) == 1 else _Joined(parts)
