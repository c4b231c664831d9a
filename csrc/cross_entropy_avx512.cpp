// The cross-entropy kernels compiled for avx512.
#include "cross_entropy.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#include "isa_avx512.inc"
#include "vector.inc"
#include "cross_entropy_kernels.inc"
#include "isa_end.inc"
#endif
