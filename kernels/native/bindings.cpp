// The Python module simmim_kernels._cpu: addresses and sizes in, nothing else. Checks of shapes and
// dtypes live in Python; `dtype` is 0 float32, 1 bfloat16, 2 float16.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "half.h"
#include "substitute_mask_tokens.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class F>
void with_dtype(int dtype, F&& body) {
    switch (dtype) {
        case 0:
            return body(float{});
        case 1:
            return body(simmim::BFloat16{});
        case 2:
            return body(simmim::Float16{});
        default:
            throw nb::value_error("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
    }
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def(
        "substitute_mask_tokens_forward",
        [](uintptr_t tokens, uintptr_t mask, uintptr_t mask_token, uintptr_t pos_embed,
           uintptr_t out, int64_t rows, int64_t tokens_per_image, int64_t width, int dtype,
           int num_threads) {
            nb::gil_scoped_release release;
            with_dtype(dtype, [&](auto zero) {
                using T = decltype(zero);
                simmim::substitute_mask_tokens_forward<T>(
                    pointer<const T>(tokens), pointer<const uint8_t>(mask),
                    pointer<const T>(mask_token), pointer<const T>(pos_embed), pointer<T>(out),
                    rows, tokens_per_image, width, num_threads);
            });
        },
        "tokens"_a, "mask"_a, "mask_token"_a, "pos_embed"_a, "out"_a, "rows"_a,
        "tokens_per_image"_a, "width"_a, "dtype"_a, "num_threads"_a);
    m.def(
        "substitute_mask_tokens_backward",
        [](uintptr_t grad_out, uintptr_t mask, uintptr_t grad_tokens, uintptr_t grad_mask_token,
           int64_t rows, int64_t width, int dtype, int num_threads) {
            nb::gil_scoped_release release;
            with_dtype(dtype, [&](auto zero) {
                using T = decltype(zero);
                simmim::substitute_mask_tokens_backward<T>(
                    pointer<const T>(grad_out), pointer<const uint8_t>(mask),
                    pointer<T>(grad_tokens), pointer<float>(grad_mask_token), rows, width,
                    num_threads);
            });
        },
        "grad_out"_a, "mask"_a, "grad_tokens"_a, "grad_mask_token"_a, "rows"_a, "width"_a,
        "dtype"_a, "num_threads"_a);
}
