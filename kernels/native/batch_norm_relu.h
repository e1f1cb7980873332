// Passes over maps that normalise every channel over the batch and cut at zero; see
// kernels/simmim_kernels/batch_norm_relu.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "target.h"

namespace simmim {

// Maps are contiguous [rows, channels]: one row for each cell of each image. `dtype` is theirs
// (0 float32, 1 bfloat16, 2 float16); everything else is float32 [channels].
struct ChannelMaps {
    int64_t rows, channels;
    int dtype;
    int num_threads;
    SIMMIM_FIELDS(rows, channels, dtype, num_threads)
};

// out = max(0, (x - mean) / √(variance + eps) · weight + bias + residual)
struct BatchNormReluForward {
    ChannelMaps shape;
    const void *x, *residual;  // residual: null where nothing is added
    const float *weight, *bias;
    float eps;
    float *mean, *variance;
    void* out;
    SIMMIM_FIELDS(shape, x, residual, weight, bias, eps, mean, variance, out)
};

struct BatchNormReluBackward {
    ChannelMaps shape;
    const void *grad_out, *x;
    const void* out;  // what the forward gave where it added a residual; else null
    const float *weight, *bias, *mean, *variance;
    float eps;
    void *grad_x, *grad_residual;  // grad_residual: only where one was added
    float *grad_weight, *grad_bias;
    SIMMIM_FIELDS(shape, grad_out, x, out, weight, bias, mean, variance, eps, grad_x, grad_residual,
                  grad_weight, grad_bias)
};

}  // namespace simmim

SIMMIM_DECLARE(void batch_norm_relu_forward(const BatchNormReluForward& a))
SIMMIM_DECLARE(void batch_norm_relu_backward(const BatchNormReluBackward& a))
