/* Prefill and attention mass with AVX512_BF16, where `--compute auto` allows it: queries, keys, values and softmax weights as pairs of bf16 (rounded to nearest even), whose products
 * VDPBF16PS adds to f32 sums; head_dim must be a multiple of 32. */
#include "ops/cpu/attend_zmm.h"

enum { PACK = 2 };
INLINE vf w_all(const float *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return (vf)_mm512_set1_epi32(word);
}
INLINE void w_fma(vf *a, vf x, vf y) { *a = (vf)_mm512_dpbf16_ps((__m512)*a, (__m512bh)x, (__m512bh)y); }
INLINE vf w_line(const vf *x) { return (vf)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]); }
INLINE vf w_join(const vf *x) {
    static const int16_t order[32] = { 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31 };
    return (vf)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)w_line(x));
}
#include "ops/cpu/attend_flash.h"

const lg_attend_kernels lg_attend_bf16 = { .flash = flash_run, .flash_bytes = flash_bytes_run, .peak = peak_run, .mass = mass_run };
