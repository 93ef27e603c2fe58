/* memory: compressed memory. compress.c makes slots, bank.c keeps them in a file, lexical.c and gate.c choose chunks,
 * ask.c and memagent.c read them, prompt.c builds prompts from templates. Public part: longan/memory.h. */
#ifndef LG_MEMORY_H
#define LG_MEMORY_H
#include "longan/memory.h"
#include "session/session.h"

/* ---- compress.c (specs/lycheememory.md section 1) ---- */
typedef struct lg_compressor lg_compressor;
/* For chunks of up to `chunk` raw tokens, `batch` of them at once. Refuses a model without memory weights (names what is needed),
 * a window that does not divide chunk and a ratio that does not divide window. */
lg_status lg_memory_compressor_new(lg_compressor **out, lg_model *m, int64_t chunk, int64_t window, int64_t ratio, int64_t batch, lg_error *err);
void lg_memory_compressor_free(lg_compressor *c);
/* n_chunk <= batch independent chunks: ids[c][0..n[c]), 1 <= n[c] <= chunk. Slot rows of chunk c (ceil(n[c]/ratio) valid ones) go to
 * k + c*stride and v + c*stride, f32 [n_layer][chunk/ratio][n_head_kv][head_dim], stride counted in floats; K not rotated, half order. */
lg_status lg_memory_compress(lg_compressor *c, const int32_t *const *ids, const int64_t *n, int64_t n_chunk, float *k, float *v, int64_t stride,
                             lg_error *err);
/* Multiply-accumulates of the products of one full chunk, for floors. */
double lg_memory_compress_flops(const lg_compressor *c);

/* ---- bank.c ---- */
/* Slot rows of a chunk as they lie in the mapped file. k, v: [n_layer] pointers, filled. */
lg_status lg_memory_bank_slots(const lg_bank *b, int64_t chunk, lg_slots *out, const uint8_t **k, const uint8_t **v, lg_error *err);

/* ---- lexical.c: BM25 over the ids of each chunk ---- */
typedef struct lg_lexical lg_lexical;
lg_status lg_memory_lexical_new(lg_lexical **out, const lg_bank *b, lg_error *err); /* inverted index; cost grows with the document once */
void lg_memory_lexical_free(lg_lexical *x);
void lg_memory_lexical_score(const lg_lexical *x, const int32_t *ids, int64_t n, float *score /* [n_chunk] */);

/* ---- gate.c: sigmoid(w . h + b) behind [slots; prompt(question, memory)] with the gate's low-rank additions; n at most the session's
 * sequences, all in one ragged pass ---- */
lg_status lg_memory_gate(lg_session *s, const int32_t *seqs, const lg_slots *slots, const lg_ids *prompts, int64_t n, double *score, lg_error *err);

/* ---- prompt.c: templates, each literal piece tokenised apart ---- */
enum { LG_HOLE_PROMPT, LG_HOLE_MEMORY, LG_HOLE_CHUNK, LG_HOLE_COUNT }; /* {prompt}, {memory}, {chunk} */
typedef struct lg_template { lg_ids piece[LG_HOLE_COUNT + 1]; int hole[LG_HOLE_COUNT]; int n_hole; } lg_template; /* piece 0, hole 0, piece 1 ... */
/* must, may: bits 1 << LG_HOLE_*; each hole stands at most once. chat: one user turn of the model's chat format. */
lg_status lg_memory_template(lg_template *out, const lg_model *m, const char *text, bool chat, unsigned must, unsigned may, lg_error *err);
void lg_memory_template_free(lg_template *t);
int64_t lg_memory_template_len(const lg_template *t); /* ids of the pieces */
lg_status lg_memory_prompt(const lg_template *t, const lg_ids fill[LG_HOLE_COUNT], lg_ids *out, lg_error *err);
extern const char lg_memory_update_text[], lg_memory_answer_text[], lg_memory_lookup_text[], lg_memory_gate_text[];
extern const char lg_memagent_update_text[], lg_memagent_boxed_text[], lg_memagent_plain_text[], lg_memory_full_text[];
#endif
