// Patch merging: four neighbours gathered and normalised in one pass; see
// kernels/simmim_kernels/merge_patches.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "rows.h"
#include "target.h"

namespace simmim {

// A row of `shape` is a merged patch: 4 · C wide, from a 2 × 2 block of tokens of x [B, H, W, C].
// `columns` is W / 2.
struct MergeForward {
    Rows shape;
    int64_t columns;
    const void* x;
    const float *weight, *bias;  // [width]
    float eps;
    void* y;             // product_dtype
    float *mean, *rstd;  // [rows]
    SIMMIM_FIELDS(shape, columns, x, weight, bias, eps, y, mean, rstd)
};

struct MergeBackward {
    Rows shape;
    int64_t columns;
    const void* x;
    const float *weight, *bias, *mean, *rstd;
    void* grad_y;                    // product_dtype; becomes y
    void* grad_x;                    // like x
    float *grad_weight, *grad_bias;  // [width] or null
    SIMMIM_FIELDS(shape, columns, x, weight, bias, mean, rstd, grad_y, grad_x, grad_weight,
                  grad_bias)
};

}  // namespace simmim

SIMMIM_DECLARE(void merge_patches_forward(const MergeForward& a))
SIMMIM_DECLARE(void merge_patches_backward(const MergeBackward& a))
