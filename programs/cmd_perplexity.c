/* longan perplexity: how well a model predicts a text, over windows that do not overlap. */
#include <math.h>
#include <string.h>

#include "cli.h"

typedef struct score {
    const int32_t *ids; /* of the window */
    int64_t n, n_vocab, tokens;
    int64_t done, total; /* ids, for the bar */
    double sum;          /* of -log p */
} score;

/* Single precision suffices inside the sum: its terms are at most 1 and right to 1e-7. */
static double neg_log_p(const score *s, const float *logits, int32_t id)
{
    float max = logits[0];
    double sum = 0;
    for (int64_t i = 1; i < s->n_vocab; i++)
        max = logits[i] > max ? logits[i] : max;
    for (int64_t i = 0; i < s->n_vocab; i++)
        sum += (double)expf(logits[i] - max);
    return log(sum) + (double)max - (double)logits[id];
}

static lg_status on_row(void *user, int64_t row, const float *logits, lg_error *err)
{
    score *s = user;
    if (row + 1 < s->n) {
        s->sum += neg_log_p(s, logits, s->ids[row + 1]);
        s->tokens++;
    }
    if (!cli_progress(NULL, "perplexity", s->done + row + 1, s->total)) {
        *err = (lg_error){.code = LG_ERR_CANCELLED, .offset = -1, .message = "cancelled"};
        return LG_ERR_CANCELLED;
    }
    return LG_OK;
}

static int windows(const options *o, lg_session *s, const lg_ids *ids, int64_t size, score *sc)
{
    lg_error e = {0};
    int64_t n_window = ids->n < size ? 1 : ids->n / size;
    sc->total = ids->n < size ? ids->n : n_window * size;
    for (int64_t w = 0; w < n_window; w++) {
        sc->ids = ids->data + w * size;
        sc->n = ids->n < size ? ids->n : size;
        sc->done = w * size;
        lg_status st = lg_session_rewind(s, 0, 0, &e);
        if (st == LG_OK)
            st = lg_session_eval(s, sc->ids, sc->n, opt_given(o, "decode-from") ? o->decode_from : -1, on_row, sc, &e);
        if (st != LG_OK) {
            cli_progress_end();
            return failed_with(&e);
        }
    }
    cli_progress_end();
    return CLI_DONE;
}

static int report(const options *o, lg_session *s, const lg_model_info *info, const score *sc, int64_t size)
{
    buf b = {0};
    lg_stats st;
    lg_session_stats(s, &st);
    double nll = sc->sum / (double)sc->tokens, share = share_of(st.kv_bytes_read, st.kv_bytes_dense);
    if (o->json) {
        json_begin(&b, '{');
        json_kv_real(&b, "ppl", exp(nll));
        json_kv_int(&b, "tokens", sc->tokens);
        json_kv_real(&b, "nll", nll);
        json_kv_int(&b, "ctx", size);
        json_kv_int(&b, "decode_steps", st.decode_steps);
        json_key(&b, "kv_share");
        if (share < 0)
            json_none(&b);
        else
            json_number_of(&b, share);
        json_kv_text(&b, "device", info->device);
        json_end(&b, '}');
        buf_puts(&b, "\n");
    } else {
        buf_printf(&b, "ppl %.4f  nll %.6f  tokens %lld", exp(nll), nll, (long long)sc->tokens);
        if (share >= 0)
            buf_printf(&b, "  KV bytes read %.1f%% of dense", 100 * share);
        buf_puts(&b, "\n");
    }
    int rc = emit(&b);
    buf_free(&b);
    return rc;
}

static int work(const options *o, lg_model *m, const lg_ids *ids)
{
    lg_model_info info;
    lg_model_get_info(m, &info);
    int64_t size = o->ctx ? o->ctx : info.n_ctx_train;
    if (ids->n < 2)
        return failed("%s: %lld ids are too few to score any", o->file, (long long)ids->n);
    if (o->roles && !opt_given(o, "decode-from"))
        note("without --decode-from everything is prefill, hence dense; --roles has no effect");
    lg_roles *roles = NULL;
    lg_session *s = NULL;
    lg_session_params sp;
    int rc = roles_open(o, &roles);
    session_setup(o, roles, &sp);
    sp.progress = NULL; /* one bar over all windows */
    if (!rc)
        rc = session_open(m, &sp, &s);
    score sc = {.n_vocab = info.n_vocab};
    if (!rc)
        rc = windows(o, s, ids, size, &sc);
    if (!rc)
        rc = report(o, s, &info, &sc, size);
    lg_session_free(s);
    lg_roles_free(roles);
    return rc;
}

static int run(const options *o)
{
    int rc = need("-m/--model", o->model);
    if (!rc)
        rc = need("-f/--file", o->file);
    if (!rc && opt_given(o, "ctx") && o->ctx < 2)
        rc = usage_error("--ctx: a window needs 2 tokens or more");
    if (!rc && opt_given(o, "decode-from") && o->ctx && o->decode_from > o->ctx)
        rc = usage_error("--decode-from: %lld is out of range (0 to %lld, the window)", (long long)o->decode_from,
                         (long long)o->ctx);
    if (!rc)
        rc = opt_check_hybrid(o);
    if (rc)
        return rc;
    lg_model *m = NULL;
    buf text = {0};
    lg_ids ids = {0};
    lg_error e = {0};
    rc = read_input(o->file, &text);
    if (!rc)
        rc = model_open(o, false, &m);
    if (!rc && lg_tokenize(m, text.data, (int64_t)text.n, 0, &ids, &e) != LG_OK)
        rc = failed_with(&e);
    if (!rc)
        rc = work(o, m, &ids);
    lg_ids_free(&ids);
    buf_free(&text);
    lg_model_free(m);
    return rc;
}

static const opt opts[] = {
    O_TEXT('f', "file", file, "FILE", NULL, "text to score; - is stdin"),
    O_SIZE(0, "decode-from", decode_from, 0, (int64_t)1 << 30, NULL, "all prefill",
           "in each window, feed each id from position N on as a decode step"),
    O_END};
static const opt_group groups[] = {{"Options", opts}, {"Model", opts_model}, {"Session", opts_session},
                                   {"Hybrid heads (with --decode-from)", opts_hybrid}, {"Output", opts_output}, {0}};

const command cmd_perplexity = {
    .name = "perplexity", .args = "", .summary = "measure how well a model predicts a text",
    .groups = groups,
    .notes = "Windows of --ctx ids do not overlap and start from an empty cache; an incomplete last one is\n"
             "dropped unless it is the only one. nll is the mean over ids 1 .. N-1 of each window, in nats.\n",
    .examples = "  longan perplexity -m model.gguf -f text.txt --ctx 2048\n",
    .run = run};
