"""The launches that the report compiles: every op on the tensors of models that people train."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from simmim_kernels.linear_masked_l1_loss import triton_kernel as linear
from simmim_kernels.masked_l1_loss import triton_kernel as loss
from simmim_kernels.masked_l1_loss.arguments import Target
from simmim_kernels.merge_patches import triton_kernel as merge_kernel
from simmim_kernels.random_patch_mask import triton_kernel as random_mask
from simmim_kernels.report.models import (
    ATTENTIONS,
    BLOCKS,
    MERGES,
    MODELS,
    POST_NORM_BLOCKS,
    Attention,
    Block,
    Merge,
    Model,
)
from simmim_kernels.substitute_mask_tokens import triton_kernel as substitute
from simmim_kernels.transformer_block import triton_norms as norms
from simmim_kernels.transformer_block import triton_rows as rows
from simmim_kernels.window_attention import triton_kernel as attention_kernel
from simmim_kernels.window_attention.arguments import Windows

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """An op on tensors of one shape.

    Attributes:
        op: name of the op's folder.
        model: whose shapes these are.
        dtype: of the activations, without "torch.".
        make: calls the op's launch functions, forward and backward, on CPU tensors of the real
            shapes, made by `torch.empty`.
        bytes_needed: the fewest bytes that any implementation moves: each input read once and each
            output written once, without what need not be read or may stay in registers.
        bytes_moved: what ours moves; a formula that the op's tests compare with the interpreter's
            byte counts. None models it: every launch moves each tensor that it is given once.
    """

    op: str
    model: str
    dtype: str
    make: Callable[[], object]
    bytes_needed: int
    bytes_moved: int | None = None

    @property
    def name(self) -> str:
        return f"{self.op}/{self.model}/{self.dtype}"


def cases() -> list[Case]:
    """Every op with Triton kernels on the tensors of every model, forward and backward."""
    return [
        *(case for model in MODELS for case in model_cases(model)),
        *(case for block in BLOCKS for case in block_cases(block)),
        *(post_norm_case(block) for block in POST_NORM_BLOCKS),
        *(merge_case(merge) for merge in MERGES),
        *(attention_case(attention) for attention in ATTENTIONS),
    ]


def model_cases(model: Model) -> list[Case]:
    """The mask, the mask tokens and the losses of a model."""
    losses = [
        loss_case(model, from_tokens, dtype)
        for from_tokens in (False, True)
        for dtype in (BF16, torch.float32)
    ]
    return [mask_case(model), substitute_case(model), *losses, linear_loss_case(model)]


def mask_case(model: Model) -> Case:
    """The mask of every image, from its key."""

    def make() -> None:
        ids, units = torch.empty(model.batch, dtype=torch.int64), model.units
        unit = math.isqrt(model.tokens) // units
        random_mask.forward(ids, torch.tensor(0), 1 << 40, units, units, unit, 1)

    id_and_mask = 8 + model.tokens
    return Case("random_patch_mask", model.name, "int64", make, model.batch * id_and_mask)


def substitute_case(model: Model) -> Case:
    """Mask tokens in place of hidden ones, and both gradients."""
    B, L, D = model.batch, model.tokens, model.width

    def make() -> None:
        tokens = torch.empty(B, L, D, dtype=BF16)
        mask = torch.empty(B, L, dtype=torch.bool)
        substitute.forward(tokens, mask, tokens[0, 0], None)
        substitute.backward(tokens, mask)

    # visible tokens to the output; the gradients of the output and of the tokens; the mask and the
    # mask token, forward and backward
    needed = int(B * L * D * (1 - model.hidden_share)) * 2 + 3 * B * L * D * 2 + 2 * B * L + 4 * D
    partial = -(-B * L // substitute.ROWS_PER_PROGRAM) * D * 4
    return Case(
        "substitute_mask_tokens", model.name, "bfloat16", make, needed, needed + 2 * partial
    )


def loss_case(model: Model, from_tokens: bool, dtype: torch.dtype) -> Case:
    """The loss of a prediction in either layout: of bytes in bfloat16, of normalised pixels in
    float32.
    """
    of_bytes = dtype == BF16
    stride = model.stride if from_tokens else 0
    image_shape = (model.batch, 3, model.side, model.side)
    shape = (model.batch, model.cells, model.cells, 3 * stride**2) if stride else image_shape

    def make() -> None:
        image = torch.empty(image_shape, dtype=torch.uint8 if of_bytes else torch.float32)
        mask = torch.zeros(model.batch, model.units, model.units, dtype=torch.bool)
        mean, std = (torch.empty(3) if of_bytes else None for _ in range(2))
        prediction = torch.empty(shape, dtype=dtype)
        target = Target(image, mask, mean, std, stride, 0)
        _, per_pixel, signs = loss.forward(prediction, target, True)
        loss.backward(torch.empty(()), per_pixel, signs, shape, dtype)

    pixels, hidden = math.prod(image_shape), model.hidden_pixels
    image_size = 1 if of_bytes else 4
    # sign words go out once and in once; both are part of any split in two passes
    needed = hidden * (dtype.itemsize + image_size) + pixels * dtype.itemsize
    needed += 2 * model.sign_bytes + 2 * model.batch * model.units**2
    partial = -(-pixels // 16 // loss.GROUPS_PER_PROGRAM) * 8
    op = "masked_l1_loss_from_tokens" if from_tokens else "masked_l1_loss"
    name = str(dtype).removeprefix("torch.")
    return Case(op, model.name, name, make, needed, needed + partial)


def linear_loss_case(model: Model) -> Case:
    """The prediction head and the loss in one.

    Matrix products read their factors once per tile, from the L2 cache but for the first time: the
    model is that of an ideal cache.
    """
    B, cells, D = model.batch, model.cells, model.head_width
    outputs = 3 * model.stride**2

    def make() -> None:
        features = torch.empty(B, cells, cells, D, dtype=BF16)
        weight, bias = torch.empty(outputs, D, dtype=BF16), torch.empty(outputs, dtype=BF16)
        image = torch.empty(B, 3, model.side, model.side, dtype=torch.uint8)
        mask = torch.zeros(B, model.units, model.units, dtype=torch.bool)
        target = Target(image, mask, torch.empty(3), torch.empty(3), model.stride, 0)
        _, per_pixel, signs = linear.forward(features, weight, bias, target, True)
        scalars = torch.empty(()), per_pixel
        linear.backward(*scalars, signs, features, weight, mask, model.stride, True, True)

    share, feature_bytes = model.hidden_share, B * cells**2 * D * 2
    needed = (
        int(feature_bytes * share) * 2  # features, forward and for the weight's gradient
        + feature_bytes  # their gradient, zeros included
        + outputs * D * 2 * 3  # weight twice, its gradient
        + model.hidden_pixels  # bytes of the image
        + model.sign_bytes
        + int(model.sign_bytes * share) * 3
    )
    return Case("linear_masked_l1_loss", model.name, "bfloat16", make, needed, needed)


def block_cases(block: Block) -> list[Case]:
    """The row passes of both branches of a block.

    Matrix products and attention are not among them, and neither is their traffic: the fewest bytes
    possible are those of one read of what they leave and one write of what they are given.
    """
    T, C, M = block.batch * block.tokens, block.width, block.hidden
    tokens, wide, vector = torch.empty(T, C, dtype=BF16), torch.empty(T, M, dtype=BF16), (C,)
    gamma = torch.empty(vector) if block.scaled else None
    branch_scale = torch.empty(block.batch) if block.scaled else None

    def norm_and_sum() -> torch.Tensor:
        """Partial sums of what is summed over the tokens."""
        weight, bias = torch.empty(vector), torch.empty(vector)
        _, mean, rstd = norms.layer_norm(tokens, weight, bias, 1e-5)
        rows.add_branch(torch.empty_like(tokens), tokens, bias, gamma, branch_scale)
        grad_out, dy = torch.empty_like(tokens), torch.empty_like(tokens)
        _, partial = norms.layer_norm_backward(
            grad_out, dy, tokens, mean, rstd, weight, bias, branch_scale, None, True
        )
        return partial

    def make_mlp() -> None:
        of_norm, bias = norm_and_sum(), torch.empty(M)
        rows.gelu(wide, bias)
        _, of_bias = rows.gelu_backward(torch.empty_like(wide), wide, bias, branch_scale, True)
        rows.added(of_norm, of_bias)

    def make_attention() -> None:
        of_norm = norm_and_sum()
        if branch_scale is not None:
            rows.scale_images(tokens, branch_scale)
        rows.added(of_norm, rows.column_partial(torch.empty(T, 3 * C, dtype=BF16)))

    def partial_bytes(columns: int, across: int) -> int:
        """Partial sums over the tokens, written and read."""
        return 2 * 4 * columns * -(-T // rows.rows_per_program(T, across))

    def across(columns: int) -> int:
        return -(-columns // rows.tile(columns)[1])

    image_factors = 4 * block.batch if block.scaled else 0
    # x to y and statistics; x and branch to the output; grad_out, dy, x and statistics to dx and y
    shared = 2 * T * C * (2 + 3 + 5) + 2 * 8 * T
    shared += 4 * C * (2 + 1 + 2 + 3 + block.scaled) + 2 * image_factors
    # hidden to a; hidden and da to a and dh
    mlp = shared + 2 * T * M * (2 + 4) + 4 * M * 3 + image_factors
    attention = shared + 2 * T * 3 * C + 4 * 3 * C
    if block.scaled:
        attention += 2 * T * C * 2 + image_factors
    of_norm = 3 * partial_bytes(C, 1)
    of_mlp, of_attention = partial_bytes(M, across(M)), partial_bytes(3 * C, across(3 * C))
    return [
        Case("residual_mlp", block.model, "bfloat16", make_mlp, mlp, mlp + of_norm + of_mlp),
        Case(
            "residual_attention",
            block.model,
            "bfloat16",
            make_attention,
            attention,
            attention + of_norm + of_attention,
        ),
    ]


def post_norm_case(block: Block) -> Case:
    """The row passes of the MLP's branch; as of a block, without the products' own traffic."""
    T, C, M = block.batch * block.tokens, block.width, block.hidden

    def make() -> None:
        tokens, wide = (torch.empty(T, width, dtype=BF16) for width in (C, M))
        vector, bias = torch.empty(C), torch.empty(M)
        branch_scale = torch.empty(block.batch) if block.scaled else None
        rows.gelu(wide, bias)
        _, mean, rstd = norms.add_normalised(
            tokens, tokens, vector, vector, vector, branch_scale, 1e-5
        )
        _, of_norm = norms.add_normalised_backward(
            tokens, tokens, mean, rstd, vector, vector, branch_scale, True
        )
        _, of_bias = rows.gelu_backward(torch.empty_like(wide), wide, bias, None, True)
        rows.added(of_norm, of_bias)

    # branch and x to the output and statistics; grad_out, branch and statistics to the branch's;
    # hidden to a; hidden and da to a and dh
    needed = 2 * T * C * (3 + 3) + 2 * 8 * T + 4 * C * (3 + 2 + 3)
    needed += 2 * T * M * (2 + 4) + 4 * M * 3
    needed += 2 * 4 * block.batch if block.scaled else 0
    across = -(-M // rows.tile(M)[1])
    partial = 3 * C * -(-T // rows.rows_per_program(T, 1))
    partial += M * -(-T // rows.rows_per_program(T, across))
    return Case("post_norm_block", block.model, "bfloat16", make, needed, needed + 2 * 4 * partial)


def attention_case(attention: Attention) -> Case:
    """Attention and all its gradients."""
    (H, W), N, S = attention.side, attention.num_heads, math.prod(attention.window)
    C = N * attention.head_width
    windows = Windows(N, attention.window, attention.shift, attention.head_width**-0.5)
    offsets = math.prod(2 * side - 1 for side in attention.window)

    def make() -> None:
        qkv = torch.empty(attention.batch, H, W, 3 * C, dtype=BF16)
        bias = torch.empty(offsets, N) if attention.biased else None
        factors = torch.empty(N) if attention.cosine else None
        out, log_sums = attention_kernel.forward(qkv, bias, windows, factors)
        attention_kernel.backward(out, qkv, bias, out, log_sums, windows, attention.biased, factors)

    tokens = attention.batch * H * W
    tiled, num_windows = attention_kernel.is_tiled(S, BF16), tokens // S
    per_head = 4 * tokens * N  # statistics of a query, in float32
    # q, k, v to out; q, k, v and the gradient of out to those of q, k, v. A row of scores that is
    # not all in one place takes the product of its weights with their gradients from out.
    needed = 2 * tokens * C * (3 + 1 + 3 + 1 + 3 + tiled) + 2 * per_head
    needed += 3 * 4 * N if attention.cosine else 0  # factors twice, their gradient
    moved = needed
    if attention.cosine:
        # what every query adds to the gradient of its head's factor is written and read
        moved += 2 * per_head + (4 * N if tiled and attention.biased else 0)
    programs = attention_kernel.bias_programs(num_windows, N, S, BF16)
    if attention.biased:
        row = -(-S // 8) * 8
        needed += 3 * 4 * offsets * N  # the table twice, its gradient
        # the bias of pairs is made and read in the forward and the backward
        moved += 3 * 4 * offsets * N + 2 * 2 * N * S * 2 * row
        moved += 2 * 4 * programs * N * S * S
        if tiled:  # the gradient of the bias reads all that the others have read, and their sums
            moved += 2 * tokens * C * (3 + 1) + 3 * per_head + 2 * N * S * row
    return Case("window_attention", attention.model, "bfloat16", make, needed, moved)


def merge_case(merge: Merge) -> Case:
    """The passes that gather and scatter; as of a block, without the products' own traffic."""
    B, side, C = merge.batch, merge.side, merge.width
    T = B * (side // 2) ** 2

    def make() -> None:
        x = torch.empty(B, side, side, C, dtype=BF16)
        weight, bias = torch.empty(4 * C), torch.empty(4 * C)
        dy, mean, rstd = merge_kernel.gather(x, weight, bias, 1e-5)
        merge_kernel.scatter(dy, x, mean, rstd, weight, bias, True)

    # x to y and statistics; dy, x and statistics to dx and y; weight and bias twice, gradients
    needed = 2 * T * 4 * C * (2 + 4) + 2 * 8 * T + 4 * 4 * C * 6
    partial = 2 * 4 * 4 * C * -(-T // rows.rows_per_program(T, 1))
    return Case("merge_patches", merge.model, "bfloat16", make, needed, needed + 2 * partial)
