/* What this processor can do at most, the floors of docs/SPEED.md: bytes read a second from memory, 8-bit, 16-bit and f32 products
 * (AVX2), each with 1 .. N threads; best of repeats. usage: floors_bench [threads] */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include "base/base.h"

#if defined(__x86_64__)
enum { REPS = 6, ROUNDS = 2000000 };
static const int64_t bytes = 256 << 20;

#define EACH(M) M("0") M("1") M("2") M("3") M("4") M("5") M("6") M("7") M("8") M("9")
#define CLOBBERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm15"
#define ZERO(i) "vpxor %%xmm" i ", %%xmm" i ", %%xmm" i "\n\t"
#define BYTES(i) "vpmaddubsw %%ymm10, %%ymm11, %%ymm15\n\tvpaddw %%ymm15, %%ymm" i ", %%ymm" i "\n\t"
#define WORDS(i) "vpmaddwd %%ymm10, %%ymm11, %%ymm15\n\tvpaddd %%ymm15, %%ymm" i ", %%ymm" i "\n\t"
#define FLOATS(i) "vfmadd231ps %%ymm10, %%ymm11, %%ymm" i "\n\t"
#define LOOP(name, op)                                                                                          \
    static void name(void) {                                                                                    \
        int64_t n = ROUNDS;                                                                                     \
        __asm__ volatile(EACH(ZERO) ZERO("10") ZERO("11") "1:\n\t" EACH(op) "dec %0\n\tjnz 1b\n\tvzeroupper" : "+r"(n) : : CLOBBERS, "cc"); \
    }
LOOP(loop_bytes, BYTES)
LOOP(loop_words, WORDS)
LOOP(loop_floats, FLOATS)

static double rate(void (*loop)(void), int nth, double ops) {
    double best = 1e9;
    for (int r = 0; r < REPS; r++) {
        const double t0 = lg_base_now();
#pragma omp parallel num_threads(nth)
        loop();
        const double t = lg_base_now() - t0;
        best = t < best ? t : best;
    }
    return nth * 10.0 * ROUNDS * ops / best * 1e-9;
}

static double reading(const uint8_t *p, int nth) {
    double best = 1e9;
    for (int r = 0; r < REPS; r++) {
        const double t0 = lg_base_now();
#pragma omp parallel num_threads(nth)
        {
            const int64_t each = bytes / nth / 256 * 256;
            const uint8_t *q = p + each * omp_get_thread_num(), *end = q + each;
            for (; q < end; q += 256)
                __asm__ volatile("vmovdqu (%0), %%ymm0\n\tvmovdqu 32(%0), %%ymm1\n\tvmovdqu 64(%0), %%ymm2\n\tvmovdqu 96(%0), %%ymm3\n\t"
                                 "vmovdqu 128(%0), %%ymm0\n\tvmovdqu 160(%0), %%ymm1\n\tvmovdqu 192(%0), %%ymm2\n\tvmovdqu 224(%0), %%ymm3"
                                 : : "r"(q) : "xmm0", "xmm1", "xmm2", "xmm3");
        }
        const double t = lg_base_now() - t0;
        best = t < best ? t : best;
    }
    return (double)bytes / best * 1e-9;
}

int main(int argc, char **argv) {
    const int most = argc > 1 ? atoi(argv[1]) : lg_base_n_cores();
    uint8_t *p = lg_base_alloc(bytes);
    if (!p || most < 1) return 1;
    for (int64_t i = 0; i < bytes; i += 64) p[i] = 1;
    for (int nth = 1; nth <= most; nth++)
        printf("%d thread%s: read %.1f GB/s, 8-bit products %.0f GOP/s, 16-bit %.0f GOP/s, f32 %.0f GFLOP/s\n", nth, nth == 1 ? "" : "s",
               reading(p, nth), rate(loop_bytes, nth, 64), rate(loop_words, nth, 32), rate(loop_floats, nth, 16));
    lg_base_free(p);
    return 0;
}
#else
int main(void) { return 77; }
#endif
