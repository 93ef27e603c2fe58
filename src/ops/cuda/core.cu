/* The CUDA back end: context, recording of ops, staging of host arrays, graphs. What is recorded runs at sync (cuda.h says how).
 *   staged block   [host arrays in order of first appearance]: one pinned block, one device block, one copy
 *   turns          pinned blocks are there twice, so that a list can be made ready and launched while the one before it is under way (submit)
 *   twins          page tables live on the device; of each only the entries that changed go up
 *   graphs         a decode list that comes again (ops, shapes, addresses) is captured and then replayed; the first time it runs as it
 *                  is, so that no kernel is loaded for the first time in a capture (loading all beforehand takes 1.5 s and cuBLASLt whole).
 *                  A list whose bytes are those that a graph was made of is launched without being looked at any further (same_again)
 * Environment, for looking into it: LONGAN_CUDA_GRAPH=0, LONGAN_CUDA_PDL=0, LONGAN_CUDA_SIDE=0 (selection in line),
 * LONGAN_CUDA_SYNC=1 (no graphs, a wait after every op: an error names its op). */
#include "ops/cuda/heads.cuh"
#include "ops/cuda/product.cuh"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_OPS = 2048, MAX_ARRAYS = 4096, HASH = 16384, MAX_TWINS = 8192, N_GRAPH = 8, N_SEEN = 64, KEY_BYTES = 1 << 20, DECODE_ROWS = 64, OUT_BYTES = 64 << 10 };

typedef enum kind { K_EMBED, K_QKV, K_ATTEND, K_HYBRID, K_OBSERVE, K_PRODUCT, K_GATE_UP, K_LOGITS, K_KV_WRITE, K_ARGMAX, K_SAMPLE, K_FETCH } kind;
static const char *const kind_name[] = { "embed", "qkv", "attend", "attend_hybrid", "observe", "product_add", "gate_up", "logits", "kv_write", "argmax", "sample", "fetch" };
typedef struct fetch_op { void *dst; const void *src; int64_t bytes; } fetch_op;
typedef struct task {
    kind k;
    union {
        lg_op_embed embed;
        lg_op_qkv qkv;
        lg_op_attend attend;
        lg_op_attend_hybrid hybrid;
        lg_op_observe observe;
        lg_op_product_add product;
        lg_op_gate_up gate_up;
        lg_op_logits logits;
        lg_op_kv_write kv_write;
        lg_op_argmax argmax;
        lg_op_sample sample;
        fetch_op fetch;
    } u;
    lg_lora lora[3];
    const int32_t *read_host, *make_host; /* hybrid */
    const int32_t *seq_host; const int64_t *idx_host; /* attend */
    int64_t len;                /* observe: of the sequence */
    bool decode;                /* attend: row s is the last of sequence s */
    bool sized;                 /* hybrid: lg_cuda_decode.sized */
    int16_t reads;              /* hybrid, sized: the last op of the list that makes a set it reads, -1: none */
    uint32_t *counts;           /* hybrid: lg_cuda_decode.making */
    uint32_t n_making;          /* hybrid, when run: what its selection adds to that */
    bool early;                 /* attend: the op before wrote the sequences' newest rows alone (lg_cuda_decode.early) */
    bool top_k, top_p;          /* sample: some row has that limit */
    uint8_t *out;               /* argmax, sample, fetch: place in the pinned block of results */
} task;

typedef struct array { const void *host; int64_t bytes, at; bool seqs; } array; /* seqs: lg_kv_seq, becomes lg_cuda_seq */
typedef struct twin { const int32_t *host; int32_t *dev, *mirror; int64_t cap, n; } twin;
/* The list as it was recorded, and all that what is made of it depends on besides. */
typedef struct record { task *tasks; int n_task; uint8_t *rest; int64_t rest_bytes, max_len; uint64_t bound; array *arrays; int n_array; uint8_t **out; } record;
typedef struct graph { uint8_t *key; int64_t key_bytes; uint64_t hash, used; cudaGraphExec_t exec; record of; int turn; } graph;
typedef struct result { void *to; const uint8_t *from; int64_t bytes; } result;
/* Lists take turns, so that one can be made ready while another is under way. */
typedef struct turn {
    uint8_t *pin, *out;        /* pinned: the staged block; mapped, too: results */
    int64_t pin_cap, out_cap;
    result *due; int n_due;    /* [MAX_OPS] what its results are for */
    cudaEvent_t done;
    int64_t ticket;            /* of the list under way, 0: none */
    const char *what;
} turn;

struct lg_ops_ctx {
    int device;
    cudaStream_t stream, side;
    cudaEvent_t fork, join;
    lg_cuda_env env;
    lg_cuda_push push;
    lg_cuda_work work;
    cudaDeviceProp prop;
    bool use_graph, use_side, each;
    lg_status failed;
    lg_error why;
    /* the list */
    int n_task;
    task *tasks;
    /* staging */
    int n_array;
    array *arrays;
    int32_t *slot;             /* [HASH], index + 1 */
    uint8_t *dev;              /* the staged block */
    int64_t block_bytes, block_cap, out_bytes;
    turn turns[2];
    int now;                   /* whose turn it is; 0 where nothing is under way, so that a list finds its graph */
    int64_t n_ticket;
    int32_t *drawn;            /* [2][LG_DRAWN_ROWS] by turn */
    /* page tables */
    int n_twin;
    twin *twins;
    int32_t *twin_dev, *twin_pin; /* the chunk that new twins are cut from */
    int64_t twin_left;
    void *chunk_dev[64], *chunk_pin[64];
    int n_chunk_mem;
    /* scratch */
    uint8_t *select;
    float *score;
    float *kv_rows;            /* K, V of a qkv op */
    int64_t select_bytes, score_bytes, kv_bytes;
    uint64_t *argmax_part;
    int64_t max_len, max_seq;
    /* graphs */
    graph graphs[N_GRAPH];
    uint64_t seen[N_SEEN];     /* hashes of lists that ran uncaptured */
    uint32_t n_seen;
    uint8_t *key;
    int64_t key_bytes;
    task *recorded;            /* the list before it is resolved */
    uint8_t *rest;             /* of that list; rest_bytes < 0: it is in no graph */
    int64_t rest_bytes;
    uint64_t clock;
    bool side_busy;
    int half;                  /* of `score`: an op writes one while selection may still read what the op before it wrote */
    float *raw;                /* two buffers of lg_cuda_raw, which ops take in turn; between lists all absent */
    int64_t raw_bytes;         /* of both */
    int raw_used;              /* 1 + the one to be made absent again, or 0; the next op takes the other */
    lg_cuda_raw raw_now;       /* what a qkv op leaves for the attention behind it; q NULL: nothing */
};

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static unsigned blocks_of(int64_t n, int per) { return (unsigned)((n + per - 1) / per); }
static bool env_is(const char *name, char c) {
    const char *v = getenv(name);
    return v && v[0] == c;
}

static void stick(lg_ops_ctx *c, cudaError_t e, const char *op) {
    if (e == cudaSuccess || c->failed != LG_OK) return;
    char what[256];
    const char *more = lg_cuda_blas_problem();
    snprintf(what, sizeof what, "%s%s%s", op, *more ? ": " : "", more);
    c->failed = lg_cuda_fail(&c->why, e, what);
    lg_cuda_blas_forget();
}

static void use(lg_ops_ctx *c) { cudaSetDevice(c->device); }

static void record_free(record *r) {
    lg_base_free(r->tasks);
    lg_base_free(r->rest);
    lg_base_free(r->arrays);
    lg_base_free(r->out);
    memset(r, 0, sizeof *r);
}
static bool under_way(const lg_ops_ctx *c) { return c->turns[0].ticket || c->turns[1].ticket; }
/* It is not under way. */
static void drop_graph(graph *g) {
    if (g->exec) cudaGraphExecDestroy(g->exec);
    g->exec = NULL;
    g->key_bytes = 0;
    g->used = 0;
}
static void drop_graphs(lg_ops_ctx *c) {
    if (under_way(c)) cudaStreamSynchronize(c->stream);
    for (int i = 0; i < N_GRAPH; i++) drop_graph(&c->graphs[i]);
}

/* Scratch grows between lists, never inside; graphs hold its address. Zero-filled, so that what a kernel reads in passing is defined. */
static lg_status grow(lg_ops_ctx *c, void *field, int64_t *have, int64_t need, const char *what, lg_error *err) {
    void **p = (void **)field;
    if (*have >= need) return LG_OK;
    cudaStreamSynchronize(c->stream);
    drop_graphs(c);
    if (*p) cudaFree(*p);
    *p = NULL;
    *have = 0;
    lg_status st = lg_cuda_new(p, need, what, err);
    if (st != LG_OK) return st;
    cudaMemsetAsync(*p, 0, (size_t)need, c->stream);
    *have = need;
    return LG_OK;
}

static lg_status grow_pinned(lg_ops_ctx *c, uint8_t **p, int64_t *have, int64_t need, lg_error *err) {
    if (*have >= need) return LG_OK;
    need = max64(need, *have * 2);
    cudaStreamSynchronize(c->stream);
    drop_graphs(c);
    if (*p) cudaFreeHost(*p);
    *p = NULL;
    *have = 0;
    const cudaError_t e = cudaHostAlloc((void **)p, (size_t)need, cudaHostAllocMapped);
    if (e != cudaSuccess) return lg_cuda_fail(err, e, "pinned memory");
    *have = need;
    return LG_OK;
}

/* ---- opening ---------------------------------------------------------------------------------------- */
static void cuda_close(lg_ops_ctx *c) {
    if (!c) return;
    use(c);
    if (c->stream) cudaStreamSynchronize(c->stream);
    drop_graphs(c);
    for (int i = 0; i < N_GRAPH; i++) {
        lg_base_free(c->graphs[i].key);
        record_free(&c->graphs[i].of);
    }
    lg_base_free(c->recorded);
    lg_base_free(c->rest);
    for (int i = 0; i < c->n_chunk_mem; i++) {
        cudaFree(c->chunk_dev[i]);
        cudaFreeHost(c->chunk_pin[i]);
    }
    void *dev[] = { c->dev, c->select, c->score, c->kv_rows, c->argmax_part, c->env.scratch, c->work.x, c->work.sums, c->work.y0, c->work.y1,
                    c->work.ready, c->work.wide, c->work.lora, c->work.partial, c->raw, c->drawn };
    for (size_t i = 0; i < sizeof dev / sizeof *dev; i++)
        if (dev[i]) cudaFree(dev[i]);
    for (int i = 0; i < 2; i++) {
        if (c->turns[i].pin) cudaFreeHost(c->turns[i].pin);
        if (c->turns[i].out) cudaFreeHost(c->turns[i].out);
        if (c->turns[i].done) cudaEventDestroy(c->turns[i].done);
        lg_base_free(c->turns[i].due);
    }
    lg_cuda_push_free(&c->push);
    if (c->fork) cudaEventDestroy(c->fork);
    if (c->join) cudaEventDestroy(c->join);
    if (c->stream) cudaStreamDestroy(c->stream);
    if (c->side) cudaStreamDestroy(c->side);
    lg_base_free(c->tasks);
    lg_base_free(c->arrays);
    lg_base_free(c->slot);
    lg_base_free(c->twins);
    lg_base_free(c->key);
    lg_base_free(c);
}

static const char *no_device(cudaError_t e) { /* of cudaGetDeviceCount; without a driver the runtime only calls it too old */
    int driver = 0;
    if (e == cudaSuccess) return "none found";
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0 ? "no NVIDIA driver" : cudaGetErrorString(e);
}

static lg_status cuda_open(lg_ops_ctx **out, const lg_ops_config *cfg, lg_error *err) {
    lg_status st = LG_OK;
    int n = 0;
    bool ok = true;
    const int want = cfg->device && !strncmp(cfg->device, "cuda:", 5) ? atoi(cfg->device + 5) : 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0)
        return lg_base_fail(err, LG_ERR_DEVICE, -1, "device cuda: no device: %s", no_device(e));
    if (want < 0 || want >= n) return lg_base_fail(err, LG_ERR_DEVICE, -1, "device cuda:%d: there are %d device%s", want, n, n == 1 ? "" : "s");
    lg_ops_ctx *c = (lg_ops_ctx *)lg_base_alloc(sizeof *c);
    if (!c) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    c->device = want;
    if ((e = cudaSetDevice(want)) != cudaSuccess || (e = cudaGetDeviceProperties(&c->prop, want)) != cudaSuccess ||
        (e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking)) != cudaSuccess ||
        (e = cudaStreamCreateWithFlags(&c->side, cudaStreamNonBlocking)) != cudaSuccess ||
        (e = cudaEventCreateWithFlags(&c->fork, cudaEventDisableTiming)) != cudaSuccess ||
        (e = cudaEventCreateWithFlags(&c->join, cudaEventDisableTiming)) != cudaSuccess ||
        (e = cudaEventCreateWithFlags(&c->turns[0].done, cudaEventDisableTiming)) != cudaSuccess ||
        (e = cudaEventCreateWithFlags(&c->turns[1].done, cudaEventDisableTiming)) != cudaSuccess)
        LG_TRY(lg_cuda_fail(err, e, "opening it"));
    if (c->prop.major < 8) LG_TRY(lg_base_fail(err, LG_ERR_DEVICE, -1, "device cuda:%d: %s has compute capability %d.%d, 8.0 is needed", want, c->prop.name, c->prop.major, c->prop.minor));
    c->env.stream = c->stream;
    c->env.n_sm = c->prop.multiProcessorCount;
    c->env.cc = c->prop.major * 10 + c->prop.minor;
    c->env.smem_max = (int64_t)c->prop.sharedMemPerBlockOptin;
    c->env.compute = cfg->compute;
    c->each = env_is("LONGAN_CUDA_SYNC", '1');
    c->use_graph = !env_is("LONGAN_CUDA_GRAPH", '0') && !c->each;
    c->use_side = !env_is("LONGAN_CUDA_SIDE", '0') && !c->each;
    lg_cuda_pdl = !env_is("LONGAN_CUDA_PDL", '0') && c->env.cc >= 90;
    LG_TRY(lg_cuda_push_new(&c->push, c->stream, err));
    LG_TRY(lg_cuda_blas_open(err));
    c->tasks = (task *)lg_base_calloc(MAX_OPS, sizeof *c->tasks);
    c->arrays = (array *)lg_base_calloc(MAX_ARRAYS, sizeof *c->arrays);
    c->slot = (int32_t *)lg_base_calloc(HASH, sizeof *c->slot);
    c->twins = (twin *)lg_base_calloc(MAX_TWINS, sizeof *c->twins);
    c->key = (uint8_t *)lg_base_alloc(KEY_BYTES);
    c->rest = (uint8_t *)lg_base_alloc(KEY_BYTES);
    c->recorded = (task *)lg_base_alloc(MAX_OPS * (int64_t)sizeof *c->recorded);
    ok = c->tasks && c->arrays && c->slot && c->twins && c->key && c->rest && c->recorded;
    for (int i = 0; i < N_GRAPH && ok; i++) ok = (c->graphs[i].key = (uint8_t *)lg_base_alloc(KEY_BYTES)) != NULL;
    for (int i = 0; i < 2 && ok; i++) ok = (c->turns[i].due = (result *)lg_base_alloc(MAX_OPS * (int64_t)sizeof(result))) != NULL;
    if (!ok) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    for (int i = 0; i < 2; i++) LG_TRY(grow_pinned(c, &c->turns[i].out, &c->turns[i].out_cap, OUT_BYTES, err));
    LG_TRY(lg_cuda_new((void **)&c->argmax_part, 4096 * 64 * 8, "argmax", err));
    LG_TRY(lg_cuda_new((void **)&c->drawn, 2 * LG_DRAWN_ROWS * 4, "drawn ids", err));
    cudaMemsetAsync(c->drawn, 0, 2 * LG_DRAWN_ROWS * 4, c->stream);
    *out = c;
done:
    if (st != LG_OK) cuda_close(c);
    return st;
}

static void cuda_describe(lg_ops_ctx *c, char *buf, size_t n) {
    snprintf(buf, n, "cuda:%d: %s, %.0f GB%s", c->device, c->prop.name, (double)c->prop.totalGlobalMem / 1e9, c->env.compute == LG_COMPUTE_F32 ? ", f32" : "");
}

extern "C" bool lg_cuda_device_line(int i, char *buf, size_t n) {
    int count = 0;
    cudaDeviceProp p;
    const cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess || count == 0) {
        cudaGetLastError();
        if (i == 0) snprintf(buf, n, "cuda: no device: %s", no_device(e));
        return i == 0;
    }
    if (i >= count || cudaGetDeviceProperties(&p, i) != cudaSuccess) return false;
    snprintf(buf, n, "cuda:%d: %s, %.0f GB, compute capability %d.%d, %d multiprocessors", i, p.name, (double)p.totalGlobalMem / 1e9, p.major, p.minor, p.multiProcessorCount);
    return true;
}

/* ---- memory ----------------------------------------------------------------------------------------- */
static void *cuda_alloc(lg_ops_ctx *c, int64_t bytes, bool zero, lg_error *err) {
    void *p = NULL;
    use(c);
    if (lg_cuda_new(&p, bytes, "buffers", err) != LG_OK) return NULL;
    (void)zero; /* always: what a tail holds is then defined */
    cudaError_t e = cudaMemsetAsync(p, 0, (size_t)max64(bytes, 1), c->stream);
    if (e == cudaSuccess) e = cudaStreamSynchronize(c->stream);
    if (e == cudaSuccess) return p;
    lg_cuda_fail(err, e, "clearing a buffer");
    cudaFree(p);
    return NULL;
}
static void cuda_free(lg_ops_ctx *c, void *p) {
    use(c);
    cudaStreamSynchronize(c->stream);
    cudaFree(p);
}
static void cuda_upload(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes) {
    if (bytes < 1) return;
    use(c);
    stick(c, lg_cuda_push_run(&c->push, dst, src, bytes), "upload"); /* what follows on the stream finds it */
}
static void cuda_download(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes) {
    if (bytes < 1) return;
    use(c);
    cudaError_t e = cudaSuccess;
    for (int64_t at = 0; at < bytes && e == cudaSuccess; at += c->push.piece) { /* through pinned memory */
        const int64_t n = min64(c->push.piece, bytes - at);
        e = cudaStreamSynchronize(c->stream);
        if (e == cudaSuccess) e = cudaMemcpyAsync(c->push.pin[0], (const uint8_t *)src + at, (size_t)n, cudaMemcpyDeviceToHost, c->stream);
        if (e == cudaSuccess) e = cudaStreamSynchronize(c->stream);
        if (e == cudaSuccess) memcpy((uint8_t *)dst + at, c->push.pin[0], (size_t)n);
    }
    stick(c, e, "download");
}
static void cuda_download_rows(lg_ops_ctx *c, void *dst, int64_t dst_stride, const void *src, int64_t src_stride, int64_t bytes, int64_t n) {
    if (bytes < 1 || n < 1) return;
    use(c);
    cudaError_t e = cudaMemcpy2DAsync(dst, (size_t)dst_stride, src, (size_t)src_stride, (size_t)bytes, (size_t)n, cudaMemcpyDeviceToHost, c->stream);
    if (e == cudaSuccess) e = cudaStreamSynchronize(c->stream);
    stick(c, e, "download");
}
static void *cuda_host_alloc(lg_ops_ctx *c, int64_t bytes, lg_error *err) {
    void *p = NULL;
    use(c);
    const cudaError_t e = cudaHostAlloc(&p, (size_t)max64(bytes, 1), cudaHostAllocDefault);
    if (e == cudaSuccess) return p;
    lg_cuda_fail(err, e, "page-locked memory");
    return NULL;
}
static void cuda_host_free(lg_ops_ctx *c, void *p) {
    use(c);
    cudaFreeHost(p);
}
static int64_t cuda_in_use(lg_ops_ctx *c) {
    size_t free_bytes = 0, total = 0;
    use(c);
    return cudaMemGetInfo(&free_bytes, &total) == cudaSuccess ? (int64_t)(total - free_bytes) : -1;
}
static void cuda_copy(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes) {
    if (bytes < 1) return;
    use(c);
    cudaError_t e = cudaMemcpyAsync(dst, src, (size_t)bytes, cudaMemcpyDeviceToDevice, c->stream);
    if (e == cudaSuccess) e = cudaStreamSynchronize(c->stream);
    stick(c, e, "copy");
}
static lg_status cuda_weight_bind(lg_ops_ctx *c, lg_weight *w, lg_error *err) {
    use(c);
    return lg_cuda_weight_bind(&c->push, w, err);
}
static void cuda_weight_unbind(lg_ops_ctx *c, lg_weight *w) {
    use(c);
    cudaStreamSynchronize(c->stream);
    drop_graphs(c);
    lg_cuda_weight_unbind(w);
}

static lg_status cuda_lora_bind(lg_ops_ctx *c, lg_lora *r, int64_t n_in, int64_t n_out, lg_error *err) {
    use(c);
    return c->env.compute == LG_COMPUTE_F32 ? LG_OK : lg_cuda_lora_bind(c->stream, r, n_in, n_out, err);
}
static void cuda_lora_unbind(lg_ops_ctx *c, lg_lora *r) {
    use(c);
    cudaStreamSynchronize(c->stream);
    lg_cuda_lora_unbind(r);
}

static lg_status reserve_scratch(lg_ops_ctx *c, int64_t bytes, lg_error *err) {
    return grow(c, &c->env.scratch, &c->env.scratch_bytes, bytes, "the scratch of attention", err);
}
static lg_status cuda_reserve(lg_ops_ctx *c, int64_t n_tok, int64_t n_seq, int64_t max_len, int32_t n_head, const lg_kv_geom *g, int64_t max_in,
                              int64_t max_out, lg_error *err) {
    lg_status st = LG_OK;
    (void)max_in; (void)max_out; /* products find their scratch at sync, from the weights they use */
    use(c);
    if (max_len > c->max_len || n_seq > c->max_seq) drop_graphs(c);
    c->max_len = max64(c->max_len, max_len);
    c->max_seq = max64(c->max_seq, n_seq);
    LG_TRY(reserve_scratch(c, max64(lg_cuda_decode_scratch(&c->env, n_seq, n_head, g), lg_cuda_prefill_scratch(&c->env, n_tok, n_head, g)), err));
    LG_TRY(reserve_scratch(c, lg_cuda_observe_scratch(LG_OBSERVE_ROWS, max_len, n_head), err));
    LG_TRY(grow(c, &c->kv_rows, &c->kv_bytes, 2 * n_tok * g->n_head_kv * g->head_dim * 4, "K and V of a chunk", err));
done:
    return st;
}

/* ---- recording -------------------------------------------------------------------------------------- */
static task *push_task(lg_ops_ctx *c, kind k) {
    if (c->failed != LG_OK) return NULL;
    if (c->n_task == MAX_OPS) {
        c->failed = lg_base_fail(&c->why, LG_ERR_LIMIT, -1, "device cuda:%d: more than %d ops before a sync", c->device, MAX_OPS);
        return NULL;
    }
    task *t = &c->tasks[c->n_task++];
    memset(t, 0, sizeof *t); /* the key of a graph is made of these bytes */
    t->k = k;
    return t;
}
static const lg_lora *keep_lora(task *t, int i, const lg_lora *l) {
    if (!l || l->rank <= 0) return NULL;
    memset(&t->lora[i], 0, sizeof t->lora[i]);
    t->lora[i].rank = l->rank;
    t->lora[i].scale = l->scale;
    t->lora[i].a = l->a;
    t->lora[i].b = l->b;
    t->lora[i].packed = l->packed;
    return &t->lora[i];
}
#define RECORD(name, kind, field) \
    static void cuda_##name(lg_ops_ctx *c, const lg_op_##name *a) { \
        task *t = push_task(c, kind); \
        if (t) memcpy(&t->u.field, a, sizeof *a); \
    }
RECORD(embed, K_EMBED, embed)
RECORD(attend, K_ATTEND, attend)
RECORD(attend_hybrid, K_HYBRID, hybrid)
RECORD(observe, K_OBSERVE, observe)
RECORD(logits, K_LOGITS, logits)
RECORD(kv_write, K_KV_WRITE, kv_write)
RECORD(argmax, K_ARGMAX, argmax)
RECORD(sample, K_SAMPLE, sample)
static void cuda_qkv(lg_ops_ctx *c, const lg_op_qkv *a) {
    task *t = push_task(c, K_QKV);
    if (!t) return;
    memcpy(&t->u.qkv, a, sizeof *a);
    t->u.qkv.lora_q = keep_lora(t, 0, a->lora_q);
    t->u.qkv.lora_k = keep_lora(t, 1, a->lora_k);
    t->u.qkv.lora_v = keep_lora(t, 2, a->lora_v);
}
static void cuda_product_add(lg_ops_ctx *c, const lg_op_product_add *a) {
    task *t = push_task(c, K_PRODUCT);
    if (!t) return;
    memcpy(&t->u.product, a, sizeof *a);
    t->u.product.lora = keep_lora(t, 0, a->lora);
}
static void cuda_gate_up(lg_ops_ctx *c, const lg_op_gate_up *a) {
    task *t = push_task(c, K_GATE_UP);
    if (!t) return;
    memcpy(&t->u.gate_up, a, sizeof *a);
    t->u.gate_up.lora_gate = keep_lora(t, 0, a->lora_gate);
    t->u.gate_up.lora_up = keep_lora(t, 1, a->lora_up);
}
static void cuda_fetch(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes) {
    task *t = bytes > 0 ? push_task(c, K_FETCH) : NULL;
    if (t) t->u.fetch = fetch_op{ dst, src, bytes };
}

/* ---- staging ---------------------------------------------------------------------------------------- */
/* Where `host` will lie in the staged block: an offset, made a pointer once the block has its address. */
static int64_t stage(lg_ops_ctx *c, const void *host, int64_t bytes, bool seqs) {
    if (!host || bytes < 1) return -1;
    uint64_t h = (uint64_t)(uintptr_t)host * 0x9E3779B97F4A7C15ull + (seqs ? 0x5555 : 0);
    int i = (int)(h >> 50) & (HASH - 1);
    for (; c->slot[i]; i = (i + 1) & (HASH - 1)) {
        array *a = &c->arrays[c->slot[i] - 1];
        if (a->host == host && a->seqs == seqs && a->bytes >= bytes) return a->at;
    }
    if (c->n_array == MAX_ARRAYS) {
        if (c->failed == LG_OK) c->failed = lg_base_fail(&c->why, LG_ERR_LIMIT, -1, "device cuda:%d: more than %d host arrays before a sync", c->device, MAX_ARRAYS);
        return -1;
    }
    array *a = &c->arrays[c->n_array++];
    const int64_t room = seqs ? bytes / (int64_t)sizeof(lg_kv_seq) * (int64_t)sizeof(lg_cuda_seq) : bytes;
    *a = array{ host, bytes, c->block_bytes, seqs };
    c->block_bytes += (room + 15) / 16 * 16;
    c->slot[i] = c->n_array;
    return a->at;
}
template <typename P> static void point(lg_ops_ctx *c, P *p, int64_t count) {
    const int64_t at = stage(c, *p, count * (int64_t)sizeof **p, false);
    *p = at < 0 ? NULL : (P)(c->dev + at);
}
static const lg_cuda_seq *point_seqs(lg_ops_ctx *c, const lg_kv_seq *s, int64_t n) {
    const int64_t at = stage(c, s, n * (int64_t)sizeof *s, true);
    return at < 0 ? NULL : (const lg_cuda_seq *)(c->dev + at);
}

/* The device twin of a page table; entries that differ from the mirror go up. */
static int32_t *twin_of(lg_ops_ctx *c, const lg_kv_seq *s) {
    const int64_t n = (s->len + LG_PAGE - 1) / LG_PAGE;
    twin *w = NULL;
    for (int i = 0; i < c->n_twin && !w; i++)
        if (c->twins[i].host == s->page && c->twins[i].cap >= n) w = &c->twins[i];
    if (!w) {
        const int64_t cap = max64((c->max_len + LG_PAGE - 1) / LG_PAGE, max64(n, 16));
        if (c->n_twin == MAX_TWINS) {
            c->n_twin = 0; /* (tables of sessions long gone: their memory stays with its chunk) */
            drop_graphs(c);
        }
        if (c->twin_left < cap) {
            const int64_t size = max64(cap * 16, 1 << 16);
            const int at = c->n_chunk_mem;
            cudaError_t e = at < 64 ? cudaMalloc(&c->chunk_dev[at], (size_t)size * 4) : cudaErrorMemoryAllocation;
            if (e == cudaSuccess) e = cudaHostAlloc(&c->chunk_pin[at], (size_t)size * 4, cudaHostAllocDefault);
            if (e != cudaSuccess) {
                stick(c, e, "page tables");
                return NULL;
            }
            cudaMemsetAsync(c->chunk_dev[at], 0, (size_t)size * 4, c->stream);
            c->n_chunk_mem++;
            c->twin_dev = (int32_t *)c->chunk_dev[at];
            c->twin_pin = (int32_t *)c->chunk_pin[at];
            c->twin_left = size;
        }
        w = &c->twins[c->n_twin++];
        *w = twin{ s->page, c->twin_dev, c->twin_pin, cap, 0 };
        c->twin_dev += cap;
        c->twin_pin += cap;
        c->twin_left -= cap;
    }
    int64_t first = 0, last = n;
    const int64_t both = min64(n, w->n);
    if (both && !memcmp(w->mirror, s->page, (size_t)both * 4)) {
        first = both;
    } else {
        while (first < both && w->mirror[first] == s->page[first]) first++;
        if (n <= w->n)
            while (last > first && w->mirror[last - 1] == s->page[last - 1]) last--;
    }
    if (first < last) {
        memcpy(w->mirror + first, s->page + first, (size_t)(last - first) * 4);
        stick(c, cudaMemcpyAsync(w->dev + first, w->mirror + first, (size_t)(last - first) * 4, cudaMemcpyHostToDevice, c->stream), "page tables");
    }
    w->n = max64(w->n, n);
    return w->dev;
}

static void fill_block(lg_ops_ctx *c, const array *arrays, int n_array) {
    uint8_t *const pin = c->turns[c->now].pin;
    for (int i = 0; i < n_array; i++) {
        const array *a = &arrays[i];
        if (!a->seqs) {
            memcpy(pin + a->at, a->host, (size_t)a->bytes);
            continue;
        }
        const lg_kv_seq *s = (const lg_kv_seq *)a->host;
        lg_cuda_seq *to = (lg_cuda_seq *)(pin + a->at);
        for (int64_t k = 0; k < a->bytes / (int64_t)sizeof *s; k++) to[k] = lg_cuda_seq{ twin_of(c, &s[k]), s[k].len, s[k].kept };
    }
}

static bool decode_rows(const lg_op_attend *a) {
    if (a->n_tok != a->n_seq || a->n_tok > DECODE_ROWS) return false;
    for (int64_t t = 0; t < a->n_tok; t++)
        if (a->seq[t] != t || a->idx[t] != a->seqs[t].len - 1) return false;
    return true;
}

/* Whether op b wrote, of the rows that attention over `seqs` reads, the last of each sequence and no other. */
static bool wrote_newest(const task *b, const lg_kv_layer *kv, const lg_kv_seq *seqs, int64_t n_seq) {
    const lg_op_qkv *q = &b->u.qkv;
    if (b->k != K_QKV || q->n_tok != n_seq || q->kv.k != kv->k || q->kv.v != kv->v) return false;
    for (int64_t s = 0; s < n_seq; s++) {
        const int64_t last = seqs[s].len - 1;
        if (last < 0 || q->dst_page[s] != seqs[s].page[last / LG_PAGE] || q->dst_slot[s] != last % LG_PAGE) return false;
    }
    return true;
}

/* Whether op a reads only sets that ops of this list make (maker[slot], -1: none), by the same rule and from the same lengths and budgets: their
 * sizes follow from these; last: the last of those ops. Then notes the sets it makes. */
enum { MAKERS = 1024 };
static_assert(MAX_OPS <= INT16_MAX, "an op's place in int16");
static bool sets_sized(const task *tasks, int i, int16_t *maker, int16_t *last) {
    const lg_op_attend_hybrid *a = &tasks[i].u.hybrid;
    *last = -1;
    if (a->sets.n_slot > MAKERS) return false;
    bool known = a->select.rule == LG_RULE_TOPK || a->select.rule == LG_RULE_RATIO;
    for (int h = 0; known && h < a->geom.n_head_kv; h++) {
        const int32_t slot = a->read[h];
        if (slot < 0) continue;
        const lg_op_attend_hybrid *m = maker[slot] >= 0 ? &tasks[maker[slot]].u.hybrid : NULL;
        known = m && m->sets.n == a->sets.n && m->sets.cap == a->sets.cap && m->sets.n_slot == a->sets.n_slot && m->sets.block == a->sets.block && m->seqs == a->seqs &&
                m->n_seq == a->n_seq && m->budget == a->budget && m->dense == a->dense && m->select.rule == a->select.rule && m->select.sinks == a->select.sinks &&
                m->select.recents == a->select.recents && !m->spread.slot == !a->spread.slot &&
                (!a->spread.slot || (m->spread.least == a->spread.least && m->spread.slot[slot] == a->spread.slot[slot]));
        if (known && maker[slot] > *last) *last = maker[slot];
    }
    for (int h = 0; h < a->geom.n_head_kv; h++)
        for (int32_t j = 0; a->make[h] >= 0 && j < lg_ops_n_make(&a->spread, h); j++) maker[a->make[h] + j] = (int16_t)i;
    for (int32_t j = 0; j < a->spread.n_latest; j++) maker[a->spread.latest + j] = (int16_t)i;
    return known;
}

static const uint32_t zero_counts[MAX_OPS] = { 0 }; /* host array of task.counts */

/* One pass over the list: host pointers become offsets in the staged block (c->dev is its base), results get their place. Run twice:
 * once to size the block (dry), once with its final address. Returns whether the list can be a graph. */
static bool resolve(lg_ops_ctx *c, bool dry) {
    bool attends = false, graph_able = c->use_graph;
    int16_t maker[MAKERS];
    memset(maker, 0xff, sizeof maker);
    memset(c->slot, 0, HASH * sizeof *c->slot);
    c->n_array = 0;
    c->block_bytes = c->out_bytes = 0;
    for (int i = 0; i < c->n_task; i++) {
        task copy, *t = &c->tasks[i];
        if (dry) {
            if (t->k == K_ATTEND) t->early = i > 0 && wrote_newest(t - 1, &t->u.attend.kv, t->u.attend.seqs, t->u.attend.n_seq);
            if (t->k == K_HYBRID) t->sized = sets_sized(c->tasks, i, maker, &t->reads);
            if (t->k == K_HYBRID) t->early = i > 0 && wrote_newest(t - 1, &t->u.hybrid.kv, t->u.hybrid.seqs, t->u.hybrid.n_seq);
            memcpy(&copy, t, sizeof copy);
            t = &copy;
        }
        int64_t n_tok = 0, out = 0;
        switch (t->k) {
        case K_EMBED: n_tok = t->u.embed.n_tok; point(c, &t->u.embed.ids, n_tok); break;
        case K_QKV: {
            lg_op_qkv *a = &t->u.qkv;
            n_tok = a->n_tok;
            point(c, &a->rope_cos, n_tok * (a->geom.head_dim / 2));
            point(c, &a->rope_sin, n_tok * (a->geom.head_dim / 2));
            point(c, &a->dst_page, n_tok);
            point(c, &a->dst_slot, n_tok);
            break;
        }
        case K_KV_WRITE: {
            lg_op_kv_write *a = &t->u.kv_write;
            n_tok = a->n_tok;
            point(c, &a->rope_cos, a->rope_cos ? n_tok * (a->geom.head_dim / 2) : 0);
            point(c, &a->rope_sin, a->rope_sin ? n_tok * (a->geom.head_dim / 2) : 0);
            point(c, &a->dst_page, n_tok);
            point(c, &a->dst_slot, n_tok);
            break;
        }
        case K_ATTEND: {
            lg_op_attend *a = &t->u.attend;
            n_tok = a->n_tok;
            attends = true;
            t->decode = decode_rows(a);
            if (!t->decode) graph_able = false;
            t->seq_host = a->seq;
            t->idx_host = a->idx;
            point(c, &a->seq, n_tok);
            point(c, &a->idx, n_tok);
            a->seqs = (const lg_kv_seq *)point_seqs(c, a->seqs, a->n_seq);
            break;
        }
        case K_HYBRID: {
            lg_op_attend_hybrid *a = &t->u.hybrid;
            n_tok = a->n_seq;
            attends = true;
            t->read_host = a->read;
            t->make_host = a->make;
            point(c, &a->read, a->geom.n_head_kv);
            point(c, &a->make, a->geom.n_head_kv);
            point(c, &a->budget, n_tok);
            point(c, &a->dense, n_tok);
            a->seqs = (const lg_kv_seq *)point_seqs(c, a->seqs, n_tok);
            t->counts = (uint32_t *)&zero_counts[i];
            point(c, &t->counts, 1);
            break;
        }
        case K_OBSERVE: {
            lg_op_observe *a = &t->u.observe;
            n_tok = a->n_tok;
            graph_able = false; /* its grid follows the length */
            t->len = a->seq->len;
            point(c, &a->idx, n_tok);
            a->seq = (const lg_kv_seq *)point_seqs(c, a->seq, 1);
            break;
        }
        case K_PRODUCT: n_tok = t->u.product.n_tok; break;
        case K_GATE_UP: n_tok = t->u.gate_up.n_tok; break;
        case K_LOGITS: n_tok = t->u.logits.n_row; point(c, &t->u.logits.row, n_tok); break;
        case K_ARGMAX: n_tok = t->u.argmax.n_row; out = n_tok * 4; break;
        case K_SAMPLE: {
            lg_op_sample *a = &t->u.sample;
            n_tok = a->n_row;
            out = n_tok * 4;
            for (int64_t s = 0; s < n_tok; s++) {
                t->top_k = t->top_k || a->draw[s].top_k > 0;
                t->top_p = t->top_p || a->draw[s].top_p < 1;
            }
            point(c, &a->draw, n_tok);
            point(c, &a->recent, n_tok * LG_RECENT);
            break;
        }
        case K_FETCH: out = t->u.fetch.bytes; break;
        }
        if (n_tok > DECODE_ROWS) graph_able = false;
        if (out) {
            t->out = c->turns[c->now].out + c->out_bytes;
            c->out_bytes += (out + 15) / 16 * 16;
        }
    }
    return attends && graph_able;
}

/* ---- random rows -------------------------------------------------------------------------------------- */
static void cuda_kv_random(lg_ops_ctx *c, lg_kv_layer kv, const lg_kv_geom *g, const int32_t *page, int64_t n_page, uint64_t seed) {
    int32_t *dev = NULL;
    lg_error err;
    use(c);
    if (n_page < 1) return;
    if (lg_cuda_new((void **)&dev, n_page * 4, "a page list", &err) != LG_OK) {
        if (c->failed == LG_OK) {
            c->failed = err.code;
            c->why = err;
        }
        return;
    }
    cudaError_t e = lg_cuda_push_run(&c->push, dev, page, n_page * 4);
#define X(E) k_random<E><<<(unsigned)(8 * c->env.n_sm), 256, 0, c->stream>>>(kv, *g, dev, n_page * g->n_head_kv * LG_PAGE, seed)
    if (e == cudaSuccess) BY_HEAD(g->head_dim, X)
#undef X
    if (e == cudaSuccess) e = cudaGetLastError();
    if (e == cudaSuccess) e = cudaStreamSynchronize(c->stream);
    cudaFree(dev);
    stick(c, e, "kv_random");
}

/* ---- running ---------------------------------------------------------------------------------------- */
/* A warp an item, four a block; E*32 floats of shared memory a warp. */
template <typename A> static void launch_heads(lg_ops_ctx *c, void (*f)(A), const A &a, int e) {
    if (a.n_item > 0) lg_cuda_launch(f, dim3(blocks_of(a.n_item, 4)), dim3(128), (size_t)(4 * e * 32 * 4), c->stream, true, a);
}

template <typename O> static lg_cuda_decode decode_of(const lg_ops_ctx *c, const task *t, const O *a);
static lg_cuda_decode hybrid_of(const lg_ops_ctx *c, const task *t);
/* Whether the attention behind qkv op t takes its heads raw: it alone reads them, and one product of one row writes each number once. */
static bool leaves_raw(const lg_ops_ctx *c, const task *t) {
    const lg_op_qkv *a = &t->u.qkv;
    const task *next = t + 1, *end = c->tasks + c->n_task;
    if (!lg_cuda_pdl || a->n_tok != 1 || a->q_norm || a->k_norm || a->k_raw || a->v_raw || next == end) return false;
    const lg_weight *w[3] = { a->wq, a->wk, a->wv };
    for (int i = 0; i < 3; i++)
        if (t->lora[i].rank || w[i]->dtype != w[0]->dtype || !lg_cuda_streams(&c->env, w[i])) return false;
    for (const task *o = c->tasks; o < end; o++) {
        if (o->k == K_OBSERVE) return false;
        if (o->k == K_FETCH && (const float *)o->u.fetch.src < a->q + w[0]->n_out && (const float *)o->u.fetch.src + o->u.fetch.bytes / 4 > a->q) return false;
        if (o > next && o[-1].k != K_QKV && ((o->k == K_ATTEND && o->u.attend.q == a->q) || (o->k == K_HYBRID && o->u.hybrid.q == a->q))) return false;
    }
    if (next->k == K_ATTEND && next->decode && next->u.attend.q == a->q) {
        const lg_cuda_decode d = decode_of(c, next, &next->u.attend);
        return lg_cuda_decode_raw(&c->env, &d);
    }
    if (next->k != K_HYBRID || next->u.hybrid.q != a->q) return false;
    const lg_cuda_decode d = hybrid_of(c, next);
    return lg_cuda_decode_raw(&c->env, &d);
}

static void run_qkv(lg_ops_ctx *c, const task *t) {
    const lg_op_qkv *a = &t->u.qkv;
    const int64_t d = a->geom.head_dim, nkv = a->geom.n_head_kv * d;
    const bool raw = leaves_raw(c, t);
    const int64_t size = c->raw_bytes / 8; /* floats of one buffer of raw heads */
    const int turn = c->raw_used == 1;
    float *q = raw ? c->raw + turn * size : a->q, *k = raw ? q + a->n_head * d : c->kv_rows, *v = k + a->n_tok * nkv;
    const lg_cuda_in in = { a->x, a->norm, a->eps, NULL, a->n_tok };
    const lg_cuda_out out[3] = { { a->wq, q, a->lora_q, NULL, NULL }, { a->wk, k, a->lora_k, NULL, NULL }, { a->wv, v, a->lora_v, NULL, NULL } };
    lg_cuda_product(&c->env, &c->work, &in, out, 3, false);
    if (raw) {
        c->raw_now = lg_cuda_raw{ q, k, v, a->bq, a->bk, a->bv, a->rope_cos, a->rope_sin, c->raw_used ? c->raw + (c->raw_used - 1) * size : NULL, c->raw_used ? (int32_t)size : 0, a->rope_interleaved };
        c->raw_used = turn + 1;
        return;
    }
    const finish_args f = { q, k, v, a->bq, a->bk, a->bv, a->q_norm, a->k_norm, a->eps, a->rope_cos, a->rope_sin, a->rope_interleaved, a->kv, a->geom,
                            a->dst_page, a->dst_slot, a->n_head, a->n_tok * (a->n_head + 2 * a->geom.n_head_kv), a->k_raw, a->v_raw };
#define X(E) launch_heads(c, k_finish<E>, f, E)
    BY_HEAD(d, X)
#undef X
}

static void run_kv_write(lg_ops_ctx *c, const lg_op_kv_write *a) {
    const write_args w = { a->kv, a->geom, a->src, a->k, a->v, a->rope_cos, a->rope_sin, a->rope_interleaved, a->dst_page, a->dst_slot, a->n_tok * a->geom.n_head_kv };
#define X(E) launch_heads(c, k_write<E>, w, E)
    BY_HEAD(a->geom.head_dim, X)
#undef X
}

static void join_side(lg_ops_ctx *c) {
    if (!c->side_busy) return;
    stick(c, cudaStreamWaitEvent(c->stream, c->join, 0), "attend_hybrid");
    c->side_busy = false;
}

/* What dense and hybrid attention have in common. */
template <typename O> static lg_cuda_decode decode_of(const lg_ops_ctx *c, const task *t, const O *a) {
    lg_cuda_decode d;
    memset(&d, 0, sizeof d);
    d.out = a->out;
    d.q = a->q;
    d.kv = a->kv;
    d.geom = a->geom;
    d.seqs = (const lg_cuda_seq *)a->seqs;
    d.n_seq = a->n_seq;
    d.n_head = a->n_head;
    d.scale = a->scale;
    d.max_len = c->max_len;
    d.early = t->early;
    d.sized = t->sized;
    return d;
}

static lg_cuda_decode hybrid_of(const lg_ops_ctx *c, const task *t) {
    const lg_op_attend_hybrid *a = &t->u.hybrid;
    lg_cuda_decode d = decode_of(c, t, a);
    d.read = a->read;
    d.make = a->make;
    d.budget = a->budget;
    d.dense = a->dense;
    d.sets = a->sets;
    d.select = a->select;
    d.read_host = t->read_host;
    d.make_host = t->make_host;
    d.spread = a->spread; /* stays on the host */
    d.score = c->score + c->half * (c->score_bytes / 8);
    d.making = t->counts;
    if (t->reads >= 0) d.made = lg_cuda_count{ c->tasks[t->reads].counts, c->tasks[t->reads].n_making };
    return d;
}

/* Where the product that takes the result of decode attention t comes next, its input is left for it and its blocks may start. */
template <typename O> static void hand_on(lg_ops_ctx *c, const task *t, const O *a, lg_cuda_decode *d) {
    const task *next = t + 1 < c->tasks + c->n_task ? t + 1 : NULL;
    const lg_op_product_add *p = next && next->k == K_PRODUCT ? &next->u.product : NULL;
    if (!p || p->x != a->out || p->n_tok != a->n_seq) return;
    if (lg_cuda_decode_leaves(d)) d->rows = lg_cuda_leave(&c->env, &c->work, p->w, a->out, a->n_seq);
    d->release = p->n_tok == 1 ? lg_cuda_streams(&c->env, p->w) : lg_cuda_streams_rows(&c->env, &p->w, 1, p->n_tok, true);
}

static void run_hybrid(lg_ops_ctx *c, task *t, const lg_cuda_raw &raw) {
    const lg_op_attend_hybrid *a = &t->u.hybrid;
    bool makes = a->spread.n_latest > 0;
    lg_cuda_decode d = hybrid_of(c, t);
    d.raw = raw;
    hand_on(c, t, a, &d);
    for (int h = 0; h < a->geom.n_head_kv; h++) makes = makes || t->make_host[h] >= 0;
    join_side(c); /* sets and scores of the layer before */
    lg_cuda_decode_attend(&c->env, &d);
    if (!makes) return;
    c->half ^= 1;
    if (!c->use_side) {
        t->n_making = lg_cuda_decode_select(&c->env, &d, c->stream, c->select);
        return;
    }
    stick(c, cudaEventRecord(c->fork, c->stream), "attend_hybrid");
    stick(c, cudaStreamWaitEvent(c->side, c->fork, 0), "attend_hybrid");
    t->n_making = lg_cuda_decode_select(&c->env, &d, c->side, c->select);
    stick(c, cudaEventRecord(c->join, c->side), "attend_hybrid");
    c->side_busy = true;
}

static void run_attend(lg_ops_ctx *c, const task *t, const lg_cuda_raw &raw) {
    const lg_op_attend *a = &t->u.attend;
    if (a->n_tok < 1) return;
    if (t->decode) {
        lg_cuda_decode d = decode_of(c, t, a);
        d.raw = raw;
        hand_on(c, t, a, &d);
        lg_cuda_decode_attend(&c->env, &d);
        return;
    }
    lg_cuda_prefill p;
    memset(&p, 0, sizeof p);
    p.out = a->out;
    p.q = a->q;
    p.kv = a->kv;
    p.geom = a->geom;
    p.seqs = (const lg_cuda_seq *)a->seqs;
    p.n_seq = a->n_seq;
    p.seq = a->seq;
    p.idx = a->idx;
    p.seq_host = t->seq_host;
    p.idx_host = t->idx_host;
    p.n_tok = a->n_tok;
    p.n_head = a->n_head;
    p.scale = a->scale;
    lg_cuda_prefill_attend(&c->env, &p);
}

static void run_fetch(lg_ops_ctx *c, const task *t) {
    join_side(c); /* what is fetched may be a set */
    const fetch_op *f = &t->u.fetch;
    if (f->bytes <= OUT_BYTES && f->bytes % 4 == 0)
        lg_cuda_launch(k_stage<uint32_t>, dim3((unsigned)min64(blocks_of(f->bytes / 4, 128), 64)), dim3(128), 0, c->stream, false, (uint32_t *)t->out, (const uint32_t *)f->src, (int)(f->bytes / 4));
    else
        stick(c, cudaMemcpyAsync(t->out, f->src, (size_t)f->bytes, cudaMemcpyDeviceToHost, c->stream), "fetch");
}

/* What the next op does with the result of n_tok rows at y of op t: into `out`. */
static lg_cuda_out with_next(const lg_ops_ctx *c, const task *t, lg_cuda_out out, const float *y, int64_t n_tok) {
    if (++t == c->tasks + c->n_task) return out;
    const lg_op_gate_up *g = &t->u.gate_up;
    const lg_op_qkv *q = &t->u.qkv;
    const lg_op_product_add *p = &t->u.product;
    if (t->k == K_GATE_UP && g->x == y && g->n_tok == n_tok) out.norm = g->norm, out.next = g->gate;
    if (t->k == K_QKV && q->x == y && q->n_tok == n_tok) out.norm = q->norm, out.next = q->wq;
    if (t->k == K_PRODUCT && p->x == y && p->n_tok == n_tok) out.next = p->w;
    return out;
}

static void run_list(lg_ops_ctx *c, bool decode_step) {
    /* Pinned memory is mapped: a kernel reads it, so that a graph can. The first kernel of a step does so beside its own work. */
    uint8_t *const pin = c->turns[c->now].pin;
    const lg_cuda_staged block = { (uint4 *)c->dev, (const uint4 *)pin, (int32_t)(c->block_bytes / 16) };
    const bool along = decode_step && c->block_bytes && c->tasks[0].k == K_EMBED && c->tasks[0].u.embed.n_tok > 0;
    if (c->block_bytes && !along) {
        if (decode_step)
            lg_cuda_launch(k_stage<uint4>, dim3((unsigned)min64(blocks_of(c->block_bytes / 16, 128), 64)), dim3(128), 0, c->stream, false, (uint4 *)c->dev, (const uint4 *)pin,
                           (int)(c->block_bytes / 16));
        else
            stick(c, cudaMemcpyAsync(c->dev, pin, (size_t)c->block_bytes, cudaMemcpyHostToDevice, c->stream), "staging");
    }
    c->work.left.of = NULL;
    c->half = c->raw_used = 0;
    c->raw_now = lg_cuda_raw{};
    for (int i = 0; i < c->n_task && c->failed == LG_OK; i++) {
        task *t = &c->tasks[i];
        const lg_cuda_raw raw = c->raw_now; /* what the op before left */
        c->raw_now = lg_cuda_raw{};
        c->work.twin = c->work.left;
        c->work.left.of = NULL;
        switch (t->k) {
        case K_EMBED: {
            const lg_op_embed *a = &t->u.embed;
            const bool here = along && i == 0;
            lg_cuda_embed(&c->env, a->x, a->w, here ? (const int32_t *)(const void *)(pin + ((const uint8_t *)a->ids - c->dev)) : a->ids, a->n_tok, here ? &block : NULL);
            break;
        }
        case K_QKV: run_qkv(c, t); break;
        case K_ATTEND: run_attend(c, t, raw); break;
        case K_HYBRID: run_hybrid(c, t, raw); break;
        case K_OBSERVE: lg_cuda_observe(&c->env, &t->u.observe, t->len); break;
        case K_PRODUCT: {
            const lg_op_product_add *a = &t->u.product;
            const lg_cuda_in in = { a->x, NULL, 0, NULL, a->n_tok };
            const lg_cuda_out out = with_next(c, t, lg_cuda_out{ a->w, a->y, a->lora, NULL, NULL }, a->y, a->n_tok);
            lg_cuda_product(&c->env, &c->work, &in, &out, 1, true);
            break;
        }
        case K_GATE_UP: {
            const lg_op_gate_up *a = &t->u.gate_up;
            const lg_cuda_in in = { a->x, a->norm, a->eps, NULL, a->n_tok };
            const lg_cuda_out gate = { a->gate, NULL, a->lora_gate, NULL, NULL }, up = with_next(c, t, lg_cuda_out{ a->up, NULL, a->lora_up, NULL, NULL }, a->h, a->n_tok);
            lg_cuda_gate_up(&c->env, &c->work, &in, &gate, &up, a->h);
            break;
        }
        case K_LOGITS: {
            const lg_op_logits *a = &t->u.logits;
            const lg_cuda_in in = { a->x, a->norm, a->eps, a->row, a->n_row };
            const lg_cuda_out out = { a->w, a->logits, NULL, NULL, NULL };
            lg_cuda_product(&c->env, &c->work, &in, &out, 1, false);
            break;
        }
        case K_KV_WRITE: run_kv_write(c, &t->u.kv_write); break;
        case K_ARGMAX: {
            const lg_op_argmax *a = &t->u.argmax;
            if (a->n_row < 1) break;
            lg_cuda_launch(k_argmax_part, dim3(ARG_BLOCKS, (unsigned)a->n_row), dim3(256), 0, c->stream, true, c->argmax_part, a->logits, a->n_vocab);
            lg_cuda_launch(k_argmax, dim3((unsigned)a->n_row), dim3(ARG_BLOCKS), 0, c->stream, true, (int32_t *)t->out, c->env.draws, (const uint64_t *)c->argmax_part);
            break;
        }
        case K_SAMPLE: {
            lg_op_sample a = t->u.sample;
            a.id = (int32_t *)t->out;
            lg_cuda_sample(&c->env, &a, t->top_k, t->top_p);
            break;
        }
        case K_FETCH: run_fetch(c, t); break;
        }
        cudaError_t e = cudaGetLastError();
        if (e == cudaSuccess && *lg_cuda_blas_problem()) e = cudaErrorUnknown;
        if (e == cudaSuccess && c->each) e = cudaStreamSynchronize(c->stream);
        stick(c, e, kind_name[t->k]);
    }
    join_side(c);
    if (c->failed != LG_OK && c->raw) cudaMemsetAsync(c->raw, 0xff, (size_t)c->raw_bytes, c->stream);
    else if (c->raw_used) stick(c, cudaMemsetAsync(c->raw + (c->raw_used - 1) * (c->raw_bytes / 8), 0xff, (size_t)(c->raw_bytes / 2), c->stream), "qkv");
}

/* ---- scratch of a list ------------------------------------------------------------------------------ */
static lg_status ensure(lg_ops_ctx *c, lg_error *err) {
    lg_status st = LG_OK;
    lg_cuda_work n;
    int64_t scratch = 0, kv = 0, select = 0, score = 0, raw = 0;
    const char *missing = NULL;
    memset(&n, 0, sizeof n);
    for (int i = 0; i < c->n_task; i++) {
        const task *t = &c->tasks[i];
        const lg_weight *w[3] = { NULL, NULL, NULL };
        int64_t n_tok = 0;
        switch (t->k) {
        case K_EMBED: w[0] = t->u.embed.w; break; /* needs no scratch, but must be bound */
        case K_QKV:
            w[0] = t->u.qkv.wq; w[1] = t->u.qkv.wk; w[2] = t->u.qkv.wv;
            n_tok = t->u.qkv.n_tok;
            kv = max64(kv, 2 * n_tok * t->u.qkv.geom.n_head_kv * t->u.qkv.geom.head_dim * 4);
            if (n_tok == 1) raw = max64(raw, 8 * (((t->u.qkv.n_head + 2 * t->u.qkv.geom.n_head_kv) * (int64_t)t->u.qkv.geom.head_dim + 3) / 4 * 4)); /* (made absent in fours) */
            if (t->u.qkv.geom.head_dim > 256) missing = "qkv: head size beyond 256";
            break;
        case K_PRODUCT: w[0] = t->u.product.w; n_tok = t->u.product.n_tok; break;
        case K_GATE_UP: w[0] = t->u.gate_up.gate; w[1] = t->u.gate_up.up; n_tok = t->u.gate_up.n_tok; break;
        case K_LOGITS: w[0] = t->u.logits.w; n_tok = t->u.logits.n_row; break;
        case K_ATTEND: {
            const lg_op_attend *a = &t->u.attend;
            scratch = max64(scratch, max64(lg_cuda_decode_scratch(&c->env, a->n_seq, a->n_head, &a->geom), lg_cuda_prefill_scratch(&c->env, a->n_tok, a->n_head, &a->geom)));
            break;
        }
        case K_HYBRID: {
            const lg_op_attend_hybrid *a = &t->u.hybrid;
            for (int32_t s = 0; s < a->n_seq; s++) /* (an op outside a session) */
                if (a->seqs[s].len > c->max_len) c->max_len = (a->seqs[s].len + LG_PAGE - 1) / LG_PAGE * LG_PAGE;
            const int64_t seqs = max64(a->n_seq, min64(c->max_seq, DECODE_ROWS));
            scratch = max64(scratch, lg_cuda_decode_scratch(&c->env, seqs, a->n_head, &a->geom));
            bool makes = false;
            for (int h = 0; h < a->geom.n_head_kv; h++) makes = makes || a->make[h] >= 0;
            int32_t n_make = a->geom.n_head_kv;
            if (a->spread.slot) {
                n_make = 0;
                for (int h = 0; h < a->geom.n_head_kv; h++) n_make += a->spread.n_make[h];
                if (n_make + a->spread.n_latest > LG_CUDA_SETS || a->geom.n_head_kv > LG_CUDA_SPREAD)
                    missing = "attend_hybrid: budgets per head for more than 128 heads or 256 sets of a layer";
            }
            if (a->spread.n_latest && (a->select.rule == LG_RULE_TOPP || a->select.rule == LG_RULE_THRESHOLD)) missing = "attend_hybrid: latest sets by probability";
            if (makes) {
                select = max64(select, lg_cuda_select_scratch(&c->env, a->n_seq, n_make, c->max_len));
                score = max64(score, 2 * (int64_t)a->n_seq * a->geom.n_head_kv * c->max_len * 4);
            }
            break;
        }
        case K_OBSERVE: scratch = max64(scratch, lg_cuda_observe_scratch(t->u.observe.n_tok, t->u.observe.seq->len, t->u.observe.n_head)); break;
        case K_KV_WRITE: if (t->u.kv_write.geom.head_dim > 256) missing = "kv_write: head size beyond 256"; break;
        case K_ARGMAX: if (t->u.argmax.n_row > 4096) missing = "argmax: more than 4096 rows"; break;
        case K_SAMPLE: scratch = max64(scratch, lg_cuda_sample_scratch(t->u.sample.n_row, t->u.sample.n_vocab)); break;
        case K_FETCH: break;
        }
        const int64_t partial = n.partial_bytes;
        n.partial_bytes = 4 * LG_CODES_HEAD;
        for (int k = 0; k < 3; k++)
            if (w[k]) {
                if (!w[k]->packed) missing = "a weight that was not bound";
                lg_cuda_work_need(&c->env, &n, w[k], n_tok);
            }
        n.partial_bytes = max64(n.partial_bytes, partial);
        for (int k = 0; k < 3; k++)
            if (t->lora[k].rank > LG_LORA_RANK) missing = "a low-rank addition of rank beyond 256";
    }
    if (missing) LG_TRY(lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "device cuda:%d: %s", c->device, missing));
    LG_TRY(reserve_scratch(c, scratch, err));
    LG_TRY(grow(c, &c->kv_rows, &c->kv_bytes, kv, "K and V of a chunk", err));
    LG_TRY(grow(c, &c->select, &c->select_bytes, select, "the scratch of selection", err));
    if (c->raw_bytes < raw) {
        LG_TRY(grow(c, &c->raw, &c->raw_bytes, raw, "heads", err));
        cudaMemsetAsync(c->raw, 0xff, (size_t)raw, c->stream);
    }
    LG_TRY(grow(c, &c->score, &c->score_bytes, score, "scores", err));
    LG_TRY(grow(c, &c->work.x, &c->work.x_bytes, n.x_bytes, "product inputs", err));
    LG_TRY(grow(c, &c->work.sums, &c->work.sums_bytes, n.sums_bytes, "group sums", err));
    if (c->work.y_bytes < n.y_bytes) {
        int64_t again = c->work.y_bytes;
        LG_TRY(grow(c, &c->work.y0, &again, n.y_bytes, "gate", err));
        LG_TRY(grow(c, &c->work.y1, &c->work.y_bytes, n.y_bytes, "up", err));
    }
    LG_TRY(grow(c, &c->work.ready, &c->work.ready_bytes, n.ready_bytes, "activations", err));
    LG_TRY(grow(c, &c->work.wide, &c->work.wide_bytes, n.wide_bytes, "an expanded weight", err));
    LG_TRY(grow(c, &c->work.partial, &c->work.partial_bytes, n.partial_bytes, "sums of parts", err));
    LG_TRY(grow(c, &c->work.lora, &c->work.lora_bytes, n.lora_bytes, "low-rank additions", err));
done:
    return st;
}

/* ---- sync ------------------------------------------------------------------------------------------- */
/* Field by field: the padding of the caller's structs holds anything. */
static void key_add(lg_ops_ctx *c, const void *p, int64_t n) {
    if (c->key_bytes + n <= KEY_BYTES) memcpy(c->key + c->key_bytes, p, (size_t)n);
    c->key_bytes += n;
}
template <typename... A> static void keys(lg_ops_ctx *c, const A &...a) { (key_add(c, &a, sizeof a), ...); }
static void key_kv(lg_ops_ctx *c, const lg_kv_layer &kv, const lg_kv_geom &g) { keys(c, kv.k, kv.v, g.dtype, g.n_head_kv, g.head_dim, g.row_bytes); }
/* read, make: on the host. */
static void key_roles(lg_ops_ctx *c, const lg_op_attend_hybrid &a, const int32_t *read, const int32_t *make) {
    key_add(c, read, a.geom.n_head_kv * 4);
    key_add(c, make, a.geom.n_head_kv * 4);
    if (!a.spread.slot) return;
    keys(c, a.spread.least);
    key_add(c, a.spread.window, a.geom.n_head_kv * 4);
    key_add(c, a.spread.n_make, a.geom.n_head_kv * 4);
    for (int h = 0; h < a.geom.n_head_kv; h++) {
        if (make[h] >= 0) key_add(c, a.spread.slot + make[h], a.spread.n_make[h] * 4);
        if (read[h] >= 0) keys(c, a.spread.slot[read[h]]);
    }
    key_add(c, a.spread.slot + a.spread.latest, a.spread.n_latest * 4);
}
static bool make_key(lg_ops_ctx *c) {
    c->key_bytes = 0;
    for (int i = 0; i < c->n_task; i++) {
        const task *t = &c->tasks[i];
        keys(c, t->k, t->decode, t->early, t->sized, t->out);
        for (int k = 0; k < 3; k++) keys(c, t->lora[k].rank, t->lora[k].scale, t->lora[k].a, t->lora[k].b);
        switch (t->k) {
        case K_EMBED: {
            const lg_op_embed &a = t->u.embed;
            keys(c, a.x, a.w, a.w->packed, a.ids, a.n_tok);
            break;
        }
        case K_QKV: {
            const lg_op_qkv &a = t->u.qkv;
            keys(c, a.q, a.x, a.norm, a.eps, a.wq, a.wk, a.wv, a.wq->packed, a.wk->packed, a.wv->packed, a.bq, a.bk, a.bv, a.q_norm, a.k_norm, a.rope_cos,
                 a.rope_sin, a.rope_interleaved, a.dst_page, a.dst_slot, a.n_tok, a.n_head, a.lora_q, a.lora_k, a.lora_v, a.k_raw, a.v_raw);
            key_kv(c, a.kv, a.geom);
            break;
        }
        case K_ATTEND: {
            const lg_op_attend &a = t->u.attend;
            keys(c, a.out, a.q, a.seqs, a.n_seq, a.n_tok, a.n_head, a.scale);
            key_kv(c, a.kv, a.geom);
            break;
        }
        case K_HYBRID: {
            const lg_op_attend_hybrid &a = t->u.hybrid;
            keys(c, a.out, a.q, a.seqs, a.n_seq, a.budget, a.dense, a.read, a.make, a.sets.idx, a.sets.n, a.sets.cap, a.sets.n_slot, a.sets.block, a.sets.kept_words, a.select.rule,
                 a.select.value, a.select.scale, a.select.sinks, a.select.recents, a.spread.latest, a.spread.n_latest, a.n_head, a.scale);
            key_kv(c, a.kv, a.geom);
            key_roles(c, a, t->read_host, t->make_host);
            break;
        }
        case K_OBSERVE: break; /* in no graph */
        case K_PRODUCT: {
            const lg_op_product_add &a = t->u.product;
            keys(c, a.y, a.x, a.w, a.w->packed, a.n_tok, a.lora);
            break;
        }
        case K_GATE_UP: {
            const lg_op_gate_up &a = t->u.gate_up;
            keys(c, a.h, a.x, a.norm, a.eps, a.gate, a.up, a.gate->packed, a.up->packed, a.n_tok, a.lora_gate, a.lora_up);
            break;
        }
        case K_LOGITS: {
            const lg_op_logits &a = t->u.logits;
            keys(c, a.logits, a.x, a.norm, a.eps, a.w, a.w->packed, a.row, a.n_row);
            break;
        }
        case K_KV_WRITE: {
            const lg_op_kv_write &a = t->u.kv_write;
            keys(c, a.k, a.v, a.rope_cos, a.rope_sin, a.rope_interleaved, a.dst_page, a.dst_slot, a.n_tok, a.src.dtype, a.src.row_bytes);
            key_kv(c, a.kv, a.geom);
            break;
        }
        case K_ARGMAX: keys(c, t->u.argmax.logits, t->u.argmax.n_row, t->u.argmax.n_vocab); break;
        case K_SAMPLE: {
            const lg_op_sample &a = t->u.sample;
            keys(c, a.logits, a.n_row, a.n_vocab, a.draw, a.recent, t->top_k, t->top_p);
            break;
        }
        case K_FETCH: keys(c, t->u.fetch.src, t->u.fetch.bytes); break;
        }
    }
    keys(c, c->block_bytes, c->turns[c->now].pin, c->dev, c->score, c->select, c->max_len);
    return c->key_bytes <= KEY_BYTES;
}

static bool seen_before(lg_ops_ctx *c, uint64_t h) {
    for (int i = 0; i < N_SEEN; i++)
        if (c->seen[i] == h) return true;
    c->seen[c->n_seen++ % N_SEEN] = h;
    return false;
}
static graph *graph_of(lg_ops_ctx *c, uint64_t h) {
    graph *oldest = &c->graphs[0];
    for (int i = 0; i < N_GRAPH; i++) {
        graph *g = &c->graphs[i];
        if (g->exec && g->hash == h && g->key_bytes == c->key_bytes && !memcmp(g->key, c->key, (size_t)c->key_bytes)) {
            g->used = ++c->clock;
            return g;
        }
        if (g->used < oldest->used) oldest = g;
    }
    if (oldest->exec && under_way(c)) cudaStreamSynchronize(c->stream);
    drop_graph(oldest);
    cudaGraph_t made = NULL;
    cudaError_t e = cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeRelaxed);
    if (e == cudaSuccess) {
        run_list(c, true);
        e = cudaStreamEndCapture(c->stream, &made);
    }
    if (e == cudaSuccess && c->failed == LG_OK) e = cudaGraphInstantiate(&oldest->exec, made, 0);
    if (made) cudaGraphDestroy(made);
    stick(c, e, "capturing a decode step");
    if (c->failed != LG_OK) {
        drop_graph(oldest);
        return NULL;
    }
    memcpy(oldest->key, c->key, (size_t)c->key_bytes);
    oldest->key_bytes = c->key_bytes;
    oldest->hash = h;
    oldest->turn = c->now;
    oldest->used = ++c->clock;
    return oldest;
}

/* What the list depends on besides the bytes of its ops, as it was recorded: what is read of the arrays it points to. Goes to c->key. Returns false for a list that
 * can be no graph, or has sequences longer than what was reserved. */
static bool make_rest(lg_ops_ctx *c) {
    c->key_bytes = 0;
    for (int i = 0; i < c->n_task; i++) {
        const task *t = &c->tasks[i];
        if (t->k == K_OBSERVE) return false;
        if (t->k == K_ATTEND) {
            const lg_op_attend &a = t->u.attend;
            if (!decode_rows(&a)) return false;
            keys(c, i > 0 && wrote_newest(t - 1, &a.kv, a.seqs, a.n_seq));
        }
        if (t->k == K_HYBRID) {
            const lg_op_attend_hybrid &a = t->u.hybrid;
            for (int32_t s = 0; s < a.n_seq; s++)
                if (a.seqs[s].len > c->max_len) return false;
            keys(c, i > 0 && wrote_newest(t - 1, &a.kv, a.seqs, a.n_seq));
            key_roles(c, a, a.read, a.make);
        }
        if (t->k == K_SAMPLE)
            for (int64_t s = 0; s < t->u.sample.n_row; s++) keys(c, t->u.sample.draw[s].top_k > 0, t->u.sample.draw[s].top_p < 1);
    }
    return c->key_bytes <= KEY_BYTES;
}
/* The graph that was made of this very list, or NULL. Looking through a list of 150 ops, or making its key, takes ten times as long as this, and the device waits meanwhile. */
static graph *same_again(lg_ops_ctx *c) {
    const uint64_t bound = lg_cuda_bound();
    bool made = false;
    for (int i = 0; i < N_GRAPH; i++) {
        graph *g = &c->graphs[i];
        if (!g->exec || g->turn != c->now || g->of.n_task != c->n_task || g->of.bound != bound || g->of.max_len != c->max_len || memcmp(g->of.tasks, c->tasks, (size_t)c->n_task * sizeof(task))) continue;
        if (!made && !make_rest(c)) return NULL;
        made = true;
        if (g->of.rest_bytes == c->key_bytes && !memcmp(g->of.rest, c->key, (size_t)c->key_bytes)) return g;
    }
    return NULL;
}
/* Keeps the list before it is resolved. */
static void keep_record(lg_ops_ctx *c) {
    c->rest_bytes = c->use_graph && make_rest(c) ? c->key_bytes : -1;
    if (c->rest_bytes < 0) return;
    memcpy(c->rest, c->key, (size_t)c->rest_bytes);
    memcpy(c->recorded, c->tasks, (size_t)c->n_task * sizeof(task));
}
/* What was kept, for its graph, now that it is resolved. Where there is no memory the graph does without. */
static void note_record(lg_ops_ctx *c, graph *g) {
    record *r = &g->of;
    if (c->rest_bytes < 0 || r->n_task != c->n_task || r->n_array != c->n_array || r->rest_bytes != c->rest_bytes) record_free(r);
    if (c->rest_bytes < 0) return;
    if (!r->tasks) {
        r->tasks = (task *)lg_base_alloc((int64_t)c->n_task * (int64_t)sizeof(task));
        r->rest = (uint8_t *)lg_base_alloc(c->rest_bytes + 1);
        r->arrays = (array *)lg_base_alloc((c->n_array + 1) * (int64_t)sizeof(array));
        r->out = (uint8_t **)lg_base_alloc((int64_t)c->n_task * (int64_t)sizeof *r->out);
        if (!r->tasks || !r->rest || !r->arrays || !r->out) {
            record_free(r);
            return;
        }
    }
    memcpy(r->tasks, c->recorded, (size_t)c->n_task * sizeof(task));
    memcpy(r->rest, c->rest, (size_t)c->rest_bytes);
    memcpy(r->arrays, c->arrays, (size_t)c->n_array * sizeof(array));
    for (int i = 0; i < c->n_task; i++) r->out[i] = c->tasks[i].out;
    r->n_task = c->n_task;
    r->n_array = c->n_array;
    r->rest_bytes = c->rest_bytes;
    r->max_len = c->max_len;
    r->bound = lg_cuda_bound();
}

/* Where the results of the list go when it is done. */
static void note_results(lg_ops_ctx *c) {
    turn *w = &c->turns[c->now];
    w->n_due = 0;
    for (int i = 0; i < c->n_task; i++) {
        const task *t = &c->tasks[i];
        if (t->k == K_SAMPLE) w->due[w->n_due++] = result{ t->u.sample.id, t->out, t->u.sample.n_row * 4 };
        if (t->k == K_ARGMAX) w->due[w->n_due++] = result{ t->u.argmax.id, t->out, t->u.argmax.n_row * 4 };
        if (t->k == K_FETCH) w->due[w->n_due++] = result{ t->u.fetch.dst, t->out, t->u.fetch.bytes };
    }
}
static const char step_name[] = "a decode step";
static bool start_again(lg_ops_ctx *c) {
    graph *g = same_again(c);
    if (!g) return false;
    fill_block(c, g->of.arrays, g->of.n_array);
    if (!g->exec) return false; /* (room for page tables was used up, and all graphs are gone) */
    g->used = ++c->clock;
    for (int i = 0; i < c->n_task; i++) c->tasks[i].out = g->of.out[i];
    if (c->failed == LG_OK) stick(c, cudaGraphLaunch(g->exec, c->stream), "launching a decode step");
    c->turns[c->now].what = step_name;
    return true;
}

/* What is recorded, on its way. */
static lg_status start(lg_ops_ctx *c, lg_error *err) {
    lg_status st = LG_OK;
    turn *w = &c->turns[c->now];
    bool as_graph = false;
    uint64_t key_hash = 0;
    if (start_again(c)) return LG_OK;
    c->env.draws = c->drawn + c->now * LG_DRAWN_ROWS;
    c->env.drawn = c->drawn + (1 - c->now) * LG_DRAWN_ROWS;
    keep_record(c);
    LG_TRY(ensure(c, err));
    resolve(c, true);
    if (c->failed != LG_OK) return LG_OK; /* reported by sync */
    if (c->block_bytes > c->block_cap) LG_TRY(grow(c, &c->dev, &c->block_cap, max64(c->block_bytes * 2, 1 << 20), "staged arrays", err));
    LG_TRY(grow_pinned(c, &w->pin, &w->pin_cap, c->block_cap, err));
    LG_TRY(grow_pinned(c, &w->out, &w->out_cap, c->out_bytes, err));
    as_graph = resolve(c, false) && make_key(c);
    fill_block(c, c->arrays, c->n_array);
    key_hash = as_graph ? lg_base_hash_64(c->key, c->key_bytes) : 0;
    w->what = c->n_task == 1 ? kind_name[c->tasks[0].k] : "the step";
    if (c->failed == LG_OK && as_graph && seen_before(c, key_hash)) {
        graph *g = graph_of(c, key_hash);
        if (g) stick(c, cudaGraphLaunch(g->exec, c->stream), "launching a decode step");
        if (g) note_record(c, g); /* (its graph is on its way) */
        w->what = step_name;
    } else if (c->failed == LG_OK) {
        run_list(c, as_graph);
    }
done:
    return st;
}

/* The sticky error, if there is one: nobody gets the results of what was under way. */
static lg_status report(lg_ops_ctx *c, lg_status st, lg_error *err) {
    if (c->failed != LG_OK) {
        st = c->failed;
        if (err) *err = c->why;
        c->failed = LG_OK;
    }
    if (st != LG_OK && under_way(c)) {
        cudaStreamSynchronize(c->stream);
        c->turns[0].ticket = c->turns[1].ticket = 0;
    }
    if (!under_way(c)) c->now = 0;
    return st;
}

static void deliver(turn *w) {
    for (int i = 0; i < w->n_due; i++) memcpy(w->due[i].to, w->due[i].from, (size_t)w->due[i].bytes);
    w->n_due = 0;
    w->ticket = 0;
}

static lg_status cuda_wait(lg_ops_ctx *c, int64_t ticket, lg_error *err) {
    use(c);
    for (;;) { /* the older one first */
        turn *w = &c->turns[0], *other = &c->turns[1];
        if (!w->ticket || (other->ticket && other->ticket < w->ticket)) w = other;
        if (!w->ticket || w->ticket > ticket || c->failed != LG_OK) break;
        stick(c, cudaEventSynchronize(w->done), w->what);
        if (c->failed == LG_OK) deliver(w);
    }
    return report(c, LG_OK, err);
}

static lg_status cuda_submit(lg_ops_ctx *c, int64_t *ticket, lg_error *err) {
    lg_status st = LG_OK;
    turn *w = &c->turns[c->now];
    use(c);
    if (w->ticket) st = cuda_wait(c, w->ticket, err);
    w = &c->turns[c->now];
    if (st == LG_OK && c->failed == LG_OK) st = start(c, err);
    if (st == LG_OK && c->failed == LG_OK) stick(c, cudaEventRecord(w->done, c->stream), "launching a decode step");
    if (st == LG_OK && c->failed == LG_OK) {
        note_results(c);
        w->ticket = *ticket = ++c->n_ticket;
        c->now ^= 1;
    }
    c->n_task = 0;
    c->side_busy = false;
    return report(c, st, err);
}

static lg_status cuda_sync(lg_ops_ctx *c, lg_error *err) {
    int64_t ticket = 0;
    lg_status st = cuda_wait(c, c->n_ticket, err); /* (or the sticky error) */
    if (st == LG_OK && c->n_task) {
        st = cuda_submit(c, &ticket, err);
        return st == LG_OK ? cuda_wait(c, ticket, err) : st;
    }
    c->n_task = 0;
    c->side_busy = false;
    return st;
}

extern "C" const lg_ops lg_ops_cuda = {
    .name = "cuda", .host_memory = false, .chunk = 2048, .open = cuda_open, .close = cuda_close, .describe = cuda_describe, .alloc = cuda_alloc, .free = cuda_free,
    .upload = cuda_upload, .download = cuda_download, .copy = cuda_copy, .download_rows = cuda_download_rows, .host_alloc = cuda_host_alloc, .host_free = cuda_host_free,
    .in_use = cuda_in_use, .weight_bind = cuda_weight_bind, .weight_unbind = cuda_weight_unbind, .lora_bind = cuda_lora_bind, .lora_unbind = cuda_lora_unbind, .reserve = cuda_reserve,
    .embed = cuda_embed, .qkv = cuda_qkv, .attend = cuda_attend, .attend_hybrid = cuda_attend_hybrid, .observe = cuda_observe, .product_add = cuda_product_add, .gate_up = cuda_gate_up,
    .logits = cuda_logits, .kv_write = cuda_kv_write, .argmax = cuda_argmax, .sample = cuda_sample, .fetch = cuda_fetch, .kv_random = cuda_kv_random, .sync = cuda_sync, .submit = cuda_submit, .wait = cuda_wait,
};
