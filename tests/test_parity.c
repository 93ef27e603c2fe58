/* Parity of whole models with transformers (f32 on the CPU) and with the numpy reference, through the public
 * interface: every family, layout and rope scaling, weights and caches of every dtype, any chunk size, and
 * every way a sequence can come to hold its tokens (kept prefix, rewind, fork, snapshot, batch). */
#include "fixture.h"

static const char *const models[] = { "tiny-llama", "tiny-llama-yarn", "tiny-llama-linear", "tiny-qwen2", "tiny-qwen3", "tiny-hybrid" };
enum { N_MODEL = sizeof models / sizeof *models, N_PROMPT = 200, N_GREEDY = 32 };

/* f32 arithmetic in another order of summation: transformers itself is up to 2.5e-5 from float64 here. */
static const double F32_BOUND = 1e-4;

static void within(double got, double bound, const char *what, const char *model, const char *device) {
    if (!(got <= bound)) fail_msg("%s, %s, %s: differs by %.3g, bound %.3g", model, device, what, got, bound);
}

static lg_session_params plain(void) {
    lg_session_params p;
    lg_session_defaults(&p);
    p.n_ctx = 256;
    return p;
}

/* ---- logits and greedy ids ---- */
static void greedy_equals(lg_session *s, const char *model, const char *device) {
    lg_ids prompt = fx_ids(model, "ref/prompt.txt"), want = fx_ids(model, "ref/greedy.txt");
    lg_generate_params g;
    lg_generation out = { 0 };
    lg_generate_defaults(&g);
    g.n_max = N_GREEDY;
    g.n_stop_ids = 0; /* none */
    OK(lg_generate(s, 0, prompt.data, prompt.n, &g, &out, err));
    assert_int_equal(want.n, N_GREEDY);
    assert_int_equal(out.ids.n, N_GREEDY);
    for (int64_t i = 0; i < N_GREEDY; i++)
        if (out.ids.data[i] != want.data[i])
            fail_msg("%s, %s: greedy id %lld is %d, not %d", model, device, (long long)i, out.ids.data[i], want.data[i]);
    assert_int_equal(out.stop_reason, LG_STOP_LENGTH);
    assert_int_equal(out.prompt_tokens, N_PROMPT);
    lg_generation_free(&out);
    lg_ids_free(&prompt);
    lg_ids_free(&want);
}

static void test_logits(void **state) {
    (void)state;
    for (int d = 0; d < FX_N_DEVICE; d++)
        for (int i = 0; i < N_MODEL; i++) {
            lg_model *m = fx_model(models[i], fx_devices[d]);
            lg_session *s = fx_session(m, plain());
            lg_ids prompt = fx_ids(models[i], "ref/prompt.txt");
            fx_array want = fx_ref(models[i], "ref/logits.npy");
            assert_int_equal(prompt.n, N_PROMPT);
            assert_int_equal(want.n_row, N_PROMPT);
            const double prefill = fx_eval(s, &prompt, -1, &want, 0, 1), decode = fx_eval(s, &prompt, 40, &want, 0, 1);
            print_message("  %-18s %s: prefill %.2e, decode %.2e\n", models[i], fx_devices[d], prefill, decode);
            within(prefill, F32_BOUND, "prefill", models[i], fx_devices[d]);
            within(decode, F32_BOUND, "decode", models[i], fx_devices[d]);
            greedy_equals(s, models[i], fx_devices[d]);
            fx_array_free(&want);
            lg_ids_free(&prompt);
            lg_session_free(s);
            lg_model_free(m);
        }
}

static void test_chunks(void **state) {
    (void)state;
    static const int64_t chunk[] = { 1, 7, 64, 512 };
    static const char *const some[] = { "tiny-llama", "tiny-qwen3" };
    for (int d = 0; d < FX_N_DEVICE; d++)
        for (int i = 0; i < 2; i++) {
            lg_model *m = fx_model(some[i], fx_devices[d]);
            lg_ids prompt = fx_ids(some[i], "ref/prompt.txt");
            fx_array want = fx_ref(some[i], "ref/logits.npy");
            for (int c = 0; c < 4; c++) {
                lg_session_params p = plain();
                p.chunk = chunk[c];
                lg_session *s = fx_session(m, p);
                within(fx_eval(s, &prompt, -1, &want, 0, 1), F32_BOUND, "chunk", some[i], fx_devices[d]);
                OK(lg_session_sync(s, 0, prompt.data, prompt.n, err)); /* sync's own chunking, last row only */
                within(fx_max_diff(lg_session_logits(s, 0), want.f + (N_PROMPT - 1) * want.n_col, want.n_col), F32_BOUND, "sync", some[i],
                       fx_devices[d]);
                lg_session_free(s);
            }
            fx_array_free(&want);
            lg_ids_free(&prompt);
            lg_model_free(m);
        }
}

/* ---- weights through lg_convert ---- */
/* bf16 and Q8_0: the reference ran on exactly the rounded weights, so only the order of summation may differ and the
 * f32 bound holds. f16 has 3 more mantissa bits than bf16: half of bf16's effect is generous, and 0 for bf16 models. */
static void test_convert(void **state) {
    (void)state;
    static const struct { lg_dtype type; const char *name, *ref; int64_t first, step; } kind[] = {
        { LG_DTYPE_F32, "f32", "ref/logits.npy", 0, 1 },
        { LG_DTYPE_BF16, "bf16", "ref/bf16.npy", 7, 8 },
        { LG_DTYPE_Q8_0, "q8_0", "ref/q8_0.npy", 7, 8 },
        { LG_DTYPE_F16, "f16", "ref/logits.npy", 0, 1 },
    };
    char folder[512], path[512];
    for (int i = 0; i < N_MODEL; i++)
        for (int k = 0; k < 4; k++) {
            char name[32];
            snprintf(name, sizeof name, "%s.gguf", kind[k].name);
            fx_temp(path, name);
            OK(lg_convert(fx_path(folder, models[i], ""), path, kind[k].type, NULL, NULL, err));
            lg_ids prompt = fx_ids(models[i], "ref/prompt.txt");
            fx_array want = fx_ref(models[i], kind[k].ref);
            for (int d = 0; d < FX_N_DEVICE; d++) {
                lg_model *m = fx_open(path, fx_devices[d], LG_COMPUTE_F32, 2);
                lg_session *s = fx_session(m, plain());
                const double effect = kind[k].type == LG_DTYPE_F16 ? fx_info(models[i], "weights", "bf16") / 2 : 0;
                const double got = fx_eval(s, &prompt, -1, &want, kind[k].first, kind[k].step);
                print_message("  %-18s %s, GGUF %s: %.2e\n", models[i], fx_devices[d], kind[k].name, got);
                within(got, effect > F32_BOUND ? effect : F32_BOUND, kind[k].name, models[i], fx_devices[d]);
                if (kind[k].type == LG_DTYPE_F32) greedy_equals(s, models[i], fx_devices[d]);
                /* One family for every quantisation of a model; the file itself has its own fingerprint. */
                lg_model *whole = fx_model(models[i], fx_devices[d]);
                lg_model_info a, b;
                lg_model_get_info(m, &a);
                lg_model_get_info(whole, &b);
                assert_string_equal(a.family, b.family);
                assert_string_equal(a.arch, b.arch);
                assert_int_equal(a.n_params, b.n_params);
                assert_int_equal(a.n_vocab, b.n_vocab);
                lg_model_free(whole);
                lg_session_free(s);
                lg_model_free(m);
            }
            unlink(path);
            fx_array_free(&want);
            lg_ids_free(&prompt);
        }
}

/* compute auto may round activations to 8 bits where weights have 8 bits: no more than Q8_0 itself does to the logits. */
static void test_auto(void **state) {
    (void)state;
    char folder[512], path[512];
    for (int i = 0; i < N_MODEL; i++) {
        OK(lg_convert(fx_path(folder, models[i], ""), fx_temp(path, "auto.gguf"), LG_DTYPE_Q8_0, NULL, NULL, err));
        lg_model *m = fx_open(path, "cpu", LG_COMPUTE_AUTO, 2);
        lg_session_params p = plain();
        p.kv = LG_DTYPE_F32;
        lg_session *s = fx_session(m, p);
        lg_ids prompt = fx_ids(models[i], "ref/prompt.txt");
        fx_array want = fx_ref(models[i], "ref/q8_0.npy");
        const double got = fx_eval(s, &prompt, -1, &want, 7, 8), decode = fx_eval(s, &prompt, 40, &want, 7, 8);
        const double bound = fx_info(models[i], "weights", "q8_0");
        print_message("  %-18s auto, q8_0: prefill %.2e, decode %.2e, bound %.2e\n", models[i], got, decode, bound);
        within(got, bound, "auto prefill", models[i], "cpu");
        within(decode, bound, "auto decode", models[i], "cpu");
        fx_array_free(&want);
        lg_ids_free(&prompt);
        lg_session_free(s);
        lg_model_free(m);
        unlink(path);
    }
}

/* ---- cache dtypes ---- */
/* The reference rounds K and V as the cache does. A value within f32 error of a rounding boundary may still go the
 * other way, one whole step where rounding alone is half of one; few do. So the bound is a share of what the rounding
 * of all values does: a tenth, for q8 with its coarse steps a quarter. And that effect itself must be there. */
static void test_kv(void **state) {
    (void)state;
    static const struct { lg_dtype type; const char *name; double share; } kind[] = {
        { LG_DTYPE_F16, "f16", 0.1 }, { LG_DTYPE_BF16, "bf16", 0.1 }, { LG_DTYPE_KV8, "q8", 0.25 } };
    for (int d = 0; d < FX_N_DEVICE; d++)
        for (int i = 0; i < N_MODEL; i++) {
            lg_model *m = fx_model(models[i], fx_devices[d]);
            lg_ids prompt = fx_ids(models[i], "ref/prompt.txt");
            fx_array exact = fx_ref(models[i], "ref/logits.npy");
            for (int k = 0; k < 3; k++) {
                char file[64];
                snprintf(file, sizeof file, "ref/kv_%s.npy", kind[k].name);
                fx_array want = fx_ref(models[i], file);
                lg_session_params p = plain();
                p.kv = kind[k].type;
                lg_session *s = fx_session(m, p);
                const double effect = fx_info(models[i], "kv", kind[k].name);
                const double prefill = fx_eval(s, &prompt, -1, &want, 7, 8), decode = fx_eval(s, &prompt, 40, &want, 7, 8);
                const double rounding = fx_eval(s, &prompt, -1, &exact, 0, 1);
                print_message("  %-18s %s, cache %s: prefill %.2e, decode %.2e, rounding %.2e of %.2e\n", models[i], fx_devices[d],
                              kind[k].name, prefill, decode, rounding, effect);
                within(prefill, F32_BOUND + kind[k].share * effect, kind[k].name, models[i], fx_devices[d]);
                within(decode, F32_BOUND + kind[k].share * effect, kind[k].name, models[i], fx_devices[d]);
                if (rounding < effect / 2) fail_msg("%s: a cache of %s does not round", models[i], kind[k].name);
                fx_array_free(&want);
                lg_session_free(s);
            }
            fx_array_free(&exact);
            lg_ids_free(&prompt);
            lg_model_free(m);
        }
}

/* ---- sequences ---- */
static void row_is(lg_session *s, int64_t seq, const fx_array *want, int64_t row, const char *what, const char *device) {
    const float *got = lg_session_logits(s, seq);
    if (!got) fail_msg("%s: no logits", what);
    within(fx_max_diff(got, want->f + row * want->n_col, want->n_col), F32_BOUND, what, "tiny-llama", device);
}

/* Sequences of different lengths fed together, entering and leaving, equal single runs. */
static void test_ragged(void **state) {
    (void)state;
    for (int d = 0; d < FX_N_DEVICE; d++) {
        lg_model *m = fx_model("tiny-llama", fx_devices[d]);
        lg_ids prompt = fx_ids("tiny-llama", "ref/prompt.txt");
        fx_array want = fx_ref("tiny-llama", "ref/logits.npy");
        lg_session_params p = plain();
        p.n_seq_max = 4;
        lg_session *s = fx_session(m, p);
        int64_t len[4] = { 3, 64, 127, 150 };
        for (int32_t q = 0; q < 4; q++) OK(lg_session_sync(s, q, prompt.data, len[q], err));
        for (int step = 0; step < 40; step++) {
            int32_t seqs[4], ids[4], n = 0;
            for (int32_t q = 3; q >= 0; q--) /* not in order; each rests now and then */
                if ((step + q) % 3 || step < 5) {
                    seqs[n] = q;
                    ids[n++] = prompt.data[len[q]++];
                }
            OK(lg_session_step(s, seqs, ids, n, err));
            for (int32_t j = 0; j < n; j++) {
                assert_int_equal(lg_session_len(s, seqs[j]), len[seqs[j]]);
                row_is(s, seqs[j], &want, len[seqs[j]] - 1, "ragged step", fx_devices[d]);
            }
        }
        const int32_t twice[2] = { 1, 1 };
        lg_error e;
        assert_int_not_equal(lg_session_step(s, twice, twice, 2, &e), LG_OK);
        lg_session_free(s);

        /* Generation in a batch, with more prompts than sequences. */
        lg_ids greedy = fx_ids("tiny-llama", "ref/greedy.txt");
        lg_ids prompts[5];
        lg_generate_params g[5];
        lg_generation single[5] = { 0 }, batch[5] = { 0 };
        p.n_seq_max = 2;
        s = fx_session(m, p);
        for (int i = 0; i < 5; i++) {
            prompts[i] = (lg_ids){ .data = prompt.data, .n = (int64_t[]){ 200, 17, 64, 1, 130 }[i] };
            lg_generate_defaults(&g[i]);
            g[i].n_max = (int64_t[]){ 32, 20, 1, 32, 9 }[i];
            g[i].n_stop_ids = 0;
            OK(lg_generate(s, 0, prompts[i].data, prompts[i].n, &g[i], &single[i], err));
        }
        OK(lg_generate_batch(s, prompts, g, 5, batch, err));
        for (int i = 0; i < 5; i++) {
            assert_int_equal(batch[i].ids.n, g[i].n_max);
            assert_int_equal(single[i].ids.n, g[i].n_max);
            assert_memory_equal(batch[i].ids.data, single[i].ids.data, (size_t)g[i].n_max * sizeof(int32_t));
            assert_string_equal(batch[i].text.data, single[i].text.data);
        }
        assert_memory_equal(batch[0].ids.data, greedy.data, N_GREEDY * sizeof(int32_t));
        for (int i = 0; i < 5; i++) {
            lg_generation_free(&single[i]);
            lg_generation_free(&batch[i]);
        }
        lg_ids_free(&greedy);
        lg_session_free(s);
        fx_array_free(&want);
        lg_ids_free(&prompt);
        lg_model_free(m);
    }
}

static int64_t prefilled(lg_session *s) {
    lg_stats t;
    lg_session_stats(s, &t);
    lg_session_stats_reset(s);
    return t.prefill_tokens;
}

static void test_prefix_rewind_fork(void **state) {
    (void)state;
    for (int d = 0; d < FX_N_DEVICE; d++) {
        const char *device = fx_devices[d];
        lg_model *m = fx_model("tiny-llama", device);
        lg_ids prompt = fx_ids("tiny-llama", "ref/prompt.txt");
        fx_array want = fx_ref("tiny-llama", "ref/logits.npy");
        lg_session_params p = plain();
        p.n_seq_max = 3;
        p.chunk = 48;
        lg_session *s = fx_session(m, p);
        int32_t other[N_PROMPT];
        memcpy(other, prompt.data, sizeof other);
        for (int i = 100; i < N_PROMPT; i++) other[i] = (prompt.data[i] + 1 + i % 7) % 300;

        /* Prefixes are kept: only what is new is evaluated. */
        OK(lg_session_sync(s, 0, prompt.data, 130, err));
        assert_int_equal(prefilled(s), 130);
        row_is(s, 0, &want, 129, "sync", device);
        OK(lg_session_sync(s, 0, prompt.data, 130, err));
        assert_int_equal(prefilled(s), 0);
        OK(lg_session_sync(s, 0, prompt.data, 160, err));
        assert_int_equal(prefilled(s), 30);
        row_is(s, 0, &want, 159, "extended", device);
        OK(lg_session_sync(s, 0, prompt.data, 120, err));
        assert_int_equal(prefilled(s), 1);
        assert_int_equal(lg_session_len(s, 0), 120);
        row_is(s, 0, &want, 119, "shortened", device);
        OK(lg_session_sync(s, 0, other, 150, err));
        assert_int_equal(prefilled(s), 50);
        OK(lg_session_sync(s, 0, prompt.data, 150, err));
        assert_int_equal(prefilled(s), 50);
        row_is(s, 0, &want, 149, "back from another branch", device);

        /* Rewind: the kept part is as if nothing had followed. */
        OK(lg_session_rewind(s, 0, 65, err));
        assert_int_equal(lg_session_len(s, 0), 65);
        assert_null(lg_session_logits(s, 0));
        const int32_t seq[2] = { 0, 2 };
        OK(lg_session_step(s, seq, prompt.data + 65, 1, err));
        row_is(s, 0, &want, 65, "rewind", device);

        /* Fork in the middle of a page; both branches go on, neither sees the other. */
        OK(lg_session_sync(s, 0, prompt.data, 100, err));
        OK(lg_session_fork(s, 2, 0, err));
        assert_int_equal(lg_session_len(s, 2), 100);
        assert_memory_equal(lg_session_ids(s, 2), prompt.data, 100 * sizeof(int32_t));
        row_is(s, 2, &want, 99, "fork", device);
        float *branch = calloc((size_t)(20 * want.n_col), sizeof *branch);
        for (int i = 0; i < 20; i++) {
            const int32_t ids[2] = { prompt.data[100 + i], other[100 + i] };
            OK(lg_session_step(s, seq, ids, 2, err));
            row_is(s, 0, &want, 100 + i, "fork source", device);
            memcpy(branch + i * want.n_col, lg_session_logits(s, 2), (size_t)want.n_col * sizeof *branch);
        }
        lg_session *fresh = fx_session(m, plain());
        const fx_array copy = { .n_row = 20, .n_col = want.n_col, .f = branch };
        const lg_ids ids = { .data = other, .n = 120 };
        within(fx_eval(fresh, &ids, 100, &copy, 100, 1), F32_BOUND, "fork copy", "tiny-llama", device);
        OK(lg_session_sync(s, 0, other, 120, err)); /* the source may be overwritten */
        OK(lg_session_fork(s, 1, 2, err));
        OK(lg_session_rewind(s, 2, 64, err));
        OK(lg_session_step(s, seq + 1, prompt.data + 64, 1, err));
        row_is(s, 2, &want, 64, "rewound copy", device);
        assert_int_equal(lg_session_len(s, 1), 120);
        lg_session_free(fresh);
        free(branch);

        /* Limits, with both numbers. */
        int32_t many[300] = { 0 };
        lg_error e;
        assert_int_equal(lg_session_sync(s, 0, many, 300, &e), LG_ERR_LIMIT);
        assert_non_null(strstr(e.message, "300"));
        assert_non_null(strstr(e.message, "256"));
        many[5] = 320;
        assert_int_not_equal(lg_session_sync(s, 0, many, 10, &e), LG_OK);
        many[5] = -1;
        assert_int_not_equal(lg_session_sync(s, 0, many, 10, &e), LG_OK);
        assert_int_not_equal(lg_session_sync(s, 3, prompt.data, 10, &e), LG_OK);
        assert_int_not_equal(lg_session_sync(s, 0, prompt.data, 0, &e), LG_OK);
        OK(lg_session_sync(s, 0, prompt.data, 30, err)); /* and it goes on */
        row_is(s, 0, &want, 29, "after errors", device);
        OK(lg_session_sync(s, 0, prompt.data, 200, err));
        lg_session_params small = plain();
        small.n_ctx = 200;
        fresh = fx_session(m, small);
        OK(lg_session_sync(fresh, 0, prompt.data, 200, err)); /* exactly full */
        const int32_t zero = 0;
        assert_int_equal(lg_session_step(fresh, &zero, &zero, 1, &e), LG_ERR_LIMIT);
        row_is(fresh, 0, &want, 199, "full", device);
        lg_session_free(fresh);
        fx_array_free(&want);
        lg_ids_free(&prompt);
        lg_session_free(s);
        lg_model_free(m);
    }
}

static void write_file(const char *path, const char *data, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static void test_snapshot(void **state) {
    (void)state;
    static const lg_dtype kv[] = { LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16, LG_DTYPE_KV8 };
    const int32_t zero = 0;
    char path[512], bad[512];
    fx_temp(path, "snapshot");
    fx_temp(bad, "snapshot-bad");
    for (int d = 0; d < FX_N_DEVICE; d++) {
        lg_model *m = fx_model("tiny-qwen2", fx_devices[d]);
        lg_ids prompt = fx_ids("tiny-qwen2", "ref/prompt.txt");
        for (int k = 0; k < 4; k++) {
            lg_session_params p = plain();
            p.kv = kv[k];
            lg_session *a = fx_session(m, p), *b = fx_session(m, p);
            lg_model_info info;
            lg_model_get_info(m, &info);
            const size_t row = (size_t)info.n_vocab * sizeof(float);
            OK(lg_session_sync(a, 0, prompt.data, 130, err));
            OK(lg_session_save(a, path, err));
            OK(lg_session_load(b, path, err));
            assert_int_equal(lg_session_len(b, 0), 130);
            assert_memory_equal(lg_session_ids(b, 0), prompt.data, 130 * sizeof(int32_t));
            for (int i = 130; i < 140; i++) { /* the same bits as without the file */
                OK(lg_session_step(a, &zero, prompt.data + i, 1, err));
                OK(lg_session_step(b, &zero, prompt.data + i, 1, err));
                assert_memory_equal(lg_session_logits(a, 0), lg_session_logits(b, 0), row);
            }
            /* Every kind of damage is refused and leaves the session as it was. */
            lg_text file = { 0 };
            OK(lg_file_read_all(&file, path, 1 << 26, err));
            OK(lg_session_sync(b, 0, prompt.data, 77, err));
            const int64_t at[] = { 0, 9, 50, 92, 100, 130, 139, 190, 700, file.n / 2, file.n - 9, file.n - 1 };
            for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
                lg_error e = { 0 };
                file.data[at[i]] = (char)(file.data[at[i]] ^ 0x10);
                write_file(bad, file.data, (size_t)file.n);
                file.data[at[i]] = (char)(file.data[at[i]] ^ 0x10);
                if (lg_session_load(b, bad, &e) == LG_OK) fail_msg("a snapshot with byte %lld flipped was taken", (long long)at[i]);
                assert_non_null(strstr(e.message, bad));
            }
            for (int64_t n = 0; n < file.n; n += 1 + n / 2) {
                lg_error e = { 0 };
                write_file(bad, file.data, (size_t)n);
                if (lg_session_load(b, bad, &e) == LG_OK) fail_msg("a snapshot cut to %lld bytes was taken", (long long)n);
            }
            lg_text_free(&file);
            lg_error e = { 0 };
            assert_int_not_equal(lg_session_load(b, "build/no-such-snapshot", &e), LG_OK);
            assert_int_equal(lg_session_len(b, 0), 77);
            assert_memory_equal(lg_session_ids(b, 0), prompt.data, 77 * sizeof(int32_t));
            OK(lg_session_step(b, &zero, prompt.data + 77, 1, err));
            lg_session *c = fx_session(m, p); /* the same way to the same state, without the refused files */
            OK(lg_session_sync(c, 0, prompt.data, 130, err));
            OK(lg_session_sync(c, 0, prompt.data, 77, err));
            OK(lg_session_step(c, &zero, prompt.data + 77, 1, err));
            assert_memory_equal(lg_session_logits(b, 0), lg_session_logits(c, 0), row);
            /* Another cache dtype, another window, another model. */
            lg_session_params q = p;
            q.kv = kv[(k + 1) % 4];
            lg_session *x = fx_session(m, q);
            assert_int_not_equal(lg_session_load(x, path, &e), LG_OK);
            lg_session_free(x);
            q = p;
            q.n_ctx = 100;
            x = fx_session(m, q);
            assert_int_equal(lg_session_load(x, path, &e), LG_ERR_LIMIT);
            lg_session_free(x);
            lg_model *foreign = fx_model("tiny-llama", fx_devices[d]);
            x = fx_session(foreign, p);
            assert_int_equal(lg_session_load(x, path, &e), LG_ERR_MISMATCH);
            lg_session_free(x);
            lg_model_free(foreign);
            lg_session_free(a);
            lg_session_free(b);
            lg_session_free(c);
        }
        unlink(path);
        unlink(bad);
        lg_ids_free(&prompt);
        lg_model_free(m);
    }
}

/* ---- tokenizers of the three families, from the folder and from the GGUF made of it ---- */
static void ids_equal(const lg_ids *got, const lg_json *want, const char *model, const char *what, const char *text) {
    bool same = got->n == lg_json_size(want);
    for (int64_t i = 0; same && i < got->n; i++) {
        int64_t id = -1;
        same = lg_json_int(lg_json_at(want, i), &id) && id == got->data[i];
    }
    if (!same) fail_msg("%s, %s: other ids than tokenizers gives for \"%s\"", model, what, text);
}

static void tokens_equal(lg_model *m, const char *model, const char *source) {
    char path[512], what[64];
    lg_json *root = NULL;
    OK(lg_json_load(&root, fx_path(path, model, "ref/tokens.json"), 1 << 20, err));
    const lg_json *texts = lg_json_get(root, "texts"), *chats = lg_json_get(root, "chats");
    static const struct { unsigned flags; const char *key; } kind[] = { { 0, "ids" }, { LG_TOK_SPECIAL, "special_ids" }, { LG_TOK_SPECIAL | LG_TOK_BOS, "bos_ids" } };
    assert_true(lg_json_size(texts) > 10 && lg_json_size(chats) == 2);
    for (int64_t i = 0; i < lg_json_size(texts); i++) {
        int64_t n = 0;
        const char *text = lg_json_str(lg_json_get(lg_json_at(texts, i), "text"), &n);
        for (int k = 0; k < 3; k++) {
            lg_ids got = { 0 };
            lg_text back = { 0 };
            snprintf(what, sizeof what, "%s, %s", source, kind[k].key);
            OK(lg_tokenize(m, text, n, kind[k].flags, &got, err));
            ids_equal(&got, lg_json_get(lg_json_at(texts, i), kind[k].key), model, what, text);
            if (k == 0) { /* plain ids give the text back; "e" and a combining accent become one letter in Qwen */
                OK(lg_detokenize(m, got.data, got.n, LG_TOK_SPECIAL, &back, err));
                if (!strstr(text, "\xcc\x81") && (back.n != n || memcmp(back.data, text, (size_t)n)))
                    fail_msg("%s, %s: \"%s\" does not come back", model, source, text);
                lg_text_free(&back);
            }
            lg_ids_free(&got);
        }
    }
    for (int64_t i = 0; i < lg_json_size(chats); i++) {
        const lg_json *turns = lg_json_get(lg_json_at(chats, i), "turns");
        lg_chat_turn turn[8];
        lg_ids got = { 0 };
        for (int64_t t = 0; t < lg_json_size(turns); t++)
            turn[t] = (lg_chat_turn){ lg_json_str(lg_json_get(lg_json_at(turns, t), "role"), NULL),
                                      lg_json_str(lg_json_get(lg_json_at(turns, t), "content"), NULL) };
        OK(lg_chat_tokenize(m, turn, lg_json_size(turns), true, &got, err));
        snprintf(what, sizeof what, "%s, chat", source);
        ids_equal(&got, lg_json_get(lg_json_at(chats, i), "ids"), model, what, turn[0].content);
        lg_ids_free(&got);
    }
    lg_json_free(root);
}

static void test_tokens(void **state) {
    (void)state;
    char folder[512], path[512];
    for (int i = 0; i < N_MODEL; i++) {
        OK(lg_convert(fx_path(folder, models[i], ""), fx_temp(path, "tok.gguf"), LG_DTYPE_F32, NULL, NULL, err));
        for (int g = 0; g < 2; g++) {
            lg_model *m = NULL;
            const lg_model_params p = { .path = g ? path : folder, .vocab_only = true };
            OK(lg_model_open(&m, &p, err));
            tokens_equal(m, models[i], g ? "GGUF" : "folder");
            lg_model_free(m);
        }
        unlink(path);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits), cmocka_unit_test(test_chunks), cmocka_unit_test(test_convert),
        cmocka_unit_test(test_auto),   cmocka_unit_test(test_kv),     cmocka_unit_test(test_ragged),
        cmocka_unit_test(test_prefix_rewind_fork), cmocka_unit_test(test_snapshot), cmocka_unit_test(test_tokens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
