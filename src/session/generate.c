/* Generation: prompts in, text out; stop ids and texts, streaming of whole characters, many prompts at once. */
#include "session/session.h"
#include <math.h>
#include <string.h>

void lg_generate_defaults(lg_generate_params *p) {
    *p = (lg_generate_params){ .n_max = 256, .n_stop_ids = -1 };
    lg_sampler_defaults(&p->sampler);
}
const char *lg_stop_reason_text(lg_stop_reason r) {
    static const char *const text[] = { "eos", "length", "stop", "cancelled" };
    return text[r];
}
void lg_generation_free(lg_generation *g) {
    lg_ids_free(&g->ids);
    lg_text_free(&g->text);
}

/* One prompt under way. */
typedef struct run {
    const lg_generate_params *p;
    lg_generation *out;
    lg_text_stream chars;
    int64_t index, streamed; /* bytes of out->text handed to the callback */
    int32_t next;            /* the id to feed */
    double sum;              /* of ln p, where asked for */
    int64_t n_sum;
    bool active;
} run;

static bool ends_here(const lg_session *s, const lg_generate_params *p, int32_t id) {
    const lg_ids *own = lg_text_stop_ids(s->m->tok);
    const int32_t *ids = p->n_stop_ids >= 0 ? p->stop_ids : own->data;
    const int64_t n = p->n_stop_ids >= 0 ? p->n_stop_ids : own->n;
    for (int64_t i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

/* Earliest stop text in t[from..n), or -1. */
static int64_t find_stop(const lg_generate_params *p, const char *t, int64_t from, int64_t n) {
    int64_t best = -1;
    for (int64_t i = 0; i < p->n_stop; i++) {
        const size_t len = strlen(p->stop[i]);
        const char *hit = len && n > from ? memmem(t + from, (size_t)(n - from), p->stop[i], len) : NULL;
        if (hit && (best < 0 || hit - t < best)) best = hit - t;
    }
    return best;
}
/* Bytes at the end of t that may yet become a stop text. */
static int64_t held_back(const lg_generate_params *p, const char *t, int64_t n) {
    int64_t hold = 0;
    for (int64_t i = 0; i < p->n_stop; i++) {
        const int64_t len = (int64_t)strlen(p->stop[i]);
        for (int64_t k = len - 1 < n ? len - 1 : n; k > hold; k--)
            if (!memcmp(t + n - k, p->stop[i], (size_t)k)) hold = k;
    }
    return hold;
}

static bool hand_out(run *r, int32_t id, int64_t upto) {
    lg_generation *g = r->out;
    if (!r->p->stream || upto <= r->streamed) return true;
    const bool go = r->p->stream(r->p->stream_user, r->index, id, g->text.data + r->streamed, upto - r->streamed);
    r->streamed = upto;
    return go;
}

static void finish(run *r, lg_stop_reason why) {
    r->active = false;
    r->out->stop_reason = why;
}

/* ln p of an id under the plain softmax of the logits. */
static double ln_p(const float *logits, int64_t n, int32_t id) {
    float top = logits[0];
    double sum = 0;
    for (int64_t i = 1; i < n; i++) top = logits[i] > top ? logits[i] : top;
    for (int64_t i = 0; i < n; i++) sum += (double)expf(logits[i] - top);
    return (double)logits[id] - (double)top - log(sum);
}

/* Takes the next id from the logits of sequence `seq` and decides whether the run goes on. */
static lg_status take(lg_session *s, run *r, int64_t seq, float *scratch, lg_error *err) {
    lg_generation *g = r->out;
    lg_text *t = &g->text;
    if (g->ids.n >= r->p->n_max) {
        finish(r, LG_STOP_LENGTH);
        return LG_OK;
    }
    const int64_t len = lg_session_len(s, seq), n_recent = len < LG_RECENT ? len : LG_RECENT, row = s->seq[seq].logit_row;
    const lg_draw draw = lg_session_draw(&r->p->sampler, n_recent, g->ids.n);
    const lg_pass *p = &s->pass[s->now];
    const bool known = s->next_known && !memcmp(&draw, &p->draw[row], sizeof draw); /* the device drew as this run would */
    const int32_t id = known ? p->next[row] : lg_ops_sample_fast(lg_session_logits(s, seq), s->m->cfg.n_vocab, &draw, lg_session_ids(s, seq) + len - n_recent, scratch);
    if (r->p->logprob) {
        r->sum += ln_p(lg_session_logits(s, seq), s->m->cfg.n_vocab, id);
        g->logprob = r->sum / (double)++r->n_sum;
    }
    if (ends_here(s, r->p, id)) {
        finish(r, LG_STOP_EOS);
        return LG_OK;
    }
    const int64_t had = t->n;
    if (!lg_base_ids_push(&g->ids, id)) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    s->seq[seq].n_drawn = g->ids.n;
    const lg_status st = lg_text_stream_push(s->m->tok, &r->chars, id, false, t, err);
    if (st != LG_OK) return st;
    int64_t longest = 0;
    for (int64_t i = 0; i < r->p->n_stop; i++)
        if ((int64_t)strlen(r->p->stop[i]) > longest) longest = (int64_t)strlen(r->p->stop[i]);
    const int64_t stop = find_stop(r->p, t->data, had > longest ? had - longest : 0, t->n);
    if (stop >= 0) {
        t->n = stop;
        t->data[stop] = 0;
        memset(&r->chars, 0, sizeof r->chars);
        finish(r, LG_STOP_STOP);
        hand_out(r, id, stop);
        return LG_OK;
    }
    r->next = id;
    if (!hand_out(r, id, t->n - held_back(r->p, t->data, t->n))) finish(r, LG_STOP_CANCELLED);
    else if (g->ids.n >= r->p->n_max || len + s->seq[seq].n_slot + s->seq[seq].shift >= s->p.n_ctx) finish(r, LG_STOP_LENGTH);
    return LG_OK;
}

static lg_status end_text(run *r, lg_error *err) {
    if (!lg_text_stream_end(&r->chars, &r->out->text)) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    if (r->out->stop_reason != LG_STOP_CANCELLED) hand_out(r, -1, r->out->text.n);
    /* A caller may print the text: it is a string even when empty. */
    return lg_base_text_append(&r->out->text, "", 0) ? LG_OK : lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
}

/* Puts sequence `seq` of [first, first + width) behind slots; another one behind the same slots lends its pages. */
static lg_status stand_behind(lg_session *s, int64_t seq, const lg_slots *slots, const lg_slots **at, int64_t first, int64_t width, lg_error *err) {
    lg_status st = LG_OK;
    if (at[seq - first] == slots && slots) return LG_OK;
    at[seq - first] = slots;
    for (int64_t w = 0; slots && w < width; w++) {
        if (first + w == seq || at[w] != slots) continue;
        LG_TRY(lg_session_fork(s, seq, first + w, err));
        LG_TRY(lg_session_rewind(s, seq, 0, err));
        return LG_OK;
    }
    LG_TRY(lg_session_set_slots(s, seq, slots, err));
done:
    return st;
}

static lg_status begin(lg_session *s, run *r, int64_t seq, const lg_ids *prompt, float *scratch, lg_error *err) {
    const double before = s->stats.prefill_s;
    s->seq[seq].sampler = &r->p->sampler;
    s->seq[seq].n_drawn = 0;
    lg_status st = lg_session_sync(s, seq, prompt->data, prompt->n, err);
    if (st != LG_OK) return st;
    r->out->prompt_tokens = prompt->n;
    r->out->prefill_s = s->stats.prefill_s - before;
    r->active = true;
    return take(s, r, seq, scratch, err);
}

/* Decodes prompts on the sequences first .. first + width - 1; a sequence that ends takes the next prompt. */
static lg_status decode(lg_session *s, int64_t first, int64_t width, const lg_ids *prompts, const lg_slots *const *slots, bool many,
                        const lg_generate_params *params, int64_t n, lg_generation *out, lg_error *err) {
    lg_status st = LG_OK;
    int64_t started = 0, ended = 0;
    run *runs = lg_base_calloc(width, sizeof *runs);
    int64_t *who = lg_base_calloc(width, sizeof *who);
    const lg_slots **at = lg_base_calloc(width, sizeof *at); /* what each sequence stands behind, as far as this call knows */
    int32_t *seqs = lg_base_calloc(width, sizeof *seqs), *ids = lg_base_calloc(width, sizeof *ids);
    float *scratch = lg_base_calloc(2 * s->m->cfg.n_vocab, sizeof *scratch);
    if (!runs || !who || !at || !seqs || !ids || !scratch) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    for (int64_t i = 0; i < n; i++) out[i] = (lg_generation){ 0 };
    while (ended < n) {
        for (int64_t w = 0; w < width && !lg_session_is_ahead(s); w++) /* (a prompt waits until the step that others have begun is taken) */
            while (!runs[w].active && started < n) {
                runs[w] = (run){ .p = &params[started], .out = &out[started], .index = started };
                if (many) LG_TRY(stand_behind(s, first + w, slots ? slots[started] : NULL, at, first, width, err));
                LG_TRY(begin(s, &runs[w], first + w, &prompts[started], scratch, err));
                started++;
                if (!runs[w].active) {
                    LG_TRY(end_text(&runs[w], err));
                    ended++;
                }
            }
        int64_t k = 0, idle = 0; /* idle: sequences that have no prompt, or none after this step */
        bool goes_on = false, reads = false; /* some run needs a step more; some run reads logits */
        for (int64_t w = 0; w < width; w++) {
            run *r = &runs[w];
            idle += !r->active;
            if (!r->active) continue;
            const bool last = r->out->ids.n + 1 >= r->p->n_max;
            idle += last;
            goes_on = goes_on || !last;
            reads = reads || r->p->logprob;
            who[k] = w;
            seqs[k] = (int32_t)(first + w);
            ids[k++] = r->next;
        }
        if (!k) {
            lg_session_settle(s);
            continue; /* prompts are left, or all have ended */
        }
        const lg_stats a = s->stats;
        LG_TRY(lg_session_step_on(s, seqs, ids, k, goes_on && !reads && !(idle && started < n), err));
        for (int64_t i = 0; i < k; i++) {
            run *r = &runs[who[i]];
            r->out->decode_s += s->stats.decode_s - a.decode_s;
            r->out->decode_steps++;
            r->out->kv_bytes_read += s->row_bytes_read[i];
            r->out->kv_bytes_dense += s->row_bytes_dense[i];
            LG_TRY(take(s, r, first + who[i], scratch, err));
            if (!r->active) {
                LG_TRY(end_text(r, err));
                ended++;
            }
        }
    }
done:
    lg_session_settle(s);
    for (int64_t w = 0; w < width; w++) s->seq[first + w].sampler = NULL; /* the caller's */
    lg_base_free(runs);
    lg_base_free(who);
    lg_base_free(at);
    lg_base_free(seqs);
    lg_base_free(ids);
    lg_base_free(scratch);
    if (st != LG_OK)
        for (int64_t i = 0; i < n; i++) {
            lg_generation_free(&out[i]);
            out[i] = (lg_generation){ 0 };
        }
    return st;
}

static lg_status check_params(const lg_generate_params *p, lg_error *err) {
    const lg_sampler_params *q = &p->sampler;
    if (p->n_max < 0) return lg_base_fail(err, LG_ERR_USAGE, -1, "%lld new tokens", (long long)p->n_max);
    if (!(q->temp < 1e4f) || !(q->top_p >= 0 && q->top_p <= 1) || !(q->min_p >= 0 && q->min_p <= 1) || !(q->repeat_penalty > 0 && q->repeat_penalty < 1e4f) ||
        q->top_k < 0)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "a sampling option is out of range");
    return LG_OK;
}

lg_status lg_generate(lg_session *s, int64_t seq, const int32_t *prompt, int64_t n_prompt, const lg_generate_params *p, lg_generation *out,
                      lg_error *err) {
    int32_t *data = NULL;
    memcpy(&data, &prompt, sizeof data); /* lg_ids has no const twin; decode only reads it */
    const lg_ids ids = { .data = data, .n = n_prompt };
    const lg_status st = check_params(p, err);
    *out = (lg_generation){ 0 };
    if (st != LG_OK) return st;
    if (seq < 0 || seq >= s->p.n_seq_max) return lg_base_fail(err, LG_ERR_USAGE, -1, "sequence %lld", (long long)seq);
    return decode(s, seq, 1, &ids, NULL, false, p, 1, out, err);
}

static lg_status generate_all(lg_session *s, const lg_ids *prompts, const lg_slots *const *slots, bool many, const lg_generate_params *params,
                              int64_t n, lg_generation *out, lg_error *err) {
    for (int64_t i = 0; i < n; i++) {
        const lg_status st = check_params(&params[i], err);
        if (st != LG_OK) return st;
    }
    return decode(s, 0, s->p.n_seq_max < n ? s->p.n_seq_max : n, prompts, slots, many, params, n, out, err);
}

lg_status lg_generate_batch(lg_session *s, const lg_ids *prompts, const lg_generate_params *params, int64_t n, lg_generation *out, lg_error *err) {
    return generate_all(s, prompts, NULL, false, params, n, out, err);
}

lg_status lg_session_generate_many(lg_session *s, const lg_ids *prompts, const lg_slots *const *slots, const lg_generate_params *params, int64_t n,
                                   lg_generation *out, lg_error *err) {
    return generate_all(s, prompts, slots, true, params, n, out, err);
}
