/* measure: what a role map costs. A probe is a set of sequences whose contexts are cached once; each run feeds
 * their continuations, teacher forced, as decode steps under other head options and compares the next-token
 * distributions with those of dense decode steps over the same cache. */
#ifndef LG_HEADS_MEASURE_H
#define LG_HEADS_MEASURE_H
#include "base/base.h"

typedef struct lg_probe_seq {
    const int32_t *ids;
    int64_t n, n_ctx;      /* ids[n_ctx..n) are fed as decode steps */
    const uint8_t *scored; /* [n] row i (the logits after id i) counts; i >= n_ctx, i + 1 < n. NULL: all of these */
} lg_probe_seq;

typedef struct lg_score { /* means over scored rows */
    double kl;       /* KL(dense || hybrid), nats */
    double top1;     /* share of rows with the same most likely token */
    double accuracy; /* share whose most likely token is the true one */
    int64_t n;
    double kv_share; /* KV bytes read over dense */
} lg_score;

typedef struct lg_probe lg_probe;
/* Copies ids and flags, prefills all contexts, runs the dense pass. kv: LG_DTYPE_COUNT for the default. */
lg_status lg_heads_probe_new(lg_probe **out, lg_model *m, const lg_probe_seq *seq, int64_t n_seq, lg_dtype kv,
                             lg_progress_fn progress, void *user, lg_error *err);
void lg_heads_probe_free(lg_probe *p);
/* roles NULL: dense (KL 0, its accuracy). */
lg_status lg_heads_probe_run(lg_probe *p, const lg_roles *roles, const lg_hybrid_params *how, lg_score *out, lg_error *err);
lg_session *lg_heads_probe_session(lg_probe *p);

/* The comparison of two rows of logits: KL(a || b), nats. */
double lg_heads_kl(const float *a, const float *b, int64_t n);
#endif
