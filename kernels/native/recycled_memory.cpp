#include "recycled_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>

namespace simmim {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Pool {
    std::mutex mutex;
    std::multimap<size_t, MemoryBlock*> kept;  // by size
    size_t kept_bytes = 0;
    size_t used_bytes = 0;
    size_t most_used_bytes = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
    static Pool* const only = new Pool;
    return *only;
}

// Blocks of whole huge pages, so that the first touch is cheap as well.
void* map(size_t size) {
    const size_t padded = size + kHugePage;
    void* mapped =
        mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    const auto begin = reinterpret_cast<uintptr_t>(mapped);
    const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > begin) munmap(mapped, aligned - begin);
    const uintptr_t end = begin + padded;
    if (end > aligned + size) munmap(reinterpret_cast<void*>(aligned + size), end - aligned - size);
    void* data = reinterpret_cast<void*>(aligned);
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);  // only advice: an old kernel may refuse it
#endif
    return data;
}

void unmap(MemoryBlock* block) {
    munmap(block->data, block->size);
    delete block;
}

size_t release_locked(Pool& p, size_t bytes) {
    size_t released = 0;
    while (!p.kept.empty() && released < bytes) {
        const auto largest = std::prev(p.kept.end());
        released += largest->first;
        p.kept_bytes -= largest->first;
        unmap(largest->second);
        p.kept.erase(largest);
    }
    return released;
}

}  // namespace

MemoryBlock* take_memory(size_t bytes) {
    const size_t size = (std::max(bytes, size_t{1}) + kHugePage - 1) / kHugePage * kHugePage;
    Pool& p = pool();
    const std::lock_guard lock(p.mutex);
    const auto found = p.kept.lower_bound(size);
    MemoryBlock* block;
    if (found != p.kept.end() && found->first <= size + size / 4) {
        block = found->second;
        p.kept_bytes -= block->size;
        p.kept.erase(found);
    } else {
        const size_t limit = std::max(p.most_used_bytes, p.used_bytes + size);
        const size_t total = p.kept_bytes + p.used_bytes + size;
        if (total > limit) release_locked(p, total - limit);
        void* data = map(size);
        if (data == nullptr) {
            release_locked(p, p.kept_bytes);
            data = map(size);
        }
        if (data == nullptr) throw std::bad_alloc();
        block = new MemoryBlock{data, size};
    }
    p.used_bytes += block->size;
    p.most_used_bytes = std::max(p.most_used_bytes, p.used_bytes);
    return block;
}

void give_back_memory(MemoryBlock* block) noexcept {
    Pool& p = pool();
    const std::lock_guard lock(p.mutex);
    p.used_bytes -= block->size;
    if (p.kept_bytes + p.used_bytes + block->size > p.most_used_bytes) {
        unmap(block);
        return;
    }
    p.kept_bytes += block->size;
    p.kept.emplace(block->size, block);
}

size_t release_memory() noexcept {
    Pool& p = pool();
    const std::lock_guard lock(p.mutex);
    p.most_used_bytes = p.used_bytes;  // what was once needed need not be kept again
    return release_locked(p, p.kept_bytes);
}

}  // namespace simmim
