// The normalisation kernels compiled for portable.
#include "fused_cpu/norms.h"

#include <cstring>
#include <type_traits>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "core/vector.inc"
#include "core/transpose.inc"
#include "fused_cpu/norms_kernels.inc"
