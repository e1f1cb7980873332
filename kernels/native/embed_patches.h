// Patch embedding of the visible patches; see kernels/simmim_kernels/embed_patches.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "rows.h"
#include "target.h"

namespace simmim {

// Visible patches as rows [num_visible, channels · patch²], in the order of a convolution's weight.
struct GatherPatches {
    const void* image;
    int image_dtype;         // 0 float32, 1 bfloat16, 2 float16, 3 uint8
    int64_t shape[4];        // B, channels, H, W
    int64_t strides[4];      // in elements
    List<float> mean, std;   // [channels], on the 0-1 scale; uint8 only
    int64_t patch;           // side in pixels
    const int64_t* visible;  // [num_visible]: index among all patches of the batch
    int64_t num_visible;
    void* rows;
    int product_dtype;
    int num_threads;
    SIMMIM_FIELDS(image, image_dtype, shape, strides, mean, std, patch, visible, num_visible, rows,
                  product_dtype, num_threads)
};

struct PlaceTokens {
    Rows shape;  // all tokens of the batch
    int64_t tokens_per_image;
    const int64_t* place;  // [tokens]: the token's row among the visible ones, -1 where hidden
    const float* bias;     // [width] or null
    const float *norm_weight, *norm_bias;  // [width], null without a norm
    float eps;
    SIMMIM_FIELDS(shape, tokens_per_image, place, bias, norm_weight, norm_bias, eps)
};

struct PlaceTokensForward : PlaceTokens {
    const void* product;     // [num_visible, width], without bias
    const void* mask_token;  // [width] in `dtype`, null where nothing is hidden
    const float* position;   // [tokens_per_image, width] or null
    void* kept;              // product in `dtype`, null where it is the product itself
    float *mean, *rstd;      // [num_visible]
    void* out;               // [tokens, width]
    SIMMIM_FIELDS_AFTER(PlaceTokens, product, mask_token, position, kept, mean, rstd, out)
};

struct PlaceTokensBackward : PlaceTokens {
    const void* grad_out;  // [tokens, width]
    const void* kept;
    const float *mean, *rstd;
    void* grad_product;                                                      // [num_visible, width]
    float *grad_bias, *grad_norm_weight, *grad_norm_bias, *grad_mask_token;  // [width] each
    SIMMIM_FIELDS_AFTER(PlaceTokens, grad_out, kept, mean, rstd, grad_product, grad_bias,
                        grad_norm_weight, grad_norm_bias, grad_mask_token)
};

}  // namespace simmim

SIMMIM_DECLARE(void gather_patches(const GatherPatches& a))
SIMMIM_DECLARE(void place_tokens_forward(const PlaceTokensForward& a))
SIMMIM_DECLARE(void place_tokens_backward(const PlaceTokensBackward& a))
