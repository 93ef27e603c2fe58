/* The dtype table and the exact meaning of every dtype: how packed bytes become floats and back.
 *
 * All packed data is little-endian. The quantised formats are those of GGUF; in each, a block of elements
 * shares scales. With q the stored integer of an element:
 *   q8_0  block 32: f16 d, int8 q[32]                       d*q
 *   q4_0  block 32: f16 d, nibbles[16]                      d*(q-8)      element i in the low nibble of
 *   q4_1  block 32: f16 d, f16 m, nibbles[16]               d*q + m      byte i, element 16+i in the high
 *   q5_0  block 32: f16 d, u32 high bits, nibbles[16]       d*(q-16)     bit i of the word: element i's
 *   q5_1  block 32: f16 d, f16 m, u32 high bits, nibbles    d*q + m      fifth bit
 *   q4_k  block 256: f16 d, f16 dmin, 8 x (6-bit scale s, 6-bit minimum m) in 12 bytes, nibbles[128]
 *                                                           (d*s)*q - (dmin*m), one (s, m) per 32 elements
 *   q5_k  the same with 32 bytes of fifth bits before the nibbles
 *   q6_k  block 256: low nibbles[128], high bit pairs[64], int8 scale[16], f16 d
 *                                                           (d*scale)*(q-32), one scale per 16 elements
 *   q8    (KV8) a row of n: int8 q[n], then one f16 d per 32 elements (the last group may be short)
 * Products are formed in f32 in the order written; nothing is contracted. */
#include "base/base.h"

#include <assert.h>
#include <math.h>
#include <string.h>

static const lg_dtype_info table[LG_DTYPE_COUNT] = {
    [LG_DTYPE_F32] = {"f32", 1, 4, 0},          [LG_DTYPE_F16] = {"f16", 1, 2, 1},
    [LG_DTYPE_BF16] = {"bf16", 1, 2, 30},       [LG_DTYPE_Q8_0] = {"q8_0", 32, 34, 8},
    [LG_DTYPE_Q4_0] = {"q4_0", 32, 18, 2},      [LG_DTYPE_Q4_1] = {"q4_1", 32, 20, 3},
    [LG_DTYPE_Q5_0] = {"q5_0", 32, 22, 6},      [LG_DTYPE_Q5_1] = {"q5_1", 32, 24, 7},
    [LG_DTYPE_Q4_K] = {"q4_k", 256, 144, 12},   [LG_DTYPE_Q5_K] = {"q5_k", 256, 176, 13},
    [LG_DTYPE_Q6_K] = {"q6_k", 256, 210, 14},   [LG_DTYPE_KV8] = {"q8", 32, 34, -1},
    [LG_DTYPE_I32] = {"i32", 1, 4, 26},         [LG_DTYPE_I64] = {"i64", 1, 8, 27},
    [LG_DTYPE_U8] = {"u8", 1, 1, -1},
};

const lg_dtype_info *lg_base_dtype(lg_dtype t) {
    assert((unsigned)t < LG_DTYPE_COUNT);
    return &table[t];
}

bool lg_base_dtype_parse(const char *name, lg_dtype *out) {
    for (int t = 0; t < LG_DTYPE_COUNT; t++)
        if (strcmp(name, table[t].name) == 0) {
            *out = (lg_dtype)t;
            return true;
        }
    return false;
}

int64_t lg_base_row_bytes(lg_dtype t, int64_t n) {
    if (n < 0 || (unsigned)t >= LG_DTYPE_COUNT) return -1;
    if (t == LG_DTYPE_KV8) {
        int64_t groups = n / 32 + (n % 32 != 0), bytes;
        return lg_base_add(n, 2 * groups, &bytes) ? bytes : -1;
    }
    int64_t bytes;
    if (n % table[t].block != 0 || !lg_base_mul(n / table[t].block, table[t].bytes, &bytes)) return -1;
    return bytes;
}

/* ---- single numbers ---- */

static uint32_t float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

float lg_base_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3FF;
    if (exponent == 31) return bits_float(sign | 0x7F800000u | fraction << 13);
    if (exponent == 0) { /* zero or subnormal: fraction * 2^-24, exact in f32 */
        float f = (float)fraction * 0x1p-24f;
        return bits_float(sign | float_bits(f));
    }
    return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t lg_base_f32_to_f16(float f) {
    uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7FFFFFFF;
    if (a > 0x7F800000) return (uint16_t)(sign | 0x7E00 | ((a >> 13) & 0x1FF)); /* a quiet NaN */
    if (a >= 0x477FF000) return (uint16_t)(sign | 0x7C00);                      /* 65520 and up: infinity */
    if (a < 0x38800000) { /* below 2^-14: the sum's last bit is worth 2^-24, so the FPU rounds for us */
        float r = bits_float(a) + 0.5f;
        return (uint16_t)(sign | (float_bits(r) - 0x3F000000));
    }
    uint32_t odd = (a >> 13) & 1;
    return (uint16_t)(sign | ((a - 0x38000000 + 0xFFF + odd) >> 13));
}

uint16_t lg_base_f32_to_bf16(float f) {
    uint32_t u = float_bits(f);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(u >> 16 | 0x40); /* keep NaN a NaN */
    return (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

static uint16_t get16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static float get_f16(const uint8_t *p) { return lg_base_f16_to_f32(get16(p)); }
static void put_f16(uint8_t *p, float f) {
    uint16_t h = lg_base_f32_to_f16(f);
    p[0] = (uint8_t)h;
    p[1] = (uint8_t)(h >> 8);
}
static uint32_t get32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* ---- dequantisation, one block each ---- */

static void block_q8_0(const uint8_t *b, float *y) {
    float d = get_f16(b);
    for (int i = 0; i < 32; i++) y[i] = d * (float)(int8_t)b[2 + i];
}

static void block_q4_0(const uint8_t *b, float *y) {
    float d = get_f16(b);
    for (int i = 0; i < 16; i++) {
        y[i] = d * (float)((b[2 + i] & 15) - 8);
        y[16 + i] = d * (float)((b[2 + i] >> 4) - 8);
    }
}

static void block_q4_1(const uint8_t *b, float *y) {
    float d = get_f16(b), m = get_f16(b + 2);
    for (int i = 0; i < 16; i++) {
        y[i] = d * (float)(b[4 + i] & 15) + m;
        y[16 + i] = d * (float)(b[4 + i] >> 4) + m;
    }
}

/* Element i of a 5-bit block: nibble from its half of the bytes, fifth bit from the word. */
static int five(const uint8_t *nibbles, uint32_t high, int i) {
    int low = i < 16 ? nibbles[i] & 15 : nibbles[i - 16] >> 4;
    return low | (int)((high >> i) & 1) << 4;
}

static void block_q5_0(const uint8_t *b, float *y) {
    float d = get_f16(b);
    uint32_t high = get32(b + 2);
    for (int i = 0; i < 32; i++) y[i] = d * (float)(five(b + 6, high, i) - 16);
}

static void block_q5_1(const uint8_t *b, float *y) {
    float d = get_f16(b), m = get_f16(b + 2);
    uint32_t high = get32(b + 4);
    for (int i = 0; i < 32; i++) y[i] = d * (float)five(b + 8, high, i) + m;
}

/* The 12 packed bytes of q4_k and q5_k: groups 0-3 have scale and minimum in the low 6 bits of bytes 0-3
 * and 4-7; groups 4-7 have their low nibbles in bytes 8-11 and their top 2 bits on top of bytes 0-7. */
static void scale_min(const uint8_t *p, int group, int *scale, int *min) {
    if (group < 4) {
        *scale = p[group] & 63;
        *min = p[group + 4] & 63;
    } else {
        *scale = (p[group + 4] & 15) | (p[group - 4] >> 6) << 4;
        *min = (p[group + 4] >> 4) | (p[group] >> 6) << 4;
    }
}

/* Groups of 32 come in pairs that share 32 bytes of nibbles: even group low, odd group high. `fifth` holds
 * one bit per group for each of 32 columns (q5_k), or is NULL (q4_k). */
static void block_k_45(const uint8_t *b, const uint8_t *fifth, const uint8_t *nibbles, float *y) {
    float d = get_f16(b), dmin = get_f16(b + 2);
    for (int g = 0; g < 8; g++) {
        int scale, min;
        scale_min(b + 4, g, &scale, &min);
        float s = d * (float)scale, m = dmin * (float)min;
        const uint8_t *q = nibbles + g / 2 * 32;
        for (int i = 0; i < 32; i++) {
            int v = g & 1 ? q[i] >> 4 : q[i] & 15;
            if (fifth) v |= ((fifth[i] >> g) & 1) << 4;
            y[g * 32 + i] = s * (float)v - m;
        }
    }
}

static void block_q4_k(const uint8_t *b, float *y) { block_k_45(b, NULL, b + 16, y); }
static void block_q5_k(const uint8_t *b, float *y) { block_k_45(b, b + 16, b + 48, y); }

/* Two halves of 128, each of four rows of 32 columns: rows 0 and 2 are the low and high nibbles of the
 * first 32 bytes, rows 1 and 3 of the second 32; bit pair r of a column's high byte belongs to row r. */
static void block_q6_k(const uint8_t *b, float *y) {
    float d = get_f16(b + 208);
    for (int half = 0; half < 2; half++) {
        const uint8_t *low = b + half * 64, *high = b + 128 + half * 32, *scale = b + 192 + half * 8;
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < 32; i++) {
                int nibble = low[(r & 1) * 32 + i] >> (r < 2 ? 0 : 4) & 15;
                int v = (nibble | (high[i] >> 2 * r & 3) << 4) - 32;
                float s = d * (float)(int8_t)scale[r * 2 + i / 16];
                y[half * 128 + r * 32 + i] = s * (float)v;
            }
    }
}

typedef void (*block_fn)(const uint8_t *block, float *y);
static const block_fn block_of[LG_DTYPE_COUNT] = {
    [LG_DTYPE_Q8_0] = block_q8_0, [LG_DTYPE_Q4_0] = block_q4_0, [LG_DTYPE_Q4_1] = block_q4_1,
    [LG_DTYPE_Q5_0] = block_q5_0, [LG_DTYPE_Q5_1] = block_q5_1, [LG_DTYPE_Q4_K] = block_q4_k,
    [LG_DTYPE_Q5_K] = block_q5_k, [LG_DTYPE_Q6_K] = block_q6_k,
};

static void dequant_kv8(const uint8_t *src, float *dst, int64_t n) {
    for (int64_t i = 0; i < n; i++) dst[i] = get_f16(src + n + i / 32 * 2) * (float)(int8_t)src[i];
}

void lg_base_dequant(lg_dtype t, const void *src, float *dst, int64_t n) {
    const uint8_t *p = src;
    switch (t) {
    case LG_DTYPE_F32:
        if (n > 0) memcpy(dst, src, (size_t)n * sizeof *dst);
        return;
    case LG_DTYPE_F16:
        for (int64_t i = 0; i < n; i++) dst[i] = get_f16(p + 2 * i);
        return;
    case LG_DTYPE_BF16:
        for (int64_t i = 0; i < n; i++) dst[i] = lg_base_bf16_to_f32(get16(p + 2 * i));
        return;
    case LG_DTYPE_KV8: dequant_kv8(p, dst, n); return;
    case LG_DTYPE_I32: case LG_DTYPE_I64: case LG_DTYPE_U8: case LG_DTYPE_COUNT:
        assert(!"no weight dtype");
        return;
    default: break;
    }
    assert(n % table[t].block == 0);
    for (int64_t i = 0; i < n; i += table[t].block, p += table[t].bytes) block_of[t](p, dst + i);
}

/* ---- quantisation ---- */

/* Held in [low, high]; NaN becomes 0 where that lies within, else low. */
static int held(float v, int low, int high) {
    if (!(v > (float)low)) return v != v && low < 0 ? 0 : low;
    return v >= (float)high ? high : (int)v;
}

static float inverse(float d) { return d != 0.0f ? 1.0f / d : 0.0f; }

/* Up to 32 elements on one scale amax/127; returns the scale. Halves go away from zero in weight files,
 * as other programs that write these files have it, and to even in the cache, where conversion
 * instructions do so. */
static float quant_int8(const float *x, uint8_t *q, int64_t n, float (*nearest)(float)) {
    float amax = 0;
    for (int64_t i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    float d = amax / 127.0f, id = inverse(d);
    for (int64_t i = 0; i < n; i++) q[i] = (uint8_t)held(nearest(x[i] * id), -127, 127);
    return d;
}

/* The element of largest magnitude becomes -8 exactly, so the side it lies on has the finer reach. */
static void quant_q4_0(const float *x, uint8_t *b) {
    float amax = 0, peak = 0;
    for (int i = 0; i < 32; i++)
        if (fabsf(x[i]) > amax) {
            amax = fabsf(x[i]);
            peak = x[i];
        }
    float d = peak / -8.0f, id = inverse(d);
    put_f16(b, d);
    for (int i = 0; i < 16; i++) {
        int low = held(x[i] * id + 8.5f, 0, 15), high = held(x[16 + i] * id + 8.5f, 0, 15);
        b[2 + i] = (uint8_t)(low | high << 4);
    }
}

static void quant_q4_1(const float *x, uint8_t *b) {
    float min = x[0], max = x[0];
    for (int i = 1; i < 32; i++) {
        min = x[i] < min ? x[i] : min;
        max = x[i] > max ? x[i] : max;
    }
    float d = (max - min) / 15.0f, id = inverse(d);
    put_f16(b, d);
    put_f16(b + 2, min);
    for (int i = 0; i < 16; i++) {
        int low = held((x[i] - min) * id + 0.5f, 0, 15);
        int high = held((x[16 + i] - min) * id + 0.5f, 0, 15);
        b[4 + i] = (uint8_t)(low | high << 4);
    }
}

void lg_base_quant(lg_dtype t, const float *src, void *dst, int64_t n) {
    uint8_t *p = dst;
    assert(t == LG_DTYPE_KV8 || n % table[t].block == 0);
    switch (t) {
    case LG_DTYPE_F32:
        if (n > 0) memcpy(dst, src, (size_t)n * sizeof *src);
        return;
    case LG_DTYPE_F16:
        for (int64_t i = 0; i < n; i++) put_f16(p + 2 * i, src[i]);
        return;
    case LG_DTYPE_BF16:
        for (int64_t i = 0; i < n; i++) {
            uint16_t h = lg_base_f32_to_bf16(src[i]);
            p[2 * i] = (uint8_t)h;
            p[2 * i + 1] = (uint8_t)(h >> 8);
        }
        return;
    case LG_DTYPE_Q8_0:
        for (int64_t i = 0; i < n; i += 32, p += 34) put_f16(p, quant_int8(src + i, p + 2, 32, roundf));
        return;
    case LG_DTYPE_KV8:
        for (int64_t i = 0; i < n; i += 32) {
            int64_t group = n - i < 32 ? n - i : 32;
            put_f16(p + n + i / 32 * 2, quant_int8(src + i, p + i, group, rintf));
        }
        return;
    case LG_DTYPE_Q4_0:
        for (int64_t i = 0; i < n; i += 32, p += 18) quant_q4_0(src + i, p);
        return;
    case LG_DTYPE_Q4_1:
        for (int64_t i = 0; i < n; i += 32, p += 20) quant_q4_1(src + i, p);
        return;
    default: assert(!"no target dtype"); return;
    }
}
