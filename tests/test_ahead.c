/* Steps that are begun before the one before them is read back. Back ends that can do so have devices of their own, so here is one that any machine has: the
 * plain C ops, which compute at once but hand results out only when they are waited for, and whose memory a session must not look into. What a
 * session does on it must be what it does on the plain C ops, to the bit. */
#include "fixture.h"
#include "session/session.h"

#define FOLDER FIXTURES "tiny-hybrid"

/* ---- the back end ---- */
enum { MAX_PARCEL = 64 };
typedef struct parcel { void *to, *what; size_t n; int64_t ticket; } parcel; /* ticket 0: of the list that is recorded */
static struct {
    int32_t drawn[LG_DRAWN_ROWS];
    parcel parcel[MAX_PARCEL];
    int n_parcel;
    int64_t ticket, handed, begun; /* last list; lists handed out; lists that took ids drawn by another */
    int64_t fails_at;              /* the ticket whose wait fails, 0: none */
    bool takes;                    /* so does the list that is recorded */
} far;

static void send_from(void *to, const void *what, size_t n) {
    parcel *p = &far.parcel[far.n_parcel++];
    assert_true(far.n_parcel < MAX_PARCEL);
    *p = (parcel){ to, malloc(n), n, 0 };
    assert_non_null(p->what);
    memcpy(p->what, what, n);
}
static void hand_out(int64_t ticket, bool lost) {
    int left = 0;
    for (int i = 0; i < far.n_parcel; i++) {
        parcel *p = &far.parcel[i];
        if (p->ticket == 0 || p->ticket > ticket) {
            far.parcel[left++] = *p;
            continue;
        }
        if (!lost) memcpy(p->to, p->what, p->n);
        free(p->what);
    }
    far.n_parcel = left;
    if (ticket > far.handed) far.handed = ticket;
}
static void far_embed(lg_ops_ctx *c, const lg_op_embed *a) {
    lg_op_embed b = *a;
    int32_t *ids = malloc((size_t)a->n_tok * sizeof *ids);
    assert_non_null(ids);
    for (int64_t t = 0; t < a->n_tok; t++) {
        const int32_t id = a->ids[t];
        assert_true(id >= -LG_DRAWN_ROWS);
        assert_true(id >= 0 || far.handed < far.ticket); /* the list before is under way */
        far.takes = far.takes || id < 0;
        ids[t] = id < 0 ? far.drawn[-1 - id] : id;
    }
    b.ids = ids;
    lg_ops_ref.embed(c, &b);
    free(ids);
}
static void far_argmax(lg_ops_ctx *c, const lg_op_argmax *a) {
    lg_op_argmax b = *a;
    b.id = far.drawn;
    assert_true(a->n_row <= LG_DRAWN_ROWS);
    lg_ops_ref.argmax(c, &b);
    send_from(a->id, far.drawn, (size_t)a->n_row * 4);
}
static void far_sample(lg_ops_ctx *c, const lg_op_sample *a) {
    lg_op_sample b = *a;
    int32_t recent[LG_DRAWN_ROWS * LG_RECENT];
    assert_true(a->n_row <= LG_DRAWN_ROWS);
    for (int64_t r = 0; r < a->n_row; r++)
        for (int i = 0; i < a->draw[r].n_recent; i++) {
            const int32_t id = a->recent[r * LG_RECENT + i];
            assert_true(id >= 0 || far.handed < far.ticket);
            recent[r * LG_RECENT + i] = id < 0 ? far.drawn[-1 - id] : id;
        }
    b.recent = recent;
    b.id = far.drawn;
    lg_ops_ref.sample(c, &b);
    send_from(a->id, far.drawn, (size_t)a->n_row * 4);
}
static void far_fetch(lg_ops_ctx *c, void *to, const void *from, int64_t n) {
    (void)c;
    send_from(to, from, (size_t)n);
}
static lg_status far_wait(lg_ops_ctx *c, int64_t ticket, lg_error *err) {
    (void)c;
    const bool fails = far.fails_at > far.handed && far.fails_at <= ticket;
    if (fails) far.fails_at = 0;
    hand_out(fails ? far.ticket : ticket, fails);
    return fails ? lg_base_fail(err, LG_ERR_DEVICE, -1, "as ordered") : LG_OK;
}
static lg_status far_submit(lg_ops_ctx *c, int64_t *ticket, lg_error *err) {
    const lg_status st = lg_ops_ref.sync(c, err);
    if (st != LG_OK) return st;
    *ticket = ++far.ticket;
    for (int i = 0; i < far.n_parcel; i++)
        if (far.parcel[i].ticket == 0) far.parcel[i].ticket = *ticket;
    far.begun += far.takes;
    far.takes = false;
    return *ticket - far.handed > 2 ? far_wait(c, *ticket - 2, err) : LG_OK;
}
static lg_status far_sync(lg_ops_ctx *c, lg_error *err) {
    int64_t ticket = 0;
    const lg_status st = far_submit(c, &ticket, err);
    return st == LG_OK ? far_wait(c, ticket, err) : st;
}
static lg_ops far_ops;

static lg_model *far_model(const char *name) {
    lg_model *m = fx_model(name, "ref");
    far_ops = lg_ops_ref;
    far_ops.host_memory = false;
    far_ops.embed = far_embed;
    far_ops.argmax = far_argmax;
    far_ops.sample = far_sample;
    far_ops.fetch = far_fetch;
    far_ops.sync = far_sync;
    far_ops.submit = far_submit;
    far_ops.wait = far_wait;
    m->ops = &far_ops;
    return m;
}

static void free_models(lg_model *m, lg_model *f) { /* f: of far_model */
    lg_model_free(m);
    f->ops = &lg_ops_ref;
    lg_model_free(f);
}

/* ---- what is compared ---- */
enum { N_KIND = 5, N_PROMPT = 5 };
static const char *const kind_name[N_KIND] = { "dense", "hybrid", "blocks", "kept tokens", "corrections" };
static lg_session *session(lg_model *m, int kind, int64_t n_seq, int64_t n_ctx) {
    lg_session_params p;
    lg_roles *roles = NULL;
    lg_session_defaults(&p);
    p.n_ctx = n_ctx;
    p.n_seq_max = n_seq;
    p.kv = LG_DTYPE_F32;
    if (kind) OK(lg_roles_load(&roles, kind == 3 ? FOLDER "/roles/share-cross.json" : FOLDER "/roles/random-3.json", err));
    p.roles = roles;
    p.roles_any_model = true;
    p.hybrid.budget = 24;
    p.hybrid.sinks = 2;
    p.hybrid.recents = 4;
    p.hybrid.block = kind == 2 ? 16 : 1;
    if (kind == 2) p.hybrid.budget = 64;
    p.hybrid.keep = kind == 3 ? 0.5 : 0;
    if (kind == 3) p.hybrid.observe = 8, p.hybrid.refresh = 5;
    if (kind == 4) p.hybrid.correct_every = 4;
    lg_session *s = fx_session(m, p);
    lg_roles_free(roles);
    return s;
}
static void same_logits(lg_session *a, lg_session *b, int64_t seq, const char *what) {
    const float *x = lg_session_logits(a, seq), *y = lg_session_logits(b, seq);
    assert_int_equal(lg_session_len(a, seq), lg_session_len(b, seq));
    assert_memory_equal(lg_session_ids(a, seq), lg_session_ids(b, seq), (size_t)lg_session_len(a, seq) * 4);
    if (!x != !y) fail_msg("%s: logits of one session only", what);
    if (x && memcmp(x, y, (size_t)a->m->cfg.n_vocab * sizeof *x)) fail_msg("%s: other logits in sequence %lld", what, (long long)seq);
}
static void same_counts(const lg_session *a, const lg_session *b) {
    lg_stats x, y;
    lg_session_stats(a, &x);
    lg_session_stats(b, &y);
    assert_int_equal(x.decode_steps, y.decode_steps);
    assert_int_equal(x.dense_steps, y.dense_steps);
    assert_int_equal(x.kv_bytes_read, y.kv_bytes_read);
    assert_int_equal(x.kv_bytes_dense, y.kv_bytes_dense);
    assert_memory_equal(lg_session_head_tokens(a), lg_session_head_tokens(b), (size_t)(a->m->cfg.n_layer * a->m->cfg.n_head_kv) * sizeof(int64_t));
}
static int32_t some_id(const lg_model *m, uint64_t seed, uint64_t i) { return (int32_t)(lg_base_rng(seed, 5, i) % (uint64_t)m->cfg.n_vocab); }

/* ---- generation ---- */
static bool cancels(void *user, int64_t index, int32_t id, const char *piece, int64_t n) {
    int *left = user;
    (void)index, (void)id, (void)piece, (void)n;
    return --*left > 0;
}
/* Prompts of several lengths, more than there are sequences; what ends them differs. how: 0 greedy, 1 drawn, 2 drawn with a penalty, 3 greedy with ln p. */
static void generate(lg_session *s, int how, lg_generation *out, int *left) {
    static const int64_t length[N_PROMPT] = { 12, 63, 30, 64, 127 }, n_max[N_PROMPT] = { 40, 17, 9, 1, 30 };
    lg_ids prompt[N_PROMPT] = { 0 };
    lg_generate_params p[N_PROMPT];
    static int32_t stop[60];
    for (int i = 0; i < 60; i++) stop[i] = some_id(s->m, 3, (uint64_t)i);
    for (int i = 0; i < N_PROMPT; i++) {
        for (int64_t t = 0; t < length[i]; t++) assert_true(lg_base_ids_push(&prompt[i], some_id(s->m, 11 + (uint64_t)i, (uint64_t)t)));
        lg_generate_defaults(&p[i]);
        p[i].n_max = n_max[i];
        p[i].stop_ids = stop;
        p[i].n_stop_ids = i % 2 ? 0 : 60; /* a fifth of the vocabulary */
        p[i].sampler.temp = how == 1 || how == 2 ? 0.9f : 0;
        p[i].sampler.top_k = how == 1 ? 40 : 0;
        p[i].sampler.seed = 77 + (uint64_t)i;
        p[i].sampler.repeat_penalty = how == 2 ? 1.2f : 1;
        p[i].logprob = how == 3;
    }
    *left = 11;
    p[4].stream = cancels;
    p[4].stream_user = left;
    OK(lg_generate_batch(s, prompt, p, N_PROMPT, out, err));
    for (int i = 0; i < N_PROMPT; i++) lg_ids_free(&prompt[i]);
}
static void test_generate(void **state) {
    (void)state;
    lg_model *m = fx_model("tiny-hybrid", "ref"), *f = far_model("tiny-hybrid");
    for (int kind = 0; kind < N_KIND; kind++)
        for (int how = 0; how < 4; how++)
            for (int n_seq = kind > 1 ? 3 : 1; n_seq <= 3 && (how < 3 || kind < 2); n_seq += 2) { /* (what kinds have in common is looked at twice) */
                lg_session *a = session(m, kind, n_seq, kind ? 512 : 128), *b = session(f, kind, n_seq, kind ? 512 : 128); /* 128: the last prompt meets the end */
                lg_generation want[N_PROMPT], got[N_PROMPT];
                int left_a, left_b;
                const int64_t begun = far.begun, lists = far.ticket;
                int64_t most = 2 * N_PROMPT; /* lists: prompts, and steps begun in vain where they end */
                generate(a, how, want, &left_a);
                generate(b, how, got, &left_b);
                assert_int_equal(left_a, left_b);
                for (int i = 0; i < N_PROMPT; i++) {
                    if (want[i].ids.n != got[i].ids.n || memcmp(want[i].ids.data, got[i].ids.data, (size_t)got[i].ids.n * 4) || want[i].stop_reason != got[i].stop_reason)
                        fail_msg("%s, %d, %d sequences: prompt %d goes on differently", kind_name[kind], how, n_seq, i);
                    assert_int_equal(want[i].decode_steps, got[i].decode_steps);
                    most += got[i].decode_steps;
                    assert_int_equal(want[i].kv_bytes_read, got[i].kv_bytes_read);
                    if (how == 3) assert_memory_equal(&want[i].logprob, &got[i].logprob, sizeof got[i].logprob);
                    lg_generation_free(&want[i]);
                    lg_generation_free(&got[i]);
                }
                if (kind < 3 && far.ticket - lists > most) fail_msg("%s, %d, %d sequences: %lld lists, at most %lld", kind_name[kind], how, n_seq, (long long)(far.ticket - lists), (long long)most);
                same_counts(a, b);
                assert_false(lg_session_is_ahead(b));
                if (n_seq == 1) same_logits(a, b, 0, kind_name[kind]); /* (which prompt is last on which sequence is not said) */
                if ((far.begun > begun) != (how < 3)) fail_msg("%s, %d: %lld steps were begun", kind_name[kind], how, (long long)(far.begun - begun));
                lg_session_free(a);
                lg_session_free(b);
            }
    free_models(m, f);
}

/* ---- steps, and what comes between them ---- */
static void read_both(lg_session *a, lg_session *b, const int32_t *text) {
    for (int32_t q = 0; q < 3; q++) {
        OK(lg_session_sync(a, q, text + q, 50 + 13 * q, err));
        OK(lg_session_sync(b, q, text + q, 50 + 13 * q, err));
    }
}
static void step_both(lg_session *a, lg_session *b, const int32_t *seqs, int32_t *ids, int64_t n, bool more) {
    int32_t other[3];
    memcpy(other, ids, (size_t)n * sizeof *ids);
    OK(lg_session_greedy(a, seqs, ids, n, more, err));
    OK(lg_session_greedy(b, seqs, other, n, more, err));
    assert_memory_equal(ids, other, (size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++) same_logits(a, b, seqs[i], "a step");
}
static void test_steps(void **state) {
    (void)state;
    lg_model *m = fx_model("tiny-hybrid", "ref"), *f = far_model("tiny-hybrid");
    for (int kind = 0; kind < N_KIND; kind++) {
        lg_session *both[2] = { session(m, kind, 3, 256), session(f, kind, 3, 256) }, *a = both[0], *b = both[1];
        int32_t seqs[3] = { 0, 1, 2 }, ids[3], text[200];
        char path[512];
        for (int i = 0; i < 200; i++) text[i] = some_id(m, 21, (uint64_t)i);
        read_both(a, b, text);
        memcpy(ids, text, sizeof ids);
        const int64_t begun = far.begun;
        for (int i = 0; i < 20; i++) step_both(a, b, seqs, ids, 3, true); /* over page edges */
        assert_true(far.begun > begun);
        if (kind < 3) assert_int_equal(far.begun, begun + 20);
        int32_t two[2] = { ids[2], ids[0] };
        const int32_t some[2] = { 2, 0 }; /* one leaves, the others change places */
        for (int i = 0; i < 6; i++) step_both(a, b, some, two, 2, true);
        if (kind < 3) assert_int_equal(far.begun, begun + 26);
        ids[1] = text[9]; /* back, with an id that nobody drew */
        ids[2] = two[0];
        ids[0] = two[1];
        for (int i = 0; i < 4; i++) step_both(a, b, seqs, ids, 3, true);
        for (int what = 0; what < 7; what++) { /* a step is under way: */
            step_both(a, b, seqs, ids, 3, true);
            assert_true(kind > 2 || lg_session_is_ahead(b));
            for (int x = 0; x < 2; x++) {
                lg_session *s = both[x];
                if (what == 0) OK(lg_session_rewind(s, 1, lg_session_len(s, 1) - 3, err));
                if (what == 1) OK(lg_session_fork(s, 0, 2, err));
                if (what == 2) OK(lg_session_sync(s, 1, text, 40, err));
                if (what == 3) OK(lg_session_step(s, seqs, text + 30, 3, err));
                if (what == 4) OK(lg_session_save(s, fx_temp(path, "ahead"), err));
                if (what == 5) OK(lg_session_load(s, fx_temp(path, "ahead"), err));
                if (what == 6) {
                    lg_roles *r = NULL;
                    OK(lg_roles_load(&r, FOLDER "/roles/random-6.json", err));
                    OK(lg_session_set_roles(s, r, &s->p.hybrid, err));
                    lg_roles_free(r);
                }
            }
            step_both(a, b, seqs, ids, 3, false);
            assert_false(lg_session_is_ahead(b));
        }
        unlink(fx_temp(path, "ahead"));
        same_counts(a, b);
        step_both(a, b, seqs, ids, 3, true); /* freed with a step under way */
        lg_session_free(a);
        lg_session_free(b);
    }
    free_models(m, f);
}

/* Two sessions of one model draw in turns: a step of one may not take the ids of the other. */
static void test_two_sessions(void **state) {
    (void)state;
    lg_model *m = fx_model("tiny-hybrid", "ref"), *f = far_model("tiny-hybrid");
    lg_session *a[2], *b[2];
    int32_t ids[2], text[80];
    const int32_t zero = 0;
    for (int i = 0; i < 80; i++) text[i] = some_id(m, 31, (uint64_t)i);
    for (int x = 0; x < 2; x++) {
        a[x] = session(m, x, 1, 128);
        b[x] = session(f, x, 1, 128);
        OK(lg_session_sync(a[x], 0, text + 20 * x, 50, err));
        OK(lg_session_sync(b[x], 0, text + 20 * x, 50, err));
        ids[x] = text[x];
    }
    for (int i = 0; i < 30; i++) step_both(a[i / 3 % 2], b[i / 3 % 2], &zero, &ids[i / 3 % 2], 1, true);
    for (int x = 0; x < 2; x++) {
        same_counts(a[x], b[x]);
        lg_session_free(a[x]);
        lg_session_free(b[x]);
    }
    free_models(m, f);
}

/* A device that fails: the step is not taken, its error comes out, and the session goes on when the device does. */
static void test_failure(void **state) {
    (void)state;
    lg_model *m = fx_model("tiny-hybrid", "ref"), *f = far_model("tiny-hybrid");
    for (int later = 0; later < 3; later++) { /* how many lists after the next one fails */
        lg_session *a = session(m, 1, 3, 256), *b = session(f, 1, 3, 256);
        int32_t seqs[3] = { 0, 1, 2 }, ids[3], other[3], text[200];
        for (int i = 0; i < 200; i++) text[i] = some_id(m, 41, (uint64_t)i);
        read_both(a, b, text);
        memcpy(ids, text, sizeof ids);
        for (int i = 0; i < 5; i++) step_both(a, b, seqs, ids, 3, true);
        far.fails_at = far.ticket + later;
        int failed = 0;
        for (int i = 0; i < 6; i++) {
            lg_error e = { 0 };
            memcpy(other, ids, sizeof ids);
            const int64_t len = lg_session_len(b, 0);
            if (lg_session_greedy(b, seqs, other, 3, true, &e) != LG_OK) {
                failed++;
                assert_string_equal(e.message, "as ordered");
                assert_int_equal(lg_session_len(b, 0), len);
                assert_null(lg_session_logits(b, 0));
                memcpy(other, ids, sizeof ids);
                OK(lg_session_greedy(b, seqs, other, 3, true, err));
            }
            OK(lg_session_greedy(a, seqs, ids, 3, true, err));
            assert_memory_equal(ids, other, sizeof ids);
            for (int q = 0; q < 3; q++) same_logits(a, b, q, "after a failure");
        }
        assert_int_equal(failed, 1);
        lg_session_free(a);
        lg_session_free(b);
    }
    free_models(m, f);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_generate), cmocka_unit_test(test_steps), cmocka_unit_test(test_two_sessions), cmocka_unit_test(test_failure) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
