// The convolution kernels compiled for avx2.
#include "causal_conv1d/causal_conv1d.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include "core/isa_avx2.inc"
#include "core/vector.inc"
#include "causal_conv1d/causal_conv1d_kernels.inc"
#include "core/isa_end.inc"
#endif
