/* Private to the room text: the tokenizer's data and what its files share.
 * A tokenizer is built by one of two readers (gguf.c, folder.c) through the builder calls of vocab.c, then
 * finished once by lg_text_build and never changed again, save for the chat form. */
#ifndef LG_TEXT_ROOM_H
#define LG_TEXT_ROOM_H
#include "text/text.h"

enum {
    LG_TEXT_MAX_VOCAB = 1 << 23,
    LG_TEXT_MAX_ADDED = 1024, /* bytes of one added token: bounds the matcher's look-ahead */
    LG_TEXT_MAX_STAGES = 8
};

typedef enum lg_kind { LG_KIND_UNUSED, LG_KIND_NORMAL, LG_KIND_ADDED, LG_KIND_SPECIAL } lg_kind;
enum { LG_ADDED_LSTRIP = 1, LG_ADDED_RSTRIP = 2, LG_ADDED_SINGLE = 4, LG_ADDED_NORMALIZED = 8 };

typedef struct lg_token {
    int64_t str, bytes;       /* offsets in the arena: as the file has it, and the bytes it stands for */
    int32_t n_str, n_bytes;
    uint8_t kind, flags;      /* lg_kind, LG_ADDED_* */
    bool in_model;            /* among the BPE model's own vocabulary, not only an added token */
} lg_token;

typedef struct lg_merge { int32_t left, right, rank, id; } lg_merge; /* rank < 0: an empty slot */
typedef struct lg_trie_node { int32_t child, sibling, token; uint8_t byte; } lg_trie_node;
typedef struct lg_trie { lg_trie_node *node; int32_t n, cap; bool first[256]; } lg_trie;
typedef struct lg_regex lg_regex; /* split.c */

typedef struct lg_stage { lg_regex *regex; char *source; } lg_stage; /* source: as the file has it */

typedef enum lg_chat_kind { LG_CHAT_NONE, LG_CHAT_CHATML, LG_CHAT_LLAMA3, LG_CHAT_QWEN, LG_CHAT_BARE } lg_chat_kind;
typedef struct lg_chat {
    lg_chat_kind kind;
    bool bos, trim;
    bool think_cut;           /* answers lose what stands before </think> */
    bool think_wrap;          /* the answer after the last question gets an (empty) think block */
    char *system;             /* content of the default system turn, NULL: none */
    char *system_head;        /* opens the system turn, which then always is there (llama 3.1 dates), NULL: none */
    char *prompt;             /* what the generation prompt has behind its header, NULL: nothing */
} lg_chat;

struct lg_tokenizer {
    char *source;             /* file or folder, for messages */
    lg_text arena;
    lg_token *token;          /* [n_vocab] */
    int64_t n_vocab, cap_vocab;
    int64_t max_vocab;        /* ids from here on are refused: the model's rows where they are known */
    int32_t *index;           /* hash of token strings -> id, -1: empty */
    int64_t index_mask;
    lg_merge *listed;         /* [n_merge] in rank order, as read */
    int64_t n_merge, cap_merge;
    lg_merge *merge;          /* hash */
    int64_t merge_mask;
    int32_t alphabet[256];    /* code point of each byte */
    int32_t longest;          /* bytes of the longest token of the model */
    int32_t byte_id[256];     /* -1: this byte has no token and no unk: it vanishes, as in Hugging Face */
    int32_t unk;              /* of the BPE model, -1: none */
    bool fuse_unk, ignore_merges, nfc;
    char pre[32];             /* tokenizer.ggml.pre, "" if the stages have no such name */
    lg_stage stage[LG_TEXT_MAX_STAGES];
    int32_t n_stage;
    lg_trie raw, normalized;  /* added tokens matched before and after normalisation */
    lg_ids prefix, suffix;    /* what the post-processor adds */
    int32_t bos, eos, eot, pad;
    lg_ids stop;
    char *template_text;      /* NULL: none */
    lg_chat chat;
};

/* vocab.c: the builder */
lg_tokenizer *lg_text_new(const char *source);
lg_status lg_text_put_token(lg_tokenizer *t, int64_t id, const char *s, int64_t n, lg_kind kind, lg_error *err);
lg_status lg_text_put_merge(lg_tokenizer *t, int64_t i, const char *l, int64_t nl, const char *r, int64_t nr, lg_error *err);
lg_status lg_text_put_added(lg_tokenizer *t, int64_t id, const char *s, int64_t n, bool special, unsigned flags, lg_error *err);
lg_status lg_text_build_index(lg_tokenizer *t, lg_error *err); /* after the tokens, before merges */
lg_status lg_text_build(lg_tokenizer *t, lg_error *err);       /* last: merge table, tries, bytes */
int32_t lg_text_find(const lg_tokenizer *t, const char *s, int64_t n); /* by the file's string, -1: none */
const lg_merge *lg_text_merge_of(const lg_tokenizer *t, int32_t left, int32_t right);
int32_t lg_text_trie_match(const lg_trie *trie, const char *s, int64_t n, int64_t *len);
bool lg_text_add_stop(lg_tokenizer *t, int32_t id);
uint64_t lg_text_hash(const void *data, int64_t n);
int32_t lg_text_byte_char(uint8_t byte); /* code point that stands for a byte in byte-level vocabularies */

/* split.c: pre-tokenizers. All of PCRE2 is in there. */
extern const char lg_text_gpt2_regex[], lg_text_llama3_regex[], lg_text_qwen2_regex[];
typedef struct lg_splitter lg_splitter; /* scratch of one call */
typedef lg_status (*lg_piece_fn)(void *user, const char *s, int64_t n, lg_error *err);
lg_status lg_text_add_stage(lg_tokenizer *t, const char *regex, int64_t n, const char *where, lg_error *err);
lg_status lg_text_add_digits(lg_tokenizer *t, bool individual, lg_error *err);
lg_status lg_text_fuse_stages(lg_tokenizer *t, lg_error *err); /* recognises t->pre, joins digits and GPT-2 */
lg_status lg_text_set_pre(lg_tokenizer *t, const char *name, const char *key, lg_error *err);
bool lg_text_pre_default(const char *pre, bool *nfc, bool *ignore_merges);
void lg_text_regex_free(lg_regex *r);
lg_status lg_text_splitter_new(lg_splitter **out, const lg_tokenizer *t, lg_error *err);
void lg_text_splitter_free(lg_splitter *sp);
lg_status lg_text_split(lg_splitter *sp, const char *s, int64_t n, lg_piece_fn fn, void *user, lg_error *err);

/* normal.c: Unicode. All of utf8proc is in there. */
lg_status lg_text_nfc(lg_text *out, const char *s, int64_t n, lg_error *err); /* appends; s valid UTF-8 */
bool lg_text_needs_nfc(const char *s, int64_t n); /* false: surely normalised already */
int64_t lg_text_space_at_start(const char *s, int64_t n); /* bytes of White_Space */
int64_t lg_text_space_at_end(const char *s, int64_t n);
bool lg_text_word_at_start(const char *s, int64_t n);
bool lg_text_word_at_end(const char *s, int64_t n);
int32_t lg_text_utf8_get(const char *s, int64_t n, int64_t *len); /* valid UTF-8 only */
int32_t lg_text_utf8_put(char out[4], int32_t c);

/* bpe.c: the scratch of one call; ids are appended to out */
typedef struct lg_text_work lg_text_work;
lg_status lg_text_work_new(lg_text_work **out, const lg_tokenizer *t, int64_t n_bytes, unsigned flags, lg_ids *ids, lg_error *err);
void lg_text_work_free(lg_text_work *w);
lg_status lg_text_run(lg_text_work *w, const char *s, int64_t n, lg_error *err); /* s: valid UTF-8 */
lg_status lg_text_word_alone(lg_text_work *w, const char *s, int64_t n, lg_error *err); /* by merges only */

/* chat.c */
typedef struct lg_turn { const char *role; int64_t n_role; const char *content; int64_t n_content; } lg_turn;
lg_status lg_text_chat_turns(const lg_tokenizer *t, const lg_turn *turns, int64_t n, bool gen_prompt, lg_ids *out, lg_error *err);
lg_status lg_text_read_template(lg_tokenizer *t, const char *s, int64_t n, lg_error *err);
void lg_text_chat_free(lg_chat *c);
const char *lg_text_turn_end(lg_chat_kind k); /* marker that ends a turn, NULL */
#endif
