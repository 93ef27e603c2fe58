/* source: what a bank says about where it comes from: the byte range of every chunk in its text, and the memory weights' hash.
 *
 * Ids of a byte-level tokenizer spell the text after its normalisation: invalid UTF-8 has become U+FFFD, and some tokenizers
 * compose (NFC). Where nothing changed, offsets are sums of token lengths. Where something did, the text is walked in segments
 * that begin at ASCII bytes: no character joins another across such a border, so each segment normalises alone, and a chunk
 * border inside a changed segment counts as its beginning. */
#include "memory/bank.h"
#include "text/room.h"
#include <string.h>

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

/* Cumulative spelled length at every border; *spelled: all bytes. */
static lg_status spell(const lg_model *m, const int32_t *ids, int64_t n, int64_t first, int64_t chunk, int64_t *end, int64_t *n_end, lg_text *spelled, lg_error *err) {
    int64_t at = 0;
    *n_end = 0;
    while (at < n) {
        const int64_t want = *n_end ? chunk : first, k = n - at < want ? n - at : want;
        const lg_status st = lg_text_decode(m->tok, ids + at, k, LG_TOK_SPECIAL, spelled, err);
        if (st != LG_OK) return st;
        at += k;
        end[(*n_end)++] = spelled->n;
    }
    return LG_OK;
}

static int64_t segment_end(const char *s, int64_t at, int64_t n) {
    for (at++; at < n && (uint8_t)s[at] >= 0x80;) at++;
    return at;
}

/* Moves end[] from the spelled text into text, assuming that it was repaired (and composed); *known false where it was not. */
static lg_status walk(const char *text, int64_t n_text, const lg_text *spelled, bool nfc, int64_t *end, int64_t n_end, bool *known, lg_error *err) {
    lg_status st = LG_OK;
    lg_text repaired = { 0 }, composed = { 0 };
    int64_t j = 0, e = 0; /* offset in spelled; next border */
    *known = false;
    for (int64_t i = 0; i < n_text;) {
        const int64_t next = segment_end(text, i, n_text);
        const lg_text *seg = &repaired;
        repaired.n = composed.n = 0;
        if (!lg_file_utf8_repair(&repaired, text + i, next - i)) LG_TRY(nomem(err));
        if (nfc && lg_text_needs_nfc(repaired.data, repaired.n)) {
            LG_TRY(lg_text_nfc(&composed, repaired.data, repaired.n, err));
            seg = &composed;
        }
        if (seg->n > spelled->n - j || memcmp(seg->data, spelled->data + j, (size_t)seg->n)) goto done;
        const bool same = seg->n == next - i && !memcmp(seg->data, text + i, (size_t)seg->n);
        while (e < n_end && end[e] < j + seg->n) {
            end[e] = same ? i + (end[e] - j) : i;
            e++;
        }
        j += seg->n;
        i = next;
    }
    if (j != spelled->n) goto done;
    for (; e < n_end; e++) end[e] = n_text;
    *known = true;
done:
    lg_text_free(&repaired);
    lg_text_free(&composed);
    return st;
}

/* Where the ids spell the text as it stands, which is seen in the space of one chunk: end[] and *same. */
static lg_status spells(const lg_model *m, const int32_t *ids, int64_t n, const char *text, int64_t n_text, int64_t first, int64_t chunk, int64_t *end, bool *same, lg_error *err) {
    lg_status st = LG_OK;
    lg_text piece = { 0 };
    int64_t at = 0, i = 0;
    *same = true;
    for (int64_t k, n_end = 0; i < n && *same; i += k) {
        const int64_t want = n_end ? chunk : first;
        k = n - i < want ? n - i : want;
        piece.n = 0;
        LG_TRY(lg_text_decode(m->tok, ids + i, k, LG_TOK_SPECIAL, &piece, err));
        *same = piece.n <= n_text - at && (!piece.n || !memcmp(piece.data, text + at, (size_t)piece.n));
        at += piece.n;
        end[n_end++] = at;
    }
    *same = *same && at == n_text;
done:
    lg_text_free(&piece);
    return st;
}

lg_status lg_memory_byte_ends(const lg_model *m, const int32_t *ids, int64_t n, const char *text, int64_t n_text, int64_t first, int64_t chunk,
                              int64_t *byte_end, bool *known, lg_error *err) {
    lg_status st = LG_OK;
    lg_text spelled = { 0 };
    int64_t n_end, *copy = NULL;
    *known = false;
    LG_TRY(spells(m, ids, n, text, n_text, first, chunk, byte_end, known, err));
    if (*known) goto done;
    LG_TRY(spell(m, ids, n, first, chunk, byte_end, &n_end, &spelled, err));
    copy = lg_base_calloc(n_end ? n_end : 1, sizeof *copy);
    if (!copy) LG_TRY(nomem(err));
    memcpy(copy, byte_end, (size_t)n_end * sizeof *copy);
    LG_TRY(walk(text, n_text, &spelled, false, byte_end, n_end, known, err));
    if (*known) goto done;
    memcpy(byte_end, copy, (size_t)n_end * sizeof *copy);
    LG_TRY(walk(text, n_text, &spelled, true, byte_end, n_end, known, err));
    if (!*known) lg_base_log(LG_LOG_WARN, "the ids do not spell the text: the bank gets no byte ranges");
done:
    lg_text_free(&spelled);
    lg_base_free(copy);
    return st;
}

static void feed_weight(lg_hash *h, const lg_weight *w) {
    const int64_t shape[3] = { w->dtype, w->n_out, w->n_in }, bytes = w->data ? w->n_out * lg_base_row_bytes(w->dtype, w->n_in) : 0;
    lg_base_hash_feed(h, shape, sizeof shape);
    if (bytes > 0) lg_base_hash_feed(h, w->data, bytes < 4096 ? bytes : 4096);
}

lg_status lg_memory_weights_hash(const lg_model *m, char out[33], lg_error *err) {
    const lg_memory_weights *w = &m->memory;
    memset(out, 0, 33);
    if (!w->layer) return LG_OK;
    lg_hash *h = lg_base_hash_new();
    if (!h) return nomem(err);
    lg_base_hash_feed(h, &w->param, sizeof w->param);
    feed_weight(h, &w->embed);
    for (int64_t l = 0; l < m->cfg.n_layer; l++) {
        const lg_weight *x[] = { &w->layer[l].wq, &w->layer[l].wk, &w->layer[l].wv, &w->layer[l].wo };
        for (int i = 0; i < 4; i++) feed_weight(h, x[i]);
    }
    lg_base_hash_hex128(h, out);
    lg_base_hash_free(h);
    return LG_OK;
}
