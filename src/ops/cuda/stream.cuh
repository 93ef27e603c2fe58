/* stream.cuh: what products of few rows share (product.cu, stream.cu, stream_codes.cu, stream_major.cu, stream_rows.cu): a warp streams weights as tensor-core fragments and multiplies
 * them with inputs that were brought into the form the tensor cores take. Codes of quantised weights stay integers: as f16 subnormals
 * (code * 2^-24) they need one lop3 per two weights and no conversion; scale, minimum and zero point are applied to the f32 sum of each group.
 * (stream.cu takes them as bytes.) */
#ifndef LG_CUDA_STREAM_CUH
#define LG_CUDA_STREAM_CUH
#include "ops/cuda/stream_ptx.cuh"
#include "ops/cuda/weight.cuh"

#define LG_EACH_QUANT(X) X(LG_DTYPE_Q8_0) X(LG_DTYPE_Q4_0) X(LG_DTYPE_Q4_1) X(LG_DTYPE_Q5_0) X(LG_DTYPE_Q5_1) X(LG_DTYPE_Q4_K) X(LG_DTYPE_Q5_K) X(LG_DTYPE_Q6_K)

/* ---- inputs ---- */
/* bf16 weights take bf16 inputs; all others f16, each group of 32 scaled by a power of two so that its largest lies in [512, 1024).
 * Codes of 4 to 6 bits stand alternately at bits 0 and 4 of an f16 mantissa, so inputs of every second pair are divided by 16.
 * Beside the inputs, for each (group, pair of rows): the scales to undo and the sums of the group's inputs (as rounded, in units of
 * the product's sum, 2^-24); where codes have a constant zero point, that sum times -zero, still scaled: the product starts from it. The
 * factor of the norm is a factor of the result and applied there: one pass over x. */
typedef struct lg_form {
    bool bf16, sixteenth, half_groups;
    float zero; /* of codes, where it is applied to the sums of inputs */
    int group;  /* elements from one group of a row to the next: 32, or more where rows lie side by side */
} lg_form;
template <int T> static constexpr bool lg_folds = lg_fmt<T>::zero != 0 && !lg_fmt<T>::q6;
template <int T> static __host__ __device__ __forceinline__ constexpr lg_form lg_form_of(void) {
    return lg_form{ T == LG_DTYPE_BF16, !lg_fmt<T>::rows && !lg_fmt<T>::byte, lg_fmt<T>::q6, lg_folds<T> ? (float)lg_fmt<T>::zero : 0.0f, 32 };
}
static __host__ __device__ __forceinline__ constexpr int lg_side_floats(bool half_groups) { return half_groups ? 8 : 4; }

/* 2^(9 - exponent of the largest) */
static __device__ __forceinline__ float lg_group_scale(float top) {
    const int e = 263 - (int)((__float_as_uint(top) >> 23) & 255);
    return __uint_as_float((uint32_t)(e < 1 ? 1 : e > 253 ? 253 : e) << 23);
}

/* 1 / x of a power of two, exact where both are normal numbers. */
static __device__ __forceinline__ float lg_reciprocal_of_power(float x) { return __uint_as_float(0x7F000000u - __float_as_uint(x)); }

/* A slot is eight numbers of a row of n_chunk*16 slots, four a group of 32. half_groups: four numbers of each half of the group instead of eight side by side. Where
 * the thread's first slot begins: */
static __device__ __forceinline__ int lg_own_slot(bool half_groups) { return ((int)threadIdx.x >> 2) * 32 + ((int)threadIdx.x & 3) * (half_groups ? 4 : 8); }
/* A row by the whole block: put(slot, its eight numbers) by whole warps, of which the last may be half beyond the row (zeros). x, norm (NORM: what numbers are
 * multiplied by): from the thread's first slot on. AHEAD: slots a thread asks for at once; `behind` comes after the first of them. Returns the thread's part of the
 * sum of squares. (Code that runs once in a launch takes some eight cycles an instruction, so there is little of it.) */
template <int N_THREAD, int AHEAD, bool NORM, typename B, typename P>
static __device__ __forceinline__ float lg_each_eight(const float *x, const float *norm, int n_in, int n_chunk, bool half_groups, B behind, P put) {
    const int tid = threadIdx.x, n_slot = n_chunk * 16, second = half_groups ? 16 : 4;
    int left = n_in - lg_own_slot(half_groups), first = 0; /* first: slot of the block's first thread */
    float ss = 0;
#pragma unroll 1
    do {
        float4 in[AHEAD][2], by[AHEAD][2];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            in[i][0] = in[i][1] = by[i][0] = by[i][1] = make_float4(0, 0, 0, 0);
            if (i * N_THREAD * 8 < left) { /* n_in is a multiple of 8, with half groups of 32 */
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    in[i][q] = __ldcg((const float4 *)(x + i * N_THREAD * 8 + q * second));
                    if (NORM) by[i][q] = __ldcg((const float4 *)(norm + i * N_THREAD * 8 + q * second));
                }
            }
        }
        if (first == 0) behind();
#pragma unroll 1 /* short code: it comes from L2 */
        for (int at = first + (tid & ~31), i = 0; i < AHEAD && at < n_slot; at += N_THREAD, i++) {
            float v[8];
#pragma unroll
            for (int q = 0; q < 2; q++) {
                const float4 y = in[0][q], w = by[0][q];
                ss += y.x * y.x + y.y * y.y + y.z * y.z + y.w * y.w;
                v[4 * q] = NORM ? y.x * w.x : y.x;
                v[4 * q + 1] = NORM ? y.y * w.y : y.y;
                v[4 * q + 2] = NORM ? y.z * w.z : y.z;
                v[4 * q + 3] = NORM ? y.w * w.w : y.w;
            }
            put(at + (tid & 31), v);
#pragma unroll
            for (int j = 0; j + 1 < AHEAD; j++)
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    in[j][q] = in[j + 1][q];
                    if (NORM) by[j][q] = by[j + 1][q];
                }
        }
        first += AHEAD * N_THREAD;
        left -= AHEAD * N_THREAD * 8;
        x += AHEAD * N_THREAD * 8;
        norm += NORM ? AHEAD * N_THREAD * 8 : 0;
    } while (first < n_slot);
    return ss;
}
/* Row n, by the whole block: xs [n_chunk*128] (groups f.group apart), side [group][pair][lg_side_floats] = scale of rows 2p and 2p + 1, their sums (Q6_K: of the
 * first half, then of the second). The rest as in lg_each_eight. */
template <int N_THREAD, int AHEAD, bool NORM, typename B>
static __device__ __forceinline__ float lg_prepare_row(uint16_t *xs, float *side, int pairs, int n, const float *x, const float *norm, int n_in, int n_chunk, const lg_form f, B behind) {
    const int size = lg_side_floats(f.half_groups), n_slot = n_chunk * 16;
    return lg_each_eight<N_THREAD, AHEAD, NORM>(x, norm, n_in, n_chunk, f.half_groups, behind, [&](int slot, float *v) {
        const int group = slot >> 2;
        uint32_t out[4];
        if (f.bf16) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const __nv_bfloat162 h = __floats2bfloat162_rn(v[2 * e], v[2 * e + 1]);
                out[e] = *(const uint32_t *)&h;
            }
        } else {
            float top = 0, s = 1.0f, sum[2] = { 0, 0 };
#pragma unroll
            for (int e = 0; e < 8; e++) top = fmaxf(top, fabsf(v[e]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            if (top > 0) s = lg_group_scale(top);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float h = __half2float(__float2half_rn(v[e] * s));
                sum[e >> 2] += h;
                v[e] = f.sixteenth && (e & 2) ? h * 0.0625f : h;
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const __half2 h = __floats2half2_rn(v[2 * e], v[2 * e + 1]);
                out[e] = *(const uint32_t *)&h;
            }
            if (!f.half_groups) sum[0] += sum[1];
#pragma unroll
            for (int q = 0; q < (f.half_groups ? 2 : 1); q++) {
                sum[q] += __shfl_xor_sync(0xffffffffu, sum[q], 1);
                sum[q] += __shfl_xor_sync(0xffffffffu, sum[q], 2);
            }
            if ((slot & 3) == 0 && slot < n_slot) {
                const float undo = lg_reciprocal_of_power(s);
                float *to = side + ((int64_t)group * pairs + (n >> 1)) * size + (n & 1);
                to[0] = undo;
                to[2] = sum[0] * (f.zero != 0 ? -f.zero : undo) * (1.0f / 16777216.0f);
                if (f.half_groups) to[4] = sum[1] * undo * (1.0f / 16777216.0f);
            }
        }
        if (slot < n_slot) *(uint4 *)(xs + group * f.group + (slot & 3) * 8) = make_uint4(out[0], out[1], out[2], out[3]);
    });
}
/* The same of row x, times norm unless that is NULL. */
template <int N_THREAD>
static __device__ __forceinline__ float lg_prepare_row(uint16_t *xs, float *side, int pairs, int n, const float *x, const float *norm, int n_in, int n_chunk, const lg_form f) {
    const int own = lg_own_slot(f.half_groups);
    return norm ? lg_prepare_row<N_THREAD, 4, true>(xs, side, pairs, n, x + own, norm + own, n_in, n_chunk, f, [] {})
                : lg_prepare_row<N_THREAD, 4, false>(xs, side, pairs, n, x + own, NULL, n_in, n_chunk, f, [] {});
}
/* f(slots a thread asks for at once, whether numbers are multiplied): 4096 numbers are a round of 256 threads, with a norm's weights beside them; 14336 without. */
template <int N> struct lg_constant { static constexpr int value = N; };
template <int N_THREAD, typename F> static __device__ __forceinline__ float lg_by_length(bool norm, int n_in, F f) {
    if (norm) return f(lg_constant<2>(), lg_constant<1>());
    return n_in <= 2 * N_THREAD * 8 ? f(lg_constant<2>(), lg_constant<0>()) : f(lg_constant<7>(), lg_constant<0>());
}
/* tmp [warps of the block] */
static __device__ __forceinline__ void lg_warp_sum(float *tmp, float v) {
#pragma unroll
    for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(0xffffffffu, v, m);
    if ((threadIdx.x & 31) == 0) tmp[threadIdx.x >> 5] = v;
}
/* The factor of a norm, from the sum of squares of n_in numbers. */
static __device__ __forceinline__ float lg_factor_of(float ss, float eps, int n_in) { return rsqrtf(__fdividef(ss, (float)n_in) + eps); }
template <int N_WARP> static __device__ __forceinline__ float lg_norm_factor(const float *tmp, float eps, int n_in) {
    float ss = 0;
#pragma unroll
    for (int i = 0; i < N_WARP; i++) ss += tmp[i];
    return lg_factor_of(ss, eps, n_in);
}

/* Inputs of stream_codes.cu, whole chunks of a row: f16 as lg_beside_at says (split, for Q6_K: four numbers of each half of a group after the other), where codes have
 * alternate places a sixteenth of every second pair; their sums by sixteen columns, [chunk][row][8]; and the largest of each row (of some of its sixteens in each place).
 * Nothing is scaled: a row whose largest number is not LG_HALF_LEAST to LG_HALF_MOST or 0 is made anew by the product itself. */
#define LG_HALF_LEAST 0.0009765625f
#define LG_HALF_MOST 65472.0f
static __host__ __device__ __forceinline__ constexpr int64_t lg_sixteen_at(int beside, int n, int k) { return ((int64_t)(k >> 7) * beside + n) * 8 + ((k >> 4) & 7); }
/* Where column k of a group lies. */
static __host__ __device__ __forceinline__ constexpr int lg_split_at(bool split, int k) { return split ? (k & 12) * 2 + (k & 16) / 4 + (k & 3) : k; }
static __device__ __forceinline__ bool lg_half_fits(uint32_t most) { return most == 0 || (__uint_as_float(most) >= LG_HALF_LEAST && __uint_as_float(most) <= LG_HALF_MOST); }
/* A sixteen of row n, by whole warps: number k by each of sixteen lanes side by side (N 1), or k and k + 8 by each of the eight lanes that are as many beyond a multiple of
 * four (N 2). live: whether there is such a row. */
template <int N> static __device__ __forceinline__ void lg_put_sixteen(const lg_halves &to, int n, int k, const float (&v)[N], bool live) {
    float h[N], sum = 0.0f;
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        h[i] = __half2float(__float2half_rn(v[i]));
        sum += h[i];
        most = max(most, __float_as_uint(fabsf(v[i])));
    }
#pragma unroll
    for (int m = N == 1 ? 1 : 4; m < (N == 1 ? 16 : 32); m *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, m);
        most = max(most, __shfl_xor_sync(0xffffffffu, most, m));
    }
    if (!live) return;
    uint16_t *x = to.x + lg_beside_at(to.beside, n, k & ~31);
#pragma unroll
    for (int i = 0; i < N; i++) x[lg_split_at(to.split, (k & 31) + i * 8)] = __half_as_ushort(__float2half_rn(to.sixteenth && (k & 2) ? h[i] * 0.0625f : h[i]));
    if (k & 15) return;
    to.sums[lg_sixteen_at(to.beside, n, k)] = sum;
    atomicMax(to.most + n * LG_CODES_MOST + (k >> 4) % LG_CODES_MOST, most); /* (few of them meet in a place) */
}
/* The same of eight numbers from k on, a half of a sixteen, but for the largest, which is returned: the lane beside this one has the other half. */
static __device__ __forceinline__ uint32_t lg_put_eight(const lg_halves &to, int n, int k, const float (&v)[8], bool live) {
    uint32_t most = 0, out[4];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __half2 h = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
        const __half2 y = to.sixteenth && (i & 1) ? __hmul2(h, __float2half2_rn(0.0625f)) : h;
        out[i] = *(const uint32_t *)&y;
        sum += __low2float(h) + __high2float(h);
        most = max(most, max(__float_as_uint(fabsf(v[2 * i])), __float_as_uint(fabsf(v[2 * i + 1]))));
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (!live) return most;
    uint16_t *x = to.x + lg_beside_at(to.beside, n, k & ~31);
    *(uint2 *)(x + lg_split_at(to.split, k & 31)) = make_uint2(out[0], out[1]);
    *(uint2 *)(x + lg_split_at(to.split, (k & 31) + 4)) = make_uint2(out[2], out[3]);
    if ((k & 15) == 0) to.sums[lg_sixteen_at(to.beside, n, k)] = sum;
    return most;
}

/* ---- weights ---- */
typedef struct lg_part { const uint8_t *codes, *high, *scale, *super; float *out; int32_t n_out, tile_end; } lg_part; /* a weight of a launch; tile_end: of all parts so far */
/* The parts of a launch in tiles of `rows`; returns how many (of gate and up: those of one). */
static inline int32_t lg_parts(lg_part *part, const lg_weight *const *w, float *const *y, int n, bool gate_up, int rows) {
    int32_t end = 0;
    for (int i = 0; i < n; i++) {
        const lg_cuda_weight *p = lg_cuda_packed(w[i]);
        const int32_t tiles = (p->n_out + rows - 1) / rows;
        end = gate_up ? tiles : end + tiles;
        part[i] = lg_part{ p->codes, p->high, p->scale, p->super, y[i], p->n_out, end };
    }
    return end;
}
/* Bytes of weights of one type whose rows are whole pieces of 16 bytes as inputs; -1: they are not. */
static inline int64_t lg_bytes_alike(const lg_weight *const *w, int n) {
    int64_t bytes = 0;
    for (int i = 0; i < n; i++) {
        if (w[i]->dtype != w[0]->dtype || w[i]->n_in % 8) return -1;
        bytes += lg_cuda_packed(w[i])->bytes;
    }
    return bytes;
}
/* Of weights that share an input: whose tile an item is, and which. together: gate and up, this tile of both. */
typedef struct lg_spot { int part, tile; } lg_spot;
static __device__ __forceinline__ lg_spot lg_spot_of(const lg_part *p, int n_part, bool together, int item) {
    int which = 0;
    while (!together && which + 1 < n_part && item >= p[which].tile_end) which++;
    return lg_spot{ which, item - (which ? p[which - 1].tile_end : 0) };
}

/* c += a b */
template <bool BF16> static __device__ __forceinline__ void mma(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    lg_mma<BF16>(c, a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]);
}
/* The same of 32 columns of row-major weights, rows g and g + 8, and of inputs: eight numbers a lane. */
template <bool BF16> static __device__ __forceinline__ void mma_rows(float *c, const uint4 &w0, const uint4 &w1, const uint4 &x) {
    mma<BF16>(c, w0.x, w1.x, w0.y, w1.y, x.x, x.y);
    mma<BF16>(c, w0.z, w1.z, w0.w, w1.w, x.z, x.w);
}

/* What a lane holds of 16 rows and 32 columns (row-major), or of a chunk (quantised): rows g and g + 8. */
template <int T> struct lg_hold {
    uint4 c[lg_fmt<T>::byte ? 4 : 2];
    uint4 s[lg_fmt<T>::pair ? 2 : 1]; /* (pair: row g, row g + 8; else both in one) */
    uint32_t h[4];
    uint32_t d[2];
};
static __device__ __forceinline__ uint32_t part4(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

/* The four fragments of group j, row half hf, as integers in f16 mantissas. */
template <int T>
static __device__ __forceinline__ void unpack(uint32_t *r, const lg_hold<T> &o, int hf, int j) {
    typedef lg_fmt<T> F;
    if (F::byte) {
        const uint4 v = o.c[F::byte ? hf * 2 + (j >> 1) : 0];
        const uint32_t a = part4(v, (j & 1) * 2), b = part4(v, (j & 1) * 2 + 1);
        r[0] = a & 0x00FF00FFu;
        r[1] = (a >> 8) & 0x00FF00FFu;
        r[2] = b & 0x00FF00FFu;
        r[3] = (b >> 8) & 0x00FF00FFu;
        return;
    }
    const uint32_t w = part4(o.c[hf], j), x = w >> 8;
    r[0] = w & 0x000F000Fu;
    r[1] = w & 0x00F000F0u;
    r[2] = x & 0x000F000Fu;
    r[3] = x & 0x00F000F0u;
    if (F::five) {
#pragma unroll
        for (int i = 0; i < 4; i++) r[i] |= ((o.h[hf] >> (j * 4 + i)) & 0x00010001u) << (i & 1 ? 8 : 4);
    }
    if (F::q6) {
        const uint32_t h = o.h[(j >> 1) * 2 + hf];
#pragma unroll
        for (int i = 0; i < 4; i++) r[i] |= ((h >> (2 * ((j & 1) * 4 + i))) & 0x00030003u) << (i & 1 ? 8 : 4);
    }
}

static __device__ __forceinline__ float byte_float(uint32_t v, int b) { return __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7440 | b)) - 8388608.0f; }
static __device__ __forceinline__ float half_float(uint32_t v, int h) { return h ? __high2float(*(const __half2 *)&v) : __low2float(*(const __half2 *)&v); }

/* Scale and addend of group j (Q6_K: of its half q), row half hf. */
template <int T>
static __device__ __forceinline__ void scale_of(float &d, float &m, const lg_hold<T> &o, int hf, int j, int q) {
    typedef lg_fmt<T> F;
    if (F::pair) {
        const uint32_t v = part4(o.s[F::pair ? hf : 0], j);
        d = half_float(v, 0);
        m = half_float(v, 1);
        return;
    }
    const uint32_t v = part4(o.s[0], hf * 2 + (j >> 1));
    if (F::k45) {
        d = half_float(o.d[hf], 0) * byte_float(v, (j & 1) * 2);
        m = -half_float(o.d[hf], 1) * byte_float(v, (j & 1) * 2 + 1);
    } else if (F::q6) {
        d = half_float(o.d[hf], 0) * (float)(int8_t)(v >> ((j & 1) * 16 + q * 8));
        m = -32.0f * d;
    } else {
        d = half_float(v, j & 1);
    }
}

/* xs: this lane's part of the first input column of its piece. side: of the piece's first group; the lane's pairs of columns lie at
 * pair[nt], the next group `step` on. Columns beyond n_tok hold anything: nobody reads their sums. */
template <int T, int NT, bool ONE>
static __device__ __forceinline__ void lg_multiply(float (*acc)[4], const lg_hold<T> &o, const uint16_t *xs, const float *side, const int *pair, int step, int64_t stride8, int n_live) {
    typedef lg_fmt<T> F;
    constexpr bool BF = T == LG_DTYPE_BF16;
    constexpr int GROUPS = F::rows ? 1 : 4;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        uint32_t a0[4], a1[4];
        float d0 = 1, m0 = 0, d1 = 1, m1 = 0, e0 = 1, n0 = 0, e1 = 1, n1 = 0;
        if (F::rows) {
            a0[0] = o.c[0].x; a0[1] = o.c[0].y; a0[2] = o.c[0].z; a0[3] = o.c[0].w;
            a1[0] = o.c[1].x; a1[1] = o.c[1].y; a1[2] = o.c[1].z; a1[3] = o.c[1].w;
        } else {
            unpack<T>(a0, o, 0, j);
            unpack<T>(a1, o, 1, j);
            scale_of<T>(d0, m0, o, 0, j, 0);
            scale_of<T>(d1, m1, o, 1, j, 0);
            if (F::q6) {
                scale_of<T>(e0, n0, o, 0, j, 1);
                scale_of<T>(e1, n1, o, 1, j, 1);
            }
        }
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            uint4 b = make_uint4(0, 0, 0, 0);
            if (nt < n_live) b = *(const uint4 *)(xs + nt * stride8 + j * 32);
            if (BF) {
                mma_rows<BF>(acc[nt], o.c[0], o.c[1], b);
                continue;
            }
            float c[4];
            const float *beside = side + j * step + pair[nt];
            const float4 u = *(const float4 *)beside; /* scales, sums */
            if (lg_folds<T>) lg_mma<false>(c, a0[0], a1[0], a0[1], a1[1], b.x, b.y, u.z, u.w, u.z, u.w);
            else lg_mma<false>(c, a0[0], a1[0], a0[1], a1[1], b.x, b.y, 0, 0, 0, 0);
            if (F::q6) {
                float e[4];
                const float2 v = *(const float2 *)(beside + 4);
                lg_mma<false>(e, a0[2], a1[2], a0[3], a1[3], b.z, b.w, 0, 0, 0, 0);
                acc[nt][0] += u.x * (d0 * c[0] + e0 * e[0]) + m0 * u.z + n0 * v.x;
                acc[nt][2] += u.x * (d1 * c[2] + e1 * e[2]) + m1 * u.z + n1 * v.x;
                if (!ONE) {
                    acc[nt][1] += u.y * (d0 * c[1] + e0 * e[1]) + m0 * u.w + n0 * v.y;
                    acc[nt][3] += u.y * (d1 * c[3] + e1 * e[3]) + m1 * u.w + n1 * v.y;
                }
                continue;
            }
            mma<false>(c, a0[2], a1[2], a0[3], a1[3], b.z, b.w);
            if (!F::rows && !lg_folds<T>) {
                acc[nt][0] += m0 * u.z;
                acc[nt][2] += m1 * u.z;
                if (!ONE) {
                    acc[nt][1] += m0 * u.w;
                    acc[nt][3] += m1 * u.w;
                }
            }
            acc[nt][0] += d0 * u.x * c[0];
            acc[nt][2] += d1 * u.x * c[2];
            if (!ONE) {
                acc[nt][1] += d0 * u.y * c[1];
                acc[nt][3] += d1 * u.y * c[3];
            }
        }
    }
}
#endif
