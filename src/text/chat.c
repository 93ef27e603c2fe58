/* chat: turns to ids. A chat template is a Jinja program; it is not run. Its string literals and raw text are
 * collected, the family is recognised by its marker tokens, and what varies inside a family (default system
 * turn, trimming, the text behind the generation prompt) is read from the same literals. Markers become their
 * ids directly; everything between two markers is one run of ordinary text, so that words meet as they do in
 * the rendered string while no content can forge a marker. */
#include <string.h>

#include "text/room.h"

enum { MAX_TEMPLATE = 1 << 20 };

static const struct family {
    const char *name, *open, *close, *head_end; /* open role head_end content close */
} families[] = {
    [LG_CHAT_NONE] = { "", "", "", "" },
    [LG_CHAT_CHATML] = { "chatml", "<|im_start|>", "<|im_end|>", "\n" },
    [LG_CHAT_LLAMA3] = { "llama3", "<|start_header_id|>", "<|eot_id|>", "<|end_header_id|>" },
    [LG_CHAT_QWEN] = { "qwen", "<|im_start|>", "<|im_end|>", "\n" },
    [LG_CHAT_BARE] = { "", "", "", "" },
};

void lg_text_chat_free(lg_chat *c) {
    lg_base_free(c->system);
    lg_base_free(c->system_head);
    lg_base_free(c->prompt);
    *c = (lg_chat){ 0 };
}

const char *lg_text_turn_end(lg_chat_kind k) { return families[k].close[0] ? families[k].close : NULL; }
const char *lg_text_chat_format(const lg_tokenizer *t) { return families[t->chat.kind].name; }

/* ---- reading a template ---- */
typedef struct literal { int64_t at, from, n; } literal; /* at: in the template; from, n: in text */
typedef struct scan {
    const char *s;
    int64_t n;
    lg_text text, code; /* code: the template with all literals and raw text left out */
    literal *lit;
    int64_t n_lit, cap;
} scan;

static bool add_literal(scan *c, int64_t at, int64_t from) {
    if (c->n_lit == c->cap) {
        int64_t cap = c->cap * 2 + 64;
        literal *l = lg_base_realloc(c->lit, c->cap * (int64_t)sizeof *l, cap * (int64_t)sizeof *l);
        if (!l) return false;
        c->lit = l;
        c->cap = cap;
    }
    c->lit[c->n_lit++] = (literal){ at, from, c->text.n - from };
    return lg_base_text_append(&c->text, "\0", 1); /* so that each literal ends as a string too */
}

/* A quoted literal from its quote on; returns the offset behind it, -1: no memory. */
static int64_t scan_quoted(scan *c, int64_t i) {
    char quote = c->s[i];
    int64_t at = i++, from = c->text.n;
    bool ok = true;
    for (; ok && i < c->n && c->s[i] != quote; i++) {
        char ch = c->s[i];
        if (ch == '\\' && i + 1 < c->n) {
            ch = c->s[++i];
            if (ch == 'n') ch = '\n';
            else if (ch == 't') ch = '\t';
            else if (ch == 'r') ch = '\r';
        }
        ok = lg_base_text_append(&c->text, &ch, 1);
    }
    return ok && add_literal(c, at, from) ? i + 1 : -1;
}

static bool scan_template(scan *c) {
    bool ok = lg_base_text_append(&c->text, "", 0) && lg_base_text_append(&c->code, "", 0);
    for (int64_t i = 0; ok && i < c->n; ) {
        int64_t k = i; /* raw text up to the next tag */
        while (k < c->n && !(c->s[k] == '{' && k + 1 < c->n && strchr("{%#", c->s[k + 1]) && c->s[k + 1])) k++;
        if (k > i) {
            int64_t from = c->text.n;
            ok = lg_base_text_append(&c->text, c->s + i, k - i) && add_literal(c, i, from);
        }
        if (k >= c->n) break;
        char end = c->s[k + 1] == '{' ? '}' : c->s[k + 1];
        bool comment = end == '#';
        for (i = k + 2; ok && i < c->n && !(c->s[i] == end && i + 1 < c->n && c->s[i + 1] == '}'); ) {
            if (!comment && (c->s[i] == '\'' || c->s[i] == '"')) {
                i = scan_quoted(c, i);
                ok = i >= 0;
            } else {
                if (!comment) ok = lg_base_text_append(&c->code, c->s + i, 1);
                i++;
            }
        }
        i += 2;
    }
    return ok;
}

static const char *lit_text(const scan *c, int64_t i) { return c->text.data + c->lit[i].from; }

static bool any_has(const scan *c, const char *what) {
    for (int64_t i = 0; i < c->n_lit; i++)
        if (strstr(lit_text(c, i), what)) return true;
    return false;
}

/* Is the literal the right side of "set NAME ="? */
static bool is_set(const scan *c, int64_t i, const char *name) {
    int64_t k = c->lit[i].at, n = (int64_t)strlen(name);
    if (c->s[k] != '\'' && c->s[k] != '"') return false;
    while (k > 0 && c->s[k - 1] == ' ') k--;
    if (k == 0 || c->s[--k] != '=') return false;
    while (k > 0 && c->s[k - 1] == ' ') k--;
    return k > n + 4 && !memcmp(c->s + k - n, name, (size_t)n) && !memcmp(c->s + k - n - 4, "set ", 4);
}

static bool code_trims(const scan *c) {
    for (const char *p = c->code.data; (p = strchr(p, '|')); ) {
        for (p++; *p == ' '; ) p++;
        if (!strncmp(p, "trim", 4)) return true;
    }
    return false;
}

static bool keep(char **out, const char *s, int64_t n) {
    lg_text copy = { 0 };
    bool ok = lg_base_text_append(&copy, s, n);
    lg_base_free(*out);
    *out = ok ? lg_base_strdup(copy.data) : NULL;
    lg_text_free(&copy);
    return *out != NULL;
}

/* Default system turn: one literal that holds the whole turn, or a default set to a variable. */
static bool read_system(lg_chat *chat, const scan *c) {
    const struct family *f = &families[chat->kind];
    char head[64];
    size_t n = 0;
    for (const char *const *p = (const char *const[]){ f->open, "system", f->head_end, chat->kind == LG_CHAT_LLAMA3 ? "\n\n" : "", NULL }; *p; p++) {
        memcpy(head + n, *p, strlen(*p) + 1);
        n += strlen(*p);
    }
    for (int64_t i = 0; i < c->n_lit; i++) {
        const char *a = strstr(lit_text(c, i), head), *b = a ? strstr(a + n, f->close) : NULL;
        if (b && b > a + n) return keep(&chat->system, a + n, b - a - (int64_t)n);
    }
    for (int64_t i = 0; i < c->n_lit; i++)
        if (is_set(c, i, "system_message") && c->lit[i].n > 0) return keep(&chat->system, lit_text(c, i), c->lit[i].n);
    return true;
}

/* Llama 3.1 and later begin every conversation with a system turn that opens with two dates. Today's date is the
 * one the template falls back to: prompts must not change from day to day. */
static bool read_dates(lg_chat *chat, const scan *c) {
    int64_t cut = -1, today = -1, date = -1;
    for (int64_t i = 0; i < c->n_lit; i++) {
        if (!strncmp(lit_text(c, i), "Cutting Knowledge Date: ", 24)) cut = i;
        if (!strcmp(lit_text(c, i), "Today Date: ")) today = i;
        if (is_set(c, i, "date_string")) date = i;
    }
    if (cut < 0 || today < 0 || date < 0) return true;
    lg_text head = { 0 };
    bool ok = lg_base_text_append(&head, lit_text(c, cut), c->lit[cut].n) && lg_base_text_append(&head, lit_text(c, today), c->lit[today].n) &&
              lg_base_text_append(&head, lit_text(c, date), c->lit[date].n) && lg_base_text_append(&head, "\n\n", 2) &&
              keep(&chat->system_head, head.data, head.n);
    lg_text_free(&head);
    return ok;
}

/* Thinking models put more than the header behind the generation prompt. */
static bool read_prompt(lg_chat *chat, const scan *c) {
    static const char head[] = "<|im_start|>assistant";
    const int64_t n = (int64_t)sizeof head - 1;
    int64_t from = -1;
    for (const char *p = c->s; (p = strstr(p, "add_generation_prompt")); p++) from = p - c->s;
    for (int64_t i = 0; from >= 0 && i < c->n_lit; i++) {
        if (c->lit[i].at < from || strncmp(lit_text(c, i), head, (size_t)n) != 0) continue;
        int64_t skip = n + (lit_text(c, i)[n] == '\n');
        return c->lit[i].n > skip ? keep(&chat->prompt, lit_text(c, i) + skip, c->lit[i].n - skip) : true;
    }
    return true;
}

static bool has_marker(const lg_tokenizer *t, const char *s) {
    int32_t id = lg_text_find(t, s, (int64_t)strlen(s));
    return id >= 0 && t->token[id].kind >= LG_KIND_ADDED;
}

static bool has_markers(const lg_tokenizer *t, lg_chat_kind k) {
    const struct family *f = &families[k];
    return has_marker(t, f->open) && has_marker(t, f->close) && (k != LG_CHAT_LLAMA3 || has_marker(t, f->head_end));
}

static bool read_features(lg_tokenizer *t, const scan *c) {
    lg_chat *chat = &t->chat;
    bool im = any_has(c, "<|im_start|>") && any_has(c, "<|im_end|>");
    bool llama = any_has(c, "<|start_header_id|>") && any_has(c, "<|end_header_id|>") && any_has(c, "<|eot_id|>");
    if (im == llama || (im && strstr(c->code.data, "strftime_now"))) return true; /* unknown */
    chat->kind = llama ? LG_CHAT_LLAMA3
                 : any_has(c, "You are Qwen") || any_has(c, "</think>") || any_has(c, "You may call one or more functions") ? LG_CHAT_QWEN
                                                                                                                      : LG_CHAT_CHATML;
    if (!has_markers(t, chat->kind)) {
        chat->kind = LG_CHAT_NONE;
        return true;
    }
    chat->bos = strstr(c->code.data, "bos_token") != NULL;
    chat->trim = code_trims(c);
    bool ok = read_system(chat, c);
    if (llama) return ok && read_dates(chat, c);
    for (int64_t i = 0; i < c->n_lit; i++) {
        chat->think_cut |= !strcmp(lit_text(c, i), "</think>") && strstr(c->code.data, "split(");
        chat->think_wrap |= !strcmp(lit_text(c, i), "\n<think>\n") && strstr(c->code.data, "last_query_index");
    }
    return ok && read_prompt(chat, c);
}

lg_status lg_text_read_template(lg_tokenizer *t, const char *s, int64_t n, lg_error *err) {
    if (n > MAX_TEMPLATE) return lg_base_fail(err, LG_ERR_LIMIT, -1, "%s: the chat template has over %d bytes", t->source, MAX_TEMPLATE);
    bool ok = keep(&t->template_text, s, n);
    scan c = { 0 };
    if (ok) {
        c.s = t->template_text;
        c.n = (int64_t)strlen(c.s);
        ok = scan_template(&c) && read_features(t, &c);
    }
    lg_text_free(&c.text);
    lg_text_free(&c.code);
    lg_base_free(c.lit);
    return ok ? LG_OK : lg_base_fail(err, LG_ERR_NOMEM, -1, "%s: no memory for the chat template", t->source);
}

lg_status lg_text_set_chat_format(lg_tokenizer *t, const char *name, lg_error *err) {
    lg_chat_kind k = LG_CHAT_NONE;
    for (int i = LG_CHAT_CHATML; i <= LG_CHAT_QWEN; i++)
        if (!strcmp(name, families[i].name)) k = (lg_chat_kind)i;
    if (!strcmp(name, "none")) k = LG_CHAT_BARE;
    if (k == LG_CHAT_NONE) return lg_base_fail(err, LG_ERR_USAGE, -1, "chat format \"%.40s\" is not one of chatml, llama3, qwen, none", name);
    if (k != LG_CHAT_BARE && !has_markers(t, k))
        return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: the vocabulary lacks the tokens of the chat format %s (%s)", t->source, name,
                            families[k].open);
    if (strcmp(families[k].open, families[t->chat.kind].open) != 0 || k == LG_CHAT_BARE) {
        lg_text_chat_free(&t->chat); /* another family: nothing in the template speaks about it */
        t->chat.bos = t->chat.trim = k == LG_CHAT_LLAMA3;
    }
    t->chat.kind = k;
    return LG_OK;
}

/* ---- rendering ---- */
typedef struct render {
    const lg_tokenizer *t;
    lg_text_work *w;
    lg_ids *out;
    lg_text run, whole; /* ordinary text since the last marker; the same, repaired */
    lg_error *err;
} render;

static lg_status no_memory(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "no memory for the chat"); }

/* What comes out of a template may hold any bytes; what is split must be UTF-8. */
static lg_status flush(render *r, bool strip_end) {
    lg_status st = LG_OK;
    r->whole.n = 0;
    if (r->run.n == 0) return st;
    if (!lg_file_utf8_repair(&r->whole, r->run.data, r->run.n)) LG_TRY(no_memory(r->err));
    if (strip_end) r->whole.n -= lg_text_space_at_end(r->whole.data, r->whole.n);
    if (r->whole.n > 0) LG_TRY(lg_text_run(r->w, r->whole.data, r->whole.n, r->err));
done:
    r->run.n = 0;
    return st;
}

static lg_status marker(render *r, const char *s) {
    int32_t id = lg_text_find(r->t, s, (int64_t)strlen(s));
    lg_status st = flush(r, r->t->token[id].flags & LG_ADDED_LSTRIP);
    return st != LG_OK ? st : lg_base_ids_push(r->out, id) ? LG_OK : no_memory(r->err);
}

static lg_status add(render *r, const char *s, int64_t n) {
    return lg_base_text_append(&r->run, s, n) ? LG_OK : no_memory(r->err);
}

static lg_status header(render *r, const char *role, int64_t n) {
    lg_status st = LG_OK;
    const struct family *f = &families[r->t->chat.kind];
    LG_TRY(marker(r, f->open));
    LG_TRY(add(r, role, n));
    if (r->t->chat.kind == LG_CHAT_LLAMA3) {
        LG_TRY(marker(r, f->head_end));
        LG_TRY(add(r, "\n\n", 2));
    } else LG_TRY(add(r, f->head_end, 1));
done:
    return st;
}

static lg_status turn_end(render *r) {
    lg_status st = marker(r, families[r->t->chat.kind].close);
    return st == LG_OK && r->t->chat.kind != LG_CHAT_LLAMA3 ? add(r, "\n", 1) : st;
}

typedef struct span { const char *s; int64_t n; } span;

static span strip(span a, bool left, bool right, const char *set) { /* set NULL: what Python's str.strip takes */
    for (int64_t k; left && a.n > 0; a.s += k, a.n -= k) {
        k = set ? strchr(set, a.s[0]) && a.s[0] : (a.s[0] >= 0x1c && a.s[0] <= 0x1f) ? 1 : lg_text_space_at_start(a.s, a.n);
        if (k == 0) break;
    }
    for (int64_t k; right && a.n > 0; a.n -= k) {
        char c = a.s[a.n - 1];
        k = set ? strchr(set, c) && c : (c >= 0x1c && c <= 0x1f) ? 1 : lg_text_space_at_end(a.s, a.n);
        if (k == 0) break;
    }
    return a;
}

static const char *find(span a, const char *what, bool last) {
    size_t n = strlen(what);
    const char *found = NULL;
    for (const char *p = a.s; (p = memmem(p, (size_t)(a.s + a.n - p), what, n)); p++) {
        found = p;
        if (!last) break;
    }
    return found;
}

static bool is_role(const lg_turn *t, const char *role) { return t->n_role == (int64_t)strlen(role) && !memcmp(t->role, role, strlen(role)); }

/* The last user turn that is no tool response; the last turn where there is none. */
static int64_t last_question(const lg_turn *turns, int64_t n) {
    static const char open[] = "<tool_response>", close[] = "</tool_response>";
    for (int64_t i = n - 1; i >= 0; i--) {
        const lg_turn *t = &turns[i];
        bool tool = t->n_content >= 16 && !memcmp(t->content, open, 15) && !memcmp(t->content + t->n_content - 16, close, 16);
        if (is_role(t, "user") && !tool) return i;
    }
    return n - 1;
}

static lg_status answer(render *r, span text, bool may_wrap, bool last) {
    lg_status st = LG_OK;
    span thought = { "", 0 };
    const char *end = find(text, "</think>", true);
    if (end) {
        const char *first = find(text, "</think>", false);
        thought = strip((span){ text.s, first - text.s }, false, true, "\n");
        const char *open = find(thought, "<think>", true);
        if (open) thought = (span){ open + 7, thought.s + thought.n - open - 7 };
        thought = strip(thought, true, true, "\n");
        text = strip((span){ end + 8, text.s + text.n - end - 8 }, true, false, "\n");
    }
    if (may_wrap && (last || thought.n > 0)) {
        LG_TRY(add(r, "<think>\n", 8));
        LG_TRY(add(r, thought.s, thought.n));
        LG_TRY(add(r, "\n</think>\n\n", 11));
        text = strip(text, true, false, "\n");
    }
    LG_TRY(add(r, text.s, text.n));
done:
    return st;
}

static lg_status system_turn(render *r, span text) {
    lg_status st = LG_OK;
    const lg_chat *c = &r->t->chat;
    LG_TRY(header(r, "system", 6));
    if (c->system_head) LG_TRY(add(r, c->system_head, (int64_t)strlen(c->system_head)));
    LG_TRY(add(r, text.s, text.n));
    LG_TRY(turn_end(r));
done:
    return st;
}

static lg_status one_turn(render *r, const lg_turn *turns, int64_t i, int64_t n, int64_t question) {
    lg_status st = LG_OK;
    const lg_chat *c = &r->t->chat;
    lg_text fixed = { 0 };
    if (!lg_base_text_append(&fixed, "", 0) || !lg_file_utf8_repair(&fixed, turns[i].content, turns[i].n_content)) LG_TRY(no_memory(r->err));
    span text = { fixed.data, fixed.n };
    if (c->trim) text = strip(text, true, true, NULL);
    if (i == 0 && is_role(&turns[i], "system")) LG_TRY(system_turn(r, text));
    else {
        LG_TRY(header(r, turns[i].role, turns[i].n_role));
        if (c->think_cut && is_role(&turns[i], "assistant")) LG_TRY(answer(r, text, c->think_wrap && i > question, i == n - 1));
        else LG_TRY(add(r, text.s, text.n));
        LG_TRY(turn_end(r));
    }
done:
    lg_text_free(&fixed);
    return st;
}

static lg_status check_turns(const lg_tokenizer *t, const lg_turn *turns, int64_t n, lg_error *err) {
    if (n < 1) return lg_base_fail(err, LG_ERR_USAGE, -1, "a chat needs at least one turn");
    if (t->chat.kind == LG_CHAT_NONE)
        return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "%s: %s; choose one with --chat-format chatml, llama3, qwen or none", t->source,
                            t->template_text ? "the chat template is of no known format" : "there is no chat template");
    for (int64_t i = 0; i < n; i++)
        if (!is_role(&turns[i], "system") && !is_role(&turns[i], "user") && !is_role(&turns[i], "assistant"))
            return lg_base_fail(err, LG_ERR_USAGE, -1, "turn %lld: role \"%.*s\" is not one of system, user, assistant", (long long)i,
                                (int)(turns[i].n_role < 40 ? turns[i].n_role : 40), turns[i].role);
    if (t->chat.kind == LG_CHAT_BARE && (n != 1 || !is_role(&turns[0], "user")))
        return lg_base_fail(err, LG_ERR_USAGE, -1, "the chat format none takes one user turn only");
    return LG_OK;
}

lg_status lg_text_chat_turns(const lg_tokenizer *t, const lg_turn *turns, int64_t n, bool gen_prompt, lg_ids *out, lg_error *err) {
    lg_status st = check_turns(t, turns, n, err);
    if (st != LG_OK) return st;
    const lg_chat *c = &t->chat;
    int64_t start = out->n, total = 0;
    render r = { .t = t, .out = out, .err = err };
    for (int64_t i = 0; i < n; i++) total += turns[i].n_content;
    LG_TRY(lg_text_work_new(&r.w, t, total, 0, out, err));
    LG_TRY(add(&r, "", 0));
    if (c->kind == LG_CHAT_BARE) {
        if (!lg_file_utf8_repair(&r.run, turns[0].content, turns[0].n_content)) LG_TRY(no_memory(err));
        LG_TRY(flush(&r, false));
        goto done;
    }
    if (c->bos && t->bos >= 0 && !lg_base_ids_push(out, t->bos)) LG_TRY(no_memory(err));
    if (!is_role(&turns[0], "system") && (c->system || c->system_head))
        LG_TRY(system_turn(&r, (span){ c->system ? c->system : "", c->system ? (int64_t)strlen(c->system) : 0 }));
    int64_t question = last_question(turns, n);
    for (int64_t i = 0; i < n; i++) LG_TRY(one_turn(&r, turns, i, n, question));
    if (gen_prompt) {
        LG_TRY(header(&r, "assistant", 9));
        if (c->prompt) LG_TRY(add(&r, c->prompt, (int64_t)strlen(c->prompt)));
    }
    LG_TRY(flush(&r, false));
done:
    if (st != LG_OK) out->n = start;
    lg_text_work_free(r.w);
    lg_text_free(&r.run);
    lg_text_free(&r.whole);
    return st;
}

lg_status lg_text_chat(const lg_tokenizer *t, const lg_chat_turn *turns, int64_t n, bool gen_prompt, lg_ids *out, lg_error *err) {
    lg_turn *own = lg_base_calloc(n > 0 ? n : 1, sizeof *own);
    if (!own) return no_memory(err);
    for (int64_t i = 0; i < n; i++)
        own[i] = (lg_turn){ turns[i].role, (int64_t)strlen(turns[i].role), turns[i].content, (int64_t)strlen(turns[i].content) };
    lg_status st = lg_text_chat_turns(t, own, n, gen_prompt, out, err);
    lg_base_free(own);
    return st;
}
