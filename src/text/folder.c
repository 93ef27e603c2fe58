/* folder: the tokenizer of a Hugging Face folder: tokenizer.json, and beside it tokenizer_config.json,
 * generation_config.json, config.json (vocab_size), chat_template.jinja or .json. Layouts of transformers 4 and 5.
 * A part of tokenizer.json that changes ids and is not known here is refused with its key, never skipped. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "text/room.h"

enum { MAX_JSON = 256 << 20, MAX_CONFIG = 16 << 20, MAX_NESTED = 8 };

typedef struct reader {
    lg_tokenizer *t;
    const char *folder;
    char path[4096]; /* of the file being read, for messages */
    lg_json *json, *config, *generation, *model;
    bool byte_level;
    lg_status st; /* of callbacks */
    lg_error *err;
} reader;

static lg_status bad(reader *r, lg_status code, const char *key, const char *why) {
    return lg_base_fail(r->err, code, -1, "%s: %s: %s", r->path, key, why);
}

static lg_status no_memory(reader *r) { return lg_base_fail(r->err, LG_ERR_NOMEM, -1, "%s: no memory", r->path); }

static bool set_path(reader *r, const char *name) {
    int n = snprintf(r->path, sizeof r->path, "%s/%s", r->folder, name);
    return n > 0 && n < (int)sizeof r->path;
}

static bool exists(reader *r, const char *name) { return set_path(r, name) && access(r->path, F_OK) == 0; }

static bool is_str(const lg_json *v, const char *s) {
    const char *p = lg_json_str(v, NULL);
    return p && !strcmp(p, s);
}

static bool absent(const lg_json *v) { return lg_json_typeof(v) == LG_JSON_NULL; }

/* A flag that may be left out. */
static lg_status flag(reader *r, const lg_json *obj, const char *key, bool usual, bool *out) {
    const lg_json *v = lg_json_get(obj, key);
    *out = usual;
    if (absent(v) || lg_json_bool(v, out)) return LG_OK;
    return bad(r, LG_ERR_FORMAT, key, "no boolean");
}

static lg_status unknown_type(reader *r, const char *where, const lg_json *v) {
    const char *s = lg_json_str(lg_json_get(v, "type"), NULL);
    return lg_base_fail(r->err, LG_ERR_UNSUPPORTED, -1, "%s: %s: type \"%.60s\" is not supported", r->path, where, s ? s : "(none)");
}

/* ---- model ---- */
static void put_vocab(void *user, const char *key, const lg_json *value) {
    reader *r = user;
    int64_t id;
    if (r->st != LG_OK) return;
    if (!lg_json_int(value, &id))
        r->st = lg_base_fail(r->err, LG_ERR_FORMAT, -1, "%s: model.vocab[\"%.60s\"] is no integer", r->path, key);
    else r->st = lg_text_put_token(r->t, id, key, (int64_t)strlen(key), LG_KIND_NORMAL, r->err);
}

static lg_status read_merge(reader *r, const lg_json *m, int64_t i) {
    int64_t n, nl, nr;
    const char *s = lg_json_str(m, &n), *l, *right, *cut;
    if (s) { /* "a b" */
        cut = n > 1 ? memchr(s + 1, ' ', (size_t)n - 1) : NULL;
        if (!cut || cut == s + n - 1) s = NULL;
        else return lg_text_put_merge(r->t, i, s, cut - s, cut + 1, s + n - cut - 1, r->err);
    } else if (lg_json_size(m) == 2) { /* ["a","b"] */
        l = lg_json_str(lg_json_at(m, 0), &nl);
        right = lg_json_str(lg_json_at(m, 1), &nr);
        if (l && right) return lg_text_put_merge(r->t, i, l, nl, right, nr, r->err);
    }
    return lg_base_fail(r->err, LG_ERR_FORMAT, -1, "%s: model.merges[%lld] is no pair", r->path, (long long)i);
}

static bool is_empty(const lg_json *v) {
    int64_t n = 0;
    return absent(v) || (lg_json_str(v, &n) && n == 0);
}

static lg_status read_model(reader *r, const lg_json *m) {
    lg_status st = LG_OK;
    const lg_json *type = lg_json_get(m, "type"), *vocab = lg_json_get(m, "vocab"), *merges = lg_json_get(m, "merges");
    const lg_json *unk = lg_json_get(m, "unk_token");
    bool byte_fallback;
    double dropout = 0;
    int64_t n_unk;
    if (lg_json_typeof(m) != LG_JSON_OBJECT) return bad(r, LG_ERR_FORMAT, "model", "no object");
    if (!absent(type) && !is_str(type, "BPE")) return unknown_type(r, "model", m);
    if (lg_json_typeof(vocab) != LG_JSON_OBJECT) return bad(r, absent(type) ? LG_ERR_UNSUPPORTED : LG_ERR_FORMAT, "model.vocab", "no object");
    if (lg_json_typeof(merges) != LG_JSON_ARRAY) return bad(r, LG_ERR_FORMAT, "model.merges", "no array");
    if (!is_empty(lg_json_get(m, "continuing_subword_prefix"))) return bad(r, LG_ERR_UNSUPPORTED, "model.continuing_subword_prefix", "is not supported");
    if (!is_empty(lg_json_get(m, "end_of_word_suffix"))) return bad(r, LG_ERR_UNSUPPORTED, "model.end_of_word_suffix", "is not supported");
    if (!absent(lg_json_get(m, "dropout")) && (!lg_json_num(lg_json_get(m, "dropout"), &dropout) || dropout != 0))
        return bad(r, LG_ERR_UNSUPPORTED, "model.dropout", "is not supported");
    LG_TRY(flag(r, m, "byte_fallback", false, &byte_fallback));
    if (byte_fallback) return bad(r, LG_ERR_UNSUPPORTED, "model.byte_fallback", "true is not supported");
    LG_TRY(flag(r, m, "fuse_unk", false, &r->t->fuse_unk));
    LG_TRY(flag(r, m, "ignore_merges", false, &r->t->ignore_merges));
    lg_json_each(vocab, put_vocab, r);
    LG_TRY(r->st);
    if (r->t->n_vocab == 0) return bad(r, LG_ERR_FORMAT, "model.vocab", "is empty");
    LG_TRY(lg_text_build_index(r->t, r->err));
    if (lg_json_size(merges) > LG_TEXT_MAX_VOCAB) return bad(r, LG_ERR_LIMIT, "model.merges", "too many");
    for (int64_t i = 0; i < lg_json_size(merges); i++) LG_TRY(read_merge(r, lg_json_at(merges, i), i));
    if (!absent(unk)) {
        const char *s = lg_json_str(unk, &n_unk);
        r->t->unk = s ? lg_text_find(r->t, s, n_unk) : -1;
        if (r->t->unk < 0) return bad(r, LG_ERR_FORMAT, "model.unk_token", "is not in the vocabulary");
    }
done:
    return st;
}

/* ---- added tokens ---- */
static lg_status read_added(reader *r, const lg_json *v, int64_t id, bool default_normalized) {
    static const struct { const char *key; unsigned bit; } keys[] = {
        { "lstrip", LG_ADDED_LSTRIP }, { "rstrip", LG_ADDED_RSTRIP }, { "single_word", LG_ADDED_SINGLE }, { "normalized", LG_ADDED_NORMALIZED } };
    lg_status st = LG_OK;
    int64_t n;
    const char *s = lg_json_str(lg_json_get(v, "content"), &n);
    bool on, special;
    unsigned flags = 0;
    if (!s) return bad(r, LG_ERR_FORMAT, "added token", "content is no string");
    LG_TRY(flag(r, v, "special", false, &special));
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        LG_TRY(flag(r, v, keys[i].key, keys[i].bit == LG_ADDED_NORMALIZED && default_normalized && !special, &on));
        if (on) flags |= keys[i].bit;
    }
    int32_t known = lg_text_find(r->t, s, n);
    if (known >= 0 && known != id)
        return lg_base_fail(r->err, LG_ERR_FORMAT, -1, "%s: added token \"%.60s\" has id %lld here, %d in the vocabulary", r->path, s,
                            (long long)id, known);
    LG_TRY(lg_text_put_added(r->t, id, s, n, special, flags, r->err));
done:
    return st;
}

static lg_status read_added_tokens(reader *r) {
    lg_status st = LG_OK;
    const lg_json *all = lg_json_get(r->json, "added_tokens");
    if (!absent(all) && lg_json_typeof(all) != LG_JSON_ARRAY) return bad(r, LG_ERR_FORMAT, "added_tokens", "no array");
    for (int64_t i = 0; i < lg_json_size(all); i++) {
        int64_t id;
        if (!lg_json_int(lg_json_get(lg_json_at(all, i), "id"), &id)) return bad(r, LG_ERR_FORMAT, "added_tokens", "an id is no integer");
        LG_TRY(read_added(r, lg_json_at(all, i), id, true));
    }
    LG_TRY(lg_text_build_index(r->t, r->err));
done:
    return st;
}

/* ---- normalizer, pre-tokenizer, post-processor, decoder ---- */
static lg_status read_normalizer(reader *r, const lg_json *v, int depth) {
    lg_status st = LG_OK;
    if (absent(v)) return LG_OK;
    const lg_json *type = lg_json_get(v, "type"), *list = lg_json_get(v, "normalizers");
    if (is_str(type, "NFC")) r->t->nfc = true;
    else if (is_str(type, "Sequence") && lg_json_typeof(list) == LG_JSON_ARRAY && depth < MAX_NESTED)
        for (int64_t i = 0; i < lg_json_size(list); i++) LG_TRY(read_normalizer(r, lg_json_at(list, i), depth + 1));
    else return unknown_type(r, "normalizer", v);
done:
    return st;
}

static lg_status read_split(reader *r, const lg_json *v) {
    static const char where[] = "pre_tokenizer.Split";
    lg_status st = LG_OK;
    int64_t n;
    const char *s = lg_json_str(lg_json_get(lg_json_get(v, "pattern"), "Regex"), &n);
    const lg_json *behavior = lg_json_get(v, "behavior");
    bool invert;
    if (!s) return bad(r, LG_ERR_UNSUPPORTED, where, "a pattern without Regex is not supported");
    LG_TRY(flag(r, v, "invert", false, &invert));
    /* "Removed" with invert keeps the matches alone: the same, where the expression leaves nothing out */
    bool covers = !strcmp(s, lg_text_gpt2_regex) || !strcmp(s, lg_text_llama3_regex) || !strcmp(s, lg_text_qwen2_regex);
    if (!is_str(behavior, "Isolated") && !(is_str(behavior, "Removed") && invert && covers))
        return bad(r, LG_ERR_UNSUPPORTED, where, "only the behavior Isolated is supported");
    LG_TRY(lg_text_add_stage(r->t, s, n, where, r->err));
done:
    return st;
}

static lg_status read_byte_level(reader *r, const lg_json *v) {
    lg_status st = LG_OK;
    bool prefix, regex;
    LG_TRY(flag(r, v, "add_prefix_space", true, &prefix));
    LG_TRY(flag(r, v, "use_regex", true, &regex));
    if (prefix) return bad(r, LG_ERR_UNSUPPORTED, "pre_tokenizer.ByteLevel.add_prefix_space", "true is not supported");
    if (regex) LG_TRY(lg_text_add_stage(r->t, lg_text_gpt2_regex, (int64_t)strlen(lg_text_gpt2_regex), "pre_tokenizer.ByteLevel", r->err));
    r->byte_level = true;
done:
    return st;
}

static lg_status read_pre_tokenizer(reader *r, const lg_json *v, int depth) {
    lg_status st = LG_OK;
    const lg_json *type = lg_json_get(v, "type"), *list = lg_json_get(v, "pretokenizers");
    bool individual;
    if (r->byte_level) return bad(r, LG_ERR_UNSUPPORTED, "pre_tokenizer", "a stage behind ByteLevel is not supported");
    if (is_str(type, "Sequence") && lg_json_typeof(list) == LG_JSON_ARRAY && depth < MAX_NESTED)
        for (int64_t i = 0; i < lg_json_size(list); i++) LG_TRY(read_pre_tokenizer(r, lg_json_at(list, i), depth + 1));
    else if (is_str(type, "Split")) LG_TRY(read_split(r, v));
    else if (is_str(type, "Digits")) {
        LG_TRY(flag(r, v, "individual_digits", false, &individual));
        LG_TRY(lg_text_add_digits(r->t, individual, r->err));
    } else if (is_str(type, "ByteLevel")) LG_TRY(read_byte_level(r, v));
    else return unknown_type(r, "pre_tokenizer", v);
done:
    return st;
}

static lg_status read_template_part(reader *r, const lg_json *special, const lg_json *piece, bool *seen_text) {
    static const char where[] = "post_processor.single";
    if (!absent(lg_json_get(piece, "Sequence"))) {
        if (*seen_text) return bad(r, LG_ERR_UNSUPPORTED, where, "the text twice is not supported");
        *seen_text = true;
        return LG_OK;
    }
    const char *name = lg_json_str(lg_json_get(lg_json_get(piece, "SpecialToken"), "id"), NULL);
    const lg_json *ids = name ? lg_json_get(lg_json_get(special, name), "ids") : NULL;
    if (lg_json_size(ids) < 1) return bad(r, LG_ERR_FORMAT, where, "a special token without ids");
    for (int64_t i = 0; i < lg_json_size(ids); i++) {
        int64_t id;
        if (!lg_json_int(lg_json_at(ids, i), &id) || id < 0 || id >= r->t->n_vocab)
            return bad(r, LG_ERR_FORMAT, "post_processor.special_tokens", "an id outside the vocabulary");
        if (!lg_base_ids_push(*seen_text ? &r->t->suffix : &r->t->prefix, (int32_t)id)) return no_memory(r);
    }
    return LG_OK;
}

static lg_status read_post_processor(reader *r, const lg_json *v, int depth) {
    lg_status st = LG_OK;
    if (absent(v)) return LG_OK;
    const lg_json *type = lg_json_get(v, "type"), *list = lg_json_get(v, "processors"), *single = lg_json_get(v, "single");
    bool seen_text = false;
    if (is_str(type, "ByteLevel")) return LG_OK; /* moves offsets only */
    if (is_str(type, "Sequence") && lg_json_typeof(list) == LG_JSON_ARRAY && depth < MAX_NESTED)
        for (int64_t i = 0; i < lg_json_size(list); i++) LG_TRY(read_post_processor(r, lg_json_at(list, i), depth + 1));
    else if (is_str(type, "TemplateProcessing") && lg_json_typeof(single) == LG_JSON_ARRAY) {
        if (r->t->prefix.n || r->t->suffix.n) return bad(r, LG_ERR_UNSUPPORTED, "post_processor", "two templates are not supported");
        for (int64_t i = 0; i < lg_json_size(single); i++)
            LG_TRY(read_template_part(r, lg_json_get(v, "special_tokens"), lg_json_at(single, i), &seen_text));
        if (!seen_text) return bad(r, LG_ERR_FORMAT, "post_processor.single", "has no Sequence");
    } else return unknown_type(r, "post_processor", v);
done:
    return st;
}

static lg_status read_decoder(reader *r, const lg_json *v, int depth) {
    const lg_json *list = lg_json_get(v, "decoders");
    if (is_str(lg_json_get(v, "type"), "ByteLevel")) return LG_OK;
    if (is_str(lg_json_get(v, "type"), "Sequence") && lg_json_size(list) == 1 && depth < MAX_NESTED)
        return read_decoder(r, lg_json_at(list, 0), depth + 1);
    return unknown_type(r, "decoder", v);
}

static lg_status read_tokenizer_json(reader *r) {
    lg_status st = LG_OK;
    if (!exists(r, "tokenizer.json")) {
        bool piece = exists(r, "tokenizer.model");
        set_path(r, "tokenizer.json");
        return bad(r, piece ? LG_ERR_UNSUPPORTED : LG_ERR_IO, "tokenizer",
                   piece ? "the file is missing, and tokenizer.model (SentencePiece) is not supported" : "the file is missing");
    }
    LG_TRY(lg_json_load(&r->json, r->path, MAX_JSON, r->err));
    LG_TRY(read_model(r, lg_json_get(r->json, "model")));
    LG_TRY(read_added_tokens(r));
    LG_TRY(read_normalizer(r, lg_json_get(r->json, "normalizer"), 0));
    LG_TRY(read_pre_tokenizer(r, lg_json_get(r->json, "pre_tokenizer"), 0));
    if (!r->byte_level) return bad(r, LG_ERR_UNSUPPORTED, "pre_tokenizer", "without ByteLevel is not supported");
    LG_TRY(lg_text_fuse_stages(r->t, r->err));
    LG_TRY(read_post_processor(r, lg_json_get(r->json, "post_processor"), 0));
    LG_TRY(read_decoder(r, lg_json_get(r->json, "decoder"), 0));
done:
    return st;
}

/* ---- tokenizer_config.json ---- */
static void put_added_decoder(void *user, const char *key, const lg_json *value) { /* transformers 4: "id": {token} */
    reader *r = user;
    char *end;
    if (r->st != LG_OK) return;
    long long id = strtoll(key, &end, 10);
    if (*end || end == key) r->st = bad(r, LG_ERR_FORMAT, "added_tokens_decoder", "a key is no id");
    else r->st = read_added(r, value, id, true);
}

/* A token named by its text or by {"content":...}. Tokens so named are special; a new one gets the next id, as in
 * transformers, where the model has a row for it. */
static lg_status named_token(reader *r, const lg_json *v, const char *key, int64_t rows, int32_t *out) {
    lg_status st = LG_OK;
    int64_t n;
    const char *s = lg_json_str(v, &n);
    *out = -1;
    if (absent(v)) return LG_OK;
    if (!s) s = lg_json_str(lg_json_get(v, "content"), &n);
    if (!s) return bad(r, LG_ERR_FORMAT, key, "is neither a string nor a token");
    int32_t id = lg_text_find(r->t, s, n);
    if (id < 0 && (rows < 0 || r->t->n_vocab < rows) && n > 0 && n <= LG_TEXT_MAX_ADDED) id = (int32_t)r->t->n_vocab;
    if (id < 0) {
        lg_base_log(LG_LOG_WARN, "%s: %s \"%.60s\" is not in the vocabulary and not used", r->path, key, s);
        return LG_OK;
    }
    if (id == r->t->n_vocab || r->t->token[id].kind == LG_KIND_NORMAL) {
        LG_TRY(lg_text_put_added(r->t, id, s, n, true, 0, r->err));
        LG_TRY(lg_text_build_index(r->t, r->err));
    }
    *out = id;
done:
    return st;
}

static lg_status named_tokens(reader *r, int64_t rows) {
    static const char *const other[] = { "unk_token", "sep_token", "cls_token", "mask_token" };
    static const char *const lists[] = { "additional_special_tokens", "extra_special_tokens" };
    lg_status st = LG_OK;
    int32_t id;
    LG_TRY(named_token(r, lg_json_get(r->config, "bos_token"), "bos_token", rows, &r->t->bos));
    LG_TRY(named_token(r, lg_json_get(r->config, "eos_token"), "eos_token", rows, &r->t->eos));
    for (size_t i = 0; i < sizeof other / sizeof other[0]; i++) LG_TRY(named_token(r, lg_json_get(r->config, other[i]), other[i], rows, &id));
    LG_TRY(named_token(r, lg_json_get(r->config, "pad_token"), "pad_token", rows, &r->t->pad));
    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++) {
        const lg_json *list = lg_json_get(r->config, lists[i]);
        for (int64_t k = 0; lg_json_typeof(list) == LG_JSON_ARRAY && k < lg_json_size(list); k++)
            LG_TRY(named_token(r, lg_json_at(list, k), lists[i], rows, &id));
    }
done:
    return st;
}

/* add_bos_token and add_eos_token, where written, replace the post-processor (transformers 5). */
static lg_status explicit_ends(reader *r) {
    lg_status st = LG_OK;
    const lg_json *b = lg_json_get(r->config, "add_bos_token"), *e = lg_json_get(r->config, "add_eos_token");
    bool bos, eos;
    if (absent(b) && absent(e)) return LG_OK;
    LG_TRY(flag(r, r->config, "add_bos_token", false, &bos));
    LG_TRY(flag(r, r->config, "add_eos_token", false, &eos));
    r->t->prefix.n = r->t->suffix.n = 0;
    if ((bos && r->t->bos >= 0 && !lg_base_ids_push(&r->t->prefix, r->t->bos)) || (eos && r->t->eos >= 0 && !lg_base_ids_push(&r->t->suffix, r->t->eos)))
        LG_TRY(no_memory(r));
done:
    return st;
}

static lg_status read_config(reader *r, int64_t rows) {
    lg_status st = LG_OK;
    bool prefix_space;
    if (!exists(r, "tokenizer_config.json")) return LG_OK;
    LG_TRY(lg_json_load(&r->config, r->path, MAX_CONFIG, r->err));
    lg_json_each(lg_json_get(r->config, "added_tokens_decoder"), put_added_decoder, r);
    LG_TRY(r->st);
    LG_TRY(lg_text_build_index(r->t, r->err));
    LG_TRY(flag(r, r->config, "add_prefix_space", false, &prefix_space));
    if (prefix_space) return bad(r, LG_ERR_UNSUPPORTED, "add_prefix_space", "true is not supported");
    LG_TRY(named_tokens(r, rows));
    LG_TRY(explicit_ends(r));
done:
    return st;
}

/* ---- the other files ---- */
static lg_status generation_id(reader *r, const lg_json *v, const char *key, int32_t *out) {
    int64_t id;
    if (!lg_json_int(v, &id) || id < 0 || id >= r->t->n_vocab) return bad(r, LG_ERR_FORMAT, key, "is no token id");
    *out = (int32_t)id;
    return LG_OK;
}

static lg_status read_generation(reader *r) {
    lg_status st = LG_OK;
    int32_t id = -1;
    if (!lg_text_add_stop(r->t, r->t->eos)) return no_memory(r);
    if (!exists(r, "generation_config.json")) return LG_OK;
    LG_TRY(lg_json_load(&r->generation, r->path, MAX_CONFIG, r->err));
    const lg_json *eos = lg_json_get(r->generation, "eos_token_id"), *bos = lg_json_get(r->generation, "bos_token_id"),
                  *pad = lg_json_get(r->generation, "pad_token_id");
    bool list = lg_json_typeof(eos) == LG_JSON_ARRAY;
    for (int64_t i = 0; !absent(eos) && i < (list ? lg_json_size(eos) : 1); i++) {
        LG_TRY(generation_id(r, list ? lg_json_at(eos, i) : eos, "eos_token_id", &id));
        if (!lg_text_add_stop(r->t, id)) LG_TRY(no_memory(r));
    }
    if (r->t->eos < 0 && r->t->stop.n > 0) r->t->eos = r->t->stop.data[0];
    if (r->t->bos < 0 && !absent(bos)) LG_TRY(generation_id(r, bos, "bos_token_id", &r->t->bos));
    if (r->t->pad < 0 && !absent(pad)) LG_TRY(generation_id(r, pad, "pad_token_id", &r->t->pad));
done:
    return st;
}

/* Rows of the model's output matrix: tokens past the tokenizer's own are padding. */
static lg_status read_rows(reader *r, int64_t *rows) {
    lg_status st = LG_OK;
    *rows = -1;
    if (!exists(r, "config.json")) return LG_OK;
    LG_TRY(lg_json_load(&r->model, r->path, MAX_CONFIG, r->err));
    const lg_json *v = lg_json_get(r->model, "vocab_size");
    if (absent(v)) return LG_OK;
    if (!lg_json_int(v, rows) || *rows < 1) return bad(r, LG_ERR_FORMAT, "vocab_size", "is no count");
    if (*rows > LG_TEXT_MAX_VOCAB) return bad(r, LG_ERR_LIMIT, "vocab_size", "is too large");
done:
    return st;
}

static lg_status read_chat(reader *r) {
    lg_status st = LG_OK;
    lg_text file = { 0 };
    lg_json *legacy = NULL;
    int64_t n;
    const char *s = NULL;
    if (exists(r, "chat_template.jinja")) {
        LG_TRY(lg_file_read_all(&file, r->path, MAX_CONFIG, r->err));
        LG_TRY(lg_text_read_template(r->t, file.data, file.n, r->err));
        goto done;
    }
    const lg_json *v = lg_json_get(r->config, "chat_template");
    if (absent(v) && exists(r, "chat_template.json")) {
        LG_TRY(lg_json_load(&legacy, r->path, MAX_CONFIG, r->err));
        v = lg_json_get(legacy, "chat_template");
    }
    s = lg_json_str(v, &n);
    for (int64_t i = 0; !s && i < lg_json_size(v); i++) /* [{"name":"default","template":"..."}, ...] */
        if (is_str(lg_json_get(lg_json_at(v, i), "name"), "default")) s = lg_json_str(lg_json_get(lg_json_at(v, i), "template"), &n);
    if (s) LG_TRY(lg_text_read_template(r->t, s, n, r->err));
done:
    lg_text_free(&file);
    lg_json_free(legacy);
    return st;
}

lg_status lg_text_from_folder(lg_tokenizer **out, const char *folder, lg_error *err) {
    lg_status st = LG_OK;
    int64_t rows;
    *out = NULL;
    reader *r = lg_base_alloc(sizeof *r);
    if (!r) return lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory", folder);
    r->folder = folder;
    r->err = err;
    set_path(r, "tokenizer.json");
    r->t = lg_text_new(r->path);
    if (!r->t) LG_TRY(no_memory(r));
    LG_TRY(read_rows(r, &rows));
    if (rows >= 0) r->t->max_vocab = rows;
    LG_TRY(read_tokenizer_json(r));
    LG_TRY(read_config(r, rows));
    if (rows > r->t->n_vocab) LG_TRY(lg_text_put_token(r->t, rows - 1, "", 0, LG_KIND_UNUSED, err));
    LG_TRY(lg_text_build(r->t, err));
    LG_TRY(read_generation(r));
    LG_TRY(read_chat(r));
    *out = r->t;
    r->t = NULL;
done:
    lg_text_close(r->t);
    lg_json_free(r->json);
    lg_json_free(r->config);
    lg_json_free(r->generation);
    lg_json_free(r->model);
    lg_base_free(r);
    return st;
}
