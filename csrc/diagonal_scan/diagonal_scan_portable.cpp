// The scan kernels compiled for portable.
#include "diagonal_scan/diagonal_scan.h"

#include <cstring>
#include <type_traits>

#define COMPRESSM_ISA portable
#define COMPRESSM_WIDTH 4
#include "diagonal_scan/diagonal_scan_kernels.inc"
