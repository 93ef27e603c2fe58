/* Weight products of SmolLM2-135M's shapes: decode (bytes over bandwidth), batches, prefill (operations), the input and
 * SiLU passes, and the libraries (which want an idle machine). usage: gemm_bench decode|prefill [threads] [dtype] (F32=1: compute f32), or
 * gemm_bench lib [threads] [rows]; best of many short repeats. */
#ifdef LG_DNNL /* make DNNL=1: only to measure it beside OpenBLAS; the engine does not need it */
#include <dnnl.h>
#endif
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ops/cpu/gemm_form.h"

extern void openblas_set_num_threads(int n);
extern void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                        int ldb, float beta, float *c, int ldc);

enum { LAYERS = 30, SHAPES = 7, PARTS = 16 }; /* the output matrix in parts, to time short pieces */
static const int64_t shape[SHAPES][2] = { { 576, 576 }, { 192, 576 }, { 192, 576 }, { 576, 576 }, { 1536, 576 }, { 1536, 576 }, { 576, 1536 } };
static lg_weight layer[LAYERS][SHAPES], head[PARTS];
static int64_t total_bytes;

static void make(lg_weight *w, const lg_gemm *g, lg_dtype t, int64_t n_out, int64_t n_in) {
    const int64_t bytes = n_out * lg_base_row_bytes(t, n_in);
    uint8_t *d = lg_base_alloc(bytes);
    const lg_dtype_info *info = lg_base_dtype(t);
    for (int64_t i = 0; i < bytes; i++) d[i] = (uint8_t)(i * 31 + i / 97);
    const uint16_t one = t == LG_DTYPE_BF16 ? lg_base_f32_to_bf16(0.01f) : lg_base_f32_to_f16(0.01f);
    const float fone = 0.01f;
    for (int64_t i = 0; i < bytes; i += info->bytes) {
        if (t == LG_DTYPE_F32) memcpy(d + i, &fone, 4);
        else memcpy(d + i + (t == LG_DTYPE_Q6_K ? 208 : 0), &one, 2);
        if (info->block > 1 && t != LG_DTYPE_Q6_K && t != LG_DTYPE_Q8_0 && t != LG_DTYPE_Q4_0) memcpy(d + i + 2, &one, 2);
    }
    *w = (lg_weight){ .dtype = t, .n_out = n_out, .n_in = n_in, .data = d };
    lg_error err;
    if (lg_gemm_pack(g, w, &err)) { fprintf(stderr, "%s\n", err.message); exit(1); }
    lg_base_free(d);
    total_bytes += w->packed_bytes;
}

/* Other work shares the cores, so whole passes are cut up by the scheduler. Every thread times each product (at most a
 * few ms) for itself and keeps the best of all repeats; a pass is the sum over products of the slower thread's best.
 * Between two repeats of a product all others are read, so that its weights come from beyond L2 each time. */
enum { MAX_THREADS = 8, N_UNIT = LAYERS * SHAPES + PARTS };
static double least[MAX_THREADS][N_UNIT];

static double pass(const lg_gemm *g, int64_t n_tok, int nth, bool with_head, float *y, void *in, uint8_t *scratch, int64_t sb) {
    const int n_unit = LAYERS * SHAPES + (with_head ? PARTS : 0);
#pragma omp parallel num_threads(nth)
    {
        const int i = omp_get_thread_num();
        lg_cpu_isa_thread(g->isa);
        for (int u = 0; u < n_unit; u++) {
            const lg_weight *w = u < LAYERS * SHAPES ? &layer[u / SHAPES][u % SHAPES] : &head[u - LAYERS * SHAPES];
            const double t0 = lg_base_now();
            lg_gemm_run(g, y, w->n_out, false, in, w, n_tok, scratch + i * sb, i, nth);
            const double t = lg_base_now() - t0;
            if (t < least[i][u]) least[i][u] = t;
        }
    }
    double sum = 0;
    for (int u = 0; u < n_unit; u++) {
        double worst = 0;
        for (int i = 0; i < nth; i++) worst = least[i][u] > worst ? least[i][u] : worst;
        sum += worst;
    }
    return sum;
}

#ifdef LG_DNNL
typedef struct peer { dnnl_engine_t eng; dnnl_stream_t st; const char *impl; } peer;

/* oneDNN: bf16 x bf16 -> f32, weights reordered once to what it likes best. Seconds, or -1. */
static double peer_product(peer *p, int m, int n, int k, void *a, void *b, void *c) {
    const dnnl_dims_t da = { m, k }, db = { k, n }, dc = { m, n };
    dnnl_memory_desc_t ma, mb, mc, want;
    dnnl_memory_desc_init_by_tag(&ma, 2, da, dnnl_bf16, dnnl_ab);
    dnnl_memory_desc_init_by_tag(&mb, 2, db, dnnl_bf16, dnnl_format_tag_any);
    dnnl_memory_desc_init_by_tag(&mc, 2, dc, dnnl_f32, dnnl_ab);
    dnnl_matmul_desc_t desc;
    dnnl_primitive_desc_t pd;
    dnnl_primitive_t prim;
    dnnl_matmul_desc_init(&desc, &ma, &mb, NULL, &mc);
    if (dnnl_primitive_desc_create(&pd, &desc, NULL, p->eng, NULL) != dnnl_success) return -1;
    want = *dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
    dnnl_primitive_create(&prim, pd);
    dnnl_memory_t xa, xb, xc;
    dnnl_memory_create(&xa, &ma, p->eng, a);
    dnnl_memory_create(&xb, &want, p->eng, b);
    dnnl_memory_create(&xc, &mc, p->eng, c);
    const dnnl_exec_arg_t args[3] = { { DNNL_ARG_SRC, xa }, { DNNL_ARG_WEIGHTS, xb }, { DNNL_ARG_DST, xc } };
    dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, (void *)&p->impl);
    double best = 1e9;
    for (int r = 0; r < 200; r++) {
        const double t0 = lg_base_now();
        dnnl_primitive_execute(prim, p->st, 3, args);
        dnnl_stream_wait(p->st);
        const double t = lg_base_now() - t0;
        best = t < best ? t : best;
    }
    return best;
}
#endif

/* A library's f32 products of one layer, m rows. */
typedef void (*sgemm)(int m, int n, int k, const float *a, const float *b, float *c);
static void openblas(int m, int n, int k, const float *a, const float *b, float *c) { cblas_sgemm(101, 111, 112, m, n, k, 1, a, k, b, k, 0, c, n); }
#ifdef LG_DNNL
static void onednn(int m, int n, int k, const float *a, const float *b, float *c) { dnnl_sgemm('N', 'T', m, n, k, 1, a, k, b, k, 0, c, n); }
#endif
static void library(const char *name, sgemm product, int m, double flops, const float *a, const float *b, float *c) {
    double sum = 0;
    for (int s = 0; s < SHAPES; s++) {
        double best = 1e9;
        for (int r = 0; r < 100; r++) {
            const double t0 = lg_base_now();
            product(m, (int)shape[s][0], (int)shape[s][1], a, b, c);
            const double t = lg_base_now() - t0;
            best = t < best ? t : best;
        }
        sum += best;
    }
    printf("one layer, %d rows: %s f32 %.0f GFLOP/s -> 2048 tokens: %.3f s\n", m, name, flops / sum * 1e-9, sum * LAYERS * 2048 / m);
}

static void libraries(int nth, int m) {
    double flops = 0;
    float *a = lg_base_calloc(m * 1536, 4), *b = lg_base_calloc(1536 * 1536, 4), *c = lg_base_calloc(m * 1536, 4);
    openblas_set_num_threads(nth);
    omp_set_num_threads(nth);
    for (int s = 0; s < SHAPES; s++) flops += 2.0 * m * (double)(shape[s][0] * shape[s][1]);
    library("OpenBLAS", openblas, m, flops, a, b, c);
#ifdef LG_DNNL
    double bf = 0;
    library("oneDNN", onednn, m, flops, a, b, c);
    peer p = { .impl = "" };
    dnnl_engine_create(&p.eng, dnnl_cpu, 0);
    dnnl_stream_create(&p.st, p.eng, dnnl_stream_default_flags);
    for (int s = 0; s < SHAPES; s++) {
        const double t = peer_product(&p, m, (int)shape[s][0], (int)shape[s][1], a, b, c);
        if (t < 0) { puts("oneDNN: no bf16 product on this processor"); return; }
        bf += t;
    }
    printf("one layer, %d rows: oneDNN bf16 %.0f GFLOP/s (%s) -> 2048 tokens: %.3f s\n", m, flops / bf * 1e-9, p.impl, bf * LAYERS * 2048 / m);
#else
    puts("oneDNN: not measured (libdnnl-dev, make DNNL=1 build/bench/gemm_bench)");
#endif
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "decode";
    const int nth = argc > 2 ? atoi(argv[2]) : 2;
    if (nth < 1 || nth > MAX_THREADS) return 2;
    lg_dtype t = LG_DTYPE_Q4_1;
    if (!strcmp(what, "lib")) { libraries(nth, argc > 3 ? atoi(argv[3]) : 512); return 0; }
    if (argc > 3 && !lg_base_dtype_parse(argv[3], &t)) return 2;
    const lg_gemm g = { getenv("F32") ? LG_COMPUTE_F32 : LG_COMPUTE_AUTO, lg_cpu_isa() };
    const bool prefill = !strcmp(what, "prefill");
    for (int l = 0; l < LAYERS; l++)
        for (int s = 0; s < SHAPES; s++) make(&layer[l][s], &g, t, shape[s][0], shape[s][1]);
    for (int i = 0; i < PARTS && !prefill; i++) make(&head[i], &g, t, 49152 / PARTS, 576);
    const int64_t most = prefill ? 512 : 16, sb = (lg_gemm_scratch_bytes(&g, most, 1536) + 63) / 64 * 64;
    float *y = lg_base_calloc(most * (prefill ? 1536 : 49152), 4), *x = lg_base_calloc(most * 1536, 4);
    for (int64_t i = 0; i < most * 1536; i++) x[i] = (float)(i % 19) - 9;
    uint8_t *scratch = lg_base_alloc(sb * nth), *in = lg_base_alloc(most * 1536 * 8);
    static const int64_t dec[] = { 1, 2, 3, 4, 8, 12, 16 }, pre[] = { 17, 32, 64, 128, 256, 512 };
    for (int k = 0; k < (prefill ? 6 : 7); k++) {
        const int64_t n = prefill ? pre[k] : dec[k];
        double best = 1e9, best_in = 1e9, best_silu = 1e9;
        for (int i = 0; i < MAX_THREADS; i++)
            for (int u = 0; u < N_UNIT; u++) least[i][u] = 1e9;
        const double begun = lg_base_now();
        for (int r = 0; r < 400 && lg_base_now() - begun < 1.2; r++) {
            double t0 = lg_base_now();
            lg_gemm_input(&g, in, x, 1536, x, 1e-5f, n, 1536, 0, 1);
            const double a = lg_base_now() - t0;
            best_in = a < best_in ? a : best_in;
            t0 = lg_base_now();
            lg_gemm_silu_mul(&g, y, x, x, n * 1536);
            const double s = lg_base_now() - t0;
            best_silu = s < best_silu ? s : best_silu;
            const double b = pass(&g, n, nth, !prefill, y, in, scratch, sb);
            best = b < best ? b : best;
        }
        const double flop = 2.0 * (double)n * LAYERS * (2.0 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576) + (prefill ? 0 : 2.0 * (double)n * 49152 * 576);
        printf("%s n_tok %3lld: %8.3f ms, %6.1f GB/s, %7.1f GFLOP/s; input (1536, norm) %.2f us/row, silu %.2f ns/element\n",
               lg_base_dtype(t)->name, (long long)n, best * 1e3, (double)total_bytes / best * 1e-9, flop / best * 1e-9,
               best_in * 1e6 / (double)n, best_silu * 1e9 / (double)(n * 1536));
    }
    return 0;
}
