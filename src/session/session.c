/* One timeline per sequence: prefill, decode steps, rewind, fork. Nothing here allocates between two syncs. */
#include "session/session.h"
#include <stdlib.h>
#include <string.h>

enum { EVAL_ROWS = 64 };

void lg_hybrid_defaults(lg_hybrid_params *p) {
    *p = (lg_hybrid_params){ .budget = -1, .sinks = -1, .recents = -1, .rule = LG_RULE_TOPK, .block = 1, .correct = LG_CORRECT_STEP, .keep = -1 };
}
void lg_session_defaults(lg_session_params *p) {
    *p = (lg_session_params){ .kv = LG_DTYPE_COUNT, .n_seq_max = 1 };
    lg_hybrid_defaults(&p->hybrid);
}

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

static lg_status session_init(lg_session *s, lg_error *err) {
    lg_status st;
    lg_model *m = s->m;
    const lg_config *c = &m->cfg;
    lg_session_params *p = &s->p;
    if (!m->ops) return lg_base_fail(err, LG_ERR_USAGE, -1, "the model was opened for its vocabulary only");
    if (p->n_ctx == 0) p->n_ctx = c->n_ctx_train;
    if (p->n_ctx < 1 || (p->n_ctx > c->n_ctx_train && !m->info.rope_scaled && !p->allow_beyond))
        return lg_base_fail(err, LG_ERR_LIMIT, -1, "a context of %lld tokens: the model was trained for %lld and has no rope scaling",
                            (long long)p->n_ctx, (long long)c->n_ctx_train);
    if (p->n_ctx >= INT32_MAX) return lg_base_fail(err, LG_ERR_LIMIT, -1, "a context of %lld tokens is too long", (long long)p->n_ctx);
    if (p->kv == LG_DTYPE_COUNT) p->kv = m->compute == LG_COMPUTE_F32 ? LG_DTYPE_F32 : m->ops->host_memory ? LG_DTYPE_F16 : LG_DTYPE_BF16;
    if (p->kv != LG_DTYPE_F32 && p->kv != LG_DTYPE_F16 && p->kv != LG_DTYPE_BF16 && p->kv != LG_DTYPE_KV8)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "a cache cannot have that dtype (f32, f16, bf16, q8)");
    if (p->n_seq_max == 0) p->n_seq_max = 1;
    if (p->n_seq_max < 1 || p->n_seq_max > 4096)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "%lld sequences (1 to 4096)", (long long)p->n_seq_max);
    if (p->chunk == 0) p->chunk = m->ops->chunk;
    if (p->chunk < 1 || p->chunk > 1 << 16) return lg_base_fail(err, LG_ERR_USAGE, -1, "chunk of %lld tokens (1 to 65536)", (long long)p->chunk);
    if (p->chunk > p->n_ctx) p->chunk = p->n_ctx;

    if (s->max_row < p->n_seq_max) s->max_row = p->n_seq_max;
    if (s->max_row > 4096) return lg_base_fail(err, LG_ERR_USAGE, -1, "%lld rows (1 to 4096)", (long long)s->max_row);
    LG_TRY(lg_session_cache_init(s, err));
    LG_TRY(lg_session_plan_init(s, err));
    p->roles = NULL; /* the caller's; copied */
    s->max_tok = p->chunk > s->max_row ? p->chunk : s->max_row;
    const bool ahead = m->ops->submit && s->max_row <= LG_DRAWN_ROWS;
    const int64_t most = ahead ? 2 * s->max_row : s->max_row, rows = most > EVAL_ROWS ? most : EVAL_ROWS;
    LG_TRY(lg_model_work_init(&s->work, m, s->max_tok, err));
    LG_TRY(m->ops->reserve(m->ctx, s->max_tok, s->max_row, (p->n_ctx + LG_PAGE - 1) / LG_PAGE * LG_PAGE, (int32_t)c->n_head, &s->geom,
                           m->max_in, m->max_out, err));
    s->logits = m->ops->alloc(m->ctx, rows * c->n_vocab * (int64_t)sizeof(float), false, err);
    if (!s->logits) return LG_ERR_NOMEM;
    s->logits_host = m->ops->host_memory ? s->logits : lg_base_calloc(rows, c->n_vocab * (int64_t)sizeof(float));
    s->logits_here = lg_base_calloc(rows, 1);
    for (int i = 0; i < 2; i++) {
        lg_pass *a = &s->pass[i];
        a->seq = lg_base_calloc(s->max_row, sizeof *a->seq);
        a->budget = lg_base_calloc(s->max_row, sizeof *a->budget);
        a->dense = lg_base_calloc(s->max_row, sizeof *a->dense);
        a->draw = lg_base_calloc(s->max_row, sizeof *a->draw);
        a->next = lg_base_calloc(s->max_row, sizeof *a->next);
        if (!a->seq || !a->budget || !a->dense || !a->draw || !a->next) return nomem(err);
        a->logits = i == 0 ? s->logits : ahead ? s->logits + s->max_row * c->n_vocab : NULL;
    }
    s->recent = lg_base_calloc(s->max_row, LG_RECENT * (int64_t)sizeof(int32_t));
    s->ids = lg_base_calloc(s->max_tok, sizeof(int32_t));
    s->row_seq = lg_base_calloc(s->max_tok, sizeof(int32_t));
    s->dst_page = lg_base_calloc(s->max_tok, sizeof(int32_t));
    s->dst_slot = lg_base_calloc(s->max_tok, sizeof(int32_t));
    s->row = lg_base_calloc(s->max_tok, sizeof(int32_t));
    s->pos = lg_base_calloc(s->max_tok, sizeof(int64_t));
    s->idx = lg_base_calloc(s->max_tok, sizeof(int64_t));
    s->seqs = lg_base_calloc(s->max_row, sizeof *s->seqs);
    s->batch = lg_base_calloc(s->max_row, sizeof(int32_t));
    s->row_bytes_read = lg_base_calloc(p->n_seq_max, sizeof(int64_t));
    s->row_bytes_dense = lg_base_calloc(p->n_seq_max, sizeof(int64_t));
    s->head_tokens = lg_base_calloc(c->n_layer * c->n_head_kv, sizeof(int64_t));
    if (!s->logits_host || !s->logits_here || !s->recent || !s->ids || !s->row_seq || !s->dst_page || !s->dst_slot || !s->row || !s->pos || !s->idx || !s->seqs || !s->batch ||
        !s->row_bytes_read || !s->row_bytes_dense || !s->head_tokens)
        return nomem(err);
done:
    return st;
}

lg_status lg_session_new(lg_session **out, lg_model *m, const lg_session_params *p, lg_error *err) {
    return lg_session_new_rows(out, m, p, 0, err);
}

lg_status lg_session_new_rows(lg_session **out, lg_model *m, const lg_session_params *p, int64_t max_row, lg_error *err) {
    *out = NULL;
    lg_session *s = lg_base_alloc(sizeof *s);
    if (!s) return nomem(err);
    s->m = m;
    s->p = *p;
    s->max_row = max_row;
    const lg_status st = session_init(s, err);
    if (st != LG_OK) lg_session_free(s);
    else *out = s;
    return st;
}

void lg_session_free(lg_session *s) {
    if (!s) return;
    if (s->m->ops) {
        lg_session_settle(s);
        lg_session_plan_free(s); /* sequences have parts of it */
        lg_session_cache_free(s);
        if (s->stage) s->m->ops->free(s->m->ctx, s->stage);
        lg_model_work_free(&s->work, s->m);
        if (s->logits) s->m->ops->free(s->m->ctx, s->logits);
        if (!s->m->ops->host_memory) lg_base_free(s->logits_host);
    }
    for (int i = 0; i < 2; i++) {
        lg_pass *a = &s->pass[i];
        void *own[] = { a->seq, a->budget, a->dense, a->draw, a->next };
        for (size_t k = 0; k < sizeof own / sizeof *own; k++) lg_base_free(own[k]);
    }
    void *p[] = { s->logits_here, s->recent, s->ids, s->row_seq, s->dst_page, s->dst_slot, s->row, s->pos, s->idx, s->seqs, s->batch,
                  s->head_tokens, s->set_tokens, s->row_bytes_read, s->row_bytes_dense };
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) lg_base_free(p[i]);
    lg_base_free(s);
}

static lg_status check_seq(const lg_session *s, int64_t seq, lg_error *err) {
    if (seq >= 0 && seq < s->p.n_seq_max) return LG_OK;
    return lg_base_fail(err, LG_ERR_USAGE, -1, "sequence %lld (0 to %lld)", (long long)seq, (long long)s->p.n_seq_max - 1);
}
static lg_status check_ids(const lg_session *s, const int32_t *ids, int64_t n, lg_error *err) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->m->cfg.n_vocab)
            return lg_base_fail(err, LG_ERR_LIMIT, -1, "id %d at index %lld is outside the vocabulary of %lld", ids[i], (long long)i,
                                (long long)s->m->cfg.n_vocab);
    return LG_OK;
}
static void forget_logits(lg_session *s) {
    for (int64_t i = 0; i < s->p.n_seq_max; i++) {
        s->seq[i].logit_row = -1;
        s->logits_here[i] = s->m->ops->host_memory;
    }
    s->next_known = false;
    s->now = 0;
}

bool lg_session_is_ahead(const lg_session *s) { return s->pass[0].ticket || s->pass[1].ticket; }
void lg_session_settle(lg_session *s) {
    for (int i = 0; i < 2; i++) {
        lg_pass *p = &s->pass[i];
        if (p->ticket) s->m->ops->wait(s->m->ctx, p->ticket, NULL); /* (a device that fails says so again) */
        p->ticket = 0;
    }
}

/* Row `row` of pass p ends sequence q at length len with id `last`: how its next id is drawn, when n_drawn have been. False: no one draws there. */
static bool plan_draw(lg_session *s, lg_pass *p, int64_t row, const lg_timeline *q, int64_t len, int64_t n_drawn, int32_t last) {
    if (!q->sampler) return false;
    const int64_t n = len - q->n_slot < LG_RECENT ? len - q->n_slot : LG_RECENT;
    p->draw[row] = lg_session_draw(q->sampler, n, n_drawn);
    memcpy(s->recent + row * LG_RECENT, q->ids + len - n, (size_t)(n - 1) * sizeof(int32_t));
    s->recent[row * LG_RECENT + n - 1] = last;
    return true;
}
/* All rows of pass p have their draws: the back end makes them where it can, else the host does when the ids are asked for. */
static void ask_next(lg_session *s, lg_pass *p, lg_forward *f) {
    bool greedy = true;
    for (int64_t r = 0; r < f->n_row; r++) greedy = greedy && p->draw[r].scale == 0 && p->draw[r].penalty == 1;
    if (greedy ? s->m->ops->host_memory : !s->m->ops->sample) return;
    f->next = p->next;
    if (greedy) return;
    f->draw = p->draw;
    f->recent = s->recent;
}

/* Places row t of the coming pass at the end of sequence `seq` (its pages must be there). */
static void place(lg_session *s, int64_t t, int64_t seq, int32_t row_seq, int32_t id, int64_t at) {
    s->ids[t] = id;
    s->row_seq[t] = row_seq;
    s->pos[t] = at + s->seq[seq].shift;
    s->idx[t] = at;
    s->dst_page[t] = s->seq[seq].page[at / LG_PAGE];
    s->dst_slot[t] = (int32_t)(at % LG_PAGE);
}

static lg_forward forward_of(lg_session *s, int64_t n_tok, int32_t n_seq) {
    return (lg_forward){ .n_tok = n_tok, .ids = s->ids, .seq = s->row_seq, .dst_page = s->dst_page, .dst_slot = s->dst_slot, .pos = s->pos,
                         .idx = s->idx, .seqs = s->seqs, .n_seq = n_seq, .kv = s->kv, .geom = s->geom, .row = s->row, .lora = s->lora };
}

lg_status lg_session_chunk(lg_session *s, int64_t seq, const int32_t *ids, int64_t n, int64_t n_row, float *logits, bool last, lg_error *err) {
    lg_timeline *q = &s->seq[seq];
    const int64_t at = q->len;
    lg_session_settle(s);
    lg_session_pages(s, q, at, at + n);
    for (int64_t t = 0; t < n; t++) place(s, t, seq, 0, ids[t], at + t);
    for (int64_t i = 0; i < n_row; i++) s->row[i] = (int32_t)(n - n_row + i);
    s->seqs[0] = (lg_kv_seq){ .page = q->page, .len = at + n };
    lg_forward f = forward_of(s, n, 1);
    f.n_row = n_row;
    f.logits = logits;
    f.on_query = s->on_query;
    f.on_query_user = s->on_query_user;
    const bool observe = last && s->keep;
    if (observe) {
        lg_session_kept_begin(s, q, at + n);
        f.n_observe = n < s->observe ? n : s->observe;
        f.mass = s->mass;
        f.mass_ld = s->p.n_ctx;
        f.on_mass = lg_session_kept_mass;
        f.on_mass_user = s;
    }
    if (q->ids + at != ids) memcpy(q->ids + at, ids, (size_t)n * sizeof *ids);
    if (n_row == 1 && logits == s->logits && plan_draw(s, &s->pass[0], 0, q, at + n, q->n_drawn, q->ids[at + n - 1])) ask_next(s, &s->pass[0], &f);
    const lg_status st = lg_model_forward(s->m, &s->work, &f, err);
    if (st != LG_OK) return st;
    if (observe) lg_session_kept_end(s, q);
    s->next_known = f.next != NULL;
    q->len = at + n;
    return LG_OK;
}

/* Tokens of the next chunk of n that are left: the last one holds all that is observed, where a chunk can. */
static int64_t next_chunk(const lg_session *s, int64_t n) {
    const int64_t k = n < s->p.chunk ? n : s->p.chunk;
    return s->keep && k < n && n - k < s->observe && n - s->observe > 0 && s->observe <= s->p.chunk ? n - s->observe : k;
}

static lg_status prefill(lg_session *s, int64_t seq, const int32_t *ids, int64_t n, lg_error *err) {
    const double start = lg_base_now();
    const int64_t total = n;
    lg_status st = LG_OK;
    forget_logits(s);
    s->seq[seq].steps = 0;
    while (n > 0 && st == LG_OK) {
        const int64_t k = next_chunk(s, n);
        st = lg_session_chunk(s, seq, ids, k, n == k, s->logits, n == k, err);
        ids += k;
        n -= k;
        if (st == LG_OK) s->stats.prefill_tokens += k;
        if (st == LG_OK && s->p.progress && !s->p.progress(s->p.progress_user, "prefill", total - n, total) && n > 0)
            st = lg_base_fail(err, LG_ERR_CANCELLED, -1, "prefill cancelled after %lld of %lld tokens", (long long)(total - n), (long long)total);
    }
    if (st == LG_OK) s->seq[seq].logit_row = 0;
    s->stats.prefill_s += lg_base_now() - start;
    return st;
}

static lg_status check_fit(const lg_session *s, int64_t n, lg_error *err) {
    if (n <= s->p.n_ctx) return LG_OK;
    return lg_base_fail(err, LG_ERR_LIMIT, -1, "%lld tokens do not fit into the context of %lld", (long long)n, (long long)s->p.n_ctx);
}
/* Positions that stand before the prompt. */
static int64_t before(const lg_timeline *q) { return q->n_slot + q->shift; }

lg_status lg_session_sync(lg_session *s, int64_t seq, const int32_t *ids, int64_t n, lg_error *err) {
    lg_status st;
    LG_TRY(check_seq(s, seq, err));
    if (n < 1) return lg_base_fail(err, LG_ERR_USAGE, -1, "no ids: a sequence needs at least one");
    lg_timeline *q = &s->seq[seq];
    LG_TRY(check_fit(s, before(q) + n, err));
    LG_TRY(check_ids(s, ids, n, err));
    const int32_t *have = q->ids + q->n_slot;
    const int64_t n_have = q->len - q->n_slot;
    int64_t keep = 0;
    while (keep < n && keep < n_have && have[keep] == ids[keep]) keep++;
    if (keep == n && n_have == n && q->logit_row >= 0) return LG_OK;
    if (keep == n) keep = n - 1;
    if (s->keep && keep > n - s->observe) keep = n > s->observe ? n - s->observe : 0; /* what is observed is read again */
    lg_session_drop(s, q, q->n_slot + keep);
    q->len = q->n_slot + keep;
    lg_session_kept_cut(s, q);
    LG_TRY(prefill(s, seq, ids + keep, n - keep, err));
done:
    return st;
}

lg_status lg_session_prefill_many(lg_session *s, const int32_t *seqs, const lg_ids *prompts, int64_t n, lg_ended_fn ended, void *user, lg_error *err) {
    lg_status st = LG_OK;
    const double start = lg_base_now();
    if (n < 1 || n > s->max_row) return lg_base_fail(err, LG_ERR_USAGE, -1, "%lld prompts together (1 to %lld)", (long long)n, (long long)s->max_row);
    for (int64_t i = 0; i < n; i++) {
        LG_TRY(check_seq(s, seqs[i], err));
        for (int64_t j = 0; j < i; j++)
            if (seqs[j] == seqs[i]) return lg_base_fail(err, LG_ERR_USAGE, -1, "sequence %d is twice in one prefill", seqs[i]);
        lg_timeline *q = &s->seq[seqs[i]];
        if (prompts[i].n < 1) return lg_base_fail(err, LG_ERR_USAGE, -1, "no ids: a sequence needs at least one");
        LG_TRY(check_fit(s, before(q) + prompts[i].n, err));
        LG_TRY(check_ids(s, prompts[i].data, prompts[i].n, err));
        lg_session_drop(s, q, q->n_slot);
        q->len = q->n_slot;
        q->steps = 0;
        lg_session_kept_cut(s, q);
    }
    forget_logits(s);
    for (int64_t i = 0; s->keep && i < n; i++) { /* observed one by one */
        for (int64_t at = 0, k; at < prompts[i].n; at += k) {
            k = next_chunk(s, prompts[i].n - at);
            LG_TRY(lg_session_chunk(s, seqs[i], prompts[i].data + at, k, at + k == prompts[i].n, NULL, at + k == prompts[i].n, err));
            s->stats.prefill_tokens += k;
        }
        LG_TRY(ended(user, i, 1, err));
    }
    for (int64_t i = s->keep ? n : 0, at = 0; i < n;) { /* from token `at` of prompt i */
        const int64_t first = i;
        int64_t rows = 0, k = 0;
        int32_t part = 0; /* sequences in this pass */
        while (i < n && rows < s->max_tok) {
            lg_timeline *q = &s->seq[seqs[i]];
            const int64_t left = prompts[i].n - at, take = left < s->max_tok - rows ? left : s->max_tok - rows;
            lg_session_pages(s, q, q->len, q->len + take);
            for (int64_t t = 0; t < take; t++) place(s, rows + t, seqs[i], part, prompts[i].data[at + t], q->len + t);
            memcpy(q->ids + q->len, prompts[i].data + at, (size_t)take * sizeof *q->ids);
            q->len += take;
            s->seqs[part++] = (lg_kv_seq){ .page = q->page, .len = q->len };
            rows += take;
            at += take;
            if (take < left) break;
            s->row[k++] = (int32_t)(rows - 1);
            i++;
            at = 0;
        }
        lg_forward f = forward_of(s, rows, part);
        f.n_row = k;
        LG_TRY(lg_model_forward(s->m, &s->work, &f, err));
        s->stats.prefill_tokens += rows;
        if (k) LG_TRY(ended(user, first, k, err));
    }
    s->stats.prefill_s += lg_base_now() - start;
done:
    return st;
}

/* The last `want` tokens (this one included) run again as one dense chunk: cache correction, reading B, and observation. */
static lg_status rerun(lg_session *s, int64_t seq, int32_t id, int64_t want, float *logits, lg_error *err) {
    lg_timeline *q = &s->seq[seq];
    q->ids[q->len] = id;
    const int64_t to = q->len + 1, all = to - q->n_slot, n = want < all ? want : all, from = to - n;
    q->len = from;
    for (int64_t at = from; at < to;) {
        const int64_t k = to - at < s->max_tok ? to - at : s->max_tok;
        const lg_status st = lg_session_chunk(s, seq, q->ids + at, k, at + k == to, logits, at + k == to, err);
        if (st != LG_OK) return st;
        at += k;
    }
    return LG_OK;
}

/* The pass reads sets. With `all` the ids of every set come back; else only where a block may be a partial one. */
static void make_hybrid(lg_session *s, const lg_pass *p, lg_forward *f, bool all) {
    f->read = s->read;
    f->make = s->make;
    f->budget = p->budget;
    f->dense = p->dense;
    f->sets = s->sets;
    f->select = s->select;
    f->spread = s->spread;
    if (s->m->ops->host_memory) return;
    f->fetch_n = s->sets_n;
    f->fetch_idx = all || s->sets.block > 1 ? s->sets_idx : NULL;
}

/* The next step of a sequence corrects the cache. */
static bool corrects(const lg_session *s, const lg_timeline *q) {
    const int64_t every = s->p.hybrid.correct_every;
    return s->roles.n_layer && every > 0 && (q->steps + 1) % every == 0;
}
/* How many tokens it runs again as one dense chunk, for a correction or an observation; 0: none. */
static int64_t runs_again(const lg_session *s, const lg_timeline *q) {
    const lg_hybrid_params *h = &s->p.hybrid;
    const int64_t due = lg_session_kept_due(s, q, q->len + 1) ? s->again : 0;
    return h->correct == LG_CORRECT_RERUN && corrects(s, q) && h->correct_every > due ? h->correct_every : due;
}

/* Pass p, whose sequences are set: their next step, with ids [p->n], or (NULL) with those that the last pass draws. begun: it may return while the
 * pass is under way (p->ticket). */
static lg_status run_pass(lg_session *s, lg_pass *p, const int32_t *ids, bool begun, lg_error *err) {
    bool all_dense = true, draws = true;
    for (int64_t r = 0; r < p->n; r++) {
        lg_timeline *q = &s->seq[p->seq[r]];
        lg_session_pages(s, q, q->len, q->len + 1);
        const int32_t id = ids ? ids[r] : (int32_t)(-1 - q->logit_row);
        place(s, r, p->seq[r], (int32_t)r, id, q->len);
        s->seqs[r] = (lg_kv_seq){ .page = q->page, .len = q->len + 1, .kept = q->kept };
        s->row[r] = (int32_t)r;
        draws = plan_draw(s, p, r, q, q->len + 1, q->n_drawn + !ids, id) && draws;
        p->budget[r] = 0;
        p->dense[r] = !s->roles.n_layer || lg_session_plan_row(s, q->len + 1, &p->budget[r]) || corrects(s, q);
        all_dense = all_dense && p->dense[r];
    }
    lg_forward f = forward_of(s, p->n, (int32_t)p->n);
    f.n_row = p->n;
    f.logits = p->logits;
    if (!all_dense) make_hybrid(s, p, &f, s->on_set != NULL);
    if (draws) ask_next(s, p, &f);
    p->draws = f.next != NULL;
    f.ticket = begun && s->m->ops->submit ? &p->ticket : NULL;
    const lg_status st = lg_model_forward(s->m, &s->work, &f, err);
    p->n_draw = s->m->n_draw;
    if (st != LG_OK) p->ticket = 0;
    return st;
}

/* The pass under way, if it is the step of these sequences with these ids: s->batch says whose its rows are. (It may have further rows, of sequences that have ended.) */
static lg_pass *under_way(lg_session *s, const int32_t *seqs, const int32_t *ids, int64_t n) {
    const lg_pass *last = &s->pass[s->now];
    lg_pass *p = &s->pass[1 - s->now];
    if (!p->ticket || !s->next_known) return NULL;
    for (int64_t r = 0; r < p->n; r++) s->batch[r] = -1;
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = s->seq[seqs[i]].logit_row;
        int64_t r = 0;
        while (r < p->n && p->seq[r] != seqs[i]) r++;
        if (r == p->n || row < 0 || last->next[row] != ids[i]) return NULL;
        s->batch[r] = (int32_t)i;
    }
    return p;
}

/* Pass p is on its way, and its sequences are as if it were done: whether the step after it can be begun, of all that s->batch names. */
static bool can_go_on(const lg_session *s, const lg_pass *p) {
    if (!s->pass[1].logits || !p->draws || p->n_draw != s->m->n_draw || s->on_set) return false;
    for (int64_t r = 0; r < p->n; r++) {
        const lg_timeline *q = &s->seq[p->seq[r]];
        if (s->batch[r] < 0) continue;
        if (q->len + q->shift >= s->p.n_ctx || runs_again(s, q)) return false;
    }
    return true;
}

/* The rows of p that s->batch names have been fed (by -1: have not). */
static void feed(lg_session *s, const lg_pass *p, const int32_t *ids, int by) {
    for (int64_t r = 0; r < p->n; r++) {
        lg_timeline *q = &s->seq[p->seq[r]];
        if (s->batch[r] < 0) continue;
        q->ids[q->len] = ids[s->batch[r]];
        q->len += by;
        q->steps += by;
        q->logit_row = by > 0 ? r : -1;
    }
}

lg_status lg_session_step_on(lg_session *s, const int32_t *seqs, const int32_t *ids, int64_t n, bool more, lg_error *err) {
    lg_status st;
    const int64_t n_vocab = s->m->cfg.n_vocab;
    const double start = lg_base_now();
    if (n < 1 || n > s->p.n_seq_max) return lg_base_fail(err, LG_ERR_USAGE, -1, "a step of %lld sequences (1 to %lld)", (long long)n, (long long)s->p.n_seq_max);
    LG_TRY(check_ids(s, ids, n, err));
    for (int64_t i = 0; i < n; i++) {
        LG_TRY(check_seq(s, seqs[i], err));
        LG_TRY(check_fit(s, s->seq[seqs[i]].len + s->seq[seqs[i]].shift + 1, err));
        for (int64_t j = 0; j < i; j++)
            if (seqs[j] == seqs[i]) return lg_base_fail(err, LG_ERR_USAGE, -1, "sequence %d is twice in one step", seqs[i]);
    }
    const bool guarded = !s->m->ops->allocates && !s->on_query;
    lg_pass *p = under_way(s, seqs, ids, n);
    if (!p) lg_session_settle(s);
    forget_logits(s);
    if (guarded) lg_base_alloc_guard(true);
    int64_t k = 0; /* sequences in the common step; rerun rows go alone */
    if (p) {
        s->now = (int)(p - s->pass);
        k = n;
    } else {
        p = &s->pass[0];
        for (int64_t i = 0; i < n; i++) {
            if (runs_again(s, &s->seq[seqs[i]])) continue;
            p->seq[k] = seqs[i];
            s->ids[k] = ids[i];
            s->batch[k++] = (int32_t)i;
        }
        p->n = k;
        if (k) st = run_pass(s, p, s->ids, more, err);
    }
    const bool fed = st == LG_OK;
    if (fed) feed(s, p, ids, 1);
    if (fed && more && k == n && can_go_on(s, p)) {
        lg_pass *next = &s->pass[1 - s->now];
        next->n = 0;
        for (int64_t r = 0; r < p->n; r++)
            if (s->batch[r] >= 0) next->seq[next->n++] = p->seq[r];
        st = run_pass(s, next, NULL, true, err);
    }
    if (st == LG_OK && p->ticket) st = s->m->ops->wait(s->m->ctx, p->ticket, err);
    if (fed && st != LG_OK) feed(s, p, ids, -1);
    p->ticket = 0;
    if (guarded) lg_base_alloc_guard(false);
    if (st != LG_OK) {
        lg_session_settle(s);
        return st;
    }
    s->next_known = p->draws && k == n; /* (rows that run again alone have none) */
    for (int64_t r = 0; r < p->n; r++) {
        const lg_timeline *q = &s->seq[p->seq[r]];
        if (s->batch[r] < 0) continue;
        lg_session_plan_count(s, r, s->batch[r], q->len, p->dense[r], p->budget[r]);
        if (s->roles.n_layer) lg_session_plan_report(s, r, q->len - q->n_slot - 1, q->len, p->dense[r]);
    }
    for (int64_t i = 0, r = k; i < n && r < n; i++) {
        lg_timeline *q = &s->seq[seqs[i]];
        if (q->logit_row >= 0) continue;
        LG_TRY(rerun(s, seqs[i], ids[i], runs_again(s, q), s->logits + r * n_vocab, err));
        s->next_known = false;
        q->steps++;
        q->logit_row = r++;
        lg_session_plan_count(s, 0, i, q->len, true, 0);
        lg_session_plan_report(s, 0, q->len - q->n_slot - 1, q->len, true);
    }
    s->stats.decode_s += lg_base_now() - start;
done:
    return st;
}

lg_status lg_session_step(lg_session *s, const int32_t *seqs, const int32_t *ids, int64_t n, lg_error *err) { return lg_session_step_on(s, seqs, ids, n, false, err); }

/* Of sequences that exist. */
static void sample_by(lg_session *s, const int32_t *seqs, int64_t n, const lg_sampler_params *p) {
    for (int64_t i = 0; i < n && i < s->p.n_seq_max; i++)
        if (check_seq(s, seqs[i], NULL) == LG_OK) s->seq[seqs[i]].sampler = p;
}
lg_status lg_session_greedy(lg_session *s, const int32_t *seqs, int32_t *ids, int64_t n, bool more, lg_error *err) {
    static const lg_sampler_params greatest = { .top_p = 1, .repeat_penalty = 1 };
    sample_by(s, seqs, n, &greatest);
    const lg_status st = lg_session_step_on(s, seqs, ids, n, more, err);
    sample_by(s, seqs, n, NULL);
    if (st != LG_OK) return st;
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = s->seq[seqs[i]].logit_row;
        ids[i] = s->next_known ? s->pass[s->now].next[row] : lg_ops_greatest(lg_session_logits(s, seqs[i]), s->m->cfg.n_vocab);
    }
    return LG_OK;
}

/* Rows ids[0..n) of a sequence in one pass, hybrid or dense; logits of the wanted ones (NULL: of all) to row `first` of s->logits and on. */
static lg_status force_rows(lg_session *s, int64_t seq, const int32_t *ids, int64_t n, const uint8_t *want, int64_t first, int64_t *n_row, lg_error *err) {
    lg_timeline *q = &s->seq[seq];
    const int64_t at = q->len;
    const bool hybrid = s->roles.n_layer > 0;
    lg_pass *p = &s->pass[0];
    *n_row = 0;
    lg_session_pages(s, q, at, at + n);
    for (int64_t t = 0; t < n; t++) {
        place(s, t, seq, hybrid ? (int32_t)t : 0, ids[t], at + t);
        if (!want || want[t]) s->row[(*n_row)++] = (int32_t)t;
        s->seqs[t] = (lg_kv_seq){ .page = q->page, .len = at + (hybrid ? t + 1 : n), .kept = hybrid ? q->kept : NULL };
        p->budget[t] = 0;
        p->dense[t] = !hybrid || lg_session_plan_row(s, at + t + 1, &p->budget[t]);
    }
    lg_forward f = forward_of(s, n, hybrid ? (int32_t)n : 1);
    f.n_row = *n_row;
    f.logits = s->logits + first * s->m->cfg.n_vocab;
    if (hybrid) make_hybrid(s, p, &f, false);
    const lg_status st = lg_model_forward(s->m, &s->work, &f, err);
    if (st != LG_OK) return st;
    memcpy(q->ids + at, ids, (size_t)n * sizeof *ids);
    q->len = at + n;
    q->steps += n;
    for (int64_t t = 0; t < n; t++) lg_session_plan_count(s, t, 0, at + t + 1, p->dense[t], p->budget[t]);
    return LG_OK;
}

lg_status lg_session_force(lg_session *s, int64_t seq, const int32_t *ids, int64_t n, const uint8_t *want, const float **logits,
                           lg_error *err) {
    lg_status st;
    const double start = lg_base_now();
    const int64_t n_vocab = s->m->cfg.n_vocab;
    LG_TRY(check_seq(s, seq, err));
    if (n < 1 || n > s->max_row) return lg_base_fail(err, LG_ERR_USAGE, -1, "%lld rows in one pass (1 to %lld)", (long long)n, (long long)s->max_row);
    LG_TRY(check_ids(s, ids, n, err));
    lg_timeline *q = &s->seq[seq];
    const int64_t at = q->len;
    LG_TRY(check_fit(s, at + q->shift + n, err));
    lg_session_settle(s);
    forget_logits(s);
    if (s->keep && q->observed < 0) { /* other roles stood when the context was read */
        const int64_t again = at - q->n_slot < s->observe ? at - q->n_slot : s->observe;
        q->len -= again;
        if (again) LG_TRY(lg_session_chunk(s, seq, q->ids + at - again, again, 0, NULL, true, err));
    }
    int64_t n_row = 0;
    for (int64_t t = 0, k; t < n; t += k) { /* up to the row that observes; that one alone */
        int64_t rows;
        for (k = 0; t + k < n && !lg_session_kept_due(s, q, at + t + k + 1); k++) {}
        if (k) {
            LG_TRY(force_rows(s, seq, ids + t, k, want ? want + t : NULL, n_row, &rows, err));
            n_row += rows;
            continue;
        }
        k = 1;
        LG_TRY(rerun(s, seq, ids[t], s->again, s->logits + n_row * n_vocab, err));
        n_row += !want || want[t];
        q->steps++;
        lg_session_plan_count(s, 0, 0, q->len, true, 0);
    }
    if (!s->m->ops->host_memory) s->m->ops->download(s->m->ctx, s->logits_host, s->logits, n_row * n_vocab * (int64_t)sizeof(float));
    *logits = s->logits_host;
    s->stats.decode_s += lg_base_now() - start;
done:
    return st;
}

const float *lg_session_logits(lg_session *s, int64_t seq) {
    if (seq < 0 || seq >= s->p.n_seq_max || s->seq[seq].logit_row < 0) return NULL;
    const int64_t r = s->seq[seq].logit_row, n = s->m->cfg.n_vocab;
    if (!s->logits_here[r]) s->m->ops->download(s->m->ctx, s->logits_host + r * n, s->pass[s->now].logits + r * n, n * (int64_t)sizeof(float));
    s->logits_here[r] = true;
    return s->logits_host + r * n;
}
int64_t lg_session_len(const lg_session *s, int64_t seq) { return seq >= 0 && seq < s->p.n_seq_max ? s->seq[seq].len - s->seq[seq].n_slot : 0; }
const int32_t *lg_session_ids(const lg_session *s, int64_t seq) { return seq >= 0 && seq < s->p.n_seq_max ? s->seq[seq].ids + s->seq[seq].n_slot : NULL; }

lg_status lg_session_rewind(lg_session *s, int64_t seq, int64_t n, lg_error *err) {
    lg_status st;
    LG_TRY(check_seq(s, seq, err));
    lg_timeline *q = &s->seq[seq];
    if (n < 0 || n > q->len - q->n_slot)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "rewind to %lld of %lld tokens", (long long)n, (long long)(q->len - q->n_slot));
    n += q->n_slot;
    if (n == q->len) return LG_OK;
    lg_session_drop(s, q, n);
    q->steps -= q->len - n < q->steps ? q->len - n : q->steps;
    q->len = n;
    q->logit_row = -1;
    lg_session_kept_cut(s, q);
done:
    return st;
}

lg_status lg_session_fork(lg_session *s, int64_t dst, int64_t src, lg_error *err) {
    lg_status st;
    LG_TRY(check_seq(s, dst, err));
    LG_TRY(check_seq(s, src, err));
    if (dst == src) return LG_OK;
    lg_timeline *d = &s->seq[dst];
    const lg_timeline *q = &s->seq[src];
    lg_session_drop(s, d, 0);
    memcpy(d->ids, q->ids, (size_t)q->len * sizeof(int32_t));
    memcpy(d->page, q->page, (size_t)q->n_page * sizeof(int32_t));
    for (int64_t i = 0; i < q->n_page; i++) s->ref[q->page[i]]++;
    d->len = q->len;
    d->n_page = q->n_page;
    d->steps = q->steps;
    d->n_slot = q->n_slot;
    d->shift = q->shift;
    d->logit_row = q->logit_row;
    lg_session_kept_copy(s, d, q);
done:
    return st;
}

lg_status lg_session_eval(lg_session *s, const int32_t *ids, int64_t n, int64_t decode_from, lg_row_fn on_row, void *user, lg_error *err) {
    lg_status st;
    const int64_t n_vocab = s->m->cfg.n_vocab;
    if (n < 1) return lg_base_fail(err, LG_ERR_USAGE, -1, "no ids: nothing to evaluate");
    if (decode_from > n || decode_from < -1) return lg_base_fail(err, LG_ERR_USAGE, -1, "decode from %lld of %lld tokens", (long long)decode_from, (long long)n);
    lg_timeline *q = &s->seq[0];
    LG_TRY(check_fit(s, before(q) + n, err));
    LG_TRY(check_ids(s, ids, n, err));
    lg_session_drop(s, q, q->n_slot); /* the prompt is read behind slots, where there are any */
    q->len = q->n_slot;
    q->steps = 0;
    lg_session_kept_cut(s, q);
    forget_logits(s);
    const int64_t n_pre = decode_from < 0 ? n : decode_from;
    for (int64_t at = 0; at < n_pre;) {
        const int64_t k = next_chunk(s, n_pre - at);
        const double start = lg_base_now();
        LG_TRY(lg_session_chunk(s, 0, ids + at, k, k, NULL, at + k == n_pre, err));
        s->stats.prefill_s += lg_base_now() - start;
        s->stats.prefill_tokens += k;
        for (int64_t r = 0; r < k; r += EVAL_ROWS) {
            const int64_t rows = k - r < EVAL_ROWS ? k - r : EVAL_ROWS;
            LG_TRY(lg_model_logits(s->m, &s->work, s->row + r, rows, s->logits, err));
            if (!s->m->ops->host_memory) s->m->ops->download(s->m->ctx, s->logits_host, s->logits, rows * n_vocab * (int64_t)sizeof(float));
            for (int64_t i = 0; i < rows; i++) LG_TRY(on_row(user, at + r + i, s->logits_host + i * n_vocab, err));
        }
        at += k;
        if (s->p.progress && !s->p.progress(s->p.progress_user, "prefill", at, n_pre) && at < n_pre)
            return lg_base_fail(err, LG_ERR_CANCELLED, -1, "cancelled after %lld of %lld tokens", (long long)at, (long long)n);
    }
    for (int64_t i = n_pre; i < n; i++) {
        const int32_t zero = 0;
        LG_TRY(lg_session_step(s, &zero, ids + i, 1, err));
        LG_TRY(on_row(user, i, lg_session_logits(s, 0), err));
    }
done:
    return st;
}

void lg_session_stats(const lg_session *s, lg_stats *out) { *out = s->stats; }
void lg_session_stats_reset(lg_session *s) {
    const int64_t cache = s->stats.kv_bytes_cache;
    s->stats = (lg_stats){ .kv_bytes_cache = cache };
    memset(s->head_tokens, 0, (size_t)(s->m->cfg.n_layer * s->m->cfg.n_head_kv) * sizeof(int64_t));
}
const int64_t *lg_session_head_tokens(const lg_session *s) { return s->head_tokens; }

void lg_session_on_set(lg_session *s, lg_set_fn fn, void *user) {
    lg_session_settle(s);
    if (fn && !s->set_tokens) s->set_tokens = lg_base_calloc(s->p.n_ctx, sizeof(int32_t));
    s->on_set = s->set_tokens ? fn : NULL;
    s->on_set_user = user;
}
void lg_session_on_query(lg_session *s, lg_query_fn fn, void *user) {
    s->on_query = fn;
    s->on_query_user = user;
}

lg_status lg_session_read_k(lg_session *s, int64_t seq, int64_t layer, int64_t head, int64_t n, float *out, lg_error *err) {
    lg_status st;
    const lg_config *c = &s->m->cfg;
    LG_TRY(check_seq(s, seq, err));
    if (layer < 0 || layer >= c->n_layer || head < 0 || head >= c->n_head_kv || n < 0 || n > s->seq[seq].len)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "no such rows in the cache");
    for (int64_t t = 0; t < n; t += LG_PAGE) { /* a head's rows of one page lie together */
        const int64_t row = ((int64_t)s->seq[seq].page[t / LG_PAGE] * c->n_head_kv + head) * LG_PAGE, rows = n - t < LG_PAGE ? n - t : LG_PAGE;
        s->m->ops->download(s->m->ctx, s->page_copy, s->kv[layer].k + row * s->geom.row_bytes, rows * s->geom.row_bytes);
        for (int64_t i = 0; i < rows; i++) lg_ops_kv_load(&s->geom, out + (t + i) * c->head_dim, s->page_copy + i * s->geom.row_bytes);
    }
done:
    return st;
}

lg_status lg_session_fill_random(lg_session *s, int64_t n, uint64_t seed, lg_error *err) { return lg_session_fill_random_at(s, 0, n, seed, err); }

lg_status lg_session_fill_random_at(lg_session *s, int64_t seq, int64_t n, uint64_t seed, lg_error *err) {
    lg_status st;
    const lg_config *c = &s->m->cfg;
    float *x = NULL;
    LG_TRY(check_seq(s, seq, err));
    LG_TRY(check_fit(s, n, err));
    lg_timeline *q = &s->seq[seq];
    lg_session_drop(s, q, 0);
    forget_logits(s);
    q->len = q->steps = q->n_slot = q->shift = 0;
    q->observed = -1;
    lg_session_pages(s, q, 0, n);
    if (s->m->ops->kv_random) {
        for (int64_t l = 0; l < c->n_layer; l++) s->m->ops->kv_random(s->m->ctx, s->kv[l], &s->geom, q->page, q->n_page, seed + (uint64_t)(seq * c->n_layer + l));
        LG_TRY(s->m->ops->sync(s->m->ctx, err));
        memset(q->ids, 0, (size_t)n * sizeof(int32_t));
        q->len = n;
        return LG_OK;
    }
    const int64_t rows = c->n_head_kv * LG_PAGE;
    x = lg_base_calloc(c->head_dim, sizeof *x);
    if (!x) return nomem(err);
    for (int64_t p = 0; p < q->n_page; p++)
        for (int kv = 0; kv < 2; kv++) {
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t i = 0; i < c->head_dim; i += 4) {
                    const uint64_t u = lg_base_rng(seed + (uint64_t)seq, (uint64_t)(2 * p + kv), (uint64_t)(r * c->head_dim + i));
                    for (int64_t j = 0; j < 4 && i + j < c->head_dim; j++)
                        x[i + j] = ((float)(u >> (16 * j) & 0xffff) - 32767.5f) * (1.0f / 18918.0f); /* unit variance */
                }
                lg_ops_kv_store(&s->geom, s->page_copy + r * s->geom.row_bytes, x);
            }
            for (int64_t l = 0; l < c->n_layer; l++)
                s->m->ops->upload(s->m->ctx, (kv ? s->kv[l].v : s->kv[l].k) + q->page[p] * s->page_bytes, s->page_copy, s->page_bytes);
        }
    memset(q->ids, 0, (size_t)n * sizeof(int32_t));
    q->len = n;
    lg_base_free(x);
done:
    return st;
}
