/* cpu/gemm_scalar: dequantising and the product in plain C; always f32 arithmetic, whatever the compute mode. */
#define ROWS_TABLE lg_gemm_rows_scalar
#include "ops/cpu/gemm_row.h"

void lg_gemm_block_f32(const lg_gemm_format *f, const uint8_t *panel, int64_t nb, int64_t b, float w[LG_GEMM_KB][LG_GEMM_NR]) {
    const uint8_t *c = panel + b * f->code_bytes;
    if (f->scale == LG_SCALE_NONE) {
        for (int k = 0; k < LG_GEMM_KB; k++)
            for (int r = 0; r < LG_GEMM_NR; r++) {
                if (f->code == LG_CODE_F32) memcpy(&w[k][r], c + 4 * (k * LG_GEMM_NR + r), 4);
                else {
                    const int at = f->code == LG_CODE_BF16 ? 2 * ((k / 2) * LG_GEMM_NR + r) + k % 2 : k * LG_GEMM_NR + r;
                    uint16_t h;
                    memcpy(&h, c + 2 * at, 2);
                    w[k][r] = f->code == LG_CODE_BF16 ? lg_base_bf16_to_f32(h) : lg_base_f16_to_f32(h);
                }
            }
        return;
    }
    int64_t group;
    const uint8_t *s = panel + nb * f->code_bytes, *own = s + lg_gemm_scale_at(f, b, &group);
    s += group;
    for (int r = 0; r < LG_GEMM_NR; r++) {
        uint16_t h[2] = { 0, 0 };
        memcpy(&h[0], s + 2 * r, 2);
        if (f->scale == LG_SCALE_DM || f->scale == LG_SCALE_KSM) memcpy(&h[1], s + 32 + 2 * r, 2);
        float d[2], m[2];
        d[0] = d[1] = lg_base_f16_to_f32(h[0]);
        m[0] = m[1] = f->scale == LG_SCALE_DM ? lg_base_f16_to_f32(h[1]) : 0;
        if (f->scale == LG_SCALE_KSM) {
            m[0] = m[1] = -(lg_base_f16_to_f32(h[1]) * (float)own[16 + r]);
            d[0] = d[1] = d[0] * (float)own[r];
        } else if (f->scale == LG_SCALE_K6) {
            d[0] *= (float)(int8_t)own[r];
            d[1] *= (float)(int8_t)own[16 + r];
        }
        for (int k = 0; k < LG_GEMM_KB; k++) {
            const int g = k / 4, bit = 4 * r + k % 4;
            int q;
            if (f->code == LG_CODE_8) q = c[64 * g + bit];
            else q = g < 4 ? c[64 * g + bit] & 15 : c[64 * (g - 4) + bit] >> 4;
            if (f->code == LG_CODE_5 || f->code == LG_CODE_6) q += (c[256 + 8 * g + bit / 8] >> bit % 8 & 1) * 16;
            if (f->code == LG_CODE_6) q += (c[320 + 8 * g + bit / 8] >> bit % 8 & 1) * 32;
            const int half = k / (LG_GEMM_KB / 2);
            w[k][r] = f->zero_log2 >= 0 ? d[half] * (float)(q - (1 << f->zero_log2)) : d[half] * (float)q + m[half];
        }
    }
}

void lg_gemm_float_scalar(const lg_gemm_job *j) { row_float_product(j); }
