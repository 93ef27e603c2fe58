/* Decode: tile() of attend_kernels.h (attend_simd.h says what a file defines before it). */
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
