/* A product of one row of input with large weights: the weights stream through a ring in shared memory.
 *
 * One block of 8 warps a multiprocessor. Tiles of 16 weight rows are dealt out to the blocks in turn; of each tile every warp takes its
 * units (runs of records) and goes on to the next tile without waiting for the others: the sums of warps meet once for 16 tiles. A warp's
 * ring is always full of what it will take next, across tiles, and is filled before the kernel waits for the one before it: quantised weights by
 * bulk copies that one lane asks for, which loads of the input need not queue behind, rows by copies of 16 bytes a lane. The input is brought
 * into its form by every block for itself. */
#include "ops/cuda/stream.cuh"
#include <string.h>

#ifndef STREAM_LEAST
#define STREAM_LEAST (4 << 20)
#endif
enum { WARPS = 8, THREADS = WARPS * 32, RED = 16, /* tiles whose sums of warps wait in shared memory */
       LEAST = STREAM_LEAST };             /* bytes of weights; with fewer a ring is not worth filling */

/* A record: 16 rows and 32 columns of a row-major weight, or a chunk of a quantised one; its bytes (super: of two chunks). */
template <int T> struct record {
    typedef lg_fmt<T> F;
    static constexpr int codes = F::rows ? 1024 : F::code_bytes * 64, high = F::rows ? 0 : F::high_bytes * 64, scale = F::rows ? 0 : F::scale_bytes * 16,
                         super = F::rows ? 0 : F::super_bytes * 16, pair = 2 * (codes + high + scale) + super;
};
/* A stage of a warp's ring holds C records side by side in one tile, [C] codes [C] high [C] scale [C / 2] super; a unit is a run of stages that a warp takes at once. A block takes more
 * than half of a multiprocessor: two of the kernel behind it would gather where blocks leave first. Beside it a block of selection fits. */
template <int T> struct ring {
#ifdef LG_CUDA_ARCH_90a
    static constexpr int room = lg_fmt<T>::rows ? 144 << 10 : 112 << 10;
#else
    static constexpr int room = 48 << 10;
#endif
    static constexpr bool four = !lg_fmt<T>::rows && room / WARPS / (2 * record<T>::pair) >= 3; /* where three such stages fit */
    static constexpr int C = four ? 4 : 2, stage = C / 2 * record<T>::pair, depth = room / WARPS / stage, bytes = WARPS * depth * stage;
    static constexpr int high = C * record<T>::codes, scale = high + C * record<T>::high, super = scale + C * record<T>::scale; /* where they stand */
    static constexpr bool bulk = LG_BULK && !lg_fmt<T>::rows;
    static constexpr int before = bulk ? depth : depth * (lg_fmt<T>::rows ? 3 : 2) / 4; /* stages asked for before the input: behind all copies of lanes it came late */
};

typedef struct stream_args {
    lg_part p[3];
    int32_t n_part, span, n_item;       /* span 2: gate and up, tile for tile; item: a tile of each */
    int32_t n_in, n_chunk, n_piece;     /* n_piece: records of a tile */
    int32_t n_stage, run, n_unit;       /* of a tile: stages, stages of a unit, units */
    int32_t n_side;                     /* floats beside the input */
    bool add;
    const float *x, *norm;
    const int32_t *row;
    float eps;
} stream_args;

/* Of weights that share an input: whose tiles an item is among. */
static __device__ __forceinline__ int part_of(const stream_args &a, int item) {
    int which = 0;
    while (a.span == 1 && which + 1 < a.n_part && item >= a.p[which].tile_end) which++;
    return which;
}
static __device__ __forceinline__ int tile_of(const stream_args &a, int item, int which) { return item - (which && a.span == 1 ? a.p[which - 1].tile_end : 0); }

/* Bytes that lie together, a multiple of 16, from the weights into a stage. By the whole warp; bulk: they count at `bar`. */
template <bool BULK> static __device__ __forceinline__ void copy_run(lg_smem to, const uint8_t *from, int bytes, lg_smem bar) {
    const int lane = threadIdx.x & 31;
    if (BULK) {
        if (lane == 0) lg_bulk(to, from, (uint32_t)bytes, bar);
        return;
    }
    for (int k = lane * 16; k < bytes; k += 512) lg_copy16(to + k, from + k, 16);
}

/* The weights a warp asks for: where it stands in the block's list, and the addresses in that tile (of a row-major weight: the lane's). */
template <int T> struct walk {
    typedef lg_fmt<T> F;
    typedef record<T> R;
    typedef ring<T> S;
    int item, s, unit;                  /* s: of the item's tiles */
    int at, end;                        /* stages of the unit */
    const uint8_t *code, *code8, *high, *scale, *super; /* code8: row g + 8 */

    __device__ __forceinline__ void aim(const stream_args &a) {
        const int lane = threadIdx.x & 31, which = a.span == 2 ? s : part_of(a, item), tile = tile_of(a, item, which);
        const lg_part &w = a.p[which];
        if constexpr (F::rows) { /* a lane reads back what it copied */
            const int64_t r0 = min(tile * 16 + (lane >> 2), w.n_out - 1), r1 = min(tile * 16 + 8 + (lane >> 2), w.n_out - 1);
            code = w.codes + (r0 * a.n_in + (lane & 3) * 8) * 2;
            code8 = w.codes + (r1 * a.n_in + (lane & 3) * 8) * 2;
        } else {
            const int64_t rec = (int64_t)tile * a.n_chunk;
            code = w.codes + rec * R::codes;
            high = w.high + rec * R::high;
            scale = w.scale + rec * R::scale;
            super = w.super + (int64_t)tile * ((a.n_chunk + 1) >> 1) * R::super;
        }
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
                item += gridDim.x;
            }
        }
        if (item >= a.n_item) return;
        if (moved) aim(a);
        at = unit * a.run;
        end = min(at + a.run, a.n_stage);
    }
    /* Its next records into the stage at `to`, then on. */
    __device__ __forceinline__ void fetch(const stream_args &a, lg_smem to, lg_smem bar) {
        if (item < a.n_item) {
            const int lane = threadIdx.x & 31, first = at * S::C, n = min(S::C, a.n_piece - first);
            if constexpr (F::rows) {
#pragma unroll
                for (int c = 0; c < S::C; c++) {
                    if (c >= n) break;
                    const int64_t piece = first + c;
                    const uint32_t size = piece * 32 + (lane & 3) * 8 < a.n_in ? 16 : 0;
                    lg_copy16(to + c * R::codes + lane * 16, code + (size ? piece * 64 : 0), size);
                    lg_copy16(to + c * R::codes + 512 + lane * 16, code8 + (size ? piece * 64 : 0), size);
                }
            } else {
                const int n_super = (n + 1) >> 1;
                if (S::bulk && lane == 0) lg_bar_arrive(bar, (uint32_t)(n * (R::codes + R::high + R::scale) + n_super * R::super));
                copy_run<S::bulk>(to, code + (int64_t)first * R::codes, n * R::codes, bar);
                if (R::high) copy_run<S::bulk>(to + S::high, high + (int64_t)first * R::high, n * R::high, bar);
                copy_run<S::bulk>(to + S::scale, scale + (int64_t)first * R::scale, n * R::scale, bar);
                if (R::super) copy_run<S::bulk>(to + S::super, super + (int64_t)(first >> 1) * R::super, n_super * R::super, bar);
            }
            if (++at == end) {
                unit += WARPS;
                settle(a, false);
            }
        }
        if (!S::bulk) lg_cp_commit();
    }
};

/* What lg_multiply takes, from record c of a stage. */
template <int T>
static __device__ __forceinline__ void take(lg_hold<T> &o, const uint8_t *from, int c, int lane) {
    typedef lg_fmt<T> F;
    typedef record<T> R;
    typedef ring<T> S;
    const int g = lane >> 2;
#pragma unroll
    for (int i = 0; i < R::codes / 512; i++) o.c[i] = *(const uint4 *)(from + c * R::codes + i * 512 + lane * 16);
    if (F::rows) return;
    const uint8_t *h = from + S::high + c * R::high, *s = from + S::scale + c * R::scale, *d = from + S::super + (c >> 1) * R::super;
    if (F::five) {
        o.h[0] = *(const uint32_t *)(h + lane * 4);
        o.h[1] = *(const uint32_t *)(h + 128 + lane * 4);
    }
    if (F::q6) {
        const uint2 a = *(const uint2 *)(h + lane * 8), b = *(const uint2 *)(h + 256 + lane * 8);
        o.h[0] = a.x;
        o.h[1] = b.x;
        o.h[2] = a.y;
        o.h[3] = b.y;
    }
    if (F::pair) {
        o.s[0] = *(const uint4 *)(s + g * 16);
        o.s[F::pair ? 1 : 0] = *(const uint4 *)(s + (g + 8) * 16);
    } else {
        const uint2 a = *(const uint2 *)(s + g * 8), b = *(const uint2 *)(s + (g + 8) * 8);
        o.s[0] = make_uint4(a.x, a.y, b.x, b.y);
    }
    if (F::k45) {
        o.d[0] = *(const uint32_t *)(d + g * 4);
        o.d[1] = *(const uint32_t *)(d + (g + 8) * 4);
    }
    if (F::q6) {
        o.d[0] = *(const uint16_t *)(d + g * 2);
        o.d[1] = *(const uint16_t *)(d + (g + 8) * 2);
    }
}

/* What the thread's row of the next sums is added to: asked for before the weights are multiplied. */
static __device__ __forceinline__ float old_of(const stream_args &a, int first) {
    const int row = (first + ((int)threadIdx.x >> 4) * (int)gridDim.x) * 16 + ((int)threadIdx.x & 15);
    return a.add && row < a.p[0].n_out ? __ldcg(a.p[0].out + row) : 0.0f;
}
/* The sums of k tiles, the first one of item `first`: warps added up and written. By the whole block; red may be written again afterwards. */
static __device__ __forceinline__ void put_sums(const stream_args &a, const float *red, int first, int k, float factor, float old) {
    const int j = (int)threadIdx.x >> 4, r = threadIdx.x & 15, item = first + j * (int)gridDim.x;
    const int which = part_of(a, item), row = tile_of(a, item, which) * 16 + r;
    __syncthreads();
    if (j * a.span < k && row < a.p[which].n_out) {
        const float *from = red + j * a.span * WARPS * 16 + r;
        float v = 0.0f, up = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += from[w * 16];
        v *= factor;
        if (a.span == 2) {
#pragma unroll
            for (int w = 0; w < WARPS; w++) up += from[(WARPS + w) * 16];
            v = v / (1.0f + __expf(-v)) * (up * factor);
        }
        a.p[which].out[row] = old + v;
    }
    __syncthreads();
}

template <int T>
static __global__ void __launch_bounds__(THREADS, 2) k_stream(const __grid_constant__ stream_args a) {
    typedef lg_fmt<T> F;
    typedef ring<T> R;
    constexpr int C = R::C, SIDE = lg_side_floats(F::q6);
    LG_SMEM(ring_s);                                    /* [WARPS][depth][stage] */
    uint8_t *bars = ring_s + R::bytes;                  /* [WARPS][depth] of 8 bytes */
    float *red = (float *)(bars + WARPS * R::depth * 8); /* [RED][WARPS][16] */
    float *tmp = red + RED * WARPS * 16;                /* [WARPS] */
    float *side = tmp + WARPS;                          /* [n_side] */
    uint16_t *xs = (uint16_t *)(side + a.n_side);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, pair0 = 0;
    const uint8_t *mine = ring_s + warp * R::depth * R::stage;
    const lg_smem mine_at = lg_smem_of(mine), bar = lg_smem_of(bars + warp * R::depth * 8);
    walk<T> ahead;
    ahead.begin(a);
    if (R::bulk && lane == 0) /* who asks; the others wait behind the block's barrier */
#pragma unroll
        for (int i = 0; i < R::depth; i++) lg_bar_init(bar + (lg_smem)(i * 8));
    const auto fetch = [&](int i) { ahead.fetch(a, mine_at + (lg_smem)(i * R::stage), bar + (lg_smem)(i * 8)); };
#pragma unroll 1
    for (int i = 0; i < R::before; i++) fetch(i);
    if (a.norm && (blockIdx.x * THREADS + tid) * 32 < (unsigned)a.n_in) lg_prefetch(a.norm + (blockIdx.x * THREADS + tid) * 32);
    lg_pdl_wait();
    lg_pdl_go(); /* only now: who starts then may read what was staged for this step */

    const auto rest = [&] {
#pragma unroll 1
        for (int i = R::before; i < R::depth; i++) fetch(i);
    };
    const float *x = a.x + (a.row ? *a.row : 0) * (int64_t)a.n_in;
    lg_warp_sum(tmp, a.norm ? lg_prepare_row<THREADS, 2>(xs, side, 1, 0, x, a.norm, a.n_in, a.n_chunk, lg_form_of<T>(), rest)
                            : lg_prepare_row<THREADS, 7>(xs, side, 1, 0, x, NULL, a.n_in, a.n_chunk, lg_form_of<T>(), rest)); /* 4096 and 14336 numbers are a round */
    __syncthreads();
    const float factor = (a.norm ? lg_norm_factor<WARPS>(tmp, a.eps, a.n_in) : 1.0f) * (F::rows ? 1.0f : 16777216.0f);
    const uint16_t *x_lane = xs + t * 8; /* (lanes of columns other than the first feed zeros) */
    int unit = warp, stage = 0, k = 0, begun = blockIdx.x;
    uint32_t turn = 0; /* of the ring: even or odd */
    float old = old_of(a, begun);
    for (int item = begun; item < a.n_item; item += gridDim.x)
        for (int s = 0; s < a.span; s++) {
            float acc[1][4] = { { 0.0f, 0.0f, 0.0f, 0.0f } };
            for (; unit < a.n_unit; unit += WARPS)
                for (int at = unit * a.run, end = min(at + a.run, a.n_stage); at < end; at++) {
                    if (R::bulk) lg_bar_wait(bar + (lg_smem)(stage * 8), turn);
                    else lg_copy_wait<R::depth - 1>();
                    if (!F::rows && !R::bulk) __syncwarp();
#pragma unroll
                    for (int c = 0; c < C; c++) {
                        const int piece = at * C + c;
                        if (piece < a.n_piece) {
                            lg_hold<T> o;
                            take<T>(o, mine + stage * R::stage, c, lane);
                            lg_multiply<T, 1, true>(acc, o, x_lane + piece * (F::rows ? 32 : LG_CHUNK), side + piece * (F::rows ? 1 : 4) * SIDE, &pair0, SIDE, 0, g == 0);
                        }
                    }
                    if (!F::rows) __syncwarp();
                    fetch(stage);
                    if (++stage == R::depth) {
                        stage = 0;
                        turn ^= 1;
                    }
                }
            unit -= a.n_unit;
            if (t == 0) {
                red[(k * WARPS + warp) * 16 + g] = acc[0][0];
                red[(k * WARPS + warp) * 16 + g + 8] = acc[0][2];
            }
            if (++k == RED || (s + 1 == a.span && item + (int)gridDim.x >= a.n_item)) {
                put_sums(a, red, begun, k, factor, old);
                k = 0;
                begun = item + (int)gridDim.x;
                old = old_of(a, begun);
            }
        }
}

/* ---- host ---- */
static const lg_cuda_weight *packed(const lg_weight *w) { return (const lg_cuda_weight *)w->packed; }

/* How a tile is cut among warps. Rows of a row-major weight are read side by side by all warps; of packed records each warp takes runs, as
 * long as they may be with all warps at work (to go on to another tile costs about as much as a record). */
template <int T> static void cut(stream_args *a, int n_sm) {
    const int tiles = (a->n_item + n_sm - 1) / n_sm * a->span;
    int best = INT32_MAX;
    a->n_piece = lg_fmt<T>::rows ? (a->n_in + 31) / 32 : a->n_chunk;
    a->n_stage = (a->n_piece + ring<T>::C - 1) / ring<T>::C;
    a->run = 1;
    for (int parts = 1; parts <= WARPS && parts <= a->n_stage && !lg_fmt<T>::rows; parts++) {
        const int run = (a->n_stage + parts - 1) / parts, units = (a->n_stage + run - 1) / run, cost = (tiles * units + WARPS - 1) / WARPS * (run + 1);
        if (cost >= best) continue;
        best = cost;
        a->run = run;
    }
    a->n_unit = (a->n_stage + a->run - 1) / a->run;
}

template <int T> static bool launch(const lg_cuda_env *e, stream_args *a) {
    static int8_t ready[16]; /* of a device */
    int device = 0;
    a->n_side = T == LG_DTYPE_BF16 ? 0 : a->n_chunk * 4 * lg_side_floats(lg_fmt<T>::q6);
    const int64_t smem = ring<T>::bytes + WARPS * ring<T>::depth * 8 + (int64_t)(RED * WARPS * 16 + WARPS + a->n_side) * 4 + (int64_t)a->n_chunk * LG_CHUNK * 2;
    if (smem > e->smem_max) return false;
    cudaGetDevice(&device);
    if (device >= 16) return false;
    if (!ready[device]) {
        cudaFuncSetAttribute((const void *)k_stream<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)e->smem_max);
        ready[device] = 1;
    }
    cut<T>(a, e->n_sm);
    lg_cuda_launch(k_stream<T>, dim3((unsigned)(a->n_item < e->n_sm ? a->n_item : e->n_sm)), dim3(THREADS), (size_t)smem, e->stream, true, *a);
    return true;
}

bool lg_cuda_streams(const lg_cuda_env *e, const lg_weight *w) {
    return e->compute != LG_COMPUTE_F32 && w->dtype != LG_DTYPE_F32 && w->n_in % 8 == 0 && packed(w)->bytes >= LEAST;
}

bool lg_cuda_stream(const lg_cuda_env *e, const lg_cuda_in *in, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add) {
    stream_args a;
    int64_t bytes = 0;
    const lg_cuda_weight *w0 = packed(w[0]);
    memset(&a, 0, sizeof a);
    a.n_in = w0->n_in;
    a.n_chunk = w0->n_chunk;
    a.n_part = n;
    a.span = gate_up ? 2 : 1;
    a.add = add;
    a.x = in->x;
    a.row = in->row;
    a.norm = in->norm;
    a.eps = in->eps;
    for (int i = 0; i < n; i++) {
        const lg_cuda_weight *p = packed(w[i]);
        a.n_item = gate_up ? p->n_tile : a.n_item + p->n_tile;
        a.p[i] = lg_part{ p->codes, p->high, p->scale, p->super, y[i], p->n_out, a.n_item };
        bytes += p->bytes;
    }
    if (in->n_tok != 1 || bytes < LEAST || (add && n > 1)) return false;
    switch (w0->dtype) {
#define X(T) case T: return launch<T>(e, &a);
        X(LG_DTYPE_F16) X(LG_DTYPE_BF16) LG_EACH_QUANT(X)
#undef X
    default: return false;
    }
}
