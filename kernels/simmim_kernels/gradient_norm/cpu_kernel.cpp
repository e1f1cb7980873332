// Sum of squares in pieces of one size, each summed in float lanes, the pieces in double and in
// order: the result does not depend on the number of threads.
#include <math.h>

#include "buffer.h"
#include "gradient_norm.h"
#include "lanes.h"

namespace simmim::SIMMIM_TARGET {
namespace {

constexpr int64_t kPiece = 8192;  // elements
constexpr int kAtOnce = 4;        // sums of a piece, so that additions need not wait for each other

double piece(const float* x, int64_t size) {
    Lanes sums[kAtOnce];
    for (auto& lanes : sums) lanes = zero_lanes();
    int64_t e = 0;
    for (; e + kAtOnce * kLanes <= size; e += kAtOnce * kLanes) {
        for (int i = 0; i < kAtOnce; ++i) {
            const Lanes values = load(x + e + i * kLanes);
            sums[i] = multiply_add(values, values, sums[i]);
        }
    }
    for (; e < size; e += kLanes) {
        const Lanes values = load_first(x + e, size - e);
        sums[0] = multiply_add(values, values, sums[0]);
    }
    double total = 0.0;
    for (const auto& lanes : sums) total += static_cast<double>(sum(lanes));
    return total;
}

}  // namespace

void gradient_norm(const GradientNorm& a) {
    const int64_t* size_of = a.sizes.data;
    int64_t pieces = 0;
    for (int64_t n = 0; n < a.arrays.size; ++n) pieces += (size_of[n] + kPiece - 1) / kPiece;
    const Buffer<const float*> starts(pieces);
    const Buffer<int64_t> sizes(pieces);
    const Buffer<double> sums(pieces);
    int64_t next = 0;
    for (int64_t n = 0; n < a.arrays.size; ++n) {
        for (int64_t e = 0; e < size_of[n]; e += kPiece, ++next) {
            const int64_t left = size_of[n] - e;
            starts[next] = a.arrays.data[n] + e;
            sizes[next] = left < kPiece ? left : kPiece;
        }
    }
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
    for (int64_t p = 0; p < pieces; ++p) sums[p] = piece(starts[p], sizes[p]);
    double total = 0.0;
    for (int64_t p = 0; p < pieces; ++p) total += sums[p];
    *a.out = static_cast<float>(sqrt(total));
}

}  // namespace simmim::SIMMIM_TARGET
