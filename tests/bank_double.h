/* A test double of the compressor (src/memory/compress.c): the slots are a plain function of the ids, of the chunk's place in its
 * batch and of the batch's size. So a bank is equal only if the same chunks were compressed together, which is stricter than a
 * real compressor. Linked instead of compress.o: it defines all of that file's functions. */
#ifndef LG_TEST_BANK_DOUBLE_H
#define LG_TEST_BANK_DOUBLE_H
#include "fixture.h"
#include "memory/bank.h"

struct lg_compressor { lg_model *m; int64_t chunk, ratio, batch; };
static int64_t double_delay_us, double_calls;

static inline float double_value(int64_t what, int64_t layer, int64_t slot, int64_t i, const int32_t *ids, int64_t n, int64_t place, int64_t batch) {
    const uint64_t u = lg_base_rng((uint64_t)(what + 2 * layer), (uint64_t)(slot * 131 + place * 7 + batch), (uint64_t)(i + 4096 * ids[n - 1] + ids[0]));
    return (float)(u >> 40) * 0x1p-23f - 1.0f;
}

lg_status lg_memory_compressor_new(lg_compressor **out, lg_model *m, int64_t chunk, int64_t window, int64_t ratio, int64_t batch, lg_error *err) {
    *out = lg_base_alloc(sizeof **out);
    if (!*out) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory");
    **out = (lg_compressor){ m, chunk, ratio, batch };
    return window > 0 ? LG_OK : LG_ERR_USAGE;
}
void lg_memory_compressor_free(lg_compressor *c) { lg_base_free(c); }
double lg_memory_compress_flops(const lg_compressor *c) { return (double)c->chunk; }

lg_status lg_memory_compress(lg_compressor *c, const int32_t *const *ids, const int64_t *n, int64_t n_chunk, float *k, float *v, int64_t stride,
                             lg_error *err) {
    const lg_config *g = &c->m->cfg;
    const int64_t row = g->n_head_kv * g->head_dim, layer = c->chunk / c->ratio * row;
    (void)err;
    double_calls++;
    if (n_chunk < 1 || n_chunk > c->batch) fail_msg("a batch of %lld chunks, at most %lld", (long long)n_chunk, (long long)c->batch);
    for (int64_t b = 0; b < n_chunk; b++)
        for (int64_t l = 0; l < g->n_layer; l++)
            for (int64_t s = 0; s * c->ratio < n[b]; s++) {
                const int64_t at = s * c->ratio, len = n[b] - at < c->ratio ? n[b] - at : c->ratio;
                for (int64_t i = 0; i < row; i++) {
                    k[b * stride + l * layer + s * row + i] = double_value(0, l, s, i, ids[b] + at, len, b, n_chunk);
                    v[b * stride + l * layer + s * row + i] = double_value(1, l, s, i, ids[b] + at, len, b, n_chunk);
                }
            }
    if (double_delay_us) usleep((unsigned)double_delay_us);
    return LG_OK;
}

static inline lg_bank_params double_params(void) {
    lg_bank_params p;
    lg_bank_defaults(&p);
    p.chunk = 32;
    p.window = 16;
    p.ratio = 4;
    p.group = 3;
    return p;
}
static inline int32_t *double_ids(const lg_model *m, int64_t n, uint64_t seed) {
    int32_t *ids = calloc((size_t)(n ? n : 1), sizeof *ids);
    for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)lg_base_rng_below(seed, 1, (uint64_t)i, m->cfg.n_vocab);
    return ids;
}
#endif
