/* Prefill and attention mass: flash(), peak() and mass() of attend_kernels.h. What products read comes in words of PACK numbers along the direction that a product sums over:
 * one f32, or two bf16. Beside what attend_simd.h says, a file defines PACK and
 *   w_all (a vector of one word), w_fma (*a += x y, all numbers of a word), w_line (PACK vectors that follow each other to the words of one vector), w_join (PACK vectors, a number
 *   of each to a word)
 * head_dim must be a multiple of VW * PACK. Sums and the softmax are f32. */
enum { LANES = LG_FLASH_LANES };

/* Per tile of lanes: words of Q^T [head_dim / PACK][LANES], O^T [head_dim][LANES], then max, sum [LANES]. */
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
        for (int64_t c = 0; c < f->head_dim; c += PACK) {
            vf x[PACK];
            for (int e = 0; e < PACK; e++) x[e] = v_set(q[c + e] * f->scale2);
            s->q[c / PACK * LANES + l] = w_join(x)[0];
        }
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

/* Words of n rows of one page of this head; the rest zero. K: along a row. V: along a column. */
INLINE void k_rows(float *restrict dst, const uint8_t *src, int64_t n, int64_t row_bytes, lg_dtype dt, int64_t d) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < d; c += VW * PACK) {
            vf x[PACK];
            for (int e = 0; e < PACK; e++) x[e] = v_row(dt, src + i * row_bytes, c + e * VW, d);
            v_store(dst + (i * d + c) / PACK, w_line(x));
        }
    memset(dst + n * d / PACK, 0, (size_t)((LG_PAGE - n) * d / PACK) * sizeof(float));
}
INLINE void v_rows(float *restrict dst, const uint8_t *src, int64_t n, int64_t row_bytes, lg_dtype dt, int64_t d) {
    int64_t i = 0;
    for (; i < n; i += PACK)
        for (int64_t c = 0; c < d; c += VW) {
            vf x[PACK];
            for (int e = 0; e < PACK; e++) x[e] = i + e < n ? v_row(dt, src + (i + e) * row_bytes, c, d) : v_set(0);
            v_store(dst + i / PACK * d + c, w_join(x));
        }
    memset(dst + i / PACK * d, 0, (size_t)((LG_PAGE - i) / PACK * d) * sizeof(float));
}
INLINE void load_page(float *dst, const uint8_t *src, int64_t n, int64_t row_bytes, lg_dtype dt, int64_t d, bool v) {
    if (v) v_rows(dst, src, n, row_bytes, dt, d);
    else k_rows(dst, src, n, row_bytes, dt, d);
}
static void load(float *dst, const uint8_t *src, int64_t n, int64_t row_bytes, lg_dtype dt, int64_t d, bool v) {
    switch (dt) {
    case LG_DTYPE_F16: load_page(dst, src, n, row_bytes, LG_DTYPE_F16, d, v); break;
    case LG_DTYPE_BF16: load_page(dst, src, n, row_bytes, LG_DTYPE_BF16, d, v); break;
    case LG_DTYPE_F32: load_page(dst, src, n, row_bytes, LG_DTYPE_F32, d, v); break;
    default: load_page(dst, src, n, row_bytes, LG_DTYPE_KV8, d, v); break;
    }
}

/* Of `rows`, K or V: this head's part of the page at position `first`. */
INLINE const uint8_t *page_at(const lg_flash *f, const uint8_t *rows, int64_t first) {
    return rows + ((int64_t)f->page[first / LG_PAGE] * f->n_head_kv + f->head) * LG_PAGE * f->row_bytes;
}

/* Part number `part` of `parts` of this head's rows of the page at position `first`, which is read next, into L2 (products fill L1). */
INLINE void ahead(const lg_flash *f, const uint8_t *rows, int64_t first, int64_t part, int64_t parts) {
    const int64_t bytes = LG_PAGE * f->row_bytes;
    const uint8_t *p = page_at(f, rows, first);
    for (int64_t b = bytes * part / parts; b < bytes * (part + 1) / parts; b += 64) __builtin_prefetch(p + b, 0, 2);
}

/* dst[r][LANES] (+)= sum_j a[r*ra + j*rj] * b[j][LANES] over n words, for r < rows, a multiple of MR; MR x MC vectors at a time. */
INLINE void outer(float *restrict dst, const float *restrict a, int64_t ra, int64_t rj, const float *restrict b, int64_t rows,
                  int64_t n, bool add) {
    for (int64_t r = 0; r < rows; r += MR)
        for (int64_t l = 0; l < LANES; l += MC * VW) {
            vf x[MR][MC] = { 0 };
            for (int i = 0; i < MR && add; i++)
                for (int e = 0; e < MC; e++) x[i][e] = v_load(dst + (r + i) * LANES + l + e * VW);
            for (int64_t j = 0; j < n; j++)
                for (int i = 0; i < MR; i++) {
                    const vf y = w_all(a + (r + i) * ra + j * rj);
                    for (int e = 0; e < MC; e++) w_fma(&x[i][e], y, v_load(b + j * LANES + l + e * VW));
                }
            for (int i = 0; i < MR; i++)
                for (int e = 0; e < MC; e++) v_store(dst + (r + i) * LANES + l + e * VW, x[i][e]);
        }
}

/* Softmax weights of PACK rows under the maxima m; returns their sums, which must be the same bits in flash() and in peak(). */
INLINE vf weights(vf *p, const float *w, vf m) {
    vf sum = v_set(0);
    for (int e = 0; e < PACK; e++) sum += p[e] = v_exp2(v_load(w + e * LANES) - m);
    return sum;
}

/* Scores of a page's rows for a tile of lanes, -INFINITY where a lane does not see the row. Returns the rows, a multiple of MR. */
INLINE int64_t page_scores(const lg_flash *f, const flash_state *s, int64_t tile, int64_t first, int64_t n, const float *k, float *w) {
    const int64_t rows = (n + MR - 1) / MR * MR;
    outer(w, k, f->head_dim / PACK, 1, s->q, rows, f->head_dim / PACK, false);
    if (first + rows - 1 > f->idx[lane_of(f, tile, 0) / f->group])
        for (int64_t l = 0; l < LANES; l++) {
            const int64_t last = f->idx[lane_of(f, tile, l) / f->group];
            for (int64_t i = last + 1 > first ? last + 1 - first : 0; i < rows; i++) w[i * LANES + l] = -INFINITY;
        }
    return rows;
}

/* One page against one tile: first is the page's first position, n its rows. */
static void flash_step(const lg_flash *f, const flash_state *s, int64_t tile, int64_t first, int64_t n, const float *k,
                       const float *v, float *w) {
    const int64_t d = f->head_dim, rows = page_scores(f, s, tile, first, n, k, w);
    for (int64_t l = 0; l < LANES; l += VW) {
        const vf old = v_load(s->max + l);
        vf m = old, total = v_set(0);
        for (int64_t i = 0; i < rows; i++) m = v_max(m, v_load(w + i * LANES + l));
        const vf keep = v_exp2(old - m);
        for (int64_t i = 0; i < rows; i += PACK) {
            vf p[PACK];
            total += weights(p, w + i * LANES + l, m);
            v_store(w + i / PACK * LANES + l, w_join(p));
        }
        v_store(s->max + l, m);
        v_store(s->sum + l, v_load(s->sum + l) * keep + total);
        bool moved = false;
        for (int e = 0; e < VW; e++) moved = moved || keep[e] != 1.0f;
        for (int64_t c = 0; moved && c < d; c++) v_store(s->o + c * LANES + l, v_load(s->o + c * LANES + l) * keep);
    }
    outer(s->o, v, 1, d, w, d, (n + PACK - 1) / PACK, true);
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
        load(k, page_at(f, f->k, first), n, f->row_bytes, f->dtype, d, false);
        load(v, page_at(f, f->v, first), n, f->row_bytes, f->dtype, d, true);
        for (int64_t t = 0; t < tiles; t++) {
            const flash_state s = state_of(f, f->scratch, t);
            if (first + LG_PAGE < len) {
                ahead(f, f->k, first + LG_PAGE, t, tiles);
                ahead(f, f->v, first + LG_PAGE, t, tiles);
            }
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
    load(k, page_at(f, f->k, first), *n, f->row_bytes, f->dtype, f->head_dim, false);
    return k;
}
static void peak_run(const lg_flash *f, float *peak) {
    const flash_state s = state_of(f, f->scratch, 0);
    float *k = (float *)f->scratch + LG_FLASH_GROUP * state_floats(f->head_dim), *w = k + 2 * LG_PAGE * f->head_dim;
    const int64_t len = f->idx[lane_of(f, 0, LANES - 1) / f->group] + 1;
    flash_begin(f, &s, 0);
    for (int64_t page = 0, n; page * LG_PAGE < len; page++) {
        page_of(f, page, len, k, &n);
        const int64_t rows = page_scores(f, &s, 0, page * LG_PAGE, n, k, w);
        for (int64_t l = 0; l < LANES; l += VW) {
            const vf old = v_load(s.max + l);
            vf m = old, total = v_set(0);
            for (int64_t i = 0; i < rows; i++) m = v_max(m, v_load(w + i * LANES + l));
            for (int64_t i = 0; i < rows; i += PACK) {
                vf p[PACK];
                total += weights(p, w + i * LANES + l, m);
            }
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
                if (p + 1 < end && (p + 1) * LG_PAGE < len) ahead(f, f->k, (p + 1) * LG_PAGE, t - t0, t1 - t0);
                page_scores(f, &s, t, p * LG_PAGE, n, k, w);
                for (int64_t i = 0; i < n; i++) {
                    vf sum = v_set(0);
                    for (int64_t l = 0; l < LANES; l += VW) sum += v_exp2(v_load(w + i * LANES + l) - v_load(max + l)) * v_load(scale + l);
                    mass[p * LG_PAGE + i] += weight * v_hsum(sum);
                }
            }
        }
    }
}
