/* Attention of one row per sequence over the paged cache, dense and hybrid, in one launch (decode_work.cuh says how work is cut).
 *
 * Tensor kernel (f16, bf16, KV8 caches): 16 tokens are the 16 rows of an m16n8 product, up to 8 query heads its 8 columns, so
 * nothing is padded but heads; P is transposed in registers for V^T P. Queries and P go in as a rounded part and the rest, two
 * products each, so results are as good as f32 sums: tensor cores have that to spare where memory is the limit.
 * KV8: keys stay int8 (m16n8k32), queries are three int8 digits; K's scales multiply the sums of their group of 32. V's numbers are
 * exact in bf16, its scales multiply P, which is rounded. The limit is instructions, so bytes of K are never unpacked.
 * FMA kernel (f32 caches, f32 compute, head sizes without a tensor kernel): the same feed, lanes own head dimensions.
 *
 * Raw scores of heads that make a set leave in the same pass: the mean over the group of the products before scaling; where a
 * group needs several chunks, the mean query rides along as column 7. */
#include "ops/cuda/decode_work.cuh"

/* Heads of this segment's chunk. */
static __device__ __forceinline__ int32_t dec_heads(const dec_args &a, const dec_seg &g) {
    return (int32_t)dec_min(a.per_chunk, a.group - g.c * a.per_chunk);
}

/* Columns are query heads, then zeros; the last is the mean query where `dec_has_mean`. Their loads carry no branch, so that all of a
 * thread's are in flight together: one after the other they took longer than a short context. */
static __device__ __forceinline__ const float *dec_query_row(const dec_args &a, const dec_seg &g, int32_t col) {
    const int32_t last = dec_heads(a, g) - 1;
    return a.q + ((int64_t)g.s * a.n_head + (int64_t)g.h * a.group + g.c * a.per_chunk + (col < last ? col : last)) * a.hd;
}
/* A number of dec_args.raw, when it is there. */
static __device__ __forceinline__ float dec_arrived(const float *at) {
    uint32_t x = lg_look_at(at);
    while (x == LG_CUDA_ABSENT) {
        LG_SPIN();
        x = lg_look_at(at);
    }
    return __uint_as_float(x);
}
/* Raw heads (dec_args.raw): the segment's queries, ready, into `to` [group][HD]; newest: K and V of the token into the cache, by a warp each. Every thread of the block calls it. */
template <int DT, int HD> static __device__ __forceinline__ void dec_heads_of(const dec_args &a, const dec_seg &g, bool newest, float *to) {
    enum { E = HD / 32 };
    const lg_cuda_raw &raw = a.raw;
    const int32_t lane = (int32_t)threadIdx.x & 31, n_warp = (int32_t)blockDim.x >> 5;
    for (int32_t i = (int32_t)threadIdx.x; i < a.group * (HD / 2); i += (int32_t)blockDim.x) { /* a pair */
        const int32_t h = i / (HD / 2), k = i % (HD / 2), first = h * HD + (raw.interleaved ? 2 * k : k), second = first + (raw.interleaved ? 1 : HD / 2), all = g.h * a.group * HD;
        const float c = raw.cs[k], s = raw.sn[k], b0 = raw.bq ? raw.bq[all + first] : 0.0f, b1 = raw.bq ? raw.bq[all + second] : 0.0f;
        const float x = dec_arrived(raw.q + all + first) + b0, y = dec_arrived(raw.q + all + second) + b1;
        to[first] = x * c - y * s;
        to[second] = y * c + x * s;
    }
    for (int32_t which = (int32_t)threadIdx.x >> 5; newest && which < 2; which += n_warp) {
        const float *from = (which ? raw.v : raw.k) + g.h * HD, *bias = which ? raw.bv : raw.bk;
        const int32_t at = g.len - 1;
        const int64_t row = ((int64_t)g.page[at / LG_PAGE] * a.n_kv + g.h) * LG_PAGE + at % LG_PAGE;
        lg_kv_geom geom = {};
        float v[E];
        geom.dtype = (lg_dtype)DT;
        geom.head_dim = HD;
#pragma unroll
        for (int32_t i = 0; i < E; i++) v[i] = dec_arrived(from + i * 32 + lane) + (bias ? bias[g.h * HD + i * 32 + lane] : 0.0f);
        if (which == 0) {
            float turned[E];
#pragma unroll
            for (int32_t i = 0; i < E; i++) {
                const int32_t k = raw.interleaved ? (i * 32 + lane) >> 1 : i % (E / 2) * 32 + lane;
                const float c = raw.cs[k], s = raw.sn[k], near = __shfl_xor_sync(0xffffffffu, v[i], 1), other = raw.interleaved ? near : v[(i + E / 2) % E];
                turned[i] = (raw.interleaved ? lane & 1 : i >= E / 2) ? v[i] * c + other * s : v[i] * c - other * s;
            }
#pragma unroll
            for (int32_t i = 0; i < E; i++) v[i] = turned[i];
        }
        lg_kv_put_row<E>((uint8_t *)(which ? a.v : a.k) + row * a.row_bytes, geom, v, lane);
        lg_bulk_sees();
    }
    __syncthreads();
}
static __device__ __forceinline__ bool dec_has_mean(const dec_args &a, const dec_seg &g) { return a.n_chunk > 1 && g.score; }
static __device__ __forceinline__ const float *dec_group_queries(const dec_args &a, const dec_seg &g) {
    return a.q + ((int64_t)g.s * a.n_head + (int64_t)g.h * a.group) * a.hd;
}
static __device__ __forceinline__ float dec_mean_query(const dec_args &a, const dec_seg &g, int32_t d) {
    const float *q = dec_group_queries(a, g) + d;
    float sum = 0;
    for (int32_t i = 0; i < a.group; i++) sum += q[(int64_t)i * a.hd];
    return sum / (float)a.group;
}

static __device__ __forceinline__ float *dec_score_at(const dec_args &a, const dec_seg &g) {
    return a.score + ((int64_t)g.s * a.n_kv + g.h) * a.max_len;
}

/* ---- tensor kernel ---- */
template <int DT> static __device__ __forceinline__ uint32_t tc_pack(float x, float y) {
    if (DT == LG_DTYPE_F16) {
        const __half2 h = __floats2half2_rn(x, y);
        return *(const uint32_t *)(const void *)&h;
    }
    const __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
    return *(const uint32_t *)(const void *)&h;
}
template <int DT> static __device__ __forceinline__ float tc_round(float x) {
    if (DT == LG_DTYPE_F16) return __half2float(__float2half_rn(x));
    return __bfloat162float(__float2bfloat16_rn(x));
}
template <int DT> static __device__ __forceinline__ void tc_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    if (DT == LG_DTYPE_F16) lg_mma_f16(c, a, b);
    else lg_mma_bf16(c, a, b);
}

/* Bytes 0 and 2 as bf16: 128 + low seven bits, less 128 or (negative) 256. Exact. */
static __device__ __forceinline__ uint32_t tc_bytes(uint32_t w) {
    const uint32_t x = lg_and_or(w, 0x007f007fu, 0x43004300u), y = lg_and_or(w, 0x00800080u, 0x43004300u);
    const __nv_bfloat162 r = __hsub2(*(const __nv_bfloat162 *)(const void *)&x, *(const __nv_bfloat162 *)(const void *)&y);
    return *(const uint32_t *)(const void *)&r;
}
static __device__ __forceinline__ float tc_half(uint32_t bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }

/* Head dimension of row g + 8*r of output tile mt. */
template <int DT, int HD> static __device__ __forceinline__ int32_t tc_out_dim(int32_t mt, int32_t r, int32_t g) {
    if (DT != LG_DTYPE_KV8) return mt * 16 + r * 8 + g;
    if (mt < HD / 32 * 2) return (mt >> 1) * 32 + 4 * g + (mt & 1) * 2 + r;
    return mt * 16 + 2 * g + r;
}

/* acc: columns 2t and 2t+1. m, l (of this thread's rows): the same; KV8: [0] of head g. */
template <int HD> struct tc_state { float m[2], l[2], acc[HD / 16][4]; };

/* Added to an integer below 2^22 in size the bits become those of the float TC_BIAS_F + integer, and the other way round. */
enum { TC_BIAS = 0x4b400000 };
#define TC_BIAS_F 12582912.0f

/* A warp's queries as fragments; unit[i]: what column 2t+i was divided by. */
template <int DT, int HD> struct tc_query { /* rounded and rest; f16: brought near 1 */
    uint32_t hi[HD / 16][2], lo[HD / 16][2];
    float unit[2];
};
/* KV8: rounded to multiples of 2^-22 of the power of two above the head's largest number, as three int8 digits: products with int8 keys
 * are integers, exact. Rows of the products are heads: high[j] has the first digits of group j of 32 numbers as rows 0..7, the second
 * ones as rows 8..15; low[j/2] the third ones, as rows 0..7 for even and 8..15 for odd j. */
template <int HD> struct tc_query<LG_DTYPE_KV8, HD> {
    enum { GROUPS = (HD + 31) / 32 };
    static_assert(GROUPS % 2 == 0, "groups in pairs");
    uint32_t high[GROUPS][4], low[GROUPS / 2][4];
    float unit[1]; /* of head g */
};

/* Power of two not above x > 0 (in a range that is safe to divide by). */
static __device__ __forceinline__ int32_t tc_exponent(float x) {
    const int32_t e = (int32_t)(__float_as_uint(x) >> 23); /* biased */
    return e < 24 ? 127 : e > 252 ? 252 : e;
}
static __device__ __forceinline__ float tc_power(int32_t biased) { return __uint_as_float((uint32_t)biased << 23); }

/* A thread's numbers of column g's query, in pieces of side-by-side ones. KV8: 4 of each half of a group of 32; else 2 of each 8. */
template <int DT, int HD> struct tc_numbers {
    enum { PIECE = DT == LG_DTYPE_KV8 ? 4 : 2, N = HD / 4 / PIECE };
    float x[N][PIECE];
    static __device__ __forceinline__ int32_t at(int32_t i) { /* where piece i begins */
        const int32_t t = (int32_t)threadIdx.x & 3;
        return DT != LG_DTYPE_KV8 ? 8 * i + 2 * t : i < HD / 32 * 2 ? (i >> 1) * 32 + 8 * t + (i & 1) * 4 : (i >> 1) * 32 + 4 * t;
    }
    __device__ __forceinline__ void load(const dec_args &a, const dec_seg &seg, const float *heads) { /* heads: of dec_heads_of, or NULL */
        const int32_t col = ((int32_t)threadIdx.x & 31) >> 2;
        const float *row = heads ? heads + (col < a.group ? col : a.group - 1) * HD : dec_query_row(a, seg, col);
#pragma unroll
        for (int32_t i = 0; i < N; i++) {
            if constexpr (PIECE == 4) {
                const float4 y = *(const float4 *)(const void *)(row + at(i));
                x[i][0] = y.x; x[i][1] = y.y; x[i][2] = y.z; x[i][3] = y.w;
            } else {
                const float2 y = *(const float2 *)(const void *)(row + at(i));
                x[i][0] = y.x; x[i][1] = y.y;
            }
        }
    }
};

/* Queries of column g. */
template <int DT, int HD>
static __device__ __forceinline__ void tc_queries(tc_query<DT, HD> *to, const tc_numbers<DT, HD> &from, const dec_args &a, const dec_seg &seg) {
    const int32_t lane = (int32_t)threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const bool real = g < dec_heads(a, seg), mean = dec_has_mean(a, seg) && g == DEC_HEADS - 1;
    enum { PIECE = tc_numbers<DT, HD>::PIECE, N = tc_numbers<DT, HD>::N };
    float q[N][PIECE];
#pragma unroll
    for (int32_t i = 0; i < N * PIECE; i++) q[i / PIECE][i % PIECE] = real ? from.x[i / PIECE][i % PIECE] : 0.0f;
    if (mean) {
        const float *all = dec_group_queries(a, seg);
#pragma unroll 1
        for (int32_t h = 0; h < a.group; h++) {
#pragma unroll
            for (int32_t i = 0; i < N * PIECE; i++) {
                float *x = &q[i / PIECE][i % PIECE];
                *x = (h ? *x : 0.0f) + all[h * HD + tc_numbers<DT, HD>::at(i / PIECE) + i % PIECE];
            }
        }
#pragma unroll
        for (int32_t i = 0; i < N * PIECE; i++) q[i / PIECE][i % PIECE] /= (float)a.group;
    }
    __syncwarp();
    int32_t e = 127;
    if (DT != LG_DTYPE_BF16) {
        float max = 0, none = 0; /* none: 0, or no number where a query is none */
#pragma unroll
        for (int32_t i = 0; i < N * PIECE; i++) {
            max = fmaxf(max, fabsf(q[i / PIECE][i % PIECE]));
            none = fmaf(q[i / PIECE][i % PIECE], 0.0f, none);
        }
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
        e = tc_exponent(max);
        if (DT == LG_DTYPE_KV8) {
            none += __shfl_xor_sync(0xffffffffu, none, 1);
            none += __shfl_xor_sync(0xffffffffu, none, 2);
            to->unit[0] = tc_power(e - 21) + none;
        } else {
            to->unit[0] = __shfl_sync(0xffffffffu, tc_power(e), 8 * t);
            to->unit[1] = __shfl_sync(0xffffffffu, tc_power(e), 8 * t + 4);
        }
    }
    if constexpr (DT == LG_DTYPE_KV8) {
        const float f = tc_power(254 - e) * 2097152.0f; /* |q| f < 2^22: rounded by adding TC_BIAS_F */
#pragma unroll
        for (int32_t i = 0; i < tc_query<DT, HD>::GROUPS * 2; i++) {
            uint32_t x[4] = { 0, 0, 0, 0 };
#pragma unroll
            for (int32_t k = 0; k < 4 && i < N; k++) /* 128 more in each byte: no carries between signed digits */
                x[k] = (__float_as_uint(fmaf(f, q[i][k], TC_BIAS_F)) - TC_BIAS + 0x00808080u) ^ 0x00808080u;
            const uint32_t even = __byte_perm(x[0], x[1], 0x5140), odd = __byte_perm(x[2], x[3], 0x5140); /* low bytes, middle bytes */
            to->low[i >> 2][(i & 1) * 2 + (i >> 1 & 1)] = __byte_perm(even, odd, 0x5410);
            to->high[i >> 1][(i & 1) * 2 + 1] = __byte_perm(even, odd, 0x7632);
            to->high[i >> 1][(i & 1) * 2] = __byte_perm(__byte_perm(x[0], x[1], 0x0062), __byte_perm(x[2], x[3], 0x0062), 0x5410);
        }
    } else {
        const float f = tc_power(254 - e);
#pragma unroll
        for (int32_t i = 0; i < N; i++) {
            const float x = f * q[i][0], y = f * q[i][1];
            to->hi[i >> 1][i & 1] = tc_pack<DT>(x, y);
            to->lo[i >> 1][i & 1] = tc_pack<DT>(x - tc_round<DT>(x), y - tc_round<DT>(y));
        }
    }
}

/* Where a lane reads 16 bytes of row r: of the `odd`'th of a pair of pieces. In boxes 64 columns lie together, swizzled (boxes.cuh). */
struct tc_rows {
    lg_smem row;
    uint32_t box, piece[4]; /* bytes from 64 columns to the next; places of four pairs */
    __device__ __forceinline__ tc_rows(lg_smem base, int32_t r, int32_t odd, int32_t room, bool boxes) {
        row = base + (lg_smem)(r * (boxes ? 128 : room));
        box = boxes ? 2048 : 128;
        const uint32_t turn = boxes ? (uint32_t)(row >> 7 & 7) << 4 : 0;
#pragma unroll
        for (int32_t i = 0; i < 4; i++) piece[i] = (uint32_t)(i * 32 + odd * 16) ^ turn;
    }
    __device__ __forceinline__ lg_smem operator()(int32_t pair) const { return row + (lg_smem)((uint32_t)(pair >> 2) * box + piece[pair & 3]); }
};
/* c[16 tokens x 8 heads] = K q */
template <int DT, int HD, int ROOM>
static __device__ __forceinline__ void tc_scores(float c[4], lg_smem k, const tc_query<DT, HD> &q, bool boxes) {
    const int32_t lane = (int32_t)threadIdx.x & 31;
    const tc_rows at(k, lane & 15, lane >> 4, ROOM, boxes);
    float x[4] = { 0, 0, 0, 0 }, y[4] = { 0, 0, 0, 0 };
#pragma unroll
    for (int32_t ks = 0; ks < HD / 16; ks++) {
        uint32_t r[4];
        lg_ldm4(r, at(ks));
        tc_mma<DT>(x, r, q.hi[ks]);
        tc_mma<DT>(y, r, q.lo[ks]);
    }
#pragma unroll
    for (int32_t i = 0; i < 4; i++) c[i] = x[i] + y[i];
}

/* The scales of a KV8 row, one for each 32 numbers. */
template <int HD> static __device__ __forceinline__ void tc_scales(float s[(HD + 31) / 32], lg_smem row) {
    enum { WORDS = (HD + 63) / 64 };
    uint32_t w[WORDS];
    if constexpr (WORDS % 2 == 0) {
#pragma unroll
        for (int32_t i = 0; i < WORDS; i += 2) {
            const uint2 x = lg_lds64(row + (lg_smem)(HD + 4 * i));
            w[i] = x.x;
            w[i + 1] = x.y;
        }
    } else {
#pragma unroll
        for (int32_t i = 0; i < WORDS; i++) w[i] = lg_lds32(row + (lg_smem)(HD + 4 * i));
    }
#pragma unroll
    for (int32_t j = 0; j < (HD + 31) / 32; j++) s[j] = tc_half(w[j >> 1] >> 16 * (j & 1) & 0xffffu);
}
/* KV8: c[8 heads x 16 tokens] = q K^T; a thread has head g, columns 2t, 2t + 1, 2t + 8, 2t + 9. k: where its numbers of the rows of columns g
 * and g + 8 begin (the 8*t'th); at: where the rows of its columns begin, for their scales. */
static __device__ __forceinline__ float tc_sum(int32_t x) { return __uint_as_float((uint32_t)x) - TC_BIAS_F; }
template <int HD>
static __device__ __forceinline__ void tc_scores_kv8(float c[4], const lg_smem k[2], const lg_smem at[4], const tc_query<LG_DTYPE_KV8, HD> &q) {
    enum { GROUPS = (HD + 31) / 32 };
    const int32_t t = (int32_t)threadIdx.x & 3;
    float s[4][GROUPS];
#pragma unroll
    for (int32_t i = 0; i < 4; i++) {
        tc_scales<HD>(s[i], at[i]);
        c[i] = 0;
    }
#pragma unroll
    for (int32_t j = 0; j < GROUPS; j++) {
#pragma unroll
        for (int32_t n = 0; n < 2; n++) { /* eight tokens */
            uint32_t r[2];
            if (32 * j + 32 > HD) {
                r[0] = lg_lds32(k[n] + (lg_smem)(32 * j - 4 * t));
                r[1] = 0;
            } else if (HD == 64) { /* rows are on 4 bytes only */
                r[0] = lg_lds32(k[n] + 32 * j);
                r[1] = lg_lds32(k[n] + 32 * j + 4);
            } else {
                const uint2 w = lg_lds64(k[n] + 32 * j);
                r[0] = w.x;
                r[1] = w.y;
            }
            int32_t x[4], y[4];
            lg_mma_s8(x, q.high[j], r, TC_BIAS);
            lg_mma_s8(y, q.low[j >> 1], r, TC_BIAS);
#pragma unroll
            for (int32_t e = 0; e < 2; e++) {
                const float sum = fmaf(fmaf(tc_sum(x[e]), 256.0f, tc_sum(x[2 + e])), 256.0f, tc_sum(y[(j & 1) * 2 + e]));
                c[2 * n + e] = fmaf(s[2 * n + e][j], sum, c[2 * n + e]);
            }
        }
    }
#pragma unroll
    for (int32_t i = 0; i < 4; i++) c[i] *= q.unit[0];
}

/* acc[dims x heads] += V^T P */
template <int DT, int HD, int ROOM>
static __device__ __forceinline__ void tc_values(float acc[HD / 16][4], lg_smem v, const float p[4], bool boxes) {
    const int32_t lane = (int32_t)threadIdx.x & 31;
    const uint32_t hi[2] = { lg_movm(tc_pack<DT>(p[0], p[1])), lg_movm(tc_pack<DT>(p[2], p[3])) };
    const uint32_t lo[2] = { lg_movm(tc_pack<DT>(p[0] - tc_round<DT>(p[0]), p[1] - tc_round<DT>(p[1]))),
                             lg_movm(tc_pack<DT>(p[2] - tc_round<DT>(p[2]), p[3] - tc_round<DT>(p[3]))) };
    const tc_rows at(v, (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1, ROOM, boxes);
#pragma unroll
    for (int32_t mt = 0; mt < HD / 16; mt++) {
        uint32_t r[4];
        lg_ldm4_t(r, at(mt));
        tc_mma<DT>(acc[mt], r, hi);
        tc_mma<DT>(acc[mt], r, lo);
    }
}
/* The same of KV8 rows, P rounded only. p: as c of tc_scores_kv8; at[i]: where the row begins, from[i]: its 4*g'th number. */
template <int HD>
static __device__ __forceinline__ void tc_values_kv8(float acc[HD / 16][4], const lg_smem at[4], const lg_smem from[4], const float p[4]) {
    enum { DT = LG_DTYPE_KV8, GROUPS = (HD + 31) / 32 };
    const int32_t g = ((int32_t)threadIdx.x & 31) >> 2;
    float s[4][GROUPS];
#pragma unroll
    for (int32_t i = 0; i < 4; i++) tc_scales<HD>(s[i], at[i]);
#pragma unroll
    for (int32_t j = 0; j < GROUPS; j++) {
        const bool full = 32 * j + 32 <= HD;
        const uint32_t b[2] = { tc_pack<DT>(p[0] * s[0][j], p[1] * s[1][j]), tc_pack<DT>(p[2] * s[2][j], p[3] * s[3][j]) };
        uint32_t w[4];
#pragma unroll
        for (int32_t i = 0; i < 4; i++) w[i] = full ? lg_lds32(from[i] + 32 * j) : lg_lds16(from[i] + (lg_smem)(32 * j - 2 * g));
#pragma unroll
        for (int32_t k = 0; k < (full ? 2 : 1); k++) { /* byte i of two tokens side by side */
            const uint32_t r[4] = { tc_bytes(__byte_perm(w[0], w[1], k ? 0x6622 : 0x4400)), tc_bytes(__byte_perm(w[0], w[1], k ? 0x7733 : 0x5511)),
                                    tc_bytes(__byte_perm(w[2], w[3], k ? 0x6622 : 0x4400)), tc_bytes(__byte_perm(w[2], w[3], k ? 0x7733 : 0x5511)) };
            tc_mma<DT>(acc[2 * j + k], r, b);
        }
    }
}

/* x / group, rounded once. */
static __device__ __forceinline__ float tc_mean(const dec_args &a, float x) {
    const float y = x * a.group_rate;
    return fmaf(fmaf(-y, (float)a.group, x), a.group_rate, y);
}
/* A running softmax takes in the largest new exponent: what the old sums are multiplied by; *base: what is subtracted from exponents. */
static __device__ __forceinline__ float tc_climb(float *m, float max, float *base) {
    max = fmaxf(*m, max);
    *base = max == -INFINITY ? 0.0f : max;
    const float f = lg_exp2(*m - *base);
    *m = max;
    return f;
}

/* One unit: 16 rows of K and of V at `stage`. score: NULL or where the unit's first token's score goes. boxes: a full unit, in boxes. */
template <int DT, int HD, int ROOM>
static __device__ __forceinline__ void tc_unit(tc_state<HD> *st, lg_smem stage, lg_smem meta, const tc_query<DT, HD> &q, const dec_args &a, float *score, bool boxes) {
    const int32_t lane = (int32_t)threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    float off[2], c[4]; /* off: 0, or -infinity where the row does not count */
#pragma unroll
    for (int32_t i = 0; i < 2; i++) off[i] = boxes ? 0.0f : __uint_as_float(lg_lds32(dec_meta(meta, g + 8 * i) + 4));
    tc_scores<DT, HD, ROOM>(c, stage, q, boxes);
    if (DT == LG_DTYPE_F16) {
        c[0] *= q.unit[0]; c[1] *= q.unit[1]; c[2] *= q.unit[0]; c[3] *= q.unit[1];
    }
    if (score) {
        const bool mean = a.n_chunk == 1;
#pragma unroll
        for (int32_t i = 0; i < 2; i++) {
            float x = mean ? c[2 * i] + c[2 * i + 1] : t == 3 ? c[2 * i + 1] : 0.0f;
            x += __shfl_xor_sync(0xffffffffu, x, 1);
            x += __shfl_xor_sync(0xffffffffu, x, 2);
            if (t == 0 && off[i] == 0.0f) score[g + 8 * i] = mean ? tc_mean(a, x) : x;
        }
    }
    const float x[4] = { fmaf(c[0], a.scale2, off[0]), fmaf(c[1], a.scale2, off[0]), fmaf(c[2], a.scale2, off[1]), fmaf(c[3], a.scale2, off[1]) };
    float p[4], f[2];
    bool moved = false;
#pragma unroll
    for (int32_t i = 0; i < 2; i++) {
        float max = fmaxf(x[i], x[i + 2]), base;
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 4));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 8));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 16));
        moved = moved || max > st->m[i];
        f[i] = tc_climb(&st->m[i], max, &base);
        p[i] = lg_exp2(x[i] - base);
        p[i + 2] = lg_exp2(x[i + 2] - base);
        st->l[i] = st->l[i] * f[i] + (p[i] + p[i + 2]);
    }
    if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
        for (int32_t i = 0; i < HD / 16 * 4; i++) st->acc[i >> 2][i & 3] *= f[i & 1];
    }
    tc_values<DT, HD, ROOM>(st->acc, stage + DEC_UNIT * ROOM, p, boxes);
}

/* Token of a unit that is column m of the keys' products and row m of the values': read without padding, rows come from different banks that way. */
static __device__ __forceinline__ int32_t tc_kv8_row(int32_t m) { return 4 * (m & 3) + (m >> 2); }
/* The same for KV8. A thread has head g. FULL: a full unit (dec_full), without padding. */
template <int HD, int ROOM, bool FULL>
static __device__ __forceinline__ void tc_unit_kv8(tc_state<HD> *st, lg_smem stage, lg_smem meta, const tc_query<LG_DTYPE_KV8, HD> &q, const dec_args &a, float *score) {
    enum { ROW = HD + 2 * ((HD + 31) / 32), V = DEC_UNIT * ROOM };
    const int32_t lane = (int32_t)threadIdx.x & 31, g = lane >> 2, t = lane & 3, row0 = tc_kv8_row(2 * t);
    const int32_t step[4] = { 0, 4, 2, 6 }; /* rows of columns 2t, 2t + 1, 2t + 8, 2t + 9, from row0 */
    lg_smem k[2], at[4], from[4];
    float off[4], c[4]; /* off: 0, or -infinity where the row does not count */
    if (FULL) {
        k[0] = stage + (lg_smem)(tc_kv8_row(g) * ROW + 8 * t);
        k[1] = k[0] + 2 * ROW;
        at[0] = stage + (lg_smem)(row0 * ROW);
        from[0] = at[0] + (lg_smem)(V + 4 * g);
#pragma unroll
        for (int32_t i = 0; i < 4; i++) {
            at[i] = at[0] + (lg_smem)(step[i] * ROW);
            from[i] = from[0] + (lg_smem)(step[i] * ROW);
            off[i] = 0;
        }
    } else {
#pragma unroll
        for (int32_t i = 0; i < 2; i++) k[i] = stage + (lg_smem)lg_lds32(dec_meta(meta, tc_kv8_row(g) + 2 * i)) + (lg_smem)(8 * t);
#pragma unroll
        for (int32_t i = 0; i < 4; i++) {
            const uint2 m = lg_lds64(dec_meta(meta, row0 + step[i]));
            at[i] = stage + (lg_smem)m.x;
            from[i] = at[i] + (lg_smem)(V + 4 * g);
            off[i] = __uint_as_float(m.y);
        }
    }
    tc_scores_kv8<HD>(c, k, at, q);
    if (score) {
        const bool mean = a.n_chunk == 1, up = g & 4, odd = g & 2;
        float x[4];
#pragma unroll
        for (int32_t i = 0; i < 4; i++) x[i] = mean || g == DEC_HEADS - 1 ? c[i] : 0.0f;
        /* sums over heads; each exchange leaves a thread half of the tokens */
        const float y0 = (up ? x[2] : x[0]) + __shfl_xor_sync(0xffffffffu, up ? x[0] : x[2], 16);
        const float y1 = (up ? x[3] : x[1]) + __shfl_xor_sync(0xffffffffu, up ? x[1] : x[3], 16);
        float y = (odd ? y1 : y0) + __shfl_xor_sync(0xffffffffu, odd ? y0 : y1, 8);
        y += __shfl_xor_sync(0xffffffffu, y, 4);
        const float counts = up ? odd ? off[3] : off[2] : odd ? off[1] : off[0];
        if (!(g & 1) && (FULL || counts == 0.0f)) score[row0 + (up ? 2 : 0) + (odd ? 4 : 0)] = mean ? tc_mean(a, y) : y;
    }
    float x[4], p[4], base;
#pragma unroll
    for (int32_t i = 0; i < 4; i++) x[i] = FULL ? c[i] * a.scale2 : fmaf(c[i], a.scale2, off[i]);
    float max = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
    const bool moved = max > st->m[0];
    const float f = tc_climb(&st->m[0], max, &base);
#pragma unroll
    for (int32_t i = 0; i < 4; i++) {
        p[i] = lg_exp2(x[i] - base);
        at[i] += V;
    }
    st->l[0] = st->l[0] * f + ((p[0] + p[1]) + (p[2] + p[3]));
    if (__any_sync(0xffffffffu, moved)) {
        const float column[2] = { __shfl_sync(0xffffffffu, f, 8 * t), __shfl_sync(0xffffffffu, f, 8 * t + 4) };
#pragma unroll
        for (int32_t i = 0; i < HD / 16 * 4; i++) st->acc[i >> 2][i & 3] *= column[i & 1];
    }
    tc_values_kv8<HD>(st->acc, at, from, p);
}

/* State -> slot; with `add` the slot's state is merged in first. l is this thread's share until then. */
template <int DT, int HD>
static __device__ __forceinline__ void tc_put(float *slot, tc_state<HD> *st, int32_t heads, int32_t ng, bool add) {
    const int32_t lane = (int32_t)threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int32_t i = 0; i < 2; i++) {
        const int32_t h = 2 * t + i;
        float *mx = slot + heads * HD + h, *tot = mx + heads;
        float l, m, f = 1.0f, e = 0.0f;
        if (DT == LG_DTYPE_KV8) {
            l = st->l[0] + __shfl_xor_sync(0xffffffffu, st->l[0], 1);
            l = __shfl_sync(0xffffffffu, l + __shfl_xor_sync(0xffffffffu, l, 2), 4 * h);
            m = __shfl_sync(0xffffffffu, st->m[0], 4 * h);
        } else {
            l = st->l[i];
            m = st->m[i];
            for (int32_t d = 4; d < 32; d <<= 1) l += __shfl_xor_sync(0xffffffffu, l, d);
        }
        if (add && h < ng) {
            const float other = *mx, max = fmaxf(m, other);
            f = dec_exp(m, max);
            e = dec_exp(other, max);
            m = max;
            l = l * f + e * *tot;
        }
        __syncwarp(); /* every lane has read what lane g == 0 writes next */
        if (h < ng) {
            float *const row = slot + h * HD;
            if (add) {
#pragma unroll
                for (int32_t k = 0; k < HD / 8; k++) {
                    float *x = row + tc_out_dim<DT, HD>(k >> 1, k & 1, g);
                    *x = f * st->acc[k >> 1][2 * (k & 1) + i] + e * *x;
                }
            } else {
#pragma unroll
                for (int32_t k = 0; k < HD / 8; k++) row[tc_out_dim<DT, HD>(k >> 1, k & 1, g)] = st->acc[k >> 1][2 * (k & 1) + i];
            }
            if (g == 0) {
                *mx = m;
                *tot = l;
            }
        }
    }
}

/* Shared memory: rows of all warps' rings, what they know of the rows, their barriers, what dec_shared has, slots. */
typedef struct dec_room { dec_ring ring; dec_shared *sh; float *slots; } dec_room;
static __device__ __forceinline__ dec_room dec_rooms(uint8_t *smem, const dec_args &a, int32_t room, int32_t warp, int32_t n_warp) {
    const int32_t rows = a.n_stage * 2 * DEC_UNIT * room, meta = a.n_stage * DEC_UNIT * DEC_META, bar = a.n_stage * DEC_BAR;
    const lg_smem at = lg_smem_of(smem);
    dec_room r;
    r.ring.rows = at + (lg_smem)(warp * rows);
    r.ring.meta = at + (lg_smem)(n_warp * rows + warp * meta);
    r.ring.bar = at + (lg_smem)(n_warp * (rows + meta) + warp * bar);
    r.sh = (dec_shared *)(void *)(smem + n_warp * (rows + meta + bar));
    r.slots = (float *)(void *)(smem + n_warp * (rows + meta + bar) + (int32_t)sizeof(dec_shared));
    return r;
}

/* A kernel. MATH holds one warp's queries and running softmax of a segment. */
template <class MATH> static __device__ __forceinline__ void dec_run(const dec_args &a, uint8_t *smem) {
    const int32_t warp = __shfl_sync(0xffffffffu, (int32_t)threadIdx.x >> 5, 0); /* so the compiler knows it is the same in all lanes */
    const int32_t n_warp = (int32_t)blockDim.x >> 5, row = MATH::row_room(a);
    const dec_room room = dec_rooms(smem, a, row, warp, n_warp);
    dec_shared *sh = room.sh;
    bool waits = a.hybrid && !a.sized; /* sets come from another stream: a captured graph may have made that edge programmatic, too */
    if (waits) lg_dec_wait();
    dec_feed feed;
    dec_stretch at;
    feed.g = &sh->ahead[warp];
    const int32_t lane = (int32_t)threadIdx.x & 31;
    dec_raw raw = {};
    if (a.few) raw = dec_raw_of(a, lane < a.n_seq * a.n_kv * a.n_chunk ? lane : 0);
    if (MATH::BULK) { /* while that is on its way */
        if (lane == 0)
#pragma unroll 1
            for (int32_t i = 0; i < a.n_stage; i++) lg_bar_init(room.ring.bar + (lg_smem)(i * DEC_BAR));
        lg_bar_ready();
        __syncwarp();
    }
    if (a.few) {
        if (!dec_cut_few(a, sh, &at, feed.g, raw)) return; /* the whole block */
        LG_TOOK(a.sized ? LG_WAY_SIZED : LG_WAY_FEW);
    } else {
        if (!dec_cut_many(a, sh)) return;
        LG_TOOK(LG_WAY_MANY);
        at = sh->at;
        dec_seg_load(feed.g, a, at.index, at.begin);
    }
    if (a.sized && feed.g->ids) { /* few segments: the block has no other */
        if (!a.raw.q) {
            lg_dec_wait();
            waits = true;
        } else if (a.made.at) {
            LG_TOOK(LG_WAY_COUNTS);
            dec_await(a.made);
        }
    }
    dec_seg seg = dec_feed_begin<MATH::WHOLE>(&feed, a, at, warp, n_warp);
    int32_t ahead = 0, stage = 0;
    MATH math;
#pragma unroll 1
    for (int32_t waited = waits; waited < 2; waited++) { /* first with rows of old tokens, before the wait */
        if (waited) {
            if (a.raw.q) { /* (a set's last block of tokens may lie in several blocks' stretches: each writes the newest row that its masked rows copy) */
                LG_TOOK(LG_WAY_RAW);
                math.heads(a, seg, seg.len > 0 && at.hi > seg.end - 1 - ((1 << a.block_shift) - 1) / DEC_UNIT, room.slots);
            } else if (!waits) lg_dec_wait();
            if (a.release) lg_dec_go();
            math.load(a, seg, a.raw.q ? room.slots : NULL); /* on their way while the rings are filled */
            if (a.raw.q) __syncthreads(); /* slots may be written again */
        }
#pragma unroll 1
        for (; ahead + 1 < a.n_stage && (waited || dec_feed_old(&feed)); ahead++) MATH::issue(&feed, a, n_warp, room.ring);
    }
    const int32_t hi = at.hi;
    int32_t unit = at.lo + warp;
    uint32_t parity = 0; /* of the stages' barriers */
    for (;;) {
        float *const score = seg.score ? dec_score_at(a, seg) : NULL;
        const int32_t end = seg.end < hi ? seg.end : hi, full = MATH::WHOLE ? dec_full(a, seg) : 0;
        math.begin(a, seg);
        for (; unit < end; unit += n_warp) {
            if (!MATH::BULK) {
                lg_cp_wait(a.n_stage - 2);
            } else if (seg.n > 0) {
                lg_bar_wait(room.ring.bar + (lg_smem)(stage * DEC_BAR), parity >> stage & 1);
                parity ^= 1u << stage;
            }
            __syncwarp(); /* this unit's rows are here for all lanes; the stage before it is no longer read */
            MATH::issue(&feed, a, n_warp, room.ring);
            if (seg.n > 0)
                math.unit(room.ring.rows + (lg_smem)(stage * 2 * DEC_UNIT * row), dec_meta(room.ring.meta, stage * DEC_UNIT), a,
                          score ? score + (int64_t)(unit - seg.begin) * DEC_UNIT : NULL, unit < full);
            stage = stage + 1 == a.n_stage ? 0 : stage + 1;
        }
        const int32_t round = warp / a.n_slot, rounds = n_warp / a.n_slot;
        float *slot = room.slots + (warp - round * a.n_slot) * dec_state_floats(a.slot_heads, a.hd);
        for (int32_t r = rounds - 1; r >= 0; r--) {
            if (round == r) math.put(slot, a, dec_heads(a, seg), r != rounds - 1);
            if (r) __syncthreads();
        }
        dec_finish<MATH::HEAD, MATH::APART>(a, sh, seg, room.slots);
        if (seg.end >= hi) break;
        LG_TOOK(LG_WAY_FOLLOW);
        if (warp == 0) dec_seg_load(&sh->next, a, seg.index + 1, seg.end); /* the stretch goes on with the next segment */
        __syncthreads();
        seg = sh->next;
        math.load(a, seg, NULL);
        if (threadIdx.x == 0) dec_follow(sh, seg);
    }
    lg_cp_wait(0);
    if (!a.raw.q) return;
    for (int32_t i = 4 * (int32_t)threadIdx.x; blockIdx.x == 0 && i < a.raw.n_clear; i += 4 * (int32_t)blockDim.x) /* (not all blocks have work) */
        *(uint4 *)(void *)(a.raw.clear + i) = make_uint4(LG_CUDA_ABSENT, LG_CUDA_ABSENT, LG_CUDA_ABSENT, LG_CUDA_ABSENT);
    lg_dec_wait(); /* so that who waits for this kernel has waited for those before it */
}

template <int DT, int HD, int CHUNKS, int ROOM> struct tc_math {
    static constexpr bool BULK = LG_BULK, APART = DT == LG_DTYPE_KV8;
    static constexpr int WHOLE = !BULK ? DEC_NO_WHOLE : DT == LG_DTYPE_KV8 ? DEC_ONE_COPY : HD % 64 == 0 ? DEC_BOXES : DEC_NO_WHOLE;
    static constexpr int32_t HEAD = HD;
    static constexpr bool RAW = BULK && HD % 64 == 0;
    tc_numbers<DT, HD> numbers;
    tc_query<DT, HD> q;
    tc_state<HD> st;
    static __device__ __forceinline__ int32_t row_room(const dec_args &) { return ROOM; }
    static __device__ __forceinline__ void issue(dec_feed *f, const dec_args &a, int32_t n_warp, const dec_ring &ring) {
        dec_feed_issue<CHUNKS, DT == LG_DTYPE_KV8, BULK, WHOLE>(f, a, n_warp, ring, ROOM);
    }
    __device__ __forceinline__ void heads(const dec_args &a, const dec_seg &seg, bool newest, float *to) {
        if constexpr (RAW) dec_heads_of<DT, HD>(a, seg, newest, to);
    }
    __device__ __forceinline__ void load(const dec_args &a, const dec_seg &seg, const float *heads) { numbers.load(a, seg, heads); }
    __device__ __forceinline__ void begin(const dec_args &a, const dec_seg &seg) {
        tc_queries<DT, HD>(&q, numbers, a, seg);
#pragma unroll
        for (int32_t i = 0; i < 2; i++) {
            st.m[i] = -INFINITY;
            st.l[i] = 0;
        }
#pragma unroll
        for (int32_t i = 0; i < HD / 16 * 4; i++) st.acc[i >> 2][i & 3] = 0;
    }
    __device__ __forceinline__ void unit(lg_smem stage, lg_smem meta, const dec_args &a, float *score, bool full) {
        if constexpr (DT == LG_DTYPE_KV8) {
            if (WHOLE && full) tc_unit_kv8<HD, ROOM, true>(&st, stage, meta, q, a, score);
            else tc_unit_kv8<HD, ROOM, false>(&st, stage, meta, q, a, score);
        } else tc_unit<DT, HD, ROOM>(&st, stage, meta, q, a, score, WHOLE && full);
    }
    __device__ __forceinline__ void put(float *slot, const dec_args &a, int32_t ng, bool add) { tc_put<DT, HD>(slot, &st, a.slot_heads, ng, add); }
};

/* KV8 needs as many warps as registers allow for its instructions; with 16 bits eight fill memory as well and start sooner. Boxes of two stages do
 * so, too, and with fewer bytes on their way others wait less. */
template <int DT, int HD> struct tc_block { enum { WARPS = DT == LG_DTYPE_KV8 && HD <= 128 ? DEC_WARPS : 8 }; };
template <int DT, int HD, int CHUNKS, int ROOM>
static __global__ void __launch_bounds__(tc_block<DT, HD>::WARPS * 32, 1) dec_tensor(const __grid_constant__ dec_args a) {
    LG_SMEM(smem);
    if (tc_math<DT, HD, CHUNKS, ROOM>::WHOLE == DEC_BOXES && threadIdx.x < 2) lg_box_ahead(&a.box[threadIdx.x]);
    dec_run<tc_math<DT, HD, CHUNKS, ROOM>>(a, smem);
}

enum { FMA_WARPS = 8 };
/* ---- FMA kernel: lane l owns head dimensions 64*j + 2*l and the next one ---- */
template <int DT> static __device__ __forceinline__ float2 fma_pair(lg_smem row, int32_t e, int32_t hd) {
    if (DT == LG_DTYPE_F32) {
        const uint2 w = lg_lds64(row + (lg_smem)(4 * e));
        return make_float2(__uint_as_float(w.x), __uint_as_float(w.y));
    }
    if (DT == LG_DTYPE_BF16) {
        const uint32_t w = lg_lds32(row + (lg_smem)(2 * e));
        return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
    }
    if (DT == LG_DTYPE_F16) {
        const uint32_t w = lg_lds32(row + (lg_smem)(2 * e));
        return make_float2(tc_half(w & 0xffffu), tc_half(w >> 16));
    }
    const uint32_t w = lg_lds16(row + (lg_smem)e);
    const float s = tc_half(lg_lds16(row + (lg_smem)(hd + 2 * (e >> 5))));
    return make_float2((float)(int8_t)(w & 0xffu) * s, (float)(int8_t)(w >> 8) * s);
}

template <int D> static __device__ __forceinline__ void fma_fold(float s[32], int32_t lane) {
#pragma unroll
    for (int32_t i = 0; i < D; i++) {
        const float keep = lane & D ? s[i + D] : s[i], send = lane & D ? s[i] : s[i + D];
        s[i] = keep + __shfl_xor_sync(0xffffffffu, send, D);
    }
}

template <int NG, int J> struct fma_state { float m, l, acc[NG][2 * J]; }; /* m, l: lane's head l%NG */

template <int DT, int J, int NG>
static __device__ __forceinline__ void fma_unit(fma_state<NG, J> *st, lg_smem stage, lg_smem meta, const float q[NG][2 * J], const dec_args &a, float *score) {
    const int32_t lane = (int32_t)threadIdx.x & 31;
    const int32_t my_tok = lane / NG;
    for (int32_t t0 = 0; t0 < DEC_UNIT; t0 += 32 / NG) {
        float s[32]; /* [token][head] */
#pragma unroll
        for (int32_t i = 0; i < 32 / NG; i++) {
            const lg_smem row = stage + (lg_smem)lg_lds32(dec_meta(meta, t0 + i));
            float2 k[J];
#pragma unroll
            for (int32_t j = 0; j < J; j++) k[j] = 64 * j + 2 * lane < a.hd ? fma_pair<DT>(row, 64 * j + 2 * lane, a.hd) : make_float2(0.0f, 0.0f);
#pragma unroll
            for (int32_t h = 0; h < NG; h++) {
                float x = 0;
#pragma unroll
                for (int32_t j = 0; j < J; j++) x = fmaf(q[h][2 * j + 1], k[j].y, fmaf(q[h][2 * j], k[j].x, x));
                s[i * NG + h] = x;
            }
        }
        fma_fold<16>(s, lane); /* sums over lanes: lane l ends with number l */
        fma_fold<8>(s, lane);
        fma_fold<4>(s, lane);
        fma_fold<2>(s, lane);
        fma_fold<1>(s, lane);
        const bool valid = __uint_as_float(lg_lds32(dec_meta(meta, t0 + my_tok) + 4)) == 0.0f;
        if (score) {
            float x = a.n_chunk == 1 || lane % NG == DEC_HEADS - 1 ? s[0] : 0.0f;
#pragma unroll
            for (int32_t d = 1; d < NG; d <<= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
            if (lane % NG == 0 && valid) score[t0 + my_tok] = x / (a.n_chunk == 1 ? (float)a.group : 1.0f);
        }
        const float x = valid ? s[0] * a.scale2 : -INFINITY;
        float max = x;
#pragma unroll
        for (int32_t d = NG; d < 32; d <<= 1) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, d));
        max = fmaxf(max, st->m);
        const float base = max == -INFINITY ? 0.0f : max, f = exp2f(st->m - base), p = exp2f(x - base);
        const bool moved = max != st->m;
        st->l = st->l * f + p;
        st->m = max;
        if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
            for (int32_t h = 0; h < NG; h++) {
                const float fh = __shfl_sync(0xffffffffu, f, h);
#pragma unroll
                for (int32_t j = 0; j < 2 * J; j++) st->acc[h][j] *= fh;
            }
        }
#pragma unroll
        for (int32_t i = 0; i < 32 / NG; i++) {
            const lg_smem row = stage + (lg_smem)(DEC_UNIT * a.row_room) + (lg_smem)lg_lds32(dec_meta(meta, t0 + i));
            float2 v[J];
#pragma unroll
            for (int32_t j = 0; j < J; j++) v[j] = 64 * j + 2 * lane < a.hd ? fma_pair<DT>(row, 64 * j + 2 * lane, a.hd) : make_float2(0.0f, 0.0f);
#pragma unroll
            for (int32_t h = 0; h < NG; h++) {
                const float ph = __shfl_sync(0xffffffffu, p, i * NG + h);
#pragma unroll
                for (int32_t j = 0; j < J; j++) {
                    st->acc[h][2 * j] = fmaf(ph, v[j].x, st->acc[h][2 * j]);
                    st->acc[h][2 * j + 1] = fmaf(ph, v[j].y, st->acc[h][2 * j + 1]);
                }
            }
        }
    }
}

template <int J, int NG>
static __device__ __forceinline__ void fma_put(float *slot, fma_state<NG, J> *st, int32_t heads, int32_t ng, int32_t hd, bool add) {
    const int32_t lane = (int32_t)threadIdx.x & 31, mine = lane % NG;
    float *mx = slot + heads * hd, *tot = mx + heads;
    float l = st->l, m = st->m, f = 1.0f, e = 0.0f;
#pragma unroll
    for (int32_t d = NG; d < 32; d <<= 1) l += __shfl_xor_sync(0xffffffffu, l, d);
    if (add && mine < ng) {
        const float other = mx[mine], max = fmaxf(m, other);
        f = dec_exp(m, max);
        e = dec_exp(other, max);
        m = max;
        l = l * f + e * tot[mine];
    }
    __syncwarp();
    if (lane < ng && lane < NG) {
        mx[lane] = m;
        tot[lane] = l;
    }
#pragma unroll
    for (int32_t h = 0; h < NG; h++) {
        const float fh = __shfl_sync(0xffffffffu, f, h), eh = __shfl_sync(0xffffffffu, e, h);
#pragma unroll
        for (int32_t j = 0; j < J; j++) {
            if (h < ng && 64 * j + 2 * lane < hd) {
                float *x = slot + h * hd + 64 * j + 2 * lane;
                x[0] = fh * st->acc[h][2 * j] + (add ? eh * x[0] : 0.0f);
                x[1] = fh * st->acc[h][2 * j + 1] + (add ? eh * x[1] : 0.0f);
            }
        }
    }
}

template <int DT, int J, int NG> struct fma_math {
    static constexpr bool BULK = false, APART = false;
    static constexpr int WHOLE = DEC_NO_WHOLE;
    static constexpr int32_t HEAD = 0;
    float q[NG][2 * J];
    fma_state<NG, J> st;
    static __device__ __forceinline__ int32_t row_room(const dec_args &a) { return a.row_room; }
    static __device__ __forceinline__ void issue(dec_feed *f, const dec_args &a, int32_t n_warp, const dec_ring &ring) {
        dec_feed_issue<0, true, false, false>(f, a, n_warp, ring, a.row_room);
    }
    __device__ __forceinline__ void heads(const dec_args &, const dec_seg &, bool, float *) {}
    __device__ __forceinline__ void load(const dec_args &, const dec_seg &, const float *) {}
    __device__ __forceinline__ void begin(const dec_args &a, const dec_seg &seg) {
        const int32_t lane = (int32_t)threadIdx.x & 31, ng = dec_heads(a, seg);
#pragma unroll
        for (int32_t i = 0; i < NG * 2 * J; i++) {
            const int32_t h = i / (2 * J), d = 64 * (i % (2 * J) / 2) + 2 * lane + (i & 1);
            const float x = dec_query_row(a, seg, h)[d < a.hd ? d : 0];
            q[h][i % (2 * J)] = d < a.hd && h < ng ? x : 0.0f;
            st.acc[i / (2 * J)][i % (2 * J)] = 0;
        }
        if (NG == DEC_HEADS && dec_has_mean(a, seg)) {
#pragma unroll
            for (int32_t i = 0; i < 2 * J; i++) {
                const int32_t d = 64 * (i / 2) + 2 * lane + (i & 1);
                q[NG - 1][i] = d < a.hd ? dec_mean_query(a, seg, d) : 0.0f;
            }
        }
        st.m = -INFINITY;
        st.l = 0;
    }
    __device__ __forceinline__ void unit(lg_smem stage, lg_smem meta, const dec_args &a, float *score, bool) { fma_unit<DT, J, NG>(&st, stage, meta, q, a, score); }
    __device__ __forceinline__ void put(float *slot, const dec_args &a, int32_t ng, bool add) { fma_put<J, NG>(slot, &st, a.slot_heads, ng, a.hd, add); }
};

template <int DT, int J, int NG>
static __global__ void __launch_bounds__(FMA_WARPS * 32, 1) dec_fma(const __grid_constant__ dec_args a) {
    LG_SMEM(smem);
    dec_run<fma_math<DT, J, NG>>(a, smem);
}

/* ---- launch ---- */
typedef void (*dec_kernel)(dec_args);
typedef struct dec_choice { dec_kernel kernel; int32_t room, chunks, warps, stages; bool raw; } dec_choice; /* warps: at most; stages: with boxes, at most, 0: no boxes; raw: takes raw heads */

template <int HD> static dec_choice tc_choice(lg_dtype t) {
    enum { B16 = HD / 8, B8 = (HD + 2 * ((HD + 31) / 32) + 15) / 16 };
    /* An odd number of 16-byte pieces keeps rows of a tile in different banks. */
    enum { W = tc_block<LG_DTYPE_BF16, HD>::WARPS, R16 = (B16 | 1) == B16 ? B16 + 2 : B16 + 1, R8 = (B8 | 1) };
    enum { STAGES = HD % 64 ? 0 : HD <= 128 ? 2 : 3 };
    if (t == LG_DTYPE_F16) return dec_choice{ dec_tensor<LG_DTYPE_F16, HD, B16, R16 * 16>, R16 * 16, B16, W, STAGES, HD % 64 == 0 };
    if (t == LG_DTYPE_BF16) return dec_choice{ dec_tensor<LG_DTYPE_BF16, HD, B16, R16 * 16>, R16 * 16, B16, W, STAGES, HD % 64 == 0 };
    if (HD == 80 || HD == 96) return dec_choice{}; /* rows not on 4 bytes */
    enum { K8 = HD == 80 || HD == 96 ? 64 : HD, C8 = K8 == HD ? B8 : 5, Q8 = K8 == HD ? R8 : 5 };
    return dec_choice{ dec_tensor<LG_DTYPE_KV8, K8, C8, Q8 * 16>, Q8 * 16, C8, tc_block<LG_DTYPE_KV8, K8>::WARPS, 0, K8 % 64 == 0 };
}

template <int DT> static dec_kernel fma_kernel(int32_t hd, int32_t heads) {
    if (hd <= 128) return heads <= 4 ? dec_fma<DT, 2, 4> : dec_fma<DT, 2, 8>;
    return heads <= 4 ? dec_fma<DT, 4, 4> : dec_fma<DT, 4, 8>;
}

static dec_choice dec_choose(const lg_cuda_env *e, const lg_kv_geom *g, int32_t heads) {
    dec_choice c = {};
    if (e->compute != LG_COMPUTE_F32 && g->dtype != LG_DTYPE_F32) {
        switch (g->head_dim) {
        case 64: c = tc_choice<64>(g->dtype); break;
        case 80: c = tc_choice<80>(g->dtype); break;
        case 96: c = tc_choice<96>(g->dtype); break;
        case 112: c = tc_choice<112>(g->dtype); break;
        case 128: c = tc_choice<128>(g->dtype); break;
        case 256: c = tc_choice<256>(g->dtype); break;
        default: break;
        }
        if (e->cc < 90) c.stages = 0, c.raw = false;
        if (c.kernel) return c;
    }
    switch (g->dtype) {
    case LG_DTYPE_F16: c.kernel = fma_kernel<LG_DTYPE_F16>(g->head_dim, heads); break;
    case LG_DTYPE_BF16: c.kernel = fma_kernel<LG_DTYPE_BF16>(g->head_dim, heads); break;
    case LG_DTYPE_KV8: c.kernel = fma_kernel<LG_DTYPE_KV8>(g->head_dim, heads); break;
    default: c.kernel = fma_kernel<LG_DTYPE_F32>(g->head_dim, heads); break;
    }
    c.chunks = (int32_t)((g->row_bytes + 14) / 16 + 1); /* a row may begin anywhere */
    c.room = c.chunks * 16;
    c.warps = FMA_WARPS;
    return c;
}

/* Warps, stages and slots that fit into shared memory. */
typedef struct dec_shape { int32_t n_warp, n_stage, n_slot; int64_t bytes; } dec_shape;
static int64_t dec_bytes(const dec_shape *s, int32_t room, int32_t hd, int32_t heads) {
    const int64_t slots = (int64_t)s->n_slot * dec_state_floats(heads, hd), merge = dec_merge_floats(s->n_warp * 32);
    return (int64_t)s->n_warp * s->n_stage * (2 * DEC_UNIT * room + DEC_UNIT * DEC_META + DEC_BAR) + (int64_t)sizeof(dec_shared) + 4 * (slots > merge ? slots : merge);
}
static bool dec_fit(dec_shape *s, const lg_cuda_env *e, const dec_choice *c, int32_t hd, int32_t heads, int32_t n_warp, int32_t n_stage) {
    *s = dec_shape{ n_warp, n_stage, n_warp, 0 };
    for (; n_warp <= c->warps && (!c->stages || n_stage <= c->stages) && s->n_slot > 0; s->n_slot--) {
        s->bytes = dec_bytes(s, c->room, hd, heads);
        if (n_warp % s->n_slot == 0 && s->bytes <= e->smem_max) return true;
    }
    return false;
}
static dec_shape dec_shape_of(const lg_cuda_env *e, const dec_choice *c, int32_t hd, int32_t heads) {
    static const int8_t tries[][2] = { { 12, 2 }, { 8, 3 }, { 4, 5 }, { 4, 4 }, { 4, 3 }, { 8, 2 }, { 4, 2 }, { 2, 5 }, { 2, 4 }, { 2, 3 }, { 2, 2 }, { 1, 3 }, { 1, 2 } };
    dec_shape s;
    for (size_t i = 0; i < sizeof tries / sizeof tries[0]; i++)
        if (dec_fit(&s, e, c, hd, heads, tries[i][0], tries[i][1])) return s;
    return dec_shape{ 0, 0, 0, 0 };
}

/* Counters that stay from launch to launch cannot lie in the scratch, which other ops write: each scratch (that is, each stream)
 * gets a row of this table. Where the table is full they do lie in the scratch and are cleared before every launch. */
enum { DEC_OWNERS = 16, DEC_COUNTERS = 8192 };
static __device__ uint32_t dec_counters[DEC_OWNERS][DEC_COUNTERS];
static uint32_t *dec_counter_row(const uint8_t *scratch, int64_t n_seg) {
    static const uint8_t *owners[DEC_OWNERS];
    void *at = NULL;
    if (2 * n_seg > DEC_COUNTERS) return NULL;
    for (int i = 0; i < DEC_OWNERS; i++) {
        const uint8_t *none = NULL;
        if (__atomic_compare_exchange_n(&owners[i], &none, scratch, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) || none == scratch) {
            if (cudaGetSymbolAddress(&at, dec_counters) != cudaSuccess) return NULL;
            return (uint32_t *)at + (int64_t)i * DEC_COUNTERS;
        }
    }
    return NULL;
}

static int64_t dec_partial_bytes(const lg_cuda_env *e, int32_t hd) { return (int64_t)e->n_sm * 2 * dec_state_floats(DEC_HEADS, hd) * 4; }

int64_t lg_cuda_decode_scratch(const lg_cuda_env *e, int64_t n_seq, int32_t n_head, const lg_kv_geom *g) {
    const int64_t group = n_head / g->n_head_kv, chunks = (group + DEC_HEADS - 2) / (DEC_HEADS - 1);
    return dec_partial_bytes(e, g->head_dim) + n_seq * g->n_head_kv * chunks * 8;
}

static int32_t dec_clamp(int64_t x) { return x < 0 ? 0 : x < INT32_MAX ? (int32_t)x : INT32_MAX; }
static bool dec_few(const lg_cuda_env *e, int64_t n_seg) { return n_seg <= 32 && n_seg <= e->n_sm / 8; }
bool lg_cuda_decode_raw(const lg_cuda_env *e, const lg_cuda_decode *a) {
    const int32_t n_kv = a->geom.n_head_kv, group = a->n_head / n_kv;
    if (a->n_seq != 1 || group > DEC_HEADS || !a->early || !dec_few(e, n_kv)) return false;
    if (a->read && !(a->sized && a->read_host && a->make_host && n_kv <= DEC_ROLES)) return false;
    return dec_choose(e, &a->geom, group).raw && dec_counter_row(e->scratch, n_kv);
}

bool lg_cuda_decode_leaves(const lg_cuda_decode *a) {
    const int32_t group = a->n_head / a->geom.n_head_kv;
    return group <= DEC_HEADS && group * a->geom.head_dim % (16 * DEC_HELPERS) == 0;
}

void lg_cuda_decode_attend(const lg_cuda_env *e, const lg_cuda_decode *a) {
    dec_args d = {};
    if (a->n_seq < 1) return;
    const int32_t group = a->n_head / a->geom.n_head_kv;
    bool makes = a->read != NULL && a->make_host == NULL;
    for (int32_t h = 0; a->read && a->make_host && h < a->geom.n_head_kv; h++) makes = makes || a->make_host[h] >= 0;
    d.out = a->out; d.rows = a->rows; d.q = a->q;
    d.k = a->kv.k; d.v = a->kv.v;
    d.seqs = a->seqs;
    d.row_bytes = a->geom.row_bytes;
    d.n_seq = a->n_seq; d.n_head = a->n_head; d.n_kv = a->geom.n_head_kv; d.group = group; d.hd = a->geom.head_dim;
    d.scale2 = a->scale * 1.44269504f;
    d.group_rate = 1.0f / (float)group;
    d.per_chunk = group > DEC_HEADS && makes ? DEC_HEADS - 1 : DEC_HEADS; /* makes: the last column is the mean query's */
    d.n_chunk = (group + d.per_chunk - 1) / d.per_chunk;
    d.max_len = a->max_len;
    if (a->read) {
        d.hybrid = 1;
        d.budget = a->budget; d.dense = a->dense;
        d.read = a->read; d.make = a->make;
        d.set_idx = a->sets.idx; d.set_n = a->sets.n; d.set_cap = a->sets.cap;
        d.n_set = a->sets.n_slot;
        while ((1 << d.block_shift) < a->sets.block) d.block_shift++;
        d.sinks = dec_clamp(a->select.sinks);
        d.recents = dec_clamp(a->select.recents);
        d.score = a->score;
        d.least = a->spread.slot ? dec_clamp(a->spread.least) : -1;
        d.roles_in = a->read_host && a->make_host && d.n_kv <= DEC_ROLES;
        for (int32_t h = 0; d.roles_in && h < d.n_kv; h++) {
            d.role_read[h] = (int16_t)a->read_host[h];
            d.role_make[h] = (int16_t)a->make_host[h];
            if (a->spread.slot) d.role_share[h] = d.role_read[h] >= 0 ? a->spread.slot[d.role_read[h]] : a->spread.window[h];
        }
    }
    const int64_t n_seg = (int64_t)d.n_seq * d.n_kv * d.n_chunk;
    const dec_choice c = dec_choose(e, &a->geom, d.n_chunk > 1 ? DEC_HEADS : group);
    d.release = a->release;
    d.few = dec_few(e, n_seg);
    d.sized = a->sized && d.roles_in && d.few;
    if (a->raw.q) {
        d.raw = a->raw;
        d.made = a->made;
    }
    d.slot_heads = group < d.per_chunk ? group : d.per_chunk;
    const dec_shape s = dec_shape_of(e, &c, d.hd, d.slot_heads);
    d.n_stage = s.n_stage;
    d.n_slot = s.n_slot;
    d.row_room = c.room;
    d.row_chunks = c.chunks;
    d.begin = (uint32_t)(DEC_WEIGHT_ROW * DEC_BEGIN_BYTES / (2 * DEC_UNIT * a->geom.row_bytes));
    d.whole = a->geom.dtype == LG_DTYPE_KV8 || (c.stages && a->geom.row_bytes == 2 * d.hd && lg_box_map_of(&d.box[0], d.k, d.hd) && lg_box_map_of(&d.box[1], d.v, d.hd));
    d.partial = (float *)(void *)e->scratch;
    d.counter = dec_counter_row(e->scratch, n_seg);
    bool early = a->early;
    if (!d.counter) {
        d.counter = (uint32_t *)(void *)(e->scratch + dec_partial_bytes(e, d.hd));
        cudaMemsetAsync(d.counter, 0, (size_t)n_seg * 8, e->stream);
        early = false;
    }
    cudaFuncSetAttribute((const void *)c.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)s.bytes);
    LG_LAUNCH_EARLY(c.kernel, e->n_sm, s.n_warp * 32, (size_t)s.bytes, e->stream, early, d);
}
