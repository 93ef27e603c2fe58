/* cpu/gemm_amx: products of many rows on AMX tiles. Eight panels (128 outputs) are dequantised to bf16 tiles in scratch,
 * once for all rows; then 2x2 tiles of f32 sums run over them, 128 rows of the input at a time, so that both stay in L2. */
#if defined(__x86_64__)
#include <string.h>
#include "ops/cpu/gemm_zmm.h"

enum { TILE = 1024, SIDE = 16, BLOCK_TOK = 128 }; /* of n_in 1536: 384 KB of input beside 384 KB of weights in L2 */

void lg_gemm_tiles_amx(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < 8; i++) c.bytes[i] = 64, c.rows[i] = SIDE;
    /* The intrinsic of gcc 12 names 8 bytes as its input; the rest would be optimised away. */
    __asm__ volatile("" : : "r"(&c) : "memory");
    _tile_loadconfig(&c);
}

/* f32 weights of inputs 2 i and 2 i + 1 as rounded bf16 pairs. */
LG_INLINE __m512i bf16_pairs(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                           19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

/* One panel as nb tiles, stride bytes apart. */
#define X(name, code, scale, zero, bytes)                                                             \
    static void tiles_##name(uint8_t *dst, int64_t stride, const uint8_t *panel, int64_t nb) {        \
        const zmm_kind k = { code, scale, zero, bytes };                                              \
        const uint8_t *s = panel + nb * k.code_bytes;                                                 \
        for (int64_t b = 0; b < nb; b++, dst += stride) {                                             \
            const uint8_t *c = panel + b * k.code_bytes;                                              \
            __m512 even = _mm512_setzero_ps();                                                        \
            ZMM_EACH_WEIGHT(k, c, s, b, i, w, {                                                       \
                if (i % 2) _mm512_store_si512(dst + 64 * (i / 2), bf16_pairs(even, w));               \
                else even = w;                                                                        \
            });                                                                                       \
        }                                                                                             \
    }
LG_GEMM_QUANTISED(X)
X(f32, LG_CODE_F32, LG_SCALE_NONE, -1, 2048)
X(f16, LG_CODE_F16, LG_SCALE_NONE, -1, 1024)
#undef X
static void tiles_bf16(uint8_t *dst, int64_t stride, const uint8_t *panel, int64_t nb) {
    for (int64_t b = 0; b < nb; b++) memcpy(dst + b * stride, panel + b * TILE, TILE);
}

/* Sums of a 32 x 32 square that overhangs y: by way of a buffer. */
static void edge(const lg_gemm_job *j, const float *sums, int64_t t0, int64_t o0) {
    const int64_t n_t = j->n_tok - t0 < SIDE ? j->n_tok - t0 : SIDE, n_o = j->n_out - o0 < SIDE ? j->n_out - o0 : SIDE;
    for (int64_t t = 0; t < n_t; t++)
        for (int64_t o = 0; o < n_o; o++) {
            float *y = j->y + (t0 + t) * j->ldy + o0 + o;
            *y = sums[t * SIDE + o] + (j->add ? *y : 0);
        }
}

#define START(tile, t, o)                                                                        \
    do {                                                                                         \
        if (j->add && whole) _tile_loadd(tile, j->y + (t) * j->ldy + (o), j->ldy * 4);           \
        else _tile_zero(tile);                                                                   \
    } while (0)
#define FINISH(tile, t, o)                                                                       \
    do {                                                                                         \
        if (whole) _tile_stored(tile, j->y + (t) * j->ldy + (o), j->ldy * 4);                    \
        else if ((t) < j->n_tok && (o) < j->n_out) {                                             \
            _tile_stored(tile, sums, SIDE * 4);                                                  \
            edge(j, sums, t, o);                                                                 \
        }                                                                                        \
    } while (0)

/* w: nb pairs of tiles. n_p 1 or 2 panels, n_t 1 or 2 strips of sixteen rows. */
static void square(const lg_gemm_job *j, const uint8_t *w, float *sums, int64_t p, int n_p, int64_t t0) {
    const int64_t o0 = p * LG_GEMM_NR, strip = j->nb * TILE;
    const bool two = t0 + SIDE < j->n_tok;
    const bool whole = t0 + 2 * SIDE <= j->n_tok && n_p == 2 && o0 + 2 * SIDE <= j->n_out;
    const uint8_t *a = j->in + t0 / SIDE * strip;
    START(0, t0, o0);
    START(1, t0, o0 + SIDE);
    START(2, t0 + SIDE, o0);
    START(3, t0 + SIDE, o0 + SIDE);
    if (two && n_p == 2) {
        for (int64_t b = 0; b < j->nb; b++, a += TILE, w += 2 * TILE) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, w, 64);
            _tile_loadd(7, w + TILE, 64);
            _tile_loadd(5, a + strip, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    } else {
        for (int64_t b = 0; b < j->nb; b++, a += TILE, w += 2 * TILE) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, w, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (n_p == 2) {
                _tile_loadd(7, w + TILE, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (two) {
                _tile_loadd(5, a + strip, 64);
                _tile_dpbf16ps(2, 5, 6);
            }
        }
    }
    FINISH(0, t0, o0);
    if (n_p == 2) FINISH(1, t0, o0 + SIDE);
    if (two) FINISH(2, t0 + SIDE, o0);
    if (two && n_p == 2) FINISH(3, t0 + SIDE, o0 + SIDE);
}

void lg_gemm_bf16_amx(const lg_gemm_job *j) {
    void (*tiles)(uint8_t *, int64_t, const uint8_t *, int64_t) = tiles_bf16;
#define X(name, c, s, zero, bytes) if (j->f->code == c && j->f->scale == s) tiles = tiles_##name;
    LG_GEMM_QUANTISED(X)
    ZMM_FLOATS(X)
#undef X
    uint8_t *w = j->scratch;
    const int64_t pair = 2 * j->nb * TILE;
    float *sums = (float *)(void *)(w + LG_GEMM_AMX_PANELS / 2 * pair);
    lg_gemm_tiles_amx();
    for (int64_t p0 = j->p0; p0 < j->p1; p0 += LG_GEMM_AMX_PANELS) {
        const int64_t p1 = p0 + LG_GEMM_AMX_PANELS < j->p1 ? p0 + LG_GEMM_AMX_PANELS : j->p1;
        for (int64_t p = p0; p < p1; p++)
            tiles(w + (p - p0) / 2 * pair + (p - p0) % 2 * TILE, 2 * TILE, j->packed + p * j->panel_bytes, j->nb);
        for (int64_t t0 = 0; t0 < j->n_tok; t0 += BLOCK_TOK) {
            const int64_t t1 = t0 + BLOCK_TOK < j->n_tok ? t0 + BLOCK_TOK : j->n_tok;
            for (int64_t p = p0; p < p1; p += 2)
                for (int64_t t = t0; t < t1; t += 2 * SIDE) square(j, w + (p - p0) / 2 * pair, sums, p, p1 - p < 2 ? 1 : 2, t);
        }
    }
}
#endif
