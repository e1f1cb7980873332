// Mask-token substitution: one pass forward (a copy that picks its source row), one pass backward.
// B batch, L tokens of an image, D width; a row is one token of one image.
#include <algorithm>
#include <cstring>
#include <vector>

#include "half.h"
#include "substitute_mask_tokens.h"

namespace simmim {
namespace {

// Rows are summed in blocks of this size, and the blocks in order and in double: the result is the
// same whatever the number of threads, and short sums keep float32's rounding error small.
constexpr int64_t kRowsPerBlock = 32;

}  // namespace

template <class T>
void substitute_mask_tokens_forward(const T* tokens, const uint8_t* mask, const T* mask_token,
                                    const T* pos_embed, T* out, int64_t rows,
                                    int64_t tokens_per_image, int64_t width, int num_threads) {
    (void)num_threads;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T* source = mask[row] ? mask_token : tokens + row * width;
        T* target = out + row * width;
        if (pos_embed == nullptr) {
            std::memcpy(target, source, sizeof(T) * static_cast<size_t>(width));
            continue;
        }
        const T* position = pos_embed + (row % tokens_per_image) * width;
        for (int64_t d = 0; d < width; ++d) {
            target[d] = from_float<T>(to_float(source[d]) + to_float(position[d]));
        }
    }
}

template <class T>
void substitute_mask_tokens_backward(const T* grad_out, const uint8_t* mask, T* grad_tokens,
                                     float* grad_mask_token, int64_t rows, int64_t width,
                                     int num_threads) {
    (void)num_threads;
    const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
    std::vector<float> partial(static_cast<size_t>(blocks * width), 0.0f);
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t block = 0; block < blocks; ++block) {
        float* sum = partial.data() + block * width;
        const int64_t end = std::min(rows, (block + 1) * kRowsPerBlock);
        for (int64_t row = block * kRowsPerBlock; row < end; ++row) {
            const T* source = grad_out + row * width;
            T* target = grad_tokens + row * width;
            const size_t bytes = sizeof(T) * static_cast<size_t>(width);
            if (!mask[row]) {
                std::memcpy(target, source, bytes);
                continue;
            }
            std::memset(target, 0, bytes);
            for (int64_t d = 0; d < width; ++d) {
                sum[d] += to_float(source[d]);
            }
        }
    }
    std::vector<double> total(static_cast<size_t>(width), 0.0);
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t d = 0; d < width; ++d) {
            total[static_cast<size_t>(d)] += partial[static_cast<size_t>(block * width + d)];
        }
    }
    std::copy(total.begin(), total.end(), grad_mask_token);
}

#define SIMMIM_INSTANTIATE(T)                                                                     \
    template void substitute_mask_tokens_forward<T>(const T*, const uint8_t*, const T*, const T*, \
                                                    T*, int64_t, int64_t, int64_t, int);          \
    template void substitute_mask_tokens_backward<T>(const T*, const uint8_t*, T*, float*,        \
                                                     int64_t, int64_t, int);
SIMMIM_INSTANTIATE(float)
SIMMIM_INSTANTIATE(BFloat16)
SIMMIM_INSTANTIATE(Float16)
#undef SIMMIM_INSTANTIATE

}  // namespace simmim
