/* Sampling on the device: the id that lg_ops_sample draws, with one id a row to read back. Nothing is sorted: the ids in order of
 * logits are searched for the first at which a running sum (a count for top-k, weights for top-p and for the draw) exceeds a
 * target. Keys of 32 bits are searched by 11, 11 and 10 bits: a pass sums counts and weights per bin of the interval, and the last
 * block that is done with it finds the bin. Sums are whole numbers (ops/sample.h), so no order of adding changes them.
 *
 *   s_begin   clears what is kept between the passes
 *   s_top     the greatest logit; a row without a draw ends here
 *   s_count   pass 0 (bins of all keys, shared by all searches), then two passes for each search
 *   s_pick    of the ids with the key found, the one at the place found
 *
 * A block takes LG_PIECE logits of a row and reads them again in every pass: they lie in L2. */
#include "ops/cuda/cuda.h"
#include "ops/cuda/decode_ptx.cuh"
#include "ops/sample.h"
#ifdef LG_CUDA_EMU
#define RUN(kernel, grid, e, ...) LG_LAUNCH(kernel, grid, S_THREADS, sizeof(s_shared), (e)->stream, __VA_ARGS__)
static inline void lg_pdl_wait() {}
static inline void lg_pdl_go() {}
#else
#include "ops/cuda/product.cuh"
#define RUN(kernel, grid, e, ...) lg_cuda_launch(kernel, grid, dim3(S_THREADS), sizeof(s_shared), (e)->stream, true, __VA_ARGS__)
#endif

enum { S_THREADS = 256, S_EACH = 8, LG_PIECE = S_THREADS * S_EACH, S_BINS = 2048, S_BIN_EACH = S_BINS / S_THREADS, S_ROWS = LG_DRAWN_ROWS,
       S_HALF = LG_WEIGHT_BITS / 2 /* weights are summed in two halves of 32-bit counters: 2048 * 2^20 fits */ };
typedef unsigned long long u64; /* what the atomics take */

typedef struct s_bins { u64 mass[S_BINS]; uint32_t count[S_BINS]; } s_bins;
typedef enum s_phase { S_TOP_K, S_TOP_P, S_DRAW, S_PICK, S_DONE } s_phase;
typedef struct s_row {
    u64 best;              /* key of the greatest logit << 32 | ~id */
    u64 all, likely;       /* weights of the ids top-k leaves; of those with min_weight */
    u64 target;            /* of the search under way: a count (S_TOP_K) or a mass */
    u64 before_mass, before_count; /* of the ids before the interval [low, low + bins << shift) of keys */
    u64 kept;
    uint32_t low, shift;
    s_phase phase;
    uint32_t arrived;
    int64_t place;         /* S_PICK: among the ids with key `low` */
} s_row;
typedef struct s_shared {
    uint32_t count[S_BINS], low[S_BINS], high[S_BINS];
    u64 scan[2][S_THREADS];
    uint32_t flag[LG_PIECE / 32]; /* ids of this piece that are penalised */
    u64 found_mass, found_count;
    uint32_t bin, last;
} s_shared;
typedef struct s_args {
    int32_t *id, *draws; const int32_t *drawn; const float *logits; int64_t n_vocab; /* draws, drawn: of lg_cuda_env */
    const lg_draw *draw; const int32_t *recent;
    s_row *row; s_bins *whole, *part; /* [n_row] */
    uint32_t *same;                   /* [n_row, n_piece] ids with the key found */
    int32_t n_piece;
} s_args;

static __device__ __forceinline__ void s_put(const s_args &a, int32_t id) {
    a.id[blockIdx.y] = id;
    if (a.draws) a.draws[blockIdx.y] = id;
}

/* This thread's logits of a piece, penalised: x[j] has id first + j * stride; the piece may reach past the row. */
static __device__ void s_load(const s_args &a, s_shared *sh, float x[S_EACH], int64_t piece, int64_t first, int stride) {
    const int64_t r = blockIdx.y, p0 = piece * LG_PIECE;
    const lg_draw *d = a.draw + r;
    const bool marks = d->penalty != 1.0f && d->n_recent > 0;
    if (marks) {
        for (int i = threadIdx.x; i < LG_PIECE / 32; i += S_THREADS) sh->flag[i] = 0;
        __syncthreads();
        if ((int)threadIdx.x < d->n_recent) {
            const int32_t id = a.recent[r * LG_RECENT + threadIdx.x];
            const int64_t at = (id < 0 ? a.drawn[-1 - id] : id) - p0;
            if (at >= 0 && at < LG_PIECE) atomicOr(&sh->flag[at / 32], 1u << at % 32);
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < S_EACH; j++) {
        const int64_t i = first + (int64_t)j * stride;
        x[j] = i < a.n_vocab ? a.logits[r * a.n_vocab + i] : 0.0f;
        if (marks && i < a.n_vocab && (sh->flag[(i - p0) / 32] >> (i - p0) % 32 & 1)) x[j] = lg_sample_penalised(x[j], d->penalty);
    }
}

/* True in all threads of the last of the row's blocks; what the others wrote can then be read (past L1). */
static __device__ bool s_last(s_row *r, s_shared *sh) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        sh->last = atomicAdd(&r->arrived, 1u) + 1 == gridDim.x;
        if (sh->last) r->arrived = 0;
    }
    __syncthreads();
    if (!sh->last) return false;
    __threadfence();
    return true;
}

/* Sums of all threads before this one. */
static __device__ u64 s_before(u64 mine, u64 *scan) {
    const int t = threadIdx.x;
    scan[t] = mine;
    for (int d = 1; d < S_THREADS; d *= 2) {
        __syncthreads();
        const u64 other = t >= d ? scan[t - d] : 0;
        __syncthreads();
        scan[t] += other;
    }
    __syncthreads();
    return t ? scan[t - 1] : 0;
}
static __device__ u64 s_sum(u64 mine, u64 *scan) { /* of the block, in all threads */
    s_before(mine, scan);
    const u64 all = scan[S_THREADS - 1];
    __syncthreads();
    return all;
}

/* The bin, from the highest down, at which the running sum exceeds the target: the search goes on inside it. */
static __device__ void s_find(s_row *r, s_shared *sh, const s_bins *b) {
    const int top = S_BINS - 1 - (int)threadIdx.x * S_BIN_EACH;
    const bool by_count = r->phase == S_TOP_K;
    u64 mass[S_BIN_EACH], count[S_BIN_EACH], m = 0, n = 0;
#pragma unroll
    for (int i = 0; i < S_BIN_EACH; i++) {
        m += mass[i] = __ldcg(&b->mass[top - i]);
        n += count[i] = __ldcg(&b->count[top - i]);
    }
    m = r->before_mass + s_before(m, sh->scan[0]);
    n = r->before_count + s_before(n, sh->scan[1]);
#pragma unroll
    for (int i = 0; i < S_BIN_EACH; i++) {
        const u64 at = by_count ? n : m, own = by_count ? count[i] : mass[i];
        if (at <= r->target && r->target - at < own) { /* one bin */
            sh->bin = (uint32_t)(top - i);
            sh->found_mass = m;
            sh->found_count = n;
        }
        m += mass[i];
        n += count[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        r->before_mass = sh->found_mass;
        r->before_count = sh->found_count;
        r->low += sh->bin << r->shift;
        r->shift = r->shift == 21 ? 10 : 0;
    }
    __syncthreads();
}

/* The search that comes next, begun with the bins of all keys. */
static __device__ void s_next(const s_args &a, s_shared *sh, s_phase phase) {
    s_row *r = a.row + blockIdx.y;
    const lg_draw *d = a.draw + blockIdx.y;
    if (phase == S_TOP_K && (d->top_k <= 0 || d->top_k >= a.n_vocab)) phase = S_TOP_P;
    if (phase == S_TOP_P && !(d->top_p < 1)) phase = S_DRAW;
    if (threadIdx.x == 0) {
        r->phase = phase;
        r->low = 0;
        r->shift = 21;
        r->before_mass = r->before_count = 0;
        const u64 likely = __ldcg(&r->likely), kept = likely < r->kept ? likely : r->kept;
        r->target = phase == S_TOP_K ? (u64)d->top_k - 1 : phase == S_TOP_P ? lg_sample_need(d->top_p, r->all) - 1 : __umul64hi(d->random, kept);
    }
    __syncthreads();
    s_find(r, sh, a.whole + blockIdx.y);
}

static __global__ void __launch_bounds__(S_THREADS) s_begin(const __grid_constant__ s_args a) {
    lg_pdl_wait();
    lg_pdl_go();
    s_bins *const bins[2] = { a.whole + blockIdx.y, a.part + blockIdx.y };
    for (int i = threadIdx.x; i < S_BINS; i += S_THREADS)
        for (int k = 0; k < 2; k++) {
            bins[k]->mass[i] = 0;
            bins[k]->count[i] = 0;
        }
    if (threadIdx.x == 0) {
        s_row *r = a.row + blockIdx.y;
        r->best = r->likely = 0;
        r->arrived = 0;
    }
}

static __global__ void __launch_bounds__(S_THREADS) s_top(const __grid_constant__ s_args a) {
    LG_SMEM(smem);
    s_shared *sh = (s_shared *)(void *)smem;
    s_row *r = a.row + blockIdx.y;
    const int64_t first = (int64_t)blockIdx.x * LG_PIECE + threadIdx.x;
    float x[S_EACH];
    u64 best = 0;
    lg_pdl_wait();
    lg_pdl_go();
    s_load(a, sh, x, blockIdx.x, first, S_THREADS);
#pragma unroll
    for (int j = 0; j < S_EACH; j++) {
        const int64_t i = first + j * S_THREADS;
        const u64 k = (u64)lg_sample_key(x[j]) << 32 | (0xffffffffu - (uint32_t)i);
        if (i < a.n_vocab && k > best) best = k;
    }
#pragma unroll
    for (int m = 16; m; m >>= 1) {
        const u64 o = __shfl_xor_sync(0xffffffffu, best, m);
        best = o > best ? o : best;
    }
    if ((threadIdx.x & 31) == 0) atomicMax(&r->best, best);
    if (!s_last(r, sh) || threadIdx.x) return;
    const bool draws = a.draw[blockIdx.y].scale != 0;
    r->phase = draws ? S_TOP_K : S_DONE; /* (of the first search; pass 0 serves any) */
    r->low = 0;
    r->shift = 21;
    if (!draws) s_put(a, (int32_t)(0xffffffffu - (uint32_t)__ldcg(&r->best)));
}

/* pass 0: all keys; later ones: the interval the row's search has come to, and the search after it where it ends. */
static __global__ void __launch_bounds__(S_THREADS) s_count(const __grid_constant__ s_args a, int pass) {
    LG_SMEM(smem);
    s_shared *sh = (s_shared *)(void *)smem;
    s_row *r = a.row + blockIdx.y;
    const lg_draw *d = a.draw + blockIdx.y;
    const int64_t first = (int64_t)blockIdx.x * LG_PIECE + threadIdx.x;
    float x[S_EACH];
    lg_pdl_wait();
    lg_pdl_go();
    if (r->phase >= S_PICK) return;
    s_bins *bins = (pass ? a.part : a.whole) + blockIdx.y;
    const uint32_t low = r->low, shift = r->shift, n_bin = shift ? S_BINS : 1024;
    const uint32_t top = (uint32_t)(r->best >> 32);
    u64 likely = 0;
    for (int i = threadIdx.x; i < S_BINS; i += S_THREADS) sh->count[i] = sh->low[i] = sh->high[i] = 0;
    s_load(a, sh, x, blockIdx.x, first, S_THREADS);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < S_EACH; j++) {
        const uint32_t key = lg_sample_key(x[j]), bin = (key - low) >> shift;
        if (first + j * S_THREADS >= a.n_vocab || key < low || bin >= n_bin) continue;
        const u64 w = lg_sample_weight(key, top, d->scale);
        if (w >= d->min_weight) likely += w;
        atomicAdd(&sh->count[bin], 1u);
        if (w) {
            atomicAdd(&sh->low[bin], (uint32_t)w & ((1u << S_HALF) - 1));
            atomicAdd(&sh->high[bin], (uint32_t)(w >> S_HALF));
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < S_BINS; i += S_THREADS)
        if (sh->count[i]) {
            atomicAdd(&bins->mass[i], (u64)sh->low[i] + ((u64)sh->high[i] << S_HALF));
            atomicAdd(&bins->count[i], sh->count[i]);
        }
    if (pass == 0) {
        likely = s_sum(likely, sh->scan[0]);
        if (threadIdx.x == 0) atomicAdd(&r->likely, likely);
    }
    if (!s_last(r, sh)) return;
    if (pass == 0) {
        u64 all = 0;
        for (int i = threadIdx.x; i < S_BINS; i += S_THREADS) all += __ldcg(&bins->mass[i]);
        all = s_sum(all, sh->scan[0]);
        if (threadIdx.x == 0) r->all = r->kept = all;
        __syncthreads();
        s_next(a, sh, S_TOP_K);
        return;
    }
    const bool ends = shift == 0;
    s_find(r, sh, bins);
    for (int i = threadIdx.x; i < S_BINS; i += S_THREADS) {
        bins->mass[i] = 0;
        bins->count[i] = 0;
    }
    if (!ends) return;
    const s_phase phase = r->phase;
    __syncthreads();
    if (threadIdx.x == 0) { /* `low` is the key: equal logits are one weight each */
        const u64 w = lg_sample_weight(r->low, top, d->scale);
        r->place = (int64_t)(phase == S_TOP_K ? r->target - r->before_count : (r->target - r->before_mass) / w);
        if (phase != S_DRAW) r->kept = r->before_mass + w * (u64)(r->place + 1);
        if (phase == S_TOP_K) r->all = r->kept;
        if (phase == S_DRAW) r->phase = S_PICK;
    }
    __syncthreads();
    if (phase != S_DRAW) s_next(a, sh, phase == S_TOP_K ? S_TOP_P : S_DRAW);
}

/* Ids of equal logits are told apart by their order: counts per piece, then the piece that has the one at the place. */
static __global__ void __launch_bounds__(S_THREADS) s_pick(const __grid_constant__ s_args a) {
    LG_SMEM(smem);
    s_shared *sh = (s_shared *)(void *)smem;
    s_row *r = a.row + blockIdx.y;
    uint32_t *same = a.same + (int64_t)blockIdx.y * a.n_piece;
    float x[S_EACH];
    lg_pdl_wait();
    lg_pdl_go();
    if (r->phase != S_PICK) return;
    const uint32_t key = r->low;
    int64_t piece = blockIdx.x, left = r->place;
    for (int turn = 0; turn < 2; turn++) {
        const int64_t first = piece * LG_PIECE + (int64_t)threadIdx.x * S_EACH; /* consecutive ids, in the order of threads */
        u64 mine = 0;
        s_load(a, sh, x, piece, first, 1);
#pragma unroll
        for (int j = 0; j < S_EACH; j++) mine += first + j < a.n_vocab && lg_sample_key(x[j]) == key;
        u64 at = s_before(mine, sh->scan[0]);
        if (turn == 0) {
            if (threadIdx.x == S_THREADS - 1) same[piece] = (uint32_t)(at + mine);
            if (!s_last(r, sh)) return;
            for (piece = 0; left >= (int64_t)__ldcg(&same[piece]); piece++) left -= (int64_t)__ldcg(&same[piece]);
            continue;
        }
#pragma unroll
        for (int j = 0; j < S_EACH; j++)
            if (first + j < a.n_vocab && lg_sample_key(x[j]) == key && at++ == (u64)left) s_put(a, (int32_t)(first + j));
    }
}

int64_t lg_cuda_sample_scratch(int64_t n_row, int64_t n_vocab) {
    const int64_t rows = n_row < S_ROWS ? n_row : (int64_t)S_ROWS, pieces = (n_vocab + LG_PIECE - 1) / LG_PIECE;
    return rows * (int64_t)(2 * sizeof(s_bins) + sizeof(s_row) + (size_t)pieces * sizeof(uint32_t));
}

void lg_cuda_sample(const lg_cuda_env *e, const lg_op_sample *a, bool top_k, bool top_p) {
    const int64_t pieces = (a->n_vocab + LG_PIECE - 1) / LG_PIECE;
    for (int64_t r0 = 0; r0 < a->n_row; r0 += S_ROWS) {
        const unsigned rows = (unsigned)(a->n_row - r0 < S_ROWS ? a->n_row - r0 : (int64_t)S_ROWS);
        s_bins *whole = (s_bins *)(void *)e->scratch, *part = whole + rows;
        s_row *row = (s_row *)(void *)(part + rows);
        const s_args s = { a->id + r0, r0 ? NULL : e->draws, e->drawn, a->logits + r0 * a->n_vocab, a->n_vocab, a->draw + r0, a->recent + r0 * LG_RECENT, row, whole, part,
                           (uint32_t *)(void *)(row + rows), (int32_t)pieces };
        const dim3 grid((unsigned)pieces, rows);
        const int passes = 1 + 2 * (1 + top_k + top_p);
        RUN(s_begin, dim3(1, rows), e, s);
        RUN(s_top, grid, e, s);
        for (int p = 0; p < passes; p++) RUN(s_count, grid, e, s, p);
        RUN(s_pick, grid, e, s);
    }
}
