/* Token sets from raw scores on the device: the sets lg_ops_select (ops/select.c) defines, in one launch for all rows (sequence,
 * head that makes a set).
 *
 * A row is shared by up to SEL_BLOCKS blocks, as many as its length of the moment asks for; they meet at barriers of their own
 * (fewer blocks than multiprocessors, small enough to run beside a block of products, started in order: all blocks of a row come to run). Scores become keys
 * that order as unsigned numbers. The key T at the cut is found digit by digit (11, 11, 10 bits) from histograms: of counts for
 * topk and ratio, of probability mass for topp. Then units with keys above T and the first r of those equal to T, in order of
 * position, are written by prefix sums of counts. threshold tests every unit by itself.
 *
 * Each of those meetings takes several round trips to L2, and beside products, which keep memory full, one of 0.7 us takes 2 to 5. So
 * topk of tokens does without where it can: a row of up to SEL_ROOM tokens is one block's; of a longer one every block draws the same
 * sample of scores, whose cut tells all of them a key that a few more than the k best reach. They list their tokens that reach it, and
 * the one that arrives last finds the k best of the lists. Were there too few or too many (ties), all go on with digits as above.
 *
 * Units that a slot keeps (topk, ratio) are all in, and the others compete for what is left; where they are more than fit, none but them competes.
 *
 * Sums of exponentials are doubles in a fixed order; masses are added as whole multiples of 2^-62, in any order the same. */
#include "ops/cuda/decode_ptx.cuh"
#include "ops/cuda/cuda.h"

#ifndef SEL_SHARE
#define SEL_SHARE 4096 /* units of a row per block */
#define SEL_THREADS 512
#define SEL_SAMPLE_BITS 12 /* log2 of the sample's scores, in longer rows twice as many */
#define SEL_LONGER 262144  /* tokens */
#define SEL_SIGMAS 4       /* between the rank of the k-th best in the sample, as expected, and the rank taken */
#define SEL_ROOM 12288     /* tokens one block chooses from */
#endif
enum { SEL_BLOCKS = 128, SEL_WARPS = SEL_THREADS / 32, SEL_BINS = 2048, SEL_HEADS = LG_CUDA_SETS, SEL_BATCH = 8,
       SEL_NEAR_BITS = 3, SEL_NEAR = 1 << SEL_NEAR_BITS, /* tokens drawn together, 32 bytes: beside products each request counts, not its bytes */
       SEL_LAST = (SEL_ROOM + SEL_THREADS - 1) / SEL_THREADS, /* keys a thread of the block that chooses has */
       SEL_PAIRS = 128,                                 /* so few keys are compared with each other */
       SEL_CHUNK = 8 };                                 /* lists are whole chunks: positions are copied 16 bytes at a time */
/* Keys a thread keeps of its block's part and of the sample, at most; LONG: where rows may have more than SEL_LONGER tokens. (What is not needed is
 * registers and instructions all the same, and both come from memory when there are too many.) */
template <bool LONG> struct sel_keeps { enum { OWN = LONG ? 18 : SEL_SHARE / SEL_THREADS + 1, DRAW = (LONG ? 2 : 1) * (1 << SEL_SAMPLE_BITS) / SEL_THREADS }; };
static const double SEL_ONE = 4611686018427387904.0; /* 2^62 */

typedef unsigned long long sel_mass;
/* Of a row. The first part and the histograms behind it (3 of counts or masses) are zero at the start. */
typedef struct sel_zero { uint32_t arrived, ties, listed, verdict; uint32_t pad[28]; } sel_zero;
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
    uint32_t *keys;         /* [row][key_room]: of units of more than one token; of tokens: listed keys, each block's from its first token on */
    uint32_t *making;       /* lg_cuda_decode.making */
    uint16_t *spots;        /* [row][key_room]: listed tokens, counted from the block's first */
    int64_t set_cap, max_len, key_room, zero_room, sinks, recents, least, kept_words;
    double value, scale;
    int32_t n_kv, n_slot, shift, n_seq, n_list, heads_in, latest, n_latest; /* shift: log2 of the block */
    int16_t head[SEL_HEADS], slot[SEL_HEADS];
    int32_t share[SEL_HEADS]; /* with `least`, as in lg_ops_share; behind those of the list: of latest slots */
} sel_args;

typedef struct sel_row { /* of the running block */
    const float *score;
    uint32_t *keys;         /* NULL: a unit is a token */
    const uint32_t *kept;   /* NULL: no unit that competes is kept */
    bool crowded;           /* more are kept than fit */
    sel_info *info;
    sel_zero *zero;
    int64_t len, n, u0, u1; /* tokens, units, this warp's units */
    int32_t active, phase, shift, part; /* part: units of a block */
    double scale, max, sum; /* softmax over tokens */
} sel_row;

typedef struct sel_shared {
    sel_mass scan[SEL_WARPS], eq_mass[SEL_WARPS], before;
    double sum[SEL_WARPS];
    uint32_t gt[SEL_WARPS], eq[SEL_WARPS], max[SEL_WARPS], bin, in_bin, over_bin, cut, ties;
    uint32_t list[SEL_BLOCKS + 1], n_few, last; /* list: where each block's list begins */
    __align__(16) sel_mass hist[SEL_BINS]; /* counts take the first half; topk has spots behind them, SEL_ROOM */
} sel_shared;

static __host__ __device__ __forceinline__ int64_t sel_min(int64_t a, int64_t b) { return a < b ? a : b; }
static __host__ __device__ __forceinline__ int64_t sel_max(int64_t a, int64_t b) { return a > b ? a : b; }

static __device__ __forceinline__ uint32_t sel_key(float score) {
    const uint32_t x = score == 0.0f ? 0u : __float_as_uint(score); /* -0 ranks as +0 */
    return x & 0x80000000u ? ~x : x | 0x80000000u;
}
static __device__ __forceinline__ float sel_unkey(uint32_t k) { return __uint_as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k); }
/* What is kept ranks above all keys, or all else below. */
enum : uint32_t { SEL_KEPT = 0xffffffffu };
static __device__ __forceinline__ uint32_t sel_kept_key(const sel_row &r, int64_t u, uint32_t key) {
    if (!r.kept) return key;
    const bool is = r.kept[u >> 5] >> (u & 31) & 1;
    return r.crowded ? (is ? key : 0) : is ? (uint32_t)SEL_KEPT : key - (key == SEL_KEPT); /* (a NaN has it) */
}
static __device__ __forceinline__ uint32_t sel_at(const sel_row &r, int64_t u) { return sel_kept_key(r, u, r.keys ? r.keys[u] : sel_key(r.score[u])); }

/* All threads of the row's blocks. What was written before is seen after (by __ldcg where another block wrote it). */
static __device__ __forceinline__ void sel_meet(sel_row *r) {
    r->phase++;
    if (r->active > 1) {
        __syncthreads();
        if (threadIdx.x == 0) {
            lg_arrive(&r->zero->arrived);
            while (lg_look(&r->zero->arrived) < (uint32_t)(r->phase * r->active)) LG_SPIN();
        }
    }
    __syncthreads();
}

/* Sum over the threads before this one. scan: room of the block. */
template <typename T>
static __device__ __forceinline__ T sel_before(T x, T *scan) {
    const int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x >> 5;
    T s = x;
    for (int32_t d = 1; d < 32; d <<= 1) {
        const T y = __shfl_up_sync(0xffffffffu, s, d);
        if (lane >= d) s += y;
    }
    __syncthreads();
    if (lane == 31) scan[warp] = s;
    __syncthreads();
    T before = lane < warp ? scan[lane] : 0; /* (fewer than 32 warps) */
    for (int32_t d = 16; d; d >>= 1) before += __shfl_xor_sync(0xffffffffu, before, d);
    return before + s - x;
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

/* The bin that holds the want-th best; want becomes its rank within the bin. */
static __device__ __forceinline__ uint32_t sel_bin(sel_shared *sh, int32_t bins, uint32_t *want) {
    const uint32_t *count = (const uint32_t *)(const void *)sh->hist;
    /* Bins from the highest down, each thread its share. */
    const int32_t share = (bins + SEL_THREADS - 1) / SEL_THREADS, top = bins - 1 - (int32_t)threadIdx.x * share;
    uint32_t mine = 0;
    for (int32_t i = 0; i < share; i++) mine += count[top - i];
    uint32_t b = sel_before(mine, (uint32_t *)(void *)sh->scan);
    for (int32_t i = 0; i < share; i++) {
        const uint32_t x = count[top - i];
        if (b < *want && *want <= b + x) { /* one bin */
            sh->bin = (uint32_t)(top - i);
            sh->in_bin = x;
            sh->over_bin = b;
        }
        b += x;
    }
    __syncthreads();
    *want -= sh->over_bin;
    return sh->bin;
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
    if (!MASS) {
        uint32_t rank = (uint32_t)*want;
        const uint32_t bin = sel_bin(sh, bins, &rank);
        *want = rank;
        __syncthreads(); /* shared may be written again */
        return prefix << bits | bin;
    }
    const int32_t share = (bins + SEL_THREADS - 1) / SEL_THREADS, top = bins - 1 - (int32_t)threadIdx.x * share;
    sel_mass mine = 0;
    for (int32_t i = 0; i < share; i++) mine += sh->hist[top - i];
    const sel_mass before = sel_before(mine, sh->scan);
    sel_mass b = before;
    for (int32_t i = 0; i < share; i++) {
        const sel_mass x = sh->hist[top - i];
        if (x && *want + b <= most) atomicMax(&sh->bin, (uint32_t)(bins - (top - i))); /* the lowest */
        b += x;
    }
    __syncthreads();
    b = before;
    for (int32_t i = 0; i < share; i++) {
        if ((uint32_t)(bins - (top - i)) == sh->bin) sh->before = b;
        b += sh->hist[top - i];
    }
    __syncthreads();
    const uint32_t bin = (uint32_t)bins - sh->bin;
    *want += sh->before;
    __syncthreads(); /* shared may be written again */
    return prefix << bits | bin;
}

/* Units [32 w, 32 w + 32) that lie in [head, tail), a bit each. */
static __device__ __forceinline__ uint32_t sel_among(int32_t w, int32_t head, int32_t tail) {
    const int32_t lo = head - w * 32, hi = tail - w * 32;
    if (lo >= 32 || hi <= 0) return 0;
    return (lo > 0 ? ~0u << lo : ~0u) & (hi < 32 ? ~(~0u << hi) : ~0u);
}
/* Kept units among [head, tail): all threads of a block. */
static __device__ __forceinline__ int32_t sel_count_kept(sel_shared *sh, const uint32_t *kept, int32_t head, int32_t tail) {
    uint32_t n = 0;
    for (int32_t w = head / 32 + (int32_t)threadIdx.x; w * 32 < tail; w += SEL_THREADS) n += (uint32_t)__popc(kept[w] & sel_among(w, head, tail));
    for (int32_t d = 16; d; d >>= 1) n += __shfl_xor_sync(0xffffffffu, n, d);
    if ((threadIdx.x & 31) == 0) sh->gt[threadIdx.x >> 5] = n;
    __syncthreads();
    n = 0;
    for (int32_t w = 0; w < SEL_WARPS; w++) n += sh->gt[w];
    __syncthreads(); /* shared may be written again */
    return (int32_t)n;
}

/* ---- topk of tokens: one block chooses, from the row or from lists ---- */
/* One digit of `bits` bits, from bit `at` on, of the want-th best of this block's numbers (each thread's first `rounds` of x) whose
 * higher bits are `prefix`. */
template <int N>
static __device__ __forceinline__ uint32_t sel_digit_here(sel_shared *sh, const uint32_t (&x)[N], int32_t rounds, int32_t at, int32_t bits, uint32_t prefix, uint32_t *want) {
    uint32_t *count = (uint32_t *)(void *)sh->hist;
    __syncthreads();
    for (int32_t i = (int32_t)threadIdx.x; i < SEL_BINS; i += SEL_THREADS) count[i] = 0;
    __syncthreads();
#pragma unroll
    for (int32_t j = 0; j < N; j++) {
        if (j % 4 == 0 && j >= rounds) break;
        const uint32_t high = x[j] >> at;
        if (high >> bits == prefix) atomicAdd(&count[high & ((1u << bits) - 1)], 1u);
    }
    __syncthreads();
    return prefix << bits | sel_bin(sh, SEL_BINS, want);
}

/* Of this block's numbers the k-th best, and how many of those equal to it are among the k best. Numbers have at most `at` bits. */
template <int N>
static __device__ __forceinline__ uint32_t sel_kth_here(sel_shared *sh, const uint32_t (&x)[N], int32_t rounds, int32_t at, uint32_t k, int32_t *ties) {
    uint32_t *few = (uint32_t *)(void *)sh->hist, cut = 0;
#pragma unroll 1
    while (at > 0) {
        const int32_t bits = at < 11 ? at : 11;
        at -= bits;
        cut = sel_digit_here(sh, x, rounds, at, bits, cut, &k);
        const int32_t n = (int32_t)sh->in_bin;
        if (at == 0 || n > SEL_PAIRS) continue;
        __syncthreads();
        uint32_t mine = 0; /* bit j: x[j] is in the bin */
#pragma unroll
        for (int32_t j = 0; j < N; j++) {
            if (j % 4 == 0 && j >= rounds) break; /* as they were counted */
            if (x[j] >> at == cut) mine |= 1u << j;
        }
        if (mine) {
            uint32_t to = atomicAdd(&sh->n_few, (uint32_t)__popc(mine));
#pragma unroll
            for (int32_t j = 0; j < N; j++)
                if (mine >> j & 1) few[to++] = x[j];
        }
        __syncthreads();
#pragma unroll 1
        for (int32_t i = (int32_t)threadIdx.x; i < n; i += SEL_THREADS) {
            uint32_t over = 0, same = 0;
#pragma unroll 4
            for (int32_t j = 0; j < n; j++) {
                over += few[j] > few[i];
                same += few[j] == few[i];
            }
            if (over < k && k <= over + same) {
                sh->cut = few[i];
                sh->ties = k - over;
            }
        }
        __syncthreads();
        cut = sh->cut;
        k = sh->ties;
        break;
    }
    *ties = (int32_t)k;
    return cut;
}

/* The size of a set, and its units outside [head, tail), of which k are in: all threads of a block. */
static __device__ __forceinline__ void sel_put_forced(int32_t *out, int32_t *size, int32_t cap, int32_t head, int32_t tail, int32_t n, int32_t k) {
    if (threadIdx.x == 0) *size = head + k + n - tail < cap ? head + k + n - tail : cap;
#pragma unroll 1
    for (int32_t u = (int32_t)threadIdx.x; u < head && u < cap; u += SEL_THREADS) out[u] = u;
#pragma unroll 1
    for (int32_t u = tail + (int32_t)threadIdx.x; u < n && head + k + u - tail < cap; u += SEL_THREADS) out[head + k + u - tail] = u;
}

/* Chooses k (> 0) of a row's tokens [head, tail), in one block; n_kept: kept ones, where all are chosen. lists: from the blocks' lists, sh->list[0..active] (keys less what all
 * of them have, from 1 up; fillers 0); else from the row. */
static __device__ __forceinline__ void sel_choose(const sel_args &a, const sel_row &r, sel_shared *sh, bool lists, int32_t head, int32_t tail, int32_t k, int32_t n_kept, int64_t slot) {
    const int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x >> 5, part = r.part, cap = (int32_t)sel_min(a.set_cap, 0x7fffffff);
    const int32_t total = lists ? (int32_t)sh->list[r.active] : tail - head, rounds = (total + SEL_THREADS - 1) / SEL_THREADS;
    const int32_t first = warp * rounds * 32 + lane, left = (int32_t)sel_min(total, (warp + 1) * rounds * 32) - first;
    uint32_t *place = (uint32_t *)(void *)sh->hist; /* [chunk] where it lies */
    uint16_t *spot = (uint16_t *)(void *)(place + SEL_BINS);
    const uint16_t *spots = a.spots + (int64_t)blockIdx.y * a.key_room;
#pragma unroll 1
    for (int32_t c = (int32_t)threadIdx.x; c * SEL_CHUNK < total; c += SEL_THREADS) {
        int32_t l = 0;
        place[c] = (uint32_t)(c * SEL_CHUNK);
        if (!lists) continue;
#pragma unroll 1
        for (int32_t step = SEL_BLOCKS / 2; step; step >>= 1)
            if (l + step < r.active && (int32_t)sh->list[l + step] <= c * SEL_CHUNK) l += step;
        place[c] += (uint32_t)(l * part) - sh->list[l];
        lg_cp16(lg_smem_of(spot + c * SEL_CHUNK), spots + place[c]);
    }
    lg_cp_commit();
    __syncthreads();
    /* All loads on their way at once. */
    uint32_t x[SEL_LAST];
    const uint32_t *from = (lists ? a.keys + (int64_t)blockIdx.y * a.key_room : (const uint32_t *)(const void *)(r.score + head)) + lane % SEL_CHUNK;
    place += first / SEL_CHUNK;
#pragma unroll
    for (int32_t j = 0; j < SEL_LAST; j++) {
        x[j] = 0;
        if (32 * j < left) x[j] = __ldcg(from + place[32 / SEL_CHUNK * j]);
    }
    int32_t *out = a.set_idx + slot * a.set_cap;
    sel_put_forced(out, a.set_n + slot, cap, head, tail, (int32_t)r.n, k);
    /* From 1 up; 0: nothing, which ranks below all. (In a row the lowest two of the NaNs become one.) */
    if (!lists) {
#pragma unroll
        for (int32_t j = 0; j < SEL_LAST; j++) {
            const uint32_t key = sel_key(__uint_as_float(x[j]));
            x[j] = 32 * j >= left ? 0 : key ? key : 1;
        }
        if (r.kept) {
#pragma unroll
            for (int32_t j = 0; j < SEL_LAST; j++)
                if (32 * j < left) x[j] = sel_kept_key(r, head + first + 32 * j, x[j]);
        }
    }
    uint32_t sure = 0; /* bit j: x[j] is kept, and competes no more */
    if (n_kept) {
#pragma unroll
        for (int32_t j = 0; j < SEL_LAST; j++)
            if (x[j] == SEL_KEPT) {
                sure |= 1u << j;
                x[j] = 0;
            }
    }
    uint32_t max = 0;
#pragma unroll
    for (int32_t j = 0; j < SEL_LAST; j++) max = x[j] > max ? x[j] : max;
    for (int32_t d = 16; d; d >>= 1) {
        const uint32_t y = __shfl_xor_sync(0xffffffffu, max, d);
        max = y > max ? y : max;
    }
    if (lane == 0) sh->max[warp] = max;
    if (threadIdx.x == 0) sh->n_few = 0;
    __syncthreads();
    max = sh->max[lane % SEL_WARPS];
    for (int32_t d = 16; d; d >>= 1) {
        const uint32_t y = __shfl_xor_sync(0xffffffffu, max, d);
        max = y > max ? y : max;
    }
    int32_t ties = 0;
    uint32_t cut = SEL_KEPT, over = sure, same = 0; /* over, same: bit j: x[j] is */
    if (k > n_kept) cut = sel_kth_here(sh, x, rounds, 32 - __clz((int32_t)max), (uint32_t)(k - n_kept), &ties);
#pragma unroll
    for (int32_t j = 0; j < SEL_LAST; j++) {
        if (x[j] > cut) over |= 1u << j;
        if (x[j] == cut) same |= 1u << j;
    }
    uint32_t both = (uint32_t)__popc(over) | (uint32_t)__popc(same) << 16; /* of the warp: at most 32 * 32 each */
    for (int32_t d = 16; d; d >>= 1) both += __shfl_xor_sync(0xffffffffu, both, d);
    if (lane == 0) {
        sh->gt[warp] = both & 0xffff;
        sh->eq[warp] = both >> 16;
    }
    lg_cp_wait(0);
    __syncthreads();
    int32_t gt = lane < warp ? (int32_t)sh->gt[lane] : 0, eq = lane < warp ? (int32_t)sh->eq[lane] : 0;
    for (int32_t d = 16; d; d >>= 1) {
        gt += __shfl_xor_sync(0xffffffffu, gt, d);
        eq += __shfl_xor_sync(0xffffffffu, eq, d);
    }
    const uint32_t below = (1u << lane) - 1;
    int32_t b = 0, next = total; /* the list that holds i, and its end */
    if (lists) {
#pragma unroll 1
        for (int32_t step = SEL_BLOCKS / 2; step; step >>= 1)
            if (b + step < r.active && (int32_t)sh->list[b + step] <= first) b += step;
        next = (int32_t)sh->list[b + 1];
    }
#pragma unroll 2
    for (int32_t j = 0; j < rounds; j++, over >>= 1, same >>= 1) {
        const int32_t i = first + 32 * j;
        const uint32_t overs = __ballot_sync(0xffffffffu, over & 1), sames = __ballot_sync(0xffffffffu, same & 1);
        const int32_t e = eq + __popc(sames & below), to = head + gt + __popc(overs & below) + (e < ties ? e : ties);
        if (((over & 1) || ((same & 1) && e < ties)) && to < cap) {
            while (i >= next) next = (int32_t)sh->list[++b + 1];
            out[to] = lists ? b * part + (int32_t)spot[i] : head + i;
        }
        gt += __popc(overs);
        eq += __popc(sames);
    }
}

/* The rank in a sample of m whose key about k of n tokens, and hardly ever fewer, reach; 0: too many would, with n_kept others. */
static __device__ __forceinline__ int32_t sel_rank(const sel_row &r, int32_t n, int32_t k, int32_t n_kept, int32_t m) {
    const float of = (float)n / (float)m, mean = (float)k / of;
    const float rank = ceilf(mean + SEL_SIGMAS * (sqrtf(mean) + 1.0f));
    return (rank + 2.0f * sqrtf(rank)) * of + (float)(SEL_CHUNK / 2 * r.active + n_kept) > (float)SEL_ROOM || rank > (float)m ? 0 : (int32_t)rank;
}

/* Lists the row's candidates: all blocks of the row. n_kept: kept ones, where all are chosen; they are listed, but not drawn. */
enum { SEL_DONE = 1, SEL_FAILED, SEL_CHOOSE }; /* another block will choose from the lists; none can; this one does */
template <bool LONG>
static __device__ __forceinline__ uint32_t sel_by_sample(const sel_args &a, const sel_row &r, sel_shared *sh, int32_t head, int32_t tail, int32_t k, int32_t n_kept) {
    const int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x >> 5, n = tail - head;
    enum { OWN = sel_keeps<LONG>::OWN, DRAW = sel_keeps<LONG>::DRAW };
    const int32_t bits = SEL_SAMPLE_BITS + (LONG && n > SEL_LONGER), rank = sel_rank(r, n, k - n_kept, n_kept, 1 << bits);
    const int32_t u0 = (int32_t)r.u0, u1 = (int32_t)r.u1, part = r.part;
    if (rank == 0 || part > OWN * SEL_THREADS) {
        LG_TOOK(LG_WAY_DIGITS);
        return SEL_FAILED;
    }
    const int32_t lo = (int32_t)sel_max(head - u0 - lane, 0), hi = (int32_t)sel_max(lo, sel_min(u1, tail) - u0 - lane); /* of this thread's tokens u0 + lane + 32 i */
    const float *mine = r.score + u0 + lane;
    const int32_t draws = (1 << bits) / SEL_THREADS, near0 = (head + SEL_NEAR - 1) / SEL_NEAR * SEL_NEAR, n_near = (tail - near0) / SEL_NEAR;
    uint32_t own[OWN], some[DRAW];
#pragma unroll
    for (int32_t i = 0; i < DRAW; i++) { /* the row in equal parts, a place at random in each */
        const uint32_t c = ((uint32_t)(i * SEL_THREADS) + threadIdx.x) / SEL_NEAR;
        uint32_t x = c * 2654435761u;
        x ^= x >> 15; x *= 2246822519u; x ^= x >> 13; x *= 3266489917u;
        const uint32_t near = (uint32_t)((uint64_t)(c << 18 | x >> 14) * (uint64_t)n_near >> (bits - SEL_NEAR_BITS + 18));
        const int32_t u = near0 + (int32_t)(near * SEL_NEAR + threadIdx.x % SEL_NEAR);
        some[i] = i < draws ? sel_key(__ldcg(r.score + u)) : 0;
        if (r.kept && i < draws) {
            some[i] = sel_kept_key(r, u, some[i]);
            if (n_kept && some[i] == SEL_KEPT) some[i] = 0;
        }
    }
#pragma unroll
    for (int32_t i = 0; i < OWN; i++) own[i] = (uint32_t)(32 * i - lo) < (uint32_t)(hi - lo) ? sel_key(__ldcg(mine + 32 * i)) : 0;
    if (r.kept) {
#pragma unroll
        for (int32_t i = 0; i < OWN; i++)
            if ((uint32_t)(32 * i - lo) < (uint32_t)(hi - lo)) own[i] = sel_kept_key(r, u0 + lane + 32 * i, own[i]);
    }
    uint32_t want = (uint32_t)rank, floor = 0;
#pragma unroll 1
    for (int32_t at = 21; at >= 10; at -= 11) floor = sel_digit_here(sh, some, draws, at, 11, floor, &want);
    floor = floor ? floor << 10 : 1; /* (0 is no token's) */
    /* The block's list. */
    uint32_t *keys = a.keys + (int64_t)blockIdx.y * a.key_room + blockIdx.x * part;
    uint16_t *spots = a.spots + (int64_t)blockIdx.y * a.key_room + blockIdx.x * part;
    uint32_t reach = 0, all = 0, to = 0;
#pragma unroll
    for (int32_t i = 0; i < OWN; i++) reach += own[i] >= floor;
    for (int32_t d = 16; d; d >>= 1) reach += __shfl_xor_sync(0xffffffffu, reach, d);
    if (lane == 0) sh->gt[warp] = reach;
    __syncthreads();
    if (lane < SEL_WARPS) all = sh->gt[lane];
    if (lane < warp) to = all;
    for (int32_t d = 16; d; d >>= 1) {
        all += __shfl_xor_sync(0xffffffffu, all, d);
        to += __shfl_xor_sync(0xffffffffu, to, d);
    }
    const uint32_t below = (1u << lane) - 1;
#pragma unroll
    for (int32_t i = 0; i < OWN; i++) {
        const uint32_t reaches = __ballot_sync(0xffffffffu, own[i] >= floor);
        if (own[i] >= floor) {
            const uint32_t j = to + (uint32_t)__popc(reaches & below);
            keys[j] = n_kept && own[i] == SEL_KEPT ? (uint32_t)SEL_KEPT : own[i] - floor + 1;
            spots[j] = (uint16_t)(u0 + 32 * i + lane - (int32_t)blockIdx.x * part);
        }
        to += (uint32_t)__popc(reaches);
    }
    if (threadIdx.x < (0 - all) % SEL_CHUNK) { /* fillers */
        keys[all + threadIdx.x] = 0;
        spots[all + threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) r.info->gt[blockIdx.x] = all;
    lg_dec_wait();
    __syncthreads();
    if (threadIdx.x == 0) sh->last = lg_arrive(&r.zero->listed) == (uint32_t)r.active - 1;
    __syncthreads();
    if (!sh->last) {
        if (threadIdx.x == 0) {
            uint32_t verdict;
            while ((verdict = *(volatile uint32_t *)&r.zero->verdict) == 0) LG_SPIN();
            sh->bin = verdict;
        }
        __syncthreads();
        const uint32_t verdict = sh->bin;
        __syncthreads(); /* shared may be written again */
        return verdict;
    }
    /* Each list's beginning. In the upper half: keys, in the lower: places. */
    const sel_mass mine_in = (int32_t)threadIdx.x < r.active ? __ldcg(&r.info->gt[threadIdx.x]) : 0;
    const sel_mass both = mine_in << 32 | (mine_in + SEL_CHUNK - 1) / SEL_CHUNK * SEL_CHUNK, before = sel_before(both, sh->scan);
    if ((int32_t)threadIdx.x <= r.active) sh->list[threadIdx.x] = (uint32_t)before;
    if ((int32_t)threadIdx.x == r.active) {
        const uint32_t verdict = before >> 32 >= (sel_mass)k && (uint32_t)before <= SEL_ROOM ? SEL_DONE : SEL_FAILED;
        sh->bin = verdict;
        *(volatile uint32_t *)&r.zero->verdict = verdict;
    }
    __syncthreads();
    const bool good = sh->bin == SEL_DONE;
    __syncthreads();
    LG_TOOK(good ? LG_WAY_SAMPLE : LG_WAY_RESAMPLE);
    return good ? SEL_CHOOSE : SEL_FAILED;
}

static __global__ void sel_clear(uint4 *zero, int64_t n) {
    lg_dec_go();
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) zero[i] = make_uint4(0, 0, 0, 0);
}

template <int RULE, bool KEPT, bool LONG>
static __device__ __forceinline__ void sel_set(const sel_args &a, sel_shared *sh) {
    const int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x >> 5;
    const int32_t s = (int32_t)blockIdx.y / a.n_list, item = (int32_t)blockIdx.y % a.n_list;
    const int32_t h = a.heads_in ? a.head[item] : item, make = a.heads_in ? a.slot[item] : a.make[item];
    const bool dense = a.dense[s] != 0;
    const int64_t len = a.seqs[s].len;
    const uint32_t *kept = KEPT ? a.seqs[s].kept : NULL;
    const int64_t all_budget = RULE == LG_RULE_TOPK ? a.budget[s] : 0;
    if (make < 0 || dense) return;
    const int64_t slot = (int64_t)s * a.n_slot + make;
    int32_t *out = a.set_idx + slot * a.set_cap;
    sel_row r;
    r.len = len;
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
    r.kept = NULL;
    r.crowded = false;
    r.phase = 0;
    r.scale = r.max = r.sum = 0;
    const int64_t per = ((uint32_t)r.n + (uint32_t)(r.active * SEL_THREADS) - 1) / (uint32_t)(r.active * SEL_THREADS) * 32; /* (positions have 31 bits) */
    r.u0 = sel_min(r.n, ((int64_t)blockIdx.x * SEL_WARPS + warp) * per);
    r.u1 = sel_min(r.n, r.u0 + per);
    r.part = (int32_t)per * SEL_WARPS;
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
        const lg_cuda_span span = lg_cuda_span_of(r.len, lg_cuda_share(all_budget, a.least, a.share[item]), a.sinks, a.recents, r.shift);
        head = span.head;
        tail = span.tail;
        k = span.k;
        if (k == 0 || k == tail - head) { /* known without a score */
            const int64_t count = head + k + r.n - tail;
            if (blockIdx.x == 0 && threadIdx.x == 0) a.set_n[slot] = (int32_t)sel_min(count, a.set_cap);
            for (int64_t i = (int64_t)blockIdx.x * SEL_THREADS + threadIdx.x; i < sel_min(count, a.set_cap); i += r.active * SEL_THREADS)
                out[i] = (int32_t)(i < head + k ? i : i - head - k + tail);
            return;
        }
        int32_t n_kept = 0;
        if (KEPT && kept) {
            kept += make * a.kept_words;
            n_kept = sel_count_kept(sh, kept, (int32_t)head, (int32_t)tail);
            if (n_kept > 0) r.kept = kept;
            r.crowded = n_kept > k;
            if (r.crowded) n_kept = 0;
        }
        if (r.shift == 0) {
            const bool lists = tail - head > SEL_ROOM;
            uint32_t verdict = blockIdx.x == 0 ? SEL_CHOOSE : SEL_DONE;
            if (lists) verdict = sel_by_sample<LONG>(a, r, sh, (int32_t)head, (int32_t)tail, (int32_t)k, n_kept);
            if (verdict == SEL_CHOOSE) sel_choose(a, r, sh, lists, (int32_t)head, (int32_t)tail, (int32_t)k, n_kept, slot);
            if (verdict != SEL_FAILED) return;
        }
        lg_dec_wait();
        sel_mass want = (sel_mass)k;
        for (int32_t level = 0; level < 3; level++) cut = sel_digit<false>(&r, sh, head, tail, level, cut, &want, 0);
        ties = (int64_t)want;
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

/* ---- latest slots: the score of a token is its position, so lengths and kept units say all; a block fills a slot ---- */
/* The highest n bits of those set. */
static __device__ __forceinline__ uint32_t sel_highest(uint32_t bits, int32_t n) {
    if (n <= 0) return 0;
    for (int32_t i = __popc(bits); i > n; i--) bits &= bits - 1;
    return bits;
}

static __device__ __forceinline__ void sel_latest(const sel_args &a, sel_shared *sh, bool keeps, int32_t s, int32_t j) {
    const lg_cuda_seq seq = a.seqs[s];
    const int64_t budget = a.budget[s], slot = (int64_t)s * a.n_slot + a.latest + j;
    if (a.dense[s]) return;
    const lg_cuda_span span = lg_cuda_span_of(seq.len, lg_cuda_share(budget, a.least, a.share[a.n_list + j]), a.sinks, a.recents, a.shift);
    const int32_t head = (int32_t)span.head, tail = (int32_t)span.tail, cap = (int32_t)sel_min(a.set_cap, 0x7fffffff);
    const uint32_t *kept = keeps && seq.kept ? seq.kept + (a.latest + j) * a.kept_words : NULL;
    int32_t *out = a.set_idx + slot * a.set_cap;
    int32_t at = head + (int32_t)span.k; /* the next place, from behind */
    sel_put_forced(out, a.set_n + slot, cap, head, tail, (int32_t)span.n, (int32_t)span.k);
    int32_t left_kept = kept ? (int32_t)sel_min(sel_count_kept(sh, kept, head, tail), span.k) : 0, left = (int32_t)span.k - left_kept;
    for (int32_t w0 = (tail - 1) >> 5; at > head && w0 >= 0; w0 -= SEL_THREADS) {
        const int32_t w = w0 - (int32_t)threadIdx.x;
        const uint32_t among = sel_among(w, head, tail), both = kept && among ? kept[w] & among : 0, rest = among & ~both;
        const sel_mass mine = (sel_mass)__popc(both) << 32 | (sel_mass)__popc(rest), behind = sel_before(mine, sh->scan); /* kept in the upper half */
        const int32_t rest_behind = (int32_t)(uint32_t)behind, kept_behind = (int32_t)(behind >> 32);
        int32_t to = at - (int32_t)(sel_min(left, rest_behind) + sel_min(left_kept, kept_behind));
        for (uint32_t in = sel_highest(rest, left - rest_behind) | sel_highest(both, left_kept - kept_behind); in;) {
            const int32_t bit = 31 - __clz((int32_t)in);
            in ^= 1u << bit;
            if (--to < cap) out[to] = w * 32 + bit;
        }
        if (threadIdx.x == SEL_THREADS - 1) sh->before = behind + mine;
        __syncthreads();
        const int32_t n = (int32_t)sel_min(left, (uint32_t)sh->before), n_kept = (int32_t)sel_min(left_kept, (int64_t)(sh->before >> 32));
        left -= n;
        left_kept -= n_kept;
        at -= n + n_kept;
        __syncthreads(); /* shared may be written again */
    }
}

/* topk reads scores before the clearing has ended: they are older than its start. */
template <int RULE, bool KEPT, bool LONG> /* LG_RULE_TOPK (and ratio), LG_RULE_TOPP, LG_RULE_THRESHOLD; KEPT, LONG: topk, and sets may keep units, rows may have more than SEL_LONGER tokens */
static __global__ void __launch_bounds__(SEL_THREADS, 2) sel_pick(const __grid_constant__ sel_args a) {
    LG_SMEM(smem);
    const int32_t late = (int32_t)blockIdx.y - a.n_seq * a.n_list; /* rows behind those of scores: latest slots */
    lg_dec_go();
    if (RULE != LG_RULE_TOPK) lg_dec_wait();
    if (RULE != LG_RULE_TOPK || late < 0) sel_set<RULE, KEPT, LONG>(a, (sel_shared *)(void *)smem);
    else if (blockIdx.x == 0) sel_latest(a, (sel_shared *)(void *)smem, KEPT, late / a.n_latest, late % a.n_latest);
    if (a.making) {
        __syncthreads();
        if (threadIdx.x == 0) lg_arrive(a.making);
    }
    if (RULE == LG_RULE_TOPK) lg_dec_wait(); /* no block ends before what it waits for */
}

/* ---- launch ---- */
static int64_t sel_zero_room(lg_rule rule) {
    return (int64_t)sizeof(sel_zero) + (rule == LG_RULE_THRESHOLD ? 0 : 3 * SEL_BINS * (rule == LG_RULE_TOPP ? 8 : 4));
}
static int64_t sel_blocks(int64_t units) { return sel_max(1, sel_min((units + SEL_SHARE - 1) / SEL_SHARE, SEL_BLOCKS)); }
/* Lists of tokens (each block's part is rounded up), or keys of units of several: fewer. */
static int64_t sel_key_room(int64_t max_len) { return (max_len + (sel_blocks(max_len) + 1) * SEL_THREADS) / SEL_CHUNK * SEL_CHUNK; }

int64_t lg_cuda_select_scratch(const lg_cuda_env *e, int64_t n_seq, int32_t n_make, int64_t max_len) {
    (void)e;
    return n_seq * n_make * (sel_zero_room(LG_RULE_TOPP) + (int64_t)sizeof(sel_info) + sel_key_room(max_len) * 6);
}

uint32_t lg_cuda_decode_select(const lg_cuda_env *e, const lg_cuda_decode *a, cudaStream_t stream, uint8_t *scratch) {
    sel_args d;
    memset(&d, 0, sizeof d);
    (void)e;
    d.score = a->score;
    d.seqs = a->seqs;
    d.budget = a->budget; d.dense = a->dense;
    d.make = a->make;
    d.set_idx = a->sets.idx; d.set_n = a->sets.n; d.set_cap = a->sets.cap;
    d.n_slot = a->sets.n_slot;
    d.kept_words = a->sets.kept_words;
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
    d.n_seq = a->n_seq;
    d.latest = a->spread.latest;
    const bool masses = a->select.rule == LG_RULE_TOPP || a->select.rule == LG_RULE_THRESHOLD;
    d.n_latest = masses ? 0 : a->spread.n_latest;
    for (int32_t j = 0; a->spread.slot && j < d.n_latest; j++) d.share[d.n_list + j] = a->spread.slot[d.latest + j];
    if (d.n_list + d.n_latest == 0 || a->n_seq == 0) return 0;
    const int64_t rows = (int64_t)a->n_seq * d.n_list, units = (a->max_len + a->sets.block - 1) / a->sets.block;
    const int64_t blocks = d.n_list ? sel_blocks(units) : 1;
    d.zero_room = sel_zero_room(a->select.rule);
    d.key_room = sel_key_room(a->max_len);
    d.making = a->making;
    d.zero = scratch;
    d.info = (sel_info *)(void *)(scratch + rows * d.zero_room);
    d.keys = (uint32_t *)(void *)(d.info + rows);
    d.spots = (uint16_t *)(void *)(d.keys + rows * d.key_room);
    if (rows) LG_LAUNCH(sel_clear, (unsigned)rows, 512, 0, stream, (uint4 *)(void *)d.zero, rows * d.zero_room / 16); /* (a memset node would divide L1 otherwise) */
    const dim3 grid((unsigned)blocks, (unsigned)(rows + (int64_t)a->n_seq * d.n_latest));
    static void (*const topk[2][2])(sel_args) = { { sel_pick<LG_RULE_TOPK, false, false>, sel_pick<LG_RULE_TOPK, false, true> }, { sel_pick<LG_RULE_TOPK, true, false>, sel_pick<LG_RULE_TOPK, true, true> } };
    void (*const pick)(sel_args) = a->select.rule == LG_RULE_TOPP ? sel_pick<LG_RULE_TOPP, false, false> : masses ? sel_pick<LG_RULE_THRESHOLD, false, false>
                                 : topk[a->sets.kept_words > 0][a->max_len > SEL_LONGER];
    LG_LAUNCH_EARLY(pick, grid, SEL_THREADS, offsetof(sel_shared, hist) + SEL_BINS * (masses ? sizeof(sel_mass) : 4) + (masses ? 0 : SEL_ROOM * 2), stream, rows > 0, d);
    return grid.x * grid.y;
}
