/* session: one timeline of tokens per sequence over a paged, reference-counted KV cache. */
#ifndef LG_SESSION_H
#define LG_SESSION_H
#include "model/model.h"

typedef struct lg_timeline {
    int32_t *ids;      /* [n_ctx] */
    int64_t len;
    int32_t *page;     /* [pages per sequence]; the first n_page are held */
    int64_t n_page;
    int64_t logit_row; /* row of the last pass, -1: none */
    int64_t steps;     /* decode steps since the last prefill */
    int64_t n_slot;    /* memory slots in rows 0..n_slot-1 (ids there are -1); they survive sync and rewind */
    int64_t shift;     /* RoPE position of row r >= n_slot is r + shift (M - n_slot behind slots, else 0) */
    const lg_sampler_params *sampler; /* generation under way: the next passes also draw an id, on the device where it can; else NULL */
    int64_t n_drawn;   /* ids drawn so far */
    uint32_t *kept;    /* device [n_slot of the plan][kept_words], NULL where nothing is kept */
    int64_t observed;  /* length at the observation that kept is from, -1: none */
} lg_timeline;

/* Memory slots to stand before a prompt (docs/MEMORY.md): rows [n][n_head_kv] of row_bytes(dtype, head_dim) per layer, K not rotated
 * and in half order. The prompt's first token has RoPE position base. */
typedef struct lg_slots {
    int64_t n, base;                     /* valid slots; M = chunk/ratio */
    bool rope;                           /* rotate slot i by position i, else leave un-rotated */
    lg_dtype dtype;                      /* f32, bf16 or KV8 */
    const uint8_t *const *k, *const *v;  /* [n_layer], host */
} lg_slots;

/* One step of several sequences; row r is that of sequence seq[r]. */
typedef struct lg_pass {
    int64_t n;
    int32_t *seq;      /* [max_row] */
    int64_t *budget; uint8_t *dense; /* [max_row] */
    lg_draw *draw;     /* [max_row] */
    int32_t *next;     /* [max_row] the id drawn as draw and recent say */
    float *logits;     /* device [max_row, n_vocab]; NULL: this one is never begun */
    bool draws;        /* next is (or will be) known */
    int64_t n_draw;    /* model.n_draw after it */
    int64_t ticket;    /* under way: of its list; else 0 */
} lg_pass;

struct lg_session {
    lg_model *m;
    lg_session_params p;
    lg_roles roles;            /* n_layer 0: dense */
    lg_kv_geom geom;
    lg_kv_layer *kv;           /* [n_layer] */
    int64_t n_page, page_bytes; /* page_bytes: K (or V) of all heads of one layer's page */
    int32_t *ref, *free_page;  /* [n_page]; stack of free pages */
    int64_t n_free;
    uint8_t *page_copy;        /* host scratch of one page */
    lg_timeline *seq;          /* [n_seq_max] */
    int64_t max_tok, max_row;  /* max_row: rows of one decode pass, >= n_seq_max (lg_session_new: equal) */
    lg_work work;
    float *logits;             /* device [max_row, n_vocab], twice where a pass is begun before the one before it is done */
    float *logits_host;        /* of the last pass on the host; where the device's memory is the host's, logits itself */
    uint8_t *logits_here;      /* [max_row] row of logits_host is current */
    lg_pass pass[2];           /* [now]: the last one; chunks and forced rows use arrays of the first */
    int now;
    bool next_known;           /* pass[now].next and draw belong to the last pass */
    int32_t *recent;           /* [max_row, LG_RECENT] */
    /* one step's arrays [max_tok] */
    int32_t *ids, *row_seq, *dst_page, *dst_slot, *row;
    int64_t *pos, *idx;        /* RoPE position; cache row */
    lg_kv_seq *seqs;           /* [max_row] */
    int32_t *batch;            /* [n_seq_max] sequence of each row of a step */
    /* hybrid plan */
    int64_t budget, sinks, recents; /* effective; budget -1: none (ratio, topp, threshold without windows) */
    int32_t *read, *make;      /* [n_layer * n_head_kv] */
    int32_t *slot_layer, *slot_head;
    lg_sets sets;              /* device */
    int32_t *sets_n, *sets_idx; /* host copies of the step's sets; idx only where it is looked at */
    lg_select select;
    lg_spread spread;          /* of s->share: uniform where the roles have no shares, or the rule no budget */
    int32_t *share, *n_make, *slot_share; /* [n_layer * n_head_kv] each */
    int64_t keep, observe, refresh; /* keep 0: nothing is kept */
    int64_t again;             /* tokens that are run again, and observed, when that is due */
    int64_t observing;         /* length of the sequence under observation */
    float *mass, *mass_host;   /* device and host [n_head_kv, n_ctx]; the same where memory is the host's */
    uint32_t *kept_host;       /* bits under way */
    int32_t *kept_units, *kept_work; float *kept_score; /* [n_ctx] each: of the choice */
    lg_stats stats;
    int64_t *row_bytes_read, *row_bytes_dense; /* [n_seq_max] of the last step, by position in its arguments */
    int64_t *head_tokens;
    lg_set_fn on_set; void *on_set_user; int32_t *set_tokens;
    lg_query_fn on_query; void *on_query_user;
    const lg_lora_set *lora;   /* NULL: none */
    uint8_t *stage; int64_t stage_bytes; /* slots.c: device memory that slots of a few layers pass through */
};

/* sample.c: how draw number `step` of a sampler goes. */
lg_draw lg_session_draw(const lg_sampler_params *p, int64_t n_recent, int64_t step);

/* cache.c */
lg_status lg_session_cache_init(lg_session *s, lg_error *err);
void lg_session_cache_free(lg_session *s);
/* Rows [from, to) of the sequence get pages of their own: allocated where missing, copied where shared. */
void lg_session_pages(lg_session *s, lg_timeline *q, int64_t from, int64_t to);
void lg_session_drop(lg_session *s, lg_timeline *q, int64_t keep); /* releases pages past `keep` tokens; no step is under way then */

/* plan.c */
lg_status lg_session_plan_init(lg_session *s, lg_error *err);
void lg_session_plan_free(lg_session *s);
/* Budget and dense switch of a row of length len; returns true when the step is dense. */
bool lg_session_plan_row(const lg_session *s, int64_t len, int64_t *budget);
void lg_session_plan_count(lg_session *s, int64_t row, int64_t arg, int64_t len, bool dense, int64_t budget);
void lg_session_plan_report(lg_session *s, int64_t row, int64_t position, int64_t len, bool dense); /* position: slots not counted */

/* kept.c: what the heads of a sequence keep. */
lg_status lg_session_kept_init(lg_session *s, lg_error *err); /* after the plan */
void lg_session_kept_free(lg_session *s);
/* An observation: begin, then the masses of each layer (lg_mass_fn), then end. len: of the sequence, observed rows included. */
void lg_session_kept_begin(lg_session *s, lg_timeline *q, int64_t len);
lg_status lg_session_kept_mass(void *session, int64_t layer, lg_error *err);
void lg_session_kept_end(lg_session *s, lg_timeline *q);
void lg_session_kept_cut(lg_session *s, lg_timeline *q); /* rows from q->len on are gone */
void lg_session_kept_copy(lg_session *s, lg_timeline *to, const lg_timeline *from);
enum { LG_REFRESH_PART = 64, LG_AGAIN_PART = 2 };
/* Whether the row that makes the sequence len tokens long must observe: it would be sparse, and the last observation is too old. */
bool lg_session_kept_due(const lg_session *s, const lg_timeline *q, int64_t len);

/* slots.c: empties sequence seq and puts slots in its first rows (slots NULL or n 0: none). Sync, step, rewind and generate then
 * work on the prompt alone: their ids and lengths do not count slots, the window n_ctx does. */
lg_status lg_session_set_slots(lg_session *s, int64_t seq, const lg_slots *slots, lg_error *err);
/* Low-rank additions for all passes to come (the model's reader or gate set), NULL: none. Does not touch the cache. */
void lg_session_use_lora(lg_session *s, const lg_lora_set *set);
/* session.c: lg_session_step. more: where the device draws the ids that follow (timeline.sampler), the step that feeds them may be begun before this
 * one is read back; it is the next call if that has those ids for some of these sequences, else it was in vain. */
lg_status lg_session_step_on(lg_session *s, const int32_t *seqs, const int32_t *ids, int64_t n, bool more, lg_error *err);
bool lg_session_is_ahead(const lg_session *s); /* a step is under way */
void lg_session_settle(lg_session *s);         /* none is any more: whoever changes what a step reads calls it first (lg_session_drop does) */
/* generate.c: lg_generate_batch where prompt i stands behind slots[i] (slots NULL: none; an entry NULL: none). */
lg_status lg_session_generate_many(lg_session *s, const lg_ids *prompts, const lg_slots *const *slots, const lg_generate_params *params, int64_t n,
                                   lg_generation *out, lg_error *err);

/* session.c: n whole prompts, prompt i on sequence seqs[i] behind its slots, in passes of up to max_tok rows that hold rows of many. After a
 * pass in which prompts ended, ended(user, first, k): prompts first .. first + k - 1 did, their last rows of this pass are row[0..k). */
typedef lg_status (*lg_ended_fn)(void *user, int64_t first, int64_t k, lg_error *err);
lg_status lg_session_prefill_many(lg_session *s, const int32_t *seqs, const lg_ids *prompts, int64_t n, lg_ended_fn ended, void *user, lg_error *err);

/* session.c: rows ids[first .. first+n) of a sequence as one dense chunk; logits of its last n_row rows. last: the last rows before decoding,
 * observed where heads keep tokens. */
lg_status lg_session_chunk(lg_session *s, int64_t seq, const int32_t *ids, int64_t n, int64_t n_row, float *logits, bool last, lg_error *err);

/* Teacher-forced decoding in one pass, for measuring: what n calls of lg_session_step with ids[0..n) would compute, hybrid or
 * dense as the session is set. Each layer writes K and V of all rows before its attention reads them, and row i sees
 * len + i + 1 tokens, so rows depend on each other just as steps do. The session comes from lg_session_new_rows with
 * max_row >= n. No cache correction, but what heads keep is observed anew where it is due. want: [n], rows whose logits are computed (NULL: all); *logits: theirs in order, valid until
 * the next pass. */
lg_status lg_session_new_rows(lg_session **out, lg_model *m, const lg_session_params *p, int64_t max_row, lg_error *err);
lg_status lg_session_force(lg_session *s, int64_t seq, const int32_t *ids, int64_t n, const uint8_t *want, const float **logits,
                           lg_error *err);
#endif
