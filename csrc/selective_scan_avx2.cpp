// The selective scan kernels compiled for avx2.
#include "selective_scan.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#include "isa_avx2.inc"
#include "selective_scan_vector.inc"
#include "selective_scan_forward.inc"
#include "selective_scan_backward.inc"
#include "isa_end.inc"
#endif
