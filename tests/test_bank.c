/* Bank files: what is written is read back; interrupted builds and appends end in the same contents; nothing damaged is accepted.
 * `test_bank --build PATH N_TOKENS` builds one bank slowly and ends (for tests/bank_kill.sh). */
#include "bank_double.h"
#include <fcntl.h>
#include <sys/stat.h>

static lg_model *model;

static int setup(void **state) {
    (void)state;
    model = fx_model("tiny-qwen2", "cpu");
    return 0;
}
static int teardown(void **state) {
    (void)state;
    lg_model_free(model);
    return 0;
}

static lg_text slurp(const char *path) {
    lg_text t = { 0 };
    OK(lg_file_read_all(&t, path, 1 << 30, err));
    return t;
}
static void spill(const char *path, const char *data, int64_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, (size_t)n, f), n);
    fclose(f);
}
static bool same_file(const char *a, const char *b) {
    lg_text x = slurp(a), y = slurp(b);
    const bool same = x.n == y.n && !memcmp(x.data, y.data, (size_t)x.n);
    lg_text_free(&x);
    lg_text_free(&y);
    return same;
}

/* Same ids, chunks, byte ranges and slots, bit for bit; the places in the file may differ. */
static void assert_equal_contents(const char *a, const char *b) {
    lg_bank *x, *y;
    lg_bank_info i, j;
    OK(lg_bank_open(&x, a, err));
    OK(lg_bank_open(&y, b, err));
    OK(lg_bank_verify(x, err));
    OK(lg_bank_verify(y, err));
    lg_bank_get_info(x, &i);
    lg_bank_get_info(y, &j);
    j.file_bytes = i.file_bytes;
    assert_memory_equal(&i, &j, sizeof i);
    assert_memory_equal(lg_bank_ids(x), lg_bank_ids(y), (size_t)i.n_tokens * 4);
    for (int64_t c = 0; c < i.n_chunk; c++) {
        lg_bank_chunk p, q;
        OK(lg_bank_get_chunk(x, c, &p, err));
        OK(lg_bank_get_chunk(y, c, &q, err));
        assert_memory_equal(&p, &q, sizeof p);
        assert_int_equal(x->chunk[c].hash, y->chunk[c].hash);
        assert_memory_equal(x->map.data + x->chunk[c].at, y->map.data + y->chunk[c].at, (size_t)x->chunk[c].bytes);
    }
    lg_bank_close(x);
    lg_bank_close(y);
}

static void test_reads_back(void **state) {
    (void)state;
    static const lg_dtype dtypes[] = { LG_DTYPE_F32, LG_DTYPE_BF16, LG_DTYPE_KV8 };
    char path[512];
    fx_temp(path, "bank");
    const lg_config *g = &model->cfg;
    for (int d = 0; d < 3; d++)
        for (int64_t n = 1; n < 300; n = n * 2 + 1) {
            int32_t *ids = double_ids(model, n, 7);
            lg_bank_params p = double_params();
            lg_bank *b;
            lg_bank_info info;
            p.slots = dtypes[d];
            OK(lg_bank_build_ids(model, &p, ids, n, path, err));
            OK(lg_bank_open(&b, path, err));
            OK(lg_bank_verify(b, err));
            OK(lg_bank_fits(b, model, err));
            lg_bank_get_info(b, &info);
            assert_int_equal(info.n_tokens, n);
            assert_int_equal(info.n_chunk, (n + 31) / 32);
            assert_int_equal(info.slots_dtype, dtypes[d]);
            assert_memory_equal(lg_bank_ids(b), ids, (size_t)n * 4);
            for (int64_t c = 0; c < info.n_chunk; c++) {
                lg_bank_chunk x;
                OK(lg_bank_get_chunk(b, c, &x, err));
                assert_int_equal(x.token_begin, c * 32);
                assert_int_equal(x.token_end, c * 32 + 32 < n ? c * 32 + 32 : n);
                assert_int_equal(x.slots, (x.token_end - x.token_begin + 3) / 4);
                assert_int_equal(x.byte_begin, -1);
                const int64_t row = g->n_head_kv * g->head_dim, all = g->n_layer * x.slots * row;
                const int64_t g0 = c / 3 * 3, batch = info.n_chunk - g0 < 3 ? info.n_chunk - g0 : 3;
                float *k = calloc((size_t)all, 4), *v = calloc((size_t)all, 4);
                OK(lg_bank_read(b, c, k, v, err));
                for (int64_t l = 0; l < g->n_layer; l++)
                    for (int64_t s = 0; s < x.slots; s++)
                        for (int64_t i = 0; i < row; i++) {
                            const int64_t at = x.token_begin + 4 * s, len = n - at < 4 ? n - at : 4;
                            const float want = double_value(1, l, s, i, ids + at, len, c - g0, batch), got = v[(l * x.slots + s) * row + i];
                            const float bound = d == 0 ? 0 : d == 1 ? 0x1p-8f : 0.0045f; /* half a step of amax/127, and the f16 scale */
                            if (fabsf(got - want) > bound) fail_msg("dtype %d chunk %lld: V %g, wanted %g", d, (long long)c, (double)got, (double)want);
                            if (d == 0) assert_true(k[(l * x.slots + s) * row + i] == double_value(0, l, s, i, ids + at, len, c - g0, batch));
                        }
                free(k);
                free(v);
            }
            lg_error e;
            lg_bank_chunk none;
            assert_int_equal(lg_bank_get_chunk(b, info.n_chunk, &none, &e), LG_ERR_LIMIT);
            assert_int_equal(lg_bank_get_chunk(b, -1, &none, &e), LG_ERR_LIMIT);
            lg_bank_close(b);
            free(ids);
        }
    unlink(path);
}

static bool stop_at(void *user, const char *what, int64_t done, int64_t total) {
    (void)what;
    (void)total;
    return done < *(const int64_t *)user;
}

static void test_resume(void **state) {
    (void)state;
    char path[512], want[512], part[520];
    fx_temp(path, "resume");
    fx_temp(want, "whole");
    snprintf(part, sizeof part, "%s.part", path);
    enum { N = 700 }; /* 22 chunks, 8 groups, both last ones short */
    int32_t *ids = double_ids(model, N, 3);
    lg_bank_params p = double_params();
    lg_error e;
    lg_memory_bank_overlap = 1;
    OK(lg_bank_build_ids(model, &p, ids, N, path, err));
    lg_memory_bank_overlap = 0;
    OK(lg_bank_build_ids(model, &p, ids, N, want, err));
    assert_true(same_file(path, want));
    for (int64_t stop = 0; stop <= N; stop += 96) {
        lg_memory_bank_overlap = (int)(stop / 96 % 2);
        p.progress = stop_at;
        p.progress_user = &stop;
        unlink(path);
        assert_int_equal(lg_bank_build_ids(model, &p, ids, N, path, &e), LG_ERR_CANCELLED);
        assert_int_equal(access(path, F_OK), -1);
        p.progress = NULL;
        double_calls = 0;
        OK(lg_bank_build_ids(model, &p, ids, N, path, err));
        assert_int_equal(double_calls, 8 - stop / 96); /* what was finished is not done again */
        assert_true(same_file(path, want));
        assert_int_equal(access(part, F_OK), -1);
    }
    /* Another document's part is not continued; a part with damaged data goes back to the damaged group. */
    int64_t stop = 480;
    p.progress = stop_at;
    p.progress_user = &stop;
    assert_int_equal(lg_bank_build_ids(model, &p, ids, N, path, &e), LG_ERR_CANCELLED);
    lg_text t = slurp(part);
    t.data[LG_BANK_DATA + lg_bank_align(4 * N) + 200] ^= 1;
    spill(part, t.data, t.n);
    lg_text_free(&t);
    p.progress = NULL;
    double_calls = 0;
    OK(lg_bank_build_ids(model, &p, ids, N, path, err));
    assert_int_equal(double_calls, 8);
    assert_true(same_file(path, want));
    p.progress = stop_at;
    assert_int_equal(lg_bank_build_ids(model, &p, ids, N, path, &e), LG_ERR_CANCELLED);
    p.progress = NULL;
    ids[3] ^= 1;
    OK(lg_bank_build_ids(model, &p, ids, N, path, err));
    ids[3] ^= 1;
    assert_false(same_file(path, want));
    lg_memory_bank_overlap = -1;
    free(ids);
    unlink(path);
    unlink(want);
}

/* Every allocation of a build fails in turn: an error, and the next build is whole. */
static void test_no_memory(void **state) {
    (void)state;
    char path[512], want[512];
    fx_temp(path, "nomem");
    fx_temp(want, "nomem-whole");
    int32_t *ids = double_ids(model, 200, 3);
    const lg_bank_params p = double_params();
    OK(lg_bank_build_ids(model, &p, ids, 200, want, err));
    int64_t failed = 0;
    for (int64_t nth = 1; nth < 200; nth++) {
        lg_error e = { 0 };
        lg_memory_bank_overlap = (int)(nth % 2);
        lg_base_alloc_fail_at(nth);
        const lg_status st = lg_bank_build_ids(model, &p, ids, 200, path, &e);
        lg_base_alloc_fail_at(0);
        lg_memory_bank_overlap = -1;
        if (st == LG_OK) break;
        assert_int_equal(st, LG_ERR_NOMEM);
        failed++;
    }
    assert_true(failed > 5);
    assert_true(same_file(path, want));
    for (int64_t nth = 1; nth < 20; nth++) {
        lg_bank *b;
        lg_error e = { 0 };
        lg_base_alloc_fail_at(nth);
        const lg_status st = lg_bank_open(&b, path, &e);
        lg_base_alloc_fail_at(0);
        if (st == LG_OK) {
            lg_bank_close(b);
            break;
        }
        assert_int_equal(st, LG_ERR_NOMEM);
    }
    free(ids);
    unlink(path);
    unlink(want);
}

static void test_append(void **state) {
    (void)state;
    char path[512], want[512];
    fx_temp(path, "append");
    fx_temp(want, "joined");
    enum { N = 900 };
    int32_t *ids = double_ids(model, N, 5);
    const lg_bank_params p = double_params();
    static const int64_t cuts[][4] = { { 1, 900 }, { 31, 32, 33, 900 }, { 96, 192, 900 }, { 100, 150, 899, 900 }, { 64, 65, 300, 900 } };
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        OK(lg_bank_build_ids(model, &p, ids, cuts[i][0], path, err));
        for (int j = 1; j < 4 && cuts[i][j]; j++) {
            OK(lg_bank_append_ids(model, path, ids + cuts[i][j - 1], cuts[i][j] - cuts[i][j - 1], NULL, NULL, err));
            OK(lg_bank_build_ids(model, &p, ids, cuts[i][j], want, err));
            assert_equal_contents(path, want);
        }
    }
    /* A log: many small appends, past the number of id extents that one table may have. */
    OK(lg_bank_build_ids(model, &p, ids, 5, path, err));
    for (int64_t n = 5; n < 5 + 8 * 80; n += 8) OK(lg_bank_append_ids(model, path, ids + n, 8, NULL, NULL, err));
    OK(lg_bank_build_ids(model, &p, ids, 645, want, err));
    assert_equal_contents(path, want);
    OK(lg_bank_append_ids(model, path, ids, 0, NULL, NULL, err)); /* nothing: nothing happens */
    assert_equal_contents(path, want);
    free(ids);
    unlink(path);
    unlink(want);
}

static void test_interrupted_append(void **state) {
    (void)state;
    char path[512], want[512], before[512];
    fx_temp(path, "torn");
    fx_temp(want, "torn-joined");
    fx_temp(before, "torn-before");
    enum { N = 700, OLD = 250 };
    int32_t *ids = double_ids(model, N, 5);
    lg_bank_params p = double_params();
    lg_error e;
    lg_bank *b;
    OK(lg_bank_build_ids(model, &p, ids, OLD, before, err));
    OK(lg_bank_build_ids(model, &p, ids, N, want, err));
    lg_text whole = slurp(before);
    for (int64_t stop = 192; stop < N; stop += 96) {
        spill(path, whole.data, whole.n);
        assert_int_equal(lg_bank_append_ids(model, path, ids + OLD, N - OLD, stop_at, &stop, &e), LG_ERR_CANCELLED);
        assert_equal_contents(path, before); /* the old bank stands; `verify` passes over what lies behind its end */
        OK(lg_bank_append_ids(model, path, ids + OLD, N - OLD, NULL, NULL, err));
        assert_equal_contents(path, want);
    }
    /* A header slot torn while it was written: the old bank is read, verify names the slot, the next append repairs it. */
    lg_text t = slurp(path);
    for (int64_t keep = 1; keep < 512; keep += 37) {
        char copy[LG_BANK_SLOT];
        memcpy(copy, t.data + LG_BANK_SLOT, sizeof copy);
        memset(t.data + LG_BANK_SLOT + keep, 0, (size_t)(LG_BANK_SLOT - keep));
        spill(path, t.data, t.n);
        memcpy(t.data + LG_BANK_SLOT, copy, sizeof copy);
        OK(lg_bank_open(&b, path, err));
        assert_int_equal(b->h.n_tokens, OLD);
        assert_int_equal(lg_bank_verify(b, &e), LG_ERR_FORMAT);
        lg_bank_close(b);
        OK(lg_bank_append_ids(model, path, ids + OLD, N - OLD, NULL, NULL, err));
        assert_equal_contents(path, want);
    }
    lg_text_free(&t);
    lg_text_free(&whole);
    free(ids);
    unlink(path);
    unlink(want);
    unlink(before);
}

/* Byte ranges tile the text; where the tokenizer changes nothing, a chunk's bytes are what its ids spell. */
static void check_ranges(const char *path, const char *text, int64_t n, bool exact) {
    lg_bank *b;
    int64_t at = 0;
    OK(lg_bank_open(&b, path, err));
    for (int64_t c = 0; c < b->h.n_chunk; c++) {
        lg_bank_chunk x;
        OK(lg_bank_get_chunk(b, c, &x, err));
        assert_int_equal(x.byte_begin, at);
        at = x.byte_end;
        if (!exact) continue;
        lg_text t = { 0 };
        OK(lg_detokenize(model, lg_bank_ids(b) + x.token_begin, x.token_end - x.token_begin, LG_TOK_SPECIAL, &t, err));
        assert_int_equal(t.n, x.byte_end - x.byte_begin);
        assert_memory_equal(t.data, text + x.byte_begin, (size_t)t.n);
        lg_text_free(&t);
    }
    assert_int_equal(at, n);
    lg_bank_close(b);
}

static void test_byte_ranges(void **state) {
    (void)state;
    char path[512], want[512];
    fx_temp(path, "bytes");
    fx_temp(want, "bytes-joined");
    const lg_bank_params p = double_params();
    lg_text plain = { 0 }, odd = { 0 };
    for (int i = 0; i < 60; i++) {
        lg_base_text_printf(&plain, "Line %d: the \xc3\xa9t\xc3\xa9 of \xe4\xb8\xad\xe6\x96\x87 and \xf0\x9f\x98\x80, spaces   and\ttabs.\n", i);
        lg_base_text_printf(&odd, "bad \xff\xfe bytes %d, cut \xe4\xb8 here, e\xcc\x81 decomposed, \xe2\x84\xaa kelvin; ", i);
    }
    OK(lg_bank_build(model, &p, plain.data, plain.n, path, err));
    check_ranges(path, plain.data, plain.n, true);
    OK(lg_bank_build(model, &p, odd.data, odd.n, path, err));
    check_ranges(path, odd.data, odd.n, false);
    { /* each border inside the odd text lies where the line's number says */
        lg_bank *b;
        OK(lg_bank_open(&b, path, err));
        assert_true(b->h.n_chunk > 20);
        for (int64_t c = 1; c < b->h.n_chunk; c++) {
            lg_bank_chunk x;
            lg_text a = { 0 }, s = { 0 };
            OK(lg_bank_get_chunk(b, c, &x, err));
            OK(lg_detokenize(model, lg_bank_ids(b), x.token_begin, LG_TOK_SPECIAL, &a, err)); /* what the ids before spell */
            int commas = 0, want_commas = 0;
            for (int64_t i = 0; i < a.n; i++) commas += a.data[i] == ',' || a.data[i] == ';';
            for (int64_t i = 0; i < x.byte_begin; i++) want_commas += odd.data[i] == ',' || odd.data[i] == ';';
            assert_int_equal(commas, want_commas);
            lg_text_free(&a);
            lg_text_free(&s);
        }
        lg_bank_close(b);
    }
    /* Text appended to text goes on where the old one ends; a token never spans the seam, so cuts fall between lines. */
    for (int64_t cut = 0, lines = 0; cut < plain.n; cut++) {
        if (plain.data[cut] != '\n' || ++lines % 13) continue;
        OK(lg_bank_build(model, &p, plain.data, cut + 1, path, err));
        if (cut + 1 < plain.n) OK(lg_bank_append(model, path, plain.data + cut + 1, plain.n - cut - 1, NULL, NULL, err));
        check_ranges(path, plain.data, plain.n, true);
        lg_bank *b;
        OK(lg_bank_open(&b, path, err));
        OK(lg_bank_verify(b, err));
        OK(lg_bank_build_ids(model, &p, lg_bank_ids(b), b->h.n_tokens, want, err));
        lg_bank *c;
        OK(lg_bank_open(&c, want, err));
        for (int64_t i = 0; i < b->h.n_chunk; i++) assert_int_equal(b->chunk[i].hash, c->chunk[i].hash);
        lg_bank_close(b);
        lg_bank_close(c);
    }
    /* Ids appended to text: chunks that hold them have no range, the rest keeps theirs. */
    OK(lg_bank_build(model, &p, plain.data, plain.n, path, err));
    int32_t *ids = double_ids(model, 100, 1);
    OK(lg_bank_append_ids(model, path, ids, 100, NULL, NULL, err));
    lg_bank *b;
    OK(lg_bank_open(&b, path, err));
    OK(lg_bank_verify(b, err));
    assert_int_equal(b->chunk[0].byte_begin, 0);
    assert_int_equal(b->chunk[b->h.n_chunk - 1].byte_begin, -1);
    lg_bank_close(b);
    OK(lg_bank_append(model, path, plain.data, plain.n, NULL, NULL, err)); /* and text behind them */
    OK(lg_bank_open(&b, path, err));
    OK(lg_bank_verify(b, err));
    assert_int_equal(b->chunk[b->h.n_chunk - 1].byte_end, 2 * plain.n);
    lg_bank_close(b);
    /* In memory, without slots. */
    OK(lg_bank_plain(&b, model, plain.data, plain.n, 32, err));
    OK(lg_bank_verify(b, err));
    assert_int_equal(b->chunk[b->h.n_chunk - 1].byte_end, plain.n);
    lg_error e;
    float x;
    assert_int_equal(lg_bank_read(b, 0, &x, &x, &e), LG_ERR_USAGE);
    lg_bank_close(b);
    free(ids);
    lg_text_free(&plain);
    lg_text_free(&odd);
    unlink(path);
    unlink(want);
}

static void test_refuses(void **state) {
    (void)state;
    char path[512];
    fx_temp(path, "refused");
    int32_t *ids = double_ids(model, 200, 3);
    lg_error e;
    lg_bank *b;
    static const struct { int64_t chunk, window, ratio, group; } bad[] = { { 32, 24, 4, 1 }, { 32, 16, 3, 1 }, { -1, 16, 4, 1 }, { 32, 16, -4, 1 },
                                                                         { 32, -16, 4, 1 }, { 32, 16, 4, -1 }, { (int64_t)1 << 40, 16, 4, 1 } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        lg_bank_params p = double_params();
        p.chunk = bad[i].chunk;
        p.window = bad[i].window;
        p.ratio = bad[i].ratio;
        p.group = bad[i].group;
        assert_int_equal(lg_bank_build_ids(model, &p, ids, 200, path, &e), LG_ERR_USAGE);
        assert_int_equal(access(path, F_OK), -1);
    }
    lg_bank_params p = double_params();
    assert_int_equal(lg_bank_build_ids(model, &p, ids, 0, path, &e), LG_ERR_LIMIT);
    assert_int_equal(lg_bank_build(model, &p, "", 0, path, &e), LG_ERR_LIMIT);
    ids[100] = (int32_t)model->cfg.n_vocab;
    assert_int_equal(lg_bank_build_ids(model, &p, ids, 200, path, &e), LG_ERR_LIMIT);
    assert_non_null(strstr(e.message, "100"));
    ids[100] = 0;
    assert_int_equal(lg_bank_build_ids(model, &p, ids, 200, "build/no/such/folder/x", &e), LG_ERR_IO);
    assert_int_equal(lg_bank_open(&b, path, &e), LG_ERR_IO);
    spill(path, "LGBANK", 6);
    assert_int_equal(lg_bank_open(&b, path, &e), LG_ERR_FORMAT);
    spill(path, "", 0);
    assert_int_equal(lg_bank_open(&b, path, &e), LG_ERR_FORMAT);
    assert_int_equal(lg_bank_open(&b, FIXTURES "tiny-qwen2/model-00001-of-00003.safetensors", &e), LG_ERR_FORMAT);
    /* A bank of another model. */
    OK(lg_bank_build_ids(model, &p, ids, 200, path, err));
    lg_model *other = fx_model("tiny-llama", "cpu");
    OK(lg_bank_open(&b, path, err));
    assert_int_equal(lg_bank_fits(b, other, &e), LG_ERR_MISMATCH);
    lg_bank_close(b);
    assert_int_equal(lg_bank_append_ids(other, path, ids, 10, NULL, NULL, &e), LG_ERR_MISMATCH);
    lg_model_free(other);
    free(ids);
    unlink(path);
}

static void test_every_truncation(void **state) {
    (void)state;
    char path[512];
    fx_temp(path, "cut");
    int32_t *ids = double_ids(model, 70, 3);
    lg_bank_params p = double_params();
    p.slots = LG_DTYPE_KV8;
    OK(lg_bank_build_ids(model, &p, ids, 40, path, err));
    for (int round = 0; round < 2; round++) {
        lg_text t = slurp(path);
        spill(path, t.data, t.n);
        for (int64_t n = t.n - 1; n >= 0; n--) {
            lg_bank *b;
            lg_error e = { 0 };
            assert_int_equal(truncate(path, (off_t)n), 0);
            if (lg_bank_open(&b, path, &e) != LG_ERR_FORMAT) fail_msg("%lld of %lld bytes: accepted", (long long)n, (long long)t.n);
            assert_non_null(strstr(e.message, path));
        }
        spill(path, t.data, t.n);
        lg_text_free(&t);
        if (!round) OK(lg_bank_append_ids(model, path, ids + 40, 30, NULL, NULL, err));
    }
    free(ids);
    unlink(path);
}

int main(int argc, char **argv) {
    if (argc == 4 && !strcmp(argv[1], "--build")) {
        const int64_t n = atoll(argv[3]);
        model = fx_model("tiny-qwen2", "cpu");
        int32_t *ids = double_ids(model, n, 11);
        const lg_bank_params p = double_params();
        lg_error e = { 0 };
        double_delay_us = 1000;
        const lg_status st = lg_bank_build_ids(model, &p, ids, n, argv[2], &e);
        if (st != LG_OK) fprintf(stderr, "%s\n", e.message);
        fprintf(stderr, "%lld groups\n", (long long)double_calls);
        free(ids);
        lg_model_free(model);
        return st != LG_OK;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reads_back), cmocka_unit_test(test_resume), cmocka_unit_test(test_no_memory), cmocka_unit_test(test_append),
        cmocka_unit_test(test_interrupted_append), cmocka_unit_test(test_byte_ranges), cmocka_unit_test(test_refuses), cmocka_unit_test(test_every_truncation),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
