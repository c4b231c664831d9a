// The selective scan kernels compiled for avx512.
#include "selective_scan/selective_scan.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#include "core/isa_avx512.inc"
#include "selective_scan/selective_scan_vector.inc"
#include "selective_scan/selective_scan_forward.inc"
#include "selective_scan/selective_scan_backward.inc"
#include "core/isa_end.inc"
#endif
