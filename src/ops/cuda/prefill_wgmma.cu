/* Prefill attention with wgmma and TMA (sm_90a): head sizes 64 and 128, 16-bit caches.
 *
 * A block is three warpgroups: one thread of the first brings K and V, the other two own 64 packed rows each. A tile of keys is two pages
 * (128 keys); K and V have two buffers each, with an mbarrier for "full" (bytes of TMA) and one for "empty" (8 warps). A page of one head
 * is a box of 64 rows x 64 columns per half of the head in a tensor map over the whole cache layer, so TMA writes the 128-byte swizzle that
 * wgmma reads: in shared memory a tile is [half of the head][128 rows][128 bytes], the 16-byte chunk c of row r at c ^ (r & 7).
 *
 *   K: B operand, K-major: 8 rows 1024 bytes apart (SBO); 16 columns further are 32 bytes further.
 *   V: B operand, N-major (transposed): 64 columns 16384 bytes apart (LBO), 8 keys 1024 bytes apart (SBO); 16 keys further are 2048 bytes.
 *   Q: A operand like K. P: A operand from registers, whose layout is that of the scores' accumulator.
 *
 * While the tensor cores multiply P of tile t-1 with V, the warpgroup computes the softmax of tile t (its QK product was issued before).
 * Rows of V behind the last position are zeroed in shared memory before they are used: they may hold anything, and 0 * NaN is NaN. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "ops/cuda/boxes.cuh"
#include "ops/cuda/prefill.cuh"

#ifdef LG_CUDA_ARCH_90a

enum { BM = 128, BN = 128, THREADS = 384, HALF = 128 * 128 /* bytes of one half of a tile */ };

/* ---- instructions ---- */
static __device__ __forceinline__ uint32_t smem_at(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ void bar_init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(count) : "memory");
}
static __device__ __forceinline__ void bar_init_done(void) { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
static __device__ __forceinline__ void bar_expect(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void bar_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
static __device__ __forceinline__ void bar_wait(uint32_t bar, int parity) {
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    } while (!done);
}
static __device__ __forceinline__ void tma_load(uint32_t dst, const CUtensorMap *map, int column, int row, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(dst), "l"(map), "r"(column), "r"(row), "r"(bar) : "memory");
}
/* Shared memory written by ordinary stores becomes visible to wgmma and TMA. */
static __device__ __forceinline__ void proxy_fence(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
static __device__ __forceinline__ void group_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
static __device__ __forceinline__ void wgmma_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void wgmma_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void wgmma_wait(void) { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
template <int N> static __device__ __forceinline__ void regs_less(void) { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> static __device__ __forceinline__ void regs_more(void) { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
/* Neither side of this point may use these registers on the other: wgmma reads and writes them behind the compiler's back. */
template <int N> static __device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i]) :: "memory");
}
static __device__ __forceinline__ void pin(uint32_t (&x)[8][4]) {
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+r"(x[i / 4][i % 4]) :: "memory");
}

#define F4(d, i) "+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3])
#define F16(d, i) F4(d, i), F4(d, (i) + 4), F4(d, (i) + 8), F4(d, (i) + 12)
#define F32(d) F16(d, 0), F16(d, 16)
#define F64(d) F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48)
#define LIST32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST64 LIST32 "," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
/* s (64 rows x 128 keys) = or += A B, both from shared memory, K-major */
#define WGMMA_QK(type)                                                                                                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" LIST64 "}, " \
                 "%64, %65, p, 1, 1, 0, 0;\n}" : F64(d) : "l"(a), "l"(b), "r"(add))
/* o (64 rows x 128 or 64 columns) += A from registers times B from shared memory, N-major */
#define WGMMA_PV128(type)                                                                                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" LIST64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"     \
                 : F64(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_PV64(type)                                                                                                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" LIST32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"      \
                 : F32(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <bool BF> static __device__ __forceinline__ void wgmma_qk(float (&d)[64], uint64_t a, uint64_t b, int add) {
    if (BF) WGMMA_QK("bf16");
    else WGMMA_QK("f16");
}
template <bool BF> static __device__ __forceinline__ void wgmma_pv(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    if (BF) WGMMA_PV128("bf16");
    else WGMMA_PV128("f16");
}
template <bool BF> static __device__ __forceinline__ void wgmma_pv(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    if (BF) WGMMA_PV64("bf16");
    else WGMMA_PV64("f16");
}
template <bool BF> static __device__ __forceinline__ uint32_t pack2(float lo, float hi) {
    uint32_t r;
    if (BF) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
static __device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Operand in shared memory: address, LBO and SBO in 16-byte units, 128-byte swizzle. Adding bytes/16 moves the start. */
static __device__ __forceinline__ uint64_t operand(uint32_t at, uint32_t lbo, uint32_t sbo) {
    return (uint64_t)(at >> 4) | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 | (uint64_t)1 << 62;
}

/* ---- the kernel ---- */
enum { FULL_K = 0, FULL_V = 16, EMPTY_K = 32, EMPTY_V = 48 }; /* byte offsets of two mbarriers each */

template <int HD> struct shape {
    static constexpr int HALVES = HD / 64, TILE = HALVES * HALF; /* Q, K and V tiles are of one size */
    static constexpr int BYTES = 1024 + 5 * TILE + 64 + BM * 4;  /* the first 1024 align */
};

/* Masks, then turns the scores of one tile into shares relative to the new maximum; corr scales what was summed before. keep: columns
 * 0..keep[h] of row half h stay (lane%4*2 is taken off already). */
static __device__ __forceinline__ void softmax(float (&s)[64], float (&m)[2], float (&l)[2], float (&corr)[2], bool masked, const int (&keep)[2], float scale) {
    if (masked) {
#pragma unroll
        for (int j = 0; j < 16; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (8 * j + e % 2 > keep[e / 2]) s[4 * j + e] = -INFINITY;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float x = m[h];
#pragma unroll
        for (int j = 0; j < 16; j++) x = fmaxf(x, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        const float base = x == -INFINITY ? 0.0f : x * scale; /* a row that sees nothing yet */
        corr[h] = ex2(fmaf(m[h], scale, -base));
        m[h] = x;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            s[4 * j + 2 * h] = ex2(fmaf(s[4 * j + 2 * h], scale, -base));
            s[4 * j + 2 * h + 1] = ex2(fmaf(s[4 * j + 2 * h + 1], scale, -base));
            sum += s[4 * j + 2 * h] + s[4 * j + 2 * h + 1];
        }
        l[h] = fmaf(l[h], corr[h], sum);
    }
}

template <bool BF>
static __device__ __forceinline__ void pack(uint32_t (&p)[8][4], const float (&s)[64]) {
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
        for (int e = 0; e < 4; e++) p[k][e] = pack2<BF>(s[8 * k + 2 * e], s[8 * k + 2 * e + 1]);
}

template <bool BF, int HD>
static __device__ __forceinline__ void issue_qk(float (&s)[64], uint64_t q, uint64_t k) {
#pragma unroll
    for (int i = 0; i < HD / 16; i++) {
        const uint64_t step = (uint64_t)((i / 4 * HALF + i % 4 * 32) >> 4);
        wgmma_qk<BF>(s, q + step, k + step, i != 0);
    }
}

template <bool BF, int HD>
static __device__ __forceinline__ void issue_pv(float (&o)[HD / 2], const uint32_t (&p)[8][4], uint64_t v) {
#pragma unroll
    for (int i = 0; i < BN / 16; i++) wgmma_pv<BF>(o, p[i], v + (uint64_t)(i * 2048 >> 4));
}

template <bool BF, int HD>
__global__ void __launch_bounds__(THREADS, 1) wgmma_kernel(const __grid_constant__ lg_prefill_args a, const __grid_constant__ CUtensorMap map_k,
                                                           const __grid_constant__ CUtensorMap map_v) {
    typedef shape<HD> S;
    extern __shared__ uint8_t raw[];
    uint8_t *smem = raw + (1024 - (smem_at(raw) & 1023)) % 1024;
    const uint32_t base = smem_at(smem), k_at = base + S::TILE, v_at = base + 3 * S::TILE, bar = base + 5 * S::TILE;
    int32_t *lim = (int32_t *)(smem + 5 * S::TILE + 64); /* greatest position that each packed row sees */
    const int tid = (int)threadIdx.x, wg = __shfl_sync(~0u, tid / 128, 0);
    const int split = (int)blockIdx.x % a.n_split, unit = (int)blockIdx.x / a.n_split, head = unit / a.n_item;
    const lg_prefill_item w = a.item[unit - head * a.n_item];
    const int64_t *idx = a.idx + w.row0;
    const int p_end = min(w.p0 + BM, w.n_p);
    const int begin = (int)((int64_t)w.n_page * split / a.n_split), end = (int)((int64_t)w.n_page * (split + 1) / a.n_split);
    const int n_tile = (end - begin + 1) / 2;

    if (tid == 0) {
        for (int i = 0; i < 2; i++) {
            bar_init(bar + FULL_K + 8 * i, 1);
            bar_init(bar + FULL_V + 8 * i, 1);
            bar_init(bar + EMPTY_K + 8 * i, 8);
            bar_init(bar + EMPTY_V + 8 * i, 8);
        }
        bar_init_done();
    }
    __syncthreads();

    if (wg == 0) {
        regs_less<40>();
        if (tid == 0) {
            const int32_t *page = a.seqs[w.seq].page;
            int row[2], old[2] = { 0, 0 }; /* rows of the cache where the pages of this tile and of the one before begin; -1: no page */
            int32_t id[2];
            for (int i = 0; i < 2; i++) id[i] = begin + i < end ? page[begin + i] : -1;
            for (int t = 0; t <= n_tile; t++) {
                for (int i = 0; i < 2; i++) {
                    row[i] = id[i] < 0 ? -1 : (id[i] * a.n_head_kv + head) * LG_PAGE;
                    id[i] = begin + 2 * (t + 1) + i < end ? page[begin + 2 * (t + 1) + i] : -1;
                }
                if (t < n_tile) {
                    const int b = t & 1;
                    bar_wait(bar + EMPTY_K + 8 * b, (t >> 1 & 1) ^ 1);
                    bar_expect(bar + FULL_K + 8 * b, (row[1] < 0 ? 1 : 2) * LG_PAGE * HD * 2);
                    for (int i = 0; i < 2; i++)
                        for (int h = 0; h < S::HALVES && row[i] >= 0; h++)
                            tma_load(k_at + (uint32_t)(b * S::TILE + h * HALF + i * (HALF / 2)), &map_k, h * 64, row[i], bar + FULL_K + 8 * b);
                }
                if (t > 0) {
                    const int b = (t - 1) & 1;
                    bar_wait(bar + EMPTY_V + 8 * b, ((t - 1) >> 1 & 1) ^ 1);
                    bar_expect(bar + FULL_V + 8 * b, (old[1] < 0 ? 1 : 2) * LG_PAGE * HD * 2);
                    for (int i = 0; i < 2; i++)
                        for (int h = 0; h < S::HALVES && old[i] >= 0; h++)
                            tma_load(v_at + (uint32_t)(b * S::TILE + h * HALF + i * (HALF / 2)), &map_v, h * 64, old[i], bar + FULL_V + 8 * b);
                }
                old[0] = row[0];
                old[1] = row[1];
            }
        }
    } else {
        regs_more<232>();
        const int ct = tid - 128, r0 = (wg - 1) * 64, lane = tid % 32, wt = tid % 128;
        /* Q of this warpgroup's rows, converted and swizzled; lim of these rows. */
        for (int i = wt; i < 64; i += 128) lim[r0 + i] = w.p0 + r0 + i < p_end ? (int32_t)idx[(w.p0 + r0 + i) / a.group] : -1;
        for (int i = wt; i < 64 * (HD / 8); i += 128) {
            const int r = r0 + i / (HD / 8), c = i % (HD / 8), p = w.p0 + r;
            uint4 u = make_uint4(0, 0, 0, 0);
            if (p < p_end) {
                const int row = p / a.group, g = p - row * a.group;
                const float4 *src = (const float4 *)(a.q + ((int64_t)(w.row0 + row) * a.n_head + head * a.group + g) * HD + c * 8);
                const float4 x = src[0], y = src[1];
                u = make_uint4(pack2<BF>(x.x, x.y), pack2<BF>(x.z, x.w), pack2<BF>(y.x, y.y), pack2<BF>(y.z, y.w));
            }
            *(uint4 *)(smem + c / 8 * HALF + r * 128 + (c % 8 ^ (r & 7)) * 16) = u;
        }
        const int last = min((int)idx[(p_end - 1) / a.group], end * LG_PAGE - 1); /* nothing of this block sees more */
        const int sees_least = w.p0 + r0 < p_end ? min((int)idx[(w.p0 + r0) / a.group], last) : -1;
        proxy_fence();
        group_sync(wg, 128);
        const int my_row = r0 + wt / 32 * 16 + lane / 4;
        const int see[2] = { min(lim[my_row], last) - lane % 4 * 2, min(lim[my_row + 8], last) - lane % 4 * 2 };

        const uint64_t q_op = operand(base + (uint32_t)r0 * 128, 16, 1024);
        const uint64_t k_op = operand(k_at, 16, 1024), v_op = operand(v_at, HALF, 1024);
        constexpr uint64_t NEXT = S::TILE >> 4;
        float s[64], o[HD / 2], m[2] = { -INFINITY, -INFINITY }, l[2] = { 0.0f, 0.0f }, corr[2];
        uint32_t p[8][4];
#pragma unroll
        for (int i = 0; i < HD / 2; i++) o[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 64; i++) s[i] = 0.0f;

        if (n_tile > 0) {
            int t0 = begin * LG_PAGE; /* first position of the tile */
            bar_wait(bar + FULL_K, 0);
            pin(s);
            wgmma_fence();
            issue_qk<BF, HD>(s, q_op, k_op);
            wgmma_commit();
            wgmma_wait<0>();
            pin(s);
            if (lane == 0) bar_arrive(bar + EMPTY_K);
            {
                const int keep[2] = { see[0] - t0, see[1] - t0 };
                softmax(s, m, l, corr, t0 + BN - 1 > sees_least, keep, a.scale_log2);
            }
            pack<BF>(p, s);
            for (int t = 1; t < n_tile; t++) {
                const int b = t & 1, ob = b ^ 1;
                t0 += BN;
                bar_wait(bar + FULL_K + 8 * b, t >> 1 & 1);
                pin(s);
                pin(p);
                pin(o);
                wgmma_fence();
                issue_qk<BF, HD>(s, q_op, k_op + b * NEXT);
                wgmma_commit();
                bar_wait(bar + FULL_V + 8 * ob, (t - 1) >> 1 & 1);
                wgmma_fence();
                issue_pv<BF, HD>(o, p, v_op + ob * NEXT);
                wgmma_commit();
                wgmma_wait<1>();
                pin(s);
                const int keep[2] = { see[0] - t0, see[1] - t0 };
                softmax(s, m, l, corr, t0 + BN - 1 > sees_least, keep, a.scale_log2);
                pin(s);
                /* The sums are never negative: asking for them keeps ptxas from moving the exponentials behind the wait. */
                if (lane == 0 && !(l[0] + l[1] < 0.0f)) bar_arrive(bar + EMPTY_K + 8 * b);
                wgmma_wait<0>();
                pin(o);
                pin(p);
                if (lane == 0) bar_arrive(bar + EMPTY_V + 8 * ob);
#pragma unroll
                for (int i = 0; i < HD / 2; i++) o[i] *= corr[i / 2 % 2];
                pack<BF>(p, s);
            }
            const int ob = (n_tile - 1) & 1, n_ok = last + 1 - t0;
            bar_wait(bar + FULL_V + 8 * ob, (n_tile - 1) >> 1 & 1);
            if (n_ok < BN) {
                const int per_half = (BN - n_ok) * 8;
                for (int i = ct; i < per_half * S::HALVES; i += 256)
                    *(uint4 *)(smem + 3 * S::TILE + ob * S::TILE + i / per_half * HALF + n_ok * 128 + i % per_half * 16) = make_uint4(0, 0, 0, 0);
                proxy_fence();
                group_sync(3, 256);
            }
            pin(p);
            pin(o);
            wgmma_fence();
            issue_pv<BF, HD>(o, p, v_op + ob * NEXT);
            wgmma_commit();
            wgmma_wait<0>();
            pin(o);
        }

#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = l[h];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float inv = sum > 0.0f ? 1.0f / sum : 0.0f;
            const int r = my_row + 8 * h, pr = w.p0 + r;
            if (pr < p_end) {
                const int row = pr / a.group, g = pr - row * a.group;
                float *dst = a.out + ((int64_t)(w.row0 + row) * a.n_head + head * a.group + g) * HD;
                if (a.n_split > 1) {
                    const int64_t at = (int64_t)blockIdx.x * BM + r;
                    dst = a.part_o + at * HD;
                    if (lane % 4 == 0) a.part_lse[at] = sum > 0.0f ? m[h] * a.scale_log2 + log2f(sum) : -INFINITY;
                }
#pragma unroll
                for (int d = 0; d < HD / 8; d++)
                    *(float2 *)(dst + d * 8 + lane % 4 * 2) = make_float2(o[4 * d + 2 * h] * inv, o[4 * d + 2 * h + 1] * inv);
            }
        }
    }
}

/* ---- host ---- */
template <bool BF, int HD>
static bool launch(const lg_cuda_env *e, const lg_prefill_args *a) {
    CUtensorMap k, v;
    if (!lg_box_layer(&k, a->k, HD, LG_PAGE) || !lg_box_layer(&v, a->v, HD, LG_PAGE)) return false;
    cudaFuncSetAttribute(wgmma_kernel<BF, HD>, cudaFuncAttributeMaxDynamicSharedMemorySize, shape<HD>::BYTES);
    wgmma_kernel<BF, HD><<<(unsigned)(a->n_item * a->n_head_kv * a->n_split), THREADS, shape<HD>::BYTES, e->stream>>>(*a, k, v);
    return true;
}

bool lg_prefill_wgmma_fits(const lg_cuda_env *e, const lg_kv_geom *g) {
    return e->cc == 90 && (g->dtype == LG_DTYPE_BF16 || g->dtype == LG_DTYPE_F16) && (g->head_dim == 64 || g->head_dim == 128) &&
           g->row_bytes == 2 * g->head_dim && shape<128>::BYTES <= e->smem_max && lg_box_encoder();
}

bool lg_prefill_wgmma_launch(const lg_cuda_env *e, const lg_kv_geom *g, const lg_prefill_args *a) {
    const bool bf = g->dtype == LG_DTYPE_BF16;
    if (g->head_dim == 128) return bf ? launch<true, 128>(e, a) : launch<false, 128>(e, a);
    return bf ? launch<true, 64>(e, a) : launch<false, 64>(e, a);
}

#else /* built for another architecture: wgmma is only in sm_90a */

bool lg_prefill_wgmma_fits(const lg_cuda_env *, const lg_kv_geom *) { return false; }
bool lg_prefill_wgmma_launch(const lg_cuda_env *, const lg_kv_geom *, const lg_prefill_args *) { return false; }

#endif
