/* What the modes of lg_ask share. Private to the room memory. */
#ifndef LG_MEMORY_ASK_H
#define LG_MEMORY_ASK_H
#include "memory/bank.h"

typedef struct lg_asking {
    lg_session *s;
    lg_model *m;
    const lg_bank *b;
    const lg_ids *question;
    int64_t n;                     /* questions */
    lg_ask_params p;               /* defaults filled in */
    lg_answer *out;                /* [n] */
    lg_template update, answer, gate;
    lg_ids *memory;                /* [n] the working memory of each question */
    lg_ids stop;                   /* ids that end a text */
    const char *const *stop_text; int64_t n_stop_text; /* of answers */
    int32_t pad;                   /* -1: none */
    const char *what; int64_t done, total; /* progress */
    bool stopped;
    const uint8_t *forced;         /* bench/memory_bench.c alone: [n_chunk] decisions in place of the adapter gate's, which is run all the same */
} lg_asking;

/* One call of the model: a prompt behind a chunk's slots, or behind nothing. */
typedef struct lg_reading {
    int64_t who, chunk;            /* question; -1: no slots */
    lg_ids prompt;
    int64_t n_max;
    bool answer;                   /* the stop texts count */
    lg_generation out;
} lg_reading;
/* How the next text of that question is drawn (chunk -1: behind no slots). */
lg_sampler_params lg_memory_sampler(const lg_asking *a, int64_t who, int64_t chunk);
/* All readings, decoded together in the order given (those behind one chunk should stand together). */
lg_status lg_memory_read(lg_asking *a, lg_reading *r, int64_t n, lg_error *err);
/* draft.c: one reading, greedy, guessing ahead from ids that its text is likely to repeat. Same text, fewer passes. */
bool lg_memory_can_draft(const lg_asking *a);
lg_status lg_memory_read_drafted(lg_asking *a, lg_reading *r, const lg_ids *from, lg_error *err);
void lg_memory_readings_free(lg_reading *r, int64_t n);
/* A new step of a question; NULL: out of memory. chunk -1: the answer. */
lg_ask_step *lg_memory_step(lg_asking *a, int64_t who, int64_t chunk);
bool lg_memory_copy_ids(lg_ids *out, const lg_ids *from);
lg_status lg_memory_tick(lg_asking *a, const char *what, int64_t done, int64_t total, lg_error *err); /* progress; cancelled: an error */
/* What a reading generated becomes the question's memory: without stop ids and pad. */
lg_status lg_memory_keep(lg_asking *a, const lg_reading *r, lg_error *err);
/* Text (stripped), ids and last step of the answer. */
lg_status lg_memory_answer(lg_asking *a, lg_reading *r, int64_t position0, lg_error *err);
lg_status lg_memory_final(lg_asking *a, lg_error *err); /* the answer prompt of every question, without slots */
/* Scores of the chunks c[0..n), n at most the width, for question q with its present memory (adapter gate): one ragged pass. */
int64_t lg_memory_gate_width(const lg_asking *a); /* gate_batch, or the session's sequences where these are fewer */
lg_status lg_memory_score(lg_asking *a, int64_t q, const int64_t *c, int64_t n, double *score, lg_error *err);

lg_status lg_memory_loop(lg_asking *a, lg_error *err);    /* ask.c */
lg_status lg_memory_lookup(lg_asking *a, lg_error *err);  /* lookup.c */
lg_status lg_memory_memagent(lg_asking *a, lg_error *err);/* memagent.c */
lg_status lg_memory_full(lg_asking *a, lg_error *err);    /* memagent.c */
/* memagent.c: what a response gives as its answer; false: none. */
bool lg_memory_extract(const char *s, bool boxed, lg_text *out);
#endif
