/* The CPU back end. Ops are appended to a list; sync runs the whole list in one parallel region: every thread walks
 * the list, does its share of each phase and meets the others at a spin barrier, so that a decode step of hundreds of
 * small phases pays no fork and join. Nothing here allocates between reserve calls. */
#include "ops/cpu/attend.h"
#include "ops/cpu/gemm.h"
#include "ops/ref/ref.h"
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

enum { MAX_OPS = 512, SPINS = 400, SLAB_BYTES = 16 << 20 };

typedef enum kind { K_EMBED, K_QKV, K_ATTEND, K_HYBRID, K_OBSERVE, K_PRODUCT, K_GATE_UP, K_LOGITS, K_KV_WRITE, K_ARGMAX, K_FETCH } kind;
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
        struct { void *dst; const void *src; int64_t bytes; } fetch;
    } u;
} task;

typedef struct slab { struct slab *below; _Alignas(64) int64_t used; } slab; /* SLAB_BYTES, this head first */

struct lg_ops_ctx {
    lg_gemm g;
    slab *slab;
    int nth;
    int64_t max_tok;
    int n_task;
    task tasks[MAX_OPS];
    void *in;          /* one input form, remade by each product */
    float *k, *v, *rows;
    uint8_t *thread_scratch;
    int64_t thread_bytes;
    void *attend;
    int64_t in_bytes, kv_bytes, rows_bytes, attend_bytes;
    atomic_llong turn[MAX_OPS]; /* of each task: outputs handed out beyond the fixed shares */
    /* Low-rank additions: A x of up to three projections, and their input forms. */
    int64_t max_rank;  /* over bound ones */
    float *low;
    uint8_t *low_in;
    int64_t low_bytes, low_in_bytes, low_in_each;
    /* Sense-reversing barrier on lines of their own. */
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int sense;
};

static lg_status cpu_open(lg_ops_ctx **out, const lg_ops_config *c, lg_error *err) {
    lg_ops_ctx *x = lg_base_alloc(sizeof *x);
    if (!x) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    x->g.compute = c->compute;
    x->g.isa = lg_cpu_isa();
    x->nth = c->n_threads > 0 ? c->n_threads : lg_base_n_cores();
    *out = x;
    return LG_OK;
}

static void cpu_close(lg_ops_ctx *c) {
    if (!c) return;
    lg_base_free(c->in);
    lg_base_free(c->k);
    lg_base_free(c->v);
    lg_base_free(c->rows);
    lg_base_free(c->thread_scratch);
    lg_base_free(c->attend);
    while (c->slab) {
        slab *s = c->slab;
        c->slab = s->below;
        lg_base_free(s);
    }
    lg_base_free(c->low);
    lg_base_free(c->low_in);
    lg_base_free(c);
}

static void cpu_describe(lg_ops_ctx *c, char *buf, size_t n) {
    snprintf(buf, n, "cpu: %s, %d thread%s%s", lg_isa_name(c->g.isa), c->nth, c->nth == 1 ? "" : "s",
             c->g.compute == LG_COMPUTE_F32 ? ", f32" : "");
}

static void *cpu_alloc(lg_ops_ctx *c, int64_t bytes, bool zero, lg_error *err) {
    (void)c; (void)zero;
    void *p = lg_base_alloc(bytes);
    if (!p) lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory: %lld bytes", (long long)bytes);
    return p;
}
static void cpu_free(lg_ops_ctx *c, void *p) { (void)c; lg_base_free(p); }
static void cpu_copy(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes) {
    (void)c;
    memcpy(dst, src, (size_t)bytes);
}

/* Small packed weights move into common slabs, which are huge pages: a page of their own would be mostly empty. A slab
 * lives as long as the context. */
static lg_status to_slab(lg_ops_ctx *c, lg_weight *w, lg_error *err) {
    const int64_t bytes = (w->packed_bytes + 63) / 64 * 64;
    if (bytes > SLAB_BYTES / 8) return LG_OK;
    if (!c->slab || c->slab->used + bytes > SLAB_BYTES) {
        slab *s = lg_base_alloc(SLAB_BYTES);
        if (!s) {
            lg_gemm_unpack(w);
            return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory for packed weights");
        }
        s->below = c->slab;
        s->used = (int64_t)sizeof *s;
        c->slab = s;
    }
    uint8_t *p = (uint8_t *)c->slab + c->slab->used;
    memcpy(p, w->packed, (size_t)w->packed_bytes);
    lg_base_free(w->packed);
    w->packed = p;
    c->slab->used += bytes;
    return LG_OK;
}
static lg_status cpu_weight_bind(lg_ops_ctx *c, lg_weight *w, lg_error *err) {
    if (w->lookup) return LG_OK;
    const lg_status st = lg_gemm_pack(&c->g, w, err);
    return st == LG_OK ? to_slab(c, w, err) : st;
}
static void cpu_weight_unbind(lg_ops_ctx *c, lg_weight *w) {
    for (const slab *s = c->slab; s; s = s->below)
        if ((uintptr_t)w->packed - (uintptr_t)s < (uintptr_t)SLAB_BYTES) {
            w->packed = NULL;
            w->packed_bytes = 0;
            return;
        }
    lg_gemm_unpack(w);
}

/* A and scale*B as bound weights, so that both products run in the kernels of the base's. B in bf16 where compute allows. */
typedef struct low_rank { lg_weight a, b; } low_rank;

static lg_status pack_low(lg_ops_ctx *c, lg_weight *w, const float *src, int64_t n_out, int64_t n_in, float scale, lg_error *err) {
    lg_status st;
    const lg_dtype t = c->g.compute == LG_COMPUTE_F32 ? LG_DTYPE_F32 : LG_DTYPE_BF16;
    const int64_t row = lg_base_row_bytes(t, n_in);
    float *scaled = lg_base_calloc(n_in, sizeof *scaled);
    uint8_t *data = lg_base_calloc(n_out, row);
    if (!scaled || !data) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    for (int64_t o = 0; o < n_out; o++) {
        for (int64_t i = 0; i < n_in; i++) scaled[i] = scale * src[o * n_in + i];
        lg_base_quant(t, scaled, data + o * row, n_in);
    }
    *w = (lg_weight){ .dtype = t, .n_out = n_out, .n_in = n_in, .data = data };
    st = lg_gemm_pack(&c->g, w, err);
    w->data = NULL;
done:
    lg_base_free(scaled);
    lg_base_free(data);
    return st;
}

static void cpu_lora_unbind(lg_ops_ctx *c, lg_lora *r) {
    (void)c;
    low_rank *p = r->packed;
    if (!p) return;
    lg_gemm_unpack(&p->a);
    lg_gemm_unpack(&p->b);
    lg_base_free(p);
    r->packed = NULL;
}

static lg_status cpu_lora_bind(lg_ops_ctx *c, lg_lora *r, int64_t n_in, int64_t n_out, lg_error *err) {
    lg_status st;
    low_rank *p = lg_base_alloc(sizeof *p);
    if (!p) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    r->packed = p;
    LG_TRY(pack_low(c, &p->a, r->a, r->rank, n_in, 1, err));
    LG_TRY(pack_low(c, &p->b, r->b, n_out, r->rank, r->scale, err));
    if (r->rank > c->max_rank) c->max_rank = r->rank;
done:
    if (st != LG_OK) cpu_lora_unbind(c, r);
    return st;
}

static bool grow(void *field, int64_t *have, int64_t need) {
    void **p = field;
    if (*have >= need) return true;
    lg_base_free(*p);
    *p = lg_base_alloc(need);
    *have = *p ? need : 0;
    return *p != NULL;
}

static lg_status cpu_reserve(lg_ops_ctx *c, int64_t n_tok, int64_t n_seq, int64_t max_len, int32_t n_head,
                             const lg_kv_geom *kv, int64_t max_in, int64_t max_out, lg_error *err) {
    int64_t in_need = 0, kv_have = c->kv_bytes;
    if (kv->head_dim % LG_HEAD_STEP)
        return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "head size %d: the device cpu takes multiples of %d, ref takes any", (int)kv->head_dim, LG_HEAD_STEP);
    for (int64_t t = 1; t <= n_tok; t++) {
        const int64_t b = lg_gemm_input_bytes(&c->g, t, max_in);
        if (b > in_need) in_need = b;
    }
    const int64_t scratch = (lg_gemm_scratch_bytes(&c->g, n_tok, max_in) + 63) / 64 * 64;
    int64_t scratch_have = c->thread_bytes * c->nth;
    const int64_t att = lg_attend_scratch_bytes(&c->g, n_tok, n_seq, max_len, n_head, kv, c->nth);
    const int64_t wide = n_tok * max_out * (int64_t)sizeof(float);
    bool ok = grow(&c->in, &c->in_bytes, in_need);
    ok = ok && grow(&c->k, &kv_have, wide) && grow(&c->v, &c->kv_bytes, wide);
    ok = ok && grow(&c->rows, &c->rows_bytes, n_tok * max_in * (int64_t)sizeof(float));
    if (ok && scratch > c->thread_bytes) {
        ok = grow(&c->thread_scratch, &scratch_have, scratch * c->nth);
        c->thread_bytes = ok ? scratch : 0;
    }
    ok = ok && grow(&c->attend, &c->attend_bytes, att);
    if (c->max_rank) {
        int64_t each = 0;
        for (int64_t t = 1; t <= n_tok; t++) {
            const int64_t b = (lg_gemm_input_bytes(&c->g, t, c->max_rank) + 63) / 64 * 64;
            if (b > each) each = b;
        }
        if (each > c->low_in_each) c->low_in_each = each;
        ok = ok && grow(&c->low, &c->low_bytes, 3 * n_tok * c->max_rank * (int64_t)sizeof(float));
        ok = ok && grow(&c->low_in, &c->low_in_bytes, 3 * c->low_in_each);
    }
    if (n_tok > c->max_tok) c->max_tok = n_tok;
    return ok ? LG_OK : lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory for the scratch of %lld tokens", (long long)n_tok);
}

/* ---- one thread's share ---- */
static void barrier(lg_ops_ctx *c, int nth, int *sense) {
    if (nth == 1) return;
    *sense = !*sense;
    if (atomic_fetch_add_explicit(&c->arrived, 1, memory_order_acq_rel) == nth - 1) {
        atomic_store_explicit(&c->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&c->sense, *sense, memory_order_release);
        return;
    }
    for (int i = 0; atomic_load_explicit(&c->sense, memory_order_acquire) != *sense; i++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (i >= SPINS) sched_yield(); /* more threads than free cores: let the late one run */
    }
}

static void share(int64_t n, int ith, int nth, int64_t *first, int64_t *last) {
    *first = n * ith / nth;
    *last = n * (ith + 1) / nth;
}

static void head_norm(float *x, const float *w, float eps, int64_t n) {
    float ss = 0;
    for (int64_t i = 0; i < n; i++) ss += x[i] * x[i];
    const float r = 1.0f / sqrtf(ss / (float)n + eps);
    for (int64_t i = 0; i < n; i++) x[i] = x[i] * r * w[i];
}

static void rotate(float *restrict x, int64_t d, const float *restrict cs, const float *restrict sn, bool interleaved) {
    const int64_t half = d / 2;
    if (interleaved) {
        for (int64_t i = 0; i < half; i++) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cs[i] - b * sn[i];
            x[2 * i + 1] = b * cs[i] + a * sn[i];
        }
    } else {
        for (int64_t i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cs[i] - b * sn[i];
            x[i + half] = b * cs[i] + a * sn[i];
        }
    }
}

/* Bias, head norm, rotation and, for K and V, rounding into the cache: heads of all tokens split between threads. */
static void qkv_finish(const lg_ops_ctx *c, const lg_op_qkv *a, int ith, int nth) {
    const int64_t d = a->geom.head_dim, n_kv = a->geom.n_head_kv, per = a->n_head + 2 * n_kv;
    int64_t first, last;
    share(a->n_tok * per, ith, nth, &first, &last);
    for (int64_t i = first; i < last; i++) {
        const int64_t t = i / per, j = i % per;
        const bool is_q = j < a->n_head, is_k = !is_q && j < a->n_head + n_kv;
        const int64_t h = is_q ? j : is_k ? j - a->n_head : j - a->n_head - n_kv;
        float *x = is_q ? a->q + (t * a->n_head + h) * d : (is_k ? c->k : c->v) + (t * n_kv + h) * d;
        const float *b = is_q ? a->bq : is_k ? a->bk : a->bv;
        const float *norm = is_q ? a->q_norm : is_k ? a->k_norm : NULL;
        if (b)
            for (int64_t e = 0; e < d; e++) x[e] += b[h * d + e];
        if (norm) head_norm(x, norm, a->eps, d);
        float *raw = is_q ? NULL : is_k ? a->k_raw : a->v_raw;
        for (int64_t e = 0; raw && e < d; e++) raw[(t * n_kv + h) * d + lg_ops_half_place(e, d, is_k && a->rope_interleaved)] = x[e];
        if (is_q || is_k) rotate(x, d, a->rope_cos + t * (d / 2), a->rope_sin + t * (d / 2), a->rope_interleaved);
        if (is_q) continue;
        const int64_t row = ((int64_t)a->dst_page[t] * n_kv + h) * LG_PAGE + a->dst_slot[t];
        lg_ops_kv_store(&a->geom, (is_k ? a->kv.k : a->kv.v) + row * a->geom.row_bytes, x);
    }
}

/* ---- low-rank additions: down while the base's input form stands, a barrier, forms, a barrier, then up ---- */
static bool has_low(const lg_lora *r) { return r && r->rank; }

/* low[i] = A_i x for the (up to three) additions of an op. Few outputs: rows are split between threads where there are many. */
static void low_down(lg_ops_ctx *c, const lg_lora *const *r, int n, int64_t n_in, int64_t n_tok, void *mine, int ith, int nth) {
    const bool by_row = n_tok >= 32 * nth;
    const int64_t t0 = by_row ? n_tok * ith / nth / 16 * 16 : 0;
    const int64_t t1 = !by_row || ith == nth - 1 ? n_tok : n_tok * (ith + 1) / nth / 16 * 16;
    const uint8_t *in = (const uint8_t *)c->in + lg_gemm_input_at(&c->g, n_tok, n_in, t0);
    float *low = c->low;
    for (int i = 0; i < n; i++) {
        if (!has_low(r[i])) continue;
        const low_rank *p = r[i]->packed;
        lg_gemm_run(&c->g, low + t0 * r[i]->rank, r[i]->rank, false, in, &p->a, t1 - t0, mine, by_row ? 0 : ith, by_row ? 1 : nth);
        low += n_tok * r[i]->rank;
    }
}

static void low_forms(lg_ops_ctx *c, const lg_lora *const *r, int n, int64_t n_tok, int ith, int nth) {
    const float *low = c->low;
    for (int i = 0; i < n; i++) {
        if (!has_low(r[i])) continue;
        lg_gemm_input(&c->g, c->low_in + i * c->low_in_each, low, r[i]->rank, NULL, 0, n_tok, r[i]->rank, ith, nth);
        low += n_tok * r[i]->rank;
    }
}

/* y += scale * B low[i]; the base product is complete: barriers lie between. */
static void low_up(lg_ops_ctx *c, const lg_lora *r, int i, float *y, int64_t n_tok, void *mine, int ith, int nth) {
    if (!has_low(r)) return;
    const low_rank *p = r->packed;
    lg_gemm_run(&c->g, y, p->b.n_out, true, c->low_in + i * c->low_in_each, &p->b, n_tok, mine, ith, nth);
}

/* Both halves of the way down, with the barriers around them. False: nothing to add. */
static bool low_ready(lg_ops_ctx *c, const lg_lora *const *r, int n, int64_t n_in, int64_t n_tok, void *mine, int ith, int nth, int *sense) {
    bool any = false;
    for (int i = 0; i < n; i++) any = any || has_low(r[i]);
    if (!any) return false;
    low_down(c, r, n, n_in, n_tok, mine, ith, nth);
    barrier(c, nth, sense);
    low_forms(c, r, n, n_tok, ith, nth);
    barrier(c, nth, sense);
    return true;
}

static void run_kv_write(const lg_op_kv_write *a, int ith, int nth) {
    int64_t first, last;
    share(a->n_tok * a->geom.n_head_kv, ith, nth, &first, &last);
    for (int64_t i = first; i < last; i++) lg_ref_kv_write_row(a, i / a->geom.n_head_kv, i % a->geom.n_head_kv);
}

static void run_embed(const lg_op_embed *a, int ith, int nth) {
    int64_t first, last;
    share(a->n_tok, ith, nth, &first, &last);
    for (int64_t t = first; t < last; t++) lg_gemm_embed_row(a->x + t * a->w->n_in, a->w, a->ids[t]);
}

static void run_argmax(const lg_op_argmax *a, int ith, int nth) {
    for (int64_t r = ith; r < a->n_row; r += nth) a->id[r] = lg_ops_greatest(a->logits + r * a->n_vocab, a->n_vocab);
}

/* ---- products ----
 * One to three products with the same input are one list of panels of 16 outputs. Most of it is shared out beforehand, so that
 * every thread reads weights that lie together; the rest goes to whoever is first, since neighbours on the machine slow cores
 * unequally. Who computes a panel changes nothing in it. */
enum { OWN_SHARE = 75 /* percent */, PANEL = 16, FEW = 16 };
typedef struct part { float *y; const lg_weight *w; bool add; } part;
typedef struct hand { atomic_llong *turn; int64_t total, fixed, lo, hi; bool begun; } hand;

static hand hand_of(lg_ops_ctx *c, int task_at, int64_t total, int64_t n_tok, int ith, int nth) {
    /* The wider kernels take several panels together; few rows wait for memory, not for each other. */
    const bool all = nth == 1 || c->g.isa > LG_ISA_AVX2 || n_tok <= FEW;
    hand h = { .turn = &c->turn[task_at], .total = total, .fixed = all ? total : total * OWN_SHARE / 100 };
    h.lo = h.fixed * ith / nth;
    h.hi = h.fixed * (ith + 1) / nth;
    return h;
}
static bool next_hand(hand *h) {
    if (h->begun) {
        h->lo = h->fixed == h->total ? h->total : h->fixed + (int64_t)atomic_fetch_add_explicit(h->turn, 1, memory_order_relaxed);
        h->hi = h->lo + 1;
    }
    h->begun = true;
    return h->lo < h->total;
}
static int64_t panels_of(const lg_weight *w) { return (w->n_out + PANEL - 1) / PANEL; }

static void products(lg_ops_ctx *c, int task_at, const part *p, int n_part, int64_t n_tok, void *scratch, int ith, int nth) {
    int64_t total = 0;
    for (int i = 0; i < n_part; i++) total += panels_of(p[i].w);
    hand h = hand_of(c, task_at, total, n_tok, ith, nth);
    while (next_hand(&h)) {
        int64_t at = 0;
        for (int i = 0; i < n_part; i++) {
            const int64_t n = panels_of(p[i].w), lo = h.lo > at ? h.lo - at : 0, hi = h.hi - at < n ? h.hi - at : n;
            if (lo < hi) lg_gemm_run_panels(&c->g, p[i].y, p[i].w->n_out, p[i].add, c->in, p[i].w, n_tok, scratch, lo, hi);
            at += n;
        }
    }
}


static void gate_up(lg_ops_ctx *c, int task_at, const lg_op_gate_up *a, void *scratch, int ith, int nth, int *sense) {
    const int64_t n_in = a->gate->n_in, n_out = a->gate->n_out;
    if (has_low(a->lora_gate) || has_low(a->lora_up)) { /* the additions come between the products and the SiLU */
        const part p[2] = { { a->h, a->gate, false }, { c->k, a->up, false } };
        const lg_lora *const lora[2] = { a->lora_gate, a->lora_up };
        int64_t first, last;
        products(c, task_at, p, 2, a->n_tok, scratch, ith, nth);
        low_ready(c, lora, 2, n_in, a->n_tok, scratch, ith, nth, sense);
        low_up(c, lora[0], 0, a->h, a->n_tok, scratch, ith, nth);
        low_up(c, lora[1], 1, c->k, a->n_tok, scratch, ith, nth);
        lg_gemm_rows(n_out, ith, nth, &first, &last);
        for (int64_t t = 0; t < a->n_tok && last > first; t++)
            lg_gemm_silu_mul(&c->g, a->h + t * n_out + first, a->h + t * n_out + first, c->k + t * n_out + first, last - first);
        return;
    }
    hand h = hand_of(c, task_at, panels_of(a->gate), a->n_tok, ith, nth);
    while (next_hand(&h)) {
        const int64_t first = h.lo * PANEL, last = h.hi * PANEL < n_out ? h.hi * PANEL : n_out;
        if (first >= last) continue;
        lg_gemm_run_panels(&c->g, a->h, n_out, false, c->in, a->gate, a->n_tok, scratch, h.lo, h.hi);
        lg_gemm_run_panels(&c->g, c->k, n_out, false, c->in, a->up, a->n_tok, scratch, h.lo, h.hi);
        for (int64_t t = 0; t < a->n_tok; t++)
            lg_gemm_silu_mul(&c->g, a->h + t * n_out + first, a->h + t * n_out + first, c->k + t * n_out + first, last - first);
    }
}

static void run_all(lg_ops_ctx *c, int ith, int nth, int *sense) {
    const lg_gemm *g = &c->g;
    void *mine = c->thread_scratch + (int64_t)ith * c->thread_bytes;
    for (int i = 0; i < c->n_task; i++) {
        const task *s = &c->tasks[i];
        if (i) barrier(c, nth, sense);
        switch (s->k) {
        case K_EMBED: run_embed(&s->u.embed, ith, nth); break;
        case K_QKV: {
            const lg_op_qkv *a = &s->u.qkv;
            const int64_t n_in = a->wq->n_in;
            const part p[3] = { { a->q, a->wq, false }, { c->k, a->wk, false }, { c->v, a->wv, false } };
            lg_gemm_input(g, c->in, a->x, n_in, a->norm, a->eps, a->n_tok, n_in, ith, nth);
            barrier(c, nth, sense);
            products(c, i, p, 3, a->n_tok, mine, ith, nth);
            const lg_lora *const lora[3] = { a->lora_q, a->lora_k, a->lora_v };
            if (low_ready(c, lora, 3, n_in, a->n_tok, mine, ith, nth, sense))
                for (int j = 0; j < 3; j++) low_up(c, lora[j], j, p[j].y, a->n_tok, mine, ith, nth);
            barrier(c, nth, sense);
            qkv_finish(c, a, ith, nth);
            break;
        }
        case K_ATTEND: {
            const int n = lg_attend_phases(g, &s->u.attend, nth);
            const lg_op_observe *o = i + 1 < c->n_task && s[1].k == K_OBSERVE && lg_observe_follows(&s->u.attend, &s[1].u.observe) ? &s[1].u.observe : NULL;
            for (int p = 0; p < n; p++) {
                if (p) barrier(c, nth, sense);
                lg_attend_run(g, &s->u.attend, o, p, c->attend, ith, nth);
            }
            break;
        }
        case K_HYBRID: {
            const int n = lg_attend_hybrid_phases(g, &s->u.hybrid, nth);
            for (int p = 0; p < n; p++) {
                if (p) barrier(c, nth, sense);
                lg_attend_hybrid_run(g, &s->u.hybrid, p, c->attend, ith, nth);
            }
            break;
        }
        case K_OBSERVE: {
            const int n = lg_observe_phases(g, &s->u.observe, nth);
            const int first = i > 0 && s[-1].k == K_ATTEND && lg_observe_follows(&s[-1].u.attend, &s->u.observe);
            for (int p = first; p < n; p++) {
                if (p > first) barrier(c, nth, sense);
                lg_observe_run(g, &s->u.observe, p, c->attend, ith, nth);
            }
            break;
        }
        case K_PRODUCT: {
            const lg_op_product_add *a = &s->u.product;
            lg_gemm_input(g, c->in, a->x, a->w->n_in, NULL, 0, a->n_tok, a->w->n_in, ith, nth);
            barrier(c, nth, sense);
            products(c, i, &(part){ a->y, a->w, true }, 1, a->n_tok, mine, ith, nth);
            if (low_ready(c, &a->lora, 1, a->w->n_in, a->n_tok, mine, ith, nth, sense)) low_up(c, a->lora, 0, a->y, a->n_tok, mine, ith, nth);
            break;
        }
        case K_GATE_UP: {
            const lg_op_gate_up *a = &s->u.gate_up;
            const int64_t n_in = a->gate->n_in;
            lg_gemm_input(g, c->in, a->x, n_in, a->norm, a->eps, a->n_tok, n_in, ith, nth);
            barrier(c, nth, sense);
            gate_up(c, i, a, mine, ith, nth, sense);
            break;
        }
        case K_KV_WRITE: run_kv_write(&s->u.kv_write, ith, nth); break;
        case K_ARGMAX: run_argmax(&s->u.argmax, ith, nth); break;
        case K_FETCH:
            if (ith == 0) memcpy(s->u.fetch.dst, s->u.fetch.src, (size_t)s->u.fetch.bytes);
            break;
        case K_LOGITS: {
            const lg_op_logits *a = &s->u.logits;
            const int64_t n_in = a->w->n_in;
            const float *x = a->x + a->row[0] * n_in;
            bool together = true;
            for (int64_t r = 1; r < a->n_row; r++) together = together && a->row[r] == a->row[0] + r;
            if (!together) {
                for (int64_t r = ith; r < a->n_row; r += nth)
                    memcpy(c->rows + r * n_in, a->x + a->row[r] * n_in, (size_t)n_in * sizeof(float));
                x = c->rows;
                barrier(c, nth, sense);
            }
            lg_gemm_input(g, c->in, x, n_in, a->norm, a->eps, a->n_row, n_in, ith, nth);
            barrier(c, nth, sense);
            products(c, i, &(part){ a->logits, a->w, false }, 1, a->n_row, mine, ith, nth);
            break;
        }
        }
    }
}

static lg_status cpu_sync(lg_ops_ctx *c, lg_error *err) {
    (void)err; /* no op of this back end can fail once reserved */
    if (!c->n_task) return LG_OK;
    atomic_store(&c->arrived, 0);
    atomic_store(&c->sense, 0);
    for (int i = 0; i < c->n_task; i++) atomic_store_explicit(&c->turn[i], 0, memory_order_relaxed);
#pragma omp parallel num_threads(c->nth)
    {
        int sense = 0;
        lg_cpu_isa_thread(c->g.isa);
        run_all(c, omp_get_thread_num(), omp_get_num_threads(), &sense);
    }
    c->n_task = 0;
    return LG_OK;
}

static task *next(lg_ops_ctx *c, kind k) {
    if (c->n_task == MAX_OPS) cpu_sync(c, NULL);
    task *s = &c->tasks[c->n_task++];
    s->k = k;
    return s;
}
static void cpu_embed(lg_ops_ctx *c, const lg_op_embed *a) { next(c, K_EMBED)->u.embed = *a; }
static void cpu_qkv(lg_ops_ctx *c, const lg_op_qkv *a) { next(c, K_QKV)->u.qkv = *a; }
static void cpu_attend(lg_ops_ctx *c, const lg_op_attend *a) { next(c, K_ATTEND)->u.attend = *a; }
static void cpu_attend_hybrid(lg_ops_ctx *c, const lg_op_attend_hybrid *a) { next(c, K_HYBRID)->u.hybrid = *a; }
static void cpu_observe(lg_ops_ctx *c, const lg_op_observe *a) { next(c, K_OBSERVE)->u.observe = *a; }
static void cpu_product_add(lg_ops_ctx *c, const lg_op_product_add *a) { next(c, K_PRODUCT)->u.product = *a; }
static void cpu_gate_up(lg_ops_ctx *c, const lg_op_gate_up *a) { next(c, K_GATE_UP)->u.gate_up = *a; }
static void cpu_logits(lg_ops_ctx *c, const lg_op_logits *a) { next(c, K_LOGITS)->u.logits = *a; }
static void cpu_kv_write(lg_ops_ctx *c, const lg_op_kv_write *a) { next(c, K_KV_WRITE)->u.kv_write = *a; }
static void cpu_argmax(lg_ops_ctx *c, const lg_op_argmax *a) { next(c, K_ARGMAX)->u.argmax = *a; }
static void cpu_fetch(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes) {
    task *s = next(c, K_FETCH);
    s->u.fetch.dst = dst;
    s->u.fetch.src = src;
    s->u.fetch.bytes = bytes;
}

const lg_ops lg_ops_cpu = {
    .name = "cpu", .host_memory = true, .chunk = 512, .copy = cpu_copy, .argmax = cpu_argmax, .fetch = cpu_fetch, .open = cpu_open, .close = cpu_close, .describe = cpu_describe, .alloc = cpu_alloc, .free = cpu_free,
    .upload = cpu_copy, .download = cpu_copy, .weight_bind = cpu_weight_bind, .weight_unbind = cpu_weight_unbind, .lora_bind = cpu_lora_bind, .lora_unbind = cpu_lora_unbind,
    .reserve = cpu_reserve, .embed = cpu_embed, .qkv = cpu_qkv, .attend = cpu_attend, .attend_hybrid = cpu_attend_hybrid, .observe = cpu_observe,
    .product_add = cpu_product_add, .gate_up = cpu_gate_up, .logits = cpu_logits, .kv_write = cpu_kv_write, .sync = cpu_sync,
};
