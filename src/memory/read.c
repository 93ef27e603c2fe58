/* read: one call of the model after another: prompts behind slots, decoded together, and what becomes of the result. */
#include "memory/ask.h"
#include <math.h>
#include <string.h>

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

bool lg_memory_copy_ids(lg_ids *out, const lg_ids *from) {
    out->n = 0;
    for (int64_t i = 0; i < from->n; i++)
        if (!lg_base_ids_push(out, from->data[i])) return false;
    if (!out->data) out->data = lg_base_calloc(out->cap = 1, sizeof *out->data); /* empty is not absent */
    return out->data != NULL;
}

lg_status lg_memory_tick(lg_asking *a, const char *what, int64_t done, int64_t total, lg_error *err) {
    a->what = what;
    a->done = done;
    a->total = total;
    if (a->p.progress && !a->p.progress(a->p.progress_user, what, done, total)) a->stopped = true;
    return a->stopped ? lg_base_fail(err, LG_ERR_CANCELLED, -1, "cancelled") : LG_OK;
}

/* Called for every token: keeps the bar alive and lets a caller cancel within a long text. */
static bool on_token(void *user, int64_t index, int32_t id, const char *piece, int64_t n) {
    lg_asking *a = user;
    (void)index, (void)id, (void)piece, (void)n;
    if (a->p.progress && !a->p.progress(a->p.progress_user, a->what, a->done, a->total)) a->stopped = true;
    return !a->stopped;
}

void lg_memory_readings_free(lg_reading *r, int64_t n) {
    for (int64_t i = 0; r && i < n; i++) {
        lg_ids_free(&r[i].prompt);
        lg_generation_free(&r[i].out);
    }
    lg_base_free(r);
}

lg_sampler_params lg_memory_sampler(const lg_asking *a, int64_t who, int64_t chunk) {
    lg_sampler_params p = a->p.sampler;
    p.seed = lg_base_rng(p.seed, (uint64_t)(chunk + 1), (uint64_t)a->out[who].n_step);
    return p;
}

lg_status lg_memory_read(lg_asking *a, lg_reading *r, int64_t n, lg_error *err) {
    lg_status st = LG_OK;
    const int64_t n_layer = a->m->cfg.n_layer;
    lg_ids *prompt = lg_base_calloc(n, sizeof *prompt);
    lg_generate_params *p = lg_base_calloc(n, sizeof *p);
    lg_generation *out = lg_base_calloc(n, sizeof *out);
    lg_slots *slots = lg_base_calloc(n, sizeof *slots);
    const lg_slots **at = lg_base_calloc(n, sizeof *at);
    const uint8_t **rows = lg_base_calloc(n, 2 * n_layer * (int64_t)sizeof *rows);
    if (!prompt || !p || !out || !slots || !at || !rows) LG_TRY(nomem(err));
    for (int64_t i = 0; i < n; i++) {
        prompt[i] = r[i].prompt;
        lg_generate_defaults(&p[i]);
        p[i].n_max = r[i].n_max;
        p[i].sampler = lg_memory_sampler(a, r[i].who, r[i].chunk);
        p[i].stop_ids = a->stop.data;
        p[i].n_stop_ids = a->stop.n;
        p[i].stop = r[i].answer ? a->stop_text : NULL;
        p[i].n_stop = r[i].answer ? a->n_stop_text : 0;
        p[i].stream = on_token;
        p[i].stream_user = a;
        p[i].logprob = r[i].answer; /* costs a look at all logits of every step */
        if (r[i].chunk < 0) continue;
        if (i && r[i].chunk == r[i - 1].chunk) { /* one chunk, one object */
            at[i] = at[i - 1];
            continue;
        }
        LG_TRY(lg_memory_bank_slots(a->b, r[i].chunk, &slots[i], rows + 2 * n_layer * i, rows + 2 * n_layer * i + n_layer, err));
        if (a->p.slot_rope >= 0) slots[i].rope = a->p.slot_rope != 0;
        at[i] = &slots[i];
    }
    LG_TRY(lg_session_generate_many(a->s, prompt, at, p, n, out, err));
    for (int64_t i = 0; i < n; i++) r[i].out = out[i];
    if (a->stopped) LG_TRY(lg_base_fail(err, LG_ERR_CANCELLED, -1, "cancelled"));
done:
    lg_base_free(prompt);
    lg_base_free(p);
    lg_base_free(out);
    lg_base_free(slots);
    lg_base_free(at);
    lg_base_free(rows);
    return st;
}

lg_ask_step *lg_memory_step(lg_asking *a, int64_t who, int64_t chunk) {
    lg_answer *o = &a->out[who];
    if ((o->n_step & (o->n_step - 1)) == 0) { /* room doubles at powers of two */
        const int64_t cap = o->n_step ? 2 * o->n_step : 1;
        lg_ask_step *step = lg_base_realloc(o->step, o->n_step * (int64_t)sizeof *step, cap * (int64_t)sizeof *step);
        if (!step) return NULL;
        o->step = step;
    }
    lg_ask_step *s = &o->step[o->n_step++];
    *s = (lg_ask_step){ .chunk = chunk, .gate_score = (double)NAN, .position0 = -1, .logprob = (double)NAN };
    if (chunk >= 0 && chunk < a->b->h.n_chunk) {
        s->token_begin = chunk * a->b->h.chunk;
        s->token_end = s->token_begin + a->b->chunk[chunk].n_token;
    }
    return s;
}

static bool stops(const lg_asking *a, int32_t id) {
    for (int64_t i = 0; i < a->stop.n; i++)
        if (a->stop.data[i] == id) return true;
    return false;
}

lg_status lg_memory_keep(lg_asking *a, const lg_reading *r, lg_error *err) {
    lg_ids *m = &a->memory[r->who];
    int64_t kept = 0;
    for (int64_t i = 0; i < r->out.ids.n; i++) kept += r->out.ids.data[i] != a->pad && !stops(a, r->out.ids.data[i]);
    if (!kept && a->p.keep_memory) return LG_OK;
    m->n = 0;
    for (int64_t i = 0; i < r->out.ids.n; i++) {
        const int32_t id = r->out.ids.data[i];
        if (id != a->pad && !stops(a, id) && !lg_base_ids_push(m, id)) return nomem(err);
    }
    return LG_OK;
}

static void strip(lg_text *t) {
    int64_t a = 0;
    while (t->n && strchr(" \t\r\n\v\f", t->data[t->n - 1])) t->n--;
    while (a < t->n && strchr(" \t\r\n\v\f", t->data[a])) a++;
    if (a) memmove(t->data, t->data + a, (size_t)(t->n - a));
    t->n -= a;
    if (t->data) t->data[t->n] = 0;
}

lg_status lg_memory_answer(lg_asking *a, lg_reading *r, int64_t position0, lg_error *err) {
    lg_answer *o = &a->out[r->who];
    lg_ask_step *s = lg_memory_step(a, r->who, -1);
    if (!s) return nomem(err);
    s->accepted = true;
    s->position0 = position0;
    s->seconds = r->out.prefill_s + r->out.decode_s;
    s->passes = r->out.decode_steps;
    s->prompt = r->prompt;
    r->prompt = (lg_ids){ 0 };
    s->logprob = r->out.ids.n ? r->out.logprob : (double)NAN;
    o->text = r->out.text;
    o->ids = r->out.ids;
    r->out.text = (lg_text){ 0 };
    r->out.ids = (lg_ids){ 0 };
    strip(&o->text);
    return LG_OK;
}

lg_status lg_memory_final(lg_asking *a, lg_error *err) {
    lg_status st = LG_OK;
    const double began = lg_base_now();
    lg_reading *r = lg_base_calloc(a->n, sizeof *r);
    if (!r) return nomem(err);
    for (int64_t q = 0; q < a->n; q++) {
        const lg_ids fill[LG_HOLE_COUNT] = { a->question[q], a->memory[q], { 0 } };
        r[q] = (lg_reading){ .who = q, .chunk = -1, .n_max = a->p.max_new, .answer = true };
        LG_TRY(lg_memory_prompt(&a->answer, fill, &r[q].prompt, err));
    }
    LG_TRY(lg_memory_tick(a, "answer", 0, a->n, err));
    LG_TRY(lg_memory_read(a, r, a->n, err));
    for (int64_t q = 0; q < a->n; q++) {
        LG_TRY(lg_memory_answer(a, &r[q], 0, err));
        a->out[q].answer_s += lg_base_now() - began;
    }
done:
    lg_memory_readings_free(r, a->n);
    return st;
}
