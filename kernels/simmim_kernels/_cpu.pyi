"""Native CPU kernels (kernels/native/bindings.cpp); arguments are addresses and sizes."""

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
