/* Longan: compressed memory (LycheeMemory, arXiv 2602.08382; docs/MEMORY.md).
 *
 * A document is cut into chunks, each compressed once into KV slots; the slots of all chunks lie in a bank file, which serves
 * any number of questions. The reader sees one chunk's slots before its prompt and carries a working memory from chunk to chunk. */
#ifndef LONGAN_MEMORY_H
#define LONGAN_MEMORY_H
#include "longan/longan.h"
#ifdef __cplusplus
extern "C" {
#endif

/* ---- bank: one file per document and model (layout: docs/FORMATS.md) ----------------------------------- */
typedef struct lg_bank lg_bank; /* immutable, mapped; may be shared */

typedef struct lg_bank_params {
    int64_t chunk;          /* raw tokens, 0: 4096 */
    int64_t window, ratio;  /* 0: the model's memory weights', else 2048 and 4. ratio divides window, window divides chunk */
    lg_dtype slots;         /* F32, BF16 (default: LG_DTYPE_COUNT) or KV8 */
    int64_t group;          /* chunks compressed in one forward pass; 0: default. Stored: resume and append cut at its borders */
    lg_progress_fn progress;
    void *progress_user;
} lg_bank_params;
void lg_bank_defaults(lg_bank_params *p);

typedef struct lg_bank_chunk {
    int64_t token_begin, token_end; /* ends exclusive */
    int64_t byte_begin, byte_end;   /* in the source text; -1: built from ids */
    int64_t slots;                  /* valid slots: ceil(tokens / ratio) */
} lg_bank_chunk;

typedef struct lg_bank_info {
    char family[33], fingerprint[33], memory[33]; /* memory: of the memory weights; "" where the build had none */
    int64_t n_tokens, n_chunk, chunk, window, ratio, n_layer, n_head_kv, head_dim, file_bytes, group;
    lg_dtype slots_dtype;
    bool slot_rope;                 /* readers rotate slots at their index */
} lg_bank_info;

/* Builds PATH.part in groups and renames it; an interrupted build of the same document and model goes on at the last finished
 * group and ends in the same bytes. Text is tokenised once without special tokens. */
lg_status lg_bank_build(lg_model *m, const lg_bank_params *p, const char *text, int64_t n_text, const char *path, lg_error *err);
lg_status lg_bank_build_ids(lg_model *m, const lg_bank_params *p, const int32_t *ids, int64_t n, const char *path, lg_error *err);
/* The new text is tokenised apart; equals a bank built from the joined ids. Commits through the second header slot. */
lg_status lg_bank_append(lg_model *m, const char *path, const char *text, int64_t n_text, lg_progress_fn progress, void *user, lg_error *err);
lg_status lg_bank_append_ids(lg_model *m, const char *path, const int32_t *ids, int64_t n, lg_progress_fn progress, void *user, lg_error *err);
lg_status lg_bank_open(lg_bank **out, const char *path, lg_error *err); /* checks header, table and sizes, not the slots */
/* The ids and byte ranges of a text in memory, without slots: for the modes that read text (any model), and lexical ranking. */
lg_status lg_bank_plain(lg_bank **out, lg_model *m, const char *text, int64_t n_text, int64_t chunk, lg_error *err);
/* The bank of a text in a folder of banks: opened where it is there already (same text, memory weights and parameters), else built.
 * *built: which of the two. */
lg_status lg_bank_cached(lg_bank **out, lg_model *m, const lg_bank_params *p, const char *text, int64_t n_text, const char *folder, bool *built, lg_error *err);
void lg_bank_close(lg_bank *b);
lg_status lg_bank_verify(const lg_bank *b, lg_error *err);              /* every checksum */
void lg_bank_get_info(const lg_bank *b, lg_bank_info *out);
lg_status lg_bank_get_chunk(const lg_bank *b, int64_t i, lg_bank_chunk *out, lg_error *err);
const int32_t *lg_bank_ids(const lg_bank *b);                           /* [n_tokens] */
/* Valid slots of a chunk: K (not rotated, half order) and V as float [n_layer, slots, n_head_kv, head_dim]. */
lg_status lg_bank_read(const lg_bank *b, int64_t chunk, float *k, float *v, lg_error *err);
/* Same family, else LG_ERR_MISMATCH; another fingerprint is logged as a warning. */
lg_status lg_bank_fits(const lg_bank *b, const lg_model *m, lg_error *err);
/* Makes sequence seq begin behind that chunk's slots (generate --bank, logits --bank). slot_rope: -1 as the bank says, 0 none, 1 index. */
lg_status lg_bank_place(const lg_bank *b, int64_t chunk, lg_session *s, int64_t seq, int slot_rope, lg_error *err);

/* ---- ask --------------------------------------------------------------------------------------------------- */
typedef enum lg_ask_mode { LG_ASK_MEMORY, LG_ASK_LOOKUP, LG_ASK_MEMAGENT, LG_ASK_FULL, LG_ASK_HYBRID } lg_ask_mode;
typedef enum lg_gate_kind { LG_GATE_NONE, LG_GATE_ADAPTER, LG_GATE_LEXICAL } lg_gate_kind;

typedef struct lg_ask_params {
    lg_ask_mode mode;
    lg_gate_kind gate;          /* memory: none; lookup: lexical */
    double gate_threshold;      /* 0.5 */
    int64_t gate_batch;         /* chunks scored at once with the current memory, 0: default 8; at most the session's sequences */
    int64_t second_look;        /* rounds over rejected chunks after the memory has changed, 0 */
    const char *update_template, *answer_template; /* NULL: the published ones of the mode; {prompt} and {memory} once each */
    const char *memory_init;    /* NULL: "No previous memory" */
    int64_t memory_size, max_new; /* 1024; 1024 (answer) */
    bool keep_memory;           /* an empty update keeps the old memory */
    bool draft;                 /* prompt-lookup drafting from the previous memory: same output, fewer steps.
                                 * Updates of mode memory, one question after another, greedy, on the CPU without head roles */
    int64_t top;                /* lookup: chunks read, 3; memory with the lexical gate: chunks accepted */
    bool weigh;                 /* lookup: an answer also counts by its chunk's gate score, not by its mean ln p alone */
    int64_t piece;              /* memagent: tokens read at once, 0: 5000 */
    bool boxed;                 /* memagent: the \boxed{} answer prompt, else "Therefore, the answer is (...)" */
    int slot_rope;              /* -1 as bank and adapter say */
    int32_t pad_id;             /* -1: the tokenizer's */
    const int32_t *stop_ids; int64_t n_stop_ids; /* n -1: the model's */
    const char *const *stop; int64_t n_stop;     /* stop texts of the answer */
    int64_t batch;              /* questions decoded together, 0: default */
    lg_sampler_params sampler;  /* of memories and answers; default greedy. Every text a question reads draws from a seed of its own, made of this
                                 * one, the chunk and how many texts the question read before: together or alone, the same ids */
    lg_progress_fn progress; void *progress_user;
} lg_ask_params;
void lg_ask_defaults(lg_ask_params *p); /* of mode memory; lookup wants gate lexical */

typedef struct lg_ask_step {
    int64_t chunk;              /* -1: the answer. memagent: its own pieces */
    int64_t token_begin, token_end; /* of the chunk or piece; 0, 0 for the answer */
    double gate_score;          /* NAN: no gate */
    bool accepted;
    lg_ids prompt, memory;      /* n 0 with data NULL where the chunk was not read */
    int64_t position0;          /* RoPE position of the prompt's first token; -1 where nothing was read */
    int64_t passes;             /* decode steps of this reading */
    double seconds, logprob;    /* logprob: mean over the answer's tokens (lookup) */
} lg_ask_step;
typedef struct lg_answer {
    lg_text text; lg_ids ids;   /* text: stripped; ids: without stop ids */
    lg_text extracted;          /* memagent: from "the answer is" or \boxed{}; data NULL: not found */
    int64_t chunk;              /* lookup: where the answer was read, else -1 */
    lg_ask_step *step; int64_t n_step;
    double build_s, gate_s, read_s, answer_s;
} lg_answer;
void lg_answer_free(lg_answer *a);
/* Tokens of context that a session needs for these questions (slots, longest prompt, new tokens). */
lg_status lg_ask_context(const lg_model *m, const lg_bank *b, const lg_ids *question, int64_t n, const lg_ask_params *p, int64_t *out, lg_error *err);
/* n questions (ids, tokenised alone) on one bank; s: a session of the model with room for slots + prompt + new tokens.
 * Questions decode together as a batch and equal single runs. The default template of mode lookup is "\nQuestion:{prompt}\nAnswer:",
 * so its questions begin with a blank. memagent, full and hybrid read the bank's ids (slots unused). */
lg_status lg_ask(lg_session *s, const lg_bank *b, const lg_ids *question, int64_t n, const lg_ask_params *p, lg_answer *out, lg_error *err);
#ifdef __cplusplus
}
#endif
#endif
