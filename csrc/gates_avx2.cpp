// The gates compiled for avx2.
#include "gates.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

#include "isa_avx2.inc"
#include "vector.inc"
#include "transpose.inc"
#include "gates_kernels.inc"
#include "isa_end.inc"
#endif
