/* What the program writes: a growing text buffer, JSON on top of it, and files that appear whole.
 *
 * Results are built in memory and reach stdout in one piece at the end (emit), so that a command that
 * fails leaves stdout empty. Files get a temporary name in the same folder, are synced, then renamed. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli.h"

void *cli_alloc(void *old, size_t count, size_t size)
{
    size_t bytes;
    void *p = NULL;
    if (!__builtin_mul_overflow(count, size, &bytes))
        p = realloc(old, bytes ? bytes : 1);
    if (!p)
        exit(failed("out of memory (%zu x %zu bytes)", count, size));
    return p;
}

/* ---- text ------------------------------------------------------------------------------------------ */

static void buf_reserve(buf *b, size_t more)
{
    if (b->cap - b->n > more)
        return;
    size_t cap = b->cap ? b->cap : 256;
    while (cap - b->n <= more) {
        if (cap > SIZE_MAX / 2)
            exit(failed("out of memory"));
        cap *= 2;
    }
    b->data = cli_alloc(b->data, cap, 1);
    b->cap = cap;
}

void buf_add(buf *b, const char *s, size_t n)
{
    buf_reserve(b, n);
    if (n)
        memcpy(b->data + b->n, s, n);
    b->n += n;
    b->data[b->n] = 0;
}

void buf_puts(buf *b, const char *s)
{
    buf_add(b, s, strlen(s));
}

void buf_printf(buf *b, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0)
        exit(failed("cannot format output"));
    buf_reserve(b, (size_t)n + 1);
    va_start(args, format);
    vsnprintf(b->data + b->n, (size_t)n + 1, format, args);
    va_end(args);
    b->n += (size_t)n;
}

void buf_free(buf *b)
{
    if (b->mapped)
        munmap(b->data, b->n);
    else
        free(b->data);
    *b = (buf){0};
}

/* ---- JSON ------------------------------------------------------------------------------------------ */

static void json_comma(buf *b)
{
    if (b->comma)
        buf_add(b, ",", 1);
    b->comma = true;
}

void json_begin(buf *b, char bracket)
{
    json_comma(b);
    buf_add(b, &bracket, 1);
    b->comma = false;
}

void json_end(buf *b, char bracket)
{
    buf_add(b, &bracket, 1);
    b->comma = true;
}

/* Length of the valid sequence at s, or minus the length of the bad part that becomes one U+FFFD
 * (the longest prefix of some valid sequence, as Python's errors="replace" does). */
static int utf8_step(const unsigned char *s, size_t n)
{
    unsigned char c = s[0], low = 0x80, high = 0xBF;
    int want;
    if (c < 0x80)
        return 1;
    if (c >= 0xC2 && c <= 0xDF)
        want = 2;
    else if (c >= 0xE0 && c <= 0xEF)
        want = 3;
    else if (c >= 0xF0 && c <= 0xF4)
        want = 4;
    else
        return -1;
    if (c == 0xE0)
        low = 0xA0;
    else if (c == 0xED)
        high = 0x9F;
    else if (c == 0xF0)
        low = 0x90;
    else if (c == 0xF4)
        high = 0x8F;
    for (int i = 1; i < want; i++) {
        if ((size_t)i >= n || s[i] < low || s[i] > high)
            return -i;
        low = 0x80;
        high = 0xBF;
    }
    return want;
}

static void json_escape(buf *b, unsigned char c)
{
    static const char plain[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
    const char *at = c ? strchr(plain, c) : NULL;
    if (at)
        buf_printf(b, "\\%c", letter[at - plain]);
    else
        buf_printf(b, "\\u%04x", c);
}

static void json_quote(buf *b, const char *text, size_t n)
{
    const unsigned char *s = (const unsigned char *)text;
    buf_add(b, "\"", 1);
    for (size_t i = 0; i < n;) {
        int step = utf8_step(s + i, n - i);
        if (step < 0)
            buf_puts(b, "\xEF\xBF\xBD");
        else if (s[i] < 0x20 || s[i] == '"' || s[i] == '\\' || s[i] == 0x7F)
            json_escape(b, s[i]);
        else
            buf_add(b, text + i, (size_t)step);
        i += (size_t)(step < 0 ? -step : step);
    }
    buf_add(b, "\"", 1);
}

void json_key(buf *b, const char *key)
{
    json_comma(b);
    json_quote(b, key, strlen(key));
    buf_add(b, ":", 1);
    b->comma = false;
}

void json_text(buf *b, const char *s, int64_t n)
{
    json_comma(b);
    json_quote(b, s, n < 0 ? strlen(s) : (size_t)n);
}

void json_int(buf *b, int64_t v)
{
    json_comma(b);
    buf_printf(b, "%lld", (long long)v);
}

/* The shortest form that reads back as the same double. */
void json_number_of(buf *b, double v)
{
    if (!isfinite(v)) {
        json_none(b);
        return;
    }
    char s[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(s, sizeof s, "%.*g", digits, v);
        if (strtod(s, NULL) == v)
            break;
    }
    json_comma(b);
    buf_puts(b, s);
}

void json_bool(buf *b, bool v)
{
    json_comma(b);
    buf_puts(b, v ? "true" : "false");
}

void json_none(buf *b)
{
    json_comma(b);
    buf_puts(b, "null");
}

void json_ids(buf *b, const int32_t *ids, int64_t n)
{
    json_begin(b, '[');
    for (int64_t i = 0; i < n; i++)
        json_int(b, ids[i]);
    json_end(b, ']');
}

void json_kv_text(buf *b, const char *key, const char *s)
{
    json_key(b, key);
    if (s)
        json_text(b, s, -1);
    else
        json_none(b);
}

void json_kv_int(buf *b, const char *key, int64_t v)
{
    json_key(b, key);
    json_int(b, v);
}

void json_kv_real(buf *b, const char *key, double v)
{
    json_key(b, key);
    json_number_of(b, v);
}

/* ---- files ----------------------------------------------------------------------------------------- */

int out_open(out_file *f, const char *path)
{
    *f = (out_file){0};
    struct stat st;
    bool in_place = stat(path, &st) == 0 && !S_ISREG(st.st_mode); /* /dev/null, a pipe */
    int fd;
    f->path = strcpy(cli_alloc(NULL, strlen(path) + 1, 1), path);
    if (in_place) {
        fd = open(path, O_WRONLY | O_CLOEXEC);
    } else {
        buf name = {0};
        buf_printf(&name, "%s.XXXXXX", path);
        f->temp = name.data;
        fd = mkstemp(f->temp);
        mode_t mask = umask(0);
        umask(mask);
        if (fd >= 0 && fchmod(fd, 0666 & ~mask) != 0) {
            close(fd);
            unlink(f->temp);
            fd = -1;
        }
    }
    if (fd >= 0)
        f->f = fdopen(fd, "wb");
    if (f->f)
        return CLI_DONE;
    int rc = failed("%s: cannot be written: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    else
        free(f->temp), f->temp = NULL;
    out_abort(f);
    return rc;
}

int out_commit(out_file *f)
{
    bool bad = fflush(f->f) != 0 || ferror(f->f);
    if (!bad && f->temp)
        bad = fsync(fileno(f->f)) != 0;
    if (fclose(f->f) != 0)
        bad = true;
    f->f = NULL;
    if (!bad && f->temp)
        bad = rename(f->temp, f->path) != 0;
    int rc = bad ? failed("%s: writing failed: %s", f->path, strerror(errno)) : CLI_DONE;
    if (!bad) {
        free(f->temp);
        f->temp = NULL;
    }
    out_abort(f);
    return rc;
}

void out_abort(out_file *f)
{
    if (f->f)
        fclose(f->f);
    if (f->temp)
        unlink(f->temp);
    free(f->temp);
    free(f->path);
    *f = (out_file){0};
}

int out_whole(const char *path, const buf *b)
{
    out_file f;
    int rc = out_open(&f, path);
    if (rc)
        return rc;
    if (b->n)
        fwrite(b->data, 1, b->n, f.f); /* a short write sets ferror, seen at commit */
    return out_commit(&f);
}

/* .npy 1.0: magic, version, header length, a Python dict padded so that the data start at 64 bytes. */
void npy_header(FILE *f, const int64_t *shape, int n_dim)
{
    buf dict = {0};
    buf_puts(&dict, "{'descr': '<f4', 'fortran_order': False, 'shape': (");
    for (int i = 0; i < n_dim; i++)
        buf_printf(&dict, "%s%lld", i ? ", " : "", (long long)shape[i]);
    buf_puts(&dict, n_dim == 1 ? ",), }" : "), }");
    int size = (10 + (int)dict.n + 1 + 63) / 64 * 64 - 10;
    fwrite("\x93NUMPY\1\0", 1, 8, f);
    fputc(size & 255, f);
    fputc(size >> 8, f);
    fprintf(f, "%-*s\n", size - 1, dict.data);
    buf_free(&dict);
}

int emit(const buf *b)
{
    size_t n = b->n ? fwrite(b->data, 1, b->n, stdout) : 0;
    if (n != b->n || fflush(stdout) != 0)
        return failed("writing to stdout failed: %s", strerror(errno));
    return CLI_DONE;
}
