/* split: pre-tokenizers, the regular expressions that cut text into words before merging. The only file that
 * knows PCRE2. Expressions come in the syntax of the reference (Oniguruma); they are translated, not passed on,
 * because classes differ: \s there is White_Space, \p{..} there is a newer Unicode. What the translation does not
 * know is refused. A stage isolates its matches: matches and what lies between both become pieces for the next
 * stage. "Digits" followed by the GPT-2 expression (SmolLM, StarCoder) is one stage: see lg_text_fuse_stages. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <string.h>

#include "text/room.h"
#include "text/unicode.h"

const char lg_text_gpt2_regex[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char lg_text_llama3_regex[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
                                    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const char lg_text_qwen2_regex[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
                                   "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char digit_regex[] = "\\p{Numeric}", digits_regex[] = "\\p{Numeric}+";
/* Isolated digits, then GPT-2, in one: a digit ends its neighbours as the end of the text does. */
static const char digit_gpt2_regex[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+|\\p{Numeric}| ?[^\\s\\p{L}\\p{Numeric}]+|"
                                       "\\s+(?![^\\s\\p{Numeric}])|\\s+";

static const char white_space[] = "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";

struct lg_regex { pcre2_code *code; };

/* ---- memory through base ---- */
static void *pcre_alloc(size_t n, void *user) { (void)user; return lg_base_alloc((int64_t)n); }
static void pcre_free(void *p, void *user) { (void)user; lg_base_free(p); }

/* ---- translation ---- */
typedef struct reader { const char *s; int64_t n, i; lg_text out; const char *source, *where; lg_error *err; } reader;

static lg_status refuse(reader *r, const char *what) {
    return lg_base_fail(r->err, LG_ERR_UNSUPPORTED, -1, "%s: %s: regular expression, byte %lld: %s is not supported", r->source,
                        r->where, (long long)r->i, what);
}

static lg_status put(reader *r, const char *s, int64_t n) {
    return lg_base_text_append(&r->out, s, n) ? LG_OK : lg_base_fail(r->err, LG_ERR_NOMEM, -1, "%s: no memory", r->source);
}

static lg_status put_str(reader *r, const char *s) { return put(r, s, (int64_t)strlen(s)); }

/* \p{Name}, \s, \S, \d and escaped characters, inside or outside of brackets. */
static lg_status escape(reader *r, bool in_class) {
    lg_status st = LG_OK;
    char c = r->i + 1 < r->n ? r->s[r->i + 1] : 0;
    char name[16] = "";
    if (c == 'p' && r->i + 2 < r->n && r->s[r->i + 2] == '{') {
        int64_t k = r->i + 3, j = 0;
        while (k < r->n && r->s[k] != '}' && j < 15) name[j++] = r->s[k++];
        if (k >= r->n || r->s[k] != '}') return refuse(r, "this property");
        r->i = k + 1;
    } else if (c == 'd') {
        memcpy(name, "Nd", 3);
        r->i += 2;
    } else if (c == 's' || (c == 'S' && !in_class)) {
        if (!in_class) LG_TRY(put_str(r, c == 's' ? "[" : "[^"));
        LG_TRY(put_str(r, white_space));
        if (!in_class) LG_TRY(put_str(r, "]"));
        r->i += 2;
        return LG_OK;
    } else if (c == 'r' || c == 'n' || c == 't' || (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
               (c >= '{' && c <= '~')) {
        LG_TRY(put(r, r->s + r->i, 2));
        r->i += 2;
        return LG_OK;
    } else return refuse(r, "this escape");
    for (const lg_text_class *k = lg_text_classes; k->name; k++) {
        if (strcmp(k->name, name) != 0) continue;
        if (!in_class) LG_TRY(put_str(r, "["));
        LG_TRY(put_str(r, "\\p{"));
        LG_TRY(put_str(r, k->base));
        LG_TRY(put_str(r, "}"));
        LG_TRY(put_str(r, k->more));
        if (!in_class) LG_TRY(put_str(r, "]"));
        return LG_OK;
    }
    return refuse(r, "this property");
done:
    return st;
}

static lg_status bracket(reader *r) {
    lg_status st = LG_OK;
    LG_TRY(put(r, "[", 1));
    r->i++;
    if (r->i < r->n && r->s[r->i] == '^') {
        LG_TRY(put(r, "^", 1));
        r->i++;
    }
    for (bool first = true; r->i < r->n; first = false) {
        char c = r->s[r->i];
        if (c == ']' && !first) {
            r->i++;
            return put(r, "]", 1);
        }
        if (c == '[' || c == ']' || (c == '&' && r->i + 1 < r->n && r->s[r->i + 1] == '&')) return refuse(r, "this class");
        if (c == '\\') LG_TRY(escape(r, true));
        else {
            LG_TRY(put(r, &c, 1));
            r->i++;
        }
    }
    return refuse(r, "an open class");
done:
    return st;
}

static bool starts(const reader *r, const char *s) {
    int64_t n = (int64_t)strlen(s);
    return r->n - r->i >= n && !memcmp(r->s + r->i, s, (size_t)n);
}

static lg_status translate(reader *r) {
    static const char *const groups[] = { "(?:", "(?i:", "(?!", "(?=", "(?<!", "(?<=" };
    lg_status st = LG_OK;
    while (r->i < r->n) {
        char c = r->s[r->i];
        int64_t take = 1;
        if (c == '\\') {
            LG_TRY(escape(r, false));
            continue;
        }
        if (c == '[') {
            LG_TRY(bracket(r));
            continue;
        }
        if (c == '.' || c == '^' || c == '$' || c == ']' || c == 0) return refuse(r, "this character");
        if (c == '(') {
            bool known = !starts(r, "(?") && !starts(r, "(*");
            for (size_t g = 0; g < sizeof groups / sizeof groups[0]; g++)
                if (starts(r, groups[g])) known = true, take = (int64_t)strlen(groups[g]);
            if (!known) return refuse(r, "this group");
        } else if (c == '{') { /* {m}, {m,}, {m,n} */
            int64_t k = r->i + 1, digits = 0;
            while (k < r->n && r->s[k] >= '0' && r->s[k] <= '9') k++, digits++;
            if (k < r->n && r->s[k] == ',')
                for (k++; k < r->n && r->s[k] >= '0' && r->s[k] <= '9'; ) k++;
            if (!digits || k >= r->n || r->s[k] != '}' || (k + 1 < r->n && r->s[k + 1] == '+')) return refuse(r, "this count");
            take = k + 1 - r->i;
        } else if (c == '}') return refuse(r, "this character");
        LG_TRY(put(r, r->s + r->i, take));
        r->i += take;
    }
done:
    return st;
}

static lg_status compile(lg_regex **out, const lg_tokenizer *t, const char *s, int64_t n, const char *where, lg_error *err) {
    lg_status st = LG_OK;
    reader r = { .s = s, .n = n, .source = t->source, .where = where, .err = err };
    pcre2_general_context *g = NULL;
    pcre2_compile_context *cc = NULL;
    lg_regex *x = NULL;
    if (n > 4096) LG_TRY(lg_base_fail(err, LG_ERR_LIMIT, -1, "%s: %s: regular expression over 4096 bytes", t->source, where));
    LG_TRY(put_str(&r, "")); /* so that out.data stands */
    LG_TRY(translate(&r));
    g = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    cc = g ? pcre2_compile_context_create(g) : NULL;
    x = lg_base_alloc(sizeof *x);
    if (!cc || !x) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory", t->source));
    int code = 0;
    PCRE2_SIZE at = 0;
    x->code = pcre2_compile((PCRE2_SPTR)r.out.data, (PCRE2_SIZE)r.out.n, PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &at, cc);
    if (!x->code) {
        char why[128] = "";
        pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
        if (code == PCRE2_ERROR_HEAP_FAILED) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory", t->source));
        LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: %s: regular expression: %s", t->source, where, why));
    }
    /* Where the system allows no executable memory matching is interpreted: slower, equal, and said. */
    code = pcre2_jit_compile(x->code, PCRE2_JIT_COMPLETE);
    if (code == PCRE2_ERROR_NOMEMORY) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory", t->source));
    if (code) lg_base_log(LG_LOG_INFO, "%s: the pre-tokenizer is interpreted: PCRE2 cannot compile it here (%d)", t->source, code);
    *out = x;
    x = NULL;
done:
    lg_text_free(&r.out);
    if (cc) pcre2_compile_context_free(cc);
    if (g) pcre2_general_context_free(g);
    if (x && x->code) pcre2_code_free(x->code);
    lg_base_free(x);
    return st;
}

void lg_text_regex_free(lg_regex *r) {
    if (!r) return;
    pcre2_code_free(r->code);
    lg_base_free(r);
}

/* ---- stages ---- */
lg_status lg_text_add_stage(lg_tokenizer *t, const char *regex, int64_t n, const char *where, lg_error *err) {
    if (t->n_stage == LG_TEXT_MAX_STAGES)
        return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: %s: more than %d stages", t->source, where, LG_TEXT_MAX_STAGES);
    lg_stage *g = &t->stage[t->n_stage];
    lg_text copy = { 0 };
    if (!lg_base_text_append(&copy, regex, n) || !(g->source = lg_base_strdup(copy.data))) {
        lg_text_free(&copy);
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory", t->source);
    }
    lg_text_free(&copy);
    t->n_stage++;
    return compile(&g->regex, t, regex, n, where, err);
}

lg_status lg_text_add_digits(lg_tokenizer *t, bool individual, lg_error *err) {
    const char *s = individual ? digit_regex : digits_regex;
    return lg_text_add_stage(t, s, (int64_t)strlen(s), "Digits", err);
}

static void drop_stages(lg_tokenizer *t) {
    for (; t->n_stage > 0; t->n_stage--) {
        lg_text_regex_free(t->stage[t->n_stage - 1].regex);
        lg_base_free(t->stage[t->n_stage - 1].source);
        t->stage[t->n_stage - 1] = (lg_stage){ 0 };
    }
}

/* The names GGUF files give to whole pre-tokenizers. `same`: further names with the same meaning. */
static const struct pre {
    const char *name, *regex;
    bool nfc, ignore_merges;
    const char *same;
} pres[] = {
    { "smollm", digit_gpt2_regex, false, false, " starcoder refact command-r " },
    { "gpt-2", lg_text_gpt2_regex, false, false, " gpt2 mpt olmo " },
    { "llama-bpe", lg_text_llama3_regex, false, true, " llama3 llama-v3 " },
    { "qwen2", lg_text_qwen2_regex, true, false, " " },
};

lg_status lg_text_set_pre(lg_tokenizer *t, const char *name, const char *key, lg_error *err) {
    char padded[40] = " ";
    size_t n = strlen(name);
    if (n > 0 && n < 32) {
        memcpy(padded + 1, name, n);
        memcpy(padded + 1 + n, " ", 2);
    }
    for (size_t i = 0; n > 0 && n < 32 && !strchr(name, ' ') && i < sizeof pres / sizeof pres[0]; i++) {
        if (strcmp(pres[i].name, name) != 0 && !strstr(pres[i].same, padded)) continue;
        memcpy(t->pre, pres[i].name, strlen(pres[i].name) + 1);
        t->nfc = pres[i].nfc;
        t->ignore_merges = pres[i].ignore_merges;
        return lg_text_add_stage(t, pres[i].regex, (int64_t)strlen(pres[i].regex), key, err);
    }
    return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: %s: pre-tokenizer \"%.40s\" is not supported", t->source, key, name);
}

lg_status lg_text_fuse_stages(lg_tokenizer *t, lg_error *err) {
    if (t->n_stage == 2 && !strcmp(t->stage[0].source, digit_regex) && !strcmp(t->stage[1].source, lg_text_gpt2_regex)) {
        drop_stages(t);
        lg_status st = lg_text_add_stage(t, digit_gpt2_regex, (int64_t)strlen(digit_gpt2_regex), "pre_tokenizer", err);
        if (st != LG_OK) return st;
    }
    for (size_t i = 0; t->n_stage == 1 && i < sizeof pres / sizeof pres[0]; i++)
        if (!strcmp(t->stage[0].source, pres[i].regex)) memcpy(t->pre, pres[i].name, strlen(pres[i].name) + 1);
    return LG_OK;
}

bool lg_text_pre_default(const char *pre, bool *nfc, bool *ignore_merges) {
    for (size_t i = 0; i < sizeof pres / sizeof pres[0]; i++) {
        if (strcmp(pres[i].name, pre) != 0) continue;
        *nfc = pres[i].nfc;
        *ignore_merges = pres[i].ignore_merges;
        return true;
    }
    return false;
}

/* ---- matching ---- */
struct lg_splitter {
    const lg_tokenizer *t;
    pcre2_general_context *g;
    pcre2_match_context *mc;
    pcre2_match_data *md[LG_TEXT_MAX_STAGES];
    pcre2_jit_stack *stack;
    lg_piece_fn fn;
    void *user;
};

lg_status lg_text_splitter_new(lg_splitter **out, const lg_tokenizer *t, lg_error *err) {
    lg_splitter *sp = lg_base_alloc(sizeof *sp);
    *out = sp;
    bool ok = sp != NULL;
    if (ok) {
        sp->t = t;
        sp->g = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
        sp->mc = sp->g ? pcre2_match_context_create(sp->g) : NULL;
        ok = sp->mc != NULL;
    }
    for (int i = 0; ok && i < t->n_stage; i++) ok = (sp->md[i] = pcre2_match_data_create(1, sp->g)) != NULL;
    if (!ok) {
        lg_text_splitter_free(sp);
        *out = NULL;
        return lg_base_fail(err, LG_ERR_NOMEM, -1, "no memory to split text");
    }
    /* The known expressions need neither: these bound an expression that a hostile file brings. */
    pcre2_set_match_limit(sp->mc, 200u << 20);
    pcre2_set_heap_limit(sp->mc, 256u << 10); /* KiB, interpreted only */
    return LG_OK;
}

void lg_text_splitter_free(lg_splitter *sp) {
    if (!sp) return;
    for (int i = 0; i < LG_TEXT_MAX_STAGES; i++)
        if (sp->md[i]) pcre2_match_data_free(sp->md[i]);
    if (sp->stack) pcre2_jit_stack_free(sp->stack);
    if (sp->mc) pcre2_match_context_free(sp->mc);
    if (sp->g) pcre2_general_context_free(sp->g);
    lg_base_free(sp);
}

static int match_at(lg_splitter *sp, int stage, const char *s, int64_t n, int64_t from) {
    const pcre2_code *code = sp->t->stage[stage].regex->code;
    int rc = pcre2_match(code, (PCRE2_SPTR)s, (PCRE2_SIZE)n, (PCRE2_SIZE)from, PCRE2_NO_UTF_CHECK, sp->md[stage], sp->mc);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT && !sp->stack) { /* the machine stack's 32 KiB were not enough */
        sp->stack = pcre2_jit_stack_create(64 << 10, 16 << 20, sp->g);
        if (sp->stack) pcre2_jit_stack_assign(sp->mc, NULL, sp->stack);
        rc = pcre2_match(code, (PCRE2_SPTR)s, (PCRE2_SIZE)n, (PCRE2_SIZE)from, PCRE2_NO_UTF_CHECK, sp->md[stage], sp->mc);
    }
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(code, (PCRE2_SPTR)s, (PCRE2_SIZE)n, (PCRE2_SIZE)from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, sp->md[stage], sp->mc);
    return rc;
}

static lg_status split_stage(lg_splitter *sp, int stage, const char *s, int64_t n, lg_error *err) {
    if (n == 0) return LG_OK;
    if (stage == sp->t->n_stage) return sp->fn(sp->user, s, n, err);
    lg_status st = LG_OK;
    int64_t done_to = 0, from = 0;
    while (from < n) {
        int rc = match_at(sp, stage, s, n, from);
        if (rc == PCRE2_ERROR_NOMATCH) break;
        if (rc < 0)
            LG_TRY(lg_base_fail(err, rc == PCRE2_ERROR_NOMEMORY ? LG_ERR_NOMEM : LG_ERR_LIMIT, -1,
                                "%s: the pre-tokenizer's regular expression needs too much work on this text (PCRE2 error %d)",
                                sp->t->source, rc));
        const PCRE2_SIZE *v = pcre2_get_ovector_pointer(sp->md[stage]);
        int64_t a = (int64_t)v[0], b = (int64_t)v[1];
        if (b <= a) { /* an empty match cuts nothing: one code point on */
            int64_t len;
            lg_text_utf8_get(s + a, n - a > 0 ? n - a : 1, &len);
            from = a + len;
            continue;
        }
        LG_TRY(split_stage(sp, stage + 1, s + done_to, a - done_to, err));
        LG_TRY(split_stage(sp, stage + 1, s + a, b - a, err));
        done_to = from = b;
    }
    LG_TRY(split_stage(sp, stage + 1, s + done_to, n - done_to, err));
done:
    return st;
}

lg_status lg_text_split(lg_splitter *sp, const char *s, int64_t n, lg_piece_fn fn, void *user, lg_error *err) {
    sp->fn = fn;
    sp->user = user;
    return split_stage(sp, 0, s, n, err);
}
