/* A product of 2 to 16 rows of input with large quantised weights: the weights stream through rings in shared memory as in stream.cu (stream_packed.cuh).
 *
 * The inputs (lg_halves, made by k_inputs or left by the product before) stay in shared memory for the whole launch: beside 4-bit codes they would be twice the
 * weights' bytes if they came along. Rows that do not fit into f16 as they are each block makes from f32 itself, times a power of two. Where all columns do not fit,
 * they are cut into parts and each block takes one part of the tiles it is dealt; the blocks of a group take the same tiles, leave their sums in memory, and the one that
 * arrives last adds them up in the order of the parts. So results depend on the grid, never on timing. */
#include "ops/cuda/stream_packed.cuh"
#include <string.h>

#ifndef STREAM_LEAST
#define STREAM_LEAST (4 << 20)
#endif
enum { WARPS = 8, THREADS = WARPS * 32, MOST_PARTS = 16, LEAST = STREAM_LEAST,
       ROOM = 96 << 10, DEEP = 5, LEAST_DEEP = 2, /* of rings: bytes at most, so that a block of selection fits beside 8 inputs of 4096; stages of a ring */
       BEFORE = 3, /* of them, asked for before up to 8 rows of input, which come behind what was asked for before (docs/speed-cuda.md, 99) */
       MOST_WAIT = 16 };                          /* tiles' sums of units that wait in shared memory, at most: a unit of two tiles a warp */

/* NT: inputs / 8. M: tiles that a warp multiplies at once, with inputs that it loads once: what shared memory gives bounds it (docs/speed-cuda.md, 81), but for bytes, of
 * which memory brings half as many. A stage holds a record of each: their codes, the high bits, the scales, the supers. */
template <int T, int NT> struct shape {
    typedef lg_fmt<T> F;
    typedef lg_record<T> R;
    static constexpr int M = F::byte ? 1 : 2, cols = NT * 8, pitch = cols + 2, pairs = NT * 4;
    static constexpr int size = F::q6 ? 16 : 8; /* of what stands beside a chunk of a pair of inputs: sums of its groups (Q6_K: of halves) */
    static constexpr int sums = 16 * pitch; /* floats of a tile's sums of a unit */
    static constexpr int high = M * R::codes, scale = high + M * R::high, super = scale + M * R::scale, stage = super + M * R::super; /* where they stand; bytes */
    static __host__ __device__ __forceinline__ int row(int chunks) { return chunks * LG_CHUNK + 32; } /* from a row of inputs to the next; the pad keeps 8 rows on different banks */
};

struct codes_args : lg_deal {           /* run: a stage is a chunk */
    int32_t n_tok, part, parts, groups; /* part: chunks of a part */
    int32_t wait, n_wait;               /* items whose sums wait in shared memory, and sums of tiles' units; 0: a unit is a set, whose sums are results at once */
    int32_t depth;                      /* stages of a ring */
    bool add;
    const uint16_t *x;
    const float *sums, *squares, *from, *norm; /* from, norm: what x was made of */
    const int32_t *row;
    const uint32_t *most;
    uint32_t *clear;
    int32_t n_in, n_square, n_most;
    float eps;
    uint32_t *count;                    /* [group], 0 where there are parts */
    float *partial;                     /* [part][item][span][cols][16] */
    lg_halves twin;                     /* the result as an input; x NULL: not */
    const float *twin_norm;
    float *twin_squares;
};

/* What a block takes: of every item of its group (its `tiles`, items * span; M of them together are a set) the chunks from `first` on. A unit is a run of them, of a set. */
struct share { int group, first, chunks, tiles, n_unit; };
static __device__ __forceinline__ int item_of(const codes_args &a, const share &s, int tile) { return s.group + (a.span == 2 ? tile >> 1 : tile) * a.groups; }

/* B bytes of a record in each of M tiles, on their way into a stage: one copy of the warp brings as much as it can. */
template <int B, int M> struct plane {
    static constexpr bool one = M * B <= 512;
    const uint8_t *from[one ? 1 : M]; /* where the lane's 16 bytes of record 0 lie */
    __device__ __forceinline__ void aim(int m, const uint8_t *base) {
        const int lane = threadIdx.x & 31;
        if constexpr (!one) from[m] = base + lane * 16;
        else if (lane / (B / 16) == m) from[0] = base + lane % (B / 16) * 16;
    }
    __device__ __forceinline__ void fetch(lg_smem to, int record, int live) const { /* live: tiles that exist */
        const int lane = threadIdx.x & 31;
        to += (lg_smem)(lane * 16);
        if constexpr (one) {
            if (lane < live * (B / 16)) lg_copy16(to, from[0] + record * B, 16);
        } else {
#pragma unroll
            for (int m = 0; m < M; m++)
                if (m < live)
#pragma unroll
                    for (int at = 0; at < B; at += 512) lg_copy16(to + (lg_smem)(m * B + at), from[m] + record * B + at, 16);
        }
    }
};
template <int M> struct plane<0, M> {
    __device__ __forceinline__ void aim(int, const uint8_t *) {}
    __device__ __forceinline__ void fetch(lg_smem, int, int) const {}
};

/* The weights a warp asks for: its next units'. */
template <int T, int NT> struct walk {
    typedef shape<T, NT> X;
    typedef typename X::R R;
    int set, unit, at, end, live;       /* unit: of the set; at, end: chunks; live: tiles of the set */
    plane<R::codes, X::M> codes;
    plane<R::high, X::M> high;
    plane<R::scale, X::M> scale;
    plane<R::super, X::M> super;

    __device__ __forceinline__ void aim(const codes_args &a, const share &s) {
        live = min((int)X::M, s.tiles - set * X::M);
#pragma unroll
        for (int m = 0; m < X::M; m++)
            if (m < live) {
                const int tile = set * X::M + m;
                const lg_spot spot = lg_spot_of(a, item_of(a, s, tile));
                const lg_part &w = a.p[a.span == 2 ? tile & 1 : spot.part];
                const int64_t rec = (int64_t)spot.tile * a.n_chunk;
                codes.aim(m, w.codes + rec * R::codes);
                high.aim(m, w.high + rec * R::high);
                scale.aim(m, w.scale + rec * R::scale);
                super.aim(m, w.super + (int64_t)spot.tile * ((a.n_chunk + 1) >> 1) * R::super);
            }
    }
    __device__ __forceinline__ void begin(const codes_args &a, const share &s) {
        set = 0;
        unit = (int)threadIdx.x >> 5;
        settle(a, s, true);
    }
    /* To a unit that exists, or past the last set. */
    __device__ __forceinline__ void settle(const codes_args &a, const share &s, bool moved) {
        for (; unit >= s.n_unit; unit -= s.n_unit, set++) moved = true;
        if (set * X::M >= s.tiles) return;
        if (moved) aim(a, s);
        at = unit * a.run;
        end = min(at + a.run, s.chunks);
    }
    /* Its next records into the stage at `to`, then on. */
    __device__ __forceinline__ void fetch(const codes_args &a, const share &s, lg_smem to) {
        if (set * X::M < s.tiles) {
            const int chunk = s.first + at;
            codes.fetch(to, chunk, live);
            high.fetch(to + (lg_smem)X::high, chunk, live);
            scale.fetch(to + (lg_smem)X::scale, chunk, live);
            super.fetch(to + (lg_smem)X::super, chunk >> 1, live);
            if (++at == end) {
                unit += WARPS;
                settle(a, s, false);
            }
        }
        lg_cp_commit();
    }
};

/* A lane's part of tile m of a stage. */
template <int T, typename X> static __device__ __forceinline__ void hold_of(lg_hold<T> &o, const uint8_t *stage, int m) {
    typedef lg_fmt<T> F;
    typedef lg_record<T> R;
    const int lane = threadIdx.x & 31, g = lane >> 2;
    const uint8_t *scale = stage + X::scale + m * R::scale, *super = stage + X::super + m * R::super;
    lg_hold_codes(o, stage + m * R::codes + lane * 16, stage + X::high + m * R::high + lane * (F::q6 ? 8 : 4));
    if (F::pair) {
        o.s[0] = *(const uint4 *)(scale + g * 16);
        o.s[F::pair ? 1 : 0] = *(const uint4 *)(scale + (g + 8) * 16);
    } else {
        const uint2 a = *(const uint2 *)(scale + g * 8), b = *(const uint2 *)(scale + (g + 8) * 8);
        o.s[0] = make_uint4(a.x, a.y, b.x, b.y);
    }
    if (F::k45) {
        o.d[0] = *(const uint32_t *)(super + g * 4);
        o.d[1] = *(const uint32_t *)(super + (g + 8) * 4);
    } else if (F::q6) {
        o.d[0] = *(const uint16_t *)(super + g * 2);
        o.d[1] = *(const uint16_t *)(super + (g + 8) * 2);
    }
}

/* What stands beside a group's sum: that times minus the zero point where codes have one, in units of products' sums (stream.cuh). */
template <int T> static constexpr float beside_factor = (lg_fmt<T>::zero ? -(float)lg_fmt<T>::zero : 1.0f) / 16777216.0f;

/* The block's part of all rows from f32, by the block: each times the power of two that lays its largest number in [512, 1024), which factor then undoes. */
template <int T, int NT>
static __device__ LG_NOINLINE void make_anew(const codes_args &a, uint16_t *xs, int stride, float *side, float *factor, const uint32_t *most, int first, int n) {
    typedef lg_fmt<T> F;
    constexpr int SIZE = shape<T, NT>::size, STEP = shape<T, NT>::pairs * SIZE;
    const int lane = threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    for (int i = warp; i < n * a.n_tok; i += WARPS) { /* a chunk of a row by a warp, four numbers a lane */
        const int r = i % a.n_tok, chunk = i / a.n_tok, k = (first + chunk) * LG_CHUNK + lane * 4, group = lane >> 3;
        const float s = lg_group_scale(__uint_as_float(most[r]));
        float4 x = make_float4(0, 0, 0, 0);
        if (k < a.n_in) {
            x = __ldcg((const float4 *)(a.from + (a.row ? a.row[r] : r) * (int64_t)a.n_in + k));
            if (a.norm) {
                const float4 w = __ldcg((const float4 *)(a.norm + k));
                x = make_float4(x.x * w.x, x.y * w.y, x.z * w.z, x.w * w.w);
            }
        }
        const __half2 lo = __floats2half2_rn(x.x * s, x.y * s), high = __floats2half2_rn(x.z * s, x.w * s), hi = lg_form_of<T>().sixteenth ? __hmul2(high, __float2half2_rn(0.0625f)) : high;
        *(uint2 *)(xs + r * stride + chunk * LG_CHUNK + group * 32 + lg_split_at(F::q6, (lane & 7) * 4)) = make_uint2(*(const uint32_t *)&lo, *(const uint32_t *)&hi);
        float sum = __low2float(lo) + __high2float(lo) + __low2float(high) + __high2float(high);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (!F::q6) sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        float *to = side + chunk * STEP + (r >> 1) * SIZE + (r & 1) + (F::q6 ? lane >> 2 : group) * 2;
        if ((lane & (F::q6 ? 3 : 7)) == 0) *to = sum * beside_factor<T>;
    }
    const int r = threadIdx.x;
    if (r < a.n_tok) factor[r] *= lg_reciprocal_of_power(lg_group_scale(__uint_as_float(most[r])));
}

/* acc += a chunk of M tiles times NT * 8 inputs. xs, row8: the lane's part of the first input, elements to the eighth after it. side: of the chunk; pair: where the lane's
 * pairs of inputs stand there. */
template <int T, int NT> static __device__ __forceinline__ void multiply(float (*acc)[NT][4], const lg_hold<T> *o, const uint16_t *xs, int row8, const float *side, const int *pair) {
    typedef lg_fmt<T> F;
    constexpr int M = shape<T, NT>::M;
    float4 beside[NT]; /* sums of inputs: of two groups, or of a group's halves */
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint4 b[NT];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            b[nt] = *(const uint4 *)(xs + nt * row8 + j * 32);
            if (F::q6 || !(j & 1)) beside[nt] = *(const float4 *)(side + pair[nt] + (F::q6 ? j : j >> 1) * 4);
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
            uint32_t a0[4], a1[4];
            float d[2], low[2], e[2], low_e[2]; /* of rows g and g + 8; e: of the second half */
            unpack<T>(a0, o[m], 0, j);
            unpack<T>(a1, o[m], 1, j);
            scale_of<T>(d[0], low[0], o[m], 0, j, 0);
            scale_of<T>(d[1], low[1], o[m], 1, j, 0);
            if (F::q6) {
                scale_of<T>(e[0], low_e[0], o[m], 0, j, 1);
                scale_of<T>(e[1], low_e[1], o[m], 1, j, 1);
            }
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                const float2 s = !F::q6 && (j & 1) ? make_float2(beside[nt].z, beside[nt].w) : make_float2(beside[nt].x, beside[nt].y);
                float c[4];
                if (F::zero) lg_mma<false>(c, a0[0], a1[0], a0[1], a1[1], b[nt].x, b[nt].y, s.x, s.y, s.x, s.y);
                else lg_mma<false>(c, a0[0], a1[0], a0[1], a1[1], b[nt].x, b[nt].y, 0, 0, 0, 0);
                if (!F::q6) mma<false>(c, a0[2], a1[2], a0[3], a1[3], b[nt].z, b[nt].w);
#pragma unroll
                for (int i = 0; i < 4; i++) acc[m][nt][i] = fmaf(d[i >> 1], c[i], acc[m][nt][i]);
                if (F::q6) {
                    const float2 s_e = make_float2(beside[nt].z, beside[nt].w);
                    lg_mma<false>(c, a0[2], a1[2], a0[3], a1[3], b[nt].z, b[nt].w, s_e.x, s_e.y, s_e.x, s_e.y);
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[m][nt][i] = fmaf(e[i >> 1], c[i], acc[m][nt][i]);
                }
                if (!F::zero)
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[m][nt][i] = fmaf(low[i >> 1], i & 1 ? s.y : s.x, acc[m][nt][i]);
            }
        }
    }
}

/* Where an item's sums go, [input][row]: results, or (parts) what is put together at the end, gate's before up's. */
typedef struct place { float *to; int32_t next, n_row, n_col, first; } place; /* next: from an input to the next; n_row, n_col: those that exist; first: row of the weight */
static __device__ __forceinline__ place result_of(const codes_args &a, int item) {
    const lg_spot s = lg_spot_of(a, item);
    const int n_out = a.p[s.part].n_out;
    return place{ a.p[s.part].out + s.tile * 16, n_out, n_out - s.tile * 16, a.n_tok, s.tile * 16 };
}
static __device__ __forceinline__ place sum_of(const codes_args &a, int which, int item, int cols) {
    return place{ a.partial + ((int64_t)which * a.n_item + item) * a.span * 16 * cols, 16, 16, cols, 0 };
}
static __device__ __forceinline__ bool is_there(const place &p, int row, int col) { return row < p.n_row && col < p.n_col; }
/* What a result is added to, and multiplied by where it is left as an input: to be asked for before others are written. */
typedef struct beside { float old, by; } beside;
static __device__ __forceinline__ beside beside_of(const codes_args &a, const place &p, int row, int col) {
    beside b = { 0.0f, 1.0f };
    if (!is_there(p, row, col)) return b;
    if (a.add) b.old = __ldcg(p.to + (int64_t)col * p.next + row);
    if (a.twin_norm) b.by = __ldcg(a.twin_norm + p.first + row);
    return b;
}
/* Results of an input: of row `row` (N 1: by sixteen lanes side by side for sixteen rows), or also of the eighth after it (N 2: by the lanes that lg_put_sixteen says); whole
 * warps call it. up: of span 2. factor: of the inputs, and of what codes are (stream.cuh). */
template <int N>
static __device__ __forceinline__ void put_result(const codes_args &a, const place &p, int row, int col, float (&v)[N], const float (&up)[N], const beside (&b)[N], const float *factor) {
    float x[N], square = 0.0f;
#pragma unroll
    for (int h = 0; h < N; h++) {
        const bool there = is_there(p, row + h * 8, col);
        v[h] *= factor[col];
        if (a.span == 2) v[h] = __fdividef(v[h], 1.0f + __expf(-v[h])) * (up[h] * factor[col]);
        v[h] = there ? v[h] + b[h].old : 0.0f;
        if (there) p.to[(int64_t)col * p.next + row + h * 8] = v[h];
        x[h] = v[h] * b[h].by;
        square += v[h] * v[h];
    }
    if (!a.twin.x) return;
    lg_put_sixteen<N>(a.twin, col, p.first + row, x, col < p.n_col);
    if (!a.twin_norm) return;
#pragma unroll
    for (int m = N == 1 ? 1 : 4; m < (N == 1 ? 16 : 32); m *= 2) square += __shfl_xor_sync(0xffffffffu, square, m);
    if (row == 0 && col < p.n_col) a.twin_squares[(int64_t)col * a.n_item + (p.first >> 4)] = square;
}
static __device__ __forceinline__ void put_sum(const codes_args &a, const place &p, int row, int col, float v, float up) {
    p.to[col * 16 + row] = v;
    if (a.span == 2) p.to[(p.n_col + col) * 16 + row] = up;
}

template <int T, int NT> static __global__ void __launch_bounds__(THREADS, 2) k_stream_codes(const __grid_constant__ codes_args a) {
    typedef shape<T, NT> X;
    constexpr int M = X::M, COLS = X::cols, PITCH = X::pitch;
    LG_SMEM(ring_s);                                             /* [WARPS][depth][stage] */
    float *red = (float *)(ring_s + WARPS * a.depth * X::stage); /* [n_wait: units, M][16][PITCH] */
    float *factor_s = red + a.n_wait * X::sums;                  /* [16] */
    float *side = factor_s + 16;                                 /* [part][pairs][size] */
    uint32_t *most_s = (uint32_t *)(side + a.part * X::pairs * X::size); /* [16] */
    uint16_t *xs = (uint16_t *)(most_s + 16);                    /* [COLS][row] */
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const int which = a.parts > 1 ? (int)blockIdx.x % a.parts : 0, group = a.parts > 1 ? (int)blockIdx.x / a.parts : (int)blockIdx.x;
    const int first = which * a.part, n = min(a.part, a.n_chunk - first), all = (a.n_item - group + a.groups - 1) / a.groups; /* all: items of the block */
    const share take = { group, first, n, all * a.span, (n + a.run - 1) / a.run };
    const uint8_t *mine = ring_s + warp * a.depth * X::stage;
    const lg_smem mine_at = lg_smem_of(mine);
    walk<T, NT> ahead;
    ahead.begin(a, take);
    const int before = NT == 1 ? min(a.depth, (int)BEFORE) : a.depth; /* (16 rows of input take so long to come that all of the ring stands before them) */
#pragma unroll 1
    for (int i = 0; i < before; i++) ahead.fetch(a, take, mine_at + (lg_smem)(i * X::stage));
    if (a.twin_norm && tid < all) lg_prefetch(a.twin_norm + (group + tid * a.groups) * 16); /* (one weight: items are tiles) */
    lg_pdl_wait();
    lg_pdl_go(); /* only now: who starts then may read what was staged for this step */

    const int row = X::row(a.part);
    constexpr int STEP = X::pairs * X::size;
    /* What there is little of is asked for first: it would stand behind the inputs. Sums of a chunk of a row a thread; squares and the largest number of a row a warp. */
    const float *sums_from = a.sums + lg_sixteen_at(COLS, 0, first * LG_CHUNK);
    auto put_sums = [&](int p, const float4 &lo, const float4 &hi) {
        const float v[8] = { lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w };
        float *to = side + p / COLS * STEP + (p % COLS >> 1) * X::size + (p & 1);
#pragma unroll
        for (int j = 0; j < X::size / 2; j++) to[j * 2] = (X::F::q6 ? v[j] : v[2 * j % 8] + v[(2 * j + 1) % 8]) * beside_factor<T>;
    };
    float4 sums[NT][2];
    float ss[NT];
    uint32_t most[NT];
#pragma unroll
    for (int q = 0; q < NT; q++) {
        const int p = tid + q * THREADS, r = warp + q * WARPS;
        const bool live = p < n * COLS, there = r < a.n_tok;
#pragma unroll
        for (int h = 0; h < 2; h++) sums[q][h] = live ? __ldcg((const float4 *)(sums_from + p * 8) + h) : make_float4(0, 0, 0, 0);
        most[q] = there && lane < a.n_most ? __ldcg(a.most + r * a.n_most + lane) : 0;
        ss[q] = 0.0f;
#pragma unroll 8
        for (int k = lane; k < a.n_square; k += 32) ss[q] += there ? __ldcg(a.squares + r * a.n_square + k) : 0.0f;
    }
    const uint16_t *x_from = a.x + lg_beside_at(COLS, 0, first * LG_CHUNK);
#pragma unroll 8
    for (int p = tid; p < n * (LG_CHUNK / 8) * COLS; p += THREADS) { /* eight numbers of a row (rows that do not exist: whatever lies there) */
        const int i = (p >> 2) % COLS;
        if (i < a.n_tok) lg_copy16_shared(lg_smem_of(xs + i * row + p / (4 * COLS) * 32 + (p & 3) * 8), x_from + p * 8, 16);
    }
    lg_cp_commit();
    if constexpr (NT == 1)
#pragma unroll 1
        for (int i = before; i < a.depth; i++) ahead.fetch(a, take, mine_at + (lg_smem)(i * X::stage));
    if (blockIdx.x == 0)
        for (int i = tid; i < LG_CODES_ROWS * LG_CODES_MOST; i += THREADS) a.clear[i] = 0; /* what the next product leaves its largest numbers in */
#pragma unroll
    for (int q = 0; q < NT; q++) {
        const int p = tid + q * THREADS, r = warp + q * WARPS;
        if (p < n * COLS) put_sums(p, sums[q][0], sums[q][1]);
#pragma unroll
        for (int m = 16; m; m >>= 1) {
            ss[q] += __shfl_xor_sync(0xffffffffu, ss[q], m);
            most[q] = max(most[q], __shfl_xor_sync(0xffffffffu, most[q], m));
        }
        if (lane || r >= a.n_tok) continue;
        factor_s[r] = 16777216.0f * (a.n_square ? lg_factor_of(ss[q], a.eps, a.n_in) : 1.0f);
        most_s[r] = most[q];
    }
#pragma unroll 1
    for (int p = tid + NT * THREADS; p < n * COLS; p += THREADS) put_sums(p, __ldcg((const float4 *)(sums_from + p * 8)), __ldcg((const float4 *)(sums_from + p * 8) + 1));
    if constexpr (NT == 1) lg_cp_wait(a.depth - before);
    else lg_copy_wait<0>();
    __syncthreads();
    if (__any_sync(0xffffffffu, lane < a.n_tok && !lg_half_fits(most_s[lane]))) { /* (the same for all warps) */
        make_anew<T, NT>(a, xs, row, side, factor_s, most_s, first, n);
        __syncthreads();
    }

    const uint16_t *x_lane = xs + g * row + t * 8;
    int pair[NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++) pair[nt] = (nt * 4 + t) * X::size;
    const int n_unit = take.n_unit;
    const bool direct = a.n_wait == 0;
    int unit = warp, stage = 0; /* unit: of the sets whose sums wait */
#pragma unroll 1
    for (int begun = 0; begun < all; begun += a.wait) {
        const int here = min(a.wait, all - begun), units = (here * a.span + M - 1) / M * n_unit;
#pragma unroll 1
        for (; unit < units; unit += WARPS) {
            const int first_chunk = unit % n_unit * a.run;
            float acc[M][NT][4];
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int nt = 0; nt < NT; nt++) acc[m][nt][0] = acc[m][nt][1] = acc[m][nt][2] = acc[m][nt][3] = 0.0f;
#pragma unroll 1
            for (int at = first_chunk, end = min(at + a.run, n); at < end; at++) {
                lg_cp_wait(a.depth - 1);
                __syncwarp();
                const uint8_t *from = mine + stage * X::stage;
                lg_hold<T> o[M];
#pragma unroll
                for (int m = 0; m < M; m++) hold_of<T, X>(o[m], from, m); /* (of a tile that does not exist: whatever lies there; nobody reads its sums) */
                multiply<T, NT>(acc, o, x_lane + at * LG_CHUNK, 8 * row, side + at * STEP, pair);
                __syncwarp();
                ahead.fetch(a, take, mine_at + (lg_smem)(stage * X::stage));
                stage = stage + 1 == a.depth ? 0 : stage + 1;
            }
            if (direct) { /* (M is span at least) */
#pragma unroll
                for (int m = 0; m < M; m++) {
                    const int tile = unit * M + m, item = item_of(a, take, tile);
                    if (tile >= take.tiles || (a.span == 2 && m)) break;
                    const place to = a.parts > 1 ? sum_of(a, which, item, COLS) : result_of(a, item);
                    beside b[NT][2][2]; /* [eight inputs][which of two][which of two rows] */
#pragma unroll
                    for (int i = 0; i < NT * 4; i++) b[i >> 2][i & 1][i >> 1 & 1] = a.parts == 1 ? beside_of(a, to, g + (i >> 1 & 1) * 8, (i >> 2) * 8 + 2 * t + (i & 1)) : beside{ 0.0f, 1.0f };
#pragma unroll
                    for (int i = 0; i < NT * 2; i++) {
                        const int nt = i >> 1, c = nt * 8 + 2 * t + (i & 1);
                        float v[2] = { acc[m][nt][i & 1], acc[m][nt][(i & 1) + 2] };
                        const float up[2] = { acc[M - 1][nt][i & 1], acc[M - 1][nt][(i & 1) + 2] };
                        if (a.parts > 1) {
                            put_sum(a, to, g, c, v[0], up[0]);
                            put_sum(a, to, g + 8, c, v[1], up[1]);
                        } else put_result<2>(a, to, g, c, v, up, b[nt][i & 1], factor_s);
                    }
                }
                continue;
            }
#pragma unroll
            for (int m = 0; m < M; m++) {
                float *sums = red + (unit * M + m) * X::sums;
#pragma unroll
                for (int nt = 0; nt < NT; nt++) {
                    *(float2 *)(sums + g * PITCH + nt * 8 + 2 * t) = make_float2(acc[m][nt][0], acc[m][nt][1]);
                    *(float2 *)(sums + (g + 8) * PITCH + nt * 8 + 2 * t) = make_float2(acc[m][nt][2], acc[m][nt][3]);
                }
            }
        }
        if (direct) break;
        unit -= units;
        __syncthreads();
#pragma unroll 1
        for (int i = tid; i < here * 16 * COLS; i += THREADS) { /* a result a thread, of all units of its tile */
            const int at = i % (16 * COLS), tile = i / (16 * COLS) * a.span, item = group + (begun + i / (16 * COLS)) * a.groups;
            const float *of = red + (tile / M * n_unit * M + tile % M) * X::sums + (at & 15) * PITCH + (at >> 4);
            const place to = a.parts > 1 ? sum_of(a, which, item, COLS) : result_of(a, item);
            const beside b = a.parts == 1 ? beside_of(a, to, at & 15, at >> 4) : beside{ 0.0f, 1.0f };
            const int up_at = M == 2 ? X::sums : n_unit * X::sums; /* from a tile's sums to the next one's of the same item */
            float v = 0.0f, up = 0.0f;
            for (int u = 0; u < n_unit; u++) {
                v += of[u * M * X::sums];
                if (a.span == 2) up += of[u * M * X::sums + up_at];
            }
            if (a.parts > 1) put_sum(a, to, at & 15, at >> 4, v, up);
            else {
                float now[1] = { v };
                const float now_up[1] = { up };
                const beside now_b[1] = { b };
                put_result<1>(a, to, at & 15, at >> 4, now, now_up, now_b, factor_s);
            }
        }
        __syncthreads(); /* red may be written again */
    }
    if (a.parts == 1) return;
    uint32_t *last = (uint32_t *)(void *)ring_s;
    __syncthreads();
    if (tid == 0) {
        *last = lg_arrive(a.count + group) == (uint32_t)a.parts - 1; /* (behind a barrier of the block) */
        if (*last) a.count[group] = 0; /* for the next launch */
    }
    __syncthreads();
    if (!*last) return;
    constexpr int EACH = 16 * COLS, AHEAD = 4; /* results of an item; those that a thread asks for at once */
    const int64_t next = (int64_t)a.n_item * a.span * EACH;
#pragma unroll 1
    for (int begun = tid; begun < all * EACH; begun += AHEAD * THREADS) {
        place to[AHEAD];
        const float *from[AHEAD];
        float v[AHEAD][1], up[AHEAD][1];
        beside b[AHEAD][1];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int i = min(begun + k * THREADS, all * EACH - 1), item = group + i / EACH * a.groups, at = i % EACH; /* (past the last one: the last one once more) */
            to[k] = result_of(a, item);
            from[k] = a.partial + (int64_t)item * a.span * EACH + at;
            b[k][0] = beside_of(a, to[k], at & 15, at >> 4);
            v[k][0] = up[k][0] = 0.0f;
        }
#pragma unroll 4
        for (int q = 0; q < a.parts; q++)
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                v[k][0] += __ldcg(from[k] + q * next);
                if (a.span == 2) up[k][0] += __ldcg(from[k] + q * next + EACH);
            }
#pragma unroll 1 /* short code: it comes from L2 */
        for (int i = begun, k = 0; k < AHEAD && i < all * EACH; i += THREADS, k++) {
            put_result<1>(a, to[0], i & 15, i % EACH >> 4, v[0], up[0], b[0], factor_s);
#pragma unroll
            for (int j = 0; j + 1 < AHEAD; j++) {
                to[j] = to[j + 1];
                v[j][0] = v[j + 1][0];
                up[j][0] = up[j + 1][0];
                b[j][0] = b[j + 1][0];
            }
        }
    }
}

/* ---- host ---- */
/* How columns are cut: in as few parts as fit beside a ring, which has three stages where there are parts, if that can be. parts 0: not at all. room: shared memory that is
 * left for rings and sums that wait; rest: the other. */
typedef struct cut { int parts, part; int64_t room, rest; } cut;
template <int T, int NT> static cut cut_of(const lg_cuda_env *e, int n_chunk) {
    typedef shape<T, NT> X;
    for (int least = LEAST_DEEP + 1; least >= LEAST_DEEP; least--)
        for (int parts = 1; parts <= MOST_PARTS && parts <= e->n_sm; parts++) {
            const int part = (n_chunk + parts - 1) / parts;
            const int64_t rest = (32 + (int64_t)part * X::pairs * X::size) * 4 + (int64_t)X::cols * X::row(part) * 2, room = e->smem_max - rest;
            if ((int64_t)part * (parts - 1) >= n_chunk) continue; /* a part without columns */
            if (room >= WARPS * (parts == 1 ? LEAST_DEEP : least) * X::stage + MOST_WAIT * X::sums * 4) return cut{ parts, part, room, rest };
        }
    return cut{ 0, 0, 0, 0 };
}
static cut cut_for(const lg_cuda_env *e, lg_dtype t, int n_chunk, int64_t n_tok) {
    switch (t) {
#define X(T) case T: return n_tok <= 8 ? cut_of<T, 1>(e, n_chunk) : cut_of<T, 2>(e, n_chunk);
        LG_EACH_QUANT(X)
#undef X
    default: return cut{ 0, 0, 0, 0 };
    }
}

/* Into how many units a set is cut, with how many items' sums waiting (0: none): as all warps are at work for longest. To go on to another unit costs about as much as a record;
 * where sums wait, warps wait for each other in every round of them. */
static void deal(codes_args *a, int sets, int M) {
    int best = INT32_MAX;
    for (int n = 1; n <= WARPS && n <= a->part; n++) {
        const int run = (a->part + n - 1) / n, units = (a->part + run - 1) / run;
        const bool direct = units == 1 && M >= a->span;
        int round = direct ? sets : MOST_WAIT / (M * units); /* sets */
        if (M < a->span) round &= ~1;
        if (round > sets) round = sets;
        if (round < 1) continue;
        const int full = sets / round, rest = sets % round;
        const int cost = (full * ((round * units + WARPS - 1) / WARPS) + (rest * units + WARPS - 1) / WARPS) * (run + 1) + (direct ? 0 : full + (rest > 0));
        if (cost > best) continue;
        best = cost;
        a->run = run;
        a->wait = direct ? INT32_MAX : round * M / a->span;
        a->n_wait = direct ? 0 : round * units * M;
    }
}

template <int T, int NT> static void launch(const lg_cuda_env *e, codes_args *a) {
    typedef shape<T, NT> X;
    const cut c = cut_of<T, NT>(e, a->n_chunk);
    const int all = e->n_sm / c.parts;
    a->parts = c.parts;
    a->part = c.part;
    a->groups = a->n_item < all ? a->n_item : all;
    deal(a, ((a->n_item + a->groups - 1) / a->groups * a->span + X::M - 1) / X::M, X::M);
    const int64_t sums = (int64_t)a->n_wait * X::sums * 4, level = WARPS * X::stage, left = c.room - sums;
    for (a->depth = DEEP; a->depth > LEAST_DEEP && (a->depth * level > ROOM || a->depth * level > left);) a->depth--;
    const int64_t shared = c.rest + sums + a->depth * level;
    cudaFuncSetAttribute((const void *)k_stream_codes<T, NT>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    lg_cuda_launch(k_stream_codes<T, NT>, dim3((unsigned)(a->groups * c.parts)), dim3(THREADS), (size_t)shared, e->stream, true, *a);
}

int64_t lg_cuda_codes_partial(const lg_cuda_env *e, const lg_weight *w, int64_t n_tok) {
    const lg_cuda_weight *p = lg_cuda_packed(w);
    const cut c = n_tok > 1 ? cut_for(e, w->dtype, p->n_chunk, n_tok) : cut{ 0, 0, 0, 0 };
    return c.parts > 1 ? (int64_t)c.parts * p->n_tile * 16 * (n_tok <= 8 ? 8 : 16) * 4 : 0; /* (of gate and up, or of q, k and v, as many in all) */
}

bool lg_cuda_streams_codes(const lg_cuda_env *e, const lg_weight *const *w, int n, int64_t n_tok, bool add) {
    const int64_t bytes = lg_bytes_alike(w, n);
    return e->compute != LG_COMPUTE_F32 && n_tok > 1 && n_tok <= LG_CODES_ROWS && bytes >= LEAST && e->n_sm <= 2 * LG_CODES_GROUPS && !(add && n > 1) &&
           lg_cuda_packed(w[0])->n_chunk <= 16 * LG_CODES_MOST &&
           cut_for(e, w[0]->dtype, lg_cuda_packed(w[0])->n_chunk, n_tok).parts > 0;
}

void lg_cuda_stream_codes(const lg_cuda_env *e, const lg_cuda_codes *in, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add) {
    codes_args a;
    memset(&a, 0, sizeof a);
    a.n_part = n;
    a.span = gate_up ? 2 : 1;
    a.n_item = lg_parts(a.p, w, y, n, gate_up, LG_TILE);
    a.n_chunk = lg_cuda_packed(w[0])->n_chunk;
    a.n_tok = in->n_tok;
    a.add = add;
    a.x = in->x;
    a.sums = in->sums;
    a.most = in->most;
    a.n_most = in->n_most;
    a.clear = in->clear;
    a.from = in->from;
    a.norm = in->norm;
    a.row = in->row;
    a.squares = in->squares;
    a.n_square = in->n_square;
    a.n_in = lg_cuda_packed(w[0])->n_in;
    a.eps = in->eps;
    a.count = in->count;
    a.partial = in->partial;
    a.twin = in->twin;
    a.twin_norm = in->twin.x ? in->twin_norm : NULL;
    a.twin_squares = in->twin_squares;
    switch (w[0]->dtype) {
#define X(T) case T: in->n_tok <= 8 ? launch<T, 1>(e, &a) : launch<T, 2>(e, &a); break;
        LG_EACH_QUANT(X)
#undef X
    default: break;
    }
}
