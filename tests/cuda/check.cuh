/* What the check programs of the kernels share: draws that depend on seed and counter alone, and the device's memory. */
#ifndef LG_TEST_CHECK_CUH
#define LG_TEST_CHECK_CUH
#include <stdio.h>
#include <stdlib.h>
#include "ops/cuda/cuda.h"

static uint64_t seed = 1, counter;
static uint64_t rnd(void) { return lg_base_rng(seed, 11, counter++); }
static int64_t below(int64_t n) { return (int64_t)(rnd() % (uint64_t)n); }

#define CUDA(x) do { const cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_)); exit(1); } } while (0)
static void *room(int64_t n) { /* of bytes that are no number, so that what nobody wrote shows */
    void *p = NULL;
    CUDA(cudaMalloc(&p, (size_t)n));
    CUDA(cudaMemset(p, 0xff, (size_t)n));
    return p;
}
static void *up(const void *src, int64_t n) {
    void *p = room(n);
    CUDA(cudaMemcpy(p, src, (size_t)n, cudaMemcpyHostToDevice));
    return p;
}
#endif
