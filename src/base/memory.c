/* Memory: checked sizes, the allocator everything goes through, growing id lists and texts.
 *
 * A block is zero-filled and 64-byte aligned. It is cut out of a calloc block, whose address stands in
 * the 8 bytes in front of it: calloc hands out large blocks as untouched zero pages, so a cache that is
 * reserved for a long context costs nothing until it is written. Blocks of 2 MB and more are whole huge pages where
 * the kernel has them (reading 256 MB with both cores of an EPYC: 29.9 GB/s, 24.8 with 4 KB pages). Under
 * AddressSanitizer the block is exact instead, so that every overrun is seen. */
#include "base/base.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LG_EXACT_BLOCKS 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(LG_EXACT_BLOCKS)
#define LG_EXACT_BLOCKS 1
#endif

enum { ALIGN = 64, HUGE_PAGE = 2 << 20 };

static _Thread_local bool guard_up; /* the decode loop's own thread: others may allocate meanwhile */
static atomic_llong guard_hits;
static atomic_llong fail_in; /* allocations left until one fails; 0: never */
static atomic_llong asked;   /* bytes since the last lg_base_alloc_sum; stays at its maximum */

bool lg_base_mul(int64_t a, int64_t b, int64_t *out) {
    return a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, out);
}

bool lg_base_add(int64_t a, int64_t b, int64_t *out) {
    return a >= 0 && b >= 0 && !__builtin_add_overflow(a, b, out);
}

static bool injected_failure(void) {
    long long left = atomic_load(&fail_in);
    while (left > 0)
        if (atomic_compare_exchange_weak(&fail_in, &left, left - 1)) return left == 1;
    return false;
}

static void *raw_alloc(size_t bytes) {
#ifdef LG_EXACT_BLOCKS
    void *p = NULL;
    if (posix_memalign(&p, ALIGN, bytes ? bytes : 1)) return NULL;
    return memset(p, 0, bytes);
#else
    if (bytes > SIZE_MAX - 2 * HUGE_PAGE) return NULL;
    const bool huge = bytes >= HUGE_PAGE;
    const size_t align = huge ? HUGE_PAGE : ALIGN;
    if (huge) bytes = (bytes + align - 1) / align * align;
    char *block = calloc(1, bytes + 2 * align);
    if (!block) return NULL;
    char *p = block + ALIGN;
    p += (align - (uintptr_t)p % align) % align;
#ifdef MADV_HUGEPAGE
    if (huge) madvise(p, bytes, MADV_HUGEPAGE); /* advice: its failure costs nothing but speed */
#endif
    memcpy(p - sizeof block, &block, sizeof block);
    return p;
#endif
}

void *lg_base_alloc(int64_t bytes) {
    if (guard_up) {
        atomic_fetch_add(&guard_hits, 1);
#if defined(LG_EXACT_BLOCKS) || defined(LG_DEBUG)
        abort();
#endif
    }
    if (bytes > 0) {
        long long sum, now = atomic_load_explicit(&asked, memory_order_relaxed);
        do sum = now > LLONG_MAX - bytes ? LLONG_MAX : now + bytes;
        while (!atomic_compare_exchange_weak(&asked, &now, sum));
    }
    if (bytes < 0 || injected_failure()) return NULL;
    return raw_alloc((size_t)bytes);
}

void *lg_base_calloc(int64_t count, int64_t size) {
    int64_t bytes;
    return lg_base_mul(count, size, &bytes) ? lg_base_alloc(bytes) : NULL;
}

void *lg_base_realloc(void *p, int64_t old_bytes, int64_t new_bytes) {
    void *q = lg_base_alloc(new_bytes);
    if (!q) return NULL; /* p stays valid, as with realloc */
    if (p) {
        memcpy(q, p, (size_t)(old_bytes < new_bytes ? old_bytes : new_bytes));
        lg_base_free(p);
    }
    return q;
}

void lg_base_free(void *p) {
    if (!p) return;
#ifdef LG_EXACT_BLOCKS
    free(p);
#else
    void *block;
    memcpy(&block, (char *)p - sizeof block, sizeof block);
    free(block);
#endif
}

char *lg_base_strdup(const char *s) {
    size_t n = strlen(s);
    char *t = n < INT64_MAX ? lg_base_alloc((int64_t)n + 1) : NULL;
    if (t) memcpy(t, s, n);
    return t;
}

void lg_base_alloc_guard(bool up) { guard_up = up; }

int64_t lg_base_alloc_guard_hits(void) { return atomic_load(&guard_hits); }

int64_t lg_base_alloc_fail_at(int64_t nth) { return atomic_exchange(&fail_in, nth > 0 ? nth : 0); }

int64_t lg_base_alloc_sum(void) { return atomic_exchange(&asked, 0); }

/* ---- growing lists ---- */

/* The next capacity that holds `need`; -1 where that many elements cannot be. */
static int64_t grown(int64_t cap, int64_t need, int64_t size) {
    if (need < 0 || need > INT64_MAX / size / 2) return -1;
    int64_t next = cap < 32 ? 32 : cap;
    while (next < need) next = next > INT64_MAX / size / 2 ? need : next * 2;
    return next;
}

bool lg_base_ids_push(lg_ids *a, int32_t id) {
    if (a->n >= a->cap) {
        int64_t cap = grown(a->cap, a->n + 1, (int64_t)sizeof *a->data);
        if (cap < 0) return false;
        int32_t *p = lg_base_realloc(a->data, a->n * (int64_t)sizeof *a->data,
                                     cap * (int64_t)sizeof *a->data);
        if (!p) return false;
        a->data = p;
        a->cap = cap;
    }
    a->data[a->n++] = id;
    return true;
}

/* Room for n more bytes and the ending NUL. */
static bool text_reserve(lg_text *t, int64_t n) {
    int64_t need;
    if (!lg_base_add(t->n, n, &need) || !lg_base_add(need, 1, &need)) return false;
    if (need <= t->cap) return true;
    int64_t cap = grown(t->cap, need, 1);
    if (cap < 0) return false;
    char *p = lg_base_realloc(t->data, t->n, cap);
    if (!p) return false;
    t->data = p;
    t->cap = cap;
    return true;
}

bool lg_base_text_append(lg_text *t, const char *data, int64_t n) {
    if (!text_reserve(t, n)) return false;
    if (n > 0) memcpy(t->data + t->n, data, (size_t)n);
    t->n += n;
    t->data[t->n] = '\0';
    return true;
}

bool lg_base_text_printf(lg_text *t, const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    bool ok = n >= 0 && text_reserve(t, n);
    if (ok) {
        vsnprintf(t->data + t->n, (size_t)n + 1, fmt, again);
        t->n += n;
    }
    va_end(again);
    va_end(ap);
    return ok;
}

void lg_ids_free(lg_ids *a) {
    if (!a) return;
    lg_base_free(a->data);
    *a = (lg_ids){0};
}

void lg_text_free(lg_text *t) {
    if (!t) return;
    lg_base_free(t->data);
    *t = (lg_text){0};
}
