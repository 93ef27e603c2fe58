/* bank_build: making bank files and making them longer.
 *
 * A build knows its whole layout from the number of ids, so PATH.part has its final size and offsets from the start. It goes
 * group by group: compress, write the chunks' slots, write their table entries, sync. A group is finished when the checksums in
 * its entries fit the data, whatever was written last before an interruption; so resuming needs no other state. The header of
 * PATH.part says "building" until all groups are there. Chunks of a group are always compressed together, and resume and append
 * cut at group borders only: the bytes of a chunk do not depend on where a build was interrupted.
 *
 * Where the model runs on a device, a group is packed, hashed and written by a thread while the next one is compressed.
 *
 * An append is a build that goes on: the last group, unless it was full, is compressed again with its new neighbours. Everything
 * new goes behind the committed end, then one header slot is written. */
#include "memory/bank.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct build {
    lg_model *m;
    const char *path;     /* of the file written to */
    int fd;
    lg_bank_header h;
    lg_bank_entry *entry; /* [n_chunk] */
    const int32_t *ids;   /* [n_tokens] */
    lg_compressor *c;
    float *k[2], *v[2];   /* [group][stride]: one group is written while the next is compressed */
    uint8_t *rows;        /* one chunk as it lies in the file */
    bool overlap;         /* a group is written while the next is compressed: worth its second buffer on a device */
    int64_t stride;
    lg_progress_fn progress;
    void *user;
} build;

int lg_memory_bank_overlap = -1;

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }
static lg_status io(lg_error *err, const char *path, const char *what) {
    return lg_base_fail(err, LG_ERR_IO, -1, "%s: %s: %s", path, what, strerror(errno));
}

static bool overlaps(const lg_model *m) { return lg_memory_bank_overlap < 0 ? m->ops && !m->ops->host_memory : lg_memory_bank_overlap > 0; }

void lg_bank_defaults(lg_bank_params *p) { *p = (lg_bank_params){ .slots = LG_DTYPE_COUNT }; }

static lg_status put(build *b, int64_t at, const void *data, int64_t n, lg_error *err) {
    const uint8_t *p = data;
    while (n > 0) {
        const ssize_t k = pwrite(b->fd, p, (size_t)(n < 1 << 30 ? n : 1 << 30), (off_t)at);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) return io(err, b->path, "cannot write");
        p += k;
        at += k;
        n -= k;
    }
    return LG_OK;
}
static lg_status sync_data(build *b, lg_error *err) { return fdatasync(b->fd) ? io(err, b->path, "cannot sync") : LG_OK; }

/* number n in slot (n - 1) % 2, zeros behind it. */
static lg_status put_header(build *b, lg_error *err) {
    uint8_t slot[LG_BANK_SLOT] = { 0 };
    lg_memory_bank_seal(&b->h);
    memcpy(slot, &b->h, sizeof b->h);
    return put(b, (int64_t)((b->h.number - 1) % 2) * LG_BANK_SLOT, slot, sizeof slot, err);
}

/* ---- groups ---- */
/* Slots come down from a device straight into page-locked memory. */
static float *slots_new(lg_model *m, int64_t floats, lg_error *err) {
    if (!m->ops->host_alloc) return lg_base_calloc(floats, sizeof(float));
    return m->ops->host_alloc(m->ctx, floats * (int64_t)sizeof(float), err);
}
static void slots_free(lg_model *m, float *p) {
    if (p && m->ops->host_alloc) m->ops->host_free(m->ctx, p);
    else lg_base_free(p);
}

static lg_status open_compressor(build *b, lg_error *err) {
    const lg_bank_header *h = &b->h;
    const int64_t batch = h->group < h->n_chunk ? h->group : h->n_chunk;
    int64_t floats, bytes;
    const lg_status st = lg_memory_compressor_new(&b->c, b->m, h->chunk, h->window, h->ratio, batch, err);
    if (st != LG_OK) return st;
    b->stride = h->n_layer * (h->chunk / h->ratio) * h->n_head_kv * h->head_dim;
    if (!lg_base_mul(b->stride, batch, &floats) || !lg_base_mul(floats, sizeof(float), &bytes)) return nomem(err);
    for (int i = 0; i < (b->overlap && h->n_chunk > batch ? 2 : 1); i++) {
        b->k[i] = slots_new(b->m, floats, err);
        b->v[i] = slots_new(b->m, floats, err);
        if (!b->k[i] || !b->v[i]) return nomem(err);
    }
    b->rows = lg_base_alloc(lg_memory_bank_chunk_bytes(h, h->chunk / h->ratio));
    return b->rows ? LG_OK : nomem(err);
}

/* The rows of one chunk: per layer a block of K, then one of V, each zero-padded to its alignment. */
static void pack_chunk(build *b, const float *k, const float *v, int64_t slots) {
    const lg_bank_header *h = &b->h;
    const lg_dtype t = (lg_dtype)h->slots_dtype;
    const int64_t block = lg_memory_bank_block(h, slots), row = lg_base_row_bytes(t, h->head_dim), rows = slots * h->n_head_kv;
    const int64_t layer = h->chunk / h->ratio * h->n_head_kv * h->head_dim;
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < 2 * h->n_layer; j++) {
        const float *src = (j % 2 ? v : k) + j / 2 * layer;
        uint8_t *dst = b->rows + j * block;
        for (int64_t r = 0; r < rows; r++) lg_base_quant(t, src + r * h->head_dim, dst + r * row, h->head_dim);
        memset(dst + rows * row, 0, (size_t)(block - rows * row));
    }
}

typedef struct group_job { build *b; int64_t c0, c1; int side; lg_status st; lg_error err; pthread_t thread; bool running; } group_job;

static lg_status compress_group(build *b, int64_t c0, int64_t c1, int side, lg_error *err) {
    lg_status st = LG_OK;
    const int32_t **ids = lg_base_calloc(c1 - c0, sizeof *ids);
    int64_t *n = lg_base_calloc(c1 - c0, sizeof *n);
    if (!ids || !n) LG_TRY(nomem(err));
    for (int64_t c = c0; c < c1; c++) {
        ids[c - c0] = b->ids + c * b->h.chunk;
        n[c - c0] = b->entry[c].n_token;
    }
    LG_TRY(lg_memory_compress(b->c, ids, n, c1 - c0, b->k[side], b->v[side], b->stride, err));
done:
    lg_base_free(ids);
    lg_base_free(n);
    return st;
}

static void *write_group(void *arg) {
    group_job *j = arg;
    build *b = j->b;
    lg_status st = LG_OK;
    for (int64_t c = j->c0; c < j->c1; c++) {
        lg_bank_entry *e = &b->entry[c];
        pack_chunk(b, b->k[j->side] + (c - j->c0) * b->stride, b->v[j->side] + (c - j->c0) * b->stride, e->slots);
        e->hash = lg_base_hash_64(b->rows, e->bytes);
        LG_TRY(put(b, e->at, b->rows, e->bytes, &j->err));
    }
    LG_TRY(put(b, b->h.table_at + j->c0 * (int64_t)sizeof *b->entry, b->entry + j->c0, (j->c1 - j->c0) * (int64_t)sizeof *b->entry, &j->err));
    LG_TRY(sync_data(b, &j->err));
done:
    j->st = st;
    return NULL;
}

/* Waits for the group under way, if any. */
static lg_status finish_group(group_job *j, lg_error *err) {
    if (!j->running) return LG_OK;
    pthread_join(j->thread, NULL);
    j->running = false;
    if (j->st != LG_OK && err) *err = j->err;
    return j->st;
}

/* Groups from chunk `first` (a group border) on. */
static lg_status do_groups(build *b, int64_t first, lg_error *err) {
    lg_status st = LG_OK;
    const lg_bank_header *h = &b->h;
    group_job job = { .b = b };
    int side = 0;
    for (int64_t c = first; c < h->n_chunk; c += h->group, side ^= b->overlap) {
        const int64_t end = c + h->group < h->n_chunk ? c + h->group : h->n_chunk, done = c * h->chunk;
        if (b->progress && !b->progress(b->user, "compress", done, h->n_tokens))
            LG_TRY(lg_base_fail(err, LG_ERR_CANCELLED, -1, "%s: stopped after %lld of %lld tokens", b->path, (long long)done, (long long)h->n_tokens));
        LG_TRY(compress_group(b, c, end, side, err));
        LG_TRY(finish_group(&job, err));
        job = (group_job){ .b = b, .c0 = c, .c1 = end, .side = side };
        job.running = b->overlap && !pthread_create(&job.thread, NULL, write_group, &job);
        if (!job.running) { /* or no thread was to be had */
            write_group(&job);
            if (job.st != LG_OK && err) *err = job.err;
            LG_TRY(job.st);
        }
    }
    LG_TRY(finish_group(&job, err));
    if (b->progress) b->progress(b->user, "compress", h->n_tokens, h->n_tokens);
done:
    finish_group(&job, NULL);
    return st;
}

static void build_free(build *b) {
    if (b->fd >= 0) close(b->fd);
    lg_memory_compressor_free(b->c);
    lg_base_free(b->entry);
    for (int i = 0; i < 2; i++) {
        slots_free(b->m, b->k[i]);
        slots_free(b->m, b->v[i]);
    }
    lg_base_free(b->rows);
}

/* ---- a new bank ---- */
static lg_status set_up(build *b, const lg_bank_params *p, int64_t n, int64_t n_bytes, lg_error *err) {
    const lg_model *m = b->m;
    const lg_memory_weights *w = &m->memory;
    lg_bank_header *h = &b->h;
    lg_status st;
    if (n < 1) return lg_base_fail(err, LG_ERR_LIMIT, -1, "the document has no tokens");
    *h = (lg_bank_header){ .number = 1, .state = LG_BANK_BUILDING, .slots_dtype = p->slots == LG_DTYPE_COUNT ? LG_DTYPE_BF16 : p->slots,
                           .slot_rope = w->slot_rope, .compute = m->compute, .n_vocab = m->cfg.n_vocab, .n_layer = m->cfg.n_layer,
                           .n_head_kv = m->cfg.n_head_kv, .head_dim = m->cfg.head_dim, .chunk = p->chunk ? p->chunk : 4096,
                           .window = p->window ? p->window : w->window ? w->window : 2048,
                           .ratio = p->ratio ? p->ratio : w->n_ratio ? w->ratio[0] : 4, .n_tokens = n, .n_bytes = n_bytes, .n_ids = 1 };
    if (h->chunk < 1 || h->chunk > 1 << 20 || h->window < 1 || h->ratio < 1 || h->chunk % h->window || h->window % h->ratio)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "chunk %lld, window %lld, ratio %lld: the ratio must divide the window and the window the chunk (at most %d)",
                            (long long)h->chunk, (long long)h->window, (long long)h->ratio, 1 << 20);
    if (p->group < 0 || p->group > 1 << 16) return lg_base_fail(err, LG_ERR_USAGE, -1, "groups of %lld chunks (1 to 65536)", (long long)p->group);
    const int64_t fit = (m->ops && !m->ops->host_memory ? 16384 : 4096) / h->chunk; /* rows that keep the products busy */
    h->group = p->group ? p->group : fit < 1 ? 1 : fit > 64 ? 64 : fit;
    h->n_chunk = (n + h->chunk - 1) / h->chunk;
    h->ids_hash = lg_base_hash_64(b->ids, 4 * n);
    memcpy(h->family, m->info.family, sizeof m->info.family);
    memcpy(h->fingerprint, m->info.fingerprint, sizeof m->info.fingerprint);
    LG_TRY(lg_memory_weights_hash(m, h->memory, err));
    LG_TRY(lg_memory_bank_check(h, b->path, 0, err));
    b->entry = lg_base_calloc(h->n_chunk, sizeof *b->entry);
    if (!b->entry) LG_TRY(nomem(err));
done:
    return st;
}

/* Extents one behind the other from `at` on; returns the end. */
static int64_t lay_chunks(build *b, int64_t first, int64_t at) {
    const lg_bank_header *h = &b->h;
    for (int64_t c = first; c < h->n_chunk; c++) {
        lg_bank_entry *e = &b->entry[c];
        e->n_token = c + 1 < h->n_chunk ? h->chunk : h->n_tokens - c * h->chunk;
        e->slots = (e->n_token + h->ratio - 1) / h->ratio;
        e->bytes = lg_memory_bank_chunk_bytes(h, e->slots);
        e->at = at;
        at = lg_bank_align(at + e->bytes);
    }
    return at;
}

/* Does PATH.part belong to this very build? Then *first is the first chunk that is missing. */
static bool find_resume(build *b, int64_t *first) {
    lg_map map = { 0 };
    bool same = false;
    *first = 0;
    if (lg_file_map(&map, b->path, NULL) != LG_OK) return false;
    if (map.size == b->h.file_bytes) {
        lg_bank_header there, want = b->h;
        memcpy(&there, map.data, sizeof there);
        const bool whole = there.hash == lg_base_hash_64(&there, (int64_t)offsetof(lg_bank_header, hash));
        there.state = want.state; /* all groups may be there already */
        there.table_hash = want.table_hash;
        there.hash = want.hash;
        memcpy(there.magic, want.magic, sizeof there.magic);
        same = whole && !memcmp(&there, &want, sizeof want) && lg_base_hash_64(map.data + LG_BANK_DATA, 4 * b->h.n_tokens) == b->h.ids_hash;
    }
    const lg_bank_entry *old = same ? (const lg_bank_entry *)(const void *)(map.data + b->h.table_at) : NULL;
    for (int64_t c = 0; same && c < b->h.n_chunk; c++) {
        lg_bank_entry e = b->entry[c];
        e.hash = old[c].hash;
        if (!e.hash || memcmp(&e, &old[c], sizeof e) || lg_base_hash_64(map.data + e.at, e.bytes) != e.hash) break;
        b->entry[c].hash = e.hash;
        lg_file_forget(map.data + e.at, e.bytes);
        if ((c + 1) % b->h.group == 0 || c + 1 == b->h.n_chunk) *first = c + 1;
    }
    lg_file_unmap(&map);
    return same;
}

static lg_status sync_folder(const char *path, lg_error *err) {
    lg_status st = LG_OK;
    char *folder = lg_base_strdup(path);
    if (!folder) return nomem(err);
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder ? 1 : 0] = 0;
    const int fd = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        if (fsync(fd) && errno != EINVAL) st = io(err, path, "cannot sync the folder");
        close(fd);
    }
    lg_base_free(folder);
    return st;
}

static lg_status lock(build *b, lg_error *err) {
    if (!flock(b->fd, LOCK_EX | LOCK_NB)) return LG_OK;
    return lg_base_fail(err, LG_ERR_IO, -1, "%s: another process is writing it", b->path);
}

/* byte_end: [n_chunk] or NULL. */
static lg_status build_bank(lg_model *m, const lg_bank_params *p, const int32_t *ids, int64_t n, const int64_t *byte_end, int64_t n_bytes, const char *path,
                            lg_error *err) {
    lg_status st;
    lg_text part = { 0 };
    uint8_t *table = NULL;
    build b = { .m = m, .fd = -1, .ids = ids, .overlap = overlaps(m), .progress = p->progress, .user = p->progress_user };
    lg_bank_extent ids_ext = { .at = LG_BANK_DATA, .bytes = 4 * n };
    int64_t first;
    if (!lg_base_text_printf(&part, "%s.part", path)) return nomem(err);
    b.path = part.data;
    LG_TRY(set_up(&b, p, n, byte_end ? n_bytes : -1, err));
    LG_TRY(open_compressor(&b, err)); /* before any file: a model without memory weights leaves none */
    for (int64_t c = 0; c < b.h.n_chunk; c++) {
        b.entry[c].byte_begin = !byte_end ? -1 : c ? byte_end[c - 1] : 0;
        b.entry[c].byte_end = byte_end ? byte_end[c] : -1;
    }
    b.h.table_at = lay_chunks(&b, 0, lg_bank_align(LG_BANK_DATA + ids_ext.bytes));
    b.h.table_bytes = lg_memory_bank_table_bytes(&b.h);
    b.h.file_bytes = b.h.table_at + b.h.table_bytes;
    ids_ext.hash = b.h.ids_hash;
    b.fd = open(b.path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (b.fd < 0) LG_TRY(io(err, b.path, "cannot create"));
    LG_TRY(lock(&b, err));
    if (find_resume(&b, &first)) {
        if (first) lg_base_log(LG_LOG_INFO, "%s: going on after %lld of %lld chunks", b.path, (long long)first, (long long)b.h.n_chunk);
    } else {
        struct stat sb;
        if (!fstat(b.fd, &sb) && sb.st_size) lg_base_log(LG_LOG_INFO, "%s: of another build; starting anew", b.path);
        if (ftruncate(b.fd, 0) || ftruncate(b.fd, (off_t)b.h.file_bytes)) LG_TRY(io(err, b.path, "cannot set the size"));
        LG_TRY(put(&b, ids_ext.at, ids, ids_ext.bytes, err));
        LG_TRY(put_header(&b, err));
        LG_TRY(sync_data(&b, err));
    }
    LG_TRY(do_groups(&b, first, err));
    table = lg_base_alloc(b.h.table_bytes);
    if (!table) LG_TRY(nomem(err));
    memcpy(table, b.entry, (size_t)b.h.n_chunk * sizeof *b.entry);
    memcpy(table + b.h.n_chunk * (int64_t)sizeof *b.entry, &ids_ext, sizeof ids_ext);
    LG_TRY(put(&b, b.h.table_at, table, b.h.table_bytes, err));
    LG_TRY(sync_data(&b, err));
    b.h.table_hash = lg_base_hash_64(table, b.h.table_bytes);
    b.h.state = LG_BANK_COMPLETE;
    LG_TRY(put_header(&b, err));
    LG_TRY(sync_data(&b, err));
    if (rename(b.path, path)) LG_TRY(io(err, path, "cannot rename"));
    LG_TRY(sync_folder(path, err));
done:
    build_free(&b);
    lg_base_free(table);
    lg_text_free(&part);
    return st;
}

lg_status lg_bank_build_ids(lg_model *m, const lg_bank_params *p, const int32_t *ids, int64_t n, const char *path, lg_error *err) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= m->cfg.n_vocab)
            return lg_base_fail(err, LG_ERR_LIMIT, -1, "id %d at index %lld is outside the vocabulary of %lld", ids[i], (long long)i, (long long)m->cfg.n_vocab);
    return build_bank(m, p, ids, n, NULL, -1, path, err);
}

lg_status lg_bank_build(lg_model *m, const lg_bank_params *p, const char *text, int64_t n_text, const char *path, lg_error *err) {
    lg_status st;
    lg_spool ids = { 0 };
    int64_t *end = NULL;
    bool known = false;
    const int64_t chunk = p->chunk > 0 ? p->chunk : 4096;
    LG_TRY(lg_memory_spool(&ids, m, text, n_text, path, err));
    end = lg_base_calloc(ids.n / chunk + 1, sizeof *end);
    if (!end) LG_TRY(nomem(err));
    LG_TRY(lg_memory_byte_ends(m, ids.ids, ids.n, text, n_text, chunk, chunk, end, &known, err));
    LG_TRY(build_bank(m, p, ids.ids, ids.n, known ? end : NULL, n_text, path, err));
done:
    lg_memory_spool_free(&ids);
    lg_base_free(end);
    return st;
}

/* ---- append ---- */
static lg_status check_append(const lg_bank *old, const lg_model *m, lg_error *err) {
    char memory[40] = { 0 };
    lg_status st;
    LG_TRY(lg_bank_fits(old, m, err));
    LG_TRY(lg_memory_weights_hash(m, memory, err));
    if (memcmp(memory, old->h.memory, 33))
        LG_TRY(lg_base_fail(err, LG_ERR_MISMATCH, -1, "%s: built with other memory weights", old->name));
    if (old->h.slot_rope != m->memory.slot_rope)
        LG_TRY(lg_base_fail(err, LG_ERR_MISMATCH, -1, "%s: built for %s slots", old->name, old->h.slot_rope ? "rotated" : "un-rotated"));
done:
    return st;
}

/* What is appended. byte_end: offsets in its text of the end of the old last chunk (if that was partial), then of the new chunks; NULL: not known. */
typedef struct source { const int32_t *ids; int64_t n; const int64_t *byte_end; int64_t n_bytes; } source;

/* Byte ranges of the chunks from `first` on, in the texts joined. A chunk that holds ids of unknown origin has none. */
static void append_bytes(build *b, const lg_bank *old, int64_t first, const source *s) {
    const int64_t base = old->h.n_tokens / old->h.chunk, origin = old->h.n_bytes; /* base: the first chunk that changes */
    for (int64_t c = first; c < b->h.n_chunk; c++) {
        lg_bank_entry *e = &b->entry[c];
        const bool was = c < old->h.n_chunk;
        e->byte_begin = was ? old->chunk[c].byte_begin : s->byte_end ? origin + (c > base ? s->byte_end[c - 1 - base] : 0) : -1;
        e->byte_end = c < base ? old->chunk[c].byte_end : s->byte_end && e->byte_begin >= 0 ? origin + s->byte_end[c - base] : -1;
        if (e->byte_end < 0) e->byte_begin = -1;
    }
}

static lg_status append_joined(build *b, lg_bank *old, const source *s, lg_error *err) {
    lg_status st = LG_OK;
    const lg_bank_header *o = &old->h;
    lg_bank_header *h = &b->h;
    int32_t *ids = NULL;
    uint8_t *table = NULL;
    lg_bank_extent *ext = NULL;
    *h = *o;
    h->number++;
    h->n_tokens = o->n_tokens + s->n;
    h->n_chunk = (h->n_tokens + h->chunk - 1) / h->chunk;
    if (h->n_bytes >= 0 && s->byte_end) h->n_bytes += s->n_bytes;
    const bool full = o->n_tokens % o->chunk == 0 && o->n_chunk % o->group == 0, join = o->n_ids == LG_BANK_MAX_IDS_EXTENTS;
    const int64_t first = full ? o->n_chunk : (o->n_chunk - 1) / o->group * o->group, redone = o->n_chunk - first;
    h->n_ids = join ? 1 : o->n_ids + 1;
    h->n_dead = o->n_dead + 1 + redone + (join ? o->n_ids : 0);
    LG_TRY(lg_memory_bank_check(h, b->path, 0, err));
    ids = lg_base_calloc(h->n_tokens, sizeof *ids);
    b->entry = lg_base_calloc(h->n_chunk, sizeof *b->entry);
    h->table_bytes = lg_memory_bank_table_bytes(h);
    table = lg_base_alloc(h->table_bytes);
    if (!ids || !b->entry || !table) LG_TRY(nomem(err));
    memcpy(ids, old->ids, (size_t)o->n_tokens * sizeof *ids);
    memcpy(ids + o->n_tokens, s->ids, (size_t)s->n * sizeof *ids);
    b->ids = ids;
    h->ids_hash = lg_base_hash_64(ids, 4 * h->n_tokens);
    memcpy(b->entry, old->chunk, (size_t)first * sizeof *b->entry);
    append_bytes(b, old, first, s);

    const int32_t *new_ids = join ? ids : ids + o->n_tokens;
    const int64_t ids_at = lg_bank_align(o->file_bytes), ids_bytes = 4 * (join ? h->n_tokens : s->n);
    h->table_at = lay_chunks(b, first, lg_bank_align(ids_at + ids_bytes));
    h->file_bytes = h->table_at + h->table_bytes;
    ext = (lg_bank_extent *)(void *)(table + h->n_chunk * (int64_t)sizeof(lg_bank_entry));
    if (!join) memcpy(ext, old->ids_ext, (size_t)o->n_ids * sizeof *ext);
    ext[h->n_ids - 1] = (lg_bank_extent){ .at = ids_at, .bytes = ids_bytes, .hash = lg_base_hash_64(new_ids, ids_bytes) };
    lg_bank_extent *dead = ext + h->n_ids;
    memcpy(dead, old->dead, (size_t)o->n_dead * sizeof *dead);
    dead += o->n_dead;
    *dead++ = (lg_bank_extent){ .at = o->table_at, .bytes = o->table_bytes, .hash = o->table_hash };
    for (int64_t c = first; c < o->n_chunk; c++)
        *dead++ = (lg_bank_extent){ .at = old->chunk[c].at, .bytes = old->chunk[c].bytes, .hash = old->chunk[c].hash };
    for (int64_t i = 0; join && i < o->n_ids; i++) *dead++ = old->ids_ext[i];

    LG_TRY(open_compressor(b, err));
    if (ftruncate(b->fd, (off_t)o->file_bytes)) LG_TRY(io(err, b->path, "cannot set the size")); /* what an interrupted append left */
    LG_TRY(put(b, ids_at, new_ids, ids_bytes, err));
    LG_TRY(do_groups(b, first, err));
    memcpy(table, b->entry, (size_t)h->n_chunk * sizeof *b->entry);
    LG_TRY(put(b, h->table_at, table, h->table_bytes, err));
    LG_TRY(sync_data(b, err));
    h->table_hash = lg_base_hash_64(table, h->table_bytes);
    LG_TRY(put_header(b, err));
    LG_TRY(sync_data(b, err));
done:
    lg_base_free(ids);
    lg_base_free(table);
    return st;
}

static lg_status append(lg_model *m, const char *path, const char *text, int64_t n_text, const int32_t *ids, int64_t n, lg_progress_fn progress, void *user,
                        lg_error *err) {
    lg_status st;
    lg_bank *old = NULL;
    int64_t *end = NULL;
    build b = { .m = m, .path = path, .overlap = overlaps(m), .progress = progress, .user = user };
    source s = { .ids = ids, .n = n, .n_bytes = n_text };
    b.fd = open(path, O_RDWR | O_CLOEXEC);
    if (b.fd < 0) LG_TRY(io(err, path, "cannot open"));
    LG_TRY(lock(&b, err));
    LG_TRY(lg_bank_open(&old, path, err));
    LG_TRY(check_append(old, m, err));
    if (n == 0) goto done;
    if (text && old->h.n_bytes >= 0) {
        const int64_t chunk = old->h.chunk, first = chunk - old->h.n_tokens % chunk;
        bool known = false;
        end = lg_base_calloc(n / chunk + 2, sizeof *end);
        if (!end) LG_TRY(nomem(err));
        LG_TRY(lg_memory_byte_ends(m, ids, n, text, n_text, first, chunk, end, &known, err));
        if (known) s.byte_end = end;
    }
    LG_TRY(append_joined(&b, old, &s, err));
done:
    build_free(&b);
    lg_bank_close(old);
    lg_base_free(end);
    return st;
}

lg_status lg_bank_append_ids(lg_model *m, const char *path, const int32_t *ids, int64_t n, lg_progress_fn progress, void *user, lg_error *err) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= m->cfg.n_vocab)
            return lg_base_fail(err, LG_ERR_LIMIT, -1, "id %d at index %lld is outside the vocabulary of %lld", ids[i], (long long)i, (long long)m->cfg.n_vocab);
    return append(m, path, NULL, 0, ids, n, progress, user, err);
}

lg_status lg_bank_append(lg_model *m, const char *path, const char *text, int64_t n_text, lg_progress_fn progress, void *user, lg_error *err) {
    lg_spool ids = { 0 };
    lg_status st;
    LG_TRY(lg_memory_spool(&ids, m, text, n_text, path, err));
    LG_TRY(append(m, path, text, n_text, ids.ids, ids.n, progress, user, err));
done:
    lg_memory_spool_free(&ids);
    return st;
}
