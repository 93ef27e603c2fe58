/* bpe: text to ids. The order is that of Hugging Face tokenizers: repair UTF-8; cut at added tokens matched in
 * raw text; normalise the rest; cut at added tokens matched in normalised text; split into words; merge the
 * bytes of each word. Merging takes the pair of lowest rank, leftmost first, by a heap over a linked list:
 * O(n log n) for a word of n bytes. Short words go through a direct-mapped cache that lives for one call. */
#include <string.h>

#include "text/room.h"

typedef struct symbol { int32_t id, prev, next, rank, product; } symbol; /* rank, product: of the pair with next */

enum { CACHE_KEY = 18, CACHE_IDS = 10 };
typedef struct cached { /* one cache line */
    uint32_t hash;
    uint8_t len, n; /* len 0: empty */
    char key[CACHE_KEY];
    int32_t id[CACHE_IDS];
} cached;

struct lg_text_work {
    const lg_tokenizer *t;
    lg_ids *out;
    unsigned flags;
    lg_splitter *sp;
    symbol *sym;
    int64_t cap_sym, cap_heap;
    uint64_t *heap; /* rank << 32 | position */
    int64_t n_heap;
    cached *cache;
    uint32_t cache_mask;
    lg_text norm, name;
};

static lg_status no_memory(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "no memory to tokenize"); }

lg_status lg_text_work_new(lg_text_work **out, const lg_tokenizer *t, int64_t n_bytes, unsigned flags, lg_ids *ids, lg_error *err) {
    lg_text_work *w = *out = lg_base_alloc(sizeof *w);
    if (!w) return no_memory(err);
    w->t = t;
    w->flags = flags;
    w->out = ids;
    uint32_t size = 16; /* small texts get a small cache: it is cleared on every call */
    while (size < 16384 && size < n_bytes / 8) size *= 2;
    w->cache = lg_base_calloc(size, sizeof *w->cache);
    w->cache_mask = size - 1;
    lg_status st = w->cache ? lg_text_splitter_new(&w->sp, t, err) : no_memory(err);
    if (st != LG_OK) {
        lg_text_work_free(w);
        *out = NULL;
    }
    return st;
}

void lg_text_work_free(lg_text_work *w) {
    if (!w) return;
    lg_text_splitter_free(w->sp);
    lg_base_free(w->sym);
    lg_base_free(w->heap);
    lg_base_free(w->cache);
    lg_text_free(&w->norm);
    lg_text_free(&w->name);
    lg_base_free(w);
}

/* ---- heap of pairs, lowest first ---- */
static void heap_push(lg_text_work *w, uint64_t v) {
    int64_t i = w->n_heap++;
    for (; i > 0 && w->heap[(i - 1) / 2] > v; i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = v;
}

static uint64_t heap_pop(lg_text_work *w) {
    uint64_t top = w->heap[0], v = w->heap[--w->n_heap];
    int64_t i = 0;
    for (int64_t c; (c = 2 * i + 1) < w->n_heap; i = c) {
        c += c + 1 < w->n_heap && w->heap[c + 1] < w->heap[c];
        if (w->heap[c] >= v) break;
        w->heap[i] = w->heap[c];
    }
    w->heap[i] = v;
    return top;
}

/* ---- one word ---- */
static void offer(lg_text_work *w, int32_t i) {
    symbol *s = &w->sym[i];
    const lg_merge *m = s->next >= 0 ? lg_text_merge_of(w->t, s->id, w->sym[s->next].id) : NULL;
    s->rank = m ? m->rank : -1;
    if (!m) return;
    s->product = m->id;
    heap_push(w, (uint64_t)(uint32_t)m->rank << 32 | (uint32_t)i);
}

static bool word_room(lg_text_work *w, int64_t n) {
    if (n <= w->cap_sym) return true;
    int64_t cap = n * 2 < 256 ? 256 : n + n / 4;
    lg_base_free(w->sym);
    lg_base_free(w->heap);
    w->sym = lg_base_calloc(cap, sizeof *w->sym);
    w->heap = lg_base_calloc(cap, 3 * sizeof *w->heap); /* n pairs at first, at most two more for each merge */
    w->cap_sym = w->sym && w->heap ? cap : 0;
    return w->cap_sym > 0;
}

/* A byte without a token becomes unk, or vanishes where the model has none. */
static int32_t first_symbols(lg_text_work *w, const char *s, int64_t n) {
    int32_t k = 0;
    bool last_unk = false;
    for (int64_t i = 0; i < n; i++) {
        int32_t id = w->t->byte_id[(uint8_t)s[i]];
        bool unk = id < 0;
        if (unk && (w->t->unk < 0 || (last_unk && w->t->fuse_unk))) continue;
        last_unk = unk;
        w->sym[k] = (symbol){ .id = unk ? w->t->unk : id, .prev = k - 1, .next = k + 1, .rank = -1 };
        k++;
    }
    if (k > 0) w->sym[k - 1].next = -1;
    return k;
}

static lg_status merge_word(lg_text_work *w, const char *s, int64_t n, lg_error *err) {
    if (n > INT32_MAX / 2) return lg_base_fail(err, LG_ERR_LIMIT, -1, "one word of %lld bytes is too long to tokenize", (long long)n);
    if (!word_room(w, n)) return no_memory(err);
    int32_t k = first_symbols(w, s, n);
    w->n_heap = 0;
    for (int32_t i = 0; i + 1 < k; i++) offer(w, i);
    while (w->n_heap > 0) {
        uint64_t top = heap_pop(w);
        int32_t i = (int32_t)(uint32_t)top;
        symbol *a = &w->sym[i];
        if (a->rank != (int32_t)(top >> 32)) continue; /* this pair has gone */
        symbol *b = &w->sym[a->next];
        a->id = a->product;
        a->next = b->next;
        b->rank = -1;
        if (a->next >= 0) w->sym[a->next].prev = i;
        offer(w, i);
        if (a->prev >= 0) offer(w, a->prev);
    }
    for (int32_t i = k > 0 ? 0 : -1; i >= 0; i = w->sym[i].next)
        if (!lg_base_ids_push(w->out, w->sym[i].id)) return no_memory(err);
    return LG_OK;
}

/* The id of a word that is a token as it stands, -1: none. */
static lg_status whole_word(lg_text_work *w, const char *s, int64_t n, int32_t *id, lg_error *err) {
    *id = -1;
    if (n > w->t->longest) return LG_OK;
    w->name.n = 0;
    for (int64_t i = 0; i < n; i++) {
        char c[4];
        if (!lg_base_text_append(&w->name, c, lg_text_utf8_put(c, w->t->alphabet[(uint8_t)s[i]]))) return no_memory(err);
    }
    int32_t found = lg_text_find(w->t, w->name.data, w->name.n);
    if (found >= 0 && w->t->token[found].in_model) *id = found;
    return LG_OK;
}

static lg_status word(void *user, const char *s, int64_t n, lg_error *err) {
    lg_text_work *w = user;
    uint32_t hash = 0;
    cached *c = NULL;
    if (n <= CACHE_KEY) {
        hash = (uint32_t)lg_text_hash(s, n);
        c = &w->cache[hash & w->cache_mask];
        if (c->len == n && c->hash == hash && !memcmp(c->key, s, (size_t)n)) {
            for (int i = 0; i < c->n; i++)
                if (!lg_base_ids_push(w->out, c->id[i])) return no_memory(err);
            return LG_OK;
        }
    }
    lg_status st = LG_OK;
    int64_t from = w->out->n;
    int32_t id = -1;
    if (w->t->ignore_merges) st = whole_word(w, s, n, &id, err);
    if (st == LG_OK && id >= 0) st = lg_base_ids_push(w->out, id) ? LG_OK : no_memory(err);
    else if (st == LG_OK) st = merge_word(w, s, n, err);
    if (st == LG_OK && c && w->out->n - from <= CACHE_IDS) {
        c->hash = hash;
        c->len = (uint8_t)n;
        c->n = (uint8_t)(w->out->n - from);
        memcpy(c->key, s, (size_t)n);
        for (int i = 0; i < c->n; i++) c->id[i] = w->out->data[from + i];
    }
    return st;
}

/* ---- added tokens ---- */
typedef lg_status (*rest_fn)(lg_text_work *w, const char *s, int64_t n, lg_error *err);

static lg_status cut_added(lg_text_work *w, const lg_trie *trie, const char *s, int64_t n, rest_fn rest, lg_error *err) {
    lg_status st = LG_OK;
    const lg_tokenizer *t = w->t;
    int64_t done_to = 0;
    for (int64_t i = 0, len = 0; trie->n > 0 && i < n; i += len) {
        int32_t id = trie->first[(uint8_t)s[i]] ? lg_text_trie_match(trie, s + i, n - i, &len) : -1;
        if (id < 0) {
            len = 1;
            continue;
        }
        const lg_token *k = &t->token[id];
        int64_t from = i, to = i + len;
        if (k->kind == LG_KIND_SPECIAL && !(w->flags & LG_TOK_SPECIAL)) continue;
        if ((k->flags & LG_ADDED_SINGLE) && (lg_text_word_at_end(s, from) || lg_text_word_at_start(s + to, n - to))) continue;
        if (k->flags & LG_ADDED_LSTRIP) from -= lg_text_space_at_end(s, from);
        if (from < done_to) from = done_to;
        if (k->flags & LG_ADDED_RSTRIP) to += lg_text_space_at_start(s + to, n - to);
        LG_TRY(rest(w, s + done_to, from - done_to, err));
        if (!lg_base_ids_push(w->out, id)) LG_TRY(no_memory(err));
        done_to = to;
    }
    if (done_to < n) LG_TRY(rest(w, s + done_to, n - done_to, err));
done:
    return st;
}

static lg_status plain(lg_text_work *w, const char *s, int64_t n, lg_error *err) {
    return n > 0 ? lg_text_split(w->sp, s, n, word, w, err) : LG_OK;
}

static lg_status normalise(lg_text_work *w, const char *s, int64_t n, lg_error *err) {
    if (n > 0 && w->t->nfc && lg_text_needs_nfc(s, n)) {
        w->norm.n = 0;
        lg_status st = lg_text_nfc(&w->norm, s, n, err);
        if (st != LG_OK) return st;
        s = w->norm.data;
        n = w->norm.n;
    }
    return cut_added(w, &w->t->normalized, s, n, plain, err);
}

lg_status lg_text_run(lg_text_work *w, const char *s, int64_t n, lg_error *err) {
    return cut_added(w, &w->t->raw, s, n, normalise, err);
}

lg_status lg_text_word_alone(lg_text_work *w, const char *s, int64_t n, lg_error *err) {
    return merge_word(w, s, n, err);
}

/* ---- the call: appends to out; on failure out is as before ---- */
static lg_status encode_text(const lg_tokenizer *t, const char *s, int64_t n, unsigned flags, lg_ids *out, lg_error *err) {
    lg_status st = LG_OK;
    lg_text fixed = { 0 };
    lg_text_work *w = NULL;
    int64_t n_prefix = 0, start = out->n;
    if (!lg_base_text_append(&fixed, "", 0) || !lg_file_utf8_repair(&fixed, s, n)) LG_TRY(no_memory(err));
    LG_TRY(lg_text_work_new(&w, t, n, flags, out, err));
    for (int64_t i = 0; (flags & LG_TOK_BOS) && i < t->prefix.n; i++, n_prefix++)
        if (!lg_base_ids_push(out, t->prefix.data[i])) LG_TRY(no_memory(err));
    LG_TRY(lg_text_run(w, fixed.data, fixed.n, err));
    int32_t *id = out->data + start;
    if (n_prefix > 0 && out->n - start > n_prefix && id[n_prefix] == id[0] && id[0] == t->bos) { /* the text brought its own */
        memmove(id, id + n_prefix, (size_t)(out->n - start - n_prefix) * sizeof *id);
        out->n -= n_prefix;
    }
    for (int64_t i = 0; (flags & LG_TOK_BOS) && i < t->suffix.n; i++)
        if (!lg_base_ids_push(out, t->suffix.data[i])) LG_TRY(no_memory(err));
done:
    lg_text_work_free(w);
    lg_text_free(&fixed);
    return st;
}

lg_status lg_text_encode(const lg_tokenizer *t, const char *s, int64_t n, unsigned flags, lg_ids *out, lg_error *err) {
    int64_t start = out->n;
    lg_status st;
    if (flags & LG_TOK_CHAT) {
        lg_turn turn = { "user", 4, s, n };
        st = lg_text_chat_turns(t, &turn, 1, true, out, err);
    } else st = encode_text(t, s, n, flags, out, err);
    if (st != LG_OK) out->n = start;
    return st;
}

/* ---- long texts ---- */
enum { RUN_BYTES = 1 << 18 };

/* Whether ids of the parts of a text are the ids of the text, where next_cut cuts it. */
static bool cuts(const lg_tokenizer *t) {
    bool found = t->pre[0] != 0; /* (a name only where the expression is a known one) */
    for (int64_t i = 0; found && i < t->n_vocab; i++) {
        const lg_token *k = &t->token[i];
        if (k->kind != LG_KIND_ADDED && k->kind != LG_KIND_SPECIAL) continue;
        found = !(k->flags & (LG_ADDED_LSTRIP | LG_ADDED_RSTRIP)) && !memchr(t->arena.data + k->bytes, '\n', (size_t)k->n_bytes);
    }
    return found;
}

/* Behind the first newline from `at` on that has a visible ASCII character before it and an ASCII letter behind it: both sides begin a piece
 * of every known pattern, and no character joins another across it. */
static int64_t next_cut(const char *s, int64_t at, int64_t n) {
    for (int64_t i = at; i + 1 < n; i++) {
        const char *lf = memchr(s + i, '\n', (size_t)(n - i));
        if (!lf) break;
        i = lf - s;
        if (i > 0 && s[i - 1] > ' ' && s[i - 1] < 0x7f && i + 1 < n && ((s[i + 1] | 0x20) >= 'a' && (s[i + 1] | 0x20) <= 'z')) return i + 1;
    }
    return n;
}

lg_status lg_text_encode_to(const lg_tokenizer *t, const char *s, int64_t n, lg_text_sink sink, void *user, lg_error *err) {
    lg_status st = LG_OK;
    lg_ids ids = { 0 };
    const bool parts = cuts(t);
    for (int64_t at = 0, end; at < n; at = end) {
        end = parts && n - at > RUN_BYTES ? next_cut(s, at + RUN_BYTES, n) : n;
        ids.n = 0;
        LG_TRY(encode_text(t, s + at, end - at, 0, &ids, err));
        LG_TRY(sink(user, ids.data, ids.n, err));
    }
done:
    lg_ids_free(&ids);
    return st;
}
