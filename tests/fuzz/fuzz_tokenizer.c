/* tokenizer.json: what opens encodes and decodes. The file lies in a folder of its own, in memory where /dev/shm is. */
#ifndef FUZZ_ONE
#define FUZZ_ONE LLVMFuzzerTestOneInput
#endif
#include "fuzz.h"
#include "text/text.h"

static char tok_folder[64], tok_path[96];
static void tok_clean(void) {
    unlink(tok_path);
    rmdir(tok_folder);
}

int FUZZ_ONE(const uint8_t *data, size_t size);
int FUZZ_ONE(const uint8_t *data, size_t size) {
    static const char text[] = "The 12 caf\xc3\xa9 e\xcc\x81 <|im_end|> \xff <flag>  abc\n\n 'll \xe4\xb8\xad";
    if (!tok_folder[0]) {
        snprintf(tok_folder, sizeof tok_folder, "%s/longan-fuzz-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
        FUZZ_CHECK(mkdtemp(tok_folder));
        snprintf(tok_path, sizeof tok_path, "%s/tokenizer.json", tok_folder);
        atexit(tok_clean);
    }
    FILE *f = fopen(tok_path, "wb");
    FUZZ_CHECK(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
    lg_tokenizer *t = NULL;
    lg_error e = { 0 };
    const lg_status st = lg_text_from_folder(&t, tok_folder, &e);
    fuzz_refused(st, &e, tok_folder);
    for (unsigned flags = 0; st == LG_OK && flags < 4; flags++) {
        lg_ids ids = { 0 };
        lg_text out = { 0 };
        if (lg_text_encode(t, text, (int64_t)sizeof text - 1, flags, &ids, &e) == LG_OK) {
            for (int64_t i = 0; i < ids.n; i++) FUZZ_CHECK(ids.data[i] >= 0 && ids.data[i] < lg_text_n_vocab(t));
            FUZZ_CHECK(lg_text_decode(t, ids.data, ids.n, flags, &out, &e) == LG_OK);
        }
        lg_ids_free(&ids);
        lg_text_free(&out);
    }
    lg_text_close(t);
    return 0;
}
