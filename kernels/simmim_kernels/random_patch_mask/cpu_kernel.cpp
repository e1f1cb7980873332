// Random mask: draw a 64-bit number for every unit, hide those with the smallest.
#include <cstring>

#include "buffer.h"
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

// Up to this many units, comparing all pairs without a branch beats selecting.
constexpr int64_t kFewUnits = 128;

// hidden[i] = 1 for the `count` smallest draws, else 0; `scratch` has room for the draws.
void hide_smallest(const int64_t* draws, int64_t size, int64_t count, int64_t* scratch,
                   uint8_t* hidden) {
    if (size <= kFewUnits) {
        for (int64_t i = 0; i < size; ++i) {
            int64_t smaller = 0;
            for (int64_t j = 0; j < size; ++j) smaller += draws[j] < draws[i];
            hidden[i] = smaller < count;
        }
        return;
    }
    std::memset(hidden, 0, static_cast<size_t>(size));
    if (count == 0) return;
    std::memcpy(scratch, draws, sizeof(int64_t) * static_cast<size_t>(size));
    select_smallest(scratch, size, count);
    for (int64_t i = 0; i < size; ++i) hidden[i] = draws[i] <= scratch[count - 1];
}

// One byte a unit → one byte a token.
void spread(const uint8_t* hidden, const RandomPatchMask& a, uint8_t* out) {
    const int64_t width = a.columns * a.unit;
    for (int64_t row = 0; row < a.rows; ++row, hidden += a.columns, out += a.unit * width) {
        for (int64_t column = 0; column < a.columns; ++column) {
            uint8_t* token = out + column * a.unit;
            if (a.unit % 8 != 0) {
                for (int64_t i = 0; i < a.unit; ++i) token[i] = hidden[column];
                continue;
            }
            const uint64_t eight = hidden[column] * uint64_t{0x0101010101010101};
            for (int64_t i = 0; i < a.unit; i += 8) std::memcpy(token + i, &eight, 8);
        }
        for (int64_t i = 1; i < a.unit; ++i) {
            std::memcpy(out + i * width, out, static_cast<size_t>(width));
        }
    }
}

}  // namespace

void random_patch_mask(const RandomPatchMask& a) {
    const int64_t units = a.rows * a.columns;
#pragma omp parallel num_threads(a.num_threads)
    {
        const Buffer<int64_t> draws(2 * units);
        const Buffer<uint8_t> hidden(units);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < a.batch; ++b) {
            const uint64_t key = fold(fold(static_cast<uint64_t>(a.key),
                                           static_cast<uint64_t>(a.epochs[b * a.epoch_stride])),
                                      static_cast<uint64_t>(a.ids[b]));
            for (int64_t i = 0; i < units; ++i) {
                draws[i] = static_cast<int64_t>(mix(key + static_cast<uint64_t>(i + 1) * kGamma));
            }
            hide_smallest(draws, units, a.num_hidden, draws + units, hidden);
            spread(hidden, a, a.mask + b * units * a.unit * a.unit);
        }
    }
}

}  // namespace simmim::SIMMIM_TARGET
