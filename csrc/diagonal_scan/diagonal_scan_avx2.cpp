// The scan kernels compiled for avx2.
#include "diagonal_scan/diagonal_scan.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include "core/isa_avx2.inc"
#include "diagonal_scan/diagonal_scan_kernels.inc"
#include "core/isa_end.inc"
#endif
