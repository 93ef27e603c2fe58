/* Weight products against lg_base_dequant and double sums: every dtype, instruction set, compute mode and thread count.
 * Bounds, per output, with a = sum |x||w| over the row and s = (largest |x| of a block of 32) / 127:
 *   f32 arithmetic   1e-5 a            (f32 sums of at most 2048 terms)
 *   int8 activations sum over blocks of (s / 2) sum |w|, the rounding of x, + 1e-5 a
 *   bf16 tiles       x and w each rounded to 8 significant bits, 2^-8 at most: (2^-7 + 2^-16) a, or 2^-8 a where w is
 *                    bf16 already, + 1e-5 a */
#include <setjmp.h>
#include <stddef.h>
#include <stdarg.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "ops/cpu/gemm_form.h"

static const lg_dtype dtypes[] = { LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16, LG_DTYPE_Q8_0, LG_DTYPE_Q4_0, LG_DTYPE_Q4_1,
                                   LG_DTYPE_Q5_0, LG_DTYPE_Q5_1, LG_DTYPE_Q4_K, LG_DTYPE_Q5_K, LG_DTYPE_Q6_K };
enum { N_DTYPE = sizeof dtypes / sizeof *dtypes };
static uint64_t counter;

static float uniform(float low, float high) {
    return low + (high - low) * (float)lg_base_rng_unit(7, 1, counter++);
}
static void put16(uint8_t *at, uint16_t v) { memcpy(at, &v, 2); }

/* Random weights in the file's form: all code and scale bits random, only the f16 factors kept moderate. */
static uint8_t *make_weights(lg_dtype t, int64_t n_out, int64_t n_in) {
    const int64_t bytes = n_out * lg_base_row_bytes(t, n_in);
    const lg_dtype_info *info = lg_base_dtype(t);
    uint8_t *d = lg_base_alloc(bytes);
    assert_non_null(d);
    for (int64_t i = 0; i < bytes; i++) d[i] = (uint8_t)lg_base_rng(7, 2, counter++);
    for (int64_t at = 0; at < bytes; at += info->bytes) {
        const float v = uniform(-0.1f, 0.1f);
        switch (t) {
        case LG_DTYPE_F32: memcpy(d + at, &v, 4); break;
        case LG_DTYPE_F16: put16(d + at, lg_base_f32_to_f16(v)); break;
        case LG_DTYPE_BF16: put16(d + at, lg_base_f32_to_bf16(v)); break;
        case LG_DTYPE_Q6_K: put16(d + at + 208, lg_base_f32_to_f16(v * 0.01f)); break;
        case LG_DTYPE_Q4_1: case LG_DTYPE_Q5_1: case LG_DTYPE_Q4_K: case LG_DTYPE_Q5_K:
            put16(d + at + 2, lg_base_f32_to_f16(uniform(-0.1f, 0.1f)));
            put16(d + at, lg_base_f32_to_f16(v));
            break;
        default: put16(d + at, lg_base_f32_to_f16(v)); break;
        }
    }
    return d;
}

typedef struct fixture {
    lg_weight w;
    float *dense, *x, *norm; /* [n_out, n_in], [n_tok, n_in], [n_in] */
    int64_t n_tok, ldx;
    double *want, *sum, *step; /* [n_tok, n_out]: product, sum |x||w|, sum over blocks (s/2) sum |w| */
} fixture;
static const float eps = 1e-5f;

static void make(fixture *f, lg_dtype t, int64_t n_out, int64_t n_in, int64_t n_tok, bool with_norm) {
    memset(f, 0, sizeof *f);
    uint8_t *data = make_weights(t, n_out, n_in);
    f->w = (lg_weight){ .dtype = t, .n_out = n_out, .n_in = n_in, .data = data };
    f->n_tok = n_tok;
    f->ldx = n_in + 3;
    f->dense = lg_base_calloc(n_out * n_in, 4);
    for (int64_t o = 0; o < n_out; o++) lg_base_dequant(t, data + o * lg_base_row_bytes(t, n_in), f->dense + o * n_in, n_in);
    f->x = lg_base_calloc(n_tok * f->ldx, 4);
    for (int64_t i = 0; i < n_tok * f->ldx; i++) f->x[i] = uniform(-1, 1) * (i % 37 ? 1.0f : 8.0f);
    for (int64_t i = 0; i < 32 && n_tok > 2; i++) f->x[2 * f->ldx + i] = 0; /* a block of zeros */
    if (with_norm) {
        f->norm = lg_base_calloc(n_in, 4);
        for (int64_t i = 0; i < n_in; i++) f->norm[i] = uniform(0.5f, 2);
    }
    f->want = lg_base_calloc(n_tok * n_out, 8);
    f->sum = lg_base_calloc(n_tok * n_out, 8);
    f->step = lg_base_calloc(n_tok * n_out, 8);
    double *row = lg_base_calloc(n_in, 8);
    assert_true(f->dense && f->x && f->want && f->sum && f->step && row);
    for (int64_t tok = 0; tok < n_tok; tok++) {
        double scale = 0;
        for (int64_t i = 0; i < n_in; i++) row[i] = (double)f->x[tok * f->ldx + i], scale += row[i] * row[i];
        scale = 1 / sqrt(scale / (double)n_in + (double)eps);
        for (int64_t i = 0; i < n_in && with_norm; i++) row[i] *= scale * (double)f->norm[i];
        for (int64_t o = 0; o < n_out; o++)
            for (int64_t b = 0; b < n_in; b += 32) {
                double top = 0, mass = 0, want = 0, sum = 0;
                for (int64_t i = b; i < n_in && i < b + 32; i++) {
                    const double w = (double)f->dense[o * n_in + i];
                    want += row[i] * w, sum += fabs(row[i] * w), mass += fabs(w), top = fmax(top, fabs(row[i]));
                }
                const int64_t at = tok * n_out + o;
                f->want[at] += want, f->sum[at] += sum, f->step[at] += top / 254 * mass;
            }
    }
    lg_base_free(row);
}

static void drop(fixture *f) {
    lg_gemm_unpack(&f->w);
    assert_null(f->w.packed);
    lg_base_free((void *)(uintptr_t)f->w.data);
    lg_base_free(f->dense), lg_base_free(f->x), lg_base_free(f->norm);
    lg_base_free(f->want), lg_base_free(f->sum), lg_base_free(f->step);
}

/* Runs the first n_tok rows as nth threads do, one after the other; the frame around y must survive. */
static void product(const lg_gemm *g, const fixture *f, float *y, int64_t ldy, bool add, int64_t n_tok, int nth) {
    const int64_t n_in = f->w.n_in;
    void *in = lg_base_alloc(lg_gemm_input_bytes(g, n_tok, n_in));
    void *scratch = lg_base_alloc(lg_gemm_scratch_bytes(g, n_tok, n_in));
    assert_true(in && scratch);
    for (int i = 0; i < nth; i++) lg_gemm_input(g, in, f->x, f->ldx, f->norm, eps, n_tok, n_in, i, nth);
    for (int i = nth - 1; i >= 0; i--) lg_gemm_run(g, y, ldy, add, in, &f->w, n_tok, scratch, i, nth);
    lg_base_free(in), lg_base_free(scratch);
}

static void check(const lg_gemm *g, const fixture *f, int64_t n_tok, int nth, bool add) {
    const int64_t n_out = f->w.n_out, ldy = n_out + 5, n = n_tok * ldy;
    const bool quantised = lg_base_dtype(f->w.dtype)->block > 1;
    const lg_gemm_form form = lg_gemm_form_of(g, n_tok);
    float *y = lg_base_calloc(n, 4);
    assert_non_null(y);
    for (int64_t i = 0; i < n; i++) y[i] = add && i % ldy < n_out ? (float)(i % 11) : 12345.0f;
    product(g, f, y, ldy, add, n_tok, nth);
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t t = i / ldy, o = i % ldy, at = t * n_out + o;
        if (o >= n_out) {
            if (y[i] != 12345.0f) fail_msg("wrote outside: row %lld column %lld", (long long)t, (long long)o);
            continue;
        }
        const double start = add ? (double)(float)(i % 11) : 0;
        double bound = 1e-5 * f->sum[at] + 1e-6 * start + 1e-30;
        if (form == LG_FORM_Q8 && quantised) bound += 1.00001 * f->step[at];
        if (form == LG_FORM_BF16) bound += (f->w.dtype == LG_DTYPE_BF16 ? 0x1p-8 : 0x1p-7 + 0x1p-16) * f->sum[at];
        const double off = fabs((double)y[i] - start - f->want[at]) / bound;
        worst = off > worst ? off : worst;
        if (!(off <= 1))
            fail_msg("%s %s %s n_out %lld n_in %lld n_tok %lld nth %d: [%lld,%lld] is %g, want %g, %g of the bound",
                     lg_base_dtype(f->w.dtype)->name, lg_isa_name(g->isa), g->compute == LG_COMPUTE_F32 ? "f32" : "auto",
                     (long long)n_out, (long long)f->w.n_in, (long long)n_tok, nth, (long long)t, (long long)o,
                     (double)y[i], start + f->want[at], off);
    }
    lg_base_free(y);
}

static void sweep(int64_t n_out, int64_t n_in, const int64_t *toks, int n_toks) {
    static const int nths[] = { 1, 2, 3 };
    for (int d = 0; d < N_DTYPE; d++) {
        if (n_in % lg_base_dtype(dtypes[d])->block) continue;
        fixture f;
        lg_error err;
        make(&f, dtypes[d], n_out, n_in, toks[n_toks - 1], (n_out + d) % 2);
        for (int isa = 0; isa <= (int)lg_cpu_isa(); isa++)
            for (int c = 0; c < 2; c++) {
                const lg_gemm g = { c ? LG_COMPUTE_F32 : LG_COMPUTE_AUTO, (lg_isa)isa };
                assert_int_equal(lg_gemm_pack(&g, &f.w, &err), LG_OK);
                for (int k = 0; k < n_toks; k++) check(&g, &f, toks[k], nths[(k + d) % 3], (k + isa) % 2);
                lg_gemm_unpack(&f.w);
            }
        drop(&f);
    }
}

static void test_small(void **state) {
    (void)state;
    static const int64_t toks[] = { 1, 2, 3, 5, 8, 15, 16, 17, 33, 64 }, outs[] = { 1, 3, 17, 100 }, ins[] = { 32, 64, 256, 33, 97, 512 };
    for (int o = 0; o < 4; o++)
        for (int i = 0; i < 6; i++) sweep(outs[o], ins[i], toks, 10);
}
static void test_large(void **state) {
    (void)state;
    static const int64_t few[] = { 1, 2, 5, 16, 17 }, many[] = { 100, 512 };
    sweep(576, 576, few, 5);
    sweep(100, 2048, few, 5);
    sweep(3, 1536, few, 5);
    sweep(100, 256, many, 2);
    sweep(33, 1536, many, 1);
}

/* Rows of a decode batch equal rows run alone, bit for bit, whatever the threads. */
static void test_batch_equals_single(void **state) {
    (void)state;
    for (int d = 0; d < N_DTYPE; d++) {
        fixture f;
        lg_error err;
        make(&f, dtypes[d], 70, 512, 16, true);
        for (int isa = 0; isa <= (int)lg_cpu_isa(); isa++)
            for (int c = 0; c < 2; c++) {
                const lg_gemm g = { c ? LG_COMPUTE_F32 : LG_COMPUTE_AUTO, (lg_isa)isa };
                float whole[16 * 70], one[16 * 70];
                assert_int_equal(lg_gemm_pack(&g, &f.w, &err), LG_OK);
                for (int n = 2; n <= 16; n++) {
                    product(&g, &f, whole, 70, false, n, 1 + n % 3);
                    fixture row = f;
                    for (int t = 0; t < n; t++, row.x += f.ldx) product(&g, &row, one + t * 70, 70, false, 1, 1 + t % 2);
                    assert_memory_equal(whole, one, (size_t)n * 70 * 4);
                }
                lg_gemm_unpack(&f.w);
            }
        drop(&f);
    }
}

static void test_embed(void **state) {
    (void)state;
    for (int d = 0; d < N_DTYPE; d++) {
        fixture f;
        lg_error err;
        const lg_gemm g = { LG_COMPUTE_AUTO, lg_cpu_isa() };
        float row[512];
        make(&f, dtypes[d], 37, 512, 1, false);
        for (int packed = 0; packed < 2; packed++) {
            if (packed) assert_int_equal(lg_gemm_pack(&g, &f.w, &err), LG_OK);
            for (int64_t o = 0; o < 37; o++) {
                lg_gemm_embed_row(row, &f.w, o);
                assert_memory_equal(row, f.dense + o * 512, sizeof row);
            }
        }
        drop(&f);
    }
}

static void test_rows(void **state) {
    (void)state;
    for (int64_t n = 1; n < 200; n += 3)
        for (int nth = 1; nth < 6; nth++) {
            int64_t next = 0, first, last;
            for (int i = 0; i < nth; i++, next = last) {
                lg_gemm_rows(n, i, nth, &first, &last);
                assert_true(first == next && last >= first);
            }
            assert_int_equal(next, n);
        }
}

static void test_silu(void **state) {
    (void)state;
    enum { N = 4001 };
    static float gate[N], up[N], h[N];
    for (int i = 0; i < N; i++) gate[i] = (float)(i - N / 2) * 0.05f, up[i] = uniform(-2, 2);
    for (int isa = 0; isa <= (int)lg_cpu_isa(); isa++) {
        const lg_gemm g = { LG_COMPUTE_F32, (lg_isa)isa };
        memcpy(h, gate, sizeof h);
        lg_gemm_silu_mul(&g, h, h, up, N);
        for (int i = 0; i < N; i++) {
            const double x = (double)gate[i], want = x / (1 + exp(-x)) * (double)up[i];
            /* the exponent is rounded once at |x| log2 e, then a polynomial of 3e-7 */
            const double bound = fabs(want) * (6e-7 + 1.2e-7 * fabs(x)) + 1e-35;
            if (!(fabs((double)h[i] - want) <= bound)) fail_msg("%s: silu(%g) * %g is %g, want %g", lg_isa_name(g.isa), x, (double)up[i], (double)h[i], want);
        }
    }
}

static void test_refusals(void **state) {
    (void)state;
    const lg_gemm g = { LG_COMPUTE_AUTO, lg_cpu_isa() };
    lg_error err;
    uint8_t data[64] = { 0 };
    lg_weight w = { .dtype = LG_DTYPE_Q4_0, .n_out = 1, .n_in = 33, .data = data };
    assert_int_equal(lg_gemm_pack(&g, &w, &err), LG_ERR_FORMAT);
    w = (lg_weight){ .dtype = LG_DTYPE_I32, .n_out = 1, .n_in = 4, .data = data };
    assert_int_equal(lg_gemm_pack(&g, &w, &err), LG_ERR_UNSUPPORTED);
    w = (lg_weight){ .dtype = LG_DTYPE_F32, .n_out = INT64_MAX / 64, .n_in = INT64_MAX / 64, .data = data };
    assert_int_equal(lg_gemm_pack(&g, &w, &err), LG_ERR_NOMEM);
    w = (lg_weight){ .dtype = LG_DTYPE_F32, .n_out = 1, .n_in = 4, .data = data };
    lg_base_alloc_fail_at(1);
    assert_int_equal(lg_gemm_pack(&g, &w, &err), LG_ERR_NOMEM);
    lg_base_alloc_fail_at(0);
    assert_null(w.packed);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows), cmocka_unit_test(test_refusals), cmocka_unit_test(test_silu), cmocka_unit_test(test_embed),
        cmocka_unit_test(test_batch_equals_single), cmocka_unit_test(test_small), cmocka_unit_test(test_large),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
