// The convolution kernels compiled for avx512.
#include "causal_conv1d/causal_conv1d.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

#include "core/isa_avx512.inc"
#include "core/vector.inc"
#include "causal_conv1d/causal_conv1d_kernels.inc"
#include "core/isa_end.inc"
#endif
