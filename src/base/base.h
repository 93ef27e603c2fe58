/* base: what every room stands on: status, log, memory, rng, clock, dtype table. Sees nothing else. */
#ifndef LG_BASE_H
#define LG_BASE_H
#include <stdarg.h>
#include <stdatomic.h>
#include "longan/longan.h"

/* Fills *err (may be NULL) and returns code. offset -1 where there is none. */
lg_status lg_base_fail(lg_error *err, lg_status code, int64_t offset, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
void lg_base_log(lg_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
#define LG_TRY(expr)                                  \
    do {                                              \
        st = (expr);                                  \
        if (st != LG_OK) goto done;                   \
    } while (0)

/* Checked sizes: false on overflow (or a negative operand). */
bool lg_base_mul(int64_t a, int64_t b, int64_t *out);
bool lg_base_add(int64_t a, int64_t b, int64_t *out);

/* All memory goes through these: zero-filled, 64-byte aligned; NULL when it cannot be had. Tests make the
 * nth allocation fail (lg_base_alloc_fail_at) and the guard aborts on any allocation while it is raised. */
void *lg_base_alloc(int64_t bytes);
void *lg_base_calloc(int64_t count, int64_t size); /* checked product */
void *lg_base_realloc(void *p, int64_t old_bytes, int64_t new_bytes);
void lg_base_free(void *p);
char *lg_base_strdup(const char *s);
void lg_base_copy(void *dst, const void *src, int64_t bytes); /* memcpy; large pieces by several threads */
void lg_base_alloc_guard(bool up);        /* decode loop: no allocation between up and down */
int64_t lg_base_alloc_guard_hits(void);   /* allocations seen while the guard was up (release: counted) */
int64_t lg_base_alloc_fail_at(int64_t nth); /* 0: never; counts from now. Returns what the last call had left: 0 when its failure came */
int64_t lg_base_alloc_sum(void);          /* bytes asked for since the last call, whatever was freed: tests bound what a bad file can ask for */

bool lg_base_ids_push(lg_ids *a, int32_t id);                       /* false: out of memory */
bool lg_base_text_append(lg_text *t, const char *data, int64_t n);  /* keeps the ending NUL */
bool lg_base_text_printf(lg_text *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Counter-based generator: a pure function of (seed, stream, counter). */
uint64_t lg_base_rng(uint64_t seed, uint64_t stream, uint64_t counter);
double lg_base_rng_unit(uint64_t seed, uint64_t stream, uint64_t counter);            /* [0, 1) */
int64_t lg_base_rng_below(uint64_t seed, uint64_t stream, uint64_t counter, int64_t n); /* [0, n) */

/* XXH3 over a stream of pieces. */
typedef struct lg_hash lg_hash;
lg_hash *lg_base_hash_new(void);                     /* NULL: out of memory */
void lg_base_hash_feed(lg_hash *h, const void *data, int64_t n);
void lg_base_hash_hex128(const lg_hash *h, char out[33]);
uint64_t lg_base_hash_64(const void *data, int64_t n); /* XXH3-64 of one piece */
uint64_t lg_base_hash_digest64(const lg_hash *h);      /* low half of XXH3-128 */
void lg_base_hash_free(lg_hash *h);

double lg_base_now(void); /* monotonic seconds */
int lg_base_n_cores(void); /* that this process may use */

/* dtype table. Quantised types: block elements per block, bytes per block. */
typedef struct lg_dtype_info { const char *name; int32_t block; int32_t bytes; int32_t gguf_type; } lg_dtype_info;
const lg_dtype_info *lg_base_dtype(lg_dtype t);          /* name as in contract.md: "q4_0", "bf16" ... */
bool lg_base_dtype_parse(const char *name, lg_dtype *out);
int64_t lg_base_row_bytes(lg_dtype t, int64_t n);        /* -1 if n is no whole number of blocks; KV8 rounds up */
/* The exact meaning of every weight dtype: n elements from packed src to f32. */
void lg_base_dequant(lg_dtype t, const void *src, float *dst, int64_t n);
/* f32, f16, bf16, Q8_0, Q4_0, Q4_1, KV8 only; round to nearest even where it rounds. */
void lg_base_quant(lg_dtype t, const float *src, void *dst, int64_t n);
float lg_base_f16_to_f32(uint16_t h);
uint16_t lg_base_f32_to_f16(float f);
static inline float lg_base_bf16_to_f32(uint16_t h) {
    union { uint32_t u; float f; } v = { .u = (uint32_t)h << 16 };
    return v.f;
}
uint16_t lg_base_f32_to_bf16(float f);
#endif
