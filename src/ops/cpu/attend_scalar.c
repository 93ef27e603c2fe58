/* Attention kernels for any machine: vectors of four floats that the compiler maps to what there is. */
#include "ops/cpu/attend_kernels.h"

enum { VW = 4, NV = 2, MR = 4, MC = 2 };
#define GH 2
#define LG_PREFETCH 3
typedef float vf __attribute__((vector_size(16)));
typedef float vfu __attribute__((vector_size(16), aligned(4)));
typedef int32_t vi __attribute__((vector_size(16)));

static inline float s_f16(uint16_t x) { return lg_base_f16_to_f32(x); }
static inline uint16_t half_at(const uint8_t *p, int i) { return (uint16_t)(p[2 * i] | p[2 * i + 1] << 8); }
static inline vf v_f16(const uint8_t *p) {
    return (vf){ s_f16(half_at(p, 0)), s_f16(half_at(p, 1)), s_f16(half_at(p, 2)), s_f16(half_at(p, 3)) };
}
static inline vf v_bf16(const uint8_t *p) {
    return (vf){ lg_base_bf16_to_f32(half_at(p, 0)), lg_base_bf16_to_f32(half_at(p, 1)), lg_base_bf16_to_f32(half_at(p, 2)), lg_base_bf16_to_f32(half_at(p, 3)) };
}
static inline vf v_i8(const uint8_t *p) {
    return (vf){ (float)(int8_t)p[0], (float)(int8_t)p[1], (float)(int8_t)p[2], (float)(int8_t)p[3] };
}
static inline vf v_max(vf a, vf b) {
    const vi m = a > b;
    return (vf)(((vi)a & m) | ((vi)b & ~m));
}
static inline float v_hmax(vf a) {
    float m = a[0];
    for (int i = 1; i < 4; i++) m = m > a[i] ? m : a[i];
    return m;
}
static inline float v_hsum(vf a) { return (a[0] + a[1]) + (a[2] + a[3]); }
static inline void v_hsum4(float *dst, vf a, vf b, vf c, vf d) {
    dst[0] = v_hsum(a);
    dst[1] = v_hsum(b);
    dst[2] = v_hsum(c);
    dst[3] = v_hsum(d);
}

static inline void v_fma(vf *a, vf x, vf y) { *a += x * y; }

#include "ops/cpu/attend_simd.h"
#include "ops/cpu/attend_tile.h"
#include "ops/cpu/attend_f32.h"
#include "ops/cpu/attend_flash.h"

const lg_attend_kernels lg_attend_scalar = { .tile = tile_run, .flash = flash_run, .flash_bytes = flash_bytes_run, .peak = peak_run, .mass = mass_run };

/* Order of floats as order of unsigned words; both zeros alike. */
static uint32_t key_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if (u == 0x80000000u) u = 0;
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* Radix select: four byte-wide histograms narrow down the key of rank k. */
void lg_attend_topk_scalar(int32_t *out, const float *score, int64_t n, int64_t k, int32_t base, uint32_t *work) {
    uint32_t cut = 0, known = 0;
    int64_t left = k, ties, m = 0;
    if (k <= 0) return;
    for (int64_t i = 0; i < n; i++) work[i] = key_of(score[i]);
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t count[256] = { 0 };
        int b = 255;
        for (int64_t i = 0; i < n; i++)
            if ((work[i] & known) == cut) count[work[i] >> shift & 255]++;
        for (; count[b] < left; b--) left -= count[b];
        cut |= (uint32_t)b << shift;
        known |= 255u << shift;
    }
    ties = left; /* of the keys equal to the cut, the first so many are in */
    for (int64_t i = 0; i < n && m < k; i++)
        if (work[i] > cut || (work[i] == cut && ties-- > 0)) out[m++] = base + (int32_t)i;
}
