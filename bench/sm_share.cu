/* How a GPU's memory is shared among its multiprocessors (docs/speed-cuda.md, 13): one block a multiprocessor streams pieces of 16 KB by bulk
 * copies into a ring and does nothing else. Equal ranges, ranges by measured speed, pieces dealt out as blocks come free, and ranges as large as
 * what each multiprocessor was dealt on average.
 *     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a bench/sm_share.cu -o sm_share && ./sm_share     (sm_90 and later, 16 GB free) */
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <vector>

#define CHECK(x) do { const cudaError_t e = (x); if (e != cudaSuccess) { fprintf(stderr, "sm_share: line %d: %s\n", __LINE__, cudaGetErrorString(e)); exit(1); } } while (0)
enum { PIECE = 16384, DEPTH = 9, MOST = 512, REPS = 20 };

static __device__ uint32_t shared_of(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ uint64_t now() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
static __device__ void ask(uint32_t to, const uint8_t *from, uint32_t bar) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(PIECE) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(PIECE), "r"(bar) : "memory");
}
static __device__ void wait(uint32_t bar, uint32_t parity) {
    uint32_t done = 0;
    while (!done) asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
}

/* first: [multiprocessors + 1] pieces of each, or NULL: the next piece is the counter's. took: pieces of each so far. */
static __global__ void stream(const uint8_t *from, const int *first, int n_piece, int *counter, uint64_t *began, uint64_t *ended, int *took) {
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ __align__(8) uint64_t bar[DEPTH];
    if (threadIdx.x) return;
    int sm, asked = 0, done = 0;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    began[sm] = now();
    for (int i = 0; i < DEPTH; i++) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_of(&bar[i])));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    int at = first ? first[sm] : 0;
    const int end = first ? first[sm + 1] : n_piece;
    bool more = true;
    for (;;) {
        while (more && asked < done + DEPTH) {
            const int piece = first ? at++ : atomicAdd(counter, 1);
            more = piece < end;
            if (!more) break;
            ask(shared_of(ring + asked % DEPTH * PIECE), from + (size_t)piece * PIECE, shared_of(&bar[asked % DEPTH]));
            asked++;
        }
        if (done == asked) break;
        wait(shared_of(&bar[done % DEPTH]), done / DEPTH & 1);
        done++;
    }
    ended[sm] = now();
    took[sm] += done;
}

int main() {
    cudaDeviceProp prop;
    const size_t total = (size_t)16 << 30;
    uint8_t *buf;
    int *first, *counter, *dealt;
    uint64_t *began, *ended;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    const int n = prop.multiProcessorCount;
    if (n >= MOST) return fprintf(stderr, "sm_share: more than %d multiprocessors\n", MOST), 1;
    CHECK(cudaMalloc(&buf, total));
    CHECK(cudaMemset(buf, 1, total));
    CHECK(cudaMallocManaged(&first, sizeof(int) * (MOST + 1)));
    CHECK(cudaMalloc(&counter, sizeof(int)));
    CHECK(cudaMallocManaged(&dealt, sizeof(int) * MOST));
    CHECK(cudaMallocManaged(&began, sizeof(uint64_t) * MOST));
    CHECK(cudaMallocManaged(&ended, sizeof(uint64_t) * MOST));
    CHECK(cudaFuncSetAttribute(stream, cudaFuncAttributeMaxDynamicSharedMemorySize, DEPTH * PIECE));
    /* Median time of a launch in us, from the first block's start to the last one's end; mean: when each ended. */
    const auto run = [&](size_t bytes, const std::vector<double> *weight, std::vector<double> *mean) {
        const int n_piece = (int)(bytes / PIECE);
        double sum = 0, acc = 0;
        std::vector<double> took;
        for (int i = 0; weight && i < n; i++) sum += (*weight)[i];
        for (int i = 0; i <= n; i++) {
            first[i] = weight ? (int)llround(acc / sum * n_piece) : 0;
            if (weight && i < n) acc += (*weight)[i];
        }
        mean->assign(n, 0);
        std::fill(dealt, dealt + n, 0);
        size_t off = 0;
        for (int r = 0; r < REPS; r++, off = off + 2 * bytes > total ? 0 : off + bytes) {
            CHECK(cudaMemset(counter, 0, sizeof(int)));
            stream<<<n, 32, DEPTH * PIECE>>>(buf + off, weight ? first : NULL, n_piece, counter, began, ended, dealt);
            CHECK(cudaDeviceSynchronize());
            const uint64_t from = *std::min_element(began, began + n);
            took.push_back((double)(*std::max_element(ended, ended + n) - from) * 1e-3);
            for (int i = 0; i < n; i++) (*mean)[i] += (double)(ended[i] - from) * 1e-3 / REPS;
        }
        std::sort(took.begin(), took.end());
        return took[REPS / 2];
    };
    std::vector<double> even(n, 1.0), mean, none;
    printf("%s, %d multiprocessors\n", prop.name, n);
    run((size_t)235 << 20, &even, &none);
    for (const size_t mb : { 33u, 64u, 117u, 235u, 537u }) {
        const size_t bytes = mb << 20;
        std::vector<double> weight = even;
        const double equal = run(bytes, &even, &mean);
        std::vector<double> sorted = mean, now = mean;
        std::sort(sorted.begin(), sorted.end());
        for (int turn = 0; turn < 4; turn++) {
            for (int i = 0; i < n; i++) weight[i] *= pow(sorted[n / 2] / now[i], 0.7);
            run(bytes, &weight, &now);
        }
        const double by_speed = run(bytes, &weight, &none), free = run(bytes, NULL, &none);
        std::copy(dealt, dealt + n, weight.begin());
        const double least = *std::min_element(weight.begin(), weight.end()), most = *std::max_element(weight.begin(), weight.end());
        printf("%4zu MB: equal ranges %.1f us (%.0f GB/s; multiprocessors end at %.1f to %.1f), by speed %.1f, as blocks come free %.1f, as many as those took (%.2f to %.2f of the mean) %.1f\n",
               mb, equal, (double)bytes / equal * 1e-3, sorted[0], sorted[n - 1], by_speed, free, least / REPS / (double)(bytes / PIECE) * n, most / REPS / (double)(bytes / PIECE) * n,
               run(bytes, &weight, &none));
    }
    return 0;
}
