/* The mathematics of calibration against slow computations written straight from its definition; KL; the
 * multi-passkey generator. No model. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "heads/cover.h"
#include "heads/measure.h"
#include "tasks/passkey.h"

enum { L = 4, H = 3, G = 2, D = 20, S = 90, P = 3, N = L * H, BUDGET = 24, SINKS = 3, RECENTS = 5 };

static float noise(uint64_t stream, int64_t i) {
    return (float)(lg_base_rng_unit(77, stream, (uint64_t)i) * 2 - 1);
}

/* ---- coverage, from the definition ------------------------------------------------------------------- */
static const float *key_of(const float *k, int l, int h) { return k + (int64_t)(l * H + h) * S * D; }
static const float *query_of(const float *q, int l, int p, int h) { return q + ((int64_t)(l * P + p) * H + h) * G * D; }

static double dot(const float *a, const float *b) {
    double s = 0;
    for (int d = 0; d < D; d++) s += (double)a[d] * (double)b[d];
    return s;
}

static int size = BUDGET; /* of sets and windows */

static void slow_set(const float *q, const float *k, int len, bool *in) {
    double score[S];
    int n = 0;
    for (int t = 0; t < len; t++) {
        score[t] = 0;
        for (int g = 0; g < G; g++) score[t] += dot(q + g * D, k + t * D) / G;
        in[t] = t < SINKS || t >= len - RECENTS;
        n += in[t];
    }
    for (; n < size && n < len; n++) {
        int best = -1;
        for (int t = 0; t < len; t++)
            if (!in[t] && (best < 0 || score[t] > score[best])) best = t;
        in[best] = true;
    }
}

static void slow_attention(const float *q, const float *k, int len, double *p) {
    for (int t = 0; t < len; t++) p[t] = 0;
    for (int g = 0; g < G; g++) {
        double e[S], sum = 0;
        for (int t = 0; t < len; t++) sum += e[t] = exp(dot(q + g * D, k + t * D) / sqrt(D));
        for (int t = 0; t < len; t++) p[t] += e[t] / sum / G;
    }
}

static void slow_cover(const float *q, const float *k, const int64_t *pos, double *c, double *w) {
    memset(c, 0, N * N * sizeof *c);
    memset(w, 0, N * sizeof *w);
    for (int p = 0; p < P; p++)
        for (int i = 0; i < N; i++) {
            double a[S];
            int len = (int)pos[p] + 1;
            slow_attention(query_of(q, i / H, p, i % H), key_of(k, i / H, i % H), len, a);
            for (int t = 0; t < len; t++)
                if (t < SINKS || t >= len - (size - SINKS)) w[i] += a[t] / P;
            for (int r = 0; r < i / H * H; r++) {
                bool in[S];
                slow_set(query_of(q, r / H, p, r % H), key_of(k, r / H, r % H), len, in);
                for (int t = 0; t < len; t++)
                    if (in[t]) c[r * N + i] += a[t] / P;
            }
        }
}

/* The same at a level of the budget: sets and windows of another size. */
static void slow_level(int level, const float *q, const float *k, const int64_t *pos, double *c, double *w) {
    const int budget = BUDGET;
    size = SINKS + RECENTS + (budget - SINKS - RECENTS) * lg_cover_share[level] / 1024;
    slow_cover(q, k, pos, c, w);
    size = BUDGET;
}

static void run_cover(lg_cover *cv, const float *q, const float *k, const int64_t *pos, double weight) {
    assert_int_equal(lg_cover_begin(cv, pos, P, BUDGET, NULL), LG_OK);
    for (int l = 0; l < L; l++) {
        const float *head[H];
        for (int h = 0; h < H; h++) head[h] = key_of(k, l, h);
        assert_int_equal(lg_cover_layer(cv, l, query_of(q, l, 0, 0), head, NULL), LG_OK);
    }
    lg_cover_end(cv, weight);
}

static void test_cover(void **state) {
    (void)state;
    const int64_t pos[2][P] = { { 12, 60, 89 }, { 30, 31, 70 } }; /* 12: shorter than the budget, everything is covered */
    float *q[2], *k[2];
    double *c[2], *w[2];
    lg_cover cv;
    assert_int_equal(lg_cover_new(&cv, L, H, G, D, SINKS, RECENTS, NULL), LG_OK);
    for (int x = 0; x < 2; x++) {
        q[x] = malloc(L * P * H * G * D * sizeof(float));
        k[x] = malloc(L * H * S * D * sizeof(float));
        c[x] = malloc(N * N * sizeof(double));
        w[x] = malloc(N * sizeof(double));
        for (int i = 0; i < L * P * H * G * D; i++) q[x][i] = 4 * noise((uint64_t)x * 2, i);
        for (int i = 0; i < L * H * S * D; i++) k[x][i] = noise((uint64_t)x * 2 + 1, i);
        slow_cover(q[x], k[x], pos[x], c[x], w[x]);
        run_cover(&cv, q[x], k[x], pos[x], x ? 3.0 : 1.0);
        if (x) continue;
        for (int level = 0; level < LG_COVER_LEVELS; level++) { /* 16 tokens beyond sinks and recents, up to 128: all there are */
            double *lc = malloc(N * N * sizeof(double)), lw[N];
            slow_level(level, q[0], k[0], pos[0], lc, lw);
            for (int i = 0; i < N; i++) {
                assert_true(fabs(cv.all_w[level * N + i] - lw[i]) < 1e-5);
                for (int r = 0; r < i / H * H; r++) assert_true(fabs(cv.all_c[(level * N + r) * N + i] - lc[r * N + i]) < 1e-5);
            }
            free(lc);
        }
    }
    for (int i = 0; i < N; i++) {
        assert_true(fabs(cv.w[i] - (w[0][i] + 3 * w[1][i]) / 4) < 1e-5);
        for (int r = 0; r < N; r++) {
            double want = r / H < i / H ? (c[0][r * N + i] + 3 * c[1][r * N + i]) / 4 : 0;
            assert_true(fabs(cv.c[r * N + i] - want) < 1e-5);
        }
    }
    lg_cover_free(&cv);
    for (int x = 0; x < 2; x++) {
        free(q[x]);
        free(k[x]);
        free(c[x]);
        free(w[x]);
    }
}

/* ---- shares of the budget ---------------------------------------------------------------------------- */
/* Convex losses: no pair of heads gains by moving a step of the grid from one to the other, and the mean is one. */
static void test_spread(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 30; seed++) {
        double loss[N * LG_COVER_LEVELS], rate[N];
        lg_roles *r = lg_roles_new(L, H);
        int64_t sum = 0;
        for (int i = 0; i < N; i++) {
            if (lg_base_rng_below(seed, 9, (uint64_t)i, 4) == 0) r->role[i].kind = LG_ROLE_RETRIEVAL;
            rate[i] = 0.3 + 3 * lg_base_rng_unit(seed, 10, (uint64_t)i);
            for (int k = 0; k < LG_COVER_LEVELS; k++)
                loss[i * LG_COVER_LEVELS + k] = (1 + (double)i) * exp(-rate[i] * lg_cover_share[k] / 1024.0);
        }
        assert_int_equal(lg_cover_spread(r, loss, NULL), LG_OK);
        double least_drop = INFINITY, most_gain = 0;
        for (int i = 0; i < N; i++) {
            if (r->role[i].kind == LG_ROLE_RETRIEVAL) {
                assert_int_equal(r->share[i], 1024);
                continue;
            }
            sum += r->share[i] - 1024;
            int k = 0;
            while (k + 1 < LG_COVER_LEVELS && lg_cover_share[k + 1] <= r->share[i]) k++;
            const double *l = loss + i * LG_COVER_LEVELS;
            if (k && lg_cover_share[k] == r->share[i]) least_drop = fmin(least_drop, (l[k - 1] - l[k]) / (lg_cover_share[k] - lg_cover_share[k - 1]));
            if (k + 1 < LG_COVER_LEVELS) most_gain = fmax(most_gain, (l[k] - l[k + 1]) / (lg_cover_share[k + 1] - lg_cover_share[k]));
        }
        assert_int_equal(sum, 0);
        assert_true(least_drop >= most_gain * (1 - 1e-9));
        lg_roles_free(r);
    }
}

/* Nobody gains by more: nobody gets it. A fall behind a rise is seen. */
static void test_spread_hull(void **state) {
    (void)state;
    double loss[N * LG_COVER_LEVELS] = { 0 };
    lg_roles *r = lg_roles_new(L, H);
    for (int k = 0; k < LG_COVER_LEVELS; k++) loss[k] = k < 9 ? 1.0 : 0.5;
    assert_int_equal(lg_cover_spread(r, loss, NULL), LG_OK);
    assert_int_equal(r->share[0], lg_cover_share[9]);
    for (int i = 1; i < N; i++) assert_int_equal(r->share[i], 0);
    lg_roles_free(r);
}

/* ---- the choice -------------------------------------------------------------------------------------- */
static void random_cover(uint64_t seed, double *c, double *w, double *sens) {
    for (int i = 0; i < N; i++) {
        w[i] = lg_base_rng_unit(seed, 1, (uint64_t)i) * 0.9;
        sens[i] = lg_base_rng_unit(seed, 2, (uint64_t)i);
        for (int r = 0; r < N; r++) c[r * N + i] = r / H < i / H ? lg_base_rng_unit(seed, 3, (uint64_t)(r * N + i)) : 0;
    }
}

static double slow_objective(const double *c, const double *w, const double *sens, const uint8_t *mark, bool same) {
    double sum = 0;
    for (int i = 0; i < N; i++) {
        double cov = w[i];
        for (int r = 0; r < N; r++) {
            if (!mark[r] || r / H >= i / H) continue;
            if (same && r % H == i % H) cov = c[r * N + i]; /* later ones overwrite: the nearest stays */
            if (!same && c[r * N + i] > cov) cov = c[r * N + i];
        }
        if (mark[i]) cov = 1;
        sum += sens[i] / (1 - w[i]) * (cov - w[i]);
    }
    return sum;
}

static void test_choice(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 40; seed++)
        for (int same = 0; same < 2; same++) {
            double c[N * N], w[N], sens[N], gain[N], total = 0;
            int64_t order[N];
            uint8_t mark[N] = { 0 };
            random_cover(seed, c, w, sens);
            assert_int_equal(lg_cover_choose(L, H, c, w, sens, same, order, gain, NULL), LG_OK);
            for (int step = 0; step < N; step++) {
                double before = slow_objective(c, w, sens, mark, same), best = -1e9;
                for (int r = 0; r < (same && step < H ? H : N); r++) {
                    if (mark[r]) continue;
                    mark[r] = 1;
                    double g = slow_objective(c, w, sens, mark, same) - before;
                    mark[r] = 0;
                    best = g > best ? g : best;
                }
                assert_false(mark[order[step]]);
                if (same && step < H) assert_true(order[step] < H);
                assert_true(fabs(gain[step] - best) < 1e-9);
                mark[order[step]] = 1;
                total += gain[step];
                assert_true(fabs(total - slow_objective(c, w, sens, mark, same)) < 1e-9);
                assert_true(fabs(lg_cover_objective(L, H, c, w, sens, mark, same) - total) < 1e-9);
            }
        }
}

static void test_roles_of_choice(void **state) {
    (void)state;
    double c[N * N], w[N], sens[N], cov[N];
    uint8_t mark[N] = { 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0 };
    random_cover(5, c, w, sens);
    for (int same = 0; same < 2; same++) {
        lg_roles *r = lg_cover_roles(L, H, c, w, mark, same, cov);
        assert_int_equal(lg_roles_check(r, "made", NULL), LG_OK);
        assert_int_equal(r->n_retrieval, 3);
        for (int i = 0; i < N; i++) {
            const lg_role *e = &r->role[i];
            if (mark[i]) {
                assert_int_equal(e->kind, LG_ROLE_RETRIEVAL);
                assert_true(cov[i] == 1);
                continue;
            }
            if (same) assert_int_equal(e->kind, i % H == 1 && i > H ? LG_ROLE_DONOR : LG_ROLE_WINDOW);
            double got = e->kind == LG_ROLE_DONOR ? c[(e->donor_layer * H + e->donor_head) * N + i] : w[i];
            assert_true(got == cov[i]);
            for (int x = 0; !same && x < i / H * H; x++)
                if (mark[x]) assert_true(c[x * N + i] <= cov[i]);
            if (!same) assert_true(cov[i] >= w[i]);
        }
        lg_roles_free(r);
    }
}

static void test_kl(void **state) {
    (void)state;
    enum { V = 1000 };
    float a[V], b[V];
    double pa[V], pb[V], sa = 0, sb = 0, want = 0;
    for (int i = 0; i < V; i++) {
        a[i] = 8 * noise(11, i) + 50;
        b[i] = a[i] + noise(12, i) - 90;
        sa += pa[i] = exp((double)a[i]);
        sb += pb[i] = exp((double)b[i]);
    }
    for (int i = 0; i < V; i++) want += pa[i] / sa * log(pa[i] / sa / (pb[i] / sb));
    assert_true(want > 0.01);
    assert_true(fabs(lg_heads_kl(a, b, V) - want) < 1e-4 * want);
    assert_true(fabs(lg_heads_kl(a, a, V)) < 1e-6);
}

/* ---- multi-passkey ----------------------------------------------------------------------------------- */
/* One id per byte, so that the text can be read back. */
static lg_status encode_bytes(void *user, const char *s, int64_t n, lg_ids *out, lg_error *err) {
    (void)user;
    for (int64_t i = 0; i < n; i++)
        if (!lg_base_ids_push(out, (unsigned char)s[i])) return lg_base_fail(err, LG_ERR_NOMEM, -1, "memory");
    return LG_OK;
}

static lg_passkey_params params(const int32_t *hay, int64_t n, lg_split split, int64_t index) {
    return (lg_passkey_params){ .encode = encode_bytes, .haystack = hay, .n_haystack = n, .n_ctx = 3000, .n_keys = 6, .n_words = 5,
                                .seed = 9, .split = split, .index = index };
}

static char *text_of(const lg_passkey *k) {
    char *s = malloc((size_t)k->ids.n + 1);
    for (int64_t i = 0; i < k->ids.n; i++) s[i] = (char)k->ids.data[i];
    s[k->ids.n] = 0;
    return s;
}

static void test_passkey(void **state) {
    (void)state;
    enum { HAY = 4000 };
    int32_t hay[HAY];
    for (int i = 0; i < HAY; i++) hay[i] = '0' + i % 10;
    static const char *const names[] = { "first", "second", "third", "fourth", "fifth", "sixth" };
    lg_passkey k;
    lg_passkey_params p = params(hay, HAY, LG_SPLIT_TEST, 3);
    assert_int_equal(lg_tasks_passkey(&k, &p, NULL), LG_OK);
    assert_int_equal(k.n_ctx, 3000);
    char *t = text_of(&k), *last = t;
    int64_t n_answer = 0;
    for (int i = 0; i < 6; i++) {
        /* The needle stands in the context, in order of depth; its words stand again as the answer to its question. */
        char want[64], words[128];
        snprintf(want, sizeof want, "the %s passkey of the vault is:", names[i]);
        char *needle = strstr(t, want);
        assert_non_null(needle);
        assert_true(needle > last);
        last = needle;
        needle += strlen(want);
        size_t len = strcspn(needle, ".");
        assert_true(len < sizeof words);
        memcpy(words, needle, len);
        words[len] = 0;
        assert_true(needle - t < 3000);
        snprintf(want, sizeof want, "Answer: the %s passkey of the vault is:", names[i]);
        char *answer = strstr(t + k.n_ctx, want);
        assert_non_null(answer);
        answer += strlen(want);
        assert_memory_equal(answer, words, len);
        for (size_t j = 0; j < len; j++) assert_int_equal(k.answer[answer - t + (int64_t)j], 1);
        assert_int_equal(k.answer[answer - t - 1], 0);
        assert_int_equal(k.answer[answer - t + (int64_t)len], 0);
        n_answer += (int64_t)len;
    }
    assert_int_equal(k.n_answer, n_answer);
    free(t);
    lg_tasks_passkey_free(&k);
}

static void test_passkey_draws(void **state) {
    (void)state;
    enum { HAY = 4000 };
    int32_t hay[HAY];
    for (int i = 0; i < HAY; i++) hay[i] = 'a' + i % 26;
    lg_passkey a, b;
    lg_passkey_params p = params(hay, HAY, LG_SPLIT_TRAIN, 0), q = p;
    assert_int_equal(lg_tasks_passkey(&a, &p, NULL), LG_OK);
    assert_int_equal(lg_tasks_passkey(&b, &q, NULL), LG_OK);
    assert_int_equal(a.ids.n, b.ids.n); /* the same draw again */
    assert_memory_equal(a.ids.data, b.ids.data, (size_t)a.ids.n * sizeof(int32_t));
    lg_tasks_passkey_free(&b);
    for (int x = 0; x < 3; x++) { /* another split, sample or seed is another draw */
        q = p;
        if (x == 0) q.split = LG_SPLIT_DEV;
        if (x == 1) q.index = 1;
        if (x == 2) q.seed = 10;
        assert_int_equal(lg_tasks_passkey(&b, &q, NULL), LG_OK);
        assert_true(a.ids.n != b.ids.n || memcmp(a.ids.data, b.ids.data, (size_t)a.ids.n * sizeof(int32_t)));
        lg_tasks_passkey_free(&b);
    }
    lg_tasks_passkey_free(&a);
    p.n_ask = 2; /* fewer questions: the same sample, cut short */
    assert_int_equal(lg_tasks_passkey(&b, &p, NULL), LG_OK);
    p.n_ask = 0;
    assert_int_equal(lg_tasks_passkey(&a, &p, NULL), LG_OK);
    assert_true(b.ids.n < a.ids.n);
    assert_memory_equal(a.ids.data, b.ids.data, (size_t)b.ids.n * sizeof(int32_t));
    lg_tasks_passkey_free(&a);
    lg_tasks_passkey_free(&b);
    lg_error err;
    p.n_ctx = 400; /* the needles alone are longer */
    assert_int_equal(lg_tasks_passkey(&a, &p, &err), LG_ERR_USAGE);
    p = params(hay, 500, LG_SPLIT_TRAIN, 0);
    assert_int_equal(lg_tasks_passkey(&a, &p, &err), LG_ERR_USAGE);
    p.n_keys = 11;
    assert_int_equal(lg_tasks_passkey(&a, &p, &err), LG_ERR_USAGE);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cover), cmocka_unit_test(test_spread), cmocka_unit_test(test_spread_hull), cmocka_unit_test(test_choice),
        cmocka_unit_test(test_roles_of_choice),
        cmocka_unit_test(test_kl),        cmocka_unit_test(test_passkey), cmocka_unit_test(test_passkey_draws),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
