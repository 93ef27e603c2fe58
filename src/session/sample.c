/* Sampling: repetition penalty, then temperature, top-k, top-p, min-p, one draw that depends on seed and step only. */
#include "session/session.h"
#include <math.h>
#include <string.h>

void lg_sampler_defaults(lg_sampler_params *p) {
    *p = (lg_sampler_params){ .temp = 0, .top_k = 0, .top_p = 1, .min_p = 0, .repeat_penalty = 1, .seed = 0 };
}

static int32_t best_of(const float *x, int64_t n) {
    int64_t b = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[b]) b = i;
    return (int32_t)b;
}

/* a before b: higher value, then lower id. */
static bool before(const float *x, int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); }

/* Heap order with the first in order at the top; popping gives ids in descending order one by one. */
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

int32_t lg_sample(const float *logits, int64_t n_vocab, const lg_sampler_params *p, const int32_t *recent, int64_t n_recent, int64_t step,
                  float *scratch) {
    const float *x = logits;
    if (p->repeat_penalty != 1 && n_recent > 0) {
        memcpy(scratch, logits, (size_t)n_vocab * sizeof *scratch);
        for (int64_t i = 0; i < n_recent; i++) /* set from the logits: an id that comes twice is penalised once */
            scratch[recent[i]] = logits[recent[i]] > 0 ? logits[recent[i]] / p->repeat_penalty : logits[recent[i]] * p->repeat_penalty;
        x = scratch;
    }
    if (p->temp <= 0) return best_of(x, n_vocab);

    int32_t *heap = (int32_t *)(void *)(scratch + n_vocab);
    const float top = x[best_of(x, n_vocab)];
    double total = 0; /* over all, or over the k best with top-k */
    for (int64_t i = 0; i < n_vocab; i++) heap[i] = (int32_t)i;
    for (int64_t i = n_vocab / 2; i-- > 0;) sift(heap, n_vocab, i, x);
    const int64_t k = p->top_k > 0 && p->top_k < n_vocab ? p->top_k : n_vocab;
    if (k == n_vocab)
        for (int64_t i = 0; i < n_vocab; i++) total += exp((double)(x[i] - top) / p->temp);
    /* Ids come off the heap in descending order and gather behind its end. */
    int64_t n = n_vocab;
    if (k < n_vocab) {
        for (int64_t taken = 0; taken < k; taken++) {
            const int32_t id = heap[0];
            total += exp((double)(x[id] - top) / p->temp);
            heap[0] = heap[--n];
            heap[n] = id;
            sift(heap, n, 0, x);
        }
    }
    double kept = 0;
    int64_t n_kept = 0;
    for (; n_kept < k; n_kept++) { /* heap[n_vocab - 1 - i] is the i-th best */
        if (k == n_vocab) {
            const int32_t id = heap[0];
            heap[0] = heap[--n];
            heap[n] = id;
            sift(heap, n, 0, x);
        }
        const double w = exp((double)(x[heap[n_vocab - 1 - n_kept]] - top) / p->temp);
        if (n_kept > 0 && ((p->top_p < 1 && kept >= (double)p->top_p * total) || w < (double)p->min_p)) break;
        kept += w;
    }
    double u = lg_base_rng_unit(p->seed, 0, (uint64_t)step) * kept;
    for (int64_t i = 0; i < n_kept; i++) {
        const int32_t id = heap[n_vocab - 1 - i];
        u -= exp((double)(x[id] - top) / p->temp);
        if (u < 0) return id;
    }
    return heap[n_vocab - n_kept];
}
