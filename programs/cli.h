/* The longan program: what its sub-commands share.
 *
 * options.c  one table per command gives parsing, defaults, range checks and help
 * output.c   append-only text buffer, JSON writer, files written atomically, stdout written at the end
 * setup.c    messages, progress bars, reading input, opening models and sessions
 * batch.c    the JSON lines of generate --batch;  chart.c  line charts as SVG
 * cmd_*.c    the commands; each returns an exit code (0 done, 1 failed, 2 wrong usage)
 * The program sees the library through include/longan only. Until a command has succeeded it writes
 * nothing to stdout, except text streamed to a terminal. */
#ifndef LONGAN_CLI_H
#define LONGAN_CLI_H

#include <signal.h>
#include <stdio.h>

#include "longan/heads.h"
#include "longan/longan.h"
#include "longan/memory.h"

#define CLI_VERSION "0.1.0"
#ifndef LG_COMMIT
#define LG_COMMIT "unknown"
#endif

enum { CLI_DONE = 0, CLI_FAILED = 1, CLI_USAGE = 2 };

/* ---- options --------------------------------------------------------------------------------------- */
typedef enum opt_kind {
    OPT_END,
    OPT_FLAG,   /* bool */
    OPT_TEXT,   /* const char * */
    OPT_SIZE,   /* int64_t, suffixes k and m */
    OPT_REAL,   /* double */
    OPT_CHOICE, /* int: index in choices */
    OPT_TEXTS,  /* text_list, repeatable */
    OPT_SIZES   /* size_list, separated by commas */
} opt_kind;

typedef struct opt {
    opt_kind kind;
    char letter;          /* 0: none */
    const char *name;     /* without dashes */
    size_t at;            /* offset in options */
    const char *meta;     /* placeholder in the help */
    const char *dflt;     /* parsed before the command line; shown in the help */
    const char *shown;    /* default in words where it is not a constant */
    const char *choices;  /* "f32|f16" */
    int64_t lo, hi;       /* OPT_SIZE, OPT_SIZES: inclusive */
    double rlo, rhi;      /* OPT_REAL: inclusive */
    const char *help;
} opt;

#define O_FLAG(l, n, field, h) \
    {.kind = OPT_FLAG, .letter = (l), .name = (n), .at = offsetof(options, field), .help = (h)}
#define O_TEXT(l, n, field, m, d, h)                                                              \
    {.kind = OPT_TEXT, .letter = (l), .name = (n), .at = offsetof(options, field), .meta = (m),   \
     .dflt = (d), .help = (h)}
#define O_SIZE(l, n, field, min, max, d, s, h)                                                    \
    {.kind = OPT_SIZE, .letter = (l), .name = (n), .at = offsetof(options, field), .meta = "N",   \
     .lo = (min), .hi = (max), .dflt = (d), .shown = (s), .help = (h)}
#define O_REAL(n, field, min, max, d, s, h)                                                       \
    {.kind = OPT_REAL, .name = (n), .at = offsetof(options, field), .meta = "X", .rlo = (min),    \
     .rhi = (max), .dflt = (d), .shown = (s), .help = (h)}
#define O_CHOICE(n, field, c, d, s, h)                                                            \
    {.kind = OPT_CHOICE, .name = (n), .at = offsetof(options, field), .meta = (c), .choices = (c), \
     .dflt = (d), .shown = (s), .help = (h)}
#define O_TEXTS(n, field, m, h) \
    {.kind = OPT_TEXTS, .name = (n), .at = offsetof(options, field), .meta = (m), .help = (h)}
#define O_SIZES(n, field, m, min, max, d, s, h)                                                   \
    {.kind = OPT_SIZES, .name = (n), .at = offsetof(options, field), .meta = (m), .lo = (min),    \
     .hi = (max), .dflt = (d), .shown = (s), .help = (h)}
#define O_END {.kind = OPT_END}

typedef struct opt_group {
    const char *title;
    const opt *opts; /* ends with O_END */
} opt_group;

typedef struct text_list { const char **v; int64_t n; } text_list;
typedef struct size_list { int64_t *v; int64_t n; } size_list;

enum { CLI_MAX_GIVEN = 96, CLI_MAX_ARGS = 64 };

typedef struct options {
    /* model and session */
    const char *model, *device, *chat_format;
    text_list adapter;
    bool fill_memory;
    int64_t threads, ctx, prefill_chunk;
    int compute, kv;
    /* hybrid heads */
    const char *roles;
    int64_t budget, sinks, recents, observe, refresh, correct_every;
    int rule, block, correct;
    double rule_value, rule_scale, keep;
    bool roles_any_model;
    /* input and output */
    const char *prompt, *file, *ids, *output, *system, *session;
    bool json, help, verbose, devices, special, bos, chat, decode, last;
    int type;
    /* logits */
    int64_t decode_from;
    const char *sets;
    /* generation */
    const char *batch;
    int64_t n, top_k, seed, parallel;
    double temp, top_p, min_p, repeat_penalty;
    text_list stop;
    size_list stop_ids;
    /* bench */
    size_list depth;
    int64_t reps, steps;
    bool synthetic;
    const char *csv, *svg, *shape;
    int weights;
    int64_t at_once, prefill;
    /* heads calibrate */
    int share;
    int64_t retrieval, positions, passages;
    double kl_bound;
    const char *curve;
    const char *also;
    int64_t search;
    /* memory */
    int64_t chunk, window, ratio, group, bank_chunk;
    int slots, slot_rope;
    const char *bank;
    /* ask */
    int mode, final;
    const char *question_ids, *questions, *update_template, *answer_template, *memory_init, *gate, *trace_html, *cache;
    int64_t memory_size, max_new, pad_id, second_look, gate_batch, top;
    double gate_threshold;
    bool keep_memory, trace, draft, weigh;
    int64_t refine;
    int spread;
    int64_t piece;
    /* what stood on the command line */
    const char *args[CLI_MAX_ARGS];
    int n_args;
    const opt *given[CLI_MAX_GIVEN];
    int n_given;
} options;

typedef struct command {
    const char *name; /* one or two words */
    const char *args; /* positional arguments in the help, "" if none */
    int max_args;
    const char *summary;
    const opt_group *groups; /* ends with title NULL */
    const char *notes;       /* printed before the examples; may be NULL */
    const char *examples;
    int (*run)(const options *o);
} command;

extern const command cmd_info, cmd_convert, cmd_tokenize, cmd_logits, cmd_generate, cmd_chat,
    cmd_perplexity, cmd_bench, cmd_heads_calibrate, cmd_heads_show, cmd_heads_plot, cmd_bank_build, cmd_bank_append, cmd_bank_info, cmd_bank_verify,
    cmd_bank_export, cmd_bank_ls, cmd_ask;

/* Shared tables. */
extern const opt opts_bank[], opts_model[], opts_session[], opts_hybrid[], opts_length[], opts_sampling[], opts_output[];

int opt_parse(const command *c, int argc, char **argv, options *o); /* CLI_DONE or CLI_USAGE */
void opt_release(options *o);
bool opt_given(const options *o, const char *name);
void opt_help(const command *c);
int opt_check_hybrid(const options *o); /* contradictions among the hybrid options */

/* ---- text, JSON, files ----------------------------------------------------------------------------- */
typedef struct buf { char *data; size_t n, cap; bool comma, mapped; } buf; /* data[n] == 0 once written to, but where mapped */
void *cli_alloc(void *old, size_t count, size_t size); /* realloc; ends the program when out of memory */
void buf_add(buf *b, const char *s, size_t n);
void buf_puts(buf *b, const char *s);
void buf_printf(buf *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
void buf_free(buf *b);

void json_begin(buf *b, char bracket);
void json_end(buf *b, char bracket);
void json_key(buf *b, const char *key);
void json_text(buf *b, const char *s, int64_t n); /* n < 0: up to the NUL; invalid UTF-8 -> U+FFFD */
void json_int(buf *b, int64_t v);
void json_number_of(buf *b, double v); /* NaN and infinities: null */
void json_bool(buf *b, bool v);
void json_none(buf *b);
void json_ids(buf *b, const int32_t *ids, int64_t n);
void json_kv_text(buf *b, const char *key, const char *s); /* NULL: null */
void json_kv_int(buf *b, const char *key, int64_t v);
void json_kv_real(buf *b, const char *key, double v);

/* A file that appears under its name only when complete. Not a regular file: written in place. */
typedef struct out_file { char *path, *temp; FILE *f; } out_file;
int out_open(out_file *f, const char *path);
int out_commit(out_file *f);
void out_abort(out_file *f); /* legal after commit and on a zeroed struct */
int out_whole(const char *path, const buf *b);
void npy_header(FILE *f, const int64_t *shape, int n_dim); /* then the f32 data */
int emit(const buf *b); /* all of b to stdout, errors checked */

/* ---- messages, input, models ----------------------------------------------------------------------- */
extern volatile sig_atomic_t cli_interrupted; /* set by Ctrl-C after cli_catch_interrupt */
void cli_catch_interrupt(void);
void cli_begin(const char *name, bool verbose); /* name in messages; routes the library's log */
int usage_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
int failed(const char *format, ...) __attribute__((format(printf, 1, 2)));
int failed_with(const lg_error *e); /* exit code that fits the status */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool cli_progress(void *user, const char *what, int64_t done, int64_t total); /* lg_progress_fn */
void cli_progress_end(void);
double cli_clock(void);

int need(const char *option, const char *value); /* usage error where value is NULL */
int read_input(const char *path, buf *out);      /* "-": stdin, to its last byte */
int map_input(const char *path, buf *out);       /* the same, but a regular file is mapped, not copied; out is only read then */
typedef struct id_list { int32_t *v; int64_t n, cap; } id_list; /* v from malloc */
void ids_push(id_list *l, int32_t id);
int parse_ids(const char *name, const buf *text, int64_t n_vocab, id_list *out);
int read_ids(const char *path, int64_t n_vocab, id_list *out);
int model_open(const options *o, bool vocab_only, lg_model **out);
int roles_open(const options *o, lg_roles **out); /* *out NULL without --roles */
void session_setup(const options *o, const lg_roles *roles, lg_session_params *p);
int session_open(lg_model *m, const lg_session_params *p, lg_session **out);
int opt_check_bank(const options *o); /* contradictions among --bank, --bank-chunk, --slot-rope */
int bank_place(const options *o, lg_session *s, int64_t n_seq); /* --bank: sequences 0 .. n_seq-1 stand behind its chunk */
int sampler_setup(const options *o, int64_t n_vocab, lg_generate_params *p, int32_t **stop_ids);
double share_of(int64_t part, int64_t whole);

/* One line of `generate --batch`: {"prompt": TEXT} or {"ids": [..]}, and "n" where it is wanted. */
typedef struct batch_item {
    buf prompt;    /* where has_prompt */
    id_list ids;
    bool has_prompt;
    int64_t n;     /* -1: not given */
    int64_t line;  /* in the file, for messages */
} batch_item;
int batch_read(const char *path, const char *key, batch_item **items, int64_t *n); /* key: "prompt", "question" */
void batch_free(batch_item *items, int64_t n);

/* Line chart: one line per series over a log2 axis. y < 0 marks a missing point. */
typedef struct chart_series { const char *name, *colour; const double *y; } chart_series;
void chart_lines(buf *b, const char *title, const char *x_title, const char *y_title,
                 const int64_t *x, int64_t n_x, const chart_series *series, int64_t n_series);

#endif
