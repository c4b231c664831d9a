// The gates compiled for avx512.
#include "gates.h"

#include <cstring>

#if defined(__x86_64__)
#include "isa_avx512.inc"
#include "vector.inc"
#include "gates_kernels.inc"
#include "isa_end.inc"
#endif
