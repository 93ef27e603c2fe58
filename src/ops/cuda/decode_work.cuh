/* What every kernel of decode attention shares: the list of work, the feed of rows into shared memory, merging.
 *
 * A segment is (sequence, KV head, chunk of its query heads); the positions it reads are cut into units of 16, and the units of all
 * segments, one after the other, are the list. A block takes a stretch of it, all of equal weight: rows gathered for a set take
 * longer than rows that lie side by side, and a segment takes time to begin. Where segments are few, each has blocks of its own instead, for to finish a second segment
 * takes a block longer than the last units of its share.
 * The warps of a block take its units in turn; each has its own ring of stages (16 rows of K, 16 of V), fed from wherever the rows lie,
 * and its own running softmax, so warps meet only where a segment ends. Rows are copied in pieces of 16 bytes (cp.async), or (BULK) by bulk
 * copies: one for each row, or (WHOLE) together where 16 of them lie side by side, which then have no padding between them: as one copy, or as
 * boxes of 64 columns of a tensor map. (A warp asks for a row in 40 ns, so that rows one by one keep it busy for longer than their arithmetic.)
 *
 * A segment that lies in one stretch is written out there. Otherwise each of its blocks leaves a partial result and the one that
 * arrives last merges them in block order, or, where segments have blocks of their own, those that arrive last wait for each other and
 * merge a part each: the result depends on the grid, never on timing.
 *
 * Dense launches fill the rings before they wait for the op before them, which writes queries and the newest rows and nothing else
 * (lg_cuda_decode.early): lengths, pages and rows of old tokens are there. So do hybrid ones whose sets are of known size, where a
 * block reads no set, or waits for a counter that says they are made (lg_cuda_decode.made). */
#ifndef LG_CUDA_DECODE_WORK_CUH
#define LG_CUDA_DECODE_WORK_CUH
#include "ops/cuda/decode_ptx.cuh"
#include "ops/cuda/kv.cuh"
#include "ops/cuda/product.cuh"

enum { DEC_UNIT = 16, DEC_HEADS = 8, DEC_ROLES = LG_CUDA_SPREAD, DEC_WARPS = 12, DEC_HELPERS = 8 }; /* warps, helpers: at most */
#ifndef DEC_MANY
#define DEC_MANY 16 /* blocks of a segment from which on helpers merge it: twice as many as helpers, so that most blocks wait for nobody */
#endif

enum { DEC_NO_WHOLE, DEC_ONE_COPY, DEC_BOXES }; /* WHOLE */
typedef struct dec_args {
    lg_box_map box[2];                /* of K, of V */
    float *out;
    uint16_t *rows;                   /* as in lg_cuda_decode */
    const float *q;
    const uint8_t *k, *v;
    const lg_cuda_seq *seqs;
    const int64_t *budget;
    const uint8_t *dense;
    const int32_t *read, *make;       /* device; unless roles_in */
    const int32_t *set_idx, *set_n;
    float *score;
    float *partial;                   /* [block][2]: DEC_HEADS*hd sums, DEC_HEADS pairs of maximum and total */
    uint32_t *counter;                /* [segment][2]: blocks that have arrived, in all launches; those of launches before this one */
    lg_cuda_raw raw;
    lg_cuda_count made;               /* of lg_cuda_decode; only with raw */
    int64_t set_cap, max_len, row_bytes;
    uint32_t begin;                   /* what it weighs to begin a segment; at most half a share */
    int32_t sinks, recents, least;    /* least -1: a window has the whole budget */
    float scale2;                     /* scale * log2(e) */
    float group_rate;                 /* 1 / group */
    int32_t n_seq, n_head, n_kv, group, hd, n_set, block_shift;
    int32_t per_chunk, n_chunk;       /* query heads of a chunk; chunks of a group */
    int32_t hybrid, roles_in, release, few, sized, whole; /* whole: full units come as WHOLE says; few: segments have blocks of their own; sized: lg_cuda_decode.sized, and few */
    int32_t n_stage, row_room, row_chunks; /* stages of a warp; bytes a row takes in shared memory; 16-byte pieces of it */
    int32_t n_slot, slot_heads;       /* of a block; of a slot */
    int16_t role_read[DEC_ROLES], role_make[DEC_ROLES];
    int32_t role_share[DEC_ROLES];    /* of a window, or (sized) of the set that is read, as in lg_ops_share */
} dec_args;

static __device__ __forceinline__ int64_t dec_min(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct dec_seg {
    int32_t begin, end;       /* units: its place in the list */
    int32_t n;                /* positions; those past the last token (in a set's partial block) are masked */
    int32_t len, sinks, jump; /* position i is token i, from `sinks` on i + jump */
    int32_t index, s, h, c;
    bool score;
    const int32_t *page, *ids; /* ids: a set's blocks, else NULL */
} dec_seg;

/* What is loaded for a segment, all of it in flight together. */
typedef struct dec_raw {
    int32_t s, h, c;
    int32_t len;
    const int32_t *page;
    bool dense;
    int64_t budget;
    int32_t read, set_n; /* set_n: of the set that is read, unless a.sized */
} dec_raw;
static __device__ __forceinline__ dec_raw dec_raw_of(const dec_args &a, int32_t index) {
    dec_raw r = { 0, index, 0, 0, NULL, true, 0, -1, 0 };
    if (a.n_seq > 1 || a.n_chunk > 1) {
        const int32_t row = index / a.n_chunk;
        r.c = index % a.n_chunk;
        r.s = row / a.n_kv;
        r.h = row % a.n_kv;
    }
    if (a.hybrid) {
        r.read = a.roles_in ? a.role_read[r.h] : a.read[r.h];
        r.dense = a.dense[r.s];
        r.budget = a.budget[r.s];
        if (r.read >= 0 && !a.sized) r.set_n = a.set_n[(int64_t)r.s * a.n_set + r.read];
    }
    r.len = (int32_t)a.seqs[r.s].len;
    r.page = a.seqs[r.s].page;
    return r;
}
/* begin: see dec_seg. */
static __device__ __forceinline__ dec_seg dec_seg_of(const dec_args &a, int32_t index, int32_t begin, const dec_raw &r) {
    dec_seg g;
    g.index = index;
    g.c = r.c;
    g.s = r.s;
    g.h = r.h;
    g.len = r.len;
    g.page = r.page;
    g.ids = NULL;
    g.n = g.len;
    g.sinks = g.len;
    g.jump = 0;
    g.score = false;
    if (a.hybrid) {
        const int32_t budget = (int32_t)dec_min(r.budget, INT32_MAX);
        if (!r.dense && r.read >= 0) {
            g.ids = a.set_idx + ((int64_t)g.s * a.n_set + r.read) * a.set_cap;
            g.n = g.len > 0 ? r.set_n << a.block_shift : 0;
            if (a.sized && g.len > 0) {
                const lg_cuda_span_as<int32_t> span = lg_cuda_span_of(g.len, lg_cuda_share(budget, a.least, a.role_share[g.h]), a.sinks, a.recents, a.block_shift);
                const int32_t n = span.head + span.k + span.n - span.tail;
                g.n = (n < a.set_cap ? n : (int32_t)a.set_cap) << a.block_shift;
            }
        } else if (!r.dense && r.read == LG_HEAD_WINDOW) {
            const int32_t own = lg_cuda_share(budget, a.least, a.role_share[g.h]), back = g.len - own; /* of which sinks take a part */
            g.sinks = a.sinks < g.len ? a.sinks : g.len;
            g.jump = back < 0 ? 0 : back < g.len - g.sinks ? back : g.len - g.sinks;
            g.n = g.len - g.jump;
        } else if (!r.dense) {
            g.score = g.c == 0 && (a.roles_in ? a.role_make[g.h] : a.make[g.h]) >= 0;
        }
    }
    g.begin = begin;
    g.end = begin + (g.n > DEC_UNIT ? (int32_t)((uint32_t)(g.n - 1) / DEC_UNIT) + 1 : 1);
    return g;
}
static __device__ __forceinline__ dec_seg dec_seg_of(const dec_args &a, int32_t index, int32_t begin) { return dec_seg_of(a, index, begin, dec_raw_of(a, index)); }
/* Code that few launches run is kept out of line (what runs once comes from L2, past a queue of rows: the less of it, the better).
 * By a whole warp; *g is shared memory. */
static __device__ LG_NOINLINE void dec_seg_load(dec_seg *g, const dec_args &a, int32_t index, int32_t begin) {
    const dec_seg own = dec_seg_of(a, index, begin);
    __syncwarp(); /* nobody reads the segment before */
    if ((threadIdx.x & 31) == 0) *g = own;
    __syncwarp();
}
/* Units and what one of them weighs. ALONE: of a set in blocks that read nothing else (few). */
enum { DEC_WEIGHT_ROW = 2, DEC_WEIGHT_SET = 3, DEC_WEIGHT_ALONE = 4 };
/* To finish a segment and go on with the next takes a block some 7 us, in which others read so many bytes (docs/speed-cuda-attend.md, 68). */
#ifndef DEC_BEGIN_BYTES
#define DEC_BEGIN_BYTES (200 << 10)
#endif
typedef struct dec_size { uint32_t units, weight; } dec_size;
static __device__ __forceinline__ dec_size dec_size_of(const dec_seg &g, uint32_t set = DEC_WEIGHT_SET) {
    return dec_size{ (uint32_t)(g.end - g.begin), g.ids ? set : (uint32_t)DEC_WEIGHT_ROW };
}
static __device__ LG_NOINLINE dec_size dec_size_of(const dec_args &a, int32_t index) { return dec_size_of(dec_seg_of(a, index, 0)); }

/* Units before this one are full: 16 counted rows that lie side by side in a page, and come together. */
static __device__ __forceinline__ int32_t dec_full(const dec_args &a, const dec_seg &g) { return g.begin + (!a.whole || g.ids || g.jump ? 0 : (int32_t)((uint32_t)g.n / DEC_UNIT)); }

/* Sums over segments: units, their weight. */
typedef struct dec_sums { uint32_t units, weight; } dec_sums;
static __device__ __forceinline__ dec_sums dec_add(const dec_sums &a, const dec_sums &b) { return dec_sums{ a.units + b.units, a.weight + b.weight }; }
static __device__ __forceinline__ dec_sums dec_sums_of(const dec_size &g, uint32_t begin = 0) { return dec_sums{ g.units, begin + g.units * g.weight }; }
/* How the list is cut where segments share blocks, the same in all blocks. */
typedef struct dec_plan {
    int32_t blocks;           /* that have a stretch */
    uint32_t begin;           /* of a segment: in `all` and in sums over segments */
    dec_sums all;
} dec_plan;
/* The blocks that leave partial results of a segment; late: the first of them begins with another segment. */
typedef struct dec_join { int32_t first, blocks, late, helpers; } dec_join; /* helpers: the last of the blocks, which merge a part each */
/* Units [lo, hi), from segment `index` on, which begins at `begin`. */
typedef struct dec_stretch { int32_t index, begin, lo, hi; } dec_stretch;
typedef struct dec_shared { /* of the block, beside rings and slots */
    dec_plan plan;
    dec_stretch at;
    dec_sums after;           /* the running segment and those before it */
    dec_join join;            /* of the running segment */
    dec_sums scan[DEC_WARPS];
    dec_seg ahead[DEC_WARPS]; /* what each warp's feed is at */
    dec_seg next;             /* the running segment, unless it is the first */
    int32_t part;             /* of the merge; < 0: none */
} dec_shared;

/* total * b / n without a 64-bit division. */
static __device__ __forceinline__ uint32_t dec_share(uint32_t total, uint32_t n, uint32_t b) {
    const uint32_t each = total / n, rest = total - each * n;
    return each * b + rest * b / n;
}
/* Whose share holds position `at` of the weights. */
static __device__ __forceinline__ int32_t dec_block_of(const dec_plan &p, uint32_t at) {
    return (int32_t)((((uint64_t)at + 1) * (uint32_t)p.blocks - 1) / p.all.weight);
}

/* Where segments share blocks. before: of the segments before g. One helper: who helps waits, and may have another segment to go on with. */
static __device__ __forceinline__ dec_join dec_join_of(const dec_plan &p, const dec_size &g, const dec_sums &before) {
    const uint32_t w = before.weight + p.begin;
    const int32_t first = dec_block_of(p, w + g.weight - 1), last = dec_block_of(p, w + g.units * g.weight - 1);
    return dec_join{ first, last - first + 1, dec_share(p.all.weight, (uint32_t)p.blocks, (uint32_t)first) < before.weight, 1 };
}

/* Sums over the threads before this one and (all) over the block; those from the n_warp'th warp on have nothing. */
static __device__ __forceinline__ dec_sums dec_scan(const dec_sums &own, dec_sums *all, dec_sums *room, int32_t n_warp) {
    const int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x >> 5;
    dec_sums x = own, before = { 0, 0 };
#pragma unroll
    for (int32_t d = 1; d < 32; d <<= 1) {
        const dec_sums y = { __shfl_up_sync(0xffffffffu, x.units, d), __shfl_up_sync(0xffffffffu, x.weight, d) };
        if (lane >= d) x = dec_add(x, y);
    }
    __syncthreads(); /* room is free */
    if (lane == 31) room[warp] = x;
    __syncthreads();
    *all = before;
    for (int32_t w = 0; w < n_warp; w++) {
        if (w == warp) before = *all;
        *all = dec_add(*all, room[w]);
    }
    before = dec_add(before, x);
    return dec_sums{ before.units - own.units, before.weight - own.weight };
}

/* a / b of 0 <= a < 2^28, 0 < b < 2^15: short code. */
static __device__ __forceinline__ int32_t dec_divide(int32_t a, int32_t b) {
    int32_t q = (int32_t)__fdividef((float)a, (float)b);
    q += (int32_t)__fdividef((float)(a - q * b), (float)b); /* the first one may be off by 2^-22 of itself, this one by less than 1 */
    const int32_t rest = a - q * b;
    return rest < 0 ? q - 1 : rest >= b ? q + 1 : q;
}

/* Few segments: a lane looks after one, and every warp does it for itself. Fills sh (by the first warp: seen after the next barrier of the block), *at and
 * *first, the segment at `at`, in shared memory. raw: of segment `lane`, or of any. Returns false for a block without work. */
static __device__ __forceinline__ bool dec_cut_few(const dec_args &a, dec_shared *sh, dec_stretch *at, dec_seg *first, const dec_raw &raw) {
    const int32_t lane = (int32_t)threadIdx.x & 31, n_seg = a.n_seq * a.n_kv * a.n_chunk, block = (int32_t)blockIdx.x;
    dec_seg g = {};
    if (lane < n_seg) g = dec_seg_of(a, lane, 0, raw);
    const dec_size size = dec_size_of(g, DEC_WEIGHT_ALONE);
    const uint32_t weight = size.units * size.weight;
    uint32_t all = weight;
#pragma unroll
    for (int32_t d = 16; d; d >>= 1) all += __shfl_xor_sync(0xffffffffu, all, d);
    /* Blocks of its own: in all at most gridDim.x; none takes much more than its share. */
    const uint32_t n = (uint32_t)__fdividef((float)weight * (float)((int32_t)gridDim.x - n_seg), (float)all) + 1, own = n < size.units ? n : size.units;
    /* With those of the lanes before. Blocks that read sets, which may have to wait, come last: in the upper half of `blocks`. */
    uint32_t units = size.units, blocks = g.ids ? own << 16 : own;
#pragma unroll
    for (int32_t d = 1; d < 32; d <<= 1) {
        const uint32_t u = __shfl_up_sync(0xffffffffu, units, d), b = __shfl_up_sync(0xffffffffu, blocks, d);
        units += lane >= d ? u : 0;
        blocks += lane >= d ? b : 0;
    }
    const uint32_t without = __shfl_sync(0xffffffffu, blocks, 31) & 0xffff;
    const int32_t first_block = (int32_t)((g.ids ? without + (blocks >> 16) : blocks & 0xffff) - own);
    const bool here = first_block <= block && block < first_block + (int32_t)own;
    const uint32_t who = __ballot_sync(0xffffffffu, here);
    if (!who) return false;
    if (here) {
        const int32_t k = block - first_block, each = dec_divide((int32_t)size.units, (int32_t)own), rest = (int32_t)size.units - each * (int32_t)own;
        at->index = lane;
        at->begin = g.begin = (int32_t)(units - size.units);
        g.end = (int32_t)units;
        at->lo = g.begin + each * k + (k < rest ? k : rest); /* the first `rest` blocks have one more */
        at->hi = at->lo + each + (k < rest);
        *first = g;
        if (threadIdx.x < 32) {
            sh->at = *at;
            sh->join = dec_join{ first_block, (int32_t)own, 0, own >= DEC_MANY ? (int32_t)dec_min(own, DEC_HELPERS) : 1 };
        }
    }
    at->lo = __shfl_sync(0xffffffffu, at->lo, __ffs((int)who) - 1);
    at->hi = __shfl_sync(0xffffffffu, at->hi, __ffs((int)who) - 1);
    __syncwarp();
    return true;
}

/* Many segments: fills sh; every thread of the block calls it. Returns false for a block without work. */
static __device__ LG_NOINLINE bool dec_cut_many(const dec_args &a, dec_shared *sh) {
    const int32_t n_seg = a.n_seq * a.n_kv * a.n_chunk, n_block = (int32_t)gridDim.x, per = (n_seg + (int32_t)blockDim.x - 1) / (int32_t)blockDim.x;
    const int32_t i0 = (int32_t)threadIdx.x * per < n_seg ? (int32_t)threadIdx.x * per : n_seg, i1 = i0 + per < n_seg ? i0 + per : n_seg; /* this thread's segments */
    const int32_t used = per > 1 ? (int32_t)blockDim.x >> 5 : (n_seg + 31) >> 5; /* warps that have segments */
    dec_plan p = {};
    dec_size first = { 0, 0 }; /* of this thread; more than one are rare */
    if (i0 < i1) first = dec_size_of(a, i0);
    dec_sums mine = { 0, 0 };
    for (int32_t i = i0; i < i1; i++) mine = dec_add(mine, dec_sums_of(i > i0 ? dec_size_of(a, i) : first));
    dec_sums at = dec_scan(mine, &p.all, sh->scan, used);
    p.blocks = (int32_t)(p.all.weight / DEC_WEIGHT_SET); /* every share holds a unit */
    p.blocks = p.blocks > n_block ? n_block : p.blocks < 1 ? 1 : p.blocks;
    const uint32_t share = p.all.weight / (uint32_t)p.blocks;
    p.begin = share < 16 ? 0 : a.begin < share / 2 ? a.begin : share / 2; /* (so every share still holds a unit) */
    p.all.weight += (uint32_t)n_seg * p.begin;
    at.weight += (uint32_t)i0 * p.begin;
    if ((int32_t)blockIdx.x >= p.blocks) return false; /* the whole block */
    if (threadIdx.x == 0) sh->plan = p;
    const uint32_t from = dec_share(p.all.weight, (uint32_t)p.blocks, blockIdx.x), to = dec_share(p.all.weight, (uint32_t)p.blocks, blockIdx.x + 1);
    for (int32_t i = i0; i < i1; i++) { /* whoever looks after the segment where the stretch begins, and after that where it ends */
        const dec_size g = i > i0 ? dec_size_of(a, i) : first;
        const int32_t begin = (int32_t)at.units;
        const dec_sums own = dec_sums_of(g, p.begin);
        const uint32_t w = at.weight, first_unit = w + p.begin, end = w + own.weight; /* a unit is in whose share it ends */
        if (w <= from && from < end) {
            sh->at.index = i;
            sh->at.begin = begin;
            sh->at.lo = begin + (int32_t)(from < first_unit ? 0 : (from - first_unit) / g.weight);
            sh->after = dec_add(at, own);
            sh->join = dec_join_of(p, g, at);
        }
        if (w < to && to <= end) sh->at.hi = begin + (int32_t)(to == end ? own.units : to < first_unit ? 0 : (to - first_unit) / g.weight);
        at = dec_add(at, own);
    }
    __syncthreads();
    return true;
}
/* One thread: the stretch goes on with segment g. */
static __device__ LG_NOINLINE void dec_follow(dec_shared *sh, const dec_seg &g) {
    const dec_size size = dec_size_of(g);
    sh->join = dec_join_of(sh->plan, size, sh->after);
    sh->after = dec_add(sh->after, dec_sums_of(size, sh->plan.begin));
}

/* Until the counter says so. Every thread of the block calls it. */
static __device__ __forceinline__ void dec_await(const lg_cuda_count &c) {
    if (threadIdx.x == 0)
        while (lg_look(c.at) < c.n) LG_SPIN();
    __syncthreads();
}

/* ---- feed: rows of the units to come ----
 * Lane r and lane r + 16 look after row r of a unit. Its token is known two units ahead and its page one unit ahead, so that
 * neither load is waited for. Masked rows copy a neighbour's bytes: what the kernels multiply by zero is always finite.
 * WHOLE: of full units (dec_full) only the page matters. */
typedef struct dec_feed {
    dec_seg *g;            /* of the newest unit looked at, in shared memory */
    int32_t next, end, hi; /* next unit to look at; where its segment and where the stretch end */
    int32_t full;          /* WHOLE: dec_full of g */
    int32_t stage;         /* that the next unit goes to */
    /* unit after the next: */
    const int32_t *page2;
    int32_t raw2, low2, shift2, len2, h2, state2; /* WHOLE: raw2 is a full unit's page, low2 its first row there */
    /* next unit: */
    int32_t tok1, page1, h1, state1;
    bool newest1;          /* holds the sequence's newest token */
} dec_feed;
enum { DEC_NONE = -1, DEC_MASKED = 0, DEC_VALID = 1, DEC_BULK = 2 }; /* states: no row at all, not counted, counted, one of a full unit's */

static __device__ __forceinline__ void dec_feed_follow(dec_feed *f, const dec_args &a) {
    f->end = f->g->end < f->hi ? f->g->end : f->hi;
    f->full = dec_full(a, *f->g);
}

template <int WHOLE>
static __device__ __forceinline__ void dec_feed_look(dec_feed *f, const dec_args &a, int32_t n_warp) {
    f->state2 = DEC_NONE;
    if (f->next >= f->hi) return;
    while (f->next >= f->end) {
        dec_seg_load(f->g, a, f->g->index + 1, f->g->end);
        dec_feed_follow(f, a);
    }
    const dec_seg &g = *f->g;
    if (WHOLE && f->next < f->full) {
        const int32_t at = f->next - g.begin;
        f->state2 = DEC_BULK;
        f->raw2 = g.page[at / (LG_PAGE / DEC_UNIT)];
        f->low2 = g.h * LG_PAGE + at % (LG_PAGE / DEC_UNIT) * DEC_UNIT;
        f->len2 = g.len - (at + 1) * DEC_UNIT;
    } else if (g.n > 0) {
        const int32_t at = (f->next - g.begin) * DEC_UNIT + ((int32_t)threadIdx.x & 15), p = at < g.n ? at : g.n - 1;
        f->state2 = at < g.n ? DEC_VALID : DEC_MASKED;
        f->page2 = g.page;
        f->len2 = g.len;
        f->h2 = g.h;
        if (g.ids) {
            f->raw2 = g.ids[p >> a.block_shift];
            f->low2 = p & ((1 << a.block_shift) - 1);
            f->shift2 = a.block_shift;
        } else {
            f->raw2 = p + (p < g.sinks ? 0 : g.jump);
            f->low2 = 0;
            f->shift2 = 0;
        }
    }
    f->next += n_warp;
}

template <int WHOLE>
static __device__ __forceinline__ void dec_feed_turn(dec_feed *f, const dec_args &a, int32_t n_warp) {
    f->state1 = f->state2;
    f->newest1 = false;
    if (WHOLE && f->state2 == DEC_BULK) {
        f->page1 = f->raw2;
        f->tok1 = f->low2;
        f->newest1 = f->len2 == 0;
    } else if (f->state2 != DEC_NONE) {
        int32_t tok = (f->raw2 << f->shift2) + f->low2;
        if (tok >= f->len2) {
            tok = f->len2 - 1;
            f->state1 = DEC_MASKED;
        }
        f->tok1 = tok;
        f->h1 = f->h2;
        f->page1 = f->page2[tok / LG_PAGE];
        f->newest1 = tok == f->len2 - 1;
    }
    dec_feed_look<WHOLE>(f, a, n_warp);
}

template <int WHOLE>
/* *f->g is the segment at `at`. */
static __device__ __forceinline__ dec_seg dec_feed_begin(dec_feed *f, const dec_args &a, const dec_stretch &at, int32_t warp, int32_t n_warp) {
    f->next = at.lo + warp;
    f->hi = at.hi;
    f->stage = 0;
    dec_feed_follow(f, a);
    const dec_seg first = *f->g;
    dec_feed_look<WHOLE>(f, a, n_warp);
    dec_feed_turn<WHOLE>(f, a, n_warp);
    return first; /* the segment that the stretch begins with */
}

/* Whether the next unit's rows may be read before the op before this one has ended: they have long been written. */
static __device__ __forceinline__ bool dec_feed_old(const dec_feed *f) { return !__any_sync(0xffffffffu, f->newest1); }

/* A warp's ring of stages. Per stage: K rows then V rows, `room` bytes kept for each; for each row (where it begins in the stage's K or V
 * rows; float: what is added to its score, -infinity where it does not count); a barrier for bulk copies. Full units of WHOLE kernels have
 * neither padding nor such a list; boxes of 2048 bytes lie one after the other, K's, then from where V's rows begin V's. */
enum { DEC_META = 8, DEC_BAR = 8 };
typedef struct dec_ring { lg_smem rows, meta, bar; } dec_ring;
static __device__ __forceinline__ lg_smem dec_meta(lg_smem meta, int32_t row) { return meta + (lg_smem)(row * DEC_META); }

/* Starts the copies of the next unit. CHUNKS: 16-byte pieces of a row, 0: a.row_chunks. */
template <int CHUNKS, bool SHIFTED, bool BULK, int WHOLE>
static __device__ __forceinline__ void dec_feed_issue(dec_feed *f, const dec_args &a, int32_t n_warp, const dec_ring &ring, int32_t room) {
    const int32_t lane = (int32_t)threadIdx.x & 31;
    const lg_smem to = ring.rows + (lg_smem)(f->stage * 2 * DEC_UNIT * room);
    if (WHOLE && f->state1 == DEC_BULK) {
        const int32_t page = __shfl_sync(0xffffffffu, f->page1, 0), row = __shfl_sync(0xffffffffu, f->tok1, 0);
        const int64_t first = (int64_t)page * (a.n_kv * LG_PAGE) + row, off = first * a.row_bytes;
        const uint32_t bytes = (uint32_t)(DEC_UNIT * a.row_bytes);
        const lg_smem bar = ring.bar + (lg_smem)(f->stage * DEC_BAR);
        if (lane == 0) {
            lg_bar_arrive(bar, 2 * bytes);
            if constexpr (WHOLE == DEC_BOXES) {
#pragma unroll
                for (int32_t i = 0; i < CHUNKS / 8; i++) {
                    lg_box(to + (lg_smem)(i * 2048), &a.box[0], i * 64, (int32_t)first, bar);
                    lg_box(to + (lg_smem)(DEC_UNIT * room + i * 2048), &a.box[1], i * 64, (int32_t)first, bar);
                }
            } else {
                lg_bulk(to, a.k + off, bytes, bar);
                lg_bulk(to + (lg_smem)(DEC_UNIT * room), a.v + off, bytes, bar);
            }
        }
    } else if (__any_sync(0xffffffffu, f->state1 != DEC_NONE)) { /* the same in all lanes */
        const int64_t row = ((int64_t)f->page1 * a.n_kv + f->h1) * LG_PAGE + (f->tok1 & (LG_PAGE - 1));
        const int64_t off = row * a.row_bytes;
        if (lane < DEC_UNIT)
            lg_sts64(dec_meta(ring.meta, f->stage * DEC_UNIT + lane), (uint32_t)(lane * room + (int32_t)(off & 15)),
                     __float_as_uint(f->state1 == DEC_VALID ? 0.0f : -INFINITY));
        if constexpr (BULK) { /* a row a thread: K, then V */
            const lg_smem bar = ring.bar + (lg_smem)(f->stage * DEC_BAR);
            if (lane == 0) lg_bar_arrive(bar, 2 * DEC_UNIT * CHUNKS * 16);
            lg_bulk(to + (lg_smem)(lane * room), (lane < DEC_UNIT ? a.k : a.v) + (off & ~(int64_t)15), CHUNKS * 16, bar);
        } else if constexpr (CHUNKS > 0) {
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
    if (!BULK) lg_cp_commit(); /* also where nothing was copied: groups are counted */
    f->stage = f->stage + 1 == a.n_stage ? 0 : f->stage + 1;
    dec_feed_turn<WHOLE>(f, a, n_warp);
}

/* ---- merging ----
 * A state is of a chunk of n heads: sums [n][hd], maxima [n], totals [n]. A block's warps leave theirs in slots, n = slot_heads; partial
 * results have n = DEC_HEADS. */
static __device__ __host__ __forceinline__ int32_t dec_state_floats(int32_t n, int32_t hd) { return n * hd + 2 * n; }
static __device__ __forceinline__ float dec_exp(float x, float max) { return max == -INFINITY ? 0.0f : exp2f(x - max); }
/* What to subtract from exponents of which this is the largest. */
static __device__ __forceinline__ float dec_base(float max) { return max == -INFINITY ? 0.0f : max; }

/* Partial results -> numbers [e0, e1) * W of `out`. Threads are groups of one per W numbers; group k takes in results k, k + groups, ..., DEC_ROUND at a time
 * (their loads are in flight together), then the groups are merged. (The code is short because it runs once: in a step it comes from L2, past a queue of rows.)
 * room: [groups][e1 - e0] states of W sums, maximum, total. */
enum { DEC_ROUND = 8 };
static __host__ __forceinline__ int64_t dec_merge_floats(int32_t n_thread) { return 6 * n_thread; }
template <int W> struct dec_wide { typedef float4 type; };
template <> struct dec_wide<2> { typedef float2 type; };
template <int HD> /* 0: head_dim */
static __device__ __forceinline__ void dec_merge(float *out, const float *partial, dec_join j, int32_t head_dim, int32_t ng, int32_t part, float *room) {
    enum { W = HD % 4 == 0 && HD > 0 ? 4 : 2, STATE = W + 2 };
    typedef typename dec_wide<W>::type wide_t;
    const int32_t hd = HD ? HD : head_dim, size = dec_state_floats(DEC_HEADS, hd), tid = (int32_t)threadIdx.x, n_thread = (int32_t)blockDim.x, n = j.blocks;
    const int32_t per = dec_divide(ng * hd / W + j.helpers - 1, j.helpers), e0 = (int32_t)dec_min(part * per, ng * hd / W), wide = (int32_t)dec_min(per, ng * hd / W - e0);
    const int32_t groups = per < n_thread ? dec_divide(n_thread, per) : 1, k = groups > 1 ? dec_divide(tid, per) : 0;
    if (groups > 1) LG_TOOK(LG_WAY_GROUPS);
    if (n > DEC_ROUND * groups) LG_TOOK(LG_WAY_ROUNDS);
    if (j.late) LG_TOOK(LG_WAY_LATE);
    for (int32_t i = tid - k * per; k < groups && i < wide; i += n_thread) { /* once, but for more numbers than threads */
        const int32_t e = W * (e0 + i), h = e / hd;
        float x[W], max = -INFINITY, sum = 0;
#pragma unroll
        for (int32_t w = 0; w < W; w++) x[w] = 0;
#pragma unroll 1
        for (int32_t r0 = k; r0 < n; r0 += DEC_ROUND * groups) {
            wide_t v[DEC_ROUND];
            float2 m[DEC_ROUND]; /* maximum, total */
            float top = max;
#pragma unroll
            for (int32_t y = 0; y < DEC_ROUND; y++) { /* beyond the last: the last again, not counted */
                const int32_t at = r0 + y * groups, r = at < n ? at : n - 1;
                const float *of = partial + (int64_t)(2 * r + (r == 0 && j.late)) * size;
                v[y] = __ldcg((const wide_t *)(const void *)(of + e));
                m[y] = __ldcg((const float2 *)(const void *)(of + DEC_HEADS * hd + 2 * h));
            }
#pragma unroll
            for (int32_t y = 0; y < DEC_ROUND; y++) {
                if (r0 + y * groups >= n) m[y].x = -INFINITY;
                top = fmaxf(top, m[y].x);
            }
            const float base = dec_base(top), f = lg_exp2(max - base);
            max = top;
            sum *= f;
#pragma unroll
            for (int32_t w = 0; w < W; w++) x[w] *= f;
#pragma unroll
            for (int32_t y = 0; y < DEC_ROUND; y++) {
                const float c = lg_exp2(m[y].x - base), *z = (const float *)(const void *)&v[y];
                sum += c * m[y].y;
#pragma unroll
                for (int32_t w = 0; w < W; w++) x[w] += c * z[w];
            }
        }
        float *const to = groups > 1 ? room + (k * per + i) * STATE : out + e;
        const float f = groups > 1 ? 1.0f : sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
#pragma unroll
        for (int32_t w = 0; w < W; w++) to[w] = x[w] * f;
        if (groups > 1) {
            to[W] = max;
            to[W + 1] = sum;
        }
    }
    if (groups == 1) return;
    __syncthreads();
    /* A number a thread, or four threads where there are as many. */
    const int32_t split = 4 * wide * W <= n_thread ? 2 : 0, q = tid & ((1 << split) - 1);
#pragma unroll 1
    for (int32_t i = tid >> split; i - (tid >> split) < wide * W; i += n_thread >> split) {
        const float *const of = room + i / W * STATE;
        const int32_t end = i < wide * W ? groups : 0;
        float max = -INFINITY, sum = 0, x = 0;
#pragma unroll 4
        for (int32_t g = q; g < end; g += 1 << split) max = fmaxf(max, of[g * per * STATE + W]);
        if (split) {
            max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
            max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
        }
        const float base = dec_base(max);
#pragma unroll 4
        for (int32_t g = q; g < end; g += 1 << split) {
            const float f = lg_exp2(of[g * per * STATE + W] - base);
            sum += f * of[g * per * STATE + W + 1];
            x += f * of[g * per * STATE + i % W];
        }
        if (split) {
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            x += __shfl_xor_sync(0xffffffffu, x, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            x += __shfl_xor_sync(0xffffffffu, x, 2);
        }
        if (q == 0 && end) out[W * e0 + i] = sum == 0.0f ? 0.0f : __fdividef(x, sum);
    }
}

template <int HD>
static __device__ LG_NOINLINE void dec_merge_apart(float *out, const float *partial, dec_join j, int32_t head_dim, int32_t ng, int32_t part, float *room) {
    dec_merge<HD>(out, partial, j, head_dim, ng, part, room);
}

/* n numbers of a sequence's output from k on, which the block has written, to a.rows; k and n are multiples of 8. */
static __device__ LG_NOINLINE void dec_leave(const dec_args &a, int32_t s, int32_t k, int32_t n) {
    const float *out = a.out + (int64_t)s * a.n_head * a.hd;
    for (int32_t i = k + 8 * (int32_t)threadIdx.x; i < k + n; i += 8 * (int32_t)blockDim.x) {
        const float4 x = __ldcg((const float4 *)(const void *)(out + i)), y = __ldcg((const float4 *)(const void *)(out + i + 4));
        const __align__(16) __nv_bfloat162 v[4] = { __floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w), __floats2bfloat162_rn(y.x, y.y), __floats2bfloat162_rn(y.z, y.w) };
        *(uint4 *)(void *)(a.rows + lg_beside_at(lg_beside(a.n_seq), s, i)) = *(const uint4 *)(const void *)v;
    }
}

/* The slots of the block's warps -> the output, or a partial result. Every thread of the block calls it. APART: registers are scarce. */
template <int HD, bool APART> /* HD 0: a.hd */
static __device__ __forceinline__ void dec_finish(const dec_args &a, dec_shared *sh, const dec_seg &g, float *slots) {
    const int32_t hd = HD ? HD : a.hd, size = dec_state_floats(DEC_HEADS, hd), slot = dec_state_floats(a.slot_heads, hd), tid = (int32_t)threadIdx.x, n_thread = (int32_t)blockDim.x;
    const int32_t ng = (int32_t)dec_min(a.per_chunk, a.group - g.c * a.per_chunk), mx = a.slot_heads * hd, tot = mx + a.slot_heads;
    const int32_t first = (g.h * a.group + g.c * a.per_chunk) * hd;
    float *out = a.out + (int64_t)g.s * a.n_head * hd + first;
    __syncthreads(); /* slots are written */
    const dec_join j = sh->join;
    const bool whole = j.blocks == 1;
    uint32_t *const counter = a.counter + 2 * (int64_t)g.index;
    const uint32_t before = !whole && tid == 0 ? __ldcg(counter + 1) : 0;
    float *part = a.partial + (int64_t)(2 * blockIdx.x + (sh->at.lo < g.begin)) * size; /* a block can hold the end of one segment and the beginning of another */
    for (int32_t i = tid; i < ng * hd / 2; i += n_thread) {
        const int32_t h = 2 * i / hd;
        float max = -INFINITY, sum = 0, x = 0, y = 0;
#pragma unroll 4
        for (int32_t s = 0; s < a.n_slot; s++) max = fmaxf(max, slots[s * slot + mx + h]);
        const float base = dec_base(max);
#pragma unroll 4
        for (int32_t s = 0; s < a.n_slot; s++) {
            const float f = lg_exp2(slots[s * slot + mx + h] - base);
            sum += f * slots[s * slot + tot + h];
            x += f * slots[s * slot + 2 * i];
            y += f * slots[s * slot + 2 * i + 1];
        }
        if (whole) {
            const float r = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
            out[2 * i] = x * r;
            out[2 * i + 1] = y * r;
        } else {
            part[2 * i] = x;
            part[2 * i + 1] = y;
            if (2 * i == h * hd) {
                part[DEC_HEADS * hd + 2 * h] = max;
                part[DEC_HEADS * hd + 2 * h + 1] = sum;
            }
        }
    }
    __syncthreads(); /* partial is written, slots may be written again */
    if (whole) {
        LG_TOOK(LG_WAY_WHOLE);
        if (a.rows) dec_leave(a, g.s, first, ng * hd);
        return;
    }
    if (tid == 0) { /* for the whole block */
        const uint32_t n = (uint32_t)j.blocks, order = lg_arrive(counter) - before;
        const int32_t part = (int32_t)order - (j.blocks - j.helpers);
        if (order == n - 1) counter[1] = before + n; /* all have read it */
        while (part >= 0 && lg_look(counter) - before < n) LG_SPIN();
        sh->part = part;
    }
    __syncthreads();
    if (sh->part < 0) return;
    LG_TOOK(j.helpers > 1 ? LG_WAY_HELPERS : LG_WAY_ALONE);
    const float *partial = a.partial + (int64_t)2 * j.first * size;
    if (APART) dec_merge_apart<HD>(out, partial, j, hd, ng, sh->part, slots);
    else dec_merge<HD>(out, partial, j, hd, ng, sh->part, slots);
    __syncthreads(); /* slots may be written again; the block's part of the output is written */
    if (a.rows) dec_leave(a, g.s, first + sh->part * (ng * hd / j.helpers), ng * hd / j.helpers);
}
#endif
