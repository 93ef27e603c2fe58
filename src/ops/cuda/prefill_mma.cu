/* Prefill attention with mma.sync m16n8k16 (sm_80 and newer): head sizes 64, 80, 96, 128, 256; cache bf16 (products in bf16), f16 and
 * 8-bit (products in f16: int8 times its scale rounds to 11 bits there, to 8 in bf16).
 *
 * A block is 4 warps, each owns 16*MT packed rows: MT 2, and 1 where a head of 256 would not fit in registers. Q lies in shared memory,
 * K and V come with cp.async into 1 or 2 buffers. Rows in shared memory have an odd number of 16-byte chunks, so that the 8 rows of an
 * ldmatrix lie in different banks. Rows of the last page behind the tile's last position are not read but zeroed: they
 * may hold anything, and 0 * NaN is NaN. Scores, sums and the output accumulate in f32. */
#include "ops/cuda/kv.cuh"
#include "ops/cuda/prefill.cuh"

enum { WARPS = 4, THREADS = 32 * WARPS };

static __device__ __forceinline__ uint32_t smem_at(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* 16 bytes, of which the first n are read and the rest zeroed. */
static __device__ __forceinline__ void copy16(uint32_t dst, const void *src, int n) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(n) : "memory");
}
static __device__ __forceinline__ void copy_wait(void) { asm volatile("cp.async.wait_all;" ::: "memory"); }

static __device__ __forceinline__ void ldsm4(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
static __device__ __forceinline__ void ldsm4_t(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

template <bool BF>
static __device__ __forceinline__ uint32_t pack2(float lo, float hi) {
    uint32_t r;
    if (BF) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

template <bool BF>
static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (BF)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Shared memory: lim, Q, tiles of K and V (one pair, two with stages 2), for an 8-bit cache instead one pair of tiles and
 * `stages` pairs of raw pages. */
template <int HD> struct shape {
    static constexpr int MT = HD <= 128 ? 2 : 1, BM = 16 * MT * WARPS, CHUNKS = HD / 8, PITCH = (CHUNKS | 1) * 16, TILE = LG_PAGE * PITCH;
    static constexpr int RAW = LG_PAGE * (HD + 2 * ((HD + 31) / 32)); /* one raw 8-bit page: a multiple of 64 */
    static constexpr int LIM = BM * 4;
};

template <int HD>
static int64_t smem_bytes(bool q8, int stages) {
    typedef shape<HD> S;
    return S::LIM + S::BM * S::PITCH + 2 * S::TILE * (q8 ? 1 : stages) + (q8 ? 2 * S::RAW * stages : 0);
}

/* K or V page of 16-bit values into a tile; rows from n_ok on are zeroed. */
template <int HD>
static __device__ __forceinline__ void tile_load(uint32_t dst, const uint8_t *src, int n_ok) {
    typedef shape<HD> S;
#pragma unroll
    for (int j = 0; j < LG_PAGE * S::CHUNKS / THREADS; j++) {
        const int i = (int)threadIdx.x + j * THREADS, r = i / S::CHUNKS, c = i % S::CHUNKS;
        copy16(dst + (uint32_t)(r * S::PITCH + c * 16), src + r * (HD * 2) + c * 16, r < n_ok ? 16 : 0);
    }
}

/* The first n_ok rows of a raw 8-bit page as they are. */
template <int HD>
static __device__ __forceinline__ void raw_load(uint32_t dst, const uint8_t *src, int n_ok) {
    typedef shape<HD> S;
    const int n = n_ok * (S::RAW / LG_PAGE);
    for (int at = (int)threadIdx.x * 16; at < S::RAW; at += THREADS * 16) {
        const int left = n - at;
        copy16(dst + (uint32_t)at, src + at, left >= 16 ? 16 : left > 0 ? left : 0);
    }
}

/* Raw 8-bit page to a tile of f16. A byte b, its sign bit flipped, is b + 128; behind the exponent of 1024 it reads 1152 + b. */
template <int HD>
static __device__ __forceinline__ void raw_expand(uint8_t *tile, const uint8_t *raw, int n_ok) {
    typedef shape<HD> S;
    constexpr int RB = S::RAW / LG_PAGE;
#pragma unroll 2
    for (int j = 0; j < LG_PAGE * S::CHUNKS / THREADS; j++) {
        const int i = (int)threadIdx.x + j * THREADS, r = i / S::CHUNKS, c = i % S::CHUNKS;
        const uint8_t *row = raw + r * RB;
        uint32_t w[2], h[4] = { 0, 0, 0, 0 };
        if (r < n_ok) {
            if (RB % 4 == 0) {
                w[0] = ((const uint32_t *)(row + c * 8))[0];
                w[1] = ((const uint32_t *)(row + c * 8))[1];
            } else {
                const uint16_t *s = (const uint16_t *)(row + c * 8);
                w[0] = (uint32_t)s[0] | (uint32_t)s[1] << 16;
                w[1] = (uint32_t)s[2] | (uint32_t)s[3] << 16;
            }
            const __half2 scale = __half2half2(*(const __half *)(row + HD + 2 * (c / 4))), bias = __half2half2(__ushort_as_half(0x6480));
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const uint32_t u = __byte_perm(w[k / 2] ^ 0x80808080u, 0x64646464u, k % 2 ? 0x4342 : 0x4140);
                const __half2 x = __hmul2(__hsub2(*(const __half2 *)&u, bias), scale);
                h[k] = *(const uint32_t *)&x;
            }
        }
        *(uint4 *)(tile + r * S::PITCH + c * 16) = make_uint4(h[0], h[1], h[2], h[3]);
    }
}

template <int DTYPE, int HD>
__global__ void __launch_bounds__(THREADS, HD <= 128 ? 2 : 1) mma_kernel(const __grid_constant__ lg_prefill_args a) {
    typedef shape<HD> S;
    constexpr bool BF = DTYPE == LG_DTYPE_BF16, Q8 = DTYPE == LG_DTYPE_KV8;
    constexpr int MT = S::MT, BM = S::BM;
    extern __shared__ __align__(128) uint8_t smem[];
    int32_t *lim = (int32_t *)smem; /* greatest position that each packed row sees */
    uint8_t *qs = smem + S::LIM, *tiles = qs + BM * S::PITCH, *raws = tiles + 2 * S::TILE;
    const int tid = (int)threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int split = (int)blockIdx.x % a.n_split, unit = (int)blockIdx.x / a.n_split, head = unit / a.n_item;
    const lg_prefill_item w = a.item[unit - head * a.n_item];
    const int64_t *idx = a.idx + w.row0;
    const int p_end = min(w.p0 + BM, w.n_p);
    const int last = (int)idx[(p_end - 1) / a.group];
    const int begin = (int)((int64_t)w.n_page * split / a.n_split), end = (int)((int64_t)w.n_page * (split + 1) / a.n_split);
    const int32_t *page = a.seqs[w.seq].page;
    const int64_t page_bytes = LG_PAGE * a.row_bytes;

    /* Page n into buffer b. */
    auto fetch = [&](int32_t id, int n, int b) {
        const int64_t at = ((int64_t)id * a.n_head_kv + head) * page_bytes;
        const int n_ok = min(LG_PAGE, last + 1 - n * LG_PAGE);
        if (Q8) {
            raw_load<HD>(smem_at(raws + b * 2 * S::RAW), a.k + at, n_ok);
            raw_load<HD>(smem_at(raws + b * 2 * S::RAW + S::RAW), a.v + at, n_ok);
        } else {
            tile_load<HD>(smem_at(tiles + b * 2 * S::TILE), a.k + at, n_ok);
            tile_load<HD>(smem_at(tiles + b * 2 * S::TILE + S::TILE), a.v + at, n_ok);
        }
    };
    int32_t next = begin < end ? page[begin] : 0;
    if (a.stages == 2 && begin < end) {
        fetch(next, begin, 0);
        next = begin + 1 < end ? page[begin + 1] : 0;
    }

    for (int i = tid; i < BM; i += THREADS) lim[i] = w.p0 + i < p_end ? (int32_t)idx[(w.p0 + i) / a.group] : -1;
    for (int i = tid; i < BM * S::CHUNKS; i += THREADS) {
        const int m = i / S::CHUNKS, c = i % S::CHUNKS, p = w.p0 + m;
        uint4 u = make_uint4(0, 0, 0, 0);
        if (p < p_end) {
            const int row = p / a.group, g = p - row * a.group;
            const float4 *src = (const float4 *)(a.q + ((int64_t)(w.row0 + row) * a.n_head + head * a.group + g) * HD + c * 8);
            const float4 x = src[0], y = src[1];
            u = make_uint4(pack2<BF>(x.x, x.y), pack2<BF>(x.z, x.w), pack2<BF>(y.x, y.y), pack2<BF>(y.z, y.w));
        }
        *(uint4 *)(qs + m * S::PITCH + c * 16) = u;
    }

    /* This warp's rows: the first sees least (from there on masks are needed), the last valid one most. */
    const int m0 = warp * 16 * MT;
    const bool busy = w.p0 + m0 < p_end;
    const int sees_least = busy ? (int)idx[(w.p0 + m0) / a.group] : -1;
    const int sees_most = busy ? (int)idx[(min(w.p0 + m0 + 16 * MT, p_end) - 1) / a.group] : -1;

    float o[MT][HD / 8][4], m[MT][2], l[MT][2];
#pragma unroll
    for (int t = 0; t < MT; t++) {
        m[t][0] = m[t][1] = -INFINITY;
        l[t][0] = l[t][1] = 0.0f;
#pragma unroll
        for (int d = 0; d < HD / 8; d++) o[t][d][0] = o[t][d][1] = o[t][d][2] = o[t][d][3] = 0.0f;
    }
    /* ldmatrix: lane i gives the address of row i%8 of 8x8 matrix i/8. A (rows, 16 d): matrices ordered row-half, then d-half.
     * K (16 keys, 16 d): d-half, then key-half. V transposed (16 keys, 16 d): key-half, then d-half. */
    const uint32_t q_at = smem_at(qs) + (uint32_t)((m0 + lane % 16) * S::PITCH + lane / 16 * 16);
    const uint32_t k_lane = (uint32_t)((lane % 8 + lane / 16 * 8) * S::PITCH + lane / 8 % 2 * 16);
    const uint32_t v_lane = (uint32_t)(lane % 16 * S::PITCH + lane / 16 * 16);

    int b = 0;
    for (int n = begin; n < end; n++) {
        if (a.stages == 1) {
            __syncthreads(); /* the buffer is free */
            fetch(next, n, 0);
            next = n + 1 < end ? page[n + 1] : 0;
        }
        copy_wait();
        __syncthreads(); /* page n is there; everybody is done with page n-1 */
        if (Q8) {
            const int n_ok = min(LG_PAGE, last + 1 - n * LG_PAGE);
            raw_expand<HD>(tiles, raws + b * 2 * S::RAW, n_ok);
            raw_expand<HD>(tiles + S::TILE, raws + b * 2 * S::RAW + S::RAW, n_ok);
        }
        if (a.stages == 2 && n + 1 < end) {
            fetch(next, n + 1, b ^ 1);
            next = n + 2 < end ? page[n + 2] : 0;
        }
        if (Q8) __syncthreads();
        const int t0 = n * LG_PAGE;
        if (t0 <= sees_most) {
            const uint32_t k_at = smem_at(tiles + (Q8 ? 0 : b * 2 * S::TILE)) + k_lane;
            const uint32_t v_at = smem_at(tiles + (Q8 ? 0 : b * 2 * S::TILE) + S::TILE) + v_lane;
            float s[MT][8][4];
#pragma unroll
            for (int t = 0; t < MT; t++)
#pragma unroll
                for (int j = 0; j < 8; j++) s[t][j][0] = s[t][j][1] = s[t][j][2] = s[t][j][3] = 0.0f;
#pragma unroll
            for (int k = 0; k < HD / 16; k++) {
                uint32_t qa[MT][4];
#pragma unroll
                for (int t = 0; t < MT; t++) ldsm4(qa[t], q_at + (uint32_t)(t * 16 * S::PITCH + k * 32));
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    uint32_t kb[4];
                    ldsm4(kb, k_at + (uint32_t)(j * 16 * S::PITCH + k * 32));
#pragma unroll
                    for (int t = 0; t < MT; t++) {
                        mma<BF>(s[t][2 * j], qa[t], kb[0], kb[1]);
                        mma<BF>(s[t][2 * j + 1], qa[t], kb[2], kb[3]);
                    }
                }
            }
            if (t0 + LG_PAGE - 1 > sees_least) {
#pragma unroll
                for (int t = 0; t < MT; t++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const int keep = lim[m0 + t * 16 + h * 8 + lane / 4] - t0 - lane % 4 * 2; /* columns 0..keep stay */
#pragma unroll
                        for (int j = 0; j < 8; j++) {
                            if (8 * j > keep) s[t][j][2 * h] = -INFINITY;
                            if (8 * j + 1 > keep) s[t][j][2 * h + 1] = -INFINITY;
                        }
                    }
            }
            float corr[MT][2];
            bool moved = false;
#pragma unroll
            for (int t = 0; t < MT; t++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float x = m[t][h];
#pragma unroll
                    for (int j = 0; j < 8; j++) x = fmaxf(x, fmaxf(s[t][j][2 * h], s[t][j][2 * h + 1]));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                    x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                    const float base = x == -INFINITY ? 0.0f : x * a.scale_log2; /* a row that sees nothing yet */
                    corr[t][h] = ex2(fmaf(m[t][h], a.scale_log2, -base));
                    moved |= x > m[t][h];
                    m[t][h] = x;
                    float sum = 0.0f;
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        s[t][j][2 * h] = ex2(fmaf(s[t][j][2 * h], a.scale_log2, -base));
                        s[t][j][2 * h + 1] = ex2(fmaf(s[t][j][2 * h + 1], a.scale_log2, -base));
                        sum += s[t][j][2 * h] + s[t][j][2 * h + 1];
                    }
                    l[t][h] = fmaf(l[t][h], corr[t][h], sum);
                }
            if (__any_sync(~0u, moved)) {
#pragma unroll
                for (int t = 0; t < MT; t++)
#pragma unroll
                    for (int d = 0; d < HD / 8; d++) {
                        o[t][d][0] *= corr[t][0];
                        o[t][d][1] *= corr[t][0];
                        o[t][d][2] *= corr[t][1];
                        o[t][d][3] *= corr[t][1];
                    }
            }
#pragma unroll
            for (int k = 0; k < LG_PAGE / 16; k++) {
                uint32_t pa[MT][4];
#pragma unroll
                for (int t = 0; t < MT; t++) {
                    pa[t][0] = pack2<BF>(s[t][2 * k][0], s[t][2 * k][1]);
                    pa[t][1] = pack2<BF>(s[t][2 * k][2], s[t][2 * k][3]);
                    pa[t][2] = pack2<BF>(s[t][2 * k + 1][0], s[t][2 * k + 1][1]);
                    pa[t][3] = pack2<BF>(s[t][2 * k + 1][2], s[t][2 * k + 1][3]);
                }
#pragma unroll
                for (int d = 0; d < HD / 16; d++) {
                    uint32_t vb[4];
                    ldsm4_t(vb, v_at + (uint32_t)(k * 16 * S::PITCH + d * 32));
#pragma unroll
                    for (int t = 0; t < MT; t++) {
                        mma<BF>(o[t][2 * d], pa[t], vb[0], vb[1]);
                        mma<BF>(o[t][2 * d + 1], pa[t], vb[2], vb[3]);
                    }
                }
            }
        }
        b ^= a.stages - 1;
    }

#pragma unroll
    for (int t = 0; t < MT; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = l[t][h];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float inv = sum > 0.0f ? 1.0f / sum : 0.0f;
            const int r = m0 + t * 16 + h * 8 + lane / 4, p = w.p0 + r;
            if (p >= p_end) continue;
            const int row = p / a.group, g = p - row * a.group;
            float *dst = a.out + ((int64_t)(w.row0 + row) * a.n_head + head * a.group + g) * HD;
            if (a.n_split > 1) {
                const int64_t at = (int64_t)blockIdx.x * BM + r;
                dst = a.part_o + at * HD;
                if (lane % 4 == 0) a.part_lse[at] = sum > 0.0f ? m[t][h] * a.scale_log2 + log2f(sum) : -INFINITY;
            }
#pragma unroll
            for (int d = 0; d < HD / 8; d++)
                *(float2 *)(dst + d * 8 + lane % 4 * 2) = make_float2(o[t][d][2 * h] * inv, o[t][d][2 * h + 1] * inv);
        }
}

template <int DTYPE, int HD>
static void launch(const lg_cuda_env *e, lg_prefill_args *a) {
    constexpr bool Q8 = DTYPE == LG_DTYPE_KV8;
    a->stages = HD <= 128 && smem_bytes<HD>(Q8, 2) <= e->smem_max ? 2 : 1;
    const int bytes = (int)smem_bytes<HD>(Q8, a->stages);
    cudaFuncSetAttribute(mma_kernel<DTYPE, HD>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    mma_kernel<DTYPE, HD><<<(unsigned)(a->n_item * a->n_head_kv * a->n_split), THREADS, (size_t)bytes, e->stream>>>(*a);
}

template <int DTYPE>
static void launch_head(const lg_cuda_env *e, const lg_kv_geom *g, lg_prefill_args *a) {
    switch (g->head_dim) {
    case 64: launch<DTYPE, 64>(e, a); break;
    case 80: launch<DTYPE, 80>(e, a); break;
    case 96: launch<DTYPE, 96>(e, a); break;
    case 128: launch<DTYPE, 128>(e, a); break;
    default: launch<DTYPE, 256>(e, a); break;
    }
}

static int64_t least_smem(int32_t head_dim, bool q8) {
    switch (head_dim) {
    case 64: return smem_bytes<64>(q8, 1);
    case 80: return smem_bytes<80>(q8, 1);
    case 96: return smem_bytes<96>(q8, 1);
    case 128: return smem_bytes<128>(q8, 1);
    case 256: return smem_bytes<256>(q8, 1);
    default: return INT64_MAX;
    }
}

bool lg_prefill_mma_fits(const lg_cuda_env *e, const lg_kv_geom *g) {
    const bool q8 = g->dtype == LG_DTYPE_KV8;
    if (e->cc < 80 || (!q8 && g->dtype != LG_DTYPE_BF16 && g->dtype != LG_DTYPE_F16)) return false;
    const int64_t row = q8 ? g->head_dim + 2 * ((g->head_dim + 31) / 32) : 2 * g->head_dim;
    return g->row_bytes == row && least_smem(g->head_dim, q8) <= e->smem_max;
}

int lg_prefill_mma_rows(const lg_kv_geom *g) { return g->head_dim <= 128 ? 16 * 2 * WARPS : 16 * WARPS; }

void lg_prefill_mma_launch(const lg_cuda_env *e, const lg_kv_geom *g, lg_prefill_args *a) {
    if (g->dtype == LG_DTYPE_BF16) launch_head<LG_DTYPE_BF16>(e, g, a);
    else if (g->dtype == LG_DTYPE_F16) launch_head<LG_DTYPE_F16>(e, g, a);
    else launch_head<LG_DTYPE_KV8>(e, g, a);
}
