/* Mutated tokenizers: changed bytes, cut pieces, swapped numbers and words in tokenizer.json, in chat templates and in
 * the GGUF form. Whatever opens must encode, decode, chat and be written without harm; the sanitizers watch. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "text/text.h"
#include "mutate.h"

#define ROOT "tests/fixtures/text/"
static void use(lg_tokenizer *t, bool write) {
    static const char s[] = "count 12 caf\xc3\xa9 e\xcc\x81\xcc\x81 <|im_end|> \xff <flag>  abc<think>\n\n 'LL \xe4\xb8\xad";
    lg_chat_turn turns[] = { { "system", " s " }, { "user", s }, { "assistant", "<think>\nx</think>\n\ny" } };
    lg_error err = { 0 };
    for (unsigned flags = 0; flags < 8; flags++) {
        lg_ids ids = { 0 };
        lg_text out = { 0 };
        lg_text_stream stream = { 0 };
        lg_status st = lg_text_encode(t, s, (int64_t)sizeof s - 1, flags, &ids, &err);
        if (st == LG_OK) {
            for (int64_t i = 0; i < ids.n; i++) {
                assert_in_range(ids.data[i], 0, lg_text_n_vocab(t) - 1);
                assert_int_equal(lg_text_stream_push(t, &stream, ids.data[i], flags & 1, &out, &err), LG_OK);
            }
            assert_int_equal(lg_text_decode(t, ids.data, ids.n, flags, &out, &err), LG_OK);
        } else assert_true(err.message[0]);
        lg_ids_free(&ids);
        lg_text_free(&out);
    }
    for (int64_t n = 1; n <= 3; n++) {
        lg_ids ids = { 0 };
        (void)lg_text_chat(t, turns, n, n & 1, &ids, &err);
        lg_ids_free(&ids);
    }
    if (!write) return;
    char path[128];
    lg_gguf_out *o = NULL;
    snprintf(path, sizeof path, "%s/again.gguf", fx_dir);
    assert_int_equal(lg_gguf_create(&o, path, &err), LG_OK);
    (void)lg_text_to_gguf(t, o, &err);
    lg_gguf_out_free(o);
}

static void mutate_json(const char *name, int64_t n) {
    char path[128];
    snprintf(path, sizeof path, ROOT "%s/tokenizer.json", name);
    lg_text whole = load(path), good = { 0 };
    snprintf(path, sizeof path, ROOT "%s/tokenizer_config.json", name);
    lg_text config = load(path);
    int64_t opened = 0;
    for (int64_t seed = 0; seed < n; seed++) {
        uint64_t at = 0;
        assert_true(lg_base_text_append(&good, whole.data, whole.n));
        for (int64_t k = below((uint64_t)seed, &at, 3); k >= 0 && good.n > 0; k--) mutate(&good, (uint64_t)seed, &at);
        put_file("tokenizer.json", &good);
        if (seed % 8 == 0) {
            lg_text c = { 0 };
            assert_true(lg_base_text_append(&c, config.data, config.n));
            mutate(&c, (uint64_t)seed, &at);
            put_file("tokenizer_config.json", &c);
            lg_text_free(&c);
        }
        lg_tokenizer *t = NULL;
        lg_error err = { 0 };
        lg_status st = lg_text_from_folder(&t, fx_dir, &err);
        if (st == LG_OK) {
            opened++;
            use(t, seed % 16 == 0);
        } else assert_true(!t && err.message[0]);
        lg_text_close(t);
        lg_text_free(&good);
    }
    assert_in_range(opened, n / 50, n - 1); /* the mutations reach both sides */
    lg_text_free(&whole);
    lg_text_free(&config);
}

static void test_json(void **state) {
    (void)state;
    static const char *const names[] = { "qwen3", "llama3", "digits" };
    for (int i = 0; i < 3; i++) mutate_json(names[i], n_seeds(1000));
}

static void test_template(void **state) {
    (void)state;
    static const char *const paths[] = { ROOT "qwen3/chat_template.jinja", ROOT "llama31/chat_template.jinja" };
    static const char *const from[] = { ROOT "qwen3", ROOT "llama31" };
    static const char *const files[] = { "tokenizer.json", "tokenizer_config.json" };
    for (int i = 0; i < 2; i++) {
        for (int f = 0; f < 2; f++) {
            char path[128];
            snprintf(path, sizeof path, "%s/%s", from[i], files[f]);
            lg_text copy = load(path);
            put_file(files[f], &copy);
            lg_text_free(&copy);
        }
        lg_text whole = load(paths[i]);
        for (int64_t seed = 0; seed < n_seeds(1000); seed++) {
            uint64_t at = 0;
            lg_text t = { 0 };
            assert_true(lg_base_text_append(&t, whole.data, whole.n));
            for (int k = 0; k < 3 && t.n > 0; k++) mutate(&t, (uint64_t)seed, &at);
            put_file("chat_template.jinja", &t);
            lg_tokenizer *tok = NULL;
            lg_error err = { 0 };
            assert_int_equal(lg_text_from_folder(&tok, fx_dir, &err), LG_OK); /* a template never hinders opening */
            use(tok, false);
            lg_text_close(tok);
            lg_text_free(&t);
        }
        lg_text_free(&whole);
    }
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -f %s/*", fx_dir);
    assert_int_equal(system(cmd), 0);
}

static void test_gguf(void **state) {
    (void)state;
    lg_error err = { 0 };
    lg_tokenizer *t = NULL;
    lg_gguf_out *o = NULL;
    char path[128];
    snprintf(path, sizeof path, "%s/good.gguf", fx_dir);
    assert_int_equal(lg_text_from_folder(&t, ROOT "digits", &err), LG_OK);
    assert_int_equal(lg_gguf_create(&o, path, &err), LG_OK);
    assert_int_equal(lg_text_to_gguf(t, o, &err), LG_OK);
    assert_int_equal(lg_gguf_commit(o, &err), LG_OK);
    lg_gguf_out_free(o);
    lg_text_close(t);
    lg_text whole = load(path);
    snprintf(path, sizeof path, "%s/bad.gguf", fx_dir);
    int64_t opened = 0, n = n_seeds(2000);
    for (int64_t seed = 0; seed < n; seed++) {
        uint64_t at = 0;
        lg_text bad = { 0 };
        lg_gguf *g = NULL;
        assert_true(lg_base_text_append(&bad, whole.data, whole.n));
        for (int64_t k = below((uint64_t)seed, &at, 3); k >= 0; k--) bad.data[below((uint64_t)seed, &at, bad.n)] = (char)below((uint64_t)seed, &at, 256);
        put_file("bad.gguf", &bad);
        t = NULL;
        if (lg_gguf_open(&g, path, &err) == LG_OK) {
            if (lg_text_from_gguf(&t, g, &err) == LG_OK) {
                opened++;
                use(t, false);
            } else assert_true(!t && err.message[0]);
        }
        lg_text_close(t);
        lg_gguf_close(g);
        lg_text_free(&bad);
    }
    assert_in_range(opened, n / 50, n - 1);
    lg_text_free(&whole);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_json), cmocka_unit_test(test_template), cmocka_unit_test(test_gguf) };
    return cmocka_run_group_tests(tests, fx_dir_make, fx_dir_remove);
}
