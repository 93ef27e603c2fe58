/* Attention mass (lg_op_observe): what each cached token gets of the attention of a few rows, by KV head. Lanes are (row, query head of the
 * KV head). Two passes over K, both of products of 64 lanes with 128 tokens in f32: the first finds each lane's largest score and its sum of
 * exponentials, in parts of OBS_RUN tiles that a small kernel joins, the second adds up the lanes' probabilities by token. Every sum has a
 * fixed order that depends on shapes alone. */
#include "ops/cuda/decode_ptx.cuh"
#include "ops/cuda/kv.cuh"

enum { OBS_LANES = 64, OBS_TOKENS = 128, OBS_DIMS = 16, OBS_THREADS = 128, OBS_RUN = 8, OBS_OWN = 8 }; /* own: lanes and tokens of a thread */

typedef struct obs_args {
    float *mass;
    const float *q;
    const uint8_t *k;
    lg_kv_geom g;
    const lg_cuda_seq *seq;
    const int64_t *idx;
    float2 *part, *peak; /* [n_kv][n_part][lanes] (largest score, sum); [n_kv][lanes] (largest score, weight of the lane over its sum) */
    int64_t ld, len;
    int32_t n_head, group, lanes, n_part;
    float scale2;        /* of scores, for powers of 2 */
    bool wide;           /* rows may be read in 16-byte pieces (KV8: 4) */
} obs_args;

typedef struct obs_shared {
    __align__(16) float q[OBS_DIMS][OBS_LANES + 4], k[OBS_DIMS][OBS_TOKENS + 4];
    float sum[OBS_THREADS / 32][OBS_TOKENS];
} obs_shared;

/* Elements [d0, d0 + OBS_DIMS) of a cache row; 0 past its end. */
template <int DTYPE>
static __device__ __forceinline__ void obs_load(float (&x)[OBS_DIMS], const uint8_t *row, int d0, int d, bool wide) {
    if (wide && d0 + OBS_DIMS <= d) {
        enum { BYTES = DTYPE == LG_DTYPE_KV8 ? 1 : DTYPE == LG_DTYPE_F32 ? 4 : 2 };
        __align__(16) uint8_t raw[OBS_DIMS * BYTES];
#pragma unroll
        for (int i = 0; i < OBS_DIMS * BYTES; i += BYTES == 1 ? 4 : 16) {
            if (BYTES == 1) *(uint32_t *)(void *)(raw + i) = *(const uint32_t *)(const void *)(row + d0 + i);
            else *(uint4 *)(void *)(raw + i) = *(const uint4 *)(const void *)(row + d0 * BYTES + i);
        }
        const float scale = BYTES == 1 ? __half2float(((const __half *)(const void *)(row + d))[d0 >> 5]) : 1.0f;
#pragma unroll
        for (int i = 0; i < OBS_DIMS; i++) x[i] = BYTES == 1 ? (float)(int8_t)raw[i] * scale : lg_kv_get<BYTES == 1 ? LG_DTYPE_F32 : DTYPE>(raw, i, d);
        return;
    }
#pragma unroll
    for (int i = 0; i < OBS_DIMS; i++) x[i] = d0 + i < d ? lg_kv_get<DTYPE>(row, d0 + i, d) : 0.0f;
}

/* The tokens of a thread: two runs of four. */
static __device__ __forceinline__ int obs_token(int j) { return (int)threadIdx.x % 16 * 4 + j % 4 + j / 4 * (OBS_TOKENS / 2); }
static __device__ __forceinline__ int obs_lane(int i) { return (int)threadIdx.x / 16 * OBS_OWN + i; }

/* q . k of this thread's lanes and tokens: all threads. */
template <int DTYPE>
static __device__ __forceinline__ void obs_scores(const obs_args &a, obs_shared *sh, int head, int lane0, int64_t t0, float (&s)[OBS_OWN][OBS_OWN]) {
    const int tid = (int)threadIdx.x, d = a.g.head_dim, lane = lane0 + tid / 2, half = tid % 2 * (OBS_DIMS / 2);
    const int64_t t = t0 + tid < a.len ? t0 + tid : a.len - 1; /* (what is past the end counts for nothing) */
    const uint8_t *row = a.k + lg_kv_at(a.g, a.seq->page[t / LG_PAGE], head, t % LG_PAGE);
    const float *q = a.q + ((int64_t)(lane / a.group) * a.n_head + head * a.group + lane % a.group) * d;
    float k[OBS_DIMS], p[OBS_DIMS / 2];
#pragma unroll
    for (int i = 0; i < OBS_OWN; i++)
#pragma unroll
        for (int j = 0; j < OBS_OWN; j++) s[i][j] = 0;
    for (int d0 = -OBS_DIMS; d0 < d; d0 += OBS_DIMS) { /* loads run one round ahead */
        if (d0 >= 0) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < OBS_DIMS; i++) sh->k[i][tid] = k[i];
#pragma unroll
            for (int i = 0; i < OBS_DIMS / 2; i++) sh->q[half + i][tid / 2] = p[i];
            __syncthreads();
        }
        if (d0 + OBS_DIMS < d) {
            obs_load<DTYPE>(k, row, d0 + OBS_DIMS, d, a.wide);
#pragma unroll
            for (int i = 0; i < OBS_DIMS / 2; i++) p[i] = lane < a.lanes && d0 + OBS_DIMS + half + i < d ? q[d0 + OBS_DIMS + half + i] : 0.0f;
        }
        if (d0 < 0) continue;
#pragma unroll
        for (int e = 0; e < OBS_DIMS; e++) {
            const float4 x0 = *(const float4 *)(const void *)&sh->q[e][obs_lane(0)], x1 = *(const float4 *)(const void *)&sh->q[e][obs_lane(4)];
            const float4 y0 = *(const float4 *)(const void *)&sh->k[e][obs_token(0)], y1 = *(const float4 *)(const void *)&sh->k[e][obs_token(4)];
            const float x[OBS_OWN] = { x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w }, y[OBS_OWN] = { y0.x, y0.y, y0.z, y0.w, y1.x, y1.y, y1.z, y1.w };
#pragma unroll
            for (int i = 0; i < OBS_OWN; i++)
#pragma unroll
                for (int j = 0; j < OBS_OWN; j++) s[i][j] = fmaf(x[i], y[j], s[i][j]);
        }
    }
}

/* The last token that a lane sees, counted from t0; below 0: none. */
static __device__ __forceinline__ int obs_last(const obs_args &a, int lane, int64_t t0) {
    if (lane >= a.lanes) return -1;
    const int64_t n = a.idx[lane / a.group] - t0;
    return n < OBS_TOKENS ? (int)n : OBS_TOKENS;
}

/* A block: OBS_RUN tiles of tokens, a tile of lanes, a head. */
template <int DTYPE>
static __global__ void __launch_bounds__(OBS_THREADS, 3) obs_peaks(const __grid_constant__ obs_args a) {
    LG_SMEM(smem);
    const int head = (int)blockIdx.z, lane0 = (int)blockIdx.y * OBS_LANES;
    float max[OBS_OWN], sum[OBS_OWN], s[OBS_OWN][OBS_OWN];
#pragma unroll
    for (int i = 0; i < OBS_OWN; i++) {
        max[i] = -3e38f;
        sum[i] = 0;
    }
    for (int r = 0; r < OBS_RUN; r++) {
        const int64_t t0 = ((int64_t)blockIdx.x * OBS_RUN + r) * OBS_TOKENS;
        if (t0 >= a.len) break;
        obs_scores<DTYPE>(a, (obs_shared *)(void *)smem, head, lane0, t0, s);
#pragma unroll
        for (int i = 0; i < OBS_OWN; i++) {
            const int last = obs_last(a, lane0 + obs_lane(i), t0);
            float m = max[i], more = 0;
#pragma unroll
            for (int j = 0; j < OBS_OWN; j++) m = obs_token(j) <= last ? fmaxf(m, s[i][j] * a.scale2) : m;
#pragma unroll
            for (int j = 0; j < OBS_OWN; j++) more += obs_token(j) <= last ? lg_exp2(fmaf(s[i][j], a.scale2, -m)) : 0.0f;
            sum[i] = sum[i] * lg_exp2(max[i] - m) + more;
            max[i] = m;
        }
    }
#pragma unroll
    for (int i = 0; i < OBS_OWN; i++) {
        for (int x = 8; x; x >>= 1) { /* the 16 threads of the lane */
            const float m = __shfl_xor_sync(0xffffffffu, max[i], x), n = __shfl_xor_sync(0xffffffffu, sum[i], x), top = fmaxf(max[i], m);
            sum[i] = sum[i] * lg_exp2(max[i] - top) + n * lg_exp2(m - top);
            max[i] = top;
        }
        const int lane = lane0 + obs_lane(i);
        if (threadIdx.x % 16 == 0 && lane < a.lanes) a.part[((int64_t)head * a.n_part + blockIdx.x) * a.lanes + lane] = make_float2(max[i], sum[i]);
    }
}

/* A thread: a lane of a head. */
static __global__ void obs_join(const __grid_constant__ obs_args a) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, head = i / a.lanes;
    if (head >= a.g.n_head_kv) return;
    const float2 *part = a.part + head * a.n_part * a.lanes + i % a.lanes;
    float max = -3e38f, sum = 0;
    for (int p = 0; p < a.n_part; p++) max = fmaxf(max, part[(int64_t)p * a.lanes].x);
    for (int p = 0; p < a.n_part; p++) sum += part[(int64_t)p * a.lanes].y * lg_exp2(part[(int64_t)p * a.lanes].x - max);
    a.peak[i] = make_float2(max, sum > 0 ? 1.0f / (sum * (float)a.lanes) : 0.0f);
}

/* A block: a tile of tokens of a head, all lanes. */
template <int DTYPE>
static __global__ void __launch_bounds__(OBS_THREADS, 3) obs_mass(const __grid_constant__ obs_args a) {
    LG_SMEM(smem);
    obs_shared *sh = (obs_shared *)(void *)smem;
    const int head = (int)blockIdx.y, tid = (int)threadIdx.x;
    const int64_t t0 = (int64_t)blockIdx.x * OBS_TOKENS;
    float sum[OBS_OWN] = { 0 }, s[OBS_OWN][OBS_OWN];
    for (int lane0 = 0; lane0 < a.lanes; lane0 += OBS_LANES) {
        obs_scores<DTYPE>(a, sh, head, lane0, t0, s);
#pragma unroll
        for (int i = 0; i < OBS_OWN; i++) {
            const int lane = lane0 + obs_lane(i), last = obs_last(a, lane, t0);
            const float2 peak = lane < a.lanes ? a.peak[(int64_t)head * a.lanes + lane] : make_float2(0, 0);
#pragma unroll
            for (int j = 0; j < OBS_OWN; j++) sum[j] += obs_token(j) <= last ? lg_exp2(fmaf(s[i][j], a.scale2, -peak.x)) * peak.y : 0.0f;
        }
    }
#pragma unroll
    for (int j = 0; j < OBS_OWN; j++) {
        const float both = sum[j] + __shfl_xor_sync(0xffffffffu, sum[j], 16);
        if (tid % 32 < 16) sh->sum[tid / 32][obs_token(j)] = both;
    }
    __syncthreads();
    float all = 0;
    for (int w = 0; w < OBS_THREADS / 32; w++) all += sh->sum[w][tid];
    if (t0 + tid < a.len) a.mass[head * a.ld + t0 + tid] = all;
}

static int64_t obs_parts(int64_t len) { return (len + OBS_RUN * OBS_TOKENS - 1) / (OBS_RUN * OBS_TOKENS); }

int64_t lg_cuda_observe_scratch(int64_t n_tok, int64_t len, int32_t n_head) { return n_tok * n_head * (obs_parts(len) + 1) * (int64_t)sizeof(float2); }

template <int DTYPE> static void obs_run(const lg_cuda_env *e, const obs_args &a) {
    const unsigned heads = (unsigned)a.g.n_head_kv, tiles = (unsigned)((a.lanes + OBS_LANES - 1) / OBS_LANES);
    LG_LAUNCH(obs_peaks<DTYPE>, dim3((unsigned)a.n_part, tiles, heads), OBS_THREADS, sizeof(obs_shared), e->stream, a);
    LG_LAUNCH(obs_join, dim3((heads * (unsigned)a.lanes + 63) / 64), 64, 0, e->stream, a);
    LG_LAUNCH(obs_mass<DTYPE>, dim3((unsigned)((a.len + OBS_TOKENS - 1) / OBS_TOKENS), heads), OBS_THREADS, sizeof(obs_shared), e->stream, a);
}

void lg_cuda_observe(const lg_cuda_env *e, const lg_op_observe *o, int64_t len) {
    obs_args a;
    memset(&a, 0, sizeof a);
    if (len < 1 || o->n_tok < 1) return;
    a.mass = o->mass; a.ld = o->ld;
    a.q = o->q;
    a.k = o->kv.k; a.g = o->geom;
    a.seq = (const lg_cuda_seq *)o->seq; a.idx = o->idx;
    a.len = len;
    a.n_head = o->n_head;
    a.group = o->n_head / o->geom.n_head_kv;
    a.lanes = (int32_t)o->n_tok * a.group;
    a.n_part = (int32_t)obs_parts(len);
    a.peak = (float2 *)(void *)e->scratch;
    a.part = a.peak + (int64_t)a.g.n_head_kv * a.lanes;
    a.scale2 = o->scale * 1.44269504f;
    a.wide = a.g.row_bytes % (a.g.dtype == LG_DTYPE_KV8 ? 4 : 16) == 0;
    switch (a.g.dtype) {
    case LG_DTYPE_F32: obs_run<LG_DTYPE_F32>(e, a); break;
    case LG_DTYPE_F16: obs_run<LG_DTYPE_F16>(e, a); break;
    case LG_DTYPE_BF16: obs_run<LG_DTYPE_BF16>(e, a); break;
    default: obs_run<LG_DTYPE_KV8>(e, a); break;
    }
}
