"""The launches that the report compiles: every op on the tensors of models that people train."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from simmim_kernels.linear_masked_l1_loss import triton_kernel as linear
from simmim_kernels.masked_l1_loss import triton_kernel as loss
from simmim_kernels.merge_patches import triton_kernel as merge_kernel
from simmim_kernels.post_norm_block import triton_rows as post_norm_rows
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
from simmim_kernels.transformer_block import triton_rows as rows
from simmim_kernels.window_attention import triton_kernel as attention_kernel


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
    found = [case for model in MODELS for case in _cases_of(model)]
    found += [case for block in BLOCKS for case in block_cases(block)]
    found += [post_norm_case(block) for block in POST_NORM_BLOCKS]
    found += [merge_case(merge) for merge in MERGES]
    return found + [attention_case(attention) for attention in ATTENTIONS]


def _cases_of(model: Model) -> list[Case]:
    bf16, byte = torch.bfloat16, torch.uint8
    B, side, S = model.batch, model.cells * model.stride, model.stride
    units = side // 32
    share = math.ceil(units * units * 0.6) / units**2  # of hidden pixels: whole units of 32 px
    token_side, cells = math.isqrt(model.tokens), B * model.cells**2
    mean, std = torch.empty(3), torch.empty(3)
    image = torch.empty(B, 3, side, side, dtype=byte)
    unit_mask = torch.zeros(B, units, units, dtype=torch.bool)
    pixels = image.numel()
    hidden = int(pixels * share)
    sign_bytes = pixels // 16 * 4

    def make_mask() -> None:
        ids = torch.empty(B, dtype=torch.int64)
        random_mask.forward(ids, torch.tensor(0), 1 << 40, units, units, token_side // units, 1)

    def make_substitute() -> None:
        tokens = torch.empty(B, model.tokens, model.width, dtype=bf16)
        mask = torch.empty(B, model.tokens, dtype=torch.bool)
        substitute.forward(tokens, mask, tokens[0, 0], None)
        substitute.backward(tokens, mask)

    def make_loss(stride: int, dtype: torch.dtype) -> None:
        shape = (B, model.cells, model.cells, 3 * S * S) if stride else (B, 3, side, side)
        prediction = torch.empty(shape, dtype=dtype)
        target = image if dtype == bf16 else torch.empty(image.shape)
        of_bytes = dtype == bf16
        found = loss.forward(
            prediction,
            target,
            unit_mask,
            mean if of_bytes else None,
            std if of_bytes else None,
            stride,
            0,
            True,
        )
        loss.backward(found[1], found[2], shape, dtype)

    def make_linear() -> None:
        features = torch.empty(B, model.cells, model.cells, model.head_width, dtype=bf16)
        weight = torch.empty(3 * S * S, model.head_width, dtype=bf16)
        bias = torch.empty(3 * S * S, dtype=bf16)
        _, per_pixel, signs = linear.forward(
            features, weight, bias, image, unit_mask, mean, std, S, 0, True
        )
        linear.backward(per_pixel, signs, features, weight, unit_mask, S, True, True)

    elements = B * model.tokens * model.width
    masked_tokens = 2 * B * model.tokens  # the mask, forward and backward
    needed = int(elements * (1 - share)) * 2 + 3 * elements * 2 + masked_tokens + 4 * model.width
    partial = -(-B * model.tokens // substitute.ROWS_PER_PROGRAM) * model.width * 4
    masks = B * units * units
    head = 3 * S * S * model.head_width
    feature_bytes = cells * model.head_width * 2
    found = [
        Case("random_patch_mask", model.name, "int64", make_mask, B * (8 + model.tokens)),
        Case(
            "substitute_mask_tokens",
            model.name,
            "bfloat16",
            make_substitute,
            bytes_needed=needed,
            bytes_moved=needed + 2 * partial,
        ),
    ]
    for layout, stride in (("masked_l1_loss", 0), ("masked_l1_loss_from_tokens", S)):
        for dtype, size, image_size in ((bf16, 2, 1), (torch.float32, 4, 4)):
            # sign words go out once and in once; both are part of any split in two passes
            floor = hidden * (size + image_size) + pixels * size + 2 * sign_bytes + 2 * masks
            partials = -(-pixels // 16 // loss.GROUPS_PER_PROGRAM) * 8
            make = functools.partial(make_loss, stride, dtype)
            name = str(dtype).removeprefix("torch.")
            found.append(Case(layout, model.name, name, make, floor, floor + partials))
    # matrix products read their factors once per tile, from the L2 cache but for the first time:
    # the model is that of an ideal cache
    floor = (
        int(feature_bytes * share) * 2  # features, forward and for the weight's gradient
        + feature_bytes  # their gradient, zeros included
        + head * 2 * 3  # weight twice, its gradient
        + hidden  # bytes of the image
        + sign_bytes
        + int(sign_bytes * share) * 3
    )
    found.append(Case("linear_masked_l1_loss", model.name, "bfloat16", make_linear, floor, floor))
    return found


def block_cases(block: Block) -> list[Case]:
    """The row passes of both branches of a block.

    Matrix products and attention are not among them, and neither is their traffic: the fewest bytes
    possible are those of one read of what they leave and one write of what they are given.
    """
    T, C, M = block.batch * block.tokens, block.width, block.hidden
    bf16 = torch.bfloat16
    tokens, wide, vector = torch.empty(T, C, dtype=bf16), torch.empty(T, M, dtype=bf16), (C,)
    gamma = torch.empty(vector) if block.scaled else None
    branch_scale = torch.empty(block.batch) if block.scaled else None

    def norm_and_sum() -> None:
        weight, bias = torch.empty(vector), torch.empty(vector)
        _, mean, rstd = rows.layer_norm(tokens, weight, bias, 1e-5)
        rows.add_branch(torch.empty_like(tokens), tokens, bias, gamma, branch_scale)
        grad_out, dy = torch.empty_like(tokens), torch.empty_like(tokens)
        rows.layer_norm_backward(
            grad_out, dy, tokens, mean, rstd, weight, bias, branch_scale, None, True
        )

    def make_mlp() -> None:
        norm_and_sum()
        bias = torch.empty(M)
        rows.gelu(wide, bias)
        rows.gelu_backward(torch.empty_like(wide), wide, bias, branch_scale, True)

    def make_attention() -> None:
        norm_and_sum()
        if branch_scale is not None:
            rows.scale_images(tokens, branch_scale)
        rows.column_sum(torch.empty(T, 3 * C, dtype=bf16))

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
        tokens, wide = (torch.empty(T, width, dtype=torch.bfloat16) for width in (C, M))
        vector, bias = torch.empty(C), torch.empty(M)
        branch_scale = torch.empty(block.batch) if block.scaled else None
        rows.gelu(wide, bias)
        _, mean, rstd = post_norm_rows.add_normalised(
            tokens, tokens, vector, vector, vector, branch_scale, 1e-5
        )
        post_norm_rows.add_normalised_backward(
            tokens, tokens, mean, rstd, vector, vector, branch_scale, True
        )
        rows.gelu_backward(torch.empty_like(wide), wide, bias, None, True)

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
    settings = (N, attention.window, attention.shift, attention.head_width**-0.5)

    def make() -> None:
        qkv = torch.empty(attention.batch, H, W, 3 * C, dtype=torch.bfloat16)
        bias = torch.empty(N, S, S) if attention.biased else None
        factors = torch.empty(N) if attention.cosine else None
        out, log_sums = attention_kernel.forward(qkv, bias, *settings, factors)
        attention_kernel.backward(
            out, qkv, bias, out, log_sums, *settings, attention.biased, factors
        )

    tokens = attention.batch * H * W
    tiled, windows = attention_kernel.is_tiled(S, torch.bfloat16), tokens // S
    per_head = 4 * tokens * N  # statistics of a query, in float32
    # q, k, v to out; q, k, v and the gradient of out to those of q, k, v. A row of scores that is
    # not all in one place takes the product of its weights with their gradients from out.
    needed = 2 * tokens * C * (3 + 1 + 3 + 1 + 3 + tiled) + 2 * per_head
    needed += 3 * 4 * N if attention.cosine else 0  # factors twice, their gradient
    moved = needed
    if attention.cosine:
        # what every query adds to the gradient of its head's factor is written and read
        moved += 2 * per_head + (4 * N if tiled and attention.biased else 0)
    if attention.biased:
        row = -(-S // 8) * 8
        needed += 3 * 4 * N * S * S  # the bias twice, its gradient
        # the copy that kernels read is made and read in the forward and the backward
        moved += 2 * N * S * (4 * S + 2 * S + 2 * row) + 4 * N * S * S
        if (programs := attention_kernel.bias_programs(windows, N, S, torch.bfloat16)) > 1:
            moved += 2 * 4 * programs * N * S * S
        if tiled:  # the gradient of the bias reads all that the others have read, and their sums
            moved += 2 * tokens * C * (3 + 1) + 3 * per_head + 2 * N * S * row
    return Case("window_attention", attention.model, "bfloat16", make, needed, moved)


def merge_case(merge: Merge) -> Case:
    """The passes that gather and scatter; as of a block, without the products' own traffic."""
    B, side, C = merge.batch, merge.side, merge.width
    T = B * (side // 2) ** 2

    def make() -> None:
        x = torch.empty(B, side, side, C, dtype=torch.bfloat16)
        weight, bias = torch.empty(4 * C), torch.empty(4 * C)
        dy, mean, rstd = merge_kernel.gather(x, weight, bias, 1e-5)
        merge_kernel.scatter(dy, x, mean, rstd, weight, bias, True)

    # x to y and statistics; dy, x and statistics to dx and y; weight and bias twice, gradients
    needed = 2 * T * 4 * C * (2 + 4) + 2 * 8 * T + 4 * 4 * C * 6
    partial = 2 * 4 * 4 * C * -(-T // rows.rows_per_program(T, 1))
    return Case("merge_patches", merge.model, "bfloat16", make, needed, needed + 2 * partial)
