/* The specification of token selection (specs/lycheedecode.md 1.4 and 6.14, with the project's block granularity) and the
 * cache row formats. Plain C, sums in double, no allocation.
 *
 * Units are blocks of `block` tokens (1: tokens); the last may be partial. A block's score is the largest score of its
 * tokens. Units are ranked by score, equal scores by position (the lower first); -0 equals +0.
 *   topk, ratio   the blocks that hold one of the first `sinks` or the last `recents` tokens are always in; then the best
 *                 others, those that are kept before all, while the set has fewer than floor(budget / block) blocks.
 *   threshold     blocks that hold a token with p > tau, p = softmax over all TOKENS of scale * score; if there is none, the
 *                 block of the current token.
 *   topp          blocks in rank order while the probability mass of the blocks before is <= p (so at least one). */
#include "ops/ops.h"
#include <math.h>

void lg_ops_kv_store(const lg_kv_geom *g, uint8_t *row, const float *src) { lg_base_quant(g->dtype, src, row, g->head_dim); }
void lg_ops_kv_load(const lg_kv_geom *g, float *dst, const uint8_t *row) { lg_base_dequant(g->dtype, row, dst, g->head_dim); }

static bool better(const float *score, int32_t a, int32_t b) {
    return score[a] > score[b] || (score[a] == score[b] && a < b);
}

/* heap[0..n): the best unit on top. */
static void sift(int32_t *heap, int64_t n, int64_t i, const float *score) {
    for (;;) {
        int64_t best = i;
        for (int64_t c = 2 * i + 1; c <= 2 * i + 2 && c < n; c++)
            if (better(score, heap[c], heap[best])) best = c;
        if (best == i) return;
        const int32_t t = heap[i];
        heap[i] = heap[best];
        heap[best] = t;
        i = best;
    }
}

static void heapify(int32_t *heap, int64_t n, const float *score) {
    for (int64_t i = n / 2 - 1; i >= 0; i--) sift(heap, n, i, score);
}

static int32_t pop(int32_t *heap, int64_t *n, const float *score) {
    const int32_t top = heap[0];
    heap[0] = heap[--*n];
    sift(heap, *n, 0, score);
    return top;
}

/* Probability of a token, given the largest score and the sum of the exponentials. */
typedef struct softmax { double scale, max, sum; } softmax;
static softmax softmax_of(const float *score, int64_t len, double scale) {
    softmax s = { .scale = scale, .max = score[0] };
    for (int64_t t = 1; t < len; t++)
        if ((double)score[t] > s.max) s.max = (double)score[t];
    for (int64_t t = 0; t < len; t++) s.sum += exp(scale * ((double)score[t] - s.max));
    return s;
}
static double probability(const softmax *s, float score) { return exp(s->scale * ((double)score - s->max)) / s->sum; }

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Chosen units are marked by a NaN score, which is safe once they have left the heap. */
static void choose_topk(float *unit, int64_t n, int64_t len, int64_t budget, int32_t block, const lg_select *s, int32_t *heap) {
    const lg_forced f = lg_ops_forced(len, block, s->sinks, s->recents);
    const int64_t head = f.head, tail = f.tail;
    int64_t n_heap, left = budget / block - head - (n - tail);
    for (int kept = s->kept ? 1 : 0; kept >= 0; kept--) {
        n_heap = 0;
        for (int64_t u = head; u < tail; u++)
            if (lg_ops_kept(s->kept, u) == kept) heap[n_heap++] = (int32_t)u;
        heapify(heap, n_heap, unit);
        for (; left > 0 && n_heap > 0; left--) unit[pop(heap, &n_heap, unit)] = NAN;
    }
    for (int64_t u = 0; u < head; u++) unit[u] = NAN;
    for (int64_t u = tail; u < n; u++) unit[u] = NAN;
}

static void choose_threshold(float *unit, int64_t n, const float *score, int64_t len, const lg_select *s) {
    const softmax sm = softmax_of(score, len, (double)s->scale);
    bool any = false;
    for (int64_t u = 0; u < n; u++)
        if (probability(&sm, unit[u]) > s->value) { /* p grows with the score: the best token decides */
            unit[u] = NAN;
            any = true;
        }
    if (!any) unit[n - 1] = NAN;
}

static void choose_topp(float *unit, int64_t n, const float *score, int64_t len, int32_t block, const lg_select *s,
                        int32_t *heap) {
    const softmax sm = softmax_of(score, len, (double)s->scale);
    int64_t n_heap = n;
    double before = 0;
    for (int64_t u = 0; u < n; u++) heap[u] = (int32_t)u;
    heapify(heap, n, unit);
    while (n_heap > 0 && before <= s->value) {
        const int64_t u = pop(heap, &n_heap, unit);
        for (int64_t t = u * block; t < min64(len, (u + 1) * block); t++) before += probability(&sm, score[t]);
        unit[u] = NAN;
    }
}

int64_t lg_ops_select(int32_t *out, int64_t cap, const float *score, int64_t len, int64_t budget, int32_t block,
                      const lg_select *s, float *scratch_f, int32_t *scratch_i) {
    const int64_t n = (len + block - 1) / block;
    float *unit = scratch_f;
    if (len <= 0) return 0;
    for (int64_t u = 0; u < n; u++) {
        unit[u] = score[u * block];
        for (int64_t t = u * block + 1; t < min64(len, (u + 1) * block); t++)
            if (score[t] > unit[u]) unit[u] = score[t];
    }
    switch (s->rule) {
    case LG_RULE_TOPK:
    case LG_RULE_RATIO: choose_topk(unit, n, len, budget, block, s, scratch_i); break;
    case LG_RULE_THRESHOLD: choose_threshold(unit, n, score, len, s); break;
    case LG_RULE_TOPP: choose_topp(unit, n, score, len, block, s, scratch_i); break;
    }
    int64_t count = 0;
    for (int64_t u = 0; u < n && count < cap; u++)
        if (isnan(unit[u])) out[count++] = (int32_t)u;
    return count;
}
