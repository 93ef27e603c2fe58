/* CUDA kernels on the CPU: one fiber per thread, all blocks of a grid alive at once, warp collectives and matrix products as the
 * hardware defines them. A kernel file built with -DLG_CUDA_EMU and this header runs its kernels unchanged, so their indexing,
 * barriers and arithmetic are tested on machines without a GPU, under ASan where wanted.
 *
 * Stricter than the hardware on purpose: an asynchronous copy poisons its destination when it is issued and moves the bytes only
 * when it is waited for; shared memory starts as NaNs; alignment is checked; warps run in a shuffled order, some blocks
 * slower than others. */
#ifndef LG_TEST_EMU_H
#define LG_TEST_EMU_H
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define LG_NOINLINE inline
#define __launch_bounds__(...)
#define __grid_constant__

typedef uintptr_t lg_smem;
typedef struct emu_where { uint3 tid, bid; dim3 bdim, gdim; } emu_where;
extern emu_where emu_here; /* of the running fiber */
#define threadIdx emu_here.tid
#define blockIdx emu_here.bid
#define blockDim emu_here.bdim
#define gridDim emu_here.gdim

uint8_t *emu_shared(void);
void emu_run(dim3 grid, dim3 block, size_t smem, void (*body)(void *), void *arg);
void emu_block_barrier(void);
void emu_warp_barrier(void);
void emu_yield(void);
int emu_lane(void);
/* Hands in n <= 64 bytes, waits for the warp; then other lanes' bytes can be read until emu_warp_barrier. */
void emu_give(const void *data, size_t n);
const void *emu_of(int lane);
void emu_cp16(lg_smem dst, const void *src);
void emu_cp_commit(void);
void emu_cp_wait(int pending);
/* Barriers and bulk copies: the bytes move when someone waits for them. */
void emu_bar_init(lg_smem bar);
void emu_bar_arrive(lg_smem bar, uint32_t bytes);
void emu_bar_wait(lg_smem bar, uint32_t parity);
void emu_bulk(lg_smem dst, const void *src, uint32_t n, lg_smem bar);
void emu_box(lg_smem dst, const uint8_t *src, int64_t row_bytes, lg_smem bar); /* 16 rows of 128 bytes, swizzled */
extern long emu_took[32]; /* ways that blocks went (decode_ptx.cuh) */
#define LG_TOOK(way) (emu_took[way] += threadIdx.x == 0)
#define EMU_CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x); abort(); } } while (0)

#define LG_SMEM(name) uint8_t *name = emu_shared()
template <class F> static inline void emu_call(void *f) { (*(F *)f)(); }
template <class F> static inline void emu_start(dim3 g, dim3 b, size_t smem, F f) { emu_run(g, b, smem, emu_call<F>, &f); }
#define LG_LAUNCH(kernel, grid, block, smem, stream, ...) ((void)(stream), emu_start(dim3(grid), dim3(block), smem, [&] { kernel(__VA_ARGS__); }))
#define LG_LAUNCH_EARLY(kernel, grid, block, smem, stream, early, ...) ((void)(early), LG_LAUNCH(kernel, grid, block, smem, stream, __VA_ARGS__))
#define LG_SPIN() emu_yield()
static inline uint32_t lg_arrive(uint32_t *at) { return (*at)++; }
static inline uint32_t lg_look(const uint32_t *at) { return *at; }
static inline void lg_bulk_sees() {}
static inline uint32_t lg_look_at(const float *at) { uint32_t x; memcpy(&x, at, 4); return x; }
static inline void lg_dec_wait() {}
static inline void lg_dec_go() {}

static inline void __syncthreads() { emu_block_barrier(); }
static inline void __syncwarp(unsigned m = 0xffffffffu) { EMU_CHECK(m == 0xffffffffu); emu_warp_barrier(); }
static inline void __threadfence() {}
template <class T> static inline T emu_fetch(T x, int lane) {
    emu_give(&x, sizeof x);
    T y;
    memcpy(&y, emu_of(lane & 31), sizeof y);
    emu_warp_barrier();
    return y;
}
template <class T> static inline T __shfl_sync(unsigned, T x, int lane) { return emu_fetch(x, lane); }
template <class T> static inline T __shfl_xor_sync(unsigned, T x, int d) { return emu_fetch(x, emu_lane() ^ d); }
template <class T> static inline T __shfl_up_sync(unsigned, T x, int d) { return emu_fetch(x, emu_lane() >= d ? emu_lane() - d : emu_lane()); }
template <class T> static inline T __shfl_down_sync(unsigned, T x, int d) { return emu_fetch(x, emu_lane() + d < 32 ? emu_lane() + d : emu_lane()); }
static inline unsigned __ballot_sync(unsigned, int p) {
    unsigned r = 0;
    emu_give(&p, sizeof p);
    for (int i = 0; i < 32; i++) r |= (unsigned)(*(const int *)emu_of(i) != 0) << i;
    emu_warp_barrier();
    return r;
}
static inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
static inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == 0xffffffffu; }
static inline unsigned __match_any_sync(unsigned, unsigned x) {
    unsigned r = 0;
    emu_give(&x, sizeof x);
    for (int i = 0; i < 32; i++) r |= (unsigned)(*(const unsigned *)emu_of(i) == x) << i;
    emu_warp_barrier();
    return r;
}
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
template <class T> static inline T __ldcg(const T *p) { return *p; }
template <class T> static inline T atomicAdd(T *p, T x) { T o = *p; *p = o + x; return o; }
template <class T> static inline T atomicMax(T *p, T x) { T o = *p; if (x > o) *p = x; return o; }
template <class T> static inline T atomicOr(T *p, T x) { T o = *p; *p = o | x; return o; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }
static inline unsigned atomicInc(unsigned *p, unsigned top) { unsigned o = *p; *p = o >= top ? 0 : o + 1; return o; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
    const uint64_t v = (uint64_t)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(v >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
    return r;
}

static inline lg_smem lg_smem_of(const void *p) { return (lg_smem)p; }
static inline void lg_cp16(lg_smem dst, const void *src) { emu_cp16(dst, src); }
static inline void lg_cp_commit() { emu_cp_commit(); }
static inline void lg_cp_wait(int pending) { EMU_CHECK(pending >= 0 && pending <= 4); emu_cp_wait(pending); }
enum { LG_BULK = 1 };
static inline void lg_bar_init(lg_smem bar) { emu_bar_init(bar); }
static inline void lg_bar_ready() {}
static inline void lg_bar_arrive(lg_smem bar, uint32_t bytes) { emu_bar_arrive(bar, bytes); }
static inline void lg_bar_wait(lg_smem bar, uint32_t parity) { emu_bar_wait(bar, parity); }
static inline void lg_bulk(lg_smem dst, const void *src, uint32_t n, lg_smem bar) { emu_bulk(dst, src, n, bar); }
typedef struct lg_box_map { const uint8_t *data; int32_t head_dim; } lg_box_map;
static inline bool lg_box_map_of(lg_box_map *map, const uint8_t *data, int32_t head_dim) { return *map = { data, head_dim }, true; }
static inline void lg_box(lg_smem dst, const lg_box_map *map, int32_t column, int32_t row, lg_smem bar) {
    EMU_CHECK(column % 64 == 0 && column + 64 <= map->head_dim);
    emu_box(dst, map->data + ((int64_t)row * map->head_dim + column) * 2, map->head_dim * 2, bar);
}
static inline void lg_box_ahead(const lg_box_map *) {}
static inline uint32_t lg_and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
static inline float lg_exp2(float x) { return exp2f(x); }
static inline uint32_t lg_lds32(lg_smem at) { EMU_CHECK(at % 4 == 0); return *(const uint32_t *)at; }
static inline uint32_t lg_lds16(lg_smem at) { EMU_CHECK(at % 2 == 0); return *(const uint16_t *)at; }
static inline uint2 lg_lds64(lg_smem at) { EMU_CHECK(at % 8 == 0); return make_uint2(((const uint32_t *)at)[0], ((const uint32_t *)at)[1]); }
static inline void lg_sts32(lg_smem at, uint32_t x) { EMU_CHECK(at % 4 == 0); *(uint32_t *)at = x; }
static inline void lg_sts64(lg_smem at, uint32_t x, uint32_t y) {
    EMU_CHECK(at % 8 == 0);
    ((uint32_t *)at)[0] = x;
    ((uint32_t *)at)[1] = y;
}
static inline void emu_ldm(uint32_t r[4], lg_smem at, bool turn) {
    EMU_CHECK(at % 16 == 0);
    const int g = emu_lane() >> 2, t = emu_lane() & 3;
    emu_give(&at, sizeof at);
    for (int i = 0; i < 4; i++) {
        if (turn) {
            const uint16_t *a = (const uint16_t *)*(const lg_smem *)emu_of(8 * i + 2 * t), *b = (const uint16_t *)*(const lg_smem *)emu_of(8 * i + 2 * t + 1);
            r[i] = a[g] | (uint32_t)b[g] << 16;
        } else {
            r[i] = ((const uint32_t *)*(const lg_smem *)emu_of(8 * i + g))[t];
        }
    }
    emu_warp_barrier();
}
static inline void lg_ldm4(uint32_t r[4], lg_smem at) { emu_ldm(r, at, false); }
static inline void lg_ldm4_t(uint32_t r[4], lg_smem at) { emu_ldm(r, at, true); }
static inline uint32_t lg_movm(uint32_t x) {
    const int g = emu_lane() >> 2, t = emu_lane() & 3;
    emu_give(&x, sizeof x);
    const uint32_t a = *(const uint32_t *)emu_of(8 * t + g / 2), b = *(const uint32_t *)emu_of(8 * t + 4 + g / 2);
    emu_warp_barrier();
    return (a >> 16 * (g & 1) & 0xffffu) | (b >> 16 * (g & 1) & 0xffffu) << 16;
}
template <bool F16> static inline float emu_16(uint32_t w, int half) {
    const uint16_t x = (uint16_t)(w >> 16 * half);
    if (F16) return __half2float(__ushort_as_half(x));
    return __uint_as_float((uint32_t)x << 16);
}
template <bool F16> static inline void emu_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    const int g = emu_lane() >> 2, t = emu_lane() & 3;
    uint32_t mine[6] = { a[0], a[1], a[2], a[3], b[0], b[1] };
    emu_give(mine, sizeof mine);
    for (int i = 0; i < 4; i++) {
        double s = c[i];
        for (int k = 0; k < 16; k++) {
            const uint32_t *x = (const uint32_t *)emu_of(4 * g + k % 8 / 2), *y = (const uint32_t *)emu_of(4 * (2 * t + (i & 1)) + k % 8 / 2);
            s += (double)emu_16<F16>(x[k / 8 * 2 + (i >> 1)], k & 1) * (double)emu_16<F16>(y[4 + k / 8], k & 1);
        }
        c[i] = (float)s;
    }
    emu_warp_barrier();
}
static inline void lg_mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) { emu_mma<false>(c, a, b); }
static inline void lg_mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) { emu_mma<true>(c, a, b); }
static inline void lg_mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], int32_t c) {
    const int g = emu_lane() >> 2, t = emu_lane() & 3;
    uint32_t mine[6] = { a[0], a[1], a[2], a[3], b[0], b[1] };
    emu_give(mine, sizeof mine);
    for (int i = 0; i < 4; i++) {
        d[i] = c;
        for (int k = 0; k < 32; k++) {
            const uint32_t *x = (const uint32_t *)emu_of(4 * g + k % 16 / 4), *y = (const uint32_t *)emu_of(4 * (2 * t + (i & 1)) + k % 16 / 4);
            d[i] += (int32_t)(int8_t)(x[k / 16 * 2 + (i >> 1)] >> 8 * (k & 3)) * (int32_t)(int8_t)(y[4 + k / 16] >> 8 * (k & 3));
        }
    }
    emu_warp_barrier();
}
#endif
