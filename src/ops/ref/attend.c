/* The specification of attention over the paged cache: serial plain C, one (row, query head) at a time, sums in double.
 * Which tokens a head reads is first written down as a plain list of positions; then one softmax serves all. */
#include "ops/ref/ref.h"
#include <math.h>
#include <string.h>

typedef struct view { /* one KV head of one sequence */
    const lg_kv_layer *kv;
    const lg_kv_geom *g;
    const lg_kv_seq *seq;
    int32_t head;
} view;

static int64_t row_of(const view *v, int64_t t) {
    return (((int64_t)v->seq->page[t / LG_PAGE] * v->g->n_head_kv + v->head) * LG_PAGE + t % LG_PAGE) * v->g->row_bytes;
}

static double dot(const float *a, const float *b, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += (double)a[i] * (double)b[i];
    return s;
}

/* out[d] = softmax over the n positions in list (NULL: 0..n-1) of scale * q.k, times v. No position: zeros.
 * work: n doubles, sum: d doubles, row: d floats. */
static void attend_one(float *out, const float *q, const view *v, const int32_t *list, int64_t n, double scale, double *work,
                       double *sum, float *row) {
    const int64_t d = v->g->head_dim;
    double max = -INFINITY, total = 0;
    memset(sum, 0, (size_t)d * sizeof *sum);
    for (int64_t i = 0; i < n; i++) {
        lg_ops_kv_load(v->g, row, v->kv->k + row_of(v, list ? list[i] : i));
        work[i] = scale * dot(q, row, d);
        if (work[i] > max) max = work[i];
    }
    for (int64_t i = 0; i < n; i++) {
        const double p = exp(work[i] - max);
        lg_ops_kv_load(v->g, row, v->kv->v + row_of(v, list ? list[i] : i));
        total += p;
        for (int64_t e = 0; e < d; e++) sum[e] += p * (double)row[e];
    }
    for (int64_t e = 0; e < d; e++) out[e] = n ? (float)(sum[e] / total) : 0.0f;
}

/* score[t] = mean over the group of q_g . k_t */
static void scores(float *score, const float *q, int64_t group, const view *v, int64_t len, float *row) {
    const int64_t d = v->g->head_dim;
    for (int64_t t = 0; t < len; t++) {
        double s = 0;
        lg_ops_kv_load(v->g, row, v->kv->k + row_of(v, t));
        for (int64_t j = 0; j < group; j++) s += dot(q + j * d, row, d);
        score[t] = (float)(s / (double)group);
    }
}

static int64_t window_list(int32_t *list, int64_t len, int64_t sinks, int64_t budget) {
    int64_t n = 0;
    for (int64_t t = 0; t < len; t++)
        if (t < sinks || t >= len - (budget - sinks)) list[n++] = (int32_t)t;
    return n;
}

static int64_t set_list(int32_t *list, const int32_t *ids, int64_t n_ids, int64_t block, int64_t len) {
    int64_t n = 0;
    for (int64_t i = 0; i < n_ids; i++)
        for (int64_t t = ids[i] * block; t < (ids[i] + 1) * block && t < len; t++) list[n++] = (int32_t)t;
    return n;
}

/* The specification may allocate. An op cannot fail before sync: without memory the output is NaN. */
typedef struct scratch {
    double *work, *sum;
    float *row, *score, *unit;
    int32_t *list, *heap;
} scratch;

static bool scratch_new(scratch *s, int64_t len, int64_t d) {
    s->work = lg_base_calloc(len, sizeof *s->work);
    s->sum = lg_base_calloc(d, sizeof *s->sum);
    s->row = lg_base_calloc(d, sizeof *s->row);
    s->score = lg_base_calloc(len, sizeof *s->score);
    s->unit = lg_base_calloc(len, sizeof *s->unit);
    s->list = lg_base_calloc(len, sizeof *s->list);
    s->heap = lg_base_calloc(len, sizeof *s->heap);
    return s->work && s->sum && s->row && s->score && s->unit && s->list && s->heap;
}

static void scratch_free(scratch *s) {
    lg_base_free(s->work);
    lg_base_free(s->sum);
    lg_base_free(s->row);
    lg_base_free(s->score);
    lg_base_free(s->unit);
    lg_base_free(s->list);
    lg_base_free(s->heap);
}

static int64_t longest(const lg_kv_seq *seqs, int32_t n) {
    int64_t len = 1;
    for (int32_t i = 0; i < n; i++)
        if (seqs[i].len > len) len = seqs[i].len;
    return len;
}

void lg_ref_attend(const lg_op_attend *a) {
    const int64_t d = a->geom.head_dim, group = a->n_head / a->geom.n_head_kv;
    scratch s;
    if (scratch_new(&s, longest(a->seqs, a->n_seq), d)) {
        for (int64_t t = 0; t < a->n_tok; t++) {
            for (int32_t h = 0; h < a->n_head; h++) {
                const view v = { &a->kv, &a->geom, &a->seqs[a->seq[t]], (int32_t)(h / group) };
                const int64_t at = (t * a->n_head + h) * d;
                attend_one(a->out + at, a->q + at, &v, NULL, a->idx[t] + 1, (double)a->scale, s.work, s.sum, s.row);
            }
        }
    } else {
        for (int64_t i = 0; i < a->n_tok * a->n_head * d; i++) a->out[i] = NAN;
    }
    scratch_free(&s);
}

/* Slot k of row i from s->score. */
static void fill_slot(const lg_op_attend_hybrid *a, int32_t i, int32_t k, const scratch *s) {
    const int64_t slot = (int64_t)i * a->sets.n_slot + k, budget = lg_ops_budget(&a->spread, a->spread.slot, k, a->budget[i]);
    lg_select how = a->select;
    if (a->seqs[i].kept) how.kept = a->seqs[i].kept + k * a->sets.kept_words;
    a->sets.n[slot] = (int32_t)lg_ops_select(a->sets.idx + slot * a->sets.cap, a->sets.cap, s->score, a->seqs[i].len, budget, a->sets.block, &how,
                                             s->unit, s->heap);
}

static void hybrid_head(const lg_op_attend_hybrid *a, int32_t i, int32_t h, scratch *s) {
    const int64_t d = a->geom.head_dim, group = a->n_head / a->geom.n_head_kv, len = a->seqs[i].len;
    const int64_t at = ((int64_t)i * a->n_head + h * group) * d;
    const view v = { &a->kv, &a->geom, &a->seqs[i], h };
    const int32_t *list = s->list;
    int64_t n = len;
    if (a->dense[i] || a->read[h] == LG_HEAD_DENSE) {
        list = NULL;
    } else if (a->read[h] == LG_HEAD_WINDOW) {
        n = window_list(s->list, len, a->select.sinks, lg_ops_budget(&a->spread, a->spread.window, h, a->budget[i]));
    } else {
        const int64_t slot = (int64_t)i * a->sets.n_slot + a->read[h];
        n = set_list(s->list, a->sets.idx + slot * a->sets.cap, a->sets.n[slot], a->sets.block, len);
    }
    for (int64_t j = 0; j < group; j++)
        attend_one(a->out + at + j * d, a->q + at + j * d, &v, list, n, (double)a->scale, s->work, s->sum, s->row);
    if (!a->dense[i] && a->make[h] >= 0) {
        scores(s->score, a->q + at, group, &v, len, s->row);
        for (int32_t k = a->make[h]; k < a->make[h] + lg_ops_n_make(&a->spread, h); k++) fill_slot(a, i, k, s);
    }
}

void lg_ref_attend_hybrid(const lg_op_attend_hybrid *a) {
    const int64_t n = (int64_t)a->n_seq * a->n_head * a->geom.head_dim;
    scratch s;
    if (scratch_new(&s, longest(a->seqs, a->n_seq), a->geom.head_dim)) {
        /* Readers first: a set made here is read only by later ops. */
        for (int making = 0; making < 2; making++)
            for (int32_t i = 0; i < a->n_seq; i++)
                for (int32_t h = 0; h < a->geom.n_head_kv; h++)
                    if ((a->make[h] >= 0) == (making == 1)) hybrid_head(a, i, h, &s);
        for (int32_t i = 0; i < a->n_seq; i++) {
            if (a->dense[i] || !a->spread.n_latest) continue;
            for (int64_t t = 0; t < a->seqs[i].len; t++) s.score[t] = (float)t;
            for (int32_t k = 0; k < a->spread.n_latest; k++) fill_slot(a, i, a->spread.latest + k, &s);
        }
    } else {
        for (int64_t i = 0; i < n; i++) a->out[i] = NAN;
    }
    scratch_free(&s);
}

void lg_ref_observe(const lg_op_observe *a) {
    const int64_t d = a->geom.head_dim, group = a->n_head / a->geom.n_head_kv, len = a->seq->len;
    scratch s;
    const bool ok = scratch_new(&s, len > 0 ? len : 1, d);
    for (int32_t h = 0; h < a->geom.n_head_kv; h++) {
        const view v = { &a->kv, &a->geom, a->seq, h };
        for (int64_t t = 0; t < len; t++) a->mass[h * a->ld + t] = ok ? 0.0f : NAN;
        for (int64_t lane = 0; ok && lane < a->n_tok * group; lane++) {
            const int64_t n = a->idx[lane / group] + 1;
            const float *q = a->q + (lane / group * a->n_head + h * group + lane % group) * d;
            double max = -INFINITY, total = 0;
            for (int64_t t = 0; t < n; t++) {
                lg_ops_kv_load(&a->geom, s.row, a->kv.k + row_of(&v, t));
                s.work[t] = (double)a->scale * dot(q, s.row, d);
                if (s.work[t] > max) max = s.work[t];
            }
            for (int64_t t = 0; t < n; t++) total += exp(s.work[t] - max);
            for (int64_t t = 0; t < n; t++) a->mass[h * a->ld + t] += (float)(exp(s.work[t] - max) / total / (double)(a->n_tok * group));
        }
    }
    scratch_free(&s);
}
