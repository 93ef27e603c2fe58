/* place: slots of a bank before a prompt. */
#include "memory/bank.h"
#include <string.h>

lg_status lg_bank_place(const lg_bank *b, int64_t chunk, lg_session *s, int64_t seq, int slot_rope, lg_error *err) {
    lg_status st = LG_OK;
    lg_slots slots;
    const uint8_t **rows = lg_base_calloc(2 * b->h.n_layer, sizeof *rows);
    if (!rows) LG_TRY(lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory"));
    LG_TRY(lg_bank_fits(b, s->m, err));
    LG_TRY(lg_memory_bank_slots(b, chunk, &slots, rows, rows + b->h.n_layer, err));
    if (slot_rope >= 0) slots.rope = slot_rope != 0;
    LG_TRY(lg_session_set_slots(s, seq, &slots, err));
    lg_session_use_lora(s, &s->m->reader); /* what stands behind slots is the reader's */
done:
    lg_base_free(rows);
    return st;
}
