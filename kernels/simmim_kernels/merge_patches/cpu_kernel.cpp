// Four neighbours become one normalised row, and back: nothing is gathered in memory.
#include "column_sums.h"
#include "half.h"
#include "lanes.h"
#include "merge_patches.h"
#include "row_statistics.h"

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
        const auto [mean, rstd] = row_statistics(x, kNeighbours, C, a.eps);
        for (int64_t k = 0; k < kNeighbours; ++k) {
            for (int64_t d = 0; d < C; d += kLanes) {
                const Lanes centred = subtract(load_first(x[k] + d, C - d), all(mean));
                const Lanes weight = load_first(a.weight + k * C + d, C - d);
                const Lanes bias = load_first(a.bias + k * C + d, C - d);
                const Lanes normal = multiply(centred, all(rstd));
                store_first(y + k * C + d, multiply_add(normal, weight, bias), C - d);
            }
        }
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
}

template <class T, class P>
void merge_backward(const MergeBackward& a) {
    const int64_t C = a.shape.width / kNeighbours;
    const float width = static_cast<float>(a.shape.width);
    ColumnSums sums(a.shape.rows, a.shape.width, 2);
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
    for (int64_t section = 0; section < sums.sections; ++section) {
        float* of_weight = sums.start(section);
        float* of_bias = of_weight + a.shape.width;
        for (int64_t row = section * sums.per_section; row < sums.end(section); ++row) {
            P* grad_y = static_cast<P*>(a.grad_y) + row * a.shape.width;
            const Lanes mean = all(a.mean[row]), rstd = all(a.rstd[row]);
            Lanes inner = zero_lanes(), total = zero_lanes();
            for (int64_t k = 0; k < kNeighbours; ++k) {
                const T* x = static_cast<const T*>(a.x) + begin_of(row, k, a.columns, C);
                for (int64_t d = 0; d < C; d += kLanes) {
                    const int64_t e = k * C + d;
                    const Lanes g = load_first(grad_y + e, C - d);
                    const Lanes normal = multiply(subtract(load_first(x + d, C - d), mean), rstd);
                    const Lanes weighted = multiply(g, load_first(a.weight + e, C - d));
                    total = add(total, weighted);
                    inner = multiply_add(weighted, normal, inner);
                    add_to(of_weight + e, multiply(g, normal), C - d);
                    add_to(of_bias + e, g, C - d);
                }
            }
            const Lanes mean_inner = all(-sum(inner) / width), mean_total = all(sum(total) / width);
            for (int64_t k = 0; k < kNeighbours; ++k) {
                const int64_t begin = begin_of(row, k, a.columns, C);
                const T* x = static_cast<const T*>(a.x) + begin;
                T* grad_x = static_cast<T*>(a.grad_x) + begin;
                for (int64_t d = 0; d < C; d += kLanes) {
                    const int64_t e = k * C + d;
                    const Lanes weight = load_first(a.weight + e, C - d);
                    const Lanes bias = load_first(a.bias + e, C - d);
                    const Lanes weighted = multiply(load_first(grad_y + e, C - d), weight);
                    const Lanes normal = multiply(subtract(load_first(x + d, C - d), mean), rstd);
                    const Lanes through =
                        multiply_add(normal, mean_inner, subtract(weighted, mean_total));
                    store_first(grad_x + d, multiply(through, rstd), C - d);
                    store_first(grad_y + e, multiply_add(normal, weight, bias), C - d);
                }
            }
        }
    }
    if (a.grad_weight) {
        sums.finish(0, a.grad_weight);
        sums.finish(1, a.grad_bias);
    }
}

}  // namespace

void merge_patches_forward(const MergeForward& a) { SIMMIM_OF_TYPES(merge) }
void merge_patches_backward(const MergeBackward& a) { SIMMIM_OF_TYPES(merge_backward) }

}  // namespace simmim::SIMMIM_TARGET
