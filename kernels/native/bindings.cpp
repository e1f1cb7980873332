// The Python module simmim_kernels._cpu: addresses and sizes in, nothing else.
// Checks of shapes and dtypes live in Python; a dtype is 0 float32, 1 bfloat16,
// 2 float16, 3 uint8.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "batch_norm_relu.h"
#include "crop_resize.h"
#include "embed_patches.h"
#include "gradient_norm.h"
#include "masked_l1_loss.h"
#include "merge_patches.h"
#include "random_patch_mask.h"
#include "recycled_memory.h"
#include "substitute_mask_tokens.h"
#include "target.h"
#include "transformer_block.h"
#include "window_attention.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

const char* const kTargetNames[] = {"baseline", "avx2", "avx512"};

bool use_target(const std::string& name) {
    for (int i = 0; i < 3; ++i) {
        if (name == kTargetNames[i]) {
            return simmim::force_target(static_cast<simmim::Target>(i));
        }
    }
    return false;
}

// A tensor over recycled memory, which goes back when the last tensor that
// shares it is gone. code: DLPack's, of the dtype.
nb::ndarray<nb::pytorch> recycled_tensor(const std::vector<size_t>& shape, int code, int bits) {
    size_t bytes = static_cast<size_t>(bits) / 8;
    for (const size_t size : shape) bytes *= size;
    simmim::MemoryBlock* block = simmim::take_memory(bytes);
    nb::capsule owner(block, [](void* p) noexcept {
        simmim::give_back_memory(static_cast<simmim::MemoryBlock*>(p));
    });
    const nb::dlpack::dtype dtype{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
    return {block->data, shape.size(), shape.data(), owner, nullptr, dtype};
}

template <class... F>
struct Types {
    static constexpr size_t kCount = sizeof...(F);
};

struct TypesOf {
    template <class... F>
    Types<F...> operator()(F&...) const {
        return {};
    }
};

// Types of the fields of a struct (arguments.h).
template <class A>
using FieldsOf = decltype(std::declval<A&>().fields(TypesOf{}));

// What a field of type T gets from Python, and how it takes that: numbers as they are.
template <class T>
struct FromPython {
    using Given = T;
    static void fill(T& field, Given given) { field = given; }
};

template <class T>
struct FromPython<T*> {
    using Given = uintptr_t;
    static void fill(T*& field, Given given) { field = reinterpret_cast<T*>(given); }
};

template <class T, size_t kSize>
struct FromPython<T[kSize]> {
    using Given = const std::array<T, kSize>&;
    static void fill(T (&field)[kSize], Given given) {
        for (size_t i = 0; i < kSize; ++i) field[i] = given[i];
    }
};

template <class T>
struct FromPython<simmim::List<T>> {
    using Given = const std::vector<typename FromPython<T>::Given>&;
    static void fill(simmim::List<T>& field, Given given) {
        field = {reinterpret_cast<const T*>(given.data()), static_cast<int64_t>(given.size())};
    }
};

template <class T>
    requires requires { typename FieldsOf<T>; }
struct FromPython<T> {
    using Given = const std::array<int64_t, FieldsOf<T>::kCount>&;
    static void fill(T& field, Given given) {
        const int64_t* next = given.data();
        field.fields([&](auto&... part) {
            ((part = static_cast<std::remove_reference_t<decltype(part)>>(*next++)), ...);
        });
    }
};

// A struct of results becomes a tuple; numbers stay.
template <class R>
auto to_python(R result) {
    if constexpr (requires { typename FieldsOf<R>; }) {
        return result.fields([](auto&... part) { return std::make_tuple(part...); });
    } else {
        return result;
    }
}

// The function of one Python argument for each field.
template <class A, class Call, class... F>
auto call_kernel(typename FromPython<F>::Given... given) {
    A a{};
    a.fields([&](F&... field) { (FromPython<F>::fill(field, given), ...); });
    nb::gil_scoped_release release;
    if constexpr (std::is_void_v<decltype(Call{}(a))>) {
        Call{}(a);
    } else {
        return to_python(Call{}(a));
    }
}

template <class A, class Call, class... F, size_t... kIndex>
void define(nb::module_& m, const char* name, Call, Types<F...>, std::index_sequence<kIndex...>) {
    std::string names[sizeof...(F)];
    std::string* next = names;
    A::names([&](const char* listed) {
        std::istringstream words(listed);
        while (std::getline(words >> std::ws, *next, ',')) ++next;
    });
    m.def(name, &call_kernel<A, Call, F...>, nb::arg(names[kIndex].c_str())...);
}

template <class R, class A, class Call>
void bind(nb::module_& m, const char* name, R (*)(const A&), Call call) {
    using Fields = FieldsOf<A>;
    define<A>(m, name, call, Fields{}, std::make_index_sequence<Fields::kCount>{});
}

}  // namespace

// The kernel as a Python function of that name, which runs without the interpreter's lock.
#define SIMMIM_BIND(kernel)                     \
    bind(m, #kernel, &simmim::baseline::kernel, \
         [](const auto& a) { return SIMMIM_CALL(kernel, a); })

NB_MODULE(_cpu, m) {
    m.def("target", [] { return kTargetNames[static_cast<int>(simmim::target())]; });
    m.def("use_target", &use_target, "name"_a);
    m.def("has_fast_bfloat16", &simmim::has_fast_bfloat16);
    m.def("recycled_tensor", &recycled_tensor, "shape"_a, "code"_a, "bits"_a);
    m.def("release_memory", &simmim::release_memory);
    SIMMIM_BIND(batch_norm_relu_forward);
    SIMMIM_BIND(batch_norm_relu_backward);
    SIMMIM_BIND(crop_resize);
    SIMMIM_BIND(expand_signs);
    SIMMIM_BIND(gather_patches);
    SIMMIM_BIND(gelu_backward);
    SIMMIM_BIND(gelu_forward);
    SIMMIM_BIND(gradient_norm);
    SIMMIM_BIND(layer_norm_backward);
    SIMMIM_BIND(layer_norm_forward);
    SIMMIM_BIND(layer_scale_backward);
    SIMMIM_BIND(masked_l1_loss_forward);
    SIMMIM_BIND(merge_patches_backward);
    SIMMIM_BIND(merge_patches_forward);
    SIMMIM_BIND(place_tokens_backward);
    SIMMIM_BIND(place_tokens_forward);
    SIMMIM_BIND(post_norm_backward);
    SIMMIM_BIND(post_norm_forward);
    SIMMIM_BIND(random_patch_mask);
    SIMMIM_BIND(residual_backward);
    SIMMIM_BIND(residual_forward);
    SIMMIM_BIND(substitute_mask_tokens_backward);
    SIMMIM_BIND(substitute_mask_tokens_forward);
    SIMMIM_BIND(window_attention_backward);
    SIMMIM_BIND(window_attention_forward);
}
