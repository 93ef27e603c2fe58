/* The machine instructions decode attention is made of, one function each. tests/cuda/emu.h has the same functions in plain C++
 * (LG_CUDA_EMU): there the kernels run on the CPU, one fiber per thread, and are tested without a GPU. */
#ifndef LG_CUDA_DECODE_PTX_CUH
#define LG_CUDA_DECODE_PTX_CUH
/* Ways that a block can go. Check programs define LG_TOOK to count them; elsewhere it is nothing. */
enum { LG_WAY_FEW, LG_WAY_MANY, LG_WAY_SIZED, LG_WAY_COUNTS, LG_WAY_RAW, LG_WAY_FOLLOW, LG_WAY_WHOLE, LG_WAY_ALONE, LG_WAY_HELPERS, LG_WAY_GROUPS, LG_WAY_ROUNDS, LG_WAY_LATE,
       LG_WAY_SAMPLE, LG_WAY_RESAMPLE, LG_WAY_DIGITS, LG_WAYS };
#ifndef LG_TOOK
#define LG_TOOK(way)
#endif
#ifndef LG_CUDA_EMU /* emu.h then comes by -include: src knows nothing of tests */
#include <cuda_runtime.h>
#include <stdint.h>
#include "ops/cuda/boxes.cuh"
#include "ops/cuda/product.cuh"

typedef uint32_t lg_smem; /* address within the block's shared memory */
#define LG_SMEM(name) extern __shared__ __align__(128) uint8_t name[]
/* early: the kernel may start before the one before it in the stream has ended, and says itself (lg_dec_wait) where it needs that. */
#define LG_LAUNCH_EARLY(kernel, grid, block, smem, stream, early, ...) lg_cuda_launch(kernel, dim3(grid), dim3(block), smem, stream, early, __VA_ARGS__)
#define LG_LAUNCH(kernel, grid, block, smem, stream, ...) LG_LAUNCH_EARLY(kernel, grid, block, smem, stream, false, __VA_ARGS__)
#define LG_SPIN() __nanosleep(40)
#define LG_NOINLINE __noinline__
#define lg_dec_wait lg_pdl_wait
#define lg_dec_go lg_pdl_go

static __device__ __forceinline__ lg_smem lg_smem_of(const void *p) { return (lg_smem)__cvta_generic_to_shared(p); }

/* Adds 1 and returns what was there before. With lg_look: who sees the sum sees what the block wrote before its last barrier. */
static __device__ __forceinline__ uint32_t lg_arrive(uint32_t *at) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(at) : "memory");
    return old;
}
static __device__ __forceinline__ uint32_t lg_look(const uint32_t *at) {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
    return x;
}
/* Bulk copies that come after it see what this thread has written or seen. */
static __device__ __forceinline__ void lg_bulk_sees() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
/* The bits of a number that another multiprocessor may be writing. */
static __device__ __forceinline__ uint32_t lg_look_at(const float *at) {
    uint32_t x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
    return x;
}

/* For rows and weights, which are read once: L2 gives up their lines first, and keeps what kernels leave for each other. This is what
 * createpolicy.fractional.L2::evict_first makes for all lines. */
#define LG_EVICT_FIRST 0x12f0000000000000ull

/* 16 bytes from global to shared memory, both 16-byte aligned, past L1. */
static __device__ __forceinline__ void lg_cp16(lg_smem dst, const void *src) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "l"(LG_EVICT_FIRST) : "memory");
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

/* A barrier in shared memory (8 bytes) for bulk copies. A phase ends when one thread has arrived and all bytes it announced are there. */
static __device__ __forceinline__ void lg_bar_init(lg_smem bar) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(bar) : "memory");
#endif
}
/* After this thread's lg_bar_init: copies may use the barriers. */
static __device__ __forceinline__ void lg_bar_ready() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
static __device__ __forceinline__ void lg_bar_arrive(lg_smem bar, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
#endif
}
/* Until the phase of this parity (0, 1, 0, ...) has ended. */
static __device__ __forceinline__ void lg_bar_wait(lg_smem bar, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    uint32_t done = 0;
    while (!done)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
#endif
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
enum { LG_BULK = 1 }; /* bulk copies exist */
#else
enum { LG_BULK = 0 };
#endif
/* n bytes from global to shared memory, all on 16 bytes; their arrival counts at the barrier. One thread does it for all. */
static __device__ __forceinline__ void lg_bulk(lg_smem dst, const void *src, uint32_t n, lg_smem bar) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(dst), "l"(src), "r"(n), "r"(bar), "l"(LG_EVICT_FIRST) : "memory");
#endif
}

/* A box of lg_box_map_of (16 rows, 64 columns from `column` on): 2048 bytes to dst, which is on 128. One thread does it for all. */
typedef CUtensorMap lg_box_map;
static inline bool lg_box_map_of(lg_box_map *map, const uint8_t *data, int32_t head_dim) { return lg_box_layer(map, data, head_dim, 16); }
static __device__ __forceinline__ void lg_box(lg_smem dst, const lg_box_map *map, int32_t column, int32_t row, lg_smem bar) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(dst), "l"(map), "r"(column), "r"(row), "r"(bar), "l"(LG_EVICT_FIRST) : "memory");
#endif
}
/* The map is on its way when lg_box needs it. */
static __device__ __forceinline__ void lg_box_ahead(const lg_box_map *map) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
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
/* d[16 x 8] = a[16 x 32] b[32 x 8] + c, int8 in, int32 out */
static __device__ __forceinline__ void lg_mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], int32_t c) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c));
}
/* (x & mask) | bits in one instruction: the compiler makes two where both are constants. */
static __device__ __forceinline__ uint32_t lg_and_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}
/* 2^x; results below the normal numbers are 0. */
static __device__ __forceinline__ float lg_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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
static __device__ __forceinline__ void lg_sts64(lg_smem at, uint32_t x, uint32_t y) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}
#endif
#endif
