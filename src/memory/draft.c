/* draft: greedy decoding that guesses ahead. A memory update mostly copies the memory before it, so what followed there is a good
 * guess of what follows here: the longest tail of the new text that stands in the old memory is found, the ids behind it are fed
 * together with the next id as one short pass, and as many of them are kept as the model itself would have chosen. The text is
 * that of plain decoding; there are fewer passes. (Rows of one pass and single steps may round differently where the kernels do:
 * a tie that close may break the other way.) */
#include "memory/ask.h"
#include <string.h>

enum { TAIL = 4, LEAST = 4, MOST = 32 };

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

/* Where in `from` the text goes on behind its longest tail in it (the last such place), -1: nowhere. One id is enough at the start. */
static int64_t guess(const lg_ids *from, const lg_ids *text) {
    for (int64_t k = text->n < TAIL ? text->n : TAIL; k >= (text->n < 3 ? 1 : 2); k--)
        for (int64_t at = from->n - 1; at >= k; at--)
            if (!memcmp(from->data + at - k, text->data + text->n - k, (size_t)k * sizeof *text->data)) return at;
    return -1;
}

static bool ends(const lg_asking *a, int32_t id) {
    for (int64_t i = 0; i < a->stop.n; i++)
        if (a->stop.data[i] == id) return true;
    return false;
}

bool lg_memory_can_draft(const lg_asking *a) { return a->p.draft && a->p.sampler.temp <= 0 && a->m->ops->host_memory && !a->s->roles.n_layer; }

lg_status lg_memory_read_drafted(lg_asking *a, lg_reading *r, const lg_ids *from, lg_error *err) {
    lg_status st = LG_OK;
    lg_session *s = a->s;
    const int64_t n_vocab = a->m->cfg.n_vocab, room = s->p.n_ctx;
    int64_t ahead = LEAST;
    lg_ids *out = &r->out.ids;
    int32_t feed[MOST + 1];
    const double began = lg_base_now();
    lg_slots slots = { 0 };
    const int64_t n_layer = a->m->cfg.n_layer;
    const uint8_t **rows = lg_base_calloc(2 * n_layer, sizeof *rows);
    if (!rows) LG_TRY(nomem(err));
    if (r->chunk >= 0) LG_TRY(lg_memory_bank_slots(a->b, r->chunk, &slots, rows, rows + n_layer, err));
    if (a->p.slot_rope >= 0) slots.rope = a->p.slot_rope != 0;
    LG_TRY(lg_session_set_slots(s, 0, &slots, err));
    const int64_t before = s->seq[0].n_slot + s->seq[0].shift; /* positions in front of the prompt */
    LG_TRY(lg_session_sync(s, 0, r->prompt.data, r->prompt.n, err));
    r->out.prompt_tokens = r->prompt.n;
    r->out.prefill_s = lg_base_now() - began;
    r->out.stop_reason = LG_STOP_LENGTH;
    int32_t next = lg_ops_greatest(lg_session_logits(s, 0), n_vocab);
    while (out->n < r->n_max) {
        if (ends(a, next)) {
            r->out.stop_reason = LG_STOP_EOS;
            break;
        }
        if (!lg_base_ids_push(out, next)) LG_TRY(nomem(err));
        const int64_t len = lg_session_len(s, 0), left = r->n_max - out->n, fits = room - before - len - 1;
        if (!left || fits < 0) break;
        int64_t at = guess(from, out), k = 0;
        feed[0] = next;
        while (at >= 0 && k < ahead && k < left && k < fits && k < s->max_tok - 1 && at + k < from->n) {
            feed[k + 1] = from->data[at + k];
            k++;
        }
        LG_TRY(lg_session_chunk(s, 0, feed, k + 1, k + 1, s->logits, false, err));
        r->out.decode_steps++;
        int64_t kept = 0;
        next = lg_ops_greatest(s->logits, n_vocab);
        while (kept < k && next == feed[kept + 1] && !ends(a, next)) {
            if (!lg_base_ids_push(out, next)) LG_TRY(nomem(err));
            kept++;
            next = lg_ops_greatest(s->logits + kept * n_vocab, n_vocab);
        }
        if (kept < k) LG_TRY(lg_session_rewind(s, 0, len + 1 + kept, err));
        ahead = kept == k && k ? (2 * ahead < MOST ? 2 * ahead : MOST) : LEAST;
        LG_TRY(lg_memory_tick(a, a->what, a->done, a->total, err));
    }
    r->out.decode_s = lg_base_now() - began - r->out.prefill_s;
    LG_TRY(lg_session_set_slots(s, 0, NULL, err));
done:
    lg_base_free(rows);
    return st;
}
