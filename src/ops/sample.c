/* Sampling: the specification (lg_op_sample in ops.h says what is drawn). */
#include "ops/ops.h"
#include "ops/sample.h"

/* a before b: higher value, then lower id. */
static bool before(const float *x, int32_t a, int32_t b) {
    const uint32_t ka = lg_sample_key(x[a]), kb = lg_sample_key(x[b]);
    return ka > kb || (ka == kb && a < b);
}

/* Heap order with the first in order at the top. */
static void sift(int32_t *h, int64_t n, int64_t i, const float *x) {
    for (;;) {
        int64_t c = 2 * i + 1;
        if (c >= n) return;
        if (c + 1 < n && before(x, h[c + 1], h[c])) c++;
        if (!before(x, h[c], h[i])) return;
        const int32_t t = h[c];
        h[c] = h[i];
        h[i] = t;
        i = c;
    }
}

/* Ids in order: they come off the heap one by one, as far as they are asked for, and gather behind its end. */
typedef struct order { int32_t *heap; int64_t n, left; const float *x; } order;
static int32_t at(order *o, int64_t i) {
    while (o->n - o->left <= i) {
        const int32_t id = o->heap[0];
        o->heap[0] = o->heap[--o->left];
        o->heap[o->left] = id;
        sift(o->heap, o->left, 0, o->x);
    }
    return o->heap[o->n - 1 - i];
}

int32_t lg_ops_sample(const float *logits, int64_t n_vocab, const lg_draw *d, const int32_t *recent, float *scratch) {
    __extension__ typedef unsigned __int128 u128;
    const float *x = logits;
    if (d->penalty != 1 && d->n_recent > 0) {
        memcpy(scratch, logits, (size_t)n_vocab * sizeof *scratch);
        for (int64_t i = 0; i < d->n_recent; i++) /* set from the logits: an id that comes twice is penalised once */
            scratch[recent[i]] = lg_sample_penalised(logits[recent[i]], d->penalty);
        x = scratch;
    }
    int64_t best = 0;
    for (int64_t i = 1; i < n_vocab; i++)
        if (lg_sample_key(x[i]) > lg_sample_key(x[best])) best = i;
    if (d->scale == 0) return (int32_t)best;

    const float top = x[best];
    uint64_t all = 0, likely = 0, sum = 0;
    order o = { .heap = (int32_t *)(void *)(scratch + n_vocab), .n = n_vocab, .left = n_vocab, .x = x };
    for (int64_t i = 0; i < n_vocab; i++) {
        const uint64_t w = lg_sample_weight(x[i], top, d->scale);
        all += w;
        if (w >= d->min_weight) likely += w;
        o.heap[i] = (int32_t)i;
    }
    for (int64_t i = n_vocab / 2; i-- > 0;) sift(o.heap, n_vocab, i, x);
    if (d->top_k > 0 && d->top_k < n_vocab) {
        all = 0;
        for (int64_t i = 0; i < d->top_k; i++) all += lg_sample_weight(x[at(&o, i)], top, d->scale);
    }
    uint64_t kept = all;
    if (d->top_p < 1) {
        const uint64_t need = lg_sample_need(d->top_p, all);
        kept = 0;
        for (int64_t i = 0; kept < need; i++) kept += lg_sample_weight(x[at(&o, i)], top, d->scale);
    }
    if (likely < kept) kept = likely;
    const uint64_t target = (uint64_t)((u128)d->random * kept >> 64);
    for (int64_t i = 0;; i++) { /* ends: target < kept <= the sum of all */
        const int32_t id = at(&o, i);
        sum += lg_sample_weight(x[id], top, d->scale);
        if (sum > target) return id;
    }
}
