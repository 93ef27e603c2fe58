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
#define __expf expf /* (the C library has one of that name, not to be linked with) */
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline int min(int a, int b) { return a < b ? a : b; }
#endif
