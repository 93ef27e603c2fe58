/* ask: the modes of lg_ask and the loop over a document's chunks (specs/lycheememory.md 2; docs/MEMORY.md).
 *
 * For every question: m = the initial memory; for each chunk that the gate accepts, in order, the reader sees the chunk's slots
 * and a prompt of question and m, and what it writes replaces m; at the end it answers from m alone. Questions go on in rounds:
 * in each round every question finds its next accepted chunk, then all of these are read together.
 *
 * Speculative gating: the next gate_batch chunks are scored with the present memory in one pass. m changes only when a chunk is
 * accepted, so scores up to the first accepted chunk are what one-by-one scoring gives; later ones are thrown away. */
#include "memory/ask.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GATE_BATCH = 8, PIECE = 5000 };

void lg_ask_defaults(lg_ask_params *p) {
    *p = (lg_ask_params){ .gate_threshold = 0.5, .memory_size = 1024, .max_new = 1024, .top = 3, .slot_rope = -1, .pad_id = -1, .n_stop_ids = -1 };
    lg_sampler_defaults(&p->sampler);
}

void lg_answer_free(lg_answer *a) {
    for (int64_t i = 0; i < a->n_step; i++) {
        lg_ids_free(&a->step[i].prompt);
        lg_ids_free(&a->step[i].memory);
    }
    lg_base_free(a->step);
    lg_text_free(&a->text);
    lg_text_free(&a->extracted);
    lg_ids_free(&a->ids);
    *a = (lg_answer){ 0 };
}

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

/* ---- the loop ---- */
typedef struct turn { /* of one question */
    int64_t *todo, n_todo, at;      /* chunks to look at; [n_chunk] */
    int64_t *rejected, *when, n_rejected; /* with the memory's version then */
    int64_t version, round;
    uint8_t *keep;                  /* lexical: [n_chunk] accepted beforehand; NULL: no such gate */
    float *rank;                    /* lexical: scores */
    int64_t chunk; double score;    /* accepted in this round; chunk -1: the question is through */
} turn;

static lg_status reject(lg_asking *a, int64_t q, turn *t, int64_t chunk, double score, lg_error *err) {
    lg_ask_step *s = lg_memory_step(a, q, chunk);
    if (!s) return nomem(err);
    s->gate_score = score;
    t->rejected[t->n_rejected] = chunk;
    t->when[t->n_rejected++] = t->version;
    return LG_OK;
}

/* Chunks that an older memory rejected become the next list, at most second_look times. */
static bool look_again(const lg_asking *a, turn *t) {
    int64_t n = 0, kept = 0;
    if (t->round >= a->p.second_look) return false;
    for (int64_t i = 0; i < t->n_rejected; i++) {
        if (t->when[i] < t->version) t->todo[n++] = t->rejected[i];
        else {
            t->rejected[kept] = t->rejected[i];
            t->when[kept++] = t->when[i];
        }
    }
    t->n_rejected = kept;
    t->n_todo = n;
    t->at = 0;
    t->round++;
    return n > 0;
}

/* Finds the next accepted chunk of question q. */
static lg_status advance(lg_asking *a, int64_t q, turn *t, double *score, lg_error *err) {
    const double began = lg_base_now();
    const int64_t width = lg_memory_gate_width(a);
    t->chunk = -1;
    while (t->chunk < 0) {
        if (t->at == t->n_todo && !look_again(a, t)) break;
        const int64_t left = t->n_todo - t->at, n = a->p.gate == LG_GATE_ADAPTER && left > width ? width : left;
        lg_status st = LG_OK;
        if (a->p.gate == LG_GATE_ADAPTER) st = lg_memory_score(a, q, t->todo + t->at, n, score, err);
        for (int64_t i = 0; i < n && st == LG_OK && t->chunk < 0; i++) {
            const int64_t c = t->todo[t->at++];
            const double s = a->p.gate == LG_GATE_ADAPTER ? score[i] : t->keep ? (double)t->rank[c] : (double)NAN;
            const bool scored_low = a->forced ? !a->forced[c] : !(s > a->p.gate_threshold);
            if (t->keep ? !t->keep[c] : a->p.gate == LG_GATE_ADAPTER && scored_low) st = reject(a, q, t, c, s, err);
            else {
                t->chunk = c;
                t->score = s;
            }
        }
        if (st != LG_OK) return st;
    }
    if (a->p.gate != LG_GATE_NONE) a->out[q].gate_s += lg_base_now() - began;
    return LG_OK;
}

static int64_t best_of(const float *score, const uint8_t *taken, int64_t n) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || score[i] > score[best])) best = i;
    return best;
}

static lg_status start(lg_asking *a, int64_t q, turn *t, const lg_lexical *x, lg_error *err) {
    const int64_t n = a->b->h.n_chunk;
    t->todo = lg_base_calloc(n, sizeof *t->todo);
    t->rejected = lg_base_calloc(n, sizeof *t->rejected);
    t->when = lg_base_calloc(n, sizeof *t->when);
    if (x) {
        t->keep = lg_base_calloc(n, 1);
        t->rank = lg_base_calloc(n, sizeof *t->rank);
    }
    if (!t->todo || !t->rejected || !t->when || (x && (!t->keep || !t->rank))) return nomem(err);
    for (int64_t c = 0; c < n; c++) t->todo[c] = c;
    t->n_todo = n;
    if (!x) return LG_OK;
    lg_memory_lexical_score(x, a->question[q].data, a->question[q].n, t->rank);
    for (int64_t i = 0; i < a->p.top && i < n; i++) { /* the best of them that share anything with the question */
        const int64_t c = best_of(t->rank, t->keep, n);
        if (!(t->rank[c] > 0)) break;
        t->keep[c] = 1;
    }
    return LG_OK;
}

static lg_status read_round(lg_asking *a, turn *t, int64_t *n_read, lg_error *err) {
    lg_status st = LG_OK;
    const double began = lg_base_now();
    lg_reading *r = lg_base_calloc(a->n, sizeof *r);
    int64_t n = 0;
    if (!r) return nomem(err);
    for (int64_t c = -1; n < a->n;) { /* in the order of chunks: readings of one chunk stand together */
        int64_t next = INT64_MAX;
        for (int64_t q = 0; q < a->n; q++)
            if (t[q].chunk > c && t[q].chunk < next) next = t[q].chunk;
        if (next == INT64_MAX) break;
        c = next;
        for (int64_t q = 0; q < a->n; q++) {
            if (t[q].chunk != c) continue;
            const lg_ids fill[LG_HOLE_COUNT] = { a->question[q], a->memory[q], { 0 } };
            r[n] = (lg_reading){ .who = q, .chunk = c, .n_max = a->p.memory_size };
            LG_TRY(lg_memory_prompt(&a->update, fill, &r[n].prompt, err));
            n++;
        }
    }
    *n_read = n;
    if (!n) goto done;
    if (lg_memory_can_draft(a))
        for (int64_t i = 0; i < n; i++) LG_TRY(lg_memory_read_drafted(a, &r[i], &a->memory[r[i].who], err));
    else LG_TRY(lg_memory_read(a, r, n, err));
    for (int64_t i = 0; i < n; i++) {
        const int64_t q = r[i].who;
        lg_ask_step *s = lg_memory_step(a, q, r[i].chunk);
        if (!s) LG_TRY(nomem(err));
        LG_TRY(lg_memory_keep(a, &r[i], err));
        t[q].version++;
        s->gate_score = t[q].score;
        s->accepted = true;
        s->position0 = a->b->h.chunk / a->b->h.ratio;
        s->seconds = r[i].out.prefill_s + r[i].out.decode_s;
        s->passes = r[i].out.decode_steps;
        s->prompt = r[i].prompt;
        r[i].prompt = (lg_ids){ 0 };
        if (!lg_memory_copy_ids(&s->memory, &a->memory[q])) LG_TRY(nomem(err));
        a->out[q].read_s += lg_base_now() - began;
    }
done:
    lg_memory_readings_free(r, a->n);
    return st;
}

lg_status lg_memory_loop(lg_asking *a, lg_error *err) {
    lg_status st = LG_OK;
    lg_lexical *x = NULL;
    turn *t = lg_base_calloc(a->n, sizeof *t);
    double *score = lg_base_calloc(lg_memory_gate_width(a), sizeof *score);
    if (!t || !score) LG_TRY(nomem(err));
    if (a->p.gate == LG_GATE_LEXICAL) LG_TRY(lg_memory_lexical_new(&x, a->b, err));
    for (int64_t q = 0; q < a->n; q++) LG_TRY(start(a, q, &t[q], x, err));
    for (int64_t n = 1; n;) {
        int64_t looked = 0;
        for (int64_t q = 0; q < a->n; q++) {
            LG_TRY(advance(a, q, &t[q], score, err));
            looked += t[q].round ? t[q].n_todo : t[q].at;
        }
        LG_TRY(lg_memory_tick(a, "read", looked / a->n, a->b->h.n_chunk, err));
        LG_TRY(read_round(a, t, &n, err));
    }
    LG_TRY(lg_memory_final(a, err));
done:
    for (int64_t q = 0; t && q < a->n; q++) {
        void *p[] = { t[q].todo, t[q].rejected, t[q].when, t[q].keep, t[q].rank };
        for (size_t i = 0; i < sizeof p / sizeof *p; i++) lg_base_free(p[i]);
    }
    lg_base_free(t);
    lg_base_free(score);
    lg_memory_lexical_free(x);
    return st;
}

/* ---- all modes ---- */
enum { PROMPT = 1 << LG_HOLE_PROMPT, MEMORY = 1 << LG_HOLE_MEMORY, CHUNK = 1 << LG_HOLE_CHUNK };

static lg_status templates(const lg_model *m, const lg_ask_params *p, lg_template *update, lg_template *answer, lg_template *gate, lg_error *err) {
    lg_status st = LG_OK;
    const char *u = p->update_template, *w = p->answer_template;
    switch (p->mode) {
    case LG_ASK_MEMORY:
        LG_TRY(lg_memory_template(update, m, u ? u : lg_memory_update_text, true, PROMPT | MEMORY, 0, err));
        LG_TRY(lg_memory_template(answer, m, w ? w : lg_memory_answer_text, true, PROMPT | MEMORY, 0, err));
        break;
    case LG_ASK_LOOKUP: /* an own template is a user turn like any other; the default is bare */
        LG_TRY(lg_memory_template(answer, m, w ? w : lg_memory_lookup_text, w != NULL, PROMPT, MEMORY, err));
        break;
    case LG_ASK_MEMAGENT:
        LG_TRY(lg_memory_template(update, m, u ? u : lg_memagent_update_text, true, PROMPT | MEMORY | CHUNK, 0, err));
        LG_TRY(lg_memory_template(answer, m, w ? w : p->boxed ? lg_memagent_boxed_text : lg_memagent_plain_text, true, PROMPT | MEMORY, 0, err));
        break;
    default:
        LG_TRY(lg_memory_template(answer, m, w ? w : lg_memory_full_text, true, PROMPT | CHUNK, 0, err));
    }
    if (p->gate == LG_GATE_ADAPTER) LG_TRY(lg_memory_template(gate, m, lg_memory_gate_text, true, PROMPT | MEMORY, 0, err));
done:
    return st;
}

static lg_status check(const lg_model *m, const lg_bank *b, const lg_ids *question, int64_t n, lg_ask_params *p, lg_error *err) {
    lg_status st = LG_OK;
    const bool slots = p->mode == LG_ASK_MEMORY || p->mode == LG_ASK_LOOKUP;
    if (n < 1) LG_TRY(lg_base_fail(err, LG_ERR_USAGE, -1, "no question"));
    if (p->memory_size < 1 || p->max_new < 0 || p->top < 1 || p->gate_batch < 0 || p->second_look < 0 || p->piece < 0 || p->n_stop_ids < -1)
        LG_TRY(lg_base_fail(err, LG_ERR_USAGE, -1, "a size of the question's options is out of range"));
    if (p->gate == LG_GATE_ADAPTER && (!slots || !m->gate_score.n_out))
        LG_TRY(lg_base_fail(err, LG_ERR_USAGE, -1, slots ? "the gate has no weights: an adapter with gate.score.weight is needed" : "this mode has no gate"));
    if (slots && !b->map.data) LG_TRY(lg_base_fail(err, LG_ERR_USAGE, -1, "the document was not compressed: there are no slots"));
    LG_TRY(lg_bank_fits(b, m, err));
    for (int64_t q = 0; q < n; q++)
        for (int64_t i = 0; i < question[q].n; i++)
            if (question[q].data[i] < 0 || question[q].data[i] >= m->cfg.n_vocab)
                LG_TRY(lg_base_fail(err, LG_ERR_LIMIT, -1, "question %lld: id %d at index %lld is outside the vocabulary of %lld", (long long)q,
                                    question[q].data[i], (long long)i, (long long)m->cfg.n_vocab));
    if (!p->gate_batch) p->gate_batch = GATE_BATCH;
    if (!p->piece) p->piece = PIECE;
done:
    return st;
}

static lg_status first_memory(const lg_model *m, const lg_ask_params *p, lg_ids *out, lg_error *err) {
    const char *text = p->memory_init ? p->memory_init : "No previous memory";
    return lg_text_encode(m->tok, text, (int64_t)strlen(text), 0, out, err);
}

static int64_t longest(const lg_ids *question, int64_t n) {
    int64_t most = 0;
    for (int64_t q = 0; q < n; q++) most = question[q].n > most ? question[q].n : most;
    return most;
}

lg_status lg_ask_context(const lg_model *m, const lg_bank *b, const lg_ids *question, int64_t n, const lg_ask_params *params, int64_t *out, lg_error *err) {
    lg_status st;
    lg_template update = { 0 }, answer = { 0 }, gate = { 0 };
    lg_ask_params p = *params;
    LG_TRY(check(m, b, question, n, &p, err));
    LG_TRY(templates(m, &p, &update, &answer, &gate, err));
    const int64_t slots = p.mode == LG_ASK_MEMORY || p.mode == LG_ASK_LOOKUP ? b->h.chunk / b->h.ratio : 0, q = longest(question, n);
    const int64_t piece = p.mode == LG_ASK_MEMAGENT ? (p.piece < b->h.n_tokens ? p.piece : b->h.n_tokens) : 0;
    const int64_t text = p.mode == LG_ASK_FULL || p.mode == LG_ASK_HYBRID ? b->h.n_tokens : 0;
    lg_ids init = { 0 }; /* the first memory may be longer than those to come */
    LG_TRY(first_memory(m, &p, &init, err));
    const int64_t mem = init.n > p.memory_size ? init.n : p.memory_size;
    lg_ids_free(&init);
    const int64_t reads[] = { slots + piece + lg_memory_template_len(&update) + q + mem + p.memory_size,
                              (p.mode == LG_ASK_LOOKUP ? slots : 0) + text + lg_memory_template_len(&answer) + q + (p.mode == LG_ASK_LOOKUP || text ? 0 : mem) + p.max_new,
                              p.gate == LG_GATE_ADAPTER ? slots + lg_memory_template_len(&gate) + q + mem : 0 };
    *out = 1;
    for (int i = 0; i < 3; i++) *out = reads[i] + 1 > *out ? reads[i] + 1 : *out;
done:
    lg_memory_template_free(&update);
    lg_memory_template_free(&answer);
    lg_memory_template_free(&gate);
    return st;
}

static void release(lg_asking *a) {
    lg_memory_template_free(&a->update);
    lg_memory_template_free(&a->answer);
    lg_memory_template_free(&a->gate);
    for (int64_t q = 0; a->memory && q < a->n; q++) lg_ids_free(&a->memory[q]);
    lg_base_free(a->memory);
    lg_ids_free(&a->stop);
}

static lg_status prepare(lg_asking *a, lg_error *err) {
    static const char *const newline[] = { "\n" };
    lg_status st;
    lg_ids init = { 0 };
    LG_TRY(check(a->m, a->b, a->question, a->n, &a->p, err));
    LG_TRY(templates(a->m, &a->p, &a->update, &a->answer, &a->gate, err));
    const lg_ids *own = lg_text_stop_ids(a->m->tok);
    for (int64_t i = 0; i < (a->p.n_stop_ids >= 0 ? a->p.n_stop_ids : own->n); i++)
        if (!lg_base_ids_push(&a->stop, a->p.n_stop_ids >= 0 ? a->p.stop_ids[i] : own->data[i])) LG_TRY(nomem(err));
    a->pad = a->p.pad_id >= 0 ? a->p.pad_id : lg_text_pad(a->m->tok);
    a->stop_text = a->p.stop;
    a->n_stop_text = a->p.n_stop;
    if (a->p.mode == LG_ASK_LOOKUP && !a->p.answer_template && !a->p.n_stop) { /* the default template's answers end at a newline */
        a->stop_text = newline;
        a->n_stop_text = 1;
    }
    LG_TRY(first_memory(a->m, &a->p, &init, err));
    a->memory = lg_base_calloc(a->n, sizeof *a->memory);
    if (!a->memory) LG_TRY(nomem(err));
    for (int64_t q = 0; q < a->n; q++)
        if (!lg_memory_copy_ids(&a->memory[q], &init)) LG_TRY(nomem(err));
done:
    lg_ids_free(&init);
    return st;
}

lg_status lg_ask(lg_session *s, const lg_bank *b, const lg_ids *question, int64_t n, const lg_ask_params *p, lg_answer *out, lg_error *err) {
    lg_status st;
    lg_asking a = { .s = s, .m = s->m, .b = b, .question = question, .n = n, .p = *p, .out = out };
    const bool slots = p->mode == LG_ASK_MEMORY || p->mode == LG_ASK_LOOKUP;
    for (int64_t q = 0; q < n; q++) out[q] = (lg_answer){ .chunk = -1 };
    if (p->mode == LG_ASK_HYBRID && !s->roles.n_layer) return lg_base_fail(err, LG_ERR_USAGE, -1, "mode hybrid needs head roles");
    LG_TRY(prepare(&a, err));
    lg_session_use_lora(s, slots && a.m->reader.layer ? &a.m->reader : NULL);
    switch (p->mode) {
    case LG_ASK_MEMORY: LG_TRY(lg_memory_loop(&a, err)); break;
    case LG_ASK_LOOKUP: LG_TRY(lg_memory_lookup(&a, err)); break;
    case LG_ASK_MEMAGENT: LG_TRY(lg_memory_memagent(&a, err)); break;
    default: LG_TRY(lg_memory_full(&a, err));
    }
done:
    lg_session_use_lora(s, NULL);
    release(&a);
    if (st != LG_OK)
        for (int64_t q = 0; q < n; q++) lg_answer_free(&out[q]);
    return st;
}
