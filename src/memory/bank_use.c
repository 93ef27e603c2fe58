/* bank_use: what callers ask of an open bank: its facts and rows; and banks that hold ids alone. */
#include "memory/bank.h"
#include <string.h>

void lg_bank_get_info(const lg_bank *b, lg_bank_info *out) {
    const lg_bank_header *h = &b->h;
    *out = (lg_bank_info){ .n_tokens = h->n_tokens, .n_chunk = h->n_chunk, .chunk = h->chunk, .window = h->window, .ratio = h->ratio, .n_layer = h->n_layer,
                           .n_head_kv = h->n_head_kv, .head_dim = h->head_dim, .file_bytes = b->map.size, .group = h->group,
                           .slots_dtype = (lg_dtype)h->slots_dtype, .slot_rope = h->slot_rope != 0 };
    memcpy(out->family, h->family, 32);
    memcpy(out->fingerprint, h->fingerprint, 32);
    memcpy(out->memory, h->memory, 32);
}

static lg_status check_chunk(const lg_bank *b, int64_t i, lg_error *err) {
    if (i >= 0 && i < b->h.n_chunk) return LG_OK;
    return lg_base_fail(err, LG_ERR_LIMIT, -1, "%s: chunk %lld (the bank has 0 to %lld)", b->name, (long long)i, (long long)b->h.n_chunk - 1);
}
static lg_status check_slots(const lg_bank *b, lg_error *err) {
    return b->map.data ? LG_OK : lg_base_fail(err, LG_ERR_USAGE, -1, "the document was not compressed: there are no slots");
}

lg_status lg_bank_get_chunk(const lg_bank *b, int64_t i, lg_bank_chunk *out, lg_error *err) {
    const lg_status st = check_chunk(b, i, err);
    if (st != LG_OK) return st;
    const lg_bank_entry *e = &b->chunk[i];
    *out = (lg_bank_chunk){ .token_begin = i * b->h.chunk, .token_end = i * b->h.chunk + e->n_token, .byte_begin = e->byte_begin, .byte_end = e->byte_end,
                            .slots = e->slots };
    return LG_OK;
}

const int32_t *lg_bank_ids(const lg_bank *b) { return b->ids; }

lg_status lg_bank_read(const lg_bank *b, int64_t chunk, float *k, float *v, lg_error *err) {
    lg_status st;
    LG_TRY(check_slots(b, err));
    LG_TRY(check_chunk(b, chunk, err));
    const lg_bank_header *h = &b->h;
    const lg_bank_entry *e = &b->chunk[chunk];
    const int64_t block = lg_memory_bank_block(h, e->slots), row = lg_base_row_bytes((lg_dtype)h->slots_dtype, h->head_dim), rows = e->slots * h->n_head_kv;
    for (int64_t j = 0; j < 2 * h->n_layer; j++) {
        float *dst = (j % 2 ? v : k) + j / 2 * rows * h->head_dim;
        const uint8_t *src = b->map.data + e->at + j * block;
        for (int64_t r = 0; r < rows; r++) lg_base_dequant((lg_dtype)h->slots_dtype, src + r * row, dst + r * h->head_dim, h->head_dim);
    }
done:
    return st;
}

lg_status lg_memory_bank_slots(const lg_bank *b, int64_t chunk, lg_slots *out, const uint8_t **k, const uint8_t **v, lg_error *err) {
    lg_status st;
    LG_TRY(check_slots(b, err));
    LG_TRY(check_chunk(b, chunk, err));
    const lg_bank_header *h = &b->h;
    const lg_bank_entry *e = &b->chunk[chunk];
    const int64_t block = lg_memory_bank_block(h, e->slots);
    for (int64_t l = 0; l < h->n_layer; l++) {
        k[l] = b->map.data + e->at + 2 * l * block;
        v[l] = k[l] + block;
    }
    *out = (lg_slots){ .n = e->slots, .base = h->chunk / h->ratio, .rope = h->slot_rope != 0, .dtype = (lg_dtype)h->slots_dtype, .k = k, .v = v };
done:
    return st;
}

lg_status lg_bank_fits(const lg_bank *b, const lg_model *m, lg_error *err) {
    const lg_bank_header *h = &b->h;
    if (memcmp(h->family, m->info.family, 32) || h->n_layer != m->cfg.n_layer || h->n_head_kv != m->cfg.n_head_kv || h->head_dim != m->cfg.head_dim ||
        h->n_vocab != m->cfg.n_vocab)
        return lg_base_fail(err, LG_ERR_MISMATCH, -1, "%s: a bank of another model (family %.32s, the model's is %.32s)", b->name, h->family, m->info.family);
    if (memcmp(h->fingerprint, m->info.fingerprint, 32))
        lg_base_log(LG_LOG_WARN, "%s: built with another quantisation of this model", b->name);
    char memory[40] = "";
    const lg_status st = lg_memory_weights_hash(m, memory, err);
    if (st == LG_OK && *memory && *h->memory && memcmp(memory, h->memory, 32))
        lg_base_log(LG_LOG_WARN, "%s: built with other memory weights than those loaded; its slots may mean nothing to this reader", b->name);
    return st;
}

/* ---- ids alone ---- */
lg_status lg_bank_plain(lg_bank **out, lg_model *m, const char *text, int64_t n_text, int64_t chunk, lg_error *err) {
    lg_status st = LG_OK;
    lg_ids ids = { 0 };
    int64_t *end = NULL;
    bool known = false;
    *out = NULL;
    lg_bank *b = lg_base_alloc(sizeof *b);
    if (!b || !(b->name = lg_base_strdup("the document"))) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    if (chunk == 0) chunk = 4096;
    if (chunk < 1) LG_TRY(lg_base_fail(err, LG_ERR_USAGE, -1, "chunks of %lld tokens", (long long)chunk));
    LG_TRY(lg_tokenize(m, text, n_text, 0, &ids, err));
    if (ids.n == 0) LG_TRY(lg_base_fail(err, LG_ERR_LIMIT, -1, "the document has no tokens"));
    const int64_t n_chunk = (ids.n + chunk - 1) / chunk;
    end = lg_base_calloc(n_chunk, sizeof *end);
    b->own_chunk = lg_base_calloc(n_chunk, sizeof *b->own_chunk);
    if (!end || !b->own_chunk) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    LG_TRY(lg_memory_byte_ends(m, ids.data, ids.n, text, n_text, chunk, chunk, end, &known, err));
    b->h = (lg_bank_header){ .n_vocab = m->cfg.n_vocab, .n_layer = m->cfg.n_layer, .n_head_kv = m->cfg.n_head_kv, .head_dim = m->cfg.head_dim, .chunk = chunk,
                             .window = chunk, .ratio = 1, .group = 1, .n_tokens = ids.n, .n_chunk = n_chunk, .n_bytes = n_text };
    memcpy(b->h.family, m->info.family, 32);
    memcpy(b->h.fingerprint, m->info.fingerprint, 32);
    for (int64_t c = 0; c < n_chunk; c++)
        b->own_chunk[c] = (lg_bank_entry){ .n_token = c + 1 < n_chunk ? chunk : ids.n - c * chunk, .byte_begin = !known ? -1 : c ? end[c - 1] : 0,
                                           .byte_end = known ? end[c] : -1 };
    b->chunk = b->own_chunk;
    b->ids = b->own_ids = ids.data;
    ids.data = NULL;
    *out = b;
    b = NULL;
done:
    lg_bank_close(b);
    lg_ids_free(&ids);
    lg_base_free(end);
    return st;
}
