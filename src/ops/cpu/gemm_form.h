/* cpu/gemm_form: private to src/ops/cpu/gemm*.c. The packed form of weights, the input forms, and the kernels that
 * gemm.c chooses between.
 *
 * Packed weights: panels of 16 output rows; n_in is cut in blocks of 32 (padded with zeros for float dtypes).
 * A panel is [nb blocks of codes][scales], rounded up to 64 bytes; rows past n_out are zeros.
 *   4-bit codes, 256 bytes a block: byte 64 i + 4 r + j holds row r, input 4 i + j (low nibble) and 16 + 4 i + j (high)
 *   5, 6 bits: the low nibbles as above, then per further bit a plane of 64 bytes: bit 4 r + j of the 64-bit word g is
 *     that bit of row r, input 4 g + j
 *   8 bits, 512 bytes: byte 64 g + 4 r + j holds row r, input 4 g + j, plus 128
 *   bf16, 1024 bytes: 32-bit word 16 p + r holds inputs 2 p, 2 p + 1 of row r: a tile of AMX as it is
 *   f16, f32: element 16 k + r
 * So one 64-byte load is four inputs of sixteen rows: the u8 operand of VPDPBUSD, with the activations broadcast.
 * Scales of a block, each for sixteen rows (w = d q + m, symmetric types: m = -zero d):
 *   D   f16 d                    DM  f16 d, f16 m
 *   KSM per 8 blocks f16 d, f16 dmin; per block u8 sc, u8 mn: d sc q - dmin mn
 *   K6  per 8 blocks f16 d; per block i8 sc of inputs 0..15 and of 16..31 */
#ifndef LG_GEMM_FORM_H
#define LG_GEMM_FORM_H
#include "ops/cpu/gemm.h"

enum { LG_GEMM_NR = 16, LG_GEMM_KB = 32, LG_GEMM_AMX_PANELS = 8 /* dequantised together */ };

typedef enum lg_gemm_code { LG_CODE_4, LG_CODE_5, LG_CODE_6, LG_CODE_8, LG_CODE_BF16, LG_CODE_F16, LG_CODE_F32 } lg_gemm_code;
typedef enum lg_gemm_scale { LG_SCALE_NONE, LG_SCALE_D, LG_SCALE_DM, LG_SCALE_KSM, LG_SCALE_K6 } lg_gemm_scale;
typedef struct lg_gemm_format {
    lg_gemm_code code;
    lg_gemm_scale scale;
    int zero_log2;   /* symmetric types: log2 of the code that means 0; -1 where m is stored */
    int code_bytes;  /* of a block */
    int group, group_bytes, scale_bytes; /* group blocks share group_bytes, then scale_bytes for each */
} lg_gemm_format;
const lg_gemm_format *lg_gemm_format_of(lg_dtype t); /* NULL: no weight dtype */
/* The quantised formats, for kernels that have an instance for each: X(name, code, scale, zero_log2, code_bytes). */
#define LG_GEMM_QUANTISED(X)                               \
    X(q8_0, LG_CODE_8, LG_SCALE_D, 7, 512)                 \
    X(q4_0, LG_CODE_4, LG_SCALE_D, 3, 256)                 \
    X(q4_1, LG_CODE_4, LG_SCALE_DM, -1, 256)               \
    X(q5_0, LG_CODE_5, LG_SCALE_D, 4, 320)                 \
    X(q5_1, LG_CODE_5, LG_SCALE_DM, -1, 320)               \
    X(q4_k, LG_CODE_4, LG_SCALE_KSM, -1, 256)              \
    X(q5_k, LG_CODE_5, LG_SCALE_KSM, -1, 320)              \
    X(q6_k, LG_CODE_6, LG_SCALE_K6, 5, 384)

/* Input forms. F32: rows of f32. Q8: a row is [f32 x][int8 q][f32 s per block][f32 s*sum q per block][int32 sum q per
 * half block]. BF16: tiles [16 rows][32 inputs] of bf16, tile (t/16)*nb + block, rows past n_tok are zeros. */
typedef enum lg_gemm_form { LG_FORM_F32, LG_FORM_Q8, LG_FORM_BF16 } lg_gemm_form;
lg_gemm_form lg_gemm_form_of(const lg_gemm *g, int64_t n_tok);

static inline int64_t lg_gemm_blocks(int64_t n_in) { return (n_in + LG_GEMM_KB - 1) / LG_GEMM_KB; }
static inline int64_t lg_gemm_panels(int64_t n_out) { return (n_out + LG_GEMM_NR - 1) / LG_GEMM_NR; }
static inline int64_t lg_gemm_panel_bytes(const lg_gemm_format *f, int64_t nb) {
    const int64_t n_group = f->group ? (nb + f->group - 1) / f->group : 0;
    return (nb * (f->code_bytes + f->scale_bytes) + n_group * f->group_bytes + 63) / 64 * 64;
}
/* Byte offset behind the codes of block b's scales, and of its group's. */
static inline int64_t lg_gemm_scale_at(const lg_gemm_format *f, int64_t b, int64_t *group_at) {
    const int64_t g = b / f->group;
    *group_at = g * (f->group_bytes + (int64_t)f->group * f->scale_bytes);
    return *group_at + f->group_bytes + (b % f->group) * f->scale_bytes;
}

/* Offsets in a Q8 row, all multiples of 4; the row is a multiple of 64. */
static inline int64_t lg_gemm_q8_codes(int64_t nb) { return nb * LG_GEMM_KB * 4; }
static inline int64_t lg_gemm_q8_scales(int64_t nb) { return nb * LG_GEMM_KB * 5; }
static inline int64_t lg_gemm_q8_sums(int64_t nb) { return nb * (LG_GEMM_KB * 5 + 4); }
static inline int64_t lg_gemm_q8_halves(int64_t nb) { return nb * (LG_GEMM_KB * 5 + 8); }
static inline int64_t lg_gemm_q8_row(int64_t nb) { return (nb * (LG_GEMM_KB * 5 + 16) + 63) / 64 * 64; }

/* One thread's product: panels [p0, p1). */
typedef struct lg_gemm_job {
    const lg_gemm_format *f;
    const uint8_t *packed;
    int64_t panel_bytes, nb, n_out, p0, p1;
    float *y;
    int64_t ldy;
    bool add;
    const uint8_t *in;
    int64_t row_bytes; /* of in (F32 and Q8) */
    int64_t n_tok;
    void *scratch;
} lg_gemm_job;

/* Row preparation, the same code compiled for each instruction set (gemm_row.h). x is [n_in]. */
typedef struct lg_gemm_rows_fn {
    float (*mean_square)(const float *x, int64_t n);
    void (*f32)(float *dst, const float *x, float scale, const float *norm, int64_t first, int64_t last, int64_t n_in);
    void (*q8)(uint8_t *row, const float *x, float scale, const float *norm, int64_t first, int64_t last, int64_t n_in);
    void (*bf16)(uint8_t *tile_row, const float *x, float scale, const float *norm, int64_t n_in);
    void (*silu_mul)(float *h, const float *gate, const float *up, int64_t n);
} lg_gemm_rows_fn;
extern const lg_gemm_rows_fn lg_gemm_rows_scalar, lg_gemm_rows_avx2, lg_gemm_rows_avx512;

/* float: inputs f32, any dtype, f32 arithmetic. q8: inputs Q8, quantised dtypes. bf16: AMX tiles, any dtype. */
void lg_gemm_float_scalar(const lg_gemm_job *j);
void lg_gemm_float_avx2(const lg_gemm_job *j);
void lg_gemm_float_avx512(const lg_gemm_job *j);
void lg_gemm_q8_avx2(const lg_gemm_job *j);
void lg_gemm_q8_avx512(const lg_gemm_job *j);
void lg_gemm_bf16_amx(const lg_gemm_job *j);
void lg_gemm_tiles_amx(void); /* every tile 16 rows of 64 bytes */

/* Plain C: block b of a panel as w[k][16]. */
void lg_gemm_block_f32(const lg_gemm_format *f, const uint8_t *panel, int64_t nb, int64_t b, float w[LG_GEMM_KB][LG_GEMM_NR]);
#endif
