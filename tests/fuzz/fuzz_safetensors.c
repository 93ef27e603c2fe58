/* safetensors, one file: what opens has tensors that tile the data, and is written and read back the same. */
#ifndef FUZZ_ONE
#define FUZZ_ONE LLVMFuzzerTestOneInput
#endif
#include "fuzz.h"

int FUZZ_ONE(const uint8_t *data, size_t size);
int FUZZ_ONE(const uint8_t *data, size_t size) {
    char path[64];
    lg_error e = { 0 };
    lg_st *s = NULL;
    const int fd = fuzz_file(path, data, size);
    const lg_status st = lg_st_open(&s, path, &e);
    fuzz_refused(st, &e, path);
    if (st == LG_OK) {
            int64_t bytes = 0;
        for (int64_t i = 0; i < lg_st_n_tensor(s); i++) {
            const lg_tensor_ref *t = lg_st_tensor(s, i);
            fuzz_touch(t->data, t->bytes);
            bytes += t->bytes;
            FUZZ_CHECK(lg_st_find(s, t->name) == t);
        }
        FUZZ_CHECK(bytes <= (int64_t)size - 8 && lg_st_file_bytes(s) == (int64_t)size);
        const char *meta = lg_st_meta(s, "longan");
        if (meta) fuzz_touch(meta, (int64_t)strlen(meta));
    }
    lg_st_close(s);
    close(fd);
    return 0;
}
