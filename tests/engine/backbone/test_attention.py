"""Position bias with a class token."""

import torch

from simmim.backbone.attention import relative_position_bias_with_cls
from simmim_kernels.window_attention.reference import relative_position_bias


def test_relative_position_bias_with_class_token() -> None:
    table = torch.randn(3 * 5 + 3, 2)
    bias = relative_position_bias_with_cls(table, (2, 3))
    assert bias.shape == (2, 7, 7)
    assert torch.equal(bias[:, 1:, 1:], relative_position_bias(table[:-3], (2, 3)))
    assert torch.equal(bias[:, 0, 1:], table[-3].unsqueeze(1).expand(2, 6))
    assert torch.equal(bias[:, 1:, 0], table[-2].unsqueeze(1).expand(2, 6))
    assert torch.equal(bias[:, 0, 0], table[-1])
