// Storage types of the tensors that the kernels read and write, and their conversion to float.
#pragma once

#include <cstdint>
#include <cstring>

namespace simmim {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(Float16 x) {
    _Float16 value;
    std::memcpy(&value, &x.bits, sizeof value);
    return static_cast<float>(value);
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    }
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<uint16_t>(bits >> 16)};
}

template <>
inline Float16 from_float<Float16>(float x) {
    const _Float16 value = static_cast<_Float16>(x);
    Float16 out;
    std::memcpy(&out.bits, &value, sizeof value);
    return out;
}

}  // namespace simmim
