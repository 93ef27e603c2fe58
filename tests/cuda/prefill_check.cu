/* Prefill attention on the GPU against its plain C specification, then its speed. Not part of `make test`: it needs a GPU.
 *
 *   prefill_check [check] [time] [small]     default: check and time; small: the cases with few keys (for compute-sanitizer).
 *                                            Exit 1 when a case exceeds its bound.
 *
 * Every case runs with each kernel that fits. q is rounded to the kernel's input type before both sides see it, so the bounds speak of
 * the kernel alone: relative error ||out - ref|| / ||ref|| and the worst absolute error (values of V lie in [-1, 1]). Cache rows behind a
 * sequence's length, unused pages and the output are filled with NaN first. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "ops/cuda/prefill.cuh"
extern "C" {
#include "ops/ref/ref.h"
}

#define CUDA(x)                                                                                       \
    do {                                                                                              \
        const cudaError_t e_ = (x);                                                                   \
        if (e_ != cudaSuccess) {                                                                      \
            printf("FAILED %s:%d: %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_));         \
            exit(1);                                                                                  \
        }                                                                                             \
    } while (0)

enum { MAX_RUNS = 8 };

/* Rows of one sequence: row i sees 0..first + i*step + i/skip (skip 0: no third term). The sequence holds len tokens. */
typedef struct run { int64_t len, first, count, step, skip; } run;
typedef struct test_case {
    const char *name;
    int32_t hd, n_kv, group;
    run runs[MAX_RUNS];
    int64_t every; /* compare every n-th row: 0 and 1 all */
} test_case;

static lg_cuda_env env;
static uint64_t seed;
static int n_run, n_bad;

static float unit(uint64_t stream, uint64_t i) { return (float)(2.0 * lg_base_rng_unit(seed, stream, i) - 1.0); }

static const char *kernel_name(int choice, lg_compute compute) {
    return compute == LG_COMPUTE_F32 || choice == 3 ? "f32" : choice == 1 ? "mma" : choice == 2 ? "wgmma" : "auto";
}

/* ---- the specification, rows shared among threads ---- */
typedef struct job { lg_op_attend op; int64_t every, next; pthread_mutex_t lock; } job;

static void *work(void *arg) {
    job *j = (job *)arg;
    for (;;) {
        pthread_mutex_lock(&j->lock);
        const int64_t t = j->next;
        j->next += j->every;
        pthread_mutex_unlock(&j->lock);
        if (t >= j->op.n_tok) return NULL;
        const int64_t at = t * j->op.n_head * j->op.geom.head_dim;
        lg_op_attend one = j->op;
        one.out += at;
        one.q += at;
        one.seq += t;
        one.idx += t;
        one.n_tok = 1;
        lg_ref_attend(&one);
    }
}

static void reference(const lg_op_attend *op, int64_t every) {
    job j = { *op, every, 0, PTHREAD_MUTEX_INITIALIZER };
    pthread_t th[64];
    const int n = lg_base_n_cores() < 64 ? lg_base_n_cores() : 64;
    for (int i = 0; i < n; i++)
        if (pthread_create(&th[i], NULL, work, &j)) exit(1);
    for (int i = 0; i < n; i++) pthread_join(th[i], NULL);
}

/* ---- one case, one cache dtype: all kernels ---- */
static void *device_copy(const void *src, int64_t bytes) {
    void *p;
    CUDA(cudaMalloc(&p, (size_t)bytes));
    CUDA(cudaMemcpy(p, src, (size_t)bytes, cudaMemcpyHostToDevice));
    return p;
}

static void check(const test_case *c, lg_dtype dtype) {
    lg_kv_geom g = { dtype, c->n_kv, c->hd, lg_base_row_bytes(dtype, c->hd) };
    const int64_t n_head = (int64_t)c->n_kv * c->group;
    int64_t n_tok = 0, n_page = 0, n_seq = 0;
    for (; n_seq < MAX_RUNS && c->runs[n_seq].len; n_seq++) {
        n_tok += c->runs[n_seq].count;
        n_page += (c->runs[n_seq].len + LG_PAGE - 1) / LG_PAGE;
    }
    const int64_t total = n_page + 3, kv_bytes = total * c->n_kv * LG_PAGE * g.row_bytes, n_q = n_tok * n_head * c->hd;
    uint8_t *k = (uint8_t *)malloc((size_t)kv_bytes), *v = (uint8_t *)malloc((size_t)kv_bytes);
    float *q = (float *)malloc((size_t)n_q * 4), *want = (float *)malloc((size_t)n_q * 4), *got = (float *)malloc((size_t)n_q * 4);
    int32_t *seq = (int32_t *)malloc((size_t)n_tok * 4), *pages = (int32_t *)malloc((size_t)total * 4);
    int64_t *idx = (int64_t *)malloc((size_t)n_tok * 8);
    float *row = (float *)malloc((size_t)c->hd * 4);
    lg_kv_seq seqs[MAX_RUNS];
    lg_cuda_seq dseqs[MAX_RUNS];
    if (!k || !v || !q || !want || !got || !seq || !pages || !idx || !row) exit(1);
    seed++;
    memset(k, 0xff, (size_t)kv_bytes);
    memset(v, 0xff, (size_t)kv_bytes);
    for (int64_t i = 0; i < total; i++) pages[i] = (int32_t)i;
    for (int64_t i = total - 1; i > 0; i--) { /* a shuffle */
        const int64_t j = lg_base_rng_below(seed, 1, (uint64_t)i, i + 1);
        const int32_t t = pages[i];
        pages[i] = pages[j];
        pages[j] = t;
    }
    int32_t *dpages = (int32_t *)device_copy(pages, total * 4);
    int64_t t = 0, at = 0;
    for (int64_t s = 0; s < n_seq; s++) {
        const run *r = &c->runs[s];
        seqs[s] = (lg_kv_seq){ pages + at, r->len };
        dseqs[s] = (lg_cuda_seq){ dpages + at, r->len, NULL };
        for (int64_t i = 0; i < r->len; i++)
            for (int32_t h = 0; h < c->n_kv; h++) {
                const int64_t slot = (((int64_t)pages[at + i / LG_PAGE] * c->n_kv + h) * LG_PAGE + i % LG_PAGE);
                for (int half = 0; half < 2; half++) {
                    for (int32_t d = 0; d < c->hd; d++) row[d] = unit(10 + (uint64_t)half, (uint64_t)(slot * c->hd + d));
                    lg_ops_kv_store(&g, (half ? v : k) + slot * g.row_bytes, row);
                }
            }
        at += (r->len + LG_PAGE - 1) / LG_PAGE;
        for (int64_t i = 0; i < r->count; i++, t++) {
            seq[t] = (int32_t)s;
            idx[t] = r->first + i * r->step + (r->skip ? i / r->skip : 0);
            if (idx[t] >= r->len) {
                printf("FAILED case %s asks for position %lld of %lld\n", c->name, (long long)idx[t], (long long)r->len);
                exit(1);
            }
        }
    }
    for (int64_t i = 0; i < n_q; i++) {
        q[i] = 3.0f * unit(3, (uint64_t)i);
        q[i] = dtype == LG_DTYPE_BF16 ? lg_base_bf16_to_f32(lg_base_f32_to_bf16(q[i])) : lg_base_f16_to_f32(lg_base_f32_to_f16(q[i]));
    }
    const int64_t every = c->every > 1 ? c->every : 1;
    lg_op_attend op;
    memset(&op, 0, sizeof op);
    op.out = want;
    op.q = q;
    op.kv = (lg_kv_layer){ k, v };
    op.geom = g;
    op.seqs = seqs;
    op.n_seq = (int32_t)n_seq;
    op.seq = seq;
    op.idx = idx;
    op.n_tok = n_tok;
    op.n_head = (int32_t)n_head;
    op.scale = 1.0f / sqrtf((float)c->hd);
    reference(&op, every);

    lg_cuda_prefill a;
    memset(&a, 0, sizeof a);
    a.kv = (lg_kv_layer){ (uint8_t *)device_copy(k, kv_bytes), (uint8_t *)device_copy(v, kv_bytes) };
    a.q = (float *)device_copy(q, n_q * 4);
    CUDA(cudaMalloc(&a.out, (size_t)n_q * 4));
    a.geom = g;
    a.seqs = (lg_cuda_seq *)device_copy(dseqs, n_seq * (int64_t)sizeof *dseqs);
    a.n_seq = (int32_t)n_seq;
    a.seq = (int32_t *)device_copy(seq, n_tok * 4);
    a.idx = (int64_t *)device_copy(idx, n_tok * 8);
    a.seq_host = seq;
    a.idx_host = idx;
    a.n_tok = n_tok;
    a.n_head = (int32_t)n_head;
    a.scale = op.scale;
    for (int choice = 1; choice <= 3; choice++) {
        if (dtype == LG_DTYPE_F32 && choice < 3) continue;
        if (choice == 1 && !lg_prefill_mma_fits(&env, &g)) continue;
        if (choice == 2 && !lg_prefill_wgmma_fits(&env, &g)) continue;
        lg_prefill_choice = choice;
        env.compute = choice == 3 ? LG_COMPUTE_F32 : LG_COMPUTE_AUTO;
        CUDA(cudaMemset(a.out, 0xff, (size_t)n_q * 4));
        CUDA(cudaMemset(env.scratch, 0xff, (size_t)env.scratch_bytes));
        lg_cuda_prefill_attend(&env, &a);
        CUDA(cudaGetLastError());
        CUDA(cudaDeviceSynchronize());
        CUDA(cudaMemcpy(got, a.out, (size_t)n_q * 4, cudaMemcpyDeviceToHost));
        double worst = 0, sum = 0, norm = 0;
        int64_t worst_at = 0;
        for (int64_t i = 0; i < n_q; i++) {
            if ((i / (n_head * c->hd)) % every) {
                if (!isfinite(got[i])) worst = INFINITY, worst_at = i;
                continue;
            }
            const double e = fabs((double)got[i] - (double)want[i]);
            if (e > worst || isnan(e)) worst = isnan(e) ? INFINITY : e, worst_at = i;
            sum += e * e;
            norm += (double)want[i] * (double)want[i];
        }
        const double rel = sqrt(sum / norm);
        const bool exact = choice == 3;
        const double rel_bound = exact ? 1e-5 : dtype == LG_DTYPE_BF16 ? 5e-3 : 1e-3;
        const double abs_bound = exact ? 2e-5 : dtype == LG_DTYPE_BF16 ? 8e-3 : 2e-3;
        const bool ok = rel <= rel_bound && worst <= abs_bound;
        n_run++;
        n_bad += !ok;
        printf("%-6s %-5s %-5s %-34s rel %.2e (%.0e) abs %.2e (%.0e)", ok ? "ok" : "FAILED", kernel_name(choice, env.compute),
               lg_base_dtype(dtype)->name, c->name, rel, rel_bound, worst, abs_bound);
        if (!ok) {
            const int64_t w = worst_at / c->hd;
            printf("  at row %lld head %lld d %lld idx %lld: %g, not %g", (long long)(w / n_head), (long long)(w % n_head),
                   (long long)(worst_at % c->hd), (long long)idx[w / n_head], (double)got[worst_at], (double)want[worst_at]);
        }
        printf("\n");
        fflush(stdout);
    }
    cudaFree(dpages);
    cudaFree(a.kv.k);
    cudaFree(a.kv.v);
    cudaFree((void *)a.q);
    cudaFree(a.out);
    cudaFree((void *)a.seqs);
    cudaFree((void *)a.seq);
    cudaFree((void *)a.idx);
    free(k); free(v); free(q); free(want); free(got); free(seq); free(pages); free(idx); free(row);
}

static const test_case cases[] = {
    { "hd64 g1 1 row of 1", 64, 2, 1, { { 1, 0, 1, 1, 0 } }, 0 },
    { "hd64 g3 63 of 63", 64, 3, 3, { { 63, 0, 63, 1, 0 } }, 0 },
    { "hd64 g3 65 of 65", 64, 3, 3, { { 65, 0, 65, 1, 0 } }, 0 },
    { "hd64 g4 700 of 700", 64, 2, 4, { { 700, 0, 700, 1, 0 } }, 0 },
    { "hd80 g2 391 of 391", 80, 2, 2, { { 391, 0, 391, 1, 0 } }, 0 },
    { "hd96 g3 257 of 257", 96, 2, 3, { { 257, 0, 257, 1, 0 } }, 0 },
    { "hd128 g1 129 of 129", 128, 2, 1, { { 129, 0, 129, 1, 0 } }, 0 },
    { "hd128 g2 127 of 127", 128, 1, 2, { { 127, 0, 127, 1, 0 } }, 0 },
    { "hd128 g4 513 of 513", 128, 2, 4, { { 513, 0, 513, 1, 0 } }, 0 },
    { "hd128 g7 333 of 333", 128, 2, 7, { { 333, 0, 333, 1, 0 } }, 0 },
    { "hd128 g8 100 of 100", 128, 1, 8, { { 100, 0, 100, 1, 0 } }, 0 },
    { "hd256 g2 200 of 200", 256, 1, 2, { { 200, 0, 200, 1, 0 } }, 0 },
    { "hd16 g2 77 of 77 (f32 kernel)", 16, 2, 2, { { 77, 0, 77, 1, 0 } }, 0 },
    { "hd128 g4 rows 1000..1299 of 1300", 128, 2, 4, { { 1300, 1000, 300, 1, 0 } }, 0 },
    { "hd64 g3 rows 1000..1299 of 1311", 64, 3, 3, { { 1311, 1000, 300, 1, 0 } }, 0 },
    { "hd128 g4 memory rows, every 5th", 128, 2, 4, { { 1280, 4, 256, 5, 0 } }, 0 },
    { "hd128 g7 raw rows, 4 of 5", 128, 1, 7, { { 640, 0, 512, 1, 4 } }, 0 },
    { "hd64 g3 memory rows, every 9th", 64, 3, 3, { { 640, 8, 71, 9, 0 } }, 0 },
    { "hd128 g4 ragged", 128, 2, 4, { { 1, 0, 1, 1, 0 }, { 700, 650, 50, 1, 0 }, { 64, 0, 64, 1, 0 }, { 333, 332, 1, 1, 0 }, { 128, 100, 28, 1, 0 },
                                      { 257, 0, 257, 1, 0 }, { 65, 63, 2, 1, 0 }, { 500, 2, 100, 4, 0 } }, 0 },
    { "hd64 g3 ragged", 64, 3, 3, { { 100, 0, 100, 1, 0 }, { 701, 700, 1, 1, 0 }, { 63, 0, 63, 1, 0 }, { 300, 1, 60, 4, 3 } }, 0 },
    { "hd96 g8 ragged", 96, 1, 8, { { 17, 3, 14, 1, 0 }, { 400, 350, 50, 1, 0 } }, 0 },
    { "hd128 g4 16 rows of 9000 (split)", 128, 2, 4, { { 9000, 8984, 16, 1, 0 } }, 0 },
    { "hd64 g3 5 rows of 7777 (split)", 64, 3, 3, { { 7777, 7770, 5, 1, 0 } }, 0 },
    { "hd128 g4 ragged (split)", 128, 2, 4, { { 3000, 2990, 10, 1, 0 }, { 70, 0, 70, 1, 0 }, { 1000, 900, 100, 1, 0 } }, 0 },
    { "hd128 g4 2048 rows of 20000", 128, 8, 4, { { 20000, 17952, 2048, 1, 0 } }, 83 },
};

/* ---- speed ---- */
__global__ void fill_random(uint16_t *p, int64_t n, uint32_t salt) { /* bf16 and f16 alike: magnitudes near 1, random sign and mantissa */
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t x = (uint32_t)i * 2654435761u ^ salt ^ (uint32_t)(i >> 32) * 0x9E3779B9u;
        x ^= x >> 15;
        x *= 0x2C1B3C6Du;
        x ^= x >> 12;
        x *= 0x297A2D39u;
        x ^= x >> 15;
        p[i] = (uint16_t)(0x3F00u | (x & 0x80FFu)); /* bf16: 0.5 to 2 */
    }
}
__global__ void fill_kv8(uint8_t *p, int64_t rows, int row_bytes, int hd, uint32_t salt) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < rows * row_bytes; i += (int64_t)gridDim.x * blockDim.x) {
        const int d = (int)(i % row_bytes);
        const uint32_t x = ((uint32_t)i * 2654435761u ^ salt) * 0x2C1B3C6Du;
        p[i] = d < hd ? (uint8_t)(x >> 13) : (d - hd) % 2 ? 0x20 : 0x00; /* scale 2^-7 */
    }
}
__global__ void fill_q(float *p, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t x = (uint32_t)i * 2654435761u;
        x ^= x >> 15;
        x *= 0x2C1B3C6Du;
        p[i] = (float)(int32_t)x * 0x1p-30f;
    }
}

typedef struct timing { const char *name; lg_dtype dtype; int32_t hd, n_kv, group; int64_t first, total, chunk; } timing;
static const timing timings[] = {
    { "Llama-3-8B 4K whole", LG_DTYPE_BF16, 128, 8, 4, 0, 4096, 4096 },
    { "Llama-3-8B 32K whole", LG_DTYPE_BF16, 128, 8, 4, 0, 32768, 32768 },
    { "Llama-3-8B 32K in chunks of 2048", LG_DTYPE_BF16, 128, 8, 4, 0, 32768, 2048 },
    { "Llama-3-8B 32K in chunks of 4096", LG_DTYPE_BF16, 128, 8, 4, 0, 32768, 4096 },
    { "Llama-3-8B 2048 rows at 126K..128K", LG_DTYPE_BF16, 128, 8, 4, 129024, 131072, 2048 },
    { "Llama-3-8B 2048 rows at 126K, f16", LG_DTYPE_F16, 128, 8, 4, 129024, 131072, 2048 },
    { "Llama-3-8B 2048 rows at 30K, q8", LG_DTYPE_KV8, 128, 8, 4, 30720, 32768, 2048 },
    { "Llama-3-8B 64 rows at 128K (split)", LG_DTYPE_BF16, 128, 8, 4, 131008, 131072, 64 },
    { "SmolLM2 8K in chunks of 2048", LG_DTYPE_BF16, 64, 3, 3, 0, 8192, 2048 },
    { "Qwen2.5-7B 32K in chunks of 4096", LG_DTYPE_BF16, 128, 4, 7, 0, 32768, 4096 },
    { "Llama-3-8B 4K whole, f32 cache", LG_DTYPE_F32, 128, 8, 4, 0, 4096, 4096 },
};

static int compare(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void time_one(const timing *c) {
    const lg_kv_geom g = { c->dtype, c->n_kv, c->hd, lg_base_row_bytes(c->dtype, c->hd) };
    const int64_t n_head = (int64_t)c->n_kv * c->group, n_page = (c->total + LG_PAGE - 1) / LG_PAGE;
    const int64_t kv_bytes = n_page * c->n_kv * LG_PAGE * g.row_bytes, rows = c->total - c->first;
    int32_t *pages = (int32_t *)malloc((size_t)n_page * 4), *seq = (int32_t *)calloc((size_t)rows, 4);
    int64_t *idx = (int64_t *)malloc((size_t)rows * 8);
    if (!pages || !seq || !idx) exit(1);
    for (int64_t i = 0; i < n_page; i++) pages[i] = (int32_t)((i * 7919) % n_page); /* 7919 is prime and divides no n_page here */
    double flop = 0;
    for (int64_t i = 0; i < rows; i++) {
        idx[i] = c->first + i;
        flop += 4.0 * (double)c->hd * (double)n_head * (double)(idx[i] + 1);
    }
    lg_cuda_prefill a;
    memset(&a, 0, sizeof a);
    CUDA(cudaMalloc(&a.kv.k, (size_t)kv_bytes));
    CUDA(cudaMalloc(&a.kv.v, (size_t)kv_bytes));
    if (c->dtype == LG_DTYPE_KV8) {
        fill_kv8<<<1024, 256>>>(a.kv.k, n_page * c->n_kv * LG_PAGE, (int)g.row_bytes, c->hd, 1);
        fill_kv8<<<1024, 256>>>(a.kv.v, n_page * c->n_kv * LG_PAGE, (int)g.row_bytes, c->hd, 2);
    } else if (c->dtype == LG_DTYPE_F32) {
        fill_q<<<1024, 256>>>((float *)a.kv.k, kv_bytes / 4);
        fill_q<<<1024, 256>>>((float *)a.kv.v, kv_bytes / 4);
    } else {
        fill_random<<<1024, 256>>>((uint16_t *)a.kv.k, kv_bytes / 2, 1);
        fill_random<<<1024, 256>>>((uint16_t *)a.kv.v, kv_bytes / 2, 2);
    }
    float *q, *out;
    CUDA(cudaMalloc(&q, (size_t)(rows * n_head * c->hd) * 4));
    CUDA(cudaMalloc(&out, (size_t)(rows * n_head * c->hd) * 4));
    fill_q<<<1024, 256>>>(q, rows * n_head * c->hd);
    int32_t *dpages = (int32_t *)device_copy(pages, n_page * 4), *dseq = (int32_t *)device_copy(seq, rows * 4);
    int64_t *didx = (int64_t *)device_copy(idx, rows * 8);
    const lg_cuda_seq s = { dpages, c->total, NULL };
    a.geom = g;
    a.seqs = (lg_cuda_seq *)device_copy(&s, sizeof s);
    a.n_seq = 1;
    a.n_head = (int32_t)n_head;
    a.scale = 1.0f / sqrtf((float)c->hd);
    cudaEvent_t ev[2];
    CUDA(cudaEventCreate(&ev[0]));
    CUDA(cudaEventCreate(&ev[1]));
    enum { REPS = 7 };
    float ms[4][REPS];
    bool have[4] = { false, c->dtype != LG_DTYPE_F32 && lg_prefill_mma_fits(&env, &g), false, c->dtype == LG_DTYPE_F32 };
    have[2] = lg_prefill_wgmma_fits(&env, &g);
    for (int rep = -1; rep < REPS; rep++) /* -1: warm-up; kernels take turns */
        for (int choice = 1; choice <= 3; choice++) {
            if (!have[choice]) continue;
            lg_prefill_choice = choice;
            env.compute = LG_COMPUTE_AUTO;
            CUDA(cudaEventRecord(ev[0], env.stream));
            for (int64_t r = 0; r < rows; r += c->chunk) {
                a.n_tok = rows - r < c->chunk ? rows - r : c->chunk;
                a.q = q + r * n_head * c->hd;
                a.out = out + r * n_head * c->hd;
                a.seq = dseq + r;
                a.idx = didx + r;
                a.seq_host = seq + r;
                a.idx_host = idx + r;
                lg_cuda_prefill_attend(&env, &a);
            }
            CUDA(cudaEventRecord(ev[1], env.stream));
            CUDA(cudaGetLastError());
            CUDA(cudaEventSynchronize(ev[1]));
            float t;
            CUDA(cudaEventElapsedTime(&t, ev[0], ev[1]));
            if (rep >= 0) ms[choice][rep] = t;
        }
    for (int choice = 1; choice <= 3; choice++) {
        if (!have[choice]) continue;
        qsort(ms[choice], REPS, sizeof(float), compare);
        printf("time   %-5s %-36s %9.3f ms (min %.3f, max %.3f)  %6.1f TFLOP/s\n", kernel_name(choice, LG_COMPUTE_AUTO), c->name,
               (double)ms[choice][REPS / 2], (double)ms[choice][0], (double)ms[choice][REPS - 1], flop / (double)ms[choice][REPS / 2] / 1e9);
    }
    fflush(stdout);
    cudaEventDestroy(ev[0]);
    cudaEventDestroy(ev[1]);
    cudaFree(a.kv.k); cudaFree(a.kv.v); cudaFree(q); cudaFree(out); cudaFree(dpages); cudaFree(dseq); cudaFree(didx); cudaFree((void *)a.seqs);
    free(pages); free(seq); free(idx);
}

int main(int argc, char **argv) {
    bool do_check = argc < 2, do_time = argc < 2, small = false;
    for (int i = 1; i < argc; i++) {
        do_check |= !strcmp(argv[i], "check");
        do_time |= !strcmp(argv[i], "time");
        small |= !strcmp(argv[i], "small");
        if (strcmp(argv[i], "check") && strcmp(argv[i], "time") && strcmp(argv[i], "small")) {
            fprintf(stderr, "usage: prefill_check [check] [time] [small]\n");
            return 2;
        }
    }
    cudaDeviceProp p;
    CUDA(cudaGetDeviceProperties(&p, 0));
    env.n_sm = p.multiProcessorCount;
    env.cc = p.major * 10 + p.minor;
    env.smem_max = (int64_t)p.sharedMemPerBlockOptin;
    CUDA(cudaStreamCreate(&env.stream));
    const lg_kv_geom widest = { LG_DTYPE_BF16, 8, 256, 512 };
    env.scratch_bytes = lg_cuda_prefill_scratch(&env, 32768, 32, &widest);
    CUDA(cudaMalloc(&env.scratch, (size_t)env.scratch_bytes));
    printf("%s, %d multiprocessors, compute capability %d, %lld bytes of shared memory a block\n", p.name, env.n_sm, env.cc, (long long)env.smem_max);
    seed = 20261125;
    if (do_check || small) {
        static const lg_dtype types[] = { LG_DTYPE_BF16, LG_DTYPE_F16, LG_DTYPE_KV8, LG_DTYPE_F32 };
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            int64_t keys = 0;
            for (int r = 0; r < MAX_RUNS; r++) keys += cases[i].runs[r].len;
            if (small && keys > 450) continue;
            for (size_t t = 0; t < sizeof types / sizeof *types; t++) check(&cases[i], types[t]);
        }
        printf("%d runs, %d failed\n", n_run, n_bad);
    }
    if (do_time)
        for (size_t i = 0; i < sizeof timings / sizeof *timings; i++) time_one(&timings[i]);
    return n_bad > 0;
}
