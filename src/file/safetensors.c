/* safetensors (https://github.com/huggingface/safetensors#format): one file, or a folder with an index over shards. */
#include "file/file.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_SHARDS = 1024 };
static const int64_t MAX_HEADER = 100 << 20;
static const struct { const char *name; lg_dtype type; int bytes; } dtypes[] = {
    { "F32", LG_DTYPE_F32, 4 }, { "F16", LG_DTYPE_F16, 2 }, { "BF16", LG_DTYPE_BF16, 2 },
    { "I32", LG_DTYPE_I32, 4 }, { "I64", LG_DTYPE_I64, 8 }, { "U8", LG_DTYPE_U8, 1 },
};
enum { N_DTYPE = sizeof dtypes / sizeof *dtypes };

struct lg_st {
    lg_map *shard;
    int32_t n_shard;
    lg_json **header;
    lg_tensor_ref *tensor;
    int64_t n_tensor, cap, bytes;
    int32_t *slot;      /* name table, open addressing, index + 1 */
    int64_t n_slot;
};

typedef struct reading { lg_st *s; lg_error *err; lg_status st; int32_t shard; int64_t data, size; } reading;

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

static lg_status read_entry(reading *r, const char *name, const lg_json *v) {
    lg_st *s = r->s;
    const lg_map *m = &s->shard[r->shard];
    int64_t begin, end, elem = 1;
    if (s->n_tensor == s->cap) {
        const int64_t cap = s->cap ? 2 * s->cap : 256, size = sizeof *s->tensor;
        lg_tensor_ref *grown = lg_base_realloc(s->tensor, s->cap * size, cap * size);
        if (!grown) return nomem(r->err);
        s->tensor = grown;
        s->cap = cap;
    }
    lg_tensor_ref *t = &s->tensor[s->n_tensor];
    memset(t, 0, sizeof *t);
    const char *dt = lg_json_str(lg_json_get(v, "dtype"), NULL);
    const lg_json *shape = lg_json_get(v, "shape"), *off = lg_json_get(v, "data_offsets");
    int d = 0;
    while (dt && d < N_DTYPE && strcmp(dt, dtypes[d].name)) d++;
    if (!dt || d == N_DTYPE)
        return lg_base_fail(r->err, LG_ERR_UNSUPPORTED, -1, "%s: tensor %s: key \"dtype\" is %s (F32, F16, BF16, I32, I64, U8 are read)", m->path, name, dt ? dt : "missing");
    t->dtype = dtypes[d].type;
    t->n_dim = (int32_t)lg_json_size(shape);
    if (lg_json_typeof(shape) != LG_JSON_ARRAY || lg_json_size(shape) > 4)
        return lg_base_fail(r->err, LG_ERR_FORMAT, -1, "%s: tensor %s: key \"shape\" is no list of up to 4 sizes", m->path, name);
    for (int32_t i = 0; i < t->n_dim; i++)
        if (!lg_json_int(lg_json_at(shape, i), &t->shape[i]) || t->shape[i] < 1 || !lg_base_mul(elem, t->shape[i], &elem))
            return lg_base_fail(r->err, LG_ERR_FORMAT, -1, "%s: tensor %s: key \"shape\" has an impossible size", m->path, name);
    if (!t->n_dim) t->shape[t->n_dim++] = 1; /* a scalar */
    if (lg_json_size(off) != 2 || !lg_json_int(lg_json_at(off, 0), &begin) || !lg_json_int(lg_json_at(off, 1), &end) || begin < 0 || end < begin ||
        end > r->size || !lg_base_mul(elem, dtypes[d].bytes, &t->bytes) || t->bytes != end - begin)
        return lg_base_fail(r->err, LG_ERR_FORMAT, -1, "%s: tensor %s: key \"data_offsets\" does not fit its shape or the file", m->path, name);
    t->name = lg_base_strdup(name);
    if (!t->name) return nomem(r->err);
    t->n_elem = elem;
    t->offset = r->data + begin;
    t->data = m->data + t->offset;
    t->part = r->shard;
    s->n_tensor++;
    return LG_OK;
}
static void on_entry(void *user, const char *name, const lg_json *v) {
    reading *r = user;
    if (r->st == LG_OK && strcmp(name, "__metadata__")) r->st = read_entry(r, name, v);
}

static int by_offset(const void *a, const void *b) {
    const int64_t x = ((const lg_tensor_ref *)a)->offset, y = ((const lg_tensor_ref *)b)->offset;
    return x < y ? -1 : x > y;
}

static lg_status read_shard(lg_st *s, const char *path, lg_error *err) {
    lg_status st;
    const int32_t i = s->n_shard;
    uint64_t n;
    LG_TRY(lg_file_map(&s->shard[i], path, err));
    s->n_shard = i + 1;
    const lg_map *m = &s->shard[i];
    if (m->size < 8) return lg_base_fail(err, LG_ERR_FORMAT, 0, "%s: no safetensors file: %lld bytes at offset 0", path, (long long)m->size);
    memcpy(&n, m->data, 8);
    if (n > (uint64_t)(m->size - 8) || n > (uint64_t)MAX_HEADER)
        return lg_base_fail(err, LG_ERR_FORMAT, 0, "%s: header of %llu bytes (offset 0) in a file of %lld", path, (unsigned long long)n, (long long)m->size);
    LG_TRY(lg_json_parse(&s->header[i], path, (const char *)m->data + 8, (int64_t)n, err));
    if (lg_json_typeof(s->header[i]) != LG_JSON_OBJECT) return lg_base_fail(err, LG_ERR_FORMAT, 8, "%s: header at offset 8 is no object", path);
    reading r = { .s = s, .err = err, .shard = i, .data = 8 + (int64_t)n, .size = m->size - 8 - (int64_t)n };
    const int64_t first = s->n_tensor;
    lg_json_each(s->header[i], on_entry, &r);
    LG_TRY(r.st);
    /* The format allows neither holes nor overlaps. */
    if (s->n_tensor > first) qsort(s->tensor + first, (size_t)(s->n_tensor - first), sizeof *s->tensor, by_offset);
    int64_t at = r.data;
    for (int64_t t = first; t < s->n_tensor; at += s->tensor[t++].bytes)
        if (s->tensor[t].offset != at)
            return lg_base_fail(err, LG_ERR_FORMAT, s->tensor[t].offset, "%s: tensor %s overlaps another or leaves a hole at offset %lld", path, s->tensor[t].name, (long long)at);
    if (at != m->size) return lg_base_fail(err, LG_ERR_FORMAT, at, "%s: %lld bytes of no tensor at offset %lld", path, (long long)(m->size - at), (long long)at);
    s->bytes += m->size;
done:
    return st;
}

static char *join(const char *folder, const char *name) {
    lg_text t = { 0 };
    if (!lg_base_text_printf(&t, "%s/%s", folder, name)) lg_text_free(&t);
    return t.data;
}

typedef struct index_walk { lg_st *s; lg_error *err; lg_status st; const char *folder, *path; char *seen[MAX_SHARDS]; int n_seen; } index_walk;
static void on_weight(void *user, const char *name, const lg_json *v) {
    index_walk *w = user;
    const char *file = lg_json_str(v, NULL);
    if (w->st != LG_OK) return;
    if (!file || !*file || strchr(file, '/') || !strcmp(file, "..")) {
        w->st = lg_base_fail(w->err, LG_ERR_FORMAT, -1, "%s: key \"weight_map.%s\" names no file of this folder", w->path, name);
        return;
    }
    for (int i = 0; i < w->n_seen; i++)
        if (!strcmp(w->seen[i], file)) return;
    if (w->n_seen == MAX_SHARDS) {
        w->st = lg_base_fail(w->err, LG_ERR_LIMIT, -1, "%s: more than %d shards", w->path, MAX_SHARDS);
        return;
    }
    char *full = join(w->folder, file), *copy = lg_base_strdup(file);
    w->seen[w->n_seen++] = copy; /* before the check: freed with the others */
    if (!full || !copy) w->st = nomem(w->err);
    else w->st = read_shard(w->s, full, w->err);
    lg_base_free(full);
}
static void check_weight(void *user, const char *name, const lg_json *v) {
    index_walk *w = user;
    const lg_tensor_ref *t = w->st == LG_OK ? lg_st_find(w->s, name) : NULL;
    if (w->st != LG_OK) return;
    const char *file = lg_json_str(v, NULL), *base = t ? strrchr(w->s->shard[t->part].path, '/') : NULL;
    if (!t || !base || strcmp(base + 1, file))
        w->st = lg_base_fail(w->err, LG_ERR_FORMAT, -1, "%s: key \"weight_map.%s\": the tensor is not in %s", w->path, name, file);
}

static lg_status make_table(lg_st *s, lg_error *err) {
    s->n_slot = 16;
    while (s->n_slot < 2 * s->n_tensor) s->n_slot *= 2;
    s->slot = lg_base_calloc(s->n_slot, sizeof *s->slot);
    if (!s->slot) return nomem(err);
    for (int64_t i = 0; i < s->n_tensor; i++) {
        if (lg_st_find(s, s->tensor[i].name))
            return lg_base_fail(err, LG_ERR_FORMAT, s->tensor[i].offset, "%s: tensor %s is in two shards", s->shard[s->tensor[i].part].path, s->tensor[i].name);
        uint64_t h = lg_base_hash_64(s->tensor[i].name, (int64_t)strlen(s->tensor[i].name));
        while (s->slot[h & (uint64_t)(s->n_slot - 1)]) h++;
        s->slot[h & (uint64_t)(s->n_slot - 1)] = (int32_t)(i + 1);
    }
    return LG_OK;
}

lg_status lg_st_open(lg_st **out, const char *path, lg_error *err) {
    lg_status st;
    struct stat sb;
    char *index = NULL, *single = NULL;
    lg_json *map = NULL;
    index_walk *w = NULL;
    *out = NULL;
    lg_st *s = lg_base_alloc(sizeof *s);
    if (s) {
        s->shard = lg_base_calloc(MAX_SHARDS, sizeof *s->shard);
        s->header = lg_base_calloc(MAX_SHARDS, sizeof *s->header);
    }
    if (!s || !s->shard || !s->header) LG_TRY(nomem(err));
    if (!stat(path, &sb) && S_ISDIR(sb.st_mode)) {
        index = join(path, "model.safetensors.index.json");
        single = join(path, "model.safetensors");
        if (!index || !single) LG_TRY(nomem(err));
    }
    if (index && stat(single, &sb)) {
        LG_TRY(lg_json_load(&map, index, 64 << 20, err));
        const lg_json *weights = lg_json_get(map, "weight_map");
        w = lg_base_alloc(sizeof *w);
        if (!w) LG_TRY(nomem(err));
        *w = (index_walk){ .s = s, .err = err, .folder = path, .path = index };
        if (lg_json_typeof(weights) != LG_JSON_OBJECT) LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: key \"weight_map\" is no object", index));
        lg_json_each(weights, on_weight, w);
        LG_TRY(w->st);
        LG_TRY(make_table(s, err));
        lg_json_each(weights, check_weight, w);
        LG_TRY(w->st);
    } else {
        LG_TRY(read_shard(s, single ? single : path, err));
        LG_TRY(make_table(s, err));
    }
    *out = s;
done:
    for (int i = 0; w && i < w->n_seen; i++) lg_base_free(w->seen[i]);
    lg_base_free(w);
    lg_base_free(index);
    lg_base_free(single);
    lg_json_free(map);
    if (st != LG_OK) lg_st_close(s);
    return st;
}

void lg_st_close(lg_st *s) {
    if (!s) return;
    for (int64_t i = 0; i < s->n_tensor; i++) lg_base_free(s->tensor[i].name);
    for (int32_t i = 0; i < s->n_shard; i++) {
        lg_file_unmap(&s->shard[i]);
        lg_json_free(s->header[i]);
    }
    lg_base_free(s->shard);
    lg_base_free(s->header);
    lg_base_free(s->tensor);
    lg_base_free(s->slot);
    lg_base_free(s);
}
int64_t lg_st_n_tensor(const lg_st *s) { return s->n_tensor; }
const lg_tensor_ref *lg_st_tensor(const lg_st *s, int64_t i) { return i >= 0 && i < s->n_tensor ? &s->tensor[i] : NULL; }
const lg_tensor_ref *lg_st_find(const lg_st *s, const char *name) {
    for (uint64_t h = lg_base_hash_64(name, (int64_t)strlen(name)); s->n_slot; h++) {
        const int32_t i = s->slot[h & (uint64_t)(s->n_slot - 1)];
        if (!i) return NULL;
        if (!strcmp(s->tensor[i - 1].name, name)) return &s->tensor[i - 1];
    }
    return NULL;
}
const char *lg_st_meta(const lg_st *s, const char *key) {
    return s->n_shard ? lg_json_str(lg_json_get(lg_json_get(s->header[0], "__metadata__"), key), NULL) : NULL;
}
int64_t lg_st_file_bytes(const lg_st *s) { return s->bytes; }

lg_status lg_st_write(const char *path, const lg_st_entry *e, int64_t n, const char *const *meta_kv, int64_t n_meta, lg_error *err) {
    lg_status st = LG_OK;
    lg_writer w = { 0 };
    lg_text h = { 0 };
    int64_t at = 0;
    bool ok = lg_base_text_append(&h, "{", 1);
    if (n_meta) {
        ok = ok && lg_base_text_printf(&h, "\"__metadata__\":{");
        for (int64_t i = 0; ok && i < n_meta; i++)
            ok = (!i || lg_base_text_append(&h, ",", 1)) && lg_json_put_str(&h, meta_kv[2 * i], (int64_t)strlen(meta_kv[2 * i])) &&
                 lg_base_text_append(&h, ":", 1) && lg_json_put_str(&h, meta_kv[2 * i + 1], (int64_t)strlen(meta_kv[2 * i + 1]));
        ok = ok && lg_base_text_append(&h, "}", 1);
    }
    for (int64_t i = 0; ok && i < n; i++) {
        int d = 0;
        int64_t bytes = 1;
        while (d < N_DTYPE && dtypes[d].type != e[i].dtype) d++;
        if (d == N_DTYPE) LG_TRY(lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: tensor %s: safetensors has no %s", path, e[i].name, lg_base_dtype(e[i].dtype)->name));
        ok = (h.n == 1 || lg_base_text_append(&h, ",", 1)) && lg_json_put_str(&h, e[i].name, (int64_t)strlen(e[i].name)) &&
             lg_base_text_printf(&h, ":{\"dtype\":\"%s\",\"shape\":[", dtypes[d].name);
        for (int32_t k = 0; ok && k < e[i].n_dim; k++) {
            ok = lg_base_text_printf(&h, k ? ",%lld" : "%lld", (long long)e[i].shape[k]);
            bytes *= e[i].shape[k];
        }
        bytes *= dtypes[d].bytes;
        ok = ok && lg_base_text_printf(&h, "],\"data_offsets\":[%lld,%lld]}", (long long)at, (long long)(at + bytes));
        at += bytes;
    }
    ok = ok && lg_base_text_append(&h, "}", 1);
    while (ok && h.n % 8) ok = lg_base_text_append(&h, " ", 1);
    if (!ok) LG_TRY(nomem(err));
    LG_TRY(lg_file_create(&w, path, err));
    LG_TRY(lg_file_write(&w, &h.n, 8, err));
    LG_TRY(lg_file_write(&w, h.data, h.n, err));
    for (int64_t i = 0; i < n; i++) {
        int64_t bytes = 1;
        for (int32_t k = 0; k < e[i].n_dim; k++) bytes *= e[i].shape[k];
        LG_TRY(lg_file_write(&w, e[i].data, lg_base_row_bytes(e[i].dtype, bytes), err));
    }
    LG_TRY(lg_file_commit(&w, err));
done:
    lg_file_abandon(&w);
    lg_text_free(&h);
    return st;
}
