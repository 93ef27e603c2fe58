/* Pages: LG_PAGE tokens of all KV heads of a layer. A page number means the same page in every layer's K and V, so a
 * sequence has one page table. Pages are shared by forks and copied when a sharer writes. */
#include "session/session.h"
#include <string.h>

lg_status lg_session_cache_init(lg_session *s, lg_error *err) {
    const lg_config *c = &s->m->cfg;
    const int64_t per_seq = (s->p.n_ctx + LG_PAGE - 1) / LG_PAGE;
    int64_t bytes;
    s->geom = (lg_kv_geom){ .dtype = s->p.kv, .n_head_kv = (int32_t)c->n_head_kv, .head_dim = (int32_t)c->head_dim,
                            .row_bytes = lg_base_row_bytes(s->p.kv, c->head_dim) };
    s->page_bytes = c->n_head_kv * LG_PAGE * s->geom.row_bytes;
    if (s->geom.row_bytes <= 0 || !lg_base_mul(per_seq, s->p.n_seq_max, &s->n_page) || s->n_page > INT32_MAX ||
        !lg_base_mul(s->n_page, s->page_bytes, &bytes))
        return lg_base_fail(err, LG_ERR_LIMIT, -1, "a cache of %lld x %lld tokens is beyond what can be addressed",
                            (long long)s->p.n_seq_max, (long long)s->p.n_ctx);
    s->stats.kv_bytes_cache = bytes * 2 * c->n_layer;
    s->kv = lg_base_calloc(c->n_layer, sizeof *s->kv);
    s->ref = lg_base_calloc(s->n_page, sizeof *s->ref);
    s->free_page = lg_base_calloc(s->n_page, sizeof *s->free_page);
    s->page_copy = lg_base_alloc(s->page_bytes);
    s->seq = lg_base_calloc(s->p.n_seq_max, sizeof *s->seq);
    if (!s->kv || !s->ref || !s->free_page || !s->page_copy || !s->seq) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    for (int64_t l = 0; l < c->n_layer; l++) {
        lg_error why = { 0 };
        s->kv[l].k = s->m->ops->alloc(s->m->ctx, bytes, true, &why);
        s->kv[l].v = s->kv[l].k ? s->m->ops->alloc(s->m->ctx, bytes, true, &why) : NULL;
        if (!s->kv[l].v) return lg_base_fail(err, LG_ERR_NOMEM, -1, "the cache needs %lld bytes: %s", (long long)s->stats.kv_bytes_cache, why.message);
    }
    for (int64_t i = 0; i < s->n_page; i++) s->free_page[i] = (int32_t)(s->n_page - 1 - i);
    s->n_free = s->n_page;
    for (int64_t i = 0; i < s->p.n_seq_max; i++) {
        s->seq[i].ids = lg_base_calloc(s->p.n_ctx, sizeof(int32_t));
        s->seq[i].page = lg_base_calloc(per_seq, sizeof(int32_t));
        s->seq[i].logit_row = -1;
        if (!s->seq[i].ids || !s->seq[i].page) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    }
    return LG_OK;
}

void lg_session_cache_free(lg_session *s) {
    for (int64_t l = 0; s->kv && l < s->m->cfg.n_layer; l++) {
        if (s->kv[l].k) s->m->ops->free(s->m->ctx, s->kv[l].k);
        if (s->kv[l].v) s->m->ops->free(s->m->ctx, s->kv[l].v);
    }
    for (int64_t i = 0; s->seq && i < s->p.n_seq_max; i++) {
        lg_base_free(s->seq[i].ids);
        lg_base_free(s->seq[i].page);
    }
    lg_base_free(s->kv);
    lg_base_free(s->ref);
    lg_base_free(s->free_page);
    lg_base_free(s->page_copy);
    lg_base_free(s->seq);
}

static int32_t take(lg_session *s) { /* every sequence has room for n_ctx tokens, so one is always free */
    const int32_t p = s->free_page[--s->n_free];
    s->ref[p] = 1;
    return p;
}
static void release(lg_session *s, int32_t p) {
    if (--s->ref[p] == 0) s->free_page[s->n_free++] = p;
}

void lg_session_drop(lg_session *s, lg_timeline *q, int64_t keep) {
    lg_session_settle(s); /* (it writes a row behind the sequence) */
    const int64_t n = (keep + LG_PAGE - 1) / LG_PAGE;
    while (q->n_page > n) release(s, q->page[--q->n_page]);
}

void lg_session_pages(lg_session *s, lg_timeline *q, int64_t from, int64_t to) {
    const lg_ops *o = s->m->ops;
    for (int64_t i = from / LG_PAGE; i * LG_PAGE < to; i++) {
        if (i == q->n_page) {
            q->page[q->n_page++] = take(s);
        } else if (s->ref[q->page[i]] > 1) {
            const int32_t old = q->page[i], fresh = take(s);
            for (int64_t l = 0; l < s->m->cfg.n_layer; l++)
                for (int kv = 0; kv < 2; kv++) {
                    uint8_t *base = kv ? s->kv[l].v : s->kv[l].k;
                    o->copy(s->m->ctx, base + fresh * s->page_bytes, base + old * s->page_bytes, s->page_bytes);
                }
            release(s, old);
            q->page[i] = fresh;
        }
    }
}
