/* cpu/gemm: instruction set, packing, and the choice of kernel. The kernels are in gemm_<isa>.c, the forms of weights
 * and inputs in gemm_form.h. The packed form does not depend on the instruction set. */
#include "ops/cpu/gemm_form.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* ---- instruction set ---- */
enum { AMX_MIN_TOK = 17 }; /* from here AMX over bf16 panels beats VNNI (docs/speed-gemm.md) */


static const char *const isa_names[] = { "scalar", "avx2", "avx512", "avx512_bf16", "amx" };
const char *lg_isa_name(lg_isa isa) { return isa_names[isa]; }

#if defined(__x86_64__)
static bool amx_allowed(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static lg_isa best_isa(void) {
    unsigned a, b, c, d, b7, c7, d7, a71, lo, hi;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d)) return LG_ISA_SCALAR;
    const unsigned need = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    if ((c & need) != need) return LG_ISA_SCALAR;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || !(b7 & bit_AVX2)) return LG_ISA_SCALAR;
    __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    if ((lo & 0x6) != 0x6) return LG_ISA_SCALAR;
    const unsigned f512 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    if ((lo & 0xe6) != 0xe6 || (b7 & f512) != f512 || !(c7 & bit_AVX512VNNI)) return LG_ISA_AVX2;
    const unsigned amx = 1u << 24 | 1u << 22; /* AMX-TILE, AMX-BF16: gcc and clang name the bits differently */
    const bool bf16 = __get_cpuid_count(7, 1, &a71, &b, &c, &d) && (a71 & bit_AVX512BF16);
    if (!bf16) return LG_ISA_AVX512;
    return (lo & 0x60000) == 0x60000 && (d7 & amx) == amx && amx_allowed() ? LG_ISA_AMX : LG_ISA_BF16;
}
#else
static lg_isa best_isa(void) { return LG_ISA_SCALAR; }
#endif

lg_isa lg_cpu_isa(void) {
    static atomic_int known; /* 1 + isa; two threads that race find the same */
    const int k = atomic_load(&known);
    if (k) return (lg_isa)(k - 1);
    lg_isa isa = best_isa();
    const char *cap = getenv("LG_CPU_ISA");
    for (int i = 0; cap && i <= LG_ISA_AMX; i++)
        if (!strcmp(cap, isa_names[i]) && i < (int)isa) isa = (lg_isa)i;
    atomic_store(&known, 1 + (int)isa);
    return isa;
}

void lg_cpu_isa_thread(lg_isa isa) {
#if defined(__x86_64__)
    if (isa == LG_ISA_AMX) lg_gemm_tiles_amx();
#endif
}

/* ---- formats and packing ---- */
const lg_gemm_format *lg_gemm_format_of(lg_dtype t) {
    static const lg_gemm_format table[LG_DTYPE_COUNT] = {
        [LG_DTYPE_F32] = { LG_CODE_F32, LG_SCALE_NONE, -1, 2048, 0, 0, 0 },
        [LG_DTYPE_F16] = { LG_CODE_F16, LG_SCALE_NONE, -1, 1024, 0, 0, 0 },
        [LG_DTYPE_BF16] = { LG_CODE_BF16, LG_SCALE_NONE, -1, 1024, 0, 0, 0 },
        [LG_DTYPE_Q8_0] = { LG_CODE_8, LG_SCALE_D, 7, 512, 1, 0, 32 },
        [LG_DTYPE_Q4_0] = { LG_CODE_4, LG_SCALE_D, 3, 256, 1, 0, 32 },
        [LG_DTYPE_Q4_1] = { LG_CODE_4, LG_SCALE_DM, -1, 256, 1, 0, 64 },
        [LG_DTYPE_Q5_0] = { LG_CODE_5, LG_SCALE_D, 4, 320, 1, 0, 32 },
        [LG_DTYPE_Q5_1] = { LG_CODE_5, LG_SCALE_DM, -1, 320, 1, 0, 64 },
        [LG_DTYPE_Q4_K] = { LG_CODE_4, LG_SCALE_KSM, -1, 256, 8, 64, 32 },
        [LG_DTYPE_Q5_K] = { LG_CODE_5, LG_SCALE_KSM, -1, 320, 8, 64, 32 },
        [LG_DTYPE_Q6_K] = { LG_CODE_6, LG_SCALE_K6, 5, 384, 8, 32, 32 },
    };
    return (unsigned)t < LG_DTYPE_COUNT && table[t].code_bytes ? &table[t] : NULL;
}

/* One block of 32 of one row, taken out of the file's form: unsigned codes and the bytes of its scales. */
typedef struct row_part {
    uint8_t q[LG_GEMM_KB];
    uint8_t d[2], m[2]; /* f16 */
    uint8_t sc[2];      /* KSM: sc, mn; K6: two halves */
} row_part;

static void take_nibbles(uint8_t q[LG_GEMM_KB], const uint8_t *s) {
    for (int i = 0; i < 16; i++) q[i] = s[i] & 15, q[i + 16] = s[i] >> 4;
}

/* Six-bit scale and minimum j of the 12 bytes that Q4_K and Q5_K share. */
static void take_k_scales(uint8_t out[2], const uint8_t *s, int j) {
    if (j < 4) {
        out[0] = s[j] & 63;
        out[1] = s[j + 4] & 63;
    } else {
        out[0] = (uint8_t)((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        out[1] = (uint8_t)((s[j + 4] >> 4) | (s[j] >> 6) << 4);
    }
}

static void take_part(lg_dtype t, const uint8_t *row, int64_t b, row_part *o) {
    const int j = (int)(b % 8);
    const uint8_t *s;
    switch (t) {
    case LG_DTYPE_Q8_0:
        s = row + b * 34;
        memcpy(o->d, s, 2);
        for (int i = 0; i < LG_GEMM_KB; i++) o->q[i] = s[2 + i] ^ 0x80;
        break;
    case LG_DTYPE_Q4_0:
        s = row + b * 18;
        memcpy(o->d, s, 2);
        take_nibbles(o->q, s + 2);
        break;
    case LG_DTYPE_Q4_1:
        s = row + b * 20;
        memcpy(o->d, s, 2);
        memcpy(o->m, s + 2, 2);
        take_nibbles(o->q, s + 4);
        break;
    case LG_DTYPE_Q5_0:
    case LG_DTYPE_Q5_1: {
        const int head = t == LG_DTYPE_Q5_0 ? 2 : 4;
        s = row + b * (head + 20);
        memcpy(o->d, s, 2);
        if (head == 4) memcpy(o->m, s + 2, 2);
        take_nibbles(o->q, s + head + 4);
        for (int i = 0; i < LG_GEMM_KB; i++) o->q[i] |= (uint8_t)((s[head + i / 8] >> i % 8 & 1) << 4);
        break;
    }
    case LG_DTYPE_Q4_K:
    case LG_DTYPE_Q5_K: {
        const bool five = t == LG_DTYPE_Q5_K;
        s = row + b / 8 * (five ? 176 : 144);
        memcpy(o->d, s, 2);
        memcpy(o->m, s + 2, 2);
        take_k_scales(o->sc, s + 4, j);
        const uint8_t *low = s + (five ? 48 : 16) + 32 * (j / 2);
        for (int i = 0; i < LG_GEMM_KB; i++) {
            o->q[i] = j % 2 ? low[i] >> 4 : low[i] & 15;
            if (five) o->q[i] |= (uint8_t)((s[16 + i] >> j & 1) << 4);
        }
        break;
    }
    case LG_DTYPE_Q6_K: {
        s = row + b / 8 * 210;
        const int quarter = j % 4; /* of a half of 128 */
        const uint8_t *low = s + 64 * (j / 4) + 32 * (quarter % 2), *high = s + 128 + 32 * (j / 4);
        for (int i = 0; i < LG_GEMM_KB; i++)
            o->q[i] = (uint8_t)((quarter < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> 2 * quarter & 3) << 4);
        memcpy(o->sc, s + 192 + 2 * j, 2);
        memcpy(o->d, s + 208, 2);
        break;
    }
    default: break;
    }
}

static void put_part(const lg_gemm_format *f, uint8_t *panel, int64_t nb, int64_t b, int r, const row_part *p) {
    uint8_t *c = panel + b * f->code_bytes;
    if (f->code == LG_CODE_8) {
        for (int g = 0; g < 8; g++) memcpy(c + 64 * g + 4 * r, p->q + 4 * g, 4);
    } else {
        for (int i = 0; i < 16; i++)
            c[64 * (i / 4) + 4 * r + i % 4] = (uint8_t)((p->q[i] & 15) | (p->q[i + 16] & 15) << 4);
        for (int plane = 4; plane < (f->code == LG_CODE_6 ? 6 : f->code == LG_CODE_5 ? 5 : 4); plane++) {
            uint8_t *bits = c + 256 + 64 * (plane - 4);
            for (int k = 0; k < LG_GEMM_KB; k++) {
                const int bit = 4 * r + k % 4;
                bits[8 * (k / 4) + bit / 8] |= (uint8_t)((p->q[k] >> plane & 1) << bit % 8);
            }
        }
    }
    int64_t group;
    uint8_t *s = panel + nb * f->code_bytes, *own = s + lg_gemm_scale_at(f, b, &group);
    s += group;
    memcpy(s + 2 * r, p->d, 2);
    if (f->scale == LG_SCALE_DM || f->scale == LG_SCALE_KSM) memcpy(s + 32 + 2 * r, p->m, 2);
    if (f->scale == LG_SCALE_KSM || f->scale == LG_SCALE_K6) own[r] = p->sc[0], own[16 + r] = p->sc[1];
}

static void pack_float_row(const lg_gemm_format *f, uint8_t *panel, int r, const uint8_t *row, int64_t n_in) {
    for (int64_t k = 0; k < n_in; k++) {
        if (f->code == LG_CODE_F32) memcpy(panel + 4 * (k * LG_GEMM_NR + r), row + 4 * k, 4);
        else {
            const int64_t at = f->code == LG_CODE_BF16 ? 2 * ((k / 2) * LG_GEMM_NR + r) + k % 2 : k * LG_GEMM_NR + r;
            memcpy(panel + 2 * at, row + 2 * k, 2);
        }
    }
}

lg_status lg_gemm_pack(const lg_gemm *g, lg_weight *w, lg_error *err) {
    (void)g;
    const lg_gemm_format *f = lg_gemm_format_of(w->dtype);
    if (!f) return lg_base_fail(err, LG_ERR_UNSUPPORTED, -1, "weights of dtype %d have no product", (int)w->dtype);
    const int64_t row_bytes = lg_base_row_bytes(w->dtype, w->n_in);
    if (w->n_in < 1 || w->n_out < 1 || row_bytes < 0)
        return lg_base_fail(err, LG_ERR_FORMAT, -1, "weight [%lld, %lld] is no whole number of blocks", (long long)w->n_out, (long long)w->n_in);
    const int64_t nb = lg_gemm_blocks(w->n_in), panels = lg_gemm_panels(w->n_out);
    int64_t bytes = 0, panel_bytes = 0;
    if (nb < INT64_MAX / 8192) panel_bytes = lg_gemm_panel_bytes(f, nb);
    uint8_t *packed = panel_bytes && lg_base_mul(panels, panel_bytes, &bytes) ? lg_base_alloc(bytes) : NULL;
    if (!packed) return lg_base_fail(err, LG_ERR_NOMEM, -1, "out of memory for a packed weight [%lld, %lld]", (long long)w->n_out, (long long)w->n_in);
    for (int64_t o = 0; o < w->n_out; o++) {
        uint8_t *panel = packed + o / LG_GEMM_NR * panel_bytes;
        const uint8_t *row = (const uint8_t *)w->data + o * row_bytes;
        const int r = (int)(o % LG_GEMM_NR);
        if (f->scale == LG_SCALE_NONE) pack_float_row(f, panel, r, row, w->n_in);
        for (int64_t b = 0; b < nb && f->scale != LG_SCALE_NONE; b++) {
            row_part part = { .q = { 0 } };
            take_part(w->dtype, row, b, &part);
            put_part(f, panel, nb, b, r, &part);
        }
    }
    w->packed = packed;
    w->packed_bytes = bytes;
    return LG_OK;
}

void lg_gemm_unpack(lg_weight *w) {
    lg_base_free(w->packed);
    w->packed = NULL;
    w->packed_bytes = 0;
}

void lg_gemm_embed_row(float *dst, const lg_weight *w, int64_t id) {
    if (!w->packed) {
        lg_base_dequant(w->dtype, (const uint8_t *)w->data + id * lg_base_row_bytes(w->dtype, w->n_in), dst, w->n_in);
        return;
    }
    const lg_gemm_format *f = lg_gemm_format_of(w->dtype);
    const int64_t nb = lg_gemm_blocks(w->n_in);
    const uint8_t *panel = (const uint8_t *)w->packed + id / LG_GEMM_NR * lg_gemm_panel_bytes(f, nb);
    for (int64_t b = 0; b < nb; b++) {
        float block[LG_GEMM_KB][LG_GEMM_NR];
        const int64_t n = w->n_in - b * LG_GEMM_KB < LG_GEMM_KB ? w->n_in - b * LG_GEMM_KB : LG_GEMM_KB;
        lg_gemm_block_f32(f, panel, nb, b, block);
        for (int64_t k = 0; k < n; k++) dst[b * LG_GEMM_KB + k] = block[k][id % LG_GEMM_NR];
    }
}

/* ---- inputs ---- */
lg_gemm_form lg_gemm_form_of(const lg_gemm *g, int64_t n_tok) {
    if (g->compute == LG_COMPUTE_F32 || g->isa == LG_ISA_SCALAR) return LG_FORM_F32;
    return g->isa == LG_ISA_AMX && n_tok >= AMX_MIN_TOK ? LG_FORM_BF16 : LG_FORM_Q8;
}

static const lg_gemm_rows_fn *rows_of(const lg_gemm *g) {
#if defined(__x86_64__)
    if (g->isa >= LG_ISA_AVX512) return &lg_gemm_rows_avx512;
    if (g->isa == LG_ISA_AVX2) return &lg_gemm_rows_avx2;
#else
    (void)g;
#endif
    return &lg_gemm_rows_scalar;
}

static int64_t row_bytes_of(lg_gemm_form form, int64_t nb) {
    return form == LG_FORM_Q8 ? lg_gemm_q8_row(nb) : nb * LG_GEMM_KB * 4;
}

int64_t lg_gemm_input_bytes(const lg_gemm *g, int64_t n_tok, int64_t n_in) {
    const lg_gemm_form form = lg_gemm_form_of(g, n_tok);
    const int64_t nb = lg_gemm_blocks(n_in);
    if (form == LG_FORM_BF16) return (n_tok + 15) / 16 * nb * 1024;
    return n_tok * row_bytes_of(form, nb);
}

int64_t lg_gemm_input_at(const lg_gemm *g, int64_t n_tok, int64_t n_in, int64_t t0) {
    const lg_gemm_form form = lg_gemm_form_of(g, n_tok);
    const int64_t nb = lg_gemm_blocks(n_in);
    return form == LG_FORM_BF16 ? t0 / 16 * nb * 1024 : t0 * row_bytes_of(form, nb);
}

static float norm_scale(const lg_gemm_rows_fn *rows, const float *x, const float *norm, float eps, int64_t n_in) {
    return norm ? 1.0f / sqrtf(rows->mean_square(x, n_in) + eps) : 1.0f;
}

void lg_gemm_input(const lg_gemm *g, void *in, const float *x, int64_t ldx, const float *norm, float eps,
                   int64_t n_tok, int64_t n_in, int ith, int nth) {
    const lg_gemm_form form = lg_gemm_form_of(g, n_tok);
    const lg_gemm_rows_fn *rows = rows_of(g);
    const int64_t nb = lg_gemm_blocks(n_in);
    uint8_t *dst = in;
    if (form == LG_FORM_BF16) {
        const int64_t padded = (n_tok + 15) / 16 * 16, first = padded * ith / nth, last = padded * (ith + 1) / nth;
        for (int64_t t = first; t < last; t++) {
            uint8_t *row = dst + t / 16 * nb * 1024 + t % 16 * 64;
            if (t < n_tok) rows->bf16(row, x + t * ldx, norm_scale(rows, x + t * ldx, norm, eps, n_in), norm, n_in);
            else
                for (int64_t b = 0; b < nb; b++) memset(row + b * 1024, 0, 64);
        }
        return;
    }
    /* Few rows: every thread takes its blocks of each row and works out the norm for itself; many: whole rows. */
    const bool by_row = n_tok >= 8 * nth;
    const int64_t t0 = by_row ? n_tok * ith / nth : 0, t1 = by_row ? n_tok * (ith + 1) / nth : n_tok;
    const int64_t b0 = by_row ? 0 : nb * ith / nth, b1 = by_row ? nb : nb * (ith + 1) / nth;
    for (int64_t t = t0; t < t1; t++) {
        const float *src = x + t * ldx, scale = norm_scale(rows, src, norm, eps, n_in);
        uint8_t *row = dst + t * row_bytes_of(form, nb);
        if (form == LG_FORM_Q8) rows->q8(row, src, scale, norm, b0, b1, n_in);
        else rows->f32((float *)(void *)row, src, scale, norm, b0, b1, n_in);
    }
}

/* ---- product ---- */
static void share_panels(int64_t n_out, int ith, int nth, int64_t *p0, int64_t *p1) {
    const int64_t panels = lg_gemm_panels(n_out);
    *p0 = panels * ith / nth;
    *p1 = panels * (ith + 1) / nth;
}

void lg_gemm_rows(int64_t n_out, int ith, int nth, int64_t *first, int64_t *last) {
    int64_t p0, p1;
    share_panels(n_out, ith, nth, &p0, &p1);
    *first = p0 * LG_GEMM_NR < n_out ? p0 * LG_GEMM_NR : n_out;
    *last = p1 * LG_GEMM_NR < n_out ? p1 * LG_GEMM_NR : n_out;
}

int64_t lg_gemm_scratch_bytes(const lg_gemm *g, int64_t n_tok, int64_t n_in) {
    /* scalar, AVX2: a panel of f32; AVX-512: three panels of 256 inputs; AMX: its panels of bf16 and a tile of sums */
    const int64_t column = lg_gemm_blocks(n_in) * LG_GEMM_KB * LG_GEMM_NR;
    if (lg_gemm_form_of(g, n_tok) == LG_FORM_BF16) return LG_GEMM_AMX_PANELS * column * 2 + 1024;
    return g->isa >= LG_ISA_AVX512 ? 3 * LG_GEMM_NR * 256 * 4 : column * 4;
}

void lg_gemm_run_panels(const lg_gemm *g, float *y, int64_t ldy, bool add, const void *in, const lg_weight *w,
                        int64_t n_tok, void *scratch, int64_t p0, int64_t p1) {
    const lg_gemm_form form = lg_gemm_form_of(g, n_tok);
    lg_gemm_job j = { .f = lg_gemm_format_of(w->dtype), .packed = w->packed, .nb = lg_gemm_blocks(w->n_in), .n_out = w->n_out,
                      .p0 = p0, .p1 = p1, .y = y, .ldy = ldy, .add = add, .in = in, .n_tok = n_tok, .scratch = scratch };
    j.panel_bytes = lg_gemm_panel_bytes(j.f, j.nb);
    j.row_bytes = row_bytes_of(form, j.nb);
    const bool q8 = form == LG_FORM_Q8 && j.f->scale != LG_SCALE_NONE;
#if defined(__x86_64__)
    if (form == LG_FORM_BF16) lg_gemm_bf16_amx(&j);
    else if (g->isa >= LG_ISA_AVX512 && q8) lg_gemm_q8_avx512(&j);
    else if (g->isa >= LG_ISA_AVX512) lg_gemm_float_avx512(&j);
    else if (g->isa == LG_ISA_AVX2 && q8) lg_gemm_q8_avx2(&j);
    else if (g->isa == LG_ISA_AVX2) lg_gemm_float_avx2(&j);
    else
#endif
        lg_gemm_float_scalar(&j);
    (void)q8;
}

void lg_gemm_run(const lg_gemm *g, float *y, int64_t ldy, bool add, const void *in, const lg_weight *w,
                 int64_t n_tok, void *scratch, int ith, int nth) {
    int64_t p0, p1;
    share_panels(w->n_out, ith, nth, &p0, &p1);
    lg_gemm_run_panels(g, y, ldy, add, in, w, n_tok, scratch, p0, p1);
}

void lg_gemm_silu_mul(const lg_gemm *g, float *h, const float *gate, const float *up, int64_t n) {
    rows_of(g)->silu_mul(h, gate, up, n);
}
