/* A product of 2 to 16 rows of input with large bf16 weights: the weights stream through rings in shared memory, as in stream.cu.
 *
 * One block of 8 warps a multiprocessor takes items of M tiles of 16 weight rows in turn (2: gate and up); its warps split the columns, and each
 * has a ring of its own that is always full of what it takes next, across items, and is filled with weights before the kernel waits for the one
 * before it. The inputs (bf16, made by k_prepare or by the product before) come through the ring beside the weights that they meet, in the order
 * of the tensor cores' fragments. A lane reads nothing but what it copied itself: no barrier but those around the sums of an item. */
#include "ops/cuda/stream.cuh"
#include <string.h>

#ifndef STREAM_LEAST
#define STREAM_LEAST (4 << 20)
#endif
enum { WARPS = 8, THREADS = WARPS * 32, MOST_ROWS = 16, LEAST = STREAM_LEAST, RECORD = 1024 }; /* (16 rows, 32 columns) */

/* NT: inputs / 8; M: tiles of an item. A stage holds two records side by side of each tile: 128 bytes of a row, as memory gives them best. */
template <int NT, int M> struct ring {
#ifdef LG_CUDA_ARCH_90a
    static constexpr int room = 168 << 10; /* beside it a block of selection fits */
#else
    static constexpr int room = 96 << 10;
#endif
    static constexpr int C = 2, x_bytes = C * NT * 512, weights = M * C * RECORD, stage = weights + x_bytes, depth = room / WARPS / stage, bytes = WARPS * depth * stage;
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

/* Of weights that share an input: whose tile an item is, and which. (Gate and up: this tile of both.) */
typedef struct spot { int part, tile; } spot;
template <int M> static __device__ __forceinline__ spot spot_of(const rows_args &a, int item) {
    int which = 0;
    while (M == 1 && which + 1 < a.n_part && item >= a.p[which].tile_end) which++;
    return spot{ which, item - (which ? a.p[which - 1].tile_end : 0) };
}

/* The stages a warp asks for: where it stands, and the lane's addresses in the tiles of that item, rows g and g + 8 of each. */
template <int NT, int M> struct walk {
    typedef ring<NT, M> R;
    int item, at; /* at: stage of the item */
    const uint8_t *row[M][2];

    __device__ __forceinline__ void begin(const rows_args &a) {
        at = (int)threadIdx.x >> 5;
        item = at < a.n_stage ? (int)blockIdx.x : a.n_item;
        aim(a);
    }
    __device__ __forceinline__ void aim(const rows_args &a) {
        if (item >= a.n_item) return;
        const int lane = threadIdx.x & 31;
        const spot s = spot_of<M>(a, item);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const lg_part &w = a.p[s.part + m];
                row[m][h] = w.codes + ((int64_t)min(s.tile * 16 + h * 8 + (lane >> 2), w.n_out - 1) * a.n_in + (lane & 3) * 8) * 2;
            }
    }
    __device__ __forceinline__ bool more(const rows_args &a) const { return item < a.n_item; }
    __device__ __forceinline__ void on(const rows_args &a) {
        if ((at += WARPS) < a.n_stage) return;
        at = (int)threadIdx.x >> 5;
        item += (int)gridDim.x;
        aim(a);
    }
    __device__ __forceinline__ void fetch_weights(const rows_args &a, lg_smem to) const {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int c = 0; c < R::C; c++) {
            const int piece = at * R::C + c;
            const uint32_t size = piece * 32 + (lane & 3) * 8 < a.n_in ? 16 : 0;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) lg_copy16(to + (c * M + m) * RECORD + h * 512 + lane * 16, row[m][h] + (size ? piece * 64 : 0), size);
        }
    }
    /* As the fragments that the weights meet; rows that do not exist are zeros. */
    static __device__ __forceinline__ void fetch_x(const rows_args &a, int at, lg_smem to) {
        const int lane = threadIdx.x & 31, g = lane >> 2;
#pragma unroll
        for (int c = 0; c < R::C; c++) {
            const int k = (at * R::C + c) * 32 + (lane & 3) * 8;
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                const bool live = nt * 8 + g < a.n_tok && k < a.n_in;
                lg_copy16_shared(to + R::weights + (c * NT + nt) * 512 + lane * 16, a.x + (live ? lg_beside_at(NT * 8, nt * 8 + g, k) : 0), live ? 16 : 0);
            }
        }
    }
};

template <int NT, int M>
static __global__ void __launch_bounds__(THREADS, 2) k_stream_rows(const __grid_constant__ rows_args a) {
    typedef ring<NT, M> R;
    constexpr int COLS = NT * 8, PITCH = R::pitch;
    LG_SMEM(ring_s);                             /* [WARPS][depth][stage] */
    float *red = (float *)(ring_s + R::bytes);
    float *factor_s = red + R::red / 4;          /* [COLS] */
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const uint8_t *mine = ring_s + warp * R::depth * R::stage;
    const lg_smem mine_at = lg_smem_of(mine);
    walk<NT, M> ahead;
    ahead.begin(a);
#pragma unroll 1
    for (int i = 0; i < R::depth && ahead.more(a); i++, ahead.on(a)) ahead.fetch_weights(a, mine_at + (lg_smem)(i * R::stage));
    lg_pdl_wait();
    lg_pdl_go(); /* only now: who starts then may read what was staged for this step */
#pragma unroll 1
    for (int i = 0, at = warp; i < R::depth && at < a.n_stage; i++) { /* (of items that do not exist: nobody minds) */
        walk<NT, M>::fetch_x(a, at, mine_at + (lg_smem)(i * R::stage));
        at = at + WARPS < a.n_stage ? at + WARPS : warp;
    }
    lg_cp_commit();

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
    lg_copy_wait<0>(); /* the ring's first turn; from here on one group a stage */
    const int r = tid & 15, n = tid >> 4; /* this thread's result of an item: row r, input n */
    int stage = 0;
#pragma unroll 1
    for (int item = blockIdx.x; item < a.n_item; item += gridDim.x) {
        const spot s = spot_of<M>(a, item);
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
        for (int at = warp; at < a.n_stage; at += WARPS) {
            lg_copy_wait<R::depth - 1>();
            const uint8_t *from = mine + stage * R::stage;
#pragma unroll
            for (int c = 0; c < R::C; c++)
#pragma unroll
                for (int m = 0; m < M; m++) {
                    lg_hold<LG_DTYPE_BF16> o;
                    o.c[0] = *(const uint4 *)(from + (c * M + m) * RECORD + lane * 16);
                    o.c[1] = *(const uint4 *)(from + (c * M + m) * RECORD + 512 + lane * 16);
                    lg_multiply<LG_DTYPE_BF16, NT, false>(acc[m], o, (const uint16_t *)(from + R::weights + c * NT * 512 + lane * 16), NULL, NULL, 0, 256, NT);
                }
            if (ahead.more(a)) {
                ahead.fetch_weights(a, mine_at + (lg_smem)(stage * R::stage));
                walk<NT, M>::fetch_x(a, ahead.at, mine_at + (lg_smem)(stage * R::stage));
                ahead.on(a);
            }
            lg_cp_commit();
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
        __syncthreads();
    }
}

/* ---- host ---- */
template <int NT, int M> static void launch(const lg_cuda_env *e, rows_args *a) {
    typedef ring<NT, M> R;
    a->n_stage = (a->n_in + R::C * 32 - 1) / (R::C * 32);
    cudaFuncSetAttribute((const void *)k_stream_rows<NT, M>, cudaFuncAttributeMaxDynamicSharedMemorySize, R::shared);
    lg_cuda_launch(k_stream_rows<NT, M>, dim3((unsigned)(a->n_item < e->n_sm ? a->n_item : e->n_sm)), dim3(THREADS), (size_t)R::shared, e->stream, true, *a);
}

static int larger(int a, int b) { return a > b ? a : b; }

bool lg_cuda_streams_rows(const lg_cuda_env *e, const lg_weight *const *w, int n, int64_t n_tok, bool add) {
    const int shared = n_tok <= 8 ? larger(ring<1, 1>::shared, ring<1, 2>::shared) : larger(ring<2, 1>::shared, ring<2, 2>::shared);
    int64_t bytes = 0;
    for (int i = 0; i < n; i++) {
        if (w[i]->dtype != LG_DTYPE_BF16 || w[i]->n_in % 8) return false;
        bytes += lg_cuda_packed(w[i])->bytes;
    }
    return e->compute != LG_COMPUTE_F32 && n_tok > 1 && n_tok <= MOST_ROWS && bytes >= LEAST && !(add && n > 1) && shared <= e->smem_max;
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
    if (in->n_tok <= 8) gate_up ? launch<1, 2>(e, &a) : launch<1, 1>(e, &a);
    else gate_up ? launch<2, 2>(e, &a) : launch<2, 1>(e, &a);
}
