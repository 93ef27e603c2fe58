/* cpu/gemm: products of f32 activations with weights of every dtype, for 1 to thousands of rows.
 * Every function that takes (ith, nth) is called by all threads of one parallel region at the same time and
 * does its share; the caller puts a barrier between lg_gemm_input and lg_gemm_run. None allocates or locks. */
#ifndef LG_GEMM_H
#define LG_GEMM_H
#include "ops/ops.h"

/* Best instruction set of this machine (AMX permission asked from the kernel once), capped by the
 * environment variable LG_CPU_ISA = scalar | avx2 | avx512 | avx512_bf16 | amx. Cached after the first call. */
typedef enum lg_isa { LG_ISA_SCALAR, LG_ISA_AVX2, LG_ISA_AVX512, LG_ISA_BF16, LG_ISA_AMX } lg_isa; /* BF16: AVX512 and AVX512_BF16 */
lg_isa lg_cpu_isa(void);
const char *lg_isa_name(lg_isa isa);
void lg_cpu_isa_thread(lg_isa isa); /* once per thread before kernels run (AMX tile state); cheap to repeat */

/* What all calls share. compute F32: exact f32 arithmetic on dequantised weights (sums in f32, no rounding of
 * activations); AUTO: int8 activations for quantised weights, bf16 where AMX or AVX512_BF16 pays. */
typedef struct lg_gemm { lg_compute compute; lg_isa isa; } lg_gemm;

/* Repacks w->data into w->packed (lg_base_alloc), any readable dtype, any n_out, any n_in that is whole blocks. */
lg_status lg_gemm_pack(const lg_gemm *g, lg_weight *w, lg_error *err);
void lg_gemm_unpack(lg_weight *w); /* frees packed, sets it NULL */

/* Input form: rows of x (optionally RMS-normed: x * rsqrt(mean(x^2) + eps) * norm) in the shape kernels read.
 * Its layout depends on (g, n_tok, n_in) only, so that weights of mixed dtypes share one input. */
int64_t lg_gemm_input_bytes(const lg_gemm *g, int64_t n_tok, int64_t n_in);
/* Byte offset of row t0 (a multiple of 16): a product of the rows from there on, 17 at least, may start there. */
int64_t lg_gemm_input_at(const lg_gemm *g, int64_t n_tok, int64_t n_in, int64_t t0);
void lg_gemm_input(const lg_gemm *g, void *in, const float *x, int64_t ldx, const float *norm, float eps,
                   int64_t n_tok, int64_t n_in, int ith, int nth);

/* Rows of w are split between threads the same way for equal n_out: thread ith owns outputs [*first, *last). */
void lg_gemm_rows(int64_t n_out, int ith, int nth, int64_t *first, int64_t *last);

/* y[t*ldy + o] = (add ? y : 0) + sum_i x[t,i] w[o,i] for the outputs this thread owns.
 * scratch: this thread's own lg_gemm_scratch_bytes(g, max n_tok, max n_in), 64-byte aligned. */
int64_t lg_gemm_scratch_bytes(const lg_gemm *g, int64_t n_tok, int64_t n_in);
void lg_gemm_run(const lg_gemm *g, float *y, int64_t ldy, bool add, const void *in, const lg_weight *w,
                 int64_t n_tok, void *scratch, int ith, int nth);
/* The same for outputs [16 p0, 16 p1) (cut at n_out), whoever owns them. */
void lg_gemm_run_panels(const lg_gemm *g, float *y, int64_t ldy, bool add, const void *in, const lg_weight *w,
                        int64_t n_tok, void *scratch, int64_t p0, int64_t p1);

void lg_gemm_silu_mul(const lg_gemm *g, float *h, const float *gate, const float *up, int64_t n); /* h = silu(gate) * up; h may be gate */
void lg_gemm_embed_row(float *dst, const lg_weight *w, int64_t id); /* dequantised row of a bound weight (from w->packed or w->data) */
#endif
