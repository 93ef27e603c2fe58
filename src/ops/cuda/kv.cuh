/* Cache rows on the device: the meaning of every cache dtype, the same bytes as lg_ops_kv_store and lg_ops_kv_load. */
#ifndef LG_CUDA_KV_CUH
#define LG_CUDA_KV_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "ops/cuda/cuda.h"

/* Byte offset of (page, head, slot) in a layer's K or V. */
static __device__ __forceinline__ int64_t lg_kv_at(const lg_kv_geom &g, int64_t page, int64_t head, int64_t slot) {
    return ((page * g.n_head_kv + head) * LG_PAGE + slot) * g.row_bytes;
}

/* Element i of a row. KV8: head_dim int8, then ceil(head_dim/32) f16 scales. */
template <int DTYPE>
static __device__ __forceinline__ float lg_kv_get(const uint8_t *row, int i, int head_dim) {
    if (DTYPE == LG_DTYPE_F32) return ((const float *)row)[i];
    if (DTYPE == LG_DTYPE_F16) return __half2float(((const __half *)row)[i]);
    if (DTYPE == LG_DTYPE_BF16) return __bfloat162float(((const __nv_bfloat16 *)row)[i]);
    return (float)((const int8_t *)row)[i] * __half2float(((const __half *)(row + head_dim))[i >> 5]);
}

/* A row into the cache by a warp, rounded as lg_ops_kv_store does. v[i]: element lane + 32*i. */
template <int E> static __device__ __forceinline__ void lg_kv_put_row(uint8_t *to, const lg_kv_geom &g, const float *v, int lane) {
    const int d = g.head_dim;
#pragma unroll
    for (int i = 0; i < E; i++) {
        const int at = i * 32 + lane;
        if (g.dtype == LG_DTYPE_KV8) { /* a group of 32 is one i; lanes past the row hold 0 */
            float top = at < d ? fabsf(v[i]) : 0.0f;
#pragma unroll
            for (int m = 16; m; m >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, m));
            const float s = __fdiv_rn(top, 127.0f), is = s != 0.0f ? __fdiv_rn(1.0f, s) : 0.0f;
            if (at < d) ((int8_t *)to)[at] = (int8_t)max(-127, min(127, __float2int_rn(__fmul_rn(v[i], is))));
            if (lane == 0 && at < d) ((__half *)(to + d))[i] = __float2half_rn(s);
        } else if (at < d) {
            if (g.dtype == LG_DTYPE_F32) ((float *)to)[at] = v[i];
            else if (g.dtype == LG_DTYPE_F16) ((__half *)to)[at] = __float2half_rn(v[i]);
            else ((__nv_bfloat16 *)to)[at] = __float2bfloat16_rn(v[i]);
        }
    }
}
#endif
