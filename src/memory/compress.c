/* The compressor: chunks of raw tokens into memory slots (specs: docs/MEMORY.md "Slots").
 *
 * A chunk is cut into windows of W raw tokens; after every `ratio` raw tokens, and after a shorter last group, stands one
 * memory token. Rows of window w see the slots of earlier windows of the same chunk (cache rows and RoPE positions
 * 0 .. w*W/ratio - 1, K rotated there) and then the interleaved rows before them: position == cache row. Chunks start empty and
 * do not see each other, so many run in one pass; a pass holds pieces of windows, cut at group borders and at max_row rows, since
 * a later piece finds the earlier one in the cache. In a pass rows stand [all raw][all memory], in both parts chunk by chunk.
 * Between two windows the slots just made are written over the rows they came from. */
#include "memory/memory.h"
#include <stdio.h>
#include <string.h>

typedef struct piece { int64_t chunk, group, n_raw, n_mem; } piece; /* groups [group, group + n_mem) of the window, n_raw raw tokens */

struct lg_compressor {
    lg_model *m;
    int64_t chunk, window, ratio, batch;
    int64_t per_window, per_chunk;       /* slots */
    int64_t max_row, max_mem;            /* rows of one pass, memory rows of these */
    int64_t at_once;                     /* chunks in the cache together */
    int64_t pages;                       /* of one chunk */
    lg_kv_geom geom;
    lg_kv_layer *kv;                     /* [n_layer] */
    lg_work work;
    float *k_raw, *v_raw;                /* device: [n_layer, max_mem, nkv], the slots of a pass */
    int64_t n_mem, *first_mem;           /* memory rows of the last pass; where those of each chunk begin, [at_once] */
    float *cs, *sn;                      /* rotation of a window's slots */
    int32_t *ids, *seq, *page, *slot, *table; /* table: [at_once, pages] */
    int64_t *pos;
    lg_kv_seq *seqs;                     /* [at_once] */
    piece *pieces;                       /* [at_once] */
};

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory for the compressor"); }

static lg_status check(const lg_model *m, int64_t chunk, int64_t window, int64_t ratio, int64_t batch, lg_error *err) {
    if (!m->ops) return lg_base_fail(err, LG_ERR_USAGE, -1, "the model was opened for its vocabulary only");
    if (!m->memory.layer)
        return lg_base_fail(err, LG_ERR_MISMATCH, -1, "%s", m->memory.refusal ? m->memory.refusal : "the model has no memory weights");
    if (ratio < 1 || window < 1 || window % ratio)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "ratio %lld does not divide the window of %lld tokens", (long long)ratio, (long long)window);
    if (chunk < 1 || chunk % window)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "window %lld does not divide the chunk of %lld tokens", (long long)window, (long long)chunk);
    if (chunk > 1 << 24 || batch < 1 || batch > 1 << 16)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "%lld chunks of %lld tokens at once", (long long)batch, (long long)chunk);
    const int64_t last = (chunk - window) / ratio + window + window / ratio;
    if (last > m->cfg.n_ctx_train && !m->info.rope_scaled)
        return lg_base_fail(err, LG_ERR_LIMIT, -1, "a chunk of %lld tokens in windows of %lld needs %lld positions, the model was trained for %lld",
                            (long long)chunk, (long long)window, (long long)last, (long long)m->cfg.n_ctx_train);
    return LG_OK;
}

static lg_status init(lg_compressor *c, lg_error *err) {
    lg_status st = LG_OK;
    lg_model *m = c->m;
    const lg_config *g = &m->cfg;
    const lg_ops *o = m->ops;
    const int64_t nkv = g->n_head_kv * g->head_dim, f = sizeof(float), full = c->window + c->per_window;
    /* On the host a pass of more rows than a prefill chunk gains nothing and leaves the caches of the processor. */
    c->max_row = max64(c->ratio + 1, o->host_memory ? min64(o->chunk * 5 / 4, c->batch * full) : c->batch * full);
    c->at_once = min64(c->batch, max64(1, c->max_row / full));
    c->max_mem = up(c->max_row, c->ratio + 1) + c->at_once;
    c->pages = up(c->per_chunk - c->per_window + full, LG_PAGE);
    const lg_dtype kv = m->compute == LG_COMPUTE_F32 ? LG_DTYPE_F32 : o->host_memory ? LG_DTYPE_F16 : LG_DTYPE_BF16;
    c->geom = (lg_kv_geom){ .dtype = kv, .n_head_kv = (int32_t)g->n_head_kv, .head_dim = (int32_t)g->head_dim,
                            .row_bytes = lg_base_row_bytes(kv, g->head_dim) };
    const int64_t bytes = c->at_once * c->pages * LG_PAGE * g->n_head_kv * c->geom.row_bytes, slots = c->at_once * c->per_window;
    c->kv = lg_base_calloc(g->n_layer, sizeof *c->kv);
    if (!c->kv) return nomem(err);
    for (int64_t l = 0; l < g->n_layer; l++) {
        c->kv[l].k = o->alloc(m->ctx, bytes, true, err);
        c->kv[l].v = o->alloc(m->ctx, bytes, true, err);
        if (!c->kv[l].k || !c->kv[l].v) return nomem(err);
    }
    LG_TRY(lg_model_work_init(&c->work, m, c->max_row, err));
    LG_TRY(o->reserve(m->ctx, c->max_row, c->at_once, c->pages * LG_PAGE, (int32_t)g->n_head, &c->geom, m->max_in, m->max_out, err));
    c->k_raw = o->alloc(m->ctx, g->n_layer * c->max_mem * nkv * f, false, err);
    c->v_raw = o->alloc(m->ctx, g->n_layer * c->max_mem * nkv * f, false, err);
    const int64_t rows = max64(c->max_row, slots);
    c->cs = lg_base_calloc(c->per_window, g->head_dim / 2 * f);
    c->sn = lg_base_calloc(c->per_window, g->head_dim / 2 * f);
    c->ids = lg_base_calloc(rows, sizeof *c->ids);
    c->seq = lg_base_calloc(rows, sizeof *c->seq);
    c->page = lg_base_calloc(rows, sizeof *c->page);
    c->slot = lg_base_calloc(rows, sizeof *c->slot);
    c->pos = lg_base_calloc(rows, sizeof *c->pos);
    c->table = lg_base_calloc(c->at_once * c->pages, sizeof *c->table);
    c->seqs = lg_base_calloc(c->at_once, sizeof *c->seqs);
    c->pieces = lg_base_calloc(c->at_once, sizeof *c->pieces);
    c->first_mem = lg_base_calloc(c->at_once, sizeof *c->first_mem);
    if (!c->k_raw || !c->v_raw || !c->cs || !c->sn || !c->ids || !c->seq || !c->page || !c->slot || !c->pos || !c->table || !c->seqs || !c->pieces ||
        !c->first_mem)
        return nomem(err);
    for (int64_t i = 0; i < c->at_once * c->pages; i++) c->table[i] = (int32_t)i;
done:
    return st;
}

lg_status lg_memory_compressor_new(lg_compressor **out, lg_model *m, int64_t chunk, int64_t window, int64_t ratio, int64_t batch, lg_error *err) {
    *out = NULL;
    lg_status st = check(m, chunk, window, ratio, batch, err);
    if (st != LG_OK) return st;
    lg_compressor *c = lg_base_alloc(sizeof *c);
    if (!c) return nomem(err);
    *c = (lg_compressor){ .m = m, .chunk = chunk, .window = window, .ratio = ratio, .batch = batch, .per_window = window / ratio,
                          .per_chunk = chunk / ratio };
    st = init(c, err);
    if (st != LG_OK) lg_memory_compressor_free(c);
    else *out = c;
    return st;
}

void lg_memory_compressor_free(lg_compressor *c) {
    if (!c) return;
    const lg_ops *o = c->m->ops;
    for (int64_t l = 0; c->kv && l < c->m->cfg.n_layer; l++) {
        if (c->kv[l].k) o->free(c->m->ctx, c->kv[l].k);
        if (c->kv[l].v) o->free(c->m->ctx, c->kv[l].v);
    }
    lg_model_work_free(&c->work, c->m);
    if (c->k_raw) o->free(c->m->ctx, c->k_raw);
    if (c->v_raw) o->free(c->m->ctx, c->v_raw);
    void *host[] = { c->kv, c->cs, c->sn, c->ids, c->seq, c->page, c->slot, c->pos, c->table, c->seqs, c->pieces, c->first_mem };
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) lg_base_free(host[i]);
    lg_base_free(c);
}

double lg_memory_compress_flops(const lg_compressor *c) {
    const lg_config *g = &c->m->cfg;
    const double d = (double)g->n_embd, nq = (double)(g->n_head * g->head_dim), nkv = (double)(g->n_head_kv * g->head_dim);
    const double qkv = d * (nq + 2 * nkv), rest = d * nq + 3 * d * (double)g->n_ff, rows = (double)(c->chunk + c->per_chunk);
    return (double)(g->n_layer - 1) * rows * (qkv + rest) + (double)c->per_chunk * qkv;
}

/* One row of a pass: chunk i of those at once, cache row `at`. */
static void place(lg_compressor *c, int64_t t, int64_t i, int32_t id, int64_t at) {
    c->ids[t] = id;
    c->seq[t] = (int32_t)i;
    c->pos[t] = at;
    c->page[t] = c->table[i * c->pages + at / LG_PAGE];
    c->slot[t] = (int32_t)(at % LG_PAGE);
}

typedef struct job { /* the chunks at once */
    const int32_t *const *ids;
    const int64_t *n;
    int64_t n_chunk, stride;
    float *k, *v;
} job;

/* Slots of one pass into the caller's arrays: the rows of a piece lie together in every layer. */
static void hand_over(lg_compressor *c, const job *j, int64_t w, int64_t n_piece) {
    lg_model *m = c->m;
    const int64_t n_layer = m->cfg.n_layer, row = m->cfg.n_head_kv * m->cfg.head_dim, f = sizeof(float);
    for (int64_t p = 0, at = 0; p < n_piece; at += c->pieces[p++].n_mem) {
        const piece *q = &c->pieces[p];
        const int64_t to = q->chunk * j->stride + (w * c->per_window + q->group) * row, bytes = q->n_mem * row * f;
        for (int v = 0; v < 2; v++) {
            float *dst = (v ? j->v : j->k) + to;
            const float *src = (v ? c->v_raw : c->k_raw) + at * row;
            if (!m->ops->host_memory) m->ops->download_rows(m->ctx, dst, c->per_chunk * row * f, src, c->n_mem * row * f, bytes, n_layer);
            else
                for (int64_t l = 0; l < n_layer; l++) memcpy(dst + l * c->per_chunk * row, src + l * c->n_mem * row, (size_t)bytes);
        }
    }
}

/* Runs the first n_piece pieces of window w as one pass. */
static lg_status pass(lg_compressor *c, const job *j, int64_t w, int64_t n_piece, lg_error *err) {
    const int64_t base = w * c->per_window, group = c->ratio + 1;
    int64_t t = 0, n_mem = 0;
    for (int64_t p = 0; p < n_piece; p++) {
        const piece *q = &c->pieces[p];
        const int32_t *ids = j->ids[q->chunk] + w * c->window + q->group * c->ratio;
        for (int64_t i = 0; i < q->n_raw; i++) place(c, t++, q->chunk, ids[i], base + q->group * group + i / c->ratio * group + i % c->ratio);
    }
    for (int64_t p = 0; p < n_piece; p++) {
        const piece *q = &c->pieces[p];
        int64_t end = 0;
        c->first_mem[q->chunk] = n_mem;
        for (int64_t i = 0; i < q->n_mem; i++) {
            end = base + q->group * group + (i + 1 < q->n_mem ? i * group + c->ratio : q->n_raw + i);
            place(c, t++, q->chunk, 0, end);
        }
        c->seqs[q->chunk] = (lg_kv_seq){ .page = c->table + q->chunk * c->pages, .len = end + 1 };
        n_mem += q->n_mem;
    }
    const lg_forward f = { .n_tok = t, .ids = c->ids, .seq = c->seq, .dst_page = c->page, .dst_slot = c->slot, .pos = c->pos, .idx = c->pos,
                           .seqs = c->seqs, .n_seq = (int32_t)j->n_chunk, .kv = c->kv, .geom = c->geom, .n_mem = n_mem, .k_raw = c->k_raw,
                           .v_raw = c->v_raw };
    const lg_status st = lg_model_forward(c->m, &c->work, &f, err);
    c->n_mem = n_mem;
    if (st == LG_OK) hand_over(c, j, w, n_piece);
    return st;
}

/* Slots of window w - 1 into the cache rows that window w sees them in; only chunks that have a window w. On a device a window is
 * one pass, whose rows are still there; on the host they are read where they were handed over to. */
static lg_status write_back(lg_compressor *c, const job *j, int64_t w, lg_error *err) {
    lg_model *m = c->m;
    const lg_config *g = &m->cfg;
    const int64_t half = g->head_dim / 2, row = g->n_head_kv * g->head_dim, per = c->per_window;
    const lg_kv_geom src = { .dtype = LG_DTYPE_F32, .n_head_kv = c->geom.n_head_kv, .head_dim = c->geom.head_dim,
                             .row_bytes = g->head_dim * (int64_t)sizeof(float) };
    for (int64_t s = 0; s < per; s++) lg_model_rotation(m, &c->work, (w - 1) * per + s, c->cs + s * half, c->sn + s * half);
    for (int64_t i = 0; i < j->n_chunk; i++)
        for (int64_t s = 0; s < per; s++) place(c, i * per + s, i, 0, (w - 1) * per + s);
    for (int64_t l = 0; l < g->n_layer; l++) {
        for (int64_t i = 0; i < j->n_chunk; i++) {
            if (j->n[i] <= w * c->window) continue;
            const int64_t kept = i * j->stride + (l * c->per_chunk + (w - 1) * per) * row, made = (l * c->n_mem + c->first_mem[i]) * row;
            const float *k = m->ops->host_memory ? j->k + kept : c->k_raw + made, *v = m->ops->host_memory ? j->v + kept : c->v_raw + made;
            m->ops->kv_write(m->ctx, &(lg_op_kv_write){ .kv = c->kv[l], .geom = c->geom, .k = (const uint8_t *)k, .v = (const uint8_t *)v, .src = src,
                .rope_cos = c->cs, .rope_sin = c->sn, .rope_interleaved = g->rope_interleaved, .dst_page = c->page + i * per,
                .dst_slot = c->slot + i * per, .n_tok = per });
        }
        const lg_status st = m->ops->sync(m->ctx, err);
        if (st != LG_OK) return st;
    }
    return LG_OK;
}

static lg_status run(lg_compressor *c, const job *j, lg_error *err) {
    lg_status st = LG_OK;
    for (int64_t w = 0; w < c->chunk / c->window; w++) {
        if (w) LG_TRY(write_back(c, j, w, err));
        int64_t n_piece = 0, rows = 0;
        for (int64_t i = 0; i < j->n_chunk; i++) {
            const int64_t raw = min64(c->window, j->n[i] - w * c->window), groups = raw > 0 ? up(raw, c->ratio) : 0;
            for (int64_t g = 0; g < groups;) {
                const int64_t room = (c->max_row - rows) / (c->ratio + 1), take = min64(room, groups - g);
                if (take > 0) {
                    const int64_t n_raw = min64(take * c->ratio, raw - g * c->ratio);
                    c->pieces[n_piece++] = (piece){ .chunk = i, .group = g, .n_raw = n_raw, .n_mem = take };
                    rows += n_raw + take;
                    g += take;
                }
                if (g < groups) { /* full */
                    LG_TRY(pass(c, j, w, n_piece, err));
                    n_piece = rows = 0;
                }
            }
        }
        if (n_piece) LG_TRY(pass(c, j, w, n_piece, err));
    }
done:
    return st;
}

lg_status lg_memory_compress(lg_compressor *c, const int32_t *const *ids, const int64_t *n, int64_t n_chunk, float *k, float *v, int64_t stride,
                             lg_error *err) {
    const int64_t least = c->m->cfg.n_layer * c->per_chunk * c->m->cfg.n_head_kv * c->m->cfg.head_dim;
    if (n_chunk < 1 || n_chunk > c->batch || stride < least)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "%lld chunks at once (1 to %lld)", (long long)n_chunk, (long long)c->batch);
    for (int64_t i = 0; i < n_chunk; i++) {
        if (n[i] < 1 || n[i] > c->chunk)
            return lg_base_fail(err, LG_ERR_USAGE, -1, "a chunk of %lld tokens (1 to %lld)", (long long)n[i], (long long)c->chunk);
        for (int64_t t = 0; t < n[i]; t++)
            if (ids[i][t] < 0 || ids[i][t] >= c->m->cfg.n_vocab)
                return lg_base_fail(err, LG_ERR_LIMIT, -1, "id %d at index %lld is outside the vocabulary of %lld", ids[i][t], (long long)t,
                                    (long long)c->m->cfg.n_vocab);
    }
    lg_status st = LG_OK;
    for (int64_t i = 0; i < n_chunk && st == LG_OK; i += c->at_once) {
        const job j = { .ids = ids + i, .n = n + i, .n_chunk = min64(c->at_once, n_chunk - i), .stride = stride, .k = k + i * stride,
                        .v = v + i * stride };
        st = run(c, &j, err);
    }
    return st;
}
