/* Attention of SmolLM2-135M's shape (9 query heads on 3 KV heads of 64) on one thread, one layer: prefill chunks, dense decode,
 * set readers and selection. Times are the thread's CPU time, best of repeats, so company on the machine matters little; caches are
 * larger than L3 where decode is measured (layers in turn). usage: attend_bench [f32|f16|bf16|q8] */
#include <stdio.h>
#include <string.h>
#include <time.h>
#include "ops/cpu/attend.h"

enum { D = 64, KV = 3, HEADS = 9, ROWS = 512, LAYERS = 30 };

static double cpu_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static lg_kv_geom geom = { LG_DTYPE_F16, KV, D, 0 };
static lg_kv_layer layer[LAYERS];
static int32_t page[1 << 10];
static float q[ROWS * HEADS * D], out[ROWS * HEADS * D];

static void fill(int64_t len) {
    const int64_t n = len / LG_PAGE * KV * LG_PAGE;
    float row[D];
    for (int l = 0; l < LAYERS; l++) {
        layer[l].k = lg_base_alloc(n * geom.row_bytes);
        layer[l].v = lg_base_alloc(n * geom.row_bytes);
        if (!layer[l].k || !layer[l].v) return;
        for (int64_t r = 0; r < n; r++) {
            for (int i = 0; l == 0 && i < D; i++) row[i] = 2.0f * (float)lg_base_rng_unit(1, (uint64_t)r, (uint64_t)i) - 1.0f;
            if (l == 0) lg_ops_kv_store(&geom, layer[0].k + r * geom.row_bytes, row);
        }
        if (l) memcpy(layer[l].k, layer[0].k, (size_t)(n * geom.row_bytes));
        memcpy(layer[l].v, layer[0].k, (size_t)(n * geom.row_bytes));
    }
}
static void drop(void) {
    for (int l = 0; l < LAYERS; l++) lg_base_free(layer[l].k), lg_base_free(layer[l].v);
}

static void prefill(const lg_gemm *g, int64_t behind) {
    static int32_t seq[ROWS];
    static int64_t idx[ROWS];
    const lg_kv_seq s = { page, behind + ROWS, NULL };
    for (int i = 0; i < ROWS; i++) idx[i] = behind + i;
    fill(behind + ROWS);
    const lg_op_attend a = { .out = out, .q = q, .kv = layer[0], .geom = geom, .seqs = &s, .n_seq = 1, .seq = seq, .idx = idx,
                             .n_tok = ROWS, .n_head = HEADS, .scale = 0.125f };
    void *scratch = lg_base_alloc(lg_attend_scratch_bytes(g, ROWS, 1, s.len, HEADS, &geom, 1));
    double best = 1e9;
    for (int r = 0; r < 6; r++) {
        const double t0 = cpu_now();
        lg_attend_run(g, &a, NULL, 0, scratch, 0, 1);
        const double t = cpu_now() - t0;
        best = t < best ? t : best;
    }
    const double mac = 2.0 * D * HEADS * ROWS * ((double)behind + 0.5 * ROWS);
    printf("prefill %d rows behind %5lld: %8.2f ms, %6.1f GMAC/s\n", ROWS, (long long)behind, best * 1e3, mac / best * 1e-9);
    lg_base_free(scratch);
    drop();
}

/* One step: every layer once. make: the first head of a layer builds a set; read: all heads read sets of n tokens. */
static void decode(const lg_gemm *g, int64_t len, bool make, bool read) {
    enum { N = 1024 };
    static int32_t ids[N], n[1], own[N];
    const lg_kv_seq s = { page, len, NULL };
    const int64_t budget = N;
    const uint8_t dense = 0;
    int32_t r3[KV] = { LG_HEAD_DENSE, LG_HEAD_DENSE, LG_HEAD_DENSE }, m3[KV] = { -1, -1, -1 };
    for (int i = 0; i < N; i++) own[i] = ids[i] = (int32_t)((int64_t)i * (len - 1) / (N - 1));
    n[0] = N;
    for (int h = 0; read && h < KV; h++) r3[h] = 0;
    if (make) m3[0] = 0;
    fill(len);
    lg_op_attend_hybrid a = { .out = out, .q = q, .geom = geom, .seqs = &s, .n_seq = 1, .budget = &budget, .dense = &dense, .read = r3,
                              .make = m3, .sets = { ids, n, N, 1, 1 }, .select = { .rule = LG_RULE_TOPK, .sinks = 16, .recents = 64 },
                              .n_head = HEADS, .scale = 0.125f };
    void *scratch = lg_base_alloc(lg_attend_scratch_bytes(g, 1, 1, len, HEADS, &geom, 1));
    double best[2] = { 1e9, 1e9 };
    for (int rep = 0; rep < 12; rep++) {
        double t[2] = { 0 };
        for (int l = 0; l < LAYERS; l++) {
            a.kv = layer[l];
            for (int p = 0; p < 2; p++) {
                const double t0 = cpu_now();
                lg_attend_hybrid_run(g, &a, p, scratch, 0, 1);
                t[p] += cpu_now() - t0;
            }
        }
        for (int p = 0; p < 2; p++) best[p] = t[p] < best[p] ? t[p] : best[p];
    }
    const double bytes = (double)(read ? N : len) * KV * 2 * (double)geom.row_bytes * LAYERS;
    printf("decode at %5lld, %s: %7.1f us a layer, %5.1f GB/s; merge%s %5.1f us\n", (long long)len,
           read ? "sets of 1024" : make ? "dense + set" : "dense", best[0] / LAYERS * 1e6, bytes / best[0] * 1e-9,
           make ? " and selection" : "", best[1] / LAYERS * 1e6);
    memcpy(ids, own, sizeof ids);
    lg_base_free(scratch);
    drop();
}

int main(int argc, char **argv) {
    if (argc > 1 && !lg_base_dtype_parse(argv[1], &geom.dtype)) return 2;
    geom.row_bytes = lg_base_row_bytes(geom.dtype, D);
    const lg_gemm g = { LG_COMPUTE_AUTO, lg_cpu_isa() };
    for (int i = 0; i < 1 << 10; i++) page[i] = i;
    for (int i = 0; i < ROWS * HEADS * D; i++) q[i] = (float)(i % 23) * 0.1f - 1.1f;
    static const int64_t behind[] = { 0, 1536, 7680 }, len[] = { 512, 8192, 32768 };
    for (int i = 0; i < 3; i++) prefill(&g, behind[i]);
    for (int i = 0; i < 3; i++) decode(&g, len[i], false, false);
    for (int i = 1; i < 3; i++) decode(&g, len[i], true, false), decode(&g, len[i], false, true);
    return 0;
}
