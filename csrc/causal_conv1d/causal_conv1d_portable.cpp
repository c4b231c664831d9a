// The convolution kernels compiled for portable.
#include "causal_conv1d/causal_conv1d.h"

#include <cstring>
#include <type_traits>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "core/vector.inc"
#include "causal_conv1d/causal_conv1d_kernels.inc"
