/* What bench/gather.cu and bench/pages.cu share: bulk copies into shared memory, and barriers that they arrive at. */
#ifndef LG_BENCH_BULK_CUH
#define LG_BENCH_BULK_CUH
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#define CK(x) do { cudaError_t e = (x); if (e) { printf("%s: %s\n", #x, cudaGetErrorString(e)); exit(1); } } while (0)
static __device__ __forceinline__ uint32_t sm(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ void bulk(uint32_t to, const void *from, uint32_t n, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(n), "r"(bar) : "memory");
}
static __device__ __forceinline__ void wait(uint32_t bar, uint32_t parity) {
    uint32_t ok;
    do asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(ok) : "r"(bar), "r"(parity) : "memory"); while (!ok);
}
/* n barriers from bar0 on, by one warp for itself. */
static __device__ __forceinline__ void bars_begin(uint32_t bar0, int n) {
    if ((threadIdx.x & 31) == 0)
        for (int i = 0; i < n; i++) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(bar0 + 8 * i));
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("fence.proxy.async;");
    __syncwarp();
}
static __device__ __forceinline__ void expect(uint32_t bar, uint32_t bytes) { asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)); }
#endif
