/* Prefill attention in f32 throughout (no TF32, q not rounded): every cache dtype, head sizes 1 to 256. Serves --compute f32, f32 caches
 * and the head sizes that prefill_mma.cu does not know.
 *
 * 256 threads, tile 64 packed rows x one page. Thread (ty, tx) owns rows ty+16i and columns tx+16j of the scores, and columns
 * 4tx + 64c + 0..3 of the output. K and V take turns in one buffer. Rows are padded by 16 bytes (an odd number of 16-byte chunks), columns
 * behind head_dim are zero. */
#include "ops/cuda/kv.cuh"
#include "ops/cuda/prefill.cuh"

enum { BM = 64, THREADS = 256, P_PITCH = LG_PAGE + 4 };

static int64_t smem_bytes(int nc) { return (int64_t)4 * (BM + (BM + LG_PAGE) * (nc * 64 + 4) + BM * P_PITCH); }

template <int DTYPE, int NC>
static __device__ __forceinline__ void page_load(float *dst, const uint8_t *src, int64_t row_bytes, int n_ok, int head_dim) {
    constexpr int W = NC * 64;
#pragma unroll 8
    for (int i = (int)threadIdx.x; i < LG_PAGE * W; i += THREADS) {
        const int r = i / W, d = i % W;
        dst[r * (W + 4) + d] = r < n_ok && d < head_dim ? lg_kv_get<DTYPE>(src + r * row_bytes, d, head_dim) : 0.0f;
    }
}

template <int DTYPE, int NC>
__global__ void __launch_bounds__(THREADS, NC <= 2 ? 2 : 1) f32_kernel(const __grid_constant__ lg_prefill_args a) {
    constexpr int W = NC * 64, PITCH = W + 4;
    extern __shared__ __align__(16) float fsm[];
    int32_t *lim = (int32_t *)fsm;
    float *qs = fsm + BM, *kv = qs + BM * PITCH, *ps = kv + LG_PAGE * PITCH;
    const int tid = (int)threadIdx.x, tx = tid % 16, ty = tid / 16, head = (int)blockIdx.x / a.n_item;
    const lg_prefill_item w = a.item[(int)blockIdx.x - head * a.n_item];
    const int64_t *idx = a.idx + w.row0;
    const int p_end = min(w.p0 + BM, w.n_p), last = (int)idx[(p_end - 1) / a.group], sees_least = (int)idx[w.p0 / a.group];
    const int32_t *page = a.seqs[w.seq].page;

    for (int i = tid; i < BM; i += THREADS) lim[i] = w.p0 + i < p_end ? (int32_t)idx[(w.p0 + i) / a.group] : -1;
    for (int i = tid; i < BM * W; i += THREADS) {
        const int m = i / W, d = i % W, p = w.p0 + m, row = p / a.group, g = p - row * a.group;
        qs[m * PITCH + d] = p < p_end && d < a.head_dim
            ? a.q[((int64_t)(w.row0 + row) * a.n_head + head * a.group + g) * a.head_dim + d] : 0.0f;
    }

    float o[4][NC][4], m[4], l[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        m[i] = -INFINITY;
        l[i] = 0.0f;
#pragma unroll
        for (int c = 0; c < NC; c++) o[i][c][0] = o[i][c][1] = o[i][c][2] = o[i][c][3] = 0.0f;
    }
    for (int n = 0; n < w.n_page; n++) {
        const int t0 = n * LG_PAGE, n_ok = min(LG_PAGE, last + 1 - t0);
        const int64_t at = ((int64_t)page[n] * a.n_head_kv + head) * LG_PAGE * a.row_bytes;
        __syncthreads(); /* V and P of page n-1 are consumed */
        page_load<DTYPE, NC>(kv, a.k + at, a.row_bytes, n_ok, a.head_dim);
        __syncthreads();
        float s[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
#pragma unroll 1
        for (int d = 0; d < W; d += 4) {
            float4 q4[4], k4[4];
#pragma unroll
            for (int i = 0; i < 4; i++) q4[i] = *(const float4 *)(qs + (ty + 16 * i) * PITCH + d);
#pragma unroll
            for (int j = 0; j < 4; j++) k4[j] = *(const float4 *)(kv + (tx + 16 * j) * PITCH + d);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    s[i][j] = fmaf(q4[i].x, k4[j].x, s[i][j]);
                    s[i][j] = fmaf(q4[i].y, k4[j].y, s[i][j]);
                    s[i][j] = fmaf(q4[i].z, k4[j].z, s[i][j]);
                    s[i][j] = fmaf(q4[i].w, k4[j].w, s[i][j]);
                }
        }
        const bool masked = t0 + LG_PAGE - 1 > sees_least;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int keep = lim[ty + 16 * i] - t0;
            float x = m[i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = masked && tx + 16 * j > keep ? -INFINITY : s[i][j] * a.scale;
                x = fmaxf(x, s[i][j]);
            }
#pragma unroll
            for (int step = 8; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
            const float base = x == -INFINITY ? 0.0f : x, corr = expf(m[i] - base);
            float sum = 0.0f;
            m[i] = x;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = expf(s[i][j] - base);
                sum += s[i][j];
                ps[(ty + 16 * i) * P_PITCH + tx + 16 * j] = s[i][j];
            }
            l[i] = fmaf(l[i], corr, sum);
#pragma unroll
            for (int c = 0; c < NC; c++) {
                o[i][c][0] *= corr;
                o[i][c][1] *= corr;
                o[i][c][2] *= corr;
                o[i][c][3] *= corr;
            }
        }
        __syncthreads(); /* K is consumed, P is written */
        page_load<DTYPE, NC>(kv, a.v + at, a.row_bytes, n_ok, a.head_dim);
        __syncthreads();
#pragma unroll 1
        for (int k = 0; k < LG_PAGE; k += 4) {
            float p4[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 x = *(const float4 *)(ps + (ty + 16 * i) * P_PITCH + k);
                p4[i][0] = x.x;
                p4[i][1] = x.y;
                p4[i][2] = x.z;
                p4[i][3] = x.w;
            }
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
#pragma unroll
                for (int c = 0; c < NC; c++) {
                    const float4 v = *(const float4 *)(kv + (k + kk) * PITCH + 64 * c + 4 * tx);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        o[i][c][0] = fmaf(p4[i][kk], v.x, o[i][c][0]);
                        o[i][c][1] = fmaf(p4[i][kk], v.y, o[i][c][1]);
                        o[i][c][2] = fmaf(p4[i][kk], v.z, o[i][c][2]);
                        o[i][c][3] = fmaf(p4[i][kk], v.w, o[i][c][3]);
                    }
                }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float sum = l[i];
#pragma unroll
        for (int step = 8; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        const int p = w.p0 + ty + 16 * i;
        if (p >= p_end) continue;
        const int row = p / a.group, g = p - row * a.group;
        float *dst = a.out + ((int64_t)(w.row0 + row) * a.n_head + head * a.group + g) * a.head_dim;
#pragma unroll
        for (int c = 0; c < NC; c++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (64 * c + 4 * tx + e < a.head_dim) dst[64 * c + 4 * tx + e] = o[i][c][e] / sum;
    }
}

template <int DTYPE, int NC>
static void launch(const lg_cuda_env *e, const lg_prefill_args *a) {
    cudaFuncSetAttribute(f32_kernel<DTYPE, NC>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem_bytes(NC));
    f32_kernel<DTYPE, NC><<<(unsigned)(a->n_item * a->n_head_kv), THREADS, (size_t)smem_bytes(NC), e->stream>>>(*a);
}

template <int DTYPE>
static void launch_head(const lg_cuda_env *e, const lg_prefill_args *a) {
    switch ((a->head_dim + 63) / 64) {
    case 1: launch<DTYPE, 1>(e, a); break;
    case 2: launch<DTYPE, 2>(e, a); break;
    case 3: launch<DTYPE, 3>(e, a); break;
    default: launch<DTYPE, 4>(e, a); break;
    }
}

bool lg_prefill_f32_fits(const lg_cuda_env *e, const lg_kv_geom *g) {
    return g->head_dim > 0 && g->head_dim <= 256 && smem_bytes((g->head_dim + 63) / 64) <= e->smem_max;
}

int lg_prefill_f32_rows(const lg_kv_geom *g) {
    (void)g;
    return BM;
}

void lg_prefill_f32_launch(const lg_cuda_env *e, const lg_kv_geom *g, lg_prefill_args *a) {
    switch (g->dtype) {
    case LG_DTYPE_F32: launch_head<LG_DTYPE_F32>(e, a); break;
    case LG_DTYPE_F16: launch_head<LG_DTYPE_F16>(e, a); break;
    case LG_DTYPE_BF16: launch_head<LG_DTYPE_BF16>(e, a); break;
    default: launch_head<LG_DTYPE_KV8>(e, a); break;
    }
}
