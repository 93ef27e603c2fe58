/* cpu/gemm_avx512: products with AVX-512. For few rows both kernels stream a panel once from memory and keep it in L1
 * for further tiles of 8, 4, 2, 1 rows; the sums of a row never depend on the tile it falls in. For many rows in f32
 * three panels at a time are dequantised into scratch. */
#if defined(__x86_64__)
#define ROWS_TABLE lg_gemm_rows_avx512
#include "ops/cpu/gemm_row.h"
#include "ops/cpu/gemm_zmm.h"

enum { AHEAD = 2048 }; /* bytes: the prefetchers stop at every page, so ask for the weights ourselves */

LG_INLINE __m512i four_inputs(const int8_t *q) {
    int32_t v;
    memcpy(&v, q, 4);
    return _mm512_set1_epi32(v);
}

/* Sum of codes times int8 activations of groups [g0, g0 + n), less the zero point's share. */
LG_INLINE __m512i dot_groups(zmm_kind k, const __m512i *c, const int8_t *q, int g0, int n, int32_t sum) {
    __m512i a = _mm512_setzero_si512(), b = _mm512_setzero_si512();
    if (k.zero_log2 >= 0) b = _mm512_set1_epi32(-sum * (1 << k.zero_log2));
#pragma GCC unroll 8
    for (int g = g0; g < g0 + n; g += 2) {
        a = _mm512_dpbusd_epi32(a, c[g], four_inputs(q + 4 * g));
        b = _mm512_dpbusd_epi32(b, c[g + 1], four_inputs(q + 4 * g + 4));
    }
    return _mm512_add_epi32(a, b);
}

LG_INLINE void q8_tile(zmm_kind k, const lg_gemm_job *j, int64_t p, int64_t t0, const int n_t) {
    const uint8_t *panel = j->packed + p * j->panel_bytes, *s = panel + j->nb * k.code_bytes;
    const uint8_t *in = j->in + t0 * j->row_bytes;
    const int64_t at_q = lg_gemm_q8_codes(j->nb), at_s = lg_gemm_q8_scales(j->nb), at_sum = lg_gemm_q8_sums(j->nb),
                  at_half = lg_gemm_q8_halves(j->nb);
    __m512 acc[8];
#pragma GCC unroll 8
    for (int t = 0; t < n_t; t++) acc[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < j->nb; b++) {
        const uint8_t *c = panel + b * k.code_bytes;
        __m512i q[8];
        __m512 d0, d1, m;
#pragma GCC unroll 8
        for (int i = 0; i < k.code_bytes / 64; i++) _mm_prefetch((const char *)c + AHEAD + 64 * i, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) q[g] = zmm_codes(k, c, g);
        zmm_scales(k, s, b, &d0, &d1, &m);
#pragma GCC unroll 8
        for (int t = 0; t < n_t; t++) {
            const uint8_t *row = in + t * j->row_bytes;
            const int8_t *x = (const int8_t *)row + at_q + b * LG_GEMM_KB;
            const __m512 xs = _mm512_set1_ps(((const float *)(const void *)(row + at_s))[b]);
            const int32_t *half = (const int32_t *)(const void *)(row + at_half) + 2 * b;
            if (k.scale == LG_SCALE_K6) {
                const __m512i i0 = dot_groups(k, q, x, 0, 4, half[0]), i1 = dot_groups(k, q, x, 4, 4, half[1]);
                acc[t] = _mm512_fmadd_ps(_mm512_mul_ps(d0, xs), _mm512_cvtepi32_ps(i0), acc[t]);
                acc[t] = _mm512_fmadd_ps(_mm512_mul_ps(d1, xs), _mm512_cvtepi32_ps(i1), acc[t]);
            } else {
                const int32_t sum = k.zero_log2 >= 0 ? half[0] + half[1] : 0;
                const __m512i i0 = dot_groups(k, q, x, 0, 8, sum);
                acc[t] = _mm512_fmadd_ps(_mm512_mul_ps(d0, xs), _mm512_cvtepi32_ps(i0), acc[t]);
                if (k.zero_log2 < 0)
                    acc[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(((const float *)(const void *)(row + at_sum))[b]), acc[t]);
            }
        }
    }
    const __mmask16 rows = zmm_rows(j->n_out, p);
#pragma GCC unroll 8
    for (int t = 0; t < n_t; t++) zmm_store(j->y + (t0 + t) * j->ldy + p * LG_GEMM_NR, acc[t], rows, j->add);
}

/* f32 arithmetic on weights dequantised in registers; even and odd inputs are summed apart. */
LG_INLINE void float_tile(zmm_kind k, const lg_gemm_job *j, int64_t p, int64_t t0, const int n_t) {
    const uint8_t *panel = j->packed + p * j->panel_bytes, *s = panel + j->nb * k.code_bytes;
    const uint8_t *in = j->in + t0 * j->row_bytes;
    __m512 acc[8][2];
#pragma GCC unroll 8
    for (int t = 0; t < n_t; t++) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
    for (int64_t b = 0; b < j->nb; b++) {
        const uint8_t *c = panel + b * k.code_bytes, *x = in + b * LG_GEMM_KB * 4;
#pragma GCC unroll 32
        for (int i = 0; i < k.code_bytes / 64; i++) _mm_prefetch((const char *)c + AHEAD + 64 * i, _MM_HINT_T0);
        ZMM_EACH_WEIGHT(k, c, s, b, i, w, {
            _Pragma("GCC unroll 8") for (int t = 0; t < n_t; t++) {
                const float *xt = (const float *)(const void *)(x + t * j->row_bytes);
                acc[t][i % 2] = _mm512_fmadd_ps(w, _mm512_set1_ps(xt[i]), acc[t][i % 2]);
            }
        });
    }
    const __mmask16 rows = zmm_rows(j->n_out, p);
#pragma GCC unroll 8
    for (int t = 0; t < n_t; t++)
        zmm_store(j->y + (t0 + t) * j->ldy + p * LG_GEMM_NR, _mm512_add_ps(acc[t][0], acc[t][1]), rows, j->add);
}

#define TILES(tile, k, j)                                                         \
    for (int64_t p = (j)->p0; p < (j)->p1; p++) {                                 \
        int64_t t = 0;                                                            \
        for (; t + 8 <= (j)->n_tok; t += 8) tile(k, j, p, t, 8);                  \
        if ((j)->n_tok & 4) tile(k, j, p, t, 4), t += 4;                          \
        if ((j)->n_tok & 2) tile(k, j, p, t, 2), t += 2;                          \
        if ((j)->n_tok & 1) tile(k, j, p, t, 1);                                  \
    }

#define X(name, code, scale, zero, bytes)                                         \
    static void q8_##name(const lg_gemm_job *j) {                                 \
        const zmm_kind k = { code, scale, zero, bytes };                          \
        TILES(q8_tile, k, j)                                                      \
    }
LG_GEMM_QUANTISED(X)
#undef X
#define X(name, code, scale, zero, bytes)                                         \
    static void float_##name(const lg_gemm_job *j) {                              \
        const zmm_kind k = { code, scale, zero, bytes };                          \
        TILES(float_tile, k, j)                                                   \
    }                                                                             \
    static void fill_##name(float *dst, const uint8_t *panel, int64_t nb, int64_t b0, int64_t b1) {          \
        const zmm_kind k = { code, scale, zero, bytes };                          \
        const uint8_t *s = panel + nb * k.code_bytes;                             \
        for (int64_t b = b0; b < b1; b++, dst += LG_GEMM_KB * WIDE) {             \
            const uint8_t *c = panel + b * k.code_bytes;                          \
            ZMM_EACH_WEIGHT(k, c, s, b, i, w, { _mm512_store_ps(dst + i * WIDE, w); });                      \
        }                                                                         \
    }
enum { PANELS = 3, WIDE = PANELS * LG_GEMM_NR, DEEP = 8 /* blocks of n_in: 48 KB of scratch */, MANY_TOK = 17 };
LG_GEMM_QUANTISED(X)
ZMM_FLOATS(X)
#undef X

void lg_gemm_q8_avx512(const lg_gemm_job *j) {
#define X(name, c, s, zero, bytes) if (j->f->code == c && j->f->scale == s) q8_##name(j);
    LG_GEMM_QUANTISED(X)
#undef X
}

/* y[n_t rows][48] += x[n_t, n_k] * w[n_k, 48] */
LG_INLINE void wide_tile(const lg_gemm_job *j, const float *w, int64_t k0, int64_t n_k, int64_t p, int n_p, int64_t t0,
                         bool add, const int n_t) {
    __m512 acc[8][PANELS];
    const uint8_t *in = j->in + t0 * j->row_bytes + k0 * 4;
#pragma GCC unroll 8
    for (int t = 0; t < n_t; t++)
#pragma GCC unroll 3
        for (int i = 0; i < PANELS; i++) acc[t][i] = _mm512_setzero_ps();
    for (int64_t i = 0; i < n_k; i++) {
        const __m512 w0 = _mm512_load_ps(w + i * WIDE), w1 = _mm512_load_ps(w + i * WIDE + 16), w2 = _mm512_load_ps(w + i * WIDE + 32);
#pragma GCC unroll 8
        for (int t = 0; t < n_t; t++) {
            const __m512 x = _mm512_set1_ps(((const float *)(const void *)(in + t * j->row_bytes))[i]);
            acc[t][0] = _mm512_fmadd_ps(w0, x, acc[t][0]);
            acc[t][1] = _mm512_fmadd_ps(w1, x, acc[t][1]);
            acc[t][2] = _mm512_fmadd_ps(w2, x, acc[t][2]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < n_t; t++)
#pragma GCC unroll 3
        for (int i = 0; i < PANELS; i++)
            if (i < n_p) zmm_store(j->y + (t0 + t) * j->ldy + (p + i) * LG_GEMM_NR, acc[t][i], zmm_rows(j->n_out, p + i), add);
}

static void float_wide(const lg_gemm_job *j, void (*fill)(float *, const uint8_t *, int64_t, int64_t, int64_t)) {
    float *w = j->scratch;
    for (int64_t p = j->p0; p < j->p1; p += PANELS) {
        const int n_p = j->p1 - p < PANELS ? (int)(j->p1 - p) : PANELS;
        for (int64_t b0 = 0; b0 < j->nb; b0 += DEEP) {
            const int64_t b1 = b0 + DEEP < j->nb ? b0 + DEEP : j->nb, k0 = b0 * LG_GEMM_KB, n_k = (b1 - b0) * LG_GEMM_KB;
            const bool add = j->add || b0;
            int64_t t = 0;
            for (int i = 0; i < n_p; i++) fill(w + i * LG_GEMM_NR, j->packed + (p + i) * j->panel_bytes, j->nb, b0, b1);
            for (; t + 8 <= j->n_tok; t += 8) wide_tile(j, w, k0, n_k, p, n_p, t, add, 8);
            for (; t < j->n_tok; t++) wide_tile(j, w, k0, n_k, p, n_p, t, add, 1);
        }
    }
}

void lg_gemm_float_avx512(const lg_gemm_job *j) {
#define X(name, c, s, zero, bytes)                                   \
    if (j->f->code == c && j->f->scale == s) {                       \
        if (j->n_tok >= MANY_TOK) float_wide(j, fill_##name);        \
        else float_##name(j);                                        \
    }
    LG_GEMM_QUANTISED(X)
    ZMM_FLOATS(X)
#undef X
}
#endif
