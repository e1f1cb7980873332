// Storage types of the tensors that the kernels read and write, and their conversion to float.
#pragma once

#include <cstdint>
#include <cstring>

#include "target.h"

namespace simmim::SIMMIM_TARGET {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(uint8_t x) { return x; }

inline float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// By hand: g++ knows _Float16 in C++ only from release 12 on.
inline float to_float(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    uint32_t bits;
    if (magnitude >= 0x7c00u) {  // infinity or NaN
        bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    } else if (magnitude >= 0x400u) {
        bits = sign | ((magnitude << 13) + (112u << 23));
    } else {  // zero or subnormal: magnitude · 2^-24 is exact in float
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
        return sign ? -value : value;
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
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

// Round to nearest, ties to even.
template <>
inline Float16 from_float<Float16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return {static_cast<uint16_t>(sign | 0x7e00u)};
    }
    if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
        return {static_cast<uint16_t>(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the FPU round at 2^-24
        float value;
        std::memcpy(&value, &magnitude, sizeof value);
        value += 0.5f;
        std::memcpy(&bits, &value, sizeof bits);
        return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

}  // namespace simmim::SIMMIM_TARGET

// function<T>(a) for the type that a dtype's code names: 0 float32, 1 bfloat16, 2 float16. Further
// template arguments follow T.
#define SIMMIM_OF_TYPE(dtype, function, ...)                           \
    ((dtype) == 0   ? function<float __VA_OPT__(, ) __VA_ARGS__>(a)    \
     : (dtype) == 1 ? function<BFloat16 __VA_OPT__(, ) __VA_ARGS__>(a) \
                    : function<Float16 __VA_OPT__(, ) __VA_ARGS__>(a))

// The same for images, which may be 3 uint8.
#define SIMMIM_OF_IMAGE_TYPE(dtype, function, ...)                  \
    ((dtype) == 3 ? function<uint8_t __VA_OPT__(, ) __VA_ARGS__>(a) \
                  : SIMMIM_OF_TYPE(dtype, function __VA_OPT__(, ) __VA_ARGS__))

// function<T, P>(a) for the types of activations and products of `a.shape` (rows.h).
#define SIMMIM_OF_ROW_TYPES(function)                                                  \
    (a.shape.dtype == 0   ? function<float, float>(a)                                  \
     : a.shape.dtype == 2 ? function<Float16, float>(a)                                \
                          : (a.shape.product_dtype == 0 ? function<BFloat16, float>(a) \
                                                        : function<BFloat16, BFloat16>(a)))
