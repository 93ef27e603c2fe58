/* longan generate: continue a text, a list of ids, or many prompts together. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"

typedef struct task {
    const options *o;
    lg_model *m;
    lg_model_info info;
    lg_roles *roles;
    lg_session *s;
    lg_generate_params p;
    int32_t *stop_ids;
    batch_item *items;
    id_list *prompts; /* [n] */
    int64_t n;
    int64_t done, total; /* generated tokens, for the bar */
    bool live;           /* text goes to a terminal as it comes */
} task;

/* ---- prompts --------------------------------------------------------------------------------------- */

static void copy_ids(const int32_t *v, int64_t n, id_list *out)
{
    for (int64_t i = 0; i < n; i++)
        ids_push(out, v[i]);
}

static int text_to_ids(const task *t, const buf *text, id_list *out)
{
    const options *o = t->o;
    lg_ids ids = {0};
    lg_error e = {0};
    lg_status st;
    if (o->chat && o->system) {
        lg_chat_turn turns[] = {{"system", o->system}, {"user", text->data}};
        if (strlen(text->data) != text->n)
            return failed("with --system a text must not hold NUL bytes");
        st = lg_chat_tokenize(t->m, turns, 2, true, &ids, &e);
    } else {
        unsigned flags = (o->chat ? LG_TOK_CHAT : LG_TOK_BOS) | (o->special ? LG_TOK_SPECIAL : 0u);
        st = lg_tokenize(t->m, text->data, (int64_t)text->n, flags, &ids, &e);
    }
    if (st != LG_OK)
        return failed_with(&e);
    copy_ids(ids.data, ids.n, out);
    lg_ids_free(&ids);
    return CLI_DONE;
}

/* -f, a blank line, -p; one of them; or stdin. */
static int read_prompt_text(const options *o, buf *text)
{
    const char *file = o->file;
    if (!file && !o->prompt) {
        if (isatty(STDIN_FILENO))
            return usage_error("a prompt is missing: -p, -f, --ids, --batch or stdin");
        file = "-";
    }
    int rc = file ? read_input(file, text) : CLI_DONE;
    if (!rc && o->prompt && file)
        buf_puts(text, text->n && text->data[text->n - 1] == '\n' ? "\n" : "\n\n");
    if (!rc && o->prompt)
        buf_puts(text, o->prompt);
    return rc;
}

static int read_one(task *t)
{
    t->n = 1;
    t->prompts = calloc(1, sizeof *t->prompts);
    if (!t->prompts)
        return failed("out of memory");
    if (t->o->ids)
        return read_ids(t->o->ids, t->info.n_vocab, &t->prompts[0]);
    buf text = {0};
    int rc = read_prompt_text(t->o, &text);
    if (!rc)
        rc = text_to_ids(t, &text, &t->prompts[0]);
    buf_free(&text);
    return rc;
}

static int read_many(task *t)
{
    int rc = batch_read(t->o->batch, "prompt", &t->items, &t->n);
    t->prompts = t->n ? calloc((size_t)t->n, sizeof *t->prompts) : NULL;
    if (!rc && !t->prompts)
        rc = failed("out of memory");
    for (int64_t i = 0; i < t->n && !rc; i++) {
        batch_item *it = &t->items[i];
        for (int64_t k = 0; k < it->ids.n && !rc; k++)
            if (it->ids.v[k] >= t->info.n_vocab)
                rc = failed("%s: line %lld: id %lld is %d, outside [0, %lld)", t->o->batch, (long long)it->line,
                            (long long)k, (int)it->ids.v[k], (long long)t->info.n_vocab);
        if (!rc && it->has_prompt)
            rc = text_to_ids(t, &it->prompt, &t->prompts[i]);
        else if (!rc)
            copy_ids(it->ids.v, it->ids.n, &t->prompts[i]);
        if (!rc && t->prompts[i].n == 0)
            rc = failed("%s: line %lld: the prompt is empty", t->o->batch, (long long)it->line);
    }
    return rc;
}

/* ---- output ---------------------------------------------------------------------------------------- */

static bool on_piece(void *user, int64_t index, int32_t id, const char *piece, int64_t n)
{
    task *t = user;
    (void)index;
    (void)id;
    t->done++;
    if (t->live) {
        cli_progress_end();
        fwrite(piece, 1, (size_t)n, stdout);
        fflush(stdout);
    } else {
        cli_progress(NULL, "generate", t->done, t->total);
    }
    return !cli_interrupted;
}

static void result_json(const task *t, const lg_generation *g, buf *b)
{
    double share = share_of(g->kv_bytes_read, g->kv_bytes_dense);
    json_begin(b, '{');
    json_key(b, "text");
    json_text(b, g->text.n ? g->text.data : "", g->text.n);
    json_key(b, "ids");
    json_ids(b, g->ids.data, g->ids.n);
    json_kv_int(b, "prompt_tokens", g->prompt_tokens);
    json_kv_real(b, "prefill_s", g->prefill_s);
    json_kv_real(b, "decode_s", g->decode_s);
    json_kv_int(b, "decode_steps", g->decode_steps);
    json_kv_int(b, "kv_bytes_read", g->kv_bytes_read);
    json_kv_int(b, "kv_bytes_dense", g->kv_bytes_dense);
    json_key(b, "kv_share");
    if (share < 0)
        json_none(b);
    else
        json_number_of(b, share);
    json_kv_text(b, "device", t->info.device);
    json_kv_text(b, "stop_reason", lg_stop_reason_text(g->stop_reason));
    json_end(b, '}');
    buf_puts(b, "\n");
    b->comma = false;
}

static void summary(const task *t, const lg_generation *g)
{
    buf b = {0};
    buf_printf(&b, "prompt %lld tokens in %.2f s", (long long)g->prompt_tokens, g->prefill_s);
    if (g->prefill_s > 0)
        buf_printf(&b, " (%.0f/s)", (double)g->prompt_tokens / g->prefill_s);
    buf_printf(&b, ", %lld tokens in %.2f s", (long long)g->ids.n, g->decode_s);
    if (g->decode_s > 0 && g->decode_steps > 0)
        buf_printf(&b, " (%.1f/s)", (double)g->decode_steps / g->decode_s);
    if (g->kv_bytes_dense > 0)
        buf_printf(&b, ", KV bytes read %.1f%% of dense%s",
                   100 * share_of(g->kv_bytes_read, g->kv_bytes_dense), t->roles ? "" : " (no roles: dense)");
    note("%s; %s", b.data, lg_stop_reason_text(g->stop_reason));
    buf_free(&b);
}

/* ---- the two ways ---------------------------------------------------------------------------------- */

static int generate_one(task *t)
{
    const options *o = t->o;
    lg_generation g = {0};
    lg_error e = {0};
    buf b = {0};
    int rc = CLI_DONE;
    if (o->session && access(o->session, F_OK) == 0 && lg_session_load(t->s, o->session, &e) != LG_OK)
        return failed_with(&e);
    t->total = o->n;
    t->live = !o->json && isatty(STDOUT_FILENO);
    lg_status st = lg_generate(t->s, 0, t->prompts[0].v, t->prompts[0].n, &t->p, &g, &e);
    cli_progress_end();
    if (st != LG_OK)
        rc = failed_with(&e);
    if (!rc && o->json) {
        result_json(t, &g, &b);
    } else if (!rc) {
        if (!t->live && g.text.n)
            buf_add(&b, g.text.data, (size_t)g.text.n);
        buf_puts(&b, "\n");
    }
    if (!rc && o->session && lg_session_save(t->s, o->session, &e) != LG_OK)
        rc = failed_with(&e);
    if (!rc)
        rc = emit(&b);
    if (!rc && !o->json)
        summary(t, &g);
    buf_free(&b);
    lg_generation_free(&g);
    return rc;
}

static int generate_many(task *t)
{
    size_t n = (size_t)t->n;
    lg_ids *prompts = calloc(n, sizeof *prompts);
    lg_generate_params *p = calloc(n, sizeof *p);
    lg_generation *g = calloc(n, sizeof *g);
    lg_error e = {0};
    buf b = {0};
    int rc = prompts && p && g ? CLI_DONE : failed("out of memory");
    for (int64_t i = 0; i < t->n && !rc; i++) {
        prompts[i] = (lg_ids){t->prompts[i].v, t->prompts[i].n, t->prompts[i].cap};
        p[i] = t->p;
        if (t->items[i].n >= 0)
            p[i].n_max = t->items[i].n;
        t->total += p[i].n_max;
    }
    if (!rc && lg_generate_batch(t->s, prompts, p, t->n, g, &e) != LG_OK)
        rc = failed_with(&e);
    cli_progress_end();
    for (int64_t i = 0; i < t->n && !rc; i++)
        result_json(t, &g[i], &b);
    if (!rc)
        rc = emit(&b);
    for (int64_t i = 0; g && i < t->n; i++)
        lg_generation_free(&g[i]);
    buf_free(&b);
    free(prompts);
    free(p);
    free(g);
    return rc;
}

static int check(const options *o)
{
    int rc = need("-m/--model", o->model);
    if (!rc && o->batch && (o->prompt || o->file || o->ids))
        rc = usage_error("--batch and %s exclude each other", o->prompt ? "-p" : o->file ? "-f" : "--ids");
    if (!rc && o->ids && (o->prompt || o->file))
        rc = usage_error("--ids and %s exclude each other", o->prompt ? "-p" : "-f");
    if (!rc && o->ids && o->chat)
        rc = usage_error("--ids and --chat exclude each other");
    if (!rc && o->batch && o->session)
        rc = usage_error("--batch and --session exclude each other");
    if (!rc && o->system && !o->chat)
        rc = usage_error("--system needs --chat");
    if (!rc && opt_given(o, "parallel") && !o->batch)
        rc = usage_error("--parallel needs --batch");
    if (!rc && o->bank && o->session)
        rc = usage_error("--bank and --session exclude each other");
    if (!rc)
        rc = opt_check_bank(o);
    return rc ? rc : opt_check_hybrid(o);
}

static int run(const options *o)
{
    int rc = check(o);
    if (rc)
        return rc;
    task t = {.o = o};
    rc = model_open(o, false, &t.m);
    if (!rc) {
        lg_model_get_info(t.m, &t.info);
        rc = sampler_setup(o, t.info.n_vocab, &t.p, &t.stop_ids);
    }
    if (!rc)
        rc = o->batch ? read_many(&t) : read_one(&t);
    if (!rc && !o->batch && t.prompts[0].n == 0)
        rc = failed("the prompt is empty");
    if (!rc)
        rc = roles_open(o, &t.roles);
    lg_session_params sp;
    session_setup(o, t.roles, &sp);
    if (o->batch)
        sp.n_seq_max = t.n < o->parallel ? t.n : o->parallel;
    if (!rc)
        rc = session_open(t.m, &sp, &t.s);
    if (!rc)
        rc = bank_place(o, t.s, sp.n_seq_max);
    t.p.stream = on_piece;
    t.p.stream_user = &t;
    if (!rc)
        rc = o->batch ? generate_many(&t) : generate_one(&t);
    lg_session_free(t.s);
    lg_roles_free(t.roles);
    for (int64_t i = 0; t.prompts && i < t.n; i++)
        free(t.prompts[i].v);
    free(t.prompts);
    batch_free(t.items, t.items ? t.n : 0);
    free(t.stop_ids);
    lg_model_free(t.m);
    return rc;
}

static const opt opts[] = {
    O_TEXT('p', "prompt", prompt, "TEXT", NULL, "prompt; with -f: file, blank line, TEXT"),
    O_TEXT('f', "file", file, "FILE", NULL, "prompt from a file; - is stdin (also without any prompt)"),
    O_TEXT(0, "ids", ids, "FILE", NULL, "prompt as decimal ids, taken as they are; - is stdin"),
    O_TEXT(0, "batch", batch, "FILE", NULL, "JSON lines {\"prompt\"|\"ids\", \"n\"}, decoded together"),
    O_SIZE(0, "parallel", parallel, 1, 1024, "8", NULL, "--batch: prompts decoded at once"),
    O_FLAG(0, "chat", chat, "make the text one user turn"),
    O_TEXT(0, "system", system, "TEXT", NULL, "--chat: system turn instead of the template's own"),
    O_FLAG(0, "special", special, "strings of special tokens become those tokens"),
    O_TEXT(0, "session", session, "FILE", NULL, "start from this snapshot's common prefix, write it back"),
    O_END};
static const opt_group groups[] = {{"Prompt", opts}, {"Length", opts_length}, {"Sampling", opts_sampling}, {"Model", opts_model},
                                   {"Session", opts_session}, {"Memory bank", opts_bank}, {"Hybrid heads", opts_hybrid},
                                   {"Output", opts_output}, {0}};

const command cmd_generate = {
    .name = "generate", .args = "", .summary = "continue a prompt",
    .groups = groups,
    .notes = "Text from -p, -f and stdin gets a BOS where the tokenizer asks for one, ids get nothing.\n"
             "--batch prints one JSON object a line. Ctrl-C ends the answer, a second one the program.\n",
    .examples = "  longan generate -m model.gguf --chat -p 'Name three rivers.' -n 64\n"
                "  longan generate -m model.gguf --chat -f book.txt -p 'Who wrote this?' \\\n"
                "         --roles roles.json --budget 1024\n"
                "  longan generate -m model.gguf --batch prompts.jsonl\n",
    .run = run};
