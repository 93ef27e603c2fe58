/* Sampling: the specification (lg_op_sample in ops.h says what is drawn), and the same for the host, faster. */
#include "ops/ops.h"
#include "ops/sample.h"
#include <float.h>
#include <math.h>
#include <string.h>

__extension__ typedef unsigned __int128 u128;

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

/* ---- the same, faster: logits are dealt into bins by how far below the greatest they are, and only those of the bin that decides are put in order. Whatever the
 * weights are added in, they are whole numbers. ---- */
int32_t lg_ops_greatest(const float *logits, int64_t n_vocab) {
    enum { N = 32 }; /* maxima side by side: the loop over them becomes a few instructions */
    float top[N];
    int64_t i = 0;
    for (int k = 0; k < N; k++) top[k] = -INFINITY;
    for (; i + N <= n_vocab; i += N)
        for (int k = 0; k < N; k++) top[k] = logits[i + k] > top[k] ? logits[i + k] : top[k];
    for (; i < n_vocab; i++) top[0] = logits[i] > top[0] ? logits[i] : top[0];
    for (int k = 1; k < N; k++) top[0] = top[k] > top[0] ? top[k] : top[0];
    for (i = 0; i < n_vocab; i++)
        if (logits[i] == top[0]) return (int32_t)i;
    return 0; /* no numbers at all */
}

enum { BIN_RATE = 49, BINS = (LG_WEIGHT_BITS + 1) * BIN_RATE, BLOCK = 64 }; /* bins of a halving of the weight; all that have one; logits looked at together */

/* a before b in order; neither is NaN. */
static bool stands_before(const float *x, int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); }
/* The first in order (last: the last) at the top. */
static void sink(int32_t *h, int64_t n, int64_t i, const float *x, bool last) {
    for (;;) {
        int64_t c = 2 * i + 1;
        if (c >= n) return;
        if (c + 1 < n && (last ? stands_before(x, h[c], h[c + 1]) : stands_before(x, h[c + 1], h[c]))) c++;
        if (last ? !stands_before(x, h[i], h[c]) : !stands_before(x, h[c], h[i])) return;
        const int32_t t = h[c];
        h[c] = h[i];
        h[i] = t;
        i = c;
    }
}
static void heapify(int32_t *h, int64_t n, const float *x, bool last) {
    for (int64_t i = n / 2; i-- > 0;) sink(h, n, i, x, last);
}
/* Takes the top off: it lies behind the end then. */
static int32_t off(int32_t *h, int64_t *n, const float *x, bool last) {
    const int32_t id = h[0];
    h[0] = h[--*n];
    h[*n] = id;
    sink(h, *n, 0, x, last);
    return id;
}

typedef struct pick { const float *x; int64_t n_vocab; float top; double scale; int32_t *room; } pick;
static uint64_t weight_of(const pick *p, int32_t id) { return lg_sample_power(lg_sample_below(p->x[id], p->top, p->scale)); } /* (of the greatest: 2^0) */
/* y: of what has a weight. */
static int bin_of(double y) { return (int)(-BIN_RATE * y); }

/* The k first in order to p->room (fewer, where not all are numbers above -infinity). */
static int64_t first_k(const pick *p, int64_t k) {
    const float *x = p->x;
    int32_t *h = p->room;
    int64_t n = 0, i = 0;
    for (; i < p->n_vocab && n < k; i++)
        if (x[i] > -INFINITY) h[n++] = (int32_t)i;
    heapify(h, n, x, true);
    for (int64_t end; i < p->n_vocab; i = end) {
        float most = INFINITY;
        end = i + BLOCK < p->n_vocab ? i + BLOCK : p->n_vocab;
        if (end - i == BLOCK) {
            most = x[i];
            for (int j = 1; j < BLOCK; j++) most = x[i + j] > most ? x[i + j] : most;
            if (most != most) most = INFINITY; /* (the first is NaN) */
        }
        for (int64_t j = i; j < end && most > x[h[0]]; j++) /* (an equal one has a higher id) */
            if (x[j] > x[h[0]]) {
                h[0] = (int32_t)j;
                sink(h, n, 0, x, true);
            }
    }
    for (int64_t left = n; left > 0;) off(h, &left, x, true);
    return n;
}

/* Ids of a bin to p->room, as a heap. */
static int64_t bin_ids(const pick *p, int bin) {
    const double low = (double)p->top - (bin + 1.0) / (BIN_RATE * p->scale), high = (double)p->top - bin / (BIN_RATE * p->scale);
    const double room = 1e-5 * (fabs((double)p->top) + (double)p->top - low) + 1e-30; /* for roundings: what lies between is looked at */
    const float from = (float)fmax(low - room, -FLT_MAX), to = (float)fmin(high + room, FLT_MAX);
    int64_t n = 0;
    for (int64_t i = 0; i < p->n_vocab; i++)
        if (p->x[i] >= from && p->x[i] <= to) {
            const double y = lg_sample_below(p->x[i], p->top, p->scale);
            if (y > -LG_WEIGHT_BITS - 1.0 && bin_of(y) == bin) p->room[n++] = (int32_t)i;
        }
    heapify(p->room, n, p->x, false);
    return n;
}
/* The first bin with which the sum of masses reaches `want`; *before: that of those before it. */
static int bin_at(const uint64_t *mass, uint64_t want, uint64_t *before) {
    int i = 0;
    for (*before = 0; i < BINS - 1 && *before + mass[i] < want; i++) *before += mass[i];
    return i;
}

static int32_t sample_first(const pick *p, const lg_draw *d) { /* top-k */
    const int64_t n = first_k(p, d->top_k);
    uint64_t all = 0, likely = 0, kept, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint64_t w = weight_of(p, p->room[i]);
        all += w;
        if (w >= d->min_weight) likely += w;
    }
    kept = all;
    if (d->top_p < 1) {
        const uint64_t need = lg_sample_need(d->top_p, all);
        kept = 0;
        for (int64_t i = 0; kept < need; i++) kept += weight_of(p, p->room[i]);
    }
    if (d->min_weight && likely < kept) kept = likely;
    const uint64_t target = (uint64_t)((u128)d->random * kept >> 64);
    for (int64_t i = 0;; i++) /* ends: target < kept <= the sum of all */
        if ((sum += weight_of(p, p->room[i])) > target) return p->room[i];
}

static int32_t sample_all(const pick *p, const lg_draw *d) {
    enum { NONE = -LG_WEIGHT_BITS - 2 };    /* 2^NONE is no weight */
    uint64_t mass[-NONE * BIN_RATE + 1], all = 0, likely = 0, kept, sum; /* (behind BINS: of what has none) */
    memset(mass, 0, sizeof mass);
    for (int64_t i = 0; i < p->n_vocab; i += BLOCK) {
        double y[BLOCK], whole[BLOCK], part[BLOCK];
        const int64_t n = p->n_vocab - i < BLOCK ? p->n_vocab - i : BLOCK;
        float x[BLOCK];
        if (n < BLOCK) memset(x, 0xff, sizeof x); /* NaN */
        memcpy(x, p->x + i, (size_t)n * sizeof *x);
        for (int j = 0; j < BLOCK; j++) { /* (no branch: several at a time) */
            const double below = lg_sample_below(x[j], p->top, p->scale);
            y[j] = below > NONE ? below : NONE; /* (NaN too) */
        }
        for (int j = 0; j < BLOCK; j++) {
            whole[j] = lg_sample_whole(y[j]);
            part[j] = LG_ROUND_MUL(lg_sample_exp2(y[j] - whole[j]), (double)((int64_t)1 << LG_WEIGHT_BITS));
        }
        for (int j = 0; j < BLOCK; j++) {
            const uint64_t w = (uint64_t)(int64_t)part[j] >> (int)-whole[j];
            mass[bin_of(y[j])] += w;
            all += w;
            likely += w >= d->min_weight ? w : 0;
        }
    }
    kept = all;
    if (d->top_p < 1) {
        const uint64_t need = lg_sample_need(d->top_p, all);
        int64_t n = bin_ids(p, bin_at(mass, need, &kept));
        while (kept < need) kept += weight_of(p, off(p->room, &n, p->x, false));
    }
    if (d->min_weight && likely < kept) kept = likely;
    const uint64_t target = (uint64_t)((u128)d->random * kept >> 64);
    int64_t n = bin_ids(p, bin_at(mass, target + 1, &sum));
    for (;;) { /* as above */
        const int32_t id = off(p->room, &n, p->x, false);
        if ((sum += weight_of(p, id)) > target) return id;
    }
}

int32_t lg_ops_sample_fast(const float *logits, int64_t n_vocab, const lg_draw *d, const int32_t *recent, float *scratch) {
    pick p = { logits, n_vocab, 0, d->scale < 1e300 ? d->scale : 1e300, (int32_t *)(void *)(scratch + n_vocab) }; /* (finite, so that 0 times it is 0) */
    if (d->penalty != 1 && d->n_recent > 0) {
        memcpy(scratch, logits, (size_t)n_vocab * sizeof *scratch);
        for (int64_t i = 0; i < d->n_recent; i++) scratch[recent[i]] = lg_sample_penalised(logits[recent[i]], d->penalty);
        p.x = scratch;
    }
    const int32_t best = lg_ops_greatest(p.x, n_vocab);
    p.top = p.x[best];
    if (d->scale == 0) return best;
    if (!isfinite(p.top)) return lg_ops_sample(logits, n_vocab, d, recent, scratch);
    return d->top_k > 0 && d->top_k < n_vocab ? sample_first(&p, d) : sample_all(&p, d);
}
