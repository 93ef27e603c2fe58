/* cover: the mathematics of calibration (specs: donor maps), no model in sight.
 *
 * Heads are numbered layer-major: i = layer * n_head_kv + head. C[r, i] is the mean share of head i's attention
 * that falls on the tokens head r would pick, W[i] the same for the window. */
#ifndef LG_HEADS_COVER_H
#define LG_HEADS_COVER_H
#include "model/roles.h"

typedef struct lg_cover {
    int64_t n_layer, n_head_kv, n_group, head_dim;
    int64_t sinks, recents, budget; /* budget: of the text in hand, at least sinks + recents */
    int64_t n_pos;             /* query positions of the text in hand */
    int64_t *pos;              /* [n_pos] ascending; a query at pos sees keys 0..pos */
    int32_t *set;              /* [n_pos, n_layer * n_head_kv, budget] ascending token ids */
    double *sum_c;             /* [n, n] over positions, of the current text */
    double *sum_w;             /* [n] */
    double *c, *w;             /* means over texts: C[r * n + i], W[i]; kept normalised by lg_cover_end */
    double weight;             /* of the texts so far */
} lg_cover;

lg_status lg_cover_new(lg_cover *cv, int64_t n_layer, int64_t n_head_kv, int64_t n_group, int64_t head_dim,
                       int64_t sinks, int64_t recents, lg_error *err);
void lg_cover_free(lg_cover *cv);
/* One text: begin, then all layers in order, then end. A text counts with its weight, whatever its length. */
lg_status lg_cover_begin(lg_cover *cv, const int64_t *pos, int64_t n_pos, int64_t budget, lg_error *err);
/* q: [n_pos, n_head_kv * n_group, head_dim] rotated; k[head]: [at least pos[n_pos-1] + 1, head_dim] rotated. */
lg_status lg_cover_layer(lg_cover *cv, int64_t layer, const float *q, const float *const *k, lg_error *err);
void lg_cover_end(lg_cover *cv, double weight);

/* Greedy facility location: order[0..n) is the sequence in which heads become retrieval heads, gain[] what each adds to
 * the objective sum_i sens[i]/(1-w[i]) * (cov[i]-w[i]). same_index: head i may take only
 * the nearest earlier retrieval head of its index, layer 0 comes first, and the gain may be negative. */
lg_status lg_cover_choose(int64_t n_layer, int64_t n_head_kv, const double *c, const double *w, const double *sens,
                          bool same_index, int64_t *order, double *gain, lg_error *err);
/* The roles of a given set of retrieval heads: every other head reads its best earlier donor, or the window
 * where none covers more (donor), or its index's nearest (same-index). coverage: [n] or NULL. */
lg_roles *lg_cover_roles(int64_t n_layer, int64_t n_head_kv, const double *c, const double *w, const uint8_t *retrieval,
                         bool same_index, double *coverage);
/* sum_i sens[i]/(1-w[i]) * (cov[i]-w[i]) of the roles lg_cover_roles would give. */
double lg_cover_objective(int64_t n_layer, int64_t n_head_kv, const double *c, const double *w, const double *sens,
                          const uint8_t *retrieval, bool same_index);
#endif
