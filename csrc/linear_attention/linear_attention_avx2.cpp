// The kernels of linear attention with decays of key channels compiled for avx2.
#include "linear_attention/linear_attention.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#include "core/isa_avx2.inc"
#include "linear_attention/linear_attention_kernels.inc"
#include "core/isa_end.inc"
#endif
