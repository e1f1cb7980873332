// Norm of many arrays together; see kernels/simmim_kernels/gradient_norm.
#pragma once

#include <cstdint>

#include "target.h"

namespace simmim {

struct GradientNorm {
    const float* const* arrays;
    const int64_t* sizes;  // elements
    int64_t count;
    int num_threads;
    float* out;
};

}  // namespace simmim

SIMMIM_DECLARE(void gradient_norm(const GradientNorm& a))
