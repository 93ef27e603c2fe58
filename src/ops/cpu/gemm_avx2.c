/* cpu/gemm_avx2: products with AVX2. int8 activations by VPMADDUBSW, eight rows of a panel at a time and up to four
 * rows of the input; everything else is the plain C product compiled for AVX2. */
#if defined(__x86_64__)
#define ROWS_TABLE lg_gemm_rows_avx2
#include <immintrin.h>
#include "ops/cpu/gemm_row.h"

#define LG_INLINE static inline __attribute__((always_inline))

typedef struct ymm_kind { lg_gemm_code code; lg_gemm_scale scale; int zero_log2, code_bytes; } ymm_kind;

/* 32 bits of a plane as bytes of 0 or value. */
LG_INLINE __m256i plane_bytes(const uint8_t *bits, int8_t value) {
    int32_t v;
    memcpy(&v, bits, 4);
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i one = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i b = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(v), spread), one);
    return _mm256_and_si256(_mm256_cmpeq_epi8(b, one), _mm256_set1_epi8(value));
}

/* Codes of inputs 4 g .. 4 g + 3 of rows 8 h .. 8 h + 7: unsigned, but 8-bit ones signed, zero point gone. */
LG_INLINE __m256i ymm_codes(ymm_kind k, const uint8_t *c, int g, int h) {
    if (k.code == LG_CODE_8) return _mm256_xor_si256(_mm256_loadu_si256((const void *)(c + 64 * g + 32 * h)), _mm256_set1_epi8(-128));
    const __m256i raw = _mm256_loadu_si256((const void *)(c + 64 * (g & 3) + 32 * h));
    __m256i q = _mm256_and_si256(g < 4 ? raw : _mm256_srli_epi16(raw, 4), _mm256_set1_epi8(15));
    if (k.code == LG_CODE_5 || k.code == LG_CODE_6) q = _mm256_or_si256(q, plane_bytes(c + 256 + 8 * g + 4 * h, 16));
    if (k.code == LG_CODE_6) q = _mm256_or_si256(q, plane_bytes(c + 320 + 8 * g + 4 * h, 32));
    return q;
}

/* Pair sums stay within 16 bits: 2 * 63 * 127 unsigned, 2 * 128 * 127 signed. */
LG_INLINE __m256i dot4(ymm_kind k, __m256i sum, __m256i w, __m256i x) {
    const __m256i pairs = k.code == LG_CODE_8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)) : _mm256_maddubs_epi16(w, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

LG_INLINE __m256 ymm_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }

LG_INLINE void ymm_scales(ymm_kind k, const uint8_t *s, int64_t b, int h, __m256 d[2], __m256 *m) {
    *m = _mm256_setzero_ps();
    if (k.scale == LG_SCALE_D) {
        d[0] = d[1] = ymm_f16(s + 32 * b + 16 * h);
    } else if (k.scale == LG_SCALE_DM) {
        d[0] = d[1] = ymm_f16(s + 64 * b + 16 * h);
        *m = ymm_f16(s + 64 * b + 32 + 16 * h);
    } else if (k.scale == LG_SCALE_KSM) {
        const uint8_t *group = s + (b >> 3) * (64 + 8 * 32), *own = group + 64 + (b & 7) * 32 + 8 * h;
        const __m256 sc = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)own)));
        const __m256 mn = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(own + 16))));
        d[0] = d[1] = _mm256_mul_ps(ymm_f16(group + 16 * h), sc);
        *m = _mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(ymm_f16(group + 32 + 16 * h), mn));
    } else {
        const uint8_t *group = s + (b >> 3) * (32 + 8 * 32), *own = group + 32 + (b & 7) * 32 + 8 * h;
        for (int i = 0; i < 2; i++)
            d[i] = _mm256_mul_ps(ymm_f16(group + 16 * h), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(own + 16 * i)))));
    }
}

/* Sums of rows 8 h .. 8 h + 7 of panel p with n_t rows of the input, into out[t][8 h ..]. */
LG_INLINE void q8_half(ymm_kind k, const lg_gemm_job *j, const uint8_t *panel, int64_t t0, int h, float out[4][LG_GEMM_NR], const int n_t) {
    const uint8_t *s = panel + j->nb * k.code_bytes, *in = j->in + t0 * j->row_bytes;
    const int64_t at_q = lg_gemm_q8_codes(j->nb), at_s = lg_gemm_q8_scales(j->nb), at_sum = lg_gemm_q8_sums(j->nb),
                  at_half = lg_gemm_q8_halves(j->nb);
    __m256 acc[4];
    for (int t = 0; t < n_t; t++) acc[t] = _mm256_setzero_ps();
    for (int64_t b = 0; b < j->nb; b++) {
        __m256 d[2], m;
        ymm_scales(k, s, b, h, d, &m);
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) { /* sixteen inputs each: Q6_K's scales change between them */
            __m256i sum[4];
#pragma GCC unroll 4
            for (int t = 0; t < n_t; t++) {
                const int32_t *half = (const int32_t *)(const void *)(in + t * j->row_bytes + at_half) + 2 * b;
                sum[t] = k.zero_log2 >= 0 && k.code != LG_CODE_8 ? _mm256_set1_epi32(-half[part] * (1 << k.zero_log2)) : _mm256_setzero_si256();
            }
#pragma GCC unroll 4
            for (int g = 4 * part; g < 4 * part + 4; g++) {
                const __m256i w = ymm_codes(k, panel + b * k.code_bytes, g, h);
#pragma GCC unroll 4
                for (int t = 0; t < n_t; t++) {
                    int32_t x;
                    memcpy(&x, in + t * j->row_bytes + at_q + b * LG_GEMM_KB + 4 * g, 4);
                    sum[t] = dot4(k, sum[t], w, _mm256_set1_epi32(x));
                }
            }
#pragma GCC unroll 4
            for (int t = 0; t < n_t; t++) {
                const uint8_t *row = in + t * j->row_bytes;
                const __m256 xs = _mm256_set1_ps(((const float *)(const void *)(row + at_s))[b]);
                acc[t] = _mm256_fmadd_ps(_mm256_mul_ps(d[part], xs), _mm256_cvtepi32_ps(sum[t]), acc[t]);
                if (part && k.zero_log2 < 0)
                    acc[t] = _mm256_fmadd_ps(m, _mm256_set1_ps(((const float *)(const void *)(row + at_sum))[b]), acc[t]);
            }
        }
    }
    for (int t = 0; t < n_t; t++) _mm256_storeu_ps(&out[t][8 * h], acc[t]);
}

LG_INLINE void q8_tile(ymm_kind k, const lg_gemm_job *j, int64_t p, int64_t t0, const int n_t) {
    const uint8_t *panel = j->packed + p * j->panel_bytes;
    const int64_t o = p * LG_GEMM_NR, n = j->n_out - o < LG_GEMM_NR ? j->n_out - o : LG_GEMM_NR;
    float sums[4][LG_GEMM_NR];
    q8_half(k, j, panel, t0, 0, sums, n_t);
    q8_half(k, j, panel, t0, 1, sums, n_t);
    for (int t = 0; t < n_t; t++) {
        float *y = j->y + (t0 + t) * j->ldy + o;
        for (int64_t r = 0; r < n; r++) y[r] = j->add ? y[r] + sums[t][r] : sums[t][r];
    }
}

#define KINDS(X)                                           \
    X(q8_0, LG_CODE_8, LG_SCALE_D, 7, 512)                 \
    X(q4_0, LG_CODE_4, LG_SCALE_D, 3, 256)                 \
    X(q4_1, LG_CODE_4, LG_SCALE_DM, -1, 256)               \
    X(q5_0, LG_CODE_5, LG_SCALE_D, 4, 320)                 \
    X(q5_1, LG_CODE_5, LG_SCALE_DM, -1, 320)               \
    X(q4_k, LG_CODE_4, LG_SCALE_KSM, -1, 256)              \
    X(q5_k, LG_CODE_5, LG_SCALE_KSM, -1, 320)              \
    X(q6_k, LG_CODE_6, LG_SCALE_K6, 5, 384)
#define X(name, code, scale, zero, bytes)                                         \
    static void q8_##name(const lg_gemm_job *j) {                                 \
        const ymm_kind k = { code, scale, zero, bytes };                          \
        for (int64_t p = j->p0; p < j->p1; p++) {                                 \
            int64_t t = 0;                                                        \
            for (; t + 4 <= j->n_tok; t += 4) q8_tile(k, j, p, t, 4);             \
            if (j->n_tok & 2) q8_tile(k, j, p, t, 2), t += 2;                     \
            if (j->n_tok & 1) q8_tile(k, j, p, t, 1);                             \
        }                                                                         \
    }
KINDS(X)
#undef X

void lg_gemm_q8_avx2(const lg_gemm_job *j) {
#define X(name, c, s, zero, bytes) if (j->f->code == c && j->f->scale == s) q8_##name(j);
    KINDS(X)
#undef X
}

void lg_gemm_float_avx2(const lg_gemm_job *j) { row_float_product(j); }
#endif
