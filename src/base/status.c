/* Status text, error filling and the one log callback. The library never prints and never exits. */
#include "base/base.h"

#include <stdio.h>
#include <string.h>

const char *lg_status_text(lg_status s) {
    switch (s) {
#define LG_X(name, value, text) \
    case LG_##name: return text;
        LG_STATUS_LIST(LG_X)
#undef LG_X
    }
    return "unknown status";
}

/* One line, whatever a file put into a name: control bytes become '?', and a UTF-8 sequence that the
 * buffer's end cut in two is dropped whole. */
static void clean_line(char *s, bool cut) {
    size_t n = strlen(s);
    if (cut) {
        size_t back = 0;
        while (back < 3 && back < n && ((unsigned char)s[n - 1 - back] & 0xC0) == 0x80) back++;
        if (back < n && (unsigned char)s[n - 1 - back] >= 0xC0) n -= back + 1;
        s[n] = '\0';
    }
    for (char *p = s; *p; p++) {
        unsigned char c = (unsigned char)*p;
        if (c < 0x20 || c == 0x7F) *p = '?';
    }
}

lg_status lg_base_fail(lg_error *err, lg_status code, int64_t offset, const char *fmt, ...) {
    if (!err) return code;
    /* A local buffer: callers wrap an earlier message and pass err->message as an argument. */
    char line[sizeof err->message];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (n < 0) line[0] = '\0';
    clean_line(line, n >= (int)sizeof line);
    err->code = code;
    err->offset = offset;
    memcpy(err->message, line, sizeof line);
    return code;
}

static lg_log_fn log_fn;
static void *log_user;

void lg_log_set(lg_log_fn fn, void *user) {
    log_fn = fn;
    log_user = user;
}

void lg_base_log(lg_log_level level, const char *fmt, ...) {
    if (!log_fn) return;
    char line[1024];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (n < 0) return;
    clean_line(line, n >= (int)sizeof line);
    log_fn(log_user, level, line);
}
