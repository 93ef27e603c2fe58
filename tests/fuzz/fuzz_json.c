/* JSON: what parses is walked whole; its strings are written and parse to themselves. */
#ifndef FUZZ_ONE
#define FUZZ_ONE LLVMFuzzerTestOneInput
#endif
#include "fuzz.h"

static void json_walk(void *user, const char *key, const lg_json *v) {
    int64_t n, i;
    double d;
    bool b;
    if (key) fuzz_touch(key, (int64_t)strlen(key));
    (void)lg_json_int(v, &i), (void)lg_json_num(v, &d), (void)lg_json_bool(v, &b);
    const char *s = lg_json_str(v, &n);
    if (s) {
        lg_text t = { 0 };
        lg_json *again = NULL;
        lg_error e;
        int64_t m;
        FUZZ_CHECK(lg_json_put_str(&t, s, n) && lg_json_parse(&again, "again", t.data, t.n, &e) == LG_OK);
        const char *r = lg_json_str(again, &m);
        FUZZ_CHECK(r && m == n && !memcmp(r, s, (size_t)n));
        lg_json_free(again);
        lg_text_free(&t);
    }
    if (lg_json_typeof(v) == LG_JSON_ARRAY)
        for (i = 0; i < lg_json_size(v); i++) json_walk(user, NULL, lg_json_at(v, i));
    lg_json_each(v, json_walk, user);
}

int FUZZ_ONE(const uint8_t *data, size_t size);
int FUZZ_ONE(const uint8_t *data, size_t size) {
    lg_json *j = NULL;
    lg_error e = { 0 };
    const lg_status st = lg_json_parse(&j, "some.json", (const char *)data, (int64_t)size, &e);
    fuzz_refused(st, &e, "some.json");
    if (st == LG_OK) json_walk(NULL, NULL, j);
    lg_json_free(j);
    return 0;
}
