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
#endif
