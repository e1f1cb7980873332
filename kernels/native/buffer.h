// Memory that a kernel works in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "target.h"

namespace simmim::SIMMIM_TARGET {

// An array with undefined contents.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t size) : data_(new T[static_cast<size_t>(size)]) {}
    ~Buffer() { delete[] data_; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() const { return data_; }

  private:
    T* data_;
};

}  // namespace simmim::SIMMIM_TARGET
