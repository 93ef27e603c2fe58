/* The one forward pass: prefill chunks, dense decode and hybrid decode differ in the attention op they enqueue. */
#include "model/model.h"
#include <math.h>
#include <string.h>

enum { KEPT = 8192 }; /* rotations; a power of two */

lg_status lg_model_work_init(lg_work *w, const lg_model *m, int64_t max_tok, lg_error *err) {
    const lg_config *c = &m->cfg;
    const int64_t f = sizeof(float), nq = c->n_head * c->head_dim;
    lg_error why = { .message = "out of memory" };
    *w = (lg_work){ .max_tok = max_tok };
    w->x = m->ops->alloc(m->ctx, max_tok * c->n_embd * f, false, &why);
    w->q = m->ops->alloc(m->ctx, max_tok * nq * f, false, &why);
    w->att = m->ops->alloc(m->ctx, max_tok * nq * f, false, &why);
    w->h = m->ops->alloc(m->ctx, max_tok * c->n_ff * f, false, &why);
    w->cs = lg_base_calloc(max_tok * (c->head_dim / 2), f);
    w->sn = lg_base_calloc(max_tok * (c->head_dim / 2), f);
    w->kept = lg_base_calloc(KEPT, c->head_dim * f);
    w->kept_pos = lg_base_calloc(KEPT, sizeof *w->kept_pos);
    if (w->x && w->q && w->att && w->h && w->cs && w->sn && w->kept && w->kept_pos) return LG_OK;
    lg_model_work_free(w, m);
    return lg_base_fail(err, LG_ERR_NOMEM, -1, "the activations of %lld tokens: %s", (long long)max_tok, why.message);
}

void lg_model_work_free(lg_work *w, const lg_model *m) {
    float *p[] = { w->x, w->q, w->att, w->h };
    for (int i = 0; i < 4; i++)
        if (p[i]) m->ops->free(m->ctx, p[i]);
    lg_base_free(w->cs);
    lg_base_free(w->sn);
    lg_base_free(w->kept);
    lg_base_free(w->kept_pos);
    *w = (lg_work){ 0 };
}

/* Passes come back to the same positions (chunks, prompts behind slots), and beside a GPU the sines of thousands of rows are felt. */
void lg_model_rotation(const lg_model *m, lg_work *w, int64_t pos, float *cs, float *sn) {
    const int64_t half = m->cfg.head_dim / 2, at = pos & (KEPT - 1);
    float *kept = w->kept + at * 2 * half;
    if (w->kept_pos[at] != pos + 1) {
        for (int64_t i = 0; i < half; i++) {
            const float a = (float)pos * m->inv_freq[i];
            kept[i] = cosf(a) * m->rope_factor;
            kept[half + i] = sinf(a) * m->rope_factor;
        }
        w->kept_pos[at] = pos + 1;
    }
    memcpy(cs, kept, (size_t)half * sizeof *cs);
    memcpy(sn, kept + half, (size_t)half * sizeof *sn);
}

static lg_status show_queries(lg_model *m, const lg_work *w, const lg_forward *f, int64_t layer, lg_error *err) {
    lg_status st;
    const int64_t bytes = f->n_tok * m->cfg.n_head * m->cfg.head_dim * (int64_t)sizeof(float);
    float *q = lg_base_alloc(bytes);
    if (!q) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    LG_TRY(m->ops->sync(m->ctx, err));
    m->ops->download(m->ctx, q, w->q, bytes);
    f->on_query(f->on_query_user, layer, f->idx[0], f->n_tok, q);
done:
    lg_base_free(q);
    return st;
}

/* Q, K and V of the rows [t0, t0 + n): raw rows by the base's projections, memory rows by their own where there are any. */
static void project(lg_model *m, const lg_work *w, const lg_forward *f, int64_t l, int64_t t0, int64_t n, bool memory) {
    const lg_config *c = &m->cfg;
    const lg_layer *y = &m->layer[l];
    const int64_t half = c->head_dim / 2, nkv = c->n_head_kv * c->head_dim;
    const lg_lora_layer *r = f->lora && f->lora->layer ? &f->lora->layer[l] : NULL;
    lg_op_qkv a = { .q = w->q + t0 * c->n_head * c->head_dim, .x = w->x + t0 * c->n_embd, .norm = y->attn_norm, .eps = c->norm_eps,
        .wq = &y->wq, .wk = &y->wk, .wv = &y->wv, .bq = y->bq, .bk = y->bk, .bv = y->bv, .q_norm = y->q_norm, .k_norm = y->k_norm,
        .rope_cos = w->cs + t0 * half, .rope_sin = w->sn + t0 * half, .rope_interleaved = c->rope_interleaved, .kv = f->kv[l],
        .geom = f->geom, .dst_page = f->dst_page + t0, .dst_slot = f->dst_slot + t0, .n_tok = n, .n_head = (int32_t)c->n_head,
        .lora_q = r ? &r->q : NULL, .lora_k = r ? &r->k : NULL, .lora_v = r ? &r->v : NULL };
    if (memory) {
        const lg_memory_layer *own = &m->memory.layer[l];
        if (own->wq.n_out) a.wq = &own->wq, a.bq = own->bq;
        if (own->wk.n_out) a.wk = &own->wk, a.bk = own->bk;
        if (own->wv.n_out) a.wv = &own->wv, a.bv = own->bv;
        a.k_raw = f->k_raw + l * n * nkv;
        a.v_raw = f->v_raw + l * n * nkv;
    }
    m->ops->qkv(m->ctx, &a);
}

static void attend(lg_model *m, const lg_work *w, const lg_forward *f, int64_t l, int64_t t0, int64_t n) {
    const lg_config *c = &m->cfg;
    const int64_t nq = c->n_head * c->head_dim;
    m->ops->attend(m->ctx, &(lg_op_attend){ .out = w->att + t0 * nq, .q = w->q + t0 * nq, .kv = f->kv[l], .geom = f->geom, .seqs = f->seqs,
        .n_seq = f->n_seq, .seq = f->seq + t0, .idx = f->idx + t0, .n_tok = n, .n_head = (int32_t)c->n_head,
        .scale = 1.0f / sqrtf((float)c->head_dim) });
}

/* The masses of layer l, told to the caller. */
static lg_status observe(lg_model *m, const lg_work *w, const lg_forward *f, int64_t l, lg_error *err) {
    const lg_config *c = &m->cfg;
    const int64_t first = f->n_tok - f->n_observe;
    m->ops->observe(m->ctx, &(lg_op_observe){ .mass = f->mass, .ld = f->mass_ld, .q = w->q + first * c->n_head * c->head_dim, .kv = f->kv[l], .geom = f->geom,
        .seq = f->seqs, .idx = f->idx + first, .n_tok = f->n_observe, .n_head = (int32_t)c->n_head, .scale = 1.0f / sqrtf((float)c->head_dim) });
    const lg_status st = m->ops->sync(m->ctx, err);
    return st == LG_OK ? f->on_mass(f->on_mass_user, l, err) : st;
}

lg_status lg_model_forward(lg_model *m, lg_work *w, const lg_forward *f, lg_error *err) {
    lg_status st;
    const lg_config *c = &m->cfg;
    const lg_ops *o = m->ops;
    lg_ops_ctx *x = m->ctx;
    const int64_t half = c->head_dim / 2, nq = c->n_head * c->head_dim, nkv = c->n_head_kv, n_raw = f->n_tok - f->n_mem;
    const float scale = 1.0f / sqrtf((float)c->head_dim);

    for (int64_t t = 0; t < f->n_tok; t++) lg_model_rotation(m, w, f->pos[t], w->cs + t * half, w->sn + t * half);
    o->embed(x, &(lg_op_embed){ .x = w->x, .w = c->tied ? &m->output : &m->embed, .ids = f->ids, .n_tok = n_raw });
    if (f->n_mem)
        o->embed(x, &(lg_op_embed){ .x = w->x + n_raw * c->n_embd, .w = &m->memory.embed, .ids = f->ids + n_raw, .n_tok = f->n_mem });
    for (int64_t l = 0; l < c->n_layer; l++) {
        const lg_layer *y = &m->layer[l];
        const lg_lora_layer *r = f->lora && f->lora->layer ? &f->lora->layer[l] : NULL;
        const bool last = l == c->n_layer - 1;
        if (!f->n_mem || !last) project(m, w, f, l, 0, n_raw, false);
        if (f->n_mem) project(m, w, f, l, n_raw, f->n_mem, true);
        if (f->on_query) LG_TRY(show_queries(m, w, f, l, err));
        /* After the last layer's K and V only the rows whose logits are asked for matter. */
        int64_t t0 = 0, n = f->n_tok;
        if (last) {
            if (!f->n_row) {
                if (f->n_observe) LG_TRY(observe(m, w, f, l, err));
                break;
            }
            if (!f->read) t0 = f->row[0];
            n -= t0;
        }
        const lg_spread *p = &f->spread;
        const lg_spread spread = { p->slot, p->slot ? p->window + l * nkv : NULL, p->slot ? p->n_make + l * nkv : NULL, p->least,
                                   p->latest, l ? 0 : p->n_latest };
        float *xs = w->x + t0 * c->n_embd, *att = w->att + t0 * nq, *h = w->h + t0 * c->n_ff;
        if (f->read)
            o->attend_hybrid(x, &(lg_op_attend_hybrid){ .out = att, .q = w->q + t0 * nq, .kv = f->kv[l], .geom = f->geom, .seqs = f->seqs,
                .n_seq = f->n_seq, .budget = f->budget, .dense = f->dense, .read = f->read + l * nkv, .make = f->make + l * nkv,
                .sets = f->sets, .select = f->select, .spread = spread, .n_head = (int32_t)c->n_head, .scale = scale });
        else
            attend(m, w, f, l, t0, n - f->n_mem);
        const lg_weight *own = f->n_mem && m->memory.layer[l].wo.n_out ? &m->memory.layer[l].wo : NULL;
        if (f->n_mem) attend(m, w, f, l, n_raw, f->n_mem);
        if (f->n_observe) LG_TRY(observe(m, w, f, l, err)); /* (behind attention: the CPU's takes what it needs from there) */
        o->product_add(x, &(lg_op_product_add){ .y = xs, .x = att, .w = &y->wo, .n_tok = own ? n_raw : n, .lora = r ? &r->o : NULL });
        if (own) o->product_add(x, &(lg_op_product_add){ .y = xs + n_raw * c->n_embd, .x = att + n_raw * nq, .w = own, .n_tok = f->n_mem });
        o->gate_up(x, &(lg_op_gate_up){ .h = h, .x = xs, .norm = y->ffn_norm, .eps = c->norm_eps, .gate = &y->gate, .up = &y->up, .n_tok = n,
            .lora_gate = r ? &r->gate : NULL, .lora_up = r ? &r->up : NULL });
        o->product_add(x, &(lg_op_product_add){ .y = xs, .x = h, .w = &y->down, .n_tok = n, .lora = r ? &r->down : NULL });
    }
    if (f->n_row && f->logits)
        o->logits(x, &(lg_op_logits){ .logits = f->logits, .x = w->x, .norm = m->output_norm, .eps = c->norm_eps, .w = &m->output,
            .row = f->row, .n_row = f->n_row });
    if (f->n_row && f->logits && f->next) {
        const int64_t n_vocab = m->output.n_out;
        m->n_draw++;
        if (f->draw)
            o->sample(x, &(lg_op_sample){ .id = f->next, .logits = f->logits, .n_row = f->n_row, .n_vocab = n_vocab, .draw = f->draw, .recent = f->recent });
        else
            o->argmax(x, &(lg_op_argmax){ .id = f->next, .logits = f->logits, .n_row = f->n_row, .n_vocab = n_vocab });
    }
    const int64_t n_set = (int64_t)f->n_seq * f->sets.n_slot;
    if (f->fetch_n && n_set) o->fetch(x, f->fetch_n, f->sets.n, n_set * (int64_t)sizeof(int32_t));
    if (f->fetch_idx && n_set) o->fetch(x, f->fetch_idx, f->sets.idx, n_set * f->sets.cap * (int64_t)sizeof(int32_t));
    return f->ticket ? o->submit(x, f->ticket, err) : o->sync(x, err);
done:
    return st;
}

lg_status lg_model_logits(lg_model *m, const lg_work *w, const int32_t *row, int64_t n_row, float *logits, lg_error *err) {
    m->ops->logits(m->ctx, &(lg_op_logits){ .logits = logits, .x = w->x, .norm = m->output_norm, .eps = m->cfg.norm_eps, .w = &m->output,
        .row = row, .n_row = n_row });
    return m->ops->sync(m->ctx, err);
}
