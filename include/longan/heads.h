/* Longan: calibration and inspection of head roles (specs: docs/SPARSE.md, roles file: docs/FORMATS.md). */
#ifndef LONGAN_HEADS_H
#define LONGAN_HEADS_H
#include "longan/longan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct lg_calibrate_params {
    const char *text;      /* plain text, UTF-8 */
    int64_t text_bytes;
    const char *text_name; /* recorded in "made" */
    bool same_index;       /* --share same-index */
    int64_t n_retrieval;   /* 0: smallest N whose KL is below kl_bound */
    double kl_bound;       /* default 0.02 */
    int64_t n_ctx;         /* context length calibrated for, default 4096 */
    int64_t n_positions;   /* default 128, shared by */
    int64_t n_passages;    /* passages of the text, default 4, at most 64 */
    int64_t budget, sinks, recents; /* defaults 512, 16, 64 */
    uint64_t seed;
    const char *curve_csv; /* NULL: none. Columns: n_retrieval,objective,kl_plain,kl_passkey,top1_plain,accuracy_passkey */
    const int64_t *also;   /* further counts to write, as OUT-nN.json beside OUT.json, and */
    int64_t n_also;
    int64_t search;        /* candidates per added head that are tried by real decoding (1: none, the cover alone decides) */
    bool spread;           /* budgets per head ("budget_share"), their mean the budget; wants f32 and much material (docs/SPARSE.md); default false */
    double keep;           /* share that heads keep ("keep" of the file; docs/SPARSE.md, "Kept tokens"): written, and in force where maps are decoded; default 0 */
    int64_t observe, refresh; /* 0: 64, 128 */
    int64_t refine;        /* rounds of swaps in the map of each count asked for, by real decoding (0: none; maps are then nested) */
    lg_progress_fn progress;
    void *progress_user;
} lg_calibrate_params;
void lg_calibrate_defaults(lg_calibrate_params *p);

/* Forward passes only; writes the roles file atomically. */
lg_status lg_heads_calibrate(lg_model *m, const lg_calibrate_params *p, const char *out_path, lg_error *err);
/* SVG heat-map of a roles file (roles, donors, coverage and sensitivity where the file has them). */
lg_status lg_heads_plot(const char *roles_path, const char *svg_path, lg_error *err);
/* Human-readable summary, one line per layer. Caller frees *out. */
lg_status lg_heads_show(const char *roles_path, bool json, lg_text *out, lg_error *err);

#ifdef __cplusplus
}
#endif
#endif
