/* cpu/attend: attention over the paged cache. An op runs in phases; all threads of one parallel region call
 * *_run for phase 0, 1, ... with a barrier between phases (the caller's). None allocates or locks. */
#ifndef LG_ATTEND_H
#define LG_ATTEND_H
#include "ops/cpu/gemm.h"

enum { LG_HEAD_STEP = 8 }; /* head sizes are multiples of it */
/* Scratch shared by all threads, enough for any op of these sizes; 64-byte aligned. */
int64_t lg_attend_scratch_bytes(const lg_gemm *g, int64_t n_tok, int64_t n_seq, int64_t max_len, int32_t n_head,
                                const lg_kv_geom *kv, int nth);
int lg_attend_phases(const lg_gemm *g, const lg_op_attend *a, int nth);
/* o: NULL, or the observation that stands behind it and lg_observe_follows: scratch then goes to that one as it is. */
void lg_attend_run(const lg_gemm *g, const lg_op_attend *a, const lg_op_observe *o, int phase, void *scratch, int ith, int nth);
int lg_attend_hybrid_phases(const lg_gemm *g, const lg_op_attend_hybrid *a, int nth);
void lg_attend_hybrid_run(const lg_gemm *g, const lg_op_attend_hybrid *a, int phase, void *scratch, int ith, int nth);
/* Whether o is of the last rows of a, which are one sequence's: it begins with phase 1 then, as a leaves what phase 0 would. */
bool lg_observe_follows(const lg_op_attend *a, const lg_op_observe *o);
int lg_observe_phases(const lg_gemm *g, const lg_op_observe *a, int nth);
void lg_observe_run(const lg_gemm *g, const lg_op_observe *a, int phase, void *scratch, int ith, int nth);
#endif
