// The driver, which Triton launches its kernels by.
#include <stdlib.h>
#include <string.h>

#include "card.h"
#include "stand_in.h"

int attribute(int number);
int cuda_host_device(void);
int cudaSetDevice(int device);
int cudaPointerGetAttributes(void* found, const void* pointer);

#define ACCEPTED(name) \
    EXPORT int name(void) { return OK; }
ACCEPTED(cuInit)
ACCEPTED(cuFuncSetAttribute)
ACCEPTED(cuFuncSetCacheConfig)
ACCEPTED(cuModuleUnload)
ACCEPTED(cuCtxSetLimit)
ACCEPTED(cuTensorMapEncodeTiled)

EXPORT int cuDriverGetVersion(int* version) {
    *version = CARD_DRIVER;
    return OK;
}

EXPORT int cuGetErrorString(int code, const char** text) {
    (void)code;
    *text = "an error of the stand-in";
    return OK;
}

EXPORT int cuGetErrorName(int code, const char** text) { return cuGetErrorString(code, text); }

// A context is the number of its device, plus one.
EXPORT int cuCtxGetCurrent(void** context) {
    *context = (void*)(size_t)(cuda_host_device() + 1);
    return OK;
}

EXPORT int cuCtxSetCurrent(void* context) {
    return context ? cudaSetDevice((int)(size_t)context - 1) : OK;
}

EXPORT int cuCtxPushCurrent_v2(void* context) { return cuCtxSetCurrent(context); }

EXPORT int cuCtxPopCurrent_v2(void** context) { return cuCtxGetCurrent(context); }

EXPORT int cuCtxGetDevice(int* device) {
    *device = cuda_host_device();
    return OK;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = (void*)(size_t)(device + 1);
    return OK;
}

EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    (void)device;
    *flags = 0;
    *active = 1;
    return OK;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return OK;
}

EXPORT int cuDeviceGetAttribute(int* value, int number, int device) {
    (void)device;
    *value = attribute(number);
    return OK;
}

EXPORT int cuCtxGetLimit(size_t* value, int number) {
    (void)number;
    *value = 0;
    return OK;
}

EXPORT int cuModuleLoadData(void** module, const void* image) {
    (void)image;
    *module = (void*)8;
    return OK;
}

EXPORT int cuModuleLoadDataEx(void** module, const void* image) {
    return cuModuleLoadData(module, image);
}

EXPORT int cuModuleLoad(void** module, const char* path) { return cuModuleLoadData(module, path); }

// A function is its name.
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    (void)module;
    *function = strdup(name);
    return OK;
}

EXPORT int cuFuncGetAttribute(int* value, int number, void* function) {
    (void)function;
    *value = number == 0 ? CARD_THREADS_OF_BLOCK : number == 4 ? 64 : 0;
    return OK;
}

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks) {
    *blocks = 1;
    return OK;
}

EXPORT int cuOccupancyMaxActiveClusters(int* clusters) {
    *clusters = 1;
    return OK;
}

enum { DEVICE_POINTER = 3 };

EXPORT int cuPointerGetAttribute(void* value, int number, unsigned long long pointer) {
    if (!is_device((void*)pointer) && !is_pinned((void*)pointer)) return INVALID_VALUE;
    if (number == DEVICE_POINTER) *(unsigned long long*)value = pointer;
    return OK;
}

static int launch(void* function, void* stream) {
    count_name(function);
    return work_on(stream, TRITON_KERNEL);
}

struct driver_launch {
    unsigned grid[3], block[3], shared;
    void* stream;
};

EXPORT int cuLaunchKernelEx(const struct driver_launch* how, void* function, void** arguments,
                            void** extra) {
    (void)arguments, (void)extra;
    return launch(function, how->stream);
}

EXPORT int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments,
                          void** extra) {
    (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)arguments;
    (void)extra;
    return launch(function, stream);
}
