// What the files of the stand-in share: counts, streams, captures and the memory that it lent.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

// Codes of CUDA's runtime, which the driver shares but for those of captures.
enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNJOINED = 904,
};

// What a stream was asked to do. The order is that of struct counts.
enum kind { TORCH_KERNEL, TRITON_KERNEL, PRODUCT, COLLECTIVE, COPY, FILL, KINDS };

// Read by Python as an array of longs; see COUNTED in stand_in.py.
struct counts {
    long launched[KINDS];
    long captured[KINDS];
    long graph_launches;
    long replayed;  // nodes of the graphs that were launched
    long reads;     // copies to the host
    long synchronisations;
    long allocations;  // calls of cudaMalloc that succeeded
    long frees;
    long bytes_in_use;
    long illegal_in_capture;
    long beside_capture;  // work on a stream that no running capture holds
};
extern struct counts counts;

#define COUNT(field) __atomic_fetch_add(&counts.field, 1, __ATOMIC_RELAXED)

struct graph {
    long nodes[KINDS];
    struct copy {
        void* to;
        const void* from;
        size_t size;
    }* copies;
    size_t num_copies;
};

// The name of a kernel is counted with its launches where CUDA_HOST_NAMES is set.
void count_name(const char* name);

// Has a stream take up work: counts it, or adds it to the graph that is captured from the stream.
bool is_capturing(void* stream);
int work_on(void* stream, enum kind kind);

// A copy does as work does; the host's side is really copied, now or when the graph is launched.
int copy_on(void* stream, void* to, const void* from, size_t size, bool from_host, bool to_host);

// Counts a call that no capture allows, and says whether it must fail.
bool forbidden_now(void);

int fail(int code);
bool is_device(const void* pointer);
bool is_pinned(const void* pointer);
