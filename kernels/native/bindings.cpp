// The Python module simmim_kernels._cpu: addresses and sizes in, nothing else.
// Checks of shapes and dtypes live in Python; a dtype is 0 float32, 1 bfloat16,
// 2 float16, 3 uint8.
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

#include "batch_norm_relu.h"
#include "crop_resize.h"
#include "embed_patches.h"
#include "gradient_norm.h"
#include "masked_l1_loss.h"
#include "merge_patches.h"
#include "post_norm_block.h"
#include "random_patch_mask.h"
#include "recycled_memory.h"
#include "substitute_mask_tokens.h"
#include "target.h"
#include "transformer_block.h"
#include "window_attention.h"

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

using Maps = std::array<int64_t, 4>;  // rows, channels, dtype, num_threads

simmim::ChannelMaps maps_of(const Maps& shape) {
    return {shape[0], shape[1], static_cast<int>(shape[2]), static_cast<int>(shape[3])};
}

void batch_norm_relu_forward(const Maps& shape, uintptr_t x, uintptr_t residual, uintptr_t weight,
                             uintptr_t bias, float eps, uintptr_t mean, uintptr_t variance,
                             uintptr_t out) {
    const simmim::BatchNormReluForward a{maps_of(shape),
                                         pointer<const void>(x),
                                         pointer<const void>(residual),
                                         pointer<const float>(weight),
                                         pointer<const float>(bias),
                                         eps,
                                         pointer<float>(mean),
                                         pointer<float>(variance),
                                         pointer<void>(out)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(batch_norm_relu_forward, a);
}

void batch_norm_relu_backward(const Maps& shape, uintptr_t grad_out, uintptr_t x, uintptr_t out,
                              uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t variance,
                              float eps, uintptr_t grad_x, uintptr_t grad_residual,
                              uintptr_t grad_weight, uintptr_t grad_bias) {
    const simmim::BatchNormReluBackward a{maps_of(shape),
                                          pointer<const void>(grad_out),
                                          pointer<const void>(x),
                                          pointer<const void>(out),
                                          pointer<const float>(weight),
                                          pointer<const float>(bias),
                                          pointer<const float>(mean),
                                          pointer<const float>(variance),
                                          eps,
                                          pointer<void>(grad_x),
                                          pointer<void>(grad_residual),
                                          pointer<float>(grad_weight),
                                          pointer<float>(grad_bias)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(batch_norm_relu_backward, a);
}

void crop_resize(uintptr_t image, int64_t row_stride, const std::array<int64_t, 3>& shape,
                 const std::array<int64_t, 4>& box, int filter, bool flip, uintptr_t out,
                 const std::array<int64_t, 2>& size) {
    const simmim::CropResize a{pointer<const uint8_t>(image),
                               row_stride,
                               shape[0],
                               shape[1],
                               shape[2],
                               box[0],
                               box[1],
                               box[2],
                               box[3],
                               filter,
                               flip,
                               pointer<uint8_t>(out),
                               size[0],
                               size[1]};
    nb::gil_scoped_release release;
    SIMMIM_CALL(crop_resize, a);
}

void gradient_norm(const std::vector<uintptr_t>& arrays, const std::vector<int64_t>& sizes,
                   int num_threads, uintptr_t out) {
    const simmim::GradientNorm a{reinterpret_cast<const float* const*>(arrays.data()), sizes.data(),
                                 static_cast<int64_t>(sizes.size()), num_threads,
                                 pointer<float>(out)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(gradient_norm, a);
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

simmim::WindowAttention attention(uintptr_t qkv, uintptr_t qkv_bias, uintptr_t bias,
                                  uintptr_t factors, const std::array<int64_t, 5>& sizes,
                                  const std::array<int64_t, 2>& window,
                                  const std::array<int64_t, 2>& shift, float scale, int dtype,
                                  int num_threads) {
    simmim::WindowAttention a{};
    a.qkv = pointer<const void>(qkv);
    a.qkv_bias = pointer<const float>(qkv_bias);
    a.bias = pointer<const float>(bias);
    a.factors = pointer<const float>(factors);
    a.batch = sizes[0];
    a.rows = sizes[1];
    a.columns = sizes[2];
    a.width = sizes[3];
    a.num_heads = sizes[4];
    for (size_t i = 0; i < 2; ++i) {
        a.window[i] = window[i];
        a.shift[i] = shift[i];
    }
    a.scale = scale;
    a.dtype = dtype;
    a.num_threads = num_threads;
    return a;
}

void window_attention_forward(uintptr_t qkv, uintptr_t qkv_bias, uintptr_t bias, uintptr_t factors,
                              const std::array<int64_t, 5>& sizes,
                              const std::array<int64_t, 2>& window,
                              const std::array<int64_t, 2>& shift, float scale, int dtype,
                              int num_threads, uintptr_t out, uintptr_t log_sums) {
    const simmim::WindowAttentionForward a{
        attention(qkv, qkv_bias, bias, factors, sizes, window, shift, scale, dtype, num_threads),
        pointer<void>(out), pointer<float>(log_sums)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(window_attention_forward, a);
}

void window_attention_backward(uintptr_t qkv, uintptr_t qkv_bias, uintptr_t bias, uintptr_t factors,
                               const std::array<int64_t, 5>& sizes,
                               const std::array<int64_t, 2>& window,
                               const std::array<int64_t, 2>& shift, float scale, int dtype,
                               int num_threads, uintptr_t grad_out, uintptr_t log_sums,
                               uintptr_t grad_qkv, uintptr_t grad_qkv_bias, uintptr_t grad_bias,
                               uintptr_t grad_factors, int grad_dtype) {
    const simmim::WindowAttentionBackward a{
        attention(qkv, qkv_bias, bias, factors, sizes, window, shift, scale, dtype, num_threads),
        pointer<const void>(grad_out),
        pointer<const float>(log_sums),
        pointer<void>(grad_qkv),
        pointer<float>(grad_qkv_bias),
        pointer<float>(grad_bias),
        pointer<float>(grad_factors),
        grad_dtype};
    nb::gil_scoped_release release;
    SIMMIM_CALL(window_attention_backward, a);
}

using Shape = std::array<int64_t, 5>;  // rows, width, dtype, product_dtype, num_threads

simmim::Rows rows_of(const Shape& shape) {
    return {shape[0], shape[1], static_cast<int>(shape[2]), static_cast<int>(shape[3]),
            static_cast<int>(shape[4])};
}

void layer_norm_forward(const Shape& shape, uintptr_t x, uintptr_t weight, uintptr_t bias,
                        float eps, uintptr_t y, uintptr_t mean, uintptr_t rstd) {
    const simmim::LayerNormForward a{rows_of(shape),
                                     pointer<const void>(x),
                                     pointer<const float>(weight),
                                     pointer<const float>(bias),
                                     eps,
                                     pointer<void>(y),
                                     pointer<float>(mean),
                                     pointer<float>(rstd)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(layer_norm_forward, a);
}

void layer_norm_backward(const Shape& shape, uintptr_t x, uintptr_t grad_out, uintptr_t weight,
                         uintptr_t bias, uintptr_t mean, uintptr_t rstd, uintptr_t grad_y,
                         uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias) {
    const simmim::LayerNormBackward a{rows_of(shape),
                                      pointer<const void>(x),
                                      pointer<const void>(grad_out),
                                      pointer<const float>(weight),
                                      pointer<const float>(bias),
                                      pointer<const float>(mean),
                                      pointer<const float>(rstd),
                                      pointer<void>(grad_y),
                                      pointer<void>(grad_x),
                                      pointer<float>(grad_weight),
                                      pointer<float>(grad_bias)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(layer_norm_backward, a);
}

void merge_patches_forward(const Shape& shape, int64_t columns, uintptr_t x, uintptr_t weight,
                           uintptr_t bias, float eps, uintptr_t y, uintptr_t mean, uintptr_t rstd) {
    const simmim::MergeForward a{rows_of(shape),
                                 columns,
                                 pointer<const void>(x),
                                 pointer<const float>(weight),
                                 pointer<const float>(bias),
                                 eps,
                                 pointer<void>(y),
                                 pointer<float>(mean),
                                 pointer<float>(rstd)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(merge_patches_forward, a);
}

void merge_patches_backward(const Shape& shape, int64_t columns, uintptr_t x, uintptr_t weight,
                            uintptr_t bias, uintptr_t mean, uintptr_t rstd, uintptr_t grad_y,
                            uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias) {
    const simmim::MergeBackward a{rows_of(shape),
                                  columns,
                                  pointer<const void>(x),
                                  pointer<const float>(weight),
                                  pointer<const float>(bias),
                                  pointer<const float>(mean),
                                  pointer<const float>(rstd),
                                  pointer<void>(grad_y),
                                  pointer<void>(grad_x),
                                  pointer<float>(grad_weight),
                                  pointer<float>(grad_bias)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(merge_patches_backward, a);
}

void post_norm_forward(const Shape& shape, uintptr_t x, uintptr_t product, uintptr_t bias,
                       uintptr_t weight, uintptr_t norm_bias, float eps, uintptr_t branch_scale,
                       int64_t rows_per_image, uintptr_t kept, uintptr_t mean, uintptr_t rstd,
                       uintptr_t out) {
    const simmim::PostNormForward a{rows_of(shape),
                                    pointer<const void>(x),
                                    pointer<const void>(product),
                                    pointer<const float>(bias),
                                    pointer<const float>(weight),
                                    pointer<const float>(norm_bias),
                                    eps,
                                    pointer<const float>(branch_scale),
                                    rows_per_image,
                                    pointer<void>(kept),
                                    pointer<float>(mean),
                                    pointer<float>(rstd),
                                    pointer<void>(out)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(post_norm_forward, a);
}

void post_norm_backward(const Shape& shape, uintptr_t grad_out, uintptr_t kept, uintptr_t bias,
                        uintptr_t weight, uintptr_t mean, uintptr_t rstd, uintptr_t branch_scale,
                        int64_t rows_per_image, uintptr_t grad_product, uintptr_t grad_bias,
                        uintptr_t grad_weight, uintptr_t grad_norm_bias) {
    const simmim::PostNormBackward a{rows_of(shape),
                                     pointer<const void>(grad_out),
                                     pointer<const void>(kept),
                                     pointer<const float>(bias),
                                     pointer<const float>(weight),
                                     pointer<const float>(mean),
                                     pointer<const float>(rstd),
                                     pointer<const float>(branch_scale),
                                     rows_per_image,
                                     pointer<void>(grad_product),
                                     pointer<float>(grad_bias),
                                     pointer<float>(grad_weight),
                                     pointer<float>(grad_norm_bias)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(post_norm_backward, a);
}

void gelu_forward(const Shape& shape, uintptr_t product, uintptr_t bias, uintptr_t kept,
                  uintptr_t out) {
    const simmim::GeluForward a{rows_of(shape), pointer<const void>(product),
                                pointer<const float>(bias), pointer<void>(kept),
                                pointer<void>(out)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(gelu_forward, a);
}

void gelu_backward(const Shape& shape, uintptr_t kept, uintptr_t bias, uintptr_t grad,
                   uintptr_t out, uintptr_t grad_bias) {
    const simmim::GeluBackward a{
        rows_of(shape),      pointer<const void>(kept), pointer<const float>(bias),
        pointer<void>(grad), pointer<void>(out),        pointer<float>(grad_bias)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(gelu_backward, a);
}

void residual_forward(const Shape& shape, uintptr_t x, uintptr_t product, uintptr_t bias,
                      uintptr_t gamma, uintptr_t branch_scale, int64_t rows_per_image,
                      uintptr_t out) {
    const simmim::ResidualForward a{rows_of(shape),
                                    pointer<const void>(x),
                                    pointer<const void>(product),
                                    pointer<const float>(bias),
                                    pointer<const float>(gamma),
                                    pointer<const float>(branch_scale),
                                    rows_per_image,
                                    pointer<void>(out)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(residual_forward, a);
}

void residual_backward(const Shape& shape, uintptr_t grad_out, uintptr_t branch_scale,
                       int64_t rows_per_image, uintptr_t grad_product, uintptr_t sum) {
    const simmim::ResidualBackward a{
        rows_of(shape), pointer<const void>(grad_out), pointer<const float>(branch_scale),
        rows_per_image, pointer<void>(grad_product),   pointer<float>(sum)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(residual_backward, a);
}

void layer_scale_backward(int64_t rows, int64_t width, uintptr_t weight, uintptr_t gamma,
                          uintptr_t grad, uintptr_t dot, int num_threads) {
    const simmim::LayerScaleBackward a{rows,
                                       width,
                                       pointer<const float>(weight),
                                       pointer<const float>(gamma),
                                       pointer<float>(grad),
                                       pointer<float>(dot),
                                       num_threads};
    nb::gil_scoped_release release;
    SIMMIM_CALL(layer_scale_backward, a);
}

void gather_patches(uintptr_t image, int image_dtype, const std::array<int64_t, 4>& shape,
                    const std::array<int64_t, 4>& strides, const std::vector<float>& mean,
                    const std::vector<float>& std, int64_t patch, uintptr_t visible,
                    int64_t num_visible, uintptr_t rows, int product_dtype, int num_threads) {
    simmim::GatherPatches a{};
    a.image = pointer<const void>(image);
    a.image_dtype = image_dtype;
    for (size_t i = 0; i < 4; ++i) {
        a.shape[i] = shape[i];
        a.strides[i] = strides[i];
    }
    a.mean = mean.data();
    a.std = std.data();
    a.patch = patch;
    a.visible = pointer<const int64_t>(visible);
    a.num_visible = num_visible;
    a.rows = pointer<void>(rows);
    a.product_dtype = product_dtype;
    a.num_threads = num_threads;
    nb::gil_scoped_release release;
    SIMMIM_CALL(gather_patches, a);
}

simmim::PlaceTokens placing(const Shape& shape, int64_t tokens_per_image, uintptr_t place,
                            uintptr_t bias, uintptr_t norm_weight, uintptr_t norm_bias, float eps) {
    return {rows_of(shape),
            tokens_per_image,
            pointer<const int64_t>(place),
            pointer<const float>(bias),
            pointer<const float>(norm_weight),
            pointer<const float>(norm_bias),
            eps};
}

void place_tokens_forward(const Shape& shape, int64_t tokens_per_image, uintptr_t place,
                          uintptr_t bias, uintptr_t norm_weight, uintptr_t norm_bias, float eps,
                          uintptr_t product, uintptr_t mask_token, uintptr_t position,
                          uintptr_t kept, uintptr_t mean, uintptr_t rstd, uintptr_t out) {
    const simmim::PlaceTokensForward a{
        placing(shape, tokens_per_image, place, bias, norm_weight, norm_bias, eps),
        pointer<const void>(product),
        pointer<const void>(mask_token),
        pointer<const float>(position),
        pointer<void>(kept),
        pointer<float>(mean),
        pointer<float>(rstd),
        pointer<void>(out)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(place_tokens_forward, a);
}

void place_tokens_backward(const Shape& shape, int64_t tokens_per_image, uintptr_t place,
                           uintptr_t bias, uintptr_t norm_weight, uintptr_t norm_bias, float eps,
                           uintptr_t grad_out, uintptr_t kept, uintptr_t mean, uintptr_t rstd,
                           uintptr_t grad_product, uintptr_t grad_bias, uintptr_t grad_norm_weight,
                           uintptr_t grad_norm_bias, uintptr_t grad_mask_token) {
    const simmim::PlaceTokensBackward a{
        placing(shape, tokens_per_image, place, bias, norm_weight, norm_bias, eps),
        pointer<const void>(grad_out),
        pointer<const void>(kept),
        pointer<const float>(mean),
        pointer<const float>(rstd),
        pointer<void>(grad_product),
        pointer<float>(grad_bias),
        pointer<float>(grad_norm_weight),
        pointer<float>(grad_norm_bias),
        pointer<float>(grad_mask_token)};
    nb::gil_scoped_release release;
    SIMMIM_CALL(place_tokens_backward, a);
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("target", [] { return kTargetNames[static_cast<int>(simmim::target())]; });
    m.def("use_target", &use_target, "name"_a);
    m.def("has_fast_bfloat16", &simmim::has_fast_bfloat16);
    m.def("recycled_tensor", &recycled_tensor, "shape"_a, "code"_a, "bits"_a);
    m.def("batch_norm_relu_forward", &batch_norm_relu_forward, "shape"_a, "x"_a, "residual"_a,
          "weight"_a, "bias"_a, "eps"_a, "mean"_a, "variance"_a, "out"_a);
    m.def("batch_norm_relu_backward", &batch_norm_relu_backward, "shape"_a, "grad_out"_a, "x"_a,
          "out"_a, "weight"_a, "bias"_a, "mean"_a, "variance"_a, "eps"_a, "grad_x"_a,
          "grad_residual"_a, "grad_weight"_a, "grad_bias"_a);
    m.def("crop_resize", &crop_resize, "image"_a, "row_stride"_a, "shape"_a, "box"_a, "filter"_a,
          "flip"_a, "out"_a, "size"_a);
    m.def("gradient_norm", &gradient_norm, "arrays"_a, "sizes"_a, "num_threads"_a, "out"_a);
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
    m.def("window_attention_forward", &window_attention_forward, "qkv"_a, "qkv_bias"_a, "bias"_a,
          "factors"_a, "sizes"_a, "window"_a, "shift"_a, "scale"_a, "dtype"_a, "num_threads"_a,
          "out"_a, "log_sums"_a);
    m.def("window_attention_backward", &window_attention_backward, "qkv"_a, "qkv_bias"_a, "bias"_a,
          "factors"_a, "sizes"_a, "window"_a, "shift"_a, "scale"_a, "dtype"_a, "num_threads"_a,
          "grad_out"_a, "log_sums"_a, "grad_qkv"_a, "grad_qkv_bias"_a, "grad_bias"_a,
          "grad_factors"_a, "grad_dtype"_a);
    m.def("layer_norm_forward", &layer_norm_forward, "shape"_a, "x"_a, "weight"_a, "bias"_a,
          "eps"_a, "y"_a, "mean"_a, "rstd"_a);
    m.def("layer_norm_backward", &layer_norm_backward, "shape"_a, "x"_a, "grad_out"_a, "weight"_a,
          "bias"_a, "mean"_a, "rstd"_a, "grad_y"_a, "grad_x"_a, "grad_weight"_a, "grad_bias"_a);
    m.def("merge_patches_forward", &merge_patches_forward, "shape"_a, "columns"_a, "x"_a,
          "weight"_a, "bias"_a, "eps"_a, "y"_a, "mean"_a, "rstd"_a);
    m.def("merge_patches_backward", &merge_patches_backward, "shape"_a, "columns"_a, "x"_a,
          "weight"_a, "bias"_a, "mean"_a, "rstd"_a, "grad_y"_a, "grad_x"_a, "grad_weight"_a,
          "grad_bias"_a);
    m.def("post_norm_forward", &post_norm_forward, "shape"_a, "x"_a, "product"_a, "bias"_a,
          "weight"_a, "norm_bias"_a, "eps"_a, "branch_scale"_a, "rows_per_image"_a, "kept"_a,
          "mean"_a, "rstd"_a, "out"_a);
    m.def("post_norm_backward", &post_norm_backward, "shape"_a, "grad_out"_a, "kept"_a, "bias"_a,
          "weight"_a, "mean"_a, "rstd"_a, "branch_scale"_a, "rows_per_image"_a, "grad_product"_a,
          "grad_bias"_a, "grad_weight"_a, "grad_norm_bias"_a);
    m.def("gelu_forward", &gelu_forward, "shape"_a, "product"_a, "bias"_a, "kept"_a, "out"_a);
    m.def("gelu_backward", &gelu_backward, "shape"_a, "kept"_a, "bias"_a, "grad"_a, "out"_a,
          "grad_bias"_a);
    m.def("residual_forward", &residual_forward, "shape"_a, "x"_a, "product"_a, "bias"_a, "gamma"_a,
          "branch_scale"_a, "rows_per_image"_a, "out"_a);
    m.def("residual_backward", &residual_backward, "shape"_a, "grad_out"_a, "branch_scale"_a,
          "rows_per_image"_a, "grad_product"_a, "sum"_a);
    m.def("layer_scale_backward", &layer_scale_backward, "rows"_a, "width"_a, "weight"_a, "gamma"_a,
          "grad"_a, "dot"_a, "num_threads"_a);
    m.def("gather_patches", &gather_patches, "image"_a, "image_dtype"_a, "shape"_a, "strides"_a,
          "mean"_a, "std"_a, "patch"_a, "visible"_a, "num_visible"_a, "rows"_a, "product_dtype"_a,
          "num_threads"_a);
    m.def("place_tokens_forward", &place_tokens_forward, "shape"_a, "tokens_per_image"_a, "place"_a,
          "bias"_a, "norm_weight"_a, "norm_bias"_a, "eps"_a, "product"_a, "mask_token"_a,
          "position"_a, "kept"_a, "mean"_a, "rstd"_a, "out"_a);
    m.def("place_tokens_backward", &place_tokens_backward, "shape"_a, "tokens_per_image"_a,
          "place"_a, "bias"_a, "norm_weight"_a, "norm_bias"_a, "eps"_a, "grad_out"_a, "kept"_a,
          "mean"_a, "rstd"_a, "grad_product"_a, "grad_bias"_a, "grad_norm_weight"_a,
          "grad_norm_bias"_a, "grad_mask_token"_a);
}
