/* Longan: the public interface (model, text, session, generation).
 *
 * Two opaque types carry everything: lg_model (immutable, shareable between sessions; weights stay in the
 * file mapping) and lg_session (one mutable timeline of tokens; one thread at a time).
 * Conventions: functions that can fail return lg_status (0 = ok, negative = error) and fill *err when it is
 * not NULL. The library never prints and never exits. Sizes are int64_t, token ids int32_t, times seconds.
 * Strings are UTF-8 and NUL-terminated unless a length stands beside them. Buffers that the library
 * allocates for the caller (lg_ids.data, lg_text.data) are released with lg_ids_free, lg_text_free. */
#ifndef LONGAN_H
#define LONGAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ---------------------------------------------------------------------------------------- */
#define LG_STATUS_LIST(X)                                      \
    X(OK, 0, "ok")                                             \
    X(ERR_USAGE, -1, "wrong usage")                            \
    X(ERR_IO, -2, "input or output failed")                    \
    X(ERR_FORMAT, -3, "malformed file")                        \
    X(ERR_UNSUPPORTED, -4, "not supported")                    \
    X(ERR_LIMIT, -5, "limit exceeded")                         \
    X(ERR_NOMEM, -6, "out of memory")                          \
    X(ERR_MISMATCH, -7, "files do not belong together")        \
    X(ERR_DEVICE, -8, "device failed")                         \
    X(ERR_CANCELLED, -9, "cancelled")

typedef enum lg_status {
#define LG_X(name, value, text) LG_##name = value,
    LG_STATUS_LIST(LG_X)
#undef LG_X
} lg_status;

typedef struct lg_error {
    lg_status code;
    int64_t offset;    /* byte offset in the file named by message, or -1 */
    char message[512]; /* one line, no newline, names file and offset or key where there is one */
} lg_error;

const char *lg_status_text(lg_status s);

/* ---- logging --------------------------------------------------------------------------------------- */
typedef enum lg_log_level { LG_LOG_DEBUG, LG_LOG_INFO, LG_LOG_WARN } lg_log_level;
typedef void (*lg_log_fn)(void *user, lg_log_level level, const char *line);
void lg_log_set(lg_log_fn fn, void *user); /* NULL: silent (the default). Set before other calls. */

/* Progress: return false to cancel (the call then fails with LG_ERR_CANCELLED). */
typedef bool (*lg_progress_fn)(void *user, const char *what, int64_t done, int64_t total);

/* ---- data types ------------------------------------------------------------------------------------ */
typedef enum lg_dtype {
    LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16,
    LG_DTYPE_Q8_0, LG_DTYPE_Q4_0, LG_DTYPE_Q4_1, LG_DTYPE_Q5_0, LG_DTYPE_Q5_1,
    LG_DTYPE_Q4_K, LG_DTYPE_Q5_K, LG_DTYPE_Q6_K,
    LG_DTYPE_KV8, /* KV cache only ("q8"): per row head_dim int8, then ceil(head_dim/32) f16 scales */
    LG_DTYPE_I32, LG_DTYPE_I64, LG_DTYPE_U8,
    LG_DTYPE_COUNT
} lg_dtype;

typedef struct lg_ids { int32_t *data; int64_t n; int64_t cap; } lg_ids;
typedef struct lg_text { char *data; int64_t n; int64_t cap; } lg_text; /* data[n] == 0 */
void lg_ids_free(lg_ids *a);
void lg_text_free(lg_text *t);

/* ---- model ----------------------------------------------------------------------------------------- */
typedef struct lg_model lg_model;

typedef enum lg_compute { LG_COMPUTE_AUTO, LG_COMPUTE_F32 } lg_compute;

typedef struct lg_model_params {
    const char *path;        /* GGUF (first part if split), Hugging Face folder, or .safetensors beside config.json */
    const char *device;      /* "cpu" (NULL too), "cuda", "cuda:N", or "ref" (the plain C specification) */
    int n_threads;           /* 0: all cores this process may use */
    lg_compute compute;
    bool vocab_only;         /* tokenizer and configuration only; no weights, no device */
    const char *const *adapters; /* safetensors with memory, reader or gate weights (contract.md "Adapter file"), in order */
    int32_t n_adapter;
    bool fill_memory;        /* memory tensors that are missing are filled from the base's (specs: docs/MEMORY.md), and said so */
    const char *chat_format; /* NULL: recognise from the template; "chatml", "llama3", "qwen", "none" */
    const char *shape;       /* "llama3-8b", "qwen2.5-7b", "smollm2": random weights instead of a file (path unused), for timing */
    lg_dtype shape_weights;  /* their type */
    lg_progress_fn progress;
    void *progress_user;
} lg_model_params;

lg_status lg_model_open(lg_model **out, const lg_model_params *p, lg_error *err);
void lg_model_free(lg_model *m); /* after its sessions; NULL is legal */

typedef struct lg_model_info {
    char arch[16]; /* "llama", "qwen2", "qwen3" */
    char name[128];
    int64_t n_layer, n_head, n_head_kv, head_dim, n_embd, n_ff, n_ctx_train, n_vocab, n_params, file_bytes;
    int64_t weight_bytes_per_token; /* weight bytes one decode step reads */
    bool rope_scaled;
    char fingerprint[33], family[33]; /* 32 hex digits, contract.md "Common form" */
    char weights_dtype[16];           /* dtype most weight bytes have */
    char chat_format[16];             /* recognised or chosen; "" if none */
    char device[64];
} lg_model_info;
void lg_model_get_info(const lg_model *m, lg_model_info *out);

/* Measured rate of a copy inside the model's device memory, bytes read plus bytes written. */
lg_status lg_model_copy_rate(lg_model *m, double *bytes_per_s, lg_error *err);

/* One line per device found ("cpu: ... avx512 vnni amx", "cuda:0: ..."). Caller frees *out. */
lg_status lg_devices_describe(lg_text *out, lg_error *err);

/* Writes a GGUF of dtype `type` (f32, f16, bf16, Q8_0, Q4_0, Q4_1) from any readable model. type ==
 * LG_DTYPE_COUNT keeps every tensor's dtype. Written to a temporary name, synced, renamed. */
lg_status lg_convert(const char *model_path, const char *out_path, lg_dtype type,
                     lg_progress_fn progress, void *user, lg_error *err);

/* ---- text ------------------------------------------------------------------------------------------ */
enum { LG_TOK_SPECIAL = 1, /* strings of special tokens become those tokens */
       LG_TOK_BOS = 2,     /* add what the model's post-processor adds in front */
       LG_TOK_CHAT = 4 };  /* render as one user turn with the generation prompt (implies special there) */
lg_status lg_tokenize(const lg_model *m, const char *text, int64_t n, unsigned flags, lg_ids *out, lg_error *err);
/* Bytes of the ids; special tokens are dropped unless LG_TOK_SPECIAL. */
lg_status lg_detokenize(const lg_model *m, const int32_t *ids, int64_t n, unsigned flags, lg_text *out, lg_error *err);

typedef struct lg_chat_turn { const char *role; const char *content; } lg_chat_turn; /* system, user, assistant */
/* Renders turns (+ the generation prompt) to ids. A template's own default system turn is added where
 * the first turn is not "system" and the template has one. Contents are ordinary text, never special. */
lg_status lg_chat_tokenize(const lg_model *m, const lg_chat_turn *turns, int64_t n_turns, bool generation_prompt,
                           lg_ids *out, lg_error *err);

/* ---- hybrid heads ---------------------------------------------------------------------------------- */
typedef enum lg_rule { LG_RULE_TOPK, LG_RULE_RATIO, LG_RULE_TOPP, LG_RULE_THRESHOLD } lg_rule;
typedef enum lg_correct { LG_CORRECT_STEP, LG_CORRECT_RERUN } lg_correct;

typedef struct lg_hybrid_params { /* contract.md "Hybrid heads"; zero-initialise with lg_hybrid_defaults */
    int64_t budget;         /* tokens; -1: roles file's, an error if that has none where one is needed */
    int64_t sinks, recents; /* -1: roles file's, else 128 and 256 */
    lg_rule rule;
    double rule_value;      /* ratio: dropped share; topp: p; threshold: tau */
    double rule_scale;      /* <= 0: head_dim^-0.5 */
    int64_t block;          /* granularity in tokens: 1, 16, 32 or 64 */
    int64_t correct_every;  /* 0: never */
    lg_correct correct;
    double keep;            /* share of what a head chooses that it keeps from the last observation (docs/SPARSE.md, "Kept tokens"); < 0: roles file's, else 0 */
    int64_t observe, refresh; /* tokens observed (1 to 64), tokens until they are observed anew; <= 0: roles file's, else 64 and 128 */
} lg_hybrid_params;
void lg_hybrid_defaults(lg_hybrid_params *p);

typedef enum lg_role_kind { LG_ROLE_RETRIEVAL, LG_ROLE_WINDOW, LG_ROLE_DONOR } lg_role_kind;
typedef struct lg_role { lg_role_kind kind; int16_t donor_layer, donor_head; } lg_role;
/* "sparse" of a same-index file is resolved to LG_ROLE_DONOR at load: one code path. */
typedef struct lg_roles {
    int64_t n_layer, n_head_kv;
    lg_role *role;          /* [n_layer * n_head_kv], layer-major */
    bool same_index;        /* "share":"same-index" in the file */
    int64_t n_retrieval;
    int64_t budget, sinks, recents; /* -1: absent */
    char family[33];
    int64_t keep;           /* "keep": 1024ths, 0: nothing is kept */
    int64_t observe, refresh; /* 0: absent */
    int32_t *share;         /* "budget_share": [n_layer * n_head_kv] 1024ths of what the budget holds beyond sinks and recents; NULL: all 1024 */
} lg_roles;
lg_status lg_roles_load(lg_roles **out, const char *path, lg_error *err);
void lg_roles_free(lg_roles *r);

/* ---- session --------------------------------------------------------------------------------------- */
typedef struct lg_session lg_session;

typedef struct lg_session_params {
    int64_t n_ctx;          /* 0: n_ctx_train. More needs rope scaling, or allow_beyond (bench --synthetic) */
    bool allow_beyond;
    lg_dtype kv;            /* F32, F16, BF16, KV8; LG_DTYPE_COUNT: default of device and compute */
    int64_t n_seq_max;      /* sequences that live at once, >= 1 (0: 1) */
    int64_t chunk;          /* prefill chunk in tokens, 0: default (512) */
    const lg_roles *roles;  /* NULL: dense. Copied. Another family is refused unless roles_any_model */
    bool roles_any_model;
    lg_hybrid_params hybrid;
    lg_progress_fn progress; /* called between prefill chunks */
    void *progress_user;
} lg_session_params;
void lg_session_defaults(lg_session_params *p);

lg_status lg_session_new(lg_session **out, lg_model *m, const lg_session_params *p, lg_error *err);
void lg_session_free(lg_session *s);
/* Other head options for the decode steps to come; the cache stays (calibration tries many maps on one context).
 * roles NULL: dense. Checked as in lg_session_new; on failure the session decodes densely. */
lg_status lg_session_set_roles(lg_session *s, const lg_roles *roles, const lg_hybrid_params *hybrid, lg_error *err);

/* Makes sequence `seq` (0 .. n_seq_max-1) hold exactly ids[0..n): keeps the longest common prefix that is
 * cached, drops the rest, prefills the remainder densely in chunks. At least the last id is evaluated, so
 * lg_session_logits(seq) is valid afterwards. n + 0 > n_ctx is LG_ERR_LIMIT with both numbers. */
lg_status lg_session_sync(lg_session *s, int64_t seq, const int32_t *ids, int64_t n, lg_error *err);
/* Feeds one id to each of n sequences as ONE decode step under the head options (ragged batch). */
lg_status lg_session_step(lg_session *s, const int32_t *seqs, const int32_t *ids, int64_t n, lg_error *err);
/* The same, and ids[i] becomes the id that follows in sequence seqs[i]: of the greatest logit, ties: the lowest. more: the caller means to go on with
 * these ids. A device that draws them itself then begins that step at once, while the caller looks at this one (lg_generate and lg_generate_batch do so,
 * too); a call that is another one waits for it and forgets it. On failure ids stay. */
lg_status lg_session_greedy(lg_session *s, const int32_t *seqs, int32_t *ids, int64_t n, bool more, lg_error *err);
/* Next-token logits of a sequence, float [n_vocab]; valid until the next sync or step. */
const float *lg_session_logits(lg_session *s, int64_t seq);
int64_t lg_session_len(const lg_session *s, int64_t seq);
const int32_t *lg_session_ids(const lg_session *s, int64_t seq);
lg_status lg_session_rewind(lg_session *s, int64_t seq, int64_t n, lg_error *err); /* keep the first n */
/* Sequence dst becomes a copy of src that shares its pages (copied on write). */
lg_status lg_session_fork(lg_session *s, int64_t dst, int64_t src, lg_error *err);

/* All rows: called once per row in order; logits float [n_vocab], row i = logits after ids[i]. */
typedef lg_status (*lg_row_fn)(void *user, int64_t row, const float *logits, lg_error *err);
/* Ids before decode_from are prefill, each later id is fed alone as a decode step (-1: all prefill). */
lg_status lg_session_eval(lg_session *s, const int32_t *ids, int64_t n, int64_t decode_from,
                          lg_row_fn on_row, void *user, lg_error *err);

typedef struct lg_stats { /* sums since the session began or lg_session_stats_reset */
    int64_t decode_steps;   /* token steps (one per sequence fed) */
    int64_t dense_steps;    /* of these, run densely */
    int64_t kv_bytes_read, kv_bytes_dense; /* decode steps only; K and V with scales; current token counted */
    int64_t kv_bytes_cache; /* memory reserved for the cache */
    double prefill_s, decode_s;
    int64_t prefill_tokens;
} lg_stats;
void lg_session_stats(const lg_session *s, lg_stats *out);
void lg_session_stats_reset(lg_session *s);
/* Per KV head [n_layer * n_head_kv]: tokens read in decode steps, summed. */
const int64_t *lg_session_head_tokens(const lg_session *s);

/* Called after every decode step of a hybrid session for each set that was built (tests, --sets, overlap
 * statistics); tokens ascending. A dense step calls it once with layer = head = -1, n = 0. */
typedef void (*lg_set_fn)(void *user, int64_t position, int64_t layer, int64_t head, const int32_t *tokens, int64_t n);
void lg_session_on_set(lg_session *s, lg_set_fn fn, void *user);

/* Fills sequence 0 with n positions of pseudo-random K and V (timing only; bench --synthetic). */
lg_status lg_session_fill_random(lg_session *s, int64_t n, uint64_t seed, lg_error *err);
lg_status lg_session_fill_random_at(lg_session *s, int64_t seq, int64_t n, uint64_t seed, lg_error *err); /* any sequence */

/* Snapshot of sequence 0: ids and cache; XXH3 checksum, model fingerprint; written atomically. */
lg_status lg_session_save(lg_session *s, const char *path, lg_error *err);
lg_status lg_session_load(lg_session *s, const char *path, lg_error *err); /* on failure the session is unchanged */

/* Reads attention for calibration: dense prefill of ids[0..n) into seq 0 with, for each layer, a callback
 * that sees the post-RoPE queries float [n_rows, n_head, head_dim] (half order not implied: the cache's
 * own order) of the chunk that starts at position first. */
typedef void (*lg_query_fn)(void *user, int64_t layer, int64_t first, int64_t n_rows, const float *q);
void lg_session_on_query(lg_session *s, lg_query_fn fn, void *user);
/* Copies cached K (rotated) of (layer, head) positions [0, n) as float [n, head_dim]. */
lg_status lg_session_read_k(lg_session *s, int64_t seq, int64_t layer, int64_t head, int64_t n, float *out, lg_error *err);

/* ---- sampling and generation ----------------------------------------------------------------------- */
typedef struct lg_sampler_params {
    float temp;           /* <= 0: greedy */
    int32_t top_k;        /* 0: off */
    float top_p, min_p;   /* 1 and 0: off */
    float repeat_penalty; /* 1: off; over all ids of the sequence's last 64 */
    uint64_t seed;
} lg_sampler_params;
void lg_sampler_defaults(lg_sampler_params *p);
/* Stateless: the draw depends on seed and step only. recent: ids the penalty looks at. */
int32_t lg_sample(const float *logits, int64_t n_vocab, const lg_sampler_params *p, const int32_t *recent,
                  int64_t n_recent, int64_t step, float *scratch /* [2 * n_vocab] */);

typedef bool (*lg_stream_fn)(void *user, int64_t index, int32_t id, const char *piece, int64_t n); /* false: cancel */
typedef struct lg_generate_params {
    int64_t n_max;              /* -n, default 256 */
    lg_sampler_params sampler;
    const char *const *stop;    /* stop texts */
    int64_t n_stop;
    const int32_t *stop_ids;    /* replaces the model's set when n_stop_ids >= 0 */
    int64_t n_stop_ids;         /* -1: the model's union of eos and eot ids */
    bool logprob;               /* fill lg_generation.logprob */
    lg_stream_fn stream;        /* whole UTF-8 sequences only */
    void *stream_user;
} lg_generate_params;
void lg_generate_defaults(lg_generate_params *p);

typedef enum lg_stop_reason { LG_STOP_EOS, LG_STOP_LENGTH, LG_STOP_STOP, LG_STOP_CANCELLED } lg_stop_reason;
const char *lg_stop_reason_text(lg_stop_reason r); /* "eos", "length", "stop", "cancelled" */

typedef struct lg_generation {
    lg_ids ids;   /* without the ending token */
    lg_text text; /* special tokens dropped, cut before a stop text */
    int64_t prompt_tokens;
    double prefill_s, decode_s;
    int64_t decode_steps, kv_bytes_read, kv_bytes_dense;
    lg_stop_reason stop_reason;
    double logprob;             /* mean of ln p over the generated tokens, the ending one counted; 0 unless asked for */
} lg_generation;
void lg_generation_free(lg_generation *g);
/* Syncs the prompt into sequence `seq` and generates. prompt + n_max > n_ctx is LG_ERR_LIMIT up front
 * only if the prompt alone does not fit; generation ends with "length" when the window is full. */
lg_status lg_generate(lg_session *s, int64_t seq, const int32_t *prompt, int64_t n_prompt,
                      const lg_generate_params *p, lg_generation *out, lg_error *err);
/* Many prompts decoded together on n_seq_max sequences; out[n]. Equal to single runs. */
lg_status lg_generate_batch(lg_session *s, const lg_ids *prompts, const lg_generate_params *params, int64_t n,
                            lg_generation *out, lg_error *err);

#ifdef __cplusplus
}
#endif
#endif
