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
