/* Compressed memory against tools/memory_ref.py (specs: docs/MEMORY.md) on the tiny checkpoint of tests/fixtures/memory: slots,
 * reader logits, greedy ids, the loop; every layout of the checkpoint and of adapters; the properties P1 to P8; what is refused.
 * Bounds: f32 1e-4 on logits, 1e-5 of the largest value on slots; bf16 weights: slots of a layer within 3e-2 of its root mean
 * square, cosine of the logits >= 0.999. */
#include <sys/stat.h>
#include "fixture.h"
#include "memory/memory.h"

#define DIR FIXTURES "memory/model"
enum { CHUNK = 256, WINDOW = 128, RATIO = 4, M = CHUNK / RATIO, LAYERS = 3, KV = 2, HD = 16, ROW = KV * HD, D = 64, VOCAB = 264, EOS = 258,
       MAX_SLOTS = 128, STRIDE = LAYERS * MAX_SLOTS * ROW };
static const int64_t lengths[] = { 1, 3, 4, 5, 127, 128, 129, 131, 255, 256 };
enum { N_LENGTH = 10 };
static lg_ids text, prompt;

/* ---- models ---- */
static lg_model *open_model(const char *path, const char *adapter, const char *adapter2, bool fill, lg_compute compute) {
    lg_model *m;
    const char *files[2] = { adapter, adapter2 };
    const lg_model_params p = { .path = path, .n_threads = 1, .compute = compute, .adapters = files, .n_adapter = adapter2 ? 2 : adapter ? 1 : 0,
                                .fill_memory = fill };
    OK(lg_model_open(&m, &p, err));
    return m;
}

/* Fails to open, or to make a compressor, with a message that holds both texts. */
static void refused(const char *path, const char *adapter, const char *a, const char *b) {
    lg_model *m = NULL;
    lg_compressor *c = NULL;
    lg_error e = { 0 };
    const lg_model_params p = { .path = path, .n_threads = 1, .adapters = &adapter, .n_adapter = adapter ? 1 : 0 };
    lg_status st = lg_model_open(&m, &p, &e);
    if (st == LG_OK) st = lg_memory_compressor_new(&c, m, CHUNK, WINDOW, RATIO, 1, &e);
    if (st == LG_OK) fail_msg("%s %s: not refused", path, adapter ? adapter : "");
    if (!strstr(e.message, a) || !strstr(e.message, b)) fail_msg("%s: \"%s\" lacks \"%s\" or \"%s\"", path, e.message, a, b);
    lg_memory_compressor_free(c);
    lg_model_free(m);
}

static lg_session *open_session(lg_model *m, int64_t n_seq) {
    lg_session *s;
    lg_session_params p;
    lg_session_defaults(&p);
    p.n_ctx = 1024;
    p.n_seq_max = n_seq;
    OK(lg_session_new(&s, m, &p, err));
    return s;
}

/* ---- slots of a few chunks ---- */
typedef struct slots { int64_t n, per_chunk; float *k, *v; } slots; /* [LAYERS, per_chunk, ROW] */

static slots compress(lg_model *m, const int32_t *ids, int64_t n, int64_t ratio) {
    lg_compressor *c;
    slots s = { .n = (n + ratio - 1) / ratio, .per_chunk = CHUNK / ratio, .k = lg_base_calloc(STRIDE, 4), .v = lg_base_calloc(STRIDE, 4) };
    OK(lg_memory_compressor_new(&c, m, CHUNK, WINDOW, ratio, 1, err));
    OK(lg_memory_compress(c, &ids, &n, 1, s.k, s.v, STRIDE, err));
    lg_memory_compressor_free(c);
    return s;
}
static void drop(slots *s) {
    lg_base_free(s->k);
    lg_base_free(s->v);
}
static void stand(lg_session *s, int64_t seq, const slots *x, int64_t base, bool rope) {
    const uint8_t *k[LAYERS], *v[LAYERS];
    for (int l = 0; l < LAYERS; l++) {
        k[l] = (const uint8_t *)(x->k + l * x->per_chunk * ROW);
        v[l] = (const uint8_t *)(x->v + l * x->per_chunk * ROW);
    }
    const lg_slots p = { .n = x->n, .base = base, .rope = rope, .dtype = LG_DTYPE_F32, .k = k, .v = v };
    OK(lg_session_set_slots(s, seq, &p, err));
}

/* Slots [from, to) of all layers: largest difference. b may have another number of slots a layer. */
static double slot_distance(const slots *a, const slots *b, int64_t from, int64_t to) {
    double worst = 0;
    for (int l = 0; l < LAYERS; l++) {
        const int64_t x = (l * a->per_chunk + from) * ROW, y = (l * b->per_chunk + from) * ROW;
        fx_worsen(&worst, fx_max_diff(a->k + x, b->k + y, (to - from) * ROW));
        fx_worsen(&worst, fx_max_diff(a->v + x, b->v + y, (to - from) * ROW));
    }
    return worst;
}

typedef struct rows { float *at; int64_t n; } rows;
static lg_status keep_row(void *user, int64_t row, const float *logits, lg_error *err) {
    rows *r = user;
    (void)err;
    memcpy(r->at + row * VOCAB, logits, VOCAB * sizeof(float));
    r->n++;
    return LG_OK;
}
static rows eval(lg_session *s, const int32_t *ids, int64_t n, int64_t decode_from) {
    rows r = { .at = lg_base_calloc(n, VOCAB * 4) };
    OK(lg_session_eval(s, ids, n, decode_from, keep_row, &r, err));
    assert_int_equal(r.n, n);
    return r;
}

static fx_array ref(const char *name, int64_t n) {
    char file[64];
    snprintf(file, sizeof file, "ref/%s_%d.npy", name, (int)n);
    return fx_ref("memory", file);
}

/* ---- parity ---- */
static void parity_of(lg_model *m, bool exact) {
    lg_session *s = open_session(m, 1);
    double worst_slot = 0, worst_logit = 0, worst_apart = 0, worst_rms = 0;
    for (int i = 0; i < N_LENGTH; i++) {
        const int64_t n = lengths[i];
        slots x = compress(m, text.data, n, RATIO);
        fx_array k = ref("k", n), v = ref("v", n), want = ref("read", n);
        assert_int_equal(k.n_row, LAYERS * x.n);
        for (int l = 0; l < LAYERS; l++) {
            double diff[2] = { 0, 0 }, mass[2] = { 0, 0 };
            for (int64_t j = 0; j < x.n * ROW; j++)
                for (int kv = 0; kv < 2; kv++) {
                    const double a = (double)(kv ? v : k).f[l * x.n * ROW + j], b = (double)(kv ? x.v : x.k)[l * x.per_chunk * ROW + j];
                    diff[kv] += (a - b) * (a - b);
                    mass[kv] += a * a;
                    fx_worsen(&worst_slot, fabs(a - b));
                }
            for (int kv = 0; kv < 2; kv++) fx_worsen(&worst_rms, sqrt(diff[kv] / mass[kv]));
        }
        for (int rope = 0; rope < (n == 129 || n == 256 ? 2 : 1); rope++) {
            fx_array r = rope ? ref("rope", n) : want;
            stand(s, 0, &x, M, rope);
            rows got = eval(s, prompt.data, prompt.n, -1);
            fx_worsen(&worst_logit, fx_max_diff(got.at, r.f, 40 * VOCAB));
            for (int64_t t = 0; t < 40; t++) {
                double ab = 0, aa = 0, bb = 0;
                for (int64_t j = t * VOCAB; j < (t + 1) * VOCAB; j++) ab += (double)got.at[j] * (double)r.f[j], aa += (double)got.at[j] * (double)got.at[j], bb += (double)r.f[j] * (double)r.f[j];
                fx_worsen(&worst_apart, 1 - ab / sqrt(aa * bb));
            }
            lg_base_free(got.at);
            if (rope) fx_array_free(&r);
        }
        fx_array_free(&k);
        fx_array_free(&v);
        fx_array_free(&want);
        drop(&x);
    }
    printf("slots %.2e (relative rms %.2e), logits %.2e, cosine %.6f\n", worst_slot, worst_rms, worst_logit, 1 - worst_apart);
    if (exact) {
        assert_true(worst_slot <= 1e-4);
        assert_true(worst_rms <= 1e-5);
        assert_true(worst_logit <= 1e-4);
    } else {
        assert_true(worst_rms <= 3e-2);
        assert_true(worst_apart <= 0.001);
    }
    lg_session_free(s);
}

static void parity(void **state) {
    (void)state;
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    assert_int_equal(m->memory.window, WINDOW);
    assert_int_equal(m->memory.ratio[0], RATIO);
    assert_int_equal(m->memory.param, LG_MEMORY_Q | LG_MEMORY_K | LG_MEMORY_V);
    assert_false(m->memory.slot_rope);
    parity_of(m, true);
    lg_session *s = open_session(m, 1);
    const int64_t plain[] = { 1, 40, 128 };
    for (int i = 0; i < 3; i++) {
        fx_array want = ref("plain", plain[i]);
        rows got = eval(s, text.data, plain[i], -1);
        assert_true(fx_max_diff(got.at, want.f, plain[i] * VOCAB) <= 1e-4);
        lg_base_free(got.at);
        fx_array_free(&want);
    }
    lg_session_free(s);
    lg_model_free(m);
}

/* ---- greedy, the loop, sampling ---- */
static lg_ids json_ids(const lg_json *v) {
    lg_ids out = { 0 };
    int64_t id;
    for (int64_t i = 0; i < lg_json_size(v); i++) {
        assert_true(lg_json_int(lg_json_at(v, i), &id));
        assert_true(lg_base_ids_push(&out, (int32_t)id));
    }
    return out;
}
static lg_generation generate(lg_session *s, const lg_ids *p, int64_t n) {
    static const int32_t stop = EOS;
    lg_generate_params g;
    lg_generation out;
    lg_generate_defaults(&g);
    g.n_max = n;
    g.stop_ids = &stop;
    g.n_stop_ids = 1;
    OK(lg_generate(s, 0, p->data, p->n, &g, &out, err));
    return out;
}
static void same_ids(const lg_ids *got, const lg_ids *want) {
    assert_int_equal(got->n, want->n);
    if (want->n) assert_memory_equal(got->data, want->data, (size_t)want->n * 4);
}

static void greedy_ids(void **state) {
    (void)state;
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    lg_session *s = open_session(m, 1);
    lg_json *root;
    OK(lg_json_load(&root, FIXTURES "memory/ref/greedy.json", 1 << 20, err));
    for (int i = 0; i < N_LENGTH; i++) { /* every gap in the fixture is above 1e-3: all ids must match */
        char key[16];
        snprintf(key, sizeof key, "%d", (int)lengths[i]);
        slots x = compress(m, text.data, lengths[i], RATIO);
        stand(s, 0, &x, M, false);
        lg_generation g = generate(s, &prompt, 16);
        lg_ids want = json_ids(lg_json_get(lg_json_get(root, key), "ids"));
        same_ids(&g.ids, &want);
        lg_ids_free(&want);
        lg_generation_free(&g);
        drop(&x);
    }
    lg_json_free(root);
    lg_session_free(s);
    lg_model_free(m);
}

static void loop(void **state) {
    (void)state;
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    lg_session *s = open_session(m, 1);
    lg_json *root;
    OK(lg_json_load(&root, FIXTURES "memory/ref/loop.json", 1 << 20, err));
    const lg_json *steps = lg_json_get(root, "steps"), *answer = lg_json_get(root, "answer");
    assert_int_equal(lg_json_size(steps), 3);
    for (int64_t i = 0; i < 3; i++) {
        const int64_t n = text.n - i * CHUNK < CHUNK ? text.n - i * CHUNK : CHUNK;
        lg_ids p = json_ids(lg_json_get(lg_json_at(steps, i), "prompt_ids")), want = json_ids(lg_json_get(lg_json_at(steps, i), "memory_ids")), got = { 0 };
        slots x = compress(m, text.data + i * CHUNK, n, RATIO);
        stand(s, 0, &x, M, false);
        lg_generation g = generate(s, &p, 16);
        for (int64_t j = 0; j < g.ids.n; j++)
            if (g.ids.data[j] != 256) assert_true(lg_base_ids_push(&got, g.ids.data[j]));
        same_ids(&got, &want);
        lg_generation_free(&g);
        lg_ids_free(&p);
        lg_ids_free(&want);
        lg_ids_free(&got);
        drop(&x);
    }
    OK(lg_session_set_slots(s, 0, NULL, err));
    lg_ids p = json_ids(lg_json_get(answer, "prompt_ids")), want = json_ids(lg_json_get(answer, "answer_ids"));
    lg_generation g = generate(s, &p, 16);
    same_ids(&g.ids, &want);
    lg_generation_free(&g);
    lg_ids_free(&p);
    lg_ids_free(&want);
    lg_json_free(root);
    lg_session_free(s);
    lg_model_free(m);
}

/* Ids that sampling can draw are those the published filters keep: 4000 draws each. */
static void sampling(void **state) {
    (void)state;
    lg_json *root;
    OK(lg_json_load(&root, FIXTURES "memory/ref/sample.json", 1 << 20, err));
    fx_array plain = ref("plain", 40);
    float scratch[2 * VOCAB];
    for (int64_t i = 0; i < lg_json_size(root); i++) {
        const lg_json *c = lg_json_at(root, i);
        double temp, top_p;
        int64_t top_k;
        bool kept[VOCAB] = { false };
        assert_true(lg_json_num(lg_json_get(c, "temp"), &temp) && lg_json_num(lg_json_get(c, "top_p"), &top_p) && lg_json_int(lg_json_get(c, "top_k"), &top_k));
        lg_ids ids = json_ids(lg_json_get(c, "kept"));
        for (int64_t j = 0; j < ids.n; j++) kept[ids.data[j]] = true;
        lg_sampler_params p;
        lg_sampler_defaults(&p);
        p.temp = (float)temp;
        p.top_k = (int32_t)top_k;
        p.top_p = (float)top_p;
        p.seed = 3;
        for (int64_t draw = 0; draw < 4000; draw++) {
            const int32_t id = lg_sample(plain.f + 39 * VOCAB, VOCAB, &p, NULL, 0, draw, scratch);
            if (!kept[id]) fail_msg("case %d draws id %d", (int)i, id);
        }
        lg_ids_free(&ids);
    }
    fx_array_free(&plain);
    lg_json_free(root);
}

/* ---- layouts made from the one file ---- */
static void copy_file(const char *from, const char *to) {
    lg_map f;
    lg_writer w = { 0 };
    OK(lg_file_map(&f, from, err));
    OK(lg_file_create(&w, to, err));
    OK(lg_file_write(&w, f.data, f.size, err));
    OK(lg_file_commit(&w, err));
    lg_file_unmap(&f);
}
typedef enum layout { SHARDS, BEACON, MISSING, ONE_MISSING, BF16, TWO_RATIOS, APPEND } layout;

/* A folder of this process with the checkpoint in another layout. */
static const char *make_layout(char path[512], layout how) {
    static const char *const files[] = { "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json" };
    char name[32], from[600], to[600];
    snprintf(name, sizeof name, "memory-%d", (int)how);
    fx_temp(path, name);
    mkdir(path, 0777);
    for (int i = 0; i < 4; i++) {
        snprintf(from, sizeof from, DIR "/%s", files[i]);
        snprintf(to, sizeof to, "%s/%s", path, files[i]);
        copy_file(from, to);
    }
    if (how == TWO_RATIOS || how == APPEND) {
        lg_text t = { 0 };
        OK(lg_file_read_all(&t, DIR "/config.json", 1 << 20, err));
        char *at = strstr(t.data, how == APPEND ? "\"interleave\"" : "full-coverage");
        assert_non_null(at);
        memcpy(at, how == APPEND ? "\"append\"    " : "segmentation ", how == APPEND ? 12 : 13);
        lg_writer w = { 0 };
        snprintf(to, sizeof to, "%s/config.json", path);
        OK(lg_file_create(&w, to, err));
        OK(lg_file_write(&w, t.data, t.n, err));
        OK(lg_file_commit(&w, err));
        lg_text_free(&t);
    }
    lg_st *st;
    OK(lg_st_open(&st, DIR "/model.safetensors", err));
    const int64_t n = lg_st_n_tensor(st);
    lg_st_entry *e = lg_base_calloc(n, sizeof *e);
    char (*names)[128] = lg_base_calloc(n, sizeof *names);
    void **data = lg_base_calloc(n, sizeof *data);
    lg_text index = { 0 };
    int64_t k = 0;
    lg_base_text_printf(&index, "{\"metadata\":{},\"weight_map\":{");
    for (int64_t i = 0; i < n; i++) {
        const lg_tensor_ref *t = lg_st_tensor(st, i);
        const char *mem = strstr(t->name, "lychee_memory_");
        if (how == MISSING && mem) continue;
        if (how == ONE_MISSING && !strcmp(t->name, "model.layers.1.self_attn.lychee_memory_k_proj.weight")) continue;
        if (mem && how == BEACON) snprintf(names[k], sizeof *names, "%.*sbeacon_%s", (int)(mem - t->name), t->name, mem + 14);
        else snprintf(names[k], sizeof *names, "%s", t->name);
        e[k] = (lg_st_entry){ .name = names[k], .dtype = t->dtype, .n_dim = t->n_dim, .data = t->data };
        memcpy(e[k].shape, t->shape, sizeof t->shape);
        if (how == BF16) {
            data[k] = lg_base_alloc(t->n_elem * 2);
            lg_base_quant(LG_DTYPE_BF16, t->data, data[k], t->n_elem);
            e[k].dtype = LG_DTYPE_BF16;
            e[k].data = data[k];
        }
        if (how == SHARDS) lg_base_text_printf(&index, "%s\"%s\":\"model-0000%d-of-00002.safetensors\"", k ? "," : "", names[k], k < n / 2 ? 1 : 2);
        k++;
    }
    lg_base_text_printf(&index, "}}");
    if (how == SHARDS) {
        lg_writer w = { 0 };
        snprintf(to, sizeof to, "%s/model-00001-of-00002.safetensors", path);
        OK(lg_st_write(to, e, n / 2, NULL, 0, err));
        snprintf(to, sizeof to, "%s/model-00002-of-00002.safetensors", path);
        OK(lg_st_write(to, e + n / 2, k - n / 2, NULL, 0, err));
        snprintf(to, sizeof to, "%s/model.safetensors.index.json", path);
        OK(lg_file_create(&w, to, err));
        OK(lg_file_write(&w, index.data, index.n, err));
        OK(lg_file_commit(&w, err));
    } else {
        snprintf(to, sizeof to, "%s/model.safetensors", path);
        OK(lg_st_write(to, e, k, NULL, 0, err));
    }
    for (int64_t i = 0; i < n; i++) lg_base_free(data[i]);
    lg_base_free(data);
    lg_base_free(e);
    lg_base_free(names);
    lg_text_free(&index);
    lg_st_close(st);
    return path;
}
static void remove_layout(const char *path) {
    static const char *const files[] = { "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors",
                                         "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json" };
    char name[600];
    for (int i = 0; i < 8; i++) {
        snprintf(name, sizeof name, "%s/%s", path, files[i]);
        unlink(name);
    }
    rmdir(path);
}

static void layouts(void **state) {
    (void)state;
    const layout same[] = { SHARDS, BEACON };
    char path[512];
    for (int i = 0; i < 2; i++) {
        lg_model *m = open_model(make_layout(path, same[i]), NULL, NULL, false, LG_COMPUTE_F32);
        parity_of(m, true);
        lg_model_free(m);
        remove_layout(path);
    }
    lg_model *m = open_model(make_layout(path, BF16), NULL, NULL, false, LG_COMPUTE_AUTO);
    parity_of(m, false);
    lg_model_free(m);
    remove_layout(path);
    refused(make_layout(path, MISSING), NULL, "model.lychee_memory_embed_tokens.weight", "--fill-memory");
    remove_layout(path);
    refused(make_layout(path, ONE_MISSING), NULL, "missing: model.layers.1.self_attn.lychee_memory_k_proj.weight (", "--fill-memory");
    remove_layout(path);
    refused(make_layout(path, TWO_RATIOS), NULL, "lychee_memory_attn", "full-coverage");
    remove_layout(path);
    refused(make_layout(path, APPEND), NULL, "lychee_memory_pos", "interleave");
    remove_layout(path);
    refused(FIXTURES "tiny-qwen2", NULL, "no memory weights", "--adapter");
}

/* ---- adapters ---- */
#define META(rest) "{\"format\":\"longan-adapter\",\"version\":1" rest "}"
static float *noise(int64_t n, float scale, uint64_t stream) {
    float *x = lg_base_calloc(n, 4);
    for (int64_t i = 0; i < n; i++) x[i] = scale * (2.0f * (float)lg_base_rng_unit(9, stream, (uint64_t)i) - 1.0f);
    return x;
}
static lg_st_entry entry(const char *name, int64_t rows_n, int64_t cols, const void *data) {
    return (lg_st_entry){ .name = name, .dtype = LG_DTYPE_F32, .n_dim = cols ? 2 : 1, .shape = { rows_n, cols }, .data = data };
}
static void write_adapter(const char *path, const char *meta, const lg_st_entry *e, int64_t n) {
    const char *kv[2] = { "longan", meta };
    OK(lg_st_write(path, e, n, kv, meta ? 1 : 0, err));
}

/* A checkpoint without memory weights plus an adapter that holds them: in full, equal bits; as low-rank additions, equal to
 * the sum written out in full. Reader additions change the reading alone and equal merged weights. */
static void adapters(void **state) {
    (void)state;
    char bare[512], file[512], file2[512];
    make_layout(bare, MISSING);
    fx_temp(file, "adapter.safetensors");
    fx_temp(file2, "adapter2.safetensors");
    lg_st *st;
    OK(lg_st_open(&st, DIR "/model.safetensors", err));
    lg_st_entry e[128];
    int64_t n = 0;
    for (int64_t i = 0; i < lg_st_n_tensor(st); i++) {
        const lg_tensor_ref *t = lg_st_tensor(st, i);
        if (!strstr(t->name, "lychee_memory_")) continue;
        e[n] = (lg_st_entry){ .name = t->name, .dtype = t->dtype, .n_dim = t->n_dim, .data = t->data };
        memcpy(e[n++].shape, t->shape, sizeof t->shape);
    }
    assert_int_equal(n, 1 + LAYERS * 6);
    write_adapter(file, META(",\"memory_param\":[\"q\",\"k\",\"v\"],\"slot_rope\":\"slot-index\",\"window\":128,\"ratios\":[4,8]"), e, n);
    lg_model *own = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32), *m = open_model(bare, file, NULL, false, LG_COMPUTE_F32);
    assert_true(m->memory.slot_rope);
    assert_int_equal(m->memory.n_ratio, 2);
    slots a = compress(own, text.data, 200, RATIO), b = compress(m, text.data, 200, RATIO);
    assert_true(slot_distance(&a, &b, 0, a.n) == 0);
    drop(&b);
    lg_model_free(m);
    write_adapter(file, META(""), e, n - 1);
    refused(bare, file, "memory tensors are missing", "lychee_memory_");
    write_adapter(file, META(",\"memory_param\":[\"q\",\"k\"]"), e, n);
    refused(bare, file, "v_proj", "memory_param does not list \"v\"");
    write_adapter(file, META(",\"family\":\"00000000000000000000000000000000\""), e, n);
    refused(bare, file, "family 00000000000000000000000000000000", "the model is of family");
    write_adapter(file, NULL, e, n);
    refused(bare, file, "no adapter", "\"longan\" is missing");
    e[n] = entry("reader.model.layers.0.self_attn.q_norm.lora_A.weight", 4, 64, e[0].data);
    write_adapter(file, META(""), e, n + 1);
    refused(bare, file, "unknown tensors", "reader.model.layers.0.self_attn.q_norm.lora_A.weight");
    e[n] = entry("reader.model.layers.3.self_attn.q_proj.lora_A.weight", 4, 64, e[0].data); /* no such layer */
    write_adapter(file, META(""), e, n + 1);
    refused(bare, file, "unknown tensors", "layers.3");
    e[n] = entry("reader.model.layers.0.self_attn.q_proj.lora_A.weight", 1, 63, e[0].data);
    write_adapter(file, META(""), e, n + 1);
    refused(bare, file, "is 1 x 63", "needs 1 x 64");
    e[n] = entry("reader.model.layers.0.self_attn.q_proj.lora_A.weight", 1, 64, e[0].data);
    write_adapter(file, META(""), e, n + 1);
    refused(bare, file, "has no twin", "lora_A");

    /* low rank: compressor on k of layer 0 and o of layer 2; the same written out */
    enum { R = 3 };
    const float alpha = 6;
    float *ka = noise(R * D, 0.3f, 1), *kb = noise(ROW * R, 0.3f, 2), *oa = noise(R * D, 0.3f, 3), *ob = noise(D * R, 0.3f, 4), *embed = noise(D, 1, 5);
    lg_st_entry low[64], full[64];
    char names[64][128];
    int64_t n_low = 0, n_full = 0;
    low[n_low++] = full[n_full++] = entry("model.lychee_memory_embed_tokens.weight", 1, D, embed);
    float *sums[2 * LAYERS];
    const float *bias[LAYERS];
    for (int l = 0; l < LAYERS; l++)
        for (int o = 0; o < 2; o++) { /* k, o */
            const int64_t n_out = o ? D : ROW, id = 2 * l + o;
            char base[128];
            snprintf(base, sizeof base, "model.layers.%d.self_attn.%c_proj.weight", l, o ? 'o' : 'k');
            const float *w = lg_st_find(st, base)->data, *A = o ? oa : ka, *B = o ? ob : kb;
            sums[id] = lg_base_calloc(n_out * D, 4);
            for (int64_t r = 0; r < n_out; r++)
                for (int64_t c = 0; c < D; c++) {
                    double s = (double)w[r * D + c];
                    for (int j = 0; j < R; j++) s += (double)alpha / R * (double)B[r * R + j] * (double)A[j * D + c];
                    sums[id][r * D + c] = (float)s;
                }
            snprintf(names[3 * id], 128, "compressor.model.layers.%d.self_attn.%c_proj.lora_A.weight", l, o ? 'o' : 'k');
            snprintf(names[3 * id + 1], 128, "compressor.model.layers.%d.self_attn.%c_proj.lora_B.weight", l, o ? 'o' : 'k');
            snprintf(names[3 * id + 2], 128, "model.layers.%d.self_attn.lychee_memory_%c_proj.weight", l, o ? 'o' : 'k');
            low[n_low++] = entry(names[3 * id], R, D, A);
            low[n_low++] = entry(names[3 * id + 1], n_out, R, B);
            full[n_full++] = entry(names[3 * id + 2], n_out, D, sums[id]);
            if (!o) {
                snprintf(names[40 + l], 128, "model.layers.%d.self_attn.k_proj.bias", l);
                bias[l] = lg_st_find(st, names[40 + l])->data;
                snprintf(names[40 + l], 128, "model.layers.%d.self_attn.lychee_memory_k_proj.bias", l);
                full[n_full++] = entry(names[40 + l], ROW, 0, bias[l]);
            }
        }
    write_adapter(file, META(",\"memory_param\":[\"k\",\"o\"],\"lora_alpha\":6"), low, n_low);
    write_adapter(file2, META(",\"memory_param\":[\"k\",\"o\"]"), full, n_full);
    lg_model *x = open_model(bare, file, NULL, false, LG_COMPUTE_F32), *y = open_model(bare, file2, NULL, false, LG_COMPUTE_F32);
    slots s1 = compress(x, text.data, 200, RATIO), s2 = compress(y, text.data, 200, RATIO);
    assert_true(slot_distance(&s1, &s2, 0, s1.n) <= 1e-5);
    assert_true(slot_distance(&s1, &a, 0, s1.n) > 0.1); /* and it is another compressor */
    drop(&s1);
    drop(&s2);
    lg_model_free(x);
    lg_model_free(y);

    /* a reader on top of a full adapter, two files; equals a model whose weights have it merged */
    static const char *const parts[] = { "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj" };
    const int64_t po[] = { D, ROW, ROW, D, 160, 160, D }, pi[] = { D, D, D, D, D, D, 160 };
    write_adapter(file, META(""), e, n);
    lg_st_entry reader[2 * 7 * LAYERS];
    static char reader_names[2 * 7 * LAYERS][96];
    float *keep[2 * 7 * LAYERS];
    for (int l = 0; l < LAYERS; l++)
        for (int p = 0; p < 7; p++) {
            const int i = 2 * (7 * l + p);
            keep[i] = noise(R * pi[p], 0.2f, (uint64_t)(100 + i));
            keep[i + 1] = noise(po[p] * R, 0.2f, (uint64_t)(101 + i));
            snprintf(reader_names[i], 96, "reader.model.layers.%d.%s.lora_A.weight", l, parts[p]);
            snprintf(reader_names[i + 1], 96, "reader.model.layers.%d.%s.lora_B.weight", l, parts[p]);
            reader[i] = entry(reader_names[i], R, pi[p], keep[i]);
            reader[i + 1] = entry(reader_names[i + 1], po[p], R, keep[i + 1]);
        }
    write_adapter(file2, META(",\"lora_alpha\":6"), reader, 2 * 7 * LAYERS);
    m = open_model(bare, file, file2, false, LG_COMPUTE_F32);
    b = compress(m, text.data, 200, RATIO); /* compression never uses the reader */
    assert_true(slot_distance(&a, &b, 0, a.n) == 0);
    /* merged: the whole checkpoint written anew */
    char merged[512], to[600];
    make_layout(merged, SHARDS);
    remove_layout(merged);
    make_layout(merged, BEACON); /* any layout; its weights are replaced */
    lg_st_entry all[128];
    float *own_sums[7 * LAYERS];
    int64_t n_all = 0;
    for (int64_t i = 0; i < lg_st_n_tensor(st); i++) {
        const lg_tensor_ref *t = lg_st_tensor(st, i);
        all[n_all] = (lg_st_entry){ .name = t->name, .dtype = t->dtype, .n_dim = t->n_dim, .data = t->data };
        memcpy(all[n_all].shape, t->shape, sizeof t->shape);
        for (int j = 0; j < 7 * LAYERS; j++) {
            char base[128];
            const int p = j % 7;
            snprintf(base, sizeof base, "model.layers.%d.%s.weight", j / 7, parts[p]);
            if (strcmp(base, t->name)) continue;
            own_sums[j] = lg_base_calloc(po[p] * pi[p], 4);
            for (int64_t r = 0; r < po[p]; r++)
                for (int64_t c = 0; c < pi[p]; c++) {
                    double s = (double)((const float *)t->data)[r * pi[p] + c];
                    for (int q = 0; q < R; q++) s += 2.0 * (double)keep[2 * j + 1][r * R + q] * (double)keep[2 * j][q * pi[p] + c];
                    own_sums[j][r * pi[p] + c] = (float)s;
                }
            all[n_all].data = own_sums[j];
        }
        n_all++;
    }
    snprintf(to, sizeof to, "%s/model.safetensors", merged);
    OK(lg_st_write(to, all, n_all, NULL, 0, err));
    lg_model *w = open_model(merged, NULL, NULL, false, LG_COMPUTE_F32);
    lg_session *sm = open_session(m, 1), *sw = open_session(w, 1), *so = open_session(own, 1);
    lg_session_use_lora(sm, &m->reader);
    stand(sm, 0, &a, M, true);
    stand(sw, 0, &a, M, true);
    stand(so, 0, &a, M, true);
    rows r1 = eval(sm, prompt.data, prompt.n, -1), r2 = eval(sw, prompt.data, prompt.n, -1), r3 = eval(so, prompt.data, prompt.n, -1);
    assert_true(fx_max_diff(r1.at, r2.at, 40 * VOCAB) <= 2e-4);
    assert_true(fx_max_diff(r1.at, r3.at, 40 * VOCAB) > 0.1);
    rows r4 = eval(sm, prompt.data, prompt.n, 20); /* decode steps carry it too */
    assert_true(fx_max_diff(r1.at, r4.at, 40 * VOCAB) <= 1e-4);
    lg_session_use_lora(sm, NULL);
    rows r5 = eval(sm, prompt.data, prompt.n, -1);
    assert_true(fx_max_diff(r5.at, r3.at, 40 * VOCAB) == 0);
    lg_session_free(sm);
    lg_session_free(sw);
    lg_session_free(so);
    float *const freed[] = { r1.at, r2.at, r3.at, r4.at, r5.at, ka, kb, oa, ob, embed };
    for (int i = 0; i < 10; i++) lg_base_free(freed[i]);
    for (int i = 0; i < 2 * LAYERS; i++) lg_base_free(sums[i]);
    for (int i = 0; i < 2 * 7 * LAYERS; i++) lg_base_free(keep[i]);
    for (int i = 0; i < 7 * LAYERS; i++) lg_base_free(own_sums[i]);

    /* the gate's head */
    float head[D] = { 1, 2, 3 }, bias1 = 0.25f;
    lg_st_entry gate[2] = { entry("gate.score.weight", 1, D, head), entry("gate.score.bias", 1, 0, &bias1) };
    write_adapter(file2, META(""), gate, 2);
    lg_model *g = open_model(DIR, file2, NULL, false, LG_COMPUTE_F32);
    assert_int_equal(g->gate_score.n_out, 1);
    assert_float_equal(g->gate_bias, 0.25f, 0);
    assert_null(g->gate.layer);
    lg_model_free(g);
    write_adapter(file2, META(""), gate + 1, 1);
    refused(DIR, file2, "without its tensor", "gate.score.weight");
    lg_model_free(w);
    lg_model_free(m);
    lg_model_free(own);
    drop(&a);
    drop(&b);
    lg_st_close(st);
    remove_layout(merged);
    remove_layout(bare);
    unlink(file);
    unlink(file2);
}

/* ---- properties ---- */
/* K (as the cache holds it) and V of one cache row of layer l. */
static void cached(const lg_session *s, int l, int64_t row, float *k, float *v) {
    for (int h = 0; h < KV; h++) {
        const int64_t at = (((int64_t)s->seq[0].page[row / LG_PAGE] * KV + h) * LG_PAGE + row % LG_PAGE) * s->geom.row_bytes;
        lg_ops_kv_load(&s->geom, k + h * HD, s->kv[l].k + at);
        lg_ops_kv_load(&s->geom, v + h * HD, s->kv[l].v + at);
    }
}
static void rotated(const lg_model *m, const float *x, int64_t pos, float *out) {
    for (int h = 0; h < KV; h++)
        for (int i = 0; i < HD / 2; i++) {
            const float a = (float)pos * m->inv_freq[i], c = cosf(a), n = sinf(a), p = x[h * HD + i], q = x[h * HD + i + HD / 2];
            out[h * HD + i] = p * c - q * n;
            out[h * HD + i + HD / 2] = q * c + p * n;
        }
}

static void identity(void **state) { /* P1, P2 */
    (void)state;
    char path[512];
    lg_model *m = open_model(make_layout(path, MISSING), NULL, NULL, true, LG_COMPUTE_F32);
    remove_layout(path);
    lg_session *s = open_session(m, 1);
    slots x = compress(m, text.data, CHUNK, RATIO);
    double worst = 0;
    for (int w = 0; w < 2; w++) {
        int32_t ids[WINDOW + WINDOW / RATIO];
        for (int i = 0; i < WINDOW + WINDOW / RATIO; i++) ids[i] = i % (RATIO + 1) == RATIO ? EOS : text.data[w * WINDOW + i - i / (RATIO + 1)];
        slots before = x;
        before.n = w * (WINDOW / RATIO);
        if (w) stand(s, 0, &before, before.n, true); /* rotated at 0..31, the rows follow at 32 */
        OK(lg_session_sync(s, 0, ids, WINDOW + WINDOW / RATIO, err));
        for (int l = 0; l < LAYERS; l++)
            for (int j = 0; j < WINDOW / RATIO; j++) {
                const int64_t row = before.n + j * (RATIO + 1) + RATIO, slot = (l * x.per_chunk + w * (WINDOW / RATIO) + j) * ROW;
                float k[ROW], v[ROW], want[ROW];
                cached(s, l, row, k, v);
                rotated(m, x.k + slot, row, want);
                fx_worsen(&worst, fx_max_diff(k, want, ROW));
                fx_worsen(&worst, fx_max_diff(v, x.v + slot, ROW));
            }
    }
    printf("identity: %.2e\n", worst);
    assert_true(worst <= 1e-4);
    drop(&x);
    lg_session_free(s);
    lg_model_free(m);
}

static void independence(void **state) { /* P4, P7: many chunks in one pass, in one batch, in another order */
    (void)state;
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    const int64_t n[5] = { 256, 88, 1, 129, 256 }, at[5] = { 0, 100, 5, 200, 300 }, other[5] = { 7, 100, 250, 200, 33 };
    const int32_t *ids[5], *changed[5];
    for (int i = 0; i < 5; i++) ids[i] = text.data + at[i], changed[i] = text.data + (i % 2 ? at : other)[i];
    float *k = lg_base_calloc(5 * STRIDE, 4), *v = lg_base_calloc(5 * STRIDE, 4), *k2 = lg_base_calloc(5 * STRIDE, 4), *v2 = lg_base_calloc(5 * STRIDE, 4);
    lg_compressor *c;
    OK(lg_memory_compressor_new(&c, m, CHUNK, WINDOW, RATIO, 5, err));
    assert_true(lg_memory_compress_flops(c) > 0);
    OK(lg_memory_compress(c, ids, n, 5, k, v, STRIDE, err));
    OK(lg_memory_compress(c, changed, n, 5, k2, v2, STRIDE, err));
    for (int i = 0; i < 5; i++) {
        slots alone = compress(m, ids[i], n[i], RATIO), batch = { .n = alone.n, .per_chunk = M, .k = k + i * STRIDE, .v = v + i * STRIDE };
        slots second = { .n = alone.n, .per_chunk = M, .k = k2 + i * STRIDE, .v = v2 + i * STRIDE };
        assert_true(slot_distance(&alone, &batch, 0, alone.n) <= 1e-5);
        if (i % 2) assert_true(slot_distance(&batch, &second, 0, alone.n) <= 1e-6);
        else assert_true(slot_distance(&batch, &second, 0, alone.n) > 0.1);
        drop(&alone);
    }
    lg_memory_compressor_free(c);
    lg_base_free(k);
    lg_base_free(v);
    lg_base_free(k2);
    lg_base_free(v2);
    lg_model_free(m);
}

static void causality(void **state) { /* P5, P8 */
    (void)state;
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    int32_t ids[CHUNK];
    slots a = compress(m, text.data, CHUNK, RATIO);
    const int64_t edits[] = { 0, 3, 4, 50, 127, 128, 200, 255 };
    for (int i = 0; i < 8; i++) {
        memcpy(ids, text.data, sizeof ids);
        ids[edits[i]] = (ids[edits[i]] + 1) % 256;
        slots b = compress(m, ids, CHUNK, RATIO);
        if (edits[i] >= RATIO) assert_true(slot_distance(&a, &b, 0, edits[i] / RATIO) <= 1e-6);
        assert_true(slot_distance(&a, &b, edits[i] / RATIO, edits[i] / RATIO + 1) > 1e-3);
        drop(&b);
    }
    for (int i = 0; i < N_LENGTH; i++) {
        slots b = compress(m, text.data, lengths[i], RATIO);
        if (lengths[i] >= RATIO) assert_true(slot_distance(&a, &b, 0, lengths[i] / RATIO) <= 1e-5);
        drop(&b);
    }
    drop(&a);
    lg_model_free(m);
}

static void permutation(void **state) { /* P6 */
    (void)state;
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    lg_session *s = open_session(m, 1);
    slots a = compress(m, text.data, 200, RATIO), b = { .n = a.n, .per_chunk = a.per_chunk, .k = lg_base_calloc(STRIDE, 4), .v = lg_base_calloc(STRIDE, 4) };
    for (int l = 0; l < LAYERS; l++)
        for (int64_t j = 0; j < a.n; j++) {
            const int64_t from = (l * M + j) * ROW, to = (l * M + j * 7 % a.n) * ROW;
            memcpy(b.k + to, a.k + from, ROW * 4);
            memcpy(b.v + to, a.v + from, ROW * 4);
        }
    assert_int_equal(a.n, 50);
    for (int rope = 0; rope < 2; rope++) {
        stand(s, 0, &a, M, rope);
        rows x = eval(s, prompt.data, prompt.n, -1);
        stand(s, 0, &b, M, rope);
        rows y = eval(s, prompt.data, prompt.n, -1);
        const double d = fx_max_diff(x.at, y.at, 40 * VOCAB);
        if (rope) assert_true(d > 0.01);
        else assert_true(d <= 1e-4);
        lg_base_free(x.at);
        lg_base_free(y.at);
    }
    drop(&a);
    drop(&b);
    lg_session_free(s);
    lg_model_free(m);
}

static void ratios(void **state) { /* any ratio that divides the window; others and bad sizes are refused */
    (void)state;
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    const int64_t good[] = { 2, 8, 16, 128 };
    for (int i = 0; i < 4; i++) {
        slots x = compress(m, text.data, 200, good[i]);
        assert_int_equal(x.n, (200 + good[i] - 1) / good[i]);
        double sum = 0;
        for (int64_t j = 0; j < LAYERS * x.per_chunk * ROW; j++) sum += fabs((double)x.k[j]);
        assert_true(sum > 0 && isfinite(sum));
        drop(&x);
    }
    const struct { int64_t chunk, window, ratio, batch; const char *text; } bad[] = {
        { 256, 128, 3, 1, "ratio 3 does not divide the window of 128" }, { 200, 128, 4, 1, "window 128 does not divide the chunk of 200" },
        { 64, 128, 4, 1, "does not divide" }, { 0, 128, 4, 1, "does not divide" }, { 256, 0, 4, 1, "does not divide" }, { 256, 128, 0, 1, "does not divide" },
        { 256, 128, 4, 0, "at once" }, { 128 * 1024, 128, 4, 1, "positions" } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        lg_compressor *c;
        lg_error e = { 0 };
        assert_int_not_equal(lg_memory_compressor_new(&c, m, bad[i].chunk, bad[i].window, bad[i].ratio, bad[i].batch, &e), LG_OK);
        if (!strstr(e.message, bad[i].text)) fail_msg("%s", e.message);
    }
    lg_compressor *c;
    lg_error e = { 0 };
    OK(lg_memory_compressor_new(&c, m, CHUNK, WINDOW, RATIO, 1, err));
    float *k = lg_base_calloc(STRIDE, 4);
    const int32_t wild[2] = { 3, VOCAB }, *p = wild;
    int64_t n = 2;
    assert_int_equal(lg_memory_compress(c, &p, &n, 1, k, k, STRIDE, &e), LG_ERR_LIMIT);
    n = 0;
    assert_int_equal(lg_memory_compress(c, &p, &n, 1, k, k, STRIDE, &e), LG_ERR_USAGE);
    n = 257;
    assert_int_equal(lg_memory_compress(c, &p, &n, 1, k, k, STRIDE, &e), LG_ERR_USAGE);
    lg_base_free(k);
    lg_memory_compressor_free(c);
    lg_model_free(m);
}

/* ---- sessions behind slots ---- */
static void timelines(void **state) {
    (void)state;
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    lg_session *s = open_session(m, 2);
    slots a = compress(m, text.data, 131, RATIO);
    stand(s, 0, &a, M, false);
    rows want = eval(s, prompt.data, prompt.n, -1);
    assert_int_equal(lg_session_len(s, 0), 40);
    assert_memory_equal(lg_session_ids(s, 0), prompt.data, 160);
    rows steps = eval(s, prompt.data, prompt.n, 10); /* prefill and decode steps agree */
    assert_true(fx_max_diff(want.at, steps.at, 40 * VOCAB) <= 1e-4);
    /* sync keeps a common prefix; rewind and fork keep the slots */
    OK(lg_session_rewind(s, 0, 7, err));
    assert_int_equal(lg_session_len(s, 0), 7);
    OK(lg_session_sync(s, 0, prompt.data, prompt.n, err));
    assert_true(fx_max_diff(lg_session_logits(s, 0), want.at + 39 * VOCAB, VOCAB) <= 1e-4);
    OK(lg_session_fork(s, 1, 0, err));
    OK(lg_session_rewind(s, 1, 0, err));
    OK(lg_session_sync(s, 1, prompt.data + 3, 20, err));
    OK(lg_session_sync(s, 0, prompt.data, 39, err));
    assert_true(fx_max_diff(lg_session_logits(s, 0), want.at + 38 * VOCAB, VOCAB) <= 1e-4);
    const int32_t other = prompt.data[39], zero = 0;
    OK(lg_session_step(s, &zero, &other, 1, err));
    assert_true(fx_max_diff(lg_session_logits(s, 0), want.at + 39 * VOCAB, VOCAB) <= 1e-4);
    lg_error e = { 0 };
    assert_int_equal(lg_session_rewind(s, 0, 41, &e), LG_ERR_USAGE);
    assert_int_equal(lg_session_save(s, "build/never.snap", &e), LG_ERR_UNSUPPORTED);
    assert_non_null(strstr(e.message, "slots"));
    /* the window counts what stands before: 64 positions + 961 ids are one too many */
    int32_t many[1024] = { 0 };
    assert_int_equal(lg_session_sync(s, 0, many, 1024 - M + 1, &e), LG_ERR_LIMIT);
    assert_non_null(strstr(e.message, "1025"));
    OK(lg_session_sync(s, 0, many, 1024 - M, err));
    assert_int_equal(lg_session_step(s, &zero, &zero, 1, &e), LG_ERR_LIMIT);
    /* without slots everything is as ever */
    OK(lg_session_set_slots(s, 0, NULL, err));
    assert_int_equal(lg_session_len(s, 0), 0);
    fx_array plain = ref("plain", 40);
    rows got = eval(s, text.data, 40, -1);
    assert_true(fx_max_diff(got.at, plain.f, 40 * VOCAB) <= 1e-4);
    lg_slots bad = { .n = 10, .base = 9, .dtype = LG_DTYPE_F32 };
    assert_int_equal(lg_session_set_slots(s, 0, &bad, &e), LG_ERR_USAGE);
    bad = (lg_slots){ .n = 10, .base = 2000, .dtype = LG_DTYPE_F32 };
    assert_int_equal(lg_session_set_slots(s, 0, &bad, &e), LG_ERR_LIMIT);
    bad = (lg_slots){ .n = 10, .base = 20, .dtype = LG_DTYPE_F16 };
    assert_int_equal(lg_session_set_slots(s, 0, &bad, &e), LG_ERR_USAGE);
    assert_int_equal(lg_session_set_slots(s, 2, NULL, &e), LG_ERR_USAGE);
    fx_array_free(&plain);
    lg_base_free(got.at);
    lg_base_free(want.at);
    lg_base_free(steps.at);
    drop(&a);
    lg_session_free(s);
    lg_model_free(m);
}

/* Slots in bf16 and 8 bits: near the f32 ones, and not the same. */
static void slot_types(void **state) {
    (void)state;
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    lg_session *s = open_session(m, 1);
    slots a = compress(m, text.data, 200, RATIO);
    stand(s, 0, &a, M, true);
    rows want = eval(s, prompt.data, prompt.n, -1);
    const struct { lg_dtype t; double most; } types[] = { { LG_DTYPE_BF16, 0.1 }, { LG_DTYPE_KV8, 0.3 } };
    for (int i = 0; i < 2; i++) {
        const lg_kv_geom g = { types[i].t, KV, HD, lg_base_row_bytes(types[i].t, HD) };
        const int64_t n = LAYERS * M * KV;
        uint8_t *k = lg_base_calloc(n, g.row_bytes), *v = lg_base_calloc(n, g.row_bytes);
        const uint8_t *kl[LAYERS], *vl[LAYERS];
        for (int64_t r = 0; r < n; r++) {
            lg_ops_kv_store(&g, k + r * g.row_bytes, a.k + r * HD);
            lg_ops_kv_store(&g, v + r * g.row_bytes, a.v + r * HD);
        }
        for (int l = 0; l < LAYERS; l++) kl[l] = k + l * M * KV * g.row_bytes, vl[l] = v + l * M * KV * g.row_bytes;
        const lg_slots p = { .n = a.n, .base = M, .rope = true, .dtype = types[i].t, .k = kl, .v = vl };
        OK(lg_session_set_slots(s, 0, &p, err));
        rows got = eval(s, prompt.data, prompt.n, -1);
        const double d = fx_max_diff(got.at, want.at, 40 * VOCAB);
        printf("slots in %s: logits within %.3f\n", lg_base_dtype(types[i].t)->name, d);
        assert_true(d > 0 && d <= types[i].most);
        lg_base_free(got.at);
        lg_base_free(k);
        lg_base_free(v);
    }
    lg_base_free(want.at);
    drop(&a);
    lg_session_free(s);
    lg_model_free(m);
}

/* Prompts behind different chunks, behind the same one, behind none, more of them than sequences: equal to single runs. */
static void many(void **state) {
    (void)state;
    enum { N = 7 };
    lg_model *m = open_model(DIR, NULL, NULL, false, LG_COMPUTE_F32);
    lg_session *s = open_session(m, 3), *one = open_session(m, 1);
    slots x[2] = { compress(m, text.data, 131, RATIO), compress(m, text.data + 200, 256, RATIO) };
    const uint8_t *k[2][LAYERS], *v[2][LAYERS];
    lg_slots places[2];
    for (int i = 0; i < 2; i++) {
        for (int l = 0; l < LAYERS; l++) k[i][l] = (const uint8_t *)(x[i].k + l * M * ROW), v[i][l] = (const uint8_t *)(x[i].v + l * M * ROW);
        places[i] = (lg_slots){ .n = x[i].n, .base = M, .dtype = LG_DTYPE_F32, .k = k[i], .v = v[i] };
    }
    const lg_slots *at[N] = { &places[0], &places[0], &places[1], NULL, &places[0], &places[1], &places[1] };
    static const int32_t stop = EOS;
    lg_generate_params p[N];
    lg_generation out[N];
    lg_ids prompts[N];
    for (int i = 0; i < N; i++) {
        lg_generate_defaults(&p[i]);
        p[i].n_max = 5 + 3 * i;
        p[i].stop_ids = &stop;
        p[i].n_stop_ids = 1;
        prompts[i] = (lg_ids){ .data = prompt.data + i, .n = 30 - 2 * i };
    }
    OK(lg_session_generate_many(s, prompts, at, p, N, out, err));
    for (int i = 0; i < N; i++) {
        lg_generation g;
        OK(lg_session_set_slots(one, 0, at[i], err));
        OK(lg_generate(one, 0, prompts[i].data, prompts[i].n, &p[i], &g, err));
        same_ids(&out[i].ids, &g.ids);
        assert_int_equal(out[i].prompt_tokens, prompts[i].n);
        lg_generation_free(&g);
        lg_generation_free(&out[i]);
    }
    drop(&x[0]);
    drop(&x[1]);
    lg_session_free(s);
    lg_session_free(one);
    lg_model_free(m);
}

/* A Llama as a folder (half order) and as GGUF (interleaved): the same adapter gives the same slots, in half order, and the same
 * logits behind them. Memory q and k in full on even layers, as additions on odd ones. */
static void orders(void **state) {
    (void)state;
    enum { L = 3, R = 2 };
    const char *folder = FIXTURES "tiny-llama";
    char file[512], gguf[512];
    static char names[64][96];
    lg_st_entry e[64];
    float *keep[64];
    int n = 0;
#define PUT(rows_n, cols, scale, ...)                                                                     \
    do {                                                                                                  \
        snprintf(names[n], 96, __VA_ARGS__);                                                              \
        keep[n] = noise((rows_n) * (cols), scale, (uint64_t)(400 + n));                                   \
        e[n] = entry(names[n], rows_n, cols, keep[n]);                                                    \
        n++;                                                                                              \
    } while (0)
    PUT(1, D, 1, "model.lychee_memory_embed_tokens.weight");
    for (int l = 0; l < L; l++)
        for (int kk = 0; kk < 2; kk++) {
            const int64_t out = kk ? ROW : D;
            const char c = kk ? 'k' : 'q';
            if (l % 2) {
                PUT(R, D, 0.4f, "compressor.model.layers.%d.self_attn.%c_proj.lora_A.weight", l, c);
                PUT(out, R, 0.4f, "compressor.model.layers.%d.self_attn.%c_proj.lora_B.weight", l, c);
            } else {
                PUT(out, D, 0.3f, "model.layers.%d.self_attn.lychee_memory_%c_proj.weight", l, c);
            }
            PUT(R, D, 0.4f, "reader.model.layers.%d.self_attn.%c_proj.lora_A.weight", l, c);
            PUT(out, R, 0.4f, "reader.model.layers.%d.self_attn.%c_proj.lora_B.weight", l, c);
        }
#undef PUT
    fx_temp(file, "orders.safetensors");
    fx_temp(gguf, "orders.gguf");
    write_adapter(file, META(",\"memory_param\":[\"q\",\"k\"],\"lora_alpha\":4"), e, n);
    OK(lg_convert(folder, gguf, LG_DTYPE_F32, NULL, NULL, err));
    lg_model *a = open_model(folder, file, NULL, false, LG_COMPUTE_F32), *b = open_model(gguf, file, NULL, false, LG_COMPUTE_F32);
    assert_false(a->cfg.rope_interleaved);
    assert_true(b->cfg.rope_interleaved);
    slots x = compress(a, text.data, 200, RATIO), y = compress(b, text.data, 200, RATIO);
    const double d = slot_distance(&x, &y, 0, x.n);
    lg_session *s = open_session(a, 1), *t = open_session(b, 1);
    for (int rope = 0; rope < 2; rope++) {
        lg_session_use_lora(s, rope ? &a->reader : NULL);
        lg_session_use_lora(t, rope ? &b->reader : NULL);
        stand(s, 0, &x, M, rope);
        stand(t, 0, &y, M, rope);
        OK(lg_session_sync(s, 0, prompt.data, prompt.n, err));
        OK(lg_session_sync(t, 0, prompt.data, prompt.n, err));
        assert_true(fx_max_diff(lg_session_logits(s, 0), lg_session_logits(t, 0), a->cfg.n_vocab) <= 1e-4);
    }
    printf("orders: slots within %.2e\n", d);
    assert_true(d <= 1e-5);
    drop(&x);
    drop(&y);
    lg_session_free(s);
    lg_session_free(t);
    lg_model_free(a);
    lg_model_free(b);
    for (int i = 0; i < n; i++) lg_base_free(keep[i]);
    unlink(file);
    unlink(gguf);
}

static int load(void **state) {
    (void)state;
    text = fx_ids("memory", "ref/text.txt");
    prompt = fx_ids("memory", "ref/prompt.txt");
    return text.n == 600 && prompt.n == 40 ? 0 : -1;
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(parity),      cmocka_unit_test(greedy_ids),  cmocka_unit_test(loop),     cmocka_unit_test(sampling),
                                        cmocka_unit_test(layouts),     cmocka_unit_test(adapters),    cmocka_unit_test(identity), cmocka_unit_test(independence),
                                        cmocka_unit_test(causality),   cmocka_unit_test(permutation), cmocka_unit_test(ratios),   cmocka_unit_test(timelines),
                                        cmocka_unit_test(slot_types),  cmocka_unit_test(many),
                                        cmocka_unit_test(orders) };
    return cmocka_run_group_tests(tests, load, NULL);
}
