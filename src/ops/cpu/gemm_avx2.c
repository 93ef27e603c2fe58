/* cpu/gemm_avx2: products with AVX2, FMA and F16C; docs/speed-gemm.md has the counts behind the shapes.
 *
 * int8 activations: VPMADDUBSW multiplies unsigned codes with signed activations and adds pairs in 16 bits. Pair sums of
 * b-bit codes are at most 2 (2^b - 1) 127, so 8 of them (4 bits), 4 (5 bits) or 2 (6 bits) are added in 16 bits before one
 * VPMADDWD widens them; 8-bit codes need the sign trick and widen every time.
 * Few rows: codes are taken out of the panel on the way. Many rows: a panel is taken out once into scratch (in L1), and tiles
 * of four rows, whose inputs stay in L2, run over it. A row's sums are the same operations in the same order in every
 * tile, so results do not depend on the company. */
#if defined(__x86_64__)
#define ROWS_TABLE lg_gemm_rows_avx2
#define ROW_Q8 ymm_row_q8
#include <immintrin.h>
#include <stdint.h>
static void ymm_row_q8(uint8_t *row, const float *x, float scale, const float *norm, int64_t first, int64_t last, int64_t n_in);
#include "ops/cpu/gemm_row.h"

#define LG_INLINE static inline __attribute__((always_inline))

/* Holds x in a register here: gcc would rather keep all products, spill them and add them up in a tree. */
#define KEEP(x) __asm__("" : "+x"(x))

enum { AHEAD = 8192 /* bytes: the prefetchers stop at every page */, L2_ROWS = 192 << 10 /* bytes of inputs kept in L2 */, T_MAX = 6 };

typedef struct ymm_kind { lg_gemm_code code; lg_gemm_scale scale; int zero_log2, code_bytes; } ymm_kind;

/* Rows of a full tile: what 16 registers hold (6 of them spill). */
LG_INLINE int tile_rows(ymm_kind k) { return k.code == LG_CODE_4 || k.code == LG_CODE_8 ? 4 : 3; }
/* Groups of four inputs added in 16 bits. */
LG_INLINE int widen_every(ymm_kind k) { return k.code == LG_CODE_4 ? 8 : k.code == LG_CODE_5 ? 4 : k.code == LG_CODE_6 ? 2 : 1; }

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

LG_INLINE __m256 ymm_f16(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }

/* Scales of rows 8 h .. 8 h + 7 in block b: w = d q + m; K6 has two d (inputs 0..15, 16..31) and no m. */
typedef struct ymm_scale { __m256 d, m; } ymm_scale;
LG_INLINE ymm_scale ymm_scales(ymm_kind k, const uint8_t *s, int64_t b, int h) {
    ymm_scale r;
    if (k.scale == LG_SCALE_D) {
        r.d = ymm_f16(s + 32 * b + 16 * h);
        r.m = _mm256_mul_ps(r.d, _mm256_set1_ps(-(float)(1 << k.zero_log2)));
    } else if (k.scale == LG_SCALE_DM) {
        r.d = ymm_f16(s + 64 * b + 16 * h);
        r.m = ymm_f16(s + 64 * b + 32 + 16 * h);
    } else if (k.scale == LG_SCALE_KSM) {
        const uint8_t *group = s + (b >> 3) * (64 + 8 * 32), *own = group + 64 + (b & 7) * 32 + 8 * h;
        const __m256 sc = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)own)));
        const __m256 mn = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(own + 16))));
        r.d = _mm256_mul_ps(ymm_f16(group + 16 * h), sc);
        r.m = _mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(ymm_f16(group + 32 + 16 * h), mn));
    } else {
        const uint8_t *group = s + (b >> 3) * (32 + 8 * 32), *own = group + 32 + (b & 7) * 32 + 8 * h;
        const __m256 d = ymm_f16(group + 16 * h);
        r.d = _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)own))));
        r.m = _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(own + 16)))));
    }
    return r;
}

/* ---- int8 activations ---- */
/* A panel in scratch: codes as bytes [nb][8 groups][16 rows][4], then f32 scales d, m [nb][2][16]. */
LG_INLINE void q8_plain(ymm_kind k, const uint8_t *panel, int64_t nb, uint8_t *dst) {
    const uint8_t *s = panel + nb * k.code_bytes;
    float *scale = (float *)(void *)(dst + nb * 512);
    for (int64_t b = 0; b < nb; b++, dst += 512, scale += 32) {
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) _mm256_store_si256((void *)(dst + 64 * g + 32 * h), ymm_codes(k, panel + b * k.code_bytes, g, h));
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const ymm_scale r = ymm_scales(k, s, b, h);
            _mm256_store_ps(scale + 8 * h, r.d);
            _mm256_store_ps(scale + 16 + 8 * h, r.m);
        }
    }
}

LG_INLINE __m256i four_inputs(const uint8_t *q) {
    int32_t v;
    memcpy(&v, q, 4);
    return _mm256_set1_epi32(v);
}
LG_INLINE __m256 row_value(const uint8_t *p) {
    float v;
    memcpy(&v, p, 4);
    return _mm256_set1_ps(v);
}

/* y of n_t rows from t0 on, panel p. plain: codes and scales lie in scratch (q8_plain). */
LG_INLINE void q8_tile(ymm_kind k, const lg_gemm_job *j, int64_t p, int64_t t0, const int n_t, const bool plain) {
    const int64_t nb = j->nb, rb = j->row_bytes;
    const uint8_t *panel = j->packed + p * j->panel_bytes, *s = panel + nb * k.code_bytes, *c = plain ? j->scratch : panel;
    const float *scale = (const float *)(const void *)((const uint8_t *)j->scratch + nb * 512);
    const uint8_t *in = j->in + t0 * rb, *x = in + lg_gemm_q8_codes(nb), *xs = in + lg_gemm_q8_scales(nb);
    const uint8_t *sums = in + lg_gemm_q8_sums(nb), *halves = in + lg_gemm_q8_halves(nb);
    const int block = k.code_bytes + (k.scale == LG_SCALE_D ? 32 : k.scale == LG_SCALE_DM ? 64 : 40), every = widen_every(k);
    const bool k6 = k.scale == LG_SCALE_K6, has_m = !k6 && k.code != LG_CODE_8;
    const __m256i ones = _mm256_set1_epi16(1);
    _Alignas(32) float acc[T_MAX][LG_GEMM_NR];
#pragma GCC unroll 6
    for (int t = 0; t < n_t; t++) _mm256_store_ps(acc[t], _mm256_setzero_ps()), _mm256_store_ps(acc[t] + 8, _mm256_setzero_ps());
    for (int64_t b = 0; b < nb; b++, x += LG_GEMM_KB, xs += 4, sums += 4, halves += 8, scale += 32) {
        if (!plain) {
            const char *ahead = (const char *)panel + b * block + AHEAD;
#pragma GCC unroll 16
            for (int i = 0; i < block; i += 64) _mm_prefetch(ahead + i, _MM_HINT_NTA);
        }
        __m256i wide[T_MAX][2];
#pragma GCC unroll 8
        for (int g0 = 0; g0 < 8; g0 += every) {
            __m256i sum[T_MAX][2];
            if (k6 && g0 % 4 == 0)
#pragma GCC unroll 6
                for (int t = 0; t < n_t; t++) {
                    int32_t half;
                    memcpy(&half, halves + t * rb + g0, 4);
                    wide[t][0] = wide[t][1] = _mm256_set1_epi32(-half * (1 << k.zero_log2));
                }
#pragma GCC unroll 8
            for (int g = g0; g < g0 + every; g++) {
                __m256i w[2];
                w[0] = plain ? _mm256_load_si256((const void *)(c + 64 * g)) : ymm_codes(k, c, g, 0);
                w[1] = plain ? _mm256_load_si256((const void *)(c + 64 * g + 32)) : ymm_codes(k, c, g, 1);
#pragma GCC unroll 6
                for (int t = 0; t < n_t; t++) {
                    const __m256i v = four_inputs(x + t * rb + 4 * g);
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        const __m256i pairs = k.code == LG_CODE_8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w[h]), _mm256_sign_epi8(v, w[h]))
                                                                  : _mm256_maddubs_epi16(w[h], v);
                        sum[t][h] = g == g0 ? pairs : _mm256_add_epi16(sum[t][h], pairs);
                        KEEP(sum[t][h]);
                    }
                }
            }
#pragma GCC unroll 6
            for (int t = 0; t < n_t; t++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m256i four = _mm256_madd_epi16(sum[t][h], ones);
                    wide[t][h] = g0 == 0 && !k6 ? four : _mm256_add_epi32(wide[t][h], four);
                }
            if (g0 + every == 8 || (k6 && g0 + every == 4)) {
                ymm_scale r[2];
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    if (plain) r[h] = (ymm_scale){ _mm256_load_ps(scale + 8 * h), _mm256_load_ps(scale + 16 + 8 * h) };
                    else r[h] = ymm_scales(k, s, b, h);
                    if (k6 && g0 + every == 8) r[h].d = r[h].m;
                }
#pragma GCC unroll 6
                for (int t = 0; t < n_t; t++) {
                    const __m256 f = row_value(xs + t * rb), m = row_value(sums + t * rb);
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        __m256 a = _mm256_load_ps(acc[t] + 8 * h);
                        a = _mm256_fmadd_ps(_mm256_mul_ps(r[h].d, f), _mm256_cvtepi32_ps(wide[t][h]), a);
                        if (has_m) a = _mm256_fmadd_ps(r[h].m, m, a);
                        _mm256_store_ps(acc[t] + 8 * h, a);
                    }
                }
            }
        }
        c += plain ? 512 : k.code_bytes;
    }
    const int64_t o = p * LG_GEMM_NR, n = j->n_out - o < LG_GEMM_NR ? j->n_out - o : LG_GEMM_NR;
#pragma GCC unroll 6
    for (int t = 0; t < n_t; t++) {
        float *y = j->y + (t0 + t) * j->ldy + o;
        if (n == LG_GEMM_NR) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const __m256 a = _mm256_load_ps(acc[t] + 8 * h);
                _mm256_storeu_ps(y + 8 * h, j->add ? _mm256_add_ps(_mm256_loadu_ps(y + 8 * h), a) : a);
            }
        } else {
            for (int64_t r = 0; r < n; r++) y[r] = j->add ? y[r] + acc[t][r] : acc[t][r];
        }
    }
}

/* Full tiles out of scratch, in stretches of rows that stay in L2; the rest out of the panel. */
LG_INLINE void q8_product(ymm_kind k, const lg_gemm_job *j) {
    const int rows = tile_rows(k);
    const int64_t full = j->n_tok / rows * rows, read = j->nb * (LG_GEMM_KB + 16);
    const int64_t fit = L2_ROWS / read / rows * rows, stretch = fit < rows ? rows : fit;
    for (int64_t t0 = 0; t0 < full; t0 += stretch) {
        const int64_t t1 = full - t0 < stretch ? full : t0 + stretch;
        for (int64_t p = j->p0; p < j->p1; p++) {
            q8_plain(k, j->packed + p * j->panel_bytes, j->nb, j->scratch);
            for (int64_t t = t0; t < t1; t += rows) q8_tile(k, j, p, t, rows, true);
        }
    }
    for (int64_t p = j->p0; p < j->p1; p++) {
        int64_t t = full;
        if (j->n_tok - t >= 2) q8_tile(k, j, p, t, 2, false), t += 2;
        if (j->n_tok - t >= 1) q8_tile(k, j, p, t, 1, false);
    }
}

#define X(name, code, scale, zero, bytes)                                         \
    static void q8_##name(const lg_gemm_job *j) {                                 \
        const ymm_kind k = { code, scale, zero, bytes };                          \
        q8_product(k, j);                                                         \
    }
LG_GEMM_QUANTISED(X)
#undef X

void lg_gemm_q8_avx2(const lg_gemm_job *j) {
#define X(name, c, s, zero, bytes) if (j->f->code == c && j->f->scale == s) q8_##name(j);
    LG_GEMM_QUANTISED(X)
#undef X
}

/* Sum of the words of both halves, in the lowest words of each. */
LG_INLINE __m256i half_sums(__m256i a) {
    a = _mm256_add_epi32(a, _mm256_shuffle_epi32(a, 0x4e));
    return _mm256_add_epi32(a, _mm256_shuffle_epi32(a, 0xb1));
}

/* row_q8 of gemm_row.h in vectors: gcc leaves its rounding and packing to single elements. */
static void ymm_row_q8(uint8_t *row, const float *x, float scale, const float *norm, int64_t first, int64_t last, int64_t n_in) {
    const int64_t nb = lg_gemm_blocks(n_in);
    float *f = (float *)(void *)row;
    uint8_t *q = row + lg_gemm_q8_codes(nb);
    float *s = (float *)(void *)(row + lg_gemm_q8_scales(nb)), *sums = (float *)(void *)(row + lg_gemm_q8_sums(nb));
    int32_t *halves = (int32_t *)(void *)(row + lg_gemm_q8_halves(nb));
    const __m256 by = _mm256_set1_ps(scale), magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX));
    for (int64_t b = first; b < last; b++) {
        float *at = f + b * LG_GEMM_KB;
        __m256 v[4], top = _mm256_setzero_ps();
        __m256i c[4];
        if ((b + 1) * LG_GEMM_KB > n_in) row_block(at, x, scale, norm, b, n_in);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            if ((b + 1) * LG_GEMM_KB > n_in) v[i] = _mm256_loadu_ps(at + 8 * i);
            else v[i] = _mm256_loadu_ps(x + b * LG_GEMM_KB + 8 * i);
            if ((b + 1) * LG_GEMM_KB <= n_in) {
                if (norm) v[i] = _mm256_mul_ps(_mm256_mul_ps(v[i], by), _mm256_loadu_ps(norm + b * LG_GEMM_KB + 8 * i));
                _mm256_storeu_ps(at + 8 * i, v[i]);
            }
            top = _mm256_max_ps(_mm256_and_ps(v[i], magnitude), top);
        }
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        const float largest = _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
        const __m256 inv = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) { /* what is no number converts to INT32_MIN, whose sums would overflow */
            c[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inv));
            c[i] = _mm256_max_epi32(_mm256_min_epi32(c[i], _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
        }
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
        _mm256_storeu_si256((void *)(q + b * LG_GEMM_KB), _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        const __m256i h0 = half_sums(_mm256_add_epi32(c[0], c[1])), h1 = half_sums(_mm256_add_epi32(c[2], c[3]));
        halves[2 * b] = _mm256_extract_epi32(h0, 0) + _mm256_extract_epi32(h0, 4);
        halves[2 * b + 1] = _mm256_extract_epi32(h1, 0) + _mm256_extract_epi32(h1, 4);
        s[b] = largest / 127.0f;
        sums[b] = s[b] * (float)(halves[2 * b] + halves[2 * b + 1]);
    }
}

/* ---- f32 activations ---- */
/* Block b of a panel as w[32][16]. */
LG_INLINE void float_block(ymm_kind k, const uint8_t *panel, int64_t nb, int64_t b, float *w) {
    const uint8_t *c = panel + b * k.code_bytes;
    if (k.code == LG_CODE_F32) memcpy(w, c, 2048);
    else if (k.code == LG_CODE_F16) {
#pragma GCC unroll 4
        for (int i = 0; i < LG_GEMM_KB * 2; i++) _mm256_store_ps(w + 8 * i, ymm_f16(c + 16 * i));
    } else if (k.code == LG_CODE_BF16) {
#pragma GCC unroll 4
        for (int i = 0; i < LG_GEMM_KB; i++) { /* pair i / 2, half i % 2 */
            const __m256i v = _mm256_loadu_si256((const void *)(c + 32 * i));
            float *at = w + i / 2 * 32 + i % 2 * 8;
            _mm256_store_ps(at, _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)));
            _mm256_store_ps(at + 16, _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int32_t)0xffff0000))));
        }
    } else {
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const ymm_scale r = ymm_scales(k, panel + nb * k.code_bytes, b, h);
            const int zero = k.code == LG_CODE_8 || k.zero_log2 < 0 ? 0 : 1 << k.zero_log2;
#pragma GCC unroll 8
            for (int g = 0; g < 8; g++) {
                const __m256i q = ymm_codes(k, c, g, h);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const __m256i e = k.code == LG_CODE_8 ? _mm256_srai_epi32(_mm256_slli_epi32(q, 24 - 8 * i), 24)
                                                          : _mm256_and_si256(_mm256_srli_epi32(q, 8 * i), _mm256_set1_epi32(255));
                    const __m256 v = _mm256_cvtepi32_ps(_mm256_sub_epi32(e, _mm256_set1_epi32(zero)));
                    const __m256 d = k.scale == LG_SCALE_K6 && g >= 4 ? r.m : r.d;
                    const bool has_m = k.scale == LG_SCALE_DM || k.scale == LG_SCALE_KSM;
                    _mm256_store_ps(w + (4 * g + i) * 16 + 8 * h, has_m ? _mm256_fmadd_ps(d, v, r.m) : _mm256_mul_ps(d, v));
                }
            }
        }
    }
}

/* y of n_t rows from t0 on; the panel as w[n_k][16]. */
LG_INLINE void float_tile(const lg_gemm_job *j, const float *w, int64_t p, int64_t t0, const int n_t) {
    const int64_t n_k = j->nb * LG_GEMM_KB, rb = j->row_bytes;
    const uint8_t *x = j->in + t0 * rb;
    __m256 acc[T_MAX][2];
#pragma GCC unroll 6
    for (int t = 0; t < n_t; t++) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
    for (int64_t i = 0; i < n_k; i++, w += LG_GEMM_NR, x += 4) {
        const __m256 w0 = _mm256_load_ps(w), w1 = _mm256_load_ps(w + 8);
#pragma GCC unroll 6
        for (int t = 0; t < n_t; t++) {
            const __m256 v = row_value(x + t * rb);
            acc[t][0] = _mm256_fmadd_ps(w0, v, acc[t][0]);
            acc[t][1] = _mm256_fmadd_ps(w1, v, acc[t][1]);
        }
    }
    const int64_t o = p * LG_GEMM_NR, n = j->n_out - o < LG_GEMM_NR ? j->n_out - o : LG_GEMM_NR;
#pragma GCC unroll 6
    for (int t = 0; t < n_t; t++) {
        float *y = j->y + (t0 + t) * j->ldy + o;
        if (n == LG_GEMM_NR) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
                _mm256_storeu_ps(y + 8 * h, j->add ? _mm256_add_ps(_mm256_loadu_ps(y + 8 * h), acc[t][h]) : acc[t][h]);
        } else {
            float r[LG_GEMM_NR];
            _mm256_storeu_ps(r, acc[t][0]);
            _mm256_storeu_ps(r + 8, acc[t][1]);
            for (int64_t i = 0; i < n; i++) y[i] = j->add ? y[i] + r[i] : r[i];
        }
    }
}

static void float_tiles(const lg_gemm_job *j, const float *w, int64_t p) {
    int64_t t = 0;
    for (; t + 6 <= j->n_tok; t += 6) float_tile(j, w, p, t, 6);
    if (j->n_tok - t >= 4) float_tile(j, w, p, t, 4), t += 4;
    if (j->n_tok - t >= 2) float_tile(j, w, p, t, 2), t += 2;
    if (j->n_tok - t >= 1) float_tile(j, w, p, t, 1);
}

#define FLOATS(X)                                          \
    X(f32, LG_CODE_F32, LG_SCALE_NONE, -1, 2048)           \
    X(f16, LG_CODE_F16, LG_SCALE_NONE, -1, 1024)           \
    X(bf16, LG_CODE_BF16, LG_SCALE_NONE, -1, 1024)
#define X(name, code, scale, zero, bytes)                                                                              \
    static void float_##name(const lg_gemm_job *j) {                                                                   \
        const ymm_kind k = { code, scale, zero, bytes };                                                               \
        float *w = j->scratch;                                                                                         \
        for (int64_t p = j->p0; p < j->p1; p++) {                                                                      \
            const uint8_t *panel = j->packed + p * j->panel_bytes;                                                     \
            for (int64_t b = 0; b < j->nb; b++) float_block(k, panel, j->nb, b, w + b * LG_GEMM_KB * LG_GEMM_NR);      \
            float_tiles(j, w, p);                                                                                      \
        }                                                                                                              \
    }
LG_GEMM_QUANTISED(X)
FLOATS(X)
#undef X

void lg_gemm_float_avx2(const lg_gemm_job *j) {
#define X(name, c, s, zero, bytes) if (j->f->code == c && j->f->scale == s) float_##name(j);
    LG_GEMM_QUANTISED(X)
    FLOATS(X)
#undef X
}
#endif
