/* UTF-8 repair, .npy headers, id files. */
#include "file/file.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Length of the valid sequence at s, or minus the length of the maximal invalid part (Unicode 15, D93b), as Python does. */
static int sequence(const unsigned char *s, int64_t n) {
    const unsigned c = s[0];
    if (c < 0x80) return 1;
    const int want = c >= 0xc2 && c <= 0xdf ? 2 : c >= 0xe0 && c <= 0xef ? 3 : c >= 0xf0 && c <= 0xf4 ? 4 : 0;
    if (!want) return -1;
    unsigned low = 0x80, high = 0xbf;
    if (c == 0xe0) low = 0xa0;
    if (c == 0xed) high = 0x9f;
    if (c == 0xf0) low = 0x90;
    if (c == 0xf4) high = 0x8f;
    for (int i = 1; i < want; i++) {
        if (i >= n || s[i] < low || s[i] > high) return -i;
        low = 0x80;
        high = 0xbf;
    }
    return want;
}

bool lg_file_utf8_repair(lg_text *out, const char *s, int64_t n) {
    const unsigned char *u = (const unsigned char *)s;
    int64_t from = 0;
    for (int64_t i = 0; i < n;) {
        const int k = sequence(u + i, n - i);
        if (k > 0) {
            i += k;
            continue;
        }
        if (!lg_base_text_append(out, s + from, i - from) || !lg_base_text_append(out, "\xef\xbf\xbd", 3)) return false;
        i -= k;
        from = i;
    }
    return lg_base_text_append(out, n ? s + from : "", n - from);
}

/* https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, version 1.0 */
lg_status lg_npy_create(lg_writer *w, const char *path, const int64_t *shape, int32_t n_dim, lg_error *err) {
    lg_status st = LG_OK;
    lg_text t = { 0 };
    bool ok = lg_base_text_printf(&t, "{'descr': '<f4', 'fortran_order': False, 'shape': (");
    for (int32_t i = 0; ok && i < n_dim; i++) ok = lg_base_text_printf(&t, n_dim == 1 ? "%lld," : i ? ", %lld" : "%lld", (long long)shape[i]);
    ok = ok && lg_base_text_printf(&t, "), }");
    while (ok && (10 + t.n + 1) % 64) ok = lg_base_text_append(&t, " ", 1);
    ok = ok && lg_base_text_append(&t, "\n", 1);
    const unsigned char head[10] = { 0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)(t.n & 0xff), (unsigned char)(t.n >> 8) };
    memset(w, 0, sizeof *w);
    if (!ok) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    LG_TRY(lg_file_create(w, path, err));
    LG_TRY(lg_file_write(w, head, sizeof head, err));
    LG_TRY(lg_file_write(w, t.data, t.n, err));
done:
    if (st != LG_OK) lg_file_abandon(w);
    lg_text_free(&t);
    return st;
}

lg_status lg_file_read_ids(lg_ids *out, const char *path, int64_t n_vocab, lg_error *err) {
    lg_text t = { 0 };
    const char *name = strcmp(path, "-") ? path : "stdin";
    lg_status st = lg_file_read_all(&t, path, INT64_C(1) << 30, err);
    for (int64_t i = 0; st == LG_OK && i < t.n;) {
        if (strchr(" \t\r\n\v\f", t.data[i]) && t.data[i]) {
            i++;
            continue;
        }
        int64_t v = 0, j = i;
        for (; j < t.n && t.data[j] >= '0' && t.data[j] <= '9'; j++)
            if (v < INT64_C(1) << 40) v = v * 10 + (t.data[j] - '0');
        if (j == i || (j < t.n && !(t.data[j] && strchr(" \t\r\n\v\f", t.data[j]))))
            st = lg_base_fail(err, LG_ERR_FORMAT, i, "%s: no decimal id at index %lld (offset %lld)", name, (long long)out->n, (long long)i);
        else if (v >= n_vocab)
            st = lg_base_fail(err, LG_ERR_LIMIT, i, "%s: id %.*s at index %lld is outside the vocabulary of %lld", name, j - i > 24 ? 24 : (int)(j - i), t.data + i, (long long)out->n, (long long)n_vocab);
        else if (!lg_base_ids_push(out, (int32_t)v))
            st = lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
        i = j;
    }
    lg_text_free(&t);
    if (st != LG_OK) lg_ids_free(out);
    return st;
}
