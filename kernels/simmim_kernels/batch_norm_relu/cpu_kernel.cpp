// Batch norm, sum and ReLU in two passes over the map, forward and backward.
#include "batch_norm_relu.h"
#include "column_sums.h"
#include "half.h"
#include "lanes.h"

namespace simmim::SIMMIM_TARGET {
namespace {

// Of a map of few rows the sums of many sections would be as large as the map.
constexpr int64_t kLeastRows = 32;
// Rows of a section whose mean is taken away from all its rows before they are squared.
constexpr int64_t kRowsOfShift = 8;
// Channels that one thread adds up at a time.
constexpr int64_t kChannelsAtOnce = 64;

inline float reciprocal_deviation(float variance, float eps) {
    return 1.0f / __builtin_sqrtf(variance + eps);
}

// Of one section: sums over x - shift and its squares, where the shift is the mean of its first
// rows: digits would be lost to a large mean.
template <class T>
void sums_of_section(const T* x, int64_t begin, int64_t end, int64_t C, float* total) {
    float *squares = total + C, *shift = total + 2 * C;
    const int64_t few = end - begin < kRowsOfShift ? end - begin : kRowsOfShift;
    for (int64_t row = begin; row < begin + few; ++row) {
        for (int64_t c = 0; c < C; c += kLanes) {
            add_to(shift + c, load_first(x + row * C + c, C - c), C - c);
        }
    }
    const Lanes share = all(1.0f / static_cast<float>(few));
    for (int64_t c = 0; c < C; c += kLanes) {
        store_first(shift + c, multiply(load_first(shift + c, C - c), share), C - c);
    }
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t c = 0; c < C; c += kLanes) {
            const Lanes off =
                subtract(load_first(x + row * C + c, C - c), load_first(shift + c, C - c));
            const Lanes square = multiply_add(off, off, load_first(squares + c, C - c));
            add_to(total + c, off, C - c);
            store_first(squares + c, square, C - c);
        }
    }
}

// Mean and biased variance of every channel.
template <class T>
void statistics(const BatchNormReluForward& a) {
    const int64_t C = a.shape.channels;
    ColumnSums sums(a.shape.rows, C, 3, kLeastRows);
    const auto size = [&](int64_t section) {
        return static_cast<double>(sums.end(section) - section * sums.per_section);
    };
    sums.over_sections(a, [&](const auto& a, int64_t begin, int64_t end, float* total) {
        sums_of_section(static_cast<const T*>(a.x), begin, end, C, total);
    });
    const double rows = static_cast<double>(a.shape.rows);
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
    for (int64_t first = 0; first < C; first += kChannelsAtOnce) {
        const int64_t count = C - first < kChannelsAtOnce ? C - first : kChannelsAtOnce;
        double mean[kChannelsAtOnce] = {}, squares[kChannelsAtOnce] = {};
        for (int64_t section = 0; section < sums.sections; ++section) {
            const float* part = sums.part(section) + first;
            for (int64_t c = 0; c < count; ++c) {
                mean[c] += part[c] + size(section) * part[2 * C + c];
            }
        }
        for (int64_t c = 0; c < count; ++c) mean[c] /= rows;
        for (int64_t section = 0; section < sums.sections; ++section) {
            const float* part = sums.part(section) + first;
            for (int64_t c = 0; c < count; ++c) {
                // Σ (x - mean)² from Σ (x - shift)² and Σ (x - shift)
                const double off = part[2 * C + c] - mean[c];
                squares[c] += part[C + c] + off * (2.0 * part[c] + size(section) * off);
            }
        }
        for (int64_t c = 0; c < count; ++c) {
            const double variance = squares[c] / rows;
            a.mean[first + c] = static_cast<float>(mean[c]);
            a.variance[first + c] = static_cast<float>(variance < 0.0 ? 0.0 : variance);
        }
    }
}

template <class T>
void forward(const BatchNormReluForward& a) {
    statistics<T>(a);
    const int64_t C = a.shape.channels;
    const auto* x = static_cast<const T*>(a.x);
    const auto* residual = static_cast<const T*>(a.residual);
    auto* out = static_cast<T*>(a.out);
    const Buffer<float> vector(C);
    float* slope = vector;
    for (int64_t c = 0; c < C; ++c) {
        slope[c] = a.weight[c] * reciprocal_deviation(a.variance[c], a.eps);
    }
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
    for (int64_t row = 0; row < a.shape.rows; ++row) {
        for (int64_t c = 0; c < C; c += kLanes) {
            const int64_t e = row * C + c;
            const Lanes off = subtract(load_first(x + e, C - c), load_first(a.mean + c, C - c));
            Lanes y =
                multiply_add(off, load_first(slope + c, C - c), load_first(a.bias + c, C - c));
            if (residual) y = add(y, load_first(residual + e, C - c));
            // in this order a NaN stays
            store_first(out + e, maximum(zero_lanes(), y), C - c);
        }
    }
}

// kAdded: a residual was added, and the output says what the ReLU let through; without one the
// sign is computed again.
template <class T, bool kAdded>
void backward_of(const BatchNormReluBackward& a) {
    const int64_t C = a.shape.channels;
    const auto* grad_out = static_cast<const T*>(a.grad_out);
    const auto* x = static_cast<const T*>(a.x);
    const auto* out = static_cast<const T*>(a.out);
    auto* grad_x = static_cast<T*>(a.grad_x);
    auto* grad_residual = static_cast<T*>(a.grad_residual);
    const Buffer<float> vectors(3 * C);
    float *slope = vectors, *level = slope + C, *tilt = level + C;
    for (int64_t c = 0; c < C; ++c) {
        slope[c] = a.weight[c] * reciprocal_deviation(a.variance[c], a.eps);
    }
    // the gradient behind the ReLU, whose sign is computed again where it is not kept
    const auto cut = [&](int64_t e, int64_t c, Lanes off) {
        const Lanes y =
            kAdded ? load_first(out + e, C - c)
                   : multiply_add(off, load_first(slope + c, C - c), load_first(a.bias + c, C - c));
        return keep_above_zero(load_first(grad_out + e, C - c), y);
    };
    ColumnSums sums(a.shape.rows, C, 2, kLeastRows);
    sums.over_sections(a, [&](const auto& a, int64_t begin, int64_t end, float* of_weight) {
        float* of_bias = of_weight + C;
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t c = 0; c < C; c += kLanes) {
                const int64_t e = row * C + c;
                const Lanes off = subtract(load_first(x + e, C - c), load_first(a.mean + c, C - c));
                const Lanes g = cut(e, c, off);
                const Lanes inner = multiply_add(g, off, load_first(of_weight + c, C - c));
                add_to(of_bias + c, g, C - c);
                store_first(of_weight + c, inner, C - c);
                if (kAdded) store_first(grad_residual + e, g, C - c);
            }
        }
    });
    sums.finish(0, a.grad_weight);
    sums.finish(1, a.grad_bias);
    const float share = 1.0f / static_cast<float>(a.shape.rows);
    for (int64_t c = 0; c < C; ++c) {
        const float rstd = reciprocal_deviation(a.variance[c], a.eps);
        a.grad_weight[c] *= rstd;
        level[c] = a.grad_bias[c] * share;
        tilt[c] = -a.grad_weight[c] * rstd * share;
    }
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
    for (int64_t row = 0; row < a.shape.rows; ++row) {
        for (int64_t c = 0; c < C; c += kLanes) {
            const int64_t e = row * C + c;
            const Lanes off = subtract(load_first(x + e, C - c), load_first(a.mean + c, C - c));
            const Lanes g = kAdded ? load_first(grad_residual + e, C - c) : cut(e, c, off);
            const Lanes even = multiply_add(off, load_first(tilt + c, C - c),
                                            subtract(g, load_first(level + c, C - c)));
            store_first(grad_x + e, multiply(even, load_first(slope + c, C - c)), C - c);
        }
    }
}

template <class T>
void backward(const BatchNormReluBackward& a) {
    if (a.out) {
        backward_of<T, true>(a);
    } else {
        backward_of<T, false>(a);
    }
}

}  // namespace

void batch_norm_relu_forward(const BatchNormReluForward& a) {
    SIMMIM_OF_TYPE(a.shape.dtype, forward);
}

void batch_norm_relu_backward(const BatchNormReluBackward& a) {
    SIMMIM_OF_TYPE(a.shape.dtype, backward);
}

}  // namespace simmim::SIMMIM_TARGET
