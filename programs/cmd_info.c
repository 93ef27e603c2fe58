/* longan info: what a model file holds, and which devices there are. */
#include <string.h>

#include "cli.h"

static void info_json(buf *b, const lg_model_info *i)
{
    json_kv_text(b, "arch", i->arch);
    json_kv_text(b, "name", i->name[0] ? i->name : NULL);
    json_kv_int(b, "n_layer", i->n_layer);
    json_kv_int(b, "n_head", i->n_head);
    json_kv_int(b, "n_head_kv", i->n_head_kv);
    json_kv_int(b, "head_dim", i->head_dim);
    json_kv_int(b, "n_embd", i->n_embd);
    json_kv_int(b, "n_ff", i->n_ff);
    json_kv_int(b, "n_ctx_train", i->n_ctx_train);
    json_kv_int(b, "n_vocab", i->n_vocab);
    json_kv_int(b, "n_params", i->n_params);
    json_kv_int(b, "file_bytes", i->file_bytes);
    json_kv_text(b, "weights_dtype", i->weights_dtype);
    json_key(b, "rope_scaled");
    json_bool(b, i->rope_scaled);
    json_kv_text(b, "chat_format", i->chat_format[0] ? i->chat_format : NULL);
    json_kv_text(b, "fingerprint", i->fingerprint);
    json_kv_text(b, "family", i->family);
}

static void info_lines(buf *b, const lg_model_info *i)
{
    buf_printf(b, "arch         %s\n", i->arch);
    if (i->name[0])
        buf_printf(b, "name         %s\n", i->name);
    buf_printf(b, "n_layer      %lld\n", (long long)i->n_layer);
    buf_printf(b, "n_head       %lld\n", (long long)i->n_head);
    buf_printf(b, "n_head_kv    %lld\n", (long long)i->n_head_kv);
    buf_printf(b, "head_dim     %lld\n", (long long)i->head_dim);
    buf_printf(b, "n_embd       %lld\n", (long long)i->n_embd);
    buf_printf(b, "n_ff         %lld\n", (long long)i->n_ff);
    buf_printf(b, "n_ctx_train  %lld%s\n", (long long)i->n_ctx_train, i->rope_scaled ? " (rope scaling)" : "");
    buf_printf(b, "n_vocab      %lld\n", (long long)i->n_vocab);
    buf_printf(b, "n_params     %lld\n", (long long)i->n_params);
    buf_printf(b, "file_bytes   %lld\n", (long long)i->file_bytes);
    buf_printf(b, "weights      mostly %s\n", i->weights_dtype);
    buf_printf(b, "chat_format  %s\n", i->chat_format[0] ? i->chat_format : "none recognised");
    buf_printf(b, "fingerprint  %s\n", i->fingerprint);
    buf_printf(b, "family       %s\n", i->family);
}

/* "cpu: text" lines of the library as {"name": "cpu", "text": "text"}. */
static void devices_json(buf *b, const char *lines)
{
    json_key(b, "devices");
    json_begin(b, '[');
    for (const char *s = lines; *s;) {
        size_t n = strcspn(s, "\n"), name = 0;
        while (name < n && !(s[name] == ':' && (name + 1 == n || s[name + 1] == ' ')))
            name++;
        json_begin(b, '{');
        json_key(b, "name");
        json_text(b, s, (int64_t)name);
        json_key(b, "text");
        size_t skip = name + 2 <= n ? name + 2 : n;
        json_text(b, s + skip, (int64_t)(n - skip));
        json_end(b, '}');
        s += n + (s[n] == '\n');
    }
    json_end(b, ']');
}

static int add_devices(const options *o, buf *b)
{
    lg_text lines = {0};
    lg_error e = {0};
    if (lg_devices_describe(&lines, &e) != LG_OK)
        return failed_with(&e);
    const char *s = lines.data ? lines.data : "";
    if (o->json)
        devices_json(b, s);
    else
        buf_printf(b, "%s%s", s, *s && s[strlen(s) - 1] != '\n' ? "\n" : "");
    lg_text_free(&lines);
    return CLI_DONE;
}

static int run(const options *o)
{
    if (!o->devices && !o->model)
        return usage_error("option '-m/--model' is missing (or --devices)");
    buf b = {0};
    int rc = CLI_DONE;
    if (o->json)
        json_begin(&b, '{');
    if (o->model) {
        lg_model *m = NULL;
        rc = model_open(o, true, &m);
        if (!rc) {
            lg_model_info info;
            lg_model_get_info(m, &info);
            (o->json ? info_json : info_lines)(&b, &info);
        }
        lg_model_free(m);
    }
    if (!rc && o->devices)
        rc = add_devices(o, &b);
    if (o->json) {
        json_end(&b, '}');
        buf_puts(&b, "\n");
    }
    if (!rc)
        rc = emit(&b);
    buf_free(&b);
    return rc;
}

static const opt opts[] = {
    O_FLAG(0, "devices", devices, "list what was found to compute on"),
    O_END};
static const opt_group groups[] = {{"Options", opts}, {"Model", opts_model}, {"Output", opts_output}, {0}};

const command cmd_info = {
    .name = "info", .args = "", .summary = "show what a model file holds",
    .groups = groups,
    .examples = "  longan info -m model.gguf\n  longan info -m model.gguf --json\n  longan info --devices\n",
    .run = run};
