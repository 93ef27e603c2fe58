/* gate: is this chunk worth reading? score = sigmoid(w . h + b) with h the final-normed hidden state of the last token of
 * [slots; prompt(question, memory)], base weights with the gate's low-rank additions. A prefill without decoding; the output
 * matrix of the model is not touched. */
#include "memory/ask.h"
#include <math.h>

typedef struct scoring { lg_session *s; float *device, *dot; double *score; } scoring; /* [n] each */

/* w . rmsnorm(x) of the last rows of the prompts that ended. */
static lg_status read_scores(void *user, int64_t first, int64_t k, lg_error *err) {
    const scoring *x = user;
    lg_model *m = x->s->m;
    m->ops->logits(m->ctx, &(lg_op_logits){ .logits = x->device, .x = x->s->work.x, .norm = m->output_norm, .eps = m->cfg.norm_eps, .w = &m->gate_score,
                                            .row = x->s->row, .n_row = k });
    const lg_status st = m->ops->sync(m->ctx, err);
    if (st != LG_OK) return st;
    m->ops->download(m->ctx, x->dot, x->device, k * (int64_t)sizeof *x->dot);
    for (int64_t i = 0; i < k; i++) x->score[first + i] = 1 / (1 + exp(-((double)x->dot[i] + (double)m->gate_bias)));
    return m->ops->sync(m->ctx, err);
}

lg_status lg_memory_gate(lg_session *s, const int32_t *seqs, const lg_slots *slots, const lg_ids *prompts, int64_t n, double *score, lg_error *err) {
    lg_status st = LG_OK;
    lg_model *m = s->m;
    const lg_lora_set *before = s->lora;
    scoring x = { .s = s, .score = score };
    x.device = m->ops->alloc(m->ctx, n * (int64_t)sizeof *x.device, false, err);
    x.dot = lg_base_calloc(n, sizeof *x.dot);
    if (!x.device || !x.dot) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    lg_session_use_lora(s, m->gate.layer ? &m->gate : NULL);
    for (int64_t i = 0; i < n; i++) LG_TRY(lg_session_set_slots(s, seqs[i], &slots[i], err));
    LG_TRY(lg_session_prefill_many(s, seqs, prompts, n, read_scores, &x, err));
    for (int64_t i = 0; i < n; i++) LG_TRY(lg_session_set_slots(s, seqs[i], NULL, err)); /* what ran with the gate's weights is no prefix for the reader */
done:
    lg_session_use_lora(s, before);
    if (x.device) m->ops->free(m->ctx, x.device);
    lg_base_free(x.dot);
    return st;
}

int64_t lg_memory_gate_width(const lg_asking *a) { return a->p.gate_batch < a->s->p.n_seq_max ? a->p.gate_batch : a->s->p.n_seq_max; }

lg_status lg_memory_score(lg_asking *a, int64_t q, const int64_t *c, int64_t n, double *score, lg_error *err) {
    lg_status st = LG_OK;
    const int64_t n_layer = a->m->cfg.n_layer;
    const lg_ids fill[LG_HOLE_COUNT] = { a->question[q], a->memory[q], { 0 } };
    lg_ids prompt = { 0 };
    lg_ids *prompts = lg_base_calloc(n, sizeof *prompts); /* all the same one */
    int32_t *seqs = lg_base_calloc(n, sizeof *seqs);
    lg_slots *slots = lg_base_calloc(n, sizeof *slots);
    const uint8_t **rows = lg_base_calloc(n, 2 * n_layer * (int64_t)sizeof *rows);
    if (!prompts || !seqs || !slots || !rows) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    LG_TRY(lg_memory_prompt(&a->gate, fill, &prompt, err));
    for (int64_t i = 0; i < n; i++) {
        prompts[i] = prompt;
        seqs[i] = (int32_t)i;
        LG_TRY(lg_memory_bank_slots(a->b, c[i], &slots[i], rows + 2 * n_layer * i, rows + 2 * n_layer * i + n_layer, err));
        if (a->p.slot_rope >= 0) slots[i].rope = a->p.slot_rope != 0;
    }
    LG_TRY(lg_memory_gate(a->s, seqs, slots, prompts, n, score, err));
done:
    lg_ids_free(&prompt);
    lg_base_free(prompts);
    lg_base_free(seqs);
    lg_base_free(slots);
    lg_base_free(rows);
    return st;
}
