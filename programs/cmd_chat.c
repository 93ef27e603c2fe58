/* longan chat: a conversation, line by line. The session keeps what the turns have in common. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"

typedef struct talk {
    const options *o;
    lg_model *m;
    lg_session *s;
    lg_generate_params p;
    bool hybrid, told; /* told: text was printed in this turn */
    lg_chat_turn *turns;
    int64_t n;
    buf log; /* --json: finished turns */
} talk;

static void push_turn(talk *t, const char *role, const char *text)
{
    t->turns = cli_alloc(t->turns, (size_t)t->n + 1, sizeof *t->turns);
    char *copy = strcpy(cli_alloc(NULL, strlen(text) + 1, 1), text);
    t->turns[t->n++] = (lg_chat_turn){role, copy};
}

static void drop_turns(talk *t, int64_t keep)
{
    while (t->n > keep)
        free((char *)(uintptr_t)t->turns[--t->n].content);
}

static void start_over(talk *t)
{
    drop_turns(t, 0);
    if (t->o->system)
        push_turn(t, "system", t->o->system);
}

static bool on_piece(void *user, int64_t index, int32_t id, const char *piece, int64_t n)
{
    talk *t = user;
    (void)index;
    (void)id;
    if (!t->told)
        cli_progress_end();
    t->told = true;
    if (!t->o->json) {
        fwrite(piece, 1, (size_t)n, stdout);
        fflush(stdout);
    }
    return !cli_interrupted;
}

static void log_turn(talk *t, const char *line, const lg_generation *g)
{
    json_begin(&t->log, '{');
    json_kv_text(&t->log, "user", line);
    json_key(&t->log, "assistant");
    json_text(&t->log, g->text.n ? g->text.data : "", g->text.n);
    json_key(&t->log, "ids");
    json_ids(&t->log, g->ids.data, g->ids.n);
    json_kv_int(&t->log, "prompt_tokens", g->prompt_tokens);
    json_kv_real(&t->log, "prefill_s", g->prefill_s);
    json_kv_real(&t->log, "decode_s", g->decode_s);
    json_kv_int(&t->log, "kv_bytes_read", g->kv_bytes_read);
    json_kv_int(&t->log, "kv_bytes_dense", g->kv_bytes_dense);
    json_kv_text(&t->log, "stop_reason", lg_stop_reason_text(g->stop_reason));
    json_end(&t->log, '}');
}

/* One question and its answer. A failed turn is taken back. */
static int answer(talk *t, const char *line)
{
    lg_ids ids = {0};
    lg_generation g = {0};
    lg_error e = {0};
    int64_t before = t->n;
    push_turn(t, "user", line);
    cli_interrupted = 0;
    t->told = false;
    lg_status st = lg_chat_tokenize(t->m, t->turns, t->n, true, &ids, &e);
    if (st == LG_OK)
        st = lg_generate(t->s, 0, ids.data, ids.n, &t->p, &g, &e);
    cli_progress_end();
    if (st == LG_OK) {
        push_turn(t, "assistant", g.text.n ? g.text.data : "");
        if (t->o->json)
            log_turn(t, line, &g);
        else
            puts(g.stop_reason == LG_STOP_CANCELLED ? " [cancelled]" : "");
        fflush(stdout);
        if (t->hybrid && g.kv_bytes_dense > 0)
            note("KV bytes read %.1f%% of dense", 100 * share_of(g.kv_bytes_read, g.kv_bytes_dense));
    } else {
        drop_turns(t, before);
    }
    lg_generation_free(&g);
    lg_ids_free(&ids);
    cli_interrupted = 0;
    if (st == LG_ERR_CANCELLED) {
        note("cancelled");
        return CLI_DONE;
    }
    return st == LG_OK ? CLI_DONE : failed_with(&e);
}

/* Until the end of input, /quit, or Ctrl-C at the prompt. On a terminal a failed turn ends nothing. */
static int loop(talk *t)
{
    bool person = isatty(STDIN_FILENO);
    char *line = NULL;
    size_t cap = 0;
    int rc = CLI_DONE;
    if (person)
        note("/reset starts over, /quit or Ctrl-D ends, Ctrl-C ends an answer");
    while (!rc) {
        if (person)
            fputs("> ", stderr);
        ssize_t n = getline(&line, &cap, stdin);
        if (n < 0) {
            if (ferror(stdin) && errno != EINTR)
                rc = failed("stdin: cannot be read: %s", strerror(errno));
            break;
        }
        while (n > 0 && (line[n - 1] == '\n' || line[n - 1] == '\r'))
            line[--n] = 0;
        if (strcmp(line, "/quit") == 0)
            break;
        if (strcmp(line, "/reset") == 0)
            start_over(t);
        else if (line[0] == '/' && strlen(line) > 1 && strcspn(line + 1, " /") == strlen(line + 1))
            note("unknown command '%s' (there are /reset and /quit)", line);
        else if (line[0])
            rc = answer(t, line);
        if (rc && person) {
            note("the turn was taken back; /reset starts over");
            rc = CLI_DONE;
        }
    }
    if (person)
        fputc('\n', stderr);
    free(line);
    return rc;
}

static int run(const options *o)
{
    int rc = need("-m/--model", o->model);
    if (!rc)
        rc = opt_check_hybrid(o);
    if (rc)
        return rc;
    talk t = {.o = o};
    lg_roles *roles = NULL;
    lg_model_info info = {0};
    int32_t *stop_ids = NULL;
    lg_session_params sp;
    rc = model_open(o, false, &t.m);
    if (!rc) {
        lg_model_get_info(t.m, &info);
        rc = sampler_setup(o, info.n_vocab, &t.p, &stop_ids);
    }
    if (!rc && !info.chat_format[0])
        rc = failed("%s: has no chat format that is known; choose one with --chat-format", o->model);
    if (!rc)
        rc = roles_open(o, &roles);
    session_setup(o, roles, &sp);
    if (!rc)
        rc = session_open(t.m, &sp, &t.s);
    t.p.stream = on_piece;
    t.p.stream_user = &t;
    t.hybrid = roles != NULL;
    if (!rc) {
        start_over(&t);
        if (o->json) {
            json_begin(&t.log, '{');
            json_key(&t.log, "turns");
            json_begin(&t.log, '[');
        }
        rc = loop(&t);
    }
    if (!rc && o->json) {
        json_end(&t.log, ']');
        json_kv_text(&t.log, "device", info.device);
        json_end(&t.log, '}');
        buf_puts(&t.log, "\n");
        rc = emit(&t.log);
    }
    drop_turns(&t, 0);
    free(t.turns);
    buf_free(&t.log);
    free(stop_ids);
    lg_session_free(t.s);
    lg_roles_free(roles);
    lg_model_free(t.m);
    return rc;
}

static const opt opts[] = {
    O_TEXT(0, "system", system, "TEXT", NULL, "system turn instead of the template's own"), O_END};
static const opt_group groups[] = {{"Conversation", opts}, {"Length", opts_length}, {"Sampling", opts_sampling}, {"Model", opts_model},
                                   {"Session", opts_session}, {"Hybrid heads", opts_hybrid},
                                   {"Output", opts_output}, {0}};

const command cmd_chat = {
    .name = "chat", .args = "", .summary = "talk with a model, line by line",
    .groups = groups,
    .notes = "Each line of stdin is one turn. /reset starts over, /quit ends, Ctrl-C ends an answer.\n"
             "With --json nothing is printed until the end, then one object with all turns.\n",
    .examples = "  longan chat -m model.gguf\n  longan chat -m model.gguf --system 'Answer in one sentence.' --temp 0.7\n",
    .run = run};
