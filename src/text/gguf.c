/* gguf: the tokenizer in GGUF metadata, both ways. The standard keys say everything llama.cpp reads; what they
 * cannot say goes into keys longan.tokenizer.*, written only where it differs from what the standard keys imply,
 * so that a converted model gives the same ids as its folder. */
#include <string.h>

#include "text/room.h"

enum { TYPE_NORMAL = 1, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER, TYPE_UNUSED, TYPE_BYTE };
enum { GGUF_STRING = 8 };
static const char source[] = "GGUF metadata";

static lg_status bad(lg_error *err, lg_status code, const char *key, const char *why) {
    return lg_base_fail(err, code, -1, "%s: %s: %s", source, key, why);
}

/* ---- reading ---- */
static lg_status read_tokens(lg_tokenizer *t, const lg_gguf *g, lg_error *err) {
    static const char key[] = "tokenizer.ggml.tokens", types[] = "tokenizer.ggml.token_type";
    lg_status st = LG_OK;
    int32_t elem;
    int64_t n, n_type = -1;
    if (!lg_gguf_array(g, key, &elem, &n) || elem != GGUF_STRING || n < 1) return bad(err, LG_ERR_FORMAT, key, "no array of strings");
    if (n > LG_TEXT_MAX_VOCAB) return bad(err, LG_ERR_LIMIT, key, "too many tokens");
    if (lg_gguf_has(g, types) && (!lg_gguf_array(g, types, &elem, &n_type) || n_type != n))
        return bad(err, LG_ERR_FORMAT, types, "no array as long as the tokens");
    for (int64_t i = 0; i < n; i++) {
        const char *s;
        int64_t len, type = TYPE_NORMAL;
        if (!lg_gguf_array_str(g, key, i, &s, &len)) return bad(err, LG_ERR_FORMAT, key, "unreadable string");
        if (n_type >= 0 && !lg_gguf_array_int(g, types, i, &type)) return bad(err, LG_ERR_FORMAT, types, "no integers");
        switch (type) {
        case TYPE_NORMAL: LG_TRY(lg_text_put_token(t, i, s, len, LG_KIND_NORMAL, err)); break;
        case TYPE_UNUSED: LG_TRY(lg_text_put_token(t, i, s, len, LG_KIND_UNUSED, err)); break;
        case TYPE_UNKNOWN:
        case TYPE_CONTROL: LG_TRY(lg_text_put_added(t, i, s, len, true, 0, err)); break;
        case TYPE_USER: LG_TRY(lg_text_put_added(t, i, s, len, false, 0, err)); break;
        default:
            return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: %s[%lld]: token type %lld is not supported", source, types, (long long)i,
                                (long long)type);
        }
    }
done:
    return st;
}

static lg_status read_merges(lg_tokenizer *t, const lg_gguf *g, lg_error *err) {
    static const char key[] = "tokenizer.ggml.merges";
    lg_status st = LG_OK;
    int32_t elem;
    int64_t n;
    if (!lg_gguf_array(g, key, &elem, &n) || (n > 0 && elem != GGUF_STRING)) return bad(err, LG_ERR_FORMAT, key, "no array of strings");
    if (n > LG_TEXT_MAX_VOCAB) return bad(err, LG_ERR_LIMIT, key, "too many merges");
    for (int64_t i = 0; i < n; i++) {
        const char *s, *cut;
        int64_t len;
        if (!lg_gguf_array_str(g, key, i, &s, &len)) return bad(err, LG_ERR_FORMAT, key, "unreadable string");
        cut = len > 1 ? memchr(s + 1, ' ', (size_t)len - 1) : NULL;
        if (!cut || cut == s + len - 1)
            return lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: %s[%lld] is no pair", source, key, (long long)i);
        LG_TRY(lg_text_put_merge(t, i, s, cut - s, cut + 1, s + len - cut - 1, err));
    }
done:
    return st;
}

static lg_status read_id(int32_t *out, const lg_tokenizer *t, const lg_gguf *g, const char *key, lg_error *err) {
    int64_t v;
    if (!lg_gguf_has(g, key)) return LG_OK;
    if (!lg_gguf_int(g, key, &v)) return bad(err, LG_ERR_FORMAT, key, "no integer");
    if (v < 0 || v >= t->n_vocab) return bad(err, LG_ERR_FORMAT, key, "outside the vocabulary");
    *out = (int32_t)v;
    return LG_OK;
}

static lg_status read_bool(bool *out, const lg_gguf *g, const char *key, lg_error *err) {
    if (!lg_gguf_has(g, key)) return LG_OK;
    return lg_gguf_bool(g, key, out) ? LG_OK : bad(err, LG_ERR_FORMAT, key, "no boolean");
}

static lg_status read_ids(lg_ids *out, const lg_tokenizer *t, const lg_gguf *g, const char *key, lg_error *err) {
    int32_t elem;
    int64_t n, v;
    if (!lg_gguf_has(g, key)) return LG_OK;
    if (!lg_gguf_array(g, key, &elem, &n)) return bad(err, LG_ERR_FORMAT, key, "no array");
    out->n = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!lg_gguf_array_int(g, key, i, &v) || v < 0 || v >= t->n_vocab) return bad(err, LG_ERR_FORMAT, key, "no token ids");
        if (!lg_base_ids_push(out, (int32_t)v)) return bad(err, LG_ERR_NOMEM, key, "no memory");
    }
    return LG_OK;
}

static lg_status read_flags(lg_tokenizer *t, const lg_gguf *g, lg_error *err) { /* id, flags, id, flags, ... */
    static const char key[] = "longan.tokenizer.added_flags";
    int32_t elem;
    int64_t n, id, flags;
    if (!lg_gguf_has(g, key)) return LG_OK;
    if (!lg_gguf_array(g, key, &elem, &n) || n % 2) return bad(err, LG_ERR_FORMAT, key, "no array of pairs");
    for (int64_t i = 0; i < n; i += 2) {
        if (!lg_gguf_array_int(g, key, i, &id) || !lg_gguf_array_int(g, key, i + 1, &flags) || id < 0 || id >= t->n_vocab || flags < 0 ||
            flags > 15)
            return bad(err, LG_ERR_FORMAT, key, "no pairs of id and flags");
        t->token[id].flags = (uint8_t)flags;
    }
    return LG_OK;
}

static lg_status read_behaviour(lg_tokenizer *t, const lg_gguf *g, lg_error *err) {
    lg_status st = LG_OK;
    const char *s;
    int64_t n;
    bool add_bos, add_eos = false, prefix_space = false;
    if (!lg_gguf_str(g, "tokenizer.ggml.pre", &s, &n))
        return bad(err, LG_ERR_UNSUPPORTED, "tokenizer.ggml.pre", "absent: the pre-tokenizer is unknown");
    LG_TRY(lg_text_set_pre(t, s, "tokenizer.ggml.pre", err));
    LG_TRY(read_bool(&prefix_space, g, "tokenizer.ggml.add_space_prefix", err));
    if (prefix_space) return bad(err, LG_ERR_UNSUPPORTED, "tokenizer.ggml.add_space_prefix", "true is not supported");
    LG_TRY(read_id(&t->bos, t, g, "tokenizer.ggml.bos_token_id", err));
    LG_TRY(read_id(&t->eos, t, g, "tokenizer.ggml.eos_token_id", err));
    LG_TRY(read_id(&t->eot, t, g, "tokenizer.ggml.eot_token_id", err));
    LG_TRY(read_id(&t->pad, t, g, "tokenizer.ggml.padding_token_id", err));
    add_bos = !strcmp(t->pre, "llama-bpe") && t->bos >= 0; /* older files of Llama 3 lack the key */
    LG_TRY(read_bool(&add_bos, g, "tokenizer.ggml.add_bos_token", err));
    LG_TRY(read_bool(&add_eos, g, "tokenizer.ggml.add_eos_token", err));
    if (add_bos && t->bos < 0) return bad(err, LG_ERR_FORMAT, "tokenizer.ggml.add_bos_token", "true, but there is no bos token");
    if (add_eos && t->eos < 0) return bad(err, LG_ERR_FORMAT, "tokenizer.ggml.add_eos_token", "true, but there is no eos token");
    if ((add_bos && !lg_base_ids_push(&t->prefix, t->bos)) || (add_eos && !lg_base_ids_push(&t->suffix, t->eos)))
        return bad(err, LG_ERR_NOMEM, "tokenizer.ggml", "no memory");
    LG_TRY(read_bool(&t->nfc, g, "longan.tokenizer.nfc", err));
    LG_TRY(read_bool(&t->ignore_merges, g, "longan.tokenizer.ignore_merges", err));
    LG_TRY(read_bool(&t->fuse_unk, g, "longan.tokenizer.fuse_unk", err));
    LG_TRY(read_id(&t->unk, t, g, "longan.tokenizer.unk_token_id", err));
    LG_TRY(read_ids(&t->prefix, t, g, "longan.tokenizer.prefix", err));
    LG_TRY(read_ids(&t->suffix, t, g, "longan.tokenizer.suffix", err));
    LG_TRY(read_flags(t, g, err));
done:
    return st;
}

static lg_status read_stops(lg_tokenizer *t, const lg_gguf *g, lg_error *err) {
    const char *end = lg_text_turn_end(t->chat.kind);
    if (t->eot < 0 && end) t->eot = lg_text_find(t, end, (int64_t)strlen(end));
    if (!lg_text_add_stop(t, t->eos) || !lg_text_add_stop(t, t->eot)) return bad(err, LG_ERR_NOMEM, "tokenizer.ggml", "no memory");
    return read_ids(&t->stop, t, g, "longan.tokenizer.stop_ids", err);
}

lg_status lg_text_from_gguf(lg_tokenizer **out, const lg_gguf *g, lg_error *err) {
    lg_status st = LG_OK;
    const char *s;
    int64_t n;
    *out = NULL;
    lg_tokenizer *t = lg_text_new(source);
    if (!t) return bad(err, LG_ERR_NOMEM, "tokenizer", "no memory");
    if (!lg_gguf_str(g, "tokenizer.ggml.model", &s, &n)) LG_TRY(bad(err, LG_ERR_FORMAT, "tokenizer.ggml.model", "absent: no tokenizer"));
    if (strcmp(s, "gpt2") != 0)
        LG_TRY(lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: tokenizer.ggml.model: \"%.40s\" is not supported (byte-level BPE, \"gpt2\", is)",
                            source, s));
    LG_TRY(read_tokens(t, g, err));
    LG_TRY(lg_text_build_index(t, err));
    LG_TRY(read_merges(t, g, err));
    LG_TRY(read_behaviour(t, g, err));
    LG_TRY(lg_text_build(t, err));
    if (lg_gguf_str(g, "tokenizer.chat_template", &s, &n)) LG_TRY(lg_text_read_template(t, s, n, err));
    LG_TRY(read_stops(t, g, err));
    *out = t;
    t = NULL;
done:
    lg_text_close(t);
    return st;
}

/* ---- writing ---- */
/* Does every token of the model come out of its own merges? Then ignore_merges changes nothing. */
static lg_status merges_reach_all(const lg_tokenizer *t, bool *all, lg_error *err) {
    lg_status st = LG_OK;
    lg_ids ids = { 0 };
    lg_text_work *w = NULL;
    *all = true;
    LG_TRY(lg_text_work_new(&w, t, 0, 0, &ids, err));
    for (int64_t i = 0; *all && i < t->n_vocab; i++) {
        const lg_token *k = &t->token[i];
        if (k->kind != LG_KIND_NORMAL || k->bytes == k->str) continue; /* no word has the bytes of such a token */
        ids.n = 0;
        LG_TRY(lg_text_word_alone(w, t->arena.data + k->bytes, k->n_bytes, err));
        *all = ids.n == 1 && ids.data[0] == i;
    }
done:
    lg_text_work_free(w);
    lg_ids_free(&ids);
    return st;
}

static lg_status check_writable(const lg_tokenizer *t, bool *nfc, lg_error *err) {
    lg_status st = LG_OK;
    bool ignore = false, all = true;
    if (!lg_text_pre_default(t->pre, nfc, &ignore))
        return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: the pre-tokenizer has no name in GGUF", t->source);
    if (ignore != t->ignore_merges) {
        LG_TRY(merges_reach_all(t, &all, err));
        if (!all)
            LG_TRY(lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: model.ignore_merges: GGUF cannot say %s for the pre-tokenizer %s", t->source,
                                t->ignore_merges ? "true" : "false", t->pre));
    }
done:
    return st;
}

static lg_status write_tokens(const lg_tokenizer *t, lg_gguf_out *o, lg_error *err) {
    static const int32_t type_of[] = { [LG_KIND_UNUSED] = TYPE_UNUSED, [LG_KIND_NORMAL] = TYPE_NORMAL, [LG_KIND_ADDED] = TYPE_USER,
                                       [LG_KIND_SPECIAL] = TYPE_CONTROL };
    lg_status st = LG_OK;
    lg_text names = { 0 };
    const char **s = lg_base_calloc(t->n_vocab, sizeof *s);
    int64_t *len = lg_base_calloc(t->n_vocab, sizeof *len), *at = lg_base_calloc(t->n_vocab, sizeof *at);
    int32_t *type = lg_base_calloc(t->n_vocab, sizeof *type);
    bool ok = s && len && at && type;
    for (int64_t i = 0; ok && i < t->n_vocab; i++) {
        const lg_token *k = &t->token[i];
        type[i] = type_of[k->kind];
        at[i] = names.n;
        ok = k->n_str > 0 || k->kind != LG_KIND_UNUSED ? lg_base_text_append(&names, t->arena.data + k->str, k->n_str)
                                                       : lg_base_text_printf(&names, "[PAD%lld]", (long long)i);
        len[i] = names.n - at[i];
    }
    if (!ok) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory", t->source));
    for (int64_t i = 0; i < t->n_vocab; i++) s[i] = names.data + at[i];
    LG_TRY(lg_gguf_put_str_array(o, "tokenizer.ggml.tokens", s, len, t->n_vocab, err));
    LG_TRY(lg_gguf_put_int_array(o, "tokenizer.ggml.token_type", type, t->n_vocab, err));
done:
    lg_text_free(&names);
    lg_base_free(s);
    lg_base_free(len);
    lg_base_free(at);
    lg_base_free(type);
    return st;
}

static lg_status write_merges(const lg_tokenizer *t, lg_gguf_out *o, lg_error *err) {
    lg_status st = LG_OK;
    lg_text all = { 0 };
    int64_t n = t->n_merge;
    const char **s = lg_base_calloc(n + 1, sizeof *s);
    int64_t *len = lg_base_calloc(n + 1, sizeof *len), *at = lg_base_calloc(n + 1, sizeof *at);
    bool ok = s && len && at && lg_base_text_append(&all, "", 0);
    for (int64_t i = 0; ok && i < n; i++) {
        const lg_token *l = &t->token[t->listed[i].left], *r = &t->token[t->listed[i].right];
        at[i] = all.n;
        ok = lg_base_text_append(&all, t->arena.data + l->str, l->n_str) && lg_base_text_append(&all, " ", 1) &&
             lg_base_text_append(&all, t->arena.data + r->str, r->n_str);
        len[i] = all.n - at[i];
    }
    if (!ok) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory", t->source));
    for (int64_t i = 0; i < n; i++) s[i] = all.data + at[i];
    LG_TRY(lg_gguf_put_str_array(o, "tokenizer.ggml.merges", s, len, n, err));
done:
    lg_text_free(&all);
    lg_base_free(s);
    lg_base_free(len);
    lg_base_free(at);
    return st;
}

static lg_status write_id(lg_gguf_out *o, const char *key, int32_t id, lg_error *err) {
    return id >= 0 ? lg_gguf_put_int(o, key, id, err) : LG_OK;
}

static lg_status write_flags(const lg_tokenizer *t, lg_gguf_out *o, lg_error *err) {
    lg_ids pairs = { 0 };
    lg_status st = LG_OK;
    for (int64_t i = 0; i < t->n_vocab; i++)
        if (t->token[i].flags && (!lg_base_ids_push(&pairs, (int32_t)i) || !lg_base_ids_push(&pairs, t->token[i].flags)))
            LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory", t->source));
    if (pairs.n > 0) LG_TRY(lg_gguf_put_int_array(o, "longan.tokenizer.added_flags", pairs.data, pairs.n, err));
done:
    lg_ids_free(&pairs);
    return st;
}

static bool is_one(const lg_ids *a, int32_t id) { return a->n == 1 && a->data[0] == id; }

static lg_status write_own(const lg_tokenizer *t, bool nfc, int32_t eot, lg_gguf_out *o, lg_error *err) {
    lg_status st = LG_OK;
    bool dropped = false, usual = true;
    for (int b = 0; b < 256; b++) dropped |= t->byte_id[b] < 0;
    for (int64_t i = 0; i < t->stop.n; i++) usual &= t->stop.data[i] == t->eos || t->stop.data[i] == eot;
    if (nfc != t->nfc) LG_TRY(lg_gguf_put_bool(o, "longan.tokenizer.nfc", t->nfc, err));
    if (dropped && t->unk >= 0) {
        LG_TRY(lg_gguf_put_int(o, "longan.tokenizer.unk_token_id", t->unk, err));
        LG_TRY(lg_gguf_put_bool(o, "longan.tokenizer.fuse_unk", t->fuse_unk, err));
    }
    if (t->prefix.n > 0 && !is_one(&t->prefix, t->bos))
        LG_TRY(lg_gguf_put_int_array(o, "longan.tokenizer.prefix", t->prefix.data, t->prefix.n, err));
    if (t->suffix.n > 0 && !is_one(&t->suffix, t->eos))
        LG_TRY(lg_gguf_put_int_array(o, "longan.tokenizer.suffix", t->suffix.data, t->suffix.n, err));
    if (!usual || t->stop.n != (t->eos >= 0) + (eot >= 0 && eot != t->eos))
        LG_TRY(lg_gguf_put_int_array(o, "longan.tokenizer.stop_ids", t->stop.data, t->stop.n, err));
    LG_TRY(write_flags(t, o, err));
done:
    return st;
}

lg_status lg_text_to_gguf(const lg_tokenizer *t, lg_gguf_out *o, lg_error *err) {
    lg_status st = LG_OK;
    bool nfc = false;
    const char *end = lg_text_turn_end(t->chat.kind);
    int32_t eot = t->eot >= 0 || !end ? t->eot : lg_text_find(t, end, (int64_t)strlen(end));
    LG_TRY(check_writable(t, &nfc, err));
    LG_TRY(lg_gguf_put_str(o, "tokenizer.ggml.model", "gpt2", 4, err));
    LG_TRY(lg_gguf_put_str(o, "tokenizer.ggml.pre", t->pre, (int64_t)strlen(t->pre), err));
    LG_TRY(write_tokens(t, o, err));
    LG_TRY(write_merges(t, o, err));
    LG_TRY(write_id(o, "tokenizer.ggml.bos_token_id", t->bos, err));
    LG_TRY(write_id(o, "tokenizer.ggml.eos_token_id", t->eos, err));
    LG_TRY(write_id(o, "tokenizer.ggml.eot_token_id", eot, err));
    LG_TRY(write_id(o, "tokenizer.ggml.padding_token_id", t->pad, err));
    LG_TRY(lg_gguf_put_bool(o, "tokenizer.ggml.add_bos_token", is_one(&t->prefix, t->bos), err));
    LG_TRY(lg_gguf_put_bool(o, "tokenizer.ggml.add_eos_token", is_one(&t->suffix, t->eos), err));
    if (t->template_text)
        LG_TRY(lg_gguf_put_str(o, "tokenizer.chat_template", t->template_text, (int64_t)strlen(t->template_text), err));
    LG_TRY(write_own(t, nfc, eot, o, err));
done:
    return st;
}
