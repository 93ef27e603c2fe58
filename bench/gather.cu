/* What it takes to load cache rows and do nothing else (docs/speed-cuda-attend.md, 66): blocks of eight warps, two or three units of 16 tokens a warp, by bulk copies;
 * rows in line, gathered by id, or (mix) one head in line and sets of seven gathered, in blocks of their own; K and V apart, as they lie, or side by side.
 *     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a bench/gather.cu -o gather && ./gather     (sm_90 and later, 4 GB free)
 * us between events around the launch. */
#include <vector>
#include <algorithm>
#include "bulk.cuh"
struct args { const uint8_t *k, *v; const int *ids; int inter, n_inline, n_gather, blocks_inline, stages; int64_t head_rows; };
/* Units: 16 rows in line, or 16 ids of a head. */
__global__ void __launch_bounds__(256, 1) run(args a) {
    extern __shared__ __align__(128) uint8_t smem[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, S = a.stages;
    uint8_t *ring = smem + warp * S * 8192;
    const uint32_t bar0 = sm(smem + 8 * S * 8192) + warp * S * 8;
    bars_begin(bar0, S);
    const bool in = (int)blockIdx.x < a.blocks_inline;
    const int nb = in ? a.blocks_inline : (int)gridDim.x - a.blocks_inline, b = in ? blockIdx.x : blockIdx.x - a.blocks_inline;
    const int64_t total = in ? a.n_inline : a.n_gather, lo = total * b / nb, hi = total * (b + 1) / nb;
    int64_t next = lo + warp;
    int stage = 0, ahead = 0, id = 0, idn = 0;
    if (!in && next < hi) id = a.ids[next * 16 + (lane & 15)];
    if (!in && next + 8 < hi) idn = a.ids[(next + 8) * 16 + (lane & 15)];
    auto issue = [&]() {
        if (next < hi) {
            const uint32_t to = sm(ring + stage * 8192), bar = bar0 + 8 * stage;
            if (lane == 0) expect(bar, 8192);
            __syncwarp();
            if (in) {
                const int64_t row = next * 16;
                if (lane == 0) {
                    if (a.inter) bulk(to, a.k + row * 512, 8192, bar);
                    else { bulk(to, a.k + row * 256, 4096, bar); bulk(to + 4096, a.v + row * 256, 4096, bar); }
                }
            } else {
                const int64_t row = (next / 256) * a.head_rows + id;
                if (a.inter) { if (lane < 16) bulk(to + lane * 512, a.k + row * 512, 512, bar); }
                else bulk(to + lane * 256, (lane < 16 ? a.k : a.v) + row * 256, 256, bar);
                id = idn;
                if (next + 16 < hi) idn = a.ids[(next + 16) * 16 + (lane & 15)];
            }
        }
        next += 8;
        stage = stage + 1 == S ? 0 : stage + 1;
    };
    for (; ahead + 1 < S; ahead++) issue();
    uint32_t parity = 0; int st = 0; float sum = 0;
    for (int64_t u = lo + warp; u < hi; u += 8) {
        wait(bar0 + 8 * st, parity >> st & 1);
        parity ^= 1u << st;
        __syncwarp();
        issue();
        sum += *(float *)(ring + st * 8192 + lane * 256);
        st = st + 1 == S ? 0 : st + 1;
    }
    if (sum == 1.2345f) printf("x");
}
int main() {
    const int64_t T = 131072, H = 8, L = 6;            /* a layer: 8 heads */
    const int64_t rows = T * H * L, bytes = rows * 512;
    uint8_t *kv; int *ids;
    CK(cudaMalloc(&kv, bytes)); CK(cudaMemset(kv, 0, bytes));
    std::vector<int> host(H * L * 4096);
    uint64_t x = 88172645463325252ull;
    for (int h = 0; h < H * L; h++) {
        std::vector<int> t(T); for (int i = 0; i < T; i++) t[i] = i;
        for (int i = 0; i < 4096; i++) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; std::swap(t[i], t[i + x % (T - i)]); }
        std::sort(t.begin(), t.begin() + 4096);
        std::copy(t.begin(), t.begin() + 4096, host.begin() + h * 4096);
    }
    CK(cudaMalloc(&ids, host.size() * 4)); CK(cudaMemcpy(ids, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
    cudaEvent_t e0, e1; cudaEventCreate(&e0); cudaEventCreate(&e1);
    CK(cudaFuncSetAttribute(run, cudaFuncAttributeMaxDynamicSharedMemorySize, 210 * 1024));
    auto time = [&](const char *name, int inter, int64_t n_inline, int64_t n_gather, int blocks_inline, int stages) {
        float best = 1e9, sum = 0; int n = 0;
        for (int r = 0; r < 30; r++) {
            const int l = r % L;
            args a{};
            a.inter = inter; a.n_inline = n_inline; a.n_gather = n_gather; a.blocks_inline = blocks_inline; a.stages = stages; a.head_rows = T;
            a.k = kv + l * T * H * 512; a.v = a.k + T * H * 256; a.ids = ids + l * H * 4096;
            if (n_gather > 8 * 256) { a.k = kv; a.v = kv + rows * 256; a.ids = ids; }
            else if (n_inline && n_gather) { /* the gathered heads come behind the one in line: heads 1..7 */ a.ids += 4096; }
            cudaEventRecord(e0);
            run<<<132, 256, 8 * stages * 8192 + 8 * stages * 8>>>(a);
            cudaEventRecord(e1); CK(cudaEventSynchronize(e1));
            float ms; cudaEventElapsedTime(&ms, e0, e1);
            if (r >= 6) { best = std::min(best, ms); sum += ms; n++; }
        }
        const double mb = (n_inline + n_gather) * 8192 / 1e6;
        printf("%-28s stages %d blocks %3d: %6.1f us (min %5.1f) %6.1f MB %5.2f TB/s\n", name, stages, blocks_inline, sum / n * 1e3, best * 1e3, mb, mb / (sum / n * 1e3));
    };
    for (int round = 0; round < 2; round++)
        for (int s = 2; s <= 3; s++) {
            time("in line apart 537MB", 0, T * H / 16, 0, 132, s);
            time("in line together 537MB", 1, T * H / 16, 0, 132, s);
            time("gather apart 403MB", 0, 0, H * L * 256, 0, s);
            time("gather together 403MB", 1, 0, H * L * 256, 0, s);
            time("gather apart 16.8MB", 0, 0, 8 * 256, 0, s);
            time("gather together 16.8MB", 1, 0, 8 * 256, 0, s);
            for (int b = 92; b <= 110; b += 6) {
                time("mix apart", 0, T / 16, 7 * 256, b, s);
                time("mix together", 1, T / 16, 7 * 256, b, s);
            }
            time("in line apart 67MB", 0, T / 16, 0, 132, s);
            time("in line apart 82MB", 0, T / 16 + 1792, 0, 132, s);
            time("in line together 82MB", 1, T / 16 + 1792, 0, 132, s);
        }
    return 0;
}
