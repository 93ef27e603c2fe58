/* Memory weights (LycheeMemory) from the checkpoint itself, and adapter files: memory tensors in full or as low-rank
 * additions, reader and gate additions, the gate's head (docs/FORMATS.md "Adapter file").
 *
 * First every tensor gets its place in a table of references (checkpoint, then the files in order: the last one wins), all
 * shapes checked; unknown names fail with their list. Then the table is turned into bound weights. Files hold the rows of q
 * and k in half order; where the model's own order is interleaved they are permuted on the way. */
#include "model/model.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { N_MEM = 4, N_PART = 7, MAX_RANK = 1024, MAX_WINDOW = 1 << 20, Q = 0, K, V, O };
static const char *const part_name[N_PART] = { "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj" };
static const char *const gguf_name[N_PART] = { "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down" };

/* Where a projection's addition comes from. */
typedef struct pair { const lg_tensor_ref *a, *b; const char *path; double alpha; /* 0: the rank */ } pair;
typedef struct full { const lg_tensor_ref *w, *b; const char *path; bool alias; } full;

typedef struct loader {
    lg_model *m;
    lg_error *err;
    lg_st **file;             /* adapters */
    int32_t n_file;
    full embed, *mem;         /* mem: [n_layer * N_MEM] */
    pair *low[3];             /* compressor, reader, gate: [n_layer * N_PART] */
    const lg_tensor_ref *score, *score_bias;
    const char *path;         /* being read */
    double alpha;
    bool wanted;              /* the checkpoint or an adapter speaks of memory */
    bool from_file;           /* an adapter file does: what is missing there fails at once */
    bool listed;              /* memory_param was given */
    bool init_bos;
    lg_text unknown;
} loader;

static int64_t out_of(const lg_config *c, int p) {
    const int64_t n[N_PART] = { c->n_head * c->head_dim, c->n_head_kv * c->head_dim, c->n_head_kv * c->head_dim, c->n_embd, c->n_ff, c->n_ff,
                                c->n_embd };
    return n[p];
}
static int64_t in_of(const lg_config *c, int p) { return p == O ? c->n_head * c->head_dim : p == 6 ? c->n_ff : c->n_embd; }

static lg_status nomem(lg_error *err) { return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"); }

static lg_status check(const loader *x, const lg_tensor_ref *t, int64_t rows, int64_t cols) {
    const bool float_type = t->dtype == LG_DTYPE_F32 || t->dtype == LG_DTYPE_F16 || t->dtype == LG_DTYPE_BF16;
    const int64_t got_rows = t->n_dim > 0 ? t->shape[0] : 1, got_cols = t->n_dim > 1 ? t->shape[1] : 1;
    if (t->n_dim > 2 || t->n_dim < 1 || got_rows != rows || (t->n_dim == 2 && got_cols != cols) || (t->n_dim == 1 && cols != 1))
        return lg_base_fail(x->err, LG_ERR_MISMATCH, t->offset, "%s: tensor %s is %lld x %lld, the model needs %lld x %lld", x->path, t->name,
                            (long long)got_rows, (long long)got_cols, (long long)rows, (long long)cols);
    if (!float_type)
        return lg_base_fail(x->err, LG_ERR_UNSUPPORTED, t->offset, "%s: tensor %s is not f32, f16 or bf16", x->path, t->name);
    return LG_OK;
}

/* ---- names ---- */
static bool skip(const char **s, const char *head) {
    const size_t n = strlen(head);
    if (strncmp(*s, head, n)) return false;
    *s += n;
    return true;
}
/* "model.layers.N." with a layer of the model. */
static bool skip_layer(const char **s, int64_t n_layer, int64_t *layer) {
    const char *p = *s;
    if (!skip(&p, "model.layers.") || *p < '0' || *p > '9') return false;
    for (*layer = 0; *p >= '0' && *p <= '9'; p++)
        if ((*layer = *layer * 10 + *p - '0') >= n_layer) return false;
    if (*p != '.') return false;
    *s = p + 1;
    return true;
}

/* Takes a memory tensor of either naming. *ours: the name is one of memory's. */
static lg_status take_full(loader *x, const lg_tensor_ref *t, bool *ours) {
    lg_status st;
    static const char *const families[] = { "lychee_memory_", "beacon_" };
    static const char *const letter[N_MEM] = { "q_proj", "k_proj", "v_proj", "o_proj" };
    const lg_config *c = &x->m->cfg;
    *ours = true;
    for (int f = 0; f < 2; f++) {
        const char *s = t->name;
        int64_t l;
        full *slot = NULL;
        if (skip(&s, "model.") && skip(&s, families[f]) && !strcmp(s, "embed_tokens.weight")) {
            LG_TRY(check(x, t, 1, c->n_embd));
            slot = &x->embed;
        } else if (s = t->name, skip_layer(&s, c->n_layer, &l) && skip(&s, "self_attn.") && skip(&s, families[f])) {
            for (int p = 0; p < N_MEM; p++) {
                const char *rest = s;
                if (!skip(&rest, letter[p])) continue;
                full *at = &x->mem[l * N_MEM + p];
                if (!strcmp(rest, ".bias") && p != O) {
                    LG_TRY(check(x, t, out_of(c, p), 1));
                    if (at->path != x->path) *at = (full){ .path = x->path };
                    if (f == 0 || !at->b || at->alias) at->b = t;
                    return LG_OK;
                }
                if (strcmp(rest, ".weight")) continue;
                LG_TRY(check(x, t, out_of(c, p), in_of(c, p)));
                slot = at;
            }
        }
        if (!slot) continue;
        if (slot->path != x->path) *slot = (full){ .path = x->path };
        if (f == 1 && slot->w && !slot->alias) return LG_OK; /* the newer name wins */
        slot->w = t;
        slot->alias = f == 1;
        return LG_OK;
    }
    *ours = false;
    st = LG_OK;
done:
    return st;
}

static lg_status take_low(loader *x, const lg_tensor_ref *t, const char *s, int kind, bool *ours) {
    lg_status st = LG_OK;
    const lg_config *c = &x->m->cfg;
    int64_t l;
    *ours = false;
    if (!skip_layer(&s, c->n_layer, &l)) return LG_OK;
    for (int p = 0; p < (kind == 0 ? N_MEM : N_PART); p++) {
        const char *rest = s;
        if (!skip(&rest, part_name[p])) continue;
        const bool a = !strcmp(rest, ".lora_A.weight");
        if (!a && strcmp(rest, ".lora_B.weight")) continue;
        const int64_t most = out_of(c, p) < in_of(c, p) ? out_of(c, p) : in_of(c, p), rank = t->n_dim == 2 ? t->shape[a ? 0 : 1] : 0;
        if (rank < 1 || rank > most || rank > MAX_RANK)
            return lg_base_fail(x->err, LG_ERR_FORMAT, t->offset, "%s: tensor %s has rank %lld (1 to %lld)", x->path, t->name, (long long)rank,
                                (long long)(most < MAX_RANK ? most : MAX_RANK));
        LG_TRY(a ? check(x, t, rank, in_of(c, p)) : check(x, t, out_of(c, p), rank));
        pair *at = &x->low[kind][l * N_PART + p];
        if (at->path != x->path) *at = (pair){ .path = x->path, .alpha = x->alpha };
        *(a ? &at->a : &at->b) = t;
        *ours = true;
    }
done:
    return st;
}

static lg_status take_adapter_tensor(loader *x, const lg_tensor_ref *t) {
    static const char *const kinds[3] = { "compressor.", "reader.", "gate." };
    lg_status st;
    bool ours;
    LG_TRY(take_full(x, t, &ours));
    if (ours) x->wanted = x->from_file = true;
    for (int k = 0; k < 3 && !ours; k++) {
        const char *s = t->name;
        if (!skip(&s, kinds[k])) continue;
        if (k == 2 && !strcmp(s, "score.weight")) {
            LG_TRY(check(x, t, 1, x->m->cfg.n_embd));
            x->score = t;
            ours = true;
        } else if (k == 2 && !strcmp(s, "score.bias")) {
            LG_TRY(check(x, t, 1, 1));
            x->score_bias = t;
            ours = true;
        } else {
            LG_TRY(take_low(x, t, s, k, &ours));
            if (ours && k == 0) x->wanted = x->from_file = true;
        }
    }
    if (!ours && x->unknown.n < 300 && !lg_base_text_printf(&x->unknown, "%s%s", x->unknown.n ? ", " : "", t->name)) LG_TRY(nomem(x->err));
done:
    return st;
}

/* ---- settings: the metadata of an adapter, the config.json of a checkpoint ---- */
static lg_status bad(const loader *x, const char *key, const char *what) {
    return lg_base_fail(x->err, LG_ERR_FORMAT, -1, "%s: key \"%s\" %s", x->path, key, what);
}

static lg_status read_param(loader *x, const lg_json *v, const char *key) {
    lg_memory_weights *w = &x->m->memory;
    if (lg_json_typeof(v) != LG_JSON_ARRAY) return bad(x, key, "is no list");
    w->param = 0;
    x->listed = true;
    for (int64_t i = 0; i < lg_json_size(v); i++) {
        const char *s = lg_json_str(lg_json_at(v, i), NULL), *at = s && s[0] && !s[1] ? strchr("qkvo", s[0]) : NULL;
        if (!at) return bad(x, key, "holds something other than \"q\", \"k\", \"v\", \"o\"");
        w->param |= 1u << (at - "qkvo");
    }
    return LG_OK;
}
static lg_status read_ratios(loader *x, const lg_json *v, const char *key) {
    lg_memory_weights *w = &x->m->memory;
    int64_t one;
    const bool list = lg_json_typeof(v) == LG_JSON_ARRAY;
    const int64_t n = list ? lg_json_size(v) : 1;
    if (n < 1 || n > LG_MAX_RATIOS) return bad(x, key, "holds no ratio or too many");
    for (int64_t i = 0; i < n; i++) {
        if (!lg_json_int(list ? lg_json_at(v, i) : v, &one) || one < 1 || one > MAX_WINDOW) return bad(x, key, "holds no positive integers");
        w->ratio[i] = one;
    }
    w->n_ratio = (int32_t)n;
    return LG_OK;
}
static lg_status read_window(loader *x, const lg_json *v, const char *key) {
    int64_t n;
    if (!lg_json_int(v, &n) || n < 1 || n > MAX_WINDOW) return bad(x, key, "is no window length");
    x->m->memory.window = n;
    return LG_OK;
}

static lg_status read_meta(loader *x, const lg_st *file) {
    lg_status st;
    lg_json *j = NULL;
    int64_t version;
    const lg_json *v;
    const char *text = lg_st_meta(file, "longan"), *s;
    if (!text) return lg_base_fail(x->err, LG_ERR_FORMAT, -1, "%s: no adapter: metadata key \"longan\" is missing", x->path);
    LG_TRY(lg_json_parse(&j, x->path, text, (int64_t)strlen(text), x->err));
    s = lg_json_str(lg_json_get(j, "format"), NULL);
    if (!s || strcmp(s, "longan-adapter")) LG_TRY(bad(x, "format", "is not \"longan-adapter\""));
    if (!lg_json_int(lg_json_get(j, "version"), &version) || version != 1) LG_TRY(bad(x, "version", "is not 1"));
    s = lg_json_str(lg_json_get(j, "family"), NULL);
    if (s && strcmp(s, x->m->info.family))
        LG_TRY(lg_base_fail(x->err, LG_ERR_MISMATCH, -1, "%s: the adapter belongs to family %.64s, the model is of family %s", x->path, s, x->m->info.family));
    if (!s) {
        s = lg_json_str(lg_json_get(j, "base"), NULL);
        lg_base_log(LG_LOG_WARN, "%s: made for %s; without a family in the file that this is its base is unverified", x->path, s ? s : "an unnamed base");
    }
    x->alpha = 0;
    if ((v = lg_json_get(j, "lora_alpha")) && !(lg_json_num(v, &x->alpha) && isfinite(x->alpha) && x->alpha > 0)) LG_TRY(bad(x, "lora_alpha", "is no positive number"));
    if ((v = lg_json_get(j, "memory_param"))) LG_TRY(read_param(x, v, "memory_param"));
    if ((v = lg_json_get(j, "window"))) LG_TRY(read_window(x, v, "window"));
    if ((v = lg_json_get(j, "ratios"))) LG_TRY(read_ratios(x, v, "ratios"));
    if ((v = lg_json_get(j, "slot_rope"))) {
        s = lg_json_str(v, NULL);
        if (!s || (strcmp(s, "none") && strcmp(s, "slot-index"))) LG_TRY(bad(x, "slot_rope", "is neither \"none\" nor \"slot-index\""));
        x->m->memory.slot_rope = !strcmp(s, "slot-index");
    }
done:
    lg_json_free(j);
    return st;
}

/* A key under its newer name, else its older one. */
static const lg_json *config_key(const lg_json *root, const char *key, char name[64]) {
    snprintf(name, 64, "lychee_memory_%s", key);
    const lg_json *v = lg_json_get(root, name);
    if (lg_json_typeof(v) != LG_JSON_NULL) return v;
    char old[64];
    snprintf(old, sizeof old, "beacon_%s", key);
    const lg_json *w = lg_json_get(root, old);
    if (lg_json_typeof(w) == LG_JSON_NULL) return NULL;
    snprintf(name, 64, "%s", old);
    return w;
}

static lg_status refuse(loader *x, const char *text) {
    lg_base_free(x->m->memory.refusal);
    x->m->memory.refusal = lg_base_strdup(text);
    return x->m->memory.refusal ? LG_OK : nomem(x->err);
}

/* What only the published code's other modes can do keeps the model usable, but not its memory. */
static lg_status read_config(loader *x) {
    lg_status st = LG_OK;
    lg_memory_weights *w = &x->m->memory;
    const lg_json *root = x->m->src.json, *v;
    char key[64], text[256];
    int64_t n;
    if (!root) return LG_OK;
    x->path = x->m->src.path;
    if ((v = config_key(root, "window", key))) {
        LG_TRY(read_window(x, v, key));
        x->wanted = true;
    }
    if ((v = config_key(root, "param", key))) LG_TRY(read_param(x, v, key));
    if ((v = config_key(root, "ratio", key))) LG_TRY(read_ratios(x, v, key));
    if ((v = config_key(root, "embed_init", key))) x->init_bos = lg_json_str(v, NULL) && !strcmp(lg_json_str(v, NULL), "bos");
    static const char *const words[][2] = { { "attn", "full-coverage" }, { "pos", "interleave" } };
    for (int i = 0; i < 2; i++)
        if ((v = config_key(root, words[i][0], key)) && !(lg_json_str(v, NULL) && !strcmp(lg_json_str(v, NULL), words[i][1]))) {
            snprintf(text, sizeof text, "config key \"%s\" is not \"%s\", the only mode that is supported", key, words[i][1]);
            LG_TRY(refuse(x, text));
        }
    const struct { const char *key; int64_t want; } counts[] = { { "sink_size", 0 }, { "parallel_window", 1 }, { "stride", w->window } };
    for (int i = 0; i < 3; i++)
        if ((v = config_key(root, counts[i].key, key)) && !(lg_json_int(v, &n) && n == counts[i].want)) {
            snprintf(text, sizeof text, "config key \"%s\" is not %lld, the only value that is supported", key, (long long)counts[i].want);
            LG_TRY(refuse(x, text));
        }
done:
    return st;
}

/* ---- from references to weights ---- */
/* Row of the file that row o of the model's own order is. */
static int64_t file_row(const lg_config *c, int p, int64_t o) {
    if (!c->rope_interleaved || p > K) return o;
    const int64_t d = c->head_dim, h = o / d, i = o % d;
    return h * d + i / 2 + (i % 2 ? d / 2 : 0);
}

static void load_row(const lg_tensor_ref *t, int64_t row, int64_t n, float *dst) {
    lg_base_dequant(t->dtype, (const uint8_t *)t->data + row * lg_base_row_bytes(t->dtype, n), dst, n);
}

/* Owns w->data until a back end has packed it. */
static lg_status bind_owned(loader *x, lg_weight *w) {
    lg_model *m = x->m;
    const lg_status st = m->ops->weight_bind(m->ctx, w, x->err);
    if (st != LG_OK || !w->packed) return st;
    lg_base_free((void *)w->data);
    w->data = NULL;
    return LG_OK;
}

static lg_status bind_vector(loader *x, float **out, const float *host, int64_t n) {
    lg_model *m = x->m;
    *out = m->ops->alloc(m->ctx, n * (int64_t)sizeof(float), false, x->err);
    if (!*out) return LG_ERR_NOMEM;
    m->ops->upload(m->ctx, *out, host, n * (int64_t)sizeof(float));
    return LG_OK;
}

static lg_status bind_bias(loader *x, float **out, const lg_tensor_ref *t, int p) {
    const int64_t n = out_of(&x->m->cfg, p);
    float *file = lg_base_calloc(n, sizeof *file), *own = lg_base_calloc(n, sizeof *own);
    lg_status st = LG_OK;
    if (!file || !own) LG_TRY(nomem(x->err));
    lg_base_dequant(t->dtype, t->data, file, n);
    for (int64_t o = 0; o < n; o++) own[o] = file[file_row(&x->m->cfg, p, o)];
    LG_TRY(bind_vector(x, out, own, n));
done:
    lg_base_free(file);
    lg_base_free(own);
    return st;
}

/* A projection as the file has it: rows permuted, dtype kept. */
static lg_status bind_full(loader *x, lg_weight *w, const lg_tensor_ref *t, int p) {
    const lg_config *c = &x->m->cfg;
    const int64_t n_out = out_of(c, p), n_in = in_of(c, p), row = lg_base_row_bytes(t->dtype, n_in);
    uint8_t *data = lg_base_calloc(n_out, row);
    if (!data) return nomem(x->err);
    for (int64_t o = 0; o < n_out; o++) memcpy(data + o * row, (const uint8_t *)t->data + file_row(c, p, o) * row, (size_t)row);
    *w = (lg_weight){ .dtype = t->dtype, .n_out = n_out, .n_in = n_in, .data = data };
    return bind_owned(x, w);
}

/* Base + scale * B A: memory rows run in passes of thousands, where one product more costs more than the memory saved. */
static lg_status bind_merged(loader *x, lg_weight *w, int64_t l, int p) {
    lg_status st = LG_OK;
    const lg_config *c = &x->m->cfg;
    const pair *r = &x->low[0][l * N_PART + p];
    const int64_t n_out = out_of(c, p), n_in = in_of(c, p), rank = r->a->shape[0];
    const lg_dtype type = x->m->compute == LG_COMPUTE_F32 ? LG_DTYPE_F32 : LG_DTYPE_BF16;
    const double scale = (r->alpha > 0 ? r->alpha : (double)rank) / (double)rank;
    char name[64];
    snprintf(name, sizeof name, "blk.%lld.%s.weight", (long long)l, gguf_name[p]);
    const lg_tensor_ref *base = x->m->src.path ? lg_source_find(&x->m->src, name) : NULL; /* checked when the base was bound */
    if (!base) return lg_base_fail(x->err, LG_ERR_UNSUPPORTED, -1, "%s: additions to a base without weights in a file", r->path);
    float *a = lg_base_calloc(rank, n_in * (int64_t)sizeof(float)), *b = lg_base_calloc(rank, sizeof(float)), *sum = lg_base_calloc(n_in, sizeof(float));
    uint8_t *data = lg_base_calloc(n_out, lg_base_row_bytes(type, n_in));
    if (!a || !b || !sum || !data) {
        lg_base_free(data);
        LG_TRY(nomem(x->err));
    }
    *w = (lg_weight){ .dtype = type, .n_out = n_out, .n_in = n_in, .data = data };
    for (int64_t j = 0; j < rank; j++) load_row(r->a, j, n_in, a + j * n_in);
    for (int64_t o = 0; o < n_out; o++) {
        load_row(base, o, n_in, sum);
        load_row(r->b, file_row(c, p, o), rank, b);
        for (int64_t j = 0; j < rank; j++) {
            const float f = (float)(scale * (double)b[j]);
            for (int64_t i = 0; i < n_in; i++) sum[i] += f * a[j * n_in + i];
        }
        lg_base_quant(type, sum, data + o * lg_base_row_bytes(type, n_in), n_in);
    }
    LG_TRY(bind_owned(x, w));
done:
    lg_base_free(a);
    lg_base_free(b);
    lg_base_free(sum);
    return st;
}

/* The embedding row that fills a missing one: the end token's, or the begin token's. */
static lg_status fill_embed(loader *x, float *dst) {
    lg_model *m = x->m;
    int64_t id = -1;
    const char *key = x->init_bos ? "bos_token_id" : "eos_token_id";
    const lg_tensor_ref *t = m->src.path ? lg_source_find(&m->src, "token_embd.weight") : NULL;
    if (!t) { /* a shape without a file */
        for (int64_t i = 0; i < m->cfg.n_embd; i++) dst[i] = 2.0f * (float)lg_base_rng_unit(5, 5, (uint64_t)i) - 1.0f;
        return LG_OK;
    }
    if (m->src.gguf) {
        lg_gguf_int(m->src.gguf, x->init_bos ? "tokenizer.ggml.bos_token_id" : "tokenizer.ggml.eos_token_id", &id);
    } else {
        const lg_json *v = lg_json_get(m->src.json, key);
        lg_json_int(lg_json_typeof(v) == LG_JSON_ARRAY ? lg_json_at(v, 0) : v, &id);
    }
    if (id < 0 || id >= m->cfg.n_vocab)
        return lg_base_fail(x->err, LG_ERR_FORMAT, -1, "%s: no %s to fill the memory embedding with", m->src.path, key);
    load_row(t, id, m->cfg.n_embd, dst);
    return LG_OK;
}

static lg_status bind_row(loader *x, lg_weight *w, const lg_tensor_ref *t, bool lookup) {
    lg_status st;
    const int64_t d = x->m->cfg.n_embd;
    float *row = lg_base_calloc(d, sizeof *row);
    if (!row) return nomem(x->err);
    *w = (lg_weight){ .dtype = LG_DTYPE_F32, .n_out = 1, .n_in = d, .data = row, .lookup = lookup };
    if (t) lg_base_dequant(t->dtype, t->data, row, d);
    else LG_TRY(fill_embed(x, row));
    LG_TRY(bind_owned(x, w));
done:
    return st;
}

/* Lists what is missing of what memory_param asks for; the count is returned, -1: out of memory. */
static int64_t list_missing(loader *x, lg_text *names) {
    const lg_config *c = &x->m->cfg;
    int64_t n = 0;
    bool ok = true;
    enum { SHOWN = 4 };
    if (!x->embed.w && n++ < SHOWN) ok = lg_base_text_printf(names, "model.lychee_memory_embed_tokens.weight");
    for (int64_t l = 0; l < c->n_layer; l++)
        for (int p = 0; p < N_MEM; p++) {
            const full *f = &x->mem[l * N_MEM + p];
            const pair *r = &x->low[0][l * N_PART + p];
            if (!(x->m->memory.param >> p & 1) || (r->a && r->b)) continue;
            for (int bias = 0; bias < (x->m->layer[l].bq && p != O ? 2 : 1); bias++)
                if (!(bias ? f->b : f->w) && n++ < SHOWN)
                    ok = ok && lg_base_text_printf(names, "%smodel.layers.%lld.self_attn.lychee_memory_%c_proj.%s", names->n ? ", " : "", (long long)l,
                                                   "qkvo"[p], bias ? "bias" : "weight");
        }
    if (n > SHOWN) ok = ok && lg_base_text_printf(names, " and %lld more", (long long)(n - SHOWN));
    return ok ? n : -1;
}

static lg_status bind_memory(loader *x, bool fill) {
    lg_status st = LG_OK;
    lg_model *m = x->m;
    lg_memory_weights *w = &m->memory;
    const lg_config *c = &m->cfg;
    lg_text names = { 0 };
    if (!w->window) w->window = 2048;
    if (!w->n_ratio) w->ratio[w->n_ratio++] = 4;
    if (w->refusal) return LG_OK;
    if (!x->listed) { /* what there is; q, k, v where nothing is */
        for (int64_t i = 0; i < c->n_layer * N_MEM; i++)
            if (x->mem[i].w || x->low[0][i / N_MEM * N_PART + i % N_MEM].a) w->param |= 1u << i % N_MEM;
        if (!w->param) w->param = LG_MEMORY_Q | LG_MEMORY_K | LG_MEMORY_V;
    }
    for (int64_t i = 0; i < c->n_layer * N_MEM; i++)
        if (x->mem[i].w && !(w->param >> i % N_MEM & 1))
            LG_TRY(lg_base_fail(x->err, LG_ERR_FORMAT, x->mem[i].w->offset, "%s: tensor %s is there, but memory_param does not list \"%c\"", x->mem[i].path,
                                x->mem[i].w->name, "qkvo"[i % N_MEM]));
    const int64_t missing = list_missing(x, &names);
    if (missing < 0) LG_TRY(nomem(x->err));
    if (missing && !fill) {
        if (x->from_file) LG_TRY(lg_base_fail(x->err, LG_ERR_FORMAT, -1, "memory tensors are missing: %s", names.data));
        if (x->wanted) {
            lg_text why = { 0 };
            st = lg_base_text_printf(&why, "%s: memory tensors are missing: %s (--fill-memory fills them from the base's)", m->src.path, names.data)
                     ? refuse(x, why.data) : nomem(x->err);
            lg_text_free(&why);
        } else {
            st = refuse(x, "the model has no memory weights: it needs lychee_memory_* tensors in the checkpoint or an --adapter FILE with them "
                           "(--mode memagent works with any model)");
        }
        goto done;
    }
    if (missing) lg_base_log(LG_LOG_WARN, "memory tensors are filled from the base's, untrained: %s", names.data);
    w->layer = lg_base_calloc(c->n_layer, sizeof *w->layer);
    if (!w->layer) LG_TRY(nomem(x->err));
    LG_TRY(bind_row(x, &w->embed, x->embed.w, true));
    for (int64_t l = 0; l < c->n_layer; l++) {
        lg_memory_layer *y = &w->layer[l];
        lg_weight *const own[N_MEM] = { &y->wq, &y->wk, &y->wv, &y->wo };
        float **const bias[N_MEM] = { &y->bq, &y->bk, &y->bv, NULL };
        float *const base_bias[N_MEM] = { m->layer[l].bq, m->layer[l].bk, m->layer[l].bv, NULL };
        for (int p = 0; p < N_MEM; p++) {
            const full *f = &x->mem[l * N_MEM + p];
            const pair *r = &x->low[0][l * N_PART + p];
            if (!(w->param >> p & 1)) continue;
            if (r->a && r->b) LG_TRY(bind_merged(x, own[p], l, p));
            else if (f->w) LG_TRY(bind_full(x, own[p], f->w, p));
            else continue; /* filled: the base's serve */
            if (f->b && f->w) {
                LG_TRY(bind_bias(x, bias[p], f->b, p));
            } else if (base_bias[p]) {
                *bias[p] = m->ops->alloc(m->ctx, out_of(c, p) * (int64_t)sizeof(float), false, x->err);
                if (!*bias[p]) LG_TRY(LG_ERR_NOMEM);
                m->ops->copy(m->ctx, *bias[p], base_bias[p], out_of(c, p) * (int64_t)sizeof(float));
            }
        }
    }
done:
    lg_text_free(&names);
    return st;
}

static lg_status bind_low(loader *x, lg_lora *r, const pair *f, int p) {
    lg_status st = LG_OK;
    lg_model *m = x->m;
    const lg_config *c = &m->cfg;
    if (!f->a && !f->b) return LG_OK;
    const lg_tensor_ref *some = f->a ? f->a : f->b;
    if (!f->a || !f->b)
        return lg_base_fail(x->err, LG_ERR_FORMAT, some->offset, "%s: tensor %s has no twin lora_%c", f->path, some->name, f->a ? 'B' : 'A');
    const int64_t rank = f->a->shape[0], n_out = out_of(c, p), n_in = in_of(c, p);
    if (f->b->shape[1] != rank)
        return lg_base_fail(x->err, LG_ERR_FORMAT, f->b->offset, "%s: tensor %s has rank %lld, its twin %lld", f->path, f->b->name,
                            (long long)f->b->shape[1], (long long)rank);
    if (!r) return LG_OK; /* only checked */
    float *a = lg_base_calloc(rank * n_in, sizeof *a), *b = lg_base_calloc(rank * n_out, sizeof *b);
    if (!a || !b) LG_TRY(nomem(x->err));
    for (int64_t j = 0; j < rank; j++) load_row(f->a, j, n_in, a + j * n_in);
    for (int64_t o = 0; o < n_out; o++) load_row(f->b, file_row(c, p, o), rank, b + o * rank);
    r->scale = (float)((f->alpha > 0 ? f->alpha : (double)rank) / (double)rank);
    LG_TRY(bind_vector(x, &r->a, a, rank * n_in));
    LG_TRY(bind_vector(x, &r->b, b, rank * n_out));
    r->rank = (int32_t)rank;
    if (m->ops->lora_bind) LG_TRY(m->ops->lora_bind(m->ctx, r, n_in, n_out, x->err));
done:
    lg_base_free(a);
    lg_base_free(b);
    return st;
}

static lg_status bind_set(loader *x, lg_lora_set *set, const pair *low) {
    lg_status st = LG_OK;
    const int64_t n = x->m->cfg.n_layer;
    bool any = false;
    for (int64_t i = 0; i < n * N_PART; i++) any = any || low[i].a || low[i].b;
    if (!any) return LG_OK;
    set->layer = lg_base_calloc(n, sizeof *set->layer);
    if (!set->layer) return nomem(x->err);
    for (int64_t l = 0; l < n; l++) {
        lg_lora_layer *y = &set->layer[l];
        lg_lora *const r[N_PART] = { &y->q, &y->k, &y->v, &y->o, &y->gate, &y->up, &y->down };
        for (int p = 0; p < N_PART; p++) LG_TRY(bind_low(x, r[p], &low[l * N_PART + p], p));
    }
done:
    return st;
}

/* ---- all of it ---- */
lg_status lg_model_adapters_open(lg_model *m, const lg_model_params *p, lg_error *err) {
    lg_status st = LG_OK;
    const int64_t n = m->cfg.n_layer;
    loader x = { .m = m, .err = err, .n_file = p->n_adapter };
    bool ours;
    x.mem = lg_base_calloc(n * N_MEM, sizeof *x.mem);
    for (int k = 0; k < 3; k++) x.low[k] = lg_base_calloc(n * N_PART, sizeof(pair));
    x.file = lg_base_calloc(p->n_adapter + 1, sizeof *x.file);
    if (!x.mem || !x.low[0] || !x.low[1] || !x.low[2] || !x.file) LG_TRY(nomem(err));
    if (m->src.path) LG_TRY(read_config(&x));
    x.path = m->src.path;
    for (int64_t i = 0; m->src.st && i < lg_source_n_tensor(&m->src); i++) {
        LG_TRY(take_full(&x, lg_source_tensor(&m->src, i), &ours));
        x.wanted = x.wanted || ours;
    }
    for (int32_t i = 0; i < p->n_adapter; i++) {
        x.path = p->adapters[i];
        LG_TRY(lg_st_open(&x.file[i], x.path, err));
        LG_TRY(read_meta(&x, x.file[i]));
        for (int64_t t = 0; t < lg_st_n_tensor(x.file[i]); t++) LG_TRY(take_adapter_tensor(&x, lg_st_tensor(x.file[i], t)));
        if (x.unknown.n) LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, -1, "%s: unknown tensors: %.400s", x.path, x.unknown.data));
    }
    for (int64_t i = 0; i < n * N_PART; i++) LG_TRY(bind_low(&x, NULL, &x.low[0][i], (int)(i % N_PART)));
    LG_TRY(bind_memory(&x, p->fill_memory));
    LG_TRY(bind_set(&x, &m->reader, x.low[1]));
    LG_TRY(bind_set(&x, &m->gate, x.low[2]));
    if (x.score) {
        LG_TRY(bind_row(&x, &m->gate_score, x.score, false));
        if (x.score_bias) lg_base_dequant(x.score_bias->dtype, x.score_bias->data, &m->gate_bias, 1);
    } else if (x.score_bias || m->gate.layer) {
        LG_TRY(lg_base_fail(err, LG_ERR_FORMAT, -1, "a gate without its tensor gate.score.weight"));
    }
done:
    for (int32_t i = 0; x.file && i < p->n_adapter; i++) lg_st_close(x.file[i]);
    lg_base_free(x.file);
    lg_base_free(x.mem);
    for (int k = 0; k < 3; k++) lg_base_free(x.low[k]);
    lg_text_free(&x.unknown);
    return st;
}

static void free_weight(lg_model *m, lg_weight *w) {
    m->ops->weight_unbind(m->ctx, w);
    lg_base_free((void *)w->data);
}
static void free_set(lg_model *m, lg_lora_set *set) {
    for (int64_t l = 0; set->layer && l < m->cfg.n_layer; l++) {
        lg_lora_layer *y = &set->layer[l];
        lg_lora *const r[N_PART] = { &y->q, &y->k, &y->v, &y->o, &y->gate, &y->up, &y->down };
        for (int p = 0; p < N_PART; p++) {
            if (m->ops->lora_unbind && r[p]->rank) m->ops->lora_unbind(m->ctx, r[p]);
            if (r[p]->a) m->ops->free(m->ctx, r[p]->a);
            if (r[p]->b) m->ops->free(m->ctx, r[p]->b);
        }
    }
    lg_base_free(set->layer);
}

void lg_model_adapters_free(lg_model *m) {
    lg_memory_weights *w = &m->memory;
    lg_base_free(w->refusal);
    if (!m->ctx) return;
    for (int64_t l = 0; w->layer && l < m->cfg.n_layer; l++) {
        lg_memory_layer *y = &w->layer[l];
        lg_weight *const own[N_MEM] = { &y->wq, &y->wk, &y->wv, &y->wo };
        float *const bias[3] = { y->bq, y->bk, y->bv };
        for (int p = 0; p < N_MEM; p++) free_weight(m, own[p]);
        for (int p = 0; p < 3; p++)
            if (bias[p]) m->ops->free(m->ctx, bias[p]);
    }
    free_weight(m, &w->embed);
    free_weight(m, &m->gate_score);
    free_set(m, &m->reader);
    free_set(m, &m->gate);
    lg_base_free(w->layer);
}
