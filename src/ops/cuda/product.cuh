/* product: weights on the device and products with them. product.cu has the kernels, core.cu the scratch. */
#ifndef LG_CUDA_PRODUCT_CUH
#define LG_CUDA_PRODUCT_CUH
#include "ops/cuda/cuda.h"

enum { LG_TILE = 16, LG_CHUNK = 128 }; /* rows and columns of one tile of a repacked weight */

/* f32, f16, bf16: `codes` is the row-major matrix. Quantised: planes in the order in which a warp reads them, rows padded to
 * whole tiles and columns to whole chunks with zero scales. With lane = 4*(row % 8) + t, half = row / 8 % 2:
 *   codes  [tile][chunk][half][lane] 16 bytes: word j holds the lane's 8 codes of the chunk's j-th group of 32
 *          (8 bit: [tile][chunk][half][2][lane] 16 bytes)
 *   high   fifth bits [tile][chunk][half][lane] 4 bytes, or bits 4-5 (Q6_K) 8 bytes
 *   scale  [tile][chunk][row of 16]: 4 f16 d; or 4 (f16 d, f16 m); or 4 (u8 scale, u8 min); or 8 int8
 *   super  [tile][chunk/2][row of 16]: (f16 d, f16 dmin) of Q4_K and Q5_K, f16 d of Q6_K
 * The lane's codes of a group are columns t*8 .. t*8+7 (Q6_K: t*4 .. t*4+3 and 16 + t*4 .. 16 + t*4+3). */
typedef struct lg_cuda_weight {
    lg_dtype dtype;
    int32_t n_out, n_in, n_tile, n_chunk;
    uint8_t *codes, *high, *scale, *super;
    int64_t bytes;
} lg_cuda_weight;
static inline const lg_cuda_weight *lg_cuda_packed(const lg_weight *w) { return (const lg_cuda_weight *)w->packed; }

/* Pinned double staging: host pages go up while the next piece is copied. */
typedef struct lg_cuda_push { uint8_t *pin[2]; cudaEvent_t done[2]; int64_t piece; int turn; cudaStream_t stream; } lg_cuda_push;
lg_status lg_cuda_push_new(lg_cuda_push *p, cudaStream_t stream, lg_error *err);
void lg_cuda_push_free(lg_cuda_push *p);
cudaError_t lg_cuda_push_run(lg_cuda_push *p, void *dst, const void *src, int64_t bytes); /* src may be forgotten on return */

lg_status lg_cuda_fail(lg_error *err, cudaError_t e, const char *what); /* one line; out of memory says what is free */
lg_status lg_cuda_new(void **out, int64_t bytes, const char *what, lg_error *err);
lg_status lg_cuda_weight_bind(lg_cuda_push *p, lg_weight *w, lg_error *err);
void lg_cuda_weight_unbind(lg_weight *w);
uint64_t lg_cuda_bound(void); /* changes with every weight that is bound or unbound, by whatever context */

/* Rows of `of` (NULL: of nothing) in the form of the product that comes next, at x or ready of the scratch: as they are, or times the weights of a norm, with their squares in
 * sums. Bf16: 2 to 16 rows as stream_rows.cu takes them, more one after the other. F16: one row for stream.cu (early, also with at NULL: lg_cuda_chain.lets of what
 * wrote `of`). Others: 2 to 16 rows for stream_codes.cu, by what its weights' format asks of them; slot: where the largest numbers are. */
typedef enum lg_cuda_made { LG_MADE_BF16, LG_MADE_F16, LG_MADE_HALVES, LG_MADE_SIXTEENTH, LG_MADE_SPLIT } lg_cuda_made;
typedef struct lg_cuda_twin { const float *of, *norm; int64_t rows; uint8_t *at; bool early; lg_cuda_made made; int slot; } lg_cuda_twin;

/* Scratch of products; core.cu makes it as large as lg_cuda_work_need says before a list runs. */
typedef struct lg_cuda_work {
    uint8_t *x;      /* the input in the form its product takes */
    float *sums;     /* of decode inputs: factors of the norm [16], scales and sums of groups */
    uint8_t *y0, *y1; /* gate and up */
    uint8_t *ready;  /* rows that an op leaves for the next one (twin); x, where that one's input is here */
    uint8_t *wide;   /* a slice of an expanded weight */
    uint8_t *lora;   /* A x */
    uint8_t *partial; /* of stream_codes.cu: LG_CODES_GROUPS counts, largest numbers of rows in LG_CODES_SLOTS slots, then sums of parts */
    int64_t x_bytes, sums_bytes, y_bytes, ready_bytes, wide_bytes, lora_bytes, partial_bytes;
    lg_cuda_twin twin, left; /* what the op before left, what this one leaves (core.cu hands it on) */
} lg_cuda_work;
enum { LG_LORA_RANK = 256 };

typedef struct lg_cuda_in { /* normed where norm is given; rows taken through `row` (device) where it is given */
    const float *x; const float *norm; float eps; const int32_t *row; int64_t n_tok;
} lg_cuda_in;
/* y [n_tok, n_out]. next: the weight (of several, the first) that takes y in the next op, or NULL; norm: what y goes through there, or NULL */
typedef struct lg_cuda_out { const lg_weight *w; float *y; const lg_lora *lora; const float *norm; const lg_weight *next; } lg_cuda_out;

/* Bytes of each scratch field for products of n_tok rows of one weight; partial_bytes grow by what it takes beside the others of its op. */
void lg_cuda_work_need(const lg_cuda_env *e, lg_cuda_work *need, const lg_weight *w, int64_t n_tok);
/* Where the op that writes `of` [n_tok][w->n_in], which a product of w takes next, leaves it as bf16, too (lg_beside_at), or NULL. k->left says so. */
uint16_t *lg_cuda_leave(const lg_cuda_env *e, lg_cuda_work *k, const lg_weight *w, const float *of, int64_t n_tok);
/* y = W x (add: y += W x) for up to three weights that share an input. */
void lg_cuda_product(const lg_cuda_env *e, lg_cuda_work *k, const lg_cuda_in *in, const lg_cuda_out *out, int n, bool add);
void lg_cuda_gate_up(const lg_cuda_env *e, lg_cuda_work *k, const lg_cuda_in *in, const lg_cuda_out *gate, const lg_cuda_out *up, float *h);
/* x [n_tok, n_in] = rows of w. staged: what the same launch copies, or NULL; ids may then lie in pinned memory. */
typedef struct lg_cuda_staged { uint4 *to; const uint4 *from; int32_t n; } lg_cuda_staged;
void lg_cuda_embed(const lg_cuda_env *e, float *x, const lg_weight *w, const int32_t *ids, int64_t n_tok, const lg_cuda_staged *staged);

/* What products of one row have to do with those before and after. from: the input as f16 that the product before left, or NULL (no norm then). to, or NULL: where
 * y[0] goes as f16 too. For quantised weights (from: but Q6_K); n numbers, a multiple of 32, take lg_cuda_f16_bytes. early: the product before lets this one start
 * with it; lets: this one does so. */
typedef struct lg_cuda_chain { const uint8_t *from; uint8_t *to; bool early, lets; } lg_cuda_chain;
static inline int64_t lg_cuda_f16_bytes(int64_t n) { return (n + 15) / 16 * 36; }
/* stream.cu: the same for one row of input and weights of one format; gate_up: y[0] = silu(W[0] in)*(W[1] in). false, and nothing launched,
 * where the weights are too small or the input too wide for it. A product that adds may let the next kernel start at once (chain->lets): that one must wait (lg_pdl_wait)
 * before it reads what any op wrote, also lengths or pages. */
bool lg_cuda_streams(const lg_cuda_env *e, const lg_weight *w); /* whether it takes this weight alone */
bool lg_cuda_stream(const lg_cuda_env *e, const lg_cuda_in *in, lg_cuda_chain *chain, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add);
/* stream_major.cu: its part for bf16 and f16 weights. */
bool lg_cuda_stream_major(const lg_cuda_env *e, const lg_cuda_in *in, bool early, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add);

/* Inputs of stream_rows.cu: groups of 32 columns one after the other, the rows of a group (8, or 16 where there are more than 8) side by side. */
static __host__ __device__ __forceinline__ constexpr int lg_beside(int n_tok) { return n_tok <= 8 ? 8 : 16; }
static __host__ __device__ __forceinline__ constexpr int64_t lg_beside_at(int beside, int n, int k) { return ((int64_t)(k >> 5) * beside + n) * 32 + (k & 31); }
/* stream_rows.cu: the same for 2 to 16 rows of input and bf16 or f16 weights. x: in their format, lies as lg_beside_at says. The factor of a row's results is 1, or
 * factor [n_tok], or what the squares say: the norm of x, sums over 16 columns each. Where twin is given the result goes there as bf16, like x: as
 * it is, or (one weight, no gate_up) times norm [n_out], with its sums of squares over 16 columns. Squares: [n_tok][n / 16, rounded up]. */
typedef struct lg_cuda_rows {
    const uint16_t *x; int32_t n_tok;
    const float *factor, *squares; float eps;
    uint16_t *twin; const float *twin_norm; float *twin_squares;
} lg_cuda_rows;
bool lg_cuda_streams_rows(const lg_cuda_env *e, const lg_weight *const *w, int n, int64_t n_tok, bool add); /* whether it takes them */
void lg_cuda_stream_rows(const lg_cuda_env *e, const lg_cuda_rows *in, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add);

/* stream_codes.cu: the same for 2 to 16 rows of input and quantised weights of one format. The input, whole chunks of each row, in the form of the weights' format
 * (lg_halves, stream.cuh): x, sums, most [n_tok][n_most] (n_most to LG_CODES_MOST); from, norm and row: what it was made of. squares [n_tok][n_square]: the norm of a
 * row has their sum; n_square 0: no norm. clear: LG_CODES_ROWS * LG_CODES_MOST numbers, made 0. count: LG_CODES_GROUPS zeros (and zeros again when it is done), partial: room for what
 * lg_cuda_codes_partial says, the sum over the weights; where that is 0 they are not read. Where twin.x is given (results of whole chunks) the result goes there as
 * an input (most: zeros before): as it is, or (one weight, no gate_up) times norm [n_out], with its sums of squares over 16 columns, [n_tok][n_out / 16]. */
enum { LG_CODES_GROUPS = 1024, LG_CODES_ROWS = 16, LG_CODES_MOST = 32, LG_CODES_SLOTS = 3, LG_CODES_HEAD = LG_CODES_GROUPS + LG_CODES_SLOTS * LG_CODES_ROWS * LG_CODES_MOST };
typedef struct lg_halves { uint16_t *x; float *sums; uint32_t *most; int32_t beside; bool sixteenth, split; } lg_halves; /* most: [row][LG_CODES_MOST] (k_inputs: [row][block]), bits of numbers without their sign */
typedef struct lg_cuda_codes {
    const uint16_t *x; const float *sums; const uint32_t *most; int32_t n_most, n_tok;
    const float *from, *norm; const int32_t *row;
    const float *squares; int32_t n_square; float eps; uint32_t *clear, *count; float *partial;
    lg_halves twin; const float *twin_norm; float *twin_squares;
} lg_cuda_codes;
int64_t lg_cuda_codes_partial(const lg_cuda_env *e, const lg_weight *w, int64_t n_tok); /* bytes */
bool lg_cuda_streams_codes(const lg_cuda_env *e, const lg_weight *const *w, int n, int64_t n_tok, bool add); /* whether it takes them */
void lg_cuda_stream_codes(const lg_cuda_env *e, const lg_cuda_codes *in, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add);

/* cublas.cu: row-major y[n_tok, n_out] = beta*y + x[n_tok, n_in] w[n_out, n_in]^T through cuBLASLt, opened at run time. */
typedef enum lg_blas_kind { LG_BLAS_BF16_F32, LG_BLAS_BF16_BF16, LG_BLAS_F32 } lg_blas_kind; /* inputs_output */
lg_status lg_cuda_blas_open(lg_error *err);
cudaError_t lg_cuda_blas_product(cudaStream_t s, lg_blas_kind kind, void *y, int64_t ldy, const void *x, const void *w, int64_t n_tok,
                                 int64_t n_out, int64_t n_in, bool add);
const char *lg_cuda_blas_problem(void); /* what failed since lg_cuda_blas_forget, or "" */
void lg_cuda_blas_forget(void);

/* lora.cu: r->packed, or NULL where its shape does not allow bf16 products; y += scale * B (A x) for bf16 rows x, kind: that of y. */
lg_status lg_cuda_lora_bind(cudaStream_t stream, lg_lora *r, int64_t n_in, int64_t n_out, lg_error *err);
void lg_cuda_lora_unbind(lg_lora *r);
void lg_cuda_lora_rows(const lg_cuda_env *e, lg_cuda_work *k, const lg_lora *r, lg_blas_kind kind, void *y, const void *x, const lg_weight *w, int64_t n_tok);

/* Launch attributes: programmatic dependent launch for kernels that begin with lg_pdl_wait. */
static __device__ __forceinline__ void lg_pdl_wait(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
static __device__ __forceinline__ void lg_pdl_go(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
extern bool lg_cuda_pdl; /* off: LONGAN_CUDA_PDL=0, or a device before 9.0 */
template <typename... P, typename... A>
static inline void lg_cuda_launch(void (*f)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t s, bool pdl, A... a) {
#ifdef LG_CUDA_EMU
    (void)s; (void)pdl;
    emu_start(grid, block, smem, [&] { f((P)a...); });
#else
    cudaLaunchConfig_t c = {};
    cudaLaunchAttribute at[2];
    c.gridDim = grid;
    c.blockDim = block;
    c.dynamicSmemBytes = smem;
    c.stream = s;
    /* The same division of L1 in all kernels: a multiprocessor must be empty to change it, and so could not hold blocks of two ops. */
    at[0].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    at[0].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
    at[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    at[1].val.programmaticStreamSerializationAllowed = 1;
    c.attrs = at;
    c.numAttrs = pdl && lg_cuda_pdl ? 2 : 1;
    cudaLaunchKernelEx(&c, f, (P)a...); /* a failure stays as the last error */
#endif
}
#endif
