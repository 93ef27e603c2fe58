/* The largest of several errors, for tests in C and in C++. */
#ifndef LG_TEST_WORSEN_H
#define LG_TEST_WORSEN_H
/* Takes in an error; one that is no number stays. */
static inline void fx_worsen(double *worst, double error) {
    if (*worst == *worst && !(error <= *worst)) *worst = error;
}
#endif
