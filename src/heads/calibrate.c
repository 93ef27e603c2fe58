/* calibrate: donor maps without training (docs/SPARSE.md).
 *
 *   material     passages of the given text and multi-passkey samples in it; the last quarter of the text is
 *                held out: from it come the passages and samples that the curve is measured on
 *   coverage     dense prefill of the calibration material; cover.c does the sums
 *   sensitivity  each head alone on its window, the rest dense: KL on both kinds, each normalised to sum 1
 *   choice       greedy cover; with search > 1 every new head, up to the largest count asked for, is the best of the cover's
 *                first candidates by the KL of real hybrid decoding on the calibration material
 *   refine       for the counts that are written: the retrieval head whose loss hurts least makes room for the best of the
 *                cover's candidates, as long as real decoding gets better (--refine; such maps are not nested any more)
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
    lg_cover cv;
    double *sens, *objective;  /* [n], [n + 1] */
    int64_t *order;            /* [n] heads in the order of their choice */
    uint8_t *refined;          /* [n + 1, n] marks of a count that was refined */
    uint8_t *has;              /* [n + 1] such counts */
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

static lg_status cover_sequence(calib *c, lg_session *s, const lg_probe_seq *q, int64_t budget, double weight, int64_t most,
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
    LG_TRY(lg_cover_begin(&c->cv, pos, ca.n_pos, budget, c->err));
    for (int64_t l = 0; l < in->n_layer; l++) {
        for (int64_t h = 0; h < in->n_head_kv; h++) {
            float *to = k + h * q->n * in->head_dim;
            head[h] = to;
            LG_TRY(lg_session_read_k(s, 0, l, h, q->n, to, c->err));
        }
        LG_TRY(lg_cover_layer(&c->cv, l, ca.q + l * ca.n_pos * ca.row, head, c->err));
    }
    lg_cover_end(&c->cv, weight);
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
    LG_TRY(lg_cover_new(&c->cv, c->info.n_layer, c->info.n_head_kv, c->n_group, c->info.head_dim, c->p->sinks, c->p->recents, c->err));
    LG_TRY(lg_session_new(&s, c->m, &sp, c->err));
    for (int k = 0; k < 2; k++)
        for (int64_t i = 0; i < mt[k]->n_seq; i++) {
            int64_t most = (c->p->n_positions + mt[k]->n_seq - 1) / mt[k]->n_seq;
            LG_TRY(tell(c, "coverage", done, total));
            LG_TRY(cover_sequence(c, s, &mt[k]->seq[i], mt[k]->budget, 1.0 / (double)mt[k]->n_seq, most, (uint64_t)(16 + done)));
            done++;
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

static lg_status run_probes(calib *c, lg_roles *roles, lg_score score[2]) {
    const material *mt[2] = { &c->plain, &c->passkey };
    memcpy(roles->family, c->info.family, sizeof roles->family);
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
    double sum[2] = { 0 };
    double *kl = lg_base_calloc(2 * c->n, (int64_t)sizeof *kl);
    lg_roles *r = lg_roles_new(c->info.n_layer, c->info.n_head_kv);
    if (!kl || !r) LG_TRY(nomem(c));
    for (int64_t i = 0; i < c->n; i++) r->role[i].kind = LG_ROLE_RETRIEVAL;
    r->n_retrieval = c->n - 1;
    for (int64_t i = 0; i < c->n; i++) {
        lg_score score[2];
        LG_TRY(tell(c, "sensitivity", i, c->n));
        r->role[i].kind = LG_ROLE_WINDOW;
        LG_TRY(run_probes(c, r, score));
        r->role[i].kind = LG_ROLE_RETRIEVAL;
        for (int k = 0; k < 2; k++) {
            kl[k * c->n + i] = score[k].kl > 0 ? score[k].kl : 0;
            sum[k] += kl[k * c->n + i];
        }
    }
    for (int64_t i = 0; i < c->n; i++)
        for (int k = 0; k < 2; k++) c->sens[i] += sum[k] > 0 ? kl[k * c->n + i] / sum[k] : 0;
    LG_TRY(tell(c, "sensitivity", c->n, c->n));
done:
    lg_base_free(kl);
    lg_roles_free(r);
    return st;
}

/* ---- choice ----------------------------------------------------------------------------------------- */
static lg_roles *roles_of(const calib *c, int64_t count, double *coverage) {
    uint8_t *mark = lg_base_alloc(c->n);
    if (!mark) return NULL;
    if (c->has[count]) memcpy(mark, c->refined + count * c->n, (size_t)c->n);
    else
        for (int64_t i = 0; i < count; i++) mark[c->order[i]] = 1;
    lg_roles *r = lg_cover_roles(c->info.n_layer, c->info.n_head_kv, c->cv.c, c->cv.w, mark, c->p->same_index, coverage);
    lg_base_free(mark);
    return r;
}

/* Both kinds weigh alike whatever their size: the mean of the logarithms. */
static double loss_of(const lg_score s[2]) {
    return 0.5 * (log(s[0].kl > 1e-9 ? s[0].kl : 1e-9) + log(s[1].kl > 1e-9 ? s[1].kl : 1e-9));
}

typedef struct pick { int64_t head; double gain; } pick;

/* The `most` heads with the largest gain of the cover; same-index takes layer 0 first. */
static int64_t candidates(const calib *c, uint8_t *mark, int64_t count, int64_t most, pick *out) {
    int64_t n = 0, end = c->p->same_index && count < c->info.n_head_kv ? c->info.n_head_kv : c->n;
    for (int64_t r = 0; r < end; r++) {
        if (mark[r]) continue;
        mark[r] = 1;
        pick x = { r, lg_cover_objective(c->info.n_layer, c->info.n_head_kv, c->cv.c, c->cv.w, c->sens, mark, c->p->same_index) };
        mark[r] = 0;
        int64_t at = n < most ? n++ : most;
        for (; at > 0 && out[at - 1].gain < x.gain; at--)
            if (at < most) out[at] = out[at - 1];
        if (at < most) out[at] = x;
    }
    return n;
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
        int64_t n = candidates(c, mark, count, count < most ? width : 1, cand), best = 0;
        double least = 0;
        for (int64_t j = 0; n > 1 && j < n; j++) {
            lg_score score[2];
            LG_TRY(tell(c, "search", count * width + j, most * width));
            c->order[count] = cand[j].head;
            r = roles_of(c, count + 1, NULL);
            if (!r) LG_TRY(nomem(c));
            LG_TRY(run_probes(c, r, score));
            lg_roles_free(r);
            r = NULL;
            if (j == 0 || loss_of(score) < least) {
                least = loss_of(score);
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
    lg_roles *r = lg_cover_roles(c->info.n_layer, c->info.n_head_kv, c->cv.c, c->cv.w, mark, c->p->same_index, NULL);
    if (!r) return nomem(c);
    lg_status st = run_probes(c, r, score);
    lg_roles_free(r);
    *loss = st == LG_OK ? loss_of(score) : 0;
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
        int64_t n = candidates(c, mark, count - 1, width, cand);
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
    lg_status st = run_probes(c, r, score);
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
                                  "\"seed\": %llu, \"search\": %lld, \"refine\": %lld, \"passkey\": {\"samples\": %d, \"n_ctx\": %lld, \"keys\": %d, "
                                  "\"words\": %d, \"asked\": %d, \"budget\": %lld}",
                                  (long long)p->text_bytes, hash, (long long)p->n_ctx, (long long)p->n_positions, (long long)p->n_passages,
                                  (unsigned long long)p->seed, (long long)p->search, (long long)p->refine, N_PASSKEY,
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
    if (!c->refined || !c->has || !c->sens || !c->objective || !c->order || !c->curve) LG_TRY(nomem(c));
    LG_TRY(make_material(c));
    LG_TRY(cover_all(c));
    LG_TRY(open_probes(c, &c->plain, &c->passkey));
    LG_TRY(measure_sensitivity(c));
    LG_TRY(choose(c, count ? asked_most(c) : most)); /* what lies beyond the asked counts is the cover's: most of the time is search */
    LG_TRY(refine_all(c));
    LG_TRY(open_probes(c, &c->plain_held, &c->passkey_held));
    LG_TRY(measure_curve(c, most));
    if (count == 0) {
        count = c->p->same_index ? c->info.n_head_kv : 0;
        while (count < c->n && !(c->curve[count].known && c->curve[count].plain.kl <= c->p->kl_bound)) {
            count++;
            if (!c->curve[count].known) LG_TRY(measure_count(c, count));
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
    lg_cover_free(&c.cv);
    lg_ids_free(&c.ids);
    lg_base_free(c.sens);
    lg_base_free(c.objective);
    lg_base_free(c.order);
    lg_base_free(c.curve);
    lg_base_free(c.refined);
    lg_base_free(c.has);
    return st;
}
