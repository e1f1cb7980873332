"""How the signs of errors are kept for the backward pass: two bits a pixel, 16 pixels a word."""

from collections.abc import Sequence


def signs_shape(prediction_shape: Sequence[int], channels: int, stride: int) -> list[int]:
    """Shape of the sign words of a prediction: one row per run of pixels, 16 pixels a word.

    The runs are an image's rows (stride 0), or the rows of a cell: [B, h, w, C·stride, words].
    """
    if stride == 0:
        return [*prediction_shape[:-1], -(-prediction_shape[-1] // 16)]
    return [*prediction_shape[:-1], channels * stride, -(-stride // 16)]
