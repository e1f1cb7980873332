"""Native CPU kernels (kernels/native/bindings.cpp); tensors are addresses, strides in elements."""

from collections.abc import Sequence

from torch import Tensor

def target() -> str: ...
def use_target(name: str) -> bool: ...
def has_fast_bfloat16() -> bool: ...
def recycled_tensor(shape: Sequence[int], code: int, bits: int) -> Tensor: ...
def release_memory() -> int: ...
def crop_resize(
    image: int,
    row_stride: int,
    shape: Sequence[int],
    box: Sequence[int],
    filter: int,
    flip: bool,
    out: int,
    size: Sequence[int],
) -> None: ...
def gradient_norm(
    arrays: Sequence[int], sizes: Sequence[int], num_threads: int, out: int
) -> None: ...
def masked_l1_loss_forward(
    prediction: int,
    strides: Sequence[int],
    dtype: int,
    row_of_cell: int,
    image: int,
    image_shape: Sequence[int],
    image_strides: Sequence[int],
    image_dtype: int,
    mean: Sequence[float],
    std: Sequence[float],
    mask: int,
    grid: Sequence[int],
    stride: int,
    norm_target: int,
    signs: int,
    num_threads: int,
) -> tuple[float, int]: ...
def expand_signs(
    signs: int,
    rows: int,
    out: int,
    dtype: int,
    num_rows: int,
    runs_per_row: int,
    run: int,
    step: float,
    num_threads: int,
) -> None: ...
def substitute_mask_tokens_forward(
    tokens: int,
    mask: int,
    mask_token: int,
    pos_embed: int,
    out: int,
    rows: int,
    tokens_per_image: int,
    width: int,
    dtype: int,
    num_threads: int,
) -> None: ...
def substitute_mask_tokens_backward(
    grad_out: int,
    mask: int,
    grad_tokens: int,
    grad_mask_token: int,
    rows: int,
    width: int,
    dtype: int,
    num_threads: int,
) -> None: ...
def random_patch_mask(
    ids: int,
    epochs: int,
    epoch_stride: int,
    batch: int,
    rows: int,
    columns: int,
    unit: int,
    num_hidden: int,
    key: int,
    mask: int,
    num_threads: int,
) -> None: ...
