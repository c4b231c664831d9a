// The selective scan kernels compiled for avx2.
#include "selective_scan.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define COMPRESSM_ISA avx2
#define COMPRESSM_ISA_NAME "avx2"
#define COMPRESSM_WIDTH 8
#include "selective_scan_vector.inc"
#include "selective_scan_forward.inc"
#include "selective_scan_backward.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
