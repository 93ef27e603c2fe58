/* XXH3 (xxhash), wrapped here and nowhere else. */
#include "base/base.h"
#include <stdio.h>
#include <xxhash.h>

struct lg_hash { XXH3_state_t *state; };

lg_hash *lg_base_hash_new(void) {
    lg_hash *h = lg_base_alloc(sizeof *h);
    if (!h) return NULL;
    h->state = XXH3_createState();
    if (h->state) XXH3_128bits_reset(h->state);
    else lg_base_free(h), h = NULL;
    return h;
}
void lg_base_hash_free(lg_hash *h) {
    if (!h) return;
    XXH3_freeState(h->state);
    lg_base_free(h);
}
void lg_base_hash_feed(lg_hash *h, const void *data, int64_t n) { XXH3_128bits_update(h->state, data, (size_t)n); }
void lg_base_hash_hex128(const lg_hash *h, char out[33]) {
    const XXH128_hash_t d = XXH3_128bits_digest(h->state);
    snprintf(out, 33, "%016llx%016llx", (unsigned long long)d.high64, (unsigned long long)d.low64);
}
uint64_t lg_base_hash_digest64(const lg_hash *h) { return XXH3_128bits_digest(h->state).low64; }
uint64_t lg_base_hash_64(const void *data, int64_t n) { return XXH3_64bits(data, (size_t)n); }
