// Passes over rows between the matrix products of a transformer block, whose LayerNorm comes first
// in a branch or last; see kernels/simmim_kernels/transformer_block.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "rows.h"
#include "target.h"

namespace simmim {

struct LayerNormForward {
    Rows shape;
    const void* x;
    const float *weight, *bias;  // [width]
    float eps;
    void* y;             // product_dtype
    float *mean, *rstd;  // [rows]
    SIMMIM_FIELDS(shape, x, weight, bias, eps, y, mean, rstd)
};

struct LayerNormBackward {
    Rows shape;
    const void *x, *grad_out;  // grad_out: gradient that reaches x past the branch
    const float *weight, *bias, *mean, *rstd;
    void* grad_y;  // product_dtype; becomes y
    void* grad_x;
    float *grad_weight, *grad_bias;  // [width] or null
    SIMMIM_FIELDS(shape, x, grad_out, weight, bias, mean, rstd, grad_y, grad_x, grad_weight,
                  grad_bias)
};

struct GeluForward {
    Rows shape;
    const void* product;  // product_dtype, without bias
    const float* bias;    // [width]
    void* kept;           // product in `dtype`; null where it is the product itself
    void* out;            // product_dtype
    SIMMIM_FIELDS(shape, product, bias, kept, out)
};

struct GeluBackward {
    Rows shape;
    const void* kept;
    const float* bias;
    void* grad;        // product_dtype: of the output, becomes that of the input
    void* out;         // product_dtype: the output again
    float* grad_bias;  // [width] or null
    SIMMIM_FIELDS(shape, kept, bias, grad, out, grad_bias)
};

struct ResidualForward {
    Rows shape;
    const void* x;
    const void* product;        // product_dtype, without bias
    const float *bias, *gamma;  // [width]; gamma may be null
    const float* branch_scale;  // [rows / rows_per_image] or null
    int64_t rows_per_image;
    void* out;
    SIMMIM_FIELDS(shape, x, product, bias, gamma, branch_scale, rows_per_image, out)
};

struct ResidualBackward {
    Rows shape;
    const void* grad_out;
    const float* branch_scale;
    int64_t rows_per_image;
    void* grad_product;  // product_dtype: grad_out · branch_scale; null where it is grad_out itself
    float* sum;          // [width]: its sum over rows, or null
    SIMMIM_FIELDS(shape, grad_out, branch_scale, rows_per_image, grad_product, sum)
};

// In place: grad[row] *= gamma[row]; dot[row] = Σ weight[row]·grad[row] before that. float32.
struct LayerScaleBackward {
    int64_t rows, width;
    const float *weight, *gamma;
    float *grad, *dot;
    int num_threads;
    SIMMIM_FIELDS(rows, width, weight, gamma, grad, dot, num_threads)
};

// out = x + branch_scale · layer_norm(product + bias)
struct PostNormForward {
    Rows shape;
    const void* x;
    const void* product;                     // product_dtype
    const float *bias, *weight, *norm_bias;  // [width]; the last two are the LayerNorm's
    float eps;
    const float* branch_scale;  // [rows / rows_per_image] or null
    int64_t rows_per_image;
    void* kept;          // product in `dtype`; null where it is the product itself
    float *mean, *rstd;  // [rows]
    void* out;
    SIMMIM_FIELDS(shape, x, product, bias, weight, norm_bias, eps, branch_scale, rows_per_image,
                  kept, mean, rstd, out)
};

struct PostNormBackward {
    Rows shape;
    const void *grad_out, *kept;
    const float *bias, *weight, *mean, *rstd;
    const float* branch_scale;
    int64_t rows_per_image;
    void* grad_product;                               // product_dtype
    float *grad_bias, *grad_weight, *grad_norm_bias;  // [width]; null, all three, if not wanted
    SIMMIM_FIELDS(shape, grad_out, kept, bias, weight, mean, rstd, branch_scale, rows_per_image,
                  grad_product, grad_bias, grad_weight, grad_norm_bias)
};

}  // namespace simmim

SIMMIM_DECLARE(void layer_norm_forward(const LayerNormForward& a))
SIMMIM_DECLARE(void layer_norm_backward(const LayerNormBackward& a))
SIMMIM_DECLARE(void gelu_forward(const GeluForward& a))
SIMMIM_DECLARE(void gelu_backward(const GeluBackward& a))
SIMMIM_DECLARE(void residual_forward(const ResidualForward& a))
SIMMIM_DECLARE(void residual_backward(const ResidualBackward& a))
SIMMIM_DECLARE(void layer_scale_backward(const LayerScaleBackward& a))
SIMMIM_DECLARE(void post_norm_forward(const PostNormForward& a))
SIMMIM_DECLARE(void post_norm_backward(const PostNormBackward& a))
