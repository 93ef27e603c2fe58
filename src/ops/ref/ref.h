/* ref: serial plain C, the specification of every op. Attention is in attend.c, the rest in ref.c. */
#ifndef LG_REF_H
#define LG_REF_H
#include "ops/ops.h"
/* One row and head of kv_write; the CPU back end runs the same. */
enum { LG_HEAD_DIM_MAX = 256 };
void lg_ref_kv_write_row(const lg_op_kv_write *a, int64_t t, int64_t h);
void lg_ref_attend(const lg_op_attend *a);
void lg_ref_observe(const lg_op_observe *a);
void lg_ref_attend_hybrid(const lg_op_attend_hybrid *a); /* allocates its scratch: it is the specification, not a kernel */
#endif
