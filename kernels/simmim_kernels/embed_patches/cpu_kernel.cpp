// Patch embedding of the visible patches: pixels to rows, and rows to normalised tokens in their
// places. D width, a row is one visible patch.
#include "column_sums.h"
#include "embed_patches.h"
#include "half.h"
#include "lanes.h"
#include "layer_norm_rows.h"

namespace simmim::SIMMIM_TARGET {
namespace {

template <class I, class P>
void gather(const GatherPatches& a) {
    const int64_t channels = a.shape[1], p = a.patch;
    const int64_t down = a.shape[2] / p, across = a.shape[3] / p;
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
    for (int64_t row = 0; row < a.num_visible; ++row) {
        const int64_t index = a.visible[row];
        const int64_t b = index / (down * across), cell = index % (down * across);
        const I* corner = static_cast<const I*>(a.image) + b * a.strides[0] +
                          cell / across * p * a.strides[2] + cell % across * p * a.strides[3];
        P* out = static_cast<P*>(a.rows) + row * channels * p * p;
        for (int64_t c = 0; c < channels; ++c) {
            // x / 255 - mean, over std
            const bool bytes = a.image_dtype == 3;
            const float scale = bytes ? 1.0f / (255.0f * a.std.data[c]) : 1.0f;
            const float offset = bytes ? a.mean.data[c] / a.std.data[c] : 0.0f;
            for (int64_t i = 0; i < p; ++i) {
                const I* line = corner + c * a.strides[1] + i * a.strides[2];
                for (int64_t j = 0; j < p; ++j) {
                    *out++ = from_float<P>(to_float(line[j * a.strides[3]]) * scale - offset);
                }
            }
        }
    }
}

template <class T, class P>
void place(const PlaceTokensForward& a) {
    const PlaceTokens& s = a;
    const int64_t D = s.shape.width;
#pragma omp parallel num_threads(s.shape.num_threads)
    {
        const Buffer<float> memory(D);
        const float* x = memory;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < s.shape.rows; ++token) {
            T* out = static_cast<T*>(a.out) + token * D;
            const float* position =
                a.position ? a.position + token % s.tokens_per_image * D : nullptr;
            const int64_t row = s.place[token];
            if (row < 0) {
                const T* mask_token = static_cast<const T*>(a.mask_token);
                for (int64_t d = 0; d < D; d += kLanes) {
                    Lanes value = load_first(mask_token + d, D - d);
                    if (position) value = add(value, load_first(position + d, D - d));
                    store_first(out + d, value, D - d);
                }
                continue;
            }
            T* kept = a.kept ? static_cast<T*>(a.kept) + row * D : nullptr;
            biased_row(static_cast<const P*>(a.product) + row * D, kept, s.bias, D, memory);
            const auto write = [&](int64_t d, int64_t count, Lanes value) {
                if (position) value = add(value, load_first(position + d, count));
                store_first(out + d, value, count);
            };
            if (s.norm_weight) {
                const auto [mean, rstd] =
                    layer_norm_row<1>(&x, D, s.norm_weight, s.norm_bias, s.eps, write);
                a.mean[row] = mean;
                a.rstd[row] = rstd;
            } else {
                for (int64_t d = 0; d < D; d += kLanes) {
                    write(d, D - d, load_first(x + d, D - d));
                }
            }
        }
    }
}

template <class T, class P>
void place_backward(const PlaceTokensBackward& a) {
    ColumnSums sums(a.shape.rows, a.shape.width, 4);
    sums.over_sections(a, [](const auto& a, int64_t begin, int64_t end, float* of_bias) {
        const PlaceTokens& s = a;
        const int64_t D = s.shape.width;
        float* of_norm_weight = of_bias + D;
        float* of_norm_bias = of_norm_weight + D;
        float* of_mask_token = of_norm_bias + D;
        for (int64_t token = begin; token < end; ++token) {
            const T* grad_out = static_cast<const T*>(a.grad_out) + token * D;
            const int64_t row = s.place[token];
            if (row < 0) {
                for (int64_t d = 0; d < D; d += kLanes) {
                    add_to(of_mask_token + d, load_first(grad_out + d, D - d), D - d);
                }
                continue;
            }
            P* grad = static_cast<P*>(a.grad_product) + row * D;
            if (!s.norm_weight) {
                for (int64_t d = 0; d < D; d += kLanes) {
                    const Lanes g = load_first(grad_out + d, D - d);
                    add_to(of_bias + d, g, D - d);
                    store_first(grad + d, g, D - d);
                }
                continue;
            }
            const T* kept = static_cast<const T*>(a.kept) + row * D;
            const Lanes mean = all(a.mean[row]), rstd = all(a.rstd[row]);
            const auto scaled = [&](int64_t d) {
                Lanes x = load_first(kept + d, D - d);
                if (s.bias) x = add(x, load_first(s.bias + d, D - d));
                return normalised(x, mean, rstd);
            };
            Lanes inner = zero_lanes(), total = zero_lanes();
            for (int64_t d = 0; d < D; d += kLanes) {
                const Lanes g = load_first(grad_out + d, D - d);
                const Lanes weighted = multiply(g, load_first(s.norm_weight + d, D - d));
                total = add(total, weighted);
                inner = multiply_add(weighted, scaled(d), inner);
                add_to(of_norm_weight + d, multiply(g, scaled(d)), D - d);
                add_to(of_norm_bias + d, g, D - d);
            }
            const auto width = static_cast<float>(D);
            const Lanes mean_inner = all(-sum(inner) / width), mean_total = all(sum(total) / width);
            for (int64_t d = 0; d < D; d += kLanes) {
                const Lanes weighted =
                    multiply(load_first(grad_out + d, D - d), load_first(s.norm_weight + d, D - d));
                const Lanes through =
                    multiply_add(scaled(d), mean_inner, subtract(weighted, mean_total));
                const Lanes g = multiply(through, rstd);
                add_to(of_bias + d, g, D - d);
                store_first(grad + d, g, D - d);
            }
        }
    });
    sums.finish(0, a.grad_bias);
    sums.finish(1, a.grad_norm_weight);
    sums.finish(2, a.grad_norm_bias);
    sums.finish(3, a.grad_mask_token);
}

template <class P>
void gather_as(const GatherPatches& a) {
    SIMMIM_OF_IMAGE_TYPE(a.image_dtype, gather, P);
}

}  // namespace

void gather_patches(const GatherPatches& a) {
    a.product_dtype == 0 ? gather_as<float>(a) : gather_as<BFloat16>(a);
}

void place_tokens_forward(const PlaceTokensForward& a) { SIMMIM_OF_ROW_TYPES(place); }
void place_tokens_backward(const PlaceTokensBackward& a) { SIMMIM_OF_ROW_TYPES(place_backward); }

}  // namespace simmim::SIMMIM_TARGET
