/* One view on a GGUF file and on a Hugging Face folder; the family and fingerprint of what is in it. */
#include "model/model.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static bool ends_with(const char *s, const char *end) {
    const size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

lg_status lg_source_open(lg_source *s, const char *path, lg_error *err) {
    lg_status st;
    struct stat sb;
    char *config = NULL;
    memset(s, 0, sizeof *s);
    s->path = lg_base_strdup(path);
    if (!s->path) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    const bool is_folder = !stat(path, &sb) && S_ISDIR(sb.st_mode);
    if (!is_folder && !ends_with(path, ".safetensors")) return lg_gguf_open(&s->gguf, path, err);

    s->folder = lg_base_strdup(path);
    if (!s->folder) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    if (!is_folder) {
        char *slash = strrchr(s->folder, '/');
        if (slash) *slash = 0;
        else strcpy(s->folder, "."); /* a name that ends in .safetensors has room for it */
    }
    const size_t n = strlen(s->folder) + sizeof "/config.json";
    config = lg_base_alloc((int64_t)n);
    if (!config) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    snprintf(config, n, "%s/config.json", s->folder);
    LG_TRY(lg_json_load(&s->json, config, 16 << 20, err));
    LG_TRY(lg_st_open(&s->st, path, err));
done:
    lg_base_free(config);
    return st;
}

void lg_source_close(lg_source *s) {
    lg_gguf_close(s->gguf);
    lg_st_close(s->st);
    lg_json_free(s->json);
    lg_base_free(s->folder);
    lg_base_free(s->path);
    memset(s, 0, sizeof *s);
}

bool lg_source_hf_name(char *out, size_t n, const char *g) {
    static const char *const whole[][2] = {
        { "token_embd.weight", "model.embed_tokens.weight" },
        { "output_norm.weight", "model.norm.weight" },
        { "output.weight", "lm_head.weight" },
    };
    static const char *const part[][2] = {
        { "attn_norm", "input_layernorm" },   { "ffn_norm", "post_attention_layernorm" }, { "attn_q", "self_attn.q_proj" },
        { "attn_k", "self_attn.k_proj" },     { "attn_v", "self_attn.v_proj" },           { "attn_output", "self_attn.o_proj" },
        { "attn_q_norm", "self_attn.q_norm" }, { "attn_k_norm", "self_attn.k_norm" },     { "ffn_gate", "mlp.gate_proj" },
        { "ffn_up", "mlp.up_proj" },          { "ffn_down", "mlp.down_proj" },
    };
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
        if (!strcmp(g, whole[i][0])) return snprintf(out, n, "%s", whole[i][1]) < (int)n;
    int layer, used = 0;
    if (sscanf(g, "blk.%d.%n", &layer, &used) != 1 || !used) return false;
    const char *mid = g + used, *dot = strchr(mid, '.');
    if (!dot) return false;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++)
        if (strlen(part[i][0]) == (size_t)(dot - mid) && !strncmp(mid, part[i][0], (size_t)(dot - mid)))
            return snprintf(out, n, "model.layers.%d.%s%s", layer, part[i][1], dot) < (int)n;
    return false;
}

const lg_tensor_ref *lg_source_find(const lg_source *s, const char *gguf_name) {
    char name[160];
    if (s->gguf) return lg_gguf_find(s->gguf, gguf_name);
    return lg_source_hf_name(name, sizeof name, gguf_name) ? lg_st_find(s->st, name) : NULL;
}

int64_t lg_source_n_tensor(const lg_source *s) { return s->gguf ? lg_gguf_n_tensor(s->gguf) : lg_st_n_tensor(s->st); }
const lg_tensor_ref *lg_source_tensor(const lg_source *s, int64_t i) {
    return s->gguf ? lg_gguf_tensor(s->gguf, i) : lg_st_tensor(s->st, i);
}
int64_t lg_source_file_bytes(const lg_source *s) {
    return s->gguf ? lg_gguf_file_bytes(s->gguf) : lg_st_file_bytes(s->st);
}

/* ---- family and fingerprint ---- */
static void feed_int(lg_hash *h, int64_t v) {
    uint8_t b[8];
    for (int i = 0; i < 8; i++) b[i] = (uint8_t)((uint64_t)v >> (8 * i));
    lg_base_hash_feed(h, b, sizeof b);
}
static void feed_str(lg_hash *h, const char *s) {
    feed_int(h, (int64_t)strlen(s));
    lg_base_hash_feed(h, s, (int64_t)strlen(s));
}
static lg_status feed_norm(lg_hash *h, const lg_source *s, const char *name, int64_t n, lg_error *err) {
    const lg_tensor_ref *t = lg_source_find(s, name);
    if (!t) return LG_OK; /* what must be there is the binder's business */
    if (t->n_elem != n)
        return lg_base_fail(err, LG_ERR_FORMAT, t->offset, "%s: tensor %s has %lld elements, expected %lld", s->path, t->name,
                            (long long)t->n_elem, (long long)n);
    float *v = lg_base_calloc(n, sizeof *v);
    if (!v) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    lg_base_dequant(t->dtype, t->data, v, n);
    lg_base_hash_feed(h, v, n * (int64_t)sizeof *v);
    lg_base_free(v);
    return LG_OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(const lg_tensor_ref *const *)a)->name, (*(const lg_tensor_ref *const *)b)->name);
}

lg_status lg_source_family(const lg_source *s, const lg_config *c, char family[33], char fingerprint[33], lg_error *err) {
    static const char *const norms[] = { "attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm" };
    lg_status st = LG_OK;
    char name[64];
    const int64_t n = lg_source_n_tensor(s);
    lg_hash *h = lg_base_hash_new();
    const lg_tensor_ref **t = lg_base_calloc(n + 1, sizeof *t);
    if (!h || !t) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    feed_str(h, c->arch);
    const int64_t geometry[] = { c->n_layer, c->n_head, c->n_head_kv, c->head_dim, c->n_embd, c->n_ff, c->n_vocab };
    for (size_t i = 0; i < sizeof geometry / sizeof *geometry; i++) feed_int(h, geometry[i]);
    for (int64_t l = 0; l < c->n_layer; l++)
        for (int i = 0; i < 4; i++) {
            snprintf(name, sizeof name, "blk.%lld.%s.weight", (long long)l, norms[i]);
            LG_TRY(feed_norm(h, s, name, i == 1 || i == 2 ? c->head_dim : c->n_embd, err));
        }
    LG_TRY(feed_norm(h, s, "output_norm.weight", c->n_embd, err));
    lg_base_hash_hex128(h, family);
    for (int64_t i = 0; i < n; i++) t[i] = lg_source_tensor(s, i);
    qsort(t, (size_t)n, sizeof *t, by_name);
    for (int64_t i = 0; i < n; i++) {
        feed_str(h, t[i]->name);
        feed_int(h, t[i]->dtype);
        for (int d = 0; d < t[i]->n_dim; d++) feed_int(h, t[i]->shape[d]);
        lg_base_hash_feed(h, t[i]->data, t[i]->bytes < 4096 ? t[i]->bytes : 4096);
    }
    lg_base_hash_hex128(h, fingerprint);
done:
    lg_base_hash_free(h);
    lg_base_free(t);
    return st;
}
