// The kernels of Mamba-2's scan compiled for avx512.
#include "ssd/ssd.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#include "core/isa_avx512.inc"
#include "ssd/ssd_steps.inc"
#include "ssd/ssd_forward.inc"
#include "ssd/ssd_backward.inc"
#include "core/isa_end.inc"
#endif
