/* cpu/gemm_zmm: reading packed weights with AVX-512, shared by gemm_avx512.c and gemm_amx.c. Every function takes the
 * format's code and scale kinds as constants, so that each kernel is compiled for one dtype without branches. */
#ifndef LG_GEMM_ZMM_H
#define LG_GEMM_ZMM_H
#include <immintrin.h>
#include "ops/cpu/gemm_form.h"

#define LG_INLINE static inline __attribute__((always_inline))

/* What a kernel must know about a dtype, constant after inlining. */
typedef struct zmm_kind { lg_gemm_code code; lg_gemm_scale scale; int zero_log2, code_bytes; } zmm_kind;

/* u8 codes of inputs 4 g .. 4 g + 3 of sixteen rows; c points to the block. */
LG_INLINE __m512i zmm_codes(zmm_kind k, const uint8_t *c, int g) {
    if (k.code == LG_CODE_8) return _mm512_loadu_si512(c + 64 * g);
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i raw = _mm512_loadu_si512(c + 64 * (g & 3));
    __m512i q = _mm512_and_si512(g < 4 ? raw : _mm512_srli_epi16(raw, 4), low);
    if (k.code == LG_CODE_5 || k.code == LG_CODE_6)
        q = _mm512_mask_add_epi8(q, _load_mask64((__mmask64 *)(uintptr_t)(c + 256 + 8 * g)), q, _mm512_set1_epi8(16));
    if (k.code == LG_CODE_6)
        q = _mm512_mask_add_epi8(q, _load_mask64((__mmask64 *)(uintptr_t)(c + 320 + 8 * g)), q, _mm512_set1_epi8(32));
    return q;
}

LG_INLINE __m512 zmm_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }

/* Scales of block b: d of both halves (equal but for K6), and m (DM and KSM only). s points behind the codes. */
LG_INLINE void zmm_scales(zmm_kind k, const uint8_t *s, int64_t b, __m512 *d0, __m512 *d1, __m512 *m) {
    *m = _mm512_setzero_ps();
    if (k.scale == LG_SCALE_D) {
        *d0 = *d1 = zmm_f16(s + 32 * b);
    } else if (k.scale == LG_SCALE_DM) {
        *d0 = *d1 = zmm_f16(s + 64 * b);
        *m = zmm_f16(s + 64 * b + 32);
    } else if (k.scale == LG_SCALE_KSM) {
        const uint8_t *group = s + (b >> 3) * (64 + 8 * 32), *own = group + 64 + (b & 7) * 32;
        const __m512 sc = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)own)));
        const __m512 mn = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(own + 16))));
        *d0 = *d1 = _mm512_mul_ps(zmm_f16(group), sc);
        *m = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(zmm_f16(group + 32), mn));
    } else if (k.scale == LG_SCALE_K6) {
        const uint8_t *group = s + (b >> 3) * (32 + 8 * 32), *own = group + 32 + (b & 7) * 32;
        const __m512 d = zmm_f16(group);
        *d0 = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)own))));
        *d1 = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(own + 16)))));
    }
}

/* Both m of float arithmetic: w = fma(d, q, m), exact up to its one rounding. */
LG_INLINE void zmm_offsets(zmm_kind k, __m512 d0, __m512 d1, __m512 *m0, __m512 *m1) {
    if (k.zero_log2 < 0) {
        *m1 = *m0;
        return;
    }
    const __m512 zero = _mm512_set1_ps(-(float)(1 << k.zero_log2));
    *m0 = _mm512_mul_ps(d0, zero);
    *m1 = k.scale == LG_SCALE_K6 ? _mm512_mul_ps(d1, zero) : *m0;
}

/* Calls BODY with constant i, w = f32 weights of input i of sixteen rows, for the 32 inputs of block b in order. */
#define ZMM_EACH_WEIGHT(k, c, s, b, i, w, BODY)                                                                          \
    do {                                                                                                                \
        __m512 zd0, zd1, zm0, zm1;                                                                                      \
        zd0 = zd1 = zm0 = zm1 = _mm512_setzero_ps();                                                                    \
        if ((k).scale != LG_SCALE_NONE) {                                                                               \
            zmm_scales(k, s, b, &zd0, &zd1, &zm0);                                                                      \
            zmm_offsets(k, zd0, zd1, &zm0, &zm1);                                                                       \
        }                                                                                                               \
        _Pragma("GCC unroll 8") for (int zg = 0; zg < 8; zg++) {                                                        \
            const __m512i zq = (k).scale != LG_SCALE_NONE ? zmm_codes(k, c, zg) : _mm512_setzero_si512();               \
            _Pragma("GCC unroll 4") for (int zj = 0; zj < 4; zj++) {                                                    \
                const int i = 4 * zg + zj;                                                                              \
                const __m512 w = zmm_weight(k, c, zq, i, zg < 4 ? zd0 : zd1, zg < 4 ? zm0 : zm1);                       \
                BODY                                                                                                    \
            }                                                                                                           \
        }                                                                                                               \
    } while (0)

LG_INLINE __m512 zmm_weight(zmm_kind k, const uint8_t *c, __m512i q, int i, __m512 d, __m512 m) {
    if (k.code == LG_CODE_F32) return _mm512_loadu_ps(c + 64 * i);
    if (k.code == LG_CODE_F16) return zmm_f16(c + 32 * i);
    if (k.code == LG_CODE_BF16) {
        const __m512i pair = _mm512_loadu_si512(c + 64 * (i / 2));
        return _mm512_castsi512_ps(i % 2 ? _mm512_and_si512(pair, _mm512_set1_epi32(-65536)) : _mm512_slli_epi32(pair, 16));
    }
    if (k.code == LG_CODE_4) { /* a table look-up reads the low four bits of each index: no mask, no conversion */
        const __m512 table = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i raw = _mm512_loadu_si512(c + 64 * (i / 4 & 3));
        const __m512 f = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, (unsigned)(8 * (i % 4) + (i < 16 ? 0 : 4))), table);
        return _mm512_fmadd_ps(d, f, m);
    }
    const __m512i byte = i % 4 == 3 ? _mm512_srli_epi32(q, 24) : _mm512_and_si512(_mm512_srli_epi32(q, (unsigned)(8 * (i % 4))), _mm512_set1_epi32(255));
    return _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(byte), m);
}

/* As LG_GEMM_QUANTISED, for the rest. */
#define ZMM_FLOATS(X)                                      \
    X(f32, LG_CODE_F32, LG_SCALE_NONE, -1, 2048)           \
    X(f16, LG_CODE_F16, LG_SCALE_NONE, -1, 1024)           \
    X(bf16, LG_CODE_BF16, LG_SCALE_NONE, -1, 1024)

/* Lanes of panel p that are rows of the weight. */
LG_INLINE __mmask16 zmm_rows(int64_t n_out, int64_t p) {
    const int64_t n = n_out - p * LG_GEMM_NR;
    return (__mmask16)(n >= LG_GEMM_NR ? 0xffffu : (1u << n) - 1);
}
LG_INLINE void zmm_store(float *y, __m512 v, __mmask16 rows, bool add) {
    if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(rows, y));
    _mm512_mask_storeu_ps(y, rows, v);
}
#endif
