// The selective scan kernels compiled for avx512.
#include "selective_scan.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif

#define COMPRESSM_ISA avx512
#define COMPRESSM_ISA_NAME "avx512"
#define COMPRESSM_WIDTH 16
#include "selective_scan_vector.inc"
#include "selective_scan_forward.inc"
#include "selective_scan_backward.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
