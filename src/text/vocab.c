/* vocab: the tokenizer's tables and their builder: tokens, merges, added tokens.
 * Readers put tokens, then merges, then added tokens; every id, length and pair is checked here, so that the
 * encoder needs no checks. Token strings of byte-level vocabularies write each byte as a printable code
 * point (the GPT-2 alphabet); here both the string and the bytes are kept. */
#include <string.h>

#include "text/room.h"

/* ---- the byte alphabet ---- */
static bool printable(int b) {
    return (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
}

/* Printable bytes stand for themselves, the 68 others for U+0100, U+0101, ... in their order. */
int32_t lg_text_byte_char(uint8_t byte) {
    if (printable(byte)) return byte;
    int32_t c = 256;
    for (int b = 0; b < byte; b++) c += !printable(b);
    return c;
}

static void byte_alphabet(int16_t of[324]) {
    for (int i = 0; i < 324; i++) of[i] = -1;
    for (int b = 0; b < 256; b++) of[lg_text_byte_char((uint8_t)b)] = (int16_t)b;
}

/* ---- tokenizer ---- */
lg_tokenizer *lg_text_new(const char *source) {
    lg_tokenizer *t = lg_base_alloc(sizeof *t);
    if (!t) return NULL;
    t->source = lg_base_strdup(source);
    t->max_vocab = LG_TEXT_MAX_VOCAB;
    t->unk = t->bos = t->eos = t->eot = t->pad = -1;
    for (int i = 0; i < 256; i++) t->byte_id[i] = -1;
    if (!t->source) {
        lg_base_free(t);
        return NULL;
    }
    return t;
}

void lg_text_close(lg_tokenizer *t) {
    if (!t) return;
    for (int i = 0; i < t->n_stage; i++) {
        lg_text_regex_free(t->stage[i].regex);
        lg_base_free(t->stage[i].source);
    }
    lg_text_chat_free(&t->chat);
    lg_base_free(t->template_text);
    lg_base_free(t->source);
    lg_text_free(&t->arena);
    lg_base_free(t->token);
    lg_base_free(t->index);
    lg_base_free(t->listed);
    lg_base_free(t->merge);
    lg_base_free(t->raw.node);
    lg_base_free(t->normalized.node);
    lg_ids_free(&t->prefix);
    lg_ids_free(&t->suffix);
    lg_ids_free(&t->stop);
    lg_base_free(t);
}

static lg_status no_memory(const lg_tokenizer *t, lg_error *err) {
    return lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory for the tokenizer", t->source);
}

static bool grow(void **p, int64_t *cap, int64_t need, int64_t size) {
    if (need <= *cap) return true;
    int64_t more = *cap < 1024 ? 1024 : *cap * 2;
    if (more < need) more = need;
    void *q = lg_base_realloc(*p, *cap * size, more * size);
    if (!q) return false;
    *p = q;
    *cap = more;
    return true;
}

lg_status lg_text_put_token(lg_tokenizer *t, int64_t id, const char *s, int64_t n, lg_kind kind, lg_error *err) {
    if (id < 0 || id >= t->max_vocab)
        return lg_base_fail(err, LG_ERR_LIMIT, -1, "%s: token id %lld is outside 0 .. %lld", t->source, (long long)id, (long long)t->max_vocab - 1);
    if (n > INT32_MAX / 2) return lg_base_fail(err, LG_ERR_LIMIT, -1, "%s: token %lld is too long", t->source, (long long)id);
    void *p = t->token;
    bool ok = grow(&p, &t->cap_vocab, id + 1, sizeof *t->token);
    t->token = p;
    if (!ok) return no_memory(t, err);
    for (; t->n_vocab <= id; t->n_vocab++) t->token[t->n_vocab] = (lg_token){ 0 };
    lg_token *k = &t->token[id];
    if (k->kind != LG_KIND_UNUSED && !(k->n_str == n && !memcmp(t->arena.data + k->str, s, (size_t)n)))
        return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: two tokens have the id %lld", t->source, (long long)id);
    if (k->kind == LG_KIND_UNUSED) {
        k->str = t->arena.n;
        k->n_str = (int32_t)n;
        if (!lg_base_text_append(&t->arena, s, n)) return no_memory(t, err);
    }
    k->kind = (uint8_t)kind;
    k->in_model |= kind == LG_KIND_NORMAL;
    return LG_OK;
}

lg_status lg_text_put_added(lg_tokenizer *t, int64_t id, const char *s, int64_t n, bool special, unsigned flags, lg_error *err) {
    if (n < 1 || n > LG_TEXT_MAX_ADDED)
        return lg_base_fail(err, LG_ERR_LIMIT, -1, "%s: added token %lld has %lld bytes (1 .. %d are possible)", t->source,
                            (long long)id, (long long)n, LG_TEXT_MAX_ADDED);
    lg_status st = lg_text_put_token(t, id, s, n, special ? LG_KIND_SPECIAL : LG_KIND_ADDED, err);
    if (st == LG_OK) t->token[id].flags = (uint8_t)flags;
    return st;
}

/* ---- look-up of token strings ---- */
uint64_t lg_text_hash(const void *data, int64_t n) {
    const uint8_t *p = data;
    uint64_t h = (uint64_t)n * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du, w;
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&w, p, 8);
        h = (h ^ w) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    w = 0;
    memcpy(&w, p, (size_t)n);
    h = (h ^ w) * 0xc4ceb9fe1a85ec53u;
    return h ^ h >> 29;
}

static int64_t table_size(int64_t n) {
    int64_t size = 64;
    while (size < 2 * n) size *= 2;
    return size;
}

static int64_t index_slot(const lg_tokenizer *t, const char *s, int64_t n) {
    int64_t i = (int64_t)(lg_text_hash(s, n) & (uint64_t)t->index_mask);
    for (;; i = (i + 1) & t->index_mask) {
        int32_t id = t->index[i];
        if (id < 0) return i;
        const lg_token *k = &t->token[id];
        if (k->n_str == n && !memcmp(t->arena.data + k->str, s, (size_t)n)) return i;
    }
}

/* Where two tokens share one string the later id stands for it. */
lg_status lg_text_build_index(lg_tokenizer *t, lg_error *err) {
    int64_t size = table_size(t->n_vocab);
    lg_base_free(t->index);
    t->index = lg_base_calloc(size, sizeof *t->index);
    if (!t->index) return no_memory(t, err);
    t->index_mask = size - 1;
    memset(t->index, 0xff, (size_t)size * sizeof *t->index);
    for (int64_t id = 0; id < t->n_vocab; id++) {
        const lg_token *k = &t->token[id];
        if (k->kind != LG_KIND_UNUSED) t->index[index_slot(t, t->arena.data + k->str, k->n_str)] = (int32_t)id;
    }
    return LG_OK;
}

int32_t lg_text_find(const lg_tokenizer *t, const char *s, int64_t n) {
    return t->index && n <= INT32_MAX ? t->index[index_slot(t, s, n)] : -1;
}

/* ---- merges ---- */
lg_status lg_text_put_merge(lg_tokenizer *t, int64_t i, const char *l, int64_t nl, const char *r, int64_t nr, lg_error *err) {
    lg_status st = LG_OK;
    lg_text both = { 0 };
    void *p = t->listed;
    bool ok = grow(&p, &t->cap_merge, i + 1, sizeof *t->listed);
    t->listed = p;
    if (!ok || !lg_base_text_append(&both, l, nl) || !lg_base_text_append(&both, r, nr)) {
        lg_text_free(&both);
        return no_memory(t, err);
    }
    int32_t left = lg_text_find(t, l, nl), right = lg_text_find(t, r, nr), id = lg_text_find(t, both.data, both.n);
    if (left < 0 || right < 0 || id < 0)
        LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: merge %lld (\"%.60s\"): %s is not in the vocabulary", t->source, (long long)i,
                            both.data, left < 0 ? "its left part" : right < 0 ? "its right part" : "its product"));
    t->listed[i] = (lg_merge){ left, right, (int32_t)i, id };
    t->n_merge = i + 1;
done:
    lg_text_free(&both);
    return st;
}

static int64_t merge_slot(const lg_tokenizer *t, int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9e3779b97f4a7c15u;
    int64_t i = (int64_t)((h >> 32) & (uint64_t)t->merge_mask);
    while (t->merge[i].rank >= 0 && (t->merge[i].left != left || t->merge[i].right != right)) i = (i + 1) & t->merge_mask;
    return i;
}

const lg_merge *lg_text_merge_of(const lg_tokenizer *t, int32_t left, int32_t right) {
    const lg_merge *m = &t->merge[merge_slot(t, left, right)];
    return m->rank >= 0 ? m : NULL;
}

static lg_status build_merges(lg_tokenizer *t, lg_error *err) {
    int64_t size = table_size(t->n_merge);
    t->merge = lg_base_calloc(size, sizeof *t->merge);
    if (!t->merge) return no_memory(t, err);
    t->merge_mask = size - 1;
    for (int64_t i = 0; i < size; i++) t->merge[i].rank = -1;
    for (int64_t i = 0; i < t->n_merge; i++) /* a pair listed twice: the later rank counts */
        t->merge[merge_slot(t, t->listed[i].left, t->listed[i].right)] = t->listed[i];
    return LG_OK;
}

/* ---- bytes of tokens ---- */
static lg_status build_bytes(lg_tokenizer *t, lg_error *err) {
    int16_t of[324];
    byte_alphabet(of);
    for (int64_t id = 0; id < t->n_vocab; id++) {
        lg_token *k = &t->token[id];
        k->bytes = k->str;
        k->n_bytes = k->kind == LG_KIND_UNUSED ? 0 : k->n_str;
        if (k->kind != LG_KIND_NORMAL) continue; /* added tokens stand for their own text */
        int64_t at = t->arena.n, i = 0;
        for (; i < k->n_str; ) {
            const uint8_t *s = (const uint8_t *)t->arena.data + k->str + i;
            int32_t c = s[0];
            int64_t len = 1;
            if (c >= 0xc0 && i + 1 < k->n_str) c = (c & 0x1f) << 6 | (s[1] & 0x3f), len = 2;
            if ((len == 1 && c >= 0x80) || (len == 2 && (s[0] > 0xdf || (s[1] & 0xc0) != 0x80)) || c >= 324 || of[c] < 0) break;
            char b = (char)of[c];
            if (!lg_base_text_append(&t->arena, &b, 1)) return no_memory(t, err);
            i += len;
        }
        if (i < k->n_str) { /* outside the alphabet: no byte token */
            t->arena.n = at;
            continue;
        }
        k->bytes = at;
        k->n_bytes = (int32_t)(t->arena.n - at);
        if (k->n_bytes > t->longest) t->longest = k->n_bytes;
    }
    for (int b = 0; b < 256; b++) {
        char s[4];
        t->alphabet[b] = lg_text_byte_char((uint8_t)b);
        t->byte_id[b] = lg_text_find(t, s, lg_text_utf8_put(s, t->alphabet[b]));
    }
    return LG_OK;
}

/* ---- added tokens: one trie each for before and after normalisation ---- */
static lg_status trie_add(lg_tokenizer *t, lg_trie *trie, const char *s, int64_t n, int32_t id, lg_error *err) {
    int32_t at = 0;
    int64_t cap = trie->cap;
    void *p = trie->node;
    bool ok = grow(&p, &cap, trie->n + n + 1, sizeof *trie->node);
    trie->node = p;
    trie->cap = (int32_t)cap;
    if (!ok) return no_memory(t, err);
    if (trie->n == 0) trie->node[trie->n++] = (lg_trie_node){ -1, -1, -1, 0 };
    trie->first[(uint8_t)s[0]] = true;
    for (int64_t i = 0; i < n; i++) {
        int32_t c = trie->node[at].child;
        while (c >= 0 && trie->node[c].byte != (uint8_t)s[i]) c = trie->node[c].sibling;
        if (c < 0) {
            c = trie->n++;
            trie->node[c] = (lg_trie_node){ -1, trie->node[at].child, -1, (uint8_t)s[i] };
            trie->node[at].child = c;
        }
        at = c;
    }
    trie->node[at].token = id;
    return LG_OK;
}

/* The longest added token that begins at s, -1: none. */
int32_t lg_text_trie_match(const lg_trie *trie, const char *s, int64_t n, int64_t *len) {
    int32_t at = 0, found = -1;
    for (int64_t i = 0; i < n; i++) {
        int32_t c = trie->node[at].child;
        while (c >= 0 && trie->node[c].byte != (uint8_t)s[i]) c = trie->node[c].sibling;
        if (c < 0) break;
        at = c;
        if (trie->node[at].token >= 0) {
            found = trie->node[at].token;
            *len = i + 1;
        }
    }
    return found;
}

static lg_status build_tries(lg_tokenizer *t, lg_error *err) {
    lg_status st = LG_OK;
    lg_text nfc = { 0 };
    for (int64_t id = 0; id < t->n_vocab; id++) {
        const lg_token *k = &t->token[id];
        if (k->kind != LG_KIND_ADDED && k->kind != LG_KIND_SPECIAL) continue;
        const char *s = t->arena.data + k->str;
        int64_t n = k->n_str;
        bool late = k->flags & LG_ADDED_NORMALIZED;
        if (late && t->nfc) {
            nfc.n = 0;
            LG_TRY(lg_text_nfc(&nfc, s, n, err));
            s = nfc.data;
            n = nfc.n;
        }
        LG_TRY(trie_add(t, late ? &t->normalized : &t->raw, s, n, (int32_t)id, err));
    }
done:
    lg_text_free(&nfc);
    return st;
}

lg_status lg_text_build(lg_tokenizer *t, lg_error *err) {
    lg_status st = LG_OK;
    LG_TRY(lg_text_build_index(t, err));
    LG_TRY(build_merges(t, err));
    LG_TRY(build_bytes(t, err));
    LG_TRY(build_tries(t, err));
    const struct { const char *what; int32_t id; } named[] = {
        { "unk", t->unk }, { "bos", t->bos }, { "eos", t->eos }, { "eot", t->eot }, { "padding", t->pad } };
    for (size_t i = 0; i < sizeof named / sizeof named[0]; i++)
        if (named[i].id < -1 || named[i].id >= t->n_vocab)
            LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: %s token id %d is outside the vocabulary (%lld)", t->source,
                                named[i].what, named[i].id, (long long)t->n_vocab));
done:
    return st;
}

/* ---- questions ---- */
int64_t lg_text_n_vocab(const lg_tokenizer *t) { return t->n_vocab; }
int32_t lg_text_bos(const lg_tokenizer *t) { return t->bos; }
int32_t lg_text_pad(const lg_tokenizer *t) { return t->pad; }
bool lg_text_adds_bos(const lg_tokenizer *t) { return t->prefix.n > 0; }
const lg_ids *lg_text_stop_ids(const lg_tokenizer *t) { return &t->stop; }

bool lg_text_is_special(const lg_tokenizer *t, int32_t id) {
    return id >= 0 && id < t->n_vocab && t->token[id].kind == LG_KIND_SPECIAL;
}

bool lg_text_add_stop(lg_tokenizer *t, int32_t id) {
    if (id < 0) return true;
    for (int64_t i = 0; i < t->stop.n; i++)
        if (t->stop.data[i] == id) return true;
    return lg_base_ids_push(&t->stop, id);
}
