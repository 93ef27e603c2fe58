/* Attention of many rows over the paged cache: the work list, the choice of kernel, the merge of split tiles. */
#include <stdlib.h>
#include <string.h>
#include "ops/cuda/prefill.cuh"

int lg_prefill_choice = -1;

enum { KERNEL_MMA, KERNEL_WGMMA, KERNEL_F32 };

static int choose(const lg_cuda_env *e, const lg_kv_geom *g) {
    if (lg_prefill_choice < 0) {
        const char *s = getenv("LG_PREFILL");
        lg_prefill_choice = !s ? 0 : !strcmp(s, "mma") ? 1 : !strcmp(s, "wgmma") ? 2 : !strcmp(s, "f32") ? 3 : 0;
    }
    if (e->compute == LG_COMPUTE_F32 || g->dtype == LG_DTYPE_F32 || lg_prefill_choice == 3) return KERNEL_F32;
    if ((lg_prefill_choice ? lg_prefill_choice : LG_PREFILL_DEFAULT) == 2 && lg_prefill_wgmma_fits(e, g)) return KERNEL_WGMMA;
    return lg_prefill_mma_fits(e, g) ? KERNEL_MMA : KERNEL_F32;
}

/* ---- merge of split tiles: one warp a packed row ---- */
__global__ void merge_kernel(const __grid_constant__ lg_prefill_args a, int bm) {
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, m = (int)blockIdx.y * 4 + warp;
    const int head = (int)blockIdx.x / a.n_item;
    const lg_prefill_item w = a.item[(int)blockIdx.x - head * a.n_item];
    const int p = w.p0 + m;
    if (m >= bm || p >= w.n_p) return;
    const int64_t slot = (int64_t)blockIdx.x * a.n_split;
    const float lse = lane < a.n_split ? a.part_lse[(slot + lane) * bm + m] : -INFINITY;
    float max = lse;
    for (int o = 16; o; o >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, o));
    const float share = exp2f(lse - max); /* a row sees position 0: the first part is never empty, max is finite */
    float sum = share;
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    const float inv = 1.0f / sum;
    const int row = p / a.group, g = p - row * a.group;
    float *out = a.out + ((int64_t)(w.row0 + row) * a.n_head + head * a.group + g) * a.head_dim;
    for (int d0 = 0; d0 < a.head_dim; d0 += 32) {
        float s = 0.0f;
        for (int i = 0; i < a.n_split; i++) {
            const float part = __shfl_sync(~0u, share, i);
            if (d0 + lane < a.head_dim && part > 0.0f) s += part * a.part_o[((slot + i) * bm + m) * a.head_dim + d0 + lane];
        }
        if (d0 + lane < a.head_dim) out[d0 + lane] = s * inv;
    }
}

/* ---- work list ---- */

/* Longest first, so that the last blocks to start are short. Shell sort: no memory, and the usual list (one run) is reversed first. */
static void heavy_first(lg_prefill_item *item, int n) {
    for (int i = 0, j = n - 1; i < j; i++, j--) {
        const lg_prefill_item t = item[i];
        item[i] = item[j];
        item[j] = t;
    }
    static const int gaps[] = { 301, 132, 57, 23, 10, 4, 1 };
    for (size_t k = 0; k < sizeof gaps / sizeof *gaps; k++)
        for (int i = gaps[k]; i < n; i++) {
            const lg_prefill_item t = item[i];
            int j = i;
            for (; j >= gaps[k] && item[j - gaps[k]].n_page < t.n_page; j -= gaps[k]) item[j] = item[j - gaps[k]];
            item[j] = t;
        }
}

static int64_t part_slots(const lg_cuda_env *e) { return 4 * (int64_t)e->n_sm; }
static int64_t part_bytes(const lg_cuda_env *e, int64_t rows, int64_t head_dim) {
    return part_slots(e) * rows * (head_dim + 1) * (int64_t)sizeof(float);
}

int64_t lg_cuda_prefill_scratch(const lg_cuda_env *e, int64_t n_tok, int32_t n_head, const lg_kv_geom *g) {
    (void)n_tok; (void)n_head;
    if (!lg_prefill_f32_fits(e, g)) return -1; /* head too wide for this device */
    return part_bytes(e, 128, g->head_dim);
}

/* Splits every tile of a short list along the cache, so that its blocks fill whole waves: `at_once` blocks run together, a split costs 2%
 * (partial results written and merged), a part has at least 8 pages. */
static void split(const lg_cuda_env *e, lg_prefill_args *a, int bm, int64_t at_once) {
    const int64_t blocks = (int64_t)a->n_item * a->n_head_kv;
    int64_t longest = 0;
    for (int i = 0; i < a->n_item; i++) longest = a->item[i].n_page > longest ? a->item[i].n_page : longest;
    if (blocks >= 2 * at_once || e->scratch_bytes < part_bytes(e, bm, a->head_dim)) return;
    double best = (double)((blocks + at_once - 1) / at_once);
    for (int64_t n = 2; n <= LG_PREFILL_SPLIT && n <= longest / 8 && blocks * n <= part_slots(e); n++) {
        const double time = (double)((blocks * n + at_once - 1) / at_once) / (double)n * (1.0 + 0.02 * (double)(n - 1));
        if (time < best) {
            best = time;
            a->n_split = (int32_t)n;
        }
    }
    a->part_o = (float *)e->scratch;
    a->part_lse = a->part_o + part_slots(e) * bm * a->head_dim;
}

static void launch(const lg_cuda_env *e, const lg_kv_geom *g, lg_prefill_args *a, int kernel, int bm) {
    a->n_split = 1;
    heavy_first(a->item, a->n_item);
    if (kernel == KERNEL_F32) {
        lg_prefill_f32_launch(e, g, a);
        return;
    }
    split(e, a, bm, (int64_t)e->n_sm * (kernel == KERNEL_WGMMA || a->head_dim > 128 ? 1 : 2));
    if (kernel != KERNEL_WGMMA || !lg_prefill_wgmma_launch(e, g, a)) lg_prefill_mma_launch(e, g, a);
    if (a->n_split > 1)
        merge_kernel<<<dim3((unsigned)(a->n_item * a->n_head_kv), (unsigned)((bm + 3) / 4)), 128, 0, e->stream>>>(*a, bm);
}

void lg_cuda_prefill_attend(const lg_cuda_env *e, const lg_cuda_prefill *c) {
    const int kernel = choose(e, &c->geom);
    if (kernel == KERNEL_F32 && !lg_prefill_f32_fits(e, &c->geom)) { /* no kernel: leaves cudaErrorInvalidValue for the caller's check */
        cudaFuncSetAttribute(merge_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 30);
        return;
    }
    const int bm = kernel == KERNEL_F32 ? lg_prefill_f32_rows(&c->geom) : lg_prefill_mma_rows(&c->geom);
    lg_prefill_args a;
    memset(&a, 0, sizeof a);
    a.out = c->out;
    a.q = c->q;
    a.k = c->kv.k;
    a.v = c->kv.v;
    a.seqs = c->seqs;
    a.idx = c->idx;
    a.row_bytes = c->geom.row_bytes;
    a.n_head = c->n_head;
    a.n_head_kv = c->geom.n_head_kv;
    a.head_dim = c->geom.head_dim;
    a.group = c->n_head / c->geom.n_head_kv;
    a.scale = c->scale;
    a.scale_log2 = c->scale * 1.4426950408889634f;
    for (int64_t r0 = 0, r1; r0 < c->n_tok; r0 = r1) {
        for (r1 = r0 + 1; r1 < c->n_tok && c->seq_host[r1] == c->seq_host[r0] && c->idx_host[r1] >= c->idx_host[r1 - 1]; r1++) {}
        const int64_t n_p = (r1 - r0) * a.group;
        for (int64_t p0 = 0; p0 < n_p; p0 += bm) {
            const int64_t last = r0 + ((p0 + bm < n_p ? p0 + bm : n_p) - 1) / a.group;
            a.item[a.n_item++] = (lg_prefill_item){ (int32_t)r0, (int32_t)p0, (int32_t)n_p, c->seq_host[r0],
                                                    (int32_t)(c->idx_host[last] / LG_PAGE + 1) };
            if (a.n_item == LG_PREFILL_ITEMS) {
                launch(e, &c->geom, &a, kernel, bm);
                a.n_item = 0;
            }
        }
    }
    if (a.n_item > 0) launch(e, &c->geom, &a, kernel, bm);
}
