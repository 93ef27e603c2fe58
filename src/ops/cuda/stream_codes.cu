/* A product of 2 to 16 rows of input with large quantised weights: the weights stream through rings in shared memory as in stream.cu (stream_packed.cuh).
 *
 * The inputs (f16 in the form of stream.cuh, made by k_parts) stay in shared memory for the whole launch: beside 4-bit codes they would be twice the
 * weights' bytes if they came along. Where all columns do not fit, they are cut into parts and each block takes one part of the tiles it is dealt; the blocks
 * of a group take the same tiles, leave their sums in memory, and the one that arrives last adds them up in the order of the parts. So results depend on
 * the grid, never on timing. */
#include "ops/cuda/stream_packed.cuh"
#include <string.h>

#ifndef STREAM_LEAST
#define STREAM_LEAST (4 << 20)
#endif
enum { WARPS = 8, THREADS = WARPS * 32, MOST_ROWS = 16, MOST_PARTS = 16, LEAST = STREAM_LEAST,
       ROOM = 96 << 10, DEEP = 5, LEAST_DEEP = 2 }; /* of rings: bytes at most, so that a block of selection fits beside 8 inputs of 4096; stages of a ring */

/* NT: inputs / 8. */
template <int T, int NT> struct shape {
    typedef lg_fmt<T> F;
    static constexpr int C = F::byte ? 1 : 2, cols = NT * 8, pitch = cols + 2, pairs = NT * 4, size = lg_side_floats(F::q6);
    static constexpr int sums = 16 * pitch, most = 24, red = most * sums; /* floats of a unit's sums; units whose sums wait in shared memory (an item has at most 16) */
    typedef lg_stage<T, C> S;
    static __host__ __device__ __forceinline__ int row(int chunks) { return chunks * LG_CHUNK + 32; } /* from a row of inputs to the next; the pad keeps 8 rows on different banks */
};

struct codes_args : lg_deal {
    int32_t n_tok, pairs, part, parts, groups; /* part: chunks of a part */
    int32_t wait;                       /* items whose sums wait in shared memory */
    int32_t depth;                      /* stages of a ring */
    bool add;
    const uint16_t *x;
    const float *side, *squares;
    int32_t n_in, n_square, stride;     /* stride: of x */
    float eps;
    uint32_t *count;                    /* [group], 0 where there are parts */
    float *partial;                     /* [part][item][span][cols][16] */
};

/* A block's part of the columns of its group's tiles. */
struct take_part {
    static constexpr int warps = WARPS;
    const codes_args &a;
    int group, first, n, n_stage, n_unit;
    __device__ __forceinline__ int first_item() const { return group; }
    __device__ __forceinline__ int step() const { return a.groups; }
    __device__ __forceinline__ int chunks() const { return n; }
    __device__ __forceinline__ int stages() const { return n_stage; }
    __device__ __forceinline__ int units() const { return n_unit; }
};

/* A lane's part of record c of a stage. */
template <int T, typename S> static __device__ __forceinline__ void hold_of(lg_hold<T> &o, const uint8_t *stage, int c) {
    typedef lg_fmt<T> F;
    typedef lg_record<T> R;
    const int lane = threadIdx.x & 31, g = lane >> 2;
    const uint8_t *scale = stage + S::scale + c * R::scale, *super = stage + S::super + (c >> 1) * R::super;
    lg_hold_codes(o, stage + c * R::codes + lane * 16, stage + S::high + c * R::high + lane * (F::q6 ? 8 : 4));
    if (F::pair) {
        o.s[0] = *(const uint4 *)(scale + g * 16);
        o.s[F::pair ? 1 : 0] = *(const uint4 *)(scale + (g + 8) * 16);
    } else {
        const uint2 a = *(const uint2 *)(scale + g * 8), b = *(const uint2 *)(scale + (g + 8) * 8);
        o.s[0] = make_uint4(a.x, a.y, b.x, b.y);
    }
    if (F::k45) {
        o.d[0] = *(const uint32_t *)(super + g * 4);
        o.d[1] = *(const uint32_t *)(super + (g + 8) * 4);
    } else if (F::q6) {
        o.d[0] = *(const uint16_t *)(super + g * 2);
        o.d[1] = *(const uint16_t *)(super + (g + 8) * 2);
    }
}

/* Result i of an item, [input][16]. out NULL: there is none. */
typedef struct result { float *out; int32_t n; } result;
static __device__ __forceinline__ result result_of(const codes_args &a, int item, int i) {
    const lg_spot s = lg_spot_of(a, item);
    const int n = i >> 4, row = s.tile * 16 + (i & 15), n_out = a.p[s.part].n_out;
    return result{ n < a.n_tok && row < n_out ? a.p[s.part].out + (int64_t)n * n_out + row : NULL, n };
}
static __device__ __forceinline__ float old_of(const codes_args &a, const result &to) { return a.add && to.out ? __ldcg(to.out) : 0.0f; }
/* factor: of the row of inputs, and of what codes are (stream.cuh). */
static __device__ __forceinline__ void put_result(const codes_args &a, const result &to, float v, float up, float factor, float old) {
    v *= factor;
    if (a.span == 2) v = __fdividef(v, 1.0f + __expf(-v)) * (up * factor);
    *to.out = v + old;
}

template <int T, int NT> static __global__ void __launch_bounds__(THREADS, 2) k_stream_codes(const __grid_constant__ codes_args a) {
    typedef shape<T, NT> X;
    typedef typename X::S S;
    constexpr int C = X::C, COLS = X::cols, PITCH = X::pitch;
    LG_SMEM(ring_s);                                             /* [WARPS][depth][stage] */
    float *red = (float *)(ring_s + WARPS * a.depth * S::bytes); /* [units that wait][16][PITCH] */
    float *factor_s = red + X::red;                              /* [16] */
    float *side = factor_s + 16;                                 /* [part * 4][pairs][size] */
    uint16_t *xs = (uint16_t *)(side + a.part * 4 * a.pairs * X::size); /* [COLS][row] */
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const int which = a.parts > 1 ? (int)blockIdx.x % a.parts : 0, first = which * a.part;
    const int n = min(a.part, a.n_chunk - first), n_stage = (n + C - 1) / C;
    const take_part take = { a, a.parts > 1 ? (int)blockIdx.x / a.parts : (int)blockIdx.x, first, n, n_stage, (n_stage + a.run - 1) / a.run };
    const uint8_t *mine = ring_s + warp * a.depth * S::bytes;
    const lg_smem mine_at = lg_smem_of(mine);
    lg_walk<T, C, take_part> ahead;
    ahead.begin(a, take);
    if (n % C) { /* what is multiplied beyond the last record is finite */
        for (int i = lane; i < a.depth * S::bytes / 16; i += 32) *(uint4 *)(ring_s + warp * a.depth * S::bytes + i * 16) = make_uint4(0, 0, 0, 0);
        __syncwarp();
    }
#pragma unroll 1
    for (int i = 0; i < a.depth; i++) ahead.fetch(a, take, mine_at + (lg_smem)(i * S::bytes));
    lg_pdl_wait();
    lg_pdl_go(); /* only now: who starts then may read what was staged for this step */

    const int part = a.part, row = X::row(part);
    for (int i = warp; i < COLS; i += WARPS) { /* rows and columns that do not exist are zeros */
        const lg_smem to = lg_smem_of(xs + i * row);
        const uint16_t *from = a.x + (i < a.n_tok ? (int64_t)i * a.stride + first * LG_CHUNK : 0);
        for (int p = lane; p < part * (LG_CHUNK / 8); p += 32) {
            const bool live = i < a.n_tok && p < n * (LG_CHUNK / 8);
            lg_copy16_shared(to + (lg_smem)(p * 16), from + (live ? p * 8 : 0), live ? 16 : 0);
        }
    }
    for (int p = tid; p < part * a.pairs * X::size; p += THREADS) {
        const bool live = p < n * a.pairs * X::size;
        lg_copy16_shared(lg_smem_of(side) + (lg_smem)(p * 16), a.side + (live ? (int64_t)first * a.pairs * X::size + p : 0) * 4, live ? 16 : 0);
    }
    lg_cp_commit();
    if (tid < a.n_tok) {
        float ss = 0.0f;
        for (int i = 0; i < a.n_square; i++) ss += __ldcg(a.squares + tid * a.n_square + i);
        factor_s[tid] = 16777216.0f * (a.n_square ? lg_factor_of(ss, a.eps, a.n_in) : 1.0f);
    }
    lg_copy_wait<0>(); /* (what was asked for before is there before) */
    __syncthreads();

    const uint16_t *x_lane = xs + g * row + t * 8;
    const int step = a.pairs * X::size;
    int pair[NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++) pair[nt] = (nt * 4 + t < a.pairs ? nt * 4 + t : 0) * X::size;
    const int n_unit = take.n_unit, all = (a.n_item - take.group + a.groups - 1) / a.groups; /* units of a tile; items of the block */
    int unit = warp, stage = 0; /* unit: of the items whose sums wait, tile for tile */
#pragma unroll 1
    for (int begun = 0; begun < all; begun += a.wait) {
        const int here = min(a.wait, all - begun), units = here * a.span * n_unit;
#pragma unroll 1
        for (; unit < units; unit += WARPS) {
            const int first_stage = unit % n_unit * a.run;
            float acc[NT][4];
#pragma unroll
            for (int nt = 0; nt < NT; nt++) acc[nt][0] = acc[nt][1] = acc[nt][2] = acc[nt][3] = 0.0f;
#pragma unroll 1
            for (int at = first_stage, end = min(at + a.run, n_stage); at < end; at++) {
                lg_cp_wait(a.depth - 1);
                __syncwarp();
                const uint8_t *from = mine + stage * S::bytes;
#pragma unroll
                for (int c = 0; c < C; c++) {
                    const int piece = at * C + c;
                    lg_hold<T> o;
                    hold_of<T, S>(o, from, c);
                    lg_multiply<T, NT, false>(acc, o, x_lane + piece * LG_CHUNK, side + piece * 4 * step, pair, step, 8 * row, NT);
                }
                __syncwarp();
                ahead.fetch(a, take, mine_at + (lg_smem)(stage * S::bytes));
                stage = stage + 1 == a.depth ? 0 : stage + 1;
            }
            float *sums = red + unit * X::sums;
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                *(float2 *)(sums + g * PITCH + nt * 8 + 2 * t) = make_float2(acc[nt][0], acc[nt][1]);
                *(float2 *)(sums + (g + 8) * PITCH + nt * 8 + 2 * t) = make_float2(acc[nt][2], acc[nt][3]);
            }
        }
        unit -= units;
        __syncthreads();
#pragma unroll 1
        for (int i = tid; i < here * 16 * COLS; i += THREADS) { /* a result a thread, of all units of its tile */
            const int at = i % (16 * COLS), item = take.group + (begun + i / (16 * COLS)) * a.groups;
            const result to = result_of(a, item, at);
            const float old = a.parts == 1 ? old_of(a, to) : 0.0f, *of = red + i / (16 * COLS) * a.span * n_unit * X::sums + (at & 15) * PITCH + (at >> 4);
            float v = 0.0f, up = 0.0f;
            for (int u = 0; u < n_unit; u++) {
                v += of[u * X::sums];
                if (a.span == 2) up += of[(n_unit + u) * X::sums];
            }
            if (a.parts > 1) {
                float *out = a.partial + ((int64_t)which * a.n_item + item) * a.span * 16 * COLS + at;
                out[0] = v;
                if (a.span == 2) out[16 * COLS] = up;
            } else if (to.out) put_result(a, to, v, up, factor_s[to.n], old);
        }
        __syncthreads(); /* red may be written again */
    }
    if (a.parts == 1) return;
    uint32_t *last = (uint32_t *)(void *)red;
    if (tid == 0) *last = lg_arrive(a.count + take.group) == (uint32_t)a.parts - 1; /* (behind a barrier of the block) */
    __syncthreads();
    if (!*last) return;
    for (int item = take.group; item < a.n_item; item += a.groups)
        for (int i = tid; i < 16 * COLS; i += THREADS) {
            const result to_one = result_of(a, item, i);
            const float before = old_of(a, to_one), *from = a.partial + (int64_t)item * a.span * 16 * COLS + i;
            float v = 0.0f, up = 0.0f;
#pragma unroll 4
            for (int q = 0; q < a.parts; q++) {
                v += __ldcg(from + (int64_t)q * a.n_item * a.span * 16 * COLS);
                if (a.span == 2) up += __ldcg(from + ((int64_t)q * a.n_item * 2 + 1) * 16 * COLS);
            }
            if (to_one.out) put_result(a, to_one, v, up, factor_s[to_one.n], before);
        }
}

/* ---- host ---- */
/* How columns are cut: in as few parts as fit beside a ring. parts 0: not at all. */
typedef struct cut { int parts, part, depth; int64_t shared; } cut;
template <int T, int NT> static cut cut_of(const lg_cuda_env *e, int n_chunk) {
    typedef shape<T, NT> X;
    for (int parts = 1; parts <= MOST_PARTS && parts <= e->n_sm; parts++) {
        const int part = ((n_chunk + parts - 1) / parts + X::C - 1) / X::C * X::C; /* whole stages */
        const int64_t rest = (int64_t)(X::red + 16 + part * 4 * X::pairs * X::size) * 4 + (int64_t)X::cols * X::row(part) * 2;
        if ((int64_t)part * (parts - 1) >= n_chunk) continue; /* a part without columns */
        for (int depth = DEEP; depth >= LEAST_DEEP; depth--) {
            const int64_t ring = (int64_t)WARPS * depth * X::S::bytes;
            if (ring <= ROOM && ring + rest <= e->smem_max) return cut{ parts, part, depth, ring + rest };
        }
    }
    return cut{ 0, 0, 0, 0 };
}
static cut cut_for(const lg_cuda_env *e, lg_dtype t, int n_chunk, int64_t n_tok) {
    switch (t) {
#define X(T) case T: return n_tok <= 8 ? cut_of<T, 1>(e, n_chunk) : cut_of<T, 2>(e, n_chunk);
        LG_EACH_QUANT(X)
#undef X
    default: return cut{ 0, 0, 0, 0 };
    }
}

template <int T, int NT> static void launch(const lg_cuda_env *e, codes_args *a) {
    const cut c = cut_of<T, NT>(e, a->n_chunk);
    const int all = e->n_sm / c.parts;
    a->parts = c.parts;
    a->part = c.part;
    a->depth = c.depth;
    a->groups = a->n_item < all ? a->n_item : all;
    a->n_stage = (c.part + shape<T, NT>::C - 1) / shape<T, NT>::C;
    a->run = lg_run_of(a->n_stage, (a->n_item + a->groups - 1) / a->groups * a->span, WARPS);
    const int units = (a->n_stage + a->run - 1) / a->run * a->span;
    a->wait = shape<T, NT>::most / units;
    cudaFuncSetAttribute((const void *)k_stream_codes<T, NT>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)c.shared);
    lg_cuda_launch(k_stream_codes<T, NT>, dim3((unsigned)(a->groups * c.parts)), dim3(THREADS), (size_t)c.shared, e->stream, true, *a);
}

int64_t lg_cuda_codes_partial(const lg_cuda_env *e, const lg_weight *w, int64_t n_tok) {
    const lg_cuda_weight *p = lg_cuda_packed(w);
    const cut c = n_tok > 1 ? cut_for(e, w->dtype, p->n_chunk, n_tok) : cut{ 0, 0, 0, 0 };
    return c.parts > 1 ? (int64_t)c.parts * p->n_tile * 16 * (n_tok <= 8 ? 8 : 16) * 4 : 0; /* (of gate and up, or of q, k and v, as many in all) */
}

bool lg_cuda_streams_codes(const lg_cuda_env *e, const lg_weight *const *w, int n, int64_t n_tok, bool add) {
    const int64_t bytes = lg_bytes_alike(w, n, w[0]->dtype);
    return e->compute != LG_COMPUTE_F32 && n_tok > 1 && n_tok <= MOST_ROWS && bytes >= LEAST && e->n_sm <= 2 * LG_CODES_GROUPS && !(add && n > 1) &&
           cut_for(e, w[0]->dtype, lg_cuda_packed(w[0])->n_chunk, n_tok).parts > 0;
}

void lg_cuda_stream_codes(const lg_cuda_env *e, const lg_cuda_codes *in, const lg_weight *const *w, float *const *y, int n, bool gate_up, bool add) {
    codes_args a;
    memset(&a, 0, sizeof a);
    a.n_part = n;
    a.span = gate_up ? 2 : 1;
    a.n_item = lg_parts(a.p, w, y, n, gate_up, LG_TILE);
    a.n_chunk = lg_cuda_packed(w[0])->n_chunk;
    a.n_tok = in->n_tok;
    a.pairs = (in->n_tok + 1) / 2;
    a.add = add;
    a.x = in->x;
    a.stride = in->stride;
    a.side = in->side;
    a.squares = in->squares;
    a.n_square = in->n_square;
    a.n_in = lg_cuda_packed(w[0])->n_in;
    a.eps = in->eps;
    a.count = in->count;
    a.partial = (float *)(void *)(in->count + LG_CODES_GROUPS);
    switch (w[0]->dtype) {
#define X(T) case T: in->n_tok <= 8 ? launch<T, 1>(e, &a) : launch<T, 2>(e, &a); break;
        LG_EACH_QUANT(X)
#undef X
    default: break;
    }
}
