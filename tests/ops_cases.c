/* ops: every op of a back end against the plain C specification (lg_ops_ref), and its speed, from one table of cases.
 *
 *     ops list [--part K/N] [FILTER]
 *     ops test [--device cpu|cuda[:i]] [--compute auto|f32] [--part K/N] [FILTER]     TAP on stdout; exit 1 when a case failed
 *     ops perf [--device ..] [--compute ..] [--part K/N] [FILTER]                     GB/s and TFLOP/s from the bytes and operations a case must move and do
 *
 * --part K/N: of these cases each N'th, from the K'th on (scripts/ops-parts.sh runs all N beside each other).
 * FILTER: cases whose name holds this text, or one of several with | between them. A case's error is ||got - want|| / ||want||; NaN never passes; outputs are poisoned first.
 * A layer (several ops in one sync) must also equal the same ops with a sync after each.
 * Bounds: compute f32 2e-5; auto: inputs rounded to 8 bits or bf16, 1.5e-2. Attention of one row per sequence and prefill: f32 2e-5, auto 8e-3; attention mass: 2e-5, on a CPU with AVX512_BF16 (auto) 8e-3.
 * Sets must equal the specification's: keys and queries are whole numbers there, so that scores are exact and ties common. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ops/cpu/gemm.h"
#include "ops/ops.h"
#include "worsen.h"

typedef enum what { PRODUCT, GATE_UP, LOGITS, EMBED, QKV, LAYER, KV_WRITE, ARGMAX, SAMPLE, ATTEND, HYBRID, OBSERVE } what;
static const char *const what_name[] = { "product", "gate_up", "logits", "embed", "qkv", "layer", "kv_write", "argmax", "sample", "attend", "hybrid", "observe" };

typedef struct cas {
    what k;
    lg_dtype w;            /* weights */
    int64_t n_in, n_out, n_tok; /* layer: width of the model and of its feed-forward part */
    int64_t vocab;         /* layer: ends with logits; 0: with the next layer's q, k and v */
    int64_t deep;          /* layer: then attention of each row over a sequence of its own, of at most so many tokens, and the next o; 0: not */
    int32_t rank;          /* low-rank addition */
    float odd;             /* product, logits, layer: what inputs (the residual) of odd rows are multiplied by; 0: 1 */
    bool bias, qk_norm, interleaved;
    lg_dtype kv;
    int32_t n_kv, group, d;
    int64_t len[4]; int32_t n_seq; /* attention; attend, observe: n_tok last rows of each sequence */
    lg_rule rule; int32_t block; double value; bool dense_row, spread;
    int32_t keep, n_latest; /* hybrid: 1024ths of all units that a set keeps; latest slots */
    bool perf;
    char name[160];
} cas;

typedef void (*visit_fn)(void *user, const cas *c);

/* ---- the table -------------------------------------------------------------------------------------- */
static void named(visit_fn f, void *u, cas c) {
    int n = snprintf(c.name, sizeof c.name, "%s", what_name[c.k]);
    const size_t size = sizeof c.name;
#define ADD(...) n += snprintf(c.name + n, size - (size_t)n, __VA_ARGS__)
    if (c.k <= LAYER) ADD(" %s %lldx%lld n%lld", lg_base_dtype(c.w)->name, (long long)c.n_out, (long long)c.n_in, (long long)c.n_tok);
    if (c.k == ARGMAX || c.k == SAMPLE) ADD(" %lld n%lld", (long long)c.n_out, (long long)c.n_tok);
    if (c.k >= QKV && c.k != ARGMAX && c.k != SAMPLE) ADD(" kv %s d%d kv%d g%d", lg_base_dtype(c.kv)->name, c.d, c.n_kv, c.group);
    if (c.k >= ATTEND) {
        ADD(" len");
        for (int i = 0; i < c.n_seq; i++) ADD("%c%lld", i ? ',' : ' ', (long long)c.len[i]);
        if (c.k == ATTEND || c.k == OBSERVE) ADD(" n%lld", (long long)c.n_tok);
    }
    if (c.k == HYBRID)
        ADD(" %s block %d%s%s", (const char *[]){ "topk", "ratio", "topp", "threshold" }[c.rule], c.block, c.dense_row ? " one dense" : "", c.spread ? " budgets per head" : "");
    if (c.keep) ADD(" keep %d/1024", c.keep);
    if (c.n_latest) ADD(" latest %d", c.n_latest);
    if (c.vocab) ADD(" logits %lld", (long long)c.vocab);
    if (c.deep) ADD(" attention %lld", (long long)c.deep);
    if (c.rank) ADD(" lora %d", c.rank);
    if (c.odd != 0) ADD(" odd rows %g", (double)c.odd);
    if (c.bias) ADD(" bias");
    if (c.qk_norm) ADD(" qk_norm");
    if (c.interleaved) ADD(" interleaved");
#undef ADD
    f(u, &c);
}

static const lg_dtype weights[] = { LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16, LG_DTYPE_Q8_0, LG_DTYPE_Q4_0, LG_DTYPE_Q4_1, LG_DTYPE_Q5_0, LG_DTYPE_Q5_1,
                                    LG_DTYPE_Q4_K, LG_DTYPE_Q5_K, LG_DTYPE_Q6_K };
static const lg_dtype caches[] = { LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16, LG_DTYPE_KV8 };
enum { N_WEIGHT = sizeof weights / sizeof *weights, N_CACHE = sizeof caches / sizeof *caches };

static void product_cases(visit_fn f, void *u) {
    static const int64_t shape[][2] = { { 50, 64 }, { 192, 576 }, { 576, 1536 }, { 33, 256 }, { 300, 2048 }, { 64, 14336 } };
    static const int64_t rows[] = { 1, 2, 5, 8, 9, 16, 17, 40, 70 };
    for (int w = 0; w < N_WEIGHT; w++)
        for (int s = 0; s < 6; s++)
            for (int n = 0; n < 9; n++) {
                cas c = { .k = PRODUCT, .w = weights[w], .n_out = shape[s][0], .n_in = shape[s][1], .n_tok = rows[n] };
                if (lg_base_row_bytes(c.w, c.n_in) < 0 || (c.n_in > 4000 && c.n_tok > 9)) continue;
                named(f, u, c);
                c.k = GATE_UP;
                if (n % 2 == 0) named(f, u, c);
                c.k = LOGITS;
                if (n % 3 == 0) named(f, u, c);
                c.k = EMBED;
                if (n == 2) named(f, u, c);
            }
    for (int w = 0; w < N_WEIGHT; w++) { /* one row of weights large enough for kernels of their own (CUDA: 4 MB) */
        cas c = { .w = weights[w], .n_out = 8003, .n_in = 1280, .n_tok = 1 };
        for (int k = PRODUCT; k <= LOGITS; k++) named(f, u, (c.k = (what)k, c));
        if (c.w < LG_DTYPE_Q4_K) named(f, u, (c.k = PRODUCT, c.n_out = 9001, c.n_in = 1056, c)); /* an odd number of chunks, the last one not whole */
        if (c.w <= LG_DTYPE_BF16) named(f, u, (c.n_out = 5003, c.n_in = 1000, c));
    }
    for (int n = 0; n < 8; n++) { /* several rows of such weights */
        cas c = { .w = n < 4 ? LG_DTYPE_BF16 : LG_DTYPE_F16, .n_out = 8003, .n_in = 1280, .n_tok = (int64_t[]){ 2, 8, 9, 16 }[n % 4] };
        for (int k = PRODUCT; k <= LOGITS; k++) named(f, u, (c.k = (what)k, c));
        named(f, u, (c.k = PRODUCT, c.n_out = 5003, c.n_in = 1000, c));
        named(f, u, (c.n_out = 160, c.n_in = 14336, c)); /* inputs too wide to be kept */
        named(f, u, (c.k = GATE_UP, c));
    }
    for (int w = 0; w < N_WEIGHT; w++) {
        if (weights[w] <= LG_DTYPE_BF16) continue;
        for (int k = 0; k < 2; k++) named(f, u, (cas){ .k = PRODUCT, .w = weights[w], .n_out = 8003, .n_in = 1280, .n_tok = k ? 9 : 2 });
        for (int k = 0; k < 2; k++) named(f, u, (cas){ .k = k ? GATE_UP : PRODUCT, .w = weights[w], .n_out = 600, .n_in = 14336, .n_tok = k ? 16 : 8 }); /* columns in parts */
        named(f, u, (cas){ .k = LOGITS, .w = weights[w], .n_out = 8003, .n_in = 1280, .n_tok = w % 2 ? 16 : 17 }); /* in one turn, in two */
        if (weights[w] < LG_DTYPE_Q4_K) named(f, u, (cas){ .k = PRODUCT, .w = weights[w], .n_out = 9001, .n_in = 1056, .n_tok = 5 });
        if (w % 2) named(f, u, (cas){ .k = LOGITS, .w = weights[w], .n_out = 8003, .n_in = 1280, .n_tok = 8, .odd = 1e-7f }); /* rows that f16 does not hold as they are */
        named(f, u, (cas){ .k = w % 2 ? PRODUCT : LOGITS, .w = weights[w], .n_out = 8003, .n_in = 1280, .n_tok = w % 2 ? 9 : 16, .odd = 1e6f });
    }
    for (int w = 0; w < N_WEIGHT; w++) { /* odd sizes where rows need not be whole blocks, low rank */
        if (weights[w] <= LG_DTYPE_BF16) named(f, u, (cas){ .k = PRODUCT, .w = weights[w], .n_out = 17, .n_in = 37, .n_tok = 3 });
        if (weights[w] <= LG_DTYPE_BF16) named(f, u, (cas){ .k = PRODUCT, .w = weights[w], .n_out = 17, .n_in = 37, .n_tok = 30 });
        named(f, u, (cas){ .k = PRODUCT, .w = weights[w], .n_out = 200, .n_in = 256, .n_tok = 3, .rank = 8 });
        named(f, u, (cas){ .k = GATE_UP, .w = weights[w], .n_out = 200, .n_in = 256, .n_tok = 20, .rank = 16 });
        named(f, u, (cas){ .k = PRODUCT, .w = weights[w], .n_out = 200, .n_in = 256, .n_tok = 80, .rank = 16 });
        named(f, u, (cas){ .k = GATE_UP, .w = weights[w], .n_out = 200, .n_in = 256, .n_tok = 80, .rank = 12 });
    }
}

static void qkv_cases(visit_fn f, void *u) {
    static const int32_t head[][3] = { { 64, 3, 3 }, { 128, 2, 4 }, { 80, 1, 7 }, { 96, 2, 2 }, { 64, 2, 1 }, { 128, 1, 8 } };
    static const int64_t rows[] = { 1, 3, 16, 33 };
    static const lg_dtype some[] = { LG_DTYPE_BF16, LG_DTYPE_Q4_1, LG_DTYPE_Q8_0, LG_DTYPE_F32 };
    for (int h = 0; h < 6; h++)
        for (int k = 0; k < N_CACHE; k++)
            for (int n = 0; n < 4; n++)
                named(f, u, (cas){ .k = QKV, .w = some[(h + k + n) % 4], .n_in = 576, .n_out = head[h][0] * head[h][1] * head[h][2], .n_tok = rows[n], .kv = caches[k],
                                   .d = head[h][0], .n_kv = head[h][1], .group = head[h][2], .bias = (h + n) % 2, .qk_norm = (h + n) % 3 == 0,
                                   .interleaved = (h + k) % 2, .rank = n == 1 ? 4 : n == 3 ? 8 * (1 + k % 2) : 0 });
    for (int k = 0; k < N_CACHE; k++) {
        named(f, u, (cas){ .k = KV_WRITE, .n_tok = 37, .kv = caches[k], .d = 64, .n_kv = 3, .group = 1, .w = LG_DTYPE_F32 });
        named(f, u, (cas){ .k = KV_WRITE, .n_tok = 5, .kv = caches[k], .d = 128, .n_kv = 8, .group = 1, .interleaved = true, .w = LG_DTYPE_BF16 });
    }
    named(f, u, (cas){ .k = ARGMAX, .n_out = 49152, .n_tok = 1 });
    named(f, u, (cas){ .k = ARGMAX, .n_out = 1001, .n_tok = 9 });
    named(f, u, (cas){ .k = SAMPLE, .n_out = 128256, .n_tok = 16 });
    named(f, u, (cas){ .k = SAMPLE, .n_out = 49152, .n_tok = 1 });
    named(f, u, (cas){ .k = SAMPLE, .n_out = 1001, .n_tok = 70 });
}

/* What stands between two layers' attention, recorded in one sync: o, gate_up, down, then q k v of the next layer or the logits. */
static void layer_cases(visit_fn f, void *u) {
    for (int w = 0; w < N_WEIGHT; w++) {
        cas c = { .k = LAYER, .w = weights[w], .n_in = 768, .n_out = 1536, .n_tok = 1, .kv = caches[w % N_CACHE], .d = 64, .n_kv = 3, .group = 4,
                  .bias = w % 2, .qk_norm = w % 3 == 0, .interleaved = w % 4 == 1 };
        named(f, u, c);
        named(f, u, (c.kv = caches[(w + 1) % N_CACHE], c.d = 128, c.n_kv = 2, c.group = 3, c.bias = !c.bias, c.qk_norm = w % 3 == 1, c));
        named(f, u, (c.n_in = 256, c.n_out = 512, c.n_kv = 1, c.group = 2, c.vocab = 60001, c)); /* (many tiles for each block) */
        c = (cas){ .k = LAYER, .w = weights[w], .n_in = 352, .n_out = 1056, .n_tok = 1, .kv = caches[(w + 2) % N_CACHE], .d = 80, .n_kv = 2, .group = 2, .bias = true, .interleaved = w % 2 };
        if (c.w < LG_DTYPE_Q4_K) named(f, u, c);
        if (c.w <= LG_DTYPE_BF16) named(f, u, (c.n_in = 344, c.n_out = 1000, c.d = 48, c.group = 3, c)); /* neither whole tiles nor whole pieces */
        if (c.w <= LG_DTYPE_BF16) named(f, u, (c.d = 72, c.group = 1, c)); /* a tile across two heads */
    }
    for (int w = 2; w < N_WEIGHT; w += 2) {
        cas c = { .k = LAYER, .w = weights[w], .n_in = 512, .n_out = 768, .n_tok = 1, .kv = caches[w / 2 % N_CACHE], .d = 64, .n_kv = 2, .group = 2, .rank = 8 };
        named(f, u, c);
        named(f, u, (c.rank = 0, c.n_tok = 2, c));
        if (w <= 4) named(f, u, (c.n_tok = 1, c.n_in = 4096, c.n_out = 14336, c.d = 128, c.n_kv = 8, c.group = 4, c));
        if (w == 2) named(f, u, (c.n_tok = 8, c.n_in = 2048, c.n_out = 8000, c.d = 128, c.n_kv = 4, c));
    }
    static const struct { lg_dtype w; int64_t n_tok; float odd; } several[] = { { LG_DTYPE_Q8_0, 16, 0 }, { LG_DTYPE_Q4_0, 8, 0 }, { LG_DTYPE_Q5_1, 2, 1e6f }, { LG_DTYPE_Q4_K, 9, 0 }, { LG_DTYPE_Q4_0, 16, 1e6f }, { LG_DTYPE_Q6_K, 3, 0 } };
    for (int i = 0; i < 6; i++) /* results that the next product takes as they are left (CUDA: 4 MB) */
        named(f, u, (cas){ .k = LAYER, .w = several[i].w, .n_in = 2816, .n_out = 5632, .n_tok = several[i].n_tok, .kv = LG_DTYPE_BF16, .d = 128, .n_kv = 4, .group = 6, .odd = several[i].odd });
    static const struct { lg_dtype w; int64_t n_tok, deep; int32_t d, n_kv, group; lg_dtype kv; } on[] = { /* (CUDA: for bf16 weights attention leaves the input of o) */
        { LG_DTYPE_Q4_0, 8, 40, 128, 8, 4, LG_DTYPE_BF16 }, { LG_DTYPE_Q4_0, 5, 700, 128, 8, 4, LG_DTYPE_BF16 }, { LG_DTYPE_Q8_0, 16, 1500, 64, 8, 8, LG_DTYPE_F16 }, { LG_DTYPE_Q6_K, 3, 900, 128, 8, 4, LG_DTYPE_KV8 },
        { LG_DTYPE_Q4_K, 2, 4000, 128, 4, 8, LG_DTYPE_BF16 }, { LG_DTYPE_Q5_1, 2, 6000, 256, 4, 4, LG_DTYPE_BF16 }, { LG_DTYPE_BF16, 8, 700, 128, 8, 4, LG_DTYPE_BF16 }, { LG_DTYPE_BF16, 2, 5000, 64, 8, 8, LG_DTYPE_F32 },
        { LG_DTYPE_Q4_0, 4, 300, 80, 8, 5, LG_DTYPE_F16 }, { LG_DTYPE_Q4_0, 3, 300, 128, 3, 11, LG_DTYPE_F16 } };
    for (size_t i = 0; i < sizeof on / sizeof *on; i++)
        named(f, u, (cas){ .k = LAYER, .w = on[i].w, .n_in = 2048, .n_out = 512, .n_tok = on[i].n_tok, .deep = on[i].deep, .kv = on[i].kv, .d = on[i].d, .n_kv = on[i].n_kv, .group = on[i].group });
}

/* The attention part: extended with the kernels. */
static void attention_cases(visit_fn f, void *u) {
    static const int32_t head[][3] = { { 64, 3, 3 }, { 128, 8, 4 }, { 80, 2, 7 }, { 96, 2, 2 }, { 64, 5, 1 }, { 128, 1, 8 }, { 256, 1, 2 } };
    static const struct { int64_t len[4]; int32_t n; } lens[] = { { { 1 }, 1 }, { { 63, 1, 130, 700 }, 4 }, { { 64, 65 }, 2 }, { { 3000 }, 1 }, { { 1, 2500, 128, 129 }, 4 } };
    for (int h = 0; h < 7; h++)
        for (int k = 0; k < N_CACHE; k++)
            for (int l = 0; l < 5; l++) {
                cas c = { .k = ATTEND, .kv = caches[k], .d = head[h][0], .n_kv = head[h][1], .group = head[h][2], .n_seq = lens[l].n, .n_tok = 1 };
                memcpy(c.len, lens[l].len, sizeof c.len);
                named(f, u, c);
                c.n_tok = l == 0 ? 1 : l == 3 ? 40 : 33;
                if (l) named(f, u, c);
                c.n_tok = 150;
                if (l == 3 && h < 3) named(f, u, c);
            }
    for (int h = 0; h < 7; h++)
        for (int k = 0; k < N_CACHE; k++)
            for (int r = 0; r < 4; r++)
                for (int b = 0; b < 4; b++) {
                    static const double value[] = { 0, 0.7, 0.6, 0.0005 };
                    cas c = { .k = HYBRID, .kv = caches[k], .d = head[h][0], .n_kv = head[h][1], .group = head[h][2], .rule = (lg_rule)r, .value = value[r],
                              .block = (int[]){ 1, 16, 32, 64 }[b], .n_seq = (h + b) % 2 ? 1 : 3, .len = { 1500, 700, 2111 } };
                    c.dense_row = c.n_seq > 1 && b == 2;
                    named(f, u, c);
                    c.spread = r < 2;
                    if (c.spread) named(f, u, c);
                    /* Kept units: few, more than fit, nearly all; every third case nothing but latest slots. */
                    c.spread = (h + k + b) % 2;
                    c.keep = (int32_t[]){ 20, 300, 1000, 0 }[(h + k + r + b) % 4];
                    c.n_latest = c.keep ? (h + r) % 3 : 3;
                    if (r < 2) named(f, u, c);
                }
    for (int k = 0; k < N_CACHE; k++) /* long rows, which CUDA picks from by a sample: few, many, too many are kept */
        for (int b = 0; b < 3; b++)
            named(f, u, (cas){ .k = HYBRID, .kv = caches[k], .d = 64, .n_kv = 2, .group = 1, .block = 1, .n_seq = 1, .len = { 20000 - k }, .keep = (int[]){ 2, 12, 300 }[b],
                               .spread = k % 2, .n_latest = b });
    static const struct { int64_t len, n; } seen[] = { { 1, 1 }, { 70, 64 }, { 700, 33 }, { 2111, 1 }, { 1300, 64 } };
    for (int h = 0; h < 7; h++)
        for (int k = 0; k < N_CACHE; k++)
            for (int l = 0; l < 5; l++)
                named(f, u, (cas){ .k = OBSERVE, .kv = caches[k], .d = head[h][0], .n_kv = head[h][1], .group = head[h][2], .n_seq = 1, .len = { seen[l].len }, .n_tok = seen[l].n });
    for (int k = 0; k < N_CACHE; k++) /* odd sizes */
        for (int d = 40; d <= 50; d += 10)
            named(f, u, (cas){ .k = OBSERVE, .kv = caches[k], .d = d, .n_kv = 2, .group = 5, .n_seq = 1, .len = { 515 }, .n_tok = 13 });
}

static void perf_cases(visit_fn f, void *u) {
    static const lg_dtype some[] = { LG_DTYPE_BF16, LG_DTYPE_Q8_0, LG_DTYPE_Q4_0, LG_DTYPE_Q4_1, LG_DTYPE_Q4_K, LG_DTYPE_Q6_K, LG_DTYPE_F16 };
    static const int64_t rows[] = { 1, 8, 16, 2048 };
    for (int w = 0; w < (int)(sizeof some / sizeof some[0]); w++)
        for (int n = 0; n < 4; n++) {
            cas c = { .perf = true, .w = some[w], .n_tok = rows[n] };
            named(f, u, (c.k = QKV, c.n_in = 4096, c.n_out = 4096, c.kv = LG_DTYPE_BF16, c.d = 128, c.n_kv = 8, c.group = 4, c));
            named(f, u, (c.k = PRODUCT, c.n_in = 4096, c.n_out = 4096, c));
            named(f, u, (c.k = PRODUCT, c.n_in = 14336, c.n_out = 4096, c));
            named(f, u, (c.k = GATE_UP, c.n_in = 4096, c.n_out = 14336, c));
            if (c.n_tok < 2048) named(f, u, (c.k = LOGITS, c.n_in = 4096, c.n_out = 128256, c));
            if (c.n_tok == 1) named(f, u, (c.k = PRODUCT, c.n_in = some[w] < LG_DTYPE_Q4_K ? 576 : 768, c.n_out = 576, c));
        }
    for (int k = 0; k < N_CACHE; k++) {
        cas c = { .k = ATTEND, .perf = true, .kv = caches[k], .d = 128, .n_kv = 8, .group = 4, .n_seq = 1, .n_tok = 1 };
        for (int l = 0; l < 3; l++) named(f, u, (c.len[0] = (int64_t[]){ 8192, 32768, 131072 }[l], c));
        named(f, u, (c.len[0] = 32768, c.n_tok = 2048, c));
        named(f, u, (c.len[0] = 8192, c.n_tok = 2048, c));
        cas s = { .k = HYBRID, .perf = true, .kv = caches[k], .d = 128, .n_kv = 8, .group = 4, .n_seq = 1, .block = 1, .len = { 131072 } };
        named(f, u, s);
        named(f, u, (s.block = 64, s));
        cas o = { .k = OBSERVE, .perf = true, .kv = caches[k], .d = 128, .n_kv = 8, .group = 4, .n_seq = 1, .len = { 131072 }, .n_tok = LG_OBSERVE_ROWS };
        named(f, u, o);
        named(f, u, (o.d = 64, o.n_kv = o.group = 3, o.len[0] = 8192, o));
    }
}

static void each(visit_fn f, void *u, bool perf) {
    if (perf) {
        perf_cases(f, u);
        return;
    }
    product_cases(f, u);
    qkv_cases(f, u);
    layer_cases(f, u);
    attention_cases(f, u);
}

/* ---- data ------------------------------------------------------------------------------------------- */
typedef struct bench {
    const lg_ops *o; lg_ops_ctx *c;
    lg_ops_ctx *ref;
    const char *filter;
    int part, parts; /* 0: all */
    int64_t seen;    /* cases that the filter lets through */
    lg_compute compute;
    int64_t index, failed, skipped;
    uint64_t counter;
    void *keep[256]; int n_keep;
    void *dev[256]; int n_dev;
} bench;

static bool named_so(const bench *b, const cas *c) {
    char part[sizeof c->name];
    for (const char *p = b->filter; p; p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL) {
        const size_t n = strcspn(p, "|");
        if (n >= sizeof part) continue;
        memcpy(part, p, n);
        part[n] = 0;
        if (strstr(c->name, part)) return true;
    }
    return !b->filter;
}
static bool wanted(bench *b, const cas *c) { return named_so(b, c) && (!b->parts || b->seen++ % b->parts == b->part - 1); }

static void die(const char *why) {
    fprintf(stderr, "ops: %s\n", why);
    exit(1);
}
static void check(lg_status st, const lg_error *e) {
    if (st != LG_OK) die(e->message);
}
static void *host(bench *b, int64_t bytes) {
    void *p = lg_base_alloc(bytes > 0 ? bytes : 1);
    if (!p || b->n_keep == 256) die("out of memory");
    return b->keep[b->n_keep++] = p;
}
static void *device(bench *b, const void *src, int64_t bytes) { /* src NULL: 0xff, a poison */
    lg_error e = { 0 };
    void *p = b->o->alloc(b->c, bytes > 0 ? bytes : 1, true, &e);
    if (!p) die(e.message);
    if (b->n_dev == 256) die("too many buffers");
    b->dev[b->n_dev++] = p;
    if (src) {
        b->o->upload(b->c, p, src, bytes);
    } else {
        void *ff = lg_base_alloc(bytes > 0 ? bytes : 1);
        if (!ff) die("out of memory");
        memset(ff, 0xff, (size_t)bytes);
        b->o->upload(b->c, p, ff, bytes);
        lg_base_free(ff);
    }
    return p;
}
static void release(bench *b) {
    while (b->n_keep) lg_base_free(b->keep[--b->n_keep]);
    while (b->n_dev) b->o->free(b->c, b->dev[--b->n_dev]);
}
static float uniform(bench *b, float low, float high) { return low + (high - low) * (float)lg_base_rng_unit(7, 1, b->counter++); }
static float *floats(bench *b, int64_t n, float low, float high) {
    float *x = host(b, n * 4);
    for (int64_t i = 0; i < n; i++) x[i] = uniform(b, low, high);
    return x;
}
static void put16(uint8_t *at, uint16_t v) { memcpy(at, &v, 2); }

/* Random weights in the file's form: all code and scale bits random, only the f16 factors kept moderate. */
static void make_weight(bench *b, lg_weight *w, lg_dtype t, int64_t n_out, int64_t n_in) {
    const int64_t bytes = n_out * lg_base_row_bytes(t, n_in);
    const lg_dtype_info *info = lg_base_dtype(t);
    uint8_t *d = host(b, bytes);
    for (int64_t i = 0; i < bytes; i++) d[i] = (uint8_t)lg_base_rng(7, 2, b->counter++);
    for (int64_t at = 0; at < bytes; at += info->bytes) {
        const float v = uniform(b, -0.1f, 0.1f);
        switch (t) {
        case LG_DTYPE_F32: memcpy(d + at, &v, 4); break;
        case LG_DTYPE_F16: put16(d + at, lg_base_f32_to_f16(v)); break;
        case LG_DTYPE_BF16: put16(d + at, lg_base_f32_to_bf16(v)); break;
        case LG_DTYPE_Q6_K: put16(d + at + 208, lg_base_f32_to_f16(v * 0.01f)); break;
        case LG_DTYPE_Q4_1: case LG_DTYPE_Q5_1: case LG_DTYPE_Q4_K: case LG_DTYPE_Q5_K:
            put16(d + at + 2, lg_base_f32_to_f16(uniform(b, -0.1f, 0.1f)));
            put16(d + at, lg_base_f32_to_f16(v));
            break;
        default: put16(d + at, lg_base_f32_to_f16(v)); break;
        }
    }
    *w = (lg_weight){ .dtype = t, .n_out = n_out, .n_in = n_in, .data = d };
}
/* The same weight bound to the back end. */
static lg_weight bound(bench *b, const lg_weight *w) {
    lg_error e = { 0 };
    lg_weight x = *w;
    check(b->o->weight_bind(b->c, &x, &e), &e);
    return x;
}

static float *download(bench *b, const float *p, int64_t n) {
    float *x = host(b, n * 4);
    b->o->download(b->c, x, p, n * 4);
    return x;
}

static void verdict(bench *b, const cas *c, lg_status st, const lg_error *e, double err, double bound_, const char *more) {
    const bool ok = st == LG_OK && err <= bound_ && !*more;
    b->index++;
    if (ok) {
        printf("ok %lld - %s # error %.2e\n", (long long)b->index, c->name, err);
        return;
    }
    b->failed++;
    printf("not ok %lld - %s # error %.3e, bound %.1e%s%s%s%s\n", (long long)b->index, c->name, err, bound_, *more ? "; " : "", more, st != LG_OK ? "; " : "",
           st != LG_OK ? e->message : "");
    fflush(stdout);
}

/* f32: sums of up to 14336 terms in another order. */
static double product_bound(const bench *b) { return b->compute == LG_COMPUTE_F32 ? 2e-5 : 1.5e-2; }

static lg_lora make_lora(bench *b, int32_t rank, int64_t n_out, int64_t n_in, lg_lora *on_device) {
    lg_lora l = { .rank = rank, .scale = 0.5f, .a = floats(b, rank * n_in, -0.1f, 0.1f), .b = floats(b, n_out * rank, -0.3f, 0.3f) };
    *on_device = l;
    on_device->a = device(b, l.a, rank * n_in * 4);
    on_device->b = device(b, l.b, n_out * rank * 4);
    lg_error e = { 0 };
    if (b->o->lora_bind) check(b->o->lora_bind(b->c, on_device, n_in, n_out, &e), &e);
    return l;
}
static void drop_lora(bench *b, lg_lora *on_device) {
    if (b->o->lora_unbind) b->o->lora_unbind(b->c, on_device);
}
static void add_lora(float *y, const float *x, const lg_lora *l, int64_t n_out, int64_t n_in, int64_t n_tok) {
    for (int64_t t = 0; t < n_tok; t++)
        for (int32_t r = 0; r < l->rank; r++) {
            double s = 0;
            for (int64_t i = 0; i < n_in; i++) s += (double)l->a[r * n_in + i] * (double)x[t * n_in + i];
            for (int64_t o = 0; o < n_out; o++) y[t * n_out + o] += (float)((double)l->scale * (double)l->b[o * l->rank + r] * s);
        }
}
static float *normed(bench *b, const float *x, const float *norm, float eps, int64_t n, int64_t d) {
    float *y = host(b, n * d * 4);
    for (int64_t t = 0; t < n; t++) {
        double ss = 0;
        for (int64_t i = 0; i < d; i++) ss += (double)x[t * d + i] * (double)x[t * d + i];
        const double r = 1 / sqrt(ss / (double)d + (double)eps);
        for (int64_t i = 0; i < d; i++) y[t * d + i] = (float)((double)x[t * d + i] * r) * norm[i];
    }
    return y;
}
/* y = W x in double. */
static void multiply(bench *b, float *y, const lg_weight *w, const float *x, int64_t n_tok, bool add) {
    float *row = host(b, w->n_in * 4);
    const int64_t rb = lg_base_row_bytes(w->dtype, w->n_in);
    for (int64_t o = 0; o < w->n_out; o++) {
        lg_base_dequant(w->dtype, (const uint8_t *)w->data + o * rb, row, w->n_in);
        for (int64_t t = 0; t < n_tok; t++) {
            double s = 0;
            for (int64_t i = 0; i < w->n_in; i++) s += (double)row[i] * (double)x[t * w->n_in + i];
            y[t * w->n_out + o] = (add ? y[t * w->n_out + o] : 0.0f) + (float)s;
        }
    }
}

/* ---- tests ------------------------------------------------------------------------------------------ */
static const float eps = 1e-5f;

static bool can_lora(const bench *b) { return b->o != &lg_ops_cpu && b->o != &lg_ops_ref; } /* (the CPU's is not there yet) */

static void test_product(bench *b, const cas *c) {
    lg_error e = { 0 };
    lg_weight w[2], dw[2];
    lg_lora la[2], dl[2];
    const int n_w = c->k == GATE_UP ? 2 : 1;
    for (int i = 0; i < n_w; i++) {
        make_weight(b, &w[i], c->w, c->n_out, c->n_in);
        dw[i] = bound(b, &w[i]);
        if (c->rank) la[i] = make_lora(b, c->rank, c->n_out, c->n_in, &dl[i]);
    }
    check(b->o->reserve(b->c, c->n_tok, 1, LG_PAGE, 1, &(lg_kv_geom){ LG_DTYPE_F32, 1, 64, 256 }, c->n_in, c->n_out, &e), &e);
    const int64_t n_x = c->k == LOGITS ? c->n_tok + 3 : c->n_tok, n_y = c->n_tok * c->n_out;
    float *x = floats(b, n_x * c->n_in, -1, 1), *norm = floats(b, c->n_in, 0.5f, 1.5f), *want = floats(b, n_y, -1, 1);
    for (int64_t i = c->n_in; i < n_x * c->n_in && c->odd != 0; i++) x[i] *= i / c->n_in % 2 ? c->odd : 1.0f;
    float *dx = device(b, x, n_x * c->n_in * 4), *dn = device(b, norm, c->n_in * 4);
    float *dy = device(b, c->k == PRODUCT ? want : NULL, n_y * 4);
    if (c->k == PRODUCT) {
        b->o->product_add(b->c, &(lg_op_product_add){ .y = dy, .x = dx, .w = &dw[0], .n_tok = c->n_tok, .lora = c->rank ? &dl[0] : NULL });
        multiply(b, want, &w[0], x, c->n_tok, true);
        if (c->rank) add_lora(want, x, &la[0], c->n_out, c->n_in, c->n_tok);
    } else if (c->k == GATE_UP) {
        b->o->gate_up(b->c, &(lg_op_gate_up){ .h = dy, .x = dx, .norm = dn, .eps = eps, .gate = &dw[0], .up = &dw[1], .n_tok = c->n_tok,
                                              .lora_gate = c->rank ? &dl[0] : NULL, .lora_up = c->rank ? &dl[1] : NULL });
        float *n = normed(b, x, norm, eps, c->n_tok, c->n_in), *up = host(b, n_y * 4);
        multiply(b, want, &w[0], n, c->n_tok, false);
        multiply(b, up, &w[1], n, c->n_tok, false);
        if (c->rank) add_lora(want, n, &la[0], c->n_out, c->n_in, c->n_tok);
        if (c->rank) add_lora(up, n, &la[1], c->n_out, c->n_in, c->n_tok);
        for (int64_t i = 0; i < n_y; i++) want[i] = (float)((double)want[i] / (1 + exp(-(double)want[i])) * (double)up[i]);
    } else {
        int32_t *row = host(b, c->n_tok * 4);
        float *n = host(b, c->n_tok * c->n_in * 4), *all = normed(b, x, norm, eps, n_x, c->n_in);
        for (int64_t i = 0; i < c->n_tok; i++) {
            row[i] = (int32_t)(i * 2 % n_x);
            memcpy(n + i * c->n_in, all + row[i] * c->n_in, (size_t)c->n_in * 4);
        }
        b->o->logits(b->c, &(lg_op_logits){ .logits = dy, .x = dx, .norm = dn, .eps = eps, .w = &dw[0], .row = row, .n_row = c->n_tok });
        multiply(b, want, &w[0], n, c->n_tok, false);
    }
    const lg_status st = b->o->sync(b->c, &e);
    const float *y = download(b, dy, n_y);
    double err = fx_apart(y, want, n_y);
    for (int64_t t = 0; t < c->n_tok && c->odd != 0; t++) fx_worsen(&err, fx_apart(y + t * c->n_out, want + t * c->n_out, c->n_out)); /* (rows of other sizes) */
    verdict(b, c, st, &e, err, product_bound(b) * (c->k == GATE_UP ? 2 : 1), "");
    for (int i = 0; i < n_w; i++) b->o->weight_unbind(b->c, &dw[i]);
    for (int i = 0; i < n_w && c->rank; i++) drop_lora(b, &dl[i]);
}

/* Lists that take the ids which the one before draws, begun while that is under way: even ones draw the greatest; odd ones by top-k of 1, which is not the id of the
 * list before, the greatest, as that is penalised. The third waits by itself for the first. */
static lg_status embed_drawn(bench *b, const cas *c, const lg_weight *w, const lg_weight *dw, char *more, size_t size, lg_error *e) {
    enum { LISTS = 5 };
    lg_status st = LG_OK;
    const int64_t rows = c->n_tok < LG_DRAWN_ROWS ? c->n_tok : LG_DRAWN_ROWS, n = rows * c->n_in, n_vocab = c->n_out;
    float *want = host(b, n * 4), *logits = host(b, rows * n_vocab * 4);
    int32_t *ids = host(b, rows * 4), *drawn[LISTS], *got[LISTS];
    int64_t ticket[LISTS];
    lg_draw *draw = host(b, rows * (int64_t)sizeof *draw);
    int32_t *recent = host(b, rows * LG_RECENT * 4);
    float *x[LISTS];
    for (int64_t r = 0; r < rows; r++) draw[r] = (lg_draw){ .scale = r % 3 ? 1 : 0, .top_p = 1, .random = ~(uint64_t)0, .top_k = 1, .penalty = 2, .n_recent = 1 };
    for (int i = 0; i < LISTS; i++) {
        drawn[i] = host(b, rows * 4);
        got[i] = host(b, rows * 4);
        x[i] = device(b, NULL, n * 4);
        memset(got[i], 0xff, (size_t)rows * 4);
    }
    for (int i = 0; i < LISTS && st == LG_OK; i++) {
        for (int64_t k = 0; k < rows * n_vocab; k++) logits[k] = uniform(b, -2, 1);
        for (int64_t r = 0; r < rows; r++) {
            const int32_t last = i ? drawn[i - 1][r] : -1, id = (int32_t)lg_base_rng_below(7, 5, b->counter++, n_vocab);
            drawn[i][r] = id == last ? (id + 1) % (int32_t)n_vocab : id;
            if (i % 2) logits[r * n_vocab + last] = 3;
            logits[r * n_vocab + drawn[i][r]] = 2;
            recent[r * LG_RECENT] = (int32_t)(-1 - r);
            ids[r] = i ? (int32_t)(r - rows) : 0; /* row rows - 1 - r of the list before */
        }
        const float *at = device(b, logits, rows * n_vocab * 4); /* (waits for what is under way) */
        b->o->embed(b->c, &(lg_op_embed){ .x = x[i], .w = dw, .ids = ids, .n_tok = rows });
        if (i % 2) b->o->sample(b->c, &(lg_op_sample){ .id = got[i], .logits = at, .n_row = rows, .n_vocab = n_vocab, .draw = draw, .recent = recent });
        else b->o->argmax(b->c, &(lg_op_argmax){ .id = got[i], .logits = at, .n_row = rows, .n_vocab = n_vocab });
        st = b->o->submit(b->c, &ticket[i], e);
        for (int64_t r = 0; r < rows; r++) ids[r] = -99; /* the list has its own */
        if (st == LG_OK && i == 2 && memcmp(got[0], drawn[0], (size_t)rows * 4)) snprintf(more, size, "a third list under way, and no ids of the first");
        if (st == LG_OK && i == 3) {
            if (got[3][0] != -1) snprintf(more, size, "ids were there before they were waited for");
            st = b->o->wait(b->c, ticket[2], e);
            if (memcmp(got[2], drawn[2], (size_t)rows * 4)) snprintf(more, size, "no ids after the wait");
        }
    }
    if (st == LG_OK) st = b->o->sync(b->c, e); /* for all */
    for (int i = 0; i < LISTS && st == LG_OK; i++) {
        if (memcmp(got[i], drawn[i], (size_t)rows * 4)) snprintf(more, size, "list %d drew other ids", i);
        for (int64_t r = 0; r < rows && i; r++) ids[r] = drawn[i - 1][rows - 1 - r];
        lg_ops_ref.embed(b->ref, &(lg_op_embed){ .x = want, .w = w, .ids = ids, .n_tok = rows });
        if (i && fx_apart(download(b, x[i], n), want, n) != 0) snprintf(more, size, "list %d embedded other ids", i);
    }
    return st;
}

static void test_embed(bench *b, const cas *c) {
    lg_error e = { 0 };
    lg_weight w;
    make_weight(b, &w, c->w, c->n_out, c->n_in);
    lg_weight dw = bound(b, &w);
    int32_t *ids = host(b, c->n_tok * 4);
    for (int64_t i = 0; i < c->n_tok; i++) ids[i] = (int32_t)lg_base_rng_below(7, 5, b->counter++, c->n_out);
    ids[0] = (int32_t)c->n_out - 1;
    const int64_t n = c->n_tok * c->n_in;
    float *want = host(b, n * 4), *dx = device(b, NULL, n * 4);
    lg_ops_ref.embed(b->ref, &(lg_op_embed){ .x = want, .w = &w, .ids = ids, .n_tok = c->n_tok });
    b->o->embed(b->c, &(lg_op_embed){ .x = dx, .w = &dw, .ids = ids, .n_tok = c->n_tok });
    lg_status st = b->o->sync(b->c, &e);
    const double off = fx_apart(download(b, dx, n), want, n);
    char more[100] = "";
    if (st == LG_OK && b->o->submit) st = embed_drawn(b, c, &w, &dw, more, sizeof more, &e);
    verdict(b, c, st, &e, off, 0, more); /* exact */
    b->o->weight_unbind(b->c, &dw);
}

typedef struct cache { lg_kv_geom g; lg_kv_layer host, dev; lg_kv_seq seqs[4]; int64_t bytes, rows; } cache;
static void make_cache(bench *b, cache *k, const cas *c, bool whole) {
    int64_t total = 0, next = 0;
    float *row = host(b, 2 * c->d * 4);
    *k = (cache){ .g = { c->kv, c->n_kv, c->d, lg_base_row_bytes(c->kv, c->d) } };
    for (int i = 0; i < c->n_seq; i++) total += (c->len[i] + LG_PAGE - 1) / LG_PAGE;
    k->rows = total * c->n_kv * LG_PAGE;
    k->bytes = k->rows * k->g.row_bytes;
    k->host.k = host(b, k->bytes);
    k->host.v = host(b, k->bytes);
    for (int i = 0; i < c->n_seq; i++) {
        const int64_t n = (c->len[i] + LG_PAGE - 1) / LG_PAGE;
        int32_t *page = host(b, n * 4);
        for (int64_t p = 0; p < n; p++) page[p] = (int32_t)((next++ * 7919 + 3) % total); /* 7919 is prime: a shuffle */
        k->seqs[i] = (lg_kv_seq){ page, c->len[i], NULL };
    }
    for (int64_t r = 0; r < k->rows; r++) {
        for (int i = 0; i < 2 * c->d; i++) row[i] = whole && i < c->d ? (float)lg_base_rng_below(7, 9, b->counter++, 5) - 2.0f : uniform(b, -1, 1);
        if (whole && c->kv == LG_DTYPE_KV8) /* one scale of 1 in every group */
            for (int i = 0; i < c->d; i += 32) row[i] = 127.0f;
        lg_ops_kv_store(&k->g, k->host.k + r * k->g.row_bytes, row);
        lg_ops_kv_store(&k->g, k->host.v + r * k->g.row_bytes, row + c->d);
    }
    k->dev.k = device(b, k->host.k, k->bytes);
    k->dev.v = device(b, k->host.v, k->bytes);
}

static void reserve(bench *b, const cas *c, int64_t n_tok, int32_t n_seq, int64_t max_in, int64_t max_out) {
    lg_error e = { 0 };
    int64_t longest = LG_PAGE;
    for (int i = 0; i < c->n_seq; i++) longest = c->len[i] > longest ? c->len[i] : longest;
    const lg_kv_geom g = { c->kv, c->n_kv, c->d, lg_base_row_bytes(c->kv, c->d) };
    check(b->o->reserve(b->c, n_tok, n_seq, (longest + LG_PAGE - 1) / LG_PAGE * LG_PAGE, c->n_kv * c->group, &g, max_in, max_out, &e), &e);
}

static void test_qkv(bench *b, const cas *c) {
    lg_error e = { 0 };
    cache k;
    cas room = *c;
    room.n_seq = 1;
    room.len[0] = (c->n_tok + 7) * 2;
    make_cache(b, &k, &room, false);
    const int64_t d = c->d, n_head = c->n_kv * c->group, nq = n_head * d, nkv = c->n_kv * d, n = c->n_tok;
    lg_weight w[3], dw[3];
    lg_lora la[3], dl[3];
    float *bias[3] = { 0 }, *dbias[3] = { 0 };
    for (int i = 0; i < 3; i++) {
        const int64_t n_out = i ? nkv : nq;
        make_weight(b, &w[i], c->w, n_out, c->n_in);
        dw[i] = bound(b, &w[i]);
        if (c->bias) bias[i] = floats(b, n_out, -1, 1), dbias[i] = device(b, bias[i], n_out * 4);
        if (c->rank) la[i] = make_lora(b, c->rank, n_out, c->n_in, &dl[i]);
    }
    float *x = floats(b, n * c->n_in, -1, 1), *norm = floats(b, c->n_in, 0.5f, 1.5f), *cs = floats(b, n * d / 2, -1, 1), *sn = floats(b, n * d / 2, -1, 1);
    float *qn = c->qk_norm ? floats(b, d, 0.5f, 1.5f) : NULL, *kn = c->qk_norm ? floats(b, d, 0.5f, 1.5f) : NULL;
    int32_t *page = host(b, n * 4), *slot = host(b, n * 4);
    for (int64_t t = 0; t < n; t++) {
        page[t] = k.seqs[0].page[(t + 5) / LG_PAGE];
        slot[t] = (int32_t)((t + 5) % LG_PAGE);
    }
    float *q = host(b, n * nq * 4), *dq = device(b, NULL, n * nq * 4), *raw = can_lora(b) ? device(b, NULL, 2 * n * nkv * 4) : NULL;
    lg_op_qkv a = { .q = dq, .x = device(b, x, n * c->n_in * 4), .norm = device(b, norm, c->n_in * 4), .eps = eps, .wq = &dw[0], .wk = &dw[1], .wv = &dw[2],
                    .bq = dbias[0], .bk = dbias[1], .bv = dbias[2], .q_norm = qn ? device(b, qn, d * 4) : NULL, .k_norm = kn ? device(b, kn, d * 4) : NULL,
                    .rope_cos = cs, .rope_sin = sn, .rope_interleaved = c->interleaved, .kv = k.dev, .geom = k.g, .dst_page = page, .dst_slot = slot,
                    .n_tok = n, .n_head = (int32_t)n_head, .k_raw = raw, .v_raw = raw ? raw + n * nkv : NULL };
    if (c->rank) a.lora_q = &dl[0], a.lora_k = &dl[1], a.lora_v = &dl[2];
    reserve(b, &room, n, 1, c->n_in, nq);
    b->o->qkv(b->c, &a);
    const lg_status st = b->o->sync(b->c, &e);
    /* The specification, step by step, so that low rank and raw rows are covered too. */
    float *nx = normed(b, x, norm, eps, n, c->n_in), *part[3] = { q, host(b, n * nkv * 4), host(b, n * nkv * 4) };
    for (int i = 0; i < 3; i++) {
        const int64_t n_out = i ? nkv : nq;
        multiply(b, part[i], &w[i], nx, n, false);
        if (c->rank) add_lora(part[i], nx, &la[i], n_out, c->n_in, n);
        for (int64_t j = 0; bias[i] && j < n * n_out; j++) part[i][j] += bias[i][j % n_out];
    }
    for (int i = 0; i < 2; i++) /* head norm */
        for (int64_t h = 0; c->qk_norm && h < n * (i ? c->n_kv : n_head); h++) {
            float *v = normed(b, part[i] + h * d, i ? kn : qn, eps, 1, d);
            memcpy(part[i] + h * d, v, (size_t)d * 4);
            lg_base_free(b->keep[--b->n_keep]);
        }
    double err = 0, raw_err = 0, v_err = 0, k_err = 0;
    float *half = host(b, n * nkv * 4);
    for (int64_t i = 0; i < n * nkv; i++) half[i / d * d + lg_ops_half_place(i % d, d, c->interleaved)] = part[1][i];
    if (raw) raw_err = fx_apart(download(b, raw, n * nkv), half, n * nkv), v_err = fx_apart(download(b, raw + n * nkv, n * nkv), part[2], n * nkv);
    for (int i = 0; i < 2; i++)
        for (int64_t h = 0; h < n * (i ? c->n_kv : n_head); h++) {
            const int64_t t = h / (i ? c->n_kv : n_head);
            float *v = part[i] + h * d, was[512];
            memcpy(was, v, (size_t)d * 4);
            for (int64_t p = 0; p < d / 2; p++) {
                const int64_t a0 = c->interleaved ? 2 * p : p, a1 = c->interleaved ? 2 * p + 1 : p + d / 2;
                v[a0] = was[a0] * cs[t * d / 2 + p] - was[a1] * sn[t * d / 2 + p];
                v[a1] = was[a1] * cs[t * d / 2 + p] + was[a0] * sn[t * d / 2 + p];
            }
        }
    err = fx_apart(download(b, dq, n * nq), q, n * nq);
    uint8_t *rows = host(b, k.bytes);
    float *got = host(b, n * nkv * 4), *want = host(b, n * nkv * 4);
    char more[64] = "";
    for (int i = 0; i < 2; i++) {
        b->o->download(b->c, rows, i ? k.dev.v : k.dev.k, k.bytes);
        int64_t touched = 0;
        for (int64_t t = 0; t < n; t++)
            for (int h = 0; h < c->n_kv; h++) {
                const int64_t r = ((int64_t)page[t] * c->n_kv + h) * LG_PAGE + slot[t], at = (t * c->n_kv + h) * d;
                lg_ops_kv_load(&k.g, got + at, rows + r * k.g.row_bytes);
                lg_ops_kv_store(&k.g, (i ? k.host.v : k.host.k) + r * k.g.row_bytes, part[1 + i] + at);
                lg_ops_kv_load(&k.g, want + at, (i ? k.host.v : k.host.k) + r * k.g.row_bytes);
                memcpy((i ? k.host.v : k.host.k) + r * k.g.row_bytes, rows + r * k.g.row_bytes, (size_t)k.g.row_bytes);
            }
        touched = memcmp(rows, i ? k.host.v : k.host.k, (size_t)k.bytes); /* all other rows must be as they were */
        if (touched) snprintf(more, sizeof more, "%s: other rows were written", i ? "V" : "K");
        const double ce = fx_apart(got, want, n * nkv);
        k_err = ce > k_err || ce != ce ? ce : k_err;
    }
    const double bound_ = product_bound(b);
    /* Rounding to the cache may fall the other way: half a step of the cache's dtype more. */
    const double cache_bound = bound_ + (c->kv == LG_DTYPE_F32 ? 0 : c->kv == LG_DTYPE_F16 ? 1e-3 : 6e-3);
    if (!(raw_err <= bound_) || !(v_err <= bound_)) snprintf(more, sizeof more, "raw K %.2e V %.2e", raw_err, v_err);
    else if (!(k_err <= cache_bound) && !*more) snprintf(more, sizeof more, "cache rows %.2e", k_err);
    verdict(b, c, st, &e, err, bound_, more);
    for (int i = 0; i < 3; i++) b->o->weight_unbind(b->c, &dw[i]);
    for (int i = 0; i < 3 && c->rank; i++) drop_lora(b, &dl[i]);
}

typedef struct layer { lg_op_product_add o, down; lg_op_gate_up gate_up; lg_op_qkv qkv; lg_op_logits logits; lg_op_attend attend; bool ends; } layer; /* ends: with logits */
/* Outputs of a layer, on the host. */
enum { OUT_X, OUT_H, OUT_Q, OUT_K, OUT_V, N_OUT };
typedef struct layer_out { float *p[N_OUT]; int64_t n[N_OUT]; } layer_out;

static void test_layer(bench *b, const cas *c) {
    lg_error e = { 0 };
    const int64_t n = c->n_tok, dm = c->n_in, ff = c->n_out, d = c->d, n_head = c->n_kv * c->group, nq = n_head * d, nkv = c->n_kv * d;
    const bool ends = c->vocab > 0;
    const int64_t shape[][2] = { { dm, nq }, { ff, dm }, { ff, dm }, { dm, ff }, { ends ? c->vocab : nq, dm }, { nkv, dm }, { nkv, dm } };
    const int n_w = ends ? 5 : 7;
    lg_weight w[7], dw[7];
    lg_lora la, dl;
    cache k;
    cas room = *c;
    room.n_seq = 1;
    room.len[0] = (n + 7) * 2 + (c->deep ? n * (c->deep + LG_PAGE) : 0); /* (pages are not shared) */
    make_cache(b, &k, &room, false);
    for (int i = 0; i < n_w; i++) {
        make_weight(b, &w[i], c->w, shape[i][0], shape[i][1]);
        dw[i] = bound(b, &w[i]);
    }
    if (c->rank) la = make_lora(b, c->rank, dm, ff, &dl);
    float *x = floats(b, n * dm, -1, 1), *att = floats(b, n * nq, -1, 1), *norm = floats(b, dm, 0.5f, 1.5f), *cs = floats(b, n * d / 2, -1, 1), *sn = floats(b, n * d / 2, -1, 1);
    for (int64_t i = dm; i < n * dm && c->odd != 0; i++) x[i] *= i / dm % 2 ? c->odd : 1.0f;
    float *bias[3] = { 0 }, *qn = c->qk_norm ? floats(b, d, 0.5f, 1.5f) : NULL, *kn = c->qk_norm ? floats(b, d, 0.5f, 1.5f) : NULL;
    for (int i = 0; i < 3 && c->bias; i++) bias[i] = floats(b, i ? nkv : nq, -1, 1);
    int32_t *page = host(b, n * 4), *slot = host(b, n * 4), *row = host(b, n * 4);
    for (int64_t t = 0; t < n; t++) {
        page[t] = k.seqs[0].page[(t + 5) / LG_PAGE];
        slot[t] = (int32_t)((t + 5) % LG_PAGE);
        row[t] = (int32_t)t;
    }
    lg_kv_seq *seqs = host(b, n * (int64_t)sizeof *seqs);
    int64_t *idx = host(b, n * 8);
    const int32_t *next_page = k.seqs[0].page;
    for (int64_t t = 0; t < n && c->deep; t++) {
        const int64_t len = c->deep - (c->deep / 2 - 1) * ((t * 5) % 7) / 6;
        seqs[t] = (lg_kv_seq){ next_page, len, NULL };
        idx[t] = len - 1;
        page[t] = next_page[idx[t] / LG_PAGE];
        slot[t] = (int32_t)(idx[t] % LG_PAGE);
        next_page += (len + LG_PAGE - 1) / LG_PAGE;
    }
    const int64_t n_q = n * (ends ? c->vocab : nq), size[N_OUT] = { n * dm, n * ff, n_q, ends ? 0 : n * nkv, ends ? 0 : n * nkv };
    layer_out out[3]; /* the specification's; in one sync; a sync after every op */
    lg_status st = LG_OK;
    const int64_t widest = dm > ff ? dm : ff, longest_out = widest > c->vocab ? widest : c->vocab;
    const int32_t n_seq = c->deep ? (int32_t)n : 1;
    reserve(b, &room, n, n_seq, widest > nq ? widest : nq, longest_out > nq ? longest_out : nq);
    check(lg_ops_ref.reserve(b->ref, n, n_seq, (c->deep + LG_PAGE) / LG_PAGE * LG_PAGE, (int32_t)n_head, &k.g, widest > nq ? widest : nq, longest_out > nq ? longest_out : nq, &e), &e);
    for (int run = 0; run < 3 && st == LG_OK; run++) {
        const bool ref = run == 0;
        const lg_ops *o = ref ? &lg_ops_ref : b->o;
        lg_ops_ctx *ctx = ref ? b->ref : b->c;
        const lg_weight *ww = ref ? w : dw;
        float *rx = host(b, n * dm * 4), *rh = host(b, n * ff * 4), *rq = host(b, n_q * 4), *ratt = host(b, n * nq * 4), *rnorm = norm, *rbias[3] = { bias[0], bias[1], bias[2] }, *rqn = qn, *rkn = kn;
        memcpy(rx, x, (size_t)(n * dm) * 4);
        memcpy(ratt, att, (size_t)(n * nq) * 4);
        if (!ref) {
            rx = device(b, x, n * dm * 4);
            rh = device(b, NULL, n * ff * 4);
            rq = device(b, NULL, n_q * 4);
            ratt = device(b, att, n * nq * 4);
            rnorm = device(b, norm, dm * 4);
            for (int i = 0; i < 3 && c->bias; i++) rbias[i] = device(b, bias[i], (i ? nkv : nq) * 4);
            if (qn) rqn = device(b, qn, d * 4), rkn = device(b, kn, d * 4);
        }
        layer l = { .o = { .y = rx, .x = ratt, .w = &ww[0], .n_tok = n }, .gate_up = { .h = rh, .x = rx, .norm = rnorm, .eps = eps, .gate = &ww[1], .up = &ww[2], .n_tok = n },
                    .down = { .y = rx, .x = rh, .w = &ww[3], .n_tok = n, .lora = c->rank && !ref ? &dl : NULL }, .ends = ends };
        if (ends) l.logits = (lg_op_logits){ .logits = rq, .x = rx, .norm = rnorm, .eps = eps, .w = &ww[4], .row = row, .n_row = n };
        else
            l.qkv = (lg_op_qkv){ .q = rq, .x = rx, .norm = rnorm, .eps = eps, .wq = &ww[4], .wk = &ww[5], .wv = &ww[6], .bq = rbias[0], .bk = rbias[1], .bv = rbias[2], .q_norm = rqn,
                                 .k_norm = rkn, .rope_cos = cs, .rope_sin = sn, .rope_interleaved = c->interleaved, .kv = ref ? k.host : k.dev, .geom = k.g, .dst_page = page,
                                 .dst_slot = slot, .n_tok = n, .n_head = (int32_t)n_head };
        l.attend = (lg_op_attend){ .out = ratt, .q = rq, .kv = ref ? k.host : k.dev, .geom = k.g, .seqs = seqs, .n_seq = n_seq, .seq = row, .idx = idx, .n_tok = n, .n_head = (int32_t)n_head,
                                   .scale = 1.0f / sqrtf((float)d) };
        const int last = c->deep ? 5 : 3;
        for (int i = 0; i <= last && st == LG_OK; i++) {
            if (i == 0) o->product_add(ctx, &l.o);
            if (i == 1) o->gate_up(ctx, &l.gate_up);
            if (i == 2) o->product_add(ctx, &l.down);
            if (i == 3 && ends) o->logits(ctx, &l.logits);
            if (i == 3 && !ends) o->qkv(ctx, &l.qkv);
            if (i == 4) o->attend(ctx, &l.attend);
            if (i == 5) o->product_add(ctx, &l.o);
            if (run != 1 || i == last) st = o->sync(ctx, &e);
            if (ref && i == 2 && c->rank) add_lora(rx, rh, &la, dm, ff, n);
        }
        float *from[3] = { rx, rh, rq };
        for (int i = 0; i < N_OUT; i++) {
            out[run].n[i] = size[i];
            out[run].p[i] = ref && i < OUT_K ? from[i] : host(b, size[i] * 4);
            if (!ref && i < OUT_K) b->o->download(b->c, out[run].p[i], from[i], size[i] * 4);
            if (i < OUT_K || ends) continue;
            uint8_t *rows = i == OUT_K ? k.host.k : k.host.v;
            if (!ref) b->o->download(b->c, rows, i == OUT_K ? k.dev.k : k.dev.v, k.bytes);
            for (int64_t t = 0; t < n; t++)
                for (int h = 0; h < c->n_kv; h++)
                    lg_ops_kv_load(&k.g, out[run].p[i] + (t * c->n_kv + h) * d, rows + (((int64_t)page[t] * c->n_kv + h) * LG_PAGE + slot[t]) * k.g.row_bytes);
        }
    }
    double err = 0, k_err = 0, apart = 0;
    for (int i = 0; i < N_OUT && st == LG_OK; i++) {
        if (!size[i]) continue;
        const double a = fx_apart(out[1].p[i], out[0].p[i], size[i]), p = fx_apart(out[1].p[i], out[2].p[i], size[i]);
        double *worst = i < OUT_K ? &err : &k_err;
        *worst = a > *worst || a != a ? a : *worst;
        apart = p > apart || p != p ? p : apart;
    }
    const double bound_ = product_bound(b) * 3, cache_bound = bound_ + (c->kv == LG_DTYPE_F32 ? 0 : c->kv == LG_DTYPE_F16 ? 1e-3 : 6e-3); /* four products, one after the other */
    char more[96] = "";
    if (!(apart <= 4e-3)) snprintf(more, sizeof more, "op by op differs by %.2e", apart);
    if (!*more && !(k_err <= cache_bound)) snprintf(more, sizeof more, "cache rows %.2e", k_err);
    verdict(b, c, st, &e, err, c->deep ? cache_bound : bound_, more); /* (attention reads what was rounded to the cache) */
    for (int i = 0; i < n_w; i++) b->o->weight_unbind(b->c, &dw[i]);
    if (c->rank) drop_lora(b, &dl);
}

static void test_kv_write(bench *b, const cas *c) {
    lg_error e = { 0 };
    cache k;
    cas room = *c;
    room.n_seq = 1;
    room.len[0] = c->n_tok * 2;
    make_cache(b, &k, &room, false);
    const int64_t n = c->n_tok, d = c->d, nkv = c->n_kv * d;
    const lg_kv_geom src = { c->w, c->n_kv, c->d, lg_base_row_bytes(c->w, d) };
    float *x = floats(b, 2 * n * nkv, -1, 1), *cs = floats(b, n * d / 2, -1, 1), *sn = floats(b, n * d / 2, -1, 1), row[512], was[512];
    uint8_t *packed = host(b, 2 * n * c->n_kv * src.row_bytes), *rows = host(b, k.bytes);
    int32_t *page = host(b, n * 4), *slot = host(b, n * 4);
    double worst = 0;
    for (int64_t i = 0; i < 2 * n * c->n_kv; i++) lg_ops_kv_store(&src, packed + i * src.row_bytes, x + i * d);
    for (int64_t t = 0; t < n; t++) {
        page[t] = k.seqs[0].page[t * 2 / LG_PAGE];
        slot[t] = (int32_t)(t * 2 % LG_PAGE);
    }
    uint8_t *dp = device(b, packed, 2 * n * c->n_kv * src.row_bytes);
    if (!b->o->kv_write) {
        b->index++;
        b->skipped++;
        printf("ok %lld - %s # SKIP this back end has no kv_write\n", (long long)b->index, c->name);
        return;
    }
    b->o->kv_write(b->c, &(lg_op_kv_write){ .kv = k.dev, .geom = k.g, .k = dp, .v = dp + n * c->n_kv * src.row_bytes, .src = src, .rope_cos = cs, .rope_sin = sn,
                                            .rope_interleaved = c->interleaved, .dst_page = page, .dst_slot = slot, .n_tok = n });
    const lg_status st = b->o->sync(b->c, &e);
    float *got = host(b, n * nkv * 4), *want = host(b, n * nkv * 4);
    for (int i = 0; i < 2; i++) {
        b->o->download(b->c, rows, i ? k.dev.v : k.dev.k, k.bytes);
        for (int64_t t = 0; t < n; t++)
            for (int h = 0; h < c->n_kv; h++) {
                const int64_t at = (t * c->n_kv + h), r = ((int64_t)page[t] * c->n_kv + h) * LG_PAGE + slot[t];
                lg_ops_kv_load(&src, row, packed + (i * n * c->n_kv + at) * src.row_bytes);
                memcpy(was, row, (size_t)d * 4);
                for (int64_t p = 0; i == 0 && c->interleaved && p < d / 2; p++) { /* rows come in half order */
                    was[2 * p] = row[p];
                    was[2 * p + 1] = row[p + d / 2];
                }
                for (int64_t p = 0; i == 0 && p < d / 2; p++) {
                    const int64_t a0 = c->interleaved ? 2 * p : p, a1 = c->interleaved ? 2 * p + 1 : p + d / 2;
                    row[a0] = was[a0] * cs[t * d / 2 + p] - was[a1] * sn[t * d / 2 + p];
                    row[a1] = was[a1] * cs[t * d / 2 + p] + was[a0] * sn[t * d / 2 + p];
                }
                memcpy(want + at * d, row, (size_t)d * 4);
                lg_ops_kv_load(&k.g, got + at * d, rows + r * k.g.row_bytes);
            }
        const double err = fx_apart(got, want, n * nkv);
        worst = err > worst || err != err ? err : worst;
    }
    verdict(b, c, st, &e, worst, c->kv == LG_DTYPE_F32 ? 1e-6 : c->kv == LG_DTYPE_F16 ? 5e-4 : 6e-3, "");
}

static void test_argmax(bench *b, const cas *c) {
    lg_error e = { 0 };
    const int64_t n = c->n_tok * c->n_out;
    float *x = host(b, n * 4);
    int32_t *got = host(b, c->n_tok * 4), *want = host(b, c->n_tok * 4);
    for (int64_t i = 0; i < n; i++) x[i] = (float)lg_base_rng_below(7, 4, b->counter++, 999) - 998.0f; /* ties, and all at or below 0 */
    memset(got, 0xff, (size_t)c->n_tok * 4);
    b->o->argmax(b->c, &(lg_op_argmax){ .id = got, .logits = device(b, x, n * 4), .n_row = c->n_tok, .n_vocab = c->n_out });
    lg_ops_ref.argmax(b->ref, &(lg_op_argmax){ .id = want, .logits = x, .n_row = c->n_tok, .n_vocab = c->n_out });
    const lg_status st = b->o->sync(b->c, &e);
    verdict(b, c, st, &e, 0, 0, memcmp(got, want, (size_t)c->n_tok * 4) ? "another index" : "");
}

/* Every row with options of its own; every other one full of ties. */
static void test_sample(bench *b, const cas *c) {
    lg_error e = { 0 };
    const int64_t n = c->n_out, rows = c->n_tok;
    float *x = host(b, rows * n * 4), *scratch = host(b, 2 * n * 4);
    int32_t *got = host(b, rows * 4), *recent = host(b, rows * LG_RECENT * 4);
    lg_draw *d = host(b, rows * (int64_t)sizeof *d);
    int64_t wrong = 0;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < n; i++) x[r * n + i] = r % 2 ? (float)lg_base_rng_below(7, 4, b->counter++, 30) - 20.0f : uniform(b, -20, 5) + uniform(b, -5, 5);
        d[r] = (lg_draw){ .scale = r % 7 == 6 ? 0 : 1.44 / (double)uniform(b, 0.2f, 2), .top_p = r % 3 ? 1 : (double)uniform(b, 0, 1),
                          .min_weight = r % 5 == 1 ? (uint64_t)lg_base_rng_below(7, 4, b->counter++, (int64_t)1 << 39) : 0, .random = lg_base_rng(7, 4, b->counter++),
                          .top_k = r % 4 == 2 ? 1 + lg_base_rng_below(7, 4, b->counter++, 100) : 0, .penalty = r % 4 == 3 ? 1.3f : 1, .n_recent = (int32_t)(r % (LG_RECENT + 1)) };
        for (int32_t i = 0; i < d[r].n_recent; i++) recent[r * LG_RECENT + i] = (int32_t)lg_base_rng_below(7, 4, b->counter++, i % 2 ? n : 9);
    }
    memset(got, 0xff, (size_t)rows * 4);
    b->o->sample(b->c, &(lg_op_sample){ .id = got, .logits = device(b, x, rows * n * 4), .n_row = rows, .n_vocab = n, .draw = d, .recent = recent });
    const lg_status st = b->o->sync(b->c, &e);
    for (int64_t r = 0; r < rows; r++) wrong += got[r] != lg_ops_sample(x + r * n, n, &d[r], recent + r * LG_RECENT, scratch);
    verdict(b, c, st, &e, (double)wrong, 0, wrong ? "another id" : "");
}

static double attend_bound(const bench *b) { return b->compute == LG_COMPUTE_F32 ? 2e-5 : 8e-3; }

static void test_attend(bench *b, const cas *c) {
    lg_error e = { 0 };
    cache k;
    make_cache(b, &k, c, false);
    const int64_t d = c->d, n_head = c->n_kv * c->group;
    int64_t n = 0;
    for (int i = 0; i < c->n_seq; i++) n += c->n_tok < c->len[i] ? c->n_tok : c->len[i];
    float *q = floats(b, n * n_head * d, -2, 2), *want = host(b, n * n_head * d * 4), *out = device(b, NULL, n * n_head * d * 4);
    int32_t *seq = host(b, n * 4);
    int64_t *idx = host(b, n * 8);
    for (int64_t i = 0, t = 0; i < c->n_seq; i++) {
        const int64_t rows = c->n_tok < c->len[i] ? c->n_tok : c->len[i];
        for (int64_t r = 0; r < rows; r++, t++) {
            seq[t] = (int32_t)i;
            idx[t] = c->len[i] - rows + r;
        }
    }
    lg_op_attend a = { .out = want, .q = q, .kv = k.host, .geom = k.g, .seqs = k.seqs, .n_seq = c->n_seq, .seq = seq, .idx = idx, .n_tok = n,
                       .n_head = (int32_t)n_head, .scale = 1.0f / sqrtf((float)d) };
    lg_ops_ref.attend(b->ref, &a);
    a.out = out;
    a.q = device(b, q, n * n_head * d * 4);
    a.kv = k.dev;
    reserve(b, c, n, c->n_seq, n_head * d, n_head * d);
    b->o->attend(b->c, &a);
    const lg_status st = b->o->sync(b->c, &e);
    verdict(b, c, st, &e, fx_apart(download(b, out, n * n_head * d), want, n * n_head * d), attend_bound(b), "");
}

static void test_hybrid(bench *b, const cas *c) {
    lg_error e = { 0 };
    cache k;
    make_cache(b, &k, c, true);
    const int64_t d = c->d, n_head = c->n_kv * c->group, n = c->n_seq, sinks = 16, recents = 64;
    /* Slots before n_made are made, with budgets per head three by a head; behind them one is ready for each head, then come the latest. Heads: dense that make, a window, readers. */
    const int32_t each = c->spread ? 3 : 1, n_made = (c->n_kv + 1) / 2 * each, latest = n_made + c->n_kv, n_slot = latest + c->n_latest;
    const int64_t cap = c->len[0] > 3000 ? c->len[0] : 3000, size = n * n_slot * cap;
    int32_t *idx = host(b, size * 4), *cnt = host(b, n * n_slot * 4), *read = host(b, c->n_kv * 4), *make = host(b, c->n_kv * 4);
    int32_t *n_make = host(b, c->n_kv * 4), *window = host(b, c->n_kv * 4), *share = host(b, n_slot * 4);
    int64_t *budget = host(b, n * 8);
    uint8_t *dense = host(b, n);
    for (int h = 0; h < c->n_kv; h++) {
        const bool maker = h % 2 == 0;
        read[h] = maker ? LG_HEAD_DENSE : h % 4 == 1 ? n_made + h : LG_HEAD_WINDOW;
        make[h] = maker ? h / 2 * each : -1;
        n_make[h] = maker ? each : 0;
        window[h] = h % 3 * 700;
    }
    for (int32_t j = 0; j < n_slot; j++) share[j] = (int32_t[]){ 0, 611, 2500 }[j % 3];
    for (int64_t s = 0; s < n; s++) {
        budget[s] = c->rule == LG_RULE_RATIO ? (int64_t)((1 - c->value) * (double)c->len[s]) : 320 + 33 * s;
        dense[s] = c->dense_row && s == 1;
        for (int32_t j = n_made; j < latest; j++) { /* ascending blocks, the last one among them */
            int32_t *to = idx + (s * n_slot + j) * cap;
            const int64_t blocks = (c->len[s] + c->block - 1) / c->block;
            for (int64_t i = 0; i < blocks; i++)
                if (i == blocks - 1 || lg_base_rng_below(7, 6, b->counter++, 4) == 0) to[cnt[s * n_slot + j]++] = (int32_t)i;
        }
    }
    float *q = host(b, n * n_head * d * 4), *want = host(b, n * n_head * d * 4), *out = device(b, NULL, n * n_head * d * 4);
    for (int64_t i = 0; i < n * n_head * d; i++) q[i] = (float)lg_base_rng_below(7, 8, b->counter++, 5) - 2.0f;
    /* Kept units, but not of the second sequence, nor where a head fills several slots of the one with the largest share. */
    const int64_t words = c->keep ? (cap + 32 * c->block - 1) / (32 * c->block) : 0;
    lg_kv_seq seqs[4], dseqs[4];
    for (int64_t s = 0; s < n; s++) {
        uint32_t *kept = c->keep && s != 1 ? host(b, n_slot * words * 4) : NULL;
        for (int64_t i = 0; kept && i < n_slot * words * 32; i++)
            if (lg_base_rng_below(7, 9, b->counter++, 1024) < c->keep && (each == 1 || i / 32 / words % each != each - 1)) kept[i / 32] |= 1u << (i % 32);
        seqs[s] = dseqs[s] = k.seqs[s];
        seqs[s].kept = kept;
        dseqs[s].kept = kept ? device(b, kept, n_slot * words * 4) : NULL;
    }
    int32_t *didx = device(b, idx, size * 4), *dcnt = device(b, cnt, n * n_slot * 4);
    lg_op_attend_hybrid a = { .out = out, .q = device(b, q, n * n_head * d * 4), .kv = k.dev, .geom = k.g, .seqs = dseqs, .n_seq = c->n_seq, .budget = budget,
                              .dense = dense, .read = read, .make = make, .sets = { didx, dcnt, cap, n_slot, c->block, words },
                              .select = { c->rule, c->value, 0.02f, sinks, recents }, .n_head = (int32_t)n_head, .scale = 0.05f / sqrtf((float)d) };
    if (c->spread) a.spread = (lg_spread){ share, window, n_make, sinks + recents, 0, 0 };
    a.spread.latest = latest;
    a.spread.n_latest = c->n_latest;
    reserve(b, c, n, c->n_seq, n_head * d, n_head * d);
    lg_op_attend_hybrid r = a;
    r.out = want;
    r.q = q;
    r.kv = k.host;
    r.seqs = seqs;
    r.sets.idx = idx;
    r.sets.n = cnt;
    int32_t *gidx = host(b, size * 4), *gcnt = host(b, n * n_slot * 4);
    char more[96] = "";
    lg_status st = LG_OK;
    double err = 0;
    /* A device may keep what it made of a list for when that comes again: it does three times, then what it points to has changed, twice. */
    const int rounds = b->o->host_memory || c->len[0] > 3000 ? 1 : 5;
    for (int round = 0; round < rounds && st == LG_OK && !*more; round++) {
        if (round == 3) {
            for (int64_t s = 0; s < n; s++) budget[s] += c->rule == LG_RULE_RATIO ? -5 : 40;
            for (int h = 0; h < c->n_kv; h++)
                if (h % 4 == 1) read[h] = LG_HEAD_WINDOW;
            window[0] += 100;
        }
        if (round % 3 == 0) lg_ops_ref.attend_hybrid(b->ref, &r);
        b->o->attend_hybrid(b->c, &a);
        st = b->o->sync(b->c, &e);
        if (st != LG_OK) break;
        b->o->download(b->c, gidx, didx, size * 4);
        b->o->download(b->c, gcnt, dcnt, n * n_slot * 4);
        for (int64_t s = 0; s < n && !*more; s++)
            for (int32_t j = 0; j < n_slot && !dense[s] && !*more; j++) {
                const int64_t at = s * n_slot + j;
                if (gcnt[at] != cnt[at]) snprintf(more, sizeof more, "set %d of sequence %d: %d blocks, not %d (run %d)", j, (int)s, gcnt[at], cnt[at], round);
                for (int32_t i = 0; i < cnt[at] && !*more; i++)
                    if (gidx[at * cap + i] != idx[at * cap + i])
                        snprintf(more, sizeof more, "set %d of sequence %d: entry %d is %d, not %d (run %d)", j, (int)s, i, gidx[at * cap + i], idx[at * cap + i], round);
            }
        const double off = fx_apart(download(b, out, n * n_head * d), want, n * n_head * d);
        err = off > err || off != off ? off : err;
    }
    verdict(b, c, st, &e, err, attend_bound(b), more);
}

/* A CPU with AVX512_BF16 makes scores of pairs of bf16 here, where a GPU makes them in f32. */
static double observe_bound(const bench *b) { return b->o == &lg_ops_cpu && lg_cpu_isa() >= LG_ISA_BF16 ? attend_bound(b) : 2e-5; }

static void test_observe(bench *b, const cas *c) {
    lg_error e = { 0 };
    cache k;
    make_cache(b, &k, c, false);
    const int64_t d = c->d, n_head = c->n_kv * c->group, n = c->n_tok, len = c->len[0], ld = len + 7, unseen = len > 600 ? 70 : 0, size = c->n_kv * ld;
    const int64_t before = len - unseen - n < 5 ? len - unseen - n : 5, all = n + before; /* rows of an attention, the last n of which are observed */
    float *q = floats(b, all * n_head * d, -2, 2), *want = floats(b, size, -2, -1), *mass = device(b, want, size * 4); /* what lies behind the sequence stays */
    int64_t *idx = host(b, all * 8);
    int32_t *seq = host(b, all * 4);
    for (int64_t r = 0; r < all; r++) {
        idx[r] = len - unseen - all + r;
        seq[r] = 0;
    }
    lg_op_observe a = { .mass = want, .ld = ld, .q = q + before * n_head * d, .kv = k.host, .geom = k.g, .seq = k.seqs, .idx = idx + before, .n_tok = n, .n_head = (int32_t)n_head, .scale = 2.0f / sqrtf((float)d) };
    reserve(b, c, all, 1, n_head * d, n_head * d);
    lg_op_observe o = a;
    float *dq = device(b, q, all * n_head * d * 4), *out = device(b, NULL, all * n_head * d * 4);
    o.mass = mass;
    o.q = dq + before * n_head * d;
    o.kv = k.dev;
    const lg_op_attend attend = { .out = out, .q = dq, .kv = k.dev, .geom = k.g, .seqs = k.seqs, .n_seq = 1, .seq = seq, .idx = idx, .n_tok = all,
                                  .n_head = (int32_t)n_head, .scale = a.scale };
    b->o->observe(b->c, &o);
    const lg_status st = b->o->sync(b->c, &e);
    lg_ops_ref.observe(b->ref, &a);
    float *got = download(b, mass, size), *first = host(b, size * 4), *wanted_mass = host(b, size * 4);
    char more[64] = "";
    for (int64_t h = 0; h < c->n_kv; h++) {
        memcpy(first + h * len, got + h * ld, (size_t)len * 4);
        memcpy(wanted_mass + h * len, want + h * ld, (size_t)len * 4);
        if (memcmp(got + h * ld + len, want + h * ld + len, (size_t)(ld - len) * 4)) snprintf(more, sizeof more, "head %d: something behind the sequence is written", (int)h);
    }
    const double err = fx_apart(first, wanted_mass, c->n_kv * len);
    memcpy(first, got, (size_t)size * 4);
    float *alone = host(b, all * n_head * d * 4);
    b->o->attend(b->c, &attend);
    lg_status again = b->o->sync(b->c, &e);
    memcpy(alone, download(b, out, all * n_head * d), (size_t)(all * n_head * d) * 4);
    b->o->attend(b->c, &attend); /* in one list, as in a forward pass */
    b->o->observe(b->c, &o);
    if (again == LG_OK) again = b->o->sync(b->c, &e);
    if (again == LG_OK && memcmp(first, download(b, mass, size), (size_t)size * 4)) snprintf(more, sizeof more, "not the same behind attention");
    if (again == LG_OK && memcmp(alone, download(b, out, all * n_head * d), (size_t)(all * n_head * d) * 4)) snprintf(more, sizeof more, "attention is not the same before it");
    if (again != LG_OK) snprintf(more, sizeof more, "behind attention: %.40s", e.message);
    verdict(b, c, st, &e, err, observe_bound(b), more);
}

static void test_case(void *user, const cas *c) {
    bench *b = user;
    if (!wanted(b, c)) return;
    const char *why = NULL;
    if (c->rank && !can_lora(b)) why = "low rank: not on this back end yet";
    const bool whole = c->n_in % 32 == 0 && (c->k != LAYER || (c->n_out % 32 == 0 && c->n_kv * c->group * c->d % 32 == 0));
    if (b->o == &lg_ops_cpu && (c->k <= LOGITS || c->k == LAYER) && !whole) why = "the CPU back end takes whole blocks of 32";
    if (b->o == &lg_ops_cpu && c->d % 8) why = "the CPU back end takes head sizes that are multiples of 8";
    if (c->k == SAMPLE && !b->o->sample) why = "the host draws, by the specification (test_sample)";
    if (why) {
        b->index++;
        b->skipped++;
        printf("ok %lld - %s # SKIP %s\n", (long long)b->index, c->name, why);
        return;
    }
    switch (c->k) {
    case PRODUCT: case GATE_UP: case LOGITS: test_product(b, c); break;
    case EMBED: test_embed(b, c); break;
    case QKV: test_qkv(b, c); break;
    case LAYER: test_layer(b, c); break;
    case KV_WRITE: test_kv_write(b, c); break;
    case ARGMAX: test_argmax(b, c); break;
    case SAMPLE: test_sample(b, c); break;
    case ATTEND: test_attend(b, c); break;
    case HYBRID: test_hybrid(b, c); break;
    case OBSERVE: test_observe(b, c); break;
    }
    release(b);
}

/* ---- speed ------------------------------------------------------------------------------------------ */
/* Every timed list walks over several copies, so that no weight comes out of a cache; the median of 7 lists. */
static void perf_case(void *user, const cas *c) {
    bench *b = user;
    lg_error e = { 0 };
    if (!wanted(b, c)) return;
    const bool attention = c->k >= ATTEND;
    const int64_t d = c->d, n_head = c->n_kv * c->group, nq = n_head * d, nkv = c->n_kv * d;
    const int64_t n_x = c->n_tok * (c->n_in > 0 ? c->n_in : nq), n_y = c->n_tok * (c->n_out > 0 ? c->n_out : nq);
    double bytes = 0, flops = 0;
    enum { MAX_SETS = 24 };
    static lg_weight w[MAX_SETS][3];
    lg_kv_layer kv[MAX_SETS];
    int sets = 0, n_w = c->k == GATE_UP ? 2 : c->k == QKV ? 3 : 1;
    const lg_kv_geom g = { c->kv, c->n_kv > 0 ? c->n_kv : 1, c->d > 0 ? c->d : 64, c->d > 0 ? lg_base_row_bytes(c->kv, c->d) : 256 };
    int32_t *page = NULL, *seq = host(b, c->n_tok * 4), *dst = host(b, c->n_tok * 4), *slot = host(b, c->n_tok * 4), *row = host(b, c->n_tok * 4);
    int64_t *idx = host(b, (c->n_tok + 1) * 8), *budget = host(b, 8), n_page = attention ? c->len[0] / LG_PAGE : (c->n_tok + LG_PAGE - 1) / LG_PAGE;
    uint8_t *dense = host(b, 1);
    page = host(b, n_page * 4);
    for (int64_t p = 0; p < n_page; p++) page[p] = (int32_t)p;
    for (int64_t t = 0; t < c->n_tok; t++) {
        dst[t] = (int32_t)(t / LG_PAGE);
        slot[t] = (int32_t)(t % LG_PAGE);
        row[t] = (int32_t)t;
        idx[t] = c->len[0] - c->n_tok + t;
    }
    float *x = floats(b, n_x, -1, 1), *dx = device(b, x, n_x * 4), *norm = device(b, x, (c->n_in > 0 ? c->n_in : 1) * 4), *y = device(b, x, n_x < n_y ? n_x * 4 : n_y * 4);
    if (n_y > n_x) y = b->o->alloc(b->c, n_y * 4, true, &e), b->dev[b->n_dev++] = y;
    if (!y) die(e.message);
    if (!attention) {
        for (int i = 0; i < n_w; i++) {
            const int64_t out = c->k == QKV && i ? nkv : c->n_out;
            bytes += (double)(out * lg_base_row_bytes(c->w, c->n_in));
            flops += 2.0 * (double)(out * c->n_in * c->n_tok);
        }
        sets = bytes > 120e6 ? 2 : bytes > 20e6 ? 6 : MAX_SETS;
        for (int s = 0; s < sets; s++) {
            for (int i = 0; i < n_w; i++) {
                w[s][i] = (lg_weight){ .dtype = c->w, .n_out = c->k == QKV && i ? nkv : c->n_out, .n_in = c->n_in };
                if (b->o->host_memory) make_weight(b, &w[s][i], c->w, w[s][i].n_out, c->n_in);
                check(b->o->weight_bind(b->c, &w[s][i], &e), &e);
            }
            if (b->o->host_memory) sets = 1;
        }
        if (c->k == QKV) {
            kv[0].k = device(b, NULL, n_page * g.n_head_kv * LG_PAGE * g.row_bytes);
            kv[0].v = device(b, NULL, n_page * g.n_head_kv * LG_PAGE * g.row_bytes);
        }
    } else {
        const int64_t one = n_page * g.n_head_kv * LG_PAGE * g.row_bytes;
        sets = one > 100e6 ? 2 : one > 20e6 ? 3 : 8;
        for (int s = 0; s < sets; s++) {
            kv[s].k = b->o->alloc(b->c, one, true, &e);
            kv[s].v = kv[s].k ? b->o->alloc(b->c, one, true, &e) : NULL;
            if (!kv[s].v) die(e.message);
            b->dev[b->n_dev++] = kv[s].k;
            b->dev[b->n_dev++] = kv[s].v;
            if (b->o->kv_random) b->o->kv_random(b->c, kv[s], &g, page, n_page, 7 + (uint64_t)s);
        }
    }
    const lg_kv_seq one_seq = { page, c->len[0], NULL };
    cas res = *c;
    res.d = g.head_dim;
    res.n_kv = g.n_head_kv;
    res.kv = c->d ? c->kv : LG_DTYPE_F32;
    res.group = c->group ? c->group : 1;
    res.n_seq = attention ? 1 : 0;
    reserve(b, &res, c->n_tok > 0 ? c->n_tok : 1, 1, c->n_in > nq ? c->n_in : nq, c->n_out > nq ? c->n_out : nq);
    /* hybrid: a quarter of the heads retrieve (and make), the rest read 4096 tokens */
    int32_t read[8] = { -1, -1, 2, 2, 2, 3, 3, 3 }, make[8] = { 0, 1, -1, -1, -1, -1, -1, -1 };
    const int64_t cap = 8192;
    int32_t *sidx = NULL, *scnt = NULL;
    budget[0] = 4096;
    if (c->k == HYBRID) {
        int32_t *hidx = host(b, 4 * cap * 4), hcnt[4];
        for (int j = 0; j < 4; j++) {
            hcnt[j] = 4096 / c->block;
            for (int i = 0; i < hcnt[j]; i++) hidx[j * cap + i] = (int32_t)((int64_t)i * (c->len[0] / c->block) / hcnt[j]);
        }
        sidx = device(b, hidx, 4 * cap * 4);
        scnt = device(b, hcnt, sizeof hcnt);
        bytes = 2.0 * (double)(g.row_bytes * (2 * c->len[0] + 6 * 4096));
    }
    if (c->k == ATTEND) {
        bytes = 2.0 * (double)(g.row_bytes * c->n_kv * c->len[0]);
        for (int64_t t = 0; t < c->n_tok; t++) flops += 4.0 * (double)((idx[t] + 1) * nq);
    }
    float *mass = NULL;
    if (c->k == OBSERVE) { /* K twice, at least once in each pass */
        mass = device(b, NULL, c->n_kv * c->len[0] * 4);
        bytes = 2.0 * (double)(g.row_bytes * c->n_kv * c->len[0]);
        for (int64_t t = 0; t < c->n_tok; t++) flops += 4.0 * (double)((idx[t] + 1) * nq);
    }
    double ms[7];
    const int reps = b->o->host_memory ? 1 : c->n_tok > 64 ? 4 : 48 / sets * sets;
    for (int r = -1; r < 7; r++) {
        for (int i = 0; i < reps; i++) {
            const int s = i % sets;
            switch (c->k) {
            case PRODUCT: b->o->product_add(b->c, &(lg_op_product_add){ .y = y, .x = dx, .w = &w[s][0], .n_tok = c->n_tok }); break;
            case GATE_UP: b->o->gate_up(b->c, &(lg_op_gate_up){ .h = y, .x = dx, .norm = norm, .eps = eps, .gate = &w[s][0], .up = &w[s][1], .n_tok = c->n_tok }); break;
            case LOGITS: b->o->logits(b->c, &(lg_op_logits){ .logits = y, .x = dx, .norm = norm, .eps = eps, .w = &w[s][0], .row = row, .n_row = c->n_tok }); break;
            case QKV:
                b->o->qkv(b->c, &(lg_op_qkv){ .q = y, .x = dx, .norm = norm, .eps = eps, .wq = &w[s][0], .wk = &w[s][1], .wv = &w[s][2], .rope_cos = x, .rope_sin = x,
                                              .kv = kv[0], .geom = g, .dst_page = dst, .dst_slot = slot, .n_tok = c->n_tok, .n_head = (int32_t)n_head });
                break;
            case ATTEND:
                b->o->attend(b->c, &(lg_op_attend){ .out = y, .q = dx, .kv = kv[s], .geom = g, .seqs = &one_seq, .n_seq = 1, .seq = seq, .idx = idx, .n_tok = c->n_tok,
                                                    .n_head = (int32_t)n_head, .scale = 0.088f });
                break;
            case HYBRID:
                b->o->attend_hybrid(b->c, &(lg_op_attend_hybrid){ .out = y, .q = dx, .kv = kv[s], .geom = g, .seqs = &one_seq, .n_seq = 1, .budget = budget, .dense = dense,
                                                                  .read = read, .make = make, .sets = { sidx, scnt, cap, 4, c->block, 0 },
                                                                  .select = { LG_RULE_TOPK, 0, 0.088f, 128, 256 }, .n_head = (int32_t)n_head, .scale = 0.088f });
                break;
            case OBSERVE:
                b->o->observe(b->c, &(lg_op_observe){ .mass = mass, .ld = c->len[0], .q = dx, .kv = kv[s], .geom = g, .seq = &one_seq, .idx = idx, .n_tok = c->n_tok,
                                                      .n_head = (int32_t)n_head, .scale = 0.088f });
                break;
            default: break;
            }
        }
        const double t = lg_base_now();
        check(b->o->sync(b->c, &e), &e);
        if (r >= 0) ms[r] = 1e3 * (lg_base_now() - t) / reps;
    }
    for (int i = 1; i < 7; i++)
        for (int j = i; j > 0 && ms[j] < ms[j - 1]; j--) {
            const double m = ms[j];
            ms[j] = ms[j - 1];
            ms[j - 1] = m;
        }
    printf("%-72s %9.1f us  min %9.1f  %8.1f GB/s  %7.1f TFLOP/s\n", c->name, 1e3 * ms[3], 1e3 * ms[0], bytes / ms[3] / 1e6, flops / ms[3] / 1e9);
    fflush(stdout);
    b->index++;
    if (!attention)
        for (int s = 0; s < sets; s++)
            for (int i = 0; i < n_w; i++) b->o->weight_unbind(b->c, &w[s][i]);
    release(b);
}

static void list_case(void *user, const cas *c) {
    bench *b = user;
    if (!wanted(b, c)) return;
    puts(c->name);
    b->index++;
}

static int usage(void) {
    fputs("usage: ops list|test|perf [--device D] [--compute auto|f32] [--part K/N] [FILTER]\n", stderr);
    return 2;
}

int main(int argc, char **argv) {
    bench b = { .compute = LG_COMPUTE_AUTO };
    lg_error e = { 0 };
    const char *mode = argc > 1 ? argv[1] : "", *device_name = "cpu";
    setvbuf(stdout, NULL, _IOLBF, 0); /* what has passed is seen, whatever comes after it */
    for (int i = 2; i < argc; i++) {
        if (!strcmp(argv[i], "--device") && i + 1 < argc) device_name = argv[++i];
        else if (!strcmp(argv[i], "--compute") && i + 1 < argc) b.compute = !strcmp(argv[++i], "f32") ? LG_COMPUTE_F32 : LG_COMPUTE_AUTO;
        else if (!strcmp(argv[i], "--part") && i + 1 < argc) {
            char end;
            if (sscanf(argv[++i], "%d/%d%c", &b.part, &b.parts, &end) != 2 || b.part < 1 || b.part > b.parts) return usage();
        } else if (argv[i][0] != '-' && !b.filter) b.filter = argv[i];
        else return usage();
    }
    if (!strcmp(mode, "list")) {
        each(list_case, &b, false);
        each(list_case, &b, true);
        return 0;
    }
    const bool perf = !strcmp(mode, "perf");
    if (!perf && strcmp(mode, "test")) return usage();
    b.o = lg_ops_find(device_name, &e);
    if (!b.o) die(e.message);
    const lg_ops_config oc = { .device = device_name, .compute = b.compute };
    check(b.o->open(&b.c, &oc, &e), &e);
    check(lg_ops_ref.open(&b.ref, &oc, &e), &e);
    char words[128];
    b.o->describe(b.c, words, sizeof words);
    printf("# %s\n", words);
    if (perf) {
        each(perf_case, &b, true);
    } else {
        each(test_case, &b, false);
        printf("1..%lld\n", (long long)b.index);
        printf("%lld passed, %lld failed, %lld skipped\n", (long long)(b.index - b.failed - b.skipped), (long long)b.failed, (long long)b.skipped);
    }
    b.o->close(b.c);
    lg_ops_ref.close(b.ref);
    return b.failed ? 1 : b.index || b.seen ? 0 : usage();
}
