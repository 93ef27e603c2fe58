/* longan bench: speed over context depth, dense and hybrid side by side.
 *
 * Depth d means: the measured steps end with d tokens in the cache, so a depth as large as the window can be
 * measured. At each depth a repetition times `steps` dense steps, then `steps` hybrid steps on the same cache;
 * decode_ms is the median over the repetitions of the mean step. The depths are walked upwards over one
 * sequence of ids, so prefill_tok_s is the rate of the whole prefill up to the measured steps. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"

enum { DENSE, HYBRID, N_MODE };
enum { MAX_AT_ONCE = 64, WARM_UP = 4 };
static const char *const mode_names[N_MODE] = {"dense", "hybrid"};

typedef struct point {
    int64_t depth;
    double prefill_tok_s, ms, ms_min, ms_mean, ms_sd, kv_share; /* prefill_tok_s, kv_share < 0: absent */
    int64_t bytes_per_token;
} point;

typedef struct bench {
    const options *o;
    lg_model *m;
    lg_model_info info;
    lg_roles *roles;
    lg_session *s;         /* one cache; the head options change between repetitions */
    lg_hybrid_params hybrid;
    int32_t *ids;          /* [largest depth] */
    int64_t n_retrieval, budget; /* budget -1: the rule has none */
    double prefill_s;            /* so far */
    lg_stats used[N_MODE];       /* sums over the measured steps of a depth */
    double *ms[N_MODE];          /* [reps] */
    point *points[N_MODE];       /* [depths] */
    int64_t done, total;         /* repetitions, for the bar */
    lg_roles made;               /* of a shape */
    double copy_rate;            /* bytes per second, 0: not measured */
    double chunk_s, chunk_flops; /* --prefill: time, operations */
    bool touched;                /* the cache: its pages are there */
    char machine[96];
} bench;

static bool is_synthetic(const options *o) { return o->synthetic || o->shape; }

/* ---- set-up ---------------------------------------------------------------------------------------- */

static int compare_depths(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Ascending, each once. */
static void sort_depths(size_list *d)
{
    int64_t n = 0;
    qsort(d->v, (size_t)d->n, sizeof *d->v, compare_depths);
    for (int64_t i = 0; i < d->n; i++)
        if (i == 0 || d->v[i] != d->v[n - 1])
            d->v[n++] = d->v[i];
    d->n = n;
}

/* Without --depth: powers of two from 512 up to the window (32k with --synthetic). */
static int choose_depths(const bench *t, size_list *d)
{
    const options *o = t->o;
    int64_t window = o->ctx ? o->ctx : t->info.n_ctx_train, top = is_synthetic(o) && !o->ctx ? 32768 : window;
    if (o->depth.n) {
        d->v = cli_alloc(NULL, (size_t)o->depth.n, sizeof *d->v);
        memcpy(d->v, o->depth.v, (size_t)o->depth.n * sizeof *d->v);
        d->n = o->depth.n;
    }
    for (int64_t x = 512; !o->depth.n && x <= top && x <= 32768; x *= 2) {
        d->v = cli_alloc(d->v, (size_t)d->n + 1, sizeof *d->v);
        d->v[d->n++] = x;
    }
    if (!d->n)
        return failed("the window of %lld tokens is shorter than the least default depth, 512; give --depth",
                      (long long)window);
    sort_depths(d);
    if (d->v[0] <= o->steps)
        return usage_error("--depth: %lld leaves no room for %lld steps (see --steps)", (long long)d->v[0],
                           (long long)o->steps);
    if ((!is_synthetic(o) || o->ctx) && d->v[d->n - 1] > window)
        return failed("depth %lld is beyond the window of %lld tokens%s", (long long)d->v[d->n - 1],
                      (long long)window, is_synthetic(o) ? "" : " (--synthetic measures there)");
    return CLI_DONE;
}

static void read_machine(char *out, size_t size)
{
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    snprintf(out, size, "unknown");
    while (f && fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon)
            continue;
        colon[strcspn(colon, "\n")] = 0;
        snprintf(out, size, "%.*s", (int)size - 1, colon + 1 + strspn(colon + 1, " "));
        break;
    }
    if (f)
        fclose(f);
}

/* What the library makes of command line and roles file: never less than sinks and recents. */
static int64_t effective_budget(const options *o, const lg_roles *r)
{
    if (o->rule == LG_RULE_RATIO)
        return -1;
    int64_t b = opt_given(o, "budget") ? o->budget : r->budget;
    int64_t sinks = opt_given(o, "sinks") ? o->sinks : r->sinks >= 0 ? r->sinks : 128;
    int64_t recents = opt_given(o, "recents") ? o->recents : r->recents >= 0 ? r->recents : 256;
    return b < 0 || b >= sinks + recents ? b : sinks + recents;
}

/* Roles of a shape: layer 0 retrieves, the other retrieval heads are spread evenly over the rest (as in the paper: 8 + 24 of 256);
 * every other head reads the set of the last retrieval head before its layer. */
static void make_roles(bench *t)
{
    int64_t kv = t->info.n_head_kv, n = t->info.n_layer * kv, want = opt_given(t->o, "retrieval") ? t->o->retrieval : n / 8;
    lg_roles *r = &t->made;
    if (want <= 0)
        return;
    want = want < n ? want : n;
    *r = (lg_roles){.n_layer = t->info.n_layer, .n_head_kv = kv, .n_retrieval = want, .budget = 4096, .sinks = -1, .recents = -1};
    memcpy(r->family, t->info.family, sizeof r->family);
    r->role = cli_alloc(NULL, (size_t)n, sizeof *r->role);
    for (int64_t i = 0; i < n; i++)
        r->role[i] = (lg_role){.kind = i < want && i < kv ? LG_ROLE_RETRIEVAL : LG_ROLE_WINDOW};
    for (int64_t i = 0; i < want - kv; i++)
        r->role[kv + (2 * i + 1) * (n - kv) / (2 * (want - kv))].kind = LG_ROLE_RETRIEVAL;
    int64_t donor = 0;
    for (int64_t l = 1; l < r->n_layer; l++) {
        for (int64_t i = (l - 1) * kv; i < l * kv; i++)
            if (r->role[i].kind == LG_ROLE_RETRIEVAL)
                donor = i;
        for (int64_t i = l * kv; i < (l + 1) * kv; i++)
            if (r->role[i].kind != LG_ROLE_RETRIEVAL)
                r->role[i] = (lg_role){LG_ROLE_DONOR, (int16_t)(donor / kv), (int16_t)(donor % kv)};
    }
    t->roles = r;
}

static int open_session(bench *t, int64_t deepest)
{
    lg_session_params p;
    int rc = roles_open(t->o, &t->roles);
    if (!rc && t->o->shape && !t->roles)
        make_roles(t);
    session_setup(t->o, t->roles, &p);
    t->hybrid = p.hybrid;
    p.n_seq_max = t->o->at_once;
    if (is_synthetic(t->o)) {
        p.n_ctx = t->o->ctx ? t->o->ctx : deepest > t->o->prefill ? deepest : t->o->prefill;
        p.allow_beyond = true;
    }
    if (!rc && is_synthetic(t->o)) {
        lg_error e = {0};
        if (lg_model_copy_rate(t->m, &t->copy_rate, &e) != LG_OK)
            rc = failed_with(&e);
    }
    if (!rc)
        rc = session_open(t->m, &p, &t->s);
    if (!rc && t->roles) {
        t->n_retrieval = t->roles->n_retrieval;
        t->budget = effective_budget(t->o, t->roles);
        if (t->budget >= 0)
            t->hybrid.budget = t->budget; /* or each switch would say again that it was raised */
    }
    return rc;
}

/* Pseudo-random ids: what they are does not change the time. */
static void make_ids(bench *t, int64_t n)
{
    uint64_t x = (uint64_t)t->o->seed + 0x9E3779B97F4A7C15u;
    t->ids = cli_alloc(NULL, (size_t)n, sizeof *t->ids);
    for (int64_t i = 0; i < n; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        t->ids[i] = (int32_t)(x % (uint64_t)t->info.n_vocab);
    }
}

/* ---- measuring ------------------------------------------------------------------------------------- */

static int fill(bench *t, int64_t n)
{
    lg_error e = {0};
    lg_status st;
    if (is_synthetic(t->o)) {
        st = LG_OK;
        for (int64_t i = 0; i < t->o->at_once && st == LG_OK; i++)
            st = lg_session_fill_random_at(t->s, i, n, (uint64_t)t->o->seed, &e);
    } else {
        lg_stats stats;
        lg_session_stats_reset(t->s);
        /* The first prefill would pay for pages that the kernel has not handed out yet, up to a tenth of its time. */
        st = t->touched ? LG_OK : lg_session_fill_random(t->s, n, (uint64_t)t->o->seed, &e);
        t->touched = true;
        for (int64_t i = 0; i < t->o->at_once && st == LG_OK; i++) st = lg_session_sync(t->s, i, t->ids, n, &e);
        lg_session_stats(t->s, &stats);
        t->prefill_s += stats.prefill_s;
    }
    cli_progress_end();
    return st == LG_OK ? CLI_DONE : failed_with(&e);
}

/* n steps of greedy decoding behind `first` cached tokens. */
static lg_status steps(bench *t, int64_t first, int64_t n, lg_error *e)
{
    int32_t seqs[MAX_AT_ONCE], ids[MAX_AT_ONCE];
    lg_status st = LG_OK;
    for (int64_t k = 0; k < t->o->at_once; k++) {
        seqs[k] = (int32_t)k;
        ids[k] = t->ids[first];
    }
    for (int64_t i = 0; i < n && st == LG_OK && !cli_interrupted; i++)
        st = lg_session_greedy(t->s, seqs, ids, t->o->at_once, i + 1 < n, e);
    return st;
}

static lg_status rewind_all(bench *t, int64_t first, lg_error *e)
{
    lg_status st = LG_OK;
    for (int64_t k = 0; k < t->o->at_once && st == LG_OK; k++)
        st = lg_session_rewind(t->s, k, first, e);
    return st;
}

/* --prefill N: the second of two runs from an empty cache. Operations: two per weight of the layers and token, attention's four per
 * query element and token seen, and the output matrix once. */
static int measure_prefill(bench *t)
{
    const lg_model_info *m = &t->info;
    int64_t n = t->o->prefill, nq = m->n_head * m->head_dim, nkv = m->n_head_kv * m->head_dim;
    lg_error e = {0};
    lg_status st = lg_session_set_roles(t->s, NULL, &t->hybrid, &e);
    for (int run = 0; run < 2 && st == LG_OK; run++) {
        st = lg_session_rewind(t->s, 0, 0, &e);
        double t0 = cli_clock();
        if (st == LG_OK)
            st = lg_session_sync(t->s, 0, t->ids, n, &e);
        t->chunk_s = cli_clock() - t0;
    }
    cli_progress_end();
    double layer = (double)(m->n_embd * (2 * nq + 2 * nkv) + 3 * m->n_embd * m->n_ff);
    t->chunk_flops = 2 * (double)m->n_layer * layer * (double)n + 2 * (double)(m->n_embd * m->n_vocab) +
                     4 * (double)(m->n_layer * nq) * ((double)n * ((double)n + 1) / 2);
    return st == LG_OK ? CLI_DONE : failed_with(&e);
}

/* One repetition of one mode: steps that are not counted (the switch costs the first some cache, a GPU captures its two graphs at the
 * third and fourth), then the timed ones. */
static int repeat(bench *t, int mode, int64_t first, double *mean_ms)
{
    lg_error e = {0};
    lg_stats st_now;
    lg_status st = lg_session_set_roles(t->s, mode == HYBRID ? t->roles : NULL, &t->hybrid, &e);
    if (st == LG_OK)
        st = steps(t, first, t->o->steps < WARM_UP ? t->o->steps : WARM_UP, &e);
    if (st == LG_OK)
        st = rewind_all(t, first, &e);
    lg_session_stats_reset(t->s);
    double t0 = cli_clock();
    if (st == LG_OK)
        st = steps(t, first, t->o->steps, &e);
    *mean_ms = 1e3 * (cli_clock() - t0) / (double)t->o->steps;
    if (st == LG_OK)
        st = rewind_all(t, first, &e);
    if (st != LG_OK)
        return failed_with(&e);
    lg_session_stats(t->s, &st_now);
    t->used[mode].decode_steps += st_now.decode_steps;
    t->used[mode].kv_bytes_read += st_now.kv_bytes_read;
    t->used[mode].kv_bytes_dense += st_now.kv_bytes_dense;
    return cli_interrupted ? failed("cancelled") : CLI_DONE;
}

static int compare_reals(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void summarise(bench *t, int mode, int64_t first, point *p)
{
    int64_t n = t->o->reps;
    double *ms = t->ms[mode], sum = 0, square = 0;
    qsort(ms, (size_t)n, sizeof *ms, compare_reals);
    for (int64_t i = 0; i < n; i++)
        sum += ms[i];
    p->ms_mean = sum / (double)n;
    for (int64_t i = 0; i < n; i++)
        square += (ms[i] - p->ms_mean) * (ms[i] - p->ms_mean);
    p->ms_sd = n > 1 ? sqrt(square / (double)(n - 1)) : 0;
    p->ms = n % 2 ? ms[n / 2] : (ms[n / 2 - 1] + ms[n / 2]) / 2;
    p->ms_min = ms[0];
    const lg_stats *st = &t->used[mode];
    p->kv_share = share_of(st->kv_bytes_read, st->kv_bytes_dense);
    p->bytes_per_token = t->info.weight_bytes_per_token + (st->decode_steps ? st->kv_bytes_read / st->decode_steps * t->o->at_once : 0);
    p->prefill_tok_s = t->prefill_s > 0 ? (double)first / t->prefill_s : -1;
}

static int measure_depth(bench *t, int64_t index, int64_t depth)
{
    int64_t first = depth - t->o->steps;
    int n_mode = t->roles ? N_MODE : 1;
    memset(t->used, 0, sizeof t->used);
    int rc = fill(t, first);
    for (int64_t r = 0; r < t->o->reps && !rc; r++) {
        for (int mode = 0; mode < n_mode && !rc; mode++)
            rc = repeat(t, mode, first, &t->ms[mode][r]);
        cli_progress(NULL, "repetitions", ++t->done, t->total);
    }
    for (int mode = 0; mode < n_mode && !rc; mode++) {
        t->points[mode][index].depth = depth;
        summarise(t, mode, first, &t->points[mode][index]);
    }
    return rc;
}

/* ---- output ---------------------------------------------------------------------------------------- */

static void real_or_null(buf *b, const char *key, double v)
{
    json_kv_real(b, key, v < 0 ? (double)NAN : v);
}

static const char *kv_name(const bench *t)
{
    static const char *const names[] = {"f32", "f16", "bf16", "q8"};
    if (opt_given(t->o, "kv"))
        return names[t->o->kv];
    return t->o->compute == 1 ? "f32" : strncmp(t->info.device, "cuda", 4) == 0 ? "bf16" : "f16";
}

static void point_json(const bench *t, int mode, const point *p, buf *b)
{
    json_begin(b, '{');
    json_kv_text(b, "mode", mode_names[mode]);
    json_kv_int(b, "depth", p->depth);
    real_or_null(b, "prefill_tok_s", p->prefill_tok_s);
    json_kv_real(b, "decode_ms", p->ms);
    json_kv_real(b, "decode_ms_min", p->ms_min);
    json_kv_real(b, "decode_ms_mean", p->ms_mean);
    json_kv_real(b, "decode_ms_sd", p->ms_sd);
    json_kv_int(b, "bytes_per_token", p->bytes_per_token);
    real_or_null(b, "kv_share", p->kv_share);
    json_key(b, "n_retrieval");
    if (mode == HYBRID)
        json_int(b, t->n_retrieval);
    else
        json_none(b);
    json_key(b, "budget");
    if (mode == HYBRID && t->budget >= 0)
        json_int(b, t->budget);
    else
        json_none(b);
    json_kv_int(b, "reps", t->o->reps);
    json_kv_int(b, "steps", t->o->steps);
    json_key(b, "synthetic");
    json_bool(b, is_synthetic(t->o));
    json_kv_int(b, "batch", t->o->at_once);
    real_or_null(b, "copy_gb_s", t->copy_rate > 0 ? t->copy_rate / 1e9 : -1);
    real_or_null(b, "copy_share", t->copy_rate > 0 ? (double)p->bytes_per_token / p->ms / 1e-3 / t->copy_rate : -1);
    real_or_null(b, "prefill_n_tok_s", t->chunk_s > 0 ? (double)t->o->prefill / t->chunk_s : -1);
    real_or_null(b, "prefill_n_tflops", t->chunk_s > 0 ? t->chunk_flops / t->chunk_s / 1e12 : -1);
    json_kv_text(b, "kv", kv_name(t));
    json_kv_text(b, "weights_dtype", t->info.weights_dtype);
    json_kv_text(b, "machine", t->machine);
    json_kv_text(b, "device", t->info.device);
    json_kv_text(b, "commit", LG_COMMIT);
    json_end(b, '}');
    buf_puts(b, "\n");
    b->comma = false;
}

static void point_row(const bench *t, int mode, const point *p, buf *b)
{
    buf_printf(b, "%8lld  %-6s ", (long long)p->depth, mode_names[mode]);
    if (p->prefill_tok_s < 0)
        buf_printf(b, "%10s", "-");
    else
        buf_printf(b, "%10.1f", p->prefill_tok_s);
    buf_printf(b, " %10.3f %10.3f %8.3f %9.1f %10.1f", p->ms, p->ms_min, p->ms_sd, 1e3 * (double)t->o->at_once / p->ms,
               (double)p->bytes_per_token / 1e6);
    buf_printf(b, " %8.1f %9.1f%%", (double)p->bytes_per_token / 1e6 / p->ms, 100 * p->kv_share);
    if (t->copy_rate > 0)
        buf_printf(b, " %7.1f%%", 100 * (double)p->bytes_per_token / p->ms / 1e-3 / t->copy_rate);
    if (mode == HYBRID)
        buf_printf(b, " %8.2fx", t->points[DENSE][p - t->points[HYBRID]].ms / p->ms);
    buf_puts(b, "\n");
}

static void table(const bench *t, int64_t n, buf *b)
{
    buf_printf(b, "%s; %s; weights %s, cache %s; %lld repetitions of %lld steps%s; commit %s\n", t->machine,
               t->info.device, t->info.weights_dtype, kv_name(t), (long long)t->o->reps, (long long)t->o->steps,
               is_synthetic(t->o) ? ", synthetic cache" : "", LG_COMMIT);
    if (t->roles && t->budget >= 0)
        buf_printf(b, "hybrid: %lld retrieval heads of %lld, budget %lld\n", (long long)t->n_retrieval,
                   (long long)(t->roles->n_layer * t->roles->n_head_kv), (long long)t->budget);
    else if (t->roles)
        buf_printf(b, "hybrid: %lld retrieval heads of %lld, ratio %g dropped\n", (long long)t->n_retrieval,
                   (long long)(t->roles->n_layer * t->roles->n_head_kv), t->o->rule_value);
    else
        buf_puts(b, "no --roles: dense only\n");
    const bool keeps = t->roles && (t->o->rule == LG_RULE_TOPK || t->o->rule == LG_RULE_RATIO);
    const double keep = !keeps ? 0 : opt_given(t->o, "keep") ? t->o->keep : (double)t->roles->keep / 1024;
    if (keep > 0) {
        const int64_t refresh = opt_given(t->o, "refresh") ? t->o->refresh : t->roles->refresh > 0 ? t->roles->refresh : 128;
        buf_printf(b, "hybrid: heads keep %g of a set, observed anew every %lld tokens%s\n", keep, (long long)refresh,
                   t->o->steps < refresh ? " (no such step is among the timed ones: --steps)" : "");
    }
    if (t->copy_rate > 0)
        buf_printf(b, "copy on the device: %.0f GB/s\n", t->copy_rate / 1e9);
    if (t->o->at_once > 1)
        buf_printf(b, "%lld sequences at once: ms and MB are those of a step\n", (long long)t->o->at_once);
    if (t->chunk_s > 0)
        buf_printf(b, "prefill of %lld tokens: %.3f s, %.1f token/s, %.1f TFLOP/s (weights and attention counted)\n", (long long)t->o->prefill, t->chunk_s,
                   (double)t->o->prefill / t->chunk_s, t->chunk_flops / t->chunk_s / 1e12);
    buf_puts(b, "   depth  mode    prefill/s  decode ms        min       sd   token/s   MB/token     GB/s   KV share");
    buf_puts(b, t->copy_rate > 0 ? "  of copy   speedup\n" : "   speedup\n");
    for (int64_t i = 0; i < n; i++)
        for (int mode = 0; mode < N_MODE; mode++)
            if (mode == DENSE || t->roles)
                point_row(t, mode, &t->points[mode][i], b);
}

static void csv_real(buf *b, double v)
{
    if (v >= 0)
        buf_printf(b, "%.6g", v);
    buf_puts(b, ",");
}

static int write_csv(const bench *t, int64_t n)
{
    buf b = {0};
    buf_puts(&b, "mode,depth,prefill_tok_s,decode_ms,decode_ms_min,decode_ms_mean,decode_ms_sd,bytes_per_token,"
                 "kv_share,n_retrieval,budget,reps,steps,synthetic,kv,weights_dtype,device,machine,commit,batch,copy_gb_s,prefill_tokens,prefill_s,"
                 "prefill_tflops\n");
    for (int64_t i = 0; i < n; i++)
        for (int mode = 0; mode < N_MODE; mode++) {
            const point *p = &t->points[mode][i];
            if (mode == HYBRID && !t->roles)
                continue;
            buf_printf(&b, "%s,%lld,", mode_names[mode], (long long)p->depth);
            csv_real(&b, p->prefill_tok_s);
            csv_real(&b, p->ms);
            csv_real(&b, p->ms_min);
            csv_real(&b, p->ms_mean);
            csv_real(&b, p->ms_sd);
            buf_printf(&b, "%lld,", (long long)p->bytes_per_token);
            csv_real(&b, p->kv_share);
            csv_real(&b, mode == HYBRID ? (double)t->n_retrieval : -1);
            csv_real(&b, mode == HYBRID ? (double)t->budget : -1);
            buf_printf(&b, "%lld,%lld,%d,%s,%s,\"%s\",\"%s\",%s,%lld,", (long long)t->o->reps, (long long)t->o->steps,
                       is_synthetic(t->o), kv_name(t), t->info.weights_dtype, t->info.device, t->machine, LG_COMMIT,
                       (long long)t->o->at_once);
            csv_real(&b, t->copy_rate > 0 ? t->copy_rate / 1e9 : -1);
            csv_real(&b, t->chunk_s > 0 ? (double)t->o->prefill : -1);
            csv_real(&b, t->chunk_s > 0 ? t->chunk_s : -1);
            if (t->chunk_s > 0)
                buf_printf(&b, "%.6g", t->chunk_flops / t->chunk_s / 1e12);
            buf_puts(&b, "\n");
        }
    int rc = out_whole(t->o->csv, &b);
    buf_free(&b);
    return rc;
}

static int write_svg(const bench *t, int64_t n)
{
    static const char *const colours[N_MODE] = {"#1f6fb4", "#d1592a"};
    chart_series series[N_MODE];
    int64_t n_series = 0, *x = cli_alloc(NULL, (size_t)n, sizeof *x);
    double *y = cli_alloc(NULL, (size_t)n * N_MODE, sizeof *y);
    char title[192];
    buf b = {0};
    for (int64_t i = 0; i < n; i++)
        x[i] = t->points[DENSE][i].depth;
    for (int mode = 0; mode < N_MODE; mode++) {
        if (mode == HYBRID && !t->roles)
            continue;
        for (int64_t i = 0; i < n; i++)
            y[mode * n + i] = t->points[mode][i].ms;
        series[n_series++] = (chart_series){mode_names[mode], colours[mode], y + mode * n};
    }
    snprintf(title, sizeof title, "Decode time over context depth (%.60s, %s)",
             t->info.name[0] ? t->info.name : t->info.arch, t->info.weights_dtype);
    chart_lines(&b, title, "context depth (tokens)", "ms per token (median)", x, n, series, n_series);
    int rc = out_whole(t->o->svg, &b);
    buf_free(&b);
    free(x);
    free(y);
    return rc;
}

/* ---- the command ----------------------------------------------------------------------------------- */

static int measure(bench *t, const size_list *d)
{
    int rc = open_session(t, d->v[d->n - 1]);
    make_ids(t, d->v[d->n - 1] > t->o->prefill ? d->v[d->n - 1] : t->o->prefill);
    if (!rc && t->o->prefill)
        rc = measure_prefill(t);
    for (int mode = 0; mode < N_MODE; mode++) {
        t->ms[mode] = cli_alloc(NULL, (size_t)t->o->reps, sizeof **t->ms);
        t->points[mode] = cli_alloc(NULL, (size_t)d->n, sizeof **t->points);
        memset(t->points[mode], 0, (size_t)d->n * sizeof **t->points);
    }
    t->total = d->n * t->o->reps;
    read_machine(t->machine, sizeof t->machine);
    for (int64_t i = 0; i < d->n && !rc; i++)
        rc = measure_depth(t, i, d->v[i]);
    cli_progress_end();
    buf b = {0};
    for (int64_t i = 0; i < d->n && !rc && t->o->json; i++)
        for (int mode = 0; mode < N_MODE; mode++)
            if (mode == DENSE || t->roles)
                point_json(t, mode, &t->points[mode][i], &b);
    if (!rc && !t->o->json)
        table(t, d->n, &b);
    if (!rc && t->o->csv)
        rc = write_csv(t, d->n);
    if (!rc && t->o->svg)
        rc = write_svg(t, d->n);
    if (!rc)
        rc = emit(&b);
    buf_free(&b);
    return rc;
}

static int run(const options *o)
{
    int rc = o->shape ? CLI_DONE : need("-m/--model", o->model);
    if (!rc && o->shape && o->model)
        rc = usage_error("--shape takes no model");
    if (!rc && !o->shape && (opt_given(o, "weights") || opt_given(o, "retrieval")))
        rc = usage_error("--weights and --retrieval need --shape");
    if (!rc && opt_given(o, "depth") && o->depth.n == 0)
        rc = usage_error("--depth: the list is empty");
    if (!rc && !o->shape)
        rc = opt_check_hybrid(o);
    if (rc)
        return rc;
    bench t = {.o = o, .budget = -1};
    size_list depths = {0};
    rc = model_open(o, false, &t.m);
    if (!rc) {
        lg_model_get_info(t.m, &t.info);
        rc = choose_depths(&t, &depths);
    }
    if (!rc)
        rc = measure(&t, &depths);
    for (int mode = 0; mode < N_MODE; mode++) {
        free(t.ms[mode]);
        free(t.points[mode]);
    }
    lg_session_free(t.s);
    free(t.ids);
    free(depths.v);
    free(t.made.role);
    if (t.roles != &t.made)
        lg_roles_free(t.roles);
    lg_model_free(t.m);
    return rc;
}

static const opt opts[] = {
    O_SIZES("depth", depth, "A,B,..", 2, (int64_t)1 << 30, NULL, "512 and its doubles up to the window",
            "tokens in the cache at the end of the measured steps"),
    O_SIZE(0, "reps", reps, 1, 1000, "5", NULL, "repetitions; dense and hybrid take turns"),
    O_SIZE(0, "steps", steps, 1, 4096, "16", NULL, "decode steps of a repetition"),
    O_TEXT(0, "shape", shape, "NAME", NULL, "llama3-8b, qwen2.5-7b or smollm2: random weights instead of a model; implies --synthetic"),
    O_CHOICE("weights", weights, "bf16|f16|f32|q8_0|q4_0|q4_1|q4_k|q6_k", "bf16", NULL, "type of a shape's weights"),
    O_SIZE(0, "retrieval", retrieval, 0, 1 << 20, NULL, "an eighth", "retrieval heads of a shape (0: dense only)"),
    O_SIZE(0, "batch", at_once, 1, MAX_AT_ONCE, "1", NULL, "sequences decoded together"),
    O_SIZE(0, "prefill", prefill, 2, (int64_t)1 << 30, NULL, "none", "also time the prefill of N tokens"),
    O_FLAG(0, "synthetic", synthetic, "random K and V instead of a prefill; goes beyond the window"),
    O_TEXT(0, "csv", csv, "FILE", NULL, "write the figures as CSV"),
    O_TEXT(0, "svg", svg, "FILE", NULL, "draw decode time over depth as SVG"),
    O_SIZE(0, "seed", seed, 0, INT64_MAX, "0", NULL, "seed of the ids and of the random cache"),
    O_END};
static const opt_group groups[] = {{"Options", opts}, {"Model", opts_model}, {"Session", opts_session},
                                   {"Hybrid heads", opts_hybrid}, {"Output", opts_output}, {0}};

const command cmd_bench = {
    .name = "bench", .args = "", .summary = "measure speed over context depth, dense and hybrid",
    .groups = groups,
    .notes = "decode ms is the median over the repetitions of the mean step. With --json, one object a line.\n",
    .examples = "  longan bench -m model.gguf --depth 512,2k,8k --roles roles.json --budget 1024\n"
                "  longan bench -m model.gguf --roles roles.json --budget 1024 --synthetic --depth 8k,32k \\\n"
                "         --csv depth.csv --svg depth.svg\n",
    .run = run};
