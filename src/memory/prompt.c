/* prompt: the templates of every mode, and prompts from them.
 *
 * A template is rendered as one user turn of the model's chat format, then cut at its placeholders; each literal piece is
 * tokenised apart, special strings recognised, so no merge crosses a placeholder and the memory is carried as ids. The texts
 * below are the published ones, byte for byte (LycheeMemory: 581 and 226 bytes; MemAgent: its quickstart and evaluation). */
#include "memory/memory.h"
#include <string.h>

const char lg_memory_update_text[] =
    "\nThe above is a newly provided section, which may or may not contain information relevant to answering the problem. "
    "The previously summarized memory is stored within the <previous_memory> tags, and the problem is specified within the <problem> tags. "
    "Please read the provided section carefully and update the memory with any new information that helps address the problem. "
    "Be sure to retain all relevant details from the previous memory while incorporating any new, useful information.\n\n"
    "<problem> \n{prompt}\n</problem>\n\n<previous_memory>\n{memory}\n</previous_memory>\n\nUpdated memory:\n";
const char lg_memory_answer_text[] =
    "You are presented with a problem and a previous memory.You do not need to update the memory, directly answer the problem based on the "
    "previous memory.\n\n<problem> \n{prompt}\n</problem>\n\n<memory>\n{memory}\n</memory>\n\nYour answer:\n";
/* Bare: the form in which the shipped weights were trained; the blank before the question is the question's (a piece ends where a
 * token ends). The answer ends at a newline. */
const char lg_memory_lookup_text[] = "\nQuestion:{prompt}\nAnswer:";
/* The gate's published prompt is unknown; this is ours, and an adapter is trained on it. */
const char lg_memory_gate_text[] =
    "\nThe above is a section of an article. The problem is specified within the <problem> tags, and what is known so far within the <memory> tags. "
    "Does the section help to answer the problem?\n\n<problem> \n{prompt}\n</problem>\n\n<memory>\n{memory}\n</memory>\n";
const char lg_memagent_update_text[] =
    "You are presented with a problem, a section of an article that may contain the answer to the problem, and a previous memory. "
    "Please read the provided section carefully and update the memory with the new information that helps to answer the problem. "
    "Be sure to retain all relevant details from the previous memory while adding any new, useful information.\n\n"
    "<problem> \n{prompt}\n</problem>\n\n<memory>\n{memory}\n</memory>\n\n<section>\n{chunk}\n</section>\n\nUpdated memory:\n";
#define MEMAGENT_FRAME "\n\n<problem> \n{prompt}\n</problem>\n\n<memory>\n{memory}\n</memory>\n\nYour answer:\n"
const char lg_memagent_boxed_text[] =
    "You are presented with a problem and a previous memory. Please answer the problem based on the previous memory and put the answer in \\boxed{}." MEMAGENT_FRAME;
const char lg_memagent_plain_text[] =
    "You are presented with a problem and a previous memory. Please answer the problem based on the previous memory and format your response as "
    "follows \"Therefore, the answer is (insert answer here)\"." MEMAGENT_FRAME;
const char lg_memory_full_text[] = "Please read the following text and answer the question below.\n\n<text>\n{chunk}\n</text>\n\n{prompt}";

static const char *const hole_text[LG_HOLE_COUNT] = { "{prompt}", "{memory}", "{chunk}" };

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

/* The text of one user turn with the generation prompt, as the chat format renders it. */
static lg_status render(const lg_model *m, const char *text, lg_text *out, lg_error *err) {
    const lg_chat_turn turn = { "user", text };
    lg_ids ids = { 0 };
    lg_status st;
    LG_TRY(lg_text_chat(m->tok, &turn, 1, true, &ids, err));
    LG_TRY(lg_text_decode(m->tok, ids.data, ids.n, LG_TOK_SPECIAL, out, err));
done:
    lg_ids_free(&ids);
    return st;
}

/* The first placeholder in s, its kind in *kind; NULL: none. */
static const char *find_hole(const char *s, int *kind) {
    const char *best = NULL;
    for (int h = 0; h < LG_HOLE_COUNT; h++) {
        const char *at = strstr(s, hole_text[h]);
        if (at && (!best || at < best)) {
            best = at;
            *kind = h;
        }
    }
    return best;
}

static lg_status check(const char *text, unsigned must, unsigned may, lg_error *err) {
    for (int h = 0; h < LG_HOLE_COUNT; h++) {
        const char *at = strstr(text, hole_text[h]);
        if (!at && must >> h & 1) return lg_base_fail(err, LG_ERR_LIMIT, -1, "the template lacks %s", hole_text[h]);
        if (at && !((must | may) >> h & 1)) return lg_base_fail(err, LG_ERR_LIMIT, -1, "the template has %s, which has no meaning here", hole_text[h]);
        if (at && strstr(at + 1, hole_text[h])) return lg_base_fail(err, LG_ERR_LIMIT, -1, "the template has %s twice", hole_text[h]);
    }
    return LG_OK;
}

lg_status lg_memory_template(lg_template *out, const lg_model *m, const char *text, bool chat, unsigned must, unsigned may, lg_error *err) {
    lg_status st;
    lg_text whole = { 0 };
    *out = (lg_template){ 0 };
    LG_TRY(check(text, must, may, err));
    if (chat) LG_TRY(render(m, text, &whole, err)); /* with --chat-format none: the text itself */
    else if (!lg_base_text_append(&whole, text, (int64_t)strlen(text))) LG_TRY(nomem(err));
    const char *s = whole.data;
    for (;;) {
        int kind = 0;
        const char *at = find_hole(s, &kind);
        const int64_t n = at ? at - s : (int64_t)strlen(s);
        LG_TRY(lg_text_encode(m->tok, s, n, LG_TOK_SPECIAL, &out->piece[out->n_hole], err));
        if (!at) break;
        if (out->n_hole == LG_HOLE_COUNT) LG_TRY(lg_base_fail(err, LG_ERR_LIMIT, -1, "the chat format repeats the template's placeholders"));
        out->hole[out->n_hole++] = kind;
        s = at + strlen(hole_text[kind]);
    }
done:
    lg_text_free(&whole);
    if (st != LG_OK) lg_memory_template_free(out);
    return st;
}

void lg_memory_template_free(lg_template *t) {
    for (int i = 0; i <= LG_HOLE_COUNT; i++) lg_ids_free(&t->piece[i]);
    *t = (lg_template){ 0 };
}

int64_t lg_memory_template_len(const lg_template *t) {
    int64_t n = 0;
    for (int i = 0; i <= t->n_hole; i++) n += t->piece[i].n;
    return n;
}

static bool add(lg_ids *out, const lg_ids *x) {
    for (int64_t i = 0; i < x->n; i++)
        if (!lg_base_ids_push(out, x->data[i])) return false;
    return true;
}

lg_status lg_memory_prompt(const lg_template *t, const lg_ids fill[LG_HOLE_COUNT], lg_ids *out, lg_error *err) {
    bool ok = true;
    out->n = 0;
    for (int i = 0; i <= t->n_hole && ok; i++) ok = add(out, &t->piece[i]) && (i == t->n_hole || add(out, &fill[t->hole[i]]));
    return ok ? LG_OK : nomem(err);
}
