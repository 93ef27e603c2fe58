/* Calibration end to end on a tiny random model: files, curve, counts, determinism, refusals, cancelling. */
#include "fixture.h"

#include "heads/measure.h"
#include "longan/heads.h"
#include "model/roles.h"

#define OUT "/tmp/lg-calibrate-test"

/* The sanitizers make this 10 to 20 times slower: one kind of sharing, few positions, and the comparison of two runs left to the plain build. */
#ifdef __SANITIZE_ADDRESS__
enum { CONTEXT = 240, POSITIONS = 2, SEARCH = 2, SHARES = 1 };
#else
enum { CONTEXT = 240, POSITIONS = 6, SEARCH = 2, SHARES = 2 };
#endif

static lg_model *model;
static char text[9000];

static int open_model(void **state) {
    (void)state;
    lg_model_params mp = { .path = FIXTURES "tiny-hybrid", .n_threads = 1 };
    OK(lg_model_open(&model, &mp, err));
    static const char *const words[] = { "river", "stone", "walked", "under", "the", "old", "bridge", "and", "saw", "nothing" };
    for (size_t n = 0, i = 0; n + 10 < sizeof text; i++)
        n += (size_t)snprintf(text + n, sizeof text - n, "%s ", words[lg_base_rng_below(1, 1, i, 10)]);
    return 0;
}

static int close_model(void **state) {
    (void)state;
    lg_model_free(model);
    return 0;
}

static lg_calibrate_params small(void) {
    lg_calibrate_params p;
    lg_calibrate_defaults(&p);
    p.text = text;
    p.text_bytes = (int64_t)strlen(text);
    p.text_name = "made \"up\"";
    p.n_ctx = CONTEXT;
    p.n_positions = POSITIONS;
    p.budget = 64;
    p.sinks = 4;
    p.recents = 16;
    p.search = SEARCH;
    p.spread = true;
    p.n_retrieval = 5;
    return p;
}

static lg_roles *load(const char *path) {
    lg_roles *r = NULL;
    OK(lg_roles_load(&r, path, err));
    return r;
}

static void test_run(void **state) {
    (void)state;
    for (int same = 0; same < SHARES; same++) {
        lg_calibrate_params p = small();
        const int64_t also[] = { 4, 15 };
        p.same_index = same;
        p.also = also;
        p.n_also = 2;
        p.curve_csv = OUT ".csv";
        OK(lg_heads_calibrate(model, &p, OUT ".json", err));
        lg_roles *r = load(OUT ".json"), *four = load(OUT "-n4.json"), *all = load(OUT "-n15.json");
        assert_int_equal(r->n_retrieval, 5);
        assert_int_equal(four->n_retrieval, 4);
        assert_int_equal(all->n_retrieval, 15);
        assert_int_equal(r->same_index, same);
        assert_int_equal(r->budget, 64);
        assert_int_equal(r->sinks, 4);
        assert_int_equal(r->recents, 16);
        assert_non_null(r->share); /* at most 1 on average: lg_roles_load looks */
        int64_t others = 0, sum = 0;
        for (int64_t i = 0; i < 15; i++) {
            if (r->role[i].kind == LG_ROLE_RETRIEVAL) continue;
            others++;
            sum += r->share[i];
        }
        assert_true(sum > 0 && sum <= others * 1024);
        for (int64_t i = 0; i < 15; i++) /* one order of heads: a smaller map's retrieval heads are in the larger one */
            if (four->role[i].kind == LG_ROLE_RETRIEVAL) assert_int_equal(r->role[i].kind, LG_ROLE_RETRIEVAL);
        for (int64_t h = 0; same && h < 3; h++) assert_int_equal(r->role[h].kind, LG_ROLE_RETRIEVAL);

        /* The curve: a line for every count, dense at the end of it. */
        lg_text csv = { 0 };
        OK(lg_file_read_all(&csv, OUT ".csv", 1 << 20, err));
        double kl[16], key[16];
        int64_t lines = 0;
        assert_int_equal(strncmp(csv.data, "n_retrieval,objective,kl_plain,kl_passkey,top1_plain", 52), 0);
        for (char *at = strchr(csv.data, '\n') + 1; *at; at = strchr(at, '\n') + 1, lines++) {
            long long n;
            double objective;
            assert_true(lines < 16);
            assert_int_equal(sscanf(at, "%lld,%lf,%lf,%lf", &n, &objective, &kl[lines], &key[lines]), 4);
            assert_int_equal(n, lines);
        }
        assert_int_equal(lines, 16);
        assert_true(kl[0] > 1e-6);
        assert_true(key[0] > 1e-6);
        assert_true(kl[15] < 1e-7);
        assert_true(key[15] < 1e-7);
        lg_text_free(&csv);

        /* Again: the same roles. */
        if (SHARES == 2) {
            lg_calibrate_params again = p;
            again.n_also = 0;
            again.curve_csv = NULL;
            OK(lg_heads_calibrate(model, &again, OUT "-again.json", err));
            lg_roles *b = load(OUT "-again.json");
            assert_memory_equal(r->role, b->role, 15 * sizeof *r->role);
            assert_memory_equal(r->share, b->share, 15 * sizeof *r->share);
            lg_roles_free(b);
            again.spread = false;
            OK(lg_heads_calibrate(model, &again, OUT "-again.json", err));
            b = load(OUT "-again.json");
            assert_null(b->share);
            lg_roles_free(b);
        }
        lg_roles_free(r);
        lg_roles_free(four);
        lg_roles_free(all);
    }
    remove(OUT ".json");
    remove(OUT "-n4.json");
    remove(OUT "-n15.json");
    remove(OUT "-again.json");
    remove(OUT ".csv");
}

/* Swaps on the real objective keep the count, the rules of the file and layer 0 of same-index. */
static void test_refine(void **state) {
    (void)state;
    lg_error why;
    for (int same = 0; same < SHARES; same++) {
        lg_calibrate_params p = small();
        p.same_index = same;
        p.refine = 2;
        OK(lg_heads_calibrate(model, &p, OUT ".json", err));
        lg_roles *r = load(OUT ".json");
        OK(lg_roles_check(r, "refined", err));
        assert_int_equal(r->n_retrieval, 5);
        for (int64_t h = 0; same && h < 3; h++) assert_int_equal(r->role[h].kind, LG_ROLE_RETRIEVAL);
        lg_roles_free(r);
        p.refine = 65;
        assert_int_equal(lg_heads_calibrate(model, &p, OUT ".json", &why), LG_ERR_USAGE);
    }
    remove(OUT ".json");
}

static void test_bound(void **state) {
    (void)state;
    lg_calibrate_params p = small();
    p.n_retrieval = 0;
    p.search = 1;
    p.kl_bound = 1e9; /* the window is good enough */
    OK(lg_heads_calibrate(model, &p, OUT ".json", err));
    lg_roles *r = load(OUT ".json");
    assert_int_equal(r->n_retrieval, 0);
    lg_roles_free(r);
    p.kl_bound = 1e-7; /* only dense is */
    OK(lg_heads_calibrate(model, &p, OUT ".json", err));
    r = load(OUT ".json");
    assert_true(r->n_retrieval > 5);
    lg_roles_free(r);
    remove(OUT ".json");
}

static bool stop(void *user, const char *what, int64_t done, int64_t total) {
    (void)total;
    return strcmp(what, user) || done == 0;
}

static void test_refused(void **state) {
    (void)state;
    static const char *const phases[] = { "coverage", "sensitivity", "search", "curve" };
    lg_error err;
    lg_calibrate_params p = small();
    p.text_bytes = CONTEXT;
    assert_int_equal(lg_heads_calibrate(model, &p, OUT ".json", &err), LG_ERR_LIMIT); /* a file's content, no option: exit 1 */
    assert_non_null(strstr(err.message, "too short"));
    p = small();
    p.n_retrieval = 16;
    assert_int_equal(lg_heads_calibrate(model, &p, OUT ".json", &err), LG_ERR_USAGE);
    p = small();
    p.same_index = true;
    p.n_retrieval = 2; /* layer 0 has three */
    assert_int_equal(lg_heads_calibrate(model, &p, OUT ".json", &err), LG_ERR_USAGE);
    p = small();
    p.budget = 10;
    assert_int_equal(lg_heads_calibrate(model, &p, OUT ".json", &err), LG_ERR_USAGE);
    p = small();
    p.n_ctx = 100000;
    assert_int_equal(lg_heads_calibrate(model, &p, OUT ".json", &err), LG_ERR_LIMIT);
    for (size_t i = 0; i < sizeof phases / sizeof *phases; i++) {
        p = small();
        p.progress = stop;
        p.progress_user = (void *)(uintptr_t)phases[i];
        assert_int_equal(lg_heads_calibrate(model, &p, OUT ".json", &err), LG_ERR_CANCELLED);
    }
    assert_int_equal(access(OUT ".json", F_OK), -1);
}

/* A probe's scores against the same steps taken by hand. */
typedef struct rows { float *logits; int64_t n_vocab; } rows;

static lg_status keep(void *user, int64_t row, const float *logits, lg_error *err) {
    (void)err;
    rows *r = user;
    memcpy(r->logits + row * r->n_vocab, logits, (size_t)r->n_vocab * sizeof *logits);
    return LG_OK;
}

static void test_probe(void **state) {
    (void)state;
    enum { CTX = 200, LEN = 230 };
    lg_ids ids = { 0 };
    lg_model_info info;
    lg_model_get_info(model, &info);
    OK(lg_tokenize(model, text, 2000, 0, &ids, err));
    lg_roles *r = lg_roles_new(info.n_layer, info.n_head_kv);
    memcpy(r->family, info.family, sizeof r->family);
    r->role[1].kind = LG_ROLE_RETRIEVAL;
    r->role[7] = (lg_role){ LG_ROLE_DONOR, 0, 1 };
    r->n_retrieval = 1;
    rows got[2];
    for (int hybrid = 0; hybrid < 2; hybrid++) {
        lg_session *s;
        lg_session_params sp;
        lg_session_defaults(&sp);
        sp.n_ctx = LEN;
        sp.roles = hybrid ? r : NULL;
        sp.hybrid.budget = 32;
        sp.hybrid.sinks = 2;
        sp.hybrid.recents = 8;
        got[hybrid] = (rows){ malloc(sizeof(float) * LEN * (size_t)info.n_vocab), info.n_vocab };
        OK(lg_session_new(&s, model, &sp, err));
        OK(lg_session_eval(s, ids.data, LEN, CTX, keep, &got[hybrid], err));
        lg_session_free(s);
    }
    uint8_t scored[LEN] = { 0 };
    double kl = 0, top = 0, right = 0;
    int64_t n = 0;
    for (int64_t i = CTX; i + 1 < LEN; i += 2, n++) {
        const float *d = got[0].logits + i * info.n_vocab, *h = got[1].logits + i * info.n_vocab;
        int64_t bd = 0, bh = 0;
        for (int64_t v = 0; v < info.n_vocab; v++) {
            bd = d[v] > d[bd] ? v : bd;
            bh = h[v] > h[bh] ? v : bh;
        }
        scored[i] = 1;
        kl += lg_heads_kl(d, h, info.n_vocab);
        top += bd == bh;
        right += bh == ids.data[i + 1];
    }
    lg_probe *probe;
    lg_score sc;
    lg_hybrid_params how;
    lg_hybrid_defaults(&how);
    how.budget = 32;
    how.sinks = 2;
    how.recents = 8;
    lg_probe_seq seq[2] = { { ids.data, LEN, CTX, scored }, { ids.data, LEN, CTX, scored } };
    OK(lg_heads_probe_new(&probe, model, seq, 2, LG_DTYPE_COUNT, NULL, NULL, err));
    for (int round = 0; round < 2; round++) { /* a run leaves the contexts as they were */
        OK(lg_heads_probe_run(probe, r, &how, &sc, err));
        assert_int_equal(sc.n, 2 * n);
        assert_true(kl > 0);
        assert_true(fabs(sc.kl - kl / (double)n) < 1e-6 + 1e-3 * kl / (double)n);
        assert_true(fabs(sc.top1 - top / (double)n) < 1e-9);
        assert_true(fabs(sc.accuracy - right / (double)n) < 1e-9);
        assert_true(sc.kv_share > 0.1 && sc.kv_share < 0.5);
    }
    OK(lg_heads_probe_run(probe, NULL, &how, &sc, err));
    assert_true(sc.kl == 0 && sc.top1 == 1 && sc.kv_share == 1);
    lg_heads_probe_free(probe);
    lg_roles_free(r);
    free(got[0].logits);
    free(got[1].logits);
    lg_ids_free(&ids);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_probe), cmocka_unit_test(test_run), cmocka_unit_test(test_refine), cmocka_unit_test(test_bound),
                                        cmocka_unit_test(test_refused) };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
