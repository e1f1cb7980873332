// Sixteen float lanes, however many registers that takes: with byte_lanes.h the only place with
// intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace simmim::SIMMIM_TARGET {

constexpr int64_t kLanes = 16;
constexpr uint32_t kAllLanes = 0xffff;

// Lane by lane: values[1] where a bit of `up` is set, values[2] where one of `down` is, values[0]
// elsewhere; the first `count` lanes only.
template <class T>
inline void store_one_by_one(T* p, uint32_t up, uint32_t down, const T* values, int64_t count) {
    for (int64_t e = 0; e < count; ++e) {
        p[e] = values[((up >> e) & 1u) + 2u * ((down >> e) & 1u)];
    }
}

#if defined(__AVX512F__)

struct Lanes {
    __m512 v;
};

inline Lanes zero_lanes() { return {_mm512_setzero_ps()}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Lanes load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Lanes load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Lanes load(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes absolute(Lanes a) { return {_mm512_abs_ps(a.v)}; }
inline Lanes scaled(Lanes a, float scale, float shift) {
    return {_mm512_fmsub_ps(a.v, _mm512_set1_ps(scale), _mm512_set1_ps(shift))};
}
// Bit e: lane e is above 0.
inline uint32_t above_zero(Lanes a) {
    return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ);
}
// Bit e: lane e is below 0.
inline uint32_t below_zero(Lanes a) {
    return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_LT_OQ);
}
// Lanes whose bit is not set become 0.
inline Lanes keep(Lanes a, uint32_t lanes) {
    return {_mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), a.v)};
}
// Lanes where `gate` is not above 0 become 0.
inline Lanes keep_above_zero(Lanes a, Lanes gate) { return keep(a, above_zero(gate)); }
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Lanes a) { return _mm512_reduce_max_ps(a.v); }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes divide(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes maximum(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes rounded(Lanes a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a · 2^n for whole numbers n from -126 to 127.
inline Lanes times_power_of_two(Lanes a, Lanes n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Lanes a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i out = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    out = _mm512_mask_or_epi32(out, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16)));
}
inline void store(Float16* p, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The 16-bit lanes of `high` where a bit of `up` is set, of `low` where one of `down` is, 0
// elsewhere.
inline __m256i choose_halves(uint32_t up, __m256i high, uint32_t down, __m256i low) {
    const __m256i out = _mm256_maskz_mov_epi16(static_cast<__mmask16>(up), high);
    return _mm256_mask_mov_epi16(out, static_cast<__mmask16>(down), low);
}

// Writes the same of float lanes. kStream: past the cache, to an address aligned to their size.
template <bool kStream>
inline void store_choice(float* p, uint32_t up, Lanes high, uint32_t down, Lanes low) {
    __m512 out = _mm512_maskz_mov_ps(static_cast<__mmask16>(up), high.v);
    out = _mm512_mask_mov_ps(out, static_cast<__mmask16>(down), low.v);
    kStream ? _mm512_stream_ps(p, out) : _mm512_storeu_ps(p, out);
}

#elif defined(__AVX2__)

struct Lanes {
    __m256 low, high;
};

inline Lanes zero_lanes() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Lanes load(const BFloat16* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}
inline Lanes load(const Float16* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline Lanes load(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Lanes add(Lanes a, Lanes b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Lanes subtract(Lanes a, Lanes b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Lanes absolute(Lanes a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline Lanes scaled(Lanes a, float scale, float shift) {
    const __m256 m = _mm256_set1_ps(scale), s = _mm256_set1_ps(shift);
    return {_mm256_fmsub_ps(a.low, m, s), _mm256_fmsub_ps(a.high, m, s)};
}
inline uint32_t joined(__m256 low, __m256 high) {
    return static_cast<uint32_t>(_mm256_movemask_ps(low)) |
           static_cast<uint32_t>(_mm256_movemask_ps(high)) << 8;
}
inline uint32_t above_zero(Lanes a) {
    const __m256 zero = _mm256_setzero_ps();
    return joined(_mm256_cmp_ps(a.low, zero, _CMP_GT_OQ), _mm256_cmp_ps(a.high, zero, _CMP_GT_OQ));
}
inline uint32_t below_zero(Lanes a) {
    const __m256 zero = _mm256_setzero_ps();
    return joined(_mm256_cmp_ps(a.low, zero, _CMP_LT_OQ), _mm256_cmp_ps(a.high, zero, _CMP_LT_OQ));
}
// Lanes where `gate` is not above 0 become 0.
inline Lanes keep_above_zero(Lanes a, Lanes gate) {
    const __m256 zero = _mm256_setzero_ps();
    return {_mm256_and_ps(_mm256_cmp_ps(gate.low, zero, _CMP_GT_OQ), a.low),
            _mm256_and_ps(_mm256_cmp_ps(gate.high, zero, _CMP_GT_OQ), a.high)};
}
inline float sum(Lanes a) {
    float v[8];
    _mm256_storeu_ps(v, _mm256_add_ps(a.low, a.high));
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}
inline float largest(Lanes a) {
    float v[8];
    _mm256_storeu_ps(v, _mm256_max_ps(a.low, a.high));
    float found = v[0];
    for (int e = 1; e < 8; ++e) found = v[e] > found ? v[e] : found;
    return found;
}
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes multiply(Lanes a, Lanes b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Lanes divide(Lanes a, Lanes b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes maximum(Lanes a, Lanes b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Lanes rounded(Lanes a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, nearest), _mm256_round_ps(a.high, nearest)};
}
// The float whose exponent field is that of 2^n.
inline __m256 power_of_two(__m256 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
// a · 2^n for whole numbers n from -126 to 127.
inline Lanes times_power_of_two(Lanes a, Lanes n) {
    return {_mm256_mul_ps(a.low, power_of_two(n.low)), _mm256_mul_ps(a.high, power_of_two(n.high))};
}
inline void store(float* p, Lanes a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
// Rounded to bfloat16 bits, in the lower half of every 32-bit lane.
inline __m256i narrowed(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i out = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(out, quiet, nan), 16);
}
inline void store(BFloat16* p, Lanes a) {
    const __m256i mixed = _mm256_packus_epi32(narrowed(a.low), narrowed(a.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
inline void store(Float16* p, Lanes a) {
    auto* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT));
}

// All ones in the 32-bit lanes whose bit is set.
inline __m256i spread(uint32_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each),
                              each);
}
inline Lanes keep(Lanes a, uint32_t lanes) {
    return {_mm256_and_ps(_mm256_castsi256_ps(spread(lanes)), a.low),
            _mm256_and_ps(_mm256_castsi256_ps(spread(lanes >> 8)), a.high)};
}
inline __m256i spread_halves(uint32_t bits) {
    const __m256i each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                           8192, 16384, static_cast<int16_t>(0x8000));
    return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits)), each),
                              each);
}

inline __m256i choose_halves(uint32_t up, __m256i high, uint32_t down, __m256i low) {
    const __m256i out = _mm256_and_si256(spread_halves(up), high);
    return _mm256_blendv_epi8(out, low, spread_halves(down));
}

template <bool kStream>
inline void store_choice(float* p, uint32_t up, Lanes high, uint32_t down, Lanes low) {
    for (int half = 0; half < 2; ++half, p += 8, up >>= 8, down >>= 8) {
        __m256 out = _mm256_and_ps(_mm256_castsi256_ps(spread(up)), high.low);
        out = _mm256_blendv_ps(out, low.low, _mm256_castsi256_ps(spread(down)));
        kStream ? _mm256_stream_ps(p, out) : _mm256_storeu_ps(p, out);
    }
}

#else

struct Lanes {
    float v[kLanes];
};

inline Lanes zero_lanes() { return {}; }
template <class T>
inline Lanes load(const T* p) {
    Lanes out;
    for (int64_t e = 0; e < kLanes; ++e) out.v[e] = to_float(p[e]);
    return out;
}
inline Lanes add(Lanes a, Lanes b) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] += b.v[e];
    return a;
}
inline Lanes subtract(Lanes a, Lanes b) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] -= b.v[e];
    return a;
}
inline Lanes absolute(Lanes a) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] = __builtin_fabsf(a.v[e]);
    return a;
}
inline Lanes scaled(Lanes a, float scale, float shift) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] = a.v[e] * scale - shift;
    return a;
}
inline uint32_t above_zero(Lanes a) {
    uint32_t bits = 0;
    for (int64_t e = 0; e < kLanes; ++e) bits |= static_cast<uint32_t>(a.v[e] > 0.0f) << e;
    return bits;
}
inline uint32_t below_zero(Lanes a) {
    uint32_t bits = 0;
    for (int64_t e = 0; e < kLanes; ++e) bits |= static_cast<uint32_t>(a.v[e] < 0.0f) << e;
    return bits;
}
inline Lanes keep(Lanes a, uint32_t lanes) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] = ((lanes >> e) & 1u) ? a.v[e] : 0.0f;
    return a;
}
// Lanes where `gate` is not above 0 become 0.
inline Lanes keep_above_zero(Lanes a, Lanes gate) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] = gate.v[e] > 0.0f ? a.v[e] : 0.0f;
    return a;
}
inline float sum(Lanes a) {
    float total = 0.0f;
    for (int64_t e = 0; e < kLanes; ++e) total += a.v[e];
    return total;
}
inline float largest(Lanes a) {
    float found = a.v[0];
    for (int64_t e = 1; e < kLanes; ++e) found = a.v[e] > found ? a.v[e] : found;
    return found;
}
inline Lanes all(float x) {
    Lanes out;
    for (int64_t e = 0; e < kLanes; ++e) out.v[e] = x;
    return out;
}
inline Lanes multiply(Lanes a, Lanes b) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] *= b.v[e];
    return a;
}
inline Lanes divide(Lanes a, Lanes b) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] /= b.v[e];
    return a;
}
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    for (int64_t e = 0; e < kLanes; ++e) c.v[e] += a.v[e] * b.v[e];
    return c;
}
inline Lanes maximum(Lanes a, Lanes b) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] = a.v[e] > b.v[e] ? a.v[e] : b.v[e];
    return a;
}
inline Lanes rounded(Lanes a) {
    for (int64_t e = 0; e < kLanes; ++e) a.v[e] = __builtin_rintf(a.v[e]);
    return a;
}
// a · 2^n for whole numbers n from -126 to 127.
inline Lanes times_power_of_two(Lanes a, Lanes n) {
    for (int64_t e = 0; e < kLanes; ++e) {
        const int32_t whole = n.v[e] == n.v[e] ? static_cast<int32_t>(n.v[e]) : 0;
        const uint32_t bits = static_cast<uint32_t>(whole + 127) << 23;
        float power;
        std::memcpy(&power, &bits, sizeof power);
        a.v[e] *= power;
    }
    return a;
}
template <class T>
inline void store(T* p, Lanes a) {
    for (int64_t e = 0; e < kLanes; ++e) p[e] = from_float<T>(a.v[e]);
}

#endif

// Writes, per lane, `high` where a bit of `up` is set, `low` where one of `down` is, 0 elsewhere.
// kStream: past the cache, to an address aligned to the lanes' size.
#if defined(__AVX2__)

template <class T>
class Choice {  // a 16-bit type
  public:
    Choice(T high, T low) : high_(all(high)), low_(all(low)) {}

    template <bool kStream>
    void store(T* p, uint32_t up, uint32_t down) const {
        const __m256i out = choose_halves(up, high_, down, low_);
        auto* target = reinterpret_cast<__m256i*>(p);
        kStream ? _mm256_stream_si256(target, out) : _mm256_storeu_si256(target, out);
    }

  private:
    static __m256i all(T x) { return _mm256_set1_epi16(static_cast<int16_t>(x.bits)); }
    __m256i high_, low_;
};

template <>
class Choice<float> {
  public:
    Choice(float high, float low) : high_(all(high)), low_(all(low)) {}

    template <bool kStream>
    void store(float* p, uint32_t up, uint32_t down) const {
        store_choice<kStream>(p, up, high_, down, low_);
    }

  private:
    Lanes high_, low_;
};

#else

template <class T>
class Choice {
  public:
    Choice(T high, T low) : values_{T{0}, high, low} {}

    template <bool kStream>
    void store(T* p, uint32_t up, uint32_t down) const {
        store_one_by_one(p, up, down, values_, kLanes);
    }

  private:
    T values_[3];
};

#endif

// Copies (or, with a null source, clears) whole cache lines past the cache: for outputs that are
// too large to stay in it, where an ordinary store would first fetch the line that it overwrites.
inline void stream_lines(void* target, const void* source, size_t bytes) {
#if defined(__AVX512F__)
    auto* out = static_cast<__m512i*>(target);
    const auto* in = static_cast<const __m512i*>(source);
    for (size_t i = 0; i < bytes / 64; ++i) {
        _mm512_stream_si512(out + i, in ? _mm512_loadu_si512(in + i) : _mm512_setzero_si512());
    }
#elif defined(__AVX2__)
    auto* out = static_cast<__m256i*>(target);
    const auto* in = static_cast<const __m256i*>(source);
    for (size_t i = 0; i < bytes / 32; ++i) {
        _mm256_stream_si256(out + i, in ? _mm256_loadu_si256(in + i) : _mm256_setzero_si256());
    }
#else
    source ? std::memcpy(target, source, bytes) : std::memset(target, 0, bytes);
#endif
}

// Asks for the cache lines of `bytes` bytes that will be read, or written, soon.
inline void prefetch_to_read(const void* p, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b, 0);
}
inline void prefetch_to_write(const void* p, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b, 1);
}

// Makes streamed lines visible to other threads; before a thread ends its part of the work.
inline void finish_streaming() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Whether an output is so large, and its rows so aligned, that it is better streamed.
inline bool worth_streaming(const void* target, size_t row_bytes, size_t bytes) {
    constexpr size_t kLarge = size_t{8} << 20;
    return bytes >= kLarge && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(target) % 64 == 0;
}

// Only the lanes whose bit is set are read; the others hold 0.
template <class T>
inline Lanes load_some(const T* p, uint32_t lanes) {
    T buffer[kLanes];
    std::memset(buffer, 0, sizeof buffer);
    for (int64_t e = 0; e < kLanes; ++e) {
        if ((lanes >> e) & 1u) buffer[e] = p[e];
    }
    return load(buffer);
}

// The first `count` of 16 elements; the other lanes hold 0.
template <class T>
[[gnu::always_inline]] inline Lanes load_first(const T* p, int64_t count) {
    if (count >= kLanes) return load(p);
    T buffer[kLanes];
    std::memset(buffer, 0, sizeof buffer);
    std::memcpy(buffer, p, sizeof(T) * static_cast<size_t>(count));
    return load(buffer);
}

// Writes the first `count` lanes.
template <class T>
[[gnu::always_inline]] inline void store_first(T* p, Lanes a, int64_t count) {
    if (count >= kLanes) {
        store(p, a);
        return;
    }
    T buffer[kLanes];
    store(buffer, a);
    std::memcpy(p, buffer, sizeof(T) * static_cast<size_t>(count));
}

// Lanes 0 to count - 1, as `keep` takes them.
inline uint32_t first_lanes(int64_t count) {
    return count >= kLanes ? kAllLanes : (1u << count) - 1u;
}

// e^x within 2 units in the last place; 0 below the logarithm of the smallest normal float.
inline Lanes exponential(Lanes x) {
    const Lanes floor = all(-87.3f);
    const uint32_t vanishing = above_zero(subtract(floor, x));
    x = maximum(floor, x);  // in this order a NaN stays
    const Lanes n = rounded(multiply(x, all(1.44269504f)));
    // x - n·ln 2, in two parts of ln 2 of which the first has few bits
    Lanes r = multiply_add(n, all(-0.693359375f), x);
    r = multiply_add(n, all(2.12194440e-4f), r);
    // Taylor's series: |r| ≤ 0.347, so the next term is below 6e-9
    Lanes e = multiply_add(r, all(1.0f / 5040.0f), all(1.0f / 720.0f));
    e = multiply_add(e, r, all(1.0f / 120.0f));
    e = multiply_add(e, r, all(1.0f / 24.0f));
    e = multiply_add(e, r, all(1.0f / 6.0f));
    e = multiply_add(e, r, all(0.5f));
    e = multiply_add(e, r, all(1.0f));
    e = multiply_add(e, r, all(1.0f));
    return keep(times_power_of_two(e, n), kAllLanes & ~vanishing);
}

}  // namespace simmim::SIMMIM_TARGET
