// Matrices that a pass over rows reads and writes.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace simmim {

// Activations have `dtype` (0 float32, 1 bfloat16, 2 float16); what goes into and comes out of
// matrix products has `product_dtype`, float32 or, for bfloat16, the same. Arrays are contiguous.
struct Rows {
    int64_t rows, width;
    int dtype, product_dtype;
    int num_threads;
    SIMMIM_FIELDS(rows, width, dtype, product_dtype, num_threads)
};

}  // namespace simmim
