/* JSON through jansson, wrapped here and nowhere else. A lg_json is a jansson value. */
#include "file/file.h"
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DEPTH = 128 };

/* jansson reports an allocation that failed inside its lexer or its tables as bad text: what really happened is kept here. */
static _Thread_local bool starved;
static void *take_memory(size_t n) {
    void *p = n > INT64_MAX ? NULL : lg_base_alloc((int64_t)n);
    if (!p) starved = true;
    return p;
}
static void set_memory(void) { json_set_alloc_funcs(take_memory, lg_base_free); }

static const json_t *in(const lg_json *v) { return (const json_t *)(const void *)v; }
static const lg_json *out_of(const json_t *v) { return (const lg_json *)(const void *)v; }

/* jansson recurses; brackets outside strings are counted before it sees them. Returns the byte that goes too deep, or -1. */
static int64_t too_deep(const char *s, int64_t n) {
    int depth = 0;
    bool quoted = false;
    for (int64_t i = 0; i < n; i++) {
        if (quoted) {
            if (s[i] == '\\') i++;
            else if (s[i] == '"') quoted = false;
        } else if (s[i] == '"') {
            quoted = true;
        } else if (s[i] == '[' || s[i] == '{') {
            if (++depth > MAX_DEPTH) return i;
        } else if (s[i] == ']' || s[i] == '}') {
            depth--;
        }
    }
    return -1;
}

lg_status lg_json_parse(lg_json **root, const char *name, const char *text, int64_t n, lg_error *err) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    json_error_t e;
    pthread_once(&once, set_memory);
    *root = NULL;
    const int64_t deep = too_deep(text, n);
    if (deep >= 0) return lg_base_fail(err, LG_ERR_FORMAT, deep, "%s: nested deeper than %d at offset %lld", name, MAX_DEPTH, (long long)deep);
    starved = false;
    json_t *v = json_loadb(text, (size_t)n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &e);
    if (starved) { /* also where there is a value: its lexer drops the letters that it has no room for */
        json_decref(v);
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: out of memory", name);
    }
    if (!v) return lg_base_fail(err, LG_ERR_FORMAT, e.position, "%s: line %d, offset %d: %s", name, e.line, e.position, e.text);
    *root = (lg_json *)(void *)v;
    return LG_OK;
}
lg_status lg_json_load(lg_json **root, const char *path, int64_t max_bytes, lg_error *err) {
    lg_text t = { 0 };
    *root = NULL;
    lg_status st = lg_file_read_all(&t, path, max_bytes, err);
    if (st == LG_OK) st = lg_json_parse(root, path, t.data, t.n, err);
    lg_text_free(&t);
    return st;
}
void lg_json_free(lg_json *root) {
    if (root) json_decref((json_t *)(void *)root);
}
lg_json_type lg_json_typeof(const lg_json *v) {
    if (!v) return LG_JSON_NULL;
    switch (json_typeof(in(v))) {
    case JSON_OBJECT: return LG_JSON_OBJECT;
    case JSON_ARRAY: return LG_JSON_ARRAY;
    case JSON_STRING: return LG_JSON_STRING;
    case JSON_INTEGER: return LG_JSON_INT;
    case JSON_REAL: return LG_JSON_REAL;
    case JSON_TRUE:
    case JSON_FALSE: return LG_JSON_BOOL;
    default: return LG_JSON_NULL;
    }
}
const lg_json *lg_json_get(const lg_json *obj, const char *key) { return obj ? out_of(json_object_get(in(obj), key)) : NULL; }
const lg_json *lg_json_at(const lg_json *arr, int64_t i) { return arr && i >= 0 ? out_of(json_array_get(in(arr), (size_t)i)) : NULL; }
int64_t lg_json_size(const lg_json *v) {
    if (!v) return 0;
    return (int64_t)(json_is_object(in(v)) ? json_object_size(in(v)) : json_array_size(in(v)));
}
bool lg_json_int(const lg_json *v, int64_t *out) {
    if (!v || !json_is_integer(in(v))) return false;
    *out = json_integer_value(in(v));
    return true;
}
bool lg_json_num(const lg_json *v, double *out) {
    if (!v || !json_is_number(in(v))) return false;
    *out = json_number_value(in(v));
    return true;
}
bool lg_json_bool(const lg_json *v, bool *out) {
    if (!v || !json_is_boolean(in(v))) return false;
    *out = json_is_true(in(v));
    return true;
}
const char *lg_json_str(const lg_json *v, int64_t *n) {
    if (!v || !json_is_string(in(v))) return NULL;
    if (n) *n = (int64_t)json_string_length(in(v));
    return json_string_value(in(v));
}
void lg_json_each(const lg_json *obj, lg_json_member_fn fn, void *user) {
    if (!obj || !json_is_object(in(obj))) return;
    json_t *o = (json_t *)(uintptr_t)obj; /* jansson iterates over non-const objects; nothing is changed */
    for (void *i = json_object_iter(o); i; i = json_object_iter_next(o, i)) fn(user, json_object_iter_key(i), out_of(json_object_iter_value(i)));
}

bool lg_json_put_str(lg_text *t, const char *s, int64_t n) {
    lg_text clean = { 0 };
    bool ok = lg_file_utf8_repair(&clean, s, n) && lg_base_text_append(t, "\"", 1);
    for (int64_t i = 0, from = 0; ok && i <= clean.n; i++) {
        const unsigned char c = i < clean.n ? (unsigned char)clean.data[i] : 0;
        if (i < clean.n && c >= 0x20 && c != '"' && c != '\\' && c != 0x7f) continue;
        ok = lg_base_text_append(t, clean.data + from, i - from);
        from = i + 1;
        if (!ok || i == clean.n) break;
        if (c == '"' || c == '\\') ok = lg_base_text_printf(t, "\\%c", c);
        else if (c == '\n') ok = lg_base_text_append(t, "\\n", 2);
        else if (c == '\t') ok = lg_base_text_append(t, "\\t", 2);
        else if (c == '\r') ok = lg_base_text_append(t, "\\r", 2);
        else ok = lg_base_text_printf(t, "\\u%04x", c);
    }
    lg_text_free(&clean);
    return ok && lg_base_text_append(t, "\"", 1);
}
bool lg_json_put_num(lg_text *t, double v) {
    char buf[40];
    if (!isfinite(v)) return lg_base_text_append(t, "null", 4);
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(buf, sizeof buf, "%.*g", digits, v);
        if (strtod(buf, NULL) == v) break;
    }
    return lg_base_text_append(t, buf, (int64_t)strlen(buf));
}
