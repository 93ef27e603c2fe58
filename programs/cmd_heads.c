/* longan heads calibrate|show|plot: which head is which. */
#include <stdlib.h>
#include <string.h>

#include "cli.h"

/* ---- calibrate ------------------------------------------------------------------------------------- */

static int calibrate_report(const options *o, double seconds)
{
    lg_error e = {0};
    lg_roles *r = NULL;
    if (lg_roles_load(&r, o->output, &e) != LG_OK)
        return failed_with(&e);
    int64_t n_head = r->n_layer * r->n_head_kv, n_window = 0;
    for (int64_t i = 0; i < n_head; i++)
        n_window += r->role[i].kind == LG_ROLE_WINDOW;
    buf b = {0};
    if (o->json) {
        json_begin(&b, '{');
        json_kv_text(&b, "output", o->output);
        json_kv_text(&b, "share", r->same_index ? "same-index" : "donor");
        json_kv_int(&b, "n_retrieval", r->n_retrieval);
        json_kv_int(&b, "n_window", n_window);
        json_kv_int(&b, "n_head", n_head);
        json_kv_int(&b, "budget", r->budget);
        json_kv_int(&b, "sinks", r->sinks);
        json_kv_int(&b, "recents", r->recents);
        json_kv_text(&b, "family", r->family);
        json_kv_text(&b, "curve", o->curve);
        json_kv_real(&b, "calibrate_s", seconds);
        json_end(&b, '}');
        buf_puts(&b, "\n");
    } else {
        note("%s: %lld retrieval heads of %lld, %lld on the window, in %.0f s", o->output,
             (long long)r->n_retrieval, (long long)n_head, (long long)n_window, seconds);
    }
    lg_roles_free(r);
    int rc = emit(&b);
    buf_free(&b);
    return rc;
}

enum { MAX_ALSO = 64 };

static int parse_also(const char *list, int64_t *also, int64_t *n)
{
    for (const char *at = list; at && *at;) {
        char *end;
        long long v = strtoll(at, &end, 10);
        if (end == at || (*end && *end != ',') || v < 1 || v > 1 << 20 || *n == MAX_ALSO)
            return usage_error("--also: '%s' is no list of at most %d counts with commas between", list, MAX_ALSO);
        also[(*n)++] = v;
        at = *end ? end + 1 : end;
    }
    return CLI_DONE;
}

static int calibrate_with(const options *o, lg_model *m, const buf *text)
{
    lg_model_info info;
    lg_model_get_info(m, &info);
    lg_calibrate_params p;
    lg_calibrate_defaults(&p);
    int64_t also[MAX_ALSO], n_also = 0;
    int rc = parse_also(o->also, also, &n_also);
    if (rc)
        return rc;
    int64_t least = o->share == 1 ? info.n_head_kv : 1, most = info.n_layer * info.n_head_kv;
    if (o->retrieval && (o->retrieval < least || o->retrieval > most))
        return usage_error("--retrieval: %lld is out of range (%lld to %lld%s)", (long long)o->retrieval,
                           (long long)least, (long long)most,
                           o->share == 1 ? "; with same-index layer 0 is all retrieval" : "");
    p.text = text->data;
    p.text_bytes = (int64_t)text->n;
    const char *slash = strrchr(o->file, '/'); /* the name goes into the roles file, the folders of this machine do not */
    p.text_name = slash ? slash + 1 : o->file;
    p.same_index = o->share == 1;
    p.n_retrieval = o->retrieval;
    p.kl_bound = o->kl_bound;
    p.n_ctx = o->ctx;
    p.n_positions = o->positions;
    p.n_passages = o->passages;
    p.budget = o->budget;
    p.sinks = o->sinks;
    p.recents = o->recents;
    p.seed = (uint64_t)o->seed;
    p.curve_csv = o->curve;
    p.search = o->search;
    p.refine = o->refine;
    p.spread = o->spread == 0;
    p.keep = o->keep;
    p.observe = o->observe;
    p.refresh = o->refresh;
    p.also = also;
    p.n_also = n_also;
    p.progress = cli_progress;
    lg_error e = {0};
    double t0 = cli_clock();
    lg_status st = lg_heads_calibrate(m, &p, o->output, &e);
    cli_progress_end();
    return st == LG_OK ? calibrate_report(o, cli_clock() - t0) : failed_with(&e);
}

static int run_calibrate(const options *o)
{
    int rc = need("-m/--model", o->model);
    if (!rc)
        rc = need("-f/--file", o->file);
    if (!rc)
        rc = need("-o/--output", o->output);
    if (!rc && opt_given(o, "retrieval") && opt_given(o, "kl-bound"))
        rc = usage_error("--retrieval and --kl-bound exclude each other");
    if (!rc && o->sinks + o->recents > o->budget)
        rc = usage_error("--budget: %lld is less than sinks and recents together (%lld)", (long long)o->budget,
                         (long long)(o->sinks + o->recents));
    if (!rc && o->budget >= o->ctx)
        rc = usage_error("--budget: %lld is not less than --ctx (%lld): every head would be dense",
                         (long long)o->budget, (long long)o->ctx);
    if (rc)
        return rc;
    buf text = {0};
    lg_model *m = NULL;
    rc = read_input(o->file, &text);
    if (!rc)
        rc = model_open(o, false, &m);
    if (!rc)
        rc = calibrate_with(o, m, &text);
    buf_free(&text);
    lg_model_free(m);
    return rc;
}

static const opt calibrate_opts[] = {
    O_TEXT('f', "file", file, "TEXT", NULL, "plain text to calibrate on; passkeys are generated beside it"),
    O_TEXT('o', "output", output, "ROLES.json", NULL, "roles file to write"),
    O_CHOICE("share", share, "donor|same-index", "donor", NULL, "who may read whose set"),
    O_SIZE(0, "retrieval", retrieval, 1, 1 << 20, NULL, "fewest within --kl-bound", "retrieval heads"),
    O_REAL("kl-bound", kl_bound, 0.0, 100.0, "0.02", NULL, "take the fewest heads whose KL is below this"),
    O_SIZE(0, "ctx", ctx, 64, (int64_t)1 << 30, "4096", NULL, "context length to calibrate for"),
    O_SIZE(0, "positions", positions, 1, 1 << 20, "128", NULL, "positions looked at"),
    O_SIZE(0, "passages", passages, 1, 64, "4", NULL, "passages of the text that share them"),
    O_SIZE(0, "budget", budget, 1, (int64_t)1 << 30, "512", NULL, "tokens a sparse head reads, on average"),
    O_SIZE(0, "sinks", sinks, 0, (int64_t)1 << 30, "16", NULL, "first tokens in every set"),
    O_SIZE(0, "recents", recents, 0, (int64_t)1 << 30, "64", NULL, "last tokens in every set"),
    O_SIZE(0, "seed", seed, 0, INT64_MAX, "0", NULL, "seed of positions and passkeys"),
    O_SIZE(0, "search", search, 0, 64, "2", NULL, "candidates per added head that are tried by real decoding"),
    O_SIZE(0, "refine", refine, 0, 64, "0", NULL, "rounds of swaps in the map of each asked count, by real decoding"),
    O_CHOICE("spread", spread, "on|off", "off", NULL, "budgets per head; with f32, many passages"),
    O_REAL("keep", keep, 0.0, 1.0, "0", NULL, "share of a set kept by attention seen before"),
    O_SIZE(0, "observe", observe, 1, 64, NULL, "64", "last tokens whose attention says what is kept"),
    O_SIZE(0, "refresh", refresh, 1, (int64_t)1 << 30, NULL, "128", "tokens until that is observed anew"),
    O_TEXT(0, "also", also, "N,N,..", NULL, "further counts to write, each beside the output as NAME-nN.json"),
    O_TEXT(0, "curve", curve, "CSV", NULL, "write KL over the number of retrieval heads"),
    O_END};
static const opt_group calibrate_groups[] = {{"Options", calibrate_opts}, {"Model", opts_model},
                                             {"Output", opts_output}, {0}};

const command cmd_heads_calibrate = {
    .name = "heads calibrate", .args = "", .summary = "find out which heads must read everything",
    .groups = calibrate_groups,
    .notes = "Forward passes only: no training, no other model.\n",
    .examples = "  longan heads calibrate -m model.gguf -f book.txt --retrieval 12 -o roles.json\n"
                "  longan heads calibrate -m model.gguf -f book.txt --kl-bound 0.01 --curve kl.csv -o roles.json\n",
    .run = run_calibrate};

/* ---- show, plot ------------------------------------------------------------------------------------ */

/* The file as argument or as --roles, not both. */
static int roles_path(const options *o, const char **path)
{
    if (o->n_args && o->roles)
        return usage_error("the roles file stands twice ('%s' and --roles)", o->args[0]);
    *path = o->n_args ? o->args[0] : o->roles;
    return *path ? CLI_DONE : usage_error("the roles file is missing");
}

static int run_show(const options *o)
{
    const char *path;
    int rc = roles_path(o, &path);
    if (rc)
        return rc;
    lg_text text = {0};
    lg_error e = {0};
    if (lg_heads_show(path, o->json, &text, &e) != LG_OK)
        return failed_with(&e);
    buf b = {0};
    buf_add(&b, text.n ? text.data : "", (size_t)text.n);
    if (!text.n || text.data[text.n - 1] != '\n')
        buf_puts(&b, "\n");
    rc = emit(&b);
    buf_free(&b);
    lg_text_free(&text);
    return rc;
}

static int run_plot(const options *o)
{
    const char *path;
    lg_error e = {0};
    int rc = roles_path(o, &path);
    if (!rc)
        rc = need("-o/--output", o->output);
    if (rc)
        return rc;
    if (lg_heads_plot(path, o->output, &e) != LG_OK)
        return failed_with(&e);
    buf b = {0};
    if (o->json) {
        json_begin(&b, '{');
        json_kv_text(&b, "output", o->output);
        json_end(&b, '}');
        buf_puts(&b, "\n");
    } else {
        note("%s written", o->output);
    }
    rc = emit(&b);
    buf_free(&b);
    return rc;
}

static const opt show_opts[] = {O_TEXT(0, "roles", roles, "FILE", NULL, "the same as the argument"), O_END};
static const opt plot_opts[] = {
    O_TEXT('o', "output", output, "OUT.svg", NULL, "picture to write"),
    O_TEXT(0, "roles", roles, "FILE", NULL, "the same as the argument"), O_END};
static const opt_group show_groups[] = {{"Options", show_opts}, {"Output", opts_output}, {0}};
static const opt_group plot_groups[] = {{"Options", plot_opts}, {"Output", opts_output}, {0}};

const command cmd_heads_show = {
    .name = "heads show", .args = "ROLES.json", .max_args = 1, .summary = "print a roles file, one line a layer",
    .groups = show_groups, .examples = "  longan heads show roles.json\n", .run = run_show};

const command cmd_heads_plot = {
    .name = "heads plot", .args = "ROLES.json", .max_args = 1, .summary = "draw a roles file as a heat-map (SVG)",
    .groups = plot_groups, .examples = "  longan heads plot roles.json -o roles.svg\n", .run = run_plot};
