/* What the tests of whole models share: reading the fixtures of tests/fixtures (made by
 * tools/make-model-fixtures.py and tools/hybrid_ref.py), opening them, collecting logits. Tests run from
 * the repository root. */
#ifndef LG_TEST_FIXTURE_H
#define LG_TEST_FIXTURE_H
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "worsen.h"
#include "file/file.h"

#define FIXTURES "tests/fixtures/"

/* Fails the test with the library's own message. */
#define OK(expr)                                                                      \
    do {                                                                              \
        lg_error fx_e = { 0 };                                                        \
        lg_error *const err = &fx_e;                                                  \
        if ((expr) != LG_OK) fail_msg("%s: %s", #expr, fx_e.message);                 \
    } while (0)

/* A folder that goes with the group of tests: pass the two as its setup and teardown. */
static char fx_dir[64];
static inline int fx_dir_make(void **state) {
    (void)state;
    strcpy(fx_dir, "/tmp/longan-test-XXXXXX");
    return mkdtemp(fx_dir) ? 0 : 1;
}
static inline int fx_dir_remove(void **state) {
    char cmd[128];
    (void)state;
    snprintf(cmd, sizeof cmd, "rm -rf %s", fx_dir);
    return system(cmd);
}

typedef struct fx_array { int64_t n_row, n_col; float *f; int32_t *i; } fx_array; /* one of f, i */

/* .npy 1.0 with one or two axes of f4 or i4. */
static inline fx_array fx_npy(const char *path) {
    fx_array a = { .n_col = 1 };
    unsigned char head[10];
    char text[4096] = "";
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("%s: missing", path);
    if (fread(head, 1, 10, f) != 10 || memcmp(head, "\x93NUMPY\1", 7)) fail_msg("%s: no .npy", path);
    const size_t n = (size_t)head[8] | (size_t)head[9] << 8;
    if (n >= sizeof text || fread(text, 1, n, f) != n) fail_msg("%s: header", path);
    const char *shape = strstr(text, "'shape': (");
    long long rows = 0, cols = 1;
    if (!shape || sscanf(shape + 10, "%lld, %lld", &rows, &cols) < 1) fail_msg("%s: shape", path);
    a.n_row = rows;
    a.n_col = cols;
    void *data = calloc((size_t)(rows * cols), 4);
    if (!data || fread(data, 4, (size_t)(rows * cols), f) != (size_t)(rows * cols)) fail_msg("%s: data", path);
    if (strstr(text, "<f4")) a.f = data;
    else if (strstr(text, "<i4")) a.i = data;
    else fail_msg("%s: dtype", path);
    fclose(f);
    return a;
}
static inline void fx_array_free(fx_array *a) {
    free(a->f);
    free(a->i);
    *a = (fx_array){ 0 };
}

static inline const char *fx_path(char buf[512], const char *model, const char *file) {
    snprintf(buf, 512, FIXTURES "%s%s%s", model, *file ? "/" : "", file);
    return buf;
}

static inline lg_ids fx_ids(const char *model, const char *file) {
    char path[512];
    lg_ids ids = { 0 };
    OK(lg_file_read_ids(&ids, fx_path(path, model, file), 1 << 20, err));
    return ids;
}

static inline fx_array fx_ref(const char *model, const char *file) {
    char path[512];
    return fx_npy(fx_path(path, model, file));
}

/* A file of this process in the build folder; the caller unlinks it. */
static inline const char *fx_temp(char buf[512], const char *name) {
    snprintf(buf, 512, "build/fixture-%ld-%s", (long)getpid(), name);
    return buf;
}

static inline lg_model *fx_open(const char *path, const char *device, lg_compute compute, int threads) {
    lg_model *m = NULL;
    const lg_model_params p = { .path = path, .device = device, .compute = compute, .n_threads = threads };
    OK(lg_model_open(&m, &p, err));
    return m;
}
static inline lg_model *fx_model(const char *name, const char *device) {
    char path[512];
    return fx_open(fx_path(path, name, ""), device, LG_COMPUTE_F32, 2);
}
static inline lg_session *fx_session(lg_model *m, lg_session_params p) {
    lg_session *s = NULL;
    OK(lg_session_new(&s, m, &p, err));
    return s;
}

static inline double fx_max_diff(const float *a, const float *b, int64_t n) {
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        fx_worsen(&worst, fabs((double)a[i] - (double)b[i]));
    }
    return worst;
}

/* Compares the rows that `want` holds (row first + i*step of the evaluation is want row i). */
typedef struct fx_compare { const fx_array *want; int64_t first, step, seen; double worst; int64_t worst_row; } fx_compare;
static inline lg_status fx_compare_row(void *user, int64_t row, const float *logits, lg_error *err) {
    fx_compare *c = user;
    (void)err;
    if (row < c->first || (row - c->first) % c->step) return LG_OK;
    const int64_t i = (row - c->first) / c->step;
    if (i >= c->want->n_row) return LG_OK;
    const double d = fx_max_diff(logits, c->want->f + i * c->want->n_col, c->want->n_col);
    c->seen++;
    if (!isnan(c->worst) && !(d <= c->worst)) {
        c->worst = d;
        c->worst_row = row;
    }
    return LG_OK;
}
static inline double fx_eval(lg_session *s, const lg_ids *ids, int64_t decode_from, const fx_array *want, int64_t first, int64_t step) {
    fx_compare c = { .want = want, .first = first, .step = step };
    OK(lg_session_eval(s, ids->data, ids->n, decode_from, fx_compare_row, &c, err));
    if (c.seen != want->n_row) fail_msg("%lld of %lld rows were evaluated", (long long)c.seen, (long long)want->n_row);
    return c.worst;
}

typedef struct fx_sink { float *rows; int64_t n_vocab, first; } fx_sink; /* keeps the rows from `first` on */
static inline lg_status fx_keep_row(void *user, int64_t row, const float *logits, lg_error *err) {
    fx_sink *k = user;
    (void)err;
    if (row >= k->first) memcpy(k->rows + (row - k->first) * k->n_vocab, logits, (size_t)k->n_vocab * sizeof(float));
    return LG_OK;
}

/* The number under ref.json's key a (and b within it). */
static inline double fx_info(const char *model, const char *a, const char *b) {
    char path[512];
    lg_json *root = NULL;
    double v = NAN;
    OK(lg_json_load(&root, fx_path(path, model, "ref/ref.json"), 1 << 20, err));
    const lg_json *j = lg_json_get(root, a);
    if (b) j = lg_json_get(j, b);
    if (!lg_json_num(j, &v)) fail_msg("%s: no %s", path, b ? b : a);
    lg_json_free(root);
    return v;
}

static const char *const fx_devices[] = { "ref", "cpu" };
enum { FX_N_DEVICE = 2 };
#endif
