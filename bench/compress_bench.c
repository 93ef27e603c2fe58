/* Speed of compression beside the engine's own prefill of the same number of rows, in turn, best and median of the repetitions.
 *
 *     compress_bench MODEL [--adapter FILE] [--chunk N] [--ratio R] [--chunks N] [--threads N] [--reps N] [--f32]
 *
 * Without --adapter the memory weights are filled from the base's: the work is the same. Rows of a chunk: N + N/R. The prefill
 * reads as many tokens from an empty cache; both skip the output matrix (a prefill has it for one row). With an adapter that has a
 * reader: what its low-rank additions cost, applied beside the base's products (with and without, in turn): a question of 32 tokens and
 * single tokens behind N/R cached ones. Merged into the base they would cost nothing, and a copy of every weight. */
#include "memory/memory.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int by_value(const void *a, const void *b) { return *(const double *)a < *(const double *)b ? -1 : 1; }
static int fail(const lg_error *e) {
    fprintf(stderr, "compress_bench: %s\n", e->message);
    return 1;
}

enum { QUESTION = 32, STEPS = 32 };

/* Seconds of a question and of a token behind n cached tokens. */
static lg_status read_times(lg_session *s, const int32_t *ids, int64_t n, double out[2], lg_error *e) {
    lg_status st = lg_session_rewind(s, 0, n, e);
    double at = lg_base_now();
    if (st == LG_OK) st = lg_session_sync(s, 0, ids, n + QUESTION, e);
    out[0] = lg_base_now() - at;
    at = lg_base_now();
    for (int64_t i = 1; st == LG_OK && i <= STEPS; i++) st = lg_session_sync(s, 0, ids, n + QUESTION + i, e);
    out[1] = (lg_base_now() - at) / STEPS;
    return st;
}

/* Best of the repetitions, without and with the reader's additions. */
static int reader(lg_session *s, const int32_t *ids, int64_t n, int64_t reps, lg_error *e) {
    double best[2][2] = { { 1e9, 1e9 }, { 1e9, 1e9 } };
    if (lg_session_rewind(s, 0, 0, e) != LG_OK || lg_session_sync(s, 0, ids, n, e) != LG_OK) return fail(e);
    for (int64_t r = -1; r < reps; r++)
        for (int with = 0; with < 2; with++) {
            double t[2];
            lg_session_use_lora(s, with ? &s->m->reader : NULL);
            if (read_times(s, ids, n, t, e) != LG_OK) return fail(e);
            for (int i = 0; r >= 0 && i < 2; i++) best[with][i] = t[i] < best[with][i] ? t[i] : best[with][i];
        }
    printf("reader    question of %d: %.2f ms, %.2f without its additions (%.2fx); a token: %.2f ms, %.2f (%.2fx)\n", QUESTION, 1e3 * best[1][0],
           1e3 * best[0][0], best[1][0] / best[0][0], 1e3 * best[1][1], 1e3 * best[0][1], best[1][1] / best[0][1]);
    return 0;
}

int main(int argc, char **argv) {
    lg_error e = { 0 };
    const char *path = NULL, *adapter = NULL;
    int64_t chunk = 1024, ratio = 4, chunks = 1, threads = 0, reps = 5;
    bool f32 = false;
    for (int i = 1; i < argc; i++) {
        const struct { const char *name; int64_t *to; } n[] = { { "--chunk", &chunk }, { "--ratio", &ratio }, { "--chunks", &chunks }, { "--threads", &threads }, { "--reps", &reps } };
        bool known = false;
        for (int j = 0; j < 5 && i + 1 < argc; j++)
            if (!strcmp(argv[i], n[j].name)) *n[j].to = atoll(argv[++i]), known = true;
        if (known) continue;
        if (!strcmp(argv[i], "--adapter") && i + 1 < argc) adapter = argv[++i];
        else if (!strcmp(argv[i], "--f32")) f32 = true;
        else path = argv[i];
    }
    if (!path || chunk < 1 || ratio < 1 || chunks < 1 || reps < 1 || reps > 100) {
        fprintf(stderr, "usage: compress_bench MODEL [--adapter FILE] [--chunk N] [--ratio R] [--chunks N] [--threads N] [--reps N] [--f32]\n");
        return 2;
    }
    lg_model *m;
    lg_session *s;
    lg_compressor *c;
    const lg_model_params mp = { .path = path, .n_threads = (int)threads, .compute = f32 ? LG_COMPUTE_F32 : LG_COMPUTE_AUTO, .adapters = &adapter,
                                 .n_adapter = adapter ? 1 : 0, .fill_memory = !adapter };
    if (lg_model_open(&m, &mp, &e) != LG_OK) return fail(&e);
    if (lg_memory_compressor_new(&c, m, chunk, chunk, ratio, chunks, &e) != LG_OK) return fail(&e);
    const int64_t rows = chunk + chunk / ratio, stride = m->cfg.n_layer * (chunk / ratio) * m->cfg.n_head_kv * m->cfg.head_dim;
    lg_session_params sp;
    lg_session_defaults(&sp);
    sp.n_ctx = rows;
    if (lg_session_new(&s, m, &sp, &e) != LG_OK) return fail(&e);
    int32_t *ids = lg_base_calloc(rows * chunks, sizeof *ids);
    const int32_t **text = lg_base_calloc(chunks, sizeof *text);
    int64_t *n = lg_base_calloc(chunks, sizeof *n);
    float *k = lg_base_calloc(chunks * stride, sizeof *k), *v = lg_base_calloc(chunks * stride, sizeof *v);
    if (!ids || !text || !n || !k || !v) return 1;
    for (int64_t i = 0; i < rows * chunks; i++) ids[i] = (int32_t)lg_base_rng_below(1, 1, (uint64_t)i, m->cfg.n_vocab);
    for (int64_t i = 0; i < chunks; i++) text[i] = ids + i * chunk, n[i] = chunk;
    double prefill[100], compress[100];
    for (int64_t r = -1; r < reps; r++) { /* one warms up */
        double at = lg_base_now();
        for (int64_t i = 0; i < chunks; i++) {
            if (lg_session_rewind(s, 0, 0, &e) != LG_OK || lg_session_sync(s, 0, ids + i * rows, rows, &e) != LG_OK) return fail(&e);
        }
        if (r >= 0) prefill[r] = lg_base_now() - at;
        at = lg_base_now();
        if (lg_memory_compress(c, text, n, chunks, k, v, stride, &e) != LG_OK) return fail(&e);
        if (r >= 0) compress[r] = lg_base_now() - at;
    }
    qsort(prefill, (size_t)reps, sizeof *prefill, by_value);
    qsort(compress, (size_t)reps, sizeof *compress, by_value);
    const double all = (double)(rows * chunks);
    printf("%s, %lld chunks of %lld tokens, ratio %lld: %lld rows a chunk\n", m->info.device, (long long)chunks, (long long)chunk, (long long)ratio, (long long)rows);
    printf("prefill   %8.0f rows/s (best), %8.0f (median)\n", all / prefill[0], all / prefill[reps / 2]);
    printf("compress  %8.0f rows/s (best), %8.0f (median), %.1f GFLOP/s of products\n", all / compress[0], all / compress[reps / 2],
           2e-9 * (double)chunks * lg_memory_compress_flops(c) / compress[0]);
    printf("share     %8.3f (best), %.3f (median)\n", prefill[0] / compress[0], prefill[reps / 2] / compress[reps / 2]);
    return m->reader.layer && chunk / ratio + QUESTION + STEPS <= rows ? reader(s, ids, chunk / ratio, reps, &e) : 0;
}
