// The gates compiled for avx512.
#include "fused_cpu/gates.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

#include "core/isa_avx512.inc"
#include "core/vector.inc"
#include "core/transpose.inc"
#include "fused_cpu/gates_kernels.inc"
#include "core/isa_end.inc"
#endif
