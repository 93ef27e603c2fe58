/* The arithmetic of sampling, the same to the bit on host and device: weights are whole numbers, so that no order of summing them
 * changes a sum, and a product is rounded before it is added. Included by sample.c (the specification) and cuda/sample.cu. */
#ifndef LG_OPS_SAMPLE_H
#define LG_OPS_SAMPLE_H
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define LG_BOTH static __host__ __device__ __forceinline__
#else
#define LG_BOTH static inline
#endif
#ifdef __CUDA_ARCH__ /* nvcc would fuse these into one rounding */
#define LG_ROUND_MUL(a, b) __dmul_rn(a, b)
#define LG_ROUND_ADD(a, b) __dadd_rn(a, b)
#else
#define LG_ROUND_MUL(a, b) ((a) * (b))
#define LG_ROUND_ADD(a, b) ((a) + (b))
#endif

enum { LG_WEIGHT_BITS = 40 }; /* the weight of the greatest logit is 1 << LG_WEIGHT_BITS */

/* Larger for larger values; equal for equal ones (-0 and 0); NaN comes last. */
LG_BOTH uint32_t lg_sample_key(float v) {
    uint32_t u;
    if (v != v) return 0;
    memcpy(&u, &v, sizeof u);
    if (v == 0) u = 0;
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

LG_BOTH float lg_sample_value(uint32_t key) {
    float v;
    const uint32_t u = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    memcpy(&v, &u, sizeof v);
    return v;
}

LG_BOTH float lg_sample_penalised(float v, float penalty) { return v > 0 ? v / penalty : v * penalty; }

/* (v - greatest) * scale of a logit that is not the greatest. */
LG_BOTH double lg_sample_below(float v, float top, double scale) { return LG_ROUND_MUL((double)v - (double)top, scale); }
/* The whole number next to y, of which y is within 2^51. */
LG_BOTH double lg_sample_whole(double y) { return LG_ROUND_ADD(LG_ROUND_ADD(y, 6755399441055744.0), -6755399441055744.0); } /* 1.5 * 2^52 */
/* 2^f, |f| <= 1/2. Error of the polynomial: 3e-13. */
LG_BOTH double lg_sample_exp2(double f) {
    double p = 7.054911620801121e-09; /* ln(2)^k / k!, k = 10 .. 0 */
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 1.0178086009239699e-07);
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 1.3215486790144307e-06);
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 1.5252733804059841e-05);
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 1.5403530393381608e-04);
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 1.3333558146428443e-03);
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 9.6181291076284772e-03);
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 5.5504108664821580e-02);
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 2.4022650695910072e-01);
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 6.9314718055994531e-01);
    p = LG_ROUND_ADD(LG_ROUND_MUL(p, f), 1.0);
    return p;
}
/* 2^y in units of 2^-40, rounded down, for y <= 0. */
LG_BOTH uint64_t lg_sample_power(double y) {
    if (!(y > -LG_WEIGHT_BITS - 1.0)) return 0; /* (NaN too) */
    const double n = lg_sample_whole(y);
    return (uint64_t)(int64_t)LG_ROUND_MUL(lg_sample_exp2(y - n), (double)((int64_t)1 << LG_WEIGHT_BITS)) >> (int)-n;
}
/* Of the logits' keys. */
LG_BOTH uint64_t lg_sample_weight(uint32_t key, uint32_t top, double scale) {
    if (key == top) return (uint64_t)1 << LG_WEIGHT_BITS;
    return lg_sample_power(lg_sample_below(lg_sample_value(key), lg_sample_value(top), scale));
}

/* The mass that top-p needs of `all`. */
LG_BOTH uint64_t lg_sample_need(double top_p, uint64_t all) {
    const uint64_t need = (uint64_t)LG_ROUND_MUL(top_p, (double)all);
    return need > 0 ? need : 1;
}
#endif
