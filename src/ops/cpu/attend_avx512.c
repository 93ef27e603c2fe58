/* Attention kernels for AVX-512 (F, BW, DQ, VL); head_dim must be a multiple of 16. */
#include "ops/cpu/attend_zmm.h"
#include "ops/cpu/attend_tile.h"
#include "ops/cpu/attend_f32.h"
#include "ops/cpu/attend_flash.h"

const lg_attend_kernels lg_attend_avx512 = { .tile = tile_run, .flash = flash_run, .flash_bytes = flash_bytes_run, .peak = peak_run, .mass = mass_run };

/* Order of floats as order of signed words; both zeros alike. */
static inline __m512i keys_of(__m512i u) {
    const __m512i sign = _mm512_srai_epi32(u, 31);
    const __m512i key = _mm512_xor_si512(u, _mm512_srli_epi32(sign, 1));
    return _mm512_sub_epi32(key, sign); /* negatives up by one: -0 meets +0, order kept */
}

/* Radix select bit by bit on a shrinking list of candidates: one pass counts, one keeps the side that holds rank k. */
void lg_attend_topk_avx512(int32_t *out, const float *score, int64_t n, int64_t k, int32_t base, uint32_t *work) {
    const int64_t whole = n / 16 * 16;
    const __mmask16 tail = (__mmask16)((1u << (n - whole)) - 1);
    __m512i all = _mm512_set1_epi32(-1), any = _mm512_setzero_si512();
    int64_t left = k, m = n;
    if (k <= 0) return;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 in = i < whole ? 0xffff : tail;
        /* Sign bit flipped: unsigned order. */
        const __m512i key = _mm512_xor_si512(keys_of(_mm512_maskz_loadu_epi32(in, score + i)), _mm512_set1_epi32(INT32_MIN));
        all = _mm512_mask_and_epi32(all, in, all, key);
        any = _mm512_mask_or_epi32(any, in, any, key);
        _mm512_mask_storeu_epi32(work + i, in, key);
    }
    uint32_t cut = (uint32_t)_mm512_reduce_and_epi32(all);
    uint32_t differ = cut ^ (uint32_t)_mm512_reduce_or_epi32(any);
    if (differ) cut &= ~(uint32_t)(((uint64_t)2 << (31 - __builtin_clz(differ))) - 1);
    for (uint32_t bit = differ ? 1u << (31 - __builtin_clz(differ)) : 0; bit && m > 1; bit >>= 1) {
        const __m512i b = _mm512_set1_epi32((int32_t)bit);
        int64_t set = 0, w = 0;
        for (int64_t i = 0; i < m; i += 16) {
            const __mmask16 in = m - i >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (m - i)) - 1);
            set += __builtin_popcount(_mm512_mask_test_epi32_mask(in, _mm512_maskz_loadu_epi32(in, work + i), b));
        }
        const bool up = set >= left;
        if (up) cut |= bit;
        else left -= set;
        if (set == (up ? m : 0)) continue;
        for (int64_t i = 0; i < m; i += 16) {
            const __mmask16 in = m - i >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (m - i)) - 1);
            const __m512i x = _mm512_maskz_loadu_epi32(in, work + i);
            const __mmask16 hit = _mm512_mask_test_epi32_mask(in, x, b), take = up ? hit : (__mmask16)(in & ~hit);
            _mm512_mask_compressstoreu_epi32(work + w, take, x);
            w += __builtin_popcount(take);
        }
        m = w;
        if (m == 1) cut = work[0];
    }
    if (m == 1) cut = work[0];
    /* Everything above the cut, and the first `left` that equal it. */
    const __m512i c = _mm512_set1_epi32((int32_t)(cut ^ 0x80000000u));
    const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t at = 0;
    for (int64_t i = 0; i < n && at < k; i += 16) {
        const __mmask16 in = i < whole ? 0xffff : tail;
        const __m512i key = keys_of(_mm512_maskz_loadu_epi32(in, score + i));
        __mmask16 take = _mm512_mask_cmpgt_epi32_mask(in, key, c);
        __mmask16 equal = _mm512_mask_cmpeq_epi32_mask(in, key, c);
        for (; equal && left > 0; left--) {
            take = (__mmask16)(take | (equal & -equal));
            equal = (__mmask16)(equal & (equal - 1));
        }
        _mm512_mask_compressstoreu_epi32(out + at, take, _mm512_add_epi32(step, _mm512_set1_epi32(base + (int32_t)i)));
        at += __builtin_popcount(take);
    }
}
