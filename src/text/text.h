/* text: byte-level BPE tokenizer, normalisation, chat formats. Ids in, ids out; no model arithmetic.
 * Sources: GGUF metadata tokenizer.ggml.*, or tokenizer.json + tokenizer_config.json (+ generation_config.json). */
#ifndef LG_TEXT_H
#define LG_TEXT_H
#include "file/file.h"

typedef struct lg_tokenizer lg_tokenizer;
lg_status lg_text_from_gguf(lg_tokenizer **out, const lg_gguf *g, lg_error *err);
lg_status lg_text_from_folder(lg_tokenizer **out, const char *folder, lg_error *err);
void lg_text_close(lg_tokenizer *t);
int64_t lg_text_n_vocab(const lg_tokenizer *t);
const char *lg_text_chat_format(const lg_tokenizer *t);                  /* "chatml","llama3","qwen","" */
lg_status lg_text_set_chat_format(lg_tokenizer *t, const char *name, lg_error *err);
const lg_ids *lg_text_stop_ids(const lg_tokenizer *t);                   /* union: generation_config, tokenizer_config, eos, eot */
int32_t lg_text_bos(const lg_tokenizer *t);                              /* -1: none */
int32_t lg_text_pad(const lg_tokenizer *t);                              /* -1: none */
bool lg_text_adds_bos(const lg_tokenizer *t);
bool lg_text_is_special(const lg_tokenizer *t, int32_t id);
/* flags: LG_TOK_*. Thread-safe: the tokenizer is immutable after set_chat_format. */
lg_status lg_text_encode(const lg_tokenizer *t, const char *s, int64_t n, unsigned flags, lg_ids *out, lg_error *err);
/* A long text in bounded memory: the ids of lg_text_encode with flags 0, in runs. The text is cut behind single newlines, where none of the
 * known pre-tokenizers joins what stands on both sides; another pre-tokenizer, or an added token that spans lines, makes it one run. */
typedef lg_status (*lg_text_sink)(void *user, const int32_t *ids, int64_t n, lg_error *err);
lg_status lg_text_encode_to(const lg_tokenizer *t, const char *s, int64_t n, lg_text_sink sink, void *user, lg_error *err);
lg_status lg_text_decode(const lg_tokenizer *t, const int32_t *ids, int64_t n, unsigned flags, lg_text *out, lg_error *err);
lg_status lg_text_chat(const lg_tokenizer *t, const lg_chat_turn *turns, int64_t n, bool gen_prompt, lg_ids *out, lg_error *err);
/* Streaming: feeds one id, appends only whole UTF-8 sequences; state keeps the unfinished bytes. At the end
 * lg_text_stream_end appends U+FFFD for what is left. */
typedef struct lg_text_stream { uint8_t pending[8]; int32_t n_pending; } lg_text_stream;
lg_status lg_text_stream_push(const lg_tokenizer *t, lg_text_stream *s, int32_t id, bool special, lg_text *out, lg_error *err);
bool lg_text_stream_end(lg_text_stream *s, lg_text *out);
/* For convert: writes the tokenizer into a GGUF (tokenizer.ggml.* keys, chat template) so that llama.cpp reads it. */
lg_status lg_text_to_gguf(const lg_tokenizer *t, lg_gguf_out *o, lg_error *err);
#endif
