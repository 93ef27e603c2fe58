/* Decode attention, selection and attention mass on the device against their specification (lg_ref_attend, lg_ref_attend_hybrid, lg_ops_select,
 * lg_ref_observe) on random data, then their speed.
 *
 *   decode_check [check [SEED [COUNT]]]   COUNT cases of attention and of mass, twice as many of selection alone; exit 1 if one fails or (from 8 on,
 *                                         where ways are counted: emulation, took.cuh) too few went one of the ways (LG_WAY_*)
 *   decode_check time | quick | select    speed, its few main rows, or that of selection; needs a GPU
 *
 * Built with LG_CUDA_EMU the kernels run on the CPU (emu.h) with made-up multiprocessor counts, so that work is cut in many ways.
 * Cache slots past a sequence's end and unused pages hold NaNs: a kernel that reads them does not go unseen. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ops/cuda/decode_ptx.cuh"
#include "ops/cuda/product.cuh"
#include "../worsen.h"
#include "check.cuh"
extern "C" {
#include "ops/ref/ref.h"
}

static float unit(void) { return (float)((double)(rnd() >> 40) / (double)(1 << 23) - 1.0); }

static void down(void *dst, const void *src, int64_t n) { CUDA(cudaMemcpy(dst, src, (size_t)n, cudaMemcpyDeviceToHost)); }
static void done(void) {
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());
}

#ifndef LG_CUDA_EMU
bool lg_cuda_pdl = true;
#endif
/* Ways that blocks went until now, where they are counted. */
#if defined(LG_CUDA_EMU)
enum { COUNTED = 1 };
static void took(long to[LG_WAYS]) { memcpy(to, emu_took, LG_WAYS * sizeof *to); }
#elif defined(COUNT_WAYS) /* took.cuh */
enum { COUNTED = 1 };
void took_attend(long to[LG_WAYS]);
void took_select(long to[LG_WAYS]);
static void took(long to[LG_WAYS]) {
    memset(to, 0, LG_WAYS * sizeof *to);
    took_attend(to);
    took_select(to);
}
#else
enum { COUNTED = 0 };
static void took(long to[LG_WAYS]) { memset(to, 0, LG_WAYS * sizeof *to); }
#endif
/* Of each way: cases in which a block went it. */
typedef struct way_count { long before[LG_WAYS], cases[LG_WAYS]; } way_count;
static void ways_add(way_count *w) {
    long now[LG_WAYS];
    took(now);
    for (int i = 0; i < LG_WAYS; i++) w->cases[i] += now[i] > w->before[i];
    memcpy(w->before, now, sizeof now);
}
/* Prints the counts; returns how many ways too few cases went. */
static int ways_show(const way_count *w, int least) {
    static const struct { const char *name; int way; } ways[] = { { "few segments", LG_WAY_FEW }, { "few of known size", LG_WAY_SIZED }, { "sets counted as made", LG_WAY_COUNTS }, { "raw heads", LG_WAY_RAW }, { "many segments", LG_WAY_MANY },
        { "a second segment in a block", LG_WAY_FOLLOW }, { "no merge", LG_WAY_WHOLE }, { "merge by one block", LG_WAY_ALONE }, { "merge by helpers", LG_WAY_HELPERS },
        { "merge in groups of threads", LG_WAY_GROUPS }, { "merge in several rounds", LG_WAY_ROUNDS }, { "merge with a late first", LG_WAY_LATE },
        { "selection by sample", LG_WAY_SAMPLE }, { "sample that failed", LG_WAY_RESAMPLE }, { "digits at once", LG_WAY_DIGITS } };
    static_assert(sizeof ways / sizeof *ways == LG_WAYS, "every way has a name");
    int missed = 0;
    printf("cases that went each way:");
    for (int i = 0; i < LG_WAYS; i++) printf("%s %s %ld", i ? "," : "", ways[i].name, w->cases[ways[i].way]);
    printf("\n");
    for (int i = 0; i < LG_WAYS; i++) {
        if (w->cases[ways[i].way] >= least) continue;
        printf("%s: %ld cases, at least %d expected: FAIL\n", ways[i].name, w->cases[ways[i].way], least);
        missed++;
    }
    return missed;
}
/* What the ops before attention do: let their dependents start, and some time later write queries and newest rows (or raw heads), and as much later (or earlier)
 * sets, which they count. */
typedef struct late_rows {
    uint8_t *q, *k, *v; const uint8_t *q0, *k0, *v0; const int64_t *at; int64_t nq, rb, n_row;
    int32_t *idx; const int32_t *idx0; int64_t n_idx; uint32_t *count; float *raw; const float *raw0; int64_t n_raw; bool poison, sets_first;
} late_rows;
enum { LATE_BLOCKS = 8 };
static __device__ void late_sets(const late_rows &r) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < r.n_idx; i += (int64_t)gridDim.x * blockDim.x) r.idx[i] = r.poison ? 0 : r.idx0[i];
    if (r.poison) return;
    __syncthreads();
    if (threadIdx.x == 0) lg_arrive(r.count);
}
static __device__ void late_while(const late_rows &r) {
#ifndef LG_CUDA_EMU
    for (int i = 0; i < 40 && !r.poison; i++) __nanosleep(1000);
#endif
}
static __global__ void late_write(const late_rows r) {
    lg_dec_wait();
    lg_dec_go();
    if (r.poison && blockIdx.x == 0 && threadIdx.x < 2) r.count[threadIdx.x] = 0; /* (of sets read, of sets made) */
    late_while(r);
    if (r.sets_first) {
        late_sets(r);
        late_while(r);
    }
    const int64_t i0 = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = i0; i < r.n_raw; i += step) r.raw[i] = r.poison ? __uint_as_float(LG_CUDA_ABSENT) : r.raw0[i];
    for (int64_t i = i0; i < r.nq && (r.poison || !r.n_raw); i += step) r.q[i] = r.poison ? 0xff : r.q0[i];
    for (int64_t i = i0; i < r.n_row * r.rb && (r.poison || !r.n_raw); i += step) {
        const int64_t at = r.at[i / r.rb] + i % r.rb;
        r.k[at] = r.poison ? 0xff : r.k0[at];
        r.v[at] = r.poison ? 0xff : r.v0[at];
    }
    if (!r.sets_first) {
        late_while(r);
        late_sets(r);
    }
}

enum { SEQS = 6, HEADS = 8, SLOTS = 32 };
typedef struct test_case {
    lg_dtype dtype;
    lg_compute compute;
    int32_t hd, n_kv, group, n_seq, block;
    int64_t len[SEQS], budget[SEQS];
    uint8_t dense[SEQS];
    int32_t read[HEADS], make[HEADS], n_slot;
    lg_select select;
    bool spread; /* budgets of their own */
    int32_t n_make[HEADS], window[HEADS], slot[SLOTS];
    bool hybrid, whole, roles_on_device;
    bool sized; /* sets that are read are as large as the rule makes them */
    bool kept[SEQS]; int32_t n_latest; /* the last slots */
} test_case;

/* What the slots of a sequence keep: [n_slot][words]. Few, some, all, none or a run of units. */
static uint32_t *draw_kept(int32_t n_slot, int64_t words) {
    uint32_t *kept = (uint32_t *)lg_base_calloc(n_slot * words, 4);
    for (int32_t j = 0; j < n_slot; j++) {
        const int64_t kind = below(6), odds = 1 + below(kind < 2 ? 5 : 200), at = below(words * 32), n = 1 + below(words * 32);
        for (int64_t u = 0; u < words * 32; u++)
            if (kind == 5 || (kind == 4 && u >= at && u < at + n) || (kind < 3 && below(odds) == 0)) kept[j * words + u / 32] |= 1u << (u % 32);
    }
    return kept;
}
static int64_t kept_words(int64_t max_len, int32_t block) { return (max_len + 32 * block - 1) / (32 * block); }

static void show(const test_case *c) {
    static const char *rules[] = { "topk", "ratio", "topp", "threshold" };
    printf("%s %s hd %d kv %d group %d %s len", lg_base_dtype(c->dtype)->name, c->compute == LG_COMPUTE_F32 ? "f32" : "auto", c->hd, c->n_kv, c->group,
           c->whole ? "whole" : "real");
    for (int s = 0; s < c->n_seq; s++) printf(" %lld", (long long)c->len[s]);
    if (c->hybrid) {
        printf(" block %d %s %g sinks %lld recents %lld read", c->block, rules[c->select.rule], c->select.value, (long long)c->select.sinks, (long long)c->select.recents);
        for (int h = 0; h < c->n_kv; h++) printf(" %d/%d", c->read[h], c->make[h]);
        if (c->sized) printf(" sized");
        for (int s = 0; s < c->n_seq; s++) printf("%s", c->kept[s] ? " kept" : "");
        if (c->n_latest) printf(" latest %d", c->n_latest);
        for (int h = 0; c->spread && h < c->n_kv; h++) printf("%s%d x%d", h ? " " : " share ", c->window[h], c->n_make[h]);
    }
    printf(": ");
}

static bool run(const test_case *c, lg_cuda_env e) {
    const int64_t rb = lg_base_row_bytes(c->dtype, c->hd), n_head = (int64_t)c->n_kv * c->group;
    lg_kv_geom g = { c->dtype, c->n_kv, c->hd, rb };
    int64_t n_page = 3, max_len = 64, table = 0;
    bool good = true;
    for (int s = 0; s < c->n_seq; s++) {
        n_page += (c->len[s] + LG_PAGE - 1) / LG_PAGE;
        if (c->len[s] > max_len) max_len = c->len[s];
    }
    max_len += 5;
    /* Pages in a random order; tables lie one behind the other. */
    int32_t *order = (int32_t *)lg_base_calloc(n_page, 4);
    for (int64_t i = 0; i < n_page; i++) order[i] = (int32_t)i;
    for (int64_t i = n_page - 1; i > 0; i--) {
        const int64_t j = below(i + 1);
        const int32_t x = order[i];
        order[i] = order[j];
        order[j] = x;
    }
    const int64_t bytes = n_page * c->n_kv * LG_PAGE * rb;
    uint8_t *k = (uint8_t *)lg_base_alloc(bytes), *v = (uint8_t *)lg_base_alloc(bytes);
    memset(k, 0xff, (size_t)bytes);
    memset(v, 0xff, (size_t)bytes);
    float row[512];
    lg_kv_seq seqs[SEQS];
    for (int s = 0; s < c->n_seq; s++) {
        seqs[s] = (lg_kv_seq){ order + table, c->len[s], NULL };
        table += (c->len[s] + LG_PAGE - 1) / LG_PAGE;
        for (int64_t t = 0; t < c->len[s]; t++) {
            for (int h = 0; h < c->n_kv; h++) {
                const int64_t at = (((int64_t)seqs[s].page[t / LG_PAGE] * c->n_kv + h) * LG_PAGE + t % LG_PAGE) * rb;
                for (int d = 0; d < c->hd; d++) row[d] = c->whole ? (float)(below(5) - 2) : 2 * unit();
                if (c->whole && c->dtype == LG_DTYPE_KV8)
                    for (int d = 0; d < c->hd; d += 32) row[d] = 127.0f;
                lg_ops_kv_store(&g, k + at, row);
                for (int d = 0; d < c->hd; d++) row[d] = unit();
                lg_ops_kv_store(&g, v + at, row);
            }
        }
    }
    const int64_t nq = c->n_seq * n_head * c->hd;
    float *q = (float *)lg_base_calloc(nq, 4), *want = (float *)lg_base_calloc(nq, 4), *got = (float *)lg_base_calloc(nq, 4), *again = (float *)lg_base_calloc(nq, 4);
    for (int64_t i = 0; i < nq; i++) q[i] = c->whole ? (float)(below(3) - 1) : unit() * (float)(1 + below(3));
    /* Sets to read: random ascending blocks; the last may be partial, some are empty. */
    const int64_t cap = (max_len + c->block - 1) / c->block, n_set = (int64_t)c->n_seq * c->n_slot;
    int32_t *idx = (int32_t *)lg_base_calloc(n_set * cap + 1, 4), *cnt = (int32_t *)lg_base_calloc(n_set + 1, 4), *cnt_got = (int32_t *)lg_base_calloc(n_set + 1, 4),
            *idx_got = (int32_t *)lg_base_calloc(n_set * cap + 1, 4);
    for (int s = 0; c->hybrid && s < c->n_seq; s++) {
        for (int j = 0; j < c->n_slot; j++) {
            const int64_t n = (c->len[s] + c->block - 1) / c->block, odds = 1 + below(6);
            int32_t *to = idx + (s * c->n_slot + j) * cap, m = 0;
            for (int64_t u = 0; u < n; u++)
                if (below(6) < odds && below(40)) to[m++] = (int32_t)u;
            if (c->sized) { /* blocks of sinks and recents, then others up to the budget */
                const int64_t own = c->spread ? lg_ops_share(c->budget[s], c->select.sinks + c->select.recents, c->slot[j]) : c->budget[s];
                int64_t left = own / c->block;
                for (int pass = 0; pass < 2; pass++)
                    for (int64_t u = m = 0; u < n; u++) {
                        const bool forced = u * c->block < c->select.sinks || (c->select.recents > 0 && (u + 1) * c->block > c->len[s] - c->select.recents && u < n);
                        if (pass == 0) left -= forced;
                        else if (forced || left-- > 0) to[m++] = (int32_t)u;
                    }
            }
            cnt[s * c->n_slot + j] = c->sized || below(12) ? m : 0;
        }
    }
    const float scale = 1.0f / sqrtf((float)c->hd);
    /* device */
    lg_cuda_seq dseq[SEQS];
    int32_t *dpage = (int32_t *)up(order, n_page * 4);
    const int64_t words = kept_words(max_len, c->block);
    uint32_t *kept[SEQS], *dkept[SEQS];
    for (int s = 0; s < c->n_seq; s++) {
        kept[s] = c->kept[s] ? draw_kept(c->n_slot, words) : NULL;
        dkept[s] = c->kept[s] ? (uint32_t *)up(kept[s], c->n_slot * words * 4) : NULL;
        dseq[s] = (lg_cuda_seq){ dpage + (seqs[s].page - order), seqs[s].len, dkept[s] };
    }
    lg_cuda_decode a = {};
    a.out = (float *)room(nq * 4);
    a.q = (float *)up(q, nq * 4);
    a.kv.k = (uint8_t *)up(k, bytes);
    a.kv.v = (uint8_t *)up(v, bytes);
    a.geom = g;
    a.seqs = (lg_cuda_seq *)up(dseq, sizeof dseq);
    a.n_seq = c->n_seq;
    a.n_head = (int32_t)n_head;
    a.scale = scale;
    a.max_len = max_len;
    a.score = (float *)room(c->n_seq * c->n_kv * max_len * 4);
    a.select = c->select;
    const int64_t least = c->select.sinks + c->select.recents;
    if (c->spread) a.spread = (lg_spread){ c->slot, c->window, c->n_make, least, 0, 0 };
    a.spread.latest = c->n_slot - c->n_latest;
    a.spread.n_latest = c->n_latest;
    a.sets = (lg_sets){ (int32_t *)up(idx, (n_set * cap + 1) * 4), (int32_t *)up(cnt, (n_set + 1) * 4), cap, c->n_slot, c->block, words };
    if (c->hybrid) {
        a.read = (int32_t *)up(c->read, sizeof c->read);
        a.make = (int32_t *)up(c->make, sizeof c->make);
        a.budget = (int64_t *)up(c->budget, sizeof c->budget);
        a.dense = (uint8_t *)up(c->dense, sizeof c->dense);
        a.read_host = c->roles_on_device ? NULL : c->read;
        a.make_host = c->roles_on_device ? NULL : c->make;
    }
    a.sized = c->sized;
    e.scratch_bytes = lg_cuda_decode_scratch(&e, c->n_seq, (int32_t)n_head, &g);
    e.scratch = (uint8_t *)room(e.scratch_bytes);
    lg_cuda_decode_attend(&e, &a);
    done();
    down(got, a.out, nq * 4);
    int64_t newest[SEQS * HEADS];
    for (int i = 0; i < c->n_seq * c->n_kv; i++) {
        const int64_t t = c->len[i / c->n_kv] - 1;
        newest[i] = (((int64_t)seqs[i / c->n_kv].page[t / LG_PAGE] * c->n_kv + i % c->n_kv) * LG_PAGE + t % LG_PAGE) * rb;
    }
    late_rows late = { (uint8_t *)(void *)a.q, a.kv.k, a.kv.v, (uint8_t *)up(q, nq * 4), (uint8_t *)up(k, bytes), (uint8_t *)up(v, bytes), (int64_t *)up(newest, sizeof newest), nq * 4,
                       rb, c->n_seq * c->n_kv, a.sets.idx, (int32_t *)up(idx, (n_set * cap + 1) * 4), c->hybrid ? n_set * cap : 0, (uint32_t *)room(16), NULL, NULL, 0, false, false };
    a.early = true;
    const int64_t n_raw = (n_head + 2 * c->n_kv) * c->hd, some = 4 + 4 * below(700), n_clear = some < n_raw ? some : n_raw;
    float *const raw = lg_cuda_decode_raw(&e, &a) ? (float *)lg_base_calloc(n_raw + c->hd, 4) : NULL, *bias = (float *)lg_base_calloc(n_raw, 4);
    lg_cuda_raw heads = {};
    if (raw) { /* what becomes these queries and rows: turned by quarters, so that nothing is rounded */
        float *cs = raw + n_raw, *sn = cs + c->hd / 2;
        const bool with_bias = below(2), interleaved = below(2);
        for (int d = 0; d < c->hd / 2; d++) {
            const int64_t turn = below(4);
            cs[d] = (float)(turn == 0) - (float)(turn == 2);
            sn[d] = (float)(turn == 1) - (float)(turn == 3);
        }
        memcpy(raw, q, (size_t)nq * 4);
        for (int h = 0; h < c->n_kv; h++) {
            lg_ops_kv_load(&g, raw + nq + h * c->hd, k + newest[h]);
            lg_ops_kv_load(&g, raw + nq + (c->n_kv + h) * c->hd, v + newest[h]);
        }
        for (int64_t h = 0; h < n_head + c->n_kv; h++)
            for (int d = 0; d < c->hd / 2; d++) {
                float *x = raw + h * c->hd + (interleaved ? 2 * d : d), *y = x + (interleaved ? 1 : c->hd / 2);
                const float x0 = *x, y0 = *y;
                *x = x0 * cs[d] + y0 * sn[d];
                *y = y0 * cs[d] - x0 * sn[d];
            }
        for (int64_t i = 0; i < n_raw && with_bias; i++) {
            bias[i] = -raw[i];
            raw[i] *= 2;
        }
        const float *dev = (float *)up(raw, (n_raw + c->hd) * 4), *b = with_bias ? (float *)up(bias, n_raw * 4) : NULL;
        late.raw = (float *)room(n_raw * 4);
        late.raw0 = dev;
        heads = lg_cuda_raw{ late.raw, late.raw + nq, late.raw + nq + c->n_kv * c->hd, b, b ? b + nq : NULL, b ? b + nq + c->n_kv * c->hd : NULL, dev + n_raw, dev + n_raw + c->hd / 2,
                             (float *)up(bias, n_clear * 4), (int32_t)n_clear, interleaved };
    }
    const bool leaves = lg_cuda_decode_leaves(&a); /* the same as bf16, too */
    const int64_t n_left = leaves ? n_head * c->hd * lg_beside(c->n_seq) : 0;
    uint16_t *left = (uint16_t *)lg_base_calloc(n_left + 1, 2);
    a.rows = leaves ? (uint16_t *)room(n_left * 2) : NULL;
    for (int r = 0; r < 3; r++) { /* a replay gives the same bits, also where queries and newest rows are written at the last moment */
        CUDA(cudaMemset(a.out, 0xff, (size_t)nq * 4));
        a.early = r > 0;
        late.sets_first = r == 2;
        late.n_raw = raw && r > 0 ? n_raw : 0;
        a.raw = heads;
        if (!late.n_raw) a.raw.q = NULL;
        late.poison = true;
        LG_LAUNCH(late_write, LATE_BLOCKS, 128, 0, e.stream, late);
        late.poison = false;
        LG_LAUNCH(late_write, LATE_BLOCKS, 128, 0, e.stream, late);
        a.made = lg_cuda_count{ late.count, LATE_BLOCKS };
        lg_cuda_decode_attend(&e, &a);
        done();
        down(again, a.out, nq * 4);
        if (memcmp(got, again, (size_t)nq * 4)) good = false;
        if (leaves) down(left, a.rows, n_left * 2);
        for (int64_t i = 0; i < nq && leaves; i++) good = good && left[lg_beside_at(lg_beside(c->n_seq), (int)(i / (n_head * c->hd)), (int)(i % (n_head * c->hd)))] == lg_base_f32_to_bf16(got[i]);
        if (leaves) CUDA(cudaMemset(a.rows, 0xff, (size_t)n_left * 2));
        for (int i = 0; late.n_raw && i < 2 * c->n_kv; i++) { /* the newest rows, and what is made absent */
            uint8_t mine[1024];
            float want_row[256];
            down(mine, (i % 2 ? a.kv.v : a.kv.k) + newest[i / 2], rb);
            lg_ops_kv_load(&g, row, mine);
            lg_ops_kv_load(&g, want_row, (i % 2 ? v : k) + newest[i / 2]);
            for (int d = 0; d < c->hd; d++) good = good && row[d] == want_row[d];
        }
        if (late.n_raw) {
            down(bias, heads.clear, heads.n_clear * 4);
            for (int i = 0; i < heads.n_clear; i++) good = good && ((uint32_t *)(void *)bias)[i] == LG_CUDA_ABSENT;
        }
    }
    a.raw.q = NULL;
    cudaFree(a.rows);
    a.rows = NULL;
    lg_base_free(left);
    const bool same = good;
    /* specification */
    lg_op_attend_hybrid b = { want, q, { k, v }, g, seqs, c->n_seq, c->budget, c->dense, c->read, c->make, { idx, cnt, cap, c->n_slot, c->block, words }, c->select, (int32_t)n_head, scale, a.spread };
    int32_t seq[SEQS], none[HEADS];
    int64_t last[SEQS];
    for (int s = 0; s < c->n_seq; s++) {
        seq[s] = s;
        last[s] = c->len[s] - 1;
    }
    lg_op_attend da = { want, q, { k, v }, g, seqs, c->n_seq, seq, last, c->n_seq, (int32_t)n_head, scale };
    for (int h = 0; h < HEADS; h++) none[h] = -1;
    b.make = none; /* sets are compared below, on the device's own scores */
    b.spread.n_latest = 0;
    if (c->hybrid) lg_ref_attend_hybrid(&b);
    else lg_ref_attend(&da);
    double worst = 0, num = 0, den = 0;
    for (int64_t i = 0; i < nq; i++) {
        const double d = fabs((double)got[i] - want[i]);
        fx_worsen(&worst, d);
        num += d * d;
        den += (double)want[i] * want[i];
    }
    const bool exact = c->compute == LG_COMPUTE_F32 || c->dtype != LG_DTYPE_KV8;
    good = good && worst <= (exact ? 2e-5 : 4e-3);
    /* scores, then sets from the device's scores */
    double worst_score = 0;
    int64_t n_sets = 0, bad_sets = 0;
    if (c->hybrid) {
        float *score = (float *)lg_base_calloc(c->n_seq * c->n_kv * max_len, 4), *wf = (float *)lg_base_calloc(max_len, 4),
              *positions = (float *)lg_base_calloc(max_len, 4);
        int32_t *wi = (int32_t *)lg_base_calloc(max_len, 4), *ids = (int32_t *)lg_base_calloc(cap, 4);
        uint8_t *sel = (uint8_t *)room(lg_cuda_select_scratch(&e, c->n_seq, SLOTS, max_len));
        uint32_t n_made = 0, n_said = 0;
        a.making = late.count + 1;
        for (int r = 0; r < 2; r++) n_said += lg_cuda_decode_select(&e, &a, NULL, sel);
        done();
        down(&n_made, a.making, sizeof n_made);
        bad_sets += n_made != n_said;
        down(score, a.score, c->n_seq * c->n_kv * max_len * 4);
        down(idx_got, a.sets.idx, (n_set * cap + 1) * 4);
        down(cnt_got, a.sets.n, (n_set + 1) * 4);
        for (int s = 0; s < c->n_seq; s++) {
            bool made[SLOTS] = { false };
            for (int h = 0; h <= c->n_kv; h++) { /* behind the heads: the latest slots */
                const bool latest = h == c->n_kv;
                if (c->dense[s] || (latest ? c->n_latest == 0 : c->make[h] < 0)) continue;
                if (latest)
                    for (int64_t t = 0; t < c->len[s]; t++) positions[t] = (float)t;
                const int32_t first = latest ? c->n_slot - c->n_latest : c->make[h], n_make = latest ? c->n_latest : c->spread ? c->n_make[h] : 1;
                const float *x = score + ((int64_t)s * c->n_kv + h) * max_len;
                for (int64_t t = 0; t < c->len[s] && !latest; t++) {
                    const int64_t at = (((int64_t)seqs[s].page[t / LG_PAGE] * c->n_kv + h) * LG_PAGE + t % LG_PAGE) * rb;
                    double sum = 0, size = 0;
                    lg_ops_kv_load(&g, row, k + at);
                    for (int j = 0; j < c->group; j++) {
                        for (int d = 0; d < c->hd; d++) {
                            const double y = (double)q[(s * n_head + (int64_t)h * c->group + j) * c->hd + d] * row[d];
                            sum += y;
                            size += fabs(y);
                        }
                    }
                    const double d = fabs((double)x[t] - (double)(float)(sum / c->group)) / (size > 0 ? size / c->group : 1); /* rounding grows with the terms */
                    fx_worsen(&worst_score, d);
                }
                for (int32_t j = first; j < first + n_make; j++) {
                    const int64_t slot = (int64_t)s * c->n_slot + j, budget = c->spread ? lg_ops_share(c->budget[s], least, c->slot[j]) : c->budget[s];
                    lg_select how = c->select;
                    how.kept = kept[s] ? kept[s] + j * words : NULL;
                    const int64_t n = lg_ops_select(ids, cap, latest ? positions : x, c->len[s], budget, c->block, &how, wf, wi);
                    made[j] = true;
                    n_sets++;
                    if (n == cnt_got[slot] && !memcmp(ids, idx_got + slot * cap, (size_t)n * 4)) continue;
                    bad_sets++;
                    if (bad_sets > 1) continue;
                    int64_t i = 0;
                    while (i < n && i < cnt_got[slot] && ids[i] == idx_got[slot * cap + i]) i++;
                    printf("[set %d of seq %d head %d: want %lld got %d, first difference at %lld: want %d got %d] ", j, s, h, (long long)n, cnt_got[slot], (long long)i,
                           i < n ? ids[i] : -1, i < cnt_got[slot] ? idx_got[slot * cap + i] : -1);
                }
            }
            for (int j = 0; j < c->n_slot; j++) { /* sets nobody makes stay */
                const int64_t slot = (int64_t)s * c->n_slot + j;
                if (!made[j] && (cnt[slot] != cnt_got[slot] || memcmp(idx + slot * cap, idx_got + slot * cap, (size_t)cap * 4))) bad_sets++;
            }
        }
        good = good && bad_sets == 0 && worst_score <= (c->whole && (c->group & (c->group - 1)) == 0 ? 0 : 4e-6); /* 2^-18: a query's rest is rounded */
        lg_base_free(score); lg_base_free(wf); lg_base_free(wi); lg_base_free(ids); lg_base_free(positions);
        CUDA(cudaFree(sel));
    }
    if (!good || getenv("VERBOSE")) {
        show(c);
        printf("n_sm %d max %.2g l2 %.2g score %.2g sets %lld bad %lld%s %s\n", e.n_sm, worst, sqrt(num / (den > 0 ? den : 1)), worst_score, (long long)n_sets, (long long)bad_sets,
               same ? "" : " REPLAY DIFFERS", good ? "ok" : "FAIL");
        fflush(stdout);
    }
    CUDA(cudaFree(e.scratch)); CUDA(cudaFree(a.out)); CUDA(cudaFree((void *)a.q)); CUDA(cudaFree(a.kv.k)); CUDA(cudaFree(a.kv.v)); CUDA(cudaFree((void *)a.seqs));
    CUDA(cudaFree((void *)late.q0)); CUDA(cudaFree((void *)late.k0)); CUDA(cudaFree((void *)late.v0)); CUDA(cudaFree((void *)late.at));
    CUDA(cudaFree((void *)late.idx0)); CUDA(cudaFree(late.count));
    if (raw) {
        CUDA(cudaFree(late.raw)); CUDA(cudaFree((void *)late.raw0)); CUDA(cudaFree(heads.clear));
        if (heads.bq) CUDA(cudaFree((void *)heads.bq));
    }
    lg_base_free(raw); lg_base_free(bias);
    CUDA(cudaFree(a.score)); CUDA(cudaFree(a.sets.idx)); CUDA(cudaFree(a.sets.n)); CUDA(cudaFree(dpage));
    if (c->hybrid) {
        CUDA(cudaFree((void *)a.read)); CUDA(cudaFree((void *)a.make)); CUDA(cudaFree((void *)a.budget)); CUDA(cudaFree((void *)a.dense));
    }
    for (int s = 0; s < c->n_seq; s++) {
        if (dkept[s]) CUDA(cudaFree(dkept[s]));
        lg_base_free(kept[s]);
    }
    lg_base_free(order); lg_base_free(k); lg_base_free(v); lg_base_free(q); lg_base_free(want); lg_base_free(got); lg_base_free(again);
    lg_base_free(idx); lg_base_free(cnt); lg_base_free(cnt_got); lg_base_free(idx_got);
    return good;
}

/* long_kv: 0, or the most KV heads of a single long sequence: few segments of many blocks each. */
static test_case draw(int64_t longest, int32_t long_kv) {
    static const lg_dtype dtypes[] = { LG_DTYPE_BF16, LG_DTYPE_F16, LG_DTYPE_KV8, LG_DTYPE_F32, LG_DTYPE_BF16, LG_DTYPE_KV8 };
    static const int32_t sizes[] = { 64, 128, 128, 80, 96, 112, 256, 128, 64, 50, 2, 254 }, groups[] = { 1, 2, 3, 4, 4, 7, 8, 9, 16 }, blocks[] = { 1, 1, 16, 32, 64 };
    test_case c = {};
    c.dtype = dtypes[below(6)];
    c.compute = below(4) ? LG_COMPUTE_AUTO : LG_COMPUTE_F32;
    c.hd = sizes[below(12)];
    c.group = groups[below(9)];
    c.n_kv = 1 + (int32_t)below(4);
    c.n_seq = 1 + (int32_t)below(below(3) ? 2 : SEQS);
    if (long_kv) {
        c.n_kv = 1 + (c.n_kv - 1) % long_kv;
        c.n_seq = 1;
        c.group = 1 + (c.group - 1) % 8;
    }
    c.block = blocks[below(5)];
    const bool reads = long_kv && below(2); /* a set of known size, by the last head */
    if (reads) { /* as kernels that take raw heads have them */
        c.hd = 64 << below(3);
        c.compute = LG_COMPUTE_AUTO;
        if (c.dtype == LG_DTYPE_F32) c.dtype = LG_DTYPE_BF16;
    }
    c.hybrid = reads || below(3) != 0;
    c.whole = below(3) == 0;
    c.roles_on_device = below(4) == 0 && !reads;
    c.select.rule = reads ? (below(2) ? LG_RULE_TOPK : LG_RULE_RATIO) : (lg_rule)below(4);
    c.select.scale = 1.0f / sqrtf((float)c.hd) * (c.whole ? 0.2f : 1.0f);
    c.select.sinks = below(3) ? below(40) : 0;
    c.select.recents = below(3) ? below(80) : 0;
    c.select.value = c.select.rule == LG_RULE_THRESHOLD ? pow(10, -1 - (double)below(300) / 100) : 0.05 + 0.913 * (double)below(1000) / 1000;
    for (int s = 0; s < c.n_seq; s++) {
        const int64_t top = below(4) && !long_kv ? 200 : longest;
        c.len[s] = long_kv ? longest - below(longest / 3) : 1 + below(top);
        c.budget[s] = c.select.sinks + c.select.recents + below(c.len[s] + 1) * (int64_t)(below(3) != 0);
        c.dense[s] = below(6) == 0 && !reads;
    }
    int32_t makes = 0;
    c.spread = c.hybrid && !c.roles_on_device && c.select.rule == LG_RULE_TOPK && below(3);
    for (int h = 0; h < c.n_kv; h++) {
        c.make[h] = c.hybrid && below(2) && !(reads && h == c.n_kv - 1) ? makes : -1;
        c.n_make[h] = c.make[h] < 0 ? 0 : c.spread ? 1 + (int32_t)below(3) : 1;
        makes += c.n_make[h];
        c.window[h] = (int32_t)below(3 * LG_SHARE_ONE);
    }
    c.sized = c.hybrid && (c.select.rule == LG_RULE_TOPK || c.select.rule == LG_RULE_RATIO) && (reads || below(3));
    for (int j = 0; j < SLOTS; j++) c.slot[j] = below(4) ? (int32_t)below(3 * LG_SHARE_ONE) : 0;
    c.n_slot = makes + (int32_t)below(3) + reads;
    for (int h = 0; h < c.n_kv; h++) {
        c.read[h] = LG_HEAD_DENSE;
        const bool must = reads && h == c.n_kv - 1;
        if (!c.hybrid || c.make[h] >= 0 || (below(3) == 0 && !must)) continue;
        c.read[h] = c.n_slot > makes && (below(2) || must) ? makes + (int32_t)below(c.n_slot - makes) : LG_HEAD_WINDOW;
    }
    if (c.hybrid && (c.select.rule == LG_RULE_TOPK || c.select.rule == LG_RULE_RATIO)) {
        for (int s = 0; s < c.n_seq; s++) c.kept[s] = below(2) != 0;
        if (below(2)) c.n_slot += c.n_latest = 1 + (int32_t)below(3);
    }
    return c;
}

/* Selection of tokens by topk, from made-up scores. */
static void draw_scores(float *x, int64_t len, int64_t k) {
    const int64_t kind = below(10), at = below(len), n = 1 + below(len), values = 2 + below(40), period = (int64_t)1 << below(12);
    for (int64_t t = 0; t < len; t++) {
        x[t] = unit() + unit() + unit() + unit();
        switch (kind) {
        case 1: x[t] = (float)below(values); break;                                /* ties */
        case 2: x[t] = 0.25f; break;
        case 3: x[t] += t >= at && t < at + n ? 10.0f : 0.0f; break;               /* the best in one place */
        case 4: x[t] += t % period == at % period ? 10.0f : 0.0f; break;           /* evenly spread */
        case 5: x[t] = below(2) ? (below(2) ? -0.0f : 0.0f) : 1e-42f * x[t]; break;
        case 6: x[t] = below(8) ? x[t] : below(2) ? INFINITY : -INFINITY; break;
        case 7: x[t] = (float)(at % 2 ? t : -t); break;
        case 8: x[t] = below(len) < k + k / 8 ? 3.0f : below(2) ? x[t] : -3.0f; break; /* more at the top than fit */
        case 9: x[t] = t == at ? 1e30f : 1.0f + 0.1f * x[t]; break;                /* one far above the rest */
        default: break;
        }
    }
}

static bool run_select(const lg_cuda_env *e, int64_t longest) {
    const int32_t n_kv = 1 + (int32_t)below(4), n_seq = 1 + (int32_t)below(3);
    const int64_t room_of = 1 + below(below(3) ? longest : longest / 8), max_len = room_of + below(2) * below(3000);
    const bool spread = below(3) == 0;
    lg_cuda_seq seqs[SEQS] = {};
    int64_t budget[SEQS];
    uint8_t dense[SEQS];
    uint32_t *kept[SEQS] = {};
    int32_t make[HEADS], n_make[HEADS + 1] = { 0 }, window[HEADS] = { 0 }, share[SLOTS], n_slot = 0;
    lg_cuda_decode a = {};
    a.select.rule = below(2) ? LG_RULE_TOPK : LG_RULE_RATIO;
    a.select.sinks = below(3) ? below(150) : 0;
    a.select.recents = below(3) ? below(300) : 0;
    for (int s = 0; s < n_seq; s++) {
        seqs[s].len = below(10) ? 1 + below(room_of) : room_of;
        const int64_t even = (seqs[s].len - a.select.sinks - a.select.recents) / 512 * 512; /* keys that fill all threads */
        if (even > 0 && below(4) == 0) seqs[s].len = even + a.select.sinks + a.select.recents;
        const int64_t most = below(3) ? seqs[s].len / (2 + below(30)) : seqs[s].len + 10;
        budget[s] = below(12) ? a.select.sinks + a.select.recents + below(most + 1) : below(200);
        dense[s] = below(8) == 0;
    }
    for (int h = 0; h < n_kv; h++) {
        n_make[h] = below(4) == 0 ? 0 : spread ? 1 + (int32_t)below(3) : 1;
        make[h] = n_make[h] ? n_slot : -1;
        n_slot += n_make[h];
    }
    for (int j = 0; j < SLOTS; j++) share[j] = (int32_t)below(2 * LG_SHARE_ONE);
    const int32_t n_latest = below(3) ? 0 : 1 + (int32_t)below(4), latest = n_slot;
    n_slot += n_latest;
    if (n_slot == 0) return true;
    const int64_t words = kept_words(max_len, 1);
    for (int s = 0; s < n_seq; s++)
        if (below(2)) seqs[s].kept = (uint32_t *)up(kept[s] = draw_kept(n_slot, words), n_slot * words * 4);
    const int64_t cap = below(6) ? max_len : 1 + below(max_len), least = a.select.sinks + a.select.recents;
    float *score = (float *)lg_base_calloc(n_seq * n_kv * max_len, 4), *wf = (float *)lg_base_calloc(max_len, 4),
          *positions = (float *)lg_base_calloc(max_len, 4);
    int32_t *wi = (int32_t *)lg_base_calloc(max_len, 4), *want = (int32_t *)lg_base_calloc(cap, 4), *got = (int32_t *)lg_base_calloc(n_seq * n_slot * cap, 4), n_got[SEQS * SLOTS];
    for (int64_t i = 0; i < n_seq * n_kv * max_len; i++) score[i] = NAN;
    for (int64_t t = 0; t < max_len; t++) positions[t] = (float)t;
    for (int i = 0; i < n_seq * n_kv; i++) draw_scores(score + i * max_len, seqs[i / n_kv].len, budget[i / n_kv]);
    a.score = (float *)up(score, n_seq * n_kv * max_len * 4);
    a.geom.n_head_kv = n_kv;
    a.seqs = (lg_cuda_seq *)up(seqs, sizeof seqs);
    a.n_seq = n_seq;
    a.max_len = max_len;
    a.make = (int32_t *)up(make, sizeof make);
    a.make_host = below(3) || spread ? make : NULL;
    a.budget = (int64_t *)up(budget, sizeof budget);
    a.dense = (uint8_t *)up(dense, sizeof dense);
    if (spread) a.spread = (lg_spread){ share, window, n_make, least, 0, 0 };
    a.spread.latest = latest;
    a.spread.n_latest = n_latest;
    n_make[n_kv] = n_latest; /* behind the heads: the latest slots */
    a.sets = (lg_sets){ (int32_t *)room(n_seq * n_slot * cap * 4), (int32_t *)room(n_seq * n_slot * 4), cap, n_slot, 1, words };
    uint8_t *scratch = (uint8_t *)room(lg_cuda_select_scratch(e, n_seq, n_slot > n_kv ? n_slot : n_kv, max_len));
    for (int r = 0; r < 2; r++) lg_cuda_decode_select(e, &a, NULL, scratch);
    done();
    down(got, a.sets.idx, n_seq * n_slot * cap * 4);
    down(n_got, a.sets.n, n_seq * n_slot * 4);
    int bad = 0;
    for (int s = 0; s < n_seq; s++)
        for (int h = 0; h <= n_kv && !dense[s]; h++)
            for (int j = 0; j < n_make[h]; j++) {
                const int32_t of = (h == n_kv ? latest : make[h]) + j;
                const int64_t slot = (int64_t)s * n_slot + of, b = spread ? lg_ops_share(budget[s], least, share[of]) : budget[s];
                lg_select how = a.select;
                how.kept = kept[s] ? kept[s] + of * words : NULL;
                const int64_t n = lg_ops_select(want, cap, h == n_kv ? positions : score + (s * n_kv + h) * max_len, seqs[s].len, b, 1, &how, wf, wi);
                if (n == n_got[slot] && !memcmp(want, got + slot * cap, (size_t)n * 4)) continue;
                if (bad++) continue;
                int64_t i = 0;
                while (i < n && i < n_got[slot] && want[i] == got[slot * cap + i]) i++;
                printf("select%s seq %d head %d set %d len %lld budget %lld sinks %lld recents %lld cap %lld: want %lld got %d, first difference at %lld: want %d got %d FAIL\n", kept[s] ? " kept" : "", s, h, j,
                       (long long)seqs[s].len, (long long)b, (long long)a.select.sinks, (long long)a.select.recents, (long long)cap, (long long)n, n_got[slot], (long long)i,
                       i < n ? want[i] : -1, i < n_got[slot] ? got[slot * cap + i] : -1);
            }
    for (int s = 0; s < n_seq; s++) {
        if (seqs[s].kept) CUDA(cudaFree((void *)seqs[s].kept));
        lg_base_free(kept[s]);
    }
    CUDA(cudaFree(a.score)); CUDA(cudaFree((void *)a.seqs)); CUDA(cudaFree((void *)a.make)); CUDA(cudaFree((void *)a.budget)); CUDA(cudaFree((void *)a.dense));
    CUDA(cudaFree(a.sets.idx)); CUDA(cudaFree(a.sets.n)); CUDA(cudaFree(scratch));
    lg_base_free(score); lg_base_free(wf); lg_base_free(wi); lg_base_free(want); lg_base_free(got); lg_base_free(positions);
    return bad == 0;
}

static bool run_observe(lg_cuda_env e, int64_t longest) {
    static const lg_dtype dtypes[] = { LG_DTYPE_BF16, LG_DTYPE_F16, LG_DTYPE_KV8, LG_DTYPE_F32 };
    static const int32_t sizes[] = { 64, 128, 80, 256, 50, 2 }, groups[] = { 1, 2, 3, 4, 7, 9 };
    const lg_dtype dtype = dtypes[below(4)];
    const int32_t hd = sizes[below(6)], group = groups[below(6)], n_kv = 1 + (int32_t)below(3), n_head = n_kv * group;
    const int64_t len = 1 + below(below(2) ? longest : 200), most = len < LG_OBSERVE_ROWS ? len : LG_OBSERVE_ROWS, n = below(4) == 0 ? 1 : below(3) ? 1 + below(most) : most;
    const int64_t seen = below(4) ? len : n + below(len - n + 1), rb = lg_base_row_bytes(dtype, hd), ld = len + below(100), n_page = (len + LG_PAGE - 1) / LG_PAGE;
    const int64_t bytes = n_page * n_kv * LG_PAGE * rb, nq = n * n_head * hd;
    const lg_kv_geom g = { dtype, n_kv, hd, rb };
    int32_t *page = (int32_t *)lg_base_calloc(n_page, 4);
    uint8_t *k = (uint8_t *)lg_base_alloc(bytes);
    float *q = (float *)lg_base_calloc(nq, 4), *want = (float *)lg_base_calloc(n_kv * ld, 4), *got = (float *)lg_base_calloc(n_kv * ld, 4), *again = (float *)lg_base_calloc(n_kv * ld, 4), row[256];
    int64_t idx[LG_OBSERVE_ROWS];
    memset(k, 0xff, (size_t)bytes);
    for (int64_t p = 0; p < n_page; p++) page[p] = (int32_t)(n_page - 1 - p);
    for (int64_t t = 0; t < seen; t++)
        for (int h = 0; h < n_kv; h++) {
            for (int d = 0; d < hd; d++) row[d] = 2 * unit();
            lg_ops_kv_store(&g, k + (((int64_t)page[t / LG_PAGE] * n_kv + h) * LG_PAGE + t % LG_PAGE) * rb, row);
        }
    for (int64_t i = 0; i < nq; i++) q[i] = 2 * unit();
    for (int64_t r = 0; r < n; r++) idx[r] = seen - n + r;
    for (int64_t i = 0; i < n_kv * ld; i++) want[i] = -1; /* what is behind the sequence stays */
    const lg_kv_seq seq = { page, len, NULL };
    const lg_cuda_seq dseq = { (int32_t *)up(page, n_page * 4), len, NULL };
    lg_op_observe a = { want, ld, q, { k, NULL }, g, &seq, idx, n, n_head, 1.5f / sqrtf((float)hd) };
    float *mass = (float *)up(want, n_kv * ld * 4);
    lg_ref_observe(&a);
    a.mass = mass;
    a.q = (float *)up(q, nq * 4);
    a.kv.k = (uint8_t *)up(k, bytes);
    a.seq = (lg_kv_seq *)up(&dseq, sizeof dseq);
    a.idx = (int64_t *)up(idx, sizeof idx);
    e.scratch = (uint8_t *)room(lg_cuda_observe_scratch(n, len, n_head));
    lg_cuda_observe(&e, &a, len);
    done();
    down(got, mass, n_kv * ld * 4);
    lg_cuda_observe(&e, &a, len);
    done();
    down(again, mass, n_kv * ld * 4);
    double worst = 0;
    for (int64_t i = 0; i < n_kv * ld; i++) fx_worsen(&worst, fabs((double)got[i] - want[i]) / (fabs((double)want[i]) + 1e-9));
    const bool same = !memcmp(got, again, (size_t)(n_kv * ld) * 4), good = same && worst < 2e-5;
    if (!good || getenv("VERBOSE"))
        printf("observe %s hd %d kv %d group %d len %lld seen %lld rows %lld: max %.2g%s %s\n", lg_base_dtype(dtype)->name, hd, n_kv, group, (long long)len, (long long)seen, (long long)n,
               worst, same ? "" : " REPLAY DIFFERS", good ? "ok" : "FAIL");
    CUDA(cudaFree(mass)); CUDA(cudaFree((void *)a.q)); CUDA(cudaFree(a.kv.k)); CUDA(cudaFree((void *)a.seq)); CUDA(cudaFree((void *)a.idx)); CUDA(cudaFree((void *)dseq.page));
    CUDA(cudaFree(e.scratch));
    lg_base_free(page); lg_base_free(k); lg_base_free(q); lg_base_free(want); lg_base_free(got); lg_base_free(again);
    return good;
}

#ifndef LG_CUDA_EMU
#include "decode_time.cuh"
#endif

int main(int argc, char **argv) {
    lg_cuda_env e = {};
#ifdef LG_CUDA_EMU
    e.cc = 90;
    e.smem_max = 232448;
    const int64_t longest = 1200;
#else
    struct cudaDeviceProp p;
    CUDA(cudaGetDeviceProperties(&p, 0));
    e.n_sm = p.multiProcessorCount;
    e.cc = p.major * 10 + p.minor;
    e.smem_max = (int64_t)p.sharedMemPerBlockOptin;
    printf("%s, %d multiprocessors, %lld bytes of shared memory a block\n", p.name, e.n_sm, (long long)e.smem_max);
    if (argc > 1 && (!strcmp(argv[1], "time") || !strcmp(argv[1], "quick") || !strcmp(argv[1], "select"))) return run_times(e, argv[1][0]);
    const int64_t longest = 5000;
#endif
    const int first = argc > 2 ? atoi(argv[2]) : 1, n = argc > 3 ? atoi(argv[3]) : 200;
    int failed = 0;
    way_count ways = {};
    for (int i = first; i < first + n; i++) {
        seed = (uint64_t)i;
        counter = 0;
        static const int sms[] = { 1, 2, 3, 5, 11, 24 };
#ifndef LG_CUDA_EMU
        e.n_sm = i % 2 ? p.multiProcessorCount : sms[i / 2 % 6]; /* few blocks: long stretches */
        const test_case c = draw(longest, i % 8 > 1 && i % 2 ? 2 : 0);
#else
        e.n_sm = sms[i % 6];
        e.smem_max = i % 4 ? 232448 : 101376;
        const test_case c = draw(longest, i % 6 == 5 ? 2 : i % 6 == 4 ? 1 : 0);
#endif
        e.compute = c.compute;
        if (!run(&c, e)) {
            printf("  seed %d\n", i);
            failed++;
        }
        ways_add(&ways);
    }
    for (int i = first; i < first + 2 * n; i++) {
        seed = (uint64_t)i;
        counter = 1u << 30;
#ifdef LG_CUDA_EMU
        const int64_t most = 6000;
#else
        const int64_t most = i % 8 ? 60000 : 1300000; /* the longest is beyond what threads keep */
#endif
        if (!run_select(&e, most)) {
            printf("  seed %d\n", i);
            failed++;
        }
        ways_add(&ways);
    }
    for (int i = first; i < first + n; i++) {
        seed = (uint64_t)i;
        counter = 1u << 31;
        if (!run_observe(e, longest)) {
            printf("  seed %d\n", i);
            failed++;
        }
    }
    if (COUNTED && n >= 8) failed += ways_show(&ways, n < 40 ? 1 : n / 40);
    printf("%d passed, %d failed, 0 skipped\n", 4 * n - failed, failed);
    return failed != 0;
}
