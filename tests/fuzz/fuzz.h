/* What the libFuzzer targets share. A target defines FUZZ_ONE before it includes this; tests/test_fuzz_corpus.c compiles all of
 * them into one plain test over tests/fuzz/corpus and gives each a name of its own. Run one with
 *   make fuzz && build-fuzz/fuzz/fuzz_gguf -max_total_time=60 -rss_limit_mb=2048 FOLDER tests/fuzz/corpus/gguf */
#ifndef LG_FUZZ_H
#define LG_FUZZ_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "file/file.h"

#define FUZZ_CHECK(what)                                                \
    do {                                                                \
        if (!(what)) {                                                  \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);  \
            abort();                                                    \
        }                                                               \
    } while (0)

/* The bytes as a file without a disk: the path of an anonymous file. Closed by fuzz_close. */
static inline int fuzz_file(char path[64], const uint8_t *data, size_t n) {
    const int fd = memfd_create("fuzz", 0);
    FUZZ_CHECK(fd >= 0);
    for (size_t at = 0; at < n;) {
        const ssize_t k = write(fd, data + at, n - at);
        FUZZ_CHECK(k > 0);
        at += (size_t)k;
    }
    snprintf(path, 64, "/proc/self/fd/%d", fd);
    return fd;
}
/* Every refusal says what is wrong, and where: the file's name stands in it. */
static inline void fuzz_refused(lg_status st, const lg_error *e, const char *name) {
    FUZZ_CHECK(st == LG_OK || (e->code == st && strstr(e->message, name)));
}
static volatile unsigned fuzz_sink; /* keeps the reads */
static inline void fuzz_touch(const void *data, int64_t n) { /* reads all of it */
    const uint8_t *p = data;
    unsigned sum = 0;
    for (int64_t i = 0; i < n; i++) sum += p[i];
    fuzz_sink = sum;
}
#endif
