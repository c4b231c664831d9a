// The convolution kernels compiled for avx2.
#include "causal_conv1d.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define COMPRESSM_ISA avx2
#define COMPRESSM_ISA_NAME "avx2"
#define COMPRESSM_WIDTH 8
#include "causal_conv1d_kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
