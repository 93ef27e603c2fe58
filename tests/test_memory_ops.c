/* What compressed memory asks of the op table, the CPU back end against the plain C specification: kv_write over source and
 * cache dtypes and both orders, low-rank additions in qkv, product_add and gate_up over row counts, ranks and thread counts,
 * K and V handed out before rotation. Bounds: f32 arithmetic 1e-5 of the largest value times the square root of the row length;
 * auto (8-bit or bf16 activations) 2% of the root mean square, over all outputs. The addition itself must be seen: with the
 * additions left out the outputs differ by more than the bound. */
#include "fixture.h"
#include "ops/ops.h"

enum { D = 96, FF = 160, HEADS = 4, KV = 2, HD = 32, PAGES = 6, MAX_TOK = 140 };
static uint64_t counter;
static float uniform(void) { return 2.0f * (float)lg_base_rng_unit(11, 3, counter++) - 1.0f; }

static float *vector(int64_t n, float scale) {
    float *v = lg_base_calloc(n, sizeof *v);
    assert_non_null(v);
    for (int64_t i = 0; i < n; i++) v[i] = scale * uniform();
    return v;
}

typedef struct side { const lg_ops *o; lg_ops_ctx *c; lg_weight w[5]; lg_lora r[5]; uint8_t *k, *v; } side; /* w, r: q, k, v, gate, up */

static const int64_t outs[5] = { HEADS * HD, KV * HD, KV * HD, FF, FF };

static void open_side(side *s, const lg_ops *o, lg_compute compute, int threads, const lg_weight *w, const lg_lora *r, const lg_kv_geom *g) {
    const lg_ops_config c = { .compute = compute, .n_threads = threads };
    *s = (side){ .o = o };
    OK(o->open(&s->c, &c, err));
    for (int i = 0; i < 5; i++) {
        s->w[i] = w[i];
        s->r[i] = r[i];
        OK(o->weight_bind(s->c, &s->w[i], err));
        if (o->lora_bind && r[i].rank) OK(o->lora_bind(s->c, &s->r[i], D, outs[i], err));
    }
    OK(o->reserve(s->c, MAX_TOK, 2, PAGES * LG_PAGE, HEADS, g, FF, FF, err));
    s->k = lg_base_calloc(PAGES * LG_PAGE * KV, g->row_bytes);
    s->v = lg_base_calloc(PAGES * LG_PAGE * KV, g->row_bytes);
    assert_true(s->k && s->v);
}

static void close_side(side *s) {
    for (int i = 0; i < 5; i++) {
        s->o->weight_unbind(s->c, &s->w[i]);
        if (s->o->lora_unbind && s->r[i].rank) s->o->lora_unbind(s->c, &s->r[i]);
    }
    s->o->close(s->c);
    lg_base_free(s->k);
    lg_base_free(s->v);
}

static double distance(const float *a, const float *b, int64_t n, bool exact) {
    double worst = 0, sum = 0, mass = 0, top = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = fabs((double)a[i] - (double)b[i]);
        fx_worsen(&worst, d);
        sum += d * d;
        mass += (double)b[i] * (double)b[i];
        top = fmax(top, fabs((double)b[i]));
    }
    return exact ? worst / (1e-5 * top * sqrt(D)) : sqrt(sum / mass) / 0.02; /* 1: at the bound */
}

static const lg_dtype weight_types[] = { LG_DTYPE_F32, LG_DTYPE_Q4_1, LG_DTYPE_BF16 };

static void low_rank(void **state) {
    (void)state;
    enum { N_ROWS = 4, N_RANK = 2 };
    const int64_t rows[N_ROWS] = { 1, 17, 64, 139 };
    const int32_t ranks[N_RANK] = { 3, 16 };
    double smallest_effect = INFINITY;
    for (int type = 0; type < 3; type++)
        for (int rank = 0; rank < N_RANK; rank++)
            for (int both = 0; both < 2; both++) { /* all three of q, k, v, or k alone */
                const lg_kv_geom g = { .dtype = LG_DTYPE_F32, .n_head_kv = KV, .head_dim = HD, .row_bytes = HD * 4 };
                lg_weight w[5];
                lg_lora r[5];
                float *keep[10];
                uint8_t *data[5];
                for (int i = 0; i < 5; i++) {
                    const int64_t row = lg_base_row_bytes(weight_types[type], D);
                    float *dense = vector(outs[i] * D, 0.1f);
                    data[i] = lg_base_calloc(outs[i], row);
                    for (int64_t o = 0; o < outs[i]; o++) lg_base_quant(weight_types[type], dense + o * D, data[i] + o * row, D);
                    lg_base_free(dense);
                    w[i] = (lg_weight){ .dtype = weight_types[type], .n_out = outs[i], .n_in = D, .data = data[i] };
                    const int32_t own = (i + rank) % 4 == 0 ? 8 : ranks[rank]; /* ranks of one op differ */
                    keep[2 * i] = vector(own * D, 0.3f);
                    keep[2 * i + 1] = vector(own * outs[i], 0.3f);
                    r[i] = (lg_lora){ .rank = both || i == 1 || i == 4 ? own : 0, .scale = 2, .a = keep[2 * i], .b = keep[2 * i + 1] };
                }
                for (int c = 0; c < 4; c++) {
                    const lg_compute compute = c < 2 ? LG_COMPUTE_F32 : LG_COMPUTE_AUTO;
                    side ref, cpu;
                    open_side(&ref, &lg_ops_ref, LG_COMPUTE_F32, 1, w, r, &g);
                    open_side(&cpu, &lg_ops_cpu, compute, c % 2 ? 2 : 1, w, r, &g);
                    for (int n = 0; n < N_ROWS; n++) {
                        const int64_t t = rows[n];
                        int32_t page[MAX_TOK], slot[MAX_TOK];
                        float *x = vector(t * D, 1), *norm = vector(D, 1), *bias = vector(HEADS * HD, 0.2f), *cs = vector(t * HD / 2, 1), *sn = vector(t * HD / 2, 1);
                        float *out[3][4], *kr[3], *vr[3];
                        for (int64_t i = 0; i < t; i++) page[i] = (int32_t)(i / LG_PAGE) + 1, slot[i] = (int32_t)(i % LG_PAGE);
                        for (int side_i = 0; side_i < 3; side_i++) { /* ref, cpu, ref without additions */
                            side *s = side_i == 1 ? &cpu : &ref;
                            const bool add = side_i < 2;
                            for (int i = 0; i < 4; i++) out[side_i][i] = lg_base_calloc(t, FF * 4);
                            kr[side_i] = lg_base_calloc(t, KV * HD * 4);
                            vr[side_i] = lg_base_calloc(t, KV * HD * 4);
                            for (int64_t i = 0; i < t * outs[3]; i++) out[side_i][3][i] = 0.5f;
                            s->o->qkv(s->c, &(lg_op_qkv){ .q = out[side_i][0], .x = x, .norm = norm, .eps = 1e-5f, .wq = &s->w[0], .wk = &s->w[1], .wv = &s->w[2],
                                .bq = bias, .bk = bias, .bv = bias, .k_norm = norm, .rope_cos = cs, .rope_sin = sn, .rope_interleaved = both,
                                .kv = { s->k, s->v }, .geom = g, .dst_page = page, .dst_slot = slot, .n_tok = t, .n_head = HEADS,
                                .lora_q = add ? &s->r[0] : NULL, .lora_k = add ? &s->r[1] : NULL, .lora_v = add ? &s->r[2] : NULL,
                                .k_raw = kr[side_i], .v_raw = vr[side_i] });
                            OK(s->o->sync(s->c, err)); /* K and V of this pass */
                            for (int64_t i = 0; i < t; i++)
                                for (int h = 0; h < KV; h++)
                                    lg_ops_kv_load(&g, out[side_i][1] + (i * KV + h) * HD, s->k + ((page[i] * KV + h) * LG_PAGE + slot[i]) * g.row_bytes);
                            s->o->gate_up(s->c, &(lg_op_gate_up){ .h = out[side_i][2], .x = x, .norm = norm, .eps = 1e-5f, .gate = &s->w[3], .up = &s->w[4],
                                .n_tok = t, .lora_gate = add ? &s->r[3] : NULL, .lora_up = add ? &s->r[4] : NULL });
                            s->o->product_add(s->c, &(lg_op_product_add){ .y = out[side_i][3], .x = x, .w = &s->w[4], .n_tok = t, .lora = add ? &s->r[4] : NULL });
                            OK(s->o->sync(s->c, err));
                        }
                        const int64_t sizes[4] = { t * HEADS * HD, t * KV * HD, t * FF, t * FF };
                        for (int i = 0; i < 4; i++) {
                            const double d = distance(out[1][i], out[0][i], sizes[i], c < 2), effect = distance(out[2][i], out[0][i], sizes[i], c < 2);
                            if (!(d <= 1)) fail_msg("output %d, %d rows, rank %d, weights %d, case %d: %.2f of the bound", i, (int)t, (int)ranks[rank], type, c, d);
                            if (both && effect < smallest_effect) smallest_effect = effect;
                        }
                        assert_true(distance(kr[1], kr[0], t * KV * HD, c < 2) <= 1);
                        assert_true(distance(vr[1], vr[0], t * KV * HD, c < 2) <= 1);
                        for (int side_i = 0; side_i < 3; side_i++) {
                            for (int i = 0; i < 4; i++) lg_base_free(out[side_i][i]);
                            lg_base_free(kr[side_i]);
                            lg_base_free(vr[side_i]);
                        }
                        lg_base_free(x);
                        lg_base_free(norm);
                        lg_base_free(bias);
                        lg_base_free(cs);
                        lg_base_free(sn);
                    }
                    close_side(&ref);
                    close_side(&cpu);
                }
                for (int i = 0; i < 10; i++) lg_base_free(keep[i]);
                for (int i = 0; i < 5; i++) lg_base_free(data[i]);
            }
    assert_true(smallest_effect > 3);
}

/* Raw K is what the cache holds once rotated: checked on the specification itself. */
static void raw_keys(void **state) {
    (void)state;
    const lg_kv_geom g = { .dtype = LG_DTYPE_F32, .n_head_kv = KV, .head_dim = HD, .row_bytes = HD * 4 };
    lg_weight w[5];
    lg_lora r[5] = { { 0 } };
    float *dense[5];
    for (int i = 0; i < 5; i++) {
        dense[i] = vector(outs[i] * D, 0.1f);
        w[i] = (lg_weight){ .dtype = LG_DTYPE_F32, .n_out = outs[i], .n_in = D, .data = dense[i] };
    }
    side s;
    open_side(&s, &lg_ops_ref, LG_COMPUTE_F32, 1, w, r, &g);
    float *x = vector(2 * D, 1), *norm = vector(D, 1), cs[HD], sn[HD], q[2 * HEADS * HD], k[2 * KV * HD], v[2 * KV * HD], got[HD];
    const int32_t page[2] = { 1, 1 }, slot[2] = { 5, 6 };
    for (int i = 0; i < HD; i++) cs[i] = cosf((float)i), sn[i] = sinf((float)i); /* both rows' tables */
    s.o->qkv(s.c, &(lg_op_qkv){ .q = q, .x = x, .norm = norm, .eps = 1e-5f, .wq = &s.w[0], .wk = &s.w[1], .wv = &s.w[2], .rope_cos = cs, .rope_sin = sn,
        .kv = { s.k, s.v }, .geom = g, .dst_page = page, .dst_slot = slot, .n_tok = 2, .n_head = HEADS, .k_raw = k, .v_raw = v });
    for (int t = 0; t < 2; t++)
        for (int h = 0; h < KV; h++) {
            const float *raw = k + (t * KV + h) * HD;
            lg_ops_kv_load(&g, got, s.k + ((1 * KV + h) * LG_PAGE + slot[t]) * g.row_bytes);
            for (int i = 0; i < HD / 2; i++) {
                assert_float_equal(got[i], raw[i] * cs[t * HD / 2 + i] - raw[i + HD / 2] * sn[t * HD / 2 + i], 1e-6f);
                assert_float_equal(got[i + HD / 2], raw[i + HD / 2] * cs[t * HD / 2 + i] + raw[i] * sn[t * HD / 2 + i], 1e-6f);
            }
            lg_ops_kv_load(&g, got, s.v + ((1 * KV + h) * LG_PAGE + slot[t]) * g.row_bytes);
            assert_memory_equal(got, v + (t * KV + h) * HD, sizeof got);
        }
    close_side(&s);
    for (int i = 0; i < 5; i++) lg_base_free(dense[i]);
    lg_base_free(x);
    lg_base_free(norm);
}

static void kv_write(void **state) {
    (void)state;
    const lg_dtype src[] = { LG_DTYPE_F32, LG_DTYPE_BF16, LG_DTYPE_KV8 }, dst[] = { LG_DTYPE_F32, LG_DTYPE_F16, LG_DTYPE_BF16, LG_DTYPE_KV8 };
    enum { N = 61 };
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 4; j++)
            for (int rope = 0; rope < 2; rope++)
                for (int inter = 0; inter < 2; inter++) {
                    const lg_kv_geom from = { src[i], KV, HD, lg_base_row_bytes(src[i], HD) }, g = { dst[j], KV, HD, lg_base_row_bytes(dst[j], HD) };
                    float *k = vector(N * KV * HD, 1), *v = vector(N * KV * HD, 1), cs[N * HD / 2], sn[N * HD / 2], want[HD], got[HD], turned[HD];
                    uint8_t *kq = lg_base_calloc(N * KV, from.row_bytes), *vq = lg_base_calloc(N * KV, from.row_bytes), *cache[2][2];
                    int32_t page[N], slot[N];
                    for (int t = 0; t < N; t++) {
                        page[t] = (t * 3) % PAGES;
                        slot[t] = (t * 7) % LG_PAGE;
                        for (int e = 0; e < HD / 2; e++) cs[t * HD / 2 + e] = cosf((float)(t * e)), sn[t * HD / 2 + e] = sinf((float)(t * e));
                    }
                    for (int t = 0; t < N * KV; t++) {
                        lg_ops_kv_store(&from, kq + t * from.row_bytes, k + t * HD);
                        lg_ops_kv_store(&from, vq + t * from.row_bytes, v + t * HD);
                    }
                    for (int which = 0; which < 2; which++) {
                        const lg_ops *o = which ? &lg_ops_cpu : &lg_ops_ref;
                        const lg_ops_config c = { .n_threads = 2 };
                        lg_ops_ctx *x;
                        OK(o->open(&x, &c, err));
                        OK(o->reserve(x, N, 1, PAGES * LG_PAGE, HEADS, &g, D, D, err));
                        for (int y = 0; y < 2; y++) cache[which][y] = lg_base_calloc(PAGES * LG_PAGE * KV, g.row_bytes);
                        o->kv_write(x, &(lg_op_kv_write){ .kv = { cache[which][0], cache[which][1] }, .geom = g, .k = kq, .v = vq, .src = from,
                            .rope_cos = rope ? cs : NULL, .rope_sin = rope ? sn : NULL, .rope_interleaved = inter, .dst_page = page, .dst_slot = slot, .n_tok = N });
                        OK(o->sync(x, err));
                        o->close(x);
                    }
                    for (int y = 0; y < 2; y++) assert_memory_equal(cache[0][y], cache[1][y], (size_t)(PAGES * LG_PAGE * KV * g.row_bytes));
                    /* The specification by hand, for the last row. (No two rows go to one place: which of them stands there is not said.) */
                    const int t = N - 1;
                    for (int h = 0; h < KV; h++) {
                        lg_ops_kv_load(&from, want, kq + (t * KV + h) * from.row_bytes);
                        for (int e = 0; e < HD / 2 && rope; e++) {
                            const float a = want[e], b = want[e + HD / 2], cc = cs[t * HD / 2 + e], ss = sn[t * HD / 2 + e];
                            want[e] = a * cc - b * ss;
                            want[e + HD / 2] = b * cc + a * ss;
                        }
                        for (int e = 0; e < HD; e++) turned[inter ? (e < HD / 2 ? 2 * e : 2 * (e - HD / 2) + 1) : e] = want[e];
                        uint8_t row[HD * 4];
                        lg_ops_kv_store(&g, row, turned);
                        assert_memory_equal(row, cache[0][0] + ((page[t] * KV + h) * LG_PAGE + slot[t]) * g.row_bytes, (size_t)g.row_bytes);
                        lg_ops_kv_load(&from, got, vq + (t * KV + h) * from.row_bytes);
                        lg_ops_kv_store(&g, row, got);
                        assert_memory_equal(row, cache[0][1] + ((page[t] * KV + h) * LG_PAGE + slot[t]) * g.row_bytes, (size_t)g.row_bytes);
                    }
                    for (int which = 0; which < 2; which++)
                        for (int y = 0; y < 2; y++) lg_base_free(cache[which][y]);
                    lg_base_free(k);
                    lg_base_free(v);
                    lg_base_free(kq);
                    lg_base_free(vq);
                }
}

int main(void) {
    const struct CMUnitTest tests[] = { cmocka_unit_test(low_rank), cmocka_unit_test(raw_keys), cmocka_unit_test(kv_write) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
