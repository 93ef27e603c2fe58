/* The bank file on disk (docs/FORMATS.md, "Bank") and what the bank's files share. Private to the room memory.
 *
 *      0  header slot 0   4096 bytes, the first 512 used     the valid header with the higher number is the bank's;
 *   4096  header slot 1   the same                           number n stands in slot (n - 1) % 2
 *   8192  extents, each at a multiple of 64, zeros between: ids, chunks (K and V rows of every layer), table, dead ones
 *
 * A header names the table, the table names every other extent, each with its XXH3-64; together they cover the file, so that
 * `verify` sees any changed bit. Nothing that a committed header names is ever overwritten. */
#ifndef LG_MEMORY_BANK_H
#define LG_MEMORY_BANK_H
#include "memory/memory.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bank files are little-endian and mapped as they are"
#endif

enum { LG_BANK_SLOT = 4096, LG_BANK_DATA = 8192, LG_BANK_ALIGN = 64, LG_BANK_MAX_IDS_EXTENTS = 64 };
enum { LG_BANK_BUILDING = 1, LG_BANK_COMPLETE = 2 };

typedef struct lg_bank_header { /* as it lies in the file */
    char magic[8];                /* "LGBANK", 0, 1 (the version) */
    uint64_t number;              /* 1 as built, one more with every append */
    uint32_t state, slots_dtype;  /* LG_BANK_*; 0 f32, 2 bf16, 11 q8 */
    uint32_t slot_rope, compute;  /* 0, 1; lg_compute of the build */
    int64_t n_vocab, n_layer, n_head_kv, head_dim, chunk, window, ratio, group;
    int64_t n_tokens, n_chunk, n_bytes; /* n_bytes: of the source text, -1: built from ids */
    int64_t file_bytes;           /* end of what this header names */
    int64_t table_at, table_bytes;
    uint64_t table_hash;
    int64_t n_ids, n_dead;        /* extents of ids; extents no longer used */
    uint64_t ids_hash;            /* XXH3-64 of all ids in order */
    char family[40], fingerprint[40], memory[40]; /* hex, NUL-padded; memory: of the memory weights, zeros where there are none */
    uint8_t zero[208];
    uint64_t hash;                /* XXH3-64 of the bytes before */
} lg_bank_header;
_Static_assert(sizeof(lg_bank_header) == 512, "the header's layout");

/* Table: n_chunk chunk entries, n_ids id entries, n_dead dead entries. */
typedef struct lg_bank_entry { int64_t at, bytes, n_token, slots, byte_begin, byte_end; uint64_t hash, zero; } lg_bank_entry;
typedef struct lg_bank_extent { int64_t at, bytes; uint64_t hash, zero; } lg_bank_extent;
_Static_assert(sizeof(lg_bank_entry) == 64 && sizeof(lg_bank_extent) == 32, "the table's layout");

struct lg_bank { /* lg_bank of memory.h */
    lg_map map;                   /* data NULL: ids alone, in memory */
    char *name;
    lg_bank_header h;
    const lg_bank_entry *chunk;   /* [n_chunk] in the mapping, or owned */
    const lg_bank_extent *ids_ext, *dead;
    const int32_t *ids;           /* [n_tokens] */
    int32_t *own_ids; lg_bank_entry *own_chunk; /* joined from several extents, or of a bank without a file */
    bool other_damaged;           /* the header slot not in use is neither empty nor whole */
};

static inline int64_t lg_bank_align(int64_t n) { return (n + LG_BANK_ALIGN - 1) / LG_BANK_ALIGN * LG_BANK_ALIGN; }
/* bank_format.c */
int64_t lg_memory_bank_block(const lg_bank_header *h, int64_t slots); /* bytes of K (or V) of one layer, aligned */
int64_t lg_memory_bank_chunk_bytes(const lg_bank_header *h, int64_t slots);
int64_t lg_memory_bank_table_bytes(const lg_bank_header *h);
void lg_memory_bank_seal(lg_bank_header *h);
lg_status lg_memory_bank_check(const lg_bank_header *h, const char *name, int64_t at, lg_error *err);
/* bank_build.c: whether writing a group overlaps with compressing the next; -1: on devices only. For tests. */
extern int lg_memory_bank_overlap;
/* Ids of a text (flags 0) in an unlinked file beside the path `beside`, mapped read-only. ids NULL: none. */
typedef struct lg_spool { const int32_t *ids; int64_t n; } lg_spool;
lg_status lg_memory_spool(lg_spool *out, const lg_model *m, const char *text, int64_t n_text, const char *beside, lg_error *err);
void lg_memory_spool_free(lg_spool *s);
/* source.c: byte_end[i]: where in text the first min(first + i*chunk, n) ids end, up to the i that covers them all. *known false: the
 * ids do not spell the text (a tokenizer that drops something). */
lg_status lg_memory_byte_ends(const lg_model *m, const int32_t *ids, int64_t n, const char *text, int64_t n_text, int64_t first, int64_t chunk,
                              int64_t *byte_end, bool *known, lg_error *err);
/* source.c: XXH3-128 over the memory weights: letters, and dtype, shape and first 4 KiB of every tensor. */
lg_status lg_memory_weights_hash(const lg_model *m, char out[33], lg_error *err);
#endif
