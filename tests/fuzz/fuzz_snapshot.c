/* Snapshots of tests/fixtures/tiny-llama-linear: the checksum is made right first, or nothing behind it would be reached. A
 * refused file leaves the session as it was. Run from the root of the repository. */
#ifndef FUZZ_ONE
#define FUZZ_ONE LLVMFuzzerTestOneInput
#endif
#include "fuzz.h"
#include <xxhash.h>
#include "model/model.h"

static lg_model *snap_model;
static lg_session *snap_session;
static void snap_clean(void) {
    lg_session_free(snap_session);
    lg_model_free(snap_model);
}

int FUZZ_ONE(const uint8_t *data, size_t size);
int FUZZ_ONE(const uint8_t *data, size_t size) {
    static const int32_t keep[] = { 5, 6, 7 }, zero = 0, one = 1;
    lg_error e = { 0 };
    if (!snap_session) {
        const lg_model_params p = { .path = "tests/fixtures/tiny-llama-linear", .n_threads = 1 };
        lg_session_params sp;
        lg_session_defaults(&sp);
        sp.n_ctx = 64;
        FUZZ_CHECK(lg_model_open(&snap_model, &p, &e) == LG_OK && lg_session_new(&snap_session, snap_model, &sp, &e) == LG_OK);
        atexit(snap_clean);
    }
    char path[64];
    uint8_t *copy = malloc(size + 1);
    FUZZ_CHECK(copy);
    memcpy(copy, data, size);
    if (size >= 8) {
        const uint64_t sum = XXH3_128bits(copy, size - 8).low64;
        memcpy(copy + size - 8, &sum, 8);
    }
    const int fd = fuzz_file(path, copy, size);
    free(copy);
    FUZZ_CHECK(lg_session_sync(snap_session, 0, keep, 3, &e) == LG_OK);
    const lg_status st = lg_session_load(snap_session, path, &e);
    fuzz_refused(st, &e, path);
    const int64_t len = lg_session_len(snap_session, 0);
    if (st != LG_OK) FUZZ_CHECK(len == 3 && !memcmp(lg_session_ids(snap_session, 0), keep, sizeof keep));
    else if (len < 64) FUZZ_CHECK(lg_session_step(snap_session, &zero, &one, 1, &e) == LG_OK);
    close(fd);
    return 0;
}
