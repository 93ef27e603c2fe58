/* The specification of every op but attention: serial plain C, sums in double, weights dequantised row by row. */
#include "ops/ref/ref.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

struct lg_ops_ctx {
    float *row;       /* one dequantised weight row */
    float *normed;    /* one normed activation row */
    float *head;      /* K, V of one token; gate, up of one token */
    int64_t row_n, head_n;
    bool starved;     /* sample could not have its scratch */
};

static lg_status ref_open(lg_ops_ctx **out, const lg_ops_config *c, lg_error *err) {
    (void)c;
    lg_ops_ctx *x = lg_base_alloc(sizeof *x);
    if (!x) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    *out = x;
    return LG_OK;
}
static void ref_close(lg_ops_ctx *c) {
    if (!c) return;
    lg_base_free(c->row);
    lg_base_free(c->normed);
    lg_base_free(c->head);
    lg_base_free(c);
}
static void ref_describe(lg_ops_ctx *c, char *buf, size_t n) {
    (void)c;
    snprintf(buf, n, "ref: plain C, 1 thread");
}
static void *ref_alloc(lg_ops_ctx *c, int64_t bytes, bool zero, lg_error *err) {
    (void)c; (void)zero;
    void *p = lg_base_alloc(bytes);
    if (!p) lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory: %lld bytes", (long long)bytes);
    return p;
}
static void ref_free(lg_ops_ctx *c, void *p) { (void)c; lg_base_free(p); }
static void ref_copy(lg_ops_ctx *c, void *dst, const void *src, int64_t bytes) {
    (void)c;
    memcpy(dst, src, (size_t)bytes);
}
static lg_status ref_weight_bind(lg_ops_ctx *c, lg_weight *w, lg_error *err) { (void)c; (void)w; (void)err; return LG_OK; }
static void ref_weight_unbind(lg_ops_ctx *c, lg_weight *w) { (void)c; (void)w; }

static lg_status ref_reserve(lg_ops_ctx *c, int64_t n_tok, int64_t n_seq, int64_t max_len, int32_t n_head,
                             const lg_kv_geom *g, int64_t max_in, int64_t max_out, lg_error *err) {
    (void)n_tok; (void)n_seq; (void)max_len; (void)n_head; (void)g;
    if (c->row_n < max_in) {
        lg_base_free(c->row);
        lg_base_free(c->normed);
        c->row = lg_base_calloc(max_in, sizeof(float));
        c->normed = lg_base_calloc(max_in, sizeof(float));
        c->row_n = c->row && c->normed ? max_in : 0;
    }
    if (c->head_n < max_out) {
        lg_base_free(c->head);
        c->head = lg_base_calloc(max_out, 2 * sizeof(float));
        c->head_n = c->head ? max_out : 0;
    }
    return c->row_n >= max_in && c->head_n >= max_out ? LG_OK : lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
}

static void rms_norm(float *y, const float *x, const float *w, float eps, int64_t n) {
    double ss = 0;
    for (int64_t i = 0; i < n; i++) ss += (double)x[i] * x[i];
    const double r = 1.0 / sqrt(ss / (double)n + (double)eps);
    for (int64_t i = 0; i < n; i++) y[i] = (float)((double)x[i] * r) * w[i];
}

/* y[o] (+)= sum_i w[o,i] x[i] */
static void mat_vec(lg_ops_ctx *c, float *y, bool add, const lg_weight *w, const float *x) {
    const int64_t rb = lg_base_row_bytes(w->dtype, w->n_in);
    for (int64_t o = 0; o < w->n_out; o++) {
        lg_base_dequant(w->dtype, (const uint8_t *)w->data + o * rb, c->row, w->n_in);
        double s = 0;
        for (int64_t i = 0; i < w->n_in; i++) s += (double)c->row[i] * x[i];
        y[o] = (add ? y[o] : 0.0f) + (float)s;
    }
}

/* y += scale * B (A x) */
static void add_low_rank(float *y, const lg_lora *r, const float *x, int64_t n_in, int64_t n_out) {
    if (!r || !r->rank) return;
    for (int32_t j = 0; j < r->rank; j++) {
        double s = 0;
        for (int64_t i = 0; i < n_in; i++) s += (double)r->a[j * n_in + i] * x[i];
        for (int64_t o = 0; o < n_out; o++) y[o] += (float)((double)r->scale * s * (double)r->b[o * r->rank + j]);
    }
}

static void ref_embed(lg_ops_ctx *c, const lg_op_embed *a) {
    (void)c;
    const int64_t rb = lg_base_row_bytes(a->w->dtype, a->w->n_in);
    for (int64_t t = 0; t < a->n_tok; t++)
        lg_base_dequant(a->w->dtype, (const uint8_t *)a->w->data + a->ids[t] * rb, a->x + t * a->w->n_in, a->w->n_in);
}

static void rotate(float *x, int64_t d, const float *cs, const float *sn, bool interleaved) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        const int64_t p = interleaved ? 2 * i : i, q = interleaved ? 2 * i + 1 : i + half;
        const float a = x[p], b = x[q];
        x[p] = a * cs[i] - b * sn[i];
        x[q] = b * cs[i] + a * sn[i];
    }
}

static void add_bias(float *x, const float *b, int64_t n) {
    if (b)
        for (int64_t i = 0; i < n; i++) x[i] += b[i];
}

static void ref_qkv(lg_ops_ctx *c, const lg_op_qkv *a) {
    const int64_t d = a->geom.head_dim, n_kv = a->geom.n_head_kv, nq = a->n_head * d, nkv = n_kv * d;
    for (int64_t t = 0; t < a->n_tok; t++) {
        float *q = a->q + t * nq, *k = c->head, *v = c->head + nkv;
        const float *cs = a->rope_cos + t * (d / 2), *sn = a->rope_sin + t * (d / 2);
        rms_norm(c->normed, a->x + t * a->wq->n_in, a->norm, a->eps, a->wq->n_in);
        mat_vec(c, q, false, a->wq, c->normed);
        mat_vec(c, k, false, a->wk, c->normed);
        mat_vec(c, v, false, a->wv, c->normed);
        add_low_rank(q, a->lora_q, c->normed, a->wq->n_in, nq);
        add_low_rank(k, a->lora_k, c->normed, a->wk->n_in, nkv);
        add_low_rank(v, a->lora_v, c->normed, a->wv->n_in, nkv);
        add_bias(q, a->bq, nq);
        add_bias(k, a->bk, nkv);
        add_bias(v, a->bv, nkv);
        for (int64_t h = 0; h < a->n_head; h++) {
            if (a->q_norm) rms_norm(q + h * d, q + h * d, a->q_norm, a->eps, d);
            rotate(q + h * d, d, cs, sn, a->rope_interleaved);
        }
        for (int64_t h = 0; h < n_kv; h++) {
            if (a->k_norm) rms_norm(k + h * d, k + h * d, a->k_norm, a->eps, d);
            for (int64_t i = 0; a->k_raw && i < d; i++) a->k_raw[t * nkv + h * d + lg_ops_half_place(i, d, a->rope_interleaved)] = k[h * d + i];
            if (a->v_raw) memcpy(a->v_raw + t * nkv + h * d, v + h * d, (size_t)d * sizeof(float));
            rotate(k + h * d, d, cs, sn, a->rope_interleaved);
            const int64_t row = ((int64_t)a->dst_page[t] * n_kv + h) * LG_PAGE + a->dst_slot[t];
            lg_ops_kv_store(&a->geom, a->kv.k + row * a->geom.row_bytes, k + h * d);
            lg_ops_kv_store(&a->geom, a->kv.v + row * a->geom.row_bytes, v + h * d);
        }
    }
}

static void ref_attend(lg_ops_ctx *c, const lg_op_attend *a) { (void)c; lg_ref_attend(a); }
static void ref_attend_hybrid(lg_ops_ctx *c, const lg_op_attend_hybrid *a) { (void)c; lg_ref_attend_hybrid(a); }
static void ref_observe(lg_ops_ctx *c, const lg_op_observe *a) { (void)c; lg_ref_observe(a); }

static void ref_product_add(lg_ops_ctx *c, const lg_op_product_add *a) {
    for (int64_t t = 0; t < a->n_tok; t++) {
        mat_vec(c, a->y + t * a->w->n_out, true, a->w, a->x + t * a->w->n_in);
        add_low_rank(a->y + t * a->w->n_out, a->lora, a->x + t * a->w->n_in, a->w->n_in, a->w->n_out);
    }
}

static void ref_gate_up(lg_ops_ctx *c, const lg_op_gate_up *a) {
    const int64_t n = a->gate->n_out;
    for (int64_t t = 0; t < a->n_tok; t++) {
        float *h = a->h + t * n, *up = c->head;
        rms_norm(c->normed, a->x + t * a->gate->n_in, a->norm, a->eps, a->gate->n_in);
        mat_vec(c, h, false, a->gate, c->normed);
        mat_vec(c, up, false, a->up, c->normed);
        add_low_rank(h, a->lora_gate, c->normed, a->gate->n_in, n);
        add_low_rank(up, a->lora_up, c->normed, a->up->n_in, n);
        for (int64_t i = 0; i < n; i++) h[i] = h[i] / (1.0f + expf(-h[i])) * up[i];
    }
}

void lg_ref_kv_write_row(const lg_op_kv_write *a, int64_t t, int64_t h) {
    const int64_t d = a->geom.head_dim, half = d / 2, n_kv = a->geom.n_head_kv, from = (t * n_kv + h) * a->src.row_bytes;
    const int64_t to = (((int64_t)a->dst_page[t] * n_kv + h) * LG_PAGE + a->dst_slot[t]) * a->geom.row_bytes;
    float x[LG_HEAD_DIM_MAX], own[LG_HEAD_DIM_MAX];
    lg_ops_kv_load(&a->src, x, a->k + from);
    if (a->rope_cos) rotate(x, d, a->rope_cos + t * half, a->rope_sin + t * half, false);
    for (int64_t i = 0; i < half && a->rope_interleaved; i++) own[2 * i] = x[i], own[2 * i + 1] = x[i + half];
    lg_ops_kv_store(&a->geom, a->kv.k + to, a->rope_interleaved ? own : x);
    lg_ops_kv_load(&a->src, x, a->v + from);
    lg_ops_kv_store(&a->geom, a->kv.v + to, x);
}

static void ref_kv_write(lg_ops_ctx *c, const lg_op_kv_write *a) {
    (void)c;
    for (int64_t t = 0; t < a->n_tok; t++)
        for (int64_t h = 0; h < a->geom.n_head_kv; h++) lg_ref_kv_write_row(a, t, h);
}

static void ref_logits(lg_ops_ctx *c, const lg_op_logits *a) {
    for (int64_t r = 0; r < a->n_row; r++) {
        rms_norm(c->normed, a->x + a->row[r] * a->w->n_in, a->norm, a->eps, a->w->n_in);
        mat_vec(c, a->logits + r * a->w->n_out, false, a->w, c->normed);
    }
}

static void ref_argmax(lg_ops_ctx *c, const lg_op_argmax *a) {
    (void)c;
    for (int64_t r = 0; r < a->n_row; r++) {
        const float *x = a->logits + r * a->n_vocab;
        int64_t best = 0;
        for (int64_t i = 1; i < a->n_vocab; i++)
            if (x[i] > x[best]) best = i;
        a->id[r] = (int32_t)best;
    }
}

static void ref_sample(lg_ops_ctx *c, const lg_op_sample *a) {
    float *scratch = lg_base_calloc(2 * a->n_vocab, sizeof *scratch);
    c->starved = c->starved || !scratch;
    for (int64_t r = 0; r < a->n_row && scratch; r++)
        a->id[r] = lg_ops_sample(a->logits + r * a->n_vocab, a->n_vocab, &a->draw[r], a->recent + r * LG_RECENT, scratch);
    lg_base_free(scratch);
}

static lg_status ref_sync(lg_ops_ctx *c, lg_error *err) {
    const bool starved = c->starved;
    c->starved = false;
    return starved ? lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory") : LG_OK;
}

const lg_ops lg_ops_ref = {
    .name = "ref", .host_memory = true, .allocates = true, .chunk = 512, .copy = ref_copy, .argmax = ref_argmax, .sample = ref_sample, .fetch = ref_copy, .open = ref_open, .close = ref_close, .describe = ref_describe, .alloc = ref_alloc, .free = ref_free,
    .upload = ref_copy, .download = ref_copy, .weight_bind = ref_weight_bind, .weight_unbind = ref_weight_unbind,
    .reserve = ref_reserve, .embed = ref_embed, .qkv = ref_qkv, .attend = ref_attend, .attend_hybrid = ref_attend_hybrid, .observe = ref_observe,
    .product_add = ref_product_add, .gate_up = ref_gate_up, .logits = ref_logits, .kv_write = ref_kv_write, .sync = ref_sync,
};
