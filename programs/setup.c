/* What every command does around its work: messages, progress bars, reading input, opening models and
 * sessions from the options. All of it goes to stderr; stdout belongs to results. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cli.h"

static const char *command_name = ""; /* with a leading blank where there is one */
static bool log_everything;

/* ---- progress: one line on stderr ------------------------------------------------------------------ */

static struct {
    char what[48];
    double began, shown; /* shown: when the line was last drawn */
    int64_t first;       /* done at the start: what a cache already held */
    bool drawn;
} bar;

double cli_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void clock_text(double s, char *out, size_t size)
{
    int64_t t = s > 0 && s < 360000 ? (int64_t)(s + 0.5) : 0;
    if (t >= 3600)
        snprintf(out, size, "%lld:%02lld:%02lld", (long long)(t / 3600), (long long)(t / 60 % 60),
                 (long long)(t % 60));
    else
        snprintf(out, size, "%lld:%02lld", (long long)(t / 60), (long long)(t % 60));
}

static void bar_draw(int64_t done, int64_t total, double now)
{
    static const char full[] = "########################";
    double share = (double)done / (double)total, elapsed = now - bar.began;
    double rate = elapsed > 0 ? (double)(done - bar.first) / elapsed : 0;
    char left[32] = "-:--";
    if (rate > 0)
        clock_text((double)(total - done) / rate, left, sizeof left);
    int filled = (int)(share * (double)(sizeof full - 1));
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r\033[K%-18s [%-24.*s] %3.0f%%  %lld/%lld  %.4g/s  %s left", bar.what, filled,
                full, 100 * share, (long long)done, (long long)total, rate, left);
    else
        fprintf(stderr, "%s: %lld of %lld, %.4g/s, %s left\n", bar.what, (long long)done,
                (long long)total, rate, left);
    fflush(stderr);
    bar.shown = now;
    bar.drawn = true;
}

/* On a terminal at most six times a second; elsewhere one line in ten seconds. A step that is over before
 * it would be seen draws nothing. */
bool cli_progress(void *user, const char *what, int64_t done, int64_t total)
{
    (void)user;
    double now = cli_clock();
    if (strncmp(bar.what, what, sizeof bar.what - 1) != 0 || !bar.what[0]) {
        cli_progress_end();
        snprintf(bar.what, sizeof bar.what, "%s", what);
        bar.began = bar.shown = now;
        bar.first = done;
    }
    if (done < bar.first) { /* the same work once more */
        bar.began = now;
        bar.first = done;
    }
    double pause = isatty(STDERR_FILENO) ? 1.0 / 6 : 10.0;
    if (total > 0 && done <= total && now - bar.shown >= pause)
        bar_draw(done, total, now);
    return !cli_interrupted;
}

void cli_progress_end(void)
{
    if (bar.drawn && isatty(STDERR_FILENO))
        fputs("\r\033[K", stderr);
    bar.what[0] = 0;
    bar.drawn = false;
}

/* ---- messages -------------------------------------------------------------------------------------- */

static void message(const char *before, const char *format, va_list args)
{
    cli_progress_end();
    fprintf(stderr, "longan%s: %s", command_name, before);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
}

int usage_error(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    message("", format, args);
    va_end(args);
    return CLI_USAGE;
}

int failed(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    message("", format, args);
    va_end(args);
    return CLI_FAILED;
}

int failed_with(const lg_error *e)
{
    const char *text = e->message[0] ? e->message : lg_status_text(e->code);
    return e->code == LG_ERR_USAGE ? usage_error("%s", text) : failed("%s", text);
}

void note(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    message("", format, args);
    va_end(args);
}

static void library_log(void *user, lg_log_level level, const char *line)
{
    (void)user;
    if (level == LG_LOG_WARN || log_everything)
        note("%s", line);
}

void cli_begin(const char *name, bool verbose)
{
    static char shown[64];
    snprintf(shown, sizeof shown, "%s%s", *name ? " " : "", name);
    command_name = shown;
    log_everything = verbose;
    lg_log_set(library_log, NULL);
}

/* ---- Ctrl-C: the first asks, the second ends ------------------------------------------------------- */

volatile sig_atomic_t cli_interrupted;

static void on_interrupt(int sig)
{
    if (cli_interrupted)
        _exit(128 + sig);
    cli_interrupted = 1;
}

void cli_catch_interrupt(void)
{
    struct sigaction a = {.sa_handler = on_interrupt}; /* no SA_RESTART: a waiting read returns */
    sigemptyset(&a.sa_mask);
    sigaction(SIGINT, &a, NULL);
}

/* ---- input ----------------------------------------------------------------------------------------- */

int need(const char *option, const char *value)
{
    return value ? CLI_DONE : usage_error("option '%s' is missing", option);
}

int read_input(const char *path, buf *out)
{
    bool is_stdin = strcmp(path, "-") == 0;
    FILE *f = is_stdin ? stdin : fopen(path, "rb");
    if (!f)
        return failed("%s: cannot be opened: %s", path, strerror(errno));
    static char block[1 << 16];
    size_t n;
    while ((n = fread(block, 1, sizeof block, f)) > 0)
        buf_add(out, block, n);
    int rc = CLI_DONE;
    if (ferror(f))
        rc = failed("%s: cannot be read: %s", is_stdin ? "stdin" : path, strerror(errno));
    if (!is_stdin)
        fclose(f);
    if (!rc)
        buf_add(out, "", 0); /* the ending NUL of an empty input */
    return rc;
}

int map_input(const char *path, buf *out)
{
    struct stat st;
    int fd = strcmp(path, "-") == 0 ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p != MAP_FAILED)
            *out = (buf){.data = p, .n = (size_t)st.st_size, .mapped = true};
    }
    if (fd >= 0)
        close(fd);
    return out->mapped ? CLI_DONE : read_input(path, out);
}

void ids_push(id_list *l, int32_t id)
{
    if (l->n == l->cap) {
        l->cap = l->cap ? 2 * l->cap : 256;
        l->v = cli_alloc(l->v, (size_t)l->cap, sizeof *l->v);
    }
    l->v[l->n++] = id;
}

static bool is_blank(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

int parse_ids(const char *name, const buf *text, int64_t n_vocab, id_list *out)
{
    const char *s = text->data, *end = s + text->n;
    for (;;) {
        while (s < end && is_blank(*s))
            s++;
        if (s == end)
            return CLI_DONE;
        const char *word = s;
        bool negative = *s == '-', digits = false, large = false;
        int64_t v = 0;
        for (s += negative; s < end && *s >= '0' && *s <= '9'; s++) {
            digits = true;
            if (v <= INT32_MAX)
                v = 10 * v + (*s - '0');
            large = v > INT32_MAX;
        }
        if (!digits || (s < end && !is_blank(*s)))
            return failed("%s: id %lld (byte %lld) is not a decimal number", name, (long long)out->n,
                          (long long)(word - text->data));
        if (negative || large || v >= n_vocab)
            return failed("%s: id %lld is %.*s, outside [0, %lld)", name, (long long)out->n,
                          (int)(s - word > 24 ? 24 : s - word), word, (long long)n_vocab);
        ids_push(out, (int32_t)v);
    }
}

int read_ids(const char *path, int64_t n_vocab, id_list *out)
{
    buf text = {0};
    int rc = read_input(path, &text);
    if (!rc)
        rc = parse_ids(strcmp(path, "-") == 0 ? "stdin" : path, &text, n_vocab, out);
    buf_free(&text);
    return rc;
}

/* ---- models, roles, sessions ----------------------------------------------------------------------- */

static bool device_known(const char *s)
{
    if (strcmp(s, "cpu") == 0 || strcmp(s, "ref") == 0 || strcmp(s, "cuda") == 0)
        return true;
    if (strncmp(s, "cuda:", 5) != 0 || !s[5])
        return false;
    return strspn(s + 5, "0123456789") == strlen(s + 5) && strlen(s + 5) <= 3;
}

int model_open(const options *o, bool vocab_only, lg_model **out)
{
    static const lg_dtype weights[] = {LG_DTYPE_BF16, LG_DTYPE_F16, LG_DTYPE_F32, LG_DTYPE_Q8_0, LG_DTYPE_Q4_0, LG_DTYPE_Q4_1, LG_DTYPE_Q4_K, LG_DTYPE_Q6_K};
    int rc = o->shape ? CLI_DONE : need("-m/--model", o->model);
    if (rc)
        return rc;
    if (o->device && !device_known(o->device))
        return usage_error("--device: '%s' is none of cpu, cuda, cuda:N, ref", o->device);
    lg_error e = {0};
    lg_model_params p = {.path = o->model,
                         .device = o->device,
                         .n_threads = (int)o->threads,
                         .compute = o->compute == 1 ? LG_COMPUTE_F32 : LG_COMPUTE_AUTO,
                         .vocab_only = vocab_only,
                         .chat_format = o->chat_format,
                         .shape = o->shape,
                         .shape_weights = weights[o->weights],
                         .adapters = o->adapter.v,
                         .n_adapter = (int32_t)o->adapter.n,
                         .fill_memory = o->fill_memory,
                         .progress = cli_progress};
    lg_status st = lg_model_open(out, &p, &e);
    cli_progress_end();
    return st == LG_OK ? CLI_DONE : failed_with(&e);
}

int roles_open(const options *o, lg_roles **out)
{
    *out = NULL;
    if (!o->roles)
        return CLI_DONE;
    lg_error e = {0};
    return lg_roles_load(out, o->roles, &e) == LG_OK ? CLI_DONE : failed_with(&e);
}

void session_setup(const options *o, const lg_roles *roles, lg_session_params *p)
{
    static const lg_dtype kv[] = {LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16, LG_DTYPE_KV8};
    static const int64_t block[] = {1, 16, 32, 64};
    lg_session_defaults(p);
    p->n_ctx = o->ctx;
    p->kv = opt_given(o, "kv") ? kv[o->kv] : LG_DTYPE_COUNT;
    p->n_seq_max = 1;
    p->chunk = o->prefill_chunk;
    p->roles = roles;
    p->roles_any_model = o->roles_any_model;
    p->progress = cli_progress;
    if (!roles)
        return;
    lg_hybrid_defaults(&p->hybrid);
    p->hybrid.budget = opt_given(o, "budget") ? o->budget : -1;
    p->hybrid.sinks = opt_given(o, "sinks") ? o->sinks : -1;
    p->hybrid.recents = opt_given(o, "recents") ? o->recents : -1;
    p->hybrid.keep = opt_given(o, "keep") ? o->keep : -1;
    p->hybrid.observe = opt_given(o, "observe") ? o->observe : 0;
    p->hybrid.refresh = opt_given(o, "refresh") ? o->refresh : 0;
    p->hybrid.rule = (lg_rule)o->rule;
    p->hybrid.rule_value = o->rule_value;
    p->hybrid.rule_scale = opt_given(o, "rule-scale") ? o->rule_scale : 0;
    p->hybrid.block = block[o->block];
    p->hybrid.correct_every = o->correct_every;
    p->hybrid.correct = (lg_correct)o->correct;
}

int session_open(lg_model *m, const lg_session_params *p, lg_session **out)
{
    lg_error e = {0};
    return lg_session_new(out, m, p, &e) == LG_OK ? CLI_DONE : failed_with(&e);
}

int opt_check_bank(const options *o)
{
    if (o->bank && !opt_given(o, "bank-chunk"))
        return usage_error("--bank needs --bank-chunk");
    if (!o->bank && opt_given(o, "bank-chunk"))
        return usage_error("--bank-chunk needs --bank");
    if (!o->bank && opt_given(o, "slot-rope"))
        return usage_error("--slot-rope needs --bank");
    return CLI_DONE;
}

int bank_place(const options *o, lg_session *s, int64_t n_seq)
{
    if (!o->bank)
        return CLI_DONE;
    lg_error e = {0};
    lg_bank *b = NULL;
    lg_status st = lg_bank_open(&b, o->bank, &e);
    for (int64_t i = 0; st == LG_OK && i < n_seq; i++)
        st = lg_bank_place(b, o->bank_chunk, s, i, opt_given(o, "slot-rope") ? o->slot_rope : -1, &e);
    lg_bank_close(b); /* the slots are in the cache */
    return st == LG_OK ? CLI_DONE : failed_with(&e);
}

int sampler_setup(const options *o, int64_t n_vocab, lg_generate_params *p, int32_t **stop_ids)
{
    lg_generate_defaults(p);
    p->n_max = o->n;
    p->sampler.temp = (float)o->temp;
    p->sampler.top_k = (int32_t)o->top_k;
    p->sampler.top_p = (float)o->top_p;
    p->sampler.min_p = (float)o->min_p;
    p->sampler.repeat_penalty = (float)o->repeat_penalty;
    p->sampler.seed = (uint64_t)o->seed;
    p->stop = o->stop.v;
    p->n_stop = o->stop.n;
    *stop_ids = NULL;
    for (int64_t i = 0; i < o->stop.n; i++)
        if (!*o->stop.v[i])
            return usage_error("--stop: the text is empty");
    if (!opt_given(o, "stop-ids"))
        return CLI_DONE;
    *stop_ids = cli_alloc(NULL, (size_t)o->stop_ids.n, sizeof **stop_ids);
    for (int64_t i = 0; i < o->stop_ids.n; i++) {
        if (o->stop_ids.v[i] >= n_vocab)
            return usage_error("--stop-ids: %lld is out of range (0 to %lld)",
                               (long long)o->stop_ids.v[i], (long long)n_vocab - 1);
        (*stop_ids)[i] = (int32_t)o->stop_ids.v[i];
    }
    p->stop_ids = *stop_ids;
    p->n_stop_ids = o->stop_ids.n;
    return CLI_DONE;
}

double share_of(int64_t part, int64_t whole)
{
    return whole > 0 ? (double)part / (double)whole : -1;
}
