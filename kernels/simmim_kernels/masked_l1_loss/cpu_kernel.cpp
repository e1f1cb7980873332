// The masked L1 loss: one pass over the hidden pixels forward, one over the sign words backward.
// B batch, C channels, H W pixels, h w cells of the prediction, s their side; a run is a row of
// pixels that lies contiguous in the prediction: a row of the image, or of a cell.
#include <cstring>

#include "buffer.h"
#include "half.h"
#include "lanes.h"
#include "masked_l1_loss.h"

namespace simmim::SIMMIM_TARGET {
namespace {

// Rows of an image-shaped prediction that one thread takes at a time.
constexpr int64_t kRowsPerBand = 32;
// Rows that are fetched ahead of their use.
constexpr int64_t kAhead = 5;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sliding-window statistics of one plane of the image, one row at a time and in double. A value
// that is not finite must not outlive its window, so sums that met one are taken afresh.
class LocalStatistics {
  public:
    LocalStatistics(int64_t height, int64_t width, int64_t window)
        : height_(height), width_(width), radius_(window / 2), sums_(4 * width + 2) {}

    // The normalised row y into `out`. `pixel(row, column)` is a pixel as float.
    template <class Pixel>
    void normalise_row(int64_t y, const Pixel& pixel, float* out) {
        double* column = sums_;
        double* column_of_squares = column + width_;
        const int64_t first = larger(0, y - radius_), last = smaller(height_ - 1, y + radius_);
        if (y == 0 || !finite_) {
            std::memset(column, 0, sizeof(double) * static_cast<size_t>(2 * width_));
            for (int64_t row = first; row <= last; ++row) add_row(row, 1.0, pixel);
        } else {
            if (y + radius_ < height_) add_row(y + radius_, 1.0, pixel);
            if (y - radius_ - 1 >= 0) add_row(y - radius_ - 1, -1.0, pixel);
        }
        double* prefix = column_of_squares + width_;
        double* prefix_of_squares = prefix + width_ + 1;
        prefix[0] = prefix_of_squares[0] = 0.0;
        for (int64_t x = 0; x < width_; ++x) {
            prefix[x + 1] = prefix[x] + column[x];
            prefix_of_squares[x + 1] = prefix_of_squares[x] + column_of_squares[x];
        }
        finite_ = __builtin_isfinite(prefix_of_squares[width_]);
        for (int64_t x = 0; x < width_; ++x) {
            const int64_t left = larger(0, x - radius_), right = smaller(width_ - 1, x + radius_);
            double sum = prefix[right + 1] - prefix[left];
            double squares = prefix_of_squares[right + 1] - prefix_of_squares[left];
            if (!finite_) {
                sum = squares = 0.0;
                for (int64_t i = left; i <= right; ++i) {
                    sum += column[i];
                    squares += column_of_squares[i];
                }
            }
            const double count = static_cast<double>((right - left + 1) * (last - first + 1));
            const double mean = sum / count;
            double variance = (squares / count - mean * mean) * (count / (count - 1.0));
            variance = variance < 0.0 ? 0.0 : variance;
            const double deviation = __builtin_sqrt(variance + 1e-6);
            out[x] = static_cast<float>((pixel(y, x) - mean) / deviation);
        }
    }

  private:
    template <class Pixel>
    void add_row(int64_t row, double weight, const Pixel& pixel) {
        double* column = sums_;
        double* column_of_squares = column + width_;
        for (int64_t x = 0; x < width_; ++x) {
            const double value = pixel(row, x);
            column[x] += weight * value;
            column_of_squares[x] += weight * (value * value);
        }
    }

    int64_t height_, width_, radius_;
    Buffer<double> sums_;  // column sums, column sums of squares, and prefix sums of both
    bool finite_ = true;
};

enum class Hidden : uint8_t { none, all, mixed };

// Which pixels of an image row are hidden: 16 bits for each group of 16 pixels of a run.
class HiddenLanes {
  public:
    HiddenLanes(int64_t runs, int64_t run)
        : run_(run),
          groups_(ceil_divide(run, kLanes)),
          lanes_(runs * groups_),
          kinds_(runs),
          runs_(runs) {}

    void read(const uint8_t* mask_row, int64_t cell) {
        const size_t bytes = sizeof(uint16_t) * static_cast<size_t>(runs_ * groups_);
        std::memset(lanes_, 0, bytes);
        any_ = false;
        for (int64_t x = 0, left = runs_ * run_; left > 0; ++mask_row, left -= cell) {
            const int64_t end = x + cell;
            if (!*mask_row) {
                x = end;
                continue;
            }
            any_ = true;
            while (x < end) {  // one step per group that the cell touches
                const int64_t within = x % run_, lane = within % kLanes;
                const int64_t count = smaller(smaller(end - x, run_ - within), kLanes - lane);
                const uint32_t bits = ((1u << count) - 1u) << lane;
                uint16_t& group = lanes_[x / run_ * groups_ + within / kLanes];
                group = static_cast<uint16_t>(group | bits);
                x += count;
            }
        }
        for (int64_t i = 0; i < runs_; ++i) {
            uint32_t every = kAllLanes, some = 0;
            for (int64_t g = 0; g < groups_; ++g) {
                every &= of_run(i)[g];
                some |= of_run(i)[g];
            }
            kinds_[i] = !some ? Hidden::none : every == kAllLanes ? Hidden::all : Hidden::mixed;
        }
    }

    bool any() const { return any_; }
    int64_t groups() const { return groups_; }
    const uint16_t* of_run(int64_t index) const { return lanes_ + index * groups_; }
    Hidden kind_of_run(int64_t index) const { return kinds_[index]; }

  private:
    int64_t run_, groups_;
    Buffer<uint16_t> lanes_;
    Buffer<Hidden> kinds_;
    int64_t runs_;
    bool any_ = false;
};

// Pixels of one row, whatever their strides.
template <class T>
const T* row_of(const T* p, int64_t stride, int64_t width, const Buffer<T>& buffer) {
    if (stride == 1) return p;
    for (int64_t x = 0; x < width; ++x) buffer[x] = p[x * stride];
    return buffer;
}

// What the error of one run needs besides its pixels.
struct RunOf {
    int64_t groups;
    float scale, shift;       // of uint8 pixels
    int64_t next_prediction;  // distance of the pixels that are fetched ahead
    int64_t next_image;
};

// Adds |error| of 16 pixels to `total`; returns their sign word.
template <bool kScaled>
inline uint32_t add_error(Lanes& total, Lanes prediction, Lanes target, const RunOf& run,
                          uint32_t lanes) {
    if constexpr (kScaled) target = scaled(target, run.scale, run.shift);
    Lanes error = subtract(prediction, target);
    if (lanes != kAllLanes) error = keep(error, lanes);
    total = add(total, absolute(error));
    return above_zero(error) | below_zero(error) << 16;
}

// A run without a visible pixel. kSigns: write its sign words.
template <bool kScaled, bool kSigns, class P, class I>
[[gnu::always_inline]] inline void add_hidden_run(Lanes& total, const P* prediction, const I* image,
                                                  const RunOf& run, int32_t* signs) {
    for (int64_t g = 0; g < run.groups; ++g, prediction += kLanes, image += kLanes) {
        // a row of a hidden cell is too short for the processor to see the stream by itself
        __builtin_prefetch(prediction + run.next_prediction);
        __builtin_prefetch(image + run.next_image);
        const uint32_t word =
            add_error<kScaled>(total, load(prediction), load(image), run, kAllLanes);
        if constexpr (kSigns) signs[g] = static_cast<int32_t>(word);
    }
}

// A run with hidden and visible pixels, or one that does not fill its last group.
template <bool kScaled, class P, class I>
[[gnu::noinline]] Lanes add_mixed_run(Lanes total, const P* prediction, const I* image,
                                      const uint16_t* hidden, const RunOf& run, int32_t* signs) {
    for (int64_t g = 0; g < run.groups; ++g, prediction += kLanes, image += kLanes) {
        const uint32_t lanes = hidden[g];
        uint32_t word = 0;
        if (lanes == kAllLanes) {
            word = add_error<kScaled>(total, load(prediction), load(image), run, lanes);
        } else if (lanes) {
            word = add_error<kScaled>(total, load_some(prediction, lanes), load_some(image, lanes),
                                      run, lanes);
        }
        if (signs) signs[g] = static_cast<int32_t>(word);
    }
    return total;
}

template <bool kScaled, class P, class I>
[[gnu::always_inline]] inline Lanes add_run(Lanes total, const P* prediction, const I* image,
                                            const uint16_t* hidden, Hidden kind, const RunOf& run,
                                            int32_t* signs) {
    if (kind == Hidden::mixed) {
        return add_mixed_run<kScaled>(total, prediction, image, hidden, run, signs);
    }
    if (kind == Hidden::none) {
        if (signs) {
            for (int64_t g = 0; g < run.groups; ++g) signs[g] = 0;
        }
    } else if (signs) {
        add_hidden_run<kScaled, true>(total, prediction, image, run, signs);
    } else {
        add_hidden_run<kScaled, false>(total, prediction, image, run, signs);
    }
    return total;
}

// One channel of a cell whose rows all have the same pixels hidden: its prediction is one stream.
template <bool kScaled, class P, class I>
void add_cell(Lanes& total, const P* prediction, const I* image, int64_t image_stride,
              const HiddenLanes& hidden, int64_t index, const RunOf& run, int64_t rows,
              int32_t* signs) {
    const Hidden kind = hidden.kind_of_run(index);
    if (kind == Hidden::none) {
        if (signs) {
            std::memset(signs, 0, sizeof(int32_t) * static_cast<size_t>(rows * run.groups));
        }
        return;
    }
    const uint16_t* lanes = hidden.of_run(index);
    Lanes sum_of_cell = total;  // a local, so that it stays in a register
    for (int64_t y = 0; y < rows; ++y) {
        sum_of_cell = add_run<kScaled>(sum_of_cell, prediction + y * rows, image + y * image_stride,
                                       lanes, kind, run, signs ? signs + y * run.groups : nullptr);
    }
    total = sum_of_cell;
}

// The loss on some rows of one plane (an image's channel); one object per thread.
template <class P, class I>
class PlaneLoss {
  public:
    explicit PlaneLoss(const MaskedL1Forward& a)
        : a_(a),
          channels_(a_.image_shape[1]),
          height_(a_.image_shape[2]),
          width_(a_.image_shape[3]),
          run_(a.stride ? a.stride : width_),
          runs_(width_ / run_),
          hidden_(runs_, run_),
          statistics_(height_, a.norm_target ? width_ : 0, a.norm_target),
          normalised_(width_),
          gathered_(width_),
          gathered_image_(width_) {
        of_run_.groups = hidden_.groups();
        of_run_.next_prediction = kAhead * run_;
        of_run_.next_image = a.norm_target ? 0 : kAhead * a_.image_strides[2];
    }

    // Σ|error| over the hidden pixels of the rows. A band is one row of cells of the prediction,
    // short enough to sum in float32.
    double sum_of_rows(int64_t image, int64_t channel, int64_t begin, int64_t end, int64_t band) {
        image_ = image;
        channel_ = channel;
        plane_ = static_cast<const I*>(a_.image) + image * a_.image_strides[0] +
                 channel * a_.image_strides[1];
        if constexpr (kBytes) {
            of_run_.scale = 1.0f / (255.0f * a_.std.data[channel]);
            of_run_.shift = a_.mean.data[channel] / a_.std.data[channel];
        }
        next_mask_row_ = begin;
        double total = 0.0;
        for (int64_t top = begin; top < end; top += band) {
            const int64_t bottom = smaller(end, top + band);
            Lanes of_band = zero_lanes();
            read_mask(top);
            if (a_.stride && !a_.norm_target && a_.image_strides[3] == 1 &&
                next_mask_row_ >= bottom) {
                for (int64_t x = 0; x < runs_; ++x) add_whole_cell(of_band, top, x);
            } else {
                for (int64_t y = top; y < bottom; ++y) add_row(of_band, y, y - top);
            }
            total += sum(of_band);
        }
        return total;
    }

  private:
    static constexpr bool kBytes = sizeof(I) == 1;

    void read_mask(int64_t y) {
        if (y < next_mask_row_) return;
        const int64_t cell_height = height_ / a_.grid[0], mask_row = y / cell_height;
        next_mask_row_ = (mask_row + 1) * cell_height;
        hidden_.read(a_.mask + (image_ * a_.grid[0] + mask_row) * a_.grid[1], width_ / a_.grid[1]);
    }

    // Index of the cell of the prediction that begins at pixel (top, x · run).
    int64_t cell_at(int64_t top, int64_t x) const {
        return (image_ * (height_ / run_) + top / run_) * runs_ + x;
    }

    // First pixel of this channel in the prediction of a cell.
    const P* prediction_of(int64_t cell) const {
        const int64_t row = a_.row_of_cell ? a_.row_of_cell[cell] : cell;
        return static_cast<const P*>(a_.prediction) + (row * channels_ + channel_) * run_ * run_;
    }

    // The first sign word of a row of this channel of a cell, or of the image; null if not kept.
    int32_t* signs_of(int64_t cell_or_image, int64_t row, int64_t rows) const {
        if (!a_.signs) return nullptr;
        const int64_t run = (cell_or_image * channels_ + channel_) * rows + row;
        return a_.signs + run * of_run_.groups;
    }

    void add_whole_cell(Lanes& total, int64_t top, int64_t x) {
        const int64_t cell = cell_at(top, x);
        add_cell<kBytes>(total, prediction_of(cell), plane_ + top * a_.image_strides[2] + x * run_,
                         a_.image_strides[2], hidden_, x, of_run_, run_, signs_of(cell, 0, run_));
    }

    // Row y of the image, which is row `within` of its band.
    void add_row(Lanes& total, int64_t y, int64_t within) {
        const auto pixel = [&](int64_t row, int64_t column) {
            const float value =
                to_float(plane_[row * a_.image_strides[2] + column * a_.image_strides[3]]);
            return kBytes ? value * of_run_.scale - of_run_.shift : value;
        };
        if (a_.norm_target) statistics_.normalise_row(y, pixel, normalised_);
        read_mask(y);
        if (!hidden_.any() && !a_.signs) return;
        const int64_t needed = hidden_.any() ? width_ : 0;  // pixels worth gathering
        const I* image = row_of(plane_ + y * a_.image_strides[2], a_.image_strides[3],
                                a_.norm_target ? 0 : needed, gathered_image_);
        for (int64_t x = 0; x < runs_; ++x) {
            const P* prediction;
            int32_t* signs;
            if (a_.stride) {
                const int64_t cell = cell_at(y - within, x);
                prediction = prediction_of(cell) + within * run_;
                signs = signs_of(cell, within, run_);
            } else {
                const P* row = static_cast<const P*>(a_.prediction) + image_ * a_.strides.data[0] +
                               channel_ * a_.strides.data[1] + y * a_.strides.data[2];
                prediction = row_of(row, a_.strides.data[3], needed, gathered_);
                signs = signs_of(image_, y, height_);
            }
            const uint16_t* lanes = hidden_.of_run(x);
            const Hidden kind = hidden_.kind_of_run(x);
            if (a_.norm_target) {
                total = add_run<false>(total, prediction, normalised_ + x * run_, lanes, kind,
                                       of_run_, signs);
            } else {
                total = add_run<kBytes>(total, prediction, image + x * run_, lanes, kind, of_run_,
                                        signs);
            }
        }
    }

    const MaskedL1Forward& a_;
    int64_t channels_, height_, width_, run_, runs_;
    HiddenLanes hidden_;
    LocalStatistics statistics_;
    Buffer<float> normalised_;
    Buffer<P> gathered_;
    Buffer<I> gathered_image_;
    RunOf of_run_{};
    const I* plane_ = nullptr;
    int64_t image_ = 0, channel_ = 0;
    int64_t next_mask_row_ = 0;  // where the next row of mask cells begins
};

template <class I, class P>
double forward(const MaskedL1Forward& a) {
    const int64_t C = a.image_shape[1], H = a.image_shape[2];
    const int64_t band = a.stride ? a.stride : kRowsPerBand;
    // the sliding window starts anew in every task, so there a task is a whole plane
    const int64_t rows_per_task = a.norm_target ? larger(H, 1) : band;
    const int64_t blocks = ceil_divide(H, rows_per_task), tasks = a.image_shape[0] * C * blocks;
    Buffer<double> partial(tasks);
#pragma omp parallel num_threads(a.num_threads)
    {
        PlaneLoss<P, I> plane(a);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t begin = task % blocks * rows_per_task;
            partial[task] = plane.sum_of_rows(task / blocks / C, task / blocks % C, begin,
                                              smaller(H, begin + rows_per_task), band);
        }
    }
    double total = 0.0;
    for (int64_t task = 0; task < tasks; ++task) total += partial[task];
    return total;
}

template <class P>
double sum_of_errors(const MaskedL1Forward& a) {
    return SIMMIM_OF_IMAGE_TYPE(a.image_dtype, forward, P);
}

template <bool kStream, class T>
void expand_rows(const ExpandSigns& a) {
    const int64_t groups = ceil_divide(a.run, kLanes), full = a.run / kLanes;
    const T values[3] = {from_float<T>(0.0f), from_float<T>(a.step), from_float<T>(-a.step)};
    const Choice<T> choice(values[1], values[2]);
    auto* out = static_cast<T*>(a.out);
#pragma omp parallel num_threads(a.num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a.num_rows; ++row) {
            const int64_t source = a.rows ? a.rows[row] : row;
            const int32_t* signs = a.signs + source * a.runs_per_row * groups;
            T* target = out + row * a.runs_per_row * a.run;
            if (full == groups) {  // no tail: the whole row is one stream
                for (int64_t g = 0; g < a.runs_per_row * groups; ++g) {
                    const auto word = static_cast<uint32_t>(signs[g]);
                    choice.template store<kStream>(target + g * kLanes, word & kAllLanes,
                                                   word >> 16);
                }
                continue;
            }
            for (int64_t i = 0; i < a.runs_per_row; ++i, signs += groups, target += a.run) {
                for (int64_t g = 0; g < groups; ++g) {
                    const auto word = static_cast<uint32_t>(signs[g]);
                    store_one_by_one(target + g * kLanes, word & kAllLanes, word >> 16, values,
                                     smaller(kLanes, a.run - g * kLanes));
                }
            }
        }
        if (kStream) finish_streaming();
    }
}

template <class T>
void expand(const ExpandSigns& a) {
    const auto row_bytes = sizeof(T) * static_cast<size_t>(a.runs_per_row * a.run);
    if (a.run % kLanes == 0 &&
        worth_streaming(a.out, row_bytes, row_bytes * static_cast<size_t>(a.num_rows))) {
        expand_rows<true, T>(a);
    } else {
        expand_rows<false, T>(a);
    }
}

}  // namespace

MaskedL1Sum masked_l1_loss_forward(const MaskedL1Forward& a) {
    int64_t hidden_cells = 0;
    for (int64_t i = 0; i < a.image_shape[0] * a.grid[0] * a.grid[1]; ++i) {
        hidden_cells += a.mask[i];
    }
    return {SIMMIM_OF_TYPE(a.dtype, sum_of_errors), hidden_cells};
}

void expand_signs(const ExpandSigns& a) { SIMMIM_OF_TYPE(a.dtype, expand); }

}  // namespace simmim::SIMMIM_TARGET
