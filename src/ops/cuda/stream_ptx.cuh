/* The machine instructions that products of few rows are made of, one function each; tests/cuda/emu_stream.h has them in plain C++. */
#ifndef LG_CUDA_STREAM_PTX_CUH
#define LG_CUDA_STREAM_PTX_CUH
#include "ops/cuda/decode_ptx.cuh"
#ifndef LG_CUDA_EMU
/* 16 bytes from global to shared memory, past L1; size 0: zeros. */
static __device__ __forceinline__ void lg_copy16(lg_smem to, const uint8_t *from, uint32_t size) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" : : "r"(to), "l"(from), "r"(size), "l"(LG_EVICT_FIRST) : "memory");
}
/* The same for what others read too. */
static __device__ __forceinline__ void lg_copy16_shared(lg_smem to, const void *from, uint32_t size) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(size) : "memory");
}
template <int N> static __device__ __forceinline__ void lg_copy_wait(void) { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }
static __device__ __forceinline__ void lg_prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }
/* d = a b + c, [16 x 8] = [16 x 16] [16 x 8] */
template <bool BF16>
static __device__ __forceinline__ void lg_mma(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    if (BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}
/* d += a b, [16 x 8] = [16 x 32] [32 x 8]: bytes without sign times bytes with one */
static __device__ __forceinline__ void lg_mma_u8(int32_t *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/* 1 / x, to the last two bits. */
static __device__ __forceinline__ float lg_reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/* They are computed here, and not later where they are used first. */
static __device__ __forceinline__ void lg_pin_one(uint32_t &x) { asm volatile("" : "+r"(x)); }
static __device__ __forceinline__ void lg_pin_one(int32_t &x) { asm volatile("" : "+r"(x)); }
template <typename P> static __device__ __forceinline__ void lg_pin_one(P *&x) { asm volatile("" : "+l"(x)); }
template <typename... X> static __device__ __forceinline__ void lg_pin(X &...x) { (lg_pin_one(x), ...); }
/* The larger one; no number if one is none. */
static __device__ __forceinline__ float lg_max_nan(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
#endif
#endif
