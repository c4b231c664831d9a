// The scan kernels compiled for avx512.
#include "diagonal_scan.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include "isa_avx512.inc"
#include "diagonal_scan_kernels.inc"
#include "isa_end.inc"
#endif
