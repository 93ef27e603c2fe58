/* Roles files: what is read, what is refused and how it is named, and that writing gives back what was read. */
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

#define FAMILY "0123456789abcdef0123456789abcdef"
#define MODEL "\"model\":{\"family\":\"" FAMILY "\",\"n_layer\":3,\"n_head_kv\":2}"
#define HEAD "{\"format\":\"longan-roles\",\"version\":1," MODEL ","
#define DONOR "\"share\":\"donor\",\"roles\":[[\"retrieval\",\"window\"],[[0,0],\"retrieval\"],[\"window\",[1,1]]]"
#define SAME "\"share\":\"same-index\",\"roles\":[[\"retrieval\",\"retrieval\"],[\"sparse\",\"retrieval\"],[\"sparse\",\"sparse\"]]"

static lg_status parse(lg_roles **r, const char *text, lg_error *err) {
    return lg_roles_parse(r, "test.json", text, (int64_t)strlen(text), err);
}

static void test_donor(void **state) {
    (void)state;
    lg_roles *r = NULL;
    assert_int_equal(parse(&r, HEAD DONOR ",\"n_retrieval\":2,\"budget\":512,\"sinks\":0,\"more\":[1]}", NULL), LG_OK);
    assert_int_equal(r->n_layer, 3);
    assert_int_equal(r->n_head_kv, 2);
    assert_int_equal(r->n_retrieval, 2);
    assert_false(r->same_index);
    assert_int_equal(r->budget, 512);
    assert_int_equal(r->sinks, 0);
    assert_int_equal(r->recents, -1);
    assert_string_equal(r->family, FAMILY);
    assert_int_equal(r->role[0].kind, LG_ROLE_RETRIEVAL);
    assert_int_equal(r->role[1].kind, LG_ROLE_WINDOW);
    assert_int_equal(r->role[2].kind, LG_ROLE_DONOR);
    assert_int_equal(r->role[2].donor_layer, 0);
    assert_int_equal(r->role[2].donor_head, 0);
    assert_int_equal(r->role[5].donor_layer, 1);
    assert_int_equal(r->role[5].donor_head, 1);
    assert_int_equal(lg_roles_check(r, "r", NULL), LG_OK);
    lg_roles_free(r);
}

static void test_sparse_resolves(void **state) {
    (void)state;
    lg_roles *r = NULL;
    assert_int_equal(parse(&r, HEAD SAME "}", NULL), LG_OK);
    assert_true(r->same_index);
    assert_int_equal(r->n_retrieval, 3);
    assert_int_equal(r->role[2].kind, LG_ROLE_DONOR);
    assert_int_equal(r->role[4].donor_layer, 0);
    assert_int_equal(r->role[4].donor_head, 0);
    assert_int_equal(r->role[5].donor_layer, 1); /* the nearest, not layer 0 */
    assert_int_equal(r->role[5].donor_head, 1);
    assert_int_equal(lg_roles_check(r, "r", NULL), LG_OK);
    r->role[5].donor_layer = 0; /* same-index files know no other donor */
    assert_int_equal(lg_roles_check(r, "r", NULL), LG_ERR_FORMAT);
    lg_roles_free(r);
}

/* Shares are whole 1024ths; retrieval heads have none. Written, they are read again; a clone has its own. */
static void test_shares(void **state) {
    (void)state;
    static const int32_t want[6] = { 1024, 2048, 0, 1024, 512, 341 };
    lg_roles *r = NULL, *again = NULL, *clone;
    lg_text t = { 0 };
    assert_int_equal(parse(&r, HEAD DONOR ",\"budget_share\":[[7,2],[0,0.25],[0.5,0.33333]]}", NULL), LG_OK);
    assert_memory_equal(r->share, want, sizeof want);
    assert_int_equal(lg_roles_format(&t, r, NULL, NULL), LG_OK);
    assert_int_equal(lg_roles_parse(&again, "again", t.data, t.n, NULL), LG_OK);
    assert_memory_equal(again->share, want, sizeof want);
    clone = lg_roles_clone(r);
    assert_memory_equal(clone->share, want, sizeof want);
    assert_ptr_not_equal(clone->share, r->share);
    lg_roles_free(clone);
    r->share[1] = 4096;
    assert_int_equal(lg_roles_check(r, "r", NULL), LG_ERR_FORMAT); /* more than the budget */
    r->share[1] = -1;
    assert_int_equal(lg_roles_check(r, "r", NULL), LG_ERR_FORMAT);
    lg_roles_free(again);
    lg_roles_free(r);
    lg_text_free(&t);
    assert_int_equal(parse(&r, HEAD DONOR ",\"budget_share\":null}", NULL), LG_OK);
    assert_null(r->share);
    lg_roles_free(r);
}

/* What heads keep: a share in whole 1024ths; absent or null: nothing. */
static void test_keep(void **state) {
    (void)state;
    lg_roles *r = NULL, *again = NULL;
    lg_text t = { 0 };
    assert_int_equal(parse(&r, HEAD DONOR ",\"keep\":0.33333,\"observe\":64,\"refresh\":7}", NULL), LG_OK);
    assert_int_equal(lg_roles_format(&t, r, NULL, NULL), LG_OK);
    assert_int_equal(lg_roles_parse(&again, "again", t.data, t.n, NULL), LG_OK);
    lg_roles *const both[] = { r, again };
    for (int i = 0; i < 2; i++) {
        assert_int_equal(both[i]->keep, 341);
        assert_int_equal(both[i]->observe, 64);
        assert_int_equal(both[i]->refresh, 7);
        lg_roles_free(both[i]);
    }
    lg_text_free(&t);
    assert_int_equal(parse(&r, HEAD DONOR ",\"keep\":null,\"observe\":null}", NULL), LG_OK);
    assert_int_equal(r->keep + r->observe + r->refresh, 0);
    lg_roles_free(r);
}

/* Each text is refused and the message names the key. */
static const struct { const char *text, *key; } refused[] = {
    { "[]", "object" },
    { "{\"version\":1," MODEL "," DONOR "}", "format" },
    { "{\"format\":\"longan-role\",\"version\":1," MODEL "," DONOR "}", "format" },
    { "{\"format\":7,\"version\":1," MODEL "," DONOR "}", "format" },
    { "{\"format\":\"longan-roles\"," MODEL "," DONOR "}", "version" },
    { "{\"format\":\"longan-roles\",\"version\":2," MODEL "," DONOR "}", "version" },
    { "{\"format\":\"longan-roles\",\"version\":1.5," MODEL "," DONOR "}", "version" },
    { "{\"format\":\"longan-roles\",\"version\":1," DONOR "}", "model" },
    { "{\"format\":\"longan-roles\",\"version\":1,\"model\":3," DONOR "}", "model" },
    { "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"n_layer\":3,\"n_head_kv\":2}," DONOR "}", "model.family" },
    { "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"" FAMILY FAMILY "\",\"n_layer\":3,\"n_head_kv\":2}," DONOR "}", "model.family" },
    { "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"" FAMILY "\",\"n_head_kv\":2}," DONOR "}", "model.n_layer" },
    { "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"" FAMILY "\",\"n_layer\":0,\"n_head_kv\":2}," DONOR "}", "model.n_layer" },
    { "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"" FAMILY "\",\"n_layer\":4096,\"n_head_kv\":4096}," DONOR "}", "roles" },
    { "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"" FAMILY "\",\"n_layer\":99999999,\"n_head_kv\":2}," DONOR "}", "model.n_layer" },
    { "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"" FAMILY "\",\"n_layer\":3,\"n_head_kv\":3}," DONOR "}", "roles[0]" },
    { "{\"format\":\"longan-roles\",\"version\":1,\"model\":{\"family\":\"" FAMILY "\",\"n_layer\":4,\"n_head_kv\":2}," DONOR "}", "roles" },
    { HEAD "\"share\":\"donor\"}", "roles" },
    { HEAD "\"roles\":[[\"window\",\"window\"],[\"window\",\"window\"],[\"window\",\"window\"]]}", "share" },
    { HEAD "\"share\":\"both\",\"roles\":[[\"window\",\"window\"],[\"window\",\"window\"],[\"window\",\"window\"]]}", "share" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"window\",\"window\"],[\"window\",\"window\"],\"window\"]}", "roles[2]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"window\",\"window\"],[\"window\",\"full\"],[\"window\",\"window\"]]}", "roles[1][1]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"window\",\"window\"],[\"window\",1],[\"window\",\"window\"]]}", "roles[1][1]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"retrieval\",\"window\"],[\"window\",[0,1]],[\"window\",\"window\"]]}", "roles[1][1]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"retrieval\",[0,0]],[\"window\",\"window\"],[\"window\",\"window\"]]}", "roles[0][1]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[[2,0],\"window\"],[\"window\",\"window\"],[\"retrieval\",\"window\"]]}", "roles[0][0]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"retrieval\",\"window\"],[\"window\",[0,0,0]],[\"window\",\"window\"]]}", "roles[1][1]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"retrieval\",\"window\"],[\"window\",[0]],[\"window\",\"window\"]]}", "roles[1][1]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"retrieval\",\"window\"],[\"window\",[-1,0]],[\"window\",\"window\"]]}", "roles[1][1]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"retrieval\",\"window\"],[\"window\",[0.0,0]],[\"window\",\"window\"]]}", "roles[1][1]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"retrieval\",\"window\"],[\"window\",[9223372036854775807,0]],[\"window\",\"window\"]]}", "roles[1][1]" },
    { HEAD "\"share\":\"donor\",\"roles\":[[\"retrieval\",\"window\"],[\"sparse\",\"window\"],[\"window\",\"window\"]]}", "roles[1][0]" },
    { HEAD "\"share\":\"same-index\",\"roles\":[[\"retrieval\",\"window\"],[\"sparse\",\"sparse\"],[\"window\",\"window\"]]}", "roles[1][1]" },
    { HEAD "\"share\":\"same-index\",\"roles\":[[\"retrieval\",\"window\"],[[0,0],\"window\"],[\"window\",\"window\"]]}", "roles[1][0]" },
    { HEAD DONOR ",\"n_retrieval\":3}", "n_retrieval" },
    { HEAD DONOR ",\"n_retrieval\":\"2\"}", "n_retrieval" },
    { HEAD DONOR ",\"budget\":0}", "budget" },
    { HEAD DONOR ",\"budget\":1e3}", "budget" },
    { HEAD DONOR ",\"sinks\":-1}", "sinks" },
    { HEAD DONOR ",\"recents\":99999999999}", "recents" },
    { HEAD DONOR ",\"share\":\"donor\"}", "share" }, /* twice */
    { HEAD DONOR ",\"keep\":\"0.5\"}", "keep" },
    { HEAD DONOR ",\"keep\":1.01}", "keep" },
    { HEAD DONOR ",\"keep\":-0.1}", "keep" },
    { HEAD DONOR ",\"keep\":0.5,\"observe\":0}", "observe" },
    { HEAD DONOR ",\"keep\":0.5,\"observe\":65}", "observe" },
    { HEAD DONOR ",\"keep\":0.5,\"refresh\":1.5}", "refresh" },
    { HEAD DONOR ",\"budget_share\":1}", "budget_share" },
    { HEAD DONOR ",\"budget_share\":[[1,1],[1,1]]}", "budget_share" },
    { HEAD DONOR ",\"budget_share\":[[1,1],[1,1,1],[1,1]]}", "budget_share[1]" },
    { HEAD DONOR ",\"budget_share\":[[1,1],1,[1,1]]}", "budget_share[1]" },
    { HEAD DONOR ",\"budget_share\":[[1,1],[1,\"1\"],[1,1]]}", "budget_share[1][1]" },
    { HEAD DONOR ",\"budget_share\":[[1,-0.5],[1,1],[1,1]]}", "budget_share[0][1]" },
    { HEAD DONOR ",\"budget_share\":[[1,1],[1,1],[65,0]]}", "budget_share[2][0]" },
    { HEAD DONOR ",\"budget_share\":[[1,1],[1,1],[1e300,0]]}", "budget_share[2][0]" },
    { HEAD DONOR ",\"budget_share\":[[1,1],[1,1],[1,1.001]]}", "budget_share: the mean" },
    { HEAD DONOR ",\"budget_share\":[[1,1],[1,1],[1,1]],\"budget_share\":[[1,1],[1,1],[1,1]]}", "budget_share" }, /* twice */
};

static void test_refused(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        lg_roles *r = NULL;
        lg_error err = { 0 };
        if (parse(&r, refused[i].text, &err) != LG_ERR_FORMAT) fail_msg("accepted: %s", refused[i].text);
        assert_null(r);
        if (!strstr(err.message, refused[i].key) || !strstr(err.message, "test.json"))
            fail_msg("\"%s\" does not name %s", err.message, refused[i].key);
    }
}

static void test_written_is_read(void **state) {
    (void)state;
    const char *texts[] = { HEAD DONOR ",\"budget\":512,\"recents\":64}", HEAD SAME "}" };
    for (int k = 0; k < 2; k++) {
        lg_roles *a = NULL, *b = NULL;
        lg_text t = { 0 };
        double grid[6] = { 0.5, 0.25, 1, 0, 0.125, 0.75 };
        lg_roles_notes notes = { "{\"seed\": 1}", grid, grid };
        assert_int_equal(parse(&a, texts[k], NULL), LG_OK);
        assert_int_equal(lg_roles_format(&t, a, &notes, NULL), LG_OK);
        assert_int_equal(parse(&b, t.data, NULL), LG_OK);
        assert_int_equal(a->same_index, b->same_index);
        assert_int_equal(a->budget, b->budget);
        assert_int_equal(a->sinks, b->sinks);
        assert_int_equal(a->recents, b->recents);
        assert_memory_equal(a->role, b->role, 6 * sizeof *a->role);
        assert_int_equal(k == 1, strstr(t.data, "\"sparse\"") != NULL);
        lg_roles_free(a);
        lg_roles_free(b);
        lg_text_free(&t);
    }
}

static void test_broken_maps_are_not_written(void **state) {
    (void)state;
    lg_text t = { 0 };
    lg_roles *r = lg_roles_new(2, 2);
    r->role[2] = (lg_role){ LG_ROLE_DONOR, 0, 1 };
    assert_int_equal(lg_roles_format(&t, r, NULL, NULL), LG_ERR_FORMAT);
    r->role[1].kind = LG_ROLE_RETRIEVAL;
    assert_int_equal(lg_roles_format(&t, r, NULL, NULL), LG_ERR_FORMAT); /* count still 0 */
    r->n_retrieval = 1;
    assert_int_equal(lg_roles_format(&t, r, NULL, NULL), LG_OK);
    lg_text_free(&t);
    lg_roles_free(r);
}

static void test_show_and_plot(void **state) {
    (void)state;
    char path[] = "/tmp/lg-roles-XXXXXX", svg[64];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    const char *text = HEAD DONOR ",\"coverage\":[[1,0.5],[0.75,1],[0.25,0.9]],\"sensitivity\":[[0.1,0.2],[0,0.3],[0.4,1]]}";
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    lg_text t = { 0 };
    assert_int_equal(lg_heads_show(path, false, &t, NULL), LG_OK);
    assert_non_null(strstr(t.data, "2 retrieval, 2 donor, 2 window of 6 heads"));
    assert_non_null(strstr(t.data, "R:1"));
    lg_text_free(&t);
    assert_int_equal(lg_heads_show(path, true, &t, NULL), LG_OK);
    lg_json *j = NULL;
    assert_int_equal(lg_json_parse(&j, "show", t.data, t.n, NULL), LG_OK);
    int64_t v = 0;
    assert_true(lg_json_int(lg_json_at(lg_json_at(lg_json_get(j, "readers"), 1), 1), &v));
    assert_int_equal(v, 1);
    lg_json_free(j);
    lg_text_free(&t);
    snprintf(svg, sizeof svg, "%s.svg", path);
    assert_int_equal(lg_heads_plot(path, svg, NULL), LG_OK);
    assert_int_equal(lg_file_read_all(&t, svg, 1 << 20, NULL), LG_OK);
    int64_t cells = 0;
    for (const char *p = t.data; (p = strstr(p, "<title>")); p++) cells++;
    assert_int_equal(cells, 12); /* roles and sensitivity */
    assert_non_null(strstr(t.data, "layer 2 head 1: reads the set of 1.1, coverage 0.900"));
    lg_text_free(&t);
    remove(svg);
    remove(path);
    assert_int_equal(lg_heads_plot(path, svg, NULL), LG_ERR_IO);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_donor),
        cmocka_unit_test(test_sparse_resolves),
        cmocka_unit_test(test_shares), cmocka_unit_test(test_keep),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_written_is_read),
        cmocka_unit_test(test_broken_maps_are_not_written),
        cmocka_unit_test(test_show_and_plot),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
