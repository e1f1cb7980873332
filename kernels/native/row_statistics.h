// Mean and deviation of a row, for LayerNorm.
#pragma once

#include <math.h>

#include "lanes.h"

namespace simmim::SIMMIM_TARGET {

struct RowStatistics {
    float mean, rstd;  // rstd: 1 / √(variance + eps)
};

// Of a row that lies in `count` pieces of `width` elements each.
template <class T>
inline RowStatistics row_statistics(const T* const* pieces, int64_t count, int64_t width,
                                    float eps) {
    const auto size = static_cast<float>(count * width);
    Lanes total = zero_lanes();
    for (int64_t k = 0; k < count; ++k) {
        for (int64_t d = 0; d < width; d += kLanes) {
            total = add(total, load_first(pieces[k] + d, width - d));
        }
    }
    const float mean = sum(total) / size;
    Lanes squares = zero_lanes(), rest = zero_lanes();
    for (int64_t k = 0; k < count; ++k) {
        for (int64_t d = 0; d < width; d += kLanes) {
            const Lanes centred = subtract(load_first(pieces[k] + d, width - d), all(mean));
            const Lanes there = keep(centred, first_lanes(width - d));
            squares = multiply_add(there, there, squares);
            rest = add(rest, there);
        }
    }
    // what the first sum has lost to rounding
    const float correction = sum(rest) / size;
    const float variance = sum(squares) / size - correction * correction;
    return {mean + correction, 1.0f / sqrtf(variance + eps)};
}

}  // namespace simmim::SIMMIM_TARGET
