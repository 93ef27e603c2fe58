/* Model configuration from GGUF metadata or config.json (the layouts of transformers 4 and 5), and the rotary
 * frequencies that follow from it. Scaling: Llama 3 (Meta's reference, "llama3" in HF), YaRN (arXiv 2309.00071). */
#include "model/model.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

static lg_status bad(const lg_source *s, lg_error *err, const char *key, const char *what) {
    return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s%s: key \"%s\" %s", s->gguf ? s->path : s->folder,
                        s->gguf ? "" : "/config.json", key, what);
}
static lg_status unsupported(const lg_source *s, lg_error *err, const char *key, const char *value) {
    return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s%s: key \"%s\": \"%s\" is not supported",
                        s->gguf ? s->path : s->folder, s->gguf ? "" : "/config.json", key, value);
}

static bool is_arch(const char *a) { return !strcmp(a, "llama") || !strcmp(a, "qwen2") || !strcmp(a, "qwen3"); }

/* ---- GGUF ---- */
static const char *arch_key(char *buf, size_t n, const lg_config *c, const char *suffix) {
    snprintf(buf, n, "%s.%s", c->arch, suffix);
    return buf;
}
static lg_status gguf_int(const lg_source *s, const lg_config *c, const char *suffix, int64_t *out, int64_t absent, lg_error *err) {
    char key[96];
    arch_key(key, sizeof key, c, suffix);
    if (lg_gguf_int(s->gguf, key, out)) return LG_OK;
    if (lg_gguf_has(s->gguf, key)) return bad(s, err, key, "is no integer");
    if (absent < 0) return bad(s, err, key, "is missing");
    *out = absent;
    return LG_OK;
}
static lg_status gguf_num(const lg_source *s, const lg_config *c, const char *suffix, double *out, double absent, lg_error *err) {
    char key[96];
    arch_key(key, sizeof key, c, suffix);
    if (lg_gguf_float(s->gguf, key, out)) return isfinite(*out) ? LG_OK : bad(s, err, key, "is not finite");
    if (lg_gguf_has(s->gguf, key)) return bad(s, err, key, "is no number");
    *out = absent;
    return LG_OK;
}
/* A count that some files give per layer: all entries must agree. */
static lg_status gguf_heads(const lg_source *s, const lg_config *c, const char *suffix, int64_t *out, int64_t absent, lg_error *err) {
    char key[96];
    int32_t type;
    int64_t n, v;
    arch_key(key, sizeof key, c, suffix);
    if (!lg_gguf_array(s->gguf, key, &type, &n)) return gguf_int(s, c, suffix, out, absent, err);
    if (n < 1 || !lg_gguf_array_int(s->gguf, key, 0, out)) return bad(s, err, key, "is no list of integers");
    for (int64_t i = 1; i < n; i++)
        if (!lg_gguf_array_int(s->gguf, key, i, &v) || v != *out) return bad(s, err, key, "differs between layers");
    return LG_OK;
}

static lg_status read_gguf(lg_config *c, const lg_source *s, lg_error *err) {
    lg_status st;
    const char *str;
    int64_t n;
    char key[96];
    if (!lg_gguf_str(s->gguf, "general.architecture", &str, &n)) return bad(s, err, "general.architecture", "is missing");
    if (!is_arch(str)) return unsupported(s, err, "general.architecture", str);
    snprintf(c->arch, sizeof c->arch, "%s", str);
    if (lg_gguf_str(s->gguf, "general.name", &str, &n)) snprintf(c->name, sizeof c->name, "%s", str);
    LG_TRY(gguf_int(s, c, "block_count", &c->n_layer, -1, err));
    LG_TRY(gguf_int(s, c, "embedding_length", &c->n_embd, -1, err));
    LG_TRY(gguf_heads(s, c, "feed_forward_length", &c->n_ff, -1, err));
    LG_TRY(gguf_heads(s, c, "attention.head_count", &c->n_head, -1, err));
    LG_TRY(gguf_heads(s, c, "attention.head_count_kv", &c->n_head_kv, c->n_head, err));
    LG_TRY(gguf_int(s, c, "attention.key_length", &c->head_dim, c->n_head > 0 ? c->n_embd / c->n_head : 0, err));
    LG_TRY(gguf_int(s, c, "attention.value_length", &n, c->head_dim, err));
    if (n != c->head_dim) return bad(s, err, arch_key(key, sizeof key, c, "attention.value_length"), "differs from key_length");
    LG_TRY(gguf_int(s, c, "rope.dimension_count", &n, c->head_dim, err));
    if (n != c->head_dim) return bad(s, err, arch_key(key, sizeof key, c, "rope.dimension_count"), "differs from the head size");
    LG_TRY(gguf_int(s, c, "context_length", &c->n_ctx_train, -1, err));
    double eps;
    LG_TRY(gguf_num(s, c, "attention.layer_norm_rms_epsilon", &eps, -1, err));
    if (eps < 0) return bad(s, err, arch_key(key, sizeof key, c, "attention.layer_norm_rms_epsilon"), "is missing");
    c->norm_eps = (float)eps;
    LG_TRY(gguf_num(s, c, "rope.freq_base", &c->rope_theta, 10000, err));
    if (lg_gguf_str(s->gguf, arch_key(key, sizeof key, c, "rope.scaling.type"), &str, &n)) {
        if (!strcmp(str, "none")) c->rope_kind = LG_ROPE_NONE;
        else if (!strcmp(str, "linear")) c->rope_kind = LG_ROPE_LINEAR;
        else if (!strcmp(str, "yarn")) c->rope_kind = LG_ROPE_YARN;
        else return unsupported(s, err, key, str);
    }
    LG_TRY(gguf_num(s, c, "rope.scaling.factor", &c->rope_factor, 1, err));
    LG_TRY(gguf_int(s, c, "rope.scaling.original_context_length", &c->rope_orig_ctx, c->n_ctx_train, err));
    double attn;
    LG_TRY(gguf_num(s, c, "rope.scaling.attn_factor", &attn, 1, err));
    LG_TRY(gguf_num(s, c, "rope.scaling.yarn_beta_fast", &c->rope_beta_fast, 32, err));
    LG_TRY(gguf_num(s, c, "rope.scaling.yarn_beta_slow", &c->rope_beta_slow, 1, err));
    c->rope_attn_factor = c->rope_kind == LG_ROPE_YARN ? attn * (1 + 0.1 * log(fmax(c->rope_factor, 1))) : 1;
    if (lg_gguf_find(s->gguf, "rope_freqs.weight")) {
        if (c->rope_kind == LG_ROPE_YARN || c->rope_kind == LG_ROPE_LINEAR)
            return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: rope_freqs.weight together with rope scaling", s->path);
        c->rope_kind = LG_ROPE_LLAMA3;
    }
    c->rope_interleaved = !strcmp(c->arch, "llama");
    c->tied = !lg_gguf_find(s->gguf, "output.weight");
done:
    return st;
}

/* ---- config.json ---- */
static lg_status json_int(const lg_source *s, const lg_json *o, const char *key, int64_t *out, int64_t absent, lg_error *err) {
    const lg_json *v = lg_json_get(o, key);
    if (lg_json_typeof(v) == LG_JSON_NULL) {
        if (absent < 0) return bad(s, err, key, "is missing");
        *out = absent;
        return LG_OK;
    }
    return lg_json_int(v, out) ? LG_OK : bad(s, err, key, "is no integer");
}
static lg_status json_num(const lg_source *s, const lg_json *o, const char *key, double *out, double absent, lg_error *err) {
    const lg_json *v = lg_json_get(o, key);
    if (lg_json_typeof(v) == LG_JSON_NULL) {
        *out = absent;
        return LG_OK;
    }
    return lg_json_num(v, out) && isfinite(*out) ? LG_OK : bad(s, err, key, "is no finite number");
}
static lg_status json_flag(const lg_source *s, const lg_json *o, const char *key, bool *out, bool absent, lg_error *err) {
    const lg_json *v = lg_json_get(o, key);
    *out = absent;
    if (lg_json_typeof(v) == LG_JSON_NULL) return LG_OK;
    return lg_json_bool(v, out) ? LG_OK : bad(s, err, key, "is no boolean");
}

static lg_status read_json_rope(lg_config *c, const lg_source *s, lg_error *err) {
    lg_status st;
    const lg_json *root = s->json, *r = lg_json_get(root, "rope_parameters"), *old = lg_json_get(root, "rope_scaling");
    double top;
    if (lg_json_typeof(r) != LG_JSON_OBJECT) r = old; /* transformers 4 */
    LG_TRY(json_num(s, root, "rope_theta", &top, 10000, err));
    LG_TRY(json_num(s, r, "rope_theta", &c->rope_theta, top, err));
    LG_TRY(json_num(s, root, "partial_rotary_factor", &top, 1, err));
    LG_TRY(json_num(s, r, "partial_rotary_factor", &top, top, err));
    if (top != 1) return unsupported(s, err, "partial_rotary_factor", "other than 1");
    if (lg_json_typeof(r) == LG_JSON_NULL) return LG_OK;
    if (lg_json_typeof(r) != LG_JSON_OBJECT) return bad(s, err, "rope_scaling", "is no object");
    const char *type = lg_json_str(lg_json_get(r, "rope_type"), NULL);
    if (!type) type = lg_json_str(lg_json_get(r, "type"), NULL);
    if (!type || !strcmp(type, "default")) return LG_OK;
    if (!strcmp(type, "linear")) c->rope_kind = LG_ROPE_LINEAR;
    else if (!strcmp(type, "llama3")) c->rope_kind = LG_ROPE_LLAMA3;
    else if (!strcmp(type, "yarn")) c->rope_kind = LG_ROPE_YARN;
    else return unsupported(s, err, "rope_type", type);
    LG_TRY(json_num(s, r, "factor", &c->rope_factor, -1, err));
    if (c->rope_factor < 1) return bad(s, err, "factor", "is missing or below 1");
    LG_TRY(json_int(s, r, "original_max_position_embeddings", &c->rope_orig_ctx, c->n_ctx_train, err));
    LG_TRY(json_num(s, r, "low_freq_factor", &c->rope_low, 1, err));
    LG_TRY(json_num(s, r, "high_freq_factor", &c->rope_high, 4, err));
    LG_TRY(json_num(s, r, "beta_fast", &c->rope_beta_fast, 32, err));
    LG_TRY(json_num(s, r, "beta_slow", &c->rope_beta_slow, 1, err));
    if (c->rope_kind == LG_ROPE_YARN) {
        double m, all, log_f = 0.1 * log(c->rope_factor);
        bool truncate;
        LG_TRY(json_num(s, r, "mscale", &m, 0, err));
        LG_TRY(json_num(s, r, "mscale_all_dim", &all, 0, err));
        LG_TRY(json_num(s, r, "attention_factor", &c->rope_attn_factor,
                        m != 0 && all != 0 ? (1 + m * log_f) / (1 + all * log_f) : 1 + log_f, err));
        LG_TRY(json_flag(s, r, "truncate", &truncate, true, err));
        if (!truncate) return unsupported(s, err, "truncate", "false");
    }
    if (c->rope_kind == LG_ROPE_LLAMA3 && !(c->rope_high > c->rope_low && c->rope_low > 0))
        return bad(s, err, "high_freq_factor", "must be above low_freq_factor");
done:
    return st;
}

static lg_status read_json(lg_config *c, const lg_source *s, lg_error *err) {
    lg_status st;
    const lg_json *root = s->json;
    const char *type = lg_json_str(lg_json_get(root, "model_type"), NULL), *str;
    double eps;
    bool flag;
    if (!type) return bad(s, err, "model_type", "is missing");
    if (!is_arch(type)) return unsupported(s, err, "model_type", type);
    snprintf(c->arch, sizeof c->arch, "%s", type);
    str = lg_json_str(lg_json_get(root, "_name_or_path"), NULL);
    snprintf(c->name, sizeof c->name, "%s", str && *str ? str : type);
    LG_TRY(json_int(s, root, "num_hidden_layers", &c->n_layer, -1, err));
    LG_TRY(json_int(s, root, "hidden_size", &c->n_embd, -1, err));
    LG_TRY(json_int(s, root, "intermediate_size", &c->n_ff, -1, err));
    LG_TRY(json_int(s, root, "num_attention_heads", &c->n_head, -1, err));
    LG_TRY(json_int(s, root, "num_key_value_heads", &c->n_head_kv, c->n_head, err));
    LG_TRY(json_int(s, root, "head_dim", &c->head_dim, c->n_head > 0 ? c->n_embd / c->n_head : 0, err));
    LG_TRY(json_int(s, root, "max_position_embeddings", &c->n_ctx_train, -1, err));
    LG_TRY(json_num(s, root, "rms_norm_eps", &eps, 1e-6, err));
    c->norm_eps = (float)eps;
    str = lg_json_str(lg_json_get(root, "hidden_act"), NULL);
    if (str && strcmp(str, "silu")) return unsupported(s, err, "hidden_act", str);
    LG_TRY(json_flag(s, root, "attention_bias", &flag, false, err));
    if (flag) return unsupported(s, err, "attention_bias", "true");
    LG_TRY(json_flag(s, root, "mlp_bias", &flag, false, err));
    if (flag) return unsupported(s, err, "mlp_bias", "true");
    LG_TRY(json_flag(s, root, "use_sliding_window", &flag, false, err));
    if (flag) return unsupported(s, err, "use_sliding_window", "true");
    LG_TRY(json_flag(s, root, "tie_word_embeddings", &c->tied, false, err));
    LG_TRY(read_json_rope(c, s, err));
done:
    return st;
}

lg_status lg_config_read(lg_config *c, const lg_source *s, lg_error *err) {
    lg_status st;
    memset(c, 0, sizeof *c);
    c->rope_factor = c->rope_attn_factor = c->rope_low = c->rope_beta_slow = 1;
    c->rope_high = 4;
    c->rope_beta_fast = 32;
    LG_TRY(s->gguf ? read_gguf(c, s, err) : read_json(c, s, err));
    const struct { const char *what; int64_t v, max; } limits[] = {
        { "layers", c->n_layer, 1024 },      { "heads", c->n_head, 1024 },         { "KV heads", c->n_head_kv, c->n_head },
        { "head size", c->head_dim, 256 },   { "embedding size", c->n_embd, 1 << 18 }, { "feed-forward size", c->n_ff, 1 << 20 },
        { "context length", c->n_ctx_train, INT64_C(1) << 31 },
    };
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (limits[i].v < 1 || limits[i].v > limits[i].max)
            return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: %lld %s (legal: 1 to %lld)", s->path, (long long)limits[i].v,
                                limits[i].what, (long long)limits[i].max);
    if (c->n_head % c->n_head_kv || c->head_dim % 2)
        return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: %lld heads, %lld KV heads of size %lld do not fit together", s->path,
                            (long long)c->n_head, (long long)c->n_head_kv, (long long)c->head_dim);
    if (!(c->rope_theta > 1) || !(c->norm_eps >= 0 && c->norm_eps < 1) || !(c->rope_factor >= 1) || c->rope_orig_ctx < 0 ||
        !(c->rope_attn_factor > 0) || !(c->rope_beta_fast > 0 && c->rope_beta_slow > 0))
        return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: rotary base, scaling or norm epsilon out of range", s->path);
    c->qkv_bias = !strcmp(c->arch, "qwen2");
    c->qk_norm = !strcmp(c->arch, "qwen3");
    const lg_tensor_ref *out = c->tied ? NULL : lg_source_find(s, "output.weight");
    if (!out) {
        out = lg_source_find(s, "token_embd.weight");
        c->tied = true;
    }
    if (!out || out->n_dim != 2 || out->shape[0] < 1 || out->shape[0] > (1 << 24))
        return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: no output matrix (output.weight, token_embd.weight)", s->path);
    c->n_vocab = out->shape[0];
    if (s->json) { /* the tokenizer's table gets that many entries: it must not be longer than the file can justify */
        int64_t rows;
        LG_TRY(json_int(s, s->json, "vocab_size", &rows, c->n_vocab, err));
        if (rows != c->n_vocab) {
            char what[96];
            snprintf(what, sizeof what, "is %lld, but the output matrix has %lld rows", (long long)rows, (long long)c->n_vocab);
            return bad(s, err, "vocab_size", what);
        }
    }
done:
    return st;
}

/* ---- rotary frequencies ---- */
static double yarn_dim(const lg_config *c, double rotations) {
    return (double)c->head_dim * log((double)c->rope_orig_ctx / (rotations * 2 * 3.14159265358979323846)) / (2 * log(c->rope_theta));
}

lg_status lg_config_rope(const lg_config *c, const lg_source *s, float *inv_freq, float *factor, lg_error *err) {
    const int64_t half = c->head_dim / 2;
    for (int64_t i = 0; i < half; i++)
        inv_freq[i] = (float)(1.0 / (double)powf((float)c->rope_theta, (float)(2 * i) / (float)c->head_dim));
    *factor = (float)c->rope_attn_factor;
    if (c->rope_kind == LG_ROPE_LINEAR)
        for (int64_t i = 0; i < half; i++) inv_freq[i] = (float)((double)inv_freq[i] / c->rope_factor);
    if (c->rope_kind == LG_ROPE_YARN) {
        if (c->rope_orig_ctx < 1) return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: yarn without an original context length", s->path);
        const double low = fmax(floor(yarn_dim(c, c->rope_beta_fast)), 0);
        double high = fmin(ceil(yarn_dim(c, c->rope_beta_slow)), (double)c->head_dim - 1);
        if (high == low) high += 0.001;
        for (int64_t i = 0; i < half; i++) {
            const double ramp = fmin(fmax(((double)i - low) / (high - low), 0), 1), f = inv_freq[i];
            inv_freq[i] = (float)(f / c->rope_factor * ramp + f * (1 - ramp));
        }
    }
    if (c->rope_kind != LG_ROPE_LLAMA3) return LG_OK;
    if (s->gguf) { /* the file carries the divisors */
        const lg_tensor_ref *t = lg_gguf_find(s->gguf, "rope_freqs.weight");
        if (!t || t->n_elem < half || t->dtype != LG_DTYPE_F32)
            return lg_base_fail(err, LG_ERR_FORMAT, t ? t->offset : -1, "%s: tensor rope_freqs.weight is no f32 [%lld]", s->path, (long long)half);
        for (int64_t i = 0; i < half; i++) {
            float d;
            memcpy(&d, (const uint8_t *)t->data + i * 4, 4);
            if (!(d > 0) || !isfinite(d))
                return lg_base_fail(err, LG_ERR_FORMAT, t->offset + i * 4, "%s: tensor rope_freqs.weight[%lld] is not positive", s->path, (long long)i);
            inv_freq[i] /= d;
        }
        return LG_OK;
    }
    const double low_wave = (double)c->rope_orig_ctx / c->rope_low, high_wave = (double)c->rope_orig_ctx / c->rope_high;
    for (int64_t i = 0; i < half; i++) {
        const double f = inv_freq[i], wave = 2 * 3.14159265358979323846 / f;
        if (wave < high_wave) continue;
        const double smooth = wave > low_wave ? 0 : ((double)c->rope_orig_ctx / wave - c->rope_low) / (c->rope_high - c->rope_low);
        inv_freq[i] = (float)((1 - smooth) * f / c->rope_factor + smooth * f);
    }
    return LG_OK;
}
