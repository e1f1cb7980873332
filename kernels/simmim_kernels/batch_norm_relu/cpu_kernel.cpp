// Batch norm, sum and ReLU in two passes over the map, forward and backward.
#include "batch_norm_relu.h"
#include "column_sums.h"
#include "half.h"
#include "lanes.h"

namespace simmim::SIMMIM_TARGET {
namespace {

// Rows whose channels are read together, so that vectors over channels are loaded once for all.
constexpr int64_t kRowsAtOnce = 4;
// Of a map of few rows the sums of many sections would be as large as the map.
constexpr int64_t kLeastRows = 32;
// Rows of a section whose mean is taken away from all its rows before they are squared.
constexpr int64_t kRowsOfShift = 8;
// Channels that one thread adds up at a time.
constexpr int64_t kChannelsAtOnce = 64;

// Vectors over the channels, in one piece of memory.
class ChannelVectors {
  public:
    ChannelVectors(int64_t channels, int arrays)
        : channels_(channels), values_(new float[static_cast<size_t>(arrays * channels)]) {}
    ~ChannelVectors() { delete[] values_; }
    ChannelVectors(const ChannelVectors&) = delete;
    ChannelVectors& operator=(const ChannelVectors&) = delete;

    float* operator[](int array) const { return values_ + array * channels_; }

  private:
    int64_t channels_;
    float* values_;
};

// Calls body(first row, number of rows) for runs of rows; the number is a constant in each call.
template <class Body>
inline void in_runs(int64_t begin, int64_t end, const Body& body) {
    int64_t row = begin;
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) body.template operator()<kRowsAtOnce>(row);
    for (; row < end; ++row) body.template operator()<1>(row);
}

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
    in_runs(begin, end, [&]<int64_t kRows>(int64_t row) {
        for (int64_t c = 0; c < C; c += kLanes) {
            const Lanes from = load_first(shift + c, C - c);
            Lanes sum = load_first(total + c, C - c), square = load_first(squares + c, C - c);
            for (int64_t r = 0; r < kRows; ++r) {
                const Lanes off = subtract(load_first(x + (row + r) * C + c, C - c), from);
                sum = add(sum, off);
                square = multiply_add(off, off, square);
            }
            store_first(total + c, sum, C - c);
            store_first(squares + c, square, C - c);
        }
    });
}

// Mean and biased variance of every channel.
template <class T>
void statistics(const BatchNormReluForward& a) {
    const int64_t C = a.shape.channels;
    ColumnSums sums(a.shape.rows, C, 3, kLeastRows);
    const auto size = [&](int64_t section) {
        return static_cast<double>(sums.end(section) - section * sums.per_section);
    };
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
    for (int64_t section = 0; section < sums.sections; ++section) {
        sums_of_section(static_cast<const T*>(a.x), section * sums.per_section, sums.end(section),
                        C, sums.start(section));
    }
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
    const ChannelVectors vectors(C, 1);
    float* slope = vectors[0];
    for (int64_t c = 0; c < C; ++c) {
        slope[c] = a.weight[c] * reciprocal_deviation(a.variance[c], a.eps);
    }
    const int64_t runs = (a.shape.rows + kRowsAtOnce - 1) / kRowsAtOnce;
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
    for (int64_t run = 0; run < runs; ++run) {
        const int64_t begin = run * kRowsAtOnce;
        const int64_t end = begin + kRowsAtOnce < a.shape.rows ? begin + kRowsAtOnce : a.shape.rows;
        in_runs(begin, end, [&]<int64_t kRows>(int64_t row) {
            for (int64_t c = 0; c < C; c += kLanes) {
                const Lanes mean = load_first(a.mean + c, C - c);
                const Lanes factor = load_first(slope + c, C - c);
                const Lanes bias = load_first(a.bias + c, C - c);
                for (int64_t r = 0; r < kRows; ++r) {
                    const int64_t e = (row + r) * C + c;
                    const Lanes off = subtract(load_first(x + e, C - c), mean);
                    Lanes y = multiply_add(off, factor, bias);
                    if (residual) y = add(y, load_first(residual + e, C - c));
                    // in this order a NaN stays
                    store_first(out + e, maximum(zero_lanes(), y), C - c);
                }
            }
        });
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
    const ChannelVectors vectors(C, 3);
    float *slope = vectors[0], *level = vectors[1], *tilt = vectors[2];
    for (int64_t c = 0; c < C; ++c) {
        slope[c] = a.weight[c] * reciprocal_deviation(a.variance[c], a.eps);
    }
    ColumnSums sums(a.shape.rows, C, 2, kLeastRows);
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
    for (int64_t section = 0; section < sums.sections; ++section) {
        float* of_weight = sums.start(section);
        float* of_bias = of_weight + C;
        in_runs(section * sums.per_section, sums.end(section), [&]<int64_t kRows>(int64_t row) {
            for (int64_t c = 0; c < C; c += kLanes) {
                const Lanes mean = load_first(a.mean + c, C - c);
                const Lanes factor = load_first(slope + c, C - c);
                const Lanes bias = load_first(a.bias + c, C - c);
                Lanes inner = load_first(of_weight + c, C - c);
                Lanes total = load_first(of_bias + c, C - c);
                for (int64_t r = 0; r < kRows; ++r) {
                    const int64_t e = (row + r) * C + c;
                    const Lanes off = subtract(load_first(x + e, C - c), mean);
                    const Lanes y =
                        kAdded ? load_first(out + e, C - c) : multiply_add(off, factor, bias);
                    const Lanes g = keep_above_zero(load_first(grad_out + e, C - c), y);
                    inner = multiply_add(g, off, inner);
                    total = add(total, g);
                    if (kAdded) store_first(grad_residual + e, g, C - c);
                }
                store_first(of_weight + c, inner, C - c);
                store_first(of_bias + c, total, C - c);
            }
        });
    }
    sums.finish(0, a.grad_weight);
    sums.finish(1, a.grad_bias);
    const float share = 1.0f / static_cast<float>(a.shape.rows);
    for (int64_t c = 0; c < C; ++c) {
        const float rstd = reciprocal_deviation(a.variance[c], a.eps);
        a.grad_weight[c] *= rstd;
        level[c] = a.grad_bias[c] * share;
        tilt[c] = -a.grad_weight[c] * rstd * share;
    }
    const int64_t runs = (a.shape.rows + kRowsAtOnce - 1) / kRowsAtOnce;
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
    for (int64_t run = 0; run < runs; ++run) {
        const int64_t begin = run * kRowsAtOnce;
        const int64_t end = begin + kRowsAtOnce < a.shape.rows ? begin + kRowsAtOnce : a.shape.rows;
        in_runs(begin, end, [&]<int64_t kRows>(int64_t row) {
            for (int64_t c = 0; c < C; c += kLanes) {
                const Lanes mean = load_first(a.mean + c, C - c);
                const Lanes factor = load_first(slope + c, C - c);
                const Lanes bias = load_first(a.bias + c, C - c);
                const Lanes flat = load_first(level + c, C - c);
                const Lanes lean = load_first(tilt + c, C - c);
                for (int64_t r = 0; r < kRows; ++r) {
                    const int64_t e = (row + r) * C + c;
                    const Lanes off = subtract(load_first(x + e, C - c), mean);
                    const Lanes g = kAdded ? load_first(grad_residual + e, C - c)
                                           : keep_above_zero(load_first(grad_out + e, C - c),
                                                             multiply_add(off, factor, bias));
                    const Lanes even = multiply_add(off, lean, subtract(g, flat));
                    store_first(grad_x + e, multiply(even, factor), C - c);
                }
            }
        });
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
    if (a.shape.dtype == 0) {
        forward<float>(a);
    } else if (a.shape.dtype == 1) {
        forward<BFloat16>(a);
    } else {
        forward<Float16>(a);
    }
}

void batch_norm_relu_backward(const BatchNormReluBackward& a) {
    if (a.shape.dtype == 0) {
        backward<float>(a);
    } else if (a.shape.dtype == 1) {
        backward<BFloat16>(a);
    } else {
        backward<Float16>(a);
    }
}

}  // namespace simmim::SIMMIM_TARGET
