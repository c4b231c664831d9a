// The gates compiled for portable.
#include "gates.h"

#include <cstring>
#include <type_traits>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "vector.inc"
#include "transpose.inc"
#include "gates_kernels.inc"
