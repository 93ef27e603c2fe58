/* The plan of a hybrid decode step: which head reads what, which sets are built (specs: docs/SPARSE.md). The slots of
 * the set table are the retrieval heads that somebody reads, once for every share of the budget it is read at; heads are kept in the
 * model's own order. */
#include "session/session.h"
#include <string.h>

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static bool forced_rule(const lg_session *s) { return s->p.hybrid.rule == LG_RULE_TOPK || s->p.hybrid.rule == LG_RULE_RATIO; }

static bool reads_from(const lg_session *s, int64_t i, int64_t donor) {
    const lg_role *role = &s->roles.role[i];
    return role->kind == LG_ROLE_DONOR && role->donor_layer * s->m->cfg.n_head_kv + role->donor_head == donor;
}

static int32_t new_slot(lg_session *s, int64_t head, int32_t share) {
    const int64_t n_kv = s->m->cfg.n_head_kv;
    s->slot_share[s->sets.n_slot] = share;
    s->slot_layer[s->sets.n_slot] = (int32_t)(head / n_kv);
    s->slot_head[s->sets.n_slot] = (int32_t)(head % n_kv);
    return s->sets.n_slot++;
}

/* Where heads keep tokens, each has a set of its own. The last of a donor's slots keeps none and holds what all of them may choose; nobody
 * reads it. A window is a set too, where a layer before it can make it. */
static void make_keeping_slots(lg_session *s, int64_t n) {
    const int64_t n_kv = s->m->cfg.n_head_kv;
    for (int64_t d = 0; d < n; d++) {
        int32_t most = -1;
        s->make[d] = -1;
        if (s->roles.role[d].kind != LG_ROLE_RETRIEVAL) continue;
        for (int64_t i = (d / n_kv + 1) * n_kv; i < n; i++) {
            if (!reads_from(s, i, d)) continue;
            most = s->share[i] > most ? s->share[i] : most;
            s->read[i] = new_slot(s, d, s->share[i]);
            if (!s->n_make[d]++) s->make[d] = s->read[i];
        }
        if (most >= 0) new_slot(s, d, most);
        s->n_make[d] += most >= 0;
    }
    s->spread.latest = s->sets.n_slot;
    for (int64_t i = n_kv; i < n; i++)
        if (s->roles.role[i].kind == LG_ROLE_WINDOW) s->read[i] = new_slot(s, i, s->share[i]);
    s->spread.n_latest = s->sets.n_slot - s->spread.latest;
}

/* Slots in head order, those of one head in order of their shares. */
static void make_slots(lg_session *s, int64_t n) {
    const int64_t n_kv = s->m->cfg.n_head_kv;
    for (int64_t d = 0; d < n; d++) {
        s->make[d] = -1;
        if (s->roles.role[d].kind != LG_ROLE_RETRIEVAL) continue;
        for (int64_t last = -1, next;; last = next) {
            next = INT64_MAX;
            for (int64_t i = (d / n_kv + 1) * n_kv; i < n; i++)
                if (reads_from(s, i, d) && s->share[i] > last) next = min64(next, s->share[i]);
            if (next == INT64_MAX) break;
            for (int64_t i = (d / n_kv + 1) * n_kv; i < n; i++)
                if (reads_from(s, i, d) && s->share[i] == next) s->read[i] = s->sets.n_slot;
            if (!s->n_make[d]++) s->make[d] = s->sets.n_slot;
            new_slot(s, d, (int32_t)next);
        }
    }
}

lg_status lg_session_plan_init(lg_session *s, lg_error *err) {
    const lg_config *c = &s->m->cfg;
    const lg_hybrid_params *h = &s->p.hybrid;
    const lg_roles *r = s->p.roles;
    if (!r) return LG_OK;
    if (r->n_layer != c->n_layer || r->n_head_kv != c->n_head_kv)
        return lg_base_fail(err, LG_ERR_MISMATCH, -1, "the roles are for %lld layers of %lld KV heads, the model has %lld of %lld",
                            (long long)r->n_layer, (long long)r->n_head_kv, (long long)c->n_layer, (long long)c->n_head_kv);
    if (strcmp(r->family, s->m->info.family)) {
        if (!s->p.roles_any_model)
            return lg_base_fail(err, LG_ERR_MISMATCH, -1, "the roles belong to family %s, the model is of family %s", r->family, s->m->info.family);
        lg_base_log(LG_LOG_WARN, "roles of family %s are used with a model of family %s", r->family, s->m->info.family);
    }
    const int64_t n = c->n_layer * c->n_head_kv;
    int32_t most = LG_SHARE_ONE;
    bool windows = false;
    s->read = lg_base_calloc(n, sizeof(int32_t));
    s->make = lg_base_calloc(n, sizeof(int32_t));
    s->slot_layer = lg_base_calloc(n, sizeof(int32_t));
    s->slot_head = lg_base_calloc(n, sizeof(int32_t));
    s->share = lg_base_calloc(n, sizeof(int32_t));
    s->n_make = lg_base_calloc(n, sizeof(int32_t));
    s->slot_share = lg_base_calloc(n, sizeof(int32_t));
    s->roles = *r;
    s->roles.share = NULL; /* s->share */
    s->roles.role = lg_base_calloc(n, sizeof(lg_role));
    if (!s->read || !s->make || !s->slot_layer || !s->slot_head || !s->share || !s->n_make || !s->slot_share || !s->roles.role)
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    memcpy(s->roles.role, r->role, (size_t)n * sizeof(lg_role));
    const double keep = h->keep >= 0 ? h->keep : (double)r->keep / LG_SHARE_ONE;
    if (!(keep >= 0 && keep <= 1)) return lg_base_fail(err, LG_ERR_USAGE, -1, "a share to keep of %g (0 to 1)", keep);
    s->keep = forced_rule(s) ? (int64_t)(keep * LG_SHARE_ONE + 0.5) : 0;
    s->observe = h->observe > 0 ? h->observe : r->observe > 0 ? r->observe : LG_OBSERVE_ROWS;
    s->refresh = h->refresh > 0 ? h->refresh : r->refresh > 0 ? r->refresh : 2 * LG_OBSERVE_ROWS;
    if (s->observe > LG_OBSERVE_ROWS) return lg_base_fail(err, LG_ERR_USAGE, -1, "%lld tokens to observe (1 to %d)", (long long)s->observe, LG_OBSERVE_ROWS);
    s->again = max64(1, min64(s->observe, s->refresh / LG_AGAIN_PART));
    const bool spread = (r->share || s->keep) && forced_rule(s);
    for (int64_t i = 0; i < n; i++) {
        const lg_role *role = &s->roles.role[i];
        windows = windows || role->kind == LG_ROLE_WINDOW;
        s->read[i] = role->kind == LG_ROLE_RETRIEVAL ? LG_HEAD_DENSE : LG_HEAD_WINDOW; /* readers of sets: below */
        s->share[i] = r->share && spread ? r->share[i] : LG_SHARE_ONE;
        if (role->kind != LG_ROLE_RETRIEVAL) most = s->share[i] > most ? s->share[i] : most;
    }
    if (s->keep) make_keeping_slots(s, n);
    else make_slots(s, n);
    if (!s->sets.n_slot) s->keep = 0;

    s->sinks = h->sinks >= 0 ? h->sinks : r->sinks >= 0 ? r->sinks : 128;
    s->recents = h->recents >= 0 ? h->recents : r->recents >= 0 ? r->recents : 256;
    s->budget = h->budget >= 0 ? h->budget : r->budget;
    const int64_t least = s->sinks + s->recents;
    if (h->block != 1 && h->block != 16 && h->block != 32 && h->block != 64)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "block of %lld tokens (1, 16, 32 or 64)", (long long)h->block);
    if ((h->rule == LG_RULE_RATIO && !(h->rule_value >= 0 && h->rule_value < 1)) ||
        (h->rule == LG_RULE_TOPP && !(h->rule_value > 0 && h->rule_value <= 1)) ||
        (h->rule == LG_RULE_THRESHOLD && !(h->rule_value >= 0 && h->rule_value < 1)))
        return lg_base_fail(err, LG_ERR_USAGE, -1, "rule value %g is out of range", h->rule_value);
    if (h->correct_every < 0) return lg_base_fail(err, LG_ERR_USAGE, -1, "correction every %lld steps", (long long)h->correct_every);
    if (s->budget < 0 && (h->rule == LG_RULE_TOPK || (!forced_rule(s) && windows)))
        return lg_base_fail(err, LG_ERR_USAGE, -1, "no budget: neither the options nor the roles file give one");
    if (h->rule != LG_RULE_RATIO && s->budget >= 0 && s->budget < least) {
        lg_base_log(LG_LOG_WARN, "budget %lld raised to %lld (sinks + recents)", (long long)s->budget, (long long)least);
        s->budget = least;
    }
    /* Window heads take the sinks under every rule; top-p and threshold selection ignores them. */
    s->select = (lg_select){ .rule = h->rule, .value = h->rule_value, .sinks = s->sinks, .recents = s->recents,
                             .scale = h->rule_scale > 0 ? (float)h->rule_scale : (float)(1.0 / __builtin_sqrt((double)c->head_dim)) };
    s->sets.block = (int32_t)h->block;
    if (spread) {
        const int64_t b = h->block, blocks = (s->sinks + b - 1) / b + (s->recents + 2 * b - 1) / b; /* that hold sinks or recents, at most */
        s->spread.slot = s->slot_share;
        s->spread.window = s->share;
        s->spread.n_make = s->n_make;
        s->spread.least = b == 1 ? least : blocks * b;
    }
    const int64_t all = (s->p.n_ctx + h->block - 1) / h->block + 1;
    s->sets.cap = h->rule == LG_RULE_TOPK ? min64(all, lg_ops_budget(&s->spread, &most, 0, s->budget) / h->block + least / h->block + 4) : all;
    if (s->sets.n_slot) {
        const int64_t n_set = s->max_row * s->sets.n_slot, size = sizeof(int32_t);
        const lg_ops *o = s->m->ops;
        int64_t bytes;
        if (!lg_base_mul(n_set * size, s->sets.cap, &bytes)) return lg_base_fail(err, LG_ERR_LIMIT, -1, "the token sets are beyond what can be addressed");
        s->sets.idx = o->alloc(s->m->ctx, bytes, true, err);
        s->sets.n = s->sets.idx ? o->alloc(s->m->ctx, n_set * size, true, err) : NULL;
        if (!s->sets.idx || !s->sets.n) return LG_ERR_NOMEM;
        s->sets_n = s->sets.n;
        s->sets_idx = s->sets.idx;
        if (!o->host_memory) {
            s->sets_n = lg_base_calloc(n_set, size);
            s->sets_idx = lg_base_alloc(bytes);
            if (!s->sets_n || !s->sets_idx) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory for the token sets");
        }
    }
    return lg_session_kept_init(s, err);
}

void lg_session_plan_free(lg_session *s) {
    lg_session_kept_free(s);
    lg_base_free(s->read);
    lg_base_free(s->make);
    lg_base_free(s->slot_layer);
    lg_base_free(s->slot_head);
    lg_base_free(s->share);
    lg_base_free(s->n_make);
    lg_base_free(s->slot_share);
    lg_base_free(s->roles.role);
    if (!s->m->ops->host_memory) {
        lg_base_free(s->sets_n);
        lg_base_free(s->sets_idx);
    }
    s->sets_n = s->sets_idx = NULL;
    if (s->sets.idx) s->m->ops->free(s->m->ctx, s->sets.idx);
    if (s->sets.n) s->m->ops->free(s->m->ctx, s->sets.n);
}

static void plan_clear(lg_session *s) {
    lg_session_plan_free(s);
    s->read = s->make = s->slot_layer = s->slot_head = s->share = s->n_make = s->slot_share = NULL;
    s->spread = (lg_spread){ 0 };
    s->roles = (lg_roles){ 0 };
    s->sets = (lg_sets){ 0 };
    s->p.roles = NULL;
}

lg_status lg_session_set_roles(lg_session *s, const lg_roles *roles, const lg_hybrid_params *hybrid, lg_error *err) {
    lg_session_settle(s);
    plan_clear(s);
    s->p.roles = roles;
    s->p.hybrid = *hybrid;
    const lg_status st = lg_session_plan_init(s, err);
    if (st != LG_OK) plan_clear(s);
    s->p.roles = NULL;
    return st;
}

bool lg_session_plan_row(const lg_session *s, int64_t len, int64_t *budget) {
    const lg_hybrid_params *h = &s->p.hybrid;
    *budget = s->budget;
    if (h->rule == LG_RULE_RATIO) *budget = max64((int64_t)(int)((1.0 - h->rule_value) * (double)len), s->sinks + s->recents);
    if (forced_rule(s)) return len <= *budget;
    if (*budget < 0) *budget = len; /* no windows: nobody looks */
    return false;
}

/* Tokens of slot j of row `row` whose sequence has len tokens. */
static int64_t set_tokens(const lg_session *s, int64_t row, int32_t j, int64_t len) {
    const int64_t at = row * s->sets.n_slot + j, n = s->sets_n[at], b = s->sets.block;
    if (!n || b == 1) return n;
    const int64_t last = s->sets_idx[at * s->sets.cap + n - 1];
    return (n - 1) * b + min64(b, len - last * b);
}

void lg_session_plan_count(lg_session *s, int64_t row, int64_t arg, int64_t len, bool dense, int64_t budget) {
    const int64_t n = s->m->cfg.n_layer * s->m->cfg.n_head_kv, pair = 2 * s->geom.row_bytes;
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t t = len;
        if (!dense && s->read[i] == LG_HEAD_WINDOW) t = min64(len, lg_ops_budget(&s->spread, s->share, i, budget));
        else if (!dense && s->read[i] >= 0) t = set_tokens(s, row, s->read[i], len);
        s->head_tokens[i] += t;
        tokens += t;
    }
    s->row_bytes_read[arg] = tokens * pair;
    s->row_bytes_dense[arg] = len * n * pair;
    s->stats.kv_bytes_read += tokens * pair;
    s->stats.kv_bytes_dense += len * n * pair;
    s->stats.decode_steps++;
    s->stats.dense_steps += dense;
}

void lg_session_plan_report(lg_session *s, int64_t row, int64_t position, int64_t len, bool dense) {
    if (!s->on_set) return;
    if (dense) {
        s->on_set(s->on_set_user, position, -1, -1, NULL, 0);
        return;
    }
    for (int32_t j = 0; j < s->sets.n_slot; j++) {
        const int64_t at = row * s->sets.n_slot + j, b = s->sets.block;
        const int32_t *block = s->sets_idx + at * s->sets.cap;
        int64_t n = 0;
        for (int32_t i = 0; i < s->sets_n[at]; i++)
            for (int64_t t = block[i] * b; t < min64((block[i] + 1) * b, len); t++) s->set_tokens[n++] = (int32_t)t;
        s->on_set(s->on_set_user, position, s->slot_layer[j], s->slot_head[j], s->set_tokens, n);
    }
}
