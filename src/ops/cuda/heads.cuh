/* heads.cuh: small kernels of core.cu: what is staged, heads after q k v, rows into the cache, random rows, the largest of a row of logits. */
#ifndef LG_CUDA_HEADS_CUH
#define LG_CUDA_HEADS_CUH
#include "ops/cuda/kv.cuh"
#include "ops/cuda/product.cuh"

template <typename W> static __global__ void k_stage(W *dst, const W *src, int n) {
    lg_pdl_wait();
    lg_pdl_go();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) dst[i] = src[i];
}

/* Cosines and sines of a token for the elements of a lane, as in lg_kv_put_row. */
template <int E> struct angles {
    float c[E], s[E];
    __device__ void load(const float *cs, const float *sn, int d, bool interleaved, int lane) {
#pragma unroll
        for (int i = 0; i < E; i++) {
            const int at = i * 32 + lane, pair = interleaved ? at >> 1 : at % (d / 2);
            c[i] = at < d ? cs[pair] : 1.0f;
            s[i] = at < d ? sn[pair] : 0.0f;
        }
    }
};
/* Pairs of a head by these angles. row: [E*32] of this warp. */
template <int E> static __device__ void rotate(float *v, float *row, const angles<E> &by, int d, bool interleaved, int lane) {
#pragma unroll
    for (int i = 0; i < E; i++) row[i * 32 + lane] = v[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < E; i++) {
        const int at = i * 32 + lane;
        if (at < d) {
            const bool second = interleaved ? (at & 1) : at >= d / 2;
            const float other = row[interleaved ? at ^ 1 : second ? at - d / 2 : at + d / 2];
            v[i] = second ? v[i] * by.c[i] + other * by.s[i] : v[i] * by.c[i] - other * by.s[i];
        }
    }
}

typedef struct finish_args {
    float *q; const float *k, *v;       /* k, v: [n_tok, n_head_kv*head_dim] */
    const float *bq, *bk, *bv, *q_norm, *k_norm; float eps;
    const float *cs, *sn; bool interleaved;
    lg_kv_layer kv; lg_kv_geom g;
    const int32_t *dst_page, *dst_slot;
    int32_t n_head; int64_t n_item;
    float *k_raw, *v_raw;
} finish_args;

/* Bias, head norm, rotation; K and V into the cache. A warp takes one head of one token; E = ceil(head_dim / 32). */
template <int E> static __global__ void __launch_bounds__(128) k_finish(const __grid_constant__ finish_args a) {
    extern __shared__ float rows[]; /* [4][E*32] */
    const int lane = threadIdx.x & 31, d = a.g.head_dim, n_kv = a.g.n_head_kv, per = a.n_head + 2 * n_kv;
    const int64_t item = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5), t = item / per;
    const int j = (int)(item % per);
    const bool live = item < a.n_item, is_q = j < a.n_head, is_k = !is_q && j < a.n_head + n_kv;
    const int h = is_q ? j : is_k ? j - a.n_head : j - a.n_head - n_kv;
    const int64_t row = live && !is_q ? ((int64_t)a.dst_page[t] * n_kv + h) * LG_PAGE + a.dst_slot[t] : 0; /* staged with the step: there before the op before */
    angles<E> turn;
    if (live && (is_q || is_k)) turn.load(a.cs + t * (d / 2), a.sn + t * (d / 2), d, a.interleaved, lane);
    lg_pdl_go(); /* attention may take its place as the blocks of the product leave, and read old rows: ops before this one have ended */
    lg_pdl_wait();
    if (!live) return;
    const float *src = is_q ? a.q + (t * a.n_head + h) * d : (is_k ? a.k : a.v) + (t * n_kv + h) * d;
    const float *bias = is_q ? a.bq : is_k ? a.bk : a.bv, *norm = is_q ? a.q_norm : is_k ? a.k_norm : NULL;
    float v[E], ss = 0;
#pragma unroll
    for (int i = 0; i < E; i++) {
        const int at = i * 32 + lane;
        v[i] = at < d ? src[at] + (bias ? bias[h * d + at] : 0.0f) : 0.0f;
        ss += v[i] * v[i];
    }
    if (norm) {
#pragma unroll
        for (int m = 16; m; m >>= 1) ss += __shfl_xor_sync(0xffffffffu, ss, m);
        const float r = 1.0f / sqrtf(ss / (float)d + a.eps);
#pragma unroll
        for (int i = 0; i < E; i++)
            if (i * 32 + lane < d) v[i] = v[i] * r * norm[i * 32 + lane];
    }
    if (is_k && a.k_raw)
#pragma unroll
        for (int i = 0; i < E; i++) {
            const int at = i * 32 + lane, to = a.interleaved ? (at >> 1) + (at & 1) * (d / 2) : at; /* half order */
            if (at < d) a.k_raw[(t * n_kv + h) * d + to] = v[i];
        }
    if (!is_q && !is_k && a.v_raw)
#pragma unroll
        for (int i = 0; i < E; i++)
            if (i * 32 + lane < d) a.v_raw[(t * n_kv + h) * d + i * 32 + lane] = v[i];
    if (is_q || is_k) rotate<E>(v, rows + (threadIdx.x >> 5) * E * 32, turn, d, a.interleaved, lane);
    if (is_q) {
#pragma unroll
        for (int i = 0; i < E; i++)
            if (i * 32 + lane < d) a.q[(t * a.n_head + h) * d + i * 32 + lane] = v[i];
        return;
    }
    lg_kv_put_row<E>((is_k ? a.kv.k : a.kv.v) + row * a.g.row_bytes, a.g, v, lane);
}

typedef struct write_args {
    lg_kv_layer kv; lg_kv_geom g, src;
    const uint8_t *k, *v;
    const float *cs, *sn; bool interleaved;
    const int32_t *dst_page, *dst_slot;
    int64_t n_item;
} write_args;
static __device__ float load_one(const uint8_t *row, const lg_kv_geom &g, int i) {
    if (g.dtype == LG_DTYPE_F32) return lg_kv_get<LG_DTYPE_F32>(row, i, g.head_dim);
    if (g.dtype == LG_DTYPE_F16) return lg_kv_get<LG_DTYPE_F16>(row, i, g.head_dim);
    if (g.dtype == LG_DTYPE_BF16) return lg_kv_get<LG_DTYPE_BF16>(row, i, g.head_dim);
    return lg_kv_get<LG_DTYPE_KV8>(row, i, g.head_dim);
}
/* A warp takes K and V of one head of one token. */
template <int E> static __global__ void __launch_bounds__(128) k_write(const __grid_constant__ write_args a) {
    extern __shared__ float rows[];
    const int lane = threadIdx.x & 31, d = a.g.head_dim;
    const int64_t item = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5);
    lg_pdl_wait();
    lg_pdl_go();
    if (item >= a.n_item) return;
    const int64_t t = item / a.g.n_head_kv, h = item % a.g.n_head_kv;
    const int64_t to = (((int64_t)a.dst_page[t] * a.g.n_head_kv + h) * LG_PAGE + a.dst_slot[t]) * a.g.row_bytes;
    float k[E], v[E];
#pragma unroll
    for (int i = 0; i < E; i++) {
        const int at = i * 32 + lane;
        const int from = a.interleaved ? (at >> 1) + (at & 1) * (d / 2) : at; /* rows come in half order */
        k[i] = at < d ? load_one(a.k + item * a.src.row_bytes, a.src, from) : 0.0f;
        v[i] = at < d ? load_one(a.v + item * a.src.row_bytes, a.src, at) : 0.0f;
    }
    if (a.cs) {
        angles<E> turn;
        turn.load(a.cs + t * (d / 2), a.sn + t * (d / 2), d, a.interleaved, lane);
        rotate<E>(k, rows + (threadIdx.x >> 5) * E * 32, turn, d, a.interleaved, lane);
    }
    lg_kv_put_row<E>(a.kv.k + to, a.g, k, lane);
    lg_kv_put_row<E>(a.kv.v + to, a.g, v, lane);
}

/* Larger values first, then lower indexes: one 64-bit maximum. */
static __device__ __forceinline__ uint64_t rank_of(float v, int64_t i) {
    uint32_t u = __float_as_uint(v == 0.0f ? 0.0f : v); /* -0 equals 0 */
    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    if (v != v) u = 0;
    return (uint64_t)u << 32 | (uint32_t)(0xffffffffu - (uint32_t)i);
}
static __device__ __forceinline__ uint64_t block_max(uint64_t best) {
    __shared__ uint64_t tmp[32];
#pragma unroll
    for (int m = 16; m; m >>= 1) {
        const uint64_t o = __shfl_xor_sync(0xffffffffu, best, m);
        best = o > best ? o : best;
    }
    if ((threadIdx.x & 31) == 0) tmp[threadIdx.x >> 5] = best;
    __syncthreads();
    best = tmp[0];
    for (int i = 1; i < (int)(blockDim.x >> 5); i++) best = tmp[i] > best ? tmp[i] : best;
    return best;
}
enum { ARG_BLOCKS = 64 };
static __global__ void k_argmax_part(uint64_t *part, const float *logits, int64_t n) {
    lg_pdl_wait();
    lg_pdl_go();
    const float *x = logits + (int64_t)blockIdx.y * n;
    uint64_t best = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        const uint64_t r = rank_of(x[i], i);
        best = r > best ? r : best;
    }
    best = block_max(best);
    if (threadIdx.x == 0) part[(int64_t)blockIdx.y * ARG_BLOCKS + blockIdx.x] = best;
}
static __global__ void k_argmax(int32_t *id, int32_t *draws, const uint64_t *part) { /* draws: [LG_DRAWN_ROWS] */
    lg_pdl_wait();
    lg_pdl_go();
    const uint64_t best = block_max(part[(int64_t)blockIdx.x * ARG_BLOCKS + threadIdx.x]);
    if (threadIdx.x) return;
    id[blockIdx.x] = (int32_t)(0xffffffffu - (uint32_t)best);
    if (blockIdx.x < LG_DRAWN_ROWS) draws[blockIdx.x] = (int32_t)(0xffffffffu - (uint32_t)best);
}

static __device__ __forceinline__ uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
/* A warp fills rows of the page list: uniform, unit variance. */
template <int E> static __global__ void k_random(lg_kv_layer kv, lg_kv_geom g, const int32_t *page, int64_t n_row, uint64_t seed) {
    const int lane = threadIdx.x & 31;
    for (int64_t r = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5; r < n_row; r += (int64_t)gridDim.x * (blockDim.x >> 5)) {
        const int64_t per = (int64_t)g.n_head_kv * LG_PAGE, to = ((int64_t)page[r / per] * per + r % per) * g.row_bytes;
        for (int which = 0; which < 2; which++) {
            float v[E];
#pragma unroll
            for (int i = 0; i < E; i++) {
                const uint64_t u = mix(seed ^ mix((uint64_t)(r * 2 + which) * 1024 + (uint64_t)(i * 32 + lane)));
                v[i] = i * 32 + lane < g.head_dim ? ((float)(u & 0xffff) - 32767.5f) * (1.0f / 18918.0f) : 0.0f;
            }
            lg_kv_put_row<E>((which ? kv.v : kv.k) + to, g, v, lane);
        }
    }
}

#define BY_HEAD(d, X) \
    switch (((d) + 31) / 32) { case 1: X(1); break; case 2: X(2); break; case 3: X(3); break; case 4: X(4); break; case 5: case 6: X(6); break; default: X(8); break; }
#endif
