/* The kernels of attend_kernels.h written once for vectors of VW floats. A file of one instruction set defines
 *   VW, GH (query heads per pass over the rows), NV (vectors of head_dim per pass), MR, MC (rows, vectors of the flash product)
 *   vf, vfu (same, unaligned), vi; v_f16, v_bf16, v_i8 (VW elements to f32), s_f16, v_max (keeps a NaN of its second
 *   argument), v_hmax, v_hsum, v_hsum4 (sums of four vectors), v_fma (*a += x y)
 * and includes this, then attend_tile.h (decode), attend_flash.h (prefill, attention mass) or both. head_dim must be a multiple of VW. */
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE vf v_load(const float *p) { return (vf)*(const vfu *)p; }
INLINE void v_store(float *p, vf x) { *(vfu *)p = (vfu)x; }
INLINE vf v_set(float x) { return x - (vf){ 0 }; }

/* VW elements of a cache row from element c on. */
INLINE vf v_row(lg_dtype t, const uint8_t *row, int64_t c, int64_t d) {
    if (t == LG_DTYPE_F16) return v_f16(row + 2 * c);
    if (t == LG_DTYPE_BF16) return v_bf16(row + 2 * c);
    if (t == LG_DTYPE_F32) return v_load((const float *)(const void *)(row + 4 * c));
    uint16_t s;
    memcpy(&s, row + d + 2 * (c / 32), sizeof s);
    return v_i8(row + c) * s_f16(s);
}

/* 2^x for x <= 0 to 1e-7 relative; exactly 1 at 0, 0 below -127. */
INLINE vf v_exp2(vf x) {
    x = v_max(v_set(-127.0f), x);
    const vi n = __builtin_convertvector(x, vi); /* towards zero: f in (-1, 0] */
    const vf f = x - __builtin_convertvector(n, vf);
    vf p = f * 1.09023149e-4f + 1.27474804e-3f;
    p = p * f + 9.57917937e-3f;
    p = p * f + 5.54907569e-2f;
    p = p * f + 2.40224368e-1f;
    p = p * f + 6.93147064e-1f;
    p = p * f + 1.0f;
    return p * (vf)((n + 127) << 23);
}
INLINE float s_exp2(float x) { return v_exp2(v_set(x))[0]; }

/* Bytes of a cache row; a constant where type and size are. */
INLINE int64_t row_bytes_of(lg_dtype t, int64_t d) {
    return t == LG_DTYPE_F32 ? 4 * d : t == LG_DTYPE_KV8 ? d + 2 * ((d + 31) / 32) : 2 * d;
}
INLINE void prefetch_row(const uint8_t *p, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(p + b, 0, LG_PREFETCH);
    if (bytes % 64) __builtin_prefetch(p + bytes - 1, 0, LG_PREFETCH);
}
