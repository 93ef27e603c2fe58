/* The input of `generate --batch`: one JSON object a line, {"prompt": TEXT} or {"ids": [..]}, and "n"; and that of
 * `ask --questions`, where "question" stands for "prompt".
 *
 * The program may not see the library's JSON room, so this reads just what such a line can hold: one flat
 * object of strings, whole numbers and lists of whole numbers. Unknown keys, duplicate keys and anything
 * behind the object are errors that name the line and the byte. */
#include <stdlib.h>
#include <string.h>

#include "cli.h"

typedef struct reader {
    const char *name, *key; /* key: of the text */
    int64_t line;
    const char *begin, *s, *end; /* of the line */
} reader;

static int bad(const reader *r, const char *what)
{
    return failed("%s: line %lld, byte %lld: %s", r->name, (long long)r->line, (long long)(r->s - r->begin), what);
}

static void blanks(reader *r)
{
    while (r->s < r->end && (*r->s == ' ' || *r->s == '\t' || *r->s == '\r'))
        r->s++;
}

static bool take(reader *r, char c)
{
    blanks(r);
    if (r->s == r->end || *r->s != c)
        return false;
    r->s++;
    return true;
}

static int take_int(reader *r, int64_t max, int64_t *out)
{
    blanks(r);
    const char *start = r->s;
    int64_t v = 0;
    for (; r->s < r->end && *r->s >= '0' && *r->s <= '9'; r->s++) {
        v = 10 * v + (*r->s - '0');
        if (v > max) {
            r->s = start;
            return bad(r, "the number is out of range");
        }
    }
    bool more = r->s < r->end && strchr(".eE+-", *r->s);
    if (r->s == start || more || (*start == '0' && r->s - start > 1)) {
        r->s = start;
        return bad(r, "a whole number, 0 or more, must stand here");
    }
    *out = v;
    return CLI_DONE;
}

/* Four hex digits; -1 where there are none. */
static int32_t take_hex4(reader *r)
{
    int32_t v = 0;
    if (r->end - r->s < 4)
        return -1;
    for (int i = 0; i < 4; i++, r->s++) {
        char c = *r->s;
        if (c >= '0' && c <= '9')
            v = 16 * v + (c - '0');
        else if ((c | 32) >= 'a' && (c | 32) <= 'f')
            v = 16 * v + ((c | 32) - 'a' + 10);
        else
            return -1;
    }
    return v;
}

static void add_utf8(buf *b, int32_t c)
{
    char u[4];
    size_t n;
    if (c < 0x80) {
        u[0] = (char)c;
        n = 1;
    } else if (c < 0x800) {
        u[0] = (char)(0xC0 | c >> 6);
        n = 2;
    } else if (c < 0x10000) {
        u[0] = (char)(0xE0 | c >> 12);
        n = 3;
    } else {
        u[0] = (char)(0xF0 | c >> 18);
        n = 4;
    }
    for (size_t i = 1; i < n; i++)
        u[i] = (char)(0x80 | (c >> 6 * (int)(n - 1 - i) & 0x3F));
    buf_add(b, u, n);
}

/* Behind "\u": a pair of surrogates is one character, a lone one becomes U+FFFD. */
static int take_unicode(reader *r, buf *out)
{
    int32_t c = take_hex4(r);
    if (c < 0)
        return bad(r, "\\u needs four hex digits");
    if (c >= 0xD800 && c < 0xDC00 && r->end - r->s >= 6 && r->s[0] == '\\' && r->s[1] == 'u') {
        const char *back = r->s;
        r->s += 2;
        int32_t low = take_hex4(r);
        if (low >= 0xDC00 && low < 0xE000) {
            add_utf8(out, 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00));
            return CLI_DONE;
        }
        r->s = back;
    }
    add_utf8(out, c >= 0xD800 && c < 0xE000 ? 0xFFFD : c);
    return CLI_DONE;
}

static int take_text(reader *r, buf *out)
{
    static const char letter[] = "\"\\/bfnrt", plain[] = "\"\\/\b\f\n\r\t";
    if (!take(r, '"'))
        return bad(r, "a string must stand here");
    buf_add(out, "", 0);
    while (r->s < r->end && *r->s != '"') {
        unsigned char c = (unsigned char)*r->s;
        if (c < 0x20)
            return bad(r, "a control character inside a string");
        if (c != '\\') {
            buf_add(out, r->s++, 1);
            continue;
        }
        if (++r->s == r->end)
            break;
        char e = *r->s++;
        const char *at = e ? strchr(letter, e) : NULL;
        if (at)
            buf_add(out, &plain[at - letter], 1);
        else if (e != 'u')
            return bad(r, "unknown escape");
        else if (take_unicode(r, out))
            return CLI_FAILED;
    }
    if (r->s == r->end)
        return bad(r, "the string does not end");
    r->s++;
    return CLI_DONE;
}

static int take_ids(reader *r, id_list *out)
{
    if (!take(r, '['))
        return bad(r, "a list of ids must stand here");
    if (take(r, ']'))
        return CLI_DONE;
    do {
        int64_t v;
        if (take_int(r, INT32_MAX, &v))
            return CLI_FAILED;
        ids_push(out, (int32_t)v);
    } while (take(r, ','));
    return take(r, ']') ? CLI_DONE : bad(r, "the list does not end");
}

static int take_member(reader *r, batch_item *it, unsigned *seen)
{
    enum { PROMPT = 1, IDS = 2, N = 4 };
    buf key = {0};
    int rc = take_text(r, &key);
    unsigned bit = 0;
    if (!rc && !take(r, ':'))
        rc = bad(r, "':' must stand here");
    char text[96];
    if (!rc) {
        bit = strcmp(key.data, r->key) == 0 ? PROMPT : strcmp(key.data, "ids") == 0 ? IDS
              : strcmp(key.data, "n") == 0 ? N : 0;
        if (!bit || strlen(key.data) != key.n) {
            snprintf(text, sizeof text, "unknown key (there are %s, ids, n)", r->key);
            rc = bad(r, text);
        } else if (*seen & bit)
            rc = bad(r, "a key stands twice");
    }
    *seen |= bit;
    if (!rc)
        rc = bit == PROMPT ? take_text(r, &it->prompt)
             : bit == IDS ? take_ids(r, &it->ids) : take_int(r, (int64_t)1 << 30, &it->n);
    it->has_prompt |= bit == PROMPT;
    if (!rc && (*seen & (PROMPT | IDS)) == (PROMPT | IDS)) {
        snprintf(text, sizeof text, "%s and ids exclude each other", r->key);
        rc = bad(r, text);
    }
    buf_free(&key);
    return rc;
}

static int take_object(reader *r, batch_item *it)
{
    unsigned seen = 0;
    if (!take(r, '{'))
        return bad(r, "an object must stand here");
    do {
        int rc = take_member(r, it, &seen);
        if (rc)
            return rc;
    } while (take(r, ','));
    if (!take(r, '}'))
        return bad(r, "the object does not end");
    blanks(r);
    if (r->s != r->end)
        return bad(r, "something stands behind the object");
    char text[96];
    snprintf(text, sizeof text, "%s or ids is missing", r->key);
    return seen & 3 ? CLI_DONE : bad(r, text);
}

int batch_read(const char *path, const char *key, batch_item **items, int64_t *n)
{
    buf text = {0};
    int rc = read_input(path, &text);
    *items = NULL;
    *n = 0;
    const char *s = text.data, *end = s + text.n;
    for (int64_t line = 1; !rc && s < end; line++) {
        const char *stop = memchr(s, '\n', (size_t)(end - s));
        reader r = {.name = strcmp(path, "-") == 0 ? "stdin" : path, .key = key, .line = line, .begin = s, .s = s,
                    .end = stop ? stop : end};
        s = stop ? stop + 1 : end;
        blanks(&r);
        if (r.s == r.end)
            continue;
        *items = cli_alloc(*items, (size_t)*n + 1, sizeof **items);
        (*items)[*n] = (batch_item){.n = -1, .line = line};
        rc = take_object(&r, &(*items)[(*n)++]);
    }
    buf_free(&text);
    if (!rc && *n == 0)
        rc = failed("%s: holds no %ss", path, key);
    return rc;
}

void batch_free(batch_item *items, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        buf_free(&items[i].prompt);
        free(items[i].ids.v);
    }
    free(items);
}
