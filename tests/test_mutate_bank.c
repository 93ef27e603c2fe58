/* Damaged bank files: LONGAN_SEEDS (default 3000) times one to eight random bits are flipped in a small bank, as built and appended
 * to. Each is refused by open with a message that names the file, or found by verify; nothing reads outside the file. */
#include "bank_double.h"

static void mutate(const char *path, lg_text *t, int64_t seeds, uint64_t stream) {
    int64_t refused = 0, found = 0;
    for (int64_t seed = 0; seed < seeds; seed++) {
        const int64_t n = seed % 2 ? 1 : 1 + lg_base_rng_below((uint64_t)seed, stream, 0, 8);
        int64_t bit[8];
        for (int64_t i = 0; i < n; i++) {
            const bool head = seed % 5 == 0; /* every fifth: header or table, which hold all that could mislead */
            bit[i] = head ? lg_base_rng_below((uint64_t)seed, stream, (uint64_t)(1 + i), 2 * 8 * 512) : lg_base_rng_below((uint64_t)seed, stream, (uint64_t)(1 + i), 8 * t->n);
            if (head && bit[i] >= 8 * 512) bit[i] += 8 * (LG_BANK_SLOT - 512);
            for (int64_t j = 0; j < i; j++)
                if (bit[j] == bit[i]) bit[i] = -1; /* twice is not at all */
            if (bit[i] >= 0) t->data[bit[i] / 8] = (char)(t->data[bit[i] / 8] ^ 1 << bit[i] % 8);
        }
        FILE *f = fopen(path, "wb");
        assert_non_null(f);
        assert_int_equal(fwrite(t->data, 1, (size_t)t->n, f), t->n);
        fclose(f);
        lg_bank *b;
        lg_error e = { 0 };
        if (lg_bank_open(&b, path, &e) != LG_OK) {
            refused++;
            assert_int_equal(e.code, LG_ERR_FORMAT);
            assert_non_null(strstr(e.message, path));
        } else {
            lg_bank_info info;
            lg_bank_get_info(b, &info);
            for (int64_t c = 0; c < info.n_chunk; c++) { /* what is read of it lies in the file */
                lg_bank_chunk x;
                OK(lg_bank_get_chunk(b, c, &x, err));
                float *k = calloc((size_t)(info.n_layer * x.slots * info.n_head_kv * info.head_dim), 4), *v = calloc((size_t)(info.n_layer * x.slots * info.n_head_kv * info.head_dim), 4);
                OK(lg_bank_read(b, c, k, v, err));
                free(k);
                free(v);
            }
            if (lg_bank_verify(b, &e) == LG_OK) fail_msg("seed %lld: %lld flipped bits were not seen (first at byte %lld)", (long long)seed, (long long)n, (long long)bit[0] / 8);
            found++;
            lg_bank_close(b);
        }
        for (int64_t i = 0; i < n; i++)
            if (bit[i] >= 0) t->data[bit[i] / 8] = (char)(t->data[bit[i] / 8] ^ 1 << bit[i] % 8);
    }
    assert_true(refused > 0 && found > 0);
    print_message("# %lld refused, %lld found by verify\n", (long long)refused, (long long)found);
}

/* A header whose checksum is right and whose numbers are not. */
static void test_wrong_headers(void **state) {
    (void)state;
    char path[512];
    fx_temp(path, "header");
    lg_model *m = fx_model("tiny-qwen2", "cpu");
    int32_t *ids = double_ids(m, 100, 3);
    const lg_bank_params p = double_params();
    lg_text t = { 0 };
    OK(lg_bank_build_ids(m, &p, ids, 100, path, err));
    OK(lg_file_read_all(&t, path, 1 << 30, err));
    static const int64_t values[] = { 0, -1, 1, 2, 3, 5, 1 << 20, INT32_MAX, INT64_MAX, INT64_MIN, (int64_t)1 << 40, 8192, 64 };
    int64_t tried = 0;
    for (size_t at = 16; at < offsetof(lg_bank_header, hash); at += 4)
        for (size_t i = 0; i < sizeof values / sizeof *values; i++)
            for (int64_t d = 0; d < 2; d++) {
                lg_bank_header h;
                memcpy(&h, t.data, sizeof h);
                int32_t old;
                memcpy(&old, (char *)&h + at, 4);
                const int32_t v = (int32_t)(d ? (int64_t)((uint64_t)old + (uint64_t)values[i]) : values[i]);
                if (v == old) continue;
                memcpy((char *)&h + at, &v, 4);
                lg_memory_bank_seal(&h);
                FILE *f = fopen(path, "wb");
                assert_non_null(f);
                fwrite(&h, 1, sizeof h, f);
                fwrite(t.data + sizeof h, 1, (size_t)t.n - sizeof h, f);
                fclose(f);
                lg_bank *b;
                lg_error e = { 0 };
                tried++;
                if (lg_bank_open(&b, path, &e) != LG_OK) continue;
                lg_bank_chunk x; /* harmless fields (a fingerprint, the group): what can be read is in the file */
                for (int64_t c = 0; lg_bank_get_chunk(b, c, &x, &e) == LG_OK; c++) {
                    const int64_t n = b->h.n_layer * x.slots * b->h.n_head_kv * b->h.head_dim;
                    float *k = calloc((size_t)n, 4), *v2 = calloc((size_t)n, 4);
                    OK(lg_bank_read(b, c, k, v2, err));
                    free(k);
                    free(v2);
                }
                lg_bank_verify(b, &e);
                lg_bank_close(b);
            }
    assert_true(tried > 1000);
    lg_text_free(&t);
    free(ids);
    lg_model_free(m);
    unlink(path);
}

static void test_flipped_bits(void **state) {
    (void)state;
    const char *env = getenv("LONGAN_SEEDS");
    const int64_t seeds = env && atoll(env) > 0 ? atoll(env) : 3000;
    char path[512];
    fx_temp(path, "flip");
    lg_model *m = fx_model("tiny-qwen2", "cpu");
    int32_t *ids = double_ids(m, 100, 3);
    lg_bank_params p = double_params();
    p.slots = LG_DTYPE_KV8;
    OK(lg_bank_build_ids(m, &p, ids, 40, path, err));
    for (int round = 0; round < 2; round++) {
        lg_text t = { 0 };
        OK(lg_file_read_all(&t, path, 1 << 30, err));
        mutate(path, &t, seeds / 2, (uint64_t)round);
        FILE *f = fopen(path, "wb");
        fwrite(t.data, 1, (size_t)t.n, f);
        fclose(f);
        lg_text_free(&t);
        if (!round) OK(lg_bank_append_ids(m, path, ids + 40, 60, NULL, NULL, err));
    }
    free(ids);
    lg_model_free(m);
    unlink(path);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_wrong_headers), cmocka_unit_test(test_flipped_bits) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
