/* Attention kernels for AVX2 with FMA and F16C. */
#include "ops/cpu/attend_kernels.h"
#include <immintrin.h>

enum { VW = 8, NV = 4, MR = 4, MC = 2 };
#define GH 3
#define LG_PREFETCH 0 /* every row is read once: not into L2 */
typedef float vf __attribute__((vector_size(32)));
typedef float vfu __attribute__((vector_size(32), aligned(4)));
typedef int32_t vi __attribute__((vector_size(32)));

static inline __m128i load16(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)(const void *)p); }
static inline float s_f16(uint16_t x) { return _cvtsh_ss(x); }
static inline vf v_f16(const uint8_t *p) { return (vf)_mm256_cvtph_ps(load16(p)); }
static inline vf v_bf16(const uint8_t *p) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16); }
static inline vf v_i8(const uint8_t *p) {
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}
static inline vf v_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline float v_hmax(vf a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline float v_hsum(vf a) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
static inline void v_hsum4(float *dst, vf a, vf b, vf c, vf d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
    const __m256 x = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee)); /* a b c d in each half */
    _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

/* The empty statement keeps gcc from cutting the chain into products that it adds up in a tree: half as many instructions again. */
static inline void v_fma(vf *a, vf x, vf y) {
    *a = (vf)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)*a);
    __asm__("" : "+x"(*a));
}

#include "ops/cpu/attend_simd.h"
#include "ops/cpu/attend_tile.h"
#include "ops/cpu/attend_f32.h"
#include "ops/cpu/attend_flash.h"

const lg_attend_kernels lg_attend_avx2 = { .tile = tile_run, .flash = flash_run, .flash_bytes = flash_bytes_run, .peak = peak_run, .mass = mass_run };

/* ---- selection ---------------------------------------------------------------------------------------- */
enum { TOP_BITS = 12, LOW_BITS = 10 }; /* 12 + 10 + 10 bits of a key */

/* Order of floats as order of unsigned words; both zeros alike. */
static inline __m256i keys_of(__m256i u) {
    const __m256i sign = _mm256_srai_epi32(u, 31);
    const __m256i key = _mm256_sub_epi32(_mm256_xor_si256(u, _mm256_srli_epi32(sign, 1)), sign); /* negatives up by one: -0 meets +0 */
    return _mm256_xor_si256(key, _mm256_set1_epi32(INT32_MIN));
}
static inline __m256i load_words(const uint32_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
static inline unsigned lanes(__m256i mask) { return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(mask)); }

/* The bin that holds rank *left from above; *left becomes the rank within it. */
static uint32_t bin_of(const int32_t *count, int bits, int64_t *left) {
    uint32_t b = (1u << bits) - 1;
    for (; count[b] < *left; b--) *left -= count[b];
    return b;
}

/* The key of rank k among n keys, 1 <= k <= n: *left of those that equal it belong to the k. A histogram of the highest bits says in which bin it
 * lies; the rest is decided among that bin's keys. */
static uint32_t cut_of(const uint32_t *key, int64_t n, int64_t k, int64_t *left) {
    int32_t count[1 << TOP_BITS] = { 0 };
    const int64_t whole = n / 8 * 8;
    *left = k;
    for (int64_t i = 0; i < n; i++) count[key[i] >> (32 - TOP_BITS)]++;
    uint32_t cut = bin_of(count, TOP_BITS, left) << (32 - TOP_BITS);
    for (int shift = 32 - TOP_BITS - LOW_BITS; shift >= 0; shift -= LOW_BITS) {
        const uint32_t known = cut >> (shift + LOW_BITS);
        const __m256i want = _mm256_set1_epi32((int32_t)known);
        for (int i = 0; i < 1 << LOW_BITS; i++) count[i] = 0;
        for (int64_t i = 0; i < whole; i += 8)
            for (unsigned hit = lanes(_mm256_cmpeq_epi32(_mm256_srli_epi32(load_words(key + i), shift + LOW_BITS), want)); hit; hit &= hit - 1)
                count[key[i + __builtin_ctz(hit)] >> shift & ((1 << LOW_BITS) - 1)]++;
        for (int64_t i = whole; i < n; i++)
            if (key[i] >> (shift + LOW_BITS) == known) count[key[i] >> shift & ((1 << LOW_BITS) - 1)]++;
        cut |= bin_of(count, LOW_BITS, left) << shift;
    }
    return cut;
}

static uint32_t key_at(const float *score) {
    uint32_t u;
    memcpy(&u, score, sizeof u);
    return (uint32_t)_mm256_extract_epi32(keys_of(_mm256_set1_epi32((int32_t)u)), 0);
}

/* Of many scores few can be among the k: those from the key on that has a rank safely beyond k in a sample. Returns false where there are fewer than k or
 * too many of them (ties), which is found out by counting, so results do not depend on the sample. */
enum { MANY = 8192, SHARE = 8, SAMPLE = 2048 };
static bool topk_of_many(int32_t *out, const float *score, int64_t n, int64_t k, int32_t base, uint32_t *work) {
    const int64_t every = n / SAMPLE < 16 ? 16 : n / SAMPLE, m = n / every, half = n / 2, fair = (k + every - 1) / every;
    uint32_t *key = work, *at = work + half;
    int64_t left, found = 0;
    for (int64_t i = 0; i < m; i++) key[i] = key_at(score + i * every);
    const int64_t rank = fair + 4 * (int64_t)sqrtf((float)fair) + 8; /* four standard deviations */
    if (rank > m) return false;
    const uint32_t from = cut_of(key, m, rank, &left);
    const __m256i flip = _mm256_set1_epi32(INT32_MIN), least = _mm256_set1_epi32((int32_t)(from ^ 0x80000000u));
    for (int64_t i = 0; i < n / 16 * 16; i += 16) {
        const __m256i a = keys_of(load_words((const uint32_t *)(const void *)(score + i))), b = keys_of(load_words((const uint32_t *)(const void *)(score + i + 8)));
        const __m256i low_a = _mm256_cmpgt_epi32(least, _mm256_xor_si256(a, flip)), low_b = _mm256_cmpgt_epi32(least, _mm256_xor_si256(b, flip));
        unsigned hit = ~(lanes(low_a) | lanes(low_b) << 8) & 0xffffu;
        if (!hit) continue;
        if (found + 16 > half) return false;
        uint32_t keys[16];
        _mm256_storeu_si256((__m256i *)(void *)keys, a);
        _mm256_storeu_si256((__m256i *)(void *)(keys + 8), b);
        for (; hit; hit &= hit - 1) {
            at[found] = (uint32_t)i + (uint32_t)__builtin_ctz(hit);
            key[found++] = keys[__builtin_ctz(hit)];
        }
    }
    if (found + 16 > half) return false;
    for (int64_t i = n / 16 * 16; i < n; i++) {
        at[found] = (uint32_t)i;
        key[found] = key_at(score + i);
        found += key[found] >= from;
    }
    if (found < k) return false;
    const uint32_t cut = cut_of(key, found, k, &left);
    for (int64_t i = 0; i < found; i++)
        if (key[i] > cut || (key[i] == cut && left-- > 0)) *out++ = base + (int32_t)at[i];
    return true;
}

void lg_attend_topk_avx2(int32_t *out, const float *score, int64_t n, int64_t k, int32_t base, uint32_t *work) {
    const int64_t whole = n / 8 * 8;
    int64_t left, m = 0;
    if (k <= 0) return;
    if (n >= MANY && k <= n / SHARE && topk_of_many(out, score, n, k, base, work)) return;
    for (int64_t i = 0; i < whole; i += 8)
        _mm256_storeu_si256((__m256i *)(void *)(work + i), keys_of(load_words((const uint32_t *)(const void *)(score + i))));
    for (int64_t i = whole; i < n; i++) work[i] = key_at(score + i);
    const uint32_t cut = cut_of(work, n, k, &left);
    /* Everything above the cut, and the first `left` that equal it. */
    const __m256i flip = _mm256_set1_epi32(INT32_MIN), c = _mm256_set1_epi32((int32_t)(cut ^ 0x80000000u));
    for (int64_t i = 0; i < whole; i += 8) {
        const __m256i key = _mm256_xor_si256(load_words(work + i), flip);
        const unsigned above = lanes(_mm256_cmpgt_epi32(key, c)), equal = lanes(_mm256_cmpeq_epi32(key, c));
        for (unsigned hit = above | equal; hit; hit &= hit - 1) {
            if ((equal & hit & -hit) && left-- <= 0) continue;
            out[m++] = base + (int32_t)i + __builtin_ctz(hit);
        }
    }
    for (int64_t i = whole; i < n; i++)
        if (work[i] > cut || (work[i] == cut && left-- > 0)) out[m++] = base + (int32_t)i;
}
