/* lookup: no loop. A gate ranks the chunks, the best `top` are read one by one behind their own slots with the answer template, and
 * the answer that the model itself finds likeliest (mean log-probability of its tokens, the ending one counted) is taken, with the
 * chunk it was read from. All readings of all questions form one batch, ordered by chunk. */
#include "memory/ask.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

typedef struct pick { int64_t who, rank, chunk; double score; } pick; /* rank: its place among the question's chunks */

static int by_chunk(const void *x, const void *y) {
    const pick *a = x, *b = y;
    if (a->chunk != b->chunk) return a->chunk < b->chunk ? -1 : 1;
    return (a->who > b->who) - (a->who < b->who);
}

/* The chunks of question q, best first; ties: the lower chunk. */
static lg_status rank(lg_asking *a, int64_t q, const lg_lexical *x, float *f, double *score, int64_t *all, pick *out, int64_t n_pick, lg_error *err) {
    const int64_t n = a->b->h.n_chunk;
    lg_status st = LG_OK;
    if (x) {
        lg_memory_lexical_score(x, a->question[q].data, a->question[q].n, f);
        for (int64_t c = 0; c < n; c++) score[c] = (double)f[c];
    } else if (a->p.gate == LG_GATE_ADAPTER) {
        const int64_t width = lg_memory_gate_width(a);
        for (int64_t c = 0; c < n && st == LG_OK; c += width) st = lg_memory_score(a, q, all + c, n - c < width ? n - c : width, score + c, err);
    } else {
        for (int64_t c = 0; c < n; c++) score[c] = (double)NAN;
    }
    int64_t kept = 0; /* insertion into the short list */
    for (int64_t c = 0; c < n && st == LG_OK; c++) {
        int64_t i = kept;
        while (i > 0 && score[c] > out[i - 1].score) i--;
        if (i >= n_pick) continue;
        if (kept < n_pick) kept++;
        memmove(out + i + 1, out + i, (size_t)(kept - 1 - i) * sizeof *out);
        out[i] = (pick){ .who = q, .chunk = c, .score = score[c] };
    }
    for (int64_t i = 0; i < kept; i++) out[i].rank = i;
    return st;
}

/* What an answer is worth: its mean ln p, and with `weigh` how far its chunk is behind the best one in the gate's eyes (BM25 scores
 * taken as log-odds, a gate's as probabilities): a reader is often sure of what it read in the wrong chunk. */
static double worth(const lg_asking *a, const lg_reading *r, const pick *p, const pick *first) {
    if (!a->p.weigh || a->p.gate == LG_GATE_NONE) return r->out.logprob;
    return r->out.logprob + (a->p.gate == LG_GATE_ADAPTER ? log(p->score / first->score) : p->score - first->score);
}

static lg_status finish(lg_asking *a, int64_t q, lg_reading **r, const pick *p, int64_t n, double began, lg_error *err) {
    lg_answer *o = &a->out[q];
    lg_status st = LG_OK;
    int64_t best = 0;
    const int64_t base = a->b->h.chunk / a->b->h.ratio;
    for (int64_t i = 0; i < n; i++) { /* steps in the order of ranks */
        lg_ask_step *s = lg_memory_step(a, q, p[i].chunk);
        if (!s) return nomem(err);
        s->gate_score = p[i].score;
        s->accepted = true;
        s->position0 = base;
        s->seconds = r[i]->out.prefill_s + r[i]->out.decode_s;
        s->passes = r[i]->out.decode_steps;
        s->logprob = r[i]->out.logprob;
        if (!lg_memory_copy_ids(&s->prompt, &r[i]->prompt)) return nomem(err);
        if (!(worth(a, r[best], &p[best], p) >= worth(a, r[i], &p[i], p))) best = i;
    }
    o->read_s = lg_base_now() - began;
    o->chunk = p[best].chunk;
    LG_TRY(lg_memory_answer(a, r[best], base, err));
done:
    return st;
}

lg_status lg_memory_lookup(lg_asking *a, lg_error *err) {
    lg_status st = LG_OK;
    lg_lexical *x = NULL;
    const int64_t n = a->b->h.n_chunk, k = a->p.gate == LG_GATE_NONE || a->p.top > n ? n : a->p.top;
    int64_t total;
    lg_reading *r = NULL, **of = NULL;
    pick *p = NULL, *order = NULL;
    float *f = lg_base_calloc(n, sizeof *f);
    double *score = lg_base_calloc(n, sizeof *score);
    int64_t *all = lg_base_calloc(n, sizeof *all);
    if (!lg_base_mul(a->n, k, &total)) LG_TRY(nomem(err));
    r = lg_base_calloc(total, sizeof *r);
    of = lg_base_calloc(total, sizeof *of);
    p = lg_base_calloc(total + 1, sizeof *p);
    order = lg_base_calloc(total, sizeof *order);
    if (!f || !score || !all || !r || !of || !p || !order) LG_TRY(nomem(err));
    for (int64_t c = 0; c < n; c++) all[c] = c;

    const double began = lg_base_now();
    if (a->p.gate == LG_GATE_LEXICAL) LG_TRY(lg_memory_lexical_new(&x, a->b, err));
    for (int64_t q = 0; q < a->n; q++) {
        const double start = q ? lg_base_now() : began; /* the index counts for the first */
        LG_TRY(rank(a, q, x, f, score, all, p + q * k, k, err));
        a->out[q].gate_s = lg_base_now() - start;
        if (a->p.gate == LG_GATE_ADAPTER) LG_TRY(lg_memory_tick(a, "gate", q, a->n, err));
    }
    memcpy(order, p, (size_t)total * sizeof *p);
    qsort(order, (size_t)total, sizeof *order, by_chunk);
    for (int64_t i = 0; i < total; i++) {
        const lg_ids fill[LG_HOLE_COUNT] = { a->question[order[i].who], { 0 }, { 0 } };
        r[i] = (lg_reading){ .who = order[i].who, .chunk = order[i].chunk, .n_max = a->p.max_new, .answer = true };
        LG_TRY(lg_memory_prompt(&a->answer, fill, &r[i].prompt, err));
        of[order[i].who * k + order[i].rank] = &r[i];
    }
    const double reading = lg_base_now();
    enum { BATCH = 256 }; /* readings handed over at once: bounds memory, moves the bar */
    for (int64_t i = 0; i < total; i += BATCH) {
        LG_TRY(lg_memory_tick(a, "read", i, total, err));
        LG_TRY(lg_memory_read(a, r + i, total - i < BATCH ? total - i : BATCH, err));
    }
    LG_TRY(lg_memory_tick(a, "read", total, total, err));
    for (int64_t q = 0; q < a->n; q++) LG_TRY(finish(a, q, of + q * k, p + q * k, k, reading, err));
done:
    lg_memory_readings_free(r, r ? total : 0);
    lg_base_free(of);
    lg_base_free(p);
    lg_base_free(order);
    lg_base_free(f);
    lg_base_free(score);
    lg_base_free(all);
    lg_memory_lexical_free(x);
    return st;
}
