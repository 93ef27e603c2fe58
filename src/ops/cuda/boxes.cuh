/* Tensor maps (sm_90) over the 16-bit rows of a cache layer: a box is `rows` rows and 64 columns of them, written to shared memory with the 128-byte swizzle:
 * the 16-byte piece c of the 128 bytes at address p lies at c ^ (p >> 7 & 7). */
#ifndef LG_CUDA_BOXES_CUH
#define LG_CUDA_BOXES_CUH
#include <cuda.h>
#include "ops/cuda/cuda.h"

typedef CUresult (*lg_box_encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                  CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static inline lg_box_encode lg_box_encoder(void) { /* from the driver: the program does not link it */
    static lg_box_encode f;
    static bool asked;
    if (!asked) {
        void *p = NULL;
        cudaDriverEntryPointQueryResult r;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &r) == cudaSuccess && r == cudaDriverEntryPointSuccess)
            f = (lg_box_encode)p;
        asked = true;
    }
    return f;
}
/* A cache layer as a matrix of head_dim columns and as many rows as coordinates can name; nothing outside its pages is ever read. */
static inline bool lg_box_layer(CUtensorMap *map, const uint8_t *data, int head_dim, int rows) {
    const cuuint64_t dims[2] = { (cuuint64_t)head_dim, 0x7fffffff }, strides[1] = { (cuuint64_t)head_dim * 2 };
    const cuuint32_t box[2] = { 64, (cuuint32_t)rows }, steps[2] = { 1, 1 };
    const lg_box_encode f = lg_box_encoder();
    return f && f(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, (void *)data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
#endif
