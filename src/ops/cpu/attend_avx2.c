/* Attention kernels for AVX2 with FMA and F16C. */
#include "ops/cpu/attend_kernels.h"
#include <immintrin.h>

enum { VW = 8, NV = 4, MR = 4 };
#define GH 2
#define LG_PREFETCH 3
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
    const __m256 u = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1)));
}

#include "ops/cpu/attend_simd.h"

const lg_attend_kernels lg_attend_avx2 = { .tile = tile_run, .flash = flash_run, .flash_bytes = flash_bytes_run };
