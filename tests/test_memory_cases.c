/* Trained memory weights of a real model against the reference's figures (../shared/data/smollm2-memory, README there): 15 chunks
 * compressed at ratio 4 and 8, every question alone behind the slots; nll of the answer's tokens and whether all are the arg-max.
 * f32: every nll within 2e-3 + 1e-3 of its size; auto, slots in bf16: total em within 2%.
 * LONGAN_SMOLLM2: the Q4_1 GGUF; LONGAN_MEMORY_DATA: the folder; LONGAN_MEMORY_CASES, _FROM: how many chunks (2; 15 are there)
 * and the first; LONGAN_MEMORY_SLOTS: slot types of auto (bf16; f32, q8); LONGAN_DEVICE; LONGAN_THREADS. */
#include "fixture.h"
#include "memory/memory.h"

static const char *model_path, *adapter_path, *cases_path;

static const char *const *prepare(void) {
    static char adapter[600], cases[600];
    const char *folder = getenv("LONGAN_MEMORY_DATA");
    model_path = getenv("LONGAN_SMOLLM2");
    if (!model_path) model_path = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
    snprintf(adapter, sizeof adapter, "%s/adapter.safetensors", folder ? folder : "../shared/data/smollm2-memory");
    snprintf(cases, sizeof cases, "%s/cases.json", folder ? folder : "../shared/data/smollm2-memory");
    adapter_path = adapter;
    cases_path = cases;
    if (access(model_path, R_OK) || access(adapter, R_OK) || access(cases, R_OK)) {
        printf("skip: needs LONGAN_SMOLLM2 and %s\n", adapter);
        skip();
    }
    return &adapter_path;
}

static lg_ids ids_of(const lg_json *v) {
    lg_ids out = { 0 };
    int64_t id;
    for (int64_t i = 0; i < lg_json_size(v); i++) {
        assert_true(lg_json_int(lg_json_at(v, i), &id));
        assert_true(lg_base_ids_push(&out, (int32_t)id));
    }
    return out;
}

typedef struct totals { int64_t n, em, em_ref, em_differs, bytes; double nll, nll_ref, worst, compress_s, read_s; } totals;

/* One answer: nll over its tokens and whether each is the arg-max; margin: by how far the nearest one is or is not. */
static double answer(lg_session *s, const lg_ids *q, const lg_ids *a, bool *em, double *margin) {
    const int64_t n_vocab = s->m->cfg.n_vocab;
    int32_t ids[256];
    double nll = 0;
    int64_t n = 0;
    assert_true(q->n + a->n < 256);
    for (int64_t i = 0; i < q->n; i++) ids[n++] = q->data[i];
    for (int64_t i = 0; i + 1 < a->n; i++) ids[n++] = a->data[i];
    const int64_t bytes = a->n * n_vocab * (int64_t)sizeof(float);
    float *device = s->m->ops->alloc(s->m->ctx, bytes, false, NULL), *logits = lg_base_alloc(bytes);
    assert_true(device && logits);
    OK(lg_session_rewind(s, 0, 0, err));
    OK(lg_session_chunk(s, 0, ids, n, a->n, device, false, err));
    s->m->ops->download(s->m->ctx, logits, device, bytes);
    s->m->ops->free(s->m->ctx, device);
    *em = true;
    *margin = INFINITY;
    for (int64_t i = 0; i < a->n; i++) {
        const float *x = logits + i * n_vocab;
        double sum = 0, top = -INFINITY;
        for (int64_t v = 0; v < n_vocab; v++)
            if (v != a->data[i] && (double)x[v] > top) top = (double)x[v];
        const double own = (double)x[a->data[i]], max = own > top ? own : top;
        for (int64_t v = 0; v < n_vocab; v++) sum += exp((double)x[v] - max);
        nll += max + log(sum) - own;
        *em = *em && own >= top;
        *margin = fmin(*margin, fabs(own - top));
    }
    lg_base_free(logits);
    return nll;
}

static void one_chunk(lg_model *m, lg_session *s, const lg_json *c, int64_t ratio, lg_dtype slots, totals *t, bool strict) {
    const lg_config *g = &m->cfg;
    int64_t chunk;
    assert_true(lg_json_int(lg_json_get(c, "chunk"), &chunk));
    lg_ids ids = ids_of(lg_json_get(c, "ids"));
    assert_int_equal(ids.n, chunk);
    const int64_t n = chunk / ratio, rows = n * g->n_head_kv, row = lg_base_row_bytes(slots, g->head_dim), stride = g->n_layer * rows * g->head_dim;
    lg_compressor *z;
    float *k = lg_base_calloc(stride, 4), *v = lg_base_calloc(stride, 4);
    uint8_t *kq = lg_base_calloc(g->n_layer * rows, row), *vq = lg_base_calloc(g->n_layer * rows, row);
    const uint8_t **kl = lg_base_calloc(g->n_layer, sizeof *kl), **vl = lg_base_calloc(g->n_layer, sizeof *vl);
    OK(lg_memory_compressor_new(&z, m, chunk, chunk, ratio, 1, err));
    const int32_t *const text[1] = { ids.data };
    double at = lg_base_now();
    OK(lg_memory_compress(z, text, &ids.n, 1, k, v, stride, err));
    t->compress_s += lg_base_now() - at;
    const lg_kv_geom geom = { .dtype = slots, .n_head_kv = (int32_t)g->n_head_kv, .head_dim = (int32_t)g->head_dim, .row_bytes = row };
    for (int64_t i = 0; i < g->n_layer * rows; i++) {
        lg_ops_kv_store(&geom, kq + i * row, k + i * g->head_dim);
        lg_ops_kv_store(&geom, vq + i * row, v + i * g->head_dim);
    }
    for (int64_t l = 0; l < g->n_layer; l++) kl[l] = kq + l * rows * row, vl[l] = vq + l * rows * row;
    const lg_slots place = { .n = n, .base = n, .rope = true, .dtype = slots, .k = kl, .v = vl };
    OK(lg_session_set_slots(s, 0, &place, err));
    lg_session_use_lora(s, &m->reader);
    char key[16];
    const totals before = *t;
    snprintf(key, sizeof key, "ratio%d", (int)ratio);
    const lg_json *want = lg_json_get(c, key), *qs = lg_json_get(c, "questions"), *as = lg_json_get(c, "answers");
    assert_true(lg_json_size(qs) > 0);
    for (int64_t i = 0; i < lg_json_size(qs); i++) {
        lg_ids q = ids_of(lg_json_at(qs, i)), a = ids_of(lg_json_at(as, i));
        double ref, margin;
        int64_t em_ref;
        bool em;
        assert_true(lg_json_num(lg_json_at(lg_json_get(want, "nll"), i), &ref));
        assert_true(lg_json_int(lg_json_at(lg_json_get(want, "em"), i), &em_ref));
        at = lg_base_now();
        const double nll = answer(s, &q, &a, &em, &margin), off = fabs(nll - ref);
        t->read_s += lg_base_now() - at;
        fx_worsen(&t->worst, off / (2e-3 + 1e-3 * ref));
        if (em != (em_ref != 0)) t->em_differs++;
        if (strict && !(off <= 2e-3 + 1e-3 * ref)) fail_msg("chunk %d ratio %d question %d: nll %.5f, the reference has %.5f", (int)chunk, (int)ratio, (int)i, nll, ref);
        if (strict && em != (em_ref != 0) && margin > 2e-3 + 1e-3 * ref) fail_msg("chunk %d ratio %d question %d: em %d", (int)chunk, (int)ratio, (int)i, em);
        t->nll += nll;
        t->nll_ref += ref;
        t->em += em;
        t->em_ref += em_ref;
        t->n++;
        lg_ids_free(&q);
        lg_ids_free(&a);
    }
    t->bytes += 2 * g->n_layer * rows * row;
    printf("  chunk of %d, ratio %d: em %lld/%lld, nll %.4f (reference %.4f), worst so far %.2f of the bound\n", (int)chunk, (int)ratio,
           (long long)(t->em - before.em), (long long)(t->n - before.n), t->nll - before.nll, t->nll_ref - before.nll_ref, t->worst);
    fflush(stdout);
    lg_memory_compressor_free(z);
    lg_base_free(k);
    lg_base_free(v);
    lg_base_free(kq);
    lg_base_free(vq);
    lg_base_free(kl);
    lg_base_free(vl);
    lg_ids_free(&ids);
}

static void all(const char *device, lg_compute compute, lg_dtype slots, int64_t limit, bool strict) {
    lg_model *m;
    lg_session *s;
    lg_json *root;
    const char *threads = getenv("LONGAN_THREADS");
    const lg_model_params mp = { .path = model_path, .device = device, .compute = compute, .adapters = &adapter_path, .n_adapter = 1,
                                 .n_threads = threads ? atoi(threads) : 0 };
    lg_session_params sp;
    OK(lg_json_load(&root, cases_path, 1 << 24, err));
    OK(lg_model_open(&m, &mp, err));
    lg_session_defaults(&sp);
    sp.n_ctx = 1024;
    OK(lg_session_new(&s, m, &sp, err));
    const lg_json *cases = lg_json_get(root, "cases");
    const int64_t n = lg_json_size(cases);
    assert_int_equal(n, 15);
    const char *start = getenv("LONGAN_MEMORY_FROM");
    const int64_t from = start ? atoi(start) : 0;
    totals sum = { 0 };
    for (int64_t ratio = 4; ratio <= 8; ratio += 4) {
        totals t = { 0 };
        for (int64_t i = from; i < n && i < from + limit; i++) one_chunk(m, s, lg_json_at(cases, i), ratio, slots, &t, strict);
        printf("%s %s slots %s ratio %d: em %lld/%lld (reference %lld, %lld differ), nll %.4f (reference %.4f), worst deviation %.2f of the bound, "
               "%lld bytes, compress %.2f s, read %.2f s\n", device ? device : "cpu", compute == LG_COMPUTE_F32 ? "f32" : "auto", lg_base_dtype(slots)->name,
               (int)ratio, (long long)t.em, (long long)t.n, (long long)t.em_ref, (long long)t.em_differs, t.nll / (double)t.n, t.nll_ref / (double)t.n,
               t.worst, (long long)t.bytes, t.compress_s, t.read_s);
        sum.em += t.em;
        sum.em_ref += t.em_ref;
        sum.n += t.n;
    }
    if (fabs((double)(sum.em - sum.em_ref)) > 0.02 * (double)sum.em_ref)
        fail_msg("em %lld, the reference has %lld", (long long)sum.em, (long long)sum.em_ref);
    lg_session_free(s);
    lg_model_free(m);
    lg_json_free(root);
}

/* 15 chunks take minutes in f32: without LONGAN_MEMORY_CASES the test looks at two. */
static int64_t how_many(void) {
    const char *few = getenv("LONGAN_MEMORY_CASES");
    return few ? atoi(few) : 2;
}

static void f32_equals_the_reference(void **state) {
    (void)state;
    prepare();
    all(getenv("LONGAN_DEVICE"), LG_COMPUTE_F32, LG_DTYPE_F32, how_many(), true);
}

static void auto_keeps_em(void **state) {
    (void)state;
    prepare();
    const char *which = getenv("LONGAN_MEMORY_SLOTS"), *device = getenv("LONGAN_DEVICE");
    const struct { lg_dtype t; const char *name; } types[] = { { LG_DTYPE_BF16, "bf16" }, { LG_DTYPE_F32, "f32" }, { LG_DTYPE_KV8, "q8" } };
    for (int i = 0; i < 3; i++)
        if (strstr(which ? which : "bf16", types[i].name)) all(device, LG_COMPUTE_AUTO, types[i].t, how_many(), false);
}

int main(int argc, char **argv) {
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = { cmocka_unit_test(f32_equals_the_reference), cmocka_unit_test(auto_keeps_em) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
