/* Snapshot of sequence 0 (layout: docs/FORMATS.md, "Snapshot"). Header of 184 bytes, ids, then per layer and KV head
 * the K rows and the V rows as the cache holds them, then the XXH3-64 of all bytes before it. */
#include "session/session.h"
#include <stdio.h>
#include <string.h>

#define MAGIC "LGSNAP\0\1"
typedef struct snap_head {
    char magic[8];
    char fingerprint[40], family[40]; /* NUL-padded hex */
    int32_t kv_dtype, interleaved;
    int64_t n_layer, n_head_kv, head_dim, row_bytes, n_tok, steps, n_vocab, reserved[4];
} snap_head;
_Static_assert(sizeof(snap_head) == 184, "the header is written as it lies");

static lg_status put(lg_writer *w, lg_hash *h, const void *data, int64_t n, lg_error *err) {
    lg_base_hash_feed(h, data, n);
    return lg_file_write(w, data, n, err);
}

/* Row `t` of head `h`: in runs of one page, rows lie one behind the other. */
static int64_t row_at(const lg_session *s, int64_t h, int64_t t) {
    return (((int64_t)s->seq[0].page[t / LG_PAGE] * s->geom.n_head_kv + h) * LG_PAGE + t % LG_PAGE) * s->geom.row_bytes;
}

lg_status lg_session_save(lg_session *s, const char *path, lg_error *err) {
    lg_status st;
    lg_writer w = { 0 };
    const lg_timeline *q = &s->seq[0];
    const lg_config *c = &s->m->cfg;
    snap_head head = { .magic = MAGIC, .kv_dtype = (int32_t)s->geom.dtype, .interleaved = c->rope_interleaved, .n_layer = c->n_layer,
                       .n_head_kv = c->n_head_kv, .head_dim = c->head_dim, .row_bytes = s->geom.row_bytes, .n_tok = q->len,
                       .steps = q->steps, .n_vocab = c->n_vocab };
    memcpy(head.fingerprint, s->m->info.fingerprint, 33);
    memcpy(head.family, s->m->info.family, 33);
    if (q->n_slot) return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: a sequence behind memory slots has no snapshot", path);
    lg_hash *hash = lg_base_hash_new();
    if (!hash) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    LG_TRY(lg_file_create(&w, path, err));
    LG_TRY(put(&w, hash, &head, sizeof head, err));
    LG_TRY(put(&w, hash, q->ids, q->len * 4, err));
    for (int64_t l = 0; l < c->n_layer; l++)
        for (int64_t h = 0; h < c->n_head_kv; h++)
            for (int kv = 0; kv < 2; kv++)
                for (int64_t t = 0; t < q->len; t += LG_PAGE) {
                    const int64_t n = (q->len - t < LG_PAGE ? q->len - t : LG_PAGE) * s->geom.row_bytes;
                    s->m->ops->download(s->m->ctx, s->page_copy, (kv ? s->kv[l].v : s->kv[l].k) + row_at(s, h, t), n);
                    LG_TRY(put(&w, hash, s->page_copy, n, err));
                }
    const uint64_t sum = lg_base_hash_digest64(hash);
    LG_TRY(lg_file_write(&w, &sum, sizeof sum, err));
    LG_TRY(lg_file_commit(&w, err));
done:
    lg_file_abandon(&w);
    lg_base_hash_free(hash);
    return st;
}

static lg_status check(const lg_session *s, const lg_map *f, snap_head *head, lg_error *err) {
    const lg_config *c = &s->m->cfg;
    int64_t ids, rows, want;
    if (f->size < (int64_t)sizeof *head + 8) return lg_base_fail(err, LG_ERR_FORMAT, 0, "%s: no snapshot: %lld bytes", f->path, (long long)f->size);
    memcpy(head, f->data, sizeof *head);
    if (memcmp(head->magic, MAGIC, 8)) return lg_base_fail(err, LG_ERR_FORMAT, 0, "%s: no snapshot of this version at offset 0", f->path);
    if (head->fingerprint[39] || strcmp(head->fingerprint, s->m->info.fingerprint))
        return lg_base_fail(err, LG_ERR_MISMATCH, 8, "%s: the snapshot at offset 8 belongs to another model file (fingerprint %.32s, this one %s)", f->path,
                            head->fingerprint, s->m->info.fingerprint);
    if (head->kv_dtype != (int32_t)s->geom.dtype)
        return lg_base_fail(err, LG_ERR_MISMATCH, 88, "%s: the snapshot's cache dtype (offset 88) is another than this session's", f->path);
    if (head->n_layer != c->n_layer || head->n_head_kv != c->n_head_kv || head->head_dim != c->head_dim || head->row_bytes != s->geom.row_bytes ||
        head->n_vocab != c->n_vocab || head->interleaved != c->rope_interleaved)
        return lg_base_fail(err, LG_ERR_FORMAT, 96, "%s: geometry at offset 96 is not the model's", f->path);
    if (head->n_tok < 0 || head->n_tok > s->p.n_ctx)
        return lg_base_fail(err, LG_ERR_LIMIT, 128, "%s: a snapshot of %lld tokens (offset 128) does not fit into the context of %lld", f->path,
                            (long long)head->n_tok, (long long)s->p.n_ctx);
    if (head->steps < 0 || head->steps > head->n_tok) return lg_base_fail(err, LG_ERR_FORMAT, 136, "%s: step count at offset 136 is out of range", f->path);
    ids = head->n_tok * 4;
    rows = head->n_tok * 2 * c->n_layer * c->n_head_kv; /* n_tok <= n_ctx: the cache of that size was allocated */
    want = (int64_t)sizeof *head + ids + rows * s->geom.row_bytes + 8;
    if (f->size != want) return lg_base_fail(err, LG_ERR_FORMAT, 0, "%s: %lld bytes, a snapshot of %lld tokens has %lld", f->path, (long long)f->size,
                                             (long long)head->n_tok, (long long)want);
    lg_hash *h = lg_base_hash_new();
    uint64_t sum;
    if (!h) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    lg_base_hash_feed(h, f->data, f->size - 8);
    memcpy(&sum, f->data + f->size - 8, 8);
    const bool same = sum == lg_base_hash_digest64(h);
    lg_base_hash_free(h);
    if (!same) return lg_base_fail(err, LG_ERR_FORMAT, f->size - 8, "%s: checksum at offset %lld does not match", f->path, (long long)f->size - 8);
    for (int64_t i = 0; i < head->n_tok; i++) {
        int32_t id;
        memcpy(&id, f->data + sizeof *head + i * 4, 4);
        if (id < 0 || id >= c->n_vocab)
            return lg_base_fail(err, LG_ERR_FORMAT, (int64_t)sizeof *head + i * 4, "%s: id %d at offset %lld is outside the vocabulary", f->path, id,
                                (long long)((int64_t)sizeof *head + i * 4));
    }
    return LG_OK;
}

lg_status lg_session_load(lg_session *s, const char *path, lg_error *err) {
    lg_status st;
    lg_map f = { 0 };
    snap_head head;
    lg_timeline *q = &s->seq[0];
    LG_TRY(lg_file_map(&f, path, err));
    LG_TRY(check(s, &f, &head, err));
    /* Nothing can fail from here on. */
    lg_session_drop(s, q, 0);
    lg_session_pages(s, q, 0, head.n_tok);
    const uint8_t *at = f.data + sizeof head;
    memcpy(q->ids, at, (size_t)head.n_tok * 4);
    at += head.n_tok * 4;
    for (int64_t l = 0; l < s->m->cfg.n_layer; l++)
        for (int64_t h = 0; h < s->geom.n_head_kv; h++)
            for (int kv = 0; kv < 2; kv++)
                for (int64_t t = 0; t < head.n_tok; t += LG_PAGE) {
                    const int64_t n = (head.n_tok - t < LG_PAGE ? head.n_tok - t : LG_PAGE) * s->geom.row_bytes;
                    s->m->ops->upload(s->m->ctx, (kv ? s->kv[l].v : s->kv[l].k) + row_at(s, h, t), at, n);
                    at += n;
                }
    q->len = head.n_tok;
    q->steps = head.steps;
    q->n_slot = q->shift = 0;
    q->logit_row = q->observed = -1;
done:
    lg_file_unmap(&f);
    return st;
}
