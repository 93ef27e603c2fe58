/* A product of one row of input with a large row-major weight (bf16, f16): the weight streams through rings in shared memory as in stream.cu,
 * in long runs.
 *
 * A warp takes two rows of the weight at a time and asks for 2 KB of each at once: memory serves that faster than 128 bytes of 16 rows
 * (docs/speed-cuda.md, 69). The 64-byte pieces of 512 bytes of one row are the tensor core's rows 0 to 7, those of the other its rows 8 to 15, and
 * the pieces of the input are its eight columns: of the product the diagonals count. So rows lie in shared memory as in memory, and a lane's part of
 * every operand is 16 bytes in the order of lanes. */
#include "ops/cuda/stream.cuh"
#include <string.h>

enum { WARPS = 8, THREADS = WARPS * 32, RED = 16, /* tiles whose sums wait in shared memory */
#ifdef LG_CUDA_ARCH_90a
       C = 4, ROOM = 128 << 10,
#else
       C = 2, ROOM = 48 << 10,
#endif
       PIECES = 256, RECORD = 1024,     /* a record: so many columns of two rows, and its bytes */
       COLUMNS = C * PIECES, STAGE = C * RECORD, DEPTH = ROOM / WARPS / STAGE, /* of a warp's ring; in a stage C runs of one row, then those of the other */
       TILE = 256 << 10 };              /* bytes of a tile, at most, where its rows can be cut among warps */

typedef struct major_args {
    lg_part p[3];
    int32_t n_part, n_item;             /* item: a tile of pairs of rows, of gate and up a row of each */
    int32_t n_in, n_chunk;              /* chunks of the input, beyond its end too where a stage is */
    int32_t shift, run;                 /* a pair is for 1 << shift warps; stages that each has of it */
    int32_t row_shift;                  /* 1 << row_shift results of a tile */
    int32_t n_side, before;             /* floats beside the input; stages asked for before the input */
    bool gate_up, add;
    const float *x, *norm;
    const int32_t *row;
    float eps;
} major_args;

static __device__ __forceinline__ lg_spot spot_of(const major_args &a, int item) { return lg_spot_of(a.p, a.n_part, a.gate_up, item); }
/* The first stage of a pair that is the thread's warp's. */
static __device__ __forceinline__ int first_of(const major_args &a) { return ((int)threadIdx.x >> 5 & ((1 << a.shift) - 1)) * a.run; }

/* The weights a warp asks for: where it stands in the block's list. */
struct walk {
    int item, at;           /* stages of the item */
    const uint8_t *lo, *hi; /* the lane's 16 bytes of both rows */
    int left;               /* columns from there on; 0 or less: beyond the row */

    __device__ __forceinline__ void aim(const major_args &a) {
        const lg_spot s = spot_of(a, item);
        const int pair = (int)threadIdx.x >> 5 >> a.shift, most = a.p[s.part].n_out - 1;
        const int r0 = (s.tile << a.row_shift) + (a.gate_up ? pair : 2 * pair), r1 = a.gate_up ? r0 : r0 + 1, column = first_of(a) * COLUMNS + ((int)threadIdx.x & 31) * 8;
        lo = a.p[s.part].codes + ((int64_t)min(r0, most) * a.n_in + column) * 2;
        hi = a.p[a.gate_up ? 1 : s.part].codes + ((int64_t)min(r1, most) * a.n_in + column) * 2;
        left = a.n_in - column;
        at = 0;
    }
    /* Its next records into the stage at `to` (the lane's 16 bytes), then on. */
    __device__ __forceinline__ void fetch(const major_args &a, lg_smem to) {
        if (item < a.n_item) {
#pragma unroll
            for (int c = 0; c < C; c++) {
                const uint32_t size = left > c * PIECES ? 16 : 0; /* (n_in is a multiple of 8) */
                lg_copy16(to + c * 512, size ? lo + c * 512 : a.p[0].codes, size);
                lg_copy16(to + (C + c) * 512, size ? hi + c * 512 : a.p[0].codes, size);
            }
            lo += C * 512;
            hi += C * 512;
            left -= COLUMNS;
            if (++at == a.run) {
                item += gridDim.x;
                if (item < a.n_item) aim(a);
            }
        }
        lg_cp_commit();
    }
};

/* A record times the input, at the lane's 16 bytes of both. The sums are those of lanes with lane % 4 == lane / 8. */
template <int T> static __device__ __forceinline__ void multiply(float *acc, const uint8_t *record, const uint16_t *x, const float *side) {
    const uint4 lo = *(const uint4 *)record, hi = *(const uint4 *)(record + C * 512), b = *(const uint4 *)x; /* (a lane reads back what it copied) */
    if (T == LG_DTYPE_BF16) {
        mma<true>(acc, lo.x, hi.x, lo.y, hi.y, b.x, b.y);
        mma<true>(acc, lo.z, hi.z, lo.w, hi.w, b.z, b.w);
        return;
    }
    const float scale = *side;
    float c[4];
    lg_mma<false>(c, lo.x, hi.x, lo.y, hi.y, b.x, b.y, 0, 0, 0, 0);
    mma<false>(c, lo.z, hi.z, lo.w, hi.w, b.z, b.w);
#pragma unroll
    for (int i = 0; i < 4; i++) acc[i] += scale * c[i];
}

/* Of RED tiles whose sums are put together, the first one of item `first`: the thread's result. out NULL: none. */
static __device__ __forceinline__ float *out_of(const major_args &a, int first) {
    const int item = first + ((int)threadIdx.x >> a.row_shift) * (int)gridDim.x;
    const lg_spot s = spot_of(a, item);
    const int row = (s.tile << a.row_shift) + ((int)threadIdx.x & ((1 << a.row_shift) - 1));
    return item < a.n_item && row < a.p[s.part].n_out ? a.p[s.part].out + row : NULL;
}
/* What it is added to: asked for before the weights are multiplied. */
static __device__ __forceinline__ float old_of(const major_args &a, const float *out) { return a.add && out ? __ldcg(out) : 0.0f; }
/* A row's sums, of the warps that have parts of it. */
static __device__ __forceinline__ float sum_of(const major_args &a, const float *red) {
    float v = 0.0f;
    for (int i = 0; i < 1 << a.shift; i++, red += 16) {
        const float4 x = *(const float4 *)red, y = *(const float4 *)(red + 4);
        v += ((x.x + x.y) + (x.z + x.w)) + ((y.x + y.y) + (y.z + y.w));
    }
    return v;
}
/* The sums of k tiles: added up and written. By the whole block; red may be written again afterwards. */
static __device__ __forceinline__ void put_sums(const major_args &a, const float *red, float *out, int k, float factor, float old) {
    const int j = (int)threadIdx.x >> a.row_shift, r = (int)threadIdx.x & ((1 << a.row_shift) - 1);
    __syncthreads();
    if (out && j < k) {
        const float *from = red + (j * WARPS + ((a.gate_up ? r : r >> 1) << a.shift)) * 16;
        float v = sum_of(a, from + (a.gate_up ? 0 : (r & 1) * 8)) * factor;
        if (a.gate_up) v = __fdividef(v, 1.0f + __expf(-v)) * (sum_of(a, from + 8) * factor);
        *out = v + old;
    }
    __syncthreads();
}

template <int T> static __global__ void __launch_bounds__(THREADS, 1) k_stream_major(const __grid_constant__ major_args a) {
    LG_SMEM(ring_s);                                        /* [WARPS][DEPTH][STAGE] */
    float *red = (float *)(ring_s + WARPS * DEPTH * STAGE); /* [RED][WARPS][2][8] */
    float *tmp = red + RED * WARPS * 16;                    /* [WARPS] */
    float *side = tmp + WARPS;                              /* [n_side] */
    uint16_t *xs = (uint16_t *)(side + a.n_side);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const uint8_t *mine = ring_s + warp * DEPTH * STAGE + lane * 16;
    const lg_smem mine_at = lg_smem_of(mine);
    walk ahead;
    ahead.item = blockIdx.x;
    ahead.aim(a);
#pragma unroll 1
    for (int i = 0; i < a.before; i++) ahead.fetch(a, mine_at + (lg_smem)(i * STAGE));
    if (a.norm && (int)(blockIdx.x * THREADS + tid) * 32 < a.n_in) lg_prefetch(a.norm + (blockIdx.x * THREADS + tid) * 32);
    /* Before the wait, all that the input has no part in. */
    float *out = out_of(a, blockIdx.x);
    const float *x = a.x + lg_own_slot(false), *norm = a.norm ? a.norm + lg_own_slot(false) : NULL;
    lg_pin(out, x, norm);
    lg_pdl_wait();
    lg_pdl_go(); /* only now: who starts then may read what was staged for this step */

    const auto rest = [&] {
#pragma unroll 1
        for (int i = a.before; i < DEPTH; i++) ahead.fetch(a, mine_at + (lg_smem)(i * STAGE));
    };
    if (a.row) x += *a.row * (int64_t)a.n_in;
    const float ss = lg_by_length<THREADS>(a.norm != NULL, a.n_in, [&](auto ahead_of, auto with) {
        return lg_prepare_row<THREADS, decltype(ahead_of)::value, decltype(with)::value != 0>(xs, side, 1, 0, x, norm, a.n_in, a.n_chunk, lg_form_of<T>(), rest);
    });
    lg_warp_sum(tmp, ss);
    __syncthreads();
    const float factor = a.norm ? lg_norm_factor<WARPS>(tmp, a.eps, a.n_in) : 1.0f;
    const uint16_t *own_x = xs + first_of(a) * COLUMNS + lane * 8;
    const float *own_side = side + (first_of(a) * (COLUMNS / 32) + lane / 4) * 4; /* (column lane / 4) */
    float *own_red = red + warp * 16 + lane / 4;
    float old = old_of(a, out);
    int stage = 0, k = 0;
    for (int item = blockIdx.x; item < a.n_item; item += gridDim.x) {
        float acc[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
        for (int at = 0; at < a.run; at++) {
            lg_copy_wait<DEPTH - 1>();
#pragma unroll
            for (int c = 0; c < C; c++) multiply<T>(acc, mine + stage * STAGE + c * 512, own_x + at * COLUMNS + c * PIECES, own_side + (at * C + c) * (PIECES / 32 * 4));
            ahead.fetch(a, mine_at + (lg_smem)(stage * STAGE));
            stage = stage + 1 == DEPTH ? 0 : stage + 1;
        }
        if (lane % 4 == lane / 8) { /* row and column lane / 4, and the row 8 below it */
            own_red[k * WARPS * 16] = lane & 4 ? acc[1] : acc[0];
            own_red[k * WARPS * 16 + 8] = lane & 4 ? acc[3] : acc[2];
        }
        if (++k == RED || item + (int)gridDim.x >= a.n_item) {
            put_sums(a, red, out, k, factor, old);
            k = 0;
            out = out_of(a, item + (int)gridDim.x);
            old = old_of(a, out);
        }
    }
}

/* ---- host ---- */
template <int T> static bool launch(const lg_cuda_env *e, major_args *a, bool early) {
    static int8_t ready[16]; /* of a device */
    int device = 0;
    const int n_x = (a->run << a->shift) * COLUMNS;
    a->n_chunk = n_x / LG_CHUNK;
    a->n_side = T == LG_DTYPE_BF16 ? 0 : n_x / 32 * 4;
    a->before = early ? DEPTH : DEPTH * 3 / 4; /* the input comes late behind what was asked for before it */
    const int64_t smem = (int64_t)WARPS * DEPTH * STAGE + (int64_t)(RED * WARPS * 16 + WARPS + a->n_side) * 4 + (int64_t)n_x * 2;
    if (smem > e->smem_max) return false;
    cudaGetDevice(&device);
    if (device >= 16) return false;
    if (!ready[device]) {
        cudaFuncSetAttribute((const void *)k_stream_major<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)e->smem_max);
        ready[device] = 1;
    }
    lg_cuda_launch(k_stream_major<T>, dim3((unsigned)(a->n_item < e->n_sm ? a->n_item : e->n_sm)), dim3(THREADS), (size_t)smem, e->stream, true, *a);
    return true;
}

bool lg_cuda_stream_major(const lg_cuda_env *e, const lg_cuda_in *in, bool early, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add) {
    major_args a;
    const lg_cuda_weight *w0 = lg_cuda_packed(w[0]);
    const int n_stage = (w0->n_in + COLUMNS - 1) / COLUMNS;
    memset(&a, 0, sizeof a);
    a.n_in = w0->n_in;
    a.n_part = n;
    a.gate_up = gate_up;
    a.add = add;
    a.x = in->x;
    a.row = in->row;
    a.norm = in->norm;
    a.eps = in->eps;
    /* Warps have equal shares of a tile: pairs of rows, or parts of pairs where these are long. */
    while (1 << a.shift < WARPS && (n_stage >> a.shift) % 2 == 0 && (int64_t)(WARPS >> a.shift) * n_stage * STAGE > TILE) a.shift++;
    a.run = n_stage >> a.shift;
    a.row_shift = (gate_up ? 3 : 4) - a.shift;
    a.n_item = lg_parts(a.p, w, y, n, gate_up, 1 << a.row_shift);
    return w0->dtype == LG_DTYPE_BF16 ? launch<LG_DTYPE_BF16>(e, &a, early) : launch<LG_DTYPE_F16>(e, &a, early);
}
