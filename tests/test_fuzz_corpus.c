/* The libFuzzer targets as plain tests: every file of tests/fuzz/corpus/NAME goes through its target, whole, cut at every
 * 7th byte and with every 5th byte changed. What the fuzzers found lies there too, so that it stays found. */
#include "fixture.h"
#include <dirent.h>

#define FUZZ_ONE fuzz_gguf
#include "fuzz/fuzz_gguf.c"
#undef FUZZ_ONE
#define FUZZ_ONE fuzz_safetensors
#include "fuzz/fuzz_safetensors.c"
#undef FUZZ_ONE
#define FUZZ_ONE fuzz_json
#include "fuzz/fuzz_json.c"
#undef FUZZ_ONE
#define FUZZ_ONE fuzz_tokenizer
#include "fuzz/fuzz_tokenizer.c"
#undef FUZZ_ONE
#define FUZZ_ONE fuzz_roles
#include "fuzz/fuzz_roles.c"
#undef FUZZ_ONE
#define FUZZ_ONE fuzz_snapshot
#include "fuzz/fuzz_snapshot.c"
#undef FUZZ_ONE

typedef int (*target)(const uint8_t *data, size_t size);

static void walk(const char *name, target one) {
    char folder[128], path[512];
    int n = 0;
    snprintf(folder, sizeof folder, "tests/fuzz/corpus/%s", name);
    DIR *d = opendir(folder);
    if (!d) fail_msg("%s is missing", folder);
    for (struct dirent *e; (e = readdir(d));) {
        lg_text t = { 0 };
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        OK(lg_file_read_all(&t, path, 1 << 20, err));
        n++;
        one((const uint8_t *)t.data, (size_t)t.n);
        const int64_t step = t.n / 400 + 1; /* at most some hundred of each */
        for (int64_t i = 0; i < t.n; i += 7 * step) one((const uint8_t *)t.data, (size_t)i);
        for (int64_t i = 0; i < t.n; i += 5 * step) {
            t.data[i] = (char)(t.data[i] ^ (1 << (i % 8)));
            one((const uint8_t *)t.data, (size_t)t.n);
            t.data[i] = (char)(t.data[i] ^ (1 << (i % 8)));
        }
        lg_text_free(&t);
    }
    closedir(d);
    assert_true(n > 0);
}

#define CASE(name) \
    static void test_##name(void **state) { (void)state; walk(#name, fuzz_##name); }
CASE(gguf)
CASE(safetensors)
CASE(json)
CASE(tokenizer)
CASE(roles)
CASE(snapshot)

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_gguf), cmocka_unit_test(test_safetensors), cmocka_unit_test(test_json),
                                        cmocka_unit_test(test_tokenizer), cmocka_unit_test(test_roles), cmocka_unit_test(test_snapshot) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
