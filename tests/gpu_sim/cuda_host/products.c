// Matrix products of cuBLAS and cuBLASLt: counted, in the stream of their handle.
#include <stdlib.h>

#include "stand_in.h"

struct handle {
    void* stream;
    int math, pointers;
};

EXPORT int cublasCreate_v2(void** handle) {
    *handle = calloc(1, sizeof(struct handle));
    return OK;
}

EXPORT int cublasDestroy_v2(void* handle) {
    free(handle);
    return OK;
}

EXPORT int cublasSetStream_v2(struct handle* h, void* stream) {
    h->stream = stream;
    return OK;
}

EXPORT int cublasGetStream_v2(struct handle* h, void** stream) {
    *stream = h->stream;
    return OK;
}

EXPORT int cublasSetMathMode(struct handle* h, int mode) {
    h->math = mode;
    return OK;
}

EXPORT int cublasGetMathMode(struct handle* h, int* mode) {
    *mode = h->math;
    return OK;
}

EXPORT int cublasSetPointerMode_v2(struct handle* h, int mode) {
    h->pointers = mode;
    return OK;
}

EXPORT int cublasGetPointerMode_v2(struct handle* h, int* mode) {
    *mode = h->pointers;
    return OK;
}

EXPORT int cublasGetVersion_v2(void* handle, int* version) {
    (void)handle;
    *version = 130000;
    return OK;
}

// Settings that change nothing here; arguments beyond the first are not looked at.
#define ACCEPTED(name) \
    EXPORT int name(void) { return OK; }
ACCEPTED(cublasSetWorkspace_v2)
ACCEPTED(cublasSetAtomicsMode)
ACCEPTED(cublasSetEmulationStrategy)
ACCEPTED(cublasLtMatmulDescInit_internal)
ACCEPTED(cublasLtMatmulDescSetAttribute)
ACCEPTED(cublasLtMatrixLayoutSetAttribute)
ACCEPTED(cublasLtMatmulPreferenceSetAttribute)

static int product(const char* name, void* stream) {
    count_name(name);
    return work_on(stream, PRODUCT);
}

#define PRODUCT_OF(name) \
    EXPORT int name(struct handle* h) { return product(#name, h->stream); }
PRODUCT_OF(cublasGemmEx)
PRODUCT_OF(cublasGemmEx_64)
PRODUCT_OF(cublasSgemm_v2)
PRODUCT_OF(cublasSgemmEx)
PRODUCT_OF(cublasGemmStridedBatchedEx)
PRODUCT_OF(cublasGemmStridedBatchedEx_64)
PRODUCT_OF(cublasSgemmStridedBatched)
PRODUCT_OF(cublasGemmBatchedEx)
PRODUCT_OF(cublasSgemv_v2)
PRODUCT_OF(cublasSdot_v2)
PRODUCT_OF(cublasDotEx)

EXPORT int cublasLtCreate(void** handle) { return cublasCreate_v2(handle); }

EXPORT int cublasLtDestroy(void* handle) { return cublasDestroy_v2(handle); }

// Descriptors are opaque, and no larger than this.
static int make_descriptor(void** made) {
    *made = calloc(1, 512);
    return OK;
}

static int free_descriptor(void* made) {
    free(made);
    return OK;
}

EXPORT int cublasLtMatmulDescCreate(void** made) { return make_descriptor(made); }
EXPORT int cublasLtMatrixLayoutCreate(void** made) { return make_descriptor(made); }
EXPORT int cublasLtMatmulPreferenceCreate(void** made) { return make_descriptor(made); }
EXPORT int cublasLtMatmulDescDestroy(void* made) { return free_descriptor(made); }
EXPORT int cublasLtMatrixLayoutDestroy(void* made) { return free_descriptor(made); }
EXPORT int cublasLtMatmulPreferenceDestroy(void* made) { return free_descriptor(made); }

EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, void* how, void* a, void* b, void* c,
                                          void* d, void* preference, int wanted, void* found,
                                          int* count) {
    (void)handle, (void)how, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)wanted;
    (void)found;
    *count = 1;
    return OK;
}

EXPORT int cublasLtMatmul(void* handle, void* how, void* alpha, void* a, void* layout_a, void* b,
                          void* layout_b, void* beta, void* c, void* layout_c, void* d,
                          void* layout_d, void* algorithm, void* workspace, size_t size,
                          void* stream) {
    (void)handle, (void)how, (void)alpha, (void)a, (void)layout_a, (void)b, (void)layout_b;
    (void)beta, (void)c, (void)layout_c, (void)d, (void)layout_d, (void)algorithm;
    (void)workspace, (void)size;
    return product("cublasLtMatmul", stream);
}
