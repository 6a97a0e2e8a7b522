/* A driver for tests that want one which does not work, or one that runs no kernel: compiled as libcuda.so.1, it has as many
   functions as HAS says, and fails where it is told to by a code of cuda.h. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#ifndef HAS
#define HAS 2 /* 0: a library of something else, 1: what finds cards, 2: what uses them, too */
#endif
#ifndef INIT
#define INIT 0
#endif
#ifndef VERSION
#define VERSION 12040
#endif
#ifndef CARDS
#define CARDS 1
#endif
#ifndef MAJOR
#define MAJOR 8
#endif
#ifndef RETAIN
#define RETAIN 0
#endif
#ifndef STREAM
#define STREAM 0
#endif
#ifndef ALLOC
#define ALLOC 0
#endif
#ifndef PIN
#define PIN 0
#endif
#ifndef BESIDE
#define BESIDE 0 /* of memory that is asked for right after an event */
#endif
#ifndef LOAD
#define LOAD 0
#endif

/* With TRACE: what copies wait for, line by line, in the file "trace" of the working directory. */
#ifdef TRACE
#include <stdio.h>
static void trace(const char *what, const void *a, const void *b, const void *c) {
    FILE *file = fopen("trace", "a");
    if (!file) abort();
    fprintf(file, "%s", what);
    const void *all[] = {a, b, c};
    for (int i = 0; i < 3; i++) all[i] ? fprintf(file, " %p", all[i]) : fprintf(file, " host");
    fprintf(file, "\n");
    fclose(file);
}
#else
#define trace(what, a, b, c) ((void)(a), (void)(b), (void)(c))
#endif

#if HAS == 0
int something_else(void) { return 0; }
#else
int cuInit(unsigned flags) { (void)flags; return INIT; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *n) { *n = CARDS; return 0; }
int cuDeviceGet(int *device, int i) { *device = i; return 0; }
int cuDeviceGetName(char *name, int n, int device) { (void)device; strncpy(name, "Stub Card", n); return 0; }
#endif

#if HAS == 2
int cuGetErrorName(int code, const char **name) { *name = "CUDA_ERROR_OF_STUB"; return code == 803 ? 0 : 1; }
/* The first two of compute capability are 75 and 76; 16 is the number of multiprocessors. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? MAJOR : attribute == 76 ? 0 : 16;
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = (size_t)8 << 30; return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { *total = (size_t)8 << 30; *free = *total / 2; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = malloc(1); return RETAIN; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return 0; }
int cuCtxSetCurrent(void *context) { (void)context; return 0; }
int cuStreamCreate(void **stream, unsigned flags) { (void)flags; *stream = STREAM ? NULL : malloc(1); return STREAM; }
int cuStreamSynchronize(void *stream) { (void)stream; return 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    (void)flags;
    trace("wait", stream, event, NULL);
    return 0;
}
int cuStreamQuery(void *stream) { (void)stream; return 0; }
int cuStreamDestroy_v2(void *stream) { free(stream); return 0; }
/* The options are the log and its size, in this order. */
int cuModuleLoadDataEx(void **module, const void *text, unsigned n, int *options, void **values) {
    (void)text;
    (void)options;
    *module = NULL;
    if (LOAD && n == 2) strncpy(values[0], "stub: this PTX\nis too new", (size_t)values[1]);
    return LOAD;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module;
    (void)name;
    *function = NULL;
    return 500;
}
int cuModuleUnload(void *module) { (void)module; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { (void)function; (void)attribute; (void)value; return 0; }
static int after_event = 0;
int cuMemAlloc_v2(unsigned long long *address, size_t bytes) {
    int refused = after_event ? BESIDE : 0;
    after_event = 0;
    if (refused) return refused;
    *address = ALLOC ? 0 : (unsigned long long)(size_t)malloc(bytes);
    return ALLOC;
}
int cuMemFree_v2(unsigned long long address) {
    trace("free", NULL, (void *)(size_t)address, NULL);
    free((void *)(size_t)address);
    return 0;
}
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *stream) {
    trace("send", stream, from, (void *)(size_t)to);
    memcpy((void *)(size_t)to, from, bytes);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, void *stream) {
    (void)stream;
    memcpy(to, (void *)(size_t)from, bytes);
    return 0;
}
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void *stream) {
    trace("place", stream, (void *)(size_t)from, (void *)(size_t)to);
    memcpy((void *)(size_t)to, (void *)(size_t)from, bytes);
    return 0;
}
int cuMemHostAlloc(void **start, size_t bytes, unsigned flags) { (void)flags; *start = PIN ? NULL : malloc(bytes); return PIN; }
int cuMemFreeHost(void *start) { trace("free", NULL, start, NULL); free(start); return 0; }
int cuEventCreate(void **event, unsigned flags) { (void)flags; after_event = 1; *event = malloc(1); return 0; }
int cuEventRecord(void *event, void *stream) { trace("record", stream, event, NULL); return 0; }
int cuEventSynchronize(void *event) { trace("wait", NULL, event, NULL); return 0; }
int cuEventDestroy_v2(void *event) { free(event); return 0; }
int cuMemsetD8Async(unsigned long long to, unsigned char value, size_t bytes, void *stream) {
    (void)stream;
    memset((void *)(size_t)to, value, bytes);
    return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    (void)function; (void)gx; (void)gy; (void)gz; (void)bx; (void)by; (void)bz;
    (void)shared; (void)stream; (void)parameters; (void)extra;
    return 700;
}
#endif
