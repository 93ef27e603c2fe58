/* A product of 2 to 16 rows of input with large bf16 or f16 weights: the weights stream through a ring in shared memory, in long runs.
 *
 * One block of 8 warps a multiprocessor takes items of M tiles of 16 weight rows in turn (2: gate and up). A stage of its ring holds 1 KB of every row of
 * an item, as memory gives them best (docs/speed-cuda.md, 69 and 71): each warp asks for two rows' and multiplies an eighth of the columns of all, so
 * the block meets once a stage, when it is there and the one before it is no longer read. The ring is always full of what comes next, across items,
 * and is filled with weights before the kernel waits for the one before it. The inputs (in the weights' format, made by k_prepare, k_halves or the product before) come
 * through the ring beside the weights that they meet, in the order of the tensor cores' fragments. */
#include "ops/cuda/stream.cuh"
#include <string.h>

#ifndef STREAM_LEAST
#define STREAM_LEAST (4 << 20)
#endif
enum { WARPS = 8, THREADS = WARPS * 32, MOST_ROWS = 16, LEAST = STREAM_LEAST,
#ifdef LG_CUDA_ARCH_90a
       C = 2, ROOM = 168 << 10, ROOM_FEW = 128 << 10, /* of a ring; FEW: up to 8 inputs. Beside it a block of selection fits */
#else
       C = 1, ROOM = 96 << 10, ROOM_FEW = ROOM,
#endif
       COLUMNS = WARPS * C * 32, PITCH_W = COLUMNS * 2 + 64 }; /* of a stage: columns, and bytes from a row to the next, so that eight lanes read other banks */

/* NT: inputs / 8; M: tiles of an item. */
template <int NT, int M> struct ring {
    static constexpr int weights = M * 16 * PITCH_W, stage = weights + WARPS * C * NT * 512, depth = (NT == 1 ? ROOM_FEW : ROOM) / stage, bytes = depth * stage;
    static constexpr int pitch = NT * 8 + 2, red = WARPS * M * 16 * pitch * 4; /* sums of warps: [WARPS][M][16][pitch] floats */
    static constexpr int shared = bytes + red + NT * 32;
    static_assert(depth > 1 && 16 * NT * 8 <= THREADS, "a ring, and a thread for each result of an item");
};

typedef struct rows_args {
    lg_part p[3];
    int32_t n_part, n_item, n_in, n_stage, n_tok; /* n_stage: of an item */
    bool add;
    const uint16_t *x;
    const float *factor, *squares;
    float eps;
    uint16_t *twin;
    const float *twin_norm;
    float *twin_squares;
} rows_args;

template <int M> static __device__ __forceinline__ lg_spot spot_of(const rows_args &a, int item) { return lg_spot_of(a.p, a.n_part, M == 2, item); }

/* The stages a block asks for, and the thread's part of them: where it stands, and the lane's addresses in the warp's two rows of each tile of that item. */
template <int NT, int M> struct walk {
    typedef ring<NT, M> R;
    int item, at; /* at: stage of the item */
    const uint8_t *row[M][2];

    __device__ __forceinline__ void aim(const rows_args &a) {
        if (item >= a.n_item) return;
        const int lane = threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
        const lg_spot s = spot_of<M>(a, item);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const lg_part &w = a.p[s.part + m];
                row[m][h] = w.codes + ((int64_t)min(s.tile * 16 + warp * 2 + h, w.n_out - 1) * a.n_in + lane * 8) * 2;
            }
    }
    __device__ __forceinline__ void begin(const rows_args &a) {
        item = blockIdx.x;
        at = 0;
        aim(a);
    }
    __device__ __forceinline__ bool more(const rows_args &a) const { return item < a.n_item; }
    __device__ __forceinline__ void on(const rows_args &a) {
        if (++at < a.n_stage) return;
        at = 0;
        item += (int)gridDim.x;
        aim(a);
    }
    __device__ __forceinline__ void fetch_weights(const rows_args &a, lg_smem to) const {
        const int lane = threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int c = 0; c < C; c++) {
                    const int column = at * COLUMNS + c * 256;
                    const uint32_t size = column + lane * 8 < a.n_in ? 16 : 0;
                    lg_copy16(to + (m * 16 + warp * 2 + h) * PITCH_W + c * 512 + lane * 16, row[m][h] + (size ? column * 2 : 0), size);
                }
    }
    /* As the fragments that the warp's columns meet; rows that do not exist are zeros. */
    static __device__ __forceinline__ void fetch_x(const rows_args &a, int at, lg_smem to) {
        const int lane = threadIdx.x & 31, g = lane >> 2, first = ((int)threadIdx.x >> 5) * C;
#pragma unroll
        for (int c = first; c < first + C; c++) {
            const int k = at * COLUMNS + c * 32 + (lane & 3) * 8;
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                const bool live = nt * 8 + g < a.n_tok && k < a.n_in;
                lg_copy16_shared(to + R::weights + (c * NT + nt) * 512 + lane * 16, a.x + (live ? lg_beside_at(NT * 8, nt * 8 + g, k) : 0), live ? 16 : 0);
            }
        }
    }
};

template <int NT, int M, bool BF16>
static __global__ void __launch_bounds__(THREADS, 2) k_stream_rows(const __grid_constant__ rows_args a) {
    typedef ring<NT, M> R;
    constexpr int COLS = NT * 8, PITCH = R::pitch;
    LG_SMEM(ring_s);                             /* [depth][stage] */
    float *red = (float *)(ring_s + R::bytes);
    float *factor_s = red + R::red / 4;          /* [COLS] */
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const lg_smem ring_at = lg_smem_of(ring_s);
    walk<NT, M> ahead;
    ahead.begin(a);
#pragma unroll 1
    for (int i = 0; i < R::depth && ahead.more(a); i++, ahead.on(a)) ahead.fetch_weights(a, ring_at + (lg_smem)(i * R::stage));
    lg_pdl_wait();
    lg_pdl_go(); /* only now: who starts then may read what was staged for this step */
#pragma unroll 1
    for (int i = 0, at = 0; i < R::depth; i++) { /* (of items that do not exist: nobody minds) */
        walk<NT, M>::fetch_x(a, at, ring_at + (lg_smem)(i * R::stage));
        lg_cp_commit(); /* a group a stage */
        at = at + 1 < a.n_stage ? at + 1 : 0;
    }

    if (a.squares) {
        const int n_sum = (a.n_in + 15) >> 4;
        for (int i = warp; i < a.n_tok; i += WARPS) {
            float s = 0.0f;
#pragma unroll 4
            for (int k = lane; k < n_sum; k += 32) s += __ldcg(a.squares + (int64_t)i * n_sum + k);
#pragma unroll
            for (int m = 16; m; m >>= 1) s += __shfl_xor_sync(0xffffffffu, s, m);
            if (lane == 0) factor_s[i] = rsqrtf(s / (float)a.n_in + a.eps);
        }
    } else if (tid < a.n_tok) factor_s[tid] = a.factor ? __ldcg(a.factor + tid) : 1.0f; /* (read behind the barrier of an item) */
    const int r = tid & 15, n = tid >> 4; /* this thread's result of an item: row r, input n */
    const int own = g * PITCH_W + warp * C * 64 + t * 16, own_x = R::weights + warp * C * NT * 512 + lane * 16; /* bytes of a stage */
    int stage = 0, last = -1; /* last: the stage before it, or -1 */
#pragma unroll 1
    for (int item = blockIdx.x; item < a.n_item; item += gridDim.x) {
        const lg_spot s = spot_of<M>(a, item);
        const int row = s.tile * 16 + r, n_out = a.p[s.part].n_out;
        const bool live = n < a.n_tok && row < n_out;
        float *out = a.p[s.part].out + (int64_t)n * n_out + row;
        const float old = a.add && live ? __ldcg(out) : 0.0f; /* asked for before the weights are multiplied */
        const float by = a.twin_norm && live ? a.twin_norm[row] : 1.0f;
        float acc[M][NT][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int nt = 0; nt < NT; nt++) acc[m][nt][0] = acc[m][nt][1] = acc[m][nt][2] = acc[m][nt][3] = 0.0f;
#pragma unroll 1
        for (int at = 0; at < a.n_stage; at++) {
            lg_copy_wait<R::depth - 2>();
            __syncthreads(); /* all of this stage is there, and nobody reads the one before it */
            if (last >= 0) {
                if (ahead.more(a)) {
                    ahead.fetch_weights(a, ring_at + (lg_smem)(last * R::stage));
                    walk<NT, M>::fetch_x(a, ahead.at, ring_at + (lg_smem)(last * R::stage));
                    ahead.on(a);
                }
                lg_cp_commit();
            }
            const uint8_t *from = ring_s + stage * R::stage;
#pragma unroll
            for (int c = 0; c < C; c++)
#pragma unroll
                for (int m = 0; m < M; m++) {
                    const uint4 w0 = *(const uint4 *)(from + own + m * 16 * PITCH_W + c * 64), w1 = *(const uint4 *)(from + own + (m * 16 + 8) * PITCH_W + c * 64);
#pragma unroll
                    for (int nt = 0; nt < NT; nt++) mma_rows<BF16>(acc[m][nt], w0, w1, *(const uint4 *)(from + own_x + (c * NT + nt) * 512));
                }
            last = stage;
            stage = stage + 1 == R::depth ? 0 : stage + 1;
        }
        float *to = red + warp * M * 16 * PITCH;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                *(float2 *)(to + (m * 16 + g) * PITCH + nt * 8 + 2 * t) = make_float2(acc[m][nt][0], acc[m][nt][1]);
                *(float2 *)(to + (m * 16 + g + 8) * PITCH + nt * 8 + 2 * t) = make_float2(acc[m][nt][2], acc[m][nt][3]);
            }
        __syncthreads();
        float v[M];
#pragma unroll
        for (int m = 0; m < M; m++) {
            v[m] = 0.0f;
            if (live) {
#pragma unroll
                for (int k = 0; k < WARPS; k++) v[m] += red[((k * M + m) * 16 + r) * PITCH + n];
                v[m] *= factor_s[n];
            }
        }
        if (M == 2) v[0] = v[0] / (1.0f + __expf(-v[0])) * v[M - 1];
        v[0] += old;
        if (live) *out = v[0];
        if (a.twin && live) {
            const __nv_bfloat16 h = __float2bfloat16_rn(v[0] * by);
            a.twin[lg_beside_at(COLS, n, row)] = *(const uint16_t *)&h;
        }
        if (a.twin_norm) {
            float sum = v[0] * v[0];
#pragma unroll
            for (int m = 8; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
            if (r == 0 && live) a.twin_squares[(int64_t)n * a.n_item + item] = sum;
        }
    } /* (red is written again behind the next item's first stage) */
    lg_copy_wait<0>(); /* inputs of stages that there were none of */
}

/* ---- host ---- */
template <int NT, int M, bool BF16> static void launch_of(const lg_cuda_env *e, rows_args *a) {
    typedef ring<NT, M> R;
    a->n_stage = (a->n_in + COLUMNS - 1) / COLUMNS;
    cudaFuncSetAttribute((const void *)k_stream_rows<NT, M, BF16>, cudaFuncAttributeMaxDynamicSharedMemorySize, R::shared);
    lg_cuda_launch(k_stream_rows<NT, M, BF16>, dim3((unsigned)(a->n_item < e->n_sm ? a->n_item : e->n_sm)), dim3(THREADS), (size_t)R::shared, e->stream, true, *a);
}
template <bool BF16> static void launch(const lg_cuda_env *e, rows_args *a, bool gate_up) {
    if (a->n_tok <= 8) gate_up ? launch_of<1, 2, BF16>(e, a) : launch_of<1, 1, BF16>(e, a);
    else gate_up ? launch_of<2, 2, BF16>(e, a) : launch_of<2, 1, BF16>(e, a);
}

static int larger(int a, int b) { return a > b ? a : b; }

bool lg_cuda_streams_rows(const lg_cuda_env *e, const lg_weight *const *w, int n, int64_t n_tok, bool add) {
    const int shared = n_tok <= 8 ? larger(ring<1, 1>::shared, ring<1, 2>::shared) : larger(ring<2, 1>::shared, ring<2, 2>::shared);
    const int64_t bytes = lg_bytes_alike(w, n);
    return (w[0]->dtype == LG_DTYPE_BF16 || w[0]->dtype == LG_DTYPE_F16) && e->compute != LG_COMPUTE_F32 && n_tok > 1 && n_tok <= MOST_ROWS && bytes >= LEAST &&
           !(add && n > 1) && shared <= e->smem_max;
}

void lg_cuda_stream_rows(const lg_cuda_env *e, const lg_cuda_rows *in, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add) {
    rows_args a;
    memset(&a, 0, sizeof a);
    a.n_in = lg_cuda_packed(w[0])->n_in;
    a.n_part = n;
    a.n_tok = in->n_tok;
    a.add = add;
    a.x = in->x;
    a.factor = in->factor;
    a.squares = in->squares;
    a.eps = in->eps;
    a.twin = in->twin;
    a.twin_norm = in->twin ? in->twin_norm : NULL;
    a.twin_squares = in->twin_squares;
    a.n_item = lg_parts(a.p, w, y, n, gate_up, LG_TILE);
    w[0]->dtype == LG_DTYPE_BF16 ? launch<true>(e, &a, gate_up) : launch<false>(e, &a, gate_up);
}
