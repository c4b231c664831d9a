// The normalisation kernels compiled for portable.
#include "norms.h"

#include <cstring>
#include <type_traits>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "vector.inc"
#include "transpose.inc"
#include "norms_kernels.inc"
