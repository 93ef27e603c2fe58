/* file: hostile files made safe. mmap, atomic writes, GGUF, safetensors, JSON, .npy, id files.
 * Every size is checked before use; errors name the file and the offset or key. */
#ifndef LG_FILE_H
#define LG_FILE_H
#include <stdio.h>
#include "base/base.h"

/* ---- mapping and atomic writing ---- */
typedef struct lg_map { const uint8_t *data; int64_t size; char *path; } lg_map;
lg_status lg_file_map(lg_map *out, const char *path, lg_error *err); /* read-only, private */
void lg_file_unmap(lg_map *m);
void lg_file_forget(const void *data, int64_t bytes); /* resident pages may go (madvise) */
lg_status lg_file_read_all(lg_text *out, const char *path, int64_t max_bytes, lg_error *err); /* "-": stdin */

typedef struct lg_writer { FILE *f; char *path, *temp; int64_t pos; } lg_writer; /* NAME.tmp.PID, fsync, rename */
lg_status lg_file_create(lg_writer *w, const char *path, lg_error *err);
lg_status lg_file_write(lg_writer *w, const void *data, int64_t n, lg_error *err);
lg_status lg_file_commit(lg_writer *w, lg_error *err);
void lg_file_abandon(lg_writer *w); /* legal after commit */

/* ---- a named tensor in a mapping ---- */
typedef struct lg_tensor_ref {
    char *name;
    lg_dtype dtype;
    int32_t n_dim;
    int64_t shape[4];   /* outermost first (row-major): [n_out, n_in] for a matrix */
    int64_t n_elem, bytes;
    const void *data;   /* in the mapping */
    int64_t offset;     /* in its file, for messages */
    int32_t part;
} lg_tensor_ref;

/* ---- GGUF v2, v3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); split files by their first part ---- */
typedef struct lg_gguf lg_gguf;
lg_status lg_gguf_open(lg_gguf **out, const char *path, lg_error *err);
void lg_gguf_close(lg_gguf *g);
int64_t lg_gguf_n_tensor(const lg_gguf *g);
const lg_tensor_ref *lg_gguf_tensor(const lg_gguf *g, int64_t i);
const lg_tensor_ref *lg_gguf_find(const lg_gguf *g, const char *name); /* NULL if absent */
int64_t lg_gguf_file_bytes(const lg_gguf *g);
/* Metadata. false: absent or of another type. Integers of any width convert; range is the caller's. */
bool lg_gguf_has(const lg_gguf *g, const char *key);
bool lg_gguf_int(const lg_gguf *g, const char *key, int64_t *out);
bool lg_gguf_float(const lg_gguf *g, const char *key, double *out);
bool lg_gguf_bool(const lg_gguf *g, const char *key, bool *out);
bool lg_gguf_str(const lg_gguf *g, const char *key, const char **s, int64_t *n); /* NUL-terminated copy, n bytes */
bool lg_gguf_array(const lg_gguf *g, const char *key, int32_t *gguf_elem_type, int64_t *n);
bool lg_gguf_array_int(const lg_gguf *g, const char *key, int64_t i, int64_t *out);
bool lg_gguf_array_float(const lg_gguf *g, const char *key, int64_t i, double *out);
bool lg_gguf_array_str(const lg_gguf *g, const char *key, int64_t i, const char **s, int64_t *n); /* not terminated */

typedef struct lg_gguf_out lg_gguf_out; /* writer: metadata first, tensors declared, then data streamed in order */
lg_status lg_gguf_create(lg_gguf_out **out, const char *path, lg_error *err);
lg_status lg_gguf_put_int(lg_gguf_out *o, const char *key, int64_t v, lg_error *err);      /* u32 or i64 as needed */
lg_status lg_gguf_put_float(lg_gguf_out *o, const char *key, double v, lg_error *err);     /* f32 */
lg_status lg_gguf_put_bool(lg_gguf_out *o, const char *key, bool v, lg_error *err);
lg_status lg_gguf_put_str(lg_gguf_out *o, const char *key, const char *s, int64_t n, lg_error *err);
lg_status lg_gguf_put_str_array(lg_gguf_out *o, const char *key, const char *const *s, const int64_t *len, int64_t n, lg_error *err);
lg_status lg_gguf_put_int_array(lg_gguf_out *o, const char *key, const int32_t *v, int64_t n, lg_error *err);
lg_status lg_gguf_copy_meta(lg_gguf_out *o, const lg_gguf *from, const char *key, lg_error *err); /* any type */
int64_t lg_gguf_n_meta(const lg_gguf *g);
const char *lg_gguf_meta_key(const lg_gguf *g, int64_t i);
lg_status lg_gguf_declare(lg_gguf_out *o, const char *name, lg_dtype t, int32_t n_dim, const int64_t *shape, lg_error *err);
lg_status lg_gguf_write_data(lg_gguf_out *o, const void *data, int64_t bytes, lg_error *err); /* next declared tensor, may come in pieces */
lg_status lg_gguf_commit(lg_gguf_out *o, lg_error *err);
void lg_gguf_out_free(lg_gguf_out *o); /* abandons if not committed */

/* ---- safetensors (https://github.com/huggingface/safetensors#format); file, folder with index, or one shard ---- */
typedef struct lg_st lg_st;
lg_status lg_st_open(lg_st **out, const char *path, lg_error *err);
void lg_st_close(lg_st *s);
int64_t lg_st_n_tensor(const lg_st *s);
const lg_tensor_ref *lg_st_tensor(const lg_st *s, int64_t i);
const lg_tensor_ref *lg_st_find(const lg_st *s, const char *name);
const char *lg_st_meta(const lg_st *s, const char *key); /* __metadata__, NULL if absent */
int64_t lg_st_file_bytes(const lg_st *s);
typedef struct lg_st_entry { const char *name; lg_dtype dtype; int32_t n_dim; int64_t shape[4]; const void *data; } lg_st_entry;
lg_status lg_st_write(const char *path, const lg_st_entry *e, int64_t n, const char *const *meta_kv, int64_t n_meta, lg_error *err);

/* ---- JSON (jansson, wrapped here and nowhere else) ---- */
typedef struct lg_json lg_json; /* a value; members belong to the root */
/* Duplicate keys, depth over 128 and sizes over max_bytes are refused; message names file, line and byte. */
lg_status lg_json_load(lg_json **root, const char *path, int64_t max_bytes, lg_error *err);
lg_status lg_json_parse(lg_json **root, const char *name, const char *text, int64_t n, lg_error *err);
void lg_json_free(lg_json *root);
typedef enum lg_json_type { LG_JSON_NULL, LG_JSON_BOOL, LG_JSON_INT, LG_JSON_REAL, LG_JSON_STRING, LG_JSON_ARRAY, LG_JSON_OBJECT } lg_json_type;
lg_json_type lg_json_typeof(const lg_json *v);            /* NULL pointer: LG_JSON_NULL */
const lg_json *lg_json_get(const lg_json *obj, const char *key); /* NULL if absent or no object */
const lg_json *lg_json_at(const lg_json *arr, int64_t i);
int64_t lg_json_size(const lg_json *v);                   /* array or object, else 0 */
bool lg_json_int(const lg_json *v, int64_t *out);
bool lg_json_num(const lg_json *v, double *out);          /* int or real */
bool lg_json_bool(const lg_json *v, bool *out);
const char *lg_json_str(const lg_json *v, int64_t *n);    /* NULL if no string */
typedef void (*lg_json_member_fn)(void *user, const char *key, const lg_json *value);
void lg_json_each(const lg_json *obj, lg_json_member_fn fn, void *user); /* in file order */
/* Building: append to an lg_text. Escapes; invalid UTF-8 becomes U+FFFD. */
bool lg_json_put_str(lg_text *t, const char *s, int64_t n);
bool lg_json_put_num(lg_text *t, double v);               /* %.17g shortest; NaN, inf: null */

/* ---- UTF-8, .npy, ids ---- */
bool lg_file_utf8_repair(lg_text *out, const char *s, int64_t n); /* as Python errors="replace" */
lg_status lg_npy_create(lg_writer *w, const char *path, const int64_t *shape, int32_t n_dim, lg_error *err); /* <f4, C order; then lg_file_write rows, commit */
lg_status lg_file_read_ids(lg_ids *out, const char *path, int64_t n_vocab, lg_error *err); /* decimal, white space; "-": stdin; names the bad index */
#endif
