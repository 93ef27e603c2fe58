/* weight.cuh: codes and scales of repacked weights, device side. One meaning for the products, the exact reader and the packer. */
#ifndef LG_CUDA_WEIGHT_CUH
#define LG_CUDA_WEIGHT_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "ops/cuda/product.cuh"

/* Compile-time facts of a format. */
template <int T> struct lg_fmt {
    static constexpr bool rows = T == LG_DTYPE_F32 || T == LG_DTYPE_F16 || T == LG_DTYPE_BF16; /* row-major as it is */
    static constexpr bool byte = T == LG_DTYPE_Q8_0;
    static constexpr bool k45 = T == LG_DTYPE_Q4_K || T == LG_DTYPE_Q5_K;
    static constexpr bool q6 = T == LG_DTYPE_Q6_K;
    static constexpr bool five = T == LG_DTYPE_Q5_0 || T == LG_DTYPE_Q5_1 || T == LG_DTYPE_Q5_K;
    static constexpr bool pair = T == LG_DTYPE_Q4_1 || T == LG_DTYPE_Q5_1; /* (d, m) per group */
    static constexpr int zero = T == LG_DTYPE_Q4_0 ? 8 : T == LG_DTYPE_Q5_0 ? 16 : T == LG_DTYPE_Q8_0 ? 128 : T == LG_DTYPE_Q6_K ? 32 : 0;
    static constexpr int code_bytes = byte ? 32 : 16;              /* of a lane's row and chunk */
    static constexpr int high_bytes = five ? 4 : q6 ? 8 : 0;
    static constexpr int scale_bytes = pair ? 16 : 8;              /* of a row and chunk */
    static constexpr int super_bytes = k45 ? 4 : q6 ? 2 : 0;       /* of a row and two chunks */
};

static __device__ __forceinline__ float lg_f16(uint16_t h) { return __half2float(__ushort_as_half(h)); }

/* Column inside the chunk of code i (0..7) of group j on lane part t. */
template <int T> static __device__ __forceinline__ int lg_column(int j, int t, int i) {
    return lg_fmt<T>::q6 ? j * 32 + (i >> 2) * 16 + t * 4 + (i & 3) : j * 32 + t * 8 + i;
}
/* Where code i stands: nibble of a word; byte of two words. */
static __device__ __forceinline__ int lg_nibble(int i) { return (i >> 1) + (i & 1) * 4; }
static __device__ __forceinline__ int lg_byte(int i) { return (i & 4) + ((i >> 1) & 1) + (i & 1) * 2; }

static __device__ __forceinline__ int64_t lg_lane_at(const lg_cuda_weight &w, int64_t row, int chunk, int t) { /* lane records before it, 32 a half */
    return (((row >> 4) * w.n_chunk + chunk) * 2 + ((row >> 3) & 1)) * 32 + (row & 7) * 4 + t;
}
static __device__ __forceinline__ int64_t lg_scale_at(const lg_cuda_weight &w, int64_t row, int chunk) {
    return ((row >> 4) * w.n_chunk + chunk) * 16 + (row & 15);
}
static __device__ __forceinline__ int64_t lg_super_at(const lg_cuda_weight &w, int64_t row, int chunk) {
    return ((row >> 4) * ((w.n_chunk + 1) >> 1) + (chunk >> 1)) * 16 + (row & 15);
}

/* The eight weights of (row, chunk, group j, part t), exactly as lg_base_dequant has them: nothing contracted. */
template <int T> static __device__ __forceinline__ void lg_weight_eight(const lg_cuda_weight &w, int64_t row, int chunk, int j, int t, float *o) {
    typedef lg_fmt<T> F;
    const int64_t at = lg_lane_at(w, row, chunk, t);
    const uint8_t *sc = w.scale + lg_scale_at(w, row, chunk) * F::scale_bytes;
    int code[8];
    if (F::byte) {
        const int64_t rec = at / 32 * 2, lane = at % 32;
        const uint2 v = *(const uint2 *)(w.codes + ((rec + (j >> 1)) * 32 + lane) * 16 + (j & 1) * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int b = lg_byte(i);
            code[i] = (int)(((b < 4 ? v.x : v.y) >> ((b & 3) * 8)) & 255);
        }
    } else {
        const uint32_t v = *(const uint32_t *)(w.codes + at * 16 + j * 4);
#pragma unroll
        for (int i = 0; i < 8; i++) code[i] = (int)((v >> (lg_nibble(i) * 4)) & 15);
    }
    if (F::five) {
        const uint32_t h = *(const uint32_t *)(w.high + at * 4);
#pragma unroll
        for (int i = 0; i < 8; i++) code[i] |= (int)((h >> (j * 4 + (i >> 1) + (i & 1) * 16)) & 1) << 4;
    }
    if (F::q6) {
        const uint32_t h = *(const uint32_t *)(w.high + at * 8 + (j >> 1) * 4);
#pragma unroll
        for (int i = 0; i < 8; i++) code[i] |= (int)((h >> (2 * ((j & 1) * 4 + (i >> 1)) + (i & 1) * 16)) & 3) << 4;
    }
    if (F::k45) {
        const uint16_t *d = (const uint16_t *)(w.super + lg_super_at(w, row, chunk) * 4);
        const float s = __fmul_rn(lg_f16(d[0]), (float)sc[2 * j]), m = __fmul_rn(lg_f16(d[1]), (float)sc[2 * j + 1]);
#pragma unroll
        for (int i = 0; i < 8; i++) o[i] = __fadd_rn(__fmul_rn(s, (float)code[i]), -m);
    } else if (F::q6) {
        const float d = lg_f16(*(const uint16_t *)(w.super + lg_super_at(w, row, chunk) * 2));
#pragma unroll
        for (int i = 0; i < 8; i++) o[i] = __fmul_rn(__fmul_rn(d, (float)(int8_t)sc[2 * j + (i >> 2)]), (float)(code[i] - 32));
    } else if (F::pair) {
        const uint16_t *d = (const uint16_t *)sc + 2 * j;
#pragma unroll
        for (int i = 0; i < 8; i++) o[i] = __fadd_rn(__fmul_rn(lg_f16(d[0]), (float)code[i]), lg_f16(d[1]));
    } else {
        const float d = lg_f16(((const uint16_t *)sc)[j]);
#pragma unroll
        for (int i = 0; i < 8; i++) o[i] = __fmul_rn(d, (float)(code[i] - F::zero));
    }
}

/* Element of a row-major matrix. */
template <int T> static __device__ __forceinline__ float lg_weight_one(const lg_cuda_weight &w, int64_t row, int64_t k) {
    if (T == LG_DTYPE_F32) return ((const float *)w.codes)[row * w.n_in + k];
    if (T == LG_DTYPE_F16) return lg_f16(((const uint16_t *)w.codes)[row * w.n_in + k]);
    return __uint_as_float((uint32_t)((const uint16_t *)w.codes)[row * w.n_in + k] << 16);
}

/* Eight weights at slot s (16 slots a chunk) of a row; col[i] their columns, n_in and beyond: 0. */
template <int T> static __device__ __forceinline__ void lg_weight_slot(const lg_cuda_weight &w, int64_t row, int s, float *o, int *col) {
    if (lg_fmt<T>::rows) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            col[i] = s * 8 + i;
            o[i] = col[i] < w.n_in ? lg_weight_one<T>(w, row, col[i]) : 0.0f;
        }
    } else {
        const int chunk = s >> 4, j = (s >> 2) & 3, t = s & 3;
        lg_weight_eight<T>(w, row, chunk, j, t, o);
#pragma unroll
        for (int i = 0; i < 8; i++) col[i] = chunk * LG_CHUNK + lg_column<T>(j, t, i);
    }
}

/* ---- from the file's blocks, at load ---- */
static __device__ __forceinline__ uint32_t lg_raw16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }
static __device__ __forceinline__ uint32_t lg_raw32(const uint8_t *p) { return lg_raw16(p) | lg_raw16(p + 2) << 16; }

template <int T> static __device__ int lg_raw_code(const uint8_t *row, int k) {
    const int e = k % 32, low = e % 16;
    if (T == LG_DTYPE_Q8_0) return row[k / 32 * 34 + 2 + e] ^ 0x80;
    if (T == LG_DTYPE_Q4_0 || T == LG_DTYPE_Q4_1) {
        const uint8_t b = row[k / 32 * (T == LG_DTYPE_Q4_0 ? 18 : 20) + (T == LG_DTYPE_Q4_0 ? 2 : 4) + low];
        return e < 16 ? b & 15 : b >> 4;
    }
    if (T == LG_DTYPE_Q5_0 || T == LG_DTYPE_Q5_1) {
        const uint8_t *b = row + k / 32 * (T == LG_DTYPE_Q5_0 ? 22 : 24) + (T == LG_DTYPE_Q5_0 ? 2 : 4);
        return (e < 16 ? b[4 + low] & 15 : b[4 + low] >> 4) | (int)((lg_raw32(b) >> e) & 1) << 4;
    }
    const int i = k % 256, g = i / 32;
    if (T == LG_DTYPE_Q4_K) {
        const uint8_t q = row[k / 256 * 144 + 16 + g / 2 * 32 + e];
        return g & 1 ? q >> 4 : q & 15;
    }
    if (T == LG_DTYPE_Q5_K) {
        const uint8_t *b = row + k / 256 * 176, q = b[48 + g / 2 * 32 + e];
        return (g & 1 ? q >> 4 : q & 15) | ((b[16 + e] >> g) & 1) << 4;
    }
    const uint8_t *b = row + (int64_t)(k / 256) * 210;
    const int half = i / 128, r = i % 128 / 32;
    return ((b[half * 64 + (r & 1) * 32 + e] >> (r < 2 ? 0 : 4)) & 15) | ((b[128 + half * 32 + e] >> 2 * r) & 3) << 4;
}

/* Scale record of (row, chunk); zero where the row or the columns are padding. */
template <int T> static __device__ void lg_raw_scale(const uint8_t *row, int chunk, int n_in, uint8_t *out, uint8_t *super) {
    typedef lg_fmt<T> F;
    if (F::k45 || F::q6) {
        const int k = chunk * LG_CHUNK, half = k % 256 / 128; /* whole chunks: n_in is a multiple of 256 */
        const uint8_t *b = row + (int64_t)(k / 256) * (T == LG_DTYPE_Q4_K ? 144 : T == LG_DTYPE_Q5_K ? 176 : 210);
        if (F::q6) {
            for (int i = 0; i < 8; i++) out[i] = b[192 + half * 8 + i];
            super[0] = b[208];
            super[1] = b[209];
            return;
        }
        for (int j = 0; j < 4; j++) {
            const uint8_t *p = b + 4;
            const int g = half * 4 + j;
            out[2 * j] = g < 4 ? p[g] & 63 : (p[g + 4] & 15) | (p[g - 4] >> 6) << 4;
            out[2 * j + 1] = g < 4 ? p[g + 4] & 63 : (p[g + 4] >> 4) | (p[g] >> 6) << 4;
        }
        for (int i = 0; i < 4; i++) super[i] = b[i];
        return;
    }
    const int block = T == LG_DTYPE_Q8_0 ? 34 : T == LG_DTYPE_Q4_0 ? 18 : T == LG_DTYPE_Q4_1 ? 20 : T == LG_DTYPE_Q5_0 ? 22 : 24;
    for (int j = 0; j < 4; j++) {
        const int k = chunk * LG_CHUNK + j * 32;
        if (k >= n_in) return;
        for (int i = 0; i < (F::pair ? 4 : 2); i++) out[j * (F::pair ? 4 : 2) + i] = row[k / 32 * block + i];
    }
}

/* i: (row, chunk, t). raw: the file's rows first_row.. ; rows past n_out and columns past n_in become zero. */
template <int T>
static __device__ void lg_pack_lane(const lg_cuda_weight &w, const uint8_t *raw, int64_t raw_row, int64_t first_row, int64_t n_row, int64_t i) {
    typedef lg_fmt<T> F;
    const int t = (int)(i & 3), chunk = (int)((i >> 2) % w.n_chunk);
    const int64_t row = first_row + (i >> 2) / w.n_chunk;
    if (row >= first_row + n_row) return;
    const bool real = row < w.n_out;
    const uint8_t *src = raw + (row - first_row) * raw_row;
    uint32_t word[8] = { 0 }, high[2] = { 0 };
    for (int j = 0; j < 4; j++)
        for (int e = 0; e < 8; e++) {
            const int k = chunk * LG_CHUNK + lg_column<T>(j, t, e);
            const uint32_t code = real && k < w.n_in ? (uint32_t)lg_raw_code<T>(src, k) : 0;
            if (F::byte) word[2 * j + (lg_byte(e) >> 2)] |= code << ((lg_byte(e) & 3) * 8);
            else word[j] |= (code & 15) << (lg_nibble(e) * 4);
            if (F::five) high[0] |= (code >> 4) << (j * 4 + (e >> 1) + (e & 1) * 16);
            if (F::q6) high[j >> 1] |= (code >> 4) << (2 * ((j & 1) * 4 + (e >> 1)) + (e & 1) * 16);
        }
    const int64_t at = lg_lane_at(w, row, chunk, t);
    if (F::byte) {
        uint4 *to = (uint4 *)w.codes + at / 32 * 64 + at % 32;
        to[0] = make_uint4(word[0], word[1], word[2], word[3]);
        to[32] = make_uint4(word[4], word[5], word[6], word[7]);
    } else {
        ((uint4 *)w.codes)[at] = make_uint4(word[0], word[1], word[2], word[3]);
    }
    if (F::five) ((uint32_t *)w.high)[at] = high[0];
    if (F::q6) ((uint2 *)w.high)[at] = make_uint2(high[0], high[1]);
    if (t == 0) {
        uint8_t sc[16], super[4] = { 0 };
        for (int e = 0; e < 16; e++) sc[e] = 0;
        if (real) lg_raw_scale<T>(src, chunk, w.n_in, sc, super);
        uint8_t *to = w.scale + lg_scale_at(w, row, chunk) * F::scale_bytes;
        for (int e = 0; e < F::scale_bytes; e++) to[e] = sc[e];
        if (F::super_bytes && !(chunk & 1))
            for (int e = 0; e < F::super_bytes; e++) w.super[lg_super_at(w, row, chunk) * F::super_bytes + e] = super[e];
    }
}
#endif
