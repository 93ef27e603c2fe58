/* roles: reading, checking and writing roles files.
 *
 * A file is outside data: every entry is checked here, once, so that the forward pass may index by donor
 * without looking. "sparse" (same-index files) becomes the donor it stands for: the nearest earlier layer
 * in which the same index retrieves. */
#include "model/roles.h"

#include <string.h>

static const int64_t max_file_bytes = 64 << 20;

lg_roles *lg_roles_new(int64_t n_layer, int64_t n_head_kv) {
    if (n_layer < 1 || n_layer > LG_ROLES_MAX_LAYER || n_head_kv < 1 || n_head_kv > LG_ROLES_MAX_HEAD) return NULL;
    lg_roles *r = lg_base_alloc((int64_t)sizeof *r);
    if (!r) return NULL;
    r->role = lg_base_calloc(n_layer * n_head_kv, (int64_t)sizeof *r->role);
    if (!r->role) {
        lg_base_free(r);
        return NULL;
    }
    r->n_layer = n_layer;
    r->n_head_kv = n_head_kv;
    for (int64_t i = 0; i < n_layer * n_head_kv; i++)
        r->role[i] = (lg_role){ LG_ROLE_WINDOW, -1, -1 };
    r->budget = r->sinks = r->recents = -1;
    return r;
}

void lg_roles_free(lg_roles *r) {
    if (!r) return;
    lg_base_free(r->role);
    lg_base_free(r->share);
    lg_base_free(r);
}

lg_status lg_roles_spread(lg_roles *r, lg_error *err) {
    const int64_t n = r->n_layer * r->n_head_kv;
    if (!r->share) r->share = lg_base_calloc(n, (int64_t)sizeof *r->share);
    if (!r->share) return lg_base_fail(err, LG_ERR_NOMEM, -1, "roles: out of memory");
    for (int64_t i = 0; i < n; i++) r->share[i] = LG_SHARE_ONE;
    return LG_OK;
}

lg_roles *lg_roles_clone(const lg_roles *r) {
    lg_roles *c = lg_roles_new(r->n_layer, r->n_head_kv);
    if (!c) return NULL;
    lg_role *role = c->role;
    memcpy(role, r->role, (size_t)(r->n_layer * r->n_head_kv) * sizeof *role);
    *c = *r;
    c->role = role;
    c->share = NULL;
    if (!r->share) return c;
    if (lg_roles_spread(c, NULL) != LG_OK) {
        lg_roles_free(c);
        return NULL;
    }
    memcpy(c->share, r->share, (size_t)(r->n_layer * r->n_head_kv) * sizeof *c->share);
    return c;
}

/* A budget is what heads without a budget of their own would read together. */
static lg_status check_share(const lg_roles *r, const char *name, lg_error *err) {
    int64_t sum = 0, count = 0;
    for (int64_t i = 0; r->share && i < r->n_layer * r->n_head_kv; i++) {
        if (r->share[i] < 0 || r->share[i] > LG_SHARE_MAX)
            return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: budget_share[%lld][%lld] is out of range", name, (long long)(i / r->n_head_kv),
                                (long long)(i % r->n_head_kv));
        if (r->role[i].kind == LG_ROLE_RETRIEVAL) continue;
        sum += r->share[i];
        count++;
    }
    if (sum > count * LG_SHARE_ONE)
        return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: key budget_share: the mean over heads that do not retrieve is %.6f, above 1", name,
                            (double)sum / (double)count / LG_SHARE_ONE);
    return LG_OK;
}

/* ---- reading ---------------------------------------------------------------------------------------- */
typedef struct reader { const char *name; lg_error *err; } reader;

#define BAD(rd, ...) lg_base_fail((rd)->err, LG_ERR_FORMAT, -1, __VA_ARGS__)

static lg_status get_int(const reader *rd, const lg_json *obj, const char *where, const char *key,
                         int64_t lo, int64_t hi, int64_t *out) {
    const lg_json *v = lg_json_get(obj, key);
    if (!v) return BAD(rd, "%s: key %s%s is missing", rd->name, where, key);
    if (!lg_json_int(v, out)) return BAD(rd, "%s: key %s%s is no integer", rd->name, where, key);
    if (*out < lo || *out > hi)
        return BAD(rd, "%s: key %s%s: %lld is outside %lld to %lld", rd->name, where, key,
                   (long long)*out, (long long)lo, (long long)hi);
    return LG_OK;
}

/* Absent or null leaves -1. */
static lg_status get_optional(const reader *rd, const lg_json *root, const char *key, int64_t lo, int64_t *out) {
    *out = -1;
    const lg_json *v = lg_json_get(root, key);
    if (!v || lg_json_typeof(v) == LG_JSON_NULL) return LG_OK;
    return get_int(rd, root, "", key, lo, INT32_MAX / 4, out);
}

static lg_status get_text(const reader *rd, const lg_json *obj, const char *where, const char *key, const char **out) {
    const lg_json *v = lg_json_get(obj, key);
    if (!v) return BAD(rd, "%s: key %s%s is missing", rd->name, where, key);
    int64_t n = 0;
    *out = lg_json_str(v, &n);
    if (!*out || (int64_t)strlen(*out) != n) return BAD(rd, "%s: key %s%s is no plain string", rd->name, where, key);
    return LG_OK;
}

static lg_status read_entry(const reader *rd, const lg_json *v, lg_roles *r, int64_t layer, int64_t head) {
    lg_role *out = &r->role[layer * r->n_head_kv + head];
    const char *where = "roles";
    long long l = layer, h = head;
    if (lg_json_typeof(v) == LG_JSON_STRING) {
        int64_t n = 0;
        const char *s = lg_json_str(v, &n);
        if (n == 9 && !memcmp(s, "retrieval", 9)) {
            *out = (lg_role){ LG_ROLE_RETRIEVAL, -1, -1 };
            r->n_retrieval++;
            return LG_OK;
        }
        if (n == 6 && !memcmp(s, "window", 6)) return LG_OK; /* as made */
        if (n != 6 || memcmp(s, "sparse", 6)) return BAD(rd, "%s: key %s[%lld][%lld]: unknown role", rd->name, where, l, h);
        if (!r->same_index)
            return BAD(rd, "%s: key %s[%lld][%lld]: \"sparse\" needs \"share\": \"same-index\"", rd->name, where, l, h);
        int64_t d = layer - 1;
        while (d >= 0 && r->role[d * r->n_head_kv + head].kind != LG_ROLE_RETRIEVAL) d--;
        if (d < 0)
            return BAD(rd, "%s: key %s[%lld][%lld]: \"sparse\" without an earlier retrieval head of index %lld", rd->name, where, l, h, h);
        *out = (lg_role){ LG_ROLE_DONOR, (int16_t)d, (int16_t)head };
        return LG_OK;
    }
    int64_t dl = 0, dh = 0;
    if (lg_json_typeof(v) != LG_JSON_ARRAY || lg_json_size(v) != 2 || !lg_json_int(lg_json_at(v, 0), &dl) ||
        !lg_json_int(lg_json_at(v, 1), &dh))
        return BAD(rd, "%s: key %s[%lld][%lld]: neither a role nor [layer, head]", rd->name, where, l, h);
    if (r->same_index)
        return BAD(rd, "%s: key %s[%lld][%lld]: a donor needs \"share\": \"donor\"", rd->name, where, l, h);
    if (dl < 0 || dl >= layer || dh < 0 || dh >= r->n_head_kv ||
        r->role[dl * r->n_head_kv + dh].kind != LG_ROLE_RETRIEVAL)
        return BAD(rd, "%s: key %s[%lld][%lld]: [%lld, %lld] is no retrieval head of an earlier layer", rd->name, where,
                   l, h, (long long)dl, (long long)dh);
    *out = (lg_role){ LG_ROLE_DONOR, (int16_t)dl, (int16_t)dh };
    return LG_OK;
}

static lg_status read_roles(const reader *rd, const lg_json *list, lg_roles *r) {
    if (!list) return BAD(rd, "%s: key roles is missing", rd->name);
    if (lg_json_typeof(list) != LG_JSON_ARRAY || lg_json_size(list) != r->n_layer)
        return BAD(rd, "%s: key roles is no list of n_layer = %lld lists", rd->name, (long long)r->n_layer);
    for (int64_t l = 0; l < r->n_layer; l++) {
        const lg_json *row = lg_json_at(list, l);
        if (lg_json_typeof(row) != LG_JSON_ARRAY || lg_json_size(row) != r->n_head_kv)
            return BAD(rd, "%s: key roles[%lld] is no list of n_head_kv = %lld roles", rd->name, (long long)l,
                       (long long)r->n_head_kv);
        for (int64_t h = 0; h < r->n_head_kv; h++) {
            lg_status st = read_entry(rd, lg_json_at(row, h), r, l, h);
            if (st != LG_OK) return st;
        }
    }
    return LG_OK;
}

/* Whole 1024ths, so that every back end makes the same budgets of them. */
static lg_status read_share(const reader *rd, const lg_json *list, lg_roles *r) {
    if (!list || lg_json_typeof(list) == LG_JSON_NULL) return LG_OK;
    if (lg_json_typeof(list) != LG_JSON_ARRAY || lg_json_size(list) != r->n_layer)
        return BAD(rd, "%s: key budget_share is no list of n_layer = %lld lists", rd->name, (long long)r->n_layer);
    lg_status st = lg_roles_spread(r, rd->err);
    for (int64_t l = 0; st == LG_OK && l < r->n_layer; l++) {
        const lg_json *row = lg_json_at(list, l);
        if (lg_json_typeof(row) != LG_JSON_ARRAY || lg_json_size(row) != r->n_head_kv)
            return BAD(rd, "%s: key budget_share[%lld] is no list of n_head_kv = %lld numbers", rd->name, (long long)l, (long long)r->n_head_kv);
        for (int64_t h = 0; h < r->n_head_kv; h++) {
            double v;
            const int64_t i = l * r->n_head_kv + h;
            if (!lg_json_num(lg_json_at(row, h), &v) || !(v >= 0 && v <= LG_SHARE_MAX / LG_SHARE_ONE))
                return BAD(rd, "%s: key budget_share[%lld][%lld] is no number from 0 to %d", rd->name, (long long)l, (long long)h,
                           LG_SHARE_MAX / LG_SHARE_ONE);
            r->share[i] = r->role[i].kind == LG_ROLE_RETRIEVAL ? LG_SHARE_ONE : (int32_t)(v * LG_SHARE_ONE + 0.5);
        }
    }
    return st;
}

/* A share in whole 1024ths, as above. */
static lg_status read_keep(const reader *rd, const lg_json *root, lg_roles *r) {
    lg_status st;
    double v = 0;
    const lg_json *keep = lg_json_get(root, "keep");
    if (keep && lg_json_typeof(keep) != LG_JSON_NULL && (!lg_json_num(keep, &v) || !(v >= 0 && v <= 1)))
        return BAD(rd, "%s: key keep is no number from 0 to 1", rd->name);
    r->keep = (int64_t)(v * LG_SHARE_ONE + 0.5);
    LG_TRY(get_optional(rd, root, "observe", 1, &r->observe));
    LG_TRY(get_optional(rd, root, "refresh", 1, &r->refresh));
    if (r->observe > LG_OBSERVE_ROWS) return BAD(rd, "%s: key observe: %lld is above %d", rd->name, (long long)r->observe, LG_OBSERVE_ROWS);
    if (r->observe < 0) r->observe = 0;
    if (r->refresh < 0) r->refresh = 0;
done:
    return st;
}

static lg_status from_json(lg_roles **out, const char *name, const lg_json *root, lg_error *err) {
    lg_status st;
    lg_roles *r = NULL;
    reader rd = { name, err };
    const char *s = NULL;
    int64_t version = 0, n_layer = 0, n_head_kv = 0, n_retrieval = 0;
    *out = NULL;
    if (lg_json_typeof(root) != LG_JSON_OBJECT) return BAD(&rd, "%s: a roles file is one JSON object", name);
    LG_TRY(get_text(&rd, root, "", "format", &s));
    if (strcmp(s, "longan-roles")) LG_TRY(BAD(&rd, "%s: key format is not \"longan-roles\"", name));
    LG_TRY(get_int(&rd, root, "", "version", 1, 1, &version));
    const lg_json *model = lg_json_get(root, "model");
    if (!model || lg_json_typeof(model) != LG_JSON_OBJECT) LG_TRY(BAD(&rd, "%s: key model is missing or no object", name));
    LG_TRY(get_int(&rd, model, "model.", "n_layer", 1, LG_ROLES_MAX_LAYER, &n_layer));
    LG_TRY(get_int(&rd, model, "model.", "n_head_kv", 1, LG_ROLES_MAX_HEAD, &n_head_kv));
    /* Before anything is allocated: the lists must really be that long. */
    if (lg_json_size(lg_json_get(root, "roles")) != n_layer)
        LG_TRY(BAD(&rd, "%s: key roles is no list of n_layer = %lld lists", name, (long long)n_layer));
    r = lg_roles_new(n_layer, n_head_kv);
    if (!r) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: out of memory", name));
    LG_TRY(get_text(&rd, model, "model.", "family", &s));
    if (!*s || strlen(s) >= sizeof r->family) LG_TRY(BAD(&rd, "%s: key model.family is not 32 hex digits", name));
    memcpy(r->family, s, strlen(s) + 1);
    LG_TRY(get_text(&rd, root, "", "share", &s));
    r->same_index = !strcmp(s, "same-index");
    if (!r->same_index && strcmp(s, "donor")) LG_TRY(BAD(&rd, "%s: key share is neither \"donor\" nor \"same-index\"", name));
    LG_TRY(read_roles(&rd, lg_json_get(root, "roles"), r));
    LG_TRY(get_optional(&rd, root, "budget", 1, &r->budget));
    LG_TRY(get_optional(&rd, root, "sinks", 0, &r->sinks));
    LG_TRY(get_optional(&rd, root, "recents", 0, &r->recents));
    LG_TRY(get_optional(&rd, root, "n_retrieval", 0, &n_retrieval));
    if (n_retrieval >= 0 && n_retrieval != r->n_retrieval)
        LG_TRY(BAD(&rd, "%s: key n_retrieval is %lld, but %lld heads are", name, (long long)n_retrieval,
                   (long long)r->n_retrieval));
    LG_TRY(read_share(&rd, lg_json_get(root, "budget_share"), r));
    LG_TRY(read_keep(&rd, root, r));
    LG_TRY(check_share(r, name, err));
    *out = r;
    r = NULL;
done:
    lg_roles_free(r);
    return st;
}

lg_status lg_roles_load(lg_roles **out, const char *path, lg_error *err) {
    lg_json *root = NULL;
    *out = NULL;
    lg_status st = lg_json_load(&root, path, max_file_bytes, err);
    if (st == LG_OK) st = from_json(out, path, root, err);
    lg_json_free(root);
    return st;
}

lg_status lg_roles_parse(lg_roles **out, const char *name, const char *text, int64_t n, lg_error *err) {
    lg_json *root = NULL;
    *out = NULL;
    lg_status st = lg_json_parse(&root, name, text, n, err);
    if (st == LG_OK) st = from_json(out, name, root, err);
    lg_json_free(root);
    return st;
}

lg_status lg_roles_check(const lg_roles *r, const char *name, lg_error *err) {
    int64_t count = 0;
    for (int64_t l = 0; l < r->n_layer; l++)
        for (int64_t h = 0; h < r->n_head_kv; h++) {
            const lg_role *e = &r->role[l * r->n_head_kv + h];
            count += e->kind == LG_ROLE_RETRIEVAL;
            if (e->kind != LG_ROLE_DONOR) continue;
            if (e->donor_layer < 0 || e->donor_layer >= l || e->donor_head < 0 || e->donor_head >= r->n_head_kv ||
                r->role[e->donor_layer * r->n_head_kv + e->donor_head].kind != LG_ROLE_RETRIEVAL)
                return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: roles[%lld][%lld]: the donor is no retrieval head of an earlier layer",
                                    name, (long long)l, (long long)h);
            int64_t nearest = l - 1;
            while (nearest >= 0 && r->role[nearest * r->n_head_kv + h].kind != LG_ROLE_RETRIEVAL) nearest--;
            if (r->same_index && (e->donor_head != h || e->donor_layer != nearest))
                return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: roles[%lld][%lld]: not the nearest retrieval head of its index",
                                    name, (long long)l, (long long)h);
        }
    if (count != r->n_retrieval)
        return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: n_retrieval is %lld, but %lld heads are", name,
                            (long long)r->n_retrieval, (long long)count);
    return check_share(r, name, err);
}

/* ---- writing ---------------------------------------------------------------------------------------- */
static bool put_role(lg_text *t, const lg_roles *r, const lg_role *e) {
    if (e->kind == LG_ROLE_RETRIEVAL) return lg_base_text_printf(t, "\"retrieval\"");
    if (e->kind == LG_ROLE_WINDOW) return lg_base_text_printf(t, "\"window\"");
    if (r->same_index) return lg_base_text_printf(t, "\"sparse\"");
    return lg_base_text_printf(t, "[%d, %d]", e->donor_layer, e->donor_head);
}

/* One layer a line, so that two maps can be compared with diff. */
static bool put_rows(lg_text *t, const lg_roles *r, const char *key, const double *value, const int32_t *share) {
    bool ok = lg_base_text_printf(t, ",\n \"%s\": [", key);
    for (int64_t l = 0; ok && l < r->n_layer; l++) {
        ok = lg_base_text_printf(t, "%s\n  [", l ? "," : "");
        for (int64_t h = 0; ok && h < r->n_head_kv; h++) {
            ok = lg_base_text_printf(t, "%s", h ? ", " : "");
            if (!ok) break;
            int64_t i = l * r->n_head_kv + h;
            ok = value ? lg_base_text_printf(t, "%.6g", value[i]) : share ? lg_base_text_printf(t, "%.10g", (double)share[i] / LG_SHARE_ONE)
                       : put_role(t, r, &r->role[i]);
        }
        ok = ok && lg_base_text_printf(t, "]");
    }
    return ok && lg_base_text_printf(t, "]");
}

lg_status lg_roles_format(lg_text *out, const lg_roles *r, const lg_roles_notes *notes, lg_error *err) {
    lg_status st = lg_roles_check(r, "roles", err);
    if (st != LG_OK) return st;
    bool ok = lg_base_text_printf(out, "{\"format\": \"longan-roles\", \"version\": 1,\n \"model\": {\"family\": ") &&
              lg_json_put_str(out, r->family, (int64_t)strlen(r->family)) &&
              lg_base_text_printf(out, ", \"n_layer\": %lld, \"n_head_kv\": %lld},\n \"share\": \"%s\",\n \"n_retrieval\": %lld",
                                  (long long)r->n_layer, (long long)r->n_head_kv, r->same_index ? "same-index" : "donor",
                                  (long long)r->n_retrieval);
    if (ok && r->budget >= 0) ok = lg_base_text_printf(out, ", \"budget\": %lld", (long long)r->budget);
    if (ok && r->sinks >= 0) ok = lg_base_text_printf(out, ", \"sinks\": %lld", (long long)r->sinks);
    if (ok && r->recents >= 0) ok = lg_base_text_printf(out, ", \"recents\": %lld", (long long)r->recents);
    if (ok && r->keep) ok = lg_base_text_printf(out, ", \"keep\": %.10g", (double)r->keep / LG_SHARE_ONE);
    if (ok && r->observe) ok = lg_base_text_printf(out, ", \"observe\": %lld", (long long)r->observe);
    if (ok && r->refresh) ok = lg_base_text_printf(out, ", \"refresh\": %lld", (long long)r->refresh);
    ok = ok && put_rows(out, r, "roles", NULL, NULL);
    if (ok && r->share) ok = put_rows(out, r, "budget_share", NULL, r->share);
    if (ok && notes && notes->made) ok = lg_base_text_printf(out, ",\n \"made\": ") && lg_base_text_append(out, notes->made, (int64_t)strlen(notes->made));
    if (ok && notes && notes->coverage) ok = put_rows(out, r, "coverage", notes->coverage, NULL);
    if (ok && notes && notes->sensitivity) ok = put_rows(out, r, "sensitivity", notes->sensitivity, NULL);
    ok = ok && lg_base_text_printf(out, "}\n");
    return ok ? LG_OK : lg_base_fail(err, LG_ERR_NOMEM, -1, "roles: out of memory");
}

lg_status lg_roles_write(const char *path, const lg_roles *r, const lg_roles_notes *notes, lg_error *err) {
    lg_status st;
    lg_text t = { 0 };
    lg_writer w = { 0 };
    LG_TRY(lg_roles_format(&t, r, notes, err));
    LG_TRY(lg_file_create(&w, path, err));
    LG_TRY(lg_file_write(&w, t.data, t.n, err));
    LG_TRY(lg_file_commit(&w, err));
done:
    lg_file_abandon(&w);
    lg_text_free(&t);
    return st;
}
