/* The kernels of attend_kernels.h written once for vectors of VW floats. A file of one instruction set defines
 *   VW, GH (query heads per pass over the rows), NV (vectors of head_dim per pass), MR, MC (rows, vectors of the flash product)
 *   vf, vfu (same, unaligned), vi; v_f16, v_bf16, v_i8 (VW elements to f32), s_f16, v_max (keeps a NaN of its second
 *   argument), v_hmax, v_hsum, v_hsum4 (sums of four vectors), v_fma (*a += x y)
 * and includes this. head_dim must be a multiple of VW. */
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE vf v_load(const float *p) { return (vf)*(const vfu *)p; }
INLINE void v_store(float *p, vf x) { *(vfu *)p = (vfu)x; }
INLINE vf v_set(float x) { return x - (vf){ 0 }; }

/* VW elements of a cache row from element c on. */
INLINE vf v_row(lg_dtype t, const uint8_t *row, int64_t c, int64_t d) {
    if (t == LG_DTYPE_F16) return v_f16(row + 2 * c);
    if (t == LG_DTYPE_BF16) return v_bf16(row + 2 * c);
    if (t == LG_DTYPE_F32) return v_load((const float *)(const void *)(row + 4 * c));
    uint16_t s;
    memcpy(&s, row + d + 2 * (c / 32), sizeof s);
    return v_i8(row + c) * s_f16(s);
}

/* 2^x for x <= 0 to 1e-7 relative; exactly 1 at 0, 0 below -127. */
INLINE vf v_exp2(vf x) {
    x = v_max(v_set(-127.0f), x);
    const vi n = __builtin_convertvector(x, vi); /* towards zero: f in (-1, 0] */
    const vf f = x - __builtin_convertvector(n, vf);
    vf p = f * 1.09023149e-4f + 1.27474804e-3f;
    p = p * f + 9.57917937e-3f;
    p = p * f + 5.54907569e-2f;
    p = p * f + 2.40224368e-1f;
    p = p * f + 6.93147064e-1f;
    p = p * f + 1.0f;
    return p * (vf)((n + 127) << 23);
}
INLINE float s_exp2(float x) { return v_exp2(v_set(x))[0]; }

/* Bytes of a cache row; a constant where type and size are. */
INLINE int64_t row_bytes_of(lg_dtype t, int64_t d) {
    return t == LG_DTYPE_F32 ? 4 * d : t == LG_DTYPE_KV8 ? d + 2 * ((d + 31) / 32) : 2 * d;
}
INLINE void prefetch_row(const uint8_t *p, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(p + b, 0, LG_PREFETCH);
    if (bytes % 64) __builtin_prefetch(p + bytes - 1, 0, LG_PREFETCH);
}

/* ---- decode ------------------------------------------------------------------------------------------ */

/* s[j][i] = q_j . k_i for gh heads, rows in fours. Rows of `ahead` (padded as off is) are prefetched meanwhile. */
INLINE void tile_scores(float (*restrict s)[LG_TILE], const float *restrict q, const lg_tile *t, lg_dtype dt, int gh,
                        int64_t d, const uint8_t *ahead, const int64_t *ahead_off, int64_t ahead_n) {
    for (int64_t i = 0; i < t->n; i += 4) {
        const uint8_t *r[4];
        vf a[GH][4] = { 0 };
        for (int e = 0; e < 4; e++) r[e] = t->k + t->off[i + e];
        if (i < ahead_n)
            for (int e = 0; e < 4; e++) prefetch_row(ahead + ahead_off[i + e], row_bytes_of(dt, d));
        for (int64_t c = 0; c < d; c += VW)
            for (int e = 0; e < 4; e++) {
                const vf k = v_row(dt, r[e], c, d);
                for (int j = 0; j < gh; j++) v_fma(&a[j][e], v_load(q + j * d + c), k);
            }
        for (int j = 0; j < gh; j++) v_hsum4(s[j] + i, a[j][0], a[j][1], a[j][2], a[j][3]);
    }
}

/* acc[j] += sum_i p[j][i] v_i over nv vectors of head_dim from c on. */
INLINE void tile_values_part(float *restrict acc, const float (*restrict p)[LG_TILE], const lg_tile *t, lg_dtype dt, int gh,
                             int nv, int64_t c, int64_t d, bool first, const int64_t *ahead_off, int64_t ahead_n) {
    vf a[GH][NV];
    for (int j = 0; j < gh; j++)
        for (int e = 0; e < nv; e++) a[j][e] = v_load(acc + j * d + c + e * VW);
    for (int64_t i = 0; i < t->n; i++) {
        const uint8_t *row = t->v + t->off[i];
        vf w[GH];
        if (first && i < ahead_n) prefetch_row(t->k + ahead_off[i], row_bytes_of(dt, d));
        for (int j = 0; j < gh; j++) w[j] = v_set(p[j][i]);
        for (int e = 0; e < nv; e++) {
            const vf x = v_row(dt, row, c + e * VW, d);
            for (int j = 0; j < gh; j++) v_fma(&a[j][e], w[j], x);
        }
    }
    for (int j = 0; j < gh; j++)
        for (int e = 0; e < nv; e++) v_store(acc + j * d + c + e * VW, a[j][e]);
}

INLINE void tile_values(float *acc, const float (*p)[LG_TILE], const lg_tile *t, lg_dtype dt, int gh, int64_t d,
                        const int64_t *ahead_off, int64_t ahead_n) {
    int64_t c = 0;
    for (; c + NV * VW <= d; c += NV * VW) tile_values_part(acc, p, t, dt, gh, NV, c, d, c == 0, ahead_off, ahead_n);
    for (; c < d; c += VW) tile_values_part(acc, p, t, dt, gh, 1, c, d, c == 0, ahead_off, ahead_n);
}

/* Turns the n scores of one head into weights and rescales what it has so far. */
INLINE void tile_softmax(float *restrict s, int64_t n, float scale2, float *max, float *sum, float *restrict acc, int64_t d) {
    const int64_t full = (n + VW - 1) / VW * VW;
    vf m = v_set(-INFINITY), total = v_set(0);
    for (int64_t i = n; i < full; i++) s[i] = -INFINITY;
    for (int64_t i = 0; i < full; i += VW) m = v_max(m, v_load(s + i));
    const float top = v_hmax(m) * scale2, new_max = top > *max || top != top ? top : *max;
    const float keep = s_exp2(*max - new_max);
    for (int64_t i = 0; i < full; i += VW) {
        const vf p = v_exp2(v_load(s + i) * scale2 - new_max);
        v_store(s + i, p);
        total += p;
    }
    *sum = *sum * keep + v_hsum(total);
    if (new_max != *max)
        for (int64_t c = 0; c < d; c += VW) v_store(acc + c, v_load(acc + c) * keep);
    *max = new_max;
}

INLINE void tile_heads(const lg_tile *t, lg_dtype dt, int gh, int64_t d, int32_t j0, bool first) {
    _Alignas(64) float s[GH][LG_TILE];
    tile_scores(s, t->q + j0 * d, t, dt, gh, d, t->v, t->off, first ? t->n : 0);
    if (t->score) {
        for (int64_t i = 0; i < t->n; i++) {
            float x = first ? 0 : t->score[i];
            for (int j = 0; j < gh; j++) x += s[j][i];
            t->score[i] = x;
        }
    }
    for (int j = 0; j < gh; j++)
        tile_softmax(s[j], t->n, t->scale2, t->max + j0 + j, t->sum + j0 + j, t->acc + (j0 + j) * d, d);
    tile_values(t->acc + j0 * d, (const float (*)[LG_TILE])s, t, dt, gh, d, t->next, first ? t->next_n : 0);
}

INLINE void tile_dim(const lg_tile *t, lg_dtype dt, int64_t d) {
    for (int32_t j0 = 0, take; j0 < t->group; j0 += take) {
        const int32_t left = t->group - j0;
        take = left < GH ? left : GH == 3 && left == 4 ? 2 : GH; /* 2 + 2 rather than 3 + 1 */
        if (take == GH) tile_heads(t, dt, GH, d, j0, j0 == 0);
        else if (take == 1) tile_heads(t, dt, 1, d, j0, j0 == 0);
#if GH > 2
        else if (take == 2) tile_heads(t, dt, 2, d, j0, j0 == 0);
#endif
#if GH > 3
        else tile_heads(t, dt, 3, d, j0, j0 == 0);
#endif
    }
    if (t->score && t->group > 1) {
        const float r = 1.0f / (float)t->group;
        for (int64_t i = 0; i < t->n; i++) t->score[i] *= r;
    }
}

INLINE void tile_dtype(const lg_tile *t, lg_dtype dt) {
    if (t->head_dim == 64) tile_dim(t, dt, 64);
    else if (t->head_dim == 128) tile_dim(t, dt, 128);
    else tile_dim(t, dt, t->head_dim);
}

static void tile_run(const lg_tile *t) {
    switch (t->dtype) {
    case LG_DTYPE_F16: tile_dtype(t, LG_DTYPE_F16); break;
    case LG_DTYPE_BF16: tile_dtype(t, LG_DTYPE_BF16); break;
    case LG_DTYPE_F32: tile_dtype(t, LG_DTYPE_F32); break;
    default: tile_dtype(t, LG_DTYPE_KV8); break;
    }
}

/* ---- prefill, f32 ------------------------------------------------------------------------------------ */
enum { LANES = LG_FLASH_LANES, LV = LANES / VW };

/* Per tile of lanes: Q^T and O^T [head_dim][LANES], then max, sum [LANES]. */
typedef struct flash_state { float *q, *o, *max, *sum; } flash_state;
static int64_t state_floats(int32_t d) { return 2 * (int64_t)d * LANES + 2 * LANES; }
static flash_state state_of(const lg_flash *f, float *base, int64_t tile) {
    float *p = base + tile * state_floats(f->head_dim);
    const int64_t n = (int64_t)f->head_dim * LANES;
    return (flash_state){ .q = p, .o = p + n, .max = p + 2 * n, .sum = p + 2 * n + LANES };
}

static int64_t flash_bytes_run(int32_t d) {
    return (LG_FLASH_GROUP * state_floats(d) + 2 * LG_PAGE * (int64_t)d + LG_PAGE * LANES) * (int64_t)sizeof(float);
}

/* Lanes beyond the last repeat it. */
INLINE int64_t lane_of(const lg_flash *f, int64_t tile, int64_t l) {
    const int64_t j = tile * LANES + l;
    return f->lane0 + (j < f->n_lane ? j : f->n_lane - 1);
}

static void flash_begin(const lg_flash *f, const flash_state *s, int64_t tile) {
    for (int64_t l = 0; l < LANES; l++) {
        const int64_t j = lane_of(f, tile, l);
        const float *q = f->q + j / f->group * f->ld + j % f->group * f->head_dim;
        for (int64_t c = 0; c < f->head_dim; c++) s->q[c * LANES + l] = q[c] * f->scale2;
        s->max[l] = -INFINITY;
        s->sum[l] = 0;
    }
    memset(s->o, 0, (size_t)f->head_dim * LANES * sizeof(float));
}

/* What an observation needs of a lane; lanes that fill up the last tile count for nothing. */
INLINE void leave_peak(float *peak, int64_t lane, float max, float scale) {
    float *p = peak + lane / LANES * 2 * LANES + lane % LANES;
    p[0] = max;
    p[LANES] = scale;
}
static void flash_end(const lg_flash *f, const flash_state *s, int64_t tile) {
    for (int64_t l = 0; l < LANES && tile * LANES + l < f->n_lane; l++) {
        const int64_t j = lane_of(f, tile, l);
        float *out = f->out + j / f->group * f->ld + j % f->group * f->head_dim;
        const float r = 1.0f / s->sum[l];
        for (int64_t c = 0; c < f->head_dim; c++) out[c] = s->o[c * LANES + l] * r;
        if (!f->peak || j < f->peak0 || j >= f->peak1) continue;
        leave_peak(f->peak, j - f->peak0, s->max[l], r);
        for (int64_t p = j + 1 - f->peak0; j + 1 == f->peak1 && p % LANES; p++) leave_peak(f->peak, p, s->max[l], 0);
    }
}

/* Rows of one page of this head to f32, n of them; the rest zero. */
INLINE void load_rows(float *restrict dst, const uint8_t *src, int64_t n, int64_t row_bytes, lg_dtype dt, int64_t d) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < d; c += VW) v_store(dst + i * d + c, v_row(dt, src + i * row_bytes, c, d));
    memset(dst + n * d, 0, (size_t)((LG_PAGE - n) * d) * sizeof(float));
}
static void load_page(float *dst, const uint8_t *src, int64_t n, int64_t row_bytes, lg_dtype dt, int64_t d) {
    switch (dt) {
    case LG_DTYPE_F16: load_rows(dst, src, n, row_bytes, LG_DTYPE_F16, d); break;
    case LG_DTYPE_BF16: load_rows(dst, src, n, row_bytes, LG_DTYPE_BF16, d); break;
    case LG_DTYPE_F32: load_rows(dst, src, n, row_bytes, LG_DTYPE_F32, d); break;
    default: load_rows(dst, src, n, row_bytes, LG_DTYPE_KV8, d); break;
    }
}

/* dst[r][LANES] (+)= sum_j a[r*ra + j*rj] * b[j][LANES] for r < rows, a multiple of MR; MR x MC vectors at a time. */
INLINE void outer(float *restrict dst, const float *restrict a, int64_t ra, int64_t rj, const float *restrict b, int64_t rows,
                  int64_t n, bool add) {
    for (int64_t r = 0; r < rows; r += MR)
        for (int64_t l = 0; l < LANES; l += MC * VW) {
            vf x[MR][MC] = { 0 };
            for (int i = 0; i < MR && add; i++)
                for (int e = 0; e < MC; e++) x[i][e] = v_load(dst + (r + i) * LANES + l + e * VW);
            for (int64_t j = 0; j < n; j++)
                for (int i = 0; i < MR; i++) {
                    const vf y = v_set(a[(r + i) * ra + j * rj]);
                    for (int e = 0; e < MC; e++) v_fma(&x[i][e], y, v_load(b + j * LANES + l + e * VW));
                }
            for (int i = 0; i < MR; i++)
                for (int e = 0; e < MC; e++) v_store(dst + (r + i) * LANES + l + e * VW, x[i][e]);
        }
}

/* One page against one tile: first is the page's first position, n its rows. */
static void flash_step(const lg_flash *f, const flash_state *s, int64_t tile, int64_t first, int64_t n, const float *k,
                       const float *v, float *w) {
    const int64_t d = f->head_dim, rows = (n + MR - 1) / MR * MR;
    outer(w, k, d, 1, s->q, rows, d, false);
    if (first + rows - 1 > f->idx[lane_of(f, tile, 0) / f->group]) {
        for (int64_t l = 0; l < LANES; l++) {
            const int64_t last = f->idx[lane_of(f, tile, l) / f->group];
            for (int64_t i = last + 1 > first ? last + 1 - first : 0; i < rows; i++) w[i * LANES + l] = -INFINITY;
        }
    }
    for (int64_t l = 0; l < LANES; l += VW) {
        const vf old = v_load(s->max + l);
        vf m = old, total = v_set(0);
        for (int64_t i = 0; i < rows; i++) m = v_max(m, v_load(w + i * LANES + l));
        const vf keep = v_exp2(old - m);
        for (int64_t i = 0; i < rows; i++) {
            const vf p = v_exp2(v_load(w + i * LANES + l) - m);
            v_store(w + i * LANES + l, p);
            total += p;
        }
        v_store(s->max + l, m);
        v_store(s->sum + l, v_load(s->sum + l) * keep + total);
        bool moved = false;
        for (int e = 0; e < VW; e++) moved = moved || keep[e] != 1.0f;
        for (int64_t c = 0; moved && c < d; c++) v_store(s->o + c * LANES + l, v_load(s->o + c * LANES + l) * keep);
    }
    outer(s->o, v, 1, d, w, d, n, true);
}

static void flash_run(const lg_flash *f) {
    const int64_t d = f->head_dim, tiles = (f->n_lane + LANES - 1) / LANES;
    float *k = (float *)f->scratch + LG_FLASH_GROUP * state_floats(f->head_dim), *v = k + LG_PAGE * d, *w = v + LG_PAGE * d;
    const int64_t len = f->idx[lane_of(f, tiles - 1, LANES - 1) / f->group] + 1;
    for (int64_t t = 0; t < tiles; t++) {
        const flash_state s = state_of(f, f->scratch, t);
        flash_begin(f, &s, t);
    }
    for (int64_t first = 0; first < len; first += LG_PAGE) {
        const int64_t n = len - first < LG_PAGE ? len - first : LG_PAGE;
        const int64_t at = ((int64_t)f->page[first / LG_PAGE] * f->n_head_kv + f->head) * LG_PAGE * f->row_bytes;
        load_page(k, f->k + at, n, f->row_bytes, f->dtype, d);
        load_page(v, f->v + at, n, f->row_bytes, f->dtype, d);
        for (int64_t t = 0; t < tiles; t++) {
            const flash_state s = state_of(f, f->scratch, t);
            if (f->idx[lane_of(f, t, LANES - 1) / f->group] >= first) flash_step(f, &s, t, first, n, k, v, w);
        }
    }
    for (int64_t t = 0; t < tiles; t++) {
        const flash_state s = state_of(f, f->scratch, t);
        flash_end(f, &s, t);
    }
}

/* ---- attention mass ---- */
static const float *page_of(const lg_flash *f, int64_t page, int64_t len, float *k, int64_t *n) {
    const int64_t first = page * LG_PAGE;
    *n = len - first < LG_PAGE ? len - first : LG_PAGE;
    load_page(k, f->k + ((int64_t)f->page[page] * f->n_head_kv + f->head) * LG_PAGE * f->row_bytes, *n, f->row_bytes, f->dtype, f->head_dim);
    return k;
}
/* Scores of a page's rows for a tile of lanes, -INFINITY where a lane does not see the row. Returns the rows, a multiple of MR. */
static int64_t mass_scores(const lg_flash *f, const flash_state *s, int64_t tile, int64_t first, int64_t n, const float *k, float *w) {
    const int64_t rows = (n + MR - 1) / MR * MR;
    outer(w, k, f->head_dim, 1, s->q, rows, f->head_dim, false);
    if (first + rows - 1 > f->idx[lane_of(f, tile, 0) / f->group])
        for (int64_t l = 0; l < LANES; l++) {
            const int64_t last = f->idx[lane_of(f, tile, l) / f->group];
            for (int64_t i = last + 1 > first ? last + 1 - first : 0; i < rows; i++) w[i * LANES + l] = -INFINITY;
        }
    return rows;
}

static void peak_run(const lg_flash *f, float *peak) {
    const flash_state s = state_of(f, f->scratch, 0);
    float *k = (float *)f->scratch + LG_FLASH_GROUP * state_floats(f->head_dim), *w = k + 2 * LG_PAGE * f->head_dim;
    const int64_t len = f->idx[lane_of(f, 0, LANES - 1) / f->group] + 1;
    flash_begin(f, &s, 0);
    for (int64_t page = 0, n; page * LG_PAGE < len; page++) {
        page_of(f, page, len, k, &n);
        const int64_t rows = mass_scores(f, &s, 0, page * LG_PAGE, n, k, w);
        for (int64_t l = 0; l < LANES; l += VW) {
            const vf old = v_load(s.max + l);
            vf m = old, total = v_set(0);
            for (int64_t i = 0; i < rows; i++) m = v_max(m, v_load(w + i * LANES + l));
            for (int64_t i = 0; i < rows; i++) total += v_exp2(v_load(w + i * LANES + l) - m);
            v_store(s.sum + l, v_load(s.sum + l) * v_exp2(old - m) + total);
            v_store(s.max + l, m);
        }
    }
    for (int64_t l = 0; l < LANES; l++) leave_peak(peak, l, s.max[l], l < f->n_lane ? 1.0f / s.sum[l] : 0.0f);
}

static void mass_run(const lg_flash *f, const float *peak, int64_t page, int64_t end, float weight, float *mass) {
    const int64_t tiles = (f->n_lane + LANES - 1) / LANES, len = f->idx[lane_of(f, tiles - 1, LANES - 1) / f->group] + 1;
    float *k = (float *)f->scratch + LG_FLASH_GROUP * state_floats(f->head_dim), *w = k + 2 * LG_PAGE * f->head_dim;
    for (int64_t t0 = 0; t0 < tiles; t0 += LG_FLASH_GROUP) {
        const int64_t t1 = tiles < t0 + LG_FLASH_GROUP ? tiles : t0 + LG_FLASH_GROUP;
        for (int64_t t = t0; t < t1; t++) {
            const flash_state s = state_of(f, f->scratch, t - t0);
            flash_begin(f, &s, t);
        }
        for (int64_t p = page, n; p < end && p * LG_PAGE < len; p++) {
            page_of(f, p, len, k, &n);
            for (int64_t t = t0; t < t1; t++) {
                const flash_state s = state_of(f, f->scratch, t - t0);
                const float *max = peak + t * 2 * LANES, *scale = max + LANES;
                mass_scores(f, &s, t, p * LG_PAGE, n, k, w);
                for (int64_t i = 0; i < n; i++) {
                    vf sum = v_set(0);
                    for (int64_t l = 0; l < LANES; l += VW) sum += v_exp2(v_load(w + i * LANES + l) - v_load(max + l)) * v_load(scale + l);
                    mass[p * LG_PAGE + i] += weight * v_hsum(sum);
                }
            }
        }
    }
}
