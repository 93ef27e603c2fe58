/* cuda: what the files of the CUDA back end share. core.cu owns the context, recording, graphs and memory; product.cu the
 * weights; decode.cu attention of one row per sequence and selection; prefill.cu attention of many rows; observe.cu attention mass.
 *
 * Ops are recorded (arguments copied), run at sync or submit. Then every host array an op points to is staged in one pinned block in
 * order of first appearance and goes up in ONE copy, so a step of the same shape always finds it at the same device address;
 * page tables have persistent device twins of which only changed entries go up. A list that equals an earlier one in ops,
 * shapes and addresses is replayed as a CUDA graph: lengths, budgets, pages and ids are device data, never grid sizes.
 * Launchers below therefore get device pointers only, enqueue on the given stream, allocate nothing and never synchronise. */
#ifndef LG_CUDA_H
#define LG_CUDA_H
#include <cuda_runtime.h>
extern "C" {
#include "ops/ops.h"
}

typedef struct lg_cuda_seq { const int32_t *page; int64_t len; const uint32_t *kept; } lg_cuda_seq; /* device twin of lg_kv_seq */

typedef struct lg_cuda_env {
    cudaStream_t stream;      /* the step */
    int n_sm, cc;             /* multiprocessors; compute capability 90 = 9.0 */
    int64_t smem_max;         /* shared memory a block may opt in to */
    lg_compute compute;       /* F32: products and sums in f32 without TF32, q not rounded */
    uint8_t *scratch; int64_t scratch_bytes; /* for the launcher of one op; reused by the next op on the same stream */
    int32_t *draws;           /* device [LG_DRAWN_ROWS]: where this list's argmax or sample op leaves its ids, too, or NULL */
    const int32_t *drawn;     /* the same of the list before */
} lg_cuda_env;

/* Heads of one token as the products leave them, where 32 bits are LG_CUDA_ABSENT until a number is there (no product leaves such a NaN): attention does what is left, so
 * that no kernel stands between: biases (or NULL), rotation, K and V into the cache. clear: [n_clear] numbers, in fours, that it makes absent, of an op before. */
typedef struct lg_cuda_raw {
    const float *q, *k, *v, *bq, *bk, *bv, *cs, *sn; /* [n_head*head_dim], [n_head_kv*head_dim], cosines and sines [head_dim/2] */
    float *clear; int32_t n_clear;
    bool interleaved;
} lg_cuda_raw;
#define LG_CUDA_ABSENT 0xFFFFFFFFu
/* A counter on the device: 0 when a step begins, n when what it stands for has been written. at NULL: none. */
typedef struct lg_cuda_count { uint32_t *at; uint32_t n; } lg_cuda_count;

/* ---- decode.cu: one row per sequence ----
 * q, out: [n_seq, n_head*head_dim] f32. Per (sequence, KV head) the work is its tokens; a fixed persistent grid cuts the sum of all
 * work into equal bytes in-kernel from device lengths (prefix sums), partial results merge by log-sum-exp.
 * Dense: read, make NULL. Hybrid: fields as in lg_op_attend_hybrid. */
typedef struct lg_cuda_decode {
    float *out; const float *q;
    uint16_t *rows;                      /* where out goes, too, as bf16 (lg_beside_at of product.cuh), or NULL; only where lg_cuda_decode_leaves says so */
    lg_kv_layer kv; lg_kv_geom geom;
    const lg_cuda_seq *seqs; int32_t n_seq, n_head;
    float scale;
    const int32_t *read, *make;          /* device [n_head_kv], NULL: dense */
    const int64_t *budget; const uint8_t *dense; /* device [n_seq] */
    lg_sets sets; lg_select select;      /* sets.idx, sets.n: device */
    const int32_t *read_host, *make_host; /* the same on the host: fixed for a graph (they are part of its key) */
    lg_spread spread;                    /* host memory, fixed for a graph; with slot at most LG_CUDA_SPREAD heads, LG_CUDA_SETS sets made and latest slots */
    int64_t max_len;                     /* capacity (reserve's max_len), not the current length */
    float *score;                        /* device [n_seq, n_head_kv, max_len]: raw scores of heads that make a set */
    bool sized; /* hybrid: a set that is read holds what lg_cuda_span says, with the share of its slot in `spread`: the kernel need not wait to know how much */
    bool early; /* the op before it in the stream wrote q and the newest row of each sequence and nothing else read here, and its first kernel
                 * let dependents start only after its own wait: rows of old tokens may be read before the op ends */
    /* raw.q given (only where lg_cuda_decode_raw says so): the kernels that this one comes behind, one that writes the raw heads and selection, may both still be at work
     * when it starts, as long as all their blocks have started (a block that waits would otherwise keep one of them from starting). */
    lg_cuda_raw raw;
    lg_cuda_count made;                  /* then: the sets that are read have been made; at NULL: they were before */
    uint32_t *making;                    /* selection: each block adds 1 when its part of the sets is written, or NULL */
    bool release; /* the kernel behind it takes a whole multiprocessor for a block: its blocks may start as those of this one leave (smaller
                   * ones would gather on the few that are free first) */
} lg_cuda_decode;
int64_t lg_cuda_decode_scratch(const lg_cuda_env *e, int64_t n_seq, int32_t n_head, const lg_kv_geom *g); /* bytes of env.scratch */
void lg_cuda_decode_attend(const lg_cuda_env *e, const lg_cuda_decode *a);
bool lg_cuda_decode_raw(const lg_cuda_env *e, const lg_cuda_decode *a); /* whether it would take raw heads; a->raw is not looked at */
bool lg_cuda_decode_leaves(const lg_cuda_decode *a); /* whether it can leave rows, which is not looked at: blocks share the numbers of a KV head in whole sixteens */
enum { LG_CUDA_SPREAD = 128, LG_CUDA_SETS = 256 }; /* of a layer */
/* lg_ops_share in a kernel; least -1: no shares. The second: of numbers that fit, for code that runs once and must be short. */
static __device__ __forceinline__ int64_t lg_cuda_share(int64_t budget, int64_t least, int32_t share) {
    return least >= 0 && budget > least ? least + (budget - least) * share / LG_SHARE_ONE : budget;
}
static __device__ __forceinline__ int32_t lg_cuda_share(int32_t budget, int32_t least, int32_t share) {
    const uint64_t more = (uint64_t)(uint32_t)(budget - least) * (uint32_t)share / LG_SHARE_ONE;
    return least >= 0 && budget > least ? (more < (uint32_t)(INT32_MAX - least) ? least + (int32_t)more : INT32_MAX) : budget;
}
/* topk and ratio, in blocks of 1 << shift tokens: of n blocks the first `head` and those from `tail` on are in, and k of those between. I: int64_t, or int32_t for
 * lengths below 2^31 - 2^shift. */
template <typename I> struct lg_cuda_span_as { I n, head, tail, k; };
typedef lg_cuda_span_as<int64_t> lg_cuda_span;
template <typename I> static __device__ __forceinline__ lg_cuda_span_as<I> lg_cuda_span_of(I len, I budget, I sinks, I recents, int32_t shift) {
    lg_cuda_span_as<I> s;
    const I rest = ((I)1 << shift) - 1;
    sinks = sinks < 0 ? 0 : sinks < len ? sinks : len;
    recents = recents < 0 ? 0 : recents < len ? recents : len;
    s.n = (len + rest) >> shift;
    s.head = (sinks + rest) >> shift;
    s.tail = recents ? (len - recents) >> shift : s.n;
    if (s.tail < s.head) s.tail = s.head;
    s.k = (budget >> shift) - s.head - (s.n - s.tail);
    if (s.k > s.tail - s.head) s.k = s.tail - s.head;
    if (s.k < 0) s.k = 0;
    return s;
}
/* Picks the sets of all (sequence, head with make >= 0) of this layer from a->score, and (topk, ratio) the latest slots; enqueued on `stream`, which core.cu forks
 * from and joins to the step's stream so that selection runs beside the layer's products; it uses `scratch` of its own (about 7
 * bytes a token of max_len and 50 KB for each set). Its kernel lets dependents start when all its blocks have. Returns how many add to a->making. */
int64_t lg_cuda_select_scratch(const lg_cuda_env *e, int64_t n_seq, int32_t n_make, int64_t max_len); /* n_make: sets made from scores, or KV heads */
uint32_t lg_cuda_decode_select(const lg_cuda_env *e, const lg_cuda_decode *a, cudaStream_t stream, uint8_t *scratch);

/* ---- prefill.cu: rows that extend their sequences (not captured: host data may shape the grid) ----
 * Runs of consecutive rows of one sequence; idx ascending inside a run, row t sees cache rows 0..idx[t] (idx need not be consecutive). */
typedef struct lg_cuda_prefill {
    float *out; const float *q;          /* [n_tok, n_head*head_dim] f32 */
    lg_kv_layer kv; lg_kv_geom geom;
    const lg_cuda_seq *seqs; int32_t n_seq; /* device */
    const int32_t *seq; const int64_t *idx; /* device [n_tok] */
    const int32_t *seq_host; const int64_t *idx_host; /* the same on the host */
    int64_t n_tok; int32_t n_head; float scale;
} lg_cuda_prefill;
int64_t lg_cuda_prefill_scratch(const lg_cuda_env *e, int64_t n_tok, int32_t n_head, const lg_kv_geom *g);
void lg_cuda_prefill_attend(const lg_cuda_env *e, const lg_cuda_prefill *a);

/* ---- observe.cu: lg_op_observe with device pointers (seq is a lg_cuda_seq) over a sequence of len tokens; the same bits every time ---- */
int64_t lg_cuda_observe_scratch(int64_t n_tok, int64_t len, int32_t n_head); /* bytes of env.scratch */
void lg_cuda_observe(const lg_cuda_env *e, const lg_op_observe *a, int64_t len);

/* ---- sample.cu: lg_op_sample with device pointers, id in mapped memory. top_k, top_p: some row has that limit. ---- */
int64_t lg_cuda_sample_scratch(int64_t n_row, int64_t n_vocab); /* bytes of env.scratch */
void lg_cuda_sample(const lg_cuda_env *e, const lg_op_sample *a, bool top_k, bool top_p);

/* ---- cache rows, shared device code: see kv.cuh (load and store of rows of every lg_kv_geom dtype) ---- */
#endif
