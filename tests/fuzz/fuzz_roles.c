/* Roles: what parses passes the check, and is written and read back the same. */
#ifndef FUZZ_ONE
#define FUZZ_ONE LLVMFuzzerTestOneInput
#endif
#include "fuzz.h"
#include "model/roles.h"

int FUZZ_ONE(const uint8_t *data, size_t size);
int FUZZ_ONE(const uint8_t *data, size_t size) {
    lg_roles *r = NULL, *again = NULL;
    lg_text t = { 0 };
    lg_error e = { 0 };
    const lg_status st = lg_roles_parse(&r, "roles.json", (const char *)data, (int64_t)size, &e);
    fuzz_refused(st, &e, "roles.json");
    if (st == LG_OK) {
        FUZZ_CHECK(lg_roles_check(r, "roles.json", &e) == LG_OK && lg_roles_format(&t, r, NULL, &e) == LG_OK);
        FUZZ_CHECK(lg_roles_parse(&again, "again", t.data, t.n, &e) == LG_OK && again->n_layer == r->n_layer && again->n_head_kv == r->n_head_kv);
        FUZZ_CHECK(!memcmp(r->role, again->role, (size_t)(r->n_layer * r->n_head_kv) * sizeof *r->role));
    }
    lg_text_free(&t);
    lg_roles_free(again);
    lg_roles_free(r);
    return 0;
}
