/* A stand-in for CUDA's runtime: memory is the host's, kernels do nothing, and what is asked for is written down.

   With it ONNX Runtime's CUDA provider loads on a machine without a GPU, places the nodes of a graph, and captures and
   replays it. stand_in.py adds the functions that are missing here: they return 0 and do nothing. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver_types.h"

enum { MAJOR = 75, MINOR = 76, MULTIPROCESSORS = 16, SHARED = 8, SHARED_OPTIN = 97, THREADS = 1 };  /* cudaDeviceAttr */
static const size_t MEMORY = (size_t)8 << 30;
static int capturing;

static void note(const char *what, size_t size) {
  static FILE *file;
  const char *path = getenv("STAND_IN_LOG");
  if (!file) file = fopen(path ? path : "/dev/null", "a");
  fprintf(file, "%s%s %zu\n", capturing ? "captured " : "", what, size);
  fflush(file);
}

static const char *direction(int kind) {
  return kind == 1 ? "upload" : kind == 2 ? "download" : "move";
}

/* Memory. */
int cudaMalloc(void **found, size_t size) {
  note("allocate", size);
  *found = aligned_alloc(256, (size + 511) / 256 * 256);
  memset(*found, 0, size);
  return 0;
}
int cudaHostAlloc(void **found, size_t size, unsigned flags) {
  *found = aligned_alloc(256, (size + 511) / 256 * 256);
  return 0;
}
int cudaMallocHost(void **found, size_t size) { return cudaHostAlloc(found, size, 0); }
int cudaFree(void *memory) { free(memory); return 0; }
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  note(direction(kind), size);
  memcpy(to, from, size);
  return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { return cudaMemset(to, value, size); }
int cudaMemGetInfo(size_t *left, size_t *total) { *left = *total = MEMORY; return 0; }

/* The device: one Hopper. */
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case MAJOR: *value = 9; break;
    case MINOR: *value = 0; break;
    case MULTIPROCESSORS: *value = 132; break;
    case SHARED: *value = 49152; break;
    case SHARED_OPTIN: *value = 232448; break;
    case THREADS: *value = 1024; break;
    default: *value = 1;
  }
  return 0;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "stand-in");
  found->major = 9;
  found->multiProcessorCount = 132;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472;
  found->regsPerBlock = 65536;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->totalGlobalMem = MEMORY;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count) { *count = 1; return 0; }
int cudaFuncGetAttributes(void *found) { memset(found, 0, 64); return 0; }
const char *cudaGetErrorName(int error) { return "stand-in"; }
const char *cudaGetErrorString(int error) { return "stand-in"; }

/* Streams, events, kernels and graphs. */
static int handle(void **found) { *found = malloc(8); return 0; }
int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaStreamSynchronize(void *stream) { note("wait", 0); return 0; }
int cudaDeviceSynchronize(void) { note("wait", 0); return 0; }
int cudaEventSynchronize(void *event) { note("wait", 0); return 0; }
void **__cudaRegisterFatBinary(void *binary) { static void *one; return &one; }
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
int __cudaLaunchKernel(void) { note("kernel", 0); return 0; }
int cudaLaunchKernel(void) { note("kernel", 0); return 0; }
int cudaLaunchKernelExC(void) { note("kernel", 0); return 0; }
int cudaLaunchCooperativeKernel(void) { note("kernel", 0); return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
int cudaStreamBeginCapture(void *stream, int mode) { capturing = 1; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; return handle(graph); }
int cudaGraphInstantiate(void **runnable) { note("capture", 0); return handle(runnable); }
int cudaGraphLaunch(void *runnable, void *stream) { note("launch", 0); return 0; }
