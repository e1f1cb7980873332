// The masked L1 loss on the CPU. Definition: simmim_kernels/masked_l1_loss/reference.py.
#pragma once

#include <cstdint>

#include "target.h"

namespace simmim {

// What is to be predicted, and where it is hidden. `dtype` is 0 float32, 1 bfloat16, 2 float16,
// 3 uint8; only a uint8 image has a mean and a std (C values each), others are null.
struct Target2d {
    const void* image;
    int dtype;
    int64_t shape[4];    // B C H W
    int64_t strides[4];  // in elements
    const float* mean;
    const float* std;
    const uint8_t* mask;  // [B, grid[0], grid[1]], contiguous, 0 or 1
    int64_t grid[2];
};

// stride 0: a prediction [B, C, H, W] with any strides. Otherwise cells [B, h, w, C, stride,
// stride], contiguous; with row_of_cell (int32 [B, h, w]) only rows of hidden cells exist and
// row_of_cell says which. signs may be null, see masked_l1_loss/__init__.py for their layout.
// norm_target is 0 or the side of the normalisation window.
struct MaskedL1Forward {
    const void* prediction;
    int dtype;
    int64_t strides[4];
    const int32_t* row_of_cell;
    Target2d target;
    int64_t stride;
    int64_t norm_target;
    int32_t* signs;
    int num_threads;
};

// Rows of `run` values from their sign words; row r of the output is row rows[r] of the words
// (rows null: the same). `step` is the value of a hidden pixel whose prediction is too high.
struct ExpandSigns {
    const int32_t* signs;
    const int64_t* rows;
    void* out;
    int dtype;
    int64_t num_rows;
    int64_t runs_per_row;
    int64_t run;
    float step;
    int num_threads;
};

}  // namespace simmim

// Σ|error| over the hidden pixels; does not depend on the number of threads.
SIMMIM_DECLARE(double masked_l1_loss_forward(const MaskedL1Forward& arguments))
SIMMIM_DECLARE(void expand_signs(const ExpandSigns& arguments))
