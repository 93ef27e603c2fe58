/* measure: probes. One session holds the contexts of all sequences; changing the map leaves them alone. A continuation is
 * teacher forced, so its steps run as the rows of few passes (lg_session_force). */
#include "heads/measure.h"

#include <math.h>
#include <string.h>

#include "session/session.h"

typedef struct probe_seq {
    int32_t *ids;
    uint8_t *scored;
    int64_t n, n_ctx, last; /* last scored row; nothing after it is fed */
    int64_t first_row;      /* of its scored rows in dense[] */
} probe_seq;

/* A dense row is kept as its probabilities p and what KL needs beside them: KL = fixed - sum p b + log sum exp(b). */
typedef struct dense_row { double fixed; int64_t top; } dense_row;

struct lg_probe {
    lg_session *s;
    int64_t n_seq, n_vocab, n_row;
    probe_seq *seq;
    float *prob;         /* [n_row, n_vocab] */
    dense_row *dense;    /* [n_row] */
    double *kl;          /* [n_row] of the last run */
    uint8_t *same, *right;
};

enum { FORCE = 128, LANES = 16 }; /* rows of a pass; independent sums */

static double log_sum_exp(const float *x, int64_t n) {
    float max = -INFINITY;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int64_t i = 0; i < n; i++) sum += (double)expf(x[i] - max);
    return (double)max + log(sum);
}

static double dot(const float *p, const float *x, int64_t n) {
    double sum = 0;
    int64_t i = 0;
    for (; i + LANES * 16 <= n; i += LANES * 16) { /* short f32 sums, long ones in double */
        float part[LANES] = { 0 };
        for (int64_t k = 0; k < LANES * 16; k += LANES)
            for (int64_t j = 0; j < LANES; j++) part[j] += p[i + k + j] * x[i + k + j];
        for (int64_t j = 0; j < LANES; j++) sum += (double)part[j];
    }
    for (; i < n; i++) sum += (double)(p[i] * x[i]);
    return sum;
}

static int64_t most_likely(const float *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

static dense_row keep(float *p, const float *x, int64_t n) {
    double lse = log_sum_exp(x, n);
    for (int64_t i = 0; i < n; i++) p[i] = expf((float)((double)x[i] - lse));
    return (dense_row){ dot(p, x, n) - lse, most_likely(x, n) };
}

double lg_heads_kl(const float *a, const float *b, int64_t n) {
    double lse = log_sum_exp(a, n), mix = 0;
    for (int64_t i = 0; i < n; i++) mix += (double)expf((float)((double)a[i] - lse)) * ((double)a[i] - (double)b[i]);
    return mix - lse + log_sum_exp(b, n);
}

static void compare(lg_probe *p, bool dense, int64_t row, const float *x, int32_t truth) {
    float *prob = p->prob + row * p->n_vocab;
    if (dense) p->dense[row] = keep(prob, x, p->n_vocab);
    int64_t top = dense ? p->dense[row].top : most_likely(x, p->n_vocab);
    p->kl[row] = dense ? 0 : p->dense[row].fixed - dot(prob, x, p->n_vocab) + log_sum_exp(x, p->n_vocab);
    p->same[row] = top == p->dense[row].top;
    p->right[row] = top == truth;
}

/* One pass over all continuations; dense: keeps the rows, else compares with them. */
static lg_status pass(lg_probe *p, bool dense, lg_error *err) {
    lg_status st = LG_OK;
    for (int64_t i = 0; i < p->n_seq; i++) {
        const probe_seq *q = &p->seq[i];
        int64_t row = q->first_row;
        LG_TRY(lg_session_rewind(p->s, i, q->n_ctx, err));
        for (int64_t at = q->n_ctx; at <= q->last;) {
            const float *x;
            int64_t n = q->last + 1 - at < FORCE ? q->last + 1 - at : FORCE, n_row = 0, which[FORCE];
            for (int64_t t = 0; t < n; t++)
                if (q->scored[at + t]) which[n_row++] = at + t;
            LG_TRY(lg_session_force(p->s, i, q->ids + at, n, q->scored + at, &x, err));
#pragma omp parallel for schedule(dynamic) if (n_row * p->n_vocab > 1 << 16) /* small ones are not worth the barrier */
            for (int64_t j = 0; j < n_row; j++) compare(p, dense, row + j, x + j * p->n_vocab, q->ids[which[j] + 1]);
            row += n_row;
            at += n;
        }
    }
done:
    return st;
}

static lg_status take(probe_seq *to, const lg_probe_seq *from, int64_t first_row, lg_error *err) {
    if (from->n_ctx < 1 || from->n_ctx + 1 >= from->n)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "measure: %lld ids hold no continuation of %lld", (long long)from->n,
                            (long long)from->n_ctx);
    to->n = from->n;
    to->n_ctx = from->n_ctx;
    to->first_row = first_row;
    to->ids = lg_base_calloc(from->n, (int64_t)sizeof *to->ids);
    to->scored = lg_base_alloc(from->n);
    if (!to->ids || !to->scored) return lg_base_fail(err, LG_ERR_NOMEM, -1, "measure: out of memory");
    memcpy(to->ids, from->ids, (size_t)from->n * sizeof *to->ids);
    to->last = -1;
    for (int64_t i = from->n_ctx; i + 1 < from->n; i++) {
        to->scored[i] = from->scored ? from->scored[i] != 0 : 1;
        if (to->scored[i]) to->last = i;
    }
    return to->last < 0 ? lg_base_fail(err, LG_ERR_USAGE, -1, "measure: a sequence without a scored row") : LG_OK;
}

lg_status lg_heads_probe_new(lg_probe **out, lg_model *m, const lg_probe_seq *seq, int64_t n_seq, lg_dtype kv,
                             lg_progress_fn progress, void *user, lg_error *err) {
    lg_status st;
    lg_model_info info;
    lg_session_params sp;
    lg_hybrid_params none;
    int64_t longest = 0;
    *out = NULL;
    lg_probe *p = lg_base_alloc((int64_t)sizeof *p);
    if (!p) return lg_base_fail(err, LG_ERR_NOMEM, -1, "measure: out of memory");
    lg_model_get_info(m, &info);
    p->n_seq = n_seq;
    p->n_vocab = info.n_vocab;
    p->seq = lg_base_calloc(n_seq, (int64_t)sizeof *p->seq);
    if (!p->seq) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "measure: out of memory"));
    for (int64_t i = 0; i < n_seq; i++) {
        LG_TRY(take(&p->seq[i], &seq[i], p->n_row, err));
        for (int64_t j = 0; j < p->seq[i].n; j++) p->n_row += p->seq[i].scored[j];
        longest = seq[i].n > longest ? seq[i].n : longest;
    }
    p->prob = lg_base_calloc(p->n_row, p->n_vocab * (int64_t)sizeof *p->prob);
    p->dense = lg_base_calloc(p->n_row, (int64_t)sizeof *p->dense);
    p->kl = lg_base_calloc(p->n_row, (int64_t)sizeof *p->kl);
    p->same = lg_base_alloc(p->n_row);
    p->right = lg_base_alloc(p->n_row);
    if (!p->prob || !p->dense || !p->kl || !p->same || !p->right)
        LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "measure: out of memory for %lld rows of logits", (long long)p->n_row));

    lg_session_defaults(&sp);
    sp.n_ctx = longest;
    sp.n_seq_max = n_seq;
    sp.kv = kv;
    sp.progress = progress;
    sp.progress_user = user;
    LG_TRY(lg_session_new_rows(&p->s, m, &sp, FORCE, err));
    for (int64_t i = 0; i < n_seq; i++) LG_TRY(lg_session_sync(p->s, i, p->seq[i].ids, p->seq[i].n_ctx, err));
    lg_hybrid_defaults(&none);
    LG_TRY(lg_session_set_roles(p->s, NULL, &none, err));
    LG_TRY(pass(p, true, err));
    *out = p;
    p = NULL;
done:
    lg_heads_probe_free(p);
    return st;
}

void lg_heads_probe_free(lg_probe *p) {
    if (!p) return;
    lg_session_free(p->s);
    for (int64_t i = 0; p->seq && i < p->n_seq; i++) {
        lg_base_free(p->seq[i].ids);
        lg_base_free(p->seq[i].scored);
    }
    void *held[] = { p->seq, p->prob, p->dense, p->kl, p->same, p->right, p };
    for (size_t i = 0; i < sizeof held / sizeof *held; i++) lg_base_free(held[i]);
}

lg_status lg_heads_probe_run(lg_probe *p, const lg_roles *roles, const lg_hybrid_params *how, lg_score *out, lg_error *err) {
    lg_status st;
    lg_stats stats;
    memset(out, 0, sizeof *out);
    LG_TRY(lg_session_set_roles(p->s, roles, how, err));
    lg_session_stats_reset(p->s);
    LG_TRY(pass(p, false, err));
    lg_session_stats(p->s, &stats);
    for (int64_t i = 0; i < p->n_row; i++) {
        out->kl += p->kl[i];
        out->top1 += p->same[i];
        out->accuracy += p->right[i];
    }
    out->n = p->n_row;
    out->kl /= (double)out->n;
    out->top1 /= (double)out->n;
    out->accuracy /= (double)out->n;
    out->kv_share = stats.kv_bytes_dense ? (double)stats.kv_bytes_read / (double)stats.kv_bytes_dense : 0;
done:
    return st;
}

lg_session *lg_heads_probe_session(lg_probe *p) {
    return p->s;
}
