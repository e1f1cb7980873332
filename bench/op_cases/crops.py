"""Crop and resize of a photo, as data workers do it, beside Pillow."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.op_cases.case import Case
from bench.op_cases.shapes import IMAGE
from simmim_kernels import crop_resize


def crop(units: Tensor, backend: str) -> Case:
    # a typical crop of a typical photo of ImageNet
    photo = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    box, size = (30, 20, 450, 340), (IMAGE, IMAGE)
    picture = Image.fromarray(photo)
    out = np.empty((*size, 3), dtype=np.uint8)
    left, top, width, height = box

    def pillow() -> list[Tensor]:
        cropped = picture.crop((left, top, left + width, top + height))
        # rows first, as Pillow before 13 always does
        rows = cropped.resize((IMAGE, height), Image.Resampling.BILINEAR)
        out[:] = rows.resize(size, Image.Resampling.BILINEAR)
        return [torch.from_numpy(out)]

    def ours() -> list[Tensor]:
        return [torch.from_numpy(crop_resize(photo, box, size, backend=backend))]

    return Case("crop_resize", {"ours": ours, "eager": pillow}, 0.0, None, {})
