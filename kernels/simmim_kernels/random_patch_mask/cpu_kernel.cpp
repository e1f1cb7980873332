// Random mask: draw a 64-bit number for every unit, hide those with the smallest.
#include <cstring>

#include "random_patch_mask.h"

namespace simmim::SIMMIM_TARGET {
namespace {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15u;

// SplitMix64's finaliser, as in simmim_kernels/splitmix.py.
uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

uint64_t fold(uint64_t key, uint64_t part) { return mix(mix(part + kGamma) ^ (key + kGamma)); }

// Quickselect: values[0 … count-1] become the `count` smallest, the largest of them at count-1. No
// two are equal, since mixing is a bijection.
void select_smallest(int64_t* values, int64_t size, int64_t count) {
    int64_t low = 0, high = size - 1;
    while (low < high) {
        const int64_t pivot = values[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] < pivot) ++i;
            while (values[j] > pivot) --j;
            if (i <= j) {
                const int64_t swapped = values[i];
                values[i++] = values[j];
                values[j--] = swapped;
            }
        }
        if (count - 1 <= j) {
            high = j;
        } else if (count - 1 >= i) {
            low = i;
        } else {
            return;
        }
    }
}

}  // namespace

void random_patch_mask(const RandomPatchMask& a) {
    const int64_t units = a.rows * a.columns, width = a.columns * a.unit;
#pragma omp parallel num_threads(a.num_threads)
    {
        auto* draws = new int64_t[static_cast<size_t>(2 * units + 1)];
        int64_t* sorted = draws + units;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < a.batch; ++b) {
            const uint64_t key =
                fold(fold(a.key, static_cast<uint64_t>(a.epochs[b * a.epoch_stride])),
                     static_cast<uint64_t>(a.ids[b]));
            for (int64_t i = 0; i < units; ++i) {
                draws[i] = static_cast<int64_t>(mix(key + static_cast<uint64_t>(i + 1) * kGamma));
            }
            std::memcpy(sorted, draws, sizeof(int64_t) * static_cast<size_t>(units));
            if (a.num_hidden > 0) select_smallest(sorted, units, a.num_hidden);
            uint8_t* mask = a.mask + b * units * a.unit * a.unit;
            for (int64_t i = 0; i < units; ++i) {
                const bool hidden = a.num_hidden > 0 && draws[i] <= sorted[a.num_hidden - 1];
                uint8_t* corner = mask + i / a.columns * a.unit * width + i % a.columns * a.unit;
                for (int64_t row = 0; row < a.unit; ++row) {
                    std::memset(corner + row * width, hidden, static_cast<size_t>(a.unit));
                }
            }
        }
        delete[] draws;
    }
}

}  // namespace simmim::SIMMIM_TARGET
