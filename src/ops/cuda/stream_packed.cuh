/* stream_packed.cuh: quantised weights on their way through rings in shared memory (stream.cu, stream_codes.cu). */
#ifndef LG_CUDA_STREAM_PACKED_CUH
#define LG_CUDA_STREAM_PACKED_CUH
#include "ops/cuda/stream.cuh"

/* A record: a chunk; its bytes (super: of two chunks). */
template <int T> struct lg_record {
    typedef lg_fmt<T> F;
    static constexpr int codes = F::code_bytes * 64, high = F::high_bytes * 64, scale = F::scale_bytes * 16, super = F::super_bytes * 16, two = 2 * (codes + high + scale) + super;
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

/* What blocks deal out in turn, in units that a warp takes at once: runs of a tile's records, or of those of several tiles. */
typedef struct lg_deal {
    lg_part p[3];
    int32_t n_part, span, n_item;       /* span 2: gate and up, tile for tile; item: a tile of each */
    int32_t n_chunk;                    /* records of a tile */
    int32_t run;                        /* stages of a unit */
} lg_deal;
static __device__ __forceinline__ lg_spot lg_spot_of(const lg_deal &a, int item) { return lg_spot_of(a.p, a.n_part, a.span == 2, item); }
#endif
