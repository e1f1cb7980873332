// Runs without Python: loss, sign words and their expansion on odd sizes and odd masks, with every
// instruction set that this processor has.
#include <cmath>
#include <cstdlib>
#include <vector>

#include "kernel_test.h"
#include "masked_l1_loss.h"

namespace {

using simmim::test::check;
using simmim::test::uniform;

// A prediction of image layout, rows of 21 pixels and mask cells of 7 × 3, against plain loops.
void run() {
    const int64_t B = 2, C = 3, H = 14, W = 21, size = B * C * H * W, words = 2;
    std::vector<float> prediction(size), image(size), grad(size);
    std::vector<uint8_t> mask(B * 2 * 7);
    for (auto& x : prediction) x = uniform();
    for (auto& x : image) x = uniform();
    for (auto& x : mask) x = static_cast<uint8_t>(std::rand() & 1);
    std::vector<int32_t> signs(B * C * H * words);

    simmim::MaskedL1Forward forward{};
    forward.prediction = prediction.data();
    forward.image = image.data();
    const int64_t shape[4] = {B, C, H, W}, strides[4] = {C * H * W, H * W, W, 1};
    forward.strides = {strides, 4};
    for (int i = 0; i < 4; ++i) {
        forward.image_shape[i] = shape[i];
        forward.image_strides[i] = strides[i];
    }
    forward.mask = mask.data();
    forward.grid[0] = 2;
    forward.grid[1] = 7;
    forward.signs = signs.data();
    forward.num_threads = 1;
    const auto [one_thread, hidden_cells] = SIMMIM_CALL(masked_l1_loss_forward, forward);
    forward.num_threads = 2;
    const double two_threads = SIMMIM_CALL(masked_l1_loss_forward, forward).error;
    check(one_thread == two_threads, "the loss does not depend on the number of threads");
    SIMMIM_CALL(expand_signs, simmim::ExpandSigns{signs.data(), nullptr, grad.data(), 0, B * C * H,
                                                  1, W, 0.25f, 2});

    int64_t expected_cells = 0;
    for (const auto x : mask) expected_cells += x;
    check(hidden_cells == expected_cells, "the number of hidden cells");
    double expected = 0.0;
    bool same = true;
    for (int64_t i = 0; i < size; ++i) {
        const int64_t x = i % W, y = i / W % H, b = i / (C * H * W);
        const bool hidden = mask[(b * 2 + y / 7) * 7 + x / 3];
        const float error = prediction[i] - image[i];
        if (hidden) expected += std::abs(error);
        same &= grad[i] == (hidden ? (error > 0 ? 0.25f : -0.25f) : 0.0f);
    }
    check(std::abs(expected - one_thread) < 1e-5 * expected, "the sum of the hidden errors");
    check(same, "the gradient is the sign of the hidden errors times the step");
}

}  // namespace

int main() { return simmim::test::with_every_target(run); }
