/* A product of one row of input with large weights: the weights stream through a ring in shared memory.
 *
 * One block of 8 warps a multiprocessor. Tiles of 16 weight rows are dealt out to the blocks in turn; of each tile every warp takes its
 * units (runs of records) and goes on to the next tile without waiting for the others: the sums of warps meet once for 16 tiles. A warp's
 * ring is always full of what it will take next, across tiles, and is filled before the kernel waits for the one before it. The input is
 * brought into its form by every block for itself; gate and up leave it for down as f16, 16 numbers (a tile's) scaled at a time. */
#include "ops/cuda/stream.cuh"
#include <string.h>

#ifndef STREAM_LEAST
#define STREAM_LEAST (128 << 10)
#endif
enum { WARPS = 8, THREADS = WARPS * 32, RED = 16, /* tiles whose sums of warps wait in shared memory */
       LEAST = STREAM_LEAST };             /* bytes of weights; with fewer a ring is not worth filling */

/* A record: 16 rows and 32 columns of a row-major weight, or a chunk of a quantised one; its bytes in shared memory. */
template <int T> struct record {
    typedef lg_fmt<T> F;
    static constexpr int codes = F::rows ? 1024 : F::code_bytes * 64, high = F::rows ? 0 : F::high_bytes * 64, scale = F::rows ? 0 : F::scale_bytes * 16,
                         super = F::rows ? 0 : F::super_bytes * 16, more = high + scale + super, bytes = codes + more;
};
/* A stage of a warp's ring holds C records side by side in one tile; a unit is a run of stages that a warp takes at once. A block takes more
 * than half of a multiprocessor: two of the kernel behind it would gather where blocks leave first. Beside it a block of selection fits. */
template <int T> struct ring {
#ifdef LG_CUDA_ARCH_90a
    static constexpr int room = lg_fmt<T>::rows ? 144 << 10 : 112 << 10;
#else
    static constexpr int room = 48 << 10;
#endif
    static constexpr bool four = !lg_fmt<T>::rows && room / WARPS / (4 * record<T>::bytes) >= 3; /* where three such stages fit */
    static constexpr int C = four ? 4 : 2, stage = C * record<T>::bytes, depth = room / WARPS / stage, bytes = WARPS * depth * stage;
};

/* n numbers as f16, each 16 times the power of two that lays their largest in [512, 1024); for 16: what undoes it and the sum of the numbers, as rounded. */
typedef struct f16_row { uint16_t *x; float *side; } f16_row;
static f16_row f16_at(const uint8_t *p, int n) {
    const int64_t tiles = (n + 15) / 16;
    return p ? f16_row{ (uint16_t *)p, (float *)(p + tiles * 32) } : f16_row{ NULL, NULL };
}

typedef struct stream_args {
    lg_part p[3];
    int32_t n_part, span, n_item;       /* span 2: gate and up, tile for tile; item: a tile of each */
    int32_t n_in, n_chunk, n_piece;     /* n_piece: records of a tile */
    int32_t n_stage, run, n_unit;       /* of a tile: stages, stages of a unit, units */
    int32_t n_side;                     /* floats beside the input */
    int32_t before;                     /* stages asked for before the input */
    bool add;
    const float *x, *norm;
    const int32_t *row;
    float eps;
    f16_row from, to;                   /* x NULL: not there */
} stream_args;

/* Of weights that share an input: whose tiles an item is among. */
static __device__ __forceinline__ int part_of(const stream_args &a, int item) {
    int which = 0;
    while (a.span == 1 && which + 1 < a.n_part && item >= a.p[which].tile_end) which++;
    return which;
}
static __device__ __forceinline__ int tile_of(const stream_args &a, int item, int which) { return item - (which && a.span == 1 ? a.p[which - 1].tile_end : 0); }

/* The weights a warp asks for: where it stands in the block's list, and the lane's addresses in that tile. */
template <int T> struct walk {
    typedef lg_fmt<T> F;
    typedef record<T> R;
    static constexpr int N_CODE = F::rows ? 2 : 1, N_MORE = (R::more + 511) / 512;
    int item, s, unit;                  /* s: of the item's tiles */
    int at, end;                        /* stages of the unit */
    const uint8_t *code[N_CODE], *more[N_MORE ? N_MORE : 1];

    __device__ __forceinline__ void aim(const stream_args &a) {
        const int lane = threadIdx.x & 31, which = a.span == 2 ? s : part_of(a, item), tile = tile_of(a, item, which);
        const lg_part &w = a.p[which];
        if constexpr (F::rows) { /* a lane reads back what it copied */
            const int64_t r0 = min(tile * 16 + (lane >> 2), w.n_out - 1), r1 = min(tile * 16 + 8 + (lane >> 2), w.n_out - 1);
            code[0] = w.codes + (r0 * a.n_in + (lane & 3) * 8) * 2;
            code[N_CODE - 1] = w.codes + (r1 * a.n_in + (lane & 3) * 8) * 2;
        } else {
            const int64_t rec = (int64_t)tile * a.n_chunk;
            code[0] = w.codes + rec * R::codes + lane * 16;
#pragma unroll
            for (int i = 0; i < N_MORE; i++) { /* high, scale, super: 16 bytes a lane */
                const int k = i * 512 + lane * 16;
                more[i] = k < R::high ? w.high + rec * R::high + k : k < R::high + R::scale ? w.scale + rec * R::scale + (k - R::high)
                        : w.super + (int64_t)tile * ((a.n_chunk + 1) >> 1) * R::super + (k - R::high - R::scale);
            }
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
    __device__ __forceinline__ void fetch(const stream_args &a, lg_smem to) {
        if (item < a.n_item) {
            const int lane = threadIdx.x & 31;
#pragma unroll
            for (int c = 0; c < ring<T>::C; c++, to += R::bytes) {
                const int piece = at * ring<T>::C + c;
                if (piece >= a.n_piece) break;
                if constexpr (F::rows) {
                    const uint32_t size = piece * 32 + (lane & 3) * 8 < a.n_in ? 16 : 0;
                    lg_copy16(to + lane * 16, code[0] + (size ? piece * 64 : 0), size);
                    lg_copy16(to + 512 + lane * 16, code[N_CODE - 1] + (size ? piece * 64 : 0), size);
                } else {
#pragma unroll
                    for (int i = 0; i < R::codes / 512; i++) lg_copy16(to + i * 512 + lane * 16, code[0] + (int64_t)piece * R::codes + i * 512, 16);
#pragma unroll
                    for (int i = 0; i < N_MORE; i++) {
                        const int k = i * 512 + lane * 16, step = k < R::high ? piece * R::high : k < R::high + R::scale ? piece * R::scale : (piece >> 1) * R::super;
                        if (k < R::more) lg_copy16(to + R::codes + k, more[i] + step, 16);
                    }
                }
            }
            if (++at == end) {
                unit += WARPS;
                settle(a, false);
            }
        }
        lg_cp_commit();
    }
};

/* What lg_multiply takes, from a record in the ring. */
template <int T>
static __device__ __forceinline__ void take(lg_hold<T> &o, const uint8_t *r, int lane) {
    typedef lg_fmt<T> F;
    typedef record<T> R;
    const int g = lane >> 2;
#pragma unroll
    for (int i = 0; i < R::codes / 512; i++) o.c[i] = *(const uint4 *)(r + i * 512 + lane * 16);
    if (F::rows) return;
    if (F::five) {
        o.h[0] = *(const uint32_t *)(r + R::codes + lane * 4);
        o.h[1] = *(const uint32_t *)(r + R::codes + 128 + lane * 4);
    }
    if (F::q6) {
        const uint2 a = *(const uint2 *)(r + R::codes + lane * 8), b = *(const uint2 *)(r + R::codes + 256 + lane * 8);
        o.h[0] = a.x;
        o.h[1] = b.x;
        o.h[2] = a.y;
        o.h[3] = b.y;
    }
    const uint8_t *s = r + R::codes + R::high, *d = s + R::scale;
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
/* Beside the result v of the thread's row: half a warp has a tile. Dead rows are zeros. */
static __device__ __forceinline__ void put_f16(const stream_args &a, float v, int row, bool live) {
    float top = live ? fabsf(v) : 0.0f, s = 1.0f;
#pragma unroll
    for (int m = 8; m; m >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, m));
    if (top > 0) s = lg_group_scale(top);
    const __half rounded = __float2half_rn(live ? v * s : 0.0f);
    float sum = __half2float(rounded);
#pragma unroll
    for (int m = 8; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
    if (!live) return;
    a.to.x[row] = __half_as_ushort(rounded);
    if (row & 15) return;
    const float undo = 1.0f / s;
    *(float2 *)(a.to.side + (row >> 4) * 2) = make_float2(undo, sum * undo);
}
/* The sums of k tiles, the first one of item `first`: warps added up and written. By the whole block; red may be written again afterwards. */
template <bool WITH> static __device__ __forceinline__ void put_sums(const stream_args &a, const float *red, int first, int k, float factor, float old) {
    const int j = (int)threadIdx.x >> 4, r = threadIdx.x & 15, item = first + j * (int)gridDim.x;
    const int which = part_of(a, item), row = tile_of(a, item, which) * 16 + r;
    const bool live = j * a.span < k && row < a.p[which].n_out;
    float v = 0.0f, up = 0.0f;
    __syncthreads();
    if (live) {
        const float *from = red + j * a.span * WARPS * 16 + r;
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += from[w * 16];
        v *= factor;
        if (a.span == 2) {
#pragma unroll
            for (int w = 0; w < WARPS; w++) up += from[(WARPS + w) * 16];
            v = v / (1.0f + __expf(-v)) * (up * factor);
        }
        v += old;
        a.p[which].out[row] = v;
    }
    if (WITH && a.to.x) put_f16(a, v, row, live);
    __syncthreads();
}

/* The input from f16: groups of 32 are two of 16, brought to the larger one's scale. `behind` as in lg_prepare_row. */
template <typename B> static __device__ __forceinline__ void take_f16(uint16_t *xs, float *side, const stream_args &a, const lg_form f, B behind) {
    const int tid = threadIdx.x, n_slot = a.n_chunk * 16;
    int first = tid;
#pragma unroll 1
    do {
        uint4 in[7]; /* 14336 numbers are a round */
        float4 by[7]; /* what undoes the scale, sum: of 16, of the next 16 */
#pragma unroll
        for (int i = 0; i < 7; i++) {
            const int slot = first + i * THREADS;
            in[i] = make_uint4(0, 0, 0, 0);
            by[i] = make_float4(1, 0, 1, 0);
            if (slot * 8 < a.n_in) {
                in[i] = __ldcg((const uint4 *)a.from.x + slot);
                by[i] = __ldcg((const float4 *)a.from.side + (slot >> 2));
            }
        }
        if (first == tid) behind();
#pragma unroll
        for (int i = 0; i < 7; i++) {
            const int slot = first + i * THREADS;
            if (slot >= n_slot) break;
            const float undo = fmaxf(by[i].x, by[i].z), again = __uint_as_float(0x7F000000u - __float_as_uint(undo)); /* 1 / undo */
            const float to = (slot & 2 ? by[i].z : by[i].x) * again;
            const __half2 even = __float2half2_rn(to), odd = __float2half2_rn(f.sixteenth ? to * 0.0625f : to);
            __half2 v[4];
            memcpy(v, &in[i], 16);
            v[0] = __hmul2(v[0], even);
            v[1] = __hmul2(v[1], odd);
            v[2] = __hmul2(v[2], even);
            v[3] = __hmul2(v[3], odd);
            memcpy(&in[i], v, 16);
            *(uint4 *)(xs + slot * 8) = in[i];
            if ((slot & 3) == 0)
                *(float4 *)(side + slot) = make_float4(undo, 0.0f, (by[i].y + by[i].w) * (f.zero != 0 ? -f.zero * again : 1.0f) * (1.0f / 16777216.0f), 0.0f);
        }
        first += 7 * THREADS;
    } while (first < n_slot);
}

template <int T>
static __global__ void __launch_bounds__(THREADS, 2) k_stream(const __grid_constant__ stream_args a) {
    typedef lg_fmt<T> F;
    typedef ring<T> R;
    constexpr int C = R::C, SIDE = lg_side_floats(F::q6);
    LG_SMEM(ring_s);                                    /* [WARPS][depth][stage] */
    float *red = (float *)(ring_s + R::bytes);          /* [RED][WARPS][16] */
    float *tmp = red + RED * WARPS * 16;                /* [WARPS] */
    float *side = tmp + WARPS;                          /* [n_side] */
    uint16_t *xs = (uint16_t *)(side + a.n_side);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, pair0 = 0;
    const uint8_t *mine = ring_s + warp * R::depth * R::stage;
    const lg_smem mine_at = lg_smem_of(mine);
    walk<T> ahead;
    ahead.begin(a);
#pragma unroll 1
    for (int i = 0; i < a.before; i++) ahead.fetch(a, mine_at + (lg_smem)(i * R::stage));
    if (a.norm && (blockIdx.x * THREADS + tid) * 32 < (unsigned)a.n_in) lg_prefetch(a.norm + (blockIdx.x * THREADS + tid) * 32);
    lg_pdl_wait();
    lg_pdl_go(); /* only now: who starts then may read what was staged for this step */

    const auto rest = [&] {
#pragma unroll 1
        for (int i = a.before; i < R::depth; i++) ahead.fetch(a, mine_at + (lg_smem)(i * R::stage));
    };
    const float *x = a.x + (a.row ? *a.row : 0) * (int64_t)a.n_in;
    constexpr bool F16 = !F::rows && !F::q6; /* may come so */
    float ss = 0;
    if (F16 && a.from.x) take_f16(xs, side, a, lg_form_of<T>(), rest);
    else ss = a.norm ? lg_prepare_row<THREADS, 2>(xs, side, 1, 0, x, a.norm, a.n_in, a.n_chunk, lg_form_of<T>(), rest)
                     : lg_prepare_row<THREADS, 7>(xs, side, 1, 0, x, NULL, a.n_in, a.n_chunk, lg_form_of<T>(), rest); /* 4096 and 14336 numbers are a round */
    lg_warp_sum(tmp, ss);
    __syncthreads();
    const float factor = (a.norm ? lg_norm_factor<WARPS>(tmp, a.eps, a.n_in) : 1.0f) * (F::rows ? 1.0f : 16777216.0f);
    const uint16_t *x_lane = xs + t * 8; /* (lanes of columns other than the first feed zeros) */
    int unit = warp, stage = 0, k = 0, begun = blockIdx.x;
    float old = old_of(a, begun);
    for (int item = begun; item < a.n_item; item += gridDim.x)
        for (int s = 0; s < a.span; s++) {
            float acc[1][4] = { { 0.0f, 0.0f, 0.0f, 0.0f } };
            for (; unit < a.n_unit; unit += WARPS)
                for (int at = unit * a.run, end = min(at + a.run, a.n_stage); at < end; at++) {
                    lg_copy_wait<R::depth - 1>();
                    if (!F::rows) __syncwarp();
#pragma unroll
                    for (int c = 0; c < C; c++) {
                        const int piece = at * C + c;
                        if (piece < a.n_piece) {
                            lg_hold<T> o;
                            take<T>(o, mine + stage * R::stage + c * record<T>::bytes, lane);
                            lg_multiply<T, 1, true>(acc, o, x_lane + piece * (F::rows ? 32 : LG_CHUNK), side + piece * (F::rows ? 1 : 4) * SIDE, &pair0, SIDE, 0, g == 0);
                        }
                    }
                    if (!F::rows) __syncwarp();
                    ahead.fetch(a, mine_at + (lg_smem)(stage * R::stage));
                    stage = stage + 1 == R::depth ? 0 : stage + 1;
                }
            unit -= a.n_unit;
            if (t == 0) {
                red[(k * WARPS + warp) * 16 + g] = acc[0][0];
                red[(k * WARPS + warp) * 16 + g + 8] = acc[0][2];
            }
            if (++k == RED || (s + 1 == a.span && item + (int)gridDim.x >= a.n_item)) {
                put_sums<!F::rows>(a, red, begun, k, factor, old);
                k = 0;
                begun = item + (int)gridDim.x;
                old = old_of(a, begun);
            }
        }
}

/* ---- host ---- */
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
    /* The input comes late behind what was asked for before it: less where it is long, all where nothing else will be asked for. */
    const bool all = !lg_fmt<T>::rows && (tiles * a->n_unit + WARPS - 1) / WARPS * a->run <= ring<T>::depth;
    a->before = all ? ring<T>::depth : ring<T>::depth * (lg_fmt<T>::rows || a->from.x ? 3 : 2) / 4;
}

template <int T> static bool launch(const lg_cuda_env *e, stream_args *a) {
    static int8_t ready[16]; /* of a device */
    int device = 0;
    a->n_side = T == LG_DTYPE_BF16 ? 0 : a->n_chunk * 4 * lg_side_floats(lg_fmt<T>::q6);
    const int64_t smem = ring<T>::bytes + (int64_t)(RED * WARPS * 16 + WARPS + a->n_side) * 4 + (int64_t)a->n_chunk * LG_CHUNK * 2;
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
    return e->compute != LG_COMPUTE_F32 && w->dtype != LG_DTYPE_F32 && w->n_in % 8 == 0 && lg_cuda_packed(w)->bytes >= LEAST;
}

bool lg_cuda_stream(const lg_cuda_env *e, const lg_cuda_in *in, const lg_cuda_f16 *f16, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add) {
    stream_args a;
    int64_t bytes = 0;
    const lg_cuda_weight *w0 = lg_cuda_packed(w[0]);
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
    a.from = f16_at(f16->from, a.n_in);
    a.to = f16_at(f16->to, w0->n_out);
    a.n_item = lg_parts(a.p, w, y, n, gate_up);
    for (int i = 0; i < n; i++) bytes += lg_cuda_packed(w[i])->bytes;
    if (in->n_tok != 1 || bytes < LEAST || (add && n > 1)) return false;
    switch (w0->dtype) {
#define X(T) case T: return launch<T>(e, &a);
        X(LG_DTYPE_F16) X(LG_DTYPE_BF16) LG_EACH_QUANT(X)
#undef X
    default: return false;
    }
}
