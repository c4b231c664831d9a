// The cross-entropy kernels compiled for avx2.
#include "fused_cpu/cross_entropy.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include "core/isa_avx2.inc"
#include "core/vector.inc"
#include "fused_cpu/cross_entropy_kernels.inc"
#include "core/isa_end.inc"
#endif
