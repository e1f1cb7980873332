// Matrices that a pass over rows reads and writes.
#pragma once

#include <cstdint>

namespace simmim {

// Activations have `dtype` (0 float32, 1 bfloat16, 2 float16); what goes into and comes out of
// matrix products has `product_dtype`, float32 or, for bfloat16, the same. Arrays are contiguous.
struct Rows {
    int64_t rows, width;
    int dtype, product_dtype;
    int num_threads;
};

}  // namespace simmim

// Calls `function` with `a` for the pair of types of activations and products of `a.shape`.
#define SIMMIM_OF_TYPES(function)                                  \
    if (a.shape.dtype == 0) {                                      \
        function<float, float>(a);                                 \
    } else if (a.shape.dtype == 1 && a.shape.product_dtype == 0) { \
        function<BFloat16, float>(a);                              \
    } else if (a.shape.dtype == 1) {                               \
        function<BFloat16, BFloat16>(a);                           \
    } else {                                                       \
        function<Float16, float>(a);                               \
    }
