/* The machine instructions decode attention is made of, one function each. tests/cuda/emu.h has the same functions in plain C++
 * (LG_CUDA_EMU): there the kernels run on the CPU, one fiber per thread, and are tested without a GPU. */
#ifndef LG_CUDA_DECODE_PTX_CUH
#define LG_CUDA_DECODE_PTX_CUH
#ifndef LG_CUDA_EMU /* emu.h then comes by -include: src knows nothing of tests */
#include <cuda_runtime.h>
#include <stdint.h>
#include "ops/cuda/product.cuh"

typedef uint32_t lg_smem; /* address within the block's shared memory */
#define LG_SMEM(name) extern __shared__ __align__(128) uint8_t name[]
/* early: the kernel may start before the one before it in the stream has ended, and says itself (lg_dec_wait) where it needs that. */
#define LG_LAUNCH_EARLY(kernel, grid, block, smem, stream, early, ...) lg_cuda_launch(kernel, dim3(grid), dim3(block), smem, stream, early, __VA_ARGS__)
#define LG_LAUNCH(kernel, grid, block, smem, stream, ...) LG_LAUNCH_EARLY(kernel, grid, block, smem, stream, false, __VA_ARGS__)
#define LG_SPIN() __nanosleep(40)
#define lg_dec_wait lg_pdl_wait
#define lg_dec_go lg_pdl_go

static __device__ __forceinline__ lg_smem lg_smem_of(const void *p) { return (lg_smem)__cvta_generic_to_shared(p); }

/* 16 bytes from global to shared memory, both 16-byte aligned, past L1. */
static __device__ __forceinline__ void lg_cp16(lg_smem dst, const void *src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
static __device__ __forceinline__ void lg_cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most `pending` (0..4) of this thread's latest groups are on their way. */
static __device__ __forceinline__ void lg_cp_wait(int pending) {
    switch (pending) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    }
}

/* n bytes (both on 16) from memory into L2, not waited for. */
static __device__ __forceinline__ void lg_fetch_l2(const void *p, uint32_t n) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(n) : "memory");
#else
    for (uint32_t i = 0; i < n; i += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"((const uint8_t *)p + i) : "memory");
#endif
}

/* Four 8x8 tiles of 16-bit numbers; lane l names row l%8 of tile l/8. _t: each tile transposed. */
static __device__ __forceinline__ void lg_ldm4(uint32_t r[4], lg_smem at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
static __device__ __forceinline__ void lg_ldm4_t(uint32_t r[4], lg_smem at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
/* Transpose of an 8x8 tile held as a fragment. */
static __device__ __forceinline__ uint32_t lg_movm(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
/* c[16 x 8] += a[16 x 16] b[16 x 8] */
static __device__ __forceinline__ void lg_mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void lg_mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* Plain loads from shared memory. */
static __device__ __forceinline__ uint32_t lg_lds32(lg_smem at) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
    return x;
}
static __device__ __forceinline__ uint32_t lg_lds16(lg_smem at) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(at) : "memory");
    return x;
}
static __device__ __forceinline__ uint2 lg_lds64(lg_smem at) {
    uint2 x;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
    return x;
}
static __device__ __forceinline__ void lg_sts32(lg_smem at, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
#endif
#endif
