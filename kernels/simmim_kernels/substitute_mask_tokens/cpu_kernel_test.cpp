// Runs without Python: forward, backward and thread-count independence on odd sizes, with every
// instruction set that this processor has.
#include <cstdlib>
#include <vector>

#include "kernel_test.h"
#include "substitute_mask_tokens.h"

namespace {

using simmim::test::check;
using simmim::test::uniform;

// The kernels of the current instruction set against plain loops.
void run() {
    const int64_t batch = 3, tokens_per_image = 317, width = 7;
    const int64_t rows = batch * tokens_per_image, size = rows * width;
    std::vector<float> tokens(size), grad(size), token(width), position(tokens_per_image * width);
    std::vector<uint8_t> mask(rows);
    for (auto& x : tokens) x = uniform();
    for (auto& x : grad) x = uniform();
    for (auto& x : token) x = uniform();
    for (auto& x : position) x = uniform();
    for (auto& x : mask) x = static_cast<uint8_t>(std::rand() & 1);

    std::vector<float> out(size), grad_tokens(size), sum(width), sum_two(width);
    SIMMIM_CALL(substitute_mask_tokens_forward,
                simmim::SubstituteForward{tokens.data(), mask.data(), token.data(), position.data(),
                                          out.data(), rows, tokens_per_image, width, 0, 2});
    bool same = true;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t d = 0; d < width; ++d) {
            const float source = mask[row] ? token[d] : tokens[row * width + d];
            same &= out[row * width + d] == source + position[row % tokens_per_image * width + d];
        }
    }
    check(same, "forward picks the mask token in hidden rows and adds the position");

    simmim::SubstituteBackward backward{
        grad.data(), mask.data(), grad_tokens.data(), sum.data(), rows, width, 0, 1};
    SIMMIM_CALL(substitute_mask_tokens_backward, backward);
    backward.grad_mask_token = sum_two.data();
    backward.num_threads = 2;
    SIMMIM_CALL(substitute_mask_tokens_backward, backward);
    check(sum == sum_two, "the mask token's gradient does not depend on the number of threads");
    std::vector<double> expected(width, 0.0);
    same = true;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t d = 0; d < width; ++d) {
            same &= grad_tokens[row * width + d] == (mask[row] ? 0.0f : grad[row * width + d]);
            if (mask[row]) expected[d] += grad[row * width + d];
        }
    }
    check(same, "visible rows pass their gradient, hidden rows get 0");
    for (int64_t d = 0; d < width; ++d) {
        check(std::abs(expected[d] - sum[d]) < 1e-4, "the hidden rows are summed");
    }
}

}  // namespace

int main() { return simmim::test::with_every_target(run); }
