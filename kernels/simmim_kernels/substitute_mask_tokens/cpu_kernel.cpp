// Mask-token substitution: one pass forward (a copy that picks its source row), one pass backward.
// B batch, L tokens of an image, D width; a row is one token of one image.
#include <cstring>

#include "buffer.h"
#include "half.h"
#include "lanes.h"
#include "substitute_mask_tokens.h"

namespace simmim::SIMMIM_TARGET {
namespace {

// The sum over hidden rows does not depend on the number of threads: a section is summed by one
// thread, in float32 for a few rows at a time (short sums keep the rounding error small) and in
// double beyond, and sections are added in order.
constexpr int64_t kRowsPerSection = 2048;
constexpr int64_t kRowsPerSum = 32;

template <class T>
void forward(const SubstituteForward& a) {
    const auto* tokens = static_cast<const T*>(a.tokens);
    const auto* mask_token = static_cast<const T*>(a.mask_token);
    const auto* pos_embed = static_cast<const T*>(a.pos_embed);
    auto* out = static_cast<T*>(a.out);
    const size_t bytes = sizeof(T) * static_cast<size_t>(a.width);
    const auto rows = static_cast<size_t>(a.rows);
    const bool stream = pos_embed == nullptr && worth_streaming(out, bytes, bytes * rows);
#pragma omp parallel num_threads(a.num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.rows; ++row) {
            const T* source = a.mask[row] ? mask_token : tokens + row * a.width;
            T* target = out + row * a.width;
            if (stream) {
                stream_lines(target, source, bytes);
                continue;
            }
            if (pos_embed == nullptr) {
                std::memcpy(target, source, bytes);
                continue;
            }
            const T* position = pos_embed + (row % a.tokens_per_image) * a.width;
            for (int64_t d = 0; d < a.width; ++d) {
                target[d] = from_float<T>(to_float(source[d]) + to_float(position[d]));
            }
        }
        finish_streaming();
    }
}

template <class T>
void add_row(float* sum, const T* source, int64_t width) {
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
        store(sum + d, add(load(sum + d), load(source + d)));
    }
    for (; d < width; ++d) sum[d] += to_float(source[d]);
}

template <class T>
void backward(const SubstituteBackward& a) {
    const auto* grad_out = static_cast<const T*>(a.grad_out);
    auto* grad_tokens = static_cast<T*>(a.grad_tokens);
    const size_t bytes = sizeof(T) * static_cast<size_t>(a.width);
    const int64_t sections = (a.rows + kRowsPerSection - 1) / kRowsPerSection;
    const auto width = static_cast<size_t>(a.width);
    const bool stream = worth_streaming(grad_tokens, bytes, bytes * static_cast<size_t>(a.rows));
    const Buffer<double> memory(sections * a.width);
    double* partial = memory;
    std::memset(partial, 0, sizeof(double) * static_cast<size_t>(sections) * width);
#pragma omp parallel num_threads(a.num_threads)
    {
        const Buffer<float> sum(a.width);
        std::memset(sum, 0, sizeof(float) * width);
#pragma omp for schedule(dynamic)
        for (int64_t section = 0; section < sections; ++section) {
            const int64_t begin = section * kRowsPerSection;
            const int64_t end = section + 1 < sections ? begin + kRowsPerSection : a.rows;
            int64_t summed = 0;
            for (int64_t row = begin; row < end; ++row) {
                const T* source = grad_out + row * a.width;
                T* target = grad_tokens + row * a.width;
                const bool hidden = a.mask[row] != 0;
                if (hidden) {
                    add_row(sum, source, a.width);
                    ++summed;
                }
                if (stream) {
                    stream_lines(target, hidden ? nullptr : source, bytes);
                } else if (hidden) {
                    std::memset(target, 0, bytes);
                } else {
                    std::memcpy(target, source, bytes);
                }
                if (summed == kRowsPerSum || row + 1 == end) {
                    double* total = partial + section * a.width;
                    for (int64_t d = 0; d < a.width; ++d) total[d] += sum[d];
                    std::memset(sum, 0, sizeof(float) * width);
                    summed = 0;
                }
            }
        }
        finish_streaming();
    }
    for (int64_t d = 0; d < a.width; ++d) {
        double total = 0.0;
        for (int64_t section = 0; section < sections; ++section) {
            total += partial[section * a.width + d];
        }
        a.grad_mask_token[d] = static_cast<float>(total);
    }
}

}  // namespace

void substitute_mask_tokens_forward(const SubstituteForward& a) {
    SIMMIM_OF_TYPE(a.dtype, forward);
}

void substitute_mask_tokens_backward(const SubstituteBackward& a) {
    SIMMIM_OF_TYPE(a.dtype, backward);
}

}  // namespace simmim::SIMMIM_TARGET
