// A register of bytes, or of 16- or 32-bit sums of them, in parts of sixteen bytes that never mix.
// AVX2 and AVX-512 name their operations alike, and baseline has no byte shuffle: it gets none.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#define SIMMIM_BYTE_LANES

#if defined(__AVX512BW__)
#define SIMMIM_BYTES(operation) _mm512_##operation
#else
#define SIMMIM_BYTES(operation) _mm256_##operation
#endif

namespace simmim::SIMMIM_TARGET {

constexpr int64_t kPartBytes = 16;

#if defined(__AVX512BW__)

using Bytes = __m512i;
constexpr int kParts = 4;

inline Bytes zero_bytes() { return _mm512_setzero_si512(); }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
inline Bytes in_every_part(__m128i part) { return _mm512_broadcast_i32x4(part); }
inline Bytes join(const __m128i* parts) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(parts[0]), parts[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(parts[2]), parts[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline void split(Bytes a, __m128i* parts) {
    parts[0] = _mm512_castsi512_si128(a);
    parts[1] = _mm512_extracti32x4_epi32(a, 1);
    parts[2] = _mm512_extracti32x4_epi32(a, 2);
    parts[3] = _mm512_extracti32x4_epi32(a, 3);
}

#else

using Bytes = __m256i;
constexpr int kParts = 2;

inline Bytes zero_bytes() { return _mm256_setzero_si256(); }
inline Bytes load_bytes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store_bytes(uint8_t* p, Bytes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
inline Bytes in_every_part(__m128i part) { return _mm256_broadcastsi128_si256(part); }
inline Bytes join(const __m128i* parts) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(parts[0]), parts[1], 1);
}
inline void split(Bytes a, __m128i* parts) {
    parts[0] = _mm256_castsi256_si128(a);
    parts[1] = _mm256_extracti128_si256(a, 1);
}

#endif

constexpr int64_t kBytes = kParts * kPartBytes;

inline __m128i load_part(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
// Part i: sixteen bytes from rows[i] + offset.
inline Bytes load_parts(const uint8_t* const* rows, int64_t offset) {
    __m128i parts[kParts];
    for (int i = 0; i < kParts; ++i) parts[i] = load_part(rows[i] + offset);
    return join(parts);
}
// Part i: eight bytes from rows[i] + offset, as words.
inline Bytes load_parts_as_words(const uint8_t* const* rows, int64_t offset) {
    __m128i parts[kParts];
    for (int i = 0; i < kParts; ++i) {
        parts[i] =
            _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[i] + offset)));
    }
    return join(parts);
}
inline void store_parts(uint8_t* const* rows, int64_t offset, Bytes a) {
    __m128i parts[kParts];
    split(a, parts);
    for (int i = 0; i < kParts; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(rows[i] + offset), parts[i]);
    }
}

inline Bytes every_word(int16_t x) { return SIMMIM_BYTES(set1_epi16)(x); }
inline Bytes every_sum(int32_t x) { return SIMMIM_BYTES(set1_epi32)(x); }
// Two words, over and over.
inline Bytes every_pair(const int16_t* words) {
    int32_t both;
    std::memcpy(&both, words, sizeof(both));
    return every_sum(both);
}
// Bytes of each part by their index; 0 where the index is negative.
inline Bytes shuffle(Bytes a, Bytes indices) { return SIMMIM_BYTES(shuffle_epi8)(a, indices); }
inline Bytes interleave_low(Bytes a, Bytes b) { return SIMMIM_BYTES(unpacklo_epi8)(a, b); }
inline Bytes interleave_high(Bytes a, Bytes b) { return SIMMIM_BYTES(unpackhi_epi8)(a, b); }
inline Bytes interleave_low_words(Bytes a, Bytes b) { return SIMMIM_BYTES(unpacklo_epi16)(a, b); }
inline Bytes interleave_high_words(Bytes a, Bytes b) { return SIMMIM_BYTES(unpackhi_epi16)(a, b); }

// Sums of two neighbours' products: of words, exact in 32 bits; of unsigned bytes with signed ones,
// in 16 bits, saturating.
inline Bytes dot_words(Bytes a, Bytes b) { return SIMMIM_BYTES(madd_epi16)(a, b); }
inline Bytes dot_bytes(Bytes a, Bytes b) { return SIMMIM_BYTES(maddubs_epi16)(a, b); }
// Of sums, their lower 32 bits.
inline Bytes multiply_sums(Bytes a, Bytes b) { return SIMMIM_BYTES(mullo_epi32)(a, b); }
// Modulo 2^16 and 2^32.
inline Bytes add_words(Bytes a, Bytes b) { return SIMMIM_BYTES(add_epi16)(a, b); }
inline Bytes add_sums(Bytes a, Bytes b) { return SIMMIM_BYTES(add_epi32)(a, b); }
template <int kBits>
inline Bytes shift_sums_left(Bytes a) {
    return SIMMIM_BYTES(slli_epi32)(a, kBits);
}
template <int kBits>
inline Bytes shift_sums_right(Bytes a) {
    return SIMMIM_BYTES(srai_epi32)(a, kBits);
}
// Per part: the sums of a, then those of b, as saturated words.
inline Bytes to_words(Bytes a, Bytes b) { return SIMMIM_BYTES(packs_epi32)(a, b); }
// Per part: the words of a, then those of b, clipped to bytes.
inline Bytes to_bytes(Bytes a, Bytes b) { return SIMMIM_BYTES(packus_epi16)(a, b); }
// Words over 2^kBits, halves rounded up.
template <int kBits>
inline Bytes rounded_words(Bytes a) {
    return SIMMIM_BYTES(mulhrs_epi16)(a, every_word(1 << (15 - kBits)));
}
// Per part: all four sums of a added up, those of b, c and d.
inline Bytes totals(Bytes a, Bytes b, Bytes c, Bytes d) {
    const Bytes ab =
        add_sums(SIMMIM_BYTES(unpacklo_epi32)(a, b), SIMMIM_BYTES(unpackhi_epi32)(a, b));
    const Bytes cd =
        add_sums(SIMMIM_BYTES(unpacklo_epi32)(c, d), SIMMIM_BYTES(unpackhi_epi32)(c, d));
    return add_sums(SIMMIM_BYTES(unpacklo_epi64)(ab, cd), SIMMIM_BYTES(unpackhi_epi64)(ab, cd));
}

}  // namespace simmim::SIMMIM_TARGET

#undef SIMMIM_BYTES
#endif
