/* Multi-passkey samples (after DuoAttention's idea; sizes as in the LycheeDecode data, wording our own).
 *
 *   prefix | text .. needle 1 .. text .. needle n .. text | suffix | question, answer | question, answer ..
 *
 * Keys are numbered in the order of their depth; the questions come in a random order. The haystack fills
 * what the other parts leave of n_ctx, so that the first question always starts at n_ctx exactly. */
#include "tasks/passkey.h"

#include <string.h>

enum { MAX_KEYS = 10, N_ALPHABET = 26 };
static const char *const alphabet[N_ALPHABET] = {
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima",
    "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey",
    "xray", "yankee", "zulu",
};
static const char *const ordinal[MAX_KEYS] = {
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
};
static const char prefix[] = "Several passkeys of a vault are hidden in the long text below. Remember them, you will be asked for them.\n\n";
static const char suffix[] = "\n\nHere the text ends. Now the questions.\n\n";

/* One stream of draws per sample. */
typedef struct draw { uint64_t seed, stream, next; } draw;

static int64_t below(draw *d, int64_t n) {
    return lg_base_rng_below(d->seed, d->stream, d->next++, n);
}

static lg_status append(const lg_passkey_params *p, lg_ids *out, const lg_text *t, lg_error *err) {
    return p->encode(p->encode_user, t->data ? t->data : "", t->n, out, err);
}

static lg_status append_ids(lg_ids *out, const int32_t *id, int64_t n, lg_error *err) {
    for (int64_t i = 0; i < n; i++)
        if (!lg_base_ids_push(out, id[i])) return lg_base_fail(err, LG_ERR_NOMEM, -1, "passkey: out of memory");
    return LG_OK;
}

static lg_status encode_text(const lg_passkey_params *p, lg_ids *out, lg_error *err, const char *fmt, const char *a,
                             const char *b) {
    lg_text t = { 0 };
    lg_status st = lg_base_text_printf(&t, fmt, a, b) ? append(p, out, &t, err)
                                                      : lg_base_fail(err, LG_ERR_NOMEM, -1, "passkey: out of memory");
    lg_text_free(&t);
    return st;
}

static lg_status draw_key(const lg_passkey_params *p, draw *d, lg_text *words, lg_error *err) {
    for (int64_t w = 0; w < p->n_words; w++)
        if (!lg_base_text_printf(words, " %s", alphabet[below(d, N_ALPHABET)]))
            return lg_base_fail(err, LG_ERR_NOMEM, -1, "passkey: out of memory");
    return LG_OK;
}

/* Where in the haystack window each needle goes: distinct hundredths between 5 and 95, ascending. */
static void draw_depths(draw *d, int64_t n_keys, int64_t n_hay, int64_t *at) {
    bool used[91] = { false };
    for (int64_t k = 0; k < n_keys; k++) {
        int64_t x;
        do x = below(d, 91);
        while (used[x]);
        used[x] = true;
    }
    int64_t k = 0;
    for (int64_t x = 0; x < 91; x++)
        if (used[x]) at[k++] = n_hay * (x + 5) / 100;
}

static lg_status fill_context(const lg_passkey_params *p, draw *d, const lg_ids *needle, lg_ids *out, lg_error *err) {
    lg_status st;
    lg_ids tail = { 0 };
    int64_t at[MAX_KEYS], used = 0;
    LG_TRY(append_ids(out, p->bos, p->n_bos, err));
    LG_TRY(p->encode(p->encode_user, prefix, (int64_t)sizeof prefix - 1, out, err));
    LG_TRY(p->encode(p->encode_user, suffix, (int64_t)sizeof suffix - 1, &tail, err));
    for (int64_t k = 0; k < p->n_keys; k++) used += needle[k].n;
    int64_t n_hay = p->n_ctx - out->n - tail.n - used;
    if (n_hay < 4 * p->n_keys)
        LG_TRY(lg_base_fail(err, LG_ERR_USAGE, -1, "passkey: a context of %lld tokens is too short for %lld keys",
                            (long long)p->n_ctx, (long long)p->n_keys));
    if (n_hay > p->n_haystack)
        LG_TRY(lg_base_fail(err, LG_ERR_USAGE, -1, "passkey: the text has %lld tokens, %lld are needed",
                            (long long)p->n_haystack, (long long)n_hay));
    const int32_t *hay = p->haystack + below(d, p->n_haystack - n_hay + 1);
    draw_depths(d, p->n_keys, n_hay, at);
    int64_t from = 0;
    for (int64_t k = 0; k < p->n_keys; k++) {
        LG_TRY(append_ids(out, hay + from, at[k] - from, err));
        LG_TRY(append_ids(out, needle[k].data, needle[k].n, err));
        from = at[k];
    }
    LG_TRY(append_ids(out, hay + from, n_hay - from, err));
    LG_TRY(append_ids(out, tail.data, tail.n, err));
done:
    lg_ids_free(&tail);
    return st;
}

lg_status lg_tasks_passkey(lg_passkey *out, const lg_passkey_params *p, lg_error *err) {
    lg_status st = LG_OK;
    lg_text words[MAX_KEYS] = { { 0 } };
    lg_ids needle[MAX_KEYS] = { { 0 } };
    int64_t order[MAX_KEYS], begin[MAX_KEYS], end[MAX_KEYS];
    memset(out, 0, sizeof *out);
    if (p->n_keys < 1 || p->n_keys > MAX_KEYS || p->n_words < 1 || p->n_words > 1000 || p->n_ctx < 1 || p->index < 0 ||
        p->n_ask < 0 || p->n_ask > p->n_keys)
        return lg_base_fail(err, LG_ERR_USAGE, -1, "passkey: 1 to %d keys of at least one word are possible", MAX_KEYS);
    draw d = { p->seed, 0x7061737300000000u + (uint64_t)p->split, 0 };
    d.stream = lg_base_rng(p->seed, d.stream, (uint64_t)p->index);

    for (int64_t k = 0; k < p->n_keys; k++) {
        LG_TRY(draw_key(p, &d, &words[k], err));
        LG_TRY(encode_text(p, &needle[k], err, "\n\nRemember this: the %s passkey of the vault is:%s.\n\n", ordinal[k], words[k].data));
    }
    LG_TRY(fill_context(p, &d, needle, &out->ids, err));
    out->n_ctx = out->ids.n;

    for (int64_t k = 0; k < p->n_keys; k++) order[k] = k;
    for (int64_t k = p->n_keys - 1; k > 0; k--) {
        int64_t j = below(&d, k + 1), x = order[k];
        order[k] = order[j];
        order[j] = x;
    }
    int64_t n_ask = p->n_ask ? p->n_ask : p->n_keys;
    for (int64_t k = 0; k < n_ask; k++) {
        LG_TRY(encode_text(p, &out->ids, err, "Question: what is the %s passkey of the vault?\nAnswer: the %s passkey of the vault is:",
                           ordinal[order[k]], ordinal[order[k]]));
        begin[k] = out->ids.n;
        LG_TRY(append(p, &out->ids, &words[order[k]], err));
        end[k] = out->ids.n;
        LG_TRY(p->encode(p->encode_user, ".\n\n", 3, &out->ids, err));
    }
    out->answer = lg_base_alloc(out->ids.n);
    if (!out->answer) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "passkey: out of memory"));
    for (int64_t k = 0; k < n_ask; k++)
        for (int64_t i = begin[k]; i < end[k]; i++) {
            out->answer[i] = 1;
            out->n_answer++;
        }
done:
    for (int64_t k = 0; k < MAX_KEYS; k++) {
        lg_text_free(&words[k]);
        lg_ids_free(&needle[k]);
    }
    if (st != LG_OK) lg_tasks_passkey_free(out);
    return st;
}

void lg_tasks_passkey_free(lg_passkey *k) {
    lg_ids_free(&k->ids);
    lg_base_free(k->answer);
    k->answer = NULL;
    k->n_answer = 0;
}
