/* spool: the ids of a long text in an unlinked file beside the bank, mapped: what a build holds of a document are pages that the
 * system may drop, whatever its length. */
#include "memory/bank.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct target { int fd; int64_t n; const char *path; } target;

static lg_status add(void *user, const int32_t *ids, int64_t n, lg_error *err) {
    target *t = user;
    const char *p = (const char *)ids;
    for (int64_t left = n * (int64_t)sizeof *ids; left > 0;) {
        const ssize_t k = write(t->fd, p, (size_t)left);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0) return lg_base_fail(err, LG_ERR_IO, -1, "%s: cannot write: %s", t->path, strerror(errno));
        p += k;
        left -= k;
    }
    t->n += n;
    return LG_OK;
}

lg_status lg_memory_spool(lg_spool *out, const lg_model *m, const char *text, int64_t n_text, const char *beside, lg_error *err) {
    lg_status st = LG_OK;
    lg_text name = { 0 };
    target t = { .fd = -1 };
    *out = (lg_spool){ 0 };
    if (!lg_base_text_printf(&name, "%s.ids.XXXXXX", beside)) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    t.path = name.data;
    t.fd = mkostemp(name.data, O_CLOEXEC);
    if (t.fd < 0 || unlink(name.data)) LG_TRY(lg_base_fail(err, LG_ERR_IO, -1, "%s: cannot create: %s", name.data, strerror(errno)));
    LG_TRY(lg_text_encode_to(m->tok, text, n_text, add, &t, err));
    if (t.n > 0) {
        void *p = mmap(NULL, (size_t)t.n * sizeof *out->ids, PROT_READ, MAP_PRIVATE, t.fd, 0);
        if (p == MAP_FAILED) LG_TRY(lg_base_fail(err, LG_ERR_IO, -1, "%s: cannot map: %s", name.data, strerror(errno)));
        *out = (lg_spool){ .ids = p, .n = t.n };
    }
done:
    if (t.fd >= 0) close(t.fd);
    lg_text_free(&name);
    return st;
}

void lg_memory_spool_free(lg_spool *s) {
    if (s->ids) munmap((void *)(uintptr_t)s->ids, (size_t)s->n * sizeof *s->ids);
    *s = (lg_spool){ 0 };
}
