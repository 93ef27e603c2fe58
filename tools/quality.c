/* quality: what hybrid decoding costs in quality (docs/SPARSE.md).
 *
 *     quality -m MODEL --roles STEM --dir DIR [--part I/N] [options] TEXT...
 *     quality -m MODEL --roles STEM --dir DIR --report [the same options] TEXT...
 *
 * Maps: STEM-donor-nN.json, STEM-same-index-nN.json, random maps, the window alone. Each text gives passages: a context
 * is read densely once, its continuation is decoded, teacher forced, under every map and compared with dense decoding:
 * mean KL(dense || hybrid) and top-1 agreement. Multi-passkey samples in the same texts give token accuracy. The work falls
 * into units (one passage, or one batch of samples, under all maps); part I of N does every Nth unit, so parts may run at once.
 * Every result is one line of DIR/cases-I.csv, written when it is there: a stopped run goes on where it was.
 * --report only sums: DIR/quality.csv, which tools/quality-table.py makes into table and curve. Exit 1 where a case is missing. */
#include <dirent.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "heads/measure.h"
#include "model/roles.h"
#include "tasks/passkey.h"

enum { MAX_LIST = 8, MAX_TEXT = 64, N_RANDOM = 3, BATCH = 4, N_KEYS = 6, N_WORDS = 6, N_ASK = 3, MAX_CASE = 1024 };

typedef struct list { int64_t n, v[MAX_LIST]; } list;
typedef enum map_kind { MAP_DENSE, MAP_WINDOW, MAP_DONOR, MAP_SAME, MAP_RANDOM } map_kind;
static const char *const map_name[] = { "dense", "window", "donor", "same-index", "random" };

typedef struct config { /* one way of decoding */
    map_kind kind;
    int64_t n, budget, sinks, recents, seed; /* seed: of random maps */
    lg_roles *roles;                         /* NULL: dense */
    char name[96];                           /* with a hash of the map, so that a new map is a new case */
} config;

typedef struct result { char key[192]; int64_t n; double kl, top1, accuracy, kv; } result; /* means over n rows */

typedef struct study {
    lg_model *m;
    lg_model_info info;
    const char *dir, *stem;
    list ctx, budget, n, key_ctx, key_budget;
    int64_t passages, positions, samples, part, n_part;
    bool bare; /* without the rows of 128 sinks and 256 recents */
    bool donor_only;
    const char *path[MAX_TEXT];
    lg_ids ids[MAX_TEXT];
    int64_t n_text;
    result *done;
    int64_t n_done, cap_done;
    FILE *log;
} study;

static void die(const char *what, const lg_error *err) {
    fprintf(stderr, "quality: %s%s%s\n", what, err ? ": " : "", err ? err->message : "");
    exit(1);
}

/* ---- results, kept between runs ---------------------------------------------------------------------- */
static const result *find(const study *s, const char *key) {
    for (int64_t i = 0; i < s->n_done; i++)
        if (!strcmp(s->done[i].key, key)) return &s->done[i];
    return NULL;
}

static void remember(study *s, const result *r) {
    if (s->n_done == s->cap_done) {
        int64_t cap = s->cap_done ? 2 * s->cap_done : 256;
        s->done = lg_base_realloc(s->done, s->cap_done * (int64_t)sizeof *s->done, cap * (int64_t)sizeof *s->done);
        if (!s->done) die("out of memory", NULL);
        s->cap_done = cap;
    }
    s->done[s->n_done++] = *r;
}

static void read_cases(study *s, const char *path) {
    char line[512];
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f)) {
        result r;
        long long n;
        size_t end = strlen(line); /* a line cut off by a kill has no end: not a result */
        if (!end || line[end - 1] != '\n' || sscanf(line, "%191[^,],%lld,%lf,%lf,%lf,%lf", r.key, &n, &r.kl, &r.top1, &r.accuracy, &r.kv) != 6)
            continue;
        r.n = n;
        if (!find(s, r.key)) remember(s, &r);
    }
    if (f) fclose(f);
}

static void open_log(study *s, bool write) {
    char path[4096];
    struct dirent *e;
    mkdir(s->dir, 0777);
    DIR *d = opendir(s->dir);
    if (!d) die(s->dir, NULL);
    while ((e = readdir(d)))
        if (!strncmp(e->d_name, "cases", 5) && strstr(e->d_name, ".csv")) {
            snprintf(path, sizeof path, "%s/%s", s->dir, e->d_name);
            read_cases(s, path);
        }
    closedir(d);
    if (!write) return;
    snprintf(path, sizeof path, "%s/cases-%lld.csv", s->dir, (long long)s->part);
    s->log = fopen(path, "a+");
    if (!s->log) die(path, NULL);
    if (fseek(s->log, -1, SEEK_END) == 0 && fgetc(s->log) != '\n') fputc('\n', s->log);
}

static void run_missing(study *s, lg_probe **probe, const lg_probe_seq *seq, int64_t n_seq, const char *where,
                        const config *c, int64_t n_config) {
    lg_error err;
    for (int64_t i = 0; i < n_config; i++) {
        result r = { .n = 0 };
        lg_score sc;
        snprintf(r.key, sizeof r.key, "%s %s", where, c[i].name);
        if (find(s, r.key)) continue;
        if (!*probe && lg_heads_probe_new(probe, s->m, seq, n_seq, LG_DTYPE_COUNT, NULL, NULL, &err) != LG_OK) die(where, &err);
        lg_hybrid_params how;
        lg_hybrid_defaults(&how);
        how.budget = c[i].budget;
        how.sinks = c[i].sinks;
        how.recents = c[i].recents;
        double start = lg_base_now();
        if (lg_heads_probe_run(*probe, c[i].roles, &how, &sc, &err) != LG_OK) die(r.key, &err);
        r.n = sc.n;
        r.kl = sc.kl;
        r.top1 = sc.top1;
        r.accuracy = sc.accuracy;
        r.kv = sc.kv_share;
        remember(s, &r);
        fprintf(s->log, "%s,%lld,%.8g,%.8g,%.8g,%.8g\n", r.key, (long long)r.n, r.kl, r.top1, r.accuracy, r.kv);
        fflush(s->log);
        fprintf(stderr, "%s: KL %.4f top-1 %.1f%% true %.1f%% KV %.1f%% (%.1f s)\n", r.key, r.kl, 100 * r.top1, 100 * r.accuracy,
                100 * r.kv, lg_base_now() - start);
    }
}

/* ---- configurations ---------------------------------------------------------------------------------- */
static lg_roles *random_map(const study *s, int64_t count, int64_t seed) {
    int64_t heads = s->info.n_head_kv, n = s->info.n_layer * heads, left = count;
    lg_roles *r = lg_roles_new(s->info.n_layer, heads);
    if (!r) die("out of memory", NULL);
    for (int64_t i = 0; i < n; i++) /* count of n, each set equally likely */
        if (lg_base_rng_below((uint64_t)seed, 1, (uint64_t)i, n - i) < left) {
            r->role[i].kind = LG_ROLE_RETRIEVAL;
            left--;
        }
    r->n_retrieval = count;
    for (int64_t i = 0; i < n; i++) {
        if (r->role[i].kind == LG_ROLE_RETRIEVAL) continue;
        int64_t before = 0, pick;
        for (int64_t d = 0; d < i / heads * heads; d++) before += r->role[d].kind == LG_ROLE_RETRIEVAL;
        if (!before) continue;
        pick = lg_base_rng_below((uint64_t)seed, 2, (uint64_t)i, before);
        for (int64_t d = 0; d < i / heads * heads; d++)
            if (r->role[d].kind == LG_ROLE_RETRIEVAL && pick-- == 0)
                r->role[i] = (lg_role){ LG_ROLE_DONOR, (int16_t)(d / heads), (int16_t)(d % heads) };
    }
    return r;
}

static lg_roles *map_of(const study *s, map_kind kind, int64_t n, int64_t seed) {
    lg_roles *r = NULL;
    lg_error err;
    char path[4096];
    if (kind == MAP_DENSE) return NULL;
    if (kind == MAP_WINDOW) r = lg_roles_new(s->info.n_layer, s->info.n_head_kv);
    else if (kind == MAP_RANDOM) r = random_map(s, n, seed);
    else {
        snprintf(path, sizeof path, "%s-%s-n%lld.json", s->stem, map_name[kind], (long long)n);
        if (lg_roles_load(&r, path, &err) != LG_OK) die("roles", &err);
        if (r->n_retrieval != n) die("the roles file has another count than its name", NULL);
    }
    if (!r) die("out of memory", NULL);
    memcpy(r->family, s->info.family, sizeof r->family);
    return r;
}

static int64_t make_configs(const study *s, const list *budget, config *out) {
    int64_t n_out = 0;
    out[n_out++] = (config){ .kind = MAP_DENSE };
    for (int64_t b = 0; b < budget->n; b++) {
        out[n_out++] = (config){ MAP_WINDOW, 0, budget->v[b], 16, 64, 0, NULL, "" };
        for (int64_t i = 0; i < s->n.n; i++) {
            int64_t n = s->n.v[i], bud = budget->v[b];
            out[n_out++] = (config){ MAP_DONOR, n, bud, 16, 64, 0, NULL, "" };
            if (!s->donor_only) out[n_out++] = (config){ MAP_SAME, n, bud, 16, 64, 0, NULL, "" };
            if (!s->bare && bud >= 384 + 64) { /* the method's own sinks and recents beside ours */
                out[n_out++] = (config){ MAP_DONOR, n, bud, 128, 256, 0, NULL, "" };
                if (!s->donor_only) out[n_out++] = (config){ MAP_SAME, n, bud, 128, 256, 0, NULL, "" };
            }
            for (int64_t k = 1; !s->donor_only && k <= N_RANDOM; k++) out[n_out++] = (config){ MAP_RANDOM, n, bud, 16, 64, k, NULL, "" };
        }
    }
    for (int64_t i = 0; i < n_out; i++) {
        config *c = &out[i];
        c->roles = map_of(s, c->kind, c->n, c->seed);
        uint64_t hash = 0;
        const int64_t heads = s->info.n_layer * s->info.n_head_kv;
        if (c->roles) hash = lg_base_hash_64(c->roles->role, heads * (int64_t)sizeof(lg_role));
        if (c->roles && c->roles->share) hash ^= lg_base_hash_64(c->roles->share, heads * (int64_t)sizeof *c->roles->share);
        if (c->roles) hash ^= (uint64_t)(c->roles->keep << 20 | c->roles->observe << 10 | c->roles->refresh);
        snprintf(c->name, sizeof c->name, "%s n%lld b%lld s%lld r%lld seed%lld %08llx", map_name[c->kind], (long long)c->n,
                 (long long)c->budget, (long long)c->sinks, (long long)c->recents, (long long)c->seed,
                 (unsigned long long)(hash & 0xffffffff));
    }
    return n_out;
}

/* ---- the two kinds of material ------------------------------------------------------------------------ */
static void where_plain(const study *s, int64_t ctx, int64_t i, char out[96]) {
    snprintf(out, 96, "plain ctx%lld+%lld passage%lld", (long long)ctx, (long long)s->positions, (long long)i);
}

static void run_plain(study *s, int64_t ctx, int64_t i, const config *c, int64_t n_config) {
    char where[96];
    const lg_ids *ids = &s->ids[i % s->n_text];
    int64_t round = i / s->n_text, rounds = (s->passages + s->n_text - 1) / s->n_text, len = ctx + s->positions + 1;
    if (ids->n < len) die("a text is shorter than context and positions", NULL);
    int64_t at = rounds > 1 ? (ids->n - len) / (rounds - 1) * round : (ids->n - len) / 2;
    lg_probe_seq seq = { .ids = ids->data + at, .n = len, .n_ctx = ctx };
    lg_probe *probe = NULL;
    where_plain(s, ctx, i, where);
    run_missing(s, &probe, &seq, 1, where, c, n_config);
    lg_heads_probe_free(probe);
}

static lg_status encode(void *user, const char *t, int64_t n, lg_ids *out, lg_error *err) {
    return lg_tokenize(user, t, n, 0, out, err);
}

static void where_passkey(int64_t ctx, int64_t batch, char out[96]) {
    snprintf(out, 96, "passkey ctx%lld batch%lld", (long long)ctx, (long long)batch);
}

static void run_passkey(study *s, int64_t ctx, int64_t batch, const config *c, int64_t n_config) {
    char where[96];
    lg_error err;
    lg_probe_seq seq[BATCH];
    lg_passkey key[BATCH];
    lg_probe *probe = NULL;
    uint8_t *flags[BATCH];
    for (int64_t i = 0; i < BATCH; i++) {
        int64_t index = batch * BATCH + i;
        const lg_ids *hay = &s->ids[index % s->n_text];
        lg_passkey_params p = { .encode = encode, .encode_user = s->m, .haystack = hay->data, .n_haystack = hay->n, .n_ctx = ctx,
                                .n_keys = N_KEYS, .n_words = N_WORDS, .n_ask = N_ASK, .seed = 2026, .split = LG_SPLIT_TEST, .index = index };
        if (lg_tasks_passkey(&key[i], &p, &err) != LG_OK) die("passkey", &err);
        flags[i] = lg_base_alloc(key[i].ids.n);
        if (!flags[i]) die("out of memory", NULL);
        for (int64_t j = 0; j + 1 < key[i].ids.n; j++) flags[i][j] = key[i].answer[j + 1];
        seq[i] = (lg_probe_seq){ key[i].ids.data, key[i].ids.n, key[i].n_ctx, flags[i] };
    }
    where_passkey(ctx, batch, where);
    run_missing(s, &probe, seq, BATCH, where, c, n_config);
    lg_heads_probe_free(probe);
    for (int64_t i = 0; i < BATCH; i++) {
        lg_tasks_passkey_free(&key[i]);
        lg_base_free(flags[i]);
    }
}

/* Units in the order of their cost, so that parts get alike shares. */
static void run_part(study *s, const config *plain, int64_t n_plain, const config *key, int64_t n_key) {
    int64_t unit = 0;
    for (int64_t k = s->ctx.n; k-- > 0;)
        for (int64_t i = 0; i < s->passages; i++)
            if (unit++ % s->n_part == s->part) run_plain(s, s->ctx.v[k], i, plain, n_plain);
    for (int64_t k = s->key_ctx.n; k-- > 0;)
        for (int64_t i = 0; i < s->samples / BATCH; i++)
            if (unit++ % s->n_part == s->part) run_passkey(s, s->key_ctx.v[k], i, key, n_key);
}

/* ---- the table ---------------------------------------------------------------------------------------- */
/* Sums all cases of a configuration (and of its random sisters) over passages or batches. */
static result total(const study *s, const config *c, int64_t n_config, const config *like, bool passkey, int64_t ctx, int64_t *cases) {
    result t = { .n = 0 };
    int64_t parts = passkey ? s->samples / BATCH : s->passages;
    for (int64_t j = 0; j < n_config; j++) {
        const config *x = &c[j];
        if (x->kind != like->kind || x->n != like->n || x->budget != like->budget || x->sinks != like->sinks) continue;
        for (int64_t i = 0; i < parts; i++) {
            char where[96], key[192];
            if (passkey) where_passkey(ctx, i, where);
            else where_plain(s, ctx, i, where);
            snprintf(key, sizeof key, "%s %s", where, x->name);
            const result *r = find(s, key);
            if (!r) continue;
            double n = (double)r->n;
            ++*cases;
            t.n += r->n;
            t.kl += r->kl * n;
            t.top1 += r->top1 * n;
            t.accuracy += r->accuracy * n;
            t.kv += r->kv * n;
        }
    }
    if (t.n) {
        double n = (double)t.n;
        t.kl /= n;
        t.top1 /= n;
        t.accuracy /= n;
        t.kv /= n;
    }
    return t;
}

static int64_t put_rows(const study *s, FILE *csv, const config *c, int64_t n_config, bool passkey, const list *ctx) {
    int64_t missing = 0;
    for (int64_t k = 0; k < ctx->n; k++)
        for (int64_t i = 0; i < n_config; i++) {
            const config *x = &c[i];
            if (x->kind == MAP_RANDOM && x->seed != 1) continue; /* one row for the three */
            int64_t cases = 0, due = (passkey ? s->samples / BATCH : s->passages) * (x->kind == MAP_RANDOM ? N_RANDOM : 1);
            result t = total(s, c, n_config, x, passkey, ctx->v[k], &cases);
            missing += due - cases;
            if (!t.n) continue;
            fprintf(csv, "%s,%lld,%lld,%lld,%lld,%lld,%s,%.6g,%.6g,%.6g,%.6g,%lld,%lld,%lld\n", passkey ? "passkey" : "plain", (long long)ctx->v[k],
                    (long long)x->budget, (long long)x->sinks, (long long)x->recents, (long long)x->n, map_name[x->kind], t.kl, t.top1,
                    t.accuracy, t.kv, (long long)t.n, (long long)cases, (long long)due);
        }
    return missing;
}

static int report(const study *s, const config *plain, int64_t n_plain, const config *key, int64_t n_key) {
    char path[4096];
    snprintf(path, sizeof path, "%s/quality.csv", s->dir);
    FILE *csv = fopen(path, "w");
    if (!csv) die(path, NULL);
    fprintf(csv, "text,context,budget,sinks,recents,n_retrieval,map,kl,top1,accuracy,kv_share,positions,cases,cases_due\n");
    int64_t missing = put_rows(s, csv, plain, n_plain, false, &s->ctx);
    if (s->samples) missing += put_rows(s, csv, key, n_key, true, &s->key_ctx);
    if (fclose(csv)) die("writing the table failed", NULL);
    if (missing) fprintf(stderr, "quality: %lld cases are missing: the table is not complete\n", (long long)missing);
    return missing ? 1 : 0;
}

/* ---- options ------------------------------------------------------------------------------------------ */
static list parse_list(const char *text) {
    list l = { 0 };
    for (const char *p = text; *p && l.n < MAX_LIST;) {
        char *end;
        l.v[l.n] = strtoll(p, &end, 10);
        if (end == p || (*end && *end != ',') || l.v[l.n] < 1) die("a list holds positive numbers with commas between", NULL);
        l.n++;
        p = *end ? end + 1 : end;
    }
    return l;
}

static const struct option options[] = {
    { "roles", 1, NULL, 'r' }, { "dir", 1, NULL, 'd' }, { "ctx", 1, NULL, 'c' }, { "budgets", 1, NULL, 'b' }, { "n", 1, NULL, 'n' },
    { "passages", 1, NULL, 'p' }, { "positions", 1, NULL, 'P' }, { "samples", 1, NULL, 's' }, { "passkey-ctx", 1, NULL, 'k' },
    { "passkey-budgets", 1, NULL, 'B' }, { "threads", 1, NULL, 't' }, { "part", 1, NULL, 'i' }, { "compute", 1, NULL, 'C' }, { "device", 1, NULL, 'D' },
    { "report", 0, NULL, 'R' }, { "bare", 0, NULL, 'w' }, { "donor", 0, NULL, 'O' }, { "quick", 0, NULL, 'q' }, { "help", 0, NULL, 'h' }, { 0 },
};

static void help(void) {
    puts("quality -m MODEL --roles STEM --dir DIR TEXT...\n"
         "  --ctx 4096,7168  --budgets 512,1024  --n 8,12,18,24   contexts, budgets, counts of retrieval heads\n"
         "  --passages 16 --positions 128                         plain text: passages, decoded positions of each\n"
         "  --samples 64 --passkey-ctx 1536 --passkey-budgets 192,512   multi-passkey samples\n"
         "  --bare                                                without the rows of 128 sinks and 256 recents\n"
         "  --donor                                               the donor maps, dense and the window alone\n"
         "  --compute f32|auto                                    f32: no rounding of activations beside the method's loss\n"
         "  --device cpu|cuda|cuda:N\n"
         "  --threads N   --part I/N (0 <= I < N)   --report (sum what is there)   --quick (a small study)");
}

int main(int argc, char **argv) {
    study s = { .dir = "build/quality", .stem = "roles/model", .ctx = parse_list("4096,7168"), .budget = parse_list("512,1024"),
                .n = parse_list("8,12,18,24"), .key_ctx = parse_list("1536"), .key_budget = parse_list("192,512"),
                .passages = 16, .positions = 128, .samples = 64, .n_part = 1 };
    lg_model_params mp = { .compute = LG_COMPUTE_F32 };
    bool only_report = false;
    int rc = 0;
    long long part = 0, n_part = 1;
    lg_error err;
    for (int o; (o = getopt_long(argc, argv, "m:", options, NULL)) != -1;) switch (o) {
        case 'm': mp.path = optarg; break;
        case 'r': s.stem = optarg; break;
        case 'd': s.dir = optarg; break;
        case 'c': s.ctx = parse_list(optarg); break;
        case 'b': s.budget = parse_list(optarg); break;
        case 'n': s.n = parse_list(optarg); break;
        case 'k': s.key_ctx = parse_list(optarg); break;
        case 'B': s.key_budget = parse_list(optarg); break;
        case 'p': s.passages = strtoll(optarg, NULL, 10); break;
        case 'P': s.positions = strtoll(optarg, NULL, 10); break;
        case 's': s.samples = strtoll(optarg, NULL, 10) / BATCH * BATCH; break;
        case 't': mp.n_threads = (int)strtol(optarg, NULL, 10); break;
        case 'i':
            if (sscanf(optarg, "%lld/%lld", &part, &n_part) != 2 || part < 0 || part >= n_part) die("--part takes I/N with 0 <= I < N", NULL);
            s.part = part;
            s.n_part = n_part;
            break;
        case 'C':
            if (strcmp(optarg, "f32") && strcmp(optarg, "auto")) die("--compute takes f32 or auto", NULL);
            mp.compute = strcmp(optarg, "f32") ? LG_COMPUTE_AUTO : LG_COMPUTE_F32;
            break;
        case 'D': mp.device = optarg; break;
        case 'R': only_report = true; break;
        case 'w': s.bare = true; break;
        case 'O': s.donor_only = true; break;
        case 'q': s.passages = 2; s.positions = 100; s.samples = BATCH; break;
        case 'h': help(); return 0;
        default: return 2;
        }
    if (!mp.path || optind == argc || s.passages < 1 || s.positions < 8 || s.samples < 0 || !s.ctx.n || !s.budget.n || !s.n.n) {
        help();
        return 2;
    }
    if (lg_model_open(&s.m, &mp, &err) != LG_OK) die(mp.path, &err);
    lg_model_get_info(s.m, &s.info);
    for (int i = optind; i < argc && s.n_text < MAX_TEXT; i++, s.n_text++) {
        lg_text t = { 0 };
        s.path[s.n_text] = argv[i];
        if (lg_file_read_all(&t, argv[i], 64 << 20, &err) != LG_OK) die("text", &err);
        if (lg_tokenize(s.m, t.data, t.n, 0, &s.ids[s.n_text], &err) != LG_OK) die(argv[i], &err);
        lg_text_free(&t);
    }
    open_log(&s, !only_report);
    static config plain[MAX_CASE], key[MAX_CASE];
    int64_t n_plain = make_configs(&s, &s.budget, plain), n_key = make_configs(&s, &s.key_budget, key);
    if (only_report) {
        rc = report(&s, plain, n_plain, key, n_key);
    } else {
        run_part(&s, plain, n_plain, key, n_key);
        fclose(s.log);
    }
    for (int64_t i = 0; i < n_plain; i++) lg_roles_free(plain[i].roles);
    for (int64_t i = 0; i < n_key; i++) lg_roles_free(key[i].roles);
    for (int64_t i = 0; i < s.n_text; i++) lg_ids_free(&s.ids[i]);
    lg_base_free(s.done);
    lg_model_free(s.m);
    return rc;
}
