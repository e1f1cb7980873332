// The Python module simmim_kernels._cpu: addresses and sizes in, nothing else. Checks of shapes and
// dtypes live in Python; a dtype is 0 float32, 1 bfloat16, 2 float16, 3 uint8.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "masked_l1_loss.h"
#include "random_patch_mask.h"
#include "recycled_memory.h"
#include "substitute_mask_tokens.h"
#include "target.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

const char* const kTargetNames[] = {"baseline", "avx2", "avx512"};

bool use_target(const std::string& name) {
    for (int i = 0; i < 3; ++i) {
        if (name == kTargetNames[i]) {
            return simmim::force_target(static_cast<simmim::Target>(i));
        }
    }
    return false;
}

// A tensor over recycled memory, which goes back when the last tensor that shares it is gone.
nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>> recycled_bytes(size_t bytes) {
    simmim::MemoryBlock* block = simmim::take_memory(bytes);
    nb::capsule owner(block, [](void* p) noexcept {
        simmim::give_back_memory(static_cast<simmim::MemoryBlock*>(p));
    });
    return {block->data, {bytes}, owner};
}

std::pair<double, int64_t> masked_l1_loss_forward(
    uintptr_t prediction, const std::vector<int64_t>& strides, int dtype, uintptr_t row_of_cell,
    uintptr_t image, const std::array<int64_t, 4>& image_shape,
    const std::array<int64_t, 4>& image_strides, int image_dtype, const std::vector<float>& mean,
    const std::vector<float>& std, uintptr_t mask, const std::array<int64_t, 2>& grid,
    int64_t stride, int64_t norm_target, uintptr_t signs, int num_threads) {
    simmim::MaskedL1Forward a{};
    a.prediction = pointer<const void>(prediction);
    a.dtype = dtype;
    for (size_t i = 0; i < strides.size() && i < 4; ++i) a.strides[i] = strides[i];
    a.row_of_cell = pointer<const int32_t>(row_of_cell);
    a.target.image = pointer<const void>(image);
    a.target.dtype = image_dtype;
    for (size_t i = 0; i < 4; ++i) {
        a.target.shape[i] = image_shape[i];
        a.target.strides[i] = image_strides[i];
    }
    a.target.mean = mean.data();
    a.target.std = std.data();
    a.target.mask = pointer<const uint8_t>(mask);
    a.target.grid[0] = grid[0];
    a.target.grid[1] = grid[1];
    a.stride = stride;
    a.norm_target = norm_target;
    a.signs = pointer<int32_t>(signs);
    a.num_threads = num_threads;
    nb::gil_scoped_release release;
    int64_t hidden_cells = 0;
    for (int64_t i = 0; i < image_shape[0] * grid[0] * grid[1]; ++i) {
        hidden_cells += a.target.mask[i];
    }
    return {SIMMIM_CALL(masked_l1_loss_forward, a), hidden_cells};
}

void expand_signs(uintptr_t signs, uintptr_t rows, uintptr_t out, int dtype, int64_t num_rows,
                  int64_t runs_per_row, int64_t run, float step, int num_threads) {
    const simmim::ExpandSigns a{pointer<const int32_t>(signs),
                                pointer<const int64_t>(rows),
                                pointer<void>(out),
                                dtype,
                                num_rows,
                                runs_per_row,
                                run,
                                step,
                                num_threads};
    nb::gil_scoped_release release;
    SIMMIM_CALL(expand_signs, a);
}

void substitute_mask_tokens_forward(uintptr_t tokens, uintptr_t mask, uintptr_t mask_token,
                                    uintptr_t pos_embed, uintptr_t out, int64_t rows,
                                    int64_t tokens_per_image, int64_t width, int dtype,
                                    int num_threads) {
    const simmim::SubstituteForward a{pointer<const void>(tokens),
                                      pointer<const uint8_t>(mask),
                                      pointer<const void>(mask_token),
                                      pointer<const void>(pos_embed),
                                      pointer<void>(out),
                                      rows,
                                      tokens_per_image,
                                      width,
                                      dtype,
                                      num_threads};
    nb::gil_scoped_release release;
    SIMMIM_CALL(substitute_mask_tokens_forward, a);
}

void substitute_mask_tokens_backward(uintptr_t grad_out, uintptr_t mask, uintptr_t grad_tokens,
                                     uintptr_t grad_mask_token, int64_t rows, int64_t width,
                                     int dtype, int num_threads) {
    const simmim::SubstituteBackward a{pointer<const void>(grad_out),
                                       pointer<const uint8_t>(mask),
                                       pointer<void>(grad_tokens),
                                       pointer<float>(grad_mask_token),
                                       rows,
                                       width,
                                       dtype,
                                       num_threads};
    nb::gil_scoped_release release;
    SIMMIM_CALL(substitute_mask_tokens_backward, a);
}

void random_patch_mask(uintptr_t ids, uintptr_t epochs, int64_t epoch_stride, int64_t batch,
                       int64_t rows, int64_t columns, int64_t unit, int64_t num_hidden, int64_t key,
                       uintptr_t mask, int num_threads) {
    const simmim::RandomPatchMask a{pointer<const int64_t>(ids),
                                    pointer<const int64_t>(epochs),
                                    epoch_stride,
                                    batch,
                                    rows,
                                    columns,
                                    unit,
                                    num_hidden,
                                    static_cast<uint64_t>(key),
                                    pointer<uint8_t>(mask),
                                    num_threads};
    nb::gil_scoped_release release;
    SIMMIM_CALL(random_patch_mask, a);
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("target", [] { return kTargetNames[static_cast<int>(simmim::target())]; });
    m.def("use_target", &use_target, "name"_a);
    m.def("has_fast_bfloat16", &simmim::has_fast_bfloat16);
    m.def("recycled_bytes", &recycled_bytes, "bytes"_a);
    m.def("release_memory", &simmim::release_memory);
    m.def("masked_l1_loss_forward", &masked_l1_loss_forward, "prediction"_a, "strides"_a, "dtype"_a,
          "row_of_cell"_a, "image"_a, "image_shape"_a, "image_strides"_a, "image_dtype"_a, "mean"_a,
          "std"_a, "mask"_a, "grid"_a, "stride"_a, "norm_target"_a, "signs"_a, "num_threads"_a);
    m.def("expand_signs", &expand_signs, "signs"_a, "rows"_a, "out"_a, "dtype"_a, "num_rows"_a,
          "runs_per_row"_a, "run"_a, "step"_a, "num_threads"_a);
    m.def("substitute_mask_tokens_forward", &substitute_mask_tokens_forward, "tokens"_a, "mask"_a,
          "mask_token"_a, "pos_embed"_a, "out"_a, "rows"_a, "tokens_per_image"_a, "width"_a,
          "dtype"_a, "num_threads"_a);
    m.def("substitute_mask_tokens_backward", &substitute_mask_tokens_backward, "grad_out"_a,
          "mask"_a, "grad_tokens"_a, "grad_mask_token"_a, "rows"_a, "width"_a, "dtype"_a,
          "num_threads"_a);
    m.def("random_patch_mask", &random_patch_mask, "ids"_a, "epochs"_a, "epoch_stride"_a, "batch"_a,
          "rows"_a, "columns"_a, "unit"_a, "num_hidden"_a, "key"_a, "mask"_a, "num_threads"_a);
}
