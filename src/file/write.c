/* Atomic writing: a temporary file beside the target, synced, then renamed over it. */
#include "file/file.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

static lg_status io(lg_error *err, const char *path, const char *what) {
    return lg_base_fail(err, LG_ERR_IO, -1, "%s: %s: %s", path, what, strerror(errno));
}

lg_status lg_file_create(lg_writer *w, const char *path, lg_error *err) {
    lg_text temp = { 0 };
    memset(w, 0, sizeof *w);
    w->path = lg_base_strdup(path);
    if (!w->path || !lg_base_text_printf(&temp, "%s.tmp.%ld", path, (long)getpid())) {
        lg_text_free(&temp);
        lg_file_abandon(w);
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    }
    w->temp = temp.data;
    w->f = fopen(w->temp, "wb");
    if (w->f) return LG_OK;
    const lg_status st = io(err, path, "cannot create a file beside it");
    lg_base_free(w->temp); /* nothing of ours to unlink */
    w->temp = NULL;
    lg_file_abandon(w);
    return st;
}

lg_status lg_file_write(lg_writer *w, const void *data, int64_t n, lg_error *err) {
    if (n > 0 && fwrite(data, 1, (size_t)n, w->f) != (size_t)n) return io(err, w->path, "cannot write");
    w->pos += n;
    return LG_OK;
}

static void sync_folder(const char *path) {
    char folder[4096];
    const char *slash = strrchr(path, '/');
    const size_t n = slash ? (size_t)(slash - path) : 0;
    if (n >= sizeof folder) return;
    memcpy(folder, path, n);
    folder[n] = 0;
    const int fd = open(slash ? (n ? folder : "/") : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return; /* the rename stands; only its durability is the folder's */
    fsync(fd);
    close(fd);
}

lg_status lg_file_commit(lg_writer *w, lg_error *err) {
    lg_status st = LG_OK;
    if (fflush(w->f) || fsync(fileno(w->f))) LG_TRY(io(err, w->path, "cannot write"));
    const int closed = fclose(w->f);
    w->f = NULL;
    if (closed) LG_TRY(io(err, w->path, "cannot write"));
    if (rename(w->temp, w->path)) LG_TRY(io(err, w->path, "cannot rename"));
    sync_folder(w->path);
    lg_base_free(w->temp);
    w->temp = NULL;
done:
    lg_file_abandon(w);
    return st;
}

void lg_file_abandon(lg_writer *w) {
    if (w->f) fclose(w->f);
    if (w->temp) unlink(w->temp);
    lg_base_free(w->temp);
    lg_base_free(w->path);
    memset(w, 0, sizeof *w);
}
