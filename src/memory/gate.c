/* gate: is this chunk worth reading? score = sigmoid(w . h + b) with h the final-normed hidden state of the last token of
 * [slots; prompt(question, memory)], base weights with the gate's low-rank additions. A prefill without decoding; the output
 * matrix of the model is not touched. */
#include "memory/ask.h"
#include <math.h>

/* w . rmsnorm(x) of the last row of the pass that ran last. */
static lg_status last_hidden(lg_session *s, float *device, float *out, lg_error *err) {
    lg_model *m = s->m;
    m->ops->logits(m->ctx, &(lg_op_logits){ .logits = device, .x = s->work.x, .norm = m->output_norm, .eps = m->cfg.norm_eps, .w = &m->gate_score,
                                            .row = s->row, .n_row = 1 });
    const lg_status st = m->ops->sync(m->ctx, err);
    if (st != LG_OK) return st;
    m->ops->download(m->ctx, out, device, sizeof *out);
    return m->ops->sync(m->ctx, err);
}

lg_status lg_memory_gate(lg_session *s, const int32_t *seqs, const lg_slots *slots, const lg_ids *prompts, int64_t n, double *score, lg_error *err) {
    lg_status st = LG_OK;
    lg_model *m = s->m;
    const lg_lora_set *before = s->lora;
    float dot = 0;
    float *device = m->ops->alloc(m->ctx, sizeof *device, false, err);
    if (!device) return LG_ERR_NOMEM;
    lg_session_use_lora(s, m->gate.layer ? &m->gate : NULL);
    for (int64_t i = 0; i < n; i++) {
        LG_TRY(lg_session_set_slots(s, seqs[i], &slots[i], err));
        LG_TRY(lg_session_sync(s, seqs[i], prompts[i].data, prompts[i].n, err)); /* its last pass ends in one logits row: s->row[0] */
        LG_TRY(last_hidden(s, device, &dot, err));
        score[i] = 1 / (1 + exp(-((double)dot + (double)m->gate_bias)));
        LG_TRY(lg_session_set_slots(s, seqs[i], NULL, err)); /* what ran with the gate's weights is no prefix for the reader */
    }
done:
    lg_session_use_lora(s, before);
    m->ops->free(m->ctx, device);
    return st;
}

lg_status lg_memory_score(lg_asking *a, int64_t q, const int64_t *c, int64_t n, double *score, lg_error *err) {
    lg_status st = LG_OK;
    const int64_t n_layer = a->m->cfg.n_layer;
    const lg_ids fill[LG_HOLE_COUNT] = { a->question[q], a->memory[q], { 0 } };
    const int32_t seq = 0;
    lg_ids prompt = { 0 };
    const uint8_t **rows = lg_base_calloc(2 * n_layer, sizeof *rows);
    if (!rows) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    LG_TRY(lg_memory_prompt(&a->gate, fill, &prompt, err));
    for (int64_t i = 0; i < n; i++) {
        lg_slots slots;
        LG_TRY(lg_memory_bank_slots(a->b, c[i], &slots, rows, rows + n_layer, err));
        if (a->p.slot_rope >= 0) slots.rope = a->p.slot_rope != 0;
        LG_TRY(lg_memory_gate(a->s, &seq, &slots, &prompt, 1, &score[i], err));
    }
done:
    lg_ids_free(&prompt);
    lg_base_free(rows);
    return st;
}
