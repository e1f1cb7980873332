// Streams, events and captures: work is counted, and what is captured is kept as a graph.
//
// A capture follows CUDA's rules so far as torch can break them: it spreads over streams by events,
// all of which must have come back when it ends, and while it runs nothing may wait for the device.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "stand_in.h"

struct stream {
    struct capture* capture;
    int priority;
    long asked;   // pieces of work so far
    long joined;  // how many of them the capture's first stream waits for
    struct stream* next;
};

struct event {
    struct stream* stream;
    struct capture* capture;
    long asked;
    struct timespec at;
};

struct capture {
    unsigned long long id;
    struct stream* first;
    struct graph* graph;
    bool invalid;
};

enum { GLOBAL, THREAD_LOCAL, RELAXED };
enum { NOT_CAPTURING, CAPTURING, INVALIDATED };

static struct stream legacy, *streams;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int running;  // captures
static int mode_of_capture;
static unsigned long long last_id;
static __thread int mode_of_thread = GLOBAL;
static __thread int last_error;

int fail(int code) {
    if (code) last_error = code;
    return code;
}

EXPORT int cudaGetLastError(void) {
    int code = last_error;
    last_error = OK;
    return code;
}

EXPORT int cudaPeekAtLastError(void) { return last_error; }

// 0, 1 and 2 are the default streams.
static struct stream* stream_of(void* handle) {
    return (size_t)handle < 3 ? &legacy : (struct stream*)handle;
}

static void invalidate_all(void) {
    for (struct stream* s = streams; s; s = s->next)
        if (s->capture) s->capture->invalid = true;
}

bool forbidden_now(void) {
    if (!running || mode_of_capture == RELAXED || mode_of_thread == RELAXED) return false;
    COUNT(illegal_in_capture);
    invalidate_all();
    return true;
}

int work_on(void* handle, enum kind kind) {
    struct stream* s = stream_of(handle);
    struct capture* c = s->capture;
    if (!c) {
        if (running) COUNT(beside_capture);
        COUNT(launched[kind]);
        return OK;
    }
    if (c->invalid) return fail(CAPTURE_INVALIDATED);
    s->asked++;
    __atomic_fetch_add(&c->graph->nodes[kind], 1, __ATOMIC_RELAXED);
    COUNT(captured[kind]);
    return OK;
}

bool is_capturing(void* handle) { return stream_of(handle)->capture; }

// Small values are moved in the device's memory too, so that counters and flags are real there.
enum { SMALL = 4096 };

static void move(void* to, const void* from, size_t size, bool from_host, bool to_host) {
    if (from_host || to_host || size <= SMALL) memmove(to, from, size);
}

int copy_on(void* handle, void* to, const void* from, size_t size, bool from_host, bool to_host) {
    struct stream* s = stream_of(handle);
    const void* host = from_host ? from : to;
    if (s->capture && (from_host || to_host) && !is_pinned(host)) {
        COUNT(illegal_in_capture);  // the graph would keep an address that nobody keeps alive
        s->capture->invalid = true;
        return fail(CAPTURE_UNSUPPORTED);
    }
    if (to_host) COUNT(reads);
    int code = work_on(handle, COPY);
    if (code) return code;
    if (!s->capture) {
        move(to, from, size, from_host, to_host);
        return OK;
    }
    struct graph* g = s->capture->graph;
    pthread_mutex_lock(&lock);
    g->copies = realloc(g->copies, (g->num_copies + 1) * sizeof *g->copies);
    g->copies[g->num_copies++] =
        (struct copy){to, from, from_host || to_host || size <= SMALL ? size : 0};
    pthread_mutex_unlock(&lock);
    return OK;
}

EXPORT int cudaStreamCreateWithPriority(void** handle, unsigned flags, int priority) {
    (void)flags;
    struct stream* s = calloc(1, sizeof *s);
    s->priority = priority;
    pthread_mutex_lock(&lock);
    s->next = streams;
    streams = s;
    pthread_mutex_unlock(&lock);
    *handle = s;
    return OK;
}

EXPORT int cudaStreamCreateWithFlags(void** handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}

EXPORT int cudaStreamCreate(void** handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }

// Streams stay: events may still name them.
EXPORT int cudaStreamDestroy(void* handle) {
    (void)handle;
    return OK;
}

EXPORT int cudaStreamGetPriority(void* handle, int* priority) {
    *priority = stream_of(handle)->priority;
    return OK;
}

EXPORT int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return OK;
}

static int wait_for(bool capturing) {
    COUNT(synchronisations);
    if (capturing) {
        COUNT(illegal_in_capture);
        invalidate_all();
        return fail(CAPTURE_UNSUPPORTED);
    }
    return OK;
}

EXPORT int cudaDeviceSynchronize(void) { return wait_for(running > 0); }

EXPORT int cudaStreamSynchronize(void* handle) { return wait_for(stream_of(handle)->capture); }

EXPORT int cudaStreamQuery(void* handle) {
    if (!stream_of(handle)->capture) return OK;
    COUNT(illegal_in_capture);
    return fail(CAPTURE_UNSUPPORTED);
}

EXPORT int cudaEventCreateWithFlags(void** handle, unsigned flags) {
    (void)flags;
    *handle = calloc(1, sizeof(struct event));
    return OK;
}

EXPORT int cudaEventCreate(void** handle) { return cudaEventCreateWithFlags(handle, 0); }

EXPORT int cudaEventDestroy(void* handle) {
    free(handle);
    return OK;
}

EXPORT int cudaEventRecordWithFlags(void* handle, void* stream, unsigned flags) {
    (void)flags;
    struct event* e = handle;
    e->stream = stream_of(stream);
    e->capture = e->stream->capture;
    e->asked = e->stream->asked;
    clock_gettime(CLOCK_MONOTONIC, &e->at);
    return OK;
}

EXPORT int cudaEventRecord(void* handle, void* stream) {
    return cudaEventRecordWithFlags(handle, stream, 0);
}

EXPORT int cudaStreamWaitEvent(void* stream, void* handle, unsigned flags) {
    (void)flags;
    struct stream* s = stream_of(stream);
    struct event* e = handle;
    if (!e->capture || e->capture != e->stream->capture) return OK;  // before or after a capture
    if (!s->capture) {
        s->capture = e->capture;  // the capture spreads to this stream
        s->asked = s->joined = 0;
    } else if (s != e->stream && e->asked > e->stream->joined) {
        e->stream->joined = e->asked;
    }
    return OK;
}

EXPORT int cudaEventQuery(void* handle) {
    struct event* e = handle;
    if (!e->capture || e->capture != e->stream->capture) return OK;
    COUNT(illegal_in_capture);
    return fail(CAPTURE_UNSUPPORTED);
}

EXPORT int cudaEventSynchronize(void* handle) {
    struct event* e = handle;
    return wait_for(e->capture && e->capture == e->stream->capture);
}

// Milliseconds between the calls that recorded them: nothing else passes here.
EXPORT int cudaEventElapsedTime(float* ms, void* first, void* last) {
    struct timespec a = ((struct event*)first)->at, b = ((struct event*)last)->at;
    *ms = (b.tv_sec - a.tv_sec) * 1e3f + (b.tv_nsec - a.tv_nsec) * 1e-6f;
    return OK;
}

EXPORT int cudaThreadExchangeStreamCaptureMode(int* mode) {
    int before = mode_of_thread;
    mode_of_thread = *mode;
    *mode = before;
    return OK;
}

EXPORT int cudaStreamBeginCapture(void* handle, int mode) {
    struct stream* s = stream_of(handle);
    if (s == &legacy || s->capture) return fail(CAPTURE_UNSUPPORTED);
    struct capture* c = calloc(1, sizeof *c);
    c->graph = calloc(1, sizeof *c->graph);
    c->first = s;
    c->id = ++last_id;
    s->asked = s->joined = 0;
    s->capture = c;
    mode_of_capture = mode;
    running++;
    return OK;
}

EXPORT int cudaStreamEndCapture(void* handle, void** graph) {
    struct capture* c = stream_of(handle)->capture;
    if (!c || c->first != stream_of(handle)) return fail(INVALID_VALUE);
    bool unjoined = false;
    for (struct stream* s = streams; s; s = s->next) {
        if (s->capture != c) continue;
        unjoined |= s != c->first && s->joined < s->asked;
        s->capture = NULL;
    }
    running--;
    *graph = NULL;
    if (c->invalid) return fail(CAPTURE_INVALIDATED);
    if (unjoined) {
        COUNT(illegal_in_capture);
        return fail(CAPTURE_UNJOINED);
    }
    *graph = c->graph;
    return OK;
}

EXPORT int cudaStreamIsCapturing(void* handle, int* status) {
    struct capture* c = stream_of(handle)->capture;
    *status = !c ? NOT_CAPTURING : c->invalid ? INVALIDATED : CAPTURING;
    return OK;
}

EXPORT int cudaStreamGetCaptureInfo(void* handle, int* status, unsigned long long* id, void** graph,
                                    const void*** dependencies, const void** edges,
                                    size_t* num_dependencies) {
    struct capture* c = stream_of(handle)->capture;
    cudaStreamIsCapturing(handle, status);
    if (id) *id = c ? c->id : 0;
    if (graph) *graph = c ? c->graph : NULL;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (num_dependencies) *num_dependencies = 0;
    return OK;
}

EXPORT int cudaStreamUpdateCaptureDependencies(void) { return OK; }

static long nodes_of(const struct graph* g) {
    long all = 0;
    for (int kind = 0; kind < KINDS; kind++) all += g->nodes[kind];
    return all;
}

EXPORT int cudaGraphGetNodes(void* graph, void** nodes, size_t* count) {
    (void)nodes;
    *count = nodes_of(graph);
    return OK;
}

EXPORT int cudaGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    (void)flags;
    *executable = graph;
    return OK;
}

EXPORT int cudaGraphInstantiate(void** executable, void* graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}

EXPORT int cudaGraphLaunch(void* executable, void* stream) {
    struct graph* g = executable;
    if (stream_of(stream)->capture) return fail(CAPTURE_UNSUPPORTED);
    COUNT(graph_launches);
    __atomic_fetch_add(&counts.replayed, nodes_of(g), __ATOMIC_RELAXED);
    for (size_t i = 0; i < g->num_copies; i++)
        memmove(g->copies[i].to, g->copies[i].from, g->copies[i].size);
    return OK;
}

EXPORT int cudaGraphDestroy(void* graph) {
    (void)graph;
    return OK;
}

EXPORT int cudaGraphExecDestroy(void* executable) {
    (void)executable;
    return OK;
}

EXPORT int cudaUserObjectCreate(void** object, void* pointer, void (*destroy)(void*),
                                unsigned count, unsigned flags) {
    (void)pointer, (void)destroy, (void)count, (void)flags;
    *object = calloc(1, 8);
    return OK;
}

EXPORT int cudaUserObjectRelease(void* object, unsigned count) {
    (void)object, (void)count;
    return OK;
}

EXPORT int cudaGraphRetainUserObject(void* graph, void* object, unsigned count, unsigned flags) {
    (void)graph, (void)object, (void)count, (void)flags;
    return OK;
}
