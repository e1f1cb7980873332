// Sums over the rows of a matrix that do not depend on the number of threads: made in sections of
// rows, float32 within one and double across, added in order.
#pragma once

#include <cstring>

#include "buffer.h"
#include "lanes.h"

namespace simmim::SIMMIM_TARGET {

constexpr int64_t kSections = 64;
constexpr int64_t kLeastRowsPerSection = 8, kMostRowsPerSection = 256;

// Sums of columns: each section of rows has its own, `finish` adds them.
class ColumnSums {
  public:
    ColumnSums(int64_t rows, int64_t width, int arrays, int64_t least_rows = kLeastRowsPerSection)
        : per_section(clamped((rows + kSections - 1) / kSections, least_rows)),
          sections((rows + per_section - 1) / per_section),
          width_(width),
          rows_(rows),
          arrays_(arrays),
          parts_(sections * arrays * width) {}

    // Calls add(a, begin, end, sums) for the rows of every section of the kernel's arguments `a`;
    // `sums` are its own, zeros as yet. What `add` captures is read again after each store, which
    // could change it; what it is passed is not.
    template <class Arguments, class Add>
    void over_sections(const Arguments& a, const Add& add) {
#pragma omp parallel for schedule(static) num_threads(a.shape.num_threads)
        for (int64_t section = 0; section < sections; ++section) {
            add(a, section * per_section, end(section), start(section));
        }
    }

    int64_t end(int64_t section) const {
        const int64_t row = (section + 1) * per_section;
        return row < rows_ ? row : rows_;
    }
    // Zeros for the sums of a section; the arrays lie one after the other.
    float* start(int64_t section) {
        float* part = parts_ + section * arrays_ * width_;
        std::memset(part, 0, sizeof(float) * static_cast<size_t>(arrays_ * width_));
        return part;
    }
    const float* part(int64_t section) const { return parts_ + section * arrays_ * width_; }
    void finish(int array, float* total) const {
        constexpr int64_t kAtOnce = 256;
        for (int64_t first = 0; first < width_; first += kAtOnce) {
            const int64_t count = width_ - first < kAtOnce ? width_ - first : kAtOnce;
            double sum[kAtOnce] = {};
            for (int64_t section = 0; section < sections; ++section) {
                const float* part = parts_ + (section * arrays_ + array) * width_ + first;
                for (int64_t d = 0; d < count; ++d) sum[d] += part[d];
            }
            for (int64_t d = 0; d < count; ++d) total[first + d] = static_cast<float>(sum[d]);
        }
    }

    const int64_t per_section, sections;

  private:
    static int64_t clamped(int64_t rows, int64_t least) {
        return rows < least ? least : rows > kMostRowsPerSection ? kMostRowsPerSection : rows;
    }

    int64_t width_, rows_;
    int arrays_;
    Buffer<float> parts_;
};

[[gnu::always_inline]] inline void add_to(float* total, Lanes x, int64_t count) {
    store_first(total, add(load_first(total, count), x), count);
}

}  // namespace simmim::SIMMIM_TARGET
