/* cover: the mathematics of calibration (specs: donor maps), no model in sight.
 *
 * Heads are numbered layer-major: i = layer * n_head_kv + head. C[r, i] is the mean share of head i's attention
 * that falls on the tokens head r would pick, W[i] the same for the window. Both are summed at several levels: sinks, recents and a
 * share (lg_cover_share, in LG_SHARE_ONEths) of what the budget holds beyond them. */
#ifndef LG_HEADS_COVER_H
#define LG_HEADS_COVER_H
#include "model/roles.h"

enum { LG_COVER_LEVELS = 16, LG_COVER_ONE = 6 }; /* the level of the whole budget */
extern const int32_t lg_cover_share[LG_COVER_LEVELS]; /* ascending from 0 */

typedef struct lg_cover {
    int64_t n_layer, n_head_kv, n_group, head_dim;
    int64_t sinks, recents, budget; /* budget: of the text in hand, at least sinks + recents */
    int64_t n_pos;             /* query positions of the text in hand */
    int64_t *pos;              /* [n_pos] ascending; a query at pos sees keys 0..pos */
    int64_t extra[LG_COVER_LEVELS]; /* tokens beyond sinks and recents at each level */
    int32_t *set;              /* [n_pos, n_layer * n_head_kv, extra of the last level] what a head picks beyond them, best first */
    double *sum_c;             /* [levels, n, n] over positions, of the current text */
    double *sum_w;             /* [levels, n] */
    double *all_c, *all_w;     /* means over texts, [levels, n, n] and [levels, n]; kept normalised by lg_cover_end */
    double *c, *w;             /* those of the whole budget: C[r * n + i], W[i] */
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
/* Shares of the budget, of mean one, for the heads that do not retrieve: those of the least sum of loss[i * LG_COVER_LEVELS + level], what
 * head i loses where it has the share of that level. Greedy by loss over tokens, on the lower convex hull of each head's losses. */
lg_status lg_cover_spread(lg_roles *r, const double *loss, lg_error *err);
/* sum_i sens[i]/(1-w[i]) * (cov[i]-w[i]) of the roles lg_cover_roles would give. */
double lg_cover_objective(int64_t n_layer, int64_t n_head_kv, const double *c, const double *w, const double *sens,
                          const uint8_t *retrieval, bool same_index);
#endif
