/* Compressed memory on a model of a named shape with random weights: one chunk beside its floor, a bank, a gate step, a read step, and
 * memory mode beside MemAgent mode on one document.
 *
 *     memory_bench [--shape qwen2.5-7b|tiny|..] [--device cpu|cuda[:i]] [--threads N] [--only steps,bank,protocol]
 *                  [--chunk N --window N --ratio R] [--tokens N] [--doc N] [--update N] [--answer N] [--piece N] [--read N] [--all 0|1] [--gate-batch B]
 *                  [--questions N] [--reps N] [--dir DIR] [--disk DIR] [--rate TFLOPS] [--json FILE]
 *
 * bf16 weights, memory weights of the official layout (own q, k, v and embedding), a gate with additions of rank 16 to every projection.
 * The document is random ids; a prompt has as many ids as its text has words and signs. Nothing ends a text, so every update has
 * --update tokens (the protocol's 1024; 128 unless said). The gate is run on every chunk, but its decision is replaced: --read chunks, evenly
 * spread, are accepted (3 of 32), then all of them (--all 0: not). Random weights would accept by chance, and the time does not depend on what they say.
 * --dir: where banks are written (memory-backed storage for the figure of the specification); --disk: a folder whose write rate is
 * measured beside it. Peak device memory: what the device has in use, by anybody and weights included (cudaMemGetInfo), sampled at every
 * chunk; on the CPU there is none. Held: cache and staged slots of a question. Peak host memory: the kernel's high-water mark of this process, reset before each part. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <unistd.h>
#include "memory/ask.h"
#include "text/room.h"

enum { MAX_REPS = 50, RANK = 16, QUESTION = 32, FIRST_MEMORY = 3 /* "No previous memory" */ };

typedef struct bench {
    const char *shape, *device, *only, *dir, *disk, *json;
    int64_t threads, chunk, window, ratio, tokens, doc, update, answer, piece, read, all, gate_batch, questions, reps;
    double rate;                /* TFLOP/s of the floor, 0: what a large product gives here */
    lg_model *m;
    FILE *out;                  /* JSON lines, NULL: none */
    int64_t peak;               /* device bytes in use at most since the last reset */
    int64_t last_done;
    lg_template t_update, t_answer, t_gate, t_agent, t_final;
    lg_ids question;
} bench;

static void die(const lg_error *e) {
    fprintf(stderr, "memory_bench: %s\n", e->message);
    exit(1);
}
#define MUST(expr) do { lg_error must_e = { 0 }, *const err = &must_e; if ((expr) != LG_OK) die(err); } while (0)
static void *must(void *p) {
    const lg_error e = { .message = "out of memory" };
    if (!p) die(&e);
    return p;
}

/* ---- what is measured beside time ---- */
static int64_t host_peak(void) {
    FILE *f = fopen("/proc/self/status", "r");
    char line[128];
    long long kb = 0;
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmHWM: %lld", &kb) == 1) break;
    if (f) fclose(f);
    return kb * 1024;
}
static int64_t in_use(const bench *b) { return b->m->ops->in_use ? b->m->ops->in_use(b->m->ctx) : 0; }
static void sample(bench *b) {
    const int64_t now = in_use(b);
    if (now > b->peak) b->peak = now;
}
static void reset_peaks(bench *b) {
    FILE *f = fopen("/proc/self/clear_refs", "w");
    if (f) fputs("5", f), fclose(f);
    b->peak = 0;
    b->last_done = -1;
    sample(b);
}
static bool on_progress(void *user, const char *what, int64_t done, int64_t total) {
    bench *b = user;
    (void)what, (void)total;
    if (done != b->last_done) sample(b);
    b->last_done = done;
    return true;
}
static int by_value(const void *a, const void *b) { return *(const double *)a < *(const double *)b ? -1 : 1; }
static double median(double *x, int64_t n) {
    qsort(x, (size_t)n, sizeof *x, by_value);
    return x[n / 2];
}
static double gb(int64_t bytes) { return 1e-9 * (double)bytes; }

/* ---- ids ---- */
static int32_t any_id(const bench *b, uint64_t stream, int64_t i) { return (int32_t)lg_base_rng_below(1, stream, (uint64_t)i, b->m->cfg.n_vocab); }
static int32_t *document(const bench *b, int64_t n) {
    int32_t *ids = must(lg_base_calloc(n, sizeof *ids));
    for (int64_t i = 0; i < n; i++) ids[i] = any_id(b, 1, i);
    return ids;
}
static void push_any(const bench *b, lg_ids *to, int64_t n, uint64_t stream) {
    for (int64_t i = 0; i < n; i++)
        if (!lg_base_ids_push(to, any_id(b, stream, i))) must(NULL);
}

static int class_of(char c) {
    return c == '\n' ? 1 : c == ' ' ? 0 : (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ? 2 : 3;
}
/* Words, runs of signs and of line ends: about what a tokenizer of 150,000 ids makes of English. */
static int64_t words(const char *s, int64_t n) {
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++) k += class_of(s[i]) && (i == 0 || class_of(s[i - 1]) != class_of(s[i]));
    return k;
}
/* The published text in the frame of Qwen2.5's chat format (its markers are one id each), cut at its placeholders. */
static lg_template template_of(const bench *b, const char *text) {
    static const char *const holes[LG_HOLE_COUNT] = { "{prompt}", "{memory}", "{chunk}" };
    static const char head[] = "start system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.end\nstart user\n", tail[] = "end\nstart assistant\n";
    lg_template t = { 0 };
    int64_t extra = words(head, sizeof head - 1);
    for (const char *s = text;;) {
        const char *at = NULL;
        int kind = 0;
        for (int h = 0; h < LG_HOLE_COUNT; h++) {
            const char *x = strstr(s, holes[h]);
            if (x && (!at || x < at)) at = x, kind = h;
        }
        const int64_t n = at ? at - s : (int64_t)strlen(s);
        push_any(b, &t.piece[t.n_hole], extra + words(s, n) + (at ? 0 : words(tail, sizeof tail - 1)), 2);
        if (!at) return t;
        t.hole[t.n_hole++] = kind;
        s = at + strlen(holes[kind]);
        extra = 0;
    }
}

/* ---- the machine ---- */
/* Rate of a large product, on a context of its own, whose scratch goes with it. Its input is f32 and made bf16 on the way, its output f32:
 * 5 to 10% are lost to that. */
static double product_rate(const bench *b) {
    const bool host = b->m->ops->host_memory;
    const int64_t n_tok = host ? 256 : 8192, n = host ? 1024 : 32768;
    const lg_ops *o = b->m->ops;
    const lg_ops_config own = { .device = b->device, .n_threads = (int)b->threads, .compute = LG_COMPUTE_AUTO };
    lg_ops_ctx *c = NULL;
    lg_weight w = { .dtype = LG_DTYPE_BF16, .n_out = n, .n_in = n };
    double t[3];
    if (host) {
        uint16_t *data = must(lg_base_calloc(n * n, sizeof *data));
        for (int64_t i = 0; i < n * n; i++) data[i] = lg_base_f32_to_bf16((float)lg_base_rng_unit(1, 9, (uint64_t)i) - 0.5f);
        w.data = data;
    }
    float *x = NULL, *y = NULL;
    MUST(o->open(&c, &own, err));
    MUST(o->weight_bind(c, &w, err));
    MUST((x = o->alloc(c, n_tok * n * 4, true, err)) && (y = o->alloc(c, n_tok * n * 4, true, err)) ? LG_OK : LG_ERR_NOMEM);
    float *some = must(lg_base_calloc(n_tok * 1024, sizeof *some));
    for (int64_t i = 0; i < n_tok * 1024; i++) some[i] = (float)lg_base_rng_unit(1, 8, (uint64_t)i) - 0.5f;
    for (int64_t at = 0; at < n_tok * n; at += n_tok * 1024) o->upload(c, x + at, some, n_tok * 1024 * 4);
    const lg_kv_geom g = { .dtype = LG_DTYPE_F32, .n_head_kv = 1, .head_dim = 64, .row_bytes = 256 };
    MUST(o->reserve(c, n_tok, 1, LG_PAGE, 1, &g, n, n, err));
    for (int r = -1; r < 3; r++) {
        const double at = lg_base_now();
        o->product_add(c, &(lg_op_product_add){ .y = y, .x = x, .w = &w, .n_tok = n_tok });
        MUST(o->sync(c, err));
        if (r >= 0) t[r] = lg_base_now() - at;
    }
    o->free(c, x);
    o->free(c, y);
    o->weight_unbind(c, &w);
    o->close(c);
    lg_base_free((void *)w.data);
    lg_base_free(some);
    qsort(t, 3, sizeof *t, by_value);
    return 2e-12 * (double)n_tok * (double)n * (double)n / t[0];
}

static double write_rate(const char *dir) { /* bytes a second of a new file, synced */
    enum { PIECE = 16 << 20, N = 64 };
    char path[4096];
    snprintf(path, sizeof path, "%s/memory-bench-%ld.tmp", dir, (long)getpid());
    uint8_t *data = must(lg_base_alloc(PIECE));
    for (int64_t i = 0; i < PIECE; i += 8) {
        const uint64_t x = lg_base_rng(1, 7, (uint64_t)i);
        memcpy(data + i, &x, 8);
    }
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    bool ok = fd >= 0;
    const double at = lg_base_now();
    for (int i = 0; i < N && ok; i++) ok = write(fd, data, PIECE) == PIECE;
    ok = ok && !fdatasync(fd);
    const double s = lg_base_now() - at;
    if (fd >= 0) close(fd);
    unlink(path);
    lg_base_free(data);
    return ok ? (double)PIECE * N / s : 0;
}

/* ---- one chunk ---- */
/* Operations of a full chunk: products and attention of all layers that run whole. */
static double chunk_ops(const bench *b, double macs) {
    const lg_config *c = &b->m->cfg;
    const int64_t per = b->window / b->ratio, rows = b->window + per;
    double seen = 0;
    for (int64_t w = 0; w < b->chunk / b->window; w++) seen += (double)rows * (double)(w * per) + (double)rows * (double)(rows + 1) / 2;
    return 2 * macs + 4 * (double)(c->n_layer - 1) * (double)(c->n_head * c->head_dim) * seen;
}

static void chunk_steps(bench *b) {
    const lg_config *g = &b->m->cfg;
    static const int64_t batches[] = { 1, 2, 4 };
    printf("\ncompression of a chunk of %lld tokens, windows of %lld, ratio %lld (%lld rows)\n", (long long)b->chunk, (long long)b->window, (long long)b->ratio,
           (long long)(b->chunk + b->chunk / b->ratio));
    printf("%8s %12s %12s %10s %12s %14s\n", "at once", "s a chunk", "best", "TFLOP/s", "floor, s", "device, GB");
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
        const int64_t n = batches[i], stride = g->n_layer * (b->chunk / b->ratio) * g->n_head_kv * g->head_dim;
        lg_compressor *c;
        reset_peaks(b);
        MUST(lg_memory_compressor_new(&c, b->m, b->chunk, b->window, b->ratio, n, err));
        int32_t *ids = document(b, n * b->chunk);
        const int32_t *text[4];
        int64_t len[4];
        float *k, *v;
        if (b->m->ops->host_alloc) {
            MUST((k = b->m->ops->host_alloc(b->m->ctx, n * stride * 4, err)) && (v = b->m->ops->host_alloc(b->m->ctx, n * stride * 4, err)) ? LG_OK : LG_ERR_NOMEM);
        } else {
            k = must(lg_base_calloc(n * stride, 4));
            v = must(lg_base_calloc(n * stride, 4));
        }
        for (int64_t j = 0; j < n; j++) text[j] = ids + j * b->chunk, len[j] = b->chunk;
        double t[MAX_REPS];
        for (int64_t r = -1; r < b->reps; r++) { /* one warms up */
            const double at = lg_base_now();
            MUST(lg_memory_compress(c, text, len, n, k, v, stride, err));
            if (r >= 0) t[r] = (lg_base_now() - at) / (double)n;
        }
        sample(b);
        const double s = median(t, b->reps), ops = chunk_ops(b, lg_memory_compress_flops(c)), floor = ops / b->rate * 1e-12;
        printf("%8lld %12.4f %12.4f %10.1f %12.4f %14.2f\n", (long long)n, s, t[0], ops / s * 1e-12, floor, gb(b->peak));
        if (i == 0) printf("%8s %.2f TFLOP; at 500 and 600 TFLOP/s: %.3f and %.3f s\n", "", ops * 1e-12, ops / 5e14, ops / 6e14);
        if (b->out)
            fprintf(b->out, "{\"what\":\"chunk\",\"at_once\":%lld,\"seconds\":%.6f,\"best\":%.6f,\"operations\":%.4e,\"floor\":%.6f,\"device_peak\":%lld}\n", (long long)n, s, t[0],
                    ops, floor, (long long)b->peak);
        lg_memory_compressor_free(c);
        if (b->m->ops->host_alloc) b->m->ops->host_free(b->m->ctx, k), b->m->ops->host_free(b->m->ctx, v);
        else lg_base_free(k), lg_base_free(v);
        lg_base_free(ids);
    }
}

/* ---- banks ---- */
static void bank_path(const bench *b, char path[4096]) { snprintf(path, 4096, "%s/memory-bench-%ld.bank", b->dir, (long)getpid()); }

/* Seconds; the file stays. */
static double build(bench *b, int64_t n, const char *path) {
    int32_t *ids = document(b, n);
    lg_bank_params p;
    lg_bank_defaults(&p);
    p.chunk = b->chunk;
    p.window = b->window;
    p.ratio = b->ratio;
    p.progress = on_progress;
    p.progress_user = b;
    unlink(path);
    const double at = lg_base_now();
    MUST(lg_bank_build_ids(b->m, &p, ids, n, path, err));
    const double s = lg_base_now() - at;
    lg_base_free(ids);
    return s;
}

static void big_bank(bench *b) {
    char path[4096];
    lg_bank *bank;
    lg_bank_info info;
    bank_path(b, path);
    reset_peaks(b);
    const double s = build(b, b->tokens, path);
    const int64_t host = host_peak(), device = b->peak;
    MUST(lg_bank_open(&bank, path, err));
    lg_bank_get_info(bank, &info);
    lg_bank_close(bank);
    unlink(path);
    const double disk = b->disk ? write_rate(b->disk) : 0;
    printf("\nbank of %lld tokens, %lld chunks in groups of %lld, written to %s\n", (long long)b->tokens, (long long)info.n_chunk, (long long)info.group, b->dir);
    printf("%.1f s, %.0f tokens/s, %.4f s a chunk; file %.2f GB (%.0f MB/s); peak device memory %.2f GB, of the host %.2f GB\n", s, (double)b->tokens / s,
           s / (double)info.n_chunk, gb(info.file_bytes), (double)info.file_bytes / s * 1e-6, gb(device), gb(host));
    if (disk > 0) printf("%s writes %.0f MB/s: the file alone would take %.1f s there\n", b->disk, disk * 1e-6, (double)info.file_bytes / disk);
    if (b->out)
        fprintf(b->out, "{\"what\":\"bank\",\"tokens\":%lld,\"chunks\":%lld,\"group\":%lld,\"seconds\":%.4f,\"file_bytes\":%lld,\"device_peak\":%lld,\"host_peak\":%lld,\"disk_rate\":%.0f}\n",
                (long long)b->tokens, (long long)info.n_chunk, (long long)info.group, s, (long long)info.file_bytes, (long long)device, (long long)host, disk);
}

/* ---- questions ---- */
static int64_t slots_of(const bench *b) { return b->chunk / b->ratio; }
static int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }
static int64_t context(const bench *b, lg_ask_mode mode) {
    const int64_t memory = larger(b->update, FIRST_MEMORY), final = QUESTION + memory + b->answer + 1;
    const lg_template *u = mode == LG_ASK_MEMORY ? &b->t_update : &b->t_agent;
    const int64_t before = mode == LG_ASK_MEMORY ? slots_of(b) : b->piece < b->doc ? b->piece : b->doc;
    const int64_t update = before + lg_memory_template_len(u) + QUESTION + memory + b->update + 1, gate = slots_of(b) + lg_memory_template_len(&b->t_gate) + QUESTION + memory;
    return larger(larger(update, mode == LG_ASK_MEMORY ? gate : 0), final + lg_memory_template_len(mode == LG_ASK_MEMORY ? &b->t_answer : &b->t_final));
}
static lg_session *session(const bench *b, lg_ask_mode mode, int64_t width) {
    lg_session_params p;
    lg_session *s;
    lg_session_defaults(&p);
    p.n_ctx = context(b, mode);
    p.n_seq_max = width;
    p.allow_beyond = true;
    MUST(lg_session_new(&s, b->m, &p, err));
    return s;
}

typedef struct result { double build_s, gate_s, read_s, answer_s, all_s; int64_t n_gate, n_read, tokens, held, device; } result;

static result ask(bench *b, lg_ask_mode mode, const lg_bank *bank, int64_t width, const uint8_t *forced) {
    result r = { 0 };
    lg_answer answer = { .chunk = -1 };
    lg_ids memory = { 0 };
    reset_peaks(b);
    const double began = lg_base_now();
    lg_asking a = { .s = session(b, mode, width), .m = b->m, .b = bank, .question = &b->question, .n = 1, .out = &answer, .memory = &memory, .pad = -1, .forced = forced };
    lg_ask_defaults(&a.p);
    a.p.mode = mode;
    a.p.gate = mode == LG_ASK_MEMORY ? LG_GATE_ADAPTER : LG_GATE_NONE;
    a.p.gate_batch = width;
    a.p.memory_size = b->update;
    a.p.max_new = b->answer;
    a.p.piece = b->piece;
    a.p.progress = on_progress;
    a.p.progress_user = b;
    a.update = mode == LG_ASK_MEMORY ? b->t_update : b->t_agent;
    a.answer = mode == LG_ASK_MEMORY ? b->t_answer : b->t_final;
    a.gate = b->t_gate;
    push_any(b, &memory, FIRST_MEMORY, 4);
    if (mode == LG_ASK_MEMORY) MUST(lg_memory_loop(&a, err));
    else MUST(lg_memory_memagent(&a, err));
    sample(b);
    r.all_s = lg_base_now() - began;
    r.gate_s = answer.gate_s;
    r.read_s = answer.read_s;
    r.answer_s = answer.answer_s;
    for (int64_t i = 0; i + 1 < answer.n_step; i++) {
        r.n_gate += mode == LG_ASK_MEMORY;
        r.n_read += answer.step[i].accepted;
        r.tokens += answer.step[i].memory.n;
    }
    r.tokens += answer.ids.n;
    lg_stats stats;
    lg_session_stats(a.s, &stats);
    r.held = stats.kv_bytes_cache + a.s->stage_bytes;
    r.device = b->peak;
    lg_session_free(a.s);
    lg_answer_free(&answer);
    lg_ids_free(&memory);
    return r;
}

/* The device's memory with `n` questions under way: the session is only opened. */
static int64_t device_of(bench *b, lg_ask_mode mode, int64_t n, int64_t *held) {
    lg_stats stats;
    lg_session *s = session(b, mode, n);
    lg_session_stats(s, &stats);
    const int64_t bytes = in_use(b);
    *held = stats.kv_bytes_cache;
    lg_session_free(s);
    return bytes;
}

/* One gate step and one read step with a first and with a full memory. */
static void ask_steps(bench *b, const lg_bank *bank) {
    printf("\nsteps behind %lld slots (median of %lld)\n", (long long)slots_of(b), (long long)b->reps);
    printf("%-34s %10s %12s %14s\n", "step", "rows", "ms", "ms a chunk");
    const int64_t n_layer = b->m->cfg.n_layer, memories[2] = { FIRST_MEMORY, b->update };
    const int64_t wide = b->gate_batch < bank->h.n_chunk ? b->gate_batch : bank->h.n_chunk;
    const uint8_t **rows = must(lg_base_calloc(wide, 2 * n_layer * (int64_t)sizeof *rows));
    lg_slots *slots = must(lg_base_calloc(wide, sizeof *slots));
    lg_ids *prompts = must(lg_base_calloc(wide, sizeof *prompts));
    int32_t *seqs = must(lg_base_calloc(wide, sizeof *seqs));
    double *score = must(lg_base_calloc(wide, sizeof *score)), t[MAX_REPS], p[MAX_REPS];
    lg_session *s = session(b, LG_ASK_MEMORY, wide);
    lg_sampler_params greedy;
    lg_sampler_defaults(&greedy);
    for (int64_t i = 0; i < wide; i++) {
        seqs[i] = (int32_t)i;
        MUST(lg_memory_bank_slots(bank, i, &slots[i], rows + 2 * n_layer * i, rows + 2 * n_layer * i + n_layer, err));
    }
    for (int64_t r = -1; r < b->reps; r++) {
        const double at = lg_base_now();
        MUST(lg_session_set_slots(s, 0, &slots[0], err));
        if (r >= 0) t[r] = 1e3 * (lg_base_now() - at);
    }
    printf("%-34s %10lld %12.2f\n", "slots into the cache", (long long)slots[0].n, median(t, b->reps));
    if (b->out) fprintf(b->out, "{\"what\":\"slots\",\"ms\":%.4f}\n", t[b->reps / 2]);
    for (int m = 0; m < 2; m++) {
        lg_ids memory = { 0 }, prompt = { 0 };
        push_any(b, &memory, memories[m], 5);
        const lg_ids fill[LG_HOLE_COUNT] = { b->question, memory, { 0 } };
        MUST(lg_memory_prompt(&b->t_gate, fill, &prompt, err));
        for (int64_t n = 1; n <= wide; n = n < wide && 2 * n > wide ? wide : 2 * n) {
            for (int64_t i = 0; i < n; i++) prompts[i] = prompt;
            for (int64_t r = -1; r < b->reps; r++) {
                const double at = lg_base_now();
                MUST(lg_memory_gate(s, seqs, slots, prompts, n, score, err));
                if (r >= 0) t[r] = 1e3 * (lg_base_now() - at);
            }
            char name[64];
            snprintf(name, sizeof name, "gate, memory of %lld, %lld chunks", (long long)memories[m], (long long)n);
            printf("%-34s %10lld %12.2f %14.2f\n", name, (long long)(n * prompt.n), median(t, b->reps), t[b->reps / 2] / (double)n);
            if (b->out)
                fprintf(b->out, "{\"what\":\"gate\",\"memory\":%lld,\"chunks\":%lld,\"rows\":%lld,\"ms\":%.4f}\n", (long long)memories[m], (long long)n, (long long)(n * prompt.n),
                        t[b->reps / 2]);
        }
        MUST(lg_memory_prompt(&b->t_update, fill, &prompt, err));
        for (int64_t r = -1; r < b->reps; r++) {
            const int32_t zero = 0;
            MUST(lg_session_set_slots(s, 0, &slots[0], err));
            double at = lg_base_now();
            MUST(lg_session_sync(s, 0, prompt.data, prompt.n, err));
            if (r >= 0) p[r] = 1e3 * (lg_base_now() - at);
            s->seq[0].sampler = &greedy; /* as generation does: the id is drawn on the device */
            const int64_t steps = b->update < 16 ? b->update : 16;
            for (int64_t i = 0; i <= steps; i++) { /* the first is not counted: a graph is made */
                if (i == 1) at = lg_base_now();
                const int32_t id = any_id(b, 6, i);
                MUST(lg_session_step(s, &zero, &id, 1, err));
            }
            if (r >= 0) t[r] = 1e3 * (lg_base_now() - at) / (double)steps;
            s->seq[0].sampler = NULL;
        }
        char name[64];
        snprintf(name, sizeof name, "read, memory of %lld: prompt", (long long)memories[m]);
        printf("%-34s %10lld %12.2f\n", name, (long long)prompt.n, median(p, b->reps));
        snprintf(name, sizeof name, "read, memory of %lld: a token", (long long)memories[m]);
        printf("%-34s %10d %12.3f\n", name, 1, median(t, b->reps));
        if (b->out)
            fprintf(b->out, "{\"what\":\"read\",\"memory\":%lld,\"rows\":%lld,\"prompt_ms\":%.4f,\"token_ms\":%.4f}\n", (long long)memories[m], (long long)prompt.n, p[b->reps / 2],
                    t[b->reps / 2]);
        lg_ids_free(&memory);
        lg_ids_free(&prompt);
    }
    lg_session_free(s);
    lg_base_free(rows);
    lg_base_free(slots);
    lg_base_free(prompts);
    lg_base_free(seqs);
    lg_base_free(score);
}

/* ---- the protocol ---- */
static void row(bench *b, const char *name, const result *r, double seconds, const result *agent) {
    const double ratio = agent ? agent->all_s / seconds : 1, held = agent ? (double)r->held / (double)agent->held : 1;
    printf("%-34s %8.2f %7.2f %7.2f %8.2f %7.2f %7lld %7.2fx %9.1f %6.2fx %9.2f\n", name, seconds, r->build_s, r->gate_s, r->read_s, r->answer_s, (long long)r->tokens, ratio,
           (double)r->held * 1e-6, held, gb(r->device));
    fflush(stdout);
    if (b->out)
        fprintf(b->out, "{\"what\":\"protocol\",\"mode\":\"%s\",\"seconds\":%.4f,\"build_s\":%.4f,\"gate_s\":%.4f,\"read_s\":%.4f,\"answer_s\":%.4f,\"looked_at\":%lld,\"read\":%lld,"
                "\"tokens\":%lld,\"ratio\":%.4f,\"held_bytes\":%lld,\"held_ratio\":%.4f,\"device_peak\":%lld}\n",
                name, seconds, r->build_s, r->gate_s, r->read_s, r->answer_s, (long long)r->n_gate, (long long)r->n_read, (long long)r->tokens, ratio, (long long)r->held, held,
                (long long)r->device);
}

static void protocol(bench *b, lg_bank *bank, double build_s, int64_t build_device) {
    const int64_t n = bank->h.n_chunk;
    uint8_t *some = must(lg_base_calloc(n, 1)), *all = must(lg_base_calloc(n, 1));
    char name[64];
    for (int64_t i = 0; i < b->read && i < n; i++) some[(2 * i + 1) * n / (2 * b->read)] = 1;
    memset(all, 1, (size_t)n);
    printf("\nmemory beside MemAgent: %lld tokens, %lld chunks of %lld and %lld pieces of %lld, updates of %lld tokens, an answer of %lld\n", (long long)b->doc, (long long)n,
           (long long)b->chunk, (long long)((b->doc + b->piece - 1) / b->piece), (long long)b->piece, (long long)b->update, (long long)b->answer);
    printf("%-34s %8s %7s %7s %8s %7s %7s %8s %9s %7s %9s\n", "", "wall s", "build", "gate", "read", "answer", "tokens", "faster", "held MB", "", "device GB");
    const result agent = ask(b, LG_ASK_MEMAGENT, bank, 1, NULL);
    row(b, "MemAgent", &agent, agent.all_s, NULL);
    for (int k = 0; k < 1 + b->all; k++) {
        const int64_t widths[2] = { 1, b->gate_batch };
        for (int w = 0; w < (k || b->gate_batch == 1 ? 1 : 2); w++) {
            result r = ask(b, LG_ASK_MEMORY, bank, widths[w], k ? all : some);
            snprintf(name, sizeof name, "memory, %lld of %lld read, gate by %lld", (long long)r.n_read, (long long)n, (long long)widths[w]);
            r.build_s = build_s;
            const int64_t own = r.device;
            r.device = larger(r.device, build_device);
            row(b, name, &r, r.all_s + build_s, &agent);
            r.build_s = 0;
            r.device = own;
            row(b, "    the bank already built", &r, r.all_s, &agent);
        }
    }
    int64_t held[2], device[2];
    device[0] = device_of(b, LG_ASK_MEMORY, b->questions, &held[0]);
    device[1] = device_of(b, LG_ASK_MEMAGENT, b->questions, &held[1]);
    printf("%lld questions at once, sessions opened but not run: cache %.2f and %.2f GB (%.2fx), device memory %.2f and %.2f GB\n", (long long)b->questions, gb(held[0]), gb(held[1]),
           (double)held[0] / (double)held[1], gb(device[0]), gb(device[1]));
    if (b->out)
        fprintf(b->out, "{\"what\":\"questions\",\"n\":%lld,\"memory_cache\":%lld,\"memagent_cache\":%lld,\"memory_device\":%lld,\"memagent_device\":%lld}\n", (long long)b->questions,
                (long long)held[0], (long long)held[1], (long long)device[0], (long long)device[1]);
    lg_base_free(some);
    lg_base_free(all);
}

/* ---- all of it ---- */
static int usage(void) {
    fprintf(stderr, "usage: memory_bench [--shape NAME] [--device D] [--threads N] [--only steps,bank,protocol] [--chunk N] [--window N] [--ratio R] [--tokens N] [--doc N]\n"
                    "                    [--update N] [--answer N] [--piece N] [--read N] [--all 0|1] [--gate-batch B] [--questions N] [--reps N] [--dir DIR] [--disk DIR] [--rate TFLOPS]\n"
                    "                    [--json FILE]\n");
    return 2;
}

static bool options(bench *b, int argc, char **argv) {
    const struct { const char *name; int64_t *to, least, most; } n[] = {
        { "--threads", &b->threads, 0, 1024 }, { "--chunk", &b->chunk, 1, 1 << 20 }, { "--window", &b->window, 1, 1 << 20 }, { "--ratio", &b->ratio, 1, 1 << 10 },
        { "--tokens", &b->tokens, 1, 1 << 28 }, { "--doc", &b->doc, 1, 1 << 28 }, { "--update", &b->update, 1, 1 << 16 }, { "--answer", &b->answer, 1, 1 << 16 },
        { "--piece", &b->piece, 1, 1 << 20 }, { "--read", &b->read, 1, 1 << 20 }, { "--all", &b->all, 0, 1 }, { "--gate-batch", &b->gate_batch, 1, 64 }, { "--questions", &b->questions, 1, 4096 },
        { "--reps", &b->reps, 1, MAX_REPS } };
    const struct { const char *name, **to; } s[] = { { "--shape", &b->shape }, { "--device", &b->device }, { "--only", &b->only }, { "--dir", &b->dir }, { "--disk", &b->disk },
                                                     { "--json", &b->json } };
    for (int i = 1; i < argc; i++) {
        bool known = false;
        if (i + 1 == argc) return false;
        for (size_t j = 0; j < sizeof n / sizeof *n && !known; j++)
            if (!strcmp(argv[i], n[j].name)) {
                *n[j].to = atoll(argv[++i]);
                known = true;
                if (*n[j].to < n[j].least || *n[j].to > n[j].most) return false;
            }
        for (size_t j = 0; j < sizeof s / sizeof *s && !known; j++)
            if (!strcmp(argv[i], s[j].name)) *s[j].to = argv[++i], known = true;
        if (!known && !strcmp(argv[i], "--rate")) b->rate = atof(argv[++i]), known = true;
        if (!known) return false;
    }
    return true;
}

int main(int argc, char **argv) {
    bench b = { .shape = "qwen2.5-7b", .only = "steps,bank,protocol", .dir = "/dev/shm", .chunk = 4096, .window = 2048, .ratio = 4, .tokens = 1750000, .doc = 131072, .update = 128,
                .answer = 128, .piece = 5000, .read = 3, .all = 1, .gate_batch = 8, .questions = 128, .reps = 5 };
    if (!options(&b, argc, argv)) return usage();
    if (b.json && !(b.out = fopen(b.json, "w"))) {
        fprintf(stderr, "memory_bench: %s: cannot be written\n", b.json);
        return 1;
    }
    lg_model_info info;
    const lg_model_params p = { .device = b.device, .n_threads = (int)b.threads, .compute = LG_COMPUTE_AUTO, .shape = b.shape, .shape_weights = LG_DTYPE_BF16 };
    const double opened = lg_base_now();
    MUST(lg_model_open(&b.m, &p, err));
    MUST(lg_model_shape_memory(b.m, RANK, err));
    b.m->tok = must(lg_text_new("no vocabulary")); /* every id stands for nothing */
    lg_model_get_info(b.m, &info);
    printf("%s, shape %s, %.2f GB of parameters in bf16, commit " LG_COMMIT ", opened in %.1f s\n", info.device, b.shape, 2e-9 * (double)info.n_params, lg_base_now() - opened);
    double copy = 0;
    MUST(lg_model_copy_rate(b.m, &copy, err));
    const double product = product_rate(&b);
    if (b.rate <= 0) b.rate = product;
    printf("copy %.0f GB/s, a large product %.2f TFLOP/s with its conversions; floors at %.2f TFLOP/s\n", copy * 1e-9, product, b.rate);
    if (b.out)
        fprintf(b.out, "{\"what\":\"machine\",\"device\":\"%s\",\"commit\":\"" LG_COMMIT "\",\"shape\":\"%s\",\"copy\":%.4e,\"product_tflops\":%.4f,\"floor_tflops\":%.4f}\n", info.device,
                b.shape, copy, product, b.rate);
    b.t_update = template_of(&b, lg_memory_update_text);
    b.t_answer = template_of(&b, lg_memory_answer_text);
    b.t_gate = template_of(&b, lg_memory_gate_text);
    b.t_agent = template_of(&b, lg_memagent_update_text);
    b.t_final = template_of(&b, lg_memagent_plain_text);
    push_any(&b, &b.question, QUESTION, 3);
    printf("ids of the templates: update %lld, answer %lld, gate %lld; MemAgent %lld and %lld; the question %d\n", (long long)lg_memory_template_len(&b.t_update),
           (long long)lg_memory_template_len(&b.t_answer), (long long)lg_memory_template_len(&b.t_gate), (long long)lg_memory_template_len(&b.t_agent),
           (long long)lg_memory_template_len(&b.t_final), QUESTION);
    const bool steps = strstr(b.only, "steps"), whole = strstr(b.only, "protocol");
    if (steps) chunk_steps(&b);
    fflush(stdout);
    if (steps || whole) {
        char path[4096];
        lg_bank *bank;
        bank_path(&b, path);
        reset_peaks(&b);
        const double s = build(&b, b.doc, path);
        const int64_t device = b.peak, host = host_peak();
        MUST(lg_bank_open(&bank, path, err));
        printf("\nbank of the document: %lld tokens in %.2f s, %.4f s a chunk; peak device memory %.2f GB, of the host %.2f GB\n", (long long)b.doc, s,
               s / (double)bank->h.n_chunk, gb(device), gb(host));
        if (steps) ask_steps(&b, bank);
        fflush(stdout);
        if (whole) protocol(&b, bank, s, device);
        lg_bank_close(bank);
        unlink(path);
    }
    fflush(stdout);
    if (strstr(b.only, "bank")) big_bank(&b);
    lg_template *t[] = { &b.t_update, &b.t_answer, &b.t_gate, &b.t_agent, &b.t_final };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) lg_memory_template_free(t[i]);
    lg_ids_free(&b.question);
    lg_model_free(b.m);
    if (b.out && fclose(b.out)) return 1;
    return 0;
}
