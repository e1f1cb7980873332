// Memory for the large outputs of the native kernels, kept for the next step when it is freed.
//
// The system hands out a fresh large allocation page by page, each cleared on first touch, which
// takes longer than a memory-bound kernel does; PyTorch's CPU allocator asks for it anew every
// time.
#pragma once

#include <cstddef>

namespace simmim {

struct MemoryBlock {
    void* data;
    size_t size;
};

// At least `bytes` bytes, aligned to a page, contents undefined. Throws std::bad_alloc.
MemoryBlock* take_memory(size_t bytes);

// Gives a block back; any thread may. Free neighbours become one, from which blocks of other sizes
// are cut: phases of a step differ in sizes, and memory that fits none would be cleared anew.
// In use and free together stay within 1.25 times what was once in use at one time.
void give_back_memory(MemoryBlock* block) noexcept;

// Returns free huge pages to the system, and how many bytes those were; what may be kept is then
// counted afresh.
size_t release_memory() noexcept;

}  // namespace simmim
