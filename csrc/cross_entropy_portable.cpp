// The cross-entropy kernels compiled for portable.
#include "cross_entropy.h"

#include <cmath>
#include <cstring>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "vector.inc"
#include "cross_entropy_kernels.inc"
