// Mask-token substitution on the CPU. Definition:
// simmim_kernels/substitute_mask_tokens/reference.py.
#pragma once

#include <cstdint>

namespace simmim {

// All tensors are contiguous. rows = B * L; mask holds 0 or 1 a row; pos_embed ([L, D]) may be
// null.
template <class T>
void substitute_mask_tokens_forward(const T* tokens, const uint8_t* mask, const T* mask_token,
                                    const T* pos_embed, T* out, int64_t rows,
                                    int64_t tokens_per_image, int64_t width, int num_threads);

// grad_tokens is the gradient of the visible rows and 0 in the hidden ones; grad_mask_token
// (float32, [D]) sums the hidden rows in an order that does not depend on the number of threads.
template <class T>
void substitute_mask_tokens_backward(const T* grad_out, const uint8_t* mask, T* grad_tokens,
                                     float* grad_mask_token, int64_t rows, int64_t width,
                                     int num_threads);

}  // namespace simmim
