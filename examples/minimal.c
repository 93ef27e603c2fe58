/* Continues a text: minimal MODEL PROMPT
 * cc minimal.c $(pkg-config --cflags --libs longan) -o minimal */
#include <longan/longan.h>
#include <stdio.h>
#include <string.h>

static int fail(const lg_error *e) {
    fprintf(stderr, "minimal: %s\n", e->message);
    return 1;
}

int main(int argc, char **argv) {
    lg_error err = {0};
    lg_model *model = NULL;
    lg_session *session = NULL;
    lg_ids ids = {0};
    lg_generation out = {0};
    lg_session_params sp;
    lg_generate_params gp;
    if (argc != 3) return fputs("usage: minimal MODEL PROMPT\n", stderr), 2;

    lg_model_params mp = {.path = argv[1]};
    if (lg_model_open(&model, &mp, &err)) return fail(&err);
    if (lg_tokenize(model, argv[2], (int64_t)strlen(argv[2]), LG_TOK_BOS, &ids, &err)) return fail(&err);
    lg_session_defaults(&sp);
    if (lg_session_new(&session, model, &sp, &err)) return fail(&err);
    lg_generate_defaults(&gp);
    gp.n_max = 16;
    if (lg_generate(session, 0, ids.data, ids.n, &gp, &out, &err)) return fail(&err);
    printf("%s\n", out.text.data);

    lg_generation_free(&out);
    lg_session_free(session);
    lg_ids_free(&ids);
    lg_model_free(model);
    return 0;
}
