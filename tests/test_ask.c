/* Questions on a bank: the loop against one written out by hand from the specification's section 2, batches against single runs,
 * gates ahead against one by one, BM25 against its formula, answer extraction against the published scorer's vectors. */
#include "fixture.h"
#include "memory/ask.h"

static lg_model *model;
static lg_session *session;
static lg_bank *bank;
static char path[512];
static float *gate_row;

enum { N_TOKENS = 150, CHUNK = 64, RATIO = 4, N_CHUNK = 3 };
static const char update_text[] = "\nA {prompt}\nB {memory}\nC:", answer_text[] = "F {prompt}\nM {memory}\nA:";

static int setup(void **state) {
    (void)state;
    const lg_model_params mp = { .path = FIXTURES "tiny-qwen2", .device = "cpu", .compute = LG_COMPUTE_F32, .n_threads = 1, .fill_memory = true, .chat_format = "none" };
    lg_session_params sp;
    lg_bank_params bp;
    int32_t ids[N_TOKENS];
    OK(lg_model_open(&model, &mp, err));
    for (int i = 0; i < N_TOKENS; i++) ids[i] = (int32_t)lg_base_rng_below(9, 1, (uint64_t)i, model->cfg.n_vocab - 8);
    lg_bank_defaults(&bp);
    bp.chunk = CHUNK;
    bp.window = 32;
    bp.ratio = RATIO;
    bp.slots = LG_DTYPE_F32;
    bp.group = 2;
    fx_temp(path, "ask-bank");
    OK(lg_bank_build_ids(model, &bp, ids, N_TOKENS, path, err));
    OK(lg_bank_open(&bank, path, err));
    lg_session_defaults(&sp);
    sp.n_ctx = 512;
    sp.n_seq_max = 3;
    session = fx_session(model, sp);
    /* A gate made of one row; no low-rank additions. */
    gate_row = calloc((size_t)model->cfg.n_embd, sizeof *gate_row);
    for (int64_t i = 0; i < model->cfg.n_embd; i++) gate_row[i] = (float)(lg_base_rng_unit(4, 1, (uint64_t)i) - 0.5);
    model->gate_score = (lg_weight){ .dtype = LG_DTYPE_F32, .n_out = 1, .n_in = model->cfg.n_embd, .data = gate_row };
    OK(model->ops->weight_bind(model->ctx, &model->gate_score, err));
    return 0;
}
static int teardown(void **state) {
    (void)state;
    lg_session_free(session);
    lg_bank_close(bank);
    model->ops->weight_unbind(model->ctx, &model->gate_score);
    model->gate_score = (lg_weight){ 0 };
    lg_model_free(model);
    free(gate_row);
    unlink(path);
    return 0;
}

static lg_ids encode(const char *s) {
    lg_ids x = { 0 };
    OK(lg_text_encode(model->tok, s, (int64_t)strlen(s), LG_TOK_SPECIAL, &x, err));
    return x;
}
static lg_ids question(int i) {
    static const char *const text[] = { "who?", "where was it", "in which year, then", "x", "the name of the third" };
    return encode(text[i]);
}
static lg_ask_params params(void) {
    lg_ask_params p;
    lg_ask_defaults(&p);
    p.update_template = update_text;
    p.answer_template = answer_text;
    p.memory_size = 12;
    p.max_new = 9;
    return p;
}
static void push(lg_ids *out, const lg_ids *x) {
    for (int64_t i = 0; i < x->n; i++) assert_true(lg_base_ids_push(out, x->data[i]));
}
static void assert_ids(const lg_ids *a, const lg_ids *b) {
    assert_int_equal(a->n, b->n);
    if (a->n) assert_memory_equal(a->data, b->data, (size_t)a->n * 4);
}
static void assert_same(const lg_answer *a, const lg_answer *b) {
    assert_ids(&a->ids, &b->ids);
    assert_string_equal(a->text.data, b->text.data);
    assert_int_equal(a->chunk, b->chunk);
    assert_int_equal(a->n_step, b->n_step);
    for (int64_t i = 0; i < a->n_step; i++) {
        const lg_ask_step *x = &a->step[i], *y = &b->step[i];
        assert_int_equal(x->chunk, y->chunk);
        assert_int_equal(x->accepted, y->accepted);
        assert_int_equal(x->position0, y->position0);
        /* (sums over many rows of a pass may round differently from few) */
        assert_true(fabs(x->gate_score - y->gate_score) < 1e-6 || (isnan(x->gate_score) && isnan(y->gate_score)));
        assert_ids(&x->prompt, &y->prompt);
        assert_ids(&x->memory, &y->memory);
    }
}

/* Greedy decoding by hand behind chunk c (-1: nothing), one sequence, one step at a time. */
static lg_ids greedy(int64_t c, const lg_ids *prompt, int64_t n_max) {
    lg_ids out = { 0 };
    const int32_t seq = 0;
    OK(lg_session_set_slots(session, 0, NULL, err));
    if (c >= 0) OK(lg_bank_place(bank, c, session, 0, -1, err));
    OK(lg_session_sync(session, 0, prompt->data, prompt->n, err));
    while (out.n < n_max) {
        const float *l = lg_session_logits(session, 0);
        int32_t id = 0;
        for (int32_t i = 1; i < model->cfg.n_vocab; i++)
            if (l[i] > l[id]) id = i;
        const lg_ids *stop = lg_text_stop_ids(model->tok);
        bool ends = false;
        for (int64_t i = 0; i < stop->n; i++) ends |= stop->data[i] == id;
        if (ends) break;
        assert_true(lg_base_ids_push(&out, id));
        OK(lg_session_step(session, &seq, &id, 1, err));
    }
    return out;
}

static void test_loop_by_hand(void **state) {
    (void)state;
    const lg_ask_params p = params();
    lg_ids q = question(1), m = { 0 }, a0 = encode("\nA "), a1 = encode("\nB "), a2 = encode("\nC:"), f0 = encode("F "), f1 = encode("\nM "), f2 = encode("\nA:");
    lg_answer r;
    OK(lg_text_encode(model->tok, "No previous memory", 18, 0, &m, err));
    OK(lg_ask(session, bank, &q, 1, &p, &r, err));
    assert_int_equal(r.n_step, N_CHUNK + 1);
    for (int64_t c = 0; c < N_CHUNK; c++) {
        lg_ids prompt = { 0 };
        push(&prompt, &a0), push(&prompt, &q), push(&prompt, &a1), push(&prompt, &m), push(&prompt, &a2);
        const lg_ask_step *s = &r.step[c];
        assert_int_equal(s->chunk, c);
        assert_int_equal(s->position0, CHUNK / RATIO); /* behind a partial chunk too */
        assert_true(s->accepted && isnan(s->gate_score));
        assert_ids(&s->prompt, &prompt);
        lg_ids_free(&m);
        m = greedy(c, &prompt, p.memory_size);
        int64_t kept = 0; /* no pad in a memory */
        for (int64_t i = 0; i < m.n; i++)
            if (m.data[i] != lg_text_pad(model->tok)) m.data[kept++] = m.data[i];
        m.n = kept;
        assert_ids(&s->memory, &m);
        lg_ids_free(&prompt);
    }
    lg_ids prompt = { 0 };
    push(&prompt, &f0), push(&prompt, &q), push(&prompt, &f1), push(&prompt, &m), push(&prompt, &f2);
    assert_int_equal(r.step[N_CHUNK].chunk, -1);
    assert_int_equal(r.step[N_CHUNK].position0, 0);
    assert_ids(&r.step[N_CHUNK].prompt, &prompt);
    lg_ids answer = greedy(-1, &prompt, p.max_new);
    assert_ids(&r.ids, &answer);
    lg_answer_free(&r);
    lg_ids *all[] = { &q, &m, &a0, &a1, &a2, &f0, &f1, &f2, &prompt, &answer };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) lg_ids_free(all[i]);
}

/* Of a mode, with templates and pieces that fit the tiny window. */
static lg_ask_params params_of(lg_ask_mode mode, lg_gate_kind gate) {
    lg_ask_params p = params();
    p.mode = mode;
    p.gate = gate;
    p.piece = 40;
    if (mode == LG_ASK_LOOKUP) p.answer_template = "Q {prompt}\nA:";
    if (mode == LG_ASK_MEMAGENT) p.update_template = "{prompt} {memory} {chunk}";
    if (mode == LG_ASK_FULL) p.answer_template = "{chunk}\n{prompt}";
    return p;
}

/* Five questions on three sequences equal five single runs, in every mode. */
static void test_together_equals_single(void **state) {
    (void)state;
    static const struct { lg_ask_mode mode; lg_gate_kind gate; } kind[] = { { LG_ASK_MEMORY, LG_GATE_NONE }, { LG_ASK_MEMORY, LG_GATE_ADAPTER },
        { LG_ASK_MEMORY, LG_GATE_LEXICAL }, { LG_ASK_LOOKUP, LG_GATE_LEXICAL }, { LG_ASK_LOOKUP, LG_GATE_ADAPTER }, { LG_ASK_LOOKUP, LG_GATE_NONE },
        { LG_ASK_MEMAGENT, LG_GATE_NONE }, { LG_ASK_FULL, LG_GATE_NONE } };
    lg_ids q[5];
    for (int i = 0; i < 5; i++) q[i] = question(i);
    for (size_t k = 0; k < sizeof kind / sizeof *kind; k++) {
        lg_ask_params p = params_of(kind[k].mode, kind[k].gate);
        p.top = 2;
        int64_t ctx;
        OK(lg_ask_context(model, bank, q, 5, &p, &ctx, err));
        assert_true(ctx <= 512);
        lg_answer many[5], one;
        OK(lg_ask(session, bank, q, 5, &p, many, err));
        for (int i = 0; i < 5; i++) {
            OK(lg_ask(session, bank, &q[i], 1, &p, &one, err));
            assert_same(&many[i], &one);
            assert_int_equal(many[i].step[many[i].n_step - 1].chunk, -1);
            if (p.mode == LG_ASK_MEMAGENT) {
                assert_int_equal(many[i].n_step, (N_TOKENS + 39) / 40 + 1);
                assert_int_equal(many[i].step[3].token_begin, 120);
                assert_int_equal(many[i].step[3].token_end, N_TOKENS);
            }
            lg_answer_free(&one);
            lg_answer_free(&many[i]);
        }
    }
    for (int i = 0; i < 5; i++) lg_ids_free(&q[i]);
}

static bool same_ids(const lg_ids *a, const lg_ids *b) { return a->n == b->n && (!a->n || !memcmp(a->data, b->data, (size_t)a->n * sizeof *a->data)); }

/* Drawn texts: together as alone; another seed, another text; texts of one question draw apart; top_k 1 is greedy. */
static void test_sampled(void **state) {
    (void)state;
    static const lg_ask_mode mode[] = { LG_ASK_MEMORY, LG_ASK_LOOKUP, LG_ASK_MEMAGENT, LG_ASK_FULL };
    lg_ids q[3];
    for (int i = 0; i < 3; i++) q[i] = question(i);
    for (int k = 0; k < 4; k++) {
        lg_ask_params p = params_of(mode[k], mode[k] == LG_ASK_LOOKUP ? LG_GATE_LEXICAL : LG_GATE_NONE);
        const lg_ask_params greedy = p;
        int64_t ctx;
        p.draft = true; /* not taken where texts are drawn */
        p.sampler.temp = 1.5f;
        p.sampler.seed = 5;
        OK(lg_ask_context(model, bank, q, 3, &p, &ctx, err));
        assert_true(ctx <= 512);
        lg_answer many[3], one;
        OK(lg_ask(session, bank, q, 3, &p, many, err));
        int differ = 0;
        for (int i = 0; i < 3; i++) {
            p.sampler.seed = 5;
            OK(lg_ask(session, bank, &q[i], 1, &p, &one, err));
            assert_same(&many[i], &one);
            lg_answer_free(&one);
            p.sampler.seed = 6;
            OK(lg_ask(session, bank, &q[i], 1, &p, &one, err));
            differ += !same_ids(&many[i].ids, &one.ids);
            lg_answer_free(&one);
        }
        assert_true(differ > 0);
        if (p.mode == LG_ASK_MEMORY) assert_false(same_ids(&many[0].step[0].memory, &many[0].step[1].memory));
        p.sampler.top_k = 1;
        OK(lg_ask(session, bank, &q[0], 1, &p, &one, err));
        lg_answer_free(&many[0]);
        OK(lg_ask(session, bank, &q[0], 1, &greedy, &many[0], err));
        assert_true(same_ids(&one.ids, &many[0].ids));
        lg_answer_free(&one);
        for (int i = 0; i < 3; i++) lg_answer_free(&many[i]);
    }
    for (int i = 0; i < 3; i++) lg_ids_free(&q[i]);
}

/* Scoring ahead gives the steps of scoring one by one; the threshold lies between the scores, so both kinds occur. */
static void test_speculative_gate(void **state) {
    (void)state;
    int64_t accepted = 0, rejected = 0;
    for (int i = 0; i < 5; i++) {
        lg_ids q = question(i);
        lg_ask_params p = params();
        lg_answer first, other;
        p.gate = LG_GATE_ADAPTER;
        p.gate_threshold = 1;
        OK(lg_ask(session, bank, &q, 1, &p, &first, err)); /* all rejected: scores with the first memory; take a threshold between them */
        double lo = 1, hi = 0;
        for (int c = 0; c < N_CHUNK; c++) {
            lo = first.step[c].gate_score < lo ? first.step[c].gate_score : lo;
            hi = first.step[c].gate_score > hi ? first.step[c].gate_score : hi;
        }
        assert_true(hi > lo && lo > 0 && hi < 1);
        lg_answer_free(&first);
        p.gate_threshold = (lo + hi) / 2;
        for (p.second_look = 0; p.second_look < 3; p.second_look++)
            for (int b = 1; b <= 8; b += b == 1 ? 1 : 6) {
                p.gate_batch = b;
                OK(lg_ask(session, bank, &q, 1, &p, b == 1 ? &first : &other, err));
                if (b > 1) {
                    assert_same(&first, &other);
                    lg_answer_free(&other);
                }
                if (b == 8) {
                    for (int64_t s = 0; s < first.n_step - 1; s++) {
                        const bool yes = first.step[s].accepted;
                        assert_int_equal(yes, first.step[s].gate_score > p.gate_threshold);
                        assert_int_equal(yes, first.step[s].prompt.data != NULL);
                        assert_int_equal(yes, first.step[s].position0 == CHUNK / RATIO);
                        accepted += yes;
                        rejected += !yes;
                        if (s >= N_CHUNK) { /* a second look: only at what was rejected before the memory changed */
                            assert_true(p.second_look > 0);
                            int64_t was = s - 1;
                            while (was >= 0 && first.step[was].chunk != first.step[s].chunk) was--;
                            assert_true(was >= 0 && !first.step[was].accepted);
                            bool changed = false;
                            for (int64_t t = was + 1; t < s; t++) changed |= first.step[t].accepted;
                            assert_true(changed);
                        }
                    }
                    lg_answer_free(&first);
                }
            }
        lg_ids_free(&q);
    }
    assert_true(accepted > 0 && rejected > 0);
}

/* One ragged pass over prompts of several lengths, cut at any rows, gives the scores of one prompt after another. */
static void test_ragged_gate(void **state) {
    (void)state;
    enum { N = 3 };
    static const int64_t length[N] = { 5, 150, 33 }, chunks[] = { 512, 64, 7 };
    static const int32_t seqs[N] = { 2, 0, 1 };
    lg_ids prompt[N] = { { 0 } };
    lg_slots slots[N];
    const uint8_t *rows[N][2][16];
    double alone[N], score[N];
    assert_true(model->cfg.n_layer <= 16);
    for (int i = 0; i < N; i++) {
        for (int64_t t = 0; t < length[i]; t++)
            assert_true(lg_base_ids_push(&prompt[i], (int32_t)lg_base_rng_below(3, (uint64_t)i, (uint64_t)t, model->cfg.n_vocab - 8)));
        OK(lg_memory_bank_slots(bank, (i + 1) % N_CHUNK, &slots[i], rows[i][0], rows[i][1], err));
    }
    for (int i = 0; i < N; i++) OK(lg_memory_gate(session, &seqs[i], &slots[i], &prompt[i], 1, &alone[i], err));
    assert_true(fabs(alone[0] - alone[1]) > 1e-3 && fabs(alone[1] - alone[2]) > 1e-3); /* they are told apart */
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
        lg_session_params sp;
        lg_session_defaults(&sp);
        sp.n_ctx = 512;
        sp.n_seq_max = N;
        sp.chunk = chunks[c];
        lg_session *s = fx_session(model, sp);
        OK(lg_memory_gate(s, seqs, slots, prompt, N, score, err));
        for (int i = 0; i < N; i++) {
            assert_true(fabs(score[i] - alone[i]) < 1e-5);
            assert_int_equal(lg_session_len(s, seqs[i]), 0); /* nothing of it stays */
        }
        lg_error e = { 0 };
        static const int32_t twice[2] = { 1, 1 };
        assert_int_equal(lg_memory_gate(s, twice, slots, prompt, 2, score, &e), LG_ERR_USAGE);
        lg_session_free(s);
    }
    for (int i = 0; i < N; i++) lg_ids_free(&prompt[i]);
}

static void test_memory_rules(void **state) {
    (void)state;
    lg_ids q = question(0), init = { 0 };
    lg_ask_params p = params();
    lg_answer r;
    OK(lg_text_encode(model->tok, "No previous memory", 18, 0, &init, err));
    OK(lg_ask(session, bank, &q, 1, &p, &r, err));
    assert_true(r.step[0].memory.n > 1);
    const int32_t first = r.step[0].memory.data[0], pad = r.step[0].memory.data[1];
    lg_answer_free(&r);
    /* The first token it would write ends the update: the published loop loses the memory, --keep-memory keeps it. */
    p.stop_ids = &first;
    p.n_stop_ids = 1;
    OK(lg_ask(session, bank, &q, 1, &p, &r, err));
    assert_non_null(r.step[0].memory.data);
    assert_int_equal(r.step[0].memory.n, 0);
    lg_answer_free(&r);
    p.keep_memory = true;
    OK(lg_ask(session, bank, &q, 1, &p, &r, err));
    assert_ids(&r.step[0].memory, &init);
    lg_answer_free(&r);
    p.n_stop_ids = -1;
    p.keep_memory = false;
    p.pad_id = pad; /* dropped wherever it stands; it does not end the update */
    OK(lg_ask(session, bank, &q, 1, &p, &r, err));
    assert_int_equal(r.step[0].memory.data[0], first);
    for (int64_t i = 0; i < r.step[0].memory.n; i++) assert_int_not_equal(r.step[0].memory.data[i], pad);
    lg_answer_free(&r);
    lg_ids_free(&q);
    lg_ids_free(&init);
}

/* Drafting from the old memory changes nothing but the number of passes. A first memory that the model itself wrote makes it copy. */
static void test_draft(void **state) {
    (void)state;
    int64_t plain = 0, drafted = 0;
    for (int i = 0; i < 5; i++) {
        lg_ids q = question(i);
        lg_ask_params p = params();
        lg_answer a, b;
        p.memory_size = 48;
        OK(lg_ask(session, bank, &q, 1, &p, &a, err));
        p.draft = true;
        OK(lg_ask(session, bank, &q, 1, &p, &b, err));
        assert_same(&a, &b);
        for (int64_t c = 0; c < N_CHUNK; c++) {
            plain += a.step[c].passes;
            drafted += b.step[c].passes;
        }
        lg_answer_free(&a);
        lg_answer_free(&b);
        lg_ids_free(&q);
    }
    print_message("# %lld passes, drafted %lld\n", (long long)plain, (long long)drafted);
    assert_true(drafted < plain);
}

static void test_lookup(void **state) {
    (void)state;
    /* Ids that stand in one chunk alone lead to it. */
    lg_ask_params p = params();
    p.mode = LG_ASK_LOOKUP;
    p.gate = LG_GATE_LEXICAL;
    p.answer_template = "{prompt}";
    p.top = 3;
    for (int64_t c = 0; c < N_CHUNK; c++) {
        lg_ids q = { 0 };
        for (int64_t i = c * CHUNK + 3; i < c * CHUNK + 15; i++) assert_true(lg_base_ids_push(&q, lg_bank_ids(bank)[i]));
        lg_answer r;
        OK(lg_ask(session, bank, &q, 1, &p, &r, err));
        assert_int_equal(r.step[0].chunk, c);
        assert_int_equal(r.n_step, 4);
        double best = -INFINITY;
        int64_t from = -1;
        for (int i = 0; i < 3; i++) {
            assert_true(i == 0 || r.step[i].gate_score <= r.step[i - 1].gate_score);
            if (r.step[i].logprob > best) best = r.step[i].logprob, from = r.step[i].chunk;
        }
        assert_int_equal(r.chunk, from);
        assert_true(r.step[3].logprob == best);
        lg_answer_free(&r);
        p.weigh = true; /* mean ln p plus the distance from the best score */
        OK(lg_ask(session, bank, &q, 1, &p, &r, err));
        best = -INFINITY;
        for (int i = 0; i < 3; i++) {
            const double w = r.step[i].logprob + r.step[i].gate_score - r.step[0].gate_score;
            if (w > best) best = w, from = r.step[i].chunk;
        }
        assert_int_equal(r.chunk, from);
        p.weigh = false;
        lg_answer_free(&r);
        lg_ids_free(&q);
    }
}

static void test_bm25(void **state) {
    (void)state;
    lg_lexical *x;
    float score[N_CHUNK];
    OK(lg_memory_lexical_new(&x, bank, err));
    for (int t = 0; t < 20; t++) {
        int32_t q[9];
        for (int i = 0; i < 9; i++) q[i] = (int32_t)lg_base_rng_below(3, (uint64_t)t, (uint64_t)i, model->cfg.n_vocab);
        q[8] = q[0]; /* twice counts once */
        lg_memory_lexical_score(x, q, 9, score);
        for (int64_t c = 0; c < N_CHUNK; c++) {
            double want = 0;
            const double len = c < 2 ? CHUNK : N_TOKENS - 2 * CHUNK;
            for (int i = 0; i < 8; i++) {
                bool again = false;
                for (int j = 0; j < i; j++) again |= q[j] == q[i];
                int tf[N_CHUNK] = { 0 }, df = 0;
                for (int k = 0; k < N_TOKENS; k++) tf[k / CHUNK] += lg_bank_ids(bank)[k] == q[i];
                for (int k = 0; k < N_CHUNK; k++) df += tf[k] > 0;
                if (!again) want += log(1 + (N_CHUNK - df + 0.5) / (df + 0.5)) * tf[c] * 2.2 / (tf[c] + 1.2 * (0.25 + 0.75 * len / (N_TOKENS / 3.0)));
            }
            assert_true(fabs(want - (double)score[c]) < 1e-5);
        }
    }
    lg_memory_lexical_free(x);
}

static void test_templates(void **state) {
    (void)state;
    enum { P = 1 << LG_HOLE_PROMPT, M = 1 << LG_HOLE_MEMORY };
    lg_template t;
    lg_error e;
    assert_int_equal(strlen(lg_memory_update_text), 581);
    assert_int_equal(strlen(lg_memory_answer_text), 226);
    static const char *const bad[] = { "", "{prompt}", "{memory}", "{prompt}{memory}{memory}", "{prompt} {memory} {chunk}", "{prompt}{prompt}{memory}" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) assert_int_equal(lg_memory_template(&t, model, bad[i], true, P | M, 0, &e), LG_ERR_LIMIT);
    /* As a chat turn: the pieces spell the rendered turn, the holes stand where the placeholders did, in either order. */
    lg_model *chat = fx_model("tiny-qwen2", "cpu");
    for (int order = 0; order < 2; order++) {
        OK(lg_memory_template(&t, chat, order ? "one {memory} two {prompt} three" : "one {prompt} two {memory} three", true, P | M, 0, err));
        assert_int_equal(t.n_hole, 2);
        assert_int_equal(t.hole[0], order ? LG_HOLE_MEMORY : LG_HOLE_PROMPT);
        lg_text whole = { 0 };
        for (int i = 0; i <= 2; i++) OK(lg_text_decode(chat->tok, t.piece[i].data, t.piece[i].n, LG_TOK_SPECIAL, &whole, err));
        const lg_chat_turn turn = { "user", "one  two  three" };
        lg_ids ids = { 0 };
        lg_text want = { 0 };
        OK(lg_text_chat(chat->tok, &turn, 1, true, &ids, err));
        OK(lg_text_decode(chat->tok, ids.data, ids.n, LG_TOK_SPECIAL, &want, err));
        assert_string_equal(whole.data, want.data);
        assert_int_equal(t.piece[0].data[0], ids.data[0]); /* the chat format's special tokens are tokens */
        lg_ids_free(&ids);
        lg_text_free(&want);
        lg_text_free(&whole);
        lg_memory_template_free(&t);
    }
    lg_model_free(chat);
}

static void test_extraction(void **state) {
    (void)state;
    static const struct { const char *text, *want; bool boxed; } v[] = {
        { "Therefore, the answer is **Paris**.", "Paris", false }, { "The answer is Paris.", NULL, false },
        { "So the answer is A. Hence the answer is (B).", "(B)", false }, { "therefore, the answer is Paris.\nNote: extra", "Paris.\nNote: extra", false },
        { "\\boxed{a{b}c} end", "a{b}c", true }, { "\\boxed Paris$ x", "Paris", true }, { "\\boxed{x} then \\boxed{y}", "y", true },
        { "\\boxed{A \\boxed{B}}", "B", true }, { "\\boxed{unclosed", NULL, true }, { "\\boxed{}", "", true }, { "", NULL, false }, { "", NULL, true } };
    for (size_t i = 0; i < sizeof v / sizeof *v; i++) {
        lg_text out = { 0 };
        assert_int_equal(lg_memory_extract(v[i].text, v[i].boxed, &out), v[i].want != NULL);
        if (v[i].want) assert_string_equal(out.data, v[i].want);
        else assert_null(out.data);
        lg_text_free(&out);
    }
}

static lg_ids json_ids_of(const lg_json *list) {
    lg_ids x = { 0 };
    for (int64_t i = 0; i < lg_json_size(list); i++) {
        int64_t v;
        assert_true(lg_json_int(lg_json_at(list, i), &v));
        assert_true(lg_base_ids_push(&x, (int32_t)v));
    }
    return x;
}

/* The whole loop against tools/memory_ref.py on the tiny checkpoint in the official layout: prompts, memories, answer. */
static void test_reference_loop(void **state) {
    (void)state;
    lg_json *root = NULL;
    OK(lg_json_load(&root, FIXTURES "memory/ref/loop.json", 1 << 20, err));
    lg_model *m = fx_model("memory/model", "cpu");
    lg_ids text = { 0 }, q = json_ids_of(lg_json_get(root, "question_ids"));
    OK(lg_file_read_ids(&text, FIXTURES "memory/ref/text.txt", 256, err));
    lg_bank_params bp;
    lg_bank_defaults(&bp);
    bp.chunk = 256;
    bp.slots = LG_DTYPE_F32; /* window and ratio come from the checkpoint */
    char file[512];
    lg_bank *b;
    OK(lg_bank_build_ids(m, &bp, text.data, text.n, fx_temp(file, "loop-bank"), err));
    OK(lg_bank_open(&b, file, err));
    lg_ask_params p;
    lg_ask_defaults(&p);
    p.update_template = lg_json_str(lg_json_get(root, "update"), NULL);
    p.answer_template = lg_json_str(lg_json_get(root, "final"), NULL);
    p.memory_size = p.max_new = 16;
    int64_t ctx;
    OK(lg_ask_context(m, b, &q, 1, &p, &ctx, err));
    lg_session_params sp;
    lg_session_defaults(&sp);
    sp.n_ctx = ctx;
    lg_session *s = fx_session(m, sp);
    lg_answer r;
    OK(lg_ask(s, b, &q, 1, &p, &r, err));
    const lg_json *steps = lg_json_get(root, "steps"), *last = lg_json_get(root, "answer");
    assert_int_equal(r.n_step, lg_json_size(steps) + 1);
    for (int64_t i = 0; i < r.n_step; i++) {
        const lg_json *j = i + 1 < r.n_step ? lg_json_at(steps, i) : last;
        lg_ids prompt = json_ids_of(lg_json_get(j, "prompt_ids")), made = json_ids_of(lg_json_get(j, i + 1 < r.n_step ? "memory_ids" : "answer_ids"));
        int64_t position0;
        assert_true(lg_json_int(lg_json_get(j, "position0"), &position0));
        assert_ids(&r.step[i].prompt, &prompt);
        assert_int_equal(r.step[i].position0, position0);
        assert_ids(i + 1 < r.n_step ? &r.step[i].memory : &r.ids, &made);
        lg_ids_free(&prompt);
        lg_ids_free(&made);
    }
    lg_answer_free(&r);
    lg_session_free(s);
    lg_bank_close(b);
    lg_ids_free(&text);
    lg_ids_free(&q);
    lg_json_free(root);
    lg_model_free(m);
    unlink(file);
}

static bool no(void *user, const char *what, int64_t done, int64_t total) {
    (void)user, (void)what, (void)done, (void)total;
    return false;
}

static void test_refuses(void **state) {
    (void)state;
    lg_ids q = question(0);
    lg_error e;
    lg_answer r;
    lg_ask_params p = params();
    p.mode = LG_ASK_HYBRID;
    assert_int_equal(lg_ask(session, bank, &q, 1, &p, &r, &e), LG_ERR_USAGE);
    p = params();
    p.gate = LG_GATE_ADAPTER;
    const lg_weight w = model->gate_score;
    model->gate_score = (lg_weight){ 0 };
    assert_int_equal(lg_ask(session, bank, &q, 1, &p, &r, &e), LG_ERR_USAGE);
    model->gate_score = w;
    p = params();
    p.progress = no;
    assert_int_equal(lg_ask(session, bank, &q, 1, &p, &r, &e), LG_ERR_CANCELLED);
    p = params();
    p.mode = LG_ASK_FULL; /* a text longer than the window: refused, both numbers named */
    p.answer_template = "{chunk}{prompt}";
    lg_session_params sp;
    lg_session_defaults(&sp);
    sp.n_ctx = 100;
    lg_session *small = fx_session(model, sp);
    assert_int_equal(lg_ask(small, bank, &q, 1, &p, &r, &e), LG_ERR_LIMIT);
    assert_non_null(strstr(e.message, "100"));
    lg_session_free(small);
    lg_model *other = fx_model("tiny-llama", "cpu");
    sp.n_ctx = 128;
    lg_session *s = fx_session(other, sp);
    p = params();
    assert_int_equal(lg_ask(s, bank, &q, 1, &p, &r, &e), LG_ERR_MISMATCH);
    lg_session_free(s);
    lg_model_free(other);
    const int32_t bad = (int32_t)model->cfg.n_vocab;
    lg_ids wrong = { 0 };
    assert_true(lg_base_ids_push(&wrong, bad));
    assert_int_equal(lg_ask(session, bank, &wrong, 1, &p, &r, &e), LG_ERR_LIMIT);
    lg_ids_free(&wrong);
    lg_ids_free(&q);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loop_by_hand), cmocka_unit_test(test_reference_loop), cmocka_unit_test(test_together_equals_single), cmocka_unit_test(test_sampled), cmocka_unit_test(test_speculative_gate), cmocka_unit_test(test_ragged_gate),
        cmocka_unit_test(test_memory_rules), cmocka_unit_test(test_draft), cmocka_unit_test(test_lookup), cmocka_unit_test(test_bm25), cmocka_unit_test(test_templates),
        cmocka_unit_test(test_extraction), cmocka_unit_test(test_refuses),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
