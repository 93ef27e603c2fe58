/* Errors and the largest of several, for tests in C and in C++. */
#ifndef LG_TEST_WORSEN_H
#define LG_TEST_WORSEN_H
#include <math.h>
#include <stdint.h>
/* Takes in an error; one that is no number stays. */
static inline void fx_worsen(double *worst, double error) {
    if (*worst == *worst && !(error <= *worst)) *worst = error;
}
/* How far got [n] is from want, relative to want (unless that is all zeros): the roots of the sums of squares. */
static inline double fx_apart(const float *got, const float *want, int64_t n) {
    double d = 0, s = 0;
    for (int64_t i = 0; i < n; i++) {
        const double e = (double)got[i] - (double)want[i];
        d += e * e;
        s += (double)want[i] * (double)want[i];
    }
    return sqrt(d / (s > 0 ? s : 1));
}
#endif
