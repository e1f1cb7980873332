// x + branch_scale · layer_norm(product + bias): what follows the last product
// of a branch whose norm comes after it, in one pass over rows.
#include "column_sums.h"
#include "half.h"
#include "lanes.h"
#include "post_norm_block.h"
#include "row_statistics.h"

namespace simmim::SIMMIM_TARGET {
namespace {

// A row of product + bias in float32, for passes that read it several times.
class Row {
  public:
    explicit Row(int64_t width) : values_(new float[static_cast<size_t>(width + kLanes)]) {}
    ~Row() { delete[] values_; }
    Row(const Row&) = delete;
    Row& operator=(const Row&) = delete;

    template <class T>
    const float* fill(const T* product, const float* bias, int64_t width) const {
        for (int64_t d = 0; d < width; d += kLanes) {
            store(values_ + d,
                  add(load_first(product + d, width - d), load_first(bias + d, width - d)));
        }
        return values_;
    }

  private:
    float* values_;
};

template <class T, class P>
void add_normalised(const PostNormForward& a) {
    const int64_t C = a.shape.width;
#pragma omp parallel num_threads(a.shape.num_threads)
    {
        const Row memory(C);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.shape.rows; ++row) {
            const T* x = static_cast<const T*>(a.x) + row * C;
            const P* product = static_cast<const P*>(a.product) + row * C;
            T* out = static_cast<T*>(a.out) + row * C;
            const float* y;
            if (a.kept != nullptr) {
                // what the backward will see
                T* kept = static_cast<T*>(a.kept) + row * C;
                for (int64_t d = 0; d < C; d += kLanes) {
                    store_first(kept + d, load_first(product + d, C - d), C - d);
                }
                y = memory.fill(kept, a.bias, C);
            } else {
                y = memory.fill(product, a.bias, C);
            }
            const auto [mean, rstd] = row_statistics(&y, 1, C, a.eps);
            const Lanes factor =
                all(a.branch_scale ? a.branch_scale[row / a.rows_per_image] : 1.0f);
            for (int64_t d = 0; d < C; d += kLanes) {
                const Lanes scaled = multiply(subtract(load(y + d), all(mean)), all(rstd));
                const Lanes branch = multiply_add(scaled, load_first(a.weight + d, C - d),
                                                  load_first(a.norm_bias + d, C - d));
                store_first(out + d, multiply_add(branch, factor, load_first(x + d, C - d)), C - d);
            }
            a.mean[row] = mean;
            a.rstd[row] = rstd;
        }
    }
}

template <class T, class P>
void add_normalised_backward(const PostNormBackward& a) {
    const int64_t C = a.shape.width;
    ColumnSums sums(a.shape.rows, a.shape.width, 3);
#pragma omp parallel num_threads(a.shape.num_threads)
    {
        const Row memory(C);
#pragma omp for schedule(static)
        for (int64_t section = 0; section < sums.sections; ++section) {
            float* of_weight = sums.start(section);
            float* of_norm_bias = of_weight + C;
            float* of_bias = of_norm_bias + C;
            for (int64_t row = section * sums.per_section; row < sums.end(section); ++row) {
                const T* grad_out = static_cast<const T*>(a.grad_out) + row * C;
                P* grad = static_cast<P*>(a.grad_product) + row * C;
                const float* y = memory.fill(static_cast<const T*>(a.kept) + row * C, a.bias, C);
                const Lanes mean = all(a.mean[row]), rstd = all(a.rstd[row]);
                const Lanes factor =
                    all(a.branch_scale ? a.branch_scale[row / a.rows_per_image] : 1.0f);
                Lanes inner = zero_lanes(), total = zero_lanes();
                for (int64_t d = 0; d < C; d += kLanes) {
                    const Lanes g = multiply(load_first(grad_out + d, C - d), factor);
                    const Lanes scaled = multiply(subtract(load(y + d), mean), rstd);
                    const Lanes weighted = multiply(g, load_first(a.weight + d, C - d));
                    total = add(total, weighted);
                    inner = multiply_add(weighted, scaled, inner);
                    add_to(of_weight + d, multiply(g, scaled), C - d);
                    add_to(of_norm_bias + d, g, C - d);
                }
                const float width = static_cast<float>(C);
                const Lanes mean_inner = all(-sum(inner) / width);
                const Lanes mean_total = all(sum(total) / width);
                for (int64_t d = 0; d < C; d += kLanes) {
                    const Lanes g = multiply(load_first(grad_out + d, C - d), factor);
                    const Lanes weighted = multiply(g, load_first(a.weight + d, C - d));
                    const Lanes scaled = multiply(subtract(load(y + d), mean), rstd);
                    const Lanes through = multiply(
                        multiply_add(scaled, mean_inner, subtract(weighted, mean_total)), rstd);
                    store_first(grad + d, through, C - d);
                    add_to(of_bias + d, through, C - d);
                }
            }
        }
    }
    if (a.grad_weight) {
        sums.finish(0, a.grad_weight);
        sums.finish(1, a.grad_norm_bias);
        sums.finish(2, a.grad_bias);
    }
}

}  // namespace

void post_norm_forward(const PostNormForward& a) { SIMMIM_OF_TYPES(add_normalised) }
void post_norm_backward(const PostNormBackward& a) { SIMMIM_OF_TYPES(add_normalised_backward) }

}  // namespace simmim::SIMMIM_TARGET
