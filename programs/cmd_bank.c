/* longan bank: build, lengthen, look at and check bank files (docs/MEMORY.md, docs/FORMATS.md). */
#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "cli.h"

static const char *dtype_name(lg_dtype t)
{
    return t == LG_DTYPE_F32 ? "f32" : t == LG_DTYPE_BF16 ? "bf16" : "q8";
}

static int bank_open(const char *path, lg_bank **out)
{
    lg_error e = {0};
    return lg_bank_open(out, path, &e) == LG_OK ? CLI_DONE : failed_with(&e);
}

/* ---- build, append --------------------------------------------------------------------------------- */

typedef struct material { buf text; id_list ids; bool is_ids; } material;

static int material_check(const options *o)
{
    if (o->file && o->ids)
        return usage_error("-f and --ids exclude each other");
    return o->file || o->ids ? CLI_DONE : usage_error("option '-f/--file' or '--ids' is missing");
}

static int material_read(const options *o, lg_model *m, material *x)
{
    lg_model_info info;
    lg_model_get_info(m, &info);
    x->is_ids = o->ids != NULL;
    return x->is_ids ? read_ids(o->ids, info.n_vocab, &x->ids) : map_input(o->file, &x->text);
}

static int made(const options *o, const char *path, int64_t n_before, double seconds)
{
    lg_bank *b = NULL;
    lg_bank_info info;
    buf out = {0};
    int rc = bank_open(path, &b);
    if (rc)
        return rc;
    lg_bank_get_info(b, &info);
    if (o->json) {
        json_begin(&out, '{');
        json_kv_text(&out, "bank", path);
        json_kv_int(&out, "n_tokens", info.n_tokens);
        json_kv_int(&out, "n_chunk", info.n_chunk);
        json_kv_int(&out, "file_bytes", info.file_bytes);
        json_kv_real(&out, "seconds", seconds);
        json_end(&out, '}');
        buf_puts(&out, "\n");
    } else {
        double n = (double)(info.n_tokens - n_before);
        note("%s: %lld tokens in %lld chunks, %.1f MB; %.1f s (%.0f tokens/s)", path, (long long)info.n_tokens, (long long)info.n_chunk,
             (double)info.file_bytes / 1e6, seconds, seconds > 0 ? n / seconds : 0.0);
    }
    rc = emit(&out);
    buf_free(&out);
    lg_bank_close(b);
    return rc;
}

static int run_build(const options *o)
{
    static const lg_dtype slots[] = {LG_DTYPE_F32, LG_DTYPE_BF16, LG_DTYPE_KV8};
    int rc = need("-m/--model", o->model);
    if (!rc)
        rc = material_check(o);
    if (!rc)
        rc = need("-o/--output", o->output);
    if (rc)
        return rc;
    lg_model *m = NULL;
    material x = {0};
    lg_error e = {0};
    lg_bank_params p;
    lg_bank_defaults(&p);
    p.chunk = o->chunk;
    p.window = o->window;
    p.ratio = o->ratio;
    p.group = o->group;
    p.slots = slots[o->slots];
    p.progress = cli_progress;
    rc = model_open(o, false, &m);
    if (!rc)
        rc = material_read(o, m, &x);
    double began = cli_clock();
    if (!rc) {
        lg_status st = x.is_ids ? lg_bank_build_ids(m, &p, x.ids.v, x.ids.n, o->output, &e)
                                : lg_bank_build(m, &p, x.text.data, (int64_t)x.text.n, o->output, &e);
        cli_progress_end();
        rc = st == LG_OK ? made(o, o->output, 0, cli_clock() - began) : failed_with(&e);
    }
    buf_free(&x.text);
    free(x.ids.v);
    lg_model_free(m);
    return rc;
}

static int run_append(const options *o)
{
    const char *path = o->n_args ? o->args[0] : o->output;
    int rc = o->n_args && o->output ? usage_error("the bank stands twice ('%s' and -o)", o->args[0])
             : path ? need("-m/--model", o->model) : usage_error("the bank is missing");
    if (!rc)
        rc = material_check(o);
    if (rc)
        return rc;
    lg_model *m = NULL;
    lg_bank *b = NULL;
    lg_bank_info info = {0};
    material x = {0};
    lg_error e = {0};
    rc = bank_open(path, &b); /* before the model: a wrong file is said at once */
    if (!rc)
        lg_bank_get_info(b, &info);
    lg_bank_close(b);
    if (!rc)
        rc = model_open(o, false, &m);
    if (!rc)
        rc = material_read(o, m, &x);
    double began = cli_clock();
    if (!rc) {
        lg_status st = x.is_ids ? lg_bank_append_ids(m, path, x.ids.v, x.ids.n, cli_progress, NULL, &e)
                                : lg_bank_append(m, path, x.text.data, (int64_t)x.text.n, cli_progress, NULL, &e);
        cli_progress_end();
        rc = st == LG_OK ? made(o, path, info.n_tokens, cli_clock() - began) : failed_with(&e);
    }
    buf_free(&x.text);
    free(x.ids.v);
    lg_model_free(m);
    return rc;
}

/* ---- info, verify, ls ------------------------------------------------------------------------------ */

static void json_facts(buf *b, const lg_bank_info *i)
{
    json_kv_text(b, "fingerprint", i->fingerprint);
    json_kv_text(b, "family", i->family);
    json_kv_text(b, "memory", *i->memory ? i->memory : NULL);
    json_kv_int(b, "n_tokens", i->n_tokens);
    json_kv_int(b, "n_chunk", i->n_chunk);
    json_kv_int(b, "chunk", i->chunk);
    json_kv_int(b, "window", i->window);
    json_kv_int(b, "ratio", i->ratio);
    json_kv_int(b, "group", i->group);
    json_kv_int(b, "n_layer", i->n_layer);
    json_kv_int(b, "n_head_kv", i->n_head_kv);
    json_kv_int(b, "head_dim", i->head_dim);
    json_kv_text(b, "slots_dtype", dtype_name(i->slots_dtype));
    json_kv_text(b, "slot_rope", i->slot_rope ? "slot-index" : "none");
    json_kv_int(b, "file_bytes", i->file_bytes);
}

static void json_bytes(buf *b, const char *key, int64_t v)
{
    json_key(b, key);
    if (v < 0)
        json_none(b);
    else
        json_int(b, v);
}

static void info_json(const lg_bank *bank, const lg_bank_info *i, buf *b)
{
    json_begin(b, '{');
    json_facts(b, i);
    json_key(b, "chunks");
    json_begin(b, '[');
    for (int64_t c = 0; c < i->n_chunk; c++) {
        lg_bank_chunk x;
        lg_bank_get_chunk(bank, c, &x, NULL);
        json_begin(b, '{');
        json_kv_int(b, "index", c);
        json_kv_int(b, "token_begin", x.token_begin);
        json_kv_int(b, "token_end", x.token_end);
        json_bytes(b, "byte_begin", x.byte_begin);
        json_bytes(b, "byte_end", x.byte_end);
        json_kv_int(b, "slots", x.slots);
        json_end(b, '}');
    }
    json_end(b, ']');
    json_end(b, '}');
    buf_puts(b, "\n");
}

static void info_text(const lg_bank *bank, const lg_bank_info *i, buf *b)
{
    buf_printf(b, "family       %s\nfingerprint  %s\nmemory       %s\n", i->family, i->fingerprint, *i->memory ? i->memory : "-");
    buf_printf(b, "tokens       %lld in %lld chunks of %lld (window %lld, ratio %lld, groups of %lld)\n", (long long)i->n_tokens,
               (long long)i->n_chunk, (long long)i->chunk, (long long)i->window, (long long)i->ratio, (long long)i->group);
    buf_printf(b, "slots        %s, rotated: %s; %lld layers, %lld KV heads of %lld\nfile         %lld bytes\n", dtype_name(i->slots_dtype),
               i->slot_rope ? "slot-index" : "none", (long long)i->n_layer, (long long)i->n_head_kv, (long long)i->head_dim,
               (long long)i->file_bytes);
    buf_puts(b, "\n   chunk        tokens                   bytes             slots\n");
    for (int64_t c = 0; c < i->n_chunk; c++) {
        lg_bank_chunk x;
        lg_bank_get_chunk(bank, c, &x, NULL);
        buf_printf(b, "%8lld %10lld - %-10lld", (long long)c, (long long)x.token_begin, (long long)x.token_end);
        if (x.byte_begin < 0)
            buf_printf(b, " %10s   %-10s", "-", "-");
        else
            buf_printf(b, " %10lld - %-10lld", (long long)x.byte_begin, (long long)x.byte_end);
        buf_printf(b, " %8lld\n", (long long)x.slots);
    }
}

static int need_bank(const options *o)
{
    return o->n_args ? CLI_DONE : usage_error("the bank is missing");
}

static int run_info(const options *o)
{
    lg_bank *bank = NULL;
    lg_bank_info i;
    buf b = {0};
    int rc = need_bank(o);
    if (!rc)
        rc = bank_open(o->args[0], &bank);
    if (rc)
        return rc;
    lg_bank_get_info(bank, &i);
    (o->json ? info_json : info_text)(bank, &i, &b);
    rc = emit(&b);
    buf_free(&b);
    lg_bank_close(bank);
    return rc;
}

static int run_verify(const options *o)
{
    lg_bank *bank = NULL;
    lg_bank_info i;
    lg_error e = {0};
    buf b = {0};
    int rc = need_bank(o);
    if (!rc)
        rc = bank_open(o->args[0], &bank);
    if (!rc && lg_bank_verify(bank, &e) != LG_OK)
        rc = failed_with(&e);
    if (!rc) {
        lg_bank_get_info(bank, &i);
        if (o->json) {
            json_begin(&b, '{');
            json_kv_text(&b, "bank", o->args[0]);
            json_key(&b, "ok");
            json_bool(&b, true);
            json_kv_int(&b, "n_chunk", i.n_chunk);
            json_kv_int(&b, "file_bytes", i.file_bytes);
            json_end(&b, '}');
            buf_puts(&b, "\n");
        } else {
            buf_printf(&b, "%s: whole, %lld chunks, %lld bytes\n", o->args[0], (long long)i.n_chunk, (long long)i.file_bytes);
        }
        rc = emit(&b);
    }
    buf_free(&b);
    lg_bank_close(bank);
    return rc;
}

static bool starts_like_bank(const char *path)
{
    char head[6] = "";
    struct stat st;
    FILE *f = stat(path, &st) == 0 && S_ISREG(st.st_mode) ? fopen(path, "rb") : NULL;
    if (!f)
        return false;
    bool is = fread(head, 1, sizeof head, f) == sizeof head && memcmp(head, "LGBANK", 6) == 0;
    fclose(f);
    return is;
}

static void list_one(const options *o, const char *path, const char *name, buf *b)
{
    lg_bank *bank = NULL;
    lg_error e = {0};
    lg_bank_info i;
    lg_status st = lg_bank_open(&bank, path, &e);
    if (st == LG_OK)
        lg_bank_get_info(bank, &i);
    if (o->json) {
        json_begin(b, '{');
        json_kv_text(b, "bank", name);
        json_kv_text(b, "error", st == LG_OK ? NULL : e.message);
        if (st == LG_OK)
            json_facts(b, &i);
        json_end(b, '}');
    } else if (st == LG_OK) {
        buf_printf(b, "%-32s %12lld tokens %8lld chunks  1/%-3lld %-4s %14lld bytes  %.8s\n", name, (long long)i.n_tokens, (long long)i.n_chunk,
                   (long long)i.ratio, dtype_name(i.slots_dtype), (long long)i.file_bytes, i.family);
    } else {
        buf_printf(b, "%-32s unreadable: %s\n", name, e.message);
    }
    lg_bank_close(bank);
}

static int run_ls(const options *o)
{
    const char *folder = o->n_args ? o->args[0] : ".";
    struct dirent **names = NULL;
    buf b = {0}, path = {0};
    int n = scandir(folder, &names, NULL, alphasort);
    if (n < 0)
        return failed("%s: cannot be listed: %s", folder, strerror(errno));
    if (o->json) {
        json_begin(&b, '{');
        json_key(&b, "banks");
        json_begin(&b, '[');
    }
    for (int i = 0; i < n; i++) {
        path.n = 0;
        buf_printf(&path, "%s/%s", folder, names[i]->d_name);
        if (starts_like_bank(path.data))
            list_one(o, path.data, names[i]->d_name, &b);
        free(names[i]);
    }
    free(names);
    if (o->json) {
        json_end(&b, ']');
        json_end(&b, '}');
        buf_puts(&b, "\n");
    }
    int rc = emit(&b);
    buf_free(&path);
    buf_free(&b);
    return rc;
}

/* ---- export ---------------------------------------------------------------------------------------- */

static int write_array(const char *folder, const char *name, const int64_t shape[4], const float *x)
{
    buf path = {0};
    out_file f = {0};
    size_t n = (size_t)(shape[0] * shape[1] * shape[2] * shape[3]);
    buf_printf(&path, "%s/%s", folder, name);
    int rc = out_open(&f, path.data);
    if (!rc) {
        npy_header(f.f, shape, 4);
        fwrite(x, sizeof *x, n, f.f); /* errors are seen at commit */
        rc = out_commit(&f);
    }
    buf_free(&path);
    return rc;
}

static int run_export(const options *o)
{
    lg_bank *bank = NULL;
    lg_bank_info i;
    lg_bank_chunk x;
    lg_error e = {0};
    buf b = {0};
    float *k = NULL, *v = NULL;
    int rc = need_bank(o);
    if (!rc && !opt_given(o, "chunk"))
        rc = usage_error("option '--chunk' is missing");
    if (!rc)
        rc = need("-o/--output", o->output);
    if (!rc)
        rc = bank_open(o->args[0], &bank);
    if (rc)
        return rc;
    lg_bank_get_info(bank, &i);
    if (lg_bank_get_chunk(bank, o->chunk, &x, &e) != LG_OK)
        rc = failed_with(&e);
    if (!rc) {
        int64_t shape[4] = {i.n_layer, x.slots, i.n_head_kv, i.head_dim};
        size_t n = (size_t)(shape[0] * shape[1] * shape[2] * shape[3]);
        k = cli_alloc(NULL, n, sizeof *k);
        v = cli_alloc(NULL, n, sizeof *v);
        if (lg_bank_read(bank, o->chunk, k, v, &e) != LG_OK)
            rc = failed_with(&e);
        if (!rc && mkdir(o->output, 0777) != 0 && errno != EEXIST)
            rc = failed("%s: cannot be made: %s", o->output, strerror(errno));
        if (!rc)
            rc = write_array(o->output, "K.npy", shape, k);
        if (!rc)
            rc = write_array(o->output, "V.npy", shape, v);
    }
    if (!rc && o->json) {
        json_begin(&b, '{');
        json_kv_text(&b, "output", o->output);
        json_kv_int(&b, "chunk", o->chunk);
        json_kv_int(&b, "slots", x.slots);
        json_end(&b, '}');
        buf_puts(&b, "\n");
    } else if (!rc) {
        note("%s: K.npy and V.npy, %lld slots of chunk %lld", o->output, (long long)x.slots, (long long)o->chunk);
    }
    if (!rc)
        rc = emit(&b);
    buf_free(&b);
    free(k);
    free(v);
    lg_bank_close(bank);
    return rc;
}

/* ---- tables ---------------------------------------------------------------------------------------- */

#define MAX_CHUNK ((int64_t)1 << 20)
static const opt build_opts[] = {
    O_TEXT('f', "file", file, "TEXT", NULL, "document; - is stdin"),
    O_TEXT(0, "ids", ids, "FILE", NULL, "document as decimal ids; - is stdin"),
    O_TEXT('o', "output", output, "BANK", NULL, "bank to write; BANK.part while it is built"),
    O_SIZE(0, "ratio", ratio, 1, MAX_CHUNK, NULL, "the memory weights', else 4", "tokens a slot stands for; divides the window"),
    O_SIZE(0, "chunk", chunk, 1, MAX_CHUNK, "4096", NULL, "tokens of a chunk; a multiple of the window"),
    O_SIZE(0, "window", window, 1, MAX_CHUNK, NULL, "the memory weights', else 2048", "tokens compressed in one pass"),
    O_CHOICE("slots", slots, "f32|bf16|q8", "bf16", NULL, "type of the slots"),
    O_SIZE(0, "group", group, 1, 65536, NULL, "4096 tokens' worth, 16384 on a GPU", "chunks compressed together; builds go on at group borders"), O_END};
static const opt append_opts[] = {
    O_TEXT('f', "file", file, "TEXT", NULL, "text to append; - is stdin"),
    O_TEXT(0, "ids", ids, "FILE", NULL, "ids to append; - is stdin"),
    O_TEXT('o', "output", output, "BANK", NULL, "the same as the argument"), O_END};
static const opt export_opts[] = {
    O_SIZE(0, "chunk", chunk, 0, INT64_MAX, NULL, NULL, "index of the chunk, from 0"),
    O_TEXT('o', "output", output, "DIR", NULL, "folder for K.npy and V.npy"), O_END};
static const opt_group build_groups[] = {{"Bank", build_opts}, {"Model", opts_model}, {"Output", opts_output}, {0}};
static const opt_group append_groups[] = {{"Bank", append_opts}, {"Model", opts_model}, {"Output", opts_output}, {0}};
static const opt_group export_groups[] = {{"Options", export_opts}, {"Output", opts_output}, {0}};
static const opt_group plain_groups[] = {{"Output", opts_output}, {0}};

const command cmd_bank_build = {
    .name = "bank build", .args = "", .summary = "compress a document into a bank of memory slots", .groups = build_groups,
    .notes = "An interrupted build goes on where it stopped when the same command is run again.\n",
    .examples = "  longan bank build -m model.gguf --adapter memory.safetensors -f book.txt -o book.bank\n", .run = run_build};
const command cmd_bank_append = {
    .name = "bank append", .args = "BANK", .max_args = 1, .summary = "add text to the end of a bank", .groups = append_groups,
    .notes = "The new text is tokenised apart. The last group of chunks is compressed again where it was not full.\n",
    .examples = "  longan bank append log.bank -m model.gguf --adapter memory.safetensors -f today.log\n", .run = run_append};
const command cmd_bank_info = {
    .name = "bank info", .args = "BANK", .max_args = 1, .summary = "print a bank's facts and chunks", .groups = plain_groups,
    .examples = "  longan bank info book.bank --json\n", .run = run_info};
const command cmd_bank_verify = {
    .name = "bank verify", .args = "BANK", .max_args = 1, .summary = "check every checksum of a bank", .groups = plain_groups,
    .examples = "  longan bank verify book.bank\n", .run = run_verify};
const command cmd_bank_export = {
    .name = "bank export", .args = "BANK", .max_args = 1, .summary = "write a chunk's slots as .npy", .groups = export_groups,
    .notes = "float32 [n_layer, slots, n_head_kv, head_dim]: valid slots; K after bias and norm, not rotated, in half order.\n",
    .examples = "  longan bank export book.bank --chunk 0 -o slots\n", .run = run_export};
const command cmd_bank_ls = {
    .name = "bank ls", .args = "[DIR]", .max_args = 1, .summary = "list the banks in a folder, one a line", .groups = plain_groups,
    .examples = "  longan bank ls ~/.cache/longan\n", .run = run_ls};
