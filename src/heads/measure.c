/* measure: probes. One session holds all sequences of a probe, so a step reads the weights once for all of
 * them; changing the map leaves the cached contexts alone. The dense logits are kept as f32. */
#include "heads/measure.h"

#include <math.h>
#include <string.h>

typedef struct probe_seq {
    int32_t *ids;
    uint8_t *scored;
    int64_t n, n_ctx, last; /* last scored row; nothing after it is fed */
    int64_t first_row;      /* of its scored rows in dense[] */
} probe_seq;

struct lg_probe {
    lg_session *s;
    int64_t n_seq, n_vocab, n_row;
    probe_seq *seq;
    float *dense;     /* [n_row, n_vocab] */
    int32_t *seqs, *ids; /* [n_seq] one step */
    int64_t *row;        /* [n_seq] scored row of each sequence in this step, -1: none */
    double *kl;          /* [n_row] of the last run */
    uint8_t *same, *right;
};

double lg_heads_kl(const float *a, const float *b, int64_t n) {
    double sum_a = 0, sum_b = 0, mix = 0;
    float max_a = -INFINITY, max_b = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        max_a = a[i] > max_a ? a[i] : max_a;
        max_b = b[i] > max_b ? b[i] : max_b;
    }
    for (int64_t i = 0; i < n; i++) {
        double ea = (double)expf(a[i] - max_a);
        sum_a += ea;
        sum_b += (double)expf(b[i] - max_b);
        mix += ea * ((double)a[i] - (double)b[i]);
    }
    return mix / sum_a - ((double)max_a + log(sum_a)) + ((double)max_b + log(sum_b));
}

static int64_t most_likely(const float *x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* One pass over all continuations; dense: keeps the logits, else compares with them. */
static lg_status pass(lg_probe *p, bool dense, lg_error *err) {
    lg_status st = LG_OK;
    int64_t longest = 0;
    for (int64_t i = 0; i < p->n_seq; i++) {
        LG_TRY(lg_session_rewind(p->s, i, p->seq[i].n_ctx, err));
        int64_t n = p->seq[i].last + 1 - p->seq[i].n_ctx;
        longest = n > longest ? n : longest;
        p->row[i] = p->seq[i].first_row;
    }
    for (int64_t t = 0; t < longest; t++) {
        int64_t n = 0;
        for (int64_t i = 0; i < p->n_seq; i++) {
            if (p->seq[i].n_ctx + t > p->seq[i].last) continue;
            p->seqs[n] = (int32_t)i;
            p->ids[n++] = p->seq[i].ids[p->seq[i].n_ctx + t];
        }
        LG_TRY(lg_session_step(p->s, p->seqs, p->ids, n, err));
#pragma omp parallel for schedule(dynamic) if (n * p->n_vocab > 1 << 16) /* small ones are not worth the barrier */
        for (int64_t j = 0; j < n; j++) {
            int64_t i = p->seqs[j], at = p->seq[i].n_ctx + t;
            if (!p->seq[i].scored[at]) continue;
            int64_t row = p->row[i]++;
            const float *x = lg_session_logits(p->s, i);
            float *d = p->dense + row * p->n_vocab;
            if (dense) memcpy(d, x, (size_t)p->n_vocab * sizeof *d);
            int64_t top = most_likely(x, p->n_vocab);
            p->kl[row] = dense ? 0 : lg_heads_kl(d, x, p->n_vocab);
            p->same[row] = dense || top == most_likely(d, p->n_vocab);
            p->right[row] = top == p->seq[i].ids[at + 1];
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
    p->seqs = lg_base_calloc(n_seq, (int64_t)sizeof *p->seqs);
    p->ids = lg_base_calloc(n_seq, (int64_t)sizeof *p->ids);
    p->row = lg_base_calloc(n_seq, (int64_t)sizeof *p->row);
    if (!p->seq || !p->seqs || !p->ids || !p->row) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "measure: out of memory"));
    for (int64_t i = 0; i < n_seq; i++) {
        LG_TRY(take(&p->seq[i], &seq[i], p->n_row, err));
        for (int64_t j = 0; j < p->seq[i].n; j++) p->n_row += p->seq[i].scored[j];
        longest = seq[i].n > longest ? seq[i].n : longest;
    }
    p->dense = lg_base_calloc(p->n_row, p->n_vocab * (int64_t)sizeof *p->dense);
    p->kl = lg_base_calloc(p->n_row, (int64_t)sizeof *p->kl);
    p->same = lg_base_alloc(p->n_row);
    p->right = lg_base_alloc(p->n_row);
    if (!p->dense || !p->kl || !p->same || !p->right)
        LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "measure: out of memory for %lld rows of logits", (long long)p->n_row));

    lg_session_defaults(&sp);
    sp.n_ctx = longest;
    sp.n_seq_max = n_seq;
    sp.kv = kv;
    sp.progress = progress;
    sp.progress_user = user;
    LG_TRY(lg_session_new(&p->s, m, &sp, err));
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
    void *held[] = { p->seq, p->dense, p->seqs, p->ids, p->row, p->kl, p->same, p->right, p };
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
