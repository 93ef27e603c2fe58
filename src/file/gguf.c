/* GGUF v2 and v3, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): reader. Everything a file says is
 * checked against the bytes it has before it is believed; string arrays are indexed by one pass so that lookups are O(1). */
#include "file/gguf_raw.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T_U8, T_I8, T_U16, T_I16, T_U32, T_I32, T_F32, T_BOOL, T_STR, T_ARR, T_U64, T_I64, T_F64, T_COUNT };
static const int8_t width[T_COUNT] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
enum { MAX_PARTS = 512, MAX_NAME = 65535 };

typedef struct meta {
    char *key, *str;      /* NUL-terminated copies; str only for strings */
    int64_t str_n;
    int32_t type, elem;   /* gguf value types; elem for arrays */
    int64_t n;            /* array length */
    const uint8_t *data;  /* first value byte in the mapping */
    int64_t *at;          /* string arrays: offset of each string's length field from data; [n] */
} meta;

typedef struct table { int32_t *slot; int64_t cap; } table; /* open addressing: index + 1, 0 empty */

struct lg_gguf {
    lg_map *part;
    int32_t n_part;
    meta *kv;
    int64_t n_kv;
    lg_tensor_ref *tensor;
    int64_t n_tensor;
    table kv_table, tensor_table;
    int64_t bytes;
};

typedef struct cursor { const lg_map *map; int64_t pos; lg_error *err; } cursor;

static lg_status corrupt(const cursor *c, int64_t at, const char *what) {
    return lg_base_fail(c->err, LG_ERR_FORMAT, at, "%s: %s at offset %lld", c->map->path, what, (long long)at);
}
static int64_t left(const cursor *c) { return c->map->size - c->pos; }
static lg_status take(cursor *c, void *out, int64_t n, const char *what) {
    if (n > left(c)) return corrupt(c, c->pos, what);
    memcpy(out, c->map->data + c->pos, (size_t)n);
    c->pos += n;
    return LG_OK;
}
/* A count or length that must fit the rest of the file when each item takes at least `least` bytes. */
static lg_status take_count(cursor *c, int64_t *out, int64_t least, const char *what) {
    uint64_t v = 0;
    const int64_t at = c->pos;
    const lg_status st = take(c, &v, 8, what);
    if (st != LG_OK) return st;
    if (v > (uint64_t)(left(c) / least)) return corrupt(c, at, what);
    *out = (int64_t)v;
    return LG_OK;
}
static lg_status take_str(cursor *c, char **out, int64_t *n, int64_t max, const char *what) {
    const int64_t at = c->pos;
    lg_status st = take_count(c, n, 1, what);
    if (st != LG_OK) return st;
    if (*n > max) return corrupt(c, at, what);
    *out = lg_base_alloc(*n + 1);
    if (!*out) return lg_base_fail(c->err, LG_ERR_NOMEM, -1, "out of memory");
    memcpy(*out, c->map->data + c->pos, (size_t)*n);
    c->pos += *n;
    return LG_OK;
}

/* ---- name tables ---- */
static uint64_t name_hash(const char *s) { return lg_base_hash_64(s, (int64_t)strlen(s)); }
static bool table_init(table *t, int64_t n) {
    t->cap = 16;
    while (t->cap < n * 2) t->cap *= 2;
    t->slot = lg_base_calloc(t->cap, sizeof *t->slot);
    return t->slot != NULL;
}
static const meta *find_meta(const lg_gguf *g, const char *key) {
    for (uint64_t h = name_hash(key); g->kv_table.cap; h++) {
        const int32_t i = g->kv_table.slot[h & (uint64_t)(g->kv_table.cap - 1)];
        if (!i) return NULL;
        if (!strcmp(g->kv[i - 1].key, key)) return &g->kv[i - 1];
    }
    return NULL;
}
static void add(table *t, uint64_t h, int64_t i) {
    while (t->slot[h & (uint64_t)(t->cap - 1)]) h++;
    t->slot[h & (uint64_t)(t->cap - 1)] = (int32_t)(i + 1);
}

/* ---- metadata ---- */
static lg_status read_value(cursor *c, meta *m) {
    lg_status st;
    int32_t type;
    const int64_t at = c->pos;
    LG_TRY(take(c, &m->type, 4, "metadata type cut off"));
    type = m->type;
    if (type < 0 || type >= T_COUNT) return corrupt(c, at, "unknown metadata type");
    m->n = 1;
    if (type == T_ARR) {
        LG_TRY(take(c, &m->elem, 4, "array type cut off"));
        if (m->elem < 0 || m->elem >= T_COUNT || m->elem == T_ARR) return corrupt(c, c->pos - 4, "unsupported array type");
        LG_TRY(take_count(c, &m->n, m->elem == T_STR ? 8 : width[m->elem], "array length beyond the file"));
        type = m->elem;
    }
    if (type != T_STR) {
        m->data = c->map->data + c->pos;
        if (m->n * width[type] > left(c)) return corrupt(c, c->pos, "metadata value cut off");
        c->pos += m->n * width[type];
    } else if (m->type == T_STR) {
        LG_TRY(take_str(c, &m->str, &m->str_n, INT64_MAX, "string beyond the file"));
    } else {
        m->data = c->map->data + c->pos;
        const int64_t base = c->pos;
        m->at = lg_base_calloc(m->n + 1, sizeof *m->at);
        if (!m->at) return lg_base_fail(c->err, LG_ERR_NOMEM, -1, "out of memory");
        for (int64_t i = 0; i < m->n; i++) {
            int64_t len;
            m->at[i] = c->pos - base;
            LG_TRY(take_count(c, &len, 1, "string beyond the file"));
            c->pos += len;
        }
    }
done:
    return st;
}


static lg_status read_meta(lg_gguf *g, cursor *c, int64_t n, bool keep) {
    lg_status st = LG_OK;
    meta *kv = lg_base_calloc(n + 1, sizeof *kv);
    if (!kv) return lg_base_fail(c->err, LG_ERR_NOMEM, -1, "out of memory");
    if (keep) g->kv = kv;
    for (int64_t i = 0; i < n && st == LG_OK; i++) {
        int64_t len;
        const int64_t at = c->pos;
        if (keep) g->n_kv = i + 1;
        st = take_str(c, &kv[i].key, &len, MAX_NAME, "metadata key beyond the file");
        if (st == LG_OK && (!len || (int64_t)strlen(kv[i].key) != len)) st = corrupt(c, at, "metadata key empty or with a zero byte");
        if (st == LG_OK) st = read_value(c, &kv[i]);
        if (st == LG_OK && keep && find_meta(g, kv[i].key)) st = lg_base_fail(c->err, LG_ERR_FORMAT, at, "%s: key \"%s\" a second time at offset %lld", c->map->path, kv[i].key, (long long)at);
        if (st == LG_OK && keep) add(&g->kv_table, name_hash(kv[i].key), i);
    }
    if (keep) return st;
    for (int64_t i = 0; i < n; i++) { /* a later part's metadata says nothing new */
        lg_base_free(kv[i].key);
        lg_base_free(kv[i].str);
        lg_base_free(kv[i].at);
    }
    lg_base_free(kv);
    return st;
}

/* ---- tensors ---- */
static const lg_tensor_ref *find_tensor(const lg_gguf *g, const char *name) {
    for (uint64_t h = name_hash(name); g->tensor_table.cap; h++) {
        const int32_t i = g->tensor_table.slot[h & (uint64_t)(g->tensor_table.cap - 1)];
        if (!i) return NULL;
        if (!strcmp(g->tensor[i - 1].name, name)) return &g->tensor[i - 1];
    }
    return NULL;
}

static bool dtype_of(int32_t gguf_type, lg_dtype *out) {
    for (int t = 0; t < LG_DTYPE_COUNT; t++)
        if (t != LG_DTYPE_KV8 && t != LG_DTYPE_U8 && lg_base_dtype((lg_dtype)t)->gguf_type == gguf_type && gguf_type >= 0) {
            *out = (lg_dtype)t;
            return true;
        }
    return false;
}

static lg_status read_tensor_info(lg_gguf *g, cursor *c, lg_tensor_ref *t, int32_t part) {
    lg_status st;
    int64_t len;
    uint32_t n_dim, type;
    uint64_t dim, offset;
    const int64_t at = c->pos;
    LG_TRY(take_str(c, &t->name, &len, MAX_NAME, "tensor name beyond the file"));
    if (!len || (int64_t)strlen(t->name) != len) return corrupt(c, at, "tensor name empty or with a zero byte");
    if (find_tensor(g, t->name)) return lg_base_fail(c->err, LG_ERR_FORMAT, at, "%s: tensor %s a second time at offset %lld", c->map->path, t->name, (long long)at);
    LG_TRY(take(c, &n_dim, 4, "tensor info cut off"));
    if (n_dim < 1 || n_dim > 4) return lg_base_fail(c->err, LG_ERR_FORMAT, c->pos - 4, "%s: tensor %s has %u dimensions at offset %lld", c->map->path, t->name, n_dim, (long long)c->pos - 4);
    t->n_dim = (int32_t)n_dim;
    t->n_elem = 1;
    for (uint32_t i = 0; i < n_dim; i++) { /* the file has the innermost first */
        LG_TRY(take(c, &dim, 8, "tensor info cut off"));
        if (dim < 1 || dim > INT64_MAX || !lg_base_mul(t->n_elem, (int64_t)dim, &t->n_elem))
            return lg_base_fail(c->err, LG_ERR_FORMAT, c->pos - 8, "%s: tensor %s has an impossible shape at offset %lld", c->map->path, t->name, (long long)c->pos - 8);
        t->shape[n_dim - 1 - i] = (int64_t)dim;
    }
    LG_TRY(take(c, &type, 4, "tensor info cut off"));
    if (type > INT32_MAX || !dtype_of((int32_t)type, &t->dtype))
        return lg_base_fail(c->err, LG_ERR_UNSUPPORTED, c->pos - 4, "%s: tensor %s has the unsupported type %u at offset %lld", c->map->path, t->name, type, (long long)c->pos - 4);
    LG_TRY(take(c, &offset, 8, "tensor info cut off"));
    const int64_t row = lg_base_row_bytes(t->dtype, t->shape[n_dim - 1]);
    if (row < 0 || !lg_base_mul(row, t->n_elem / t->shape[n_dim - 1], &t->bytes) || offset > INT64_MAX)
        return lg_base_fail(c->err, LG_ERR_FORMAT, at, "%s: tensor %s at offset %lld has rows of no whole blocks", c->map->path, t->name, (long long)at);
    t->offset = (int64_t)offset; /* within the data section, for now */
    t->part = part;
done:
    return st;
}

static lg_status read_part(lg_gguf *g, int32_t p, lg_error *err) {
    lg_status st;
    cursor c = { &g->part[p], 0, err };
    uint32_t magic, version;
    int64_t n_tensor, n_kv, align = 32;
    LG_TRY(take(&c, &magic, 4, "no GGUF: file ends"));
    if (magic != 0x46554747) return corrupt(&c, 0, "no GGUF magic");
    LG_TRY(take(&c, &version, 4, "version cut off"));
    if (version != 2 && version != 3) return lg_base_fail(err, LG_ERR_UNSUPPORTED, 4, "%s: GGUF version %u at offset 4 (2 and 3 are read)", c.map->path, version);
    LG_TRY(take_count(&c, &n_tensor, 24, "tensor count beyond the file"));
    LG_TRY(take_count(&c, &n_kv, 12, "metadata count beyond the file"));
    if (n_tensor > INT32_MAX / 4 || n_kv > INT32_MAX / 4) return corrupt(&c, 8, "count too large");
    if (!p && !table_init(&g->kv_table, n_kv)) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    LG_TRY(read_meta(g, &c, n_kv, !p));
    if (lg_gguf_has(g, "general.alignment") &&
        (!lg_gguf_int(g, "general.alignment", &align) || align < 1 || align > 1 << 20 || (align & (align - 1))))
        return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: key \"general.alignment\" is no power of two", c.map->path);

    const int64_t first = g->n_tensor;
    lg_tensor_ref *grown = lg_base_realloc(g->tensor, first * (int64_t)sizeof *grown, (first + n_tensor + 1) * (int64_t)sizeof *grown);
    if (!grown) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    g->tensor = grown;
    lg_base_free(g->tensor_table.slot);
    if (!table_init(&g->tensor_table, first + n_tensor)) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    for (int64_t i = 0; i < first; i++) add(&g->tensor_table, name_hash(g->tensor[i].name), i);
    for (int64_t i = 0; i < n_tensor; i++) {
        g->n_tensor = first + i + 1;
        LG_TRY(read_tensor_info(g, &c, &g->tensor[first + i], p));
        add(&g->tensor_table, name_hash(g->tensor[first + i].name), first + i);
    }
    const int64_t data = (c.pos + align - 1) / align * align;
    for (int64_t i = first; i < g->n_tensor; i++) {
        lg_tensor_ref *t = &g->tensor[i];
        int64_t end;
        if (t->offset % align || !lg_base_add(data, t->offset, &t->offset) || !lg_base_add(t->offset, t->bytes, &end) || end > c.map->size)
            return lg_base_fail(err, LG_ERR_FORMAT, t->offset, "%s: tensor %s (%lld bytes at offset %lld) is outside the file of %lld bytes or misaligned",
                                c.map->path, t->name, (long long)t->bytes, (long long)t->offset, (long long)c.map->size);
        t->data = c.map->data + t->offset;
    }
    g->bytes += c.map->size;
done:
    return st;
}

/* NAME-00001-of-0000N.gguf */
static lg_status open_parts(lg_gguf *g, const char *path, lg_error *err) {
    lg_status st = LG_OK;
    int64_t n = 1, no = 0;
    lg_gguf_int(g, "split.count", &n);
    lg_gguf_int(g, "split.no", &no);
    if (n <= 1) return LG_OK;
    if (n > MAX_PARTS || no != 0)
        return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: key \"split.no\" or \"split.count\": part %lld of %lld; open the first of at most %d", path,
                            (long long)no + 1, (long long)n, MAX_PARTS);
    const size_t len = strlen(path);
    char tail[48], *name = lg_base_strdup(path);
    snprintf(tail, sizeof tail, "-00001-of-%05d.gguf", (int)n & 0xffff);
    if (!name) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    if (len < strlen(tail) || strcmp(path + len - strlen(tail), tail))
        LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: key \"split.count\" says %lld parts: open the first, named ...%s", path, (long long)n, tail));
    for (int32_t p = 1; p < n; p++) {
        snprintf(name + len - strlen(tail), strlen(tail) + 1, "-%05d-of-%05d.gguf", (int)(p + 1) & 0xffff, (int)n & 0xffff);
        g->n_part = p + 1;
        LG_TRY(lg_file_map(&g->part[p], name, err));
        LG_TRY(read_part(g, p, err));
    }
done:
    lg_base_free(name);
    return st;
}

lg_status lg_gguf_open(lg_gguf **out, const char *path, lg_error *err) {
    lg_status st;
    *out = NULL;
    lg_gguf *g = lg_base_alloc(sizeof *g);
    if (g) g->part = lg_base_calloc(MAX_PARTS, sizeof *g->part);
    if (!g || !g->part) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    g->n_part = 1;
    LG_TRY(lg_file_map(&g->part[0], path, err));
    LG_TRY(read_part(g, 0, err));
    LG_TRY(open_parts(g, path, err));
    *out = g;
done:
    if (st != LG_OK) lg_gguf_close(g);
    return st;
}

void lg_gguf_close(lg_gguf *g) {
    if (!g) return;
    for (int64_t i = 0; i < g->n_kv; i++) {
        lg_base_free(g->kv[i].key);
        lg_base_free(g->kv[i].str);
        lg_base_free(g->kv[i].at);
    }
    for (int64_t i = 0; i < g->n_tensor; i++) lg_base_free(g->tensor[i].name);
    for (int32_t i = 0; i < g->n_part && g->part; i++) lg_file_unmap(&g->part[i]);
    lg_base_free(g->kv);
    lg_base_free(g->tensor);
    lg_base_free(g->kv_table.slot);
    lg_base_free(g->tensor_table.slot);
    lg_base_free(g->part);
    lg_base_free(g);
}

int64_t lg_gguf_n_tensor(const lg_gguf *g) { return g->n_tensor; }
const lg_tensor_ref *lg_gguf_tensor(const lg_gguf *g, int64_t i) { return i >= 0 && i < g->n_tensor ? &g->tensor[i] : NULL; }
const lg_tensor_ref *lg_gguf_find(const lg_gguf *g, const char *name) { return find_tensor(g, name); }
int64_t lg_gguf_file_bytes(const lg_gguf *g) { return g->bytes; }
int64_t lg_gguf_n_meta(const lg_gguf *g) { return g->n_kv; }
const char *lg_gguf_meta_key(const lg_gguf *g, int64_t i) { return i >= 0 && i < g->n_kv ? g->kv[i].key : NULL; }
bool lg_gguf_has(const lg_gguf *g, const char *key) { return find_meta(g, key) != NULL; }

static bool int_at(int32_t type, const uint8_t *p, int64_t *out) {
    union { uint8_t u8; int8_t i8; uint16_t u16; int16_t i16; uint32_t u32; int32_t i32; uint64_t u64; int64_t i64; } v;
    if (type < 0 || type >= T_COUNT || !width[type] || type == T_F32 || type == T_F64 || type == T_BOOL) return false;
    memcpy(&v, p, (size_t)width[type]);
    switch (type) {
    case T_U8: *out = v.u8; return true;
    case T_I8: *out = v.i8; return true;
    case T_U16: *out = v.u16; return true;
    case T_I16: *out = v.i16; return true;
    case T_U32: *out = v.u32; return true;
    case T_I32: *out = v.i32; return true;
    case T_I64: *out = v.i64; return true;
    default: *out = (int64_t)v.u64; return v.u64 <= INT64_MAX;
    }
}
static bool float_at(int32_t type, const uint8_t *p, double *out) {
    float f;
    if (type == T_F32) {
        memcpy(&f, p, 4);
        *out = (double)f;
    } else if (type == T_F64) {
        memcpy(out, p, 8);
    } else {
        return false;
    }
    return true;
}
bool lg_gguf_int(const lg_gguf *g, const char *key, int64_t *out) {
    const meta *m = find_meta(g, key);
    return m && int_at(m->type, m->data, out);
}
bool lg_gguf_float(const lg_gguf *g, const char *key, double *out) {
    const meta *m = find_meta(g, key);
    return m && float_at(m->type, m->data, out);
}
bool lg_gguf_bool(const lg_gguf *g, const char *key, bool *out) {
    const meta *m = find_meta(g, key);
    if (!m || m->type != T_BOOL) return false;
    *out = *m->data != 0;
    return true;
}
bool lg_gguf_str(const lg_gguf *g, const char *key, const char **s, int64_t *n) {
    const meta *m = find_meta(g, key);
    if (!m || m->type != T_STR) return false;
    *s = m->str;
    *n = m->str_n;
    return true;
}
static const meta *find_array(const lg_gguf *g, const char *key, int64_t i) {
    const meta *m = find_meta(g, key);
    return m && m->type == T_ARR && i >= 0 && i < m->n ? m : NULL;
}
bool lg_gguf_array(const lg_gguf *g, const char *key, int32_t *gguf_elem_type, int64_t *n) {
    const meta *m = find_meta(g, key);
    if (!m || m->type != T_ARR) return false;
    *gguf_elem_type = m->elem;
    *n = m->n;
    return true;
}
bool lg_gguf_array_int(const lg_gguf *g, const char *key, int64_t i, int64_t *out) {
    const meta *m = find_array(g, key, i);
    return m && int_at(m->elem, m->data + i * width[m->elem], out);
}
bool lg_gguf_array_float(const lg_gguf *g, const char *key, int64_t i, double *out) {
    const meta *m = find_array(g, key, i);
    return m && float_at(m->elem, m->data + i * width[m->elem], out);
}
bool lg_gguf_array_str(const lg_gguf *g, const char *key, int64_t i, const char **s, int64_t *n) {
    const meta *m = find_array(g, key, i);
    if (!m || m->elem != T_STR) return false;
    const uint8_t *p = m->data + m->at[i];
    memcpy(n, p, 8);
    *s = (const char *)p + 8;
    return true;
}

bool lg_file_gguf_raw(const lg_gguf *g, const char *key, lg_gguf_raw *out) {
    const meta *m = find_meta(g, key);
    if (!m) return false;
    *out = (lg_gguf_raw){ .type = m->type, .elem = m->elem, .n = m->n, .data = m->data };
    const int32_t type = m->type == T_ARR ? m->elem : m->type;
    if (m->type == T_STR) {
        out->data = (const uint8_t *)m->str;
        out->bytes = m->str_n;
    } else if (type != T_STR) {
        out->bytes = m->n * width[type];
    } else if (m->n) {
        int64_t len;
        memcpy(&len, m->data + m->at[m->n - 1], 8);
        out->bytes = m->at[m->n - 1] + 8 + len;
    }
    return true;
}
