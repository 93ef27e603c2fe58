/* What every kernel of decode attention shares: the flat list of work, the feed of rows into shared memory, merging.
 *
 * A segment is (sequence, KV head, chunk of its query heads): the positions it reads are cut into units of 16, and the units
 * of all segments, one after the other, are the flat list. Block b of B takes units [U*b/B, U*(b+1)/B): equal bytes. Its
 * warps take every n_warp-th of them; each warp has its own ring of stages (16 rows of K, 16 of V), fed by 16-byte
 * cp.async from wherever the rows lie, and its own running softmax, so warps meet only where a segment ends in the block.
 *
 * A segment that lies in one block is written out there. Otherwise each of its blocks leaves a partial result and the one
 * that arrives last merges them in block order: the result depends on the grid, never on timing. */
#ifndef LG_CUDA_DECODE_WORK_CUH
#define LG_CUDA_DECODE_WORK_CUH
#include "ops/cuda/decode_ptx.cuh"
#include "ops/cuda/kv.cuh"

enum { DEC_UNIT = 16, DEC_HEADS = 8, DEC_ROLES = 128 };

typedef struct dec_args {
    float *out;
    const float *q;
    const uint8_t *k, *v;
    const lg_cuda_seq *seqs;
    const int64_t *budget;
    const uint8_t *dense;
    const int32_t *read, *make;       /* device; unless roles_in */
    const int32_t *set_idx, *set_n;
    float *score;
    float *partial;                   /* [block][2][DEC_HEADS*hd + 2*DEC_HEADS]: sums, maxima, totals */
    uint32_t *counter;                /* [segment], zero between launches */
    int64_t set_cap, max_len, row_bytes, sinks;
    float scale2;                     /* scale * log2(e) */
    int32_t n_seq, n_head, n_kv, group, hd, n_slot, block_shift;
    int32_t per_chunk, n_chunk;       /* query heads of a chunk; chunks of a group */
    int32_t hybrid, roles_in;
    int32_t n_stage, row_room, row_chunks; /* stages of a warp; bytes a row takes in shared memory; 16-byte pieces of it */
    int16_t role_read[DEC_ROLES], role_make[DEC_ROLES];
} dec_args;

static __device__ __forceinline__ int64_t dec_min(int64_t a, int64_t b) { return a < b ? a : b; }
static __device__ __forceinline__ int64_t dec_max(int64_t a, int64_t b) { return a > b ? a : b; }

typedef struct dec_seg {
    int64_t begin, end;       /* units */
    int64_t n;                /* positions; those past the last token (in a set's partial block) are masked */
    int32_t len, sinks, jump; /* position i is token i, from `sinks` on i + jump */
    int32_t index, s, h, c;
    bool score;
    const int32_t *page, *ids; /* ids: a set's blocks, else NULL */
} dec_seg;

static __device__ __forceinline__ void dec_seg_load(dec_seg *g, const dec_args &a, int32_t index, int64_t begin) {
    const int32_t row = index / a.n_chunk;
    g->index = index;
    g->c = index % a.n_chunk;
    g->s = row / a.n_kv;
    g->h = row % a.n_kv;
    const lg_cuda_seq q = a.seqs[g->s];
    g->len = (int32_t)q.len;
    g->page = q.page;
    g->ids = NULL;
    g->n = q.len;
    g->sinks = g->len;
    g->jump = 0;
    g->score = false;
    if (a.hybrid && !a.dense[g->s]) {
        const int32_t read = a.roles_in ? a.role_read[g->h] : a.read[g->h];
        if (read >= 0) {
            const int64_t slot = (int64_t)g->s * a.n_slot + read;
            g->ids = a.set_idx + slot * a.set_cap;
            g->n = q.len > 0 ? (int64_t)a.set_n[slot] << a.block_shift : 0;
        } else if (read == LG_HEAD_WINDOW) {
            g->sinks = (int32_t)dec_min(dec_max(a.sinks, 0), q.len);
            g->jump = (int32_t)(dec_min(q.len, dec_max(g->sinks, q.len - (a.budget[g->s] - a.sinks))) - g->sinks);
            g->n = q.len - g->jump;
        } else {
            g->score = g->c == 0 && (a.roles_in ? a.role_make[g->h] : a.make[g->h]) >= 0;
        }
    }
    g->begin = begin;
    g->end = begin + dec_max(1, (g->n + DEC_UNIT - 1) / DEC_UNIT);
}

/* The block's part of the flat list. Every thread of the block calls it; room: 34 int64 of shared memory. */
typedef struct dec_part { int64_t total, lo, hi; int32_t n_block; dec_seg first; } dec_part;
/* First unit of block b: total * b / n_block without a 64-bit division (total < 2^32: units of 16 positions). */
static __device__ __forceinline__ int64_t dec_lo(const dec_part &p, int32_t b) {
    const uint32_t total = (uint32_t)p.total, n = (uint32_t)p.n_block, each = total / n, rest = total - each * n;
    return (int64_t)each * b + rest * (uint32_t)b / n;
}
static __device__ __forceinline__ void dec_cut(dec_part *p, const dec_args &a, int64_t *room) {
    const int32_t n_seg = a.n_seq * a.n_kv * a.n_chunk, tid = (int32_t)threadIdx.x, n_warp = (int32_t)blockDim.x >> 5;
    const int32_t per = (n_seg + (int32_t)blockDim.x - 1) / (int32_t)blockDim.x;
    const int32_t i0 = tid * per < n_seg ? tid * per : n_seg, i1 = i0 + per < n_seg ? i0 + per : n_seg;
    int64_t sum = 0;
    for (int32_t i = i0; i < i1; i++) {
        dec_seg g;
        dec_seg_load(&g, a, i, 0);
        sum += g.end;
    }
    int64_t before = sum; /* inclusive scan over the warp */
    for (int32_t d = 1; d < 32; d <<= 1) {
        const int64_t x = __shfl_up_sync(0xffffffffu, before, d);
        if ((tid & 31) >= d) before += x;
    }
    if ((tid & 31) == 31) room[tid >> 5] = before;
    __syncthreads();
    int64_t total = 0;
    before -= sum;
    for (int32_t w = 0; w < n_warp; w++) {
        const int64_t x = room[w];
        if (w < (tid >> 5)) before += x;
        total += x;
    }
    p->total = total;
    p->n_block = (int32_t)dec_min(total, gridDim.x);
    p->lo = p->hi = 0;
    if ((int32_t)blockIdx.x < p->n_block) {
        p->lo = dec_lo(*p, (int32_t)blockIdx.x);
        p->hi = dec_lo(*p, (int32_t)blockIdx.x + 1);
    }
    if (p->lo < p->hi && before <= p->lo && p->lo < before + sum) { /* one thread */
        int64_t at = before;
        for (int32_t i = i0; i < i1; i++) {
            dec_seg g;
            dec_seg_load(&g, a, i, at);
            if (p->lo < g.end) {
                room[32] = i;
                room[33] = at;
                break;
            }
            at = g.end;
        }
    }
    __syncthreads();
    if (p->lo < p->hi) dec_seg_load(&p->first, a, (int32_t)room[32], room[33]);
}

/* ---- feed: rows of the units to come ----
 * Lane r and lane r + 16 look after row r of a unit. Its token is known two units ahead and its page one unit ahead, so that
 * neither load is waited for. Masked rows copy a neighbour's bytes: what the kernels multiply by zero is always finite. */
typedef struct dec_feed {
    dec_seg g;             /* of the newest unit looked at */
    int64_t next, hi;      /* next unit to look at */
    int32_t stage;         /* that the next unit goes to */
    /* unit after the next: */
    const int32_t *page2;
    int32_t raw2, low2, shift2, len2, h2, state2;
    /* next unit: */
    int32_t tok1, page1, h1, state1;
} dec_feed;
enum { DEC_NONE = -1, DEC_MASKED = 0, DEC_VALID = 1 }; /* states: no row at all, not counted, counted */

static __device__ __forceinline__ void dec_feed_look(dec_feed *f, const dec_args &a, int32_t n_warp) {
    f->state2 = DEC_NONE;
    if (f->next >= f->hi) return;
    while (f->next >= f->g.end) dec_seg_load(&f->g, a, f->g.index + 1, f->g.end);
    const dec_seg &g = f->g;
    if (g.n > 0) {
        const int64_t at = (f->next - g.begin) * DEC_UNIT + (threadIdx.x & 15);
        const int64_t p = at < g.n ? at : g.n - 1;
        f->state2 = at < g.n ? DEC_VALID : DEC_MASKED;
        f->page2 = g.page;
        f->len2 = g.len;
        f->h2 = g.h;
        if (g.ids) {
            f->raw2 = g.ids[p >> a.block_shift];
            f->low2 = (int32_t)(p & ((1 << a.block_shift) - 1));
            f->shift2 = a.block_shift;
        } else {
            f->raw2 = (int32_t)p + (p < g.sinks ? 0 : g.jump);
            f->low2 = 0;
            f->shift2 = 0;
        }
    }
    f->next += n_warp;
}

static __device__ __forceinline__ void dec_feed_turn(dec_feed *f, const dec_args &a, int32_t n_warp) {
    f->state1 = f->state2;
    if (f->state2 != DEC_NONE) {
        int64_t tok = ((int64_t)f->raw2 << f->shift2) + f->low2;
        if (tok >= f->len2) {
            tok = f->len2 - 1;
            f->state1 = DEC_MASKED;
        }
        f->tok1 = (int32_t)tok;
        f->h1 = f->h2;
        f->page1 = f->page2[tok / LG_PAGE];
    }
    dec_feed_look(f, a, n_warp);
}

static __device__ __forceinline__ void dec_feed_begin(dec_feed *f, const dec_args &a, const dec_part &p, int32_t warp, int32_t n_warp) {
    f->g = p.first;
    f->next = p.lo + warp;
    f->hi = p.hi;
    f->stage = 0;
    dec_feed_look(f, a, n_warp);
    dec_feed_turn(f, a, n_warp);
}

/* Starts the copies of the next unit. CHUNKS: 16-byte pieces of a row, 0: a.row_chunks. ROOM: bytes a row takes in shared memory.
 * meta[r]: distance of row r's first byte from its room's; negative (top bit) where the row does not count. */
template <int CHUNKS, bool SHIFTED>
static __device__ __forceinline__ void dec_feed_issue(dec_feed *f, const dec_args &a, int32_t n_warp, lg_smem ring, lg_smem meta, int32_t room) {
    const int32_t lane = (int32_t)threadIdx.x & 31;
    const lg_smem to = ring + (lg_smem)(f->stage * 2 * DEC_UNIT * room);
    if (__any_sync(0xffffffffu, f->state1 != DEC_NONE)) { /* the same in all lanes */
        const int64_t row = ((int64_t)f->page1 * a.n_kv + f->h1) * LG_PAGE + (f->tok1 & (LG_PAGE - 1));
        const int64_t off = row * a.row_bytes;
        if (lane < DEC_UNIT)
            lg_sts32(meta + (lg_smem)((f->stage * DEC_UNIT + lane) * 4), (uint32_t)(off & 15) | (f->state1 == DEC_VALID ? 0 : 0x80000000u));
        if constexpr (CHUNKS > 0) {
#pragma unroll
            for (int32_t i = 0; i < (CHUNKS * DEC_UNIT + 31) / 32; i++) {
                const int32_t at = i * 32 + lane, r = at / CHUNKS, c = at % CHUNKS;
                const int64_t o = __shfl_sync(0xffffffffu, off, r & 15);
                if (CHUNKS * DEC_UNIT % 32 == 0 || r < DEC_UNIT) {
                    const int64_t src = (SHIFTED ? o & ~(int64_t)15 : o) + c * 16;
                    lg_cp16(to + (lg_smem)(r * room + c * 16), a.k + src);
                    lg_cp16(to + (lg_smem)((DEC_UNIT + r) * room + c * 16), a.v + src);
                }
            }
        } else {
            for (int32_t i = 0; i < DEC_UNIT; i += 2) {
                const int32_t r = i + (lane >> 4);
                const int64_t o = __shfl_sync(0xffffffffu, off, r);
                const int64_t last = (o & 15) + a.row_bytes;
                for (int32_t c = lane & 15; c * 16 < last; c += 16) {
                    lg_cp16(to + (lg_smem)(r * room + c * 16), a.k + (o & ~(int64_t)15) + c * 16);
                    lg_cp16(to + (lg_smem)((DEC_UNIT + r) * room + c * 16), a.v + (o & ~(int64_t)15) + c * 16);
                }
            }
        }
    }
    lg_cp_commit(); /* also where nothing was copied: groups are counted */
    f->stage = f->stage + 1 == a.n_stage ? 0 : f->stage + 1;
    dec_feed_turn(f, a, n_warp);
}

/* ---- merging ----
 * A slot holds one warp's (or one block's) state of a chunk of heads: sums [ng][hd], then at DEC_HEADS*hd the maxima and totals. */
static __device__ __host__ __forceinline__ int32_t dec_slots(int32_t n_warp) { return n_warp >= 8 ? 4 : n_warp > 1 ? n_warp / 2 : 1; } /* of a block */
static __device__ __forceinline__ int32_t dec_slot_floats(int32_t hd) { return DEC_HEADS * hd + 2 * DEC_HEADS; }
static __device__ __forceinline__ float dec_exp(float x, float max) { return max == -INFINITY ? 0.0f : exp2f(x - max); }
static __device__ __forceinline__ int32_t dec_block_of(int64_t unit, const dec_part &p) { return (int32_t)(((unit + 1) * p.n_block - 1) / p.total); }

/* Partial results -> out. Piece 0 lies at p0, piece i at p1 + i*stride. Threads are groups of one per W numbers of `out`; group k takes
 * pieces k, k + groups, ...; all loads of DEC_PIECES pieces are in flight together. room: (W + 2) floats a thread. */
enum { DEC_PIECES = 8 };
template <int W>
static __device__ __forceinline__ void dec_merge(float *out, const float *p0, const float *p1, int64_t stride, int32_t n, int32_t ng, int32_t hd, float *room) {
    const int32_t tid = (int32_t)threadIdx.x, n_thread = (int32_t)blockDim.x, wide = ng * hd / W, groups = wide < n_thread ? n_thread / wide : 1;
    const int32_t k = groups > 1 ? tid / wide : 0;
    for (int32_t e = tid - k * wide; e < wide && k < groups; e += n_thread) { /* once, but for more numbers than threads */
        const int32_t h = W * e / hd, at = DEC_HEADS * hd + h;
        float max = -INFINITY, sum = 0, x[W];
#pragma unroll
        for (int32_t w = 0; w < W; w++) x[w] = 0;
        for (int32_t i0 = k; i0 < n; i0 += groups * DEC_PIECES) {
            float m[DEC_PIECES], l[DEC_PIECES], v[DEC_PIECES][W];
#pragma unroll
            for (int32_t i = 0; i < DEC_PIECES; i++) {
                const int32_t j = i0 + i * groups;
                const float *from = j > 0 && j < n ? p1 + j * stride : p0;
                m[i] = __ldcg(from + at);
                l[i] = __ldcg(from + at + DEC_HEADS);
                if (j >= n) m[i] = -INFINITY;
                if constexpr (W == 4) {
                    const float4 y = __ldcg((const float4 *)(const void *)from + e);
                    v[i][0] = y.x;
                    v[i][1] = y.y;
                    v[i][2] = y.z;
                    v[i][3] = y.w;
                } else {
                    const float2 y = __ldcg((const float2 *)(const void *)from + e);
                    v[i][0] = y.x;
                    v[i][1] = y.y;
                }
            }
            float top = max;
#pragma unroll
            for (int32_t i = 0; i < DEC_PIECES; i++) top = fmaxf(top, m[i]);
            const float f = dec_exp(max, top);
            max = top;
            sum *= f;
#pragma unroll
            for (int32_t w = 0; w < W; w++) x[w] *= f;
#pragma unroll
            for (int32_t i = 0; i < DEC_PIECES; i++) {
                const float c = dec_exp(m[i], max);
                sum += c * l[i];
#pragma unroll
                for (int32_t w = 0; w < W; w++) x[w] += c * v[i][w];
            }
        }
        if (groups > 1) {
            float *to = room + tid * (W + 2);
#pragma unroll
            for (int32_t w = 0; w < W; w++) to[w] = x[w];
            to[W] = max;
            to[W + 1] = sum;
        } else {
            const float r = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
            for (int32_t w = 0; w < W; w++) out[W * e + w] = x[w] * r;
        }
    }
    if (groups > 1) {
        __syncthreads();
        if (tid < wide) {
            float max = -INFINITY, sum = 0, x[W];
#pragma unroll
            for (int32_t w = 0; w < W; w++) x[w] = 0;
            for (int32_t i = 0; i < groups; i++) max = fmaxf(max, room[(i * wide + tid) * (W + 2) + W]);
            for (int32_t i = 0; i < groups; i++) {
                const float *from = room + (i * wide + tid) * (W + 2), c = dec_exp(from[W], max);
                sum += c * from[W + 1];
#pragma unroll
                for (int32_t w = 0; w < W; w++) x[w] += c * from[w];
            }
            const float r = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
            for (int32_t w = 0; w < W; w++) out[W * tid + w] = x[w] * r;
        }
    }
}

/* The slots of the block's warps -> the output, or a partial result. Every thread of the block calls it. */
static __device__ __forceinline__ void dec_finish(const dec_args &a, const dec_part &p, const dec_seg &g, float *slots, int32_t n_slot) {
    const int32_t hd = a.hd, size = dec_slot_floats(hd), tid = (int32_t)threadIdx.x, n_thread = (int32_t)blockDim.x;
    const int32_t ng = (int32_t)dec_min(a.per_chunk, a.group - g.c * a.per_chunk), mx = DEC_HEADS * hd, tot = mx + DEC_HEADS;
    const bool whole = g.begin >= p.lo && g.end <= p.hi;
    float *out = a.out + ((int64_t)g.s * a.n_head + (int64_t)g.h * a.group + g.c * a.per_chunk) * hd;
    float *part = a.partial + ((int64_t)blockIdx.x * 2 + (g.begin < p.lo ? 0 : p.lo < g.begin)) * size;
    __syncthreads(); /* slots are written */
    for (int32_t i = tid; i < ng * hd / 2; i += n_thread) {
        const int32_t h = 2 * i / hd;
        float max = -INFINITY, sum = 0, x = 0, y = 0;
        for (int32_t s = 0; s < n_slot; s++) max = fmaxf(max, slots[s * size + mx + h]);
        for (int32_t s = 0; s < n_slot; s++) {
            const float f = dec_exp(slots[s * size + mx + h], max);
            sum += f * slots[s * size + tot + h];
            x += f * slots[s * size + 2 * i];
            y += f * slots[s * size + 2 * i + 1];
        }
        if (whole) {
            const float r = sum == 0.0f ? 0.0f : 1.0f / sum;
            out[2 * i] = x * r;
            out[2 * i + 1] = y * r;
        } else {
            part[2 * i] = x;
            part[2 * i + 1] = y;
            if (2 * i == h * hd) {
                part[mx + h] = max;
                part[tot + h] = sum;
            }
        }
    }
    if (!whole) {
        const int32_t first = dec_block_of(g.begin, p), n = dec_block_of(g.end - 1, p) - first + 1;
        uint32_t *flag = (uint32_t *)(void *)slots;
        __syncthreads(); /* partial is written, slots are free */
        if (tid == 0) {
            __threadfence();
            flag[0] = atomicInc(&a.counter[g.index], (uint32_t)n - 1) == (uint32_t)n - 1;
        }
        __syncthreads();
        if (flag[0]) { /* the last of the segment's blocks */
            __threadfence();
            /* A block holds a segment that began before it in its part 0; the first block in part 1 if others stand before. */
            const int64_t stride = (int64_t)2 * size;
            const float *p1 = a.partial + first * stride, *p0 = p1 + (dec_lo(p, first) < g.begin ? size : 0);
            if (hd % 4 == 0) dec_merge<4>(out, p0, p1, stride, n, ng, hd, slots + 4);
            else dec_merge<2>(out, p0, p1, stride, n, ng, hd, slots + 4);
        }
    }
    __syncthreads(); /* slots may be written again */
}
#endif
