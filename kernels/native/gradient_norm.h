// Norm of many arrays together; see kernels/simmim_kernels/gradient_norm.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "target.h"

namespace simmim {

struct GradientNorm {
    List<const float*> arrays;
    List<int64_t> sizes;  // elements
    int num_threads;
    float* out;
    SIMMIM_FIELDS(arrays, sizes, num_threads, out)
};

}  // namespace simmim

SIMMIM_DECLARE(void gradient_norm(const GradientNorm& a))
