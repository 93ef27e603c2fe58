/* Kept tokens (docs/SPARSE.md): what a head that reads sets keeps in them whatever its donor picks. After the prompt, and anew every `refresh`
 * tokens, the attention of the last `observe` tokens is summed up per head; of what a head chooses beyond sinks and recents, the share
 * `keep` goes to the tokens with the largest sums. */
#include "session/session.h"
#include <string.h>

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t bytes_of(const lg_session *s) { return s->sets.n_slot * s->sets.kept_words * (int64_t)sizeof(uint32_t); }

lg_status lg_session_kept_init(lg_session *s, lg_error *err) {
    if (!s->keep) return LG_OK;
    const lg_ops *o = s->m->ops;
    const int64_t units = (s->p.n_ctx + s->sets.block - 1) / s->sets.block;
    s->sets.kept_words = (units + 31) / 32;
    s->mass = o->alloc(s->m->ctx, s->geom.n_head_kv * s->p.n_ctx * (int64_t)sizeof(float), false, err);
    if (!s->mass) return LG_ERR_NOMEM;
    for (int64_t i = 0; i < s->p.n_seq_max; i++) {
        s->seq[i].kept = o->alloc(s->m->ctx, bytes_of(s), true, err);
        s->seq[i].observed = -1;
        if (!s->seq[i].kept) return LG_ERR_NOMEM;
    }
    s->mass_host = o->host_memory ? s->mass : lg_base_calloc(s->geom.n_head_kv * s->p.n_ctx, sizeof(float));
    s->kept_host = lg_base_alloc(bytes_of(s));
    s->kept_score = lg_base_calloc(s->p.n_ctx, sizeof(float));
    s->kept_units = lg_base_calloc(s->p.n_ctx, sizeof(int32_t));
    s->kept_work = lg_base_calloc(s->p.n_ctx, sizeof(int32_t));
    if (!s->mass_host || !s->kept_host || !s->kept_score || !s->kept_units || !s->kept_work)
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory for what heads keep");
    return LG_OK;
}

void lg_session_kept_free(lg_session *s) {
    const lg_ops *o = s->m->ops;
    if (!o->host_memory) lg_base_free(s->mass_host);
    if (s->mass) o->free(s->m->ctx, s->mass);
    for (int64_t i = 0; s->seq && i < s->p.n_seq_max; i++) {
        if (s->seq[i].kept) o->free(s->m->ctx, s->seq[i].kept);
        s->seq[i].kept = NULL;
    }
    lg_base_free(s->kept_host);
    lg_base_free(s->kept_score);
    lg_base_free(s->kept_units);
    lg_base_free(s->kept_work);
    s->mass = s->mass_host = s->kept_score = NULL;
    s->kept_host = NULL;
    s->kept_units = s->kept_work = NULL;
    s->keep = 0;
}

bool lg_session_kept_due(const lg_session *s, const lg_timeline *q, int64_t len) {
    int64_t budget;
    const int64_t most = max64(s->refresh, q->observed / LG_REFRESH_PART); /* what a refresh costs grows with the length */
    return s->keep && (q->observed < 0 || len - q->observed >= most) && !lg_session_plan_row(s, len, &budget);
}

/* Of a slot in a sequence of the length under way: units beyond sinks and before recents with the largest masses. */
static void choose(lg_session *s, int32_t slot, const float *mass, int64_t len, int64_t budget) {
    const int64_t b = s->sets.block;
    const lg_forced f = lg_ops_forced(len, b, s->sinks, s->recents);
    const int64_t first = f.head, n = f.tail - first;
    const int64_t whole = lg_ops_budget(&s->spread, s->slot_share, slot, budget), count = max64(0, whole - s->spread.least) * s->keep / LG_SHARE_ONE;
    uint32_t *bits = s->kept_host + slot * s->sets.kept_words;
    if (n == 0 || count < b) return;
    const lg_select best = { .rule = LG_RULE_TOPK };
    const int64_t chosen = lg_ops_select(s->kept_units, s->p.n_ctx, mass + first * b, min64(n * b, len - first * b), count, (int32_t)b, &best,
                                         s->kept_score, s->kept_work);
    for (int64_t i = 0; i < chosen; i++) {
        const int64_t u = first + s->kept_units[i];
        bits[u >> 5] |= 1u << (u & 31);
    }
}

void lg_session_kept_begin(lg_session *s, lg_timeline *q, int64_t len) {
    q->observed = -1;
    s->observing = len;
    memset(s->kept_host, 0, (size_t)bytes_of(s));
}

lg_status lg_session_kept_mass(void *session, int64_t layer, lg_error *err) {
    lg_session *s = session;
    const int64_t n_kv = s->m->cfg.n_head_kv, len = s->observing;
    int64_t budget;
    (void)err;
    lg_session_plan_row(s, len, &budget);
    for (int64_t h = 0; h < n_kv; h++) {
        const int32_t slot = s->read[layer * n_kv + h];
        float *mass = s->mass_host + h * s->p.n_ctx;
        if (slot < 0) continue;
        if (!s->m->ops->host_memory) s->m->ops->download(s->m->ctx, mass, s->mass + h * s->p.n_ctx, len * (int64_t)sizeof(float));
        choose(s, slot, mass, len, budget);
    }
    return LG_OK;
}

void lg_session_kept_end(lg_session *s, lg_timeline *q) {
    s->m->ops->upload(s->m->ctx, q->kept, s->kept_host, bytes_of(s));
    q->observed = s->observing;
}

void lg_session_kept_cut(lg_session *s, lg_timeline *q) {
    if (!q->kept || q->observed <= q->len) return;
    const int64_t units = (q->len + s->sets.block - 1) / s->sets.block;
    s->m->ops->download(s->m->ctx, s->kept_host, q->kept, bytes_of(s));
    for (int32_t j = 0; j < s->sets.n_slot; j++)
        for (int64_t w = units / 32; w < s->sets.kept_words; w++)
            s->kept_host[j * s->sets.kept_words + w] &= w == units / 32 ? ~(~0u << (units % 32)) : 0;
    s->m->ops->upload(s->m->ctx, q->kept, s->kept_host, bytes_of(s));
    q->observed = q->len;
}

void lg_session_kept_copy(lg_session *s, lg_timeline *to, const lg_timeline *from) {
    if (!from->kept) return;
    s->m->ops->copy(s->m->ctx, to->kept, from->kept, bytes_of(s));
    to->observed = from->observed;
}
