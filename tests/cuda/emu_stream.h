/* What src/ops/cuda/stream_ptx.cuh has, on the CPU; and the arithmetic of the device that products of few rows use. Comes after emu.h. */
#ifndef LG_TEST_EMU_STREAM_H
#define LG_TEST_EMU_STREAM_H
static inline void lg_copy16(lg_smem to, const uint8_t *from, uint32_t size) {
    static const uint8_t zeros[16] __attribute__((aligned(16))) = { 0 };
    EMU_CHECK(size == 0 || size == 16);
    emu_cp16(to, size ? from : zeros);
}
static inline void lg_copy16_shared(lg_smem to, const void *from, uint32_t size) { lg_copy16(to, (const uint8_t *)from, size); }
template <int N> static inline void lg_copy_wait(void) { emu_cp_wait(N); }
static inline void lg_prefetch(const void *) {}
template <bool BF16>
static inline void lg_mma(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    const uint32_t a[4] = { a0, a1, a2, a3 }, b[2] = { b0, b1 };
    float c[4] = { c0, c1, c2, c3 };
    emu_mma<!BF16>(c, a, b);
    memcpy(d, c, sizeof c);
}
static inline void lg_mma_u8(int32_t *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const int g = emu_lane() >> 2, t = emu_lane() & 3;
    const uint32_t mine[6] = { a0, a1, a2, a3, b0, b1 };
    emu_give(mine, sizeof mine);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 32; k++) {
            const uint32_t *x = (const uint32_t *)emu_of(4 * g + k % 16 / 4), *y = (const uint32_t *)emu_of(4 * (2 * t + (i & 1)) + k % 16 / 4);
            d[i] += (int32_t)(uint8_t)(x[k / 16 * 2 + (i >> 1)] >> 8 * (k & 3)) * (int32_t)(int8_t)(y[4 + k / 16] >> 8 * (k & 3));
        }
    emu_warp_barrier();
}
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (int)(int8_t)(a >> i) * (int)(int8_t)(b >> i);
    return c;
}
static inline float lg_reciprocal(float x) { return 1.0f / x; }
template <typename... X> static inline void lg_pin(X &...) {}
static inline float lg_max_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }
#define __expf expf /* (the C library has one of that name, not to be linked with) */
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __int_as_float(int x) { return __uint_as_float((unsigned)x); }
static inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
#endif
