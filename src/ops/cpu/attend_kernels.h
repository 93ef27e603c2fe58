/* What the driver (attend.c) asks of one instruction set. Kernels:
 *   tile   decode: some cache rows of one KV head against the query heads of its group, which share every row read;
 *          lanes run along head_dim.
 *   flash  prefill: groups of LG_FLASH_LANES queries (row x head of the group) against a run of pages; lanes run along
 *          queries, so that the softmax needs no sum across lanes.
 *   peak,    attention mass in two passes over the keys: of one tile of lanes what its softmax needs, then the sums over all lanes of a head
 *   mass     for some pages.
 * Every kernel is a pure function of its own row: which rows travel with it changes nothing. */
#ifndef LG_ATTEND_KERNELS_H
#define LG_ATTEND_KERNELS_H
#include "ops/ops.h"

enum { LG_TILE = 64, LG_FLASH_LANES = 32, LG_FLASH_GROUP = 16 };

/* Running softmax of `group` heads in one buffer: max[group] (base 2, scaled), sum[group], then acc[group][head_dim]. */
typedef struct lg_tile {
    const float *q;          /* [group, head_dim] */
    float *max, *sum, *acc;
    const uint8_t *k, *v;    /* layer bases */
    const int64_t *off;      /* byte offsets of n rows, padded with copies of the last to a multiple of 4 */
    const int64_t *next;     /* rows of the next tile to prefetch: next_n, may be 0 */
    int32_t n, next_n;       /* <= LG_TILE */
    int32_t group, head_dim;
    int64_t row_bytes;
    lg_dtype dtype;
    float scale2;            /* scale * log2(e) */
    float *score;            /* NULL, or n: mean over the group of q.k */
} lg_tile;

/* Lanes of one KV head of one run of rows. Lane j: row j / group of the run, head j % group. */
typedef struct lg_flash {
    const float *q;          /* first row of the run, first head of the group */
    float *out;
    int64_t ld;              /* floats from row to row */
    const int64_t *idx;      /* [rows of the run]: row sees 0..idx */
    const uint8_t *k, *v;
    const int32_t *page;
    int32_t head, n_head_kv, group, head_dim;
    int64_t row_bytes;
    lg_dtype dtype;
    float scale2;
    int64_t lane0, n_lane;   /* this call: n_lane <= LG_FLASH_GROUP * LG_FLASH_LANES */
    float *peak;             /* NULL, or as peak() has it for the lanes [peak0, peak1) of the run, which flash() leaves there */
    int64_t peak0, peak1;
    void *scratch;
} lg_flash;

typedef struct lg_attend_kernels {
    void (*tile)(const lg_tile *t);
    void (*flash)(const lg_flash *f);
    int64_t (*flash_bytes)(int32_t head_dim);
    void (*peak)(const lg_flash *f, float *peak); /* n_lane <= LG_FLASH_LANES; peak: [2][LG_FLASH_LANES] maxima and 1 / sums, 0 for lanes beyond n_lane */
    void (*mass)(const lg_flash *f, const float *peak, int64_t page, int64_t end, float weight, float *mass); /* all lanes: peak of each tile; mass[t]
                                                  * += weight * sum over lanes, for the tokens of pages [page, end) */
} lg_attend_kernels;

extern const lg_attend_kernels lg_attend_scalar, lg_attend_avx2, lg_attend_avx512, lg_attend_bf16; /* bf16: no tile */

/* The k largest of n scores, equal ones by position: writes their positions + base ascending. 0 <= k <= n; -0 equals +0.
 * work: [n] words. */
void lg_attend_topk_scalar(int32_t *out, const float *score, int64_t n, int64_t k, int32_t base, uint32_t *work);
void lg_attend_topk_avx2(int32_t *out, const float *score, int64_t n, int64_t k, int32_t base, uint32_t *work);
void lg_attend_topk_avx512(int32_t *out, const float *score, int64_t n, int64_t k, int32_t base, uint32_t *work);
#endif
