/* What a draw of 49,152 logits takes on the host: the specification (lg_ops_sample) and what is used (lg_ops_sample_fast), in turns, us a draw.
 * The logits are normal, with the mean and the greatest of SmolLM2's. usage: sample_bench [draws] */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "ops/ops.h"

enum { N = 49152 };
static float logits[N], scratch[2 * N];

int main(int argc, char **argv) {
    static const struct { const char *name; lg_draw d; } options[] = {
        { "greedy", { .top_p = 1, .penalty = 1 } },
        { "temperature 0.8", { .scale = 1.4427 / 0.8, .top_p = 1, .penalty = 1 } },
        { "temperature 0.8, top-p 0.95", { .scale = 1.4427 / 0.8, .top_p = 0.95, .penalty = 1 } },
        { "temperature 0.8, top-k 40, top-p 0.95", { .scale = 1.4427 / 0.8, .top_p = 0.95, .top_k = 40, .penalty = 1 } },
        { "the same, penalty 1.1", { .scale = 1.4427 / 0.8, .top_p = 0.95, .top_k = 40, .penalty = 1.1f, .n_recent = LG_RECENT } },
    };
    const int draws = argc > 1 ? atoi(argv[1]) : 200;
    int32_t recent[LG_RECENT];
    for (int i = 0; i < LG_RECENT; i++) recent[i] = 700 * i;
    for (int i = 0; i < N; i++) {
        const double u = ((double)(lg_base_rng(1, 2, (uint64_t)i) >> 11) + 1) * 0x1p-53, v = (double)(lg_base_rng(1, 3, (uint64_t)i) >> 11) * 0x1p-53;
        logits[i] = (float)(14.4 + 2.3 * sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
    }
    for (size_t k = 0; k < sizeof options / sizeof *options; k++) {
        double spent[2] = { 0, 0 };
        for (int i = 0; i < draws; i++) {
            lg_draw d = options[k].d;
            d.random = lg_base_rng(1, 4, (uint64_t)i);
            const double a = lg_base_now();
            const int32_t want = lg_ops_sample(logits, N, &d, recent, scratch);
            const double b = lg_base_now();
            const int32_t id = lg_ops_sample_fast(logits, N, &d, recent, scratch);
            spent[0] += b - a;
            spent[1] += lg_base_now() - b;
            if (id != want) return fprintf(stderr, "sample_bench: id %d, not %d\n", (int)id, (int)want), 1;
        }
        printf("%-40s %8.1f %8.1f us\n", options[k].name, 1e6 * spent[0] / draws, 1e6 * spent[1] / draws);
    }
    return 0;
}
