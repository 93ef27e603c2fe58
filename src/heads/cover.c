/* cover: who would cover whose attention, and the choice of retrieval heads from it.
 *
 * Layers come in order. The tokens that a layer's heads would pick are kept (as lists, the best first), its attention
 * is not: each head's mass on all earlier sets is summed at once, so one layer's K is all that must be there. */
#include "heads/cover.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

const int32_t lg_cover_share[LG_COVER_LEVELS] = { 0, 128, 256, 384, 512, 768, LG_SHARE_ONE, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192 };

lg_status lg_cover_new(lg_cover *cv, int64_t n_layer, int64_t n_head_kv, int64_t n_group, int64_t head_dim,
                       int64_t sinks, int64_t recents, lg_error *err) {
    memset(cv, 0, sizeof *cv);
    cv->n_layer = n_layer;
    cv->n_head_kv = n_head_kv;
    cv->n_group = n_group;
    cv->head_dim = head_dim;
    cv->sinks = sinks;
    cv->recents = recents;
    int64_t n = n_layer * n_head_kv;
    cv->sum_c = lg_base_calloc(LG_COVER_LEVELS * n * n, (int64_t)sizeof(double));
    cv->sum_w = lg_base_calloc(LG_COVER_LEVELS * n, (int64_t)sizeof(double));
    cv->all_c = lg_base_calloc(LG_COVER_LEVELS * n * n, (int64_t)sizeof(double));
    cv->all_w = lg_base_calloc(LG_COVER_LEVELS * n, (int64_t)sizeof(double));
    if (cv->sum_c && cv->sum_w && cv->all_c && cv->all_w) {
        cv->c = cv->all_c + LG_COVER_ONE * n * n;
        cv->w = cv->all_w + LG_COVER_ONE * n;
        return LG_OK;
    }
    lg_cover_free(cv);
    return lg_base_fail(err, LG_ERR_NOMEM, -1, "calibration: out of memory for %lld heads", (long long)n);
}

void lg_cover_free(lg_cover *cv) {
    lg_base_free(cv->pos);
    lg_base_free(cv->set);
    lg_base_free(cv->sum_c);
    lg_base_free(cv->sum_w);
    lg_base_free(cv->all_c);
    lg_base_free(cv->all_w);
    memset(cv, 0, sizeof *cv);
}

lg_status lg_cover_begin(lg_cover *cv, const int64_t *pos, int64_t n_pos, int64_t budget, lg_error *err) {
    int64_t n = cv->n_layer * cv->n_head_kv, cells = 0;
    cv->budget = budget > cv->sinks + cv->recents ? budget : cv->sinks + cv->recents;
    lg_base_free(cv->pos);
    lg_base_free(cv->set);
    cv->n_pos = n_pos;
    cv->pos = lg_base_calloc(n_pos, (int64_t)sizeof *cv->pos);
    for (int k = 0; k < LG_COVER_LEVELS; k++)
        cv->extra[k] = lg_ops_share(cv->budget, cv->sinks + cv->recents, lg_cover_share[k]) - cv->sinks - cv->recents;
    bool fits = lg_base_mul(n_pos * n, cv->extra[LG_COVER_LEVELS - 1] + 1, &cells);
    cv->set = fits ? lg_base_calloc(cells, (int64_t)sizeof *cv->set) : NULL;
    if (!cv->pos || !cv->set)
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "calibration: out of memory for %lld positions", (long long)n_pos);
    memcpy(cv->pos, pos, (size_t)n_pos * sizeof *pos);
    memset(cv->sum_c, 0, (size_t)(LG_COVER_LEVELS * n * n) * sizeof(double));
    memset(cv->sum_w, 0, (size_t)(LG_COVER_LEVELS * n) * sizeof(double));
    return LG_OK;
}

/* out[t] = q . k_t. Four sums break the chain of additions. */
static void dots(float *out, const float *q, const float *k, int64_t n, int64_t dim) {
    for (int64_t t = 0; t < n; t++, k += dim) {
        float s[16] = { 0 };
        int64_t d = 0;
        for (; d + 16 <= dim; d += 16)
            for (int64_t j = 0; j < 16; j++) s[j] += q[d + j] * k[d + j];
        float sum = 0;
        for (int64_t j = 0; j < 16; j++) sum += s[j];
        for (; d < dim; d++) sum += q[d] * k[d];
        out[t] = sum;
    }
}

/* prob[t] += softmax(scale * score)[t] * share; score is spoiled. */
static void add_softmax(float *prob, float *score, int64_t n, float scale, float share) {
    float max = -INFINITY;
    for (int64_t t = 0; t < n; t++) max = score[t] > max ? score[t] : max;
    double sum = 0;
    for (int64_t t = 0; t < n; t++) {
        score[t] = expf((score[t] - max) * scale);
        sum += (double)score[t];
    }
    float f = (float)((double)share / sum);
    for (int64_t t = 0; t < n; t++) prob[t] += score[t] * f;
}

typedef struct scratch { float *prob, *score, *mean; struct rank { float score; int32_t token; } *rank; } scratch;

static bool scratch_new(scratch *s, int64_t len, int64_t dim) {
    s->prob = lg_base_calloc(len, (int64_t)sizeof(float));
    s->score = lg_base_calloc(len, (int64_t)sizeof(float));
    s->rank = lg_base_calloc(len, (int64_t)sizeof *s->rank);
    s->mean = lg_base_calloc(dim, (int64_t)sizeof(float));
    return s->prob && s->score && s->rank && s->mean;
}

static void scratch_free(scratch *s) {
    lg_base_free(s->prob);
    lg_base_free(s->score);
    lg_base_free(s->rank);
    lg_base_free(s->mean);
}

static int better(const void *a, const void *b) { /* equal scores: the lower position first */
    const struct rank *x = a, *y = b;
    return x->score > y->score ? -1 : x->score < y->score ? 1 : x->token < y->token ? -1 : 1;
}

/* One position and head: its attention, averaged over the query group, into s->prob; at every level k the mass on what each
 * earlier head r would pick into mass[r * LEVELS + k], on the window into the row behind; then the head's own picks into the table. */
static void look(lg_cover *cv, int64_t layer, int64_t head, int64_t p, const float *q, const float *k, scratch *s, float *mass) {
    const int64_t n = cv->n_layer * cv->n_head_kv, dim = cv->head_dim, len = cv->pos[p] + 1, room = cv->extra[LG_COVER_LEVELS - 1];
    const int64_t before = layer * cv->n_head_kv, sinks = cv->sinks < len ? cv->sinks : len;
    const int64_t tail = len - cv->recents > sinks ? len - cv->recents : sinks, middle = tail - sinks; /* [sinks, tail): to choose from */
    const float scale = 1.0f / sqrtf((float)dim), share = 1.0f / (float)cv->n_group;
    float forced = 0;
    memset(s->prob, 0, (size_t)len * sizeof(float));
    memset(s->mean, 0, (size_t)dim * sizeof(float));
    for (int64_t g = 0; g < cv->n_group; g++) {
        for (int64_t d = 0; d < dim; d++) s->mean[d] += q[g * dim + d] * share;
        dots(s->score, q + g * dim, k, len, dim);
        add_softmax(s->prob, s->score, len, scale, share);
    }
    for (int64_t t = 0; t < sinks; t++) forced += s->prob[t];
    for (int64_t t = tail; t < len; t++) forced += s->prob[t];
    for (int64_t r = 0; r <= before; r++, mass += LG_COVER_LEVELS) {
        const int32_t *set = r < before ? cv->set + (p * n + r) * (room + 1) : NULL;
        float m = forced;
        int64_t j = 0;
        for (int level = 0; level < LG_COVER_LEVELS; level++) {
            for (; j < cv->extra[level] && j < middle; j++) m += s->prob[set ? set[j] : tail - 1 - j];
            mass[level] = m;
        }
    }
    dots(s->score, s->mean, k, len, dim);
    for (int64_t t = 0; t < middle; t++) s->rank[t] = (struct rank){ s->score[sinks + t], (int32_t)(sinks + t) };
    qsort(s->rank, (size_t)middle, sizeof *s->rank, better);
    int32_t *own = cv->set + (p * n + before + head) * (room + 1);
    for (int64_t t = 0; t < middle && t < room; t++) own[t] = s->rank[t].token;
}

lg_status lg_cover_layer(lg_cover *cv, int64_t layer, const float *q, const float *const *k, lg_error *err) {
    int64_t n = cv->n_layer * cv->n_head_kv, heads = cv->n_head_kv, before = layer * heads;
    int64_t q_row = heads * cv->n_group * cv->head_dim, n_job = cv->n_pos * heads;
    int64_t len = cv->n_pos ? cv->pos[cv->n_pos - 1] + 1 : 0;
    /* Masses per position, added up in order afterwards: the sums do not depend on the threads. */
    float *mass = lg_base_calloc(n_job * (before + 1), LG_COVER_LEVELS * (int64_t)sizeof(float));
    bool ok = mass != NULL;
#pragma omp parallel if (n_job * len > 1 << 16)
    {
        scratch s;
        memset(&s, 0, sizeof s);
        bool mine = scratch_new(&s, len, cv->head_dim);
#pragma omp critical
        ok = ok && mine;
#pragma omp barrier
        if (ok) {
#pragma omp for schedule(static)
            for (int64_t j = 0; j < n_job; j++) {
                int64_t p = j / heads, h = j % heads;
                look(cv, layer, h, p, q + p * q_row + h * cv->n_group * cv->head_dim, k[h], &s, mass + j * (before + 1) * LG_COVER_LEVELS);
            }
        }
        scratch_free(&s);
    }
    if (!ok) {
        lg_base_free(mass);
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "calibration: out of memory at layer %lld", (long long)layer);
    }
    for (int64_t j = 0; j < n_job; j++) {
        const float *row = mass + j * (before + 1) * LG_COVER_LEVELS;
        const int64_t i = before + j % heads;
        for (int64_t level = 0; level < LG_COVER_LEVELS; level++) {
            for (int64_t r = 0; r < before; r++) cv->sum_c[(level * n + r) * n + i] += (double)row[r * LG_COVER_LEVELS + level];
            cv->sum_w[level * n + i] += (double)row[before * LG_COVER_LEVELS + level];
        }
    }
    lg_base_free(mass);
    return LG_OK;
}

void lg_cover_end(lg_cover *cv, double weight) {
    int64_t n = cv->n_layer * cv->n_head_kv;
    double old = cv->weight / (cv->weight + weight), fresh = weight / (cv->weight + weight) / (double)cv->n_pos;
    for (int64_t i = 0; i < LG_COVER_LEVELS * n * n; i++) cv->all_c[i] = cv->all_c[i] * old + cv->sum_c[i] * fresh;
    for (int64_t i = 0; i < LG_COVER_LEVELS * n; i++) cv->all_w[i] = cv->all_w[i] * old + cv->sum_w[i] * fresh;
    cv->weight += weight;
}

/* ---- the choice ------------------------------------------------------------------------------------- */
/* What one unit of coverage of head i is worth: its whole sensitivity spread over what the window misses. */
static double worth(const double *sens, const double *w, int64_t i) {
    double missing = 1 - w[i];
    return sens[i] / (missing > 1e-3 ? missing : 1e-3);
}

/* The donor of head i among the marked heads: -1 the window. *cov: what i then finds. */
static int64_t donor_of(int64_t heads, int64_t n, int64_t i, const double *c, const double *w, const uint8_t *mark,
                        bool same_index, double *cov) {
    int64_t best = -1, first = i / heads * heads;
    *cov = w[i];
    if (same_index) {
        for (int64_t r = i - heads; r >= 0; r -= heads)
            if (mark[r]) {
                *cov = c[r * n + i];
                return r;
            }
        return -1;
    }
    for (int64_t r = 0; r < first; r++)
        if (mark[r] && c[r * n + i] > *cov) {
            *cov = c[r * n + i];
            best = r;
        }
    return best;
}

double lg_cover_objective(int64_t n_layer, int64_t n_head_kv, const double *c, const double *w, const double *sens,
                          const uint8_t *retrieval, bool same_index) {
    int64_t n = n_layer * n_head_kv;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double cov = 1;
        if (!retrieval[i]) donor_of(n_head_kv, n, i, c, w, retrieval, same_index, &cov);
        sum += worth(sens, w, i) * (cov - w[i]);
    }
    return sum;
}

lg_roles *lg_cover_roles(int64_t n_layer, int64_t n_head_kv, const double *c, const double *w, const uint8_t *retrieval,
                         bool same_index, double *coverage) {
    int64_t n = n_layer * n_head_kv;
    lg_roles *r = lg_roles_new(n_layer, n_head_kv);
    if (!r) return NULL;
    r->same_index = same_index;
    for (int64_t i = 0; i < n; i++) {
        double cov = 1;
        if (retrieval[i]) {
            r->role[i].kind = LG_ROLE_RETRIEVAL;
            r->n_retrieval++;
        } else {
            int64_t d = donor_of(n_head_kv, n, i, c, w, retrieval, same_index, &cov);
            if (d >= 0) r->role[i] = (lg_role){ LG_ROLE_DONOR, (int16_t)(d / n_head_kv), (int16_t)(d % n_head_kv) };
        }
        if (coverage) coverage[i] = cov;
    }
    return r;
}

/* What the objective gains when head r joins the marked ones whose coverages are cov[]. */
static double gain_of(int64_t heads, int64_t n, int64_t r, const double *c, const double *w, const double *sens,
                      const uint8_t *mark, bool same_index, const double *cov) {
    double gain = worth(sens, w, r) * (1 - cov[r]);
    if (same_index) { /* it takes over its index down to the next retrieval head, for better or worse */
        for (int64_t i = r + heads; i < n && !mark[i]; i += heads) gain += worth(sens, w, i) * (c[r * n + i] - cov[i]);
        return gain;
    }
    for (int64_t i = (r / heads + 1) * heads; i < n; i++)
        if (!mark[i] && c[r * n + i] > cov[i]) gain += worth(sens, w, i) * (c[r * n + i] - cov[i]);
    return gain;
}

lg_status lg_cover_choose(int64_t n_layer, int64_t n_head_kv, const double *c, const double *w, const double *sens,
                          bool same_index, int64_t *order, double *gain, lg_error *err) {
    int64_t n = n_layer * n_head_kv;
    uint8_t *mark = lg_base_alloc(n);
    double *cov = lg_base_calloc(n, (int64_t)sizeof *cov);
    if (!mark || !cov) {
        lg_base_free(mark);
        lg_base_free(cov);
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "calibration: out of memory for %lld heads", (long long)n);
    }
    memcpy(cov, w, (size_t)n * sizeof *cov);
    for (int64_t step = 0; step < n; step++) {
        int64_t best = -1, end = same_index && step < n_head_kv ? n_head_kv : n;
        double best_gain = 0;
        for (int64_t r = 0; r < end; r++) {
            if (mark[r]) continue;
            double g = gain_of(n_head_kv, n, r, c, w, sens, mark, same_index, cov);
            if (best < 0 || g > best_gain) {
                best = r;
                best_gain = g;
            }
        }
        mark[best] = 1;
        order[step] = best;
        gain[step] = best_gain;
        for (int64_t i = 0; i < n; i++) {
            cov[i] = 1;
            if (!mark[i]) donor_of(n_head_kv, n, i, c, w, mark, same_index, &cov[i]);
        }
    }
    lg_base_free(mark);
    lg_base_free(cov);
    return LG_OK;
}

/* ---- shares of the budget --------------------------------------------------------------------------- */
/* The next corner of the lower convex hull behind `level`: that of the steepest fall; -1: no further level loses less. */
static int next_corner(const double *loss, int level, double *slope) {
    int best = -1;
    *slope = 0;
    for (int k = level + 1; k < LG_COVER_LEVELS; k++) {
        const double fall = (loss[level] - loss[k]) / (double)(lg_cover_share[k] - lg_cover_share[level]);
        if (fall > 0 && fall >= *slope) best = k, *slope = fall;
    }
    return best;
}

lg_status lg_cover_spread(lg_roles *r, const double *loss, lg_error *err) {
    const int64_t n = r->n_layer * r->n_head_kv;
    int64_t left = 0;
    lg_status st = lg_roles_spread(r, err);
    struct corner { double slope; int level, next; } *at = lg_base_calloc(n, (int64_t)sizeof *at);
    if (st == LG_OK && !at) st = lg_base_fail(err, LG_ERR_NOMEM, -1, "calibration: out of memory for %lld heads", (long long)n);
    for (int64_t i = 0; st == LG_OK && i < n; i++) {
        if (r->role[i].kind == LG_ROLE_RETRIEVAL) continue; /* slope 0 */
        at[i].next = next_corner(loss + i * LG_COVER_LEVELS, 0, &at[i].slope);
        left += LG_SHARE_ONE;
        r->share[i] = 0;
    }
    while (st == LG_OK && left > 0) {
        int64_t head = 0;
        for (int64_t i = 1; i < n; i++)
            if (at[i].slope > at[head].slope) head = i;
        if (at[head].slope <= 0) break; /* nobody gains */
        int64_t more = lg_cover_share[at[head].next] - r->share[head];
        if (more > left) more = left; /* the last one takes what is there */
        r->share[head] += (int32_t)more;
        left -= more;
        at[head].level = at[head].next;
        at[head].next = next_corner(loss + head * LG_COVER_LEVELS, at[head].level, &at[head].slope);
    }
    lg_base_free(at);
    return st;
}
