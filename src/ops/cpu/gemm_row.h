/* cpu/gemm_row: preparation of input rows, and the plain product, in plain C that the compiler vectorises; included once by the file of each
 * instruction set, which names the table (ROWS_TABLE). */
#include "ops/cpu/gemm_form.h"
#include <math.h>
#include <string.h>

static float row_mean_square(const float *x, int64_t n) {
    float s = 0;
    for (int64_t i = 0; i < n; i++) s += x[i] * x[i];
    return s / (float)n;
}

/* One block of 32 after the norm; past n_in zeros. */
static inline void row_block(float v[LG_GEMM_KB], const float *restrict x, float scale, const float *restrict norm,
                             int64_t b, int64_t n_in) {
    const int64_t k0 = b * LG_GEMM_KB, n = n_in - k0 < LG_GEMM_KB ? n_in - k0 : LG_GEMM_KB;
    if (n == LG_GEMM_KB) {
        if (norm)
            for (int i = 0; i < LG_GEMM_KB; i++) v[i] = x[k0 + i] * scale * norm[k0 + i];
        else
            for (int i = 0; i < LG_GEMM_KB; i++) v[i] = x[k0 + i];
        return;
    }
    for (int i = 0; i < LG_GEMM_KB; i++) v[i] = i < n ? (norm ? x[k0 + i] * scale * norm[k0 + i] : x[k0 + i]) : 0;
}

static void row_f32(float *dst, const float *x, float scale, const float *norm, int64_t first, int64_t last, int64_t n_in) {
    for (int64_t b = first; b < last; b++) row_block(dst + b * LG_GEMM_KB, x, scale, norm, b, n_in);
}

#ifndef ROW_Q8 /* an instruction set's own, of the same signature */
#define ROW_Q8 row_q8
static void row_q8(uint8_t *row, const float *x, float scale, const float *norm, int64_t first, int64_t last, int64_t n_in) {
    const int64_t nb = lg_gemm_blocks(n_in);
    float *f = (float *)(void *)row;
    int8_t *q = (int8_t *)row + lg_gemm_q8_codes(nb);
    float *s = (float *)(void *)(row + lg_gemm_q8_scales(nb)), *sums = (float *)(void *)(row + lg_gemm_q8_sums(nb));
    int32_t *halves = (int32_t *)(void *)(row + lg_gemm_q8_halves(nb));
    for (int64_t b = first; b < last; b++) {
        float *v = f + b * LG_GEMM_KB;
        row_block(v, x, scale, norm, b, n_in);
        float top = 0;
        for (int i = 0; i < LG_GEMM_KB; i++) {
            const float a = fabsf(v[i]);
            top = a > top ? a : top;
        }
        const float inv = top > 0 ? 127.0f / top : 0.0f;
        int32_t c[LG_GEMM_KB], h0 = 0, h1 = 0;
        for (int i = 0; i < LG_GEMM_KB; i++) {
            const float y = v[i] * inv;
            c[i] = (int32_t)rintf(y > -127.0f ? y < 127.0f ? y : 127.0f : -127.0f); /* (what is no number becomes one: sums would overflow) */
        }
        for (int i = 0; i < LG_GEMM_KB / 2; i++) h0 += c[i], h1 += c[i + LG_GEMM_KB / 2];
        for (int i = 0; i < LG_GEMM_KB; i++) q[b * LG_GEMM_KB + i] = (int8_t)c[i];
        s[b] = top / 127.0f;
        sums[b] = s[b] * (float)(h0 + h1);
        halves[2 * b] = h0;
        halves[2 * b + 1] = h1;
    }
}
#endif

static void row_bf16(uint8_t *tile_row, const float *x, float scale, const float *norm, int64_t n_in) {
    const int64_t nb = lg_gemm_blocks(n_in);
    for (int64_t b = 0; b < nb; b++) {
        float v[LG_GEMM_KB];
        uint32_t u[LG_GEMM_KB];
        uint16_t *dst = (uint16_t *)(void *)(tile_row + b * 1024);
        row_block(v, x, scale, norm, b, n_in);
        memcpy(u, v, sizeof u);
        for (int i = 0; i < LG_GEMM_KB; i++) dst[i] = (uint16_t)((u[i] + 0x7fffu + (u[i] >> 16 & 1)) >> 16);
    }
}

/* 2^t for |t| <= 126, beyond it clamped: Taylor in u = t - rint(t), relative error below 2e-7. */
static inline float row_exp2(float t) {
    t = t > -126.0f ? t < 126.0f ? t : 126.0f : -126.0f; /* (what is no number becomes one: it is cast below) */
    const float n = rintf(t), u = t - n;
    float p = 1.5403530e-4f;
    p = p * u + 1.3333558e-3f;
    p = p * u + 9.6181291e-3f;
    p = p * u + 5.5504109e-2f;
    p = p * u + 2.4022651e-1f;
    p = p * u + 6.9314718e-1f;
    p = p * u + 1.0f;
    const union { int32_t i; float f; } e = { .i = ((int32_t)n + 127) * (1 << 23) };
    return p * e.f;
}

static void row_silu_mul(float *h, const float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) h[i] = gate[i] / (1.0f + row_exp2(gate[i] * -1.4426950f)) * up[i];
}

const lg_gemm_rows_fn ROWS_TABLE = { row_mean_square, row_f32, ROW_Q8, row_bf16, row_silu_mul };

/* Rows t .. t + ROWS of the input over one panel: the sums stay in registers, a weight is loaded once for all rows. */
typedef float row_v8 __attribute__((vector_size(32), aligned(4), may_alias));
enum { ROW_BLOCK = 6 };
#define ROW_FLOAT_BLOCK(ROWS)                                                                                                \
    static __attribute__((unused)) void row_float_block_##ROWS(const lg_gemm_job *j, const float *w, int64_t n_k, int64_t t, \
                                                               int64_t o, int64_t n) {                                       \
        const float *x[ROWS];                                                                                                \
        row_v8 acc[ROWS][2];                                                                                                 \
        for (int i = 0; i < ROWS; i++) {                                                                                     \
            x[i] = (const float *)(const void *)(j->in + (t + i) * j->row_bytes);                                            \
            acc[i][0] = acc[i][1] = (row_v8){ 0 };                                                                           \
        }                                                                                                                    \
        for (int64_t k = 0; k < n_k; k++) {                                                                                  \
            const row_v8 *v = (const row_v8 *)(const void *)(w + k * LG_GEMM_NR);                                            \
            const row_v8 a = v[0], b = v[1];                                                                                 \
            _Pragma("GCC unroll 6") for (int i = 0; i < ROWS; i++) {                                                         \
                acc[i][0] += a * x[i][k];                                                                                    \
                acc[i][1] += b * x[i][k];                                                                                    \
            }                                                                                                                \
        }                                                                                                                    \
        for (int i = 0; i < ROWS; i++) {                                                                                     \
            float *y = j->y + (t + i) * j->ldy + o;                                                                          \
            for (int64_t r = 0; r < n; r++) y[r] = j->add ? y[r] + acc[i][r / 8][r % 8] : acc[i][r / 8][r % 8];              \
        }                                                                                                                    \
    }
ROW_FLOAT_BLOCK(1)
ROW_FLOAT_BLOCK(6)

/* Panels are dequantised once into scratch [k][16], then every row of the input runs over them. */
static __attribute__((unused)) void row_float_product(const lg_gemm_job *j) {
    float(*w)[LG_GEMM_NR] = j->scratch;
    const int64_t n_k = j->nb * LG_GEMM_KB;
    for (int64_t p = j->p0; p < j->p1; p++) {
        const uint8_t *panel = j->packed + p * j->panel_bytes;
        for (int64_t b = 0; b < j->nb; b++) lg_gemm_block_f32(j->f, panel, j->nb, b, w + b * LG_GEMM_KB);
        const int64_t o = p * LG_GEMM_NR, n = j->n_out - o < LG_GEMM_NR ? j->n_out - o : LG_GEMM_NR;
        int64_t t = 0;
        for (; t + ROW_BLOCK <= j->n_tok; t += ROW_BLOCK) row_float_block_6(j, w[0], n_k, t, o, n);
        for (; t < j->n_tok; t++) row_float_block_1(j, w[0], n_k, t, o, n);
    }
}
