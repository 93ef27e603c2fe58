/* Fibers, barriers and the few calls of the CUDA runtime that tests under the emulation need (see emu.h). */
#define EMU_RUNTIME
#include "emu.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

enum { STACK = 96 << 10, COPIES = 1024, LATE = 8 };
typedef struct barrier { int arrived, want; unsigned gen; } barrier;
typedef struct block { barrier bar; uint8_t *smem; int pace; } block; /* pace: runs in one round of so many */
typedef struct warp { barrier bar; uint8_t slot[32][64]; int first, n; block *b; } warp;
typedef struct copy { uint8_t *dst; const uint8_t *src; int group; } copy;
typedef struct fiber {
    void *sp;
    uint8_t *stack;
    emu_where at;
    warp *w;
    const unsigned *gen; /* runnable when *gen != seen; NULL: runnable */
    unsigned seen;
    bool done, rest;     /* rest: gave its turn away */
    copy *copies;
    int n_copy, groups;
} fiber;

emu_where emu_here;
long emu_took[32];
static fiber *now;
static void *home;
static void (*the_body)(void *);
static void *the_arg;
extern "C" void emu_switch(void **save, void *to);
asm(".text\n.globl emu_switch\nemu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

static void leave(void) {
    fiber *f = now;
    emu_switch(&f->sp, home);
}
static void arrive(barrier *b) {
    if (++b->arrived == b->want) {
        b->arrived = 0;
        b->gen++;
        return;
    }
    now->gen = &b->gen;
    now->seen = b->gen;
    leave();
}
void emu_block_barrier(void) { arrive(&now->w->b->bar); }
void emu_warp_barrier(void) { arrive(&now->w->bar); }
void emu_yield(void) { now->rest = true; leave(); }
int emu_lane(void) { return (int)(emu_here.tid.x & 31); }
uint8_t *emu_shared(void) { return now->w->b->smem; }
void emu_give(const void *data, size_t n) {
    EMU_CHECK(n <= 64);
    memcpy(now->w->slot[emu_lane()], data, n);
    emu_warp_barrier();
}
const void *emu_of(int lane) { return now->w->slot[lane]; }
void emu_cp16(lg_smem dst, const void *src) {
    EMU_CHECK(dst % 16 == 0 && (uintptr_t)src % 16 == 0 && now->n_copy < COPIES);
    now->copies[now->n_copy++] = (copy){ (uint8_t *)dst, (const uint8_t *)src, now->groups };
    memset((void *)dst, 0xff, 16);
}
void emu_cp_commit(void) { now->groups++; }
void emu_cp_wait(int pending) {
    int kept = 0;
    for (int i = 0; i < now->n_copy; i++) {
        const copy c = now->copies[i];
        if (c.group < now->groups - pending) memcpy(c.dst, c.src, 16);
        else now->copies[kept++] = c;
    }
    now->n_copy = kept;
}
/* A barrier is { phase, arrived << 31 | bytes announced and not yet there } in its 8 bytes. A block's copies wait in `bulk`. */
typedef struct bulk { uint8_t *dst; const uint8_t *src; uint32_t n; lg_smem bar; int64_t row_bytes; } bulk; /* row_bytes: of a box, else 0 */
enum { BULKS = 4096 };
static bulk bulks[BULKS];
static int n_bulk;
static uint32_t *words(lg_smem bar) { EMU_CHECK(bar % 8 == 0); return (uint32_t *)bar; }
void emu_bar_init(lg_smem bar) { words(bar)[0] = words(bar)[1] = 0; }
void emu_bar_arrive(lg_smem bar, uint32_t bytes) {
    uint32_t *w = words(bar);
    EMU_CHECK(!(w[1] >> 31)); /* one arrival a phase */
    w[1] = (w[1] + bytes) | 0x80000000u;
}
void emu_bulk(lg_smem dst, const void *src, uint32_t n, lg_smem bar) {
    EMU_CHECK(dst % 16 == 0 && (uintptr_t)src % 16 == 0 && n % 16 == 0 && n > 0 && n_bulk < BULKS);
    bulks[n_bulk++] = (bulk){ (uint8_t *)dst, (const uint8_t *)src, n, bar, 0 };
    memset((void *)dst, 0xff, n);
}
void emu_box(lg_smem dst, const uint8_t *src, int64_t row_bytes, lg_smem bar) {
    EMU_CHECK(dst % 128 == 0 && row_bytes % 16 == 0);
    emu_bulk(dst, src, 2048, bar);
    bulks[n_bulk - 1].row_bytes = row_bytes;
}
static void arrive(const bulk *c) {
    if (!c->row_bytes) memcpy(c->dst, c->src, c->n);
    for (uint32_t at = 0; at < c->n && c->row_bytes; at += 16) {
        uint8_t *line = c->dst + at / 128 * 128;
        memcpy(line + ((at ^ (uintptr_t)line >> 7 << 4) & 112), c->src + at / 128 * c->row_bytes + at % 128, 16);
    }
}
void emu_bar_wait(lg_smem bar, uint32_t parity) {
    uint32_t *w = words(bar);
    while ((w[0] & 1) == parity) {
        if (!(w[1] >> 31)) {
            emu_yield();
            continue;
        }
        int kept = 0;
        for (int i = 0; i < n_bulk; i++) {
            const bulk c = bulks[i];
            if (c.bar != bar) {
                bulks[kept++] = c;
                continue;
            }
            arrive(&c);
            w[1] -= c.n;
        }
        n_bulk = kept;
        EMU_CHECK(w[1] == 0x80000000u); /* all bytes announced, and no others */
        w[1] = 0;
        w[0]++;
    }
}
static void drop(barrier *b) { /* a thread that ended no longer counts */
    b->want--;
    if (b->want > 0 && b->arrived == b->want) {
        b->arrived = 0;
        b->gen++;
    }
}
static void entry(void) {
    the_body(the_arg);
    EMU_CHECK(now->n_copy == 0);
    now->done = true;
    drop(&now->w->bar);
    drop(&now->w->b->bar);
    leave();
}

static uint32_t rnd = 12345;
void emu_run(dim3 grid, dim3 bdim, size_t smem, void (*body)(void *), void *arg) {
    const int nb = (int)(grid.x * grid.y * grid.z), nt = (int)bdim.x, nw = (nt + 31) / 32;
    block *blocks = (block *)calloc((size_t)nb, sizeof *blocks);
    warp *warps = (warp *)calloc((size_t)(nb * nw), sizeof *warps);
    fiber *fibers = (fiber *)calloc((size_t)(nb * nt), sizeof *fibers);
    int *order = (int *)calloc((size_t)(nb * nw), sizeof *order);
    the_body = body;
    the_arg = arg;
    EMU_CHECK(bdim.y == 1 && bdim.z == 1 && nt % 32 == 0);
    for (int b = 0; b < nb; b++) {
        blocks[b].bar.want = nt;
        rnd = rnd * 1664525u + 1013904223u;
        blocks[b].pace = rnd >> 30 ? 1 : LATE;
        blocks[b].smem = (uint8_t *)aligned_alloc(128, (smem + 127) / 128 * 128 + 128);
        memset(blocks[b].smem, 0xff, smem);
        for (int t = 0; t < nt; t++) {
            fiber *f = &fibers[b * nt + t];
            f->w = &warps[b * nw + t / 32];
            f->w->b = &blocks[b];
            f->w->bar.want++;
            f->w->first = b * nt + t / 32 * 32;
            f->w->n = 32;
            f->at.tid = make_uint3((unsigned)t, 0, 0);
            f->at.bid = make_uint3((unsigned)b % grid.x, (unsigned)b / grid.x % grid.y, (unsigned)b / grid.x / grid.y);
            f->at.bdim = bdim;
            f->at.gdim = grid;
            f->stack = (uint8_t *)malloc(STACK);
            f->copies = (copy *)malloc(COPIES * sizeof(copy));
            void **sp = (void **)(((uintptr_t)f->stack + STACK) & ~(uintptr_t)15);
            *--sp = NULL; /* return address of entry, keeps the alignment of a call */
            *--sp = (void *)entry;
            for (int i = 0; i < 6; i++) *--sp = NULL;
            f->sp = sp;
        }
    }
    int live = nb * nt;
    n_bulk = 0;
    for (int i = 0; i < nb * nw; i++) order[i] = i;
    for (int round = 0, idle = 0; live > 0; round++) {
        int ran = 0;
        for (int i = nb * nw - 1; i > 0; i--) {
            rnd = rnd * 1664525u + 1013904223u;
            const int j = (int)((rnd >> 8) % (unsigned)(i + 1)), x = order[i];
            order[i] = order[j];
            order[j] = x;
        }
        for (int i = 0; i < nb * nw; i++) {
            warp *w = &warps[order[i]];
            if (round % w->b->pace) continue;
            for (bool again = true; again;) {
                again = false;
                for (int l = 0; l < w->n; l++) {
                    fiber *f = &fibers[w->first + l];
                    if (f->done || (f->gen && *f->gen == f->seen)) continue;
                    f->gen = NULL;
                    f->rest = false;
                    now = f;
                    emu_here = f->at;
                    emu_switch(&home, f->sp);
                    live -= f->done;
                    ran++;
                    again = again || !f->rest;
                }
            }
        }
        idle = ran ? 0 : idle + 1;
        if (idle > LATE) {
            fprintf(stderr, "emu: no thread can go on: a barrier not all reach\n");
            abort();
        }
    }
    for (int i = 0; i < nb * nt; i++) {
        free(fibers[i].stack);
        free(fibers[i].copies);
    }
    EMU_CHECK(n_bulk == 0); /* every copy was waited for */
    for (int b = 0; b < nb; b++) free(blocks[b].smem);
    free(fibers);
    free(warps);
    free(blocks);
    free(order);
}

/* ---- the CUDA runtime ---- */
extern "C" {
cudaError_t cudaMalloc(void **p, size_t n) {
    *p = NULL;
    return posix_memalign(p, 256, n ? n : 1) == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *p) { free(p); return cudaSuccess; }
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind) { memcpy(d, s, n); return cudaSuccess; }
cudaError_t cudaMemset(void *d, int x, size_t n) { memset(d, x, n); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *d, int x, size_t n, cudaStream_t) { memset(d, x, n); return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void *, enum cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void **p, const void *s) { *p = (void *)(uintptr_t)s; return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t) { return "error"; }
}
