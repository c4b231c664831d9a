// The gates compiled for portable.
#include "fused_cpu/gates.h"

#include <cstring>
#include <type_traits>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "core/vector.inc"
#include "core/transpose.inc"
#include "fused_cpu/gates_kernels.inc"
