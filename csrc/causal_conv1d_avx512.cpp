// The convolution kernels compiled for avx512.
#include "causal_conv1d.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif

#define COMPRESSM_ISA avx512
#define COMPRESSM_ISA_NAME "avx512"
#define COMPRESSM_WIDTH 16
#include "causal_conv1d_kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
