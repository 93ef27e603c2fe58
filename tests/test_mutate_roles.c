/* Thousands of damaged roles files: each is refused with a message that names the file, or is a map that holds
 * every rule the forward pass relies on, and survives being written and read again. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "longan/heads.h"
#include "model/roles.h"
#include "mutate.h"

enum { MAX_TEXT = 8192 };

static const char *const originals[] = {
    "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"0123456789abcdef0123456789abcdef\",\"n_layer\":4,\"n_head_kv\":3},"
    "\"share\":\"donor\",\"n_retrieval\":3,\"budget\":512,\"sinks\":16,\"recents\":64,"
    "\"roles\":[[\"retrieval\",\"window\",\"retrieval\"],[[0,0],\"window\",[0,2]],[\"retrieval\",[0,2],\"window\"],[[2,0],[0,0],\"window\"]],"
    "\"made\":{\"seed\":1},\"coverage\":[[1,0.5,1],[0.5,0.25,0.75],[1,0.5,0.125],[0.5,0.5,0.5]],"
    "\"sensitivity\":[[0.1,0.2,0.3],[0,0,0],[1e-3,2e-2,0.5],[0.1,0.1,0.1]]}",
    "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"0123456789abcdef0123456789abcdef\",\"n_layer\":2,\"n_head_kv\":3},"
    "\"share\":\"donor\",\"keep\":0.5,\"observe\":64,\"refresh\":128,\"roles\":[[\"retrieval\",\"window\",\"window\"],[[0,0],[0,0],\"window\"]],\"budget_share\":[[1,0,0.25],[2.5,1,0.5]]}",
    "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"0123456789abcdef0123456789abcdef\",\"n_layer\":4,\"n_head_kv\":2},"
    "\"share\":\"same-index\",\"roles\":[[\"retrieval\",\"retrieval\"],[\"sparse\",\"window\"],[\"retrieval\",\"sparse\"],[\"sparse\",\"sparse\"]]}",
};

typedef struct damage { char text[MAX_TEXT]; int64_t n; uint64_t seed, next; } damage;

static int64_t draw(damage *d, int64_t n) {
    return lg_base_rng_below(d->seed, 5, d->next++, n);
}

static void cut(damage *d, int64_t at, int64_t n) {
    memmove(d->text + at, d->text + at + n, (size_t)(d->n - at - n));
    d->n -= n;
}

static void insert(damage *d, int64_t at, const char *what, int64_t n) {
    char copy[256];
    if (n > (int64_t)sizeof copy || d->n + n > MAX_TEXT) return;
    memcpy(copy, what, (size_t)n);
    memmove(d->text + at + n, d->text + at, (size_t)(d->n - at));
    memcpy(d->text + at, copy, (size_t)n);
    d->n += n;
}

static void mutate_roles(damage *d) {
    static const char *const bits[] = { "9", "-1", "99999999999999999999", "1e400", "null", "\"retrieval\"", "\"window\"", "\"sparse\"",
                                        "[0,0]", "[3,1]", "{}", "[", "]", ",", "\"", "\\u0000", "\xff", "0.5", "\"roles\":", "[[[[[[[[" };
    int64_t at = draw(d, d->n), n = 1 + draw(d, d->n - at < 40 ? d->n - at : 40);
    switch (draw(d, 7)) {
    case 0: d->text[at] = (char)(d->text[at] ^ (1 << draw(d, 8))); break;
    case 1: d->n = at + 1; break;
    case 2: if (n < d->n) cut(d, at, n); break;
    case 3: insert(d, draw(d, d->n), d->text + at, n); break;
    case 4: { /* another digit for a digit: well-formed, often wrong */
        for (int64_t i = 0; i < d->n; i++, at = (at + 1) % d->n)
            if (d->text[at] >= '0' && d->text[at] <= '9') break;
        d->text[at] = (char)('0' + draw(d, 10));
        break;
    }
    case 5: {
        const char *b = bits[draw(d, (int64_t)(sizeof bits / sizeof *bits))];
        insert(d, at, b, (int64_t)strlen(b));
        break;
    }
    default: { /* one role for another */
        static const char *const role[] = { "\"retrieval\"", "\"window\"", "\"sparse\"" };
        for (int64_t i = 0; i < d->n; i++, at = (at + 1) % d->n)
            for (int k = 0; k < 3; k++) {
                int64_t len = (int64_t)strlen(role[k]);
                if (d->n - at < len || memcmp(d->text + at, role[k], (size_t)len)) continue;
                const char *b = draw(d, 4) ? role[draw(d, 3)] : "[0,1]";
                cut(d, at, len);
                insert(d, at, b, (int64_t)strlen(b));
                return;
            }
    }
    }
}

static void make(damage *d, uint64_t seed) {
    const char *from = originals[seed % (sizeof originals / sizeof *originals)];
    d->seed = seed;
    d->next = 0;
    d->n = (int64_t)strlen(from);
    memcpy(d->text, from, (size_t)d->n);
    for (int64_t i = draw(d, 3); i >= 0; i--) mutate_roles(d);
}

static void test_parse(void **state) {
    (void)state;
    static damage d;
    const int64_t n = n_seeds(20000);
    int64_t good = 0, bad = 0;
    for (uint64_t seed = 0; seed < (uint64_t)n; seed++) {
        make(&d, seed);
        lg_roles *r = NULL, *again = NULL;
        lg_error err = { 0 };
        lg_status st = lg_roles_parse(&r, "damaged.json", d.text, d.n, &err);
        if (st != LG_OK) {
            bad++;
            assert_null(r);
            if (!strstr(err.message, "damaged.json")) fail_msg("seed %llu: \"%s\"", (unsigned long long)seed, err.message);
            continue;
        }
        good++;
        lg_text t = { 0 };
        if (lg_roles_check(r, "damaged.json", &err) != LG_OK) fail_msg("seed %llu: %s", (unsigned long long)seed, err.message);
        assert_int_equal(lg_roles_format(&t, r, NULL, &err), LG_OK);
        assert_int_equal(lg_roles_parse(&again, "again", t.data, t.n, &err), LG_OK);
        assert_memory_equal(r->role, again->role, (size_t)(r->n_layer * r->n_head_kv) * sizeof *r->role);
        assert_int_equal(r->budget, again->budget);
        assert_int_equal(!r->share, !again->share);
        if (r->share) assert_memory_equal(r->share, again->share, (size_t)(r->n_layer * r->n_head_kv) * sizeof *r->share);
        lg_text_free(&t);
        lg_roles_free(r);
        lg_roles_free(again);
    }
    /* Both ways were walked. */
    assert_true(good > n / 50);
    assert_true(bad > n / 3);
}

/* The same through files, with the readers that look at the notes as well. */
static void test_files(void **state) {
    (void)state;
    static damage d;
    const int64_t n = n_seeds(1200) / 4;
    char path[] = "/tmp/lg-mutate-XXXXXX", svg[64];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    snprintf(svg, sizeof svg, "%s.svg", path);
    for (uint64_t seed = 0; seed < (uint64_t)n; seed++) {
        make(&d, seed);
        assert_int_equal(ftruncate(fd, 0), 0);
        assert_int_equal(pwrite(fd, d.text, (size_t)d.n, 0), d.n);
        lg_roles *r = NULL;
        lg_text t = { 0 };
        lg_error err = { 0 };
        lg_status st = lg_roles_load(&r, path, &err);
        if (st != LG_OK) assert_non_null(strstr(err.message, path));
        assert_int_equal(lg_heads_show(path, seed % 2, &t, &err), st);
        assert_int_equal(lg_heads_plot(path, svg, &err), st);
        lg_text_free(&t);
        lg_roles_free(r);
    }
    close(fd);
    remove(path);
    remove(svg);
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_parse), cmocka_unit_test(test_files) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
