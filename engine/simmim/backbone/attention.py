"""Position biases of global attention; `window_attention` supplies those of windows.

N heads, L patch tokens, h w rows and columns of them.
"""

import torch
from torch import Tensor

from simmim_kernels.window_attention import relative_position_bias


def relative_position_bias_with_cls(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """`relative_position_bias` with a leading class token, [N, 1 + h·w, 1 + h·w].

    The last three rows of the table are class-to-patch, patch-to-class and class-to-class.
    """
    patches = relative_position_bias(table[:-3], grid)  # [N, L, L]
    num_heads, length, _ = patches.shape
    cls_to_patch, patch_to_cls, cls_to_cls = table[-3:].unbind(0)  # [N] each
    left = patch_to_cls.view(-1, 1, 1).expand(num_heads, length, 1)
    top = torch.cat(
        [cls_to_cls.view(-1, 1, 1), cls_to_patch.view(-1, 1, 1).expand(num_heads, 1, length)], 2
    )
    return torch.cat([top, torch.cat([left, patches], 2)], 1)
