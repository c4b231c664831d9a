// The convolution kernels compiled for avx2.
#include "causal_conv1d.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include "isa_avx2.inc"
#include "vector.inc"
#include "causal_conv1d_kernels.inc"
#include "isa_end.inc"
#endif
