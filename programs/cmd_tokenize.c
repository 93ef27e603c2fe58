/* longan tokenize: text to ids and back, byte for byte. */
#include <stdlib.h>
#include <string.h>

#include "cli.h"

static int encode(const options *o, const lg_model *m, const buf *in, buf *b)
{
    unsigned flags = (o->special ? LG_TOK_SPECIAL : 0u) | (o->bos ? LG_TOK_BOS : 0u) | (o->chat ? LG_TOK_CHAT : 0u);
    lg_ids ids = {0};
    lg_error e = {0};
    if (lg_tokenize(m, in->data, (int64_t)in->n, flags, &ids, &e) != LG_OK)
        return failed_with(&e);
    if (o->json) {
        json_begin(b, '{');
        json_key(b, "ids");
        json_ids(b, ids.data, ids.n);
        json_kv_int(b, "n", ids.n);
        json_end(b, '}');
    } else {
        for (int64_t i = 0; i < ids.n; i++)
            buf_printf(b, "%s%d", i ? " " : "", (int)ids.data[i]);
    }
    buf_puts(b, "\n");
    lg_ids_free(&ids);
    return CLI_DONE;
}

static int decode(const options *o, const lg_model *m, const buf *in, buf *b)
{
    lg_model_info info;
    lg_model_get_info(m, &info);
    id_list ids = {0};
    lg_text text = {0};
    lg_error e = {0};
    int rc = parse_ids(strcmp(o->file, "-") == 0 ? "stdin" : o->file, in, info.n_vocab, &ids);
    if (!rc && lg_detokenize(m, ids.v, ids.n, o->special ? LG_TOK_SPECIAL : 0u, &text, &e) != LG_OK)
        rc = failed_with(&e);
    if (!rc && o->json) {
        json_begin(b, '{');
        json_key(b, "text");
        json_text(b, text.n ? text.data : "", text.n);
        json_end(b, '}');
        buf_puts(b, "\n");
    } else if (!rc && text.n) {
        buf_add(b, text.data, (size_t)text.n);
    }
    lg_text_free(&text);
    free(ids.v);
    return rc;
}

static int run(const options *o)
{
    int rc = need("-m/--model", o->model);
    if (!rc && o->decode && (o->bos || o->chat))
        rc = usage_error("--decode and --%s exclude each other", o->bos ? "bos" : "chat");
    if (rc)
        return rc;
    lg_model *m = NULL;
    buf in = {0}, b = {0};
    rc = model_open(o, true, &m);
    if (!rc)
        rc = read_input(o->file, &in);
    if (!rc)
        rc = (o->decode ? decode : encode)(o, m, &in, &b);
    if (!rc)
        rc = emit(&b);
    buf_free(&in);
    buf_free(&b);
    lg_model_free(m);
    return rc;
}

static const opt opts[] = {
    O_TEXT('f', "file", file, "FILE", "-", "input; - is stdin"),
    O_FLAG(0, "special", special, "strings of special tokens become those tokens; --decode: show them"),
    O_FLAG(0, "bos", bos, "add what the model puts in front of a text"),
    O_FLAG(0, "chat", chat, "render as one user turn with the generation prompt"),
    O_FLAG(0, "decode", decode, "ids in, bytes out"),
    O_END};
static const opt_group groups[] = {{"Options", opts}, {"Model", opts_model}, {"Output", opts_output}, {0}};

const command cmd_tokenize = {
    .name = "tokenize", .args = "", .summary = "turn text into token ids, or ids into text",
    .groups = groups,
    .notes = "Reads to the last byte and strips nothing. Invalid UTF-8 becomes U+FFFD.\n",
    .examples = "  printf 'Hello' | longan tokenize -m model.gguf\n"
                "  echo 1 2 3 | longan tokenize -m model.gguf --decode --special\n",
    .run = run};
