/* ops: the op table. Every back end (ref: plain C, the specification; cpu: fast; cuda) fills lg_ops.
 * An op enqueues and returns nothing; the first failure sticks and comes out at sync. Policy stays out:
 * ops know sets and lengths, not why a head is sparse. Arguments are copied by the op; arrays they point
 * to must live until sync. Matrices are row-major; destination first; activations f32. */
#ifndef LG_OPS_H
#define LG_OPS_H
#include "base/base.h"

#define LG_PAGE 64 /* tokens of one KV page */

typedef struct lg_weight {
    lg_dtype dtype;
    int64_t n_out, n_in;  /* [n_out, n_in], each row quantised along n_in */
    const void *data;     /* in the file mapping (host) */
    void *packed;         /* owned by the back end: set by weight_bind, released by weight_unbind */
    int64_t packed_bytes;
    bool lookup;          /* only embed reads it: a back end on the host need not pack it */
} lg_weight;

/* K and V of one layer: page p, head h, token t of the page: row (p*n_head_kv + h)*LG_PAGE + t, row_bytes each. */
typedef struct lg_kv_layer { uint8_t *k, *v; } lg_kv_layer;
typedef struct lg_kv_geom { lg_dtype dtype; int32_t n_head_kv, head_dim; int64_t row_bytes; } lg_kv_geom;
/* One sequence's page table for this step. Rows 0..len-1 are valid (len counts tokens appended this step). kept: what its sets keep whatever
 * the scores: device memory [n_slot][sets.kept_words], bit u % 32 of word u / 32: block u; NULL: nothing. */
typedef struct lg_kv_seq { const int32_t *page; int64_t len; const uint32_t *kept; } lg_kv_seq;

/* Low-rank addition to a product, applied beside it: y += scale * B (A x). a, b: device memory, f32. rank 0: none.
 * packed: owned by the back end, set by lora_bind (which is NULL where a back end needs none), released by lora_unbind. */
typedef struct lg_lora { int32_t rank; float scale; float *a, *b; /* [rank, n_in], [n_out, rank] */ void *packed; } lg_lora;

/* x[n_tok, d]. On back ends with `submit` an id below 0 is the one that the argmax or sample op of the list before this one, which is still under
 * way, draws in row -1 - id (of at most LG_DRAWN_ROWS). */
enum { LG_DRAWN_ROWS = 64 };
typedef struct lg_op_embed { float *x; const lg_weight *w; const int32_t *ids; int64_t n_tok; } lg_op_embed;

/* n = rmsnorm(x)*norm; q = rope(qnorm(Wq n + bq)); k, v alike; k, v rounded to the cache dtype into their rows. */
typedef struct lg_op_qkv {
    float *q;                            /* out [n_tok, n_head*head_dim], rotated */
    const float *x;                      /* [n_tok, d] */
    const float *norm; float eps;        /* [d] */
    const lg_weight *wq, *wk, *wv;
    const float *bq, *bk, *bv;           /* NULL or [n_out] */
    const float *q_norm, *k_norm;        /* NULL or [head_dim] (Qwen3; eps as above) */
    const float *rope_cos, *rope_sin;    /* [n_tok, head_dim/2] */
    bool rope_interleaved;               /* pairs (2i, 2i+1); else (i, i + head_dim/2) */
    lg_kv_layer kv; lg_kv_geom geom;
    const int32_t *dst_page, *dst_slot;  /* [n_tok] where K, V of each token go */
    int64_t n_tok; int32_t n_head;
    const lg_lora *lora_q, *lora_k, *lora_v; /* NULL: none */
    float *k_raw, *v_raw;                /* NULL, or out [n_tok, n_head_kv*head_dim]: K after bias and norm, not rotated, in half order; V */
} lg_op_qkv;

/* Ready K and V rows (memory slots) into the cache: row t, head h of k and v is src row t*n_head_kv + h. Rows of k come in half
 * order (design: what leaves the engine) and go into the cache's own order; K is rotated by rope_cos, rope_sin on the way, or
 * not at all where they are NULL; K and V are then rounded to the cache dtype. */
typedef struct lg_op_kv_write {
    lg_kv_layer kv; lg_kv_geom geom;
    const uint8_t *k, *v; lg_kv_geom src; /* device memory; src.dtype f32, bf16 or KV8 */
    const float *rope_cos, *rope_sin;    /* [n_tok, head_dim/2] or NULL */
    bool rope_interleaved;               /* the cache's order is interleaved */
    const int32_t *dst_page, *dst_slot;
    int64_t n_tok;
} lg_op_kv_write;

/* Dense causal attention of rows that extend their sequences (prefill, or dense decode).
 * Row t belongs to sequence seq[t] and sees cache rows 0..idx[t]. Rows of one sequence are consecutive, idx ascending. */
typedef struct lg_op_attend {
    float *out;                          /* [n_tok, n_head*head_dim] */
    const float *q;                      /* [n_tok, n_head*head_dim] */
    lg_kv_layer kv; lg_kv_geom geom;
    const lg_kv_seq *seqs; int32_t n_seq;
    const int32_t *seq; const int64_t *idx; /* [n_tok] */
    int64_t n_tok; int32_t n_head; float scale;
} lg_op_attend;

/* Token sets of a decode step, all in blocks of `block` tokens (1: tokens): block ids ascending.
 * Slot j of sequence s: ids at idx + (s*n_slot + j)*cap, count n[s*n_slot + j]. The last block may be partial. */
typedef struct lg_sets { int32_t *idx; int32_t *n; int64_t cap; int32_t n_slot, block; int64_t kept_words; } lg_sets;

typedef struct lg_select {               /* how retrieval heads choose; specs 1.4 */
    lg_rule rule;
    double value;                        /* topp: p, threshold: tau (topk, ratio: the caller computed budget[s]) */
    float scale;                         /* topp, threshold */
    int64_t sinks, recents;              /* topk, ratio */
    const uint32_t *kept;                /* topk, ratio: blocks that rank before all scores (one bit each), among themselves by score; NULL: none.
                                          * In ops: NULL, each slot has its own (lg_kv_seq) */
} lg_select;

/* Budgets of their own for sets and windows (docs/SPARSE.md): shares, in LG_SHARE_ONEths, of what the step's budget holds beyond `least`
 * tokens. slot NULL: everything has the step's budget and a head fills one slot. */
enum { LG_SHARE_ONE = 1024, LG_SHARE_MAX = 64 * LG_SHARE_ONE };
typedef struct lg_spread {
    const int32_t *slot;                 /* [n_slot] of a set */
    const int32_t *window;               /* [n_head_kv] of a window head */
    const int32_t *n_make;               /* [n_head_kv] head h fills slots make[h] .. make[h] + n_make[h] - 1 from the same scores */
    int64_t least;
    int32_t latest, n_latest;            /* this op also fills slots latest .. latest + n_latest - 1, where the score of a token is its position */
} lg_spread;
static inline int64_t lg_ops_share(int64_t budget, int64_t least, int64_t share) {
    return budget > least ? least + (budget - least) * share / LG_SHARE_ONE : budget;
}
/* Tokens for entry i of `slot` or `window` in a step of that budget; sets that head h makes, where it makes any. */
static inline int64_t lg_ops_budget(const lg_spread *s, const int32_t *share, int64_t i, int64_t budget) {
    return s->slot ? lg_ops_share(budget, s->least, share[i]) : budget;
}
static inline int32_t lg_ops_n_make(const lg_spread *s, int64_t h) { return s->slot ? s->n_make[h] : 1; }

enum { LG_HEAD_DENSE = -1, LG_HEAD_WINDOW = -2 };
/* One decode row per sequence (n_seq rows, row s is sequence s, sees rows 0..len-1). Per KV head h:
 * read[h] = LG_HEAD_DENSE, LG_HEAD_WINDOW, or the set slot it reads; make[h] = slot to fill, or -1 (only with DENSE).
 * The score of token t is mean_g(q_g) . k_t (f32, raw); block score = max over its valid tokens; ties: lower position.
 * Budget in blocks: forced = blocks that hold the first `sinks` or last `recents` tokens; then best-scoring others while
 * the set has fewer than floor(budget/block) blocks, kept ones before all. A slot filled in this op is read only by later ops. With shares,
 * the slots of a head stand in this order: those that keep blocks, then those that keep none, from the smallest share on.
 * dense[s] != 0: this sequence's step is dense in all heads and makes no sets. */
typedef struct lg_op_attend_hybrid {
    float *out; const float *q;          /* [n_seq, n_head*head_dim] */
    lg_kv_layer kv; lg_kv_geom geom;
    const lg_kv_seq *seqs; int32_t n_seq;
    const int64_t *budget;               /* [n_seq] effective budget in tokens of this step (>= sinks + recents) */
    const uint8_t *dense;                /* [n_seq] */
    const int32_t *read, *make;          /* [n_head_kv] */
    lg_sets sets; lg_select select;      /* window heads: first select.sinks and last budget - select.sinks tokens */
    int32_t n_head; float scale;
    lg_spread spread;
} lg_op_attend_hybrid;

enum { LG_OBSERVE_ROWS = 64 }; /* at most */
/* Attention mass: mass[h * ld + t] = mean over the rows and over the query heads of KV head h of softmax(scale q . k)[t]; 0 where no row
 * sees t. For t < seq->len. Rows as in attend, all of one sequence. */
typedef struct lg_op_observe {
    float *mass; int64_t ld;             /* device [n_head_kv, ld] */
    const float *q;                      /* [n_tok, n_head*head_dim] */
    lg_kv_layer kv; lg_kv_geom geom;
    const lg_kv_seq *seq;
    const int64_t *idx;                  /* [n_tok] row t sees cache rows 0..idx[t] */
    int64_t n_tok; int32_t n_head; float scale;
} lg_op_observe;

typedef struct lg_op_product_add { float *y; const float *x; const lg_weight *w; int64_t n_tok; const lg_lora *lora; } lg_op_product_add; /* y[n_tok,n_out] += x W^T */
typedef struct lg_op_gate_up { float *h; const float *x; const float *norm; float eps; const lg_weight *gate, *up; int64_t n_tok; const lg_lora *lora_gate, *lora_up; } lg_op_gate_up; /* silu(Wg n)*(Wu n) */
/* logits[i] = W rmsnorm(x[row[i]]) */
typedef struct lg_op_logits { float *logits; const float *x; const float *norm; float eps; const lg_weight *w; const int32_t *row; int64_t n_row; } lg_op_logits;

/* id[i] (host memory, valid after sync) = index of the greatest of logits[i, 0..n_vocab); ties: the lowest index. */
typedef struct lg_op_argmax { int32_t *id; const float *logits; int64_t n_row, n_vocab; } lg_op_argmax;

/* id[i] (host memory, valid after sync) = drawn from logits[i, 0..n_vocab) as draw[i] says. Recent ids are penalised; the weight of
 * an id is a whole number, floor(2^40 exp((logit - greatest) / temperature)) (sample.h); ids stand in order of logits, ties: the lower id
 * first. Kept mass: the least of that of the top_k first, of the first ids that reach top_p of it, and of all ids with min_weight.
 * The id at which the running sum of weights exceeds random/2^64 of the kept mass is drawn. */
enum { LG_RECENT = 64 };
typedef struct lg_draw { /* no padding: compared as bytes */
    double scale;        /* log2(e) / temperature; 0: the greatest logit, no draw */
    double top_p;        /* 1: off */
    uint64_t min_weight; /* min_p * 2^40; 0: off */
    uint64_t random;
    int64_t top_k;       /* 0: off */
    float penalty;       /* 1: off */
    int32_t n_recent;
} lg_draw;
typedef struct lg_op_sample {
    int32_t *id; const float *logits; int64_t n_row, n_vocab;
    const lg_draw *draw;   /* [n_row] */
    const int32_t *recent; /* [n_row, LG_RECENT]: draw[i].n_recent ids each; below 0: as in lg_op_embed */
} lg_op_sample;

typedef struct lg_ops_ctx lg_ops_ctx;
typedef struct lg_ops_config { const char *device; int n_threads; lg_compute compute; int64_t max_tok; } lg_ops_config;

/* Which memory an argument lies in. Device memory (from alloc): x, q, att, h, logits, norms, biases, LoRA factors, k_raw, v_raw,
 * the cache, sets.idx and sets.n, a sequence's kept, observe's mass, kv_write's k and v. Host memory: everything else (ids, seq, idx, seqs and page tables, dst_*,
 * rope tables, budget, dense, read, make, spread, row, id, draw, recent of argmax and sample). On a host back end both are the same. */
typedef struct lg_ops {
    const char *name;
    bool host_memory; /* device memory can be read and written by the host */
    bool allocates;   /* ops allocate scratch (the specification): a decode step may */
    int64_t chunk;    /* tokens of a prefill chunk where the caller names none */
    lg_status (*open)(lg_ops_ctx **out, const lg_ops_config *c, lg_error *err);
    void (*close)(lg_ops_ctx *c);
    void (*describe)(lg_ops_ctx *c, char *buf, size_t n);
    /* Device memory: on the CPU lg_base_alloc. zero: filled with 0 */
    void *(*alloc)(lg_ops_ctx *c, int64_t bytes, bool zero, lg_error *err);
    void (*free)(lg_ops_ctx *c, void *p);
    void (*upload)(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes);
    void (*download)(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes);
    void (*copy)(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes); /* device to device; like upload and download not enqueued */
    /* Not on back ends whose memory is the host's (NULL there): n rows of `bytes`, strides in bytes, downloaded without staging (fast into
     * memory of host_alloc, which is page-locked); bytes of the device's memory in use by anybody, -1: not known. */
    void (*download_rows)(lg_ops_ctx *c, void *dst, int64_t dst_stride, const void *src, int64_t src_stride, int64_t bytes, int64_t n);
    void *(*host_alloc)(lg_ops_ctx *c, int64_t bytes, lg_error *err);
    void (*host_free)(lg_ops_ctx *c, void *p);
    int64_t (*in_use)(lg_ops_ctx *c);
    /* data NULL: filled with pseudo-random values of a usual scale (bench --shape; only back ends that say so).
     * May repack (data may then be forgotten: lg_file_forget is the caller's). Same weight bound once. */
    lg_status (*weight_bind)(lg_ops_ctx *c, lg_weight *w, lg_error *err);
    void (*weight_unbind)(lg_ops_ctx *c, lg_weight *w);
    /* Before the reserve of whoever uses it. NULL: ops read a and b as they are. */
    lg_status (*lora_bind)(lg_ops_ctx *c, lg_lora *r, int64_t n_in, int64_t n_out, lg_error *err);
    void (*lora_unbind)(lg_ops_ctx *c, lg_lora *r);
    /* Scratch for steps of up to n_tok tokens, n_seq sequences, longest length; called outside the decode loop. */
    lg_status (*reserve)(lg_ops_ctx *c, int64_t n_tok, int64_t n_seq, int64_t max_len, int32_t n_head, const lg_kv_geom *g,
                         int64_t max_in, int64_t max_out, lg_error *err);
    void (*embed)(lg_ops_ctx *c, const lg_op_embed *a);
    void (*qkv)(lg_ops_ctx *c, const lg_op_qkv *a);
    void (*attend)(lg_ops_ctx *c, const lg_op_attend *a);
    void (*attend_hybrid)(lg_ops_ctx *c, const lg_op_attend_hybrid *a);
    void (*observe)(lg_ops_ctx *c, const lg_op_observe *a);
    void (*product_add)(lg_ops_ctx *c, const lg_op_product_add *a);
    void (*gate_up)(lg_ops_ctx *c, const lg_op_gate_up *a);
    void (*logits)(lg_ops_ctx *c, const lg_op_logits *a);
    void (*kv_write)(lg_ops_ctx *c, const lg_op_kv_write *a);
    void (*argmax)(lg_ops_ctx *c, const lg_op_argmax *a);
    void (*sample)(lg_ops_ctx *c, const lg_op_sample *a); /* NULL: the caller draws on the host (lg_ops_sample) */
    void (*fetch)(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes); /* enqueued download: dst is valid after sync */
    /* Fills whole pages with pseudo-random unit-variance K and V on the device, not enqueued; NULL: the caller makes them. */
    void (*kv_random)(lg_ops_ctx *c, lg_kv_layer kv, const lg_kv_geom *g, const int32_t *page, int64_t n_page, uint64_t seed);
    lg_status (*sync)(lg_ops_ctx *c, lg_error *err); /* runs what is enqueued; returns and clears the sticky error */
    /* NULL: not on this back end. As sync, but returns when the list is on its way: host arrays may be written again, but what comes back (argmax,
     * sample, fetch) is there only after `wait` for its ticket, which waits for lists in order, or after sync, which waits for all. Two lists
     * are under way at most: a third waits for the first. */
    lg_status (*submit)(lg_ops_ctx *c, int64_t *ticket, lg_error *err);
    lg_status (*wait)(lg_ops_ctx *c, int64_t ticket, lg_error *err);
} lg_ops;

extern const lg_ops lg_ops_ref; /* ref/: serial plain C */
extern const lg_ops lg_ops_cuda; /* cuda/: only in builds with nvcc (LG_CUDA) */
extern const lg_ops lg_ops_cpu; /* cpu/: AVX2, AVX-512, VNNI, AMX by run-time choice */
const lg_ops *lg_ops_find(const char *device, lg_error *err); /* NULL: unknown or not built in; says so */
bool lg_cuda_device_line(int i, char *buf, size_t n); /* cuda/: GPU i in words; i = 0 without one: why; false: no more */
bool lg_ops_device_line(int i, char *buf, size_t n, lg_error *err); /* what was found: 0 is the CPU, then GPUs; false: no more, or failed */

/* Where element i of a head lies in half order. */
static inline int64_t lg_ops_half_place(int64_t i, int64_t head_dim, bool interleaved) {
    return interleaved ? i / 2 + i % 2 * (head_dim / 2) : i;
}
/* The units of a set in top-k: of n, those before head and those from tail on hold sinks or recents. */
typedef struct lg_forced { int64_t n, head, tail; } lg_forced;
static inline lg_forced lg_ops_forced(int64_t len, int64_t block, int64_t sinks, int64_t recents) {
    sinks = sinks < 0 ? 0 : sinks < len ? sinks : len;
    recents = recents < 0 ? 0 : recents < len ? recents : len;
    const int64_t n = (len + block - 1) / block, head = (sinks + block - 1) / block, tail = recents ? (len - recents) / block : n;
    const lg_forced f = { n, head, tail > head ? tail : head };
    return f;
}
/* Whether unit u is among those of lg_select.kept. */
static inline int lg_ops_kept(const uint32_t *kept, int64_t u) { return kept ? (int)(kept[u >> 5] >> (u & 31) & 1) : 0; }
/* Cache rows <-> f32 (any lg_kv_geom dtype). */
void lg_ops_kv_store(const lg_kv_geom *g, uint8_t *row, const float *src);
void lg_ops_kv_load(const lg_kv_geom *g, float *dst, const uint8_t *row);
/* The specification of selection: scores [len] -> ascending block ids; returns their count (<= cap). scratch: [len] floats
 * and [len] int32. Used by ref, compared with by every other back end. */
int64_t lg_ops_select(int32_t *out, int64_t cap, const float *score, int64_t len, int64_t budget, int32_t block,
                      const lg_select *s, float *scratch_f, int32_t *scratch_i);
/* The specification of sampling: the id drawn from one row. recent: d->n_recent ids (here any number); scratch: [2 * n_vocab] */
int32_t lg_ops_sample(const float *logits, int64_t n_vocab, const lg_draw *d, const int32_t *recent, float *scratch);
/* The same id in a fraction of the time. */
int32_t lg_ops_sample_fast(const float *logits, int64_t n_vocab, const lg_draw *d, const int32_t *recent, float *scratch);
int32_t lg_ops_greatest(const float *logits, int64_t n_vocab); /* the id of the greatest logit, ties: the lowest, NaN last */
#endif
