/* The counter-based generator, the clock and the cores this process may use. */
#include "base/base.h"

#include <sched.h>
#include <time.h>
#include <unistd.h>

/* A bijection of 64 bits in which every input bit reaches every output bit (two xor-shift-multiply
 * rounds; constants of the splitmix64 generator). */
static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xBF58476D1CE4E5B9u;
    x ^= x >> 27;
    x *= 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* Seed, stream and counter enter one after the other, each through a full mix: neighbours in any of them
 * give unrelated numbers. The added constant keeps all-zero input from giving zero. */
uint64_t lg_base_rng(uint64_t seed, uint64_t stream, uint64_t counter) {
    const uint64_t odd = 0x9E3779B97F4A7C15u;
    uint64_t x = mix(seed + odd);
    x = mix((x ^ stream) + odd);
    return mix((x ^ counter) + odd);
}

double lg_base_rng_unit(uint64_t seed, uint64_t stream, uint64_t counter) {
    return (double)(lg_base_rng(seed, stream, counter) >> 11) * 0x1p-53;
}

/* The high half of a 64 x 64 product; the bias is below n / 2^64. */
int64_t lg_base_rng_below(uint64_t seed, uint64_t stream, uint64_t counter, int64_t n) {
    __extension__ typedef unsigned __int128 u128;
    if (n <= 0) return 0;
    return (int64_t)(((u128)lg_base_rng(seed, stream, counter) * (u128)(uint64_t)n) >> 64);
}

double lg_base_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The affinity mask counts, not the machine: containers and taskset lend fewer cores than there are. */
int lg_base_n_cores(void) {
    cpu_set_t few;
    if (sched_getaffinity(0, sizeof few, &few) == 0) {
        int n = CPU_COUNT(&few);
        return n > 0 ? n : 1;
    }
    /* More CPUs than the fixed set holds: ask with ever larger sets. */
    for (size_t cpus = 2 * CPU_SETSIZE; cpus <= (size_t)1 << 20; cpus *= 2) {
        cpu_set_t *many = CPU_ALLOC(cpus);
        if (!many) break;
        size_t bytes = CPU_ALLOC_SIZE(cpus);
        int n = sched_getaffinity(0, bytes, many) == 0 ? CPU_COUNT_S(bytes, many) : 0;
        CPU_FREE(many);
        if (n > 0) return n;
    }
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}
