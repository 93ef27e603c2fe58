/* What longan ask hands to its trace pages. */
#ifndef LONGAN_ASK_H
#define LONGAN_ASK_H
#include "cli.h"

typedef struct ask_source { const char *name; int64_t begin, end; } ask_source; /* a file's bytes in the joined text */

typedef struct asked {
    const options *o;
    lg_model *m;
    lg_bank *bank;
    lg_bank_info info;
    lg_ask_params p;
    batch_item *items;      /* [n] where --questions */
    id_list *ids;           /* [n] */
    lg_ids *question;       /* [n] */
    int64_t n;
    lg_answer *answer;      /* [n] */
    buf text;               /* the document, where one was given */
    ask_source *source;     /* [n_source] */
    int64_t n_source;
    double build_s;
} asked;

void ask_range(const asked *a, int64_t token_begin, int64_t token_end, int64_t *byte_begin, int64_t *byte_end); /* -1: not known */
void ask_text(const asked *a, const int32_t *ids, int64_t n, buf *out); /* special tokens as text */
void ask_page(const asked *a, buf *b); /* trace.c: the page of --trace-html */
#endif
