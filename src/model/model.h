/* model: configuration, bound weights, rotary table, ONE forward pass through the op table. */
#ifndef LG_MODEL_H
#define LG_MODEL_H
#include "ops/ops.h"
#include "file/file.h"
#include "text/text.h"

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

/* Low-rank additions of an adapter (reader or gate), one per projection; rank 0 where it has none. */
typedef struct lg_lora_layer { lg_lora q, k, v, o, gate, up, down; } lg_lora_layer;
typedef struct lg_lora_set { lg_lora_layer *layer; } lg_lora_set; /* [n_layer]; layer NULL: no adapter of that kind */

/* Memory weights (LycheeMemory; docs/MEMORY.md): the memory token's embedding and own projections of memory rows. Where
 * memory_param lacks a letter the base projection serves. Rows are in the model's own order inside a head. */
typedef struct lg_memory_layer { lg_weight wq, wk, wv, wo; float *bq, *bk, *bv; } lg_memory_layer;
enum { LG_MEMORY_Q = 1, LG_MEMORY_K = 2, LG_MEMORY_V = 4, LG_MEMORY_O = 8, LG_MAX_RATIOS = 8 };
typedef struct lg_memory_weights {
    lg_weight embed;                     /* [1, d] f32 */
    lg_memory_layer *layer;              /* [n_layer]; NULL: the model has no memory weights */
    unsigned param;                      /* LG_MEMORY_* */
    int64_t window, ratio[LG_MAX_RATIOS]; int32_t n_ratio;
    bool slot_rope;                      /* slots are rotated at their index when read (adapter file), else not at all */
    char *refusal;                       /* layer NULL: why the checkpoint cannot compress, naming what is missing */
} lg_memory_weights;

/* Where tensors come from, GGUF and Hugging Face names alike. */
typedef struct lg_source {
    lg_gguf *gguf; lg_st *st;            /* one of them */
    lg_json *json;                       /* config.json of a folder, else NULL */
    char *folder, *path;
} lg_source;
lg_status lg_source_open(lg_source *s, const char *path, lg_error *err);
void lg_source_close(lg_source *s);      /* legal on a zeroed or half-opened source */
/* GGUF-style name (blk.0.attn_q.weight); translated for folders. NULL if absent. */
const lg_tensor_ref *lg_source_find(const lg_source *s, const char *gguf_name);
/* Translates a GGUF-style tensor name to its Hugging Face twin; false where there is none. */
bool lg_source_hf_name(char *out, size_t n, const char *gguf_name);
int64_t lg_source_n_tensor(const lg_source *s);
const lg_tensor_ref *lg_source_tensor(const lg_source *s, int64_t i);
int64_t lg_source_file_bytes(const lg_source *s);
lg_status lg_config_read(lg_config *c, const lg_source *s, lg_error *err);
/* Rotary frequencies [head_dim/2] (f32 as the reference implementations hold them) and the factor on cos and sin. */
lg_status lg_config_rope(const lg_config *c, const lg_source *s, float *inv_freq, float *factor, lg_error *err);
lg_status lg_source_family(const lg_source *s, const lg_config *c, char family[33], char fingerprint[33], lg_error *err);

/* shape.c: named shapes without a file (bench --shape): random weights, no tokenizer. */
lg_status lg_model_shape_config(lg_config *c, const char *name, lg_error *err);
lg_status lg_model_shape_data(lg_model *m, lg_weight *w, lg_error *err); /* random blocks in host memory, owned by the model */
/* Random memory weights of the official layout (own q, k, v) and a gate: low-rank additions to every projection, and its row. For timing. */
lg_status lg_model_shape_memory(lg_model *m, int32_t gate_rank, lg_error *err);
/* adapter.c: memory weights of the checkpoint and everything in the adapter files; after the base is bound. */
lg_status lg_model_adapters_open(lg_model *m, const lg_model_params *p, lg_error *err);
void lg_model_adapters_free(lg_model *m);

struct lg_model {
    lg_source src;
    lg_config cfg;
    lg_tokenizer *tok;
    lg_model_info info;
    const lg_ops *ops;                   /* NULL when vocab_only */
    lg_ops_ctx *ctx;
    lg_compute compute;
    lg_weight embed, output;             /* tied: output.data == embed.data, embed uses output's binding */
    float *output_norm;
    lg_layer *layer;
    float *inv_freq; float rope_factor;
    int64_t max_in, max_out;             /* over layer weights */
    lg_memory_weights memory;            /* adapter.c: from the checkpoint itself or --adapter files */
    lg_lora_set reader, gate;            /* gate: used when a chunk is scored */
    lg_weight gate_score; float gate_bias; /* [1, d] f32; n_out 0: none */
    void **owned; int64_t n_owned;       /* shape.c: random weights of a host back end */
    int64_t n_draw;                      /* passes that drew ids: what an id below 0 means changes with each (lg_op_embed) */
};

typedef lg_status (*lg_mass_fn)(void *user, int64_t layer, lg_error *err); /* the masses of the layer are there */
/* One forward pass of n_tok tokens through all layers. Every array is the caller's and lives until the call returns. */
typedef struct lg_forward {
    int64_t n_tok;
    const int32_t *ids, *seq, *dst_page, *dst_slot; /* [n_tok]; seq indexes seqs */
    const int64_t *pos, *idx;            /* [n_tok]: RoPE position; own cache row */
    const lg_kv_seq *seqs; int32_t n_seq;
    const lg_kv_layer *kv; lg_kv_geom geom; /* [n_layer] */
    int64_t n_row; const int32_t *row;   /* logits of these tokens, ascending; n_row 0: cache only */
    float *logits;                       /* [n_row, n_vocab]; NULL: left to lg_model_logits */
    /* Hybrid decode (one token per sequence, token s of sequence s), NULL: dense. */
    const int32_t *read, *make;          /* [n_layer, n_head_kv] */
    const int64_t *budget; const uint8_t *dense; /* [n_seq] */
    lg_sets sets; lg_select select;
    lg_spread spread;                    /* window and n_make: [n_layer, n_head_kv]; latest slots are filled in layer 0 */
    lg_query_fn on_query; void *on_query_user;
    /* One sequence: attention masses of the last n_observe rows (lg_op_observe), told layer by layer. */
    int64_t n_observe; float *mass; int64_t mass_ld; /* device [n_head_kv, mass_ld] */
    lg_mass_fn on_mass; void *on_mass_user;
    const lg_lora_set *lora;             /* NULL: none */
    /* Compression: the last n_mem rows are memory tokens (their ids are 0). n_row must be 0. Their K, not rotated, and V of every
     * layer go to k_raw, v_raw: device memory [n_layer, n_mem, n_head_kv*head_dim] f32. The last layer stops there. */
    int64_t n_mem; float *k_raw, *v_raw;
    int32_t *next;                       /* host [n_row]: the id drawn from each row of logits, or NULL */
    const lg_draw *draw; const int32_t *recent; /* how (lg_op_sample); draw NULL: the greatest logit */
    int32_t *fetch_n, *fetch_idx;        /* host copies of sets.n and sets.idx after the step, or NULL */
    int64_t *ticket;                     /* NULL: the pass is done when the call returns. Else lg_ops.submit: next and fetch_* are there after its wait */
} lg_forward;
typedef struct lg_work { /* activations of up to max_tok tokens */
    float *x, *q, *att, *h, *cs, *sn;
    float *kept; int64_t *kept_pos;      /* rotations of recent positions, by position modulo their number; position + 1 */
    int64_t max_tok;
} lg_work;
lg_status lg_model_work_init(lg_work *w, const lg_model *m, int64_t max_tok, lg_error *err);
void lg_model_work_free(lg_work *w, const lg_model *m);
/* cos and sin [head_dim/2] of a position. */
void lg_model_rotation(const lg_model *m, lg_work *w, int64_t pos, float *cs, float *sn);
/* Allocates nothing. */
lg_status lg_model_forward(lg_model *m, lg_work *w, const lg_forward *f, lg_error *err);
/* Logits of further rows of the last pass (those at or after its first row). */
lg_status lg_model_logits(lg_model *m, const lg_work *w, const int32_t *row, int64_t n_row, float *logits, lg_error *err);
#endif
