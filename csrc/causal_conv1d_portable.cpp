// The convolution kernels compiled for portable.
#include "causal_conv1d.h"

#include <cstring>
#include <type_traits>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "vector.inc"
#include "causal_conv1d_kernels.inc"
