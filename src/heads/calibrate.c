/* calibrate: donor maps without training (docs/SPARSE.md).
 *
 *   material     passages of the given text and multi-passkey samples in it; the last quarter of the text is
 *                held out: from it come the passages and samples that the curve is measured on
 *   coverage     dense prefill of the calibration material; cover.c does the sums
 *   sensitivity  each head alone on its window, the rest dense: KL on both kinds, each normalised to sum 1; for shares of the budget
 *                the same on sinks and recents alone
 *   shares       every map: budgets per head of the same mean, those of the least loss that coverage and sensitivity foresee
 *   choice       greedy cover; with search > 1 every new head, up to the largest count asked for, is the best of the cover's
 *                first candidates by the KL of real hybrid decoding on the calibration material
 *   refine       for the counts that are written: the retrieval head whose loss hurts least makes room for the best of the
 *                cover's candidates, as long as real decoding gets better (--refine; such maps are not nested any more)
 *   settle       for the counts that are written: shares once more, from the loss of every head alone in the role it got
 *   curve        KL of every count on held-out material; the roles of the asked count are written */
#include "longan/heads.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "heads/cover.h"
#include "heads/measure.h"
#include "tasks/passkey.h"

enum {
    MAX_SEQ = 64,         /* passages of plain text at most */
    N_PASSKEY = 6,        /* samples */
    N_KEYS = 6, N_WORDS = 6, N_ASK = 2,
    PASSKEY_CTX = 1536,   /* small models lose passkeys beyond */
    HELD_OUT_SHARE = 4,   /* one in 4 */
};

void lg_calibrate_defaults(lg_calibrate_params *p) {
    *p = (lg_calibrate_params){ .kl_bound = 0.02, .n_ctx = 4096, .n_positions = 128, .n_passages = 4, .budget = 512, .sinks = 16,
                                .recents = 64, .search = 2 };
}

/* Sequences of one kind: their ids, where decoding starts, which rows count. */
typedef struct material {
    int64_t n_seq;
    lg_probe_seq seq[MAX_SEQ];
    lg_passkey key[N_PASSKEY]; /* owns ids of passkey material */
    uint8_t *flags[N_PASSKEY]; /* owned */
    int64_t budget;            /* scaled to the length, so that both kinds are equally sparse */
} material;

typedef struct calib {
    lg_model *m;
    const lg_calibrate_params *p;
    lg_model_info info;
    lg_error *err;
    int64_t n, n_group;        /* heads; query heads of one */
    lg_ids ids;                /* the text */
    int64_t n_learn;           /* its ids before the held-out part */
    material plain, passkey, plain_held, passkey_held;
    lg_cover cover[2];         /* of plain text, of passkeys */
    double *c, *w;             /* [n, n], [n] their mean at the whole budget */
    double *kl[2];             /* [2, n] of a head alone on sinks and recents, on its window */
    double *foreseen_c[2];     /* [n, n] of head i alone with donor r at the whole budget */
    double *sens, *objective;  /* [n], [n + 1] */
    int64_t *order;            /* [n] heads in the order of their choice */
    uint8_t *refined;          /* [n + 1, n] marks of a count that was refined */
    uint8_t *has;              /* [n + 1] such counts */
    lg_roles **settled;        /* [n + 1] maps with their last shares, or NULL */
    lg_probe *probe[2];
    struct point { bool known; lg_score plain, passkey; } *curve; /* [n + 1] by count */
    int64_t n_curve;
} calib;

static lg_status nomem(const calib *c) {
    return lg_base_fail(c->err, LG_ERR_NOMEM, -1, "calibration: out of memory");
}

static lg_status tell(const calib *c, const char *what, int64_t done, int64_t total) {
    if (c->p->progress && !c->p->progress(c->p->progress_user, what, done, total))
        return lg_base_fail(c->err, LG_ERR_CANCELLED, -1, "calibration cancelled");
    return LG_OK;
}

/* ---- material --------------------------------------------------------------------------------------- */
static lg_status encode(void *user, const char *s, int64_t n, lg_ids *out, lg_error *err) {
    return lg_tokenize(user, s, n, 0, out, err);
}

/* Passages at even spacing with a drawn offset; they may overlap where the text is short. */
static lg_status make_plain(calib *c, material *mt, int64_t from, int64_t to, uint64_t stream) {
    const int64_t n = c->p->n_passages, tail = (c->p->n_positions + n - 1) / n;
    int64_t len = c->p->n_ctx + tail + 1;
    if (len > c->info.n_ctx_train && !c->info.rope_scaled) len = c->info.n_ctx_train;
    if (to - from < len)
        return lg_base_fail(c->err, LG_ERR_LIMIT, -1, "calibration: the text is too short: %lld tokens, at least %lld are needed",
                            (long long)c->ids.n, (long long)(2 * len));
    if (len - tail - 1 < 1)
        return lg_base_fail(c->err, LG_ERR_USAGE, -1, "calibration: %lld positions leave no context", (long long)c->p->n_positions);
    mt->n_seq = n;
    mt->budget = c->p->budget;
    for (int64_t i = 0; i < n; i++) {
        int64_t room = (to - from - len) / n;
        int64_t at = from + i * room + lg_base_rng_below(c->p->seed, stream, (uint64_t)i, room + 1);
        mt->seq[i] = (lg_probe_seq){ .ids = c->ids.data + at, .n = len, .n_ctx = len - tail - 1 };
    }
    return LG_OK;
}

/* One sample; fewer keys where the context is too short for all, a shorter context where the questions would
 * not fit behind it. */
static lg_status draw_passkey(calib *c, lg_passkey_params *q, lg_passkey *out) {
    for (;;) {
        lg_status st = lg_tasks_passkey(out, q, c->err);
        if (st == LG_ERR_USAGE && q->n_keys > 1) {
            q->n_keys--;
            q->n_ask = q->n_ask < q->n_keys ? q->n_ask : q->n_keys;
            continue;
        }
        int64_t over = st == LG_OK && !c->info.rope_scaled ? out->ids.n - c->info.n_ctx_train : 0;
        if (st != LG_OK || over <= 0) return st;
        lg_tasks_passkey_free(out);
        q->n_ctx -= over;
    }
}

static lg_status make_passkey(calib *c, material *mt, int64_t from, int64_t to, lg_split split) {
    lg_passkey_params q = { .encode = encode, .encode_user = c->m, .haystack = c->ids.data + from, .n_haystack = to - from,
                            .n_ctx = c->p->n_ctx < PASSKEY_CTX ? c->p->n_ctx : PASSKEY_CTX, .n_keys = N_KEYS,
                            .n_words = N_WORDS, .n_ask = N_ASK, .seed = c->p->seed, .split = split };
    mt->n_seq = N_PASSKEY;
    for (int64_t i = 0; i < N_PASSKEY; i++) {
        q.index = i;
        lg_status st = draw_passkey(c, &q, &mt->key[i]);
        if (st != LG_OK) return st;
        const lg_passkey *k = &mt->key[i];
        mt->flags[i] = lg_base_alloc(k->ids.n);
        if (!mt->flags[i]) return nomem(c);
        for (int64_t j = 0; j + 1 < k->ids.n; j++) mt->flags[i][j] = k->answer[j + 1];
        mt->seq[i] = (lg_probe_seq){ .ids = k->ids.data, .n = k->ids.n, .n_ctx = k->n_ctx, .scored = mt->flags[i] };
    }
    mt->budget = c->p->budget * q.n_ctx / c->p->n_ctx;
    return LG_OK;
}

static void material_free(material *mt) {
    for (int64_t i = 0; i < N_PASSKEY; i++) {
        lg_tasks_passkey_free(&mt->key[i]);
        lg_base_free(mt->flags[i]);
    }
}

static lg_status make_material(calib *c) {
    lg_status st;
    LG_TRY(lg_tokenize(c->m, c->p->text, c->p->text_bytes, 0, &c->ids, c->err));
    /* A quarter is held out, or as much as one passage takes. */
    int64_t held = c->ids.n / HELD_OUT_SHARE, least = c->p->n_ctx + c->p->n_positions;
    held = held > least ? held : least < c->ids.n / 2 ? least : c->ids.n / 2;
    c->n_learn = c->ids.n - held;
    LG_TRY(make_plain(c, &c->plain_held, c->n_learn, c->ids.n, 2));
    LG_TRY(make_plain(c, &c->plain, 0, c->n_learn, 1));
    LG_TRY(make_passkey(c, &c->passkey, 0, c->n_learn, LG_SPLIT_TRAIN));
    LG_TRY(make_passkey(c, &c->passkey_held, c->n_learn, c->ids.n, LG_SPLIT_DEV));
done:
    return st;
}

/* ---- coverage --------------------------------------------------------------------------------------- */
typedef struct catcher { /* queries of the chosen positions, out of the chunks passing by */
    const int64_t *pos;
    int64_t n_pos, row; /* floats of one position */
    float *q;           /* [n_layer, n_pos, row] */
} catcher;

static void on_query(void *user, int64_t layer, int64_t first, int64_t n_rows, const float *q) {
    catcher *k = user;
    for (int64_t i = 0; i < k->n_pos; i++)
        if (k->pos[i] >= first && k->pos[i] < first + n_rows)
            memcpy(k->q + (layer * k->n_pos + i) * k->row, q + (k->pos[i] - first) * k->row, (size_t)k->row * sizeof(float));
}

/* The positions to look at: of all rows that count, or of the second half of a plain passage, at most `most`. */
static int64_t choose_positions(const calib *c, const lg_probe_seq *q, int64_t most, uint64_t stream, int64_t *pos) {
    int64_t n_all = 0, n = 0;
    for (int64_t i = q->scored ? 0 : q->n / 2; i < q->n; i++) n_all += q->scored ? q->scored[i] : 1;
    int64_t want = n_all < most ? n_all : most, seen = 0;
    for (int64_t i = q->scored ? 0 : q->n / 2; i < q->n && n < want; i++) {
        if (q->scored && !q->scored[i]) continue;
        /* Draw want of n_all without replacement, in order. */
        if (lg_base_rng_below(c->p->seed, stream, (uint64_t)i, n_all - seen) < want - n) pos[n++] = i;
        seen++;
    }
    return n;
}

static lg_status cover_sequence(calib *c, lg_cover *cv, lg_session *s, const lg_probe_seq *q, int64_t budget, double weight, int64_t most,
                                uint64_t stream) {
    lg_status st = LG_OK;
    const lg_model_info *in = &c->info;
    int64_t *pos = lg_base_calloc(most, (int64_t)sizeof *pos);
    float *k = lg_base_calloc(in->n_head_kv * q->n, in->head_dim * (int64_t)sizeof *k);
    const float **head = lg_base_calloc(in->n_head_kv, (int64_t)sizeof *head);
    catcher ca = { .pos = pos, .row = in->n_head * in->head_dim };
    if (!pos || !k || !head) LG_TRY(nomem(c));
    ca.n_pos = choose_positions(c, q, most, stream, pos);
    ca.q = lg_base_calloc(in->n_layer * ca.n_pos, ca.row * (int64_t)sizeof *ca.q);
    if (!ca.q) LG_TRY(nomem(c));
    lg_session_on_query(s, on_query, &ca);
    LG_TRY(lg_session_rewind(s, 0, 0, c->err));
    LG_TRY(lg_session_sync(s, 0, q->ids, q->n, c->err));
    LG_TRY(lg_cover_begin(cv, pos, ca.n_pos, budget, c->err));
    for (int64_t l = 0; l < in->n_layer; l++) {
        for (int64_t h = 0; h < in->n_head_kv; h++) {
            float *to = k + h * q->n * in->head_dim;
            head[h] = to;
            LG_TRY(lg_session_read_k(s, 0, l, h, q->n, to, c->err));
        }
        LG_TRY(lg_cover_layer(cv, l, ca.q + l * ca.n_pos * ca.row, head, c->err));
    }
    lg_cover_end(cv, weight);
done:
    lg_session_on_query(s, NULL, NULL);
    lg_base_free(ca.q);
    lg_base_free(pos);
    lg_base_free(k);
    lg_base_free((void *)head);
    return st;
}

static lg_status cover_all(calib *c) {
    lg_status st;
    lg_session *s = NULL;
    lg_session_params sp;
    const material *mt[2] = { &c->plain, &c->passkey };
    int64_t longest = 0, total = 0, done = 0;
    for (int k = 0; k < 2; k++)
        for (int64_t i = 0; i < mt[k]->n_seq; i++, total++)
            longest = mt[k]->seq[i].n > longest ? mt[k]->seq[i].n : longest;
    lg_session_defaults(&sp);
    sp.n_ctx = longest;
    c->c = lg_base_calloc(c->n * c->n, (int64_t)sizeof *c->c);
    c->w = lg_base_calloc(c->n, (int64_t)sizeof *c->w);
    if (!c->c || !c->w) LG_TRY(nomem(c));
    for (int k = 0; k < 2; k++)
        LG_TRY(lg_cover_new(&c->cover[k], c->info.n_layer, c->info.n_head_kv, c->n_group, c->info.head_dim, c->p->sinks, c->p->recents, c->err));
    LG_TRY(lg_session_new(&s, c->m, &sp, c->err));
    for (int k = 0; k < 2; k++)
        for (int64_t i = 0; i < mt[k]->n_seq; i++) {
            int64_t most = (c->p->n_positions + mt[k]->n_seq - 1) / mt[k]->n_seq;
            LG_TRY(tell(c, "coverage", done, total));
            LG_TRY(cover_sequence(c, &c->cover[k], s, &mt[k]->seq[i], mt[k]->budget, 1.0 / (double)mt[k]->n_seq, most, (uint64_t)(16 + done)));
            done++;
        }
    for (int k = 0; k < 2; k++) {
        for (int64_t i = 0; i < c->n * c->n; i++) c->c[i] += 0.5 * c->cover[k].c[i];
        for (int64_t i = 0; i < c->n; i++) c->w[i] += 0.5 * c->cover[k].w[i];
    }
    LG_TRY(tell(c, "coverage", total, total));
done:
    lg_session_free(s);
    return st;
}

/* ---- probes ----------------------------------------------------------------------------------------- */
static lg_status open_probes(calib *c, const material *plain, const material *passkey) {
    const material *mt[2] = { plain, passkey };
    for (int k = 0; k < 2; k++) {
        lg_heads_probe_free(c->probe[k]);
        c->probe[k] = NULL;
    }
    for (int k = 0; k < 2; k++) {
        lg_status st = tell(c, "contexts", k, 2);
        if (st == LG_OK) st = lg_heads_probe_new(&c->probe[k], c->m, mt[k]->seq, mt[k]->n_seq, LG_DTYPE_COUNT, NULL, NULL, c->err);
        if (st != LG_OK) return st;
    }
    return tell(c, "contexts", 2, 2);
}

static void keep_of(const calib *c, lg_roles *r) {
    r->keep = (int64_t)(c->p->keep * LG_SHARE_ONE + 0.5);
    r->observe = r->keep ? c->p->observe : 0;
    r->refresh = r->keep ? c->p->refresh : 0;
}

/* keeps: with what heads keep; a map without its donors' sets (sensitivity) is measured without. */
static lg_status run_probes(calib *c, lg_roles *roles, bool keeps, lg_score score[2]) {
    const material *mt[2] = { &c->plain, &c->passkey };
    memcpy(roles->family, c->info.family, sizeof roles->family);
    if (keeps) keep_of(c, roles);
    for (int k = 0; k < 2; k++) {
        lg_hybrid_params how;
        lg_hybrid_defaults(&how);
        how.budget = mt[k]->budget > c->p->sinks + c->p->recents ? mt[k]->budget : c->p->sinks + c->p->recents;
        how.sinks = c->p->sinks;
        how.recents = c->p->recents;
        lg_status st = lg_heads_probe_run(c->probe[k], roles, &how, &score[k], c->err);
        if (st != LG_OK) return st;
    }
    return LG_OK;
}

static lg_status measure_sensitivity(calib *c) {
    lg_status st = LG_OK;
    const int64_t first = c->p->spread ? 0 : 1; /* 0: sinks and recents alone; 1: the whole window */
    lg_roles *r = lg_roles_new(c->info.n_layer, c->info.n_head_kv);
    for (int k = 0; k < 2; k++) c->kl[k] = lg_base_calloc(2 * c->n, (int64_t)sizeof *c->kl[k]);
    if (!r || !c->kl[0] || !c->kl[1]) LG_TRY(nomem(c));
    LG_TRY(lg_roles_spread(r, c->err));
    for (int64_t i = 0; i < c->n; i++) r->role[i].kind = LG_ROLE_RETRIEVAL;
    r->n_retrieval = c->n - 1;
    for (int64_t i = 0; i < c->n; i++) {
        LG_TRY(tell(c, "sensitivity", i, c->n));
        r->role[i].kind = LG_ROLE_WINDOW;
        for (int64_t whole = first; whole < 2; whole++) {
            lg_score score[2];
            r->share[i] = whole ? LG_SHARE_ONE : 0;
            LG_TRY(run_probes(c, r, false, score));
            for (int k = 0; k < 2; k++) c->kl[k][whole * c->n + i] = score[k].kl > 0 ? score[k].kl : 0;
        }
        r->role[i].kind = LG_ROLE_RETRIEVAL;
    }
    for (int k = 0; k < 2; k++) {
        const double *kl = c->kl[k] + c->n;
        double sum = 0;
        for (int64_t i = 0; i < c->n; i++) sum += kl[i];
        for (int64_t i = 0; i < c->n; i++) c->sens[i] += sum > 0 ? kl[i] / sum : 0;
    }
    LG_TRY(tell(c, "sensitivity", c->n, c->n));
done:
    lg_roles_free(r);
    return st;
}

/* ---- maps and shares of the budget ------------------------------------------------------------------ */
/* A value between levels. */
static double at_share(const double *v, int32_t share) {
    int k = 0;
    while (k + 2 < LG_COVER_LEVELS && lg_cover_share[k + 1] < share) k++;
    const double part = (double)(share - lg_cover_share[k]) / (double)(lg_cover_share[k + 1] - lg_cover_share[k]);
    return v[k] + (v[k + 1] - v[k]) * (part < 1 ? part : 1);
}

/* What head i finds at a level on text of kind k in its role. */
static double found(const calib *c, const lg_roles *r, int k, int64_t i, int level) {
    const lg_role *e = &r->role[i];
    const lg_cover *cv = &c->cover[k];
    if (e->kind == LG_ROLE_RETRIEVAL) return 1;
    if (e->kind == LG_ROLE_WINDOW) return cv->all_w[level * c->n + i];
    return cv->all_c[(level * c->n + e->donor_layer * c->info.n_head_kv + e->donor_head) * c->n + i];
}

/* What every head finds in what it reads, both kinds of text alike. */
static void found_at_shares(const calib *c, const lg_roles *r, double *coverage) {
    for (int64_t i = 0; i < c->n; i++) {
        coverage[i] = 0;
        for (int k = 0; k < 2; k++) {
            double at[LG_COVER_LEVELS];
            for (int level = 0; level < LG_COVER_LEVELS; level++) at[level] = found(c, r, k, i, level);
            coverage[i] += 0.5 * at_share(at, r->share[i]);
        }
    }
}

/* KL of a head alone as a power of the attention it misses, through two measured points (m0 > m1): the power lies between 1 and 4; where that
 * does not fit both, each point rules on its own side. */
static double power_law(double kl0, double m0, double kl1, double m1, double miss) {
    const double tiny = 1e-7;
    double power = 2, side = 1;
    if (!(miss > tiny)) return 0;
    kl0 = kl0 > tiny ? kl0 : tiny;
    kl1 = kl1 > tiny ? kl1 : tiny;
    m0 = m0 > tiny ? m0 : tiny;
    m1 = m1 > tiny ? m1 : tiny;
    if (m0 > 1.1 * m1) {
        power = log(kl0 / kl1) / log(m0 / m1);
        side = log(m0 / miss) / log(m0 / m1);
    }
    power = power > 1 ? power < 4 ? power : 4 : 1;
    side = side > 0 ? side < 1 ? side : 1 : 0;
    return exp((1 - side) * (log(kl0) + power * log(miss / m0)) + side * (log(kl1) + power * log(miss / m1)));
}

/* Of head i on text of kind k where it finds cov, from its two windows. */
static double foreseen(const calib *c, int k, int64_t i, double cov) {
    return power_law(c->kl[k][i], 1 - c->cover[k].all_w[i], c->kl[k][c->n + i], 1 - c->cover[k].w[i], 1 - cov);
}

/* The two kinds of text as one number: their KL by its logarithm, whatever its size, plain text twice. */
static const double kind_weight[2] = { 2.0 / 3, 1.0 / 3 };
static double loss_of(const double kl[2]) {
    double sum = 0;
    for (int k = 0; k < 2; k++) sum += kind_weight[k] * log(kl[k] > 1e-9 ? kl[k] : 1e-9);
    return sum;
}

/* The map of marked retrieval heads and the loss that is foreseen: that of single heads adds up. What a head's donor and share are worth
 * depends on the sums of both kinds, so these are found in a few rounds. */
typedef struct draft { lg_roles *r; double *c, *w, *loss[2], *sum; } draft;

static void draft_free(draft *d) {
    lg_roles_free(d->r);
    void *held[] = { d->c, d->w, d->loss[0], d->loss[1], d->sum };
    for (size_t i = 0; i < sizeof held / sizeof *held; i++) lg_base_free(held[i]);
}

static lg_status foresee(calib *c) {
    for (int k = 0; k < 2; k++) {
        c->foreseen_c[k] = lg_base_calloc(c->n, c->n * (int64_t)sizeof(double));
        if (!c->foreseen_c[k]) return nomem(c);
        for (int64_t i = 0; i < c->n * c->n; i++) c->foreseen_c[k][i] = foreseen(c, k, i % c->n, c->cover[k].c[i]);
    }
    return LG_OK;
}

/* Sums over heads of both kinds. */
static void total_loss(const calib *c, const lg_roles *r, double *const loss[2], double kl[2]) {
    for (int k = 0; k < 2; k++) {
        kl[k] = 1e-9;
        for (int64_t i = 0; i < c->n; i++)
            if (r->role[i].kind != LG_ROLE_RETRIEVAL) kl[k] += at_share(loss[k] + i * LG_COVER_LEVELS, r->share[i]);
    }
}

static lg_status draft_round(const calib *c, draft *d, const uint8_t *mark, double kl[2]) {
    lg_status st = LG_OK;
    const double a = kind_weight[0] / kl[0], b = kind_weight[1] / kl[1];
    for (int64_t i = 0; i < c->n * c->n; i++) d->c[i] = -(a * c->foreseen_c[0][i] + b * c->foreseen_c[1][i]);
    for (int64_t i = 0; i < c->n; i++) d->w[i] = -(a * c->kl[0][c->n + i] + b * c->kl[1][c->n + i]);
    lg_roles_free(d->r);
    d->r = lg_cover_roles(c->info.n_layer, c->info.n_head_kv, d->c, d->w, mark, c->p->same_index, NULL);
    if (!d->r) return nomem(c);
    for (int64_t i = 0; i < c->n; i++)
        for (int level = 0; level < LG_COVER_LEVELS; level++) {
            const int64_t at = i * LG_COVER_LEVELS + level;
            for (int k = 0; k < 2; k++) d->loss[k][at] = foreseen(c, k, i, found(c, d->r, k, i, level));
            d->sum[at] = a * d->loss[0][at] + b * d->loss[1][at];
        }
    LG_TRY(lg_cover_spread(d->r, d->sum, c->err));
    total_loss(c, d->r, d->loss, kl);
done:
    return st;
}

/* r, loss, coverage ([n], what a head finds in what it reads): or NULL. */
static lg_status draw_up(const calib *c, const uint8_t *mark, lg_roles **r, double *loss, double *coverage) {
    lg_status st = LG_OK;
    double kl[2] = { 1e-9, 1e-9 };
    draft d = { .c = lg_base_calloc(c->n, c->n * (int64_t)sizeof(double)), .w = lg_base_calloc(c->n, (int64_t)sizeof(double)) };
    const int64_t bytes = LG_COVER_LEVELS * (int64_t)sizeof(double);
    for (int k = 0; k < 2; k++) d.loss[k] = lg_base_calloc(c->n, bytes);
    d.sum = lg_base_calloc(c->n, bytes);
    if (!d.c || !d.w || !d.loss[0] || !d.loss[1] || !d.sum) LG_TRY(nomem(c));
    for (int k = 0; k < 2; k++)
        for (int64_t i = 0; i < c->n; i++) kl[k] += c->kl[k][c->n + i];
    for (int round = 0; round < 4; round++) LG_TRY(draft_round(c, &d, mark, kl));
    if (coverage) found_at_shares(c, d.r, coverage);
    if (loss) *loss = loss_of(kl);
    if (r) {
        *r = d.r;
        d.r = NULL;
    }
done:
    draft_free(&d);
    return st;
}

/* The map of marked retrieval heads. coverage: [n] or NULL. */
static lg_roles *map_of(const calib *c, const uint8_t *mark, double *coverage) {
    lg_roles *r = NULL;
    if (!c->p->spread) return lg_cover_roles(c->info.n_layer, c->info.n_head_kv, c->c, c->w, mark, c->p->same_index, coverage);
    return draw_up(c, mark, &r, NULL, coverage) == LG_OK ? r : NULL;
}

/* What the marked heads are worth before anything is decoded. */
static lg_status worth(const calib *c, const uint8_t *mark, double *out) {
    lg_status st = LG_OK;
    if (!c->p->spread) *out = lg_cover_objective(c->info.n_layer, c->info.n_head_kv, c->c, c->w, c->sens, mark, c->p->same_index);
    else if ((st = draw_up(c, mark, NULL, out, NULL)) == LG_OK) *out = -*out;
    return st;
}

/* ---- choice ----------------------------------------------------------------------------------------- */
static lg_roles *roles_of(const calib *c, int64_t count, double *coverage) {
    if (c->settled[count]) {
        if (coverage) found_at_shares(c, c->settled[count], coverage);
        return lg_roles_clone(c->settled[count]);
    }
    uint8_t *mark = lg_base_alloc(c->n);
    if (!mark) return NULL;
    if (c->has[count]) memcpy(mark, c->refined + count * c->n, (size_t)c->n);
    else
        for (int64_t i = 0; i < count; i++) mark[c->order[i]] = 1;
    lg_roles *r = map_of(c, mark, coverage);
    lg_base_free(mark);
    return r;
}

typedef struct pick { int64_t head; double gain; } pick;

/* The `most` heads that are worth most beside the marked ones; same-index takes layer 0 first. *n_out: how many there are. */
static lg_status candidates(const calib *c, uint8_t *mark, int64_t count, int64_t most, pick *out, int64_t *n_out) {
    lg_status st = LG_OK;
    int64_t n = 0, end = c->p->same_index && count < c->info.n_head_kv ? c->info.n_head_kv : c->n;
    for (int64_t r = 0; st == LG_OK && r < end; r++) {
        if (mark[r]) continue;
        pick x = { r, 0 };
        mark[r] = 1;
        st = worth(c, mark, &x.gain);
        mark[r] = 0;
        int64_t at = n < most ? n++ : most;
        for (; at > 0 && out[at - 1].gain < x.gain; at--)
            if (at < most) out[at] = out[at - 1];
        if (at < most) out[at] = x;
    }
    *n_out = n;
    return st;
}

/* Adds one head at a time: the cover proposes, up to `most` heads real decoding disposes. */
static lg_status choose(calib *c, int64_t most) {
    lg_status st = LG_OK;
    lg_roles *r = NULL;
    uint8_t *mark = lg_base_alloc(c->n);
    int64_t width = c->p->search > 1 ? c->p->search : 1;
    if (width > c->n) width = c->n;
    pick *cand = lg_base_calloc(width, (int64_t)sizeof *cand);
    if (!mark || !cand) LG_TRY(nomem(c));
    c->objective[0] = 0;
    for (int64_t count = 0; count < c->n; count++) {
        int64_t n, best = 0;
        double least = 0;
        LG_TRY(candidates(c, mark, count, count < most ? width : 1, cand, &n));
        for (int64_t j = 0; n > 1 && j < n; j++) {
            lg_score score[2];
            LG_TRY(tell(c, "search", count * width + j, most * width));
            c->order[count] = cand[j].head;
            r = roles_of(c, count + 1, NULL);
            if (!r) LG_TRY(nomem(c));
            LG_TRY(run_probes(c, r, true, score));
            lg_roles_free(r);
            r = NULL;
            const double loss = loss_of((double[2]){ score[0].kl, score[1].kl });
            if (j == 0 || loss < least) {
                least = loss;
                best = j;
            }
        }
        c->order[count] = cand[best].head;
        c->objective[count + 1] = cand[best].gain;
        mark[cand[best].head] = 1;
    }
    if (width > 1) LG_TRY(tell(c, "search", most * width, most * width));
done:
    lg_roles_free(r);
    lg_base_free(mark);
    lg_base_free(cand);
    return st;
}

static lg_status loss_of_marks(calib *c, const uint8_t *mark, double *loss) {
    lg_score score[2];
    lg_roles *r = map_of(c, mark, NULL);
    if (!r) return nomem(c);
    lg_status st = run_probes(c, r, true, score);
    lg_roles_free(r);
    *loss = st == LG_OK ? loss_of((double[2]){ score[0].kl, score[1].kl }) : 0;
    return st;
}

/* Swaps one head at a time in the map of a count while the loss falls. */
static lg_status refine(calib *c, int64_t count) {
    lg_status st = LG_OK;
    int64_t width = c->p->search > 1 ? c->p->search : 1, first = c->p->same_index ? c->info.n_head_kv : 0; /* layer 0 stays */
    if (width > c->n) width = c->n;
    uint8_t *mark = c->refined + count * c->n;
    pick *cand = lg_base_calloc(width, (int64_t)sizeof *cand);
    double now, loss;
    if (!cand) LG_TRY(nomem(c));
    for (int64_t i = 0; i < count; i++) mark[c->order[i]] = 1;
    LG_TRY(loss_of_marks(c, mark, &now));
    for (int64_t round = 0; round < c->p->refine; round++) {
        int64_t out = -1, in = -1;
        double least = 0;
        for (int64_t i = first; i < c->n; i++) {
            if (!mark[i]) continue;
            mark[i] = 0;
            LG_TRY(tell(c, "refine", round, c->p->refine));
            LG_TRY(loss_of_marks(c, mark, &loss));
            mark[i] = 1;
            if (out < 0 || loss < least) out = i, least = loss;
        }
        if (out < 0) break;
        mark[out] = 0;
        int64_t n;
        LG_TRY(candidates(c, mark, count - 1, width, cand, &n));
        least = now;
        for (int64_t j = 0; j < n; j++) {
            if (cand[j].head == out) continue;
            mark[cand[j].head] = 1;
            LG_TRY(loss_of_marks(c, mark, &loss));
            mark[cand[j].head] = 0;
            if (loss < least) in = cand[j].head, least = loss;
        }
        mark[in >= 0 ? in : out] = 1;
        if (in < 0) break;
        now = least;
    }
    c->has[count] = 1;
    LG_TRY(tell(c, "refine", c->p->refine, c->p->refine));
done:
    lg_base_free(cand);
    return st;
}

/* The last shares of a map: from the loss of every head alone in the role it got, in place of the one foreseen. */
static lg_status settle(calib *c, int64_t count) {
    lg_status st = LG_OK;
    if (c->settled[count]) return LG_OK;
    lg_roles *r = roles_of(c, count, NULL), *alone = lg_roles_new(c->info.n_layer, c->info.n_head_kv);
    double *loss[2] = { NULL, NULL }, *sum = lg_base_calloc(c->n, LG_COVER_LEVELS * (int64_t)sizeof *sum);
    for (int k = 0; k < 2; k++) loss[k] = lg_base_calloc(c->n, LG_COVER_LEVELS * (int64_t)sizeof *sum);
    if (!r || !alone || !sum || !loss[0] || !loss[1]) LG_TRY(nomem(c));
    for (int64_t i = 0; i < c->n; i++) alone->role[i].kind = LG_ROLE_RETRIEVAL;
    alone->n_retrieval = c->n - 1;
    for (int64_t i = 0; i < c->n; i++) {
        lg_score score[2];
        LG_TRY(tell(c, "shares", i, c->n));
        if (r->role[i].kind == LG_ROLE_RETRIEVAL) continue;
        alone->role[i] = r->role[i];
        LG_TRY(run_probes(c, alone, true, score));
        alone->role[i] = (lg_role){ LG_ROLE_RETRIEVAL, -1, -1 };
        for (int k = 0; k < 2; k++) {
            const double kl0 = c->kl[k][i], m0 = 1 - c->cover[k].all_w[i], m1 = 1 - found(c, r, k, i, LG_COVER_ONE);
            for (int level = 0; level < LG_COVER_LEVELS; level++)
                loss[k][i * LG_COVER_LEVELS + level] = power_law(kl0, m0, score[k].kl, m1, 1 - found(c, r, k, i, level));
        }
    }
    for (int round = 0; round < 4; round++) { /* the shares of the draft first */
        double kl[2];
        total_loss(c, r, loss, kl);
        for (int64_t i = 0; i < c->n * LG_COVER_LEVELS; i++) sum[i] = kind_weight[0] / kl[0] * loss[0][i] + kind_weight[1] / kl[1] * loss[1][i];
        LG_TRY(lg_cover_spread(r, sum, c->err));
    }
    c->settled[count] = r;
    r = NULL;
    LG_TRY(tell(c, "shares", c->n, c->n));
done:
    for (int k = 0; k < 2; k++) lg_base_free(loss[k]);
    lg_base_free(sum);
    lg_roles_free(alone);
    lg_roles_free(r);
    return st;
}

static lg_status settle_all(calib *c) {
    lg_status st = LG_OK;
    if (!c->p->spread) return LG_OK;
    if (c->p->n_retrieval) LG_TRY(settle(c, c->p->n_retrieval));
    for (int64_t i = 0; i < c->p->n_also; i++)
        LG_TRY(settle(c, c->p->also[i]));
done:
    return st;
}

static lg_status refine_all(calib *c) {
    lg_status st = LG_OK;
    if (!c->p->refine) return LG_OK;
    if (c->p->n_retrieval) LG_TRY(refine(c, c->p->n_retrieval));
    for (int64_t i = 0; i < c->p->n_also; i++)
        if (!c->has[c->p->also[i]]) LG_TRY(refine(c, c->p->also[i]));
done:
    return st;
}

static lg_status measure_count(calib *c, int64_t count) {
    lg_score score[2];
    lg_roles *r = roles_of(c, count, NULL);
    if (!r) return nomem(c);
    lg_status st = run_probes(c, r, true, score);
    lg_roles_free(r);
    if (st == LG_OK) c->curve[count] = (struct point){ true, score[0], score[1] };
    return st;
}

static lg_status measure_curve(calib *c, int64_t most) {
    lg_status st = LG_OK;
    for (int64_t i = 0; i <= most; i++) {
        LG_TRY(tell(c, "curve", i, most + 1));
        LG_TRY(measure_count(c, i));
    }
    LG_TRY(tell(c, "curve", most + 1, most + 1));
done:
    return st;
}

static lg_status write_curve(const calib *c) {
    lg_status st;
    lg_writer w = { 0 };
    lg_text t = { 0 };
    bool ok = lg_base_text_printf(&t, "n_retrieval,objective,kl_plain,kl_passkey,top1_plain,accuracy_passkey\n");
    for (int64_t i = 0; ok && i <= c->n; i++)
        if (c->curve[i].known)
            ok = lg_base_text_printf(&t, "%lld,%.6g,%.6g,%.6g,%.6g,%.6g\n", (long long)i, c->objective[i], c->curve[i].plain.kl,
                                     c->curve[i].passkey.kl, c->curve[i].plain.top1, c->curve[i].passkey.accuracy);
    if (!ok) LG_TRY(nomem(c));
    LG_TRY(lg_file_create(&w, c->p->curve_csv, c->err));
    LG_TRY(lg_file_write(&w, t.data, t.n, c->err));
    LG_TRY(lg_file_commit(&w, c->err));
done:
    lg_file_abandon(&w);
    lg_text_free(&t);
    return st;
}

/* ---- the file --------------------------------------------------------------------------------------- */
static lg_status describe(const calib *c, int64_t count, lg_text *t) {
    const lg_calibrate_params *p = c->p;
    const struct point *at = &c->curve[count];
    char hash[33], date[32];
    lg_hash *h = lg_base_hash_new();
    if (!h) return nomem(c);
    lg_base_hash_feed(h, p->text, p->text_bytes);
    lg_base_hash_hex128(h, hash);
    lg_base_hash_free(h);
    time_t now = time(NULL);
    struct tm utc;
    if (!gmtime_r(&now, &utc) || !strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", &utc)) date[0] = 0;
    const char *name = p->text_name ? p->text_name : "";
    bool ok = lg_base_text_printf(t, "{\"by\": \"longan heads calibrate\", \"date\": \"%s\", \"model\": ", date) &&
              lg_json_put_str(t, c->info.name, (int64_t)strlen(c->info.name)) && lg_base_text_printf(t, ", \"text\": ") &&
              lg_json_put_str(t, name, (int64_t)strlen(name)) &&
              lg_base_text_printf(t, ", \"text_bytes\": %lld, \"text_xxh3_128\": \"%s\",\n  \"n_ctx\": %lld, \"n_positions\": %lld, \"n_passages\": %lld, "
                                  "\"seed\": %llu, \"search\": %lld, \"refine\": %lld, \"spread\": %s, \"passkey\": {\"samples\": %d, \"n_ctx\": %lld, \"keys\": %d, "
                                  "\"words\": %d, \"asked\": %d, \"budget\": %lld}",
                                  (long long)p->text_bytes, hash, (long long)p->n_ctx, (long long)p->n_positions, (long long)p->n_passages,
                                  (unsigned long long)p->seed, (long long)p->search, (long long)p->refine, p->spread ? "true" : "false", N_PASSKEY,
                                  (long long)c->passkey.seq[0].n_ctx, N_KEYS, N_WORDS, N_ASK, (long long)c->passkey.budget);
    if (ok && at->known)
        ok = lg_base_text_printf(t, ",\n  \"held_out\": {\"kl_plain\": %.6g, \"top1_plain\": %.6g, \"kl_passkey\": %.6g, "
                                 "\"accuracy_passkey\": %.6g}", at->plain.kl, at->plain.top1, at->passkey.kl, at->passkey.accuracy);
    ok = ok && lg_base_text_printf(t, "}");
    return ok ? LG_OK : nomem(c);
}

static lg_status write_count(const calib *c, int64_t count, const char *path) {
    lg_status st = LG_OK;
    lg_text made = { 0 };
    double *coverage = lg_base_calloc(c->n, (int64_t)sizeof *coverage);
    lg_roles *r = coverage ? roles_of(c, count, coverage) : NULL;
    if (!r) {
        st = nomem(c);
        goto done;
    }
    memcpy(r->family, c->info.family, sizeof r->family);
    r->budget = c->p->budget;
    r->sinks = c->p->sinks;
    r->recents = c->p->recents;
    keep_of(c, r);
    LG_TRY(describe(c, count, &made));
    lg_roles_notes notes = { made.data, coverage, c->sens };
    LG_TRY(lg_roles_write(path, r, &notes, c->err));
done:
    lg_text_free(&made);
    lg_roles_free(r);
    lg_base_free(coverage);
    return st;
}

static lg_status write_also(const calib *c, const char *path) {
    lg_status st = LG_OK;
    size_t stem = strlen(path);
    if (stem > 5 && !strcmp(path + stem - 5, ".json")) stem -= 5;
    for (int64_t i = 0; st == LG_OK && i < c->p->n_also; i++) {
        lg_text name = { 0 };
        if (lg_base_text_printf(&name, "%.*s-n%lld.json", (int)stem, path, (long long)c->p->also[i]))
            st = write_count(c, c->p->also[i], name.data);
        else
            st = nomem(c);
        lg_text_free(&name);
    }
    return st;
}

static lg_status check(const calib *c) {
    const lg_calibrate_params *p = c->p;
    if (!p->text || p->text_bytes < 1) return lg_base_fail(c->err, LG_ERR_USAGE, -1, "calibration needs a text");
    int64_t least = p->same_index ? c->info.n_head_kv : 0; /* with same-index layer 0 is all retrieval */
    if (p->n_retrieval && p->n_retrieval < least)
        return lg_base_fail(c->err, LG_ERR_USAGE, -1, "%lld retrieval heads: same-index needs the %lld of layer 0", (long long)p->n_retrieval, (long long)least);
    if (p->n_retrieval < 0 || p->n_retrieval > c->n)
        return lg_base_fail(c->err, LG_ERR_USAGE, -1, "%lld retrieval heads: the model has %lld KV heads", (long long)p->n_retrieval, (long long)c->n);
    for (int64_t i = 0; i < p->n_also; i++)
        if (p->also[i] < 0 || p->also[i] > c->n)
            return lg_base_fail(c->err, LG_ERR_USAGE, -1, "%lld retrieval heads: the model has %lld KV heads", (long long)p->also[i], (long long)c->n);
    if (p->n_retrieval == 0 && !(p->kl_bound > 0)) return lg_base_fail(c->err, LG_ERR_USAGE, -1, "the KL bound must be above 0");
    if (p->n_positions < 1 || p->n_positions > 65536) return lg_base_fail(c->err, LG_ERR_USAGE, -1, "%lld positions (1 to 65536)", (long long)p->n_positions);
    if (p->n_passages < 1 || p->n_passages > MAX_SEQ) return lg_base_fail(c->err, LG_ERR_USAGE, -1, "%lld passages (1 to %d)", (long long)p->n_passages, MAX_SEQ);
    if (p->sinks < 0 || p->recents < 1 || p->budget < p->sinks + p->recents)
        return lg_base_fail(c->err, LG_ERR_USAGE, -1, "the budget of %lld tokens must hold sinks and recents", (long long)p->budget);
    if (p->n_ctx <= p->budget)
        return lg_base_fail(c->err, LG_ERR_USAGE, -1, "a context of %lld tokens needs no budget of %lld: every head would be dense",
                            (long long)p->n_ctx, (long long)p->budget);
    if (p->n_ctx > c->info.n_ctx_train && !c->info.rope_scaled)
        return lg_base_fail(c->err, LG_ERR_LIMIT, -1, "a context of %lld tokens: the model was trained for %lld", (long long)p->n_ctx, (long long)c->info.n_ctx_train);
    if (!(p->keep >= 0 && p->keep <= 1) || p->observe < 0 || p->observe > LG_OBSERVE_ROWS || p->refresh < 0)
        return lg_base_fail(c->err, LG_ERR_USAGE, -1, "keep %g (0 to 1), observe %lld (up to %d), refresh %lld", p->keep, (long long)p->observe, LG_OBSERVE_ROWS, (long long)p->refresh);
    if (p->refine < 0 || p->refine > 64) return lg_base_fail(c->err, LG_ERR_USAGE, -1, "%lld rounds of refinement (0 to 64)", (long long)p->refine);
    if (p->search < 0 || p->search > 64) return lg_base_fail(c->err, LG_ERR_USAGE, -1, "search over %lld candidates (0 to 64)", (long long)p->search);
    return LG_OK;
}

/* The largest count that was asked for. */
static int64_t asked_most(const calib *c) {
    int64_t most = c->p->n_retrieval;
    for (int64_t i = 0; i < c->p->n_also; i++) most = c->p->also[i] > most ? c->p->also[i] : most;
    return most;
}

/* How far the curve goes: a third of the heads, and whatever count was asked for. */
static int64_t curve_end(const calib *c) {
    int64_t most = (c->n + 2) / 3, asked = asked_most(c);
    return asked > most ? asked : most;
}

static lg_status calibrate(calib *c, const char *out_path) {
    lg_status st;
    int64_t most, count = c->p->n_retrieval;
    LG_TRY(check(c));
    most = curve_end(c);
    c->sens = lg_base_calloc(c->n, (int64_t)sizeof *c->sens);
    c->objective = lg_base_calloc(c->n + 1, (int64_t)sizeof *c->objective);
    c->order = lg_base_calloc(c->n, (int64_t)sizeof *c->order);
    c->curve = lg_base_calloc(c->n + 1, (int64_t)sizeof *c->curve);
    c->refined = lg_base_calloc(c->n + 1, c->n);
    c->has = lg_base_alloc(c->n + 1);
    c->settled = lg_base_calloc(c->n + 1, (int64_t)sizeof *c->settled);
    if (!c->settled || !c->refined || !c->has || !c->sens || !c->objective || !c->order || !c->curve) LG_TRY(nomem(c));
    LG_TRY(make_material(c));
    LG_TRY(cover_all(c));
    LG_TRY(open_probes(c, &c->plain, &c->passkey));
    LG_TRY(measure_sensitivity(c));
    if (c->p->spread) LG_TRY(foresee(c));
    LG_TRY(choose(c, count ? asked_most(c) : most)); /* what lies beyond the asked counts is the cover's: most of the time is search */
    LG_TRY(refine_all(c));
    LG_TRY(settle_all(c));
    LG_TRY(open_probes(c, &c->plain_held, &c->passkey_held));
    LG_TRY(measure_curve(c, most));
    if (count == 0) {
        count = c->p->same_index ? c->info.n_head_kv : 0;
        while (count < c->n && !(c->curve[count].known && c->curve[count].plain.kl <= c->p->kl_bound)) {
            count++;
            if (!c->curve[count].known) LG_TRY(measure_count(c, count));
        }
        if (c->p->spread) { /* the count was not known when the others got their last shares */
            LG_TRY(open_probes(c, &c->plain, &c->passkey));
            LG_TRY(settle(c, count));
            LG_TRY(open_probes(c, &c->plain_held, &c->passkey_held));
            LG_TRY(measure_count(c, count));
        }
    }
    LG_TRY(write_count(c, count, out_path));
    LG_TRY(write_also(c, out_path));
    if (c->p->curve_csv) LG_TRY(write_curve(c));
done:
    return st;
}

lg_status lg_heads_calibrate(lg_model *m, const lg_calibrate_params *p, const char *out_path, lg_error *err) {
    calib c = { .m = m, .p = p, .err = err };
    lg_model_get_info(m, &c.info);
    c.n = c.info.n_layer * c.info.n_head_kv;
    c.n_group = c.info.n_head / c.info.n_head_kv;
    lg_status st = calibrate(&c, out_path);
    for (int k = 0; k < 2; k++) lg_heads_probe_free(c.probe[k]);
    material_free(&c.plain);
    material_free(&c.passkey);
    material_free(&c.plain_held);
    material_free(&c.passkey_held);
    for (int k = 0; k < 2; k++) {
        lg_cover_free(&c.cover[k]);
        lg_base_free(c.kl[k]);
        lg_base_free(c.foreseen_c[k]);
    }
    lg_base_free(c.c);
    lg_base_free(c.w);
    lg_ids_free(&c.ids);
    lg_base_free(c.sens);
    lg_base_free(c.objective);
    lg_base_free(c.order);
    lg_base_free(c.curve);
    lg_base_free(c.refined);
    lg_base_free(c.has);
    for (int64_t i = 0; c.settled && i <= c.n; i++) lg_roles_free(c.settled[i]);
    lg_base_free(c.settled);
    return st;
}
