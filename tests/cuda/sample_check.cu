/* Sampling on the device against its specification (lg_ops_sample): random rows and options, ties, infinities, rows of every kind in
 * one launch. Built with LG_CUDA_EMU the kernels run on the CPU (emu.h).
 *
 *   sample_check [SEED [COUNT]]   one line in the end; exit 1 and the case when an id differs */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ops/cuda/decode_ptx.cuh"
#include "check.cuh"

static float unit(void) { return (float)((double)(rnd() >> 11) * 0x1p-53); }

enum { KINDS = 7, MAX_ROWS = 70 };
static float logit(int kind, int64_t i) {
    switch (kind) {
    case 0: return 20 * (unit() + unit() + unit()) - 30;
    case 1: return (float)(below(7) - 3);               /* ties everywhere */
    case 2: return 2.5f;                                /* one value */
    case 3: return below(9) ? -INFINITY : unit() * 4;   /* what a mask leaves */
    case 4: return below(50) ? unit() : NAN;
    case 5: return i % 97 ? -60 * unit() : 60 * unit();
    default: return below(2) ? 0.0f : -0.0f;
    }
}

static bool run(lg_cuda_env e, int index) {
    static const int64_t vocabs[] = { 1, 5, 320, 2047, 2048, 2049, 5000 };
    const int64_t n = index % 40 == 39 ? 49152 : vocabs[below(7)], rows = index % 50 == 49 ? (int64_t)MAX_ROWS : 1 + below(4);
    float *x = (float *)malloc((size_t)(rows * n * 4)), *scratch = (float *)malloc((size_t)(2 * n * 4));
    lg_draw d[MAX_ROWS];
    int32_t recent[(int)MAX_ROWS * (int)LG_RECENT], got[MAX_ROWS], kinds[MAX_ROWS];
    bool top_k = false, top_p = false, good = true;
    memset(recent, 0, sizeof recent);
    for (int64_t r = 0; r < rows; r++) {
        kinds[r] = (int32_t)below(KINDS);
        for (int64_t i = 0; i < n; i++) x[r * n + i] = logit(kinds[r], i);
        memset(&d[r], 0, sizeof d[r]);
        d[r].scale = below(5) ? 1.4426950408889634 / (double)(0.05f + 3 * unit() * unit()) : 0;
        d[r].top_p = below(2) ? 1.0 : below(4) ? (double)unit() : 1e-9;
        d[r].min_weight = below(3) ? 0 : (uint64_t)((double)unit() * (double)unit() * 0x1p40);
        d[r].random = below(9) ? rnd() : below(2) ? 0 : ~(uint64_t)0;
        d[r].top_k = below(2) ? 0 : below(3) ? 1 + below(60) : 1 + below(n + 3);
        d[r].penalty = below(2) ? 1 : 0.5f + 2 * unit();
        d[r].n_recent = (int32_t)below(LG_RECENT + 1);
        for (int k = 0; k < d[r].n_recent; k++) recent[r * LG_RECENT + k] = (int32_t)below(below(2) ? n : n < 9 ? n : 9);
        top_k = top_k || d[r].top_k > 0;
        top_p = top_p || d[r].top_p < 1;
    }
    lg_op_sample a;
    memset(&a, 0, sizeof a);
    a.id = (int32_t *)room(rows * 4);
    a.logits = (float *)up(x, rows * n * 4);
    a.n_row = rows;
    a.n_vocab = n;
    a.draw = (lg_draw *)up(d, rows * (int64_t)sizeof *d);
    a.recent = (int32_t *)up(recent, rows * LG_RECENT * 4);
    e.scratch_bytes = lg_cuda_sample_scratch(rows, n);
    e.scratch = (uint8_t *)room(e.scratch_bytes);
    lg_cuda_sample(&e, &a, top_k, top_p);
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(got, a.id, (size_t)rows * 4, cudaMemcpyDeviceToHost));
    for (int64_t r = 0; r < rows; r++) {
        const int32_t want = lg_ops_sample(x + r * n, n, &d[r], recent + r * LG_RECENT, scratch);
        if (got[r] == want) continue;
        good = false;
        printf("case %d row %d of %d: vocabulary %lld, logits of kind %d, scale %g, top-k %lld, top-p %g, min weight %llu, penalty %g of %d: id %d, not %d\n", index,
               (int)r, (int)rows, (long long)n, kinds[r], d[r].scale, (long long)d[r].top_k, d[r].top_p, (unsigned long long)d[r].min_weight,
               (double)d[r].penalty, d[r].n_recent, got[r], want);
    }
    void *dev[] = { a.id, (void *)a.logits, (void *)a.draw, (void *)a.recent, e.scratch };
    for (int i = 0; i < 5; i++) CUDA(cudaFree(dev[i]));
    free(x);
    free(scratch);
    return good;
}

int main(int argc, char **argv) {
    const int count = argc > 2 ? atoi(argv[2]) : 300;
    int failed = 0;
    lg_cuda_env e;
    memset(&e, 0, sizeof e);
    if (argc > 1) seed = (uint64_t)atoll(argv[1]);
    for (int i = 0; i < count; i++) failed += !run(e, i);
    printf("sample_check: %d cases, %d failed\n", count, failed);
    return failed > 0;
}
