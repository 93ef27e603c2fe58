/* GGUF v3 writer: metadata and tensor infos gather in memory, data is streamed behind them in the declared order. */
#include "file/gguf_raw.h"
#include <string.h>

enum { ALIGN = 32, V_U32 = 4, V_F32 = 6, V_BOOL = 7, V_I64 = 11, V_I32 = 5 };

struct lg_gguf_out {
    lg_writer w;
    lg_text meta, infos;
    int64_t n_meta, n_tensor;
    int64_t *bytes;          /* of each declared tensor */
    int64_t cap, offset;     /* next data offset */
    int64_t at, written;     /* tensor under way and what it has */
    bool begun;
};

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

lg_status lg_gguf_create(lg_gguf_out **out, const char *path, lg_error *err) {
    *out = NULL;
    lg_gguf_out *o = lg_base_alloc(sizeof *o);
    if (!o) return nomem(err);
    const lg_status st = lg_file_create(&o->w, path, err);
    if (st != LG_OK) lg_base_free(o);
    else *out = o;
    return st;
}
void lg_gguf_out_free(lg_gguf_out *o) {
    if (!o) return;
    lg_file_abandon(&o->w);
    lg_text_free(&o->meta);
    lg_text_free(&o->infos);
    lg_base_free(o->bytes);
    lg_base_free(o);
}

static bool raw(lg_text *t, const void *p, int64_t n) { return lg_base_text_append(t, p, n); }
static bool str(lg_text *t, const char *s, int64_t n) { return raw(t, &n, 8) && raw(t, s, n); }
static bool key(lg_gguf_out *o, const char *k, int32_t type) {
    o->n_meta++;
    return str(&o->meta, k, (int64_t)strlen(k)) && raw(&o->meta, &type, 4);
}
static lg_status verdict(const lg_gguf_out *o, bool ok, lg_error *err) {
    if (o->begun) return lg_base_fail(err, LG_ERR_USAGE, -1, "%s: metadata after tensor data", o->w.path);
    return ok ? LG_OK : nomem(err);
}

lg_status lg_gguf_put_int(lg_gguf_out *o, const char *k, int64_t v, lg_error *err) {
    const uint32_t u = (uint32_t)v;
    const bool small = v >= 0 && v <= UINT32_MAX;
    return verdict(o, key(o, k, small ? V_U32 : V_I64) && (small ? raw(&o->meta, &u, 4) : raw(&o->meta, &v, 8)), err);
}
lg_status lg_gguf_put_float(lg_gguf_out *o, const char *k, double v, lg_error *err) {
    const float f = (float)v;
    return verdict(o, key(o, k, V_F32) && raw(&o->meta, &f, 4), err);
}
lg_status lg_gguf_put_bool(lg_gguf_out *o, const char *k, bool v, lg_error *err) {
    const uint8_t b = v;
    return verdict(o, key(o, k, V_BOOL) && raw(&o->meta, &b, 1), err);
}
lg_status lg_gguf_put_str(lg_gguf_out *o, const char *k, const char *s, int64_t n, lg_error *err) {
    return verdict(o, key(o, k, LG_GGUF_STR) && str(&o->meta, s, n), err);
}
static bool array(lg_gguf_out *o, const char *k, int32_t elem, int64_t n) {
    return key(o, k, LG_GGUF_ARR) && raw(&o->meta, &elem, 4) && raw(&o->meta, &n, 8);
}
lg_status lg_gguf_put_str_array(lg_gguf_out *o, const char *k, const char *const *s, const int64_t *len, int64_t n, lg_error *err) {
    bool ok = array(o, k, LG_GGUF_STR, n);
    for (int64_t i = 0; ok && i < n; i++) ok = str(&o->meta, s[i], len[i]);
    return verdict(o, ok, err);
}
lg_status lg_gguf_put_int_array(lg_gguf_out *o, const char *k, const int32_t *v, int64_t n, lg_error *err) {
    return verdict(o, array(o, k, V_I32, n) && raw(&o->meta, v, n * 4), err);
}
lg_status lg_gguf_copy_meta(lg_gguf_out *o, const lg_gguf *from, const char *k, lg_error *err) {
    lg_gguf_raw r;
    if (!lg_file_gguf_raw(from, k, &r)) return lg_base_fail(err, LG_ERR_USAGE, -1, "%s: no key \"%s\" to copy", o->w.path, k);
    if (r.type == LG_GGUF_STR) return lg_gguf_put_str(o, k, (const char *)r.data, r.bytes, err);
    if (r.type == LG_GGUF_ARR) return verdict(o, array(o, k, r.elem, r.n) && raw(&o->meta, r.data, r.bytes), err);
    return verdict(o, key(o, k, r.type) && raw(&o->meta, r.data, r.bytes), err);
}

lg_status lg_gguf_declare(lg_gguf_out *o, const char *name, lg_dtype t, int32_t n_dim, const int64_t *shape, lg_error *err) {
    const int32_t type = lg_base_dtype(t)->gguf_type;
    int64_t rows = 1, bytes;
    for (int32_t i = 0; i + 1 < n_dim; i++)
        if (!lg_base_mul(rows, shape[i], &rows)) rows = -1;
    if (n_dim < 1 || n_dim > 4 || type < 0 || rows < 0 || lg_base_row_bytes(t, shape[n_dim - 1]) < 0 ||
        !lg_base_mul(rows, lg_base_row_bytes(t, shape[n_dim - 1]), &bytes))
        return lg_base_fail(err, LG_ERR_USAGE, -1, "%s: tensor %s cannot be written in that dtype and shape", o->w.path, name);
    if (o->n_tensor == o->cap) {
        const int64_t cap = o->cap ? o->cap * 2 : 256;
        int64_t *grown = lg_base_realloc(o->bytes, o->cap * 8, cap * 8);
        if (!grown) return nomem(err);
        o->bytes = grown;
        o->cap = cap;
    }
    bool ok = str(&o->infos, name, (int64_t)strlen(name)) && raw(&o->infos, &n_dim, 4);
    for (int32_t i = n_dim; ok && i-- > 0;) ok = raw(&o->infos, &shape[i], 8);
    ok = ok && raw(&o->infos, &type, 4) && raw(&o->infos, &o->offset, 8);
    o->bytes[o->n_tensor++] = bytes;
    o->offset += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return verdict(o, ok, err);
}

static lg_status pad(lg_gguf_out *o, lg_error *err) {
    static const uint8_t zero[ALIGN];
    return lg_file_write(&o->w, zero, (ALIGN - o->w.pos % ALIGN) % ALIGN, err);
}
static lg_status begin(lg_gguf_out *o, lg_error *err) {
    lg_status st;
    const uint32_t head[2] = { 0x46554747, 3 };
    LG_TRY(lg_file_write(&o->w, head, 8, err));
    LG_TRY(lg_file_write(&o->w, &o->n_tensor, 8, err));
    LG_TRY(lg_file_write(&o->w, &o->n_meta, 8, err));
    LG_TRY(lg_file_write(&o->w, o->meta.data, o->meta.n, err));
    LG_TRY(lg_file_write(&o->w, o->infos.data, o->infos.n, err));
    LG_TRY(pad(o, err));
    o->begun = true;
done:
    return st;
}
lg_status lg_gguf_write_data(lg_gguf_out *o, const void *data, int64_t bytes, lg_error *err) {
    lg_status st = LG_OK;
    if (!o->begun) LG_TRY(begin(o, err));
    if (o->at >= o->n_tensor || bytes > o->bytes[o->at] - o->written)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "%s: more data than was declared", o->w.path);
    LG_TRY(lg_file_write(&o->w, data, bytes, err));
    o->written += bytes;
    if (o->written == o->bytes[o->at]) {
        LG_TRY(pad(o, err));
        o->at++;
        o->written = 0;
    }
done:
    return st;
}
lg_status lg_gguf_commit(lg_gguf_out *o, lg_error *err) {
    lg_status st = LG_OK;
    if (!o->begun) LG_TRY(begin(o, err));
    if (o->at != o->n_tensor) return lg_base_fail(err, LG_ERR_USAGE, -1, "%s: less data than was declared", o->w.path);
    LG_TRY(lg_file_commit(&o->w, err));
done:
    return st;
}
