/* longan: the program. Finds the command, parses its options, runs it. */
#include <stdlib.h>
#include <string.h>

#include "cli.h"

static const command *const commands[] = {
    &cmd_info, &cmd_convert, &cmd_tokenize, &cmd_logits, &cmd_generate, &cmd_chat,
    &cmd_perplexity, &cmd_bench, &cmd_heads_calibrate, &cmd_heads_show, &cmd_heads_plot,
    &cmd_bank_build, &cmd_bank_append, &cmd_bank_info, &cmd_bank_verify, &cmd_bank_export, &cmd_bank_ls, &cmd_ask};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void program_help(FILE *f)
{
    fputs("longan: long-context language models on your own machine\n\n"
          "Usage: longan COMMAND [options]\n\nCommands\n", f);
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(f, "  %-17s %s\n", commands[i]->name, commands[i]->summary);
    fputs("\n  longan COMMAND --help   options of a command with their defaults\n"
          "  longan --version        version and commit\n\n"
          "MODEL is a GGUF file (first part if split), a folder in the Hugging Face layout, or a\n"
          "safetensors file beside its config.json. Sizes take k (1024) and m (1024^2).\n"
          "Results go to stdout, everything else to stderr.\n"
          "Exit codes: 0 done, 1 failed, 2 wrong usage.\n\n"
          "Examples\n"
          "  longan info -m model.gguf\n"
          "  longan generate -m model.gguf --chat -p 'Why is the sky blue?'\n"
          "  longan generate -m model.gguf --chat -f book.txt -p 'Who is the hero?' --roles roles.json\n",
          f);
}

static bool word_is(const char *word, size_t n, const char *s)
{
    return strlen(s) == n && memcmp(word, s, n) == 0;
}

/* The command that argv names; *used: words it took. */
static const command *find_command(int argc, char **argv, int *used)
{
    for (int i = 0; i < N_COMMANDS; i++) {
        const char *name = commands[i]->name;
        size_t first = strcspn(name, " ");
        if (!word_is(name, first, argv[0]))
            continue;
        *used = 1;
        if (!name[first])
            return commands[i];
        *used = 2;
        if (argc > 1 && strcmp(name + first + 1, argv[1]) == 0)
            return commands[i];
    }
    return NULL;
}

/* A family of commands ("heads") without one of its members. */
static int family_usage(int argc, char **argv)
{
    buf members = {0};
    for (int i = 0; i < N_COMMANDS; i++) {
        const char *name = commands[i]->name;
        size_t first = strcspn(name, " ");
        if (name[first] && word_is(name, first, argv[0]))
            buf_printf(&members, "%s%s", members.n ? ", " : "", name + first + 1);
    }
    if (!members.n)
        return usage_error("unknown command '%s' (see longan --help)", argv[0]);
    int rc = CLI_USAGE;
    if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        for (int i = 0; i < N_COMMANDS; i++)
            if (strncmp(commands[i]->name, argv[0], strlen(argv[0])) == 0 &&
                commands[i]->name[strlen(argv[0])] == ' ')
                printf("longan %-17s %s\n", commands[i]->name, commands[i]->summary);
        rc = CLI_DONE;
    } else if (argc > 1) {
        usage_error("unknown command '%s %s' (there are: %s)", argv[0], argv[1], members.data);
    } else {
        usage_error("'%s' needs one of: %s", argv[0], members.data);
    }
    buf_free(&members);
    return rc;
}

static bool asks_help(int argc, char **argv)
{
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)
            return true;
    return false;
}

static int run_command(const command *c, int argc, char **argv)
{
    if (asks_help(argc, argv)) {
        opt_help(c);
        return CLI_DONE;
    }
    options o;
    cli_begin(c->name, false);
    int rc = opt_parse(c, argc, argv, &o);
    if (!rc) {
        cli_begin(c->name, o.verbose);
        cli_catch_interrupt();
        rc = c->run(&o);
        cli_progress_end();
    }
    opt_release(&o);
    return rc;
}

static int dispatch(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[0], "help") == 0 && argv[1][0] != '-') { /* help COMMAND */
        int used;
        const command *c = find_command(argc - 1, argv + 1, &used);
        if (!c)
            return family_usage(argc - 1, argv + 1);
        opt_help(c);
        return CLI_DONE;
    }
    if (strcmp(argv[0], "--help") == 0 || strcmp(argv[0], "-h") == 0 || strcmp(argv[0], "help") == 0) {
        program_help(stdout);
        return CLI_DONE;
    }
    if (strcmp(argv[0], "--version") == 0 || strcmp(argv[0], "-V") == 0) {
        printf("longan %s (commit %s)\n", CLI_VERSION, LG_COMMIT);
        return CLI_DONE;
    }
    if (argv[0][0] == '-')
        return usage_error("unknown option '%s' (see longan --help)", argv[0]);
    int used = 0;
    const command *c = find_command(argc, argv, &used);
    return c ? run_command(c, argc - used, argv + used) : family_usage(argc, argv);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        program_help(stderr);
        return CLI_USAGE;
    }
    int rc = dispatch(argc - 1, argv + 1);
    if (fflush(stdout) != 0 && rc == CLI_DONE)
        rc = failed("writing to stdout failed");
    return rc;
}
