/* lg_convert: any readable model to a GGUF that llama.cpp reads too. Arch llama holds the rows of Q and K in
 * interleaved rotary order there (pairs 2i, 2i+1), a Hugging Face folder in halves (i, i + D/2). */
#include "model/model.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int64_t file_type(lg_dtype t) { /* general.file_type, gguf.md */
    switch (t) {
    case LG_DTYPE_F32: return 0;
    case LG_DTYPE_F16: return 1;
    case LG_DTYPE_Q4_0: return 2;
    case LG_DTYPE_Q4_1: return 3;
    case LG_DTYPE_Q8_0: return 7;
    case LG_DTYPE_BF16: return 32;
    default: return -1;
    }
}

typedef struct item { const lg_tensor_ref *t; char name[64]; lg_dtype to; int64_t heads; /* > 0: rows to interleave */ } item;

static lg_status put_meta(lg_gguf_out *o, const lg_source *s, const lg_config *c, lg_dtype type, lg_error *err) {
    lg_status st = LG_OK;
    char key[96];
    if (s->gguf) {
        for (int64_t i = 0; i < lg_gguf_n_meta(s->gguf); i++) {
            const char *k = lg_gguf_meta_key(s->gguf, i);
            if ((type != LG_DTYPE_COUNT && !strcmp(k, "general.file_type")) || !strncmp(k, "split.", 6)) continue;
            LG_TRY(lg_gguf_copy_meta(o, s->gguf, k, err));
        }
        if (type != LG_DTYPE_COUNT) LG_TRY(lg_gguf_put_int(o, "general.file_type", file_type(type), err));
        return LG_OK;
    }
    lg_tokenizer *tok = NULL;
    LG_TRY(lg_gguf_put_str(o, "general.architecture", c->arch, (int64_t)strlen(c->arch), err));
    LG_TRY(lg_gguf_put_str(o, "general.name", c->name, (int64_t)strlen(c->name), err));
    if (file_type(type) >= 0) LG_TRY(lg_gguf_put_int(o, "general.file_type", file_type(type), err));
    LG_TRY(lg_gguf_put_int(o, "general.quantization_version", 2, err));
#define KEY(suffix) (snprintf(key, sizeof key, "%s.%s", c->arch, suffix), key)
    LG_TRY(lg_gguf_put_int(o, KEY("block_count"), c->n_layer, err));
    LG_TRY(lg_gguf_put_int(o, KEY("context_length"), c->n_ctx_train, err));
    LG_TRY(lg_gguf_put_int(o, KEY("embedding_length"), c->n_embd, err));
    LG_TRY(lg_gguf_put_int(o, KEY("feed_forward_length"), c->n_ff, err));
    LG_TRY(lg_gguf_put_int(o, KEY("attention.head_count"), c->n_head, err));
    LG_TRY(lg_gguf_put_int(o, KEY("attention.head_count_kv"), c->n_head_kv, err));
    LG_TRY(lg_gguf_put_int(o, KEY("attention.key_length"), c->head_dim, err));
    LG_TRY(lg_gguf_put_int(o, KEY("attention.value_length"), c->head_dim, err));
    LG_TRY(lg_gguf_put_int(o, KEY("rope.dimension_count"), c->head_dim, err));
    LG_TRY(lg_gguf_put_int(o, KEY("vocab_size"), c->n_vocab, err));
    LG_TRY(lg_gguf_put_float(o, KEY("attention.layer_norm_rms_epsilon"), (double)c->norm_eps, err));
    LG_TRY(lg_gguf_put_float(o, KEY("rope.freq_base"), c->rope_theta, err));
    if (c->rope_kind == LG_ROPE_LINEAR || c->rope_kind == LG_ROPE_YARN) {
        const char *kind = c->rope_kind == LG_ROPE_LINEAR ? "linear" : "yarn";
        LG_TRY(lg_gguf_put_str(o, KEY("rope.scaling.type"), kind, (int64_t)strlen(kind), err));
        LG_TRY(lg_gguf_put_float(o, KEY("rope.scaling.factor"), c->rope_factor, err));
        LG_TRY(lg_gguf_put_int(o, KEY("rope.scaling.original_context_length"), c->rope_orig_ctx, err));
    }
    if (c->rope_kind == LG_ROPE_YARN) { /* readers multiply attn_factor by 1 + 0.1 ln(factor) */
        LG_TRY(lg_gguf_put_float(o, KEY("rope.scaling.attn_factor"), c->rope_attn_factor / (1 + 0.1 * __builtin_log(c->rope_factor)), err));
        LG_TRY(lg_gguf_put_float(o, KEY("rope.scaling.yarn_beta_fast"), c->rope_beta_fast, err));
        LG_TRY(lg_gguf_put_float(o, KEY("rope.scaling.yarn_beta_slow"), c->rope_beta_slow, err));
    }
#undef KEY
    LG_TRY(lg_text_from_folder(&tok, s->folder, err));
    st = lg_text_to_gguf(tok, o, err);
    lg_text_close(tok);
done:
    return st;
}

/* Row of the source that becomes row r: within a head, 2i comes from i and 2i+1 from i + D/2. */
static int64_t source_row(const item *it, int64_t rows, int64_t r) {
    if (!it->heads) return r;
    const int64_t d = rows / it->heads, h = r / d, i = r % d;
    return h * d + (i % 2) * (d / 2) + i / 2;
}

static lg_status put_tensor(lg_gguf_out *o, const item *it, float *row, uint8_t *packed, lg_error *err) {
    lg_status st = LG_OK;
    const lg_tensor_ref *t = it->t;
    const int64_t rows = t->n_dim > 1 ? t->n_elem / t->shape[t->n_dim - 1] : it->heads ? t->n_elem : 1, n = t->n_elem / rows;
    const int64_t in = lg_base_row_bytes(t->dtype, n), out = lg_base_row_bytes(it->to, n);
    if (it->to == t->dtype && !it->heads) return lg_gguf_write_data(o, t->data, t->bytes, err);
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *src = (const uint8_t *)t->data + source_row(it, rows, r) * in;
        if (it->to == t->dtype) {
            LG_TRY(lg_gguf_write_data(o, src, in, err));
            continue;
        }
        lg_base_dequant(t->dtype, src, row, n);
        lg_base_quant(it->to, row, packed, n);
        LG_TRY(lg_gguf_write_data(o, packed, out, err));
    }
done:
    return st;
}

static lg_status plan_items(const lg_source *s, const lg_config *c, lg_dtype type, item *it, int64_t *n_item, const char *path, lg_error *err) {
    static const char *const part[] = { "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_q.bias", "attn_k.bias", "attn_v.bias",
                                        "attn_q_norm.weight", "attn_k_norm.weight", "attn_output.weight", "ffn_norm.weight", "ffn_gate.weight",
                                        "ffn_up.weight", "ffn_down.weight" };
    const bool permute = !s->gguf && !strcmp(c->arch, "llama");
    int64_t n = 0;
    char name[64];
    const int n_part = sizeof part / sizeof *part;
    for (int64_t i = -3; i < c->n_layer * n_part; i++) {
        if (i < 0) snprintf(name, sizeof name, "%s", i == -3 ? "token_embd.weight" : i == -2 ? "output_norm.weight" : "output.weight");
        else snprintf(name, sizeof name, "blk.%lld.%s", (long long)(i / n_part), part[i % n_part]);
        if (i == -1 && c->tied) continue;
        const lg_tensor_ref *t = lg_source_find(s, name);
        if (!t) continue; /* an optional one, or the reader of the result will name it */
        if (t->dtype > LG_DTYPE_Q6_K) return lg_base_fail(err, LG_ERR_UNSUPPORTED, t->offset, "%s: tensor %s has no weight dtype", path, t->name);
        item *x = &it[n++];
        x->t = t;
        memcpy(x->name, name, sizeof name);
        x->to = t->n_dim < 2 ? LG_DTYPE_F32 : type == LG_DTYPE_COUNT ? t->dtype : type;
        if (lg_base_row_bytes(x->to, t->shape[t->n_dim - 1]) < 0)
            return lg_base_fail(err, LG_ERR_UNSUPPORTED, t->offset, "%s: tensor %s has rows of %lld elements, no whole blocks of %s", path, t->name,
                                (long long)t->shape[t->n_dim - 1], lg_base_dtype(x->to)->name);
        if (permute && (strstr(name, "attn_q.") || strstr(name, "attn_k."))) {
            x->heads = strstr(name, "attn_q.") ? c->n_head : c->n_head_kv;
            if (t->shape[0] != x->heads * c->head_dim)
                return lg_base_fail(err, LG_ERR_FORMAT, t->offset, "%s: tensor %s has %lld rows, expected %lld", path, t->name, (long long)t->shape[0],
                                    (long long)(x->heads * c->head_dim));
        }
    }
    *n_item = n;
    return LG_OK;
}

lg_status lg_convert(const char *model_path, const char *out_path, lg_dtype type, lg_progress_fn progress, void *user, lg_error *err) {
    lg_status st;
    lg_source s = { 0 };
    lg_config c;
    lg_gguf_out *o = NULL;
    item *it = NULL;
    float *row = NULL, *inv = NULL, scale;
    uint8_t *packed = NULL;
    int64_t n = 0, longest = 1;
    const lg_tensor_ref *freqs = NULL;
    if (type != LG_DTYPE_COUNT && file_type(type) < 0) return lg_base_fail(err, LG_ERR_USAGE, -1, "convert writes f32, f16, bf16, q8_0, q4_0 and q4_1");
    LG_TRY(lg_source_open(&s, model_path, err));
    LG_TRY(lg_config_read(&c, &s, err));
    it = lg_base_calloc(c.n_layer * 14 + 3, sizeof *it);
    inv = lg_base_calloc(c.head_dim, sizeof *inv);
    if (!it || !inv) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    LG_TRY(plan_items(&s, &c, type, it, &n, model_path, err));
    for (int64_t i = 0; i < n; i++) {
        const int64_t e = it[i].t->shape[it[i].t->n_dim - 1];
        longest = e > longest ? e : longest;
    }
    row = lg_base_calloc(longest, sizeof *row);
    packed = lg_base_calloc(longest, sizeof *row);
    if (!row || !packed) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));

    LG_TRY(lg_gguf_create(&o, out_path, err));
    LG_TRY(put_meta(o, &s, &c, type, err));
    for (int64_t i = 0; i < n; i++) LG_TRY(lg_gguf_declare(o, it[i].name, it[i].to, it[i].t->n_dim, it[i].t->shape, err));
    const int64_t half = c.head_dim / 2;
    if (s.gguf) freqs = lg_gguf_find(s.gguf, "rope_freqs.weight");
    const bool own_freqs = !s.gguf && c.rope_kind == LG_ROPE_LLAMA3;
    if (freqs) LG_TRY(lg_gguf_declare(o, "rope_freqs.weight", freqs->dtype, freqs->n_dim, freqs->shape, err));
    if (own_freqs) LG_TRY(lg_gguf_declare(o, "rope_freqs.weight", LG_DTYPE_F32, 1, &half, err));
    for (int64_t i = 0; i < n; i++) {
        LG_TRY(put_tensor(o, &it[i], row, packed, err));
        if (progress && !progress(user, "convert", i + 1, n)) LG_TRY(lg_base_fail(err, LG_ERR_CANCELLED, -1, "conversion cancelled"));
    }
    if (freqs) LG_TRY(lg_gguf_write_data(o, freqs->data, freqs->bytes, err));
    if (own_freqs) { /* divisors: plain frequency over scaled frequency */
        lg_config plain = c;
        plain.rope_kind = LG_ROPE_NONE;
        LG_TRY(lg_config_rope(&plain, &s, inv, &scale, err));
        LG_TRY(lg_config_rope(&c, &s, inv + half, &scale, err));
        for (int64_t i = 0; i < half; i++) inv[i] /= inv[half + i];
        LG_TRY(lg_gguf_write_data(o, inv, half * (int64_t)sizeof *inv, err));
    }
    LG_TRY(lg_gguf_commit(o, err));
done:
    lg_gguf_out_free(o);
    lg_source_close(&s);
    lg_base_free(it);
    lg_base_free(inv);
    lg_base_free(row);
    lg_base_free(packed);
    return st;
}
