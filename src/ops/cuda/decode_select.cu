/* Token sets from raw scores on the device: the sets lg_ops_select (ops/select.c) defines, in one launch for all rows (sequence,
 * head that makes a set).
 *
 * A row is shared by up to SEL_BLOCKS blocks, as many as its length of the moment asks for; they meet at barriers of their own
 * (fewer blocks than multiprocessors, small enough to run beside a block of products, started in order: all blocks of a row come to run). Scores become keys
 * that order as unsigned numbers. The key T at the cut is found digit by digit (11, 11, 10 bits) from histograms: of counts for
 * topk and ratio, of probability mass for topp. Then units with keys above T and the first r of those equal to T, in order of
 * position, are written by prefix sums of counts. threshold tests every unit by itself.
 *
 * Sums of exponentials are doubles in a fixed order; masses are added as whole multiples of 2^-62, in any order the same. */
#include "ops/cuda/decode_ptx.cuh"
#include "ops/cuda/cuda.h"

#ifndef SEL_SHARE
#define SEL_SHARE 4096 /* units of a row per block */
#endif
enum { SEL_BLOCKS = 128, SEL_THREADS = 512, SEL_WARPS = SEL_THREADS / 32, SEL_BINS = 2048, SEL_HEADS = LG_CUDA_SPREAD, SEL_BATCH = 8 };
static const double SEL_ONE = 4611686018427387904.0; /* 2^62 */

typedef unsigned long long sel_mass;
/* Of a row. The first part and the histograms behind it (3 of counts or masses) are zero at the start. */
typedef struct sel_zero { uint32_t arrived, ties; uint32_t pad[30]; } sel_zero;
typedef struct sel_info { double sum[SEL_BLOCKS]; sel_mass eq_mass[SEL_BLOCKS]; uint32_t max[SEL_BLOCKS], gt[SEL_BLOCKS], eq[SEL_BLOCKS]; } sel_info;

typedef struct sel_args {
    const float *score;
    const lg_cuda_seq *seqs;
    const int64_t *budget;
    const uint8_t *dense;
    const int32_t *make;    /* device; unless heads_in */
    int32_t *set_idx, *set_n;
    uint8_t *zero;          /* [row] sel_zero and histograms */
    sel_info *info;         /* [row] */
    uint32_t *keys;         /* [row][key_room], blocks of more than one token only */
    int64_t set_cap, max_len, key_room, zero_room, sinks, recents, least;
    double value, scale;
    int32_t n_kv, n_slot, shift, n_list, heads_in; /* shift: log2 of the block */
    int16_t head[SEL_HEADS], slot[SEL_HEADS];
    int32_t share[SEL_HEADS]; /* with `least`, as in lg_ops_share */
} sel_args;

typedef struct sel_row { /* of the running block */
    const float *score;
    uint32_t *keys;         /* NULL: a unit is a token */
    sel_info *info;
    sel_zero *zero;
    int64_t len, n, u0, u1; /* tokens, units, this warp's units */
    int32_t active, phase, shift;
    double scale, max, sum; /* softmax over tokens */
} sel_row;

typedef struct sel_shared {
    sel_mass hist[SEL_BINS]; /* counts lie in the first half */
    sel_mass scan[SEL_WARPS], eq_mass[SEL_WARPS], before;
    double sum[SEL_WARPS], total;
    uint32_t gt[SEL_WARPS], eq[SEL_WARPS], max[SEL_WARPS], bin;
} sel_shared;

static __device__ __forceinline__ int64_t sel_min(int64_t a, int64_t b) { return a < b ? a : b; }
static __device__ __forceinline__ int64_t sel_max(int64_t a, int64_t b) { return a > b ? a : b; }

static __device__ __forceinline__ uint32_t sel_key(float score) {
    const uint32_t x = score == 0.0f ? 0u : __float_as_uint(score); /* -0 ranks as +0 */
    return x & 0x80000000u ? ~x : x | 0x80000000u;
}
static __device__ __forceinline__ float sel_unkey(uint32_t k) { return __uint_as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k); }
static __device__ __forceinline__ uint32_t sel_at(const sel_row &r, int64_t u) { return r.keys ? r.keys[u] : sel_key(r.score[u]); }

/* All threads of the row's blocks. What was written before is seen after (by __ldcg where another block wrote it). */
static __device__ __forceinline__ void sel_meet(sel_row *r) {
    r->phase++;
    if (r->active > 1) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            const uint32_t want = (uint32_t)(r->phase * r->active);
            atomicAdd(&r->zero->arrived, 1u);
            while (*(volatile uint32_t *)&r->zero->arrived < want) LG_SPIN();
            __threadfence();
        }
    }
    __syncthreads();
}

/* Sum over the threads before this one. scan: room of the block. */
static __device__ __forceinline__ sel_mass sel_before(sel_mass x, sel_mass *scan) {
    const int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x >> 5;
    sel_mass s = x;
    for (int32_t d = 1; d < 32; d <<= 1) {
        const sel_mass y = __shfl_up_sync(0xffffffffu, s, d);
        if (lane >= d) s += y;
    }
    __syncthreads();
    if (lane == 31) scan[warp] = s;
    __syncthreads();
    s -= x;
    for (int32_t w = 0; w < warp; w++) s += scan[w];
    return s;
}

static __device__ __forceinline__ double sel_probability(const sel_row &r, float score) { return exp(r.scale * ((double)score - r.max)) / r.sum; }
static __device__ __forceinline__ sel_mass sel_mass_of(const sel_row &r, int64_t u, uint32_t key) {
    sel_mass m = 0;
    if (r.shift == 0) m = (sel_mass)(sel_probability(r, sel_unkey(key)) * SEL_ONE);
    else
        for (int64_t t = u << r.shift; t < sel_min(r.len, (u + 1) << r.shift); t++) m += (sel_mass)(sel_probability(r, r.score[t]) * SEL_ONE);
    return m ? m : 1; /* a unit is never nothing: a bin without mass is empty */
}

static __device__ __forceinline__ void sel_softmax(sel_row *r, sel_shared *sh, double scale) {
    const int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x >> 5;
    uint32_t max = 0;
    for (int64_t u = r->u0 + lane; u < r->u1; u += 32) {
        const uint32_t k = sel_at(*r, u);
        max = k > max ? k : max;
    }
    for (int32_t d = 16; d; d >>= 1) {
        const uint32_t y = __shfl_xor_sync(0xffffffffu, max, d);
        max = y > max ? y : max;
    }
    if (lane == 0) sh->max[warp] = max;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int32_t w = 1; w < SEL_WARPS; w++) max = sh->max[w] > max ? sh->max[w] : max;
        r->info->max[blockIdx.x] = max;
    }
    sel_meet(r);
    max = 0;
    for (int32_t b = 0; b < r->active; b++) {
        const uint32_t y = __ldcg(&r->info->max[b]);
        max = y > max ? y : max;
    }
    r->scale = scale;
    r->max = (double)sel_unkey(max);
    double sum = 0;
    for (int64_t t = (r->u0 << r->shift) + lane; t < sel_min(r->len, r->u1 << r->shift); t += 32) sum += exp(scale * ((double)r->score[t] - r->max));
    for (int32_t d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (lane == 0) sh->sum[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0;
        for (int32_t w = 0; w < SEL_WARPS; w++) sum += sh->sum[w];
        r->info->sum[blockIdx.x] = sum;
    }
    sel_meet(r);
    r->sum = 0;
    for (int32_t b = 0; b < r->active; b++) r->sum += __ldcg(&r->info->sum[b]);
}

/* One digit of T among units [head, tail): histogram of the units whose higher digits are `prefix`, then the bin of the cut.
 * counts: the bin that holds the want-th best (want becomes its rank within the bin). masses: the lowest bin whose mass above
 * is at most `most` (above becomes that mass). */
template <bool MASS>
static __device__ __forceinline__ uint32_t sel_digit(sel_row *r, sel_shared *sh, int64_t head, int64_t tail, int32_t level, uint32_t prefix, sel_mass *want, sel_mass most) {
    const int32_t lane = (int32_t)threadIdx.x & 31, at = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11, bins = 1 << bits;
    uint32_t *count = (uint32_t *)(void *)sh->hist;
    for (int32_t i = (int32_t)threadIdx.x; i < bins; i += SEL_THREADS) {
        if (MASS) sh->hist[i] = 0;
        else count[i] = 0;
    }
    __syncthreads();
    for (int64_t u0 = r->u0; u0 < r->u1; u0 += 32 * SEL_BATCH) {
        uint32_t key[SEL_BATCH];
        bool in[SEL_BATCH];
#pragma unroll
        for (int32_t i = 0; i < SEL_BATCH; i++) {
            const int64_t u = u0 + 32 * i + lane;
            in[i] = u < r->u1 && u >= head && u < tail;
            key[i] = in[i] ? sel_at(*r, u) : 0;
        }
#pragma unroll
        for (int32_t i = 0; i < SEL_BATCH; i++) {
            const uint32_t bin = (key[i] >> at) & (uint32_t)(bins - 1);
            in[i] = in[i] && (level == 0 || (key[i] >> (at + bits)) == prefix);
            if (!MASS && level > 0) { /* few are left, and spread */
                if (in[i]) atomicAdd(&count[bin], 1u);
            } else if (!MASS) { /* lanes of one bin add together */
                const uint32_t peers = __match_any_sync(0xffffffffu, in[i] ? bin : 0xffffffffu);
                if (in[i] && lane == __ffs(peers) - 1) atomicAdd(&count[bin], (uint32_t)__popc(peers));
            } else {
                const sel_mass mass = in[i] ? sel_mass_of(*r, u0 + 32 * i + lane, key[i]) : 0;
                uint32_t left = __ballot_sync(0xffffffffu, in[i]);
                while (left) {
                    const uint32_t b = __shfl_sync(0xffffffffu, bin, __ffs(left) - 1);
                    const bool mine = in[i] && bin == b;
                    sel_mass s = mine ? mass : 0;
                    for (int32_t d = 16; d; d >>= 1) s += __shfl_xor_sync(0xffffffffu, s, d);
                    if (lane == __ffs(left) - 1) atomicAdd(&sh->hist[b], s);
                    left &= ~__ballot_sync(0xffffffffu, mine);
                }
            }
        }
    }
    __syncthreads();
    if (r->active > 1) {
        sel_mass *mass_all = (sel_mass *)(void *)(r->zero + 1) + level * SEL_BINS;
        uint32_t *count_all = (uint32_t *)(void *)(r->zero + 1) + level * SEL_BINS;
        for (int32_t i = (int32_t)threadIdx.x; i < bins; i += SEL_THREADS) {
            if (MASS && sh->hist[i]) atomicAdd(&mass_all[i], sh->hist[i]);
            if (!MASS && count[i]) atomicAdd(&count_all[i], count[i]);
        }
        sel_meet(r);
        for (int32_t i = (int32_t)threadIdx.x; i < bins; i += SEL_THREADS) {
            if (MASS) sh->hist[i] = __ldcg(&mass_all[i]);
            else count[i] = __ldcg(&count_all[i]);
        }
    }
    if (threadIdx.x == 0) sh->bin = 0;
    __syncthreads();
    /* Bins from the highest down, each thread its share. */
    const int32_t share = (bins + SEL_THREADS - 1) / SEL_THREADS, top = bins - 1 - (int32_t)threadIdx.x * share;
    sel_mass mine = 0;
    for (int32_t i = 0; i < share; i++) mine += MASS ? sh->hist[top - i] : count[top - i];
    const sel_mass before = sel_before(mine, sh->scan);
    sel_mass b = before;
    for (int32_t i = 0; i < share; i++) {
        const sel_mass x = MASS ? sh->hist[top - i] : count[top - i];
        if (!MASS && b < *want && *want <= b + x) { /* one bin */
            sh->bin = (uint32_t)(top - i);
            sh->before = b;
        }
        if (MASS && x && *want + b <= most) atomicMax(&sh->bin, (uint32_t)(bins - (top - i))); /* the lowest */
        b += x;
    }
    __syncthreads();
    if (MASS) {
        b = before;
        for (int32_t i = 0; i < share; i++) {
            if ((uint32_t)(bins - (top - i)) == sh->bin) sh->before = b;
            b += sh->hist[top - i];
        }
        __syncthreads();
    }
    const uint32_t bin = MASS ? (uint32_t)bins - sh->bin : sh->bin;
    *want = MASS ? *want + sh->before : *want - sh->before;
    __syncthreads(); /* shared may be written again */
    return prefix << bits | bin;
}

static __global__ void sel_clear(uint4 *zero, int64_t n) {
    lg_dec_go();
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) zero[i] = make_uint4(0, 0, 0, 0);
}

template <int RULE> /* LG_RULE_TOPK (and ratio), LG_RULE_TOPP, LG_RULE_THRESHOLD */
static __global__ void __launch_bounds__(SEL_THREADS, 2) sel_pick(const __grid_constant__ sel_args a) {
    LG_SMEM(smem);
    sel_shared *sh = (sel_shared *)(void *)smem;
    const int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x >> 5;
    const int32_t s = (int32_t)blockIdx.y / a.n_list, item = (int32_t)blockIdx.y % a.n_list;
    const int32_t h = a.heads_in ? a.head[item] : item, make = a.heads_in ? a.slot[item] : a.make[item];
    lg_dec_wait();
    if (make < 0 || a.dense[s]) return;
    const int64_t slot = (int64_t)s * a.n_slot + make;
    int32_t *out = a.set_idx + slot * a.set_cap;
    sel_row r;
    r.len = a.seqs[s].len;
    if (r.len <= 0) {
        if (blockIdx.x == 0 && threadIdx.x == 0) a.set_n[slot] = 0;
        return;
    }
    r.shift = a.shift;
    r.n = (r.len + (1 << a.shift) - 1) >> a.shift;
    r.active = (int32_t)sel_max(1, sel_min((r.n + SEL_SHARE - 1) / SEL_SHARE, gridDim.x));
    if ((int32_t)blockIdx.x >= r.active) return;
    r.score = a.score + ((int64_t)s * a.n_kv + h) * a.max_len;
    r.zero = (sel_zero *)(void *)(a.zero + (int64_t)blockIdx.y * a.zero_room);
    r.info = a.info + blockIdx.y;
    r.phase = 0;
    r.scale = r.max = r.sum = 0;
    const int64_t per = (r.n + (int64_t)r.active * SEL_THREADS - 1) / ((int64_t)r.active * SEL_THREADS) * 32;
    r.u0 = sel_min(r.n, ((int64_t)blockIdx.x * SEL_WARPS + warp) * per);
    r.u1 = sel_min(r.n, r.u0 + per);
    r.keys = a.shift ? a.keys + (int64_t)blockIdx.y * a.key_room : NULL;
    if (r.keys) { /* read again by the thread that writes them */
        for (int64_t u = r.u0 + lane; u < r.u1; u += 32) {
            float max = r.score[u << r.shift];
            for (int64_t t = (u << r.shift) + 1; t < sel_min(r.len, (u + 1) << r.shift); t++) max = r.score[t] > max ? r.score[t] : max;
            r.keys[u] = sel_key(max);
        }
    }
    /* [head, tail): units that must earn their place; of these k. */
    int64_t head = 0, tail = r.n, k = 0;
    uint32_t cut = 0;    /* T */
    int64_t ties = 0;    /* how many of those equal to T */
    sel_mass above = 0, most = 0;
    if (RULE == LG_RULE_TOPK) {
        const int64_t sinks = sel_min(sel_max(a.sinks, 0), r.len), recents = sel_min(sel_max(a.recents, 0), r.len);
        head = (sinks + (1 << r.shift) - 1) >> r.shift;
        tail = sel_max(head, recents ? (r.len - recents) >> r.shift : r.n);
        const int64_t budget = lg_cuda_share(a.budget[s], a.least, a.share[item]);
        k = sel_max(0, sel_min(tail - head, (budget >> r.shift) - head - (r.n - tail)));
        if (k == 0) cut = 0xffffffffu;
        else if (k == tail - head) ties = k; /* T = 0: every key is above or equal */
        else {
            sel_mass want = (sel_mass)k;
            for (int32_t level = 0; level < 3; level++) cut = sel_digit<false>(&r, sh, head, tail, level, cut, &want, 0);
            ties = (int64_t)want;
        }
    } else {
        sel_softmax(&r, sh, a.scale);
        if (RULE == LG_RULE_TOPP) {
            most = a.value >= 1.0 ? ~(sel_mass)0 : a.value > 0.0 ? (sel_mass)(a.value * SEL_ONE) : 0;
            for (int32_t level = 0; level < 3; level++) cut = sel_digit<true>(&r, sh, head, tail, level, cut, &above, most);
        }
    }
    /* Counts of this warp, then of all before it. */
    uint32_t gt = 0, eq = 0;
    sel_mass eq_mass = 0;
    for (int64_t u0 = r.u0; u0 < r.u1; u0 += 32 * SEL_BATCH) {
        uint32_t key[SEL_BATCH];
#pragma unroll
        for (int32_t i = 0; i < SEL_BATCH; i++) {
            const int64_t u = u0 + 32 * i + lane;
            key[i] = u < r.u1 && u >= head && u < tail ? sel_at(r, u) : 0;
        }
#pragma unroll
        for (int32_t i = 0; i < SEL_BATCH; i++) {
            const int64_t u = u0 + 32 * i + lane;
            const bool in = u < r.u1 && u >= head && u < tail;
            const bool over = in && (RULE == LG_RULE_THRESHOLD ? sel_probability(r, sel_unkey(key[i])) > a.value : key[i] > cut);
            const bool same = in && RULE != LG_RULE_THRESHOLD && key[i] == cut;
            gt += (uint32_t)__popc(__ballot_sync(0xffffffffu, over));
            eq += (uint32_t)__popc(__ballot_sync(0xffffffffu, same));
            if (RULE == LG_RULE_TOPP && same) eq_mass += sel_mass_of(r, u, key[i]);
        }
    }
    if (RULE == LG_RULE_TOPP)
        for (int32_t d = 16; d; d >>= 1) eq_mass += __shfl_xor_sync(0xffffffffu, eq_mass, d);
    if (lane == 0) {
        sh->gt[warp] = gt;
        sh->eq[warp] = eq;
        sh->eq_mass[warp] = eq_mass;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t g = 0, e = 0;
        sel_mass m = 0;
        for (int32_t w = 0; w < SEL_WARPS; w++) {
            g += sh->gt[w];
            e += sh->eq[w];
            m += sh->eq_mass[w];
        }
        r.info->gt[blockIdx.x] = g;
        r.info->eq[blockIdx.x] = e;
        r.info->eq_mass[blockIdx.x] = m;
    }
    sel_meet(&r);
    int64_t gt_before = 0, eq_before = 0, gt_all = 0;
    sel_mass mass_before = 0;
    for (int32_t b = lane; b < r.active; b += 32) {
        const bool is = b < (int32_t)blockIdx.x;
        const uint32_t g = __ldcg(&r.info->gt[b]), e = __ldcg(&r.info->eq[b]);
        const sel_mass m = __ldcg(&r.info->eq_mass[b]);
        gt_all += g;
        gt_before += is ? g : 0;
        eq_before += is ? e : 0;
        mass_before += is ? m : 0;
    }
    for (int32_t d = 16; d; d >>= 1) {
        gt_all += __shfl_xor_sync(0xffffffffu, gt_all, d);
        gt_before += __shfl_xor_sync(0xffffffffu, gt_before, d);
        eq_before += __shfl_xor_sync(0xffffffffu, eq_before, d);
        mass_before += __shfl_xor_sync(0xffffffffu, mass_before, d);
    }
    for (int32_t w = 0; w < warp; w++) {
        gt_before += sh->gt[w];
        eq_before += sh->eq[w];
        mass_before += sh->eq_mass[w];
    }
    if (RULE == LG_RULE_TOPP) { /* units equal to T are in while the mass before them is at most `most` */
        uint32_t in = 0;
        if (eq > 0) {
            sel_mass m = above + mass_before;
            for (int64_t u0 = r.u0; u0 < r.u1; u0 += 32) {
                const int64_t u = u0 + lane;
                const uint32_t key = u < r.u1 ? sel_at(r, u) : 0;
                const bool same = u < r.u1 && key == cut;
                sel_mass x = same ? sel_mass_of(r, u, key) : 0, sum = x;
                for (int32_t d = 1; d < 32; d <<= 1) {
                    const sel_mass y = __shfl_up_sync(0xffffffffu, sum, d);
                    if (lane >= d) sum += y;
                }
                in += (uint32_t)__popc(__ballot_sync(0xffffffffu, same && m + sum - x <= most));
                m += __shfl_sync(0xffffffffu, sum, 31);
            }
            if (lane == 0 && in) atomicAdd(&r.zero->ties, in);
        }
        sel_meet(&r);
        ties = (int64_t)__ldcg(&r.zero->ties);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        int64_t count = RULE == LG_RULE_TOPK ? head + k + r.n - tail : gt_all + ties;
        if (RULE == LG_RULE_THRESHOLD && count == 0) {
            out[0] = (int32_t)(r.n - 1); /* the current token's */
            count = 1;
        }
        a.set_n[slot] = (int32_t)sel_min(count, a.set_cap);
    }
    const uint32_t below = (1u << lane) - 1;
    for (int64_t u0 = r.u0; u0 < r.u1; u0 += 32 * SEL_BATCH) {
        uint32_t key[SEL_BATCH];
#pragma unroll
        for (int32_t i = 0; i < SEL_BATCH; i++) {
            const int64_t u = u0 + 32 * i + lane;
            key[i] = u < r.u1 && u >= head && u < tail ? sel_at(r, u) : 0;
        }
#pragma unroll
        for (int32_t i = 0; i < SEL_BATCH; i++) {
            const int64_t u = u0 + 32 * i + lane;
            const bool in = u < r.u1 && u >= head && u < tail;
            const bool over = in && (RULE == LG_RULE_THRESHOLD ? sel_probability(r, sel_unkey(key[i])) > a.value : key[i] > cut);
            const bool same = in && RULE != LG_RULE_THRESHOLD && key[i] == cut;
            const uint32_t overs = __ballot_sync(0xffffffffu, over), sames = __ballot_sync(0xffffffffu, same);
            const int64_t e = eq_before + __popc(sames & below);
            int64_t at = head + gt_before + __popc(overs & below) + sel_min(e, ties);
            bool put = over || (same && e < ties);
            if (RULE == LG_RULE_TOPK && u < r.u1 && !in) {
                at = u < head ? u : head + k + (u - tail);
                put = true;
            }
            if (put && at < a.set_cap) out[at] = (int32_t)u;
            gt_before += __popc(overs);
            eq_before += __popc(sames);
        }
    }
}

/* ---- launch ---- */
static int64_t sel_zero_room(lg_rule rule) {
    return (int64_t)sizeof(sel_zero) + (rule == LG_RULE_THRESHOLD ? 0 : 3 * SEL_BINS * (rule == LG_RULE_TOPP ? 8 : 4));
}
static int64_t sel_key_room(int64_t max_len) { return (max_len + 15) / 16; } /* the smallest block of several tokens is 16 */

int64_t lg_cuda_select_scratch(const lg_cuda_env *e, int64_t n_seq, int32_t n_make, int64_t max_len) {
    (void)e;
    return n_seq * n_make * (sel_zero_room(LG_RULE_TOPP) + (int64_t)sizeof(sel_info) + sel_key_room(max_len) * 4);
}

void lg_cuda_decode_select(const lg_cuda_env *e, const lg_cuda_decode *a, cudaStream_t stream, uint8_t *scratch) {
    sel_args d;
    memset(&d, 0, sizeof d);
    (void)e;
    d.score = a->score;
    d.seqs = a->seqs;
    d.budget = a->budget; d.dense = a->dense;
    d.make = a->make;
    d.set_idx = a->sets.idx; d.set_n = a->sets.n; d.set_cap = a->sets.cap;
    d.n_slot = a->sets.n_slot;
    d.max_len = a->max_len;
    d.sinks = a->select.sinks; d.recents = a->select.recents;
    d.value = a->select.value;
    d.scale = (double)a->select.scale;
    d.n_kv = a->geom.n_head_kv;
    d.least = a->spread.slot ? a->spread.least : -1;
    while ((1 << d.shift) < a->sets.block) d.shift++;
    d.heads_in = a->make_host && d.n_kv <= SEL_HEADS;
    d.n_list = d.heads_in ? 0 : d.n_kv;
    for (int32_t h = 0; d.heads_in && h < d.n_kv; h++) {
        if (a->make_host[h] < 0) continue;
        for (int32_t j = a->make_host[h]; j < a->make_host[h] + lg_ops_n_make(&a->spread, h); j++) {
            d.head[d.n_list] = (int16_t)h;
            d.share[d.n_list] = a->spread.slot ? a->spread.slot[j] : LG_SHARE_ONE;
            d.slot[d.n_list++] = (int16_t)j;
        }
    }
    if (d.n_list == 0 || a->n_seq == 0) return;
    const int64_t rows = (int64_t)a->n_seq * d.n_list, units = (a->max_len + a->sets.block - 1) / a->sets.block;
    int64_t blocks = (units + SEL_SHARE - 1) / SEL_SHARE;
    if (blocks > SEL_BLOCKS) blocks = SEL_BLOCKS;
    if (blocks < 1) blocks = 1;
    d.zero_room = sel_zero_room(a->select.rule);
    d.key_room = sel_key_room(a->max_len);
    d.zero = scratch;
    d.info = (sel_info *)(void *)(scratch + rows * d.zero_room);
    d.keys = (uint32_t *)(void *)(d.info + rows);
    LG_LAUNCH(sel_clear, (unsigned)rows, 512, 0, stream, (uint4 *)(void *)d.zero, rows * d.zero_room / 16); /* (a memset node would divide L1 otherwise) */
    const dim3 grid((unsigned)blocks, (unsigned)rows);
    void (*const pick)(sel_args) = a->select.rule == LG_RULE_TOPP ? sel_pick<LG_RULE_TOPP> : a->select.rule == LG_RULE_THRESHOLD ? sel_pick<LG_RULE_THRESHOLD> : sel_pick<LG_RULE_TOPK>;
    LG_LAUNCH_EARLY(pick, grid, SEL_THREADS, sizeof(sel_shared), stream, true, d);
}
