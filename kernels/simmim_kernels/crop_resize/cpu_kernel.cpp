// Resizing in two passes of 22-bit fixed point, as Pillow's: along the rows into bytes, then along
// the columns. Rows pass through a ring that the second pass reads while they are in the cache.
//
// Vector code splits a weight as high · 2^16 + low, low a signed word. An output's positive weights
// are at most 1.29 together, its negative ones 0.29, both at the border of a lanczos. So high is at
// most 83, the sum of high · byte fits a word, and that of low · byte, which is nowhere larger than
// weight · byte, 32 bits: floor((Σ high · byte · 2^16 + Σ low · byte) / 2^16) is the sum of the
// first and of the second shifted right, and fits a word.
#include <cstring>

#include "buffer.h"
#include "byte_lanes.h"
#include "crop_resize.h"
#include "resampling_weights.h"

namespace simmim::SIMMIM_TARGET {
namespace {

constexpr int32_t kHalf = 1 << (kPrecision - 1);
constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kOutputsAtOnce = 4;
constexpr int64_t kPadding = 64;  // bytes that may be read or written after a row of ours

void copy(const uint8_t* from, uint8_t* to, int64_t bytes) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
}

uint8_t clipped(int32_t sum) {
    const int32_t value = sum >> kPrecision;
    return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// How the pass along the rows goes over the taps: in units of one load from every row.
struct Plan {
    int64_t unit;    // taps
    int64_t units;   // of every output
    int64_t stride;  // weights of an output, an even number in vector code
    int64_t load;    // bytes; 0 means the plain loop, which reads nothing else than the taps
};

Plan plan_for([[maybe_unused]] int64_t channels, int64_t taps) {
#ifdef SIMMIM_BYTE_LANES
    if (channels == 1) return {8, (taps + 7) / 8, rounded_up(taps, 8), 8};
    if (channels == 3 || channels == 4) {
        if (taps <= 2) return {2, 1, 2, kPartBytes};
        // five pixels of three channels fit a load, four of four
        if (taps <= kPartBytes / channels) return {taps, 1, rounded_up(taps, 2), kPartBytes};
        return {4, (taps + 3) / 4, rounded_up(taps, 4), kPartBytes};
    }
#endif
    return {taps, 1, taps, 0};
}

#ifdef SIMMIM_BYTE_LANES

int16_t low_of(int32_t weight) { return static_cast<int16_t>(weight & 0xffff); }
int16_t high_of(int32_t weight) { return static_cast<int16_t>((weight + 0x8000) >> 16); }

// For kRowsAtOnce rows: out[x] from rows[first[x] …].
struct RowsPass {
    const int32_t* first;       // [outputs, rounded up to kOutputsAtOnce]: bytes
    const int16_t *low, *high;  // [likewise][stride]
    int64_t outputs, stride, units;
};

constexpr int64_t kRegisters = kRowsAtOnce / kParts;

// The bytes of one pixel after the other of the sums of four lanes, of which kChannels count.
template <int kChannels>
Bytes without_gaps(Bytes pixels) {
    if (kChannels == 4) return pixels;
    return shuffle(pixels, in_every_part(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1,
                                                       -1, -1, -1)));
}

// Two words for each channel, its bytes of the pixels `even` and `odd` of a load; 0 for pixel -1.
template <int kChannels>
Bytes lanes_of(int even, int odd) {
    int8_t indices[kPartBytes];
    for (int c = 0; c < 4; ++c) {
        indices[4 * c] = static_cast<int8_t>(c < kChannels ? even * kChannels + c : -1);
        indices[4 * c + 1] = -1;
        indices[4 * c + 2] =
            static_cast<int8_t>(c < kChannels && odd >= 0 ? odd * kChannels + c : -1);
        indices[4 * c + 3] = -1;
    }
    return in_every_part(load_part(reinterpret_cast<const uint8_t*>(indices)));
}

constexpr int kRest = kPrecision - 16;  // what is left to shift after Σ low · byte was

// A part is a row, its four sums the channels of a pixel. Taps go in pairs; the last of an odd
// number takes its weight unsplit, from the place of the low words of a pair.
template <int kChannels, int kTaps, bool kOneUnit>
void pixels_pass(const RowsPass& a, const uint8_t* const* rows, uint8_t* const* out) {
    constexpr int kPairs = kTaps / 2;
    const Bytes lanes[3] = {lanes_of<kChannels>(0, 1), lanes_of<kChannels>(2, 3),
                            lanes_of<kChannels>(4, 5)};
    const Bytes last_lanes = lanes_of<kChannels>(kTaps - 1, -1);
    const int64_t units = kOneUnit ? 1 : a.units;
    for (int64_t x = 0; x < a.outputs; x += kOutputsAtOnce) {
        Bytes pixels[kRegisters][kOutputsAtOnce];
        for (int64_t e = 0; e < kOutputsAtOnce; ++e) {
            const int16_t *low = a.low + (x + e) * a.stride, *high = a.high + (x + e) * a.stride;
            int64_t offset = a.first[x + e];
            Bytes sum[kRegisters], sum_high[kRegisters];
            for (int64_t r = 0; r < kRegisters; ++r) sum[r] = sum_high[r] = zero_bytes();
            for (int64_t u = 0; u < units; ++u, offset += kTaps * kChannels) {
                Bytes loaded[kRegisters];
                for (int64_t r = 0; r < kRegisters; ++r) {
                    loaded[r] = load_parts(rows + r * kParts, offset);
                }
                for (int p = 0; p < kPairs; ++p, low += 2, high += 2) {
                    const Bytes weights = every_pair(low), weights_high = every_pair(high);
                    for (int64_t r = 0; r < kRegisters; ++r) {
                        const Bytes words = shuffle(loaded[r], lanes[p]);
                        sum[r] = add_sums(sum[r], dot_words(words, weights));
                        sum_high[r] = add_sums(sum_high[r], dot_words(words, weights_high));
                    }
                }
                if (kTaps % 2) {
                    const Bytes weight = every_pair(low);
                    for (int64_t r = 0; r < kRegisters; ++r) {
                        const Bytes last = shuffle(loaded[r], last_lanes);
                        sum[r] = add_sums(sum[r], multiply_sums(last, weight));
                    }
                }
            }
            for (int64_t r = 0; r < kRegisters; ++r) {
                pixels[r][e] = add_sums(sum_high[r], shift_sums_right<16>(sum[r]));
            }
        }
        for (int64_t r = 0; r < kRegisters; ++r) {
            const Bytes* p = pixels[r];
            const Bytes bytes = to_bytes(rounded_words<kRest>(to_words(p[0], p[1])),
                                         rounded_words<kRest>(to_words(p[2], p[3])));
            store_parts(out + r * kParts, x * kChannels, without_gaps<kChannels>(bytes));
        }
    }
}

// One channel: a part is a row, its eight words neighbouring taps of one output.
void single_channel_pass(const RowsPass& a, const uint8_t* const* rows, uint8_t* const* out) {
    for (int64_t x = 0; x < a.outputs; x += kOutputsAtOnce) {
        Bytes sums[kRegisters][kOutputsAtOnce];
        for (int64_t e = 0; e < kOutputsAtOnce; ++e) {
            const int16_t *low = a.low + (x + e) * a.stride, *high = a.high + (x + e) * a.stride;
            Bytes sum[kRegisters], sum_high[kRegisters];
            for (int64_t r = 0; r < kRegisters; ++r) sum[r] = sum_high[r] = zero_bytes();
            for (int64_t t = 0; t < a.stride; t += 8) {
                const Bytes words =
                    in_every_part(load_part(reinterpret_cast<const uint8_t*>(low + t)));
                const Bytes words_high =
                    in_every_part(load_part(reinterpret_cast<const uint8_t*>(high + t)));
                for (int64_t r = 0; r < kRegisters; ++r) {
                    const Bytes taps = load_parts_as_words(rows + r * kParts, a.first[x + e] + t);
                    sum[r] = add_sums(sum[r], dot_words(taps, words));
                    sum_high[r] = add_sums(sum_high[r], dot_words(taps, words_high));
                }
            }
            for (int64_t r = 0; r < kRegisters; ++r) {
                sums[r][e] = add_sums(sum[r], shift_sums_left<16>(sum_high[r]));
            }
        }
        for (int64_t r = 0; r < kRegisters; ++r) {
            const Bytes* s = sums[r];
            const Bytes total = shift_sums_right<16>(totals(s[0], s[1], s[2], s[3]));
            const Bytes words = rounded_words<kRest>(to_words(total, total));
            store_parts(out + r * kParts, x, to_bytes(words, words));
        }
    }
}

void rows_pass(const RowsPass& a, int64_t channels, int64_t unit, const uint8_t* const* rows,
               uint8_t* const* out) {
    if (channels == 1) return single_channel_pass(a, rows, out);
    if (channels == 3) {
        return a.units > 1 ? pixels_pass<3, 4, false>(a, rows, out)
               : unit == 2 ? pixels_pass<3, 2, true>(a, rows, out)
               : unit == 3 ? pixels_pass<3, 3, true>(a, rows, out)
               : unit == 4 ? pixels_pass<3, 4, true>(a, rows, out)
                           : pixels_pass<3, 5, true>(a, rows, out);
    }
    return a.units > 1 ? pixels_pass<4, 4, false>(a, rows, out)
           : unit == 2 ? pixels_pass<4, 2, true>(a, rows, out)
           : unit == 3 ? pixels_pass<4, 3, true>(a, rows, out)
                       : pixels_pass<4, 4, true>(a, rows, out);
}

// kBytes neighbouring values of one output row. Weights of taps beyond the last are 0, and its row
// stands in for theirs. kPairs: of taps, or 0 if any number.
template <int kPairs>
Bytes column_sums(const uint8_t* const* rows, int64_t column, const int16_t* low,
                  const int16_t* high_bytes, int64_t pairs) {
    const Bytes zero = zero_bytes();
    Bytes sums[4] = {zero, zero, zero, zero}, high[2] = {zero, zero};
    for (int64_t p = 0; p < (kPairs ? kPairs : pairs); ++p) {
        const Bytes a = load_bytes(rows[2 * p] + column), b = load_bytes(rows[2 * p + 1] + column);
        const Bytes bytes[2] = {interleave_low(a, b), interleave_high(a, b)};
        const Bytes weights = every_pair(low + 2 * p), weights_high = every_word(high_bytes[p]);
        for (int i = 0; i < 2; ++i) {
            high[i] = add_words(high[i], dot_bytes(bytes[i], weights_high));
            sums[2 * i] = add_sums(sums[2 * i], dot_words(interleave_low(bytes[i], zero), weights));
            sums[2 * i + 1] =
                add_sums(sums[2 * i + 1], dot_words(interleave_high(bytes[i], zero), weights));
        }
    }
    for (auto& sum : sums) sum = shift_sums_right<16>(sum);
    for (int i = 0; i < 2; ++i) {
        high[i] = rounded_words<kRest>(add_words(high[i], to_words(sums[2 * i], sums[2 * i + 1])));
    }
    return to_bytes(high[0], high[1]);
}

template <int kPairs>
void columns_pass(const uint8_t* const* rows, const int16_t* low, const int16_t* high_bytes,
                  int64_t pairs, int64_t size, uint8_t* out) {
    int64_t e = 0;
    for (; e + kBytes <= size; e += kBytes) {
        store_bytes(out + e, column_sums<kPairs>(rows, e, low, high_bytes, pairs));
    }
    if (e == size) return;
    if (size >= kBytes) {  // the last ones, some for the second time
        e = size - kBytes;
        store_bytes(out + e, column_sums<kPairs>(rows, e, low, high_bytes, pairs));
        return;
    }
    uint8_t last[kBytes];
    store_bytes(last, column_sums<kPairs>(rows, 0, low, high_bytes, pairs));
    copy(last, out, size);
}

#endif

// The pass along the rows, from the image into rows of our own.
class AlongRows {
  public:
    explicit AlongRows(const CropResize& a)
        : a_(a),
          copies_only_(a.box.width == a.size.width && !a.flip),
          axis_(a.box.width, a.size.width, support_of(a.filter)),
          plan_(plan_for(a.shape.channels, axis_.taps)),
          outputs_(rounded_up(a.size.width, kOutputsAtOnce)),
          first_(outputs_),
          weights_(outputs_ * plan_.stride),
          low_(plan_.load ? outputs_ * plan_.stride : 0),
          high_(plan_.load ? outputs_ * plan_.stride : 0) {
        const uint8_t* last_row = a.image + (a.shape.height - 1) * a.row_stride;
        end_ = (last_row > a.image ? last_row : a.image) + a.shape.width * a.shape.channels;
        if (!copies_only_) lay_out();
    }

    // Rows `row` … of the box, as many as it has of kRowsAtOnce, into `out`.
    void run(int64_t row, uint8_t* const* out) const {
        const int64_t left = a_.box.height - row, rows = left < kRowsAtOnce ? left : kRowsAtOnce;
        const uint8_t* in[kRowsAtOnce];
        for (int64_t r = 0; r < rows; ++r) {
            in[r] =
                a_.image + (a_.box.top + row + r) * a_.row_stride + a_.box.left * a_.shape.channels;
        }
        if (!copies_only_ && plan_.load) return run_vectors(rows, in, out);
        for (int64_t r = 0; r < rows; ++r) {
            copies_only_ ? copy(in[r], out[r], a_.size.width * a_.shape.channels)
                         : run_plain(in[r], out[r]);
        }
    }

  private:
    void lay_out() {
        weigh(axis_, a_.filter, a_.flip, plan_.stride, weights_);
        for (int64_t i = a_.size.width * plan_.stride; i < outputs_ * plan_.stride; ++i) {
            weights_[i] = 0;
        }
        reach_ = a_.box.width * a_.shape.channels;
        for (int64_t x = 0; x < outputs_; ++x) {
            const bool beyond = x >= a_.size.width;
            const int64_t tap = beyond ? 0 : axis_.first[a_.flip ? a_.size.width - 1 - x : x];
            first_[x] = static_cast<int32_t>(tap * a_.shape.channels);
            const int64_t last_unit = (plan_.units - 1) * plan_.unit * a_.shape.channels;
            const int64_t reach = first_[x] + last_unit + plan_.load;
            reach_ = reach > reach_ ? reach : reach_;
        }
#ifdef SIMMIM_BYTE_LANES
        if (!plan_.load) return;
        for (int64_t i = 0; i < outputs_ * plan_.stride; ++i) {
            low_[i] = low_of(weights_[i]);
            high_[i] = high_of(weights_[i]);
        }
        for (int64_t x = 0; plan_.unit % 2 && x < outputs_; ++x) {
            const int64_t last = x * plan_.stride + plan_.unit - 1;
            std::memcpy(low_ + last, weights_ + last, sizeof(int32_t));
        }
#endif
    }

    void run_vectors([[maybe_unused]] int64_t rows, [[maybe_unused]] const uint8_t** in,
                     [[maybe_unused]] uint8_t* const* out) const {
#ifdef SIMMIM_BYTE_LANES
        // loads may reach into the next row, but not past the image
        int64_t num_copies = 0;
        for (int64_t r = 0; r < rows; ++r) num_copies += end_ - in[r] < reach_;
        Buffer<uint8_t> copies(num_copies * reach_);
        for (int64_t r = 0; r < rows; ++r) {
            if (end_ - in[r] >= reach_) continue;
            uint8_t* row = copies + --num_copies * reach_;
            std::memset(row, 0, static_cast<size_t>(reach_));
            copy(in[r], row, a_.box.width * a_.shape.channels);
            in[r] = row;
        }
        // the last row again for those that the box does not have
        uint8_t* to[kRowsAtOnce];
        for (int64_t r = 0; r < kRowsAtOnce; ++r) {
            to[r] = out[r < rows ? r : rows - 1];
            in[r] = in[r < rows ? r : rows - 1];
        }
        const RowsPass pass{first_, low_, high_, outputs_, plan_.stride, plan_.units};
        rows_pass(pass, a_.shape.channels, plan_.unit, in, to);
#endif
    }

    void run_plain(const uint8_t* in, uint8_t* out) const {
        const int64_t channels = a_.shape.channels;
        for (int64_t x = 0; x < a_.size.width; ++x) {
            const int64_t taps = axis_.count[a_.flip ? a_.size.width - 1 - x : x];
            const int32_t* weights = weights_ + x * plan_.stride;
            for (int64_t c = 0; c < channels; ++c) {
                const uint8_t* from = in + first_[x] + c;
                int32_t sum = kHalf;
                for (int64_t t = 0; t < taps; ++t) sum += from[t * channels] * weights[t];
                out[x * channels + c] = clipped(sum);
            }
        }
    }

    const CropResize& a_;
    bool copies_only_;
    Axis axis_;
    Plan plan_;
    int64_t outputs_;             // rounded up to kOutputsAtOnce
    Buffer<int32_t> first_;       // [outputs_]: bytes
    Buffer<int32_t> weights_;     // [outputs_][stride]
    Buffer<int16_t> low_, high_;  // likewise
    int64_t reach_ = 0;           // bytes from a row's first that loads may cover
    const uint8_t* end_;          // of the image
};

// The pass along the columns, from rows of our own into the output.
class AlongColumns {
  public:
    explicit AlongColumns(const CropResize& a)
        : filter_(a.filter),
          copies_only_(a.box.height == a.size.height),
          size_(a.size.width * a.shape.channels),
          axis_(a.box.height, a.size.height, support_of(a.filter)),
          stride_(rounded_up(axis_.taps, 2)),
          weights_(a.size.height * stride_),
          low_(a.size.height * stride_),
          high_(a.size.height * stride_ / 2),
          rows_(stride_) {
        if (!copies_only_) lay_out();
    }

    int64_t taps() const { return copies_only_ ? 1 : axis_.taps; }
    int64_t first_row(int64_t y) const { return copies_only_ ? y : axis_.first[y]; }
    int64_t end_row(int64_t y) const {
        return copies_only_ ? y + 1 : axis_.first[y] + axis_.count[y];
    }

    // Output row y; `row_of` gives the address of a row of the box.
    template <class RowOf>
    void run(int64_t y, const RowOf& row_of, uint8_t* out) const {
        const int64_t first = first_row(y), last = end_row(y) - 1;
        if (copies_only_) return copy(row_of(y), out, size_);
        const int64_t taps = rounded_up(axis_.count[y], 2);
        for (int64_t t = 0; t < taps; ++t) {
            rows_[t] = row_of(first + t < last ? first + t : last);
        }
#ifdef SIMMIM_BYTE_LANES
        const int64_t pairs = taps / 2;
        const int16_t *low = low_ + y * stride_, *high = high_ + y * stride_ / 2;
        pairs == 1   ? columns_pass<1>(rows_, low, high, pairs, size_, out)
        : pairs == 2 ? columns_pass<2>(rows_, low, high, pairs, size_, out)
        : pairs == 3 ? columns_pass<3>(rows_, low, high, pairs, size_, out)
                     : columns_pass<0>(rows_, low, high, pairs, size_, out);
#else
        run_plain(weights_ + y * stride_, taps, out);
#endif
    }

  private:
    void lay_out() {
        weigh(axis_, filter_, false, stride_, weights_);
#ifdef SIMMIM_BYTE_LANES
        for (int64_t i = 0; i < axis_.outputs * stride_; ++i) low_[i] = low_of(weights_[i]);
        for (int64_t i = 0; i < axis_.outputs * stride_; i += 2) {
            const int high = high_of(weights_[i]), next_high = high_of(weights_[i + 1]);
            high_[i / 2] = static_cast<int16_t>(next_high * 256 + (high & 0xff));
        }
#endif
    }

#ifndef SIMMIM_BYTE_LANES
    void run_plain(const int32_t* weights, int64_t taps, uint8_t* out) const {
        for (int64_t start = 0; start < size_; start += kChunk) {
            int32_t sums[kChunk];
            uint8_t bytes[kChunk];
            for (auto& sum : sums) sum = kHalf;
            for (int64_t t = 0; t < taps; ++t) {
                const uint8_t* row = rows_[t] + start;
                for (int64_t e = 0; e < kChunk; ++e) sums[e] += row[e] * weights[t];
            }
            for (int64_t e = 0; e < kChunk; ++e) bytes[e] = clipped(sums[e]);
            const int64_t left = size_ - start;
            copy(bytes, out + start, left < kChunk ? left : kChunk);
        }
    }
#endif

    int filter_;
    bool copies_only_;
    int64_t size_;  // bytes of an output row
    Axis axis_;
    int64_t stride_;
    Buffer<int32_t> weights_;      // [outputs][stride_]
    Buffer<int16_t> low_, high_;   // likewise; [outputs][stride_ / 2], a byte for each tap
    Buffer<const uint8_t*> rows_;  // [stride_]: of one output's taps
};

}  // namespace

void crop_resize(const CropResize& a) {
    const AlongRows along_rows(a);
    const AlongColumns along_columns(a);
    // a ring: a row's place is free once the first tap has passed it
    int64_t capacity = kRowsAtOnce;
    while (capacity < along_columns.taps() + kRowsAtOnce) capacity *= 2;
    const int64_t pitch = rounded_up(a.size.width * a.shape.channels, kPadding) + kPadding;
    const Buffer<uint8_t> ring(capacity * pitch);
    const auto row_of = [&ring, pitch, capacity](int64_t row) {
        return ring + (row & (capacity - 1)) * pitch;
    };
    int64_t made = 0;
    for (int64_t y = 0; y < a.size.height; ++y) {
        for (; made < along_columns.end_row(y); made += kRowsAtOnce) {
            uint8_t* out[kRowsAtOnce];
            for (int64_t r = 0; r < kRowsAtOnce; ++r) out[r] = row_of(made + r);
            along_rows.run(made, out);
        }
        along_columns.run(y, row_of, a.out + y * a.size.width * a.shape.channels);
    }
}

}  // namespace simmim::SIMMIM_TARGET
