/* Sampling: lg_ops_sample against a plain sampler in double (sort everything, then walk), and generation whose back end draws
 * (ref) against generation whose host draws (cpu). */
#include "fixture.h"
#include "ops/ops.h"
#include "ops/sample.h"
#include "session/session.h"

static uint64_t counter;
static uint64_t rnd(void) { return lg_base_rng(5, 21, counter++); }
static int64_t below(int64_t n) { return (int64_t)(rnd() % (uint64_t)n); }
static float unit(void) { return (float)((double)(rnd() >> 11) * 0x1p-53); }

static const float *by;
static int in_order(const void *a, const void *b) {
    const int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    return by[i] > by[j] ? -1 : by[i] < by[j] ? 1 : i < j ? -1 : 1;
}

static int32_t plain_sampler(const float *logits, int64_t n, const lg_sampler_params *p, const int32_t *recent, int64_t n_recent, int64_t step) {
    float *x = calloc((size_t)n, sizeof *x);
    int32_t *order = calloc((size_t)n, sizeof *order);
    double *w = calloc((size_t)n, sizeof *w), all = 0, kept = 0, sum = 0;
    memcpy(x, logits, (size_t)n * sizeof *x);
    for (int64_t i = 0; i < n_recent; i++) x[recent[i]] = logits[recent[i]] > 0 ? logits[recent[i]] / p->repeat_penalty : logits[recent[i]] * p->repeat_penalty;
    for (int64_t i = 0; i < n; i++) order[i] = (int32_t)i;
    by = x;
    qsort(order, (size_t)n, sizeof *order, in_order);
    int32_t id = order[0];
    if (p->temp > 0) {
        const int64_t k = p->top_k > 0 && p->top_k < n ? p->top_k : n;
        for (int64_t i = 0; i < n; i++) w[i] = exp(((double)x[order[i]] - (double)x[order[0]]) / (double)p->temp);
        for (int64_t i = 0; i < k; i++) all += w[i];
        int64_t m = 0;
        while (m < k && (m == 0 || !((p->top_p < 1 && kept >= (double)p->top_p * all) || w[m] < (double)p->min_p))) kept += w[m++];
        const double u = (double)lg_base_rng(p->seed, 0, (uint64_t)step) * 0x1p-64 * kept;
        for (int64_t i = 0; i < m; i++) {
            id = order[i];
            if ((sum += w[i]) > u) break;
        }
    }
    free(x);
    free(order);
    free(w);
    return id;
}

static void test_specification(void **state) {
    (void)state;
    enum { N = 700, DRAWS = 20 };
    static float x[N], scratch[2 * N];
    int distinct = 0;
    for (int c = 0; c < 600; c++) {
        const int64_t n = c % 3 == 0 ? N : 1 + below(N);
        const int ties = c % 4;
        int32_t recent[80];
        lg_sampler_params p;
        lg_sampler_defaults(&p);
        for (int64_t i = 0; i < n; i++) x[i] = ties == 3 ? (float)below(5) - 2 : ties == 2 ? (below(3) ? -INFINITY : 4 * unit()) : 12 * (unit() + unit()) - 14;
        p.temp = c % 17 == 0 ? 0 : c % 19 == 0 ? 1e-3f : 0.2f + 2 * unit();
        p.top_k = c % 5 == 0 ? 1 : c % 2 ? (int32_t)below(n + 2) : 0;
        p.top_p = c % 7 == 0 ? 1e-6f : c % 3 ? 1 : unit();
        p.min_p = c % 6 == 0 ? 0.7f * unit() : 0;
        p.repeat_penalty = c % 4 == 1 ? 0.5f + 2 * unit() : 1;
        p.seed = (uint64_t)c;
        const int64_t n_recent = below(80);
        for (int64_t i = 0; i < n_recent; i++) recent[i] = (int32_t)below(n); /* ids come more than once */
        int32_t first = -1;
        for (int64_t step = 0; step < DRAWS; step++) {
            const int32_t id = lg_sample(x, n, &p, recent, p.repeat_penalty == 1 ? 0 : n_recent, step, scratch);
            const lg_draw d = lg_session_draw(&p, n_recent, step);
            assert_int_equal(lg_ops_sample(x, n, &d, recent, scratch), id);
            const int32_t want = plain_sampler(x, n, &p, recent, p.repeat_penalty == 1 ? 0 : n_recent, step);
            if (id != want) fail_msg("case %d step %d: id %d, not %d", c, (int)step, id, want);
            distinct += step > 0 && id != first;
            first = id;
            if (p.top_k == 1 && !(p.temp <= 0)) assert_int_equal(id, plain_sampler(x, n, &(lg_sampler_params){ .temp = 0, .repeat_penalty = p.repeat_penalty }, recent,
                                                                                   p.repeat_penalty == 1 ? 0 : n_recent, 0));
        }
    }
    assert_true(distinct > 2000); /* the options left something to draw */
}

/* The host's sampler draws what the specification draws. */
static void test_fast(void **state) {
    (void)state;
    enum { N = 3000 };
    static float x[N], scratch[2 * N];
    int64_t later = 0; /* draws that are not of the greatest */
    for (int c = 0; c < 6000; c++) {
        const int64_t n = c % 3 == 0 ? N : 1 + below(c % 3 == 1 ? 40 : N);
        const int kind = (int)below(8);
        int32_t recent[LG_RECENT];
        const float wide = (float)(1 << below(8)), odd = (float[]){ NAN, INFINITY, -INFINITY, 0 }[below(4)];
        for (int64_t i = 0; i < n; i++)
            x[i] = kind == 0 ? (float)below(6) - 3 : kind == 1 ? -INFINITY : kind == 2 && below(3) ? odd : kind == 3 ? -0.0f * (float)below(2) : kind == 4 && i ? 7 : wide * (unit() - 0.5f);
        if (kind == 1 && below(2)) x[below(n)] = below(2) ? 3 : NAN;
        lg_draw d = { .scale = below(9) == 0 ? 0 : below(12) == 0 ? 1e40 : 1.44 / (0.05 + 2 * (double)unit()), .top_p = below(2) ? 1 : below(5) == 0 ? 1e-9 : (double)unit(),
                      .min_weight = below(3) ? 0 : below(4) == 0 ? (uint64_t)1 << 40 : (uint64_t)below((int64_t)1 << 40) >> below(30),
                      .random = below(8) == 0 ? 0 : below(8) == 0 ? ~(uint64_t)0 : rnd(), .top_k = below(2) ? 0 : below(3) ? 1 + below(60) : below(n + 3),
                      .penalty = below(3) ? 1 : 0.5f + 2 * unit(), .n_recent = (int32_t)below(LG_RECENT + 1) };
        for (int32_t i = 0; i < d.n_recent; i++) recent[i] = (int32_t)below(n);
        const int32_t want = lg_ops_sample(x, n, &d, recent, scratch), id = lg_ops_sample_fast(x, n, &d, recent, scratch);
        if (id != want) fail_msg("case %d (kind %d, %lld logits): id %d, not %d", c, kind, (long long)n, id, want);
        later += want != lg_ops_greatest(x, n);
        d.scale = 0;
        d.penalty = 1;
        assert_int_equal(lg_ops_greatest(x, n), lg_ops_sample(x, n, &d, recent, scratch));
    }
    assert_true(later > 2000);
}

static uint64_t weight(float v, float top, double scale) { return lg_sample_weight(lg_sample_key(v), lg_sample_key(top), scale); }
static void test_weights(void **state) {
    (void)state;
    for (int i = 0; i < 20000; i++) {
        const float top = 40 * unit() - 20, v = top - 40 * unit() * unit();
        const double temp = 0.1 + 2 * (double)unit(), want = exp(((double)v - (double)top) / temp) * 0x1p40;
        const double got = (double)weight(v, top, 1.4426950408889634 / temp);
        assert_true(lg_sample_value(lg_sample_key(v)) == v);
        if (!(fabs(got - want) <= 1.5)) fail_msg("weight of %g below %g at %g: %.3f, not %.3f", (double)v, (double)top, temp, got, want);
    }
    assert_int_equal(weight(3, 3, INFINITY), (int64_t)1 << 40); /* a temperature near 0 */
    assert_int_equal(weight(2, 3, INFINITY), 0);
    assert_int_equal(weight(-INFINITY, 3, 1), 0);
    assert_int_equal(weight(NAN, 3, 1), 0);
    assert_true(lg_sample_key(-0.0f) == lg_sample_key(0.0f));
    assert_true(lg_sample_key(INFINITY) > lg_sample_key(1e30f) && lg_sample_key(-INFINITY) < lg_sample_key(-1e30f) && lg_sample_key(NAN) < lg_sample_key(-INFINITY));
    assert_true(lg_sample_key(1e-40f) > lg_sample_key(0) && lg_sample_key(-1e-40f) < lg_sample_key(0));
}

/* Many prompts of different options on few sequences, greedy ones among them; then the same prompt again under another seed. */
static void test_generation(void **state) {
    (void)state;
    enum { RUNS = 7, NEW = 24 };
    lg_ids prompt = fx_ids("tiny-llama", "ref/prompt.txt"), prompts[RUNS], got[2][RUNS + 1] = { { { 0 } } };
    for (int i = 0; i < RUNS; i++) prompts[i] = (lg_ids){ .data = prompt.data + 3 * i, .n = 10 + 17 * i % 90 };
    for (int k = 0; k < 2; k++) {
        lg_model *m = fx_model("tiny-llama", k ? "ref" : "cpu");
        lg_session_params sp;
        lg_session_defaults(&sp);
        sp.n_seq_max = 3;
        sp.n_ctx = 256;
        lg_session *s = fx_session(m, sp);
        lg_generate_params p[RUNS];
        lg_generation out[RUNS];
        for (int i = 0; i < RUNS; i++) {
            lg_generate_defaults(&p[i]);
            p[i].n_max = NEW - i;
            p[i].n_stop_ids = 0;
            p[i].sampler = (lg_sampler_params){ .temp = i % 3 ? 0.6f + 0.2f * (float)i : 0, .top_k = i == 2 ? 40 : 0, .top_p = i == 4 ? 0.8f : 1,
                                                .min_p = i == 5 ? 0.05f : 0, .repeat_penalty = i % 2 ? 1.2f : 1, .seed = (uint64_t)i };
        }
        OK(lg_generate_batch(s, prompts, p, RUNS, out, err));
        for (int i = 0; i < RUNS; i++) {
            got[k][i] = out[i].ids;
            assert_int_equal(out[i].ids.n, NEW - i);
            out[i].ids = (lg_ids){ 0 };
            lg_generation_free(&out[i]);
        }
        OK(lg_generate(s, 0, prompts[1].data, prompts[1].n, &p[1], &out[0], err));
        lg_generation_free(&out[0]);
        OK(lg_session_sync(s, 0, prompts[1].data, prompts[1].n, err)); /* logits that no one drew from */
        p[1].sampler.seed = 77;
        OK(lg_generate(s, 0, prompts[1].data, prompts[1].n, &p[1], &out[0], err));
        got[k][RUNS] = out[0].ids;
        out[0].ids = (lg_ids){ 0 };
        lg_generation_free(&out[0]);
        lg_session_free(s);
        lg_model_free(m);
    }
    for (int i = 0; i <= RUNS; i++) {
        assert_int_equal(got[0][i].n, got[1][i].n);
        assert_memory_equal(got[0][i].data, got[1][i].data, (size_t)got[0][i].n * sizeof(int32_t));
    }
    assert_memory_not_equal(got[0][1].data, got[0][RUNS].data, 10 * sizeof(int32_t)); /* seeds tell */
    for (int i = 0; i <= RUNS; i++)
        for (int k = 0; k < 2; k++) lg_ids_free(&got[k][i]);
    lg_ids_free(&prompt);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_specification), cmocka_unit_test(test_fast), cmocka_unit_test(test_weights), cmocka_unit_test(test_generation) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
