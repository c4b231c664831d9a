// The normalisation kernels compiled for avx512.
#include "fused_cpu/norms.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

#include "core/isa_avx512.inc"
#include "core/vector.inc"
#include "core/transpose.inc"
#include "fused_cpu/norms_kernels.inc"
#include "core/isa_end.inc"
#endif
