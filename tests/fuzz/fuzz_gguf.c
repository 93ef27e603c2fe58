/* GGUF: every metadata value and tensor is read; then the file is opened as a model and generates one token. */
#ifndef FUZZ_ONE
#define FUZZ_ONE LLVMFuzzerTestOneInput
#endif
#include "fuzz.h"
#include "model/model.h"

int FUZZ_ONE(const uint8_t *data, size_t size);
int FUZZ_ONE(const uint8_t *data, size_t size) {
    char path[64];
    lg_error e = { 0 };
    lg_gguf *g = NULL;
    const int fd = fuzz_file(path, data, size);
    lg_status st = lg_gguf_open(&g, path, &e);
    fuzz_refused(st, &e, path);
    if (st == LG_OK) {
        for (int64_t i = 0; i < lg_gguf_n_tensor(g); i++) fuzz_touch(lg_gguf_tensor(g, i)->data, lg_gguf_tensor(g, i)->bytes);
        for (int64_t i = 0; i < lg_gguf_n_meta(g); i++) {
            const char *key = lg_gguf_meta_key(g, i), *s;
            int64_t v, n;
            int32_t elem;
            double d;
            bool b;
            (void)lg_gguf_int(g, key, &v), (void)lg_gguf_float(g, key, &d), (void)lg_gguf_bool(g, key, &b);
            if (lg_gguf_str(g, key, &s, &n)) fuzz_touch(s, n + 1);
            if (!lg_gguf_array(g, key, &elem, &n)) continue;
            for (int64_t k = 0; k < n && k < 1000; k++) {
                int64_t len;
                (void)lg_gguf_array_int(g, key, k, &v), (void)lg_gguf_array_float(g, key, k, &d);
                if (lg_gguf_array_str(g, key, k, &s, &len)) fuzz_touch(s, len);
            }
        }
    }
    lg_gguf_close(g);
    lg_model *m = NULL;
    lg_session *s = NULL;
    const lg_model_params p = { .path = path, .n_threads = 1 };
    if (st == LG_OK) st = lg_model_open(&m, &p, &e);
    fuzz_refused(st, &e, path);
    if (st == LG_OK) {
        lg_model_info info;
        lg_session_params sp;
        lg_model_get_info(m, &info);
        lg_session_defaults(&sp);
        sp.n_ctx = info.n_ctx_train < 8 ? info.n_ctx_train : 8;
        const int32_t id = 0;
        if (lg_session_new(&s, m, &sp, &e) == LG_OK) FUZZ_CHECK(lg_session_sync(s, 0, &id, 1, &e) == LG_OK);
        lg_session_free(s);
    }
    lg_model_free(m);
    close(fd);
    return 0;
}
