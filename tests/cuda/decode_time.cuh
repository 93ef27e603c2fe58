/* Speed of decode attention and selection: the Llama-3-8B shape (8 KV heads, 4 query heads each, 128 numbers), many layers in turn so
 * that caches do not help, captured as a graph and replayed. Bytes are rows read (K and V); the ruler is a device-to-device copy,
 * bytes read plus bytes written. */
enum { T_KV = 8, T_GROUP = 4, T_HD = 128 };

static __global__ void time_fill(uint8_t *p, int64_t n_row, int64_t rb, int dtype, uint32_t salt) {
    for (int64_t r = blockIdx.x; r < n_row; r += gridDim.x)
        for (int64_t i = threadIdx.x; i < rb / 2; i += blockDim.x) {
            uint32_t x = (uint32_t)(r * 131 + i) * 2654435761u ^ salt;
            x ^= x >> 15; x *= 2246822519u; x ^= x >> 13; x *= 3266489917u; x ^= x >> 16;
            const float f = (float)(x >> 8) / 8388608.0f - 1.0f;
            uint16_t w = (uint16_t)(__float_as_uint(f) >> 16);
            if (dtype == LG_DTYPE_KV8) w = i < T_HD / 2 ? (uint16_t)x : 0x2000; /* scales 2^-7 */
            ((uint16_t *)(void *)(p + r * rb))[i] = w;
        }
}
static __global__ void time_floats(float *p, int64_t n, uint32_t salt) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        float s = 0;
        for (int k = 0; k < 4; k++) { /* near to normal, as scores are */
            uint32_t x = (uint32_t)(i * 4 + k) * 2654435761u ^ salt;
            x ^= x >> 15; x *= 2246822519u; x ^= x >> 13; x *= 3266489917u; x ^= x >> 16;
            s += (float)(x >> 8) / 8388608.0f - 1.0f;
        }
        p[i] = 4.0f * s;
    }
}

/* Stands for the products before attention: lets dependents start, then reads n numbers; TIME_SMEM bytes: one block a multiprocessor. */
enum { TIME_SMEM = 150 << 10 };
static __global__ void __launch_bounds__(256) time_product(float *out, const uint4 *w, int64_t n) {
    uint32_t x = 0;
    lg_dec_wait();
    lg_dec_go();
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256 * 4) {
        uint4 y[4];
#pragma unroll
        for (int64_t k = 0; k < 4; k++) y[k] = __ldcg(w + (i + k * gridDim.x * 256 < n ? i + k * gridDim.x * 256 : i));
#pragma unroll
        for (int k = 0; k < 4; k++) x ^= y[k].x ^ y[k].y ^ y[k].z ^ y[k].w;
    }
    if (x == 12345) *out = 1;
}

/* Median microseconds of one replay. */
static double time_graph(cudaGraphExec_t g, cudaStream_t st, int reps) {
    cudaEvent_t a, b;
    double us[64];
    CUDA(cudaEventCreate(&a));
    CUDA(cudaEventCreate(&b));
    for (int i = -2; i < reps; i++) {
        float ms;
        CUDA(cudaEventRecord(a, st));
        CUDA(cudaGraphLaunch(g, st));
        CUDA(cudaEventRecord(b, st));
        CUDA(cudaEventSynchronize(b));
        CUDA(cudaEventElapsedTime(&ms, a, b));
        if (i >= 0) us[i] = 1e3 * ms;
    }
    for (int i = 1; i < reps; i++)
        for (int j = i; j > 0 && us[j] < us[j - 1]; j--) {
            const double x = us[j];
            us[j] = us[j - 1];
            us[j - 1] = x;
        }
    CUDA(cudaEventDestroy(a));
    CUDA(cudaEventDestroy(b));
    return us[reps / 2];
}

static double time_copy(cudaStream_t st) {
    const int64_t n = (int64_t)2 << 30;
    void *a = room(n), *b = room(n);
    cudaGraph_t g;
    cudaGraphExec_t x;
    CUDA(cudaStreamBeginCapture(st, cudaStreamCaptureModeThreadLocal));
    CUDA(cudaMemcpyAsync(a, b, (size_t)n, cudaMemcpyDeviceToDevice, st));
    CUDA(cudaStreamEndCapture(st, &g));
    CUDA(cudaGraphInstantiate(&x, g, 0));
    const double us = time_graph(x, st, 9);
    CUDA(cudaGraphExecDestroy(x));
    CUDA(cudaGraphDestroy(g));
    CUDA(cudaFree(a));
    CUDA(cudaFree(b));
    return 2.0 * (double)n / us / 1e3;
}

/* One cache of `layers` layers for n_seq sequences of len tokens; times dense and hybrid attention over it. */
static void time_attend(lg_cuda_env e, lg_dtype t, int32_t n_seq, int64_t len, int layers, double copy, int heads) { /* heads: bit r: r retrieval heads */
    const int64_t rb = lg_base_row_bytes(t, T_HD), pages = (len + LG_PAGE - 1) / LG_PAGE, n_page = pages * n_seq, bytes = n_page * T_KV * LG_PAGE * rb;
    const int64_t nq = (int64_t)n_seq * T_KV * T_GROUP * T_HD, budget = 4096, cap = budget;
    lg_cuda_decode a = {};
    uint8_t *k[32], *v[32];
    int32_t *order = (int32_t *)lg_base_calloc(n_page, 4);
    for (int64_t i = 0; i < n_page; i++) order[i] = (int32_t)i;
    for (int64_t i = n_page - 1; i > 0; i--) {
        const int64_t j = below(i + 1);
        const int32_t x = order[i];
        order[i] = order[j];
        order[j] = x;
    }
    int32_t *dpage = (int32_t *)up(order, n_page * 4);
    lg_cuda_seq seqs[64];
    int64_t budgets[64];
    uint8_t dense[64] = { 0 };
    for (int s = 0; s < n_seq; s++) {
        seqs[s] = (lg_cuda_seq){ dpage + s * pages, len, NULL };
        budgets[s] = budget;
    }
    for (int l = 0; l < layers; l++) {
        k[l] = (uint8_t *)room(bytes);
        v[l] = (uint8_t *)room(bytes);
        time_fill<<<1024, 128>>>(k[l], n_page * T_KV * LG_PAGE, rb, t, (uint32_t)l * 77 + 1);
        time_fill<<<1024, 128>>>(v[l], n_page * T_KV * LG_PAGE, rb, t, (uint32_t)l * 77 + 2);
    }
    enum { PRODUCT = 3 << 20 }; /* 50 MB */
    const uint4 *product = (const uint4 *)room((int64_t)4 * PRODUCT * 16);
    float *q = (float *)room(nq * 4);
    time_floats<<<64, 256>>>(q, nq, 5);
    a.q = q;
    a.out = (float *)room(nq * 4);
    a.geom = (lg_kv_geom){ t, T_KV, T_HD, rb };
    a.seqs = (lg_cuda_seq *)up(seqs, sizeof seqs);
    a.n_seq = n_seq;
    a.n_head = T_KV * T_GROUP;
    a.scale = 0.0883883f;
    a.max_len = len;
    e.scratch_bytes = lg_cuda_decode_scratch(&e, n_seq, a.n_head, &a.geom);
    e.scratch = (uint8_t *)room(e.scratch_bytes);
    a.score = (float *)room((int64_t)n_seq * T_KV * len * 4);
    a.select = (lg_select){ LG_RULE_TOPK, 0, a.scale, 128, 256, NULL };
    /* slot h: made by head h; slot 8 + h: read by head h */
    int32_t *idx = (int32_t *)lg_base_calloc((int64_t)n_seq * 16 * cap, 4), *cnt = (int32_t *)lg_base_calloc(n_seq * 16, 4);
    for (int64_t j = 0; j < n_seq * 16; j++) {
        cnt[j] = (int32_t)(len < cap ? len : cap);
        for (int64_t i = 0; i < cnt[j]; i++) idx[j * cap + i] = (int32_t)(len <= cap ? i : i * len / cap + below(len / cap));
    }
    a.sets = (lg_sets){ (int32_t *)up(idx, (int64_t)n_seq * 16 * cap * 4), (int32_t *)up(cnt, n_seq * 16 * 4), cap, 16, 1, 0 };
    const int64_t *dbudget = (int64_t *)up(budgets, sizeof budgets);
    const uint8_t *ddense = (uint8_t *)up(dense, sizeof dense);
    for (int r = -1; r <= T_KV; r++) { /* -1: dense; else retrieval heads */
        if (r >= 0 && !(heads >> r & 1)) continue;
        int32_t read[T_KV], make[T_KV];
        for (int h = 0; h < T_KV; h++) {
            read[h] = h < r ? LG_HEAD_DENSE : 8 + h;
            make[h] = h < r ? h : -1;
        }
        int32_t *dread = NULL, *dmake = NULL;
        if (r >= 0) {
            a.read = dread = (int32_t *)up(read, sizeof read);
            a.make = dmake = (int32_t *)up(make, sizeof make);
            a.read_host = read;
            a.make_host = make;
            a.budget = dbudget;
            a.dense = ddense;
        }
        double took[3]; /* attention alone, a product alone, both */
        a.kv.k = k[0];
        a.kv.v = v[0];
        a.early = false;
        CUDA(cudaDeviceSynchronize()); /* fills run on another stream */
        lg_cuda_decode_attend(&e, &a); /* loads the kernel before the capture */
        CUDA(cudaFuncSetAttribute(time_product, cudaFuncAttributeMaxDynamicSharedMemorySize, TIME_SMEM));
        time_product<<<e.n_sm, 256, TIME_SMEM, e.stream>>>(a.out, product, 1);
        CUDA(cudaStreamSynchronize(e.stream));
        for (int what = 0; what < 3; what++) {
            cudaGraph_t g;
            cudaGraphExec_t x;
            CUDA(cudaStreamBeginCapture(e.stream, cudaStreamCaptureModeThreadLocal));
            for (int l = 0; l < layers; l++) {
                a.kv.k = k[l];
                a.kv.v = v[l];
                a.early = a.release = what == 2;
                if (what > 0) lg_cuda_launch(time_product, dim3((unsigned)e.n_sm), dim3(256), TIME_SMEM, e.stream, true, a.out, product + l % 4 * PRODUCT, (int64_t)PRODUCT);
                if (what != 1) lg_cuda_decode_attend(&e, &a);
            }
            CUDA(cudaStreamEndCapture(e.stream, &g));
            CUDA(cudaGraphInstantiate(&x, g, 0));
            took[what] = time_graph(x, e.stream, 15) / layers;
            CUDA(cudaGraphExecDestroy(x));
            CUDA(cudaGraphDestroy(g));
        }
        const double us = took[0];
        const double rows = (double)n_seq * (r < 0 ? (double)T_KV * len : (double)r * len + (double)(T_KV - r) * cnt[0]), gb = rows * rb * 2 / us / 1e3;
        printf("%-5s batch %2d len %8lld %s%2d: %9.2f us a layer %7.1f GB/s %5.1f%% of copy; behind a product of %.1f us: %.2f more\n", lg_base_dtype(t)->name, n_seq, (long long)len,
               r < 0 ? "dense        " : "hybrid heads ", r < 0 ? 8 : r, us, gb, 100 * gb / copy, took[1], took[2] - took[1]);
        fflush(stdout);
        if (r >= 0) {
            CUDA(cudaFree(dread));
            CUDA(cudaFree(dmake));
        }
    }
    for (int l = 0; l < layers; l++) {
        CUDA(cudaFree(k[l]));
        CUDA(cudaFree(v[l]));
    }
    CUDA(cudaFree((void *)product));
    CUDA(cudaFree(a.out)); CUDA(cudaFree(q)); CUDA(cudaFree((void *)a.seqs)); CUDA(cudaFree(e.scratch)); CUDA(cudaFree(a.score)); CUDA(cudaFree(a.sets.idx));
    CUDA(cudaFree(a.sets.n)); CUDA(cudaFree((void *)dbudget)); CUDA(cudaFree((void *)ddense)); CUDA(cudaFree(dpage));
    lg_base_free(order); lg_base_free(idx); lg_base_free(cnt);
}

/* Keeps memory full as the streaming products do: 128 KB a multiprocessor are always on their way. n: whole copies. */
enum { LOAD_COPY = 8192, LOAD_RING = 16 };
static __global__ void __launch_bounds__(256) time_load(const uint8_t *w, int64_t n) {
    LG_SMEM(smem);
    const lg_smem bar = lg_smem_of(smem), ring = bar + 128;
    if (threadIdx.x) return;
    for (int32_t i = 0; i < LOAD_RING; i++) lg_bar_init(bar + (lg_smem)(8 * i));
    for (int64_t i = 0, c = blockIdx.x; c - (int64_t)LOAD_RING * gridDim.x < n; i++, c += gridDim.x) {
        const uint32_t at = (uint32_t)(i % LOAD_RING);
        if (i >= LOAD_RING) lg_bar_wait(bar + 8 * at, (uint32_t)(i / LOAD_RING - 1) & 1);
        if (c >= n) continue;
        lg_bar_arrive(bar + 8 * at, LOAD_COPY);
        lg_bulk(ring + LOAD_COPY * at, w + c * LOAD_COPY, LOAD_COPY, bar + 8 * at);
    }
}

static __global__ void time_stamp(unsigned long long *at, uint32_t sleep_us) {
    for (uint32_t i = 0; i < sleep_us; i++) __nanosleep(1000);
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(*at) :: "memory");
}

/* Selection beside a kernel that keeps memory full, one block a multiprocessor: median microseconds between two stamps of its stream. */
static double time_beside(const lg_cuda_env *e, const lg_cuda_decode *a, uint8_t *scratch, bool select) {
    enum { N = 32 };
    const int64_t n = 110000; /* 900 MB: 300 us */
    uint8_t *w = (uint8_t *)room(n * LOAD_COPY);
    unsigned long long *at = (unsigned long long *)room(2 * N * 8), got[2 * N];
    cudaStream_t side;
    CUDA(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
    CUDA(cudaFuncSetAttribute(time_load, cudaFuncAttributeMaxDynamicSharedMemorySize, TIME_SMEM));
    CUDA(cudaDeviceSynchronize());
    double us[N];
    for (int i = 0; i < N; i++) {
        lg_cuda_launch(time_load, dim3((unsigned)e->n_sm), dim3(256), TIME_SMEM, e->stream, false, w, n);
        LG_LAUNCH(time_stamp, 1, 1, 0, side, at + 2 * i, 40);
        if (select) lg_cuda_decode_select(e, a, side, scratch);
        LG_LAUNCH(time_stamp, 1, 1, 0, side, at + 2 * i + 1, 0);
        CUDA(cudaDeviceSynchronize());
    }
    CUDA(cudaMemcpy(got, at, sizeof got, cudaMemcpyDeviceToHost));
    for (int i = 0; i < N; i++) {
        us[i] = 1e-3 * (double)(got[2 * i + 1] - got[2 * i]);
        for (int j = i; j > 0 && us[j] < us[j - 1]; j--) {
            const double x = us[j];
            us[j] = us[j - 1];
            us[j - 1] = x;
        }
    }
    CUDA(cudaStreamDestroy(side));
    CUDA(cudaFree(w)); CUDA(cudaFree(at));
    return us[N / 2];
}

/* each: sets of a head, at different shares of the budget; keep: they keep every so many-th unit, 0: none. */
static void time_select_of(lg_cuda_env e, int64_t len, int heads, lg_rule rule, double value, int32_t block, int32_t each, int32_t keep, int32_t n_latest) {
    const int32_t n_slot = T_KV * each + n_latest;
    const int64_t words = keep ? (len / block + 31) / 32 : 0;
    int32_t make[T_KV], n_make[T_KV];
    int64_t budget = 4096;
    uint8_t dense = 0;
    for (int h = 0; h < T_KV; h++) {
        make[h] = h < heads ? h * each : -1;
        n_make[h] = h < heads ? each : 0;
    }
    int32_t *share = (int32_t *)lg_base_calloc(n_slot, 4);
    for (int32_t j = 0; j < n_slot; j++) share[j] = LG_SHARE_ONE * (1 + j % 5) / 4;
    uint32_t *kept = (uint32_t *)lg_base_calloc(n_slot * words + 1, 4);
    for (int64_t i = 0; i < n_slot * words; i++)
        for (int bit = 0; bit < 32; bit++) kept[i] |= (uint32_t)(below(keep) == 0) << bit;
    lg_cuda_seq seq = { NULL, len, keep ? (uint32_t *)up(kept, n_slot * words * 4) : NULL };
    lg_cuda_decode a = {};
    a.geom = (lg_kv_geom){ LG_DTYPE_BF16, T_KV, T_HD, 256 };
    a.n_seq = 1;
    a.n_head = 32;
    a.max_len = len;
    a.seqs = (lg_cuda_seq *)up(&seq, sizeof seq);
    a.make = a.read = (int32_t *)up(make, sizeof make);
    a.make_host = a.read_host = make;
    a.budget = (int64_t *)up(&budget, 8);
    a.dense = (uint8_t *)up(&dense, 1);
    a.select = (lg_select){ rule, value, 0.0883883f, 128, 256, NULL };
    float *score = (float *)room(T_KV * len * 4);
    time_floats<<<256, 256>>>(score, T_KV * len, 9);
    a.score = score;
    if (each > 1 || n_latest) a.spread = (lg_spread){ share, share, n_make, 384, T_KV * each, n_latest };
    a.sets = (lg_sets){ (int32_t *)room(n_slot * len * 4), (int32_t *)room(n_slot * 4), len, n_slot, block, words };
    uint8_t *scratch = (uint8_t *)room(lg_cuda_select_scratch(&e, 1, T_KV * each, len));
    enum { N = 16 };
    cudaGraph_t g;
    cudaGraphExec_t x;
    CUDA(cudaDeviceSynchronize());
    lg_cuda_decode_select(&e, &a, e.stream, scratch);
    CUDA(cudaStreamSynchronize(e.stream));
    CUDA(cudaStreamBeginCapture(e.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < N; i++) lg_cuda_decode_select(&e, &a, e.stream, scratch);
    CUDA(cudaStreamEndCapture(e.stream, &g));
    CUDA(cudaGraphInstantiate(&x, g, 0));
    const double alone = time_graph(x, e.stream, 15) / N;
    const double beside = time_beside(&e, &a, scratch, true), stamps = time_beside(&e, &a, scratch, false);
    printf("select rule %d value %g block %2d heads %d x %d keep 1/%d latest %2d len %8lld: %8.2f us; beside a full memory %.2f (stamps alone %.2f)\n", (int)rule, value, block, heads, each, keep, n_latest, (long long)len,
           alone, beside, stamps);
    fflush(stdout);
    CUDA(cudaGraphExecDestroy(x)); CUDA(cudaGraphDestroy(g));
    CUDA(cudaFree((void *)a.seqs)); CUDA(cudaFree((void *)a.make)); CUDA(cudaFree((void *)a.budget)); CUDA(cudaFree((void *)a.dense)); CUDA(cudaFree(score));
    CUDA(cudaFree(a.sets.idx)); CUDA(cudaFree(a.sets.n)); CUDA(cudaFree(scratch));
    if (seq.kept) CUDA(cudaFree((void *)seq.kept));
    lg_base_free(share); lg_base_free(kept);
}

static void time_select(lg_cuda_env e, int64_t len, int heads, lg_rule rule, double value, int32_t block) { time_select_of(e, len, heads, rule, value, block, 1, 0, 0); }

/* As maps with kept tokens have it: of SmolLM2-135M (3 KV heads, latest slots in layer 0 alone), of Llama-3-8B. */
static void time_kept(lg_cuda_env e) {
    time_select_of(e, 8192, 3, LG_RULE_TOPK, 0, 1, 1, 0, 0);
    time_select_of(e, 8192, 3, LG_RULE_TOPK, 0, 1, 1, 8, 0);
    time_select_of(e, 8192, 3, LG_RULE_TOPK, 0, 1, 20, 0, 0);
    time_select_of(e, 8192, 3, LG_RULE_TOPK, 0, 1, 20, 8, 0);
    time_select_of(e, 8192, 0, LG_RULE_TOPK, 0, 1, 1, 8, 60);
    time_select_of(e, 131072, 8, LG_RULE_TOPK, 0, 1, 1, 64, 0);
    time_select_of(e, 131072, 8, LG_RULE_TOPK, 0, 1, 4, 0, 0);
    time_select_of(e, 131072, 8, LG_RULE_TOPK, 0, 1, 4, 64, 0);
    time_select_of(e, 131072, 8, LG_RULE_TOPK, 0, 1, 28, 64, 0);
    time_select_of(e, 131072, 0, LG_RULE_TOPK, 0, 1, 1, 64, 60);
}

static void time_selects(lg_cuda_env e) {
    time_kept(e);
    for (int64_t len = 8192; len <= 1 << 20; len *= 2) {
        time_select(e, len, 1, LG_RULE_TOPK, 0, 1);
        time_select(e, len, 8, LG_RULE_TOPK, 0, 1);
    }
    time_select(e, 131072, 8, LG_RULE_TOPK, 0, 64);
    time_select(e, 131072, 1, LG_RULE_TOPP, 0.9, 1);
    time_select(e, 131072, 1, LG_RULE_THRESHOLD, 1e-4, 1);
}

static int run_times(lg_cuda_env e, char what) {
    const bool quick = what == 'q';
    CUDA(cudaStreamCreateWithFlags(&e.stream, cudaStreamNonBlocking));
    e.compute = LG_COMPUTE_AUTO;
    if (what == 's') {
        time_selects(e);
        return 0;
    }
    const double copy = time_copy(e.stream);
    printf("copy %.0f GB/s\n", copy);
    if (quick) {
        time_attend(e, LG_DTYPE_BF16, 1, 8192, 32, copy, 0x3);
        time_attend(e, LG_DTYPE_BF16, 1, 32768, 8, copy, 0x2);
        time_attend(e, LG_DTYPE_BF16, 1, 131072, 4, copy, 0x107);
        time_attend(e, LG_DTYPE_BF16, 8, 32768, 2, copy, 0x3);
        time_attend(e, LG_DTYPE_F16, 1, 8192, 32, copy, 0);
        time_attend(e, LG_DTYPE_KV8, 1, 8192, 32, copy, 0);
        time_attend(e, LG_DTYPE_KV8, 1, 131072, 4, copy, 0x3);
        time_attend(e, LG_DTYPE_KV8, 1, 1 << 20, 2, copy, 0x3);
        time_select(e, 8192, 1, LG_RULE_TOPK, 0, 1);
        time_select(e, 131072, 1, LG_RULE_TOPK, 0, 1);
        time_select(e, 131072, 8, LG_RULE_TOPK, 0, 1);
        time_select(e, 1 << 20, 1, LG_RULE_TOPK, 0, 1);
        time_select(e, 1 << 20, 8, LG_RULE_TOPK, 0, 1);
        return 0;
    }
    time_attend(e, LG_DTYPE_BF16, 1, 8192, 32, copy, 0x1ff);
    time_attend(e, LG_DTYPE_BF16, 1, 32768, 8, copy, 0x1ff);
    time_attend(e, LG_DTYPE_BF16, 1, 131072, 2, copy, 0x1ff);
    time_attend(e, LG_DTYPE_BF16, 8, 32768, 2, copy, 0x1ff);
    time_attend(e, LG_DTYPE_KV8, 1, 8192, 32, copy, 0);
    time_attend(e, LG_DTYPE_KV8, 1, 131072, 4, copy, 0x1ff);
    time_attend(e, LG_DTYPE_KV8, 1, 1 << 20, 1, copy, 0x1ff);
    time_selects(e);
    return 0;
}
