/* cuBLASLt, opened at run time so that the program also starts where it is missing. The handle, the descriptors and the
 * chosen algorithm of every shape are kept; nothing is created in a decode step that ran before. */
#include "ops/cuda/product.cuh"
#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

enum { N_SHAPE = 256 };
static const size_t WORKSPACE = (size_t)64 << 20;

#define NAMES(X) X(cublasLtCreate) X(cublasLtMatmul) X(cublasLtMatmulDescCreate) X(cublasLtMatmulDescSetAttribute) \
    X(cublasLtMatrixLayoutCreate) X(cublasLtMatmulPreferenceCreate) X(cublasLtMatmulPreferenceSetAttribute) \
    X(cublasLtMatmulPreferenceDestroy) X(cublasLtMatmulAlgoGetHeuristic)
#define X(f) static decltype(&f) p_##f;
NAMES(X)
#undef X

typedef struct shape {
    lg_blas_kind kind; int device; bool add;
    int64_t m, n, k, ldy;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
} shape;
static cublasLtHandle_t handle[16];
static void *workspace[16];
static shape shapes[N_SHAPE];
static int n_shape;
static char problem[160];

const char *lg_cuda_blas_problem(void) { return problem; }
void lg_cuda_blas_forget(void) { problem[0] = 0; }

static cudaError_t bad(const char *what, int code) {
    snprintf(problem, sizeof problem, "cuBLASLt: %s failed (status %d)", what, code);
    return cudaErrorUnknown;
}

lg_status lg_cuda_blas_open(lg_error *err) {
    static const char *const names[] = { "libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", "/usr/local/cuda/lib64/libcublasLt.so" };
    int device = 0;
    static void *lib;
    for (size_t i = 0; !lib && i < sizeof names / sizeof *names; i++) lib = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!lib) return lg_base_fail(err, LG_ERR_DEVICE, -1, "device cuda: libcublasLt.so was not found (products of many rows need it)");
#define X(f) \
    p_##f = (decltype(&f))dlsym(lib, #f); \
    if (!p_##f) return lg_base_fail(err, LG_ERR_DEVICE, -1, "device cuda: libcublasLt.so has no %s", #f);
    NAMES(X)
#undef X
    cudaGetDevice(&device);
    if (device >= 16) return lg_base_fail(err, LG_ERR_DEVICE, -1, "device cuda:%d: only 16 devices are supported", device);
    if (!handle[device] && p_cublasLtCreate(&handle[device]) != CUBLAS_STATUS_SUCCESS)
        return lg_base_fail(err, LG_ERR_DEVICE, -1, "device cuda: cublasLtCreate failed");
    if (!workspace[device]) return lg_cuda_new(&workspace[device], (int64_t)WORKSPACE, "the workspace of cuBLASLt", err);
    return LG_OK;
}

static cudaError_t make(shape *s) {
    const bool f32 = s->kind == LG_BLAS_F32;
    const cudaDataType_t in = f32 ? CUDA_R_32F : CUDA_R_16BF, out = s->kind == LG_BLAS_BF16_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    const cublasOperation_t t = CUBLAS_OP_T, n = CUBLAS_OP_N;
    cublasLtMatmulPreference_t pref;
    cublasLtMatmulHeuristicResult_t best = {};
    int found = 0, st;
    if ((st = p_cublasLtMatmulDescCreate(&s->op, f32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F, CUDA_R_32F))) return bad("MatmulDescCreate", st);
    p_cublasLtMatmulDescSetAttribute(s->op, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t);
    p_cublasLtMatmulDescSetAttribute(s->op, CUBLASLT_MATMUL_DESC_TRANSB, &n, sizeof n);
    /* Column-major: y^T [m, n] = (w^T)^T [m, k] x^T [k, n]. */
    if ((st = p_cublasLtMatrixLayoutCreate(&s->a, in, (uint64_t)s->k, (uint64_t)s->m, s->k)) ||
        (st = p_cublasLtMatrixLayoutCreate(&s->b, in, (uint64_t)s->k, (uint64_t)s->n, s->k)) ||
        (st = p_cublasLtMatrixLayoutCreate(&s->c, out, (uint64_t)s->m, (uint64_t)s->n, s->ldy)))
        return bad("MatrixLayoutCreate", st);
    if ((st = p_cublasLtMatmulPreferenceCreate(&pref))) return bad("MatmulPreferenceCreate", st);
    p_cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE, sizeof WORKSPACE);
    st = p_cublasLtMatmulAlgoGetHeuristic(handle[s->device], s->op, s->a, s->b, s->c, s->c, pref, 1, &best, &found);
    p_cublasLtMatmulPreferenceDestroy(pref);
    if (st || !found) return bad("MatmulAlgoGetHeuristic", st);
    s->algo = best.algo;
    return cudaSuccess;
}

cudaError_t lg_cuda_blas_product(cudaStream_t stream, lg_blas_kind kind, void *y, int64_t ldy, const void *x, const void *w, int64_t n_tok,
                                 int64_t n_out, int64_t n_in, bool add) {
    const float one = 1.0f, beta = add ? 1.0f : 0.0f;
    int device = 0;
    shape *s = NULL;
    cudaGetDevice(&device);
    for (int i = 0; i < n_shape && !s; i++) {
        shape *q = &shapes[i];
        if (q->kind == kind && q->device == device && q->m == n_out && q->n == n_tok && q->k == n_in && q->ldy == ldy && q->add == add) s = q;
    }
    if (!s) {
        static int turn;
        /* (a table that is full gives up its oldest shape; its descriptors are a few hundred bytes and are not kept track of) */
        s = n_shape < N_SHAPE ? &shapes[n_shape] : &shapes[turn++ % N_SHAPE];
        memset(s, 0, sizeof *s);
        s->kind = kind;
        s->device = device;
        s->add = add;
        s->m = n_out;
        s->n = n_tok;
        s->k = n_in;
        s->ldy = ldy;
        const cudaError_t e = make(s);
        if (e != cudaSuccess) {
            s->m = -1;
            return e;
        }
        if (n_shape < N_SHAPE) n_shape++;
    }
    const int st = p_cublasLtMatmul(handle[device], s->op, &one, w, s->a, x, s->b, &beta, y, s->c, y, s->c, &s->algo, workspace[device],
                                    WORKSPACE, stream);
    return st ? bad("Matmul", st) : cudaSuccess;
}
