/* longan ask: questions about a document or a bank: compressed memory, lookup, or the modes that read the text itself. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ask.h"

enum { MODE_MEMORY, MODE_LOOKUP, MODE_MEMAGENT, MODE_FULL, MODE_HYBRID };

/* ---- the document ---------------------------------------------------------------------------------- */

static bool is_bank(const char *path)
{
    char head[6] = "";
    FILE *f = strcmp(path, "-") == 0 ? NULL : fopen(path, "rb");
    if (!f)
        return false;
    bool is = fread(head, 1, sizeof head, f) == sizeof head && memcmp(head, "LGBANK", 6) == 0;
    fclose(f);
    return is;
}

/* Files one behind the other, each ended by a newline before the next. */
static int read_document(asked *a, int n_args)
{
    a->source = cli_alloc(NULL, (size_t)n_args, sizeof *a->source);
    for (int i = 0; i < n_args; i++) {
        if (a->text.n && a->text.data[a->text.n - 1] != '\n')
            buf_puts(&a->text, "\n");
        int64_t begin = (int64_t)a->text.n;
        int rc = read_input(a->o->args[i], &a->text);
        if (rc)
            return rc;
        a->source[a->n_source++] = (ask_source){a->o->args[i], begin, (int64_t)a->text.n};
    }
    return a->text.n ? CLI_DONE : failed("the document is empty");
}

static void cache_folder(const options *o, buf *out)
{
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (o->cache)
        buf_puts(out, o->cache);
    else if (xdg && *xdg)
        buf_printf(out, "%s/longan", xdg);
    else
        buf_printf(out, "%s/.cache/longan", home && *home ? home : ".");
}

static int compress_document(asked *a)
{
    static const lg_dtype slots[] = {LG_DTYPE_F32, LG_DTYPE_BF16, LG_DTYPE_KV8};
    const options *o = a->o;
    lg_error e = {0};
    lg_bank_params p;
    buf folder = {0};
    bool built;
    double began = cli_clock();
    lg_bank_defaults(&p);
    p.chunk = o->chunk;
    p.window = o->window;
    p.ratio = o->ratio;
    p.slots = slots[o->slots];
    p.progress = cli_progress;
    cache_folder(o, &folder);
    lg_status st = lg_bank_cached(&a->bank, a->m, &p, a->text.data, (int64_t)a->text.n, folder.data, &built, &e);
    cli_progress_end();
    buf_free(&folder);
    a->build_s = cli_clock() - began;
    if (st == LG_OK) {
        lg_bank_get_info(a->bank, &a->info);
        if (built)
            note("%lld tokens compressed in %.1f s", (long long)a->info.n_tokens, a->build_s);
        else
            a->build_s = 0;
        return CLI_DONE;
    }
    return st == LG_ERR_UNSUPPORTED ? failed("%s; without such weights: --mode memagent, which works with any model", e.message)
                                    : failed_with(&e);
}

/* documents: how many of the arguments are. */
static int open_document(asked *a, int documents)
{
    const options *o = a->o;
    lg_error e = {0};
    int rc = CLI_DONE;
    if (documents == 1 && is_bank(o->args[0])) {
        if (lg_bank_open(&a->bank, o->args[0], &e) != LG_OK)
            return failed_with(&e);
    } else {
        for (int i = 0; i < documents; i++)
            if (is_bank(o->args[i]))
                return usage_error("%s is a bank; a bank stands alone", o->args[i]);
        rc = read_document(a, documents);
        if (!rc && (o->mode == MODE_MEMORY || o->mode == MODE_LOOKUP))
            rc = compress_document(a);
        else if (!rc && lg_bank_plain(&a->bank, a->m, a->text.data, (int64_t)a->text.n, o->mode == MODE_MEMAGENT ? o->piece : 0, &e) != LG_OK)
            rc = failed_with(&e);
    }
    if (!rc)
        lg_bank_get_info(a->bank, &a->info);
    return rc;
}

/* ---- questions ------------------------------------------------------------------------------------- */

static int text_question(asked *a, const char *s, int64_t n, id_list *out)
{
    const options *o = a->o;
    buf text = {0};
    lg_ids ids = {0};
    lg_error e = {0};
    if (o->mode == MODE_LOOKUP && !o->answer_template && (n == 0 || *s != ' '))
        buf_puts(&text, " "); /* "Question: ..." of the default template: the blank belongs to the first word */
    buf_add(&text, s, (size_t)n);
    lg_status st = lg_tokenize(a->m, text.data, (int64_t)text.n, 0, &ids, &e);
    for (int64_t i = 0; i < ids.n && st == LG_OK; i++)
        ids_push(out, ids.data[i]);
    lg_ids_free(&ids);
    buf_free(&text);
    return st == LG_OK ? CLI_DONE : failed_with(&e);
}

static int read_questions(asked *a, const char *question, int64_t n_vocab)
{
    const options *o = a->o;
    int rc = CLI_DONE;
    a->n = 1;
    if (o->questions)
        rc = batch_read(o->questions, "question", &a->items, &a->n);
    if (rc)
        return rc;
    a->ids = cli_alloc(NULL, (size_t)a->n, sizeof *a->ids);
    a->question = cli_alloc(NULL, (size_t)a->n, sizeof *a->question);
    memset(a->ids, 0, (size_t)a->n * sizeof *a->ids);
    for (int64_t i = 0; i < a->n && !rc; i++) {
        if (!o->questions)
            rc = o->question_ids ? read_ids(o->question_ids, n_vocab, &a->ids[i])
                                 : text_question(a, question, (int64_t)strlen(question), &a->ids[i]);
        else if (a->items[i].has_prompt)
            rc = text_question(a, a->items[i].prompt.data, (int64_t)a->items[i].prompt.n, &a->ids[i]);
        else
            for (int64_t k = 0; k < a->items[i].ids.n && !rc; k++) {
                int32_t id = a->items[i].ids.v[k];
                if (id >= n_vocab)
                    rc = failed("%s: line %lld: id %lld is %d, outside [0, %lld)", o->questions, (long long)a->items[i].line, (long long)k, (int)id,
                                (long long)n_vocab);
                ids_push(&a->ids[i], id);
            }
        a->question[i] = (lg_ids){a->ids[i].v, a->ids[i].n, a->ids[i].cap};
    }
    return rc;
}

static int read_template(const char *path, buf *out)
{
    if (!path)
        return CLI_DONE;
    int rc = read_input(path, out);
    return rc ? rc : strlen(out->data) != out->n ? failed("%s: holds a NUL byte", path) : CLI_DONE;
}

/* ---- output ---------------------------------------------------------------------------------------- */

void ask_range(const asked *a, int64_t token_begin, int64_t token_end, int64_t *byte_begin, int64_t *byte_end)
{
    *byte_begin = *byte_end = -1;
    lg_bank_chunk x;
    int64_t first = token_begin / a->info.chunk, last = (token_end - 1) / a->info.chunk;
    if (token_end <= token_begin || token_begin % a->info.chunk || (token_end % a->info.chunk && token_end != a->info.n_tokens))
        return;
    if (lg_bank_get_chunk(a->bank, first, &x, NULL) == LG_OK && x.byte_begin >= 0) {
        int64_t begin = x.byte_begin;
        if (lg_bank_get_chunk(a->bank, last, &x, NULL) == LG_OK && x.byte_end >= 0) {
            *byte_begin = begin;
            *byte_end = x.byte_end;
        }
    }
}

void ask_text(const asked *a, const int32_t *ids, int64_t n, buf *out)
{
    lg_text t = {0};
    if (lg_detokenize(a->m, ids, n, LG_TOK_SPECIAL, &t, NULL) == LG_OK && t.n)
        buf_add(out, t.data, (size_t)t.n);
    else
        buf_add(out, "", 0);
    lg_text_free(&t);
}

static void json_maybe(buf *b, const char *key, int64_t v, bool known)
{
    json_key(b, key);
    if (known)
        json_int(b, v);
    else
        json_none(b);
}

static void json_range(const asked *a, int64_t token_begin, int64_t token_end, buf *b)
{
    int64_t begin, end;
    bool chunk = token_end > token_begin;
    ask_range(a, token_begin, token_end, &begin, &end);
    json_maybe(b, "token_begin", token_begin, chunk);
    json_maybe(b, "token_end", token_end, chunk);
    json_maybe(b, "byte_begin", begin, begin >= 0);
    json_maybe(b, "byte_end", end, end >= 0);
}

static void json_memory(buf *b, const char *key, const lg_ids *x)
{
    json_key(b, key);
    if (x->data)
        json_ids(b, x->data, x->n);
    else
        json_none(b);
}

static void json_step(const asked *a, const lg_ask_step *s, buf *b)
{
    json_begin(b, '{');
    json_maybe(b, "chunk", s->chunk, s->chunk >= 0);
    json_range(a, s->token_begin, s->token_end, b);
    json_kv_real(b, "gate_score", s->gate_score);
    json_key(b, "accepted");
    json_bool(b, s->accepted);
    json_memory(b, "prompt_ids", &s->prompt);
    json_memory(b, "memory_ids", &s->memory);
    if (a->o->trace && s->memory.data) {
        buf t = {0};
        ask_text(a, s->memory.data, s->memory.n, &t);
        json_key(b, "memory");
        json_text(b, t.data, (int64_t)t.n);
        buf_free(&t);
    }
    json_maybe(b, "position0", s->position0, s->position0 >= 0);
    json_kv_int(b, "decode_steps", s->passes);
    json_kv_real(b, "logprob", s->logprob);
    json_kv_real(b, "seconds", s->seconds);
    json_end(b, '}');
}

static void json_answer(const asked *a, int64_t q, buf *b)
{
    static const char *const modes[] = {"memory", "lookup", "memagent", "full", "hybrid"};
    const lg_answer *r = &a->answer[q];
    json_begin(b, '{');
    json_key(b, "answer");
    json_text(b, r->text.n ? r->text.data : "", r->text.n);
    json_key(b, "answer_ids");
    json_ids(b, r->ids.data, r->ids.n);
    json_kv_text(b, "mode", modes[a->o->mode]);
    if (a->o->mode == MODE_MEMAGENT)
        json_kv_text(b, "extracted", r->extracted.data);
    json_maybe(b, "chunk", r->chunk, r->chunk >= 0);
    lg_bank_chunk x = {.byte_begin = -1, .byte_end = -1};
    if (r->chunk >= 0)
        lg_bank_get_chunk(a->bank, r->chunk, &x, NULL);
    json_maybe(b, "byte_begin", x.byte_begin, x.byte_begin >= 0);
    json_maybe(b, "byte_end", x.byte_end, x.byte_end >= 0);
    json_key(b, "steps");
    json_begin(b, '[');
    for (int64_t i = 0; i < r->n_step; i++)
        json_step(a, &r->step[i], b);
    json_end(b, ']');
    json_key(b, "times");
    json_begin(b, '{');
    json_kv_real(b, "build_s", a->build_s);
    json_kv_real(b, "gate_s", r->gate_s);
    json_kv_real(b, "read_s", r->read_s);
    json_kv_real(b, "answer_s", r->answer_s);
    json_end(b, '}');
    json_end(b, '}');
    buf_puts(b, "\n");
    b->comma = false;
}

/* One line a step, and the memory under it. */
static void trace(const asked *a, int64_t q)
{
    const lg_answer *r = &a->answer[q];
    for (int64_t i = 0; i < r->n_step; i++) {
        const lg_ask_step *s = &r->step[i];
        buf line = {0};
        int64_t begin, end;
        ask_range(a, s->token_begin, s->token_end, &begin, &end);
        if (s->chunk < 0)
            buf_printf(&line, "answer: prompt %lld tokens", (long long)s->prompt.n);
        else
            buf_printf(&line, "chunk %lld, tokens %lld-%lld", (long long)s->chunk, (long long)s->token_begin, (long long)s->token_end);
        if (begin >= 0)
            buf_printf(&line, ", bytes %lld-%lld", (long long)begin, (long long)end);
        if (!isnan(s->gate_score))
            buf_printf(&line, ", gate %.4g", s->gate_score);
        if (s->chunk >= 0)
            buf_puts(&line, s->accepted ? ", read" : ", rejected");
        if (s->chunk >= 0 && s->accepted)
            buf_printf(&line, ", prompt %lld tokens at %lld", (long long)s->prompt.n, (long long)s->position0);
        if (!isnan(s->logprob))
            buf_printf(&line, ", mean ln p %.3f", s->logprob);
        if (s->accepted)
            buf_printf(&line, ", %.2f s", s->seconds);
        if (s->memory.data) {
            buf_printf(&line, "\n    memory (%lld tokens): ", (long long)s->memory.n);
            ask_text(a, s->memory.data, s->memory.n, &line);
        }
        note("%s", line.data);
        buf_free(&line);
    }
    note("gate %.2f s, reading %.2f s, answer %.2f s", r->gate_s, r->read_s, r->answer_s);
}

static void source_note(const asked *a, const lg_answer *r)
{
    lg_bank_chunk x;
    if (r->chunk < 0 || lg_bank_get_chunk(a->bank, r->chunk, &x, NULL) != LG_OK)
        return;
    if (x.byte_begin < 0)
        note("read in chunk %lld, tokens %lld to %lld", (long long)r->chunk, (long long)x.token_begin, (long long)x.token_end);
    else
        note("read in chunk %lld, bytes %lld to %lld", (long long)r->chunk, (long long)x.byte_begin, (long long)x.byte_end);
    for (int64_t i = 0; i < a->n_source && a->n_source > 1; i++)
        if (x.byte_begin >= a->source[i].begin && x.byte_begin < a->source[i].end)
            note("which begins in %s, byte %lld", a->source[i].name, (long long)(x.byte_begin - a->source[i].begin));
}

static int report(asked *a)
{
    const options *o = a->o;
    buf b = {0};
    for (int64_t q = 0; q < a->n; q++) {
        if (o->trace)
            trace(a, q);
        if (o->json || o->questions) {
            json_answer(a, q, &b);
        } else {
            buf_add(&b, a->answer[q].text.n ? a->answer[q].text.data : "", (size_t)a->answer[q].text.n);
            buf_puts(&b, "\n");
            source_note(a, &a->answer[q]);
        }
    }
    int rc = CLI_DONE;
    if (o->trace_html) {
        buf page = {0};
        ask_page(a, &page);
        rc = out_whole(o->trace_html, &page);
        buf_free(&page);
    }
    if (!rc)
        rc = emit(&b);
    buf_free(&b);
    return rc;
}

/* ---- all of it ------------------------------------------------------------------------------------- */

static int ask_setup(asked *a, buf *update, buf *answer, const lg_generate_params *g)
{
    const options *o = a->o;
    lg_ask_params *p = &a->p;
    lg_ask_defaults(p);
    int rc = read_template(o->update_template, update);
    if (!rc)
        rc = read_template(o->answer_template, answer);
    p->mode = (lg_ask_mode)o->mode;
    p->gate = !o->gate ? (o->mode == MODE_LOOKUP ? LG_GATE_LEXICAL : LG_GATE_NONE)
              : strcmp(o->gate, "none") == 0 ? LG_GATE_NONE
              : strcmp(o->gate, "lexical") == 0 ? LG_GATE_LEXICAL : LG_GATE_ADAPTER;
    p->gate_threshold = o->gate_threshold;
    p->gate_batch = o->gate_batch;
    p->second_look = o->second_look;
    p->update_template = update->data;
    p->answer_template = answer->data;
    p->memory_init = o->memory_init;
    p->memory_size = o->memory_size;
    p->max_new = opt_given(o, "max-new") ? o->max_new : o->mode == MODE_LOOKUP ? 64 : 1024;
    p->keep_memory = o->keep_memory;
    p->draft = o->draft;
    p->weigh = o->weigh;
    p->top = o->top;
    p->piece = o->piece;
    p->boxed = o->final == 1;
    p->slot_rope = opt_given(o, "slot-rope") ? o->slot_rope : -1;
    p->pad_id = opt_given(o, "pad-id") ? (int32_t)o->pad_id : -1;
    p->stop_ids = g->stop_ids;
    p->n_stop_ids = g->n_stop_ids;
    p->stop = g->stop;
    p->n_stop = g->n_stop;
    p->sampler = g->sampler;
    p->progress = cli_progress;
    return rc;
}

static int ask_all(asked *a, const lg_roles *roles)
{
    const options *o = a->o;
    lg_session_params sp;
    lg_session *s = NULL;
    lg_model_info info;
    lg_error e = {0};
    int64_t need_ctx = 0;
    lg_model_get_info(a->m, &info);
    session_setup(o, roles, &sp);
    if (lg_ask_context(a->m, a->bank, a->question, a->n, &a->p, &need_ctx, &e) != LG_OK)
        return failed_with(&e);
    bool whole = o->mode == MODE_FULL || o->mode == MODE_HYBRID;
    if (!opt_given(o, "ctx"))
        sp.n_ctx = whole || info.rope_scaled || need_ctx < info.n_ctx_train ? need_ctx : info.n_ctx_train;
    int64_t runs = a->n * (o->mode == MODE_LOOKUP ? o->top : 1);
    if (a->p.gate == LG_GATE_ADAPTER && runs < a->p.gate_batch) /* chunks are scored on sequences of their own */
        runs = a->p.gate_batch < a->info.n_chunk ? a->p.gate_batch : a->info.n_chunk;
    sp.n_seq_max = whole ? 1 : runs < o->parallel ? runs : o->parallel;
    sp.progress = NULL; /* the questions have a bar of their own */
    int rc = session_open(a->m, &sp, &s);
    if (rc)
        return rc;
    a->answer = cli_alloc(NULL, (size_t)a->n, sizeof *a->answer);
    memset(a->answer, 0, (size_t)a->n * sizeof *a->answer);
    if (lg_ask(s, a->bank, a->question, a->n, &a->p, a->answer, &e) != LG_OK)
        rc = failed_with(&e);
    cli_progress_end();
    lg_session_free(s);
    return rc;
}

static int check(const options *o, int *documents)
{
    int given = (o->question_ids != NULL) + (o->questions != NULL);
    int rc = need("-m/--model", o->model);
    if (rc)
        return rc;
    if (given == 2)
        return usage_error("--question-ids and --questions exclude each other");
    *documents = given ? o->n_args : o->n_args - 1;
    if (*documents < 1)
        return usage_error(given || !o->n_args ? "the document or bank is missing" : "the question is missing");
    if (o->mode == MODE_HYBRID && !o->roles)
        return usage_error("--mode hybrid needs --roles");
    if (o->mode != MODE_HYBRID && o->roles)
        return usage_error("--roles needs --mode hybrid");
    if (o->gate && strcmp(o->gate, "none") != 0 && o->mode != MODE_MEMORY && o->mode != MODE_LOOKUP)
        return usage_error("--gate needs --mode memory or lookup");
    return o->mode == MODE_HYBRID ? opt_check_hybrid(o) : CLI_DONE;
}

static int run(const options *given)
{
    options own = *given; /* a gate's file is one more adapter */
    const options *o = &own;
    asked a = {.o = o};
    lg_roles *roles = NULL;
    lg_generate_params g;
    int32_t *stop_ids = NULL;
    buf update = {0}, answer = {0};
    int documents = 0, rc = check(o, &documents);
    if (rc)
        return rc;
    const char **adapters = cli_alloc(NULL, (size_t)o->adapter.n + 1, sizeof *adapters);
    if (o->adapter.n)
        memcpy(adapters, o->adapter.v, (size_t)o->adapter.n * sizeof *adapters);
    own.adapter.v = adapters;
    if (o->gate && strcmp(o->gate, "none") != 0 && strcmp(o->gate, "lexical") != 0)
        adapters[own.adapter.n++] = o->gate;
    lg_model_info info;
    rc = model_open(o, false, &a.m);
    if (!rc) {
        lg_model_get_info(a.m, &info);
        rc = sampler_setup(o, info.n_vocab, &g, &stop_ids);
    }
    if (!rc)
        rc = ask_setup(&a, &update, &answer, &g);
    if (!rc)
        rc = read_questions(&a, o->n_args ? o->args[o->n_args - 1] : "", info.n_vocab);
    if (!rc)
        rc = open_document(&a, documents);
    if (!rc)
        rc = roles_open(o, &roles);
    if (!rc)
        rc = ask_all(&a, roles);
    if (!rc)
        rc = report(&a);
    for (int64_t i = 0; i < a.n; i++) {
        if (a.answer)
            lg_answer_free(&a.answer[i]);
        if (a.ids)
            free(a.ids[i].v);
    }
    free(a.answer);
    free(a.ids);
    free(a.question);
    free(a.source);
    batch_free(a.items, a.items ? a.n : 0);
    buf_free(&a.text);
    buf_free(&update);
    buf_free(&answer);
    free(stop_ids);
    free(adapters);
    lg_roles_free(roles);
    lg_bank_close(a.bank);
    lg_model_free(a.m);
    return rc;
}

#define MAX_CHUNK ((int64_t)1 << 20)
static const opt opts[] = {
    O_CHOICE("mode", mode, "memory|lookup|memagent|full|hybrid", "memory", NULL, "how the document is read"),
    O_TEXT(0, "question-ids", question_ids, "FILE", NULL, "the question as decimal ids; - is stdin"),
    O_TEXT(0, "questions", questions, "FILE", NULL, "JSON lines {\"question\"|\"ids\"}, answered together"),
    O_SIZE(0, "parallel", parallel, 1, 1024, "8", NULL, "prompts decoded at once"),
    O_TEXT(0, "update-template", update_template, "FILE", NULL, "prompt of a memory update: {prompt}, {memory} (memagent: {chunk})"),
    O_TEXT(0, "answer-template", answer_template, "FILE", NULL, "prompt of the answer"),
    O_TEXT(0, "memory-init", memory_init, "TEXT", NULL, "first memory [No previous memory]"),
    O_SIZE(0, "memory-size", memory_size, 1, MAX_CHUNK, "1024", NULL, "tokens of a memory at most"),
    O_SIZE(0, "max-new", max_new, 0, MAX_CHUNK, NULL, "1024; lookup 64", "tokens of the answer at most"),
    O_TEXTS("stop", stop, "TEXT", "end the answer before this text; repeatable"),
    O_SIZES("stop-ids", stop_ids, "A,B,..", 0, INT32_MAX, NULL, "the model's", "ids that end a memory or answer, instead of the model's"),
    O_SIZE(0, "pad-id", pad_id, 0, INT32_MAX, NULL, "the tokenizer's", "id that is dropped from memories"),
    O_FLAG(0, "keep-memory", keep_memory, "an empty update keeps the old memory"),
    O_FLAG(0, "draft", draft, "guess updates ahead from the memory before: same text, fewer steps (CPU, greedy)"),
    O_END};
static const opt gate_opts[] = {
    O_TEXT(0, "gate", gate, "none|FILE|lexical", NULL, "which chunks are read: all, an adapter's gate, BM25 [none; lookup lexical]"),
    O_REAL("gate-threshold", gate_threshold, 0.0, 1.0, "0.5", NULL, "an adapter's gate accepts above this"),
    O_SIZE(0, "gate-batch", gate_batch, 1, 4096, "8", NULL, "chunks scored ahead with the present memory"),
    O_SIZE(0, "second-look", second_look, 0, 1000, "0", NULL, "rounds over rejected chunks once the memory has changed"),
    O_SIZE(0, "top", top, 1, MAX_CHUNK, "3", NULL, "lookup, lexical gate: chunks read"),
    O_FLAG(0, "weigh", weigh, "lookup: weigh answers by their chunk's gate score too"),
    O_END};
static const opt document_opts[] = {
    O_SIZE(0, "chunk", chunk, 1, MAX_CHUNK, "4096", NULL, "tokens of a chunk (where the bank is built here)"),
    O_SIZE(0, "window", window, 1, MAX_CHUNK, NULL, "the memory weights', else 2048", "tokens compressed in one pass"),
    O_SIZE(0, "ratio", ratio, 1, MAX_CHUNK, NULL, "the memory weights', else 4", "tokens a slot stands for"),
    O_CHOICE("slots", slots, "f32|bf16|q8", "bf16", NULL, "type of the slots"),
    O_CHOICE("slot-rope", slot_rope, "none|slot-index", NULL, "the bank's", "read slots un-rotated or rotated at their index"),
    O_TEXT(0, "cache", cache, "DIR", NULL, "banks of documents [$XDG_CACHE_HOME/longan or ~/.cache/longan]"),
    O_SIZE(0, "piece", piece, 1, MAX_CHUNK, "5000", NULL, "memagent: tokens read at once"),
    O_CHOICE("final", final, "plain|boxed", "plain", NULL, "memagent: form of the answer that is asked for"),
    O_END};
static const opt trace_opts[] = {
    O_FLAG(0, "trace", trace, "what was looked at and read, on stderr and in the JSON"),
    O_TEXT(0, "trace-html", trace_html, "FILE", NULL, "the same as one page to look at"), O_END};
static const opt_group groups[] = {{"Question", opts}, {"Gate", gate_opts}, {"Document", document_opts}, {"Trace", trace_opts}, {"Model", opts_model},
                                   {"Sampling", opts_sampling}, {"Session", opts_session}, {"Hybrid heads", opts_hybrid}, {"Output", opts_output}, {0}};

const command cmd_ask = {
    .name = "ask", .args = "DOC_OR_BANK... [QUESTION]", .max_args = CLI_MAX_ARGS, .summary = "ask about a document or a bank", .groups = groups,
    .notes = "Several files are one document; - is stdin. The bank of a document is kept and used again.\n"
             "memory and lookup need memory weights (--adapter, or a checkpoint that has them); memagent, full and hybrid do not.\n",
    .examples = "  longan ask -m model.gguf --adapter memory.safetensors --mode lookup book.txt 'Where was Jane Doe born?'\n"
                "  longan ask -m model.gguf --mode memagent book.txt 'Who is the hero?' --trace\n",
    .run = run};
