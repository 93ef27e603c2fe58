/* Sampling: the specification (lg_op_sample in ops.h says what is drawn). */
#include "ops/ops.h"
#include "ops/sample.h"

/* a before b: higher value, then lower id. */
static bool before(const uint32_t *key, int32_t a, int32_t b) { return key[a] > key[b] || (key[a] == key[b] && a < b); }

/* Heap order with the first in order at the top. */
static void sift(int32_t *h, int64_t n, int64_t i, const uint32_t *key) {
    for (;;) {
        int64_t c = 2 * i + 1;
        if (c >= n) return;
        if (c + 1 < n && before(key, h[c + 1], h[c])) c++;
        if (!before(key, h[c], h[i])) return;
        const int32_t t = h[c];
        h[c] = h[i];
        h[i] = t;
        i = c;
    }
}

/* Ids in order: they come off the heap one by one, as far as they are asked for, and gather behind its end. */
typedef struct order { int32_t *heap; int64_t n, left; const uint32_t *key; uint32_t top; double scale; } order;
static int32_t at(order *o, int64_t i) {
    while (o->n - o->left <= i) {
        const int32_t id = o->heap[0];
        o->heap[0] = o->heap[--o->left];
        o->heap[o->left] = id;
        sift(o->heap, o->left, 0, o->key);
    }
    return o->heap[o->n - 1 - i];
}
static uint64_t weight_at(order *o, int64_t i) { return lg_sample_weight(o->key[at(o, i)], o->top, o->scale); }

int32_t lg_ops_sample(const float *logits, int64_t n_vocab, const lg_draw *d, const int32_t *recent, float *scratch) {
    __extension__ typedef unsigned __int128 u128;
    uint32_t *key = (uint32_t *)(void *)scratch;
    int64_t best = 0;
    for (int64_t i = 0; i < n_vocab; i++) key[i] = lg_sample_key(logits[i]);
    for (int64_t i = 0; i < d->n_recent && d->penalty != 1; i++) /* from the logits: an id that comes twice is penalised once */
        key[recent[i]] = lg_sample_key(lg_sample_penalised(logits[recent[i]], d->penalty));
    for (int64_t i = 1; i < n_vocab; i++)
        if (key[i] > key[best]) best = i;
    if (d->scale == 0) return (int32_t)best;

    const bool top_k = d->top_k > 0 && d->top_k < n_vocab;
    uint64_t all = 0, likely = 0, sum = 0;
    order o = { .heap = (int32_t *)(void *)(scratch + n_vocab), .n = n_vocab, .left = n_vocab, .key = key, .top = key[best], .scale = d->scale };
    for (int64_t i = 0; i < n_vocab; i++) o.heap[i] = (int32_t)i;
    for (int64_t i = n_vocab / 2; i-- > 0;) sift(o.heap, n_vocab, i, key);
    if (!top_k || d->min_weight)
        for (int64_t i = 0; i < n_vocab; i++) {
            const uint64_t w = lg_sample_weight(key[i], o.top, d->scale);
            all += w;
            if (w >= d->min_weight) likely += w;
        }
    if (top_k) {
        all = 0;
        for (int64_t i = 0; i < d->top_k; i++) all += weight_at(&o, i);
    }
    uint64_t kept = all;
    if (d->top_p < 1) {
        const uint64_t need = lg_sample_need(d->top_p, all);
        kept = 0;
        for (int64_t i = 0; kept < need; i++) kept += weight_at(&o, i);
    }
    if (d->min_weight && likely < kept) kept = likely;
    const uint64_t target = (uint64_t)((u128)d->random * kept >> 64);
    for (int64_t i = 0;; i++) { /* ends: target < kept <= the sum of all */
        sum += weight_at(&o, i);
        if (sum > target) return at(&o, i);
    }
}
