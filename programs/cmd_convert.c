/* longan convert: any readable model to one GGUF file. */
#include <string.h>
#include <sys/stat.h>

#include "cli.h"

static const char type_names[] = "f32|f16|bf16|q8_0|q4_0|q4_1";
static const lg_dtype types[] = {LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16,
                                 LG_DTYPE_Q8_0, LG_DTYPE_Q4_0, LG_DTYPE_Q4_1};
static const char *const names[] = {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"};

static int run(const options *o)
{
    int rc = need("-m/--model", o->model);
    if (!rc)
        rc = need("-o/--output", o->output);
    if (rc)
        return rc;
    bool keep = !opt_given(o, "type");
    lg_error e = {0};
    double t0 = cli_clock();
    lg_status st = lg_convert(o->model, o->output, keep ? LG_DTYPE_COUNT : types[o->type], cli_progress, NULL, &e);
    cli_progress_end();
    if (st != LG_OK)
        return failed_with(&e);
    double seconds = cli_clock() - t0;
    struct stat file;
    if (stat(o->output, &file) != 0)
        return failed("%s: cannot be seen after it was written", o->output);
    buf b = {0};
    if (o->json) {
        json_begin(&b, '{');
        json_kv_text(&b, "output", o->output);
        json_kv_text(&b, "type", keep ? NULL : names[o->type]);
        json_kv_int(&b, "file_bytes", (int64_t)file.st_size);
        json_kv_real(&b, "convert_s", seconds);
        json_end(&b, '}');
        buf_puts(&b, "\n");
    } else {
        note("%s: %lld bytes written in %.1f s", o->output, (long long)file.st_size, seconds);
    }
    rc = emit(&b);
    buf_free(&b);
    return rc;
}

static const opt opts[] = {
    O_TEXT('m', "model", model, "MODEL", NULL,
           "GGUF file (first part if split), Hugging Face folder, or safetensors file"),
    O_TEXT('o', "output", output, "OUT.gguf", NULL, "file to write; appears when complete"),
    O_CHOICE("type", type, type_names, NULL, "every tensor keeps its own", "type of the matrices; norms and biases stay f32"),
    O_END};
static const opt_group groups[] = {{"Options", opts}, {"Output", opts_output}, {0}};

const command cmd_convert = {
    .name = "convert", .args = "", .summary = "write a model as one GGUF file",
    .groups = groups,
    .examples = "  longan convert -m folder -o model-f16.gguf --type f16\n"
                "  longan convert -m model-f16.gguf -o model-q8_0.gguf --type q8_0\n",
    .run = run};
