/* Damaged model and snapshot files: flipped bits, cut ends, pieces taken out or put in, and every length, count, type and
 * offset field set to values that overflow. What is refused names the file and the place; what opens generates without
 * harm (the sanitizers watch); neither may ask for more memory than the good file can justify. LONGAN_SEEDS: seeds a case. */
#include "fixture.h"
#include <sys/stat.h>
#include <xxhash.h>
#include "model/model.h"
#include "mutate.h"

#define MODEL FIXTURES "tiny-qwen2/"
static const char *const folder_files[] = { "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
                                            "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json" };
enum { N_FILE = sizeof folder_files / sizeof *folder_files, N_SHARD = 3, N_JSON_FROM = 3 };

static uint64_t seed_now;
#define SEED_FAIL(...)                                                   \
    do {                                                                 \
        print_message("seed %llu\n", (unsigned long long)seed_now);      \
        fail_msg(__VA_ARGS__);                                           \
    } while (0)

/* The file or folder, and where in it. */
static void says_where(const lg_error *e, lg_status st) {
    static const char *const place[] = { "offset ", "key \"", "tensor ", "line ", "token", "vocab", "merges", "layers", "heads", "size ", "context length", "norm epsilon", "type",
                                         "nested", "output matrix", "processor", "normalizer", "decoder", "pattern", "id ", "ids", "add", "bytes" };
    if (e->code != st || !strstr(e->message, fx_dir)) SEED_FAIL("status %d without the file's name: \"%s\"", st, e->message);
    if (st == LG_ERR_IO || e->offset >= 0) return;
    for (size_t i = 0; i < sizeof place / sizeof *place; i++)
        if (strstr(e->message, place[i])) return;
    SEED_FAIL("status %d without a place: \"%s\"", st, e->message);
}

static void one_generate(lg_session *s, int64_t n_vocab) {
    const int32_t prompt[] = { 1, 2, (int32_t)(n_vocab - 1) };
    lg_generate_params g;
    lg_generation out = { 0 };
    lg_error e = { 0 };
    lg_generate_defaults(&g);
    g.n_max = 3;
    const lg_status st = lg_generate(s, 0, prompt, n_vocab > 2 ? 3 : 1, &g, &out, &e);
    if (st != LG_OK) SEED_FAIL("generate: %d \"%s\"", st, e.message);
    for (int64_t i = 0; i < out.ids.n; i++) assert_in_range(out.ids.data[i], 0, n_vocab - 1);
    lg_generation_free(&out);
}

/* Opens and uses what opens. True when it opened. */
static bool use_model(const char *path, int64_t most) {
    lg_model *m = NULL;
    lg_session *s = NULL;
    lg_error e = { 0 };
    const lg_model_params p = { .path = path, .n_threads = 1 };
    lg_base_alloc_sum();
    const lg_status st = lg_model_open(&m, &p, &e);
    if (st == LG_OK) {
        lg_model_info info;
        lg_session_params sp;
        lg_model_get_info(m, &info);
        lg_session_defaults(&sp);
        sp.n_ctx = info.n_ctx_train < 32 ? info.n_ctx_train : 32;
        if (sp.n_ctx >= 8) {
            if (lg_session_new(&s, m, &sp, &e) != LG_OK) SEED_FAIL("session: %s", e.message);
            one_generate(s, info.n_vocab);
        }
        lg_session_free(s);
    } else {
        assert_null(m);
        says_where(&e, st);
    }
    lg_model_free(m);
    const int64_t sum = lg_base_alloc_sum();
    if (sum > most) SEED_FAIL("%lld bytes asked for, at most %lld", (long long)sum, (long long)most);
    return st == LG_OK;
}

/* ---- changes to bytes ---- */
typedef struct field { int64_t at; int width; } field; /* a little-endian number that means a size, count, type or place */
enum { MAX_FIELD = 4096 };
typedef struct fields { field f[MAX_FIELD]; int n; int64_t header; } fields; /* header: where data begin */

static uint64_t get(const lg_text *t, int64_t at, int width) {
    uint64_t v = 0;
    memcpy(&v, t->data + at, (size_t)width);
    return v;
}
static void put_field(lg_text *t, field f, uint64_t seed, uint64_t *at) {
    const uint64_t v = get(t, f.at, f.width), n = (uint64_t)t->n;
    const uint64_t to[] = { 0, 1, 2, v - 1, v + 1, v * 2, v / 2, v + 32, INT32_MAX, UINT64_C(1) << 31, UINT32_MAX, UINT64_C(1) << 32, INT64_MAX, UINT64_C(1) << 63, UINT64_MAX,
                            UINT64_MAX - 7, n, n - (uint64_t)f.at, n - (uint64_t)f.at - 8, (uint64_t)below(seed, at, t->n), UINT64_MAX / 8, UINT64_MAX / 24 + 1, 255, 13 };
    const uint64_t w = to[below(seed, at, (int64_t)(sizeof to / sizeof *to))];
    memcpy(t->data + f.at, &w, (size_t)f.width);
}
/* Flips, cuts, pieces out and in: most of them in the first `header` bytes. */
static void damage(lg_text *t, int64_t header, uint64_t seed, uint64_t *at) {
    const int64_t range = below(seed, at, 8) ? header : t->n, i = below(seed, at, range < t->n ? range : t->n);
    int64_t n = 1 + below(seed, at, 16);
    if (n > t->n - i) n = t->n - i;
    switch (below(seed, at, 5)) {
    case 0:
    case 1: t->data[i] = (char)(t->data[i] ^ (1 << below(seed, at, 8))); break;
    case 2: t->n = i; break;
    case 3:
        memmove(t->data + i, t->data + i + n, (size_t)(t->n - i - n));
        t->n -= n;
        break;
    default: { /* a piece doubled */
        lg_text out = { 0 };
        assert_true(lg_base_text_append(&out, t->data, i + n) && lg_base_text_append(&out, t->data + i, t->n - i));
        lg_text_free(t);
        *t = out;
    }
    }
}

/* ---- GGUF ---- */
static void mark(fields *f, int64_t at, int width) {
    if (f->n < MAX_FIELD) f->f[f->n++] = (field){ at, width };
}
static int64_t skip_str(fields *f, const lg_text *t, int64_t at, bool keep) {
    if (keep) mark(f, at, 8);
    return at + 8 + (int64_t)get(t, at, 8);
}
static void walk_gguf(fields *f, const lg_text *t) {
    static const int width[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    const int64_t n_tensor = (int64_t)get(t, 8, 8), n_kv = (int64_t)get(t, 16, 8);
    int64_t at = 24;
    mark(f, 4, 4);
    for (int i = 0; i < 8; i++) mark(f, 8 + 8 * (i % 2), 8); /* the two counts more often */
    for (int64_t i = 0; i < n_kv; i++) {
        at = skip_str(f, t, at, true);
        int type = (int)get(t, at, 4);
        mark(f, at, 4);
        at += 4;
        int64_t n = 1;
        const bool list = type == 9;
        if (list) {
            type = (int)get(t, at, 4);
            n = (int64_t)get(t, at + 4, 8);
            mark(f, at, 4);
            mark(f, at + 4, 8);
            at += 12;
        }
        for (int64_t k = 0; k < n; k++) {
            if (type == 8) at = skip_str(f, t, at, k < 20);
            else {
                if (k < 20) mark(f, at, width[type]); /* values: heads, sizes, ids */
                at += width[type];
            }
        }
    }
    for (int64_t i = 0; i < n_tensor; i++) {
        at = skip_str(f, t, at, true);
        const int n_dim = (int)get(t, at, 4);
        mark(f, at, 4);
        for (int d = 0; d < n_dim; d++) mark(f, at + 4 + 8 * d, 8);
        at += 4 + 8 * n_dim;
        mark(f, at, 4);
        mark(f, at + 4, 8);
        at += 12;
    }
    f->header = at;
}

static void test_gguf(void **state) {
    (void)state;
    char path[128];
    lg_error e = { 0 };
    snprintf(path, sizeof path, "%s/model.gguf", fx_dir);
    if (lg_convert(FIXTURES "tiny-llama", path, LG_DTYPE_Q8_0, NULL, NULL, &e) != LG_OK) fail_msg("%s", e.message);
    lg_text good = load(path);
    fields *f = calloc(1, sizeof *f);
    assert_non_null(f);
    walk_gguf(f, &good);
    assert_in_range(f->n, 200, MAX_FIELD - 1);
    seed_now = UINT64_MAX;
    lg_base_alloc_sum();
    assert_true(use_model(path, INT64_MAX));
    lg_base_alloc_sum();
    int64_t opened = 0, n = n_seeds(1500);
    for (int64_t seed = 0; seed < n; seed++) {
        uint64_t at = 0;
        lg_text t = { 0 };
        seed_now = (uint64_t)seed;
        assert_true(lg_base_text_append(&t, good.data, good.n));
        for (int64_t k = below(seed_now, &at, 2); k >= 0 && t.n > 64; k--) {
            if (below(seed_now, &at, 2) && t.n == good.n) put_field(&t, f->f[below(seed_now, &at, f->n)], seed_now, &at);
            else damage(&t, f->header, seed_now, &at);
        }
        put_file("model.gguf", &t);
        opened += use_model(path, (64 << 20) + 64 * good.n);
        lg_text_free(&t);
    }
    assert_in_range(opened, n / 100, n - n / 4); /* the changes reach both sides */
    lg_text_free(&good);
    free(f);
}

/* ---- a folder: shards, index, config and tokenizer ---- */
/* Numbers in the JSON header of a shard. */
static void mutate_header(lg_text *t, uint64_t seed, uint64_t *at) {
    static const char *const numbers[] = { "0", "-1", "1", "63", "65", "2147483648", "4294967296", "9223372036854775807", "99999999999999999999", "1e3", "1.0", "null", "\"F32\"", "[]" };
    const int64_t n = (int64_t)get(t, 0, 8);
    lg_text h = { 0 }, out = { 0 };
    assert_true(lg_base_text_append(&h, t->data + 8, n));
    if (below(seed, at, 2)) {
        int64_t i = below(seed, at, n), k;
        while (i > 0 && !(h.data[i] >= '0' && h.data[i] <= '9')) i--;
        while (i > 0 && h.data[i - 1] >= '0' && h.data[i - 1] <= '9') i--;
        for (k = i; k < n && h.data[k] >= '0' && h.data[k] <= '9'; ) k++;
        const char *w = numbers[below(seed, at, (int64_t)(sizeof numbers / sizeof *numbers))];
        assert_true(lg_base_text_append(&out, h.data, i) && lg_base_text_append(&out, w, (int64_t)strlen(w)) && lg_base_text_append(&out, h.data + k, n - k));
        lg_text_free(&h);
        h = out;
    } else {
        mutate(&h, seed, at);
    }
    out = (lg_text){ 0 };
    assert_true(lg_base_text_append(&out, (const char *)&h.n, 8) && lg_base_text_append(&out, h.data, h.n) && lg_base_text_append(&out, t->data + 8 + n, t->n - 8 - n));
    lg_text_free(&h);
    lg_text_free(t);
    *t = out;
}

static void test_folder(void **state) {
    (void)state;
    char path[128], cmd[128];
    lg_text good[N_FILE];
    int64_t size = 0, opened = 0, n = n_seeds(1500);
    snprintf(cmd, sizeof cmd, "rm -f %s/*", fx_dir);
    assert_int_equal(system(cmd), 0);
    for (int i = 0; i < N_FILE; i++) {
        snprintf(path, sizeof path, MODEL "%s", folder_files[i]);
        good[i] = load(path);
        put_file(folder_files[i], &good[i]);
        size += good[i].n;
    }
    seed_now = UINT64_MAX;
    assert_true(use_model(fx_dir, INT64_MAX));
    for (int64_t seed = 0; seed < n; seed++) {
        uint64_t at = 0;
        seed_now = (uint64_t)seed;
        const int which = seed % 3 ? (int)below(seed_now, &at, N_SHARD) : N_JSON_FROM + (int)below(seed_now, &at, N_FILE - N_JSON_FROM);
        lg_text t = { 0 };
        assert_true(lg_base_text_append(&t, good[which].data, good[which].n));
        if (which >= N_JSON_FROM) {
            for (int64_t k = below(seed_now, &at, 2); k >= 0 && t.n > 0; k--) mutate(&t, seed_now, &at);
            if (below(seed_now, &at, 12) == 0) t.n = below(seed_now, &at, t.n + 1);
        } else {
            const int64_t header = 8 + (int64_t)get(&t, 0, 8);
            switch (below(seed_now, &at, 6)) {
            case 0: put_field(&t, (field){ 0, 8 }, seed_now, &at); break;
            case 1: damage(&t, header, seed_now, &at); break;
            default: mutate_header(&t, seed_now, &at);
            }
        }
        put_file(folder_files[which], &t);
        opened += use_model(fx_dir, (64 << 20) + 64 * size);
        put_file(folder_files[which], &good[which]);
        lg_text_free(&t);
    }
    assert_in_range(opened, n / 100, n - n / 4);
    assert_true(use_model(fx_dir, INT64_MAX)); /* nothing above has changed what is on the disk */
    for (int i = 0; i < N_FILE; i++) lg_text_free(&good[i]);
}

/* ---- snapshots ---- */
/* The checksum made right again, so that the checks behind it are reached. */
static void sign(lg_text *t) {
    if (t->n < 8) return;
    const uint64_t sum = XXH3_128bits(t->data, (size_t)t->n - 8).low64;
    memcpy(t->data + t->n - 8, &sum, 8);
}

static void test_snapshot(void **state) {
    (void)state;
    static const field head[] = { { 0, 8 }, { 8, 8 }, { 40, 8 }, { 88, 4 }, { 92, 4 }, { 96, 8 }, { 104, 8 }, { 112, 8 }, { 120, 8 }, { 128, 8 }, { 128, 8 }, { 128, 8 }, { 136, 8 }, { 144, 8 } };
    enum { N_TOK = 70, HEAD = 184 };
    char path[128];
    int32_t ids[N_TOK];
    const int32_t keep[] = { 5, 6, 7 };
    lg_model *m = fx_model("tiny-qwen2", "cpu");
    lg_model_info info;
    lg_session_params p;
    lg_model_get_info(m, &info);
    lg_session_defaults(&p);
    p.n_ctx = 100;
    lg_session *s = fx_session(m, p);
    for (int i = 0; i < N_TOK; i++) ids[i] = (i * 37 + 3) % (int32_t)info.n_vocab;
    snprintf(path, sizeof path, "%s/snap", fx_dir);
    OK(lg_session_sync(s, 0, ids, N_TOK, err));
    OK(lg_session_save(s, path, err));
    lg_text good = load(path);
    { /* the signature here is the one of the writer */
        lg_text t = { 0 };
        assert_true(lg_base_text_append(&t, good.data, good.n));
        sign(&t);
        assert_memory_equal(t.data, good.data, (size_t)good.n);
        lg_text_free(&t);
    }
    int64_t taken = 0, n = n_seeds(3000);
    for (int64_t seed = 0; seed < n; seed++) {
        uint64_t at = 0;
        lg_text t = { 0 };
        lg_error e = { 0 };
        seed_now = (uint64_t)seed;
        assert_true(lg_base_text_append(&t, good.data, good.n));
        if (below(seed_now, &at, 2)) put_field(&t, head[below(seed_now, &at, (int64_t)(sizeof head / sizeof *head))], seed_now, &at);
        else if (below(seed_now, &at, 3)) damage(&t, HEAD + 4 * N_TOK + 8, seed_now, &at);
        else { /* an id, or a cache value: any bits there are legal */
            const int64_t i = HEAD + 4 * below(seed_now, &at, (t.n - 8 - HEAD) / 4);
            put_field(&t, (field){ i, 4 }, seed_now, &at);
        }
        const bool signed_again = below(seed_now, &at, 4) != 0;
        if (signed_again) sign(&t);
        put_file("snap", &t);
        if (lg_session_sync(s, 0, keep, 3, &e) != LG_OK) SEED_FAIL("%s", e.message);
        lg_base_alloc_sum();
        const lg_status st = lg_session_load(s, path, &e);
        assert_true(lg_base_alloc_sum() < 1 << 20);
        if (st == LG_OK) {
            if (!signed_again && (t.n != good.n || memcmp(t.data, good.data, (size_t)t.n))) SEED_FAIL("a changed snapshot was taken for whole");
            taken++;
            const int64_t len = lg_session_len(s, 0);
            const int32_t zero = 0, one = 1;
            assert_in_range(len, 0, 100);
            if (len < 100 && lg_session_step(s, &zero, &one, 1, &e) != LG_OK) SEED_FAIL("step: %s", e.message);
            one_generate(s, info.n_vocab);
        } else {
            says_where(&e, st);
            if (lg_session_len(s, 0) != 3 || memcmp(lg_session_ids(s, 0), keep, sizeof keep)) SEED_FAIL("a refused snapshot changed the session");
        }
        lg_text_free(&t);
    }
    assert_in_range(taken, n / 50, n - n / 4);
    lg_text_free(&good);
    lg_session_free(s);
    lg_model_free(m);
}

/* ---- no memory ---- */
/* Open, session, generate, snapshot and back with the nth allocation failing. True when it was never reached. */
static bool starve(const char *path, int64_t nth) {
    lg_model *m = NULL;
    lg_session *s = NULL;
    lg_generation out = { 0 };
    lg_generate_params g;
    lg_session_params sp;
    lg_error e = { 0 };
    char snap[128];
    const int32_t prompt[] = { 1, 2, 3 };
    const lg_model_params p = { .path = path, .n_threads = 1 };
    snprintf(snap, sizeof snap, "%s/starved", fx_dir);
    lg_generate_defaults(&g);
    g.n_max = 2;
    lg_session_defaults(&sp);
    sp.n_ctx = 32;
    lg_base_alloc_fail_at(nth);
    lg_status st = lg_model_open(&m, &p, &e);
    if (st == LG_OK) st = lg_session_new(&s, m, &sp, &e);
    if (st == LG_OK) st = lg_generate(s, 0, prompt, 3, &g, &out, &e);
    if (st == LG_OK) st = lg_session_save(s, snap, &e);
    if (st == LG_OK) st = lg_session_load(s, snap, &e);
    const bool fired = lg_base_alloc_fail_at(0) == 0;
    if (fired && st != LG_ERR_NOMEM) fail_msg("allocation %lld failed: status %d, \"%s\"", (long long)nth, st, e.message);
    if (fired && (e.code != LG_ERR_NOMEM || !strstr(e.message, "memory"))) fail_msg("allocation %lld: \"%s\"", (long long)nth, e.message);
    if (!fired && st != LG_OK) fail_msg("%s", e.message);
    lg_generation_free(&out);
    lg_session_free(s);
    lg_model_free(m);
    return !fired;
}

static void test_no_memory(void **state) {
    (void)state;
    char path[128];
    const bool all = n_seeds(0) >= 100000; /* make soak; in the test run every one of the first, then one in 23 */
    snprintf(path, sizeof path, "%s/starve.gguf", fx_dir);
    OK(lg_convert(FIXTURES "tiny-llama", path, LG_DTYPE_Q8_0, NULL, NULL, err));
    int64_t k = 1;
    while (!starve(path, k)) k += all || k < 250 ? 1 : 23;
    assert_true(k > 100);
    print_message("GGUF: %lld allocations\n", (long long)k);
    k = 1;
    while (!starve(FIXTURES "tiny-qwen2", k)) k += all || k < 60 ? 1 : 61;
    assert_true(k > 1000);
    print_message("folder: %lld allocations\n", (long long)k);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_gguf), cmocka_unit_test(test_folder), cmocka_unit_test(test_snapshot), cmocka_unit_test(test_no_memory) };
    return cmocka_run_group_tests(tests, fx_dir_make, fx_dir_remove);
}
