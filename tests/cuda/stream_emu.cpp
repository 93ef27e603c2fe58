/* stream.cu, stream_major.cu, stream_rows.cu and stream_codes.cu of src/ops/cuda on the CPU (emu.h) against exact products of the dequantised weights: every format, one to three
 * weights that share an input, gate and up, added results, norms, sizes that are no whole tiles or pieces, few multiprocessors. Weights, inputs
 * and outputs are blocks of their own, so that ASan sees a byte too much. Inputs of one row are rounded to bf16 (the bound is 6e-3), to f16 (1e-3), or for
 * quantised weights to 16 bits of their group's largest (2e-4).
 * Several rows come as bf16: 1e-5; the twin they leave is the rounded result, or that times a norm with its squares. For quantised weights they come as f16 (1e-3),
 * or too large or too small for that, whole or (with more columns, or less shared memory) in parts, and what they leave is the same of the result.
 * (On a GPU: ops test.) The emulation has shuffles of whole warps only, so the number of chunks is even. */
#include "ops/cuda/stream.cuh"
#include "../worsen.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" cudaError_t cudaGetDevice(int *d) { *d = 0; return cudaSuccess; }

typedef struct shape { int n; int64_t n_out[3], n_in; bool gate_up, add, norm; int n_sm; } shape;

static uint64_t counter;
static int parts_seen, twins_seen; /* products in parts, and of those that leave an input */
static float uniform(float a, float b) { return a + (b - a) * (float)lg_base_rng_unit(3, 1, counter++); }
static void put16(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }
static void *room(int64_t bytes) {
    void *p = NULL;
    if (cudaMalloc(&p, (size_t)bytes) != cudaSuccess) abort();
    return p;
}
static float *floats(int64_t n, float a, float b) {
    float *x = (float *)room(n * 4);
    for (int64_t i = 0; i < n; i++) x[i] = uniform(a, b);
    return x;
}

/* Random codes and scales, moderate factors. */
static uint8_t *make_raw(lg_dtype t, int64_t n_out, int64_t n_in) {
    const int64_t bytes = n_out * lg_base_row_bytes(t, n_in), block = lg_base_dtype(t)->bytes;
    uint8_t *d = (uint8_t *)room(bytes);
    for (int64_t i = 0; i < bytes; i++) d[i] = (uint8_t)lg_base_rng(7, 2, counter++);
    for (int64_t at = 0; at < bytes; at += block) {
        const float v = uniform(-0.1f, 0.1f);
        const bool minimum = t == LG_DTYPE_Q4_1 || t == LG_DTYPE_Q5_1 || t == LG_DTYPE_Q4_K || t == LG_DTYPE_Q5_K;
        if (t == LG_DTYPE_BF16) put16(d + at, lg_base_f32_to_bf16(v));
        else put16(d + at + (t == LG_DTYPE_Q6_K ? 208 : 0), lg_base_f32_to_f16(t == LG_DTYPE_Q6_K ? v * 0.01f : v));
        if (minimum) put16(d + at + 2, lg_base_f32_to_f16(uniform(-0.1f, 0.1f)));
    }
    return d;
}
template <int T> static void pack(lg_cuda_weight *w, const uint8_t *raw) {
    typedef lg_fmt<T> F;
    const int64_t rec = (int64_t)w->n_tile * w->n_chunk;
    w->codes = (uint8_t *)room(rec * 64 * F::code_bytes);
    w->high = (uint8_t *)room(rec * 64 * F::high_bytes + 16);
    w->scale = (uint8_t *)room(rec * 16 * F::scale_bytes);
    w->super = (uint8_t *)room((int64_t)w->n_tile * ((w->n_chunk + 1) / 2) * 16 * F::super_bytes + 16);
    for (int64_t i = 0; i < rec * 64; i++) lg_pack_lane<T>(*w, raw, lg_base_row_bytes((lg_dtype)T, w->n_in), 0, (int64_t)w->n_tile * 16, i);
}
static lg_cuda_weight packed(lg_dtype t, const uint8_t *raw, int64_t n_out, int64_t n_in) {
    lg_cuda_weight w = { t, (int32_t)n_out, (int32_t)n_in, (int32_t)((n_out + 15) / 16), (int32_t)((n_in + LG_CHUNK - 1) / LG_CHUNK), NULL, NULL, NULL, NULL, 0 };
    switch (t) {
#define X(T) case T: pack<T>(&w, raw); break;
        LG_EACH_QUANT(X)
#undef X
    default:
        w.codes = (uint8_t *)room(n_out * n_in * 2);
        memcpy(w.codes, raw, (size_t)(n_out * n_in * 2));
    }
    return w;
}
/* The weight as products get it, packed in *p. */
static lg_weight weight_of(lg_cuda_weight *p, lg_dtype t, const uint8_t *raw, int64_t n_out, int64_t n_in) {
    lg_weight w = {};
    *p = packed(t, raw, n_out, n_in);
    w.dtype = t;
    w.n_out = n_out;
    w.n_in = n_in;
    w.packed = p;
    return w;
}
static void release(lg_cuda_weight *w) {
    cudaFree(w->codes);
    cudaFree(w->high);
    cudaFree(w->scale);
    cudaFree(w->super);
}

/* A product whose result y [n] is left as f16 too: its bytes, or NULL where they are not y's. */
static uint8_t *make_f16(const lg_cuda_env *e, float *y, int64_t n) {
    const int64_t tiles = n / 16;
    uint8_t *raw = make_raw(LG_DTYPE_Q8_0, n, 256), *to = (uint8_t *)room(lg_cuda_f16_bytes(n));
    lg_cuda_weight p;
    const lg_weight w = weight_of(&p, LG_DTYPE_Q8_0, raw, n, 256), *pw = &w;
    float *x = floats(256, -1, 1);
    const lg_cuda_in in = { x, NULL, 0, NULL, 1 };
    lg_cuda_chain chain = { NULL, to, false, false };
    bool ok = lg_cuda_stream(e, &in, &chain, &pw, &y, 1, false, false);
    for (int64_t i = 0; i < tiles && ok; i++) {
        const double undo = (double)((const float *)(to + tiles * 32))[i];
        double top = 0;
        for (int r = 0; r < 16; r++) {
            const double v = (double)lg_base_f16_to_f32(((const uint16_t *)to)[i * 16 + r]);
            top = fmax(top, fabs(v));
            ok = ok && fabs(v * undo - (double)y[i * 16 + r]) <= undo * 0.5;
        }
        ok = ok && top >= 511 && top <= 1024;
    }
    release(&p);
    cudaFree(raw);
    cudaFree(x);
    if (ok) return to;
    cudaFree(to);
    return NULL;
}

/* An input with a number that is not finite: no result is, and none of the product that takes these as f16. */
static bool test_not_finite(lg_dtype t, float bad) {
    enum { MIDDLE = 512, IN = 256, OUT = 48 };
    uint8_t *raw0 = make_raw(t, MIDDLE, IN), *raw1 = make_raw(t, OUT, MIDDLE), *to = (uint8_t *)room(lg_cuda_f16_bytes(MIDDLE));
    lg_cuda_weight p0, p1;
    const lg_weight w0 = weight_of(&p0, t, raw0, MIDDLE, IN), w1 = weight_of(&p1, t, raw1, OUT, MIDDLE), *pw0 = &w0, *pw1 = &w1;
    float *x = floats(IN, -1, 1), *y0 = floats(MIDDLE, 0, 0), *y1 = floats(OUT, 0, 0);
    lg_cuda_env e = {};
    e.n_sm = 3;
    e.smem_max = 227 << 10;
    x[77] = bad;
    const lg_cuda_in in0 = { x, NULL, 0, NULL, 1 }, in1 = { y0, NULL, 0, NULL, 1 };
    lg_cuda_chain leaves = { NULL, to, false, false }, takes = { t == LG_DTYPE_Q6_K ? NULL : to, NULL, false, false };
    bool ok = lg_cuda_stream(&e, &in0, &leaves, &pw0, &y0, 1, false, false) && lg_cuda_stream(&e, &in1, &takes, &pw1, &y1, 1, false, false);
    for (int i = 0; i < MIDDLE; i++) ok = ok && !isfinite(y0[i]);
    for (int i = 0; i < OUT; i++) ok = ok && !isfinite(y1[i]);
    if (!ok) printf("stream_emu: %s: an input of %f gives finite results\n", lg_base_dtype(t)->name, (double)bad);
    release(&p0);
    release(&p1);
    cudaFree(raw0);
    cudaFree(raw1);
    cudaFree(to);
    cudaFree(x);
    cudaFree(y0);
    cudaFree(y1);
    return ok;
}

/* want = silu(want) * up */
static void gate(float *want, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) want[i] = (float)((double)want[i] / (1 + exp(-(double)want[i])) * (double)up[i]);
}

/* given: the input comes as f16. */
static bool test(lg_dtype t, const shape &s, bool given) {
    const int64_t n_in = s.n_in;
    lg_cuda_weight p[3];
    lg_weight w[3] = {};
    const lg_weight *pw[3];
    float *y[3], *want[3], *x = floats(3 * n_in, -1, 1), *norm = floats(n_in, 0.5f, 1.5f), *nx = floats(n_in, 0, 0), *row = floats(n_in, 0, 0);
    int32_t *index = (int32_t *)room(4);
    lg_cuda_env e = {};
    double ss = 0, worst = 0;
    e.n_sm = s.n_sm;
    e.smem_max = 227 << 10;
    *index = 2;
    lg_cuda_chain chain = {};
    chain.early = s.gate_up;
    if (given && !(chain.from = make_f16(&e, x + 2 * n_in, n_in))) return printf("stream_emu: the f16 row of %lld numbers is wrong\n", (long long)n_in), false;
    for (int64_t i = 0; i < n_in; i++) ss += (double)x[2 * n_in + i] * (double)x[2 * n_in + i];
    for (int64_t i = 0; i < n_in; i++) nx[i] = s.norm ? (float)((double)x[2 * n_in + i] / sqrt(ss / (double)n_in + 1e-5)) * norm[i] : x[2 * n_in + i];
    for (int k = 0; k < s.n; k++) {
        const int64_t n_out = s.n_out[k];
        uint8_t *raw = make_raw(t, n_out, n_in);
        w[k] = weight_of(&p[k], t, raw, n_out, n_in);
        pw[k] = &w[k];
        y[k] = floats(n_out, -1, 1);
        want[k] = floats(n_out, 0, 0);
        for (int64_t o = 0; o < n_out; o++) {
            double sum = s.add ? (double)y[k][o] : 0;
            lg_base_dequant(t, raw + o * lg_base_row_bytes(t, n_in), row, n_in);
            for (int64_t i = 0; i < n_in; i++) sum += (double)row[i] * (double)nx[i];
            want[k][o] = (float)sum;
            if (!s.add) y[k][o] = NAN;
        }
        cudaFree(raw);
    }
    float *second = y[1];
    if (s.gate_up) y[1] = y[0];
    const lg_cuda_in in = { x, s.norm ? norm : NULL, 1e-5f, index, 1 };
    const bool taken = lg_cuda_stream(&e, &in, &chain, pw, y, s.n, s.gate_up, s.add);
    if (s.gate_up) gate(want[0], want[1], s.n_out[0]);
    for (int k = 0; k < (s.gate_up ? 1 : s.n); k++) fx_worsen(&worst, fx_apart(y[k], want[k], s.n_out[k]));
    const bool ok = taken && worst < (t == LG_DTYPE_BF16 ? 6e-3 : t == LG_DTYPE_F16 || given ? 1e-3 : 2e-4);
    if (!ok) printf("stream_emu: %s, %d weights of %lld x %lld%s%s%s%s, %d multiprocessors: %s, error %.2e\n", lg_base_dtype(t)->name, s.n, (long long)s.n_out[0], (long long)n_in,
                    s.gate_up ? ", gate_up" : "", s.add ? ", add" : "", s.norm ? ", norm" : "", given ? ", f16" : "", s.n_sm, taken ? "wrong" : "not taken", worst);
    for (int k = 0; k < s.n; k++) {
        release(&p[k]);
        cudaFree(k == 1 ? second : y[k]);
        cudaFree(want[k]);
    }
    cudaFree((void *)chain.from);
    cudaFree(x);
    cudaFree(norm);
    cudaFree(nx);
    cudaFree(row);
    cudaFree(index);
    return ok;
}

/* Several rows, bf16 (with twins) or f16 weights. norm: factors, given for some numbers of rows, else as squares; one weight that adds leaves a twin for a norm. */
static bool test_rows(const shape &s, int n_tok, bool f16) {
    const lg_dtype type = f16 ? LG_DTYPE_F16 : LG_DTYPE_BF16;
    const int64_t n_in = s.n_in;
    const int beside = lg_beside(n_tok);
    lg_cuda_weight p[3];
    lg_weight w[3] = {};
    const lg_weight *pw[3];
    float *y[3], *want[3], *factor = floats(n_tok, 0.5f, 1.5f), *row = floats(n_in, 0, 0);
    const bool left = s.add && s.n == 1 && !f16, given = n_tok % 2 != 0;
    const int64_t n_sum = (n_in + 15) / 16, n_sum_out = (s.n_out[0] + 15) / 16;
    float *squares = floats(n_tok * n_sum, 0, 16), *norm = floats(s.n_out[0], 0.5f, 1.5f), *squares_out = floats(n_tok * n_sum_out, NAN, NAN);
    uint16_t *x = (uint16_t *)room((n_in + 31) / 32 * beside * 64), *twin = (uint16_t *)room((s.n_out[0] + 31) / 32 * beside * 64);
    lg_cuda_env e = {};
    double worst = 0;
    bool same = true;
    e.n_sm = s.n_sm;
    e.smem_max = 227 << 10;
    for (int t = 0; t < n_tok && s.norm && !given; t++) {
        double sum = 0;
        for (int64_t i = 0; i < n_sum; i++) sum += (double)squares[t * n_sum + i];
        factor[t] = (float)(1 / sqrt(sum / (double)n_in + 1e-5));
    }
    for (int64_t i = 0; i < (n_in + 31) / 32 * beside * 32; i++) x[i] = f16 ? 0x7e00 : 0x7fc0; /* what nobody wrote: NaN */
    for (int t = 0; t < n_tok; t++)
        for (int i = 0; i < n_in; i++) x[lg_beside_at(beside, t, i)] = f16 ? lg_base_f32_to_f16(uniform(-1, 1)) : lg_base_f32_to_bf16(uniform(-1, 1));
    for (int k = 0; k < s.n; k++) {
        const int64_t n_out = s.n_out[k];
        uint8_t *raw = make_raw(type, n_out, n_in);
        w[k] = weight_of(&p[k], type, raw, n_out, n_in);
        pw[k] = &w[k];
        y[k] = floats(n_tok * n_out, -1, 1);
        want[k] = floats(n_tok * n_out, 0, 0);
        for (int64_t o = 0; o < n_out; o++) {
            lg_base_dequant(type, raw + o * n_in * 2, row, n_in);
            for (int64_t t = 0; t < n_tok; t++) {
                double sum = 0;
                for (int64_t i = 0; i < n_in; i++) {
                    const uint16_t v = x[lg_beside_at(beside, (int)t, (int)i)];
                    sum += (double)row[i] * (double)(f16 ? lg_base_f16_to_f32(v) : lg_base_bf16_to_f32(v));
                }
                want[k][t * n_out + o] = (float)(sum * (s.norm ? (double)factor[t] : 1) + (s.add ? (double)y[k][t * n_out + o] : 0));
                if (!s.add) y[k][t * n_out + o] = NAN;
            }
        }
        cudaFree(raw);
    }
    float *second = y[1];
    if (s.gate_up) y[1] = y[0];
    const lg_cuda_rows in = { x, n_tok, s.norm && given ? factor : NULL, s.norm && !given ? squares : NULL, 1e-5f,
                              (s.gate_up && !f16) || left ? twin : NULL, left ? norm : NULL, squares_out };
    const bool taken = lg_cuda_streams_rows(&e, pw, s.n, n_tok, s.add);
    if (taken) lg_cuda_stream_rows(&e, &in, pw, y, s.n, s.gate_up, s.add);
    if (s.gate_up) gate(want[0], want[1], n_tok * s.n_out[0]);
    for (int64_t o = 0; s.gate_up && !f16 && o < n_tok * s.n_out[0]; o++)
        same = same && twin[lg_beside_at(beside, (int)(o / s.n_out[0]), (int)(o % s.n_out[0]))] == lg_base_f32_to_bf16(y[0][o]);
    for (int t = 0; t < n_tok && left; t++)
        for (int64_t i = 0; i < n_sum_out; i++) {
            double sum = 0;
            for (int64_t o = i * 16; o < i * 16 + 16 && o < s.n_out[0]; o++) {
                const float v = y[0][t * s.n_out[0] + o];
                sum += (double)v * (double)v;
                same = same && twin[lg_beside_at(beside, t, (int)o)] == lg_base_f32_to_bf16(v * norm[o]);
            }
            same = same && fabs((double)squares_out[t * n_sum_out + i] - sum) <= 1e-5 * sum;
        }
    for (int k = 0; k < (s.gate_up ? 1 : s.n); k++) fx_worsen(&worst, fx_apart(y[k], want[k], n_tok * s.n_out[k]));
    const bool ok = taken && same && worst < 1e-5;
    if (!ok) printf("stream_emu: %s, %d rows, %d weights of %lld x %lld%s%s%s, %d multiprocessors: %s, error %.2e%s\n", lg_base_dtype(type)->name, n_tok, s.n, (long long)s.n_out[0], (long long)n_in,
                    s.gate_up ? ", gate_up" : "", s.add ? ", add" : "", s.norm ? ", factor" : "", s.n_sm, taken ? "wrong" : "not taken", worst, same ? "" : ", another twin");
    for (int k = 0; k < s.n; k++) {
        release(&p[k]);
        cudaFree(k == 1 ? second : y[k]);
        cudaFree(want[k]);
    }
    cudaFree(factor);
    cudaFree(squares);
    cudaFree(squares_out);
    cudaFree(norm);
    cudaFree(row);
    cudaFree(x);
    cudaFree(twin);
    return ok;
}

/* Rows of whole chunks as inputs of stream_codes.cu, by a block; and sums of their squares. */
static __global__ void make_inputs(lg_halves to, float *squares, const float *from, const float *norm, int n_in, int n_chunk, int n_tok) {
    for (int n = 0; n < n_tok; n++) {
        for (int first = 0; first < n_chunk * LG_CHUNK; first += 2048) {
            const int k = first + (int)threadIdx.x * 8;
            float v[8];
            for (int i = 0; i < 8; i++) v[i] = k + i < n_in ? from[(int64_t)n * n_in + k + i] * (norm ? norm[k + i] : 1.0f) : 0.0f;
            atomicMax(to.most + n, lg_put_eight(to, n, k, v, k < n_chunk * LG_CHUNK));
        }
        if (threadIdx.x == 0) {
            squares[n] = 0.0f;
            for (int k = 0; k < n_in; k++) squares[n] += from[(int64_t)n * n_in + k] * from[(int64_t)n * n_in + k];
        }
    }
}
static lg_halves halves(int beside, int64_t n_chunk, bool sixteenth, bool split) {
    lg_halves h = { (uint16_t *)room(beside * n_chunk * 256), (float *)room(beside * n_chunk * 32), (uint32_t *)room(beside * LG_CODES_MOST * 4), beside, sixteenth, split };
    memset(h.most, 0, (size_t)beside * LG_CODES_MOST * 4);
    return h;
}
static void drop_halves(lg_halves h) {
    cudaFree(h.x);
    cudaFree(h.sums);
    cudaFree(h.most);
}
/* What product `y` [n_tok, n_out] left as an input: y, or y times norm with squares. */
static bool left_well(const lg_halves &to, const float *squares, const float *norm, const float *y, int n_tok, int n_out) {
    for (int n = 0; n < n_tok; n++) {
        float most = 0.0f;
        for (int i = 0; i < n_out; i++) most = fmaxf(most, fabsf(norm ? y[(int64_t)n * n_out + i] * norm[i] : y[(int64_t)n * n_out + i]));
        uint32_t left = 0;
        for (int i = 0; i < LG_CODES_MOST; i++) left = to.most[n * LG_CODES_MOST + i] > left ? to.most[n * LG_CODES_MOST + i] : left;
        if (left != __float_as_uint(most)) return false;
        for (int k = 0; k < n_out && lg_half_fits(left); k += 16) { /* (else nobody reads them) */
            float sum = 0.0f, ss = 0.0f, top = 0.0f;
            for (int i = k; i < k + 16; i++) {
                const int within = i & 31, at = to.split ? within % 16 / 4 * 8 + within / 16 * 4 + within % 4 : within;
                const float v = y[(int64_t)n * n_out + i], want = norm ? v * norm[i] : v;
                const float h = __half2float(__ushort_as_half(to.x[((int64_t)(i / 32) * to.beside + n) * 32 + at])) * (to.sixteenth && (i & 2) ? 16.0f : 1.0f);
                top = fmaxf(top, fabsf(want));
                ss += v * v;
                sum += h;
                if (fabsf(h - want) > fabsf(want) / 1024.0f + 1e-6f) return false;
            }
            if (fabsf(to.sums[lg_sixteen_at(to.beside, n, k)] - sum) > 1e-3f * top || (norm && fabsf(squares[(int64_t)n * (n_out / 16) + k / 16] - ss) > 1e-5f * ss)) return false;
        }
    }
    return true;
}
/* Several rows, quantised weights. smem: KB of shared memory. size: of the inputs, which f16 has to hold. */
static bool test_codes(lg_dtype t, const shape &s, int n_tok, int smem, float size) {
    const int64_t n_in = s.n_in, n_chunk = (n_in + LG_CHUNK - 1) / LG_CHUNK;
    const int beside = lg_beside(n_tok);
    const bool split = t == LG_DTYPE_Q6_K, sixteenth = t != LG_DTYPE_Q8_0;
    lg_cuda_weight p[3];
    lg_weight w[3] = {};
    const lg_weight *pw[3];
    float *y[3], *want[3], *x = floats(n_tok * n_in, -1, 1), *norm = floats(n_in, 0.5f, 1.5f), *row = floats(n_in, 0, 0), *squares = floats(n_tok, NAN, NAN);
    const lg_halves made = halves(beside, n_chunk, sixteenth, split);
    for (int64_t i = 0; i < n_tok * n_in; i++) x[i] *= size; /* beyond 65504, or too small, where it is not 1 */
    lg_cuda_env e = {};
    double worst = 0;
    int64_t partial = 0;
    e.n_sm = s.n_sm;
    e.smem_max = smem << 10;
    emu_start(dim3(1), dim3(256), 4096, [&] { make_inputs(made, squares, x, s.norm ? norm : NULL, (int)n_in, (int)n_chunk, n_tok); });
    for (int k = 0; k < s.n; k++) {
        const int64_t n_out = s.n_out[k];
        uint8_t *raw = make_raw(t, n_out, n_in);
        w[k] = weight_of(&p[k], t, raw, n_out, n_in);
        pw[k] = &w[k];
        y[k] = floats(n_tok * n_out, -1, 1);
        want[k] = floats(n_tok * n_out, 0, 0);
        partial += lg_cuda_codes_partial(&e, &w[k], n_tok);
        for (int64_t o = 0; o < n_out; o++) {
            lg_base_dequant(t, raw + o * lg_base_row_bytes(t, n_in), row, n_in);
            for (int64_t i = 0; i < n_tok; i++) {
                double sum = 0, ss = 0;
                for (int64_t c = 0; c < n_in; c++) {
                    const double v = (double)x[i * n_in + c];
                    ss += v * v;
                    sum += (double)row[c] * v * (s.norm ? (double)norm[c] : 1);
                }
                want[k][i * n_out + o] = (float)(sum / (s.norm ? sqrt(ss / (double)n_in + 1e-5) : 1) + (s.add ? (double)y[k][i * n_out + o] : 0));
                if (!s.add) y[k][i * n_out + o] = NAN;
            }
        }
        cudaFree(raw);
    }
    float *second = y[1];
    if (s.gate_up) y[1] = y[0];
    uint32_t *count = (uint32_t *)room(LG_CODES_GROUPS * 4), clear[LG_CODES_ROWS * LG_CODES_MOST];
    float *sums = (float *)room(partial);
    memset(count, 0, LG_CODES_GROUPS * 4);
    memset(clear, 1, sizeof clear);
    memset(sums, 0xff, (size_t)partial);
    const int64_t n_out = s.n_out[0];
    const bool leaves = n_out % LG_CHUNK == 0 && (s.gate_up || s.n == 1), normed = leaves && !s.gate_up && s.add;
    const lg_halves twin = halves(beside, n_out / LG_CHUNK, n_tok % 2 == 0, n_tok % 4 == 0);
    float *twin_norm = floats(n_out, 0.5f, 1.5f), *twin_squares = floats(n_tok * n_out / 16, NAN, NAN);
    const lg_cuda_codes in = { made.x, made.sums, made.most, 1, n_tok, x, s.norm ? norm : NULL, NULL, squares, s.norm ? 1 : 0, 1e-5f, clear, count, sums,
                               leaves ? twin : lg_halves{}, normed ? twin_norm : NULL, twin_squares };
    const bool taken = lg_cuda_streams_codes(&e, pw, s.n, n_tok, s.add);
    if (taken) lg_cuda_stream_codes(&e, &in, pw, y, s.n, s.gate_up, s.add);
    parts_seen += partial > 0;
    if (s.gate_up) gate(want[0], want[1], n_tok * s.n_out[0]);
    for (int k = 0; k < (s.gate_up ? 1 : s.n); k++) fx_worsen(&worst, fx_apart(y[k], want[k], n_tok * s.n_out[k]));
    bool ok = taken && worst < 1e-3;
    if (leaves) {
        twins_seen++;
        ok = ok && left_well(twin, twin_squares, normed ? twin_norm : NULL, y[0], n_tok, (int)n_out);
    }
    for (int i = 0; i < LG_CODES_GROUPS; i++) ok = ok && count[i] == 0;
    for (int i = 0; i < LG_CODES_ROWS * LG_CODES_MOST; i++) ok = ok && clear[i] == 0;
    if (!ok) printf("stream_emu: %s, %d rows, %d weights of %lld x %lld%s%s%s, %d multiprocessors, %d KB: %s, error %.2e\n", lg_base_dtype(t)->name, n_tok, s.n, (long long)s.n_out[0],
                    (long long)n_in, s.gate_up ? ", gate_up" : "", s.add ? ", add" : "", s.norm ? ", norm" : "", s.n_sm, smem, taken ? "wrong" : "not taken", worst);
    for (int k = 0; k < s.n; k++) {
        release(&p[k]);
        cudaFree(k == 1 ? second : y[k]);
        cudaFree(want[k]);
    }
    cudaFree(x);
    cudaFree(norm);
    cudaFree(row);
    cudaFree(squares);
    drop_halves(made);
    drop_halves(twin);
    cudaFree(sums);
    cudaFree(twin_norm);
    cudaFree(twin_squares);
    cudaFree(count);
    return ok;
}

int main(void) {
    static const lg_dtype types[] = { LG_DTYPE_BF16, LG_DTYPE_F16, LG_DTYPE_Q8_0, LG_DTYPE_Q4_0, LG_DTYPE_Q4_1, LG_DTYPE_Q5_0, LG_DTYPE_Q5_1, LG_DTYPE_Q4_K, LG_DTYPE_Q5_K, LG_DTYPE_Q6_K };
    static const shape shapes[] = {
        { 3, { 121, 16, 33 }, 512, false, false, true, 3 }, /* q, k, v */
        { 2, { 640, 640 }, 256, true, false, true, 2 },     /* more tiles than a block keeps sums of */
        { 1, { 1203 }, 256, false, true, false, 2 },
        { 1, { 90 }, 2560, false, true, false, 7 },         /* fewer tiles than multiprocessors */
        { 1, { 90 }, 3584, false, false, true, 1 },
        { 1, { 57 }, 1512, false, true, true, 2 },          /* row-major only */
        { 1, { 48 }, 1440, false, true, false, 2 },         /* a part of a chunk */
        { 1, { 24 }, 15360, false, false, false, 1 },       /* input in several rounds */
        { 3, { 161, 40, 33 }, 4096, false, false, true, 3 },
        { 2, { 25, 25 }, 31752, true, false, false, 2 },    /* row-major only, rows that all warps share */
        { 1, { 83 }, 14336, false, true, false, 3 },        /* rows that two share */
    };
    int cases = 0, failed = 0;
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        for (int inf = 0; types[i] > LG_DTYPE_BF16 && inf < 2; inf++) {
            cases++;
            failed += !test_not_finite(types[i], inf ? -INFINITY : NAN);
        }
        for (size_t k = 0; k < sizeof shapes / sizeof shapes[0]; k++) {
            if (lg_base_row_bytes(types[i], shapes[k].n_in) < 0) continue;
            for (int given = 0; given < (types[i] > LG_DTYPE_BF16 && types[i] != LG_DTYPE_Q6_K && !shapes[k].norm && shapes[k].n_in % 32 == 0 ? 2 : 1); given++) {
                cases++;
                failed += !test(types[i], shapes[k], given != 0);
            }
        }
    }
    static const shape several[] = {
        { 3, { 121, 16, 33 }, 512, false, false, true, 3 },
        { 2, { 140, 140 }, 264, true, false, true, 2 },
        { 1, { 203 }, 200, false, true, false, 2 },      /* warps without columns */
        { 1, { 90 }, 4136, false, true, false, 4 },      /* more columns than are kept */
        { 3, { 33, 17, 40 }, 4096, false, false, true, 2 },
        { 2, { 50, 50 }, 4608, true, false, false, 7 },
    };
    for (size_t k = 0; k < sizeof several / sizeof several[0]; k++)
        for (int n = 2; n <= 16; n += n == 2 ? 3 : n == 5 ? 3 : n == 8 ? 1 : 7) {
            for (int f16 = 0; f16 < 2; f16++) {
                cases++;
                failed += !test_rows(several[k], n, f16 != 0);
            }
        }
    static const shape codes[] = {
        { 3, { 121, 16, 33 }, 512, false, false, true, 5 },
        { 2, { 140, 140 }, 256, true, false, true, 2 },   /* warps without columns */
        { 1, { 203 }, 1280, false, true, false, 3 },
        { 2, { 50, 50 }, 2560, true, false, false, 7 },
        { 1, { 90 }, 3584, false, true, false, 9 },       /* parts of other lengths */
        { 1, { 40 }, 1440, false, false, true, 4 },       /* a part of a chunk */
        { 1, { 256 }, 4608, false, true, false, 9 },      /* results that the next one takes */
        { 2, { 128, 128 }, 1024, true, false, true, 3 },
    };
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        for (size_t k = 0; k < sizeof codes / sizeof codes[0]; k++) {
            if (types[i] <= LG_DTYPE_BF16 || lg_base_row_bytes(types[i], codes[k].n_in) < 0) continue;
            for (int n = 3; n <= 16; n += n == 3 ? 5 : n == 8 ? 1 : 7) {
                cases++;
                failed += !test_codes(types[i], codes[k], n, (k + (size_t)n) % 2 ? 227 : 100, n == 9 && k < 4 ? k % 2 ? 3e5f : 1e-7f : 1.0f);
            }
        }
    if (parts_seen < 20 || twins_seen < 40) failed++, printf("stream_emu: %d products in parts, %d that leave an input\n", parts_seen, twins_seen);
    printf("stream_emu: %d cases, %d failed\n", cases, failed);
    return failed != 0;
}
