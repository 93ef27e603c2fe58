/* A library for CUDA_INJECTION64_PATH: writes the last kernels of a process, one a line, to the file named by LONGAN_TRACE when it ends:
 *   start end (us since the first written) | stream | blocks | bytes of shared memory | name
 * Kernels of graphs are listed one by one; overlapping ones (programmatic launches) keep their overlap. Built and read by bench/cuda-trace.py.
 * CUPTI: https://docs.nvidia.com/cupti/main/main.html, activity API. */
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEEP = 4096, BUFFER = 8 << 20, NAME = 80 };
typedef struct kernel { uint64_t start, end; uint32_t stream; int64_t blocks, shared; char name[NAME]; } kernel;
static kernel ring[KEEP];
static uint64_t seen;

static void CUPTIAPI room(uint8_t **at, size_t *size, size_t *max) {
    *at = aligned_alloc(8, BUFFER);
    *size = *at ? BUFFER : 0;
    *max = 0;
}

static void CUPTIAPI full(CUcontext context, uint32_t stream, uint8_t *at, size_t size, size_t valid) {
    CUpti_Activity *a = NULL;
    (void)context;
    (void)stream;
    (void)size;
    while (cuptiActivityGetNextRecord(at, valid, &a) == CUPTI_SUCCESS) {
        if (a->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
        const CUpti_ActivityKernel10 *k = (const CUpti_ActivityKernel10 *)(const void *)a;
        kernel *to = &ring[seen++ % KEEP];
        *to = (kernel){ k->start, k->end, k->streamId, (int64_t)k->gridX * k->gridY * k->gridZ, (int64_t)k->dynamicSharedMemory + k->staticSharedMemory, "" };
        if (k->name) snprintf(to->name, sizeof to->name, "%s", k->name);
    }
    free(at);
}

static int earlier(const void *a, const void *b) {
    const uint64_t x = ((const kernel *)a)->start, y = ((const kernel *)b)->start;
    return x < y ? -1 : x > y;
}

static void finish(void) {
    const char *path = getenv("LONGAN_TRACE");
    FILE *f = path ? fopen(path, "w") : NULL;
    cuptiActivityFlushAll(1);
    const size_t n = seen < KEEP ? (size_t)seen : KEEP;
    qsort(ring, n, sizeof *ring, earlier);
    for (size_t i = 0; f && i < n; i++)
        fprintf(f, "%.3f %.3f %u %lld %lld %s\n", (double)(ring[i].start - ring[0].start) * 1e-3, (double)(ring[i].end - ring[0].start) * 1e-3, ring[i].stream,
                (long long)ring[i].blocks, (long long)ring[i].shared, ring[i].name);
    if (!f || fclose(f) != 0) fprintf(stderr, "cuda-trace: cannot write %s\n", path ? path : "(LONGAN_TRACE is not set)");
}

int InitializeInjection(void) {
    if (cuptiActivityRegisterCallbacks(room, full) != CUPTI_SUCCESS || cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS)
        fprintf(stderr, "cuda-trace: CUPTI refused\n");
    else
        atexit(finish);
    return 1;
}
