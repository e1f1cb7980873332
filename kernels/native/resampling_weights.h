// Which inputs every output of a resized axis is made of, and in what shares: those of Pillow's
// Resample.c, whose order of operations is kept. Sources that include this are compiled without
// contraction, which would fuse a product and a sum (CMakeLists.txt).
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

#include "buffer.h"

namespace simmim::SIMMIM_TARGET {

constexpr int kPrecision = 22;  // bits after the point of a weight
constexpr int64_t kChunk = 16;  // outputs whose weights are computed side by side

inline int64_t rounded_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

struct Bilinear {
    static constexpr double kSupport = 1.0;
    static double at(double x) {
        x = __builtin_fabs(x);
        const double y = 1.0 - x;
        return x < 1.0 ? y : 0.0;
    }
};

struct Bicubic {
    static constexpr double kSupport = 2.0;
    static double at(double x) {
        constexpr double a = -0.5;
        x = __builtin_fabs(x);
        const double near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
        const double far = (((x - 5.0) * x + 8.0) * x - 4.0) * a;
        return x < 1.0 ? near : x < 2.0 ? far : 0.0;
    }
};

struct Lanczos {
    static constexpr double kSupport = 3.0;
    static double sinc(double x) {
        if (x == 0.0) return 1.0;
        x *= M_PI;
        return sin(x) / x;
    }
    static double at(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0; }
};

// Which inputs an output is made of, along one axis.
struct Axis {
    Axis(int64_t inputs, int64_t outputs, double support)
        : inputs(inputs),
          outputs(outputs),
          scale(static_cast<double>(inputs) / static_cast<double>(outputs)),
          stretch(scale < 1.0 ? 1.0 : scale),
          support(support * stretch),
          first(rounded_up(outputs, kChunk)),
          count(rounded_up(outputs, kChunk)) {
        taps = 1;
        for (int64_t x = 0; x < rounded_up(outputs, kChunk); ++x) {
            const double centre = centre_of(x);
            const int32_t low = static_cast<int32_t>(centre - this->support + 0.5);
            const int32_t high = static_cast<int32_t>(centre + this->support + 0.5);
            first[x] = low < 0 ? 0 : low;
            count[x] = (high < inputs ? high : static_cast<int32_t>(inputs)) - first[x];
            taps = count[x] > taps ? count[x] : taps;
        }
    }

    // The last output stands in for those beyond it.
    double centre_of(int64_t x) const {
        return (static_cast<double>(x < outputs ? x : outputs - 1) + 0.5) * scale;
    }

    int64_t inputs, outputs;
    double scale, stretch, support;
    Buffer<int32_t> first, count;  // [outputs, rounded up to kChunk]
    int64_t taps;                  // largest count
};

// weights[x · stride + t] = fixed-point weight of tap t of output x, or of output `outputs - 1 - x`
// if mirrored; 0 from its count on. The order of operations is Pillow's, and must not be fused:
// CMakeLists.txt turns contraction off.
template <class Filter>
void weigh(const Axis& axis, bool mirrored, int64_t stride, int32_t* weights) {
    Buffer<double> shares(axis.taps * kChunk);
    const double per_input = 1.0 / axis.stretch;
    for (int64_t start = 0; start < axis.outputs; start += kChunk) {
        double centres[kChunk], sums[kChunk];
        const int32_t *first = axis.first + start, *count = axis.count + start;
        for (int64_t e = 0; e < kChunk; ++e) {
            centres[e] = axis.centre_of(start + e);
            sums[e] = 0.0;
        }
        for (int32_t t = 0; t < axis.taps; ++t) {
            double* share = shares + t * kChunk;
            for (int64_t e = 0; e < kChunk; ++e) {
                const double x = static_cast<double>(t + first[e]) - centres[e] + 0.5;
                const double value = Filter::at(x * per_input);
                share[e] = t < count[e] ? value : 0.0;
                sums[e] += share[e];
            }
        }
        const int64_t left = axis.outputs - start, outputs = left < kChunk ? left : kChunk;
        for (int64_t t = 0; t < stride; ++t) {
            int32_t fixed[kChunk] = {};
            if (t < axis.taps) {
                const double* share = shares + t * kChunk;
                for (int64_t e = 0; e < kChunk; ++e) {
                    const double scaled = share[e] / sums[e] * (1 << kPrecision);
                    fixed[e] = static_cast<int32_t>(scaled + __builtin_copysign(0.5, scaled));
                }
            }
            for (int64_t e = 0; e < outputs; ++e) {
                const int64_t x = mirrored ? axis.outputs - 1 - start - e : start + e;
                weights[x * stride + t] = fixed[e];
            }
        }
    }
}

inline void weigh(const Axis& axis, int filter, bool mirrored, int64_t stride, int32_t* weights) {
    filter == 0   ? weigh<Bilinear>(axis, mirrored, stride, weights)
    : filter == 1 ? weigh<Bicubic>(axis, mirrored, stride, weights)
                  : weigh<Lanczos>(axis, mirrored, stride, weights);
}

inline double support_of(int filter) {
    return filter == 0 ? Bilinear::kSupport : filter == 1 ? Bicubic::kSupport : Lanczos::kSupport;
}

}  // namespace simmim::SIMMIM_TARGET
