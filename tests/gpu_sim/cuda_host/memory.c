// Memory of the device and page-locked memory of the host: address ranges that copies can use.
//
// The device's takes up none of this machine's memory until it is written: kernels write nothing.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "card.h"
#include "stand_in.h"

struct range {
    char* start;
    size_t size;
    bool device;
};
static struct range* ranges;
static size_t num_ranges, room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void keep(void* start, size_t size, bool device) {
    pthread_mutex_lock(&lock);
    if (num_ranges == room) ranges = realloc(ranges, (room = 2 * room + 64) * sizeof *ranges);
    ranges[num_ranges++] = (struct range){start, size, device};
    if (device) counts.bytes_in_use += size;
    pthread_mutex_unlock(&lock);
}

// Forgets the range that begins there; its size is 0 if there is none.
static struct range forget(void* start) {
    struct range found = {start, 0, false};
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < num_ranges; i++) {
        if (ranges[i].start != start) continue;
        found = ranges[i];
        ranges[i] = ranges[--num_ranges];
        if (found.device) counts.bytes_in_use -= found.size;
        break;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static struct range of(const void* pointer) {
    struct range found = {NULL, 0, false};
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < num_ranges && !found.start; i++) {
        size_t offset = (const char*)pointer - ranges[i].start;
        if ((const char*)pointer >= ranges[i].start && offset < ranges[i].size) found = ranges[i];
    }
    pthread_mutex_unlock(&lock);
    return found;
}

bool is_device(const void* pointer) { return of(pointer).device; }

bool is_pinned(const void* pointer) {
    struct range r = of(pointer);
    return r.start && !r.device;
}

// CUDA_HOST_MEMORY_MIB makes a smaller card of it.
static size_t capacity(void) {
    const char* mib = getenv("CUDA_HOST_MEMORY_MIB");
    return mib ? strtoull(mib, NULL, 10) << 20 : CARD_MEMORY_BYTES;
}

// Small blocks hold flags and counters. As no kernel writes these, they begin as bytes of 1: true
// as a bool, and a tiny finite number as a float.
enum { SMALL_BLOCK = 2 << 20 };

EXPORT int cudaMalloc(void** pointer, size_t size) {
    if (forbidden_now()) return fail(CAPTURE_UNSUPPORTED);
    if (counts.bytes_in_use + size > capacity()) return fail(OUT_OF_MEMORY);
    char* start = mmap(NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return fail(OUT_OF_MEMORY);
    if (size <= SMALL_BLOCK) memset(start, 1, size);
    keep(start, size, true);
    COUNT(allocations);
    *pointer = start;
    return OK;
}

EXPORT int cudaFree(void* pointer) {
    if (!pointer) return OK;  // torch makes a context by it
    if (forbidden_now()) return fail(CAPTURE_UNSUPPORTED);
    struct range r = forget(pointer);
    if (!r.size) return fail(INVALID_VALUE);
    COUNT(frees);
    munmap(r.start, r.size);
    return OK;
}

EXPORT int cudaMallocAsync(void** pointer, size_t size, void* stream) {
    (void)stream;
    return cudaMalloc(pointer, size);
}

EXPORT int cudaFreeAsync(void* pointer, void* stream) {
    (void)stream;
    return cudaFree(pointer);
}

EXPORT int cudaMemGetInfo(size_t* available, size_t* total) {
    *total = capacity();
    *available = *total - counts.bytes_in_use;
    return OK;
}

EXPORT int cudaHostAlloc(void** pointer, size_t size, unsigned flags) {
    (void)flags;
    if (forbidden_now()) return fail(CAPTURE_UNSUPPORTED);
    if (posix_memalign(pointer, 4096, size ? size : 1)) return fail(OUT_OF_MEMORY);
    keep(*pointer, size, false);
    return OK;
}

EXPORT int cudaFreeHost(void* pointer) {
    if (pointer && !forget(pointer).size) return fail(INVALID_VALUE);
    free(pointer);
    return OK;
}

EXPORT int cudaHostRegister(void* pointer, size_t size, unsigned flags) {
    (void)flags;
    if (of(pointer).start) return fail(712);  // already registered
    keep(pointer, size, false);
    return OK;
}

EXPORT int cudaHostUnregister(void* pointer) {
    return forget(pointer).size ? OK : fail(713);  // not registered
}

EXPORT int cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
    (void)flags;
    *device = host;
    return OK;
}

struct attributes {
    int type;
    int device;
    void *on_device, *on_host;
};
enum { UNREGISTERED, PINNED, DEVICE };

EXPORT int cudaPointerGetAttributes(struct attributes* found, const void* pointer) {
    struct range r = of(pointer);
    memset(found, 0, sizeof *found);
    found->type = !r.start ? UNREGISTERED : r.device ? DEVICE : PINNED;
    found->on_device = r.start ? (void*)pointer : NULL;
    found->on_host = r.start && !r.device ? (void*)pointer : NULL;
    return OK;
}

enum { HOST_TO_HOST, TO_DEVICE, TO_HOST, IN_DEVICE, BY_ADDRESS };

static int copy(void* to, const void* from, size_t size, int direction, void* stream) {
    bool from_host = direction == TO_DEVICE || direction == HOST_TO_HOST;
    bool to_host = direction == TO_HOST || direction == HOST_TO_HOST;
    if (direction == BY_ADDRESS) from_host = !is_device(from), to_host = !is_device(to);
    return copy_on(stream, to, from, size, from_host, to_host);
}

EXPORT int cudaMemcpyAsync(void* to, const void* from, size_t size, int direction, void* stream) {
    return copy(to, from, size, direction, stream);
}

EXPORT int cudaMemcpy(void* to, const void* from, size_t size, int direction) {
    if (forbidden_now()) return fail(CAPTURE_UNSUPPORTED);
    COUNT(synchronisations);
    return copy(to, from, size, direction, NULL);
}

EXPORT int cudaMemcpyPeerAsync(void* to, int there, const void* from, int here, size_t size,
                               void* stream) {
    (void)there, (void)here;
    return copy(to, from, size, IN_DEVICE, stream);
}

static int fill(void* pointer, int value, size_t size, void* stream) {
    int code = work_on(stream, FILL);
    if (!code && size <= 4096) memset(pointer, value, size);
    return code;
}

EXPORT int cudaMemsetAsync(void* pointer, int value, size_t size, void* stream) {
    return fill(pointer, value, size, stream);
}

EXPORT int cudaMemset(void* pointer, int value, size_t size) {
    if (forbidden_now()) return fail(CAPTURE_UNSUPPORTED);
    return fill(pointer, value, size, NULL);
}
