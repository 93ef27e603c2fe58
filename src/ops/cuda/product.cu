/* Products with weights. Three ways:
 *   decode   up to 16 rows of input (more in turns of 16). Large weights: one row stream.cu and stream_major.cu, several rows stream_codes.cu and (bf16, f16) stream_rows.cu. Else: a block of 8 warps
 *            takes tiles of 16 weight rows in turn; its warps split the columns and stream the weights as tensor-core fragments (stream.cuh), inputs are the columns
 *   exact    compute f32, and shapes or formats the others do not take: f32 multiply-add of exactly dequantised weights
 *   matrix   many rows: cuBLASLt in bf16 (compute f32: f32 without TF32), quantised weights expanded a slice at a time */
#include "ops/cuda/stream.cuh"
#include <stdlib.h>
#include <string.h>

enum { THREADS = 256, WARPS = THREADS / 32, MAX_COLS = 16, X_PAD = 32, PIECE = 32 << 20, SLICE = 64 << 20, FUSED_ROWS = 4,
       HALF_SM = 113 << 10 }; /* shared memory with which two blocks fit on a multiprocessor of 228 KB */
bool lg_cuda_pdl;

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static bool row_major(lg_dtype t) { return t == LG_DTYPE_F32 || t == LG_DTYPE_F16 || t == LG_DTYPE_BF16; }
static int x_stride(int n_chunk) { return n_chunk * LG_CHUNK + X_PAD; } /* elements; the pad keeps 8 rows on different banks */

/* X(dtype) for every format of a weight. */
#define EACH_FORMAT(X) X(LG_DTYPE_F32) X(LG_DTYPE_F16) X(LG_DTYPE_BF16) LG_EACH_QUANT(X)

/* ---- errors, memory, staging ------------------------------------------------------------------------ */
lg_status lg_cuda_fail(lg_error *err, cudaError_t e, const char *what) {
    int device = 0;
    cudaGetDevice(&device);
    cudaGetLastError();
    return lg_base_fail(err, LG_ERR_DEVICE, -1, "device cuda:%d: %s: %s", device, what, cudaGetErrorString(e));
}

lg_status lg_cuda_new(void **out, int64_t bytes, const char *what, lg_error *err) {
    const cudaError_t e = cudaMalloc(out, (size_t)(bytes > 0 ? bytes : 1));
    if (e == cudaSuccess) return LG_OK;
    *out = NULL;
    if (e != cudaErrorMemoryAllocation) return lg_cuda_fail(err, e, what);
    size_t free_bytes = 0, total = 0;
    int device = 0;
    cudaGetLastError();
    cudaGetDevice(&device);
    cudaMemGetInfo(&free_bytes, &total);
    return lg_base_fail(err, LG_ERR_NOMEM, -1, "device cuda:%d: out of memory for %s: %lld bytes asked, %lld of %lld free", device, what,
                        (long long)bytes, (long long)free_bytes, (long long)total);
}

lg_status lg_cuda_push_new(lg_cuda_push *p, cudaStream_t stream, lg_error *err) {
    p->piece = PIECE;
    p->stream = stream;
    for (int i = 0; i < 2; i++) {
        cudaError_t e = cudaHostAlloc((void **)&p->pin[i], PIECE, cudaHostAllocDefault);
        if (e == cudaSuccess) e = cudaEventCreateWithFlags(&p->done[i], cudaEventDisableTiming);
        if (e != cudaSuccess) return lg_cuda_fail(err, e, "pinned memory for uploads");
    }
    return LG_OK;
}

void lg_cuda_push_free(lg_cuda_push *p) {
    for (int i = 0; i < 2; i++) {
        if (p->pin[i]) cudaFreeHost(p->pin[i]);
        if (p->done[i]) cudaEventDestroy(p->done[i]);
    }
}

cudaError_t lg_cuda_push_run(lg_cuda_push *p, void *dst, const void *src, int64_t bytes) {
    cudaError_t e = cudaSuccess;
    for (int64_t at = 0; at < bytes && e == cudaSuccess; at += p->piece) {
        const int64_t n = min64(bytes - at, p->piece);
        const int i = p->turn ^= 1;
        e = cudaEventSynchronize(p->done[i]); /* (an event never recorded is done) */
        if (e != cudaSuccess) break;
        lg_base_copy(p->pin[i], (const uint8_t *)src + at, n);
        e = cudaMemcpyAsync((uint8_t *)dst + at, p->pin[i], (size_t)n, cudaMemcpyHostToDevice, p->stream);
        if (e == cudaSuccess) e = cudaEventRecord(p->done[i], p->stream);
    }
    return e;
}

/* ---- binding ---------------------------------------------------------------------------------------- */
static __device__ __forceinline__ uint32_t mix(uint64_t x) { /* splitmix64 */
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return (uint32_t)((x ^ (x >> 31)) >> 16);
}

template <int T> static __global__ void k_pack(lg_cuda_weight w, const uint8_t *raw, int64_t raw_row, int64_t first_row, int64_t n_row) {
    lg_pack_lane<T>(w, raw, raw_row, first_row, n_row, (int64_t)blockIdx.x * blockDim.x + threadIdx.x);
}

/* Random weights of standard deviation about 0.02: a stand-in for a file's blocks, one block a thread. */
static __device__ void put16(uint8_t *p, float f) {
    const uint16_t h = __half_as_ushort(__float2half(f));
    p[0] = (uint8_t)h;
    p[1] = (uint8_t)(h >> 8);
}
template <int T>
static __global__ void k_random_blocks(uint8_t *raw, int64_t n_block, int block_bytes, uint64_t seed) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_block) return;
    uint8_t *b = raw + i * block_bytes;
    for (int e = 0; e < block_bytes; e++) b[e] = (uint8_t)mix(seed ^ (uint64_t)(i * 256 + e));
    if (T == LG_DTYPE_Q8_0) put16(b, 0.02f / 73.9f);
    if (T == LG_DTYPE_Q4_0) put16(b, 0.02f / 4.6f);
    if (T == LG_DTYPE_Q5_0) put16(b, 0.02f / 9.2f);
    if (T == LG_DTYPE_Q4_1) { put16(b, 0.02f / 4.6f); put16(b + 2, -7.5f * 0.02f / 4.6f); }
    if (T == LG_DTYPE_Q5_1) { put16(b, 0.02f / 9.2f); put16(b + 2, -15.5f * 0.02f / 9.2f); }
    if (T == LG_DTYPE_Q4_K || T == LG_DTYPE_Q5_K) { /* equal scales and minima of 32 */
        const float d = 0.02f / (T == LG_DTYPE_Q4_K ? 4.6f : 9.2f) / 32.0f;
        put16(b, d);
        put16(b + 2, d * (T == LG_DTYPE_Q4_K ? 7.5f : 15.5f));
        for (int e = 0; e < 8; e++) b[4 + e] = (uint8_t)(32 | 2 << 6); /* groups 4-7: top bits 2 on top of .. */
        for (int e = 8; e < 12; e++) b[4 + e] = 0;                     /* .. zero low nibbles: 32 */
    }
    if (T == LG_DTYPE_Q6_K) {
        for (int e = 0; e < 16; e++) b[192 + e] = 32;
        put16(b + 208, 0.02f / 18.5f / 32.0f);
    }
}
template <int T>
static __global__ void k_random_rows(void *out, int64_t n, uint64_t seed) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float v = ((float)(mix(seed ^ (uint64_t)i) & 0xffff) - 32767.5f) * (0.02f / 18918.0f);
    if (T == LG_DTYPE_F32) ((float *)out)[i] = v;
    if (T == LG_DTYPE_F16) ((__half *)out)[i] = __float2half(v);
    if (T == LG_DTYPE_BF16) ((__nv_bfloat16 *)out)[i] = __float2bfloat16(v);
}

static unsigned blocks_of(int64_t n, int per) { return (unsigned)((n + per - 1) / per); }

template <int T>
static cudaError_t fill(lg_cuda_push *p, lg_cuda_weight *w, const uint8_t *data, uint8_t *raw, int64_t raw_row, int64_t piece, uint64_t seed) {
    cudaError_t e = cudaSuccess;
    const lg_dtype_info *info = lg_base_dtype((lg_dtype)T);
    for (int64_t r = 0; r < w->n_tile * 16 && e == cudaSuccess; r += piece) {
        const int64_t n = min64(piece, w->n_tile * 16 - r), real = max64(0, min64(n, w->n_out - r)), bytes = real * raw_row;
        if (data) {
            e = lg_cuda_push_run(p, raw, data + r * raw_row, bytes);
        } else if (bytes) {
            k_random_blocks<T><<<blocks_of(bytes / info->bytes, 256), 256, 0, p->stream>>>(raw, bytes / info->bytes, info->bytes, seed + (uint64_t)r * 1000003u);
            e = cudaGetLastError();
        }
        if (e != cudaSuccess) return e;
        k_pack<T><<<blocks_of(n * w->n_chunk * 4, 256), 256, 0, p->stream>>>(*w, raw, raw_row, r, n);
        e = cudaGetLastError();
    }
    return e;
}

static uint64_t bound;
uint64_t lg_cuda_bound(void) { return __atomic_load_n(&bound, __ATOMIC_ACQUIRE); }

lg_status lg_cuda_weight_bind(lg_cuda_push *p, lg_weight *x, lg_error *err) {
    lg_status st = LG_OK;
    cudaError_t e = cudaSuccess;
    uint8_t *raw = NULL;
    const int64_t raw_row = lg_base_row_bytes(x->dtype, x->n_in);
    static uint64_t seed;
    if (x->packed) return LG_OK;
    if (x->dtype > LG_DTYPE_Q6_K || raw_row <= 0 || x->n_in > INT32_MAX - 256 || x->n_out < 1 || x->n_out > INT32_MAX - 256)
        return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "device cuda: a weight of %lld x %lld, dtype %s", (long long)x->n_out, (long long)x->n_in,
                            lg_base_dtype(x->dtype)->name);
    lg_cuda_weight *w = (lg_cuda_weight *)lg_base_alloc(sizeof *w);
    if (!w) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    w->dtype = x->dtype;
    w->n_out = (int32_t)x->n_out;
    w->n_in = (int32_t)x->n_in;
    w->n_tile = (int32_t)((x->n_out + 15) / 16);
    w->n_chunk = (int32_t)((x->n_in + LG_CHUNK - 1) / LG_CHUNK);
    x->packed = w;
    __atomic_fetch_add(&bound, 1, __ATOMIC_ACQ_REL);
    seed += 0x51ED270B3ull;
    if (row_major(x->dtype)) {
        w->bytes = x->n_out * raw_row;
        LG_TRY(lg_cuda_new((void **)&w->codes, w->bytes, "weights", err));
        const int64_t n = x->n_out * x->n_in;
        if (x->data) e = lg_cuda_push_run(p, w->codes, x->data, w->bytes);
        else if (x->dtype == LG_DTYPE_F32) k_random_rows<LG_DTYPE_F32><<<blocks_of(n, 256), 256, 0, p->stream>>>(w->codes, n, seed);
        else if (x->dtype == LG_DTYPE_F16) k_random_rows<LG_DTYPE_F16><<<blocks_of(n, 256), 256, 0, p->stream>>>(w->codes, n, seed);
        else k_random_rows<LG_DTYPE_BF16><<<blocks_of(n, 256), 256, 0, p->stream>>>(w->codes, n, seed);
    } else {
        int64_t code = 0, high = 0, scale = 0, super = 0;
#define X(T) case T: code = lg_fmt<T>::code_bytes; high = lg_fmt<T>::high_bytes; scale = lg_fmt<T>::scale_bytes; super = lg_fmt<T>::super_bytes; break;
        switch (x->dtype) { LG_EACH_QUANT(X) default: break; }
#undef X
        const int64_t rec = (int64_t)w->n_tile * w->n_chunk, n_code = rec * 64 * code, n_high = rec * 64 * high, n_scale = rec * 16 * scale;
        const int64_t n_super = (int64_t)w->n_tile * ((w->n_chunk + 1) / 2) * 16 * super;
        w->bytes = n_code + n_high + n_scale + n_super; /* each part is a multiple of 256 bytes but the last */
        LG_TRY(lg_cuda_new((void **)&w->codes, w->bytes, "weights", err));
        w->high = w->codes + n_code;
        w->scale = w->high + n_high;
        w->super = w->scale + n_scale;
        int64_t piece = PIECE / raw_row / 16 * 16;
        piece = min64(max64(piece, 16), (int64_t)w->n_tile * 16);
        LG_TRY(lg_cuda_new((void **)&raw, piece * raw_row, "a piece of a weight", err));
#define X(T) case T: e = fill<T>(p, w, (const uint8_t *)x->data, raw, raw_row, piece, seed); break;
        switch (x->dtype) { LG_EACH_QUANT(X) default: break; }
#undef X
    }
    if (e == cudaSuccess) e = cudaGetLastError();
    if (e == cudaSuccess) e = cudaStreamSynchronize(p->stream);
    if (e != cudaSuccess) st = lg_cuda_fail(err, e, "uploading weights");
    x->packed_bytes = w->bytes;
done:
    if (raw) cudaFree(raw);
    if (st != LG_OK) lg_cuda_weight_unbind(x);
    return st;
}

void lg_cuda_weight_unbind(lg_weight *x) {
    lg_cuda_weight *w = (lg_cuda_weight *)x->packed;
    if (!w) return;
    if (w->codes) cudaFree(w->codes);
    lg_base_free(w);
    x->packed = NULL;
    x->packed_bytes = 0;
    __atomic_fetch_add(&bound, 1, __ATOMIC_ACQ_REL);
}

static __global__ void __launch_bounds__(THREADS) k_prepare(uint16_t *xs, float *side, float *inv, const float *x, const int32_t *row, const float *norm, float eps,
                                                            int n_in, int n_chunk, int stride, lg_form f) {
    __shared__ float tmp[WARPS];
    lg_pdl_go(); /* to a product, which reads nothing but weights before its own wait, and starts others only after it */
    lg_pdl_wait();
    const int n = blockIdx.x;
    lg_warp_sum(tmp, lg_prepare_row<THREADS>(xs + (int64_t)n * stride, side, (int)(gridDim.x + 1) >> 1, n, x + (row ? row[n] : n) * (int64_t)n_in, norm, n_in, n_chunk, f));
    __syncthreads();
    if (threadIdx.x == 0) inv[n] = norm ? lg_norm_factor<WARPS>(tmp, eps, n_in) : 1.0f;
}
/* Inputs of stream_codes.cu, by blocks (row, PARTS chunks): squares and the largest of each, [row][blocks of a row]. clear: LG_CODES_ROWS * LG_CODES_MOST numbers, made 0. */
enum { PARTS = THREADS * 8 / LG_CHUNK };
static __global__ void __launch_bounds__(THREADS) k_inputs(const __grid_constant__ lg_halves to, float *squares, uint32_t *clear, const float *x, const int32_t *row, const float *norm,
                                                           int n_in, int n_chunk) {
    __shared__ float tmp[WARPS];
    __shared__ uint32_t top[WARPS];
    lg_pdl_go(); /* as k_prepare */
    lg_pdl_wait();
    const int n = blockIdx.x, tid = threadIdx.x, k = ((int)blockIdx.y * THREADS + tid) * 8, at = n * (int)gridDim.y + (int)blockIdx.y;
    const bool live = k < n_in; /* (a multiple of 8) */
    float v[8], ss = 0.0f;
#pragma unroll
    for (int q = 0; q < 2; q++) {
        const float4 y = live ? __ldcg((const float4 *)(x + (row ? row[n] : n) * (int64_t)n_in + k) + q) : make_float4(0, 0, 0, 0);
        const float4 w = live && norm ? __ldcg((const float4 *)(norm + k) + q) : make_float4(1, 1, 1, 1);
        ss += y.x * y.x + y.y * y.y + y.z * y.z + y.w * y.w;
        v[4 * q] = y.x * w.x;
        v[4 * q + 1] = y.y * w.y;
        v[4 * q + 2] = y.z * w.z;
        v[4 * q + 3] = y.w * w.w;
    }
    for (int i = tid; at == 0 && i < LG_CODES_ROWS * LG_CODES_MOST; i += THREADS) clear[i] = 0;
    uint32_t most = lg_put_eight(to, n, k, v, k < n_chunk * LG_CHUNK);
#pragma unroll
    for (int m = 16; m; m >>= 1) most = max(most, __shfl_xor_sync(0xffffffffu, most, m));
    if ((tid & 31) == 0) top[tid >> 5] = most;
    lg_warp_sum(tmp, ss);
    __syncthreads();
    if (tid) return;
    ss = 0.0f;
    for (int i = 0; i < WARPS; i++) {
        ss += tmp[i];
        most = max(most, top[i]);
    }
    squares[at] = ss;
    to.most[at] = most;
}

/* Rows as f16, side by side (lg_beside), each times one power of two that lays its largest number in [512, 1024). factor [n]: what undoes that, times the norm's. */
static __global__ void __launch_bounds__(THREADS) k_halves(uint16_t *xs, float *factor, const float *x, const int32_t *row, const float *norm, float eps, int n_in, int beside) {
    __shared__ float tmp[2][WARPS];
    lg_pdl_go(); /* as k_prepare */
    lg_pdl_wait();
    const int n = blockIdx.x, tid = threadIdx.x;
    const float *from = x + (row ? row[n] : n) * (int64_t)n_in;
    float ss = 0.0f, top = 0.0f;
    auto four_of = [&](int i) {
        float4 v = __ldcg((const float4 *)(from + i));
        ss += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        if (norm) {
            const float4 w = __ldcg((const float4 *)(norm + i));
            v = make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w);
        }
        return v;
    };
#pragma unroll 4
    for (int i = tid * 4; i < n_in; i += THREADS * 4) {
        const float4 v = four_of(i);
        top = fmaxf(fmaxf(top, fmaxf(fabsf(v.x), fabsf(v.y))), fmaxf(fabsf(v.z), fabsf(v.w)));
    }
    lg_warp_sum(tmp[0], ss);
#pragma unroll
    for (int m = 16; m; m >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, m));
    if ((tid & 31) == 0) tmp[1][tid >> 5] = top;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) top = fmaxf(top, tmp[1][i]);
    const float s = top > 0.0f ? lg_group_scale(top) : 1.0f;
#pragma unroll 4
    for (int i = tid * 4; i < n_in; i += THREADS * 4) {
        const float4 v = four_of(i);
        const __half2 a = __floats2half2_rn(v.x * s, v.y * s), b = __floats2half2_rn(v.z * s, v.w * s);
        *(uint2 *)(xs + lg_beside_at(beside, n, i)) = make_uint2(*(const uint32_t *)&a, *(const uint32_t *)&b);
    }
    if (tid == 0) factor[n] = lg_reciprocal_of_power(s) * (norm ? lg_norm_factor<WARPS>(tmp[0], eps, n_in) : 1.0f);
}

/* ---- decode: the product ---------------------------------------------------------------------------- */
typedef struct product_args {
    lg_part p[3];
    int32_t n_part, n_tile, n_in, n_chunk, n_tok, stride;
    int32_t fused, add;      /* fused: the block makes its input from x itself */
    const float *x, *norm;
    const int32_t *row;
    float eps;
    lg_form f;
    const uint16_t *xs;      /* not fused */
    const float *side, *inv;
} product_args;

static __device__ __forceinline__ uint4 stream16(const uint8_t *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
static __device__ __forceinline__ uint2 stream8(const uint8_t *p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
static __device__ __forceinline__ uint32_t stream4(const uint8_t *p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
static __device__ __forceinline__ uint32_t stream2(const uint8_t *p) {
    uint16_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}

/* A tile's piece of columns (32, or a chunk) from memory. */
template <int T>
static __device__ __forceinline__ void read_piece(lg_hold<T> &o, const lg_part &p, int tile, int piece, int n_in, int n_chunk, int lane) {
    typedef lg_fmt<T> F;
    if (F::rows) {
        const int k = piece * 32 + (lane & 3) * 8;
        const int64_t r0 = min(tile * 16 + (lane >> 2), p.n_out - 1), r1 = min(tile * 16 + 8 + (lane >> 2), p.n_out - 1);
        o.c[0] = o.c[1] = make_uint4(0, 0, 0, 0);
        if (k < n_in) {
            o.c[0] = stream16(p.codes + (r0 * n_in + k) * 2);
            o.c[1] = stream16(p.codes + (r1 * n_in + k) * 2);
        }
        return;
    }
    const int64_t rec = (int64_t)tile * n_chunk + piece;
    const int g = lane >> 2;
    if (F::byte) {
        const uint8_t *c = p.codes + rec * 2048 + lane * 16;
#pragma unroll
        for (int i = 0; i < 4; i++) o.c[i & (F::byte ? 3 : 1)] = stream16(c + i * 512);
    } else {
        const uint8_t *c = p.codes + rec * 1024 + lane * 16;
        o.c[0] = stream16(c);
        o.c[1] = stream16(c + 512);
    }
    if (F::five) {
        o.h[0] = stream4(p.high + rec * 256 + lane * 4);
        o.h[1] = stream4(p.high + rec * 256 + 128 + lane * 4);
    }
    if (F::q6) {
        const uint2 a = stream8(p.high + rec * 512 + lane * 8), b = stream8(p.high + rec * 512 + 256 + lane * 8);
        o.h[0] = a.x;
        o.h[1] = b.x;
        o.h[2] = a.y;
        o.h[3] = b.y;
    }
    const uint8_t *s = p.scale + rec * 16 * F::scale_bytes;
    if (F::pair) {
        o.s[0] = stream16(s + g * 16);
        o.s[F::pair ? 1 : 0] = stream16(s + (g + 8) * 16);
    } else {
        const uint2 a = stream8(s + g * 8), b = stream8(s + (g + 8) * 8);
        o.s[0] = make_uint4(a.x, a.y, b.x, b.y);
    }
    if (F::super_bytes) {
        const int64_t at = ((int64_t)tile * ((n_chunk + 1) >> 1) + (piece >> 1)) * 16 + g;
        if (F::k45) {
            o.d[0] = stream4(p.super + at * 4);
            o.d[1] = stream4(p.super + (at + 8) * 4);
        } else {
            o.d[0] = stream2(p.super + at * 2);
            o.d[1] = stream2(p.super + (at + 8) * 2);
        }
    }
}

/* Floats of one turn of the sums of warps: [WARPS][NW][16 rows][2 * pairs]. */
static __host__ __device__ __forceinline__ constexpr int red_floats(int nw, int pairs) { return WARPS * nw * 32 * pairs; }

/* Weights straight into registers, a unit ahead; two blocks fill a multiprocessor. NW = 2: parts 0 and 1 are gate and up, tile for tile;
 * the result is silu(gate)*up. NC: columns / 8, 0: one column. */
template <int T, int NW, int NC>
static __global__ void __launch_bounds__(WARPS * 32, 2) k_direct(const __grid_constant__ product_args a) {
    typedef lg_fmt<T> F;
    constexpr int NT = NC ? NC : 1, C = (F::rows ? 4 : F::byte ? 1 : 2) / NW > 0 ? (F::rows ? 4 : F::byte ? 1 : 2) / NW : 1, TURNS = 2, SIZE = lg_side_floats(F::q6);
    extern __shared__ uint4 shared[];
    const int pairs = (a.n_tok + 1) >> 1, red_size = red_floats(NW, pairs), n_group = T == LG_DTYPE_BF16 ? 0 : a.n_chunk * 4;
    float *red = (float *)shared;                              /* [2][red_size] */
    float *tmp = red + TURNS * red_size;                       /* [16][WARPS] */
    float *inv_s = tmp + 16 * WARPS;                           /* [16] */
    float *side_s = inv_s + 16;                                /* [n_group][pairs][SIZE], where fused */
    uint16_t *xs_s = (uint16_t *)(side_s + n_group * pairs * SIZE); /* [n_tok][stride], where fused */
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const int n_piece = F::rows ? (a.n_in + 31) >> 5 : a.n_chunk;
    const int units = (n_piece + WARPS * C - 1) / (WARPS * C);
    lg_hold<T> cur[NW][C], nxt[NW][C];
    int tile = blockIdx.x;

    auto load = [&](lg_hold<T> (*to)[C], int at, int u) {
        if (at >= a.n_tile) return;
        int which = 0, base = 0;
        if (NW == 1) {
            while (which + 1 < a.n_part && at >= a.p[which].tile_end) which++;
            base = which ? a.p[which - 1].tile_end : 0;
        }
#pragma unroll
        for (int c = 0; c < C; c++) {
            const int piece = (u * C + c) * WARPS + warp;
            if (piece < n_piece)
#pragma unroll
                for (int w = 0; w < NW; w++) read_piece<T>(to[w][c], a.p[NW == 1 ? which : w], at - base, piece, a.n_in, a.n_chunk, lane);
        }
    };

    load(cur, tile, 0);
    lg_pdl_wait();
    lg_pdl_go();
    const uint16_t *xs = a.xs;
    const float *side = a.side, *inv = a.inv;
    if (a.fused) {
        for (int n = 0; n < a.n_tok; n++)
            lg_warp_sum(tmp + n * WARPS, lg_prepare_row<THREADS>(xs_s + n * a.stride, side_s, pairs, n, a.x + (a.row ? a.row[n] : n) * (int64_t)a.n_in, a.norm, a.n_in, a.n_chunk, a.f));
        __syncthreads();
        if (tid < a.n_tok) inv_s[tid] = a.norm ? lg_norm_factor<WARPS>(tmp + tid * WARPS, a.eps, a.n_in) : 1.0f; /* (read behind the barrier of a tile) */
        xs = xs_s;
        side = side_s;
        inv = inv_s;
    }
    /* Lanes of a column beyond n_tok feed zeros. */
    const int n_live = g < a.n_tok ? (NT == 1 || g + 8 >= a.n_tok ? 1 : 2) : 0;
    const uint16_t *x_lane = xs + (int64_t)g * a.stride + t * 8;
    const int64_t stride8 = (int64_t)a.stride * 8;
    int pair[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) pair[n] = (n * 4 + t < pairs ? n * 4 + t : 0) * SIZE;

    for (int turn = 0; tile < a.n_tile; tile += gridDim.x, turn ^= TURNS - 1) {
        float acc[NW][NT][4];
#pragma unroll
        for (int w = 0; w < NW; w++)
#pragma unroll
            for (int n = 0; n < NT; n++) acc[w][n][0] = acc[w][n][1] = acc[w][n][2] = acc[w][n][3] = 0.0f;
        for (int u = 0; u < units; u++) {
            if (u + 1 < units) load(nxt, tile, u + 1);
            else load(nxt, tile + gridDim.x, 0);
#pragma unroll
            for (int c = 0; c < C; c++) {
                const int piece = (u * C + c) * WARPS + warp;
                if (piece < n_piece)
#pragma unroll
                    for (int w = 0; w < NW; w++)
                        lg_multiply<T, NT, NC == 0>(acc[w], cur[w][c], x_lane + piece * (F::rows ? 32 : LG_CHUNK),
                                                 T == LG_DTYPE_BF16 ? NULL : side + (int64_t)piece * (F::rows ? 1 : 4) * pairs * SIZE, pair, pairs * SIZE, stride8, n_live);
            }
#pragma unroll
            for (int w = 0; w < NW; w++)
#pragma unroll
                for (int c = 0; c < C; c++) cur[w][c] = nxt[w][c];
        }
        float *to = red + turn * red_size + warp * NW * 32 * pairs;
#pragma unroll
        for (int w = 0; w < NW; w++)
#pragma unroll
            for (int n = 0; n < NT; n++)
                if (n * 4 + t < pairs) {
                    *(float2 *)(to + (w * 16 + g) * 2 * pairs + n * 8 + 2 * t) = make_float2(acc[w][n][0], acc[w][n][1]);
                    *(float2 *)(to + (w * 16 + g + 8) * 2 * pairs + n * 8 + 2 * t) = make_float2(acc[w][n][2], acc[w][n][3]);
                }
        int which = 0;
        if (NW == 1)
            while (which + 1 < a.n_part && tile >= a.p[which].tile_end) which++;
        const int n_out = a.p[which].n_out, base = which ? a.p[which - 1].tile_end : 0;
        const int r = tid & 15, n = tid >> 4, row = (tile - base) * 16 + r; /* (16 * n_tok threads) */
        const bool live = n < a.n_tok && row < n_out;
        float *out = a.p[which].out + (int64_t)n * n_out + row, old = 0.0f;
        if (NW == 1 && a.add && live) old = *out;
        __syncthreads();
        if (live) {
            const float *all = red + turn * red_size + r * 2 * pairs + n;
            float v[NW];
#pragma unroll
            for (int w = 0; w < NW; w++) {
                v[w] = 0.0f;
#pragma unroll
                for (int k = 0; k < WARPS; k++) v[w] += all[(k * NW + w) * 32 * pairs];
                v[w] *= F::rows ? inv[n] : 16777216.0f * inv[n];
            }
            if (NW == 2) *out = v[0] / (1.0f + __expf(-v[0])) * v[NW - 1];
            else *out = old + v[0];
        }
    }
}

template <int T, int NW>
static int64_t product_smem(const product_args *a, bool fused) {
    const int64_t pairs = (a->n_tok + 1) / 2;
    int64_t n = (int64_t)(2 * red_floats(NW, (int)pairs) + 16 * WARPS + 16) * 4;
    if (fused) n += (T == LG_DTYPE_BF16 ? 0 : (int64_t)a->n_chunk * 4 * pairs * lg_side_floats(lg_fmt<T>::q6) * 4) + (int64_t)a->n_tok * a->stride * 2;
    return n;
}

/* The input's rows into k->x, what stands beside them into k->sums. */
static void prepare(const lg_cuda_env *e, lg_cuda_work *k, const product_args *a) {
    k->twin.of = NULL; /* (it may lie there) */
    lg_cuda_launch(k_prepare, dim3((unsigned)a->n_tok), dim3(THREADS), 0, e->stream, true, (uint16_t *)k->x, k->sums + 16, k->sums, a->x, a->row, a->norm, a->eps, (int)a->n_in,
                   (int)a->n_chunk, (int)a->stride, a->f);
}

template <int T, int NW, int NC>
static void launch_product(const lg_cuda_env *e, lg_cuda_work *k, product_args *a) {
    static bool raised[16];
    void (*kernel)(product_args) = k_direct<T, NW, NC>;
    int device = 0, beside = 1;
    cudaGetDevice(&device);
    if (device < 16 && !raised[device]) {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)min64(e->smem_max, HALF_SM));
        raised[device] = true;
    }
    a->f = lg_form_of<T>();
    a->fused = a->n_tok <= FUSED_ROWS && product_smem<T, NW>(a, true) <= min64(e->smem_max, HALF_SM);
    if (!a->fused) {
        a->xs = (const uint16_t *)k->x;
        a->inv = k->sums;
        a->side = k->sums + 16;
        prepare(e, k, a);
    }
    const size_t smem = (size_t)product_smem<T, NW>(a, a->fused);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&beside, kernel, THREADS, smem);
    lg_cuda_launch(kernel, dim3((unsigned)min64(a->n_tile, (int64_t)(beside > 0 ? beside : 1) * e->n_sm)), dim3(THREADS), smem, e->stream, true, *a);
}

static void run_product(const lg_cuda_env *e, lg_cuda_work *k, lg_dtype t, int nw, product_args *a) {
    const int how = (nw == 2 ? 3 : 0) + (a->n_tok == 1 ? 0 : a->n_tok <= 8 ? 1 : 2);
#define X(T) \
    case T: \
        switch (how) { \
        case 0: launch_product<T, 1, 0>(e, k, a); break; \
        case 1: launch_product<T, 1, 1>(e, k, a); break; \
        case 2: launch_product<T, 1, 2>(e, k, a); break; \
        case 3: launch_product<T, 2, 0>(e, k, a); break; \
        case 4: launch_product<T, 2, 1>(e, k, a); break; \
        default: launch_product<T, 2, 2>(e, k, a); break; \
        } \
        break;
    switch (t) { X(LG_DTYPE_F16) X(LG_DTYPE_BF16) LG_EACH_QUANT(X) default: break; }
#undef X
}

/* ---- exact: f32 ------------------------------------------------------------------------------------- */
/* y[n, row] = sum over the row of w * x, one warp a row, up to four inputs at a time. */
template <int T, int N>
static __global__ void k_exact(float *y, const float *x, lg_cuda_weight w, int64_t ldx, bool add, int n_tok) {
    const int lane = threadIdx.x & 31, n_slot = lg_fmt<T>::rows ? (w.n_in + 7) / 8 : w.n_chunk * 16;
    const int64_t row = (int64_t)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (row >= w.n_out) return;
    for (int n0 = 0; n0 < n_tok; n0 += N) {
        float acc[N];
#pragma unroll
        for (int n = 0; n < N; n++) acc[n] = 0.0f;
        for (int s = lane; s < n_slot; s += 32) {
            float v[8];
            int col[8];
            lg_weight_slot<T>(w, row, s, v, col);
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (col[i] < w.n_in)
#pragma unroll
                    for (int n = 0; n < N; n++)
                        if (n0 + n < n_tok) acc[n] = fmaf(v[i], x[(n0 + n) * ldx + col[i]], acc[n]);
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            float s = acc[n];
#pragma unroll
            for (int m = 16; m; m >>= 1) s += __shfl_xor_sync(0xffffffffu, s, m);
            if (lane == 0 && n0 + n < n_tok) {
                float *to = y + (int64_t)(n0 + n) * w.n_out + row;
                *to = add ? *to + s : s;
            }
        }
    }
}
static void exact(const lg_cuda_env *e, float *y, const float *x, const lg_cuda_weight *w, int64_t n_tok, bool add) {
#define X(T) \
    case T: \
        if (n_tok == 1) k_exact<T, 1><<<blocks_of(w->n_out, 4), 128, 0, e->stream>>>(y, x, *w, w->n_in, add, 1); \
        else k_exact<T, 4><<<blocks_of(w->n_out, 4), 128, 0, e->stream>>>(y, x, *w, w->n_in, add, (int)n_tok); \
        break;
    switch (w->dtype) { EACH_FORMAT(X) default: break; }
#undef X
}

/* ---- rows: norm, rounding, activation --------------------------------------------------------------- */
/* out[n] = the (normed) row, as f32 or bf16. One block a row. */
template <typename O> static __device__ __forceinline__ void store4(O *to, float4 v);
template <> __device__ __forceinline__ void store4<float>(float *to, float4 v) { *(float4 *)to = v; }
template <> __device__ __forceinline__ void store4<__nv_bfloat16>(__nv_bfloat16 *to, float4 v) {
    const __nv_bfloat162 a = __floats2bfloat162_rn(v.x, v.y), b = __floats2bfloat162_rn(v.z, v.w);
    *(uint2 *)to = make_uint2(*(const uint32_t *)&a, *(const uint32_t *)&b);
}
static __device__ __forceinline__ void store1(float *to, float v) { *to = v; }
static __device__ __forceinline__ void store1(__nv_bfloat16 *to, float v) { *to = __float2bfloat16_rn(v); }

template <typename O>
static __global__ void k_rows(O *out, const float *x, const int32_t *row, const float *norm, float eps, int n_in) {
    __shared__ float tmp[32];
    lg_pdl_wait();
    lg_pdl_go();
    const int64_t n = blockIdx.x, src = row ? row[n] : n;
    const float *p = x + src * n_in;
    const bool four = n_in % 4 == 0;
    float r = 1.0f;
    if (norm) {
        float ss = 0;
        if (four)
            for (int i = threadIdx.x * 4; i < n_in; i += blockDim.x * 4) {
                const float4 v = *(const float4 *)(p + i);
                ss += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            }
        else
            for (int i = threadIdx.x; i < n_in; i += blockDim.x) ss += p[i] * p[i];
#pragma unroll
        for (int m = 16; m; m >>= 1) ss += __shfl_xor_sync(0xffffffffu, ss, m);
        if ((threadIdx.x & 31) == 0) tmp[threadIdx.x >> 5] = ss;
        __syncthreads();
        ss = 0;
        for (int i = 0; i < (int)(blockDim.x >> 5); i++) ss += tmp[i];
        r = 1.0f / sqrtf(ss / (float)n_in + eps);
    }
    if (four)
        for (int i = threadIdx.x * 4; i < n_in; i += blockDim.x * 4) {
            float4 v = *(const float4 *)(p + i);
            if (norm) {
                const float4 w = *(const float4 *)(norm + i);
                v = make_float4(v.x * r * w.x, v.y * r * w.y, v.z * r * w.z, v.w * r * w.w);
            }
            store4(out + n * n_in + i, v);
        }
    else
        for (int i = threadIdx.x; i < n_in; i += blockDim.x) store1(out + n * n_in + i, norm ? p[i] * r * norm[i] : p[i]);
}

static __device__ __forceinline__ float2 bf2(uint32_t u) { return make_float2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u)); }
static __device__ __forceinline__ float silu(float g) { return g / (1.0f + __expf(-g)); }

/* h = silu(g)*u; also its bf16 twin for the product that follows. n a multiple of 4. */
static __global__ void k_silu_bf16(float *h, __nv_bfloat16 *twin, const __nv_bfloat16 *g, const __nv_bfloat16 *u, int64_t n) {
    lg_pdl_wait();
    lg_pdl_go();
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    const uint2 a = *(const uint2 *)(g + i), b = *(const uint2 *)(u + i);
    const float2 a0 = bf2(a.x), a1 = bf2(a.y), b0 = bf2(b.x), b1 = bf2(b.y);
    const float4 v = make_float4(silu(a0.x) * b0.x, silu(a0.y) * b0.y, silu(a1.x) * b1.x, silu(a1.y) * b1.y);
    *(float4 *)(h + i) = v;
    store4(twin + i, v);
}
static __global__ void k_silu_f32(float *h, const float *g, const float *u, int64_t n) {
    lg_pdl_wait();
    lg_pdl_go();
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) h[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
}

/* Rows first.. of a weight, expanded. */
template <int T, typename O>
static __global__ void k_expand(O *out, lg_cuda_weight w, int64_t first, int64_t n_row) {
    const int n_slot = lg_fmt<T>::rows ? (w.n_in + 7) / 8 : w.n_chunk * 16;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, r = i / n_slot;
    if (r >= n_row) return;
    float v[8];
    int col[8];
    lg_weight_slot<T>(w, first + r, (int)(i % n_slot), v, col);
    O *to = out + r * w.n_in;
    if (w.n_in % 8 == 0) { /* four columns at a time lie together, and inside or outside as one */
        if (col[0] < w.n_in) store4(to + col[0], make_float4(v[0], v[1], v[2], v[3]));
        if (col[4] < w.n_in) store4(to + col[4], make_float4(v[4], v[5], v[6], v[7]));
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (col[e] < w.n_in) store1(to + col[e], v[e]);
    }
}
template <typename O> static void expand(const lg_cuda_env *e, O *out, const lg_cuda_weight *w, int64_t first, int64_t n_row) {
    const int64_t n_slot = row_major(w->dtype) ? (w->n_in + 7) / 8 : (int64_t)w->n_chunk * 16;
#define X(T) case T: k_expand<T, O><<<blocks_of(n_row * n_slot, 256), 256, 0, e->stream>>>(out, *w, first, n_row); break;
    switch (w->dtype) { EACH_FORMAT(X) default: break; }
#undef X
}

template <int T> static __global__ void k_embed(float *x, lg_cuda_weight w, const int32_t *ids, const int32_t *drawn, int n_tok, lg_cuda_staged staged) {
    lg_pdl_wait();
    lg_pdl_go();
    if ((int)blockIdx.x >= n_tok) { /* blocks that copy */
        for (int i = ((int)blockIdx.x - n_tok) * (int)blockDim.x + (int)threadIdx.x; i < staged.n; i += ((int)gridDim.x - n_tok) * (int)blockDim.x) staged.to[i] = staged.from[i];
        return;
    }
    const int n_slot = lg_fmt<T>::rows ? (w.n_in + 7) / 8 : w.n_chunk * 16;
    const int32_t given = ids[blockIdx.x], id = given < 0 ? drawn[-1 - given] : given;
    float *to = x + (int64_t)blockIdx.x * w.n_in;
    for (int s = threadIdx.x; s < n_slot; s += blockDim.x) {
        float v[8];
        int col[8];
        lg_weight_slot<T>(w, id, s, v, col);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (col[i] < w.n_in) to[col[i]] = v[i];
    }
}
void lg_cuda_embed(const lg_cuda_env *e, float *x, const lg_weight *w, const int32_t *ids, int64_t n_tok, const lg_cuda_staged *staged) {
    const lg_cuda_staged copy = staged ? *staged : lg_cuda_staged{ NULL, NULL, 0 };
    if (n_tok < 1) return;
    const unsigned blocks = (unsigned)n_tok + (unsigned)min64(blocks_of(copy.n, 128), 64);
#define X(T) case T: lg_cuda_launch(k_embed<T>, dim3(blocks), dim3(128), 0, e->stream, !staged, x, *lg_cuda_packed(w), ids, e->drawn, (int)n_tok, copy); break;
    switch (w->dtype) { EACH_FORMAT(X) default: break; }
#undef X
}

/* ---- low-rank additions: y += scale * B (A x) ------------------------------------------------------- */
static __global__ void k_lora_down(float *ax, const float *x, const float *a, int n_in, int rank) { /* block (token, r) of one warp */
    lg_pdl_wait();
    lg_pdl_go();
    const int64_t n = blockIdx.x;
    const int r = blockIdx.y;
    float s = 0;
    for (int i = threadIdx.x; i < n_in; i += 32) s = fmaf(a[(int64_t)r * n_in + i], x[n * n_in + i], s);
#pragma unroll
    for (int m = 16; m; m >>= 1) s += __shfl_xor_sync(0xffffffffu, s, m);
    if (threadIdx.x == 0) ax[n * rank + r] = s;
}
static __global__ void k_lora_up(float *y, const float *ax, const float *b, float scale, int64_t n_out, int rank) {
    lg_pdl_wait();
    lg_pdl_go();
    const int64_t o = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (o >= n_out) return;
    float s = 0;
    for (int r = 0; r < rank; r++) s = fmaf(b[o * rank + r], ax[n * rank + r], s);
    y[n * n_out + o] += scale * s;
}
/* x: f32, normed. */
static void lora(const lg_cuda_env *e, lg_cuda_work *k, const lg_lora *l, float *y, const float *x, const lg_weight *w, int64_t n_tok) {
    if (!l || l->rank <= 0 || n_tok < 1) return;
    for (int64_t at = 0; at < n_tok; at += 65535) { /* (grid.y) */
        const unsigned n = (unsigned)min64(n_tok - at, 65535);
        lg_cuda_launch(k_lora_down, dim3(n, (unsigned)l->rank), dim3(32), 0, e->stream, true, (float *)k->lora, x + at * w->n_in, (const float *)l->a, (int)w->n_in, (int)l->rank);
        lg_cuda_launch(k_lora_up, dim3(blocks_of(w->n_out, 128), n), dim3(128), 0, e->stream, true, y + at * w->n_out, (const float *)k->lora, (const float *)l->b, l->scale,
                       w->n_out, (int)l->rank);
    }
}
static bool has_lora(const lg_lora *l) { return l && l->rank > 0; }

/* ---- which way -------------------------------------------------------------------------------------- */
typedef enum way { DECODE, EXACT, MATRIX } way;
static way way_of(const lg_cuda_env *e, const lg_weight *w, int64_t n_tok) {
    const bool fits = w->n_in % 8 == 0; /* rows of 16-byte pieces */
    if (e->compute == LG_COMPUTE_F32 || !fits) return n_tok <= 16 ? EXACT : MATRIX;
    if (w->dtype == LG_DTYPE_F32) return n_tok <= 16 ? EXACT : MATRIX;
    return n_tok <= (row_major(w->dtype) ? 16 : 64) ? DECODE : MATRIX;
}
static bool blas_f32(const lg_cuda_env *e, const lg_weight *w) { return e->compute == LG_COMPUTE_F32 || w->dtype == LG_DTYPE_F32 || w->n_in % 8; }

/* An input of stream_codes.cu at `at`: x, sums, largest numbers of k_inputs' blocks; and its bytes. */
static lg_halves halves_at(uint8_t *at, int beside, int64_t n_chunk, lg_cuda_made made) {
    uint8_t *sums = at + n_chunk * beside * (LG_CHUNK * 2);
    return lg_halves{ (uint16_t *)(void *)at, (float *)(void *)sums, (uint32_t *)(void *)(sums + n_chunk * beside * 32), beside, made != LG_MADE_HALVES, made == LG_MADE_SPLIT };
}
static int64_t halves_bytes(int beside, int64_t n_chunk) { return n_chunk * (beside * (LG_CHUNK * 2 + 32) + MAX_COLS * 4); }

void lg_cuda_work_need(const lg_cuda_env *e, lg_cuda_work *n, const lg_weight *w, int64_t n_tok) {
    const bool wide = way_of(e, w, n_tok) != DECODE; /* else f32 rows are made for low-rank additions only */
    const int64_t chunk = (w->n_in + LG_CHUNK - 1) / LG_CHUNK;
    n->x_bytes = max64(n->x_bytes, max64(n_tok * w->n_in * 4, min64(n_tok, MAX_COLS) * x_stride((int)chunk) * 2));
    n->sums_bytes = max64(n->sums_bytes, (chunk * 4 * (MAX_COLS / 2) * lg_side_floats(true) + MAX_COLS * ((chunk + PARTS - 1) / PARTS)) * 4);
    n->y_bytes = max64(n->y_bytes, n_tok * w->n_out * 4);
    n->lora_bytes = max64(n->lora_bytes, min64(n_tok, 65535) * LG_LORA_RANK * 4);
    if (!wide) n->partial_bytes += lg_cuda_codes_partial(e, w, min64(n_tok, MAX_COLS)); /* (fewer rows in the last turn take less) */
    if (n_tok == 1 && !wide) n->ready_bytes = max64(n->ready_bytes, lg_cuda_f16_bytes(w->n_out)); /* decode_one */
    if (n_tok > 1 && !wide) { /* decode_rows, decode_codes: inputs and, where there are no more rows, what is left for the next product; whole chunks */
        const int beside = lg_beside((int)min64(n_tok, MAX_COLS));
        const int64_t left = n_tok <= MAX_COLS ? halves_bytes(beside, (w->n_out + LG_CHUNK - 1) / LG_CHUNK) : 0;
        n->ready_bytes = max64(n->ready_bytes, left);
        n->x_bytes = max64(n->x_bytes, max64(left, halves_bytes(beside, chunk)));
        n->sums_bytes = max64(n->sums_bytes, (MAX_COLS + n_tok * ((w->n_out + 15) / 16)) * 4);
    }
    if (wide && way_of(e, w, n_tok) == MATRIX) {
        n->ready_bytes = max64(n->ready_bytes, n_tok * w->n_out * 2);
        if (w->dtype != (blas_f32(e, w) ? LG_DTYPE_F32 : LG_DTYPE_BF16)) n->wide_bytes = max64(n->wide_bytes, min64(w->n_out * w->n_in * 4, max64(SLICE * 2, w->n_in * 4 * 16)));
    }
}

static bool has_twin(const lg_cuda_work *k, const lg_cuda_in *in, lg_cuda_made made) {
    return k->twin.at && k->twin.of == in->x && k->twin.norm == in->norm && k->twin.rows == in->n_tok && k->twin.made == made && !in->row;
}

/* Where a result is left as an input, while the op's own may still be read. */
static uint8_t *place_beside(const lg_cuda_work *k, bool twin) { return twin && k->twin.at == k->ready ? k->x : k->ready; }

/* One row of input; whole: the op has no other. Gate and up leave f16 for down; o and down leaving it for what follows lost more than that won. */
static bool decode_one(const lg_cuda_env *e, lg_cuda_work *k, const lg_cuda_in *in, const lg_weight *const *w, float *const *y, int n, int nw, bool add, bool whole) {
    const bool codes = !row_major(w[0]->dtype), leaves = whole && codes && nw == 2 && w[0]->n_out % 32 == 0;
    const bool takes = codes && w[0]->dtype != LG_DTYPE_Q6_K && has_twin(k, in, LG_MADE_F16) && !in->norm;
    lg_cuda_chain chain = { takes ? k->twin.at : NULL, leaves ? k->ready : NULL, k->twin.early && k->twin.of == in->x, false };
    if (!lg_cuda_stream(e, in, &chain, w, y, n, nw == 2, add)) return false;
    if (leaves || chain.lets) k->left = lg_cuda_twin{ y[0], NULL, 1, chain.to, chain.lets, LG_MADE_F16, 0 };
    return true;
}

/* 2 to 16 rows of input, large bf16 or f16 weights; bf16 ones take and leave bf16 rows. norm: as in lg_cuda_out, for one weight. */
static void decode_rows(const lg_cuda_env *e, lg_cuda_work *k, const lg_cuda_in *in, product_args *a, const lg_weight *const *w, float *const *y, int n, int nw, const float *norm) {
    const bool bf16 = w[0]->dtype == LG_DTYPE_BF16, twin = bf16 && has_twin(k, in, LG_MADE_BF16);
    float *squares = k->sums + MAX_COLS;
    lg_cuda_rows rows = { (const uint16_t *)k->x, a->n_tok, k->sums, NULL, a->eps, NULL, norm, squares };
    if (twin) {
        rows.x = (const uint16_t *)k->twin.at;
        rows.factor = NULL;
        rows.squares = in->norm ? squares : NULL;
    } else if (bf16) {
        a->f = lg_form_of<LG_DTYPE_BF16>();
        a->stride = 32; /* rows side by side */
        a->f.group = lg_beside(a->n_tok) * 32;
        prepare(e, k, a);
    } else {
        k->twin.of = NULL; /* (as in prepare) */
        lg_cuda_launch(k_halves, dim3((unsigned)a->n_tok), dim3(THREADS), 0, e->stream, true, (uint16_t *)k->x, k->sums, a->x, a->row, a->norm, a->eps, (int)a->n_in, lg_beside(a->n_tok));
    }
    const bool leaves = bf16 && (nw == 2 || (norm && !rows.squares));
    uint8_t *to = place_beside(k, twin);
    if (leaves) rows.twin = (uint16_t *)to;
    lg_cuda_stream_rows(e, &rows, w, y, n, nw == 2, a->add);
    if (!leaves) return;
    k->left = lg_cuda_twin{ y[0], norm, a->n_tok, to, false, LG_MADE_BF16, 0 };
}

uint16_t *lg_cuda_leave(const lg_cuda_env *e, lg_cuda_work *k, const lg_weight *w, const float *of, int64_t n_tok) {
    if (w->dtype != LG_DTYPE_BF16 || n_tok < 2 || n_tok > MAX_COLS || !lg_cuda_streams_rows(e, &w, 1, n_tok, true)) return NULL;
    k->left = lg_cuda_twin{ of, NULL, n_tok, k->x, false, LG_MADE_BF16, 0 };
    return (uint16_t *)k->x;
}

/* The form in which stream_codes.cu takes inputs for weights of a format. */
static lg_cuda_made made_for(lg_dtype t) {
    switch (t) {
#define X(T) case T: return lg_form_of<T>().half_groups ? LG_MADE_SPLIT : lg_form_of<T>().sixteenth ? LG_MADE_SIXTEENTH : LG_MADE_HALVES;
        LG_EACH_QUANT(X)
#undef X
    default: return LG_MADE_BF16;
    }
}
/* 2 to 16 rows of input, large quantised weights, which take and leave inputs in such forms. whole: the op has no other rows; norm, next: as in lg_cuda_out. */
static void decode_codes(const lg_cuda_env *e, lg_cuda_work *k, const lg_cuda_in *in, const lg_weight *const *w, float *const *y, int n, int nw, bool add, bool whole, const float *norm,
                         const lg_weight *next) {
    const int n_tok = (int)in->n_tok, beside = lg_beside(n_tok);
    const int64_t n_in = w[0]->n_in, n_out = w[0]->n_out, n_chunk = lg_cuda_packed(w[0])->n_chunk;
    const lg_cuda_made made = made_for(w[0]->dtype);
    const bool twin = whole && has_twin(k, in, made);
    const bool leaves = whole && next && !row_major(next->dtype) && next->n_in == n_out && n_out % LG_CHUNK == 0 && (nw == 2 || (n == 1 && !in->norm)); /* (squares are read or written) */
    uint32_t *head = (uint32_t *)(void *)k->partial, *slots = head + LG_CODES_GROUPS;
    const int slot = twin ? (k->twin.slot + 1) % LG_CODES_SLOTS : 0; /* of the result; the one after it is made 0 for the next result, and is that which the last product read */
    const lg_halves x = halves_at(twin ? k->twin.at : k->x, beside, n_chunk, made);
    enum { SLOT = LG_CODES_ROWS * LG_CODES_MOST };
    lg_cuda_codes codes = { x.x, x.sums, twin ? slots + k->twin.slot * SLOT : x.most, LG_CODES_MOST, n_tok, in->x, in->norm, in->row, k->sums, in->norm ? (int)(n_in / 16) : 0, in->eps,
                            slots + (slot + 1) % LG_CODES_SLOTS * SLOT, head, (float *)(void *)(head + LG_CODES_HEAD), lg_halves{}, norm, k->sums };
    if (!twin) {
        const int parts = (int)((n_chunk + PARTS - 1) / PARTS);
        k->twin.of = NULL; /* (it may lie there) */
        lg_cuda_launch(k_inputs, dim3((unsigned)n_tok, (unsigned)parts), dim3(THREADS), 0, e->stream, true, x, k->sums, slots, in->x, in->row, in->norm, (int)n_in, (int)n_chunk);
        codes.n_square = in->norm ? parts : 0;
        codes.n_most = parts;
    }
    if (leaves) {
        uint8_t *to = place_beside(k, twin);
        codes.twin = halves_at(to, beside, n_out / LG_CHUNK, made_for(next->dtype));
        codes.twin.most = slots + slot * SLOT;
        k->left = lg_cuda_twin{ y[0], norm, n_tok, to, false, made_for(next->dtype), slot };
    }
    lg_cuda_stream_codes(e, &codes, w, y, n, nw == 2, add);
}

/* Up to 16 rows of input; same format. */
static void decode(const lg_cuda_env *e, lg_cuda_work *k, const lg_cuda_in *in, int64_t first, int n_tok, const lg_weight *const *w, float *const *y, int n, int nw, bool add,
                   const float *norm, const lg_weight *next) {
    const lg_cuda_weight *p0 = lg_cuda_packed(w[0]);
    const bool whole = n_tok == in->n_tok;
    lg_cuda_in part = *in;
    float *to[3];
    part.n_tok = n_tok;
    if (in->row) part.row = in->row + first;
    else part.x = in->x + first * p0->n_in;
    for (int i = 0; i < n; i++) to[i] = y[i] + first * w[i]->n_out;
    if (n_tok == 1 && decode_one(e, k, &part, w, to, n, nw, add, whole)) return;
    product_args a = {};
    a.n_in = p0->n_in;
    a.n_chunk = p0->n_chunk;
    a.n_tok = n_tok;
    a.stride = x_stride(a.n_chunk);
    a.add = add;
    a.x = part.x;
    a.row = part.row;
    a.norm = in->norm;
    a.eps = in->eps;
    a.n_part = n;
    a.n_tile = lg_parts(a.p, w, to, n, nw == 2, LG_TILE);
    if (whole && lg_cuda_streams_rows(e, w, n, n_tok, add)) decode_rows(e, k, in, &a, w, y, n, nw, norm);
    else if (lg_cuda_streams_codes(e, w, n, n_tok, add)) decode_codes(e, k, &part, w, to, n, nw, add, whole, norm, next);
    else run_product(e, k, p0->dtype, nw, &a);
}

/* The (normed, gathered) input as f32 or bf16 rows in k->x. */
template <typename O> static O *rows(const lg_cuda_env *e, lg_cuda_work *k, const lg_cuda_in *in, int64_t n_in) {
    O *out = (O *)k->x;
    k->twin.of = NULL;
    lg_cuda_launch(k_rows<O>, dim3((unsigned)in->n_tok), dim3(n_in >= 2048 ? 512 : 128), 0, e->stream, true, out, in->x, in->row, in->norm, in->eps, (int)n_in);
    return out;
}

static void matrix(const lg_cuda_env *e, lg_cuda_work *k, lg_blas_kind kind, void *y, const void *x, const lg_weight *w, int64_t n_tok, bool add) {
    const lg_cuda_weight *p = lg_cuda_packed(w);
    const bool f32 = kind == LG_BLAS_F32;
    if (p->dtype == (f32 ? LG_DTYPE_F32 : LG_DTYPE_BF16)) {
        lg_cuda_blas_product(e->stream, kind, y, w->n_out, x, p->codes, n_tok, w->n_out, w->n_in, add);
        return;
    }
    const int64_t size = f32 ? 4 : 2, slice = max64(k->wide_bytes / size / w->n_in / 16 * 16, 16);
    for (int64_t r = 0; r < w->n_out; r += slice) {
        const int64_t n = min64(slice, w->n_out - r);
        if (f32) expand<float>(e, (float *)k->wide, p, r, n);
        else expand<__nv_bfloat16>(e, (__nv_bfloat16 *)k->wide, p, r, n);
        lg_cuda_blas_product(e->stream, kind, (uint8_t *)y + r * (kind == LG_BLAS_BF16_BF16 ? 2 : 4), w->n_out, x, k->wide, n_tok, n, w->n_in, add);
    }
}

void lg_cuda_product(const lg_cuda_env *e, lg_cuda_work *k, const lg_cuda_in *in, const lg_cuda_out *out, int n, bool add) {
    const int64_t n_in = out[0].w->n_in;
    const float *plain = NULL; /* f32 rows, where somebody wants them */
    const __nv_bfloat16 *half = NULL; /* bf16 rows, while they are there */
    bool low = false;
    if (in->n_tok < 1) return;
    for (int i = 0; i < n; i++) low = low || has_lora(out[i].lora);
    const bool lone = n == 1 && !low;
    uint8_t done[3] = { 0, 0, 0 };
    for (int i = 0; i < n; i++) {
        if (done[i]) continue;
        const way how = way_of(e, out[i].w, in->n_tok);
        if (how == DECODE) { /* with all others of its format in one launch */
            const lg_weight *w[3];
            float *y[3];
            int m = 0;
            for (int j = i; j < n; j++)
                if (!done[j] && out[j].w->dtype == out[i].w->dtype) {
                    w[m] = out[j].w;
                    y[m++] = out[j].y;
                    done[j] = 1;
                }
            for (int64_t t = 0; t < in->n_tok; t += MAX_COLS) decode(e, k, in, t, (int)min64(MAX_COLS, in->n_tok - t), w, y, m, 1, add, lone ? out->norm : NULL, lone ? out->next : NULL);
            plain = NULL; /* k->x was overwritten */
            half = NULL;
            continue;
        }
        done[i] = 1;
        if (how == EXACT || blas_f32(e, out[i].w)) {
            if (!plain) plain = in->norm || in->row ? rows<float>(e, k, in, n_in) : in->x;
            half = NULL;
            if (how == EXACT) exact(e, out[i].y, plain, lg_cuda_packed(out[i].w), in->n_tok, add);
            else matrix(e, k, LG_BLAS_F32, out[i].y, plain, out[i].w, in->n_tok, add);
            continue;
        }
        const bool twin = !in->norm && has_twin(k, in, LG_MADE_BF16);
        const __nv_bfloat16 *x = (const __nv_bfloat16 *)k->twin.at;
        if (!twin) x = rows<__nv_bfloat16>(e, k, in, n_in);
        plain = NULL;
        half = x;
        for (int j = i; j < n; j++)
            if ((j == i || !done[j]) && way_of(e, out[j].w, in->n_tok) == MATRIX && !blas_f32(e, out[j].w)) {
                matrix(e, k, LG_BLAS_BF16_F32, out[j].y, x, out[j].w, in->n_tok, add);
                done[j] = 1;
            }
    }
    if (!low) return;
    low = false;
    for (int i = 0; i < n; i++) {
        if (!has_lora(out[i].lora)) continue;
        if (half && out[i].lora->packed) lg_cuda_lora_rows(e, k, out[i].lora, LG_BLAS_BF16_F32, out[i].y, half, out[i].w, in->n_tok);
        else low = true;
    }
    if (!low) return;
    plain = in->norm || in->row ? rows<float>(e, k, in, n_in) : in->x;
    for (int i = 0; i < n; i++)
        if (has_lora(out[i].lora) && !(half && out[i].lora->packed)) lora(e, k, out[i].lora, out[i].y, plain, out[i].w, in->n_tok);
}

void lg_cuda_gate_up(const lg_cuda_env *e, lg_cuda_work *k, const lg_cuda_in *in, const lg_cuda_out *gate, const lg_cuda_out *up, float *h) {
    const int64_t n = in->n_tok * gate->w->n_out;
    const bool low = has_lora(gate->lora) || has_lora(up->lora), same = gate->w->dtype == up->w->dtype;
    if (in->n_tok < 1) return;
    if (!low && same && way_of(e, gate->w, in->n_tok) == DECODE) {
        const lg_weight *w[2] = { gate->w, up->w };
        float *y[2] = { h, h };
        for (int64_t t = 0; t < in->n_tok; t += MAX_COLS) decode(e, k, in, t, (int)min64(MAX_COLS, in->n_tok - t), w, y, 2, 2, false, NULL, up->next);
        return;
    }
    const bool halves = (!has_lora(gate->lora) || gate->lora->packed) && (!has_lora(up->lora) || up->lora->packed);
    if (halves && way_of(e, gate->w, in->n_tok) == MATRIX && way_of(e, up->w, in->n_tok) == MATRIX && !blas_f32(e, gate->w) && !blas_f32(e, up->w) && n % 4 == 0) {
        const __nv_bfloat16 *x = rows<__nv_bfloat16>(e, k, in, gate->w->n_in);
        matrix(e, k, LG_BLAS_BF16_BF16, k->y0, x, gate->w, in->n_tok, false);
        matrix(e, k, LG_BLAS_BF16_BF16, k->y1, x, up->w, in->n_tok, false);
        if (has_lora(gate->lora)) lg_cuda_lora_rows(e, k, gate->lora, LG_BLAS_BF16_BF16, k->y0, x, gate->w, in->n_tok);
        if (has_lora(up->lora)) lg_cuda_lora_rows(e, k, up->lora, LG_BLAS_BF16_BF16, k->y1, x, up->w, in->n_tok);
        lg_cuda_launch(k_silu_bf16, dim3(blocks_of(n / 4, 256)), dim3(256), 0, e->stream, true, h, (__nv_bfloat16 *)k->ready, (const __nv_bfloat16 *)k->y0,
                       (const __nv_bfloat16 *)k->y1, n);
        k->left = lg_cuda_twin{ h, NULL, in->n_tok, k->ready, false, LG_MADE_BF16, 0 };
        return;
    }
    lg_cuda_out both[2] = { *gate, *up };
    both[0].y = (float *)k->y0;
    both[1].y = (float *)k->y1;
    lg_cuda_product(e, k, in, both, 2, false);
    lg_cuda_launch(k_silu_f32, dim3(blocks_of(n, 256)), dim3(256), 0, e->stream, true, h, (const float *)k->y0, (const float *)k->y1, n);
}
