/* Low-rank additions to products of many rows: two bf16 products through cuBLASLt, on bf16 copies of the factors made when they are bound (the
 * scale goes into B). Few rows, compute f32 and ranks that are no multiple of 8: the f32 kernels of product.cu. */
#include "ops/cuda/product.cuh"
#include <cuda_bf16.h>

static __global__ void k_half(__nv_bfloat16 *to, const float *from, float scale, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) to[i] = __float2bfloat16_rn(scale * from[i]);
}

lg_status lg_cuda_lora_bind(cudaStream_t stream, lg_lora *r, int64_t n_in, int64_t n_out, lg_error *err) {
    lg_status st = LG_OK;
    const int64_t a = r->rank * n_in, b = r->rank * n_out;
    cudaError_t e;
    r->packed = NULL;
    if (r->rank % 8 || n_in % 8 || n_out % 8) return LG_OK; /* rows of 16-byte pieces */
    LG_TRY(lg_cuda_new(&r->packed, 2 * (a + b), "a low-rank addition", err));
    k_half<<<264, 256, 0, stream>>>((__nv_bfloat16 *)r->packed, r->a, 1.0f, a);
    k_half<<<264, 256, 0, stream>>>((__nv_bfloat16 *)r->packed + a, r->b, r->scale, b);
    e = cudaGetLastError();
    if (e == cudaSuccess) e = cudaStreamSynchronize(stream);
    if (e != cudaSuccess) LG_TRY(lg_cuda_fail(err, e, "a low-rank addition"));
done:
    return st;
}

void lg_cuda_lora_unbind(lg_lora *r) {
    if (r->packed) cudaFree(r->packed);
    r->packed = NULL;
}

void lg_cuda_lora_rows(const lg_cuda_env *e, lg_cuda_work *k, const lg_lora *r, lg_blas_kind kind, void *y, const void *x, const lg_weight *w, int64_t n_tok) {
    const __nv_bfloat16 *a = (const __nv_bfloat16 *)r->packed, *b = a + r->rank * w->n_in;
    lg_cuda_blas_product(e->stream, LG_BLAS_BF16_BF16, k->lora, r->rank, x, a, n_tok, r->rank, w->n_in, false);
    lg_cuda_blas_product(e->stream, kind, y, w->n_out, k->lora, b, n_tok, w->n_out, r->rank, true);
}
