/* stream_packed.cuh: quantised weights on their way through rings in shared memory (stream.cu, stream_codes.cu).
 *
 * Tiles of 16 weight rows are dealt out to blocks in turn; of each tile every warp takes its units (runs of records) and goes on to the next tile without
 * waiting for the others. A warp's ring is always full of what it will take next, across tiles. */
#ifndef LG_CUDA_STREAM_PACKED_CUH
#define LG_CUDA_STREAM_PACKED_CUH
#include "ops/cuda/stream.cuh"

/* A record: a chunk; its bytes (super: of two chunks). */
template <int T> struct lg_record {
    typedef lg_fmt<T> F;
    static constexpr int codes = F::code_bytes * 64, high = F::high_bytes * 64, scale = F::scale_bytes * 16, super = F::super_bytes * 16, two = 2 * (codes + high + scale) + super;
};
/* A stage of a ring holds C records side by side in one tile (an even number where there are supers): their codes, then the high bits, the scales, the supers. */
template <int T, int C> struct lg_stage {
    typedef lg_record<T> R;
    static_assert(C % 2 == 0 || !R::super, "supers are of two records");
    static constexpr int high = C * R::codes, scale = high + C * R::high, super = scale + C * R::scale, bytes = super + C / 2 * R::super; /* where they stand */
};

/* A lane's codes of a record, from its first 16 bytes and its first high bits in shared memory. */
template <int T> static __device__ __forceinline__ void lg_hold_codes(lg_hold<T> &o, const uint8_t *code, const uint8_t *high) {
    typedef lg_fmt<T> F;
#pragma unroll
    for (int i = 0; i < lg_record<T>::codes / 512; i++) o.c[i] = *(const uint4 *)(code + i * 512);
    if (F::five) {
        o.h[0] = *(const uint32_t *)high;
        o.h[1] = *(const uint32_t *)(high + 128);
    }
    if (F::q6) {
        const uint2 lo = *(const uint2 *)high, hi = *(const uint2 *)(high + 256);
        o.h[0] = lo.x;
        o.h[1] = hi.x;
        o.h[2] = lo.y;
        o.h[3] = hi.y;
    }
}

/* What blocks deal out. A unit is a run of stages that a warp takes at once. */
typedef struct lg_deal {
    lg_part p[3];
    int32_t n_part, span, n_item;       /* span 2: gate and up, tile for tile; item: a tile of each */
    int32_t n_chunk;                    /* records of a tile */
    int32_t n_stage, run, n_unit;       /* of a tile: stages, stages of a unit, units */
} lg_deal;
static __device__ __forceinline__ lg_spot lg_spot_of(const lg_deal &a, int item) { return lg_spot_of(a.p, a.n_part, a.span == 2, item); }

/* What a block takes of all items: from `first_item` on every `step`th; of their records those from `first` on, `chunks` of them, in so many stages
 * and units; warps: that take them. */
struct lg_take_all {
    static constexpr int first = 0, warps = 8;
    const lg_deal &a;
    __device__ __forceinline__ int first_item() const { return blockIdx.x; }
    __device__ __forceinline__ int step() const { return gridDim.x; }
    __device__ __forceinline__ int chunks() const { return a.n_chunk; }
    __device__ __forceinline__ int stages() const { return a.n_stage; }
    __device__ __forceinline__ int units() const { return a.n_unit; }
};

/* `bytes` (at most MOST, a multiple of 16) that lie together, from the weights into a stage. By the whole warp; to, from: the lane's 16. */
template <int MOST> static __device__ __forceinline__ void lg_copy_run(lg_smem to, const uint8_t *from, int bytes) {
    const int left = bytes - ((int)threadIdx.x & 31) * 16;
#pragma unroll
    for (int at = 0; at < MOST; at += 512)
        if (at < left) lg_copy16(to + (lg_smem)at, from + at, 16);
}

/* The weights a warp asks for: where it stands in the block's list, and the lane's addresses in that tile. TAKE: what the block takes. */
template <int T, int C, typename TAKE> struct lg_walk {
    typedef lg_record<T> R;
    typedef lg_stage<T, C> S;
    int item, s, unit;                  /* s: of the item's tiles */
    int at, end;                        /* stages of the unit */
    const uint8_t *code, *high, *scale, *super;

    __device__ __forceinline__ void aim(const lg_deal &a, const TAKE &k) {
        const lg_spot at_tile = lg_spot_of(a, item);
        const int lane = threadIdx.x & 31, tile = at_tile.tile;
        const lg_part &w = a.p[a.span == 2 ? s : at_tile.part];
        const int64_t rec = (int64_t)tile * a.n_chunk + k.first;
        code = w.codes + rec * R::codes + lane * 16;
        high = w.high + rec * R::high + lane * 16;
        scale = w.scale + rec * R::scale + lane * 16;
        super = w.super + ((int64_t)tile * ((a.n_chunk + 1) >> 1) + (k.first >> 1)) * R::super + lane * 16;
    }
    __device__ __forceinline__ void begin(const lg_deal &a, const TAKE &k) {
        item = k.first_item();
        s = 0;
        unit = (int)threadIdx.x >> 5;
        settle(a, k, true);
    }
    /* To a unit that exists, or past the last item. */
    __device__ __forceinline__ void settle(const lg_deal &a, const TAKE &k, bool moved) {
        while (unit >= k.units() && item < a.n_item) {
            moved = true;
            unit -= k.units();
            if (++s == a.span) {
                s = 0;
                item += k.step();
            }
        }
        if (item >= a.n_item) return;
        if (moved) aim(a, k);
        at = unit * a.run;
        end = min(at + a.run, k.stages());
    }
    /* Its next records into the stage at `to`, then on. */
    __device__ __forceinline__ void fetch(const lg_deal &a, const TAKE &k, lg_smem to) {
        if (item < a.n_item) {
            const int first = at * C, n = min(C, k.chunks() - first);
            to += (lg_smem)((threadIdx.x & 31) * 16);
            lg_copy_run<C * R::codes>(to, code + (int64_t)first * R::codes, n * R::codes);
            if (R::high) lg_copy_run<C * R::high>(to + S::high, high + (int64_t)first * R::high, n * R::high);
            lg_copy_run<C * R::scale>(to + S::scale, scale + (int64_t)first * R::scale, n * R::scale);
            if (R::super) lg_copy_run<C / 2 * R::super>(to + S::super, super + (int64_t)(first >> 1) * R::super, ((n + 1) >> 1) * R::super);
            if (++at == end) {
                unit += TAKE::warps;
                settle(a, k, false);
            }
        }
        lg_cp_commit();
    }
};

/* Into how long runs a tile of n_stage stages is cut, of `tiles` that a block of n_warp warps takes: each warp's as long as they may be with all warps at work (to go
 * on to another tile costs about as much as a record). */
static inline int lg_run_of(int n_stage, int tiles, int n_warp) {
    int best = INT32_MAX, taken = 1;
    for (int parts = 1; parts <= n_warp && parts <= n_stage; parts++) {
        const int run = (n_stage + parts - 1) / parts, units = (n_stage + run - 1) / run, cost = (tiles * units + n_warp - 1) / n_warp * (run + 1);
        if (cost >= best) continue;
        best = cost;
        taken = run;
    }
    return taken;
}
#endif
