/* What the files of prefill share. prefill.cu cuts the rows into tiles and picks a kernel; prefill_mma.cu, prefill_wgmma.cu and
 * prefill_f32.cu hold the kernels.
 *
 * Packed rows: the `group` query heads of one KV head read the same keys, so row r and head-in-group j of a run become packed
 * row r*group + j. A tile is BM consecutive packed rows of one run; it walks the cache page by page (a page of one head is one
 * contiguous block of LG_PAGE rows) with an online softmax. idx ascends inside a run, so a tile ends at the page of its last row.
 * The list of tiles travels as a kernel parameter: no copy, no memory that a later launch could overwrite too early.
 * Where the tiles are too few to fill the device, each is split along the cache (n_split); the parts meet in merge. */
#ifndef LG_CUDA_PREFILL_CUH
#define LG_CUDA_PREFILL_CUH
#include "ops/cuda/cuda.h"

enum { LG_PREFILL_ITEMS = 1000, LG_PREFILL_SPLIT = 32 };

typedef struct lg_prefill_item {
    int32_t row0;     /* first row of the run */
    int32_t p0, n_p;  /* first packed row of the tile; packed rows of the run */
    int32_t seq;
    int32_t n_page;   /* pages up to the last row's idx */
} lg_prefill_item;

typedef struct lg_prefill_args {
    float *out; const float *q;          /* [n_tok, n_head*head_dim] */
    const uint8_t *k, *v;
    const lg_cuda_seq *seqs; const int64_t *idx;
    int64_t row_bytes;
    float *part_o, *part_lse;            /* n_split > 1: [block][BM][head_dim], [block][BM] (log2 of the sum of exp2) */
    int32_t n_head, n_head_kv, head_dim, group;
    int32_t n_item, n_split;             /* block = (head*n_item + item)*n_split + split */
    int32_t stages;                      /* shared-memory buffers of K and V: 1 or 2 */
    float scale, scale_log2;             /* scale_log2 = scale * log2(e) */
    lg_prefill_item item[LG_PREFILL_ITEMS];
} lg_prefill_args;                       /* kernel parameters may take 32,764 bytes */

/* Each: can this kernel serve the geometry on this device; packed rows of a tile; launch of all tiles in a->item. */
bool lg_prefill_mma_fits(const lg_cuda_env *e, const lg_kv_geom *g);
int lg_prefill_mma_rows(const lg_kv_geom *g);
void lg_prefill_mma_launch(const lg_cuda_env *e, const lg_kv_geom *g, lg_prefill_args *a);
bool lg_prefill_wgmma_fits(const lg_cuda_env *e, const lg_kv_geom *g); /* rows of a tile as mma's: 128 */
bool lg_prefill_wgmma_launch(const lg_cuda_env *e, const lg_kv_geom *g, const lg_prefill_args *a); /* false: the driver refused the tensor map */
bool lg_prefill_f32_fits(const lg_cuda_env *e, const lg_kv_geom *g);
int lg_prefill_f32_rows(const lg_kv_geom *g);
void lg_prefill_f32_launch(const lg_cuda_env *e, const lg_kv_geom *g, lg_prefill_args *a);

/* Which kernel serves 16-bit and 8-bit caches: -1 not asked yet, 0 the fastest that fits, 1 mma.sync, 2 wgmma where it fits, 3 the f32 kernel.
 * Set from the environment variable LG_PREFILL = mma, wgmma or f32 at the first call; for measurements. */
extern int lg_prefill_choice;
enum { LG_PREFILL_DEFAULT = 2 }; /* what 0 means: wgmma where it fits, else mma */
#endif
