#if defined(__x86_64__)
#define ROWS_TABLE lg_gemm_rows_avx2
#include "ops/cpu/gemm_row.h"
#endif
