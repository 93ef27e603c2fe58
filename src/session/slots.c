/* Memory slots before a prompt: rows 0 .. n-1 of a sequence hold the slots of one chunk, the prompt follows in row n with RoPE
 * position base. Slot keys come un-rotated; they are used so, or rotated at their index (the memory weights say which). */
#include "session/session.h"
#include <string.h>

static lg_status check(const lg_session *s, int64_t seq, const lg_slots *x, lg_error *err) {
    if (seq < 0 || seq >= s->p.n_seq_max)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "sequence %lld (0 to %lld)", (long long)seq, (long long)s->p.n_seq_max - 1);
    if (!x || !x->n) return LG_OK;
    if (x->n < 0 || x->base < x->n || (x->dtype != LG_DTYPE_F32 && x->dtype != LG_DTYPE_BF16 && x->dtype != LG_DTYPE_KV8))
        return lg_base_fail(err, LG_ERR_USAGE, -1, "%lld slots before position %lld", (long long)x->n, (long long)x->base);
    if (x->base >= s->p.n_ctx)
        return lg_base_fail(err, LG_ERR_LIMIT, -1, "a prompt at position %lld behind slots does not fit into the context of %lld", (long long)x->base,
                            (long long)s->p.n_ctx);
    return LG_OK;
}

enum { STAGED = 4 }; /* layers on their way through device memory */

/* Writes the slots in pieces of max_tok rows. */
static lg_status write_slots(lg_session *s, lg_timeline *q, const lg_slots *x, lg_error *err) {
    lg_status st = LG_OK;
    lg_model *m = s->m;
    const lg_ops *o = m->ops;
    const int64_t d = s->geom.head_dim, half = d / 2, heads = s->geom.n_head_kv;
    const lg_kv_geom src = { .dtype = x->dtype, .n_head_kv = s->geom.n_head_kv, .head_dim = s->geom.head_dim, .row_bytes = lg_base_row_bytes(x->dtype, d) };
    const int64_t row = heads * src.row_bytes, step = s->max_tok < x->n ? s->max_tok : x->n, layer = 2 * step * row;
    if (!o->host_memory && s->stage_bytes < STAGED * layer) {
        if (s->stage) o->free(m->ctx, s->stage);
        s->stage = o->alloc(m->ctx, STAGED * layer, false, err);
        s->stage_bytes = s->stage ? STAGED * layer : 0;
        if (!s->stage) return LG_ERR_NOMEM;
    }
    for (int64_t first = 0; first < x->n; first += step) {
        const int64_t n = x->n - first < step ? x->n - first : step;
        for (int64_t t = 0; t < n; t++) {
            const int64_t at = first + t;
            s->dst_page[t] = q->page[at / LG_PAGE];
            s->dst_slot[t] = (int32_t)(at % LG_PAGE);
            if (x->rope) lg_model_rotation(m, &s->work, at, s->work.cs + t * half, s->work.sn + t * half);
        }
        for (int64_t l = 0; l < m->cfg.n_layer; l++) {
            const uint8_t *k = x->k[l] + first * row, *v = x->v[l] + first * row;
            if (!o->host_memory) {
                uint8_t *to = s->stage + l % STAGED * layer;
                o->upload(m->ctx, to, k, n * row);
                o->upload(m->ctx, to + step * row, v, n * row);
                k = to;
                v = to + step * row;
            }
            o->kv_write(m->ctx, &(lg_op_kv_write){ .kv = s->kv[l], .geom = s->geom, .k = k, .v = v, .src = src,
                .rope_cos = x->rope ? s->work.cs : NULL, .rope_sin = x->rope ? s->work.sn : NULL,
                .rope_interleaved = m->cfg.rope_interleaved, .dst_page = s->dst_page, .dst_slot = s->dst_slot, .n_tok = n });
            if (!o->host_memory && l % STAGED == STAGED - 1) LG_TRY(o->sync(m->ctx, err)); /* their room is used again */
        }
        LG_TRY(o->sync(m->ctx, err));
    }
done:
    return st;
}

lg_status lg_session_set_slots(lg_session *s, int64_t seq, const lg_slots *slots, lg_error *err) {
    lg_status st;
    LG_TRY(check(s, seq, slots, err));
    lg_timeline *q = &s->seq[seq];
    lg_session_drop(s, q, 0);
    q->len = q->n_slot = q->shift = q->steps = 0;
    q->logit_row = q->observed = -1;
    if (!slots || !slots->n) return LG_OK;
    lg_session_pages(s, q, 0, slots->n);
    LG_TRY(write_slots(s, q, slots, err));
    for (int64_t i = 0; i < slots->n; i++) q->ids[i] = -1;
    q->len = q->n_slot = slots->n;
    q->shift = slots->base - slots->n;
done:
    return st;
}

void lg_session_use_lora(lg_session *s, const lg_lora_set *set) {
    lg_session_settle(s);
    s->lora = set && set->layer ? set : NULL;
}
