/* tasks: generated test material. Multi-passkey retrieval: a haystack of ordinary text in which several
 * numbered passkeys of random words are hidden, then questions for them in another order. Only the tokens
 * of the answers count. Everything is a pure function of (seed, split, index): the splits never share a draw.
 * Knows no tokenizer: the caller hands one in as a function. */
#ifndef LG_TASKS_PASSKEY_H
#define LG_TASKS_PASSKEY_H
#include "base/base.h"

typedef enum lg_split { LG_SPLIT_TRAIN, LG_SPLIT_DEV, LG_SPLIT_TEST } lg_split;

/* Appends the ids of s[0..n) to *out, plain text without special tokens. */
typedef lg_status (*lg_encode_fn)(void *user, const char *s, int64_t n, lg_ids *out, lg_error *err);

typedef struct lg_passkey_params {
    lg_encode_fn encode;
    void *encode_user;
    const int32_t *bos;       /* ids put in front, may be NULL */
    int64_t n_bos;
    const int32_t *haystack;  /* ids of ordinary text; a window of it is taken at random */
    int64_t n_haystack;
    int64_t n_ctx;            /* tokens up to the first question */
    int64_t n_keys;           /* 1..10 */
    int64_t n_words;          /* words of a key, >= 1 */
    int64_t n_ask;            /* how many of the keys are asked for, 0: all */
    uint64_t seed;
    lg_split split;
    int64_t index;
} lg_passkey_params;

typedef struct lg_passkey {
    lg_ids ids;          /* context, then the questions with their answers */
    int64_t n_ctx;       /* ids before the first question */
    uint8_t *answer;     /* [ids.n] 1: this id is part of an answer (its prediction stands one row before) */
    int64_t n_answer;
} lg_passkey;

/* LG_ERR_USAGE where the haystack or n_ctx is too short for the needles. */
lg_status lg_tasks_passkey(lg_passkey *out, const lg_passkey_params *p, lg_error *err);
void lg_tasks_passkey_free(lg_passkey *k);
#endif
