"""Pictures for tests of colour and of crops."""

import numpy as np
import torch


def pictures(count: int, size: tuple[int, int] = (37, 50), channels: int = 3) -> np.ndarray:
    """Smooth and noisy images in turn, uint8 [count, H, W, C]."""
    generator = np.random.default_rng(3)
    noise = generator.integers(0, 256, (count, *size, channels), dtype=np.uint8)
    for number in range(0, count, 2):
        small = torch.from_numpy(noise[number, :7, :9]).permute(2, 0, 1)[None].float()
        smooth = torch.nn.functional.interpolate(small, size, mode="bilinear")[0]
        noise[number] = smooth.permute(1, 2, 0).byte().numpy()
    return noise
