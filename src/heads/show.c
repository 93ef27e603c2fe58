/* show: a roles file for the eye: a summary in text or JSON, and a heat-map in SVG. Reads the file twice: once
 * through the roles room, which refuses what does not hold, once as JSON for the notes. */
#include <math.h>
#include <string.h>

#include "longan/heads.h"
#include "model/roles.h"

typedef struct sheet {
    lg_roles *r;
    int64_t n;
    int32_t *readers;              /* [n] how many heads read this head's set */
    double *coverage, *sensitivity; /* [n] or NULL where the file has none (of that size) */
    double *share;                 /* [n] of the budget, or NULL */
} sheet;

static double *grid(const lg_json *root, const char *key, const lg_roles *r) {
    const lg_json *list = lg_json_get(root, key);
    if (lg_json_size(list) != r->n_layer) return NULL;
    double *v = lg_base_calloc(r->n_layer * r->n_head_kv, (int64_t)sizeof *v);
    for (int64_t l = 0; v && l < r->n_layer; l++)
        for (int64_t h = 0; h < r->n_head_kv; h++) {
            double *x = &v[l * r->n_head_kv + h];
            if (lg_json_num(lg_json_at(lg_json_at(list, l), h), x) && isfinite(*x)) continue;
            lg_base_free(v);
            return NULL;
        }
    return v;
}

static void sheet_free(sheet *s) {
    lg_roles_free(s->r);
    lg_base_free(s->readers);
    lg_base_free(s->coverage);
    lg_base_free(s->sensitivity);
    lg_base_free(s->share);
    memset(s, 0, sizeof *s);
}

static lg_status sheet_load(sheet *s, const char *path, lg_error *err) {
    lg_status st;
    lg_json *root = NULL;
    memset(s, 0, sizeof *s);
    LG_TRY(lg_roles_load(&s->r, path, err));
    LG_TRY(lg_json_load(&root, path, 64 << 20, err));
    s->n = s->r->n_layer * s->r->n_head_kv;
    s->coverage = grid(root, "coverage", s->r);
    s->sensitivity = grid(root, "sensitivity", s->r);
    s->readers = lg_base_calloc(s->n, (int64_t)sizeof *s->readers);
    if (s->r->share) s->share = lg_base_calloc(s->n, (int64_t)sizeof *s->share);
    if (!s->readers || (s->r->share && !s->share)) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: out of memory", path));
    for (int64_t i = 0; i < s->n; i++) {
        const lg_role *e = &s->r->role[i];
        if (s->share) s->share[i] = (double)s->r->share[i] / LG_SHARE_ONE;
        if (e->kind == LG_ROLE_DONOR) s->readers[e->donor_layer * s->r->n_head_kv + e->donor_head]++;
    }
done:
    lg_json_free(root);
    if (st != LG_OK) sheet_free(s);
    return st;
}

static int64_t count(const sheet *s, lg_role_kind kind) {
    int64_t n = 0;
    for (int64_t i = 0; i < s->n; i++) n += s->r->role[i].kind == kind;
    return n;
}

/* ---- text and JSON ---------------------------------------------------------------------------------- */
static bool put_optional(lg_text *t, const char *key, int64_t v) {
    if (v < 0) return lg_base_text_printf(t, ",\"%s\":null", key);
    return lg_base_text_printf(t, ",\"%s\":%lld", key, (long long)v);
}

static bool put_grid(lg_text *t, const sheet *s, const char *key, const double *v) {
    if (!v) return lg_base_text_printf(t, ",\"%s\":null", key);
    bool ok = lg_base_text_printf(t, ",\"%s\":[", key);
    for (int64_t i = 0; ok && i < s->n; i++) {
        bool first = i % s->r->n_head_kv == 0, last = (i + 1) % s->r->n_head_kv == 0;
        ok = lg_base_text_printf(t, "%s", first ? (i ? ",[" : "[") : ",") && lg_json_put_num(t, v[i]) &&
             lg_base_text_printf(t, "%s", last ? "]" : "");
    }
    return ok && lg_base_text_printf(t, "]");
}

static bool show_json(lg_text *t, const sheet *s) {
    const lg_roles *r = s->r;
    bool ok = lg_base_text_printf(t, "{\"family\":") && lg_json_put_str(t, r->family, (int64_t)strlen(r->family)) &&
              lg_base_text_printf(t, ",\"share\":\"%s\",\"n_layer\":%lld,\"n_head_kv\":%lld,\"n_retrieval\":%lld,\"n_donor\":%lld,\"n_window\":%lld",
                                  r->same_index ? "same-index" : "donor", (long long)r->n_layer, (long long)r->n_head_kv,
                                  (long long)r->n_retrieval, (long long)count(s, LG_ROLE_DONOR), (long long)count(s, LG_ROLE_WINDOW)) &&
              put_optional(t, "budget", r->budget) && put_optional(t, "sinks", r->sinks) && put_optional(t, "recents", r->recents) &&
              (!r->keep || lg_base_text_printf(t, ",\"keep\":%.10g", (double)r->keep / LG_SHARE_ONE)) && put_optional(t, "observe", r->observe ? r->observe : -1) &&
              put_optional(t, "refresh", r->refresh ? r->refresh : -1) &&
              lg_base_text_printf(t, ",\"roles\":[");
    for (int64_t i = 0; ok && i < s->n; i++) {
        const lg_role *e = &r->role[i];
        bool first = i % r->n_head_kv == 0, last = (i + 1) % r->n_head_kv == 0;
        ok = lg_base_text_printf(t, "%s", first ? (i ? ",[" : "[") : ",");
        if (ok && e->kind == LG_ROLE_DONOR) ok = lg_base_text_printf(t, "[%d,%d]", e->donor_layer, e->donor_head);
        else if (ok) ok = lg_base_text_printf(t, "\"%s\"", e->kind == LG_ROLE_WINDOW ? "window" : "retrieval");
        ok = ok && lg_base_text_printf(t, "%s", last ? "]" : "");
    }
    ok = ok && lg_base_text_printf(t, "],\"readers\":[");
    for (int64_t i = 0; ok && i < s->n; i++) {
        bool first = i % r->n_head_kv == 0, last = (i + 1) % r->n_head_kv == 0;
        ok = lg_base_text_printf(t, "%s%d%s", first ? (i ? ",[" : "[") : ",", s->readers[i], last ? "]" : "");
    }
    return ok && lg_base_text_printf(t, "]") && put_grid(t, s, "coverage", s->coverage) &&
           put_grid(t, s, "sensitivity", s->sensitivity) && put_grid(t, s, "budget_share", s->share) && lg_base_text_printf(t, "}");
}

static bool put_size(lg_text *t, const char *name, int64_t v) {
    return v < 0 || lg_base_text_printf(t, ", %s %lld", name, (long long)v);
}

static bool show_text(lg_text *t, const sheet *s) {
    const lg_roles *r = s->r;
    bool ok = lg_base_text_printf(t, "%s roles of family %s: %lld retrieval, %lld donor, %lld window of %lld heads",
                                  r->same_index ? "same-index" : "donor", r->family, (long long)r->n_retrieval,
                                  (long long)count(s, LG_ROLE_DONOR), (long long)count(s, LG_ROLE_WINDOW), (long long)s->n) &&
              put_size(t, "budget", r->budget) && put_size(t, "sinks", r->sinks) && put_size(t, "recents", r->recents) &&
              (!r->keep || lg_base_text_printf(t, ", keep %.4g", (double)r->keep / LG_SHARE_ONE)) && put_size(t, "observe", r->observe ? r->observe : -1) &&
              put_size(t, "refresh", r->refresh ? r->refresh : -1) &&
              lg_base_text_printf(t, "\nR:n retrieval head whose set n heads read, l.h donor, - window%s\n",
                                  s->share ? "; behind it the share of what the budget holds beyond sinks and recents" : "");
    for (int64_t l = 0; ok && l < r->n_layer; l++) {
        ok = lg_base_text_printf(t, "layer %3lld ", (long long)l);
        for (int64_t h = 0; ok && h < r->n_head_kv; h++) {
            const lg_role *e = &r->role[l * r->n_head_kv + h];
            char cell[32];
            if (e->kind == LG_ROLE_RETRIEVAL) snprintf(cell, sizeof cell, "R:%d", s->readers[l * r->n_head_kv + h]);
            else if (e->kind == LG_ROLE_DONOR) snprintf(cell, sizeof cell, "%d.%d", e->donor_layer, e->donor_head);
            else snprintf(cell, sizeof cell, "-");
            ok = lg_base_text_printf(t, " %6s", cell);
            if (!ok || !s->share) continue;
            ok = e->kind == LG_ROLE_RETRIEVAL ? lg_base_text_printf(t, "       ") : lg_base_text_printf(t, " x%-5.3g", s->share[l * r->n_head_kv + h]);
        }
        ok = ok && lg_base_text_printf(t, "\n");
    }
    return ok;
}

lg_status lg_heads_show(const char *roles_path, bool json, lg_text *out, lg_error *err) {
    sheet s;
    lg_status st = sheet_load(&s, roles_path, err);
    if (st != LG_OK) return st;
    memset(out, 0, sizeof *out);
    bool ok = json ? show_json(out, &s) : show_text(out, &s);
    sheet_free(&s);
    if (ok) return LG_OK;
    lg_text_free(out);
    return lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: out of memory", roles_path);
}

/* ---- SVG -------------------------------------------------------------------------------------------- */
enum { CELL_W = 46, CELL_H = 20, LEFT = 56, TOP = 86, GAP = 70 };

/* White to a dark blue; v in [0, 1]. */
static void blue(double v, int rgb[3]) {
    static const int from[3] = { 247, 250, 254 }, to[3] = { 24, 78, 150 };
    v = v < 0 ? 0 : v > 1 ? 1 : v;
    for (int i = 0; i < 3; i++) rgb[i] = (int)lround(from[i] + v * (to[i] - from[i]));
}

static bool put_cell(lg_text *t, double x, double y, const char *fill, bool dark, const char *label, const char *tip) {
    return lg_base_text_printf(t, "<g><title>%s</title><rect x=\"%g\" y=\"%g\" width=\"%d\" height=\"%d\" fill=\"%s\" stroke=\"#d4d8de\"/>"
                               "<text x=\"%g\" y=\"%g\" text-anchor=\"middle\" fill=\"%s\">%s</text></g>\n",
                               tip, x, y, CELL_W, CELL_H, fill, x + CELL_W / 2.0, y + CELL_H / 2.0 + 4, dark ? "#ffffff" : "#222b36", label);
}

static bool put_role_cell(lg_text *t, const sheet *s, int64_t l, int64_t h) {
    const lg_roles *r = s->r;
    int64_t i = l * r->n_head_kv + h;
    const lg_role *e = &r->role[i];
    char label[32], tip[192], fill[16], cover[80] = "";
    int rgb[3];
    bool dark = false;
    int n = s->coverage ? snprintf(cover, sizeof cover, ", coverage %.3f", s->coverage[i]) : 0;
    if (s->share && e->kind != LG_ROLE_RETRIEVAL) snprintf(cover + n, sizeof cover - (size_t)n, ", share of the budget %.3g", s->share[i]);
    if (e->kind == LG_ROLE_RETRIEVAL) {
        snprintf(label, sizeof label, "R %d", s->readers[i]);
        snprintf(tip, sizeof tip, "layer %lld head %lld: retrieval, read by %d", (long long)l, (long long)h, s->readers[i]);
        snprintf(fill, sizeof fill, "#d9480f");
        dark = true;
    } else if (e->kind == LG_ROLE_DONOR) {
        double v = s->coverage ? s->coverage[i] : 0.3;
        blue(v, rgb);
        dark = v > 0.55;
        snprintf(label, sizeof label, "%d.%d", e->donor_layer, e->donor_head);
        snprintf(tip, sizeof tip, "layer %lld head %lld: reads the set of %d.%d%s", (long long)l, (long long)h, e->donor_layer, e->donor_head, cover);
        snprintf(fill, sizeof fill, "#%02x%02x%02x", (unsigned)rgb[0], (unsigned)rgb[1], (unsigned)rgb[2]);
    } else {
        snprintf(label, sizeof label, "&#183;");
        snprintf(tip, sizeof tip, "layer %lld head %lld: window%s", (long long)l, (long long)h, cover);
        snprintf(fill, sizeof fill, "#e9ecef");
    }
    return put_cell(t, LEFT + (double)h * CELL_W, TOP + (double)l * CELL_H, fill, dark, label, tip);
}

static bool put_sensitivity(lg_text *t, const sheet *s, double left) {
    double max = 0;
    bool ok = true;
    for (int64_t i = 0; i < s->n; i++) max = s->sensitivity[i] > max ? s->sensitivity[i] : max;
    for (int64_t i = 0; ok && i < s->n; i++) {
        int64_t l = i / s->r->n_head_kv, h = i % s->r->n_head_kv;
        /* Sensitivities span decades: the square root shows the small ones too. */
        double v = max > 0 && s->sensitivity[i] > 0 ? sqrt(s->sensitivity[i] / max) : 0;
        char label[32], tip[96], fill[16];
        int rgb[3];
        blue(v, rgb);
        snprintf(label, sizeof label, "%.3f", s->sensitivity[i]);
        snprintf(tip, sizeof tip, "layer %lld head %lld: sensitivity %.5f", (long long)l, (long long)h, s->sensitivity[i]);
        snprintf(fill, sizeof fill, "#%02x%02x%02x", (unsigned)rgb[0], (unsigned)rgb[1], (unsigned)rgb[2]);
        ok = put_cell(t, left + (double)h * CELL_W, TOP + (double)l * CELL_H, fill, v > 0.55, label, tip);
    }
    return ok;
}

static bool put_axes(lg_text *t, const sheet *s, double left, const char *title) {
    bool ok = lg_base_text_printf(t, "<text x=\"%g\" y=\"%d\" font-weight=\"bold\">%s</text>\n", left, TOP - 24, title);
    for (int64_t h = 0; ok && h < s->r->n_head_kv; h++)
        ok = lg_base_text_printf(t, "<text x=\"%g\" y=\"%d\" text-anchor=\"middle\" fill=\"#5c6670\">%lld</text>\n",
                                 left + ((double)h + 0.5) * CELL_W, TOP - 6, (long long)h);
    for (int64_t l = 0; ok && l < s->r->n_layer; l++)
        ok = lg_base_text_printf(t, "<text x=\"%g\" y=\"%g\" text-anchor=\"end\" fill=\"#5c6670\">%lld</text>\n", left - 6,
                                 TOP + ((double)l + 0.5) * CELL_H + 4, (long long)l);
    return ok;
}

static bool draw(lg_text *t, const sheet *s) {
    const lg_roles *r = s->r;
    double panel = (double)r->n_head_kv * CELL_W, second = LEFT + panel + GAP;
    double width = (s->sensitivity ? second + panel : LEFT + panel) + 24, height = TOP + (double)r->n_layer * CELL_H + 24;
    if (width < 420) width = 420;
    bool ok = lg_base_text_printf(t, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%g\" height=\"%g\" viewBox=\"0 0 %g %g\" "
                                  "font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n"
                                  "<text x=\"%d\" y=\"22\" font-size=\"15\" font-weight=\"bold\">Head roles, %s: %lld of %lld heads retrieve</text>\n"
                                  "<text x=\"%d\" y=\"40\" fill=\"#5c6670\">R n: retrieval, read by n &#160; l.h: donor, darker = covers more &#160; &#183;: window</text>\n",
                                  width, height, width, height, LEFT, r->same_index ? "same index" : "donor", (long long)r->n_retrieval,
                                  (long long)s->n, LEFT) &&
              put_axes(t, s, LEFT, "roles (layer down, KV head across)");
    for (int64_t i = 0; ok && i < s->n; i++) ok = put_role_cell(t, s, i / r->n_head_kv, i % r->n_head_kv);
    if (ok && s->sensitivity) ok = put_axes(t, s, second, "sensitivity") && put_sensitivity(t, s, second);
    return ok && lg_base_text_printf(t, "</svg>\n");
}

lg_status lg_heads_plot(const char *roles_path, const char *svg_path, lg_error *err) {
    lg_status st;
    sheet s = { 0 };
    lg_text t = { 0 };
    lg_writer w = { 0 };
    LG_TRY(sheet_load(&s, roles_path, err));
    if (!draw(&t, &s)) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: out of memory", roles_path));
    LG_TRY(lg_file_create(&w, svg_path, err));
    LG_TRY(lg_file_write(&w, t.data, t.n, err));
    LG_TRY(lg_file_commit(&w, err));
done:
    lg_file_abandon(&w);
    lg_text_free(&t);
    sheet_free(&s);
    return st;
}
