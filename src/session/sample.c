/* Sampling: repetition penalty, then temperature, top-k, top-p, min-p, one draw that depends on seed and step only. */
#include "session/session.h"

void lg_sampler_defaults(lg_sampler_params *p) {
    *p = (lg_sampler_params){ .temp = 0, .top_k = 0, .top_p = 1, .min_p = 0, .repeat_penalty = 1, .seed = 0 };
}

lg_draw lg_session_draw(const lg_sampler_params *p, int64_t n_recent, int64_t step) {
    lg_draw d = { .top_p = 1, .penalty = p->repeat_penalty, .n_recent = p->repeat_penalty != 1 ? (int32_t)n_recent : 0 };
    if (p->temp <= 0) return d;
    d.scale = 1.4426950408889634 / (double)p->temp;
    d.top_p = (double)p->top_p;
    d.min_weight = (uint64_t)((double)p->min_p * 0x1p40);
    d.top_k = p->top_k;
    d.random = lg_base_rng(p->seed, 0, (uint64_t)step);
    return d;
}

int32_t lg_sample(const float *logits, int64_t n_vocab, const lg_sampler_params *p, const int32_t *recent, int64_t n_recent, int64_t step,
                  float *scratch) {
    const lg_draw d = lg_session_draw(p, n_recent, step);
    return lg_ops_sample_fast(logits, n_vocab, &d, recent, scratch);
}
