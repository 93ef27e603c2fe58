/* Counts on the device which ways blocks of decode attention and selection go (LG_WAY_* in decode_ptx.cuh). Comes by -include with
 * TOOK=name: the function of that name adds what its file has counted so far. */
#include <cuda_runtime.h>
static __device__ unsigned took_counts[32];
#define LG_TOOK(way) do { if (threadIdx.x == 0) atomicAdd(&took_counts[way], 1u); } while (0)
#include "ops/cuda/decode_ptx.cuh"
void TOOK(long to[LG_WAYS]);
void TOOK(long to[LG_WAYS]) {
    unsigned n[LG_WAYS];
    static_assert(sizeof n <= sizeof took_counts, "a count for each way");
    if (cudaMemcpyFromSymbol(n, took_counts, sizeof n) != cudaSuccess) return;
    for (int i = 0; i < LG_WAYS; i++) to[i] += n[i];
}
