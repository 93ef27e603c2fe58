/* model: configuration, bound weights, rotary table, ONE forward pass through the op table. */
#ifndef LG_MODEL_H
#define LG_MODEL_H
#include "ops/ops.h"
#include "file/file.h"

typedef enum lg_rope_kind { LG_ROPE_NONE, LG_ROPE_LINEAR, LG_ROPE_LLAMA3, LG_ROPE_YARN } lg_rope_kind;
typedef struct lg_config {
    char arch[16], name[128];
    int64_t n_layer, n_head, n_head_kv, head_dim, n_embd, n_ff, n_ctx_train, n_vocab;
    float norm_eps;
    double rope_theta;
    lg_rope_kind rope_kind;
    double rope_factor, rope_low, rope_high, rope_attn_factor, rope_beta_fast, rope_beta_slow;
    int64_t rope_orig_ctx;
    bool rope_interleaved, tied, qkv_bias, qk_norm;
} lg_config;

typedef struct lg_layer {
    float *attn_norm, *ffn_norm;         /* [d], f32, owned */
    lg_weight wq, wk, wv, wo, gate, up, down;
    float *bq, *bk, *bv, *q_norm, *k_norm; /* NULL where the arch has none */
} lg_layer;

/* Where tensors come from, GGUF and Hugging Face names alike. */
typedef struct lg_source {
    lg_gguf *gguf; lg_st *st;            /* one of them */
    lg_json *json;                       /* config.json of a folder, else NULL */
    char *folder;
} lg_source;
lg_status lg_source_open(lg_source *s, const char *path, lg_error *err);
void lg_source_close(lg_source *s);
lg_status lg_config_read(lg_config *c, const lg_source *s, lg_error *err);
/* GGUF-style name (blk.0.attn_q.weight); translated for folders. NULL if absent. */
const lg_tensor_ref *lg_source_find(const lg_source *s, const char *gguf_name);
lg_status lg_source_family(const lg_source *s, const lg_config *c, char family[33], char fingerprint[33], lg_error *err);
#endif
