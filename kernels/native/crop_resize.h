// A box of an image, resized as Pillow does; see kernels/simmim_kernels/crop_resize.
#pragma once

#include <cstdint>

#include "target.h"

namespace simmim {

struct CropResize {
    const uint8_t* image;  // first row; pixels of a row are contiguous
    int64_t row_stride;    // bytes
    int64_t height, width, channels;
    int64_t left, top, box_width, box_height;
    int filter;    // 0 bilinear, 1 bicubic, 2 lanczos
    bool flip;     // mirrors left and right
    uint8_t* out;  // [out_height, out_width, channels]
    int64_t out_height, out_width;
};

}  // namespace simmim

SIMMIM_DECLARE(void crop_resize(const CropResize& a))
