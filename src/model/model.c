/* Opening a model: configuration, tokenizer, weights bound to a back end. */
#include "model/model.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct opening {
    lg_model *m;
    const char *shape; /* random weights of this dtype instead of a file's */
    lg_dtype type;
    lg_error *err;
    int64_t bytes_by_type[LG_DTYPE_COUNT];
    lg_progress_fn progress;
    void *user;
    int64_t done, total;
} opening;

static const lg_tensor_ref *want(opening *o, const char *name) {
    const lg_tensor_ref *t = lg_source_find(&o->m->src, name);
    if (!t) lg_base_fail(o->err, LG_ERR_FORMAT, -1, "%s: tensor %s is missing", o->m->src.path, name);
    return t;
}

static lg_status random_matrix(opening *o, lg_weight *w, int64_t n_out, int64_t n_in, bool lookup) {
    lg_status st = LG_OK;
    lg_model *m = o->m;
    /* Rows that are no whole number of blocks take a type of 32. */
    const lg_dtype type = lg_base_row_bytes(o->type, n_in) > 0 ? o->type : LG_DTYPE_Q8_0;
    const int64_t bytes = n_out * lg_base_row_bytes(type, n_in);
    *w = (lg_weight){ .dtype = type, .n_out = n_out, .n_in = n_in, .lookup = lookup };
    if (m->ops->host_memory) LG_TRY(lg_model_shape_data(m, w, o->err));
    m->info.n_params += n_out * n_in;
    o->bytes_by_type[type] += bytes;
    if (!lookup) m->info.weight_bytes_per_token += bytes;
    LG_TRY(m->ops->weight_bind(m->ctx, w, o->err));
    o->done += bytes;
    if (o->progress && !o->progress(o->user, "random weights", o->done < o->total ? o->done : o->total, o->total))
        st = lg_base_fail(o->err, LG_ERR_CANCELLED, -1, "loading cancelled");
done:
    return st;
}

static lg_status bind_matrix(opening *o, lg_weight *w, const char *name, int64_t n_out, int64_t n_in, bool lookup) {
    lg_model *m = o->m;
    if (o->shape) return random_matrix(o, w, n_out, n_in, lookup);
    const lg_tensor_ref *t = want(o, name);
    if (!t) return LG_ERR_FORMAT;
    if (t->n_dim != 2 || t->shape[0] != n_out || t->shape[1] != n_in)
        return lg_base_fail(o->err, LG_ERR_FORMAT, t->offset, "%s: tensor %s is %lld x %lld, expected %lld x %lld", m->src.path, t->name,
                            (long long)t->shape[0], (long long)(t->n_dim > 1 ? t->shape[1] : 1), (long long)n_out, (long long)n_in);
    if (t->dtype > LG_DTYPE_Q6_K)
        return lg_base_fail(o->err, LG_ERR_UNSUPPORTED, t->offset, "%s: tensor %s has dtype %s, no weight dtype", m->src.path, t->name,
                            lg_base_dtype(t->dtype)->name);
    w->dtype = t->dtype;
    w->n_out = n_out;
    w->n_in = n_in;
    w->data = t->data;
    w->lookup = lookup;
    m->info.n_params += t->n_elem;
    o->bytes_by_type[t->dtype] += t->bytes;
    if (!lookup) m->info.weight_bytes_per_token += t->bytes;
    const lg_status st = m->ops->weight_bind(m->ctx, w, o->err);
    if (st == LG_OK && w->packed) lg_file_forget(t->data, t->bytes);
    o->done += t->bytes;
    if (st == LG_OK && o->progress && !o->progress(o->user, "load", o->done < o->total ? o->done : o->total, o->total))
        return lg_base_fail(o->err, LG_ERR_CANCELLED, -1, "loading cancelled");
    return st;
}

static lg_status bind_vector(opening *o, float **out, const char *name, int64_t n) {
    lg_model *m = o->m;
    const lg_tensor_ref *t = o->shape ? NULL : want(o, name);
    if (!t && !o->shape) return LG_ERR_FORMAT;
    if (t && t->n_elem != n)
        return lg_base_fail(o->err, LG_ERR_FORMAT, t->offset, "%s: tensor %s has %lld elements, expected %lld", m->src.path, t->name,
                            (long long)t->n_elem, (long long)n);
    float *host = lg_base_calloc(n, sizeof(float));
    *out = m->ops->alloc(m->ctx, n * (int64_t)sizeof(float), false, o->err);
    if (!host || !*out) {
        lg_base_free(host);
        return lg_base_fail(o->err, LG_ERR_NOMEM, -1, "out of memory");
    }
    if (t) lg_base_dequant(t->dtype, t->data, host, n);
    for (int64_t i = 0; !t && i < n; i++) host[i] = strstr(name, "norm") ? 1.0f : 0.01f; /* a bias */
    m->ops->upload(m->ctx, *out, host, n * (int64_t)sizeof(float));
    lg_base_free(host);
    m->info.n_params += n;
    m->info.weight_bytes_per_token += t ? t->bytes : n * (int64_t)sizeof(float);
    return LG_OK;
}

static lg_status bind_layer(opening *o, int64_t l) {
    lg_status st;
    const lg_config *c = &o->m->cfg;
    lg_layer *y = &o->m->layer[l];
    const int64_t d = c->n_embd, nq = c->n_head * c->head_dim, nkv = c->n_head_kv * c->head_dim;
    char name[64];
#define NAME(s) (snprintf(name, sizeof name, "blk.%lld.%s", (long long)l, s), name)
    LG_TRY(bind_vector(o, &y->attn_norm, NAME("attn_norm.weight"), d));
    LG_TRY(bind_matrix(o, &y->wq, NAME("attn_q.weight"), nq, d, false));
    LG_TRY(bind_matrix(o, &y->wk, NAME("attn_k.weight"), nkv, d, false));
    LG_TRY(bind_matrix(o, &y->wv, NAME("attn_v.weight"), nkv, d, false));
    if (c->qkv_bias || (!o->shape && lg_source_find(&o->m->src, NAME("attn_q.bias")))) {
        LG_TRY(bind_vector(o, &y->bq, NAME("attn_q.bias"), nq));
        LG_TRY(bind_vector(o, &y->bk, NAME("attn_k.bias"), nkv));
        LG_TRY(bind_vector(o, &y->bv, NAME("attn_v.bias"), nkv));
    }
    if (c->qk_norm) {
        LG_TRY(bind_vector(o, &y->q_norm, NAME("attn_q_norm.weight"), c->head_dim));
        LG_TRY(bind_vector(o, &y->k_norm, NAME("attn_k_norm.weight"), c->head_dim));
    }
    LG_TRY(bind_matrix(o, &y->wo, NAME("attn_output.weight"), d, nq, false));
    LG_TRY(bind_vector(o, &y->ffn_norm, NAME("ffn_norm.weight"), d));
    LG_TRY(bind_matrix(o, &y->gate, NAME("ffn_gate.weight"), c->n_ff, d, false));
    LG_TRY(bind_matrix(o, &y->up, NAME("ffn_up.weight"), c->n_ff, d, false));
    LG_TRY(bind_matrix(o, &y->down, NAME("ffn_down.weight"), d, c->n_ff, false));
#undef NAME
done:
    return st;
}

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static lg_status bind_all(opening *o) {
    lg_status st;
    lg_model *m = o->m;
    const lg_config *c = &m->cfg;
    m->layer = lg_base_calloc(c->n_layer, sizeof *m->layer);
    m->inv_freq = lg_base_calloc(c->head_dim / 2, sizeof(float));
    if (!m->layer || !m->inv_freq) return lg_base_fail(o->err, LG_ERR_NOMEM, -1, "out of memory");
    if (o->shape) {
        for (int64_t i = 0; i < c->head_dim / 2; i++) m->inv_freq[i] = (float)pow(c->rope_theta, -2.0 * (double)i / (double)c->head_dim);
        m->rope_factor = 1.0f;
    } else {
        LG_TRY(lg_config_rope(c, &m->src, m->inv_freq, &m->rope_factor, o->err));
    }
    if (c->tied) {
        LG_TRY(bind_matrix(o, &m->output, "token_embd.weight", c->n_vocab, c->n_embd, false));
    } else {
        LG_TRY(bind_matrix(o, &m->embed, "token_embd.weight", c->n_vocab, c->n_embd, true));
        LG_TRY(bind_matrix(o, &m->output, "output.weight", c->n_vocab, c->n_embd, false));
    }
    LG_TRY(bind_vector(o, &m->output_norm, "output_norm.weight", c->n_embd));
    for (int64_t l = 0; l < c->n_layer; l++) LG_TRY(bind_layer(o, l));
    m->max_in = max64(max64(c->n_embd, c->n_ff), c->n_head * c->head_dim);
    m->max_out = m->max_in;
done:
    return st;
}

/* The tokenizer sees metadata, not the file: its messages get the name here. */
static lg_status tokenizer_of(lg_model *m, lg_error *err) {
    lg_error own = { 0 };
    if (!m->src.gguf) return lg_text_from_folder(&m->tok, m->src.folder, err);
    const lg_status st = lg_text_from_gguf(&m->tok, m->src.gguf, &own);
    return st == LG_OK ? LG_OK : lg_base_fail(err, st, own.offset, "%s: %s", m->src.path, own.message);
}

lg_status lg_model_open(lg_model **out, const lg_model_params *p, lg_error *err) {
    lg_status st;
    *out = NULL;
    lg_model *m = lg_base_alloc(sizeof *m);
    if (!m) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    opening o = { .m = m, .err = err, .progress = p->progress, .user = p->progress_user };
    m->compute = p->compute;
    const lg_config *c = &m->cfg;
    if (p->shape) {
        o.shape = p->shape;
        o.type = p->shape_weights;
        if (p->vocab_only || (unsigned)o.type > LG_DTYPE_Q6_K) LG_TRY(lg_base_fail(err, LG_ERR_USAGE, -1, "a shape needs a weight type, and has no vocabulary"));
        LG_TRY(lg_model_shape_config(&m->cfg, p->shape, err));
    } else {
        LG_TRY(lg_source_open(&m->src, p->path, err));
        LG_TRY(lg_config_read(&m->cfg, &m->src, err));
        LG_TRY(tokenizer_of(m, err));
        if (p->chat_format) LG_TRY(lg_text_set_chat_format(m->tok, p->chat_format, err));
    }
    if (!o.shape && lg_text_n_vocab(m->tok) > c->n_vocab)
        LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: the tokenizer has %lld ids, the output matrix %lld rows", p->path,
                            (long long)lg_text_n_vocab(m->tok), (long long)c->n_vocab));
    lg_model_info *i = &m->info;
    memcpy(i->arch, c->arch, sizeof i->arch);
    memcpy(i->name, c->name, sizeof i->name);
    i->n_layer = c->n_layer;
    i->n_head = c->n_head;
    i->n_head_kv = c->n_head_kv;
    i->head_dim = c->head_dim;
    i->n_embd = c->n_embd;
    i->n_ff = c->n_ff;
    i->n_ctx_train = c->n_ctx_train;
    i->n_vocab = c->n_vocab;
    i->rope_scaled = c->rope_kind != LG_ROPE_NONE;
    if (o.shape) {
        memset(i->family, '0', 32);
        memset(i->fingerprint, '0', 32);
        const int64_t per = c->n_embd * (c->n_head + c->n_head_kv) * c->head_dim * 2 + 3 * c->n_embd * c->n_ff;
        o.total = (per * c->n_layer + (c->tied ? 1 : 2) * c->n_vocab * c->n_embd) / lg_base_dtype(o.type)->block * lg_base_dtype(o.type)->bytes;
    } else {
        i->file_bytes = o.total = lg_source_file_bytes(&m->src);
        snprintf(i->chat_format, sizeof i->chat_format, "%s", lg_text_chat_format(m->tok));
        LG_TRY(lg_source_family(&m->src, c, i->family, i->fingerprint, err));
    }
    if (p->vocab_only) {
        for (int64_t t = 0; t < lg_source_n_tensor(&m->src); t++) {
            const lg_tensor_ref *r = lg_source_tensor(&m->src, t);
            if (strcmp(r->name, "rope_freqs.weight") && !(c->tied && !strcmp(r->name, "lm_head.weight"))) i->n_params += r->n_elem;
            if (r->dtype < LG_DTYPE_COUNT) o.bytes_by_type[r->dtype] += r->bytes;
        }
    } else {
        m->ops = lg_ops_find(p->device, err);
        if (!m->ops) LG_TRY(p->device && !strncmp(p->device, "cuda", 4) ? LG_ERR_DEVICE : LG_ERR_USAGE);
        const lg_ops_config oc = { .device = p->device, .n_threads = p->n_threads, .compute = p->compute };
        LG_TRY(m->ops->open(&m->ctx, &oc, err));
        LG_TRY(bind_all(&o));
        LG_TRY(lg_model_adapters_open(m, p, err));
        m->ops->describe(m->ctx, i->device, sizeof i->device);
    }
    int best = 0;
    for (int t = 0; t < LG_DTYPE_COUNT; t++)
        if (o.bytes_by_type[t] > o.bytes_by_type[best]) best = t;
    snprintf(i->weights_dtype, sizeof i->weights_dtype, "%s", lg_base_dtype((lg_dtype)best)->name);
    *out = m;
done:
    if (st != LG_OK) lg_model_free(m);
    return st;
}

void lg_model_free(lg_model *m) {
    if (!m) return;
    lg_model_adapters_free(m);
    if (m->ctx) {
        for (int64_t l = 0; m->layer && l < m->cfg.n_layer; l++) {
            lg_layer *y = &m->layer[l];
            lg_weight *w[] = { &y->wq, &y->wk, &y->wv, &y->wo, &y->gate, &y->up, &y->down };
            float *v[] = { y->attn_norm, y->ffn_norm, y->bq, y->bk, y->bv, y->q_norm, y->k_norm };
            for (int i = 0; i < 7; i++) m->ops->weight_unbind(m->ctx, w[i]);
            for (int i = 0; i < 7; i++)
                if (v[i]) m->ops->free(m->ctx, v[i]);
        }
        m->ops->weight_unbind(m->ctx, &m->embed);
        m->ops->weight_unbind(m->ctx, &m->output);
        if (m->output_norm) m->ops->free(m->ctx, m->output_norm);
        m->ops->close(m->ctx);
    }
    for (int64_t i = 0; i < m->n_owned; i++) lg_base_free(m->owned[i]);
    lg_base_free(m->owned);
    lg_base_free(m->layer);
    lg_base_free(m->inv_freq);
    lg_text_close(m->tok);
    lg_source_close(&m->src);
    lg_base_free(m);
}

void lg_model_get_info(const lg_model *m, lg_model_info *out) { *out = m->info; }

lg_status lg_devices_describe(lg_text *out, lg_error *err) {
    char line[192];
    lg_error own = { .code = LG_OK };
    for (int i = 0; lg_ops_device_line(i, line, sizeof line, &own); i++)
        if (!lg_base_text_printf(out, "%s\n", line)) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    if (own.code != LG_OK && err) *err = own;
    return own.code;
}

lg_status lg_model_copy_rate(lg_model *m, double *bytes_per_s, lg_error *err) {
    lg_status st = LG_OK;
    const lg_ops *o = m->ops;
    uint8_t *a = NULL, *b = NULL;
    int64_t bytes = o && o->host_memory ? (int64_t)256 << 20 : (int64_t)2 << 30;
    if (!o) return lg_base_fail(err, LG_ERR_USAGE, -1, "the model was opened for its vocabulary only");
    while (bytes > 1 << 20) { /* little may be free beside the model */
        lg_error none;
        if (a) o->free(m->ctx, a);
        a = o->alloc(m->ctx, bytes, true, &none);
        b = a ? o->alloc(m->ctx, bytes, true, &none) : NULL;
        if (b) break;
        bytes /= 2;
    }
    if (!a || !b) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory for a copy of 2 MB"));
    double best = 0;
    for (int i = 0; i < 12; i++) {
        const double t = lg_base_now();
        o->copy(m->ctx, b, a, bytes);
        const double rate = 2.0 * (double)bytes / (lg_base_now() - t);
        if (rate > best) best = rate;
    }
    *bytes_per_s = best;
    st = o->sync(m->ctx, err);
done:
    if (a) o->free(m->ctx, a);
    if (b) o->free(m->ctx, b);
    return st;
}

/* ---- text, for a model's own tokenizer ---- */
lg_status lg_tokenize(const lg_model *m, const char *text, int64_t n, unsigned flags, lg_ids *out, lg_error *err) {
    lg_status st;
    if (!(flags & LG_TOK_CHAT)) return lg_text_encode(m->tok, text, n, flags, out, err);
    char *s = lg_base_alloc(n + 1); /* turns are NUL-terminated */
    if (!s) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    memcpy(s, text, (size_t)n);
    const lg_chat_turn turn = { "user", s };
    if (memchr(s, 0, (size_t)n)) LG_TRY(lg_base_fail(err, LG_ERR_USAGE, -1, "a chat turn cannot hold a zero byte"));
    LG_TRY(lg_text_chat(m->tok, &turn, 1, true, out, err));
done:
    lg_base_free(s);
    return st;
}
lg_status lg_detokenize(const lg_model *m, const int32_t *ids, int64_t n, unsigned flags, lg_text *out, lg_error *err) {
    return lg_text_decode(m->tok, ids, n, flags, out, err);
}
lg_status lg_chat_tokenize(const lg_model *m, const lg_chat_turn *turns, int64_t n_turns, bool gen, lg_ids *out, lg_error *err) {
    return lg_text_chat(m->tok, turns, n_turns, gen, out, err);
}
