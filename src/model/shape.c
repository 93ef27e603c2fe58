/* Models of a named shape without a file: for timing only (bench --shape). Weights are random, of standard deviation 0.02. */
#include "model/model.h"
#include <string.h>

typedef struct shape {
    const char *name, *arch;
    int64_t n_layer, n_head, n_head_kv, head_dim, n_embd, n_ff, n_ctx, n_vocab;
    double theta, eps;
    bool tied, bias;
} shape;
static const shape shapes[] = {
    { "llama3-8b", "llama", 32, 32, 8, 128, 4096, 14336, 131072, 128256, 500000, 1e-5, false, false },
    { "qwen2.5-7b", "qwen2", 28, 28, 4, 128, 3584, 18944, 131072, 152064, 1000000, 1e-6, false, true },
    { "smollm2", "llama", 30, 9, 3, 64, 576, 1536, 8192, 49152, 100000, 1e-5, true, false },
    { "tiny", "llama", 4, 4, 2, 64, 256, 512, 4096, 1024, 10000, 1e-5, false, false },
};

lg_status lg_model_shape_config(lg_config *c, const char *name, lg_error *err) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const shape *s = &shapes[i];
        if (strcmp(s->name, name)) continue;
        *c = (lg_config){ .n_layer = s->n_layer, .n_head = s->n_head, .n_head_kv = s->n_head_kv, .head_dim = s->head_dim, .n_embd = s->n_embd,
                          .n_ff = s->n_ff, .n_ctx_train = s->n_ctx, .n_vocab = s->n_vocab, .norm_eps = (float)s->eps, .rope_theta = s->theta,
                          .tied = s->tied, .qkv_bias = s->bias };
        memcpy(c->arch, s->arch, strlen(s->arch) + 1);
        memcpy(c->name, s->name, strlen(s->name) + 1);
        return LG_OK;
    }
    return lg_base_fail(err, LG_ERR_USAGE, -1, "unknown shape \"%s\" (llama3-8b, qwen2.5-7b, smollm2, tiny)", name);
}

/* Few rows are drawn and repeated: what stands in a row does not change the time. */
lg_status lg_model_shape_data(lg_model *m, lg_weight *w, lg_error *err) {
    enum { DRAWN = 64 };
    const int64_t row = lg_base_row_bytes(w->dtype, w->n_in), drawn = w->n_out < DRAWN ? w->n_out : DRAWN;
    if (w->dtype == LG_DTYPE_Q5_0 || w->dtype == LG_DTYPE_Q5_1 || w->dtype >= LG_DTYPE_Q4_K)
        return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "a shape with weights of type %s is made on a GPU only", lg_base_dtype(w->dtype)->name);
    void **more = lg_base_realloc(m->owned, m->n_owned * (int64_t)sizeof *more, (m->n_owned + 1) * (int64_t)sizeof *more);
    if (!more) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    m->owned = more;
    uint8_t *data = lg_base_calloc(w->n_out, row);
    float *x = lg_base_calloc(w->n_in, sizeof *x);
    if (data) m->owned[m->n_owned++] = data;
    if (!data || !x) {
        lg_base_free(x);
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory: %lld bytes of random weights", (long long)(w->n_out * row));
    }
    for (int64_t r = 0; r < drawn; r++) {
        for (int64_t i = 0; i < w->n_in; i++)
            x[i] = (float)(0.0692820323 * (lg_base_rng_unit((uint64_t)m->n_owned, (uint64_t)r, (uint64_t)i) - 0.5)); /* 0.02 * sqrt(12) */
        lg_base_quant(w->dtype, x, data + r * row, w->n_in);
    }
    for (int64_t r = drawn; r < w->n_out; r++) memcpy(data + r * row, data + r % drawn * row, (size_t)row);
    lg_base_free(x);
    w->data = data;
    return LG_OK;
}

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

static float uniform(uint64_t stream, int64_t i) { return (float)(0.0692820323 * (lg_base_rng_unit(1, stream, (uint64_t)i) - 0.5)); }

/* As a checkpoint's memory weights are bound: data that a back end on the host reads in place is freed with the adapters. */
static lg_status bind_random(lg_model *m, lg_weight *w, lg_dtype type, int64_t n_out, int64_t n_in, bool lookup, lg_error *err) {
    lg_status st = LG_OK;
    *w = (lg_weight){ .dtype = type, .n_out = n_out, .n_in = n_in, .lookup = lookup };
    if (m->ops->host_memory) {
        LG_TRY(lg_model_shape_data(m, w, err));
        m->n_owned--;
    }
    LG_TRY(m->ops->weight_bind(m->ctx, w, err));
    if (w->packed && w->data) {
        lg_base_free((void *)w->data);
        w->data = NULL;
    }
done:
    return st;
}

static lg_status new_vector(lg_model *m, float **out, uint64_t stream, int64_t n, lg_error *err) {
    float *host = lg_base_calloc(n, sizeof *host);
    *out = m->ops->alloc(m->ctx, n * (int64_t)sizeof *host, false, err);
    if (!host || !*out) {
        lg_base_free(host);
        return nomem(err);
    }
    for (int64_t i = 0; i < n; i++) host[i] = uniform(stream, i);
    m->ops->upload(m->ctx, *out, host, n * (int64_t)sizeof *host);
    lg_base_free(host);
    return LG_OK;
}

static lg_status new_lora(lg_model *m, lg_lora *r, int32_t rank, const lg_weight *w, lg_error *err) {
    lg_status st;
    LG_TRY(new_vector(m, &r->a, 2, rank * w->n_in, err));
    LG_TRY(new_vector(m, &r->b, 3, rank * w->n_out, err));
    r->rank = rank;
    r->scale = 1;
    if (m->ops->lora_bind) LG_TRY(m->ops->lora_bind(m->ctx, r, w->n_in, w->n_out, err));
done:
    return st;
}

lg_status lg_model_shape_memory(lg_model *m, int32_t gate_rank, lg_error *err) {
    lg_status st = LG_OK;
    const lg_config *c = &m->cfg;
    lg_memory_weights *w = &m->memory;
    const int64_t nq = c->n_head * c->head_dim, nkv = c->n_head_kv * c->head_dim;
    if (!m->ops || w->layer) return lg_base_fail(err, LG_ERR_USAGE, -1, "the model cannot take random memory weights");
    lg_base_free(w->refusal);
    w->refusal = NULL;
    w->param = LG_MEMORY_Q | LG_MEMORY_K | LG_MEMORY_V;
    w->window = 2048;
    w->ratio[0] = 4;
    w->n_ratio = 1;
    w->layer = lg_base_calloc(c->n_layer, sizeof *w->layer);
    if (gate_rank > 0) m->gate.layer = lg_base_calloc(c->n_layer, sizeof *m->gate.layer);
    if (!w->layer || (gate_rank > 0 && !m->gate.layer)) LG_TRY(nomem(err));
    LG_TRY(bind_random(m, &w->embed, LG_DTYPE_F32, 1, c->n_embd, true, err));
    LG_TRY(bind_random(m, &m->gate_score, LG_DTYPE_F32, 1, c->n_embd, false, err));
    for (int64_t l = 0; l < c->n_layer; l++) {
        const lg_layer *y = &m->layer[l];
        lg_memory_layer *own = &w->layer[l];
        LG_TRY(bind_random(m, &own->wq, y->wq.dtype, nq, c->n_embd, false, err));
        LG_TRY(bind_random(m, &own->wk, y->wk.dtype, nkv, c->n_embd, false, err));
        LG_TRY(bind_random(m, &own->wv, y->wv.dtype, nkv, c->n_embd, false, err));
        if (y->bq) {
            LG_TRY(new_vector(m, &own->bq, 4, nq, err));
            LG_TRY(new_vector(m, &own->bk, 5, nkv, err));
            LG_TRY(new_vector(m, &own->bv, 6, nkv, err));
        }
        if (gate_rank <= 0) continue;
        lg_lora_layer *g = &m->gate.layer[l];
        lg_lora *const r[] = { &g->q, &g->k, &g->v, &g->o, &g->gate, &g->up, &g->down };
        const lg_weight *const base[] = { &y->wq, &y->wk, &y->wv, &y->wo, &y->gate, &y->up, &y->down };
        for (int i = 0; i < 7; i++) LG_TRY(new_lora(m, r[i], gate_rank, base[i], err));
    }
done:
    return st;
}
