/* A product of 2 to 16 rows of input with large bf16 weights: the weights stream through rings in shared memory, as in stream.cu.
 *
 * One block of 8 warps a multiprocessor takes items of M tiles of 16 weight rows in turn; its warps split the columns, and each has a ring
 * of its own that is always full of what it takes next, across items, and is filled with weights before the kernel waits for the one before
 * it. The inputs (bf16, made by k_prepare or by the product before) come through the ring beside the weights of M tiles that they meet, in
 * the order of the tensor cores' fragments. A lane reads nothing but what it copied itself: no barrier but those around the sums of an item. */
#include "ops/cuda/stream.cuh"
#include <string.h>

#ifndef STREAM_LEAST
#define STREAM_LEAST (4 << 20)
#endif
#ifndef ROWS_ROOM
#define ROWS_ROOM 168
#endif
#ifndef ROWS_BEFORE
#define ROWS_BEFORE 100
#endif
enum { WARPS = 8, THREADS = WARPS * 32, MOST_ROWS = 16, MOST_TILES = 3, LEAST = STREAM_LEAST, RECORD = 1024 }; /* (16 rows, 32 columns) */

/* NT: inputs / 8; M: tiles of an item. */
template <int NT, int M> struct ring {
#ifdef LG_CUDA_ARCH_90a
    static constexpr int room = ROWS_ROOM << 10;
#else
    static constexpr int room = 64 << 10;
#endif
    static constexpr int C = M == 1 ? 2 : 1, x_bytes = C * NT * 512; /* records of a tile in a stage, inputs for them */
    static constexpr int weights = M * C * RECORD, stage = weights + x_bytes, depth = room / WARPS / stage, bytes = WARPS * depth * stage;
    static constexpr int before = depth * ROWS_BEFORE / 100;       /* stages asked for before the inputs */
    static constexpr int pitch = NT * 8 + 2, red = WARPS * M * 16 * pitch * 4; /* sums of warps: [WARPS][M][16][pitch] floats */
    static constexpr int shared = bytes + red + NT * 32;
    static_assert(depth > 1, "a ring");
};

typedef struct rows_args {
    lg_part p[3];
    int32_t n_part, n_item, n_in, n_piece, n_stage, n_tok; /* n_piece: records of a tile; n_stage: stages of an item */
    bool gate_up, add;
    const uint16_t *x;
    const float *factor, *squares;
    float eps;
    uint16_t *twin;
    const float *twin_norm;
    float *twin_squares;
} rows_args;

/* A weight's tile: tile m of an item. Past the last: that one once more, which nobody writes. */
typedef struct spot { int part, tile; bool live; } spot;
template <int M> static __device__ __forceinline__ spot spot_of(const rows_args &a, int item, int m) {
    if (a.gate_up) return spot{ m, item, true };
    const int n = a.p[a.n_part - 1].tile_end, at = min(item * M + m, n - 1);
    int which = 0;
    while (which + 1 < a.n_part && at >= a.p[which].tile_end) which++;
    return spot{ which, at - (which ? a.p[which - 1].tile_end : 0), item * M + m < n };
}

/* A stage of a warp: stage `at` of an item. */
typedef struct place { int item, at; } place;
static __device__ __forceinline__ place first_place(const rows_args &a) {
    const int warp = (int)threadIdx.x >> 5;
    return place{ warp < a.n_stage ? (int)blockIdx.x : a.n_item, warp };
}
static __device__ __forceinline__ bool step(place &p, const rows_args &a) { /* true: to another item */
    if ((p.at += WARPS) < a.n_stage) return false;
    p.at = (int)threadIdx.x >> 5;
    p.item += (int)gridDim.x;
    return true;
}

/* The lane's addresses in the tiles of an item: rows g and g + 8 of each. */
template <int M> struct weights {
    const uint8_t *row[M][2];
    __device__ __forceinline__ void aim(const rows_args &a, int item) {
        if (item >= a.n_item) return;
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int m = 0; m < M; m++) {
            const spot s = spot_of<M>(a, item, m);
            const lg_part &w = a.p[s.part];
#pragma unroll
            for (int h = 0; h < 2; h++) row[m][h] = w.codes + ((int64_t)min(s.tile * 16 + h * 8 + (lane >> 2), w.n_out - 1) * a.n_in + (lane & 3) * 8) * 2;
        }
    }
    template <int C> __device__ __forceinline__ void fetch(const rows_args &a, const place &p, lg_smem to) const {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int c = 0; c < C; c++) {
            const int piece = p.at * C + c;
            const uint32_t size = piece * 32 + (lane & 3) * 8 < a.n_in ? 16 : 0;
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) lg_copy16(to + (c * M + m) * RECORD + h * 512 + lane * 16, row[m][h] + (size ? piece * 64 : 0), size);
        }
    }
};
/* Inputs of a stage, as the fragments that its weights meet; rows that do not exist are zeros. */
template <int NT, int C> static __device__ __forceinline__ void fetch_x(const rows_args &a, int at, lg_smem to) {
    const int lane = threadIdx.x & 31, g = lane >> 2;
#pragma unroll
    for (int c = 0; c < C; c++) {
        const int k = (at * C + c) * 32 + (lane & 3) * 8;
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            const bool live = nt * 8 + g < a.n_tok && k < a.n_in;
            lg_copy16_shared(to + (c * NT + nt) * 512 + lane * 16, a.x + (live ? lg_beside_at(NT * 8, nt * 8 + g, k) : 0), live ? 16 : 0);
        }
    }
}

template <int NT, int M>
static __global__ void __launch_bounds__(THREADS, 2) k_stream_rows(const __grid_constant__ rows_args a) {
    typedef ring<NT, M> R;
    constexpr int C = R::C, COLS = NT * 8, PITCH = R::pitch, STEP = THREADS / 16 / COLS, OUTS = (M + STEP - 1) / STEP;
    LG_SMEM(ring_s);                             /* [WARPS][depth][stage] */
    float *red = (float *)(ring_s + R::bytes);
    float *factor_s = red + R::red / 4;          /* [COLS] */
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const uint8_t *mine = ring_s + warp * R::depth * R::stage;
    const lg_smem mine_at = lg_smem_of(mine);
    place ahead = first_place(a), late = ahead;
    weights<M> w;
    const auto on = [&] { if (step(ahead, a)) w.aim(a, ahead.item); };
    w.aim(a, ahead.item);
#pragma unroll 1
    for (int i = 0; i < R::before && ahead.item < a.n_item; i++, on()) w.template fetch<C>(a, ahead, mine_at + (lg_smem)(i * R::stage));
    lg_pdl_wait();
    lg_pdl_go(); /* only now: who starts then may read what was staged for this step */

#pragma unroll 1
    for (int i = 0; i < R::before && late.item < a.n_item; i++, step(late, a)) fetch_x<NT, C>(a, late.at, mine_at + (lg_smem)(i * R::stage + R::weights));
    lg_cp_commit(); /* all that as one group */
    const auto fetch = [&](int stage) {
        if (ahead.item < a.n_item) {
            const lg_smem to = mine_at + (lg_smem)(stage * R::stage);
            w.template fetch<C>(a, ahead, to);
            fetch_x<NT, C>(a, ahead.at, to + (lg_smem)R::weights);
            on();
        }
        lg_cp_commit();
    };
#pragma unroll 1
    for (int i = R::before; i < R::depth; i++) fetch(i);

    const int r = tid & 15, n = (tid >> 4) % COLS, m0 = (tid >> 4) / COLS; /* outputs of this thread: row r of tiles m0, m0 + STEP .. for input n */
    const auto out_of = [&](int item, int j) -> float * {
        const int m = m0 + j * STEP;
        if (m >= (a.gate_up ? 1 : M) || n >= a.n_tok) return NULL;
        const spot s = spot_of<M>(a, item, m);
        const int row = s.tile * 16 + r;
        return s.live && row < a.p[s.part].n_out ? a.p[s.part].out + (int64_t)n * a.p[s.part].n_out + row : NULL;
    };
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
    } else if (tid < a.n_tok) factor_s[tid] = a.factor ? __ldcg(a.factor + tid) : 1.0f;
    lg_copy_wait<R::depth - R::before>();
    int stage = 0;
#pragma unroll 1
    for (int item = blockIdx.x; item < a.n_item; item += gridDim.x) {
        float acc[M][NT][4], old[OUTS], by[OUTS];
        float *out[OUTS];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int nt = 0; nt < NT; nt++) acc[m][nt][0] = acc[m][nt][1] = acc[m][nt][2] = acc[m][nt][3] = 0.0f;
#pragma unroll
        for (int j = 0; j < OUTS; j++) {
            out[j] = out_of(item, j);
            old[j] = a.add && out[j] ? __ldcg(out[j]) : 0.0f; /* asked for before the weights are multiplied */
            by[j] = a.twin_norm && out[j] ? a.twin_norm[out[j] - a.p[0].out - (int64_t)n * a.p[0].n_out] : 0.0f;
        }
#pragma unroll 1
        for (int at = warp; at < a.n_stage; at += WARPS) {
            lg_copy_wait<R::depth - 1>();
            const uint8_t *from = mine + stage * R::stage, *x = from + R::weights;
#pragma unroll
            for (int c = 0; c < C; c++)
#pragma unroll
                for (int m = 0; m < M; m++) {
                    lg_hold<LG_DTYPE_BF16> o;
                    o.c[0] = *(const uint4 *)(from + (c * M + m) * RECORD + lane * 16);
                    o.c[1] = *(const uint4 *)(from + (c * M + m) * RECORD + 512 + lane * 16);
                    lg_multiply<LG_DTYPE_BF16, NT, false>(acc[m], o, (const uint16_t *)(x + c * NT * 512 + lane * 16), NULL, NULL, 0, 256, NT);
                }
            fetch(stage);
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
#pragma unroll
        for (int j = 0; j < OUTS; j++) {
            const float *from = red + ((m0 + j * STEP) * 16 + r) * PITCH + n;
            float v = 0.0f, up = 0.0f;
            if (out[j]) {
#pragma unroll
                for (int k = 0; k < WARPS; k++) v += from[k * M * 16 * PITCH];
                v *= factor_s[n];
                if (M == 2 && a.gate_up) {
#pragma unroll
                    for (int k = 0; k < WARPS; k++) up += from[(k * M + 1) * 16 * PITCH];
                    v = v / (1.0f + __expf(-v)) * (up * factor_s[n]);
                }
                v += old[j];
                *out[j] = v;
                if (a.twin) {
                    const __nv_bfloat16 h = __float2bfloat16_rn(a.twin_norm ? v * by[j] : v);
                    a.twin[lg_beside_at(COLS, n, (int)(out[j] - a.p[0].out - (int64_t)n * a.p[0].n_out))] = *(const uint16_t *)&h;
                }
            }
            if (a.twin_norm) {
                float s = v * v;
#pragma unroll
                for (int m = 8; m; m >>= 1) s += __shfl_xor_sync(0xffffffffu, s, m);
                if (r == 0 && out[j]) a.twin_squares[(int64_t)n * a.p[0].tile_end + item * M + m0 + j * STEP] = s;
            }
        }
        __syncthreads();
    }
}

/* ---- host ---- */
static const lg_cuda_weight *packed(const lg_weight *w) { return (const lg_cuda_weight *)w->packed; }

template <int NT, int M> static void launch(const lg_cuda_env *e, rows_args *a) {
    typedef ring<NT, M> R;
    const int tiles = a->p[a->n_part - 1].tile_end;
    a->n_item = a->gate_up ? tiles : (tiles + M - 1) / M;
    a->n_stage = (a->n_piece + R::C - 1) / R::C;
    cudaFuncSetAttribute((const void *)k_stream_rows<NT, M>, cudaFuncAttributeMaxDynamicSharedMemorySize, R::shared);
    lg_cuda_launch(k_stream_rows<NT, M>, dim3((unsigned)(a->n_item < e->n_sm ? a->n_item : e->n_sm)), dim3(THREADS), (size_t)R::shared, e->stream, true, *a);
}

/* Tiles of an item: what the busiest block reads, weights of its tiles and (they come from L2: half) their inputs, is least. */
static int tiles_of(const rows_args *a, int n_sm, int nt) {
    int best = 2, least = INT32_MAX;
    for (int m = 1; m <= MOST_TILES && !a->gate_up; m++) {
        const int items = (a->p[a->n_part - 1].tile_end + m - 1) / m, cost = (items + n_sm - 1) / n_sm * (4 * m + nt);
        if (cost > least) continue;
        least = cost;
        best = m;
    }
    return best;
}

template <int NT> static void with_columns(const lg_cuda_env *e, rows_args *a) {
    const int m = tiles_of(a, e->n_sm, NT);
    if (m == 1) launch<NT, 1>(e, a);
    else if (m == 2) launch<NT, 2>(e, a);
    else launch<NT, 3>(e, a);
}

bool lg_cuda_streams_rows(const lg_cuda_env *e, const lg_weight *const *w, int n, int64_t n_tok, bool add) {
    int64_t bytes = 0;
    for (int i = 0; i < n; i++) {
        if (w[i]->dtype != LG_DTYPE_BF16 || w[i]->n_in % 8) return false;
        bytes += packed(w[i])->bytes;
    }
    return n_tok > 1 && n_tok <= MOST_ROWS && bytes >= LEAST && !(add && n > 1) && ring<2, 3>::shared <= e->smem_max;
}

void lg_cuda_stream_rows(const lg_cuda_env *e, const lg_cuda_rows *in, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add) {
    rows_args a;
    int32_t end = 0;
    memset(&a, 0, sizeof a);
    a.n_in = packed(w[0])->n_in;
    a.n_piece = (a.n_in + 31) / 32;
    a.n_part = n;
    a.n_tok = in->n_tok;
    a.gate_up = gate_up;
    a.add = add;
    a.x = in->x;
    a.factor = in->factor;
    a.squares = in->squares;
    a.eps = in->eps;
    a.twin = in->twin;
    a.twin_norm = in->twin ? in->twin_norm : NULL;
    a.twin_squares = in->twin_squares;
    for (int i = 0; i < n; i++) {
        const lg_cuda_weight *p = packed(w[i]);
        end = gate_up ? p->n_tile : end + p->n_tile;
        a.p[i] = lg_part{ p->codes, p->high, p->scale, p->super, y[i], p->n_out, end };
    }
    if (in->n_tok <= 8) with_columns<1>(e, &a);
    else with_columns<2>(e, &a);
}
