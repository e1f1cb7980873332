// Passes over rows between the matrix products of a transformer block; see
// kernels/simmim_kernels/transformer_block.
#pragma once

#include <cstdint>

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
};

struct LayerNormBackward {
    Rows shape;
    const void *x, *grad_out;  // grad_out: gradient that reaches x past the branch
    const float *weight, *bias, *mean, *rstd;
    void* grad_y;  // product_dtype; becomes y
    void* grad_x;
    float *grad_weight, *grad_bias;  // [width] or null
};

struct GeluForward {
    Rows shape;
    const void* product;  // product_dtype, without bias
    const float* bias;    // [width]
    void* kept;           // product in `dtype`; null where it is the product itself
    void* out;            // product_dtype
};

struct GeluBackward {
    Rows shape;
    const void* kept;
    const float* bias;
    void* grad;        // product_dtype: of the output, becomes that of the input
    void* out;         // product_dtype: the output again
    float* grad_bias;  // [width] or null
};

struct ResidualForward {
    Rows shape;
    const void* x;
    const void* product;        // product_dtype, without bias
    const float *bias, *gamma;  // [width]; gamma may be null
    const float* branch_scale;  // [rows / rows_per_image] or null
    int64_t rows_per_image;
    void* out;
};

struct ResidualBackward {
    Rows shape;
    const void* grad_out;
    const float* branch_scale;
    int64_t rows_per_image;
    void* grad_product;  // product_dtype: grad_out · branch_scale; null where it is grad_out itself
    float* sum;          // [width]: its sum over rows, or null
};

// In place: grad[row] *= gamma[row]; dot[row] = Σ weight[row]·grad[row] before that. float32.
struct LayerScaleBackward {
    int64_t rows, width;
    const float *weight, *gamma;
    float *grad, *dot;
    int num_threads;
};

}  // namespace simmim

SIMMIM_DECLARE(void layer_norm_forward(const LayerNormForward& a))
SIMMIM_DECLARE(void layer_norm_backward(const LayerNormBackward& a))
SIMMIM_DECLARE(void gelu_forward(const GeluForward& a))
SIMMIM_DECLARE(void gelu_backward(const GeluBackward& a))
SIMMIM_DECLARE(void residual_forward(const ResidualForward& a))
SIMMIM_DECLARE(void residual_backward(const ResidualBackward& a))
SIMMIM_DECLARE(void layer_scale_backward(const LayerScaleBackward& a))
