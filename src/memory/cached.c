/* cached: a folder of banks, one per text, memory weights and parameters, named by the hash of all three. */
#include "memory/bank.h"
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static lg_status make_folder(const char *path, lg_error *err) {
    lg_status st = LG_OK;
    char *copy = lg_base_strdup(path);
    if (!copy) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    for (char *s = copy + 1;; s++) {
        const char c = *s;
        if (c && c != '/') continue;
        *s = 0;
        if (mkdir(copy, 0777) && errno != EEXIST) {
            st = lg_base_fail(err, LG_ERR_IO, -1, "%s: cannot be made: %s", copy, strerror(errno));
            break;
        }
        *s = c;
        if (!c) break;
    }
    lg_base_free(copy);
    return st;
}

lg_status lg_bank_cached(lg_bank **out, lg_model *m, const lg_bank_params *p, const char *text, int64_t n_text, const char *folder, bool *built, lg_error *err) {
    lg_status st = LG_OK;
    lg_text path = { 0 };
    char weights[40] = "", name[33];
    const int64_t how[] = { p->chunk, p->window, p->ratio, p->slots, p->group, m->compute, m->memory.slot_rope, n_text };
    lg_hash *h = lg_base_hash_new();
    *out = NULL;
    *built = false;
    if (!h) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    LG_TRY(lg_memory_weights_hash(m, weights, err));
    lg_base_hash_feed(h, m->info.fingerprint, 32);
    lg_base_hash_feed(h, weights, sizeof weights);
    lg_base_hash_feed(h, how, sizeof how);
    lg_base_hash_feed(h, text, n_text);
    lg_base_hash_hex128(h, name);
    if (!lg_base_text_printf(&path, "%s/%s.bank", folder, name)) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    if (!access(path.data, F_OK)) {
        lg_error why = { 0 };
        if (lg_bank_open(out, path.data, &why) == LG_OK) goto done;
        lg_base_log(LG_LOG_WARN, "%s; it is built again", why.message);
    }
    LG_TRY(make_folder(folder, err));
    LG_TRY(lg_bank_build(m, p, text, n_text, path.data, err));
    LG_TRY(lg_bank_open(out, path.data, err));
    *built = true;
done:
    lg_base_hash_free(h);
    lg_text_free(&path);
    return st;
}
