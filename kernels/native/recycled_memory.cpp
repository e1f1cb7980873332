#include "recycled_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>

namespace simmim {
namespace {

constexpr size_t kPage = size_t{4} << 10;
constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

struct Pool {
    std::mutex mutex;
    std::map<uintptr_t, size_t> free;  // size by address; neighbours are one
    size_t mapped_bytes = 0;
    size_t used_bytes = 0;
    size_t most_used_bytes = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
    static Pool* const only = new Pool;
    return *only;
}

// Whole huge pages, so that the first touch is cheap as well; 0 where there are none. The system
// places mappings from high to low addresses: cut off below, they are each other's neighbours.
uintptr_t map(size_t size) {
    const size_t padded = size + kHugePage;
    void* mapped =
        mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return 0;
    const auto begin = reinterpret_cast<uintptr_t>(mapped);
    const uintptr_t end = (begin + padded) / kHugePage * kHugePage;
    const uintptr_t data = end - size;
    munmap(mapped, data - begin);
    if (begin + padded > end) munmap(reinterpret_cast<void*>(end), begin + padded - end);
#ifdef MADV_HUGEPAGE
    madvise(reinterpret_cast<void*>(data), size, MADV_HUGEPAGE);  // an old kernel may refuse
#endif
    return data;
}

void add_free(Pool& p, uintptr_t begin, size_t size) {
    auto after = p.free.lower_bound(begin);
    if (after != p.free.end() && after->first == begin + size) {
        size += after->second;
        after = p.free.erase(after);
    }
    if (after != p.free.begin()) {
        const auto before = std::prev(after);
        if (before->first + before->second == begin) {
            before->second += size;
            return;
        }
    }
    p.free.emplace(begin, size);
}

// Returns at least `bytes` bytes of free huge pages to the system, or all; how many.
size_t unmap_free(Pool& p, size_t bytes) {
    size_t unmapped = 0;
    for (auto range = p.free.begin(); range != p.free.end() && unmapped < bytes;) {
        const uintptr_t begin = range->first, end = begin + range->second;
        const uintptr_t first = round_up(begin, kHugePage), last = end / kHugePage * kHugePage;
        if (first >= last) {
            ++range;
            continue;
        }
        munmap(reinterpret_cast<void*>(first), last - first);
        unmapped += last - first;
        range = p.free.erase(range);
        if (first > begin) p.free.emplace(begin, first - begin);
        if (end > last) p.free.emplace(last, end - last);
    }
    p.mapped_bytes -= unmapped;
    return unmapped;
}

std::map<uintptr_t, size_t>::iterator smallest_that_fits(Pool& p, size_t size) {
    auto best = p.free.end();
    for (auto range = p.free.begin(); range != p.free.end(); ++range) {
        if (range->second < size) continue;
        if (best == p.free.end() || range->second < best->second) best = range;
    }
    return best;
}

void grow(Pool& p, size_t size) {
    size = round_up(size, kHugePage);
    const size_t most_used = std::max(p.most_used_bytes, p.used_bytes + size);
    const size_t limit = most_used + most_used / 4;
    if (p.mapped_bytes + size > limit) unmap_free(p, p.mapped_bytes + size - limit);
    uintptr_t data = map(size);
    if (data == 0) {
        unmap_free(p, p.mapped_bytes);
        data = map(size);
    }
    if (data == 0) throw std::bad_alloc();
    p.mapped_bytes += size;
    add_free(p, data, size);
}

}  // namespace

MemoryBlock* take_memory(size_t bytes) {
    const size_t size = round_up(std::max(bytes, size_t{1}), kPage);
    Pool& p = pool();
    const std::lock_guard lock(p.mutex);
    auto range = smallest_that_fits(p, size);
    if (range == p.free.end()) {
        grow(p, size);
        range = smallest_that_fits(p, size);
    }
    const uintptr_t data = range->first;
    const size_t rest = range->second - size;
    p.free.erase(range);
    if (rest > 0) p.free.emplace(data + size, rest);
    p.used_bytes += size;
    p.most_used_bytes = std::max(p.most_used_bytes, p.used_bytes);
    return new MemoryBlock{reinterpret_cast<void*>(data), size};
}

void give_back_memory(MemoryBlock* block) noexcept {
    Pool& p = pool();
    const std::lock_guard lock(p.mutex);
    p.used_bytes -= block->size;
    add_free(p, reinterpret_cast<uintptr_t>(block->data), block->size);
    delete block;
}

size_t release_memory() noexcept {
    Pool& p = pool();
    const std::lock_guard lock(p.mutex);
    p.most_used_bytes = p.used_bytes;  // what was once needed need not be kept again
    return unmap_free(p, p.mapped_bytes);
}

}  // namespace simmim
