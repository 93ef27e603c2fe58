/* roles: the roles file (contract.md "Hybrid heads"): who retrieves, who reads whose set. Data only; the
 * meaning of a role lives in the forward pass and in ops. */
#ifndef LG_ROLES_H
#define LG_ROLES_H
#include "file/file.h"
#include "ops/ops.h" /* LG_SHARE_ONE */

enum { LG_ROLES_MAX_LAYER = 4096, LG_ROLES_MAX_HEAD = 4096 };

/* All heads "window", budget, sinks and recents absent. NULL: out of memory or a size out of range. */
lg_roles *lg_roles_new(int64_t n_layer, int64_t n_head_kv);
lg_roles *lg_roles_clone(const lg_roles *r);
/* Gives it shares of the budget, all one. */
lg_status lg_roles_spread(lg_roles *r, lg_error *err);
/* From memory; name stands in messages. */
lg_status lg_roles_parse(lg_roles **out, const char *name, const char *text, int64_t n, lg_error *err);
/* Checks what the file must satisfy (donors earlier and retrieval, n_retrieval the true count, shares in range and at most 1 on average). */
lg_status lg_roles_check(const lg_roles *r, const char *name, lg_error *err);

typedef struct lg_roles_notes { /* what a file may say beyond the roles; all optional */
    const char *made;           /* a JSON object, ready made; NULL: absent */
    const double *coverage;     /* [n_layer * n_head_kv] attention mass a head finds in what it reads */
    const double *sensitivity;  /* [n_layer * n_head_kv] share of the loss when the head reads its window alone */
} lg_roles_notes;
lg_status lg_roles_format(lg_text *out, const lg_roles *r, const lg_roles_notes *notes, lg_error *err);
lg_status lg_roles_write(const char *path, const lg_roles *r, const lg_roles_notes *notes, lg_error *err); /* atomic */
#endif
