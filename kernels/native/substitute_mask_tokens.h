// Mask-token substitution on the CPU. Definition:
// simmim_kernels/substitute_mask_tokens/reference.py.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "target.h"

namespace simmim {

// All tensors are contiguous and of one dtype (0 float32, 1 bfloat16, 2 float16). rows = B * L;
// mask holds 0 or 1 a row; pos_embed ([L, D]) may be null.
struct SubstituteForward {
    const void* tokens;
    const uint8_t* mask;
    const void* mask_token;
    const void* pos_embed;
    void* out;
    int64_t rows;
    int64_t tokens_per_image;
    int64_t width;
    int dtype;
    int num_threads;
    SIMMIM_FIELDS(tokens, mask, mask_token, pos_embed, out, rows, tokens_per_image, width, dtype,
                  num_threads)
};

// grad_tokens is the gradient of the visible rows and 0 in the hidden ones; grad_mask_token
// (float32, [D]) sums the hidden rows in an order that does not depend on the number of threads.
struct SubstituteBackward {
    const void* grad_out;
    const uint8_t* mask;
    void* grad_tokens;
    float* grad_mask_token;
    int64_t rows;
    int64_t width;
    int dtype;
    int num_threads;
    SIMMIM_FIELDS(grad_out, mask, grad_tokens, grad_mask_token, rows, width, dtype, num_threads)
};

}  // namespace simmim

SIMMIM_DECLARE(void substitute_mask_tokens_forward(const SubstituteForward& arguments))
SIMMIM_DECLARE(void substitute_mask_tokens_backward(const SubstituteBackward& arguments))
