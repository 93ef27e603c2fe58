/* decode: ids to bytes, at once or as a stream that never gives half a UTF-8 sequence.
 * Ids of padding rows (no token) have no bytes; so have ids past the vocabulary: models may have more rows than
 * their tokenizer has tokens. The range of ids from outside is the model's to check. */
#include <string.h>

#include "text/room.h"

static lg_status bytes_of(const lg_tokenizer *t, int32_t id, bool special, const char **s, int64_t *n, lg_error *err) {
    *n = 0;
    *s = "";
    if (id < 0) return lg_base_fail(err, LG_ERR_USAGE, -1, "%s: %d is no token id", t->source, id);
    if (id >= t->n_vocab) return LG_OK;
    const lg_token *k = &t->token[id];
    if (k->kind == LG_KIND_UNUSED || (k->kind == LG_KIND_SPECIAL && !special)) return LG_OK;
    *s = t->arena.data + k->bytes;
    *n = k->n_bytes;
    return LG_OK;
}

lg_status lg_text_decode(const lg_tokenizer *t, const int32_t *ids, int64_t n, unsigned flags, lg_text *out, lg_error *err) {
    int64_t start = out->n;
    lg_status st = LG_OK;
    if (!lg_base_text_append(out, "", 0)) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "no memory to decode"));
    for (int64_t i = 0; i < n; i++) {
        const char *s;
        int64_t k;
        LG_TRY(bytes_of(t, ids[i], flags & LG_TOK_SPECIAL, &s, &k, err));
        if (!lg_base_text_append(out, s, k)) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "no memory to decode"));
    }
done:
    if (st != LG_OK && out->data) out->data[out->n = start] = 0;
    return st;
}

/* 1: one whole sequence, 0: the beginning of one, -1: neither. */
static int sequence(const uint8_t *p, int n) {
    uint8_t low = 0x80, high = 0xbf;
    int need = p[0] < 0x80 ? 1 : p[0] >= 0xc2 && p[0] < 0xe0 ? 2 : p[0] >= 0xe0 && p[0] < 0xf0 ? 3 : p[0] >= 0xf0 && p[0] < 0xf5 ? 4 : 0;
    if (!need) return -1;
    if (p[0] == 0xe0) low = 0xa0;  /* overlong */
    if (p[0] == 0xed) high = 0x9f; /* surrogates */
    if (p[0] == 0xf0) low = 0x90;
    if (p[0] == 0xf4) high = 0x8f; /* past U+10FFFF */
    for (int i = 1; i < n; i++, low = 0x80, high = 0xbf)
        if (p[i] < low || p[i] > high) return -1;
    return n == need;
}

lg_status lg_text_stream_push(const lg_tokenizer *t, lg_text_stream *s, int32_t id, bool special, lg_text *out, lg_error *err) {
    const char *p;
    int64_t n;
    lg_status st = bytes_of(t, id, special, &p, &n, err);
    bool ok = true;
    for (int64_t i = 0; st == LG_OK && ok && i < n; i++) {
        s->pending[s->n_pending++] = (uint8_t)p[i];
        int is = sequence(s->pending, s->n_pending);
        if (is < 0) { /* what was pending was broken; the byte itself may begin anew */
            ok = lg_base_text_append(out, "\xef\xbf\xbd", 3);
            bool again = s->n_pending > 1;
            s->pending[0] = (uint8_t)p[i];
            s->n_pending = again;
            is = again ? sequence(s->pending, 1) : 0;
            if (is < 0) {
                ok = ok && lg_base_text_append(out, "\xef\xbf\xbd", 3);
                s->n_pending = 0;
            }
        }
        if (is > 0) {
            ok = ok && lg_base_text_append(out, (const char *)s->pending, s->n_pending);
            s->n_pending = 0;
        }
    }
    return ok ? st : lg_base_fail(err, LG_ERR_NOMEM, -1, "no memory to decode");
}

bool lg_text_stream_end(lg_text_stream *s, lg_text *out) {
    bool some = s->n_pending > 0;
    s->n_pending = 0;
    return !some || lg_base_text_append(out, "\xef\xbf\xbd", 3);
}
