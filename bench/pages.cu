/* Whether reading one head of a paged cache is slower than reading as many rows in line (docs/speed-cuda-attend.md, 71): pages of 64 tokens, the eight heads of a page side by
 * side, K and V apart; 132 blocks of eight warps that ask for 16 rows of each at a time by bulk copies and do nothing else.
 *     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a bench/pages.cu -o pages && ./pages     (sm_90 and later, 24 GB free)
 * us between events around the launch, mean and least of 20. */
#include <algorithm>
#include "bulk.cuh"

struct args { const uint8_t *k, *v; int64_t stride, n_unit; int bytes, stages; }; /* a unit: `bytes` of K and of V, four to a page, pages `stride` apart */

__global__ void __launch_bounds__(256, 1) read_only(args a) {
    extern __shared__ __align__(128) uint8_t smem[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, size = 2 * a.bytes;
    const uint32_t ring = sm(smem) + warp * a.stages * size, bars = sm(smem) + 8 * a.stages * size + warp * a.stages * 8;
    bars_begin(bars, a.stages);
    const int64_t lo = a.n_unit * blockIdx.x / gridDim.x, hi = a.n_unit * (blockIdx.x + 1) / gridDim.x;
    int64_t next = lo + warp;
    int to = 0;
    auto ask = [&]() {
        if (next < hi && lane == 0) {
            const int64_t at = next / 4 * a.stride + next % 4 * a.bytes;
            expect(bars + 8 * to, size);
            bulk(ring + to * size, a.k + at, a.bytes, bars + 8 * to);
            bulk(ring + to * size + a.bytes, a.v + at, a.bytes, bars + 8 * to);
        }
        next += 8;
        to = to + 1 == a.stages ? 0 : to + 1;
    };
    for (int i = 0; i + 1 < a.stages; i++) ask();
    uint32_t parity = 0;
    int stage = 0;
    for (int64_t u = lo + warp; u < hi; u += 8) {
        wait(bars + 8 * stage, parity >> stage & 1);
        parity ^= 1u << stage;
        __syncwarp();
        ask();
        stage = stage + 1 == a.stages ? 0 : stage + 1;
    }
}

int main() {
    const int64_t total = 24ll << 30;
    uint8_t *kv;
    cudaEvent_t begin, end;
    CK(cudaMalloc(&kv, total));
    CK(cudaMemset(kv, 0, total));
    CK(cudaEventCreate(&begin));
    CK(cudaEventCreate(&end));
    CK(cudaFuncSetAttribute(read_only, cudaFuncAttributeMaxDynamicSharedMemorySize, 220 * 1024));
    static const struct { const char *name; int64_t tokens; int row, stages; } what[] = {
        { "128K tokens, bf16", 131072, 256, 2 }, { "128K tokens, bf16", 131072, 256, 3 }, { "1M tokens, 8 bits", 1048576, 136, 3 },
        { "1M tokens, 8 bits", 1048576, 136, 5 }, { "1M tokens, bf16", 1048576, 256, 2 },
    };
    for (int round = 0; round < 2; round++)
        for (const auto &w : what)
            for (int paged = 0; paged < 2; paged++) {
                const int heads = 8, page = 64 * w.row, layers = (int)std::min<int64_t>(8, total / (2 * w.tokens * w.row * heads));
                const int64_t layer = w.tokens * w.row * heads;
                float least = 1e9f, sum = 0;
                for (int r = 0; r < 24; r++) { /* another layer and head each time, so that L2 holds none of it */
                    const int head = r / layers * 3 % heads;
                    args a = {};
                    a.k = kv + r % layers * 2 * layer + (paged ? (int64_t)head * page : head * w.tokens * w.row);
                    a.v = a.k + layer;
                    a.stride = paged ? (int64_t)page * heads : page;
                    a.n_unit = w.tokens / 16;
                    a.bytes = 16 * w.row;
                    a.stages = w.stages;
                    float ms;
                    CK(cudaEventRecord(begin));
                    read_only<<<132, 256, 8 * w.stages * (2 * a.bytes + 8)>>>(a);
                    CK(cudaEventRecord(end));
                    CK(cudaEventSynchronize(end));
                    CK(cudaEventElapsedTime(&ms, begin, end));
                    if (r >= 4) least = std::min(least, ms), sum += ms;
                }
                const double mb = 2.0 * (double)w.tokens * w.row / 1e6, us = sum / 20 * 1e3;
                printf("%-18s %-8s stages %d: %6.1f us (least %5.1f) %6.1f MB %5.2f TB/s\n", w.name, paged ? "pages" : "in line", w.stages, us, (double)least * 1e3, mb, mb / us);
            }
    return 0;
}
