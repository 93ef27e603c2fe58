/* normal: Unicode questions of the tokenizer: NFC, white space, word characters, UTF-8 in and out.
 * The only file that knows utf8proc. Input is valid UTF-8 (repaired before it comes here).
 * utf8proc's own decomposition sorts marks by insertion, quadratic in a run of marks: here runs are sorted by
 * counting over the 255 combining classes, so one megabyte of marks stays linear. */
#include <string.h>
#include <utf8proc.h>

#include "text/room.h"

int32_t lg_text_utf8_get(const char *s, int64_t n, int64_t *len) {
    const uint8_t *p = (const uint8_t *)s;
    int32_t c = p[0];
    int64_t k = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    if (k > n) k = n;
    if (k > 1) c &= k == 2 ? 0x1f : k == 3 ? 0x0f : 0x07;
    for (int64_t i = 1; i < k; i++) c = c << 6 | (p[i] & 0x3f);
    *len = k;
    return c;
}

int32_t lg_text_utf8_put(char out[4], int32_t c) {
    return (int32_t)utf8proc_encode_char(c, (utf8proc_uint8_t *)out);
}

/* ---- NFC ---- */
typedef struct points { int32_t *c; int64_t n, cap; } points;

static bool points_room(points *p, int64_t more) {
    if (p->n + more <= p->cap) return true;
    int64_t cap = p->cap * 2 + more + 64;
    int32_t *c = lg_base_realloc(p->c, p->cap * 4, cap * 4);
    if (!c) return false;
    p->c = c;
    p->cap = cap;
    return true;
}

static int ccc(int32_t c) { return c < 0x300 ? 0 : utf8proc_get_property(c)->combining_class; }

/* Stable counting sort by combining class of a run of marks, all classes > 0. */
static void sort_marks(int32_t *c, int32_t *tmp, int64_t n) {
    int64_t at[256] = { 0 };
    bool sorted = true;
    for (int64_t i = 1; i < n; i++) sorted &= ccc(c[i - 1]) <= ccc(c[i]);
    if (sorted) return;
    for (int64_t i = 0; i < n; i++) at[ccc(c[i])]++;
    for (int64_t k = 0, sum = 0; k < 256; k++) {
        int64_t count = at[k];
        at[k] = sum;
        sum += count;
    }
    for (int64_t i = 0; i < n; i++) tmp[at[ccc(c[i])]++] = c[i];
    memcpy(c, tmp, (size_t)n * sizeof *c);
}

bool lg_text_needs_nfc(const char *s, int64_t n) {
    for (int64_t i = 0; i < n; i++) /* code points below U+0300 are composed and no marks */
        if ((uint8_t)s[i] >= 0xcc) return true;
    return false;
}

lg_status lg_text_nfc(lg_text *out, const char *s, int64_t n, lg_error *err) {
    if (!lg_text_needs_nfc(s, n))
        return lg_base_text_append(out, s, n) ? LG_OK : lg_base_fail(err, LG_ERR_NOMEM, -1, "no memory to normalise text");
    lg_status st = LG_OK;
    points p = { 0 }, tmp = { 0 };
    bool ok = points_room(&p, n);
    for (int64_t i = 0, len; ok && i < n; i += len) {
        int32_t c = lg_text_utf8_get(s + i, n - i, &len);
        ok = points_room(&p, 32); /* the longest canonical decomposition has 4 */
        if (!ok) break;
        int class = 0;
        utf8proc_ssize_t k = c < 0xc0 ? 0 : utf8proc_decompose_char(c, p.c + p.n, 32, UTF8PROC_STABLE | UTF8PROC_DECOMPOSE, &class);
        if (k > 0) p.n += k;
        else p.c[p.n++] = c;
    }
    ok = ok && points_room(&tmp, p.n);
    for (int64_t i = 0; ok && i < p.n; ) {
        int64_t k = i;
        while (k < p.n && ccc(p.c[k])) k++;
        if (k > i + 1) sort_marks(p.c + i, tmp.c, k - i);
        i = k + 1;
    }
    utf8proc_ssize_t m = ok ? utf8proc_normalize_utf32(p.c, p.n, UTF8PROC_STABLE | UTF8PROC_COMPOSE) : 0;
    for (int64_t i = 0; ok && i < m; i++) {
        char b[4];
        ok = lg_base_text_append(out, b, lg_text_utf8_put(b, p.c[i]));
    }
    if (!ok || m < 0) st = lg_base_fail(err, LG_ERR_NOMEM, -1, "no memory to normalise text");
    lg_base_free(p.c);
    lg_base_free(tmp.c);
    return st;
}

/* ---- classes ---- */
static bool is_space(int32_t c) { /* the property White_Space */
    return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

static bool is_word(int32_t c) { /* letters, marks, decimal digits, letter numbers, connectors, joiners */
    utf8proc_category_t k = utf8proc_category(c);
    return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_NL) || k == UTF8PROC_CATEGORY_PC || c == 0x200c || c == 0x200d ||
           (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
           (c >= 0x1f170 && c <= 0x1f189); /* the letters among the symbols */
}

static int64_t back(const char *s, int64_t n) { /* start of the last code point */
    int64_t i = n - 1;
    while (i > 0 && ((uint8_t)s[i] & 0xc0) == 0x80) i--;
    return i;
}

int64_t lg_text_space_at_start(const char *s, int64_t n) {
    int64_t i = 0, len;
    while (i < n && is_space(lg_text_utf8_get(s + i, n - i, &len))) i += len;
    return i;
}

int64_t lg_text_space_at_end(const char *s, int64_t n) {
    int64_t end = n, len;
    while (end > 0) {
        int64_t i = back(s, end);
        if (!is_space(lg_text_utf8_get(s + i, end - i, &len))) break;
        end = i;
    }
    return n - end;
}

bool lg_text_word_at_start(const char *s, int64_t n) {
    int64_t len;
    return n > 0 && is_word(lg_text_utf8_get(s, n, &len));
}

bool lg_text_word_at_end(const char *s, int64_t n) {
    int64_t len, i = n > 0 ? back(s, n) : 0;
    return n > 0 && is_word(lg_text_utf8_get(s + i, n - i, &len));
}
