"""Mean absolute error over hidden pixels, and the published target normalisation, in plain PyTorch.

B batch, C channels, H W pixels, gh gw mask cells, h w cells of the prediction, s their side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def normalise_pixels(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 or 0–255 [B, C, H, W] → float32 (x / 255 - mean) / std, per channel."""
    scale = 1.0 / (255.0 * std)
    return image.float() * scale.view(-1, 1, 1) - (mean / std).view(-1, 1, 1)


def local_statistics(image: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and √(var + 1e-6) over a window × window neighbourhood cut off at the border."""

    def local_mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1, padding=window // 2, count_include_pad=False)

    mean = local_mean(image)
    ones = torch.ones_like(image[:1, :1])
    # avg_pool2d that counts the padding gives n / window²; n is the pixels inside the image
    count = F.avg_pool2d(ones, window, 1, window // 2, count_include_pad=True) * window**2
    variance = (local_mean(image.square()) - mean.square()) * (count / (count - 1))
    return mean, (variance.clamp(min=0) + 1e-6).sqrt()


def normalise_target(image: Tensor, window: int) -> Tensor:
    """(x - mean) / √(var + 1e-6) over a window × window neighbourhood cut off at the border."""
    mean, deviation = local_statistics(image, window)
    return (image - mean) / deviation


def shuffle_pixels(prediction: Tensor, stride: int) -> Tensor:
    """[B, h, w, C·s·s] in PixelShuffle order → [B, C, h·s, w·s]."""
    B, h, w, width = prediction.shape
    channels = width // stride**2
    cells = prediction.reshape(B, h, w, channels, stride, stride)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(B, channels, h * stride, w * stride)


def masked_l1_loss(
    prediction: Tensor, image: Tensor, mask: Tensor, norm_target: int | None
) -> Tensor:
    """Σ|x - x̂|·M / (ΣM + 1e-5) / C; both [B, C, H, W], mask bool [B, gh, gw] on any grid."""
    rows, columns = image.shape[2] // mask.shape[1], image.shape[3] // mask.shape[2]
    prediction, image = prediction.float(), image.float()
    if norm_target is not None:
        image = normalise_target(image, norm_target)
    hidden = mask.repeat_interleave(rows, 1).repeat_interleave(columns, 2).unsqueeze(1)
    # `where` and not a product: a NaN under a visible pixel must reach neither loss nor gradient
    error = torch.where(hidden, prediction - image, 0.0).abs().sum()
    return error / (hidden.sum() + 1e-5) / image.shape[1]
