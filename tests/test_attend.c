/* Attention on the CPU against its plain C specification, over cache dtypes, head sizes, group sizes, lengths, threads and
 * instruction sets; selection against a sort of its own and, where scores are exact, set for set.
 * Bounds: f32 kernels 2e-5 absolute on outputs that are averages of values in [-1, 1] (sums of up to 5000 f32 terms),
 * in both compute modes. bf16 kernels against the specification of inputs that are rounded as they round them: what is left is the rounding of
 * softmax weights to 8 bits of significand, at most 2^-9 of an average of absolute values. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <omp.h>
#include "ops/cpu/attend.h"
#include "ops/cpu/attend_kernels.h"
#include "ops/ref/ref.h"

enum { SEQS = 4 };

typedef struct cache {
    lg_kv_geom g;
    lg_kv_layer kv;
    lg_kv_seq seqs[SEQS];
    int32_t *pages[SEQS];
    int32_t n_seq;
} cache;

static float unit(uint64_t stream, uint64_t i) { return (float)(2.0 * lg_base_rng_unit(7, stream, i) - 1.0); }

/* Whole numbers make every product and sum exact, and ties common. */
static void fill(float *x, int64_t n, uint64_t stream, bool whole) {
    for (int64_t i = 0; i < n; i++) x[i] = whole ? (float)lg_base_rng_below(7, stream, (uint64_t)i, 5) - 2.0f : unit(stream, (uint64_t)i);
}

static void cache_new(cache *c, lg_dtype t, int32_t n_kv, int32_t d, const int64_t *len, int32_t n_seq, bool whole) {
    int64_t total = 0, next = 0;
    float *row = lg_base_calloc(2 * d, sizeof *row);
    *c = (cache){ .g = { t, n_kv, d, lg_base_row_bytes(t, d) }, .n_seq = n_seq };
    for (int32_t s = 0; s < n_seq; s++) total += (len[s] + LG_PAGE - 1) / LG_PAGE;
    c->kv.k = lg_base_alloc(total * n_kv * LG_PAGE * c->g.row_bytes);
    c->kv.v = lg_base_alloc(total * n_kv * LG_PAGE * c->g.row_bytes);
    for (int32_t s = 0; s < n_seq; s++) {
        const int64_t n = (len[s] + LG_PAGE - 1) / LG_PAGE;
        c->pages[s] = lg_base_calloc(n, sizeof(int32_t));
        for (int64_t p = 0; p < n; p++) c->pages[s][p] = (int32_t)((next++ * 7919 + 3) % total);
        c->seqs[s] = (lg_kv_seq){ c->pages[s], len[s], NULL };
    }
    /* 7919 is prime: the map above is a shuffle unless total divides by it. */
    assert_true(total % 7919 != 0);
    for (int64_t r = 0; r < total * n_kv * LG_PAGE; r++) {
        fill(row, 2 * d, (uint64_t)r + 100, whole);
        if (whole && t == LG_DTYPE_KV8) row[0] = row[d] = 127.0f;
        lg_ops_kv_store(&c->g, c->kv.k + r * c->g.row_bytes, row);
        lg_ops_kv_store(&c->g, c->kv.v + r * c->g.row_bytes, row + d);
    }
    lg_base_free(row);
}

static void cache_free(cache *c) {
    for (int32_t s = 0; s < c->n_seq; s++) lg_base_free(c->pages[s]);
    lg_base_free(c->kv.k);
    lg_base_free(c->kv.v);
}

static void compare(const float *got, const float *want, int64_t n, double bound, double rms, const char *what) {
    double worst = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const double e = fabs((double)got[i] - (double)want[i]);
        worst = e > worst || e != e ? e : worst;
        sum += e * e;
    }
    if (!(worst <= bound) || !(sqrt(sum / (double)n) <= rms)) fail_msg("%s: worst %g rms %g", what, worst, sqrt(sum / (double)n));
}

static void run_attend(const lg_gemm *g, const lg_op_attend *a, int nth, void *scratch) {
    const int phases = lg_attend_phases(g, a, nth);
#pragma omp parallel num_threads(nth)
    {
        lg_cpu_isa_thread(g->isa);
        for (int p = 0; p < phases; p++) {
            lg_attend_run(g, a, NULL, p, scratch, omp_get_thread_num(), nth);
#pragma omp barrier
        }
    }
}

static void run_hybrid(const lg_gemm *g, const lg_op_attend_hybrid *a, int nth, void *scratch) {
    const int phases = lg_attend_hybrid_phases(g, a, nth);
#pragma omp parallel num_threads(nth)
    {
        lg_cpu_isa_thread(g->isa);
        for (int p = 0; p < phases; p++) {
            lg_attend_hybrid_run(g, a, p, scratch, omp_get_thread_num(), nth);
#pragma omp barrier
        }
    }
}

static int64_t longest(const cache *c) {
    int64_t n = 1;
    for (int32_t s = 0; s < c->n_seq; s++) n = c->seqs[s].len > n ? c->seqs[s].len : n;
    return n;
}

/* Scratch full of NaN patterns with a guard behind it: kernels may neither read what they did not write nor go past. */
typedef struct scratch { uint8_t *p; int64_t n; } scratch;
static scratch scratch_new(const lg_gemm *g, const cache *c, int64_t n_tok, int32_t n_head, int nth) {
    scratch s = { .n = lg_attend_scratch_bytes(g, n_tok, c->n_seq, longest(c), n_head, &c->g, nth) };
    s.p = lg_base_alloc(s.n + 64);
    memset(s.p, 0xff, (size_t)s.n + 64);
    return s;
}
static void scratch_free(scratch *s) {
    for (int i = 0; i < 64; i++) assert_int_equal(s->p[s->n + i], 0xff);
    lg_base_free(s->p);
}

static float rounded(float x) { return lg_base_bf16_to_f32(lg_base_f32_to_bf16(x)); }

/* The same sequences in f32, K and V rounded to bf16. Its pages are c's. */
static void cache_rounded(cache *to, const cache *c) {
    const int32_t d = c->g.head_dim;
    int64_t total = 0;
    *to = *c;
    to->g.dtype = LG_DTYPE_F32;
    to->g.row_bytes = 4 * d;
    for (int32_t s = 0; s < c->n_seq; s++) total += (c->seqs[s].len + LG_PAGE - 1) / LG_PAGE;
    const int64_t rows = total * c->g.n_head_kv * LG_PAGE;
    to->kv.k = lg_base_alloc(rows * to->g.row_bytes);
    to->kv.v = lg_base_alloc(rows * to->g.row_bytes);
    for (int64_t r = 0; r < rows; r++) {
        float *k = (float *)(void *)to->kv.k + r * d, *v = (float *)(void *)to->kv.v + r * d;
        lg_ops_kv_load(&c->g, k, c->kv.k + r * c->g.row_bytes);
        lg_ops_kv_load(&c->g, v, c->kv.v + r * c->g.row_bytes);
        for (int32_t i = 0; i < d; i++) {
            k[i] = rounded(k[i]);
            v[i] = rounded(v[i]);
        }
    }
}

/* ---- op attend: rows[s] last rows of each sequence, in order ---- */
static void check_attend(cache *c, int32_t group, const int64_t *rows, lg_compute compute, lg_isa isa, int nth) {
    const int64_t d = c->g.head_dim, n_head = (int64_t)group * c->g.n_head_kv;
    const lg_gemm g = { compute, isa };
    int64_t n = 0, t = 0;
    for (int32_t s = 0; s < c->n_seq; s++) n += rows[s];
    float *q = lg_base_calloc(n * n_head * d, sizeof *q), *out = lg_base_calloc(n * n_head * d, sizeof *q);
    float *want = lg_base_calloc(n * n_head * d, sizeof *q);
    int32_t *seq = lg_base_calloc(n, sizeof *seq);
    int64_t *idx = lg_base_calloc(n, sizeof *idx);
    fill(q, n * n_head * d, 3, false);
    for (int64_t i = 0; i < n * n_head * d; i++) q[i] *= 2.0f;
    for (int32_t s = 0; s < c->n_seq; s++)
        for (int64_t r = 0; r < rows[s]; r++, t++) {
            seq[t] = s;
            idx[t] = c->seqs[s].len - rows[s] + r;
        }
    lg_op_attend a = { .out = want, .q = q, .kv = c->kv, .geom = c->g, .seqs = c->seqs, .n_seq = c->n_seq, .seq = seq,
                       .idx = idx, .n_tok = n, .n_head = (int32_t)n_head, .scale = 1.0f / sqrtf((float)d) };
    /* Rows of a sequence that has several take pairs of bf16 there, single rows never. */
    const bool pairs = isa >= LG_ISA_BF16 && compute == LG_COMPUTE_AUTO && c->g.dtype != LG_DTYPE_F32 && d % 32 == 0;
    const float scale2 = a.scale * 1.44269504f;
    for (int64_t i = 0; pairs && i < n * n_head * d; i++) q[i] = rounded(q[i] * scale2) / scale2;
    lg_ref_attend(&a);
    if (pairs) {
        cache r;
        float *many = lg_base_calloc(n * n_head * d, sizeof *many);
        cache_rounded(&r, c);
        a.kv = r.kv;
        a.geom = r.g;
        a.out = many;
        lg_ref_attend(&a);
        for (int64_t i = 0; i < n; i++)
            if (rows[seq[i]] > 1) memcpy(want + i * n_head * d, many + i * n_head * d, (size_t)(n_head * d) * sizeof *want);
        a.kv = c->kv;
        a.geom = c->g;
        lg_base_free(many);
        lg_base_free(r.kv.k);
        lg_base_free(r.kv.v);
    }
    a.out = out;
    memset(out, 0xff, (size_t)(n * n_head * d) * sizeof *out);
    scratch s = scratch_new(&g, c, n, (int32_t)n_head, nth);
    lg_base_alloc_guard(true);
    run_attend(&g, &a, nth, s.p);
    lg_base_alloc_guard(false);
    scratch_free(&s);
    char what[160];
    snprintf(what, sizeof what, "attend %s %s d %d g %d n_tok %d len %d nth %d %s", lg_base_dtype(c->g.dtype)->name,
             lg_isa_name(isa), (int)d, (int)group, (int)n, (int)c->seqs[0].len, nth, compute == LG_COMPUTE_AUTO ? "auto" : "f32");
    for (int64_t s0 = 0, at = 0; s0 < c->n_seq; at += rows[s0++] * n_head * d) {
        const bool rough = pairs && rows[s0] > 1;
        compare(out + at, want + at, rows[s0] * n_head * d, rough ? 0x1p-9 + 2e-5 : 2e-5, rough ? 0x1p-11 : 1e-5, what);
    }
    lg_base_free(q);
    lg_base_free(out);
    lg_base_free(want);
    lg_base_free(seq);
    lg_base_free(idx);
}

static const lg_dtype dtypes[] = { LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16, LG_DTYPE_KV8 };
static const int32_t dims[] = { 8, 16, 64, 80, 128 };
static const int32_t groups[] = { 1, 2, 3, 4, 7, 8 };

static void test_decode(void **state) {
    (void)state;
    static const int64_t lens[] = { 1, 2, 63, 64, 65, 127, 1000 };
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < 5; i++)
            for (int l = 0; l < 7; l++) {
                cache c;
                const int64_t one = 1;
                cache_new(&c, dtypes[t], 2, dims[i], &lens[l], 1, false);
                for (lg_isa isa = LG_ISA_SCALAR; isa <= lg_cpu_isa(); isa++)
                    check_attend(&c, groups[(i + l + t) % 6], &one, LG_COMPUTE_AUTO, isa, 1 + (l + t) % 3);
                cache_free(&c);
            }
    for (int i = 0; i < 6; i++) { /* all group sizes at a long length */
        cache c;
        const int64_t one = 1, len = 5000;
        cache_new(&c, dtypes[i % 4], 3, i % 2 ? 64 : 128, &len, 1, false);
        for (lg_isa isa = LG_ISA_SCALAR; isa <= lg_cpu_isa(); isa++) check_attend(&c, groups[i], &one, LG_COMPUTE_F32, isa, 2);
        cache_free(&c);
    }
}

static void test_prefill(void **state) {
    (void)state;
    static const int64_t shapes[][2] = { { 2, 2 }, { 63, 63 }, { 64, 5 }, { 65, 64 }, { 127, 127 }, { 200, 33 }, { 300, 171 } };
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < 5; i++)
            for (int l = 0; l < 7; l++) {
                cache c;
                cache_new(&c, dtypes[t], 2, dims[i], &shapes[l][0], 1, false);
                for (lg_isa isa = LG_ISA_SCALAR; isa <= lg_cpu_isa(); isa++)
                    for (lg_compute m = LG_COMPUTE_AUTO; m <= LG_COMPUTE_F32; m++)
                        if (l < 4 || isa == lg_cpu_isa()) check_attend(&c, groups[(i + l) % 6], &shapes[l][1], m, isa, 1 + (l + t) % 3);
                cache_free(&c);
            }
}

/* Chunk rows and single rows together; and each sequence alone gives the same bits. */
static void test_ragged(void **state) {
    (void)state;
    static const int64_t lens[SEQS] = { 130, 1000, 64, 321 }, rows[SEQS] = { 1, 40, 1, 2 };
    cache c;
    cache_new(&c, LG_DTYPE_F16, 3, 64, lens, SEQS, false);
    for (lg_isa isa = LG_ISA_SCALAR; isa <= lg_cpu_isa(); isa++)
        for (int nth = 1; nth <= 3; nth++) check_attend(&c, 3, rows, LG_COMPUTE_AUTO, isa, nth);
    cache_free(&c);
}

static void test_alone_or_together(void **state) {
    (void)state;
    static const int64_t lens[SEQS] = { 130, 1000, 64, 321 };
    const int64_t d = 64, nh = 9;
    const lg_gemm g = { LG_COMPUTE_AUTO, lg_cpu_isa() };
    cache c;
    cache_new(&c, LG_DTYPE_F16, 3, 64, lens, SEQS, false);
    float q[SEQS * 9 * 64], all[SEQS * 9 * 64], one[9 * 64];
    int32_t seq[SEQS] = { 0, 1, 2, 3 };
    int64_t idx[SEQS];
    fill(q, SEQS * nh * d, 5, false);
    for (int s = 0; s < SEQS; s++) idx[s] = lens[s] - 1;
    lg_op_attend a = { .out = all, .q = q, .kv = c.kv, .geom = c.g, .seqs = c.seqs, .n_seq = SEQS, .seq = seq, .idx = idx,
                       .n_tok = SEQS, .n_head = 9, .scale = 0.125f };
    scratch sc = scratch_new(&g, &c, SEQS, 9, 2);
    run_attend(&g, &a, 2, sc.p);
    for (int s = 0; s < SEQS; s++) {
        a.out = one;
        a.q = q + s * nh * d;
        a.seq = seq + s;
        a.idx = idx + s;
        a.n_tok = 1;
        run_attend(&g, &a, 1, sc.p);
        assert_memory_equal(one, all + s * nh * d, sizeof one);
    }
    scratch_free(&sc);
    cache_free(&c);
}

/* ---- op attend_hybrid ---- */
/* Two ops in a row: the first makes sets in heads 0 and 2, the second reads them, has a window head and makes new ones. */
static void check_hybrid(lg_dtype t, int32_t d, int32_t group, const int64_t *lens, int32_t n_seq, lg_select sel, int64_t budget,
                         int32_t block, lg_isa isa, int nth) {
    enum { KV = 4, SLOTS = 3 };
    static const int32_t read[2][KV] = { { -1, -2, -1, -1 }, { 0, -1, 1, -2 } }, make[2][KV] = { { 0, -1, 1, -1 }, { -1, 2, -1, -1 } };
    const lg_gemm g = { LG_COMPUTE_AUTO, isa };
    cache c;
    cache_new(&c, t, KV, d, lens, n_seq, true);
    const int64_t nh = (int64_t)KV * group, n = n_seq * nh * d, cap = longest(&c);
    float *q = lg_base_calloc(n, sizeof *q), *out = lg_base_calloc(n, sizeof *out), *want = lg_base_calloc(n, sizeof *out);
    int32_t *idx[2], count[2][SEQS * SLOTS] = { 0 };
    for (int i = 0; i < 2; i++) idx[i] = lg_base_calloc(n_seq * SLOTS * cap, sizeof(int32_t));
    int64_t budgets[SEQS];
    uint8_t dense[SEQS];
    for (int32_t s = 0; s < n_seq; s++) {
        budgets[s] = budget + 8 * s;
        dense[s] = s == 1;
    }
    scratch sc = scratch_new(&g, &c, n_seq, (int32_t)nh, nth);
    for (int layer = 0; layer < 2; layer++) {
        fill(q, n, 40 + (uint64_t)layer, true);
        /* Sums over the group that divide: mean scores stay whole. */
        for (int64_t i = 0; i < n; i++) q[i] *= (float)group;
        lg_op_attend_hybrid a = { .q = q, .kv = c.kv, .geom = c.g, .seqs = c.seqs, .n_seq = n_seq, .budget = budgets,
                                  .dense = dense, .read = read[layer], .make = make[layer], .select = sel,
                                  .n_head = (int32_t)nh, .scale = 0.25f / (float)(group * 8) };
        a.out = want;
        a.sets = (lg_sets){ idx[0], count[0], cap, SLOTS, block, 0 };
        lg_ref_attend_hybrid(&a);
        a.out = out;
        a.sets = (lg_sets){ idx[1], count[1], cap, SLOTS, block, 0 };
        memset(out, 0xff, (size_t)n * sizeof *out);
        lg_base_alloc_guard(true);
        run_hybrid(&g, &a, nth, sc.p);
        lg_base_alloc_guard(false);
        char what[160];
        snprintf(what, sizeof what, "hybrid %s %s d %d g %d rule %d block %d budget %d nth %d layer %d", lg_base_dtype(t)->name,
                 lg_isa_name(isa), (int)d, (int)group, (int)sel.rule, (int)block, (int)budget, nth, layer);
        compare(out, want, n, t == LG_DTYPE_KV8 ? 2e-3 : 4e-5, 1e-3, what);
        for (int32_t s = 0; s < n_seq * SLOTS; s++) {
            if (count[0][s] != count[1][s] || memcmp(idx[0] + s * cap, idx[1] + s * cap, (size_t)count[0][s] * sizeof(int32_t)) != 0)
                fail_msg("%s: set %d differs (%d, %d)", what, (int)s, (int)count[0][s], (int)count[1][s]);
        }
        assert_true(count[0][0] > 0);
    }
    scratch_free(&sc);
    for (int i = 0; i < 2; i++) lg_base_free(idx[i]);
    lg_base_free(q);
    lg_base_free(out);
    lg_base_free(want);
    cache_free(&c);
}

static void test_hybrid(void **state) {
    (void)state;
    static const int64_t lens[SEQS] = { 1000, 300, 385, 1 };
    static const lg_dtype exact[] = { LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16 };
    static const int32_t blocks[] = { 1, 16, 32, 64 };
    int n = 0;
    for (int b = 0; b < 4; b++)
        for (int i = 0; i < 5; i++) {
            for (lg_isa isa = LG_ISA_SCALAR; isa <= lg_cpu_isa(); isa++, n++)
                check_hybrid(exact[n % 3], dims[i], groups[n % 6], lens, SEQS, (lg_select){ LG_RULE_TOPK, 0, 0, 16, 64, NULL }, 200, blocks[b],
                             isa, 1 + n % 3);
        }
    for (int64_t budget = 80; budget <= 1001; budget += 307)
        check_hybrid(LG_DTYPE_F16, 64, 3, lens, SEQS, (lg_select){ LG_RULE_RATIO, 0, 0, 16, 64, NULL }, budget, 1, lg_cpu_isa(), 2);
    check_hybrid(LG_DTYPE_F16, 64, 3, lens, SEQS, (lg_select){ LG_RULE_TOPK, 0, 0, 0, 0, NULL }, 100, 1, lg_cpu_isa(), 2);
    for (int b = 0; b < 4; b++) {
        check_hybrid(LG_DTYPE_F16, 64, 3, lens, SEQS, (lg_select){ LG_RULE_TOPP, 0.5, 0.02f, 16, 64, NULL }, 200, blocks[b], lg_cpu_isa(), 2);
        check_hybrid(LG_DTYPE_F16, 64, 3, lens, SEQS, (lg_select){ LG_RULE_THRESHOLD, 0.002, 0.02f, 16, 64, NULL }, 200, blocks[b], lg_cpu_isa(), 2);
        check_hybrid(LG_DTYPE_F16, 64, 3, lens, SEQS, (lg_select){ LG_RULE_THRESHOLD, 0.9999999, 1e-3f, 16, 64, NULL }, 200, blocks[b], lg_cpu_isa(), 2);
    }
}

/* KV8 scores are not exact, so the sets may differ at the cut: outputs of dense and window heads only. */
static void test_hybrid_kv8(void **state) {
    (void)state;
    static const int64_t len = 500;
    check_hybrid(LG_DTYPE_KV8, 64, 3, &len, 1, (lg_select){ LG_RULE_TOPK, 0, 0, 16, 64, NULL }, 512, 1, lg_cpu_isa(), 2);
    check_hybrid(LG_DTYPE_KV8, 128, 4, &len, 1, (lg_select){ LG_RULE_TOPK, 0, 0, 16, 64, NULL }, 640, 16, lg_cpu_isa(), 2);
}

/* ---- lg_ops_select against sorting ---- */
static const float *sort_score;
static int by_score(const void *x, const void *y) {
    const int32_t a = *(const int32_t *)x, b = *(const int32_t *)y;
    if (sort_score[a] != sort_score[b]) return sort_score[a] > sort_score[b] ? -1 : 1;
    return a < b ? -1 : 1;
}

static void test_select_topk(void **state) {
    (void)state;
    enum { N = 33003 };
    static const int64_t lens[] = { 1, 2, 127, 128, 383, 384, 385, 399, 400, 401, 1000, 8192, 16383, N };
    static float score[N], f[N];
    static int32_t out[N], fast[N], tmp[N], order[N], chosen[N];
    static uint32_t work[N];
    for (int l = 0; l < 14; l++)
        for (int kind = 0; kind < 6; kind++) { /* 4: few rows of a sample stand for all; 5: most of the best lie between those of a sample */
            const int64_t n = lens[l], budget = 400, sinks = 128, recents = 256;
            for (int64_t i = 0; i < n; i++) {
                const float u = unit(9, (uint64_t)i);
                score[i] = kind == 0 ? u * 30.0f : kind == 1 ? roundf(u * 3.0f) : kind == 2 ? (i % 3 ? -0.0f : 0.0f) : kind == 3 ? -1e30f * u * u : kind == 4 ? (i % 16 ? u : 2.0f + u) : (i % 16 ? 2.0f + u : u);
                order[i] = (int32_t)i;
            }
            sort_score = score;
            qsort(order, (size_t)n, sizeof *order, by_score);
            memset(chosen, 0, sizeof chosen);
            int64_t have = 0;
            for (int64_t i = 0; i < n; i++) have += chosen[i] = i < sinks || i >= n - recents;
            for (int64_t i = 0; i < n && have < budget; i++)
                if (!chosen[order[i]]) have += chosen[order[i]] = 1;
            const lg_select s = { .rule = LG_RULE_TOPK, .sinks = sinks, .recents = recents };
            const int64_t m = lg_ops_select(out, N, score, n, budget, 1, &s, f, tmp);
            assert_int_equal(m, have);
            for (int64_t i = 0, w = 0; i < n; i++)
                if (chosen[i]) assert_int_equal(out[w++], i);
            /* The kernels alone, nothing forced, several k. */
            const lg_select bare = { .rule = LG_RULE_TOPK };
            for (int64_t k = 0; k <= n; k += 1 + n / (k < n / 10 ? 40 : 9)) {
                assert_int_equal(lg_ops_select(out, N, score, n, k, 1, &bare, f, tmp), k);
                lg_attend_topk_scalar(fast, score, n, k, 0, work);
                assert_memory_equal(fast, out, (size_t)k * sizeof *out);
                if (lg_cpu_isa() < LG_ISA_AVX2) continue;
                memset(fast, 0xff, sizeof fast);
                lg_attend_topk_avx2(fast, score, n, k, 0, work);
                assert_memory_equal(fast, out, (size_t)k * sizeof *out);
                if (lg_cpu_isa() < LG_ISA_AVX512) continue;
                memset(fast, 0xff, sizeof fast);
                lg_attend_topk_avx512(fast, score, n, k, 0, work);
                assert_memory_equal(fast, out, (size_t)k * sizeof *out);
            }
        }
}

static void test_select_rules(void **state) {
    (void)state;
    /* p = softmax(ln 1, ln 4, ln 2, ln 1, ln 2) = 0.1 0.4 0.2 0.1 0.2 */
    const float score[5] = { 0.0f, 1.38629436f, 0.693147181f, 0.0f, 0.693147181f };
    float f[5];
    int32_t out[5], tmp[5];
    lg_select s = { .rule = LG_RULE_THRESHOLD, .value = 0.15, .scale = 1.0f, .sinks = 1, .recents = 1 };
    assert_int_equal(lg_ops_select(out, 5, score, 5, 0, 1, &s, f, tmp), 3);
    assert_true(out[0] == 1 && out[1] == 2 && out[2] == 4);
    s.value = 0.5; /* empty: the current token */
    assert_int_equal(lg_ops_select(out, 5, score, 5, 0, 1, &s, f, tmp), 1);
    assert_int_equal(out[0], 4);
    assert_int_equal(lg_ops_select(out, 5, score, 5, 0, 2, &s, f, tmp), 1);
    assert_int_equal(out[0], 2); /* the partial last block */
    s = (lg_select){ .rule = LG_RULE_TOPP, .value = 0.0, .scale = 1.0f };
    assert_int_equal(lg_ops_select(out, 5, score, 5, 0, 1, &s, f, tmp), 1);
    assert_int_equal(out[0], 1);
    s.value = 0.5; /* before: 0, 0.4, 0.6 */
    assert_int_equal(lg_ops_select(out, 5, score, 5, 0, 1, &s, f, tmp), 2);
    assert_true(out[0] == 1 && out[1] == 2);
    s.value = 1.0;
    assert_int_equal(lg_ops_select(out, 5, score, 5, 0, 1, &s, f, tmp), 5);
    s.value = 0.55; /* blocks of 2: {0,1} 0.5 first, then {2,3} by position before {4} */
    assert_int_equal(lg_ops_select(out, 5, score, 5, 0, 2, &s, f, tmp), 2);
    assert_true(out[0] == 0 && out[1] == 1);
    /* Block budget: floor(5 / 2) = 2 blocks, the forced ones included. */
    s = (lg_select){ .rule = LG_RULE_TOPK, .sinks = 1, .recents = 0 };
    const float b[6] = { 0, 0, 1, 2, 3, -1 };
    float f6[6];
    int32_t t6[6], o6[6];
    assert_int_equal(lg_ops_select(o6, 6, b, 6, 5, 2, &s, f6, t6), 2);
    assert_true(o6[0] == 0 && o6[1] == 2);
}

/* A model file may say any even head size: vectors would run over the ends of heads. */
static void test_head_size(void **state) {
    (void)state;
    lg_ops_ctx *c;
    lg_error e = { 0 };
    assert_int_equal(lg_ops_cpu.open(&c, &(lg_ops_config){ .n_threads = 1 }, &e), LG_OK);
    for (int32_t d = 2; d <= 256; d += 2) {
        const lg_kv_geom g = { .n_head_kv = 2, .head_dim = d, .dtype = LG_DTYPE_F32, .row_bytes = 4 * d };
        const lg_status st = lg_ops_cpu.reserve(c, 4, 1, 100, 4, &g, 4 * d, 4 * d, &e);
        assert_int_equal(st, d % 8 ? LG_ERR_UNSUPPORTED : LG_OK);
        char size[32];
        snprintf(size, sizeof size, "head size %d:", (int)d);
        if (st != LG_OK) assert_non_null(strstr(e.message, size));
    }
    lg_ops_cpu.close(c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_select_topk), cmocka_unit_test(test_select_rules), cmocka_unit_test(test_decode),
        cmocka_unit_test(test_prefill), cmocka_unit_test(test_ragged), cmocka_unit_test(test_alone_or_together),
        cmocka_unit_test(test_hybrid), cmocka_unit_test(test_hybrid_kv8), cmocka_unit_test(test_head_size),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
