/* Read-only mappings and whole-file reads. */
#include "file/file.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static lg_status io(lg_error *err, const char *path, const char *what) {
    return lg_base_fail(err, LG_ERR_IO, -1, "%s: %s: %s", path, what, strerror(errno));
}

lg_status lg_file_map(lg_map *out, const char *path, lg_error *err) {
    lg_status st = LG_OK;
    struct stat sb;
    memset(out, 0, sizeof *out);
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe without a writer must not hang the open */
    if (fd < 0) return io(err, path, "cannot open");
    if (fstat(fd, &sb)) LG_TRY(io(err, path, "cannot stat"));
    if (!S_ISREG(sb.st_mode)) LG_TRY(lg_base_fail(err, LG_ERR_IO, -1, "%s: no regular file", path));
    out->path = lg_base_strdup(path);
    if (!out->path) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    if (sb.st_size) { /* an empty file has no mapping: data stays NULL */
        void *p = mmap(NULL, (size_t)sb.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) LG_TRY(io(err, path, "cannot map"));
        out->data = p;
        out->size = sb.st_size;
    }
done:
    close(fd);
    if (st != LG_OK) lg_file_unmap(out);
    return st;
}

void lg_file_unmap(lg_map *m) {
    union { const uint8_t *from; void *to; } data = { m->data };
    if (m->data) munmap(data.to, (size_t)m->size);
    lg_base_free(m->path);
    memset(m, 0, sizeof *m);
}

void lg_file_forget(const void *data, int64_t bytes) {
    const uintptr_t page = 4096, first = ((uintptr_t)data + page - 1) / page * page, last = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
    if (last > first) madvise((void *)first, last - first, MADV_DONTNEED);
}

lg_status lg_file_read_all(lg_text *out, const char *path, int64_t max_bytes, lg_error *err) {
    lg_status st = LG_OK;
    char buf[1 << 16];
    const bool is_stdin = !strcmp(path, "-");
    const int fd = is_stdin ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return io(err, path, "cannot open");
    if (!lg_base_text_append(out, "", 0)) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    for (;;) {
        const ssize_t n = read(fd, buf, sizeof buf);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) LG_TRY(io(err, is_stdin ? "stdin" : path, "cannot read"));
        if (n == 0) break;
        if (n > max_bytes - out->n)
            LG_TRY(lg_base_fail(err, LG_ERR_LIMIT, -1, "%s: more than %lld bytes", is_stdin ? "stdin" : path, (long long)max_bytes));
        if (!lg_base_text_append(out, buf, n)) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    }
done:
    if (!is_stdin) close(fd);
    if (st != LG_OK) lg_text_free(out);
    return st;
}
