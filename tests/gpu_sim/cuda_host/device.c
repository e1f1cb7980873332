// Devices, their properties, and the kernels that torch brings: their launches do nothing.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "card.h"
#include "stand_in.h"

static __thread int current;

static int num_devices(void) {
    const char* number = getenv("CUDA_HOST_DEVICES");
    return number ? atoi(number) : 1;
}

EXPORT int cudaGetDeviceCount(int* count) {
    *count = num_devices();
    return OK;
}

EXPORT int cudaGetDevice(int* device) {
    *device = current;
    return OK;
}

EXPORT int cudaSetDevice(int device) {
    if (device < 0 || device >= num_devices()) return fail(101);
    current = device;
    return OK;
}

// The device of this thread, for the driver's calls and for tests.
EXPORT int cuda_host_device(void) { return current; }

EXPORT int cudaDriverGetVersion(int* version) {
    *version = CARD_DRIVER;
    return OK;
}

EXPORT int cudaRuntimeGetVersion(int* version) {
    *version = CARD_DRIVER;
    return OK;
}

// cudaDeviceProp as CUDA 13 lays it out; what torch does not read is left out of the names.
struct properties {
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t memory, shared_of_block;
    int registers_of_block, warp;
    size_t pitch;
    int threads_of_block, threads_by_side[3], blocks_by_side[3];
    size_t constant_memory;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
    int multiprocessors, integrated, maps_host_memory, of_textures[39];
    size_t surface_alignment;
    int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc, copy_engines;
    int unified_addressing, bus_bits, l2_bytes, persisting_l2_bytes, threads_of_multiprocessor;
    int priorities, caches_globals, caches_locals;
    size_t shared_of_multiprocessor;
    int registers_of_multiprocessor, more[9];
    size_t shared_of_block_at_most;
    int tables, direct, blocks_of_multiprocessor, window;
    size_t reserved_shared;
    char rest[304];
};

EXPORT int cudaGetDeviceProperties(struct properties* p, int device) {
    if (device >= num_devices()) return fail(101);
    memset(p, 0, sizeof *p);
    strcpy(p->name, CARD_NAME);
    p->uuid[0] = (char)(device + 1);
    p->memory = CARD_MEMORY_BYTES;
    p->shared_of_block = CARD_SHARED_OF_BLOCK;
    p->shared_of_block_at_most = CARD_SHARED_OF_BLOCK_AT_MOST;
    p->shared_of_multiprocessor = CARD_SHARED_OF_MULTIPROCESSOR;
    p->registers_of_block = p->registers_of_multiprocessor = CARD_REGISTERS;
    p->warp = CARD_WARP;
    p->threads_of_block = p->threads_by_side[0] = p->threads_by_side[1] = CARD_THREADS_OF_BLOCK;
    p->threads_by_side[2] = 64;
    p->blocks_by_side[0] = 2147483647;
    p->blocks_by_side[1] = p->blocks_by_side[2] = 65535;
    p->threads_of_multiprocessor = CARD_THREADS_OF_MULTIPROCESSOR;
    p->blocks_of_multiprocessor = CARD_BLOCKS_OF_MULTIPROCESSOR;
    p->major = CARD_MAJOR;
    p->minor = CARD_MINOR;
    p->multiprocessors = CARD_MULTIPROCESSORS;
    p->bus_bits = CARD_BUS_BITS;
    p->l2_bytes = CARD_L2_BYTES;
    p->concurrent_kernels = p->ecc = p->unified_addressing = p->maps_host_memory = 1;
    p->pci_bus = device + 1;
    return OK;
}

// The driver numbers attributes as the runtime does.
int attribute(int number) {
    switch (number) {
        case 1:
        case 2:
        case 3:
            return CARD_THREADS_OF_BLOCK;
        case 4:
            return 64;
        case 5:
            return 2147483647;
        case 6:
        case 7:
            return 65535;
        case 8:
            return CARD_SHARED_OF_BLOCK;
        case 10:
            return CARD_WARP;
        case 12:
        case 82:
            return CARD_REGISTERS;
        case 13:
            return CARD_CLOCK_KHZ;
        case 16:
            return CARD_MULTIPROCESSORS;
        case 36:
            return CARD_MEMORY_CLOCK_KHZ;
        case 37:
            return CARD_BUS_BITS;
        case 38:
            return CARD_L2_BYTES;
        case 39:
            return CARD_THREADS_OF_MULTIPROCESSOR;
        case 75:
            return CARD_MAJOR;
        case 76:
            return CARD_MINOR;
        case 81:
            return CARD_SHARED_OF_MULTIPROCESSOR;
        case 97:
            return CARD_SHARED_OF_BLOCK_AT_MOST;
        case 106:
            return CARD_BLOCKS_OF_MULTIPROCESSOR;
        default:
            return 0;
    }
}

EXPORT int cudaDeviceGetAttribute(int* value, int number, int device) {
    (void)device;
    *value = attribute(number);
    return OK;
}

EXPORT int cudaDeviceGetPCIBusId(char* text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", device + 1);
    return OK;
}

EXPORT int cudaDeviceCanAccessPeer(int* can, int device, int other) {
    *can = device != other;
    return OK;
}

EXPORT const char* cudaGetErrorName(int code) {
    static __thread char text[48];
    snprintf(text, sizeof text, "cudaError %d", code);
    return text;
}

EXPORT const char* cudaGetErrorString(int code) {
    switch (code) {
        case OUT_OF_MEMORY:
            return "out of memory";
        case CAPTURE_UNSUPPORTED:
            return "operation not permitted when stream is capturing";
        case CAPTURE_INVALIDATED:
            return "operation failed due to a previous error during capture";
        case CAPTURE_UNJOINED:
            return "capturing stream has unjoined work";
        default:
            return cudaGetErrorName(code);
    }
}

// Torch registers its kernels when it is loaded: here only their names are wanted.
struct registered {
    const void* function;
    const char* name;
};
static struct registered* kernels;
static size_t num_kernels, room;

EXPORT void __cudaRegisterFunction(void** binary, const void* function, char* short_name,
                                   const char* name, int threads, void* a, void* b, void* c,
                                   void* d, int* size) {
    (void)binary, (void)short_name, (void)threads, (void)a, (void)b, (void)c, (void)d, (void)size;
    if (num_kernels == room) kernels = realloc(kernels, (room = 2 * room + 4096) * sizeof *kernels);
    kernels[num_kernels++] = (struct registered){function, name};
}

static int by_address(const void* a, const void* b) {
    const char* x = ((const struct registered*)a)->function;
    const char* y = ((const struct registered*)b)->function;
    return (x > y) - (x < y);
}

static const char* name_of(const void* function) {
    static size_t sorted;
    if (!getenv("CUDA_HOST_NAMES")) return NULL;
    if (sorted != num_kernels) {
        qsort(kernels, num_kernels, sizeof *kernels, by_address);
        sorted = num_kernels;
    }
    struct registered wanted = {function, NULL};
    struct registered* k = bsearch(&wanted, kernels, num_kernels, sizeof *kernels, by_address);
    return k ? k->name : "a kernel without a name";
}

static int launch(const void* function, void* stream) {
    count_name(name_of(function));
    return work_on(stream, TORCH_KERNEL);
}

struct dim3 {
    unsigned x, y, z;
};

EXPORT int cudaLaunchKernel(const void* function, struct dim3 grid, struct dim3 block, void** args,
                            size_t shared, void* stream) {
    (void)grid, (void)block, (void)args, (void)shared;
    return launch(function, stream);
}

EXPORT int cudaLaunchCooperativeKernel(const void* function, struct dim3 grid, struct dim3 block,
                                       void** args, size_t shared, void* stream) {
    return cudaLaunchKernel(function, grid, block, args, shared, stream);
}

struct launch {
    struct dim3 grid, block;
    size_t shared;
    void* stream;
};

EXPORT int cudaLaunchKernelExC(const struct launch* how, const void* function, void** args) {
    (void)args;
    return launch(function, how->stream);
}

// What the compiler makes of f<<<grid, block, shared, stream>>>(…).
static __thread struct launch pushed;

EXPORT int __cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared,
                                       void* stream) {
    pushed = (struct launch){grid, block, shared, stream};
    return OK;
}

EXPORT int __cudaPopCallConfiguration(struct dim3* grid, struct dim3* block, size_t* shared,
                                      void** stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *stream = pushed.stream;
    return OK;
}

EXPORT int __cudaGetKernel(const void** kernel, const void* function) {
    *kernel = function;
    return OK;
}

EXPORT int __cudaLaunchKernel(const void* kernel, struct dim3 grid, struct dim3 block, void** args,
                              size_t shared, void* stream) {
    return cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}

struct function_attributes {
    size_t shared, constants, local;
    int threads, registers, ptx, binary, more[26];
};

EXPORT int cudaFuncGetAttributes(struct function_attributes* found, const void* function) {
    (void)function;
    memset(found, 0, sizeof *found);
    found->threads = CARD_THREADS_OF_BLOCK;
    found->registers = 32;
    found->ptx = found->binary = 10 * CARD_MAJOR + CARD_MINOR;
    return OK;
}

EXPORT int cudaFuncSetAttribute(const void* function, int number, int value) {
    (void)function, (void)number, (void)value;
    return OK;
}

EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                                  int threads, size_t shared,
                                                                  unsigned flags) {
    (void)function, (void)shared, (void)flags;
    *blocks = CARD_THREADS_OF_MULTIPROCESSOR / (threads > 0 ? threads : 1);
    return OK;
}

EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                         int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                  0);
}

static int not_there(void) { return NOT_SUPPORTED; }

EXPORT int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                            unsigned long long flags, int* found) {
    (void)version, (void)flags;
    *function = dlsym(RTLD_DEFAULT, name);
    if (found) *found = *function ? 0 : 1;
    if (!*function) *function = (void*)not_there;
    return OK;
}

EXPORT int cudaDeviceEnablePeerAccess(int device, unsigned flags) {
    (void)device, (void)flags;
    return OK;
}
