// LayerNorm of a row, forward and backward.
#pragma once

#include <math.h>

#include "column_sums.h"
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

// A product as the backward will see it: rounded to what is kept of it.
template <class T>
[[gnu::always_inline]] inline Lanes keep_rounded(T* kept, Lanes product, int64_t count) {
    store_first(kept, product, count);
    return load_first(kept, count);
}

// product + bias (may be null) of a row in float32, for passes that read it several times. `kept`
// is the row's place among what the backward will see, or null.
template <class P, class T>
inline void biased_row(const P* product, T* kept, const float* bias, int64_t width, float* out) {
    for (int64_t d = 0; d < width; d += kLanes) {
        const int64_t count = width - d;
        Lanes value = load_first(product + d, count);
        if (kept) value = keep_rounded(kept + d, value, count);
        if (bias) value = add(value, load_first(bias + d, count));
        store_first(out + d, value, count);
    }
}

// (x - mean) · rstd
[[gnu::always_inline]] inline Lanes normalised(Lanes x, Lanes mean, Lanes rstd) {
    return multiply(subtract(x, mean), rstd);
}

// Calls write(e, count, y) for the row's LayerNorm y: its first `count` lanes are the elements
// from e on. The row lies in kPieces pieces of `width` elements each.
template <int64_t kPieces, class T, class Write>
[[gnu::always_inline]] inline RowStatistics layer_norm_row(const T* const* pieces, int64_t width,
                                                           const float* weight, const float* bias,
                                                           float eps, const Write& write) {
    const RowStatistics of_row = row_statistics(pieces, kPieces, width, eps);
    const Lanes mean = all(of_row.mean), rstd = all(of_row.rstd);
    for (int64_t k = 0; k < kPieces; ++k) {
        for (int64_t d = 0; d < width; d += kLanes) {
            const int64_t e = k * width + d, count = width - d;
            const Lanes x = normalised(load_first(pieces[k] + d, count), mean, rstd);
            write(e, count,
                  multiply_add(x, load_first(weight + e, count), load_first(bias + e, count)));
        }
    }
    return of_row;
}

// The gradient of such a row, from x(k, d), what `normalised` made of it, and grad(e, count), the
// gradient of y. Adds to the sums for weight and bias and calls write(k, d, x, g), where g · rstd
// is the gradient of the row.
template <int64_t kPieces, class X, class Grad, class Write>
[[gnu::always_inline]] inline void layer_norm_row_backward(int64_t width, const float* weight,
                                                           float* of_weight, float* of_bias,
                                                           const X& x_at, const Grad& grad,
                                                           const Write& write) {
    Lanes inner = zero_lanes(), total = zero_lanes();
    for (int64_t k = 0; k < kPieces; ++k) {
        for (int64_t d = 0; d < width; d += kLanes) {
            const int64_t e = k * width + d, count = width - d;
            const Lanes g = grad(e, count), x = x_at(k, d);
            const Lanes weighted = multiply(g, load_first(weight + e, count));
            total = add(total, weighted);
            inner = multiply_add(weighted, x, inner);
            const Lanes weight_sum = multiply_add(g, x, load_first(of_weight + e, count));
            store_first(of_weight + e, weight_sum, count);
            add_to(of_bias + e, g, count);
        }
    }
    const auto size = static_cast<float>(kPieces * width);
    const Lanes mean_inner = all(-sum(inner) / size), mean_total = all(sum(total) / size);
    for (int64_t k = 0; k < kPieces; ++k) {
        for (int64_t d = 0; d < width; d += kLanes) {
            const int64_t e = k * width + d, count = width - d;
            const Lanes x = x_at(k, d);
            const Lanes weighted = multiply(grad(e, count), load_first(weight + e, count));
            write(k, d, x, multiply_add(x, mean_inner, subtract(weighted, mean_total)));
        }
    }
}

// The gradient of a row as `layer_norm_row` takes it: calls write(k, d, g). grad_y, the gradient of
// y, becomes y again. The sums for the bias lie behind those for the weight.
template <int64_t kPieces, class T, class P, class Write>
[[gnu::always_inline]] inline void layer_norm_row_again(const T* const* pieces, int64_t width,
                                                        RowStatistics of_row, const float* weight,
                                                        const float* bias, P* grad_y,
                                                        float* of_weight, const Write& write) {
    const Lanes mean = all(of_row.mean), rstd = all(of_row.rstd);
    layer_norm_row_backward<kPieces>(
        width, weight, of_weight, of_weight + kPieces * width,
        [&](int64_t k, int64_t d) {
            return normalised(load_first(pieces[k] + d, width - d), mean, rstd);
        },
        [&](int64_t e, int64_t count) { return load_first(grad_y + e, count); },
        [&](int64_t k, int64_t d, Lanes x, Lanes g) {
            const int64_t e = k * width + d, count = width - d;
            const Lanes y =
                multiply_add(x, load_first(weight + e, count), load_first(bias + e, count));
            write(k, d, g);
            store_first(grad_y + e, y, count);
        });
}

}  // namespace simmim::SIMMIM_TARGET
