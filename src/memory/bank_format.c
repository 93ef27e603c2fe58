/* bank_format: reading a bank file: header, table, checksums. The file is hostile: every count, offset and size is checked here,
 * before anything behind it is looked at; after lg_bank_open all extents lie inside the mapping. */
#include "memory/bank.h"
#include <stdlib.h>
#include <string.h>

static const char magic[8] = "LGBANK\0\1";

int64_t lg_memory_bank_block(const lg_bank_header *h, int64_t slots) {
    return lg_bank_align(slots * h->n_head_kv * lg_base_row_bytes((lg_dtype)h->slots_dtype, h->head_dim));
}
int64_t lg_memory_bank_chunk_bytes(const lg_bank_header *h, int64_t slots) { return h->n_layer * 2 * lg_memory_bank_block(h, slots); }
int64_t lg_memory_bank_table_bytes(const lg_bank_header *h) {
    return h->n_chunk * (int64_t)sizeof(lg_bank_entry) + (h->n_ids + h->n_dead) * (int64_t)sizeof(lg_bank_extent);
}
void lg_memory_bank_seal(lg_bank_header *h) {
    memcpy(h->magic, magic, sizeof magic);
    h->hash = lg_base_hash_64(h, (int64_t)offsetof(lg_bank_header, hash));
}

static bool hex32(const char s[40], bool may_be_empty) {
    int n = 0;
    while (n < 32 && ((s[n] >= '0' && s[n] <= '9') || (s[n] >= 'a' && s[n] <= 'f'))) n++;
    if (n != 32 && !(n == 0 && may_be_empty)) return false;
    for (int i = n; i < 40; i++)
        if (s[i]) return false;
    return true;
}

static bool whole(const lg_bank_header *h) {
    return !memcmp(h->magic, magic, sizeof magic) && h->hash == lg_base_hash_64(h, (int64_t)offsetof(lg_bank_header, hash));
}

/* Values that every later computation relies on; bounds keep all products below 2^62. */
lg_status lg_memory_bank_check(const lg_bank_header *h, const char *name, int64_t at, lg_error *err) {
    const struct { const char *key; int64_t v, lo, hi; } field[] = {
        { "n_vocab", h->n_vocab, 1, INT32_MAX }, { "n_layer", h->n_layer, 1, 4096 }, { "n_head_kv", h->n_head_kv, 1, 1024 },
        { "head_dim", h->head_dim, 2, 1024 }, { "chunk", h->chunk, 1, 1 << 20 }, { "window", h->window, 1, 1 << 20 },
        { "ratio", h->ratio, 1, 1 << 20 }, { "group", h->group, 1, 1 << 16 }, { "n_tokens", h->n_tokens, 1, (int64_t)1 << 40 },
        { "n_chunk", h->n_chunk, 1, (int64_t)1 << 40 }, { "n_bytes", h->n_bytes, -1, (int64_t)1 << 50 },
        { "ids extents", h->n_ids, 1, LG_BANK_MAX_IDS_EXTENTS }, { "dead extents", h->n_dead, 0, (int64_t)1 << 32 },
        { "slot_rope", h->slot_rope, 0, 1 }, { "compute", h->compute, 0, 1 } };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++)
        if (field[i].v < field[i].lo || field[i].v > field[i].hi)
            return lg_base_fail(err, LG_ERR_FORMAT, at, "%s: header at %lld: %s is %lld", name, (long long)at, field[i].key, (long long)field[i].v);
    if (h->slots_dtype != LG_DTYPE_F32 && h->slots_dtype != LG_DTYPE_BF16 && h->slots_dtype != LG_DTYPE_KV8)
        return lg_base_fail(err, LG_ERR_FORMAT, at, "%s: header at %lld: slots of dtype %u", name, (long long)at, h->slots_dtype);
    if (h->chunk % h->window || h->window % h->ratio || h->head_dim % 2 || h->n_chunk != (h->n_tokens + h->chunk - 1) / h->chunk)
        return lg_base_fail(err, LG_ERR_FORMAT, at, "%s: header at %lld: chunk, window, ratio or n_chunk do not fit together", name, (long long)at);
    if (!hex32(h->family, false) || !hex32(h->fingerprint, false) || !hex32(h->memory, true))
        return lg_base_fail(err, LG_ERR_FORMAT, at, "%s: header at %lld: no fingerprint", name, (long long)at);
    int64_t largest;
    if (!lg_base_mul(lg_memory_bank_chunk_bytes(h, h->chunk / h->ratio), h->n_chunk, &largest))
        return lg_base_fail(err, LG_ERR_FORMAT, at, "%s: header at %lld: sizes overflow", name, (long long)at);
    return LG_OK;
}

/* [at, at + bytes) lies aligned between the header slots and the end. */
static bool inside(const lg_bank_header *h, int64_t at, int64_t bytes) {
    return at >= LG_BANK_DATA && at % LG_BANK_ALIGN == 0 && bytes >= 0 && at <= h->file_bytes && bytes <= h->file_bytes - at;
}

static lg_status check_table(const lg_bank *b, lg_error *err) {
    const lg_bank_header *h = &b->h;
    int64_t n_ids = 0, byte_at = 0;
    for (int64_t c = 0; c < h->n_chunk; c++) {
        const lg_bank_entry *e = &b->chunk[c];
        const int64_t where = h->table_at + c * (int64_t)sizeof *e, tokens = c + 1 < h->n_chunk ? h->chunk : h->n_tokens - c * h->chunk;
        const bool bytes_ok = (e->byte_begin == -1 && e->byte_end == -1) ||
                              (e->byte_begin >= byte_at && e->byte_end >= e->byte_begin && e->byte_end <= h->n_bytes);
        if (e->n_token != tokens || e->slots != (tokens + h->ratio - 1) / h->ratio || e->bytes != lg_memory_bank_chunk_bytes(h, e->slots) ||
            !inside(h, e->at, e->bytes) || !bytes_ok || e->zero)
            return lg_base_fail(err, LG_ERR_FORMAT, where, "%s: offset %lld: the table's entry of chunk %lld is wrong", b->name, (long long)where, (long long)c);
        if (e->byte_end > 0) byte_at = e->byte_end;
    }
    for (int64_t i = 0; i < h->n_ids + h->n_dead; i++) {
        const lg_bank_extent *x = &b->ids_ext[i];
        const int64_t where = h->table_at + h->n_chunk * (int64_t)sizeof(lg_bank_entry) + i * (int64_t)sizeof *x;
        if (!inside(h, x->at, x->bytes) || x->zero || (i < h->n_ids && (x->bytes % 4 || x->bytes == 0 || x->bytes / 4 > h->n_tokens - n_ids)))
            return lg_base_fail(err, LG_ERR_FORMAT, where, "%s: offset %lld: the table's extent %lld is wrong", b->name, (long long)where, (long long)i);
        if (i < h->n_ids) n_ids += x->bytes / 4;
    }
    if (n_ids != h->n_tokens) return lg_base_fail(err, LG_ERR_FORMAT, h->table_at, "%s: %lld ids for %lld tokens", b->name, (long long)n_ids, (long long)h->n_tokens);
    return LG_OK;
}

/* Joins the extents of ids (one: used in place), checks them. */
static lg_status take_ids(lg_bank *b, lg_error *err) {
    const lg_bank_header *h = &b->h;
    b->ids = (const int32_t *)(const void *)(b->map.data + b->ids_ext[0].at);
    if (h->n_ids > 1) {
        b->own_ids = lg_base_calloc(h->n_tokens, sizeof *b->own_ids);
        if (!b->own_ids) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
        int64_t at = 0;
        for (int64_t i = 0; i < h->n_ids; at += b->ids_ext[i++].bytes / 4)
            memcpy(b->own_ids + at, b->map.data + b->ids_ext[i].at, (size_t)b->ids_ext[i].bytes);
        b->ids = b->own_ids;
    }
    if (lg_base_hash_64(b->ids, 4 * h->n_tokens) != h->ids_hash)
        return lg_base_fail(err, LG_ERR_FORMAT, b->ids_ext[0].at, "%s: offset %lld: the ids' checksum is wrong", b->name, (long long)b->ids_ext[0].at);
    for (int64_t i = 0; i < h->n_tokens; i++)
        if (b->ids[i] < 0 || b->ids[i] >= h->n_vocab)
            return lg_base_fail(err, LG_ERR_FORMAT, b->ids_ext[0].at, "%s: id %lld is %d, outside [0, %lld)", b->name, (long long)i, b->ids[i], (long long)h->n_vocab);
    return LG_OK;
}

static bool all_zero(const uint8_t *p, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (p[i]) return false;
    return true;
}

/* The slot whose header counts, -1: none. *other_damaged: the other one is neither empty nor a whole header. */
static int choose(const lg_map *map, lg_bank_header *out, bool *other_damaged) {
    lg_bank_header h[2];
    bool ok[2];
    for (int i = 0; i < 2; i++) {
        memcpy(&h[i], map->data + i * LG_BANK_SLOT, sizeof h[i]);
        ok[i] = whole(&h[i]) && h[i].number > 0 && (int)((h[i].number - 1) % 2) == i;
    }
    if (!ok[0] && !ok[1]) return -1;
    const int best = !ok[1] || (ok[0] && h[0].number > h[1].number) ? 0 : 1;
    const bool empty = all_zero(map->data + (1 - best) * LG_BANK_SLOT, LG_BANK_SLOT);
    *other_damaged = ok[1 - best] ? h[1 - best].number + 1 != h[best].number : !empty || h[best].number > 1;
    *out = h[best];
    return best;
}

static lg_status open_mapped(lg_bank *b, lg_error *err) {
    lg_status st;
    const lg_map *map = &b->map;
    if (map->size < LG_BANK_DATA || memcmp(map->data, magic, 6)) {
        if (map->size < LG_BANK_DATA && map->size >= 6 && !memcmp(map->data, magic, 6))
            return lg_base_fail(err, LG_ERR_FORMAT, map->size, "%s: offset %lld: a bank cut inside its header", b->name, (long long)map->size);
        if (map->size < LG_BANK_DATA || memcmp(map->data + LG_BANK_SLOT, magic, 6))
            return lg_base_fail(err, LG_ERR_FORMAT, 0, "%s: offset 0: no bank file", b->name);
    }
    const int slot = choose(map, &b->h, &b->other_damaged);
    if (slot < 0) return lg_base_fail(err, LG_ERR_FORMAT, 0, "%s: offset 0: both header slots are damaged (or of another version)", b->name);
    lg_bank_header *h = &b->h;
    const int64_t at = slot * LG_BANK_SLOT;
    if (h->state != LG_BANK_COMPLETE)
        return lg_base_fail(err, LG_ERR_FORMAT, at, "%s: an unfinished build; `longan bank build` goes on with it", b->name);
    LG_TRY(lg_memory_bank_check(h, b->name, at, err));
    if (h->file_bytes > map->size || h->file_bytes < LG_BANK_DATA)
        return lg_base_fail(err, LG_ERR_FORMAT, map->size, "%s: %lld bytes, the header at %lld needs %lld: truncated", b->name, (long long)map->size,
                            (long long)at, (long long)h->file_bytes);
    if (h->n_chunk > h->file_bytes / (int64_t)sizeof(lg_bank_entry) || h->n_dead > h->file_bytes / (int64_t)sizeof(lg_bank_extent) ||
        !inside(h, h->table_at, h->table_bytes) || h->table_bytes != lg_memory_bank_table_bytes(h))
        return lg_base_fail(err, LG_ERR_FORMAT, at, "%s: header at %lld: the table lies outside the file", b->name, (long long)at);
    if (lg_base_hash_64(map->data + h->table_at, h->table_bytes) != h->table_hash)
        return lg_base_fail(err, LG_ERR_FORMAT, h->table_at, "%s: offset %lld: the table's checksum is wrong", b->name, (long long)h->table_at);
    b->chunk = (const lg_bank_entry *)(const void *)(map->data + h->table_at);
    b->ids_ext = (const lg_bank_extent *)(const void *)(b->chunk + h->n_chunk);
    b->dead = b->ids_ext + h->n_ids;
    LG_TRY(check_table(b, err));
    LG_TRY(take_ids(b, err));
    if (b->other_damaged) lg_base_log(LG_LOG_WARN, "%s: one header slot is damaged; reading the bank as header %llu has it", b->name, (unsigned long long)h->number);
done:
    return st;
}

lg_status lg_bank_open(lg_bank **out, const char *path, lg_error *err) {
    lg_status st;
    *out = NULL;
    lg_bank *b = lg_base_alloc(sizeof *b);
    if (!b || !(b->name = lg_base_strdup(path))) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    LG_TRY(lg_file_map(&b->map, path, err));
    LG_TRY(open_mapped(b, err));
    *out = b;
    b = NULL;
done:
    lg_bank_close(b);
    return st;
}

void lg_bank_close(lg_bank *b) {
    if (!b) return;
    lg_file_unmap(&b->map);
    lg_base_free(b->name);
    lg_base_free(b->own_ids);
    lg_base_free(b->own_chunk);
    lg_base_free(b);
}

/* ---- verify ---- */
static int by_offset(const void *a, const void *b) {
    const lg_bank_extent *x = a, *y = b;
    return (x->at > y->at) - (x->at < y->at);
}

lg_status lg_bank_verify(const lg_bank *b, lg_error *err) {
    lg_status st = LG_OK;
    const lg_bank_header *h = &b->h;
    const uint8_t *data = b->map.data;
    lg_bank_extent *x = NULL;
    if (!data) return LG_OK; /* ids alone, in memory */
    const int own = (int)((h->number - 1) % 2);
    if (b->other_damaged)
        LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, (1 - own) * LG_BANK_SLOT, "%s: offset %d: the header slot there is damaged", b->name, (1 - own) * LG_BANK_SLOT));
    for (int i = 0; i < 2; i++)
        if (!all_zero(data + i * LG_BANK_SLOT + sizeof *h, LG_BANK_SLOT - (int64_t)sizeof *h))
            LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, i * LG_BANK_SLOT, "%s: offset %d: bytes behind the header are not zero", b->name, i * LG_BANK_SLOT));
    const int64_t n = h->n_chunk + h->n_ids + h->n_dead + 1;
    x = lg_base_calloc(n, sizeof *x);
    if (!x) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    for (int64_t c = 0; c < h->n_chunk; c++) {
        x[c] = (lg_bank_extent){ .at = b->chunk[c].at, .bytes = b->chunk[c].bytes, .hash = b->chunk[c].hash };
        if (lg_base_hash_64(data + x[c].at, x[c].bytes) != x[c].hash)
            LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, x[c].at, "%s: offset %lld: the checksum of chunk %lld is wrong", b->name, (long long)x[c].at, (long long)c));
        lg_file_forget(data + x[c].at, x[c].bytes);
    }
    for (int64_t i = 0; i < h->n_ids + h->n_dead; i++) {
        x[h->n_chunk + i] = b->ids_ext[i];
        if (lg_base_hash_64(data + b->ids_ext[i].at, b->ids_ext[i].bytes) != b->ids_ext[i].hash)
            LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, b->ids_ext[i].at, "%s: offset %lld: the checksum of %s is wrong", b->name, (long long)b->ids_ext[i].at,
                                i < h->n_ids ? "the ids" : "an extent no longer used"));
    }
    x[n - 1] = (lg_bank_extent){ .at = h->table_at, .bytes = h->table_bytes };
    qsort(x, (size_t)n, sizeof *x, by_offset);
    int64_t at = LG_BANK_DATA; /* the extents cover the file: nothing overlaps, gaps are short and zero */
    for (int64_t i = 0; i <= n; i++) {
        const int64_t next = i < n ? x[i].at : h->file_bytes;
        if (next < at || next - at >= LG_BANK_ALIGN || !all_zero(data + at, next - at))
            LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, at, "%s: offset %lld: bytes that belong to nothing", b->name, (long long)at));
        if (i < n) at = x[i].at + x[i].bytes;
    }
    if (b->map.size > h->file_bytes)
        lg_base_log(LG_LOG_WARN, "%s: %lld bytes behind the end, of an append that did not finish; the next append removes them", b->name,
                    (long long)(b->map.size - h->file_bytes));
done:
    lg_base_free(x);
    return st;
}
