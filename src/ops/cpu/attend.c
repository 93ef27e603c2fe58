/* The driver of CPU attention: what each head reads, how the work is cut and shared between threads, selection.
 *
 * Decode rows (a sequence's only row in the op, and all rows of the hybrid op) run split over the positions they read:
 *   phase 0  chunks of (row, KV head, positions) -> partial softmax each; retrieval heads write raw scores on the way
 *   phase 1  partials of a (row, KV head) -> output; scores -> token set
 *   phase 2  where heads keep tokens: scores -> token sets that keep some
 * Longer runs of rows of one sequence run as flash attention in phase 0, in tiles of (row x query head).
 * Cuts depend only on how many positions a head reads, partials are merged in order, and kernels treat every row alone: a
 * row's result depends neither on the rest of the batch nor on the number of threads. */
#include "ops/cpu/attend.h"
#include "ops/cpu/attend_kernels.h"
#include <math.h>
#include <string.h>

enum { CHUNKS = 8, CHUNK_PAGES_MAX = 16, CHUNK_COST = 16 };

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t pad16(int64_t a) { return up(a, 16) * 16; }

/* ---- kernels of this machine and shape ---- */
typedef struct kernels {
    const lg_attend_kernels *k, *many; /* tile; flash, peak and mass */
    void (*topk)(int32_t *out, const float *score, int64_t n, int64_t k, int32_t base, uint32_t *work);
} kernels;

/* bf16 products only of caches that are rounded themselves. */
static kernels kernels_for(const lg_gemm *g, const lg_kv_geom *kv) {
    const int32_t d = kv->head_dim;
    const bool avx512 = g->isa >= LG_ISA_AVX512;
    kernels r = { .topk = avx512 ? lg_attend_topk_avx512 : g->isa == LG_ISA_AVX2 ? lg_attend_topk_avx2 : lg_attend_topk_scalar };
    if (avx512 && d % 16 == 0) r.k = &lg_attend_avx512;
    else if (g->isa >= LG_ISA_AVX2) r.k = &lg_attend_avx2;
    else r.k = &lg_attend_scalar;
    r.many = g->isa >= LG_ISA_BF16 && g->compute == LG_COMPUTE_AUTO && kv->dtype != LG_DTYPE_F32 && d % 32 == 0 ? &lg_attend_bf16 : r.k;
    return r;
}

static int64_t flash_bytes(const lg_gemm *g, const lg_kv_geom *kv) {
    return up(kernels_for(g, kv).many->flash_bytes(kv->head_dim), 64) * 64;
}

/* ---- what one decode row reads in one KV head ---- */
typedef enum kind { DENSE, WINDOW, SET } kind;
typedef struct unit {
    kind kind;
    const float *q;      /* [group, head_dim] */
    float *out;
    const lg_kv_seq *seq;
    const int32_t *ids;  /* SET */
    int64_t n;           /* positions read */
    int64_t sinks, jump; /* WINDOW: positions 0..sinks-1, then i + jump */
    int32_t head, row, block;
    int32_t make, n_make; /* first slot to fill, or -1; how many */
} unit;

typedef struct job { /* the parts both ops share */
    const lg_op_attend *a;
    const lg_op_attend_hybrid *h;
    const lg_kv_layer *kv;
    const lg_kv_geom *geom;
    int32_t group;
    float scale2;
    kernels k;
    int64_t partial; /* floats of one partial */
} job;

static job job_of(const lg_gemm *g, const lg_op_attend *a, const lg_op_attend_hybrid *h) {
    job j = { .a = a, .h = h };
    if (a) {
        j.kv = &a->kv;
        j.geom = &a->geom;
        j.group = a->n_head / a->geom.n_head_kv;
        j.scale2 = a->scale * 1.44269504f;
    } else {
        j.kv = &h->kv;
        j.geom = &h->geom;
        j.group = h->n_head / h->geom.n_head_kv;
        j.scale2 = h->scale * 1.44269504f;
    }
    j.k = kernels_for(g, j.geom);
    j.partial = pad16((int64_t)j.group * (j.geom->head_dim + 2));
    return j;
}

static int64_t chunk_positions(int64_t n) { return LG_PAGE * max64(1, min64(CHUNK_PAGES_MAX, up(up(n, LG_PAGE), CHUNKS))); }
static int64_t chunk_count(int64_t n) { return up(n, chunk_positions(n)); }

static unit hybrid_unit(const lg_op_attend_hybrid *a, int32_t row, int32_t head) {
    const int64_t d = a->geom.head_dim, group = a->n_head / a->geom.n_head_kv, len = a->seqs[row].len;
    const int64_t at = ((int64_t)row * a->n_head + head * group) * d;
    unit u = { .kind = DENSE, .q = a->q + at, .out = a->out + at, .seq = &a->seqs[row], .n = len, .head = head, .row = row,
               .make = -1 };
    if (a->dense[row]) return u;
    u.make = a->make[head];
    u.n_make = u.make < 0 ? 0 : lg_ops_n_make(&a->spread, head);
    if (a->read[head] == LG_HEAD_WINDOW) {
        const int64_t budget = lg_ops_budget(&a->spread, a->spread.window, head, a->budget[row]);
        u.kind = WINDOW;
        u.sinks = min64(a->select.sinks, len);
        u.jump = min64(len, max64(u.sinks, len - (budget - a->select.sinks))) - u.sinks;
        u.n = len - u.jump;
    } else if (a->read[head] >= 0) {
        const int64_t slot = (int64_t)row * a->sets.n_slot + a->read[head], n = a->sets.n[slot];
        u.kind = SET;
        u.ids = a->sets.idx + slot * a->sets.cap;
        u.block = a->sets.block;
        u.n = n ? min64((n - 1) * u.block + min64(u.block, len - (int64_t)u.ids[n - 1] * u.block), len) : 0;
    }
    return u;
}

/* Rows of one sequence that stand together. */
typedef struct run { int64_t first, n; } run;
static bool next_run(const lg_op_attend *a, run *r) {
    r->first += r->n;
    if (r->first >= a->n_tok) return false;
    for (r->n = 1; r->first + r->n < a->n_tok && a->seq[r->first + r->n] == a->seq[r->first];) r->n++;
    return true;
}

/* Walks the decode units of either op in one fixed order. Begins with a zeroed walk. */
typedef struct walk { run r; int32_t row, head; bool begun; } walk;
static bool next_unit(const job *j, walk *w, unit *u) {
    if (w->begun && ++w->head == j->geom->n_head_kv) {
        w->head = 0;
        w->row++;
    }
    if (j->h) {
        w->begun = true;
        if (w->row >= j->h->n_seq) return false;
        *u = hybrid_unit(j->h, w->row, w->head);
        return true;
    }
    if (!w->begun || w->head == 0) {
        do {
            if (!next_run(j->a, &w->r)) return false;
        } while (w->r.n != 1);
    }
    w->begun = true;
    const int64_t t = w->r.first, at = (t * j->a->n_head + (int64_t)w->head * j->group) * j->geom->head_dim;
    *u = (unit){ .kind = DENSE, .q = j->a->q + at, .out = j->a->out + at, .seq = &j->a->seqs[j->a->seq[t]],
                 .n = j->a->idx[t] + 1, .head = w->head, .row = w->row, .make = -1 };
    return true;
}

/* Byte offsets of the positions [first, first + n) of a unit's list, padded to a multiple of 4; n <= LG_TILE. */
static void offsets(int64_t *off, const job *j, const unit *u, int64_t first, int64_t n) {
    const int64_t rb = j->geom->row_bytes, n_kv = j->geom->n_head_kv;
    if (u->kind == DENSE) { /* tiles are pages */
        const int64_t at = ((int64_t)u->seq->page[first / LG_PAGE] * n_kv + u->head) * LG_PAGE * rb;
        for (int64_t i = 0; i < n; i++) off[i] = at + i * rb;
    } else if (u->kind == SET && u->block == 1) {
        const int32_t *page = u->seq->page, *ids = u->ids + first;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t t = (uint32_t)ids[i];
            off[i] = (((int64_t)page[t / LG_PAGE] * n_kv + u->head) * LG_PAGE + t % LG_PAGE) * rb;
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            int64_t t = first + i;
            if (u->kind == WINDOW) t += t < u->sinks ? 0 : u->jump;
            else t = (int64_t)u->ids[t / u->block] * u->block + t % u->block;
            off[i] = (((int64_t)u->seq->page[t / LG_PAGE] * n_kv + u->head) * LG_PAGE + t % LG_PAGE) * rb;
        }
    }
    for (int64_t i = n; i % 4; i++) off[i] = off[n - 1];
}

/* A chunk: positions [first, last) of a unit's list. */
typedef struct chunk { unit u; int64_t first, last; float *partial, *score; } chunk;
static int32_t tile_rows(const chunk *c, int64_t at) { return (int32_t)max64(0, min64(LG_TILE, c->last - at)); }

/* off[*side]: of the first tile. Of the chunk that this thread runs next, NULL if none, the first tile's are left there, and its keys prefetched. */
static void run_chunk(const job *j, const chunk *c, const chunk *next, int64_t (*off)[LG_TILE], int *side) {
    const unit *u = &c->u;
    lg_tile t = { .q = u->q, .max = c->partial, .sum = c->partial + j->group, .acc = c->partial + 2 * j->group, .k = j->kv->k,
                  .v = j->kv->v, .group = j->group, .head_dim = j->geom->head_dim, .row_bytes = j->geom->row_bytes,
                  .dtype = j->geom->dtype, .scale2 = j->scale2 };
    memset(c->partial, 0, (size_t)j->partial * sizeof(float));
    for (int32_t g = 0; g < j->group; g++) t.max[g] = -INFINITY;
    for (int64_t at = c->first; at < c->last; at += LG_TILE, *side = !*side) {
        const bool end = at + LG_TILE >= c->last;
        const chunk *then = end ? next : c;
        const int64_t from = end && next ? next->first : at + LG_TILE;
        t.n = tile_rows(c, at);
        t.off = off[*side];
        t.next_n = then ? tile_rows(then, from) : 0;
        t.next = off[!*side];
        if (t.next_n) offsets(off[!*side], j, &then->u, from, t.next_n);
        t.score = c->score ? c->score + at : NULL;
        j->k.k->tile(&t);
    }
}

/* ---- scratch: partials, scores, then each thread's own part ---- */
typedef struct layout { float *partials, *scores; int64_t n_partial, cost0, cost1; } layout;

static int64_t select_cost(const unit *u) { return u->make >= 0 ? u->seq->len + (u->n_make - 1) * u->seq->len / 16 : 0; }
static int64_t merge_cost(const job *j, const unit *u) { return 1 + chunk_count(u->n) * j->group * j->geom->head_dim / 4; }

static layout layout_of(const job *j, void *scratch) {
    layout l = { .partials = scratch };
    walk w = { 0 };
    unit u;
    while (next_unit(j, &w, &u)) {
        const int64_t c = chunk_count(u.n);
        l.n_partial += c;
        l.cost0 += u.n + c * CHUNK_COST;
        l.cost1 += select_cost(&u) + merge_cost(j, &u);
    }
    l.scores = l.partials + l.n_partial * j->partial;
    return l;
}

/* Of an observation: [n_head_kv][tiles][2][LG_FLASH_LANES] */
static int64_t observe_tiles(int64_t rows, int32_t n_head, const lg_kv_geom *kv) { return up(rows * (n_head / kv->n_head_kv), LG_FLASH_LANES); }
static int64_t peak_floats(int64_t rows, int32_t n_head, const lg_kv_geom *kv) {
    return kv->n_head_kv * observe_tiles(rows, n_head, kv) * 2 * LG_FLASH_LANES;
}

int64_t lg_attend_scratch_bytes(const lg_gemm *g, int64_t n_tok, int64_t n_seq, int64_t max_len, int32_t n_head,
                                const lg_kv_geom *kv, int nth) {
    (void)n_tok; /* a decode row has a sequence of its own */
    const int64_t group = n_head / kv->n_head_kv, units = n_seq * kv->n_head_kv;
    const int64_t chunks = CHUNKS + 1 + up(max_len, LG_PAGE * CHUNK_PAGES_MAX);
    const int64_t partials = units * chunks * pad16(group * (kv->head_dim + 2)), scores = units * pad16(max_len);
    const int64_t select = 2 * pad16(max_len) * (int64_t)sizeof(float), flash = flash_bytes(g, kv);
    return max64((partials + scores) * (int64_t)sizeof(float), peak_floats(LG_OBSERVE_ROWS, n_head, kv) * (int64_t)sizeof(float)) + nth * max64(select, flash);
}

/* ---- phases ---- */
typedef struct share { int64_t lo, hi, at; } share;
static share share_of(int64_t total, int ith, int nth) { return (share){ total * ith / nth, total * (ith + 1) / nth, 0 }; }
static bool mine(share *s, int64_t cost) { /* the piece whose middle lies in this thread's share */
    const int64_t middle = s->at + cost / 2;
    s->at += cost;
    return middle >= s->lo && middle < s->hi;
}

/* The chunks of a thread, in order. Begins with partial, score and share set. */
typedef struct chunks { walk w; unit u; int64_t at; float *partial, *score; share s; } chunks;
static bool next_chunk(const job *j, chunks *w, chunk *c) {
    for (;;) {
        while (w->at >= w->u.n) {
            if (w->w.begun && w->u.make >= 0) w->score += pad16(w->u.seq->len);
            if (!next_unit(j, &w->w, &w->u)) return false;
            w->at = 0;
        }
        *c = (chunk){ .u = w->u, .first = w->at, .last = min64(w->u.n, w->at + chunk_positions(w->u.n)), .partial = w->partial, .score = w->u.make >= 0 ? w->score : NULL };
        w->at = c->last;
        w->partial += j->partial;
        if (mine(&w->s, c->last - c->first + CHUNK_COST)) return true;
    }
}

static void run_partials(const job *j, void *scratch, int ith, int nth) {
    const layout l = layout_of(j, scratch);
    chunks w = { .partial = l.partials, .score = l.scores, .s = share_of(l.cost0, ith, nth) };
    chunk c = { 0 }, next = { 0 };
    int64_t off[2][LG_TILE];
    int side = 0;
    bool more = next_chunk(j, &w, &c);
    if (more) offsets(off[0], j, &c.u, c.first, tile_rows(&c, c.first));
    while (more) {
        more = next_chunk(j, &w, &next);
        run_chunk(j, &c, more ? &next : NULL, off, &side);
        c = next;
    }
}

static void merge(const job *j, const unit *u, const float *partial) {
    const int64_t d = j->geom->head_dim, group = j->group, n = chunk_count(u->n);
    for (int64_t g = 0; g < group; g++) {
        float *restrict out = u->out + g * d;
        float max = -INFINITY, sum = 0;
        memset(out, 0, (size_t)d * sizeof(float));
        for (int64_t c = 0; c < n; c++) {
            const float m = partial[c * j->partial + g];
            if (m > max || m != m) max = m;
        }
        for (int64_t c = 0; c < n; c++) {
            const float *p = partial + c * j->partial, *restrict acc = p + 2 * group + g * d;
            const float f = exp2f(p[g] - max);
            sum += f * p[group + g];
            for (int64_t e = 0; e < d; e++) out[e] += f * acc[e];
        }
        if (n == 0) continue;
        const float r = 1.0f / sum;
        for (int64_t e = 0; e < d; e++) out[e] *= r;
    }
}

/* Kept units of word w among [lo, hi). */
static uint32_t kept_word(const uint32_t *kept, int64_t w, int64_t lo, int64_t hi) {
    uint32_t bits = kept[w];
    if (w * 32 < lo) bits &= ~0u << (lo - w * 32);
    if (hi - w * 32 < 32) bits &= ~(~0u << (hi - w * 32));
    return bits;
}
static int64_t count_kept(const uint32_t *kept, int64_t lo, int64_t hi) {
    int64_t n = 0;
    for (int64_t w = lo / 32; w * 32 < hi; w += 2) /* without an instruction for it 64 bits cost what 32 do */
        n += __builtin_popcountll(kept_word(kept, w, lo, hi) | ((w + 1) * 32 < hi ? (uint64_t)kept_word(kept, w + 1, lo, hi) << 32 : 0));
    return n;
}
static bool any_kept(const uint32_t *kept, int64_t lo, int64_t hi) {
    for (int64_t w = lo / 32; w * 32 < hi; w++)
        if (kept_word(kept, w, lo, hi)) return true;
    return false;
}
/* Numbers of the bits that are set in words [lo, hi), ascending. work: [hi - lo]. */
static void list_bits(int32_t *out, const uint32_t *bits, int64_t lo, int64_t hi, int32_t *work) {
    int64_t n = 0;
    for (int64_t w = lo; w < hi; w++) { /* most words are empty, and which cannot be foreseen: no branch */
        work[n] = (int32_t)w;
        n += bits[w] != 0;
    }
    for (int64_t i = 0; i < n; i++)
        for (uint32_t b = bits[work[i]]; b; b &= b - 1) *out++ = work[i] * 32 + __builtin_ctz(b);
}

/* What sets of one row are made of. */
typedef struct making {
    const job *j;
    const float *score;      /* of units */
    int64_t head, tail;      /* units before and from there on are forced */
    const int32_t *best;     /* others of the largest set that keeps nothing, ascending, or NULL */
    int64_t n_best;
    float *gathered;         /* [units] */
    int32_t *work;           /* [units] */
} making;

/* k units of [head, tail): kept ones before all. */
static void choose_kept(const making *m, int32_t *out, const uint32_t *kept, int64_t k) {
    const int64_t n_kept = count_kept(kept, m->head, m->tail), lo = m->head / 32, hi = up(m->tail, 32);
    const bool all = n_kept <= k; /* else only kept ones compete */
    const bool few = all && m->best && (m->n_best >= k || m->n_best == m->tail - m->head);
    const int64_t n = few ? m->n_best : m->tail - m->head, left = all ? k - n_kept : k;
    uint32_t *bits = (uint32_t *)(void *)m->gathered; /* of what is chosen, once nothing is gathered any more */
    for (int64_t i = 0; i < n; i++) {
        const int64_t u = few ? m->best[i] : m->head + i;
        const float either[2] = { m->score[u], -INFINITY };
        m->gathered[i] = either[lg_ops_kept(kept, u) == all];
    }
    m->j->k.topk(out, m->gathered, n, left, 0, (uint32_t *)m->work);
    for (int64_t w = lo; w < hi; w++) bits[w] = all ? kept_word(kept, w, m->head, m->tail) : 0;
    for (int64_t i = 0; i < left; i++) {
        const int64_t u = few ? m->best[out[i]] : m->head + out[i];
        bits[u >> 5] |= 1u << (u & 31);
    }
    list_bits(out, bits, lo, hi, m->work);
}

/* A set that is to be made: what is forced, then k units to choose. */
typedef struct place {
    const uint32_t *kept; /* or NULL */
    bool keeps;           /* some of the units to choose from */
    int32_t *out, *n;
    int64_t budget, k;
    bool fits;            /* k and what is forced lie within cap */
} place;
static place place_of(const lg_op_attend_hybrid *a, const lg_forced *f, int32_t row, int32_t make) {
    const int64_t slot = (int64_t)row * a->sets.n_slot + make, forced = f->head + f->n - f->tail;
    place p = { .kept = a->seqs[row].kept ? a->seqs[row].kept + make * a->sets.kept_words : NULL, .out = a->sets.idx + slot * a->sets.cap, .n = a->sets.n + slot };
    p.keeps = p.kept && any_kept(p.kept, f->head, f->tail);
    p.budget = lg_ops_budget(&a->spread, a->spread.slot, make, a->budget[row]);
    p.k = max64(0, min64(f->tail - f->head, p.budget / a->sets.block - forced));
    p.fits = forced + p.k <= a->sets.cap;
    return p;
}
/* The chosen ones stand there already. */
static void put_forced(const place *p, const lg_forced *f) {
    for (int64_t b = 0; b < f->head; b++) p->out[b] = (int32_t)b;
    for (int64_t b = f->tail; b < f->n; b++) p->out[f->head + p->k + b - f->tail] = (int32_t)b;
    *p->n = (int32_t)(f->head + p->k + f->n - f->tail);
}
static bool forces(const lg_op_attend_hybrid *a) { return a->select.rule == LG_RULE_TOPK || a->select.rule == LG_RULE_RATIO; }
/* Sets that keep units are made in a phase of their own, by all threads, from what those that keep nothing hold. (Scores of blocks are a thread's own.) */
static bool made_late(const lg_op_attend_hybrid *a, const place *p) { return p->keeps && p->fits && forces(a) && a->sets.block == 1; }

/* The sets lg_ops_select defines, from the last slot on. top-k over the units that are not forced, of a smaller set over those of the larger one,
 * of one that keeps units over those of the largest; the other rules as they are written. */
static void make_sets(const job *j, const unit *u, const float *score, float *work_f, int32_t *work_i) {
    const lg_op_attend_hybrid *a = j->h;
    const int64_t len = u->seq->len, block = a->sets.block;
    const lg_forced f = lg_ops_forced(len, a->sets.block, a->select.sinks, a->select.recents);
    making m = { .j = j, .score = score, .head = f.head, .tail = f.tail, .gathered = work_f, .work = work_i };
    if (block > 1 && forces(a)) {
        for (int64_t b = f.head; b < f.tail; b++) {
            float x = score[b * block];
            for (int64_t t = b * block + 1; t < min64(len, (b + 1) * block); t++) x = score[t] > x ? score[t] : x;
            work_f[b] = x;
        }
        m.score = work_f;
        m.gathered += f.n;
    }
    const int32_t *larger = NULL;
    int64_t n_larger = 0;
    for (int32_t make = u->make + u->n_make - 1; make >= u->make; make--) {
        const place p = place_of(a, &f, u->row, make);
        if (made_late(a, &p)) continue;
        if (!forces(a) || !p.fits) {
            lg_select how = a->select;
            how.kept = p.kept;
            *p.n = (int32_t)lg_ops_select(p.out, a->sets.cap, score, len, p.budget, (int32_t)block, &how, m.gathered, work_i);
            continue;
        }
        int32_t *out = p.out + f.head;
        if (p.keeps) {
            choose_kept(&m, out, p.kept, p.k);
        } else if (!larger) {
            j->k.topk(out, m.score + f.head, f.tail - f.head, p.k, (int32_t)f.head, (uint32_t *)work_i);
            m.best = larger = out;
            m.n_best = n_larger = p.k;
        } else {
            for (int64_t i = 0; i < n_larger; i++) m.gathered[i] = m.score[larger[i]];
            j->k.topk(out, m.gathered, n_larger, p.k, 0, (uint32_t *)work_i);
            for (int64_t i = 0; i < p.k; i++) out[i] = larger[out[i]];
            larger = out;
            n_larger = p.k;
        }
        put_forced(&p, &f);
    }
}

/* The late ones of make_sets; of all threads' sets, which *at counts, one in nth. */
static void make_late(const job *j, const unit *u, const float *score, float *work_f, int32_t *work_i, int64_t *at, int ith, int nth) {
    const lg_op_attend_hybrid *a = j->h;
    const lg_forced f = lg_ops_forced(u->seq->len, a->sets.block, a->select.sinks, a->select.recents);
    making m = { .j = j, .score = score, .head = f.head, .tail = f.tail, .gathered = work_f, .work = work_i };
    for (int32_t make = u->make + u->n_make - 1; make >= u->make; make--) {
        const place p = place_of(a, &f, u->row, make);
        if (!made_late(a, &p)) {
            if (!m.best && p.fits && !p.keeps) {
                m.best = p.out + f.head;
                m.n_best = p.k;
            }
        } else if ((*at)++ % nth == ith) {
            choose_kept(&m, p.out + f.head, p.kept, p.k);
            put_forced(&p, &f);
        }
    }
}

/* Slot `make` where the score of a token is its position: the latest units beside what is forced and kept. */
static void make_latest(const lg_op_attend_hybrid *a, int32_t row, int32_t make) {
    const lg_forced f = lg_ops_forced(a->seqs[row].len, a->sets.block, a->select.sinks, a->select.recents);
    const place p = place_of(a, &f, row, make);
    int32_t *out = p.out;
    /* From behind: units that are not kept while there is room for them, kept ones all (the latest, where there are too many). */
    const int64_t n_kept = p.keeps ? min64(p.k, count_kept(p.kept, f.head, f.tail)) : 0;
    int64_t free = p.k - n_kept, at = f.head + p.k, u = f.tail;
    for (int64_t t = f.tail; t < f.n; t++)
        if (at + t - f.tail < a->sets.cap) out[at + t - f.tail] = (int32_t)t;
    while (free > 0) {
        if (!lg_ops_kept(p.kept, --u)) free--;
        if (--at < a->sets.cap) out[at] = (int32_t)u;
    }
    for (int64_t w = (u - 1) / 32; at > f.head; w--)
        for (uint32_t bits = kept_word(p.kept, w, f.head, u); bits && at > f.head;) {
            const int bit = 31 - __builtin_clz(bits);
            bits ^= 1u << bit;
            if (--at < a->sets.cap) out[at] = (int32_t)(w * 32 + bit);
        }
    for (int64_t t = 0; t < min64(f.head, a->sets.cap); t++) out[t] = (int32_t)t;
    *p.n = (int32_t)min64(f.head + p.k + f.n - f.tail, a->sets.cap);
}

/* Partials to outputs, scores to sets; `late`: the sets of make_late and make_latest. */
static void run_merge(const job *j, void *scratch, bool late, int ith, int nth) {
    const layout l = layout_of(j, scratch);
    share s = share_of(l.cost1, ith, nth);
    int64_t n_score = 0, longest = 0, at = 0;
    walk w = { 0 };
    unit u;
    while (next_unit(j, &w, &u)) {
        if (u.make < 0) continue;
        n_score += pad16(u.seq->len);
        longest = max64(longest, pad16(u.seq->len));
    }
    float *work = l.scores + n_score + 2 * longest * ith;
    int32_t *work_i = (int32_t *)(void *)(work + longest);
    const float *partial = l.partials, *score = l.scores;
    w = (walk){ 0 };
    while (next_unit(j, &w, &u)) {
        if (u.make >= 0) {
            if (late) make_late(j, &u, score, work, work_i, &at, ith, nth);
            else if (mine(&s, select_cost(&u))) make_sets(j, &u, score, work, work_i);
            score += pad16(u.seq->len);
        }
        if (!late && mine(&s, merge_cost(j, &u))) merge(j, &u, partial);
        partial += chunk_count(u.n) * j->partial;
    }
    for (int32_t row = 0; late && row < j->h->n_seq; row++)
        for (int32_t k = 0; !j->h->dense[row] && k < j->h->spread.n_latest; k++)
            if (at++ % nth == ith) make_latest(j->h, row, j->h->spread.latest + k);
}

/* Flash tiles of all runs of two rows and more, in the order (run, head, tile); a thread takes a stretch of them, cut
 * into calls of one head with at most LG_FLASH_GROUP tiles. */
static int64_t tile_count(const job *j, const run *r) { return up(r->n * j->group, LG_FLASH_LANES); }
static int64_t tile_cost(const job *j, const run *r, int64_t tile) {
    const int64_t lane = min64(r->n * j->group, (tile + 1) * LG_FLASH_LANES) - 1;
    return j->a->idx[r->first + lane / j->group] / LG_PAGE + 3;
}

static void run_flash(const job *j, const lg_op_observe *o, float *peaks, void *scratch, int ith, int nth, int64_t bytes) {
    const lg_op_attend *a = j->a;
    const int64_t d = j->geom->head_dim;
    int64_t total = 0;
    for (run r = { 0 }; next_run(a, &r);)
        for (int64_t t = 0; r.n > 1 && t < tile_count(j, &r); t++) total += tile_cost(j, &r, t) * j->geom->n_head_kv;
    share s = share_of(total, ith, nth);
    for (run r = { 0 }; next_run(a, &r);) {
        if (r.n == 1) continue;
        const int64_t at = r.first * a->n_head * d, tiles = tile_count(j, &r), lanes = r.n * j->group;
        for (int32_t h = 0; h < j->geom->n_head_kv; h++) {
            lg_flash f = { .q = a->q + at + h * j->group * d, .out = a->out + at + h * j->group * d, .ld = a->n_head * d,
                           .idx = a->idx + r.first, .k = j->kv->k, .v = j->kv->v, .page = a->seqs[a->seq[r.first]].page,
                           .head = h, .n_head_kv = j->geom->n_head_kv, .group = j->group, .head_dim = j->geom->head_dim,
                           .row_bytes = j->geom->row_bytes, .dtype = j->geom->dtype, .scale2 = j->scale2,
                           .scratch = (uint8_t *)scratch + bytes * ith };
            if (o) {
                f.peak = peaks + h * observe_tiles(o->n_tok, o->n_head, &o->geom) * 2 * LG_FLASH_LANES;
                f.peak0 = lanes - o->n_tok * j->group;
                f.peak1 = lanes;
            }
            int64_t n = 0;
            for (int64_t t = 0; t <= tiles; t++) {
                const bool take = t < tiles && mine(&s, tile_cost(j, &r, t));
                if (n && (!take || n == LG_FLASH_GROUP)) {
                    f.lane0 = (t - n) * LG_FLASH_LANES;
                    f.n_lane = min64(lanes, t * LG_FLASH_LANES) - f.lane0;
                    j->k.many->flash(&f);
                    n = 0;
                }
                n += take;
            }
        }
    }
}

int lg_attend_phases(const lg_gemm *g, const lg_op_attend *a, int nth) {
    (void)g; (void)nth;
    for (run r = { 0 }; next_run(a, &r);)
        if (r.n == 1) return 2;
    return 1;
}

bool lg_observe_follows(const lg_op_attend *a, const lg_op_observe *o) {
    const int64_t before = a->n_tok - o->n_tok, row = (int64_t)a->n_head * a->geom.head_dim;
    for (int64_t t = 1; t < a->n_tok; t++)
        if (a->seq[t] != a->seq[0]) return false;
    return a->n_tok > 1 && before >= 0 && o->q == a->q + before * row && o->idx == a->idx + before && o->kv.k == a->kv.k && o->n_head == a->n_head &&
           o->seq->page == a->seqs[a->seq[0]].page && o->scale == a->scale && !memcmp(&o->geom, &a->geom, sizeof a->geom);
}

void lg_attend_run(const lg_gemm *g, const lg_op_attend *a, const lg_op_observe *o, int phase, void *scratch, int ith, int nth) {
    const job j = job_of(g, a, NULL);
    if (phase == 0) {
        run_partials(&j, scratch, ith, nth);
        const layout l = layout_of(&j, scratch);
        float *peaks = scratch; /* there are no partials: one run */
        run_flash(&j, o, peaks, o ? peaks + peak_floats(o->n_tok, o->n_head, &o->geom) : l.scores, ith, nth, flash_bytes(g, j.geom));
    } else {
        run_merge(&j, scratch, false, ith, nth);
    }
}

int lg_attend_hybrid_phases(const lg_gemm *g, const lg_op_attend_hybrid *a, int nth) {
    bool late = a->spread.n_latest > 0, makes = false;
    (void)g; (void)nth;
    for (int32_t h = 0; h < a->geom.n_head_kv; h++) makes = makes || a->make[h] >= 0;
    for (int32_t row = 0; row < a->n_seq; row++) late = late || (makes && a->seqs[row].kept);
    return late ? 3 : 2;
}

void lg_attend_hybrid_run(const lg_gemm *g, const lg_op_attend_hybrid *a, int phase, void *scratch, int ith, int nth) {
    const job j = job_of(g, NULL, a);
    if (phase == 0) run_partials(&j, scratch, ith, nth);
    else run_merge(&j, scratch, phase == 2, ith, nth);
}

/* ---- attention mass: tiles of lanes first, then runs of pages; what a token gets depends on neither cut ---- */
enum { OBSERVE_PAGES = 8 };

int lg_observe_phases(const lg_gemm *g, const lg_op_observe *a, int nth) {
    (void)g; (void)a; (void)nth;
    return 2;
}

void lg_observe_run(const lg_gemm *g, const lg_op_observe *a, int phase, void *scratch, int ith, int nth) {
    const kernels k = kernels_for(g, &a->geom);
    const int64_t d = a->geom.head_dim, group = a->n_head / a->geom.n_head_kv, lanes = a->n_tok * group, len = a->seq->len;
    const int64_t tiles = observe_tiles(a->n_tok, a->n_head, &a->geom), pages = up(len, LG_PAGE), runs = up(pages, OBSERVE_PAGES);
    float *peaks = scratch;
    uint8_t *own = (uint8_t *)scratch + peak_floats(a->n_tok, a->n_head, &a->geom) * (int64_t)sizeof(float) + flash_bytes(g, &a->geom) * ith;
    for (int64_t u = ith; u < a->geom.n_head_kv * (phase ? runs : tiles); u += nth) {
        const int64_t h = u / (phase ? runs : tiles), part = u % (phase ? runs : tiles);
        lg_flash f = { .q = a->q + h * group * d, .ld = a->n_head * d, .idx = a->idx, .k = a->kv.k, .page = a->seq->page, .head = (int32_t)h,
                       .n_head_kv = a->geom.n_head_kv, .group = (int32_t)group, .head_dim = (int32_t)d, .row_bytes = a->geom.row_bytes,
                       .dtype = a->geom.dtype, .scale2 = a->scale * 1.44269504f, .n_lane = lanes, .scratch = own };
        float *peak = peaks + h * tiles * 2 * LG_FLASH_LANES;
        if (phase == 0) {
            f.lane0 = part * LG_FLASH_LANES;
            f.n_lane = min64(LG_FLASH_LANES, lanes - f.lane0);
            k.many->peak(&f, peak + part * 2 * LG_FLASH_LANES);
            continue;
        }
        const int64_t first = part * OBSERVE_PAGES, end = min64(pages, first + OBSERVE_PAGES);
        float *mass = a->mass + h * a->ld;
        memset(mass + first * LG_PAGE, 0, (size_t)(min64(len, end * LG_PAGE) - first * LG_PAGE) * sizeof *mass);
        k.many->mass(&f, peak, first, end, 1.0f / (float)lanes, mass);
    }
}
