// Products of small float32 matrices that fit the cache.
#pragma once

#include "lanes.h"

namespace simmim::SIMMIM_TARGET {

// Rows of the result that are summed in registers at one time: 6 × 4 sets of lanes are 24 of
// AVX-512's 32 registers; elsewhere a set takes two registers or more of 16.
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 6, kSetsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 3, kSetsAtOnce = 2;
#endif

// The factor whose rows are read element by element: element (i, k) is data[i·row + k·column].
struct Factor {
    const float* data;
    int64_t row, column;
};

template <int kRows, int kSets>
inline void product_block(Factor a, const float* b, int64_t b_row, float* out, int64_t out_row,
                          int64_t depth) {
    Lanes sum[kRows][kSets];
    for (int i = 0; i < kRows; ++i) {
        for (int s = 0; s < kSets; ++s) sum[i][s] = zero_lanes();
    }
    for (int64_t k = 0; k < depth; ++k) {
        Lanes right[kSets];
        for (int s = 0; s < kSets; ++s) right[s] = load(b + k * b_row + s * kLanes);
        for (int i = 0; i < kRows; ++i) {
            const Lanes left = all(a.data[i * a.row + k * a.column]);
            for (int s = 0; s < kSets; ++s) sum[i][s] = multiply_add(left, right[s], sum[i][s]);
        }
    }
    for (int i = 0; i < kRows; ++i) {
        for (int s = 0; s < kSets; ++s) store(out + i * out_row + s * kLanes, sum[i][s]);
    }
}

template <int kSets>
inline void product_columns(Factor a, const float* b, int64_t b_row, float* out, int64_t out_row,
                            int64_t rows, int64_t depth) {
    int64_t i = 0;
    for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce) {
        const Factor part{a.data + i * a.row, a.row, a.column};
        product_block<kRowsAtOnce, kSets>(part, b, b_row, out + i * out_row, out_row, depth);
    }
    for (; i < rows; ++i) {
        const Factor part{a.data + i * a.row, a.row, a.column};
        product_block<1, kSets>(part, b, b_row, out + i * out_row, out_row, depth);
    }
}

// out [rows, columns] = a [rows, depth] · b [depth, columns]; columns, b_row and out_row are
// multiples of 16.
inline void small_product(Factor a, const float* b, int64_t b_row, float* out, int64_t out_row,
                          int64_t rows, int64_t columns, int64_t depth) {
    int64_t c = 0;
    for (; c + kSetsAtOnce * kLanes <= columns; c += kSetsAtOnce * kLanes) {
        product_columns<kSetsAtOnce>(a, b + c, b_row, out + c, out_row, rows, depth);
    }
#if defined(__AVX512F__)
    if (columns - c == 3 * kLanes) {
        product_columns<3>(a, b + c, b_row, out + c, out_row, rows, depth);
        return;
    }
    if (columns - c == 2 * kLanes) {
        product_columns<2>(a, b + c, b_row, out + c, out_row, rows, depth);
        return;
    }
#endif
    for (; c < columns; c += kLanes) {
        product_columns<1>(a, b + c, b_row, out + c, out_row, rows, depth);
    }
}

}  // namespace simmim::SIMMIM_TARGET
