/* lexical: which chunks share the question's rare words. Okapi BM25 over token ids, k1 1.2, b 0.75,
 *
 *   score(chunk) = sum over the question's distinct ids t of  idf(t) * tf*(k1+1) / (tf + k1*(1 - b + b*len/mean_len)),
 *   idf(t) = ln(1 + (n_chunk - df + 0.5) / (df + 0.5))
 *
 * with tf the count of t in the chunk and df the number of chunks that hold it. Ids are taken as they are: no words, no
 * stemming, no stop list; frequent ids weigh little by themselves. The index is inverted: postings (chunk, tf) per id, made in
 * two passes over the bank's ids; a question costs the postings of its ids. */
#include "memory/bank.h"
#include <math.h>
#include <string.h>

static const double k1 = 1.2, b_len = 0.75;

typedef struct posting { int32_t chunk, tf; } posting;
struct lg_lexical {
    int64_t n_chunk, n_vocab;
    int64_t *first;    /* [n_vocab + 1] into post */
    posting *post;
    float *norm;       /* [n_chunk] k1*(1 - b + b*len/mean) */
};

/* The distinct ids of one chunk with their counts: count[] is zero outside and again afterwards. */
static int64_t distinct(const int32_t *ids, int64_t n, int32_t *count, int32_t *seen) {
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++)
        if (count[ids[i]]++ == 0) seen[k++] = ids[i];
    return k;
}

lg_status lg_memory_lexical_new(lg_lexical **out, const lg_bank *bank, lg_error *err) {
    lg_status st = LG_OK;
    const lg_bank_header *h = &bank->h;
    int32_t *count = NULL, *seen = NULL;
    int64_t *next = NULL;
    *out = NULL;
    if (h->n_chunk > INT32_MAX) return lg_base_fail(err, LG_ERR_LIMIT, -1, "%lld chunks", (long long)h->n_chunk);
    lg_lexical *x = lg_base_alloc(sizeof *x);
    count = lg_base_calloc(h->n_vocab, sizeof *count);
    seen = lg_base_calloc(h->chunk < h->n_tokens ? h->chunk : h->n_tokens, sizeof *seen);
    next = lg_base_calloc(h->n_vocab, sizeof *next);
    if (!x || !count || !seen || !next) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    x->n_chunk = h->n_chunk;
    x->n_vocab = h->n_vocab;
    x->first = lg_base_calloc(h->n_vocab + 1, sizeof *x->first);
    x->norm = lg_base_calloc(h->n_chunk, sizeof *x->norm);
    if (!x->first || !x->norm) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t c = 0; c < h->n_chunk; c++) {
            const int64_t k = distinct(bank->ids + c * h->chunk, bank->chunk[c].n_token, count, seen);
            for (int64_t i = 0; i < k; i++) {
                const int32_t id = seen[i];
                if (pass == 0) x->first[id + 1]++;
                else x->post[next[id]++] = (posting){ (int32_t)c, count[id] };
                count[id] = 0;
            }
            const double mean = (double)h->n_tokens / (double)h->n_chunk;
            x->norm[c] = (float)(k1 * (1 - b_len + b_len * (double)bank->chunk[c].n_token / mean));
        }
        if (pass) break;
        for (int64_t t = 0; t < h->n_vocab; t++) x->first[t + 1] += x->first[t];
        memcpy(next, x->first, (size_t)h->n_vocab * sizeof *next);
        x->post = lg_base_calloc(x->first[h->n_vocab], sizeof *x->post);
        if (!x->post) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    }
    *out = x;
    x = NULL;
done:
    lg_memory_lexical_free(x);
    lg_base_free(count);
    lg_base_free(seen);
    lg_base_free(next);
    return st;
}

void lg_memory_lexical_free(lg_lexical *x) {
    if (!x) return;
    lg_base_free(x->first);
    lg_base_free(x->post);
    lg_base_free(x->norm);
    lg_base_free(x);
}

void lg_memory_lexical_score(const lg_lexical *x, const int32_t *ids, int64_t n, float *score) {
    memset(score, 0, (size_t)x->n_chunk * sizeof *score);
    for (int64_t i = 0; i < n; i++) {
        bool again = ids[i] < 0 || ids[i] >= x->n_vocab;
        for (int64_t j = 0; j < i && !again; j++) again = ids[j] == ids[i];
        if (again) continue;
        const posting *p = x->post + x->first[ids[i]], *end = x->post + x->first[ids[i] + 1];
        const double df = (double)(end - p);
        const float idf = (float)log(1 + ((double)x->n_chunk - df + 0.5) / (df + 0.5));
        for (; p < end; p++) {
            const float tf = (float)p->tf;
            score[p->chunk] += idf * tf * (float)(k1 + 1) / (tf + x->norm[p->chunk]);
        }
    }
}
