/* file/: GGUF and safetensors readers and writers, JSON, config.json, atomic writing, .npy, ids, UTF-8 repair.
 * Files are built byte by byte here, so that readers and writers cannot agree on the same mistake. Every refusal must
 * name the file, and the offset or key that is wrong. */
#include "fixture.h"
#include <errno.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include "model/model.h"

static const char *at(const char *name) { /* four names may be in use at once */
    static char buf[4][160];
    static int k;
    k = (k + 1) % 4;
    snprintf(buf[k], sizeof buf[k], "%s/%s", fx_dir, name);
    return buf[k];
}
static void put(const char *path, const void *data, int64_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, (size_t)n, f), (size_t)n);
    assert_int_equal(fclose(f), 0);
}
static void put_str(const char *path, const char *s) { put(path, s, (int64_t)strlen(s)); }
static int n_files(void) { /* in fx_dir, dot entries not counted */
    int n = 0;
    DIR *d = opendir(fx_dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

/* ---- bytes ---- */
static void add(lg_text *t, const void *p, int64_t n) { assert_true(lg_base_text_append(t, p, n)); }
static void u8(lg_text *t, int v) { const uint8_t b = (uint8_t)v; add(t, &b, 1); }
static void u32(lg_text *t, uint32_t v) { for (int i = 0; i < 4; i++) u8(t, (int)(v >> (8 * i) & 255)); }
static void u64(lg_text *t, uint64_t v) { for (int i = 0; i < 8; i++) u8(t, (int)(v >> (8 * i) & 255)); }
static void str(lg_text *t, const char *s) { u64(t, strlen(s)); add(t, s, (int64_t)strlen(s)); }
static void f32(lg_text *t, float f) { uint32_t v; memcpy(&v, &f, 4); u32(t, v); }
static void f64(lg_text *t, double f) { uint64_t v; memcpy(&v, &f, 8); u64(t, v); }
static void set(lg_text *t, int64_t pos, uint64_t v, int n) { for (int i = 0; i < n; i++) t->data[pos + i] = (char)(v >> (8 * i) & 255); }

/* ---- GGUF ---- */
enum { U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 };
static void key(lg_text *t, const char *name, uint32_t type) { str(t, name); u32(t, type); }
static void array(lg_text *t, const char *name, uint32_t elem, uint64_t n) { key(t, name, ARR); u32(t, elem); u64(t, n); }

/* Where the fields lie that the refusal tests change. */
typedef struct marks { int64_t key_len, type, str_len, arr_elem, arr_len, arr_str, tensor, n_dim, dim, dtype, offset, data; } marks;

/* A file with every kind of value and three tensors: a [2][3] f32, b [32] q8_0, c [2][1][2][2] f16. */
static lg_text gguf_bytes(uint32_t version, int64_t align, marks *m) {
    lg_text t = { 0 };
    add(&t, "GGUF", 4);
    u32(&t, version);
    u64(&t, 3);
    u64(&t, align ? 19 : 18);
    m->key_len = t.n;
    key(&t, "u8", U8); m->type = t.n - 4; u8(&t, 200);
    key(&t, "i8", I8); u8(&t, -5);
    key(&t, "u16", U16); u8(&t, 0x34); u8(&t, 0x12);
    key(&t, "i16", I16); u8(&t, 0xfe); u8(&t, 0xff);
    key(&t, "u32", U32); u32(&t, 4000000000u);
    key(&t, "i32", I32); u32(&t, (uint32_t)-7);
    key(&t, "f32", F32); f32(&t, 1.5f);
    key(&t, "bool", BOOL); u8(&t, 1);
    key(&t, "str", STR); m->str_len = t.n; u64(&t, 5); add(&t, "a\0b\xc3\xa9", 5);
    key(&t, "u64", U64); u64(&t, UINT64_C(1) << 62);
    key(&t, "huge", U64); u64(&t, UINT64_C(1) << 63);
    key(&t, "i64", I64); u64(&t, (uint64_t)-9);
    key(&t, "f64", F64); f64(&t, 0.1);
    array(&t, "ints", I16, 3); m->arr_elem = t.n - 12; m->arr_len = t.n - 8; for (int i = 0; i < 3; i++) { u8(&t, i - 1); u8(&t, i ? 0 : 255); }
    array(&t, "floats", F32, 2); f32(&t, 0.25f); f32(&t, -8);
    array(&t, "strs", STR, 3); m->arr_str = t.n; str(&t, "one"); str(&t, ""); str(&t, "three");
    array(&t, "empty", STR, 0);
    array(&t, "bools", BOOL, 2); u8(&t, 0); u8(&t, 1);
    if (align) { key(&t, "general.alignment", U32); u32(&t, (uint32_t)align); }
    const int64_t a = align ? align : 32;
    m->tensor = t.n;
    str(&t, "a"); m->n_dim = t.n; u32(&t, 2); m->dim = t.n; u64(&t, 3); u64(&t, 2); m->dtype = t.n; u32(&t, 0); m->offset = t.n; u64(&t, 0);
    const int64_t b_at = (24 + a - 1) / a * a, c_at = (b_at + 34 + a - 1) / a * a;
    str(&t, "b"); u32(&t, 1); u64(&t, 32); u32(&t, 8); u64(&t, (uint64_t)b_at);
    str(&t, "c"); u32(&t, 4); u64(&t, 2); u64(&t, 2); u64(&t, 1); u64(&t, 2); u32(&t, 1); u64(&t, (uint64_t)c_at);
    while (t.n % a) u8(&t, 0);
    m->data = t.n;
    for (int i = 0; i < 6; i++) f32(&t, (float)i);
    while (t.n < m->data + b_at) u8(&t, 0);
    u8(&t, 0); u8(&t, 0x3c); /* f16 1.0 */
    for (int i = 0; i < 32; i++) u8(&t, i);
    while (t.n < m->data + c_at) u8(&t, 0);
    for (int i = 0; i < 8; i++) { u8(&t, 0); u8(&t, 0x3c); }
    return t;
}

static void check_gguf(const char *path) {
    lg_gguf *g = NULL;
    int64_t v, n;
    int32_t elem;
    double d;
    bool b;
    const char *s;
    OK(lg_gguf_open(&g, path, err));
#define INT(k, want) assert_true(lg_gguf_int(g, k, &v) && v == (want))
    INT("u8", 200); INT("i8", -5); INT("u16", 0x1234); INT("i16", -2); INT("u32", 4000000000LL); INT("i32", -7); INT("u64", INT64_C(1) << 62); INT("i64", -9);
    assert_false(lg_gguf_int(g, "huge", &v)); /* beyond int64 */
    assert_false(lg_gguf_int(g, "f32", &v) || lg_gguf_int(g, "str", &v) || lg_gguf_int(g, "ints", &v) || lg_gguf_int(g, "bool", &v) || lg_gguf_int(g, "none", &v));
    assert_true(lg_gguf_float(g, "f32", &d) && d == 1.5 && lg_gguf_float(g, "f64", &d) && d == 0.1);
    assert_false(lg_gguf_float(g, "u8", &d) || lg_gguf_float(g, "str", &d) || lg_gguf_float(g, "floats", &d));
    assert_true(lg_gguf_bool(g, "bool", &b) && b && !lg_gguf_bool(g, "u8", &b));
    assert_true(lg_gguf_str(g, "str", &s, &n) && n == 5 && !memcmp(s, "a\0b\xc3\xa9", 6));
    assert_false(lg_gguf_str(g, "strs", &s, &n) || lg_gguf_str(g, "u8", &s, &n));
    assert_true(lg_gguf_array(g, "ints", &elem, &n) && elem == I16 && n == 3 && !lg_gguf_array(g, "str", &elem, &n));
    for (int i = 0; i < 3; i++) assert_true(lg_gguf_array_int(g, "ints", i, &v) && v == i - 1);
    assert_false(lg_gguf_array_int(g, "ints", 3, &v) || lg_gguf_array_int(g, "ints", -1, &v) || lg_gguf_array_int(g, "strs", 0, &v) || lg_gguf_array_int(g, "floats", 0, &v));
    assert_true(lg_gguf_array_float(g, "floats", 1, &d) && d == -8 && !lg_gguf_array_float(g, "ints", 0, &d));
    static const char *const want[] = { "one", "", "three" };
    for (int i = 0; i < 3; i++) assert_true(lg_gguf_array_str(g, "strs", i, &s, &n) && n == (int64_t)strlen(want[i]) && !memcmp(s, want[i], (size_t)n));
    assert_false(lg_gguf_array_str(g, "strs", 3, &s, &n) || lg_gguf_array_str(g, "ints", 0, &s, &n) || lg_gguf_array_str(g, "empty", 0, &s, &n));
    assert_true(lg_gguf_array(g, "empty", &elem, &n) && elem == STR && n == 0);
    assert_int_equal(lg_gguf_n_tensor(g), 3);
    assert_null(lg_gguf_tensor(g, 3));
    assert_null(lg_gguf_tensor(g, -1));
    assert_null(lg_gguf_find(g, "d"));
    const lg_tensor_ref *x = lg_gguf_find(g, "a");
    assert_true(x && x->dtype == LG_DTYPE_F32 && x->n_dim == 2 && x->shape[0] == 2 && x->shape[1] == 3 && x->n_elem == 6 && x->bytes == 24);
    float f[32];
    lg_base_dequant(x->dtype, x->data, f, 6);
    for (int i = 0; i < 6; i++) assert_true(f[i] == (float)i);
    x = lg_gguf_find(g, "b");
    assert_true(x && x->dtype == LG_DTYPE_Q8_0 && x->n_dim == 1 && x->shape[0] == 32 && x->bytes == 34);
    lg_base_dequant(x->dtype, x->data, f, 32);
    for (int i = 0; i < 32; i++) assert_true(f[i] == (float)i);
    x = lg_gguf_find(g, "c"); /* the file has the innermost first */
    assert_true(x && x->n_dim == 4 && x->shape[0] == 2 && x->shape[1] == 1 && x->shape[2] == 2 && x->shape[3] == 2 && x->bytes == 16);
    lg_gguf_close(g);
}

static void test_gguf_read(void **state) {
    (void)state;
    static const int64_t aligns[] = { 0, 1, 8, 32, 64, 4096 };
    marks m;
    for (uint32_t version = 2; version <= 3; version++)
        for (size_t a = 0; a < sizeof aligns / sizeof *aligns; a++) {
            lg_text t = gguf_bytes(version, aligns[a], &m);
            put(at("a.gguf"), t.data, t.n);
            check_gguf(at("a.gguf"));
            lg_text_free(&t);
        }
    lg_gguf_close(NULL);
}

/* Refused with this status, and the message names the file and holds `word`. */
static void refuse_gguf(const lg_text *t, lg_status want, const char *word) {
    lg_error e = { 0 };
    lg_gguf *g = (lg_gguf *)(void *)fx_dir;
    const char *path = at("bad.gguf");
    put(path, t->data, t->n);
    const lg_status st = lg_gguf_open(&g, path, &e);
    if (st != want || e.code != want || g || !strstr(e.message, path) || !strstr(e.message, word))
        fail_msg("status %d (wanted %d), \"%s\" (wanted \"%s\")", st, want, e.message, word);
}

static void test_gguf_refused(void **state) {
    (void)state;
    marks m;
    const lg_text good = gguf_bytes(3, 32, &m);
    lg_text big = { 0 };
#define BAD(pos, value, bytes, status, word)                                              \
    do {                                                                                  \
        lg_text t = { 0 };                                                                \
        add(&t, good.data, good.n);                                                       \
        set(&t, pos, (uint64_t)(value), bytes);                                           \
        refuse_gguf(&t, status, word);                                                    \
        lg_text_free(&t);                                                                 \
    } while (0)
    char word[64];
#define OFFSET(pos) (snprintf(word, sizeof word, "offset %lld", (long long)(pos)), word)
    BAD(0, 'g', 1, LG_ERR_FORMAT, "offset 0");
    BAD(4, 1, 4, LG_ERR_UNSUPPORTED, "version 1 at offset 4");
    BAD(4, 4, 4, LG_ERR_UNSUPPORTED, "version 4");
    BAD(4, 0x03000000, 4, LG_ERR_UNSUPPORTED, "offset 4"); /* big-endian */
    static const uint64_t counts[] = { 4, 5, 1000, UINT32_MAX, INT64_MAX, UINT64_C(1) << 63, UINT64_MAX, UINT64_MAX / 24 + 2, UINT64_MAX - 6 };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        BAD(8, counts[i], 8, LG_ERR_FORMAT, "offset");
        BAD(16, counts[i] > INT64_MAX ? counts[i] : counts[i] + 20, 8, LG_ERR_FORMAT, "offset");
        BAD(m.key_len, counts[i] + 65536, 8, LG_ERR_FORMAT, OFFSET(m.key_len));
        BAD(m.str_len, counts[i] + (uint64_t)good.n, 8, LG_ERR_FORMAT, OFFSET(m.str_len));
        BAD(m.arr_len, counts[i] + (uint64_t)good.n, 8, LG_ERR_FORMAT, OFFSET(m.arr_len));
        BAD(m.arr_str, counts[i] + (uint64_t)good.n, 8, LG_ERR_FORMAT, OFFSET(m.arr_str));
        BAD(m.tensor, counts[i] + 65536, 8, LG_ERR_FORMAT, OFFSET(m.tensor));
        BAD(m.dim, counts[i] + (UINT64_C(1) << 40), 8, LG_ERR_FORMAT, "offset");
    }
    BAD(m.key_len, 0, 8, LG_ERR_FORMAT, OFFSET(m.key_len));
    BAD(m.key_len + 8, 0, 1, LG_ERR_FORMAT, OFFSET(m.key_len)); /* a zero byte inside the key */
    BAD(m.type, 13, 4, LG_ERR_FORMAT, OFFSET(m.type));
    BAD(m.type, UINT32_MAX, 4, LG_ERR_FORMAT, OFFSET(m.type));
    BAD(m.arr_elem, ARR, 4, LG_ERR_FORMAT, OFFSET(m.arr_elem));
    BAD(m.arr_elem, 77, 4, LG_ERR_FORMAT, OFFSET(m.arr_elem));
    BAD(m.n_dim, 0, 4, LG_ERR_FORMAT, OFFSET(m.n_dim));
    BAD(m.n_dim, 5, 4, LG_ERR_FORMAT, OFFSET(m.n_dim));
    BAD(m.dim, 0, 8, LG_ERR_FORMAT, OFFSET(m.dim));
    BAD(m.dtype, 99, 4, LG_ERR_UNSUPPORTED, "type 99");
    BAD(m.dtype, 10, 4, LG_ERR_UNSUPPORTED, "tensor a"); /* Q2_K */
    BAD(m.dtype, 2, 4, LG_ERR_FORMAT, "whole blocks"); /* Q4_0 with rows of 3 */
    BAD(m.offset, 4, 8, LG_ERR_FORMAT, "misaligned");
    BAD(m.offset, 1 << 20, 8, LG_ERR_FORMAT, "outside the file");
    BAD(m.offset, UINT64_MAX - 31, 8, LG_ERR_FORMAT, "tensor a");
    BAD(m.offset, (UINT64_C(1) << 63) - 32, 8, LG_ERR_FORMAT, "tensor a");
    BAD(m.tensor - 4, 3, 4, LG_ERR_FORMAT, "key \"general.alignment\""); /* the last value of the metadata */
    BAD(m.tensor - 4, 0, 4, LG_ERR_FORMAT, "key \"general.alignment\"");
    BAD(m.tensor - 4, UINT32_MAX, 4, LG_ERR_FORMAT, "key \"general.alignment\"");
    BAD(m.key_len + 8 + 2 + 4 + 1 + 8, 'u', 1, LG_ERR_FORMAT, "key \"u8\" a second time"); /* i8 becomes u8 */
    for (int64_t n = 0; n < good.n; n++) { /* every truncation */
        lg_text t = { 0 };
        add(&t, good.data, n);
        refuse_gguf(&t, LG_ERR_FORMAT, "offset");
        lg_text_free(&t);
    }
    add(&big, good.data, m.tensor); /* the same tensor name twice */
    set(&big, 8, 2, 8);
    for (int i = 0; i < 2; i++) { str(&big, "x"); u32(&big, 1); u64(&big, 1); u32(&big, 0); u64(&big, 0); }
    for (int i = 0; i < 64; i++) u8(&big, 0);
    refuse_gguf(&big, LG_ERR_FORMAT, "a second time");
    lg_text_free(&big);
    lg_error e = { 0 };
    lg_gguf *g;
    assert_int_equal(lg_gguf_open(&g, at("none.gguf"), &e), LG_ERR_IO);
    assert_non_null(strstr(e.message, "none.gguf"));
    assert_int_equal(lg_gguf_open(&g, fx_dir, &e), LG_ERR_IO);
    assert_int_equal(mkfifo(at("pipe"), 0600), 0);
    assert_int_equal(lg_gguf_open(&g, at("pipe"), &e), LG_ERR_IO); /* and does not wait for a writer */
    lg_text copy = good;
    lg_text_free(&copy);
}

static void write_gguf(const char *path, const lg_gguf *from, bool split, int64_t no, int64_t count) {
    lg_gguf_out *o = NULL;
    OK(lg_gguf_create(&o, path, err));
    const char *const s[] = { "x", "", "long\0er" };
    const int64_t len[] = { 1, 0, 7 };
    const int32_t v[] = { 1, -2, INT32_MAX };
    if (from)
        for (int64_t i = 0; i < lg_gguf_n_meta(from); i++) OK(lg_gguf_copy_meta(o, from, lg_gguf_meta_key(from, i), err));
    OK(lg_gguf_put_int(o, "w.small", 7, err));
    OK(lg_gguf_put_int(o, "w.big", INT64_C(1) << 40, err));
    OK(lg_gguf_put_int(o, "w.negative", -3, err));
    OK(lg_gguf_put_float(o, "w.float", 0.5, err));
    OK(lg_gguf_put_bool(o, "w.bool", true, err));
    OK(lg_gguf_put_str(o, "w.str", "h\0i", 3, err));
    OK(lg_gguf_put_str_array(o, "w.strs", s, len, 3, err));
    OK(lg_gguf_put_int_array(o, "w.ints", v, 3, err));
    if (split) {
        OK(lg_gguf_put_int(o, "split.no", no, err));
        OK(lg_gguf_put_int(o, "split.count", count, err));
    }
    char name[16];
    const int64_t shape[] = { 3, 64 }, one = 5;
    snprintf(name, sizeof name, "t%lld", (long long)no);
    uint8_t data[3 * 36];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i * 7 + (size_t)no);
    OK(lg_gguf_declare(o, name, LG_DTYPE_Q4_0, 2, shape, err)); /* 3 rows of 36 bytes */
    snprintf(name, sizeof name, "u%lld", (long long)no);
    OK(lg_gguf_declare(o, name, LG_DTYPE_F32, 1, &one, err));
    OK(lg_gguf_write_data(o, data, 50, err)); /* in pieces */
    OK(lg_gguf_write_data(o, data + 50, 58, err));
    OK(lg_gguf_write_data(o, data, 20, err));
    OK(lg_gguf_commit(o, err));
    lg_gguf_out_free(o);
}

static void check_written(const lg_gguf *g, int64_t no) {
    int64_t v, n;
    double d;
    bool b;
    const char *s;
    char name[16];
    INT("w.small", 7); INT("w.big", INT64_C(1) << 40); INT("w.negative", -3);
    assert_true(lg_gguf_float(g, "w.float", &d) && d == 0.5 && lg_gguf_bool(g, "w.bool", &b) && b);
    assert_true(lg_gguf_str(g, "w.str", &s, &n) && n == 3 && !memcmp(s, "h\0i", 3));
    assert_true(lg_gguf_array_str(g, "w.strs", 2, &s, &n) && n == 7 && !memcmp(s, "long\0er", 7));
    assert_true(lg_gguf_array_int(g, "w.ints", 1, &v) && v == -2);
    snprintf(name, sizeof name, "t%lld", (long long)no);
    const lg_tensor_ref *t = lg_gguf_find(g, name);
    assert_true(t && t->dtype == LG_DTYPE_Q4_0 && t->shape[0] == 3 && t->shape[1] == 64 && t->bytes == 108 && t->offset % 32 == 0 && t->part == no);
    for (int i = 0; i < 108; i++) assert_int_equal(((const uint8_t *)t->data)[i], (uint8_t)(i * 7 + no));
    snprintf(name, sizeof name, "u%lld", (long long)no);
    t = lg_gguf_find(g, name);
    assert_true(t && t->n_dim == 1 && t->shape[0] == 5 && t->offset % 32 == 0);
    for (int i = 0; i < 20; i++) assert_int_equal(((const uint8_t *)t->data)[i], (uint8_t)(i * 7 + no));
}

static void test_gguf_write(void **state) {
    (void)state;
    lg_gguf *g = NULL;
    lg_error e = { 0 };
    marks m;
    write_gguf(at("w.gguf"), NULL, false, 0, 1);
    OK(lg_gguf_open(&g, at("w.gguf"), err));
    check_written(g, 0);
    assert_int_equal(lg_gguf_n_tensor(g), 2);
    lg_gguf_close(g);
    /* copy_meta keeps every type: a copy of the hand-made file's metadata reads the same */
    lg_text t = gguf_bytes(3, 0, &m);
    put(at("hand.gguf"), t.data, t.n);
    OK(lg_gguf_open(&g, at("hand.gguf"), err));
    write_gguf(at("copy.gguf"), g, false, 0, 1);
    lg_gguf *c = NULL;
    OK(lg_gguf_open(&c, at("copy.gguf"), err));
    check_written(c, 0);
    int64_t v, n;
    int32_t elem;
    double d;
    const char *s;
    assert_true(lg_gguf_int(c, "i8", &v) && v == -5 && lg_gguf_float(c, "f64", &d) && d == 0.1 && lg_gguf_array(c, "ints", &elem, &n) && elem == I16);
    assert_true(lg_gguf_array_str(c, "strs", 2, &s, &n) && n == 5 && !memcmp(s, "three", 5) && lg_gguf_array(c, "empty", &elem, &n) && n == 0);
    lg_gguf_close(c);
    lg_gguf_close(g);
    lg_text_free(&t);
    /* misuse is refused and leaves nothing */
    const int before = n_files();
    const int64_t shape[] = { 2, 3 };
    lg_gguf_out *o = NULL;
    OK(lg_gguf_create(&o, at("never.gguf"), err));
    assert_int_equal(lg_gguf_declare(o, "x", LG_DTYPE_Q4_0, 2, shape, &e), LG_ERR_USAGE);
    OK(lg_gguf_declare(o, "y", LG_DTYPE_F32, 2, shape, err));
    assert_int_equal(lg_gguf_commit(o, &e), LG_ERR_USAGE);
    assert_int_equal(lg_gguf_put_int(o, "late", 1, &e), LG_ERR_USAGE);
    assert_int_equal(lg_gguf_write_data(o, shape, 25, &e), LG_ERR_USAGE);
    lg_gguf_out_free(o);
    assert_int_equal(n_files(), before);
}

static void test_gguf_split(void **state) {
    (void)state;
    lg_gguf *g = NULL;
    lg_error e = { 0 };
    write_gguf(at("s-00001-of-00003.gguf"), NULL, true, 0, 3);
    write_gguf(at("s-00002-of-00003.gguf"), NULL, true, 1, 3);
    assert_int_equal(lg_gguf_open(&g, at("s-00001-of-00003.gguf"), &e), LG_ERR_IO); /* the third is missing */
    assert_non_null(strstr(e.message, "s-00003-of-00003.gguf"));
    write_gguf(at("s-00003-of-00003.gguf"), NULL, true, 2, 3);
    OK(lg_gguf_open(&g, at("s-00001-of-00003.gguf"), err));
    assert_int_equal(lg_gguf_n_tensor(g), 6);
    for (int i = 0; i < 3; i++) check_written(g, i);
    lg_gguf_close(g);
    assert_int_equal(lg_gguf_open(&g, at("s-00002-of-00003.gguf"), &e), LG_ERR_FORMAT);
    assert_non_null(strstr(e.message, "split.no"));
    assert_int_equal(rename(at("s-00001-of-00003.gguf"), at("other.gguf")), 0);
    assert_int_equal(lg_gguf_open(&g, at("other.gguf"), &e), LG_ERR_FORMAT);
    assert_non_null(strstr(e.message, "split.count"));
    assert_int_equal(rename(at("other.gguf"), at("s-00001-of-00003.gguf")), 0);
    write_gguf(at("s-00003-of-00003.gguf"), NULL, true, 1, 3); /* tensors of part 2 again */
    assert_int_equal(lg_gguf_open(&g, at("s-00001-of-00003.gguf"), &e), LG_ERR_FORMAT);
    assert_non_null(strstr(e.message, "a second time"));
    write_gguf(at("many-00001-of-00600.gguf"), NULL, true, 0, 600);
    assert_int_equal(lg_gguf_open(&g, at("many-00001-of-00600.gguf"), &e), LG_ERR_FORMAT);
}

/* ---- safetensors ---- */
static lg_text st_bytes(const char *header, int64_t n_data) {
    lg_text t = { 0 };
    u64(&t, strlen(header));
    add(&t, header, (int64_t)strlen(header));
    for (int64_t i = 0; i < n_data; i++) u8(&t, (int)(i % 251));
    return t;
}

static void test_safetensors(void **state) {
    (void)state;
    lg_st *s = NULL;
    lg_text t = st_bytes("{\"__metadata__\":{\"format\":\"pt\"},\"m\":{\"dtype\":\"F16\",\"shape\":[2,3],\"data_offsets\":[4,16]},"
                         "\"scalar\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},\"i\":{\"dtype\":\"I64\",\"shape\":[1,1,2,1],\"data_offsets\":[16,32]},"
                         "\"b\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[32,34]},\"u\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[34,36]},"
                         "\"j\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[36,40]}}   ", 40);
    put(at("a.safetensors"), t.data, t.n);
    OK(lg_st_open(&s, at("a.safetensors"), err));
    assert_int_equal(lg_st_n_tensor(s), 6);
    assert_int_equal(lg_st_file_bytes(s), t.n);
    assert_string_equal(lg_st_meta(s, "format"), "pt");
    assert_null(lg_st_meta(s, "none"));
    assert_null(lg_st_find(s, "__metadata__"));
    const lg_tensor_ref *x = lg_st_find(s, "m");
    assert_true(x && x->dtype == LG_DTYPE_F16 && x->n_dim == 2 && x->shape[0] == 2 && x->shape[1] == 3 && x->bytes == 12 && x->offset == t.n - 36);
    assert_int_equal(*(const uint8_t *)x->data, 4);
    x = lg_st_find(s, "scalar");
    assert_true(x && x->n_dim == 1 && x->shape[0] == 1 && x->n_elem == 1);
    x = lg_st_find(s, "i");
    assert_true(x && x->dtype == LG_DTYPE_I64 && x->n_dim == 4 && x->shape[2] == 2);
    for (int64_t i = 1; i < 6; i++) assert_true(lg_st_tensor(s, i)->offset > lg_st_tensor(s, i - 1)->offset);
    lg_st_close(s);
    lg_text_free(&t);
    /* what the writer writes */
    const float f[] = { 1, 2, 3, 4, 5, 6 };
    const uint16_t h[] = { 7, 8 };
    const lg_st_entry e[] = { { "w", LG_DTYPE_F32, 2, { 2, 3 }, f }, { "a \"quoted\" \xc3\xa9", LG_DTYPE_BF16, 1, { 2 }, h } };
    const char *const meta[] = { "longan", "{\"version\":1}", "k", "" };
    OK(lg_st_write(at("w.safetensors"), e, 2, meta, 2, err));
    OK(lg_st_open(&s, at("w.safetensors"), err));
    assert_string_equal(lg_st_meta(s, "longan"), "{\"version\":1}");
    assert_string_equal(lg_st_meta(s, "k"), "");
    x = lg_st_find(s, "w");
    assert_true(x && x->shape[0] == 2 && x->shape[1] == 3 && !memcmp(x->data, f, sizeof f) && x->offset % 8 == 0);
    x = lg_st_find(s, "a \"quoted\" \xc3\xa9");
    assert_true(x && x->dtype == LG_DTYPE_BF16 && !memcmp(x->data, h, sizeof h));
    lg_st_close(s);
    const lg_st_entry q = { "q", LG_DTYPE_Q8_0, 1, { 32 }, f };
    lg_error er = { 0 };
    assert_int_equal(lg_st_write(at("q.safetensors"), &q, 1, NULL, 0, &er), LG_ERR_UNSUPPORTED);
    assert_int_not_equal(access(at("q.safetensors"), F_OK), 0);
    lg_st_close(NULL);
}

static void refuse_st(const char *header, int64_t n_data, lg_status want, const char *word) {
    lg_text t = st_bytes(header, n_data);
    lg_error e = { 0 };
    lg_st *s = (lg_st *)(void *)fx_dir;
    const char *path = at("bad.safetensors");
    put(path, t.data, t.n);
    const lg_status st = lg_st_open(&s, path, &e);
    if (st != want || s || !strstr(e.message, path) || !strstr(e.message, word))
        fail_msg("%s: status %d (wanted %d), \"%s\" (wanted \"%s\")", header, st, want, e.message, word);
    lg_text_free(&t);
}

static void test_safetensors_refused(void **state) {
    (void)state;
#define ONE(dtype, shape, off) "{\"x\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" off "}}"
    refuse_st(ONE("\"F64\"", "[1]", "[0,8]"), 8, LG_ERR_UNSUPPORTED, "F64");
    refuse_st(ONE("\"F8_E4M3\"", "[1]", "[0,1]"), 1, LG_ERR_UNSUPPORTED, "tensor x: key \"dtype\"");
    refuse_st(ONE("7", "[1]", "[0,4]"), 4, LG_ERR_UNSUPPORTED, "key \"dtype\"");
    refuse_st(ONE("\"F32\"", "[1,1,1,1,1]", "[0,4]"), 4, LG_ERR_FORMAT, "key \"shape\"");
    refuse_st(ONE("\"F32\"", "4", "[0,4]"), 4, LG_ERR_FORMAT, "key \"shape\"");
    refuse_st(ONE("\"F32\"", "[-1]", "[0,4]"), 4, LG_ERR_FORMAT, "key \"shape\"");
    refuse_st(ONE("\"F32\"", "[1.0]", "[0,4]"), 4, LG_ERR_FORMAT, "key \"shape\"");
    refuse_st(ONE("\"F32\"", "[4294967296,4294967296,4294967296]", "[0,4]"), 4, LG_ERR_FORMAT, "key \"shape\"");
    refuse_st(ONE("\"F32\"", "[4611686018427387904]", "[0,4]"), 4, LG_ERR_FORMAT, "key \"data_offsets\"");
    refuse_st(ONE("\"F32\"", "[2]", "[0,4]"), 4, LG_ERR_FORMAT, "key \"data_offsets\"");
    refuse_st(ONE("\"F32\"", "[1]", "[4,0]"), 4, LG_ERR_FORMAT, "key \"data_offsets\"");
    refuse_st(ONE("\"F32\"", "[1]", "[-4,0]"), 4, LG_ERR_FORMAT, "key \"data_offsets\"");
    refuse_st(ONE("\"F32\"", "[1]", "[0,4]"), 3, LG_ERR_FORMAT, "key \"data_offsets\"");
    refuse_st(ONE("\"F32\"", "[1]", "[0,4,8]"), 4, LG_ERR_FORMAT, "key \"data_offsets\"");
    refuse_st(ONE("\"F32\"", "[1]", "[9223372036854775803,9223372036854775807]"), 4, LG_ERR_FORMAT, "key \"data_offsets\"");
    refuse_st(ONE("\"F32\"", "[1]", "[0,4]"), 5, LG_ERR_FORMAT, "1 bytes of no tensor at offset");
    refuse_st(ONE("\"F32\"", "[1]", "[4,8]"), 8, LG_ERR_FORMAT, "hole at offset");
    refuse_st("{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, LG_ERR_FORMAT, "overlaps");
    refuse_st("{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, LG_ERR_FORMAT, "duplicate");
    refuse_st("{\"x\":7}", 0, LG_ERR_UNSUPPORTED, "tensor x");
    refuse_st("[]", 0, LG_ERR_FORMAT, "offset 8");
    refuse_st("{", 0, LG_ERR_FORMAT, "offset");
    refuse_st("", 0, LG_ERR_FORMAT, "offset");
    lg_text t = st_bytes("{}", 0);
    static const uint64_t sizes[] = { 3, UINT32_MAX, INT64_MAX, UINT64_C(1) << 63, UINT64_MAX, UINT64_MAX - 7 };
    lg_error e = { 0 };
    lg_st *s;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        set(&t, 0, sizes[i], 8);
        put(at("len.safetensors"), t.data, t.n);
        assert_int_equal(lg_st_open(&s, at("len.safetensors"), &e), LG_ERR_FORMAT);
        assert_true(strstr(e.message, "len.safetensors") && strstr(e.message, "offset 0"));
    }
    for (int64_t n = 0; n < t.n; n++) {
        put(at("len.safetensors"), t.data, n);
        assert_int_equal(lg_st_open(&s, at("len.safetensors"), &e), LG_ERR_FORMAT);
    }
    lg_text_free(&t);
}

static void test_safetensors_shards(void **state) {
    (void)state;
    static const float f[] = { 1, 2, 3, 4 };
    const lg_st_entry a[] = { { "one", LG_DTYPE_F32, 1, { 4 }, f } }, b[] = { { "two", LG_DTYPE_F32, 1, { 2 }, f }, { "three", LG_DTYPE_F32, 1, { 1 }, f } };
    assert_int_equal(mkdir(at("sh"), 0700), 0);
    OK(lg_st_write(at("sh/a.safetensors"), a, 1, NULL, 0, err));
    OK(lg_st_write(at("sh/b.safetensors"), b, 2, NULL, 0, err));
    const char *index = at("sh/model.safetensors.index.json");
    char name[160];
    snprintf(name, sizeof name, "%s", index);
    lg_st *s = NULL;
    lg_error e = { 0 };
    put_str(name, "{\"metadata\":{},\"weight_map\":{\"one\":\"a.safetensors\",\"two\":\"b.safetensors\",\"three\":\"b.safetensors\"}}");
    OK(lg_st_open(&s, at("sh"), err));
    assert_int_equal(lg_st_n_tensor(s), 3);
    assert_int_equal(lg_st_find(s, "one")->part, 0);
    assert_int_equal(lg_st_find(s, "three")->part, 1);
    assert_true(*(const float *)lg_st_find(s, "two")->data == 1);
    lg_st_close(s);
#define INDEX(text, status, word)                                                                               \
    do {                                                                                                        \
        put_str(name, text);                                                                                    \
        const lg_status st_ = lg_st_open(&s, at("sh"), &e);                                                     \
        if (st_ != (status) || s || !strstr(e.message, word)) fail_msg("%s: %d, \"%s\"", text, st_, e.message); \
    } while (0)
    INDEX("{\"weight_map\":{\"one\":\"b.safetensors\",\"two\":\"b.safetensors\"}}", LG_ERR_FORMAT, "weight_map.one");
    INDEX("{\"weight_map\":{\"one\":\"a.safetensors\",\"two\":\"a.safetensors\"}}", LG_ERR_FORMAT, "weight_map.two");
    INDEX("{\"weight_map\":{\"one\":\"a.safetensors\",\"four\":\"b.safetensors\"}}", LG_ERR_FORMAT, "weight_map.four");
    INDEX("{\"weight_map\":{\"one\":\"../sh/a.safetensors\"}}", LG_ERR_FORMAT, "weight_map.one");
    INDEX("{\"weight_map\":{\"one\":\"..\"}}", LG_ERR_FORMAT, "weight_map.one");
    INDEX("{\"weight_map\":{\"one\":\"\"}}", LG_ERR_FORMAT, "weight_map.one");
    INDEX("{\"weight_map\":{\"one\":3}}", LG_ERR_FORMAT, "weight_map.one");
    INDEX("{\"weight_map\":{\"one\":\"c.safetensors\"}}", LG_ERR_IO, "c.safetensors");
    INDEX("{\"weight_map\":[]}", LG_ERR_FORMAT, "weight_map");
    INDEX("{}", LG_ERR_FORMAT, "weight_map");
    INDEX("[", LG_ERR_FORMAT, "index.json");
    OK(lg_st_write(at("sh/c.safetensors"), a, 1, NULL, 0, err));
    INDEX("{\"weight_map\":{\"one\":\"a.safetensors\",\"one \":\"c.safetensors\"}}", LG_ERR_FORMAT, "two shards");
}

/* ---- JSON ---- */
static lg_status parse(const char *text, int64_t n, lg_error *e) {
    lg_json *j = NULL;
    const lg_status st = lg_json_parse(&j, "some.json", text, n, e);
    assert_true((st == LG_OK) == (j != NULL));
    lg_json_free(j);
    return st;
}
static void test_json(void **state) {
    (void)state;
    lg_error e = { 0 };
    lg_text t = { 0 };
    for (int depth = 127; depth <= 130; depth++) { /* 128 levels are read, the byte that goes deeper is named */
        t.n = 0;
        for (int i = 0; i < depth; i++) add(&t, i % 2 ? "{\"a\":" : "[", i % 2 ? 5 : 1);
        add(&t, "0", 1);
        for (int i = depth; i-- > 0;) add(&t, i % 2 ? "}" : "]", 1);
        assert_int_equal(parse(t.data, t.n, &e), depth <= 128 ? LG_OK : LG_ERR_FORMAT);
        if (depth > 128) assert_true(e.offset == 64 + 64 * 5 && strstr(e.message, "some.json") && strstr(e.message, "deeper than 128"));
    }
    t.n = 0;
    for (int i = 0; i < 1000000; i++) add(&t, "[", 1);
    assert_int_equal(parse(t.data, t.n, &e), LG_ERR_FORMAT);
    lg_text_free(&t);
    static const char deep_string[] = "\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\\"[\"";
    assert_int_equal(parse(deep_string, (int64_t)sizeof deep_string - 1, &e), LG_OK); /* brackets inside a string */
    static const struct { const char *text, *word; } bad[] = {
        { "{\"a\":1,\"a\":2}", "duplicate" }, { "{\"a\":}", "line 1" }, { "{\n\n\"a\" 1}", "line 3" }, { "", "offset" }, { "[1,]", "offset" }, { "[01]", "offset" },
        { "[1] x", "offset" }, { "[\"\xff\"]", "offset" }, { "[\"\xed\xa0\x80\"]", "offset" }, { "[\"\\ud800\"]", "offset" }, { "[\"a\nb\"]", "offset" },
        { "[1e999]", "offset" }, { "[99999999999999999999]", "offset" }, { "nul", "offset" }, { "[NaN]", "offset" }, { "{1:2}", "offset" }, { "'a'", "offset" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        memset(&e, 0, sizeof e);
        if (parse(bad[i].text, (int64_t)strlen(bad[i].text), &e) != LG_ERR_FORMAT || !strstr(e.message, "some.json") || !strstr(e.message, bad[i].word))
            fail_msg("%s: \"%s\"", bad[i].text, e.message);
    }
    static const char values[] = "{\"i\":-9223372036854775808,\"r\":0.1,\"t\":true,\"n\":null,\"s\":\"a\\u0000b\\u00e9\",\"l\":[1,2.5,\"x\"],\"o\":{\"z\":1,\"y\":2}}";
    lg_json *j = NULL;
    OK(lg_json_parse(&j, "v", values, (int64_t)sizeof values - 1, err));
    int64_t v, n;
    double d;
    bool b;
    assert_true(lg_json_int(lg_json_get(j, "i"), &v) && v == INT64_MIN && lg_json_num(lg_json_get(j, "i"), &d) && d == -0x1p63);
    assert_true(lg_json_num(lg_json_get(j, "r"), &d) && d == 0.1 && !lg_json_int(lg_json_get(j, "r"), &v) && lg_json_bool(lg_json_get(j, "t"), &b) && b);
    assert_true(!lg_json_bool(lg_json_get(j, "n"), &b) && lg_json_typeof(lg_json_get(j, "n")) == LG_JSON_NULL && !lg_json_get(j, "none") && !lg_json_get(NULL, "x"));
    const char *s = lg_json_str(lg_json_get(j, "s"), &n);
    assert_true(s && n == 5 && !memcmp(s, "a\0b\xc3\xa9", 6));
    assert_true(lg_json_size(lg_json_get(j, "l")) == 3 && lg_json_size(j) == 7 && lg_json_size(NULL) == 0 && !lg_json_at(lg_json_get(j, "l"), 3) && !lg_json_at(NULL, 0));
    lg_json_free(j);
    lg_json_free(NULL);
    /* sizes */
    put_str(at("j.json"), "[1,2,3]");
    OK(lg_json_load(&j, at("j.json"), 7, err));
    lg_json_free(j);
    assert_int_equal(lg_json_load(&j, at("j.json"), 6, &e), LG_ERR_LIMIT);
    assert_true(strstr(e.message, "j.json") && strstr(e.message, "6 bytes"));
    assert_int_equal(lg_json_load(&j, at("none.json"), 6, &e), LG_ERR_IO);
    /* building: what is put is read back */
    static const char raw[] = "q\" b\\ \n\t\r\x01\x7f \xc3\xa9 \xff \xed\xa0\x80 end";
    assert_true(lg_base_text_append(&t, "[", 1) && lg_json_put_str(&t, raw, (int64_t)sizeof raw - 1));
    static const double nums[] = { 0, -0.1, 1e300, 5e-324, 0.30000000000000004, 0x1.b69b4ba630f35p56 };
    for (int i = 0; i < 6; i++) assert_true(lg_base_text_append(&t, ",", 1) && lg_json_put_num(&t, nums[i]));
    assert_true(lg_base_text_append(&t, ",", 1) && lg_json_put_num(&t, NAN) && lg_base_text_append(&t, ",", 1) && lg_json_put_num(&t, INFINITY) && lg_base_text_append(&t, "]", 1));
    OK(lg_json_parse(&j, "built", t.data, t.n, err));
    assert_string_equal(lg_json_str(lg_json_at(j, 0), NULL), "q\" b\\ \n\t\r\x01\x7f \xc3\xa9 \xef\xbf\xbd \xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd end");
    for (int i = 0; i < 6; i++) assert_true(lg_json_num(lg_json_at(j, i + 1), &d) && d == nums[i]);
    assert_true(lg_json_typeof(lg_json_at(j, 7)) == LG_JSON_NULL && lg_json_typeof(lg_json_at(j, 8)) == LG_JSON_NULL && lg_json_size(j) == 9);
    lg_json_free(j);
    lg_text_free(&t);
    /* every allocation failing: "out of memory" and nothing else, wherever in jansson it happens */
    int64_t k = 0;
    for (;;) {
        lg_base_alloc_fail_at(++k);
        const lg_status st = lg_json_parse(&j, "starved.json", values, (int64_t)sizeof values - 1, &e);
        const bool fired = lg_base_alloc_fail_at(0) == 0;
        if (!fired) assert_int_equal(st, LG_OK);
        else if (st != LG_ERR_NOMEM || j || strcmp(e.message, "starved.json: out of memory")) fail_msg("allocation %lld: %d \"%s\"", (long long)k, st, e.message);
        lg_json_free(j);
        if (!fired) break;
    }
    assert_in_range(k, 20, 1000);
}

/* ---- config.json ---- */
#define HEAD "{\"model_type\":\"llama\",\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":2,\"num_attention_heads\":4,\"max_position_embeddings\":256,"
static lg_status config_of(const char *json, lg_config *c, float inv[128], lg_error *e) {
    static float rows[10 * 64];
    lg_source s;
    float factor;
    mkdir(at("cfg"), 0700);
    const lg_st_entry t = { "model.embed_tokens.weight", LG_DTYPE_F32, 2, { 10, 64 }, rows };
    if (access(at("cfg/model.safetensors"), F_OK)) OK(lg_st_write(at("cfg/model.safetensors"), &t, 1, NULL, 0, err));
    put_str(at("cfg/config.json"), json);
    lg_status st = lg_source_open(&s, at("cfg"), e);
    if (st == LG_OK) st = lg_config_read(c, &s, e);
    if (st == LG_OK) st = lg_config_rope(c, &s, inv, &factor, e);
    lg_source_close(&s);
    return st;
}

static void test_config(void **state) {
    (void)state;
    lg_config c;
    float inv[128];
    lg_error e = { 0 };
    /* transformers 4: rope_theta at the top, rope_scaling, torch_dtype; no head_dim, head_dim null */
    OK(config_of(HEAD "\"num_key_value_heads\":2,\"rms_norm_eps\":1e-05,\"rope_theta\":500000.0,\"rope_scaling\":null,\"torch_dtype\":\"bfloat16\",\"tie_word_embeddings\":true,\"head_dim\":null}", &c, inv, err));
    assert_true(!strcmp(c.arch, "llama") && c.n_layer == 2 && c.n_head == 4 && c.n_head_kv == 2 && c.head_dim == 16 && c.n_embd == 64 && c.n_ff == 96);
    assert_true(c.n_ctx_train == 256 && c.n_vocab == 10 && c.tied && c.rope_theta == 500000 && c.rope_kind == LG_ROPE_NONE && c.norm_eps == 1e-5f && !c.rope_interleaved);
    OK(config_of(HEAD "\"rope_scaling\":{\"type\":\"linear\",\"factor\":4}}", &c, inv, err)); /* the old name of rope_type; KV heads as many as heads */
    assert_true(c.rope_kind == LG_ROPE_LINEAR && c.rope_factor == 4 && c.rope_theta == 10000 && c.n_head_kv == 4 && inv[0] == 0.25f);
    OK(config_of(HEAD "\"head_dim\":32,\"rope_theta\":10000,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":64}}", &c, inv, err));
    assert_true(c.rope_kind == LG_ROPE_LLAMA3 && c.head_dim == 32 && c.rope_orig_ctx == 64 && inv[0] == 1);
    /* wave length of the last pair is far above 64: exactly an eighth */
    assert_true(fabsf(inv[15] * 8 - 1.0f / powf(10000, 30.0f / 32)) < 1e-9f);
    OK(config_of(HEAD "\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":64}}", &c, inv, err));
    assert_true(c.rope_kind == LG_ROPE_YARN && fabs(c.rope_attn_factor - (1 + 0.1 * log(4.0))) < 1e-12);
    /* transformers 5: rope_parameters and dtype; it wins over what the older layout says */
    OK(config_of(HEAD "\"dtype\":\"bfloat16\",\"head_dim\":16,\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":1000000.0}}", &c, inv, err));
    assert_true(c.rope_theta == 1000000 && c.rope_kind == LG_ROPE_NONE && c.head_dim == 16);
    OK(config_of(HEAD "\"rope_theta\":7.0,\"rope_parameters\":{\"rope_type\":\"linear\",\"factor\":2,\"rope_theta\":50000}}", &c, inv, err));
    assert_true(c.rope_theta == 50000 && c.rope_factor == 2 && c.head_dim == 16);
    OK(config_of(HEAD "\"model_type_\":0,\"rope_parameters\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":64,\"rope_theta\":10000}}", &c, inv, err));
    assert_true(c.rope_kind == LG_ROPE_LLAMA3 && c.rope_orig_ctx == 64);
    static const struct { const char *json, *word; } bad[] = {
        { "{}", "\"model_type\"" }, { "{\"model_type\":7}", "\"model_type\"" }, { "{\"model_type\":\"mamba\"}", "\"model_type\": \"mamba\"" }, { "[]", "model_type" }, { "{", "offset" },
        { "{\"model_type\":\"llama\",\"num_hidden_layers\":2}", "\"hidden_size\"" }, { "{\"model_type\":\"llama\",\"num_hidden_layers\":\"2\"}", "\"num_hidden_layers\"" },
        { HEAD "\"head_dim\":16.5}", "\"head_dim\"" }, { HEAD "\"head_dim\":0}", "0 head size" }, { HEAD "\"head_dim\":15}", "do not fit" }, { HEAD "\"head_dim\":512}", "512 head size" },
        { HEAD "\"num_key_value_heads\":3}", "do not fit" }, { HEAD "\"num_key_value_heads\":8}", "8 KV heads" }, { HEAD "\"num_key_value_heads\":-1}", "KV heads" },
        { HEAD "\"hidden_act\":\"gelu\"}", "\"hidden_act\": \"gelu\"" }, { HEAD "\"attention_bias\":true}", "\"attention_bias\"" }, { HEAD "\"mlp_bias\":true}", "\"mlp_bias\"" },
        { HEAD "\"mlp_bias\":1}", "\"mlp_bias\"" }, { HEAD "\"use_sliding_window\":true}", "\"use_sliding_window\"" }, { HEAD "\"rms_norm_eps\":\"x\"}", "\"rms_norm_eps\"" },
        { HEAD "\"rms_norm_eps\":2}", "norm epsilon" }, { HEAD "\"rope_theta\":0}", "rotary base" }, { HEAD "\"rope_theta\":[1]}", "\"rope_theta\"" },
        { HEAD "\"partial_rotary_factor\":0.5}", "\"partial_rotary_factor\"" }, { HEAD "\"rope_scaling\":[1]}", "\"rope_scaling\"" },
        { HEAD "\"rope_scaling\":{\"rope_type\":\"longrope\"}}", "\"longrope\"" }, { HEAD "\"rope_scaling\":{\"rope_type\":\"linear\"}}", "\"factor\"" },
        { HEAD "\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":0.5}}", "\"factor\"" },
        { HEAD "\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":2,\"low_freq_factor\":4,\"high_freq_factor\":4}}", "\"high_freq_factor\"" },
        { HEAD "\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":2,\"truncate\":false}}", "\"truncate\"" },
        { HEAD "\"num_attention_heads\":1}", "duplicate" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        memset(&e, 0, sizeof e);
        if (config_of(bad[i].json, &c, inv, &e) == LG_OK || !strstr(e.message, at("cfg")) || !strstr(e.message, bad[i].word))
            fail_msg("%s: \"%s\" (wanted %s)", bad[i].json, e.message, bad[i].word);
    }
}

/* ---- writing ---- */
static void expect_file(const char *path, const char *want) {
    lg_text t = { 0 };
    OK(lg_file_read_all(&t, path, 1 << 20, err));
    assert_string_equal(t.data, want);
    lg_text_free(&t);
}
static void test_atomic(void **state) {
    (void)state;
    lg_writer w;
    lg_error e = { 0 };
    char path[160];
    snprintf(path, sizeof path, "%s", at("target"));
    put_str(path, "old");
    const int before = n_files();
    OK(lg_file_create(&w, path, err));
    OK(lg_file_write(&w, "new text", 8, err));
    assert_int_equal(w.pos, 8);
    expect_file(path, "old"); /* until the commit */
    lg_file_abandon(&w);
    expect_file(path, "old");
    assert_int_equal(n_files(), before);
    OK(lg_file_create(&w, path, err));
    OK(lg_file_write(&w, "new", 3, err));
    OK(lg_file_write(&w, NULL, 0, err));
    OK(lg_file_commit(&w, err));
    lg_file_abandon(&w); /* legal after commit */
    expect_file(path, "new");
    assert_int_equal(n_files(), before);
    assert_int_equal(lg_file_create(&w, at("no/such/folder"), &e), LG_ERR_IO);
    assert_non_null(strstr(e.message, "no/such/folder"));
    lg_file_abandon(&w);
    /* A disk that is full: the limit on the size of a file stands for it. The old file stays, nothing is left beside it. */
    struct rlimit was, few = { 0 };
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    few = was;
    few.rlim_cur = 8192;
    signal(SIGXFSZ, SIG_IGN);
    static char big[1 << 20];
    OK(lg_file_create(&w, path, err));
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &few), 0);
    lg_status st = lg_file_write(&w, big, sizeof big, &e);
    if (st == LG_OK) st = lg_file_commit(&w, &e);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    assert_int_equal(st, LG_ERR_IO);
    assert_non_null(strstr(e.message, path));
    lg_file_abandon(&w);
    OK(lg_file_create(&w, path, err)); /* few bytes stay in the buffer until the commit */
    few.rlim_cur = 0;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &few), 0);
    st = lg_file_write(&w, "xyz", 3, &e);
    if (st == LG_OK) st = lg_file_commit(&w, &e);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    assert_int_equal(st, LG_ERR_IO);
    lg_file_abandon(&w);
    expect_file(path, "new");
    assert_int_equal(n_files(), before);
}

static void test_npy(void **state) {
    (void)state;
    static const int64_t shapes[][4] = { { 3 }, { 0, 7 }, { 200, 49152 }, { 30, 1024, 3, 64 }, { INT64_C(1) << 40, 1 } };
    static const int32_t dims[] = { 1, 2, 2, 4, 2 };
    static const char *const want[] = { "(3,)", "(0, 7)", "(200, 49152)", "(30, 1024, 3, 64)", "(1099511627776, 1)" };
    const float one = 1;
    for (int i = 0; i < 5; i++) {
        lg_writer w;
        lg_text t = { 0 };
        char head[256];
        OK(lg_npy_create(&w, at("x.npy"), shapes[i], dims[i], err));
        OK(lg_file_write(&w, &one, 4, err));
        OK(lg_file_commit(&w, err));
        OK(lg_file_read_all(&t, at("x.npy"), 1 << 20, err));
        const int n = snprintf(head, sizeof head, "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }", want[i]);
        const int64_t len = (uint8_t)t.data[8] | (uint8_t)t.data[9] << 8;
        assert_memory_equal(t.data, "\x93NUMPY\x01\x00", 8);
        assert_int_equal((10 + len) % 64, 0);
        assert_int_equal(t.n, 10 + len + 4);
        assert_memory_equal(t.data + 10, head, (size_t)n);
        for (int64_t k = 10 + n; k < 9 + len; k++) assert_int_equal(t.data[k], ' ');
        assert_int_equal(t.data[9 + len], '\n');
        assert_memory_equal(t.data + 10 + len, &one, 4);
        lg_text_free(&t);
    }
    lg_writer w;
    lg_error e = { 0 };
    assert_int_equal(lg_npy_create(&w, at("no/x.npy"), shapes[0], 1, &e), LG_ERR_IO);
}

static void test_ids(void **state) {
    (void)state;
    lg_ids ids = { 0 };
    put_str(at("ids"), " 0\t1\n\r\n99 \v\f 007");
    OK(lg_file_read_ids(&ids, at("ids"), 100, err));
    assert_true(ids.n == 4 && ids.data[0] == 0 && ids.data[1] == 1 && ids.data[2] == 99 && ids.data[3] == 7);
    lg_ids_free(&ids);
    put_str(at("ids"), "");
    OK(lg_file_read_ids(&ids, at("ids"), 100, err));
    assert_int_equal(ids.n, 0);
    static const struct { const char *text, *word; lg_status st; } bad[] = {
        { "1 2 100", "id 100 at index 2", LG_ERR_LIMIT }, { "1 -2", "index 1", LG_ERR_FORMAT }, { "1 2x", "index 1", LG_ERR_FORMAT }, { "0x1", "index 0", LG_ERR_FORMAT },
        { "1,2", "index 0", LG_ERR_FORMAT }, { "5 99999999999999999999999", "index 1", LG_ERR_LIMIT }, { "4294967296", "index 0", LG_ERR_LIMIT }, { "1 +1", "index 1", LG_ERR_FORMAT },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        lg_error e = { 0 };
        put_str(at("ids"), bad[i].text);
        const lg_status st = lg_file_read_ids(&ids, at("ids"), 100, &e);
        if (st != bad[i].st || ids.n || !strstr(e.message, at("ids")) || !strstr(e.message, bad[i].word)) fail_msg("%s: %d \"%s\"", bad[i].text, st, e.message);
    }
    lg_error e = { 0 };
    put(at("ids"), "1 \0 2", 5);
    assert_int_equal(lg_file_read_ids(&ids, at("ids"), 100, &e), LG_ERR_FORMAT);
    assert_int_equal(lg_file_read_ids(&ids, at("none"), 100, &e), LG_ERR_IO);
}

static void test_utf8(void **state) {
    (void)state;
#define R "\xef\xbf\xbd"
    static const char *const pairs[][2] = { /* right side: Python's bytes.decode(errors="replace") */
        { "", "" }, { "plain \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80", "plain \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80" },
        { "\x80", R }, { "\xc3", R }, { "\xc3(", R "(" }, { "\xe2\x82", R }, { "\xe2\x82z", R "z" }, { "\xe2(\xa1", R "(" R }, { "\xf0\x9f\x98", R },
        { "\xc0\xaf", R R }, { "\xed\xa0\x80", R R R }, { "\xf4\x90\x80\x80", R R R R }, { "\xf5\x80", R R }, { "\xe0\x80\x80", R R R }, { "\xf0\x80\x80\x80", R R R R },
        { "a\xff" "b", "a" R "b" }, { "\xf0\x9f\xc3\xa9", R "\xc3\xa9" }, { "\xf0\x9f\x98\xe2\x82\xac", R "\xe2\x82\xac" },
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        lg_text t = { 0 };
        assert_true(lg_file_utf8_repair(&t, pairs[i][0], (int64_t)strlen(pairs[i][0])));
        assert_string_equal(t.data, pairs[i][1]);
        assert_int_equal(t.n, strlen(pairs[i][1]));
        lg_text_free(&t);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gguf_read), cmocka_unit_test(test_gguf_refused), cmocka_unit_test(test_gguf_write), cmocka_unit_test(test_gguf_split),
        cmocka_unit_test(test_safetensors), cmocka_unit_test(test_safetensors_refused), cmocka_unit_test(test_safetensors_shards), cmocka_unit_test(test_json),
        cmocka_unit_test(test_config), cmocka_unit_test(test_atomic), cmocka_unit_test(test_npy), cmocka_unit_test(test_ids), cmocka_unit_test(test_utf8),
    };
    return cmocka_run_group_tests(tests, fx_dir_make, fx_dir_remove);
}
