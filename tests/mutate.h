/* What the mutation tests share: a folder of their own, whole files in and out, draws that depend on the seed alone, and
 * one change to a JSON text. LONGAN_SEEDS sets how many seeds each case walks. */
#ifndef LG_TEST_MUTATE_H
#define LG_TEST_MUTATE_H
#include "fixture.h"

static inline lg_text load(const char *path) {
    lg_text t = { 0 };
    lg_error err = { 0 };
    if (lg_file_read_all(&t, path, 1 << 24, &err) != LG_OK) fail_msg("%s", err.message);
    return t;
}

static inline void put_file(const char *name, const lg_text *t) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", fx_dir, name);
    FILE *f = fopen(path, "wb"); /* no atomic writing: thousands of syncs */
    assert_non_null(f);
    assert_int_equal(fwrite(t->data, 1, (size_t)t->n, f), (size_t)t->n);
    assert_int_equal(fclose(f), 0);
}

static inline int64_t below(uint64_t seed, uint64_t *at, int64_t n) { return lg_base_rng_below(seed, 9, (*at)++, n); }

/* One change. Most keep the JSON well-formed, so that they reach the readers behind the parser. */
static inline void mutate(lg_text *t, uint64_t seed, uint64_t *at) {
    static const char *const words[] = { "null", "true", "false", "0", "-1", "7", "2147483648", "9223372036854775807", "\"\"", "[]", "{}", "1e9", "\"Isolated\"",
                                         "\"Removed\"", "\"Regex\"", "\"(?:a|b*)*+\"", "\"\\\\s+|\\\\p{L}*\"", "\"Sequence\"", "\"\\u0120 t\"", "[\"a\",\"b\"]" };
    int64_t i = below(seed, at, t->n), k;
    switch (below(seed, at, 6)) {
    case 0: t->data[i] = (char)below(seed, at, 256); break;
    case 1: /* another digit */
        for (k = 0; k < t->n && !(t->data[i] >= '0' && t->data[i] <= '9'); k++) i = (i + 1) % t->n;
        t->data[i] = (char)('0' + below(seed, at, 10));
        break;
    case 2: /* drop a member or element */
        while (i > 0 && t->data[i] != ',') i--;
        for (k = i + 1; k < t->n && t->data[k] != ',' && t->data[k] != '}' && t->data[k] != ']'; ) k++;
        memmove(t->data + i, t->data + k, (size_t)(t->n - k));
        t->n -= k - i;
        break;
    case 3: { /* another value behind a colon */
        const char *w = words[below(seed, at, (int64_t)(sizeof words / sizeof words[0]))];
        while (i > 0 && t->data[i] != ':') i--;
        for (k = ++i; k < t->n && t->data[k] != ',' && t->data[k] != '}' && t->data[k] != ']'; ) k++;
        lg_text out = { 0 };
        assert_true(lg_base_text_append(&out, t->data, i) && lg_base_text_append(&out, w, (int64_t)strlen(w)) &&
                    lg_base_text_append(&out, t->data + k, t->n - k));
        lg_text_free(t);
        *t = out;
        break;
    }
    case 4: { /* one letter more of what stands there already */
        int64_t j = below(seed, at, t->n);
        t->data[i] = t->data[j];
        break;
    }
    default: /* two bytes change places */
        k = below(seed, at, t->n);
        char c = t->data[i];
        t->data[i] = t->data[k];
        t->data[k] = c;
    }
}

/* LONGAN_SEEDS, else `usual`, a quarter of it under AddressSanitizer. */
static inline int64_t n_seeds(int64_t usual) {
    const char *s = getenv("LONGAN_SEEDS");
#ifdef __SANITIZE_ADDRESS__
    usual /= 4;
#endif
    return s ? atoll(s) : usual;
}
#endif
