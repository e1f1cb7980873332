// Passes over rows that add the LayerNorm of a branch to its residual; see
// kernels/simmim_kernels/post_norm_block.
#pragma once

#include <cstdint>

#include "rows.h"
#include "target.h"

namespace simmim {

// out = x + branch_scale · layer_norm(product + bias)
struct PostNormForward {
    Rows shape;
    const void* x;
    const void* product;  // product_dtype
    const float *bias, *weight,
        *norm_bias;  // [width]; the last two are the LayerNorm's
    float eps;
    const float* branch_scale;  // [rows / rows_per_image] or null
    int64_t rows_per_image;
    void* kept;          // product in `dtype`; null where it is the product itself
    float *mean, *rstd;  // [rows]
    void* out;
};

struct PostNormBackward {
    Rows shape;
    const void *grad_out, *kept;
    const float *bias, *weight, *mean, *rstd;
    const float* branch_scale;
    int64_t rows_per_image;
    void* grad_product;  // product_dtype
    float *grad_bias, *grad_weight,
        *grad_norm_bias;  // [width]; null, all three, if not wanted
};

}  // namespace simmim

SIMMIM_DECLARE(void post_norm_forward(const PostNormForward& a))
SIMMIM_DECLARE(void post_norm_backward(const PostNormBackward& a))
