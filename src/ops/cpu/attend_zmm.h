/* What attend_simd.h asks for, with AVX-512 (F, BW, DQ, VL), shared by attend_avx512.c and attend_bf16.c. */
#include "ops/cpu/attend_kernels.h"
#include <immintrin.h>

enum { VW = 16, NV = 4, MR = 8, MC = 2 };
#define GH 4
#define LG_PREFETCH 2 /* into L2: sets of scattered rows 6% faster on a Zen 5 than into L1, dense reads as fast */
typedef float vf __attribute__((vector_size(64)));
typedef float vfu __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi __attribute__((vector_size(64)));

static inline __m256i load32(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
static inline float s_f16(uint16_t x) { return _cvtsh_ss(x); }
static inline vf v_f16(const uint8_t *p) { return (vf)_mm512_cvtph_ps(load32(p)); }
static inline vf v_bf16(const uint8_t *p) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(p)), 16); }
static inline vf v_i8(const uint8_t *p) {
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}
static inline vf v_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline float v_hmax(vf a) { return _mm512_reduce_max_ps((__m512)a); }
static inline float v_hsum(vf a) { return _mm512_reduce_add_ps((__m512)a); }
static inline void v_hsum4(float *dst, vf a, vf b, vf c, vf d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512 x = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee)); /* a b c d in each quarter */
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

static inline void v_fma(vf *a, vf x, vf y) { *a += x * y; }

#include "ops/cpu/attend_simd.h"
