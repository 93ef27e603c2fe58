/* A product of one row of input with large weights: the weights stream through a ring in shared memory. (Row-major ones: stream_major.cu.)
 *
 * One block of 8 warps a multiprocessor. Tiles of 16 weight rows are dealt out to the blocks in turn; of each tile every warp takes its
 * units (runs of records) and goes on to the next tile without waiting for the others: the sums of warps meet once for 16 tiles. A warp's
 * ring is always full of what it will take next, across tiles, and is filled before the kernel waits for the one before it. The input is
 * brought into its form by every block for itself, whole numbers (struct digits). Gate and up leave it for down as f16, 16 numbers (a
 * tile's) scaled at a time. */
#include "ops/cuda/stream_packed.cuh"
#include <string.h>

#ifndef STREAM_LEAST
#define STREAM_LEAST (128 << 10)
#endif
enum { WARPS = 8, THREADS = WARPS * 32, RED = 16, /* tiles whose sums of warps wait in shared memory */
       LEAST = STREAM_LEAST,               /* bytes of weights; with fewer a ring is not worth filling */
       BESIDE = 32 * LEAST };              /* bytes of codes; with fewer the next kernel's blocks are not worth making room for */

/* A stage of a ring holds C records side by side in one tile (an even number where there are supers): their codes, then the high bits, the scales, the supers. */
template <int T, int C> struct stage_of {
    typedef lg_record<T> R;
    static_assert(C % 2 == 0 || !R::super, "supers are of two records");
    static constexpr int high = C * R::codes, scale = high + C * R::high, super = scale + C * R::scale, bytes = super + C / 2 * R::super; /* where they stand */
};

/* A warp's ring. A block takes more than half of a multiprocessor: two of the kernel behind it would gather where blocks leave first. Beside it a block of
 * selection fits. */
template <int T> struct ring {
    typedef lg_record<T> R;
#ifdef LG_CUDA_ARCH_90a
    static constexpr int room = 112 << 10;
#else
    static constexpr int room = 48 << 10;
#endif
    static constexpr bool four = room / WARPS / (2 * R::two) >= 3; /* where three such stages fit */
    static constexpr int C = four ? 4 : 2, stage = stage_of<T, C>::bytes, depth = room / WARPS / stage;
    typedef stage_of<T, C> S;
};

/* n numbers as f16, each 16 times the power of two that lays their largest in [512, 1024); for 16: what undoes it (no number where they are not finite). */
typedef struct f16_row { uint16_t *x; float *undo; } f16_row;
static f16_row f16_at(const uint8_t *p, int n) {
    const int64_t tiles = (n + 15) / 16;
    return p ? f16_row{ (uint16_t *)p, (float *)(p + tiles * 32) } : f16_row{ NULL, NULL };
}

struct stream_args : lg_deal {
    int32_t n_stage, n_unit;            /* of a tile */
    int32_t n_in;
    int32_t n_side;                     /* floats beside the input */
    int32_t depth, before;              /* stages of a warp's ring; asked for before the input */
    bool add, lets;                     /* lets: as in lg_cuda_chain */
    const float *x, *norm;
    const int32_t *row;
    float eps;
    f16_row from, to;                   /* x NULL: not there */
};

/* `bytes` (at most MOST, a multiple of 16) that lie together, from the weights into a stage. By the whole warp; to, from: the lane's 16. */
template <int MOST> static __device__ __forceinline__ void copy_run(lg_smem to, const uint8_t *from, int bytes) {
    const int left = bytes - ((int)threadIdx.x & 31) * 16;
#pragma unroll
    for (int at = 0; at < MOST; at += 512)
        if (at < left) lg_copy16(to + (lg_smem)at, from + at, 16);
}

/* The weights a warp asks for: where it stands in the block's list (every gridDim.x-th item), and the lane's addresses in that tile. */
template <int T, int C> struct walk {
    typedef lg_record<T> R;
    typedef stage_of<T, C> S;
    int item, s, unit;                  /* s: of the item's tiles */
    int at, end;                        /* stages of the unit */
    const uint8_t *code, *high, *scale, *super;

    __device__ __forceinline__ void aim(const stream_args &a) {
        const lg_spot at_tile = lg_spot_of(a, item);
        const int lane = threadIdx.x & 31, tile = at_tile.tile;
        const lg_part &w = a.p[a.span == 2 ? s : at_tile.part];
        const int64_t rec = (int64_t)tile * a.n_chunk;
        code = w.codes + rec * R::codes + lane * 16;
        high = w.high + rec * R::high + lane * 16;
        scale = w.scale + rec * R::scale + lane * 16;
        super = w.super + (int64_t)tile * ((a.n_chunk + 1) >> 1) * R::super + lane * 16;
    }
    __device__ __forceinline__ void begin(const stream_args &a) {
        item = blockIdx.x;
        s = 0;
        unit = (int)threadIdx.x >> 5;
        settle(a, true);
    }
    /* To a unit that exists, or past the last item. */
    __device__ __forceinline__ void settle(const stream_args &a, bool moved) {
        while (unit >= a.n_unit && item < a.n_item) {
            moved = true;
            unit -= a.n_unit;
            if (++s == a.span) {
                s = 0;
                item += (int)gridDim.x;
            }
        }
        if (item >= a.n_item) return;
        if (moved) aim(a);
        at = unit * a.run;
        end = min(at + a.run, a.n_stage);
    }
    /* Its next records into the stage at `to`, then on. */
    __device__ __forceinline__ void fetch(const stream_args &a, lg_smem to) {
        if (item < a.n_item) {
            const int first = at * C, n = min(C, a.n_chunk - first);
            to += (lg_smem)((threadIdx.x & 31) * 16);
            copy_run<C * R::codes>(to, code + (int64_t)first * R::codes, n * R::codes);
            if (R::high) copy_run<C * R::high>(to + S::high, high + (int64_t)first * R::high, n * R::high);
            copy_run<C * R::scale>(to + S::scale, scale + (int64_t)first * R::scale, n * R::scale);
            if (R::super) copy_run<C / 2 * R::super>(to + S::super, super + (int64_t)(first >> 1) * R::super, ((n + 1) >> 1) * R::super);
            if (++at == end) {
                unit += WARPS;
                settle(a, false);
            }
        }
        lg_cp_commit();
    }
};

/* ---- whole numbers ----
 * Codes are bytes 0..255 for the tensor cores, as they lie or after a mask. The input comes as whole numbers of 16 bits, scaled by the largest of its group of
 * 32, in two digits: hi * 256 + lo. A product [16 x 32] [32 x 8] has the 16 rows and 32 columns of a group as its first factor. The eight columns of the second
 * are the digits of the four groups of a chunk, and all but those of the group at hand are zeros: after four products lane part t holds both digits' sums of
 * group t, exact, and scales them alone. (Q6_K: scales are of half groups, so two groups fill the eight columns.) */
enum { DIGITS_MOST = 32512 }; /* the largest number */
template <int T> struct digits {
    typedef lg_fmt<T> F;
    static constexpr int parts = F::q6 ? 2 : 1, bytes = parts * 64; /* a group's parts with a scale of their own; its digits: [part][hi, lo][lane part][8] */
    static constexpr int side = parts * 4; /* floats beside it, for each part: what undoes the scale; -zero point * sums of hi, of lo, as int; the sum of the numbers */
    /* Which of a lane's eight codes stands in byte b of word w. */
    static __device__ __forceinline__ constexpr int code(int w, int b) { return F::byte ? w * 4 + (b & 1) * 2 + (b >> 1) : w * 2 + (b >> 1) + (b & 1) * 4; }
};
/* Byte `at` of four words. */
static __device__ __forceinline__ uint32_t bytes_at(int at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, (unsigned)(at | (at + 4) << 4)), __byte_perm(c, d, (unsigned)(at | (at + 4) << 4)), 0x5410);
}
/* v * scale are at most DIGITS_MOST, undo * that is v. v: lane part slot % 4's eight columns of group slot / 4. By whole warps. */
template <int T> static __device__ __forceinline__ void put_digits(uint8_t *xs, float *side, int slot, const float *v, float scale, float undo) {
    typedef digits<T> D;
    uint32_t lo[8], hi[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        lo[e] = __float_as_uint(v[e] * scale + 12582912.0f); /* rounded: the low half is the number */
        hi[e] = lo[e] + 128;
    }
    uint32_t word[2][2]; /* hi, lo */
#pragma unroll
    for (int w = 0; w < 2; w++) {
        word[0][w] = bytes_at(1, hi[D::code(w, 0)], hi[D::code(w, 1)], hi[D::code(w, 2)], hi[D::code(w, 3)]);
        word[1][w] = bytes_at(0, lo[D::code(w, 0)], lo[D::code(w, 1)], lo[D::code(w, 2)], lo[D::code(w, 3)]);
    }
#pragma unroll
    for (int p = 0; p < D::parts; p++) {
        const uint32_t mask = D::parts == 1 ? 0xFFFFFFFFu : p ? 0xFF00FF00u : 0x00FF00FFu;
        int sum[2];
#pragma unroll
        for (int d = 0; d < 2; d++) {
            const uint2 x = make_uint2(word[d][0] & mask, word[d][1] & mask);
            sum[d] = __dp4a((int)x.x, 0x01010101, __dp4a((int)x.y, 0x01010101, 0));
            *(uint2 *)(xs + (slot >> 2) * D::bytes + (p * 2 + d) * 32 + (slot & 3) * 8) = x;
        }
        int both = sum[0] * 65536 + sum[1];
        both += __shfl_xor_sync(0xffffffffu, both, 1);
        both += __shfl_xor_sync(0xffffffffu, both, 2);
        const int of_lo = (int16_t)both, of_hi = (both - of_lo) >> 16;
        if ((slot & 3) == 0)
            *(float4 *)(side + (slot >> 2) * D::side + p * 4) =
                make_float4(undo, __int_as_float(-D::F::zero * of_hi), __int_as_float(-D::F::zero * of_lo), undo * (float)(of_hi * 256 + of_lo));
    }
}

/* The codes of group j, row half hf, as bytes: in the order of digits::code. */
template <int T> static __device__ __forceinline__ void bytes_of(uint32_t *r, const lg_hold<T> &o, int hf, int j) {
    typedef lg_fmt<T> F;
    if (F::byte) {
        const uint4 v = o.c[F::byte ? hf * 2 + (j >> 1) : 0];
        r[0] = part4(v, (j & 1) * 2);
        r[1] = part4(v, (j & 1) * 2 + 1);
        return;
    }
    const uint32_t w = part4(o.c[hf], j);
    r[0] = w & 0x0F0F0F0Fu;
    r[1] = (w >> 4) & 0x0F0F0F0Fu;
    if (F::five) { /* code 2i + k: bit i + 16 k of the group's */
        const uint32_t h = o.h[hf] >> (j * 4);
        r[0] |= (h & 0x00010001u) << 4 | (h & 0x00040004u) << 10;
        r[1] |= (h & 0x00020002u) << 3 | (h & 0x00080008u) << 9;
    }
    if (F::q6) { /* the same with two bits */
        const uint32_t h = o.h[(j >> 1) * 2 + hf] >> ((j & 1) * 8);
        r[0] |= (h & 0x00030003u) << 4 | (h & 0x00300030u) << 8;
        r[1] |= (h & 0x000C000Cu) << 2 | (h & 0x00C000C0u) << 6;
    }
}
/* Where a lane's numbers stand in a stage, and in the input. Row g: its part t of a record's scales; row g + 8: 8 * scale_row on. */
template <int T> struct lane_place {
    typedef lg_fmt<T> F;
    typedef typename ring<T>::S S;
    static constexpr int scale_row = F::pair ? 16 : 8, scale_part = F::pair ? 4 : F::q6 ? 1 : 2, super_row = F::k45 ? 4 : 2;
    uint32_t code, high, scale, super, x; /* bytes */
    uint32_t side;                        /* floats */
    __device__ __forceinline__ lane_place() {
        const uint32_t lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        code = lane * 16;
        high = S::high + lane * (F::q6 ? 8 : 4);
        scale = S::scale + g * scale_row + t * scale_part;
        super = S::super + g * super_row;
        x = g * 32 + t * 8;
        side = t * 4;
    }
};
/* Scale and minimum (0 where there is none) at `scale`, of the part that `super` goes with. */
template <int T> static __device__ __forceinline__ void scale_at(float &d, float &m, const uint8_t *scale, const uint8_t *super) {
    typedef lg_fmt<T> F;
    m = 0.0f;
    if (F::pair) {
        const uint32_t v = *(const uint32_t *)scale;
        d = half_float(v, 0);
        m = half_float(v, 1);
    } else if (F::k45) {
        const uint32_t v = *(const uint16_t *)scale, of = *(const uint32_t *)super;
        d = half_float(of, 0) * byte_float(v, 0);
        m = -half_float(of, 1) * byte_float(v, 1);
    } else if (F::q6) d = half_float(*(const uint16_t *)super, 0) * (float)*(const int8_t *)scale;
    else d = half_float(*(const uint16_t *)scale, 0);
}
/* Record c of a stage times the input (x, side: the lane's, of this record): what the lane's parts add to rows g and g + 8. b: zeros but for what is loaded here,
 * always in the same lanes. */
template <int T>
static __device__ __forceinline__ void multiply_record(float *acc, uint2 (*b)[4], const uint8_t *stage, const lane_place<T> &own, int c, const uint8_t *x, const float *side, bool live, int g) {
    typedef lg_fmt<T> F;
    typedef lg_record<T> R;
    typedef digits<T> D;
    typedef lane_place<T> L;
    constexpr int GROUPS = 4 / D::parts; /* whose digits fill the eight columns */
    const uint8_t *code = stage + own.code, *h = stage + own.high, *scale = stage + own.scale, *super = stage + own.super;
    lg_hold<T> o;
    lg_hold_codes(o, code + c * R::codes, h + c * R::high);
#pragma unroll
    for (int j0 = 0; j0 < 4; j0 += GROUPS) {
        const float4 beside = *(const float4 *)(side + j0 * D::parts * 4);
        const uint8_t *sc = scale + c * R::scale + j0 * D::parts * L::scale_part, *su = super + (c >> 1) * R::super;
        float d0, m0, d1, m1;
        scale_at<T>(d0, m0, sc, su);
        scale_at<T>(d1, m1, sc + 8 * L::scale_row, su + 8 * L::super_row);
        int32_t sum[4] = { 0, 0, 0, 0 }; /* of row g, both digits; of row g + 8 */
        if (F::zero) {
            sum[0] = sum[2] = __float_as_int(beside.y);
            sum[1] = sum[3] = __float_as_int(beside.z);
        }
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            uint2 &by = b[c & 1][j];
            if (g / (2 * D::parts) == j) by = *(const uint2 *)(x + j0 * 2 * D::parts * 32);
            uint32_t r0[2], r1[2];
            bytes_of<T>(r0, o, 0, j0 + j);
            bytes_of<T>(r1, o, 1, j0 + j);
            lg_mma_u8(sum, r0[0], r1[0], r0[1], r1[1], by.x, by.y);
        }
        const float v0 = acc[0] + d0 * beside.x * (float)(sum[0] * 256 + sum[1]) + m0 * beside.w, v1 = acc[1] + d1 * beside.x * (float)(sum[2] * 256 + sum[3]) + m1 * beside.w;
        acc[0] = live ? v0 : acc[0];
        acc[1] = live ? v1 : acc[1];
    }
}

/* Of 16 tiles whose sums are put together, the first one of item `first`: the thread's row, half a warp a tile. out NULL: none. */
struct sum_row { float *out; int32_t row; };
static __device__ __forceinline__ sum_row sum_row_of(const stream_args &a, int first) {
    const lg_spot s = lg_spot_of(a, first + ((int)threadIdx.x >> 4) * (int)gridDim.x);
    const int row = s.tile * 16 + ((int)threadIdx.x & 15);
    return sum_row{ row < a.p[s.part].n_out ? a.p[s.part].out + row : NULL, row };
}
/* What it is added to: asked for before the weights are multiplied. */
static __device__ __forceinline__ float old_of(const stream_args &a, const sum_row &to) { return a.add && to.out ? __ldcg(to.out) : 0.0f; }
/* Beside the result v of the thread's row: half a warp has a tile. Dead rows are zeros. */
static __device__ __forceinline__ void put_f16(const stream_args &a, float v, int row, bool live) {
    float top = live ? fabsf(v) : 0.0f, s = 1.0f;
#pragma unroll
    for (int m = 8; m; m >>= 1) top = lg_max_nan(top, __shfl_xor_sync(0xffffffffu, top, m));
    if (top > 0) s = lg_group_scale(top);
    if (!live) return;
    a.to.x[row] = __half_as_ushort(__float2half_rn(v * s));
    if ((row & 15) == 0) a.to.undo[row >> 4] = top < INFINITY ? lg_reciprocal_of_power(s) : NAN;
}
/* The sums of k tiles: warps added up and written. By the whole block; red may be written again afterwards. */
static __device__ __forceinline__ void put_sums(const stream_args &a, const float *red, const sum_row &to, int k, float factor, float old) {
    const int j = (int)threadIdx.x >> 4, r = threadIdx.x & 15;
    const float *from = red + j * a.span * WARPS * 16 + r;
    const bool live = to.out && j * a.span < k;
    float v = 0.0f, up = 0.0f;
    __syncthreads();
    if (live) {
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += from[w * 16];
        v *= factor;
        if (a.span == 2) {
#pragma unroll
            for (int w = 0; w < WARPS; w++) up += from[(WARPS + w) * 16];
            v = __fdividef(v, 1.0f + __expf(-v)) * (up * factor);
        }
        v += old;
        *to.out = v;
    }
    if (a.to.x) put_f16(a, v, to.row, live);
    __syncthreads();
}

/* The input from f16: x and what undoes the scale (of a group's first and last 16), from the thread's first slot on. `behind` as in lg_each_eight. */
template <int T, typename B> static __device__ __forceinline__ void take_f16(uint8_t *xs, float *side, const uint4 *x, const float2 *undo, int n_in, int n_chunk, B behind) {
    enum { AHEAD = 7 }; /* 14336 numbers are a round */
    const int tid = threadIdx.x, n_slot = n_chunk * 16;
    int first = 0, left = n_in - tid * 8;
#pragma unroll 1
    do {
        uint4 in[AHEAD];
        float2 by[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            in[i] = make_uint4(0, 0, 0, 0);
            by[i] = make_float2(1.0f, 1.0f);
            if (i * THREADS * 8 < left) {
                in[i] = __ldcg(x + i * THREADS);
                by[i] = __ldcg(undo + i * (THREADS / 4));
            }
        }
        if (first == 0) behind();
#pragma unroll 1 /* short code: it comes from L2 */
        for (int at = first + (tid & ~31), i = 0; i < AHEAD && at < n_slot; at += THREADS, i++) {
            const int slot = at + (tid & 31);
            const uint32_t w[4] = { in[0].x, in[0].y, in[0].z, in[0].w };
            const float most = lg_max_nan(by[0].x, by[0].y);
            float v[8];
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = half_float(w[e >> 1], e & 1);
            put_digits<T>(xs, side, slot, v, (slot & 2 ? by[0].y : by[0].x) * lg_reciprocal_of_power(most) * (DIGITS_MOST / 1024.0f), most * (1024.0f / DIGITS_MOST));
#pragma unroll
            for (int k = 0; k + 1 < AHEAD; k++) {
                in[k] = in[k + 1];
                by[k] = by[k + 1];
            }
        }
        first += AHEAD * THREADS;
        left -= AHEAD * THREADS * 8;
        x += AHEAD * THREADS;
        undo += AHEAD * THREADS / 4;
    } while (first < n_slot);
}

/* Threads of a block, at most; 128 registers for each. Those from THREADS on are there for their registers alone (warps_alone). */
enum { BOUND = 2 * THREADS };
template <int T> static __global__ void __launch_bounds__(BOUND, 1) k_stream(const __grid_constant__ stream_args a) {
    typedef lg_fmt<T> F;
    typedef ring<T> R;
    typedef digits<T> D;
    constexpr int C = R::C;
    if (threadIdx.x >= THREADS) return;
    LG_SMEM(ring_s);                                    /* [WARPS][depth][stage] */
    float *red = (float *)(ring_s + WARPS * a.depth * R::stage); /* [RED][WARPS][16] */
    float *tmp = red + RED * WARPS * 16;                /* [WARPS] */
    float *side = tmp + WARPS;                          /* [n_side] */
    uint8_t *xs = (uint8_t *)(side + a.n_side);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const uint8_t *mine = ring_s + warp * a.depth * R::stage;
    const lg_smem mine_at = lg_smem_of(mine);
    walk<T, C> ahead;
    ahead.begin(a);
#pragma unroll 1
    for (int i = 0; i < a.before; i++) ahead.fetch(a, mine_at + (lg_smem)(i * R::stage));
    if (a.norm && (int)(blockIdx.x * THREADS + tid) * 32 < a.n_in) lg_prefetch(a.norm + (blockIdx.x * THREADS + tid) * 32);
    /* Before the wait, all that the input has no part in. */
    lane_place<T> own;
    sum_row to = sum_row_of(a, blockIdx.x);
    uint2 b[2][4] = {}; /* see multiply_record */
    lg_pin(own.code, own.high, own.scale, own.super, own.x, own.side);
    lg_pin(to.out, to.row);
    const bool f16 = !F::q6 && a.from.x;
    const float *x = f16 ? (const float *)(const void *)(a.from.x + tid * 8) : a.x + lg_own_slot(F::q6); /* (f16: of another type, and beside it what undoes the scale) */
    const float *norm = f16 ? a.from.undo + (tid >> 2) * 2 : a.norm ? a.norm + lg_own_slot(F::q6) : NULL;
    lg_pin(x, norm);
    if (a.lets) lg_pdl_go(); /* to what reads nothing but weights before its own wait, and starts others only after it */
    lg_pdl_wait();
    if (!a.lets) lg_pdl_go(); /* only now: who starts then may read what was staged for this step */

    const auto rest = [&] {
#pragma unroll 1
        for (int i = a.before; i < R::depth; i++) ahead.fetch(a, mine_at + (lg_smem)(i * R::stage));
    };
    if (a.row) x += *a.row * (int64_t)a.n_in;
    float ss = 0;
    const auto put = [&](int slot, const float *v) {
        float top = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; e++) top = lg_max_nan(top, fabsf(v[e]));
        top = lg_max_nan(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = lg_max_nan(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const bool some = top > 1e-30f; /* smaller ones are zeros; no number stays none */
        put_digits<T>(xs, side, slot, v, some ? DIGITS_MOST * lg_reciprocal(top) : 0.0f, top * (some ? 1.0f / DIGITS_MOST : 0.0f));
    };
    if (f16) take_f16<T>(xs, side, (const uint4 *)(const void *)x, (const float2 *)(const void *)norm, a.n_in, a.n_chunk, rest);
    else {
        const auto each = [&](auto ahead_of, auto with) {
            return lg_each_eight<THREADS, decltype(ahead_of)::value, decltype(with)::value != 0>(x, norm, a.n_in, a.n_chunk, F::q6, rest, put);
        };
        ss = lg_by_length<THREADS>(a.norm != NULL, a.n_in, each);
    }
    lg_warp_sum(tmp, ss);
    __syncthreads();
    const float factor = a.norm ? lg_norm_factor<WARPS>(tmp, a.eps, a.n_in) : 1.0f;
    int unit = warp, stage = 0, k = 0, begun = blockIdx.x;
    float old = old_of(a, to);
    for (int item = begun; item < a.n_item; item += gridDim.x)
        for (int s = 0; s < a.span; s++) {
            float acc[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
            for (; unit < a.n_unit; unit += WARPS)
                for (int at = unit * a.run, end = min(at + a.run, a.n_stage); at < end; at++) {
                    lg_copy_wait<R::depth - 1>();
                    __syncwarp();
                    const int piece = at * C;
                    const uint8_t *from = mine + stage * R::stage;
#pragma unroll
                    for (int c = 0; c < C; c++) {
                        const bool live = piece + c < a.n_chunk;
                        multiply_record<T>(acc, b, from, own, c, xs + own.x + piece * 4 * D::bytes + c * 4 * D::bytes, side + own.side + piece * 4 * D::side + c * 4 * D::side, live, g);
                    }
                    __syncwarp();
                    ahead.fetch(a, mine_at + (lg_smem)(stage * R::stage));
                    stage = stage + 1 == R::depth ? 0 : stage + 1;
                }
            unit -= a.n_unit;
#pragma unroll
            for (int m = 1; m <= 2; m <<= 1) {
                acc[0] += __shfl_xor_sync(0xffffffffu, acc[0], m);
                acc[1] += __shfl_xor_sync(0xffffffffu, acc[1], m);
            }
            if (t == 0) {
                red[(k * WARPS + warp) * 16 + g] = acc[0];
                red[(k * WARPS + warp) * 16 + g + 8] = acc[1];
            }
            if (++k == RED || (s + 1 == a.span && item + (int)gridDim.x >= a.n_item)) {
                put_sums(a, red, to, k, factor, old);
                k = 0;
                begun = item + (int)gridDim.x;
                if (begun >= a.n_item) break;
                to = sum_row_of(a, begun);
                old = old_of(a, to);
            }
        }
}

/* ---- host ---- */
/* Into how long runs a tile of n_stage stages is cut, of `tiles` that a block of n_warp warps takes: each warp's as long as they may be with all warps at work (to go
 * on to another tile costs about as much as a record). */
static inline int run_of(int n_stage, int tiles, int n_warp) {
    int best = INT32_MAX, taken = 1;
    for (int parts = 1; parts <= n_warp && parts <= n_stage; parts++) {
        const int run = (n_stage + parts - 1) / parts, units = (n_stage + run - 1) / run, cost = (tiles * units + n_warp - 1) / n_warp * (run + 1);
        if (cost >= best) continue;
        best = cost;
        taken = run;
    }
    return taken;
}

template <int T> static void cut(stream_args *a, int n_sm, bool early) {
    const int tiles = (a->n_item + n_sm - 1) / n_sm * a->span;
    a->n_stage = (a->n_chunk + ring<T>::C - 1) / ring<T>::C;
    a->run = run_of(a->n_stage, tiles, WARPS);
    a->n_unit = (a->n_stage + a->run - 1) / a->run;
    /* Where a warp's ring holds all of its stages, and what follows reads nothing but weights ahead of time, the ring is no larger than that: beside this block the
     * next kernel's fills its own. */
    const int most = (tiles * a->n_unit + WARPS - 1) / WARPS * a->run;
    const bool all = most <= ring<T>::depth;
    a->lets = all && a->add && (int64_t)a->n_item * a->n_chunk * lg_record<T>::codes >= BESIDE;
    a->depth = a->lets ? most : ring<T>::depth;
    /* The input comes late behind what was asked for before it: less where it is long, all where nothing else will be asked for or there is time. */
    a->before = all || early ? a->depth : ring<T>::depth * (a->from.x ? 3 : 2) / 4;
}

/* Two blocks that take less than half of a multiprocessor's shared memory would come together on those that are free first, and none of the kernel behind them
 * would have room beside two. Warps that are gone at once keep the second away while it matters: as many as have no room beside eight others' registers, of which
 * each quarter of a multiprocessor has 16384. */
template <int T> static int warps_alone(void) {
    int regs = 128;
#ifndef LG_CUDA_EMU
    cudaFuncAttributes f;
    if (cudaFuncGetAttributes(&f, (const void *)k_stream<T>) == cudaSuccess) regs = (f.numRegs + 7) / 8 * 8;
#endif
    const int n = 4 * (16384 / (regs * 32)) - WARPS + 1;
    return n < WARPS ? WARPS : n > 2 * WARPS ? 2 * WARPS : n;
}

template <int T> static bool launch(const lg_cuda_env *e, stream_args *a, bool early) {
    static int8_t ready[16], warps[16]; /* of a device; warps: of a block that is to be alone of its kind */
    int device = 0;
    cut<T>(a, e->n_sm, early);
    const int n_x = a->n_chunk + ring<T>::C; /* chunks of the input: a stage may read beyond the last */
    a->n_side = n_x * 4 * digits<T>::side;
    const int64_t smem = (int64_t)WARPS * a->depth * ring<T>::stage + (int64_t)(RED * WARPS * 16 + WARPS + a->n_side) * 4 + (int64_t)n_x * 4 * digits<T>::bytes;
    if (smem > e->smem_max) return false;
    cudaGetDevice(&device);
    if (device >= 16) return false;
    if (!ready[device]) {
        cudaFuncSetAttribute((const void *)k_stream<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)e->smem_max);
        warps[device] = (int8_t)warps_alone<T>();
        ready[device] = 1;
    }
    const int n_warp = a->lets ? warps[device] : (int)WARPS;
    lg_cuda_launch(k_stream<T>, dim3((unsigned)(a->n_item < e->n_sm ? a->n_item : e->n_sm)), dim3((unsigned)n_warp * 32), (size_t)smem, e->stream, true, *a);
    return true;
}

bool lg_cuda_streams(const lg_cuda_env *e, const lg_weight *w) {
    return e->compute != LG_COMPUTE_F32 && w->dtype != LG_DTYPE_F32 && w->n_in % 8 == 0 && lg_cuda_packed(w)->bytes >= LEAST;
}

bool lg_cuda_stream(const lg_cuda_env *e, const lg_cuda_in *in, lg_cuda_chain *chain, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add) {
    stream_args a;
    int64_t bytes = 0;
    const lg_cuda_weight *w0 = lg_cuda_packed(w[0]);
    for (int i = 0; i < n; i++) bytes += lg_cuda_packed(w[i])->bytes;
    if (in->n_tok != 1 || bytes < LEAST || (add && n > 1)) return false;
    if (w0->dtype == LG_DTYPE_F16 || w0->dtype == LG_DTYPE_BF16) return lg_cuda_stream_major(e, in, chain->early, w, y, n, gate_up, add);
    memset(&a, 0, sizeof a);
    a.n_in = w0->n_in;
    a.n_chunk = w0->n_chunk;
    a.n_part = n;
    a.span = gate_up ? 2 : 1;
    a.add = add;
    a.x = in->x;
    a.row = chain->from ? NULL : in->row; /* (f16 is of the one row) */
    a.norm = in->norm;
    a.eps = in->eps;
    a.from = f16_at(chain->from, a.n_in);
    a.to = f16_at(chain->to, w0->n_out);
    a.n_item = lg_parts(a.p, w, y, n, gate_up, LG_TILE);
    switch (w0->dtype) {
#define X(T) case T: return launch<T>(e, &a, chain->early) && ((chain->lets = a.lets), true);
        LG_EACH_QUANT(X)
#undef X
    default: return false;
    }
}
