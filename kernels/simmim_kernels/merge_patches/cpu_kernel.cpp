// Four neighbours become one normalised row, and back: nothing is gathered in memory.
#include "column_sums.h"
#include "half.h"
#include "lanes.h"
#include "layer_norm_rows.h"
#include "merge_patches.h"

namespace simmim::SIMMIM_TARGET {
namespace {

constexpr int64_t kNeighbours = 4;

// Element of x [B, H, W, C] where neighbour k of a row begins: (0, 0), (1, 0), (0, 1), (1, 1) as
// (row, column) in the block of tokens that the row merges. H is even, so images need no index.
inline int64_t begin_of(int64_t row, int64_t k, int64_t columns, int64_t C) {
    const int64_t line = 2 * (row / columns) + k % 2;
    const int64_t column = 2 * (row % columns) + k / 2;
    return (line * 2 * columns + column) * C;
}

template <class T, class P>
void merge(const MergeForward& a) {
    const int64_t C = a.shape.width / kNeighbours;
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
    for (int64_t row = 0; row < a.shape.rows; ++row) {
        const T* x[kNeighbours];
        for (int64_t k = 0; k < kNeighbours; ++k) {
            x[k] = static_cast<const T*>(a.x) + begin_of(row, k, a.columns, C);
        }
        P* y = static_cast<P*>(a.y) + row * a.shape.width;
        const auto [mean, rstd] = layer_norm_row<kNeighbours>(
            x, C, a.weight, a.bias, a.eps,
            [&](int64_t e, int64_t count, Lanes value) { store_first(y + e, value, count); });
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
}

template <class T, class P>
void merge_backward(const MergeBackward& a) {
    ColumnSums sums(a.shape.rows, a.shape.width, 2);
    sums.over_sections(a, [](const auto& a, int64_t begin, int64_t end, float* of_weight) {
        const int64_t width = a.shape.width, C = width / kNeighbours;
        for (int64_t row = begin; row < end; ++row) {
            const T* x[kNeighbours];
            T* grad_x[kNeighbours];
            for (int64_t k = 0; k < kNeighbours; ++k) {
                const int64_t corner = begin_of(row, k, a.columns, C);
                x[k] = static_cast<const T*>(a.x) + corner;
                grad_x[k] = static_cast<T*>(a.grad_x) + corner;
            }
            P* grad_y = static_cast<P*>(a.grad_y) + row * width;
            const Lanes rstd = all(a.rstd[row]);
            layer_norm_row_again<kNeighbours>(
                x, C, {a.mean[row], a.rstd[row]}, a.weight, a.bias, grad_y, of_weight,
                [&](int64_t k, int64_t d, Lanes g) {
                    store_first(grad_x[k] + d, multiply(g, rstd), C - d);
                });
        }
    });
    if (a.grad_weight) {
        sums.finish(0, a.grad_weight);
        sums.finish(1, a.grad_bias);
    }
}

}  // namespace

void merge_patches_forward(const MergeForward& a) { SIMMIM_OF_ROW_TYPES(merge); }
void merge_patches_backward(const MergeBackward& a) { SIMMIM_OF_ROW_TYPES(merge_backward); }

}  // namespace simmim::SIMMIM_TARGET
