// The cross-entropy kernels compiled for portable.
#include "fused_cpu/cross_entropy.h"

#include <cmath>
#include <cstring>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "core/vector.inc"
#include "fused_cpu/cross_entropy_kernels.inc"
