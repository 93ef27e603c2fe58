/* longan logits: next-token logits of given ids as .npy, prefilled or teacher-forced through decode steps. */
#include <stdlib.h>
#include <string.h>

#include "cli.h"

/* Sets of the current decode step, written as one JSON line when the next step begins. */
typedef struct set_log {
    FILE *f;
    buf line;
    int64_t position; /* -1: none yet */
    bool hybrid, dense;
} set_log;

typedef struct rows {
    FILE *f;
    int64_t n_vocab, only, decode_from, total; /* only: -1 all rows */
    set_log *sets;
} rows;

static void set_log_flush(set_log *l)
{
    if (!l->f || l->position < 0)
        return;
    fprintf(l->f, "{\"position\":%lld,\"dense\":%s,\"sets\":[%s]}\n", (long long)l->position,
            l->dense ? "true" : "false", l->line.n ? l->line.data : "");
    l->line.n = 0;
}

/* The library may name a step by its sets or by its row first; positions never fall. */
static bool set_log_at(set_log *l, int64_t position)
{
    if (position < l->position)
        return false;
    if (position > l->position) {
        set_log_flush(l);
        l->position = position;
        l->dense = !l->hybrid;
    }
    return true;
}

static void on_set(void *user, int64_t position, int64_t layer, int64_t head, const int32_t *tokens, int64_t n)
{
    set_log *l = user;
    if (!set_log_at(l, position))
        return;
    if (layer < 0) {
        l->dense = true;
        return;
    }
    buf_printf(&l->line, "%s{\"layer\":%lld,\"head\":%lld,\"tokens\":[", l->line.n ? "," : "", (long long)layer,
               (long long)head);
    for (int64_t i = 0; i < n; i++)
        buf_printf(&l->line, "%s%d", i ? "," : "", (int)tokens[i]);
    buf_puts(&l->line, "]}");
}

static lg_status on_row(void *user, int64_t row, const float *logits, lg_error *err)
{
    rows *r = user;
    if (row >= r->decode_from) {
        set_log_at(r->sets, row);
        if (!cli_progress(NULL, "decode", row - r->decode_from + 1, r->total - r->decode_from)) {
            *err = (lg_error){.code = LG_ERR_CANCELLED, .offset = -1, .message = "cancelled"};
            return LG_ERR_CANCELLED;
        }
    }
    if (r->only < 0 || r->only == row)
        fwrite(logits, sizeof *logits, (size_t)r->n_vocab, r->f); /* errors are seen at commit */
    return LG_OK;
}

static int evaluate(const options *o, lg_session *s, const id_list *ids, int64_t n_vocab, FILE *npy, set_log *sets)
{
    bool decodes = opt_given(o, "decode-from");
    rows r = {.f = npy, .n_vocab = n_vocab, .only = o->last ? ids->n - 1 : -1,
              .decode_from = decodes ? o->decode_from : ids->n, .total = ids->n, .sets = sets};
    lg_error e = {0};
    lg_status st;
    npy_header(npy, (int64_t[]){o->last ? 1 : ids->n, n_vocab}, 2);
    if (sets->f)
        lg_session_on_set(s, on_set, sets);
    if (o->last && !decodes) { /* no need for the product of all rows with the output matrix */
        st = lg_session_sync(s, 0, ids->v, ids->n, &e);
        if (st == LG_OK)
            fwrite(lg_session_logits(s, 0), sizeof(float), (size_t)n_vocab, npy);
    } else {
        st = lg_session_eval(s, ids->v, ids->n, decodes ? o->decode_from : -1, on_row, &r, &e);
    }
    cli_progress_end();
    set_log_flush(sets);
    return st == LG_OK ? CLI_DONE : failed_with(&e);
}

static int report(const options *o, const lg_model_info *info, const lg_stats *st, int64_t n)
{
    buf b = {0};
    double share = share_of(st->kv_bytes_read, st->kv_bytes_dense);
    if (o->json) {
        json_begin(&b, '{');
        json_kv_text(&b, "output", o->output);
        json_kv_int(&b, "tokens", n);
        json_kv_int(&b, "rows", o->last ? 1 : n);
        json_kv_int(&b, "n_vocab", info->n_vocab);
        json_kv_int(&b, "decode_steps", st->decode_steps);
        json_kv_int(&b, "dense_steps", st->dense_steps);
        json_kv_int(&b, "kv_bytes_read", st->kv_bytes_read);
        json_kv_int(&b, "kv_bytes_dense", st->kv_bytes_dense);
        json_kv_real(&b, "kv_share", share < 0 ? 0.0 / 0.0 : share);
        json_kv_real(&b, "prefill_s", st->prefill_s);
        json_kv_real(&b, "decode_s", st->decode_s);
        json_kv_text(&b, "device", info->device);
        json_end(&b, '}');
        buf_puts(&b, "\n");
    } else if (st->decode_steps) {
        note("%lld rows; %lld decode steps, %lld of them dense; KV bytes read %.1f%% of dense",
             (long long)(o->last ? 1 : n), (long long)st->decode_steps, (long long)st->dense_steps, 100 * share);
    } else {
        note("%lld rows in %.2f s", (long long)(o->last ? 1 : n), st->prefill_s);
    }
    int rc = emit(&b);
    buf_free(&b);
    return rc;
}

/* With model and ids at hand: files, session, work. */
static int work(const options *o, lg_model *m, const id_list *ids)
{
    lg_model_info info;
    lg_model_get_info(m, &info);
    bool decodes = opt_given(o, "decode-from");
    if (decodes && o->decode_from > ids->n)
        return usage_error("--decode-from: %lld is out of range (0 to %lld, the number of ids)",
                           (long long)o->decode_from, (long long)ids->n);
    if (o->roles && !decodes)
        note("without --decode-from everything is prefill, hence dense; --roles has no effect");
    lg_roles *roles = NULL;
    lg_session *s = NULL;
    out_file npy = {0}, log = {0};
    lg_session_params p;
    int rc = roles_open(o, &roles);
    session_setup(o, roles, &p);
    if (!rc)
        rc = session_open(m, &p, &s);
    if (!rc)
        rc = bank_place(o, s, 1);
    if (!rc)
        rc = out_open(&npy, o->output);
    if (!rc && o->sets)
        rc = out_open(&log, o->sets);
    set_log sets = {.f = log.f, .position = -1, .hybrid = roles != NULL};
    if (!rc)
        rc = evaluate(o, s, ids, info.n_vocab, npy.f, &sets);
    if (!rc && o->sets)
        rc = out_commit(&log);
    if (!rc)
        rc = out_commit(&npy);
    if (!rc) {
        lg_stats st;
        lg_session_stats(s, &st);
        rc = report(o, &info, &st, ids->n);
    }
    out_abort(&npy);
    out_abort(&log);
    buf_free(&sets.line);
    lg_session_free(s);
    lg_roles_free(roles);
    return rc;
}

static int run(const options *o)
{
    int rc = need("-m/--model", o->model);
    if (!rc)
        rc = need("--ids", o->ids);
    if (!rc)
        rc = need("-o/--output", o->output);
    if (!rc)
        rc = opt_check_hybrid(o);
    if (!rc)
        rc = opt_check_bank(o);
    if (rc)
        return rc;
    lg_model *m = NULL;
    id_list ids = {0};
    rc = model_open(o, false, &m);
    if (!rc) {
        lg_model_info info;
        lg_model_get_info(m, &info);
        rc = read_ids(o->ids, info.n_vocab, &ids);
    }
    if (!rc && ids.n == 0)
        rc = failed("%s: holds no ids", o->ids);
    if (!rc)
        rc = work(o, m, &ids);
    free(ids.v);
    lg_model_free(m);
    return rc;
}

static const opt opts[] = {
    O_TEXT(0, "ids", ids, "FILE", NULL, "decimal ids with white space between; - is stdin"),
    O_TEXT('o', "output", output, "OUT.npy", NULL, "float32 [tokens, n_vocab]; appears when complete"),
    O_FLAG(0, "last", last, "the last row alone: [1, n_vocab]"),
    O_SIZE(0, "decode-from", decode_from, 0, (int64_t)1 << 30, NULL, "all prefill",
           "feed each id from position N on alone, as a decode step"),
    O_TEXT(0, "sets", sets, "FILE", NULL, "write the token sets of each decode step as JSON lines"),
    O_END};
static const opt_group groups[] = {{"Options", opts}, {"Model", opts_model}, {"Session", opts_session},
                                   {"Memory bank", opts_bank},
                                   {"Hybrid heads (with --decode-from)", opts_hybrid}, {"Output", opts_output}, {0}};

const command cmd_logits = {
    .name = "logits", .args = "", .summary = "write next-token logits of given ids as .npy",
    .groups = groups,
    .notes = "Row i holds the logits after id i. No BOS is added. Behind slots, --decode-from counts prompt ids and\n"
             "the tokens of --sets count cache rows, slots first.\n",
    .examples = "  longan logits -m model.gguf --ids ids.txt -o logits.npy\n"
                "  longan logits -m model.gguf --ids ids.txt --decode-from 1000 --roles roles.json \\\n"
                "         --budget 512 --sets sets.jsonl -o logits.npy\n",
    .run = run};
