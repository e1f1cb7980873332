// Random mask of whole units on the CPU. Definition: simmim_kernels/random_patch_mask/reference.py.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "target.h"

namespace simmim {

// `key` is the one that Python folded from the stream and the seed; mask is [B, rows * unit,
// columns * unit].
struct RandomPatchMask {
    const int64_t* ids;
    const int64_t* epochs;
    int64_t epoch_stride;  // 0: one epoch for the batch
    int64_t batch;
    int64_t rows;
    int64_t columns;
    int64_t unit;
    int64_t num_hidden;
    int64_t key;  // its 64 bits
    uint8_t* mask;
    int num_threads;
    SIMMIM_FIELDS(ids, epochs, epoch_stride, batch, rows, columns, unit, num_hidden, key, mask,
                  num_threads)
};

}  // namespace simmim

SIMMIM_DECLARE(void random_patch_mask(const RandomPatchMask& arguments))
