/* Command-line options from tables: parsing, defaults, ranges and help from one place.
 *
 * A command lists groups of options; an option says where in `options` its value goes. Accepted forms:
 * --name value, --name=value, -x value, -xvalue. `--` ends the options. The last value of an option wins,
 * except for repeatable ones. Every error is one line on stderr. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

#define MAX_TOKENS ((int64_t)1 << 30)

const opt opts_model[] = {
    O_TEXT('m', "model", model, "MODEL", NULL,
           "GGUF file (first part if split), Hugging Face folder, or safetensors file"),
    {.kind = OPT_SIZE, .name = "threads", .at = offsetof(options, threads), .meta = "N", .lo = 0,
     .hi = 4096, .dflt = "0", .shown = "all cores", .help = "CPU threads"},
    O_TEXT(0, "device", device, "cpu|cuda[:i]|ref", "cpu", "where to compute"),
    O_CHOICE("compute", compute, "auto|f32", "auto", NULL,
             "f32: exact weights, f32 products, f32 cache"),
    O_TEXTS("adapter", adapter, "FILE",
            "memory, reader or gate weights (safetensors); repeatable, the last one wins"),
    O_FLAG(0, "fill-memory", fill_memory, "fill missing memory tensors from the base's"),
    O_TEXT(0, "chat-format", chat_format, "NAME", NULL,
           "chatml, llama3, qwen or none instead of the model's own"),
    O_END};

const opt opts_bank[] = {
    O_TEXT(0, "bank", bank, "BANK", NULL, "read the prompt behind memory slots of this bank"),
    O_SIZE(0, "bank-chunk", bank_chunk, 0, MAX_TOKENS, NULL, "none", "the chunk, from 0"),
    O_CHOICE("slot-rope", slot_rope, "none|slot-index", NULL, "the bank's",
             "rotate slots at their index, or not at all"),
    O_END};

const opt opts_session[] = {
    O_SIZE(0, "ctx", ctx, 1, MAX_TOKENS, NULL, "the model's", "window in tokens"),
    O_CHOICE("kv", kv, "f32|f16|bf16|q8", NULL, "f16 on the CPU, bf16 on the GPU",
             "type of the KV cache"),
    O_SIZE(0, "prefill-chunk", prefill_chunk, 1, MAX_TOKENS, NULL, "512",
           "tokens read at once"),
    O_END};

const opt opts_hybrid[] = {
    O_TEXT(0, "roles", roles, "FILE", NULL, "head roles; without it decoding is dense"),
    O_SIZE(0, "budget", budget, 1, MAX_TOKENS, NULL, "the roles file's",
           "tokens a sparse head reads"),
    O_CHOICE("rule", rule, "topk|ratio|topp|threshold", "topk", NULL, "how a set is picked"),
    O_REAL("rule-value", rule_value, 0.0, 1e9, NULL, NULL,
           "ratio: share dropped; topp: p; threshold: tau"),
    O_REAL("rule-scale", rule_scale, 1e-9, 1e9, NULL, "head_dim^-0.5",
           "score scale of topp and threshold"),
    O_CHOICE("block", block, "1|16|32|64", "1", NULL, "granularity of sets in tokens"),
    O_SIZE(0, "sinks", sinks, 0, MAX_TOKENS, NULL, "the roles file's, else 128",
           "first tokens in every set"),
    O_SIZE(0, "recents", recents, 0, MAX_TOKENS, NULL, "the roles file's, else 256",
           "last tokens in every set"),
    O_REAL("keep", keep, 0.0, 1.0, NULL, "the roles file's, else 0",
           "share of a set kept by attention seen before"),
    O_SIZE(0, "observe", observe, 1, 64, NULL, "the roles file's, else 64",
           "last tokens whose attention says what is kept"),
    O_SIZE(0, "refresh", refresh, 1, MAX_TOKENS, NULL, "the roles file's, else 128",
           "tokens until that is observed anew"),
    O_SIZE(0, "correct-every", correct_every, 0, MAX_TOKENS, "0", "never",
           "correct the cache at every Nth step"),
    O_CHOICE("correct", correct, "step|rerun", "step", NULL,
             "run that step densely, or run the steps since again"),
    O_FLAG(0, "roles-any-model", roles_any_model, "accept roles of another model family"),
    O_END};

const opt opts_length[] = {
    O_SIZE('n', "max-tokens", n, 0, MAX_TOKENS, "256", NULL, "tokens to generate at most"),
    O_TEXTS("stop", stop, "TEXT", "end before this text; repeatable"),
    O_SIZES("stop-ids", stop_ids, "A,B,..", 0, INT32_MAX, NULL, "the model's",
            "ids that end the answer, instead of the model's"),
    O_END};

const opt opts_sampling[] = {
    O_REAL("temp", temp, 0.0, 100.0, "0", "0: greedy", "temperature"),
    O_SIZE(0, "top-k", top_k, 0, INT32_MAX, "0", "0: off", "keep the K likeliest tokens"),
    O_REAL("top-p", top_p, 0.0, 1.0, "1", "1: off", "keep the likeliest tokens up to this mass"),
    O_REAL("min-p", min_p, 0.0, 1.0, "0", "0: off", "drop tokens below this share of the likeliest"),
    O_REAL("repeat-penalty", repeat_penalty, 0.01, 100.0, "1", "1: off",
           "penalty of the last 64 ids"),
    O_SIZE(0, "seed", seed, 0, INT64_MAX, "0", NULL, "seed of the draws"),
    O_END};

const opt opts_output[] = {
    O_FLAG(0, "json", json, "print JSON on stdout"),
    O_FLAG('v', "verbose", verbose, "print the library's log on stderr"),
    O_FLAG('h', "help", help, "print this help"),
    O_END};

/* ---- values ---------------------------------------------------------------------------------------- */

static void *field(options *o, const opt *d)
{
    return (char *)o + d->at;
}

static void option_name(const opt *d, char *out, size_t size)
{
    if (d->letter && strlen(d->name) > 0)
        snprintf(out, size, "-%c/--%s", d->letter, d->name);
    else
        snprintf(out, size, "--%s", d->name);
}

/* A whole number with an optional k or m; `end` is where it must stop. */
static bool scan_size(const char *s, const char *end, int64_t *out, bool *overflow)
{
    *overflow = false;
    const char *p = s;
    if (p < end && (*p == '-' || *p == '+'))
        p++;
    if (p == end || *p < '0' || *p > '9')
        return false;
    char *stop;
    errno = 0;
    long long v = strtoll(s, &stop, 10);
    *overflow = errno == ERANGE;
    int64_t unit = 1;
    if (stop < end && (*stop == 'k' || *stop == 'K'))
        unit = 1024;
    else if (stop < end && (*stop == 'm' || *stop == 'M'))
        unit = 1024 * 1024;
    if (unit > 1)
        stop++;
    if (stop != end)
        return false;
    int64_t scaled;
    if (__builtin_mul_overflow((int64_t)v, unit, &scaled))
        *overflow = true;
    else
        *out = scaled;
    return true;
}

static int parse_size(const opt *d, const char *s, const char *end, int64_t *out)
{
    char name[64];
    option_name(d, name, sizeof name);
    int len = (int)(end - s);
    bool overflow;
    if (!scan_size(s, end, out, &overflow))
        return usage_error("%s: '%.*s' is not a whole number", name, len, s);
    if (overflow || *out < d->lo || *out > d->hi)
        return usage_error("%s: %.*s is out of range (%lld to %lld)", name, len, s,
                           (long long)d->lo, (long long)d->hi);
    return CLI_DONE;
}

static int parse_real(const opt *d, const char *s, double *out)
{
    char name[64];
    option_name(d, name, sizeof name);
    char *stop;
    double v = strtod(s, &stop);
    if (stop == s || *stop)
        return usage_error("%s: '%s' is not a number", name, s);
    if (!(v >= d->rlo && v <= d->rhi))
        return usage_error("%s: %s is out of range (%g to %g)", name, s, d->rlo, d->rhi);
    *out = v;
    return CLI_DONE;
}

static int parse_choice(const opt *d, const char *s, int *out)
{
    size_t len = strlen(s);
    int index = 0;
    for (const char *c = d->choices; *c; index++) {
        size_t n = strcspn(c, "|");
        if (n == len && memcmp(c, s, n) == 0) {
            *out = index;
            return CLI_DONE;
        }
        c += n;
        if (*c)
            c++;
    }
    return usage_error("--%s: '%s' is none of %s", d->name, s, d->choices);
}

static int parse_sizes(const opt *d, const char *s, size_list *out)
{
    out->n = 0;
    while (*s) {
        const char *end = s + strcspn(s, ",");
        out->v = cli_alloc(out->v, (size_t)out->n + 1, sizeof *out->v);
        int rc = parse_size(d, s, end, &out->v[out->n]);
        if (rc)
            return rc;
        out->n++;
        s = *end ? end + 1 : end;
    }
    return CLI_DONE;
}

static int set_value(options *o, const opt *d, const char *s)
{
    void *to = field(o, d);
    switch (d->kind) {
    case OPT_FLAG:
        *(bool *)to = true;
        return CLI_DONE;
    case OPT_TEXT:
        *(const char **)to = s;
        return CLI_DONE;
    case OPT_SIZE:
        return parse_size(d, s, s + strlen(s), to);
    case OPT_REAL:
        return parse_real(d, s, to);
    case OPT_CHOICE:
        return parse_choice(d, s, to);
    case OPT_TEXTS: {
        text_list *l = to;
        l->v = cli_alloc(l->v, (size_t)l->n + 1, sizeof *l->v);
        l->v[l->n++] = s;
        return CLI_DONE;
    }
    case OPT_SIZES:
        return parse_sizes(d, s, to);
    case OPT_END:
        break;
    }
    return CLI_DONE;
}

/* ---- the command line ------------------------------------------------------------------------------ */

static int set_defaults(const command *c, options *o)
{
    *o = (options){0};
    for (const opt_group *g = c->groups; g->title; g++)
        for (const opt *d = g->opts; d->kind != OPT_END; d++)
            if (d->dflt) {
                int rc = set_value(o, d, d->dflt);
                if (rc)
                    return rc;
            }
    return CLI_DONE;
}

static const opt *find_long(const command *c, const char *name, size_t n)
{
    for (const opt_group *g = c->groups; g->title; g++)
        for (const opt *d = g->opts; d->kind != OPT_END; d++)
            if (strlen(d->name) == n && memcmp(d->name, name, n) == 0)
                return d;
    return NULL;
}

static const opt *find_short(const command *c, char letter)
{
    for (const opt_group *g = c->groups; g->title; g++)
        for (const opt *d = g->opts; d->kind != OPT_END; d++)
            if (d->letter == letter)
                return d;
    return NULL;
}

static int take_option(const command *c, int argc, char **argv, int *i, options *o)
{
    const char *arg = argv[*i], *value = NULL;
    const opt *d;
    if (arg[1] == '-') {
        size_t n = strcspn(arg + 2, "=");
        d = find_long(c, arg + 2, n);
        if (d && arg[2 + n] == '=')
            value = arg + 2 + n + 1;
        if (d && d->kind == OPT_FLAG && value)
            return usage_error("--%s takes no value", d->name);
    } else {
        d = find_short(c, arg[1]);
        if (d && arg[2]) {
            if (d->kind == OPT_FLAG)
                return usage_error("unknown option '%s' (see longan %s --help)", arg, c->name);
            value = arg + 2;
        }
    }
    if (!d)
        return usage_error("unknown option '%s' (see longan %s --help)", arg, c->name);
    if (d->kind != OPT_FLAG && !value) {
        if (*i + 1 >= argc)
            return usage_error("option '%s' needs a value", arg);
        value = argv[++*i];
    }
    if (o->n_given == CLI_MAX_GIVEN && !opt_given(o, d->name))
        return usage_error("too many options");
    if (!opt_given(o, d->name))
        o->given[o->n_given++] = d;
    return set_value(o, d, value);
}

int opt_parse(const command *c, int argc, char **argv, options *o)
{
    int rc = set_defaults(c, o);
    bool open = true;
    for (int i = 0; i < argc && !rc; i++) {
        const char *arg = argv[i];
        if (open && strcmp(arg, "--") == 0)
            open = false;
        else if (open && arg[0] == '-' && arg[1])
            rc = take_option(c, argc, argv, &i, o);
        else if (o->n_args >= c->max_args)
            rc = usage_error("unexpected argument '%s' (see longan %s --help)", arg, c->name);
        else
            o->args[o->n_args++] = arg;
    }
    return rc;
}

void opt_release(options *o)
{
    free(o->stop.v);
    free(o->adapter.v);
    free(o->stop_ids.v);
    free(o->depth.v);
    *o = (options){0};
}

bool opt_given(const options *o, const char *name)
{
    for (int i = 0; i < o->n_given; i++)
        if (strcmp(o->given[i]->name, name) == 0)
            return true;
    return false;
}

int opt_check_hybrid(const options *o)
{
    static const char *const rule_names[] = {"topk", "ratio", "topp", "threshold"};
    if (!o->roles) {
        for (const opt *d = opts_hybrid; d->kind != OPT_END; d++)
            if (opt_given(o, d->name)) {
                note("--%s has no effect without --roles: decoding is dense", d->name);
                break;
            }
        return CLI_DONE;
    }
    if (opt_given(o, "correct") && o->correct_every == 0)
        return usage_error("--correct needs --correct-every");
    if (o->rule == LG_RULE_TOPK)
        return opt_given(o, "rule-value") ? usage_error("--rule-value needs --rule ratio, topp or threshold")
                                          : CLI_DONE;
    if (!opt_given(o, "rule-value"))
        return usage_error("--rule %s needs --rule-value", rule_names[o->rule]);
    if (o->rule != LG_RULE_THRESHOLD && o->rule_value > 1.0)
        return usage_error("--rule-value: %g is out of range (0 to 1 with --rule %s)",
                           o->rule_value, rule_names[o->rule]);
    return CLI_DONE;
}

/* ---- help ------------------------------------------------------------------------------------------ */

enum { HELP_COLUMN = 34 };

static void help_option(const opt *d)
{
    char left[96];
    int n = d->letter ? snprintf(left, sizeof left, "  -%c, --%s", d->letter, d->name)
                      : snprintf(left, sizeof left, "      --%s", d->name);
    if (d->kind != OPT_FLAG && n > 0 && (size_t)n < sizeof left)
        n += snprintf(left + n, sizeof left - (size_t)n, " %s", d->meta);
    if (n >= HELP_COLUMN - 1)
        printf("%s\n%*s", left, HELP_COLUMN, "");
    else
        printf("%-*s", HELP_COLUMN, left);
    const char *shown = d->shown ? d->shown : d->dflt;
    printf("%s", d->help);
    if (shown)
        printf(" [%s]", shown);
    putchar('\n');
}

void opt_help(const command *c)
{
    printf("longan %s: %s\n\nUsage: longan %s %s%s[options]\n", c->name, c->summary, c->name, c->args,
           *c->args ? " " : "");
    for (const opt_group *g = c->groups; g->title; g++) {
        printf("\n%s\n", g->title);
        for (const opt *d = g->opts; d->kind != OPT_END; d++)
            help_option(d);
    }
    if (c->notes)
        printf("\n%s", c->notes);
    printf("\nExamples\n%s", c->examples);
}
