// A box of an image, resized as Pillow does; see kernels/simmim_kernels/crop_resize.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "target.h"

namespace simmim {

struct CropResize {
    const uint8_t* image;  // first row; pixels of a row are contiguous
    int64_t row_stride;    // bytes
    struct Shape {
        int64_t height, width, channels;
        SIMMIM_FIELDS(height, width, channels)
    } shape;
    struct Box {
        int64_t left, top, width, height;
        SIMMIM_FIELDS(left, top, width, height)
    } box;
    int filter;    // 0 bilinear, 1 bicubic, 2 lanczos
    bool flip;     // mirrors left and right
    uint8_t* out;  // [size.height, size.width, channels]
    struct Size {
        int64_t height, width;
        SIMMIM_FIELDS(height, width)
    } size;
    SIMMIM_FIELDS(image, row_stride, shape, box, filter, flip, out, size)
};

}  // namespace simmim

SIMMIM_DECLARE(void crop_resize(const CropResize& a))
