// The masked L1 loss on the CPU. Definition: simmim_kernels/masked_l1_loss/reference.py.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "target.h"

namespace simmim {

// stride 0: a prediction [B, C, H, W] with any strides. Otherwise cells [B, h, w, C, stride,
// stride], contiguous; with row_of_cell (int32 [B, h, w]) only rows of hidden cells exist and
// row_of_cell says which. signs may be null, see masked_l1_loss/__init__.py for their layout.
// norm_target is 0 or the side of the normalisation window. A dtype is 0 float32, 1 bfloat16,
// 2 float16, 3 uint8; only a uint8 image has a mean and a std (C values each).
struct MaskedL1Forward {
    const void* prediction;
    List<int64_t> strides;  // of a prediction [B, C, H, W], in elements
    int dtype;
    const int32_t* row_of_cell;
    const void* image;
    int64_t image_shape[4];    // B C H W
    int64_t image_strides[4];  // in elements
    int image_dtype;
    List<float> mean, std;
    const uint8_t* mask;  // [B, grid[0], grid[1]], contiguous, 0 or 1
    int64_t grid[2];
    int64_t stride;
    int64_t norm_target;
    int32_t* signs;
    int num_threads;
    SIMMIM_FIELDS(prediction, strides, dtype, row_of_cell, image, image_shape, image_strides,
                  image_dtype, mean, std, mask, grid, stride, norm_target, signs, num_threads)
};

struct MaskedL1Sum {
    double error;  // Σ|error| over the hidden pixels; does not depend on the number of threads
    int64_t hidden_cells;  // of the mask
    SIMMIM_FIELDS(error, hidden_cells)
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
    SIMMIM_FIELDS(signs, rows, out, dtype, num_rows, runs_per_row, run, step, num_threads)
};

}  // namespace simmim

SIMMIM_DECLARE(MaskedL1Sum masked_l1_loss_forward(const MaskedL1Forward& arguments))
SIMMIM_DECLARE(void expand_signs(const ExpandSigns& arguments))
