/* memagent: what the compressed memory is compared with, on the same engine and without any adapter.
 *
 * memagent (arXiv 2507.02259): pieces of 5000 ids are read as text, one independent chat each, whose whole answer becomes the
 * memory (at most 1024 tokens; what follows a last </think> where there is one); then one chat answers from the memory. Piece
 * ids are spliced into the prompt, as the published trainer does. full, hybrid: the whole text in the window, one chat; the
 * document stands first, so further questions on it reuse its cache. */
#include "memory/ask.h"
#include <ctype.h>
#include <math.h>
#include <string.h>

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

/* ---- answers ---- */
static char *find_last(char *s, const char *what) {
    char *last = NULL;
    for (char *at = s; (at = strstr(at, what)) != NULL; at++) last = at;
    return last;
}
static bool put(lg_text *out, const char *s, int64_t n) {
    while (n > 0 && isspace((unsigned char)s[n - 1])) n--;
    while (n > 0 && isspace((unsigned char)*s)) s++, n--;
    out->n = 0;
    return lg_base_text_append(out, s, n);
}

/* Behind the last "the answer is" (lower case, asterisks dropped), full stops at the ends removed. */
static bool extract_plain(char *s, lg_text *out) {
    char *to = s;
    for (const char *from = s; *from; from++)
        if (*from != '*') *to++ = *from;
    *to = 0;
    char *at = find_last(s, "the answer is");
    if (!at) return false;
    at += strlen("the answer is");
    while (isspace((unsigned char)*at)) at++;
    int64_t n = (int64_t)strlen(at);
    while (n > 0 && isspace((unsigned char)at[n - 1])) n--;
    while (n > 0 && *at == '.') at++, n--;
    while (n > 0 && at[n - 1] == '.') n--;
    return put(out, at, n);
}

/* Inside the last \boxed{}, braces matched; "\boxed x" ends at a $. */
static bool extract_boxed(char *s, lg_text *out) {
    char *spaced = find_last(s, "\\boxed "), *at = find_last(s, "\\boxed{");
    if (spaced) {
        spaced += strlen("\\boxed ");
        return put(out, spaced, (int64_t)strcspn(spaced, "$"));
    }
    if (!at) return false;
    at += strlen("\\boxed{");
    int depth = 1;
    for (char *c = at; *c; c++) {
        depth += (*c == '{') - (*c == '}');
        if (!depth) return put(out, at, c - at);
    }
    return false;
}

bool lg_memory_extract(const char *s, bool boxed, lg_text *out) {
    char *copy = lg_base_strdup(s);
    out->n = 0;
    const bool found = copy && (boxed ? extract_boxed : extract_plain)(copy, out);
    lg_base_free(copy);
    if (!found) lg_text_free(out);
    return found;
}

/* ---- memagent ---- */

/* Thinking is no memory: ids up to the last </think> go. The tag is found in the text; its ids are those that spell it. */
static lg_status drop_thinking(lg_asking *a, lg_reading *r, lg_error *err) {
    lg_text t = { 0 };
    lg_status st = LG_OK;
    int64_t cut = 0;
    if (!r->out.text.data || !strstr(r->out.text.data, "</think>")) return LG_OK;
    for (int64_t i = 0; i < r->out.ids.n; i++) {
        const int64_t before = t.n;
        LG_TRY(lg_text_decode(a->m->tok, r->out.ids.data + i, 1, LG_TOK_SPECIAL, &t, err));
        const char *tag = find_last(t.data, "</think>");
        if (tag && tag + 8 > t.data + before) cut = i + 1;
    }
    memmove(r->out.ids.data, r->out.ids.data + cut, (size_t)(r->out.ids.n - cut) * sizeof *r->out.ids.data);
    r->out.ids.n -= cut;
done:
    lg_text_free(&t);
    return st;
}

static lg_status read_piece(lg_asking *a, int64_t piece, lg_error *err) {
    lg_status st = LG_OK;
    const double began = lg_base_now();
    const int64_t begin = piece * a->p.piece, left = a->b->h.n_tokens - begin, len = left < a->p.piece ? left : a->p.piece;
    lg_ids text = { 0 };
    lg_reading *r = lg_base_calloc(a->n, sizeof *r);
    if (!r) return nomem(err);
    for (int64_t i = 0; i < len; i++)
        if (!lg_base_ids_push(&text, a->b->ids[begin + i])) LG_TRY(nomem(err));
    for (int64_t q = 0; q < a->n; q++) {
        const lg_ids fill[LG_HOLE_COUNT] = { a->question[q], a->memory[q], text };
        r[q] = (lg_reading){ .who = q, .chunk = -1, .n_max = a->p.memory_size };
        LG_TRY(lg_memory_prompt(&a->update, fill, &r[q].prompt, err));
    }
    LG_TRY(lg_memory_read(a, r, a->n, err));
    for (int64_t q = 0; q < a->n; q++) {
        lg_ask_step *s = lg_memory_step(a, q, piece);
        if (!s) LG_TRY(nomem(err));
        LG_TRY(drop_thinking(a, &r[q], err));
        LG_TRY(lg_memory_keep(a, &r[q], err));
        s->token_begin = begin;
        s->token_end = begin + len;
        s->accepted = true;
        s->position0 = 0;
        s->seconds = r[q].out.prefill_s + r[q].out.decode_s;
        s->passes = r[q].out.decode_steps;
        s->prompt = r[q].prompt;
        r[q].prompt = (lg_ids){ 0 };
        if (!lg_memory_copy_ids(&s->memory, &a->memory[q])) LG_TRY(nomem(err));
        a->out[q].read_s += lg_base_now() - began;
    }
done:
    lg_ids_free(&text);
    lg_memory_readings_free(r, a->n);
    return st;
}

lg_status lg_memory_memagent(lg_asking *a, lg_error *err) {
    lg_status st = LG_OK;
    const int64_t n = (a->b->h.n_tokens + a->p.piece - 1) / a->p.piece;
    for (int64_t i = 0; i < n; i++) {
        LG_TRY(lg_memory_tick(a, "read", i, n, err));
        LG_TRY(read_piece(a, i, err));
    }
    LG_TRY(lg_memory_final(a, err));
    for (int64_t q = 0; q < a->n; q++) {
        lg_answer *o = &a->out[q];
        char *after = o->text.data ? find_last(o->text.data, "</think>") : NULL;
        lg_memory_extract(after ? after + 8 : o->text.data ? o->text.data : "", a->p.boxed, &o->extracted);
    }
done:
    return st;
}

/* ---- full, hybrid ---- */
lg_status lg_memory_full(lg_asking *a, lg_error *err) {
    lg_status st = LG_OK;
    lg_ids text = { 0 };
    lg_reading r = { .chunk = -1 };
    for (int64_t i = 0; i < a->b->h.n_tokens; i++)
        if (!lg_base_ids_push(&text, a->b->ids[i])) LG_TRY(nomem(err));
    for (int64_t q = 0; q < a->n; q++) {
        const double began = lg_base_now();
        const lg_ids fill[LG_HOLE_COUNT] = { a->question[q], { 0 }, text };
        lg_generate_params p;
        lg_generate_defaults(&p);
        p.n_max = a->p.max_new;
        p.sampler = lg_memory_sampler(a, q, -1);
        p.stop_ids = a->stop.data;
        p.n_stop_ids = a->stop.n;
        p.stop = a->stop_text;
        p.n_stop = a->n_stop_text;
        p.logprob = true;
        r.who = q;
        LG_TRY(lg_memory_tick(a, "answer", q, a->n, err));
        LG_TRY(lg_memory_prompt(&a->answer, fill, &r.prompt, err));
        LG_TRY(lg_generate(a->s, 0, r.prompt.data, r.prompt.n, &p, &r.out, err));
        LG_TRY(lg_memory_answer(a, &r, 0, err));
        lg_generation_free(&r.out);
        a->out[q].answer_s = lg_base_now() - began;
    }
done:
    lg_ids_free(&text);
    lg_ids_free(&r.prompt);
    lg_generation_free(&r.out);
    return st;
}
