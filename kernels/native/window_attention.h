// Attention inside (shifted) windows; see
// kernels/simmim_kernels/window_attention.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "target.h"

namespace simmim {

struct WindowedTokens {
    int64_t batch, rows, columns, width, num_heads;
    SIMMIM_FIELDS(batch, rows, columns, width, num_heads)
};

// dtype: 0 float32, 1 bfloat16, 2 float16. All arrays are contiguous; sizes
// count elements.
struct WindowAttention {
    const void* qkv;        // [B, H, W, 3C], without its bias
    const float* qkv_bias;  // [3C] or null
    const float* bias;      // [N, S, S] or null
    const float* factors;   // [N]: scores are factor · cosine of q and k; or null
    WindowedTokens sizes;
    int64_t window[2], shift[2];
    float scale;  // of q·k, where there are no factors
    int dtype;    // of qkv and out
    int num_threads;
    SIMMIM_FIELDS(qkv, qkv_bias, bias, factors, sizes, window, shift, scale, dtype, num_threads)
};

struct WindowAttentionForward : WindowAttention {
    void* out;        // [B, H, W, C]
    float* log_sums;  // [B, H, W, N]
    SIMMIM_FIELDS_AFTER(WindowAttention, out, log_sums)
};

struct WindowAttentionBackward : WindowAttention {
    const void* grad_out;  // [B, H, W, C]
    const float* log_sums;
    void* grad_qkv;        // [B, H, W, 3C]
    float* grad_qkv_bias;  // [3C] or null
    float* grad_bias;      // [N, S, S] or null
    float* grad_factors;   // [N] or null
    int grad_dtype;        // of grad_out and grad_qkv: float32 or the dtype of qkv
    SIMMIM_FIELDS_AFTER(WindowAttention, grad_out, log_sums, grad_qkv, grad_qkv_bias, grad_bias,
                        grad_factors, grad_dtype)
};

}  // namespace simmim

SIMMIM_DECLARE(void window_attention_forward(const WindowAttentionForward& a))
SIMMIM_DECLARE(void window_attention_backward(const WindowAttentionBackward& a))
